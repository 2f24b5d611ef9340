"""MODEL on the command line: a factory to import, or a folder that taut saved."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.core.atomic_folder import present, recover
from taut.core.user_code import named
from taut.errors import ArtifactError, CallError, ModelError, TautError

if TYPE_CHECKING:
    from torch import Tensor, nn

NESTED = ("state_dict", "model_state_dict", "model")
"""Where training scripts keep the state dict inside a checkpoint."""


def load(spec: str, weights: Path | None = None, base: str | None = None) -> nn.Module:
    """The model that MODEL, --weights and --base name, in eval mode.

    Raises:
        CallError: there is no such factory, folder or file, or the options do not go together.
        ModelError: the factory raised.
        ArtifactError: the weights or the folder are damaged, refused, or do not fit.
    """
    require(spec, weights, base)
    if is_folder(spec) and base is not None:
        build = factory(base)
        from taut.artifact import checkpoint

        return checkpoint.load(spec, base=build)
    model = factory(spec)()
    if weights is not None:
        fill(model, weights)
    return model.eval()


def require(spec: str, weights: Path | None = None, base: str | None = None) -> None:
    """Find out before all that takes long whether what is named can be there.

    Raises:
        CallError: there is no such folder or file, or the options do not go together.
    """
    if is_folder(spec):
        if base is None:
            raise CallError(f"'{spec}' is a folder: --base package.module:factory must say what builds its original.")
        if weights is not None:
            raise CallError(f"--weights belongs to a factory; the folder '{spec}' holds its own weights.")
    else:
        top = _divided(spec)[0].partition(".")[0]
        _search_here()
        if not top or (top not in sys.modules and importlib.util.find_spec(top) is None):
            raise CallError(f"There is no module '{top}' here or among the installed packages.")
    if weights is not None:
        recover(weights.parent)
        if not weights.is_file():
            raise CallError(f"There is no weights file '{weights}'.")


def is_folder(spec: str | Path) -> bool:
    """Whether it is a folder, once what a killed `save` had set aside is back in its place."""
    from taut.artifact.manifest import OURS

    return present(spec, OURS)


def _divided(spec: str) -> tuple[str, str]:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise CallError(f"MODEL must be package.module:factory or an existing folder that taut saved. Got '{spec}'.")
    return module_name, name


def factory(spec: str) -> Callable[[], nn.Module]:
    """A function that builds the network `package.module:name`, checked to return one.

    Raises:
        CallError: no such module or name, or it is neither a network nor something to call.
        ModelError: importing the module raised.
    """
    module_name, name = _divided(spec)
    module = _imported(module_name)
    try:
        found: Any = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise CallError(f"The module '{module_name}' has no '{name}'.") from None
    from torch import nn

    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    if not callable(found):
        raise CallError(f"'{spec}' must be a function or class that returns a network. Got {type(found).__name__}.")
    return lambda: _built(spec, found)


def _search_here() -> None:
    """Modules of the current folder are found, too."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _imported(name: str) -> Any:
    _search_here()
    try:
        with _exits_named(name):
            return importlib.import_module(name)
    except TautError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ModelError(f"Importing '{name}' failed: {error}.") from error
        raise CallError(f"There is no module '{error.name}' here or among the installed packages.") from None
    except Exception as error:
        raise ModelError(f"Importing '{name}' failed: {type(error).__name__}: {error}") from error


@contextmanager
def _exits_named(name: str) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise ModelError(f"Importing '{name}' ended the program by sys.exit({error.code!r}).") from error


def _built(spec: str, build: Callable[[], Any]) -> nn.Module:
    with named(f"The factory '{spec}'", ModelError):
        model = build()
    from torch import nn

    if not isinstance(model, nn.Module):
        raise CallError(f"The factory '{spec}' must return a torch.nn.Module. Got {type(model).__name__}.")
    return model


def fill(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into `model`.

    Raises:
        CallError: there is no such file.
        ArtifactError: it is damaged, would run code, or does not fit; the first names that differ are given.
    """
    from torch import nn

    weights = _state_dict(_read(path), path)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")  # left by DataParallel
    own = model.state_dict()
    tied = {own[key].data_ptr() for key in own if key in weights}
    try:
        absent, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"The weights '{path}' do not fit the model: {last}") from None
    # safetensors stores a tied weight once
    missing = [key for key in absent if own[key].data_ptr() not in tied]
    for keys, what in ((missing, "lack"), (unexpected, "hold keys that the model does not have:")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ArtifactError(
                f"The weights '{path}' do not fit the model: they {what} {', '.join(map(repr, keys[:3]))}{more}."
            )


def _read(path: Path) -> Any:
    recover(path.parent)
    if not path.is_file():
        raise CallError(f"There is no weights file '{path}'.")
    import safetensors.torch
    import torch

    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(action="ignore"):  # it warns of the same things that it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"The weights '{path}' are refused: the file holds Python objects that are not tensors, and reading them "
            "could run code. Save torch.save(model.state_dict(), ...) or a .safetensors file."
        ) from None
    except Exception as error:
        raise ArtifactError(f"The weights '{path}' cannot be read: {type(error).__name__}: {error}") from None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    from torch import Tensor

    inner = content
    if isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise ArtifactError(f"The weights '{path}' are no state dict: a mapping of names to tensors is expected.")
    return dict(inner)
