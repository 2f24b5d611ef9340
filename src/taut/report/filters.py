"""First-layer filters before and after: as colour tiles, and their taps as points in colour space.

The pictures of Denton et al. 2014, figure 2: monochromatic filters look like cleaned versions of the originals, and
the taps of each lie on a line through the origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.core.files import write_figure
from taut.errors import CallError

MOST_FILTERS = 96
POINTS_OF = 12
"""Filters whose taps are drawn; more would hide each other."""


def draw_filters(kernels: Sequence[tuple[str, Tensor]], path: str | Path) -> None:
    """Write a picture with one panel per kernel, every filter a tile; three channels are shown as red, green, blue.

    Args:
        kernels: (title, kernel (F, 3 or 1, H, W)), such as before and after. The same filter has the same scale in all.
        path: ends in .svg, .png or .pdf.

    Raises:
        CallError: matplotlib is missing, or a kernel cannot be shown as colours.
    """
    kept = [(title, _checked(kernel)[:MOST_FILTERS]) for title, kernel in kernels]
    size = torch.stack([kernel.abs().amax((1, 2, 3)) for _, kernel in kept]).amax(0).clamp_min(1e-12)
    figure = _figure(4.2 * len(kept), 4.6)
    for place, (title, kernel) in enumerate(kept, 1):
        axis = figure.add_subplot(1, len(kept), place)
        axis.imshow(_tiles(0.5 + 0.5 * kernel / size[:, None, None, None]).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    write_figure(figure, path, dpi=150)


def draw_colour_lines(kernels: Sequence[tuple[str, Tensor]], path: str | Path, filters: Sequence[int] = ()) -> None:
    """Write a picture with one panel per kernel: the taps of some filters as points in red-green-blue space.

    Args:
        kernels: (title, kernel (F, 3, H, W)); where a filter's taps lie on a line through the origin, it is drawn.
        path: ends in .svg, .png or .pdf.
        filters: which ones; those of the largest norm in the first kernel if empty.

    Raises:
        CallError: matplotlib is missing, or a kernel has not three channels.
    """
    kept = [(title, _checked(kernel)) for title, kernel in kernels]
    if any(kernel.shape[1] != 3 for _, kernel in kept):
        raise CallError("Colour space needs kernels of three input channels.")
    chosen = list(filters) or kept[0][1].flatten(1).norm(dim=1).argsort(descending=True)[:POINTS_OF].tolist()
    figure = _figure(4.6 * len(kept), 4.6)
    for place, (title, kernel) in enumerate(kept, 1):
        axis = figure.add_subplot(1, len(kept), place, projection="3d")
        for number, f in enumerate(chosen):
            _draw_line(axis, kernel[f].flatten(1).T, f"C{number % 10}")
        axis.set(xlabel="red", ylabel="green", zlabel="blue")
        axis.set_box_aspect(None, zoom=0.85)  # else the last label is cut off
        axis.set_title(title, fontsize=10)
    write_figure(figure, path, dpi=150)


def _draw_line(axis: Any, points: Tensor, colour: str) -> None:
    axis.scatter(*points.T.numpy(), color=colour, s=5)
    _, s, Vh = torch.linalg.svd(points.double(), full_matrices=False)
    if float(s[1]) <= 1e-4 * float(s[0]):
        ends = torch.stack([(points.double() @ Vh[0]).min() * Vh[0], (points.double() @ Vh[0]).max() * Vh[0]])
        axis.plot(*ends.T.numpy(), color=colour, linewidth=0.8)


def _tiles(kernel: Tensor) -> Tensor:
    """Filters (F, c, H, W) in [0, 1] as one image (rows, columns, 3) with white lines between them."""
    count, _, height, width = kernel.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.ones(rows * (height + 1) - 1, columns * (width + 1) - 1, 3)
    for place, tile in enumerate(kernel):
        y, x = divmod(place, columns)
        sheet[y * (height + 1) :, x * (width + 1) :][:height, :width] = tile.expand(3, -1, -1).movedim(0, -1)
    return sheet.clamp(0, 1)


def _checked(kernel: Tensor) -> Tensor:
    if kernel.ndim != 4 or kernel.shape[1] not in {1, 3}:
        raise CallError(f"A kernel of (filters, 1 or 3, height, width) is needed. Got {tuple(kernel.shape)}.")
    return kernel.detach().float().cpu()


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CallError("Pictures need matplotlib: pip install 'taut[report]'.") from None
    return Figure(figsize=(width, height), layout="constrained")
