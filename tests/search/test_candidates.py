"""Candidates made in advance: whatever the metric says, the search takes the decisions that it takes alone."""

import itertools
from concurrent.futures import Executor, Future

import pytest
import torch
from torch import nn

import taut
from cases import case, untouched
from taut.search.candidates import Ahead, Candidate
from taut.search.limits import DropLimit
from taut.types import Cost, Plan


def way(metric, tries):
    """The ratios that a bisection asks for, one after the other."""
    limit, asked = DropLimit(0.5), []
    for _ in range(tries):
        asked.append(limit.ratio)
        limit.correct(metric(limit.ratio))
    return asked


def judged(metric, lots):
    """Workers whose candidates are numbers, the last one of a lot first."""

    def results(items):
        lots.append([item["ratio"] for item in items])
        for place, item in reversed(list(enumerate(items))):
            value = metric(item["ratio"])
            score = taut.measure.Score("metric", value if value is not None else 0.0)
            yield place, None if value is None else Candidate(nn.Identity(), Plan(()), Cost(), Cost(), score)

    return results


@pytest.mark.parametrize("width", [1, 2, 3, 7])
@pytest.mark.parametrize("held", list(itertools.product((1.0, 0.0, None), repeat=3)))
def test_decisions_come_in_the_same_order(width, held):
    def metric(ratio):
        return held[int(ratio * 7.3) % 3]

    lots, limit, asked = [], DropLimit(0.5), []
    ahead = Ahead(judged(metric, lots), width)
    for tried in range(6):
        asked.append(limit.ratio)
        found = ahead(limit, 6 - tried)
        assert (None if found is None else found[1]) == metric(limit.ratio)
        limit.correct(None if found is None else found[1])
    assert asked == way(metric, 6)
    assert all(len(lot) <= width for lot in lots)
    assert len(lots) <= {1: 6, 2: 6, 3: 3, 7: 2}[width]
    assert len(lots[-1]) <= 2 ** (6 - asked.index(lots[-1][0])) - 1  # nothing is made for tries that do not come


class AtOnce(Executor):
    """Works while it is handed the work."""

    def __init__(self):
        self.handed = 0

    def submit(self, function, *arguments):
        self.handed += 1
        future = Future()
        future.set_result(function(*arguments))
        return future


def noisy(model):
    """At the top level, where workers find it; what it draws depends on nothing that was drawn before."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(64, 24, generator=generator), torch.rand(64, 5)
    torch.manual_seed(5)
    with torch.no_grad():
        return -float((model(x) - case("mlp").make()[0](x)).abs().mean() + 1e-3 * noise.mean())


@pytest.fixture
def given():
    model, example = case("mlp").make()
    return {"model": model, "example": example, "data": case("mlp").data(), "evaluate": noisy, "compare": False}


@pytest.mark.parametrize(("drop", "jobs"), [(0.05, AtOnce()), (0.3, AtOnce()), (0.2, 2)])
def test_whoever_works_finds_what_one_process_finds(given, tmp_path, drop, jobs):
    alone = taut.compress(**given, budget={"drop": drop})
    with untouched(given["model"]):
        result = taut.compress(**given, budget={"drop": drop}, jobs=jobs)
    assert jobs == 2 or jobs.handed == 9
    assert result.plan == alone.plan
    assert result.comparison.score_after == alone.comparison.score_after
    for folder, each in (("a", alone), ("b", result)):
        each.save(tmp_path / folder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_budgets_ask_no_worker(given):
    executor = AtOnce()
    taut.compress(**given, budget={"params": 0.5}, jobs=executor)
    taut.compress(**given, budget={"params": 0.5, "drop": 1e9}, jobs=executor)
    assert executor.handed == 0
    with pytest.raises(taut.CallError, match=r"client\.get_executor"):
        taut.compress(**given, budget={"drop": 0.1}, jobs="dask")


def test_a_layer_that_failed_is_no_matter_for_workers(given, monkeypatch):
    """What they make knows nothing of it, so the search goes on alone, to the same end."""
    built = []

    def once(plan):
        built.append(plan)
        return {"fc1": "as planted"} if len(built) == 2 else {}

    monkeypatch.setattr("taut.search.limits._rolled_back", once)
    alone = taut.compress(**given, budget={"drop": 0.3})
    built.clear()
    executor = AtOnce()
    result = taut.compress(**given, budget={"drop": 0.3}, jobs=executor)
    assert executor.handed in {3, 6}  # of 9
    assert result.plan == alone.plan


def test_an_error_of_the_metric_is_the_users(given):
    def fails(model):
        if model is not None and sum(p.numel() for p in model.parameters()) < 2000:
            raise ValueError("no more")
        return 1.0

    pytest.importorskip("cloudpickle")
    with pytest.raises(taut.DataError, match="evaluate raised ValueError: no more"):
        taut.compress(**(given | {"evaluate": fails}), budget={"drop": 0.1}, jobs=AtOnce())
