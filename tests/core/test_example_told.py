"""What of a batch or an example is left out, and may be meant otherwise, is named once."""

import warnings

import pytest
import torch
from torch import nn

import taut
from taut.core.example import Example
from taut.structure.calling import read_example

X, LENGTHS, Y = torch.randn(8, 4), torch.randint(1, 9, (8,)), torch.randint(0, 3, (8,))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x, scale=None):
        return self.a(x) if scale is None else self.a(x) * scale


BATCHES = {
    "labels behind lengths": ((X, LENGTHS, Y), LENGTHS, 1),
    "labels behind nothing": ((X, None, Y), Y, 0),
    "labels": ((X, Y), Y, 0),
    "weights behind labels": ((X, Y, torch.rand(8)), Y, 0),
    "one number behind labels": ((X, Y, torch.tensor(3)), Y, 0),
    "nothing behind labels": ((X, Y, None), Y, 0),
    "nothing at all": ((X, None), None, 0),
}


@pytest.mark.parametrize("name", BATCHES)
def test_targets_are_the_first_entry_that_there_is_and_whole_numbers_behind_them_are_named(name):
    batch, targets, count = BATCHES[name]
    example = Example(nn.Linear(4, 3), X)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        for _ in range(2):
            assert example.inputs_of(batch)[1] is targets
    assert len(noted) == count
    assert all("Entry 1 of each batch is taken as its targets (int64[8])" in str(one.message) for one in noted)


def test_targets_behind_several_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    example = Example(Sum(), (X, X))
    assert example.inputs_of((X, X, None, Y))[1] is Y
    with pytest.warns(UserWarning, match="Entry 2 of each batch"):
        assert example.inputs_of((X, X, LENGTHS, Y))[1] is LENGTHS


def test_entries_that_forward_does_not_name_are_named_with_what_may_be_meant():
    with pytest.warns(UserWarning, match=r"left out: scal\. For 'scal', did you mean 'scale'\? It takes scale, x\."):
        assert set(read_example(Two(), {"x": X, "scal": torch.ones(1)}).value) == {"x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inputs in ({"x": X, "scale": torch.ones(8, 1)}, {"x": X, "labels": Y}, {"x": X, "name": None}, (X, Y), X):
            read_example(Two(), inputs)


@pytest.mark.parametrize("key", ["MACs", "Macs", "FLOPs", "MACS "])
def test_keys_of_budgets_in_other_letters_are_told_the_right_one(key):
    with pytest.raises(taut.CallError, match=r"Unknown budget key .* Here that is 'macs': macs=0\.5 keeps half"):
        taut.Budget.of({key: 0.5})
