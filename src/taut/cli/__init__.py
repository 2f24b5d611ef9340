"""The command line: the library's verbs, one command each. Nothing is computed here."""

from taut.cli.app import main

__all__ = ["main"]
