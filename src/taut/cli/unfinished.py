"""What a run leaves in its folder until it is finished, so that `taut resume` can go on: what was asked for.

OUT/unfinished/request.json     sealed; plain settings, no import paths: those come from the command line only
OUT/unfinished/training/        the state of the training, if it had begun
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.cli.models import is_folder
from taut.core.atomic_folder import discard, recover
from taut.core.files import NEW, TRY, guarded, read, seal, unseal, write_atomic
from taut.errors import ArtifactError, CallError

if TYPE_CHECKING:
    from taut.recipe import Recipe

UNFINISHED, REQUEST, TRAINING = "unfinished", "request.json", "training"


def begin(out: Path, wish: Recipe, *, overwrite: bool) -> Path:
    """Note what is asked for; gives the folder for the state of the training.

    Raises:
        CallError: another run was not finished there.
        ArtifactError: the folder cannot be written.
    """
    folder, request = _folder(out), seal(_described(wish))
    trained = (folder / REQUEST).exists() and is_folder(folder / TRAINING)
    if trained and not overwrite and read(folder / REQUEST) != request:
        raise CallError(
            f"'{out}' holds an unfinished run of other settings. `taut resume` goes on with it; --overwrite drops it."
        )
    if overwrite:
        discard(folder)
    with guarded(f"Cannot write '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / REQUEST, request)
    return folder / TRAINING


def requested(out: Path) -> Recipe:
    """What the unfinished run in `out` was asked for.

    Raises:
        CallError: there is none.
        ArtifactError: the request is damaged.
    """
    path = _folder(out) / REQUEST
    if not path.exists():
        raise CallError(f"There is nothing to resume in '{out}': no run was left unfinished there.")
    from taut.recipe import Recipe

    return Recipe.of(unseal(read(path), REQUEST)["recipe"])


def only_unfinished(out: Path) -> bool:
    """Whether the folder holds nothing but an unfinished run."""
    if not is_folder(out):
        return False
    return {entry.name for entry in out.iterdir() if not entry.name.startswith((NEW, TRY))} == {UNFINISHED}


def end(out: Path) -> None:
    """The run is saved: nothing is left to resume."""
    with suppress(ArtifactError):  # the result is in place, and a run that is resumed would come to the same one
        discard(_folder(out))


def _folder(out: Path) -> Path:
    """The folder of the unfinished run, once what a killed `save` had set aside is back in its place."""
    from taut.artifact.manifest import OURS

    return recover(out, OURS) / UNFINISHED


def _described(wish: Recipe) -> dict[str, Any]:
    """The recipe as its own YAML keys."""
    recipe: dict[str, Any] = {"seed": wish.seed, "sensitivity": wish.sensitivity, "align": wish.align}
    if wish.compare is not None:
        recipe["compare"] = wish.compare
    if wish.output != "auto":
        recipe["output"] = wish.output
    if wish.mask is not None:
        recipe["mask"] = wish.mask
    if wish.budget is not None:
        recipe["budget"] = {key: value for key, value in asdict(wish.budget).items() if value is not None}
    if wish.methods is not None:
        from taut.methods import settings

        recipe["methods"] = [{method.name: settings(method)} for method in wish.methods]
    if wish.keep:
        recipe["keep"] = dict(wish.keep)
    if wish.finetune is not None:
        recipe["finetune"] = {key: value for key, value in asdict(wish.finetune).items() if value is not None}
    return {"recipe": recipe}
