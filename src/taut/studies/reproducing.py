"""Finding and running a study of a checkout: experiments/NAME/run.py."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taut.core.atomic_folder import rehearse_within
from taut.core.extras import missing
from taut.errors import CallError, DataError, TautError

EXPERIMENTS, RUN = "experiments", "run.py"


def find_experiments(wish: Path | None = None) -> Path:
    """The folder of studies: `wish`, or `experiments` of the checkout that the current folder is part of.

    Raises:
        CallError: there is none.
    """
    if wish is not None:
        if not wish.is_dir():
            raise CallError(f"There is no folder of experiments '{wish}'.")
        return wish
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / EXPERIMENTS).is_dir() and any((folder / EXPERIMENTS).glob(f"*/{RUN}")):
            return folder / EXPERIMENTS
    raise CallError(
        "The studies are part of a checkout of taut, and there is none here or above: go into one, or name its folder "
        "with --experiments DIR."
    )


def studies(experiments: Path) -> list[str]:
    """Names of all studies."""
    return sorted(path.parent.name for path in experiments.glob(f"*/{RUN}"))


def load_study(experiments: Path, name: str) -> Callable[..., Any]:
    """`main` of a study.

    Raises:
        CallError: there is no such study, or it defines no main.
        DataError: importing it raised, for example because a package is missing.
    """
    path = experiments / name / RUN
    if name not in studies(experiments):
        raise CallError(f"There is no study '{name}'. There are: {', '.join(studies(experiments)) or 'none'}.")
    spec = importlib.util.spec_from_file_location(f"taut_study_{name.replace('-', '_')}", path.resolve())
    if spec is None or spec.loader is None:
        raise CallError(f"'{path}' cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except TautError:
        raise
    except Exception as error:
        raise DataError(f"Importing '{path}' failed: {type(error).__name__}: {error}") from error
    main: Callable[..., Any] | None = getattr(module, "main", None)
    if main is None or not callable(main):
        raise CallError(f"'{path}' must define main(data, out, paper, quick, seeds) -> bool.")
    return main


def _require(path: Path) -> None:
    """Find out before a study's first step whether the packages are here that its NEEDS = (...) names.

    Raises:
        CallError: one is missing.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "NEEDS" for t in node.targets):
            absent = missing(*ast.literal_eval(node.value))
            if absent is not None:
                raise CallError(f"The study '{path.parent.name}' needs a package: {absent}.")


def reproduce(  # noqa: PLR0913 - what a study's main takes
    name: str,
    *,
    experiments: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    paper: bool = False,
    quick: bool = False,
    seeds: int | None = None,
) -> tuple[bool, Path]:
    """Run a study.

    Args:
        name: folder in `experiments`.
        experiments: folder of studies; None: that of the checkout around the current folder.
        data: folder that is searched for data sets before the system's.
        out: for results.json, table.md and figures; None: taut-NAME in the current folder. Finished runs in it count.
        paper: the source's own protocol instead of the improved settings.
        quick: a reduced grid within 5 minutes.
        seeds: how many, where the study repeats itself; None: its own number.

    Returns:
        Whether at least one stated bound was tested and none failed, and the folder.
    """
    target = Path(f"taut-{name}") if out is None else out
    folder = find_experiments(experiments)
    if name in studies(folder):
        rehearse_within(target)
        _require(folder / name / RUN)
    main = load_study(folder, name)
    target.mkdir(parents=True, exist_ok=True)
    return bool(main(data, target, paper, quick, seeds)), target
