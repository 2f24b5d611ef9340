"""Joint tri-factorization with non-negative bases, by multiplicative updates: what the sources of MFBP ran.

Source: Zitnik and Zupan 2015 (data fusion by matrix factorization). `taut.decompose.trifactor` is the graph, and the
signed solver that serves better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taut.decompose.trifactor import (
    Relation,
    Trifactors,
    by_type,
    check_graph,
    core_of,
    energy,
    scaled_relations,
    side_by_side,
)
from taut.errors import CallError

EPS = 1e-10
"""Smallest denominator of a multiplicative update."""

STARTS = ("random_c", "random_vcol", "random")


def dfmf(  # noqa: PLR0913 - the settings of the solver it stands beside
    relations: Sequence[Relation],
    ranks: Mapping[str, int],
    *,
    iterations: int = 100,
    start: str | Mapping[str, Tensor] = "random_c",
    constraints: Mapping[str, Tensor] | None = None,
    normalize: bool = False,
    seed: int = 0,
) -> Trifactors:
    """Non-negative bases by multiplicative updates, all from the sweep before.

    Args:
        relations: as `signed`.
        ranks: as `signed`.
        iterations: of all bases.
        start: "random_c" (means of random large columns), "random_vcol" (of any columns), "random", or bases.
        constraints: type -> (n, n), what must (negative) or must not (positive) be alike.
        normalize: divide every relation by its norm first; the sources did not.
        seed: of the start.

    Raises:
        CallError: the graph, the ranks, the start or a constraint do not fit.
    """
    sizes = check_graph(relations, ranks)
    scales, scaled = scaled_relations(relations, normalize)
    thetas = _checked(constraints or {}, sizes)
    bases = dict(_start(scaled, ranks, start, seed)) if isinstance(start, str) else _given(start, sizes, ranks)
    total = sum(energy(r.matrices) for r in scaled)
    errors: list[float] = []
    rows = {name: G.mT.contiguous() for name, G in bases.items()}
    for _ in range(iterations):
        error, rows = _multiplied(scaled, rows, thetas, total)
        errors.append(error)
    bases = {name: g.mT.contiguous() for name, g in rows.items()}
    cores = _least_squares_cores(scaled, bases)
    found = tuple(core * scale for core, scale in zip(cores, scales, strict=True))
    errors.append(_relative_error(scaled, bases, cores, total))
    return Trifactors(bases, found, tuple(errors[1:]), tuple((r.rows, r.columns) for r in relations))


def _least_squares_cores(relations: Sequence[Relation], bases: Mapping[str, Tensor]) -> list[Tensor]:
    inverse = {name: _inverse(_square(G)) for name, G in bases.items()}
    return [(inverse[r.rows] @ core_of(r, bases).double() @ inverse[r.columns]).to(r.matrices) for r in relations]


def _square(G: Tensor) -> Tensor:
    return (G.mT @ G).double()


def _inverse(S: Tensor) -> Tensor:
    """Pseudo-inverse of a square; where nothing is near the cut its inverse, which takes a tenth of the time."""
    L, info = torch.linalg.cholesky_ex(S)
    diagonal = L.diagonal()
    if int(info) or not float(diagonal.min()) > 1e-5 * float(diagonal.max()):
        found: Tensor = torch.linalg.pinv(S, hermitian=True)
        return found
    return torch.cholesky_inverse(L)


def _multiplied(
    relations: Sequence[Relation], rows: dict[str, Tensor], thetas: Mapping[str, Tensor], total: float
) -> tuple[float, dict[str, Tensor]]:
    """One iteration: cores by least squares, then every basis times the root of its two halves' quotient.

    The bases come as rows, g = G^T: products of few rows are a fifth quicker than those of few columns.
    """
    squares = {name: (g @ g.mT).double() for name, g in rows.items()}
    inverse = {name: _inverse(S) for name, S in squares.items()}
    over = {name: rows[name] @ theta.mul(-1).clamp_min_(0).mT for name, theta in thetas.items()}
    under = {name: rows[name] @ theta.clamp_min(0).mT for name, theta in thetas.items()}
    more, less = ({name: torch.zeros_like(S) for name, S in squares.items()} for _ in range(2))
    left = total

    def gather(name: str, A: Tensor, B: Tensor) -> None:
        """Numerators grow by A+ + B- g, denominators by A- + B+ g; the B of all relations meet g at once."""
        A_plus, B_plus = A.clamp_min(0), B.clamp_min(0)
        over[name] = over[name].add_(A_plus) if name in over else A_plus.clone()
        under[name] = under[name].add_(A_plus.sub_(A)) if name in under else A_plus.sub_(A)
        more[name] += B_plus
        less[name] += B_plus.sub_(B)

    for relation in relations:
        W, i, j = relation.matrices, relation.rows, relation.columns
        seen = _each(rows[j], W.mT)  # (W G_j)^T serves the core and the update
        projected = _each(rows[i], seen.mT).double()
        S = inverse[i] @ projected @ inverse[j]
        B_i, B_j = _summed(S @ squares[j], S.mT), _summed(S.mT @ squares[i], S)
        left += float((squares[i] * B_i).sum()) - 2 * float((S * projected).sum())
        small = S.to(W)
        gather(i, _summed(small, seen), B_i)
        gather(j, _summed(small.mT @ rows[i], W), B_j)
    for name, g in rows.items():
        over[name].addmm_(less[name].to(g), g)
        under[name].addmm_(more[name].to(g), g)
    updated = {name: g * over[name].div_(under[name].clamp_min_(EPS)).sqrt_() for name, g in rows.items()}
    return math.sqrt(max(0.0, left) / max(total, 1e-300)), updated


def _each(A: Tensor, B: Tensor) -> Tensor:
    """A (k, n) times every matrix of a stack; one alone is no batch."""
    return (A @ B[0])[None] if len(B) == 1 else A @ B


def _summed(A: Tensor, B: Tensor) -> Tensor:
    """Sum of the products of two stacks, (m, n, k) with (m, k, l)."""
    return A[0] @ B[0] if len(A) == 1 else (A @ B).sum(0)


def _relative_error(
    relations: Sequence[Relation], bases: Mapping[str, Tensor], cores: Sequence[Tensor], total: float
) -> float:
    left = 0.0
    for relation, core in zip(relations, cores, strict=True):
        S = core.double()
        projected = core_of(relation, bases).double()
        whole = _square(bases[relation.rows]) @ S @ _square(bases[relation.columns])
        left += float((S * whole).sum()) - 2 * float((S * projected).sum())
    return math.sqrt(max(0.0, total + left) / max(total, 1e-300))


def _start(relations: Sequence[Relation], ranks: Mapping[str, int], start: str, seed: int) -> dict[str, Tensor]:
    if start not in STARTS:
        raise CallError(f"The 'start' must be one of {', '.join(STARTS)}, or bases. Got '{start}'.")
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for name, mine in by_type(relations).items():
        like = mine[0].matrices
        if start == "random":
            size = like.shape[1] if mine[0].rows == name else like.shape[2]
            bases[name] = torch.rand(size, ranks[name], generator=generator).to(like)
            continue
        stacks = [side_by_side(r.matrices) for r in mine if r.rows == name]
        stacks += [side_by_side(r.matrices.mT) for r in mine if r.columns == name]
        bases[name] = 1e-5 + sum(
            (_means(stack, ranks[name], generator, large=start == "random_c").abs() for stack in stacks),
            torch.zeros(len(stacks[0]), ranks[name]).to(like),
        )
    return bases


def _means(X: Tensor, rank: int, generator: torch.Generator, *, large: bool) -> Tensor:
    """Means (n, rank) of a random fifth of the columns, drawn from the half with the largest norm or from all."""
    columns = X.shape[1]
    pool = X.norm(dim=0).argsort(descending=True)[: max(1, columns // 2)].cpu() if large else torch.arange(columns)
    size = max(1, columns // 5)
    picks = torch.stack([pool[torch.randint(len(pool), (size,), generator=generator)] for _ in range(rank)])
    return torch.stack([X[:, pick.to(X.device)].mean(1) for pick in picks], 1)


def _given(start: Mapping[str, Tensor], sizes: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    for name, size in sizes.items():
        if name not in start or tuple(start[name].shape) != (size, ranks[name]) or not bool((start[name] >= 0).all()):
            raise CallError(f"The start of type '{name}' must be a non-negative ({size}, {ranks[name]}) matrix.")
    return {name: start[name].clone() for name in sizes}


def _checked(constraints: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
    for name, theta in constraints.items():
        size = sizes.get(name)
        if size is None or tuple(theta.shape) != (size, size):
            raise CallError(f"The constraint of type '{name}' must be ({size}, {size}). Got {tuple(theta.shape)}.")
    return constraints
