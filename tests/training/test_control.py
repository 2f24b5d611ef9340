"""Beside whatever is trained stands the original, trained equally; and nothing that is missing is found out late."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import taut
from taut import CallError, Finetune, Stage
from taut.training import control, finetuning, loop
from taut.types import Plan, cascade

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(96, 8, generator=RANDOM)
Y = (X @ torch.randn(8, 3, generator=RANDOM)).argmax(1)
STAGES = (Stage(epochs=2, rate=1e-2),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def right(model: nn.Module) -> list[float]:
    with torch.no_grad():
        return (model(X).argmax(1) == Y).double().tolist()


def wish(**settings: Any) -> Finetune:
    loss = nn.functional.cross_entropy
    return Finetune(**{"train": [(X, Y)], "valid": [(X, Y)], "loss": loss, "schedule": STAGES, **settings})


def compressed(finetune: Finetune, **settings: Any) -> taut.Result:
    budget = {"params": 0.6}
    return taut.compress(
        net(), X[:4], **{"budget": budget, "evaluate": right, "finetune": finetune, "compare": False, **settings}
    )


def test_the_control_is_the_original_trained_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compressed(wish(folder=tmp_path / "state"))
    alone = taut.finetune(
        net(), None, None, [(X, Y)], [(X, Y)], loss=nn.functional.cross_entropy, example=X[:4], schedule=STAGES
    )
    comparison = result.comparison
    assert comparison.score_control is not None
    assert comparison.score_before is not None
    assert comparison.score_control.value == sum(right(alone)) / len(X) > comparison.score_before.value
    row = next(line for line in str(comparison).splitlines() if "dense trained equally" in line)
    assert f"{comparison.score_control.value:.4f} [" in row
    items = comparison.to_dict()
    assert items["accuracy_control"] == comparison.score_control.value
    assert items["accuracy_change_to_control"] == pytest.approx(items["accuracy_after"] - items["accuracy_control"])
    assert {path.name for path in tmp_path.iterdir()} == {"state", "state-control"}
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", lambda *_: pytest.fail("trained again"))
        again = compressed(wish(folder=tmp_path / "state"))
    assert again.comparison.score_control == comparison.score_control


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"control": False}, "has no control, as asked"),
        ({"loss": None}, "the original is the teacher"),
        ({"schedule": (Stage(epochs=1, distill=1.0),)}, "the original is the teacher"),
        ({"schedule": (Stage(epochs=0),)}, "0 epochs"),
    ],
)
def test_where_there_is_none_it_says_why(settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.search.finishing.train_control", lambda *_: pytest.fail("trained"))
    comparison = compressed(wish(**settings)).comparison
    assert comparison.score_control is None
    assert said in str(comparison)
    assert comparison.to_dict()["accuracy_control"] is None


def test_a_schedule_over_steps_becomes_one_without() -> None:
    plan = taut.plan(network := taut.trace(net(), X[:4]), taut.observe(network, net()), {"params": 0.6})
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "carry_out", lambda *given, **_: seen.append(given) or (net(), None))
        control.train_control(net(), taut.observe(network, net()), wish(schedule=cascade), plan, 0)
    stages = seen[0][3].schedule
    assert [stage.steps for stage in stages] == [()] * len(plan.steps)
    assert {stage.train for stage in stages} == {"all"}
    assert seen[0][1] is None


def test_data_that_can_be_read_once_have_no_control() -> None:
    assert "only once" in str(control.control_reason(wish(train=iter([(X, Y)])), Plan(())))
    assert control.control_reason(wish(), Plan(())) is None


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("taut.core.extras.find_spec", lambda name: None if name == package else real(name))


def test_training_asks_for_accelerate_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    without("accelerate", monkeypatch)
    for schedule in (None, STAGES, lambda plan: cascade(plan, epochs=1)):
        with pytest.raises(CallError, match=r"pip install 'taut\[train\]'"):
            compressed(wish(schedule=schedule), evaluate=lambda _: pytest.fail("evaluated"))
    with pytest.raises(CallError, match=r"pip install 'taut\[train\]'"):
        taut.finetune(net(), None, None, [X], [X], example=X[:4], teacher=net())


def test_what_trains_nothing_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    without("accelerate", monkeypatch)
    monkeypatch.setattr(finetuning, "accelerator", lambda: pytest.fail("asked for"))
    compressed(wish(schedule=(Stage(epochs=0),)))
    compressed(wish(schedule=(Stage(train="none"),)))
    network = taut.trace(net(), X[:4])
    stats = taut.observe(network, net())
    plan = taut.plan(network, stats, {"params": 0.6})
    done = taut.finetune(net(), plan, stats, [X], None, schedule=(Stage(tuple(range(len(plan.steps))), epochs=0),))
    assert sum(p.numel() for p in done.parameters()) < sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize("verb", ["compress", "explore", "compare"])
def test_runtimes_that_are_asked_for_are_looked_for_first(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without("openvino", monkeypatch)
    monkeypatch.setenv("TAUT_RUNTIMES", "eager,openvino")
    settings: dict[str, Any] = {"evaluate": lambda _: pytest.fail("evaluated")}
    calls = {
        "compress": lambda: taut.compress(net(), X[:4], budget="params=0.6", **settings),
        "explore": lambda: taut.explore(net(), X[:4], data=None, **settings),
        "compare": lambda: taut.compare(net(), net(), None, X[:4]),
    }
    with pytest.raises(CallError, match=r"TAUT_RUNTIMES asks for openvino.*pip install 'taut\[openvino\]'"):
        calls[verb]()


def test_a_study_that_trains_asks_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without("accelerate", monkeypatch)
    subject = taut.studies.Subject(net(), X[:4], lambda _: pytest.fail("evaluated"))
    grid = taut.studies.Grid(("svd",), (0.5,), epochs=1)
    with pytest.raises(CallError, match=r"pip install 'taut\[train\]'"):
        taut.studies.study(lambda: subject, tmp_path / "out", grid)


def test_codebooks_ask_for_their_package_first(monkeypatch: pytest.MonkeyPatch) -> None:
    without("sklearn", monkeypatch)
    with pytest.raises(CallError, match=r"pip install 'taut\[quantize\]'"):
        taut.compress(
            net(), X[:4], budget="bytes=0.6", methods=["codebook"], evaluate=lambda _: pytest.fail("evaluated")
        )
    with pytest.raises(CallError, match=r"pip install 'taut\[quantize\]'"):
        taut.explore(net(), X[:4], data=None, methods=["codebook"], evaluate=lambda _: pytest.fail("evaluated"))
