"""Tensors in, factors out: the decompositions, without any network around them."""

from taut.decompose.balance import equalize, orthogonalize
from taut.decompose.projection import InputBasis, input_basis, unexplained
from taut.decompose.svd import OutputBasis, directions, output_basis
from taut.decompose.tucker import tucker2
from taut.decompose.vbmf import Bayes, evbmf
from taut.decompose.weighting import Weighting

__all__ = [
    "Bayes",
    "InputBasis",
    "OutputBasis",
    "Weighting",
    "directions",
    "equalize",
    "evbmf",
    "input_basis",
    "orthogonalize",
    "output_basis",
    "tucker2",
    "unexplained",
]
