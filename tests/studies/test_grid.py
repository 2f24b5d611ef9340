"""The grid runner: every cell once, also after a kill, and never the result of another cell."""

import json

import pytest

from taut.errors import CallError
from taut.studies.grid import cells, run_grid


def test_all_combinations_the_last_axis_fastest():
    assert cells(a=[1, 2], b=["x", "y"]) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_finished_runs_are_not_run_again(tmp_path):
    ran, path = [], tmp_path / "deep" / "runs.jsonl"

    def work(cell):
        if cell == {"a": 3}:
            raise KeyboardInterrupt
        ran.append(cell)
        return {"square": cell["a"] ** 2}

    with pytest.raises(KeyboardInterrupt):
        run_grid(cells(a=[1, 2, 3]), work, path)
    assert run_grid(cells(a=[2, 1]), work, path) == [{"a": 2, "square": 4}, {"a": 1, "square": 1}]
    assert ran == [{"a": 1}, {"a": 2}]


def test_a_torn_line_is_run_again_and_the_file_stays_readable(tmp_path):
    path = tmp_path / "runs.jsonl"
    run_grid(cells(a=[1, 2]), lambda cell: {"b": cell["a"]}, path)
    path.write_bytes(path.read_bytes()[:-9])
    assert run_grid(cells(a=[1, 2, 3]), lambda cell: {"b": -cell["a"]}, path) == [
        {"a": 1, "b": 1},
        {"a": 2, "b": -2},
        {"a": 3, "b": -3},
    ]
    good = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}}")]
    assert [record["settings"]["a"] for record in good] == [1, 2, 3]


def test_results_that_are_no_plain_data_are_refused(tmp_path):
    for results in ({"x": float("nan")}, {"x": object()}, {"a": 1}):
        with pytest.raises(CallError):
            run_grid(cells(a=[1]), lambda cell, found=results: found, tmp_path / "runs.jsonl")
    with pytest.raises(CallError, match="plain data"):
        run_grid([{"a": object()}], lambda cell: {}, tmp_path / "runs.jsonl")


def test_lines_of_other_versions_do_not_count(tmp_path):
    path = tmp_path / "runs.jsonl"
    run_grid(cells(a=[1]), lambda cell: {"b": 1}, path, mark="old")
    assert run_grid(cells(a=[1]), lambda cell: {"b": 2}, path, mark="new") == [{"a": 1, "b": 2}]
    assert run_grid(cells(a=[1]), lambda cell: {"b": 3}, path, mark="old") == [{"a": 1, "b": 1}]
