"""What an architecture is here, and how it is made: seeded, evaluated, with norms and scales off their first values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Sample = Callable[[int], Any]
"""How many samples -> inputs as the model takes them."""

Architecture = Callable[[], tuple[nn.Module, Sample]]
EXAMPLE, BATCH, BATCHES = 2, 4, 4
"""Samples in the example; in a batch of calibration data; batches."""


def build(make: Architecture) -> tuple[nn.Module, Any, list[Any]]:
    """The model in eval mode, an example, and calibration data; the same every time."""
    torch.manual_seed(0)
    model, sample = make()
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dtype.is_floating_point and p.numel() and bool((p == p.flatten()[0]).all()):
                _moved(p)
    example, data = sample(EXAMPLE), [sample(BATCH) for _ in range(BATCHES)]
    _settle(model, data[0])
    return model, example, data


def _moved(p: Tensor) -> None:
    """Norms, biases and layer scales start as constants, some as zeros that switch a branch off."""
    if bool((p == 0).all()):
        p.normal_(std=0.1)
    else:
        p.uniform_(0.5, 1.5)


def _settle(model: nn.Module, batch: Any) -> None:
    """Batch norms with the statistics of a batch, as after training."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 0.9
    if norms:
        with torch.no_grad():
            call(model, batch)
    for norm, rate in zip(norms, rates, strict=True):
        norm.eval().momentum = rate


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs, which may be a tuple of arguments or a dict of them."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def pictures(size: int = 64, channels: int = 3) -> Sample:
    """Smooth noise (n, channels, size, size)."""

    def sample(n: int) -> Tensor:
        coarse = torch.randn(n, channels, 8, 8)
        return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(
            n, channels, size, size
        )

    return sample


def noise(*shape: int) -> Sample:
    """(n, *shape)."""
    return lambda n: torch.randn(n, *shape)


def named(**samples: Sample) -> Sample:
    """Arguments by name."""
    return lambda n: {name: sample(n) for name, sample in samples.items()}


def together(*samples: Sample) -> Sample:
    """Arguments by position."""
    return lambda n: tuple(sample(n) for sample in samples)


def ids(words: int, length: int = 16, least: int = 3) -> Sample:
    """Tokens (n, length); the first few numbers are often special."""
    return lambda n: torch.randint(least, words, (n, length))


def ones(*shape: int) -> Sample:
    """A mask that hides nothing (n, *shape)."""
    return lambda n: torch.ones(n, *shape, dtype=torch.long)


def constant(value: Any) -> Sample:
    """The same for any number of samples."""
    return lambda n: value  # noqa: ARG005 - as the others


def text(words: int, length: int = 16) -> Sample:
    """What a tokenizer of transformers gives."""
    return named(input_ids=ids(words, length), attention_mask=ones(length))
