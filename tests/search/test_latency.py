"""What is timed to learn a machine's rates: variants of the model, then the plans that the rates lead to."""

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut.errors import ModelError
from taut.measure.latency_model import LatencyModel, model_ops
from taut.measure.runtimes import RUNTIMES
from taut.methods import choose
from taut.planning.candidates import survey
from taut.search import latency
from taut.search.latency import FACTORIZED, NARROW, ROUNDS, fit_latency_model, shape_variants

RATES = LatencyModel((2e-4, 1e-4, 5e-4, 0.01), 1, 0.1, "eager")


class Meter:
    """A meter whose times are those of planted rates, `wrong` times as long for the models that `odd` picks."""

    runtime = RUNTIMES["eager"]

    def __init__(self, base, example, odd=lambda model: False, wrong=1.0):
        self.example, self.odd, self.wrong, self.timed = example, odd, wrong, []
        self.whole = self._seconds(base)

    def _seconds(self, model):
        return RATES.rest + RATES.of(model_ops(model, self.example))

    def relative_time(self, model):
        self.timed.append(model)
        return self._seconds(model) / self.whole * (self.wrong if self.odd(model) else 1.0)


@pytest.fixture(scope="module")
def subject():
    """A net, what was observed of it, and what can be done to its layers."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)).eval()
    net = taut.trace(model, torch.randn(2, 3, 6, 6))
    stats = taut.observe(net, model)
    return model, stats, survey(net, stats, choose(["svd"]), timed=True)


(SLIM,) = choose(["channels"])


def params(model):
    return sum(p.numel() for p in model.parameters())


def test_variants_are_narrow_ones_then_factorized_ones_and_all_run(subject):
    model, stats, choices = subject
    before = params(model)
    made = list(shape_variants(model, stats, choices, SLIM))
    assert len(made) == len(NARROW) + len(FACTORIZED)
    narrow, thin = made[: len(NARROW)], made[len(NARROW) :]
    assert all(params(one) < before for one in narrow)
    assert all(type(one[0]) is nn.Conv2d for one in narrow)
    assert any(isinstance(layer, nn.Sequential) for one in thin for layer in one)
    assert params(model) == before
    x = stats.network.example.value
    assert all(one(x).shape == model(x).shape for one in made)


def test_they_are_the_same_every_time(subject):
    model, stats, choices = subject
    first, again = (list(shape_variants(model, stats, choices, None)) for _ in range(2))
    assert [repr(one) for one in first] == [repr(one) for one in again]
    assert len({repr(one) for one in first}) > 1


def test_each_kind_is_left_out_where_nothing_of_it_is_asked_for(subject):
    model, stats, choices = subject
    assert len(list(shape_variants(model, stats, choices, None))) == len(FACTORIZED)
    assert len(list(shape_variants(model, stats, (), SLIM))) == len(NARROW)
    assert not list(shape_variants(model, stats, (), None))


def test_channels_that_cannot_go_so_far_are_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 64)).eval()
    net = taut.trace(model, torch.randn(2, 4))
    made = list(shape_variants(model, taut.observe(net, model), (), SLIM))
    assert len(made) < len(NARROW)


def test_planted_rates_are_found_and_the_plans_they_lead_to_are_timed_too(subject):
    model, stats, choices = subject
    meter, asked = Meter(model, stats.network.example), []
    narrow = next(shape_variants(model, stats, choices, SLIM))

    def candidates(fitted_model):
        asked.append(fitted_model)
        yield 0.5, narrow

    fitted_model, corrections = fit_latency_model(model, shape_variants(model, stats, choices, SLIM), meter, candidates)
    assert len(asked) == ROUNDS
    assert len(meter.timed) == 1 + len(NARROW) + len(FACTORIZED) + ROUNDS
    assert corrections == {0.5: pytest.approx(1.0, abs=1e-3)}
    for one in shape_variants(model, stats, choices, SLIM):
        predicted = fitted_model.rest + fitted_model.of(model_ops(one, stats.network.example))
        assert predicted == pytest.approx(Meter(model, stats.network.example).relative_time(one), rel=0.01)
    assert fitted_model.runtime == "eager"


def test_plans_that_take_longer_than_predicted_pull_the_rates_up_and_what_is_left_is_told(subject):
    model, stats, choices = subject
    narrow = next(shape_variants(model, stats, choices, SLIM))
    plain = Meter(model, stats.network.example)
    slow = Meter(model, stats.network.example, odd=lambda one: one is narrow, wrong=1.5)
    found = {}
    for meter in (plain, slow):
        fitted_model, corrections = fit_latency_model(
            model, shape_variants(model, stats, choices, SLIM), meter, lambda _: [(0.5, narrow)]
        )
        found[meter] = fitted_model.rest + fitted_model.of(model_ops(narrow, stats.network.example)), corrections[0.5]
    assert found[slow][0] > 1.05 * found[plain][0]
    assert found[slow][1] > 1.05
    assert found[slow][0] * found[slow][1] == pytest.approx(slow.relative_time(narrow))


def test_what_is_left_is_told_of_the_last_plans_alone(subject):
    model, stats, _ = subject
    candidates = iter([[(0.1, model)], [(0.2, model), (0.3, model)]])
    _, corrections = fit_latency_model(model, (), Meter(model, stats.network.example), lambda _: next(candidates))
    assert list(corrections) == [0.2, 0.3]


def test_what_the_runtime_cannot_run_is_left_out(subject, monkeypatch):
    model, stats, choices = subject
    seen = []

    class Broken(Meter):
        def relative_time(self, one):
            if one is not model:
                seen.append(one)
                if len(seen) % 2:
                    raise ModelError("no such kernel")
            return super().relative_time(one)

    meter = Broken(model, stats.network.example)
    fitted = []
    fit = LatencyModel.fit
    monkeypatch.setattr(latency.LatencyModel, "fit", lambda ops, *rest: (fitted.append(len(ops)), fit(ops, *rest))[1])
    _, corrections = fit_latency_model(
        model, shape_variants(model, stats, choices, None), meter, lambda _: [(0.5, nn.Sequential(model))]
    )
    assert fitted[0] == 1 + len(FACTORIZED) // 2
    assert len(corrections) <= 1
    assert np.isfinite(list(corrections.values())).all()
