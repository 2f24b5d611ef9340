"""Which layers share their channels."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import case, sequential
from taut.core.example import Example
from taut.structure.coupling import couple


def types(model, x, names):
    return couple(model.eval(), Example(model, x), names)


def test_a_chain():
    net = sequential(a=nn.Linear(6, 8), r=nn.ReLU(), b=nn.Linear(8, 7), d=nn.Dropout(0.5), c=nn.Linear(7, 3))
    assert types(net, torch.randn(2, 6), ["a", "b", "c"]) == [0, 1, 1, 2, 2, 3]


def test_batch_norm_pooling_and_flatten_are_passed():
    model, example = case("vgg").make()
    assert types(model, example, ["conv1", "conv2", "fc"]) == [0, 1, 1, 2, 2, 3]


def test_a_residual_sum_is_one_type():
    model, example = case("resnet").make()
    names = ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.short", "fc"]
    found = types(model, example, names)
    stem, c1, c2, d1, d2, short, fc = zip(found[::2], found[1::2], strict=True)
    assert stem[1] == c1[0] == c2[1] == d1[0] == short[0]
    assert c1[1] == c2[0]
    assert d2[1] == short[1] == fc[0]
    assert len(set(found)) == 6


def test_concatenated_channels_are_types_of_their_own():
    model, example = case("inception").make()
    found = types(model, example, ["one", "three", "five", "mix", "fc"])
    assert found[6] not in found[:6]
    assert found[7] == found[8]


def test_a_layer_left_out_breaks_the_chain():
    net = sequential(a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    assert types(net, torch.randn(2, 6), ["a", "c"]) == [0, 1, 2, 3]


def test_grouped_convolutions_stand_alone():
    net = sequential(a=nn.Conv1d(4, 8, 3), b=nn.Conv1d(8, 8, 3, groups=2), c=nn.Conv1d(8, 2, 1))
    assert types(net, torch.randn(2, 4, 12), ["a", "b", "c"]) == [0, 1, 2, 3, 4, 5]


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
        "padded": (lambda y: F.pad(F.max_pool2d(y, 2), (2, 1, 2, 1)), [0, 1, 1, 2]),
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


def test_code_that_cannot_stand_what_is_not_a_number_couples_nothing():
    class Proud(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = torch.relu(self.a(x))
            if bool(y.isnan().any()):
                raise ValueError("not a number")
            return self.b(y)

    assert types(Proud(), torch.randn(2, 6), ["a", "b"]) == [0, 1, 2, 3]
