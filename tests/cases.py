"""The shared nets, each declared once: what people really train, and every flavour of every layer."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import map_tensors, tensors


@dataclass(frozen=True)
class Case:
    """A net, the example that fixes how it is called, and batches like it.

    Attributes:
        name: what the test's id shows.
        build: makes the net; called with a fixed seed.
        inputs: makes the example (batch 2); called with a fixed seed.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]

    def make(self) -> tuple[nn.Module, Any]:
        """The net in eval mode, and its example."""
        with seeded(1):
            return self.build().eval(), self.inputs()

    def data(self, batches: int = 2, size: int = 8) -> list[Any]:
        """Batches with the structure of the example: normal floats, integers below the example's largest."""
        with seeded(2):
            example = self.inputs()
            return [map_tensors(lambda t: _like(t, size), example) for _ in range(batches)]

    def __str__(self) -> str:
        return self.name


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A fixed random state, undone afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _like(tensor: Tensor, size: int) -> Tensor:
    shape = (size, *tensor.shape[1:])
    if tensor.is_floating_point():
        return torch.randn(shape).to(tensor.dtype)
    if tensor.dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, int(tensor.max()) + 1, shape).to(tensor.dtype)


def sequential(**layers: nn.Module) -> nn.Sequential:
    """A Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


def settle(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Give the batch norms of a net statistics and scales that are not the identity."""
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn_like(inputs))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


# Whole nets.


def mlp() -> nn.Module:
    return sequential(
        fc1=nn.Linear(24, 48), act1=nn.ReLU(), fc2=nn.Linear(48, 32), act2=nn.GELU(), fc3=nn.Linear(32, 5)
    )


def vgg() -> nn.Module:
    net = sequential(
        conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(16),
        act1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 24, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(24),
        act2=nn.ReLU(inplace=True),
        pool2=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        drop=nn.Dropout(0.3),
        fc=nn.Linear(96, 10),
    )
    return settle(net, torch.randn(4, 3, 8, 8))


class Block(nn.Module):
    """A residual block with a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        return F.relu_(y)


def resnet() -> nn.Module:
    net = sequential(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        block1=Block(8, 8, 1),
        block2=Block(8, 16, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(16, 6),
    )
    return settle(net, torch.randn(4, 3, 8, 8))


class Inception(nn.Module):
    """Branches that are concatenated, then mixed; a channel shuffle in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(6, 8, 1)
        self.three = nn.Conv2d(6, 8, 3, padding=1)
        self.five = nn.Conv2d(6, 8, 5, padding=2)
        self.mix = nn.Conv2d(24, 12, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(branch(x)) for branch in (self.one, self.three, self.five)], 1)
        y = y.unflatten(1, (2, 12)).transpose(1, 2).flatten(1, 2)
        return self.fc(F.relu(self.mix(y)).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent encoder and a linear head on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = kind(10, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.body(x)
        return self.head(y[:, -1])


class Attention(nn.Module):
    """MultiheadAttention, of which torch reads `out_proj.weight` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        z, _ = self.attend(y, y, y)
        return self.head(y + z)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return sequential(embed=nn.Linear(6, 16), body=body, head=nn.Linear(16, 3))


class Tied(nn.Module):
    """A language model whose output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.mid = nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mid(self.embed(tokens))))


class Shared(nn.Module):
    """One layer called twice, one module under two names, one layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.conv
        self.unused = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.alias(F.relu(self.conv(x))).mean(1).flatten(1)
        return self.fc(self.twice(torch.relu(self.twice(y))))


class Keywords(nn.Module):
    """Keyword inputs and a dict of outputs, one of them an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.image = nn.Linear(12, 16)
        self.fc = nn.Linear(16, 9)

    def forward(self, *, tokens: Tensor, image: Tensor) -> dict[str, Tensor]:
        y = self.embed(tokens).mean(1) + self.image(image)
        scores = self.fc(torch.relu(y))
        return {"scores": scores, "hidden": y, "best": scores.argmax(-1)}


class OneDict(nn.Module):
    """One positional argument that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.fc(batch["left"]) * batch["right"]
        return y, y.sum(-1)


class TwoInputs(nn.Module):
    """Positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(10, 14)
        self.right = nn.Linear(6, 14)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * torch.sigmoid(self.right(b))


class ReadsWeight(nn.Module):
    """Code that reads the weight of a layer besides calling it, or instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(16, 16)
        self.uncalled = nn.Linear(16, 16)
        self.plain = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.called(x) / self.called.weight.norm()
        return self.plain(torch.relu(F.linear(y, self.uncalled.weight, self.uncalled.bias)))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return sequential(
            conv=nn.utils.weight_norm(nn.Conv1d(8, 12, 3)), act=nn.ReLU(), plain=nn.Conv1d(12, 12, 5, padding=2)
        )


def new_weight_norm() -> nn.Module:
    return sequential(
        conv=parametrizations.weight_norm(nn.Conv1d(8, 12, 3)), act=nn.ReLU(), plain=nn.Conv1d(12, 12, 5, padding=2)
    )


class InputsFirst(nn.Module):
    """A linear layer that holds its weight as (inputs, outputs), as transformers' Conv1D does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.width = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.width)


class Multiplied(nn.Module):
    """Weights that code multiplies by: of a layer, in slices, with an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slices = nn.Linear(16, 16), nn.Parameter(torch.randn(32, 16) / 4)
        self.heads, self.last = nn.Parameter(torch.randn(2, 8, 12) / 4), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.slices.chunk(2)
        x = F.linear(x, self.first.weight, self.first.bias).relu()
        x = torch.sigmoid(x @ gate.T) * F.linear(x, values)
        return F.linear(torch.einsum("bnhk,hkd->bnd", x.unflatten(-1, (2, 8)), self.heads), self.last.weight)


def own_linear() -> nn.Module:
    return sequential(turned=InputsFirst(16, 24), act=nn.ReLU(), square=InputsFirst(24, 24), plain=nn.Linear(24, 12))


class StandardConv(nn.Conv2d):
    """A convolution whose weight is standardized at every call and scaled by a gain, and that pads by the size."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        normed = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5) * self.gain[:, None]
        pads = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        weight = normed.reshape(self.weight.shape) / normed.shape[1] ** 0.5
        return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)


def own_conv() -> nn.Module:
    return sequential(
        odd=StandardConv(4, 12, 3), act=nn.ReLU(), strided=StandardConv(12, 12, 3, stride=2), plain=nn.Conv2d(12, 8, 3)
    )


def spectral_norm() -> nn.Module:
    return sequential(normed=parametrizations.spectral_norm(nn.Linear(16, 16)), act=nn.ReLU(), plain=nn.Linear(16, 12))


def pruned() -> nn.Module:
    net = sequential(masked=nn.Linear(24, 24), act=nn.ReLU(), plain=nn.Linear(24, 12))
    prune.l1_unstructured(net.masked, "weight", 0.5)
    return net


def frozen() -> nn.Module:
    net = mlp()
    net.fc1.requires_grad_(requires_grad=False)
    net.fc2.bias.requires_grad_(requires_grad=False)
    return net


def frozen_weight() -> nn.Module:
    net = mlp()
    net.fc1.weight.requires_grad_(requires_grad=False)
    return net


class CountCalls:
    """A user's forward hook, with a memory; copies of a hooked model share it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * 2

    def __deepcopy__(self, memo: dict[int, Any]) -> CountCalls:
        return self


def hooked() -> nn.Module:
    net = mlp()
    net.fc1.register_forward_hook(CountCalls())
    net.fc2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


class Everything(nn.Module):
    """What breaks other tools, in one net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = Block(16, 16, 1)  # residual add
        self.one, self.three = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)  # concatenation
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.normed = parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
        self.embed = nn.Embedding(24, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encode = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.mix = nn.Linear(16, 16)
        self.classes = nn.Linear(16, 10)
        self.out = nn.Linear(16, 24, bias=False)
        self.out.weight = self.embed.weight  # tied
        self.spare = nn.Linear(16, 16)  # never called

    def forward(self, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        x = self.block(F.relu(self.stem(image), inplace=True))
        x = torch.cat([self.one(x), self.three(x)], 1)
        x = F.relu(self.normed(self.up(F.relu(self.grouped(x)))))
        seen = x.mean((2, 3))
        y, _ = self.lstm(self.embed(tokens))
        z, _ = self.attend(y, y, y, need_weights=False)
        y = self.encode(y + z) + seen[:, None]
        y = torch.tanh(self.mix(y))
        return {"classes": self.classes(seen), "next": self.out(y)}


def with_weight(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """The layer with a changed weight."""
    with torch.no_grad():
        layer.weight.copy_(change(layer.weight))
    return layer


def rank_one(weight: Tensor) -> Tensor:
    """An outer product of one vector per axis."""
    result = torch.ones(())
    for size in weight.shape:
        result = torch.tensordot(result, torch.randn(size), 0)
    return result


def degenerate() -> nn.Module:
    """Zero, rank-1 and 1x1 weights."""
    return sequential(
        zero=with_weight(nn.Conv2d(4, 8, 3, padding=1), torch.zeros_like),
        rank1=with_weight(nn.Conv2d(8, 8, 3, padding=1), rank_one),
        narrow=nn.Conv2d(8, 1, 1),
        scalar=nn.Conv2d(1, 1, 1),
        flat=nn.Flatten(),
        zero_fc=with_weight(nn.Linear(25, 12), torch.zeros_like),
        rank1_fc=with_weight(nn.Linear(12, 12), rank_one),
        one=nn.Linear(12, 1),
        last=nn.Linear(1, 1),
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A maker of normal inputs."""
    return lambda: torch.randn(shape).to(dtype)


def tokens(high: int, *shape: int) -> Tensor:
    """Integer inputs below `high`, the largest of them present."""
    return torch.randint(0, high, shape).index_put_((torch.tensor(0),) * len(shape), torch.tensor(high - 1))


NETS = (
    Case("mlp", mlp, randn(2, 24)),
    Case("vgg", vgg, randn(2, 3, 8, 8)),
    Case("resnet", resnet, randn(2, 3, 8, 8)),
    Case("inception", Inception, randn(2, 6, 6, 6)),
    Case("lstm", lambda: Recurrent(nn.LSTM), randn(2, 5, 10)),
    Case("gru", lambda: Recurrent(nn.GRU), randn(2, 5, 10)),
    Case("attention", Attention, randn(2, 5, 6)),
    Case("encoder_layer", encoder_layer, randn(2, 5, 16)),
    Case("encoder", encoder, randn(2, 5, 6)),
    Case("weight_norm", new_weight_norm, randn(2, 8, 10)),
    Case("weight_norm_hook", old_weight_norm, randn(2, 8, 10)),
    Case("spectral_norm", spectral_norm, randn(2, 16)),
    Case("own_linear", own_linear, randn(2, 3, 16)),
    Case("multiplied", Multiplied, randn(2, 3, 16)),
    Case("own_conv", own_conv, randn(2, 4, 9, 10)),
    Case("tied", Tied, lambda: tokens(20, 2, 6)),
    Case("shared", Shared, randn(2, 4, 4, 4)),
    Case("keywords", Keywords, lambda: {"tokens": tokens(30, 2, 5), "image": torch.randn(2, 12)}),
    Case("one_dict", OneDict, lambda: {"left": torch.randn(2, 12), "right": torch.randn(2, 8)}),
    Case("two_inputs", TwoInputs, lambda: (torch.randn(2, 10), torch.randn(2, 6))),
    Case("reads_weight", ReadsWeight, randn(2, 16)),
    Case("pruned", pruned, randn(2, 24)),
    Case("frozen", frozen, randn(2, 24)),
    Case("frozen_weight", frozen_weight, randn(2, 24)),
    Case("hooked", hooked, randn(2, 24)),
    Case("float16", lambda: mlp().half(), randn(2, 24, dtype=torch.float16)),
    Case("bfloat16", lambda: vgg().bfloat16(), randn(2, 3, 8, 8, dtype=torch.bfloat16)),
    Case("float64", lambda: vgg().double(), randn(2, 3, 8, 8, dtype=torch.float64)),
    Case("linear_3d", lambda: sequential(fc=nn.Linear(12, 10), out=nn.Linear(10, 6)), randn(2, 7, 12)),
    Case("degenerate", degenerate, randn(2, 4, 5, 5)),
    Case(
        "transposed",
        lambda: sequential(down=nn.Conv2d(4, 8, 3, 2, 1), up=nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)),
        randn(2, 4, 8, 8),
    ),
    Case("everything", Everything, lambda: {"image": torch.randn(2, 3, 12, 12), "tokens": tokens(24, 2, 6)}),
)


# Every flavour of convolution, one layer a net.

KERNEL, SIZE = 3, {1: (11,), 2: (9, 8), 3: (6, 5, 7)}
FLAVOURS: dict[str, dict[str, Any]] = {
    "default": {},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "same": {"padding": "same"},
    "same_even": {"kernel_size": 4, "padding": "same"},
    "same_even_dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "dilation": {"dilation": 2, "padding": 1},
    "no_bias": {"bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular_same_even": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "groups": {"groups": 2, "padding": 1},
    "groups_reflect": {"groups": 4, "padding": 1, "padding_mode": "reflect", "stride": 2, "bias": False},
    "depthwise": {"out_channels": 8, "groups": 8, "padding": 1},
    "depthwise_multiplied": {"out_channels": 16, "groups": 8},
    "one_by_one": {"kernel_size": 1},
    "one_by_one_stride": {"kernel_size": 1, "stride": 2, "bias": False},
    "one_by_one_padding": {"kernel_size": 1, "padding": 1},
    "one_by_one_groups": {"kernel_size": 1, "groups": 2},
}
RECTANGULAR: dict[str, dict[str, Any]] = {
    "1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "7x1": {"kernel_size": (7, 1), "padding": (3, 0)},
    "5x3": {"kernel_size": (5, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "5x3_groups_circular": {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "circular", "groups": 2},
    "2x4_same": {"kernel_size": (2, 4), "padding": "same"},
}


def conv(dims: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32, /, **flavour: Any) -> Case:
    """A net of one convolution of 8 channels in and 12 out; `flavour` overrides its arguments."""
    name = flavour.pop("name")
    arguments = {"in_channels": 8, "out_channels": 12, "kernel_size": KERNEL} | flavour
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return Case(
        f"conv{dims}d_{name}", lambda: sequential(conv=kind(**arguments)).to(dtype), randn(2, 8, *size, dtype=dtype)
    )


CONVS = (
    *(conv(dims, SIZE[dims], name=name, **flavour) for dims in (1, 2, 3) for name, flavour in FLAVOURS.items()),
    *(conv(2, SIZE[2], name=name, **flavour) for name, flavour in RECTANGULAR.items()),
    conv(3, SIZE[3], name="3x1x2", kernel_size=(3, 1, 2), padding=(1, 0, 1)),
    conv(1, (3,), name="larger_than_input", kernel_size=7, padding=3),
    conv(1, (3,), name="larger_than_input_stride", kernel_size=9, padding=4, stride=2),
    conv(2, (3, 3), name="larger_than_input", kernel_size=5, padding=2),
    conv(2, (2, 3), name="larger_than_input_same", kernel_size=6, padding="same"),
    conv(3, (2, 2, 2), name="larger_than_input", kernel_size=3, padding=1),
    conv(2, SIZE[2], torch.float64, name="float64", padding=1),
    conv(2, SIZE[2], torch.float64, name="float64_groups", padding=1, groups=2),
    conv(1, SIZE[1], torch.float64, name="float64", padding=1),
    conv(2, (1, 1), name="one_pixel", padding=1),
)
LINEARS = (
    Case("linear", lambda: sequential(fc=nn.Linear(16, 12)), randn(2, 16)),
    Case("linear_wide", lambda: sequential(fc=nn.Linear(12, 40, bias=False)), randn(2, 12)),
    Case(
        "linear_float64",
        lambda: sequential(fc=nn.Linear(16, 12)).double(),
        randn(2, 16, dtype=torch.float64),
    ),
)
LAYERS = CONVS + LINEARS
CASES = NETS + LAYERS


def case(name: str) -> Case:
    """The case of that name."""
    return next(one for one in CASES if one.name == name)


# What must not change.


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that somebody could notice: bits, layout, flags, hooks, gradients, identity of modules."""
    tensors = [(f"parameter {name}", t) for name, t in model.named_parameters(remove_duplicate=False)]
    tensors += [(f"buffer {name}", t) for name, t in model.named_buffers(remove_duplicate=False)]
    found: dict[str, Any] = {
        name: (bits(t), t.dtype, t.shape, t.stride(), t.data_ptr(), t.requires_grad, t.grad is None, type(t), id(t))
        for name, t in tensors
    }
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [list(value) for key, value in vars(module).items() if key.endswith(("_hooks", "_hooks_with_kwargs"))]
        found[f"module {name}"] = (id(module), type(module), module.training, hooks, sorted(vars(module)))
    return found


def bits(tensor: Tensor) -> bytes:
    """The values of a tensor, exactly."""
    return tensor.detach().contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype).numpy().tobytes()


def surroundings() -> dict[str, Any]:
    """The global state of torch, numpy and Python that a library must leave alone."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy global state is what must not move
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (kind, keys.tobytes(), *rest),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that neither the model nor any global state is different afterwards, also after an error."""
    before, around = state(model), surroundings()
    try:
        yield
    finally:
        after = state(model)
        changed = [key for key in before if before[key] != after.get(key)] + [key for key in after if key not in before]
        assert not changed, f"changed: {changed}"
        assert surroundings() == around


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The output's tensors, in eval mode, called as `example` says."""
    with evaluating(model), torch.no_grad():
        return [t.clone() for t in tensors(Example(model, example).run(model))]


def macs(model: nn.Module, example: Any) -> int:
    """Half of torch's FlopCounterMode over the batch, with vectors, without fused attention: an oracle of its own."""
    return macs_by_module(model, example)[""]


def macs_by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """The same of every module; "" is the whole."""
    lacking = dict.fromkeys((torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten.vdot), _vector_flops)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=lacking) as counter:
            run(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    whole = type(model).__name__
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return {"": counts.get("Global", 0)} | {
        name.removeprefix(f"{whole}."): count for name, count in counts.items() if name.startswith(f"{whole}.")
    }


def _vector_flops(a: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel()
