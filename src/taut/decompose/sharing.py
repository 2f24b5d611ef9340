"""Shared bases in the metric of the inputs: W_i ~ G_out S_i G_in^T, ONE basis per type of channels.

A layer counts with its output error relative to its output, tr(dW C dW^T) / tr(W C W^T), C the second moment of its
inputs. For given bases the best core is closed form (variable projection), so only the bases are searched: by L-BFGS
from the leading directions in the metric. Without statistics it is the joint factorization of the weights
(`trifactor.signed`), which in the metric is no good start: its error is two to four times as large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import ridge, spectrum
from taut.decompose.trifactor import Relation, signed
from taut.decompose.weighting import RIDGE, Weighting

ITERATIONS = 60
"""Of L-BFGS at most."""

TRIAL = 10
"""Iterations after which ranks are compared."""

TOLERANCE = 1e-3
"""Relative gain of a sweep at which the factorization of the weights ends."""

WORK = 2e12
"""Operations of L-BFGS at most, estimated: large nets take fewer iterations."""

EXACT = 1e-13
"""Share of the energy left out that is rounding."""

LIFT = 1e-12
"""Share of the mean eigenvalue added to a Gram matrix that is inverted: bases may have dependent columns."""

Bases = Mapping[str, Tensor]
"""Type -> (n, k); a type that keeps all its channels has none."""


class Term:
    """One layer as the objective sees it, float64, its output energy scaled to one.

    Args:
        relation: matrices (m, n, o); rows are the input's type, columns the output's.
        weighting: second moment of the inputs over (n m), one group.
    """

    def __init__(self, relation: Relation, weighting: Weighting) -> None:
        """See the class."""
        self.relation, self.rows, self.columns = relation, relation.rows, relation.columns
        self.W = relation.matrices.permute(2, 1, 0).double()
        self.known = weighting.known
        self._form(weighting)
        energy = float((self.W * self.weighed()).sum())
        self.scale = 1 / energy if energy > 0 else 1.0
        self.energy = 1.0 if energy > 0 else 0.0
        self.X = self.weighed() * self.scale
        self.P = torch.einsum("onm,pnm->op", self.X, self.W)

    def _form(self, weighting: Weighting) -> None:
        """C as one of: `full` (n, m, n, m), `channel` (n, n) the same for every offset, `sketch` (r, n, m)."""
        _, n, m = self.W.shape
        self.full: Tensor | None = None
        self.channel: Tensor | None = None
        self.sketch: Tensor | None = None
        self.lift = 1.0
        if weighting.sketch is not None:
            self.sketch = weighting.sketch[0].double().reshape(-1, n, m)
            self.lift = max(float(weighting.lift()[0]), 1e-300)
            return
        C = weighting.channel if weighting.full is None else weighting.full
        if C is not None:
            lifted = ridge(C, RIDGE)[0]
            if len(lifted) == n:
                self.channel = lifted
            else:
                rest = torch.eye(n * m // len(lifted)).to(lifted)  # channels before a flatten, and offsets
                self.full = (lifted if len(rest) == 1 else torch.kron(lifted, rest)).reshape(n, m, n, m)

    def weighed(self) -> Tensor:
        """W C, (o, n, m)."""
        if self.full is not None:
            return _contracted(self.W, self.full)
        if self.channel is not None:
            return torch.einsum("onm,np->opm", self.W, self.channel)
        if self.sketch is not None:
            seen = self.W.flatten(1) @ self.sketch.flatten(1).mT
            return _contracted(seen, self.sketch) + self.lift * self.W
        return self.W

    def moment(self, G: Tensor) -> tuple[Tensor, bool]:
        """Second moment of what G (n, k) gathers: (k m, k m), or with True (k, k), the same for every offset."""
        n, k = G.shape
        if self.full is not None:
            half = (G.mT @ self.full.reshape(n, -1)).reshape(-1, n, self.W.shape[2])
            return torch.einsum("anm,nk->akm", half, G).reshape(k * self.W.shape[2], -1) * self.scale, False
        if self.sketch is not None:
            Y = torch.einsum("rnm,nk->rkm", self.sketch, G).flatten(1)
            eye = torch.eye(self.W.shape[2]).to(G)
            return (Y.mT @ Y + self.lift * torch.kron(G.mT @ G, eye)) * self.scale, False
        return G.mT @ (G if self.channel is None else self.channel @ G) * self.scale, True

    def halves(self, bases: Bases) -> tuple[Tensor, Tensor]:
        """L_out^-1 Go^T W C Gi L_in^-T, whose squares add up to what is retained, and L_in."""
        inside, outside = bases.get(self.rows), bases.get(self.columns)
        if inside is None:  # all inputs are kept: their metric cancels
            return _whitened(outside, self.W), torch.empty(0)
        R = torch.einsum("onm,nk->okm", self.X, inside)
        M, alike = self.moment(inside)
        L = _cholesky(M)
        flat = R.transpose(1, 2).flatten(0, 1) if alike else R.flatten(1)
        Z = torch.linalg.solve_triangular(L.mT, flat, upper=True, left=False)
        Z = Z.reshape(len(R), R.shape[2], -1).transpose(1, 2) if alike else Z.reshape(R.shape)
        return _whitened(outside, Z), L

    def error(self, bases: Bases) -> Tensor:
        """Of the best core, relative to the layer's output."""
        if self.rows not in bases:
            outside = bases.get(self.columns)
            if outside is None:
                return self.P.new_zeros(())
            half = _whitened(outside, self.P)
            return self.energy - torch.trace(_whitened(outside, half.mT))
        return self.energy - self.halves(bases)[0].square().sum()

    def core(self, bases: Bases) -> Tensor:
        """The best S (k_out, k_in, m)."""
        Y, L = self.halves(bases)
        outside = bases.get(self.columns)
        if outside is not None:
            upper = _cholesky(outside.mT @ outside).mT
            Y = torch.linalg.solve_triangular(upper, Y.flatten(1), upper=True).reshape(Y.shape)
        if self.rows not in bases:
            return Y
        alike = len(L) == Y.shape[1]
        flat = Y.transpose(1, 2).flatten(0, 1) if alike else Y.flatten(1)
        S: Tensor = torch.linalg.solve_triangular(L, flat, upper=False, left=False)
        return S.reshape(len(Y), Y.shape[2], -1).transpose(1, 2) if alike else S.reshape(Y.shape)

    def work(self, ranks: Mapping[str, int]) -> float:
        """Operations of one error and its gradient, about."""
        o, n, m = self.W.shape
        k = ranks[self.rows]
        if k == n:
            return 6.0 * o * o * ranks[self.columns]
        moment = k * n * n * m * m if self.full is not None else k * n * n
        rows = 0 if self.sketch is None else len(self.sketch)
        size = k if self.full is None and self.sketch is None else k * m
        return 6.0 * (o * n * m * k + moment + size**3 + rows * size * (n + size))


def _contracted(A: Tensor, B: Tensor) -> Tensor:
    """A (o, ...) times B (..., n, m), over all that they have in common: (o, n, m)."""
    n, m = B.shape[-2:]
    return (A.flatten(1) @ B.reshape(-1, n * m)).reshape(-1, n, m)


def _cholesky(A: Tensor) -> Tensor:
    mean = A.detach().diagonal().mean().clamp_min(1e-300)
    L: Tensor = torch.linalg.cholesky_ex(A + LIFT * mean * torch.eye(len(A)).to(A))[0]
    return L


def _whitened(G: Tensor | None, X: Tensor) -> Tensor:
    """L^-1 G^T X of X (o, ...), with L L^T = G^T G."""
    if G is None:
        return X
    Y: Tensor = torch.linalg.solve_triangular(_cholesky(G.mT @ G), G.mT @ X.flatten(1), upper=False)
    return Y.reshape(-1, *X.shape[1:])


@dataclass(frozen=True)
class Leading:
    """The leading directions of every type, all its layers together.

    Attributes:
        vectors: type -> (n, n), orthonormal, those that carry most of the layers' relative outputs first.
        tails: per layer, of its inputs and of its outputs: (n + 1,), the share of its output outside the first k.
    """

    vectors: Mapping[str, Tensor]
    tails: tuple[tuple[Tensor, Tensor], ...]


def tried(terms: Sequence[Term], vectors: Bases, ranks: Mapping[str, int]) -> float:
    """Errors of all layers together after a few steps from the leading directions: to compare ranks."""
    return _total(terms, _found(terms, vectors, ranks, TRIAL))


def leading(terms: Sequence[Term]) -> Leading:
    """Directions of outputs by W C W^T; of inputs those that the output's directions are made from, with its shares."""
    sides = [(_inputs(term), term.P) for term in terms]
    moments: dict[str, Tensor] = {}
    for term, pair in zip(terms, sides, strict=True):
        for name, moment in zip((term.rows, term.columns), pair, strict=True):
            moments[name] = moments[name] + moment if name in moments else moment
    vectors = {name: spectrum(moment[None])[0][0] for name, moment in moments.items()}
    tails = tuple(
        (_tail(inputs, vectors[term.rows]), _tail(outputs, vectors[term.columns]))
        for term, (inputs, outputs) in zip(terms, sides, strict=True)
    )
    return Leading(vectors, tails)


def _inputs(term: Term) -> Tensor:
    (U,), (values,) = spectrum(term.P[None])
    seen = (U.mT @ term.W.flatten(1)).reshape(term.W.shape)
    share = values / seen.square().sum((1, 2)).clamp_min(1e-300)
    side = (seen * share.sqrt()[:, None, None]).transpose(0, 1).flatten(1)
    moment: Tensor = side @ side.mT
    return moment


def _tail(moment: Tensor, U: Tensor) -> Tensor:
    """Trace of the moment outside the first k columns of U, k = 0 ... n."""
    kept = ((moment @ U) * U).sum(0)
    tail: Tensor = torch.cat([kept.flip(0).cumsum(0).flip(0), kept.new_zeros(1)]).clamp_min(0)
    return tail


@dataclass(frozen=True)
class SharedFactors:
    """What `share_bases` finds.

    Attributes:
        bases: type -> (n, k), orthonormal; none for a type that keeps all its channels.
        cores: per layer (k_out, k_in, m). errors: per layer, of its output relative to it.
    """

    bases: Bases
    cores: tuple[Tensor, ...]
    errors: tuple[float, ...]


def share_bases(terms: Sequence[Term], ranks: Mapping[str, int]) -> SharedFactors:
    """One basis per type, and the best cores.

    Args:
        terms: the layers.
        ranks: type -> k; where it is the type's size there is no basis.
    """
    sizes = {name: size for t in terms for name, size in ((t.rows, t.W.shape[1]), (t.columns, len(t.W)))}
    cut = [name for name, size in sizes.items() if ranks[name] < size]
    exact = _exact(terms, ranks, cut)
    if exact is not None:  # the weights say more than any metric
        exact = _turned(exact)
        return SharedFactors(exact, tuple(_projected(t, exact) for t in terms), (0.0,) * len(terms))
    if any(t.known for t in terms):
        bases = _found(terms, leading(terms).vectors, ranks, ITERATIONS)
    else:
        found = signed([t.relation for t in terms], dict(ranks), tol=TOLERANCE).bases
        bases = {name: found[name] for name in cut}
    bases = _turned(bases)
    cores = tuple(t.core(bases) for t in terms)
    return SharedFactors(bases, cores, tuple(float(t.error(bases)) for t in terms))


def _turned(bases: Bases) -> dict[str, Tensor]:
    """Orthonormal columns of the same span in a random gauge.

    Then all columns carry about the same energy, so that training moves all alike, and no core has tiny rows, which
    the half precisions round to zero.
    """
    found = {}
    for place, (name, G) in enumerate(bases.items()):
        noise = torch.randn(2 * (G.shape[1],), generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        found[name] = torch.linalg.qr(G)[0] @ torch.linalg.qr(noise.to(G))[0]
    return found


def _exact(terms: Sequence[Term], ranks: Mapping[str, int], cut: Sequence[str]) -> dict[str, Tensor] | None:
    """Bases that hold all weights, where there are such."""
    moments: dict[str, Tensor] = {}
    for term in terms:
        scale = term.W.square().sum().clamp_min(1e-300)
        for name, side in ((term.rows, term.W.transpose(0, 1)), (term.columns, term.W)):
            if name in cut:
                moment = side.flatten(1) @ side.flatten(1).mT / scale
                moments[name] = moments[name] + moment if name in moments else moment
    bases = {}
    for name, moment in moments.items():
        (U,), (values,) = spectrum(moment[None])
        if float(values[ranks[name] :].sum()) > EXACT * float(values.sum()):
            return None
        bases[name] = U[:, : ranks[name]]
    return bases


def _projected(term: Term, bases: Bases) -> Tensor:
    """G^T W G of orthonormal bases, (k_out, k_in, m)."""
    inside, outside = bases.get(term.rows), bases.get(term.columns)
    core = term.W if inside is None else torch.einsum("onm,nk->okm", term.W, inside)
    return core if outside is None else torch.einsum("onm,ok->knm", core, outside)


def _total(terms: Sequence[Term], bases: Bases) -> float:
    return float(sum(t.error(bases) for t in terms))


def _found(terms: Sequence[Term], vectors: Bases, ranks: Mapping[str, int], steps: int) -> dict[str, Tensor]:
    start = {name: U[:, : ranks[name]] for name, U in vectors.items() if ranks[name] < len(U)}
    return _improved(terms, start, int(min(steps, WORK / sum(t.work(ranks) for t in terms))))


def _improved(terms: Sequence[Term], bases: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """L-BFGS on the bases; the start where that finds nothing better."""
    before = _total(terms, bases)
    if steps < 1 or not bases or before <= EXACT * len(terms):
        return bases
    with torch.enable_grad():
        moved = {name: G.detach().contiguous().clone().requires_grad_() for name, G in bases.items()}
        search = torch.optim.LBFGS(
            list(moved.values()), max_iter=steps, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            total = torch.stack([t.error(moved) for t in terms]).sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        search.step(closure)  # type: ignore[no-untyped-call]
    found = {name: G.detach() for name, G in moved.items()}
    return found if _total(terms, found) < before else bases
