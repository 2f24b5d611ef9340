"""Dead units found and counted out: exactly those, to a fixed point, and the network around them computes the same."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from cases import sequential, settle, untouched
from taut import Plan
from taut.core.example import Example
from taut.structure import compacting
from taut.structure.compacting import compact
from taut.structure.narrowing import narrowed

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)


def zero(layer, rows=(), columns=()):
    """The layer with zeros in these rows and columns of its weight."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        layer.weight[:, list(columns)] = 0
    return layer


def cut(model, x, names=None):
    """Widths by name of what is cut; the model is cut in place, and computes the same, also on other inputs."""
    model = model.double().eval()
    x = x.double()
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    with untouched(model), torch.no_grad():
        cuts = compact(model, Example(model, x), names)
    again = torch.randn_like(x)
    wanted = [model(x), model(again)]
    small = narrowed(model, cuts)
    with torch.no_grad():
        for a, b in zip(wanted, (small(x), small(again)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    return {name: cut.widths for name, cut in cuts.items()}


def mlp(*sizes):
    parts = []
    for inputs, outputs in pairwise(sizes):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Neurons.


def test_a_full_network_is_left_alone():
    assert cut(mlp(6, 8, 5), rows(3, 6)) == {}


def test_units_that_nobody_reads_go():
    model = mlp(6, 8, 5)
    zero(model[2], columns=[1, 4])
    assert cut(model, rows(3, 6)) == {"0": (6, 6, 0), "2": (5, 6, 0)}


@pytest.mark.parametrize("sign", [1, -1], ids=["a constant", "zero behind the relu"])
def test_a_unit_that_nothing_feeds_becomes_a_bias(sign):
    model = mlp(6, 8, 5)
    zero(model[0], rows=[2])
    model[0].bias.data[2] = sign * 0.7
    before = model[2].bias.double() + model[2].weight.double()[:, 2] * max(sign * model[0].bias.double()[2], 0)
    model = model.double()
    cuts = compact(model, Example(model, rows(3, 6).double()), ["0", "2"])
    if sign > 0:
        torch.testing.assert_close(cuts["2"].bias, before.detach())
    else:
        assert cuts["2"].bias is None
    assert cut(model, rows(3, 6)) == {"0": (7, 6, 0), "2": (5, 7, 0)}


def test_a_reader_without_bias_keeps_a_constant_and_loses_a_zero():
    model = nn.Sequential(zero(nn.Linear(6, 8), rows=[2, 3]), nn.ReLU(), nn.Linear(8, 5, bias=False))
    model[0].bias.data[2], model[0].bias.data[3] = 0.5, -0.5
    assert cut(model, rows(3, 6)) == {"0": (7, 6, 0), "2": (5, 7, 0)}


def test_death_spreads_both_ways_to_a_fixed_point():
    """Unread at the end kills back to the front; unfed at the front becomes unfed behind."""
    model = mlp(6, 4, 4, 4, 3)
    zero(model[6], columns=[3])
    zero(model[4], columns=[3])
    model[4].weight.data[:3, 3], model[2].weight.data[:3, 3] = 0, 0  # only dead unit 3 reads unit 3
    model[4].weight.data[3, 3], model[2].weight.data[3, 3] = 1, 1
    model[0].weight.data[0], model[0].bias.data[0] = 0, 0.5
    model[2].weight.data[0, 1:], model[4].weight.data[0, 1:] = 0, 0  # units 0 are fed by unit 0 alone
    assert cut(model, rows(3, 6)) == {"0": (2, 6, 0), "2": (2, 2, 0), "4": (2, 2, 0), "6": (3, 2, 0)}


def test_inputs_that_nobody_reads_are_left_out_by_a_pick():
    model = mlp(20, 8, 5)
    zero(model[0], columns=[0, 7])
    found = compact(model.double(), Example(model, rows(3, 20).double()), ["0", "2"])
    assert found["0"].pick.tolist() == [i for i in range(20) if i not in {0, 7}]
    assert cut(model, rows(3, 20)) == {"0": (8, 18, 1)}
    model = mlp(20, 8, 5)
    zero(model[0], columns=[7])
    assert cut(model, rows(3, 20)) == {}  # one of twenty is not worth it


def test_the_output_is_never_cut():
    model = mlp(6, 8, 5)
    zero(model[2], rows=[0, 1])
    model[2].bias.data[:2] = 0
    assert cut(model, rows(3, 6)) == {}


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_layer_of_zeros_leaves_one_unit(place):
    model = mlp(6, 8, 7, 5)
    zero(model[place], rows=range(len(model[place].weight)))
    for layer in model[::2]:
        layer.bias.data += 1  # the unit that stays of a layer of constants is then one that is read
    wanted = {
        0: {"0": (1, 1, 1), "2": (7, 1, 0)},
        2: {"0": (1, 1, 1), "2": (1, 1, 0), "4": (5, 1, 0)},
        4: {"0": (1, 1, 1), "2": (1, 1, 0), "4": (5, 1, 0)},
    }
    assert cut(model, rows(3, 6)) == wanted[place]


def test_a_layer_outside_the_step_keeps_what_it_reads_and_gives():
    model = mlp(6, 8, 8, 5)
    zero(model[2], rows=[0], columns=[1])
    zero(model[4], columns=[2])
    assert cut(model, rows(3, 6), ["0", "4"]) == {"4": (5, 7, 1)}


@given(st.data())
def test_random_sparse_networks_compute_the_same(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=6))
    act = data.draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity]))
    density = data.draw(st.sampled_from([0.05, 0.15, 0.3, 0.6]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    parts = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs, bias=data.draw(st.booleans()))
        layer.weight.data *= torch.rand_like(layer.weight) < density
        parts += [layer, act()]
    model = nn.Sequential(*parts[:-1])
    found = cut(model, rows(4, sizes[0]))
    assert all(size >= 1 for widths in found.values() for size in widths[:2])
    assert cut(model, rows(4, sizes[0])) == {}, "a second time there is nothing left to do"


# Channels.


def constant(layer, row, value):
    """A channel that nothing feeds."""
    zero(layer, rows=[row])
    layer.bias.data[row] = value
    return layer


@pytest.mark.parametrize(
    ("value", "settings", "gone"),
    [
        (0.5, {"padding": 1}, False),
        (-0.5, {"padding": 1}, True),
        (0.0, {"padding": 1}, True),
        (0.5, {}, True),
        (0.5, {"padding": "same"}, False),
        (0.5, {"padding": 1, "padding_mode": "reflect"}, True),
        (0.5, {"padding": "same", "padding_mode": "circular", "dilation": 2}, True),
        (0.5, {"bias": False}, False),
        (-0.5, {"bias": False, "stride": 2}, True),
    ],
)
def test_a_constant_channel_before_a_convolution(value, settings, gone):
    """At the border zeros are padded, not the constant."""
    model = nn.Sequential(constant(nn.Conv2d(3, 4, 3), 1, value), nn.ReLU(), nn.Conv2d(4, 5, 3, **settings))
    assert cut(model, rows(2, 3, 9, 9)) == ({"0": (3, 3, 0), "2": (5, 3, 0)} if gone else {})


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_channels_with_norms_and_slopes_between(axes):
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    model = sequential(one=conv(3, 6, 3, bias=False), norm=norm(6), act=nn.PReLU(6), two=conv(6, 4, 3), end=nn.PReLU())
    x = rows(4, 3, *[7] * axes)
    settle(model, x)
    zero(model.one, rows=[0])
    zero(model.two, columns=[2, 5])
    found = cut(model, x, ["one", "norm", "act", "two"])
    assert found == {"one": (3, 3, 0), "norm": (3, 3, 0), "act": (3, 3, 0), "two": (4, 3, 0)}


def test_norms_outside_the_step_or_without_values_of_their_own_keep_their_channels():
    for norm in (nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.GroupNorm(2, 6), nn.GroupNorm(6, 6)):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), zero(nn.Conv2d(6, 4, 3), columns=[1]))
        assert cut(model, rows(4, 3, 7, 7), ["0", "3"]) == {"3": (4, 5, 1)}


def test_norms_that_hold_nothing_fit_any_number_of_channels():
    norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), zero(nn.Conv2d(6, 4, 3), columns=[1]))
    assert cut(model, rows(4, 3, 7, 7), ["0", "3"]) == {"0": (5, 3, 0), "3": (4, 5, 0)}


def test_behind_a_flatten_a_channel_has_several_columns():
    model = nn.Sequential(
        constant(nn.Conv2d(3, 6, 3), 4, 0.7), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5)
    )
    zero(model[4], columns=range(9, 18))
    assert cut(model, rows(2, 3, 8, 8)) == {"0": (4, 3, 0), "4": (5, 36, 0)}


def test_a_flatten_that_puts_channels_last_is_not_mistaken():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), zero(nn.Linear(36, 5), columns=range(9, 18))

        def forward(self, x):
            return self.fc(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))

    assert cut(Last(), rows(2, 3, 5, 5)) == {"fc": (5, 27, 1)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.norm(self.inner(x))))


def test_a_residual_sum_loses_what_no_side_needs():
    model = Residual()
    settle(model, rows(4, 3, 6, 6))
    for layer in (model.inner, model.head):
        zero(layer, columns=[1, 2])
    zero(model.head, columns=[3])  # still read by the inner layer
    found = cut(model, rows(2, 3, 6, 6))
    assert found == {"stem": (4, 3, 0), "inner": (4, 4, 0), "norm": (4, 4, 0), "head": (4, 3, 1)}


@pytest.mark.parametrize("stem", [False, True], ids=["fed by the stem", "fed by nothing"])
def test_a_residual_sum_of_constants_is_one(stem):
    model = Residual()
    settle(model, rows(4, 3, 6, 6))
    zero(model.inner, rows=[5], columns=[5])
    zero(model.stem, rows=[5] if stem else [])
    gone = {"stem": (5, 3, 0), "inner": (5, 5, 0), "norm": (5, 5, 0), "head": (4, 5, 0)}
    assert cut(model, rows(2, 3, 6, 6)) == (gone if stem else {"inner": (6, 5, 1)})


class Joined(nn.Module):
    """Two convolutions whose channels one reader gets side by side; another reads those of the first alone."""

    def __init__(self, reader):
        super().__init__()
        self.one, self.two, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), reader
        self.alone = zero(nn.Conv2d(4, 5, 1), columns=[1, 2])

    def forward(self, x):
        one, two = F.relu(self.one(x)), F.relu(self.two(x))
        return self.both(torch.cat([one, two], 1)) + self.alone(one)


def test_concatenated_channels_go_each_for_itself():
    """Of the first, unit 1 is read nowhere, unit 2 by one of two; of the second, 0 is a constant and 5 is not read."""
    model = Joined(zero(nn.Conv2d(10, 5, 1), columns=[1, 9]))
    constant(model.two, 0, 0.7)
    assert cut(model, rows(2, 3, 4, 4)) == {
        "one": (3, 3, 0),
        "two": (4, 3, 0),
        "both": (5, 7, 0),
        "alone": (5, 2, 1),
    }


def test_concatenated_channels_may_all_be_dead_but_for_one():
    model = Joined(zero(nn.Conv2d(10, 5, 1), columns=range(4, 10)))
    assert cut(model, rows(2, 3, 4, 4)) == {"two": (1, 1, 1), "both": (5, 4, 1), "alone": (5, 2, 1)}


class Tower(nn.Module):
    """Layers that are called for two inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 8), zero(nn.Linear(8, 7), columns=[3]), nn.Linear(7, 2)

    def forward(self, x):
        y, z = (self.two(F.relu(self.one(part))) for part in (x[:, 0], x[:, 1]))
        return self.last((y - z).abs())


def test_layers_that_are_called_twice_lose_what_no_call_needs():
    model = Tower()
    constant(model.one, 5, 0.5)
    constant(model.two, 2, 0.3)  # the same at both calls, and so zero where they meet
    assert cut(model, rows(3, 2, 6)) == {"one": (6, 6, 0), "two": (6, 6, 0), "last": (2, 6, 0)}


@pytest.mark.parametrize(
    ("times", "gone"),
    [
        (lambda net, x, h: h * 2 + 1, True),
        (lambda net, x, h: h * net.gain * 2, True),
        (lambda net, x, h: h * h.sigmoid(), True),
        (lambda net, x, h: h * (x != 0).any(-1, keepdim=True), False),
        (lambda net, x, h: h.add_((x != 0).any(-1, keepdim=True)).tanh(), False),
        (lambda net, x, h: h * torch.ones_like(h), False),
        (lambda net, x, h: net.two(h * (x != 0).any(-1, keepdim=True)) * 0 + h, False),
        (lambda net, x, h: net.norm(h * (x != 0).any(-1, keepdim=True)), False),
        (lambda net, x, h: h + net.norm(x.mean(-1, keepdim=True).expand(-1, 8)) * 0, False),
    ],
)
def test_constants_do_not_cross_what_is_another_in_other_runs(times, gone):
    """A mask is one for all that random inputs are; what comes of layers, and of the model's own tensors, is known."""

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.last = nn.Linear(8, 3)
            self.register_buffer("gain", torch.tensor(0.5))

        def forward(self, x):
            return self.last(times(self, x, F.relu(self.one(x)) * 1))

    model = Crossed()
    for name in ("two", "norm"):
        if name not in times.__code__.co_names:
            delattr(model, name)
    constant(model.one, 4, 0.7)
    assert ("one" in cut(model, rows(3, 6))) is gone


class Net(nn.Module):
    """A convolution with dead channels 0 to 2 for its reader, and something that forbids to take them out."""

    def __init__(self, act, reader=None, **more):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), zero(reader or nn.Conv2d(6, 5, 1), columns=[0, 1, 2])
        self.act = act
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.act(self, self.first(x))


FORBIDDEN = {
    "concatenation": lambda net, x: net.last(torch.cat([x[:, :3], x[:, 3:]], 1)),
    "called twice": lambda net, x: net.last(F.relu(net.mid(F.relu(net.mid(x))))),
    "softmax": lambda net, x: net.last(x.softmax(1)),
    "returned": lambda net, x: torch.cat([net.last(x).flatten(1), x.flatten(1)], 1),
    "channel shuffle": lambda net, x: net.last(x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
    "mean over channels": lambda net, x: net.last(x / (1 + x.abs().mean(1, keepdim=True))),
    "another reader": lambda net, x: net.last(x).mean(1) + net.mid(x).mean(1),
    "a reader in groups": lambda net, x: net.last(x).mean(1) + net.grouped(x).mean(1),
    "a transposed reader": lambda net, x: net.last(x).mean(1) + net.up(x).mean(1),
    "detached": lambda net, x: net.last(x).mean(1) + net.mid(x.detach()).mean(1),
}


@pytest.mark.parametrize("act", FORBIDDEN)
def test_channels_that_something_else_needs_stay_and_are_picked(act):
    more = {"mid": nn.Conv2d(6, 6, 1)} if act in {"called twice", "another reader", "detached"} else {}
    more |= {"grouped": nn.Conv2d(6, 6, 1, groups=2)} if "groups" in act else {}
    more |= {"up": nn.ConvTranspose2d(6, 6, 1)} if "transposed" in act else {}
    model = Net(FORBIDDEN[act], **more)
    names = [name for name in ("first", "mid", "grouped", "last") if hasattr(model, name)]
    assert cut(model, rows(2, 3, 4, 4), names) == {"last": (5, 3, 1)}


def test_a_layer_that_the_run_does_not_call_may_read_the_channels():
    model = Net(lambda net, x: net.last(x) if len(x) else net.spare(x), spare=nn.Conv2d(6, 5, 1))
    assert cut(model, rows(2, 3, 4, 4), ["first", "last"]) == {"last": (5, 3, 1)}


def test_channels_that_a_layer_reads_which_no_probe_calls_stay():
    """Noise takes the other branch, so that it is known what is read there; it is not computed in any trial."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(8, 7)
            self.last, self.end = zero(nn.Linear(7, 9), columns=[2]), zero(nn.Linear(9, 3), columns=[4])

        def forward(self, x):
            y = F.relu(self.first(x))
            return self.end(F.relu(self.last(self.up(y) if x.mean() > 1 else self.down(y))))

    model = Branches()
    for layer in (model.up, model.down):
        zero(layer, columns=[3])
    with torch.no_grad():
        cuts = compact(
            model.double().eval(), Example(model, rows(4, 6).double() + 5), [n for n, _ in model.named_children()]
        )
    assert {name: cut.widths for name, cut in cuts.items()} == {
        "up": (7, 7, 1),
        "down": (7, 7, 1),
        "last": (8, 6, 1),
        "end": (3, 8, 0),
    }


def test_grouped_layers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), zero(nn.Conv2d(4, 4, 1, groups=2), columns=[0]))
    assert cut(model, rows(2, 4, 5, 5)) == {}


def test_tied_tensors_are_left_alone():
    model = sequential(one=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), two=zero(nn.Conv2d(4, 4, 1), columns=[0]))
    model.add_module("again", nn.BatchNorm2d(4))
    settle(model, rows(4, 3, 5, 5))
    model.again.weight = model.norm.weight
    assert cut(model, rows(2, 3, 5, 5)) == {"two": (4, 3, 1)}


def test_what_does_not_verify_is_left_and_the_rest_is_done():
    """The first channels are counted in `forward`, which no graph shows; those behind are not."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (
                nn.Linear(6, 8),
                zero(nn.Linear(8, 8), columns=[1]),
                zero(nn.Linear(8, 5), columns=[2]),
            )

        def forward(self, x):
            y = self.one(x)
            return self.three(F.relu(self.two(y * y.shape[-1])))

    assert cut(Counting(), rows(3, 6)) == {"two": (7, 7, 1), "three": (5, 7, 0)}


def test_a_model_that_cannot_run_in_float64_is_left_alone():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = zero(nn.Linear(6, 8), columns=[1, 2])

        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("too wide")
            return self.fc(x)

    model = Single()
    assert compact(model, Example(model, rows(3, 6)), ["fc"]) == {}


def test_sequences_and_single_vectors_without_a_position():
    model = mlp(20, 8, 5)
    zero(model[0], rows=[1], columns=[0, 1, 2])
    zero(model[2], columns=[7])
    assert cut(model, rows(3, 4, 20)) == {"0": (6, 17, 1), "2": (5, 6, 0)}
    gates = sequential(one=nn.Conv1d(3, 6, 1), act=nn.GLU(1), two=zero(nn.Conv1d(3, 4, 1), columns=[0]))
    assert cut(gates, rows(2, 3, 5)) == {"one": (4, 3, 0), "two": (4, 2, 0)}  # a channel, and what gates it


# Masks and other inputs.


class Masked(nn.Module):
    """Eight of sixteen units are constants, times a mask."""

    def __init__(self, value, mask=None):
        super().__init__()
        self.one, self.two, self.mask = zero(nn.Linear(6, 16), rows=range(8)), nn.Linear(16, 3), mask
        self.one.bias.data[:8] = value

    def forward(self, x, mask=None):
        mask = self.mask(x) if self.mask else mask
        return self.two(F.relu(self.one(x)) * mask.unsqueeze(-1))


def masked(model, mask, *others):
    """What is cut; the same is computed with other masks."""
    model, x = model.double().eval(), rows(4, 5, 6).double()
    cuts = compact(model, Example(model, (x, mask)), ["one", "two"])
    with torch.no_grad():
        wanted = [model(x, other) for other in (mask, *others)]
        small = narrowed(model, cuts)
        for other, before in zip((mask, *others), wanted, strict=True):
            torch.testing.assert_close(small(x, other), before, rtol=1e-10, atol=1e-12)
    return {name: cut.widths for name, cut in cuts.items()}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("fill", [0, 1])
def test_a_constant_times_a_mask_is_none(dtype, fill):
    mask = torch.full((4, 5), fill).to(dtype)
    others = [torch.zeros_like(mask), (rows(4, 5) > 0).to(dtype)]
    assert masked(Masked(1.0), mask, *others) == {}
    assert masked(Masked(-1.0), mask, *others) == {"one": (8, 6, 0), "two": (3, 8, 0)}


@pytest.mark.parametrize("fill", [0, 1, 7])
def test_a_constant_times_a_length_is_none(fill):
    length = torch.full((4, 1), fill)
    assert masked(Masked(1.0), length, length + 1) == {}


def test_a_mask_of_what_random_inputs_never_are():
    """Where samples are padded with zeros, which no probe has."""
    model = Masked(1.0, lambda x: (x != 0).any(-1)).double().eval()
    assert compact(model, Example(model, rows(4, 5, 6).double()), ["one", "two"]) == {}


def test_a_sum_with_a_mask_that_the_example_has_zeros_in():
    class Summed(Masked):
        def forward(self, x, mask):
            return self.two(F.relu(self.one(x)) + mask)

    mask = torch.zeros(4, 5, 1, dtype=torch.int64)
    assert masked(Summed(-1.0), mask, torch.ones_like(mask)) == {}


def test_indices_on_which_random_ones_cannot_run_stay_those_of_the_example():
    class Sorted(Masked):
        def forward(self, x, lengths):
            if not torch.equal(lengths, torch.tensor([9, 4, 4, 3])[: len(lengths)]):
                raise ValueError("not sorted")
            return self.two(F.relu(self.one(x)))

    assert masked(Sorted(1.0), torch.tensor([9, 4, 4, 3])) == {"one": (8, 6, 0), "two": (3, 8, 0)}


def test_layers_called_with_keywords_are_left_alone():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), zero(nn.Linear(8, 5), columns=[0])
            self.three = zero(nn.Linear(8, 5), columns=[0])

        def forward(self, x):
            h = self.one(x)
            return self.two(h) + self.three(input=h)

    assert cut(Named(), rows(3, 6), ["one", "two"]) == {"two": (5, 7, 1)}


# What a search costs.


class Sizes(nn.Module):
    """Notes the batches that it meets, and refuses small ones."""

    def __init__(self, least):
        super().__init__()
        self.least, self.met = least, []

    def forward(self, x):
        if len(x) < self.least:
            raise ValueError("too few")
        self.met.append(len(x))
        return x


@pytest.mark.parametrize(("least", "met"), [(1, 2), (3, 32)])
def test_few_samples_of_the_example_do(least, met):
    model = nn.Sequential(Sizes(least), zero(nn.Linear(6, 8), rows=[1]), nn.ReLU(), nn.Linear(8, 5)).eval()
    noted = model[0].met
    model[0].__deepcopy__ = lambda _: model[0]  # copies note in the same place
    found = compact(model, Example(model, rows(32, 6)), ["1", "3"])
    assert {name: cut.widths for name, cut in found.items()} == {"1": (7, 6, 0), "3": (5, 7, 0)}
    assert set(noted) == {met}


class Blocks(nn.Module):
    """Residual blocks with dead units; in some of them, units are counted in `forward`, so that none can go."""

    def __init__(self, count, counting):
        super().__init__()
        self.ins = nn.ModuleList(nn.Linear(6, 8) for _ in range(count))
        self.outs = nn.ModuleList(zero(nn.Linear(8, 6), columns=[0, 1]) for _ in range(count))
        self.counting = counting

    def forward(self, x):
        for number, (one, two) in enumerate(zip(self.ins, self.outs, strict=True)):
            h = one(x)
            x = x + two(F.relu(h * h.shape[-1] if number in self.counting else h))
        return x


@pytest.mark.parametrize(("counting", "most"), [((), 1), ((5,), 2), ((23,), 2), ((0, 11, 20), 8)])
def test_the_channels_that_do_not_verify_are_found_in_few_trials(monkeypatch, counting, most):
    runs = []
    settle_once = compacting._Work.settle
    monkeypatch.setattr(compacting._Work, "settle", lambda self: (runs.append(1), settle_once(self)))
    found = cut(Blocks(24, counting), rows(3, 6))
    assert found == {
        f"{side}.{number}": {"ins": (6, 6, 0), "outs": (6, 6, int(number in counting))}[side]
        for number in range(24)
        for side in ("ins", "outs")
        if side == "outs" or number not in counting
    }
    assert len(runs) <= most


def test_channels_that_fail_outside_of_the_layers_are_found_by_halves(monkeypatch):
    """Behind the last layer nothing says which channels were counted."""

    class Returning(Blocks):
        def forward(self, x):
            widths = 0
            for number, (one, two) in enumerate(zip(self.ins, self.outs, strict=True)):
                h = one(x)
                widths += h.shape[-1] if number in self.counting else 0
                x = x + two(F.relu(h))
            return x * widths

    runs = []
    settle_once = compacting._Work.settle
    monkeypatch.setattr(compacting._Work, "settle", lambda self: (runs.append(1), settle_once(self)))
    found = cut(Returning(32, (9,)), rows(3, 6))
    assert "ins.9" not in found
    assert sum(name.startswith("ins") for name in found) == 31
    assert len(runs) <= 12


POOLED = {
    "sum": lambda h: h.sum(1),
    "norm": lambda h: h.norm(dim=1),
    "logsumexp": lambda h: h.logsumexp(1),
    "cumsum": lambda h: h.cumsum(1)[:, -1],
    "product with ones": lambda h: (torch.ones_like(h[..., :1]).mT @ h)[:, 0],
}


class Pooled(nn.Module):
    """Channels pooled over positions, of which there may be more next time."""

    def __init__(self, pool):
        super().__init__()
        self.a, self.b, self.pool = zero(nn.Linear(6, 8), rows=[1, 4]), nn.Linear(8, 5), pool

    def forward(self, x):
        return self.b(self.pool(self.a(x)))


@pytest.mark.parametrize("pool", POOLED)
def test_constants_that_are_summed_over_positions_are_not_held_by_a_bias(pool):
    torch.manual_seed(0)
    model, x = Pooled(POOLED[pool]).eval(), torch.randn(3, 7, 6)
    with torch.no_grad():
        model.a.bias[[1, 4]] = 1.5
    net = taut.trace(model, x)
    small = taut.apply(model, Plan.of(net, [taut.whole(net, "dead_units")]), taut.observe(net, model))
    for length in (7, 11):
        y = torch.randn(2, length, 6)
        assert torch.allclose(small(y), model(y), atol=1e-5)


def test_constants_under_a_mean_are():
    torch.manual_seed(0)
    model, x = Pooled(lambda h: h.mean(1)).eval(), torch.randn(3, 7, 6)
    with torch.no_grad():
        model.a.bias[[1, 4]] = 1.5
    assert compact(model, Example(model, x), ["a", "b"])["b"].widths == (5, 6, 0)


def test_numbers_among_the_inputs_are_others_next_time():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = zero(nn.Linear(6, 8), rows=[1, 4]), nn.Linear(8, 5)

        def forward(self, x, k):
            return self.b(self.a(x) * k)

    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(3, 6)
    with torch.no_grad():
        model.a.bias[[1, 4]] = 1.5
    net = taut.trace(model, (x, 2.0))
    small = taut.apply(model, Plan.of(net, [taut.whole(net, "dead_units")]), taut.observe(net, model))
    assert torch.allclose(small(x, 3.0), model(x, 3.0), atol=1e-5)
