"""Export: what is written computes the same, for every batch size, holds nothing of the user's, or is not written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cases
import taut
from faults import die, in_child, stops
from taut.artifact import exporting
from taut.artifact.exporting import Parity, check
from taut.core.example import Example
from taut.core.files import OLD
from taut.errors import ArtifactError, CallError, ModelError
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


@pytest.fixture
def quickly(monkeypatch):
    """Export without torch's converter and without a check: what is written and how is what is tested."""
    texts = iter(f"net {number}" for number in range(10**6))

    def convert(model, example, path):
        path.write_text(next(texts))

    def to_openvino(target):
        for suffix in (".xml", ".bin"):
            target.with_suffix(suffix).write_text(target.with_suffix(".onnx").read_text() + suffix)

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(exporting, "to_onnx", convert)
    monkeypatch.setattr(exporting, "_to_openvino", to_openvino)
    monkeypatch.setattr(exporting, "check", lambda model, call, path: [])
    small, x = net().eval(), torch.randn(4, 6)
    return lambda path: taut.export(small, x, path)


def stems(folder, *names):
    return {(folder / name).read_text().removesuffix(Path(name).suffix) for name in names}


@pytest.mark.parametrize("names", [("model.xml", "model.bin"), ("model.onnx",)])
def test_killed_at_every_call_the_old_files_or_the_new_are_there(quickly, tmp_path, names):
    quickly(tmp_path / names[0])
    seen, old = set(), stems(tmp_path, *names)
    for _ in stops(lambda: quickly(tmp_path / names[0])):
        found = stems(tmp_path, *names)
        assert len(found) == 1, "the graph of one model beside the weights of another"
        seen.add(found == old)
        quickly(tmp_path / names[0])
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        old = stems(tmp_path, *names)
    assert seen == {True, False}


def test_what_a_killed_export_left_goes_with_the_next(quickly, tmp_path, monkeypatch):
    def killed():
        monkeypatch.setattr(exporting, "check", lambda *_: die())
        quickly(tmp_path / "model.xml")

    assert os.WIFSIGNALED(in_child(killed))
    assert [path.name[:13] for path in tmp_path.iterdir()] == [".taut-export-"]
    quickly(tmp_path / "model.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_a_folder_that_a_kill_set_aside_is_not_made_anew(quickly, tmp_path):
    (tmp_path / f"{OLD}small").mkdir()
    (tmp_path / f"{OLD}small" / "manifest.json").write_text("x")
    quickly(tmp_path / "small" / "model.onnx")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["manifest.json", "model.onnx"]


def test_links_stay_links_and_never_mix_two_models(quickly, tmp_path):
    (tmp_path / "v1").mkdir()
    for suffix in (".xml", ".bin", ".onnx"):
        (tmp_path / f"now{suffix}").symlink_to(f"v1/net{suffix}")
    for name in ("now.xml", "now.onnx"):
        assert quickly(tmp_path / name).path == tmp_path / name
        assert (tmp_path / name).is_symlink()
    assert len(stems(tmp_path / "v1", "net.xml", "net.bin")) == 1
    assert len(stems(tmp_path, "now.xml", "now.bin")) == 1
    (tmp_path / "now.bin").unlink()
    (tmp_path / "now.bin").write_text("of another model")
    with pytest.raises(CallError, match="links to different places"):
        quickly(tmp_path / "now.xml")


def test_what_would_be_lost_is_refused(quickly, tmp_path):
    (tmp_path / "weights.bin").write_text("years of work")
    with pytest.raises(CallError, match=r"weights.bin' would be replaced.*another name"):
        quickly(tmp_path / "weights.xml")
    assert (tmp_path / "weights.bin").read_text() == "years of work"
    (tmp_path / "folder.xml").mkdir()
    with pytest.raises(CallError, match="is a folder"):
        quickly(tmp_path / "folder.xml")


def test_a_check_of_the_target_leaves_nothing(tmp_path):
    target, names = exporting.check_target(tmp_path / "deep" / "model.xml")
    assert target == tmp_path / "deep" / "model.xml"
    assert names == ("model.xml", "model.bin")
    assert list(tmp_path.iterdir()) == []
    for length in (233 - 5, 234 - 5):  # with what export puts around it, at most 255
        path = tmp_path / f"{'n' * length}.onnx"
        if length == 228:
            exporting.check_target(path)
        else:
            with pytest.raises(CallError, match="too long"):
                exporting.check_target(path)


@pytest.mark.parametrize("call", ["read_model", "save_model"])
def test_a_full_disk_is_not_said_to_be_a_fault_of_the_model(tmp_path, monkeypatch, call):
    openvino = pytest.importorskip("openvino")

    class Core:
        def read_model(self, path):
            if call == "read_model":
                raise RuntimeError("no such operation")

    def full(model, path, **settings):
        Path(path).write_text("half of it")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "Core", Core)
    monkeypatch.setattr(openvino, "save_model", full)
    error, words = {
        "read_model": (ModelError, "OpenVINO cannot read the model: no such operation"),
        "save_model": (ArtifactError, r"cannot write the model.*disk is full.*iostream error"),
    }[call]
    with pytest.raises(error, match=words):
        taut.export(net().eval(), torch.randn(4, 6), tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr("taut.core.extras.find_spec", lambda name: None if name == "onnxscript" else name)
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
def test_layers_that_hold_their_weight_in_another_form_are_exported(method, tmp_path, monkeypatch):
    """To ONNX, and from the same file to OpenVINO: torch takes seconds to write one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(4, 3, 4, 4)
    network = taut.trace(net, x)
    names = ("3", "5") if method == "fastfood" else ("0", "3", "5")
    settings = {"codes": 4} if method == "codebook" else {}
    steps = [taut.Step((name,), method, settings, allow_growth=True) for name in names]
    small = taut.apply(net, taut.Plan.of(network, steps), taut.observe(network, net))
    first, written = exporting.to_onnx, {}

    def once(model, example, path):
        if repr(model) not in written:  # dense, where a runtime computes otherwise with the layers as they are
            first(model, example, path)
            written[repr(model)] = path.read_bytes()
        path.write_bytes(written[repr(model)])

    monkeypatch.setattr(exporting, "to_onnx", once)
    for suffix in (".onnx", ".xml"):
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


def test_a_forward_of_any_number_of_inputs_is_exported(tmp_path):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, *inputs):
            return self.fc(sum(inputs))

    exported = taut.export(Many().eval(), (torch.randn(3, 4), torch.randn(3, 4)), tmp_path / "many.onnx")
    assert len({parity.samples for parity in exported.parity}) == 2  # the batch is dynamic
