"""Transposed convolutions of low rank: what is predicted is what is lost, whatever the stride."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import taut
from taut.types import Plan, Step

KINDS = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

FLAVOURS = {
    "no overlap": (2, {"kernel_size": 2, "stride": 2}),
    "no overlap, gaps": (2, {"kernel_size": 2, "stride": 3, "output_padding": 1, "bias": False}),
    "overlap": (2, {"kernel_size": 4, "stride": 2, "padding": 1}),
    "dense": (2, {"kernel_size": 3, "bias": False}),
    "one axis": (1, {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1}),
    "three axes": (3, {"kernel_size": (2, 1, 3), "stride": (2, 1, 2), "dilation": (1, 1, 2)}),
}
SIZE = 5, 6, 4


def inputs(axes, samples=48):
    """Smooth in space, and of very different sizes in the channels."""
    x = torch.randn(samples, 12, *SIZE[:axes])
    x = x + x.roll(1, -1) + x.roll(2, -1)
    mixed = torch.einsum("dc,nc...->nd...", torch.randn(12, 12), x * torch.logspace(0, -2, 12)[:, *[None] * axes])
    return mixed + 0.5


@pytest.fixture(params=FLAVOURS)
def layer(request):
    """A net of one layer, its data, and what is known of it; its output is read as values."""
    axes, settings = FLAVOURS[request.param]
    torch.manual_seed(0)
    model, data = nn.Sequential(KINDS[axes - 1](12, 10, **settings)).eval(), inputs(axes)
    net = taut.trace(model, data[:2])
    return model, data, net, taut.observe(net, model, data, output="values")


@pytest.mark.parametrize(("ranks", "near"), [((4, 10), 0.05), ((12, 3), 0.05), ((5, 4), 0.15)])
def test_damage_is_what_the_output_loses(layer, ranks, near):
    model, data, net, stats = layer
    plan = Plan.of(net, [Step(("0",), "transposed", {"rank_in": ranks[0], "rank_out": ranks[1]}, allow_growth=True)])
    small = taut.apply(model, plan, stats)
    measured = (small(data) - model(data)).double().square().sum() / (2 * len(data))
    predicted = stats.damage(net.group(["0"]), taut.methods.resolve(plan.steps[0]))
    assert predicted == pytest.approx(float(measured), rel=near)
    wrong = Plan.of(
        net, [Step(("0",), "transposed", {**plan.steps[0].settings, "metric": "frobenius"}, allow_growth=True)]
    )
    plain = (taut.apply(model, wrong, stats)(data) - model(data)).double().square().sum() / (2 * len(data))
    assert plain > measured


def test_outputs_keep_the_directions_that_no_other_projection_keeps_better(layer):
    """An oracle of its own: principal components of the outputs that were seen."""
    model, data, net, stats = layer
    small = taut.apply(
        model, Plan.of(net, [Step(("0",), "transposed", {"rank_in": 12, "rank_out": 3}, allow_growth=True)]), stats
    )
    y = model(data).movedim(1, -1).flatten(0, -2).double()
    if model[0].bias is not None:
        y = y - y.mean(0)
    best = torch.linalg.svdvals(y)[3:].square().sum()
    lost = (small(data) - model(data)).double().square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-3)


def test_groups_and_output_sizes_stay():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=[2 * x.shape[2] + 2, 2 * x.shape[3] + 2])

    for model, name in ((Sized().eval(), "up"), (nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2)).eval(), "0")):
        x = torch.randn(2, 8, 4, 4)
        net = taut.trace(model, x)
        reason = "called with output_size" if name == "up" else "it has groups"
        (kept,) = taut.plan(net, taut.observe(net, model), {"params": 1.0}).kept
        assert reason in net[name].whole
        assert reason in kept.reason
        with pytest.raises(taut.BudgetError, match=reason):
            taut.compress(model, x, budget={"params": 0.1}, compare=False)
        plan = Plan.of(net, [Step((name,), "transposed", {"rank_in": 2, "rank_out": 8})])
        stats = taut.observe(net, model)
        with pytest.raises(taut.CallError, match=name):
            taut.apply(model, plan, stats)


def generator():
    """As DCGAN's."""
    torch.manual_seed(0)
    layers, sizes = [], (16, 32, 24, 16, 3)
    for number, (c, o) in enumerate(pairwise(sizes)):
        stride = {} if not number else {"stride": 2, "padding": 1}
        layers.append(nn.ConvTranspose2d(c, o, 4, bias=False, **stride))
        layers += [nn.BatchNorm2d(o), nn.ReLU()] if o > 3 else [nn.Tanh()]
    return nn.Sequential(*layers).eval()


def test_a_generator_is_halved_saved_loaded_trained_and_exported(tmp_path):
    model, z = generator(), torch.randn(64, 16, 1, 1)
    before = copy.deepcopy(model.state_dict())
    settings = {"budget": taut.Budget(macs=0.5), "output": "values", "methods": ["transposed"]}
    result = taut.compress(model, z[:8], data=[z], compare=False, **settings)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {step.method for step in result.plan.steps} == {"transposed"}
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    assert result.plan.after == taut.measure.count(result.model, taut.trace(model, z[:8]).example)
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=generator)(z), result.model(z))
    small = copy.deepcopy(result.model).train()
    small(z).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(parity.holds for parity in result.export(tmp_path / "small.onnx").parity)


def test_a_generator_is_halved_by_the_default_call(tmp_path):
    model, z = generator(), torch.randn(64, 16, 1, 1)
    result = taut.compress(model, z[:8], budget=taut.Budget(macs=0.5), data=[z], output="values", compare=False)
    assert any(step.method == "channels" for step in result.plan.steps)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    assert result.plan.after == taut.measure.count(result.model, taut.trace(model, z[:8]).example)
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=generator)(z), result.model(z))
