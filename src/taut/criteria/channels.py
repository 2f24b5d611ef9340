"""What whole channels are worth: optimal brain surgeon over blocks of columns, and scores of channels.

A coupled group holds n classes of channels that can only go together. Every layer that reads them is a least-squares
problem of its own, tr(B dW A dW^T) with A the second moment of its inputs. If the columns S of a class go, and all
others move so that this error is least, then

    cost       tr(B W_S ([A^-1]_SS)^-1 W_S^T)
    W      ->  W - W_S ([A^-1]_SS)^-1 [A^-1]_S:
    A^-1   ->  A^-1 - [A^-1]_:S ([A^-1]_SS)^-1 [A^-1]_S:

(Hassibi and Stork 1993 for one weight; here blocks, and the sum over all readers of the group decides.) Two things make
it fast and exact. The cost needs W only as H = W^T B W, which has the size of A^-1 whatever the number of outputs. And
with the columns in order of removal, those that go last first, and A = L L^T, the error of every prefix S of that order
is tr(B W_S L_SS L_SS^T W_S^T): one Cholesky factorization gives the damage at every width, without the rounding
errors of the search.

The scores are higher for what is more worth keeping; `rows` are the filters of a layer that makes the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.errors import CallError

PENDING = 128
"""Columns of updates that wait until they are put into the matrices together: products of matrices, not of vectors."""


@dataclass(frozen=True)
class Reader:
    """One layer that reads the channels of a group, as a least-squares problem."""

    W: Tensor
    """(o, k) weights."""
    A: Tensor
    """(k, k) positive definite second moment of the (unfolded) inputs."""
    owner: Tensor
    """(k,) which class each column belongs to; -1: a column of other channels, which stays."""
    weight: Tensor | None = None
    """(o,) or (o, o) positive semidefinite metric B of the outputs; None: the identity."""
    scale: float = 1.0
    """What turns the squared error into the unit that all readers share."""


@dataclass(frozen=True)
class Removal:
    """An order of removal, and what it costs."""

    order: Tensor
    """(n,) classes, the one that goes first in front."""
    damages: Tensor
    """(n,) in float64, rising: the error, summed over all readers, after order[0 ... i] are gone."""


def removal(problems: Sequence[Reader], classes: int, least: int = 1) -> Removal:
    """In which order the classes of a group go, and the damage at every width.

    One class after the other, always the one whose removal adds least to the error of all readers together, given
    those that are gone and the exact move of all other columns.

    Args:
        problems: the layers that read the classes; one that holds no column of a class loses nothing with it.
        classes: n.
        least: classes at which the search ends; these come last, in order of what each costs then. Their damages are
            exact too.

    Raises:
        CallError: shapes do not fit, a number is out of its range, or an A is not positive definite.
    """
    if not 0 <= least <= classes:
        raise CallError(f"The 'least' of a removal must be between 0 and {classes}. Got {least} instead.")
    for problem in problems:
        _checked(problem, classes)
    searches = [_Search(problem, classes) for problem in problems]
    left = torch.arange(classes, device=problems[0].W.device if problems else None)
    order: list[int] = []
    cost = _cost(searches, left)
    while len(left) > least:
        place = int(cost.argmin())
        gone = int(left[place])
        left = torch.cat((left[:place], left[place + 1 :]))
        order.append(gone)
        for search in searches:
            search.remove(gone)
        cost = _cost(searches, left)
    whole = torch.cat((left.new_tensor(order), left[cost.argsort(stable=True)]))
    steps = torch.zeros(classes, dtype=torch.float64, device=left.device)
    for problem in problems:
        steps += _steps(problem, whole)
    return Removal(whole, steps.cumsum(0))


def kept_weights(reader: Reader, keep: Tensor) -> Tensor:
    """The weights of the columns that are left, moved so that tr(B dW A dW^T) is least: A_KK w_K = A_K: w.

    Args:
        reader: the layer; its B and scale do not matter, as all outputs keep the same columns.
        keep: (n,) bool, True where a class stays.

    Returns:
        (o, k) in float64, zero in the columns of the other classes.

    Raises:
        CallError: shapes do not fit, or A is not positive definite.
    """
    if keep.dtype != torch.bool or keep.ndim != 1:
        raise CallError(f"The 'keep' of kept_weights must be (n,) of bool. Got {tuple(keep.shape)} of {keep.dtype}.")
    _checked(reader, len(keep))
    owner, W, A = reader.owner.long(), reader.W.double(), reader.A.double()
    stays = torch.where(owner < 0, True, keep.to(owner.device)[owner.clamp_min(0)]) if len(keep) else owner < 0
    place = stays.nonzero()[:, 0]
    found = torch.zeros_like(W)
    found[:, place] = torch.cholesky_solve(A[place] @ W.T, _cholesky(A[place][:, place])).T
    return found


class _Search:
    """What the search holds of one reader: A^-1 and W^T B W of the columns that may still go.

    Both lag behind: A^-1 is P - Q^T Q and W^T B W is H - Q^T Z - Z^T Q. Their diagonal blocks, which the costs need,
    never do.
    """

    def __init__(self, reader: Reader, classes: int) -> None:
        owner, W = reader.owner.long(), reader.W.double()
        free = (owner >= 0).nonzero()[:, 0]
        # Columns that stay move as well, but nothing of them is ever read again.
        self.P = torch.cholesky_inverse(_cholesky(reader.A.double()))[free][:, free]
        self.H = (reader.scale * (W.T @ _weighed(W, reader.weight)))[free][:, free]
        self.Q = self.Z = self.P[:0]
        self.place, self.real = _places(owner[free], classes)
        across = self.place[:, :, None], self.place[:, None]
        both = self.real[:, :, None] & self.real[:, None]
        self.blocks = torch.where(both, self.P[across], torch.eye(both.shape[1], dtype=W.dtype, device=W.device))
        self.errors = torch.where(both, self.H[across], 0.0)

    def costs(self, left: Tensor) -> Tensor:
        """What the removal of each of these classes adds to the error."""
        blocks, errors = self.blocks[left], self.errors[left]
        if blocks.shape[1] == 1:
            return (errors / blocks)[:, 0, 0]
        L = torch.linalg.cholesky_ex(blocks)[0]
        return torch.cholesky_solve(errors, L).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, gone: int) -> None:
        """Take the columns of one class out, with the exact move of all others."""
        S = self.place[gone][self.real[gone]]
        if not len(S):
            return
        p = self.P[S] - self.Q[:, S].T @ self.Q
        h = self.H[S] - self.Q[:, S].T @ self.Z - self.Z[:, S].T @ self.Q
        L = torch.linalg.cholesky_ex(p[:, S])[0]
        q, y = (torch.linalg.solve_triangular(L, one, upper=False) for one in (p, h))
        z = y - 0.5 * torch.linalg.solve_triangular(L, y[:, S].T, upper=False) @ q
        self.Q, self.Z = torch.cat((self.Q, q)), torch.cat((self.Z, z))
        q, z = (one[:, self.place].permute(1, 2, 0) * self.real[:, :, None] for one in (q, z))
        self.blocks.baddbmm_(q, q.mT, alpha=-1)
        self.errors.baddbmm_(q, z.mT, alpha=-1).baddbmm_(z, q.mT, alpha=-1)
        self.real[gone] = False
        if len(self.Q) >= PENDING:
            self._catch_up()

    def _catch_up(self) -> None:
        """Put the waiting updates into P and H, without the columns that are gone."""
        here = torch.zeros(len(self.P), dtype=torch.bool, device=self.P.device)
        here[self.place[self.real]] = True
        stay = here.nonzero()[:, 0]
        Q, Z = self.Q[:, stay], self.Z[:, stay]
        self.P = self.P[stay][:, stay].addmm_(Q.T, Q, alpha=-1)
        self.H = self.H[stay][:, stay].addmm_(Q.T, Z, alpha=-1).addmm_(Z.T, Q, alpha=-1)
        self.Q = self.Z = Q[:0]
        self.place = torch.where(self.real, (here.cumsum(0) - 1)[self.place], 0)


def _cost(searches: Sequence[_Search], left: Tensor) -> Tensor:
    cost = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    for search in searches:
        cost += search.costs(left)
    return cost


def _places(owner: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(n, s) columns of each class, s the most that one owns, and which of these are real."""
    counts = owner.bincount(minlength=classes)
    most = int(counts.max()) if len(owner) else 0
    number = torch.arange(most, device=owner.device).expand(classes, -1)
    real = number < counts[:, None]
    place = torch.zeros_like(number)
    place[real] = owner.argsort(stable=True)
    return place, real


def _steps(reader: Reader, order: Tensor) -> Tensor:
    """What each removal of this order adds to the error, by one factorization of A in the opposite order."""
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    owner = reader.owner.long()
    free = owner >= 0
    when = torch.where(free, rank[owner.clamp_min(0)], len(order)) if len(order) else torch.zeros_like(owner)
    columns = when.argsort(descending=True, stable=True)
    T = reader.W.double()[:, columns] @ _cholesky(reader.A.double()[columns][:, columns])
    errors = reader.scale * (T * _weighed(T, reader.weight)).sum(0).clamp_min(0)
    steps = torch.zeros(len(order), dtype=torch.float64, device=order.device)
    return steps.index_add_(0, when[columns][free[columns]], errors[free[columns]])


def _weighed(W: Tensor, weight: Tensor | None) -> Tensor:
    """B W."""
    if weight is None:
        return W
    B = weight.to(W)
    return B[:, None] * W if B.ndim == 1 else B @ W


def _cholesky(A: Tensor) -> Tensor:
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A)
    if int(info) or not bool(L.isfinite().all()):
        raise CallError("The 'A' of a reader must be finite and positive definite: add a ridge to its diagonal.")
    return L


def _checked(reader: Reader, classes: int) -> None:
    """Raise what is wrong with a reader."""
    shape = tuple(reader.W.shape)
    if len(shape) != 2 or not bool(reader.W.isfinite().all()):
        raise CallError(f"The 'W' of a reader must be (o, k) and finite. Got {shape} instead.")
    o, k = shape
    if reader.A.shape != (k, k):
        raise CallError(f"The 'A' of a reader must be {(k, k)}. Got {tuple(reader.A.shape)} instead.")
    if reader.owner.shape != (k,) or bool(((reader.owner < -1) | (reader.owner >= classes)).any()):
        raise CallError(f"The 'owner' of a reader must be ({k},), of numbers between -1 and {classes - 1}.")
    if reader.weight is not None and reader.weight.shape not in {(o,), (o, o)}:
        raise CallError(f"The 'weight' of a reader must be ({o},) or {(o, o)}. Got {tuple(reader.weight.shape)}.")
    if not 0 <= reader.scale < float("inf"):
        raise CallError(f"The 'scale' of a reader must be finite and not negative. Got {reader.scale} instead.")


def norm(rows: Tensor, p: int) -> Tensor:
    """Size of each filter, sum |w| or sqrt(sum w^2) (Li et al. 2017).

    Args:
        rows: (n, fan) filters.
        p: 1 or 2.

    Returns:
        (n,) in float64.

    Raises:
        CallError: p is none of these.
    """
    if p not in {1, 2}:
        raise CallError(f"The 'p' of norm must be 1 or 2. Got {p} instead.")
    size = rows.double().flatten(1).abs()
    return size.sum(1) if p == 1 else size.square().sum(1).sqrt()


def bn_scale(gamma: Tensor) -> Tensor:
    """|gamma| of the batch norm behind each channel, (n,) to (n,) in float64 (Liu et al. 2017, network slimming)."""
    return gamma.double().abs()


def geometric_median(rows: Tensor) -> Tensor:
    """sum_j ||w_i - w_j||: how far a filter is from all others of its layer (He et al. 2019, FPGM).

    Args:
        rows: (n, fan) filters.

    Returns:
        (n,) in float64; least for a filter that the others can stand in for.
    """
    wide = rows.double().flatten(1)
    return torch.cdist(wide, wide).sum(1)


def residual(rows: Tensor, ridge: float = 1e-6) -> Tensor:
    """What the other filters of its layer cannot combine of a filter: min_v ||w_i - sum_j v_j w_j||^2, nearly.

    1 / [(G + r I)^-1]_ii of the Gram matrix G, which is r + min_v ||w_i - sum_j v_j w_j||^2 + r ||v||^2 over j != i.

    Args:
        rows: (n, fan) filters.
        ridge: r as a share of the mean squared norm of the filters.

    Returns:
        (n,) in float64; zero if all filters are zero.

    Raises:
        CallError: the ridge is not positive, or a filter is not finite.
    """
    if not 0 < ridge < float("inf"):
        raise CallError(f"The 'ridge' of residual must be positive. Got {ridge} instead.")
    wide = rows.double().flatten(1)
    G = wide @ wide.T
    size = G.diagonal().mean()
    if not len(G) or size == 0:
        return torch.zeros_like(wide.sum(1))
    G.diagonal().add_(ridge * size)
    L, info = torch.linalg.cholesky_ex(G)
    if int(info) or not bool(L.isfinite().all()):
        raise CallError(f"The residual needs finite filters and a larger 'ridge' than {ridge}.")
    return 1 / torch.cholesky_inverse(L).diagonal()


def energy(second_moment_diagonal: Tensor) -> Tensor:
    """E[a^2] of each channel, (n,) to (n,) in float64: what its activations carry."""
    return second_moment_diagonal.double()


def taylor(activation_times_gradient: Tensor) -> Tensor:
    """|mean over positions of a dL/da|, averaged over samples, of norm 1 in the layer (Molchanov et al. 2017).

    Args:
        activation_times_gradient: (samples, n) means over positions of a dL/da, with their sign.

    Returns:
        (n,) in float64; zeros if all of it is zero.
    """
    mean = activation_times_gradient.double().abs().mean(0)
    return mean / mean.square().sum().sqrt().clamp_min(torch.finfo(mean.dtype).tiny)


def pooled(per_layer: Sequence[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Scores of classes: the sum over the rows of a class in a layer, and over the layers of the group.

    Args:
        per_layer: scores (rows,) of a layer, and the class of each row (rows,); -1: a row of other channels.
        classes: n.

    Returns:
        (n,) in float64; zero for a class that no layer makes.

    Raises:
        CallError: scores and owners differ in number, an owner is no class, or a score is not a number.
    """
    total = torch.zeros(classes, dtype=torch.float64, device=per_layer[0][0].device if per_layer else None)
    for scores, owner in per_layer:
        if scores.shape != owner.shape or bool(((owner < -1) | (owner >= classes)).any()):
            raise CallError(
                f"The 'owner' of {len(scores)} scores must be as many numbers between -1 and {classes - 1}."
            )
        if bool(scores.isnan().any()):
            raise CallError("The scores of channels must be numbers: are the weights and the data finite?")
        mine = owner >= 0
        total.index_add_(0, owner[mine].long(), scores[mine].double())
    return total
