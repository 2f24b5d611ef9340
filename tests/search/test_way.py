"""The way of a budget to the integer program and back is short, and the one that the documentation tells."""

import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import taut
from cases import case
from taut import Budget
from taut.planning import knapsack

ROOT = Path(__file__).parents[2]
MOST = 12


def told():
    """The calls of the documentation, (file, function) to (file, function)."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    way = page.split("<!-- way -->")[1].split("<!-- end of way -->")[0]
    return [
        tuple(tuple(end.split()) for end in re.findall(r"`([\w/.]+ \w+)`", line)[:2])
        for line in way.strip().splitlines()
    ]


def stack(methods, monkeypatch, **budget):
    """Our functions between `compress` and the solver, outermost first."""
    found = []
    milp = knapsack.milp

    def seen(*args, **kwargs):
        package = Path(taut.__file__).parent
        frames = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(package)]
        names = [(Path(frame.filename).relative_to(package).as_posix(), frame.function) for frame in reversed(frames)]
        found.append(names[names.index(("search/compression.py", "compress")) :])
        return milp(*args, **kwargs)

    monkeypatch.setattr(knapsack, "milp", seen)
    model, example = case("vgg").make()
    taut.compress(model, example, budget=Budget(**budget), data=case("vgg").data(batches=2, size=16), methods=methods)
    return found


def crossings(names):
    return [(a, b) for a, b in pairwise(names) if a[0] != b[0]]


def test_the_documentation_tells_the_way(monkeypatch):
    ways = {tuple(crossings(names)) for names in stack(None, monkeypatch, macs=0.5)}
    assert len(ways) == 1
    (way,) = ways
    documented = told()
    assert len(documented) <= MOST
    assert [call for call in way if call not in documented] == []
    functions = {
        name for path in (ROOT / "src" / "taut").rglob("*.py") for name in re.findall(r"def (\w+)", path.read_text())
    }
    assert {end[1] for call in documented for end in call} <= functions


@pytest.mark.parametrize("methods", [None, ("channels", "svd")], ids=["ranks", "joint"])
def test_it_is_as_short_for_every_kind_of_plan(methods, monkeypatch):
    ways = [crossings(names) for names in stack(methods, monkeypatch, macs=0.5)]
    assert ways
    assert max(len(way) for way in ways) + 5 <= MOST  # beside what comes back: described, built, counted, 5 calls
    assert torch.is_grad_enabled()
