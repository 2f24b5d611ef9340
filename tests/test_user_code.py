"""What fails in the user's own code is said to be theirs, wherever it is called from, and costs no finished model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

import taut
from taut import CallError, DataError, Finetune, Stage
from taut.cli.app import run

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
EXAMPLE = X[:4]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def fail(*_: Any) -> NoReturn:
    raise ZeroDivisionError("too few")


def stop(*_: Any) -> NoReturn:
    sys.exit(0)


def broken_loader() -> Iterator[Any]:
    yield X[:16], Y[:16]
    fail()


class Loader:
    def __iter__(self) -> Iterator[Any]:
        return broken_loader()


def trained(
    loss: Any = nn.functional.cross_entropy, train: Any = ((X, Y),), valid: Any = ((X, Y),), **more: Any
) -> Any:
    schedule = (Stage(epochs=2),)
    return taut.finetune(net(), None, None, train, valid, loss=loss, example=EXAMPLE, schedule=schedule, **more)


def compressed(**settings: Any) -> taut.Result:
    return taut.compress(net(), EXAMPLE, **{"budget": "params=0.6", "compare": False, **settings})


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: trained(fail), "loss raised ZeroDivisionError: too few"),
        (lambda: trained(stop), r"loss ended the program by sys\.exit\(0\)"),
        (lambda: trained(lambda *_: None), "loss returned NoneType: return one number as a tensor"),
        (lambda: trained(lambda output, _: output.sum(1)), r"loss returned a float32 tensor of shape \(32,\)"),
        (lambda: trained(lambda output, _: float(output.sum())), "loss returned float"),
        (lambda: trained(lambda output, _: output.sum().detach()), "without a gradient"),
        (lambda: trained(lambda output, _: output.argmax()), "loss returned a int64 tensor"),
        (lambda: trained(train=Loader()), "the training data, asked for batch 1, raised ZeroDivisionError"),
        (lambda: trained(valid=Loader()), "the validation data, asked for batch 1, raised ZeroDivisionError"),
        (lambda: trained(valid=fail), r"The function that validates \(valid=\) raised ZeroDivisionError"),
        (lambda: compressed(data=Loader()), "the calibration data, asked for batch 1, raised ZeroDivisionError"),
        (lambda: compressed(evaluate=fail), "evaluate raised ZeroDivisionError: too few"),
        (lambda: compressed(evaluate=stop), r"evaluate ended the program by sys\.exit\(0\)"),
        (lambda: compressed(evaluate=lambda _: 10**400), "evaluate returned inf for 'metric'"),
        (lambda: compressed(evaluate=lambda _: [1, -(10**400)]), "evaluate returned 1 scores of 2 as NaN or Inf"),
        (lambda: compressed(evaluate=lambda _: None), "evaluate returned NoneType for 'metric'"),
        (lambda: compressed(evaluate=lambda _: "good"), "evaluate returned str for 'metric'"),
        (lambda: compressed(evaluate=lambda _: float("nan")), "evaluate returned nan for 'metric'"),
        (lambda: taut.observe(taut.trace(net(), EXAMPLE), net(), [(X, Y)], loss=fail), "loss raised ZeroDivisionError"),
        (lambda: taut.observe(taut.trace(net(), EXAMPLE), net(), [(X, Y)], loss=lambda *_: None), "loss returned None"),
    ],
)
def test_it_is_named(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        action()
    assert ("raised" in message) == isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_loss_of_one_number_in_a_row_is_taken() -> None:
    trained(lambda output, _: output.square().mean().reshape(1))


@pytest.mark.parametrize("base", [fail, stop])
def test_a_base_that_fails(base: Any, tmp_path: Path) -> None:
    compressed().save(tmp_path / "small")
    with pytest.raises(DataError, match=r"base\(\) (raised ZeroDivisionError|ended the program)"):
        taut.load(tmp_path / "small", base=base)


@pytest.mark.parametrize("methods", [[5], 5, [None], [taut.methods.SVD], ["svd", nn.ReLU()]])
def test_methods_that_are_none(methods: Any) -> None:
    with pytest.raises(CallError, match=r"method objects?, "):
        compressed(methods=methods)


class Later:
    """A loss or a metric that fails from some call on."""

    def __init__(self, good: int, function: Callable[..., Any]) -> None:
        self.good, self.function, self.calls = good, function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments) if self.calls <= self.good else fail()


def test_a_loss_that_fails_late_keeps_the_best_weights() -> None:
    loss = Later(4, nn.functional.cross_entropy)  # validation, a step, validation, a step: then it fails
    with pytest.raises(DataError, match="loss raised") as caught:
        trained(loss)
    model = caught.value.result
    assert isinstance(model, nn.Module)
    once = taut.finetune(
        net(),
        None,
        None,
        [(X, Y)],
        [(X, Y)],
        loss=nn.functional.cross_entropy,
        example=EXAMPLE,
        schedule=(Stage(epochs=2, target=-10.0),),
    )
    assert not torch.equal(model[0].weight, net()[0].weight)  # type: ignore[index]
    assert torch.equal(once[0].weight, net()[0].weight)  # type: ignore[index] # the target was reached at once


def test_a_loss_that_fails_loses_no_compressed_model() -> None:
    wish = Finetune([(X, Y)], [(X, Y)], Later(2, nn.functional.cross_entropy), (Stage(epochs=2),))
    with pytest.raises(DataError, match="loss raised") as caught:
        compressed(finetune=wish)
    result = caught.value.result
    assert isinstance(result, taut.Result)
    assert result.comparison.after.params < result.comparison.before.params


TASK = """
import sys
import torch
from torch import nn

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
CALLS = []


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def example():
    return X[:4]

"""


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on a task file of this text; its exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"users_task_{tmp_path.name}"

    def said(body: str, *words: str) -> tuple[int, str]:
        (tmp_path / f"{name}.py").write_text(TASK + body)
        sys.modules.pop(name, None)
        code = run(
            [
                words[0],
                f"{name}:build",
                *words[1:],
                "--task",
                f"{name}.py",
                "--compare",
                "none",
                "--budget",
                "params=0.6",
            ]
        )
        sys.modules.pop(name, None)
        return code, capsys.readouterr().err

    return said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(0)", "ended the program by sys.exit(0)"),
        ("def evaluate(model):\n    sys.exit(0)", "evaluate ended the program by sys.exit(0)"),
        ("def calibration():\n    sys.exit()", "calibration() in the task file"),
        ("def calibration():\n    yield X\n    sys.exit(0)", "the calibration data, asked for batch 1, ended"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("example = 3", "'example' in the task file"),
        ("del example", "must define example()"),
        ("def build():\n    sys.exit(0)", "ended the program by sys.exit(0)"),
    ],
)
def test_nothing_in_a_task_file_ends_in_success(say: Any, body: str, message: str) -> None:
    code, err = say(body, "compress", "--out", "small")
    assert code in {2, 4}
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    assert not Path("small").exists()


def test_the_command_saves_what_was_finished(say: Any) -> None:
    body = "def evaluate(model):\n    CALLS.append(1)\n    return 1 / (2 - len(CALLS))\n"
    code, err = say(body, "compress", "--out", "small")
    assert code == 4
    assert "is saved in small, without its metric" in err
    assert "error: evaluate raised ZeroDivisionError" in err.splitlines()[-1]
    assert taut.load("small", base=net)(EXAMPLE).shape == (4, 3)
    assert sorted(path.name for path in Path("small").iterdir()) == [
        "comparison.json",
        "manifest.json",
        "model.safetensors",
    ]
