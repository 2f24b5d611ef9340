"""Files and JSON that are complete, unaltered, or refused in one line."""

import errno
import json
import os
import random
import stat
from contextlib import suppress

import pytest

from faults import failures, stops
from taut.core import files
from taut.errors import ArtifactError

CONTENT = {"steps": [{"layer": "conv\u00e9", "rank": 3, "damage": 1.25e-7}], "ties": {}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode_is_0644_less_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    files.write_atomic(tmp_path / "a", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    (tmp_path / f"{files.NEW}a").write_bytes(b"left by a kill")
    files.write_atomic(tmp_path / "a", b"one")
    files.write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_write_atomic_leaves_the_old_file_when_the_disk_fails(tmp_path, monkeypatch, call):
    files.write_atomic(tmp_path / "a", b"old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        files.write_atomic(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_write_atomic_at_every_call_leaves_the_old_bytes_or_the_new(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    target = tmp_path / "a"

    def work():
        with suppress(ArtifactError):
            files.write_atomic(target, b"new")

    for ends in (stops, failures):
        seen = set()
        files.write_atomic(target, b"old")
        for _ in ends(work):
            seen.add(target.read_bytes())
            files.write_atomic(target, b"old")
            assert names(tmp_path) == ["a"]
        assert seen == {b"old", b"new"}


def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    """The first must not put the half-written file of the second in place."""
    target, texts, children = tmp_path / "a", (b"1" * 100_000, b"2" * 90_000), []
    files.write_atomic(target, texts[0])
    for text in texts:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(40):
                    files.write_atomic(target, text)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    while children:
        assert target.read_bytes() in texts
        child, status = os.waitpid(children[-1], os.WNOHANG)
        if child:
            assert os.waitstatus_to_exitcode(status) == 0
            children.pop()
    assert names(tmp_path) == ["a"]


def test_a_figure_is_written_whole_in_the_format_of_its_suffix(tmp_path):
    class Figure:
        def savefig(self, out, **settings):
            out.write(repr(settings).encode())

    files.write_figure(Figure(), tmp_path / "a.svg", dpi=5)
    assert (tmp_path / "a.svg").read_bytes() == b"{'format': 'svg', 'dpi': 5}"


def test_write_atomic_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    files.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_write_survives_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    files.write(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_read_refuses_what_is_missing_large_or_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for name, words in (("none", "No such file"), ("pipe", "not a regular file"), ("large", "5 bytes")):
        with pytest.raises(ArtifactError, match=words):
            files.read(tmp_path / name, limit=4)


def test_sealed_json_round_trips():
    data = files.seal(CONTENT)
    assert files.unseal(data, "x") == CONTENT
    assert data == files.seal(dict(CONTENT))
    assert json.loads(data)["steps"] == CONTENT["steps"]


def test_a_key_that_the_seal_needs_is_refused():
    with pytest.raises(ValueError, match="checksum"):
        files.seal({"a": 1, "checksum": "mine"})


def test_every_bit_flip_and_truncation_of_sealed_json_is_detected():
    data = files.seal(CONTENT)
    damaged = [data[:end] for end in range(len(data))]
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for bad in damaged:
        with pytest.raises(ArtifactError):
            files.unseal(bad, "x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' is repeated"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "Infinity is not a number"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_bad_json_is_refused_in_one_line(data, words):
    with pytest.raises(ArtifactError, match=words) as caught:
        files.parse_json(data, "x.json")
    assert "\n" not in str(caught.value)
    assert "x.json" in str(caught.value)


def test_random_bytes_are_refused():
    source = random.Random(0)
    for _ in range(200):
        with pytest.raises(ArtifactError):
            files.unseal(source.randbytes(source.randrange(200)), "x")
