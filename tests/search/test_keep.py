"""keep=: layers left alone or not below a share, whatever makes the others smaller."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from taut import Budget, BudgetError, CallError
from taut.search import exploration, joint
from taut.search.limits import limits_at_ratio
from taut.search.session import Session

METHODS = (None, ("channels",), ("channels", "svd"))


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6)),
    ).eval()


@pytest.fixture(autouse=True)
def _few_shares(monkeypatch):
    monkeypatch.setattr(joint, "SHARES_TRIED", 3)


X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def same(model, small, *names):
    before, after = model.state_dict(), small.state_dict()
    held = [key for key in before if key.rpartition(".")[0] in names]
    return bool(held) and all(key in after and torch.equal(before[key], after[key]) for key in held)


def weights(small, name):
    return sum(p.numel() for key, p in small.get_submodule(name).named_parameters() if not key.endswith("bias"))


def compress(budget, **settings):
    model = build()
    return model, taut.compress(model, X[:4], budget=budget, data=[X], compare=False, **settings)


@pytest.mark.parametrize("methods", METHODS)
def test_the_others_meet_the_budget_and_what_is_kept_stays_to_the_bit(methods):
    model, result = compress(Budget(params=0.6), methods=methods, keep=["9", nn.BatchNorm2d])
    assert result.plan.after.params <= 0.6 * result.plan.before.params
    assert same(model, result.model, "1", "9")
    assert {kept.layer: kept.reason for kept in result.plan.kept if kept.code == "as asked"} == dict.fromkeys(
        ("1", "9"), "kept: as asked"
    )
    assert not {"1", "9"} & {name for step in result.plan.steps for name in step.layers}
    assert "kept: as asked" in str(result.plan)


@pytest.mark.parametrize("methods", METHODS)
def test_no_layer_falls_below_its_floor(methods):
    keep = {"3": 0.7, nn.Conv2d: 0.2}
    model, result = compress(Budget(macs=0.6), methods=methods, keep=keep)
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    assert weights(result.model, "3") >= 0.7 * weights(model, "3")
    assert weights(result.model, "5") >= 0.2 * weights(model, "5")
    if methods is None:
        free = compress(Budget(macs=0.6), methods=methods)[1]
        assert weights(free.model, "3") < 0.7 * weights(model, "3")  # without it the floor does not hold


def test_a_kept_layer_keeps_its_inputs_and_outputs():
    model, result = compress(Budget(params=0.8), methods=["channels"], keep="5")
    assert result.model[5].weight.shape == model[5].weight.shape
    assert same(model, result.model, "5")
    assert any("'5', which is kept as asked" in kept.reason for kept in result.plan.kept)


def test_measured_damages_drop_and_both_kinds_of_ratio():
    model = build()
    session = Session.open(model, X[:4], [X], ["svd"], keep={"3": 0.5, "9": 1.0}, measured=True)
    net = session.network
    free, floor = net["0"].cost.params + net["5"].cost.params, net.floors["3"].cost.params
    assert session.planner.movable.params == free + net["3"].cost.params - floor
    for methods in (["svd"], ["channels", "svd"]):
        narrowing = Session.open(model, X[:4], None, methods, keep=["3", "5", "9"])
        limits = limits_at_ratio(narrowing, 1e9)
        assert limits["params"] >= sum(net[name].cost.params for name in "359")
    result = taut.compress(
        model, X[:4], budget=Budget(drop=1e9), evaluate=lambda m: float(m(X).mean().detach()), data=[X], keep=["3", "9"]
    )
    assert same(model, result.model, "3", "9")
    assert {step.layers for step in result.plan.steps} <= {("0",), ("5",)}


def test_a_budget_that_is_not_met_names_what_is_kept():
    with pytest.raises(BudgetError) as caught:
        compress(Budget(params=0.2), methods=["svd"], keep={"3": 1.0, "5": 0.9})
    text, net = str(caught.value), taut.trace(build(), X[:4])
    assert f"Kept as asked: '3' with {net['3'].params / net.cost.params:.0%} of the parameters" in text
    assert "90% of it stays, as asked" in text
    assert same(build(), caught.value.best.model, "3")
    assert weights(caught.value.best.model, "5") >= 0.9 * weights(build(), "5")


def test_exact_steps_and_orders_of_channels_leave_it_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2)).eval()
    x = torch.randn(8, 3, 2, 2)  # most taps meet padding alone
    methods = ["dead_taps", "svd"]
    result = taut.compress(model, x[:2], budget=Budget(params=0.85), data=[x], methods=methods, keep="2", compare=False)
    assert same(model, result.model, "2")
    assert [step.layers for step in result.plan.steps if step.method == "dead_taps"] == [("0",)]
    net = taut.trace(build(), X[:4]).keeping(["0", "5"])
    stats = taut.observe(net, build(), [X])
    plan = taut.Plan.of(net, [taut.Step(("3",), "bicluster", {"inputs": 3, "outputs": 3, "rank_in": 2, "rank_out": 2})])
    assert same(build(), taut.apply(build(), plan, stats, data=[X]), "0", "5")


@pytest.mark.parametrize("method", ["magnitude", "mfbp", "obs"])
def test_masks_are_made_up_for_by_the_others(method):
    model, net = build(), taut.trace(build(), X[:4])
    stats = taut.observe(net, model, [X])
    step = taut.whole(net, method, keep={"3": 0.9, "9": 1.0}, sparsity=0.6)
    small = taut.apply(model, taut.Plan.of(net, [step]), stats, data=[X])
    left = {name: int(small.get_submodule(name).weight.count_nonzero()) for name in "035"}
    total = sum(math.prod(net[name].weight) for name in "035")
    assert sum(left.values()) == total - round(0.6 * total)
    assert left["3"] >= 0.9 * math.prod(net["3"].weight)
    assert same(model, small, "9")
    with pytest.raises(CallError, match="have to stay, as asked"):
        taut.apply(model, taut.Plan.of(net, [taut.whole(net, method, keep={"*": 0.9}, sparsity=0.6)]), stats)


def test_rounds_count_from_the_original_and_training_alone_moves_it():
    model, net = build(), taut.trace(build(), X[:4])
    steps = taut.ramp(taut.whole(net, "channels", keep={"3": 0.5, "9": 1.0}, sparsity=0.25, align=1), 2)
    plan = taut.Plan.of(net, steps)
    stats = taut.observe(net, model, [X])
    small = taut.finetune(model, plan, stats, [X], None, schedule=taut.alternate(plan, epochs=0))
    assert weights(small, "3") >= 0.5 * weights(model, "3")
    assert weights(small, "5") < weights(model, "5")
    assert same(model, small, "9")


def test_the_verbs_take_it_too():
    model, net = build(), taut.trace(build(), X[:4])
    stats = taut.observe(net, model, [X])
    plan = taut.plan(net, stats, Budget(params=0.7), keep={"3": 1.0, "Linear": 0.9})
    assert same(model, taut.apply(model, taut.Plan.from_json(plan.to_json()), stats, data=[X]), "3")
    with pytest.raises(CallError, match="no such layer"):
        taut.plan(net, stats, Budget(params=0.7), keep="tail")
    with pytest.raises(CallError, match="no such layer"):
        taut.compress(model, X[:4], budget=Budget(params=0.7), keep="tail")
    by_hand = taut.Plan.of(net.keeping({"3": 0.9}), [taut.Step(("3",), "svd", {"rank": 1})])
    done = taut.apply(model, by_hand, taut.observe(net.keeping({"3": 0.9}), model))
    assert same(model, done, "3")


def test_a_front_is_of_one_keep(tmp_path, monkeypatch):
    monkeypatch.setattr(exploration, "RATIOS", (1.0, 3.0))
    model, settings = build(), {"data": [X], "evaluate": None, "methods": ["svd"], "compare": False}
    first = taut.explore(model, X[:4], **settings, folder=tmp_path)
    front = taut.explore(model, X[:4], **settings, folder=tmp_path, keep=["3", "5"])
    assert front.points[-1].after.params > first.points[-1].after.params
    assert not {"3", "5"} & {name for point in front.points for step in point.plan.steps for name in step.layers}


@pytest.mark.parametrize(
    ("keep", "step"),
    [
        ("3", lambda net: taut.whole(net, "magnitude", sparsity=0.5)),
        ("3", lambda net: taut.whole(net, "channels", macs=0.6)),
        ({"3": 0.95}, lambda net: taut.whole(net, "channels", macs=0.8, align=1)),
        ({"3": 0.95}, lambda net: taut.whole(net, "magnitude", sparsity=0.2)),
        ({"3": 0.95}, lambda _: taut.Step(("3",), "magnitude", {"sparsity": 0.5})),
        ({"3": 0.95}, lambda _: taut.Step(("3",), "codebook", {"codes": 8})),
        ({"3": 0.9}, lambda _: taut.Step(("3",), "svd", {"rank": 1})),
        ("3", lambda _: taut.Step(("3",), "svd", {"rank": 1})),
        ({"3": 0.9}, lambda _: taut.Step(("3", "5"), "shared", {"rank": 2})),
    ],
)
def test_plans_by_hand_respect_what_the_network_keeps(keep, step):
    """The step and the statistics are of the network that keeps nothing; the plan holds after a round trip, too."""
    model, net = build(), taut.trace(build(), X[:4])
    least = keep["3"] if isinstance(keep, dict) else 1.0
    stats = taut.observe(net, model, [X])
    try:
        plan = taut.Plan.of(net.keeping(keep), [step(net)])
        small = taut.apply(model, taut.Plan.from_json(plan.to_json()), stats, data=[X])
    except CallError as error:
        words = str(error)
        small = model
    else:
        words = "as asked"
    assert "as asked" in words or "floors" in words
    assert int(small.get_submodule("3").weight.count_nonzero()) >= least * math.prod(net["3"].weight)
    assert least < 1 or same(model, small, "3")


def test_a_plan_that_keeps_takes_no_step_on_what_it_keeps():
    model, net = build(), taut.trace(build(), X[:4])
    stats = taut.observe(net, model, [X])
    alone = taut.Plan.of(net.keeping("3"), [])
    edited = replace(alone, steps=(taut.whole(net, "magnitude", sparsity=0.5),))
    with pytest.raises(CallError, match="does not apply to layer '3': kept: as asked"):
        taut.apply(model, edited, stats)
    spared = taut.whole(net, "magnitude", sparsity=0.5, spare=[0])
    with pytest.raises(CallError, match="says something of each of its layers, of which '3'"):
        taut.Plan.of(net.keeping("3"), [spared])


def test_a_step_of_which_all_layers_are_kept_says_so():
    with pytest.raises(CallError, match="has nothing left to change: all layers that it would take are kept"):
        taut.whole(taut.trace(build(), X[:4]), "magnitude", keep="*")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(8, 8))
        self.f, self.g = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.g(self.f(self.a(x, x, x)[0]).relu()) @ self.w


def test_layers_of_plain_forms_are_kept_by_the_names_that_plans_show():
    torch.manual_seed(0)
    model, x = Packed().eval(), torch.randn(8, 5, 8)
    given = {"budget": Budget(params=0.6), "data": [x], "methods": ["svd"], "compare": False}
    result = taut.compress(model, x[:2], keep=["a.q_proj", "w.0"], **given)
    assert torch.equal(result.model.a.q_proj.weight, model.a.in_proj_weight[:8])
    assert ("a.k_proj",) in [step.layers for step in result.plan.steps]
    assert not {"a.q_proj", "w.0", "w"} & {name for step in result.plan.steps for name in step.layers}
    whole = taut.compress(model, x[:2], keep=["a.*", "w"], **given).model
    assert torch.equal(whole.a.in_proj_weight, model.a.in_proj_weight)
    assert torch.equal(whole.w, model.w)


def test_plans_by_hand_keep_layers_that_are_still_to_come():
    model, x = Packed().eval(), torch.randn(2, 5, 8)
    net = taut.trace(model, x).keeping(["a.q_proj"])
    plan = taut.Plan.of(net, [taut.Step(("a",), "as_attention")])
    assert taut.Plan.from_json(plan.to_json()).shares == {"a.q_proj": 1.0}
    edited = replace(plan, steps=(*plan.steps, taut.Step(("a.q_proj",), "svd", {"rank": 1})))
    with pytest.raises(CallError, match=r"svd does not apply to layer 'a\.q_proj': kept: as asked"):
        taut.apply(model, edited, taut.observe(net, model))
