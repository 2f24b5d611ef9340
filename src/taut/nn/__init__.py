"""The few modules that are not plain torch.nn."""

from taut.nn.answering import Answering
from taut.nn.attention import Attention
from taut.nn.channels import Pick, Reorder
from taut.nn.codebook import Codebook
from taut.nn.encoder import FilledEncoder
from taut.nn.fastfood import Fastfood
from taut.nn.grouped import GroupedLinear
from taut.nn.hashed import Hashed
from taut.nn.lowrank import LowRankSparse
from taut.nn.masks import Mask, bake, fill_plain, hold_zeros, mask_of, masked, plain_state
from taut.nn.padding import SamePad
from taut.nn.product import Product
from taut.nn.quantized import Int8Weight
from taut.nn.rebuilt import Rebuilt
from taut.nn.recurrent import Recurrent, StateLinear
from taut.nn.sharing import Basis
from taut.nn.skipped import Skipped
from taut.nn.tied import Tied

__all__ = [
    "Answering",
    "Attention",
    "Basis",
    "Codebook",
    "Fastfood",
    "FilledEncoder",
    "GroupedLinear",
    "Hashed",
    "Int8Weight",
    "LowRankSparse",
    "Mask",
    "Pick",
    "Product",
    "Rebuilt",
    "Recurrent",
    "Reorder",
    "SamePad",
    "Skipped",
    "StateLinear",
    "Tied",
    "bake",
    "fill_plain",
    "hold_zeros",
    "mask_of",
    "masked",
    "plain_state",
]
