"""One end of a factorized weight that an embedding and output layers hold together."""

from __future__ import annotations

from functools import reduce
from typing import Any

from torch import Tensor, nn

from taut.nn.answering import Answering, Described
from taut.nn.sharing import Basis

OF_TABLES = frozenset({"padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"})
"""Settings of an embedding that are those of the table inside."""


class Tied(Answering):
    """One of several layers of one weight W (V, d) = A Bᵀ: all of them hold the very same A (V, r) and B (d, r).

    An embedding reads rows of A and spreads them by B; a linear layer gathers its inputs by B and multiplies by A. So
    both are counted, stored and trained once. `weight` is described as that of the layer in whose place it stands, and
    made of A and B where somebody computes with it; it cannot be set but to that of another end, as some libraries do
    behind every change: it holds the factors of that then.

    Attributes:
        scale: what the rows that an embedding reads are multiplied by, as some language models do.

    Args:
        table: an `nn.Embedding` or an `nn.Linear` that holds A, and the bias.
        basis: (d, r).
    """

    def __init__(self, table: nn.Module, basis: nn.Parameter) -> None:
        """See the class."""
        reads = isinstance(table, nn.Embedding)
        inside = Basis(basis, 0, spread=reads)
        rows: int = table.weight.shape[0]  # type: ignore[index,assignment]
        names = ("num_embeddings", "embedding_dim") if reads else ("out_features", "in_features")
        answers: dict[str, Any] = {"weight": (rows, len(basis)), **dict(zip(names, (rows, len(basis)), strict=True))}
        super().__init__(*((table, inside) if reads else (inside, table)), answers=answers)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Rows, times `scale`; or outputs."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y if self.scale == 1 else y * self.scale

    @property
    def table(self) -> nn.Module:
        """What holds A."""
        held = self._held()
        return held.table if isinstance(held, Tied) else held

    def _held(self) -> nn.Module:
        """The table; or what it became, where its factors were factorized again."""
        return next(part for part in self if not isinstance(part, Basis))

    @property
    def basis(self) -> Basis:
        """What holds B."""
        return next(part for part in self if isinstance(part, Basis))

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """A and B; where A was factorized again its factors in its place."""
        held = self._held()
        first: Any = held.factors if isinstance(held, Tied) else (held.weight,)
        return *first, self.basis.weight

    def dense(self) -> Tensor:
        """W."""
        dense, *bases = self.factors
        return reduce(lambda product, basis: product @ basis.mT, bases, dense)  # type: ignore[arg-type,return-value]

    def __getattr__(self, name: str) -> Any:
        """As the layer that it replaces; W and the bias with their values."""
        if name == "weight" and "_modules" in self.__dict__:
            return Described(self.answers["weight"], self, self.dense, parts=lambda: self.factors)  # type: ignore[arg-type]
        reads = "num_embeddings" in self.__dict__.get("answers", {})
        if (name in OF_TABLES and reads) or (name == "bias" and not reads):
            return getattr(self.table, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A bias is that of the table; the weight is that of another end."""
        if name == "bias" and "out_features" in self.answers:
            self.table.bias = value
        elif name == "weight":
            self._hold(value)
        else:
            super().__setattr__(name, value)

    def _hold(self, weight: Any) -> None:
        """Hold the factors of the layer whose weight it is."""
        other: Any = weight.__dict__["_owner"] if type(weight) is Described else None
        whole = isinstance(other, Tied) and weight.__dict__["_values"] == other.dense
        if not whole or [f.shape for f in other.factors] != [f.shape for f in self.factors]:
            raise AttributeError(
                "This layer holds its weight in factors, which other layers share: it can be tied to the weight of a "
                "layer in factors of the same sizes alone. Put another layer in its place and in theirs."
            )
        self._take(*other.factors)

    def _take(self, *factors: nn.Parameter) -> None:
        held: Any = self._held()
        *first, self.basis.weight = factors
        if isinstance(held, Tied):
            held._take(*first)
        else:
            (held.weight,) = first

    def to_plain(self) -> nn.Module:
        """The same as an Embedding or a Linear with a weight of its own."""
        held, dense = self.table, nn.Parameter(self.dense().detach().clone())
        rows, columns = dense.shape
        built: Any
        if isinstance(held, nn.Embedding):
            dense = nn.Parameter(dense.detach() * self.scale)
            built = nn.Embedding(rows, columns, device="meta")
            for key in OF_TABLES:
                setattr(built, key, getattr(held, key))
        else:
            bias = held.bias
            built = nn.Linear(columns, rows, device="meta")
            built.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None
        built.weight = dense
        plain: nn.Module = built.train(self.training)
        return plain
