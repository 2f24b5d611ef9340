#!/usr/bin/env bash
# Versions: torch 2.13.0 (CPU)
# Behaviour: a copy of a parametrized module (copy.deepcopy, and so torch.optim.swa_utils.AveragedModel) shares the class
#   that torch makes for the module. remove_parametrizations on the copy takes the weight's property from that class: the
#   copy is well, and the ORIGINAL, which nobody touched, has no weight any more and raises when it is called. Its state
#   dict and its list of parametrizations look as before.
# Seen: whoever bakes weight norm into a copy (an averaged model to be shipped in the middle of training, a copy to be
#   exported or quantized) breaks the model that is still being trained; of two copies only the first can be baked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

assert torch.__version__.startswith("2.13.0"), torch.__version__
x = torch.randn(2, 3)


def state_of(model):
    try:
        model(x)
    except Exception as error:
        return type(error).__name__
    return "runs"


seen = {}
for norm in (weight_norm, spectral_norm):
    model = norm(nn.Linear(3, 4)).eval()
    averaged, second = AveragedModel(model), copy.deepcopy(model)
    keys, before = list(model.state_dict()), averaged(x)
    parametrize.remove_parametrizations(averaged.module, "weight")
    assert torch.equal(before, averaged(x))
    assert list(model.state_dict()) == keys and parametrize.is_parametrized(model, "weight")
    seen[norm.__name__] = {"baked": state_of(averaged), "trained": state_of(model), "other copy": state_of(second)}
for norm, states in seen.items():
    print(norm, states)
broken = {"baked": "runs", "trained": "AttributeError", "other copy": "AttributeError"}
assert seen == {"weight_norm": broken, "spectral_norm": broken}, seen
PY
echo "as described"
