"""Sizes against files that safetensors really writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from taut.errors import ModelError
from taut.measure import file_bytes, stored_tensors
from taut.measure.storage import DTYPES


def make(dtype, shape):
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.zeros(count * size, dtype=torch.uint8).view(dtype).reshape(shape)


def test_every_dtype_in_one_file():
    tensors = {f"layer.{i}.{dtype}": make(dtype, (i + 1, 3)) for i, dtype in enumerate(reversed(DTYPES))}
    assert file_bytes(tensors) == len(save(tensors))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@settings(max_examples=60)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES)), shapes), max_size=6),
    st.none() | st.dictionaries(names, names, max_size=3),
)
def test_any_file(layout, metadata):
    layout.pop("__metadata__", None)
    tensors = {name: make(dtype, shape) for name, (dtype, shape) in layout.items()}
    assert file_bytes(tensors, metadata) == len(save(tensors, metadata))


@pytest.mark.parametrize("tensors", [{}, {"x": torch.tensor(1.0)}, {"x": torch.empty(0)}, {'é\n"\\': torch.ones(3)}])
def test_corners(tensors):
    assert file_bytes(tensors) == len(save(tensors))
    assert file_bytes(tensors, {}) == len(save(tensors, {}))


def test_a_dtype_that_the_format_lacks():
    with pytest.raises(ModelError, match=r"'w' is torch\.complex128"):
        file_bytes({"w": torch.zeros(2, dtype=torch.complex128)})


def test_tied_parameters_and_buffers_are_stored_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    model.register_buffer("mean", model[2].running_mean)
    model.register_buffer("alias", model[2].running_var.view(5))
    tensors, ties = stored_tensors(model)
    # the model's own buffers come before those of its children
    assert ties == {"1.weight": "0.weight", "2.running_mean": "mean", "2.running_var": "alias"}
    assert set(tensors) | set(ties) == set(model.state_dict())
    assert file_bytes(tensors) == len(save(tensors))
    assert not any(t.requires_grad for t in tensors.values())


def test_equal_values_are_not_ties():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight.data.copy_(model[0].weight.data)
    assert stored_tensors(model)[1] == {}


def test_views_and_memory_formats_become_plain_tensors():
    model = nn.Sequential(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    whole = torch.arange(12.0).reshape(3, 4)
    model.register_buffer("whole", whole)
    model.register_buffer("turned", whole.t())
    model.register_buffer("square", whole[:, :3])
    model.register_buffer("square_turned", whole[:, :3].t())
    model.register_buffer("rows", whole[:2])
    model.register_buffer("wide", torch.ones(1, 3).expand(2, 3))
    model.register_buffer("conj", torch.tensor([1 + 2j], dtype=torch.complex64).conj())
    tensors, ties = stored_tensors(model)
    assert ties == {}
    back = load(save(tensors))
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    assert file_bytes(tensors) == len(save(tensors))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_several_empty_buffers_are_not_ties():
    model = nn.Module()
    model.register_buffer("a", torch.empty(0))
    model.register_buffer("b", torch.empty(0))
    tensors, ties = stored_tensors(model)
    assert set(tensors) == {"a", "b"}
    assert ties == {}


def test_state_that_is_no_tensor_is_named():
    class Counter(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(ModelError, match=r"'0\._extra_state' is a dict"):
        stored_tensors(nn.Sequential(Counter(2, 2)))


def test_sparse_and_lazy_state_is_named():
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(ModelError, match="'mask' is a sparse_coo tensor"):
        stored_tensors(model)
    with pytest.raises(ModelError, match="'weight' is not initialized"):
        stored_tensors(nn.LazyLinear(3))
