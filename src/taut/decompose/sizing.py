"""Ranks of shared bases from the share of weights that may stay: the size equation of the whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from taut.errors import CallError

FLOORS = (10, 4, 1)
"""Ranks with which every type starts that is not smaller: the first of these that fits."""

PIECES = 512
"""Into so many steps a type's rank is raised."""

Links = Sequence[tuple[str, str, int]]
"""Per layer: type of the inputs, type of the outputs, matrices between them."""


def numbers(sizes: Mapping[str, int], ranks: Mapping[str, int], links: Links) -> int:
    """Stored numbers: sum n_i k_i, every basis counted once and none where k_i = n_i, + sum m k_in k_out."""
    bases = sum(size * ranks[name] for name, size in sizes.items() if ranks[name] < size)
    return bases + sum(m * ranks[rows] * ranks[columns] for rows, columns, m in links)


def thrifty(sizes: Mapping[str, int], ranks: Mapping[str, int], links: Links) -> dict[str, int]:
    """The ranks, and full ones where that stores no more: there the basis is better merged into the cores."""
    found = dict(ranks)
    for name, size in sizes.items():
        full = found | {name: size}
        if numbers(sizes, full, links) <= numbers(sizes, found, links):
            found = full
    return found


def ranks_for_share(
    sizes: Mapping[str, int], links: Links, tails: Sequence[tuple[Tensor, Tensor]], share: float
) -> list[dict[str, int]]:
    """Two ways to use `share` of the weights: ranks raised from the least, and from the largest that all can have.

    The rank goes up that gains most per number stored, again and again. The error of a layer is estimated by the root
    of the squared tails of its two sides: what one side cuts, the other cuts mostly too, and a rank that is raised on
    one side alone gains little.

    Args:
        sizes: type -> channels.
        links: the layers.
        tails: per layer, of its inputs and of its outputs: (n + 1,), the share of its output outside the first k.
        share: of the layers' weights, in (0, 1].

    Raises:
        CallError: even rank 1 stores more.
    """
    whole = sum(m * sizes[rows] * sizes[columns] for rows, columns, m in links)
    limit = int(share * whole)
    starts = [ranks for ranks in (_start(sizes, links, limit), _uniform(sizes, links, limit)) if ranks is not None]
    if not starts:
        least = numbers(sizes, thrifty(sizes, dict.fromkeys(sizes, 1), links), links)
        raise CallError(
            f"Shared bases of rank 1 already store {least / whole:.2%} of the weights. Got a 'share' of {share:.2%}: "
            "keep more."
        )
    known = [(a.tolist(), b.tolist()) for a, b in tails]
    return [_Search(sizes, links, known, ranks).grown(limit) for ranks in starts]


def _uniform(sizes: Mapping[str, int], links: Links, limit: int) -> dict[str, int] | None:
    """The largest rank that every type can have, capped by its size."""
    best = None
    low, high = 1, max(sizes.values())
    while low <= high:
        middle = (low + high) // 2
        ranks = thrifty(sizes, {name: min(size, middle) for name, size in sizes.items()}, links)
        fits = numbers(sizes, ranks, links) <= limit
        best = ranks if fits else best
        low, high = (middle + 1, high) if fits else (low, middle - 1)
    return best


class _Search:
    """Ranks on their way up."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        links: Links,
        tails: Sequence[tuple[list[float], list[float]]],
        ranks: dict[str, int],
    ) -> None:
        self.sizes, self.links, self.tails, self.ranks = sizes, links, tails, ranks
        self.touching = {name: [i for i, link in enumerate(links) if name in link[:2]] for name in sizes}
        self.stored = numbers(sizes, ranks, links)

    def grown(self, limit: int) -> dict[str, int]:
        """The ranks when none can be raised any more."""
        while self.grow(limit):
            pass
        return self.ranks

    def grow(self, limit: int) -> bool:
        """Raise the rank that gains most per number; False where none fits."""
        best, gain = None, -1.0
        for name, size in self.sizes.items():
            k = self.ranks[name]
            step = min(size, k + max(1, size // PIECES))
            for wish in {step, size} if k < size else ():
                more = self._stored(name, wish) - self._stored(name, k)
                if wish > step and more > 0:
                    continue  # a full rank is for where it is free
                worth = (self._error(name, k) - self._error(name, wish)) / more if more > 0 else float("inf")
                if self.stored + more <= limit and worth > gain:
                    best, gain = (name, wish, more), worth
        if best is None:
            return False
        self.ranks[best[0]] = best[1]
        self.stored += best[2]
        return True

    def _stored(self, name: str, rank: int) -> int:
        """Numbers in the basis of a type, and in all cores that it touches."""
        links = [self.links[i] for i in self.touching[name]]
        return numbers({name: self.sizes[name]}, self.ranks | {name: rank}, links)

    def _error(self, name: str, rank: int) -> float:
        ranks = self.ranks | {name: rank}
        total = 0.0
        for i in self.touching[name]:
            rows, columns, _ = self.links[i]
            total += math.hypot(self.tails[i][0][ranks[rows]], self.tails[i][1][ranks[columns]])
        return total


def _start(sizes: Mapping[str, int], links: Links, limit: int) -> dict[str, int] | None:
    """The least ranks; if they fit, with the last layer's outputs whole and a rank for each of them before it."""
    rows, end, _ = links[-1]
    last = not any(end == inside for inside, _, _ in links)
    for floor in FLOORS:
        least = {name: min(floor, size) for name, size in sizes.items()}
        whole = least | {end: sizes[end]} if last else least
        wide = whole | {rows: min(sizes[rows], max(whole[rows], whole[end]))}
        for wish in (wide, whole, least):
            ranks = thrifty(sizes, wish, links)
            if numbers(sizes, ranks, links) <= limit:
                return ranks
    return None
