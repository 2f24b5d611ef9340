"""Selection: exactly as many as asked for, the lowest, ties by index; against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from taut import CallError
from taut.criteria import above, mean_percentile, smallest, within_runs


def sorted_reference(scores, wanted):
    """The stable order of all scores in a row."""
    flat = np.concatenate([s.numpy().ravel() for s in scores]).astype(np.float32) + np.float32(0)
    keep = np.ones(len(flat), bool)
    keep[np.argsort(flat, kind="stable")[:wanted]] = False
    return keep


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-3, 3, width=16)),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.sampled_from([-1, 0, 0.5, 2])),
    st.floats(0, 0.999),
)
def test_exactly_as_many_as_asked_for_and_the_lowest(a, b, sparsity):
    scores = [torch.from_numpy(a), torch.from_numpy(b)]
    kept = smallest(scores, sparsity)
    assert [k.shape for k in kept] == [s.shape for s in scores]
    wanted = round(sparsity * (a.size + b.size))
    found = np.concatenate([k.numpy().ravel() for k in kept])
    assert (~found).sum() == wanted
    assert (found == sorted_reference(scores, wanted)).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.937, 0.9999])
def test_infinite_tiny_and_equal_scores(sparsity):
    a = torch.tensor([float("-inf"), float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38] * 9)
    (kept,) = smallest([a], sparsity)
    wanted = round(sparsity * len(a))
    assert (kept.numpy() == sorted_reference([a], wanted)).all()


def test_layers_by_themselves():
    torch.manual_seed(0)
    scores = [torch.randn(40, 10), 100 * torch.randn(7, 9)]
    kept = smallest(scores, 0.3, scope="layer")
    assert [int((~k).sum()) for k in kept] == [120, 19]
    for score, keep in zip(scores, kept, strict=True):
        assert score[~keep].max() < score[keep].min()


def test_an_empty_layer_is_no_obstacle():
    kept = smallest([torch.zeros(0, 4), torch.arange(10.0)], 0.5)
    assert kept[0].shape == (0, 4)
    assert kept[1].tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), True, "half"])
def test_a_sparsity_outside_its_range(sparsity):
    with pytest.raises(CallError, match="sparsity"):
        smallest([torch.ones(3)], sparsity)


def test_an_unknown_scope():
    with pytest.raises(CallError, match="scope"):
        smallest([torch.ones(3)], 0.5, scope="row")


def test_a_fixed_threshold_keeps_what_reaches_it():
    assert above([torch.tensor([0.1, 0.2, 0.3])], 0.2)[0].tolist() == [False, True, True]


def test_mean_of_percentiles_favours_no_layer_by_its_size():
    small, large = torch.arange(1.0, 11), 100 + torch.arange(1.0, 1001)
    assert mean_percentile([small, large], 0.5) == pytest.approx((5 + 600) / 2)
    assert mean_percentile([torch.tensor([float("-inf"), 1.0, 3.0])], 0.5) == 1.0  # pruned weights do not count


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 2)), elements=st.floats(-3, 3)
    ),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_of_every_run_the_highest_stay(scores, stay, more):
    run = stay + more
    (kept,) = within_runs([torch.from_numpy(scores)], stay, run)
    for output, inputs, tap in np.ndindex(scores.shape[0], -(-scores.shape[1] // run), scores.shape[2]):
        part = slice(inputs * run, (inputs + 1) * run)
        mine, mask = scores[output, part, tap], kept[output, part, tap].numpy()
        assert mask.sum() == min(stay, len(mine))
        assert mine[mask].min() >= mine[~mask].max(initial=-np.inf)


def test_weights_that_are_zero_already_go_first_within_their_run():
    (kept,) = within_runs([torch.tensor([[float("-inf"), 1.0, 2.0, 3.0, float("-inf")]])], 2, 4)
    assert kept.tolist() == [[False, False, True, True, True]]
