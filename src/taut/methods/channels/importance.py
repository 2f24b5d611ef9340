"""Criteria of filter pruning, from layers and their statistics to an order of removal for every coupled group."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.criteria import channels as criteria
from taut.criteria.channels import Reader, removal
from taut.decompose.linalg import metric_factor, ridge
from taut.decompose.weighting import WIDE, Weighting
from taut.errors import CallError
from taut.methods.channels.widths import Curve
from taut.methods.factorization import regular
from taut.structure.asides import AsideStatistics
from taut.structure.channels.groups import ChannelGroup, Member, Orders
from taut.structure.patches import grouped_weight, groups_of, weight_of
from taut.structure.rules import INPUTS, OUTPUTS, module_rule
from taut.structure.statistics import LayerStatistics

RIDGE = 1e-3
"""Share of the mean eigenvalue added to a second moment that decides which channels go."""

CRITERIA = ("obs", "obd", "taylor", "l1", "l2", "bn", "median", "residual", "energy")

Known = Mapping[str, LayerStatistics]


def curves_of(
    model: nn.Module, groups: Sequence[ChannelGroup], stats: Known, criterion: str, names: Mapping[str, str]
) -> list[Curve]:
    """An order of removal for every group, with damages that compare over groups.

    Args:
        model: the network.
        groups: of its channels.
        stats: by the names that the step gives the layers.
        criterion: of CRITERIA.
        names: where a layer stands in `model` -> the step's name.

    Raises:
        CallError: the criterion needs calibration data, and there is none.
    """
    known = {place: stats[name] for place, name in names.items() if name in stats}
    if criterion in {"taylor", "energy"} and not any(s.weighting.known for s in known.values()):
        raise CallError(
            f"The 'criterion' {criterion} of channels needs calibration data: give taut.observe some, or take l2."
        )
    if criterion in {"obs", "obd"}:
        return _surgical(model, groups, known, exact=criterion == "obs")
    return [_scored(scores_of(model, group, known, criterion)) for group in groups]


def orders(model: nn.Module, stats: Known, criterion: str, names: Mapping[str, str]) -> Orders:
    """What gives the channels of groups in their order of removal: arguments as of `curves_of`."""
    return lambda groups: [curve.order for curve in curves_of(model, groups, stats, criterion, names)]


def _scored(scores: Tensor) -> Curve:
    """Shares of the group's score, lowest first."""
    order = scores.argsort(stable=True)
    sorted_scores = scores[order].clamp_min(0)
    total = float(sorted_scores.mean())
    damages = torch.cat([torch.zeros(1, dtype=torch.float64), (sorted_scores / (total or 1.0)).cumsum(0)])
    return Curve(order.numpy(), damages.numpy())


# Optimal brain surgeon and damage: what the readers of a group lose.


def _surgical(model: nn.Module, groups: Sequence[ChannelGroup], known: Known, *, exact: bool) -> list[Curve]:
    found = [_searched(model, group, known, exact=exact) for group in groups]
    shares = [float(curve.damages[-1]) for curve in found if curve is not None]
    usual = float(np.median(shares)) if shares else 1.0
    return [curve or _blind(model, group, usual) for curve, group in zip(found, groups, strict=True)]


@dataclass(frozen=True, eq=False)
class _Search:
    """An order that was searched: what it is for lives as long as what was observed does."""

    observed: tuple[ref[LayerStatistics], ...]
    curve: Curve | None

    def is_of(self, observed: Sequence[LayerStatistics]) -> bool:
        """Whether it was made from these: an address may have been given to others since."""
        pairs = zip(self.observed, observed, strict=False)
        return len(self.observed) == len(observed) and all(one() is other for one, other in pairs)


_SEARCHED: OrderedDict[bytes, _Search] = OrderedDict()
"""What was searched last, by what was asked: plans of one network ask for the same orders again and again."""

SEARCHES = 256
"""Searches that are remembered: two numbers a channel each."""


def _searched(model: nn.Module, group: ChannelGroup, known: Known, *, exact: bool) -> Curve | None:
    """The order of removal of one group, searched once; None where no reader was observed."""
    observed = [known[m.layer] for m in group.of("in") if m.layer in known]
    key = _key(model, group, known, exact=exact)
    search = _SEARCHED.pop(key, None)
    if search is None or not search.is_of(observed):
        search = _Search(tuple(map(ref, observed)), _search(model, group, known, exact=exact))
    _SEARCHED[key] = search
    while len(_SEARCHED) > SEARCHES:
        _SEARCHED.popitem(last=False)
    return search.curve


def _search(model: nn.Module, group: ChannelGroup, known: Known, *, exact: bool) -> Curve | None:
    sides = [problems(model, m, group.size, known.get(m.layer), exact=exact) for m in group.of("in")]
    readers = [reader for side in sides for reader in side]
    if not readers:
        return None
    gone = removal(readers, group.size)
    damages = np.concatenate([[0.0], gone.damages.cpu().numpy()])
    return Curve(gone.order.cpu().numpy(), damages, comparable=all(sides))


def _key(model: nn.Module, group: ChannelGroup, known: Known, *, exact: bool) -> bytes:
    """A checksum over all that decides a search: values of weights; of what was observed, which stays, where it is."""
    found = hashlib.blake2b(f"{exact} {group.size}".encode())
    for member in group.of("in"):
        module, stats = model.get_submodule(member.layer), known.get(member.layer)
        seen = "" if stats is None else f"{id(stats)} {type(module).__qualname__} {groups_of(module)} {member.width}"
        found.update(seen.encode())
        for t in (member.index,) if stats is None else (member.index, weight_of(module)):
            found.update(f"{t.dtype} {tuple(t.shape)}".encode())
            found.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def _blind(model: nn.Module, group: ChannelGroup, usual: float) -> Curve:
    """For channels whose readers were not observed: by the size of the weights that read them."""
    scores = torch.zeros(group.size, dtype=torch.float64)
    for member in group.of("in"):
        W = columns_of(model.get_submodule(member.layer))
        scores += _by_class(W.double().square().sum(1), member)
    order = scores.argsort(stable=True)
    share = torch.cat([torch.zeros(1, dtype=torch.float64), scores[order].cumsum(0)]) / scores.sum().clamp_min(1e-300)
    return Curve(order.numpy(), (share * usual).numpy())


def columns_of(module: nn.Module) -> Tensor:
    """(inputs, everything else) of a layer's weight."""
    rule = module_rule(module)
    if rule is not None:
        return rule.weight(module, INPUTS)
    return grouped_weight(module).cpu().transpose(1, 2).flatten(0, 1).flatten(1)


def _by_class(values: Tensor, member: Member) -> Tensor:
    """Values per index of a side, summed over what belongs to one channel."""
    return values[member.index].sum(1)


def problems(
    model: nn.Module, member: Member, classes: int, stats: LayerStatistics | None, *, exact: bool
) -> list[Reader]:
    """A reader as least-squares problems, one per group of a grouped convolution; none where it was not observed."""
    module: Any = model.get_submodule(member.layer)
    if stats is None or not stats.weighting.known:
        return []
    g, W = groups_of(module), grouped_weight(module)
    owner = torch.full((member.width,), -1)
    owner[member.index] = torch.arange(len(member.index))[:, None].expand_as(member.index)
    owner = owner.reshape(g, -1)
    known = stats.outputs is not None
    energy = 1.0 if known else stats.weighting.energy(W)
    scale = 1 / (2 * stats.positions) if known else (stats.scale or 1.0) / max(energy, 1e-300)
    scale *= stats.overlap(W) if known and isinstance(stats, AsideStatistics) else 1.0
    W, B = W.cpu().double(), regular(stats.outputs)
    if stats.outputs is not None and stats.outputs.rows is not None:  # B = R^T R: R W has the same errors, without B
        W = torch.einsum("gmo,gocs->gmcs", stats.outputs.rows.cpu().double(), W)
    held = stats.weighting.handy(W.shape[2])
    parts = [_Part(W[i], owner[i], held.part(i), None if B is None else B[i].cpu(), scale) for i in range(g)]
    return [(part.jointly() if exact else None) or part.apart(classes) for part in parts]


@dataclass(frozen=True)
class _Part:
    """One group of a layer that reads channels.

    Attributes:
        W: (o, c, s). owner: (c,), the class of every column; -1: of other channels, which stay.
        held: second moments of the inputs, of this group alone.
        B: (o, o) metric of the outputs, or None. scale: see `Reader`.
    """

    W: Tensor
    owner: Tensor
    held: Weighting
    B: Tensor | None
    scale: float

    def jointly(self) -> Reader | None:
        """All columns as they act together; None where only a sketch of the inputs is held, or too many of them."""
        taps = self.W.shape[2]
        if self.held.full is not None and self.held.full.shape[-1] <= WIDE:
            A = ridge(self.held.full[0], RIDGE).cpu()
            return Reader(self.W.flatten(1), A, self.owner.repeat_interleave(taps), self.B, self.scale)
        if self.held.channel is not None:
            A = ridge(self.held.channel[0], RIDGE).cpu()
            W = self.W if self.B is None else torch.einsum("op,pcs->ocs", metric_factor(self.B[None])[0][0], self.W)
            return Reader(W.movedim(2, 0).flatten(0, 1), A, self.owner, None, self.scale)  # taps are outputs apart
        return None

    def apart(self, classes: int) -> Reader:
        """Nothing else moves: every channel's own error, as a problem of independent inputs."""
        errors = torch.zeros(classes, dtype=torch.float64)
        for number in range(classes):
            columns = (self.owner == number).nonzero().flatten()
            if len(columns):
                errors[number] = self._error(columns)
        eye = torch.eye(classes, dtype=torch.float64)
        return Reader(errors.clamp_min(0).sqrt()[None], eye, torch.arange(classes), None, self.scale)

    def _error(self, columns: Tensor) -> Tensor:
        """tr(B W_S A_SS W_S^T) of some columns S."""
        W, taps = self.W[:, columns], self.W.shape[2]
        weighed = W if self.B is None else torch.einsum("op,pcs->ocs", self.B, W)
        if self.held.channel is not None:
            A = self.held.channel[0][columns][:, columns].cpu().double()
            return (torch.einsum("ocs,ods->cd", weighed, W) * A).sum()
        at = (columns[:, None] * taps + torch.arange(taps)).flatten()
        if self.held.full is not None:
            A = self.held.full[0][at][:, at].cpu().double()
        else:
            rows: Any = self.held.sketch
            A = rows[0][:, at].cpu().double()
            A = A.T @ A
            if self.held.beside is not None:
                A.diagonal().add_(float(self.held.beside[0]))
        return (weighed.flatten(1).T @ W.flatten(1) * A).sum()


# Scores of single channels: higher is more important.


def scores_of(model: nn.Module, group: ChannelGroup, known: Known, criterion: str) -> Tensor:
    """One number per channel of a group, in float64.

    What a criterion needs and the network does not have (batch norms behind every layer, gradients) is replaced by the
    L2 norm of the filters.
    """
    parts = _parts(model, group, known, criterion) or _parts(model, group, known, "l2")
    return criteria.pooled(parts, group.size)


def _parts(model: nn.Module, group: ChannelGroup, known: Known, criterion: str) -> list[tuple[Tensor, Tensor]]:
    makers = {
        "l1": lambda rows: criteria.norm(rows, 1),
        "l2": lambda rows: criteria.norm(rows, 2),
        "median": criteria.geometric_median,
        "residual": criteria.residual,
    }
    found = []
    for member in group.members:
        module = model.get_submodule(member.layer)
        value: Tensor | None = None
        if criterion in makers and member.end == "out":
            value = makers[criterion](rows_of(module))
        elif criterion == "bn" and member.end == "through" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            value = None if module.weight is None else criteria.bn_scale(module.weight.detach().cpu())
        elif criterion == "taylor" and member.end == "out":
            value = _taylor(known.get(member.layer))
        elif criterion == "energy" and member.end == "in":
            value = _energy(known.get(member.layer), member)
        if value is not None:
            found.append((value.double(), _owner(member, len(value))))
    return found


def rows_of(module: nn.Module) -> Tensor:
    """(outputs, everything else) of a layer's weight."""
    rule = module_rule(module)
    if rule is not None:
        return rule.weight(module, OUTPUTS)
    W = weight_of(module).detach().cpu()
    swapped = isinstance(module, _ConvTransposeNd | nn.Embedding)
    return (W.transpose(0, 1) if swapped else W).flatten(1)


def _taylor(stats: LayerStatistics | None) -> Tensor | None:
    if stats is None or stats.taylor is None:
        return None
    rises: Tensor = stats.taylor.cpu().double()
    return rises / float(rises.norm().clamp_min(1e-300))


def _energy(stats: LayerStatistics | None, member: Member) -> Tensor | None:
    """Mean square of what arrives, per index of the side."""
    squares = None if stats is None else stats.weighting.squares()
    if squares is None:
        return None
    found: Tensor = criteria.energy(squares.cpu().reshape(member.width, -1).double().sum(1))
    return found


def _owner(member: Member, width: int) -> Tensor:
    owner = torch.full((width,), -1)
    owner[member.index] = torch.arange(len(member.index))[:, None].expand_as(member.index)
    return owner
