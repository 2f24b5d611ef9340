"""GoogLeNet (Szegedy et al. 2015, Going Deeper with Convolutions, table 1), and a small one on Fashion-MNIST.

Batch norm stands behind every convolution, and dropout and the auxiliary heads are left out, as in its successor
(Ioffe & Szegedy 2015). The 5 x 5 convolutions are 5 x 5. Pools pad by one where the original rounds sizes up: at
224 x 224 all maps have the original's sizes.

python experiments/prune-then-tucker/googlenet.py [--data DIR] [--epochs 7]     trains the small one; the epoch is
chosen on validation images, the test split is read once, at the end
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NETS = Path(__file__).parent.parent / "nets"
sys.path[:0] = [str(NETS)]

from data import load, split_train  # noqa: E402 - found through the line above: experiments are scripts, no package
from fashion import Standardize  # noqa: E402
from running import accuracy, augmented, one_cycle  # noqa: E402

Widths = tuple[int, int, int, int, int, int]

TABLE: tuple[tuple[Widths, ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Inception 3a-b, 4a-e, 5a-b: channels of 1 x 1; 3 x 3 reduce, 3 x 3; 5 x 5 reduce, 5 x 5; 1 x 1 behind a pool."""


def _conv(c: int, d: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, d, side, stride, side // 2, bias=False), nn.BatchNorm2d(d), nn.ReLU())


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, 1)


class Inception(nn.Module):
    """Four branches side by side, their channels one behind the other."""

    def __init__(self, c: int, widths: Widths) -> None:
        """`c` channels in; `widths` as a row of TABLE."""
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.one = _conv(c, one, 1)
        self.three = nn.Sequential(_conv(c, reduce3, 1), _conv(reduce3, three, 3))
        self.five = nn.Sequential(_conv(c, reduce5, 1), _conv(reduce5, five, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(c, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) to (N, sum of the branches' channels, H, W)."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


def googlenet(classes: int = 1000, width: float = 1.0, small: bool = False, channels: int = 3) -> nn.Sequential:
    """The net, with random weights.

    Args:
        classes: outputs.
        width: factor of all channel counts; they are rounded to multiples of four.
        small: for inputs of 28 to 32 pixels, stem 3 x 3, pool, 1 x 1, 3 x 3 (maps of 14 to 16 at inception 3),
            in place of 7 x 7 / 2, pool, 1 x 1, 3 x 3, pool (28 at inputs of 224).
        channels: of the input.
    """

    def scaled(count: int) -> int:
        return max(4, round(count * width / 4) * 4)

    first, c = scaled(64), scaled(192)
    layers: list[nn.Module] = [_conv(channels, first, 3) if small else _conv(channels, first, 7, 2), _pool()]
    layers += [_conv(first, first, 1), _conv(first, c, 3), *([] if small else [_pool()])]
    for stage, rows in enumerate(TABLE):
        layers += [_pool()] if stage else []
        for row in rows:
            one, reduce3, three, reduce5, five, pooled = map(scaled, row)
            layers.append(Inception(c, (one, reduce3, three, reduce5, five, pooled)))
            c = one + three + five + pooled
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def small_googlenet() -> nn.Sequential:
    """The net of the study: quarter width, ten classes, grey images of 28 x 28 in [0, 1]; 19.5 MMAC."""
    return nn.Sequential(Standardize(), *googlenet(10, 0.25, small=True, channels=1))


def trained_googlenet() -> nn.Sequential:
    """The trained net of the study in eval mode, from the half-precision weights among the other nets'."""
    net = small_googlenet()
    state = {name: t.float() for name, t in load_file(NETS / "googlenet.safetensors").items()}
    net.load_state_dict(net.state_dict() | state)  # batch norm's counters of batches are not stored
    return net.eval()


def fit(epochs: int, folder: Path | None) -> dict[str, object]:
    """Train as experiments/nets/train.py does; the weights of the best validation epoch, in half precision."""
    torch.manual_seed(0)
    x, y, xv, yv = split_train("fashion-mnist", folder)
    net = small_googlenet().to(memory_format=torch.channels_last)
    best, state = one_cycle(net, (x, y), (xv, yv), 0.15, epochs, augmented)
    halved = {name: t.half().contiguous() for name, t in state.items() if t.is_floating_point()}
    save_file(halved, NETS / "googlenet.safetensors")
    test = accuracy(trained_googlenet(), *load("fashion-mnist", "test", folder))
    return {"validation": best, "test": test, "epochs": epochs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=7)
    args = parser.parse_args()
    report = fit(args.epochs, args.data)
    path = NETS / "training.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "googlenet": report, "torch": torch.__version__}, indent=1) + "\n")
    print(report)
