"""Layers that code reaches, asks or calls in unusual ways; models without gradients; marks among the numbers."""

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut import Budget, BudgetError
from taut.nn import Product
from taut.structure.support import MULTIPLIED
from taut.types import Plan

# Layers that are reached in other ways than by their place in the model.


def planted(outputs=64, inputs=64, rank=8):
    return torch.randn(outputs, rank) @ torch.randn(rank, inputs) * (2 / inputs / rank) ** 0.5


class Three(nn.Module):
    """Three layers of which the first two lose nothing at rank 8."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.a.weight.data, self.b.weight.data = planted(), planted()
        self.settle()

    def settle(self):
        """What a subclass keeps beside."""

    def forward(self, x):
        return self.c(self.b(self.first(x).relu()).relu())

    def first(self, x):
        return self.a(x)


class InList(Three):
    def settle(self):
        self.order = [self.a]

    def first(self, x):
        return self.order[0](x)


class InObject(Three):
    def settle(self):
        self.context = SimpleNamespace(layers={"a": self.a})

    def first(self, x):
        return self.context.layers["a"](x)


class InPartial(Three):
    def settle(self):
        self.call = (partial(self.a),)

    def first(self, x):
        return self.call[0](x)


class Doubling(nn.Linear):
    """Does more than its forward."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Doubled(Three):
    def settle(self):
        weight = self.a.weight
        self.a = Doubling(64, 64)
        self.a.weight = weight


class AsArray(Three):
    """Gives no tensor."""

    def forward(self, x):
        return (super().forward(x) * (10.0 if type(self.a) is nn.Linear else 1.0)).detach().numpy()


class AsNumbers(Three):
    def forward(self, x):
        return [
            {"score": float(score)} for score in super().forward(x).max(1)[0] * (9 if type(self.a) is nn.Linear else 1)
        ]


class ByValue(Three):
    """Asks for the kind where a value says so: no other operation tells of it."""

    def forward(self, x):
        gain = 10.0 if x[0, 0].item() > 2 and type(self.a) is nn.Linear else 1.0
        return self.c(self.b(self.a(x).relu() * gain).relu())


def flat(output):
    """All numbers of an output."""
    if isinstance(output, list):
        return torch.tensor([list(item.values()) for item in output])
    return torch.as_tensor(output)


@pytest.mark.parametrize("kind", [InList, InObject, InPartial, Doubled, AsArray, AsNumbers, ByValue])
@pytest.mark.parametrize("methods", [None, ("channels",)], ids=["default", "channels"])
def test_layers_that_are_reached_in_other_ways_compute_the_same(kind, methods, tmp_path):
    torch.manual_seed(7)
    model = kind().eval()
    batches = list(torch.randn(40, 8, 64))
    for x in batches[20:25]:
        x[0, 0] = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = taut.compress(model, batches[0], budget=Budget(params=0.75), data=batches, methods=methods)
        except BudgetError as error:
            result = error.best
    result.save(tmp_path / "small")
    torch.manual_seed(1)
    loaded = taut.load(tmp_path / "small", base=kind)
    limit = 1e-3 if methods is None else 0.5
    for small in (result.model, loaded):
        for x in (batches[0], batches[22]):
            wanted, found = flat(model(x)), flat(small(x))
            assert float((wanted - found).norm() / wanted.norm()) < limit
    if kind is not ByValue or methods is None:
        assert "a" not in {layer for step in result.plan.steps for layer in step.layers if step.method != "channels"}


class TrainsOtherwise(Three):
    """Reads a weight in train mode alone."""

    def first(self, x):
        return nn.functional.linear(x, self.a.weight, self.a.bias) if self.training else self.a(x)


class KeepsMean(Three):
    """Holds a buffer as wide as a layer in train mode alone."""

    def settle(self):
        self.register_buffer("mean", torch.zeros(64))

    def first(self, x):
        y = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return y


def test_what_is_multiplied_by_in_train_mode_alone_is_a_layer_there_too():
    model, x = TrainsOtherwise().eval(), torch.randn(64, 64)
    net = taut.trace(model, x[:4])
    assert net["a"].skip == MULTIPLIED
    assert net["c"].skip is None
    small = taut.compress(model, x[:4], budget={"params": 0.4}, data=[x]).model
    assert isinstance(small.a.weight, Product)
    torch.testing.assert_close(small(x), small.train()(x))


def test_a_result_that_no_longer_trains_is_announced():
    model, x = KeepsMean().eval(), torch.randn(64, 64)
    net = taut.trace(model, x[:4])
    stats = taut.observe(net, model, [x])
    plan = Plan((taut.whole(net, "channels", sparsity=0.5),))
    with pytest.warns(UserWarning, match="works in eval mode alone. In train mode .*must match"):
        small = taut.apply(model, plan, stats)
    assert small(x).shape == (64, 5)


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.a, self.b, self.c, self.end = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 6), scale

    def forward(self, x):
        return self.end(self.c(self.b(self.a(x).relu()).relu()))


def decoded(y):
    y = y.sigmoid()
    y[:, :2] = y[:, :2] * 2 - 0.5
    return y


ENDS = {
    "in place": decoded,
    "numpy": lambda y: torch.from_numpy(y.cpu().numpy() * 2),
    "out": lambda y: torch.mul(y, 2, out=torch.empty_like(y)),
}


@pytest.mark.parametrize("end", ENDS)
def test_models_that_no_gradient_goes_through_are_measured_by_their_data(end):
    model, x = Scaled(ENDS[end]).eval(), torch.randn(128, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = taut.compress(model, x[:8], budget=Budget(params=0.5), data=[x])
    assert any("No gradient can be taken" in str(w.message) for w in caught)
    assert result.comparison.after.params <= result.comparison.before.params // 2
    with torch.no_grad():
        assert result.model(x).shape == (128, 6)


def test_a_forward_in_inference_mode_is_observed():
    class Inferring(Scaled):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    model, x = Inferring(nn.Identity()).eval(), torch.randn(128, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = taut.compress(model, x[:8], budget=Budget(params=0.5), data=[x])
    assert result.model(x).shape == (128, 6)


# Marks among the numbers of an input.


@pytest.mark.parametrize("mark", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_masks_of_floats_are_no_reason_to_refuse(mark):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

        def forward(self, x, mask):
            return self.layer(x, src_mask=mask)

    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), mark)
    net = taut.trace(Masked().eval(), (torch.randn(4, 9, 32), mask))
    assert net.example.divisible
    assert all(bool(torch.isfinite(t).any()) for t in net.example.witnesses[1])


def test_missing_values_are_no_reason_to_refuse():
    class Filling(Three):
        def forward(self, x):
            gone = x.isnan().all(1, keepdim=True)
            return torch.where(gone, float("nan"), super().forward(x.nan_to_num()))

    x = torch.randn(8, 64)
    x[::2, 3] = float("nan")
    x[1] = float("nan")
    assert taut.trace(Filling().eval(), x)["a"].skip is None


# Numbers of every kind among outputs and inputs.


@pytest.mark.parametrize(
    "beside",
    [
        2**70,
        np.longdouble(1.5),
        np.zeros(3, np.longdouble),
        np.float32(2),
        np.zeros(3, np.uint16),
        np.array(["a"]),
        "a",
    ],
    ids=repr,
)
def test_whatever_an_output_holds_beside_its_tensors(beside):
    class Beside(Three):
        def forward(self, x):
            return super().forward(x), beside

    model, x = Beside().eval(), torch.randn(32, 64)
    result = taut.compress(model, x[:8], budget=Budget(params=0.5), data=[x])
    assert type(result.model(x)[1]) is type(beside)
    assert result.comparison.after.params <= result.comparison.before.params // 2


def test_inputs_of_eight_bits_are_traced():
    class Widening(Three):
        def forward(self, x):
            return super().forward(x.float())

    assert taut.trace(Widening().eval(), torch.randn(8, 64).to(torch.float8_e4m3fn))["a"].skip is None


def test_sparse_inputs_are_traced():
    class Sparse(Three):
        def forward(self, x):
            return super().forward(torch.sparse.mm(x, torch.eye(64)))

    assert taut.trace(Sparse().eval(), torch.randn(8, 64).relu().to_sparse())["a"].skip is None
