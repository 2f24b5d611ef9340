"""The accuracy side, on nets that can be trained here: three-channel images for the colours, Fashion-MNIST beside.

The test split is read for reporting alone; fine-tuning keeps its best epoch on validation images. Calibration and
fine-tuning images come from the training split.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from colour import splits, trained_colour
from data import load, split_train
from fashion import trained
from running import BATCH, Shuffled, accuracy
from torch import Tensor, nn

import taut
from taut.decompose.weighted import weighted_low_rank

CALIBRATION = 1024
TESTED = 4000
"""Test images of the two nets beside the colour net: clustered layers are slow in eager mode."""

IMAGES, EPOCHS = 6000, 2
"""Fine-tuning: images of an epoch and epochs."""

CONV1, CONV2, FC1, FC2 = "0", "4", "9", "11"
"""Names of the colour net's layers."""

COLOURS = (3, 4, 6, 8, 12, 16, 24)
TERMS = (6, 8, 10, 12, 16)
PAIRS = ((16, 24), (19, 24), (28, 44), (19, 64), (40, 64))
PAPER = {"metric": "frobenius", "paper": True}
MODES: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "frobenius": {"metric": "frobenius"},
    "data": {"metric": "data"},
    "mahalanobis": {"metric": "mahalanobis"},
    "fisher": {"metric": "fisher"},
}
METRICS = ("frobenius", "data", "mahalanobis", "fisher")


def form(name: str) -> tuple[str, str, dict[str, Any]]:
    """Layer, method and settings of a form such as "monochromatic 6" or "bicluster 19 24"."""
    method, *numbers = name.split()
    values = [int(number) for number in numbers]
    if method == "monochromatic":
        return CONV1, method, {"colours": values[0]}
    if method == "outer":
        return CONV2, method, {"inputs": 48, "outputs": 2, "rank": values[0]}
    ranks = {"rank_in": values[0], "rank_out": values[1]}
    return CONV2, method, {"inputs": 2, "outputs": 2, **ranks}


FORMS = (
    *(f"monochromatic {k}" for k in COLOURS),
    *(f"outer {k}" for k in TERMS),
    *(f"bicluster {i} {o}" for i, o in PAIRS),
)
TUNED = {
    "monochromatic 24": ("monochromatic 24",),
    "monochromatic 6": ("monochromatic 6",),
    "outer 20": ("outer 20",),
    "outer 10": ("outer 10",),
    "outer 6": ("outer 6",),
    "bicluster 40 64": ("bicluster 40 64",),
    "bicluster 28 44": ("bicluster 28 44",),
    "bicluster 19 24": ("bicluster 19 24",),
    "svd 2x": ("svd 164", "svd 96"),
    "svd 4x": ("svd 82", "svd 48"),
}
"""What is fine-tuned: about 2x and 4x of the layer (dense layers: both), and the source's own settings."""

NETS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "colour": {
        CONV1: ("monochromatic", {"colours": 6}),
        CONV2: ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 19, "rank_out": 24}),
        FC1: ("svd", {"rank": 48}),
        FC2: ("svd", {"rank": 32}),
    },
    "vgg": {
        "4": ("outer", {"inputs": 8, "outputs": 2, "rank": 12}),
        "8": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 10, "rank_out": 16}),
        "11": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 16, "rank_out": 16}),
        "15": ("outer", {"inputs": 16, "outputs": 2, "rank": 16}),
        "18": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 24, "rank_out": 24}),
        "23": ("svd", {"rank": 32}),
    },
    "resnet": {
        "5.body.0": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 6, "rank_out": 6}),
        "6.body.3": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 10, "rank_out": 10}),
        "7.body.3": ("outer", {"inputs": 8, "outputs": 1, "rank": 12}),
        "8.body.3": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 20, "rank_out": 20}),
        "9.body.0": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 20, "rank_out": 20}),
        "9.body.3": ("bicluster", {"inputs": 2, "outputs": 2, "rank_in": 16, "rank_out": 16}),
    },
}
"""Net -> layer -> method and settings: the same in every metric."""


class Bench:
    """A trained net with its images, traced and observed for one calibration seed."""

    def __init__(self, name: str, folder: Path | None, seed: int) -> None:
        """Read, trace, observe."""
        if name == "colour":
            (x, y), self.valid, self.test = splits(folder)
            self.net = trained_colour()
        else:
            x, y, *valid = split_train("fashion-mnist", folder)
            test = load("fashion-mnist", "test", folder)
            self.valid, self.test = (valid[0], valid[1]), (test[0][:TESTED], test[1][:TESTED])
            self.net = trained(name)
        self.train = Shuffled(x, y, IMAGES)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(100 + seed))[:CALIBRATION]
        self.batches = list(x[rows].split(256))
        self.network = taut.trace(self.net, x[:1])
        self.stats = taut.observe(self.network, self.net, self.batches)

    def plan(self, steps: dict[str, tuple[str, dict[str, Any]]]) -> taut.Plan:
        """A plan of layer -> method and settings."""
        made = [taut.Step((layer,), method, s, allow_growth=True) for layer, (method, s) in steps.items()]
        return taut.Plan.of(self.network, made)

    def apply(self, steps: dict[str, tuple[str, dict[str, Any]]], *, refit: bool) -> nn.Module:
        """The net with the steps, bare or refitted."""
        return taut.apply(self.net, self.plan(steps), self.stats, data=self.batches if refit else None)

    def error(self, layer: str, method: str, settings: dict[str, Any]) -> float:
        """Relative error of the kernel that is built, in the Frobenius norm."""
        made = taut.methods.resolve(taut.Step((layer,), method, settings))
        factors = made.factor({layer: self.net.get_submodule(layer)}, self.stats.layers)
        fit = made.fit(factors)
        W = factors.sight.W[0].double()
        return float((W - fit.W).norm() / W.norm())

    def tuned(self, model: nn.Module, seed: int, epochs: int, **wish: Any) -> nn.Module:
        """Adam at 1e-3 with half a cosine; the best validation epoch, the one before the first included."""
        plan = wish.get("plan")
        return taut.finetune(
            model,
            plan,
            self.stats if plan is not None else None,
            self.train,
            lambda net: accuracy(net, *self.valid),
            loss=nn.functional.cross_entropy,
            schedule=wish.get("schedule", (taut.Stage(epochs=epochs),)),
            example=self.train.x[:8],
            seed=seed,
        )


class Benches:
    """One bench at a time."""

    def __init__(self, folder: Path | None) -> None:
        """Nothing is read yet."""
        self.folder, self.kept = folder, ("", -1)
        self.bench: Bench | None = None

    def __call__(self, name: str, seed: int = 0) -> Bench:
        """The bench of a net and a calibration seed."""
        if self.bench is None or self.kept != (name, seed):
            self.bench, self.kept = Bench(name, self.folder, seed), (name, seed)
        return self.bench


def settings_of(name: str, mode: str) -> tuple[str, str, dict[str, Any]]:
    """A form in a mode."""
    layer, method, settings = form(name)
    return layer, method, settings | MODES[mode]


def bare(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """One layer of the colour net in one form: kernel error, and test accuracy without any recovery and refitted."""
    bench = benches("colour")
    layer, method, settings = settings_of(cell["form"], cell["mode"])
    steps = {layer: (method, settings)}
    cost = bench.plan(steps).steps[0]
    made = taut.methods.resolve(cost)
    group = bench.network.group([layer])
    return {
        "error": bench.error(layer, method, settings),
        "fewer_weights": group.cost.params / made.cost(group).params,
        "accuracy": accuracy(bench.apply(steps, refit=False), *bench.test),
        "refitted": accuracy(bench.apply(steps, refit=True), *bench.test) if cell["mode"] == "data" else -1.0,
    }


def metric(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """Several layers of a net at the same settings in one metric."""
    bench = benches(cell["net"], cell["seed"])
    steps = {layer: (m, s | {"metric": cell["metric"]}) for layer, (m, s) in NETS[cell["net"]].items()}
    small = bench.apply(steps, refit=False)
    refitted = bench.apply(steps, refit=True)
    return {"bare": accuracy(small, *bench.test), "refitted": accuracy(refitted, *bench.test)}


def tune(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """One method fine-tuned, in paper mode (nothing before training) or as taut does it (refitted first)."""
    bench = benches("colour", cell["seed"])
    if cell["form"] == "control":
        small: nn.Module = bench.net
        before = accuracy(small, *bench.test)
        return {"before": before, "after": accuracy(bench.tuned(small, cell["seed"], EPOCHS), *bench.test)}
    steps = _steps(cell["form"], cell["mode"])
    small = bench.apply(steps, refit=cell["mode"] != "paper")
    groups = [bench.network.group([layer]) for layer in steps]
    made = [taut.methods.resolve(step) for step in bench.plan(steps).steps]
    sizes = [m.cost(g).params for m, g in zip(made, groups, strict=True)]
    return {
        "fewer_weights": sum(g.cost.params for g in groups) / sum(sizes),
        "before": accuracy(small, *bench.test),
        "after": accuracy(bench.tuned(small, cell["seed"], EPOCHS), *bench.test),
    }


MILD = ("svd 2x", "svd 4x", "bicluster 40 64", "bicluster 28 44")
"""Mild forms, in which the source now and then saw a better test error than the original's."""


def mild(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy of one mild form, refitted on the images of one calibration seed, nothing trained."""
    bench = benches("colour", cell["seed"])
    return {"accuracy": accuracy(bench.apply(_steps(cell["form"], "data"), refit=True), *bench.test)}


def _steps(name: str, mode: str) -> dict[str, tuple[str, dict[str, Any]]]:
    steps: dict[str, tuple[str, dict[str, Any]]] = {}
    for one, place in zip(TUNED[name], (FC1, FC2), strict=False):
        if one.startswith("svd"):
            plain = {"metric": "frobenius" if mode == "paper" else "data"}
            steps[place] = ("svd", {"rank": int(one.split()[1])} | plain)
        else:
            layer, method, settings = settings_of(one, mode)
            steps[layer] = (method, settings)
    return steps


CASCADE: dict[str, tuple[str, dict[str, Any]]] = {
    CONV1: ("monochromatic", {"colours": 6}),
    CONV2: ("outer", {"inputs": 48, "outputs": 2, "rank": 8}),
    FC1: ("svd", {"rank": 82}),
    FC2: ("svd", {"rank": 48}),
}
STAGES = 4


def cascaded(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """C' = 6, then K = 8, then the dense layers: layer by layer with everything above trained, or all at once."""
    bench = benches("colour", cell["seed"])
    if cell["way"] == "control":
        return {"after": accuracy(bench.tuned(bench.net, cell["seed"], STAGES), *bench.test), "before": -1.0}
    plan = bench.plan(CASCADE)
    small = bench.apply(CASCADE, refit=True)
    before = accuracy(small, *bench.test)
    if cell["way"] == "all at once":
        done = bench.tuned(small, cell["seed"], STAGES)
    else:
        schedule = taut.cascade(plan, epochs=1, patience=None)  # as many images as all at once gets
        done = bench.tuned(bench.net, cell["seed"], 1, plan=plan, schedule=schedule)
    return {"before": before, "after": accuracy(done, *bench.test)}


def elementwise(benches: Benches, cell: dict[str, Any]) -> dict[str, Any]:
    """The first dense layer at one rank: the Mahalanobis weighting in every form, deployable or not."""
    bench = benches("colour")
    rank, way = cell["rank"], cell["way"]
    if way in METRICS:
        small = bench.apply({FC1: ("svd", {"rank": rank, "metric": way})}, refit=False)
        return {"accuracy": accuracy(small, *bench.test), "deployable": True}
    net = copy.deepcopy(bench.net)
    layer = net.get_submodule(FC1)
    W, a = layer.weight.detach().double(), alphas(bench)
    a = a + 0.5 * float(a.mean())
    if way == "elementwise":
        U, s, Vh = torch.linalg.svd(a * W, full_matrices=False)
        made = (U[:, :rank] * s[:rank]) @ Vh[:rank] / a
    else:
        left, right = weighted_low_rank(W, a, rank)
        made = left @ right
    layer.weight.data = made.to(layer.weight)
    return {
        "accuracy": accuracy(net, *bench.test),
        "deployable": way != "elementwise",
        "rank_of_result": int(torch.linalg.matrix_rank(made, rtol=1e-6)),
    }


def alphas(bench: Bench, batches: int = 60, labels: int = 2) -> Tensor:
    """Root mean square, over batches and the two wrongest labels, of the batch's gradient of softmax - onehot(label).

    The source ran 500 batches of 128 and added 0.5; here the offset is half the mean, since our gradients have another
    scale.
    """
    layer = bench.net.get_submodule(FC1)
    total = torch.zeros_like(layer.weight, dtype=torch.float64)
    for place in range(batches):
        rows = slice(place * BATCH % len(bench.train.x), place * BATCH % len(bench.train.x) + BATCH)
        logits = bench.net(bench.train.x[rows])
        wrong = logits.detach().scatter(1, bench.train.y[rows][:, None], -torch.inf).topk(labels, 1).indices
        for label in wrong.T:
            d = logits.detach().softmax(1) - nn.functional.one_hot(label, logits.shape[1])
            (grad,) = torch.autograd.grad(logits, layer.weight, d / len(d), retain_graph=True)
            total += grad.double().square()
    return (total / (batches * labels)).sqrt()
