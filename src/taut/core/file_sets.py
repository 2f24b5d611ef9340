"""Files of one folder that are replaced together: at any moment, a kill included, all are the old ones or all the new.

Two renames are not one step, and a graph beside the weights of another model is worse than none. So for a moment the
names are links that go through one link, `.taut-now-NAME`, and turning that one over is the step:

    stage, flush  ->  .taut-old-NAME/ holds the old files  ->  .taut-now-NAME to it  ->  NAME.* through .taut-now-NAME
    ->  .taut-now-NAME to the staged files  ->  NAME.* the files themselves  ->  clear .taut-now-NAME, .taut-old-NAME

`recover` makes files of what `.taut-now-NAME` points to. Where there are no links, the first file goes before the
others are replaced, and comes last: a kill leaves none that could be read with the wrong others, and `recover` puts
all back.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from taut.core.files import MODE, NEW, OLD, locked, remove, sync_folder

NOW, STAGED = ".taut-now-", ".taut-export-"

NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
"""What systems and file systems without symbolic links answer."""

RANDOM = 8
"""Letters that `tempfile` adds to a name."""


@contextmanager
def staging(target: Path, names: Sequence[str]) -> Iterator[Path]:
    """An empty folder beside the files, for what takes their place; those that a kill left are removed.

    Args:
        target: the first of the files.
        names: of all of them.

    Raises:
        OSError: the system refuses it.
    """
    with ExitStack() as stack:
        with locked(target.parent, exclusive=True):
            _settle(target, names)
            _sweep(target)
            folder = Path(tempfile.mkdtemp(prefix=f"{STAGED}{target.name}-", dir=target.parent))
            stack.enter_context(locked(folder, exclusive=True))  # tells others that its owner is alive
        try:
            yield folder
        finally:
            with suppress(OSError):  # an error of a moment may be over
                recover(target, names)
            if not _pointed_to(target, folder):
                shutil.rmtree(folder, ignore_errors=True)


def recover(target: Path, names: Sequence[str]) -> None:
    """Finish or undo what a killed `install` left.

    Args:
        target: the first of the files.
        names: of all of them.

    Raises:
        OSError: the system refuses it.
    """
    if any(os.path.lexists(_beside(target, prefix)) for prefix in (NOW, OLD)):
        with locked(target.parent, exclusive=True):
            _settle(target, names)


def install(staged: Path, target: Path, names: Sequence[str]) -> None:
    """Move the files out of `staged` to their places, all of them or none.

    Args:
        staged: a folder of `staging` that holds them.
        target: the first of them, which readers open to find the others.
        names: of all of them.

    Raises:
        OSError: the system refuses it; all files are the old ones, or all are new.
    """
    staged.chmod(0o755)  # for a moment others read through it
    for name in names:
        (staged / name).chmod(MODE)
        _flush(staged / name)
    sync_folder(staged)
    with locked(target.parent, exclusive=True):
        _settle(target, names)
        if len(names) == 1:
            os.replace(staged / target.name, target)  # noqa: PTH105 - one way to write, one way to test its failure
        else:
            _swap(staged, target, names)
        sync_folder(target.parent)


def _swap(staged: Path, target: Path, names: Sequence[str]) -> None:
    old, now = _beside(target, OLD), _beside(target, NOW)
    try:
        old.mkdir()
        for name in names:
            if os.path.lexists(target.with_name(name)):
                _keep(target.with_name(name), old / name)
        sync_folder(old)
        if not _linked(now, old.name):
            _replace_first_last(staged, target, names)
            return
        for name in names:
            _point(target.with_name(name), f"{now.name}/{name}")
        sync_folder(target.parent)
        _point(now, staged.name)
        sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            _settle(target, names)
        raise
    _settle(target, names)


def _linked(now: Path, text: str) -> bool:
    """Make the link; False where there are none."""
    try:
        _point(now, text)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def _replace_first_last(staged: Path, target: Path, names: Sequence[str]) -> None:
    first = not target.exists()
    target.unlink(missing_ok=True)
    try:
        for name in reversed(names):
            os.replace(staged / name, target.with_name(name))  # noqa: PTH105
    except BaseException:
        if first:  # there is no old one to put back
            for name in names:
                target.with_name(name).unlink(missing_ok=True)
        raise
    with suppress(OSError):
        remove(_beside(target, OLD))


def _settle(target: Path, names: Sequence[str]) -> None:
    """From any state that a kill can leave: the files themselves, all old or all new, and nothing else."""
    old, now = _beside(target, OLD), _beside(target, NOW)
    if now.is_symlink():
        source = target.with_name(os.readlink(now))  # noqa: PTH115
        for name in names:
            path = target.with_name(name)
            if path.is_symlink() and os.readlink(path) == f"{now.name}/{name}":  # noqa: PTH115
                _make_file(path, source / name)
        sync_folder(target.parent)
        now.unlink()
    elif (old / target.name).exists() and not os.path.lexists(target):
        for name in reversed(names):
            _make_file(target.with_name(name), old / name)
        sync_folder(target.parent)
    with suppress(OSError):  # the files are in place: what cannot be tidied now is so at the next write
        for left in (_beside(now, NEW), *(_beside(target.with_name(name), NEW) for name in names)):
            left.unlink(missing_ok=True)
        remove(old)


def _make_file(path: Path, source: Path) -> None:
    if source.exists():
        os.replace(source, path)  # noqa: PTH105
    else:
        path.unlink(missing_ok=True)


def _point(link: Path, text: str) -> None:
    """Make or replace a link in one step."""
    new = _beside(link, NEW)
    new.unlink(missing_ok=True)
    new.symlink_to(text)
    os.replace(new, link)  # noqa: PTH105


def _keep(path: Path, copy: Path) -> None:
    """A second name of the same file, or a copy where a file has one name only."""
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)
        _flush(copy)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sweep(target: Path) -> None:
    """Remove staged folders of the same target whose owner is dead; where there are no locks, nobody can tell."""
    prefix = f"{STAGED}{target.name}-"
    for entry in list(target.parent.iterdir()):
        if entry.name.startswith(prefix) and len(entry.name) == len(prefix) + RANDOM:
            with locked(entry, exclusive=True, wait=False) as held:
                if held:
                    shutil.rmtree(entry, ignore_errors=True)


def _pointed_to(target: Path, folder: Path) -> bool:
    now = _beside(target, NOW)
    return now.is_symlink() and os.readlink(now) == folder.name  # noqa: PTH115


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(prefix + path.name)
