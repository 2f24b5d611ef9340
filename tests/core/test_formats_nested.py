"""Batches whose inputs have a form of their own: the first batch of a loader is an example, whatever its form."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taut import DataError
from taut.core.data import collect
from taut.structure.calling import read_example

LEFT, RIGHT, Y = torch.randn(8, 10), torch.randn(8, 6), torch.arange(8) % 4


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 4), nn.Linear(6, 4)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


def named():
    return {"left": LEFT, "right": RIGHT}


PAIRS = {
    "tuple": ((LEFT, RIGHT), Y),
    "lists": [[LEFT, RIGHT], Y],
    "tuple in list": [(LEFT, RIGHT), Y],
    "dict": (named(), Y),
    "dict in list": [named(), Y],
    "dict, more": (named() | {"index": 3}, Y, "meta"),
    "pair, more": ((LEFT, RIGHT), Y, "meta"),
    "samples": [((a, b), y) for a, b, y in zip(LEFT, RIGHT, Y, strict=True)],
    "named samples": [({"left": a, "right": b}, y) for a, b, y in zip(LEFT, RIGHT, Y, strict=True)],
}


@pytest.mark.parametrize("name", PAIRS)
def test_nested_inputs_as_example_and_as_data(name):
    model = Two()
    example = read_example(model, PAIRS[name])
    assert example.batch == 8
    assert torch.equal(example.run(model), model(LEFT, RIGHT))
    ((inputs, targets),) = collect(example, [PAIRS[name]], 8)
    assert torch.equal(example.run(model, inputs), model(LEFT, RIGHT))
    assert torch.equal(targets, Y)


def pictures():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4))


IMAGES = torch.randn(8, 3, 6, 6)

LISTS = {
    "alone": (list(IMAGES), None),
    "targets": ((list(IMAGES), Y), Y),
    "list of targets": ([list(IMAGES), list(Y)], Y),
    "numbers": ((list(IMAGES), Y.tolist()), Y),
    "columns": ((tuple(IMAGES), tuple(Y.tolist())), Y),
    "samples": (list(zip(IMAGES, Y.tolist(), strict=True)), Y),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_images_as_example_and_as_data(name):
    batch, wanted = LISTS[name]
    model = pictures()
    for value in (batch, IMAGES):
        example = read_example(model, value)
        assert (example.batch, example.samples.listed) == (8, False)
        assert torch.equal(example.value, IMAGES)
        ((inputs, targets),) = collect(example, [batch], 8)
        assert torch.equal(inputs, IMAGES)
        assert targets is wanted is None or torch.equal(targets, wanted)


def test_a_list_of_vectors_is_a_batch_and_a_pair_is_none():
    model = nn.Linear(10, 10)
    assert torch.equal(read_example(model, list(LEFT)).value, LEFT)
    assert torch.equal(read_example(model, [LEFT, LEFT + 1]).value, LEFT)  # targets of the same shape


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.a(self.words(input_ids))


@pytest.mark.parametrize("example", [torch.ones(4, 5).long(), {"input_ids": torch.ones(4, 5).long()}])
def test_rows_of_numbers_are_told_once_with_the_remedy(example):
    batch = {"input_ids": [[1] * 12] * 16, "attention_mask": [[1] * 12] * 16}
    words = r"Got \{input_ids: \[16 x int\[12\]\], .*it holds no tensor: give tensors or numpy arrays"
    with pytest.raises(DataError, match=words):
        collect(read_example(Named(), example), [batch], 8)


def batches_of_it():
    yield LEFT


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (DataLoader(TensorDataset(LEFT, Y), 4), r"Got DataLoader instead: give next\(iter\(loader\)\)"),
        (
            TensorDataset(LEFT, Y),
            r"Got TensorDataset instead: give next\(iter\(DataLoader\(dataset, batch_size=8\)\)\)",
        ),
        (iter([LEFT]), "Got list_iterator instead: give next"),
        (batches_of_it(), "Got generator instead: give next"),
        (range(3), "Got range instead: give next"),
        (None, "at least one tensor"),
    ],
)
def test_what_gives_batches_is_no_example(example, words):
    with pytest.raises(DataError, match=words):
        read_example(nn.Linear(10, 4), example)


@pytest.mark.parametrize(
    ("form", "item", "kind"), [(list, None, "None"), (list, "abc", "str"), (tuple, "abc", "str"), (list, (), "tuple")]
)
def test_a_batch_with_nothing_behind_it_is_refused(form, item, kind):
    example = read_example(nn.Linear(10, 4), LEFT)
    with pytest.raises(DataError, match=f"a batch and behind it {kind}, which is neither"):
        collect(example, form([LEFT, item]), 8)
    assert collect(example, [(LEFT, item)], 8)  # of a loader: what is beside the inputs may be anything
