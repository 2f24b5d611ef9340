"""Export: what is written computes the same, for every batch size, holds nothing of the user's, or is not written."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from torch import nn

import cases
import taut
from taut import exporting
from taut.calls import Example
from taut.errors import CallError, ModelError
from taut.exporting import Parity, check
from taut.measure.runtimes import OnnxRuntime


def compressed(name, methods=None):
    case = cases.case(name)
    model, example = case.make()
    data = case.data()
    result = taut.compress(model, example, budget=taut.Budget(params=0.7), data=data, methods=methods)
    assert result.plan.steps
    return result.model, example


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "inception", "linear_3d"])
def test_compressed_nets_are_exported_with_parity(name, tmp_path):
    model, example = compressed(name)
    with cases.untouched(model):
        done = taut.export(model, example, tmp_path / "model.onnx")
    assert all(parity.holds for parity in done.parity)
    assert [parity.samples for parity in done.parity] == [64, 1, 64, 1]
    assert {parity.runtime.partition(" ")[0] for parity in done.parity} == {"onnxruntime", "openvino"}
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    assert "yes" in str(done)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def net():
    with cases.seeded(0):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3))


def test_a_net_in_training_mode_is_exported_in_eval_mode(tmp_path):
    model = net().train()
    done = taut.export(model, torch.randn(4, 6), tmp_path / "model.onnx")
    assert all(parity.holds for parity in done.parity)
    assert model.training


def test_openvinos_own_format(tmp_path):
    done = taut.export(net().eval(), torch.randn(4, 6), tmp_path / "model.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [parity.samples for parity in done.parity] == [64, 1]


def test_the_same_bytes_twice_and_nothing_of_the_machine_or_the_data(tmp_path):
    secret = torch.full((4, 6), 1234.5678) + torch.arange(24).reshape(4, 6)
    hashes = set()
    for name in ("a.onnx", "b.onnx"):
        taut.export(net().eval(), secret, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        hashes.add(hashlib.sha256(content).hexdigest())
        assert secret.numpy().tobytes()[:32] not in content
        assert b"site-packages" not in content
        assert b".py" not in content
    assert len(hashes) == 1


def test_any_batch_size_runs(tmp_path):
    model = net().eval()
    taut.export(model, torch.randn(4, 6), tmp_path / "model.onnx")
    run = OnnxRuntime().session(tmp_path / "model.onnx")
    for size in (1, 3, 200):
        x = torch.randn(size, 6)
        np.testing.assert_allclose(run(x)[0], model(x).detach().numpy(), atol=1e-5)


def test_keyword_and_several_inputs(tmp_path):
    for name in ("keywords", "two_inputs"):
        model, example = cases.case(name).make()
        assert all(parity.holds for parity in taut.export(model, example, tmp_path / f"{name}.onnx").parity)


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    taut.export(net().eval(), torch.randn(4, 6), target)
    old = target.read_bytes()
    other = net().eval()
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    to_onnx = exporting.to_onnx
    monkeypatch.setattr(exporting, "to_onnx", lambda model, example, path: to_onnx(other, example, path))
    with pytest.raises(ModelError, match=r"computes something else in onnxruntime.*batch of 64"):
        taut.export(net().eval(), torch.randn(4, 6), target)
    assert target.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_net_that_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) > 0 else -self.fc(x)

    with pytest.raises(ModelError, match="cannot export this model to ONNX"):
        taut.export(Branches(), torch.randn(4, 6), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_calls_are_named(tmp_path, monkeypatch):
    with pytest.raises(CallError, match=r"must end in .onnx or .xml"):
        taut.export(net(), torch.randn(4, 6), tmp_path / "model.pt")
    monkeypatch.setattr("taut.measure.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(CallError, match=r"onnxscript is not installed: pip install 'taut\[onnx\]'"):
        taut.export(net(), torch.randn(4, 6), tmp_path / "model.onnx")


def test_parity_counts_shape_and_finiteness():
    assert Parity("r", 1, 1e-6).holds
    assert not Parity("r", 1, float("inf")).holds
    worst = exporting._worst
    assert worst([np.ones((2, 2))], [np.ones((2, 3))]) == float("inf")
    assert worst([np.ones(2)], [np.array([1.0, np.nan])]) == float("inf")
    assert worst([np.ones(2)], []) == float("inf")
    assert worst([np.array([4.0, np.inf])], [np.array([3.0, np.inf])]) == 0.25
    assert worst([np.array([4.0, np.inf])], [np.array([4.0, -np.inf])]) == float("inf")
    assert worst([np.full(3, np.nan)], [np.full(3, np.nan)]) == float("inf")
    assert worst([np.zeros(2)], [np.zeros(2)]) == 0


def test_check_reads_a_file_on_disk(tmp_path):
    model = net().eval()
    taut.export(model, torch.randn(4, 6), tmp_path / "model.onnx")
    found = check(model, Example(model, torch.randn(4, 6)), tmp_path / "model.onnx")
    assert all(parity.holds for parity in found)


class Logarithm(nn.Module):
    """Takes positive inputs only, as nets of spectrograms do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x.log())


def test_the_check_stays_in_the_range_of_the_example(tmp_path):
    done = taut.export(Logarithm().eval(), torch.rand(32, 6) + 0.1, tmp_path / "model.onnx")
    assert all(parity.holds for parity in done.parity)


def test_half_precision_has_its_own_limit_and_bfloat16_is_refused(tmp_path):
    done = taut.export(net().half().eval(), torch.randn(4, 6).half(), tmp_path / "model.onnx")
    assert all(parity.holds and parity.limit > exporting.LIMIT for parity in done.parity)
    with pytest.raises(CallError, match="bfloat16"):
        taut.export(net().bfloat16().eval(), torch.randn(4, 6).bfloat16(), tmp_path / "other.onnx")


def test_old_weight_norm_is_exported(tmp_path):
    model, example = cases.case("weight_norm_hook").make()
    assert all(parity.holds for parity in taut.export(model, example, tmp_path / "model.onnx").parity)


@pytest.mark.parametrize("method", ["codebook", "int8", "hashed", "fastfood"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_layers_that_hold_their_weight_in_another_form_are_exported(method, suffix, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(4, 3, 8, 8)
    network = taut.trace(net, x)
    names = ("3", "5") if method == "fastfood" else ("0", "3", "5")
    settings = {"codes": 4} if method == "codebook" else {}
    steps = [taut.Step((name,), method, settings, allow_growth=True) for name in names]
    small = taut.apply(net, taut.Plan.of(network, steps), taut.observe(network, net))
    done = taut.export(small, x, tmp_path / f"small{suffix}")
    assert done.path.exists()
    assert all(parity.holds for parity in done.parity)


def test_a_layer_at_two_places_and_its_hook_are_exported_dense_too(tmp_path, monkeypatch):
    """Where a runtime computes otherwise with the layer as it is, all its places become dense, and hooks stay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    net.insert(1, net[0])
    x = torch.randn(4, 8)
    network = taut.trace(net, x)
    steps = [taut.Step((name,), "hashed", {"share": 0.5}, allow_growth=True) for name in ("0", "3")]
    small = taut.apply(net, taut.Plan.of(network, steps), taut.observe(network, net))
    small[0].register_forward_hook(lambda module, args, output: 2 * output)
    first, seen = exporting.check, []

    def strict(original, example, path):
        seen.append(1)
        found = first(original, example, path)
        return [dataclasses.replace(p, worst=1.0) for p in found] if len(seen) == 1 else found

    monkeypatch.setattr(exporting, "check", strict)
    done = taut.export(small, x, tmp_path / "small.onnx")
    assert len(seen) == 2
    assert all(parity.holds for parity in done.parity)
    assert small[0] is small[1]
    assert type(small[0]).__name__ == "Hashed"
