"""What is noted of views that split channels, and which numbers may fall with the heads."""

import pytest
import torch
from torch import nn

from taut import CallError
from taut.structure.channels.heads import Number, Split, attempts, candidates, counts_heads, whole_numbers
from taut.structure.surgery import renumber, renumbered


class Counting(nn.Module):
    """Holds numbers of all kinds."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.one, self.flag, self.share = 4, 6, 1, True, 4.0
        self.inner = nn.Linear(4, 4)


def test_whole_numbers_are_those_that_modules_of_the_user_hold_themselves():
    model = nn.Sequential(Counting(), nn.Linear(4, 4))
    assert whole_numbers(model) == {"0": {"num_heads": 4, "head_dim": 6}}
    assert whole_numbers(model, {"0.head_dim", "1.in_features"}) == {"0": {"head_dim": 6}}
    assert whole_numbers(Counting(), {"num_heads"}) == {"": {"num_heads": 4}}


@pytest.mark.parametrize("name", ["num_heads", "n_head", "heads", "num_kv_heads", "num_attention_heads"])
def test_names_of_how_many_heads_there_are(name):
    assert counts_heads(name)


@pytest.mark.parametrize("name", ["head_dim", "d_head", "attention_head_size", "depth", "n", "embed_dim"])
def test_names_of_something_else(name):
    assert not counts_heads(name)


def test_numbers_that_may_fall_with_heads():
    """Four heads of width 6 in three parts, a group of two channels: two heads go with each."""
    split = Split("a", (3, 4, 6), 1, torch.zeros(4))
    held = {"depth": 4, "head_dim": 6, "width": 24, "all": 72, "num_heads": 4, "parts": 3, "other": 12}
    assert split.totals == {24, 72}
    found = candidates(split, held, 2)
    assert found == [Number("a", *pair) for pair in (("num_heads", 2), ("depth", 2), ("width", 12), ("all", 36))]
    tried = [tuple(number.attribute for number in some) for some in attempts(found, 100)]
    assert tried[:5] == [
        ("num_heads",),
        ("num_heads", "depth"),
        ("num_heads", "width"),
        ("num_heads", "all"),
        ("num_heads", "depth", "width"),
    ]
    assert tried[8:11] == [(), ("depth",), ("width",)]
    assert len(set(tried)) == len(tried) == 16
    assert len(list(attempts(found, 3))) == 3


def test_without_a_name_as_few_as_possible_change():
    found = candidates(Split("a", (4, 6), 0, torch.zeros(4)), {"n": 4, "width": 24, "m": 4}, 4)
    assert [some and some[0].attribute for some in attempts(found, 4)] == [(), "n", "m", "width"]


def test_numbers_are_set_all_or_none():
    model = nn.Sequential(Counting())
    renumber(model, {"0.num_heads": [4, 3], "0.head_dim": (6, 6)})
    assert model[0].num_heads == 3
    for wrong in ("0.flag", "0.none", "1.num_heads", "0.inner.in_feature"):
        with pytest.raises(CallError, match="of the model is"):
            renumber(model, {"0.num_heads": [3, 2], wrong: [1, 1]})
        assert model[0].num_heads == 3
    renumber(model[0], {"num_heads": [3, 2]})
    assert model[0].num_heads == 2
    assert renumbered(model) == "0"
    renumber(model, {"0.num_heads": [2, 4]})
    assert renumbered(model) is None
