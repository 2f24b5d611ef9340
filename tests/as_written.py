"""Random nets as people write them: what a block does with its layers, how the net is called, what it returns."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.nn.utils import parametrizations

from cases import seeded

WIDE = 12
"""The width that code of fixed views is written for."""

CLASSES = 5


class World(NamedTuple):
    """Where channels are, and what mixes them."""

    dim: int
    layer: Callable[[int, int], nn.Module]
    places: tuple[int, ...]


WORLDS = {
    "linear": World(-1, nn.Linear, (3,)),
    "conv1d": World(1, lambda i, o: nn.Conv1d(i, o, 3, padding=1), (6,)),
    "conv2d": World(1, lambda i, o: nn.Conv2d(i, o, 3, padding=1), (4, 4)),
}


class Block(nn.Module):
    """Two layers, and what most blocks need."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dim = world.dim
        self.first, self.second = world.layer(inputs, outputs), world.layer(outputs, outputs)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).tanh()


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += self.second(y.relu())
        return y.relu()


class Untrainable(Block):
    """Overwrites what the gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y += self.second(y)
        return y


class Concat(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([y.relu(), self.second(y)], self.dim)


class Split(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        a, b = y.split([y.shape[self.dim] // 2, y.shape[self.dim] - y.shape[self.dim] // 2], self.dim)
        return self.second(torch.cat([b.relu(), a], self.dim))


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([self.first(x), self.second(self.first(x))], self.dim).chunk(2, self.dim)
        return a * b.sigmoid()


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).mul_(0.5).add_(0.1).relu_()
        out = self.second(y)
        out[:, :1] *= 2
        return F.leaky_relu(out, inplace=True)


class FixedView(Block):
    """Heads of a width that stands in the code."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        self.third = world.layer(outputs, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.second(self.first(x).relu()))
        y = y if self.dim == -1 else y.movedim(1, -1)
        y = (y.reshape(len(y), -1, 3, 4).softmax(-1) * y.reshape(len(y), -1, 3, 4)).reshape(y.shape)
        return y if self.dim == -1 else y.movedim(-1, 1)


class Kinds(nn.Module):
    """Walks over its layers and asks what they are."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([world.layer(inputs, outputs), nn.Tanh(), world.layer(outputs, outputs)])
        self.last = world.layer(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
            if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear):
                x = x.relu() - 0.1
        return self.last(x) if type(self.last).__name__ != "Sequential" else x


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return self.second(y.tanh())


class Tied(Block):
    """Two layers with one weight."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        self.third = world.layer(outputs, outputs)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).tanh())


class Reads(Block):
    """Looks at attributes of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.to(self.first.weight.dtype))
        steps = getattr(self.first, "stride", (1,))[0]
        width = getattr(self.second, "out_features", getattr(self.second, "out_channels", 0))
        y = self.second(y.relu()) * steps / width**0.5
        return y if self.second.bias is None else y.to(self.second.bias.device)


class Unused(Block):
    """Layers and parameters that nothing calls."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        self.never, self.act = world.layer(outputs, outputs), nn.PReLU(outputs)
        self.bare = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) if self.training or len(x) else self.never(x)


class Normed(Block):
    """Weights that are made anew for every run."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        parametrizations.weight_norm(self.first)
        parametrizations.spectral_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class OldNormed(Block):
    """The same in the way that is deprecated."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Stored(Block):
    """Keeps what it computed, and adds it from there."""

    def __init__(self, world: World, inputs: int, outputs: int) -> None:
        super().__init__(world, inputs, outputs)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["first"] = [self.first(x)]
        return self.second(self.seen["first"][0].relu()) + self.seen["first"][0]


BLOCKS: dict[str, type[nn.Module]] = {
    block.__name__: block
    for block in (
        Plain,
        Residual,
        Untrainable,
        Concat,
        Split,
        Gated,
        InPlace,
        FixedView,
        Kinds,
        Twice,
        Tied,
        Reads,
        Unused,
        Normed,
        OldNormed,
        Stored,
    )
}
CALLS = ("tensor", "in place", "tuple", "keywords", "one dict", "nested", "labels", "labels in batches", "targets")
RETURNS = ("tensor", "tuple", "dict", "list", "nested", "ordered")


class Written(nn.Module):
    """Blocks and a head, behind what the call asks for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, world = shape, WORLDS[shape.world]
        blocks, width = [], shape.inputs
        for name, outputs in shape.blocks:
            blocks.append(BLOCKS[name](world, width, outputs))
            width = {"Concat": 2 * outputs, "FixedView": WIDE}.get(name, outputs)
        self.blocks = nn.ModuleList(blocks)
        flat = width * torch.Size(world.places).numel()
        self.flat = flat if shape.flat else 0
        self.head = nn.Linear(flat if shape.flat else width, CLASSES)

    def forward(self, x: Any = None, more: Any = None, labels: Tensor | None = None) -> Any:
        x = self.read(x, more)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        dim = WORLDS[self.shape.world].dim
        y = x.reshape(-1, self.flat) if self.flat else x.flatten(2).mean(2) if dim == 1 else x.mean(1)
        y = self.head(y)
        loss = None if labels is None else F.cross_entropy(y, labels)
        return self.answer(y, hidden[-1], loss)

    def read(self, x: Any, more: Any) -> Tensor:
        if self.shape.call == "in place":
            return x.mul_(0.5)
        if self.shape.call == "one dict":
            return x["x"] + x["more"]
        if self.shape.call == "nested":
            return x["both"][0] + x["both"][1]["more"]
        return x if more is None else x + more

    def answer(self, y: Tensor, hidden: Tensor, loss: Tensor | None) -> Any:
        if loss is not None:
            return {"loss": loss, "logits": y}
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, hidden),
            "dict": lambda: {"out": y, "name": "net"},
            "list": lambda: [y, y.softmax(-1)],
            "nested": lambda: {"out": (y, [hidden, None])},
            "ordered": lambda: OrderedDict(hidden=hidden, out=y),
        }[self.shape.returned]()


@dataclass(frozen=True)
class Shape:
    """All that a net is made of, as plain data."""

    world: str
    inputs: int
    blocks: tuple[tuple[str, int], ...]
    flat: bool
    call: str
    returned: str
    batches: tuple[int, ...]
    seed: int

    def build(self) -> nn.Module:
        with seeded(self.seed):
            return Written(self).eval()

    def sample(self, n: int) -> Any:
        world = WORLDS[self.world]
        x, more = (
            torch.randn(n, *world.places, self.inputs)
            if world.dim == -1
            else torch.randn(n, self.inputs, *world.places)
            for _ in range(2)
        )
        return {
            "tensor": lambda: x,
            "in place": lambda: x,
            "tuple": lambda: (x, more),
            "keywords": lambda: {"x": x, "more": more},
            "one dict": lambda: {"x": x, "more": more, "name": "batch"},
            "nested": lambda: {"both": (x, {"more": more})},
            "labels": lambda: {"x": x, "labels": torch.randint(CLASSES, (n,))},
            "labels in batches": lambda: {"x": x},
            "targets": lambda: x,
        }[self.call]()

    def inputs_of(self) -> tuple[list[Any], list[Any]]:
        """Inputs of many sizes, of which the first is the example; and the others as a loader gives them."""
        with seeded(self.seed + 1):
            inputs = [self.sample(n) for n in (2, *self.batches)]
            return inputs, [self.loaded(one, n) for one, n in zip(inputs[1:], self.batches, strict=True)]

    def loaded(self, inputs: Any, n: int) -> Any:
        targets = torch.randint(CLASSES, (n,))
        if self.call == "labels in batches":
            return {**inputs, "labels": targets}
        return (inputs, targets) if self.call == "targets" else inputs


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """One to three blocks of any kind and width, called and returned in any way."""
    widths = st.integers(2, 14)
    return Shape(
        world=draw(st.sampled_from(sorted(WORLDS))),
        inputs=draw(st.integers(1, 5)),
        blocks=tuple(draw(st.lists(st.tuples(st.sampled_from(sorted(BLOCKS)), widths), min_size=1, max_size=3))),
        flat=draw(st.booleans()),
        call=draw(st.sampled_from(CALLS)),
        returned=draw(st.sampled_from(RETURNS)),
        batches=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        seed=draw(st.integers(0, 2**16)),
    )
