"""The integer program against every combination written out."""

import math
import os
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.knapsacks import best, capped, cost_of, damage_of, problem
from taut.planning.knapsack import closest, solve

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
    caps = capped(net, choices, {})

    def worst(picks):
        if any(cost_of(net, choices, picks, key) > cap for key, cap in caps.items() if key not in limits):
            return math.inf
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


PRINTING = """
import ctypes
from concurrent.futures import ThreadPoolExecutor
from taut.planning import knapsack

def printing(*objective, **program):
    ctypes.CDLL(None).printf(b"a step of the search\\n")

knapsack.milp = printing
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: knapsack._solved(), range(16)))
print("the answer", flush=True)
"""


def test_what_the_solver_prints_is_no_answer():
    """HiGHS prints a line in some searches, past Python and held back by C, that would stand in a command's JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout == "the answer\n"
    assert ran.stderr.count("a step of the search") == 16


@pytest.mark.parametrize("closed", [1, 2], ids=["output", "error"])
def test_a_process_without_its_streams_solves_as_well(closed, tmp_path):
    """As a daemon runs: nothing can be sent anywhere else."""
    program = (
        f"import os; from pathlib import Path; from taut.planning import knapsack; os.close({closed}); "
        "knapsack.milp = lambda: 'solved'; Path('answer').write_text(knapsack._solved())"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    assert (tmp_path / "answer").read_text() == "solved"
