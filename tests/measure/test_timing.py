"""The bookkeeping of timing: order, repetitions, medians, and that nobody's model changes. No assertion about speed."""

import gc
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from taut.calls import Example
from taut.errors import CallError, ModelError
from taut.measure import Latency, Pair, Stopwatch, interleave, latencies, timing
from taut.measure.layout import channels_last


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def job(self, log, name, seconds):
        times = iter(seconds)

        def run():
            log.append(name)
            self.now += next(times)

        return run


def test_medians_and_rotated_order(monkeypatch):
    log, clock = [], Clock(monkeypatch)
    seconds = {"a": [1, 1, 5, 2, 3], "b": [1, 1, 10, 30, 20], "c": [1, 1, 7, 7, 7]}
    runs = {name: clock.job(log, name, values) for name, values in seconds.items()}
    assert interleave(runs, rounds=3, warmup=2) == {"a": 3000.0, "b": 20000.0, "c": 7000.0}
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"


def test_fast_calls_are_repeated_to_a_millisecond(monkeypatch):
    log, clock = [], Clock(monkeypatch)
    runs = {
        "fast": clock.job(log, "f", [2.0**-12] * 100),
        "slow": clock.job(log, "s", [2.0**-8] * 100),
    }
    assert interleave(runs, rounds=2, warmup=1) == {"fast": 1e3 * 2.0**-12, "slow": 1e3 * 2.0**-8}
    assert "".join(log) == "fs" + "fffff" + "s" + "s" + "fffff"


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"warmup": 0}, {"runs": {}}])
def test_nothing_to_measure(settings):
    with pytest.raises(CallError, match=r"must be at least 1\. Got 0"):
        interleave(**{"runs": {"a": lambda: None}, **settings})


def test_garbage_collection_comes_back():
    def fail():
        raise RuntimeError

    assert gc.isenabled()
    interleave({"a": lambda: None}, rounds=1, warmup=1)
    with pytest.raises(RuntimeError):
        interleave({"a": fail}, rounds=1)
    assert gc.isenabled()


def test_best_is_each_model_in_its_own_fastest_runtime():
    latency = Latency({"eager": Pair(8.0, 2.0), "channels_last": Pair(6.0, 3.0)})
    assert latency.best == Pair(6.0, 2.0)
    assert (latency.runtimes["eager"].ratio, latency.best.ratio) == (4.0, 3.0)


def test_images_are_timed_in_both_layouts_and_the_models_stay():
    before, after, x = convnet().train(), convnet(), torch.randn(2, 3, 8, 8)
    models = (before, after)
    state = [{k: (v.clone(), v.stride(), v.data_ptr()) for k, v in m.state_dict().items()} for m in models]
    seed = torch.random.get_rng_state()
    with torch.inference_mode():
        latency = latencies(before, after, Example(before, x), rounds=2)
    assert list(latency.runtimes) == ["eager", "channels_last"]
    assert not latency.skipped
    assert all(p.before > 0 and p.after > 0 for p in latency.runtimes.values())
    for model, kept in zip(models, state, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, kept[name][0])
            assert (value.stride(), value.data_ptr()) == kept[name][1:]
    assert all(m.training for m in before.modules())
    assert x.stride() == (192, 64, 8, 1)
    assert torch.equal(torch.random.get_rng_state(), seed)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Linear(4, 2), torch.randn(2, 4)),
        (nn.Linear(4, 2), torch.randn(2, 3, 5, 4)),
        (nn.Sequential(nn.Conv1d(3, 2, 3)), torch.randn(2, 3, 8)),
    ],
    ids=["vectors", "images without kernels", "sequences"],
)
def test_channels_last_only_where_it_means_something(model, example):
    assert list(latencies(model, model, Example(model, example), rounds=1).runtimes) == ["eager"]


def test_every_way_to_call_a_model():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    pair = torch.ones(2, 3), torch.ones(2, 3)
    for value in (pair, dict(zip("ab", pair, strict=True))):
        assert latencies(Two(), Two(), Example(Two(), value), rounds=1).best.after > 0


def test_models_that_change_their_input_do_not_reach_the_example():
    model, x = nn.Sequential(nn.ReLU(inplace=True)), torch.full((2, 3), -1.0)
    latencies(model, model, Example(model, x), rounds=1)
    assert bool((x == -1).all())


def test_a_model_that_cannot_be_copied_is_timed_as_it_is():
    class Single(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise TypeError("only one of me")

    model = Single(3, 4, 3)
    latency = latencies(model, model, Example(model, torch.randn(1, 3, 8, 8)), rounds=1)
    assert list(latency.runtimes) == ["eager"]
    assert latency.skipped == {"channels_last": "TypeError: only one of me"}


def test_a_failing_model_is_a_model_error():
    model = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="cannot be run"):
        latencies(model, model, Example(model, torch.randn(2, 4)))
    with pytest.raises(ModelError, match="not initialized"):
        latencies(model, nn.LazyLinear(2), Example(model, torch.randn(2, 3)))


def test_the_copy_shares_all_but_the_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 5))
    model.add_module("head", nn.Linear(5, 4 * 36))
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)  # leaves a computed, non-leaf weight behind, which deepcopy alone refuses
    copy = channels_last(model)
    assert copy[2].weight is model[2].weight
    assert copy[0].weight_orig is not model[0].weight_orig
    assert copy[0].weight_orig.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight_orig.is_contiguous()
    torch.testing.assert_close(copy(x), expected)


def test_rotation_gives_every_run_every_place(monkeypatch):
    log, clock = [], Clock(monkeypatch)
    interleave({name: clock.job(log, name, [1.0] * 9) for name in "abc"}, rounds=6, warmup=1)
    rounds = ["".join(log[i : i + 3]) for i in range(3, len(log), 3)]
    assert [r[0] for r in rounds] == list("abcabc")
    assert all(a != b for a, b in pairwise(rounds))


# A model and what was made of it.


@pytest.mark.parametrize(("eager", "wanted"), [(3.0, "channels_last"), (2.4, "eager"), (1.0, "eager")])
def test_a_stopwatch_takes_a_runtime_where_both_are_fast(monkeypatch, eager, wanted):
    """What is made of the original decides where this is about as fast in several."""
    found = {"eager": Pair(eager, 1.0), "channels_last": Pair(2.0, 1.5)}
    monkeypatch.setattr(timing, "latencies", lambda *_, **__: Latency(found))
    model = convnet()
    assert Stopwatch(model, Example(model, torch.randn(2, 3, 8, 8)), convnet()).runtime.name == wanted


def test_a_share_is_timed_in_turns_and_in_eval_mode(monkeypatch):
    clock = Clock(monkeypatch)
    modes = []

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.layer = seconds, nn.Linear(3, 2)

        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            clock.now += self.seconds
            return self.layer(x)

    before, after = Slow(0.5).train(), Slow(0.125).train()
    monkeypatch.setenv("TAUT_RUNTIMES", "eager")
    watch = Stopwatch(before, Example(before, torch.randn(2, 3)))
    assert watch.share(after) == 0.25
    assert set(modes) == {(False, False)}
    assert before.training
    assert after.training


def test_a_runtime_that_runs_the_original_alone_is_named(monkeypatch):
    monkeypatch.setenv("TAUT_RUNTIMES", "eager")
    model, broken = nn.Linear(3, 2), nn.Linear(4, 2)
    watch = Stopwatch(model, Example(model, torch.randn(2, 3)))
    with pytest.raises(ModelError, match="eager runs the original and not what was made of it"):
        watch.share(broken)
