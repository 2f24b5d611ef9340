"""Small measurements on the trained nets, for statements of the sources that a number can answer."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from deep import SMALL, VALID
from lab import Lab
from mlps import FIVE, WIDE, accuracy, logits, modern, train
from torch import Tensor, nn

from taut.decompose.trifactor import Relation, signed
from taut.studies import Cell

RANK = 50
NOISES = (0.5, 1.0, 2.0)
"""Noise put on the weights, in shares of each matrix's own size."""

FACTS = ("spectra", "overlap", "denoising", "stacked", "relu", "vanishing", "dropout", "widths", "latent", "bound")


def wanted(quick: bool) -> list[Cell]:
    """One run per statement."""
    return [{"fact": name} for name in (("stacked", "vanishing") if quick else FACTS)]


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """The measurement of that name."""
    measure = {
        "spectra": spectra,
        "overlap": overlap,
        "denoising": denoising,
        "stacked": stacked,
        "relu": relu,
        "vanishing": vanishing,
        "dropout": dropout,
        "widths": widths,
        "latent": latent,
        "bound": bound,
    }
    return measure[cell["fact"]](lab)


def trained(lab: Lab) -> nn.Module:
    """The five-layer net of the first seed."""
    x, y = lab.part("mnist", SMALL - VALID, seed=100)
    valid = lab.part("mnist", VALID, seed=100, skip=SMALL - VALID)

    def make() -> nn.Module:
        built: nn.Module = modern(FIVE, seed=0, drop=False)
        return built

    return lab.once("deep few 5 hidden 0", make, lambda net: train(net, x, y, 30, valid=valid))


def matrices(net: nn.Module) -> list[Tensor]:
    """Weights (inputs, outputs), front to back."""
    return [module.weight.detach().mT.contiguous() for module in net.modules() if isinstance(module, nn.Linear)]


def first_basis(lab: Lab, quick: bool) -> Tensor:
    """G_0 of the five-layer net, (784, k)."""
    empty = modern(FIVE, seed=0, drop=False)
    chain = matrices(lab.read(f"deep {'quick' if quick else 'few'} 5 hidden 0", empty))
    relations = [Relation.of(str(i), str(i + 1), W) for i, W in enumerate(chain)]
    return signed(relations, {str(i): min(RANK, n) for i, n in enumerate(FIVE)}).bases["0"]


def hidden(net: nn.Module) -> list[Tensor]:
    """The matrices between hidden layers."""
    return matrices(net)[1:-1]


def spectra(lab: Lab) -> dict[str, Any]:
    """Share of a matrix in its 50 leading directions, and kurtosis of its entries: trained against untrained."""
    found = {}
    for name, net in (("trained", trained(lab)), ("untrained", modern(FIVE, seed=0, drop=False))):
        values = [torch.linalg.svdvals(W.double()).square() for W in hidden(net)]
        flat = [W.double().flatten() for W in hidden(net)]
        kurtosis = [float(((w - w.mean()) / w.std()).pow(4).mean()) for w in flat]
        found[name] = {
            "leading": sum(float(v[:RANK].sum() / v.sum()) for v in values) / len(values),
            "kurtosis": sum(kurtosis) / len(kurtosis),
        }
    return found


def overlap(lab: Lab) -> dict[str, Any]:
    """Mean squared cosine between the leading outputs of a matrix and the leading inputs of the next."""

    def shared(net: nn.Module) -> float:
        values = []
        for A, B in pairwise(matrices(net)[:-1]):
            out = torch.linalg.svd(A.double(), full_matrices=False).Vh[:RANK]
            into = torch.linalg.svd(B.double(), full_matrices=False).U[:, :RANK]
            values.append(float((out @ into).square().sum()) / RANK)
        return sum(values) / len(values)

    chance = RANK / FIVE[1]
    return {"trained": shared(trained(lab)), "untrained": shared(modern(FIVE, seed=0, drop=False)), "chance": chance}


def denoising(lab: Lab) -> dict[str, Any]:
    """Noise on the weights: does the joint factorization of the noisy net lie nearer to the clean one?"""
    net = trained(lab)
    test = lab.images("mnist", "test")
    clean = matrices(net)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in NOISES:
        noisy = [W + size * W.std() * torch.randn(W.shape, generator=generator) for W in clean]
        factored = reconstructed(noisy, RANK)
        rows.append(
            {
                "noise": size,
                "error": distance(noisy, clean),
                "error factored": distance(factored, clean),
                "accuracy": accuracy(filled(noisy, net), *test),
                "accuracy factored": accuracy(filled(factored, net), *test),
            }
        )
    return {"accuracy": accuracy(net, *test), "rows": rows}


def reconstructed(weights: list[Tensor], rank: int) -> list[Tensor]:
    """H of every matrix of a chain."""
    relations = [Relation.of(str(i), str(i + 1), W) for i, W in enumerate(weights)]
    sizes = [weights[0].shape[0], *(W.shape[1] for W in weights)]
    factors = signed(relations, {str(i): min(rank, n) for i, n in enumerate(sizes)})
    return [factors.compose(i)[0] for i in range(len(weights))]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative Frobenius error over all matrices."""
    left = sum(float((a - b).double().square().sum()) for a, b in zip(found, wanted, strict=True))
    return (left / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def filled(weights: list[Tensor], like: nn.Module) -> nn.Module:
    """The net with other matrices."""
    net: nn.Module = modern(FIVE, seed=0, drop=False)
    net.load_state_dict(like.state_dict())
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for module, W in zip(linears, weights, strict=True):
        module.weight.data.copy_(W.mT)
    return net


def stacked(_: Lab) -> dict[str, Any]:
    """One hidden layer: the joint factorization with full outer ranks against the SVD of [W_0^T | W_1]."""
    generator = torch.Generator().manual_seed(0)
    W0, W1 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((60, 40), (40, 30)))
    relations = [Relation.of("a", "b", W0), Relation.of("b", "c", W1)]
    joint = signed(relations, {"a": 60, "b": 8, "c": 30}, normalize=False, tol=1e-12, sweeps=200)
    whole = torch.cat([W0.mT, W1], 1)
    values = torch.linalg.svdvals(whole).square()
    return {"joint": joint.errors[-1], "stacked": float((values[8:].sum() / values.sum()).sqrt())}


@torch.no_grad()
def relu(lab: Lab) -> dict[str, Any]:
    """Share of hidden activations that are zero on test images."""
    net, x = trained(lab), lab.images("mnist", "test")[0][:1000]
    found = []
    for module in net:  # type: ignore[attr-defined]
        x = module(x)
        if isinstance(module, nn.ReLU):
            found.append(float((x == 0).double().mean()))
    return {"zero": found}


@torch.no_grad()
def vanishing(lab: Lab) -> dict[str, Any]:
    """Gradients of every layer and size of the outputs at the start: initial weights of .01, and He's."""
    x, y = lab.part("mnist", 1000)
    found: dict[str, Any] = {}
    for name, init in (("0.01", 0.01), ("He", None)):
        net = modern(FIVE, seed=0, drop=False, init=init, bias=False)
        with torch.enable_grad():
            nn.functional.cross_entropy(net(x), y).backward()
        grads = [float(module.weight.grad.norm()) for module in net.modules() if isinstance(module, nn.Linear)]
        found[name] = {"gradients": grads, "logits": float(logits(net, x).std())}
    return found


def dropout(lab: Lab) -> dict[str, Any]:
    """Test accuracy and gap to the training images with and without dropout, 4,000 images."""
    x, y = lab.part("mnist", 4000)
    test = lab.images("mnist", "test")
    found = {}
    for name, drop in (("with", True), ("without", False)):
        net = train(modern(WIDE, seed=0, drop=drop), x, y, 30)
        found[name] = {"train": accuracy(net, x, y), "test": accuracy(net, *test)}
    return found


def widths(lab: Lab) -> dict[str, Any]:
    """Nets of several widths from scratch on 4,000 images: first epoch, end, and spread over seeds and rates."""
    x, y = lab.part("mnist", 4000)
    test = lab.images("mnist", "test")
    rows = []
    for width in (4, 16, 64, 256, 1024):
        first, last = [], []
        for seed, rate in ((0, 1e-3), (1, 1e-3), (2, 1e-3), (0, 3e-3), (0, 3e-4)):
            seen: list[float] = []
            shape = (784, width, width, 10)
            net = modern(shape, seed=seed, drop=False)
            train(net, x, y, 15, rate=rate, seed=seed, each=lambda net, seen=seen: seen.append(accuracy(net, *test)))
            first.append(seen[0])
            last.append(seen[-1])
        rows.append({"width": width, "first": first, "last": last})
    return {"rows": rows}


def latent(lab: Lab) -> dict[str, Any]:
    """How well 50 coordinates of the images in the first basis tell the digits apart, against 50 random directions."""
    trained(lab)
    G = first_basis(lab, quick=False)
    noise = torch.linalg.qr(torch.randn(G.shape, generator=torch.Generator().manual_seed(0)))[0]
    x, y = lab.part("mnist", 4000)
    test_x, test_y = lab.images("mnist", "test")
    return {
        name: nearest(x.flatten(1) @ B, y, test_x.flatten(1) @ B, test_y)
        for name, B in (("basis", G), ("random", noise))
    }


def nearest(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of the least-squares classifier on these coordinates."""
    ones = torch.ones(len(x), 1)
    W = torch.linalg.lstsq(torch.cat([x, ones], 1), nn.functional.one_hot(y).float()).solution
    found = torch.cat([test_x, torch.ones(len(test_x), 1)], 1) @ W
    return float((found.argmax(1) == test_y).double().mean())


def bound(lab: Lab) -> dict[str, Any]:
    """Relative error of the joint factorization over ranks beside separate SVDs of the same rank."""
    chain = matrices(trained(lab))
    rows = []
    for rank in (5, 25, 50, 100, 200):
        start = time.perf_counter()
        error = distance(reconstructed(chain, rank), chain)
        seconds = time.perf_counter() - start
        lost = sum(float(torch.linalg.svdvals(W.double()).square()[rank:].sum()) for W in chain)
        whole = sum(float(W.double().square().sum()) for W in chain)
        rows.append({"rank": rank, "joint": error, "separate": (lost / whole) ** 0.5, "seconds": seconds})
    return {"rows": rows}
