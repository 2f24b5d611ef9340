"""Trains the Fashion-MNIST nets; the epoch is chosen on validation images, the test split is read once, at the end.

python experiments/nets/train.py [--data DIR] [--epochs 14]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from data import load, split_train
from fashion import NETS
from running import accuracy, augmented, one_cycle
from safetensors.torch import save_file

HERE = Path(__file__).parent


def train(name: str, epochs: int, folder: Path | None) -> dict[str, object]:
    """Train `name` with SGD and a one-cycle rate; keep the weights of the best validation epoch."""
    torch.manual_seed(0)
    x, y, xv, yv = split_train("fashion-mnist", folder)
    net = NETS[name]().to(memory_format=torch.channels_last)
    print(name)
    best, state = one_cycle(net, (x, y), (xv, yv), 0.15, epochs, augmented)
    net.load_state_dict(state)
    save_file({k: v.contiguous() for k, v in state.items()}, HERE / f"{name}.safetensors")
    return {"validation": best, "test": accuracy(net, *load("fashion-mnist", "test", folder)), "epochs": epochs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=14)
    args = parser.parse_args()
    report = {name: train(name, args.epochs, args.data) for name in NETS}
    (HERE / "training.json").write_text(json.dumps({**report, "torch": torch.__version__}, indent=1) + "\n")
    print(report)
