"""Tucker-2 with automatic ranks on the trained nets at hand, untrained; the literature's figures beside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from pipelines import automatic, images, net_of
from running import accuracy

import taut
from taut.studies import Cell

PLACE = Path(__file__).parent.parent
NETS = ("vgg", "resnet", "googlenet", "digit_cnn")
SLOW = ("crepe",)
"""With --paper only."""
KNOBS = (1.0,)

LITERATURE = (
    {"net": "AlexNet", "weights": 5.46, "flops": 2.67, "drop": 1.70},
    {"net": "VGG-16", "weights": 1.09, "flops": 4.93, "drop": 0.50},
    {"net": "GoogLeNet", "weights": 1.28, "flops": 2.06, "drop": 0.24},
)
"""Kim et al. 2016 after fine-tuning on ImageNet, top-5 drops, as printed in tables from memory: not comparable."""


def wanted(quick: bool, paper: bool = False) -> list[Cell]:
    """Every net and knob."""
    nets = ("resnet",) if quick else (*NETS, *(SLOW if paper else ()))
    return [{"net": net, "vbmf": knob} for net in nets for knob in ((1.0,) if quick else KNOBS)]


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """Sizes and accuracy with every step and refit, without training; or why the net is not here."""
    try:
        model, calibration, judge = _prepared(place, cell["net"])
    except (ImportError, SystemExit, FileNotFoundError) as error:
        return {"missing": str(error) or type(error).__name__}
    net = taut.trace(model, calibration[0][:2])
    stats = taut.observe(net, model, calibration)
    small = taut.apply(model, taut.Plan.of(net, automatic(net, cell["vbmf"])), stats, calibration)
    cost = taut.trace(small, calibration[0][:2]).cost
    return {
        "dense": judge(model),
        "accuracy": judge(small),
        "weights": net.cost.params / cost.params,
        "flops": net.cost.macs / cost.macs,
    }


def _prepared(place: Cell, name: str) -> tuple[Any, list[torch.Tensor], Any]:
    if name in {"vgg", "resnet", "googlenet"}:
        x, _, _, _, test_x, test_y = images(place["folder"])
        count = 2000 if place["quick"] else len(test_x)
        return net_of(name), list(x[:1024].split(256)), lambda m: accuracy(m, test_x[:count], test_y[:count])
    if name == "digit_cnn":
        sys.path.append(str(PLACE / "spine"))
        from digit import normalized, trained_net  # noqa: PLC0415 - needs a package of another author

        folder = None if place["folder"] is None else Path(place["folder"])
        from data import load, split_train  # noqa: PLC0415 - as above

        images_, labels = load("mnist", "test", folder)
        x = normalized(split_train("mnist", folder)[0][:1024])
        return trained_net(), list(x.split(256)), lambda m: accuracy(m, normalized(images_), labels)
    return _crepe()


def _crepe() -> tuple[Any, list[torch.Tensor], Any]:
    sys.path.append(str(PLACE / "crepe"))
    from net import crepe  # noqa: PLC0415 - needs a package of another author
    from task import calibration, evaluate  # noqa: PLC0415 - as above

    return crepe(), calibration(), lambda m: next(iter(evaluate(m).values()))
