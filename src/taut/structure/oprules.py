"""What each operation of a running network does to the labels of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taut.calls import tensors
from taut.structure.labels import Labels, along, compact, varying

MIXES = "the operation '{op}' mixes these channels or has a size of its own"
FIXED = "they meet a tensor of fixed width in '{op}' (an input, a constant, a parameter of other code)"
PLACES = "code takes some of them by their place ('{op}')"
BROADCAST = "a single channel is spread over others in '{op}'"

Rule = Callable[[Labels, str, Any, Any, Any, list[Tensor]], None]


def note(labels: Labels, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Label what an operation made.

    Args:
        labels: of what went in; those of what came out are added.
        func: the operation, of torch's dispatcher.
        args: what it was called with.
        kwargs: and by name.
        output: what it gave.
    """
    name = func.overloadpacket.__name__
    made = tensors(output)
    if all(labels.of(t) is None for t in tensors((args, kwargs))):
        for t in made:
            labels.put(t, None)
        return
    plain = name.removesuffix("_")
    rule = RULES.get(name) or RULES.get(plain)
    if rule is None and (torch.Tag.pointwise in func.tags or plain in POINTWISE):
        rule = _pointwise
    try:
        (rule or _unknown)(labels, name, func, args, kwargs, made)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        _unknown(labels, name, func, args, kwargs, made)


def _unknown(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Nothing is known: what went in stays."""
    del func
    labels.pin((args, kwargs), MIXES.format(op=name))
    for t in made:
        labels.put(t, None)


def _same(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """The label of the first tensor."""
    del name, func, kwargs
    for t in made:
        labels.put(t, labels.of(args[0]))


def _pointwise(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """What meets element by element is one channel."""
    del func
    given = tensors((args, kwargs))
    label = None
    for t in given:
        mine = labels.of(t)
        if mine is not None:
            label = mine if label is None else meet(labels, label, mine, name)
    if label is None:
        return
    for t in given:
        if labels.of(t) is None and _fixes(label, t):
            labels.atoms.pin(compact(label), FIXED.format(op=name))
    for t in made:
        labels.put(t, label.expand(t.shape))


def _fixes(label: Tensor, other: Tensor) -> bool:
    """Whether a tensor without channels has a width of its own where the label's channels lie."""
    return any(
        label.ndim - axis <= other.ndim and other.shape[axis - label.ndim + other.ndim] > 1 for axis in varying(label)
    )


def meet(labels: Labels, a: Tensor, b: Tensor, name: str) -> Tensor:
    """Unite two labels that broadcast; one that is a single channel where the other has many does not take part."""
    rank = max(a.ndim, b.ndim)
    a, b = (t.reshape(*[1] * (rank - t.ndim), *t.shape) for t in (a, b))
    for mine, other in ((a, b), (b, a)):
        if any(mine.shape[axis] == 1 < other.shape[axis] for axis in varying(other)):
            labels.atoms.pin(compact(mine), BROADCAST.format(op=name))
            return other
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    small = torch.broadcast_tensors(compact(a), compact(b))  # type: ignore[no-untyped-call]
    labels.atoms.unite(*small)
    return labels.atoms.roots(small[0]).expand(shape)


def _moved(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """The same call on the label."""
    before = labels.of(args[0])
    if before is None:
        return None
    if name == "roll" and varying(before):
        return _unknown(labels, name, func, args, kwargs, made)
    outputs = tensors(func(before, *args[1:], **kwargs))
    for t, label in zip(made, outputs, strict=True):
        labels.put(t, label)
    return None


def _viewed(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Another shape; where the channels of one axis come to lie on several, only one of these may become shorter."""
    del name, func, kwargs
    before = labels.of(args[0])
    if before is None:
        return
    label = before.reshape(made[0].shape)
    axes = varying(label)
    if len(axes) > max(1, len(varying(before))):
        free = max(axes, key=lambda axis: (label.shape[axis], axis))
        for axis in axes:
            if axis != free:
                rows = compact(label)
                labels.atoms.unite(rows, rows.narrow(axis, 0, 1).expand_as(rows))
        label = labels.atoms.roots(compact(label)).expand(label.shape)
    labels.put(made[0], label)


def _parts(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Some indices of an axis (slice, select, index, split into parts of sizes of their own): it keeps its length."""
    before = labels.of(args[0])
    if before is None:
        return _unknown(labels, name, func, args, kwargs, made)
    outputs = tensors(func(before, *args[1:], **kwargs))
    lost = set(varying(before)) & _touched(name, args, kwargs, before)
    if lost and (len(made) > 1 or made[0].shape != args[0].shape):
        labels.atoms.pin(compact(before), PLACES.format(op=name))
    for t, label in zip(made, outputs, strict=True):
        labels.put(t, label)
    return None


def _touched(name: str, args: Any, kwargs: Any, before: Tensor) -> set[int]:
    """The axes that an operation takes parts of."""
    if name == "index":
        return {axis for axis, index in enumerate(args[1]) if index is not None}
    default = 2 if name == "split_with_sizes" else 1
    axis = kwargs.get("dim", args[default] if len(args) > default and name != "unbind" else 0)
    if name == "unbind":
        axis = args[1] if len(args) > 1 else 0
    return {int(axis) % before.ndim}


def _split(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Equal parts (chunk): every part keeps as many channels as the others."""
    before = labels.of(args[0])
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0) % args[0].ndim
    if before is None or len({t.shape for t in made}) > 1:
        return _parts(labels, name, func, args, {**kwargs, "dim": axis} if len(args) < 3 else kwargs, made)
    outputs = tensors(func(before, *args[1:], **kwargs))
    if axis in varying(before):
        for other in outputs[1:]:
            labels.atoms.unite(compact(outputs[0]), compact(other))
    for t, label in zip(made, outputs, strict=True):
        labels.put(t, label)
    return None


def _unbound(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """As `_parts`, but fine where the axis was united before: queries, keys and values behind one Linear."""
    _parts(labels, name, func, args, kwargs, made)


def _gated(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """GLU: the first half of an axis times the sigmoid of the second."""
    before = labels.of(args[0])
    if before is None:
        return _unknown(labels, name, func, args, kwargs, made)
    first, second = before.chunk(2, args[1] if len(args) > 1 else -1)
    labels.put(made[0], meet(labels, first, second, name))
    return None


def _joined(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Tensors one behind the other: those without channels get some that stay."""
    del func
    parts = list(args[0])
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made[0].ndim
    known = [labels.of(t) for t in parts]
    if name == "stack":
        known = [None if label is None else label.unsqueeze(axis) for label in known]
        parts = [t.unsqueeze(axis) for t in parts]
    sample = next(label for label in known if label is not None)
    inside = varying(sample) if varying(sample) else [axis]
    filled = []
    for t, label in zip(parts, known, strict=True):
        if label is not None:
            filled.append(label)
        elif inside == [axis]:
            fresh = labels.atoms.fresh(t.shape[axis], FIXED.format(op=name))
            filled.append(fresh.reshape(-1, *[1] * (t.ndim - axis - 1)).expand(t.shape))
        else:
            labels.pin(args, FIXED.format(op=name))
            return labels.put(made[0], None)
    small = [compact(label) for label in filled]
    shape = [max(part.shape[a] for part in small) for a in range(made[0].ndim)]
    grown = []
    for part, label in zip(small, filled, strict=True):
        size = [label.shape[a] if a == axis else shape[a] for a in range(part.ndim)]
        grown.append(part.expand(size))
    label = torch.cat(grown, axis)
    if axis not in inside:  # other positions of the same channels
        for part in grown[1:]:
            first = grown[0].narrow(axis, 0, 1)
            labels.atoms.unite(part, first.expand_as(part))
    return labels.put(made[0], label)


def _reduced(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Axes summed up: fine where no channels lie on them."""
    before = labels.of(args[0])
    if before is None or len(made[0].shape) == 0 or "dim" not in _signature(func):
        return _unknown(labels, name, func, args, kwargs, made)
    place = _signature(func).index("dim")
    wish = kwargs.get("dim", args[place] if len(args) > place else None)
    axes = range(before.ndim) if wish is None or wish == [] else wish if isinstance(wish, list | tuple) else [wish]
    lost = {axis % before.ndim for axis in axes}
    if lost & set(varying(before)):
        return _unknown(labels, name, func, args, kwargs, made)
    kept = made[0].ndim == before.ndim
    label = before
    for axis in sorted(lost, reverse=True):
        label = label.narrow(axis, 0, 1) if kept else label.select(axis, 0)
    for t in made:
        labels.put(t, label.expand(t.shape))
    return None


def _signature(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _scanned(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Softmax, cumulative sums: the shape stays, and every element knows its axis."""
    before = labels.of(args[0])
    axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if before is None or axis % before.ndim in varying(before):
        return _unknown(labels, name, func, args, kwargs, made)
    for t in made:
        labels.put(t, before)
    return None


def _resized(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Pooling, interpolation, padding: axes of another length that hold no channels."""
    before = labels.of(args[0])
    if before is None or any(t.ndim != before.ndim for t in made):
        return _unknown(labels, name, func, args, kwargs, made)
    spatial = next((int(name[at - 1]) for at in range(1, len(name)) if name[at] == "d" and name[at - 1] in "123"), 0)
    axes = set(varying(before))
    changed = {axis for axis in range(before.ndim) if before.shape[axis] != made[0].shape[axis]}
    if axes & (changed | {before.ndim - 1 - i for i in range(spatial)}):
        return _unknown(labels, name, func, args, kwargs, made)
    for t in made:
        label = before
        for axis in changed:
            label = label.narrow(axis, 0, 1)
        labels.put(t, label.expand(t.shape))
    return None


def _padded(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Constants around: channels that are added stay as they are, and so do those beside which they come to lie."""
    before = labels.of(args[0])
    if before is None:
        return _unknown(labels, name, func, args, kwargs, made)
    changed = {axis for axis in range(before.ndim) if before.shape[axis] != made[0].shape[axis]}
    if not changed & set(varying(before)):
        return _resized(labels, name, func, args, kwargs, made)
    if changed - set(varying(before)) or min(args[1]) < 0:
        return _unknown(labels, name, func, args, kwargs, made)
    label = func(before.contiguous(), args[1], -1)
    label = label.clone()
    places = label == -1
    (axis,) = changed
    fresh = labels.atoms.fresh(label.shape[axis], FIXED.format(op=name))
    shape = [-1 if a == axis else 1 for a in range(label.ndim)]
    labels.put(made[0], torch.where(places, fresh.reshape(shape), label))
    return None


def _multiplied(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """A B: what is summed over meets; rows keep the channels of A, columns those of B."""
    first, second = args[1:3] if name in {"addmm", "baddbmm"} else args[:2]
    a, b = labels.of(first), labels.of(second)
    if (name in {"addmm", "baddbmm"} and labels.of(args[0]) is not None) or made[0].ndim < 2:
        return _unknown(labels, name, func, args, kwargs, made)
    last = made[0].ndim - 1
    inner_a, inner_b = a is not None and last in varying(a), b is not None and last - 1 in varying(b)
    if a is not None and b is not None and inner_a and inner_b:
        labels.atoms.unite(along(a, last, labels.atoms), along(b, last - 1, labels.atoms))
    elif inner_a or inner_b:
        labels.pin((first, second), FIXED.format(op=name))
    rows = a.narrow(last, 0, 1) if a is not None and not inner_a else None
    columns = b.narrow(last - 1, 0, 1) if b is not None and not inner_b else None
    if rows is not None and columns is not None and varying(rows) and varying(columns):
        labels.pin((first, second), MIXES.format(op=name))
        return labels.put(made[0], None)
    rows = None if rows is None or not varying(rows) else rows
    columns = columns if columns is not None and varying(columns) else None
    label = columns if rows is None else rows
    return labels.put(made[0], None if label is None else label.expand(made[0].shape))


def _copied(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Written into a tensor: one with channels of its own, or a buffer of fixed size."""
    del func, kwargs
    mine, other = labels.of(args[0]), labels.of(args[1])
    if mine is not None and other is not None:
        labels.put(made[0], meet(labels, mine, other, name))
    else:
        labels.pin(args, FIXED.format(op=name))


def _like(labels: Labels, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """A new tensor as wide as another."""
    _same(labels, name, func, args, kwargs, made)


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


POINTWISE = frozenset(
    "hardswish hardsigmoid _prelu_kernel native_dropout dropout bernoulli hardtanh glu_jvp threshold where".split()  # noqa: SIM905
)

RULES: dict[str, Rule] = {
    **_rules(_same, "clone detach alias _to_copy contiguous lift_fresh positive rand_like zeros_like ones_like"),
    **_rules(_like, "full_like empty_like randn_like"),
    **_rules(_viewed, "view _unsafe_view reshape _reshape_alias unflatten"),
    **_rules(_moved, "permute transpose t expand squeeze unsqueeze flip roll repeat pixel_shuffle channel_shuffle"),
    **_rules(_moved, "pixel_unshuffle movedim unfold"),
    **_rules(_parts, "slice select index index_select narrow split_with_sizes gather"),
    **_rules(_unbound, "unbind"),
    **_rules(_split, "split chunk"),
    **_rules(_gated, "glu"),
    **_rules(_joined, "cat stack"),
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
}
"""Operation -> how it treats channels; pointwise ones are known by torch's own tags, all others pin."""
