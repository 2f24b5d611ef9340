"""Accumulating one layer's second moments while batches pass; memory is bounded by the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.calls import TautControl, generator
from taut.decompose.weighting import Weighting
from taut.errors import DataError
from taut.structure.patches import choose, fan_in, gram, input_rows, output_rows, positions, row_budget, weight_of
from taut.types import Layer

FULL_LIMIT = 2304
"""Fan-in up to which the unfolded second moment is held in full (42 MB in float64)."""

SKETCH_ROWS = 1024
"""Rows of the sketch that replaces it for a matrix product of larger fan-in."""


def form_of(module: nn.Module) -> str:
    """Which form of second moment a layer gets: "full", "channel" or "sketch"."""
    if fan_in(module) <= FULL_LIMIT:
        return "full"
    return "sketch" if fan_in(module) == weight_of(module).shape[1] else "channel"


def second_moment(module: nn.Module, rows: Tensor, form: str) -> Tensor:
    """Sum over rows (g, rows, k) of x x^T in the given form; for "channel" the mean over kernel offsets."""
    if form == "full":
        return gram(rows)
    per_group = weight_of(module).shape[1]
    taps = rows.reshape(*rows.shape[:2], per_group, -1)
    flat = taps.transpose(2, 3).flatten(1, 2)
    return gram(flat) / taps.shape[-1]


def sketched(rows: Tensor, size: int, random: torch.Generator) -> Tensor:
    """At most `size` random sign combinations of rows (g, n, k) with the same expected second moment."""
    n = rows.shape[1]
    if n <= size:
        return rows
    signs = torch.randint(0, 2, (size, n), generator=random).to(rows) * 2 - 1
    mixed: Tensor = (signs / size**0.5) @ rows
    return mixed


class LayerMoments:
    """Running sums of one layer over a calibration pass."""

    def __init__(self, module: nn.Module, layer: Layer, samples: int, seed: int) -> None:
        """`samples` is the size of the whole pass: sampled positions are spread over it."""
        self.module, self.name, self.samples, self.seed = module, layer.name, samples, 1_000_003 * seed
        self.form = form_of(module)
        self.outputs: list[Tensor] = []
        self.seen = 0
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.taylor: Tensor | None = None
        self.lost = False
        self.positions = layer.positions / layer.batch
        self.generator = generator(seed)

    def add_input(self, x: Tensor, output: Tensor) -> None:
        """Add x x^T of sampled output positions, scaled to all of them."""
        if not bool(torch.isfinite(x).all()):
            raise ObservationError(self.name)
        total = positions(self.module, output)
        whole = round(self.positions * self.samples)
        share = row_budget(fan_in(self.module), whole) / max(whole, 1)
        index = choose(total, max(1, round(share * total)), self.seed + self.seen)
        self.seen += 1
        rows = input_rows(self.module, x, output, index) * (total / len(index)) ** 0.5
        if self.form == "sketch":
            old = rows if self.A is None else torch.cat([self.A, rows], 1)
            self.A = old if old.shape[1] <= SKETCH_ROWS else sketched(old, SKETCH_ROWS, self.generator)
        else:
            new = second_moment(self.module, rows, self.form)
            self.A = new if self.A is None else self.A.add_(new)

    def add_gradient(self, grad: Tensor, output: Tensor) -> None:
        """Add g g^T over all positions of a batch; a layer with a gradient that is not finite goes without."""
        if self.lost or not bool(torch.isfinite(grad).all()):
            self.B, self.taylor, self.lost = None, None, True
            return
        rise = _first_order(self.module, output.detach() * grad)
        self.taylor = rise if self.taylor is None else self.taylor.add_(rise)
        new = gram(output_rows(self.module, grad))
        self.B = new if self.B is None else self.B.add_(new)

    def take_outputs(self) -> list[Tensor]:
        """The outputs captured since the last call."""
        taken, self.outputs = self.outputs, []
        return taken

    def finish(self) -> tuple[Weighting, Tensor | None, float, Tensor | None]:
        """Weighting, output second moment, positions per sample and first-order rises, as means over samples."""
        if self.A is None:
            return Weighting(), None, self.positions, None
        scale = self.samples**0.5 if self.form == "sketch" else self.samples
        weighting = Weighting(**{self.form: (self.A / scale).float()})
        taylor = None if self.taylor is None else (self.taylor / self.samples).float()
        return weighting, None if self.B is None else (self.B / self.samples).float(), self.positions, taylor


def _first_order(module: nn.Module, products: Tensor) -> Tensor:
    """Sum over samples of |mean over positions of y dL/dy|, per output."""
    axes = 0 if isinstance(module, nn.Linear) else weight_of(module).ndim - 2
    flat = products.movedim(products.ndim - axes - 1, -1)
    flat = flat[None] if flat.ndim == axes + 1 else flat
    return flat.reshape(len(flat), -1, flat.shape[-1]).double().mean(1).abs().sum(0)


class ObservationError(DataError, TautControl):
    """A layer saw values that are not finite."""

    def __init__(self, name: str) -> None:
        """Name the layer."""
        super().__init__(
            f"The input of layer '{name}' is not finite on the calibration data: check the data for NaN and Inf."
        )
