"""`taut reproduce linear-structure`: Denton et al. 2014, "Exploiting linear structure within convolutional networks".

Counts and times at the real layer shapes of their net (random weights: ImageNet is not here); accuracy on nets that can
be trained here, above all one on coloured garments with their first two convolutions (experiments/nets/colour.py).

--paper changes nothing: paper mode is a column of every table. --data names a folder with fashion-mnist/; with
imagenet/ in it, and weights of the net (imagenet.py), the source's own evaluation runs too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from taut.artifact.manifest import taut_version
from taut.report import draw_colour_lines, draw_filters
from taut.studies import Bound, run_grid, write_results
from taut.studies.grid import cells

NEEDS = ("accelerate", "matplotlib")
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

import accuracy as work  # noqa: E402 - found through the line above: experiments are scripts, no package
import imagenet  # noqa: E402
import speed  # noqa: E402
from findings import findings  # noqa: E402
from page import draw_curves, markdown  # noqa: E402
from properties import properties  # noqa: E402
from shapes import count_rows  # noqa: E402

SPEEDUPS = {"monochromatic 6": 1.7, "bicluster 19 24": 5.0, "bicluster 19 64": 2.5, "outer 6": 3.5}
"""Form -> least speedup that was aimed at, batch 1, best runtime against best runtime."""

CALIBRATION_SEEDS, TRAINING_SEEDS = 2, 1
"""Unless --seeds asks for more; clustered layers are slow in eager mode, training ten forms takes half an hour."""

LARGE = 16
QUICK_FORMS = ("monochromatic 6", "outer 6", "bicluster 19 24")


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing; write results.json, table.md and the pictures into `out`.

    Returns:
        Whether every stated bound holds.
    """
    del paper
    mark = f"taut {taut_version()}, torch {torch.__version__}, {work.IMAGES} images"
    prefix = "quick-" if quick else ""

    def grid(name: str, wanted: list[dict[str, Any]], run: Any) -> list[dict[str, Any]]:
        return run_grid(wanted, run, out / f"{prefix}{name}.jsonl", name, mark)

    results: dict[str, Any] = {"counts": count_rows()}
    results["speed"] = grid("speed", _timings(quick), _time)
    folder = imagenet.find(data)
    results["imagenet"] = [] if folder is None else imagenet.evaluate(folder)
    benches = work.Benches(data)
    skipped = ""
    try:
        benches("colour")
    except FileNotFoundError as error:
        skipped = f"The accuracy side was skipped. {error}"
    if not skipped:
        results |= _accuracy(grid, benches, quick, seeds)
        results["lines"] = _pictures(benches("colour"), out)
        draw_curves(results, out / "curves.svg")
    bounds = limits(results, quick=quick)
    results["claims"] = findings(results) if not quick and not skipped else {}
    (out / "table.md").write_text(markdown(results, bounds, skipped))
    return write_results(out / "results.json", {"quick": quick, "mark": mark}, results, bounds)


def _timings(quick: bool) -> list[dict[str, Any]]:
    batches = [1] if quick else [1, LARGE]
    kinds = ["conv1", "conv2", *([] if quick else [*speed.PAIRS, "breakdown"])]
    return cells(kind=kinds, batch=batches, quick=[quick])


def _time(cell: dict[str, Any]) -> dict[str, Any]:
    rounds = 15 if cell["batch"] == 1 else 7
    if cell["kind"] == "breakdown":
        return {"share": speed.breakdown(cell["batch"], rounds)}
    if cell["kind"] in speed.PAIRS:
        found = speed.first_two(cell["kind"], cell["batch"], rounds)
    else:
        found = speed.measure(cell["kind"], cell["batch"], rounds, quick=cell["quick"])
    return {key: value for key, value in found.items() if key not in cell}


def _accuracy(grid: Any, benches: work.Benches, quick: bool, seeds: int | None) -> dict[str, Any]:
    bench = benches("colour")
    forms = QUICK_FORMS if quick else work.FORMS
    modes = ("paper", "frobenius", "data") if quick else tuple(work.MODES)
    found: dict[str, Any] = {"dense": {"colour": work.accuracy(bench.net, *bench.test)}}
    found["bare"] = grid("bare", cells(form=forms, mode=modes), lambda cell: work.bare(benches, cell))
    found["properties"] = properties(bench)
    if quick:
        return found
    wanted = cells(rank=[24], way=[*work.METRICS, "elementwise", "weighted ALS"])
    found["elementwise"] = grid("elementwise", wanted, lambda cell: work.elementwise(benches, cell))
    wanted = cells(seed=range(seeds or 3), form=work.MILD)
    found["mild"] = grid("mild", wanted, lambda cell: work.mild(benches, cell))
    wanted = cells(net=work.NETS, seed=range(seeds or CALIBRATION_SEEDS), metric=work.METRICS)
    found["metrics"] = grid("metrics", wanted, lambda cell: work.metric(benches, cell))
    training = range(seeds or TRAINING_SEEDS)
    wanted = cells(seed=training, way=["control", "all at once", "cascade"])
    found["cascade"] = grid("cascade", wanted, lambda cell: work.cascaded(benches, cell))
    control = cells(seed=training, form=["control"], mode=["-"])
    wanted = [*control, *cells(seed=training, form=work.TUNED, mode=["paper", "data"])]
    found["tuned"] = grid("tuned", wanted, lambda cell: work.tune(benches, cell))
    for name in ("vgg", "resnet"):
        found["dense"][name] = work.accuracy(benches(name).net, *benches(name).test)
    return found


def _pictures(bench: work.Bench, out: Path) -> dict[str, float]:
    """The first layer's filters, and their taps in colour space, before and after; what lies off the filters' lines."""
    layer, method, settings = work.settings_of("monochromatic 6", "frobenius")
    small = bench.plan({layer: (method, settings)}).steps[0]
    made = work.taut.methods.resolve(small)
    original = bench.net.get_submodule(layer).weight.detach()
    fit = made.fit(made.factor({layer: bench.net.get_submodule(layer)}, bench.stats.layers))
    kernels = (("original", original), ("6 colours", fit.W.reshape(original.shape).float()))
    draw_filters(kernels, out / "filters.svg")
    draw_colour_lines(kernels, out / "colours.svg")
    found = {}
    for name, (_, kernel) in zip(("before", "after"), kernels, strict=True):
        values = torch.linalg.svdvals(kernel.flatten(2).double()).square()
        found[name] = float(values[:, 1:].sum() / values.sum())
    return found


def limits(results: dict[str, Any], *, quick: bool) -> list[Bound]:
    """What was aimed at: counts by the formulas, speed at batch 1, better than paper mode, one point after tuning."""
    gaps = [
        abs(row["built"] - row["zeros"] - row["weights"])
        + abs(row["built_operations"] - row["zero_operations"] - row["operations"])
        for row in results["counts"]
    ]
    bounds = [Bound("Tables 1 and 2: rows built otherwise than the formula", 0, sum(g > 0 for g in gaps), at_most=True)]
    timed = {row["kind"]: row for row in results["speed"] if row["batch"] == 1}
    for form, least in SPEEDUPS.items():
        kind = "conv1" if form.startswith("mono") else "conv2"
        found = timed[kind]["speedup"][form]
        bounds += [] if quick else [Bound(f"{form}, batch 1, best against best: speedup", least, found)]
    both = [timed[kind]["speedup"] for kind in speed.PAIRS if kind in timed]
    if both:
        bounds.append(Bound("conv1 and conv2 together, batch 1: speedup of the faster pair", 2.0, max(both)))
    bare = {(row["form"], row["mode"]): row["error"] for row in results.get("bare", ())}
    worse = [form for form, mode in bare if mode == "frobenius" and bare[form, mode] >= bare[form, "paper"]]
    if bare:
        bounds.append(Bound("forms whose kernel error is not below paper mode's", 0, len(worse), at_most=True))
    return bounds + _trained_limits(results)


def _trained_limits(results: dict[str, Any]) -> list[Bound]:
    rows = results.get("tuned", ())
    if not rows:
        return []

    def mean(form: str, mode: str) -> float:
        values = [row["after"] for row in rows if (row["form"], row["mode"]) == (form, mode)]
        return sum(values) / len(values)

    control = mean("control", "-")
    losses = {form: control - mean(form, "data") for form in work.TUNED}
    return [
        Bound(
            "forms that lose more than a point after fine-tuning",
            0,
            sum(v > 0.01 for v in losses.values()),
            at_most=True,
        ),
        Bound("largest loss after fine-tuning, share of test images", 0.01, max(losses.values()), at_most=True),
    ]
