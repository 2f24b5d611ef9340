"""Atoms: single channels, numbered over the whole network; what goes together is one class, some may not go at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Atoms:
    """Disjoint sets of channels, with the reason why a set has to stay."""

    def __init__(self) -> None:
        """None yet."""
        self._parents = np.zeros(0, dtype=np.int64)
        self._roots: Tensor | None = None
        self._pins: dict[int, str] = {}

    def fresh(self, count: int, reason: str | None = None) -> Tensor:
        """New atoms, each its own class; pinned where a `reason` is given."""
        start = len(self._parents)
        self._parents = np.concatenate([self._parents, np.arange(start, start + count)])
        self._roots = None
        made = torch.arange(start, start + count)
        if reason is not None:
            self.pin(made, reason)
        return made

    def roots(self, atoms: Tensor) -> Tensor:
        """The number of each atom's class."""
        if self._roots is None:
            parents = self._parents
            while True:
                higher = parents[parents]
                if np.array_equal(higher, parents):
                    break
                parents = higher
            self._parents = parents
            self._roots = torch.from_numpy(parents)
        return self._roots[atoms]

    def unite(self, a: Tensor, b: Tensor) -> None:
        """The classes of a and b, element by element (same shape), become one."""
        left, right = self.roots(a).flatten(), self.roots(b).flatten()
        differ = left != right
        if not bool(differ.any()):
            return
        width = len(self._parents)
        pairs = np.unique((left[differ] * width + right[differ]).numpy())
        for first, second in zip((pairs // width).tolist(), (pairs % width).tolist(), strict=True):
            low, high = sorted((self._find(first), self._find(second)))
            self._parents[high] = low
        self._roots = None

    def _find(self, atom: int) -> int:
        while self._parents[atom] != atom:
            atom = int(self._parents[atom])
        return atom

    def pin(self, atoms: Tensor, reason: str) -> None:
        """These classes have to stay; the first reason is remembered."""
        for atom in np.unique(self.roots(atoms).numpy()).tolist():
            self._pins.setdefault(atom, reason)

    def pinned(self) -> dict[int, str]:
        """Class -> why it has to stay."""
        found: dict[int, str] = {}
        for atom, reason in self._pins.items():
            found.setdefault(int(self.roots(torch.tensor(atom))), reason)
        return found
