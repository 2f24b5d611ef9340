"""Before and after in one table: every number against its own source, and honest words about them."""

import json

import pytest
import torch
from safetensors.torch import save
from torch import nn

from taut.calls import Example
from taut.comparison import Comparison, compare
from taut.errors import CallError, DataError, ModelError
from taut.measure import Latency, Metric, Pair
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


def made(ratio, macs_after=25, nonzero_after=100, **settings):
    cost = Cost(100, 100, 100, 500)
    latency = Latency({"eager": Pair(ratio, 1.0)}, settings.pop("skipped", {}))
    return Comparison(cost, Cost(100, nonzero_after, macs_after, 500), 1, latency, **settings)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(4.0, None), (1.1, None), (1.0, "did not improve"), (0.99, "did not improve"), (0.5, "got worse")],
)
def test_fewer_macs_without_less_time_is_said(ratio, words):
    notes = [note for note in made(ratio).notes if note.startswith("MACs fell 4x")]
    assert bool(notes) == bool(words)
    assert all(words in note for note in notes)
    assert not [note for note in made(ratio, macs_after=100).notes if "MACs" in note]


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
