"""Channel orders folded into the neighbours: the output stays, the order goes where that is exact, and only there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import sequential, surroundings
from taut.core.example import Example
from taut.nn import Reorder
from taut.structure.reordering import fold, sides

C = 8


def reorder(channels=C, axes=2, seed=3):
    """A permutation without fixed points, so that losing it is seen."""
    turn = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    order = torch.empty(channels, dtype=torch.long)
    order[turn] = turn.roll(1)
    return Reorder(order, axes)


def awake(model):
    """Norms with statistics and weights of their own, as in a trained net."""
    for module in model.modules():
        for key in ("weight", "bias", "running_mean"):
            t = getattr(module, key, None)
            if isinstance(t, torch.Tensor) and t.ndim == 1:
                t.data.normal_(0.3)
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def net(*parts, head=True):
    """Producer, the parts, a consumer."""
    layers = [nn.Conv2d(3, C, 3, padding=1), *parts]
    return awake(nn.Sequential(*layers, *([nn.Conv2d(C, 5, 3)] if head else [])))


def image(*shape):
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def chain(*parts):
    """A feeding layer in groups, which cannot take over an order of its outputs."""
    return awake(nn.Sequential(nn.Conv2d(4, C, 3, padding=1, groups=4), *parts))


def squares(*shape):
    return image(*(shape or (2, 4, 8, 8)))


def orders(model):
    return sum(isinstance(module, Reorder) for module in model.modules())


def folded(model, x, left, tolerance=1e-5):
    """Fold; the output is what it was, also on other inputs, and so many orders are left."""
    example = Example(model, x)
    others = [x, *(torch.randn(x.shape, generator=torch.Generator().manual_seed(s)).to(x) for s in (7, 8))]
    with torch.no_grad():
        before = [model(other) for other in others]
        around = surroundings()
        fold(model, example)
        assert surroundings() == around
        for other, wanted in zip(others, before, strict=True):
            found = model(other)
            assert found.dtype == wanted.dtype
            assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    assert orders(model) == left
    return model


# The module.


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_reorder_moves_channels_and_undone_is_its_inverse(axes, batch):
    part = reorder(axes=axes)
    x = torch.randn(*batch, C, *range(3, 3 + axes))
    y, dim = part(x), len(batch)
    for place, source in enumerate(part.order.tolist()):
        assert torch.equal(y.select(dim, place), x.select(dim, source))
    values = torch.randn(C, 3)
    assert torch.equal(part.undone(values[part.order.long()]), values)
    assert torch.equal(part.undone(values)[part.order.long()], values)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_to_plain_computes_the_same_with_torchs_own_layers(axes):
    part = reorder(axes=axes)
    plain = part.to_plain()
    assert type(plain).__module__.startswith("torch.nn.")
    x = torch.randn(2, C, *range(3, 3 + axes))
    assert torch.equal(plain(x), part(x))


def test_a_reorder_travels_in_the_state_dict_and_keeps_its_integers():
    part, other = reorder().half(), reorder(seed=9)
    other.load_state_dict(part.state_dict())
    assert not part.order.is_floating_point()
    assert torch.equal(other.order, reorder().order)


# Into the layer that reads it.

BETWEEN = {
    "nothing": [],
    "relu": [nn.ReLU()],
    "relu in place": [nn.ReLU(inplace=True)],
    "batch norm": [nn.BatchNorm2d(C)],
    "batch norm without statistics": [nn.BatchNorm2d(C, track_running_stats=False)],
    "batch norm without weights": [nn.BatchNorm2d(C, affine=False)],
    "instance norm": [nn.InstanceNorm2d(C, affine=True)],
    "one group norm": [nn.GroupNorm(1, C)],
    "prelu per channel": [nn.PReLU(C)],
    "prelu": [nn.PReLU()],
    "max pool": [nn.MaxPool2d(2)],
    "average pool": [nn.AvgPool2d(2)],
    "dropout": [nn.Dropout(), nn.Dropout2d()],
    "upsampling": [nn.Upsample(scale_factor=2)],
    "padding": [nn.ReflectionPad2d(1)],
    "many": [nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(C), nn.GELU()],
}


@pytest.mark.parametrize("between", BETWEEN)
def test_through_what_treats_channels_alike(between):
    folded(chain(reorder(), *BETWEEN[between], nn.Conv2d(C, 5, 3)), squares(), left=0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_in_every_layout(memory):
    model = net(reorder(), nn.ReLU()).to(memory_format=memory)
    strides = model[3].weight.stride()
    folded(model, image().contiguous(memory_format=memory), left=0)
    assert model[2].weight.stride() == strides


def test_a_kernel_stored_in_an_unusual_order_is_folded_or_left():
    model, x = chain(reorder(), nn.Conv2d(C, 5, 3)), squares()
    weight = model[2].weight.data
    model[2].weight.data = weight.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        wanted = model(x)
        fold(model, Example(model, x))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("axes", [1, 3])
def test_in_one_and_three_dimensions(axes):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[axes]
    model = awake(nn.Sequential(conv(3, C, 3), reorder(axes=axes), norm(C), nn.ReLU(), conv(C, 5, 3)))
    folded(model, image(2, 3, *[7] * axes), left=0)


@pytest.mark.parametrize("pool", [nn.Identity(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)], ids=["all", "pool", "mean"])
def test_through_flatten_into_a_linear_layer(pool):
    features = {nn.Identity: 64, nn.MaxPool2d: 16, nn.AdaptiveAvgPool2d: 1}[type(pool)] * C
    model = net(reorder(), nn.BatchNorm2d(C), nn.ReLU(), pool, nn.Flatten(), nn.Linear(features, 6), head=False)
    folded(model, image(), left=0)


def test_through_flatten_a_norm_of_all_features_and_a_linear_layer():
    """The norm behind the flatten holds several values per channel: right whether folded or not."""
    model = net(reorder(), nn.Flatten(), nn.BatchNorm1d(64 * C), nn.Linear(64 * C, 6), head=False)
    example = Example(model, image())
    with torch.no_grad():
        wanted = model(image())
        fold(model, example)
        torch.testing.assert_close(model(image()), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


class Functional(nn.Module):
    """A layer in groups, which cannot take over an order, then what `act` does, then a consumer."""

    def __init__(self, act):
        super().__init__()
        self.first, self.order, self.act = nn.Conv2d(4, C, 3, padding=1, groups=4), reorder(), act
        self.head = nn.Conv2d(C, 5, 1)

    def forward(self, x):
        return self.head(self.act(self.order(self.first(x))))


ALIKE = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": torch.relu_,
    "pool": lambda x: F.max_pool2d(F.silu(x), 2),
    "scaled": lambda x: 2 * x + 1,
    "mean removed": lambda x: x - x.mean((1, 2, 3), keepdim=True),
    "added to itself": lambda x: x + x.flip(-1),
    "there and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "softmax over channels": lambda x: x.softmax(1),
}
MIXED = {
    "slice": lambda x: torch.cat([x[:, :4], x[:, 4:] * 2], 1),
    "flip": lambda x: x.flip(1),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "cumulated": lambda x: x.cumsum(1) / 4,
    "ramp": lambda x: x * torch.linspace(0.5, 1.5, C)[:, None, None],
    "response norm": lambda x: F.local_response_norm(x, 3, alpha=1.0),
    "group norm": lambda x: F.group_norm(x, 4),
}


@pytest.mark.parametrize("act", ALIKE)
def test_through_functions_that_treat_channels_alike(act):
    folded(Functional(ALIKE[act]), squares(), left=0)


@pytest.mark.parametrize("act", MIXED)
def test_not_through_functions_that_tell_channels_apart(act):
    folded(Functional(MIXED[act]), squares(), left=1)


class Branches(nn.Module):
    """Two and three readers, some behind a norm of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.order = nn.Conv2d(3, C, 3, padding=1), reorder()
        self.norm, self.one, self.two = nn.BatchNorm2d(C), nn.Conv2d(C, 4, 1), nn.Conv2d(C, 4, 3, padding=1)
        self.fc = nn.Linear(C, 4)

    def forward(self, x):
        x = self.order(self.first(x))
        return self.one(F.relu(x)) + self.two(self.norm(x)) + self.fc(x.mean((2, 3)))[:, :, None, None]


def test_into_all_readers_at_once():
    folded(awake(Branches()), image(), left=0)


def test_into_another_order():
    folded(net(reorder(), nn.ReLU(), reorder(seed=5)), image(), left=0)


def test_two_orders_that_cannot_go_on_become_one():
    """The first goes into the second, which the sum of the response norm holds back."""
    parts = [nn.LocalResponseNorm(3, alpha=1.0), nn.Conv2d(C, 5, 3)]
    folded(chain(reorder(), nn.ReLU(), reorder(seed=5), *parts), squares(), left=1)


def test_orders_of_several_layers_are_all_folded():
    model = awake(
        nn.Sequential(
            nn.Conv2d(3, C, 3, padding=1),
            reorder(),
            nn.BatchNorm2d(C),
            nn.ReLU(),
            nn.Conv2d(C, C, 3, padding=1),
            reorder(seed=5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * C, 5),
        )
    )
    folded(model, image(), left=0)


# Into the layer that feeds it.


def grouped():
    """A consumer that cannot take over an order of its inputs."""
    return nn.Conv2d(C, C, 3, groups=4)


@pytest.mark.parametrize("between", BETWEEN)
def test_into_the_layer_that_feeds_it(between):
    folded(net(*BETWEEN[between], reorder(), grouped(), head=False), image(), left=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_feeding_layer_with_and_without_bias(bias):
    model = nn.Sequential(nn.Conv2d(3, C, 1, bias=bias), reorder(), grouped()).eval()
    folded(model, image(), left=0)


def test_not_into_a_feeding_layer_that_others_read():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.grouped = nn.Conv2d(3, C, 1), reorder(), grouped()
            self.other = nn.Conv2d(C, C, 3)

        def forward(self, x):
            x = self.first(x)
            return self.grouped(self.order(x)) + self.other(x)

    folded(Two().eval(), image(), left=1)


class Reshaped(nn.Module):
    """What feeds the order has other channels than the order: a reshape lies between."""

    def __init__(self, first, reshape, consumer=None):
        super().__init__()
        self.first, self.reshape, self.order = first, reshape, reorder()
        self.last = grouped() if consumer is None else consumer

    def forward(self, x):
        return self.last(self.order(self.reshape(self.first(x))))


@pytest.mark.parametrize("last", [grouped, lambda: nn.Conv2d(C, 5, 3)], ids=["grouped", "plain"])
@pytest.mark.parametrize(
    ("first", "reshape", "size"),
    [
        (lambda: nn.Linear(6, C * 16), lambda x: x.view(-1, C, 4, 4), (2, 6)),
        (lambda: nn.Conv2d(3, 4 * C, 1), lambda x: F.pixel_shuffle(x, 2), (2, 3, 4, 4)),
        (lambda: nn.Conv2d(3, C // 4, 1), lambda x: F.pixel_unshuffle(x, 2), (2, 3, 8, 8)),
        (lambda: nn.Conv2d(3, 1, 1), lambda x: x * torch.arange(1.0, C + 1)[:, None, None], (2, 3, 8, 8)),
        (lambda: nn.Conv2d(3, C // 2, 1), lambda x: torch.cat([x, -x], 1), (2, 3, 8, 8)),
        (lambda: nn.Conv2d(3, 2 * C, 1), lambda x: F.glu(x, 1), (2, 3, 8, 8)),
        (lambda: nn.Conv2d(3, C + 2, 1), lambda x: x[:, :C], (2, 3, 8, 8)),
    ],
    ids=["linear", "shuffle", "unshuffle", "one channel", "concatenated", "gated", "sliced"],
)
def test_a_feeding_layer_with_other_channels_is_left_alone(first, reshape, size, last):
    folded(Reshaped(first(), reshape, last()).eval(), image(*size), left=int(last is grouped))


@pytest.mark.parametrize(
    ("reshape", "last"),
    [
        (lambda x: F.pixel_shuffle(x, 2), nn.Conv2d(C // 4, 5, 3)),
        (lambda x: F.pixel_unshuffle(x, 2), nn.Conv2d(4 * C, 5, 3)),
        (lambda x: torch.cat([x, -x], 1), nn.Conv2d(2 * C, 5, 3)),
        (lambda x: x[:, : C // 2], nn.Conv2d(C // 2, 5, 3)),
        (lambda x: F.glu(x, 1), nn.Conv2d(C // 2, 5, 3)),
        (lambda x: x.transpose(1, 3), nn.Conv2d(8, 5, 3)),
    ],
    ids=["shuffle", "unshuffle", "concatenated", "sliced", "gated", "turned"],
)
def test_a_reader_with_other_channels_computes_the_same(reshape, last):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(3, C, 1, groups=1), reorder(), last

        def forward(self, x):
            return self.last(reshape(self.order(self.first(x))))

    model, x = Read().eval(), image()
    with torch.no_grad():
        wanted = model(x)
        fold(model, Example(model, x))  # the feeding layer may take the order, the reader rarely
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# Where it has to stay.


STOPS = {
    "the model's output": [],
    "an output behind a norm": [nn.BatchNorm2d(C), nn.ReLU()],
    "a grouped layer": [nn.ReLU(), nn.Conv2d(C, C, 3, groups=2)],
    "a depthwise layer": [nn.Conv2d(C, C, 3, groups=C)],
    "group norm": [nn.GroupNorm(4, C), nn.Conv2d(C, 5, 3)],
    "strong response norm": [nn.LocalResponseNorm(3, alpha=1.0), nn.Conv2d(C, 5, 3)],
    "channel shuffle": [nn.ChannelShuffle(2), nn.Conv2d(C, 5, 3)],
    "a transposed layer": [nn.ConvTranspose2d(C, 5, 3)],
    "layer norm of all": [nn.LayerNorm([C, 8, 8]), nn.Conv2d(C, 5, 3)],
}


@pytest.mark.parametrize("stop", STOPS)
def test_it_stays_where_folding_is_not_exact(stop):
    folded(chain(reorder(), *STOPS[stop]), squares(), left=1)


@pytest.mark.parametrize("settings", [{}, {"alpha": 1e-3}, {"alpha": 1e-4, "beta": 0.75, "k": 2.0}])
def test_the_usual_response_norms_tell_channels_apart_too(settings):
    """Their usual strength changes the output by little: by more than rounding all the same."""
    model = chain(reorder(), nn.ReLU(), nn.LocalResponseNorm(5, **settings), nn.MaxPool2d(2), nn.Conv2d(C, 5, 3))
    folded(model, 3 * squares(), left=1)


def test_a_weak_branch_that_tells_channels_apart_keeps_its_order():
    class Weak(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.norm = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.GroupNorm(4, C)
            self.last, self.gain = nn.Conv2d(C, 4, 1), 5e-5

        def forward(self, x):
            return x + self.gain * self.last(self.norm(self.order(self.first(x))))

    folded(awake(Weak()), squares(), left=1)


class Block(nn.Module):
    """A residual block, behind whose sum the order of the shortcut counts."""

    def __init__(self, first):
        super().__init__()
        self.first, self.order, self.last = first, reorder(), nn.Conv2d(C, 5, 1)

    def forward(self, x):
        return self.last(F.relu(x + self.order(self.first(x))))


def test_at_a_residual_sum_it_goes_into_the_feeding_layer_or_stays():
    folded(Block(nn.Conv2d(C, C, 3, padding=1)).eval(), image(2, C, 8, 8), left=0)
    folded(Block(nn.Conv2d(C, C, 3, padding=1, groups=2)).eval(), image(2, C, 8, 8), left=1)


@pytest.mark.parametrize("outside", ["input", "layer"])
def test_a_reader_that_reads_others_too_keeps_the_order(outside):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order = nn.Conv2d(C, C, 1, groups=4), reorder()
            self.other, self.last = nn.Conv2d(C, C, 1), nn.Conv2d(2 * C, 5, 1)

        def forward(self, x):
            beside = x if outside == "input" else self.other(x)
            return self.last(torch.cat([self.order(self.first(x)), beside], 1))

    folded(Joined().eval(), image(2, C, 6, 6), left=1)


def test_a_shared_reader_that_is_also_called_elsewhere_keeps_the_order():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(C, C, 1, groups=4), reorder(), nn.Conv2d(C, 5, 1)

        def forward(self, x):
            return self.last(self.order(self.first(x))) + self.last(x)

    folded(Shared().eval(), image(2, C, 6, 6), left=1)


def test_a_reader_called_twice_on_the_same_channels_takes_the_order():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.Conv2d(C, 5, 1)

        def forward(self, x):
            x = self.order(self.first(x))
            return self.last(F.relu(x)) + self.last(x.flip(-1))

    folded(Twice().eval(), squares(), left=0)


@pytest.mark.parametrize("where", ["elsewhere", "beside"])
def test_tied_weights(where):
    """Two readers of one order with one weight may take it; a weight that others use too may not change."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order = nn.Conv2d(C, C, 1, groups=4), reorder()
            self.one, self.two = nn.Conv2d(C, 5, 1), nn.Conv2d(C, 5, 1)
            self.two.weight = self.one.weight

        def forward(self, x):
            y = self.order(self.first(x))
            return self.one(F.relu(y)) + self.two(x if where == "elsewhere" else y)

    model = folded(Tied().eval(), image(2, C, 6, 6), left=int(where == "elsewhere"))
    assert model.one.weight is model.two.weight


def test_a_reader_whose_weight_is_tied_to_a_layer_that_this_run_does_not_use():
    """Another way through the model has the weight too: its output may not change."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order = nn.Conv2d(C, C, 1, groups=4), reorder()
            self.last, self.spare = nn.Conv2d(C, 5, 1), nn.Conv2d(C, 5, 1)
            self.spare.weight = self.last.weight

        def forward(self, x):
            return self.last(self.order(self.first(x)))

        def another(self, x):
            return self.spare(x)

    model, x = Spare().eval(), image(2, C, 6, 6)
    with torch.no_grad():
        wanted = model.another(x)
        fold(model, Example(model, x))
        torch.testing.assert_close(model.another(x), wanted)


def test_an_order_that_one_reader_refuses_stays_for_all():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order = nn.Conv2d(4, C, 1, groups=4), reorder()
            self.plain, self.grouped = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1, groups=2)

        def forward(self, x):
            x = self.order(self.first(x))
            return self.plain(x) + self.grouped(x)

    model = Mixed().eval()
    before = model.plain.weight.clone()
    folded(model, squares(), left=1)
    assert torch.equal(model.plain.weight, before)


def test_an_order_that_is_returned_beside_being_read_stays():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.Conv2d(C, 5, 1)

        def forward(self, x):
            x = self.order(self.first(x))
            return torch.cat([self.last(x).flatten(1), x.flatten(1)], 1)

    folded(Features().eval(), squares(), left=1)


@pytest.mark.parametrize("detached", [lambda t: t.detach(), lambda t: t.data], ids=["detach", "data"])
def test_a_reader_beside_autograd_takes_the_order_too(detached):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order = nn.Conv2d(4, C, 1, groups=4), reorder()
            self.last, self.side = nn.Conv2d(C, 5, 1), nn.Conv2d(C, 5, 1)

        def forward(self, x):
            x = self.order(self.first(x))
            return self.last(x) + self.side(detached(x))

    folded(Side().eval(), squares(), left=0)


# Readers that are neither convolution nor linear layer.


class Scale(nn.Module):
    """A gain per channel, as ConvNeXt has it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, C)[:, None, None])

    def forward(self, x):
        return x * self.gain


class Sequence(nn.Module):
    """Columns of an image as a sequence, into a recurrent or an attention layer."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.inner = nn.MultiheadAttention(C, 2, batch_first=True) if attention else nn.LSTM(C, 6, batch_first=True)

    def forward(self, x):
        x = x.mean(2).transpose(1, 2)
        return self.inner(x, x, x)[0] if self.attention else self.inner(x)[0]


@pytest.mark.parametrize("feeding", [1, 4], ids=["plain", "grouped"])
@pytest.mark.parametrize(
    "reader",
    [
        lambda: nn.Sequential(Scale(), nn.Conv2d(C, 5, 1)),
        lambda: Sequence(attention=False),
        lambda: Sequence(attention=True),
        lambda: nn.ConvTranspose2d(C, 5, 1),
    ],
    ids=["scale", "lstm", "attention", "transposed"],
)
def test_readers_of_other_kinds_leave_the_output_as_it_is(reader, feeding):
    model = nn.Sequential(nn.Conv2d(4, C, 3, padding=1, groups=feeding), reorder(), reader()).eval()
    x = squares()
    with torch.no_grad():
        wanted = model(x)
        fold(model, Example(model, x))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["new", "old", "spectral"])
@pytest.mark.parametrize("side", ["reads", "feeds"])
def test_layers_with_computed_weights_keep_the_output(kind, side):
    made = {
        "new": nn.utils.parametrizations.weight_norm,
        "old": nn.utils.weight_norm,
        "spectral": nn.utils.parametrizations.spectral_norm,
    }[kind]
    first, last = nn.Conv2d(4, C, 1, groups=4 if side == "reads" else 1), nn.Conv2d(C, C, 1)
    first, last = (first, made(last)) if side == "reads" else (made(first), grouped())
    model = nn.Sequential(first, reorder(), last).eval()
    x = squares()
    with torch.no_grad():
        wanted = model(x)
        fold(model, Example(model, x))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# Weak evidence: an example on which a wrong fold is not seen.


@pytest.mark.parametrize("example", [torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)], ids=["zeros", "ones"])
@pytest.mark.parametrize("act", ["shuffle", "slice", "response norm", "cumulated"])
def test_an_example_that_says_nothing_proves_nothing(act, example):
    """Zeros are what many people trace with: without biases every order gives the same output there."""
    model = nn.Sequential(nn.Conv2d(4, C, 3, groups=4, bias=False), Functional(MIXED[act]))
    model[1].first, model[1].head = nn.ReLU(), nn.Conv2d(C, 5, 1, bias=False)
    model.eval()
    x = squares()
    with torch.no_grad():
        wanted = model(x)
        fold(model, Example(model, example))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# Dtypes, modes, frozen weights, what else a model is.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    """A sum of the same products in another order: within the dtype's rounding."""
    model = net(reorder(), nn.BatchNorm2d(C), nn.ReLU()).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    folded(model, image().to(dtype), left=0, tolerance=tolerance)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stop", ["group norm", "channel shuffle", "a grouped layer"])
def test_coarse_dtypes_do_not_hide_an_inexact_fold(dtype, stop):
    """Seen in float32, where the difference that the dtype would hide is plain."""
    model = chain(reorder(), *STOPS[stop]).to(dtype)
    with torch.no_grad():
        wanted = model.float()(squares())
        fold(model.to(dtype), Example(model, squares().to(dtype)))
        found = model.float()(squares())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_frozen_weights_are_folded_and_stay_frozen():
    model = net(reorder(), nn.BatchNorm2d(C), nn.ReLU())
    for parameter in model.parameters():
        parameter.requires_grad = False
    model[4].bias.requires_grad = True
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {id(p) for p in model.parameters()}
    folded(model, image(), left=0)
    assert [p.requires_grad for p in model.parameters()] == list(flags.values())
    assert {id(p) for p in model.parameters()} == identities


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_a_callers_mode(mode):
    model, x = net(reorder(), nn.BatchNorm2d(C), nn.ReLU()), image()
    with torch.no_grad():
        wanted = model(x)
    with mode():
        fold(model, Example(model, x))
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_training_flags_and_gradients_are_left_as_they_were():
    model = net(reorder(), nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout())
    model[0].train()
    model[4].train()
    flags = [module.training for module in model if not isinstance(module, Reorder)]
    before = {key: value.clone() for key, value in model[2].named_buffers()}
    fold(model, Example(model, image()))
    assert orders(model) == 0
    assert [module.training for module in model] == flags
    assert all(p.grad is None for p in model.parameters())
    for key, value in model[1].named_buffers():  # turned, but not moved by the runs of the example
        torch.testing.assert_close(value.sort().values, before[key].sort().values)


def test_a_model_with_several_inputs_and_a_dict_as_output():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.Conv2d(C, 5, 1)

        def forward(self, left, right):
            x = F.relu(self.order(self.first(left)))
            return {"a": [self.last(x)], "b": right}

    model = Both().eval()
    example = {"left": squares(), "right": torch.arange(3)}
    with torch.no_grad():
        wanted = model(**example)["a"][0]
        fold(model, Example(model, example))
        torch.testing.assert_close(model(**example)["a"][0], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert orders(model) == 0


def test_a_model_that_parameters_of_its_own_surround():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.inner = nn.Parameter(torch.randn(3, 1, 1)), Inner()

        def forward(self, x):
            return self.inner(x + self.shift)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.body = nn.Parameter(torch.tensor(2.0)), net(reorder(), nn.ReLU())

        def forward(self, x):
            return self.body(self.gain * x)

    folded(Outer().eval(), image(), left=0)


def test_a_model_without_orders_is_not_even_run():
    runs = []

    class Noting(nn.Module):
        def forward(self, x):
            runs.append(x)

    fold(Noting(), Example(Noting(), image()))
    assert not runs


# What is left in a chain.


def test_the_gap_is_closed_and_sides_says_what_is_left():
    inner = nn.Sequential(reorder(), nn.Conv2d(C, C, 1, groups=4), reorder())
    assert sides(inner) == "io"
    model = sequential(a=nn.Conv2d(3, C, 1, groups=1), inner=inner, add=nn.Conv2d(C, 4, 1, groups=2)).eval()
    fold(model, Example(model, image(2, 3, 4, 4)))
    assert sides(model.inner) == "o"
    assert [type(part) for part in model.inner] == [nn.Conv2d, Reorder]
    assert list(dict(model.inner.named_children())) == ["0", "1"]
    assert sides(sequential(only=nn.Conv2d(C, C, 1))) == ""


def test_a_layer_that_the_run_does_not_call_may_read_the_channels():
    """An auxiliary head of training: nothing is folded past it."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.Conv2d(C, 5, 1)
            self.aux = nn.Conv2d(C, 2, 1)

        def forward(self, x):
            x = F.relu(self.order(self.first(x)))
            return (self.last(x), self.aux(x)) if self.training else self.last(x)

    model, x = Auxiliary().eval(), squares()
    with torch.no_grad():
        wanted = model.train()(x)[1]
        fold(model.eval(), Example(model, x))
        torch.testing.assert_close(model.train()(x)[1], wanted)
    assert orders(model) == 1


def test_an_output_that_hides_the_difference_does_not_fool_it():
    """Scaled channel by channel before classes are named: the readers' own outputs are compared, too."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.order, self.last = nn.Conv2d(4, C, 1, groups=4), reorder(), nn.Conv2d(C, 3, 1)
            self.register_buffer("scale", torch.linspace(1, 1.001, C).reshape(1, C, 1, 1))
            nn.init.constant_(self.last.bias, 0)
            self.last.bias.data[0] = 100.0

        def forward(self, x):
            return self.last(self.order(self.first(x)) * self.scale).argmax(1)

    model = Named().eval()
    fold(model, Example(model, squares()))
    assert orders(model) == 1


def test_an_order_that_is_none_is_dropped_anywhere():
    model = nn.Sequential(nn.Conv2d(4, C, 1, groups=4), Reorder(torch.arange(C), 2)).eval()
    fold(model, Example(model, squares()))
    assert orders(model) == 0
    assert len(model) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_an_order_before_a_mask_of_channels_stays(dtype):
    """The example's mask says the same of every channel; another may not."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.order, self.two = nn.Conv2d(3, C, 1), reorder(), nn.Conv2d(C, 5, 1)

        def forward(self, x, mask):
            return self.two(self.order(self.one(x)) * mask.view(1, -1, 1, 1))

    model, x, mask = Masked().eval(), image(), torch.ones(C).to(dtype)
    other = (torch.arange(C) < 3).to(dtype)
    with torch.no_grad():
        wanted = model(x, other)
        fold(model, Example(model, (x, mask)))
        torch.testing.assert_close(model(x, other), wanted)


def test_an_order_is_folded_where_the_model_cannot_run_on_random_integers():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.order, self.two = nn.Linear(3, C), reorder(axes=0), nn.Linear(C, 5)

        def forward(self, x, lengths):
            if lengths.tolist() != [9, 4, 3]:
                raise ValueError("not sorted")
            return self.two(self.order(self.one(x)))

    model, inputs = Only().eval(), (image(3, 3), torch.tensor([9, 4, 3]))
    with torch.no_grad():
        wanted = model(*inputs)
        fold(model, Example(model, inputs))
        torch.testing.assert_close(model(*inputs), wanted, rtol=1e-5, atol=1e-6)
    assert orders(model) == 0
