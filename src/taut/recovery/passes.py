"""In which order layers are solved, and in how many passes over batches that cannot be joined.

One batch stops in front of every layer, which is solved on the spot. Several batches are run one after the other, each
up to the layers of a pass; these are solved on what all of them brought, and the next pass begins.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 24
"""Passes at most: of more layers, some share one, and do not see yet what the others of it became."""


def merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order that keeps each of several as far as they agree; what came first stays first where they do not."""
    before: dict[str, set[str]] = {}
    for order in orders:
        for place, point in enumerate(order):
            before.setdefault(point, set()).update(order[place - 1 : place] if place else ())
    left, result = list(before), []
    while left:
        ready = (point for point in left if not before[point] & set(left))
        point = next(ready, left[0])  # two orders that contradict each other
        left.remove(point)
        result.append(point)
    return result


def passes(order: Sequence[str], batches: int) -> list[list[str]]:
    """The points of every pass, in order; one pass where there is one batch."""
    if batches == 1:
        return [list(order)]
    size = -(-len(order) // MOST)
    return [list(order[start : start + size]) for start in range(0, len(order), max(size, 1))]
