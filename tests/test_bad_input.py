"""What goes wrong at people's desks: each a clear error or handled, and the model unharmed."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import taut
from cases import case, run, state, untouched
from taut import Budget, BudgetError, CallError, DataError, ModelError, TautError

HALF = Budget(macs=0.5)


@pytest.fixture
def vgg():
    return case("vgg").make()


@pytest.fixture
def batches():
    return case("vgg").data()


# Weights.


@pytest.mark.parametrize(("value", "count"), [(math.nan, 1), (math.inf, 3), (-math.inf, 7)])
@pytest.mark.parametrize("name", ["conv2.weight", "fc.bias", "norm1.weight"])
def test_weights_that_are_not_finite(vgg, batches, name, value, count):
    model, example = vgg
    with torch.no_grad():
        model.get_parameter(name).view(-1)[:count] = value
    message = rf"'{name}' holds {count} NaN or Inf"
    with untouched(model), pytest.raises(ModelError, match=message):
        taut.trace(model, example)
    with untouched(model), pytest.raises(ModelError, match=message):
        taut.compress(model, example, budget=HALF, data=batches)


def test_weights_that_are_not_finite_in_a_layer_that_is_skipped():
    model, example = case("lstm").make()
    with torch.no_grad():
        model.body.weight_hh_l0[0, :2] = math.nan
    with untouched(model), pytest.raises(ModelError, match=r"'body.weight_hh_l0' holds 2 NaN or Inf of 1024 values"):
        taut.compress(model, example, budget=HALF)


def test_lazy_modules_are_not_initialized_behind_the_users_back():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match=r"'0\.\w+' is not initialized"):
        taut.trace(model, torch.randn(2, 4))
    assert isinstance(model[0], nn.LazyLinear)


def test_quantized_modules_are_skipped_or_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(OrderedDict(first=nn.Linear(32, 32), act=nn.ReLU(), second=nn.Linear(32, 8))).eval()
        model = torch.ao.quantization.quantize_dynamic(model, {"first"}, dtype=torch.qint8)
    example = torch.randn(2, 32)
    before = model(example)
    try:
        result = taut.compress(model, example, budget=Budget(params=0.9), data=[torch.randn(8, 32)])
        assert result.model(example).shape == before.shape
    except TautError as error:
        assert len(str(error).split()) > 4  # noqa: PT017 - either outcome is right, silence is not
    assert torch.equal(model(example), before)


def test_model_that_is_one_layer():
    model, example = nn.Linear(16, 16), torch.randn(2, 16)
    net = taut.trace(model, example)
    assert "wrap it" in net[""].skip
    with untouched(model), pytest.raises(BudgetError):
        taut.compress(model, example, budget=HALF)


def test_model_without_parameters():
    model, example = nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 4)
    with untouched(model):
        result = taut.compress(model, example, budget=Budget(params=1.0))
    assert torch.equal(run(result.model, torch.ones(2, 4))[0], torch.ones(2, 4))


def test_scripted_model_is_handled_or_refused():
    plain, example = case("mlp").make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(plain)
    before = model(example)
    try:
        taut.compress(model, example, budget=Budget(params=0.9))
    except TautError as error:
        assert len(str(error).split()) > 4  # noqa: PT017 - either outcome is right, silence is not
    assert torch.equal(model(example), before)


# Calls.


@pytest.mark.parametrize("key", ["speed", "flops", "drops"])
def test_unknown_budget_key(key):
    with pytest.raises((CallError, TypeError), match=key):
        Budget(**{key: 0.5})
    with pytest.raises(CallError, match=f"Unknown budget key '{key}'. Known: params, macs, bytes, latency, drop"):
        Budget.parse(f"{key}=0.5")


@pytest.mark.parametrize("key", ["params", "macs", "bytes", "latency"])
@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, -0.1, math.nan, math.inf, True, "half"])
def test_budget_value_out_of_range(key, value):
    with pytest.raises(CallError, match=f"The budget '{key}'"):
        Budget(**{key: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1%"])
def test_drop_out_of_range(value):
    with pytest.raises(CallError, match="The budget 'drop'"):
        Budget(drop=value)


@pytest.mark.parametrize("budget", [0.5, None, "0.5", ["macs=0.5"]])
def test_budget_of_the_wrong_type(vgg, budget):
    with untouched(vgg[0]), pytest.raises(CallError, match=r"taut\.Budget"):
        taut.compress(*vgg, budget=budget)


def test_budget_without_a_key():
    with pytest.raises(CallError, match="at least one"):
        Budget()


def test_drop_needs_evaluate(vgg, batches):
    with untouched(vgg[0]), pytest.raises(CallError, match="evaluate"):
        taut.compress(*vgg, budget=Budget(drop=0.01), data=batches)
    net = taut.trace(*vgg)
    with pytest.raises(CallError, match="drop"):
        taut.plan(net, taut.observe(net, vgg[0]), Budget(drop=0.01))


@pytest.mark.parametrize("methods", [["no_such_method"], "no_such_method", []])
def test_unknown_methods(vgg, methods):
    with untouched(vgg[0]), pytest.raises(CallError, match=r"Known: .*svd"):
        taut.compress(*vgg, budget=HALF, methods=methods)


def test_model_and_example_exchanged(vgg):
    model, example = vgg
    with pytest.raises(TautError, match=r"torch\.nn\.Module"):
        taut.trace(example, model)
    with untouched(model), pytest.raises(TautError, match=r"torch\.nn\.Module"):
        taut.compress(example, model, budget=HALF)


def test_statistics_of_another_model(vgg):
    net = taut.trace(*case("mlp").make())
    with untouched(vgg[0]), pytest.raises(CallError, match="another model"):
        taut.observe(net, vgg[0])


# Budgets that cannot be met.


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
@pytest.mark.parametrize("budget", [Budget(macs=2), Budget(params=0.001), Budget(bytes=100, macs=0.5)])
def test_budget_that_cannot_be_met(vgg, batches, budget, data, tmp_path):
    model, example = vgg
    with untouched(model), pytest.raises(BudgetError, match="No plan meets the budget") as caught:
        taut.compress(model, example, budget=budget, data=batches if data else None, evaluate=lambda _: 0.5)
    best = caught.value.best
    assert isinstance(best, taut.Result)
    assert best.comparison.after.params <= best.comparison.before.params
    assert data == bool(best.plan.steps)  # without data any change harms weights that nobody trained
    assert best.comparison.score_after.value == 0.5
    assert all(bool(t.isfinite().all()) for t in run(best.model, example))
    best.save(tmp_path / "best")
    assert (tmp_path / "best" / "model.safetensors").stat().st_size > 0


def test_plan_that_cannot_meet_its_budget(vgg):
    net = taut.trace(*vgg)
    with pytest.raises(BudgetError, match=r"macs <= \d.*reach"):
        taut.plan(net, taut.observe(net, vgg[0]), Budget(macs=10))


def test_drop_that_nothing_meets_returns_the_original(vgg, batches):
    """A metric that any change lowers: the unchanged model is the right answer."""
    model, example = vgg
    original = run(model, example)[0]

    def evaluate(net):
        return 1.0 if torch.equal(net(example), original) else 0.0

    with untouched(model):
        result = taut.compress(model, example, budget=Budget(drop=0.5), data=batches, evaluate=evaluate)
    assert result.plan.steps == ()
    assert torch.equal(run(result.model, example)[0], original)
    with untouched(model), pytest.raises(BudgetError, match="drop") as caught:
        taut.compress(model, example, budget=Budget(drop=0.5, macs=0.5), data=batches, evaluate=evaluate)
    assert caught.value.best.comparison.after.macs <= 0.5 * caught.value.best.comparison.before.macs


# Data.


def nothing():
    yield from ()


@pytest.mark.parametrize(
    "data", [[], (), nothing(), DataLoader(TensorDataset(torch.randn(0, 3, 8, 8)))], ids=lambda d: type(d).__name__
)
def test_loader_without_a_batch(vgg, data):
    with untouched(vgg[0]), pytest.raises(DataError, match="no batch"):
        taut.compress(*vgg, budget=HALF, data=data)


def test_exhausted_generator_is_named(vgg, batches):
    model, example = vgg
    net = taut.trace(model, example)
    data = (batch for batch in batches)
    stats = taut.observe(net, model, data)
    plan = taut.plan(net, stats, HALF)
    with untouched(model), pytest.raises(DataError, match=r"generator.*only once"):
        taut.apply(model, plan, stats, data=data)


def test_generator_is_enough_for_compress(vgg, batches):
    """It is read once and kept: the same result as from a list."""
    model, example = vgg
    once = taut.compress(model, example, budget=HALF, data=(batch for batch in batches))
    listed = taut.compress(model, example, budget=HALF, data=batches)
    assert all(torch.equal(a, b) for a, b in zip(run(once.model, example), run(listed.model, example), strict=True))


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (torch.randn(8, 3, 8), r"float32\[8, 3, 8\]"),
        (torch.zeros(8, 3, 8, 8, dtype=torch.long), r"int64\[8, 3, 8, 8\]"),
        ({"image": torch.randn(8, 3, 8)}, r"\{image: float32\[8, 3, 8\]\}"),
        ((torch.randn(8, 3), torch.zeros(8), torch.zeros(8)), r"\(float32\[8, 3\], float32\[8\], float32\[8\]\)"),
        ("text", "str"),
    ],
    ids=["rank", "dtype", "dict", "three", "text"],
)
def test_batches_of_the_wrong_structure(vgg, batch, shown):
    model, example = vgg
    with untouched(model), pytest.raises(DataError, match=rf"float32\[2, 3, 8, 8\].*{shown}"):
        taut.compress(model, example, budget=HALF, data=[batch])


def test_batches_of_the_wrong_structure_for_keywords():
    model, example = case("keywords").make()
    wrong = [{"tokens": torch.zeros(8, 5, dtype=torch.long)}]
    with untouched(model), pytest.raises(DataError, match=r"tokens: int64\[2, 5\], image: float32.*\{tokens: int64"):
        taut.compress(model, example, budget=HALF, data=wrong)


def test_batches_of_the_wrong_size(vgg):
    """The right structure, but the model cannot take it."""
    model, example = vgg
    data = [torch.randn(8, 4, 8, 8)]
    with untouched(model), pytest.raises(ModelError, match=r"cannot be run .*float32\[8, 4, 8, 8\]"):
        taut.compress(model, example, budget=HALF, data=data)


@pytest.mark.parametrize("data", [3, object(), len])
def test_data_that_is_no_iterable(vgg, data):
    with untouched(vgg[0]), pytest.raises(DataError, match="iterable of batches"):
        taut.compress(*vgg, budget=HALF, data=data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_is_not_finite(vgg, batches, value):
    batches[1][3, 0, 2, 2] = value
    with untouched(vgg[0]), pytest.raises(DataError, match="not finite"):
        taut.compress(*vgg, budget=HALF, data=batches)


def test_loader_that_raises(vgg):
    def broken():
        yield torch.randn(8, 3, 8, 8)
        raise OSError("disk gone")

    with untouched(vgg[0]), pytest.raises((DataError, OSError), match="disk gone"):
        taut.compress(*vgg, budget=HALF, data=broken())


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x), dtype=torch.long)],
    ],
    ids=["inputs", "list", "pair", "pair list"],
)
def test_forms_of_a_batch_give_the_same_model(vgg, batches, form):
    model, example = vgg
    plain = taut.compress(model, example, budget=HALF, data=batches)
    formed = taut.compress(model, example, budget=HALF, data=[form(batch) for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(run(plain.model, example), run(formed.model, example), strict=True))


def test_batch_of_one_sample(vgg):
    model, example = vgg
    data = [torch.randn(1, 3, 8, 8)]
    with untouched(model):
        result = taut.compress(model, example[:1], budget=HALF, data=data)
    assert all(bool(t.isfinite().all()) for t in run(result.model, example))


@pytest.mark.parametrize("example", [None, 3, {}, (), torch.randn(0, 3, 8, 8), torch.tensor(1.0)])
def test_example_without_a_batch(vgg, example):
    with untouched(vgg[0]), pytest.raises(DataError, match="at least one tensor"):
        taut.trace(vgg[0], example)


def test_example_that_the_model_refuses(vgg):
    example = torch.randn(2, 5)
    with untouched(vgg[0]), pytest.raises(ModelError, match=r"cannot be run .*float32\[2, 5\]"):
        taut.trace(vgg[0], example)


# Evaluate.


@pytest.mark.parametrize("budget", [HALF, Budget(drop=0.1)], ids=["macs", "drop"])
@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: math.nan, "nan"),
        (lambda _: {"accuracy": math.inf}, "accuracy"),
        (lambda _: None, "NoneType"),
        (lambda _: "good", "str"),
        (lambda _: torch.tensor([0.5, math.nan]), "1 scores of 2"),
    ],
    ids=["raises", "nan", "inf", "none", "text", "scores"],
)
def test_evaluate_that_fails(vgg, batches, evaluate, message, budget):
    with untouched(vgg[0]), pytest.raises(DataError, match=message):
        taut.compress(*vgg, budget=budget, data=batches, evaluate=evaluate)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_evaluate_that_is_interrupted(vgg, batches, call):
    """Ctrl-C in the middle: it comes through, and flags and global state are put back."""
    calls = []

    def evaluate(_):
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt
        return 1.0

    model = vgg[0].train()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        taut.compress(*vgg, budget=Budget(drop=0.1), data=batches, evaluate=evaluate)


# Half precision and modes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vgg", "resnet", "mlp", "inception"])
def test_half_precision_is_computed_in_float32(name, dtype):
    """As close to the float32 result as rounding allows, and stored in the model's own type."""
    full, example = case(name).make()
    model = copy.deepcopy(full).to(dtype)
    data = [batch.to(dtype) for batch in case(name).data()]
    with untouched(model):
        result = taut.compress(model, example.to(dtype), budget=Budget(params=0.7), data=data)
    assert {t.dtype for t in result.model.parameters()} == {dtype}
    wide = taut.compress(full, example, budget=Budget(params=0.7), data=case(name).data())
    original, mine, theirs = (
        run(m, x)[0].double() for m, x in ((full, example), (result.model, example.to(dtype)), (wide.model, example))
    )
    scale = float(original.abs().max())
    assert bool(mine.isfinite().all())
    assert float((mine - original).abs().max()) <= float((theirs - original).abs().max()) + 0.1 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_values_do_not_overflow(dtype):
    """Second moments of activations near 1e4 leave float16 at once."""
    model = nn.Sequential(OrderedDict(a=nn.Linear(32, 32), b=nn.Linear(32, 8))).to(dtype)
    data = [(1e3 * torch.randn(16, 32)).to(dtype)]
    result = taut.compress(model, data[0], budget=Budget(params=0.6), data=data)
    assert all(bool(t.isfinite().all()) for t in run(result.model, data[0]))


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
def test_model_in_train_mode(data):
    """Same result as in eval mode; dropout and batch norm asleep meanwhile; every flag as it was."""
    model, example = case("vgg").make()
    batches = case("vgg").data() if data else None
    expected = taut.compress(model, example, budget=HALF, data=batches)
    model.train()
    model.norm2.eval()
    with untouched(model):
        result = taut.compress(model, example, budget=HALF, data=batches)
    assert all(torch.equal(a, b) for a, b in zip(run(expected.model, example), run(result.model, example), strict=True))
    assert result.model.training
    assert result.model.drop.training
    assert not result.model.norm2.training


class Counting(nn.Module):
    """Keeps count of its calls in a buffer and in an attribute, in eval mode too, as streaming models do."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 24), nn.Linear(24, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(24))
        self.history = []

    def forward(self, x):
        self.calls += 1
        self.last.copy_(x[0])
        self.history.append(len(x))
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("one_by_one", [True, False], ids=["verbs", "compress"])
def test_model_that_changes_itself_in_forward(one_by_one):
    """Neither the model nor the result remembers that we ran it."""
    model, example, data = Counting(), torch.randn(2, 24), [torch.randn(8, 24), torch.randn(8, 24)]
    with untouched(model):
        if one_by_one:
            net = taut.trace(model, example)
            stats = taut.observe(net, model, data)
            small = taut.apply(model, taut.plan(net, stats, Budget(params=0.7)), stats, data=data)
        else:
            small = taut.compress(model, example, budget=Budget(params=0.7), data=data).model
    assert isinstance(small.fc1, nn.Sequential)
    for each in (model, small):
        assert (each.history, int(each.calls), int(each.last.count_nonzero())) == ([], 0, 0)


def test_model_whose_forward_fails_after_the_rewrite():
    """Code that looks into what replaced its layer: the step is rolled back with its reason, the rest is done."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            if type(self.first).__name__ == "Sequential" and len(self.first[0].weight) < 32:
                raise TypeError("first must not be a Sequential")
            return self.second(torch.relu(self.first(x)))

    model, example = Picky(), torch.randn(2, 32)
    data = [torch.randn(32, 32)]
    net = taut.trace(model, example)
    plan = taut.plan(net, taut.observe(net, model, data), Budget(params=0.5))
    assert {name for step in plan.steps for name in step.layers} == {"first", "second"}
    before = state(model)
    with pytest.raises(BudgetError) as caught:
        taut.compress(model, example, budget=Budget(params=0.5), data=data)
    result = caught.value.best
    assert state(model) == before
    assert isinstance(result.model.first, nn.Linear)
    assert isinstance(result.model.second, nn.Sequential)
    (kept,) = (kept for kept in result.plan.kept if kept.layer == "first")
    assert "rolled back" in kept.reason
    assert "must not be a Sequential" in kept.reason
