"""Trains the Fashion-MNIST nets; the epoch is chosen on validation images, the test split is read once, at the end.

python experiments/nets/train.py [--data DIR] [--epochs 14]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from data import load, split_train
from fashion import NETS
from running import accuracy
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent


def augment(x: Tensor) -> Tensor:
    """Mirror half of the batch, shift the whole of it by up to two pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(nn.functional.pad(x, (2, 2, 2, 2)), (down, right), (2, 3))[..., 2:-2, 2:-2]


def train(name: str, epochs: int, folder: Path | None, batch: int = 128) -> dict[str, object]:
    """Train `name` with SGD and a one-cycle rate; keep the weights of the best validation epoch."""
    torch.manual_seed(0)
    x, y, xv, yv = split_train("fashion-mnist", folder)
    net = NETS[name]().to(memory_format=torch.channels_last)
    steps = len(x) // batch
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.15, epochs * steps)
    best, state, start = 0.0, copy.deepcopy(net.state_dict()), time.time()
    for epoch in range(epochs):
        net.train()
        for index in torch.randperm(len(x))[: steps * batch].view(steps, batch):
            loss = nn.functional.cross_entropy(net(augment(x[index])), y[index], label_smoothing=0.05)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            rate.step()
        valid = accuracy(net, xv, yv)
        print(f"{name} epoch {epoch + 1}: validation {valid:.4f}, {time.time() - start:.0f} s", flush=True)
        if valid > best:
            best, state = valid, copy.deepcopy(net.state_dict())
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
