"""One architecture of families.py in a process of its own: what taut or Torch-Pruning makes of it, as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TAUT_RUNTIMES": "eager"}

import torch
from architectures import ARCHITECTURES, build
from architectures.making import call
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import taut
from taut.measure import rounds
from taut.methods import choose
from taut.planning.plain_form import in_plain_form
from taut.structure.calling import read_example
from taut.structure.channels.groups import coupled

HALF = 0.5
SECONDS = 90
"""Of processor time, so that a busy machine decides nothing."""

rounds.EXTRA_TRIES = 0
"""A busy machine is timed no more often than another: that would use up the seconds, which times are no matter of."""

STEPS = 5
"""Torch-Pruning prunes in as many steps, and stops at half of the multiply-accumulates."""


def line(error: BaseException) -> str:
    """An error in one line."""
    first = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    return f"{type(error).__name__}: {first}"[:400]


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or the error in one line."""
    try:
        return work(), None
    except Exception as error:  # whatever it raises is the finding
        return None, line(error)


def structure(output: Any) -> str:
    """What an output is made of: containers, shapes, types of numbers."""
    leaves, spec = pytree.tree_flatten(output)
    kinds = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
    return f"{spec} {kinds}"


def finite(output: Any) -> bool:
    """Whether every number of an output is."""
    return all(bool(x.isfinite().all()) for x in pytree.tree_leaves(output) if isinstance(x, Tensor))


def alike(a: Any, b: Any) -> bool:
    """Whether two outputs are the same, bit by bit."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return structure(a) == structure(b) and all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Any:
    """The model in eval mode on a copy of the inputs."""
    torch.manual_seed(0)
    return call(model.eval(), pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))


def peak() -> int:
    """Largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024**2 if sys.platform == "darwin" else 1024)


def exported(model: nn.Module, example: Any) -> dict[str, Any]:
    """The worst relative difference in any runtime, or why there is no file."""
    with tempfile.TemporaryDirectory() as folder:
        done, error = attempt(lambda: taut.export(model, example, Path(folder) / "net.onnx"))
    return {"error": error} if done is None else {"worst": max(parity.worst for parity in done.parity)}


def reloaded(result: Any, make: Callable[[], nn.Module], example: Any) -> bool:
    """Whether the saved folder computes the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "small")
        again = taut.load(Path(folder) / "small", base=make)
    return alike(run(again, example), run(result.model, example))


def shares(net: taut.Network, names: Iterable[str]) -> dict[str, float]:
    """The part of the network's cost that the named layers make up."""
    layers = [net[name] for name in set(names)]
    return {
        "macs": round(min(1.0, sum(layer.macs for layer in layers) / max(net.cost.macs, 1)), 4),
        "params": round(min(1.0, sum(layer.params for layer in layers) / max(net.cost.params, 1)), 4),
    }


def reach(model: nn.Module, net: taut.Network) -> dict[str, Any]:
    """Which share of the cost low rank can touch, which one channels, and what the rest is, by kind and reason."""
    methods = choose(None)
    low = [
        layer.name
        for layer in net.layers
        if layer.skip is None and any(method.refuses(net.group([layer.name])) is None for method in methods)
    ]
    groups, error = attempt(lambda: coupled(model, net.example).groups)
    narrowed = {member.layer for group in groups or () for member in group.members} & {n.name for n in net.layers}
    rest: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer in net.layers:
        if layer.name not in low and (layer.macs or layer.params):
            reason = layer.skip or next(filter(None, (m.refuses(net.group([layer.name])) for m in methods)), "")
            rest[layer.kind, general(reason)].append(layer.name)
    blocked: list[dict[str, Any]] = [
        {"kind": kind, "reason": reason, "layers": len(names), **shares(net, names)}
        for (kind, reason), names in rest.items()
    ]
    layers = {layer.name for layer in net.layers}
    return {
        "low_rank": shares(net, low),
        "channels": {**shares(net, narrowed), **({"error": error} if error else {})},
        "outside_layers": {key: round(1 - value, 4) for key, value in shares(net, layers).items()},
        "left_alone": sorted(blocked, key=lambda each: -(each["macs"] + each["params"]))[:6],
    }


def general(reason: str) -> str:
    """A reason without the names of layers, so that like ones are counted together."""
    return "'...'".join(reason.split("'")[::2])


def compressed(model: nn.Module, example: Any, data: list[Any]) -> tuple[Any, str | None]:
    """The result at half of the multiply-accumulates, or the closest one with the reason."""
    try:
        return taut.compress(model, example, budget=taut.Budget(macs=HALF), data=data), None
    except taut.BudgetError as error:
        if error.best is None:
            raise
        return error.best, line(error)


def ours(name: str) -> dict[str, Any]:
    """What taut makes of an architecture."""
    model, example, data = build(ARCHITECTURES[name])
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = [structure(run(model, inputs)) for inputs in (example, *data)]
    before, start = peak(), time.perf_counter()
    done, raised = attempt(lambda: compressed(model, example, data))
    row: dict[str, Any] = {
        "crashed": raised,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": [before, peak()],
    }
    net, error = attempt(lambda: taut.trace(model, example))
    if net is not None:
        row |= {"params": net.cost.params, "macs": net.cost.macs}
        row["reach"], error = attempt(lambda: reach(*in_plain_form(model, net)[:2]))
    row["trace_error"] = error
    if done is None:
        return row
    result, missed = done
    outputs, broke = attempt(lambda: [run(result.model, inputs) for inputs in (example, *data)])
    row |= {"missed": missed, "does_not_run": broke, "steps": len(result.plan.steps)}
    row["unharmed"] = all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    if broke is not None:
        return row
    row["structure_kept"] = [structure(output) for output in outputs] == wanted
    row["finite"] = all(finite(output) for output in outputs)
    row["macs_left"] = round(result.plan.after.macs / max(net.cost.macs, 1), 4) if net and result.plan.after else None
    row["reloads"], row["reload_error"] = attempt(
        lambda: reloaded(result, lambda: build(ARCHITECTURES[name])[0], example)
    )
    row["onnx_before"] = exported(model, example)
    row["onnx"] = exported(result.model, example) if "worst" in row["onnx_before"] else {}
    return row


def ends(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers that make outputs: Torch-Pruning asks for them, or it cuts classes."""
    made: dict[int, nn.Module] = {}
    last: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        last[:] = [module]
        if isinstance(output, Tensor):
            made[output.untyped_storage().data_ptr()] = module

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    outputs = [x for x in pytree.tree_leaves(run(model, example)) if isinstance(x, Tensor) and x.numel()]
    for hook in hooks:
        hook.remove()
    kept = [made[at] for x in outputs if (at := x.untyped_storage().data_ptr()) in made]
    return [*kept, *last]


def theirs(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of it."""
    import torch_pruning as tp  # noqa: PLC0415 - not needed for the other side

    model, example, _ = build(ARCHITECTURES[name])
    call_of = read_example(model, example)
    wanted, ignored = run(model, example), ends(model, example)
    before = taut.measure.count(model, call_of)
    inputs = example if isinstance(example, tuple | dict) else (example,)

    def prune() -> None:
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=tp.importance.MagnitudeImportance(),
            iterative_steps=STEPS,
            ignored_layers=ignored,
        )
        for _ in range(STEPS):
            pruner.step()
            left, broken = attempt(lambda: taut.measure.count(model, call_of).macs)
            if broken or left <= HALF * before.macs:
                return

    start = time.perf_counter()
    _, raised = attempt(prune)
    output, broke = attempt(lambda: run(model, example))
    after, _ = attempt(lambda: taut.measure.count(model, call_of))
    return {
        "crashed": raised,
        "seconds": round(time.perf_counter() - start, 1),
        "does_not_run": broke,
        "structure_kept": broke is None and structure(output) == structure(wanted),
        "finite": broke is None and finite(output),
        "macs_left": None if after is None else round(after.macs / max(before.macs, 1), 4),
        "params_left": None if after is None else round(after.params / max(before.params, 1), 4),
    }


SIDES: dict[str, Callable[[str], dict[str, Any]]] = {"taut": ours, "torch-pruning": theirs}


def main(side: str, name: str) -> None:
    """Print the row as the last line."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))  # the second one kills without a word
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        row = SIDES[side](name)
    row["processor_seconds"] = round(time.process_time(), 1)
    print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
