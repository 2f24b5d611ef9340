"""How a benchmark ends: results written, bounds printed, exit code 1 if one fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from taut.studies import Bound, write_results


def finish(path: Path, settings: Mapping[str, Any], results: Any, bounds: Sequence[Bound]) -> NoReturn:
    """Write a result file, print the bounds and leave the process: 0 if all hold, 1 otherwise.

    A run that tested no bound (reduced sizes) leaves with 0 and says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results(path, settings, results, bounds)
    print(f"\nwritten: {path.parent.name}/{path.name}")
    for bound in bounds:
        print(bound)
    if not bounds:
        print("no bound was tested")
    sys.exit(0 if all(bound.holds for bound in bounds) else 1)
