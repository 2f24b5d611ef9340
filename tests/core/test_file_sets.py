"""Files that belong together are all old or all new, whoever reads them, whatever happens while they are replaced."""

import errno
import os
from contextlib import suppress

import numpy as np
import pytest

from faults import failures, in_child, kills, stops
from taut.core import file_sets
from taut.core.files import locked

NAMES = ("net.xml", "net.bin")


def put(target, text, names=NAMES):
    """As `export` does: make the files where nobody looks, then put them in place."""
    with file_sets.staging(target, names) as folder:
        for name in names:
            (folder / name).write_bytes(text * (300 if name.endswith("bin") else 3))
        file_sets.install(folder, target, names)


def read(target, names=NAMES):
    """What a reader finds that knows nothing of us: None, or the text in all files."""
    if not target.exists():
        return None
    texts = {target.with_name(name).read_bytes()[:3] for name in names}
    assert len(texts) == 1, "the graph of one model beside the weights of another"
    return texts.pop()


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def settled(target, names=NAMES):
    """What is there after the next entry, in files of their own."""
    file_sets.recover(target, names)
    assert not any(target.with_name(name).is_symlink() for name in names)
    return read(target, names)


def no_links(*args, **kwargs):
    raise OSError(errno.EPERM, "no links here")


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here
    return tmp_path / "net.xml"


@pytest.mark.parametrize(("old", "ends"), [(b"old", kills), (b"old", stops), (None, stops)])
def test_killed_before_every_call_both_files_are_old_or_both_are_new(target, old, ends):
    if old is not None:
        put(target, old)
    seen, states = [], set()
    for _ in ends(lambda: put(target, b"new")):
        states.add(tuple(listing(target.parent)))
        found = read(target)  # directly, as OpenVINO does
        assert found in {old, b"new"}
        assert settled(target) == found
        seen.append(found)
        put(target, b"old" if old else b"new")
        if old is None:
            for name in NAMES:
                target.with_name(name).unlink()
        assert listing(target.parent) == (sorted(NAMES) if old else [])
    assert len(states) > 8
    assert seen == sorted(seen, key=lambda text: text == b"new"), "once new, a later kill must not bring back the old"
    assert seen[-1] == b"new"


def test_killed_before_every_call_of_the_recovery(target):
    """A recovery that is killed itself is finished by the next one."""
    put(target, b"old")
    stopped, seen = 0, set()
    for _ in stops(lambda: put(target, b"new")):
        found, state = read(target), (target.is_symlink(), target.with_suffix(".bin").is_symlink(), read(target))
        if target.with_name(".taut-now-net.xml").is_symlink() and state not in seen:
            seen.add(state)
            for _ in stops(lambda: file_sets.recover(target, NAMES)):
                assert read(target) == found
                stopped += 1
            assert settled(target) == found
        put(target, b"old")
    assert stopped > 20


@pytest.mark.parametrize("old", [b"old", None])
def test_failing_at_every_call_both_files_are_old_or_both_are_new(target, old):
    if old is not None:
        put(target, old)
    failed = 0

    def work():
        nonlocal failed
        try:
            put(target, b"new")
        except OSError:
            failed += 1

    for how in failures(work):
        found = read(target)
        assert found in {old, b"new"}
        if not how.startswith("from"):  # the disk works again: nothing waits for the next entry
            assert not {name[:10] for name in listing(target.parent)} & {".taut-now-", ".taut-old-", ".taut-new-"}, how
        assert settled(target) == found
        put(target, b"old")
        assert listing(target.parent) == sorted(NAMES)
        if old is None:
            for name in NAMES:
                target.with_name(name).unlink()
    assert failed > 40


def test_where_there_are_no_links_nothing_wrong_can_be_read(target, monkeypatch):
    monkeypatch.setattr(os, "symlink", no_links)
    put(target, b"old")
    for _ in stops(lambda: put(target, b"new")):
        found = read(target)
        assert found in {b"old", b"new", None}
        assert settled(target) == (found or b"old")
        put(target, b"old")
        assert listing(target.parent) == sorted(NAMES)


@pytest.mark.parametrize("old", [b"old", None])
def test_where_there_are_no_links_an_error_puts_the_old_files_back(target, monkeypatch, old):
    def work():
        os.symlink = no_links  # `failing` patches it, too
        with suppress(OSError):
            put(target, b"new")

    monkeypatch.setattr(os, "symlink", no_links)
    if old is not None:
        put(target, old)
    for how in failures(work):
        found = settled(target)
        assert found in {old, b"new"} or (how.startswith("from") and old is None)
        put(target, b"old")
        assert listing(target.parent) == sorted(NAMES)
        if old is None:
            for name in NAMES:
                target.with_name(name).unlink()


def test_where_a_file_has_one_name_only_the_old_one_is_copied(target, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    put(target, b"old")
    for _ in stops(lambda: put(target, b"new")):
        assert settled(target) in {b"old", b"new"}
        put(target, b"old")
    assert listing(target.parent) == sorted(NAMES)


def test_one_file_is_old_or_new(target):
    names = ("net.xml",)
    put(target, b"old", names)
    for _ in stops(lambda: put(target, b"new", names)):
        assert read(target, names) in {b"old", b"new"}
        put(target, b"old", names)
        assert listing(target.parent) == ["net.xml"]


def test_a_folder_of_a_live_owner_stays_and_that_of_a_dead_one_goes(target):
    with file_sets.staging(target, NAMES) as mine:
        (mine / "net.bin").write_bytes(b"half of it")
        in_child(lambda: put(target, b"two"))
        assert (mine / "net.bin").exists()
        assert read(target) == b"two"
    assert listing(target.parent) == sorted(NAMES)
    other = target.with_name(".taut-export-net.xml-b.xml-12345678")  # of another target, which begins alike
    other.mkdir()
    put(target, b"new")
    assert other.exists()


def test_openvino_reads_one_model_in_every_state(target):
    """The real reader, at every distinct state that a kill can leave."""
    openvino = pytest.importorskip("openvino")
    models = {}
    for value, size in ((1.0, 8), (2.0, 64)):
        folder = target.parent / str(size)
        folder.mkdir()
        x = openvino.opset13.parameter([size], np.float32)
        weights = openvino.opset13.constant(np.full(size, value, np.float32))
        openvino.save_model(openvino.Model([openvino.opset13.add(x, weights)], [x]), folder / "net.xml", False)
        models[value] = folder
    home = target.parent / "home"
    home.mkdir()
    target = home / "net.xml"

    def place(value):
        with file_sets.staging(target, NAMES) as folder:
            for name in NAMES:
                (folder / name).write_bytes((models[value] / name).read_bytes())
            file_sets.install(folder, target, NAMES)

    def value():
        model = openvino.Core().read_model(target)
        constant = next(op for op in model.get_ops() if op.get_type_name() == "Constant")
        return set(constant.data.tolist())

    place(1.0)
    seen = set()
    for _ in stops(lambda: place(2.0)):
        state = tuple(listing(home)), target.is_symlink(), target.with_suffix(".bin").is_symlink()
        if state not in seen:
            seen.add(state)
            assert value() in ({1.0}, {2.0})
        place(1.0)
    assert len(seen) > 6


def test_two_writers_wait_for_each_other(target):
    put(target, b"old")
    children = []
    for text in (b"one", b"two"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(20):
                    put(target, text)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert settled(target) in {b"one", b"two"}
    assert listing(target.parent) == sorted(NAMES)


def test_a_live_owner_is_told_by_its_lock(tmp_path):
    with locked(tmp_path, exclusive=True) as first, locked(tmp_path, exclusive=True, wait=False) as second:
        assert (first, second) == (True, False)
