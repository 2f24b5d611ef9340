"""Hidden units of recurrent layers as channels: which rows and columns of which weights go with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from taut.core.tensors import tensors
from taut.nn import Recurrent, StateLinear
from taut.nn.recurrent import GATES
from taut.structure.channels.labels import Labels, varying
from taut.structure.channels.layer_rules import APART, Sides, narrowable
from taut.structure.patches import weight_of

End = Any
Known = dict[tuple[str, End], Tensor]

UNKNOWN = "they are read by '{name}', a recurrent layer of which a part is no plain layer"
STATES = "initial states of '{name}' are of another form than its own"


def follow_recurrent(module: Recurrent, sides: Sides, called: tuple[Any, Any], output: Any) -> None:
    """Note what a recurrent layer reads, and label what it gives.

    A unit is one row of every gate, one column of the weights for the hidden states, and one column of what reads it.

    Args:
        module: the layer.
        sides: where it is noted, under the names of the layers inside.
        called: the arguments, by place and by name.
        output: what it gave.
    """
    labels, name = sides.labels, sides.name
    args, kwargs = called
    x, hx = _argument(args, kwargs, "input", 0), _argument(args, kwargs, "hx", 1)
    if not labels.tying or not _plain(module) or x is None:
        labels.pin(called, UNKNOWN.format(name=name))
        for t in tensors((output[0], output[1])):
            labels.put(t, None)
            labels.come(t, crossed=False)
        return
    units = _units(module, sides)
    _read_states(module, sides, hx, units)
    data = x.data if isinstance(x, PackedSequence) else x
    for number in range(module.num_layers):
        first, last = _ends(f"{name}.inputs.{number}", module.inputs[number])
        mine = units[number * module.ways : (number + 1) * module.ways]
        _inner(sides, last).note("out", torch.cat([_rows(module, own) for own in mine]))
        columns = None
        if number == 0:
            columns = _inner(sides, first).arriving(data, data.ndim - 1)
        else:
            columns = torch.cat(units[(number - 1) * module.ways : number * module.ways])
        if columns is not None:
            _inner(sides, first).read("in", columns)
    _give(module, labels, units, output)


@contextmanager
def unpacking(labels: Labels, outside: Callable[[int], bool]) -> Iterator[None]:
    """Follow channels out of packed sequences while a network runs: torch writes them into a tensor of its own.

    Args:
        labels: of all tensors.
        outside: counts how deep the run is inside of what is not looked into, and says whether that is not at all.
    """
    kernels: Any = _VF
    torchs, own = kernels._pad_packed_sequence, vars(kernels).get("_pad_packed_sequence")

    def watched(data: Tensor, *args: Any) -> Any:
        outside(1)
        try:
            padded, lengths = torchs(data, *args)
        finally:
            free = outside(-1)
        if free:
            with torch._C._DisableTorchDispatch():  # labels have none themselves
                label = labels.of(data)
                if label is not None and set(varying(label)) <= {data.ndim - 1}:
                    labels.put(padded, label[(0,) * (data.ndim - 1)].expand(padded.shape))
                else:
                    labels.pin(data, APART.format(name="pad_packed_sequence"))
                labels.come(padded, crossed=labels.origin(data))
        return padded, lengths

    kernels._pad_packed_sequence = watched
    try:
        yield
    finally:
        if own is None:
            del kernels._pad_packed_sequence
        else:
            kernels._pad_packed_sequence = own


def _argument(args: Any, kwargs: Mapping[str, Any], name: str, place: int) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _plain(module: Recurrent) -> bool:
    """Whether all layers inside are such that can be made narrower."""
    chains = [[part for part in chain.modules() if not isinstance(part, nn.Sequential)] for chain in module.inputs]
    linear = all(type(part) is nn.Linear and narrowable(part) for chain in chains for part in chain)
    return linear and module.fused() and all(type(part) is StateLinear for part in module.states)


def _ends(name: str, chain: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer of a chain."""
    found = [path for path, part in chain.named_modules() if isinstance(part, nn.Linear)]
    first, last = (f"{name}.{path}" if path else name for path in (found[0], found[-1]))
    return first, last


def _inner(sides: Sides, name: str) -> Sides:
    return Sides(sides.labels, sides.known, name)


def _rows(module: Recurrent, units: Tensor) -> Tensor:
    """The unit of every row of a weight: gate after gate."""
    return units.repeat(GATES[module.mode])


def _units(module: Recurrent, sides: Sides) -> list[Tensor]:
    """The units of every layer and direction, the same at every call."""
    found = []
    for number in range(len(module.states)):
        inner = _inner(sides, f"{sides.name}.states.{number}")
        known = inner.known.get((inner.name, "in"))
        own = sides.labels.atoms.fresh(module.hidden_size) if known is None else known
        inner.note("in", own)
        inner.note("out", _rows(module, own))
        found.append(own)
    return found


def _read_states(module: Recurrent, sides: Sides, hx: Any, units: list[Tensor]) -> None:
    """Initial states that are made of channels go with the units; of others the layer takes what it needs."""
    del module
    for state in tensors(hx):
        label = sides.labels.of(state)
        if label is None:
            continue
        label = label if label.ndim == 3 else label.unsqueeze(1)
        for own, row in zip(units, label, strict=True):
            if row.shape[-1] != len(own):
                sides.stay(state, STATES.format(name=sides.name))
                return
            sides.labels.atoms.unite(row, own.expand_as(row))


def _give(module: Recurrent, labels: Labels, units: list[Tensor], output: Any) -> None:
    """Label outputs and last states."""
    given, states = output
    y = given.data if isinstance(given, PackedSequence) else given
    labels.put(y, torch.cat(units[-module.ways :]).expand(y.shape))
    stacked = torch.stack(units)
    for state in tensors(states):
        labels.put(state, (stacked if state.ndim == 2 else stacked[:, None]).expand(state.shape))
        labels.layered(state)
    for t in tensors((y, states)):
        labels.come(t, crossed=False)


def stacked(module: nn.Module) -> range:
    """Numbers of the layers and directions of a recurrent layer that has several; none of all else."""
    return range(len(module.states) if isinstance(module, Recurrent) and len(module.states) > 1 else 0)


def pair_units(
    model: nn.Module, known: Mapping[tuple[str, End], Tensor], labels: Labels, ranks: Mapping[str, Tensor]
) -> None:
    """Let units of the layers and directions of one recurrent layer, which stay equally wide, go in pairs.

    Those that already go together, by what happens around the layer, are pairs. Of the others the least important ones
    are, and so on.

    Args:
        model: the network.
        known: the class of every index of every side.
        labels: of the runs.
        ranks: how important the units of a layer and direction are; where it is not said, what reads a unit says it.
    """
    atoms = labels.atoms
    for name, module in _recurrent(model, known):
        units = [known[f"{name}.states.{number}", "in"] for number in range(len(module.states))]
        names = [f"{name}.states.{number}" for number in range(len(units))]
        own = all(key in ranks for key in names)
        scores = [ranks[key] if own else _scores(module, number) for number, key in enumerate(names)]
        for number in range(1, len(units)):
            first, other = atoms.roots(units[0]), atoms.roots(units[number])
            free = (~torch.isin(first, other)).nonzero()[:, 0], (~torch.isin(other, first)).nonzero()[:, 0]
            rank = [
                index[score[index].argsort()] for index, score in zip(free, (scores[0], scores[number]), strict=True)
            ]
            if len(rank[0]) == len(rank[1]):
                atoms.unite(units[0][rank[0]], units[number][rank[1]])
            else:
                atoms.pin(torch.cat(units), f"units of the layers and directions of '{name}' go in different ways")


def _recurrent(model: nn.Module, known: Mapping[tuple[str, End], Tensor]) -> Iterator[tuple[str, Recurrent]]:
    for name, module in model.named_modules():
        if isinstance(module, Recurrent) and (f"{name}.states.0", "in") in known:
            yield name, module


def _scores(module: Recurrent, number: int) -> Tensor:
    """How much of what is inside the recurrent layer reads every unit of a layer and direction."""
    score = weight_of(module.states[number]).detach().double().square().sum(0)
    layer, way = divmod(number, module.ways)
    if layer + 1 < module.num_layers:
        first: Any = next(part for part in module.inputs[layer + 1].modules() if isinstance(part, nn.Linear))
        score = score + first.weight.detach().double().square().sum(0).reshape(module.ways, -1)[way]
    return score.cpu()
