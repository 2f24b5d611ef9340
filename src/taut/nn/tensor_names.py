"""What torch's names for functions and attributes of a tensor ask of it: its kind, its values, or to write to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ASKED = frozenset(
    "dtype device layout requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested "  # noqa: SIM905
    "is_floating_point is_complex element_size itemsize new_zeros new_ones new_empty new_full new_tensor".split()
)
"""What is the same for every tensor of this dtype, on this device."""

LIKE = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like".split())  # noqa: SIM905
"""Functions that take a shape, a dtype and a device from a tensor, and no values."""

KINDS = frozenset("to type_as is_floating_point is_complex".split())  # noqa: SIM905
"""Functions that take a dtype and a device from it."""

OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs getitem setitem iter bool float int "  # noqa: SIM905
    "lt le gt ge invert floordiv rfloordiv mod rmod and or xor iadd isub imul itruediv".split()
)
"""Operators of Python, which it looks for on the type."""

HELD = frozenset(
    "backward data data_ptr grad grad_fn register_hook register_post_accumulate_grad_hook retain_grad "  # noqa: SIM905
    "storage untyped_storage".split()
)
"""torch's names for what only a tensor that is held somewhere has."""

SET = frozenset({"data", "grad", "requires_grad"})
"""Attributes of a tensor that code sets."""

INPLACE = frozenset(
    f"__{name}__"
    for name in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split()  # noqa: SIM905
)
"""Operators that write into what stands on their left."""


def writes(name: str) -> bool:
    """Whether torch's function or method `name` writes into its tensor."""
    return name in INPLACE or (name.endswith("_") and not name.endswith("__"))


ALIASES = frozenset(
    "chunk detach diagonal expand expand_as flatten mT movedim moveaxis narrow permute ravel reshape reshape_as "  # noqa: SIM905
    "select split split_with_sizes squeeze swapaxes swapdims tensor_split transpose unbind unflatten unsqueeze view "
    "view_as".split()
)
"""torch's names for what shares its memory with the tensor: what is written there is written to the tensor."""


def is_range(index: Any) -> bool:
    """Whether what an index gives shares its memory with the tensor."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or type(item) in {int, slice} for item in items)


def written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of torch's function `name` writes into."""
    into = [kwargs.get("out")]
    if writes(name):
        into += args[:1] if args else [kwargs.get(key) for key in ("input", "self", "tensor")]
    return [part for item in into for part in (item if isinstance(item, list | tuple) else [item]) if part is not None]
