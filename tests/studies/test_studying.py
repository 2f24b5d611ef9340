"""A study: what its rows say is true of the models that it saved, and a broken one ends like a whole one."""

import csv
import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut.core.atomic_folder import rehearse
from taut.errors import CallError, DataError
from taut.measure import count
from taut.studies import sheets
from taut.studies.making import Run, Subject, Timing
from taut.studies.rows import Row, means
from taut.studies.studying import study
from taut.studies.wishes import Grid, read_method, read_sizes, split

TIMES = ("ms", "speedup", "seconds")
INPUTS = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS[:, :4] + INPUTS[:, 4:8]).argmax(1)


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def evaluate(model):
    with torch.no_grad():
        outputs = model(INPUTS)
    hits = (outputs.argmax(1) == LABELS).double().mean()
    return {"accuracy": float(hits), "loss": -float(nn.functional.cross_entropy(outputs, LABELS))}


def training():
    pairs = list(zip(INPUTS.split(32), LABELS.split(32), strict=True))
    return pairs, pairs


def subject(**changes):
    given = {
        "evaluate": evaluate,
        "data": lambda: list(INPUTS.split(32)),
        "training": training,
        "loss": nn.functional.cross_entropy,
    }
    return Subject(build(), INPUTS[:4], **(given | changes))


def sheet(folder):
    """Without the times, which no two runs share."""
    rows = list(csv.DictReader((folder / "study.csv").open()))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def loaded(folder, row):
    return taut.load(folder / "models" / row.model, base=build)


@pytest.fixture
def _no_picture(monkeypatch):
    monkeypatch.setattr("taut.studies.studying.find_spec", lambda name: None)


def test_the_rows_are_true_of_the_saved_models(tmp_path):
    grid = Grid(("svd", "magnitude(select=layer)", "auto"), (0.5, 0.25))
    rows = study(subject, tmp_path, grid)
    assert [(row.method, row.size) for row in rows] == [
        ("original", None),
        *((method, size) for method in grid.methods for size in grid.sizes),
    ]
    original = count(build(), taut.core.example.Example(build(), INPUTS[:4]))
    for row in rows:
        small = loaded(tmp_path, row)
        cost = count(small, taut.core.example.Example(small, INPUTS[:4]))
        stored = (tmp_path / "models" / row.model / "model.safetensors").read_bytes()
        assert (row.params, row.nonzero, row.macs, row.bytes) == cost.values()
        assert (row.bytes, row.zipped) == (len(stored), len(zlib.compress(stored, 6)))
        assert row.metric == evaluate(small)
        assert row.ms > 0
        assert row.speedup > 0
        if row.method.startswith("magnitude"):
            kept = [int(torch.count_nonzero(layer.weight)) / layer.weight.numel() for layer in small[::2]]
            assert kept == pytest.approx([row.size] * 3, abs=1 / 128)
            assert row.zipped < rows[0].zipped * (0.3 + row.size)
        elif row.size is not None:
            assert row.params <= row.size * original.params
    assert (tmp_path / "pareto.svg").read_text().startswith("<?xml")
    assert json.loads((tmp_path / "study.json").read_text())["environment"]["versions"]["torch"]


@pytest.mark.usefixtures("_no_picture")
def test_the_control_is_trained_like_the_others_and_zeros_stay(tmp_path):
    rows = study(subject, tmp_path, Grid(("magnitude",), (0.25,), seeds=2, epochs=1))
    assert [(row.method, row.seed) for row in rows] == [
        ("original", 0),
        *((method, seed) for method in ("control", "magnitude") for seed in (0, 1)),
    ]
    assert rows[0].metric == evaluate(build())
    assert all(row.metric["loss"] > rows[0].metric["loss"] for row in rows[1:3])
    weights = sum(layer.weight.numel() for layer in build()[::2])
    for row in rows[3:]:
        zeros = sum(int((layer.weight == 0).sum()) for layer in loaded(tmp_path, row)[::2])
        assert zeros == round(0.75 * weights)


@pytest.mark.usefixtures("_no_picture")
def test_what_cannot_be_made_is_a_row_with_its_reason(tmp_path):
    methods = ("svd", "tucker", "lowrank_sparse", "lowrank_sparse(rank=3)", "dead_units", "shared(share=0.5)")
    rows = study(subject, tmp_path, Grid(methods, (0.001,)))
    found = {row.method: row for row in rows}
    assert "No plan meets the budget" in found["svd"].reason
    assert "makes no layer of this network smaller" in found["tucker"].reason
    assert "must be between 1 and" in found["lowrank_sparse"].reason
    assert "nothing is dead" in found["dead_units"].reason
    for method in ("lowrank_sparse(rank=3)", "shared(share=0.5)"):
        assert (found[method].reason, found[method].size) == ("", None)
        assert found[method].params < found["original"].params
    assert found["svd"].params is None
    assert "No plan meets" in (tmp_path / "table.md").read_text()
    assert len(list((tmp_path / "models").iterdir())) == 3


@pytest.mark.usefixtures("_no_picture")
def test_a_broken_study_goes_on_and_ends_like_a_whole_one(tmp_path):
    grid, asked = Grid(("magnitude", "svd"), (0.5, 0.25)), []

    def breaks(model):
        asked.append(model)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return evaluate(model)

    study(subject, tmp_path / "whole", grid)
    with pytest.raises(KeyboardInterrupt):
        study(lambda: subject(evaluate=breaks), tmp_path / "broken", grid)
    lines = (tmp_path / "broken" / "runs.jsonl").read_text()
    assert lines.count("\n") == 3
    study(subject, tmp_path / "broken", grid)
    assert sheet(tmp_path / "broken") == sheet(tmp_path / "whole")
    assert (tmp_path / "broken" / "runs.jsonl").read_text().startswith(lines)


@pytest.mark.usefixtures("_no_picture")
def test_an_executor_makes_the_same_rows(tmp_path):
    grid = Grid(("svd", "magnitude"), (0.5,))
    study(subject, tmp_path / "alone", grid)
    with ThreadPoolExecutor(2) as executor:
        study(subject, tmp_path / "o", grid, executor)
    assert sheet(tmp_path / "o") == sheet(tmp_path / "alone")
    assert json.loads((tmp_path / "o" / "study.json").read_text())["settings"]["jobs"] == "ThreadPoolExecutor"
    with pytest.raises(CallError, match=r"client\.get_executor"):
        study(subject, tmp_path / "new", grid, "dask")


@pytest.mark.usefixtures("_no_picture")
def test_runs_of_another_model_do_not_count(tmp_path):
    grid = Grid(("svd",), (0.5,))
    one = study(subject, tmp_path, grid)
    other = study(lambda: subject(identity="other data"), tmp_path, grid)
    assert {row.model for row in one}.isdisjoint(row.model for row in other)
    assert study(subject, tmp_path, grid) == one


def test_a_model_that_is_built_anew_each_time_is_refused(tmp_path):
    run = Run(subject, "another state", None, tmp_path, "mark")
    with pytest.raises(DataError, match="other weights each time"):
        run({"method": "original", "size": None, "seed": 0})


def test_a_missing_model_names_the_way_out(tmp_path):
    with pytest.raises(taut.ArtifactError, match=r"delete runs\.jsonl"):
        Timing(subject, tmp_path)({"model": "gone"})


def test_a_model_that_a_killed_save_set_aside_is_found(tmp_path):
    taut.save(build(), taut.Plan(()), tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / ".taut-old-one")
    assert Timing(subject, tmp_path)({"model": "one"})["ms"] > 0


def test_the_name_of_a_model_fits_whatever_its_settings(tmp_path):
    names = {Run(subject, "", None, tmp_path, "mark").name({"method": "x" * 999, "size": size}) for size in (0.5, 0.25)}
    assert len(names) == 2
    for name in names:
        rehearse(tmp_path / name)


def test_a_folder_that_cannot_be_used_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CallError, match="is a file"):
        study(None, tmp_path / "file", Grid())


def test_what_is_wrong_with_the_task_is_said_before_anything_runs(tmp_path):
    with pytest.raises(CallError, match="Training needs data"):
        study(lambda: subject(training=None), tmp_path / "new", Grid(epochs=1))
    with pytest.raises(DataError):
        study(lambda: subject(evaluate=lambda model: "good"), tmp_path / "new")
    with pytest.raises(DataError):
        study(lambda: subject(data=list), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"methods": ("nonsense",)}, "Unknown method 'nonsense'"),
        ({"methods": ("svd(rang=3)",)}, "Unknown setting 'rang'"),
        ({"methods": ("svd(rank=3",)}, r"name\(key=value"),
        ({"methods": ("svd(rank)",)}, "key=value"),
        ({"methods": ("auto(rank=3)",)}, "no settings"),
        ({"methods": ("magnitude(sparsity=0.5)",)}, "what the sizes"),
        ({"methods": ("magnitude(score=nonsense)",)}, "'score' of magnitude"),
        ({"methods": ()}, "at least one method"),
        ({"sizes": (2.0,)}, "fraction kept"),
        ({"sizes": (0,)}, "fraction kept"),
        ({"seeds": 0}, "'seeds' of a study"),
        ({"epochs": 0}, "'epochs' of a study"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(wish, message):
    with pytest.raises(CallError, match=message):
        Grid(**wish)


def test_methods_and_sizes_are_read_as_they_are_written():
    assert split("svd, mfbp(spare=[0,-1],score=sum),auto") == ("svd", "mfbp(spare=[0,-1],score=sum)", "auto")
    assert read_method("mfbp( spare = [0, -1], score=sum, rank=None )") == taut.methods.MFBP(
        spare=[0, -1], score="sum", rank=None
    )
    assert read_method("auto") is None
    assert read_sizes("0.5, 1e-2") == (0.5, 0.01)
    with pytest.raises(CallError, match="fractions"):
        read_sizes("half")


def test_means_and_their_spread_over_the_seeds():
    values = [0.5, 0.7, 0.9]
    rows = [Row("svd", 0.5, seed, {"accuracy": v}, params=10 + seed) for seed, v in enumerate(values)]
    (mean,) = means([*rows, Row("svd", 0.5, 3, reason="too small")])
    assert mean.metric("accuracy") == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean.value("params") == 11
    assert mean.value("ms") is None
    line = sheets.to_markdown([*rows, Row("svd", 0.5, 3, reason="a|b")]).splitlines()[-1]
    assert "| svd | 0.5 | 3 | 0.7000 ± 0.2000 | 11 |" in line
    assert line.endswith("| without 1: a\\|b |")


def test_the_front_is_what_nothing_beats():
    points = [tuple(point) for point in torch.randint(0, 6, (40, 2)).tolist()]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert sheets.front(points) == sorted(set(points) - beaten)
