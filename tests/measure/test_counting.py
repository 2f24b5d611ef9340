"""Counts against hand-written formulas and torch's own counter."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from taut.calls import Example
from taut.errors import ModelError
from taut.measure import count, count_macs, file_bytes, stored_tensors
from taut.measure.counting import recurrent_macs


def counted(model, value):
    return count_macs(model, Example(model, value))


def by_torch(model, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() / 2


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 5),
    )


def test_convolutions_by_hand_and_by_torch():
    x = torch.randn(6, 3, 8, 8)
    result = counted(convnet(), x)
    hand = {"0": 8 * 3 * 9 * 4 * 4, "3": 8 * 2 * 9 * 2 * 2, "5": 32 * 5}
    assert {name: macs for name, macs in result.by_module.items() if macs} == {**hand, "": sum(hand.values())}
    assert result.total == sum(hand.values()) == by_torch(convnet(), x) / 6
    assert result.notes == ()


def lstm_macs(*, layers, directions, proj, gates=4, features=8, hidden=16):
    """Straight from the shapes of the weights: every weight matrix is used once a step."""
    kind = {4: nn.LSTM, 3: nn.GRU, 1: nn.RNN}[gates]
    settings = {"proj_size": proj} if proj else {}
    module = kind(features, hidden, layers, bidirectional=directions == 2, **settings)
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_modules_cost_their_weights_at_every_step(kind, layers, directions, batch_first):
    module = kind(8, 16, layers, bidirectional=directions == 2, batch_first=batch_first)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    weights = lstm_macs(layers=layers, directions=directions, proj=0, gates=gates)
    x = torch.randn(5, 3, 8)
    assert counted(module, x).total == round(weights * 15 / 5)
    assert recurrent_macs(module, x) == weights * 15


@pytest.mark.parametrize("double", [False, True])
def test_lstm_is_counted_once_whatever_path_torch_takes(double):
    lstm = nn.LSTM(8, 16, batch_first=True)
    model = nn.Sequential()
    model.add_module("memory", lstm)
    x = torch.randn(2, 5, 8)
    if double:  # this path goes through matrix products, which torch's counter sees
        model, x = model.double(), x.double()
    macs = 5 * 4 * 16 * (8 + 16)
    result = counted(model, x)
    assert result.total == result.by_module["memory"] == result.by_module[""] == macs
    seen = by_torch(model, x)
    assert bool(result.notes) == (seen < 2 * macs)
    if result.notes:
        sentence = "memory: 7.68k MACs counted by taut (torch's counter does not see recurrent cells)"
        assert result.notes == (sentence,)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projection_and_unbatched():
    module = nn.LSTM(8, 16, 2, proj_size=4, bidirectional=True)
    assert recurrent_macs(module, torch.randn(7, 8)) == 7 * lstm_macs(layers=2, directions=2, proj=4)
    x = torch.randn(5, 3, 8)
    assert recurrent_macs(module, x) == by_torch(module, x)


def test_packed_sequences_cost_only_their_real_steps():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.lstm(input=pack_padded_sequence(x, [5, 4, 2], batch_first=True))[0].data

    assert counted(Packed(), torch.randn(3, 5, 8)).total == round(11 * 4 * 16 * 24 / 3)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    module, x = cell(8, 16), torch.randn(3, 8)
    assert counted(module, x).total == recurrent_macs(module, x) / 3 == module.weight_ih.shape[0] * (8 + 16)


def test_attention_is_counted_in_full_and_the_switch_is_put_back():
    length, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    projections, mixing, mlp = 4 * length * width**2, 2 * length**2 * width, 2 * length * width * 16
    fast = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    result = counted(layer, torch.randn(3, length, width))
    assert result.total == projections + mixing + mlp
    assert result.by_module["self_attn"] == projections + mixing
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == fast


def test_shared_and_nested_modules_are_under_their_first_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.block = nn.Sequential(self.first, nn.Linear(8, 4))

        def forward(self, x):
            return self.block(self.first(x))

    result = counted(Shared(), torch.randn(3, 8))
    assert result.by_module == {"": 160, "first": 128, "block": 96, "block.1": 32}


def test_the_model_is_left_as_it_was():
    model = convnet().train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    kept, state = x.clone(), torch.random.get_rng_state()
    with torch.inference_mode():
        counted(model, x)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_changes_its_input_does_not_reach_the_example():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), torch.full((2, 3), -1.0)
    assert counted(model, x).total == 6
    assert bool((x == -1).all())
    with torch.inference_mode():
        x = torch.full((2, 3), -1.0)
        assert counted(model, x).total == 6


def test_a_failing_model_is_a_model_error_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 4))
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ModelError, match=r"float32\[2, 5\]"):
        counted(model, torch.randn(2, 5))
    assert not model[0]._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_lazy_modules_are_refused_and_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ModelError, match=r"0\.weight.*not initialized"):
        counted(model, torch.randn(2, 5))
    assert isinstance(model[0], nn.LazyLinear)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_modules_are_counted_as_a_whole():
    model = nn.Sequential(nn.Linear(3, 4))
    model.add_module("script", torch.jit.script(nn.Linear(4, 5)))
    assert counted(model, torch.randn(2, 3)).total == 3 * 4 + 4 * 5


def test_cost_counts_tied_parameters_once_and_zeros_exactly():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.zero_()[0, :4] = torch.tensor([1.0, float("nan"), -0.0, 1e-38])
        model[0].bias.fill_(2.0)
        model[1].bias.zero_()
    cost = count(model, Example(model, torch.randn(3, 6)))
    assert (cost.params, cost.nonzero, cost.macs) == (36 + 12, 3 + 6, 72)
    assert cost.bytes == file_bytes(stored_tensors(model)[0])


def test_float8_parameters_are_counted():
    model = nn.Module()
    values = torch.tensor([0.0, 1.0, 2.0]).to(torch.float8_e4m3fn)
    model.weight = nn.Parameter(values, requires_grad=False)
    model.forward = lambda x: x
    assert count(model, Example(model, torch.randn(1, 2))).nonzero == 2
