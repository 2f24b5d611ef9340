"""`explore`: a front that is measured, kept in a folder, resumed and printed."""

import errno
import json
import os
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch
from torch import nn

import taut
from cases import case, macs, untouched
from taut import ArtifactError, CallError, DataError
from taut.measure import Latency, Pair, Times
from taut.measure.rounds import Estimate
from taut.search.exploration import RATIOS
from taut.search.front import Front, Point
from taut.search.session import JUDGED
from taut.types import Cost, Plan


class Evaluate:
    """Agreement with a reference output, counting its calls."""

    def __init__(self, model, x):
        self.x, self.calls = x, 0
        with torch.no_grad():
            self.wanted = model(x)

    def __call__(self, model):
        self.calls += 1
        with torch.no_grad():
            return {"agreement": -float((model(self.x) - self.wanted).abs().mean()), "other": 1.0}


@pytest.fixture
def few(monkeypatch):
    """Four points are enough for what is kept and resumed."""
    monkeypatch.setattr("taut.search.exploration.RATIOS", (1.0, 1.5, 2.0, 3.0))


def setting(name="mlp"):
    model, example = case(name).make()
    data = case(name).data()
    return model, example, data, Evaluate(model, data[0])


def test_a_front_from_the_original_downwards():
    model, example, data, evaluate = setting("vgg")
    with untouched(model):
        front = taut.explore(model, example, data=data, evaluate=evaluate)
    ratios = [point.ratio for point in front.points]
    assert ratios == sorted(ratios)
    assert set(ratios) <= set(RATIOS)
    assert len(ratios) >= 3
    first = front.points[0]
    assert (first.ratio, first.value, first.metric) == (1.0, 0.0, "agreement")
    assert first.after == first.before
    assert first.before.params == sum(p.numel() for p in model.parameters())
    assert first.before.macs == macs(model, example) // 2
    params = [point.after.params for point in front.points]
    assert params == sorted(params, reverse=True)
    assert all(point.ms_before > 0 and point.ms_after > 0 for point in front.points)


@pytest.fixture
def planted(monkeypatch):
    """Whatever is timed is twice as fast as the original, which takes 8 ms alone and 10 ms beside the other."""
    pair = Pair(10.0, 5.0, 1.9, 2.1, 1.02)
    asked = []

    def latencies(before, after, *_, **__):
        asked.append((before, after))
        return Latency({"eager": pair})

    monkeypatch.setattr("taut.artifact.comparison.latencies", latencies)
    times = Times({"eager": Estimate(9.0, 8.9, 9.1, 1.0), "channels_last": Estimate(8.0, 7.9, 8.1, 1.0)}, {})
    monkeypatch.setattr("taut.search.exploration.model_times", lambda *_, **__: times)
    return asked


def test_the_original_is_1x_and_all_points_refer_to_it(few, planted):
    model, example, data, _ = setting()
    front = taut.explore(model, example, data=data, evaluate=None)
    first, *others = front.points
    assert (first.ms_before, first.ms_after, first.speedup_low, first.speedup_high) == (8.0, 8.0, None, None)
    assert len(planted) == len(others) == 3
    for point in others:
        assert (point.ms_before, point.ms_after, point.speedup_low, point.speedup_high) == (8.0, 4.0, 1.9, 2.1)
    rows = [line.split() for line in str(front).splitlines() if line.strip()[:1].isdigit()]
    assert rows[0][-2:] == ["8", "1x"]
    assert [row[-4:] for row in rows[1:]] == [["4", "2x", "[1.9,", "2.1]"]] * 3


def test_points_that_are_added_later_refer_to_the_same_time(few, planted, tmp_path, monkeypatch):
    model, example, data, _ = setting()
    taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    (tmp_path / "point-2.json").unlink()
    monkeypatch.setattr("taut.search.exploration.model_times", lambda *_, **__: pytest.fail("timed again"))
    front = taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    assert {point.ms_before for point in front.points} == {8.0}
    assert len(front.points) == 4


def test_exact_steps_are_timed_for_they_change_the_model(planted, monkeypatch):
    monkeypatch.setattr("taut.search.exploration.RATIOS", (1.0,))
    model = nn.Sequential(nn.Conv1d(4, 16, 31, padding=15), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32)).eval()
    x = torch.randn(2, 4, 8)
    front = taut.explore(model, x, data=[x], evaluate=None, methods=["dead_taps", "svd"])
    assert front.points[0].plan.steps
    assert front.points[0].ms_after == 4.0


def test_plans_of_the_front_replay(few):
    model, example, data, evaluate = setting()
    front = taut.explore(model, example, data=data, evaluate=evaluate)
    net = taut.trace(model, example)
    stats = taut.observe(net, model, data)
    for point in front.points[1:3]:
        small = taut.apply(model, point.plan, stats, data=data)
        assert sum(p.numel() for p in small.parameters()) == point.after.params
        assert evaluate(small)["agreement"] == pytest.approx(point.value, abs=1e-5)


def test_without_evaluate_costs_are_measured_all_the_same(few):
    model, example, data, _ = setting()
    front = taut.explore(model, example, data=data, evaluate=None)
    assert all(point.value is None and point.metric is None for point in front.points)
    assert "metric (no evaluate)" in str(front)
    with pytest.raises(CallError, match="holds no metric: explore with evaluate="):
        front.best(0.1)


def test_it_goes_on_where_it_stopped(few, tmp_path):
    model, example, data, evaluate = setting()
    whole = taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path)
    done = evaluate.calls
    assert len(list(tmp_path.glob("point-*.json"))) == len(whole.points)
    assert len(whole.points) == 4
    again = taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path)
    assert again == whole
    assert evaluate.calls == done + 1  # the original, by which points of another metric are told
    lost = sorted(tmp_path.glob("point-*.json"))[1]
    lost.unlink()
    before = evaluate.calls
    taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path)
    assert lost.exists()
    assert evaluate.calls == before + 2  # the original and the missing point


ASKED, FAILS_AT = [], []


def asked(model):
    """At the top level, where workers find it."""
    ASKED.append(model)
    if len(ASKED) in FAILS_AT:
        raise ValueError("no more")
    with torch.no_grad():
        return float(sum(parameter.double().abs().sum() for parameter in model.parameters()))


class AtOnce(Executor):
    """Works while it is handed the work."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def without_times(front):
    return [{k: v for k, v in point.items() if k not in TIMES} for point in json.loads(front.to_json())]


TIMES = ("ms_before", "ms_after", "speedup_low", "speedup_high", "apart")


@pytest.fixture
def _asked_anew():
    ASKED.clear()
    FAILS_AT.clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize("jobs", ["threads", 2])
def test_whoever_works_the_front_is_the_same(few, tmp_path, jobs):
    model, example, data, _ = setting()
    given = {"data": data, "evaluate": asked, "compare": False}
    alone = taut.explore(model, example, **given, folder=tmp_path / "alone")
    executor = ThreadPoolExecutor(2)
    with untouched(model):
        front = taut.explore(model, example, **given, folder=tmp_path / "o", jobs=jobs if jobs == 2 else executor)
    assert front.to_json() == alone.to_json()
    assert files(tmp_path / "o") == files(tmp_path / "alone")
    assert len(files(tmp_path / "o")) == 4


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("_asked_anew")
def test_what_workers_made_is_timed_afterwards(few, planted):
    model, example, data, _ = setting()
    alone = taut.explore(model, example, data=data, evaluate=asked)
    front = taut.explore(model, example, data=data, evaluate=asked, jobs=ThreadPoolExecutor(2))
    assert front == alone
    assert len(planted) == 6
    for before, after in planted[3:]:
        assert macs(before, example) > macs(after, example)


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize("jobs", [1, "again"])
def test_an_error_in_a_worker_costs_nothing_that_is_finished(few, planted, tmp_path, jobs):
    model, example, data, _ = setting()
    FAILS_AT.append(4)
    given = {"data": data, "evaluate": asked, "folder": tmp_path}
    with pytest.raises(DataError, match="evaluate raised ValueError: no more") as caught:
        taut.explore(model, example, **given, jobs=AtOnce())
    assert [point.ratio for point in caught.value.result.points] == [1.0, 1.5, 3.0]
    assert {path.name for path in tmp_path.iterdir()} == {"point-1.json", "untimed-1.5", "untimed-3"}
    front = taut.explore(model, example, **given, jobs=1 if jobs == 1 else AtOnce())
    assert len(ASKED) == 5 + 2  # the original, and the one that was missing
    assert set(files(tmp_path)) == {f"point-{ratio:g}.json" for ratio in (1, 1.5, 2, 3)}
    assert [point.ms_after for point in front.points] == [8.0, 4.0, 4.0, 4.0]
    assert without_times(front) == without_times(taut.explore(model, example, data=data, evaluate=asked))


@pytest.mark.usefixtures("_asked_anew")
def test_a_damaged_model_that_waits_to_be_timed_is_made_again(few, planted, tmp_path, monkeypatch):
    model, example, data, _ = setting()
    given = {"data": data, "evaluate": asked, "folder": tmp_path, "jobs": AtOnce()}
    with monkeypatch.context() as patch:
        patch.setattr("taut.search.exploration.compared_models", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taut.explore(model, example, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"point-1.json", "untimed-1.5", "untimed-2", "untimed-3"}
    (tmp_path / "untimed-2" / "model.safetensors").write_bytes(b"torn")
    before = len(ASKED)
    assert len(taut.explore(model, example, **given).points) == 4
    assert len(ASKED) == before + 2


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_an_evaluate_that_cannot_be_sent_is_refused_with_the_remedy(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    model, example, data, _ = setting()
    with pytest.raises(CallError, match=r"cannot be sent to other processes.*no lambda, no inner function"):
        taut.explore(model, example, data=data, evaluate=lambda model: 1.0, jobs=2, compare=False)
    with pytest.raises(CallError, match=r"Executor \(of Dask: client\.get_executor\(\)\)"):
        taut.explore(model, example, data=data, jobs="many")


def test_a_killed_exploration_keeps_what_it_measured(few, tmp_path):
    model, example, data, evaluate = setting()

    class Stop(Exception):  # noqa: N818 - stands for a kill
        pass

    def dies(candidate):
        if evaluate.calls >= 3:
            raise Stop
        return evaluate(candidate)

    with pytest.raises(DataError, match="Stop"):
        taut.explore(model, example, data=data, evaluate=dies, folder=tmp_path)
    kept = {path.name for path in tmp_path.glob("point-*.json")}
    assert kept == {"point-1.json", "point-1.5.json"}
    front = taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path)
    assert len(front.points) > 2


@pytest.mark.parametrize("change", ["weights", "seed", "methods"])
def test_points_of_another_model_or_setting_are_not_mixed_in(few, tmp_path, change):
    model, example, data, evaluate = setting()
    taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path, methods=["svd"])
    calls = evaluate.calls
    settings = {"seed": 0, "methods": ["svd"]}
    if change == "weights":
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1e-3
    else:
        settings[change] = 1 if change == "seed" else ["svd", "tucker"]
    taut.explore(model, example, data=data, evaluate=evaluate, folder=tmp_path, **settings)
    assert evaluate.calls >= calls + 4


def evaluated(folder, model, data, methods=None):
    """How many points are measured anew in a folder."""
    calls = []

    def counted(candidate):
        calls.append(candidate)
        return 0.0

    taut.explore(model, data[0][:4], data=data, evaluate=counted, folder=folder, methods=methods, compare=False)
    return len(calls) - 1  # less the original


def test_points_without_channels_are_not_mixed_with_those_that_have_them_unasked(few, tmp_path):
    model, data = case("mlp").make()[0], case("mlp").data(batches=1, size=JUDGED)
    for first, then in (("low rank", None), (None, "low rank")):
        folder = tmp_path / str(first)
        assert evaluated(folder, model, data, first) >= 3
        assert evaluated(folder, model, data, first) == 0
        assert evaluated(folder, model, data, then) >= 3
    assert evaluated(folder, model, data, ["low rank"]) == 0  # other words for the same
    assert evaluated(folder, model, data, ["low rank", "channels"]) >= 3
    assert evaluated(folder, model, data) == 0
    few_samples = case("mlp").data(batches=1, size=JUDGED - 1)
    assert evaluated(tmp_path / "few", model, few_samples) >= 3
    assert evaluated(tmp_path / "few", model, few_samples, "low rank") == 0


def test_points_without_hidden_units_are_not_mixed_with_those_that_have_them_unasked(few, tmp_path):
    torch.manual_seed(0)
    model = Recurring().eval()
    data = [torch.randn(8, 5, 6)]
    assert evaluated(tmp_path, model, data, "low rank") >= 3
    assert evaluated(tmp_path, model, data, None) >= 3


class Recurring(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"fingerprint": "x"}', b"\xff\xfe"])
def test_damaged_points_count_as_missing(few, tmp_path, damage):
    model, example, data, _ = setting()
    first = taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    (tmp_path / "point-1.5.json").write_bytes(damage)
    (tmp_path / "point-99.json").write_bytes(damage)
    again = taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    assert [p.ratio for p in again.points] == [p.ratio for p in first.points]
    assert json.loads((tmp_path / "point-1.5.json").read_text())["point"]["ratio"] == 1.5


def test_a_folder_that_cannot_be_written(tmp_path):
    model, example, data, _ = setting()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="file"):
        taut.explore(model, example, data=data, evaluate=None, folder=tmp_path / "file" / "front")
    asked = []
    with pytest.raises(CallError, match="is a file"):
        taut.explore(model, example, data=data, evaluate=asked.append, folder=tmp_path / "file")
    assert asked == []


def test_random_state_and_modes_are_put_back(few):
    model, example, data, evaluate = setting()
    before = torch.get_rng_state()
    with torch.inference_mode():
        front = taut.explore(model.train(), example, data=data, evaluate=evaluate)
    assert torch.equal(before, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert len(front.points) == 4


# The front as data.


def point(ratio, params, value, **more):
    cost = Cost(params, params, 10 * params, 4 * params)
    return Point(ratio, Plan(()), Cost(1000, 1000, 10_000, 4000), cost, 2.0, 2.0 / ratio, "accuracy", value, **more)


FRONT = Front((point(1.0, 1000, 0.9), point(2.0, 500, 0.89, low=0.88, high=0.9), point(4.0, 250, 0.7)))


def test_table_has_a_row_per_point_and_intervals_where_known():
    text = str(FRONT)
    assert len(text.strip().splitlines()) == 5
    for words in ("accuracy", "4x", "500 (2x)", "10k (1x)", "0.8900 [0.8800, 0.9000]", "0.7000"):
        assert words in text


@pytest.mark.parametrize(("drop", "ratio"), [(0.0, 1.0), (0.005, 1.0), (0.011, 2.0), (0.5, 4.0)])
def test_best_is_the_smallest_within_the_drop(drop, ratio):
    assert FRONT.best(drop).ratio == ratio


def test_points_on_a_busy_machine_are_named():
    assert "busy" not in str(FRONT)
    busy = Front((point(1.0, 1000, 0.9), point(2.0, 500, 0.8, speedup_low=0.5, speedup_high=9.0, apart=1.27)))
    last = str(busy).splitlines()[-1]
    assert "The machine is busy" in last
    assert "27 % in the row of 2x" in last


def test_points_without_intervals_are_read(few, tmp_path):
    """As they were kept before there were any."""
    model, example, data, _ = setting()
    whole = taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    for path in tmp_path.glob("point-*.json"):
        record = json.loads(path.read_text())
        for key in ("speedup_low", "speedup_high", "apart"):
            del record["point"][key]
        path.write_text(json.dumps(record))
    again = taut.explore(model, example, data=data, evaluate=None, folder=tmp_path)
    assert [p.ms_after for p in again.points] == [p.ms_after for p in whole.points]


def test_json_holds_everything():
    found = json.loads(FRONT.to_json())
    assert [p["ratio"] for p in found] == [1.0, 2.0, 4.0]
    assert found[1]["after"] == {"params": 500, "nonzero": 500, "macs": 5000, "bytes": 2000}
    assert found[0]["plan"]["steps"] == []
    assert FRONT.to_json().endswith("\n")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_writes_an_image(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"front.{suffix}"
    FRONT.plot(path)
    head = path.read_bytes()[:8]
    assert head == b"\x89PNG\r\n\x1a\n" if suffix == "png" else head.startswith(b"<?xml")


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "front.svg").write_text("old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ArtifactError, match="No space left"):
        FRONT.plot(tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text() == "old"
    for name in ("front", "front.docx"):
        with pytest.raises(CallError, match=r"must end in .svg, .png or .pdf"):
            FRONT.plot(tmp_path / name)


def test_an_empty_front_prints():
    assert "smaller" in str(Front(()))


def test_a_model_without_compressible_layers_has_one_point():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    front = taut.explore(model, torch.randn(2, 4), data=[torch.randn(8, 4)], evaluate=None)
    assert [point.ratio for point in front.points] == [1.0]
