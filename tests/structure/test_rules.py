"""Rules of the user's for operators, autograd functions and modules: believed as far as the narrower network agrees."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut import ArtifactError, CallError
from taut.planning.application import apply_plan
from taut.structure.channels.groups import coupled
from taut.structure.rules import _RULES

X = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("taut_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() * factor).clone()


@torch.library.custom_op("taut_tests::behind", mutates_args=())
def behind(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([a.detach().numpy(), b.detach().numpy()], 1))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 3)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


scale = Scale.apply  # as it is imported


class Gain(nn.Module):
    """Values per channel that torch's operations never meet."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.shape = channels, (channels,)
        self.gain, self.shift = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5), None
        self.register_buffer("seen", torch.rand(channels))
        self.once = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if x.shape[1] != self.channels:
            raise ValueError("another number of channels")
        values = x.detach().numpy() * self.gain.detach().numpy() + self.seen.numpy()[:, None, None]
        return torch.from_numpy(values).to(x) * self.once


class Pool(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy().mean((2, 3), keepdims=True))


class Flat(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy().reshape(len(x), -1).copy())


class Mean(nn.Module):
    """Of all channels."""

    def forward(self, x):
        values = x.detach().numpy()
        return torch.from_numpy(values - values.mean(1, keepdims=True))


class Turned(nn.Module):
    """A layer with the inputs of its weight in front."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.table, self.shift = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        assert x.shape[-1] == self.inputs
        return torch.from_numpy(x.detach().numpy() @ self.table.detach().numpy() + self.shift.detach().numpy())


TURNED = {"parameters": {"table": (1, 0), "shift": 0}, "attributes": {"inputs": "inputs", "outputs": "outputs"}}


class Net(nn.Module):
    def __init__(self, between, width=8, positions=36):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        if isinstance(between, Two) and not isinstance(between, One):
            self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.between, self.fc = between, nn.Linear(width * positions, 4)

    def forward(self, x):
        y = self.between(self.a(x), self.b(x)) if hasattr(self, "b") else self.between(self.a(x))
        return self.fc(y.flatten(1))


class Two(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


class One(Two):
    def forward(self, x):
        return self.function(x)


@pytest.fixture
def register():
    rules = []

    def made(*args, **settings):
        rules.append(taut.register_channel_rule(*args, **settings))
        return rules[-1]

    yield made
    for rule in rules:
        rule.remove()
    assert not _RULES


def build(between, **sizes):
    torch.manual_seed(1)
    return Net(between, **sizes).eval()


def narrowed(model, **settings):
    """The widths of the first layer before and after a step of channels, the model, and the plan."""
    net = taut.trace(model, X[:2])
    step = taut.whole(net, "channels", **({"sparsity": 0.4} | settings))
    plan = taut.Plan.of(net, [step])
    return apply_plan(model, plan, taut.observe(net, model))


GAIN = {"parameters": {"gain": 1, "shift": 0, "seen": 0}, "attributes": ("channels", "shape")}


class Behind(Two):
    def __init__(self):
        super().__init__(None)

    def forward(self, x, y):
        return behind(x, y)


def from_numbers(x, y):
    return torch.cat([x, y], 1)


@pytest.mark.parametrize(
    ("between", "sizes", "rule"),
    [
        (lambda: One(lambda x: doubled(x, 2.0)), {}, (torch.ops.taut_tests.doubled, "elementwise")),
        (lambda: One(lambda x: doubled(x, 2.0)), {}, (torch.ops.taut_tests.doubled.default, lambda x, factor: x)),
        (lambda: One(scale), {}, (Scale, "elementwise")),
        (Behind, {"width": 16}, (behind, "concatenates")),
        (Behind, {"width": 16}, (behind, from_numbers)),
        (Pool, {"positions": 1}, (Pool, "resizes")),
        (Flat, {}, (Flat, "reshapes")),
    ],
    ids=["operator", "overload", "function", "concatenates", "numbers", "resizes", "reshapes"],
)
def test_a_rule_lets_channels_go_that_stay_without_it(between, sizes, rule, register):
    model = build(between(), **sizes)
    assert not [group for group in coupled(model, taut.trace(model, X[:2]).example).groups if group.name == "a"]
    register(*rule)
    small, plan = narrowed(model)
    assert len(small.a.weight) < 8
    assert small.fc.in_features < model.fc.in_features
    assert not [kept for kept in plan.kept if kept.layer == "a"]
    assert torch.isfinite(small(X)).all()


def test_a_module_with_values_per_channel_becomes_narrower_and_loads_again(register, tmp_path):
    model = build(Gain(8))
    before = copy.deepcopy(model.state_dict())
    rule = register(Gain, "elementwise", **GAIN)
    result = taut.compress(model, X[:2], budget=taut.Budget(params=0.6), data=[X], methods=["channels"], compare=False)
    small = result.model
    kept = len(small.a.weight)
    assert kept < 8
    assert small.between.gain.shape == (1, kept, 1, 1)
    assert (small.between.channels, small.between.shape, len(small.between.seen)) == (kept, (kept,), kept)
    assert result.plan.steps[0].after.params == taut.trace(small, X[:2]).cost.params
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", base=lambda: build(Gain(8)))
    assert torch.equal(loaded(X), small(X))
    assert model.between.channels == 8
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    rule.remove()
    with pytest.raises(
        ArtifactError, match=r"'between' has fewer channels, and is a Gain .*register_channel_rule\(Gain"
    ):
        taut.load(tmp_path / "small", base=lambda: build(Gain(8)))


@pytest.mark.parametrize("methods", [["channels"], ["channels", "svd"]])
def test_a_layer_of_ones_own_becomes_narrower_on_both_sides_and_loads_again(methods, register, tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), Turned(20, 24), nn.ReLU(), nn.Linear(24, 3)).eval()

    model, x = make(), torch.randn(64, 6)
    register(Turned, "mixes", **TURNED)
    assert {group.name for group in coupled(model, taut.trace(model, x).example).groups} == {"0", "2"}
    result = taut.compress(model, x[:4], budget=taut.Budget(params=0.5), data=[x], methods=methods, compare=False)
    inner = result.model[2]
    assert inner.table.shape == (inner.inputs, inner.outputs) < (20, 24)
    assert (inner.inputs, inner.outputs) == (result.model[0].out_features, result.model[4].in_features)
    assert result.plan.steps[0].after.params == taut.trace(result.model, x[:4]).cost.params
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=make)(x), result.model(x))


def test_a_wrong_rule_of_a_layer_is_named(register):
    model = nn.Sequential(nn.Linear(6, 8), Turned(8, 8), nn.Linear(8, 3)).eval()
    register(Turned, "mixes", parameters={"table": (1, 0)}, attributes=TURNED["attributes"])
    net = taut.trace(model, torch.randn(4, 6))
    plan = taut.Plan.of(net, [taut.whole(net, "channels", sparsity=0.5)])
    small, done = apply_plan(model, plan, taut.observe(net, model))
    assert "see the channel rule of 'Turned'" in next(kept.reason for kept in done.kept if kept.layer == "1")
    assert small[1].table.shape[1] == 8


@pytest.mark.parametrize(
    ("between", "rule", "settings", "reason"),
    [
        (Mean, "elementwise", {}, "see the channel rule of 'Mean'"),
        (lambda: Gain(8), "elementwise", {}, "see the channel rule of 'Gain'"),
        (lambda: Gain(8), "elementwise", {"parameters": {"gain": 1}}, "see the channel rule of 'Gain'"),
        (Pool, "elementwise", {}, "the channel rule of Pool does not fit: RuntimeError"),
        (Pool, "reshapes", {}, "another number of elements"),
        (Mean, "mixes", {}, "Mean mixes them, as its channel rule says"),
        (Mean, lambda x: x / 0, {}, r"in the place of whole numbers"),
        (Mean, lambda x, y: x, {}, "does not fit: TypeError"),
        (Mean, lambda x: (x, x), {}, "2 results for 1 outputs"),
        (Mean, lambda x: x + 1000, {}, "numbers that did not go in"),
        (Mean, lambda x: torch.full_like(x, -1), {}, "mixes these channels"),
    ],
)
@pytest.mark.filterwarnings("ignore:Layer")
def test_a_wrong_rule_costs_channels_and_is_named(between, rule, settings, reason, register):
    model = build(between(), positions=1 if between is Pool else 36)
    register(type(model.between), rule, **settings)
    small, plan = narrowed(model)
    assert small.a.weight.shape == model.a.weight.shape
    assert torch.equal(small(X), model(X))
    assert reason in " ".join(kept.reason for kept in plan.kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": {"gain": 5}}, "axis 5 of 'gain'"),
        ({"parameters": {"gian": 1}}, "names 'gian', which a Gain does not have. Its parameters and buffers: gain, "),
        ({"parameters": {"gain": 1}, "attributes": ("chanels",)}, "names 'chanels', which a Gain does not have"),
        ({"parameters": {"gain": 1, "once": 0}}, "axis 0 of 'once'"),
        ({"parameters": {"gain": 1, "seen": 0}, "attributes": ("once",)}, "attribute 'once'"),
    ],
)
def test_a_rule_that_does_not_fit_its_module_is_told(settings, message, register):
    register(Gain, "elementwise", **settings)
    with pytest.raises(taut.TautError, match=message):
        narrowed(build(Gain(8)))


@pytest.mark.parametrize(
    ("target", "rule", "settings", "message"),
    [
        (nn.Linear, "elementwise", {}, "what torch itself does"),
        (torch.relu, "elementwise", {}, "of a plain function"),
        (torch.autograd.Function, "elementwise", {}, "subclass"),
        ("scale", "elementwise", {}, "A channel rule is for"),
        (Gain, "sideways", {}, "one of elementwise, resizes"),
        (Gain, 3, {}, "or a function"),
        (Scale, "elementwise", {"parameters": {"gain": 0}}, "for classes of modules"),
        (Gain, "mixes", {"attributes": ("channels",)}, "of the outputs or of the inputs"),
        (Gain, "mixes", {"parameters": {"gain": 0}}, "a parameter with both"),
        (Gain, "reshapes", {"parameters": {"gain": 0}}, "for classes of modules"),
        (Gain, "elementwise", {"parameters": {"gain": (0, 1)}}, "own parameters"),
        (Gain, "elementwise", {"attributes": {"channels": "width"}}, "of the outputs or of the inputs"),
        (Gain, "elementwise", {"parameters": {"inner.gain": 0}}, "own parameters"),
        (Gain, "elementwise", {"parameters": {"gain": None}}, "own parameters"),
        (Gain, "elementwise", {"parameters": ["gain"]}, r"parameters= maps names .*Got \['gain'\]"),
    ],
)
def test_what_is_no_rule_is_told(target, rule, settings, message):
    with pytest.raises(CallError, match=message):
        taut.register_channel_rule(target, rule, **settings)
    assert not _RULES


def test_a_kept_module_keeps_its_channels_and_the_last_rule_counts(register):
    model = build(Gain(8))
    register(Gain, "mixes")
    register(Gain, "elementwise", **GAIN)
    assert taut.trace(model, X[:2])["between"].skip.startswith("a channel rule says")
    small = narrowed(model)[0]
    assert len(small.a.weight) < 8
    keep = {"between": 1.0}
    with pytest.warns(UserWarning, match="no channels can be taken out"):
        kept = narrowed(model, keep=keep)[0]
    assert len(kept.a.weight) == 8
