"""`save` and `load`: a folder that holds the model without pickle, and says itself when it is damaged.

model.safetensors   every tensor once
manifest.json       steps to rebuild the structure, ties, SHA-256 and size of the file above; sealed
comparison.json     what was measured; sealed, and not part of the promise of identical bytes

The folder is replaced as a whole (`taut.core.atomic_folder`), so that at any moment the old or the new one can be had.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256

from torch import Tensor, nn

from taut.artifact.manifest import (
    COMPARISON,
    FORMAT,
    MANIFEST,
    OURS,
    WEIGHTS,
    Manifest,
    Stamp,
    finite,
    has_manifest,
    read_manifest,
    sealed_comparison,
    taut_version,
)
from taut.artifact.provenance import before, history, recall, remember, same_layers
from taut.artifact.rebuild import replay, split
from taut.artifact.safetensors_io import fill, layouts, read_tensors, to_bytes
from taut.core.atomic_folder import present, reading, recover, rehearse, replacing, resolved
from taut.core.files import NEW, TRY, guarded, one_line, write
from taut.core.modes import quiet
from taut.core.user_code import call
from taut.errors import ArtifactError, CallError
from taut.measure.storage import stored_tensors
from taut.nn import bake, masked
from taut.structure.surgery import clone
from taut.structure.wrappers import unwrapped
from taut.types import Kept, Plan, Step


def save(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    comparison: object | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` so that `load` gives it back bit by bit; the same model and plan give the same bytes.

    Of a model that was made of one that taut had made, the folder holds the steps of both.

    Args:
        model: what `apply`, `finetune` or `compress` returned, plan in hand.
        plan: what was done to the original.
        folder: missing, empty, or one that taut saved. It is replaced as a whole: a kill or a full disk at any moment
            leaves the old content or the new. Files in it that are not taut's stay.
        comparison: `taut.compare`'s result, kept beside the model.
        overwrite: write also into a folder that taut did not save.

    Raises:
        CallError: the folder holds something else, or a step of the plan has no group.
        ModelError: a tensor cannot be stored without pickle.
        ArtifactError: the model is not what the plan makes, or the folder cannot be written.
    """
    if not isinstance(model, nn.Module) or not isinstance(plan, Plan):
        raise CallError(f"save needs a model and its Plan. Got {type(model).__name__} and {type(plan).__name__}.")
    model = unwrapped(model)
    earlier = before(model, plan)
    weights, manifest = _packed(bake(clone(model)) if masked(model) else model, recall(model, plan), earlier)
    content = {WEIGHTS: weights, MANIFEST: manifest}
    if comparison is not None:
        content[COMPARISON] = sealed_comparison(comparison)
    with replacing(folder, OURS) as new:
        _refuse_foreign(folder, overwrite)
        for name, data in content.items():
            write(new / name, data)


def load(folder: str | os.PathLike[str], base: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """The model that `save` wrote, in eval mode, with outputs equal bit by bit.

    Nothing is decomposed and nothing in the folder is executed. Train it further after `.train()`: Lightning, for one,
    leaves modules in the mode in which they come. Tensors have the dtype they were saved with and the
    device of the base; layers that were not rewritten keep the base's `requires_grad` and hooks.

    Args:
        folder: a folder that taut saved.
        base: builds the ORIGINAL architecture (its weights do not matter); or such a model, which is copied. Where the
            folder holds what several plans made one after the other, it may also build what the first of them made.

    Raises:
        CallError: `base` is neither a model nor builds one.
        ArtifactError: the folder is damaged, foreign or of another format, or the base does not fit.
        DataError: `base()` raised.
    """
    target = recover(folder, OURS)
    with reading(target, OURS):
        if not target.is_dir():
            raise ArtifactError(f"There is no folder '{folder}'.")
        manifest = read_manifest(target)
        tensors = read_tensors(target / WEIGHTS)
    with quiet():
        model = _rebuilt(base, manifest, tensors)
        earlier = _earlier(manifest)
        remember(model, replace(manifest.plan, steps=manifest.steps[earlier:]), manifest.steps[:earlier])
        return model.eval()


def load_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan of a saved folder, to read or to replay.

    Raises:
        ArtifactError: the folder is damaged or foreign.
    """
    target = recover(folder, OURS)
    with reading(target, OURS):
        return read_manifest(target).plan


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Find out before long work whether `save` will work: it is rehearsed, and nothing is left behind.

    Raises:
        CallError: it is a file, a mount point or the current folder, its name is too long, or it holds files and was
            not saved by taut.
        ArtifactError: the operating system does not allow something that `save` needs.
    """
    recover(folder, OURS)
    _refuse_foreign(folder, overwrite)
    rehearse(folder, OURS)


def is_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a folder, once what a killed `save` had set aside is back in its place."""
    return present(folder, OURS)


def _refuse_foreign(folder: str | os.PathLike[str], overwrite: bool) -> None:
    path = resolved(folder)
    with guarded(f"Cannot read '{folder}'"):
        if overwrite or not os.path.isdir(path):  # noqa: PTH112 - a name that is too long raises in Path
            return
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith((NEW, TRY))]
    if names and not has_manifest(path):
        raise CallError(
            f"The folder '{folder}' holds files that taut did not save. Choose another, or pass overwrite=True "
            f"(only {', '.join(sorted(OURS))} are replaced)."
        )


def _packed(model: nn.Module, plan: Plan, earlier: tuple[Step, ...]) -> tuple[bytes, bytes]:
    """The bytes of model.safetensors and of manifest.json.

    Args:
        model: to be saved.
        plan: that made it.
        earlier: steps that made the model of which the plan made it.
    """
    plan = finite(plan)
    ahead, steps, rolled_back = _held(model, plan, earlier)
    tensors, ties = stored_tensors(model)
    weights = to_bytes(tensors)
    files = {WEIGHTS: Stamp(sha256(weights).hexdigest(), len(weights))}
    orders = layouts(model, tensors)
    manifest = Manifest(FORMAT, taut_version(), files, ahead + steps, rolled_back, ties, orders, plan, len(ahead))
    try:
        return weights, manifest.to_bytes()
    except ValueError as error:
        raise CallError(f"The plan cannot be written as JSON: {one_line(error)}.") from None


def _held(
    model: nn.Module, plan: Plan, earlier: tuple[Step, ...]
) -> tuple[tuple[Step, ...], tuple[Step, ...], tuple[Kept, ...]]:
    """The steps that a model holds, earlier ones and those of the plan, and what was rolled back."""
    front = finite(Plan(earlier)).steps
    try:
        held, kept = split(model, replace(plan, steps=(*front, *plan.steps)))
    except ArtifactError:
        if not front:
            raise
        front, (held, kept) = (), split(model, plan)  # or the plan is not what made it
        warnings.warn(
            "The model of which the plan was made is not what taut had made of the original: something else was "
            "changed in between. The folder loads from the model that the plan was made of, as it was: keep that, too.",
            stacklevel=4,
        )
    ahead = tuple(step for place, step in held.items() if place < len(front))
    return ahead, tuple(held.values())[len(ahead) :], kept


def _rebuilt(base: Callable[[], nn.Module] | nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The saved model: of the original, or of what some of the steps made of it; which it is, the tensors tell.

    Raises:
        ArtifactError: neither all of the steps fit the base, nor those of the last plan, nor none.
    """
    model, steps = _built(base), manifest.steps
    known, refusals = history(model), list[ArtifactError]()
    ways = [steps, steps[_earlier(manifest) :], ()]
    if known and same_layers(steps[: len(known)], known):
        ways.insert(0, steps[len(known) :])
    given = bool(known or manifest.earlier)  # `base` may be a function that gives what its owner goes on with
    for way in (way for place, way in enumerate(ways) if way not in ways[:place]):
        model = _built(base) if refusals and not given else model
        try:
            return _filled(clone(model) if given else model, way, manifest, tensors)
        except ArtifactError as error:
            refusals.append(error)
    raise refusals[0]


def _earlier(manifest: Manifest) -> int:
    """How many of the steps made the model of which the plan was made; some versions wrote them and not how many."""
    return manifest.earlier or max(0, len(manifest.steps) - len(manifest.plan.steps))


def _filled(model: nn.Module, steps: tuple[Step, ...], manifest: Manifest, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A base in the structure that steps give it, with the saved values."""
    replay(model, steps)
    fill(model, tensors, manifest.ties, manifest.layouts)
    return model


def _built(base: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(base, nn.Module):
        return clone(unwrapped(base))
    if not callable(base):
        raise CallError(f"base must be a function that builds the original model. Got {type(base).__name__} instead.")
    model = call("base()", base)
    if not isinstance(model, nn.Module):
        raise CallError(f"base() must return a torch.nn.Module. It returned a {type(model).__name__} instead.")
    return unwrapped(model)
