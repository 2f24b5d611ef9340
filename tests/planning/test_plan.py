"""Plans on real nets: budgets hold, the damage is least, every layer has its reason."""

import pytest
import torch
from torch import nn

import taut
from cases import sequential
from planning.knapsacks import best, cost_of, observed, problem
from taut import Budget, BudgetError, CallError, Plan
from taut.core.text import count
from taut.methods import METHODS
from taut.methods.low_rank.svd import SVD
from taut.planning.candidates import survey
from taut.planning.knapsack import closest
from taut.planning.plan import describe, unmet, unmet_plan
from taut.types import Cost


@pytest.mark.parametrize("name", ["mlp", "inception", "conv2d_padding"])
@pytest.mark.parametrize("budget", [{"params": 0.7}, {"macs": 0.5}, {"params": 0.6, "macs": 0.6}, {"bytes": 0.9}])
def test_plans_meet_their_budget_and_add_up(name, budget):
    net, stats = observed(name)
    plan = taut.plan(net, stats, Budget(**budget))
    limits = Budget(**budget).limits(net.cost)
    assert all(getattr(plan.after, key) <= limit for key, limit in limits.items())
    saved = sum(s.before.params - s.after.params for s in plan.steps)
    assert plan.before.params - plan.after.params == saved
    assert plan.before == net.cost
    assert all(step.after.lowers(step.before) for step in plan.steps)
    assert not {k.layer for k in plan.kept} & {name for s in plan.steps for name in s.layers}


def test_plan_is_the_best_of_all_combinations_on_a_real_net():
    net, stats = observed("mlp")
    choices = survey(net, stats, [METHODS["svd"]()])
    for share in (0.7, 0.4, 0.25):
        limits = Budget(params=share).limits(net.cost)
        plan = taut.plan(net, stats, Budget(params=share), methods="svd")
        assert sum(s.damage for s in plan.steps) <= best(net, choices, limits) * (1 + 3e-4)


def test_a_layer_called_twice_counts_twice_in_macs_only():
    net, stats = observed("shared")
    plan = taut.plan(net, stats, Budget(params=0.8), methods="svd")
    (step,) = [s for s in plan.steps if s.layers == ("twice",)]
    rank = step.settings["rank"]
    assert step.after.params == rank * 32 + 16
    assert step.after.macs == 2 * rank * 32


def test_smaller_budgets_do_more_damage_and_reuse_the_decompositions():
    net, stats = observed("vgg")
    damages = []
    for share in (0.9, 0.7, 0.5, 0.3):
        plan = taut.plan(net, stats, Budget(macs=share))
        damages.append(sum(s.damage for s in plan.steps))
        cached = dict(stats._cache)
    assert damages == sorted(damages)
    taut.plan(net, stats, Budget(macs=0.2))
    assert all(stats._cache[key] is value for key, value in cached.items())


def test_a_budget_that_is_already_met_is_an_empty_plan():
    net, stats = observed("mlp")
    plan = taut.plan(net, stats, Budget(params=1.0))
    assert plan.steps == ()
    assert {k.reason for k in plan.kept} == {"the budget is met without it"}
    assert plan.after == plan.before


def test_what_cannot_be_met_says_how_far_it_goes():
    net, stats = observed("mlp")
    choices = survey(net, stats, [SVD()])
    with pytest.raises(BudgetError, match=r"params <= 2 \(the candidates alone reach (\d+) of 2\.93k\)") as caught:
        taut.plan(net, stats, Budget(params=2), methods="svd")
    least = cost_of(net, choices, closest(net, choices, {"params": 1}), "params")
    assert str(least) in str(caught.value)
    assert unmet(net, choices, {"params": 1, "macs": 1}).count("the candidates alone reach") == 2
    kept = net.layers[0].name
    with pytest.raises(BudgetError) as caught:
        taut.plan(net, stats, Budget(params=2), methods="svd", keep=kept)
    assert f"Most of that is in '{kept}' ({count(net[kept].params)})" in str(caught.value)
    assert f"Kept as asked: '{kept}'" in str(caught.value)


def test_wrong_calls():
    net, stats = observed("mlp")
    with pytest.raises(CallError, match="needs a budget of params, macs or bytes"):
        taut.plan(net, stats, Budget(drop=0.1))
    with pytest.raises(CallError, match="Unknown method 'magic'"):
        taut.plan(net, stats, Budget(params=0.5), methods=["magic"])
    with pytest.raises(CallError, match="At least one method"):
        taut.plan(net, stats, Budget(params=0.5), methods=[])


def test_the_plan_prints_and_explains_every_layer():
    net, stats = observed("vgg")
    plan = taut.plan(net, stats, Budget(macs=0.5))
    text = str(plan)
    for layer in net.layers:
        if len(layer.weight) > 1:
            assert layer.name in text
    assert "units of loss" in text
    assert all(step.reason for step in plan.steps)
    assert all(kept.reason for kept in plan.kept)
    assert Plan.from_json(plan.to_json()) == plan


def test_without_calibration_the_weights_decide_and_the_unit_says_so():
    model = sequential(a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    with torch.no_grad():
        model.a.weight.copy_(torch.outer(torch.randn(16), torch.randn(16)))
    net = taut.trace(model, torch.randn(2, 16))
    stats = taut.observe(net, model)
    plan = taut.plan(net, stats, Budget(params=0.7))
    assert [s.layers for s in plan.steps] == [("a",)]  # of rank 1: it costs nothing
    assert plan.unit == "relative weight error"
    assert sum(s.damage for s in plan.steps) < 1e-6


def test_an_empty_plan_of_kept_layers_needs_no_steps():
    net, choices = problem([[(100, 100, 0.0), (50, 50, 1.0)]])
    stats = taut.Statistics(net, {}, {})
    plan = describe(net, stats, choices, [0])
    assert plan.steps == ()
    assert plan.kept[0].layer == "l0"
    plan = describe(net, stats, choices, [1])
    assert plan.steps[0].after == Cost(50, 50, 50, 200)
    assert plan.after == Cost(50, 50, 50, 200)


def test_aligned_ranks_are_multiples_and_still_meet_the_budget():
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 10))
    net = taut.trace(model, torch.randn(2, 3, 8, 8))
    stats = taut.observe(net, model)
    found = taut.plan(net, stats, taut.Budget(macs=0.5), align=16)
    ranks = [v for step in found.steps for k, v in step.settings.items() if k.startswith("rank")]
    assert ranks
    assert all(rank % 16 == 0 for rank in ranks)
    assert found.after.macs <= 0.5 * found.before.macs
    with pytest.raises(taut.CallError, match="'align' must be"):
        taut.plan(net, stats, taut.Budget(macs=0.5), align=0)


def test_a_plan_that_misses_its_budget_does_not_say_that_it_is_met():
    net, stats = observed("mlp")
    met = taut.plan(net, stats, Budget(params=1.0))
    assert {kept.reason for kept in unmet_plan(met).kept} == {"no network near the budget works with it changed"}
    assert unmet_plan(met).steps == met.steps


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(8, 8))
        self.f, self.rnn = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(self.f(self.a(x, x, x)[0]) @ self.w)[0]


FORMS = {"a.q_proj": ("a", "as_attention"), "rnn.inputs.0": ("rnn", "as_recurrent"), "w.0": ("w", "as_layer")}


@pytest.mark.parametrize("name", FORMS)
def test_steps_may_name_what_plain_forms_make(name, tmp_path):
    owner, method = FORMS[name]
    model, x = Packed().eval(), torch.randn(2, 3, 8)
    net, step = taut.trace(model, x), taut.Step((name,), "svd", {"rank": 2})
    plan = Plan.from_json(Plan.of(net, [taut.Step((owner,), method), step]).to_json())
    small = taut.apply(model, plan, taut.observe(net, model))
    assert isinstance(small.get_submodule(name), nn.Sequential)
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", Packed)(x)[0], small(x)[0])
    for steps in ([step], [step, taut.Step((owner,), method)]):
        with pytest.raises(CallError, match=f"no layer '{name}' yet: put the step that gives '{owner}'"):
            Plan.of(net, steps)
    with pytest.raises(CallError, match=r"no layer 'a\.x_proj'"):
        Plan.of(net, [taut.Step(("a",), "as_attention"), taut.Step(("a.x_proj",), "svd", {"rank": 2})])


def test_a_step_over_all_layers_says_which_it_does_not_see():
    net = taut.trace(Packed().eval(), torch.randn(2, 3, 8))
    reason = taut.whole(net, "magnitude", sparsity=0.5).reason
    assert all(word in reason for word in ("'w', 'a', 'rnn'", "as_layer and as_attention and as_recurrent"))
    assert "'rnn'" not in taut.whole(net, "magnitude", without=["rnn"], sparsity=0.5).reason
    assert not taut.whole(_plain(), "magnitude", sparsity=0.5).reason


def test_costs_that_are_not_known_yet_are_no_zeros():
    net = _plain()
    plan = Plan.of(net, [taut.whole(net, "channels", macs=0.5), taut.Step(("0",), "svd", {"rank": 2})])
    rows = [line for line in str(plan).splitlines() if "->" in line]
    assert len(rows) == 3
    assert all(line.count("-> ?") == 2 for line in rows)
    assert "is not predicted" in rows[-1]
    assert plan.summary().count("-> ?") == 2
    assert "->" not in str(Plan.of(net, []))


def _plain():
    return taut.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 8))
