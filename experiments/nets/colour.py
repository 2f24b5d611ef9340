"""A colour task and a net with the first two convolutions of Denton et al. 2014 at their real channel counts.

Images: a Fashion-MNIST garment as a mask between two random colours, foreground m c1 + (1 - m) c2, 3 x 28 x 28. Twenty
classes: the garment, and whether the foreground is redder than the background, so that colour has to be seen. Colours
of an image are drawn from its number and a seed: every run sees the same images.

Net: conv 7x7/2 3-96, pool, conv 5x5 96-256, pool, 2304-384-384-20, with batch norm behind the convolutions.

python experiments/nets/colour.py [--data DIR] [--epochs 6]     trains it; the epoch is chosen on validation images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from data import load, split_train
from running import accuracy, mirrored, one_cycle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
CLASSES = 20


def painted(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Grey images (N, 1, 28, 28) and labels as coloured ones (N, 3, 28, 28) and labels of twenty classes."""
    generator = torch.Generator().manual_seed(seed)
    front, back = torch.rand(2, len(x), 3, 1, 1, generator=generator)
    redness = (front - back)[:, 0] - (front - back)[:, 1:].mean(1)
    return x * front + (1 - x) * back, 2 * y + (redness.flatten() > 0).long()


def splits(folder: Path | None = None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Training, validation and test images, painted."""
    x, y, xv, yv = split_train("fashion-mnist", folder)
    return painted(x, y, 0), painted(xv, yv, 1), painted(*load("fashion-mnist", "test", folder), 2)


def colour() -> nn.Sequential:
    """The net; 34 MMAC."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 7, 2, 3, bias=False),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(96, 256, 5, 1, 2, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2304, 384),
        nn.ReLU(),
        nn.Linear(384, 384),
        nn.ReLU(),
        nn.Linear(384, CLASSES),
    )


def trained_colour() -> nn.Sequential:
    """The trained net in eval mode, from the half-precision weights beside this file."""
    net = colour()
    net.load_state_dict({name: t.float() for name, t in load_file(HERE / "colour.safetensors").items()}, strict=False)
    return net.eval()


def train(epochs: int, folder: Path | None) -> dict[str, object]:
    """SGD with a one-cycle rate; mirrored images; the weights of the best validation epoch, in half."""
    torch.manual_seed(0)
    data, valid, test = splits(folder)
    net = colour().to(memory_format=torch.channels_last)
    best, state = one_cycle(net, data, valid, 0.05, epochs, mirrored)
    halved = {k: v.half().contiguous() for k, v in state.items() if v.is_floating_point()}
    save_file(halved, HERE / "colour.safetensors")
    return {"validation": best, "test": accuracy(trained_colour(), *test), "epochs": epochs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    report = train(args.epochs, args.data)
    path = HERE / "training.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "colour": report, "torch": torch.__version__}, indent=1) + "\n")
    print(report)
