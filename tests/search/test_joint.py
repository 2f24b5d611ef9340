"""Channels and ranks in one plan: budgets hold, the share with the least divergence wins, plans can be replayed."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

import taut
from cases import case, run, sequential, untouched
from taut import Budget, BudgetError, CallError, Plan
from taut.methods.channels import sight
from taut.planning import blocks, execution
from taut.planning.application import apply_plan
from taut.planning.candidates import scaled
from taut.planning.narrowing import narrow
from taut.planning.plan import narrowing_step
from taut.search import behind, joint
from taut.search.joint import FIRST_SHARES, NEARLY, SHARES_TRIED, JointPlanner, _next
from taut.search.ranks import RankPlanner
from taut.search.session import JUDGED, Session
from taut.structure.calling import read_example
from taut.structure.statistics import Curve, LayerStatistics
from taut.types import Group, Step

METHODS = ("channels", "svd", "spatial", "tucker")


def made(name, methods=METHODS, data=True, **budget):
    model, example = case(name).make()
    batches = case(name).data(batches=4, size=24) if data else None
    with untouched(model):
        return model, example, taut.compress(model, example, budget=Budget(**budget), data=batches, methods=methods)


@pytest.mark.parametrize(("name", "key"), [("mlp", "bytes"), ("vgg", "macs"), ("inception", "params")])
def test_the_budget_holds_on_the_counted_model(name, key):
    model, example, result = made(name, **{key: 0.5})
    before, after = taut.trace(model, example).cost, taut.trace(result.model, example).cost
    assert getattr(after, key) <= 0.5 * getattr(before, key)
    assert result.plan.after == after


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights alone"])
def test_channels_alone_meet_a_budget_closely(data):
    model, example, result = made("vgg", ("channels",), data, macs=0.5)
    before, after = taut.trace(model, example).cost, taut.trace(result.model, example).cost
    assert 0.4 * before.macs < after.macs <= 0.5 * before.macs
    assert [step.method for step in result.plan.steps] == ["channels"]


def test_the_plan_makes_the_same_model_again_and_is_saved(tmp_path):
    model, example, result = made("vgg", macs=0.4)
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    assert json.loads(result.plan.to_json())
    net = taut.trace(model, example)
    batches = case("vgg").data(batches=4, size=24)
    again = taut.apply(model, plan, taut.observe(net, model, batches), batches)
    for wanted, found in zip(run(result.model, example), run(again, example), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", lambda: case("vgg").make()[0])
    for wanted, found in zip(run(result.model.eval(), example), run(loaded, example), strict=True):
        assert torch.equal(wanted, found)


def test_of_the_shares_with_nearly_the_least_divergence_the_one_with_most_channels_is_taken(monkeypatch):
    losses = {0.0: 1.0, 0.25: 0.5, 0.5: 0.5 * NEARLY * 0.999, 1.0: 2.0}
    tried = []

    def loss(_, share, *__):
        tried.append(share)
        return losses.get(share, 1.5)

    monkeypatch.setattr(JointPlanner, "_loss", loss)
    monkeypatch.setattr(JointPlanner, "_promising", lambda *_: (FIRST_SHARES, SHARES_TRIED))
    made_of = case("vgg").make()
    batches = case("vgg").data(batches=4, size=24)
    net = taut.trace(*made_of)
    stats = taut.observe(net, made_of[0], batches)
    methods = [taut.methods.METHODS[name]() for name in ("channels", "svd")]
    ranks = RankPlanner(made_of[0], stats, (), [(b, None) for b in batches])
    assert JointPlanner(ranks, methods[0], tuple(methods[1:]), 1)._best_share({"macs": 1.0}) == 0.5
    assert len(set(tried)) == len(tried) <= 5


@pytest.mark.parametrize(
    ("predicted", "wanted"),
    [
        ({0.0: 3.0, 0.5: 1.0, 1.0: 1.5}, ((0.5, 1.0), 3)),
        ({0.0: 9.0, 0.5: 1.0, 1.0: 5.0}, ((0.5, 1.0), 3)),
        ({0.0: 1.0, 0.5: 3.0, 1.0: 3.0}, ((0.0,), 1)),
        ({0.0: 1.2, 0.5: 2.0, 1.0: 1.0}, ((1.0, 0.0), 3)),
        ({0.0: math.inf, 0.5: math.inf, 1.0: math.inf}, ((), 0)),
        ({0.0: 1.0, 0.5: None, 1.0: 3.0}, (FIRST_SHARES, SHARES_TRIED)),
    ],
)
def test_shares_are_tried_that_come_near_the_least_predicted_damage(monkeypatch, predicted, wanted):
    monkeypatch.setattr(JointPlanner, "_predicted", lambda _, share, __: predicted[share])
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    stats = taut.observe(taut.trace(model, torch.randn(2, 4)), model)
    planner = JointPlanner(RankPlanner(model, stats, (), None), taut.methods.METHODS["channels"](), (), 1)
    assert planner._promising({"macs": 1.0}) == wanted


def test_what_channels_do_is_predicted_from_what_was_observed_before():
    model, example = case("vgg").make()
    batches = [(b, None) for b in case("vgg").data(batches=4, size=24)]
    net = taut.trace(model, example)
    stats = taut.observe(net, model, batches)
    step = narrowing_step(net, taut.methods.METHODS["channels"](), macs=0.6)
    with untouched(model):
        found = narrow(model, step, stats)
    assert found.step.damage > 0
    assert found.step.after.macs <= 0.6 * found.step.before.macs
    built, plan = apply_plan(model, Plan((found.step,)), stats)
    assert plan.steps[0].settings == found.step.settings
    for (name, wanted), (_, there) in zip(built.state_dict().items(), found.model.state_dict().items(), strict=True):
        assert torch.equal(wanted, there), name
    inner = {layer.name: layer.weight for layer in found.stats.network.layers}
    assert inner == {layer.name: layer.weight for layer in taut.trace(built, example).layers}
    first = net.layers[0].name  # its inputs are what they were
    assert found.stats.layers[first].weighting is stats.layers[first].weighting
    later = taut.observe(taut.trace(built, example), built, batches).layers
    for name, known in found.stats.layers.items():
        assert known.weighting.full.shape == later[name].weighting.full.shape, name
    assert narrow(model, narrowing_step(net, taut.methods.METHODS["channels"](), macs=1e-9), stats) is None


def test_damages_of_channels_have_a_unit_where_readers_were_observed():
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    batches = [(b, None) for b in case("vgg").data(batches=2, size=8)]
    known, unknown = taut.observe(net, model, batches), taut.observe(net, model)

    def damage(stats, **settings):
        step = narrowing_step(net, taut.methods.METHODS["channels"](**settings), macs=0.5)
        return narrow(model, step, stats).step.damage

    assert damage(known) is not None
    assert damage(unknown) is None
    last = list(known.layers)[-1]
    partly = replace(known, layers={**dict.fromkeys(known.layers, LayerStatistics()), last: known.layers[last]})
    assert damage(known, even=True) is not None
    assert damage(partly, even=True) is None  # what a reader loses that was not observed is none of the sum
    assert damage(known, criterion="l2") is None


def test_measured_damages_of_ranks_and_predicted_ones_of_channels_are_not_added():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    stats = replace(taut.observe(taut.trace(model, torch.randn(2, 4)), model), curves={(("0",), "svd/data"): Curve(())})
    planner = JointPlanner(RankPlanner(model, stats, (), None), taut.methods.METHODS["channels"](), (), 1)
    assert planner._promising({"macs": 1.0}) == (FIRST_SHARES, SHARES_TRIED)


class Attending(torch.nn.Module):
    """Of its multiply-accumulates a third are products of queries and keys, which fall with the heads."""

    def __init__(self):
        super().__init__()
        self.attend = torch.nn.MultiheadAttention(32, 8, batch_first=True)
        self.first, self.last = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("left", [0.6, 0.35])
def test_what_falls_beside_the_layers_is_given_back(left):
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(32, 64, 32)
    settings = {"budget": Budget(macs=left), "methods": ["channels"], "output": "values", "compare": False}
    result = taut.compress(model, x[:2], data=[x], **settings)
    whole, small = (taut.trace(net, x[:2]).cost.macs for net in (model, result.model))
    assert 0.9 * left * whole < small <= left * whole
    assert result.plan.after.macs == small


class Upward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 24, 3, padding=1)
        self.up = torch.nn.ConvTranspose2d(24, 24, 4, stride=2, padding=1)
        self.last = torch.nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.up(self.down(x).relu()).relu())


def test_transposed_convolutions_that_lost_channels_can_still_be_factorized():
    torch.manual_seed(0)
    model, x = Upward().eval(), torch.randn(32, 3, 8, 8)
    net, data = taut.trace(model, x[:2]), [(x, None)]
    stats = taut.observe(net, model, data)
    channels, *low = (taut.methods.METHODS[name]() for name in ("channels", "svd", "transposed"))
    ranks = RankPlanner(model, stats, blocks.survey_all(net, model, stats, data, low), data)
    narrowed = JointPlanner(ranks, channels, tuple(low), 1)._narrow(0.3, {"macs": 0.5 * net.cost.macs})
    assert narrowed.ranks.network["up"].params < net["up"].params
    assert "up" in {choice.name for choice in narrowed.ranks.choices}
    assert narrowed.ranks.network.cost == taut.trace(narrowed.ranks.base, x[:2]).cost


def test_a_share_whose_channels_are_rolled_back_is_not_believed_without_data(monkeypatch):
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    stats = taut.observe(net, model)
    methods = [taut.methods.METHODS[name]() for name in ("channels", "svd")]
    ranks = RankPlanner(model, stats, blocks.survey_all(net, model, stats, None, methods[1:]), None)
    planner = JointPlanner(ranks, methods[0], tuple(methods[1:]), 1)
    limits = {"macs": 0.5 * net.cost.macs}
    assert planner._best_share(limits) == 0.5
    monkeypatch.setattr(execution, "departs", lambda *args: "no" if len(args) > 2 and _is_narrow(args[2]) else None)
    assert planner._best_share(limits) == 0.0


def _is_narrow(model):
    return any(isinstance(m, torch.nn.Conv2d) and m.out_channels < 16 and m.in_channels == 3 for m in model.modules())


def test_the_next_share_lies_beside_the_best():
    assert _next({0.0: 3.0, 0.5: 1.0, 1.0: 2.0}) == 0.75
    assert _next({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}) == 0.25
    assert _next({0.0: 3.0, 0.5: 2.0, 0.75: 2.5, 1.0: 1.0}) == 0.875


def test_a_budget_that_channels_and_ranks_cannot_meet_carries_the_closest():
    with pytest.raises(BudgetError, match="No plan meets") as caught:
        made("vgg", macs=1e-6)
    assert isinstance(caught.value.best.model, torch.nn.Module)


def test_exact_steps_come_first_and_names_stay_the_original_ones():
    model, _, result = made("vgg", ("dead_taps", "channels", "tucker"), macs=0.5)
    names = {name for name, _ in model.named_modules()}
    assert all(set(step.layers) <= names for step in result.plan.steps)


def test_a_whole_network_method_is_still_no_candidate():
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    with pytest.raises(CallError, match="no candidate"):
        taut.plan(net, taut.observe(net, model), Budget(macs=0.5), ["channels"])
    assert Group(()).names == ()


def test_one_batch_that_cannot_be_divided_is_refitted_and_judged_on():
    class Scaled(torch.nn.Module):
        """Gives something else for a part of a batch."""

        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 24), torch.nn.Linear(24, 4)

        def forward(self, x):
            return self.last(self.first(x - x.mean(0)).relu())

    model, x = Scaled().eval(), torch.randn(64, 8)
    result = taut.compress(model, x, budget=Budget(macs=0.5), data=[x], methods=("channels", "svd"), compare=False)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_what_blocks_do_is_measured_before_channels_go_alone(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), *(Residual() for _ in range(3)), torch.nn.Linear(16, 4)).eval()
    data = [(torch.randn(64, 8), None)]
    net = taut.trace(model, data[0][0])
    stats = taut.observe(net, model, data[0][0])
    channels, *low = (taut.methods.METHODS[name]() for name in ("channels", "svd", "blocks"))
    choices = blocks.survey_all(net, model, stats, data, low)
    known = {choice.name: choice.options[1].damage for choice in choices if choice.block is not None}
    assert known
    monkeypatch.delattr(blocks, "measured_blocks")
    planner = JointPlanner(RankPlanner(model, stats, choices, data), channels, tuple(low), 1)
    narrowed = planner._narrow(0.5, {"macs": 0.5 * net.cost.macs})
    found = [choice for choice in narrowed.ranks.choices if choice.block is not None]
    assert {choice.name: choice.options[1].damage for choice in found} == known
    assert all(choice.group.layer.params < net[choice.name].params for choice in found)


def test_a_layer_that_ranks_change_is_not_told_to_stay_as_well():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 24)).eval()
    net = taut.trace(model, torch.randn(8, 16))
    stats = taut.observe(net, model, torch.randn(64, 16))
    step = narrowing_step(net, taut.methods.METHODS["channels"](), macs=0.6)
    assert [kept.layer for kept in apply_plan(model, Plan((step,)), stats)[1].kept] == ["2"]
    _, done = apply_plan(model, Plan((step, Step(("2",), "svd", {"rank": 4}))), stats)
    assert [step.method for step in done.steps] == ["channels", "svd"]
    assert not done.kept


@pytest.mark.parametrize(
    ("methods", "traces"), [(METHODS, False), ((*METHODS, "blocks"), True)], ids=["layers", "blocks"]
)
def test_a_search_looks_for_what_goes_together_once_and_makes_each_width_once(monkeypatch, methods, traces):
    looked, traced, found = [], [], []

    def with_heads(model, *args):
        looked.append(model)
        return coupling(model, *args)

    def trace(model, example):
        traced.append([tuple(p.shape) for p in model.parameters()])
        return taut.trace(model, example)

    def narrowed(*args, **told):
        found.append(narrow(*args, **told))
        return found[-1]

    coupling = sight.with_heads
    monkeypatch.setattr(sight, "with_heads", with_heads)
    monkeypatch.setattr(behind, "trace", trace)
    monkeypatch.setattr(joint, "narrow", narrowed)
    made("resnet", methods, macs=0.5)
    assert len(looked) == 1
    assert bool(traced) is traces
    assert len(found) > len(traced) == len({str(shapes) for shapes in traced})


def test_what_a_search_saw_of_a_network_is_not_taken_for_another():
    """A step that finds the model changed looks anew, whatever was seen of the model before."""
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    stats = taut.observe(net, model, case("vgg").data())
    method = taut.methods.METHODS["channels"]()
    first, second = (narrowing_step(net, method, macs=share) for share in (0.6, 0.3))
    plans = Plan((first,)), Plan((first, second)), Plan((Step(("fc",), "magnitude", {"sparsity": 0.9}), second))
    remembering = replace(stats, looks={})
    for plan in plans * 2:
        wanted, found = (apply_plan(model, plan, known) for known in (stats, remembering))
        assert found[1] == wanted[1]
        assert all(
            torch.equal(a, b)
            for a, b in zip(found[0].state_dict().values(), wanted[0].state_dict().values(), strict=True)
        )
    assert remembering.looks


def test_with_samples_enough_channels_are_candidates_unasked():
    model, example = case("vgg").make()
    for count, together in ((JUDGED, True), (JUDGED - 1, False)):
        data = [torch.randn(count, *example.shape[1:])]
        session = Session.open(model, read_example(model, example), data, None)
        assert session.planner.joint is together
    whole = [torch.randn(JUDGED, *example.shape[1:])]
    assert Session.open(model, read_example(model, example), whole, None, align=4).planner.method.align == 4
    named = Session.open(model, read_example(model, example), [torch.randn(JUDGED, *example.shape[1:])], ["svd"])
    assert not named.planner.joint
    assert not Session.open(model, read_example(model, example), None, None).planner.joint


def test_options_of_whole_layers_stand_for_those_of_narrower_ones():
    model, example = case("vgg").make()
    batches = [(b, None) for b in case("vgg").data(batches=4, size=24)]
    net = taut.trace(model, example)
    stats = taut.observe(net, model, batches)
    choices = blocks.survey_all(net, model, stats, batches, [taut.methods.METHODS["svd"]()])
    found = narrow(model, narrowing_step(net, taut.methods.METHODS["channels"](), macs=0.6), stats)
    after = found.stats.network
    for before, now in zip(choices, scaled(choices, net, after), strict=True):
        name = before.name
        assert now.options[0].cost == after[name].cost
        for one, other in zip(before.options[1:], now.options[1:], strict=True):
            assert other.damage == one.damage
            assert other.cost.macs == pytest.approx(one.cost.macs * after[name].macs / net[name].macs, abs=1)
    gone = after.skipping({choices[0].name: "it stays"})
    assert [choice.name for choice in scaled(choices, net, gone)] == [choice.name for choice in choices[1:]]


@pytest.mark.parametrize("name", ["vgg", "resnet", "inception", "encoder", "everything"])
def test_the_network_that_channels_leave_is_known_without_tracing_it(name):
    model, example = case(name).make()
    net = taut.trace(model, example)
    stats = taut.observe(net, model, case(name).data())
    found = narrow(model, narrowing_step(net, taut.methods.METHODS["channels"](), macs=0.6), stats)
    traced = taut.trace(found.model, example)
    for layer, wanted in zip(found.stats.network.layers, traced.layers, strict=True):
        assert replace(layer, calls=wanted.calls) == wanted
    assert replace(found.stats.network.cost, nonzero=0, bytes=0) == replace(traced.cost, nonzero=0, bytes=0)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "inception", "encoder", "tied", "keywords", "everything"])
def test_the_default_call_with_many_samples_harms_nothing(name, tmp_path):
    """Budget, input model, structure, reload and repetition, where channels come in unasked."""
    model, example = case(name).make()
    data = case(name).data(batches=4, size=24)
    keep = next(layer.name for layer in taut.trace(model, example).layers if layer.macs)
    with untouched(model):
        one, two = (
            taut.compress(model, example, budget={"macs": 0.7}, data=data, keep=keep, compare=False) for _ in range(2)
        )
    before = taut.trace(model, example)
    after = taut.trace(one.model, example)
    assert after.cost.macs <= 0.7 * before.cost.macs
    assert after[keep].weight == before[keep].weight
    assert [t.shape for t in run(one.model, example)] == [t.shape for t in run(model, example)]
    assert one.plan == two.plan
    bits = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in bits), strict=True))
    one.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: case(name).make()[0])
    assert all(torch.equal(a, b) for a, b in zip(run(again, example), run(one.model, example), strict=True))


def test_what_was_not_asked_for_warns_of_nothing(recwarn):
    model = sequential(a=torch.nn.Linear(20, 48), r=torch.nn.ReLU(), b=torch.nn.Linear(48, 10))
    x = torch.randn(128, 20)
    for methods, told in ((None, False), (METHODS, True)):
        recwarn.clear()
        with suppress(BudgetError):
            taut.compress(model, x[:8], budget={"params": 0.5}, data=[x], keep=["a"], methods=methods, compare=False)
        assert any("no channels can be taken out" in str(w.message) for w in recwarn) is told
