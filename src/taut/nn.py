"""The few modules that are not plain torch.nn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from taut.errors import CallError


class Reorder(nn.Module):
    """The channels in another order: output channel i is input channel `order[i]`.

    Stands before or behind layers whose channels are clustered, until `taut.apply` has folded it into the neighbours;
    it stays where that is not exact, as at a residual connection.

    Args:
        order: (C,), a permutation.
        axes: spatial axes behind the channels.
    """

    order: Tensor

    def __init__(self, order: Tensor, axes: int) -> None:
        """See the class."""
        super().__init__()
        self.axes = axes
        self.register_buffer("order", order.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C, *axes), with or without a batch."""
        return x.index_select(x.ndim - self.axes - 1, self.order)

    def undone(self, values: Tensor) -> Tensor:
        """Values (C, ...) per output channel, in the order of the input channels."""
        return torch.empty_like(values).index_copy_(0, self.order.long().to(values.device), values)

    def to_plain(self) -> nn.Module:
        """The same as a 1 x 1 convolution with a permutation matrix: plain, and far more work."""
        size = len(self.order)
        built = getattr(nn, f"Conv{self.axes}d")(size, size, 1, bias=False)
        with torch.no_grad():
            built.weight.copy_(torch.eye(size)[self.order.long()].reshape(built.weight.shape))
        plain: nn.Module = built.to(self.order.device)
        return plain

    def extra_repr(self) -> str:
        """Channels."""
        return f"{len(self.order)} channels"


class Pick(nn.Module):
    """Some of the channels: output channel i is input channel `index[i]`.

    Stands before a layer of which some inputs are read by nobody, where what gives them cannot be made narrower: the
    input of the network, a concatenation, a sum that others read too.

    Args:
        index: (k,), kept channels.
        axes: spatial axes behind the channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, axes: int) -> None:
        """See the class."""
        super().__init__()
        self.axes = axes
        self.register_buffer("index", index.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C, *axes), with or without a batch."""
        return x.index_select(x.ndim - self.axes - 1, self.index)

    def to_plain(self, channels: int) -> nn.Module:
        """The same as a 1 x 1 convolution, or a Linear, with a matrix of zeros and ones: plain, and far more work.

        Args:
            channels: of the input, C.
        """
        kept = len(self.index)
        conv = getattr(nn, f"Conv{self.axes}d", None)
        built = nn.Linear(channels, kept, bias=False) if conv is None else conv(channels, kept, 1, bias=False)
        with torch.no_grad():
            built.weight.copy_(torch.eye(channels)[self.index.long().cpu()].reshape(built.weight.shape))
        plain: nn.Module = built.to(self.index.device)
        return plain

    def extra_repr(self) -> str:
        """Channels."""
        return f"{len(self.index)} channels"


class Mask(nn.Module):
    """A parametrization that keeps pruned weights at zero, whatever an optimizer does to them.

    Their gradient is zero; momentum and weight decay do not bring them back.

    Args:
        keep: bool, True where a weight stays; shaped as the weight.
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        """See the class."""
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where it is pruned."""
        return torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def hold_zeros(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Hold the weights of `model` that are zero now at zero, in place, until `bake`; for training loops of your own.

    Args:
        model: a pruned model.
        names: of modules; None: every Linear and convolution.

    Returns:
        The model; layers without a zero, and those whose weight another parametrization computes, are left alone.

    Raises:
        CallError: a name is no module's.
    """
    wanted = None if names is None else {names} if isinstance(names, str) else set(names)
    unknown = sorted((wanted or set()) - {name for name, _ in model.named_modules()})
    if unknown:
        raise CallError(f"The model has no module '{unknown[0]}' whose zeros could be held.")
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2 or (name not in wanted if wanted is not None else not _mixes(module)):
            continue
        keep = weight.detach() != 0
        if not bool(keep.all()):
            parametrize.register_parametrization(module, "weight", Mask(keep), unsafe=True)
    return model


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def bake(model: nn.Module) -> nn.Module:
    """Take the masks of `hold_zeros` off in place: plain layers again, with zeros in their weights."""
    for module in masked(model).values():
        _bake(module)
    return model


def _bake(module: nn.Module) -> None:
    """The weight with its zeros in the place, and of the identity, of the parameter behind the mask.

    torch's own removal deletes the computed weight from the class, which a copy of the module shares with it.
    """
    held: Any = module.parametrizations
    if len(held) > 1:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return
    weight = held["weight"].original
    weight.data = module.weight.detach()  # type: ignore[operator]
    others = dict(module._parameters)
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    module._parameters.clear()
    for name, parameter in {"weight": weight, **others}.items():
        module.register_parameter(name, parameter)


def masked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight a `Mask` holds, by name."""
    return {name: module for name, module in model.named_modules() if mask_of(module) is not None}


def mask_of(module: nn.Module) -> Mask | None:
    """The mask that holds the weight of this very module, if there is one."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    held = list(module.parametrizations["weight"])  # type: ignore[index]
    return held[0] if len(held) == 1 and isinstance(held[0], Mask) else None


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model will have after `bake`."""
    state = model.state_dict()
    for name, module in masked(model).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.weight.")]:
            del state[key]
        state[f"{prefix}weight"] = module.weight.detach()  # type: ignore[operator]
    return state


def fill_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `plain_state` gave into a model that may hold masks; they stay."""
    given = dict(state)
    for name in masked(model):
        prefix = f"{name}." if name else ""
        held = f"{prefix}parametrizations.weight"
        given[f"{held}.original"] = given.pop(f"{prefix}weight")
        given[f"{held}.0.keep"] = model.get_buffer(f"{held}.0.keep")
    model.load_state_dict(given)


class Basis(nn.Module):
    """A basis of channels that several layers share: n channels gathered into k, or spread from k.

    Layers hold the very same `weight`, so that it is counted, stored and trained once.

    Args:
        weight: (n, k).
        axes: spatial axes behind the channels; 0 behind or before a Linear.
        spread: from k to n, else from n to k.
        inner: features that every channel has in a row, as behind a flatten; for gathering.
        bias: (n,) or (k,), added to what is given.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        axes: int,
        *,
        spread: bool = False,
        inner: int = 1,
        bias: nn.Parameter | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.axes, self.spread, self.inner = axes, spread, inner
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., channels, *axes), with or without a batch."""
        if self.inner > 1:
            channels = x.ndim - self.axes - 1
            rows = torch.unflatten(x, channels, (len(self.weight), self.inner)).movedim(channels, -1)
            gathered: Tensor = (rows @ self.weight).movedim(-1, channels).flatten(channels, channels + 1)
            return gathered
        matrix = self.weight if self.spread else self.weight.mT
        if not self.axes:
            return functional.linear(x, matrix, self.bias)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.axes - 1]
        return convolve(x, matrix.reshape(*matrix.shape, *[1] * self.axes), self.bias)

    def to_plain(self) -> nn.Module:
        """The same as a Linear or a 1 x 1 convolution with a weight of its own; a block matrix behind a flatten."""
        matrix = self.weight.detach() if self.spread else self.weight.detach().mT
        if self.inner > 1:
            matrix = torch.kron(matrix.contiguous(), torch.eye(self.inner).to(matrix))
        outputs, inputs = matrix.shape
        bias = self.bias is not None
        kinds: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        size = (inputs, outputs, 1) if self.axes else (inputs, outputs)
        built: nn.Module = kinds[self.axes](*size, bias=bias, device="meta").to_empty(device=matrix.device)
        matrix = matrix.reshape(outputs, inputs, *[1] * self.axes)
        built.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format))
        if self.bias is not None:
            built.bias = nn.Parameter(self.bias.detach().clone())
        return built.train(self.training)

    def extra_repr(self) -> str:
        """Channels in and out."""
        inputs, outputs = self.weight.shape[:: -1 if self.spread else 1]
        inner = f" x {self.inner}" if self.inner > 1 else ""
        return (
            f"{'spread' if self.spread else 'gather'} {inputs}{inner} -> {outputs}{inner}, bias={self.bias is not None}"
        )


class LowRankSparse(nn.Module):
    """Two thin layers beside a few weights of the dense one: y = B (A x) + R x, with R stored by its places.

    R is made dense whenever it is multiplied: this saves bytes, not time.

    Args:
        first: of the dense layer's kernel, stride, padding and dilation, to r channels.
        second: a Linear or a 1 x 1 convolution to the outputs, with the bias.
        values: (nnz,), the weights of R that are not zero.
        places: (nnz,), where they stand in the flattened weight.
    """

    places: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, values: nn.Parameter, places: Tensor) -> None:
        """See the class."""
        super().__init__()
        self.low = nn.Sequential(first, second)
        self.values = values
        self.register_buffer("places", places.to(torch.int32))

    def residual(self) -> Tensor:
        """R, shaped as the dense weight."""
        first, second = self._parts()
        shape = (len(second.weight), *first.weight.shape[1:])
        flat = self.values.new_zeros(math.prod(shape))
        return flat.scatter(0, self.places.long(), self.values).reshape(shape)

    def _parts(self) -> tuple[Any, Any]:
        return self.low[0], self.low[1]

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer's."""
        low: Tensor = self.low(x)
        return low + self._times(x, self.residual())

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        first, _ = self._parts()
        if isinstance(first, nn.Linear):
            return functional.linear(x, weight)
        given: Tensor = first._conv_forward(x, weight, None)  # all padding modes as in the layer
        return given

    def to_plain(self) -> nn.Module:
        """One dense layer."""
        first, second = self._parts()
        dense: Any = copy.deepcopy(first)
        R = self.residual().detach()
        product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
        dense.weight = nn.Parameter(product.reshape(R.shape) + R)
        dense.bias = None if second.bias is None else nn.Parameter(second.bias.detach().clone())
        if isinstance(dense, nn.Linear):
            dense.out_features = len(R)
        else:
            dense.out_channels = len(R)
        plain: nn.Module = dense
        return plain

    def extra_repr(self) -> str:
        """Weights beside the thin layers."""
        return f"{len(self.values)} weights besides"
