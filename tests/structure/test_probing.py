"""Recording calls, and noticing who reads a layer's attributes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import NETS, case, sequential, untouched
from taut.core.example import Example
from taut.structure.probing import Probe, live_ranges, read_by_others, record_calls


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_recording_leaves_the_model_alone(name):
    model, value = case(name).make()
    example = Example(model, value)
    with untouched(model):
        calls, _ = record_calls(model, example)
        read_by_others(model, example, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n], [value])
    assert calls


def test_calls_are_in_order_with_shapes_of_first_tensors():
    model, value = case("shared").make()
    calls, _ = record_calls(model, Example(model, value))
    assert [(c.input, c.output) for c in calls["twice"]] == [((2, 16), (2, 16))] * 2
    assert [(c.input, c.output) for c in calls["conv"]] == [((2, 4, 4, 4), (2, 4, 4, 4))] * 2
    assert "unused" not in calls


def test_keyword_arguments_of_a_layer_are_seen():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    model = ByName()
    calls, _ = record_calls(model, Example(model, torch.randn(2, 4)))
    assert calls["fc"][0].input == (2, 4)


class Reader(nn.Module):
    """Reads one attribute of its layer."""

    def __init__(self, read):
        super().__init__()
        self.fc, self.other, self.read = nn.Linear(4, 4), nn.Linear(4, 4), read

    def forward(self, x):
        self.read(self.fc)
        return self.other(self.fc(x))


def looked(model):
    x = torch.randn(2, 4)
    return read_by_others(model, Example(model, x), ["fc", "other"], [x])


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda fc: fc.weight.norm(), "weight"),
        (lambda fc: fc.bias + 1, "bias"),
        (lambda fc: fc.weight[0], "weight"),
        (lambda fc: fc.weight.data.T.sum(), "weight"),
        (lambda fc: torch.ones(4) @ fc.weight.t(), "weight"),
        (lambda fc: torch.cat([fc.bias, fc.bias]), "bias"),
        (lambda fc: F.linear(torch.ones(4), fc.weight), "weight"),
        (lambda fc: fc.reset_parameters, "reset_parameters"),
    ],
)
def test_whoever_computes_with_an_attribute_is_noticed(read, name):
    used, answers = looked(Reader(read))
    assert used == {"fc": name}
    assert answers == {}


@pytest.mark.parametrize(
    ("read", "answers"),
    [
        (lambda fc: fc.in_features, {"in_features": 4}),
        (lambda fc: fc.weight.dtype, {"weight": (4, 4)}),
        (lambda fc: (fc.weight.data.T.shape, fc.weight.t().dtype), {"weight": (4, 4)}),
        (lambda fc: torch.ones(1).to(fc.weight), {"weight": (4, 4)}),
        (lambda fc: torch.zeros_like(fc.weight.data) + fc.weight.new_ones(4), {"weight": (4, 4)}),
        (lambda fc: fc.bias is None or fc.bias.device, {"bias": (4,)}),
        (lambda fc: isinstance(fc.weight, nn.Parameter) and fc.weight.size(0) + len(fc.weight), {"weight": (4, 4)}),
    ],
)
def test_whoever_asks_what_an_attribute_is_can_be_answered(read, answers):
    assert looked(Reader(read)) == ({}, {"fc": answers})


@pytest.mark.parametrize("harmless", [lambda fc: fc, lambda fc: fc.training, lambda fc: isinstance(fc, nn.Module)])
def test_harmless_uses_are_not_reading(harmless):
    model = Reader(harmless)
    assert looked(model) == ({}, {})


def test_code_that_checks_types_reports_nothing():
    def strict(fc):
        if not isinstance(fc, nn.Linear):
            raise TypeError("not a Linear")

    model = Reader(strict)
    assert looked(model) == ({}, {})


def test_probe_forwards_and_knows_missing_attributes():
    probe = Probe(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    assert torch.equal(probe(x), probe.inner(x))
    assert probe.read == set()
    with pytest.raises(AttributeError):
        _ = probe.nonsense
    assert probe.read == set()
    assert probe.out_features == 2
    assert probe.read == {"out_features"}


class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (2, 1, 0, 3)))


def test_live_ranges_marks_the_padding_of_the_model():
    model = Padding()
    rows, columns = live_ranges(model, Example(model, torch.randn(2, 1, 4, 5)), ["conv"])["conv"]
    assert rows.tolist() == [True] * 4 + [False] * 3
    assert columns.tolist() == [False] * 2 + [True] * 5 + [False]


def test_nothing_is_claimed_for_integer_inputs_or_models_that_fail_on_nan():
    model, value = case("keywords").make()
    assert live_ranges(model, Example(model, value), []) == {}

    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            if x.isnan().any():
                raise ValueError("NaN")
            return self.conv(x)

    model = Strict()
    assert live_ranges(model, Example(model, torch.randn(2, 1, 5)), ["conv"]) == {}


def test_constant_inputs_of_a_layer_are_not_padding():
    """Positions that do not depend on the input but are not zero are alive."""

    class Prefix(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.conv(torch.cat([torch.ones(len(x), 1, 2), x, torch.zeros(len(x), 1, 2)], 2))

    model = Prefix()
    (axis,) = live_ranges(model, Example(model, torch.randn(2, 1, 3)), ["conv"])["conv"]
    assert axis.tolist() == [True] * 5 + [False] * 2
    assert sequential(conv=model.conv).conv is model.conv
