"""Weights that share few values, by a hash of their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taut.nn.rebuilt import Rebuilt

ODD = 0x45D9F3B
"""Multiplier of the hash; below 2^27, so that products with 32 bits stay whole in int64."""

LOW = 1 << 32


class Hashed(Rebuilt):
    """A layer whose weights share values: W[i] = sign(i) w[h(i)], i the place in the flattened weight.

    Hash and sign depend on the seed and the place alone: they are computed at every call and stored nowhere.

    Args:
        layer: of the dense layer's sizes, stride, padding and so on.
        values: (buckets,).
        seed: of the hash.
    """

    def __init__(self, layer: nn.Module, values: nn.Parameter, seed: int) -> None:
        """See the class."""
        super().__init__(layer)
        self.seed = seed
        self.values = values

    def dense(self) -> Tensor:
        """The weight; gradients of all weights of one bucket add up in its value."""
        size, buckets = math.prod(self.shape), len(self.values)
        bucket, negative = hashes(size, buckets, self.seed, self.values.device)
        return torch.cat([self.values, -self.values]).gather(0, bucket + buckets * negative).reshape(self.shape)

    def extra_repr(self) -> str:
        """Buckets and seed."""
        return f"{len(self.values)} values, seed={self.seed}, bias={self.bias is not None}"


def hashes(size: int, buckets: int, seed: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """For places 0 ... size - 1 the bucket, and 1 where the sign is negative, int64."""
    places = torch.arange(size, device=device)
    return scrambled(places, 2 * seed) % buckets, scrambled(places, 2 * seed + 1) % 2


def scrambled(numbers: Tensor, seed: int) -> Tensor:
    """Integers below 2^32 that depend on all bits of `numbers` and `seed`: a multiplicative hash of two rounds."""
    found = numbers
    for key in (0x9E3779B9 * seed, seed):
        found = (found + key % LOW) % LOW
        for _ in range(2):
            found = (found ^ (found // (1 << 16))) * ODD % LOW
        found = found ^ (found // (1 << 16))
    return found
