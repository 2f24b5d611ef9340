"""The commands of `taut`, in the order in which one meets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from taut.cli import failures
from taut.cli.compressing import compress, explore, resume
from taut.cli.demo import demo
from taut.cli.doctor import doctor
from taut.cli.exporting import export
from taut.cli.looking import inspect, methods
from taut.cli.measuring import benchmark, evaluate
from taut.cli.reproducing import reproduce
from taut.cli.studying import study
from taut.core.showing import showing

app = typer.Typer(
    help="Make a trained PyTorch network smaller and faster, and prove it.",
    epilog="Exit codes: 0 done, 2 the call is wrong, 3 the budget cannot be met, 4 the data or the model is bad.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (
    demo,
    inspect,
    explore,
    compress,
    resume,
    evaluate,
    benchmark,
    export,
    study,
    reproduce,
    methods,
    doctor,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"taut {version('taut')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make a trained PyTorch network smaller and faster, and prove it."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the return value is the exit code, and errors are one line on stderr."""
    command = typer.main.get_command(app)

    def invoke() -> object:
        with showing(piped=True):
            return command.main(args=arguments, prog_name="taut", standalone_mode=False)

    return failures.guarded(invoke)
