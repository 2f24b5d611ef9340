"""Our plans beside Torch-Pruning at equal MACs: the same trained nets, images and five epochs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import JOINT, LOW_RANK, NETS, images, net_of
from torch import nn
from tuning import scores, tuned

import taut
from taut.core.example import Example
from taut.measure import LatencyMeter
from taut.studies import Cell

FRACTIONS = (0.5, 0.25, 0.125)
EPOCHS = 5
IMAGES = 12_000
"""Training images of an epoch."""

CALIBRATION = 2_048
SIDES = {"ours": JOINT, "channels": ("channels",), "low rank": LOW_RANK}
"""Plans of ours."""

FAST = "as fast"
"""Ours with a budget of time as well: no more than the faster of the peer's nets takes, measured first."""

FASTER = 0.97
"""Share of the peer's time that is allowed: what two measurements of one net differ by."""

ALONE = ("channels", "low rank")
UNTRAINED = (("vgg", 0.125), ("resnet", 0.25))
"""Where they are measured as well, untrained; and where ours should be above the peer's tuned nets."""

PEERS = ("l2", "taylor")
RUNTIMES = ("eager", "channels_last", "onnxruntime", "openvino")
"""In which speed is measured."""


def wanted(quick: bool, nets: tuple[str, ...] = NETS) -> list[Cell]:
    """Every net, fraction and side; the uncompressed control once a net. The peer only where it is installed."""
    peers = PEERS if find_spec("torch_pruning") else ()
    if quick:
        return [{"net": "resnet", "side": side, "macs": 0.25} for side in ("ours", *peers[:1])]
    cells: list[Cell] = []
    for net in nets:
        cells.append({"net": net, "side": "control", "macs": 1.0})
        cells += [{"net": net, "side": side, "macs": macs} for macs in FRACTIONS for side in ("ours", *peers)]
        cells += [{"net": net, "side": side, "macs": macs} for n, macs in UNTRAINED if n == net for side in ALONE]
    return cells


def hurried(quick: bool, nets: tuple[str, ...] = NETS) -> list[Cell]:
    """What needs the peer's nets and a quiet machine."""
    peers = find_spec("torch_pruning") is not None and not quick
    return [{"net": net, "side": FAST, "macs": macs} for net in nets for macs in FRACTIONS] if peers else []


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """Right or wrong on every test image, before and after tuning, and what the net costs."""
    x, y, valid_x, valid_y, test_x, test_y = images(place["folder"])
    quick = place["quick"]
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))[: 2_000 if quick else IMAGES]
    if quick:
        test_x, test_y = test_x[:2000], test_y[:2000]
    model = net_of(cell["net"])
    net = taut.trace(model, x[:1])
    allowed = _allowed(place, cell, model, x) if cell["side"] == FAST else {}
    if "missing" in allowed:
        return allowed
    small = _compressed(model, cell, (x[rows], y[rows]), 512 if quick else CALIBRATION, allowed.get("latency"))
    cost = taut.trace(small, x[:1]).cost
    found: dict[str, Any] = {"before": packed(scores(small, test_x, test_y)), "images": len(test_x), **allowed}
    if cell["side"] not in ALONE:
        small = tuned(small, (x[rows], y[rows], valid_x, valid_y), 1 if quick else EPOCHS, 0)
        found["after"] = packed(scores(small, test_x, test_y))
    path = _kept(place, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(small, path)
    return found | {"params": cost.params / net.cost.params, "cost": cost.macs / net.cost.macs}


def _compressed(
    model: nn.Module, cell: Cell, data: tuple[torch.Tensor, torch.Tensor], calibration: int, latency: float | None
) -> nn.Module:
    x, y = data
    if cell["side"] == "control":
        return model
    if cell["side"] in PEERS:
        from opponent import opponent  # noqa: PLC0415 - needs a package of another author

        return opponent(model, x[:1], cell["macs"], cell["side"], x, y)
    batches = list(x[:calibration].split(64))
    budget = taut.Budget(macs=cell["macs"], latency=latency)
    methods = SIDES.get(cell["side"], JOINT)
    try:
        return taut.compress(
            model, x[: 2 if latency is None else 32], budget=budget, data=batches, methods=methods
        ).model
    except taut.BudgetError as error:
        if latency is None:
            raise
        return error.best.model  # the closest one: its speed, measured with all others, shows by how much


def _allowed(place: Cell, cell: Cell, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Share of the dense net's time that ours may take: the faster of the peer's nets, in a runtime that suits both."""
    os.environ["TAUT_RUNTIMES"] = ",".join(RUNTIMES)
    paths = [_kept(place, {**cell, "side": peer}) for peer in PEERS]
    if not all(path.exists() for path in paths):
        return {"missing": "the peer's nets were not kept"}
    peers = [torch.load(path, weights_only=False) for path in paths]
    watch = LatencyMeter(model, Example(model, x[:32]), peers[0])
    allowed = min(1.0, FASTER * min(watch.relative_time(peer) for peer in peers))
    return {"latency": allowed, "runtime": watch.runtime.name}


def packed(hits: torch.Tensor) -> str:
    """Bits as hexadecimal digits."""
    return np.packbits(hits.bool().numpy()).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The bits again, as floats."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(float)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over the same images, and half of its 95 % interval."""
    difference = a - b
    return float(difference.mean()), float(1.96 * difference.std() / len(difference) ** 0.5)


def timed(quick: bool, nets: tuple[str, ...] = NETS) -> list[Cell]:
    """Every net that was kept; none in a quick run, which measures no time."""
    return [] if quick else [c for c in (*wanted(quick, nets), *hurried(quick, nets)) if c["side"] != "control"]


def speed(place: Cell, cell: Cell) -> dict[str, Any]:
    """Dense time over compressed time, each in its fastest runtime, interleaved; batches of 1 and 32."""
    path = _kept(place, cell)
    if not path.exists():
        return {"missing": "the net was not kept"}
    os.environ["TAUT_RUNTIMES"] = ",".join(RUNTIMES)
    small, dense = torch.load(path, weights_only=False), net_of(cell["net"])
    found = {}
    for batch in (1, 32):
        times = taut.compare(dense, small, None, torch.rand(batch, 1, 28, 28)).latency
        if times is not None:
            found[f"batch {batch}"] = times.best.before / times.best.after
    return found


def _kept(place: Cell, cell: Cell) -> Path:
    return Path(place["out"]) / "nets" / f"{'quick-' * place['quick']}{cell['net']}-{cell['side']}-{cell['macs']}.pt"
