"""The class that lost most: counted right, and only where the targets are classes that the original knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taut
from taut.core.example import Example
from taut.measure.classes import worst_class
from taut.structure.calling import read_example


class Says(nn.Module):
    """Answers with the class in the input's first entry; those of one class are wrong from some sample on."""

    def __init__(self, wrong: int = -1, good: int = 0) -> None:
        super().__init__()
        self.wrong, self.good = wrong, good
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        answer = x[:, 0].long().clone()
        hit = ((answer == self.wrong) & (x[:, 1] >= self.good)).nonzero()[:, 0]
        answer[hit] = (self.wrong + 1) % 3
        return nn.functional.one_hot(answer, 3).float() + 0 * self.weight


LABELS = torch.arange(60) % 3
INPUTS = torch.stack([LABELS, torch.arange(60) // 3], 1).float()


def example() -> Example:
    return read_example(Says(), INPUTS[:4])


def test_the_class_that_lost_most() -> None:
    batches = [(INPUTS[:40], LABELS[:40]), (INPUTS[40:], LABELS[40:])]
    found = worst_class(example(), Says(), Says(wrong=1, good=15), batches)
    assert found is not None
    assert (found.label, found.n, found.classes, found.before, found.after) == (1, 20, 3, 1.0, 0.75)
    assert found.low < -0.25 < found.high < 0


@pytest.mark.parametrize(
    "targets",
    [LABELS[:, None], nn.functional.one_hot(LABELS), nn.functional.one_hot(LABELS).float(), LABELS.tolist()],
    ids=["column", "one-hot", "one-hot floats", "list"],
)
def test_the_forms_of_labels(targets: Any) -> None:
    found = worst_class(example(), Says(), Says(wrong=1, good=15), [(INPUTS, targets)])
    assert found is not None
    assert (found.label, found.n, found.classes, found.before, found.after) == (1, 20, 3, 1.0, 0.75)


def test_samples_that_losses_leave_out_do_not_count() -> None:
    targets = torch.where(torch.arange(60) < 30, LABELS, -100)
    found = worst_class(example(), Says(), Says(wrong=1), [(INPUTS, targets)])
    assert found is not None
    assert (found.label, found.n, found.after) == (1, 10, 0.0)


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        ([(INPUTS, None)], "no labels"),
        ([(INPUTS, LABELS.float())], "numbers, no classes"),
        ([(INPUTS, LABELS + 1)], "a class that no output stands for"),
        ([(INPUTS, (LABELS + 1) % 3)], "labels that the original does not know"),
        ([(INPUTS, LABELS[:, None].expand(-1, 2))], "another shape"),
        ([(INPUTS, nn.functional.one_hot(LABELS).float() * 0.9)], "shares, no classes"),
        ([(INPUTS, torch.full((60,), -100))], "labels of samples that do not count"),
        ([(INPUTS[:12], LABELS[:12])], "too few"),
        ([], "nothing"),
    ],
)
def test_where_nothing_can_be_said(batches: list[tuple[Tensor, Tensor | None]], why: str) -> None:
    assert worst_class(example(), Says(), Says(wrong=1), batches) is None, why


@pytest.mark.parametrize("compare", ["torch", False])
def test_it_stands_in_the_comparison(compare: Any) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(120, 8, generator=random)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    y = model(x).argmax(1)
    result = taut.compress(model, x[:4], budget="params=0.5", data=[(x, y)], compare=compare)
    worst = result.comparison.classes
    assert worst is not None
    assert worst.before == 1.0
    text = str(result.comparison)
    assert f"right in class {worst.label}, n = {worst.n}" in text
    assert "on calibration samples, which the refit saw" in text
    assert result.comparison.to_dict()["worst_class_after"] == worst.after
