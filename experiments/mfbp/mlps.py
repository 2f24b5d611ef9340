"""The dense nets of the study, their training epoch by epoch, and how they are scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn import fill_plain, plain_state

BATCH = 128
TWO, FOUR, FIVE = (784, 529, 529, 10), (784, 529, 529, 529, 529, 10), (784, 625, 625, 625, 625, 625, 10)
WIDE = (784, 625, 625, 10)


def modern(widths: Sequence[int], *, seed: int, bias: bool = True, init: float | None = None, drop: bool = True) -> Any:
    """Linear and ReLU in turn, dropout .2 before and .5 between; the source's net has no biases and `init` .01.

    Args:
        widths: of inputs, hidden layers and outputs.
        seed: of the weights.
        bias: whether the layers have biases.
        init: standard deviation of the weights; None: He's sqrt(2 / inputs).
        drop: whether there is dropout.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten(), *([nn.Dropout(0.2)] if drop else [])]
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        with torch.no_grad():
            scale = init if init is not None else (2 / inputs) ** 0.5
            linear.weight.copy_(scale * torch.randn(outputs, inputs, generator=generator))
            if bias:
                linear.bias.zero_()
        last = place == len(widths) - 2
        layers += [linear, *([] if last else [nn.ReLU()]), *([nn.Dropout(0.5)] if drop and not last else [])]
    return nn.Sequential(*layers)


class RMSprop(torch.optim.Optimizer):
    """The source's: v = .9 v + .1 g^2, w -= rate g / sqrt(v + 1e-6), the 1e-6 INSIDE the root."""

    def __init__(self, parameters: Any, rate: float) -> None:
        """Start with v = 0."""
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every weight."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                    p.addcdiv_(p.grad, (v + 1e-6).sqrt_(), value=-group["lr"])


def train(  # noqa: PLR0913 - the settings of a protocol
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    *,
    valid: tuple[Tensor, Tensor] | None = None,
    rate: float = 1e-3,
    paper: bool = False,
    seed: int = 0,
    each: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train in place and keep the weights that are best on `valid`; masks (`taut.nn.hold_zeros`) stay.

    Args:
        net: with or without masks.
        x: images.
        y: labels.
        epochs: over all images; the last partial batch is dropped.
        valid: images and labels to choose the epoch on; None: the last one.
        rate: of Adam, falling along half a cosine; of the paper's RMSprop, constant.
        paper: RMSprop and a fixed order instead of Adam and a new order every epoch.
        seed: of the order and the dropout.
        each: called after every epoch, the net in eval mode.
    """
    torch.manual_seed(1000 + seed)
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer: Any = RMSprop(learning, rate) if paper else torch.optim.Adam(learning, rate, fused=True)
    steps = max(1, epochs * (len(x) // BATCH))
    schedule = None if paper else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best: tuple[float, dict[str, Tensor]] | None = None
    for epoch in range(epochs + 1):
        if epoch:
            net.train()
            for rows in _batches(len(x), fixed=paper):
                loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
        net.eval()
        if epoch and each is not None:
            each(net)
        value = None if valid is None else accuracy(net, *valid)
        if value is not None and (best is None or value > best[0]):
            best = value, {name: t.clone() for name, t in plain_state(net).items()}
    if best is not None:
        fill_plain(net, best[1])
    return net


def _batches(count: int, *, fixed: bool) -> Iterator[Tensor]:
    order = torch.arange(count) if fixed else torch.randperm(count)
    yield from order[: count // BATCH * BATCH].split(BATCH) if count >= BATCH else [order]


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    """Of all images, in eval mode."""
    net.eval()
    return torch.cat([net(part) for part in x.split(2000)])


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that the net names right."""
    return float((logits(net, x).argmax(1) == y).double().mean())


def scores(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, the true mean one-vs-rest AUC, and the source's AUC of hard labels."""
    found = logits(net, x)
    hard = found.argmax(1)
    true, labels = [], []
    for c in y.unique():
        mine = y == c
        true.append(auc(found.softmax(1)[:, c], mine))
        hits = (hard == c)[mine].double().mean(), (hard != c)[~mine].double().mean()
        labels.append(float(sum(hits)) / 2)
    mean = float((hard == y).double().mean())
    return {"accuracy": mean, "auc": sum(true) / len(true), "auc of labels": sum(labels) / len(labels)}


def auc(values: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive has the larger value, ties half (Mann and Whitney)."""
    distinct, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    del distinct
    ranks = counts.cumsum(0) - (counts - 1) / 2
    good, bad = int(positive.sum()), int((~positive).sum())
    above = float(ranks[place][positive].sum()) - good * (good + 1) / 2
    return above / max(1, good * bad)


def parameters(net: nn.Module) -> int:
    """Unique parameters."""
    return sum(p.numel() for p in net.parameters())
