"""Bytes on disk: complete or absent, hashed, and read with suspicion."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from taut.core.text import unique_keys
from taut.errors import ArtifactError

LIMIT = 64 << 20
"""The largest JSON file, or safetensors header, that is read into memory."""

OPENING = b"{\n"

MODE = 0o644
NEW = ".taut-new-"
"""Prefix of what is not complete yet, or no longer wanted: the next write of the same name removes it."""

OLD = ".taut-old-"
"""Prefix of what is set aside while something else takes its name; a kill may leave it, and `recover` puts it back."""

TRY = ".taut-try-"
"""Prefix of what a rehearsal makes and removes."""


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn an error of the operating system into one line: `what`, its reason and the file.

    Raises:
        ArtifactError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename!r})" if error.filename else ""
        raise ArtifactError(f"{what}: {error.strerror or one_line(error)}{where}.") from error


def one_line(error: object, width: int = 300) -> str:
    """The first line of an error's message, cut to `width` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= width else lines[0][:width] + " ..."


def write(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet and flush it to the disk; mode 0644 less the umask."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), MODE)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace a file so that at any moment, a kill included, it holds the old bytes or the new.

    Raises:
        ArtifactError: it cannot be written; what was there is intact.
    """
    target = Path(path).resolve()
    new = target.with_name(NEW + target.name)
    with guarded(f"Cannot write '{path}'"), locked(target.parent, exclusive=True):
        new.unlink(missing_ok=True)
        try:
            write(new, data)
            os.replace(new, target)  # noqa: PTH105 - one way to write, one way to test its failure
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `folder`, which the system drops when the process dies.

    Args:
        folder: what is locked; not what it holds.
        exclusive: nobody else holds it; else others may share it.
        wait: until it is free; else another's lock is not taken.

    Yields:
        Whether it is held: some systems and network file systems have no locks, and there writers must not race.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl  # noqa: PLC0415 - POSIX only

    handle, held = -1, False
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        held = True
    try:
        yield held
    finally:
        if handle >= 0:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_figure(figure: Any, path: str | os.PathLike[str], **settings: Any) -> None:
    """Write a figure of matplotlib as `write_atomic` does, in the format that the suffix of `path` names.

    Raises:
        ArtifactError: it cannot be written; what was there is intact.
    """
    out = io.BytesIO()
    figure.savefig(out, format=Path(path).suffix.lstrip(".") or None, **settings)
    write_atomic(path, out.getvalue())


def read(path: Path, limit: int = LIMIT) -> bytes:
    """The bytes of a regular file.

    Raises:
        ArtifactError: it is missing, not a regular file, or larger than `limit`.
    """
    size = size_of(path)
    if size > limit:
        raise ArtifactError(f"'{path}' holds {size} bytes, more than the {limit} that are read.")
    with guarded(f"Cannot read '{path}'"):
        return path.read_bytes()


def size_of(path: Path) -> int:
    """The size of a regular file.

    Raises:
        ArtifactError: it is missing, or not a regular file (reading a pipe or a device could hang).
    """
    with guarded(f"Cannot read '{path}'"):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"'{path}' is not a regular file.")
    return found.st_size


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    with guarded(f"Cannot read '{path}'"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object: UTF-8, no repeated key, no NaN, no excessive depth.

    Raises:
        ArtifactError: it is not that; `what` names it.
    """
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{what} is nested too deep.") from None
    except ValueError as error:
        raise ArtifactError(f"{what} is not valid JSON: {one_line(error)}.") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{what} must be a JSON object. Got a {type(found).__name__} instead.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON whose first key is the checksum of all that follows; the content must not be empty.

    Raises:
        ValueError: the content holds NaN or Inf, or a key "checksum" of its own.
    """
    if "checksum" in content:
        raise ValueError("the key 'checksum' is taken")
    body = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode().removeprefix(OPENING)
    return _head(body) + body


def _head(body: bytes) -> bytes:
    return OPENING + f' "checksum": "{hashlib.sha256(body).hexdigest()}",\n'.encode()


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The content that `seal` wrote, every byte of it as it was written; parsed only after that is sure.

    Raises:
        ArtifactError: a byte differs, or it is not JSON.
    """
    body = data[len(_head(b"")) :]
    if data != _head(body) + body:
        raise ArtifactError(f"{what} is damaged or was not written by taut: its checksum does not match.")
    content = parse_json(data, what)
    del content["checksum"]
    return content
