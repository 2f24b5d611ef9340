"""`trace`: what it finds on nets whose answer is known by hand, and taps by brute force."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from cases import case, sequential, untouched
from taut.errors import CallError, DataError, ModelError
from taut.structure.support import MULTIPLIED, TABLE
from taut.structure.tracing import check_finite, describe_layer


def traced(name):
    model, example = case(name).make()
    return model, taut.trace(model, example)


def test_shapes_calls_and_costs_by_hand():
    model = sequential(
        conv=nn.Conv2d(3, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2), bias=False),
        norm=nn.BatchNorm2d(8),
        flat=nn.Flatten(),
        fc=nn.Linear(8 * 4 * 2, 5),
    )
    net = taut.trace(model, torch.randn(6, 3, 8, 8))
    assert [layer.name for layer in net.layers] == ["conv", "norm", "fc"]
    conv = net["conv"]
    assert (conv.kind, conv.weight, conv.bias) == ("Conv2d", (8, 3, 3, 3), False)
    assert (conv.stride, conv.padding, conv.dilation) == ((2, 2), ((1, 1), (0, 0)), (1, 2))
    assert [(call.input, call.output) for call in conv.calls] == [((6, 3, 8, 8), (6, 8, 4, 2))]
    assert (conv.kernel, conv.positions, conv.batch) == ((3, 3), 6 * 4 * 2, 6)
    assert (conv.macs, conv.params) == (8 * 27 * 4 * 2, 8 * 27)
    assert conv.cost == taut.types.Cost(216, 216, 1728, 864)
    assert (net["fc"].macs, net["fc"].params) == (64 * 5, 64 * 5 + 5)
    assert net["norm"].skip == "normalization has nothing to factorize"
    assert net.cost.params == 216 + 16 + 325
    assert net.cost.macs == 1728 + 320


def test_same_padding_is_written_out_left_and_right():
    net = taut.trace(sequential(conv=nn.Conv2d(2, 2, (4, 3), padding="same", dilation=(1, 2))), torch.randn(1, 2, 9, 9))
    assert net["conv"].padding == ((1, 2), (2, 2))


def test_calls_ties_and_uncalled_layers():
    _, net = traced("shared")
    assert len(net["twice"].calls) == 2
    assert net["twice"].skip is None
    assert net["twice"].macs == 2 * 16 * 16
    assert len(net["conv"].calls) == 2
    assert "alias" not in {layer.name for layer in net.layers}
    assert net["unused"].skip.startswith("it is never called")
    _, net = traced("tied")
    assert net["out"].skip == "its weight is shared with 'embed'"
    assert net["embed"].skip is not None
    assert net["mid"].skip is None
    assert net["out"].params == 0
    assert net["embed"].params == 20 * 16


def test_reading_an_attribute_is_a_reason_and_calling_is_not():
    _, net = traced("reads_weight")
    assert "reads its attribute 'weight'" in net["called"].skip
    assert net["uncalled"].skip == MULTIPLIED
    assert net["plain"].skip is None


def test_setting_an_attribute_or_isinstance_does_not_break_the_trace():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            assert isinstance(self.fc, nn.Linear)
            return self.fc(x)

    model, example = Checks(), torch.randn(2, 4)
    with untouched(model):
        net = taut.trace(model, example)
    assert len(net["fc"].calls) == 1


@pytest.mark.parametrize(("name", "called"), [("keywords", "image"), ("one_dict", "fc"), ("two_inputs", "right")])
def test_dict_keyword_and_tuple_inputs(name, called):
    _, net = traced(name)
    assert len(net[called].calls) == 1
    assert net[called].calls[0].input[0] == net.example.batch == 2
    assert net[called].skip is None


def test_attention_projections_are_kept():
    _, net = traced("attention")
    assert "out_proj" in {layer.name.rpartition(".")[2] for layer in net.layers}
    assert net["attend.out_proj"].skip is not None
    assert net["embed"].skip is net["head"].skip is None


def test_a_transposed_convolution_is_skipped():
    _, net = traced("transposed")
    assert net["up"].skip == "transposed convolutions are not factorized"
    assert net["up"].live == ()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_as_it_was(mode):
    model, example = case("everything").make()
    getattr(model, mode)()
    with untouched(model), torch.inference_mode():
        net = taut.trace(model, example)
    assert len(net.layers) > 10
    assert str(net).count("\n") > len(net.layers)


def test_two_traces_are_equal():
    model, example = case("vgg").make()
    assert taut.trace(model, example) == taut.trace(model, example)


def test_a_bare_layer_must_be_wrapped():
    net = taut.trace(nn.Linear(4, 3), torch.randn(2, 4))
    assert "Sequential" in net.layers[0].skip


def test_what_is_refused():
    with pytest.raises(CallError, match=r"must be a torch\.nn\.Module\. Got function"):
        taut.trace(lambda x: x, torch.randn(2, 4))
    with pytest.raises(ModelError, match=r"cannot be run on an input of structure float32\[2, 5\].*RuntimeError"):
        taut.trace(sequential(fc=nn.Linear(4, 3)), torch.randn(2, 5))
    with pytest.raises(DataError, match="batch dimension"):
        taut.trace(sequential(fc=nn.Linear(4, 3)), torch.randn(0, 4))
    with pytest.raises(ModelError, match="not initialized yet"):
        taut.trace(sequential(fc=nn.LazyLinear(3)), torch.randn(2, 4))
    with pytest.raises(CallError, match=r"no layer 'gone'\. Layers: fc"):
        taut.trace(sequential(fc=nn.Linear(4, 3)), torch.randn(2, 4))["gone"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value):
    model = sequential(a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    model.b.weight.data[0, :2] = value
    with pytest.raises(ModelError, match=r"'b\.weight' holds 2 NaN or Inf of 6 values"):
        check_finite(model)
    model.b.weight.data.zero_()
    assert check_finite(model) is None


def test_describe_layer_of_other_modules():
    layer = describe_layer("n", nn.BatchNorm1d(3), (), 4)
    assert (layer.kind, layer.weight, layer.bias, layer.batch, layer.stride) == ("BatchNorm1d", (3,), True, 4, ())
    assert describe_layer("h", nn.Linear(3, 2).half(), (), 1).itemsize == 2
    assert describe_layer("e", nn.BatchNorm1d(3, affine=False), (), 1).weight == ()


# Dead taps: a tap is alive iff the output moves when its weights change.


class Padded(nn.Module):
    """A model that pads before its convolution, by itself."""

    def __init__(self, conv, pads):
        super().__init__()
        self.conv, self.pads = conv, pads

    def forward(self, x):
        return self.conv(F.pad(x, self.pads))


def spans(model, x):
    """Range of the taps whose weights move the output, by changing one tap after the other."""
    conv, found = model.conv, []
    with torch.no_grad():
        before = model(x)
        for axis in range(conv.weight.ndim - 2):
            alive = []
            for k in range(conv.weight.shape[2 + axis]):
                kept = conv.weight.clone()
                conv.weight.select(2 + axis, k).add_(1.0)
                if not torch.equal(model(x), before):
                    alive.append(k)
                conv.weight.copy_(kept)
            found.append((alive[0], alive[-1] + 1) if alive else (0, conv.weight.shape[2 + axis]))
    return tuple(found)


TAPS = {
    "crepe": (nn.Conv1d(2, 3, 64, padding=32), (4,), (0, 0)),
    "all alive": (nn.Conv1d(2, 3, 3, padding=1), (4,), (0, 0)),
    "left only": (nn.Conv1d(2, 3, 9, padding=4, stride=5), (3,), (0, 0)),
    "dilated": (nn.Conv1d(2, 3, 5, padding=8, dilation=4), (3,), (0, 0)),
    "two axes": (nn.Conv2d(2, 3, (5, 3), padding=(2, 1)), (1, 6), (0, 0, 0, 0)),
    "stride": (nn.Conv2d(2, 3, 7, padding=3, stride=3), (2, 2), (0, 0, 0, 0)),
    "same even": (nn.Conv1d(2, 3, 12, padding="same"), (3,), (0, 0)),
    "own padding": (nn.Conv1d(2, 3, 64), (4,), (31, 32)),
    "both": (nn.Conv2d(2, 3, 7, padding=2), (2, 3), (1, 1, 2, 1)),
    "reflect": (nn.Conv1d(2, 3, 5, padding=2, padding_mode="reflect"), (3,), (0, 0)),
    "three axes": (nn.Conv3d(2, 3, 3, padding=1), (1, 2, 1), (0,) * 6),
}


@pytest.mark.parametrize("name", TAPS)
def test_live_taps_by_brute_force(name):
    conv, size, pads = TAPS[name]
    model, x = Padded(conv, pads), torch.randn(2, 2, *size)
    layer = taut.trace(model, x)["conv"]
    assert layer.live == spans(model, x)
    assert len(layer.live) == len(layer.kernel)


def test_dead_taps_in_the_middle_stay_inside_the_range():
    """Dilation by hand: only the range is cut."""
    model = Padded(nn.Conv1d(1, 1, 3, stride=100, padding=2, dilation=4), (0, 0))
    live = taut.trace(model, torch.randn(1, 1, 9))["conv"].live
    assert live == spans(model, torch.randn(1, 1, 9))


def test_zeros_of_the_example_alone_do_not_count_as_padding():
    x = torch.randn(2, 2, 6)
    x[..., :3] = 0
    assert taut.trace(sequential(conv=nn.Conv1d(2, 3, 6)), x)["conv"].live == ((0, 6),)


def test_several_calls_of_different_size_keep_every_tap_that_one_needs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 7, padding=3)

        def forward(self, x):
            return self.conv(x).mean() + self.conv(x[..., :1]).mean()

    model = Twice()
    assert taut.trace(model, torch.randn(2, 2, 3))["conv"].live == ((1, 6),)


def test_positions_of_unbatched_and_multidimensional_linear():
    net = taut.trace(sequential(fc=nn.Linear(5, 4)), torch.randn(3, 7, 5))
    assert net["fc"].positions == 21
    assert net["fc"].macs == 7 * 20
    assert math.prod(net["fc"].calls[0].output) == 84


def test_a_layer_called_with_keywords_is_left_alone():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.out(self.fc(input=x))

    model, x = Keywords(), torch.randn(20, 8)
    net = taut.trace(model, x[:2])
    assert net["fc"].skip == "it is called with keyword arguments"
    assert net["out"].skip is None
    taut.observe(net, model, x)


def test_of_two_layers_with_one_bias_the_bias_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[1].bias = model[0].bias
    net = taut.trace(model, torch.randn(2, 4))
    assert [layer.skip for layer in net.layers] == ["its bias is shared with '1'", "its bias is shared with '0'", None]


def test_a_table_that_is_asked_for_one_word_is_a_table():
    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(x + self.table(torch.tensor(0)))

    model, x = Start().eval(), torch.randn(4, 8)
    net = taut.trace(model, x)
    assert net["table"].skip == TABLE
    plan = taut.Plan.of(net, [taut.Step(("table",), "table", {"rank": 2})])
    small = taut.apply(model, plan, taut.observe(net, model, [x]), [x])
    assert small(x).shape == (4, 3)
    assert type(small.table) is not nn.Embedding
