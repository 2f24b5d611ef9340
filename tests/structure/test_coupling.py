"""Which layers share their channels."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import case, sequential
from taut.calls import Example
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
