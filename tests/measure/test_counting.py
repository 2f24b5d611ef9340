"""Counts against hand-written formulas and torch's own counter."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from cases import NETS, Case
from taut.core.example import Example
from taut.errors import ModelError
from taut.measure import count, count_macs, file_bytes, stored_tensors


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


def weights_of(module):
    """Every weight matrix of a recurrent layer is used once a step."""
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_modules_cost_their_weights_at_every_step(kind, batch_first):
    module = kind(8, 16, 2, bidirectional=True, batch_first=batch_first)
    example = Example(module, torch.randn(5, 3, 8))
    result = count_macs(module, example)
    assert result.total == result.own[""] == round(weights_of(module) * 15 / example.batch)


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


def test_packed_sequences_cost_only_their_real_steps():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.lstm(input=pack_padded_sequence(x, [5, 4, 2], batch_first=True))[0].data

    assert counted(Packed(), torch.randn(3, 5, 8)).total == round(11 * 4 * 16 * 24 / 3)


def test_attention_is_counted_in_full_and_the_switch_is_put_back():
    length, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    projections, mixing, mlp = 4 * length * width**2, 2 * length**2 * width, 2 * length * width * 16
    fast = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    result = counted(layer, torch.randn(3, length, width))
    assert result.total == projections + mixing + mlp
    assert result.by_module["self_attn"] == result.own["self_attn"] == projections + mixing
    assert (result.own[""], result.by_module[""]) == (0, result.total)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == fast


def test_attention_is_plain_products_while_it_is_counted():
    class Asks(nn.Module):
        def forward(self, x):
            answers.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()))
            return x

    answers = []
    counted(Asks(), torch.randn(2, 3))
    assert answers == [(False, False)]


LAYERS = {
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(3, 5, 8)]),
    "encoder, norm first": (nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), [(5, 3, 8)]),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), [(3, 5, 8), (3, 7, 8)]),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), [(3, 5, 8), (3, 7, 8), (3, 7, 8)]),
    "attention with biases": (nn.MultiheadAttention(8, 2, add_bias_kv=True), [(5, 3, 8)] * 3),
    "attention of other widths": (nn.MultiheadAttention(8, 2, kdim=6, vdim=4), [(5, 3, 8), (7, 3, 6), (7, 3, 4)]),
}
BY_HAND = {
    "encoder": 3 * (4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 16),
    "encoder, norm first": 3 * (4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 16),
    "decoder": 3 * (4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 64 + 2 * 7 * 64 + 2 * 35 * 8 + 2 * 5 * 8 * 16),
    "attention": 3 * (2 * 5 * 64 + 2 * 7 * 64 + 2 * 35 * 8),
    "attention with biases": 3 * (4 * 5 * 64 + 2 * 5 * 6 * 8),
    "attention of other widths": 3 * (2 * 5 * 64 + 7 * 8 * (6 + 4) + 2 * 35 * 8),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_by_hand_whatever_the_flags(name, training):
    layer, shapes = LAYERS[name]
    layer.train(training)
    example = Example(layer, tuple(torch.randn(shape) for shape in shapes))
    result = count_macs(layer, example)
    assert result.total == round(BY_HAND[name] / example.batch)
    assert result.notes == ()
    assert layer.training == training


@pytest.mark.parametrize("mask", ["mask", "src_key_padding_mask"])
def test_masked_attention_is_counted_in_full(mask):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    masks = {"mask": torch.ones(5, 5).triu(1).bool(), "src_key_padding_mask": torch.arange(15).view(3, 5) % 5 > 3}
    result = counted(encoder, {"src": torch.randn(3, 5, 8), mask: masks[mask]})
    assert result.total == 2 * BY_HAND["encoder"] // 3


class Experts(nn.Module):
    """A sparse mixture whose experts are the slices of two parameters."""

    def __init__(self, experts=4, width=16, hidden=32, best=2):
        super().__init__()
        self.gate, self.best = nn.Linear(width, experts, bias=False), best
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        scores, chosen = self.gate(tokens).softmax(-1).topk(self.best)
        order = chosen.flatten().argsort()
        ends = torch.bincount(chosen.flatten(), minlength=len(self.up)).cumsum(0).int()
        rows = tokens.repeat_interleave(self.best, 0)[order]
        gates, values = torch._grouped_mm(rows, self.up.mT, offs=ends).chunk(2, -1)
        mixed = torch._grouped_mm(gates.sigmoid() * values, self.down.mT, offs=ends) * scores.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // self.best, mixed).view_as(x)


def test_a_mixture_of_experts_costs_the_experts_that_each_token_takes():
    model = nn.Sequential(Experts(), nn.Linear(16, 5))
    result = counted(model, torch.randn(2, 6, 16))
    own = 6 * 2 * (64 * 16 + 32 * 16)
    assert result.own == {"": 0, "0": own, "0.gate": 6 * 64, "1": 6 * 80}
    assert result.by_module["0"] == own + 6 * 64
    assert result.notes == ()


def test_a_model_with_a_token_does_not_show_its_layers_work_as_its_own():
    class Tokened(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1))

    result = counted(Tokened(), torch.randn(3, 5, 8))
    assert result.own == {"": 0, "layer": 6 * 32}
    assert result.total == result.by_module[""] == 6 * 32


@torch.library.custom_op("taut_tests::bend", mutates_args=())
def bend(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An operation that nobody has a formula for."""
    return x @ weight


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return bend(bend(x, self.weight.t()), torch.matrix_exp(self.weight))


def test_an_unknown_operation_is_named_with_its_module_and_its_parameter():
    names = "taut_tests.bend reads parameter '0.weight'", "aten.linalg_matrix_exp reads parameter '0.weight'"
    result = counted(nn.Sequential(Bent()), torch.randn(3, 4))
    assert result.notes == tuple(f"0: {name}, its multiply-accumulates are not counted" for name in names)
    only = counted(Bent(), torch.randn(3, 4))
    assert (
        only.notes[0] == "(model): taut_tests.bend reads parameter 'weight', its multiply-accumulates are not counted"
    )


class Vision(nn.Module):
    """A vision transformer: a class token, resampled positions, a layer scale, a tied output."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.token, self.scale = nn.Parameter(torch.ones(1, 1, 16)), nn.Parameter(torch.ones(16))
        self.positions = nn.Parameter(torch.randn(1, 16, 2, 2))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.words = nn.Embedding(7, 16, padding_idx=0)

    def forward(self, x):
        patches = self.patch(x) + nn.functional.interpolate(self.positions, scale_factor=2, mode="bicubic")
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches.flatten(2).mT], 1)
        first = self.norm(self.layer(tokens) * self.scale)[:, 0] + self.words(torch.arange(1, 2))
        return nn.functional.linear(first, self.words.weight)


@pytest.mark.parametrize("net", [*NETS, Case("vision", Vision, lambda: torch.randn(2, 3, 16, 16))], ids=str)
def test_ordinary_nets_leave_no_notes(net):
    model, example = net.make()
    notes = counted(model, example).notes
    assert all("recurrent cells" in note for note in notes)
    assert len(notes) == sum(isinstance(module, nn.LSTM) for module in model.modules())


def test_unknown_operations_in_many_modules_are_one_sentence_more():
    notes = counted(nn.Sequential(*(Bent() for _ in range(6))), torch.randn(3, 4)).notes
    assert [note.split()[0] for note in notes[:3]] == ["0:", "1:", "2:"]
    assert notes[3] == "taut_tests.bend is not counted in 3 more modules"
    assert len(notes) == 2 * 4


def test_an_unknown_operation_without_parameters_is_named_too():
    class Solves(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    (note,) = counted(Solves(), torch.eye(4)[None]).notes
    assert note == "(model): aten.linalg_inv_ex is not known to taut, its multiply-accumulates are not counted"


def test_a_formula_that_is_registered_with_torch_is_used():
    @torch.library.custom_op("taut_tests::counted", mutates_args=())
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @register_flop_formula(torch.ops.taut_tests.counted)
    def flops(x, weight, **_):
        return 2 * x[0] * weight[0] * weight[1]

    class Counted(Bent):
        def forward(self, x):
            return product(x, self.weight)

    result = counted(Counted(), torch.randn(3, 4))
    assert (result.total, result.notes) == (16, ())


def test_compiled_parts_are_counted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    double = torch.compile(lambda x: x @ x.new_ones(2, 3), fullgraph=True, backend="eager")

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return double(self.model(x))

    assert counted(Compiled(), torch.randn(3, 4)).total == 16 + 8 + 6


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
    assert result.own == {"": 0, "first": 128, "block": 0, "block.1": 32}


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
