"""One comparison of outputs, and the probes that are run."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from taut.structure.sameness import (
    IN_FLOAT64,
    IN_OTHER_BATCHES,
    IN_OTHER_LAYERS,
    Tolerance,
    blamed,
    outputs_match,
    remembered,
)

INF, NAN = float("inf"), float("nan")


def values(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    ("after", "same"),
    [
        (values(1.0, 100.0), True),
        (values(1.0 + 9e-8, 100.0), True),
        (values(1.0 + 2e-7, 100.0), False),
        (values(1.0, 100.0, 0.0), False),
        (values(1.0, 100.0)[None], False),
        (values(1.0, 100.0, dtype=torch.float32), False),
        (values(1.0, NAN), False),
        (values(1.0, INF), False),
    ],
)
def test_a_share_of_the_largest_value_is_rounding(after, same):
    assert outputs_match([values(1.0, 100.0)], [after]) is same


@pytest.mark.parametrize(
    ("tolerance", "most"),
    [
        (Tolerance(share=0.01), (1.0, 1.0)),
        (Tolerance(each=0.01), (0.01, 1.0)),
        (Tolerance(least=0.5), (0.5, 0.5)),
        (Tolerance(each=0.01, least=0.5), (0.51, 1.5)),
    ],
)
def test_each_part_of_a_tolerance(tolerance, most):
    before = values(1.0, -100.0)
    for place, limit in enumerate(most):
        for factor, same in ((0.9, True), (1.1, False)):
            after = before.clone()
            after[place] += factor * limit
            assert outputs_match(before, after, tolerance) is same


def test_where_the_largest_is_zero_nothing_may_move():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert outputs_match(zeros, zeros)
    assert not outputs_match(zeros, zeros + 1e-300)
    assert outputs_match(zeros, zeros + 1e-8, IN_OTHER_BATCHES)
    assert outputs_match(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ((1.0, NAN), (1.0, NAN), True),
        ((1.0, INF), (1.0, INF), True),
        ((1.0, INF), (1.0, -INF), False),
        ((1.0, INF), (1.0, NAN), False),
        ((1.0, INF), (1.0, 9.0), False),
        ((1.0, INF), (2.0, INF), False),
        ((NAN,), (NAN,), True),
        ((NAN,), (1.0,), False),
    ],
)
def test_what_is_not_finite_must_stay_as_it_is(before, after, same):
    for tolerance in (IN_FLOAT64, IN_OTHER_BATCHES, IN_OTHER_LAYERS):
        assert outputs_match(values(*before), values(*after), tolerance) is same


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_and_truth_values_are_equal_or_not(dtype):
    before = torch.tensor([0, 1, 1]).to(dtype)
    assert outputs_match(before, before.clone(), Tolerance(share=9.0))
    assert not outputs_match(before, torch.tensor([0, 1, 0]).to(dtype), Tolerance(share=9.0))


def test_complex_values_and_half_precision():
    z = torch.complex(values(1.0, 2.0), values(3.0, -1.0))
    assert outputs_match(z, z * (1 + 1e-12))
    assert not outputs_match(z, z.conj().resolve_conj())
    half = values(1.0, 100.0, dtype=torch.float16)
    assert outputs_match(half, half + values(0.3, 0.0, dtype=torch.float16), IN_OTHER_LAYERS)
    assert not outputs_match(half.float(), half.float() + values(0.3, 0.0, dtype=torch.float32), IN_OTHER_LAYERS)


@dataclass
class Answer:
    boxes: torch.Tensor
    score: float


def test_nests_objects_arrays_and_numbers_count():
    before = {"a": [values(1.0), np.ones(2)], "b": Answer(values(2.0), 0.5)}
    assert outputs_match(before, {"a": [values(1.0), np.ones(2)], "b": Answer(values(2.0), 0.5)})
    assert not outputs_match(before, {"a": [values(1.0), np.zeros(2)], "b": Answer(values(2.0), 0.5)})
    assert not outputs_match(before, {"a": [values(1.0), np.ones(2)], "b": Answer(values(2.0), 0.6)})
    assert not outputs_match(before, {"a": [values(1.0)], "b": Answer(values(2.0), 0.5)})
    assert not outputs_match([values(1.0)], None)


def test_nothing_matches_no_output():
    assert not outputs_match(None, None)
    assert not outputs_match(None, [values(1.0)])


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)])
def test_in_half_precision_a_few_roundings_of_the_largest_value(dtype, unit):
    before = values(0.0, 64.0, dtype=dtype)
    for roundings, same in ((3, True), (5, False)):
        after = values(roundings * unit * 64, 64.0, dtype=dtype)
        assert outputs_match(before, after, Tolerance(epsilons=4)) is same


def test_only_half_precision_has_room_for_the_rounding_of_its_largest_value():
    before, after = values(1e5, 0.0, dtype=torch.float32), values(1e5, 0.03, dtype=torch.float32)
    assert not outputs_match(before, after, Tolerance(epsilons=4, each=1e-3, least=1e-9))


@pytest.mark.parametrize(
    ("names", "guilty", "found"),
    [
        ("", [], ""),
        ("abcde", [], ""),
        ("abcde", ["c"], "c"),
        ("abcde", ["a", "b", "e"], "abe"),
        ("abcdefg", ["ag"], "abcdefg"),  # only together
        ("ab", ["a"], "a"),
    ],
)
def test_who_is_to_blame_is_found_and_no_choice_is_tried_twice(names, guilty, found):
    tried = []

    def same(chosen):
        tried.append(tuple(chosen))
        return not any(set(together) <= set(chosen) for together in guilty)

    asked = remembered(same)
    assert asked(list(names)) is (not guilty)
    assert blamed(list(names), asked) == list(found)
    assert len(tried) == len(set(tried))
    tried.clear()
    assert blamed(list(names), same) == list(found)
    assert len(tried) == len(set(tried))
