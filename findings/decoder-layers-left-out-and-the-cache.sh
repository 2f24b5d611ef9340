#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), transformers 5.24.0
# Behaviour: layers of a causal language model are often dropped by taking them out of the ModuleList that holds them.
#   Every attention module keeps its own number, under which it stores keys and values, and the cache counts the tokens
#   that it has seen in layer 0. Where that one was dropped, the count stays 0: a decoding loop of one's own, which hands
#   the cache back with the next token, gets it at the first position, and nothing is said. generate() counts positions
#   itself and goes on as it should, so that a test with it shows nothing. Any other layer can be dropped.
# Seen: of six small random Llamas and six GPT-2s, with layer 0 of 4 dropped the logits of the last token differ by 9 % to
#   126 % of the largest from those of all tokens at once, and the cache says 0 tokens; with layer 1 dropped they are the
#   same, as they are with layer 0 dropped and the others numbered anew. generate() writes the same in all cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

logging.set_verbosity_error()
tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama():
    config = LlamaConfig(num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=60, **tokens)
    model = LlamaForCausalLM(config).eval()
    return model, model.model.layers


def gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=2, n_embd=32, vocab_size=60, n_positions=64, **tokens)).eval()
    return model, model.transformer.h


def tried(make, seed, dropped, renumbered=False):
    """How far the last token's logits are from those of a run at once, what the cache counts, and generate()."""
    torch.manual_seed(seed)
    model, layers = make()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)  # random networks say little
    del layers[dropped]
    if renumbered:
        for number, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
    ids = torch.randint(3, 60, (1, 8))
    with torch.no_grad():
        whole, cache = model(ids).logits[:, -1], model(ids[:, :-1], use_cache=True).cache
        last = model(ids[:, -1:], cache=cache, use_cache=True).logits[:, -1]
    write = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    alike = torch.equal(model.generate(ids, use_cache=True, **write), model.generate(ids, use_cache=False, **write))
    return float((whole - last).abs().max() / whole.abs().max()), cache.get_seq_length(), alike


for make in (llama, gpt2):
    first, other, again = ([tried(make, seed, *how) for seed in range(6)] for how in ((0,), (1,), (0, True)))
    for name, rows in (("layer 0 dropped", first), ("layer 1 dropped", other), ("layer 0 dropped, renumbered", again)):
        print(f"{make.__name__}, {name}: off by {min(r[0] for r in rows):.2f} to {max(r[0] for r in rows):.2f}, the cache counts {rows[0][1]}")
    assert min(row[0] for row in first) > 0.05 and {row[1] for row in first} == {0}
    assert max(row[0] for row in (*other, *again)) < 1e-4 and {row[1] for row in (*other, *again)} == {8}
    assert all(row[2] for row in (*first, *other, *again))
PY
echo "as described"
