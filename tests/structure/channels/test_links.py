"""Which layers share their channels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import case, sequential
from structure import wired
from structure.wired import Net, draw, settled
from taut.core.example import Example
from taut.structure.channels.links import find_links


def types(model, x, names):
    return find_links(model.eval(), Example(model, x), names)


def test_a_chain():
    net = sequential(a=nn.Linear(6, 8), r=nn.ReLU(), b=nn.Linear(8, 7), d=nn.Dropout(0.5), c=nn.Linear(7, 3))
    assert types(net, torch.randn(2, 6), ["a", "b", "c"]) == [0, 1, 1, 2, 2, 3]


def test_batch_norm_pooling_and_flatten_are_passed():
    model, example = case("vgg").make()
    assert types(model, example, ["conv1", "conv2", "fc"]) == [0, 1, 1, 2, 2, 3]


def test_a_residual_sum_is_one_type():
    model, example = case("resnet").make()
    names = ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.short", "fc"]
    numbers = types(model, example, names)
    stem, c1, c2, d1, d2, short, fc = zip(numbers[::2], numbers[1::2], strict=True)
    assert stem[1] == c1[0] == c2[1] == d1[0] == short[0]
    assert c1[1] == c2[0]
    assert d2[1] == short[1] == fc[0]
    assert len(set(numbers)) == 6


def test_concatenated_channels_are_types_of_their_own():
    model, example = case("inception").make()
    numbers = types(model, example, ["one", "three", "five", "mix", "fc"])
    assert numbers[6] not in numbers[:6]
    assert numbers[7] == numbers[8]


def test_all_that_read_one_concatenation_share_its_type():
    net, x, _ = wired.concatenation()
    net.way = lambda s, x: s.c(y := torch.cat([s.a(x), s.b(x)], 1)) + s.d(F.relu(y))
    net.d = nn.Conv2d(10, 4, 1)
    assert types(net, x, ["a", "b", "c", "d"]) == [0, 1, 2, 3, 4, 5, 4, 5]


def test_readers_of_a_layer_left_out_share_a_type_unless_they_read_it_in_other_numbers():
    """The size of a type that none of the layers gives is that of its inputs."""
    way = lambda s, x: s.c(s.b(y := s.a(x)).flatten(1)) + s.d(s.e(y).flatten(1)) + s.f(y.mean((2, 3)))  # noqa: E731
    net = Net(way, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1), c=nn.Linear(16, 5), d=nn.Linear(16, 5))
    net.e, net.f = nn.Conv2d(8, 4, 1), nn.Linear(8, 5)
    assert types(net, draw(2, 3, 2, 2), ["b", "e", "f"]) == [0, 1, 0, 2, 0, 3]
    assert types(net, draw(2, 3, 2, 2), ["c", "d"]) == [0, 1, 2, 1]
    net.way = lambda s, x: s.f(F.relu(y := s.a(x)).mean((2, 3))) + s.g(y.flatten(1))
    net.g = nn.Linear(32, 5)
    assert types(net, draw(2, 3, 2, 2), ["f", "g"]) == [0, 1, 2, 1]
    assert types(net, draw(2, 3, 2, 2), ["a", "f", "g"]) == [0, 1, 1, 2, 1, 2]


def test_a_layer_left_out_breaks_the_chain():
    net = sequential(a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    assert types(net, torch.randn(2, 6), ["a", "c"]) == [0, 1, 2, 3]


def test_grouped_convolutions_stand_alone():
    net = sequential(a=nn.Conv1d(4, 8, 3), b=nn.Conv1d(8, 8, 3, groups=2), c=nn.Conv1d(8, 2, 1))
    assert types(net, torch.randn(2, 4, 12), ["a", "b", "c"]) == [0, 1, 2, 3, 4, 5]


def test_a_grouped_reader_does_not_part_the_others():
    """What its groups can only lose together are several channels all the same."""
    way = lambda s, x: s.b(y := s.a(x)).mean(1) + s.c(y.roll(4, 1)).mean(1) + s.d(y).mean(1)  # noqa: E731
    net = Net(way, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1, groups=2), c=nn.Conv2d(8, 4, 1), d=nn.Conv2d(8, 4, 1))
    assert types(net, draw(2, 3, 4, 4), ["a", "b", "c", "d"]) == [0, 1, 2, 3, 4, 5, 1, 6]
    net.way = lambda s, x: s.b(y := s.a(x)).mean(1) + s.c(torch.cat(y.chunk(2, 1)[::-1], 1)).mean(1) + s.d(y).mean(1)
    assert types(net, draw(2, 3, 4, 4), ["a", "b", "c", "d"]) == [0, 1, 2, 3, 4, 5, 1, 6]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 8, 3, groups=8)]
)
def test_layers_that_treat_every_channel_for_itself_are_passed(norm):
    net = sequential(a=nn.Conv2d(3, 8, 3), norm=norm, b=nn.Conv2d(8, 4, 1))
    assert types(net, draw(2, 3, 8, 8), ["a", "b"]) == [0, 1, 1, 2]


def test_a_residual_stream_of_tokens_is_one_type():
    """Through layer norms, the values of attention, and what is added to one channel of all."""

    def way(s, x):
        h = s.embed(x)
        n = s.norm(h)
        q, k, v = (part.view(2, 5, 2, 4).transpose(1, 2) for part in (s.q(n), s.k(n), s.v(n)))
        h = h + s.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))
        return s.head((h + s.shift).mean(1))

    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "proj")}
    net = Net(way, embed=nn.Linear(6, 8), norm=settled(nn.LayerNorm(8)), **layers, head=nn.Linear(8, 3))
    net.shift = nn.Parameter(torch.rand(8))
    names = ["embed", "q", "k", "v", "proj", "head"]
    assert types(net, draw(2, 5, 6), names) == [0, 1, 1, 2, 1, 3, 1, 4, 4, 1, 1, 5]


def test_matrix_products_of_activations_mix():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(5, 2)

        def forward(self, x):
            return self.o(F.softmax(self.q(x) @ self.k(x).mT, -1))

    assert types(Attend(), torch.randn(2, 5, 6), ["q", "k", "o"]) == [0, 1, 2, 3, 4, 5]


class Rearranged(nn.Module):
    """A convolution whose channels arrive at a dense layer in another order."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 10), how

    def forward(self, x):
        return self.fc(self.how(F.relu(self.conv(x))).flatten(1))


def test_channels_that_arrive_in_another_order_are_types_of_their_own():
    ways = {
        "as they are": (lambda y: y, [0, 1, 1, 2]),
        "channels last": (lambda y: y.permute(0, 2, 3, 1), [0, 1, 2, 3]),
        "shuffled": (lambda y: y.view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6), [0, 1, 2, 3]),
        "flipped": (lambda y: y.flip(1), [0, 1, 2, 3]),
        "added to itself": (lambda y: y + y.flip(1), [0, 1, 2, 3]),
        "shuffled and back": (lambda y: F.channel_shuffle(F.channel_shuffle(y, 2), 4), [0, 1, 1, 2]),
        "padded": (lambda y: F.pad(F.max_pool2d(y, 2), (2, 1, 2, 1)), [0, 1, 1, 2]),
        "cumulated": (lambda y: y.cumsum(1), [0, 1, 2, 3]),
    }
    for name, (how, wanted) in ways.items():
        torch.manual_seed(0)
        assert types(Rearranged(how), torch.randn(2, 3, 6, 6), ["conv", "fc"]) == wanted, name


def test_tokens_and_channels_of_equal_number_are_not_mixed_up():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.tokens, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.tokens(self.embed(x).mT).mT)

    assert types(Mixer(), torch.randn(2, 8, 5), ["embed", "tokens", "out"]) == [0, 1, 2, 3, 4, 5]


def test_what_is_mixed_over_tokens_is_added_to_channels_that_stay_the_same():
    net, x, _ = wired.mixer()
    names = ["stem", "mix", "out", "wide", "back", "head"]
    assert types(net, x, names) == [0, 1, 2, 3, 3, 4, 1, 5, 5, 1, 1, 6]


def test_code_that_cannot_stand_what_is_not_a_number_is_not_shown_any():
    class Proud(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = torch.relu(self.a(x))
            if bool(y.isnan().any()):
                raise ValueError("not a number")
            return self.b(y)

    assert types(Proud(), torch.randn(2, 6), ["a", "b"]) == [0, 1, 1, 2]


class Wrapper(nn.Module):
    """Holds a layer, and something of its own."""

    def __init__(self, gain):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        if isinstance(gain, nn.Parameter):
            self.gain = gain
        else:
            self.register_buffer("gain", gain)

    def forward(self, x):
        return self.fc(F.relu(x) * self.gain)


@pytest.mark.parametrize(
    "gain", [torch.rand(16), nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(1, 16))], ids=["b", "p", "2d"]
)
def test_a_wrapper_with_tensors_of_its_own_leaves_its_output_to_the_layer_inside(gain):
    model = nn.Sequential(nn.Linear(16, 16), Wrapper(gain), nn.ReLU(), nn.Linear(16, 4)).eval()
    assert types(model, torch.randn(3, 16), ["0", "1.fc", "3"]) == [0, 1, 1, 2, 2, 3]


def test_hooks_of_the_user_and_single_channels_are_passed():
    model, x = case("hooked").make()
    assert types(model, x, ["fc1", "fc2", "fc3"]) == [0, 1, 1, 2, 2, 3]
    net = sequential(a=nn.Conv2d(3, 1, 1), flat=nn.Flatten(), b=nn.Linear(16, 1), c=nn.Linear(1, 2))
    assert types(net, draw(2, 3, 4, 4), ["a", "b", "c"]) == [0, 1, 1, 2, 2, 3]


def test_a_layer_that_only_other_inputs_reach_shares_its_channels_too():
    way = lambda s, x: s.c(s.b(s.a(x)) if x.mean() > 1 else s.d(s.a(x)))  # noqa: E731
    net = Net(way, a=nn.Linear(6, 8), b=nn.Linear(8, 7), d=nn.Linear(8, 7), c=nn.Linear(7, 2))
    assert types(net, draw(2, 6) + 3, ["a", "b", "d", "c"]) == [0, 1, 1, 2, 1, 2, 2, 3]
