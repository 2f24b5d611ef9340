"""A recipe: the settings of one compression as a YAML file, to keep beside the model and to run again.

    budget: {macs: 0.25, params: 100000}     # or "macs=0.25,params=100000"
    methods:
      - svd
      - tucker: {metric: fisher}             # or "low rank": what is tried unasked, but channels
    keep: {head: 1, "features.*": 0.5}       # or a list of names, globs and kinds that are left alone
    finetune: {epochs: 5, patience: 2, cascade: false}
    sensitivity: false
    output: logits
    mask: attention_mask
    align: 1
    compare: torch          # what is timed at the end: true (every runtime), torch or false
    seed: 0

A recipe never names code: which model and which task to import stands on the command line only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from taut.core.randomness import check_seed
from taut.core.text import brief
from taut.errors import CallError
from taut.measure.timing import Timing, check_timing
from taut.methods import LOW_RANK, choose
from taut.structure.answers import Wish
from taut.types import Budget, Method, Plan, Schedule, Stage
from taut.types.keep import written_keep

MAX_BYTES = 1 << 20
"""A recipe is written by hand; a larger file is something else."""


@dataclass(frozen=True)
class Training:
    """How the result is trained; the data and the loss are the task's.

    Attributes:
        epochs: of every stage at most. cascade: layer by layer, front to back, instead of all at once.
        control: whether the original is trained equally, to be compared with.
        patience, rate, decay, optimizer, weight_decay, distill: as in `taut.Stage`.
    """

    epochs: int = 3
    cascade: bool = False
    patience: int | None = None
    rate: float = 1e-3
    decay: bool = True
    optimizer: str = "adam"
    weight_decay: float = 0.0
    distill: float | None = None
    control: bool = True

    def __post_init__(self) -> None:
        """Refuse what no stage can mean.

        Raises:
            CallError: a value outside its range.
        """
        self.stage()

    def stage(self) -> Stage:
        """One stage of this training, without steps."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"cascade", "control"}}
        return Stage(**values)

    def schedule(self, plan: Plan) -> Schedule:
        """One stage for all, or one per step."""
        if not self.cascade:
            return (self.stage(),)
        return tuple(replace(self.stage(), steps=(place,), train="above") for place in range(len(plan.steps)))


@dataclass(frozen=True)
class Recipe:
    """What `taut.compress` is asked for.

    Attributes:
        budget: what the result may cost; None where the front is wanted.
        methods: what the planner may use; None for what is tried unasked.
        finetune: how the result is trained; None for not at all.
        output: what of the model's output counts, and how it is read (`taut.observe`).
        mask: name of the input that says which positions are real; None: those that are called so.
        sensitivity: whether damages are measured before planning.
        align: every rank is a multiple of it.
        compare: what is timed at the end; None for what the command does by itself.
        seed: of everything random.
        keep: layers that are left alone, or not below a share; None for none.
    """

    budget: Budget | None = None
    methods: tuple[Method, ...] | None = None
    finetune: Training | None = None
    sensitivity: bool = False
    align: int = 1
    compare: Timing | None = None
    seed: int = 0
    keep: Mapping[str, float] | None = None
    output: str = "auto"
    mask: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a YAML file.

        Raises:
            CallError: no such file, not YAML, an unknown or repeated key, or a value that its dataclass refuses.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise yaml.YAMLError(f"it is larger than {MAX_BYTES} bytes")
            content = yaml.load(text, _Strict)  # noqa: S506 - derives from SafeLoader
        except OSError as error:
            raise CallError(f"The recipe '{path}' cannot be read: {error.strerror}.") from None
        except RecursionError:
            raise CallError(f"The recipe '{path}' is nested too deeply.") from None
        except (yaml.YAMLError, ValueError) as error:
            raise CallError(f"The recipe '{path}' is not valid: {_one_line(error)}") from None
        try:
            return cls.of({} if content is None else content)
        except CallError as error:
            raise CallError(f"In the recipe '{path}': {error}") from None

    @classmethod
    def of(cls, content: Any) -> Recipe:
        """The recipe in the mapping that a YAML file holds.

        Raises:
            CallError: an unknown key, or a value that its dataclass refuses.
        """
        given = _keys(content, "recipe", [f.name for f in fields(cls)])
        budget, methods, seed = given.get("budget"), given.get("methods"), given.get("seed", 0)
        align = given.get("align", 1)
        for key, value in (("seed", seed), ("align", align)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise CallError(f"The '{key}' must be a whole number. Got {brief(value)} instead.")
        check_seed(seed)
        mask = given.get("mask")
        if mask is not None and not isinstance(mask, str):
            raise CallError(f"The 'mask' must be the name of an input. Got {brief(mask)} instead.")
        if given.get("compare") is not None:
            check_timing(given["compare"])
        training, measured = given.get("finetune"), given.get("sensitivity", False)
        if not isinstance(measured, bool):
            raise CallError(f"The 'sensitivity' must be true or false. Got {brief(measured)} instead.")
        return cls(
            budget=None if budget is None else Budget.of(budget),
            methods=None if methods is None else _methods(methods),
            keep=None if given.get("keep") is None else written_keep(given["keep"]),
            finetune=None if training is None else _training(training),
            output=checked(given.get("output", "auto")),
            mask=mask,
            sensitivity=measured,
            align=align,
            compare=given.get("compare"),
            seed=seed,
        )


def checked(output: Any) -> str:
    """What of an output counts, as it is written.

    Raises:
        CallError: it is none of its forms.
    """
    Wish.of(output)
    return str(output)


class _Strict(yaml.SafeLoader):
    """Safe loading without what YAML silently allows: repeated keys, and aliases that grow beyond all memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, (key, (at, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is repeated", at.start_mark)
        return super().construct_mapping(node, deep)


def _training(value: Any) -> Training:
    given = _keys(value, "finetune", [f.name for f in fields(Training)])
    try:
        return TypeAdapter(Training).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("finetune", *(str(part) for part in first["loc"])))
        raise CallError(f"The '{where}' is wrong: {first['msg'].removeprefix('Value error, ')}") from None


def _methods(value: Any) -> tuple[Method, ...]:
    if value != LOW_RANK and (not isinstance(value, list) or not value):
        raise CallError(
            f"The 'methods' must be a list of names or of name: settings, or {LOW_RANK}. Got {brief(value)} instead."
        )
    return choose(value)


def _keys(value: Any, what: str, known: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CallError(f"The {what} must be a mapping of {', '.join(known)}. Got {brief(value)} instead.")
    for key in value:
        if key not in known:
            raise CallError(f"Unknown {what} key '{key}'. Known: {', '.join(known)}.")
    return dict(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
