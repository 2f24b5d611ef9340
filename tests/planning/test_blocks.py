"""Blocks in the integer program, against every combination written out; and what they are offered for."""

import math
from dataclasses import replace
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import sequential
from planning.knapsacks import capped, cost_of, damage_of, problem
from taut.methods.blocks import Blocks
from taut.planning.blocks import survey_all, with_blocks
from taut.planning.knapsack import closest, solve
from taut.types import Block, Cost, Layer

ROWS = st.tuples(st.integers(1, 200), st.integers(1, 200), st.floats(0.001, 10))


@st.composite
def knapsacks(draw):
    """Four layers, the first without a choice; blocks of some of them, one perhaps inside another."""
    tables = []
    for _ in range(4):
        keep = (draw(st.integers(50, 300)), draw(st.integers(50, 300)), 0.0)
        tables.append([keep, *draw(st.lists(ROWS, min_size=1, max_size=2))])
    net, choices = problem(tables, draw(st.tuples(st.integers(0, 100), st.integers(0, 100))))
    shapes = draw(st.sampled_from([{"b": "012"}, {"b": "012", "b.c": "01"}, {"b": "12", "d": "3"}]))
    blocks = []
    for name, places in shapes.items():
        inside = tuple(f"l{place}" for place in places)
        cost = sum((net[layer].cost for layer in inside), Cost())
        layer = Layer(name, "Block", macs=cost.macs, params=cost.params, block=Block(inside))
        blocks.append((layer, Blocks(), draw(st.floats(0.001, 10))))
    keys = draw(st.sampled_from([("params",), ("macs",), ("params", "macs")]))
    limits = {key: draw(st.integers(1, getattr(net.cost, key))) for key in keys}
    return net, choices[1:], blocks, limits


def combinations(net, choices, blocks):
    """Every way to take out blocks, none inside another, and to change the layers that are left: costs and damage."""
    for gone in product((False, True), repeat=len(blocks)):
        out = [block for (block, *_), goes in zip(blocks, gone, strict=True) if goes]
        if any(a.name != b.name and a.name.startswith(f"{b.name}.") for a in out for b in out):
            continue
        layers = {name for block in out for name in block.block.layers}
        free = [choice for choice in choices if choice.group.layer.name not in layers]
        saved = sum((net[name].cost for name in layers), Cost())
        harm = sum(damage for (block, _, damage), goes in zip(blocks, gone, strict=True) if goes)
        for picks in product(*(range(len(choice.options)) for choice in free)):
            yield net.cost - saved, free, picks, harm


@given(knapsacks())
def test_blocks_go_with_all_that_is_in_them_or_not_at_all(knapsack):
    net, choices, blocks, limits = knapsack
    limits = capped(net, choices, limits)
    wanted = min(
        (
            harm + damage_of(free, picks)
            for cost, free, picks, harm in combinations(net, choices, blocks)
            if all(cost_of(replace(net, cost=cost), free, picks, key) <= limit for key, limit in limits.items())
        ),
        default=math.inf,
    )
    coupled = with_blocks(net, choices, blocks)
    picks = solve(net, coupled, limits)
    if math.isinf(wanted):
        assert picks is None
        return
    assert all(cost_of(net, coupled, picks, key) <= limit for key, limit in limits.items())
    assert damage_of(coupled, picks) <= wanted * (1 + 3e-4) + 1e-6
    chosen = dict(zip((choice.group.layer.name for choice in coupled), picks, strict=True))
    for choice, pick in zip(coupled, picks, strict=True):
        block = choice.options[pick].block
        assert not block or chosen[block] == 1


@given(knapsacks())
def test_the_closest_takes_blocks_whole_too(knapsack):
    net, choices, blocks, limits = knapsack
    coupled = with_blocks(net, choices, blocks)
    picks = closest(net, coupled, limits)
    caps = {key: cap for key, cap in capped(net, coupled, {}).items() if key not in limits}
    least = min(
        max(cost_of(replace(net, cost=cost), free, other, key) / limit for key, limit in limits.items())
        for cost, free, other, _ in combinations(net, choices, blocks)
        if all(cost_of(replace(net, cost=cost), free, other, key) <= cap for key, cap in caps.items())
    )
    worst = max(cost_of(net, coupled, picks, key) / limit for key, limit in limits.items())
    assert worst <= least * (1 + 1e-4) + 1e-6


class Residual(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.body = sequential(a=nn.Linear(8, 8), r=nn.Tanh(), b=nn.Linear(8, 8))
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.body(x)


def test_damages_of_blocks_are_measured_and_nothing_is_offered_without_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Residual(1.0), Residual(1e-3), nn.Linear(8, 4)).eval()
    data = [(torch.randn(32, 8), None) for _ in range(2)]
    net = taut.trace(model, data[0][0])
    stats = taut.observe(net, model, [inputs for inputs, _ in data])
    choices = survey_all(net, model, stats, data, [Blocks()])
    damages = {c.group.layer.name: c.options[1].damage for c in choices if c.group.layer.block is not None}
    assert 0 < 100 * damages["2"] < damages["1"]
    assert survey_all(net, model, stats, None, [Blocks()]) == ()
    kept = net.keeping(["1.body.a"])
    offered = survey_all(kept, model, stats, data, [Blocks()])
    assert [choice.group.layer.name for choice in offered if choice.group.layer.block is not None] == ["2"]
