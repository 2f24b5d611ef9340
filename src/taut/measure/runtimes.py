"""The runtimes in which a model is timed and checked, each a small adapter: whether it is here, build, identify.

eager          torch as it is
channels_last  torch with 4-d weights in that memory format
cuda           torch on the first GPU, for a model that lives on the CPU
onnxruntime    ONNX Runtime on the CPU, from the model's ONNX file
openvino       OpenVINO on the CPU, from the same file; its precision is pinned to f32 (its default may be bf16)

A built model is called with inputs and waits until its outputs are there. Sessions of ONNX Runtime slow each other
when their threads spin, so spinning is off, and only one runtime at a time is kept alive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from taut.core.copying import deep_copy
from taut.core.example import Example
from taut.core.extras import missing
from taut.core.modes import device_of
from taut.core.nested import fresh
from taut.core.tensors import all_tensors, map_tensors, on_device, tensors
from taut.errors import CallError
from taut.measure.layout import channels_last, has_images, has_kernels, images_last
from taut.measure.onnx import arguments, feeds
from taut.measure.rounds import COPIES, Call

Run = Callable[[Any], list[Any]]
"""Inputs -> outputs, all tensors or arrays of them in order."""

Built = tuple[Run, Any]
"""A model ready to run, and the example's inputs laid out for it."""

BUILD_SECONDS = 0.5
"""Copies of a model are built until this time is over: a large one is not held several times in memory."""


@dataclass(frozen=True)
class Subject:
    """A model that is to be run.

    Attributes:
        model: in eval mode. example: how it is called. onnx: makes its ONNX file when first asked for, and once.
    """

    model: nn.Module
    example: Example
    onnx: Callable[[], Path]


class Runtime(Protocol):
    """Where models run."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    def refuses(self, subject: Subject) -> str | None:
        """Why this runtime is not measured for a model; "" where nobody would expect it."""

    def build(self, subject: Subject) -> Built:
        """The model ready to run, and the example's inputs laid out for it."""

    def identify(self) -> str:
        """Name, version and settings."""


class Eager:
    """torch as the model is."""

    name: ClassVar[str] = "eager"
    packages: ClassVar[tuple[str, ...]] = ()

    def refuses(self, subject: Subject) -> str | None:
        """Never."""
        del subject
        return None

    def build(self, subject: Subject) -> Built:
        """The model itself."""
        inputs = map_tensors(Tensor.clone, on_device(subject.example.value, device_of(subject.model)))
        return _torch_run(subject.model, subject.example), inputs

    def identify(self) -> str:
        """Torch's version and threads."""
        return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


class ChannelsLast:
    """torch with images and kernels in channels_last."""

    name: ClassVar[str] = "channels_last"
    packages: ClassVar[tuple[str, ...]] = ()

    def refuses(self, subject: Subject) -> str | None:
        """Models without images, or without kernels for them."""
        return None if has_images(subject.example) and has_kernels(subject.model) else ""

    def build(self, subject: Subject) -> Built:
        """A copy that shares all that is not 4-d."""
        copied = channels_last(subject.model)
        inputs = on_device(subject.example.value, device_of(copied))
        return _torch_run(copied, subject.example), map_tensors(lambda t: images_last(t.clone()), inputs)

    def identify(self) -> str:
        """As eager."""
        return f"torch {torch.__version__}, channels_last, {torch.get_num_threads()} threads"


class Cuda:
    """torch on the first GPU."""

    name: ClassVar[str] = "cuda"
    packages: ClassVar[tuple[str, ...]] = ()

    def refuses(self, subject: Subject) -> str | None:
        """No GPU, or the model is on one already (then eager is that)."""
        return None if torch.cuda.is_available() and device_of(subject.model).type == "cpu" else ""

    def build(self, subject: Subject) -> Built:
        """A copy on the GPU."""
        copied = deep_copy(subject.model).cuda()
        return _torch_run(copied, subject.example), on_device(subject.example.value, device_of(copied))

    def identify(self) -> str:
        """The GPU's name."""
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript")

    def refuses(self, subject: Subject) -> str | None:
        """A package is missing."""
        del subject
        return missing(*self.packages)

    def build(self, subject: Subject) -> Built:
        """A session with torch's number of threads, none of them spinning."""
        return self.session(subject.onnx()), subject.example.value

    def session(self, path: Path) -> Run:
        """An ONNX file ready to run."""
        import onnxruntime  # noqa: PLC0415 - an optional extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda inputs: list(session.run(None, feeds(names, inputs)))

    def identify(self) -> str:
        """Version and threads."""
        return f"onnxruntime {version('onnxruntime')}, CPU, {torch.get_num_threads()} threads"


class OpenVINO:
    """OpenVINO on the CPU, in f32."""

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")

    def refuses(self, subject: Subject) -> str | None:
        """A package is missing."""
        del subject
        return missing(*self.packages)

    def build(self, subject: Subject) -> Built:
        """The compiled model."""
        return self.compiled(subject.onnx()), subject.example.value

    def compiled(self, path: Path) -> Run:
        """An ONNX or OpenVINO file ready to run."""
        import openvino  # noqa: PLC0415 - an optional extra

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        names = [given.get_any_name() for given in model.inputs]
        request = model.create_infer_request()

        def run(inputs: Any) -> list[Any]:
            found = request.infer(feeds(names, inputs))
            return [found[output] for output in model.outputs]

        return run

    def identify(self) -> str:
        """Version, precision and threads."""
        return f"openvino {version('openvino')}, CPU, f32, {torch.get_num_threads()} threads"


TORCH: tuple[Runtime, ...] = (Eager(), ChannelsLast())
RUNTIMES: Mapping[str, Runtime] = {runtime.name: runtime for runtime in (*TORCH, Cuda(), OnnxRuntime(), OpenVINO())}


def chosen() -> tuple[Runtime, ...]:
    """All runtimes, or those that the environment variable TAUT_RUNTIMES names (comma-separated).

    Raises:
        CallError: it names an unknown one, one whose package is not installed, or not "eager".
    """
    wish = [name.strip() for name in os.environ.get("TAUT_RUNTIMES", "").split(",") if name.strip()]
    unknown = [name for name in wish if name not in RUNTIMES]
    if unknown or (wish and "eager" not in wish):
        raise CallError(f"TAUT_RUNTIMES must name eager and others of {', '.join(RUNTIMES)}. Got {','.join(wish)}.")
    for name in wish:
        absent = missing(*RUNTIMES[name].packages)
        if absent is not None:
            raise CallError(f"TAUT_RUNTIMES asks for {name}, and {absent}.")
    return tuple(runtime for name, runtime in RUNTIMES.items() if not wish or name in wish)


def built_copies(build: Callable[[], Built]) -> list[Built]:
    """COPIES of a model, each with inputs of its own: built anew while that is quick, then the last one again."""
    start, copies = time.perf_counter(), [build()]
    while len(copies) < COPIES:
        if time.perf_counter() - start < BUILD_SECONDS:
            copies.append(build())
        else:
            run, inputs = copies[-1]
            copies.append((run, fresh(inputs)))
    return copies


def repeatable(built: Mapping[str, Sequence[Built]]) -> dict[str, list[Call]]:
    """Built models as calls that may be repeated.

    An input that a model halves in place is all denormal after a thousand calls, and no time on it means anything. So
    where one of the models writes to its inputs, all of them get a new copy for every call, which takes time, too.

    Args:
        built: copies of each model, by name.
    """
    copying = any(_writes(*copies[0]) for copies in built.values())
    return {name: [_call(run, inputs, copying) for run, inputs in copies] for name, copies in built.items()}


def _call(run: Run, inputs: Any, copying: bool) -> Call:
    return (lambda: run(fresh(inputs))) if copying else partial(run, inputs)


def _writes(run: Run, inputs: Any) -> bool:
    """Whether a run changes its inputs: by torch's counters of writes, and by what they hold, which `.data` evades."""
    copies = fresh(inputs)
    held = all_tensors(copies)
    versions = [tensor._version for tensor in held]
    run(copies)
    if tree_structure(copies) != tree_structure(inputs):
        return True  # a dict that was emptied
    return any(
        tensor._version != version or not torch.equal(tensor, original)
        for tensor, version, original in zip(held, versions, all_tensors(inputs), strict=True)
    )


def _torch_run(model: nn.Module, example: Example) -> Run:
    device = device_of(model)

    def run(inputs: Any) -> list[Any]:
        args, kwargs = arguments(example, inputs)
        output = model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return tensors(output)

    return run
