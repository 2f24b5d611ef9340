"""What the study says about the claims of the source; every number is read from the results."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from taut.studies.claims import CONTRADICTED, CORRECTED, REPRODUCED

HERE_UPPER = "VGG- and ResNet-style nets on Fashion-MNIST"

Found = dict[str, dict[str, str]]

HERE = "on coloured garments with the source's first two convolutions, in place of ImageNet"


def findings(results: dict[str, Any]) -> Found:
    """Claim -> ours, verdict, why."""
    return {
        **_counted(results["counts"]),
        **_timed(results),
        **_layers(results),
        **_tuned(results),
        **_metrics(results),
        **_properties(results),
        **_sizes(results),
    }


def _one(ours: str, holds: bool, why: str = "", *, corrected: bool = False) -> dict[str, str]:
    verdict = CONTRADICTED if not holds else CORRECTED if corrected else REPRODUCED
    return {"ours": ours, "verdict": verdict, "why": why}


def _counted(rows: list[dict[str, Any]]) -> Found:
    found: Found = {}
    for row in rows:
        if not row["claim"]:
            continue
        printed = float(row["printed"].rstrip("x"))
        agrees = abs(row["reduction"] / printed - 1) < 0.02
        why = "" if agrees else "the formula gives another number than the one printed"
        if row["grows"]:
            why = "at 4096 x 1000 this rank makes the layer larger; built with allow_growth"
        ours = f"{row['reduction']:.2f}x ({row['weights']:,} weights)"
        found[row["claim"]] = _one(ours, True, why, corrected=not agrees)
    by = {(row["method"], *row["settings"].values()): row for row in rows}
    mono, outer, svds = by["monochromatic", 6], by["outer", 48, 2, 6], by["bicluster", 2, 2, 19, 24]
    same = all(row["operations"] == row["built_operations"] - row["zero_operations"] for row in (mono, outer, svds))
    why = "operations of the built layers equal the formula with the positions that each layer has"
    printed = [row for row in rows if row["claim"]]
    small = [f"{row['layer']} {row['settings']}" for row in printed if row["reduction"] < 2]
    least = min(row["reduction"] for row in printed if row["reduction"] >= 2)
    return found | {
        "table-1": _one("four formulas, built and counted", same, why),
        "table-1-row-1": _one(
            f"conv1 {mono['dense_operations'] / 1e6:.0f} M, conv2 {outer['dense_operations'] / 1e6:.0f} M",
            same,
            "without padding the border is lost",
        ),
        "table-1-row-2": _one(f"{mono['built_operations'] / 1e6:.1f} M at C' = 6", same, why),
        "table-1-row-3": _one(f"{outer['built_operations'] / 1e6:.1f} M at K = 6", same, why),
        "table-1-row-4": _one(
            f"{svds['operations'] / 1e6:.1f} M, {svds['built_operations'] / 1e6:.1f} M as built (dense first 1 x 1)",
            same,
            "printed without M, and with the last factor at the input's positions",
            corrected=True,
        ),
        "table-2-row-1": _one(f"{outer['dense']:,} for conv2", outer["dense"] == 614_400),
        "conv1-shape": _one(f"{mono['dense']:,} weights", mono["dense"] == 14_112),
        "conv2-shape": _one(f"{outer['dense']:,} weights", outer["dense"] == 614_400),
        "speed-factor-two": _one(
            f"{least:.2f}x and more in all rows of Table 2 but {', '.join(small) or 'none'}",
            True,
            "" if not small else "that row of the source grows its layer",
            corrected=bool(small),
        ),
    }


def _timed(results: dict[str, Any]) -> Found:
    rows = {(row["kind"], row["batch"]): row for row in results["speed"]}
    batches = sorted({batch for _, batch in rows})
    one, many = batches[0], batches[-1]

    def said(kind: str, prefix: str) -> str:
        parts = []
        for batch in batches:
            values = [v for form, v in rows[kind, batch]["speedup"].items() if form.startswith(prefix)]
            parts.append(f"{min(values):.1f}x to {max(values):.1f}x at batch {batch}")
        return ", ".join(parts)

    def rate(kind: str, form: str) -> float:
        macs = {"conv1": 96 * 147 * 109**2, "conv2": 256 * 2400 * 50**2}[kind]
        fewer = 1.0 if form == "original" else rows[kind, one]["fewer_macs"][form]
        return macs / fewer / rows[kind, one]["best_ms"][form] / 1e6

    settings = {"conv1": "monochromatic 6", "conv2": "bicluster 19 24"}
    reached = {kind: rows[kind, one]["speedup"][form] for kind, form in settings.items()}
    why = (
        f"best runtime against best runtime on this CPU: the original conv1 runs at {rate('conv1', 'original'):.0f} "
        f"GMAC/s, its replacement at {rate('conv1', 'monochromatic 6'):.0f} (conv2: {rate('conv2', 'original'):.0f}, "
        f"{rate('conv2', 'bicluster 19 24'):.0f})"
    )
    share = {b: rows["breakdown", b]["share"] for b in batches}
    first = {b: share[b]["conv1"] + share[b]["conv2"] for b in batches}
    cases = [
        (row["fewer_macs"][form], value)
        for (kind, _), row in rows.items()
        if kind in settings
        for form, value in row["speedup"].items()
    ]
    below = sum(value < macs for macs, value in cases)
    macs = [rows["conv1", one]["fewer_macs"][form] for form in rows["conv1", one]["fewer_macs"]]
    both = all(value >= 2 for value in reached.values())
    mono, svds, outer = said("conv1", "mono"), said("conv2", "bicl"), said("conv2", "outer")
    return {
        "figure-3-cpu": _one(f"{mono}; C' = 6 at batch {one}: {reached['conv1']:.2f}x", reached["conv1"] >= 2, why),
        "figure-4-cpu": _one(f"{svds}; (19, 24) at batch {one}: {reached['conv2']:.2f}x", reached["conv2"] >= 2),
        "abstract-speedup-cpu": _one(f"conv1 {mono}; conv2 {svds}", both, "" if both else why),
        "intro-conv-speedup": _one(f"conv1 {mono}; conv2 two SVDs {svds}, outer {outer}", both, "" if both else why),
        "speed-first-two-layers": _one(
            ", ".join(f"{value:.0%} at batch {b}" for b, value in first.items()),
            max(first.values()) > 0.5,
            f"eager, layer by layer, without the response normalizations; the largest batch here is {many}",
        ),
        "speed-below-theory": _one(f"in {below} of {len(cases)} cases", below > len(cases) / 2),
        "conv1-operations": _one(f"{min(macs):.2f}x to {max(macs):.2f}x for 3 to 24 colours", min(macs) >= 2),
    }


def _layers(results: dict[str, Any]) -> Found:
    dense = results["dense"]["colour"]
    known = {(row["form"], row["mode"]): row for row in results["bare"]}
    seed = f"one calibration seed, {HERE}"

    def loss(form: str, mode: str) -> float:
        return 100 * (dense - known[form, mode]["accuracy"])

    colours = [form for form, mode in known if mode == "paper" and form.startswith("mono")]
    losses = [loss(form, "paper") for form in colours]
    rises = sum(b > a for a, b in pairwise(losses))
    best = {form: 100 * (dense - row["refitted"]) for (form, mode), row in known.items() if mode == "data"}
    outer, svds = best["outer 6"], best["bicluster 19 24"]
    lines = results["lines"]
    return {
        "figure-3": _one(
            f"{best['monochromatic 6']:.2f} points at C' = 6, refitted and untrained", best["monochromatic 6"] < 1, seed
        ),
        "figure-4": _one(
            f"{outer:.2f} points for outer K = 6, {svds:.2f} for two SVDs (19, 24), refitted and untrained",
            max(outer, svds) < 1,
            seed,
        ),
        "conv1-degrades": _one(
            f"paper mode, untrained: {losses[0]:.1f} points at C' = 3, {losses[-1]:.1f} at C' = 24; against the trend "
            f"in {rises} of {len(losses) - 1} steps",
            losses[0] > losses[-1] and rises <= len(losses) // 2,
            seed,
        ),
        "figure-2-colour-space": _one(
            f"off its line: {lines['before']:.0%} of the energy before, {lines['after']:.1%} after (colours.svg)",
            lines["after"] < 1e-3,
            HERE,
        ),
    }


def _above(results: dict[str, Any]) -> Found:
    """Mild forms that are above the original with every calibration seed."""
    dense, gains = results["dense"]["colour"], {}
    for row in results["mild"]:
        gains.setdefault(row["form"], []).append(100 * (row["accuracy"] - dense))
    parts = [f"{form} {statistics.mean(g):+.2f} ± {statistics.stdev(g):.2f} points" for form, g in gains.items()]
    always = [form for form, g in gains.items() if min(g) > 0]
    seeds = len({row["seed"] for row in results["mild"]})
    why = f"{len(always)} of {len(gains)} mild forms above the original with each of {seeds} calibration seeds; "
    ours = "untrained: " + ", ".join(parts)
    return {"discussion-better-error": _one(ours, bool(always), why + "a few images of 10,000; " + HERE)}


def _tuned(results: dict[str, Any]) -> Found:
    def mean(form: str, mode: str) -> float:
        return 100 * statistics.mean(r["after"] for r in results["tuned"] if (r["form"], r["mode"]) == (form, mode))

    control = mean("control", "-")
    paper = {
        form: control - mean(form, "paper") for form in ("monochromatic 6", "outer 6", "bicluster 19 24", "svd 4x")
    }
    cascade = {
        way: 100 * statistics.mean(r["after"] for r in results["cascade"] if r["way"] == way)
        for way in ("control", "all at once", "cascade")
    }
    lost = cascade["control"] - cascade["cascade"]
    timed = [row["speedup"] for row in results["speed"] if row["batch"] == 1 and row["kind"] in {"conv1", "conv2"}]
    speedup = {form: value for found in timed for form, value in found.items()}
    said = "after 12,000 training images, a fifth of one pass (the source: up to two), paper mode against the control; "
    return {
        "conv1-accuracy": _one(
            f"{paper['monochromatic 6']:.2f} points at {speedup['monochromatic 6']:.2f}x",
            paper["monochromatic 6"] < 1,
            said + HERE + ("" if speedup["monochromatic 6"] >= 2 else "; the speedup is smaller on this CPU"),
            corrected=speedup["monochromatic 6"] < 2,
        ),
        "conv2-accuracy": _one(
            f"{paper['outer 6']:.2f} points outer 6 at {speedup['outer 6']:.2f}x, {paper['bicluster 19 24']:.2f} SVDs "
            f"at {speedup['bicluster 19 24']:.2f}x",
            max(paper["outer 6"], paper["bicluster 19 24"]) < 1,
            said + HERE,
        ),
        **_above(results),
        "table-2-row-2-error": _one(
            f"{paper['monochromatic 6']:.2f} points", paper["monochromatic 6"] < 1, said + HERE
        ),
        "table-2-row-3-error": _one(f"{paper['outer 6']:.2f} points", paper["outer 6"] < 1, said + HERE),
        "table-2-row-4-error": _one(
            f"{paper['bicluster 19 24']:.2f} points", paper["bicluster 19 24"] < 1, said + HERE
        ),
        "cascade-two-layers": _one(
            f"{lost:.2f} points, with the dense layers at 4x as well (all at once: "
            f"{cascade['control'] - cascade['all at once']:.2f})",
            lost < 1,
            HERE,
        ),
        "finetune-harsh": _one(
            f"largest loss after fine-tuning {max(paper.values()):.2f} points", max(paper.values()) < 1, said + HERE
        ),
    }


def _metrics(results: dict[str, Any]) -> Found:
    def mean(net: str, metric: str) -> float:
        return statistics.mean(r["bare"] for r in results["metrics"] if (r["net"], r["metric"]) == (net, metric))

    nets = list(dict.fromkeys(row["net"] for row in results["metrics"]))
    parts = [
        f"{net}: {mean(net, 'frobenius'):.3f} / {mean(net, 'data'):.3f} / {mean(net, 'mahalanobis'):.3f}"
        for net in nets
    ]
    data = all(mean(net, "data") > mean(net, "frobenius") for net in nets)
    diagonal = all(mean(net, "mahalanobis") > mean(net, "frobenius") for net in nets)
    words = {True: "improves on Frobenius in every net", False: "does not improve on Frobenius in every net"}
    why = f"the data covariance {words[data]}, the separable Mahalanobis form {words[diagonal]}; means over seeds"
    (undone,) = [row for row in results["elementwise"] if row["way"] == "elementwise"]
    upper = [
        f"{net} {100 * (results['dense'][net] - statistics.mean(losses)):.1f} points"
        for net in nets[1:]
        if (losses := [r["refitted"] for r in results["metrics"] if (r["net"], r["metric"]) == (net, "data")])
    ]
    return {
        "metric-better": _one(f"accuracy, Frobenius / data / Mahalanobis: {'; '.join(parts)}", data and diagonal, why),
        "metric-mahalanobis-undo": _one(
            f"a^-1 * (rank {undone['rank']} of a * W) has rank {undone['rank_of_result']}",
            undone["rank_of_result"] > undone["rank"],
            "so it makes nothing smaller; evaluated, not deployed",
            corrected=True,
        ),
        "speed-upper-layers": _one(
            f"six upper layers each of two nets, refitted and untrained: {', '.join(upper)} lost",
            bool(upper),
            HERE_UPPER,
        ),
    }


def _properties(results: dict[str, Any]) -> Found:
    p = results["properties"]
    return {
        "svd-bound": _one(
            f"first dense layer at rank 24: {p['svd_bound']:.2f} of the bound", p["svd_bound"] <= 1, HERE
        ),
        "metric-frobenius-expectation": _one(
            f"{p['expectation']:.4f} of the squared norm over 200,000 white inputs", abs(p["expectation"] - 1) < 0.01
        ),
        "svd-decay": _one(
            f"a quarter of the singular values holds {p['quarter_of_fc1']:.0%} of the first dense layer's energy, "
            f"{p['quarter_of_conv2']:.0%} of conv2's",
            min(p["quarter_of_fc1"], p["quarter_of_conv2"]) > 0.5,
            HERE,
        ),
        "mono-low-dimensional": _one(
            f"{p['one_colour']:.0%} of the filters' energy in one colour each, {p['two_colours']:.0%} in two",
            p["two_colours"] > 0.9,
            HERE,
        ),
        "mono-one-dimension": _one(
            f"{p['one_colour']:.0%} of the energy",
            p["one_colour"] > 0.8,
            HERE + ("" if p["one_colour"] > 0.8 else "; twenty classes that depend on colour make its filters richer"),
        ),
        "bicluster-easier": _one(
            f"kernel error {p['blocks']:.3f} in 2 x 2 clusters, {p['whole']:.3f} as a whole, both with 61,536 weights",
            p["blocks"] < p["whole"],
            HERE,
        ),
    }


def _sizes(results: dict[str, Any]) -> Found:
    rows = {(row["layer"], row["method"], *row["settings"].values()): row for row in results["counts"]}
    dense = {layer: row["dense"] for (layer, *_), row in rows.items()}
    convolutions = dense["conv1"] + dense["conv2"] + 9 * (256 * 512 + 512 * 1024 + 1024 * 512)
    share = sum(dense[name] for name in ("fc1", "fc2", "fc3")) / (
        sum(dense[n] for n in ("fc1", "fc2", "fc3")) + convolutions
    )
    fc = [row["reduction"] for (layer, *_), row in rows.items() if layer.startswith("fc")]
    conv = [row["reduction"] for (layer, *_), row in rows.items() if layer.startswith("conv")]
    known = {(row["form"], row["mode"]): row for row in results["bare"]}
    base = results["dense"]["colour"]
    mild = 100 * (base - known["bicluster 40 64", "paper"]["accuracy"])
    (frobenius,) = [row for row in results["elementwise"] if row["way"] == "frobenius"]
    loss = 100 * (base - frobenius["accuracy"])
    forms = sum(mode == "paper" for _, mode in known)
    return {
        "memory-fc-majority": _one(f"{share:.0%} of the weights of the net at its real shapes", share > 0.5),
        "intro-fc-reduction": _one(
            f"{min(fc):.2f}x to {max(fc):.1f}x in Table 2's rows",
            max(fc) >= 5,
            "the last layer gives 3.2x at most",
            corrected=True,
        ),
        "discussion-fc-memory": _one(
            f"{min(fc):.2f}x to {max(fc):.1f}x", max(fc) >= 5, "the last layer gives 3.2x at most", corrected=True
        ),
        "discussion-conv-memory": _one(
            f"{min(conv):.2f}x to {max(conv):.2f}x",
            min(conv) >= 2,
            "conv2 shrinks further than printed",
            corrected=max(conv) > 3.5,
        ),
        "memory-fewer-parameters": _one(
            "every row of Table 2 but FC3 at K = 850", True, "that one grows", corrected=True
        ),
        "finetune-mild": _one(f"{mild:.2f} points for two SVDs (40, 64), 2x, paper mode, untrained", mild < 1.5, HERE),
        "conv2-configurations": _one(f"{forms} forms of both layers, five modes each", forms > 5, HERE),
        "table-2-row-6-k250-error": _one(
            f"{loss:.2f} points for the first dense layer at rank 24 (13.7x), untrained", loss < 0.9, HERE
        ),
    }
