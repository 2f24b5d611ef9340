"""Before and after in one table: every number against its own source, and honest words about them."""

import json

import pytest
import torch
from safetensors.torch import save
from torch import nn

from taut.artifact.comparison import Comparison, compare
from taut.core.example import Example
from taut.errors import CallError, DataError, ModelError
from taut.measure import Latency, Metric, Pair, Searched
from taut.types import Cost

X = torch.randn(4, 3, 8, 8)


def net(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 5))


def accuracy(model):
    return Metric(0.9 if model[0].out_channels == 8 else 0.8, 100)


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return compare(net(8), net(4), accuracy, X, rounds=2)


def test_costs_have_independent_oracles(whole):
    for width, cost in ((8, whole.before), (4, whole.after)):
        model = net(width)
        params = width * 27 + width + width * 36 * 5 + 5
        assert (cost.params, cost.nonzero) == (params, params)
        assert cost.macs == width * 27 * 36 + width * 36 * 5
        assert cost.bytes == len(save(model.state_dict()))


def test_the_dict_is_flat_json_with_the_promised_keys(whole):
    items = whole.to_dict()
    assert json.loads(whole.to_json()) == items
    assert all(value is None or isinstance(value, int | float | str) for key, value in items.items() if key != "notes")
    assert items["params_ratio"] == whole.before.params / whole.after.params
    assert items["macs_ratio"] == 2.0
    assert items["bytes_ratio"] == whole.before.bytes / whole.after.bytes
    assert items["nonzero_ratio"] == items["params_ratio"]
    assert (items["metric"], items["accuracy_before"], items["accuracy_after"]) == ("accuracy", 0.9, 0.8)
    assert items["accuracy_change"] == pytest.approx(-0.1)
    assert items["accuracy_low_before"] < 0.9 < items["accuracy_high_before"]
    assert (items["accuracy_n_before"], items["batch"]) == (100, 4)
    for runtime in ("eager", "channels_last", "best"):
        before, after = items[f"{runtime}_ms_before"], items[f"{runtime}_ms_after"]
        assert items[f"speedup_{runtime}"] == before / after > 0
        assert items[f"{runtime}_speedup_low"] < before / after < items[f"{runtime}_speedup_high"]
        assert items[f"{runtime}_apart"] >= 1
    assert items["latency_share"] is None
    assert items["best_ms_before"] == min(items["eager_ms_before"], items["channels_last_ms_before"])


def test_the_table_has_every_row(whole):
    lines = str(whole).splitlines()
    rows = ("parameters", "nonzero", "MACs", "file bytes", "ms, eager, batch 4", "ms, channels_last", "ms, best")
    assert all(any(line.strip().startswith(row) for line in lines) for row in rows)
    (row,) = [line for line in lines if line.strip().startswith("accuracy")]
    assert "0.9000 [0.8256, 0.9448]" in row  # Wilson for 90 of 100
    assert "-0.1000" in row
    assert "Only costs" not in str(whole)


def test_without_evaluate_the_table_says_so():
    result = compare(net(8), net(4), example=X, rounds=1)
    assert "Only costs were measured" in str(result)
    assert (result.score_before, result.difference) == (None, None)
    assert result.to_dict()["accuracy_before"] is None


def test_without_an_example_there_are_no_macs_and_no_times():
    result = compare(net(8), net(4), lambda _: {"f1": 0.5, "loss": 2.0})
    items = result.to_dict()
    assert (items["macs_before"], items["macs_ratio"], items["speedup_best"]) == (None, None, None)
    assert "MACs per sample" not in str(result)
    assert "neither MACs nor latency" in str(result)
    assert (items["metric"], items["accuracy_after"], items["other_loss_after"]) == ("f1", 0.5, 2.0)
    assert "loss" in str(result)
    json.loads(result.to_json())


def test_paired_scores_give_the_change_an_interval():
    scores = {8: [1.0, 1.0, 0.0, 1.0], 4: [1.0, 0.0, 0.0, 1.0]}
    result = compare(net(8), net(4), lambda m: scores[m[0].out_channels])
    assert result.difference.value == -0.25
    assert result.to_dict()["accuracy_change_low"] < -0.25 < result.to_dict()["accuracy_change_high"]
    assert "-0.2500 [-0.7400, 0.2400]" in str(result)


def made(ratio, macs_after=25, nonzero_after=100, width=1.05, **settings):
    cost = Cost(100, 100, 100, 500)
    pair = Pair(ratio, 1.0, ratio / width, ratio * width, settings.pop("apart", 1.0))
    latency = Latency({"eager": pair}, settings.pop("skipped", {}))
    return Comparison(cost, Cost(100, nonzero_after, macs_after, 500), 1, latency, **settings)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (4.0, None),
        (1.1, None),
        (1.03, "by 7.5 % at most, if at all"),
        (1.0, "by 4.8 % at most, if at all"),
        (0.99, "by 3.8 % at most, if at all"),
        (0.5, "got worse"),
    ],
)
def test_fewer_macs_without_less_time_is_said_as_far_as_the_interval_goes(ratio, words):
    notes = [note for note in made(ratio).notes if note.startswith("MACs fell 4x")]
    assert bool(notes) == bool(words)
    assert all(words in note for note in notes)
    assert not [note for note in made(ratio, macs_after=100).notes if "MACs" in note]


@pytest.mark.parametrize(
    ("ratio", "width", "cell"),
    [
        (2.0, 1.05, "2x faster [1.9, 2.1]"),
        (0.5, 1.05, "2x slower [1.9, 2.1]"),
        (1.03, 1.05, "1.03x [0.981, 1.08]"),
        (0.97, 1.05, "0.97x [0.924, 1.02]"),
        (1.0, 1.01, "1x [0.99, 1.01]"),
        (1.004, 1.001, "1x [1, 1.01]"),  # no "1x faster", though the interval excludes 1
        (3.0, 4.0, "3x [0.75, 12]"),
    ],
)
def test_a_word_on_speed_needs_an_interval_without_1(ratio, width, cell):
    lines = [line.strip() for line in str(made(ratio, width=width)).splitlines()]
    rows = [line for line in lines if line.startswith("ms, ")]
    assert len(rows) == 2
    assert all(row.endswith(f"  {cell}") for row in rows)


@pytest.mark.parametrize("ratio", [0.4, 0.9, 0.97, 1.0, 1.02, 1.04, 1.1, 3.0])
@pytest.mark.parametrize("width", [1.01, 1.05, 2.0])
@pytest.mark.parametrize("apart", [1.0, 1.3])
def test_the_table_and_the_notes_never_contradict_each_other(ratio, width, apart):
    text = str(made(ratio, width=width, apart=apart))
    assert not ("faster [" in text and ("worse" in text or "at most" in text))
    assert ("slower [" in text) == ("worse" in text)
    if apart > 1.1 or ratio / width <= 1 <= ratio * width:
        assert "faster [" not in text
        assert "slower [" not in text


def test_a_busy_machine_is_said_and_nothing_is_concluded():
    comparison = made(0.5, apart=1.3)
    assert comparison.notes[0].startswith("The machine is busy")
    assert "30 % in eager" in comparison.notes[0]
    assert not [note for note in comparison.notes if "MACs" in note]
    assert "0.5x [0.476, 0.525]" in str(comparison)
    assert not [note for note in made(0.5).notes if "busy" in note]


SEARCHED = Searched("eager", Pair(10.0, 5.8, 1.67, 1.78), 0.6)


def test_after_a_search_its_share_is_what_is_shown():
    other = {"channels_last": Pair(9.0, 11.0, 0.78, 0.86)}
    latency = Latency({"eager": SEARCHED.pair, **other})
    comparison = Comparison(Cost(100, 100, 100, 500), Cost(100, 100, 25, 500), 1, latency, searched=SEARCHED)
    rows = [line.strip() for line in str(comparison).splitlines()]
    (head,) = [number for number, row in enumerate(rows) if row.startswith("share of the time, eager")]
    assert "0.58 [0.562, 0.599]" in rows[head]
    assert rows[head].endswith("at most 0.6 was asked for")
    assert [row.split(", batch")[0] for row in rows[head + 1 : head + 3]] == ["ms, eager", "ms, channels_last"]
    assert rows[head + 1].endswith("1.72x faster [1.67, 1.78]")
    assert not [note for note in comparison.notes if "MACs fell" in note]
    assert [note for note in comparison.notes if "searched for in eager alone" in note]
    items = comparison.to_dict()
    assert (items["latency_runtime"], items["latency_limit"], items["latency_share"]) == ("eager", 0.6, 0.58)
    assert items["latency_share_low"] < 0.58 < items["latency_share_high"]
    json.loads(comparison.to_json())


def test_the_runtime_of_a_search_is_not_timed_again():
    searched = Searched("channels_last", Pair(10.0, 5.8, 1.67, 1.78), 0.6)
    comparison = compare(net(8), net(4), None, X, rounds=1, searched=searched)
    assert comparison.searched == searched
    assert comparison.latency.runtimes["channels_last"] == searched.pair
    assert set(comparison.latency.runtimes) == {"eager", "channels_last"}
    assert comparison.to_dict()["channels_last_ms_after"] == 5.8


def test_zeros_and_skipped_runtimes_are_said():
    notes = made(4.0, nonzero_after=10, skipped={"channels_last": "no"}, uncounted=("lstm: 3",)).notes
    assert any("90 stored parameters are zero" in note for note in notes)
    assert "channels_last was not measured: no" in notes
    assert "lstm: 3" in notes


def test_growth_is_called_growth():
    table = str(Comparison(Cost(100, 100, 0, 10), Cost(200, 100, 0, 10)))
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert "2x larger" in rows["parameters"]
    assert "same" in rows["nonzero"]
    nearly = str(Comparison(Cost(10_000, 100, 0, 10), Cost(9_990, 100, 0, 10)))
    assert "0.1 % smaller" in nearly
    assert "1x smaller" not in nearly


def test_both_models_are_left_as_they_were():
    models = net(8).train(), net(4).eval()
    kept = [{k: (v.clone(), v.stride(), v.data_ptr()) for k, v in m.state_dict().items()} for m in models]
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        compare(*models, accuracy, X.clone(), rounds=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for model, training, before in zip(models, (True, False), kept, strict=True):
        assert all(m.training == training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name][0])
            assert (value.stride(), value.data_ptr()) == before[name][1:]
            assert not value.is_inference()


def test_an_example_object_is_taken_as_it_is():
    model = net(4)
    assert compare(model, model, example=Example(model, X), rounds=1).batch == 4


def test_errors_pass_through():
    with pytest.raises(DataError, match="evaluate returned nan"):
        compare(net(4), net(4), lambda _: float("nan"))
    with pytest.raises(DataError, match="batch dimension"):
        compare(net(4), net(4), example=3)
    with pytest.raises(ModelError, match="cannot be run"):
        compare(net(4), nn.Linear(3, 3), example=X)
    with pytest.raises(CallError, match="rounds"):
        compare(net(4), net(4), example=X, rounds=0)
