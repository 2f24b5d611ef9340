"""What one verb gives and the next takes."""

import pytest
import torch
from torch import nn

import taut

MODEL, X = nn.Sequential(nn.Linear(8, 6)).eval(), torch.randn(4, 8)
NET = taut.trace(MODEL, X)
STATS = taut.observe(NET, MODEL, [X])

MIXED_UP = {
    "observe": (lambda: taut.observe(MODEL, MODEL, [X]), "taut.trace"),
    "plan, a model": (lambda: taut.plan(MODEL, STATS, {"macs": 0.5}), "taut.trace"),
    "plan, data": (lambda: taut.plan(NET, [X], {"macs": 0.5}), "taut.observe"),
    "whole": (lambda: taut.whole(MODEL, "magnitude", sparsity=0.5), "taut.trace"),
    "apply, steps": (lambda: taut.apply(MODEL, (), STATS), "taut.plan"),
    "apply, data": (lambda: taut.apply(MODEL, taut.Plan(()), [X]), "taut.observe"),
    "sensitivity": (lambda: taut.sensitivity(NET, MODEL, [X], [X]), "taut.observe"),
}


@pytest.mark.parametrize("call", MIXED_UP)
def test_another_argument_is_refused_with_where_it_comes_from(call):
    run, origin = MIXED_UP[call]
    with pytest.raises(taut.CallError, match=f"as {origin}"):
        run()
