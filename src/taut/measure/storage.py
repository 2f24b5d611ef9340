"""The tensors that a model is saved as, and the exact size of their file without writing it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from taut.errors import ModelError

DTYPES = {
    getattr(torch, torch_name): name
    for torch_name, name in (
        ("uint64", "U64"),
        ("int64", "I64"),
        ("float64", "F64"),
        ("complex64", "C64"),
        ("float32", "F32"),
        ("uint32", "U32"),
        ("int32", "I32"),
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        ("uint16", "U16"),
        ("int16", "I16"),
        ("float8_e5m2fnuz", "F8_E5M2FNUZ"),
        ("float8_e4m3fnuz", "F8_E4M3FNUZ"),
        ("float8_e8m0fnu", "F8_E8M0"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
        ("int8", "I8"),
        ("uint8", "U8"),
        ("bool", "BOOL"),
    )
    if hasattr(torch, torch_name)
}
"""What safetensors calls a dtype, in the order in which it lays tensors out in the file."""


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict reduced to what must be stored.

    Returns:
        The unique tensors, detached, contiguous and sharing no memory, each under the first name it has; and
        {tied name: name it is stored under} for the others.

    Raises:
        ModelError: a state entry is not a dense tensor (`get_extra_state`, quantized, sparse), or was never
            initialized (lazy modules).
    """
    refuse_lazy(model.named_parameters())
    refuse_lazy(model.named_buffers())
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        tensor = _dense(name, value)
        owner = first.setdefault(_identity(tensor), name)
        if owner != name:
            ties[name] = owner
            continue
        kept = tensor.detach().resolve_conj().resolve_neg().contiguous()
        shares = kept.untyped_storage().data_ptr() in storages and kept.numel() > 0
        stored[name] = kept.clone() if shares else kept
        storages.add(stored[name].untyped_storage().data_ptr())
    return stored, ties


def refuse_lazy(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that have no shape yet.

    Raises:
        ModelError: one of them is uninitialized.
    """
    for name, tensor in named:
        if is_lazy(tensor):
            raise ModelError(f"'{name}' is not initialized yet. Run the model once on the example input first.")


def _dense(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(
            f"The state '{name}' is a {type(value).__name__}, not a tensor: it cannot be stored without pickle. "
            "Keep it out of the state dict, or make it a buffer."
        )
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise ModelError(f"The state '{name}' is a {kind} tensor. Only dense tensors can be stored.")
    return value


def _identity(tensor: Tensor) -> object:
    """Equal for two tensors that are the same values in the same memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    view = (tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, view)


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The size in bytes of the file that `safetensors.torch.save_file` writes for these tensors.

    8 bytes of length + a JSON header padded to a multiple of 8 + the tensors end to end, widest dtype first.

    Raises:
        ModelError: a dtype that the format does not have.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    order = {dtype: place for place, dtype in enumerate(DTYPES)}
    for name, tensor in tensors.items():
        if tensor.dtype not in order:
            raise ModelError(f"'{name}' is {tensor.dtype}, which safetensors cannot store. Convert it first.")
    end = 0
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype], name)):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return 8 + math.ceil(len(text.encode()) / 8) * 8 + end
