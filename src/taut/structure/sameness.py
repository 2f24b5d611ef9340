"""Whether a network still computes the same: float64 copies on random inputs like the example, outputs compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.core.tensors import all_values, map_tensors, tensors
from taut.errors import ModelError
from taut.structure.surgery import shallow

PROBES = 2
"""Batches of random inputs; where there are integers or masks, one more, in which these are random, too."""

SAMPLES = 2
"""Samples of the example that are enough to tell whether something changed."""


def few(example: Example) -> Example:
    """The first samples of the example, where it has more; whether the model runs on so few is not said."""
    if example.batch <= SAMPLES or not example.divisible:
        return example
    part = copy.copy(example)
    part.value = example.samples.cut(example.value, slice(SAMPLES), example.batch)
    part.batch = SAMPLES
    return part


def probes_of(example: Example) -> list[Any]:
    """Batches of random inputs shaped like the example, in float64.

    Integers and masks are those of the example in the first two, and drawn in a third, on which a model need not run.
    """
    whole = all(t.is_floating_point() for t in tensors(example.value))
    return [_probe(example, seed, drawn=seed >= PROBES) for seed in range(PROBES if whole else PROBES + 1)]


def _probe(example: Example, seed: int, *, drawn: bool) -> Any:
    """Random inputs shaped like the example, in float64; the example itself may say nothing (zeros)."""
    noise = generator(seed)

    def like(t: Tensor) -> Tensor:
        if not t.numel() or t.is_complex():
            return t
        if not t.is_floating_point():
            return _drawn(t, noise).to(t) if drawn else t
        size = t.double().std() if t.numel() > 1 else torch.zeros(())
        normal = torch.randn(t.shape, generator=noise, dtype=torch.float64).to(t.device)
        return normal * (size if float(size) > 0 else 1.0) + t.double().mean()

    return map_tensors(like, example.value)


def _drawn(t: Tensor, noise: torch.Generator) -> Tensor:
    """Integers between the least and the largest of `t`; in masks, half of every row, so that no row is without."""
    low, high = int(t.min()), int(t.max())
    if not 0 <= low <= high <= 1:
        return torch.randint(low, high + 1, t.shape, generator=noise)
    if not high and t.dtype != torch.bool and t.device.type != "cpu":
        return t  # it may be an index into one row, and one out of range ends the process's use of a GPU
    if not t.ndim or t.shape[-1] == 1:
        return 1 - t.int()
    return torch.rand(t.shape, generator=noise).argsort(-1).argsort(-1) % 2


def finite(outputs: Any) -> bool:
    """Whether a run says something: NaN hides all changes, and infinities most."""
    return all(bool(t.isfinite().all()) for t in tensors(outputs))


def outputs_of(
    model: nn.Module, example: Example, probes: list[Any], watched: Sequence[str] = ()
) -> list[Tensor] | None:
    """What a copy in float64, and its `watched` layers, give for the probes; None where it runs on none of them.

    In float64 rounding is far below any real change. Probes on which the model does not run, or which give no finite
    output, are left out.
    """
    found: list[Tensor] = []
    try:
        wide = shallow(model).double()
    except ModelError:
        return None
    noted: list[Tensor] = []
    for name in watched:
        wide.get_submodule(name).register_forward_hook(lambda _, __, output: noted.extend(tensors(output)))
    with evaluating(wide), torch.no_grad():
        for probe in probes:
            noted.clear()
            try:
                made = tensors(example.run(wide, probe))
            except ModelError:
                continue
            found += [*noted, *made] if finite(made) else []
    return found or None


@dataclass(frozen=True)
class Tolerance:
    """How far apart two outputs may lie that are the same: no value by more than the sum of what is given here.

    Attributes:
        share: of the largest value of the tensor, since the rounding of a sum grows with its largest terms.
        epsilons: of the tensor's dtype, times its largest value, in half precision alone.
        each: share of the value itself.
        least: absolute.
    """

    share: float = 0.0
    epsilons: float = 0.0
    each: float = 0.0
    least: float = 0.0


IN_FLOAT64 = Tolerance(share=1e-9)
"""The same sums in another order, in float64: far below any real change."""

IN_OTHER_BATCHES = Tolerance(share=1e-3, least=1e-7)
"""The same samples in a batch of another size, in the model's own dtype, by other kernels and precisions."""

IN_OTHER_LAYERS = Tolerance(share=1e-4, epsilons=4, each=1e-3, least=1e-9)
"""Layers that compute the same by other sums, in the model's own dtype; in half precision its epsilon decides.

Nearly without an absolute part: outputs may be metres or micrometres.
"""


BY_FUSED_KERNELS = Tolerance(share=1e-3, epsilons=4, least=1e-7)
"""What torch's fused layers give, and the same layers one by one; in half precision its epsilon decides."""


def blamed(names: Sequence[str], same: Callable[[Sequence[str]], bool]) -> list[str]:
    """The names without which nothing changes, searched for by halves; all, where only together they do.

    Args:
        names: of what is replaced.
        same: whether the network computes the same with these replaced.
    """
    same = remembered(same)
    if not names or same(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    alone = [*blamed(names[:half], same), *blamed(names[half:], same)]
    rest = [name for name in names if name not in alone]
    return alone if same(rest) else list(names)


def remembered(same: Callable[[Sequence[str]], bool]) -> Callable[[Sequence[str]], bool]:
    """A question about names, which runs a network, asked once for each of their choices."""
    known: dict[tuple[str, ...], bool] = {}

    def asked(names: Sequence[str]) -> bool:
        if tuple(names) not in known:
            known[tuple(names)] = same(names)
        return known[tuple(names)]

    return asked


def outputs_match(before: Any, after: Any, tolerance: Tolerance = IN_FLOAT64) -> bool:
    """Whether two outputs agree in number, shapes and dtypes of their tensors, and in values but for rounding.

    Integers and truth values must be equal, and so must what is not finite. Arrays and plain numbers count as tensors,
    None as an output that says nothing: nothing matches it. What is not a number in the same places is no change.

    Args:
        before: an output, or several in a nest.
        after: another one.
        tolerance: what is still rounding.
    """
    if before is None or after is None:
        return False
    pairs = all_values(before), all_values(after)
    return len(pairs[0]) == len(pairs[1]) and all(_match(a, b, tolerance) for a, b in zip(*pairs, strict=True))


def said_alike(before: Any, after: Any, tolerance: Tolerance = BY_FUSED_KERNELS) -> bool:
    """Whether two outputs agree but for rows in which the first one says nothing: two or more, and all alike.

    Args:
        before: an output.
        after: another one, of tensors of the same shapes.
        tolerance: what is still rounding.
    """
    pairs = all_values(before), all_values(after)
    if before is None or after is None or [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return False
    return all(_said_alike(a, b, tolerance) for a, b in zip(*pairs, strict=True))


def _said_alike(a: Tensor, b: Tensor, tolerance: Tolerance) -> bool:
    if _match(a, b, tolerance):
        return True
    if a.ndim < 2 or not a.is_floating_point():
        return False
    rows, others = (t.reshape(-1, t.shape[-1]).double() for t in (a, b))
    limit = _limit(rows.abs(), tolerance, a.dtype)
    silent = ((rows - others).abs() > limit).any(1) | (rows - others).isnan().any(1)
    said = rows[silent]
    return len(said) > 1 and bool(((said - said[:1]).abs() <= _limit(said.abs(), tolerance, a.dtype)).all())


def _match(a: Tensor, b: Tensor, tolerance: Tolerance) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    dtype = a.dtype
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    if torch.equal(a, b):
        return True
    finite = torch.isfinite(a)
    if not bool(finite.all()):
        if not torch.allclose(a[~finite], b[~finite], equal_nan=True):
            return False
        a, b = a[finite], b[finite]
    return not a.numel() or bool(((a - b).abs() <= _limit(a.abs(), tolerance, dtype)).all())


def _limit(sizes: Tensor, tolerance: Tolerance, dtype: torch.dtype) -> Tensor | float:
    """How far values of these sizes may be away, each or all of them."""
    half = dtype in {torch.float16, torch.bfloat16}
    share = tolerance.share + (tolerance.epsilons * torch.finfo(dtype).eps if half else 0.0)
    limit = share * float(sizes.max()) + tolerance.least
    return sizes * tolerance.each + limit if tolerance.each else limit
