"""Training: better than before, the same after any kill, and nothing of the caller's changed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cases
import taut
from taut.errors import CallError, DataError
from taut.training import finetuning, loop, state
from taut.training.losses import Reading
from taut.types import cascade

CLASSES = 5


def net() -> nn.Module:
    """Convolutions, batch norm, dropout and linear layers."""
    with cases.seeded(0):
        made = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(144, 48),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(48, CLASSES),
        )
    return sharpened(made)


def sharpened(model: nn.Module) -> nn.Module:
    """Weights enlarged until outputs differ from sample to sample, as those of trained nets do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
    return model.eval()


def images(count: int = 96, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class Shuffled:
    """Batches of 24 in a new order every time, with noise, from the global random state."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x) // 24

    def __iter__(self):
        for rows in torch.randperm(len(self.x)).split(24):
            yield self.x[rows] + 0.01 * torch.randn(len(rows), 1, 8, 8)


def divergence(original: nn.Module, x: Tensor):
    """A judge: minus the divergence from the original on x."""

    def judge(model: nn.Module) -> float:
        with torch.no_grad():
            p, q = (m(x).log_softmax(1) for m in (original, model))
        return -float(functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    return judge


def observed(model: nn.Module, budget: float = 0.15):
    network = taut.trace(model, images(8))
    stats = taut.observe(network, model, [images()])
    return stats, taut.plan(network, stats, taut.Budget(macs=budget))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_distillation_improves_a_compressed_net_and_touches_nothing_else():
    model = net()
    stats, plan = observed(model)
    small = taut.apply(model, plan, stats, data=[images()])
    judge = divergence(model, images(seed=9))
    before = cases.surroundings()
    with cases.untouched(model), cases.untouched(small):
        tuned = taut.finetune(small, None, None, Shuffled(images(960)), judge, teacher=model, example=images(8))
    assert cases.surroundings() == before
    assert judge(tuned) > judge(small)
    assert not tuned.training
    assert {type(m) for m in tuned.modules()} <= {type(m) for m in small.modules()}


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "inception", "two_inputs"])
def test_distillation_improves_every_compressed_net(name):
    case = cases.case(name)
    model, example = case.make()
    sharpened(model)
    network = taut.trace(model, example)
    data = case.data(batches=4, size=32)
    stats = taut.observe(network, model, data)
    small = taut.apply(model, taut.plan(network, stats, taut.Budget(params=0.5)), stats, data=data)
    tuned = taut.finetune(small, None, stats, data, data, teacher=model, schedule=(taut.Stage(epochs=12, rate=3e-3),))

    def error(candidate):
        with torch.no_grad():
            pairs = [[network.example.run(m, batch) for m in (model, candidate)] for batch in data]
            reading = Reading.of(pairs[0][0], stats.kinds)
            return sum(float(reading.distance(*pair)) for pair in pairs)

    assert error(tuned) < 0.98 * error(small)


def test_schedules_give_what_apply_gives_where_nothing_is_trained():
    model = net()
    stats, plan = observed(model)
    stage = taut.Stage(tuple(range(len(plan.steps))), train="none")
    data = [images()]
    assert same(
        taut.finetune(model, plan, stats, data, None, schedule=(stage,)), taut.apply(model, plan, stats, data=data)
    )


def test_a_cascade_compresses_layer_by_layer_and_trains_what_is_above():
    model = net()
    stats, plan = observed(model)
    names = [step.layers[0] for step in plan.steps]
    assert len(names) >= 2, names
    judge = divergence(model, images(seed=9))
    tuned = taut.finetune(
        model, plan, stats, Shuffled(images()), judge, schedule=cascade(plan, epochs=2, patience=None)
    )
    assert all(isinstance(tuned.get_submodule(name), nn.Sequential) for name in names)
    assert judge(tuned) > judge(taut.apply(model, plan, stats))


def test_what_is_below_a_cascades_layer_is_frozen(monkeypatch):
    model = net()
    stats, plan = observed(model)
    seen = []

    def run(self, found):
        seen.append([name for name, p in self.model.named_parameters() if not p.requires_grad])

    monkeypatch.setattr(loop.Trainer, "run", run)
    taut.finetune(model, plan, stats, [images()], None, schedule=cascade(plan))
    for step, still in zip(plan.steps, seen, strict=True):
        place = int(step.layers[0])
        assert {int(name.partition(".")[0]) for name in still} == {
            i for i in range(place + 1) if list(model[i].parameters())
        }


def test_early_stopping_restores_the_best_weights():
    model, values = net(), iter([0.0, 1.0, 3.0, 2.0, 2.5, 9.0])
    kept = {}

    def judge(candidate):
        value = next(values)
        kept[value] = {name: t.clone() for name, t in candidate.state_dict().items()}
        return value

    stage = taut.Stage(epochs=10, patience=2, rate=1e-2)
    tuned = taut.finetune(
        model, None, None, Shuffled(images()), judge, teacher=net(), example=images(8), schedule=(stage,)
    )
    assert next(values) == 9.0
    assert all(torch.equal(t, kept[3.0][name]) for name, t in tuned.state_dict().items())


def test_a_target_ends_the_stage():
    values = iter([0.0, 0.6, 0.9])
    stage = taut.Stage(epochs=10, target=0.5)
    taut.finetune(
        net(), None, None, [images()], lambda _: next(values), teacher=net(), example=images(8), schedule=(stage,)
    )
    assert next(values) == 0.9


def test_labels_train_too_and_the_learning_rate_falls_to_zero(monkeypatch):
    rates = []
    step = loop.Trainer._step
    monkeypatch.setattr(loop.Trainer, "_step", lambda self, batch: (step(self, batch), rates.append(self._rate()))[0])
    x, model = images(), net()
    labels = torch.arange(len(x)) % CLASSES
    data = list(zip(x.split(24), labels.split(24), strict=True))

    def accuracy(candidate):
        with torch.no_grad():
            return float((candidate(x).argmax(1) == labels).float().mean())

    tuned = taut.finetune(
        model,
        None,
        None,
        data,
        accuracy,
        loss=functional.cross_entropy,
        example=x[:8],
        schedule=(taut.Stage(epochs=12, rate=3e-3),),
    )
    assert accuracy(tuned) > accuracy(model) + 0.2
    assert rates[0] == 3e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4


def test_a_loss_that_explodes_keeps_the_best_weights():
    model = net()
    stage = taut.Stage(epochs=3, optimizer="sgd", rate=1e12)
    for valid in (lambda _: 1.0, None, [images()]):
        with pytest.warns(UserWarning, match="not finite"):
            tuned = taut.finetune(
                model, None, None, [images()] * 4, valid, teacher=net(), example=images(8), schedule=(stage,)
            )
        assert all(bool(torch.isfinite(t).all()) for t in tuned.state_dict().values())
        assert valid is None or same(tuned, model)


def test_a_validation_value_that_is_not_finite_is_never_the_best(tmp_path):
    values = iter([float("nan"), 0.5, float("inf") - float("inf"), 0.25])
    stage = taut.Stage(epochs=3)

    def judge(_: nn.Module) -> float:
        return next(values)

    kept = []
    validate = loop.Trainer._validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "taut.training.finetuning.measure", lambda valid, model, what: type("Score", (), {"value": valid(model)})
        )
        patch.setattr(
            loop.Trainer, "_validate", lambda self, loss: (validate(self, loss), kept.append(self.position.best))
        )
        taut.finetune(
            net(),
            None,
            None,
            [images()],
            judge,
            teacher=net(),
            example=images(8),
            schedule=(stage,),
            folder=tmp_path / "s",
        )
    assert kept == [None, 0.5, 0.5, 0.5]


def train(folder: Path | None, out: Path | None = None) -> nn.Module:
    """The run that is killed: two stages with steps, dropout, batch norm and a shuffled loader."""
    model = net()
    stats, plan = observed(model)
    stages = (
        taut.Stage((0,), "above", epochs=2),
        taut.Stage(tuple(range(1, len(plan.steps))), epochs=3, rate=2e-3),
    )
    tuned = taut.finetune(
        model, plan, stats, Shuffled(images()), divergence(model, images(seed=9)), schedule=stages, folder=folder
    )
    if out is not None:
        torch.save(tuned.state_dict(), out.with_suffix(".new"))
        out.with_suffix(".new").rename(out)
    return tuned


@cache
def uninterrupted() -> nn.Module:
    """What every run that was killed has to end in."""
    return train(None)


def train_noting_every_batch(folder: Path, out: Path) -> None:
    """What a killed process was doing: the state is written as often as it can be."""
    torch.set_num_threads(1)
    state.EVERY = 0.0
    train(folder, out)


KILLS = int(os.environ.get("TAUT_KILLS", "10"))


def forking() -> multiprocessing.context.BaseContext:
    """Forks a process of its own, with everything imported: this one may hold threads, which no fork survives."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "accelerate", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server is not told where modules are
        forkserver.ensure_running()
    return context


def test_killed_at_random_points_it_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "EVERY", 0.0)
    expected = uninterrupted()
    start = time.perf_counter()
    train(None)
    duration = time.perf_counter() - start
    context = forking()
    dice, kills, finished = random.Random(0), 0, 0
    while kills < KILLS:
        folder, out = tmp_path / f"state{finished}", tmp_path / f"out{finished}.pt"
        while not out.exists():
            child = context.Process(target=train_noting_every_batch, args=(folder, out))
            child.start()
            child.join(dice.uniform(0.1, 0.9) * duration if kills < KILLS else None)
            if child.is_alive() and not out.exists():
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            child.join()
            assert child.exitcode in {0, -signal.SIGKILL}
        found = torch.load(out)
        assert all(torch.equal(t, found[name]) for name, t in expected.state_dict().items())
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".taut")]
        finished += 1
    assert kills >= KILLS


def test_interrupted_between_two_stages_it_ends_in_the_same_weights(tmp_path, monkeypatch):
    expected, calls = uninterrupted(), 0
    apply_plan = finetuning.apply_plan

    def broken(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return apply_plan(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "apply_plan", broken)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "state")
    torch.rand(7)
    assert same(train(tmp_path / "state"), expected)


def test_a_loader_with_a_generator_of_its_own_is_resumed_too(tmp_path, monkeypatch):
    model, x = net(), images(96)

    def go(folder):
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(x, batch_size=24, shuffle=True, generator=generator)
        before = generator.get_state()
        tuned = taut.finetune(
            net(),
            None,
            None,
            loader,
            None,
            teacher=model,
            example=x[:8],
            folder=folder,
            schedule=(taut.Stage(epochs=4),),
        )
        assert torch.equal(generator.get_state(), before)
        return tuned

    expected, batches = go(None), 0
    step = loop.Trainer._step

    def interrupted(self, batch):
        nonlocal batches
        batches += 1
        if batches == 10:
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            go(tmp_path / "state")
    assert same(go(tmp_path / "state"), expected)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from images(48)


def test_streams_without_a_length_train():
    loader = torch.utils.data.DataLoader(Stream(), batch_size=24)
    tuned = taut.finetune(net(), None, None, loader, None, teacher=sharpened(net()), example=images(8))
    assert not same(tuned, net())


def test_batches_made_in_inference_mode_train():
    with torch.inference_mode():
        data = [images() + 0.0]
        tuned = taut.finetune(net(), None, None, data, None, teacher=sharpened(net()), example=images(8))
    assert not same(tuned, net())


def test_nothing_is_kept_of_a_finished_stage():
    model = net()
    stats, plan = observed(model)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        real = finetuning.accelerator
        patch.setattr(finetuning, "accelerator", lambda: made.append(real()) or made[-1])
        taut.finetune(model, plan, stats, [images()], None, schedule=cascade(plan, epochs=1))
    assert made[0]._models == []
    assert made[0]._optimizers == []


def test_an_empty_plan_has_nothing_to_cascade():
    model = net()
    stats, _ = observed(model)
    assert same(taut.finetune(model, taut.Plan(()), stats, [images()], None, schedule=()), model)


def test_ctrl_c_saves_the_state_and_the_next_call_goes_on(tmp_path, monkeypatch):
    expected, asked = uninterrupted(), 0

    @contextmanager
    def interrupts():
        def noted() -> bool:
            nonlocal asked
            asked += 1
            return asked >= 12  # it is asked twice for every batch

        yield noted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_interrupts", interrupts)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "state")
    assert same(train(tmp_path / "state"), expected)
    assert same(train(tmp_path / "state"), expected)  # finished: nothing is trained again


def test_outside_the_main_thread_no_signal_is_touched():
    found = []
    worker = threading.Thread(target=lambda: found.append(train(None)))
    worker.start()
    worker.join()
    assert same(found[0], uninterrupted())


def test_a_state_of_other_settings_is_refused(tmp_path):
    train(tmp_path / "state")
    model = net()
    with pytest.raises(CallError, match="another model, plan, schedule or seed"):
        taut.finetune(model, None, None, [images()], None, teacher=model, example=images(8), folder=tmp_path / "state")


def train_as_one_of(ranks: dict[str, str], out: Path) -> None:
    """What each of several processes does, as a launcher starts them."""
    os.environ.update(ranks)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    model, teacher, x = made(), made(), torch.randn(130, 16)
    stages = (taut.Stage(epochs=3, rate=1e-2),)
    tuned = taut.finetune(model, None, None, list(x.split(33)), [x], teacher=teacher, example=x[:4], schedule=stages)
    if ranks.get("RANK", "0") == "0":
        torch.save(tuned.state_dict(), out)


def test_two_processes_end_in_the_weights_of_one(tmp_path):
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    two["MASTER_PORT"] = str(20_000 + os.getpid() % 20_000)
    ranks = [two | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    context = forking()
    started = [context.Process(target=train_as_one_of, args=(rank, tmp_path / "two.pt"), daemon=True) for rank in ranks]
    for process in started:
        process.start()
    train_as_one_of({}, tmp_path / "one.pt")
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    one, both = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert max(float((one[key] - both[key]).abs().max()) for key in one) < 1e-5


def test_bad_calls_are_named():
    model, x = net(), images()
    with pytest.raises(CallError, match="example="):
        taut.finetune(model, None, None, [x], None)
    with pytest.raises(CallError, match="teacher="):
        taut.finetune(model, None, None, [x], None, example=x)
    with pytest.raises(DataError, match="gave no batch"):
        taut.finetune(model, None, None, [], [x], teacher=model, example=x)
    with pytest.raises(DataError, match="read only once"):
        taut.finetune(model, None, None, (b for b in [x]), None, teacher=model, example=x)
    stats, plan = observed(model)
    with pytest.raises(CallError, match=r"each of the plan's \d steps once"):
        taut.finetune(model, plan, stats, [x], None, schedule=(taut.Stage((0, 0)),))
    with pytest.raises(CallError, match="'rate' of a stage must be above 0"):
        taut.Stage(rate=0)


def test_compress_trains_what_it_made():
    model = net()
    judge = divergence(model, images(seed=9))
    wish = taut.Finetune(Shuffled(images(960)), judge, schedule=lambda plan: cascade(plan, epochs=2))
    bare = taut.compress(model, images(8), budget=taut.Budget(macs=0.12), data=[images()])
    for finetune in (taut.Finetune(Shuffled(images(960)), judge), wish):
        tuned = taut.compress(model, images(8), budget=taut.Budget(macs=0.12), data=[images()], finetune=finetune)
        assert judge(tuned.model) > judge(bare.model)
        assert tuned.plan.after.macs <= 0.12 * tuned.plan.before.macs


def test_training_that_breaks_the_budget_is_not_kept(monkeypatch):
    model, x = net(), images(96)
    values = {id(model): 1.0}

    def accuracy(candidate: nn.Module) -> float:
        return values.get(id(candidate), 0.95 if not values.get("trained") else 0.5)

    def spoil(*arguments, **settings):
        values["trained"] = 1.0
        return net(), None

    monkeypatch.setattr(
        sys.modules["taut.search.compression"], "carry_out", spoil
    )  # `taut.compress` itself is the function
    with pytest.warns(UserWarning, match="broke the budget of drop"):
        found = taut.compress(
            model, x[:8], budget=taut.Budget(drop=0.1), data=[x], evaluate=accuracy, finetune=taut.Finetune([x], None)
        )
    assert found.plan.steps
    assert found.model is not model
