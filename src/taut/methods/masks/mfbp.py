"""MFBP: pruning by simultaneous matrix tri-factorization of all weight matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from taut.core.example import Example
from taut.criteria import score
from taut.decompose.dfmf import dfmf
from taut.decompose.trifactor import Trifactors, signed
from taut.methods.masks.masking import Masking, Ranked
from taut.methods.relation_graph import Graph
from taut.structure.channels.links import find_links
from taut.structure.patches import grouped_weight, weight_of

KINDS = ("product", "sum", "max", "reconstruction", "residual", "flipped")


@dataclass(frozen=True)
class MFBP(Masking):
    """Set to zero the weights that matter least in W and in H, the joint low-rank view of the whole network.

    All weight matrices are factorized at once, W_i ~ H_i = G_i S_i G_{i+1}^T, with ONE basis G_i per layer of neurons,
    shared by the matrices on both sides of it (`taut.decompose.trifactor`). What H keeps of a weight is structure that
    the whole network shares, the rest is noise; in deep nets at high sparsity a score with H keeps far more accuracy
    than |W| alone. Prune in steps of rising sparsity with training between them (`taut.ramp`, `taut.alternate`).

    Sources: Rostan, neural network pruning with simultaneous matrix tri-factorization (outline and draft); Zitnik and
    Zupan 2015 (data fusion). The sources' rule is `score="residual"`: read as a ranking it cuts what the factorization
    explains best, and wipes an output layer that H reproduces exactly.

    Attributes:
        score: "product" |W H|, "sum" |W| + |H|, "max", "reconstruction" |H|, "residual" |W| - |H| (the source's) or
            "flipped" |H| - |W| (a later text's).
        rank: columns of every basis, capped by its layer's size; None: 50, but at most a quarter of the layer's
            neurons, and at least 10.
        solver: "signed" (orthonormal bases) or "dfmf" (non-negative bases, 100 multiplicative updates, as the source).
        links: types of inputs and outputs of every layer, one after the other; None: found in the network.
        seed: of the start of dfmf.
    """

    score: str = "product"
    rank: int | None = None
    solver: str = "signed"
    links: list[int] | None = None
    seed: int = 0
    name: ClassVar[str] = "mfbp"
    uses_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        super().__post_init__()
        self._must("score", self.score in KINDS, f"one of {', '.join(KINDS)}")
        self._must("solver", self.solver in {"signed", "dfmf"}, "signed or dfmf")
        self._must("rank", self.rank is None or (type(self.rank) is int and self.rank >= 1), "at least 1, or None")
        whole = isinstance(self.links, list) and all(type(number) is int for number in self.links)
        self._must("links", self.links is None or whole, "a list of whole numbers, or None")

    def look(
        self, model: nn.Module, example: Example, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[MFBP, Ranked]:
        """Itself with the links found in the network, and the scores."""
        del stats
        links = find_links(model, example, list(places.values())) if self.links is None else self.links
        found = replace(self, links=links)
        return found, found.factor({name: model.get_submodule(place) for name, place in places.items()}, {})

    def scores(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> list[Tensor]:
        """Of every weight, layer by layer.

        Raises:
            CallError: the links do not fit.
        """
        del stats
        return [
            score(self.score, weight_of(module), H)
            for module, H in zip(modules.values(), self.reconstructions(modules), strict=True)
        ]

    def reconstructions(self, modules: Mapping[str, nn.Module]) -> list[Tensor]:
        """H of every layer, shaped as its weight."""
        graph = Graph.of(modules, self.links)
        found = [grouped_weight(module).clone() for module in modules.values()]  # a matrix of one number is its own H
        if graph.relations:
            factors = self._solved(graph)
            for place, (layer, group) in enumerate(graph.owners):
                found[layer][group] = graph.kernel(factors.compose(place), found[layer][group])
        return [H.reshape(weight_of(module).shape) for H, module in zip(found, modules.values(), strict=True)]

    def _solved(self, graph: Graph) -> Trifactors:
        ranks = graph.ranks(self.rank)
        if self.solver == "signed":
            return signed(graph.relations, ranks)
        return dfmf(graph.relations, ranks, seed=self.seed)
