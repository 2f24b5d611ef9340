"""`taut reproduce`: the studies of a checkout, each by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taut.cli import signals
from taut.cli.output import say, show
from taut.core.files import write_atomic
from taut.errors import CallError

BOUND_FAILED = 1


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A study; --list names them.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Every claim of the sources, and what was found.")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="The source's own protocol.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A reduced grid, within 5 minutes on 2 cores.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, where the study repeats itself.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with mnist/, fashion-mnist/, ...")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: taut-NAME]; with --list a Markdown file.")
    ] = None,
    experiments: Annotated[Path | None, typer.Option(help="Folder of studies, if not that of this checkout.")] = None,
) -> None:
    """Run a study of this project again, and check its stated bounds; exit 1 if one fails."""
    if data is not None and not data.is_dir():
        raise CallError(f"There is no data folder '{data}'.")
    from taut.studies.reproducing import find_experiments, studies
    from taut.studies.reproducing import reproduce as run_study

    signals.work_begins()
    folder = find_experiments(experiments)
    if listing:
        _list(folder, out)
        return
    if name is None:
        raise CallError(f"Which study? There are: {', '.join(studies(folder))}. --list shows what they check.")
    holds, target = run_study(name, experiments=folder, data=data, out=out, paper=paper, quick=quick, seeds=seeds)
    table = target / "table.md"
    if table.exists():
        show(table.read_text())
    say(f"Results are in {target}.")
    if not holds:
        say("error: a stated bound failed, or none could be tested.")
        raise typer.Exit(BOUND_FAILED)


def _list(folder: Path, out: Path | None) -> None:
    from taut.studies import claims
    from taut.studies.reproducing import studies

    sources = claims.read_sources(folder)
    if out is not None:
        write_atomic(out, claims.markdown(sources).encode())
        say(f"Written: {out}.")
        return
    show(f"Studies: {', '.join(studies(folder))}", claims.summary(sources), claims.listing(sources))
