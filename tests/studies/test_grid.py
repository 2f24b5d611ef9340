"""The grid runner: every cell once, also after a kill, and never the result of another cell."""

import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from studies import grid_work
from taut.errors import BudgetError, CallError, DataError
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


def test_a_damaged_line_and_a_folder_set_aside_cost_no_other_run(tmp_path):
    path, ran = tmp_path / "out" / "runs.jsonl", []

    def work(cell):
        ran.append(cell["a"])
        return {"b": 1}

    run_grid(cells(a=[1, 2]), work, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b"results", b"\xff\xfe") + lines[1])
    path.parent.rename(tmp_path / ".taut-old-out")  # of a killed write
    run_grid(cells(a=[1, 2]), work, path)
    assert ran == [1, 2, 1]


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


def test_several_processes_give_the_same_in_the_same_order(tmp_path):
    wanted = [*cells(a=[3, 1, 2]), {"a": 3}]
    alone = run_grid(wanted, grid_work.square, tmp_path / "alone.jsonl")
    assert run_grid(wanted, grid_work.square, tmp_path / "runs.jsonl", jobs=2) == alone
    assert lines(tmp_path / "runs.jsonl") == lines(tmp_path / "alone.jsonl")


@pytest.mark.parametrize(
    ("ending", "error", "message"),
    [
        ("raise", BudgetError, "too small"),
        ("exit", DataError, r"\{'a': 2\} died \(exit code 3\)"),
        ("die", DataError, r"\{'a': 2\} died \(signal 9, as when memory runs out, 3 times\)"),
    ],
)
def test_a_run_that_fails_in_a_process_ends_the_grid_and_keeps_what_is_finished(tmp_path, ending, error, message):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(error, match=message):
        run_grid(cells(a=[1, 2, 3, 4]), partial(grid_work.broken, path, ending), path, jobs=2)
    assert [record["settings"]["a"] for record in lines(path)] == [1]
    assert not multiprocessing.active_children()


def test_the_work_of_a_killed_process_is_done_again(tmp_path):
    wanted = cells(a=[1, 2, 3])
    found = run_grid(wanted, partial(grid_work.killed_once, tmp_path), tmp_path / "runs.jsonl", jobs=2)
    assert found == [{"a": 1, "square": 1}, {"a": 2, "square": 4}, {"a": 3, "square": 9}]
    assert (tmp_path / "killed").exists()
    assert not multiprocessing.active_children()


def test_an_executor_gives_the_same_in_the_same_order(tmp_path):
    wanted = [*cells(a=[3, 1, 2]), {"a": 3}]
    alone = run_grid(wanted, grid_work.square, tmp_path / "alone.jsonl")
    with ThreadPoolExecutor(2) as executor:
        assert run_grid(wanted, grid_work.square, tmp_path / "runs.jsonl", jobs=executor) == alone
    assert lines(tmp_path / "runs.jsonl") == lines(tmp_path / "alone.jsonl")


def test_work_that_cannot_be_sent_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # which would send it
    with pytest.raises(CallError, match="top level of a module"):
        run_grid(cells(a=[1]), lambda cell: {}, tmp_path / "runs.jsonl", jobs=2)
    with pytest.raises(CallError, match="'jobs' of a grid must be"):
        run_grid(cells(a=[1]), lambda cell: {}, tmp_path / "runs.jsonl", jobs=0)


def lines(path):
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["settings"]["a"])
