"""What a result was measured on, and one way to write it down. No host names, no paths."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from taut.core.files import write_atomic

PACKAGES = (
    "taut",
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "accelerate",
    "onnxruntime",
    "openvino",
    "tensorly",
    "torch-pruning",
)


@dataclass(frozen=True)
class Bound:
    """A stated limit and what was measured.

    Attributes:
        name: what is bounded. limit: what it must reach. found: what was measured. at_most: or at least.
    """

    name: str
    limit: float
    found: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the measurement is within the limit."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def __str__(self) -> str:
        """One line, "holds" or "FAILS" first."""
        sign = "<=" if self.at_most else ">="
        return f"{'holds' if self.holds else 'FAILS'}: {self.name}: {self.found:.4g} {sign} {self.limit:g}"


def environment() -> dict[str, Any]:
    """Processor, cores, threads, memory and versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def cpu_model() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load_average() -> float | None:
    """Processes that wanted a core during the last minute; above the number of cores, absolute times are too long."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_results(path: Path, settings: Mapping[str, Any], results: Any, bounds: Sequence[Bound]) -> bool:
    """Write a result file beside the environment it was made in.

    Returns:
        Whether at least one bound was tested and none failed.
    """
    record = {
        "settings": dict(settings),
        "results": results,
        "bounds": [{**asdict(bound), "holds": bound.holds} for bound in bounds],
        "environment": environment(),
    }
    write_atomic(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return bool(bounds) and all(bound.holds for bound in bounds)
