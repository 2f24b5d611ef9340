"""Every method's result on five nets, exported to ONNX and OpenVINO: how far the outputs are from torch's.

.venv/bin/python benchmarks/exports.py

The nets: VGG- and ResNet-style (trained on Fashion-MNIST, experiments/nets), the digit CNN and CREPE tiny of other
authors where their packages are installed, and a one-dimensional net and a transformer encoder with random weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor, nn

import taut
from taut.artifact.exporting import LIMIT
from taut.methods import METHODS
from taut.studies import Bound

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments" / name) for name in ("nets", "spine", "crepe")]

from digit import trained_net as digit_cnn  # noqa: E402 - found through the line above: experiments are no package
from fashion import trained  # noqa: E402
from net import crepe  # noqa: E402

KEEP = 0.5
"""Share of the MACs that stays (dead_taps decides itself)."""


def series() -> nn.Module:
    """A net for sequences of 32 steps: strided, dilated and grouped 1-d convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 32, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(32, 32, 15, padding=14, dilation=2, groups=2),
        nn.ReLU(),
        nn.Conv1d(32, 16, 31, padding=15),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def encoder() -> nn.Module:
    """A small transformer encoder."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Linear(16, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 16)).eval()


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name -> net and calibration inputs; those of packages that are not here are left out, with a word."""
    torch.manual_seed(1)
    image = torch.rand(64, 1, 28, 28)
    found: dict[str, tuple[nn.Module, Tensor]] = {name: (trained(name), image) for name in ("vgg", "resnet")}
    for name, make, inputs in (("digit CNN", digit_cnn, image), ("CREPE tiny", crepe, torch.randn(64, 1024))):
        try:
            found[name] = (make("tiny") if name == "CREPE tiny" else make(), inputs)
        except (ImportError, FileNotFoundError, SystemExit) as error:
            print(f"{name} is left out: {error}")
    found["series"] = (series(), torch.randn(64, 8, 32))
    found["encoder"] = (encoder(), torch.randn(64, 5, 16))
    return found


def exported(net: nn.Module, inputs: Tensor, method: str, folder: Path) -> dict[str, Any] | str:
    """Worst differences by runtime and batch; or why the method does not apply."""
    network = taut.trace(net, inputs[:8])
    fitting = [layer for layer in network.layers if METHODS[method]().refuses(network.group([layer.name])) is None]
    if not fitting:
        return "applies to no layer"
    methods = [method] if method != "dead_taps" else ["dead_taps", "svd"]
    for keep in (KEEP, 0.75, 0.9):  # one method alone does not always get down to half
        try:
            result = taut.compress(net, inputs[:8], budget=taut.Budget(macs=keep), data=[inputs], methods=methods)
            break
        except taut.BudgetError as error:
            reason = str(error)
    else:
        return reason
    done = result.export(folder / "model.onnx")
    vino = result.export(folder / "model.xml")
    worst = {f"{p.runtime.split(' ')[0]}, batch {p.samples}": p.worst for p in (*done.parity, *vino.parity)}
    return {"macs_kept": keep, "onnx_bytes": done.bytes, "worst": worst}


def main() -> None:
    """All nets and methods; write results/exports.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (net, inputs) in nets().items():
            for method in METHODS:
                found = exported(net, inputs, method, Path(folder))
                print(f"{name:12s} {method:10s} {found if isinstance(found, str) else found['worst']}", flush=True)
                rows.append({"net": name, "method": method, "result": found})
    worst = max(max(row["result"]["worst"].values()) for row in rows if isinstance(row["result"], dict))
    done = {row["net"] for row in rows if isinstance(row["result"], dict)}
    bounds = [
        Bound("exports: worst relative difference to torch", LIMIT, worst, at_most=True),
        Bound("exports: nets", 5, len(done)),
    ]
    finish(ROOT / "benchmarks" / "results" / "exports.json", {"keep": KEEP}, rows, bounds)


if __name__ == "__main__":
    main()
