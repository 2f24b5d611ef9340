"""Budgets of latency, on a clock that the tests set: plans meet what is measured, not what is predicted."""

from functools import cache

import pytest
import torch
from torch import nn

import taut
from cases import case, untouched
from taut import Budget, BudgetError, CallError
from taut.measure import Pair, Searched
from taut.measure.latency_model import LatencyModel, model_ops
from taut.measure.runtimes import RUNTIMES
from taut.search.latency import fit_latency_model

BOTH = ("channels", "svd", "spatial", "tucker")
LOW_RANK = ("svd", "spatial", "tucker")


class Clock:
    """Takes the time that planted rates give, `off` times as long for whatever is not the original."""

    pace = LatencyModel((1e-6, 1e-6, 1e-6, 0.0005), 1, 0.005, "eager")
    off = 1.0
    runtime = RUNTIMES["eager"]

    def __init__(self, original, example, trial=None):
        self.example, self.whole = example, self.seconds(original, example)

    def seconds(self, model, example):
        model.eval()
        return self.pace.rest + self.pace.of(model_ops(model, example))

    def relative_time(self, model):
        share = self.seconds(model, self.example) / self.whole
        return share if abs(share - 1) < 1e-9 else self.wrong(share * self.off)

    def searched(self, model, limit):
        return Searched("eager", Pair(1.0, self.relative_time(model)), limit)

    @staticmethod
    def wrong(share):
        return share


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr("taut.search.session.LatencyMeter", Clock)
    return Clock


def made(name, methods, **budget):
    model, example = case(name).make()
    batches = case(name).data(batches=2, size=24)
    with untouched(model):
        return model, example, taut.compress(model, example, budget=Budget(**budget), data=batches, methods=methods)


@cache
def made_once(name, methods, limit):
    """On the clock as it is: what several tests look at, and none changes."""
    return made(name, methods, latency=limit)


def share(model, example, small):
    net = taut.trace(model, example)
    return Clock(model, net.example).relative_time(small)


@pytest.mark.parametrize(
    ("name", "methods"),
    [("vgg", BOTH), ("vgg", LOW_RANK), ("vgg", ("channels",)), ("resnet", LOW_RANK), ("resnet", ("channels",))],
    ids=["vgg, both", "vgg, low rank", "vgg, channels", "resnet, low rank", "resnet, channels"],
)
def test_the_measured_time_is_within_the_budget_and_most_of_it_is_used(name, methods):
    model, example, result = made_once(name, methods, 0.7)
    assert 0.5 < share(model, example, result.model) <= 0.7
    assert result.plan.steps


@pytest.mark.parametrize("off", [0.8, 1.25])
def test_a_clock_that_the_rates_do_not_explain_is_met_all_the_same(clock, monkeypatch, off):
    monkeypatch.setattr(clock, "off", off)
    model, example, result = made("vgg", BOTH, latency=0.7)
    assert 0.4 < share(model, example, result.model) <= 0.7


@pytest.mark.parametrize(
    ("methods", "limit"),
    [(BOTH, 0.6), (LOW_RANK, 0.6), (LOW_RANK, 0.9), (("channels",), 0.6), (("channels",), 0.9)],
    ids=["both", "low rank", "low rank, mild", "channels", "channels, mild"],
)
def test_a_clock_that_goes_otherwise_once_the_rates_are_known_is_met(clock, monkeypatch, methods, limit):
    """The aims are bracketed: corrections in proportion alone would stop short of the limit."""

    def paced(*args):
        found = fit_latency_model(*args)
        monkeypatch.setattr(clock, "wrong", staticmethod(lambda share: 0.25 + 0.75 * share))
        return found

    monkeypatch.setattr("taut.search.session.fit_latency_model", paced)
    model, example, result = made("vgg", methods, latency=limit)
    assert share(model, example, result.model) <= limit


@pytest.mark.parametrize("limit", [0.8, 0.9, 0.95])
def test_variants_that_are_faster_than_predicted_do_not_make_mild_limits_impossible(clock, monkeypatch, limit):
    monkeypatch.setattr(clock, "off", 0.8)
    model, example, result = made("vgg", ("channels",), latency=limit)
    assert share(model, example, result.model) <= limit


def test_exact_steps_count_towards_the_time():
    """Shares are of the original's time, whatever the plan is made from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 16, 31, padding=15), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1), nn.Flatten())
    model, example = nn.Sequential(*model, nn.Linear(128, 32)).eval(), torch.randn(2, 4, 8)
    methods, data = ("dead_taps", *BOTH), [torch.randn(64, 4, 8)]
    taps = taut.compress(model, example, budget=Budget(macs=0.9999), data=data, methods=("dead_taps",))
    limit = 0.8 * share(model, example, taps.model)
    result = taut.compress(model, example, budget=Budget(latency=limit), data=data, methods=methods)
    assert result.plan.steps[0].method == "dead_taps"
    assert 0.6 * limit < share(model, example, result.model) <= limit


@pytest.mark.parametrize("name", ["resnet", "norm1d"])
def test_a_model_in_train_mode_is_left_alone(name):
    if name == "norm1d":
        model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)).train()
        example, batches = torch.randn(1, 64), [torch.randn(48, 64)]
    else:
        model, example = case(name).make()
        model, batches = model.train(), case(name).data(batches=4, size=24)
    with untouched(model):
        taut.compress(model, example, budget=Budget(latency=0.8), data=batches, methods=("channels", "svd"))
    assert model.training


def test_layers_of_other_kinds_are_a_constant():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mine, self.last = Mine(24, 24), nn.Linear(24, 128)
            self.out = nn.Linear(128, 64)

        def forward(self, x):
            return self.out(self.last(self.mine(x)[0]).relu())

    model, x = Net().eval(), torch.randn(4, 24)
    result = taut.compress(
        model, x, budget=Budget(latency=0.6), data=[torch.randn(64, 24)], methods=("channels", "svd")
    )
    net = taut.trace(model, x)
    assert Clock(model, net.example).relative_time(result.model) <= 0.6


def test_time_and_counts_hold_together():
    model, example, result = made("vgg", BOTH, latency=0.8, macs=0.5, params=0.6)
    before, after = taut.trace(model, example).cost, taut.trace(result.model, example).cost
    assert after.macs <= 0.5 * before.macs
    assert after.params <= 0.6 * before.params
    assert share(model, example, result.model) <= 0.8


def test_all_of_the_time_changes_nothing():
    model, _, result = made("vgg", BOTH, latency=1.0)
    assert not result.plan.steps
    for mine, theirs in zip(model.state_dict().values(), result.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("methods", [BOTH, LOW_RANK], ids=["both", "low rank"])
def test_what_cannot_be_met_says_how_far_it_goes(methods):
    with pytest.raises(
        BudgetError, match=r"latency <= 0\.001.* reaches latency 0\.\d+ of 1, measured in eager"
    ) as caught:
        made("vgg", methods, latency=0.001)
    assert caught.value.best.plan.steps


def test_a_drop_is_searched_within_the_time():
    model, example = case("vgg").make()
    batches = case("vgg").data(batches=4, size=24)
    budget = Budget(drop=0.5, latency=0.7)
    result = taut.compress(model, example, budget=budget, data=batches, methods=LOW_RANK, evaluate=lambda _: 1.0)
    assert share(model, example, result.model) <= 0.7


def test_the_plan_is_carried_out_again_from_json():
    model, example, result = made_once("vgg", BOTH, 0.7)
    plan = taut.Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    net = taut.trace(model, example)
    again = taut.apply(model, plan, taut.observe(net, model, case("vgg").data(batches=2, size=24)))
    assert share(model, example, again) == pytest.approx(share(model, example, result.model))


def test_training_keeps_the_time():
    model, example = case("vgg").make()
    batches = case("vgg").data(batches=4, size=24)
    result = taut.compress(
        model,
        example,
        budget=Budget(latency=0.7),
        data=batches,
        finetune=taut.Finetune(batches, batches, schedule=(taut.Stage((), epochs=1),)),
        methods=LOW_RANK,
    )
    assert share(model, example, result.model) <= 0.7


def test_a_plan_alone_has_no_clock():
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    with pytest.raises(CallError, match=r"'latency' and 'drop' are for taut\.compress"):
        taut.plan(net, taut.observe(net, model), Budget(latency=0.5))


def test_nothing_else_changes_the_channels_that_a_budget_of_macs_takes():
    """Rates and lanes are of no account where no time is asked for."""
    _, _, first = made("vgg", BOTH, macs=0.5)
    assert all("rates" not in step.settings or step.settings["rates"] is None for step in first.plan.steps)
