#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6
# Behaviour: an nn.LSTM with proj_size multiplies its hidden states by one more matrix, and gives states of that width.
#   ONNX has no such operator. The exporter that torch uses by default writes an ordinary LSTM node all the same, without
#   the projection, and says nothing; the matrix is not in the file. The older exporter (dynamo=False) refuses.
# Seen: of nn.LSTM(10, 32, proj_size=8) with its five parameters the file holds three tensors of weights, none of them
#   with the 8 x 32 projection; onnx's checker accepts the file, and ONNX Runtime stops when it is run, since the states
#   are not as wide as the node says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.31.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import onnx
import onnxruntime as ort
import torch
from torch import nn

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
model, x = nn.LSTM(10, 32, proj_size=8, batch_first=True).eval(), torch.randn(2, 5, 10)
assert model(x)[0].shape == (2, 5, 8)
torch.onnx.export(model, (x,), "lstm.onnx", dynamo=True, input_names=["x"], external_data=False, verbose=False)
graph = onnx.load("lstm.onnx")
onnx.checker.check_model(graph)
kinds = [node.op_type for node in graph.graph.node]
projection = model.weight_hr_l0.detach()
held = [onnx.numpy_helper.to_array(t) for t in graph.graph.initializer]
projected = any(t.size == projection.numel() and sorted(abs(t).ravel()) == sorted(projection.abs().flatten().tolist()) for t in held)
print("nodes:", kinds, "| the projection is in the file:", projected)
options = ort.SessionOptions()
options.log_severity_level = 4
try:
    ort.InferenceSession("lstm.onnx", options, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    ran = "runs"
except Exception as error:
    ran = str(error).splitlines()[0]
print("ONNX Runtime:", ran)
try:
    torch.onnx.export(model, (x,), "old.onnx", dynamo=False)
    old = "exported"
except Exception as error:
    old = f"refused: {str(error).splitlines()[0][:160]}"
print("older exporter:", old)
assert "LSTM" in kinds and not projected
assert ran != "runs" and "initial" in ran, ran
assert old.startswith("refused"), old
PY
echo "as described"
