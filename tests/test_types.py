"""Costs, budgets, networks and plans as data."""

import inspect
import json
import math
import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut import Budget, CallError, Network, Plan, Stage, Step
from taut.types import Cost, Group, Invocation, Kept, Layer

NUMBERS = st.integers(0, 10**12)
COSTS = st.builds(Cost, NUMBERS, NUMBERS, NUMBERS, NUMBERS)


@given(COSTS, COSTS)
def test_costs_add_and_subtract_field_by_field(a, b):
    assert (a + b) - b == a
    assert (a + b).values() == tuple(x + y for x, y in zip(a.values(), b.values(), strict=True))
    assert a + Cost() == a


@given(COSTS, COSTS)
def test_lowers_is_a_strict_order_that_ignores_bytes(a, b):
    assert not a.lowers(a)
    assert not (a.lowers(b) and b.lowers(a))
    assert a.lowers(b) == (
        all(x <= y for x, y in zip(a.values()[:3], b.values()[:3], strict=True)) and a.values()[:3] != b.values()[:3]
    )
    assert a.lowers(replace(b, bytes=0)) == a.lowers(b)


# Budgets.


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs=0.25", Budget(macs=0.25)),
        ("params=100000", Budget(params=100_000)),
        ("params=2", Budget(params=2)),
        ("macs=50%", Budget(macs=0.5)),
        ("macs = 12.5 % , latency=50%", Budget(macs=0.125, latency=0.5)),
        ("macs=1e6", Budget(macs=1_000_000)),
        ("macs=1_000_000", Budget(macs=1_000_000)),
        ("params=1M", Budget(params=1_000_000)),
        ("params=1.5k,macs=.2g", Budget(params=1500, macs=200_000_000)),
        ("params=7B", Budget(params=7_000_000_000)),
        ("bytes=500kB", Budget(bytes=500_000)),
        ("bytes=1.5 MB", Budget(bytes=1_500_000)),
        ("bytes=2MiB", Budget(bytes=2 << 20)),
        ("bytes=900b", Budget(bytes=900)),
        ("params=1.0", Budget(params=1.0)),
        ("macs=0.5,bytes=0.5,drop=0", Budget(macs=0.5, bytes=0.5, drop=0.0)),
        (" macs = 0.5 , params = 7 ", Budget(macs=0.5, params=7)),
        ("drop=1", Budget(drop=1.0)),
        ("macs=1e-3", Budget(macs=0.001)),
        ("latency=0.5,macs=0.5", Budget(latency=0.5, macs=0.5)),
        ("latency=1", Budget(latency=1.0)),
    ],
)
def test_parse(text, budget):
    found = Budget.parse(text)
    assert found == budget
    assert [type(v) for v in vars(found).values()] == [type(v) for v in vars(budget).values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Unknown budget key ''"),
        ("speed=2", r"Unknown budget key 'speed'\. Known: params, macs, bytes, latency, drop"),
        ("latency=20", r"fraction kept and must be in \(0, 1\]\. Got 20"),
        ("latency=0", r"fraction kept and must be in \(0, 1\]\. Got 0"),
        ("macs", "The budget 'macs' must be a number. Got ''"),
        ("macs=half", "The budget 'macs' must be a number. Got 'half'"),
        ("macs=0.5,", "Unknown budget key ''.*not in numbers or at the end"),
        ("params=4,000", "Unknown budget key '000'.*A comma stands between keys"),
        ("parms=.5", r"Did you mean 'params'\? params=0\.5 keeps half"),
        ("PARAMS=0.5", r"Here that is 'params': params=0\.5 keeps half"),
        ("params<=0.5", r"Here that is 'params': params=0\.5 keeps half"),
        ("macs=0.5=3", "must be a number"),
        ("macs=nan", "fraction kept and must be in"),
        ("macs=inf", "fraction kept and must be in"),
        ("macs=-1", "fraction kept and must be in"),
        ("macs=0", "absolute and must be at least 1"),
        ("macs=1", r"1 is one multiply-accumulate\. Say macs=1\.0 to keep all, macs=0\.5 for a half, or a larger int"),
        ("params=1", "1 is one parameter"),
        ("bytes=1", "1 is one byte"),
        ("macs=2x", "Got '2x' instead. It is what is kept: macs=0.5"),
        ("params=500kB", "must be a number. Got '500kB'"),
        ("macs=150%", r"must be in \(0, 1\]\. Got 1\.5"),
        ("latency=5ms", "milliseconds are another number on every machine: latency=0.5"),
        ("latency=2x", "latency=0.5 or '50%' keeps half of it, which is 2x as fast"),
        ("drop=1%", "It is in the units of `evaluate`: drop=0.01"),
        (
            "flops=0.5",
            "Unknown budget key 'flops'.*Here that is 'macs': macs=0.5 keeps half of the multiply-accumulates",
        ),
        ("speedup=2", "Here that is 'latency': latency=0.5 keeps half of the time"),
        ("macs=1.5", r"fraction kept and must be in \(0, 1\]\. Got 1\.5"),
        ("drop=nan", "must be at least 0"),
        ("drop=-0.1", "must be at least 0"),
        ("drop=inf", "must be at least 0"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(CallError, match=message):
        Budget.parse(text)


def test_a_repeated_key_is_refused():
    with pytest.raises(CallError, match="macs"):
        Budget.parse("macs=0.5,macs=0.25")


@pytest.mark.parametrize(
    "value", [True, False, "half", [0.5], 2.0, 50.0, 1, float("nan"), 0, 0.0, -1, -0.5, 1.01, float("inf")]
)
@pytest.mark.parametrize("key", ["params", "macs", "bytes", "latency"])
def test_values_outside_their_range(key, value):
    if key == "latency" and value == 1:
        assert Budget(latency=1) == Budget(latency=1.0)  # all of the time: nothing else can be meant
        return
    with pytest.raises(CallError, match=f"The budget '{key}'"):
        Budget(**{key: value})


def test_an_empty_budget_and_an_unknown_key():
    with pytest.raises(CallError, match=r"needs at least one of params, macs, bytes, latency, drop\. Got none"):
        Budget()
    with pytest.raises(CallError, match=r"Unknown budget key 'speed'.*'latency': latency=0\.5"):
        Budget(speed=0.5)
    with pytest.raises(TypeError):
        Budget(1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (Budget(macs=0.5), Budget(macs=0.5)),
        ({"macs": 0.5}, Budget(macs=0.5)),
        ({"macs": "50%", "params": 1e6}, Budget(macs=0.5, params=1_000_000)),
        ("macs=0.5", Budget(macs=0.5)),
        ({"bytes": np.int64(4096), "macs": np.float64(0.5)}, Budget(bytes=4096, macs=0.5)),
    ],
)
def test_budgets_as_they_are_written(value, budget):
    found = Budget.of(value)
    assert found == budget
    assert [type(v) for v in vars(found).values()] == [type(v) for v in vars(budget).values()]


@pytest.mark.parametrize("value", [0.5, None, "0.5", "50%", [0.5], 1, {"flops": 0.5}, {}, "half"])
def test_a_budget_of_nothing_in_particular_is_answered_with_the_call(value):
    with pytest.raises(CallError, match=r"macs=0\.5|at least one of params"):
        Budget.of(value)


def test_the_signature_of_a_budget_names_its_keys():
    assert list(inspect.signature(Budget).parameters) == ["params", "macs", "bytes", "latency", "drop"]


@given(st.floats(1e-6, 1.0), st.integers(1, 10**12), st.integers(1, 10**12))
def test_limits_never_exceed_the_fraction(fraction, params, macs):
    original = Cost(params, params, macs, 4 * params)
    limits = Budget(params=fraction, macs=123, drop=0.1).limits(original)
    assert limits["macs"] == 123
    assert limits["params"] <= fraction * params
    assert limits["params"] > fraction * params - 1
    assert set(limits) == {"params", "macs"}
    assert Budget(params=1.0).limits(original) == {"params": params}
    assert Budget(latency=fraction).limits(original) == {"latency": fraction}


def test_a_fraction_and_one_are_not_the_absolute_one():
    original = Cost(1000, 1000, 5000, 4000)
    assert Budget(params=2).limits(original) == {"params": 2}
    assert Budget(params=1.0).limits(original) == {"params": 1000}


# Networks.

CONV = Layer(
    "body.conv",
    "Conv2d",
    (8, 3, 3, 3),
    bias=True,
    stride=(1, 1),
    padding=((1, 1), (1, 1)),
    dilation=(1, 1),
    calls=(Invocation((2, 3, 4, 4), (2, 8, 4, 4)),),
    batch=2,
    live=((0, 3), (0, 3)),
    macs=3456,
    params=224,
)
FC = Layer("fc", "Linear", (5, 8), True, calls=(Invocation((2, 8), (2, 5)),), batch=2, macs=40, params=45)
NET = Network((CONV, FC), Cost(269, 269, 3496, 1300), ("a note",))


def test_layers_know_their_kernel_positions_and_cost():
    assert CONV.kernel == (3, 3)
    assert FC.kernel == ()
    assert CONV.positions == 2 * 16
    assert FC.positions == 2
    assert CONV.cost == Cost(224, 224, 3456, 896)
    assert replace(CONV, itemsize=2).cost.bytes == 448
    assert Layer("e", "Embedding", (10, 4)).positions == 0
    assert Layer("n", "Other").positions == 0
    assert CONV.per_sample(7) == 4  # 3.5, to even


def test_network_finds_layers_and_groups():
    assert NET["fc"] is FC
    assert NET.group(["fc", "body.conv"]).names == ("fc", "body.conv")
    assert NET.group(["fc", "body.conv"]).cost == Cost(269, 269, 3496, 1076)
    assert Group((FC,)).layer is FC
    with pytest.raises(CallError, match=r"no layer 'conv'\. Layers: body\.conv, fc\."):
        _ = NET["conv"]
    with pytest.raises(ValueError, match="unpack"):
        _ = NET.group(["fc", "body.conv"]).layer


def test_network_prints_every_layer():
    text = str(NET)
    for words in ("body.conv", "8x3x3x3", "3.46k", "Linear", "total", "a note"):
        assert words in text


# Plans.

SVD_STEP = Step(
    ("fc",),
    "svd",
    {"rank": 2, "metric": "data"},
    Group((FC,)),
    before=FC.cost,
    after=Cost(31, 31, 26, 124),
    damage=0.25,
    reason="because",
)
TUCKER_STEP = Step(("body.conv",), "tucker", {"rank_in": 2, "rank_out": 3, "metric": "fisher"}, allow_growth=True)
PLAN = Plan((SVD_STEP, TUCKER_STEP), (Kept("norm", "no candidate", Cost(16, 16, 0, 64)),), NET.cost, Cost(1, 2, 3, 4))

SETTINGS = st.dictionaries(
    st.text(max_size=8),
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.lists(st.integers(-100, 100), max_size=4)
    | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    max_size=4,
)


def test_plan_round_trips_through_json():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.to_json() == PLAN.to_json()
    assert isinstance(again.steps[0].group.layers[0].calls[0], Invocation)
    assert Plan.from_json(PLAN.to_json().encode()) == PLAN


@given(st.lists(st.tuples(st.lists(st.text(max_size=6), max_size=3), st.text(max_size=6), SETTINGS), max_size=3))
def test_any_step_round_trips_with_its_types(steps):
    plan = Plan(tuple(Step(tuple(layers), method, settings) for layers, method, settings in steps))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    for one, two in zip(plan.steps, again.steps, strict=True):
        assert [type(v) for v in one.settings.values()] == [type(v) for v in two.settings.values()]


def edited(**changes):
    return json.dumps(json.loads(PLAN.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "is wrong"),
        ("3", "is wrong"),
        ('{"steps": [], "steps": []}', "the key 'steps' is repeated"),
        ('{"steps": [{"layers": ["a"], "method": "svd", "settings": {"rank": 1, "rank": 2}}]}', "'rank' is repeated"),
        (edited(extra=1), "'extra' is wrong"),
        (edited(steps=[{"layers": ["fc"], "method": "svd", "rank": 3}]), r"'steps\.0\.rank' is wrong"),
        (edited(steps=[{"layers": ["fc"]}]), r"'steps\.0\.method' is wrong"),
        (edited(steps=[{"layers": "fc", "method": "svd"}]), r"'steps\.0\.layers' is wrong"),
        (edited(steps=[{"layers": ["fc"], "method": "svd", "settings": {"rank": {}}}]), r"'steps\.0\.settings\.rank"),
        (edited(before={"params": "many"}), r"'before\.params' is wrong.*Got 'many'"),
        (edited(before={"parms": 1}), r"'before\.parms' is wrong"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_plans_are_named(text, message):
    with pytest.raises(CallError, match=message):
        Plan.from_json(text)


def test_missing_keys_take_their_defaults():
    plan = Plan.from_json('{"steps": [{"layers": ["fc"], "method": "svd", "settings": {"rank": 4}}]}')
    assert plan.steps == (Step(("fc",), "svd", {"rank": 4}),)
    assert plan.kept == ()


def test_plan_of_fills_the_groups():
    plan = Plan.of(NET, [Step(("fc",), "svd", {"rank": 2}), replace(SVD_STEP, group=Group((CONV,)))])
    assert plan.steps[0].group == Group((FC,))
    assert plan.steps[1].group == Group((CONV,))
    assert plan.before == NET.cost
    with pytest.raises(CallError, match="no layer 'nowhere'"):
        Plan.of(NET, [Step(("nowhere",), "svd")])


def test_plan_without_layers():
    plan = PLAN.without(["fc"])
    assert plan.steps == (TUCKER_STEP,)
    assert plan.kept[-1] == Kept("fc", "taken out of the plan", FC.cost, "taken out")
    assert PLAN.without([]) == PLAN
    assert PLAN.without(["elsewhere"]) == PLAN
    assert len(PLAN.steps) == 2


def test_plan_prints_every_row():
    text = str(PLAN)
    for words in (
        "fc",
        "svd",
        "rank=2",
        "45 -> 31 (1.45x)",
        "0.25",
        "because",
        "norm",
        "keep",
        "whole model",
        "units of loss",
    ):
        assert words in text
    assert "metric=data" not in text
    assert "metric=fisher" in text


@pytest.mark.parametrize(
    "value", [Cost(), Budget(macs=0.5), CONV, NET, SVD_STEP, PLAN, Kept("a", "b")], ids=lambda v: type(v).__name__
)
def test_words_are_frozen(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, next(iter(vars(value))), None)


def test_a_table_shows_what_was_asked_for_and_not_what_the_method_does_anyway():
    usual = Step(("fc",), "svd", {"rank": 0, "metric": "data"}, Group((FC,)))
    asked = Step(("fc",), "magnitude", {"sparsity": 0.0, "select": "layer"}, Group((FC,)))
    text = str(Plan((usual, asked)))
    assert "rank=0" in text
    assert "metric" not in text
    assert "sparsity=0" in text
    assert "select=layer" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("rate", "weight_decay", "sparsify", "distill") for value in ("x", True, [1], -1)),
        *((key, value) for key in ("rate", "weight_decay", "sparsify", "target") for value in (math.nan, math.inf)),
        *(("sparsify", None), ("rate", None), ("rate", 0), ("distill", 1.5), ("target", "0.9"), ("target", False)),
        *(("decay", 1), ("hold_zeros", "yes"), ("train", ["all"]), ("optimizer", ["adam"]), ("optimizer", None)),
        *(("epochs", True), ("epochs", 1.5), ("epochs", "3"), ("patience", 0), ("patience", "2")),
        *(("steps", 0), ("steps", "0"), ("steps", ("fc",)), ("steps", (True,)), ("steps", (-1,)), ("steps", None)),
    ],
)
def test_what_no_stage_can_mean_is_named(key, value):
    with pytest.raises(CallError, match=f"The '{key}' of a stage must be .* Got {re.escape(repr(value))} instead"):
        Stage(**{key: value})


def test_numbers_of_numpy_are_numbers_to_a_stage():
    stage = Stage(rate=np.float32(0.5), sparsify=np.float64(0.1), target=np.int64(1), weight_decay=0)
    assert (stage.rate, stage.sparsify) == (0.5, 0.1)
