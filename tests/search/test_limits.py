"""The one search: aims are corrected by what is found, the best within all limits is kept, and it ends."""

import math
from types import SimpleNamespace

import pytest
from torch import nn

import taut
from cases import case
from taut.measure import Score
from taut.search.limits import (
    CLOSE,
    COUNTED_TRIES,
    JUDGED_TRIES,
    LARGEST_RATIO,
    BudgetSearch,
    CountedLimit,
    DropLimit,
    Evaluation,
    LatencyLimit,
    limits_at_ratio,
    model_at_ratio,
)
from taut.search.session import Session
from taut.types import Cost, Kept, Plan


class Fake:
    """A session whose models are what `found` makes of the aims; None where the aims are below `least`."""

    def __init__(self, found, least=0.0, rolled_back=0):
        self.found, self.least, self.asked, self.failing = found, least, [], rolled_back
        self.left_alone = []
        cost = Cost(1000, 1000, 1000, 4000)
        self.stats = SimpleNamespace(network=SimpleNamespace(cost=cost))
        self.planner = SimpleNamespace(movable=cost)

    def best_within(self, aims):
        self.asked.append(dict(aims))
        if any(aim < self.least for aim in aims.values()):
            return None
        kept = ()
        if self.failing:
            self.failing -= 1
            kept = (Kept("layer", "rolled back: it broke", Cost(), "rolled back"),)
        model = nn.Identity()
        model.amounts = self.found(dict(aims))
        return model, Plan((), kept)

    def amounts(self, model, keys):
        return {key: model.amounts[key] for key in keys}

    def without(self, reasons):
        self.left_alone += reasons
        return self


def same(aims):
    return aims


def test_a_plan_within_the_counts_is_taken_at_once():
    session = Fake(same)
    model, _ = BudgetSearch(session, [CountedLimit("macs", 500), CountedLimit("params", 300)]).run()
    assert model.amounts == {"macs": 500, "params": 300}
    assert len(session.asked) == 1


def test_what_headers_add_is_asked_for_less():
    session = Fake(lambda aims: {"bytes": aims["bytes"] + 40})
    model, _ = BudgetSearch(session, [CountedLimit("bytes", 500)]).run()
    assert 450 < model.amounts["bytes"] <= 500
    assert len(session.asked) == 2


def test_counts_that_stay_too_large_end_the_search():
    session = Fake(lambda _: {"macs": 900})
    assert BudgetSearch(session, [CountedLimit("macs", 500)]).run() is None
    assert len(session.asked) == COUNTED_TRIES
    assert BudgetSearch(Fake(same, least=600), [CountedLimit("macs", 500)]).run() is None


def test_after_a_roll_back_the_same_is_asked_of_the_other_layers():
    session = Fake(lambda aims: {"macs": aims["macs"] + 100 * (not session.left_alone)}, rolled_back=1)
    search = BudgetSearch(session, [CountedLimit("macs", 500)])
    model, _ = search.run()
    assert session.left_alone == ["layer"]
    assert session.asked == [{"macs": 500}] * 2
    assert model.amounts["macs"] == 500


@pytest.mark.parametrize("wrong", [lambda t: 1.4 * t, lambda t: 0.2 + 0.8 * t, lambda t: t**2, math.sqrt])
def test_a_time_that_is_predicted_wrongly_is_met_and_mostly_used(wrong):
    session = Fake(lambda aims: {"latency": wrong(aims["latency"])})
    model, _ = BudgetSearch(session, [LatencyLimit("latency", 0.5)]).run()
    assert 0.8 * 0.5 < model.amounts["latency"] <= 0.5
    assert session.asked[0] == {"latency": 0.5 * CLOSE}


def test_of_plans_within_all_limits_the_one_that_uses_most():
    session = Fake(lambda aims: {"latency": 0.5 * aims["latency"], "macs": 100})
    model, _ = BudgetSearch(session, [LatencyLimit("latency", 0.5), CountedLimit("macs", 1000)]).run()
    tried = [0.5 * aims["latency"] for aims in session.asked]
    assert model.amounts["latency"] == max(time for time in tried if time <= 0.5)


@pytest.mark.parametrize("floor_at", [2.0, 7.3, 25.0])
def test_a_drop_alone_is_bisected_to_the_smallest_above_the_floor(floor_at):
    """The metric falls with the ratio, and meets the floor at `floor_at`."""
    session = Fake(lambda aims: {"ratio": 1000 / aims["macs"]})
    evaluation = Evaluation(lambda model: 1 - model.amounts["ratio"] / 100, Score("metric", 1.0))
    model, _ = BudgetSearch(session, [DropLimit(1 - floor_at / 100)], evaluation).run()
    ratios = [1000 / aims["macs"] for aims in session.asked]
    assert len(ratios) == JUDGED_TRIES
    assert model.amounts["ratio"] == max(ratio for ratio in ratios if ratio <= floor_at + 1e-9)
    widest = math.log(LARGEST_RATIO / 4) / 2 ** (JUDGED_TRIES - 1)  # the first ratio is 4
    assert math.log(floor_at / model.amounts["ratio"]) <= widest + 1e-9


def test_limits_of_one_key_are_both_held_whatever_their_order():
    for order in (1, -1):
        session = Fake(lambda aims: {**aims, "drop": 1.0})
        evaluation = Evaluation(lambda model: 1 - 0.01 * 1000 / model.amounts["params"], Score("metric", 1.0))
        limits = [DropLimit(0.9), CountedLimit("params", 300)][::order]
        model, _ = BudgetSearch(session, limits, evaluation).run()
        assert model.amounts["params"] <= 300
        assert all(aims["params"] <= 300 for aims in session.asked)
        assert evaluation.score(model).value == max(
            1 - 0.01 * 1000 / aims["params"] for aims in session.asked if aims["params"] <= 300
        )


def test_a_drop_that_nothing_holds_gives_nothing():
    session = Fake(lambda aims: {"ratio": 1000 / aims["macs"]})
    evaluation = Evaluation(lambda _: 0.0, Score("metric", 1.0))
    assert BudgetSearch(session, [DropLimit(0.9)], evaluation).run() is None
    ratios = [1000 / aims["macs"] for aims in session.asked]
    assert ratios == sorted(ratios, reverse=True)


def test_the_path_shrinks_the_compressible_part():
    model, example = case("vgg").make()
    session = Session.open(model, example, case("vgg").data(), None)
    sizes = []
    for ratio in (1.0, 1.5, 2.0, 4.0):
        limits = limits_at_ratio(session, ratio)
        small, plan = model_at_ratio(session, ratio)
        cost = session.cost(small)
        assert cost.params <= limits["params"] + 1e-6
        assert cost.macs <= limits["macs"] + 1e-6
        sizes.append(cost.params)
        assert plan.before == session.network.cost
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == session.network.cost.params
    assert model_at_ratio(session, 1e9) is None


def test_a_session_is_complete_and_frozen_and_what_is_left_alone_makes_another():
    model, example = case("vgg").make()
    session = Session.open(model, example, case("vgg").data(), ("channels", "svd"))
    with pytest.raises(AttributeError):
        session.planner = None
    name = session.planner.ranks.choices[0].group.layer.name
    other = session.without({name: "it broke"})
    assert name in {choice.group.layer.name for choice in session.planner.ranks.choices}
    assert name not in {choice.group.layer.name for choice in other.planner.ranks.choices}
    assert other.network[name].skip == "it broke"
    assert session.network[name].skip is None
    built, plan = other.best_within({"macs": 0.6 * session.network.cost.macs})
    assert all(name not in step.layers for step in plan.steps)
    assert taut.trace(built, example).cost.macs <= 0.6 * session.network.cost.macs
