"""What of the layers that tools leave alone is within reach: attention, recurrent layers, experts, tables, their kin.

.venv/bin/python -m pip install --no-deps --target DIR -r benchmarks/families.txt
PYTHONPATH=DIR .venv/bin/python benchmarks/reach.py [--only hf/T5 ...] [--redo]

Every network in a process of its own; finished rows are kept in results/reach.jsonl, and only missing ones are run.

    true size  share of the MACs, by shapes (architectures/true_size.py), in layers that low rank takes, that channels
               narrow, that one of both does; in products of activations, as of queries and keys, which shrink with the
               heads; and in neither
    macs       the small network of families.py at half of its MACs, of every layer a quarter of the weights kept at
               least (`keep={"*": 0.25}`): what is left, the smallest share of a layer's full rank or width, whether
               the output has the same structure, whether the saved folder computes the same bits, and the worst
               difference of the ONNX file
    params     the same at half of its parameters, where the MACs do not come down so far
    cache      whether `generate` writes the same tokens with its cache of keys and values and without
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TAUT_RUNTIMES": "eager"}

import torch
from architectures import ARCHITECTURES, build
from architectures.true_size import ARCHITECTURES as TRUE_SIZE
from ending import finish
from families import versions
from family import attempt, exported, reloaded, run, structure
from torch import nn

import taut
from taut.methods import choose, resolve
from taut.methods.factorization import Factorization
from taut.planning.plain_form import in_plain_form
from taut.structure.channels.groups import coupled
from taut.studies import Bound, run_grid
from taut.studies.grid import cells

HERE = Path(__file__).parent
ROWS, RESULTS = HERE / "results" / "reach.jsonl", HERE / "results" / "reach.json"
EIGHTH, REACHED, LIMIT = 1 / 8, 0.9, 1e-4
KEPT = {"*": 0.25}
TOKENS = 8

Row = dict[str, Any]


def reach(name: str) -> Row:
    """Shares of the MACs at true size."""
    torch.manual_seed(0)
    model, sample = TRUE_SIZE[name]()
    model.eval()
    example = sample(2)
    model, net = in_plain_form(model, taut.trace(model, example))[:2]
    methods = choose(None)
    own = {reason for method in methods for reason in getattr(method, "of_their_own", ())}
    groups = [net.group([layer.name]) for layer in net.layers if layer.skip is None or layer.skip in own]
    taken = [each for each in (*groups, *net.tied) if any(method.refuses(each) is None for method in methods)]
    low = {name for each in taken for name in each.names}
    narrow = {member.layer for group in coupled(model, net.example).groups for member in group.members}
    whole = net.cost.macs

    def share(names: set[str]) -> float:
        return round(sum(layer.macs for layer in net.layers if layer.name in names) / whole, 4)

    either = share(low | narrow)
    products = round(1 - sum(layer.macs for layer in net.layers) / whole, 4)
    rest = {n.name: n.skip for n in net.layers if n.macs > 0.005 * whole and n.name not in low | narrow}
    shares = {"low_rank": share(low), "channels": share(narrow), "either": either, "products": products}
    return {
        "params": net.cost.params,
        "macs": whole,
        **shares,
        "neither": round(1 - either - products, 4),
        "left": rest,
    }


def smallest_share(plan: taut.Plan) -> float:
    """The smallest share of its full rank or width that a step leaves a layer."""
    shares = [1.0]
    for step in plan.steps:
        method = resolve(step)
        if isinstance(method, Factorization) and not method.exact and step.group is not None:
            full = method.exact_case(step.group)
            most = {} if full is None else vars(full[0])
            shares += [step.settings[key] / most[key] for key in most if key.startswith("rank") and step.settings[key]]
        elif step.method == "channels" and step.group is not None:
            for layer, widths in zip(step.group.layers, step.settings["widths"], strict=True):
                shares += [now / was for now, was in zip(widths, layer.weight, strict=False) if was > 1]
    return round(min(shares), 4)


def half(name: str, unit: str) -> Row:
    """The small network at half of its MACs or parameters."""
    model, example, data = build(ARCHITECTURES[name])
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
    row["reloads"], _ = attempt(lambda: reloaded(result, lambda: build(ARCHITECTURES[name])[0], example))
    row["onnx_before"] = exported(model, example)
    row["onnx"] = exported(result.model, example) if "worst" in row["onnx_before"] else {}
    row["cache"] = {"before": cached(model, example), "after": cached(result.model, example)}
    return row


def cached(model: nn.Module, example: Any) -> bool | str | None:
    """Whether `generate` gives the same tokens with and without its cache; None where the model has none."""
    generate = getattr(model, "generate", None)
    if generate is None or not getattr(model, "can_generate", lambda: False)():
        return None
    inputs = {key: value for key, value in example.items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def tokens(use_cache: bool) -> torch.Tensor:
        out: torch.Tensor = generate(**inputs, **settings, use_cache=use_cache)
        return out

    both, error = attempt(lambda: (tokens(True), tokens(False)))
    return error if both is None else bool(torch.equal(*both))


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
    within = sum(row.get("either", 0) + row.get("products", 0) >= REACHED for row in true)
    nets = {row["net"] for row in halves}
    met = {row["net"] for row in halves if meets(row)}
    broken = [row for row in halves if not (row.get("structure") and row.get("reloads"))]
    lost = [row for row in halves if "worst" in row.get("onnx_before", {}) and not row["onnx"].get("worst", 1) <= LIMIT]
    other = [
        row for row in halves if (cache := row.get("cache", {})).get("before") is True and cache["after"] is not True
    ]
    return [
        Bound("reach: families at 90 % of the MACs within reach", len(true), within),
        Bound("reach: families at half, no layer below an eighth", len(nets), len(met)),
        Bound("reach: structures or bits changed", 0, len(broken), at_most=True),
        Bound("reach: ONNX files that differ", 0, len(lost), at_most=True),
        Bound("reach: caches that no longer agree", 0, len(other), at_most=True),
    ]


def main() -> None:
    """All rows; write results/reach.json where none is left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TRUE_SIZE), default=list(TRUE_SIZE), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--row", nargs=2, metavar=("NAME", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        one(*args.row)
        return
    rows = run_grid(cells(net=args.only, part=args.parts), measured, ROWS, "networks")
    missed = [row["net"] for row in rows if row["part"] == "macs" and not meets(row)]
    rows += run_grid(cells(net=missed, part=["params"]), measured, ROWS, "networks") if missed else []
    if len(args.only) == len(TRUE_SIZE) and len(args.parts) == len(PARTS):
        finish(RESULTS, {"keep": KEPT, "tokens": TOKENS, "libraries": versions()}, {"rows": rows}, bounds(rows))


if __name__ == "__main__":
    main()
