"""What `evaluate` may return, the intervals by hand, and errors that name what came back."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from taut.errors import DataError
from taut.measure import Difference, Metric, Score, difference, measure
from taut.measure.accuracy import wilson

MODEL = nn.Linear(2, 1)


def score(result):
    return measure(lambda _: result, MODEL)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]), [0.5], Metric(0.5)]
)
def test_one_number_has_no_interval(value):
    assert score(value) == Score("metric", 0.5)


def test_a_whole_number_and_a_negative_one_are_metrics():
    assert score(3).value == 3.0
    assert score(torch.tensor(-2)).value == -2.0


def test_the_name_is_the_functions():
    def accuracy(model):
        return 0.25

    assert measure(accuracy, MODEL).name == "accuracy"


def test_the_first_key_decides_and_the_others_are_kept():
    result = score({"f1": Metric(0.5, 100), "loss": torch.tensor(2.0), "hits": [1, 0, 1, 1]})
    assert (result.name, result.value, result.n) == ("f1", 0.5, 100)
    assert result.others == {"loss": 2.0, "hits": 0.75}
    assert result.low is not None


def test_wilson_solves_its_equation():
    # the bounds are the rates p at which |rate - p| is z standard errors of p
    for rate, n in ((0.97, 360), (0.5, 10), (0.0, 25), (1.0, 7)):
        for bound in wilson(rate, n):
            assert abs(rate - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)
    assert wilson(0.0, 25) == (0.0, pytest.approx(1.96**2 / (25 + 1.96**2)))


def test_wilson_for_a_rate_only():
    result = score(Metric(0.9, 50))
    assert (result.low, result.high) == wilson(0.9, 50)
    percent = score(Metric(90.0, 50))
    assert (percent.low, percent.high, percent.n) == (None, None, 50)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: [torch.tensor(x) for x in v]])
def test_per_sample_scores(kind):
    result = score(kind([1.0, 2.0, 4.0, 5.0]))
    half = 1.96 * math.sqrt((4 + 1 + 1 + 4) / 3 / 4)
    assert (result.value, result.n) == (3.0, 4)
    assert (result.low, result.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert result.samples.tolist() == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize("scores", [torch.tensor([True, False, True, True]), [1, 0, 1, 1]])
def test_right_or_wrong_per_sample_is_a_rate(scores):
    result = score(scores)
    assert (result.value, result.low, result.high) == (0.75, *wilson(0.75, 4))


def test_paired_difference():
    before, after = score([1.0, 0.0, 1.0, 1.0]), score([1.0, 0.0, 0.0, 1.0])
    change = difference(before, after)
    half = 1.96 * 0.5 / 2  # differences 0, 0, -1, 0: mean -1/4, sd 1/2
    assert (change.value, change.low, change.high) == (-0.25, pytest.approx(-0.25 - half), pytest.approx(-0.25 + half))
    assert difference(before, before) == Difference(0.0, 0.0, 0.0)


@pytest.mark.parametrize("other", [0.5, Metric(0.5, 4), [1.0, 0.0, 0.5]])
def test_without_the_same_samples_there_is_no_interval(other):
    change = difference(score([0.0, 0.0, 0.5, 0.5]), score(other))
    assert change == Difference(0.25)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("nan"), "returned nan for 'metric'"),
        (torch.tensor(float("inf")), "returned inf"),
        ([1.0, float("nan"), float("inf")], "returned 2 scores of 3 as NaN or Inf"),
        ({"acc": float("nan")}, "returned nan for 'acc'"),
        ({"acc": 1.0, "auc": float("nan")}, "returned nan for 'auc'"),
        (Metric(float("nan"), 3), "returned nan"),
        (Metric(0.5, 0), "positive whole number. Got 0"),
        (Metric(0.5, 2.5), "positive whole number. Got 2.5"),
        (None, "returned NoneType"),
        ("0.9", "returned str"),
        (True, "returned bool"),
        ((0.9, 0.1), "returned (float, float)"),
        ({}, "empty dict"),
        ([], "returned []"),
        (["a", "b"], "returned [str, str]"),
        (torch.ones(2, 3), "returned float32[2, 3]"),
        (torch.ones(2, dtype=torch.complex64), "returned complex64[2]"),
        (np.array(["a"]), "returned ndarray"),
        (1j, "returned complex"),
        ({"acc": {"top1": 0.9}}, "returned {top1: float} for 'acc'"),
    ],
)
def test_what_is_no_metric_is_named(result, message):
    with pytest.raises(DataError) as caught:
        score(result)
    assert message in str(caught.value)


def test_an_exception_is_chained():
    def broken(model):
        raise KeyError("labels")

    with pytest.raises(DataError, match="evaluate raised KeyError: 'labels'") as caught:
        measure(broken, MODEL)
    assert isinstance(caught.value.__cause__, KeyError)


def test_eval_mode_the_callers_grad_mode_and_an_untouched_random_state():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 1)).train()
    model[1].eval()
    seen = []

    def evaluate(net):
        seen.append((any(m.training for m in net.modules()), torch.is_grad_enabled(), torch.rand(1).item()))
        if len(seen) == 3:
            net.train()
            raise RuntimeError
        return 1.0

    state = torch.random.get_rng_state()
    measure(evaluate, model)
    with torch.no_grad():
        measure(evaluate, model)
    with pytest.raises(DataError):
        measure(evaluate, model)
    assert [entry[:2] for entry in seen] == [(False, True), (False, False), (False, True)]
    assert len({entry[2] for entry in seen}) == 1  # both models of a comparison draw the same numbers
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.equal(torch.random.get_rng_state(), state)
