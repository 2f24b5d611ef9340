"""The contest runs where the peer is not installed: its rows are left out, and everything else is there."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parents[2] / "experiments"


def test_without_the_peer_only_our_rows_are_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as if it were not installed
    monkeypatch.setattr(sys, "path", [str(HERE / "prune-then-tucker"), str(HERE / "nets"), *sys.path])
    spec = importlib.util.spec_from_file_location("contest_of_study", HERE / "prune-then-tucker" / "contest.py")
    contest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contest)
    monkeypatch.setattr(contest, "find_spec", lambda name: None)
    assert {cell["side"] for cell in contest.wanted(quick=True)} == {"ours"}
    assert {cell["side"] for cell in contest.wanted(quick=False)} == {"control", "ours", *contest.ALONE}
    assert not contest.hurried(quick=False)
    monkeypatch.setattr(contest, "find_spec", lambda name: spec)
    assert len(contest.hurried(quick=False)) == 6
    assert not contest.hurried(quick=True)
    assert {cell["side"] for cell in contest.wanted(quick=True)} == {"ours", contest.PEERS[0]}
