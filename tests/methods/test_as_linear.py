"""Layers that compute a matrix product in their own way, and those that only seem to."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import taut
from cases import InputsFirst, own_linear
from taut.structure import own_forms
from taut.structure.linear_form import ROWS_AT_ONCE, any_form, computed_linear, transposed_in
from taut.structure.support import LINEAR
from taut.types import Plan, Step


def overriding(forward):
    return type("Own", (nn.Linear,), {"forward": forward})


def noted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return functional.linear(x, self.weight, self.bias) * self.calls


LINEARS = {
    "inputs first": (lambda: InputsFirst(6, 4), True),
    "inputs first, square": (lambda: InputsFirst(5, 5), True),
    "a subclass": (lambda: overriding(lambda self, x: x @ self.weight.T + self.bias)(6, 4), False),
    "without a bias": (lambda: overriding(lambda self, x: x @ self.weight.T)(6, 4, bias=False), False),
    "matrices alone": (lambda: overriding(lambda self, x: torch.addmm(self.bias, x, self.weight.t()))(6, 4), False),
}

OTHERS = {
    "scaled": lambda self, x: functional.linear(x, self.weight, self.bias) * 2,
    "without its bias": lambda self, x: functional.linear(x, self.weight),
    "rounded": lambda self, x: functional.linear((x * 8).round() / 8, self.weight, self.bias),
    "clipped far out": lambda self, x: functional.linear(x, self.weight, self.bias).clamp(-20, 20),
    "dropped in training": lambda self, x: functional.dropout(
        functional.linear(x, self.weight, self.bias), 0.5, self.training
    ),
    "with a state": noted,
    "a pair": lambda self, x: (functional.linear(x, self.weight, self.bias), x),
    "in single precision": lambda self, x: functional.linear(x.float(), self.weight.float(), self.bias.float()),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_are_known_by_what_they_compute(name):
    make, transposed = LINEARS[name]
    torch.manual_seed(0)
    assert transposed_in(make()) is transposed


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_none(name):
    torch.manual_seed(0)
    assert transposed_in(overriding(OTHERS[name])(6, 4)) is None


class Added(nn.Linear):
    """Adds a product of two thin matrices to its weight."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.down, self.up = nn.Parameter(torch.randn(2, self.in_features)), nn.Linear(2, self.out_features)

    def forward(self, x):
        return super().forward(x) + self.up(x @ self.down.T)


COMPUTED = {
    "standardized": lambda: overriding(
        lambda self, x: functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)
    )(6, 4),
    "scaled": lambda: overriding(OTHERS["scaled"])(6, 4),
    "without its bias": lambda: overriding(OTHERS["without its bias"])(6, 4),
    "rounded weights": lambda: overriding(
        lambda self, x: functional.linear(x, (self.weight * 8).round() / 8, self.bias)
    )(6, 4),
    "with an addition": lambda: Added(6, 4, bias=False),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_become_plain_ones(name, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(COMPUTED[name]()).eval(), torch.randn(5, 6)
    net = taut.trace(model, x)
    assert net["0"].skip == LINEAR
    plan = Plan.of(net, [Step(("0",), "as_linear")])
    small = taut.apply(model, plan, taut.observe(net, model))
    assert type(small[0]) is nn.Linear
    torch.testing.assert_close(small(3 * x), model(3 * x), rtol=1e-5, atol=1e-5)
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: nn.Sequential(COMPUTED[name]()))
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"scaled", "without its bias"}))
def test_what_is_not_linear_stays(name):
    torch.manual_seed(0)
    assert any_form(overriding(OTHERS[name])(6, 4)) is None


def test_tables_and_layers_with_more_than_a_weight_are_none():
    assert transposed_in(nn.Embedding(6, 4)) is None
    assert transposed_in(nn.LSTM(6, 4)) is None
    assert transposed_in(nn.Sequential(nn.Linear(6, 4))) is None


@pytest.mark.parametrize("methods", [("svd",), ("channels",)])
def test_compress_does_it_first_and_load_again(methods, tmp_path):
    torch.manual_seed(0)
    model, x = own_linear().eval(), torch.randn(64, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = taut.compress(model, x, budget=taut.Budget(macs=0.6), data=[x], methods=methods, compare=False)
    assert [step.method for step in result.plan.steps][:2] == ["as_linear", "as_linear"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.turned) is InputsFirst
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=own_linear)(x), result.model(x))


def test_a_step_alone_changes_nothing():
    model, x = own_linear().eval(), torch.randn(4, 16)
    net = taut.trace(model, x)
    assert net["square"].skip == LINEAR
    small = taut.apply(model, Plan.of(net, [Step(("square",), "as_linear")]), taut.observe(net, model))
    assert type(small.square) is nn.Linear
    torch.testing.assert_close(small(x), model(x))


def test_a_layer_of_which_more_is_asked_stays():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = InputsFirst(6, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.first(x)) / self.first.width

    torch.manual_seed(0)
    model, x = Reading().eval(), torch.randn(32, 6)
    with pytest.warns(UserWarning, match="'first' is left as it was.*'width'"):
        result = taut.compress(model, x, budget=taut.Budget(macs=0.9), data=[x], compare=False)
    assert type(result.model.first) is InputsFirst
    assert result.model(x).shape == model(x).shape
    assert ["'width'" in kept.reason for kept in result.plan.kept if kept.layer == "first"] == [True]
    with pytest.warns(UserWarning, match="'first' is left"), pytest.raises(taut.BudgetError) as caught:
        taut.compress(model, x, budget=taut.Budget(macs=0.01), data=[x], compare=False)
    assert "taut.compress puts" not in str(caught.value)
    assert "'width'" in str(caught.value)
    with pytest.warns(UserWarning, match="'first' is left"):
        (reach,) = [reach for reach in taut.inspect(model, x).layers if reach.layer.name == "first"]
    assert "'width'" in reach.blocked
    assert "an attribute that it reads" in reach.remedy


def test_inspect_counts_what_it_becomes():
    seen = taut.inspect(own_linear().eval(), torch.randn(2, 16))
    assert seen.share("low rank", "macs") == 1
    assert "as_linear first" in str(seen)
    assert not taut.inspect(nn.Sequential(nn.Linear(16, 12)).eval(), torch.randn(2, 16)).layers[0].plain_form


def test_what_is_not_linear_is_found_out_by_a_few_rows():
    rows = 0

    def squared(self, x):
        nonlocal rows
        rows += x.numel() // x.shape[-1]
        return functional.linear(x, self.weight) ** 2

    assert computed_linear(overriding(squared)(600, 4)) is None
    assert 0 < rows < 600 // 10


def test_a_wide_weight_is_read_off_part_by_part():
    torch.manual_seed(0)
    layer = overriding(OTHERS["scaled"])(ROWS_AT_ONCE + 7, 3)
    linear = computed_linear(layer)
    torch.testing.assert_close(linear.weight, 2 * layer.weight)
    torch.testing.assert_close(linear.bias, 2 * layer.bias)


@pytest.mark.parametrize("make", [LINEARS["inputs first"][0], COMPUTED["standardized"]])
def test_a_form_is_shown_once(make, monkeypatch):
    shown = []
    monkeypatch.setattr(own_forms, "any_form", lambda module: shown.append(module) or any_form(module))
    net = taut.trace(nn.Sequential(make()).eval(), torch.randn(2, 5, 6), [torch.randn(2, 7, 6)])
    assert net["0"].skip == LINEAR
    assert len(shown) == 1
    layer = copy.deepcopy(make()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(net.forms["0"].of(layer)(x), layer(x))
