"""What a transposed convolution with another weight gives otherwise, tried on inputs that calibration kept."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from taut.decompose.outputs import OutputMoment
from taut.structure.asides import AsideStatistics
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics


def error_of(module: Any, change: Tensor, known: LayerStatistics) -> float:
    """tr(B E[e eᵀ]) of e = change * x over the inputs that were kept, brought to the scale of all."""
    if not isinstance(known, AsideStatistics) or known.products is None:
        return 0.0
    changed, whole = 0.0, 0.0
    for x in known.kept:
        changed += _weighed(_moment(module, change, x), known.outputs)
        whole += _weighed(_moment(module, weight_of(module).detach().double(), x), known.outputs)
    scale = _weighed(known.products, known.outputs) / whole if whole > 0 else 0.0
    return changed * scale


def _moment(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """Sum over positions of y yᵀ, (o, o), of the outputs that another weight gives."""
    transposed = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    apply: Any = transposed[module.weight.ndim - 3]
    settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    y = apply(x.to(weight), weight.reshape(module.weight.shape), output_padding=module.output_padding, **settings)
    rows = y.movedim(1 - y.ndim if y.ndim == module.weight.ndim else 0, -1).flatten(0, -2)
    return cast(Tensor, rows.T @ rows)


def _weighed(S: Tensor, B: OutputMoment | None) -> float:
    """tr(B S)."""
    if B is None:
        return float(S.diagonal().sum())
    if B.full is not None:
        return float((S * B.full[0].to(S)).sum())
    rows = B.rows
    return 0.0 if rows is None else float(((rows[0].to(S) @ S) * rows[0].to(S)).sum())
