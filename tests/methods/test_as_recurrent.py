"""Recurrent layers are opened first, made smaller inside, and closed again where nothing was done to them."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import taut
from recurrent import NETS, Encoder, Packed, Streaming, Tagger
from taut.nn import Recurrent, StateLinear
from taut.planning.plain_form import in_plain_form
from taut.types import Plan, Step

SHRUNK = {
    "translator": None,
    "tagger": ["channels"],
    "packed": ["channels"],
    "encoder": ["channels"],
    "recognizer": ["channels"],
    "step by step": ["channels"],
    "started": ["channels"],
}
"""Networks, and by which methods they are halved."""


def seeded(name, samples=8):
    make, inputs = NETS[name]
    torch.manual_seed(0)
    return make().eval(), inputs(samples)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", NETS)
def test_opening_keeps_the_function_the_costs_and_the_model(name):
    model, x = seeded(name)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    net = taut.trace(model, x)
    opened, inner, steps = in_plain_form(model, net)
    assert {step.method for step in steps} == {"as_recurrent"}
    assert inner.cost.macs == net.cost.macs
    assert inner.cost.params == net.cost.params
    inside = [layer for layer in inner.layers if ".inputs." in layer.name or ".states." in layer.name]
    assert sum(x.macs for x in inside) == sum(net[name].macs for step in steps for name in step.layers)
    torch.testing.assert_close(first(opened(*x)), first(model(*x)))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_layers_inside_are_told_with_exact_costs_over_time():
    model, x = seeded("tagger")
    net = in_plain_form(model, taut.trace(model, x))[1]
    layer, units, steps = net["rnn.inputs.1"], 24, 6
    assert layer.weight == (2 * 4 * units, 2 * units)
    assert layer.macs == steps * math.prod(layer.weight)
    assert net["rnn.states.3"].kind == "StateLinear"
    assert net["rnn.states.3"].macs == steps * 4 * units * units


def test_steps_of_packed_sequences_count_each_once():
    model, (x, lengths) = seeded("packed")
    net = in_plain_form(model, taut.trace(model, (x, lengths)))[1]
    assert net["rnn.states.0"].macs == round(int(lengths.sum()) * 4 * 24 * 24 / len(x))


@pytest.mark.parametrize("name", SHRUNK)
def test_it_is_halved_and_loads_again(name, tmp_path):
    model, x = seeded(name)
    data = [NETS[name][1](16)]
    result = taut.compress(model, x, budget={"macs": 0.5}, data=data, compare=False, methods=SHRUNK[name])
    assert result.comparison.after.macs <= 0.5 * result.comparison.before.macs
    assert "as_recurrent" in {step.method for step in result.plan.steps}
    inside = [m for m in result.model.modules() if isinstance(m, Recurrent)]
    assert inside
    assert all(m.fused() for m in inside)
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", base=NETS[name][0])
    assert torch.equal(first(loaded(*x)), first(result.model(*x)))
    again = taut.apply(model, result.plan, taut.observe(taut.trace(model, x), model, data), data)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in result.model.parameters()]


def test_gates_and_directions_share_one_basis_in_front_of_the_kernel():
    torch.manual_seed(0)
    model, x = Tagger(num_layers=2, bidirectional=True).eval(), torch.randint(0, 30, (16, 6))
    with torch.no_grad():  # inputs of the second layer matter in 6 directions
        for end in ("", "_reverse"):
            weight = model.rnn.get_parameter(f"weight_ih_l1{end}")
            weight.copy_(torch.randn(96, 6) @ torch.ones(6, 48).copy_(torch.randn(6, 48, generator=_same())) / 6)
    result = taut.compress(model, x, budget={"macs": 0.72}, data=[x], methods=["svd"], compare=False)
    (step,) = [step for step in result.plan.steps if step.layers == ("rnn.inputs.1",)]
    assert step.settings["rank"] <= 8
    front, kernel = result.model.rnn.inputs[1]
    assert kernel.weight.shape == (2 * 96, step.settings["rank"])
    assert front.bias is None
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-3)


def _same():
    return torch.Generator().manual_seed(5)


def test_a_layer_that_nothing_is_done_to_stays_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), Encoder(units=6, layers=1)).eval()
    model[0] = nn.Linear(40, 10)
    x = torch.randn(16, 5, 40)
    wide = nn.Sequential(nn.Linear(40, 400), nn.ReLU(), nn.Linear(400, 40), *model).eval()
    result = taut.compress(wide, x, budget={"macs": 0.6}, data=[x], methods=["svd"], compare=False, keep=None)
    assert {step.method for step in result.plan.steps} == {"svd"}
    assert type(result.model[4].rnn) is nn.LSTM
    assert "4.rnn" in {kept.layer for kept in result.plan.kept}


def test_what_would_lose_the_kernel_is_undone():
    model, x = seeded("gru tagger")
    opened, net, _ = in_plain_form(model, taut.trace(model, x))
    plan = Plan.of(net, [Step(("rnn.inputs.0",), "int8", {}, allow_growth=True)])
    with pytest.warns(UserWarning, match="without torch's kernel"):
        small = taut.apply(opened, plan, taut.observe(net, opened))
    assert small.rnn.fused()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "rnn", nn.LSTM(12, 24, batch_first=True, proj_size=8)), "proj_size"),
        (lambda m: weight_norm(m.rnn, "weight_hh_l0"), "no step bakes"),
        (lambda m: setattr(m, "rnn", type("Own", (nn.LSTM,), {"forward": nn.LSTM.forward})(12, 24)), "compress gives"),
        (lambda m: setattr(m, "rnn", type("Own", (nn.LSTM,), {"forward": _own})(12, 24)), "overrides forward"),
        (lambda m: setattr(m.rnn, "extra", nn.Parameter(torch.ones(1))), "no parameters, or"),
    ],
    ids=["projected", "weight norm", "faithful", "own forward", "more parameters"],
)
def test_others_are_left_alone_in_words(change, reason):
    model = Tagger()
    model.out = nn.LazyLinear(7)
    change(model)
    x = torch.randint(0, 30, (4, 6))
    model(x)
    assert reason in taut.trace(model.eval(), x)["rnn"].skip


def _own(self, x, hx=None):
    return nn.LSTM.forward(self, x, hx)


def test_states_that_the_caller_passes_on_keep_their_width():
    torch.manual_seed(0)
    model, x = Streaming().eval(), (torch.randn(4, 6, 10), torch.randn(1, 4, 24), torch.randn(1, 4, 24))
    inspected = taut.inspect(model, x)
    reach = {reach.layer.name: reach for reach in inspected.layers}
    assert reach["rnn.inputs.0"].plain_form == "as_recurrent"
    assert "svd" in reach["rnn.inputs.0"].default
    assert reach["rnn.states.0"].pinned == "they reach the model's output"
    assert sum(r.layer.macs for r in inspected.layers) == inspected.network.cost.macs


def test_recurrent_weights_are_solved_again_on_the_states_that_there_are():
    torch.manual_seed(0)
    model, x = Encoder(layers=1).eval(), torch.randn(256, 7, 10)
    with torch.no_grad():  # so that states matter, as in a trained network
        for parameter in model.rnn.parameters():
            parameter.mul_(4)
    opened, net, _ = in_plain_form(model, taut.trace(model, x))
    plan = Plan((taut.whole(net, "channels", sparsity=0.5, hidden=True),))
    stats = taut.observe(net, opened, [x])
    plain, refitted = taut.apply(opened, plan, stats), taut.apply(opened, plan, stats, [x])
    assert not torch.equal(plain.rnn.states[0].weight, refitted.rnn.states[0].weight)
    off = [float((m(x) - model(x)).square().mean()) for m in (plain, refitted)]
    assert off[1] < off[0]


def test_training_goes_on_and_masks_are_held():
    torch.manual_seed(0)
    model, x = Packed(bidirectional=True).eval(), (torch.randn(8, 6, 10), torch.arange(8) % 6 + 1)
    result = taut.compress(model, x, budget={"macs": 0.6}, data=[x], methods=["channels"], compare=False)
    small = result.model.train()
    small(*x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert any(isinstance(m, StateLinear) and m.kept is not None for m in small.modules())


class Reading(nn.Module):
    """Reads something of its recurrent layer."""

    def __init__(self, read):
        super().__init__()
        self.read, self.lstm, self.out = read, nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.lstm(self.read(self.lstm, x))[0])


READS = {
    "device": lambda m, x: x.to(m.weight_ih_l0.device),
    "dtype": lambda m, x: x.to(m.all_weights[0][0].dtype),
    "zeros": lambda m, x: x + m.weight_hh_l0.new_zeros(8),
    "kind, without a difference": lambda m, x: x * 1.0 if isinstance(m, nn.LSTM) else x,
}


@pytest.mark.parametrize("name", READS)
def test_what_code_reads_of_it_is_answered(name):
    torch.manual_seed(0)
    model, x = Reading(READS[name]).eval(), torch.randn(4, 5, 8)
    base, net, steps = in_plain_form(model, taut.trace(model, x))
    assert [step.layers for step in steps] == [("lstm",)]
    assert net["lstm.inputs.0"].skip is None
    assert torch.equal(base(x), model(x))


def test_where_its_kind_matters_it_stays_with_that_reason():
    model, x = Reading(lambda m, x: x if isinstance(m, nn.LSTM) else x * 2).eval(), torch.randn(4, 5, 8)
    assert "other code asks what kind of layer 'lstm' is" in taut.trace(model, x)["lstm"].skip
