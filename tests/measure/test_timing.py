"""Two models beside each other: what is concluded from their times, and that nobody's model changes. No real time."""

import time

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from taut.core.example import Example
from taut.errors import ModelError
from taut.measure import Latency, LatencyMeter, Pair, Searched, busy_note, latencies, model_times, rounds, timing
from taut.measure.layout import channels_last
from taut.measure.rounds import COPIES, LEAST_WIDTH


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setenv("TAUT_RUNTIMES", "eager")
    return Clock(monkeypatch)


class Slow(nn.Module):
    """Takes its time on a clock, and keeps how it was called."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.seconds, self.layer, self.modes = seconds, nn.Linear(3, 2), []
        self.clock = clock

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.clock.now += self.seconds
        return self.layer(x)


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (Pair(2.0, 1.0), None),
        (Pair(2.0, 1.0, 1.9, 2.1), "faster"),
        (Pair(1.0, 2.0, 0.48, 0.52), "slower"),
        (Pair(2.0, 1.0, 0.99, 4.0), None),
        (Pair(1.0, 1.0, 1 / LEAST_WIDTH, LEAST_WIDTH), None),
        (Pair(2.0, 1.0, 1.9, 2.1, apart=1.2), None),
    ],
)
def test_a_verdict_needs_an_interval_without_1_and_a_machine_that_is_not_busy(pair, verdict):
    assert pair.verdict == verdict


def test_a_pair_is_the_lower_quintile_of_each_with_the_interval_of_the_ratio(clock, monkeypatch):
    monkeypatch.setattr(rounds, "WARM_UP_CALLS", 3)  # as shipped
    before, after = Slow(clock, 0.5), Slow(clock, 0.125)
    latency = latencies(before, after, Example(before, torch.randn(2, 3)), 3)
    assert latency.runtimes == {"eager": Pair(500.0, 125.0, 4 / LEAST_WIDTH, 4 * LEAST_WIDTH, 1.0)}
    assert set(latency.identities) == {"eager"}
    assert len(before.modes) == 2 + COPIES * (2 + 3)  # a run, a look for writes; warm-up and rounds of every copy


def test_one_model_alone(clock):
    model = Slow(clock, 0.5).train()
    times = model_times(model, Example(model, torch.randn(2, 3)), 2)
    (milliseconds,) = times.runtimes.values()
    assert (milliseconds.value, milliseconds.high) == (500.0, 500.0 * LEAST_WIDTH)
    assert not times.skipped
    assert set(model.modes) == {(False, False)}
    assert model.training


def test_a_runtime_that_was_measured_is_taken_as_it_is(clock):
    model, pair = Slow(clock, 0.5), Pair(7.0, 3.0, 2.0, 2.5)
    latency = latencies(model, model, Example(model, torch.randn(2, 3)), measured={"openvino": pair})
    assert list(latency.runtimes) == ["eager", "openvino"]
    assert latency.runtimes["openvino"] == pair
    calls = len(model.modes)
    again = latencies(model, model, Example(model, torch.randn(2, 3)), measured={"eager": pair})
    assert again.runtimes == {"eager": pair}
    assert len(model.modes) == calls + 2


def test_a_busy_machine_is_named_with_the_runtime():
    assert not busy_note({"eager": 1.0, "openvino": 1.099})
    (note,) = busy_note({"eager": 1.0, "openvino": 1.234})
    assert "The machine is busy" in note
    assert "23 % in openvino" in note
    assert "eager" not in note


def test_best_is_each_model_in_its_own_fastest_runtime():
    latency = Latency({"eager": Pair(8.0, 2.0), "channels_last": Pair(6.0, 3.0)})
    assert latency.best == Pair(6.0, 2.0)
    assert (latency.runtimes["eager"].ratio, latency.best.ratio) == (4.0, 3.0)


def test_models_at_their_best_in_two_runtimes_were_not_timed_in_the_same_rounds():
    """The one ratio is too low, the other too high: in between lies what no round measured."""
    pairs = {"eager": Pair(8.0, 2.0, 3.8, 4.2, 1.02), "channels_last": Pair(6.0, 3.0, 1.9, 2.1, 1.05)}
    assert Latency(pairs).best == Pair(6.0, 2.0, 1.9, 4.2, 1.05)
    assert Latency({"eager": pairs["eager"]}).best == pairs["eager"]


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
    assert latency.skipped == {"channels_last": "ModelError: The model cannot be copied: TypeError: only one of me"}


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


# A model and what was made of it.


@pytest.mark.parametrize(("eager", "wanted"), [(3.0, "channels_last"), (2.4, "eager"), (1.0, "eager")])
def test_a_stopwatch_takes_a_runtime_where_both_are_fast(monkeypatch, eager, wanted):
    """What is made of the original decides where this is about as fast in several."""
    found = {"eager": Pair(eager, 1.0), "channels_last": Pair(2.0, 1.5)}
    monkeypatch.setattr(timing, "latencies", lambda *_, **__: Latency(found))
    model = convnet()
    assert LatencyMeter(model, Example(model, torch.randn(2, 3, 8, 8)), convnet()).runtime.name == wanted


def test_a_share_is_timed_in_turns_and_in_eval_mode(clock):
    before, after = Slow(clock, 0.5).train(), Slow(clock, 0.125).train()
    watch = LatencyMeter(before, Example(before, torch.randn(2, 3)))
    assert watch.relative_time(after) == 0.25
    assert watch.timed(after) == Pair(500.0, 125.0, 4 / LEAST_WIDTH, 4 * LEAST_WIDTH, 1.0)
    assert set(before.modes + after.modes) == {(False, False)}
    assert before.training
    assert after.training


def test_what_a_search_came_to_is_what_it_measured(clock):
    before, after = Slow(clock, 0.5), Slow(clock, 0.125)
    watch = LatencyMeter(before, Example(before, torch.randn(2, 3)))
    watch.relative_time(after)
    calls, trained = len(after.modes), Slow(clock, 0.4)
    searched = watch.searched(trained, 0.3)
    assert searched == Searched("eager", Pair(500.0, 125.0, 4 / LEAST_WIDTH, 4 * LEAST_WIDTH, 1.0), 0.3)
    assert len(after.modes) == calls
    assert not trained.modes
    share = searched.share
    assert share.value == 0.25
    assert share.low == pytest.approx(0.25 / LEAST_WIDTH)
    assert share.high == pytest.approx(0.25 * LEAST_WIDTH)


def test_a_structure_that_was_never_timed_is_timed_in_the_end(clock):
    before = Slow(clock, 0.5)
    watch = LatencyMeter(before, Example(before, torch.randn(2, 3)))
    watch.relative_time(Slow(clock, 0.125))
    other = Slow(clock, 0.4)
    other.layer = nn.Linear(3, 2, bias=False)
    assert watch.searched(other, 0.9).share.value == pytest.approx(0.8)


def test_a_runtime_that_runs_the_original_alone_is_named(monkeypatch):
    monkeypatch.setenv("TAUT_RUNTIMES", "eager")
    model, broken = nn.Linear(3, 2), nn.Linear(4, 2)
    watch = LatencyMeter(model, Example(model, torch.randn(2, 3)))
    with pytest.raises(ModelError, match="eager runs the original and not what was made of it"):
        watch.relative_time(broken)
