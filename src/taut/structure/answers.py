"""What of a model's output counts: the tensors that are its answer; no caches, no losses, no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.core.example import Example
from taut.core.formats import by_name
from taut.core.nested import attributes_of
from taut.core.padding import output_name, real_positions, real_rows
from taut.core.tensors import NUMBERS, describe, is_cache
from taut.errors import CallError

KINDS = ("logits", "probabilities", "sigmoid", "values")

BESIDE = ("hidden_states", "attentions", "key_values", "loss", "router_logits", "encoder_last_hidden_state", "mems")
"""Ends of the names of what models give beside their answer."""

BELOW = ("hidden_state", "pooler_output", "_embeds")
"""Ends of the names of what is no answer where logits are."""

DEPTH = 4

Output = str | int | Callable[[Any], Any]
"""How an output is to be read: a kind, a part, "part:kind", or a function that picks the part."""


@dataclass(frozen=True)
class Wish:
    """How the user wants an output read.

    Attributes:
        part: name, number or path of what counts; a function that picks it; None: all that is an answer.
        kind: "auto", or one of KINDS. soft: whether the part need not be there, since its name is that of a kind.
    """

    part: str | int | Callable[[Any], Any] | None = None
    kind: str = "auto"
    soft: bool = False

    @classmethod
    def of(cls, output: Output) -> Wish:
        """From what was given as `output=`.

        Raises:
            CallError: it is none of the forms.
        """
        if callable(output) or (isinstance(output, int) and not isinstance(output, bool)):
            return cls(output)
        if not isinstance(output, str) or not output:
            raise CallError(f"The 'output' must be {FORMS}. Got {output!r} instead.")
        if output == "auto":
            return cls()
        if output in KINDS:
            return cls(output, output, soft=True)
        part, _, kind = output.rpartition(":")
        if not part:
            return cls(output)
        if kind not in (*KINDS, "auto"):
            raise CallError(f"Behind the colon of 'output' must be one of {', '.join(KINDS)}. Got '{kind}' instead.")
        return cls(part, kind)


FORMS = f"one of auto, {', '.join(KINDS)}, a part of the output, 'part:kind', or a function that picks the part"


@dataclass(frozen=True)
class Answers:
    """The tensors of one output that count.

    Attributes:
        tensors: in floating point, whole.
        names: of each, "" where it has none.
        real: of each, which of its positions are real; None where all are.
        items: entries of the output, where it is a list or tuple.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    real: tuple[Tensor | None, ...]
    items: int | None = None


def answers_of(example: Example, output: Any, inputs: Any = None) -> Answers:
    """What of an output counts.

    Args:
        example: how the model is called, and what is wished of outputs.
        output: of the model.
        inputs: that it was given; None: no position is padding.

    Raises:
        CallError: the output has no such part.
    """
    wish = example.output or Wish()
    held = [(name, t) for name, t in _chosen(output, wish, bool(example.answers)) if t.is_floating_point()]
    masks = {} if inputs is None else real_positions(example, inputs)
    real = tuple(_real(example, masks, t, number) for number, (_, t) in enumerate(held))
    items = len(output) if isinstance(output, list | tuple) and wish.part is None else None
    return Answers(tuple(t for _, t in held), tuple(name for name, _ in held), real, items)


def counted(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an output that are its answer, with their names: no caches, no losses, no inner states."""
    return _chosen(output, Wish(), losses=False)


def _chosen(output: Any, wish: Wish, losses: bool) -> list[tuple[str, Tensor]]:
    """The tensors that count; `losses`: the model is given labels, so that single numbers are its loss."""
    if wish.part is not None and not (wish.soft and not _has(output, str(wish.part))):
        part = _part(output, wish.part)
        return [(str(wish.part) if isinstance(wish.part, str) else name, t) for name, t in _named(part)]
    held = [(name, t) for name, t in _named(output) if not name.endswith(BESIDE)]
    if any("logits" in name for name, _ in held):
        held = [(name, t) for name, t in held if not name.endswith(BELOW)]
    if losses and any(t.ndim for _, t in held):
        held = [(name, t) for name, t in held if t.ndim]
    return held or list(_named(output))


def _named(value: Any, name: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest in order, each under the name of the entry that holds it; caches are left out."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, item in _entries(value, name, depth):
        yield from _named(item, key, depth if isinstance(value, Mapping | list | tuple) else depth - 1)


def _entries(value: Any, name: str, depth: int) -> Iterable[tuple[str, Any]]:
    """What stands in a value, with the names of it; what has none takes that of the whole."""
    if value is None or isinstance(value, (str, type, nn.Module, *NUMBERS)) or is_cache(value):
        return ()
    named = by_name(value)
    if named is not None:
        return [(str(key), item) for key, item in named.items()]
    if isinstance(value, list | tuple):
        beside = [item for item in value if not _is_legacy_cache(item)]
        return [(name, item) for item in beside or value]
    if not pytree.tree_structure(value).is_leaf():
        return [(name, item) for item in pytree.tree_leaves(value)]
    return attributes_of(value).items() if depth else ()


CACHE_AXES = 4


def _is_legacy_cache(value: Any) -> bool:
    """Whether an entry holds keys and values of every layer: pairs, or fours, of (batch, head, position, feature)."""
    return isinstance(value, tuple) and bool(value) and all(_is_pair(item) for item in value)


def _is_pair(value: Any) -> bool:
    full = isinstance(value, tuple) and len(value) in {2, 4}
    return full and all(isinstance(t, Tensor) and t.ndim == CACHE_AXES for t in value)


def _has(output: Any, name: str) -> bool:
    return name in output if isinstance(output, Mapping) else hasattr(output, name) and not isinstance(output, Tensor)


def _part(output: Any, part: str | int | Callable[[Any], Any]) -> Any:
    if callable(part):
        try:
            chosen = part(output)
        except Exception as error:
            remedy = ". It gets one argument, the output" if isinstance(error, TypeError) else ""
            raise CallError(f"The function given as 'output' raised {type(error).__name__}: {error}{remedy}") from error
        if not any(t.is_floating_point() for _, t in _named(chosen)):
            raise CallError(
                "The function given as 'output' must pick a part that holds tensors in floating point. "
                f"Got {describe(chosen)} instead, of the output {describe(output)}."
            )
        return chosen
    value = output
    for step in str(part).split("."):
        try:
            value = _entry(value, step)
        except (KeyError, IndexError, AttributeError, TypeError):
            raise CallError(
                f"The 'output' must be {FORMS}. Got '{part}' instead, and the output has no such part{_known(value)}."
            ) from None
    return value


def _entry(value: Any, step: str) -> Any:
    if isinstance(value, Mapping) and step in value:
        return value[step]
    if step.lstrip("-").isdigit():
        return list(value.values())[int(step)] if isinstance(value, Mapping) else _listed(value)[int(step)]
    if isinstance(value, Tensor):
        raise KeyError(step)
    return getattr(value, step)


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    raise TypeError


def _known(value: Any) -> str:
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f": it is a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return ": it is one tensor"
    names = list(value) if isinstance(value, Mapping) else list(getattr(value, "_fields", attributes_of(value)))
    return f": it has {', '.join(map(str, names))}" if names else ""


def _real(example: Example, masks: Mapping[str, Tensor], t: Tensor, number: int) -> Tensor | None:
    """Which positions of an output are real, in the shape of all its axes but that of the channels."""
    for middle, sizes in enumerate(without_channels(t) if masks else ()):
        rows = real_rows(example, masks, sizes, output_name(number, middle))
        if rows is not None:
            return rows.reshape(sizes).to(t.device)
    return None


def without_channels(t: Tensor) -> list[tuple[int, ...]]:
    """The sizes of an output's positions: with its channels on the last axis, and on axis 1."""
    both = [tuple(t.shape[:-1]), (t.shape[0], *t.shape[2:])] if t.ndim > 1 else []
    return [sizes for sizes in both if len(sizes) > 1 or len(t) > 1]
