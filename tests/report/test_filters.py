"""Pictures of first-layer filters: written, of the right tiles, and refused in words."""

import pytest
import torch

from taut.errors import CallError
from taut.report import draw_colour_lines, draw_filters
from taut.report.filters import _tiles

pytest.importorskip("matplotlib")


def kernel(filters=10, channels=3):
    return torch.randn(filters, channels, 5, 5, generator=torch.Generator().manual_seed(0))


def test_tiles_are_the_filters_with_white_between():
    sheet = _tiles(kernel().sigmoid())
    assert sheet.shape == (3 * 6 - 1, 4 * 6 - 1, 3)
    assert torch.equal(sheet[6:11, 12:17].movedim(-1, 0), kernel().sigmoid()[6])
    assert bool((sheet[5] == 1).all())


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_both_pictures_are_written(tmp_path, suffix):
    before = kernel()
    after = before.mean(1, keepdim=True) * torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    for draw in (draw_filters, draw_colour_lines):
        path = tmp_path / f"{draw.__name__}.{suffix}"
        draw((("before", before), ("after", after)), path)
        assert path.stat().st_size > 2000


def test_grey_kernels_have_tiles_but_no_colour_space(tmp_path):
    draw_filters((("grey", kernel(channels=1)),), tmp_path / "grey.png")
    assert (tmp_path / "grey.png").exists()
    with pytest.raises(CallError, match="three input channels"):
        draw_colour_lines((("grey", kernel(channels=1)),), tmp_path / "lines.png")


@pytest.mark.parametrize("bad", [torch.randn(4, 2, 3, 3), torch.randn(4, 3, 3)])
def test_what_has_no_colours_is_refused(tmp_path, bad):
    with pytest.raises(CallError, match="1 or 3"):
        draw_filters((("bad", bad),), tmp_path / "bad.png")
