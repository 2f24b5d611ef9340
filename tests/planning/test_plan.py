"""The planner against every combination written out."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import case, sequential
from taut import Budget, BudgetError, CallError, Network, Plan
from taut.methods import METHODS
from taut.methods.low_rank.svd import SVD
from taut.planning.plan import HEADER_BYTES, Choice, Option, closest, describe, pareto, solve, survey, unmet
from taut.types import Cost, Group, Layer


def option(rank, params, macs, damage):
    """A thing that can be done; rank 0 keeps the layer."""
    return Option(SVD(rank=rank) if rank else None, Cost(params, params, macs, 4 * params), damage)


def problem(tables, fixed=(0, 0)):
    """A network and choices from tables of (params, macs, damage), the first row of each the layer as it is."""
    choices = []
    for i, rows in enumerate(tables):
        params, macs, _ = rows[0]
        layer = Layer(f"l{i}", "Linear", (1, 1), macs=macs, params=params)
        choices.append(Choice(Group((layer,)), tuple(option(r, *row) for r, row in enumerate(rows))))
    total = sum((c.options[0].cost for c in choices), Cost(fixed[0], fixed[0], fixed[1], 4 * fixed[0]))
    return Network(tuple(c.group.layer for c in choices), total), choices


def cost_of(net, choices, picks, key):
    """What a combination costs in one key, the estimate of file headers included."""
    total = getattr(net.cost, key)
    for choice, i in zip(choices, picks, strict=True):
        chosen = choice.options[i]
        total += getattr(chosen.cost, key) - getattr(choice.options[0].cost, key)
        total += 2 * HEADER_BYTES * (key == "bytes" and chosen.method is not None)
    return total


def damage_of(choices, picks):
    return sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))


def best(net, choices, limits):
    """The least damage over all combinations within the limits, or None."""
    fits = [
        damage_of(choices, picks)
        for picks in product(*(range(len(c.options)) for c in choices))
        if all(cost_of(net, choices, picks, key) <= limit for key, limit in limits.items())
    ]
    return min(fits, default=None)


ROWS = st.tuples(st.integers(1, 300), st.integers(1, 300), st.floats(0.001, 10))


@st.composite
def knapsacks(draw):
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        keep = (draw(st.integers(50, 300)), draw(st.integers(50, 300)), 0.0)
        tables.append([keep, *draw(st.lists(ROWS, min_size=1, max_size=4))])
    net, choices = problem(tables, draw(st.tuples(st.integers(0, 100), st.integers(0, 100))))
    keys = draw(st.sampled_from([("params",), ("macs",), ("params", "macs"), ("bytes",)]))
    return net, choices, {key: draw(st.integers(1, getattr(net.cost, key))) for key in keys}


@given(knapsacks())
def test_solve_finds_the_least_damage_of_all_combinations(knapsack):
    net, choices, limits = knapsack
    wanted, picks = best(net, choices, limits), solve(net, choices, limits)
    if wanted is None:
        assert picks is None
        return
    assert all(cost_of(net, choices, picks, key) <= limit for key, limit in limits.items())
    assert damage_of(choices, picks) <= wanted * (1 + 3e-4) + 1e-6


@given(knapsacks())
def test_closest_has_the_least_worst_ratio(knapsack):
    net, choices, limits = knapsack

    def worst(picks):
        return max(cost_of(net, choices, picks, key) / limit for key, limit in limits.items())

    wanted = min(worst(picks) for picks in product(*(range(len(c.options)) for c in choices)))
    assert worst(closest(net, choices, limits)) <= wanted * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_unit_of_damage_does_not_matter(scale):
    tables = [[(100, 100, 0.0), (60, 50, 1.0 * scale), (20, 30, 5.0 * scale)] for _ in range(4)]
    tables[0][1] = (60, 50, 0.5 * scale)
    net, choices = problem(tables)
    for limit in (400, 340, 200, 150):
        limits = {"macs": limit}
        assert damage_of(choices, solve(net, choices, limits)) == pytest.approx(best(net, choices, limits), rel=3e-4)


def test_of_equal_plans_the_cheaper():
    net, choices = problem([[(100, 100, 0.0), (90, 90, 0.0), (50, 50, 0.0)], [(100, 100, 0.0), (99, 99, 1.0)]])
    assert solve(net, choices, {"params": 200}) == [2, 0]
    net, choices = problem([[(100, 100, 0.0), (60, 90, 1.0), (60, 50, 1.0)]])
    assert solve(net, choices, {"params": 80}) == [2]


def test_large_costs_are_within_the_limit_to_the_unit():
    million = 10**9
    net, choices = problem([[(10, 2 * million, 0.0), (9, million + 1, 1.0), (8, million // 2, 2.0)]])
    assert solve(net, choices, {"macs": million}) == [2]


def test_nothing_to_choose():
    net, choices = problem([], fixed=(10, 10))
    assert solve(net, choices, {"params": 10}) == []
    assert solve(net, choices, {"params": 9}) is None
    assert closest(net, choices, {"params": 9}) == []


POINTS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_pareto_by_brute_force(rows):
    options = [option(i, p, m, float(d)) for i, (p, m, d) in enumerate(rows)]
    kept = pareto(options)
    assert kept[0] is options[0]

    def key(o):
        return (o.damage, o.cost.macs, o.cost.params)

    for o in options:
        assert any(all(a <= b for a, b in zip(key(k), key(o), strict=True)) for k in kept)
    for o in kept[1:]:
        others = [k for k in options if k is not o and all(a <= b for a, b in zip(key(k), key(o), strict=True))]
        assert all(key(k) == key(o) for k in others)
    assert len({key(k) for k in kept[1:]}) == len(kept) - 1


# On real nets.


def observed(name):
    model, example = case(name).make()
    net = taut.trace(model, example)
    return net, taut.observe(net, model, case(name).data())


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


def test_survey_offers_keeping_first_and_never_growth():
    net, stats = observed("resnet")
    choices = survey(net, stats, [kind() for kind in METHODS.values() if kind.default])
    assert {c.group.layer.name for c in choices} <= {layer.name for layer in net.layers if layer.skip is None}
    for choice in choices:
        assert choice.options[0] == Option(None, choice.group.layer.cost, 0.0)
        assert all(o.cost.lowers(choice.options[0].cost) for o in choice.options[1:])
        assert all(o.damage >= 0 for o in choice.options)


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
    with pytest.raises(BudgetError, match=r"params <= 1 \(the candidates alone reach (\d+) of 2\.93k\)") as caught:
        taut.plan(net, stats, Budget(params=1), methods="svd")
    least = cost_of(net, choices, closest(net, choices, {"params": 1}), "params")
    assert str(least) in str(caught.value)
    assert unmet(net, choices, {"params": 1, "macs": 1}).count("the candidates alone reach") == 2


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
