"""Models that hold what deepcopy refuses are copied all the same; what must not be shared is named."""

import contextvars
import functools
import os
import threading
from collections import deque

import pytest
import torch
from torch import nn

import taut
from taut.core.copying import deep_copy
from taut.errors import ModelError


class Slots:
    __slots__ = ("kept",)


class Held:
    def __init__(self, **held):
        self.__dict__.update(held)


class Keeper(nn.Module):
    """Keeps what its layer gives, with history, in something of its own."""

    def __init__(self, store, keep):
        super().__init__()
        self.fc, self.out, self.store, self.keep = nn.Linear(8, 16), nn.Linear(16, 4), store, keep

    def forward(self, x):
        y = self.fc(x)
        self.keep(self, y)
        return self.out(y.relu())


KEEPERS = {
    "list": ([], lambda m, y: m.store.append(y)),
    "deque": (deque(maxlen=2), lambda m, y: m.store.append(y)),
    "dict": ({}, lambda m, y: m.store.update(y=y)),
    "tuple": ((), lambda m, y: setattr(m, "store", (*m.store, y))),
    "object": (Held(kept=None), lambda m, y: setattr(m.store, "kept", {"deep": [(y,)]})),
    "slots": (Slots(), lambda m, y: setattr(m.store, "kept", y)),
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_activations_with_history_do_not_keep_a_model_from_being_copied(kind):
    model = Keeper(*KEEPERS[kind]).eval()
    x = torch.randn(4, 8)
    model(x)
    before = len(model.store) if isinstance(model.store, list) else None
    net = taut.trace(model, x)
    taut.observe(net, model, [x])
    assert before is None or len(model.store) == before  # runs of ours keep things in copies
    copied = deep_copy(model)
    assert copied.fc is not model.fc
    assert torch.equal(copied(x), model(x))


class Sealed:
    """Refuses to be copied."""

    def __init__(self, held=None):
        self.held = held

    def __deepcopy__(self, memo):
        raise RuntimeError("no copies of me")


HANDLES = {
    "lock": threading.Lock,
    "event": threading.Event,
    "local": threading.local,
    "module": lambda: os,
    "context variable": lambda: contextvars.ContextVar("x"),
    "file": lambda: open(os.devnull),  # noqa: PTH123, SIM115
    "nested": lambda: {"a": [(threading.Lock(), {"b": threading.RLock()})]},
    "sealed": Sealed,
}


@pytest.mark.parametrize("kind", HANDLES)
def test_handles_are_shared_with_the_copy(kind):
    model = nn.Sequential(nn.Linear(3, 3))
    model.handle = HANDLES[kind]()
    copied = deep_copy(model)
    assert copied[0] is not model[0]
    assert torch.equal(copied[0].weight, model[0].weight)
    if kind not in {"nested", "event"}:
        assert copied.handle is model.handle


def test_an_object_beside_a_lock_that_knows_its_model_knows_the_copy():
    model = nn.Sequential(nn.Linear(3, 3))
    model.owner = Held(model=model, lock=threading.Lock())
    copied = deep_copy(model)
    assert copied.owner.model is copied
    assert copied.owner.lock is model.owner.lock


def test_what_must_not_be_shared_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    model.stream = Held(numbers=(n for n in range(3)))
    with pytest.raises(ModelError, match=r"'stream.numbers' is a generator, which runs of the model would use up"):
        deep_copy(model)
    model.stream = Sealed(model)
    with pytest.raises(ModelError, match=r"'stream', a Sealed, refuses to be, and holds parts of the model"):
        deep_copy(model)


def test_a_forward_that_is_wrapped_runs_the_copys_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    model.forward = wrapped
    x = torch.randn(2, 8)
    before = model(x)
    copied = deep_copy(model)
    nn.init.zeros_(copied[2].weight)
    nn.init.zeros_(copied[2].bias)
    assert torch.equal(copied(x), torch.zeros(2, 4))
    assert torch.equal(model(x), before)
    assert all(layer.skip is None for layer in taut.trace(model, x).layers)
