#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6
# Behaviour: torch's exporter folds the norm of a weight-normed layer into its weight where the weight is small, and
#   writes it as nodes (ReduceL2, Div, Mul) where not. In float this costs nothing: ONNX Runtime folds the nodes when it
#   opens the file. After ONNX Runtime's own static quantization it does not: the quantizer puts a quantize and dequantize
#   pair around each of them, and what is dequantized is not folded. The norms of constants are then computed in every
#   run, in eight bits, and the layers behind them get weights that are quantized anew each time.
# Seen: the same network with the norms as they are trained, and written into the weights beforehand: as float both open
#   as the same nodes. Quantized, the weight-normed one computes two norms and quotients in every run (of its two larger
#   layers), the spectral-normed one four products and two quotients; the other one nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.31.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

logging.disable(logging.CRITICAL)


class Samples(CalibrationDataReader):
    def __init__(self):
        draw = np.random.default_rng(0)
        self.left = iter([{"x": draw.standard_normal((4, 3, 8, 8)).astype("f")} for _ in range(8)])

    def get_next(self):
        return next(self.left, None)


def opened(path):
    """Node types of the graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, "opened.onnx"
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load("opened.onnx").graph.node)


def of_norms(counts):
    """Nodes that compute norms of weights."""
    return {kind: counts[kind] for kind in ("ReduceL2", "MatMul", "Div", "Mul") if counts[kind]}


def exported(model, name):
    torch.onnx.export(model, (torch.randn(4, 3, 8, 8),), f"{name}.onnx", dynamo=True, input_names=["x"], external_data=False, verbose=False)
    quantize_static(f"{name}.onnx", f"{name}-int8.onnx", Samples())
    return of_norms(opened(f"{name}.onnx")), of_norms(opened(f"{name}-int8.onnx"))


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv2d(3, 32, 3, padding=1)), nn.ReLU(), norm(nn.Conv2d(32, 32, 3, padding=1)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(2048, 10))
    ).eval()


for name, norm, left in (("weight norm", weight_norm, {"ReduceL2": 2, "Div": 2, "Mul": 2}), ("spectral norm", spectral_norm, {"MatMul": 4, "Div": 2})):
    normed, baked = network(norm), network(norm)  # no copy: what is removed from a copy goes from the original, too
    baked.load_state_dict(normed.state_dict())
    for module in baked.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(normed(x), baked(x))
    seen = {"normed": exported(normed, "normed"), "baked": exported(baked, "baked")}
    for form, (as_float, as_int8) in seen.items():
        print(f"{name}, {form}: nodes of the norms as float {as_float}, as int8 {as_int8}")
    assert seen == {"normed": ({}, left), "baked": ({}, {})}, seen
PY
echo "as described"
