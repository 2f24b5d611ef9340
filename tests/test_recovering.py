"""What a killed write set aside is put back by whoever asks next; what would make a write impossible is found."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from faults import failures, in_child, kills, stops
from taut.errors import ArtifactError, CallError
from taut.files import NEW, OLD, TRY, write
from taut.folders import discard, present, reading, recover, rehearse, rehearse_within, replacing

OURS = frozenset({"a", "b"})


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here
    folder = tmp_path / "small"
    put(folder, b"old")
    (folder / "notes").write_text("the user's")
    return folder


def put(target, text):
    with replacing(target, OURS) as new:
        for name in sorted(OURS):
            write(new / name, text)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def content(target):
    texts = {(target / name).read_bytes() for name in OURS}
    assert len(texts) == 1, "one file is old, the other new"
    return texts.pop()


def aside(target):
    return target.with_name(OLD + target.name)


ENTRIES = {
    "recover": lambda target: recover(target, OURS),
    "present": lambda target: present(target, OURS),
    "reading": lambda target: reading(target, OURS).__enter__(),
    "recover what is inside": lambda target: recover(target / "front" / "points"),
    "rehearse": lambda target: rehearse(target, OURS),
    "rehearse within": lambda target: rehearse_within(target / "front"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_puts_back_what_was_set_aside(target, entry):
    target.rename(aside(target))
    ENTRIES[entry](target)
    assert content(target) == b"old"
    assert listing(target) == ["a", "b", "notes"]
    assert listing(target.parent) == ["small"]


def test_through_a_link_the_folder_is_put_back(target):
    link = target.with_name("link")
    link.symlink_to("small")
    target.rename(aside(target))
    assert present(link, OURS)
    assert content(link) == b"old"
    assert link.is_symlink()


@pytest.mark.parametrize(("entry", "ends"), [("recover", kills), *((entry, stops) for entry in ENTRIES)])
def test_killed_before_every_call_every_entry_finds_the_old_folder_or_the_new(target, entry, ends):
    seen = []
    for _ in ends(lambda: put(target, b"new")):
        ENTRIES[entry](target)
        seen.append(content(target))
        recover(target, OURS)
        assert (target / "notes").read_text() == "the user's"
        put(target, b"old")
        assert listing(target.parent) == ["small"]
        assert listing(target) == ["a", "b", "notes"]
    assert set(seen) == {b"old", b"new"}
    assert seen == sorted(seen, reverse=True)


def test_failing_at_every_call_with_all_later_ones(target):
    def work():
        with suppress(ArtifactError):
            put(target, b"new")

    for _ in failures(work):
        recover(target, OURS)
        assert content(target) in {b"old", b"new"}
        assert (target / "notes").read_text() == "the user's"
        put(target, b"old")
        assert listing(target.parent) == ["small"]


def test_a_recovery_that_is_killed_or_fails_is_finished_by_the_next(target):
    for between in (False, True):
        target.rename(aside(target))
        if between:  # others made a folder of this name in between
            (target / "unfinished").mkdir(parents=True)

        def work():
            with suppress(ArtifactError):
                recover(target, OURS)

        for ends in (stops, failures):
            for _ in ends(work):
                assert recover(target, OURS) == target
                assert content(target) == b"old"
                assert listing(target.parent) == ["small"]
                assert (target / "unfinished").exists() == between
                target.rename(aside(target))
                if between:
                    target.mkdir()
                    (aside(target) / "unfinished").rename(target / "unfinished")
        recover(target, OURS)


def test_a_folder_that_others_made_since_does_not_hide_the_old_one(target):
    target.rename(aside(target))
    target.mkdir()
    recover(target)  # even without knowing what belongs in it: it is empty
    assert content(target) == b"old"
    target.rename(aside(target))
    target.mkdir()
    (target / "other").write_text("kept")
    (target / f"{NEW}x").write_text("not complete")
    put(target, b"new")
    assert content(target) == b"new"
    assert listing(target) == ["a", "b", "notes", "other"]
    assert listing(target.parent) == ["small"]


def test_what_both_hold_is_said_and_nothing_is_lost(target):
    target.rename(aside(target))
    target.mkdir()
    (target / "notes").write_text("others'")
    for entry in (recover, rehearse, put):
        with pytest.raises(ArtifactError, match=r"both hold 'notes'.*move one of these away"):
            entry(target, b"new") if entry is put else entry(target, OURS)
    assert content(aside(target)) == b"old"
    (target / "notes").rename(target / "mine")
    assert recover(target, OURS) == target
    assert listing(target) == ["a", "b", "mine", "notes"]
    aside(target).mkdir()  # the same after the swap, where the folder is the new one
    (aside(target) / "notes").write_text("older")
    assert recover(target, OURS) == target
    with pytest.raises(ArtifactError, match="both hold 'notes'"):
        rehearse(target, OURS)
    assert (aside(target) / "notes").read_text() == "older"


def test_a_file_that_cannot_move_along_is_said_and_waits(target, monkeypatch):
    real = os.rename

    def busy(source, to):
        if Path(source).name == "notes":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(source))
        real(source, to)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(ArtifactError, match=r"is written, but what else was in it is still in '.taut-old-small'.*busy"):
        put(target, b"new")
    assert content(target) == b"new"
    recover(target, OURS)
    assert content(target) == b"new"
    monkeypatch.undo()
    recover(target, OURS)
    assert listing(target) == ["a", "b", "notes"]
    assert listing(target.parent) == ["small"]


def test_a_live_writer_between_its_renames_is_waited_for(target):
    ready, go = os.pipe(), os.pipe()

    def write_slowly():
        real = os.rename

        def rename(source, to):
            if to == target:
                os.write(ready[1], b"x")
                os.read(go[0], 1)
            real(source, to)

        os.rename = rename
        put(target, b"new")

    writer = os.fork()
    if writer == 0:
        try:
            write_slowly()
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    assert not target.exists()
    readers = []
    for entry in ENTRIES.values():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                entry(target)
                code = 0 if content(target) == b"new" else 2
            finally:
                os._exit(code)
        readers.append(child)
    time.sleep(0.1)
    assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in readers), "nobody took it for dead"
    os.write(go[1], b"x")
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [writer, *readers]] == [0] * 7
    assert content(target) == b"new"
    assert listing(target.parent) == ["small"]


def test_a_writer_killed_while_others_wait_is_undone(target):
    ready = os.pipe()

    def write_and_hang():
        real = os.rename

        def rename(source, to):
            if to == target:
                os.write(ready[1], b"x")
                time.sleep(60)
            real(source, to)

        os.rename = rename
        put(target, b"new")

    writer = os.fork()
    if writer == 0:
        write_and_hang()
        os._exit(0)
    os.read(ready[0], 1)
    reader = os.fork()
    if reader == 0:
        code = 1
        try:
            with reading(target, OURS):
                code = 0 if content(target) == b"old" else 2
        finally:
            os._exit(code)
    time.sleep(0.05)
    os.kill(writer, 9)
    os.waitpid(writer, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def test_discarding_is_all_or_nothing(target):
    for _ in stops(lambda: discard(target)):
        assert not target.exists() or content(target) == b"old"
        put(target, b"old")
        (target / "notes").write_text("the user's")
    discard(target)
    discard(target)
    assert listing(target.parent) == []


# Rehearsals


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
