"""MFBP, the sources' claims: pruning by joint tri-factorization of all weight matrices, beside what it must beat.

    taut reproduce mfbp --data DIR [--quick] [--paper]

`--paper` runs the finished protocol with the source's own settings (no biases, weights of .01, RMSprop, rank 5).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from taut.manifest import taut_version
from taut.studies import Cell

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

import convs  # noqa: E402 - found through the line above: experiments are scripts, no package
import deep  # noqa: E402
import facts  # noqa: E402
import protocols  # noqa: E402
import robust  # noqa: E402
from lab import Lab  # noqa: E402
from mlps import BATCH  # noqa: E402

Part = tuple[list[Cell], Callable[[Lab, Cell], Mapping[str, Any]]]


def parts(quick: bool, paper: bool, seeds: int) -> dict[str, Part]:
    """Name -> runs, and what one of them does."""
    kind = "quick" if quick else "full"
    found: dict[str, Part] = {
        "deep": (deep.wanted(kind, seeds), deep.run),
        "finished": (protocols.wanted("paper" if paper else kind, seeds), protocols.finished),
        "convs": (convs.wanted(quick), convs.run),
        "draft": (protocols.curves(kind), protocols.draft),
        "robust": (robust.wanted(quick, seeds), robust.run),
        "facts": (facts.wanted(quick), facts.run),
    }
    if not quick:
        found["many"] = (deep.full(seeds), deep.run)
    return found


def mark() -> str:
    """Everything else that the runs depend on."""
    return f"taut {taut_version()}, torch {torch.__version__}, batch {BATCH}"
