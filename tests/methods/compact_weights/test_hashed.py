"""Hashed weights: the hash, the start, and what is stored."""

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
from taut.methods.compact_weights.hashed import Hashed
from taut.nn.hashed import hashes
from taut.structure.statistics import LayerStatistics


def rewritten(method, module, stats=None):
    known = {} if stats is None else {"layer": stats}
    return method.rewrite({"layer": module}, method.factor({"layer": module}, known)).modules["layer"]


@settings(max_examples=25)
@given(layers(), st.floats(0.01, 1), st.integers(0, 99))
def test_cost_and_plain_counterpart_of_any_layer(sample, share, seed):
    module, size = sample
    group, x = group_of(module, size)
    method = Hashed(share, seed=seed)
    built, cost = rewritten(method, module), method.cost(group)
    plain = built.to_plain()
    assert type(plain) is type(module)
    assert torch.equal(plain(x), built(x))
    assert list(built.state_dict()) == ["bias", "values"] if module.bias is not None else ["values"]
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.nonzero == sum(int(p.count_nonzero()) for p in built.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in built.state_dict().values())
    assert cost.macs == group.cost.macs == pytest.approx(macs(built, x) / len(x), abs=0.51)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_hash_spreads(seed):
    size, buckets = 40_000, 200
    bucket, negative = hashes(size, buckets, seed)
    counts = torch.bincount(bucket, minlength=buckets).double()
    expected = size / buckets
    # chi-square of 199 degrees of freedom: mean 199, standard deviation 20
    assert 99 < float(((counts - expected) ** 2 / expected).sum()) < 299
    assert abs(float(negative.double().mean()) - 0.5) < 0.0125  # five standard deviations
    signed = torch.bincount(bucket, weights=1.0 - 2 * negative, minlength=buckets)
    assert abs(float((signed**2).mean()) / expected - 1) < 0.5
    other = hashes(size, buckets, seed + 1)[0]
    assert abs(float((bucket == other).double().mean()) - 1 / buckets) < 0.002
    assert torch.equal(bucket, hashes(size, buckets, seed)[0])


def test_the_hash_is_the_same_everywhere():
    """Saved models depend on it: these numbers must never change."""
    bucket, negative = hashes(6, 1000, 7)
    assert (bucket.tolist(), negative.tolist()) == ([98, 310, 571, 819, 670, 386], [0, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("known", [False, True], ids=["weights alone", "data"])
def test_the_start_is_the_least_squares_one(known):
    fc = nn.Linear(9, 7, bias=False).double()
    scale = torch.linspace(0.1, 3, 9).double()
    stats = LayerStatistics(Weighting(full=torch.diag(scale**2)[None])) if known else None
    built = rewritten(Hashed(0.3, seed=4), fc, stats)
    bucket, negative = hashes(63, 19, 4)
    design = torch.zeros(63, 19).double()
    design[torch.arange(63), bucket] = (1 - 2 * negative).double()
    size = scale.repeat(7) if known else torch.ones(63).double()
    read = bucket.unique()
    wanted = torch.linalg.lstsq(size[:, None] * design[:, read], size * fc.weight.detach().flatten()).solution
    # calibration adds a ridge of 1e-4 of the mean
    torch.testing.assert_close(built.values.detach()[read], wanted, rtol=0, atol=1e-3 if known else 1e-12)
    assert torch.equal(built.values[read], built.values[built.values != 0])


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


def test_training_saving_and_loading(tmp_path):
    model, wanted = net().eval(), torch.randn(64, 10)
    x, traced, stats = observed(model)
    plan = Plan.of(traced, [Step((name,), "hashed", {"share": 0.2, "seed": 3}) for name in ("conv", "fc")])
    before, after = (
        taut.finetune(
            model,
            plan,
            stats,
            [(x, wanted)],
            [(x, wanted)],
            loss=mse_loss,
            schedule=(taut.Stage((0, 1), epochs=epochs, rate=1e-2),),
        )
        for epochs in (0, 5)
    )
    assert mse_loss(run(after, x)[0], wanted) < mse_loss(run(before, x)[0], wanted)
    assert after.fc.seed == 3
    assert not torch.equal(before.fc.values, after.fc.values)
    taut.save(after, plan, tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", net), x)[0], run(after, x)[0])


def test_export(tmp_path):
    pytest.importorskip("onnxruntime")
    built, x = rewritten(Hashed(), nn.Linear(6, 5)), torch.randn(2, 6)
    assert all(parity.holds for parity in taut.export(nn.Sequential(built), x, tmp_path / "small.onnx").parity)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0.0}, r"'share' of hashed on layer 'fc' must be in \(0, 1\]. Got 0.0"),
        ({"share": 1.5}, "Got 1.5"),
        ({"share": True}, "'share'"),
        ({"seed": -1}, "'seed' of hashed on layer 'fc' must be between 0 and 2147483647. Got -1"),
        ({"metric": "fisher"}, "'metric' of hashed must be one of data, frobenius"),
    ],
)
def test_bad_settings(settings, words):
    model = net()
    _, traced, stats = observed(model)
    with pytest.raises(CallError, match=words):
        taut.apply(model, Plan.of(traced, [Step(("fc",), "hashed", settings)]), stats)
