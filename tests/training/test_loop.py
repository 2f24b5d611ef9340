"""One stage by itself: its rate, its end, its best weights, and where it goes on after an interruption."""

import builtins
import math
import signal
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from taut.core.example import Example
from taut.errors import CallError, DataError, ModelError
from taut.training import loop
from taut.training.batches import Batches
from taut.training.losses import Objective
from taut.training.state import Position, Store, unpacked
from taut.types import Stage

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]])
DATA = list(zip(X.split(4), Y.split(4), strict=True))


class Alone:
    """What Accelerate is to one process."""

    process_index, num_processes, is_main_process = 0, 1, True

    def prepare(self, *things):
        return things

    def gather(self, t):
        return t

    def autocast(self):
        return nullcontext()

    def backward(self, loss):
        loss.backward()


class Kept(Store):
    """A store that notes what would be written."""

    def __init__(self, *, always=False):
        super().__init__(None)
        self.written, self.always = [], always

    @property
    def due(self):
        return self.always

    def write(self, position, tensors):
        place = position.epoch, position.batch
        self.written.append((place, {name: t.detach().clone() for name, t in tensors.items()}))


def trainer(stage, *, data=DATA, judge=None, store=None, position=None, loss=functional.mse_loss, model=None):
    torch.manual_seed(1)
    model = model or nn.Linear(3, 2)
    example = Example(model, X[:2])
    batches = Batches(example, data, None, "training")
    objective = Objective(loss, None)
    store, position = store or Kept(), position or Position("mark")
    return loop.Trainer(model, [], stage, objective, batches, judge, example, Alone(), position, store, 0)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(model):
    with torch.no_grad():
        return float(functional.mse_loss(model(X), Y))


@pytest.mark.parametrize("optimizer", loop.OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(optimizer):
    one = trainer(Stage(epochs=5, optimizer=optimizer, rate=0.03))
    before = error(one.model)
    one.run({})
    assert error(one.model) < 0.8 * before
    assert [(stage, epoch, value) for stage, epoch, value, _ in one.position.history] == [
        (0, epoch, None) for epoch in range(1, 6)
    ]
    losses = [loss for *_, loss in one.position.history]
    assert losses == sorted(losses, reverse=True)
    assert one.position.length == 3


def test_sgd_has_nesterovs_momentum():
    (group,) = loop.OPTIMIZERS["sgd"]([nn.Parameter(X)], lr=0.1, weight_decay=0.2).param_groups
    assert (group["momentum"], group["nesterov"], group["lr"], group["weight_decay"]) == (0.9, True, 0.1, 0.2)


@pytest.mark.parametrize("stage", [Stage(train="none"), Stage(epochs=0)])
def test_a_stage_that_trains_nothing_reads_and_writes_nothing(stage):
    one = trainer(stage, data=iter(DATA))
    before = weights(one.model)
    one.run({})
    assert same(before, weights(one.model))
    assert not one.store.written
    assert not one.batches.used


def test_a_model_without_anything_to_learn_is_left_alone():
    one = trainer(Stage(epochs=2))
    one.model.requires_grad_(requires_grad=False)
    one.run({})
    assert not one.store.written


def test_what_is_frozen_stays():
    one = trainer(Stage(epochs=1))
    one.model.bias.requires_grad_(requires_grad=False)
    weight, bias = weights(one.model)
    one.run({})
    assert torch.equal(one.model.bias, bias)
    assert not torch.equal(one.model.weight, weight)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"data": iter(DATA)}, DataError, "is a list_iterator, which can be read only once"),
        ({"data": []}, DataError, "gave no batch"),
        ({"model": nn.Linear(3, 2).half()}, ModelError, r"in float16 cannot be trained: convert .* \.float\(\)"),
        ({"model": nn.Linear(3, 2).bfloat16()}, ModelError, "in bfloat16 cannot"),
    ],
    ids=["once", "empty", "half", "bfloat16"],
)
def test_what_cannot_be_trained_is_named(change, error, words):
    with pytest.raises(error, match=words):
        trainer(Stage(epochs=2), **change).run({})


def test_data_that_can_be_read_once_serve_one_epoch():
    one = trainer(Stage(epochs=1), data=iter(DATA))
    one.run({})
    assert one.position.epoch == 1


def test_the_rate_is_half_a_cosine_over_the_stage():
    one = trainer(Stage(epochs=2, rate=0.1))
    rates = []
    for at in range(6):
        one.position.epoch, one.position.batch = divmod(at, 3)
        rates.append(one._rate())
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * at / 6)) for at in range(6)])
    one.position.epoch = 9
    assert one._rate() == 0.0
    one.stage = Stage(epochs=2, rate=0.1, decay=False)
    assert one._rate() == 0.1


def test_without_a_length_the_rate_falls_from_epoch_to_epoch_until_one_is_known():
    one = trainer(Stage(epochs=4, rate=0.1), data=(batch for batch in DATA))
    one.position.batch = 2
    assert one._rate() == pytest.approx(0.1)
    one.position.epoch, one.position.length = 1, 4
    assert one._rate() == pytest.approx(0.05 * (1 + math.cos(math.pi * 1.5 / 4)))


def judged(values):
    """A judge that gives these values, and the weights that it saw."""
    seen, left = [], iter(values)

    def judge(model):
        seen.append(weights(model))
        return next(left)

    return judge, seen


def test_the_best_weights_come_back():
    judge, seen = judged([0.0, 1.0, 3.0, 2.0])
    one = trainer(Stage(epochs=3, rate=0.03), judge=judge)
    one.run({})
    assert same(weights(one.model), seen[2])
    assert not same(seen[2], seen[3])
    assert (one.position.best, one.position.waited) == (3.0, 1)
    assert [value for _, _, value, _ in one.position.history] == [1.0, 3.0, 2.0]


def test_weights_that_were_never_beaten_are_those_from_before():
    judge, seen = judged([5.0, 1.0])
    one = trainer(Stage(epochs=1), judge=judge)
    one.run({})
    assert same(weights(one.model), seen[0])


@pytest.mark.parametrize(
    ("stage", "values", "epochs"),
    [
        (Stage(epochs=9, patience=2), [0.0, 1.0, 0.5, 1.0], 3),
        (Stage(epochs=9, patience=1), [0.0, -1.0], 1),
        (Stage(epochs=9, target=0.5), [0.0, 0.4, 0.5], 2),
        (Stage(epochs=9, target=0.5), [0.5], 0),
        (Stage(epochs=3), [0.0] * 4, 3),
        (Stage(epochs=3, patience=4), [float("nan")] * 4, 3),
        (Stage(epochs=9, patience=2), [1.0, float("inf"), float("nan")], 2),
    ],
)
def test_patience_the_target_and_the_epochs_end_a_stage(stage, values, epochs):
    judge, seen = judged(values)
    one = trainer(stage, judge=judge)
    one.run({})
    assert one.position.epoch == epochs
    assert len(seen) == len(values)


def test_a_value_that_is_not_finite_is_never_the_best():
    judge, seen = judged([float("nan"), 0.5, float("inf")])
    one = trainer(Stage(epochs=2), judge=judge)
    one.run({})
    assert one.position.best == 0.5
    assert same(weights(one.model), seen[1])
    assert [value for _, _, value, _ in one.position.history] == [0.5, None]


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_stage():
    calls = []

    def loss(output, target):
        calls.append(1)
        return functional.mse_loss(output, target) * (float("inf") if len(calls) == 2 else 1.0)

    one = trainer(Stage(epochs=3, rate=0.1), loss=loss, store=Kept(always=True))
    with pytest.warns(UserWarning, match="not finite: the stage ends with the best weights so far"):
        one.run({})
    assert len(calls) == 2
    assert one.position.epoch == 3
    assert not one.position.history
    ((_, after_one),) = [state for state in one.store.written if state[0] == (0, 1)]
    assert torch.equal(one.model.weight, unpacked("model", after_one)["weight"])


def test_the_state_is_written_at_the_start_after_every_epoch_and_when_it_is_due():
    one = trainer(Stage(epochs=2))
    one.run({})
    assert [place for place, _ in one.store.written] == [(0, 0), (1, 0), (2, 0)]
    assert {name.partition("/")[0] for name in one.store.written[1][1]} == {"model", "optimizer", "random"}
    due = trainer(Stage(epochs=1), store=Kept(always=True))
    due.run({})
    assert not unpacked("best", due.store.written[-1][1])
    assert [place for place, _ in due.store.written] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


@pytest.mark.parametrize("at", [1, 3, 5], ids=["in an epoch", "before one", "in the last"])
def test_from_any_state_it_ends_in_the_same_weights(at):
    def stage_with(**change):
        model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        return trainer(Stage(epochs=2, rate=0.05), model=model, **change)

    whole = stage_with(store=Kept(always=True))
    states = whole.store.written
    whole.run({})
    (epoch, batch), tensors = states[at]
    again = stage_with(position=Position("mark", epoch=epoch, batch=batch))
    again.model.load_state_dict(unpacked("model", tensors))
    torch.rand(5)  # whatever was drawn since
    again.run(tensors)
    assert same(weights(again.model), weights(whole.model))


def test_an_interrupt_finishes_the_batch_saves_and_ends(monkeypatch):
    asked = []

    def noted():
        asked.append(1)
        return len(asked) >= 3  # it is asked twice for every batch

    monkeypatch.setattr(loop, "_interrupts", lambda: nullcontext(noted))
    one = trainer(Stage(epochs=2))
    with pytest.raises(KeyboardInterrupt):
        one.run({})
    assert [place for place, _ in one.store.written] == [(0, 0), (0, 2)]


def test_the_first_signal_is_noted_the_second_one_goes_on_to_whoever_was_there():
    reached = []
    before = signal.signal(signal.SIGINT, lambda *_: reached.append(1))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with loop._interrupts() as noted:
            interrupt = signal.getsignal(signal.SIGINT)  # called as Python calls it
            assert interrupt is not mine
            assert not noted()
            interrupt(signal.SIGINT, None)
            assert noted()
            assert not reached
            interrupt(signal.SIGINT, None)
            assert reached == [1]
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_set():
    found = []

    def work():
        before = signal.getsignal(signal.SIGINT)
        with loop._interrupts() as noted:
            found.append((noted(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_several_processes_are_known_by_their_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not loop.launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not loop.launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loop.launched()


def test_without_accelerate_it_is_said_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CallError, match=r"pip install 'taut\[train\]'"):
        loop.accelerator()
