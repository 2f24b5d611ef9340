"""Tiny nets of which some channels have to stay: each makes itself and an input."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from structure.wired import Net, chain, conv, draw, settled


def both_reach_the_output():
    return Net(lambda s, x: (s.a(x), s.b(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)), draw(2, 6)


def fixed_parts():
    def way(s, x):
        y, z = s.a(x).split([3, 5], 1)
        return s.c(y) + s.d(z)

    return Net(way, a=conv(3, 8), c=conv(3, 4), d=conv(5, 4)), draw(2, 3, 4, 4)


def sliced():
    return Net(lambda s, x: s.c(s.a(x)[:, :5]), a=conv(3, 8), c=conv(5, 4)), draw(2, 3, 4, 4)


def picked():
    return Net(lambda s, x: s.c(s.a(x)[:, [0, 2]]), a=conv(3, 8), c=conv(2, 4)), draw(2, 3, 4, 4)


def written_into_a_buffer():
    def way(s, x):
        y = torch.zeros(len(x), 8)
        y[:, :6] = s.a(x)
        return s.c(y)

    return Net(way, a=nn.Linear(6, 6), c=nn.Linear(8, 3)), draw(2, 6)


def tied():
    net = Net(lambda s, x: s.out(s.mid(s.embed(x))), embed=nn.Embedding(9, 8), mid=nn.Linear(8, 8))
    net.out = nn.Linear(8, 9, bias=False)
    net.out.weight = net.embed.weight
    return net, torch.arange(6).reshape(2, 3)


def recurrent():
    net = Net(lambda s, x: s.c(s.rnn(s.a(x))[0]), a=nn.Linear(6, 8), rnn=nn.LSTM(8, 7, batch_first=True))
    net.c = nn.Linear(7, 3)
    return net, draw(2, 4, 6)


def used_by_other_code():
    net = Net(lambda s, x: s.c(s.a(x)) * s.a.weight.norm(), a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    return net, draw(2, 6)


def scale_of_its_own():
    net = Net(lambda s, x: s.c(s.a(x) * s.scale), a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    net.scale = nn.Parameter(torch.rand(8))
    return net, draw(2, 6)


def softmax_over_them():
    return Net(lambda s, x: s.c(s.a(x).softmax(-1)), a=nn.Linear(6, 8), c=nn.Linear(8, 3)), draw(2, 6)


def mean_over_them():
    net = Net(lambda s, x: s.c(s.a(x) - s.a(x).mean(-1, keepdim=True)), a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    return net, draw(2, 6)


def functional_convolution():
    net = Net(lambda s, x: s.c(F.conv2d(s.a(x), s.kernel, groups=8)), a=conv(3, 8), c=conv(8, 4))
    net.kernel = nn.Parameter(torch.rand(8, 1, 3, 3))
    return net, draw(2, 3, 6, 6)


def grouped_transposed():
    return chain(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), 6)


def weight_normed():
    return chain(nn.utils.parametrizations.weight_norm(conv(8, 8)), 8)


def normalized_on_several_axes():
    return chain(settled(nn.LayerNorm([8, 4, 4])), 8)


def forward_of_its_own():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    return chain(Doubled(8, 8, 1), 8)


def rolled():
    return Net(lambda s, x: s.c(s.a(x).roll(1, 1)), a=conv(3, 8), c=conv(8, 4)), draw(2, 3, 4, 4)


def windows():
    return Net(lambda s, x: s.c(s.a(x).unfold(1, 2, 2).amax(-1)), a=conv(3, 8), c=conv(4, 4)), draw(2, 3, 4, 4)


def all_at_once():
    """Shuffled between grouped layers so that every group of the second reads of several of the first."""

    def way(s, x):
        y = s.a(x).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        return s.c(s.g(y))

    return Net(way, a=conv(6, 12, groups=3), g=conv(12, 12, groups=3), c=conv(12, 4)), draw(2, 6, 4, 4)


def across_positions():
    way = lambda s, x: s.head(s.mix(s.stem(x).transpose(1, 2)))  # noqa: E731
    return Net(way, stem=nn.Linear(5, 6), mix=nn.Linear(4, 8), head=nn.Linear(8, 3)), draw(2, 4, 5)


def queries_and_keys():
    way = lambda s, x: s.q(x) @ s.k(x).transpose(1, 2)  # noqa: E731
    return Net(way, q=nn.Linear(6, 8), k=nn.Linear(6, 8)), draw(2, 3, 6)


def norm_shared_with_the_input():
    way = lambda s, x: s.c(s.n(s.a(s.n(x))))  # noqa: E731
    return Net(way, a=nn.Linear(8, 8), n=settled(nn.BatchNorm1d(8)), c=nn.Linear(8, 3)), draw(4, 8)


def gated_by_one_channel():
    net = Net(lambda s, x: s.c(s.a(x) * s.gate(x)), a=conv(3, 8), gate=conv(3, 1), c=conv(8, 4))
    return net, draw(2, 3, 4, 4)
