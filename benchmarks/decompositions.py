"""The decompositions against their peers: Tucker-2 against tensorly, truncated SVD against torch.linalg.svd.

.venv/bin/python benchmarks/decompositions.py [--rounds 5] [--quick]

Both sides work on the same kernel in the same process, in turns; the ratio is that of the medians. Kernels are seeded
Gaussians whose mode spectra decay like i^-alpha; trained kernels lie around alpha 0.5. tensorly runs partial_tucker
with its defaults (SVD start, tolerance 1e-4, at most 100 sweeps) on the torch backend. Truncated SVDs are of rank
n / 8 and n / 16. Errors are relative Frobenius errors; ours may exceed the peer's by what EQUAL states.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from ending import finish
from tensorly.decomposition import partial_tucker
from torch import Tensor

from taut.decompose import Weighting, output_basis, tucker2
from taut.studies import Bound, load_average

EQUAL = 1e-4
"""Relative excess over the peer's error that counts as equal (two local optima of one problem)."""

EQUAL_SVD = 1e-6
"""The same for truncated SVDs in float32, which have one optimum."""

KERNELS = {"512x512x3x3": ((512, 512, 9), 6.0), "512x256x64": ((512, 256, 64), 15.0)}
MATRICES = {"1000x4096": (1000, 4096, 5.0), "2048x2048": (2048, 2048, 5.0), "4096x4096": (4096, 4096, 5.0)}


def kernel(shape: tuple[int, int, int], alpha: float) -> Tensor:
    """A seeded kernel (o, c, s) whose spectra along o and c decay like i^-alpha."""
    random = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=random)
    for axis in (0, 1):
        n = shape[axis]
        basis = torch.linalg.qr(torch.randn(n, n, generator=random))[0] * torch.arange(1, n + 1).float() ** -alpha
        W = torch.tensordot(basis, W.movedim(axis, 0), 1).movedim(0, axis)
    return W.contiguous()


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each run, called in turns, and what they gave."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            given[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, given


def relative(W: Tensor, close: Tensor) -> float:
    """Relative Frobenius error."""
    return float((W.double() - close.double()).norm() / W.double().norm())


def compared(peer: str, seconds: dict[str, float], errors: tuple[float, float], **case: Any) -> dict[str, Any]:
    """The row of one case, printed: seconds, their ratio, our error and the peer's."""
    ratio, (mine, theirs) = seconds[peer] / seconds["taut"], errors
    label = " ".join(str(value) for value in case.values())
    print(f"{label}: {ratio:.1f}x faster, error {mine:.7f} against {theirs:.7f}")
    return {**case, "seconds": seconds, "ratio": ratio, "error": mine, f"error_{peer}": theirs}


def tucker(name: str, rank: int, alpha: float, rounds: int) -> dict[str, Any]:
    """One kernel, one rank: seconds and errors of both."""
    W = kernel(KERNELS[name][0], alpha)
    seconds, given = timed(
        {
            "taut": lambda: tucker2(W[None], rank, rank),
            "tensorly": lambda: partial_tucker(W, rank=[rank, rank], modes=[0, 1]),
        },
        rounds,
    )
    V, core, U = given["taut"]
    (their_core, (their_U, their_V)), _ = given["tensorly"]
    ours = torch.einsum("op,prs,cr->ocs", U[0], core[0], V[0])
    theirs = torch.einsum("op,prs,cr->ocs", their_U, their_core, their_V)
    return compared("tensorly", seconds, (relative(W, ours), relative(W, theirs)), kernel=name, alpha=alpha, rank=rank)


def svd(name: str, rank: int, alpha: float, rounds: int) -> dict[str, Any]:
    """A truncated SVD with its factors, against the full one truncated."""
    m, n, _ = MATRICES[name]
    W = kernel((m, n, 1), alpha)[..., 0]

    def ours() -> tuple[Tensor, Tensor]:
        up = output_basis(W[None, :, :, None], Weighting(), rank=rank).up[0].to(W)
        return up, up.mT @ W

    def theirs() -> tuple[Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank] * s[:rank], Vh[:rank]

    seconds, given = timed({"taut": ours, "torch": theirs}, rounds)
    mine, peers = (relative(W, given[side][0] @ given[side][1]) for side in ("taut", "torch"))
    return compared("torch", seconds, (mine, peers), matrix=name, alpha=alpha, rank=rank)


def bounds(tuckers: list[dict[str, Any]], svds: list[dict[str, Any]]) -> list[Bound]:
    """Speed at least as stated, errors equal or lower."""
    found = []
    for name, (_, least) in KERNELS.items():
        rows = [row for row in tuckers if row["kernel"] == name]
        found.append(
            Bound(f"{name}: times faster than tensorly, median", least, statistics.median(r["ratio"] for r in rows))
        )
    excess = max(row["error"] / row["error_tensorly"] - 1 for row in tuckers)
    found.append(Bound("Tucker-2: relative excess over tensorly's error", EQUAL, excess, at_most=True))
    for name, (m, n, least) in MATRICES.items():
        for rank in sorted({row["rank"] for row in svds if row["matrix"] == name}):
            ratios = [row["ratio"] for row in svds if (row["matrix"], row["rank"]) == (name, rank)]
            label = f"{name} at rank n / {min(m, n) // rank}: times faster than torch.linalg.svd, median"
            found.append(Bound(label, least, statistics.median(ratios)))
    excess = max(row["error"] / row["error_torch"] - 1 for row in svds)
    found.append(Bound("SVD: relative excess over torch's error", EQUAL_SVD, excess, at_most=True))
    return found


def main() -> None:
    """Run all, write results/decompositions.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one spectrum and rank, no bounds written")
    args = parser.parse_args()
    tensorly.set_backend("pytorch")
    alphas, ranks = ((0.5,), (128,)) if args.quick else ((0.25, 0.5, 1.0), (64, 128))
    tuckers = [tucker(name, r, a, args.rounds) for name in KERNELS for a in alphas for r in ranks]
    parts = (8,) if args.quick else (8, 16)
    svds = [
        svd(name, min(MATRICES[name][:2]) // part, a, max(1, args.rounds // 2))
        for name in MATRICES
        for a in alphas
        for part in parts
    ]
    settings = {"rounds": args.rounds, "alphas": alphas, "ranks": ranks, "rank_parts": parts, "load": load_average()}
    name = "decompositions-quick.json" if args.quick else "decompositions.json"
    finish(Path(__file__).parent / "results" / name, settings, {"tucker": tuckers, "svd": svds}, bounds(tuckers, svds))


if __name__ == "__main__":
    main()
