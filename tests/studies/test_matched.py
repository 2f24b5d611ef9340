"""Matched accuracy: factors are read off curves between measured points, and never beyond them."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "experiments" / "prune-then-tucker"
spec = importlib.util.spec_from_file_location("matched_of_study", HERE / "matched.py")
matched_of_study = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = matched_of_study
spec.loader.exec_module(matched_of_study)
reached, matched, gains = matched_of_study.reached, matched_of_study.matched, matched_of_study.gains

CURVE = [(1.0, 0.90), (2.0, 0.89), (4.0, 0.87), (8.0, 0.80)]


@pytest.mark.parametrize(
    ("accuracy", "factor"),
    [(0.89, 2.0), (0.88, 2 * 2**0.5), (0.87, 4.0), (0.835, 4 * 2**0.5), (0.80, None), (0.5, None)],
)
def test_a_curve_is_straight_between_points_over_the_logarithm(accuracy, factor):
    found = reached(CURVE, accuracy)
    assert (found is None) if factor is None else math.isclose(math.exp(found), factor)


def test_of_a_curve_that_falls_twice_the_largest_factor_counts():
    assert math.isclose(math.exp(reached([(1.0, 0.9), (2.0, 0.8), (4.0, 0.88), (8.0, 0.7)], 0.88)), 4.0)


def test_an_accuracy_above_the_control_is_reached_nowhere():
    assert reached(CURVE, 0.95) is None


def row(way, factor, accuracy, seed=0, net="net"):
    level = None if way == "control" else [factor]
    return {"net": net, "way": way, "level": level, "seed": seed, "params": 1 / factor, "macs": 1, "accuracy": accuracy}


def rows(seed=0, shift=1.0):
    return [
        row("control", 1.0, 0.9, seed),
        *(row("prune", f * shift, a, seed) for f, a in CURVE[1:]),
        *(row("tucker", 1.5 * f * shift, a, seed) for f, a in CURVE[1:]),
        *(row("prune-tucker", 3 * f * shift, a, seed) for f, a in CURVE[1:]),
    ]


def test_a_gain_is_over_the_better_single_way_and_factors_are_geometric_means_over_seeds():
    table = [r for r in matched(rows() + rows(1, 4.0)) if r["size"] == "params" and r["drop"] == 1.0]
    assert math.isclose(table[0]["prune"], 4.0)
    assert math.isclose(gains(table)[0]["gain"], 1.0)


def test_a_way_without_a_point_below_the_accuracy_has_no_factor():
    some = [r for r in rows() if not (r["way"] == "prune-tucker" and r["accuracy"] < 0.89)]
    table = [r for r in matched(some) if r["size"] == "params" and r["drop"] == 2.0]
    assert "prune" in table[0]
    assert "prune-tucker" not in table[0]
    assert gains(table) == []
