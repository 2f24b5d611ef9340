"""A model as one ONNX file with a dynamic batch, from synthetic inputs: nobody's data and no paths end up in it."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.example import Example
from taut.core.extras import missing
from taut.core.tensors import map_tensors, tensors
from taut.errors import CallError, ModelError

OPSET = 20
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
"""Who speaks of an export."""

LARGEST = (1 << 31) - (1 << 20)
"""Bytes: protobuf holds no single file above 2 GB."""


def synthetic(example: Example, size: int, seed: int = 0) -> Any:
    """Inputs of `size` samples like the example: noise of its mean and deviation within its range, integers as well.

    A list of samples, or a batch of which a model takes no part, keeps its size.
    """
    random = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        shape, axis = list(t.shape), batch_axis(example, t)
        if axis is not None:
            shape[axis] = size
        if t.dtype == torch.bool or not t.numel():
            return torch.rand(shape, generator=random) < (t.double().mean() if t.numel() else 0.5)
        if not t.is_floating_point():
            return torch.randint(int(t.min()), int(t.max()) + 1, shape, generator=random).to(t.dtype)
        spread = t.double().std() if t.numel() > 1 else torch.tensor(1.0)
        noise = torch.randn(shape, generator=random, dtype=torch.float64) * spread + t.double().mean()
        low, high = float(t.min()), float(t.max())
        inner = 1e-3 * (high - low)  # not even the extremes are the user's
        return noise.clamp(low + inner, high - inner).to(t.dtype)

    return map_tensors(lambda t: like(t.detach().cpu()), example.value)


def batch_axis(example: Example, t: Tensor) -> int | None:
    """The axis of one of the example's tensors that may be of any length; None where there is none."""
    return example.samples.axis_of(t, example.batch) if example.divisible else None


def arguments(example: Example, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments of forward."""
    if example.keywords:
        return (), dict(inputs)
    return (inputs if isinstance(example.value, tuple) else (inputs,)), {}


def to_onnx(model: nn.Module, example: Example, path: Path) -> None:
    """Write `model` in eval mode as ONNX.

    Args:
        model: is left as it was; a copy on the CPU is exported.
        example: how it is called; where its batch may be of any size, that axis of its tensors becomes dynamic.
        path: of the file.

    Raises:
        CallError: a package is missing, or the model is larger than one file can be.
        ModelError: torch cannot export the model.
    """
    absent = missing("onnx", "onnxscript")
    if absent:
        raise CallError(f"ONNX needs a package: {absent}.")
    if sum(t.numel() * t.element_size() for t in model.state_dict().values()) > LARGEST:
        raise CallError("The model holds more than 2 GB, which no single ONNX file can: it was not exported.")
    args, kwargs = arguments(example, synthetic(example, 2))
    dynamic = map_tensors(lambda t: _dimensions(example, t), arguments(example, example.value))
    try:
        copied = deep_copy(model).cpu().eval().requires_grad_(requires_grad=False)
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                copied,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=_by_parameter(copied, dynamic),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        reason = _reason(error)
        raise ModelError(f"torch cannot export this model to ONNX: {reason}{_remedy(reason, model)}") from error
    _write(program, path)


def _by_parameter(model: nn.Module, dynamic: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Dynamic axes as torch.export wants them: of a forward(*inputs, **more) by the names of these parameters."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters):
        return dict(inspect.signature(model.forward).bind(*dynamic[0], **dynamic[1]).arguments)
    return dynamic[1] or dynamic[0]


def _dimensions(example: Example, t: Tensor) -> Any:
    axis = batch_axis(example, t)
    return None if axis is None else {axis: torch.export.Dim.DYNAMIC}


def _write(program: Any, path: Path) -> None:
    """Without what names the exporting machine, and so the same bytes everywhere."""
    import onnx  # noqa: PLC0415 - an optional extra

    proto = program.model_proto
    proto.doc_string = ""
    for graph in (proto.graph, *proto.functions):
        for part in (
            graph,
            *graph.node,
            *graph.value_info,
            *getattr(graph, "input", ()),
            *getattr(graph, "output", ()),
        ):
            for field in ("metadata_props", "doc_string"):
                if hasattr(part, field):
                    part.ClearField(field)
    del proto.metadata_props[:]
    _store_once(proto.graph)
    onnx.save_model(proto, str(path))


def _store_once(graph: Any) -> None:
    """Matrices that are stored as they are and turned around, as those of tied ends: one of the two is enough.

    Runtimes turn it when they load the file.
    """
    from onnx import helper, numpy_helper  # noqa: PLC0415 - an optional extra

    matrices = [one for one in graph.initializer if len(one.dims) == 2 and min(one.dims) > 1]
    read, given = {name for node in graph.node for name in node.input}, {output.name for output in graph.output}
    kept: dict[tuple[int, ...], list[Any]] = {}
    turned = []
    for matrix in matrices:
        values = numpy_helper.to_array(matrix)
        others = kept.get((values.shape[1], values.shape[0]), []) if matrix.name in read - given else []
        other = next((one for one, its in others if its.dtype == values.dtype and np.array_equal(its.T, values)), None)
        if other is None:
            kept.setdefault(values.shape, []).append((matrix, values))
            continue
        turned.append(helper.make_node("Transpose", [other.name], [matrix.name], perm=[1, 0]))
        graph.initializer.remove(matrix)
    nodes = [*turned, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter and its helpers print and warn of what does not concern the user."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        unread = io.StringIO()
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(unread):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _reason(error: Exception) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r", which is not a known type\. .*", ", which is not a known type.", lines[0]) if lines else ""
    return f"{type(error).__name__}: {line[:300]}"


def _remedy(reason: str, model: nn.Module) -> str:
    """What to do about experts in a loop or in an operator of transformers, and about outputs that are no tensors."""
    loops = "grouped_mm" in reason or "data-dependent" in reason
    if loops and hasattr(model, "set_experts_implementation"):
        way = "model.set_experts_implementation('batched_mm')"
        return f" The experts of a mixture are exported as batched products: {way} before compressing and exporting."
    match = re.search(r"Found <class '(?:\w+\.)*(\w+)'> in output", reason)
    if match is None:
        return ""
    if "Cache" in match[1]:
        return f" A {match[1]} is no output: set model.config.use_cache = False before compressing and exporting."
    return f" Wrap the model in a module that returns the tensors of the {match[1]} alone."


def feeds(names: list[str], inputs: Any) -> dict[str, Any]:
    """The tensors of an input by the graph's input names, as arrays.

    Raises:
        ModelError: the graph takes another number of inputs: the export dropped one that the model does not use.
    """
    arrays = [t.detach().cpu().numpy() for t in tensors(inputs)]
    if len(names) != len(arrays):
        raise ModelError(f"The exported graph takes {len(names)} inputs, the model {len(arrays)}.")
    return dict(zip(names, arrays, strict=False))
