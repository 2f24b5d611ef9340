"""The command line: the library's verbs, one command each. Nothing is computed here.

Torch takes seconds to import: commands import what they need when they run, so that help and errors need not wait.
"""


def main() -> None:
    """Entry point of the `taut` script."""
    from taut.cli import signals

    signals.watch()
    from taut.cli.app import run

    code = run()
    signals.over()
    raise SystemExit(code)


__all__ = ["main"]
