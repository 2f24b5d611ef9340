"""A folder is the old one or the new one, whatever happens while it is replaced."""

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time

import pytest

from faults import die, in_child
from taut.core.atomic_folder import reading, replacing, resolved
from taut.core.files import NEW, OLD, locked, write
from taut.errors import ArtifactError, CallError

OURS = frozenset({"a", "b"})
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def put(target, text):
    with replacing(target, OURS) as new:
        for name in sorted(OURS):
            write(new / name, text * 1000)


def refused(target):
    try:
        put(target, b"new")
    except ArtifactError as error:
        return str(error)
    return None


def content(target):
    with reading(target):
        found = {(target / name).read_bytes() for name in OURS}
    assert len(found) == 1, "one file is old, the other new"
    return found.pop()[:3]


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "small"
    put(folder, b"old")
    (folder / "model.onnx").write_bytes(b"the user's")
    return folder


def killed_at(target, count):
    """Whether a child that replaces `target` met its `count`-th call into the system, and died there."""
    left = [count]

    def hook(event, args):
        if event in EVENTS:
            left[0] -= 1
            if not left[0]:
                die()

    def work():
        sys.addaudithook(hook)
        put(target, b"new")

    return os.WIFSIGNALED(in_child(work))


def test_killed_at_every_step_leaves_the_old_folder_or_the_new(target):
    seen = []
    for count in range(1, 100):
        died = killed_at(target, count)
        assert (content(target)) in {b"old", b"new"}
        seen.append(content(target))
        put(target, b"old")
        assert names(target.parent) == ["small"]
        assert (target / "model.onnx").read_bytes() == b"the user's"
        if not died:
            break
    assert len(seen) > 15
    assert seen == sorted(seen, reverse=True), "once new, a later kill must not bring back the old one"
    assert seen[-1] == b"new"


def test_killed_in_the_middle_of_a_write(target):
    real = os.write

    def half(handle, data):
        real(handle, bytes(data[: len(data) // 2]))
        die()

    def work():
        os.write = half
        put(target, b"new")

    assert os.WIFSIGNALED(in_child(work))
    assert content(target) == b"old"
    put(target, b"new")
    assert names(target) == ["a", "b", "model.onnx"]


def test_killed_at_random_moments(target):
    source = random.Random(1)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            while True:
                put(target, b"new")
                put(target, b"old")
        time.sleep(source.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert content(target) in {b"old", b"new"}
    put(target, b"new")
    assert names(target.parent) == ["small"]
    assert names(target) == ["a", "b", "model.onnx"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "open", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_at_every_call_leaves_the_old_folder(target, monkeypatch, call, code):
    real = getattr(os, call)
    for count in range(1, 50):
        left = [count]

        def fail(*args, left=left, **kwargs):
            left[0] -= 1
            failing = not left[0]
            if failing and call != "close":  # close reports an error of an earlier write, and has closed
                raise OSError(code, os.strerror(code))
            result = real(*args, **kwargs)
            if failing:
                raise OSError(code, os.strerror(code))
            return result

        monkeypatch.setattr(os, call, fail)
        message = refused(target)
        monkeypatch.undo()
        if left[0] > 0:
            break
        # what may fail without an error: taking a lock, tidying up
        assert message is None or (os.strerror(code) in message and "\n" not in message)
        if message is None:
            put(target, b"old")
        assert names(target.parent)[-1] == "small"
        assert (target / "model.onnx").exists() or (target.with_name(OLD + "small") / "model.onnx").exists()
        put(target, b"old")
        assert names(target.parent) == ["small"]
    assert count > 1
    assert content(target) == b"new"


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir"])
def test_a_full_disk_before_the_swap_changes_nothing(target, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError, match="No space left"):
        put(target, b"new")
    monkeypatch.undo()
    assert content(target) == b"old"
    assert names(target.parent) == ["small"]


def test_a_real_limit_of_the_system_leaves_the_old_folder(target):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            put(target, b"new")
        except ArtifactError as error:
            os._exit(7 if "File too large" in str(error) else 8)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7
    assert content(target) == b"old"
    assert names(target.parent) == ["small"]


@pytest.mark.parametrize("which", ["itself", "parent"])
def test_a_read_only_folder_is_refused(target, which, monkeypatch):
    folder = target if which == "itself" else target.parent
    folder.chmod(0o555)
    if os.geteuid() == 0:
        # root may write everywhere: let the system answer as it answers others
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(folder))
        if which == "parent":
            pytest.skip("root may write into a read-only folder")
    try:
        with pytest.raises(ArtifactError, match=r"read-only|Permission denied"):
            put(target, b"new")
    finally:
        folder.chmod(0o755)
    assert content(target) == b"old"


def test_an_error_in_the_block_changes_nothing(target):
    def work():
        with replacing(target, OURS) as new:
            write(new / "a", b"new")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert content(target) == b"old"
    assert names(target.parent) == ["small"]


def test_files_of_others_and_the_mode_are_kept(target):
    (target / "sub").mkdir()
    (target / "sub" / "notes").write_text("x")
    target.chmod(0o750)
    put(target, b"new")
    assert content(target) == b"new"
    assert (target / "sub" / "notes").read_text() == "x"
    assert (target / "model.onnx").read_bytes() == b"the user's"
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


def test_a_link_to_the_folder_stays_a_link(target, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("small")
    put(resolved(link), b"new")
    assert link.is_symlink()
    assert content(target) == b"new"


def test_writers_wait_for_each_other(target):
    children = []
    for text in (b"one", b"two", b"six"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(10):
                    put(target, text)
                    content(target)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert content(target) in {b"one", b"two", b"six"}
    assert names(target.parent) == ["small"]


def test_without_locks_it_still_writes(target, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(target.parent, exclusive=True):
        pass
    put(target, b"new")
    assert content(target) == b"new"


def test_the_root_is_no_folder_to_replace():
    with pytest.raises(CallError, match="cannot be replaced"):
        resolved("/")


def test_a_half_removed_old_folder_is_not_put_back(target):
    shutil.copytree(target, target.with_name(NEW + "small"))
    shutil.rmtree(target)
    with pytest.raises(ArtifactError, match="No such file"), reading(target):
        (target / "a").read_bytes()
