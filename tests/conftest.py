"""One thread, fixed seeds and deterministic kernels: the same numbers on every machine and under xdist."""

import functools
import gc
import math
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from taut.core import showing
from taut.measure import rounds

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TAUT_RUNTIMES", "eager,channels_last")  # the others are tested where they are meant
# How long is measured, and how often before, is tested with a clock of its own.
rounds.MOST_ROUNDS, rounds.EXTRA_TRIES, rounds.SHORTEST, rounds.WARM_UP_CALLS = 2, 0, 1e-4, 1
showing.PATIENCE = math.inf  # nothing that was not asked for appears, however busy the machine is
gc.disable()  # until all tests are collected: what is imported and collected stays
torch.set_num_threads(1)  # nets this small only lose by more, above all beside another xdist worker

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=100)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.default_generator.manual_seed(0)  # a thirtieth of the time of torch.manual_seed


@pytest.fixture(autouse=True, scope="session")
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture(autouse=True, scope="session")
def _one_table_of_onnx_operators() -> Iterator[None]:
    """Torch reads the table from source for every file that it exports: half the time of a small net's."""
    export = torch.onnx.export

    def exported(*arguments: Any, **settings: Any) -> Any:
        from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415 - it takes half a second

        if not hasattr(ONNXRegistry.from_torchlib, "cache_info"):
            ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        return export(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", exported)
        yield


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported depends on no other module."""
    if isinstance(collector, pytest.Module):
        torch.default_generator.manual_seed(0)


def pytest_collection_finish() -> None:
    """No search for garbage among modules and tests: a tenth of the time."""
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Even kernels with padding="same" make torch warn; they are tested on purpose."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning")
