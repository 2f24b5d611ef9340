"""Accumulating one layer's second moments while batches pass; memory is bounded by the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.core.example import TautControl
from taut.core.modes import generator
from taut.decompose.linalg import LARGE, add_gram, mirrored
from taut.decompose.outputs import LIMIT, OutputMoment, rows_for
from taut.decompose.shrinking import HeldOut, shrunk, shrunk_moment, shrunk_rows
from taut.decompose.weighting import WIDE, Weighting
from taut.errors import DataError
from taut.nn import GroupedLinear
from taut.structure.padding import Padding
from taut.structure.patches import (
    bias_of,
    choose,
    fan_in,
    gram,
    grouped_weight,
    groups_of,
    input_rows,
    output_rows,
    positions,
    row_budget,
    weight_of,
)
from taut.structure.sums import PIECE_BYTES, Kept, Moments, Rows, Sketch
from taut.types import Layer

EXACT_LIMIT = 8192
"""Fan-in up to which calibration holds the unfolded second moment itself (268 MB)."""

FULL_LIMIT = WIDE
"""Fan-in up to which the refit holds it: its rows are kept as well."""

SKETCH_ROWS = 1024
"""Rows of the sketch that replaces it in the refit of a matrix product of larger fan-in."""

SKETCH_BYTES = 1 << 28
"""Memory of the sketch that calibration makes beyond EXACT_LIMIT; else it has twice the largest rank worth asking."""

ROWS, UNFOLDED_ROWS = 32, 16
"""Sampled rows per input: a basis made from them loses 3 % more than the best at most. Of a convolution fewer do."""

FEW = 2
"""Inputs per row from which on the rows of a wide layer are held themselves, until there are more of them."""

ENOUGH = 16
"""Rows per input from which on a moment is taken as it is; of fewer, held-out rows put its energies right."""

HELD_ROWS, HELD_BYTES = 2048, 1 << 26
"""Held-out rows of a layer at most, where they take less memory than their moment."""

LAST = 8
"""Where no sample can be held out, one row in so many is, the last ones."""


def form_of(module: nn.Module, limit: int = FULL_LIMIT) -> str:
    """Which form of second moment a layer gets: "full" (up to `limit` inputs), "channel" or "sketch"."""
    if fan_in(module) <= limit:
        return "full"
    return "sketch" if fan_in(module) == weight_of(module).shape[1] else "channel"


def second_moment(module: nn.Module, rows: Tensor, form: str) -> Tensor:
    """Sum over rows (g, rows, k) of x x^T in the given form; for "channel" the mean over kernel offsets."""
    if form == "full":
        return gram(rows)
    flat = _by_offset(module, rows)
    return gram(flat) * (rows.shape[1] / flat.shape[1])


def _by_offset(module: nn.Module, rows: Tensor) -> Tensor:
    """Unfolded rows (g, n, c s) as rows (g, n s, c) of channels."""
    taps = rows.reshape(*rows.shape[:2], weight_of(module).shape[1], -1)
    return taps.transpose(2, 3).flatten(1, 2)


def sketched(rows: Tensor, size: int, random: torch.Generator) -> Tensor:
    """At most `size` random sign combinations of rows (g, n, k) with the same expected second moment."""
    n = rows.shape[1]
    if n <= size:
        return rows
    signs = torch.randint(0, 2, (size, n), generator=random).to(rows) * 2 - 1
    mixed: Tensor = (signs / size**0.5) @ rows
    return mixed


def sketch_size(outputs: int, inputs: int) -> int:
    """Rows of a sketch: twice the rank at which two layers are as large as the one, within SKETCH_BYTES."""
    return max(256, min(2 * outputs * inputs // (outputs + inputs), SKETCH_BYTES // (4 * inputs)))


class InputMoments:
    """Sums over the inputs of one layer, apart for the rows that are held out."""

    def __init__(self, module: nn.Module, whole: int, seed: int) -> None:
        """`whole` is about how many rows will pass."""
        self.module, self.form = module, form_of(module, EXACT_LIMIT)
        columns, groups = fan_in(module), groups_of(module)
        self.size = weight_of(module).shape[1] if self.form == "channel" else columns
        per_input = UNFOLDED_ROWS if columns > weight_of(module).shape[1] else ROWS
        budget = min(whole, max(per_input * min(columns, EXACT_LIMIT), 8192))
        budget = row_budget(columns, whole) if self.form == "channel" else budget
        self.share = budget / max(whole, 1)
        self.fitted: Moments | Rows | Sketch = Moments()
        if self.form == "sketch":
            self.fitted = Sketch(sketch_size(weight_of(module).shape[0] // groups, columns), generator(seed))
        elif self.form == "full" and columns > LARGE and FEW * budget < columns:
            self.fitted = Rows()
        most = min(HELD_ROWS, max(1, HELD_BYTES // (4 * columns * groups)))
        self.held: Moments | Kept = Moments() if self.form == "full" and columns <= most else Kept(most)
        self.held_share = self.share if self.form == "full" else min(1.0, max(self.share, 16 * most / max(whole, 1)))

    def add(self, rows: Tensor, weight: float, *, held: bool) -> None:
        """Add unfolded rows (g, n, k), each of which stands for `weight` positions; they may be changed."""
        if self.form != "channel":
            (self.held if held else self.fitted).add(rows, weight)
            if isinstance(self.fitted, Rows) and FEW * self.fitted.count > self.size:  # more than were to come
                self.fitted = self.fitted.summed()
            return
        if held:
            self.held.add(rows, weight)
        self.fitted.add(_by_offset(self.module, rows), weight * self.size / rows.shape[-1])

    def weighting(self, positions: float) -> Weighting:
        """The moment summed over that many positions; memory is handed over."""
        if not self.fitted.count:  # every batch that reached the layer was held out
            self._give_back()
        if not self.fitted.count:
            return Weighting()
        scale = positions / self.fitted.weight
        if not isinstance(self.fitted, Moments):
            rows = self.fitted.take().mul_(scale**0.5)
            return self._sketched(rows, positions) if self.form == "sketch" else self._full(rows, positions)
        if self.form == "channel":  # of every offset a row: there are enough
            return Weighting(channel=self.fitted.take().mul_(scale).float())
        if self.held.count and self.fitted.count >= ENOUGH * self.size:
            self._give_back()
            scale = positions / self.fitted.weight
        A = self.fitted.take().mul_(scale)
        if self.fitted.count < ENOUGH * self.size:
            A = self._shrunk(A, positions)
        return Weighting(full=A.float())

    def patches(self, energy: float) -> Tensor | None:
        """Held-out patches of a layer held by its channels, whose mean squared output is `energy`."""
        if self.form != "channel" or not isinstance(self.held, Kept) or not self.held.count:
            return None
        rows = self.held.take()
        own = float((rows @ grouped_weight(self.module).flatten(2).to(rows).mT).double().square().sum())
        return rows.mul_((energy / own) ** 0.5) if own > 0 else None

    def _give_back(self) -> None:
        """Held-out rows that are not needed count like the others."""
        if isinstance(self.held, Moments) and not isinstance(self.fitted, Sketch):
            own = self.fitted.summed() if isinstance(self.fitted, Rows) else self.fitted
            self.fitted = own.joined(self.held)
        elif isinstance(self.held, Kept) and self.held.count:
            share = self.held.weight / self.held.count
            self.fitted.add(self.held.take(weighed=False), share)
        self.held = Moments()

    def _shrunk(self, A: Tensor, positions: float) -> Tensor:
        total = A.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        if not self.held.count:
            return _blended(A, total, self.fitted.count)
        held = self._held(positions)
        return shrunk(A, held, self._total(total, held))

    def _sketched(self, rows: Tensor, positions: float) -> Weighting:
        if not self.held.count:
            return Weighting(sketch=rows)
        held = self._held(positions)
        rows, beside = shrunk_rows(rows, held, self._total(rows.flatten(1).double().square().sum(1), held))
        return Weighting(sketch=rows, beside=beside)

    def _full(self, rows: Tensor, positions: float) -> Weighting:
        """The moment of fewer rows than columns."""
        total = rows.flatten(1).double().square().sum(1)
        if not self.held.count:
            return Weighting(full=_blended(rows.mT @ rows, total, self.fitted.count).float())
        held = self._held(positions)
        return Weighting(full=shrunk_moment(rows, held, self._total(total, held)))

    def _held(self, positions: float) -> HeldOut:
        scale = positions / self.held.weight
        if isinstance(self.held, Kept):
            return HeldOut(rows=self.held.take().mul_(scale**0.5))
        return HeldOut(moment=self.held.take().mul_(scale))

    def _total(self, fitted: Tensor, held: HeldOut) -> Tensor:
        """The trace over all rows, (g,)."""
        share = self.held.weight / (self.held.weight + self.fitted.weight)
        return (1 - share) * fitted + share * held.trace()


def _blended(A: Tensor, total: Tensor, rows: int) -> Tensor:
    """A few rows without any that could judge them: the fewer, the more like rows of all directions alike."""
    k = A.shape[-1]
    alike = k / (k + rows)
    A.mul_(1 - alike).diagonal(dim1=-2, dim2=-1).add_((alike * total / k)[:, None].to(A))
    return A


class OutputSums:
    """Sums over the output gradients of one layer."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        """Nothing seen."""
        self.outputs = weight_of(module).shape[0] // groups_of(module)
        self.sketch = Sketch(rows_for(self.outputs), generator(seed)) if self.outputs > LIMIT else None
        self.products: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add gradients (g, n, o)."""
        if self.sketch is None:
            if self.products is None:
                self.products = rows.new_zeros(len(rows), self.outputs, self.outputs)
            add_gram(self.products, rows)
            return
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        for piece in torch.split(rows, max(1, PIECE_BYTES // (4 * self.outputs)), 1):
            self.sketch.add(piece)

    def moment(self, samples: int) -> OutputMoment | None:
        """As mean over samples."""
        if self.products is not None:
            return OutputMoment(mirrored(self.products).div_(samples).float())
        if self.sketch is None or self.squares is None:
            return None
        rows = self.sketch.take()
        sizes = rows.square().sum(1).double()
        rows *= torch.where(sizes > 0, self.squares / sizes.clamp_min(1e-300), 0.0).sqrt()[:, None].to(rows)
        return OutputMoment(rows=rows.div_(samples**0.5).float())


class LayerMoments:
    """Running sums of one layer over a calibration pass."""

    def __init__(self, module: nn.Module, layer: Layer, samples: int, seed: int, real: float = 1.0) -> None:
        """Sampled positions are spread over the whole pass.

        Args:
            module: the layer.
            layer: as it was traced.
            samples: of the pass.
            seed: of what is drawn.
            real: share of the positions that are no padding.
        """
        self.module, self.name, self.samples, self.seed = module, layer.name, samples, 1_000_003 * seed
        self.traced = layer.positions / layer.batch
        self.inputs = InputMoments(module, round(samples * self.traced * real), seed)
        self.gradients: OutputSums | None = OutputSums(module, seed)
        self.taylor: Tensor | None = None
        self.outputs: list[Tensor] = []
        self.called = self.positions = 0
        self.met: Tensor | None = None
        """Of a stack of matrices how many rows each got that are not zero, which is what a router leaves of others."""
        self.moved = torch.zeros(groups_of(module), dtype=torch.int64)
        """How many of their outputs have a gradient that is not zero."""
        self.energy = 0.0
        self.padding: Padding | None = None
        self.held: bool | None = False
        """Whether the samples that pass are held out; None: no sample can be, so that some of their rows are."""

    def add_input(self, x: Tensor, output: Tensor) -> None:
        """Add x x^T of sampled output positions, scaled to all of them."""
        if not bool(torch.isfinite(x).all()):
            raise ObservationError(self.name)
        real = None if self.padding is None else self.padding.rows(self.name, self.module, output)
        total = positions(self.module, output) if real is None else len(real)
        if not total:  # an expert that no token reaches
            return
        self.positions += total
        if isinstance(self.module, GroupedLinear):
            met = _not_zero(self.module, x, real)
            self.met = met if self.met is None else self.met + met
        if self.inputs.form == "channel":
            self.energy += energy_of(self.module, output, real)
        share = self.inputs.held_share if self.held else self.inputs.share
        index = choose(total, max(1, round(share * total)), self.seed + self.called)
        index = index if real is None else real[index]
        self.called += 1
        weight = total / len(index)
        parts = [(index, bool(self.held))]
        if self.held is None and len(index) >= LAST:
            last = len(index) // LAST
            parts = [(index[:-last], False), (index[-last:], True)]
        size = max(1, PIECE_BYTES // (4 * fan_in(self.module) * groups_of(self.module)))
        with torch.autocast(x.device.type, enabled=False):  # sums in half lose too much
            for places, held in parts:
                for piece in torch.split(places, size):
                    self.inputs.add(input_rows(self.module, x, output, piece), weight, held=held)

    def add_gradient(self, grad: Tensor, output: Tensor) -> None:
        """Add g g^T over all positions of a batch; a layer with a gradient that is not finite goes without."""
        if not grad.numel():
            return  # an expert that no token of this batch reaches
        if self.gradients is None or not bool(torch.isfinite(grad).all()):
            self.gradients, self.taylor = None, None
            return
        real = None if self.padding is None else self.padding.rows(self.name, self.module, output)
        rise = _first_order(self.module, output.detach() * grad, real)
        self.taylor = rise if self.taylor is None else self.taylor.add_(rise)
        if isinstance(self.module, GroupedLinear):
            self.moved = self.moved + _not_zero(self.module, grad, real).to(self.moved)
        with torch.autocast(grad.device.type, enabled=False):
            self.gradients.add(output_rows(self.module, grad, real))

    def take_outputs(self) -> list[Tensor]:
        """The outputs captured since the last call."""
        taken, self.outputs = self.outputs, []
        return taken

    def patches(self) -> Tensor | None:
        """See `LayerStatistics.held`."""
        return self.inputs.patches(self.energy / self.samples)

    def finish(self) -> tuple[Weighting, OutputMoment | None, float, Tensor | None]:
        """Weighting, output second moment, positions per sample and first-order rises, as means over samples."""
        per_sample = self.positions / self.samples or self.traced
        weighting = self.inputs.weighting(per_sample)
        taylor = None if self.taylor is None else (self.taylor / self.samples).float()
        B = None if self.gradients is None else self.gradients.moment(self.samples)
        return weighting, B, per_sample, taylor


def _not_zero(stack: GroupedLinear, t: Tensor, real: Tensor | None) -> Tensor:
    """Of each of the groups of channels of (n, channels, positions), at how many positions it is not all zero."""
    t = t.detach()[None] if t.ndim == 2 else t.detach()
    some = (t != 0).reshape(len(t), stack.groups, -1, t.shape[-1]).any(2).movedim(1, 0).flatten(1)
    return (some if real is None else some[:, real.to(some.device)]).sum(1)


def energy_of(module: nn.Module, output: Tensor, real: Tensor | None = None) -> float:
    """Sum of squares of the output (n, o, ...) of a convolution without its bias, at all or at `real` positions."""
    flat = output.detach().movedim(-len(weight_of(module).shape[2:]) - 1, 0).flatten(1)
    flat = flat if real is None else flat[:, real.to(flat.device)]
    squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()
    bias = bias_of(module)
    if bias is not None:
        b = bias.detach().double()
        squares = squares - 2 * b * flat.sum(1, dtype=torch.float64) + flat.shape[1] * b.square()
    return float(squares.sum())


def _first_order(module: nn.Module, products: Tensor, real: Tensor | None = None) -> Tensor:
    """Sum over samples of |mean over all, or over `real`, positions of y dL/dy|, per output."""
    axes = 0 if isinstance(module, nn.Linear) else weight_of(module).ndim - 2
    flat = products.movedim(products.ndim - axes - 1, -1)
    flat = flat[None] if flat.ndim == axes + 1 else flat
    flat = flat.reshape(len(flat), -1, flat.shape[-1]).float()
    if real is None:
        means = flat.mean(1)
    else:
        mask = torch.zeros(flat.shape[0] * flat.shape[1], device=flat.device)
        mask[real.to(flat.device)] = 1
        mask = mask.reshape(flat.shape[:2])
        means = torch.einsum("np,npo->no", mask, flat) / mask.sum(1, keepdim=True).clamp_min(1)
    return means.abs().sum(0, dtype=torch.float64)


class ObservationError(DataError, TautControl):
    """A layer saw values that are not finite."""

    def __init__(self, name: str) -> None:
        """Name the layer."""
        super().__init__(
            f"The input of layer '{name}' is not finite on the calibration data: check the data for NaN and Inf."
        )
