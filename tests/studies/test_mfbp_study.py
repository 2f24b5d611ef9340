"""The MFBP study's own arithmetic: AUC, the source's optimizer, wrong labels, sizes, intervals."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
HERE = Path(__file__).parents[2] / "experiments" / "mfbp"
OWN = (
    "mlps",
    "rules",
    "lab",
    "robust",
    "protocols",
    "sheets",
    "data",
    "verdicts",
    "figures",
    "readings",
    "deep",
    "convs",
)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "nets"))
    monkeypatch.syspath_prepend(str(HERE))
    import mlps  # noqa: PLC0415 - scripts, found through the lines above
    import robust  # noqa: PLC0415
    import rules  # noqa: PLC0415
    import sheets  # noqa: PLC0415

    yield {"mlps": mlps, "robust": robust, "rules": rules, "sheets": sheets}
    for name in OWN:
        sys.modules.pop(name, None)


def test_auc_is_the_chance_that_a_positive_has_the_larger_value(study):
    torch.manual_seed(0)
    values, positive = torch.randint(0, 6, (80,)).float(), torch.rand(80) < 0.3
    good, bad = values[positive], values[~positive]
    pairs = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
    assert study["mlps"].auc(values, positive) == pytest.approx(float(pairs.mean()))


def test_the_sources_auc_of_labels_is_a_function_of_the_errors(study):
    torch.manual_seed(0)
    y = torch.arange(1000) % 10

    class Guess(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0].long(), 10).float()

    guess = torch.where(torch.rand(1000) < 0.9, y, (y + 1 + torch.randint(0, 9, (1000,))) % 10)
    found = study["mlps"].scores(Guess(), guess[:, None].float(), y)
    assert found["auc of labels"] == pytest.approx(1 - 10 / 18 * (1 - found["accuracy"]), abs=1e-9)


def test_rmsprop_has_its_small_number_inside_the_root(study):
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = study["mlps"].RMSprop([w], 0.1)
    v, by_hand = 0.0, 2.0
    for _ in range(3):
        w.grad = 2 * w.detach()
        v = 0.9 * v + 0.1 * (2 * by_hand) ** 2
        by_hand -= 0.1 * 2 * by_hand / (v + 1e-6) ** 0.5
        optimizer.step()
    assert float(w.detach()) == pytest.approx(by_hand, rel=1e-5)


def test_the_modern_net_has_the_published_size(study):
    mlps = study["mlps"]
    for widths, weights in ((mlps.TWO, 699_867), (mlps.FOUR, 1_259_549), (mlps.FIVE, 2_058_750)):
        net = mlps.modern(widths, seed=0, bias=False, init=0.01)
        assert mlps.parameters(net) == weights
        assert float(net[2].weight.std()) == pytest.approx(0.01, rel=0.02)


def test_wrong_labels_are_as_many_as_asked_for_and_really_wrong(study):
    y = torch.arange(20_000) % 10
    wrong = study["robust"].mislabelled(y, 0.2, seed=0)
    assert float((wrong != y).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert int(wrong.max()) == 9
    assert torch.equal(study["robust"].mislabelled(y, 0.0, seed=0), y)


def test_a_small_net_has_no_more_weights_than_are_left(study):
    for sparsity in (0.5, 0.8, 0.9):
        _, width, _, _ = study["robust"].small_widths(sparsity)
        weights = 784 * width + width**2 + 10 * width
        assert 0.97 * (1 - sparsity) * 887_500 <= weights <= (1 - sparsity) * (784 * 625 + 625**2 + 6250)


def test_training_keeps_masks_and_the_best_epoch(study):
    mlps = study["mlps"]
    torch.manual_seed(0)
    x = torch.rand(512, 784)
    y = (x[:, :10]).argmax(1)
    net = mlps.modern((784, 20, 10), seed=0, drop=False)
    pruned = study["rules"].prune(net, x[:2], "magnitude", 0.5)
    from taut.nn import bake, hold_zeros  # noqa: PLC0415

    done = bake(mlps.train(hold_zeros(pruned), x, y, 3, valid=(x, y)))
    assert study["rules"].zeros(done) == 0.5
    assert mlps.accuracy(done, x, y) >= mlps.accuracy(net, x, y)


def test_dead_units_are_counted(study):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    net[0].weight.data[1] = 0
    net[2].weight.data[:, 2] = 0
    net[4].weight.data[:, 4] = 0
    assert study["rules"].dead(net) == 3


def test_intervals_are_students(study):
    low, high = study["sheets"].interval([0.01, 0.02, 0.03])
    assert (low + high) / 2 == pytest.approx(0.02)
    assert high - low == pytest.approx(2 * 4.303 * 0.01 / 3**0.5)
