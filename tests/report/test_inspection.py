"""`taut inspect`: what can be done to every layer, what stands in the way, and a remedy for every reason."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import taut
from taut.report.remedies import UNKNOWN, remedy
from taut.structure import products, support, tracing
from taut.structure.channels import groups, layer_rules, op_calls, runs
from taut.structure.rules import UNIT

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Something of everything: what can be done, and what stands in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 1, groups=16)
        self.head = nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.ones(10, 10))
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.depthwise(self.second(x).relu()).mean((2, 3))) @ self.scale.softmax(-1)


@pytest.fixture(scope="module")
def found() -> taut.Inspection:
    return taut.inspect(Net().eval(), X)


def test_every_layer_says_what_can_be_done(found: taut.Inspection) -> None:
    reaches = {reach.layer.name: reach for reach in found.layers}
    assert reaches["first"].default == ("svd", "spatial", "tucker")
    assert reaches["first"].outputs == (16, 16)
    assert reaches["second"].inputs == (16, 16)
    assert {"cp", "monochromatic"} <= set(reaches["second"].named)
    assert set(reaches["head"].masks) == {"magnitude", "mfbp", "obs"}
    assert reaches["depthwise"].default == ()
    assert "leaves nothing to factorize" in str(reaches["depthwise"].blocked)
    assert reaches["depthwise"].narrows
    assert "never called" in str(reaches["spare"].blocked)
    assert "fixed width in 'mm'" in str(reaches["head"].pinned)
    assert reaches[""].remedy is not None
    assert all((reach.blocked is None) == bool(reach.default) for reach in found.layers)


def test_the_shares_within_reach(found: taut.Inspection) -> None:
    layers = {reach.layer.name: reach.layer for reach in found.layers}
    cost = found.network.cost
    dense = sum(layers[name].macs for name in ("first", "second", "head"))
    assert found.share("low rank", "macs") == dense / cost.macs
    channels = sum(layers[name].params for name in ("first", "norm", "second", "depthwise", "head"))
    assert found.share("channels", "params") == channels / cost.params
    assert found.share("either", "macs") == (dense + layers["depthwise"].macs) / cost.macs
    assert layers[""].macs == 100  # of its own product, not of the whole
    assert sum(layer.macs for layer in layers.values()) == cost.macs


def test_it_is_printed_with_remedies(found: taut.Inspection) -> None:
    text = str(found)
    for word in ("svd, spatial, tucker, channels (16 of 16 out)", "within reach", "by channels", "by masks", "(model)"):
        assert word in text
    assert text.count("    -> ") == len({r for reach in found.layers for r in (reach.blocked, reach.pinned) if r})


def test_long_networks_have_a_row_for_layers_alike() -> None:
    model = nn.Sequential(*(part for _ in range(50) for part in (nn.Linear(16, 16), nn.ReLU()))).eval()
    text = str(taut.inspect(model, torch.randn(2, 16)))
    assert "48 layers, 2 ... 96" in text
    assert len(text.splitlines()) < 30


def test_json_is_for_programs(found: taut.Inspection) -> None:
    items = json.loads(found.to_json())
    assert items["within_reach"]["low_rank"]["macs"] == found.share("low rank", "macs")
    assert [layer["name"] for layer in items["layers"]] == [reach.layer.name for reach in found.layers]
    assert all(layer["remedy"] for layer in items["layers"] if layer["blocked"])


REASONS = [
    *support.OTHERS.values(),
    *support.UNFACTORIZED,
    UNIT,
    tracing.FUSED,
    tracing._read("a", "weight"),
    tracing._read("a", "stride"),
    "other code asks what kind of layer 'a' is, or calls it from another place than its own: with a replacement the "
    "model computes something else",
    "it is called with keyword arguments",
    "the model itself is this layer: wrap it in a torch.nn.Sequential",
    "its weight is shared with 'b'",
    support.TABLE_READ.format(name="a"),
    support.SHARED_WITH_OTHERS.format(name="a", kind="EmbeddingBag"),
    support.SIZED,
    "it has groups",
    products.NEEDED.format(name="mean"),
    "'b', which holds its weight, is kept as asked",
    "50% of 'b', which holds its weight, has to stay, as asked",
    "it is never called on the example (other code may use its weight directly)",
    "its output on the example is empty",
    "a mask holds its weight: taut.nn.bake the model first",
    support.COMPUTED,
    support.LINEAR,
    support.CONVOLUTION,
    "a parametrization computes something of it: remove_parametrizations first",
    "its weight is no parameter, but computed by other code: make it one first",
    "StdConv2d overrides forward: it may compute something else",
    "weights of type int8 are not handled",
    "its weight is empty",
    "modules of type Scale are not handled",
    "Embedding is not factorized",
    op_calls.MIXES,
    op_calls.FIXED,
    op_calls.PLACES,
    op_calls.BROADCAST,
    layer_rules.APART,
    layer_rules.TOGETHER,
    runs.OUTPUT,
    groups.UNREAD,
    groups.ALONE,
    "'a' shares a parameter with another layer",
    "other code uses a parameter of 'a'",
    "'a' also reads an input of fixed width",
    "they are read by 'a', a GRU, which is not made narrower",
    "the model returns no tensor that could be compared",
    "the example does not reach 'a', which may read any channels: remove them, or give an input that does",
]


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_remedy(reason: str) -> None:
    assert remedy(reason) != UNKNOWN


@pytest.mark.parametrize("name", ["normalization", "bilinear_rnn", "overrides", "parametrization"])
def test_the_names_of_layers_say_nothing(name: str) -> None:
    assert remedy(tracing._read(name, "stride")) == remedy(tracing._read("a", "stride"))
