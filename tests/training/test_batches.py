"""Batches: read in order, the original's outputs kept where they come again, and divided without a rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from taut.core.example import Example
from taut.core.samples import Samples
from taut.errors import DataError
from taut.training.batches import Batches, bounds, share, weight


@given(size=st.integers(1, 40), count=st.integers(1, 9))
def test_parts_cover_the_batch_and_weigh_as_much_as_it(size, count):
    values = torch.arange(size, dtype=torch.float64)
    parts = [values[slice(*bounds(size, index, count))] for index in range(count)]
    assert all(len(part) for part in parts)
    mean = sum(float(part.mean()) * weight(size, index, count) for index, part in enumerate(parts)) / count
    assert mean == pytest.approx(float(values.mean()))


def test_a_share_cuts_every_tensor_of_the_batch():
    batch = {"x": torch.arange(6)[:, None], "scale": torch.tensor(2.0)}
    for cut in share(Samples(), (batch, batch), 6, 1, 3):
        assert cut["x"].flatten().tolist() == [2, 3]
        assert float(cut["scale"]) == 2


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x


@pytest.mark.parametrize(("kind", "calls"), [(list, 3), (iter, 6)])
def test_the_original_runs_once_on_what_comes_again(kind, calls):
    teacher = Counting()
    data = [torch.full((2, 1), float(i)) for i in range(3)]
    batches = Batches(Example(teacher, data[0]), data if kind is list else Again(data), teacher, "training")
    for _ in range(2):
        for place, batch in enumerate(batches):
            inputs, _targets = batches.read(batch)
            assert float(batches.original(place, inputs)[0, 0]) == 2 * place
    assert teacher.calls == calls


class Again:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_generator_is_refused_the_second_time_by_name():
    batches = Batches(Example(nn.Identity(), torch.ones(2)), (x for x in [torch.ones(2)]), None, "training")
    assert len(list(batches)) == 1
    with pytest.raises(DataError, match="training data is a generator"):
        list(batches)


@pytest.mark.parametrize("data", [3, "text", torch.ones(2, 2)])
def test_what_is_no_iterable_of_batches_is_refused(data):
    with pytest.raises(DataError, match="iterable of batches"):
        Batches(Example(nn.Identity(), torch.ones(2)), data, None, "validation")
