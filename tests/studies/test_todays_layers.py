"""The study of today's layers: its data, its choices on validation samples, its bounds; the peer's masks and heads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import taut

HERE = Path(__file__).parents[2] / "experiments"
FOLDERS = [HERE / "todays-layers", HERE / "nets", HERE / "prune-then-tucker"]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(folder) for folder in FOLDERS[:2]] + sys.path)
    for folder in FOLDERS:  # other tests import other files of the same names
        for path in folder.glob("*.py"):
            monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)
    import nets  # noqa: PLC0415 - scripts, found through the lines above
    import run  # noqa: PLC0415
    import sides  # noqa: PLC0415
    import tasks  # noqa: PLC0415
    import verdicts  # noqa: PLC0415

    yield {"nets": nets, "run": run, "sides": sides, "tasks": tasks, "verdicts": verdicts}
    for name in set(sys.modules) - before:
        if any(str(folder) in str(getattr(sys.modules[name], "__file__", "")) for folder in FOLDERS):
            del sys.modules[name]


def test_letters_become_columns_of_their_own_width(study):
    images = torch.zeros(3, 1, 32, 32)
    images[0, 0, 4:20, 10:17] = torch.arange(2, 9) / 10
    images[1, 0, :, 31] = 1.0
    part = study["tasks"].in_columns(images, torch.arange(3))
    columns, padding = part.inputs
    assert (~padding).sum(1).tolist() == [7, 1, 1]  # a blank image keeps one column
    torch.testing.assert_close(columns[0, :7, 10], torch.arange(2, 9) / 10)
    assert columns[0].sum() == pytest.approx(float(images[0].sum()))
    assert bool((columns[1, 0] == 1).all())
    assert bool((columns[padding] == 0).all())


@torch.no_grad()
def test_padding_says_nothing_to_the_letters_net(study):
    torch.manual_seed(0)
    net = study["nets"].Letters().eval()
    columns, padding = torch.rand(2, 32, 32), torch.arange(32) >= torch.tensor([[9], [20]])
    other = torch.where(padding[..., None], torch.rand(2, 32, 32), columns)
    torch.testing.assert_close(net(other, padding), net(columns, padding))
    torch.testing.assert_close(net(columns[:1, :9], padding[:1, :9]), net(columns, padding)[:1], atol=1e-5, rtol=1e-4)


def test_noise_is_the_same_every_time_and_its_ratio_is_known(study):
    tasks, clean = study["tasks"], torch.full((200, 1, 28, 28), 0.5)
    part, again = (tasks.noisy(clean, 3) for _ in range(2))
    assert torch.equal(part.inputs[0], again.inputs[0])
    found = tasks.decibels(part.inputs[0], clean)
    assert float(found.mean()) == pytest.approx(-20 * np.log10(tasks.NOISE), abs=0.05)


def test_the_committed_weights_fit(study):
    for name in study["nets"].NETS:
        assert not study["nets"].trained(name).training


def row(side, valid, macs=0.5, net="vit", **more):
    return {"net": net, "side": side, "macs": macs, "valid": valid, **more}


def test_the_peers_way_is_chosen_on_validation_samples_of_its_point(study):
    best = study["verdicts"].best_peer
    rows = [row("taut", 0.9), row("control", 0.95), row("a", 0.7), row("b", 0.8), row("c", 0.85, macs=0.25)]
    assert best(rows, "vit", 0.5) == "b"
    assert best([*rows, row("d", 0.9, error="AssertionError: heads")], "vit", 0.5) == "b"
    assert best(rows, "unet", 0.5) is None


def test_the_rate_is_the_best_on_the_mean(study):
    rows = [row(side, valid, rate=rate) for side, rate, valid in (("control", 1e-3, 0.9), ("taut", 1e-3, 0.7))]
    rows += [row(side, valid, rate=1e-4) for side, valid in (("control", 0.85), ("taut", 0.8))]
    assert study["verdicts"].best_rate(rows) == 1e-4


def outcome(rate, above, gained=0.0):
    found = {
        "net": "vit",
        "macs": 0.5,
        "rate": rate,
        "peer": "a",
        "side": "taut",
        "ours": 0.8,
        "theirs": 0.7,
        "control": 0.9,
    }
    ends = {"above_low": above - 0.2, "above_high": above + 0.2, "gained_low": -0.3}
    return found | {"above": above, "gained": gained, "gained_high": gained + 0.3, "samples": 9} | ends


def test_every_point_has_its_bound_and_a_loss_is_one(study):
    verdicts, units = study["verdicts"], {"vit": ("accuracy", "points")}
    made = [row("taut", 0.8, macs_left=0.499), row("a", 0.7, macs_left=0.49)]
    bounds = verdicts.limits(made, [outcome(None, 3.0), outcome(1e-3, -0.1)], units)
    assert [bound.holds for bound in bounds] == [True, True, False, True]
    assert not verdicts.limits(made, [outcome(1e-3, 1.0, gained=-0.2)], units)[-1].holds
    alone = {key: value for key, value in outcome(None, 1.0).items() if "above" not in key and key != "theirs"}
    assert verdicts.limits(made, [alone | {"peer": None}], units) == []  # without the peer nothing is tested
    assert "does not run" in verdicts.markdown([], [], [alone | {"peer": None}], units, [], {})


def test_times_are_compared_in_each_runtime_and_in_the_fastest_of_each_side(study):
    runtimes = {
        "eager": {"theirs_ms": 1.0, "ours_ms": 2.0, "faster": 0.5},
        "onnxruntime": {"theirs_ms": 1.5, "ours_ms": 0.5, "faster": 3.0},
    }
    found = study["verdicts"].ratios(runtimes)
    assert found == {"eager": 0.5, "onnxruntime": 3.0, "fastest beside fastest": 2.0}


def test_the_interval_is_paired(study):
    rng = np.random.default_rng(0)
    ours = rng.random(400)
    found = study["run"].interval("above", ours - (ours - 0.5))
    assert [found[key] for key in ("above", "above_low", "above_high")] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("name", ["vit", "letters", "unet"])
def test_the_peer_keeps_to_the_budget_on_every_net(study, name, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(sys, "path", [str(FOLDERS[2]), *sys.path])
    import opponent  # noqa: PLC0415

    monkeypatch.setattr(opponent, "SCAN", 4)
    monkeypatch.setattr(opponent, "HALVINGS", 4)
    torch.manual_seed(0)
    net = study["nets"].NETS[name]().eval()
    inputs = (torch.rand(4, 1, 28, 28),)
    if name == "letters":
        inputs = (torch.rand(4, 32, 32), torch.arange(32) >= torch.tensor([[9], [20], [32], [4]]))
    example, outputs = tuple(part[:1] for part in inputs), net(*inputs).detach()
    loss = torch.nn.functional.mse_loss
    peer = opponent.Peer("taylor", True, loss, ("head",), study["sides"].HEADS[name])
    small = opponent.opponent(net, example, 0.5, peer, inputs, torch.rand_like(outputs))
    full, left = (taut.trace(each, example).cost.macs for each in (net, small))
    assert 0.25 < left / full <= 0.5
    assert small(*inputs).shape == outputs.shape
    torch.testing.assert_close(net(*inputs), outputs)
