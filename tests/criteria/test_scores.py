"""Scores of weights by hand, and what all of them share."""

import pytest
import torch

from taut import CallError
from taut.criteria import SCORES, score

W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.25]])
H = torch.tensor([[0.5, 1.0, -1.0], [2.0, -3.0, 0.0]])

BY_HAND = {
    "magnitude": [1, 2, 0.5, 3, 0.25],
    "residual": [0.5, 1, -0.5, 0, 0.25],
    "flipped": [-0.5, -1, 0.5, 0, -0.25],
    "reconstruction": [0.5, 1, 1, 3, 0],
    "sum": [1.5, 3, 1.5, 6, 0.25],
    "product": [0.5, 2, 0.5, 9, 0],
    "max": [1, 2, 1, 3, 0.25],
    "random": [0.5, 1, -1, -3, 0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    found = score(name, W, H)
    assert found[W != 0].tolist() == BY_HAND[name]


def test_wanda_is_the_weight_times_the_size_of_its_input():
    rms = torch.tensor([[2.0, 1.0, 4.0]])
    assert score("wanda", W, rms)[W != 0].tolist() == [2, 2, 2, 3, 1]


@pytest.mark.parametrize("name", SCORES)
def test_pruned_weights_come_last(name):
    assert score(name, W, H)[1, 0] == -torch.inf
    assert bool(torch.isfinite(score(name, W, H)[W != 0]).all())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CallError, match="magnitude, residual"):
        score("taylor", W, H)


def test_a_score_that_is_not_a_number():
    with pytest.raises(CallError, match="not a number"):
        score("sum", W, torch.full_like(W, float("nan")))


def test_half_precision_is_scored_in_single():
    assert score("sum", W.half(), H.half()).dtype == torch.float32
