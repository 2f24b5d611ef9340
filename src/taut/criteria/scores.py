"""Scores of weights: the higher, the more worth keeping. W are the weights, H what a joint factorization makes of them.

magnitude        |W|
residual         |W| - |H|      the rule of the source of MFBP: it cuts what the factorization explains best
flipped          |H| - |W|      the rule of its author's later text: the same, read the other way round
reconstruction   |H|
sum              |W| + |H|
product          |W H|
max              max(|W|, |H|)
wanda            |W| rms(x)     x the inputs that the weight meets (Sun et al. 2023)
obd              h W^2 / 2      h the loss's second derivative by the weight (LeCun et al. 1990)
random           anything       what a criterion has to beat
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taut.errors import CallError

Score = Callable[[Tensor, Tensor], Tensor]

SCORES: Mapping[str, Score] = {
    "magnitude": lambda W, _: W.abs(),
    "residual": lambda W, H: W.abs() - H.abs(),
    "flipped": lambda W, H: H.abs() - W.abs(),
    "reconstruction": lambda _, H: H.abs(),
    "sum": lambda W, H: W.abs() + H.abs(),
    "product": lambda W, H: (W * H).abs(),
    "max": lambda W, H: torch.maximum(W.abs(), H.abs()),
    "wanda": lambda W, rms: W.abs() * rms,
    "obd": lambda W, h: 0.5 * h * W.square(),
    "random": lambda _, noise: noise,
}
"""Name -> score of W and of what it is seen beside: H, the inputs' root mean square, a second derivative, or noise."""


def score(name: str, W: Tensor, beside: Tensor) -> Tensor:
    """The score of every weight; weights that are zero already come last, so that pruned stays pruned.

    Args:
        name: key of SCORES.
        W: the weights.
        beside: of the same shape or one that broadcasts: H, the root mean square of inputs, a second derivative, or
            noise.

    Returns:
        As W, at least float32; -inf where W is zero.

    Raises:
        CallError: the name is unknown, or a score is not a number.
    """
    if name not in SCORES:
        raise CallError(f"The 'score' must be one of {', '.join(SCORES)}. Got '{name}' instead.")
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    found = SCORES[name](wide, beside.to(wide)).expand_as(wide)
    if bool(torch.isnan(found).any()):
        raise CallError(f"The score '{name}' is not a number for some weights: are they and the data finite?")
    return torch.where(wide == 0, -torch.inf, found)
