"""Balanced clustering and biclustering beside straightforward references, in one run.

.venv/bin/python benchmarks/clustering.py     (run it alone on the machine)

Clustering: 512 vectors in 64 clusters of 8. Reference: k-means with sizes balanced by regret, as first published with
biclustering: squared Euclidean distance, over-full clusters keep the members that would lose most elsewhere, 10
restarts. Biclustering: 512 x 256 x 3 x 3 with two SVDs and with outer products; reference: the source's order of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor

from taut.decompose.bicluster import bicluster, paper_svds, rank_one_terms, two_svds
from taut.decompose.clustering import balanced, spread
from taut.decompose.cp import compose
from taut.decompose.weighting import Weighting
from taut.studies import Bound, load_average

CLUSTERS, SWEEPS, RESTARTS = 64, 100, 10


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def by_regret(X: Tensor, k: int, seed: int) -> Tensor:
    """Labels: rows in order of regret (second nearest minus nearest centre) take the nearest centre with room."""
    generator = torch.Generator().manual_seed(seed)
    centres, size = X[torch.randperm(len(X), generator=generator)[:k]], len(X) // k
    labels = torch.zeros(len(X), dtype=torch.long)
    for _ in range(SWEEPS):
        distances = torch.cdist(X, centres).square()
        two = distances.topk(2, 1, largest=False).values
        before, room, labels = labels, torch.full((k,), size), torch.zeros(len(X), dtype=torch.long)
        for row in (two[:, 1] - two[:, 0]).argsort(descending=True).tolist():
            open_now = torch.where(room > 0, distances[row], torch.inf)
            labels[row] = open_now.argmin()
            room[labels[row]] -= 1
        if torch.equal(before, labels):
            break
        centres = torch.stack([X[labels == a].mean(0) for a in range(k)])
    return labels


def kernels() -> dict[str, Tensor]:
    """Weights of a 3 x 3 convolution, 256 to 512 channels: noise, and channels in eight families."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 256, 9, generator=generator) / 48
    outputs, inputs = (torch.randint(8, (n,), generator=generator) for n in (512, 256))
    families = torch.randn(8, 8, 9, generator=generator) / 24
    return {"noise": noise, "families": families[outputs][:, inputs] + noise / 2}


def clustering(W: Tensor) -> dict[str, Any]:
    """Seconds and objective of the outputs' clusters."""
    rows = W.flatten(1)
    reference, slow = timed(lambda: [by_regret(rows, CLUSTERS, seed) for seed in range(RESTARTS)])
    found: dict[str, Any] = {
        "reference": {"seconds": slow, "error": min(spread(rows, labels, "euclidean") for labels in reference)}
    }
    for distance in ("euclidean", "projection"):
        labels, seconds = timed(lambda distance=distance: balanced(rows, CLUSTERS, distance))
        found[distance] = {"seconds": seconds, "error": spread(rows, labels, distance)}
    found["projection, reference's clusters"] = {
        "error": min(spread(rows, labels, "projection") for labels in reference)
    }
    return found


def biclustering(W: Tensor) -> dict[str, Any]:
    """Seconds and relative errors at G = H = 4, K1 = 24, K2 = 48, and at G = 64, H = 2, K = 8."""
    clusters, seconds = timed(lambda: bicluster(W, 4, 4, Weighting()))
    blocks = clusters.blocks(W)
    (V, core, U), more = timed(lambda: two_svds(blocks, 24, 48, Weighting()))
    euclidean = bicluster(W, 4, 4, Weighting(), distance="euclidean").blocks(W)
    v, c, u = paper_svds(euclidean, 24, 48)
    grouped, a_while = timed(lambda: bicluster(W, 64, 2, Weighting()))
    terms, longer = timed(lambda: rank_one_terms(grouped.blocks(W), 8, Weighting()))
    greedy = rank_one_terms(grouped.blocks(W), 8, Weighting(), paper=True)

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    def product(V: Tensor, core: Tensor, U: Tensor) -> Tensor:
        return torch.einsum("noq,nqrs,ncr->nocs", U, core, V)

    wanted = grouped.blocks(W).permute(0, 2, 3, 1)
    return {
        "two SVDs": {"seconds": seconds + more, "error": error(product(V, core, U), blocks)},
        "two SVDs, paper": {"error": error(product(v, c, u), euclidean)},
        "outer products": {"seconds": a_while + longer, "error": error(compose(terms), wanted)},
        "outer products, one by one": {"error": error(compose(greedy), wanted)},
    }


def main() -> None:
    """Measure, print, write benchmarks/results/clustering.json."""
    results = {name: {"clustering": clustering(W), "biclustering": biclustering(W)} for name, W in kernels().items()}
    bounds = []
    for name, found in results.items():
        mine, form = found["clustering"], found["biclustering"]
        bounds += [
            Bound(f"{name}: 512 vectors in 64 clusters, seconds ({d})", 2.0, mine[d]["seconds"], at_most=True)
            for d in ("euclidean", "projection")
        ]
        bounds.append(
            Bound(
                f"{name}: Euclidean objective, reference's",
                mine["reference"]["error"],
                mine["euclidean"]["error"],
                at_most=True,
            )
        )
        other = mine["projection, reference's clusters"]["error"]
        bounds.append(
            Bound(f"{name}: projection objective, reference's", other, mine["projection"]["error"], at_most=True)
        )
        bounds += [
            Bound(f"{name}: biclustering by {k}, seconds", 10.0, form[k]["seconds"], at_most=True)
            for k in ("two SVDs", "outer products")
        ]
        bounds.append(
            Bound(
                f"{name}: two SVDs, error of paper mode",
                form["two SVDs, paper"]["error"],
                form["two SVDs"]["error"],
                at_most=True,
            )
        )
        other = form["outer products, one by one"]["error"]
        bounds.append(
            Bound(f"{name}: outer products, error one by one", other, form["outer products"]["error"], at_most=True)
        )
    settings = {"clusters": CLUSTERS, "restarts": RESTARTS, "load": load_average()}
    finish(Path(__file__).parent / "results" / "clustering.json", settings, results, bounds)


if __name__ == "__main__":
    main()
