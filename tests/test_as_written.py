"""Random nets as people write them: none makes compress fail, change what comes out, or miss a budget silently."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils import _pytree as pytree

import as_written
import taut
from cases import untouched
from taut import Budget, BudgetError, Plan, Step
from taut.core.example import Example
from taut.methods import METHODS as ALL
from taut.methods import settings as settings_of

NETS = int(os.environ.get("TAUT_RANDOM_NETS", "60")) * 3 // 5
"""How many nets are drawn here; test_properties.py draws the others."""

METHODS = [None, ["channels"], ["svd", "channels"], ["tucker", "spatial", "dead_units"]]
SHARES = st.sampled_from([0.3, 0.5, 0.8])


def run(model, inputs):
    with torch.no_grad():
        return Example(model, inputs).run(model)


def described(output):
    """Containers, shapes and types; floats are finite."""
    leaves, spec = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert all(bool(leaf.isfinite().all()) for leaf in tensors)
    return spec, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def assert_close(found, wanted, tolerance):
    assert described(found) == described(wanted)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        if isinstance(a, Tensor):
            assert float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp_min(1e-3))


def compressed(model, example, data, budget, methods):
    """The result, and whether the budget is met."""
    with untouched(model):
        try:
            return taut.compress(model, example, budget=budget, data=data, methods=methods, compare=False), True
        except BudgetError as error:
            return error.best, False  # None fails below


def reloaded(result, shape):
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small")
        return taut.load(Path(folder) / "small", base=shape.build)


def at_full_rank(model, example):
    """Every layer that low rank takes as two, at ranks that lose nothing."""
    net = taut.trace(model, example)
    steps = []
    for layer in net.layers:
        group = net.group([layer.name])
        if layer.skip is None and ALL["svd"]().refuses(group) is None:
            method = ALL["svd"]().exact_case(group)[0]
            steps.append(Step(group.names, "svd", settings_of(method), allow_growth=True))
    return taut.apply(model, Plan.of(net, steps), taut.observe(net, model))


def check(shape, budget, methods):
    """A result within the budget or the best; the same outputs in kind on every batch, and the same bits reloaded."""
    model, (inputs, data) = shape.build(), shape.inputs_of()
    example = inputs[0]
    result, met = compressed(model, example, data, budget, methods)
    before, after = (taut.measure.count(net, Example(net, example)) for net in (model, result.model))
    for key, limit in budget.limits(before).items():
        assert getattr(after, key) <= limit or not met
    assert after.params <= before.params
    assert after.macs <= before.macs
    again = reloaded(result, shape)
    for one in inputs:
        found = run(result.model, one)
        assert described(found) == described(run(model, one))
        assert_close(run(again, one), found, 0.0)
    if not result.plan.steps:
        assert_close(run(result.model, example), run(model, example), 0.0)
    return model, example


@settings(max_examples=NETS, suppress_health_check=list(HealthCheck))
@given(
    shape=as_written.shapes(), key=st.sampled_from(["params", "macs"]), share=SHARES, methods=st.sampled_from(METHODS)
)
def test_nets_as_people_write_them(shape, key, share, methods):
    model, example = check(shape, Budget(**{key: share}), methods)
    if methods is None:
        assert_close(run(at_full_rank(model, example), example), run(model, example), 1e-3)


@pytest.mark.parametrize("block", sorted(as_written.BLOCKS))
def test_every_block_runs(block):
    shape = as_written.Shape("conv1d", 3, ((block, 8),), False, "tensor", "tensor", (2,), 0)
    (example, _), _ = shape.inputs_of()
    assert described(run(shape.build(), example))[1] == [((2, as_written.CLASSES), torch.float32)]


def test_everything_is_drawn():
    """Else the test above would be hollow."""
    seen = set()

    @settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck))
    @given(as_written.shapes())
    def collect(shape):
        seen.update({shape.world, shape.call, shape.returned, *(name for name, _ in shape.blocks)})

    collect()
    assert {*as_written.WORLDS, *as_written.BLOCKS, *as_written.CALLS, *as_written.RETURNS} <= seen
