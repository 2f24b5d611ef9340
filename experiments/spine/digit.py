"""The trained digit CNN of another author: PyPI digit-recognizer-py 0.1.0 (MIT), 390,410 parameters.

The package's own __init__ imports torchvision, so only its model.py is executed, found through the import system but
loaded by path; the weights are read with weights_only=True, so no pickled code runs. Nothing of it is copied here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

INSTALL = "pip install --no-deps digit-recognizer-py==0.1.0"
MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels: the author's preprocessing."""


def package() -> Path:
    """The folder of the installed package; leaves the process with 2 where it is not installed."""
    spec = importlib.util.find_spec("digit_recognizer")
    if spec is None or not spec.submodule_search_locations:
        print(f"The digit CNN is not installed. Install it with:\n    {INSTALL}", file=sys.stderr)
        raise SystemExit(2)
    return Path(next(iter(spec.submodule_search_locations)))


def build() -> nn.Module:
    """The architecture with random weights: the base that `taut.load` needs."""
    spec = importlib.util.spec_from_file_location("digit_cnn_model", package() / "model.py")
    if spec is None or spec.loader is None:
        raise ImportError("digit-recognizer-py holds no model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.CNN()
    assert isinstance(net, nn.Module)
    return net.eval()


def trained_net() -> nn.Module:
    """The architecture with the author's weights."""
    net = build()
    weights = package() / "models" / "handwriting_model.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net


def normalized(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as the net wants them."""
    return (images - MEAN) / STD
