"""What other code reads of a layer is answered by what takes its place, or the layer stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import taut
from taut.nn import Answering
from taut.structure.support import MULTIPLIED
from taut.types import Plan, Step


class Dense(nn.Module):
    """Reads something of its layers each time."""

    def __init__(self, read=None):
        super().__init__()
        self.wi, self.wo, self.read = nn.Linear(12, 24), nn.Linear(24, 12), read

    def forward(self, x):
        x = x if self.read is None else self.read(self, x)
        return self.wo(self.wi(x).relu())


class Convs(nn.Module):
    def __init__(self, read=None):
        super().__init__()
        self.wi, self.wo, self.read = (
            nn.Conv2d(3, 12, 3, padding=1, stride=2),
            nn.Conv2d(12, 12, 3, padding="same"),
            read,
        )

    def forward(self, x):
        x = x if self.read is None else self.read(self, x)
        return self.wo(self.wi(x).relu()).mean((2, 3))


def sizes(m, x):
    wo = m.wo
    return x * (wo.in_channels // wo.out_channels) * wo.kernel_size[0] / 3 * wo.dilation[0] * (wo.padding == "same")


READS = {
    "dtype": (Dense, lambda m, x: x.to(m.wo.weight.dtype)),
    "device": (Dense, lambda m, x: x.to(m.wo.weight.device)),
    "kind check": (Dense, lambda m, x: x if isinstance(m.wo.weight, torch.Tensor) else x * 0),
    "to": (Dense, lambda m, x: x.to(m.wo.weight).type_as(m.wo.bias)),
    "shape": (Dense, lambda m, x: x.view(-1, m.wo.weight.shape[0]) * (m.wo.weight.size(1) / 24)),
    "bias": (Dense, lambda m, x: x * 2 if m.wo.bias is None else x),
    "features": (Dense, lambda m, x: x.reshape(-1, m.wo.out_features) * (m.wo.in_features / 24)),
    "zeros": (Dense, lambda m, x: x + torch.zeros_like(m.wo.weight)[:, 0] + m.wo.weight.new_zeros(12)),
    "has": (Dense, lambda m, x: x if hasattr(m.wo, "weight") and not hasattr(m.wo, "qweight") else x * 0),
    "memory": (Dense, lambda m, x: x * m.wo.weight.is_contiguous() * (m.wo.weight.stride() == (24, 1))),
    "gradient": (Dense, lambda m, x: x if m.wo.weight.grad is None else x * 0),
    "settings": (Convs, sizes),
    "stride": (Convs, lambda m, x: x * (m.wo.stride == (1, 1)) * m.wo.groups),
}


def test_a_weight_that_lies_otherwise_in_memory_is_asked_itself():
    model = Convs(lambda m, x: x * m.wo.weight.is_contiguous() + x).eval().to(memory_format=torch.channels_last)
    assert "weight" in taut.trace(model, torch.randn(4, 3, 8, 8))["wo"].skip


@pytest.mark.parametrize("kind", READS)
def test_what_a_layer_is_can_be_answered(kind, tmp_path):
    torch.manual_seed(0)
    build, read = READS[kind]
    model = build(read).eval()
    x = torch.randn(4, 12) if build is Dense else torch.randn(4, 3, 8, 8)
    net = taut.trace(model, x)
    assert net["wo"].skip is None
    plan = Plan.of(net, [Step(("wo",), "svd", {"rank": 3}), Step(("wi",), "svd", {"rank": 2})])
    small = taut.apply(model, Plan.from_json(plan.to_json()), taut.observe(net, model, [x]), [x])
    assert isinstance(small.wo, Answering)
    assert type(small.wi) is nn.Sequential  # nobody asks
    wanted = small(x)
    assert torch.equal(copy.deepcopy(small)(x), wanted)
    taut.save(small, plan, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", lambda: build(read))
    assert torch.equal(loaded(x), wanted)
    wanted.sum().backward()
    assert small.wo[0].weight.grad is not None
    if kind in {"dtype", "to"}:
        assert small.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: x + m.wo.weight.norm(),
        lambda m, x: x + m.wo.weight[0, 0],
        lambda m, x: x * m.wo.weight.data_ptr() * 0 + x,
        lambda m, x: x + m.wo.weight.detach().numpy().sum(),
        lambda m, x: F.linear(x, m.wo.weight.t()[:12]),
    ],
)
def test_whose_values_are_used_stays(read):
    net = taut.trace(Dense(read).eval(), torch.randn(4, 12))
    assert "computes with it" in net["wo"].skip
    assert net["wi"].skip is None


def test_whose_bias_alone_is_used_becomes_a_layer():
    model, x = Dense(lambda m, x: x + m.wo.bias).eval(), torch.randn(4, 12)
    assert taut.trace(model, x)["wo"].skip == MULTIPLIED
    small = taut.compress(model, x, budget={"params": 0.8}, data=[torch.randn(64, 12)]).model
    assert small(x).shape == model(x).shape


def test_a_path_of_the_data_alone_is_answered_too():
    def read(m, x):
        return x.to(m.wo.weight.dtype) if len(x) > 4 else x

    model = Dense(read).eval()
    net = taut.trace(model, torch.randn(4, 12), [torch.randn(6, 12)])
    assert net["wo"].answers == {"weight": (12, 24)}
    small = taut.apply(model, Plan.of(net, [Step(("wo",), "svd", {"rank": 2})]), taut.observe(net, model))
    assert small(torch.randn(6, 12)).shape == (6, 12)


def test_values_that_are_gone_are_an_error_in_words():
    asked = Answering(nn.Linear(4, 2), nn.Linear(2, 3), answers={"weight": (3, 4), "in_features": 4, "bias": None})
    assert (asked.in_features, asked.bias, asked.weight.shape, asked.weight.ndim) == (4, None, (3, 4), 2)
    with pytest.raises(TypeError, match="replaced by taut and has no dense weight"):
        torch.linalg.norm(asked.weight)
    with pytest.raises(AttributeError, match="no dense weight"):
        asked.weight.norm()
    with pytest.raises(AttributeError, match="out_features"):
        _ = asked.out_features


def test_plans_without_answers_are_written_as_before():
    model = Dense().eval()
    net = taut.trace(model, torch.randn(4, 12))
    assert "answers" not in Plan.of(net, [Step(("wo",), "svd", {"rank": 2})]).to_json()
