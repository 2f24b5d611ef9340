#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU), nncf 3.4.0
# Behaviour: nncf.compress_weights on a network that is itself an nn.Sequential: NNCF keeps its hooks in a child module of
#   the network, an nn.Sequential calls every child in order, and so it calls the store of the hooks, which has no
#   forward: NotImplementedError. The same layers as a child of any other module are compressed.
# Seen: the shortest network that anybody writes, and what a tool gives that takes the last layers off, must be wrapped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 nncf==3.4.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PY' || { cat "$folder/log"; exit 1; }
import logging

import nncf
import torch
from torch import nn

logging.disable(logging.CRITICAL)
x = torch.randn(8, 64)


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def outcome(model):
    try:
        return tuple(nncf.compress_weights(model.eval(), mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset([x]))(x).shape)
    except NotImplementedError as error:
        return str(error)


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


seen = {"Sequential": outcome(network()), "wrapped": outcome(Wrapped(network()))}
print(seen)
assert seen["wrapped"] == (8, 10) and "HookStorage" in seen["Sequential"], seen
PY
echo "as described"
