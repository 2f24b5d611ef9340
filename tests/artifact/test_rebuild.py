"""A plan's steps against a model: which of them it holds, and the same structure again from the plan alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from taut.artifact.rebuild import chain_of, replay, split, with_sides
from taut.errors import ArtifactError, CallError
from taut.nn import Reorder
from taut.planning.application import apply_plan
from taut.types import Plan, Step

X = torch.linspace(-1, 1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)


def net():
    torch.manual_seed(1)
    layers = nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 10)
    return nn.Sequential(*layers).eval()


def done(*steps):
    """A net, what the steps made of it, and the plan that was carried out."""
    model = net()
    traced = taut.trace(model, X)
    asked = [replace(step, allow_growth=True) for step in steps]
    return model, *apply_plan(model, Plan.of(traced, asked), taut.observe(traced, model))


def svd(layer, rank):
    return Step((layer,), "svd", {"rank": rank})


STEPS = svd("0", 3), svd("2", 2), Step(("4",), "lowrank_sparse", {"rank": 2})
INSIDE = Step(("0",), "tucker", {"rank_in": 2, "rank_out": 3}), svd("4", 4)


@pytest.mark.parametrize("steps", [STEPS, INSIDE, ()], ids=["three", "tucker", "none"])
def test_a_model_holds_the_steps_that_made_it(steps):
    _, small, plan = done(*steps)
    assert split(small, plan) == (dict(enumerate(plan.steps)), ())


def test_steps_that_were_rolled_back_are_told_apart_by_shapes():
    model, small, plan = done(*STEPS)
    small[2] = model[2]
    held, (kept,) = split(small, plan)
    assert held == {0: plan.steps[0], 2: plan.steps[2]}
    assert (kept.layer, kept.cost) == ("2", plan.steps[1].before)
    assert kept.reason == "svd was rolled back, or would not shrink it: the layer has its original shape"
    assert split(model, plan)[0] == {}
    assert [one.layer for one in split(model, replace(plan, steps=plan.steps[:2]))[1]] == ["0", "2"]


def test_a_step_on_what_an_earlier_one_built_is_found_inside():
    model, small, plan = done(svd("0", 3))
    traced = taut.trace(small, X)
    (inner,) = (layer.name for layer in traced.layers if layer.name.startswith("0.") and layer.kernel == (1, 1))
    second = Plan.of(traced, [replace(svd(inner, 2), allow_growth=True)])
    smaller, again = apply_plan(small, second, taut.observe(traced, small))
    both = replace(plan, steps=(*plan.steps, *again.steps))
    assert split(smaller, both) == (dict(enumerate(both.steps)), ())
    assert split(small, plan) == (dict(enumerate(plan.steps)), ())
    replay(model, both.steps)
    assert repr(model) == repr(smaller)


def test_a_layer_that_no_step_explains_is_named_with_its_shapes():
    _, small, plan = done(*STEPS)
    small[4] = nn.Linear(96, 11)
    with pytest.raises(ArtifactError, match=r"'4' is neither .*lowrank_sparse.*10x96.*weight 11x96, bias 11"):
        split(small, plan)


def test_steps_without_the_layers_shapes_are_call_errors():
    _, small, plan = done(*STEPS)
    bare = replace(plan, steps=(replace(plan.steps[0], group=None),))
    with pytest.raises(CallError, match=r"svd on layer '0' does not know the layer's shape: make the plan"):
        split(small, bare)
    swapped = replace(plan, steps=(replace(plan.steps[0], group=plan.steps[1].group),))
    with pytest.raises(CallError, match=r"on layers \('0',\) has the group of \('2',\)"):
        split(small, swapped)


@pytest.mark.parametrize("steps", [STEPS, INSIDE], ids=["three", "tucker"])
def test_the_structure_is_built_again_from_the_steps_alone(steps):
    model, small, plan = done(*steps)
    base = net()
    replay(base, plan.steps)
    assert repr(base) == repr(small)
    base.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(base(X), small(X))
    assert not torch.equal(base(X), model(X))


def test_the_new_layers_stand_where_the_old_ones_did():
    _, _, plan = done(svd("4", 4))
    base = net().to("meta")
    replay(base, plan.steps)
    assert {p.device.type for p in base.parameters()} == {"meta"}
    with pytest.raises(ArtifactError, match=r"The base does not fit the saved folder: .*'4'"):
        replay(nn.Sequential(nn.Linear(2, 2)), plan.steps)


def test_a_base_with_other_groups_does_not_fit():
    _, _, plan = done(svd("2", 2))
    base = net()
    base[2] = nn.Conv2d(4, 6, 3, groups=1)  # the same shape of weight
    with pytest.raises(ArtifactError, match="'2' has 1 groups in the base and 2 in the folder"):
        replay(base, plan.steps)


@pytest.mark.parametrize("settings", [{"rank": 10**9}, {"rank": "3"}, {"ranks": 3}])
def test_settings_that_build_nothing_are_artifact_errors(settings):
    _, _, plan = done(svd("0", 3))
    step = replace(plan.steps[0], settings=settings)
    with pytest.raises(ArtifactError, match=r"rank"):
        replay(net(), [step])


def test_the_chain_of_a_step_is_found_before_and_after_a_later_one():
    _, small, plan = done(svd("0", 3))
    chain = chain_of(small, plan.steps[0])
    assert chain is small[0]
    chain[1] = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1))
    assert chain_of(small, plan.steps[0]) is chain
    with pytest.raises(CallError, match="'0' was not rewritten by svd"):
        chain_of(net(), plan.steps[0])


def clustered():
    """A convolution in clusters alone in its net: nothing beside it can take over the orders of its channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Conv2d(4, 8, 3, padding=1)).eval()
    traced = taut.trace(model, X)
    step = Step(("1",), "outer", {"inputs": 2, "outputs": 2, "rank": 1}, allow_growth=True)
    return (model, *apply_plan(model, Plan.of(traced, [step]), taut.observe(traced, model)))


def test_the_orders_that_are_left_in_the_model_are_those_of_the_step():
    model, small, plan = clustered()
    (step,) = plan.steps
    assert step.settings["reorders"] == "io"
    assert with_sides(small, step) == step
    without = nn.Sequential(*(part for part in small[1].children() if not isinstance(part, Reorder)))
    small[1] = without
    folded = with_sides(small, step)
    assert folded.settings == step.settings | {"reorders": ""}
    assert split(small, plan)[0] == {0: folded}
    assert with_sides(model, step) == step  # rolled back: there is no chain
    assert with_sides(nn.Sequential(), step) == step


def test_a_step_of_a_method_without_orders_is_left_alone():
    _, small, plan = done(svd("0", 3))
    assert with_sides(small, plan.steps[0]) is plan.steps[0]
