"""Why tables, transposed convolutions and layers of one weight stay that methods of their own might rewrite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.structure.support import COMPUTED_WITH, SHARED_WEIGHT, SHARED_WITH_OTHERS, SIZED, TABLE_READ, TRANSPOSED_KINDS
from taut.structure.surgery import shallow


def in_their_words(model: nn.Module, used: Mapping[str, str]) -> dict[str, str]:
    """Why layers are used otherwise, for embeddings with what to do in place of it."""
    told = {}
    for name, reason in used.items():
        read = isinstance(model.get_submodule(name), nn.Embedding) and reason == _computed_with(name)
        told[name] = TABLE_READ.format(name=name) if read else reason
    return told


def _computed_with(name: str) -> str:
    return COMPUTED_WITH.format(attribute="weight", name=name)


def sized(model: nn.Module, example: Example, names: Collection[str], paths: Sequence[Any]) -> dict[str, str]:
    """Why transposed convolutions stay that are called with the size of their output on some input."""
    copied, found = shallow(model), dict[str, str]()
    convs = [name for name in names if isinstance(model.get_submodule(name), TRANSPOSED_KINDS)]
    with _noting(copied, convs, found), evaluating(copied):
        for inputs in paths if convs else ():
            example.run(copied, inputs)
    return found


@contextmanager
def _noting(model: nn.Module, names: Sequence[str], found: dict[str, str]) -> Iterator[None]:
    def noted(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            if size is not None:
                found[name] = SIZED

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(noted(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_with_others(model: nn.Module, reasons: Mapping[str, str]) -> dict[str, str]:
    """Why embeddings and linear layers stay whose weight something of another kind holds, too."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    start, found = SHARED_WEIGHT.partition("'")[0], {}
    for name, reason in reasons.items():
        module = model.get_submodule(name)
        if not reason.startswith(start) or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        for other in owners[id(module.weight)]:
            holder = model.get_submodule(other)
            if not isinstance(holder, nn.Embedding | nn.Linear):
                found[name] = SHARED_WITH_OTHERS.format(name=other or "(model)", kind=type(holder).__name__)
    return found
