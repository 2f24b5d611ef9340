"""Running sums over rows that pass: second moments in float32 of centred rows, and sketches of what is too wide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import add_gram, mirrored

PIECE_BYTES = 1 << 26
"""Rows that are unfolded or centred at once."""


@dataclass
class _Centred:
    """Sums of rows less `shift` (g, 1, k): of products (g, k, k), the lower triangle, and of the rows, (g, k)."""

    products: Tensor
    shift: Tensor
    rows: Tensor


class Moments:
    """Sum over rows (g, n, k) of weight x x^T.

    The products are of rows less the mean of the first ones: those of a large mean would leave nothing of float32 to
    what varies. The mean itself is kept in float64.
    """

    def __init__(self) -> None:
        """Nothing seen."""
        self.count = 0
        self.weight = 0.0
        self.sums: _Centred | None = None

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows, which are centred in place."""
        g, n, k = rows.shape
        if self.sums is None:
            shift = rows.mean(1, keepdim=True, dtype=torch.float64)
            self.sums = _Centred(rows.new_zeros(g, k, k), shift.to(rows), torch.zeros_like(shift[:, 0]))
        rows -= self.sums.shift
        self.sums.rows += weight * rows.sum(1, dtype=torch.float64)
        add_gram(self.sums.products, rows, weight)
        self.count += n
        self.weight += weight * n

    def take(self) -> Tensor:
        """The sum (g, k, k); the memory is handed over."""
        if self.sums is None:
            raise ValueError("no rows were added")
        whole, shift = mirrored(self.sums.products), self.sums.shift[:, 0].double()
        many = max(1, 1024 // whole.shape[-1])  # groups at once
        across = self.sums.rows + 0.5 * self.weight * shift  # x = y + s: sum x x^T = sum y y^T + s f^T + f s^T
        for own, s, f in zip(*(torch.split(t, many) for t in (whole, shift, across)), strict=True):
            for start in range(0, own.shape[-1], 1024):
                part = slice(start, start + 1024)
                own[:, part] += (s[:, part, None] * f[:, None] + f[:, part, None] * s[:, None]).to(own)
        self.sums = None
        return whole

    def joined(self, other: Moments) -> Moments:
        """The sum of both; each hands its memory over."""
        if not other.count or not self.count:
            return self if self.count else other
        both = Moments()
        both.count, both.weight = self.count + other.count, self.weight + other.weight
        products = self.take().add_(other.take())
        shift = products.new_zeros(len(products), 1, products.shape[-1])
        both.sums = _Centred(products, shift, shift[:, 0].double())
        return both


class Rows:
    """Rows that pass, as they are: smaller than their moment while they are few."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.count = 0
        self.weight = 0.0
        self.parts: list[tuple[Tensor, float]] = []

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows (g, n, k), each of which stands for `weight` positions."""
        self.count += rows.shape[1]
        self.weight += weight * rows.shape[1]
        self.parts.append((rows.clone(), weight))

    def take(self) -> Tensor:
        """Rows whose moment is that of all; the memory is handed over."""
        parts, self.parts = self.parts, []
        return torch.cat([rows.mul_(weight**0.5) for rows, weight in parts], 1)

    def summed(self) -> Moments:
        """Their moment; the memory is handed over."""
        moments = Moments()
        parts, self.parts = self.parts, []
        for rows, weight in parts:
            moments.add(rows, weight)
        return moments


class Sketch:
    """Rows (g, size, k) with the expected second moment of all rows that passed: them themselves, then signed sums."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        """`size` rows at most."""
        self.size, self.generator = size, generator
        self.count = 0
        self.weight = 0.0
        self.rows: Tensor | None = None
        self.mixed = False

    def add(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add rows (g, n, k)."""
        self.count += rows.shape[1]
        self.weight += weight * rows.shape[1]
        rows = rows if weight == 1 else rows * weight**0.5
        if not self.mixed:
            whole = rows.clone() if self.rows is None else torch.cat([self.rows, rows], 1)
            self.mixed = whole.shape[1] > self.size
            self.rows = self._signed(whole) if self.mixed else whole
        elif self.rows is not None:
            self.rows += self._signed(rows)

    def take(self) -> Tensor:
        """The rows; the memory is handed over."""
        if self.rows is None:
            raise ValueError("no rows were added")
        rows, self.rows = self.rows, None
        return rows

    def _signed(self, rows: Tensor) -> Tensor:
        signs = torch.empty(self.size, rows.shape[1]).bernoulli_(0.5, generator=self.generator).to(rows)
        mixed: Tensor = (signs.mul_(2).sub_(1).div_(self.size**0.5)) @ rows
        return mixed


class Kept:
    """At most `size` of the rows that pass, evenly over them; weighed so that their moment is that of all."""

    def __init__(self, size: int) -> None:
        """Nothing seen."""
        self.size, self.step = max(1, size), 1
        self.rows: Tensor | None = None
        self.seen = 0
        self.weight = 0.0

    @property
    def count(self) -> int:
        """Rows that are kept."""
        return 0 if self.rows is None else self.rows.shape[1]

    def add(self, rows: Tensor, weight: float) -> None:
        """Keep some of the rows (g, n, k), each of which stands for `weight` positions."""
        n = rows.shape[1]
        some = rows[:, -self.seen % self.step :: self.step]
        self.rows = some.clone() if self.rows is None else torch.cat([self.rows, some], 1)
        self.seen += n
        self.weight += n * weight
        while self.count > self.size:
            self.rows, self.step = self.rows[:, ::2].clone(), 2 * self.step

    def take(self, *, weighed: bool = True) -> Tensor:
        """The rows; the memory is handed over."""
        if self.rows is None:
            raise ValueError("no rows were added")
        rows, share = self.rows, self.weight / self.count
        self.rows = None
        return rows.mul_(share**0.5) if weighed else rows
