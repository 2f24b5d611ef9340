"""A linear layer from diagonals and Walsh-Hadamard transforms."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from taut.nn.hashed import scrambled
from taut.nn.rebuilt import Rebuilt

ROUNDS = 3
"""Of the permutation: multiply, add, mix the high bits into the low ones."""


class Fastfood(Rebuilt):
    """A Linear in blocks of S H G P H B x: adaptive Fastfood.

    H is the orthonormal Walsh-Hadamard transform of n, the power of two that holds the inputs (zeros are appended), P a
    permutation that the seed tells; S, G, B are diagonals, and train. Every block gives n outputs, the last one as many
    as are missing. The transforms are additions, log2 n steps of n: nothing is multiplied as a matrix.

    Args:
        layer: a Linear of the same sizes.
        seed: of the permutations.
    """

    def __init__(self, layer: nn.Linear, seed: int) -> None:
        """See the class; the diagonals are not initialized."""
        super().__init__(layer)
        self.seed = seed
        outputs, inputs = self.shape
        self.size = padded_size(inputs)
        blocks = -(-outputs // self.size)
        self.S = nn.Parameter(torch.empty(outputs))
        self.G = nn.Parameter(torch.empty(blocks, self.size))
        self.B = nn.Parameter(torch.empty(blocks, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., inputs)."""
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        first = hadamard(functional.pad(x[..., None, :] * self.B, (0, self.size - self.shape[1])))
        order = permutations(len(self.G), self.size, self.seed, x.device)
        moved = first.gather(-1, order.expand(first.shape))
        return hadamard(moved * self.G).flatten(-2)[..., : self.shape[0]] * self.S

    def dense(self) -> Tensor:
        """What it multiplies by, as a matrix (outputs, inputs)."""
        return self._product(torch.eye(self.shape[1]).to(self.S)).mT.contiguous()

    def extra_repr(self) -> str:
        """Blocks, their size, and the seed."""
        return f"{len(self.G)} blocks of {self.size}, seed={self.seed}, bias={self.bias is not None}"


def padded_size(inputs: int) -> int:
    """The power of two that holds so many inputs."""
    return 1 << (inputs - 1).bit_length()


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform, in natural order, of the last axis: a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        low, high = x.reshape(*x.shape[:-1], size // (2 * half), 2, half).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        half *= 2
    return x * (1 / math.sqrt(size))


def permutations(blocks: int, size: int, seed: int, device: torch.device | None = None) -> Tensor:
    """A permutation of 0 ... size - 1, a power of two, for every block: (blocks, size), int64."""
    keys = scrambled(torch.arange(blocks * 2 * ROUNDS, device=device), seed).reshape(2 * ROUNDS, blocks, 1)
    found = torch.arange(size, device=device).expand(blocks, size)
    shift = 1 << (size.bit_length() // 2)
    for turn in range(ROUNDS):
        found = (found * (2 * keys[2 * turn] + 1) + keys[2 * turn + 1]) % size
        found = found ^ (found // shift)
    return found
