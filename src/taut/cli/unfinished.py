"""What a run leaves in its folder until it is finished, so that `taut resume` can go on: what was asked for.

OUT/unfinished/request.json     sealed; plain settings, no import paths: those come from the command line only
OUT/unfinished/training/        the state of the training, if it had begun
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taut.errors import CallError
from taut.files import guarded, read, seal, unseal, write_atomic
from taut.methods import settings
from taut.recipe import Recipe

UNFINISHED, REQUEST, TRAINING = "unfinished", "request.json", "training"


def begin(out: Path, wish: Recipe, *, overwrite: bool) -> Path:
    """Note what is asked for; gives the folder for the state of the training.

    Raises:
        CallError: another run was not finished there.
        ArtifactError: the folder cannot be written.
    """
    folder, request = out / UNFINISHED, seal(_described(wish))
    trained = (folder / REQUEST).exists() and (folder / TRAINING).exists()
    if trained and not overwrite and read(folder / REQUEST) != request:
        raise CallError(
            f"'{out}' holds an unfinished run of other settings. `taut resume` goes on with it; --overwrite drops it."
        )
    with guarded(f"Cannot write '{folder}'"):
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / REQUEST, request)
    return folder / TRAINING


def requested(out: Path) -> Recipe:
    """What the unfinished run in `out` was asked for.

    Raises:
        CallError: there is none.
        ArtifactError: the request is damaged.
    """
    path = out / UNFINISHED / REQUEST
    if not path.exists():
        raise CallError(f"There is nothing to resume in '{out}': no run was left unfinished there.")
    return Recipe.of(unseal(read(path), REQUEST)["recipe"])


def only_unfinished(out: Path) -> bool:
    """Whether the folder holds nothing but an unfinished run."""
    return out.is_dir() and {entry.name for entry in out.iterdir()} == {UNFINISHED}


def end(out: Path) -> None:
    """The run is saved: nothing is left to resume."""
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _described(wish: Recipe) -> dict[str, Any]:
    """The recipe as its own YAML keys."""
    recipe: dict[str, Any] = {"seed": wish.seed, "sensitivity": wish.sensitivity, "align": wish.align}
    if wish.budget is not None:
        recipe["budget"] = {key: value for key, value in asdict(wish.budget).items() if value is not None}
    if wish.methods is not None:
        recipe["methods"] = [{method.name: settings(method)} for method in wish.methods]
    if wish.finetune is not None:
        recipe["finetune"] = {key: value for key, value in asdict(wish.finetune).items() if value is not None}
    return {"recipe": recipe}
