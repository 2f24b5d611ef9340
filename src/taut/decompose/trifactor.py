"""Joint tri-factorization of a graph of relations: W_ij ~ G_i S_ij G_j^T with ONE basis G_i per type of objects.

Types are the layers of neurons of a network, relations its weight matrices; several relations may join the same two
types (the kernel offsets of a convolution). Every basis is shared by all relations that touch its type.

    signed     G_i orthonormal: the leading left singular vectors of all [W_ij G_j, W_ki^T G_k]; monotone, no inverse
    dfmf       G_i >= 0, S_ij signed, multiplicative updates: `taut.decompose.dfmf`

Relations are divided by their Frobenius norm first, so that small ones (an output layer) are not lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import gram, left_basis, spectrum
from taut.errors import CallError

CHEAP = 128
"""Up to this many directions an eigensolver costs no more than a step towards its result."""

STEPS = 4
"""Of a power iteration from a random start, each worth two of the matrices themselves."""


@dataclass(frozen=True)
class Relation:
    """Matrices between two types.

    Attributes:
        rows, columns: names of the types. matrices: (m, n_rows, n_columns), m relations of these types.
    """

    rows: str
    columns: str
    matrices: Tensor

    @classmethod
    def of(cls, rows: str, columns: str, W: Tensor) -> Relation:
        """One matrix, or a stack of them."""
        return cls(rows, columns, W if W.ndim == 3 else W[None])


@dataclass(frozen=True)
class Trifactors:
    """Bases, cores and the way there.

    Attributes:
        bases: type -> (n, k). cores: per relation (m, k_rows, k_columns), on the scale of the given matrices.
        errors: relative error of the normalized graph after every sweep. relations: types of the cores, in order.
    """

    bases: Mapping[str, Tensor]
    cores: tuple[Tensor, ...]
    errors: tuple[float, ...]
    relations: tuple[tuple[str, str], ...]

    def compose(self, place: int) -> Tensor:
        """H = G_i S_ij G_j^T of one relation, (m, n_rows, n_columns)."""
        rows, columns = self.relations[place]
        core = self.cores[place]
        return self.bases[rows].to(core) @ core @ self.bases[columns].to(core).mT


def signed(
    relations: Sequence[Relation],
    ranks: Mapping[str, int],
    *,
    sweeps: int = 50,
    tol: float = 1e-4,
    normalize: bool = True,
) -> Trifactors:
    """Orthonormal bases: start from the dominant directions of every type, then improve each in turn.

    Args:
        relations: of the graph; every type must be touched by one.
        ranks: type -> k, at most its size.
        sweeps: over all types at most.
        tol: stop where the error falls by less than this share of it in a sweep.
        normalize: divide every relation by its norm first.

    Raises:
        CallError: the graph or the ranks do not fit.
    """
    sizes = check_graph(relations, ranks)
    scales, scaled = scaled_relations(relations, normalize)
    wide = by_type(scaled)
    narrow = max(sizes.values()) > CHEAP  # steps are taken in float32
    touching = by_type([Relation(r.rows, r.columns, r.matrices.float()) for r in scaled]) if narrow else wide
    bases = {name: _dominant(name, touching[name], ranks[name]) for name in sizes}
    total = sum(energy(r.matrices) for r in scaled)
    errors: list[float] = []
    exact = False
    for _ in range(sweeps):
        found, kept, best = _swept(touching, bases, exact)
        error = _share_left(kept, total)
        stalled = bool(errors) and errors[-1] - error <= tol * max(error, 1e-12)
        if best or not errors or error <= errors[-1]:  # a step, unlike the best, may overshoot
            bases = found
            errors.append(error)
        if stalled and best and not narrow:
            break
        exact = stalled
        if exact and narrow:  # float32 has done what it can
            narrow, touching = False, wide
            bases = _widened(bases, wide)
            errors[-1] = _share_left(sum(energy(core_of(r, bases)) for r in scaled), total)
    if narrow:
        bases = _widened(bases, wide)
    cores = tuple(core_of(r, bases) * scale for r, scale in zip(scaled, scales, strict=True))
    return Trifactors(bases, cores, tuple(errors), tuple((r.rows, r.columns) for r in relations))


def shifted(factors: Trifactors) -> Trifactors:
    """A non-negative solution of rank k + 1 from a signed one of rank k: G+ = [G - column minimum, 1], the same H."""
    lows = {name: G.amin(0) for name, G in factors.bases.items()}
    bases = {name: torch.cat([G - lows[name], torch.ones_like(G[:, :1])], 1) for name, G in factors.bases.items()}
    turns = {name: torch.cat([torch.eye(len(low)).to(low), low[None]]) for name, low in lows.items()}
    cores = tuple(
        turns[rows].to(core) @ core @ turns[columns].to(core).mT
        for core, (rows, columns) in zip(factors.cores, factors.relations, strict=True)
    )
    return Trifactors(bases, cores, factors.errors, factors.relations)


def check_graph(relations: Sequence[Relation], ranks: Mapping[str, int]) -> dict[str, int]:
    """Sizes of all types.

    Raises:
        CallError: a type has two sizes, no relation, or a rank outside 1 ... its size; a matrix is not finite.
    """
    if not relations:
        raise CallError("A graph needs at least one relation.")
    sizes: dict[str, int] = {}
    for relation in relations:
        if relation.matrices.ndim != 3 or not bool(torch.isfinite(relation.matrices).all()):
            raise CallError(f"The relation {relation.rows} - {relation.columns} must hold finite matrices.")
        for name, size in zip((relation.rows, relation.columns), relation.matrices.shape[1:], strict=True):
            if sizes.setdefault(name, size) != size:
                raise CallError(f"The type '{name}' has {sizes[name]} objects in one relation and {size} in another.")
    untouched = sorted(set(ranks) - set(sizes))
    if untouched:
        raise CallError(f"No relation touches the type '{untouched[0]}'.")
    for name, size in sizes.items():
        rank = ranks.get(name)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
            raise CallError(f"The rank of type '{name}' must be between 1 and {size}. Got {rank} instead.")
    return sizes


def shared_size(relations: Sequence[Relation], ranks: Mapping[str, int]) -> int:
    """Numbers in the factors, every basis counted once: sum n_i k_i + sum k_i k_j (one core per matrix)."""
    sizes = check_graph(relations, ranks)
    bases = sum(size * ranks[name] for name, size in sizes.items())
    return bases + sum(len(r.matrices) * ranks[r.rows] * ranks[r.columns] for r in relations)


def ranks_for_share(relations: Sequence[Relation], share: float, least: int = 1) -> dict[str, int]:
    """The largest uniform rank (capped by each type's size) whose factors hold at most `share` of the weights.

    Raises:
        CallError: the share is not in (0, 1], or not even `least` fits.
    """
    sizes = check_graph(relations, {name: 1 for r in relations for name in (r.rows, r.columns)})
    whole = sum(r.matrices.numel() for r in relations)
    if not 0 < share <= 1:
        raise CallError(f"The share of weights kept must be in (0, 1]. Got {share} instead.")

    def at(k: int) -> dict[str, int]:
        return {name: min(k, size) for name, size in sizes.items()}

    low, high = 0, max(sizes.values())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if shared_size(relations, at(middle)) <= share * whole else (low, middle - 1)
    if low < least:
        raise CallError(f"Factors of rank {least} hold more than {share:.1%} of the weights: keep a larger share.")
    return at(low)


def ranks_for_energy(relations: Sequence[Relation], share: float, least: int = 1) -> dict[str, int]:
    """Per type the fewest directions that hold `share` of what its (normalized) relations hold."""
    _, scaled = scaled_relations(relations, normalize=True)
    found = {}
    for name, mine in by_type(scaled).items():
        values = spectrum(_moment(name, mine)[None])[1][0]
        kept = values.cumsum(0) / values.sum().clamp_min(1e-300)
        found[name] = min(len(values), max(least, int((kept < share).sum()) + 1))
    return found


def scaled_relations(relations: Sequence[Relation], normalize: bool) -> tuple[list[float], list[Relation]]:
    """Each relation over its norm; one of zeros stays."""
    norms = [math.sqrt(energy(r.matrices)) for r in relations]
    scales = [norm if normalize and norm > 0 else 1.0 for norm in norms]
    scaled = [Relation(r.rows, r.columns, r.matrices / s) for r, s in zip(relations, scales, strict=True)]
    return scales, scaled


def by_type(relations: Sequence[Relation]) -> dict[str, list[Relation]]:
    """The relations that touch each type."""
    found: dict[str, list[Relation]] = {}
    for relation in relations:
        for name in dict.fromkeys((relation.rows, relation.columns)):
            found.setdefault(name, []).append(relation)
    return found


def side_by_side(stack: Tensor) -> Tensor:
    """(m, n, k) -> (n, m k)."""
    return stack.transpose(0, 1).flatten(1)


def _moment(name: str, relations: Sequence[Relation]) -> Tensor:
    """Sum of W W^T over the relations that have the type as rows, and of W^T W over those that have it as columns."""
    parts = [gram(side_by_side(r.matrices)) for r in relations if r.rows == name]
    parts += [gram(side_by_side(r.matrices.mT)) for r in relations if r.columns == name]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _dominant(name: str, relations: Sequence[Relation], rank: int) -> Tensor:
    """Leading eigenvectors of the moment; of a large one after a few steps only, which the sweeps make up for."""
    like = relations[0].matrices
    moment = _moment(name, relations)
    if len(moment) <= CHEAP or 2 * rank > len(moment):
        return spectrum(moment[None], rank)[0][0].to(like)
    basis = torch.randn(len(moment), rank, generator=torch.Generator().manual_seed(0)).to(like)
    for _ in range(STEPS):
        basis = _orthonormal(moment @ basis)
    return basis


def _swept(
    touching: Mapping[str, Sequence[Relation]], bases: Mapping[str, Tensor], exact: bool
) -> tuple[dict[str, Tensor], float, bool]:
    """All bases, each improved beside the newest others; the energy kept; whether each is the best one there."""
    found, kept, best, done = dict(bases), 0.0, True, set()
    for name, relations in touching.items():
        rank = bases[name].shape[1]
        done.add(name)
        parts = [(r, seen) for r in relations for seen in _seen(name, r, found)]
        joined = torch.cat([part for _, part in parts], 1)
        if exact or min(joined.shape) <= CHEAP:
            found[name] = _best(joined, rank)
        elif rank >= joined.shape[1]:
            found[name] = _completed(_orthonormal(joined), rank)
        else:
            found[name], best = _stepped(joined, found[name]), False
        for relation, part in parts:
            if relation.rows == relation.columns:
                kept += energy(core_of(relation, found)) / 2
            elif {relation.rows, relation.columns} <= done:  # the core has got its second basis
                kept += energy(found[name].mT @ part)
    return found, kept, best


def _seen(name: str, relation: Relation, bases: Mapping[str, Tensor]) -> list[Tensor]:
    """What a relation shows of a type through the basis of its other type, (n, m k); twice if that is the same."""
    parts = []
    if relation.rows == name:
        parts.append(side_by_side(relation.matrices @ bases[relation.columns]))
    if relation.columns == name:
        parts.append(side_by_side(relation.matrices.mT @ bases[relation.rows]))
    return parts


def _widened(bases: Mapping[str, Tensor], touching: Mapping[str, Sequence[Relation]]) -> dict[str, Tensor]:
    """In the dtype of the matrices, orthonormal to its rounding."""
    return {name: _reflected(G.to(touching[name][0].matrices)) for name, G in bases.items()}


def _best(joined: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors; all that there are need no order."""
    if rank >= joined.shape[1]:
        return _completed(_reflected(joined), rank)
    U, _ = left_basis(joined[None], min(rank, *joined.shape))
    return _completed(U[0].to(joined), rank)


def _stepped(joined: Tensor, G: Tensor) -> Tensor:
    """One step of a power iteration, shifted by half the least of the values found: nothing left out outgrows them."""
    seen = joined.mT @ G
    return _orthonormal(torch.addmm(G, joined, seen, beta=-0.5 * float(seen.square().sum(0).min())))


def _orthonormal(X: Tensor) -> Tensor:
    """Columns of the same span: by Cholesky where they are far from dependent, otherwise by reflections."""
    X = X / X.norm(dim=0).clamp_min(1e-30)
    L, info = torch.linalg.cholesky_ex((X.mT @ X).double())
    if int(info) or not float(L.diagonal().min()) > 0.1:
        return _reflected(X)
    Q: Tensor = torch.linalg.solve_triangular(L.to(X).mT, X, upper=True, left=False)
    return Q


def _reflected(X: Tensor) -> Tensor:
    """Orthonormal to the rounding of the dtype of X."""
    Q: Tensor = torch.linalg.qr(X.double())[0].to(X)
    return Q


def energy(X: Tensor) -> float:
    """Sum of squares in float64, without a copy of all of X."""
    return math.fsum(float(rows.double().square().sum()) for rows in torch.split(X.flatten(0, -2), 1024))


def _share_left(kept: float, total: float) -> float:
    return math.sqrt(max(0.0, 1 - kept / max(total, 1e-300)))


def _completed(U: Tensor, rank: int) -> Tensor:
    """Orthonormal columns, also where fewer than `rank` directions carry anything."""
    missing = rank - U.shape[1]
    dead = U.norm(dim=0) < 0.5
    if missing <= 0 and not bool(dead.any()):
        return U
    generator = torch.Generator().manual_seed(0)
    U = torch.cat([U[:, ~dead], torch.randn(len(U), missing + int(dead.sum()), generator=generator).to(U)], 1)
    return _reflected(U)


def core_of(relation: Relation, bases: Mapping[str, Tensor]) -> Tensor:
    """G_i^T W_ij G_j: the best core where the bases are orthonormal."""
    return bases[relation.rows].mT @ (relation.matrices @ bases[relation.columns])
