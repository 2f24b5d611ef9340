"""The few modules that are not plain torch.nn."""

from taut.nn.channels import Pick, Reorder
from taut.nn.lowrank import LowRankSparse
from taut.nn.masks import Mask, bake, fill_plain, hold_zeros, mask_of, masked, plain_state
from taut.nn.sharing import Basis

__all__ = [
    "Basis",
    "LowRankSparse",
    "Mask",
    "Pick",
    "Reorder",
    "bake",
    "fill_plain",
    "hold_zeros",
    "mask_of",
    "masked",
    "plain_state",
]
