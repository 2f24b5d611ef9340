"""What calibration says of tables (embeddings) and transposed convolutions, which methods of their own rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from taut.decompose.outputs import OutputMoment, squared_error, weighed
from taut.decompose.weighting import Weighting
from taut.structure.collecting import ObservationError, OutputSums
from taut.structure.padding import Padding
from taut.structure.patches import bias_of, weight_of
from taut.structure.probing import outputs_of_layer
from taut.structure.statistics import LayerStatistics
from taut.types import Layer

KEPT_BYTES = 1 << 24
"""Memory of the inputs of a transposed convolution that are kept to try its candidates on."""


@dataclass(frozen=True)
class AsideStatistics(LayerStatistics):
    """What calibration knows of a table or a transposed convolution.

    Attributes:
        weighting: of a transposed convolution the second moment of its inputs' channels, summed over positions.
        counts: of a table, how often a sample reads each row; rows that no sample read count a little.
        products: (o, o), of a transposed convolution the same of its outputs without the bias. mean: (o,), of these.
        kept: some of its inputs, as batches.
    """

    counts: Tensor | None = None
    products: Tensor | None = None
    mean: Tensor | None = None
    kept: Sequence[Tensor] = field(default_factory=tuple)

    def narrowed(
        self, outputs: Tensor, inputs: Tensor, sizes: tuple[int, int], modules: tuple[nn.Module, nn.Module]
    ) -> AsideStatistics:
        """Of the layer with fewer channels; what it gives is tried on the inputs that were kept.

        Args:
            outputs: kept ones.
            inputs: kept ones of a transposed convolution; a table loses no rows.
            sizes: the first two of the weight before, inputs first.
            modules: the layer before and after.
        """
        B = self.outputs if self.outputs is None or len(outputs) == sizes[1] else self.outputs.narrowed(outputs)
        found, A = replace(self, outputs=B), self.weighting.channel
        if A is None or not self.kept:
            return found
        share = self.share(modules[0])
        kept = tuple(x.index_select(1, inputs.to(x.device)) for x in self.kept)
        products, mean = (share * total for total in transposed_sums(modules[1], kept))
        into = inputs.to(A.device)
        A = A[:, into][..., into]
        return replace(found, weighting=Weighting(channel=A), products=products, mean=mean, kept=kept)

    def share(self, module: nn.Module) -> float:
        """The energy of all outputs of a transposed convolution over that of the inputs that were kept."""
        kept = weighed(transposed_sums(module, self.kept)[0], self.outputs)
        return weighed(cast(Tensor, self.products), self.outputs) / kept if kept > 0 else 0.0

    def overlap(self, W: Tensor) -> float:
        """The energy of what the taps of a transposed convolution give together over that of all taps apart.

        Args:
            W: (1, o, c, taps).
        """
        if self.products is None:
            return 1.0
        apart = float(squared_error(self.weighting, W, self.outputs))
        return weighed(self.products, self.outputs) / apart if apart > 0 else 1.0


def transposed_sums(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over positions of y y^T, (o, o), and of y, (o,), of what a transposed convolution gives without its bias."""
    rows = [transposed_outputs(module, weight_of(module).detach().double(), x) for x in inputs]
    return cast(Tensor, sum(y.T @ y for y in rows)), cast(Tensor, sum(y.sum(0) for y in rows))


def transposed_outputs(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """Outputs (positions, o) that a transposed convolution gives of a batch with another weight, and without bias."""
    transposed = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    apply: Any = transposed[module.weight.ndim - 3]
    settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    y = apply(x.to(weight), weight.reshape(module.weight.shape), output_padding=module.output_padding, **settings)
    return cast(Tensor, y.movedim(1, -1).flatten(0, -2))


def smoothed(counts: Tensor) -> Tensor:
    """Shares of rows in all reads to come, (V,): those that were never read share the mass of what is read once.

    Source: Good 1953 (Good-Turing): the probability of what was never seen is the share of what was seen once.
    """
    total, unseen = counts.sum(), counts == 0
    if not bool(unseen.any()) or not bool(total):
        return counts / total if bool(total) else torch.full_like(counts, 1 / len(counts))
    rest = ((counts == 1).sum() + 1) / (total + 1)
    rest = torch.minimum(rest, unseen.double().mean())
    return torch.where(unseen, rest / unseen.sum(), (1 - rest) * counts / total)


class AsideMoments:
    """Running sums of one table or transposed convolution over a calibration pass: as `LayerMoments`."""

    def __init__(self, module: nn.Module, layer: Layer, samples: int) -> None:
        """`samples` are those of the pass."""
        self.module, self.name, self.samples = module, layer.name, samples
        self.table = isinstance(module, nn.Embedding)
        self.width = outputs_of_layer(module)
        self.gradients: OutputSums | None = OutputSums(nn.Linear(1, self.width, bias=False, device="meta"), 0)
        self.outputs: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.positions, self.room = 0, KEPT_BYTES
        self.sums: dict[str, Tensor] = {}
        self.padding: Padding | None = None
        self.held: bool | None = False

    def add_input(self, x: Tensor, output: Tensor) -> None:
        """Count the rows that are read; or add x x^T and y y^T of all positions."""
        if self.table:
            real = None if self.padding is None else self.padding.rows(self.name, self.module, output)
            index = x.flatten() if real is None else x.flatten()[real.to(x.device)]
            self.positions += len(index)
            self._add("counts", torch.bincount(index.cpu(), minlength=len(weight_of(self.module))).double())
            return
        if not bool(torch.isfinite(x).all()):
            raise ObservationError(self.name)
        rows, made = self._rows(x), self._rows(output)
        bias = bias_of(self.module)
        made = made if bias is None else made - bias.detach().double()
        self.positions += len(made)
        self._add("inputs", rows.T @ rows)
        self._add("products", made.T @ made)
        self._add("mean", made.sum(0))
        self._keep(x.detach())

    def _keep(self, x: Tensor) -> None:
        """The first samples, as many as there is room for; one at least."""
        batched = x.ndim == weight_of(self.module).ndim
        each = (x[:1] if batched else x).numel() * x.element_size()
        some = self.room // max(each, 1) if self.kept else max(1, self.room // max(each, 1))
        if some:
            part = (x[:some] if batched else x[None]).clone()
            self.room -= part.numel() * part.element_size()
            self.kept.append(part)

    def add_gradient(self, grad: Tensor, output: Tensor) -> None:
        """Add g g^T over all positions of a batch; a layer with a gradient that is not finite goes without."""
        if not grad.numel():
            return
        if self.gradients is None or not bool(torch.isfinite(grad).all()):
            self.gradients = None
            return
        rows = self._rows(grad).float()
        if self.table and self.padding is not None:
            real = self.padding.rows(self.name, self.module, output)
            rows = rows if real is None else rows[real.to(rows.device)]
        self.gradients.add(rows[None])

    def take_outputs(self) -> list[Tensor]:
        """The outputs captured since the last call."""
        taken, self.outputs = self.outputs, []
        return taken

    def finish(self) -> AsideStatistics:
        """Means over samples."""
        B: OutputMoment | None = None if self.gradients is None else self.gradients.moment(self.samples)
        per_sample = max(self.positions / self.samples, 1e-30)
        means = {key: total / self.samples for key, total in self.sums.items()}
        return AsideStatistics(
            Weighting(channel=means["inputs"][None]) if "inputs" in means else Weighting(),
            outputs=B,
            positions=per_sample,
            counts=smoothed(self.sums["counts"]) * per_sample if "counts" in self.sums else None,
            products=means.get("products"),
            mean=means.get("mean"),
            kept=tuple(self.kept),
        )

    def _rows(self, t: Tensor) -> Tensor:
        """Channels (positions, c) of a tensor, in float64."""
        if self.table:
            return t.detach().reshape(-1, t.shape[-1]).double()
        axes = weight_of(self.module).ndim - 2
        return t.detach().movedim(-axes - 1, -1).flatten(0, -2).double()

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value
