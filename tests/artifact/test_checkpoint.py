"""A saved folder gives the same model back, or says in one line what is wrong with it."""

import copy
import errno
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import taut
from cases import NETS, case
from taut.artifact.checkpoint import check_folder, is_folder, load, load_plan, save
from taut.artifact.manifest import COMPARISON, MANIFEST, WEIGHTS
from taut.core.example import Example
from taut.core.files import NEW, OLD, seal, unseal
from taut.core.tensors import tensors
from taut.errors import ArtifactError, CallError, ModelError
from taut.planning.application import apply
from taut.structure.observation import observe
from taut.structure.tracing import trace
from taut.types import Group, Plan, Step

FILES = (WEIGHTS, MANIFEST, COMPARISON)


class Net(nn.Module):
    """Tied weights, batch norm, channels_last, a parametrization, a layer in half precision, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 16, 24)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
        self.code = nn.Linear(24, 12, bias=False)
        self.mid = nn.Linear(12, 12)
        self.back = nn.Linear(12, 12, bias=False)
        self.back.weight = self.mid.weight
        self.mid.bias.requires_grad_(False)
        self.register_buffer("offset", torch.zeros(12, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        x = torch.relu(self.same(torch.relu(self.norm(self.conv(x)))))
        x = torch.relu(self.normed(torch.relu(self.fc(x.flatten(1)))))
        return self.back(self.mid(self.code(x))) + self.offset * self.scratch


def original():
    model = Net()
    model.train()(torch.randn(4, 3, 4, 4))
    model.offset.normal_()
    return model.eval().to(memory_format=torch.channels_last)


EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def compressed(model, example, ranks):
    """`model` with an SVD of the named layers, and the plan."""
    net = trace(model, example)
    steps = [Step((name,), "svd", {"rank": rank}, allow_growth=True) for name, rank in ranks.items()]
    plan = Plan.of(net, steps)
    return apply(model, plan, observe(net, model)), plan


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(7)
    return compressed(original(), EXAMPLE, {"conv": 3, "fc": 5})


@pytest.fixture
def folder(made, tmp_path):
    save(*made, tmp_path / "small", comparison={"macs": 0.25, "ms": float("nan")})
    return tmp_path / "small"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_equal(a, b):
    """Same names, bits, dtypes, layouts and ties."""
    mine, yours = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
    assert list(mine) == list(yours)
    for name, tensor in mine.items():
        assert tensor.dtype == yours[name].dtype, name
        assert tensor.stride() == yours[name].stride(), name
        assert tensor.requires_grad == yours[name].requires_grad, name
        bits = [t.detach().reshape(-1).view(torch.uint8) for t in (tensor, yours[name])]
        assert torch.equal(*bits), name
    ties = [[[n for n in s if s[n] is s[name]] for name in s] for s in (mine, yours)]
    assert ties[0] == ties[1]


def run(model, example):
    with torch.no_grad():
        return tensors(Example(model, example).run(model.eval()))


# Round trips.


def test_round_trip(made, folder):
    small, plan = made
    again = load(folder, Net)
    assert_equal(small, again)
    assert again.back.weight is again.mid.weight
    assert isinstance(again.fc, nn.Sequential)
    assert not any(module.training for module in again.modules())
    assert torch.equal(run(small, EXAMPLE)[0], run(again, EXAMPLE)[0])
    assert names(folder) == sorted(FILES)
    assert load_plan(folder) == plan


@pytest.mark.parametrize("net", NETS, ids=str)
def test_round_trip_of_every_net(net, tmp_path):
    model, example = net.make()
    found = trace(model, example)
    ranks = {layer.name: 2 for layer in found.layers if layer.skip is None and min(layer.weight[:2]) > 3}
    small, plan = compressed(model, example, ranks)
    save(small, plan, tmp_path / "small")
    again = load(tmp_path / "small", net.build)
    for a, b in zip(run(small, example), run(again, example), strict=True):
        assert torch.equal(a, b)
    ours = {name: t.requires_grad for name, t in small.named_parameters()}
    assert ours == {name: t.requires_grad for name, t in again.named_parameters()}


def test_fresh_process_gives_equal_bits(made, folder, tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import artifact.test_checkpoint as t; torch.set_num_threads(1)\n"
        "out = t.run(t.load(sys.argv[2], t.Net), t.EXAMPLE)[0]\n"
        "open(sys.argv[3], 'wb').write(out.numpy().tobytes())"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(folder), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = run(made[0], EXAMPLE)[0].numpy().tobytes()
    torch.set_num_threads(threads)
    assert (tmp_path / "out").read_bytes() == expected


def test_two_saves_give_the_same_bytes(made, tmp_path):
    save(*made, tmp_path / "a", comparison={"ms": 1.0})
    save(copy.deepcopy(made[0]), Plan.from_json(made[1].to_json()), tmp_path / "b", comparison={"ms": 2.0})
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / COMPARISON).read_bytes() != (tmp_path / "b" / COMPARISON).read_bytes()


def test_base_decides_device_flags_and_hooks_but_not_dtype(made, folder):
    def base():
        model = Net().half().requires_grad_(requires_grad=False)
        model.same.register_forward_hook(lambda *args: None)
        return model

    again = load(folder, base)
    assert again.same.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in again.parameters())
    assert len(again.same._forward_hooks) == 1


def test_base_on_meta_or_as_a_model(made, folder):
    with torch.device("meta"):
        meta = Net()
    meta.scratch = torch.ones(1)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    for base in (meta, model, lambda: meta):
        assert torch.equal(run(load(folder, base), EXAMPLE)[0], run(made[0], EXAMPLE)[0])
    assert isinstance(model.fc, nn.Linear)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_ties_of_the_base_are_not_forced_on_an_untied_model(tmp_path):
    model = Net()
    model.back.weight = nn.Parameter(torch.randn(12, 12))
    save(model, Plan(()), tmp_path / "small")
    again = load(tmp_path / "small", Net)
    assert again.back.weight is not again.mid.weight
    assert torch.equal(again.back.weight, model.back.weight)


def test_a_base_that_shares_a_layer_which_the_model_does_not(tmp_path):
    def twice():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, layer)

    save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Plan(()), tmp_path / "small")
    with pytest.raises(ArtifactError, match=r"'0\.weight' does not take its own tensor"):
        load(tmp_path / "small", twice)


def test_the_file_may_go_while_the_model_stays(made, folder):
    again = load(folder, Net)
    (folder / WEIGHTS).write_bytes(b"")
    assert torch.equal(run(again, EXAMPLE)[0], run(made[0], EXAMPLE)[0])


def test_inside_of_inference_mode(made, tmp_path):
    with torch.inference_mode():
        save(*made, tmp_path / "small")
        again = load(tmp_path / "small", Net)
    assert not any(p.is_inference() for p in again.parameters())
    again(EXAMPLE).sum().backward()
    assert again.same.weight.grad is not None


def test_random_state_is_not_touched(made, tmp_path):
    state = torch.get_rng_state()
    save(*made, tmp_path / "small")
    load(tmp_path / "small", Net)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_round_trip(made, tmp_path):
    small = copy.deepcopy(made[0]).cuda()
    save(small, made[1], tmp_path / "small")
    again = load(tmp_path / "small", lambda: Net().cuda())
    assert all(t.is_cuda for t in again.state_dict().values())
    assert torch.equal(run(small, EXAMPLE)[0], run(again, EXAMPLE)[0])
    assert torch.equal(run(load(tmp_path / "small", Net), EXAMPLE)[0], run(made[0], EXAMPLE)[0])


# Steps.


def test_a_step_inside_of_what_an_earlier_one_built(tmp_path):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    example = torch.randn(2, 20)
    first, plan = compressed(model, example, {"0": 6})
    inner = trace(first, example)["0.1"]
    step = Step(("0",), "svd", {"rank": 2}, Group((replace(inner, name="0"),)))
    second, done = compressed(first, example, {"0.1": 2})
    both = replace(plan, steps=(*plan.steps, step))
    save(second, both, tmp_path / "small")
    again = load(tmp_path / "small", lambda: copy.deepcopy(model))
    assert isinstance(again[0][1], nn.Sequential)
    assert torch.equal(again(example), second(example))
    named = replace(plan, steps=plan.steps + done.steps)
    save(second, named, tmp_path / "named")
    assert torch.equal(load(tmp_path / "named", model)(example), second(example))


def test_a_step_that_was_rolled_back_is_left_out(made, tmp_path):
    small, plan = made
    small = copy.deepcopy(small)
    small.fc = nn.Linear(8 * 16, 24)
    save(small, plan, tmp_path / "small")
    content = unseal((tmp_path / "small" / MANIFEST).read_bytes(), MANIFEST)
    assert [step["layers"] for step in content["steps"]] == [["conv"]]
    assert [(kept["layer"], "rolled back" in kept["reason"]) for kept in content["rolled_back"]] == [("fc", True)]
    assert len(content["plan"]["steps"]) == 2
    assert_equal(load(tmp_path / "small", Net), small.eval())


def test_a_layer_that_no_step_explains_is_named(made, tmp_path):
    small, plan = made
    small = copy.deepcopy(small)
    small.fc = nn.Linear(8 * 16, 25)
    with pytest.raises(ArtifactError, match=r"'fc' is neither what its step svd builds .* weight 25x128"):
        save(small, plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_calls_that_are_wrong(made, tmp_path):
    small, plan = made
    bare = replace(plan, steps=tuple(replace(step, group=None) for step in plan.steps))
    with pytest.raises(CallError, match=r"Plan\.of\(network, steps\)"):
        save(small, bare, tmp_path / "small")
    open_rank = replace(plan, steps=tuple(replace(step, settings={}) for step in plan.steps))
    with pytest.raises(CallError, match="'rank' of svd on layer 'fc'"):
        save(small, open_rank, tmp_path / "small")
    with pytest.raises(CallError, match="needs a model and its Plan"):
        save(small, None, tmp_path / "small")
    with pytest.raises(CallError, match="cannot be written as JSON"):
        save(small, plan, tmp_path / "small", comparison={"a": object()})
    assert names(tmp_path) == []


def test_a_damage_that_is_no_number_does_not_lose_the_model(made, tmp_path):
    small, plan = made
    steps = tuple(replace(step, damage=float("inf")) for step in plan.steps)
    save(small, replace(plan, steps=steps), tmp_path / "small")
    assert load_plan(tmp_path / "small").steps[0].damage is None


@pytest.mark.parametrize("bad", ["extra", "complex"])
def test_what_cannot_be_stored_is_named(bad, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = Extra(2, 2) if bad == "extra" else nn.ParameterDict({"w": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(ModelError, match=r"_extra_state|'w' is torch.complex128"):
        save(model, Plan(()), tmp_path / "small")


# The folder.


def test_only_folders_that_may_be_replaced_are(made, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for free in ("empty", "missing/deep", "small"):
        check_folder(tmp_path / free)
        save(*made, tmp_path / free)
    assert names(folder) == [MANIFEST, WEIGHTS], "a comparison of another model must not stay"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CallError, match="is a file"):
        save(*made, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("text", [None, "{}", '{"format": 1, "taut": "0.1"}', "not JSON"])
def test_a_foreign_folder_is_refused_and_never_emptied(made, tmp_path, text):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    if text is not None:
        (foreign / MANIFEST).write_text(text)
    with pytest.raises(CallError, match="overwrite=True"):
        save(*made, foreign)
    with pytest.raises(CallError, match="overwrite=True"):
        check_folder(foreign)
    assert not (foreign / WEIGHTS).exists()
    save(*made, foreign, overwrite=True)
    assert_equal(load(foreign, Net), made[0])
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["foreign"]


def test_a_check_rehearses_the_save_and_leaves_nothing(folder, tmp_path, monkeypatch):
    before = names(tmp_path)
    for free in ("small", "missing/deep"):
        check_folder(tmp_path / free)
    with pytest.raises(CallError, match=r"too long.*shorter"):
        check_folder(tmp_path / ("n" * 250))
    monkeypatch.chdir(folder)
    with pytest.raises(CallError, match="current folder"):
        check_folder(".")
    with pytest.raises(CallError, match="current folder"):
        save(nn.Linear(2, 2), Plan(()), ".", overwrite=True)
    (folder.parent / "new").mkdir()
    (folder.parent / "new" / f"{NEW}unfinished").mkdir()  # of a killed write: nobody's
    check_folder(folder.parent / "new")
    assert names(tmp_path) == sorted([*before, "new"])


def test_what_a_killed_save_set_aside_is_found_by_every_entry(made, folder):
    for entry in (check_folder, is_folder, load_plan, lambda at: load(at, Net), lambda at: save(*made, at)):
        folder.rename(folder.with_name(f"{OLD}small"))
        entry(folder)
        assert_equal(load(folder, Net), made[0])
        assert names(folder.parent) == ["small"]


def test_a_failing_save_after_a_kill_loses_nothing(made, folder, monkeypatch):
    """The old model is put back before anything that can fail."""
    folder.rename(folder.with_name(f"{OLD}small"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ArtifactError, match="No space left"):
        save(*made, folder)
    monkeypatch.undo()
    assert_equal(load(folder, Net), made[0])
    assert names(folder.parent) == ["small"]


def test_killed_while_saving(made, folder):
    small, plan = made
    other = copy.deepcopy(small)
    nn.init.zeros_(other.same.weight)
    source = random.Random(3)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            while True:
                save(other, plan, folder)
                save(small, plan, folder)
        time.sleep(source.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        again = load(folder, Net)
        assert_equal(again, small if again.same.weight.any() else other)
    save(small, plan, folder)
    assert names(folder.parent) == ["small"]
    assert names(folder) == [MANIFEST, WEIGHTS]


# Damage.


def assert_refused(folder, match=""):
    with pytest.raises(ArtifactError, match=match) as caught:
        load(folder, never)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert caught.value.exit_code == 4


def never():
    raise AssertionError("a damaged folder must be refused before the base is built")


@pytest.mark.parametrize("name", FILES)
def test_every_bit_flip_and_truncation_is_detected(folder, name):
    source = random.Random(name)
    path = folder / name
    good = path.read_bytes()
    damaged = [good[: source.randrange(len(good))] for _ in range(105)]
    for _ in range(730):
        flipped = bytearray(good)
        flipped[source.randrange(len(good))] ^= 1 << source.randrange(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(ArtifactError):
            load(folder, never)


def test_what_is_missing_is_said(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "no folder")
    assert_refused(tmp_path, "not a folder that taut saved")
    (folder / COMPARISON).unlink()
    load(folder, Net)
    (folder / WEIGHTS).unlink()
    assert_refused(folder, "No such file")


def test_a_pipe_does_not_hang(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert_refused(folder, "not a regular file")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (lambda: nn.Linear(2, 2), "no layer 'conv'"),
        (lambda: _changed("fc", nn.Linear(8 * 16, 25)), r"fc.*24"),
        (lambda: _changed("code", nn.Linear(24, 13, bias=False)), "'code.weight' is 13x24 in the base and 12x24"),
        (lambda: _changed("extra", nn.Linear(2, 2)), "'extra.weight' is 2x2 in the base and missing in the folder"),
        (lambda: _changed("same", nn.Identity()), "'same.bias' is missing in the base and 8 in the folder"),
        (lambda: _changed("code", nn.LazyLinear(12)), "not initialized"),
    ],
)
def test_a_base_that_does_not_fit(folder, base, words):
    with pytest.raises(ArtifactError, match=words):
        load(folder, base)


def _changed(name, module):
    model = Net()
    setattr(model, name, module)
    return model


@pytest.mark.parametrize("base", [3, lambda: 3])
def test_a_base_that_is_no_model(folder, base):
    with pytest.raises(CallError, match="base"):
        load(folder, base)


# Malice.


def rewrite(folder, edit):
    """Change the manifest and seal it again, as someone would who means harm."""
    content = unseal((folder / MANIFEST).read_bytes(), MANIFEST)
    edit(content)
    (folder / MANIFEST).write_bytes(seal(content))


def put(*path, value):
    def edit(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("files", "../../etc/passwd", value={"sha256": "0", "bytes": 1}), "no other"),
        (put("files", "/etc/passwd", value={"sha256": "0", "bytes": 1}), "no other"),
        (put("files", value={}), "must name the file"),
        (put("files", value={"a\n" * 999: {"sha256": "0", "bytes": 1}}), "must name the file"),
        (put("files", WEIGHTS, "bytes", value=-1), "damaged"),
        (put("files", WEIGHTS, "sha256", value="0" * 64), "damaged"),
        (put("format", value=2), "format 2"),
        (put("format", value="1"), "format '1'"),
        (put("format", value=[1] * 9999), "format"),
        (put("extra", value=1), "extra"),
        (put("steps", value="x" * 10**6), "'steps' is wrong"),
        (put("steps", 0, "hook", value="os.system"), "hook"),
        (put("plan", "steps", 0, "group", "layers", 0, "call", value=1), "call"),
        (put("ties", value={"a": 1}), "'ties.a' is wrong"),
        (put("layouts", value={"conv.0.weight": ["x"]}), "layouts"),
    ],
)
def test_a_manifest_with_wrong_content(folder, edit, words):
    rewrite(folder, edit)
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("steps", 0, "method", value="os.system"), "Unknown method"),
        (put("steps", 0, "settings", "rank", value=2.5), "'rank' of svd on layer 'conv'"),
        (put("steps", 0, "settings", "rank", value="3"), "'rank' of svd on layer 'conv'"),
        (put("steps", 0, "settings", "rank", value=True), "'rank' of svd on layer 'conv'"),
        (put("steps", 0, "settings", "rank", value=10**12), "'rank' of svd on layer 'conv'"),
        (put("steps", 0, "settings", "rank", value=-1), "'rank' of svd on layer 'conv'"),
        (put("steps", 0, "settings", "rank", value=2), "'conv.0.weight' is 2x3x3x3 in the base and 3x3x3x3"),
        (put("steps", 0, "settings", "__class__", value=1), "Unknown setting"),
        (put("steps", 0, "group", value=None), "Plan.of"),
        (put("steps", 0, "group", "layers", value=[]), "group"),
        (put("steps", 0, "group", "layers", 0, "groups", value=0), "cannot be rebuilt|does not fit"),
        (put("steps", 0, "group", "layers", 0, "weight", value=[10**15] * 4), "does not fit|cannot be rebuilt"),
        (put("steps", 0, "group", "layers", 0, "padding", value=[]), "cannot be rebuilt"),
        (put("steps", 0, "group", "layers", 0, "padding_mode", value="x\ny"), "cannot be rebuilt"),
        (put("steps", value=[]), "'conv.weight' is 8x3x3x3 in the base and missing"),
        (put("ties", value={}), "'back.weight' is 12x12 in the base and missing"),
        (put("ties", "offset", value="nowhere"), "tie of"),
        (put("ties", "code.weight", value="mid.weight"), "tie of"),
        (put("layouts", value={"fc.0.weight": [0, 0]}), "no order of 2 dimensions"),
        (put("layouts", value={"fc.0.weight": [10**9]}), "no order of 2 dimensions"),
    ],
)
def test_a_manifest_that_asks_for_the_impossible(folder, edit, words):
    rewrite(folder, edit)
    with pytest.raises(ArtifactError, match=words) as caught:
        load(folder, Net)
    assert "\n" not in str(caught.value)


def test_a_huge_layer_takes_no_memory(folder, monkeypatch):
    """Shapes of the manifest are only believed where the base has them."""

    def no_module(*args, **kwargs):
        raise AssertionError("the shape was believed")

    monkeypatch.setattr("taut.methods.low_rank.svd.linear", no_module)
    monkeypatch.setattr("taut.methods.low_rank.svd.conv", no_module)
    layer = ("steps", 0, "group", "layers", 0)
    for key, value in (("weight", [2**20, 2**15, 1, 1]), ("groups", 2**30)):
        rewrite(folder, put(*layer, key, value=value))
        with pytest.raises(ArtifactError, match="does not fit"):
            load(folder, Net)


def test_a_manifest_larger_than_the_limit(folder):
    with (folder / MANIFEST).open("ab") as file:
        file.truncate(65 << 20)
    assert_refused(folder, "more than the")


def test_pickle_in_place_of_the_weights(folder):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch executed",)

    stamped(folder, pickle.dumps(Bomb()))
    assert_refused(folder, "no safetensors file")
    assert not Path("executed").exists()


def stamped(folder, weights):
    (folder / WEIGHTS).write_bytes(weights)
    stamp = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    rewrite(folder, put("files", WEIGHTS, value=stamp))


def header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{}",
        header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}) + b"1234",
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"12345678",
        header({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
        header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}) + b"1234",
        header(b"[" * 100_000),
    ],
)
def test_weights_that_claim_what_they_do_not_hold(folder, weights):
    stamped(folder, weights)
    assert_refused(folder, "no safetensors file")


def test_the_example_of_a_real_case_can_be_saved_by_result(tmp_path):
    """`Result.save` writes a sealed comparison beside the model."""
    net = case("mlp")
    model, example = net.make()
    result = taut.compress(model, example, budget=taut.Budget(params=0.6), data=net.data())
    result.save(tmp_path / "small")
    found = unseal((tmp_path / "small" / COMPARISON).read_bytes(), COMPARISON)
    assert found.keys() == result.comparison.to_dict().keys()
    again = load(tmp_path / "small", net.build)
    assert torch.equal(run(again, example)[0], run(result.model, example)[0])
