"""A folder that is replaced as a whole: at any moment, a kill included, the old one or the new one can be had.

    save:  write .taut-new-NAME, flush  ->  NAME to .taut-old-NAME  ->  .taut-new-NAME to NAME  ->  clear .taut-old-NAME

A kill before the second arrow leaves NAME as it was; between the second and the third, `.taut-old-NAME` is the
artifact; after the third, NAME is the new one. Files in NAME that are not ours move along. `recover` puts back what a
kill left aside: whoever asks whether a folder is there, or what is in it, calls it first, or `present` or `reading`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from taut.core.files import NEW, OLD, TRY, guarded, locked, one_line, remove, sync_folder, write
from taut.errors import ArtifactError, CallError

LONGEST = "training.safetensors"
"""The longest name of a file that is written into such a folder."""


def resolved(folder: str | os.PathLike[str]) -> Path:
    """The folder that is meant, absolute and without symbolic links, so that a rename replaces it and not a link.

    Raises:
        CallError: it is the root of the file system.
        ArtifactError: the links go round in a circle.
    """
    path = _absolute(folder)
    if not path.name:
        raise CallError(f"'{folder}' cannot be replaced. Give a folder inside of it.")
    return path


def _absolute(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"Cannot use the folder '{folder}': {error}") from error


def recover(folder: str | os.PathLike[str], ours: Container[str] | None = None) -> Path:
    """Put back what a killed writer had set aside: the folder itself, and every folder that it lies in.

    A writer that is alive is waited for. Where nothing was left aside, nothing is touched.

    Args:
        folder: need not be there.
        ours: names that are not carried over into a new folder; None leaves what is not carried over yet.

    Returns:
        The folder, absolute and without symbolic links.

    Raises:
        ArtifactError: what was set aside cannot be put back.
    """
    target = _absolute(folder)
    for path in (*reversed(target.parents), target):
        if not path.name or not os.path.lexists(_aside(path)):
            continue
        own = ours if path == target else None
        what = f"'{path}' was set aside as '{_aside(path).name}' by a write that was killed, and cannot be put back"
        with guarded(what), locked(path.parent, exclusive=True):
            _put_back(path, own)
            if own is not None:
                with suppress(OSError, ArtifactError):  # the folder is in place: the next write says what is wrong
                    _clear(path, own)
    return target


def present(folder: str | os.PathLike[str], ours: Container[str] | None = None) -> bool:
    """Whether the folder is there, once what a killed writer had set aside is put back."""
    # looked for twice, for a writer that is alive may have been between its two renames the first time
    return any(recover(folder, ours).is_dir() for _ in range(2))


@contextmanager
def replacing(folder: str | os.PathLike[str], ours: Container[str]) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` if the block ends well.

    Args:
        folder: a missing parent is made.
        ours: names that are not carried over from the old folder; everything else in it is.

    Raises:
        CallError: the folder cannot be replaced, such as a mount point.
        ArtifactError: the operating system refused something. The folder is as it was; or, if the message says that it
            is written, new, and files of others that were in it are still beside it.
    """
    target = recover(resolved(folder), ours)
    _refuse(target)
    with guarded(f"Cannot write '{target}'"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent, exclusive=True):
            _put_back(target, ours)
            _clear(target, ours)
            new = target.with_name(NEW + target.name)
            for left in (new, target.with_name(TRY + target.name)):
                remove(left)
            try:
                new.mkdir()
                yield new
                _install(new, target)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            with guarded(
                f"'{target}' is written, but what else was in it is still in '{_aside(target).name}' beside it"
            ):
                _clear(target, ours)


@contextmanager
def reading(folder: str | os.PathLike[str], ours: Container[str] | None = None) -> Iterator[None]:
    """Hold off writers of `folder`, after putting back what a killed one had set aside.

    Raises:
        ArtifactError: the operating system refused something.
    """
    with guarded(f"Cannot read '{folder}'"):
        while True:
            target = recover(folder, ours)
            with locked(target.parent, exclusive=False):
                if _hidden(target, ours):  # the writer that we waited for was killed between its renames
                    continue
                yield
                return


def discard(folder: Path) -> None:
    """Remove a folder, so that a kill leaves the whole of it or nothing under its name."""
    trash = folder.with_name(NEW + folder.name)
    with guarded(f"Cannot remove '{folder}'"):
        remove(trash)
        if folder.exists():
            folder.rename(trash)
            shutil.rmtree(trash)


def rehearse(folder: str | os.PathLike[str], ours: Container[str] = ()) -> None:
    """Find out before long work whether `replacing` will work; nothing is left behind.

    Raises:
        CallError: the folder is a file, a mount point, the current folder, or its name is too long.
        ArtifactError: the operating system does not allow something that `replacing` needs.
    """
    target = recover(resolved(folder), ours)
    _refuse(target)
    with _rehearsal(target.parent, TRY + target.name) as trial:
        _clear(target, ours)
        if target.is_dir():
            _refuse_read_only(target)
            _try_rename(target, trial, f"Give a folder inside of it, such as '{target / 'small'}'.")
            for entry in target.iterdir():  # it moves along
                if entry.is_dir() and not entry.is_symlink():
                    _try_rename(entry, trial, f"Give another folder than '{target}'.")


def rehearse_within(folder: str | os.PathLike[str], name: str = TRY + LONGEST) -> None:
    """Find out before long work whether files can be written into a folder, made if missing; nothing is left behind.

    Args:
        folder: where the files will be.
        name: as long as the longest name there, temporary ones included.

    Raises:
        CallError: the folder is a file, or the name is too long.
        ArtifactError: the operating system does not allow it.
    """
    target = recover(folder)
    if target.exists() and not target.is_dir():
        raise CallError(f"'{folder}' is a file. Give a folder.")
    with _rehearsal(target, name):
        pass


@contextmanager
def _rehearsal(parent: Path, name: str) -> Iterator[Path]:
    """A folder `name` in `parent` with a file and a folder in it, each made as a write will make them."""
    with guarded(f"Cannot write into '{parent}'"), _made(parent), locked(parent, exclusive=True) as held:
        trial = parent / (name if held else f"{TRY}{uuid4().hex}")  # without a lock others may rehearse, too
        try:
            with suppress(FileNotFoundError):
                os.lstat(parent / name)  # says whether a name of this length is possible
            remove(trial)
            trial.mkdir()
            write(trial / LONGEST, b"rehearsal")
            (trial / "before").mkdir()
            (trial / "before").rename(trial / "after")  # some file systems cannot rename folders
            yield trial
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise CallError(
                f"The name '{one_line(name, 40)}' is too long for '{parent}': choose a shorter one."
            ) from None
        finally:
            shutil.rmtree(trial, ignore_errors=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Inside the block the folder is there; what of it was made for that is removed again."""
    made = []
    try:
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            with suppress(FileExistsError):
                path.mkdir()
                made.append(path)
        yield
    finally:
        for path in reversed(made):
            with suppress(OSError):  # somebody else uses it by now
                path.rmdir()


def _try_rename(path: Path, full: Path, remedy: str) -> None:
    """Ask for a rename that must fail because `full` holds something; what cannot be renamed at all fails otherwise."""
    try:
        _set_aside(path, full, remedy)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    else:
        os.rename(full, path)  # noqa: PTH104 - a strange file system: nothing may be lost even there


def _set_aside(path: Path, name: Path, remedy: str) -> None:
    try:
        os.rename(path, name)  # noqa: PTH104 - one way to rename, one way to test its failure
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.EXDEV}:
            raise
        raise CallError(
            f"'{path}' is a mount point, or a fixed part of a container, and cannot be replaced. {remedy}"
        ) from error


def _refuse(target: Path) -> None:
    """What can be known to go wrong without trying."""
    if os.path.lexists(target) and not os.path.isdir(target):  # noqa: PTH112 - a name that is too long raises in Path
        raise CallError(f"'{target}' is a file. Give a folder.")
    if target.name.startswith((NEW, OLD, TRY)):
        raise CallError(f"'{target.name}' is a name that is used while another folder is written. Choose another.")
    with suppress(OSError):
        if target.samefile("."):
            raise CallError(
                f"'{target}' is the current folder: what works in it would lose it, so it is not replaced. Give a "
                "folder inside of it."
            )


def _refuse_read_only(target: Path) -> None:
    if not os.access(target, os.W_OK):
        raise ArtifactError(f"Cannot write '{target}': the folder is read-only.")


def _aside(target: Path) -> Path:
    return target.with_name(OLD + target.name)


def _hidden(target: Path, ours: Container[str] | None) -> bool:
    """Whether what was set aside is the artifact: nothing is in its place, or what others put there since."""
    if not target.name or not os.path.lexists(_aside(target)):
        return False
    if not os.path.lexists(target):
        return True
    if not target.is_dir():
        return False
    names = [entry.name for entry in target.iterdir()]
    return not names if ours is None else not any(name in ours for name in names)


def _put_back(target: Path, ours: Container[str] | None) -> None:
    """Undo a swap that was killed half-way, with the lock held; what others put in its place since moves along."""
    old = _aside(target)
    if not _hidden(target, ours):
        return
    if os.path.lexists(target):
        _move_all(target, old, ())
        target.rmdir()
    old.rename(target)
    sync_folder(target.parent)


def _install(new: Path, target: Path) -> None:
    old, had = _aside(target), target.exists()
    if had:
        _refuse_read_only(target)
        shutil.copymode(target, new)
    sync_folder(new)
    try:
        if had:
            _set_aside(target, old, f"Give a folder inside of it, such as '{target / 'small'}'.")
        os.rename(new, target)  # noqa: PTH104
        sync_folder(target.parent)
    except BaseException:
        _undo(new, target, old)
        raise


def _undo(new: Path, target: Path, old: Path) -> None:
    if not new.exists():
        target.rename(new)
    if old.exists():
        old.rename(target)


def _move_all(source: Path, to: Path, ours: Container[str]) -> None:
    """Move what is not ours; what is not complete is removed."""
    for entry in list(source.iterdir()):
        if entry.name.startswith((NEW, TRY)):
            remove(entry)
        elif entry.name not in ours:
            if os.path.lexists(to / entry.name):
                raise ArtifactError(
                    f"'{source}' and '{to}' both hold '{entry.name}', after a write that was killed: move one of these "
                    "away."
                )
            entry.rename(to / entry.name)


def _clear(target: Path, ours: Container[str]) -> None:
    """Move what is not ours from the old folder into the new one, and remove the old one."""
    old, trash = _aside(target), target.with_name(NEW + target.name)
    if not old.exists():
        return
    _move_all(old, target, ours)
    with suppress(OSError):  # the new folder is in place: what cannot be tidied now is so at the next write
        remove(trash)
        old.rename(trash)  # half removed, it must not look like something to restore
        shutil.rmtree(trash)
