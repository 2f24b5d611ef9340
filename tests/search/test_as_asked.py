"""`compress` and `explore` as they are asked: what is timed, what is shown, what is refused, and nothing is lost."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

import taut
from taut.methods import METHODS, choose
from taut.methods.channels.channels import Channels
from taut.methods.low_rank.svd import SVD
from taut.search import finishing

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def mean(model: nn.Module) -> float:
    return float(model(X).detach().mean())


def compress(**settings: Any) -> taut.Result:
    return taut.compress(net(), X[:4], **{"budget": "params=60%", "data": [X], "compare": False, **settings})


@pytest.fixture(scope="module")
def untimed() -> taut.Result:
    return compress(evaluate=mean)


def test_nothing_is_timed_unless_asked(untimed: taut.Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    comparison = untimed.comparison
    assert comparison.latency is None
    assert comparison.after.macs < comparison.before.macs
    assert comparison.score_after is not None
    assert "Nothing was timed, as asked" in str(comparison)
    assert "Without an example" not in str(comparison)
    assert comparison.to_dict()["speedup_best"] is None
    untimed.save(tmp_path / "small")
    monkeypatch.setattr("taut.measure.timing.time_calls", lambda *_: pytest.fail("timed"))
    compress()


def test_torch_alone_is_timed_on_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAUT_RUNTIMES", "eager,onnxruntime,openvino")
    latency = compress(compare="torch").comparison.latency
    assert latency is not None
    assert set(latency.runtimes) == {"eager"}
    assert not latency.skipped


@pytest.mark.parametrize("value", [1, "all", None, "onnxruntime"])
@pytest.mark.parametrize("verb", [taut.compress, taut.explore])
def test_other_comparisons_are_refused_before_any_work(verb: Any, value: object) -> None:
    more = {"budget": "macs=0.5"} if verb is taut.compress else {"data": None}
    with pytest.raises(taut.CallError, match="'compare' must be True"):
        verb(net(), X[:4], evaluate=lambda _: pytest.fail("evaluated"), compare=value, **more)


def test_a_front_without_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.search.exploration.RATIOS", (1.0, 2.0))
    monkeypatch.setattr("taut.measure.timing.time_calls", lambda *_: pytest.fail("timed"))
    settings: dict[str, Any] = {"data": [X], "evaluate": None, "compare": False, "folder": tmp_path}
    front = taut.explore(net(), X[:4], **settings)
    assert [(point.ms_before, point.ms_after) for point in front.points] == [(None, None)] * 2
    assert str(front).count(" -") >= 4
    front.plot(tmp_path / "front.svg")
    assert taut.explore(net(), X[:4], **settings) == front


def test_a_result_is_printed_in_short(untimed: taut.Result) -> None:
    assert "Linear(" not in str(untimed)
    assert str(untimed).startswith("3 layers changed (3 by svd); params ") or " changed (" in str(untimed)
    assert "Linear(" not in repr(untimed)
    assert "\n" not in repr(untimed)


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    compress(progress=True)
    stages = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert {"tracing", "observing", "decomposing", "searching", "refitting"} <= set(stages)
    compress(progress=False)
    compress()
    assert capsys.readouterr() == ("", "")


def test_a_search_for_a_drop_moves_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    compress(budget="drop=0.5", evaluate=mean, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("searching: 6 of 6, ") for line in lines), lines


@pytest.mark.parametrize("seed", [2**64, -1, 1.5, True, "0", None])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(taut.CallError, match="The 'seed' must be a whole number"):
        compress(seed=seed)
    with pytest.raises(taut.CallError, match="The 'seed' must be a whole number"):
        taut.explore(net(), X[:4], data=[X], evaluate=None, seed=seed)
    with pytest.raises(taut.CallError, match="The 'seed' must be a whole number"):
        taut.finetune(net(), None, None, [X], [X], example=X[:4], teacher=net(), seed=seed)


def test_seeds_of_numpy() -> None:
    wide = compress(seed=np.int64(3))
    assert repr(wide) == repr(compress(seed=3))


def fail(*_: Any) -> NoReturn:
    raise ZeroDivisionError("too few")


class Later:
    """Fails from some call on."""

    def __init__(self, good: int) -> None:
        self.good, self.calls = good, 0

    def __call__(self, *_: Any) -> float:
        self.calls += 1
        if self.calls > self.good:
            fail()
        return 0.5


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_an_evaluate_that_fails_at_the_end_loses_no_model(untimed: taut.Result) -> None:
    with pytest.raises(taut.DataError, match="evaluate raised ZeroDivisionError: too few") as caught:
        compress(evaluate=Later(1))
    result = caught.value.result
    assert isinstance(result, taut.Result)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert same(result.model, untimed.model)
    assert result.comparison.score_after is None
    assert "`.result`" in caught.value.__notes__[0]


def test_an_interrupt_at_the_end_loses_no_model(untimed: taut.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, timing: Any, **__: Any) -> Any:
        if timing:
            raise KeyboardInterrupt
        return untimed.comparison

    monkeypatch.setattr(finishing, "compared_models", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        compress(compare=True)
    assert same(caught.value.result.model, untimed.model)  # type: ignore[attr-defined]


def test_the_promise_of_a_drop_is_told_with_its_data() -> None:
    def right(model: nn.Module) -> list[float]:
        return (model(X).argmax(1) == net()(X).argmax(1)).double().tolist()

    said = str(compress(budget="drop=0.2", evaluate=right).comparison)
    assert "The drop of at most 0.2 holds on the data of `evaluate` alone, where right changed by" in said
    assert "over its 64 samples a 95 % interval of [" in said
    said = str(compress(budget="drop=0.2", evaluate=lambda model: taut.Metric(sum(right(model)) / 64, 64)).comparison)
    assert "Over its 64 samples the 95 % intervals of both are [" in said
    said = str(compress(budget="drop=0.2", evaluate=lambda model: sum(right(model)) / 64).comparison)
    assert "No interval can be given" in said


def test_points_that_were_measured_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.search.exploration.RATIOS", (1.0, 2.0, 3.0))
    with pytest.raises(taut.DataError, match="evaluate raised ZeroDivisionError") as caught:
        taut.explore(net(), X[:4], data=[X], evaluate=Later(3), compare=False)
    front = caught.value.result
    assert isinstance(front, taut.Front)
    assert [point.ratio for point in front.points] == [1.0, 2.0]


@pytest.mark.parametrize("wish", [5, True, {"epochs": 1}])
def test_what_is_no_finetune_is_refused_with_the_call(wish: object) -> None:
    with pytest.raises(taut.CallError, match=r"must be a taut\.Finetune.*taut\.Finetune\(train, valid"):
        taut.compress(net(), X[:4], budget="params=50%", finetune=wish)  # type: ignore[arg-type]


def ranks(plan: taut.Plan) -> set[Any]:
    return {step.settings["rank"] for step in plan.steps}


@pytest.mark.parametrize(
    "methods", [{"svd": {"rank": 5, "metric": "frobenius"}}, [{"svd": {"rank": 5, "metric": "frobenius"}}]]
)
def test_settings_of_methods_are_written_as_in_recipes(methods: Any) -> None:
    """5 is the rank of every step, and the metric is the one that was asked for."""
    x = X[:4]
    net_, model = taut.trace(net(), x), net()
    stats = taut.observe(net_, model, [X])
    plan = taut.plan(net_, stats, {"params": 0.8}, methods)
    assert ranks(plan) == {5}
    assert {step.settings["metric"] for step in plan.steps} == {"frobenius"}
    with pytest.raises(taut.BudgetError):
        taut.plan(net_, stats, {"params": 0.8}, [taut.methods.SVD(rank=1000)])


@pytest.mark.parametrize("wish", [{"svd": 4}, [{"svd": {}, "tucker": {}}], {"svd": {"rang": 4}}, {"magic": {}}])
def test_settings_of_methods_that_are_none_are_refused(wish: Any) -> None:
    with pytest.raises(taut.CallError, match=r"mapping|one name: settings|Unknown setting|Unknown method"):
        compress(methods=wish)


def test_low_rank_is_a_name_for_what_is_tried_unasked_but_channels() -> None:
    defaults = choose(None)
    assert {type(method) for method in defaults} == {kind for kind in METHODS.values() if kind.default}
    assert Channels not in map(type, defaults)
    for wish in ("low rank", ["low rank"], {"low rank": {}}, [{"low rank": {}}]):
        assert choose(wish) == defaults
    for several in (["channels", "low rank"], {"channels": {}, "low rank": {}}, [Channels(), "low rank"]):
        assert choose(several) == (Channels(), *defaults)


def test_what_is_named_beside_low_rank_has_the_settings_that_it_is_given() -> None:
    named = SVD(metric="frobenius")
    others = tuple(method for method in choose(None) if method.name != "svd")
    assert choose(["low rank", named]) == (*others, named)
    assert choose({"svd": {"metric": "frobenius"}, "low rank": {}}) == (named, *others)


@pytest.mark.parametrize(
    ("wish", "said"), [("high rank", "Unknown method 'high rank'"), ({"low rank": {"rank": 3}}, "has no settings")]
)
def test_low_rank_is_known_where_names_are_listed(wish: Any, said: str) -> None:
    with pytest.raises(taut.CallError, match=rf"{said}.* and 'low rank': those tried unasked, but channels\."):
        choose(wish)


def test_low_rank_takes_no_channels_however_many_samples_there_are() -> None:
    unasked, low_rank = compress().plan, compress(methods="low rank").plan
    assert "channels" in {step.method for step in unasked.steps}
    assert {step.method for step in low_rank.steps} == {"svd"}
    assert compress(methods=["low rank", "channels"]).plan == unasked


RANKED = [(name, f.name) for name, kind in METHODS.items() for f in fields(kind) if f.name in kind.rank_settings]


@pytest.mark.parametrize(("name", "key"), RANKED)
def test_ranks_that_no_layer_can_have_are_refused_before_any_work(name: str, key: str) -> None:
    for rank in (-3, 0, "a", 4.0, True):
        for wish in ([METHODS[name](**{key: rank})], {name: {key: rank}}):
            with pytest.raises(taut.CallError, match=f"'{key}' of {name} must be a whole number, at least 1"):
                compress(methods=wish)


def test_a_front_needs_an_example_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.search.exploration.RATIOS", (1.0,))
    (point,) = taut.explore(net(), X[:4], compare=False).points
    assert point.value is None
