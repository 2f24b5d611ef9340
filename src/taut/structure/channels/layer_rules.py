"""What each kind of layer does to labelled channels: which it gives, which it reads, which pass through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from taut.nn import GroupedLinear, Rebuilt, Recurrent, Reorder, mask_of
from taut.structure.channels.labels import Labels, along, compact, varying
from taut.structure.patches import CONVOLUTIONS
from taut.structure.support import refusal

OPAQUE = (
    nn.RNNBase,
    nn.RNNCellBase,
    Recurrent,
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.EmbeddingBag,
    _ConvTransposeNd,
    Rebuilt,
    GroupedLinear,
)
"""Layers whose own channels stay, and those that they read; of transposed convolutions only what is not narrowable."""

BETWEEN: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
"""Layers that hold values per channel, between those that mix channels."""

NARROW: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *CONVOLUTIONS,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    *BETWEEN,
    nn.Embedding,
)
"""Layers that can be made narrower."""

OWN = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
"""Tensors that these layers have by themselves."""

APART = "'{name}' computes across the axis on which they lie"
TOGETHER = "they can only go all at once"


@dataclass(frozen=True)
class Sides:
    """Where a layer's rule notes what it found.

    Attributes:
        labels: of all tensors. known: side -> class of every index. name: of the layer.
    """

    labels: Labels
    known: dict[tuple[str, Any], Tensor]
    name: str

    def note(self, end: str, atoms: Tensor) -> Tensor:
        """The classes of a side; those that earlier calls found become one with them."""
        before = self.known.setdefault((self.name, end), atoms)
        if before is not atoms:
            self.labels.atoms.unite(before, atoms)
        return before

    def given(self, count: int) -> Tensor:
        """The channels that the layer gives: its own, the same at every call."""
        found = self.known.get((self.name, "out"))
        return self.note("out", self.labels.atoms.fresh(count)) if found is None else found

    def stay(self, x: Tensor, reason: str) -> None:
        """What arrives stays; so does what arrives at other calls."""
        self.labels.pin(x, reason)

    def arriving(self, x: Tensor, axis: int) -> Tensor | None:
        """The channel of every index of the axis that the layer reads; None where these are no channels.

        Channels on other axes than that one stay: they pass the layer untouched, but it gives new ones.
        """
        label = self.labels.of(x)
        if label is None:
            self.fixed()
            return None
        axes = varying(label)
        if axis % x.ndim not in axes and (axes or (label.shape[axis] > 1 and self.labels.tying)):
            self.labels.atoms.pin(compact(label), APART.format(name=self.name) if axes else TOGETHER)
            self.fixed()
            return None
        return along(label, axis % x.ndim, self.labels)

    def fixed(self) -> None:
        """One call reads what has a fixed width: so must all calls."""
        for end in ("in", "through"):
            found = self.known.get((self.name, end))
            if found is not None:
                self.labels.atoms.pin(found, f"'{self.name}' also reads an input of fixed width")
        self.known.setdefault((self.name, "fixed"), torch.zeros(0, dtype=torch.int64))

    def read(self, end: str, atoms: Tensor) -> Tensor:
        """Note columns; where another call read something of fixed width they stay."""
        if (self.name, "fixed") in self.known:
            self.labels.atoms.pin(atoms, f"'{self.name}' also reads an input of fixed width")
        return self.note(end, atoms)


def narrowable(module: nn.Module) -> bool:
    """Whether a layer is one that the rules know, computes as its kind does, and holds its own parameters alone."""
    # what else hangs on a layer may be as wide as its channels
    return {*module._parameters, *module._buffers} <= OWN and computes_as_its_kind(module)


def computes_as_its_kind(module: nn.Module) -> bool:
    """Whether a layer is one that the rules know, with parameters of its own."""
    if isinstance(module, Reorder):
        return True
    if isinstance(module, GroupedLinear):
        return False
    if not isinstance(module, NARROW) or parametrize.is_parametrized(module) or mask_of(module) is not None:
        return False
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return refusal(module) is None
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
    plain = type(module).forward is vars(kind).get("forward", getattr(kind, "forward", None)) and "forward" not in vars(
        module
    )
    return plain and all(isinstance(p, Tensor) for p in module._parameters.values() if p is not None)


def gives_its_own(module: nn.Module) -> bool:
    """Whether a layer gives channels of its own; norms and slopes pass on those that arrive."""
    return not isinstance(module, BETWEEN)


def passes(module: nn.Module, sides: Sides, x: Tensor, output: Tensor) -> None:
    """Note what a layer reads from x, and label what it gives."""
    rule = next(rule for kinds, rule in RULES if isinstance(module, kinds))
    rule(module, sides, x, output)


def _linear(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    del module
    columns = sides.arriving(x, x.ndim - 1)
    if columns is not None:
        sides.read("in", columns)
    sides.labels.put(output, sides.given(output.shape[-1]).expand(output.shape))


def _convolution(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    axis = x.ndim - len(module.kernel_size) - 1
    columns = sides.arriving(x, axis)
    transposed = isinstance(module, _ConvTransposeNd)
    alone = module.groups > 1 and module.groups == module.in_channels
    if alone and (not transposed or module.out_channels == module.in_channels):
        return _depthwise(module, sides, columns, output, axis)
    if transposed and module.groups > 1:
        sides.stay(x, f"'{sides.name}' is a grouped transposed convolution, which is not made narrower")
        return sides.labels.put(output, None)
    rows = sides.given(output.shape[axis])
    if module.groups > 1:
        rows = _tied(sides, rows, module.groups)
        columns = None if columns is None else _tied(sides, columns, module.groups)
    if columns is not None:
        sides.read("in", columns)
    return sides.labels.put(output, _spread(rows, axis, output))


def _depthwise(module: Any, sides: Sides, columns: Tensor | None, output: Tensor, axis: int) -> None:
    """Every channel on its own: rows are the channels that arrive."""
    if columns is None:
        return sides.labels.put(output, None)
    rows = columns.repeat_interleave(module.out_channels // module.groups)
    sides.read("through", rows)
    return sides.labels.put(output, _spread(rows, axis, output))


def _tied(sides: Sides, atoms: Tensor, groups: int) -> Tensor:
    """The i-th channels of all groups go together: the groups stay equally wide."""
    table = atoms.reshape(groups, -1)
    sides.labels.tie(table, table[:1].expand_as(table))
    return sides.labels.atoms.roots(atoms)


def _per_channel(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    """Values per channel on axis 1; on the first of an unbatched input."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return sides.labels.put(output, sides.labels.of(x))
    columns = None
    axis = x.ndim - _sample_axes(module) if isinstance(module, _InstanceNorm) else 1
    if x.ndim > 1:
        columns = sides.arriving(x, axis)
    else:
        sides.stay(x, APART.format(name=sides.name))
        sides.fixed()
    if columns is None:
        return sides.labels.put(output, None)
    if isinstance(module, nn.GroupNorm) and 1 < module.num_groups < module.num_channels:
        columns = _tied(sides, columns, module.num_groups)
    sides.read("through", columns)
    return sides.labels.put(output, _spread(columns, axis, output))


def _sample_axes(norm: Any) -> int:
    """Axes of a single sample, as an instance norm takes it."""
    return int(norm._get_no_batch_dim())


def _layer_norm(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    """Values per channel on the last axes."""
    label = sides.labels.of(x)
    if label is None:
        sides.fixed()
        return sides.labels.put(output, None)
    inner = [axis for axis in varying(label) if axis >= x.ndim - len(module.normalized_shape)]
    if not inner:
        sides.fixed()
        return sides.labels.put(output, label)
    if len(module.normalized_shape) > 1:
        sides.stay(x, f"'{sides.name}' normalizes several axes at once")
        return sides.labels.put(output, None)
    columns = sides.arriving(x, x.ndim - 1)
    if columns is None:
        return sides.labels.put(output, None)
    sides.read("through", columns)
    return sides.labels.put(output, columns.expand(output.shape))


def _embedding(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    del module, x
    sides.labels.put(output, sides.given(output.shape[-1]).expand(output.shape))


def _reorder(module: Any, sides: Sides, x: Tensor, output: Tensor) -> None:
    """New channels, which the layers around may take over in their order: see `reordering`."""
    axis = x.ndim - module.axes - 1
    columns = sides.arriving(x, axis)
    if columns is not None:
        sides.read("in", columns)
    sides.labels.put(output, _spread(sides.given(len(module.order)), axis, output))


def _spread(atoms: Tensor, axis: int, output: Tensor) -> Tensor:
    return atoms.reshape(-1, *[1] * (output.ndim - axis - 1)).expand(output.shape)


Rule = Callable[[Any, Sides, Tensor, Tensor], None]

RULES: tuple[tuple[Any, Rule], ...] = (
    (nn.Linear, _linear),
    ((*CONVOLUTIONS, _ConvTransposeNd), _convolution),
    ((_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.PReLU), _per_channel),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.Embedding, _embedding),
    (Reorder, _reorder),
)
