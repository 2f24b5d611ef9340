"""What several plans made one after the other is saved whole: it loads from the original, and from what came first."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import taut
from taut import Plan, Step
from taut.artifact.checkpoint import load_plan
from taut.artifact.provenance import history
from taut.core.copying import NOTED
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


CHANGED = {
    "as it was": lambda: (nn.Linear(12, 32), nullcontext()),
    "something else": lambda: (
        nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 32)),
        pytest.warns(UserWarning, match="something else was changed in between"),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_somebody_changed_in_between_loads_from_that(name, tmp_path):
    first, _ = made(build(), svd("0", 6))
    first[0], said = CHANGED[name]()
    second, plan = made(first.eval(), svd("2", 4))
    with said:
        taut.save(second, plan, tmp_path / "changed")
    for base in (first, lambda: bare(first), lambda: first):
        assert torch.equal(taut.load(tmp_path / "changed", base)(X), second(X))


def test_a_base_that_is_neither_is_refused(tmp_path):
    second, plan = made(made(build(), svd("0", 6))[0], svd("2", 4))
    taut.save(second, plan, tmp_path / "twice")
    with pytest.raises(ArtifactError, match="does not fit"):
        taut.load(tmp_path / "twice", lambda: nn.Sequential(nn.Linear(12, 6)))


def fewer(net):
    return taut.whole(net, "channels", macs=0.8)


def zeros(net):
    return taut.whole(net, "magnitude", sparsity=0.5)


TWICE = {
    "channels": ([fewer], [fewer]),
    "channels and ranks": ([fewer], [fewer, svd("2", 2)]),
    "svd": ([svd("0", 6), svd("2", 6)], [svd("0.0", 3), svd("2.0", 3)]),
    "magnitude": ([zeros], [zeros]),
}


@pytest.mark.parametrize("name", TWICE)
def test_the_same_once_more_is_another_step(name, tmp_path):
    first, _ = made(build(), *TWICE[name][0])
    second, plan = made(first, *TWICE[name][1])
    wanted, kept = second(X), first(X)
    taut.save(second, plan, tmp_path / "twice")
    for base in (build, first, lambda: first, lambda: second, lambda: bare(first), lambda: bare(second)):
        loaded = taut.load(tmp_path / "twice", base)
        assert torch.equal(loaded(X), wanted)
    assert torch.equal(first(X), kept)
    assert torch.equal(second(X), wanted)
    third, plan = made(loaded, svd("4", 2))
    taut.save(third, plan, tmp_path / "third")
    for base in (build, first, second, lambda: bare(second)):
        assert torch.equal(taut.load(tmp_path / "third", base)(X), third(X))


def test_two_plans_as_one_and_no_plan_at_all_are_the_same_steps(tmp_path):
    first, one = made(build(), fewer)
    second, two = made(first, fewer)
    for name, plan in {"one": Plan((*one.steps, *two.steps)), "none": Plan(())}.items():
        taut.save(second, plan, tmp_path / name)
        for base in (build, first):
            assert torch.equal(taut.load(tmp_path / name, base)(X), second(X))


def bare(model):
    """The same structure, of which nothing is known: what a function of the user's builds."""
    model = copy.deepcopy(model)
    for module in model.modules():
        vars(module).pop(NOTED, None)
    return model


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    ema = AveragedModel(model)
    ema.update_parameters(model)
    return ema


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 - made right here
    "torch.save": stored,
    "averaged": averaged,
    "trained": lambda model: taut.finetune(
        model, None, None, [X], [X], schedule=(taut.Stage(epochs=0),), loss=lambda y, _: y.sum(), example=X
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_what_they_are_copies_of(name, tmp_path):
    first, _ = made(build(), fewer)
    second, plan = made(COPIES[name](first), svd("2", 3))
    taut.save(COPIES[name](second), plan, tmp_path / "twice")
    for base in (build, first):
        assert torch.equal(taut.load(tmp_path / "twice", base)(X), second(X))


def test_a_pickled_model_needs_no_taut():
    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            assert module.partition(".")[0] != "taut"
            return super().find_class(module, name)

    second, _ = made(made(build(), svd("0", 6))[0], svd("2", 4))
    again = Reader(io.BytesIO(pickle.dumps(second))).load()
    assert torch.equal(again(X), second(X))
    assert again.state_dict().keys() == second.state_dict().keys()
    assert history(again) == history(second)
