"""What filter pruning does to sixty architectures: Torch-Pruning's and ours, with one setting for all nets.

.venv/bin/python benchmarks/zoo.py [--nets vgg lenet ...] [--sides taut]

The nets are those of experiments/nets/zoo: small, with random weights, written as people write them; so this is about
what a tool survives, not about accuracy. Torch-Pruning 1.6.1 (pip install --no-deps torch-pruning==1.6.1) runs as its
README does: BasePruner, magnitude importance, pruning_ratio 0.3, the layers that make the outputs ignored, everything
else at its default. It is told nothing more about a net (no num_heads, no rounding), and neither are we. Ours is
`taut.whole(net, "channels", sparsity=0.3, criterion="l2")` without calibration data, and is not told where the outputs
are; `stays` lists which layers' channels it left, and why.

Every run has a fresh net and a process of its own; no time is measured. With --sides the rows of the other sides stay
those of the results file. Afterwards the net that its owner is left with is judged:

    cut        fewer parameters; runs backward, and forward on the example, its first sample and its negative; outputs
               of the same structure and shapes
    nothing    it runs, and as many parameters are there as before
    refused    an error, and the net is bit for bit as before
    grown      no error, and more parameters than before, as when weights that were shared no longer are
    broken     no error, but the net no longer runs or its outputs have other shapes
    half-cut   an error, and the net has changed or no longer runs

`as_masked` looks into the nets that are cut: the largest difference, as a share of the largest output, to the original
net with zeros where a weight or bias is gone. It is rounding where every channel is gone from all its places at once,
and large where a remaining weight meets a channel that it does not belong to. Where a cut also changes what the rest
computes (a norm, mean or maximum over channels, a scale by their number) the two are not comparable, nor where a tool
computes new weights; then it is null.

ONNX is `taut.export`: batches of 64 and 1 in ONNX Runtime and OpenVINO within 1e-4 of torch's largest output. Not every
net can be exported even before; the rows `unchanged` say which.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import taut
from taut.artifact.exporting import LIMIT
from taut.core.modes import quiet
from taut.core.tensors import map_tensors
from taut.methods import METHODS
from taut.planning.application import apply_plan
from taut.studies import Bound

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "nets"))

from zoo import ENDS, ZOO, call  # noqa: E402 - found through the line above: experiments are no package

RATIO = 0.3
SECONDS = 300
OVER_CHANNELS = ("alexnet", "cbam", "tied_gpt")
"""Nets that mix channels by more than weights: neighbours, mean and maximum, a scale by their number."""
MISWIRED = 1e-3
Changed = tuple[nn.Module, dict[str, list[str]]]
"""The net, and why layers stay: reason -> their names."""
Change = Callable[[str, nn.Module, Any], Changed]


def unchanged(name: str, model: nn.Module, example: Any) -> Changed:  # noqa: ARG001 - as the others
    """The net itself, for what is possible before anything is cut."""
    return model, {}


def peer(name: str, model: nn.Module, example: Any) -> Changed:
    """Torch-Pruning, in place."""
    import torch_pruning as tp  # noqa: PLC0415 - not needed for the other sides

    pruner = tp.pruner.BasePruner(
        model,
        (example,) if isinstance(example, Tensor) else example,  # it would take the samples of a tensor for arguments
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=RATIO,
        ignored_layers=[model.get_submodule(end) for end in ENDS[name]],
    )
    pruner.step()
    return model, {}


def ours(name: str, model: nn.Module, example: Any) -> Changed:  # noqa: ARG001 - as the others
    """A new net by taut's filter pruning, by the norm of the filters as the peer."""
    net = taut.trace(model, example)
    step = taut.whole(net, "channels", sparsity=RATIO, criterion="l2")
    with quiet():  # as taut.apply, of which the reasons would be lost
        small, plan = apply_plan(model, taut.Plan((step,)), taut.observe(net, model))
    stays: dict[str, list[str]] = {}
    for kept in plan.kept:
        stays.setdefault(kept.reason, []).append(kept.layer)
    for layer in net.layers:
        if layer.name not in step.layers:
            stays.setdefault(str(layer.skip), []).append(layer.name)
    return small, stays


SIDES: dict[str, Change] = {
    "unchanged": unchanged,
    "torch-pruning": peer,
    "taut": ours,
}


def line(error: BaseException) -> str:
    """An error in one line."""
    first = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def shapes(output: Any) -> str:
    """Structure and shapes of an output, to compare."""
    leaves, structure = pytree.tree_flatten(output)
    return f"{structure} {[tuple(leaf.shape) for leaf in leaves]}"


def bits(model: nn.Module) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Names, shapes and values of everything in a net."""
    return [(name, tuple(t.shape), t.detach().numpy().tobytes()) for name, t in model.state_dict().items()]


def parameters(model: nn.Module) -> int:
    """How many numbers are trained; shared ones once."""
    return sum(p.numel() for p in model.parameters())


def tried(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or the error in one line."""
    try:
        return work(), None
    except Exception as error:  # whatever it raises is the finding
        return None, line(error)


def forward_backward(model: nn.Module, example: Any) -> str:
    """Run both ways in eval mode, and on what a user may also send; structure and shapes of the outputs."""
    with torch.no_grad():
        for other in (lambda t: t[:1], lambda t: -t if t.is_floating_point() else t):  # the sign decides in data_branch
            call(model.eval(), map_tensors(other, example))
    output = call(model, example)
    sum(leaf.float().square().sum() for leaf in pytree.tree_leaves(output)).backward()
    model.zero_grad()
    return shapes(output)


def exported(model: nn.Module, example: Any) -> dict[str, Any]:
    """The worst relative difference in any runtime, or why there is no file."""
    with tempfile.TemporaryDirectory() as folder:
        done, error = tried(lambda: taut.export(model, example, Path(folder) / "net.onnx"))
    return {"error": error} if done is None else {"worst": max(p.worst for p in done.parity), "error": None}


def as_masked(name: str, left: nn.Module) -> float | None:
    """How far a cut net is from the original with zeros for what is gone; None where that says nothing."""
    model, example = ZOO[name]()
    kept = dict(left.named_parameters())
    norms = [each for each, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    narrowed = any(kept[f"{each}.weight"].shape != model.get_parameter(f"{each}.weight").shape for each in norms)
    if narrowed or name in OVER_CHANNELS:
        return None
    with torch.no_grad():
        for each, whole in model.named_parameters():
            if whole.shape != kept[each].shape:
                if not torch.isin(kept[each], whole).all():
                    return None
                whole.mul_(torch.isin(whole, kept[each]))  # the weights are random: a value is its place
        pairs = zip(pytree.tree_leaves(call(model, example)), pytree.tree_leaves(call(left, example)), strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def judged(name: str, side: str) -> dict[str, Any]:
    """One net, one side: what it did, and what the owner of the net is left with."""
    model, example = ZOO[name]()
    before, size = bits(model), parameters(model)
    wanted = shapes(call(model, example))
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        changes, raised = tried(lambda: SIDES[side](name, model, example))
        if raised and side == "taut" and "channels" not in METHODS:
            return {"net": name, "side": side, "verdict": "not available", "raised": raised}
        left, stays = changes or (model, {})
        found, broke = tried(lambda: forward_backward(left, example))
        after, changed = parameters(left), bits(model) != before
        word = verdict(raised, broke, harmed=changed or broke is not None, kept=found == wanted, grew=after - size)
        masked = tried(lambda: as_masked(name, left)) if word == "cut" else (None, None)
        onnx = exported(left, example) if word == "cut" or side == "unchanged" else {}
    return {
        "net": name,
        "side": side,
        "verdict": word,
        "raised": raised,
        "does_not_run": broke,
        "outputs_kept": found == wanted,
        "params": [size, after],
        "stays": stays,
        "as_masked": masked[0],
        "onnx": onnx,
        "warned": sorted({line(each.message) for each in told if each.category is UserWarning})[:3],
    }


def verdict(raised: str | None, broke: str | None, *, harmed: bool, kept: bool, grew: int) -> str:
    """One word; the module says what it means."""
    if raised:
        return "half-cut" if harmed else "refused"
    if broke or not kept:
        return "broken"
    return "cut" if grew < 0 else "grown" if grew else "nothing"


def measured(name: str, side: str) -> dict[str, Any]:
    """The same in a process of its own."""
    run = [sys.executable, __file__, "--child", name, side]
    try:
        done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"net": name, "side": side, "verdict": "broken", "raised": f"not done after {SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"net": name, "side": side, "verdict": "broken", "raised": f"exit code {done.returncode}: {last}"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def stored(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a results file by net and side."""
    return {(row["net"], row["side"]): row for row in json.loads(path.read_text())["results"]["rows"]}


def printed(row: dict[str, Any]) -> str:
    """One line of the table."""
    params = "{:>7,} -> {:>7,}".format(*row["params"]) if "params" in row else ""
    onnx = row.get("onnx", {})
    parity = f"{onnx['worst']:.0e}" if "worst" in onnx else "no" if onnx else ""
    masked = "" if row.get("as_masked") is None else f"{row['as_masked']:.0e}"
    reason = row["raised"] or row.get("does_not_run") or onnx.get("error") or ""
    return f"{row['net']:18s} {row['side']:14s} {row['verdict']:14s} {params:19s} {masked:6s} {parity:6s} {reason[:99]}"


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For each side: nets by verdict; exports; nets compared with the masked original, and how many differ."""
    found: dict[str, dict[str, int]] = {}
    exportable = {row["net"] for row in rows if row["side"] == "unchanged" and "worst" in row.get("onnx", {})}
    for side in SIDES:
        mine = [row for row in rows if row["side"] == side]
        cut = [row for row in mine if row["verdict"] == "cut" and row["net"] in exportable]
        apart = [row["as_masked"] for row in mine if row.get("as_masked") is not None]
        found[side] = {
            **Counter(row["verdict"] for row in mine),
            "exported": sum("worst" in row.get("onnx", {}) for row in mine),
            "export_lost": sum("worst" not in row["onnx"] for row in cut),
            "compared": len(apart),
            "miswired": sum(each > MISWIRED for each in apart),
        }
    return found


def bounds(found: dict[str, dict[str, int]]) -> list[Bound]:
    """Of our side, once it is there."""
    mine, theirs = found["taut"], found["torch-pruning"]
    if "not available" in mine:
        return []
    harmed = sum(mine.get(word, 0) for word in ("broken", "half-cut", "grown", "miswired"))
    return [
        Bound("zoo: nets left broken, half-cut, grown or miswired", 0, harmed, at_most=True),
        Bound("zoo: nets that raise an error", 0, mine.get("refused", 0), at_most=True),
        Bound("zoo: nets cut, at least as many as by Torch-Pruning", theirs.get("cut", 0), mine.get("cut", 0)),
        Bound("zoo: nets that could be exported before, but not cut", 0, mine["export_lost"], at_most=True),
    ]


def main() -> None:
    """All nets and sides; write results/zoo.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=list(ZOO), default=list(ZOO), help="only these")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="measure only these again")
    parser.add_argument("--child", nargs=2, metavar=("NET", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(judged(*args.child)))
        return
    whole = len(args.nets) == len(ZOO)
    path = ROOT / "benchmarks" / "results" / ("zoo.json" if whole else "zoo-reduced.json")
    known = {} if set(args.sides) == set(SIDES) else stored(path)
    rows = []
    for name in args.nets:
        for side in SIDES:
            rows.append(measured(name, side) if side in args.sides else known[name, side])
            print(printed(rows[-1]), flush=True)
    found = counts(rows)
    for side, numbers in found.items():
        print(f"{side:14s} {', '.join(f'{word}: {many}' for word, many in numbers.items())}")
    settings = {"ratio": RATIO, "onnx_limit": LIMIT, "seconds": SECONDS, "nets": len(args.nets)}
    finish(path, settings, {"counts": found, "rows": rows}, bounds(found) if whole else [])


if __name__ == "__main__":
    main()
