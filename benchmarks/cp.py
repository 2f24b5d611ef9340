"""Sums of rank-1 terms (CP) of whole kernels against tensorly's parafac.

.venv/bin/python benchmarks/cp.py [--rounds 3] [--quick]

Both sides work on the same float32 kernel of 256 x 256 x 3 x 3 in the same process, in turns; the ratio is that of the
medians, against tensorly's FASTER backend of numpy and pytorch, and our error has to be at most the LOWER of the two.
Kernels are seeded Gaussians whose spectra along both channel modes decay like i^-alpha; trained kernels lie around
alpha 0.5. tensorly starts from singular vectors (`init="svd"`), makes at most 100 sweeps and stops at a tolerance of
1e-6. Ours are the settings of the method `cp`. Beside that: kernels planted with as many terms as asked for, and random
small kernels, none of which may diverge.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import tensorly
import torch
from decompositions import compared, relative, timed
from ending import finish
from tensorly.decomposition import parafac
from torch import Tensor

from taut.decompose.cp import compose, cp
from taut.methods.low_rank.cp import EFFORT
from taut.studies import Bound, load_average

SIDES, TAPS = 256, (3, 3)
TIMES = 10.0
RECOVERED = 1e-5
RANDOM = 200


def kernel(alpha: float) -> Tensor:
    """A seeded kernel (o, c, 3, 3) whose spectra along o and c decay like i^-alpha."""
    random = torch.Generator().manual_seed(0)
    W = torch.randn(SIDES, SIDES, *TAPS, generator=random)
    for axis in (0, 1):
        basis = torch.linalg.qr(torch.randn(SIDES, SIDES, generator=random))[0]
        W = torch.tensordot(basis * torch.arange(1, SIDES + 1).float() ** -alpha, W.movedim(axis, 0), 1)
        W = W.movedim(0, axis)
    return W.contiguous()


def by_tensorly(W: Tensor, rank: int, backend: str) -> Tensor:
    """Its approximation of W."""
    with tensorly.backend_context(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more terms than a kernel axis is long
        X = W if backend == "pytorch" else W.numpy()
        made = parafac(X, rank, n_iter_max=100, init="svd", tol=1e-6, random_state=0)
        return torch.as_tensor(tensorly.cp_to_tensor(made))


def ours(W: Tensor, rank: int) -> Tensor:
    """Our approximation of W."""
    return compose(cp(W[None], rank, **EFFORT))[0]


def whole(alpha: float, rank: int, rounds: int) -> dict[str, Any]:
    """One kernel, one rank: seconds and errors of all three."""
    W = kernel(alpha)
    backends = ("numpy", "pytorch")
    runs = {name: partial(by_tensorly, W, rank, name) for name in backends}
    seconds, given = timed({"taut": partial(ours, W, rank), **runs}, rounds)
    errors = {name: relative(W, close) for name, close in given.items()}
    seconds["tensorly"] = min(seconds[name] for name in backends)
    best = min(errors[name] for name in backends)
    row = compared("tensorly", seconds, (errors["taut"], best), alpha=alpha, rank=rank)
    return row | {"errors_tensorly": {name: errors[name] for name in backends}}


def recovered(rank: int) -> dict[str, Any]:
    """The error for a kernel planted with terms of equal size."""
    random = torch.Generator().manual_seed(rank)
    W = compose([torch.randn(1, n, rank, generator=random) for n in (SIDES, SIDES, *TAPS)])[0]
    return {"rank": rank, "error": relative(W, ours(W, rank))}


def diverged(many: int) -> int:
    """How many of so many random kernels of random shape and rank end not finite or worse than zero."""
    random = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(many):
        o, c, h, w, rank = (int(torch.randint(1, most, (), generator=random)) for most in (33, 33, 6, 6, 33))
        W = torch.randn(o, c, h, w, generator=random)
        found += not relative(W, ours(W, rank)) <= 1
    return found


def bounds(wholes: list[dict[str, Any]], planted: list[dict[str, Any]], lost: int) -> list[Bound]:
    """Faster at every rank, errors equal or lower, planted terms found, nothing diverged."""
    found = []
    for rank in sorted({row["rank"] for row in wholes}):
        rows = [row for row in wholes if row["rank"] == rank]
        label = f"CP of 256x256x3x3 at rank {rank}"
        found.append(Bound(f"{label}: times faster than tensorly, least", TIMES, min(row["ratio"] for row in rows)))
        excess = max(row["error"] / row["error_tensorly"] - 1 for row in rows)
        found.append(Bound(f"{label}: relative excess over tensorly's error", 0.0, excess, at_most=True))
    worst = max(row["error"] for row in planted)
    found.append(Bound("CP: error for planted kernels", RECOVERED, worst, at_most=True))
    found.append(Bound("CP: random kernels that diverged", 0.0, float(lost), at_most=True))
    return found


def main() -> None:
    """Run all, write results/cp.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one spectrum, few random kernels")
    args = parser.parse_args()
    alphas, many = ((0.5,), 20) if args.quick else ((0.5, 1.0), RANDOM)
    ranks = (8, 32, 64)
    ours(kernel(0.5), ranks[0])  # the first call of all loads libraries
    wholes = [whole(alpha, rank, args.rounds) for alpha in alphas for rank in ranks]
    planted, lost = [recovered(rank) for rank in ranks], diverged(many)
    settings = {"rounds": args.rounds, "alphas": alphas, "ranks": ranks, "random": many, "load": load_average()}
    results = {"whole": wholes, "planted": planted, "diverged": lost}
    name = "cp-quick.json" if args.quick else "cp.json"
    finish(Path(__file__).parent / "results" / name, settings, results, bounds(wholes, planted, lost))


if __name__ == "__main__":
    main()
