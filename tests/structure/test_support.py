"""Which modules are rewritten, and the reasons in words."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from taut.structure.support import NORMS, OTHERS, base_kind, refusal


class Plain(nn.Linear):
    """A subclass that computes the same."""

    def extra_repr(self):
        return "plain"


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OtherInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv3d(3, 2, 1), Plain(3, 2)], ids=repr
)
def test_layers_of_torch_and_faithful_subclasses_are_taken(layer):
    assert refusal(layer) is None
    assert base_kind(layer) in {"Linear", "Conv1d", "Conv2d", "Conv3d"}


class OtherAround(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("layer", "what"),
    [(Other(3, 2), "forward"), (OtherInside(3, 2, 1), "_conv_forward"), (OtherAround(3, 2), "__call__")],
    ids=repr,
)
def test_subclasses_that_compute_something_else_are_not(layer, what):
    assert refusal(layer) == f"{type(layer).__name__} overrides {what}: it may compute something else"
    assert base_kind(layer) == type(layer).__name__


def test_a_forward_set_on_the_object_counts_as_overridden():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    assert "overrides forward" in refusal(layer)


def test_a_subclass_named_as_its_base_counts_as_overridden():
    """Adapter libraries call theirs Linear too."""
    layer = type("Linear", (Other,), {})(3, 3)
    assert "overrides forward" in refusal(layer)


def test_linear_inside_attention_is_a_faithful_subclass():
    assert refusal(nn.MultiheadAttention(4, 2).out_proj) is None  # its use refuses it, not its kind


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ConvTranspose2d(3, 2, 2), "transposed"),
        (nn.Embedding(3, 2), "table"),
        (nn.EmbeddingBag(3, 2), "table"),
        (nn.LSTM(3, 2), "recurrent"),
        (nn.GRUCell(3, 2), "recurrent"),
        (nn.MultiheadAttention(4, 2), "packed"),
        (nn.Bilinear(3, 2, 2), "bilinear"),
        (nn.PReLU(), "activation"),
        (nn.BatchNorm2d(3), "normalization"),
        (nn.LayerNorm(3), "normalization"),
        (nn.GroupNorm(1, 3), "normalization"),
        (nn.InstanceNorm1d(3, affine=True), "normalization"),
        (parametrizations.weight_norm(nn.Linear(3, 2)), "parametrization"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_reasons(layer, words):
    assert words in refusal(layer)


def test_computed_and_empty_weights():
    layer = nn.Linear(3, 2)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert "make it permanent first" in refusal(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "complex64" in refusal(nn.Linear(3, 2).to(torch.complex64))
        assert "make it permanent first" in refusal(nn.utils.weight_norm(nn.Linear(3, 2)))
        assert refusal(nn.Linear(0, 2)) == "its weight is empty"


def test_unknown_modules_are_named():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    assert refusal(Mine()) == "modules of type Mine are not handled"


def test_every_reason_is_a_sentence_of_words():
    assert all(len(reason.split()) >= 3 for reason in OTHERS.values())
    assert nn.LayerNorm in NORMS
