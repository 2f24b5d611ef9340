"""Recurrent layers with a layer for every weight compute what torch's do, fused and step by step."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from taut.nn import Recurrent

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **given: nn.RNN(*sizes, nonlinearity="relu", **given),
}


def made(kind, layers=1, **given):
    return KINDS[kind](5, 4, layers, **given).eval()


def watched(module):
    """A copy that takes its steps one by one."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: None)
    return copied


def states(module, samples):
    shape = (module.num_layers * (1 + module.bidirectional), samples, module.hidden_size)
    return (torch.randn(shape), torch.randn(shape)) if module.mode == "LSTM" else torch.randn(shape)


def close(a, b):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    elif a is not None:
        for first, second in zip(a, b, strict=True):
            close(first, second)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 3),
    flags=st.fixed_dictionaries({key: st.booleans() for key in ("bidirectional", "batch_first", "bias")}),
    lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    begun=st.booleans(),
)
def test_every_form_computes_what_torch_does(kind, layers, flags, lengths, begun):
    torch.manual_seed(0)
    module = made(kind, layers, **flags)
    mine = Recurrent.of(module)
    x = torch.randn((3, 4, 5) if module.batch_first else (4, 3, 5))
    packed = pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, enforce_sorted=False)
    hx = states(module, 3) if begun else None
    for way in (mine, watched(mine)):
        assert way.fused() is (way is mine)
        close(module(x, hx), way(x, hx))
        close(module(packed, hx), way(packed, hx))
        alone = x[0] if module.batch_first else x[:, 0]
        close(module(alone), way(input=alone))


def test_it_goes_back_to_torchs_layer():
    module = made("GRU", 2, bidirectional=True)
    module.weight_hh_l0.requires_grad_(False)
    back = Recurrent.of(module).restored()
    assert type(back) is nn.GRU
    assert back.batch_first is False
    assert all(torch.equal(p, back.get_parameter(name)) for name, p in module.named_parameters())
    assert not back.weight_hh_l0.requires_grad


def test_what_is_no_plain_layer_has_no_way_back():
    mine = Recurrent.of(made("LSTM"))
    mine.inputs[0] = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 16))
    with pytest.raises(ValueError, match="no plain one"):
        mine.restored()


def test_a_factor_stands_in_front_of_the_kernel():
    torch.manual_seed(0)
    module = made("LSTM", 2, bidirectional=True)
    mine = Recurrent.of(module)
    for number, part in enumerate(mine.inputs):
        whole = nn.Linear(part.in_features, part.in_features, bias=False)
        nn.init.eye_(whole.weight)
        mine.inputs[number] = nn.Sequential(whole, part)
    x = torch.randn(3, 4, 5)
    assert mine.fused()
    close(module(x), mine(x))
    close(module(x), watched(mine)(x))
    assert mine.input_size == 5


def test_any_other_layer_is_called_step_by_step():
    torch.manual_seed(0)
    module = made("GRU")
    mine = Recurrent.of(module)
    mine.states[0] = nn.Sequential(mine.states[0], nn.Identity())
    x = torch.randn(3, 4, 5)
    assert not mine.fused()
    close(module(x), mine(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(kind):
    torch.manual_seed(0)
    module = made(kind, 2).train()
    mine, x = Recurrent.of(module), torch.randn(3, 4, 5)
    module(x)[0].square().sum().backward()
    for way in (mine, watched(mine)):
        way.zero_grad()
        way(x)[0].square().sum().backward()
        close(module.weight_ih_l1.grad, way.inputs[1].weight.grad)
        close(module.weight_hh_l0.grad, way.states[0].weight.grad)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_a_hook_adds_acts_on_later_steps_and_it_is_called_once(bidirectional):
    torch.manual_seed(0)
    module = made("GRU", bidirectional=bidirectional, batch_first=True)
    hooked, every, calls = Recurrent.of(module), Recurrent.of(module), []

    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, h):
            return self.inner(h) + 0.5

    for number, part in enumerate(hooked.states):
        part.register_forward_hook(lambda _, args, y: (calls.append(args[0].shape), y + 0.5)[1])
        every.states[number] = Shifted(every.states[number])
    x = torch.randn(3, 4, 5)
    close(every(x), hooked(x))
    assert calls == [(3, 4, 4)] * (1 + bidirectional)


def test_dropout_between_layers_acts_in_training_alone():
    torch.manual_seed(0)
    module = nn.LSTM(5, 64, 2, dropout=0.5)
    mine, x = Recurrent.of(module), torch.randn(4, 3, 5)
    mine.inputs[1] = nn.Sequential(nn.Identity(), mine.inputs[1])
    torch.manual_seed(1)
    wanted = module(x)[0]
    torch.manual_seed(1)
    assert torch.allclose(wanted, mine(x)[0], atol=1e-6)
    assert not torch.allclose(mine(x)[0], mine(x)[0])
    assert torch.equal(mine.eval()(x)[0], mine(x)[0])


def test_units_that_are_left_find_their_initial_states():
    torch.manual_seed(0)
    module = made("LSTM", 2)
    narrow = Recurrent.empty("LSTM", (5, 3, 2))
    for part in narrow.states:
        part.kept = torch.tensor([0, 2, 3])
    x, hx = torch.randn(4, 3, 5), states(module, 3)
    wanted = narrow(x, tuple(t[..., [0, 2, 3]] for t in hx))
    close(wanted, narrow(x, hx))
    close(wanted, watched(narrow)(x, hx))


def test_one_bias_of_two_is_enough():
    torch.manual_seed(0)
    mine = Recurrent.of(made("GRU"))
    x = torch.randn(4, 3, 5)
    mine.states[0].bias = None
    close(watched(mine)(x), mine(x))


def test_it_is_copied_pickled_compiled_and_says_what_it_is():
    mine = Recurrent.of(made("LSTM", 2, batch_first=True, bidirectional=True))
    x = torch.randn(3, 4, 5)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):  # noqa: S301 - our own
        assert torch.equal(mine(x)[0], other(x)[0])
    assert torch.equal(mine(x)[0], torch.compile(mine, backend="eager", fullgraph=True)(x)[0])
    assert "LSTM, 5, 4, num_layers=2, batch_first=True, bidirectional=True" in repr(mine)
    assert (mine.hidden_size, mine.num_layers, mine.proj_size, mine.bias) == (4, 2, 0, True)
    mine.flatten_parameters()
    assert isinstance(mine(pack_padded_sequence(x, torch.tensor([4, 2, 1]), True))[0], PackedSequence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{}, {"bidirectional": True, "layers": 2}, {"bias": False}])
def test_weights_are_answered_by_torch_s_names(kind, given):
    module = made(kind, **given)
    layer = Recurrent.of(module)
    for name, weight in module.named_parameters():
        asked = getattr(layer, name)
        assert (asked.shape, asked.dtype, asked.device) == (weight.shape, weight.dtype, weight.device)
        assert torch.equal(asked + 0, weight)
    assert [[t.shape for t in part] for part in layer.all_weights] == [
        [t.shape for t in part] for part in module.all_weights
    ]
    for name in ("weight_ih_l2", "weight_oh_l0", "bias_ih_l0_forward", "bias_hr_l0"):
        assert not hasattr(layer, name)
    assert hasattr(layer, "bias_ih_l0") == module.bias


def test_weights_of_factors_are_their_product():
    layer = Recurrent.of(made("LSTM", bidirectional=True))
    chain = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 32))
    layer.inputs[0] = chain
    assert layer.weight_ih_l0_reverse.shape == (16, 5)
    close(layer.weight_ih_l0_reverse + 0, (chain[1].weight @ chain[0].weight)[16:])
    close(layer.bias_ih_l0 * 1, chain[1].bias[:16])
    assert copy.deepcopy(layer).weight_hh_l0.shape == (16, 4)


def forget_gate(layer):
    layer.bias_hh_l0.data.fill_(1)


def halved(layer):
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
        layer.weight_ih_l0.data[0] = 3


def stepped(layer):
    layer(torch.ones(4, 3, 5))[0].sum().backward()
    torch.optim.SGD([layer.weight_hh_l0, layer.bias_hh_l0], 0.1).step()


def frozen(layer):
    layer.weight_hh_l0.requires_grad = False
    assert not layer.weight_hh_l0.requires_grad


def replaced(layer):
    layer.weight_hh_l0 = nn.Parameter(torch.ones(16, 4))
    layer.bias_hh_l0 = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("write", [forget_gate, halved, stepped, frozen, replaced])
def test_weights_are_written_by_torch_s_names(write, bidirectional):
    torch.manual_seed(0)
    module = made("LSTM", bidirectional=bidirectional)
    layer, x = Recurrent.of(module), torch.randn(4, 3, 5)
    before = layer(x)[0]
    for one in (module, layer):
        write(one)
    close(module(x), layer(x))
    assert write is frozen or not torch.allclose(before, layer(x)[0])


@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_ih_l0", "weight_hh_l0"])
def test_weights_that_are_others_product_or_part_cannot_be_set(name):
    layer = Recurrent.of(made("LSTM", bidirectional="weight_hh" not in name))
    layer.states[0] = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 16))
    before = dict(layer.state_dict())
    with pytest.raises(AttributeError, match="Set the weights inside"):
        setattr(layer, name, nn.Parameter(torch.ones(tuple(getattr(layer, name).shape))))
    assert layer.state_dict().keys() == before.keys()
    with pytest.raises(AttributeError, match="taut computes"):
        layer.weight_hh_l0.data.clamp_(0)


@pytest.mark.parametrize("given", [{}, {"bidirectional": True, "layers": 2}, {"bias": False}])
def test_flat_weights_and_a_fresh_start_are_torch_s(given):
    torch.manual_seed(0)
    module = made("GRU", **given)
    layer = Recurrent.of(module)
    assert layer._flat_weights_names == module._flat_weights_names
    for mine, theirs in zip(layer._flat_weights, module._flat_weights, strict=True):
        assert torch.equal(mine * 1, theirs)
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    for p, old in zip(layer.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert p.abs().max() <= 0.5
    layer.states[0] = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 12))
    with pytest.raises(RuntimeError, match="in factors"):
        layer.reset_parameters()
