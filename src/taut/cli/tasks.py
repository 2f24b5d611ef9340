"""The --task file: what the network is for, as Python functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from taut.core.atomic_folder import recover
from taut.core.progress import stage
from taut.core.user_code import call, named
from taut.errors import CallError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Task:
    """What a task file defines.

    Attributes:
        path: the file.
        example: an input that fixes how the model is called.
        evaluate: the user's metric of a model, higher is better; None if it is not defined.
        calibration: gives batches to calibrate on; `train_loader` of the file where it has no `calibration`.
        train: gives training batches; the file's `train_loader`, else its `calibration`.
        valid: gives validation batches, or None.
        loss: `loss(outputs, targets)`, or None: then the original is distilled.
        mask: `mask(inputs)`, true where a position of a sequence is real, or None: inputs called so say it.
    """

    path: Path
    example: Any
    evaluate: Callable[[nn.Module], object] | None
    calibration: Callable[[], Any] | None
    train: Callable[[], Any] | None = None
    valid: Callable[[], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None

    def data(self) -> Any:
        """The calibration batches, or None if the file defines none.

        Raises:
            DataError: the function raised.
        """
        return None if self.calibration is None else _call(self.calibration, self.path)

    def training(self) -> tuple[Any, Any]:
        """Training data, and what judges: validation batches, else `evaluate`.

        Raises:
            CallError: the file defines neither training data nor a judge.
            DataError: a function raised.
        """
        judge = self.evaluate if self.valid is None else _call(self.valid, self.path)
        if self.train is None or judge is None:
            missing = "train_loader()" if self.train is None else "valid_loader() or evaluate(model)"
            raise CallError(f"Training needs {missing} in '{self.path}'.")
        return _call(self.train, self.path), judge

    def required_evaluate(self, command: str) -> Callable[[nn.Module], object]:
        """The metric.

        Raises:
            CallError: the file does not define one, and `command` cannot do without.
        """
        if self.evaluate is None:
            raise CallError(f"`taut {command}` needs evaluate(model) in '{self.path}': a number, higher is better.")
        return self.evaluate


def require(path: Path) -> None:
    """Find out before all that takes long whether the file is there.

    Raises:
        CallError: it is not.
    """
    recover(path.parent)
    if not path.is_file():
        raise CallError(f"There is no task file '{path}'.")


def read(path: Path) -> Task:
    """Import the file and call its example().

    Raises:
        CallError: there is no such file, or it does not define example().
        DataError: importing it or calling example() raised.
    """
    require(path)
    module = _imported(path)
    example, evaluate = _function(module, path, "example"), _function(module, path, "evaluate")
    calibration = _function(module, path, "calibration") or _function(module, path, "train_loader")
    if example is None:
        raise CallError(f"The task file '{path}' must define example(): return an input of the model.")
    train, valid = _function(module, path, "train_loader"), _function(module, path, "valid_loader")
    loss = _function(module, path, "loss")
    mask = getattr(module, "mask", None)
    mask = mask if callable(mask) else None
    return Task(path, _call(example, path), evaluate, calibration, train or calibration, valid, loss, mask)


def _imported(path: Path) -> ModuleType:
    """The file as a module, under its own name unless another module has it."""
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    name = path.stem if known is None else f"_taut_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise CallError(f"The task file '{path}' must be a Python file (*.py).")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    try:
        with stage(f"Importing {path.name}"), named(f"Importing the task file '{path}'"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, path: Path, name: str) -> Callable[..., Any] | None:
    found = getattr(module, name, None)
    if found is not None and not callable(found):
        raise CallError(f"'{name}' in the task file '{path}' must be a function. Got {type(found).__name__}.")
    return found


def _call(function: Callable[[], Any], path: Path) -> Any:
    return call(f"{getattr(function, '__name__', 'function')}() in the task file '{path}'", function)
