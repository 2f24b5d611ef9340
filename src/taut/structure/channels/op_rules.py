"""What each operation of a running network does to the labels of its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.structure.channels.labels import Labels, along, compact, varying
from taut.structure.channels.op_calls import FIXED, MIXES, PLACES, Call, operands

Rule = Callable[[Call], None]


def note(labels: Labels, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], output: Any) -> None:
    """Label what an operation made.

    Args:
        labels: of what went in; those of what came out are added.
        func: the operation, of torch's dispatcher.
        args: what it was called with.
        kwargs: and by name.
        inputs: the tensors among these.
        output: what it gave.
    """
    call = Call(labels, func, args, kwargs, inputs, operands([output]))
    call.trace_origin()
    if not any(labels.held(t) for t in inputs):
        call.give_all(None)
        return
    plain = call.name.removesuffix("_")
    rule = RULES.get(call.name) or RULES.get(plain)
    if rule is None and (torch.Tag.pointwise in func.tags or plain in POINTWISE):
        rule = meet_all
    try:
        (rule or Call.give_up)(call)
    except (RuntimeError, IndexError, TypeError, ValueError):
        call.give_up()  # a call of a form that the rule does not know


def _same(call: Call) -> None:
    """The label of the first tensor."""
    call.give_all(call.before)


def meet_all(call: Call) -> None:
    """What meets element by element is one channel."""
    label = None
    for t in call.inputs:
        mine = call.labels.of(t)
        if mine is not None:
            label = mine if label is None else call.meet(label, mine)
    if label is None:
        return
    if any(not call.labels.held(t) and _fixes(label, t) for t in call.inputs):
        call.pin(label, FIXED)
    call.give_all(label)


def _fixes(label: Tensor, other: Tensor) -> bool:
    """Whether a tensor without channels has a width of its own where the label's channels lie."""
    return any(
        label.ndim - axis <= other.ndim and other.shape[axis - label.ndim + other.ndim] > 1 for axis in varying(label)
    )


def _moved(call: Call) -> None:
    """The same call on the label."""
    before = call.before
    if before is not None:
        call.give(call.again(before))


def _shifted(call: Call) -> None:
    """Elements at other places of an axis, or in windows of fixed length: fine where no channels lie on it."""
    before = call.before
    wish = call.argument("dims", 2, []) if call.name == "roll" else [call.argument("dimension", 1)]
    axes = {axis % call.args[0].ndim for axis in wish}
    if before is None or not axes or axes & set(varying(before)):
        return call.give_up()
    return call.give(call.again(before))


def view(call: Call) -> None:
    """Another shape; where the channels of one axis come to lie on several, only one of these may become shorter.

    That is the one whose length the code leaves open (-1), or else the longest; that of whole heads where it is tried
    whether these can go (`Splits`).
    """
    before = call.before
    if before is None:
        return
    label = before.reshape(call.made[0].shape)
    axes = varying(label)
    if len(axes) > max(1, len(varying(before))):
        wish = [axis for axis in axes if call.name == "view" and call.args[1][axis] == -1]
        free = max(wish or axes, key=lambda axis: (label.shape[axis], axis))
        splits, lengths = call.labels.splits, {axis: label.shape[axis] for axis in axes}
        heads = None if splits is None or wish else splits.axis(lengths)
        free = free if heads is None else heads
        for axis in axes:
            if axis != free:
                rows = compact(label)
                call.labels.tie(rows, rows.narrow(axis, 0, 1).expand_as(rows))
        label = call.labels.atoms.roots(compact(label)).expand(label.shape)
        if splits is not None:
            splits.note(label, lengths, free, call.labels)
    call.give([label])


def _parts(call: Call) -> None:
    """Some indices of an axis (slice, select, index, split into parts of sizes of their own): it keeps its length."""
    before = call.before
    if before is None:
        return call.give_up()
    layered = call.labels.holds_layers(call.args[0])
    lost = set(varying(before)) & _touched(call, before) - ({0} if layered else set())
    for t in call.made if layered else ():
        if t.ndim == before.ndim:
            call.labels.layered(t)
    if lost and (len(call.made) > 1 or call.made[0].shape != call.args[0].shape):
        call.pin(before, PLACES)
    return call.give(call.again(before))


def _touched(call: Call, before: Tensor) -> set[int]:
    """The axes that an operation takes parts of."""
    if call.name == "index":
        return {axis for axis, index in enumerate(call.args[1]) if index is not None}
    place = 2 if call.name in {"split", "chunk", "split_with_sizes"} else 1
    return {int(call.argument("dim", place, 0)) % before.ndim}


def _split(call: Call) -> None:
    """Equal parts (chunk): every part keeps as many channels as the others."""
    before = call.before
    if before is None or len({t.shape for t in call.made}) > 1:
        return _parts(call)
    outputs = call.again(before)
    if _touched(call, before) & set(varying(before)):
        for other in outputs[1:]:
            call.labels.tie(compact(outputs[0]), compact(other))
    return call.give(outputs)


def _gated(call: Call) -> None:
    """GLU: the first half of an axis times the sigmoid of the second."""
    before = call.before
    if before is None:
        return call.give_up()
    return call.give([call.meet(*before.chunk(2, call.argument("dim", 1, -1)))])


def join(call: Call) -> None:
    """Tensors one behind the other: those without channels get some that stay."""
    parts = [t for t in call.args[0] if t.numel() or t.ndim != 1]  # torch passes over what is empty, as a new cache
    known = [call.labels.of(t) for t in parts]
    axis = call.argument("dim", 1, 0) % call.made[0].ndim
    if call.name == "stack":
        known = [None if label is None else label.unsqueeze(axis) for label in known]
        parts = [t.unsqueeze(axis) for t in parts]
    inside = varying(next(label for label in known if label is not None)) or [axis]
    filled = []
    for t, label in zip(parts, known, strict=True):
        if label is None and inside != [axis]:
            return call.give_up(FIXED)
        filled.append(_fresh(call, t, axis) if label is None else label)
    grown = _grown(filled, axis)
    if axis not in inside:  # other positions of the same channels
        for part in grown[1:]:
            first = grown[0].narrow(axis, 0, 1)
            call.labels.atoms.unite(part, first.expand_as(part))
    return call.give_all(torch.cat(grown, axis))


def _fresh(call: Call, t: Tensor, axis: int) -> Tensor:
    """A label for what is no channel, but comes to lie among channels."""
    atoms = call.labels.atoms.fresh(t.shape[axis], FIXED.format(op=call.name))
    return _upright(atoms, axis, t.ndim).expand(t.shape)


def _upright(atoms: Tensor, axis: int, rank: int) -> Tensor:
    """Atoms along one axis of a tensor."""
    return atoms.reshape([-1 if a == axis else 1 for a in range(rank)])


def _grown(labels: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Labels of tensors that are joined on an axis, in one shape but for that axis, no larger than needed."""
    small = [compact(label) for label in labels]
    shape = [max(part.shape[a] for part in small) for a in range(small[0].ndim)]
    return [
        part.expand([label.shape[a] if a == axis else shape[a] for a in range(part.ndim)])
        for part, label in zip(small, labels, strict=True)
    ]


def _reduced(call: Call) -> None:
    """Axes summed up: fine where no channels lie on them; of a mean over them, where nothing uses it."""
    before, names = call.before, [argument.name for argument in call.func._schema.arguments]
    if before is None or len(call.made[0].shape) == 0 or "dim" not in names:
        return call.give_up()
    wish = call.argument("dim", names.index("dim"))
    axes = range(before.ndim) if wish is None or wish == [] else wish if isinstance(wish, list | tuple) else [wish]
    lost = {axis % before.ndim for axis in axes}
    if lost & set(varying(before)) and call.name == "mean" and call.labels.tying:
        return call.labels.mix(call.made[0], compact(before), MIXES.format(op=call.name))  # often nobody looks at it
    if lost & set(varying(before)):
        return call.give_up()
    kept = call.made[0].ndim == before.ndim
    label = before
    for axis in sorted(lost, reverse=True):
        label = label.narrow(axis, 0, 1) if kept else label.select(axis, 0)
    return call.give_all(label)


def _scanned(call: Call) -> None:
    """Softmax, cumulative sums: the shape stays, and every element knows its axis.

    Channels that are normalized by each other cannot go alone, but are the same ones behind it.
    """
    before = call.before
    across = before is None or call.argument("dim", 1, -1) % before.ndim in varying(before)
    if across and (call.labels.tying or "softmax" not in call.name):
        return call.give_up()
    return call.give_all(before)


def _resized(call: Call) -> None:
    """Pooling, interpolation, padding: axes of another length that hold no channels."""
    before = call.before
    if before is None or any(t.ndim != before.ndim for t in call.made):
        return call.give_up()
    dims = next((int(a) for a, b in itertools.pairwise(call.name) if b == "d" and a in "123"), 0)
    changed = call.lengthened(before)
    if set(varying(before)) & (changed | {before.ndim - 1 - i for i in range(dims)}):
        return call.give_up()
    label = before
    for axis in changed:
        label = label.narrow(axis, 0, 1)
    return call.give_all(label)


def _padded(call: Call) -> None:
    """Constants around: channels that are added stay as they are, and so do those beside which they come to lie."""
    before = call.before
    if before is None:
        return call.give_up()
    changed, axes = call.lengthened(before), set(varying(before))
    if not changed & axes:
        return _resized(call)
    if changed - axes or min(call.args[1]) < 0:
        return call.give_up()
    label = call.func(before.contiguous(), call.args[1], -1).clone()
    (axis,) = changed
    fresh = call.labels.atoms.fresh(label.shape[axis], FIXED.format(op=call.name))
    return call.give([torch.where(label == -1, _upright(fresh, axis, label.ndim), label)])


def _multiplied(call: Call) -> None:
    """A B: what is summed over meets; rows keep the channels of A, columns those of B."""
    summed = call.name in {"addmm", "baddbmm"}
    first, second = call.args[1:3] if summed else call.args[:2]
    a, b = call.labels.of(first), call.labels.of(second)
    if (summed and call.before is not None) or call.made[0].ndim < 2:
        return call.give_up()
    last = call.made[0].ndim - 1
    inner_a, inner_b = a is not None and last in varying(a), b is not None and last - 1 in varying(b)
    if a is not None and b is not None and inner_a and inner_b:
        call.labels.tie(along(a, last, call.labels), along(b, last - 1, call.labels))
    elif inner_a or inner_b:
        call.labels.pin((first, second), FIXED.format(op=call.name))
    for mine, other in ((a, b), (b, a)):
        if mine is not None and other is None and last == 2 and 0 in varying(mine):
            call.pin(mine, FIXED)  # as many matrices meet it
    rows = _side(a, last, inner=inner_a)
    columns = _side(b, last - 1, inner=inner_b)
    if rows is not None and columns is not None:
        if varying(rows) != [0] or varying(columns) != [0] or last < 2:
            return call.give_up()
        rows = call.meet(rows, columns)  # many products at once, each of its own channel
    return call.give_all(columns if rows is None else rows)


def _side(label: Tensor | None, axis: int, *, inner: bool) -> Tensor | None:
    """What a factor of a product hands on: the channels on its other axes, without the one that is summed over."""
    if label is None or inner:
        return None
    outer = label.narrow(axis, 0, 1)
    return outer if varying(outer) else None


def _packed(call: Call) -> None:
    """Sequences of several lengths one behind the other, or apart again: channels lie on the last axis."""
    before = call.before
    if before is None or set(varying(before)) - {before.ndim - 1}:
        return call.give_up()
    row = before[(0,) * (before.ndim - 1)]
    return call.give([row.expand(call.made[0].shape), *[None] * (len(call.made) - 1)])


def _copied(call: Call) -> None:
    """Written into a tensor: one with channels of its own, or a buffer of fixed size."""
    mine, other = call.before, call.labels.of(call.args[1])
    if mine is not None and other is not None:
        call.give([call.meet(mine, other)])
    else:
        call.labels.pin(call.args, FIXED.format(op=call.name))


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


POINTWISE = frozenset(
    "hardswish hardsigmoid _prelu_kernel native_dropout dropout bernoulli hardtanh glu_jvp threshold where".split()  # noqa: SIM905
)

RULES: dict[str, Rule] = {
    **_rules(_same, "clone detach alias _to_copy contiguous lift_fresh positive rand_like zeros_like ones_like"),
    **_rules(_same, "full_like empty_like randn_like"),
    **_rules(view, "view _unsafe_view reshape _reshape_alias unflatten"),
    **_rules(_moved, "permute transpose t expand squeeze unsqueeze flip repeat pixel_shuffle channel_shuffle"),
    **_rules(_moved, "pixel_unshuffle movedim"),
    **_rules(_shifted, "roll unfold"),
    **_rules(_parts, "slice select index index_select narrow split_with_sizes gather unbind"),
    **_rules(_split, "split chunk"),
    **_rules(_gated, "glu"),
    **_rules(join, "cat stack"),
    **_rules(_reduced, "mean sum amax amin max min var std linalg_vector_norm logsumexp prod any all norm"),
    **_rules(_scanned, "_softmax _log_softmax _safe_softmax cumsum cumprod sort"),
    **_rules(
        _resized,
        "max_pool1d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d mkldnn_max_pool3d avg_pool1d "
        "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
        "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa reflection_pad1d "
        "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    ),
    **_rules(_padded, "constant_pad_nd"),
    **_rules(_multiplied, "mm bmm addmm baddbmm"),
    **_rules(_copied, "copy"),
    **_rules(_packed, "_pack_padded_sequence _pad_packed_sequence"),
}
"""Operation -> how it treats channels; pointwise ones are known by torch's own tags, all others pin."""
