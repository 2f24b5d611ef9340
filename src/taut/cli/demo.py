"""`taut demo`: the whole way on real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taut.cli import signals
from taut.cli.output import show


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("taut-demo"),
    seed: Annotated[int, typer.Option(help="Seed of split, training and compression.")] = 0,
) -> None:
    """Train a small network on real digits, compress it, and show what it cost and brought."""
    from taut.demo import run

    signals.work_begins()
    for paragraph in run(out, seed):
        show(paragraph, "")
