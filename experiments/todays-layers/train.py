"""Trains the three nets, minutes each; the epoch is chosen on validation samples, the test split is read once.

python experiments/todays-layers/train.py [--data DIR] [--nets vit letters unet]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

from nets import NETS  # noqa: E402 - found through the line above: experiments are scripts, no package
from tasks import learned, load_task, scores  # noqa: E402

EPOCHS = {"vit": (55_000, 4), "letters": (21_667, 12), "unet": (20_000, 3)}
"""Net -> training samples of an epoch, epochs."""

RATE = 2e-3


def train(name: str, folder: Path | None) -> dict[str, Any]:
    """Train one net, and keep its weights."""
    torch.manual_seed(0)
    task, start = load_task(name, folder), time.perf_counter()
    samples, epochs = EPOCHS[name]
    net = learned(NETS[name](), task, task.train.first(samples), task.valid, (epochs, RATE))
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, HERE / f"{name}.safetensors")
    valid, test = (float(scores(net, part, task).mean()) for part in (task.valid, task.test))
    minutes = (time.perf_counter() - start) / 60
    return {"validation": valid, "test": test, "samples": samples, "epochs": epochs, "minutes": round(minutes, 1)}


def main() -> None:
    """Train the nets; write training.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    args = parser.parse_args()
    path = HERE / "training.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in args.nets:
        report[name] = train(name, args.data)
        print(name, report[name], flush=True)
        path.write_text(json.dumps({**report, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
