"""`taut doctor`: what is installed here, and whether it works."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import typer

import taut
from taut.cli import signals
from taut.cli.failures import BAD_DATA
from taut.cli.output import show
from taut.core import text
from taut.errors import TautError

EXTRAS = {
    "demo": ("mlxtend",),
    "train": ("accelerate",),
    "report": ("matplotlib",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
}


def doctor() -> None:
    """Print versions, threads, CPU features and extras, and compress a tiny network as a test."""
    import torch  # noqa: F401 - the first of what takes seconds

    signals.work_begins()
    rows = [*_versions(), *_machine(), *_extras()]
    show(text.table(("", "found"), rows))
    problems = [*_threads(), *_self_test()]
    for problem in problems:
        show(f"problem: {problem}")
    if problems:
        raise typer.Exit(BAD_DATA)
    show("Everything looks right: a tiny network was compressed and gave the same outputs.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    packages = ("taut", "torch", "numpy", "scipy", "safetensors")
    return [("Python", platform.python_version()), *((name, _version(name) or "missing") for name in packages)]


def _machine() -> list[tuple[str, str]]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU features", torch.backends.cpu.get_cpu_capability()),
        ("oneDNN", "yes" if torch.backends.mkldnn.is_available() else "no"),  # type: ignore[no-untyped-call]
        ("CPU cores usable", str(_cores())),
        ("torch threads", str(torch.get_num_threads())),
        ("GPU", ", ".join(devices) or "none"),
    ]


def _extras() -> list[tuple[str, str]]:
    rows = []
    for extra, packages in EXTRAS.items():
        found = {name: _version(name) for name in packages}
        missing = [name for name, number in found.items() if number is None]
        state = f"missing: pip install 'taut[{extra}]'" if missing else ", ".join(f"{n} {v}" for n, v in found.items())
        rows.append((f"extra {extra}", state))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> list[str]:
    import torch

    if torch.get_num_threads() <= _cores():
        return []
    return [f"torch uses {torch.get_num_threads()} threads on {_cores()} cores: set OMP_NUM_THREADS={_cores()}."]


def _self_test() -> list[str]:
    """A layer of rank 4 must come out smaller and with the same outputs."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        low_rank = nn.Linear(32, 32)
        low_rank.weight.copy_(torch.randn(32, 4) @ torch.randn(4, 32) / 8)
        model = nn.Sequential(low_rank, nn.ReLU(), nn.Linear(32, 10)).eval()
        inputs = torch.randn(256, 32)
        try:
            small = taut.compress(model, inputs[:8], budget=taut.Budget(params=0.6), data=[inputs]).model
        except TautError as error:
            return [f"the self-test failed: {error}"]
        wrong = float((small(inputs) - model(inputs)).norm() / model(inputs).norm())
    return [] if wrong < 1e-3 else [f"the self-test's outputs differ by {wrong:.2g} of their size"]
