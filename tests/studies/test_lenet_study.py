"""The study of LeNet-5 on letters: its printed counts by built nets, its letters from files, its judgements."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
HERE = Path(__file__).parents[2] / "experiments" / "lenet-letters"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "nets"))
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    import answers  # noqa: PLC0415 - scripts, found through the lines above
    import lenet  # noqa: PLC0415
    import letters  # noqa: PLC0415
    import limits  # noqa: PLC0415
    import masking_facts  # noqa: PLC0415
    import printed  # noqa: PLC0415
    import reductions  # noqa: PLC0415
    import wanted  # noqa: PLC0415

    modules = (answers, lenet, letters, limits, masking_facts, printed, reductions, wanted)
    yield {module.__name__: module for module in modules}
    for name in set(sys.modules) - before:
        if str(HERE.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


BUILT = {}
"""Sizes of the built nets, which several tests read."""


def built(study, experiment, level):
    """Sizes of a reduced net."""
    if (experiment, level) not in BUILT:
        net, x = study["lenet"].lenet(), torch.rand(8, 1, 32, 32)
        small = study["reductions"].reduced(net, experiment, level, x, None)
        BUILT[experiment, level] = study["reductions"].counts(net, small, experiment)
    return BUILT[experiment, level]


def rows(study, change=lambda experiment, level, way: 0.0):
    """Results as the runs give them, every net `change` points from a control of 90 %."""
    found = []
    for cell in study["wanted"].trained("lenet", 1) + study["wanted"].tables(1, quick=False):
        sizes = {"params": study["lenet"].size(study["lenet"].WIDTHS)}
        if cell["way"] == "text":
            sizes = built(study, cell["experiment"], cell["level"])
        moved = change(cell["experiment"], cell["level"], cell["way"]) / 100 if cell["experiment"] else 0.0
        found.append(cell | sizes | {"untrained": 0.5, "epochs": 10, "valid": 0.9, "test": 0.9 + moved})
    return found


def test_all_totals_and_percentages_are_those_of_built_nets(study):
    found = rows(study)
    bounds = study["limits"].counted(found)
    assert [(bound.limit, bound.found) for bound in bounds] == [(19, 19), (9, 9)]
    page = study["printed"].markdown({"tables": found}, bounds, "letters")
    assert "6272; 6283 as the source counts (6283)" in page
    assert page.count("Table") == 4


def test_a_wrong_count_is_seen(study):
    found = rows(study)
    next(row for row in found if row["way"] == "text")["params as counted"] += 1
    assert [bound.holds for bound in study["limits"].counted(found)] == [False, True]


def test_verdicts_follow_the_rows(study):
    """A net like the printed one confirms its rows; another contradicts them."""

    def printed(experiment, level, way):
        known = study["reductions"].PUBLISHED
        return known[experiment, level][2] - 91.1 if way in {"text", "code"} else 0.0

    facts = study["masking_facts"].facts()
    assert facts["adam, gradient"] > 0
    assert facts["sgd, gradient"] == facts["sgd, hold"] == facts["adam, hold"] == 0
    like, unlike = (
        study["answers"].findings({"tables": rows(study, change), "facts": facts}, "letters")
        for change in (printed, lambda *_: -50.0)
    )
    names = [name for name in like if "-row-" in name]
    assert len(names) == 19
    assert all(like[name]["verdict"] == "reproduced" for name in names)
    assert like["table-3"]["verdict"] == "reproduced"
    assert unlike["table-3-row-5"]["verdict"] == "contradicted"
    assert unlike["table-4"]["verdict"] == "contradicted"
    assert set(like) == set(unlike)


def test_every_finding_is_about_a_claim(study):
    from taut.studies.claims import read_sources  # noqa: PLC0415

    (source,) = (one for one in read_sources(HERE.parent) if one.name == "lenet-letters")
    facts = {"adam, gradient": 1.0, "adam, hold": 0.0, "sgd, gradient": 0.0, "sgd, hold": 0.0}
    found = study["answers"].findings({"tables": rows(study), "facts": facts}, "letters")
    assert set(found) <= {claim.id for claim in source.claims}


def test_nets_of_any_size_keep_the_convolutions(study):
    for params in (5240, 17447, 62208, 82554):
        widths = study["lenet"].widths_for(params)
        net = study["lenet"].lenet(0, widths)
        assert sum(p.numel() for p in net.parameters()) == study["lenet"].size(widths)
        assert abs(study["lenet"].size(widths) - params) < 0.07 * params
        assert widths[:2] == (6, 16)


def test_a_rewound_net_has_its_first_weights_where_something_stays(study):
    net = study["lenet"].lenet(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    small = study["reductions"].reduced(net, "magnitude fc", 0.1, torch.rand(2, 1, 32, 32), None)
    back, first = study["reductions"].rewound(small, 3), study["lenet"].lenet(3)
    kept = small.fc1.weight != 0
    assert torch.equal(back.fc1.weight[kept], first.fc1.weight[kept])
    assert not bool(back.fc1.weight[~kept].any())


def idx(path, values):
    """An IDX file of unsigned bytes."""
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


def test_emnist_is_transposed_and_counts_from_one(study, tmp_path):
    folder = tmp_path / "emnist"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, many in (("train", 60), ("test", 10)):
        images = random.integers(0, 256, (many, 28, 28), dtype=np.uint8)
        images[:, :2, :] = 255  # a stored row is a column of the letter
        idx(folder / f"emnist-letters-{split}-images-idx3-ubyte", images)
        idx(folder / f"emnist-letters-{split}-labels-idx1-ubyte", (np.arange(many) % 26 + 1).astype(np.uint8))
    data = study["letters"].load_letters(tmp_path)
    assert data.kind == "EMNIST letters"
    assert data.test[0].shape == (10, 1, 32, 32)
    assert float(data.test[0][..., 0].mean()) == pytest.approx(1.0)
    assert data.test[1].tolist() == list(range(10))
    assert (len(data.train[0]), len(data.valid[0])) == (50, 10)


def test_letters_from_fonts_are_called_so_and_missing_ones_said(study, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither emnist/ with its IDX files nor letters26\.npz"):
        study["letters"].load_letters(tmp_path)
    images, labels = np.zeros((60, 28, 28), np.uint8), np.arange(60) % 26
    np.savez(tmp_path / "letters26.npz", xt=images, yt=labels, xe=images[:5], ye=labels[:5])
    data = study["letters"].load_letters(tmp_path)
    assert "fonts" in data.kind
    assert not set(map(id, data.train)) & set(map(id, data.valid))
    assert len(data.train[0]) + len(data.valid[0]) == 60
