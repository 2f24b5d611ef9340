"""Runs of a network whose channels are labelled: what each of its layers gives and reads.

Every layer that gives channels labels them anew; the labels travel with the tensors through all operations that are
executed (`op_rules`), whatever code calls them; where they arrive at a layer that reads, its columns are noted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.core.tensors import address, all_tensors, all_values, map_tensors, opened, tensors
from taut.errors import ModelError
from taut.nn import Recurrent
from taut.nn.tensor_names import ASKED, LIKE
from taut.structure.channels.classes import Atoms
from taut.structure.channels.heads import Splits
from taut.structure.channels.labels import Labels
from taut.structure.channels.layer_rules import OPAQUE, Sides, computes_as_its_kind, gives_its_own, narrowable, passes
from taut.structure.channels.op_calls import Call, operands
from taut.structure.channels.op_rules import note
from taut.structure.channels.recurrent_rules import follow_recurrent, unpacking
from taut.structure.channels.user_rules import follow, follow_module, watched_functions
from taut.structure.coverage import seeded
from taut.structure.rules import ChannelRule, module_rule, operator_rule
from taut.structure.sameness import few
from taut.structure.surgery import shallow

End = Literal["out", "in", "through"]
"""A layer's rows, its columns, or the values that it holds per channel between others."""

TURNS = frozenset("detach alias t transpose permute numpy_T".split())  # noqa: SIM905
"""Operations that give the same values in another order of axes, whatever the widths are."""

OUTPUT = "they reach the model's output"


def run_labelled(
    model: nn.Module, example: Example, *, tying: bool = True, splits: Splits | None = None
) -> LabelledRuns:
    """Run a copy of a model with labelled channels.

    The example's first samples are run, or all where the model does not run on few; then what takes other paths, and
    noise, since other inputs may take other branches. The negative of the noise is tried where some layer was not
    reached so far.

    Args:
        model: any module; it is not changed.
        example: how it is called.
        tying: whether channels that can only go together are one class, as a `ChannelGroup` needs it; without, a class
            are channels that are the same, one by one, and noise is run for layers that were not reached alone.
        splits: where views that split channels are noted; None: nowhere.

    Raises:
        ModelError: the model cannot be run.
    """
    numbers = len(all_values(example.value)) > len(all_tensors(example.value))
    runs = LabelledRuns(shallow(model), tying=tying, numbers=numbers)
    runs.labels.splits = splits
    for part in dict.fromkeys((few(example), example)):
        try:
            runs.run(part, part.value)
            break
        except ModelError:
            if part is example:
                raise
    for witness in example.paths[1:]:  # the first is the example's
        runs.run(part, witness)
    random = generator(0)
    noise = map_tensors(
        lambda t: torch.randn(t.shape, generator=random).to(t) if t.is_floating_point() else t, part.value
    )
    for probe in (noise, map_tensors(lambda t: -t if t.is_floating_point() else t, noise)):
        if (tying and probe is noise) or runs.unreached():
            with suppress(ModelError):
                runs.run(part, probe)
    if tying and runs.unreached():  # heads that are for training alone
        with suppress(ModelError):
            runs.run(part, part.value, training=True)
    return runs


class _Noting:
    """Labels what the operations outside of known layers make.

    Not written into the mode itself, since torch has `torch._dynamo` look after what a mode defines: a second for its
    import, and some of it at every operation.
    """

    runs: LabelledRuns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and note it."""
        named = kwargs or {}
        output = func(*args, **named)
        if not self.runs.depth:
            inputs = operands((*args, *named.values()))
            self.runs.note_use(func, inputs, operands([output]))
            self.runs.labels.use(inputs)
            rule = operator_rule(func)
            if rule is None:
                note(self.runs.labels, func, args, named, inputs, output)
            else:
                follow(rule, Call(self.runs.labels, func, args, named, inputs, operands([output])))
        return output


class _Dispatch(_Noting, TorchDispatchMode):
    """The mode in which a network is run."""

    def __init__(self, runs: LabelledRuns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.runs = runs


class LabelledRuns:
    """One or several runs of a copy of a model.

    Attributes:
        labels: of the tensors that are alive, and the classes of all channels.
        sides: layer and side -> class of every index.
        layers: by name those whose inside is not looked into, in the order of the model.
        foreign: layers that read channels behind an operation with a tensor from elsewhere: see `Labels.origin`.
        blind: whether a run returned no tensor.
    """

    def __init__(self, copied: nn.Module, *, tying: bool, numbers: bool = False) -> None:
        """Nothing was run yet."""
        self.copied = copied
        self.labels = Labels(Atoms(), (*copied.parameters(), *copied.buffers()), tying=tying, numbers=numbers)
        follows_rules = narrowable if tying else computes_as_its_kind
        self.depth = 0
        self.blind = False
        self.used: set[int] = set()
        self.turned: dict[int, tuple[Tensor, set[int]]] = {}  # views of parameters that nobody has used yet
        self.called: set[str] = set()
        self.foreign: set[str] = set()
        self.owners: dict[int, list[str]] = defaultdict(list)
        self.layers: dict[str, nn.Module] = {}
        self.known: set[str] = set()
        self.ruled: dict[str, ChannelRule] = {}
        self.sides: dict[tuple[str, End], Tensor] = {}
        inside: list[str] = []
        for name, module in copied.named_modules():
            for t in _own(module):
                self.owners[id(t)].append(name)
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            known, rule = follows_rules(module), module_rule(module)
            if rule is not None:
                self.ruled[name] = rule
            if known or rule is not None or isinstance(module, OPAQUE):
                self.layers[name] = module
                self.known |= {name} if known and rule is None else set()
                inside.append(name) if name else None

    def run(self, example: Example, value: Any, *, training: bool = False) -> None:
        """One run, in eval mode or in train mode; what reaches the output stays."""
        splits = self.labels.splits
        handles = [] if splits is None else splits.hooked(self.copied)
        for name, module in self.layers.items():
            handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),  # behind the user's own
                module.register_forward_hook(self._leave(name), prepend=True, with_kwargs=True),
            ]
        self.depth = 0
        try:
            with (
                evaluating(self.copied, training=training),
                seeded(),  # models draw random numbers, in train mode more of them do
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                watched_functions(self.labels, self._inside),
                unpacking(self.labels, self._inside),
                _Dispatch(self),
            ):
                output = example.run(self.copied, value)
        finally:
            for handle in handles:
                handle.remove()
            if splits is not None:
                splits.running.clear()
        # a cache is as wide as what the model puts into it, and is read by the model alone
        returned = all_tensors(opened(output) if self.labels.tying else output)
        self.note_use(None, returned, ())
        self.labels.use(all_tensors(output))
        self.labels.pin(returned, OUTPUT)
        self.blind |= not returned

    def note_use(self, func: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Note of which parameters and buffers an operation uses values; their shape, type and device are free.

        Args:
            func: the operation; None: code that cannot be seen.
            inputs: tensors that it takes.
            outputs: and gives.
        """
        numbers: set[int] = set()
        for t in inputs:
            numbers |= {id(t)} if id(t) in self.owners else self.turned.get(id(t), (t, set[int]()))[1]
        name = "" if func is None else func.overloadpacket.__name__
        if name in TURNS:
            self.turned.update({id(t): (t, numbers) for t in outputs if numbers})
        elif name not in ASKED | LIKE:
            self.used |= numbers

    def _inside(self, deeper: int) -> bool:
        """Go into what is not looked into, or out of it; whether the run is outside of all such then."""
        self.depth += deeper
        return not self.depth

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.note_use(None, all_tensors((args, kwargs)), ())
        self.labels.use(all_tensors((args, kwargs)))
        self.depth += 1

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.depth -= 1
            if not self.depth:
                with torch._C._DisableTorchDispatch():  # labels have none themselves
                    self._left(name, module, args, kwargs, output)

        return hook

    def _left(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What a layer read and gave."""
        self.called.add(name)
        if name in self.ruled:
            sides = Sides(self.labels, self.sides, name)
            follow_module(self.ruled[name], module, sides, (args, kwargs), output)
            return
        if isinstance(module, Recurrent):
            follow_recurrent(module, Sides(self.labels, self.sides, name), (args, kwargs), output)
            return
        if name not in self.known or not args or len(tensors(args)) != 1 or not isinstance(output, Tensor):
            kind = type(module).__name__
            self.labels.pin((args, kwargs), f"they are read by '{name}', a {kind}, which is not made narrower")
            for t in tensors(output):
                self.labels.put(t, None)
                self.labels.come(t, crossed=False)
            return
        origin = self.labels.origin(args[0])
        self.foreign |= {name} if origin else set()
        self.labels.come(output, crossed=origin is not False and not gives_its_own(module))
        passes(module, Sides(self.labels, self.sides, name), args[0], output)

    def unreached(self) -> tuple[str, ...]:
        """Layers that the runs neither called nor used otherwise, under any of the names of what they hold.

        Those are all modules with parameters, and norms that hold statistics alone.
        """
        reached = self.called | self.read_elsewhere()
        held = {address(t) for name in reached for t in _own(self.copied.get_submodule(name))}
        inside = [f"{name}." for name in self.layers if name not in self.known]
        return tuple(
            name
            for name, module in self.copied.named_modules()
            if name not in reached
            and not (module._parameters and all(address(t) in held for t in _own(module)))
            and (module._parameters or name in self.layers)
            and _own(module)
            and not any(name.startswith(outer) for outer in inside)
        )

    def read_elsewhere(self) -> set[str]:
        """Layers of which other code uses a parameter or a buffer."""
        return {name for number in self.used for name in self.owners[number]}

    def sharing(self) -> set[str]:
        """Layers that share the memory of a parameter or of a buffer with another."""
        holders: dict[int, set[str]] = defaultdict(set)
        for name, module in self.copied.named_modules():
            for t in _own(module):
                holders[address(t)].add(name)
        return {name for names in holders.values() if len(names) > 1 for name in names}

    def ruled_classes(self) -> dict[int, set[str]]:
        """Class -> what its channels went through that a rule of the user's describes."""
        ruled: dict[int, set[str]] = defaultdict(set)
        for atoms, name in self.labels.ruled:
            for number in set(self.labels.atoms.roots(atoms).tolist()):
                ruled[number].add(name)
        return ruled

    def classes(self) -> dict[tuple[str, End], Tensor]:
        """Layer and side -> class of every index, now that all runs are done."""
        return {side: self.labels.atoms.roots(atoms) for side, atoms in self.sides.items()}


def _own(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.numel()]
