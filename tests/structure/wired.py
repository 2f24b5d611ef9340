"""Tiny nets whose coupled channels are known: each makes itself, an input, and its groups where some go."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, way, **layers):
        super().__init__()
        self.way = way
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.way(self, *inputs)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def conv(inputs, outputs, kernel=3, **settings):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def settled(norm):
    """A norm that is not the identity."""
    for tensor in (norm.weight, norm.bias, getattr(norm, "running_mean", None), getattr(norm, "running_var", None)):
        if tensor is not None:
            with torch.no_grad():
                tensor.uniform_(0.5, 1.5)
    return norm


def chain(middle, width):
    """A convolution, something behind it, and one that reads `width` channels."""
    return Net(lambda s, x: s.c(s.middle(s.a(x))), a=conv(3, 8), middle=middle, c=conv(width, 4)), draw(2, 3, 4, 4)


def sequential():
    way = lambda s, x: s.c(F.max_pool2d(s.b(F.relu(s.n(s.a(x)))), 2).flatten(1))  # noqa: E731
    net = Net(way, a=conv(3, 8), n=settled(nn.BatchNorm2d(8)), b=conv(8, 6, 1), c=nn.Linear(24, 5))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out b.in n.through"), "b": (6, "b.out c.in*4")}


def channels_last_flattened():
    net = Net(lambda s, x: s.c(s.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 6), c=nn.Linear(24, 5))
    return net, draw(2, 3, 2, 2), {"a": (6, "a.out c.in*4")}


def residual():
    way = lambda s, x: s.head((h := F.relu(s.stem(x))) + s.b(F.relu(s.a(h))))  # noqa: E731
    net = Net(way, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"stem": (8, "a.in b.out head.in stem.out"), "a": (6, "a.out b.in")}


def residual_by_1x1():
    way = lambda s, x: s.head(F.relu(s.short(h := s.stem(x)) + s.b(h)))  # noqa: E731
    net = Net(way, stem=conv(3, 4), short=conv(4, 8, 1), b=conv(4, 8), head=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"stem": (4, "b.in short.in stem.out"), "short": (8, "b.out head.in short.out")}


def in_place_sum():
    def way(s, x):
        y = s.a(x)
        y += s.b(x)
        return s.head(F.relu_(y))

    net = Net(way, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out b.out head.in")}


def concatenation():
    net = Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 4), b=conv(3, 6, 1), c=conv(10, 4))
    return net, draw(2, 3, 4, 4), {"a": (4, "a.out c.in"), "b": (6, "b.out c.in")}


def dense_block():
    way = lambda s, x: s.c(torch.cat([h := s.a(x), s.b(s.n(h))], 1))  # noqa: E731
    net = Net(way, a=conv(3, 4), n=settled(nn.BatchNorm2d(4)), b=conv(4, 6), c=conv(10, 4))
    return net, draw(2, 3, 4, 4), {"a": (4, "a.out b.in c.in n.through"), "b": (6, "b.out c.in")}


def grouped():
    net = Net(lambda s, x: s.c(s.g(s.a(x))), a=conv(3, 8), g=conv(8, 12, groups=2), c=conv(12, 4))
    return net, draw(2, 3, 4, 4), {"a": (4, "a.out*2 g.in*2"), "g": (6, "c.in*2 g.out*2")}


def depthwise():
    return *chain(conv(8, 8, groups=8), 8), {"a": (8, "a.out c.in middle.through")}


def depthwise_with_multiplier():
    return *chain(conv(8, 16, groups=8), 16), {"a": (8, "a.out c.in*2 middle.through*2")}


def transposed():
    middle = nn.ConvTranspose2d(8, 6, 2, stride=2)
    return *chain(middle, 6), {"a": (8, "a.out middle.in"), "middle": (6, "c.in middle.out")}


def depthwise_transposed():
    return *chain(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), 8), {"a": (8, "a.out c.in middle.through")}


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), draw(2, 3, 8)


def group_norm():
    return *chain(settled(nn.GroupNorm(2, 8)), 8), {"a": (4, "a.out*2 c.in*2 middle.through*2")}


def norm_without_affine():
    norm = nn.BatchNorm2d(8, affine=False)
    norm.running_mean.uniform_(0.5, 1.5)
    return *chain(norm, 8), {"a": (8, "a.out c.in middle.through")}


def instance_norm():
    return *chain(settled(nn.InstanceNorm2d(8, affine=True)), 8), {"a": (8, "a.out c.in middle.through")}


def prelu():
    return *chain(nn.PReLU(8), 8), {"a": (8, "a.out c.in middle.through")}


def prelu_of_one():
    return *chain(nn.PReLU(), 8), {"a": (8, "a.out c.in")}


def pixel_shuffle():
    return *chain(nn.PixelShuffle(2), 2), {"a": (2, "a.out*4 c.in")}


def pixel_unshuffle():
    return *chain(nn.PixelUnshuffle(2), 32), {"a": (8, "a.out c.in*4")}


def channel_shuffle():
    def way(s, x):
        y = s.a(x)
        b, c, h, w = y.shape
        return s.c(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    return Net(way, a=conv(3, 8), c=conv(8, 4)), draw(2, 3, 4, 4), {"a": (4, "a.out*2 c.in*2")}


def chunks():
    def way(s, x):
        y, z = s.a(x).chunk(2, 1)
        return s.c(torch.tanh(y) * torch.sigmoid(z))

    return Net(way, a=conv(3, 8), c=conv(4, 4)), draw(2, 3, 4, 4), {"a": (4, "a.out*2 c.in")}


def glu():
    net = Net(lambda s, x: s.c(F.glu(s.a(x), 1)), a=conv(3, 8), c=conv(4, 4))
    return net, draw(2, 3, 4, 4), {"a": (4, "a.out*2 c.in")}


def squeeze_and_excitation():
    def way(s, x):
        y = s.a(x)
        weight = torch.sigmoid(s.up(F.relu(s.down(y.mean((2, 3))))))
        return s.c(y * weight[:, :, None, None])

    net = Net(way, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), c=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out c.in down.in up.out"), "down": (4, "down.out up.in")}


def fused_attention():
    def way(s, x):
        b, n, _ = x.shape
        q, k, v = s.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return s.proj(y.transpose(1, 2).reshape(b, n, -1))

    net = Net(way, qkv=nn.Linear(6, 24), proj=nn.Linear(8, 5))
    return net, draw(2, 3, 6), {"qkv": (4, "proj.in*2 qkv.out*6")}


def heads_of_open_number():
    """More heads than channels in each: the code leaves open how many."""

    def way(s, x):
        b, n, _ = x.shape
        q, k, v = (make(x).view(b, n, -1, 2).transpose(1, 2) for make in (s.q, s.k, s.v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return s.proj(y.transpose(1, 2).flatten(2))

    return Net(way, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), proj=nn.Linear(8, 5)), draw(2, 3, 6)


def pruned_heads():
    return *heads_of_open_number(), {"q": (4, "k.out*2 proj.in*2 q.out*2 v.out*2")}


def channels_of_open_number():
    """Fewer channels in each head than heads, but the code leaves their number open."""

    def way(s, x):
        b, n, _ = x.shape
        return s.proj(torch.tanh(s.v(x).view(b, n, 4, -1)).flatten(2))

    return Net(way, v=nn.Linear(6, 8), proj=nn.Linear(8, 5)), draw(2, 3, 6), {"v": (2, "proj.in*4 v.out*4")}


def shifted_over_space():
    net = Net(lambda s, x: s.c(s.a(x).roll(1, 2).unfold(3, 2, 2).flatten(3)), a=conv(3, 8), c=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out c.in")}


def flipped():
    net = Net(lambda s, x: s.c(torch.cat([s.a(x), s.a(x).flip(1)], 1)), a=conv(3, 8), c=conv(16, 4))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out c.in*2")}


def zero_padded_shortcut():
    """What is padded stays; what it is padded to may go, on both ways at once."""
    way = lambda s, x: s.head(F.pad(h := s.stem(x), (0, 0, 0, 0, 2, 2)) + s.b(F.relu(s.a(h))))  # noqa: E731
    net = Net(way, stem=conv(3, 4), a=conv(4, 6), b=conv(6, 8), head=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"stem": (4, "a.in b.out head.in stem.out"), "a": (6, "a.out b.in")}


def outer_product():
    way = lambda s, x: s.c((s.a(x)[:, :, None] * s.b(x)[:, None]).flatten(1))  # noqa: E731
    net = Net(way, a=nn.Linear(6, 4), b=nn.Linear(6, 5), c=nn.Linear(20, 3))
    return net, draw(2, 6), {"b": (5, "b.out c.in*4")}


def mixer():
    def way(s, x):
        x = s.stem(x)
        x = x + s.out(F.gelu(s.mix(x.transpose(1, 2)))).transpose(1, 2)
        return s.head(x + s.back(F.gelu(s.wide(x))))

    net = Net(
        way,
        stem=nn.Linear(5, 6),
        mix=nn.Linear(4, 8),
        out=nn.Linear(8, 4),
        wide=nn.Linear(6, 10),
        back=nn.Linear(10, 6),
        head=nn.Linear(6, 3),
    )
    return net, draw(2, 4, 5), {"mix": (8, "mix.out out.in"), "wide": (10, "back.in wide.out")}


def shared_tower():
    net = Net(lambda s, x: s.c((s.b(F.relu(s.a(x[:, 0]))) - s.b(F.relu(s.a(x[:, 1])))).abs()))
    net.a, net.b, net.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 2)
    return net, draw(2, 2, 6), {"a": (8, "a.out b.in"), "b": (7, "b.out c.in")}


def called_on_itself():
    net = Net(lambda s, x: s.c(F.relu(s.twice(F.relu(s.twice(s.a(x)))))))
    net.a, net.twice, net.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    return net, draw(2, 6), {"a": (8, "a.out c.in twice.in twice.out")}


def two_names():
    net = Net(lambda s, x: s.c(s.other(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 7), c=nn.Linear(7, 3))
    net.other = net.b
    return net, draw(2, 6), {"a": (8, "a.out b.in"), "b": (7, "b.out c.in")}


def embedding():
    net = Net(lambda s, x: s.c(s.embed(x).mean(1)), embed=nn.Embedding(9, 8), c=nn.Linear(8, 3))
    return net, torch.arange(6).reshape(2, 3), {"embed": (8, "c.in embed.out")}


def several_branches():
    def way(s, x):
        y = torch.stack([s.a(x), s.b(x)], 1)
        return s.c((y * y.mean((3, 4), keepdim=True).softmax(1)).sum(1))

    net = Net(way, a=conv(3, 8), b=conv(3, 8, 1), c=conv(8, 4))
    return net, draw(2, 3, 4, 4), {"a": (8, "a.out b.out c.in")}


def u_net():
    def way(s, x):
        down = s.a(x)
        up = s.up(F.relu(s.b(F.max_pool2d(down, 2))))
        return s.c(torch.cat([down, up], 1))

    net = Net(way, a=conv(3, 4), b=conv(4, 8), up=nn.ConvTranspose2d(8, 6, 2, 2), c=conv(10, 2))
    return net, draw(2, 3, 4, 4), {"a": (4, "a.out b.in c.in"), "b": (8, "b.out up.in"), "up": (6, "c.in up.out")}


def one_by_one(way, x, **layers):
    """Layers that are handed samples without an axis of samples."""
    return Net(lambda s, x: torch.stack([way(s, sample) for sample in x]), **layers), x


def vectors():
    net, x = one_by_one(lambda s, v: s.c(F.relu(s.a(v))), draw(3, 6), a=nn.Linear(6, 8), c=nn.Linear(8, 4))
    return net, x, {"a": (8, "a.out c.in")}


def vectors_and_rows():
    net = Net(lambda s, x: s.b(s.a(x)) + s.c(s.a(x).mean(0)), a=nn.Linear(6, 8), b=nn.Linear(8, 4), c=nn.Linear(8, 4))
    return net, draw(3, 6), {"a": (8, "a.out b.in c.in")}


def vector_of_one_slope():
    way = lambda s, v: s.c(s.slope(s.a(v)))  # noqa: E731
    net, x = one_by_one(way, draw(3, 6), a=nn.Linear(6, 8), slope=nn.PReLU(), c=nn.Linear(8, 4))
    return net, x, {"a": (8, "a.out c.in")}


def unbatched():
    way = lambda s, x: s.c(F.relu(s.d(s.n(s.a(x)))))  # noqa: E731
    layers = {"n": settled(nn.InstanceNorm2d(8, affine=True)), "d": conv(8, 8, groups=8)}
    net, x = one_by_one(way, draw(2, 3, 4, 4), a=conv(3, 8), c=conv(8, 4), **layers)
    return net, x, {"a": (8, "a.out c.in d.through n.through")}


def unbatched_in_one_dimension():
    way = lambda s, x: s.c(F.relu(s.n(s.a(x))))  # noqa: E731
    layers = {"a": nn.Conv1d(3, 8, 3), "n": settled(nn.InstanceNorm1d(8, affine=True))}
    net, x = one_by_one(way, draw(2, 3, 6), c=nn.ConvTranspose1d(8, 4, 3), **layers)
    return net, x, {"a": (8, "a.out c.in n.through")}


def word_by_word():
    net = Net(lambda s, x: torch.stack([s.c(s.embed(word)) for word in x]), embed=nn.Embedding(9, 8), c=nn.Linear(8, 3))
    return net, torch.arange(6), {"embed": (8, "c.in embed.out")}


KNOWN = (
    vectors,
    vectors_and_rows,
    vector_of_one_slope,
    unbatched,
    unbatched_in_one_dimension,
    word_by_word,
    sequential,
    channels_last_flattened,
    residual,
    residual_by_1x1,
    in_place_sum,
    concatenation,
    dense_block,
    grouped,
    depthwise,
    depthwise_with_multiplier,
    transposed,
    depthwise_transposed,
    norm_without_affine,
    instance_norm,
    prelu,
    prelu_of_one,
    pixel_shuffle,
    pixel_unshuffle,
    channel_shuffle,
    chunks,
    glu,
    squeeze_and_excitation,
    fused_attention,
    pruned_heads,
    channels_of_open_number,
    shifted_over_space,
    flipped,
    zero_padded_shortcut,
    outer_product,
    mixer,
    shared_tower,
    called_on_itself,
    two_names,
    embedding,
    several_branches,
    u_net,
)
"""All channels that can go in them."""
