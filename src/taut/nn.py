"""The few modules that are not plain torch.nn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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
        The model; layers without a zero are left alone.
    """
    wanted = None if names is None else set(names)
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
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def masked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight a `Mask` holds, by name."""
    return {name: module for name, module in model.named_modules() if _mask(module) is not None}


def _mask(module: nn.Module) -> Mask | None:
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
