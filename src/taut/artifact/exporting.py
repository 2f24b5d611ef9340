"""`export`: a model as an ONNX or OpenVINO file, kept only if it computes what the model computes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from taut.core import file_sets, text
from taut.core.atomic_folder import recover, rehearse_within
from taut.core.example import Example
from taut.core.extras import missing
from taut.core.files import guarded, one_line
from taut.core.modes import evaluating, quietly
from taut.core.tensors import tensors
from taut.errors import ArtifactError, CallError, ModelError
from taut.measure.onnx import batch_axis, synthetic, to_onnx
from taut.measure.runtimes import OnnxRuntime, OpenVINO, Run
from taut.nn import Rebuilt
from taut.structure.calling import read_example
from taut.structure.surgery import clone, replace
from taut.structure.wrappers import unwrapped

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
        CallError: another suffix, a name that cannot be written, a package is missing, or more than 2 GB.
        ModelError: torch cannot export the model, or the file computes something else; nothing is written then.
        ArtifactError: the file cannot be written; what was there is intact.
    """
    target, names = check_target(path)
    model = unwrapped(model)
    if any(t.dtype == torch.bfloat16 for t in model.state_dict().values()):
        raise CallError("ONNX Runtime and OpenVINO do not compute in bfloat16: convert the model with .float() first.")
    call = read_example(model, example)
    with guarded(f"Cannot write '{path}'"), _staging(target, names) as folder:
        parity = _made(clone(model), call, folder / target.name, model)
        wrong = [p for p in parity if not p.holds]
        if wrong and any(
            isinstance(module, Rebuilt) for module in model.modules()
        ):  # runtimes compute with codes and eight bits in ways of their own
            parity = _made(_dense_again(clone(model)), call, folder / target.name, model)
            wrong = [p for p in parity if not p.holds]
        if wrong:
            raise ModelError(
                f"The exported model computes something else in {wrong[0].runtime}: outputs for a batch of "
                f"{wrong[0].samples} differ by {wrong[0].worst:.1e} of the largest one. Nothing was written."
            )
        size = sum((folder / name).stat().st_size for name in names)
        file_sets.install(folder, target, names)
    return Export(Path(path), size, tuple(parity))


def check_target(path: str | os.PathLike[str]) -> tuple[Path, tuple[str, ...]]:
    """Find out before long work whether `export` can write the file, once what a killed export left is settled.

    Returns:
        The file that is meant, and the names of all files that are written beside each other.

    Raises:
        CallError: another suffix, a package is missing, or a name that cannot be written.
        ArtifactError: the operating system does not allow it.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise CallError(f"The file to export must end in .onnx or .xml (OpenVINO). Got '{target.name}' instead.")
    absent = missing("onnx", "onnxscript", "onnxruntime", *(["openvino"] if target.suffix == ".xml" else []))
    if absent:
        raise CallError(f"Exporting to {SUFFIXES[target.suffix]} needs a package: {absent}.")
    target = recover(target.parent) / target.name
    suffixes = (".xml", ".bin") if target.suffix == ".xml" else (target.suffix,)
    with guarded(f"Cannot write '{path}'"):
        file_sets.recover(target, [target.with_suffix(suffix).name for suffix in suffixes])
        rehearse_within(target.parent, f"{file_sets.STAGED}{target.name}-rehearse")
        target = _linked(target, suffixes)
        _refuse_taken(target)
    return target, tuple(target.with_suffix(suffix).name for suffix in suffixes)


def _linked(target: Path, suffixes: tuple[str, ...]) -> Path:
    """Where a user's own link leads, so that the link stays a link."""
    meant = target.resolve()
    if any(target.with_suffix(suffix).resolve() != meant.with_suffix(suffix) for suffix in suffixes):
        raise CallError(f"'{target}' and its weights are links to different places. Give the file that is meant.")
    return meant


def _refuse_taken(target: Path) -> None:
    """What would be lost without a word."""
    if target.is_dir():
        raise CallError(f"'{target}' is a folder. Give a file.")
    weights = target.with_suffix(".bin")
    if target.suffix == ".xml" and weights.exists() and not target.exists():
        raise CallError(
            f"'{weights}' would be replaced, and is not OpenVINO's: there is no '{target.name}' beside it. Choose "
            "another name, or move it away."
        )


def _staging(target: Path, names: tuple[str, ...]) -> AbstractContextManager[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    return file_sets.staging(target, names)


def _made(model: nn.Module, call: Example, target: Path, original: nn.Module) -> list[Parity]:
    """What was checked of the file, which is made from a model that may be changed."""
    to_onnx(model, call, target.with_suffix(".onnx"))
    if target.suffix == ".xml":
        _to_openvino(target)
    return check(original, call, target)


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
    any_size = any(batch_axis(example, t) is not None for t in tensors(example.value))
    sizes = (SAMPLES, 1) if any_size else (example.batch,)
    batches = {size: synthetic(example, size, seed=size) for size in sizes}
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


def _to_openvino(target: Path) -> None:
    """The ONNX file beside it in OpenVINO's own format, weights in float32."""
    import openvino  # noqa: PLC0415 - an optional extra

    try:
        model = openvino.Core().read_model(str(target.with_suffix(".onnx")))
    except Exception as error:
        raise ModelError(f"OpenVINO cannot read the model: {one_line(error)}") from error
    try:
        openvino.save_model(model, str(target), compress_to_fp16=False)
    except Exception as error:
        raise ArtifactError(f"OpenVINO cannot write the model, as when the disk is full: {one_line(error)}") from error
