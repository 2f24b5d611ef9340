"""Weights of eight bits: against torch's own quantization, and together with other methods."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

import taut
from cases import macs, run, sequential
from methods.samples import group_of, layers
from taut import CallError, Plan, Step
from taut.decompose.weighting import Weighting
from taut.methods.compact_weights.int8 import Int8
from taut.nn import Int8Weight
from taut.structure.statistics import LayerStatistics
from taut.types import Group


def rewritten(method, module, stats=None):
    known = {} if stats is None else {"layer": stats}
    return method.rewrite({"layer": module}, method.factor({"layer": module}, known)).modules["layer"]


@settings(max_examples=25)
@given(layers(), st.sampled_from(["search", "max"]))
def test_cost_and_plain_counterpart_of_any_layer(sample, scale):
    module, size = sample
    group, x = group_of(module, size)
    method = Int8(scale)
    built, cost = rewritten(method, module), method.cost(group)
    plain = built.to_plain()
    assert type(plain) is type(module)
    assert torch.equal(plain(x), built(x))
    assert repr(method.skeleton(group)["layer"]) == repr(built)
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in built.state_dict().values())
    assert cost.macs == group.cost.macs == pytest.approx(macs(built, x) / len(x), abs=0.51)


@pytest.mark.parametrize("module", [nn.Linear(20, 9), nn.Conv2d(4, 6, 3, groups=2)], ids=["linear", "conv"])
def test_max_is_torchs_quantization_per_channel(module):
    built, weight = rewritten(Int8("max"), module), module.weight.detach()
    scales = weight.abs().flatten(1).amax(1) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    wanted = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    torch.testing.assert_close(built.scales.detach(), scales, rtol=1e-6, atol=0)
    assert torch.equal(built.values, wanted.int_repr())
    torch.testing.assert_close(built.dense().detach(), wanted.dequantize(), rtol=1e-6, atol=0)


def test_the_search_lowers_the_output_error():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 30, generator=generator).double()
    rows[:, 0] *= 0.01
    A = rows.T @ rows
    fc = nn.Linear(30, 12, bias=False).double()
    fc.weight.data[:, 0] *= 10  # the largest weights meet the smallest input
    stats = LayerStatistics(Weighting(full=A[None]))

    def error(method):
        E = rewritten(method, fc, stats).dense().detach() - fc.weight.detach()
        return ((E @ A) * E).sum(1)

    searched, largest = error(Int8()), error(Int8("max"))
    assert bool((searched <= largest * (1 + 1e-9)).all())
    assert float(searched.sum()) < 0.9 * float(largest.sum())


def test_a_scale_is_the_best_for_its_whole_numbers():
    fc = nn.Linear(30, 12, bias=False).double()
    built = rewritten(Int8(metric="frobenius"), fc)
    Q = built.values.double()
    wanted = torch.stack(
        [torch.linalg.lstsq(q[:, None], w[:, None]).solution[0, 0] for q, w in zip(Q, fc.weight, strict=True)]
    )
    torch.testing.assert_close(built.scales.detach(), wanted.detach(), rtol=1e-10, atol=0)


def test_zero_rows_and_types():
    fc = nn.Linear(6, 3)
    fc.weight.data[1] = 0
    built = rewritten(Int8(), fc)
    assert bool(built.scales.isfinite().all())
    assert not built.values[1].any()
    half = copy.deepcopy(built).half()
    assert (half.values.dtype, half.scales.dtype, half(torch.randn(2, 6).half()).dtype) == (
        torch.int8,
        torch.float16,
        torch.float16,
    )
    optimizer = torch.optim.Adam(built.parameters(), 0.1, weight_decay=0.1)
    values = built.values.clone()
    built(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(built.values, values)
    assert built.values.grad is None


def net():
    return sequential(
        conv=nn.Conv2d(3, 8, 3, padding=1, stride=2),
        act=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(128, 10),
    )


def observed(model):
    x = torch.randn(64, 3, 8, 8)
    traced = taut.trace(model, x[:2])
    return x, traced, taut.observe(traced, model, [x])


def inside(small, name, x):
    """A step for every part of what stands in the place of `name`."""
    parts = [layer for layer in taut.trace(small, x[:2]).layers if layer.name.startswith(f"{name}.")]
    return [
        Step((name,), "int8", {}, Group((replace(layer, name=name),)), allow_growth=True)
        for layer in parts
        if layer.skip is None
    ]


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_the_parts_that_svd_left(data, tmp_path):
    model = net().eval()
    x, traced, stats = observed(model)
    first = Plan.of(traced, [Step((name,), "svd", {"rank": 4}) for name in ("conv", "fc")])
    small = taut.apply(model, first, stats)
    plan = replace(first, steps=(*first.steps, *inside(small, "conv", x), *inside(small, "fc", x)))
    both = taut.apply(model, plan, stats, data=[x] if data else None)
    assert all(isinstance(part, Int8Weight) for part in (*both.conv, *both.fc))
    wanted = run(taut.apply(model, first, stats, data=[x] if data else None), x)[0]
    assert float((run(both, x)[0] - wanted).norm()) < 0.05 * float(wanted.norm())
    taut.save(both, plan, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(both, x)[0])


@pytest.mark.parametrize("train", [False, True], ids=["applied", "tuned"])
def test_pruned_weights_stay_zero(train, tmp_path):
    model = net().eval()
    x, traced, stats = observed(model)
    quantize = [Step((name,), "int8", allow_growth=True) for name in ("conv", "fc")]
    plan = Plan.of(traced, [taut.whole(traced, "magnitude", sparsity=0.6), *quantize])
    if train:
        schedule = (taut.Stage((0, 1, 2), epochs=1, rate=1e-2),)
        both = taut.finetune(model, plan, stats, [x], [x], schedule=schedule)
    else:
        both = taut.apply(model, plan, stats, data=[x])
    alone = taut.apply(model, Plan.of(traced, plan.steps[:1]), stats)
    for name in ("conv", "fc"):
        dense = both.get_submodule(name).dense()
        assert not dense[alone.get_submodule(name).weight == 0].any()
        assert int((dense == 0).sum()) < 0.7 * dense.numel()
    taut.save(both, plan, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(both, x)[0])


def test_training_moves_the_scales_alone(tmp_path):
    model, wanted = net().eval(), torch.randn(64, 10)
    x, traced, stats = observed(model)
    plan = Plan.of(traced, [Step(("fc",), "int8", allow_growth=True)])
    before, after = (
        taut.finetune(
            model, plan, stats, [(x, wanted)], [(x, wanted)], loss=mse_loss, schedule=(taut.Stage((0,), epochs=epochs),)
        )
        for epochs in (0, 3)
    )
    assert mse_loss(run(after, x)[0], wanted) < mse_loss(run(before, x)[0], wanted)
    assert torch.equal(before.fc.values, after.fc.values)
    assert not torch.equal(before.fc.scales, after.fc.scales)
    taut.save(after, plan, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", net)
    assert loaded.fc.values.dtype == torch.int8
    assert torch.equal(run(loaded, x)[0], run(after, x)[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": "mean"}, "'scale' of int8 on layer 'fc' must be one of search, max. Got 'mean'"),
        ({"metric": "fisher"}, "'metric' of int8 must be one of data, frobenius"),
    ],
)
def test_bad_settings(settings, words):
    model = net()
    _, traced, stats = observed(model)
    with pytest.raises(CallError, match=words):
        taut.apply(model, Plan.of(traced, [Step(("fc",), "int8", settings, allow_growth=True)]), stats)
