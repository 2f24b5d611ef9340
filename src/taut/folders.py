"""A folder that is replaced as a whole: at any moment, a kill included, the old one or the new one can be had.

    save:  write .taut-new-NAME, flush  ->  NAME to .taut-old-NAME  ->  .taut-new-NAME to NAME  ->  clear .taut-old-NAME

A kill before the second arrow leaves NAME as it was; between the second and the third, `.taut-old-NAME` is the
artifact and `restore` puts it back; after the third, NAME is the new one. Files in NAME that are not ours move along.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from taut.errors import ArtifactError, CallError
from taut.files import NEW, guarded, sync_folder

OLD = ".taut-old-"


def resolved(folder: str | os.PathLike[str]) -> Path:
    """The folder that is meant, absolute and without symbolic links, so that a rename replaces it and not a link.

    Raises:
        CallError: it is the root of the file system.
        ArtifactError: the links go round in a circle.
    """
    try:
        path = Path(folder).resolve()
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"Cannot use the folder '{folder}': {error}") from error
    if not path.name:
        raise CallError(f"'{folder}' cannot be replaced. Give a folder inside of it.")
    return path


@contextmanager
def replacing(target: Path, ours: Container[str]) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `target` if the block ends well.

    Args:
        target: a `resolved` path; a missing parent is made.
        ours: names that are not carried over from the old folder; everything else in it is.

    Raises:
        ArtifactError: the operating system refused something; `target` is as it was.
    """
    with guarded(f"Cannot write '{target}'"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent, exclusive=True):
            _recover(target, ours)
            new = target.with_name(NEW + target.name)
            _remove(new)
            try:
                new.mkdir()
                yield new
                _install(new, target)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _clear(target, ours)


@contextmanager
def reading(target: Path) -> Iterator[None]:
    """Hold off writers of `target`, after putting back what a killed one had set aside.

    Raises:
        ArtifactError: the operating system refused something.
    """
    with guarded(f"Cannot read '{target}'"):
        if not target.exists() and _aside(target).exists():
            with locked(target.parent, exclusive=True):
                if not target.exists():
                    _aside(target).rename(target)
        with locked(target.parent, exclusive=False):
            yield


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock of `folder`, which the system drops when the process dies; nothing where there are no locks."""
    if sys.platform == "win32":
        yield
        return
    import fcntl  # noqa: PLC0415 - POSIX only

    handle = -1
    with suppress(OSError):  # some network file systems have none: then writers must not race
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _aside(target: Path) -> Path:
    return target.with_name(OLD + target.name)


def _install(new: Path, target: Path) -> None:
    old, had = _aside(target), target.exists()
    if had and not os.access(target, os.W_OK):
        raise ArtifactError(f"Cannot write '{target}': the folder is read-only.")
    if had:
        shutil.copymode(target, new)
    sync_folder(new)
    try:
        if had:
            os.rename(target, old)  # noqa: PTH104 - one way to rename, one way to test its failure
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


def _recover(target: Path, ours: Container[str]) -> None:
    """Finish or undo what a killed writer left."""
    if not target.exists() and _aside(target).exists():
        _aside(target).rename(target)
    _clear(target, ours)


def _clear(target: Path, ours: Container[str]) -> None:
    """Move what is not ours from the old folder into the new one, and remove the old one."""
    old, trash = _aside(target), target.with_name(NEW + target.name)
    if not old.exists():
        return
    for entry in list(old.iterdir()):
        if entry.name not in ours and not os.path.lexists(target / entry.name):
            entry.rename(target / entry.name)
    with suppress(OSError):  # the new folder is in place: what cannot be tidied now is so at the next write
        _remove(trash)
        old.rename(trash)  # half removed, it must not look like something to restore
        shutil.rmtree(trash)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
