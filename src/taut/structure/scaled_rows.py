"""Embeddings with a forward of their own that multiplies rows by a number, as many language models do."""

from __future__ import annotations

import torch
from torch import nn

from taut.core.copying import deep_copy

ROWS, WIDTH = 8, 16
"""Size of the table on which such a forward is tried: it does the same to every row."""

EPSILONS = 8
"""Roundings by which what it gives may be off."""


def scale_of(table: nn.Embedding) -> float | None:
    """By what an embedding multiplies the rows that it reads; None where it computes something else.

    It is run on small tables, of ones and of random rows, in eval and in train mode: what depends on the values, on
    positions or on chance, or has parameters besides, is no number.
    """
    called = all(getattr(type(table), key) is getattr(nn.Module, key) for key in ("__call__", "_call_impl"))
    if called and type(table).forward is nn.Embedding.forward and "forward" not in vars(table):
        return 1.0
    if (
        not called
        or "forward" in vars(table)
        or set(table.state_dict()) != {"weight"}
        or any(True for _ in table.children())
        or table.weight.ndim != 2
    ):
        return None
    copied = deep_copy(table, {id(table.weight): nn.Parameter(table.weight.new_ones(ROWS, WIDTH))})
    copied.num_embeddings, copied.embedding_dim = ROWS, WIDTH  # type: ignore[assignment]
    if table.padding_idx is not None:
        copied.padding_idx = min(table.padding_idx, ROWS - 1)  # type: ignore[assignment]
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=random).to(table.weight)
    try:
        return _tried(copied, rows)
    except Exception:  # whatever its code needs that is not here
        return None


def _tried(copied: nn.Module, rows: torch.Tensor) -> float | None:
    """The number that a forward multiplies rows by, with these and with ones in its table."""
    ids = torch.arange(2 * ROWS, device=rows.device).reshape(2, ROWS).flip(1) * 3 % ROWS
    with torch.no_grad():
        scale = float(copied.eval().forward(ids).flatten()[0])
        for training in (False, True):
            copied.train(training)
            for values in (torch.ones_like(rows), rows, 100 * rows):
                copied.weight.copy_(values)  # type: ignore[operator]
                for read in (ids, ids[0]):
                    wanted, found = values[read].double() * scale, copied.forward(read)
                    room = EPSILONS * torch.finfo(rows.dtype).eps * wanted.abs()
                    if found.dtype != rows.dtype or found.shape != wanted.shape:
                        return None
                    if bool(((found.double() - wanted).abs() > room).any()):
                        return None
    return scale if scale else None
