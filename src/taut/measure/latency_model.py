"""How long layers take on this machine: a linear function of what they do, fitted to timed variants of one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import map_tensors, tensors
from taut.nn import Basis
from taut.types import Group, Layer, Method, Network

LayerOps = np.ndarray
"""(n, 4), a row for every call of a layer: multiply-accumulates and values read and written, both per sample; whether
its kernel has more than one tap; and its output channels, 0 where these are grouped."""

TIMED = frozenset(
    {
        "Linear",
        "StateLinear",
        "GroupedLinear",
        "Basis",
        *(f"Conv{way}{n}d" for way in ("", "Transpose") for n in (1, 2, 3)),
    }
)
"""Kinds of layers whose operations are timed; the time of all others, subclasses included, is a constant."""

SIMD_LANES = (1, 8, 16)
"""Numbers of output channels that a CPU may compute at once: a layer with fewer costs as much as a full one."""


@dataclass(frozen=True)
class LatencyModel:
    """Time of a network = rest + rates . work, in shares of the time of the network it was fitted on.

    Multiply-accumulates alone do not tell the time: outputs are computed several at a time, small layers wait for
    memory, and every call costs something. The rates are fitted by non-negative least squares to variants of one model
    that were really run.

    Attributes:
        rates: share of the time per multiply-accumulate of wide kernels and of others (output channels rounded up to
            full lanes), per value read or written, all per sample; and per call.
        lanes: of SIMD_LANES, the one that explains the times best.
        rest: what no layer accounts for.
        runtime: in which it was measured.
    """

    rates: tuple[float, float, float, float]
    lanes: int
    rest: float
    runtime: str

    @classmethod
    def fit(cls, networks: Sequence[LayerOps], shares: Sequence[float], runtime: str) -> LatencyModel:
        """Least squares of relative errors; rates are not negative.

        Args:
            networks: operations of every network.
            shares: of the original's time that each of them takes.
            runtime: in which they ran.
        """
        fits = [cls._fit(networks, np.array(shares, dtype=float), lanes, runtime) for lanes in SIMD_LANES]
        return min(fits, key=lambda fit: fit[0])[1]

    @classmethod
    def _fit(
        cls, networks: Sequence[LayerOps], times: np.ndarray, lanes: int, runtime: str
    ) -> tuple[float, LatencyModel]:
        table = np.array([features(ops, lanes) for ops in networks])
        scale = np.maximum(table.max(0), 1.0)
        rows = np.hstack([table / scale, np.ones((len(table), 1))])
        found, error = nnls(rows / times[:, None], np.ones(len(times)))
        a, b, c, d = (float(rate) for rate in found[:-1] / scale)
        return float(error), cls((a, b, c, d), lanes, float(found[-1]), runtime)

    def of(self, ops: LayerOps) -> float:
        """Share of the time that operations take."""
        return float(np.dot(self.rates, features(ops, self.lanes)))

    def total(self, net: Network) -> float:
        """Predicted time of a network."""
        return self.rest + sum(self.of(layer_ops(layer)) for layer in net.layers)


def features(ops: LayerOps, lanes: int) -> np.ndarray:
    """(4,): multiply-accumulates of wide kernels and of others, outputs in full lanes; values; calls."""
    macs, values, wide, outputs = ops.T
    full = macs * filled(outputs, lanes)
    return np.array([(full * wide).sum(), (full * (1 - wide)).sum(), values.sum(), float(len(ops))])


def filled(outputs: np.ndarray, lanes: int) -> np.ndarray:
    """How many times more is computed because outputs come in full lanes; 1 for 0 outputs."""
    some = np.maximum(outputs, 1e-9)
    return np.where(outputs > 0, np.ceil(some / lanes - 1e-9) * lanes / some, 1.0)


def layer_ops(layer: Layer) -> LayerOps:
    """What a layer does on the example; nothing for those whose time is a constant."""
    if not layer.macs or layer.kind not in TIMED:
        return np.zeros((0, 4))
    outputs = layer.weight["Transpose" in layer.kind] if layer.groups == 1 else 0
    values = [(math.prod(call.input) + math.prod(call.output)) / layer.batch for call in layer.calls]
    wide = math.prod(layer.kernel) > 1
    return np.array([[layer.macs / len(values), moved, wide, outputs] for moved in values], dtype=float)


def model_ops(model: nn.Module, example: Example) -> LayerOps:
    """What the layers of a model do in one run of the example."""
    with evaluating(model), _watched(model, example.batch) as rows, torch.no_grad():
        example.run(model, map_tensors(Tensor.clone, example.value))
    return _table(rows)


def built_ops(group: Group, method: Method) -> LayerOps:
    """What the modules do that a resolved method builds for its layers, found without any values.

    Where they cannot be run so, they are taken for the layer as it is, with the method's multiply-accumulates. The same
    candidates come again with every plan that is drafted: what was found is kept, and cannot be written to.
    """
    try:
        hash(method)
    except TypeError:  # settings with lists
        return _find_built_ops(group, method)
    return _kept_built_ops(group, cast(Any, method))


def _find_built_ops(group: Group, method: Method) -> LayerOps:
    try:
        rows: list[tuple[float, ...]] = []
        built = nn.ModuleDict({str(place): m for place, m in enumerate(_skeletons(group, method))}).to("meta").eval()
        for layer, module in zip(group.layers, built.values(), strict=True):
            given = torch.long if layer.kind == "Embedding" else None
            with _watched(module, layer.batch) as found, torch.no_grad():
                for call in layer.calls:
                    module(torch.empty(call.input, device="meta", dtype=given))
            rows += found
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        rows = []
    if rows:
        return _table(rows)
    ops = np.concatenate([layer_ops(layer) for layer in group.layers])
    ops[:, 0] *= method.cost(group).macs / max(group.cost.macs, 1)
    return ops


def _skeletons(group: Group, method: Method) -> list[nn.Module]:
    made = method.skeleton(group)
    return [made[name] for name in group.names]


@lru_cache(maxsize=1 << 12)
def _kept_built_ops(group: Group, method: Method) -> LayerOps:
    ops = _find_built_ops(group, method)
    ops.setflags(write=False)
    return ops


def _table(rows: list[tuple[float, ...]]) -> LayerOps:
    return np.array(rows, dtype=float).reshape(-1, 4)


@contextmanager
def _watched(model: nn.Module, batch: int) -> Iterator[list[tuple[float, ...]]]:
    """Rows of `LayerOps` that fill while the model runs."""
    rows: list[tuple[float, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weight, x, y = module.weight, tensors((args, kwargs)), tensors(output)
        if not isinstance(weight, Tensor) or not x or not y:
            return
        transposed = "Transpose" in type(module).__name__
        macs = (x if transposed else y)[0].numel() * weight[0].numel() / batch
        outputs = weight.shape[int(transposed)] if getattr(module, "groups", 1) == 1 else 0
        if isinstance(module, Basis):
            outputs = weight.shape[0 if module.spread else 1]
            macs = y[0].numel() // outputs * weight.numel() / batch
        rows.append((macs, (x[0].numel() + y[0].numel()) / batch, math.prod(weight.shape[2:]) > 1, outputs))

    timed = [module for module in model.modules() if type(module).__name__ in TIMED]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in timed]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
