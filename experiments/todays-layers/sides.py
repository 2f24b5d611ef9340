"""Who makes a net smaller, to at most as many multiply-accumulates: taut in two ways, Torch-Pruning in four."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from nets import trained
from tasks import Part, Task
from torch import nn

import taut
from taut.studies import Cell

sys.path.append(str(Path(__file__).parent.parent / "prune-then-tucker"))  # opponent.py

CONTROL = "control"
OURS: dict[str, tuple[str, ...] | None] = {
    "taut": None,
    "taut, channels alone": ("channels",),
}
"""Side -> methods; the first is the default call."""

PEERS: dict[str, tuple[str, bool]] = {
    "Torch-Pruning l2, uniform": ("l2", False),
    "Torch-Pruning l2, over all layers": ("l2", True),
    "Torch-Pruning Taylor, uniform": ("taylor", False),
    "Torch-Pruning Taylor, over all layers": ("taylor", True),
}
"""Side -> how channels are ranked, and whether all layers are ranked together."""

FRACTIONS = (0.5, 0.25)
"""Of the multiply-accumulates, that may be left."""

CALIBRATION, BATCH = 2_048, 64
HEADS = {"vit": 4, "letters": 4, "unet": None}
"""What the peer's widths have to be multiples of: it asserts that heads divide them."""


def peers() -> tuple[str, ...]:
    """Names of the peer's ways, where it is installed."""
    return tuple(PEERS) if find_spec("torch_pruning") else ()


def line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def smaller(cell: Cell, task: Task, calibration: Part) -> nn.Module:
    """The net of a cell: {"net", "side", "macs"}; the control is the original."""
    net, example = trained(cell["net"]), task.train.first(1).inputs
    if cell["side"] == CONTROL:
        return net
    if cell["side"] in OURS:
        batches, methods = [_call(part) for part in calibration.batches(BATCH)], OURS[cell["side"]]
        first, budget = _call(task.train.first(1)), {"macs": cell["macs"]}
        return taut.compress(net, first, budget=budget, data=batches, methods=methods, compare=False).model
    from opponent import Peer, opponent  # noqa: PLC0415 - needs a package of another author

    importance, overall = PEERS[cell["side"]]
    peer = Peer(importance, overall, task.loss, ("head",), HEADS[cell["net"]])
    return opponent(net, example, cell["macs"], peer, calibration.inputs, calibration.targets)


def _call(part: Part) -> Any:
    """Inputs as one gives them: a tensor where there is one argument."""
    return part.inputs[0] if len(part.inputs) == 1 else part.inputs


class Shelf:
    """Nets that were made, kept beside the results: what is lost is made again."""

    def __init__(self, folder: Path) -> None:
        """Of the results."""
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        """Where the net of a cell lies."""
        name = "-".join(str(value) for value in cell.values()).replace(", ", "-").replace(" ", "-")
        return self.folder / f"{name}.pt"

    def put(self, cell: Cell, net: nn.Module) -> nn.Module:
        """Keep a net."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(net, self.path(cell))
        return net

    def get(self, cell: Cell) -> nn.Module | None:
        """A net as it was kept, in eval mode."""
        path = self.path(cell)
        if not path.exists():
            return None
        net: nn.Module = torch.load(path, weights_only=False)  # our own file
        return net.eval()
