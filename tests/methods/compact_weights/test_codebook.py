"""Codebooks: what is stored, what k-means finds, and where it is exact."""

import builtins
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn
from torch.nn.functional import mse_loss

import taut
from cases import macs, run, sequential, surroundings
from methods.samples import group_of, layers
from taut import CallError, Plan, Step
from taut.decompose.weighting import Weighting
from taut.methods.compact_weights.codebook import Codebook
from taut.structure.statistics import LayerStatistics


def rewritten(method, module, stats=None):
    known = {} if stats is None else {"layer": stats}
    return method.rewrite({"layer": module}, method.factor({"layer": module}, known)).modules["layer"]


def pieces(weight, block):
    return list(weight.detach().flatten(1).double().split(block, 1))


@settings(max_examples=25)
@given(layers(), st.data())
def test_cost_and_plain_counterpart_of_any_layer(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    rows, columns = len(module.weight), module.weight[0].numel()
    method = Codebook(
        data.draw(st.integers(1, columns)), data.draw(st.integers(1, rows)), data.draw(st.booleans()), seed=3
    )
    wide = module.double()
    built, cost = rewritten(method, wide), method.cost(group)
    x = torch.randn(size).double()
    plain = built.to_plain()
    assert type(plain) is type(module)
    assert torch.equal(plain(x), built(x))
    skeleton = method.skeleton(group)["layer"]
    assert repr(skeleton) == repr(built)
    assert cost.params == sum(p.numel() for p in skeleton.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in skeleton.state_dict().values())
    assert cost.macs == pytest.approx(macs(built, x) / len(x), abs=0.51)
    assert cost.macs == group.cost.macs


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("block", [1, 3, 4, 10])
def test_exact_with_as_many_codes_as_distinct_pieces(shared, block):
    fc = nn.Linear(10, 12).double()
    fc.weight.data = torch.randn(3, 10).double()[torch.arange(12) % 3]
    codes = 3 if not shared else min(256, 3 * -(-10 // block))
    built = rewritten(Codebook(block, codes, shared), fc)
    assert torch.equal(built.dense(), fc.weight)


def test_the_entries_are_scikit_learns_centres():
    fc = nn.Linear(8, 40, bias=False).double()
    built = rewritten(Codebook(4, 5, seed=7), fc)
    for place, piece in enumerate(pieces(fc.weight, 4)):
        fitted = KMeans(5, n_init=1, max_iter=25, random_state=7).fit(piece.numpy())
        wanted = fitted.cluster_centers_[fitted.labels_]
        np.testing.assert_allclose(pieces(built.dense(), 4)[place].numpy(), wanted, rtol=0, atol=1e-12)


def output_error(A, fc, built):
    E = (built.dense() - fc.weight).detach()
    return float(((E @ A) * E).sum())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["full", "sketch"])
def test_the_data_metric_lowers_the_output_error(shared, form):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=generator).double() * torch.tensor([9.0, 1, 1, 1] * 2).double()
    A = rows.T @ rows
    fc = nn.Linear(8, 60, bias=False).double()
    stats = LayerStatistics(Weighting(full=A[None]) if form == "full" else Weighting(sketch=rows[None]))
    found = {metric: rewritten(Codebook(4, 6, shared, metric), fc, stats) for metric in ("data", "frobenius")}
    assert output_error(A, fc, found["data"]) < 0.9 * output_error(A, fc, found["frobenius"])
    distances = {metric: float((built.dense() - fc.weight).detach().norm()) for metric, built in found.items()}
    assert distances["frobenius"] < distances["data"]


def test_channel_moments_are_those_of_the_unfolded_input():
    conv = nn.Conv2d(3, 30, 2, bias=False).double()
    X = torch.randn(40, 3).double()
    A = X.T @ X
    unfolded = torch.kron(A, torch.eye(4).double())
    method = Codebook(5, 4)
    by_channel, full = (
        rewritten(method, conv, LayerStatistics(weighting))
        for weighting in (Weighting(channel=A[None]), Weighting(full=unfolded[None]))
    )
    assert torch.equal(by_channel.indices(), full.indices())


@pytest.mark.parametrize(("k", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
def test_codes_are_packed(k, bits):
    fc = nn.Linear(7, 300, bias=False)
    method = Codebook(3, k)
    built = rewritten(method, fc)
    codes = built.indices()
    assert codes.shape == (300, 3)
    assert set(codes.unique().tolist()) == set(range(k))
    assert built.codes.dtype == torch.uint8
    assert built.codes.numel() == -(-900 * bits // 8)
    assert built.half().codes.dtype == torch.uint8


def test_vector_quantization_ends_a_row_with_part_of_an_entry():
    fc = nn.Linear(5, 8, bias=False).double()
    built = rewritten(Codebook(3, 4, shared=True), fc)
    assert built.codebook.shape == (4, 3)
    dense, codes = built.dense(), built.indices()
    for row, place in itertools.product(range(8), range(2)):
        wanted = built.codebook[codes[row, place]][: 3 if place == 0 else 2]
        assert torch.equal(dense[row, 3 * place : 3 * place + 3], wanted)


def net():
    return sequential(
        conv=nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="reflect"),
        act=nn.ReLU(),
        mid=nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        act2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(128, 10),
    )


def made(model, data=None, settings=None):
    x = torch.randn(2, 3, 8, 8)
    traced = taut.trace(model, x)
    stats = taut.observe(traced, model, [torch.randn(64, 3, 8, 8)])
    steps = [Step((name,), "codebook", {"codes": 4} | (settings or {})) for name in ("conv", "mid", "fc")]
    plan = Plan.of(traced, steps)
    return x, plan, stats, taut.apply(model, plan, stats, data=data)


@pytest.mark.parametrize("shared", [False, True])
def test_save_load_and_export(shared, tmp_path):
    x, plan, _, small = made(net().eval(), [torch.randn(64, 3, 8, 8)], {"shared": shared})
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(small, x)[0])
    if not shared:
        pytest.importorskip("onnxruntime")
        assert all(parity.holds for parity in taut.export(small, x, tmp_path / "small.onnx").parity)


def test_refit_helps():
    model, data = net().eval(), torch.randn(256, 3, 8, 8)
    errors = [
        float((run(made(model, given_data)[3], data)[0] - run(model, data)[0]).square().sum())
        for given_data in (None, [data])
    ]
    assert errors[1] < errors[0]


def test_training_moves_the_codebook_and_leaves_the_codes(tmp_path):
    model, x, wanted = net().eval(), torch.randn(48, 3, 8, 8), torch.randn(48, 10)
    plan, stats = made(model)[1:3]
    one, data = Plan.of(stats.network, plan.steps[2:]), [(x, wanted)]
    before, after = (
        taut.finetune(
            model, one, stats, data, data, loss=mse_loss, schedule=(taut.Stage((0,), epochs=epochs, rate=1e-2),)
        )
        for epochs in (0, 3)
    )
    assert mse_loss(run(after, x)[0], wanted) < mse_loss(run(before, x)[0], wanted)
    assert not torch.equal(before.fc.codebook, after.fc.codebook)
    assert torch.equal(before.fc.codes, after.fc.codes)
    taut.save(after, one, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(after, x)[0])


def test_frozen_stays_frozen_and_one_seed_gives_one_result():
    model = net()
    model.fc.weight.requires_grad_(requires_grad=False)
    around = surroundings()
    small, again = made(model)[3], made(model)[3]
    assert surroundings()["numpy"] == around["numpy"]
    assert {name: p.requires_grad for name, p in small.fc.named_parameters()} == {"codebook": False, "bias": True}
    assert torch.equal(
        rewritten(Codebook(4, 4, seed=1), model.fc).codes, rewritten(Codebook(4, 4, seed=1), model.fc).codes
    )
    assert small.fc.codes.shape == again.fc.codes.shape


def test_scikit_learn_is_asked_for_by_name(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CallError, match=r"pip install 'taut\[quantize\]'"):
        rewritten(Codebook(2, 2), nn.Linear(4, 9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codes": 0}, "'codes' of codebook on layer 'fc' must be between 1 and 10. Got 0"),
        ({"codes": 11}, "Got 11"),
        ({"codes": 257, "shared": True}, "between 1 and 256. Got 257"),
        ({"codes": 2.0}, "Got 2.0"),
        ({"codes": 2, "block": 129}, "'block' of codebook on layer 'fc' must be between 1 and 128"),
        ({"codes": 2, "shared": 1}, "'shared' of codebook on layer 'fc' must be true or false. Got 1"),
        ({"codes": 2, "seed": -1}, "'seed' of codebook"),
        ({"codes": 2, "metric": "fisher"}, "'metric' of codebook must be one of data, frobenius. Got 'fisher'"),
    ],
)
def test_bad_settings(settings, words):
    model = net()
    traced = taut.trace(model, torch.randn(2, 3, 8, 8))
    plan = Plan.of(traced, [Step(("fc",), "codebook", settings)])
    with pytest.raises(CallError, match=words):
        taut.apply(model, plan, taut.observe(traced, model))
