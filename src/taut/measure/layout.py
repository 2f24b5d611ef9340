"""channels_last: the memory format in which convolutions of images are fastest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.example import Example
from taut.core.tensors import tensors


def channels_last(model: nn.Module) -> nn.Module:
    """A copy whose 4-d parameters and buffers lie in channels_last memory; all other tensors are the model's own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [v for v in vars(module).values() if isinstance(v, Tensor)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *own):
            if id(tensor) not in memo:
                memo[id(tensor)] = _converted(tensor)
    return deep_copy(model, memo)


def _converted(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor
    data = images_last(tensor.detach())
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def images_last(tensor: Tensor) -> Tensor:
    """A 4-d tensor in channels_last, any other as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def has_images(example: Example) -> bool:
    """Whether the example holds 4-d tensors."""
    return any(tensor.ndim == 4 for tensor in tensors(example.value))


def has_kernels(model: nn.Module) -> bool:
    """Whether the model has 2-d convolutions."""
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
