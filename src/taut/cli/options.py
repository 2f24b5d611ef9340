"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory (the current folder is searched too), or a folder that taut saved (with --base).",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights of MODEL: a .safetensors file, or a state dict in a .pt file (read without pickle)."),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="PKG.MOD:FACTORY", help="What builds the original network of a folder that taut saved."),
]
TaskFile = Annotated[
    Path,
    typer.Option("--task", help="Python file with example(), evaluate(model) and, optionally, calibration()."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file with budget, methods, seed; options given here override it."),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="KEY=VALUE,...",
        help="params, macs, bytes (0.25 or 25% keeps a quarter; 100000, 1M, 500kB are absolute), latency (0.5: half "
        "the time, measured), drop (0.01: evaluate may fall by 0.01).",
    ),
]
MethodNames = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="NAME,...",
        help="Methods to choose from; `taut methods` lists them; 'low rank': those tried unasked, but channels.",
    ),
]
KeepNames = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="NAME[=SHARE]",
        help='Leave layers alone: a name, a glob ("head.*") or a kind (Conv2d); with =0.5 at least that share of '
        "them stays. May be repeated.",
        show_default=False,
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="WHAT",
        help="What is timed at the end: all (every installed runtime), torch, or none. [default: all]",
        show_default=False,
    ),
]
OutputText = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="WHAT",
        help="What of the model's output counts, and how it is read: logits, probabilities, sigmoid, values, the name "
        "or number of a part, or PART:KIND. [default: auto]",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]", show_default=False)]
