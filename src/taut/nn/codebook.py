"""Weights as codes into a codebook of short vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taut.nn.rebuilt import Rebuilt


class Codebook(Rebuilt):
    """A layer whose rows are cut into blocks of `block` columns, each the entry of a codebook: W[o, j] = C[code, j].

    Column j of block b = j // block is read from column j of the codebook, where every block has entries of its own
    (product quantization), or from column j % block, where all blocks share them (vector quantization). The codebook
    trains; the codes, of 1, 2, 4 or 8 bits, stay.

    Args:
        layer: of the dense layer's sizes, stride, padding and so on.
        codebook: (k, columns) or, shared, (k, block), k up to 256.
        codes: (rows, blocks), integers below k.
        block: columns per code; the last block of a row may be shorter.
    """

    codes: Tensor

    def __init__(self, layer: nn.Module, codebook: nn.Parameter, codes: Tensor, block: int) -> None:
        """See the class."""
        super().__init__(layer)
        self.block = block
        self.codebook = codebook
        self.register_buffer("codes", packed(codes, code_bits(len(codebook))))

    def indices(self) -> Tensor:
        """The codes as they were given, (rows, blocks), int64."""
        rows, blocks = self.shape[0], math.ceil(math.prod(self.shape[1:]) / self.block)
        return unpacked(self.codes, code_bits(len(self.codebook)), rows * blocks).reshape(rows, blocks)

    def dense(self) -> Tensor:
        """The weight, gathered; gradients of all weights of one code add up in its entry."""
        columns = math.prod(self.shape[1:])
        indices = self.indices()
        entries: Tensor = self.codebook
        if entries.shape[1] < columns:
            entries = entries.repeat(1, indices.shape[1])[:, :columns]
        spread = indices[..., None].expand(-1, -1, self.block).flatten(1)[:, :columns]
        return entries.gather(0, spread).reshape(self.shape)

    def extra_repr(self) -> str:
        """Entries, their length, and bits per code."""
        k, bits = len(self.codebook), code_bits(len(self.codebook))
        return f"{k} codes of {bits} bits for {self.block} weights, bias={self.bias is not None}"


def code_bits(k: int) -> int:
    """Bits that a code below k takes: 1, 2, 4 or 8, so that none lies across two bytes."""
    return next(bits for bits in (1, 2, 4, 8) if k <= 1 << bits)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits as bytes (ceil(n bits / 8),), the first in the lowest bits."""
    per_byte = 8 // bits
    flat = codes.flatten().to(torch.int64)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % per_byte)]).reshape(-1, per_byte)
    return (padded * _places(bits, padded)).sum(1).to(torch.uint8)


def unpacked(code_bytes: Tensor, bits: int, size: int) -> Tensor:
    """The first `size` integers that `packed` wrote, int64."""
    wide = code_bytes.to(torch.int64)[:, None]
    found = torch.div(wide, _places(bits, wide), rounding_mode="floor") % (1 << bits)
    return found.flatten()[:size]


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.tensor([1 << shift for shift in range(0, 8, bits)], dtype=torch.int64, device=like.device)
