"""Balanced clustering: vectors in clusters of EXACTLY equal size, by optimal assignment.

    euclidean    sum_i |x_i - mean of its cluster|^2
    projection   sum_i |x_i - its projection on the cluster's line|^2, the line being the best one through the origin

Everything is computed from the Gram matrix of the vectors, so their length does not matter: a filter of a wide layer
has tens of thousands of entries, a layer has hundreds of filters. Source: Denton et al. 2014, section 3.4, which
promises the projection distance; its code used k-means with sizes balanced by regret.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from taut.decompose.linalg import gram
from taut.errors import CallError

DISTANCES = ("euclidean", "projection")

SWEEPS = 30
"""Assignments of one start at most; five to ten are the rule."""

RESTARTS = 4

FEW = 48
"""Vectors up to which members are exchanged in every start, and between lines at all: that takes two eigenvalue
problems for every pair."""

SWAPS = 200
"""Exchanges of two members after the last assignment at most."""


def assign(cost: Tensor) -> Tensor:
    """The assignment of n rows to k columns with n / k rows each and the least total cost, (n,).

    Args:
        cost: (n, k), k divides n.
    """
    n, k = cost.shape
    repeated = np.repeat(cost.double().cpu().numpy(), n // k, axis=1)
    _, columns = linear_sum_assignment(repeated)
    return torch.from_numpy(columns // (n // k)).to(cost.device)


def balanced(X: Tensor, k: int, distance: str = "projection", restarts: int = RESTARTS, seed: int = 0) -> Tensor:
    """Labels 0 ... k - 1 of the rows of X, each n / k times.

    Args:
        X: (n, d).
        k: clusters, a divisor of n.
        distance: "euclidean" or "projection" (of lines: the sign and length of a vector do not matter for where it is).
        restarts: starting points; the best result wins.
        seed: of the starting points.

    Raises:
        CallError: k does not divide n, or the distance is unknown.
    """
    n = len(X)
    if not 1 <= k <= n or n % k:
        raise CallError(f"{n} vectors cannot form {k} clusters of equal size: use a divisor of {n}.")
    if distance not in DISTANCES:
        raise CallError(f"The 'distance' must be one of {', '.join(DISTANCES)}. Got '{distance}'.")
    if k == 1:
        return X.new_zeros(n, dtype=torch.long)
    if k == n:
        return torch.arange(n, device=X.device)
    K = gram(X.double()[None])[0]
    fit = _distances_to_means if distance == "euclidean" else _distances_to_lines
    found = [_cluster(K, k, fit, torch.Generator().manual_seed(seed + start)) for start in range(max(1, restarts))]
    exchange = _exchange if fit is _distances_to_means else _exchange_lines
    best = sorted(found, key=lambda pair: pair[0])
    if n <= FEW:
        better = [exchange(K, labels, k) for _, labels in best]
        return min(better, key=lambda labels: _error(K, labels, k, fit))
    return _exchange(K, best[0][1], k) if fit is _distances_to_means else best[0][1]


def spread(X: Tensor, labels: Tensor, distance: str = "projection") -> float:
    """The objective of a clustering: the squared error that the clusters' means or lines leave, over all energy."""
    K = gram(X.double()[None])[0]
    fit = _distances_to_means if distance == "euclidean" else _distances_to_lines
    return _error(K, labels, int(labels.max()) + 1, fit) / max(float(K.diagonal().sum()), 1e-300)


Fit = Callable[[Tensor, Tensor, int], Tensor]
"""Gram matrix, labels, k -> squared distances (n, k)."""


def _error(K: Tensor, labels: Tensor, k: int, fit: Fit) -> float:
    return float(fit(K, labels, k).gather(1, labels[:, None]).sum())


def _cluster(K: Tensor, k: int, fit: Fit, generator: torch.Generator) -> tuple[float, Tensor]:
    labels = assign(_first_distances(K, k, fit, generator))
    best = float("inf")
    for _ in range(SWEEPS):
        distances = fit(K, labels, k)
        error = float(distances.gather(1, labels[:, None]).sum())
        if error >= best * (1 - 1e-9):
            break
        best, kept = error, labels
        labels = assign(distances)
    return best, kept


def _first_distances(K: Tensor, k: int, fit: Fit, generator: torch.Generator) -> Tensor:
    """Distances to k single members, each drawn in proportion to its distance from those before (k-means++)."""
    size = K.diagonal().clamp_min(1e-300)
    lines = fit is _distances_to_lines
    near = torch.full_like(size, float("inf"))
    columns: list[Tensor] = []
    for _ in range(k):
        share = size if not columns else near.clamp_min(0)
        share = share if float(share.sum()) > 0 else torch.ones_like(size)
        pick = int(torch.multinomial(share.cpu(), 1, generator=generator))
        one = size - K[:, pick].square() / size[pick] if lines else size - 2 * K[:, pick] + size[pick]
        columns.append(one.clamp_min(0))
        near = torch.minimum(near, columns[-1])
    return torch.stack(columns, 1)


def _distances_to_means(K: Tensor, labels: Tensor, k: int) -> Tensor:
    """|x_i|^2 - 2 x_i m_a + |m_a|^2."""
    members = torch.nn.functional.one_hot(labels, k).to(K)
    members /= members.sum(0).clamp_min(1)
    cross = K @ members
    return K.diagonal()[:, None] - 2 * cross + (members * cross).sum(0)


def _distances_to_lines(K: Tensor, labels: Tensor, k: int) -> Tensor:
    """|x_i|^2 - (x_i c_a)^2 with the unit vector c_a = X_a^T e / sqrt(l), (l, e) the top eigenpair of X_a X_a^T."""
    members = labels.argsort(stable=True).reshape(k, -1)
    values, vectors = torch.linalg.eigh(K[members[:, :, None], members[:, None, :]])
    top, weight = vectors[..., -1], values[:, -1].clamp_min(1e-300)
    along = torch.einsum("nam,am->na", K[:, members], top)
    distances: Tensor = K.diagonal()[:, None] - along.square() / weight
    return distances


def _exchange(K: Tensor, labels: Tensor, k: int) -> Tensor:
    """Exchange pairs of members of two clusters as long as that lowers the Euclidean objective.

    With equal sizes m the objective falls by (sum_a |s_a|^2 after - before) / m, s_a the sum of a cluster.
    """
    labels, size = labels.clone(), K.diagonal()
    members = torch.nn.functional.one_hot(labels, k).to(K)
    S = K @ members  # (n, k): x_i . s_a
    pair = size[:, None] + size[None, :] - 2 * K  # |x_i - x_j|^2
    for _ in range(SWAPS):
        own = S.gather(1, labels[:, None])
        other = S[:, labels]  # x_i . s_{label of j}
        # i leaves a for b, j leaves b for a
        gain = 2 * (other - own) + 2 * (other.T - own.T) + 2 * pair
        gain[labels[:, None] == labels[None, :]] = -torch.inf
        best = int(gain.argmax())
        i, j = divmod(best, len(K))
        if float(gain[i, j]) <= 1e-9 * float(size.sum()):
            break
        a, b = labels[i].clone(), labels[j].clone()
        change = K[:, j] - K[:, i]
        S[:, a] += change
        S[:, b] -= change
        labels[i], labels[j] = b, a
    return labels


def _exchange_lines(K: Tensor, labels: Tensor, k: int) -> Tensor:
    """Exchange pairs of members of two clusters as long as that lowers what the clusters' lines leave."""
    labels = labels.clone()
    for _ in range(SWAPS):
        members = labels.argsort(stable=True).reshape(k, -1)
        place = torch.empty_like(labels)
        place[members] = torch.arange(members.shape[1], device=K.device).expand_as(members)
        kept = _top(K, members)
        i, j = (labels[:, None] < labels[None, :]).nonzero(as_tuple=True)
        a, b = members[labels[i]], members[labels[j]]
        a = a.scatter(1, place[i][:, None], j[:, None])
        b = b.scatter(1, place[j][:, None], i[:, None])
        gain = _top(K, a) + _top(K, b) - kept[labels[i]] - kept[labels[j]]
        best = int(gain.argmax())
        if float(gain[best]) <= 1e-9 * float(K.diagonal().sum()):
            break
        one, two = int(i[best]), int(j[best])
        labels[one], labels[two] = labels[two].clone(), labels[one].clone()
    return labels


def _top(K: Tensor, members: Tensor) -> Tensor:
    """The largest eigenvalue of the members' Gram matrix: what their line keeps."""
    values: Tensor = torch.linalg.eigvalsh(K[members[:, :, None], members[:, None, :]])[:, -1]
    return values
