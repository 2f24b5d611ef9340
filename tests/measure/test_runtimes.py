"""Runtimes: the same outputs as torch in each of them, one at a time, and what cannot run is said. No speed here."""

import pytest
import torch
from torch import nn

from taut.core.example import Example
from taut.errors import CallError
from taut.measure import latencies, runtimes
from taut.measure.onnx import arguments, feeds, synthetic, to_onnx
from taut.measure.rounds import COPIES
from taut.measure.runtimes import RUNTIMES, Subject, built_copies, chosen, repeatable

ALL = ("eager", "channels_last", "onnxruntime", "openvino")


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


@pytest.fixture
def every_runtime(monkeypatch):
    monkeypatch.setenv("TAUT_RUNTIMES", ",".join(ALL))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    model = convnet()
    example = Example(model, torch.randn(2, 3, 8, 8))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(model, example, path)
    return Subject(model, example, lambda: path)


@pytest.mark.parametrize("name", ALL)
def test_every_runtime_computes_the_same(subject, name):
    runtime = RUNTIMES[name]
    assert runtime.refuses(subject) is None
    run, inputs = runtime.build(subject)
    with torch.no_grad():
        expected = subject.model(subject.example.value)
        (found,) = (torch.as_tensor(t) for t in run(inputs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert name in {"eager", "channels_last"} or name in runtime.identify()


class Reads(nn.Module):
    """Keeps what it was given, and where that lies."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x):
        self.given.append((float(x.mean()), x.data_ptr()))
        return self.use(x)

    def use(self, x):
        return x + 1


class Halves(Reads):
    def use(self, x):
        return x.mul_(0.5)


class HalvesUnseen(Reads):
    """The counter of writes does not see this."""

    def use(self, x):
        x.data.mul_(0.5)
        return x + 1


class HalvesAView(Reads):
    def use(self, x):
        return x.flatten()[1:].mul_(0.5)


def repeated(models, x):
    built = {
        str(number): built_copies(lambda model=model: RUNTIMES["eager"].build(Subject(model, Example(model, x), None)))
        for number, model in enumerate(models)
    }
    calls = repeatable(built)
    for model in models:
        model.given.clear()
    for copies in calls.values():
        assert len(copies) == COPIES
        for _ in range(3):
            for call in copies:
                call()


@pytest.mark.parametrize("kind", [Halves, HalvesUnseen, HalvesAView])
def test_a_model_that_writes_to_its_input_gets_the_same_one_every_time_and_so_does_the_other(kind):
    """Else what is timed is how fast denormal numbers are."""
    writer, reader, x = kind(), Reads(), torch.ones(2, 1000)
    repeated((reader, writer), x)
    for model in (reader, writer):
        assert [mean for mean, _ in model.given] == [1.0] * 3 * COPIES
    assert bool((x == 1).all())


def test_models_that_do_not_write_are_timed_without_copies_each_on_inputs_of_its_own():
    first, second, x = Reads(), Reads(), torch.ones(2, 1000)
    repeated((first, second), x)
    for model in (first, second):
        assert len({place for _, place in model.given}) == COPIES
    assert x.data_ptr() not in {place for _, place in first.given}


def test_what_is_slow_to_build_is_built_once(monkeypatch):
    clock, builds = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def build(seconds):
        clock[0] += seconds
        builds.append(seconds)
        return (lambda inputs: inputs), torch.ones(2)

    assert len(built_copies(lambda: build(0.01))) == COPIES == len(builds)
    builds.clear()
    copies = built_copies(lambda: build(2.0))
    assert len(copies) == COPIES
    assert len(builds) == 1
    assert len({inputs.data_ptr() for _, inputs in copies}) == COPIES


def test_openvino_is_pinned_to_f32_and_says_so():
    assert "f32" in RUNTIMES["openvino"].identify()


def test_all_runtimes_are_timed_and_named(every_runtime):
    model = convnet()
    found = latencies(model, convnet(), Example(model, torch.randn(2, 3, 8, 8)), rounds=1)
    assert tuple(found.runtimes) == ALL
    assert set(found.identities) == set(ALL)
    assert not found.skipped
    assert found.best.before == min(pair.before for pair in found.runtimes.values())


def test_quick_converts_nothing(every_runtime, monkeypatch):
    monkeypatch.setattr("taut.measure.timing.to_onnx", lambda *_: pytest.fail("converted"))
    model = convnet()
    found = latencies(model, model, Example(model, torch.randn(2, 3, 8, 8)), rounds=1, quick=True)
    assert set(found.runtimes) == {"eager", "channels_last"}


class Unexportable(nn.Module):
    """Its control flow depends on values, which no exporter follows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if float(x.sum()) > 0 else -self.fc(x)


def test_a_failing_conversion_leaves_the_other_runtimes(every_runtime, monkeypatch):
    conversions = []
    original = to_onnx
    monkeypatch.setattr("taut.measure.timing.to_onnx", lambda *a: (conversions.append(a), original(*a))[1])
    model = Unexportable()
    found = latencies(model, model, Example(model, torch.randn(2, 4)), rounds=1)
    assert set(found.runtimes) == {"eager"}
    assert set(found.skipped) == {"onnxruntime", "openvino"}
    assert "cannot export" in found.skipped["openvino"]
    assert len(conversions) == 1  # the failure is remembered


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, every_runtime):
    monkeypatch.delenv("TAUT_RUNTIMES")  # what is asked for by name is no remark but an error
    monkeypatch.setattr("taut.core.extras.find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(runtimes.OnnxRuntime, "refuses", lambda *_: "")
    model = convnet()
    found = latencies(model, model, Example(model, torch.randn(2, 3, 8, 8)), rounds=1)
    assert found.skipped == {"openvino": "openvino is not installed: pip install 'taut[openvino]'"}


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("TAUT_RUNTIMES", "eager, openvino")
    assert [runtime.name for runtime in chosen()] == ["eager", "openvino"]
    for wish in ("openvino", "eager,tpu"):
        monkeypatch.setenv("TAUT_RUNTIMES", wish)
        with pytest.raises(CallError, match="TAUT_RUNTIMES must name eager"):
            chosen()


def test_synthetic_inputs_look_like_the_example_and_hold_none_of_it():
    value = {"x": torch.randn(4, 3) * 2 + 5, "ids": torch.tensor([[3], [7], [4], [7]]), "on": torch.ones(4, dtype=bool)}
    example = Example(nn.Identity(), value)
    made = synthetic(example, 64)
    assert {key: tuple(t.shape) for key, t in made.items()} == {"x": (64, 3), "ids": (64, 1), "on": (64,)}
    assert {key: t.dtype for key, t in made.items()} == {key: t.dtype for key, t in value.items()}
    assert 3 <= int(made["ids"].min()) <= int(made["ids"].max()) <= 7
    assert bool(made["on"].all())
    assert abs(float(made["x"].mean()) - 5) < 2
    assert not set(made["x"].flatten().tolist()) & set(value["x"].flatten().tolist())


def test_arguments_and_feeds_follow_the_example():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    model = Two()
    assert arguments(Example(model, (a, b)), (a, b))[0] == (a, b)
    assert set(arguments(Example(model, {"a": a, "b": b}), {"a": a, "b": b})[1]) == {"a", "b"}
    assert list(feeds(["a", "b"], (a, b))) == ["a", "b"]
