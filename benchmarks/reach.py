"""What of the layers that tools leave alone is within reach: attention, recurrent layers, experts, tables, their kin.

.venv/bin/python -m pip install --no-deps --target DIR -r benchmarks/families.txt
PYTHONPATH=DIR .venv/bin/python benchmarks/reach.py [--only hf/T5 ...] [--redo]

Every network in a process of its own; finished rows are kept in results/reach.jsonl, and only missing ones, and those
that crashed, are run.

    true size  share of the MACs, by shapes (architectures/true_size.py), in layers that low rank takes, that channels
               narrow, that one of both does; outside of layers, in products of activations (queries and keys: what a
               module without a matrix of its own multiplies); and in layers that neither takes, and why. Where low rank
               and channels take less than 90 %: how much of what lies outside falls with the channels, as products of
               heads that go. Where two blocks stand for all, theirs count as often as there are blocks
    macs       the small network of families.py at half of its MACs, of every layer a quarter of the weights kept at
               least (`keep={"*": 0.25}`): what is left, the smallest share of a layer's full rank or width, whether
               the output has the same structure, whether the saved folder computes the same bits, the worst difference
               of the ONNX file, and that of the scores that `generate` gives with its cache of keys and values and
               without
    params     the same at half of its parameters, where the MACs do not come down so far
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TAUT_RUNTIMES": "eager"}

import torch
from architectures import ARCHITECTURES, build
from architectures.true_size import ARCHITECTURES as TRUE_SIZE
from architectures.true_size import BLOCKS, EXPORTED, MADE
from ending import finish
from families import versions
from family import attempt, exported, reloaded, run, structure
from torch import nn

import taut
from taut.methods import METHODS, choose, resolve
from taut.methods.channels.heads import with_heads
from taut.methods.narrow_layers import sizes_of
from taut.planning.narrowing import narrow
from taut.planning.plain_form import in_plain_form
from taut.planning.plan import narrowing_step
from taut.studies import Bound, run_grid
from taut.studies.grid import cells

HERE = Path(__file__).parent
ROWS, RESULTS = HERE / "results" / "reach.jsonl", HERE / "results" / "reach.json"
EIGHTH, REACHED, LIMIT = 1 / 8, 0.9, 1e-4
KEPT = {"*": 0.25}
TOKENS, MATRIX = 8, 2
BLOCK = re.compile(r"\blayers\.\d+\.")
NAMED = {"own/DCGAN (ConvTranspose)", "hf/GPT-2 (Conv1D)", "hf/T5", "hf/Whisper", "hf/Mixtral (MoE)"}
LEAST_GENERATING = 4
"""GPT-2, T5, Whisper and Mixtral."""

SMALL = ARCHITECTURES | EXPORTED

Row = dict[str, Any]


def reach(name: str) -> Row:
    """Shares of the MACs at true size."""
    torch.manual_seed(0)
    model, sample = TRUE_SIZE[name]()
    model.eval()
    example = sample(2)
    model, net = in_plain_form(model, taut.trace(model, example))[:2]
    methods = choose(None)
    aside = {reason for method in methods for reason in getattr(method, "of_their_own", ())}
    groups = [net.group([layer.name]) for layer in net.layers if layer.skip is None or layer.skip in aside]
    taken = [each for each in (*groups, *net.tied) if any(method.refuses(each) is None for method in methods)]
    low = {name for each in taken for name in each.names}
    coupling = with_heads(model, net.example)
    narrowed = {member.layer for group in coupling.groups for member in group.members}
    often = BLOCKS.get(name, MADE) / MADE
    macs = {n.name: n.macs * (often if BLOCK.search(n.name) else 1.0) for n in net.layers}
    own = {layer.name for layer in net.layers if _multiplies_no_weight(model.get_submodule(layer.name), layer.skip)}
    outside = often * (net.cost.macs - sum(layer.macs for layer in net.layers)) + sum(macs.pop(name) for name in own)
    whole = sum(macs.values()) + outside

    def share(names: set[str]) -> float:
        return round(sum(value for key, value in macs.items() if key in names) / whole, 4)

    shares = {"low_rank": share(low), "channels": share(narrowed), "either": share(low | narrowed)}
    fall = falling(model, net, outside / often) if shares["either"] < REACHED else None
    heavy = [name for name, n in macs.items() if n > 0.005 * whole and name not in low | narrowed]
    rest = {name: net[name].skip or coupling.stays.get(name) for name in heavy}
    beside = {
        "outside": round(outside / whole, 4),
        "falls": fall,
        "neither": share(macs.keys() - low - narrowed),
        "why": rest,
    }
    return {"params_made": net.cost.params, "macs": round(whole), **shares, **beside}


def falling(model: nn.Module, net: taut.Network, outside: float) -> float:
    """The share of MACs outside of layers that falls with the channels: twice what goes with half of each group."""
    halved = narrowing_step(net, METHODS["channels"](criterion="l2", even=True), sparsity=0.5)
    narrowed = narrow(model, halved, taut.observe(net, model))
    if narrowed is None or not outside:
        return 0.0
    before, after = net.cost.macs, narrowed.stats.network.cost.macs
    fell = (before - after) - (narrowed.step.before.macs - narrowed.step.after.macs)
    return round(min(1.0, 2 * fell / outside), 4)


def _multiplies_no_weight(module: nn.Module, skip: str | None) -> bool:
    """Whether what a module computes itself are products of activations: it holds no matrix."""
    return skip is not None and all(p is None or p.ndim < MATRIX for p in module._parameters.values())


def smallest_share(plan: taut.Plan) -> float:
    """The smallest share of its full rank or width that steps leave a layer, one after the other."""
    left: dict[str, float] = defaultdict(lambda: 1.0)
    for step in plan.steps:
        method, group = resolve(step), step.group
        if group is None or getattr(method, "exact", False):
            continue
        if step.method == "channels":
            flat: Any = step.settings["widths"]
            for layer, sizes in zip(group.layers, zip(flat[::2], flat[1::2], strict=True), strict=True):
                pairs = zip(sizes, sizes_of(layer), strict=True)
                left[layer.name] *= min((now / was for now, was in pairs if was > 1), default=1.0)
            continue
        full = vars(method.exact_case(group)[0])  # type: ignore[index]
        shares = [step.settings[key] / full[key] for key in full if key.startswith("rank") and step.settings[key]]
        for name in step.layers:
            left[name] *= min(shares)  # of a method without ranks nothing is known: the row crashes
    return min(left.values(), default=1.0)


def half(name: str, unit: str) -> Row:
    """The small network at half of its MACs or parameters."""
    model, example, data = build(SMALL[name])
    wanted = structure(run(model, example))
    budget = taut.Budget(**{unit: 0.5})
    try:
        result, missed = taut.compress(model, example, budget=budget, data=data, keep=KEPT), None
    except taut.BudgetError as error:
        if error.best is None:
            return {"missed": str(error)[:300]}
        result, missed = error.best, str(error)[:300]
    before, after = result.plan.before, result.plan.after
    row = {"left": round(getattr(after, unit) / getattr(before, unit), 4), "missed": missed}
    row |= {"smallest_share": smallest_share(result.plan), "structure": structure(run(result.model, example)) == wanted}
    row["reloads"], row["reload_error"] = attempt(lambda: reloaded(result, lambda: build(SMALL[name])[0], example))
    row["onnx_before"] = exported(model, example)
    row["onnx"] = exported(result.model, example) if "worst" in row["onnx_before"] else {}
    row["cache"] = {"before": cached(model, example), "after": cached(result.model, example)}
    return row


def cached(model: nn.Module, example: Any) -> Row | None:
    """The worst relative difference of scores that `generate` gives with its cache and without; None: it has none."""
    generate = getattr(model, "generate", None)
    if generate is None or not getattr(model, "can_generate", lambda: False)():
        return None
    inputs = {key: value for key, value in example.items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def scores(use_cache: bool) -> torch.Tensor:
        out = generate(**inputs, **settings, use_cache=use_cache, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits)

    both, error = attempt(lambda: (scores(True), scores(False)))
    return {"error": error} if both is None else {"worst": float((both[0] - both[1]).abs().max() / both[1].abs().max())}


PARTS = ("true size", "macs")


def measured(cell: Row) -> Row:
    """A row, from a process of its own."""
    run_alone = [sys.executable, __file__, "--row", cell["net"], cell["part"]]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    start = time.perf_counter()
    done = subprocess.run(run_alone, capture_output=True, text=True, check=False, env=os.environ | threads)
    lines = done.stdout.strip().splitlines()
    last = (done.stderr.strip().splitlines() or [""])[-1]
    row: Row = {"crashed": f"exit code {done.returncode}: {last}"[:400]} if done.returncode else json.loads(lines[-1])
    row["whole_seconds"] = round(time.perf_counter() - start, 1)
    print(cell["net"], cell["part"], {key: value for key, value in row.items() if key != "left"}, flush=True)
    return row


def one(name: str, part: str) -> None:
    """Print the row as the last line."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        row = reach(name) if part == "true size" else half(name, part)
    print(json.dumps(row, allow_nan=False))


def meets(row: Row) -> bool:
    """Whether a network is at half, and no layer below an eighth of its full rank or width."""
    return bool(row.get("left", 1) <= 0.5 and row.get("smallest_share", 0) >= EIGHTH)


def bounds(rows: list[Row]) -> list[Bound]:
    """Of every family: what is reached of it, and what half of it is."""
    true = [row for row in rows if row["part"] == "true size"]
    halves = [row for row in rows if row["part"] != "true size"]
    within = sum(row.get("either", 0) + row.get("outside", 0) * (row.get("falls") or 0) >= REACHED for row in true)
    of_layers = sum(row.get("either", 0) >= REACHED * (1 - row.get("outside", 0)) for row in true)
    met = {row["net"] for row in halves if meets(row)}
    broken = [row for row in halves if not (row.get("structure") and row.get("reloads"))]
    exported = {row["net"] for row in halves if _same(row.get("onnx_before")) and _same(row.get("onnx"))}
    lost = [row for row in halves if "worst" in row.get("onnx_before", {}) and not _same(row["onnx"])]
    generate = [row["cache"] for row in halves if (row.get("cache") or {}).get("before") is not None]
    agree = sum(_same(cache["before"]) and _same(cache["after"]) for cache in generate)
    return [
        Bound("reach: families with 90 % of the MACs within reach, at true widths", len(true), within),
        Bound("reach: the same of the MACs of layers, without products of queries and keys", len(true), of_layers),
        Bound("reach: families at half, keep=1/4 of the weights, no layer below an eighth", len(TRUE_SIZE), len(met)),
        Bound("reach: crashed, structures or bits changed", 0, len(broken), at_most=True),
        Bound("reach: ONNX files of DCGAN, GPT-2, T5, Whisper, Mixtral that agree", len(NAMED), len(exported & NAMED)),
        Bound("reach: ONNX files lost", 0, len(lost), at_most=True),
        Bound("reach: networks that generate, the same scores with a cache", len(generate), agree),
        Bound("reach: such networks", LEAST_GENERATING, len(generate)),
    ]


def _same(found: Row | None) -> bool:
    return (found or {}).get("worst", 1.0) <= LIMIT


def kept(mark: str, again: list[str], parts: list[str]) -> None:
    """Forget rows that crashed, that other versions made, or that are to run again."""
    if ROWS.exists():
        rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
        rows = [row for row in rows if row["mark"] == mark and "crashed" not in row["results"]]
        rows = [r for r in rows if r["settings"]["net"] not in again or r["settings"]["part"] not in parts]
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """All rows; write results/reach.json where none is left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TRUE_SIZE), default=list(TRUE_SIZE), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--redo", action="store_true", help="run again what is there already")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        one(*args.row)
        return
    libraries = versions()
    mark = json.dumps(libraries | {"keep": KEPT, "tokens": TOKENS}, sort_keys=True)
    kept(mark, args.only if args.redo else [], args.parts)
    rows = run_grid(cells(net=args.only, part=args.parts), measured, ROWS, "networks", mark)
    missed = [row["net"] for row in rows if row["part"] == "macs" and not meets(row)]
    rows += run_grid(cells(net=missed, part=["params"]), measured, ROWS, "networks", mark) if missed else []
    if len(args.only) == len(TRUE_SIZE) and len(args.parts) == len(PARTS):
        settings = {"keep": KEPT, "tokens": TOKENS, "blocks": BLOCKS, "libraries": libraries}
        finish(RESULTS, settings, {"rows": rows}, bounds(rows))


if __name__ == "__main__":
    main()
