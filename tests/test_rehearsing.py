"""What would make a write impossible is found before the work, and looking for it changes nothing."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from faults import failures, in_child
from taut.core.atomic_folder import rehearse, rehearse_within
from taut.core.files import TRY
from taut.errors import ArtifactError, CallError
from test_recovering import OURS, content, listing, put, target

__all__ = ["target"]


def untouched(folder):
    return sorted((path.relative_to(folder), path.stat().st_ino) for path in folder.rglob("*"))


def test_a_rehearsal_changes_nothing(target):
    (target / "sub" / "deep").mkdir(parents=True)
    before = untouched(target.parent)
    rehearse(target, OURS)
    rehearse(target.with_name("missing") / "deep", OURS)
    rehearse_within(target)
    rehearse_within(target / "new" / "deeper")
    assert untouched(target.parent) == before


def test_a_rehearsal_that_fails_leaves_nothing(target):
    before, messages = untouched(target.parent), []

    def work():
        for check in (rehearse, rehearse_within):
            try:
                check(target.parent / "x" / "y")
            except ArtifactError as error:
                messages.append(str(error))

    for failed in failures(work):
        how, _, call = failed.split()
        if how == "before" and call in {"mkdir", "write", "fsync", "rename"}:
            assert untouched(target.parent) == before, failed
        rehearse(target.parent / "x" / "y")  # what is left by an error of the removal itself goes
        rehearse_within(target.parent / "x" / "y")
        for folder in ("x/y", "x"):
            with suppress(FileNotFoundError):
                (target.parent / folder).rmdir()
    assert len(messages) > 20
    assert all("Input/output error" in message and "\n" not in message for message in messages)
    assert untouched(target.parent) == before


def test_names_fit_exactly_as_the_write_needs(target):
    for length in (244, 245, 246, 250, 300):
        folder = target.with_name("n" * length)
        if length <= 245:
            rehearse(folder)
            put(folder, b"new")
            continue
        with pytest.raises(CallError, match=r"too long.*shorter"):
            rehearse(folder)
        with pytest.raises((ArtifactError, CallError)):
            put(folder, b"new")
    with pytest.raises(CallError, match="too long"):
        rehearse_within(target, "n" * 256)


def test_what_cannot_be_replaced_is_refused(target, monkeypatch):
    (target.parent / "file").write_text("x")
    monkeypatch.chdir(target)
    for check in (rehearse, put):
        with pytest.raises(CallError, match="is a file"):
            check(target.with_name("file"), b"")
        with pytest.raises(CallError, match=r"current folder.*inside of it"):
            check(Path(), b"")
        with pytest.raises(CallError, match="Choose another"):
            check(target.with_name(".taut-new-small"), b"")
        with pytest.raises((CallError, ArtifactError), match=r"Not a directory|File exists"):
            check(target.with_name("file") / "small", b"")
    with pytest.raises(CallError, match="is a file"):
        rehearse_within(target.with_name("file"))


def test_a_read_only_folder_is_found_before(target, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as the system answers those who are not root
    with pytest.raises(ArtifactError, match="read-only"):
        rehearse(target, OURS)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
@pytest.mark.parametrize("name", ["small", "sub"])
def test_what_cannot_be_renamed_is_found_before(target, monkeypatch, code, name):
    """EBUSY is the answer for a mount point, EXDEV that for a folder of a container's image."""
    (target / "sub").mkdir()
    real = os.rename

    def rename(source, to):
        if Path(source).name == name:
            raise OSError(code, os.strerror(code), os.fspath(source))
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    words = r"mount point.*Give a folder inside of it" if name == "small" else r"sub' is a mount point.*another folder"
    with pytest.raises(CallError, match=words):
        rehearse(target, OURS)
    if name == "small":
        with pytest.raises(CallError, match=words):
            put(target, b"new")
        assert content(target) == b"old"
    assert listing(target.parent) == ["small"]


def test_a_folder_that_a_strange_file_system_does_rename_is_put_back(target, monkeypatch):
    real = os.rename

    def rename(source, to):
        if Path(to).name == f"{TRY}small":
            real(to, f"{to}.gone")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    rehearse(target, OURS)
    assert content(target) == b"old"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts need root")
def test_a_real_mount_point(target):
    """A bind mount within one file system, which no comparison of devices shows."""

    def work():
        code = 9
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):
                os._exit(5)
            (target.parent / "disk").mkdir()
            mount = ["mount", "--bind", str(target.parent / "disk"), str(target)]
            if subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode:
                os._exit(5)
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                os._exit(5)
            rehearse(target / "inside", OURS)
            rehearse_within(target)
            for check in (rehearse, put):
                with pytest.raises(CallError, match=r"mount point.*inside of it"):
                    check(target, OURS if check is rehearse else b"new")
            code = 0 if listing(target) == [] else 8
        finally:
            os._exit(code)

    code = os.waitstatus_to_exitcode(in_child(work))
    if code == 5:
        pytest.skip("this machine lets nobody mount")
    assert code == 0
    assert content(target) == b"old"


def test_without_locks_several_rehearse_at_once(target, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    (target.parent / f"{TRY}small").mkdir()
    (target.parent / f"{TRY}small" / "somebody").write_text("at work")
    rehearse(target, OURS)
    assert (target.parent / f"{TRY}small" / "somebody").exists()
