"""Low rank plus sparse: what is stored, what is computed, and where it is exact."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import macs, run, sequential
from methods.samples import group_of, layers
from taut import CallError, Plan, Step
from taut.decompose.weighting import Weighting
from taut.methods.low_rank.lowrank_sparse import LowRankSparse, max_rank
from taut.structure.statistics import LayerStatistics


@given(layers(), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if LowRankSparse().refuses(group) is not None:
        return
    method = LowRankSparse(data.draw(st.integers(1, max_rank(group.layer))), data.draw(st.floats(0, 1)))
    built, cost = method.skeleton(group)["layer"], method.cost(group)
    assert built(x).shape == module(x).shape
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in (*built.parameters(), *built.buffers()))
    assert cost.macs == pytest.approx(macs(built, x) / len(x), abs=0.51)


@given(layers(), st.integers(0, 3))
def test_to_plain_computes_the_same(sample, seed):
    module, size = sample
    group, _ = group_of(module, size)
    if LowRankSparse().refuses(group) is not None:
        return
    torch.manual_seed(seed)
    x, wide = torch.randn(size).double(), module.double()
    method = LowRankSparse(1, 0.3)
    built = method.rewrite({"layer": wide}, method.factor({"layer": wide}, {})).modules["layer"]
    plain = built.to_plain()
    assert type(plain) is type(module)
    torch.testing.assert_close(plain(x), built(x), rtol=0, atol=1e-10)
    assert plain.weight.shape == module.weight.shape


@pytest.mark.parametrize(("rank", "density"), [(6, 0.0), (6, 0.4), (1, 1.0), (3, 1.0)])
def test_full_rank_or_density_is_exact(rank, density):
    fc = nn.Linear(9, 6).double()
    method = LowRankSparse(rank, density)
    built = method.rewrite({"fc": fc}, method.factor({"fc": fc}, {})).modules["fc"]
    x = torch.randn(20, 9).double()
    torch.testing.assert_close(built(x), fc(x), rtol=0, atol=1e-10)


def test_planted_sum_is_found():
    generator = torch.Generator().manual_seed(3)
    fc = nn.Linear(40, 30, bias=False).double()
    low = torch.randn(30, 2, generator=generator).double() @ torch.randn(2, 40, generator=generator).double()
    sparse = torch.zeros(1200).double()
    places = torch.randperm(1200, generator=generator)[:12].sort().values
    sparse[places] = 100.0
    fc.weight.data = low + sparse.reshape(30, 40)
    method = LowRankSparse(2, 0.05, metric="frobenius")
    built = method.rewrite({"fc": fc}, method.factor({"fc": fc}, {})).modules["fc"]
    assert set(places.tolist()) <= set(built.places.tolist())
    alone = np.linalg.svd(fc.weight.detach().numpy(), compute_uv=False)[2:]
    assert float((built.to_plain().weight - fc.weight).detach().norm()) < 0.7 * np.sqrt((alone**2).sum())


def test_the_sparse_part_is_where_inputs_are_large():
    fc = nn.Linear(10, 8, bias=False)
    scale = torch.ones(10)
    scale[:3] = 1e3
    stats = LayerStatistics(Weighting(full=torch.diag(scale**2)[None].double()))
    method = LowRankSparse(1, 0.1)
    built = method.rewrite({"fc": fc}, method.factor({"fc": fc}, {"fc": stats})).modules["fc"]
    assert len(built.values) == 8
    assert set((built.places % 10).tolist()) <= {0, 1, 2}


def net():
    return sequential(
        conv=nn.Conv2d(3, 8, 3, padding=1, stride=2),
        act=nn.ReLU(),
        mid=nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), padding_mode="reflect", bias=False),
        act2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(128, 10),
    )


def made(model, data=None, density=0.1):
    x = torch.randn(2, 3, 8, 8)
    traced = taut.trace(model, x)
    stats = taut.observe(traced, model, [torch.randn(64, 3, 8, 8)])
    steps = [
        Step((name,), "lowrank_sparse", {"rank": 3, "density": density}, allow_growth=True)
        for name in ("conv", "mid", "fc")
    ]
    plan = Plan.of(traced, steps)
    return x, plan, stats, taut.apply(model, plan, stats, data=data)


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_save_load_copies_and_export(data, tmp_path):
    x, plan, _, small = made(net().eval(), [torch.randn(64, 3, 8, 8)] if data else None)
    taut.save(small, plan, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", net)
    (wanted,) = run(small, x)
    assert torch.equal(run(loaded, x)[0], wanted)
    assert loaded.fc.places.dtype == torch.int32
    assert torch.equal(run(copy.deepcopy(small), x)[0], wanted)
    pytest.importorskip("onnxruntime")
    assert all(parity.holds for parity in taut.export(small, x, tmp_path / "small.onnx").parity)


def test_refit_helps():
    model = net().eval()
    data = torch.randn(256, 3, 8, 8)
    errors = []
    for given_data in (None, [data]):
        small = made(model, given_data)[3]
        errors.append(float((run(small, data)[0] - run(model, data)[0]).square().sum()))
    assert errors[1] < errors[0]


def test_training_moves_values_and_leaves_places():
    model = net().eval()
    _, plan, stats, bare = made(model)
    data = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    schedule = (taut.Stage((0, 1, 2), epochs=1, rate=1e-2),)
    tuned = taut.finetune(model, plan, stats, data, data, schedule=schedule)
    assert tuned.fc.values.shape == bare.fc.values.shape
    assert tuned.fc.places.dtype == torch.int32
    assert not torch.equal(tuned.fc.values, bare.fc.values)


def test_frozen_stays_frozen():
    model = net()
    model.fc.weight.requires_grad_(requires_grad=False)
    *_, small = made(model)
    assert {name: p.requires_grad for name, p in small.fc.named_parameters()} == {
        "values": False,
        "low.0.weight": False,
        "low.1.weight": False,
        "low.1.bias": True,
    }


def test_groups_are_refused():
    traced = taut.trace(sequential(conv=nn.Conv1d(8, 8, 3, groups=2)), torch.randn(2, 8, 9))
    assert "grouped" in LowRankSparse().refuses(traced.group(["conv"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 2, "density": -0.1}, "'density' of lowrank_sparse on layer 'fc' must be in"),
        ({"rank": 2, "density": 1.1}, "Got 1.1"),
        ({"rank": 2, "density": True}, "'density'"),
        ({"rank": None}, "'rank' of lowrank_sparse on layer 'fc' must be between 1 and 10"),
        ({"rank": 11}, "Got 11"),
        ({"rank": 2, "metric": "nonsense"}, "'metric' of lowrank_sparse"),
    ],
)
def test_bad_settings(settings, words):
    model = net()
    traced = taut.trace(model, torch.randn(2, 3, 8, 8))
    plan = Plan.of(traced, [Step(("fc",), "lowrank_sparse", settings, allow_growth=True)])
    with pytest.raises(CallError, match=words):
        taut.apply(model, plan, taut.observe(traced, model))
