"""MFBP, the sources' claims: pruning by joint tri-factorization of all weight matrices, beside what it must beat.

    taut reproduce mfbp --data DIR [--quick] [--paper]

`--paper` runs the finished protocol with the source's own settings (no biases, weights of .01, RMSprop, rank 5).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from taut.artifact.manifest import taut_version
from taut.studies import Bound, Cell, run_grid, write_results

NEEDS = ("accelerate", "matplotlib")
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

import alexnet  # noqa: E402 - found through the line above: experiments are scripts, no package
import convs  # noqa: E402
import deep  # noqa: E402
import deploy  # noqa: E402
import facts  # noqa: E402
import protocols  # noqa: E402
import robust  # noqa: E402
from figures import draw_basis, draw_curves, draw_ramps  # noqa: E402
from lab import Lab  # noqa: E402
from mlps import BATCH  # noqa: E402
from sheets import interval, markdown, pick  # noqa: E402
from verdicts import findings  # noqa: E402

Part = tuple[list[Cell], Callable[[Lab, Cell], Mapping[str, Any]]]


def parts(quick: bool, paper: bool, seeds: int, data: Path | None = None) -> dict[str, Part]:
    """Name -> runs, and what one of them does; later parts read nets that earlier ones keep."""
    kind = "quick" if quick else "full"
    found: dict[str, Part] = {
        "finished": (protocols.wanted("paper" if paper else kind, seeds), protocols.finished),
    }
    if paper:
        return found
    return found | {
        "deep": (deep.wanted(kind, seeds), deep.run),
        "many": ([] if quick else deep.full(), deep.run),
        "convs": (convs.wanted(quick), convs.run),
        "deployed": (deploy.wanted(quick), deploy.run),
        "sharing": (deploy.ways(quick), deploy.sharing),
        "draft": (protocols.curves(kind), protocols.draft),
        "robust": (robust.wanted(quick, seeds), robust.run),
        "facts": (facts.wanted(quick), facts.run),
        "alexnet": (alexnet.wanted(quick, data), alexnet.run),
    }


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json, table.md and the figures into `out`.

    Returns:
        Whether at least one stated bound was tested and all hold.
    """
    lab, many = Lab(data, out), seeds or (1 if quick else 3)
    try:
        lab.images("mnist", "test")
    except FileNotFoundError as error:
        (out / "table.md").write_text(f"Nothing was measured. {error}\n")
        return False
    mark = f"taut {taut_version()}, torch {torch.__version__}, batch {BATCH}"
    results: dict[str, Any] = {}
    for name, (wanted, work) in parts(quick, paper, many, data).items():
        cells, gone = present(lab, wanted)
        if gone:
            print(f"{name}: left out, {gone}")
        path = out / f"{'quick-' if quick else 'paper-' if paper else ''}{name}.jsonl"
        results[name] = run_grid(cells, lambda cell, work=work: work(lab, cell), path, name, mark)
    results["deep"] = [*results.get("deep", []), *results.pop("many", [])]
    bounds = limits(results, quick)
    (out / "table.md").write_text(markdown(results, bounds))
    if results.get("draft"):
        draw_curves(results["draft"], out / "auc.svg")
    if results["deep"]:
        draw_ramps(results["deep"], out / "ramps.svg")
        draw_basis(facts.first_basis(lab, quick), out / "basis.svg")
    if not quick and not paper:
        results["claims"] = findings(results)
    settings = {"quick": quick, "paper": paper, "seeds": many, "batch": BATCH}
    return write_results(out / "results.json", settings, results, bounds)


def present(lab: Lab, cells: list[Cell]) -> tuple[list[Cell], str]:
    """The runs whose images are here, and what is not."""
    missing: dict[str, str] = {}
    names = {str(cell.get(key, "")).removeprefix("conv ") for cell in cells for key in ("data", "net")}
    for name in names & {"mnist", "fashion-mnist", "cifar-10"}:
        try:
            lab.images(name, "test")
        except FileNotFoundError as error:
            missing[name] = str(error)
    kept = [cell for cell in cells if not any(name in str(cell.values()) for name in missing)]
    return kept, "; ".join(missing.values())


def limits(results: dict[str, Any], quick: bool) -> list[Bound]:
    """The stated bounds that these runs can test."""
    found = []
    for label, images in (("few digits", "quick" if quick else "few"), ("full MNIST", "many")):
        rows = pick(results["deep"], images=images, net="5 hidden", sparsity=0.98)
        means = {
            rule: statistics.mean(row["after"] for row in pick(rows, rule=rule))
            for rule in dict.fromkeys(row["rule"] for row in rows)
        }
        if means and images != "many":
            for rule in ("sum", "product"):
                name = f"{label}, 98 % of five layers pruned: accuracy of MFBP ({rule}) above magnitude's"
                found.append(Bound(name, 0.15, means[rule] - means["magnitude"], at_most=False))
    for net, level in protocols.PUBLISHED:
        rows = pick(results["finished"], net=net, sparsity=level, rule="product")
        dense = {r["seed"]: r["before"]["accuracy"] for r in pick(results["finished"], net=net, rule="control")}
        if rows and level < 0.85 and not quick:
            changes = [row["after"]["accuracy"] - dense[row["seed"]] for row in rows]
            mean, high = statistics.mean(changes), interval(changes)[1]
            worst = 0.0 if high >= 0 else -mean  # an interval that contains 0 is no loss
            name = f"{net}, {level:.2%} pruned: loss of accuracy against its own dense net"
            found.append(Bound(name, 0.001, worst, at_most=True))
    return found
