"""What a killed write set aside is put back by whoever asks next, and nothing else is touched."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from faults import failures, kills, stops
from taut.core.atomic_folder import discard, present, reading, recover, rehearse, rehearse_within, replacing
from taut.core.files import NEW, OLD, write
from taut.errors import ArtifactError

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
