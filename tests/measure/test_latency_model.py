"""What layers do, and the rates fitted to it: against layers that were really built, and rates that were planted."""

import numpy as np
import pytest
import torch
from torch import nn

import taut
from cases import case, sequential
from taut.core.example import Example
from taut.errors import CallError
from taut.measure import latency_model
from taut.measure.latency_model import SIMD_LANES, LatencyModel, built_ops, features, filled, layer_ops, model_ops
from taut.methods import METHODS, choose
from taut.nn import Basis, GroupedLinear
from taut.types import Group


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NETS = {
    "1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), draw(3, 4, 20)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2), draw(2, 4, 9, 8)),
    "3d": (lambda: nn.Conv3d(2, 6, 3), draw(2, 2, 5, 6, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), draw(2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), draw(2, 4, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), draw(2, 4, 9, 8)),
    "linear": (lambda: nn.Linear(5, 7), draw(3, 4, 5)),
    "a stack of matrices": (lambda: GroupedLinear(12, 9, groups=3), draw(1, 12, 5)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_layer_is_described_as_it_runs(name):
    build, x = NETS[name]
    model = sequential(a=build()).eval()
    net = taut.trace(model, x)
    assert np.allclose(layer_ops(net["a"]), model_ops(model, net.example))
    assert len(layer_ops(net["a"])) == 1


def test_what_a_layer_does_by_hand():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 20, 1)), draw(2, 3, 8, 8)
    ops = model_ops(model, Example(model, x))
    first, second = 36 * 5 * 27, 36 * 20 * 5
    assert np.allclose(ops, [[first, 3 * 64 + 5 * 36, 1, 5], [second, 25 * 36, 0, 20]])
    assert np.allclose(features(ops, 1), [first, second, 3 * 64 + 30 * 36, 2])
    assert np.allclose(features(ops, 16), [first * 16 / 5, second * 32 / 20, 3 * 64 + 30 * 36, 2])


def test_grouped_outputs_fill_no_lanes():
    assert np.allclose(filled(np.array([0.0, 1.0, 8.0, 9.0]), 8), [1, 8, 1, 16 / 9])


def test_a_layer_that_is_called_twice_and_modules_that_are_not_timed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True)

        def forward(self, x):
            return self.b(self.a(self.a(x)))[0]

    model, x = Net().eval(), draw(2, 3, 6)
    net = taut.trace(model, x)
    assert len(layer_ops(net["a"])) == 2
    assert not len(layer_ops(net["b"]))
    assert np.allclose(layer_ops(net["a"]), model_ops(model, net.example))


@pytest.mark.parametrize("name", ["svd", "spatial", "tucker", "cp"])
@pytest.mark.parametrize("of", ["conv2d_padding", "mlp", "vgg"])
def test_a_candidate_is_described_as_it_runs(name, of):
    model, example = case(of).make()
    net = taut.trace(model, example)
    method, stats = METHODS[name](), taut.observe(net, model)
    for layer in net.layers:
        group = Group((layer,))
        if layer.skip is not None or method.refuses(group) is not None:
            continue
        for candidate in method.candidates(group, stats.factors(group, method))[:2]:
            step = taut.Step(group.names, name, taut.methods.settings(candidate))
            small = taut.apply(model, taut.Plan.of(net, [step]), stats)
            others = [layer_ops(other) for other in net.layers if other.name != layer.name]
            wanted = features(np.concatenate([built_ops(group, candidate), *others]), 8)
            assert np.allclose(features(model_ops(small.eval(), net.example), 8), wanted)


def test_a_candidate_is_built_once_to_be_described(monkeypatch):
    model, example = case("mlp").make()
    net = taut.trace(model, example)
    group, other = (Group((layer,)) for layer in net.layers[:2])
    latency_model._kept_built_ops.cache_clear()
    svd, built = METHODS["svd"], []
    skeleton = svd.skeleton
    monkeypatch.setattr(svd, "skeleton", lambda self, group: (built.append(1), skeleton(self, group))[1])
    first, again = built_ops(group, svd(rank=3)), built_ops(group, svd(rank=3))
    assert len(built) == 1
    assert np.array_equal(first, again)
    assert not np.array_equal(first, built_ops(group, svd(rank=4)))
    assert not np.array_equal(first, built_ops(other, svd(rank=3)))
    with pytest.raises(ValueError, match="read-only"):
        first[:] = 0


def test_settings_with_lists_are_described_too():
    model, example = case("conv2d_padding").make()
    net = taut.trace(model, example)
    group = Group((net.layers[0],))
    listed = METHODS["svd"](rank=[3])
    with pytest.raises(CallError, match="rank"):
        built_ops(group, listed)


def test_what_cannot_be_run_without_values_is_taken_for_one_layer():
    model, example = case("mlp").make()
    net = taut.trace(model, example)
    group = Group((net.layers[0],))
    for method in choose(["codebook", "hashed"]):
        if method.refuses(group) is None:
            ops = built_ops(group, method)
            assert len(ops) == 1
            assert ops[0, 1] == layer_ops(net.layers[0])[0, 1]


def planted(lanes, seed=0):
    """A pace, and networks with the times that it gives."""
    dice = np.random.default_rng(seed)
    networks = []
    for _ in range(14):
        rows = int(dice.integers(3, 9))
        wide, outputs = dice.integers(0, 2, rows), dice.integers(1, 60, rows)
        networks.append(np.stack([dice.uniform(1e5, 1e7, rows), dice.uniform(1e3, 1e5, rows), wide, outputs], 1))
    pace = LatencyModel((2e-8, 3e-8, 1e-6, 0.01), lanes, 0.05, "eager")
    whole = pace.rest + pace.of(networks[0])
    return pace, networks, [(pace.rest + pace.of(ops)) / whole for ops in networks], whole


@pytest.mark.parametrize("lanes", SIMD_LANES)
def test_the_fit_finds_planted_rates(lanes):
    pace, networks, shares, whole = planted(lanes)
    found = LatencyModel.fit(networks, shares, "eager")
    assert found.lanes == lanes
    assert found.rates == pytest.approx([rate / whole for rate in pace.rates], rel=1e-6)
    assert found.rest == pytest.approx(pace.rest / whole, rel=1e-6)


def test_noise_makes_no_rate_negative():
    _, networks, shares, _ = planted(8)
    noise = np.random.default_rng(1).normal(1, 0.2, len(shares))
    found = LatencyModel.fit(networks, list(np.array(shares) * noise), "eager")
    assert min(*found.rates, found.rest) >= 0


def test_a_network_takes_what_its_layers_take():
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    pace = LatencyModel((1e-6, 2e-6, 3e-6, 0.01), 8, 0.1, "eager")
    assert pace.total(net) == pytest.approx(0.1 + pace.of(model_ops(model, net.example)))


def test_shared_bases_count_at_every_position():
    G = nn.Parameter(torch.randn(6, 2))
    for model, x, places in (
        (nn.Sequential(Basis(G, 2), Basis(G, 2, spread=True)), torch.randn(1, 6, 3, 5), 2 * 15),
        (Basis(G, 0, inner=4), torch.randn(1, 24), 4),
    ):
        assert model_ops(model, Example(model, x))[:, 0].sum() == places * G.numel()
