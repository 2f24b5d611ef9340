"""What several plans made one after the other is saved whole: it loads from the original, and from what came first."""

import copy

import pytest
import torch
from torch import nn

import taut
from taut import Plan, Step
from taut.artifact.checkpoint import load_plan
from taut.errors import ArtifactError


def build():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 6)).eval()


X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


def made(model, *steps):
    net = taut.trace(model, X)
    plan = Plan.of(net, [step(net) if callable(step) else step for step in steps])
    return taut.apply(model, plan, taut.observe(net, model, [X]), [X]), plan


def svd(name, rank):
    return Step((name,), "svd", {"rank": rank})


SECOND = {
    "another layer": svd("2", 4),
    "inside of the first": svd("0.1", 3),
    "channels": lambda net: taut.whole(net, "channels", macs=0.8),
    "masks": lambda net: taut.whole(net, "magnitude", sparsity=0.5),
}


@pytest.mark.parametrize("name", SECOND)
def test_all_steps_are_saved(name, tmp_path):
    first, _ = made(build(), svd("0", 6))
    second, plan = made(first, SECOND[name])
    taut.save(second, plan, tmp_path / "twice")
    wanted = second(X)
    for base in (build, build(), first, lambda: copy.deepcopy(first)):
        loaded = taut.load(tmp_path / "twice", base)
        assert torch.equal(loaded(X), wanted)
    assert load_plan(tmp_path / "twice").steps[0].layers == plan.steps[0].layers
    taut.save(loaded, load_plan(tmp_path / "twice"), tmp_path / "again")
    assert torch.equal(taut.load(tmp_path / "again", build)(X), wanted)


def test_a_loaded_model_is_one_that_was_made_too(tmp_path):
    first, plan = made(build(), lambda net: taut.whole(net, "channels", macs=0.7))
    taut.save(first, plan, tmp_path / "first")
    second, plan = made(taut.load(tmp_path / "first", build), svd("2", 2))
    taut.save(second, plan, tmp_path / "second")
    assert torch.equal(taut.load(tmp_path / "second", build)(X), second(X))
    assert torch.equal(taut.load(tmp_path / "second", lambda: taut.load(tmp_path / "first", build))(X), second(X))


def test_compressed_twice_and_where_nothing_is_left_to_do(tmp_path):
    given = {"methods": ["svd"], "compare": False}
    first = taut.compress(build(), X[:2], budget={"params": 0.8}, **given).model
    for budget in (0.8, 1.0):
        result = taut.compress(first, X[:2], budget={"params": budget}, **given)
        result.save(tmp_path / str(budget))
        assert torch.equal(taut.load(tmp_path / str(budget), build)(X), result.model(X))


def test_what_somebody_changed_in_between_loads_from_that(tmp_path):
    first, _ = made(build(), svd("0", 6))
    first[0] = nn.Linear(12, 32)
    second, plan = made(first.eval(), svd("2", 4))
    taut.save(second, plan, tmp_path / "changed")
    assert torch.equal(taut.load(tmp_path / "changed", lambda: first)(X), second(X))


def test_a_base_that_is_neither_is_refused(tmp_path):
    second, plan = made(made(build(), svd("0", 6))[0], svd("2", 4))
    taut.save(second, plan, tmp_path / "twice")
    with pytest.raises(ArtifactError, match="does not fit"):
        taut.load(tmp_path / "twice", lambda: nn.Sequential(nn.Linear(12, 6)))
