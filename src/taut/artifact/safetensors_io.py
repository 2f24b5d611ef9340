"""Tensors between a safetensors file and a model: layouts in memory, ties, dtypes and devices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from taut.core.files import LIMIT, guarded, one_line, size_of
from taut.core.text import shape
from taut.errors import ArtifactError, ModelError
from taut.measure.storage import file_bytes, refuse_lazy


def layouts(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The order of dimensions in memory, outermost first, of the tensors that do not lie in their own order.

    Kernels choose their arithmetic by the layout (channels_last), so without it outputs are not equal bit by bit.
    """
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        order = tuple(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis)))
        if name not in stored or order == tuple(range(tensor.ndim)):
            continue
        if _laid_out(tensor, order, "meta").stride() == tensor.stride():  # else it overlaps or has gaps
            found[name] = order
    return found


def _laid_out(tensor: Tensor, order: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Empty memory of the tensor's shape, its dimensions in the given order."""
    empty = torch.empty([tensor.shape[axis] for axis in order], dtype=tensor.dtype, device=device)
    return empty.permute([order.index(axis) for axis in range(tensor.ndim)])


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file.

    Raises:
        ModelError: a dtype that the format does not have.
    """
    file_bytes(tensors)  # names the tensor
    try:
        return save({name: tensor.cpu() for name, tensor in tensors.items()})
    except Exception as error:
        raise ModelError(f"The model cannot be stored: {type(error).__name__}: {one_line(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ArtifactError: it is not one, or its header claims more than the file holds.
    """
    size = size_of(path)
    with guarded(f"Cannot read '{path}'"), path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, LIMIT):
        raise ArtifactError(f"'{path}' is no safetensors file: a header of {header} bytes in a file of {size}.")
    try:
        return load_file(path)
    except Exception as error:
        raise ArtifactError(f"'{path}' is no safetensors file: {one_line(error)}.") from None


def fill(
    model: nn.Module, stored: Mapping[str, Tensor], ties: Mapping[str, str], orders: Mapping[str, tuple[int, ...]]
) -> None:
    """Give `model` the stored tensors: dtype and layout as saved, device and requires_grad as in the model, ties tied.

    Raises:
        ArtifactError: names or shapes differ (the first that does is named), or the model ties what is not tied.
    """
    for tied, name in ties.items():
        if tied in stored or name not in stored:
            raise ArtifactError(f"The tie of '{one_line(tied)}' to '{one_line(name)}' does not fit the tensors.")
    wanted = _wanted(model)
    _compare(wanted, stored, ties)
    made: dict[str, Tensor] = {}
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, like in wanted.items():
        source = ties.get(name, name)
        if source not in made:
            made[source] = nn.Parameter(_placed(source, stored[source], like, orders), requires_grad=False)
        state[name] = made[source] if isinstance(like, nn.Parameter) else made[source].detach()
    _assign(model, state)


def _wanted(model: nn.Module) -> dict[str, Tensor]:
    try:
        refuse_lazy(model.named_parameters())
        refuse_lazy(model.named_buffers())
    except ModelError as error:
        raise ArtifactError(f"The base does not fit the saved folder: {error}") from None
    wanted = model.state_dict(keep_vars=True)
    for name, value in wanted.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"The base does not fit the saved folder: its state '{name}' is not a tensor.")
    return dict(wanted)


def _compare(wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    def saved(name: str) -> str:
        return _size(stored.get(ties.get(name, name)))

    for name in [*wanted, *(name for name in (*stored, *ties) if name not in wanted)]:
        if _size(wanted.get(name)) != saved(name):
            raise ArtifactError(
                f"The base does not fit the saved folder: '{one_line(name)}' is {_size(wanted.get(name))} in the base "
                f"and {saved(name)} in the folder."
            )


def _size(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else shape(tensor.shape) or "a scalar"


def _placed(name: str, tensor: Tensor, like: Tensor, orders: Mapping[str, tuple[int, ...]]) -> Tensor:
    """A copy (the file is mapped, and may be replaced) on the device of `like`, laid out as it was."""
    order = orders.get(name, tuple(range(tensor.ndim)))
    if sorted(order) != list(range(tensor.ndim)):
        raise ArtifactError(f"The layout {order} of '{name}' is no order of {tensor.ndim} dimensions.")
    copy = _laid_out(tensor, order).copy_(tensor)
    return copy if like.is_meta else copy.to(like.device)


def _assign(model: nn.Module, state: OrderedDict[str, Tensor]) -> None:
    expected = dict(state)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except Exception as error:
        raise ArtifactError(f"The base does not fit the saved folder: {' '.join(str(error).split())[:300]}") from None
    for name, found in model.state_dict(keep_vars=True).items():
        if found is not expected[name] and not _same(found, expected[name]):
            raise ArtifactError(
                f"The base does not fit the saved folder: '{name}' does not take its own tensor, as if the base shared "
                "a layer that the saved model does not."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    bits = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
