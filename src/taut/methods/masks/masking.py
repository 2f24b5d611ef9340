"""What the methods share that set single weights to zero and leave the layers as they are."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from taut.criteria import above, mean_percentile, smallest, within_runs
from taut.errors import CallError
from taut.methods.earlier_contract import Needs
from taut.methods.factorization import Unplanned
from taut.methods.layer_factory import random_layer, refuse_layer
from taut.structure.patches import weight_of
from taut.structure.surgery import HOOKS
from taut.types import Cost, Group, Method, Rewrite

UNCHECKED = "unchecked percentiles"

SELECTIONS = ("global", "layer", "threshold", "percentiles", UNCHECKED)

HALF = 0.5
"""Share of the weights that goes where nobody says how much."""

ROUNDED = 1e-3
"""How far a share may be from that of N:M and still be meant as it."""

RUNS = re.compile(r"([1-9]\d?):([1-9]\d?)")
"""A selection such as 2:4: so many of every so many inputs in a row stay."""

SLACK = 0.05
"""How far from the share that was asked for a mean of percentiles may end."""


@dataclass(frozen=True)
class Ranked:
    """What serves every sparsity.

    Attributes:
        scores: of every weight, layer by layer. moments: what a method needs besides, to move weights that stay.
    """

    scores: Sequence[Tensor]
    moments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Masking(Unplanned):
    """Base of the pruning methods: a score per weight, and the lowest go.

    A step names all layers that are pruned together. Weights that are zero already stay zero. In training, `finetune`
    holds the zeros; the result has plain layers.

    Attributes:
        sparsity: share of the weights of these layers (biases not counted) that is zero afterwards, in [0, 1); None:
            half, or what `select` says.
        select: "global": the lowest of all layers together, exactly as many as asked for; "layer": of each layer;
            "threshold": all scores below `threshold`; "percentiles": all below the mean over layers of the `sparsity`
            quantile of each, an error where that is not about the share asked for; "unchecked percentiles": that
            share, whatever it is. How many the last three prune depends on the weights. "2:4", and any other N:M: in
            every run of M inputs the N of highest score stay (of a convolution, of input channels at one tap), as
            kernels for sparse weights want it; `sparsity` is then 1 - N / M.
        threshold: of the selection by threshold.
        spare: positions in the step's layers of those that are scored but not pruned; -1 is the last one, mostly the
            output layer.
        floors: weights of each of the step's layers that are not zero afterwards, at least; the others make
            up for it, but where `select` treats each layer alike.
        zeros: weights that are zero afterwards; filled in when the step is carried out.
    """

    sparsity: float = None  # type: ignore[assignment] # .5, or what `select` says
    select: str = "global"
    threshold: float | None = None
    spare: list[int] | None = None
    floors: list[int] | None = None
    zeros: int | None = None
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = True
    rank_settings: ClassVar[tuple[str, ...]] = ()
    needs = Needs()
    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        known = self.select in SELECTIONS or self.runs is not None
        self._must("select", known, f"one of {', '.join(SELECTIONS)}, or N:M such as 2:4")
        share = HALF if self.runs is None else 1 - self.runs[0] / self.runs[1]
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", share)
        self._must("sparsity", _number(self.sparsity) and 0 <= self.sparsity < 1, "in [0, 1)")
        fits = self.runs is None or abs(self.sparsity - share) < ROUNDED
        self._must("sparsity", fits, f"{share:g} where 'select' is {self.select}")
        self._must("threshold", self.threshold is None or _number(self.threshold), "a number or None")
        whole = isinstance(self.spare, list) and all(type(place) is int for place in self.spare)
        self._must("spare", self.spare is None or whole, "a list of positions in the step's layers, or None")
        floors = self.floors
        counts = isinstance(floors, list) and all(type(least) is int and least >= 0 for least in floors)
        self._must("floors", floors is None or counts, "a list of whole numbers, at least 0, or None")
        object.__setattr__(self, "sparsity", float(self.sparsity if self.runs is None else share))

    @property
    def runs(self) -> tuple[int, int] | None:
        """How many of how many inputs in a row stay, where `select` says so."""
        match = RUNS.fullmatch(self.select) if isinstance(self.select, str) else None
        stay, run = map(int, match.groups()) if match else (0, 0)
        return (stay, run) if stay < run else None

    def _must(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise CallError(f"The '{key}' of {self.name} must be {wanted}. Got {getattr(self, key)!r} instead.")

    def spared(self, layers: int) -> set[int]:
        """Positions of the layers that are not pruned, of so many.

        Raises:
            CallError: there are not that many.
        """
        places = {place + layers if place < 0 else place for place in self.spare or ()}
        self._must("spare", places <= set(range(layers)), f"positions 0 ... {layers - 1} of the step's layers")
        return places

    def refuses(self, group: Group) -> str | None:
        """The first layer that has no weight of its own to prune, or None."""
        return next((reason for layer in group.layers if (reason := refuse_layer(layer))), None)

    def family(self) -> str:
        """Everything but how much is pruned."""
        fixed = replace(self, sparsity=Masking.sparsity, threshold=None, zeros=None)
        return f"{self.name}/{fixed!r}"

    def scores(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> list[Tensor]:
        """The score of every weight, layer by layer."""
        raise CallError(f"{self.name} has no score for {list(modules)} with {len(stats)} statistics.")

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Ranked:
        """The scores, which serve every sparsity."""
        return Ranked(self.scores(modules, stats))

    def pruned(self, name: str, module: nn.Module, keep: Tensor, factors: Ranked) -> Tensor:
        """The weight of a layer without those that go; shaped and laid out as it was."""
        del name, factors
        old = weight_of(module)
        return old.detach().clone().masked_fill_(~keep.to(old.device), 0)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Ranked) -> Rewrite:
        """Copies of the layers with zeros in their weights."""
        kept = self._kept(list(modules), factors.scores)
        built: dict[str, nn.Module] = {}
        zeros = 0
        for (name, module), keep in zip(modules.items(), kept, strict=True):
            weight = self.pruned(name, module, keep, factors)
            zeros += int((weight == 0).sum())
            built[name] = _with_weight(module, weight)
        return Rewrite(built, cast(Method, replace(self, zeros=zeros)))

    def _kept(self, names: Sequence[str], scores: Sequence[Tensor]) -> list[Tensor]:
        spared = self.spared(len(names))
        self._must("floors", self.floors is None or len(self.floors) == len(names), f"{len(names)} numbers, or None")
        floors = self.floors or [0] * len(names)
        places = [place for place in range(len(names)) if place not in spared]
        kept = iter(self._selected([scores[place] for place in places], [floors[place] for place in places]))
        return [
            torch.ones_like(score, dtype=torch.bool) if place in spared else next(kept)
            for place, score in enumerate(scores)
        ]

    def _selected(self, scores: Sequence[Tensor], floors: Sequence[int]) -> list[Tensor]:
        if any(floors):
            return self._above_floors(scores, floors)
        if self.runs is not None:
            return within_runs(scores, *self.runs)
        if self.select == "threshold":
            self._must("threshold", self.threshold is not None, "a number where 'select' is threshold")
            return above(scores, cast(float, self.threshold))
        if self.select in {"percentiles", UNCHECKED}:
            kept = above(scores, mean_percentile(scores, self.sparsity))
            self._check_share(kept)
            return kept
        return smallest(scores, self.sparsity, scope=self.select)

    def _above_floors(self, scores: Sequence[Tensor], floors: Sequence[int]) -> list[Tensor]:
        """What is kept where some of the highest weights of each layer have to stay.

        Raises:
            CallError: more has to stay than the sparsity leaves.
        """
        if self.runs is not None:
            kept = within_runs(scores, *self.runs)
            enough = (int(mask.sum()) >= least for mask, least in zip(kept, floors, strict=True))
            return [mask if ok else torch.ones_like(mask) for mask, ok in zip(kept, enough, strict=True)]
        if self.select == "layer":
            shares = [
                min(self.sparsity, 1 - least / score.numel()) for score, least in zip(scores, floors, strict=True)
            ]
            return [kept for score, share in zip(scores, shares, strict=True) for kept in smallest([score], share)]
        stay = [_highest(score, least) for score, least in zip(scores, floors, strict=True)]
        if self.select == "global":
            total, fixed = sum(score.numel() for score in scores), sum(int(mask.sum()) for mask in stay)
            if round(self.sparsity * total) > total - fixed:
                raise CallError(
                    f"The 'sparsity' {self.sparsity:.4g} of {self.name} leaves {total - round(self.sparsity * total)} "
                    f"of {total} weights, but {fixed} have to stay, as asked: lower it, or keep less."
                )
            lifted = [score.masked_fill(mask, torch.inf) for score, mask in zip(scores, stay, strict=True)]
            return smallest(lifted, self.sparsity)
        found = replace(self, floors=None)._selected(scores, [0] * len(scores))
        return [keep | mask for keep, mask in zip(found, stay, strict=True)]

    def _check_share(self, kept: Sequence[Tensor]) -> None:
        """Refuse a threshold that takes another share than was asked for."""
        share = 1 - sum(int(one.sum()) for one in kept) / max(1, sum(one.numel() for one in kept))
        if self.select != UNCHECKED and abs(share - self.sparsity) > SLACK:
            raise CallError(
                f"{self.name} with select='percentiles' would take {share:.1%} of the weights, not the "
                f"{self.sparsity:.1%} that were asked for: one threshold does not fit layers whose scores differ in "
                f"scale. Say select='global' or 'layer', which take exactly that; '{UNCHECKED}' takes what it gets."
            )

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Nothing: the layers stay what they are."""
        del group
        return {}

    def cost(self, group: Group) -> Cost:
        """Fewer values that are not zero; all else as before."""
        before = group.cost
        return replace(before, nonzero=before.nonzero - self._count(group))

    def _count(self, group: Group) -> int:
        if self.zeros is not None:
            return self.zeros
        spared = self.spared(len(group.layers))
        places = [place for place in range(len(group.layers)) if place not in spared]
        sizes = [math.prod(group.layers[place].weight) for place in places]
        if self.runs is not None:
            found = (_zeros_in_runs(group.layers[place].weight, *self.runs) for place in places)
            floors = [self.floors[place] if self.floors else 0 for place in places]
            pairs = zip(sizes, found, floors, strict=True)
            return sum(zeros if size - zeros >= least else 0 for size, zeros, least in pairs)
        if self.select == "layer":
            floors = [self.floors[place] if self.floors else 0 for place in places]
            return sum(min(round(self.sparsity * n), n - least) for n, least in zip(sizes, floors, strict=True))
        if self.select == "threshold":
            return 1  # nobody knows before: a step that prunes nothing would not have been asked for
        return round(self.sparsity * sum(sizes))

    def exact_case(self, group: Group) -> tuple[Self, nn.Module] | None:
        """Nothing pruned."""
        if len(group.layers) != 1 or self.refuses(group):
            return None
        return replace(self, sparsity=0.0, zeros=0), random_layer(group.layer)


def _zeros_in_runs(weight: Sequence[int], stay: int, run: int) -> int:
    """How many weights of a layer (outputs, inputs, *kernel) go where N of every M inputs stay."""
    whole, rest = divmod(weight[1], run)
    return (whole * (run - stay) + max(0, rest - stay)) * (math.prod(weight) // weight[1])


def _highest(scores: Tensor, count: int) -> Tensor:
    """True at so many of the highest scores, of weights that are zero already at none."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    kept = smallest([scores], max(0.0, 1 - min(count, scores.numel()) / scores.numel()))[0]
    return kept & torch.isfinite(scores)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of the layer, of its own type and with its own tensors, around another weight."""
    old = weight_of(module)
    memo: dict[int, Any] = {id(old): nn.Parameter(weight, requires_grad=old.requires_grad)}
    # whoever puts the copy in its place hands the hooks over; one bound to the model would copy all of it
    memo |= {id(getattr(module, hooks)): type(getattr(module, hooks))() for hooks in HOOKS}
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied
