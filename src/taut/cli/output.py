"""Where text goes: results to stdout, remarks and errors to stderr."""

from __future__ import annotations

import typer


def show(*paragraphs: object) -> None:
    """Results, a blank line between two of them."""
    typer.echo("\n\n".join(str(paragraph).strip("\n") for paragraph in paragraphs))


def say(message: str) -> None:
    """One line beside the result."""
    typer.echo(message, err=True)


def one_line(text: str) -> str:
    """The same words on one line."""
    return " ".join(text.split())
