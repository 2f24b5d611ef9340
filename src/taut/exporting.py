"""`export`: a model as an ONNX or OpenVINO file, kept only if it computes what the model computes."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from taut import text
from taut.calls import Example, evaluating, quietly, tensors
from taut.errors import CallError, ModelError
from taut.files import guarded, sync_folder
from taut.measure.onnx import missing, synthetic, to_onnx
from taut.measure.runtimes import OnnxRuntime, OpenVINO, Run
from taut.nn import Rebuilt
from taut.structure.calling import read_example
from taut.structure.surgery import clone, replace

SAMPLES = 64
LIMIT = 1e-4
"""Largest difference allowed, as a share of the largest output; float32 in another order gives about 1e-6."""

HALF_LIMIT = 1e-2
"""The same for a model with weights in float16."""

SUFFIXES = {".onnx": "ONNX", ".xml": "OpenVINO"}


@dataclass(frozen=True)
class Parity:
    """How far a runtime's outputs are from torch's.

    Attributes:
        runtime: name and settings. samples: in one batch. worst: largest difference over the largest output.
        limit: what is still rounding.
    """

    runtime: str
    samples: int
    worst: float
    limit: float = LIMIT

    @property
    def holds(self) -> bool:
        """Whether it is rounding."""
        return self.worst <= self.limit


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        path: the file. bytes: its size (with the .bin beside an OpenVINO .xml). parity: what was checked.
    """

    path: Path
    bytes: int
    parity: tuple[Parity, ...]

    def __str__(self) -> str:
        """The file, and a row for every check."""
        rows = [(p.runtime, str(p.samples), f"{p.worst:.1e}", "yes" if p.holds else "NO") for p in self.parity]
        head = ("runtime", "batch", "worst relative difference", "equal")
        return f"{self.path}: {text.count(self.bytes)} bytes\n{text.table(head, rows, right=(1, 2))}"


@quietly
def export(model: nn.Module, example: Any, path: str | os.PathLike[str]) -> Export:
    """Write the model for another runtime, and check it there: a batch of 64 and single samples against torch.

    The file is made in eval mode from synthetic inputs shaped like the example (no data of yours ends up in it), with a
    dynamic batch. It replaces what was at `path` only after the check. Layers that hold their weight in another form
    (`taut.nn.Rebuilt`) are written as they are where the runtimes compute the same with them, else as dense layers.

    Args:
        model: is not changed.
        example: how the model is called.
        path: ends in .onnx, or in .xml for OpenVINO (a .bin of the same name goes with it).

    Raises:
        CallError: another suffix, a package is missing, or more than 2 GB.
        ModelError: torch cannot export the model, or the file computes something else; nothing is written then.
        ArtifactError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise CallError(f"The file to export must end in .onnx or .xml (OpenVINO). Got '{target.name}' instead.")
    absent = missing("onnx", "onnxscript", "onnxruntime", *(["openvino"] if target.suffix == ".xml" else []))
    if absent:
        raise CallError(f"Exporting to {SUFFIXES[target.suffix]} needs a package: {absent}.")
    if any(t.dtype == torch.bfloat16 for t in model.state_dict().values()):
        raise CallError("ONNX Runtime and OpenVINO do not compute in bfloat16: convert the model with .float() first.")
    call = read_example(model, example)
    with guarded(f"Cannot write '{path}'"), tempfile.TemporaryDirectory(dir=_parent(target), prefix=".taut-") as folder:
        made, parity = _made(clone(model), call, Path(folder) / target.name, model)
        wrong = [p for p in parity if not p.holds]
        if wrong and any(
            isinstance(module, Rebuilt) for module in model.modules()
        ):  # runtimes compute with codes and eight bits in ways of their own
            made, parity = _made(_dense_again(clone(model)), call, Path(folder) / target.name, model)
            wrong = [p for p in parity if not p.holds]
        if wrong:
            raise ModelError(
                f"The exported model computes something else in {wrong[0].runtime}: outputs for a batch of "
                f"{wrong[0].samples} differ by {wrong[0].worst:.1e} of the largest one. Nothing was written."
            )
        size = _install(made, target)
    return Export(target, size, tuple(parity))


def _made(model: nn.Module, call: Example, target: Path, original: nn.Module) -> tuple[Path, list[Parity]]:
    """The file, made from a model that may be changed, and what was checked."""
    made = target.with_suffix(".onnx")
    to_onnx(model, call, made)
    if target.suffix == ".xml":
        made = _to_openvino(made)
    return made, check(original, call, made)


def _dense_again(model: nn.Module) -> nn.Module:
    """The model with dense layers in the place of those that hold their weight in another form."""
    if isinstance(model, Rebuilt):
        return model.to_plain()
    for name, module in list(model.named_modules()):
        if isinstance(module, Rebuilt):
            replace(model, name, module.to_plain())
    return model


def check(model: nn.Module, example: Example, path: Path) -> list[Parity]:
    """Outputs of the exported file beside torch's, in every installed runtime that reads it.

    Raises:
        ModelError: a runtime refuses the file or an input.
    """
    half = any(t.dtype == torch.float16 for t in model.state_dict().values())
    limit = HALF_LIMIT if half else LIMIT
    copied = clone(model).cpu()
    batches = {size: synthetic(example, size, seed=size) for size in (SAMPLES, 1)}
    with evaluating(copied), torch.no_grad():
        wanted = {size: [t.numpy() for t in tensors(example.run(copied, inputs))] for size, inputs in batches.items()}
    found = []
    for name, run in _readers(path):
        for size, inputs in batches.items():
            try:
                outputs = run(inputs)
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                raise ModelError(f"{name} cannot run the exported model on a batch of {size}: {reason}") from error
            found.append(Parity(name, size, _worst(wanted[size], outputs), limit))
    return found


def _readers(path: Path) -> list[tuple[str, Run]]:
    try:
        readers = []
        if path.suffix == ".onnx":
            readers.append((OnnxRuntime().identify(), OnnxRuntime().session(path)))
        if missing("openvino") is None:
            readers.append((OpenVINO().identify(), OpenVINO().compiled(path)))
    except Exception as error:
        raise ModelError(f"The exported model cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
    return readers


def _worst(wanted: list[Any], found: list[Any]) -> float:
    """Infinity where number, shape, NaN or infinities differ, or where nothing finite is left to compare."""
    if len(wanted) != len(found) or any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(one)
        if not np.array_equal(one[~finite], two[~finite], equal_nan=True) or not np.isfinite(two[finite]).all():
            return float("inf")
        if one.size and not finite.any():
            return float("inf")
        largest = float(np.abs(one[finite]).max(initial=0.0))
        gap = float(np.abs(one[finite] - two[finite]).max(initial=0.0))
        worst = max(worst, gap / largest if largest else gap)
    return worst


def _to_openvino(path: Path) -> Path:
    """The same model in OpenVINO's own format, weights in float32."""
    import openvino  # noqa: PLC0415 - an optional extra

    made = path.with_suffix(".xml")
    try:
        openvino.save_model(openvino.Core().read_model(str(path)), str(made), compress_to_fp16=False)
    except Exception as error:
        raise ModelError(f"OpenVINO cannot read the model: {str(error).strip().partition(chr(10))[0]}") from error
    return made


def _parent(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _install(made: Path, target: Path) -> int:
    """Put the file in place; with weights beside it, never a graph of one model and the weights of another."""
    parts = []
    if made.suffix == ".xml":
        parts = [(made.with_suffix(".bin"), target.with_suffix(".bin"))]
        target.unlink(missing_ok=True)
    size = 0
    for source, place in (*parts, (made, target)):
        size += source.stat().st_size
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.chmod(0o644)
        os.replace(source, place)  # noqa: PTH105 - one way to write, one way to test its failure
    sync_folder(target.resolve().parent)
    return size
