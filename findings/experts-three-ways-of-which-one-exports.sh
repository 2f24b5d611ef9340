#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), transformers 5.24.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6
# Behaviour: transformers computes the experts of a mixture in one of several ways (`set_experts_implementation`), which
#   give the same scores. torch's exporter writes ONNX of one of them only, "batched_mm". Of "eager", a loop over the
#   experts that tokens meet, it stops at a number of experts that depends on the data; of "grouped_mm", which is what a
#   model has unasked, it traces an operator of transformers' own, and no ONNX function is known for it.
# Seen: a small Mixtral, without a cache among its outputs. The scores of the three ways do not differ by 1e-5. eager: a
#   data-dependent expression; grouped_mm: no function for transformers.grouped_mm_fallback; batched_mm: the file runs in
#   ONNX Runtime and agrees to 1e-5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.31.1 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY' 2>/dev/null
import contextlib
import io
import logging

import onnxruntime as ort
import torch
from transformers import MixtralConfig, MixtralForCausalLM

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
config = MixtralConfig(vocab_size=200, num_key_value_heads=2, num_local_experts=4, use_cache=False, **sizes)
model, ids = MixtralForCausalLM(config).eval(), torch.randint(3, 200, (2, 16))
print("unasked:", model.config._experts_implementation)
assert model.config._experts_implementation == "grouped_mm"


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


scores, seen = {}, {}
for way in ("eager", "grouped_mm", "batched_mm"):
    model.set_experts_implementation(way)
    with torch.no_grad():
        scores[way] = Scores()(ids)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            torch.onnx.export(Scores(), (ids,), f"{way}.onnx", dynamo=True, input_names=["ids"], verbose=False)
        (given,) = ort.InferenceSession(f"{way}.onnx", providers=["CPUExecutionProvider"]).run(None, {"ids": ids.numpy()})
        seen[way] = float((torch.from_numpy(given) - scores[way]).abs().max() / scores[way].abs().max())
    except Exception as error:
        seen[way] = " ".join(str(part) for part in (error, error.__cause__) if part)
    print(way, seen[way] if isinstance(seen[way], float) else "is not exported", flush=True)
apart = max(float((s - scores["eager"]).abs().max() / s.abs().max()) for s in scores.values())
print("apart:", apart)
assert apart < 1e-5
assert isinstance(seen["batched_mm"], float) and seen["batched_mm"] < 1e-5
assert "data-dependent" in seen["eager"]
assert "grouped_mm_fallback" in seen["grouped_mm"]
PY
echo "as described"
