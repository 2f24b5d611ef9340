"""The random states that data loaders and layers draw from: torch's, numpy's and Python's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from taut.core.text import brief
from taut.errors import CallError

State = dict[str, Tensor]


def check_seed(seed: object) -> int:
    """The seed as torch takes it.

    Raises:
        CallError: it is no whole number, or outside of torch's range.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 1 << 64:
        raise CallError(f"The 'seed' must be a whole number from 0 to 2^64 - 1. Got {brief(seed)} instead.")
    return int(seed)


def seed_all(*parts: int) -> None:
    """Put every generator into a state that depends on all of `parts`."""
    seed_globals(mixed(*parts))


def mixed(*parts: int) -> int:
    """One seed that depends on all of `parts`."""
    return int(np.random.SeedSequence([part % (1 << 32) for part in parts]).generate_state(1)[0])


def seed_globals(seed: int) -> None:
    """Seed torch's, numpy's and Python's global generators."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks at every device, and keeps the stack for each
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    if torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        torch.xpu.manual_seed_all(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - data sets of users draw from the global generator
    random.seed(seed)


def capture() -> State:
    """All states as tensors."""
    _, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - as above
    version, words, cached = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([float(place), float(has_gauss), float(gauss)], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([float(version), cached or 0.0, float(cached is not None)], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda{index}": part for index, part in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore(state: State) -> None:
    """Put back what `capture` gave."""
    torch.set_rng_state(state["torch"])
    place, has_gauss, gauss = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), gauss))  # noqa: NPY002 - as above
    version, cached, has_cached = state["python_rest"].tolist()
    random.setstate((int(version), tuple(state["python"].tolist()), cached if has_cached else None))
    for name, part in state.items():
        if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(part, int(name[4:]))


@contextmanager
def own_states() -> Iterator[None]:
    """Leave all states as they were found."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    cpu, numpy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - as above
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy)  # noqa: NPY002 - as above
        random.setstate(python)
        for index, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, index)
