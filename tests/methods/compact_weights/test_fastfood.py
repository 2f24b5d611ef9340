"""Adaptive Fastfood: transforms against scipy's matrices, and the start against least squares."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

import taut
from cases import macs, run, sequential
from methods.samples import group_of, layers
from taut import CallError, Plan, Step
from taut.decompose.fastfood import Block
from taut.decompose.weighting import Weighting
from taut.methods.compact_weights.fastfood import Fastfood
from taut.nn.fastfood import hadamard, padded_size, permutations
from taut.structure.statistics import LayerStatistics


def rewritten(method, module, stats=None):
    known = {} if stats is None else {"layer": stats}
    return method.rewrite({"layer": module}, method.factor({"layer": module}, known)).modules["layer"]


@settings(max_examples=25)
@given(layers(dims=(0,)), st.integers(0, 99))
def test_cost_and_plain_counterpart_of_any_layer(sample, seed):
    module, size = sample
    group, x = group_of(module, size)
    method = Fastfood(seed=seed)
    built, cost = rewritten(method, module), method.cost(group)
    plain = built.double().to_plain()
    x = torch.randn(size).double()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), built(x), rtol=0, atol=1e-10)
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.bytes == 4 * cost.params
    assert cost.macs == macs(built, x) == 0


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_transform_is_scipys(size):
    x = torch.randn(3, size).double()
    H = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    torch.testing.assert_close(hadamard(x), x @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_permutations_are_permutations_and_differ(size):
    found = permutations(3, size, 5)
    assert torch.equal(found.sort(1).values, torch.arange(size).expand(3, size))
    assert torch.equal(found, permutations(3, size, 5))
    if size >= 32:
        assert len({tuple(row) for row in (*found.tolist(), *permutations(3, size, 6).tolist(), range(size))}) == 7
        steps = found.diff(dim=1)
        assert len(steps.unique()) > size // 4  # not a mere rotation or stride


def test_permutations_are_the_same_everywhere():
    """Saved models depend on them: these numbers must never change."""
    assert permutations(1, 8, 3).tolist() == [[1, 6, 4, 7, 2, 5, 3, 0]]


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (5, 3), (6, 20), (16, 17), (1, 1)])
def test_it_computes_its_product(inputs, outputs):
    built = rewritten(Fastfood(seed=2), nn.Linear(inputs, outputs).double())
    n = padded_size(inputs)
    H = torch.from_numpy(scipy.linalg.hadamard(n)).double() / n**0.5
    eye = torch.eye(n).double()
    rows = [
        H @ torch.diag(G) @ eye[order] @ H @ eye[:, :inputs] @ torch.diag(B)
        for G, B, order in zip(built.G, built.B, permutations(len(built.G), n, 2), strict=True)
    ]
    wanted = torch.diag(built.S) @ torch.cat(rows)[:outputs]
    torch.testing.assert_close(built.dense(), wanted, rtol=0, atol=1e-12)
    x = torch.randn(2, 3, inputs).double()
    torch.testing.assert_close(built(x), x @ wanted.mT + built.bias, rtol=0, atol=1e-12)


def metric(size):
    rows = torch.randn(40, size).double() * torch.linspace(0.2, 3, size)
    return rows.T @ rows


def test_the_outer_diagonal_is_the_least_squares_one():
    A, W = metric(6), torch.randn(8, 6).double()
    L = torch.linalg.cholesky(A)
    block = Block(
        W, A, permutations(1, 8, 0)[0], torch.ones(8).double(), torch.randn(8).double(), torch.ones(6).double()
    )
    block.solve_outer()
    V = block._unscaled()
    wanted = [torch.linalg.lstsq((v @ L)[:, None], (w @ L)[:, None]).solution[0, 0] for v, w in zip(V, W, strict=True)]
    torch.testing.assert_close(block.S, torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_every_turn_lowers_the_error():
    A = metric(16)
    fc = nn.Linear(16, 24, bias=False).double()
    built = rewritten(Fastfood(), fc, LayerStatistics(Weighting(full=A[None])))

    def error(weight):
        E = (weight - fc.weight).detach()
        return float(((E @ A) * E).sum())

    first, *_ = Fastfood()._start(24, 16)
    assert first.shape == built.G.shape
    alone = Block(
        fc.weight.detach()[:16],
        A,
        permutations(2, 16, 0)[0],
        torch.ones(16).double(),
        *(part[0].double() for part in Fastfood()._start(24, 16)),
    )
    alone.solve_outer()
    rest = float(((alone._rest() @ A) * alone._rest()).sum())
    alone.solve()
    assert float(((alone._rest() @ A) * alone._rest()).sum()) < 0.8 * rest
    assert error(built.dense()) < error(torch.zeros_like(fc.weight))


def net():
    return sequential(fc=nn.Linear(20, 40), act=nn.ReLU(), out=nn.Linear(40, 10))


def observed(model):
    x = torch.randn(64, 20)
    traced = taut.trace(model, x[:2])
    return x, traced, taut.observe(traced, model, [x])


def test_training_saving_and_loading(tmp_path):
    model, wanted = net().eval(), torch.randn(64, 10)
    x, traced, stats = observed(model)
    plan = Plan.of(traced, [Step(("fc",), "fastfood", {"seed": 3})])
    before, after = (
        taut.finetune(
            model,
            plan,
            stats,
            [(x, wanted)],
            [(x, wanted)],
            loss=mse_loss,
            schedule=(taut.Stage((0,), epochs=epochs, rate=1e-2),),
        )
        for epochs in (0, 5)
    )
    assert mse_loss(run(after, x)[0], wanted) < mse_loss(run(before, x)[0], wanted)
    assert after.fc.seed == 3
    assert not any(torch.equal(a, b) for a, b in zip(before.fc.parameters(), after.fc.parameters(), strict=True))
    taut.save(after, plan, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(after, x)[0])


def test_export(tmp_path):
    pytest.importorskip("onnxruntime")
    built, x = rewritten(Fastfood(), nn.Linear(3, 5)), torch.randn(2, 3)
    assert all(parity.holds for parity in taut.export(nn.Sequential(built), x, tmp_path / "small.onnx").parity)


def test_convolutions_are_refused_with_a_reason():
    traced = taut.trace(sequential(conv=nn.Conv1d(8, 8, 3)), torch.randn(2, 8, 9))
    assert "convolutions are left" in Fastfood().refuses(traced.group(["conv"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 0.5}, "'seed' of fastfood on layer 'fc' must be between 0 and 2147483647. Got 0.5"),
        ({"metric": "fisher"}, "'metric' of fastfood must be one of data, frobenius"),
    ],
)
def test_bad_settings(settings, words):
    model = net()
    _, traced, stats = observed(model)
    with pytest.raises(CallError, match=words):
        taut.apply(model, Plan.of(traced, [Step(("fc",), "fastfood", settings)]), stats)
