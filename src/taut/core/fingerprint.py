"""A digest of weights, inputs and settings: what was made from others is never mixed in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.tensors import tensors


def fingerprint(model: nn.Module, inputs: Any, settings: Any) -> str:
    """A digest of weights, inputs and settings: points of another model, data or metric are never mixed in."""
    digest = hashlib.sha256(repr(settings).encode())
    named: list[tuple[str, Any]] = [*model.state_dict().items(), *(("input", t) for t in tensors(inputs))]
    for name, value in named:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
