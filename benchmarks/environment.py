"""What a result was measured on, and one way to write it down. No host names, no paths."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("taut", "torch", "numpy", "scipy", "tensorly", "safetensors")


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


def finish(path: Path, settings: Mapping[str, Any], results: Any, bounds: Sequence[Bound]) -> None:
    """Write a result file, print the bounds and leave the process: 0 if all hold, 1 otherwise.

    A run that tested no bound (reduced sizes) leaves with 0 and says so.
    """
    record = {
        "settings": dict(settings),
        "results": results,
        "bounds": [{**asdict(bound), "holds": bound.holds} for bound in bounds],
        "environment": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"\nwritten: {path.parent.name}/{path.name}")
    for bound in bounds:
        print(bound)
    if not bounds:
        print("no bound was tested")
    sys.exit(0 if all(bound.holds for bound in bounds) else 1)
