"""Weights that are computed at every call are baked: same outputs, plain layers, the input as it was."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import taut
from cases import untouched
from taut.core.copying import deep_copy
from taut.structure.baking import baked, computed
from taut.types import Plan, Step


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def old_weight_norm(layer, **settings):
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(layer, **settings)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.random_unstructured(layer, "bias", 0.25)


def pruned_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.ln_structured(layer, "weight", 0.25, 2, 0)


def positive(layer):
    parametrize.register_parametrization(layer, "weight", Positive())
    return parametrize.register_parametrization(layer, "bias", Positive())


WAYS = {
    "weight_norm": weight_norm,
    "weight_norm of an axis": lambda layer: weight_norm(layer, dim=1),
    "spectral_norm": spectral_norm,
    "orthogonal": orthogonal,
    "own": positive,
    "old weight_norm": old_weight_norm,
    "old weight_norm of all": lambda layer: old_weight_norm(layer, dim=None),
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
    "pruned twice": pruned_twice,
}

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_baked_layer_gives_the_same_and_is_plain(way, layer):
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    model, x = WAYS[way](build()).eval(), torch.randn(shape)
    other = deep_copy(model)  # shares the class that torch makes for a parametrized module
    with untouched(model):
        plain = baked(model)
    assert type(plain) is type(build())
    assert list(plain.state_dict()) == list(build().state_dict())
    assert not plain._forward_pre_hooks
    assert computed(plain) == ()
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(baked(other)(x), model(x))
    assert all(p.requires_grad for p in plain.parameters())
    plain.load_state_dict(build().state_dict())


class Net(nn.Module):
    def __init__(self, way=lambda layer: layer):
        super().__init__()
        self.a, self.b, self.c = way(nn.Linear(8, 16)), way(nn.Linear(16, 16)), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "pruned"])
def test_compress_bakes_first_and_load_does_it_again(way, tmp_path):
    torch.manual_seed(0)
    model, x = Net(WAYS[way]).eval(), torch.randn(32, 8)
    with untouched(model):
        result = taut.compress(model, x, budget=taut.Budget(macs=0.8), data=[x], methods=("channels",), compare=False)
    assert [step.method for step in result.plan.steps] == ["bake", "bake", "channels"]
    assert type(result.model.b) is nn.Linear
    assert all(p.requires_grad for p in result.model.parameters())
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", lambda: Net(WAYS[way]))
    assert torch.equal(loaded(x), result.model(x))
    plain = taut.load(tmp_path / "small", Net)  # of the architecture without it, too
    assert torch.equal(plain(x), result.model(x))


KINDS = {
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 4, 8)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(20, 6), (4, 5)),
    "bag": (lambda: nn.EmbeddingBag(20, 6), (4, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 6)), (4, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 6)),
    "batch norm": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "prelu": (lambda: nn.PReLU(6), (4, 6)),
}


@pytest.mark.parametrize(("kind", "way"), [*((kind, "own") for kind in KINDS), ("layer norm", "old weight_norm")])
def test_every_kind_with_a_weight_alone_is_baked(kind, way, tmp_path):
    layer, shape = KINDS[kind]

    def build():
        torch.manual_seed(0)
        norm = layer()
        if way == "own":
            parametrize.register_parametrization(norm, "weight", Positive())
        else:
            old_weight_norm(norm)
        return nn.Sequential(norm, nn.Flatten(), nn.LazyLinear(12), nn.Linear(12, 4)).eval()

    x = torch.randint(0, 20, shape) if "bedding" in kind or kind == "bag" else torch.randn(shape)
    model = build()
    model(x)
    assert taut.inspect(model, x).layers[0].plain_form == "bake"
    net = taut.trace(model, x)
    plan = Plan.of(net, [Step(("0",), "bake")])
    small = taut.apply(model, plan, taut.observe(net, model))
    assert type(small[0]) is type(layer())
    taut.save(small, plan, tmp_path / "small")

    def base():
        built = build()
        built(x)
        return built

    assert torch.equal(taut.load(tmp_path / "small", base)(x), small(x))


def test_what_no_step_bakes_is_not_said_to_be_baked():
    lstm = nn.LSTM(4, 6, batch_first=True)
    model = nn.Sequential(weight_norm(lstm, "weight_hh_l0")).eval()
    (reach,) = taut.inspect(model, torch.randn(2, 3, 4)).layers
    assert reach.layer.kind == "LSTM"
    assert reach.plain_form is None
    assert "make it permanent first" in reach.blocked
    assert "remove_parametrizations" in reach.remedy


def test_a_step_of_a_plan_bakes(tmp_path):
    model, x = Net(spectral_norm).eval(), torch.randn(4, 8)
    net = taut.trace(model, x)
    assert "taut.compress bakes it" in net["a"].skip
    plan = Plan.from_json(Plan.of(net, [Step(("a",), "bake"), Step(("b",), "bake")]).to_json())
    small = taut.apply(model, plan, taut.observe(net, model))
    torch.testing.assert_close(small(x), model(x))
    assert parametrize.is_parametrized(model.a)
    assert taut.trace(small, x)["a"].skip is None
    with pytest.raises(taut.errors.CallError, match="not computed from anything"):
        taut.apply(model, Plan.of(net, [Step(("c",), "bake")]), taut.observe(net, model))


def test_weights_that_are_computed_from_one_stay():
    model = Net(weight_norm).eval()
    model.b, model.a = model.a, nn.Linear(8, 8)
    model.b = weight_norm(nn.Linear(8, 16))
    model.d = weight_norm(nn.Linear(8, 16))
    model.d.parametrizations.weight.original1 = model.b.parametrizations.weight.original1
    model.c = nn.Linear(16, 4)
    net = taut.trace(model, torch.randn(4, 8))
    assert "shared" in net["b"].skip


class Counting(nn.Module):
    """A parametrization that counts how often it computes, in any mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight * 1.0


def counted(layer):
    return parametrize.register_parametrization(layer, "weight", Counting(), unsafe=True)


@pytest.mark.parametrize("way", [spectral_norm, torch.nn.utils.spectral_norm, counted], ids=["new", "old", "own"])
@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_model_leaves_what_its_weights_are_computed_from(way, training):
    model, x = Net(way).train(training), torch.randn(4, 8)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    taut.observe(taut.trace(model, x), model, [x])
    taut.inspect(model, x)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(module.training is training for module in model.modules())


def test_a_layer_that_nothing_else_changed_keeps_its_parametrization(tmp_path):
    build = lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), orthogonal(nn.Linear(32, 32)), nn.Linear(32, 4))  # noqa: E731
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(32, 16)
    result = taut.compress(model, x, budget="params=97%", data=[x], methods=("svd",), compare=False)
    assert result.plan.steps
    assert "bake" not in {step.method for step in result.plan.steps}
    assert parametrize.is_parametrized(result.model[2])
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", build)
    assert torch.equal(loaded(x), result.model(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return weight * self.scale


def test_one_object_that_computes_the_weights_of_two_layers_holds_neither():
    shared, model, x = Scaled(), Net().eval(), torch.randn(4, 8)
    for layer in (model.a, model.b):
        parametrize.register_parametrization(layer, "weight", shared)
    reaches = taut.inspect(model, x).layers
    assert [reach.plain_form for reach in reaches] == ["bake", "bake", None]
    result = taut.compress(model, x, budget={"params": 0.9}, data=[x], compare=False)
    assert [step.method for step in result.plan.steps[:2]] == ["bake", "bake"]
