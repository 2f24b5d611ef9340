"""Optimal brain surgeon on layers: units, forms of the second moment, and what it is for."""

import pytest
import torch
from torch import nn

import taut
from cases import LAYERS, case, sequential, untouched
from taut import CallError, Plan
from taut.decompose.weighting import Weighting
from taut.methods import resolve
from taut.methods.masks.obs import OBS
from taut.structure.statistics import LayerStatistics


def related(samples, size, seed=0):
    """Inputs that hang together, in the same way for every seed."""
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return torch.randn(samples, size, generator=torch.Generator().manual_seed(seed)) @ mixing


def pruned(net, data, method, **settings):
    network = taut.trace(net, data[:2])
    stats = taut.observe(network, net, [data])
    return taut.apply(net, Plan((taut.whole(network, method, **settings),)), stats)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_outputs_stay_nearer_than_with_any_mask_alone(sparsity):
    torch.manual_seed(0)
    net = sequential(a=nn.Linear(16, 24), r=nn.ReLU(), b=nn.Linear(24, 4))
    x, fresh = related(400, 16), related(400, 16, seed=1)
    wanted = net(fresh)

    def error(method, **settings):
        with untouched(net):
            small = pruned(net, x, method, sparsity=sparsity, select="layer", **settings)
        return float((small(fresh) - wanted).detach().square().mean())

    others = [error("magnitude"), error("magnitude", score="wanda"), error("magnitude", score="obd")]
    assert error("obs") < 0.85 * min(others)


def test_the_damage_predicts_the_rise_of_the_squared_error():
    torch.manual_seed(0)
    net, x = sequential(fc=nn.Linear(12, 6)), related(500, 12)
    network = taut.trace(net, x[:2])
    stats = taut.observe(network, net, [x], output="values")
    method = OBS(ridge=1e-6)
    modules = {"fc": net.fc}
    (scores,) = method.factor(modules, stats.layers).scores
    A, B = x.double().T @ x.double() / len(x), stats.layers["fc"].outputs.full[0].diagonal().double()
    small = pruned(net, x, "obs", sparsity=0.5, ridge=1e-6)
    kept = small.fc.weight != 0
    change = (small.fc.weight - net.fc.weight).double()
    wanted = 0.5 * float((B * (change @ A * change).sum(1)).sum())
    assert float(scores[~kept].sum()) >= 0.99 * wanted
    assert float(scores[~kept].max()) <= float(scores[kept].min()) * (1 + 1e-6)


@pytest.mark.parametrize("one", LAYERS, ids=lambda one: one.name)
def test_every_flavour_of_layer_is_compensated(one):
    """On the calibration images themselves the error of the layer is never above that of the mask alone."""
    model, example = case(one.name).make()
    network = taut.trace(model, example)
    stats = taut.observe(network, model, one.data())
    for layer in network.layers:
        method = OBS(sparsity=0.5, select="layer")
        if method.refuses(network.group([layer.name])) is None:
            module = model.get_submodule(layer.name)
            modules = {layer.name: module}
            built = method.rewrite(modules, method.factor(modules, stats.layers)).modules[layer.name]
            change = (built.weight - module.weight).detach()
            masked = torch.where(built.weight == 0, -module.weight, 0.0).detach()
            metric, shape = (
                stats.layers[layer.name].weighting,
                (getattr(module, "groups", 1), -1, module.weight.shape[1]),
            )
            mine, blind = (metric.energy(w.reshape(*shape, w[0, 0].numel())) for w in (change, masked))
            assert mine <= blind * 1.02 + 1e-9


@pytest.mark.parametrize("kind", ["channel", "sketch"])
def test_other_forms_of_the_second_moment(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3)
    x = related(300, 6 if kind == "channel" else 54).double()
    A = x.T @ x / len(x)
    form = {"channel": A[None]} if kind == "channel" else {"sketch": (x / len(x) ** 0.5)[None]}
    stats = {"conv": LayerStatistics(Weighting(**form))}
    method = OBS(sparsity=0.5, ridge=1e-6)
    factors = method.factor({"conv": conv}, stats)
    built = method.rewrite({"conv": conv}, factors).modules["conv"]
    assert int((built.weight == 0).sum()) == 216
    whole = A if kind == "sketch" else torch.kron(A, torch.eye(9, dtype=torch.float64))
    left = (built.weight - conv.weight).detach().double().flatten(1) @ whole
    # at the least-squares solution the error of the outputs is orthogonal to the inputs of what stays
    scale = float((conv.weight.detach().double().flatten(1) @ whole).abs().max())
    assert float(left[(built.weight != 0).flatten(1)].abs().max()) < 1e-4 * scale


def test_without_data_it_is_magnitude():
    torch.manual_seed(0)
    net, x = sequential(a=nn.Linear(12, 20), b=nn.Linear(20, 4)), torch.randn(2, 12)
    network = taut.trace(net, x)
    stats = taut.observe(network, net)
    small, plain = (
        taut.apply(net, Plan((taut.whole(network, method, sparsity=0.5),)), stats) for method in ("obs", "magnitude")
    )
    assert torch.equal(small.a.weight, plain.a.weight)
    assert torch.equal(small.b.weight, plain.b.weight)


def test_pruned_again_the_zeros_stay():
    torch.manual_seed(0)
    net, x = sequential(a=nn.Linear(12, 20), r=nn.ReLU(), b=nn.Linear(20, 4)), related(200, 12)
    once = pruned(net, x, "obs", sparsity=0.4)
    twice = pruned(once, x, "obs", sparsity=0.7)
    assert not bool(((once.a.weight == 0) & (twice.a.weight != 0)).any())
    assert sum(int((m.weight == 0).sum()) for m in (twice.a, twice.b)) == round(0.7 * 320)


@pytest.mark.parametrize("ridge", [0, -1, 2, "much", True])
def test_a_ridge_out_of_range(ridge):
    with pytest.raises(CallError, match=f"The 'ridge' of obs must be above 0 and at most 1. Got {ridge!r}"):
        resolve(taut.Step(("a",), "obs", {"ridge": ridge}))


def test_one_order_serves_every_sparsity(monkeypatch):
    torch.manual_seed(0)
    net, x = sequential(a=nn.Linear(12, 20), r=nn.ReLU(), b=nn.Linear(20, 4)), related(200, 12)
    network = taut.trace(net, x[:2])
    stats = taut.observe(network, net, [x])
    made, factor = [], OBS.factor
    monkeypatch.setattr(OBS, "factor", lambda self, *given: made.append(1) or factor(self, *given))
    for sparsity in (0.3, 0.6, 0.9):
        taut.apply(net, Plan((taut.whole(network, "obs", sparsity=sparsity),)), stats)
    assert len(made) == 1
