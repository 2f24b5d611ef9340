"""The tables and curves of the study."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from taut.studies import Bound


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def markdown(results: dict[str, Any], bounds: Sequence[Bound], skipped: str) -> str:
    """The page."""
    lines = ["# Linear structure within convolutional networks", ""]
    lines += [skipped, ""] if skipped else []
    lines += [*_counts(results["counts"]), *_speed(results["speed"])]
    if results.get("imagenet"):
        body = [(row["row"], f"{row['top_5_error']:.4f}") for row in results["imagenet"]]
        lines += ["## ImageNet, nothing trained", "", *_table(("net", "top-5 error"), body)]
    if "bare" in results:
        lines += _bare(results)
    if "tuned" in results:
        lines += [*_metrics(results), *_elementwise(results), *_tuned(results), *_cascade(results), *_mild(results)]
    return "\n".join([*lines, "## Bounds", "", *(f"- {bound}" for bound in bounds), ""])


def _counts(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        "layer",
        "form",
        "printed",
        "weights by the formula",
        "as built",
        "reduction",
        "as built",
        "operations",
        "as built",
        "",
    )
    body = [
        (
            row["layer"],
            f"{row['method']} {', '.join(f'{k}={v}' for k, v in row['settings'].items())}",
            row["printed"] or "-",
            f"{row['weights']:,}",
            f"{row['built']:,}",
            f"{row['reduction']:.2f}x",
            f"{row['built_reduction']:.2f}x",
            f"{row['operations'] / 1e6:,.1f} M",
            f"{row['built_operations'] / 1e6:,.1f} M",
            "grows" if row["grows"] else f"{row['zeros']:,} structural zeros" if row["zeros"] else "",
        )
        for row in rows
    ]
    note = (
        "The net of the source at its real layer shapes, 224 x 224; random weights. Printed reductions that no formula "
        "gives: 5.3x is what K = 8 gives (5.16x), 3.9x what K2 = 64 gives (3.89x), and the dense layer of "
        "4096 x 1000 shrinks 3.2x at K = 250 and GROWS at K = 850. The biclustered form with two SVDs is built with a "
        "dense first 1 x 1 layer, which is faster than a grouped one behind a gather of channels, and stores zeros."
    )
    return ["## Weights and operations (Tables 1 and 2)", "", note, "", *_table(head, body)]


def _speed(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## Measured speed at real shapes, best runtime against best runtime", ""]
    for row in rows:
        if row["kind"] not in {"conv1", "conv2"}:
            continue
        runtimes = list(row["ms"])
        lines += [
            f"{row['kind']}, batch {row['batch']} (milliseconds; the original {row['best_ms']['original']:.2f}):",
            "",
        ]
        body = [
            (
                name,
                f"{row['fewer_macs'][name]:.2f}x",
                *(f"{row['ms'][r][name]:.2f}" for r in runtimes),
                f"{row['speedup'][name]:.2f}x",
            )
            for name in row["speedup"]
        ]
        body.insert(0, ("original", "", *(f"{row['ms'][r]['original']:.2f}" for r in runtimes), ""))
        lines += _table(("form", "fewer MACs", *runtimes, "speedup"), body)
    both = [row for row in rows if row["kind"].startswith("first two")]
    if both:
        body = [
            (
                "two SVDs, 16 32" if row["kind"].endswith("SVDs") else "outer K = 8",
                str(row["batch"]),
                f"{row['best_ms']['original']:.2f}",
                f"{row['best_ms']['cascade']:.2f}",
                f"{row['speedup']:.2f}x",
            )
            for row in both
        ]
        lines += ["conv1 (C' = 6), pool and conv2 together:", ""]
        lines += _table(("conv2", "batch", "original, ms", "compressed, ms", "speedup"), body)
    shares = [row for row in rows if row["kind"] == "breakdown"]
    if shares:
        names = [name for name in shares[0]["share"] if name.startswith(("conv", "fc"))]
        body = [
            (
                str(r["batch"]),
                *(f"{r['share'][n]:.0%}" for n in names),
                f"{r['share']['conv1'] + r['share']['conv2']:.0%}",
            )
            for r in shares
        ]
        lines += ["Share of the forward time, eager:", "", *_table(("batch", *names, "conv1 + conv2"), body)]
    return lines


def _bare(results: dict[str, Any]) -> list[str]:
    rows, dense = results["bare"], results["dense"]["colour"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    known = {(row["form"], row["mode"]): row for row in rows}
    forms = list(dict.fromkeys(row["form"] for row in rows))
    note = (
        f"Test accuracy of the colour net (dense {dense:.4f}) with ONE layer replaced, nothing trained, "
        "one calibration seed; in brackets the relative error of the kernel. "
        "Paper mode clusters by Euclidean distance, applies the second SVD to V, "
        "and fits terms one after the other; the others cluster by lines, refit, use S V and fit jointly. The last "
        "column is the data metric after taut's closed-form refit on 1,024 images without labels."
    )
    body = [
        (
            form,
            f"{known[form, modes[0]]['fewer_weights']:.2f}x",
            *(f"{known[form, mode]['accuracy']:.4f} ({known[form, mode]['error']:.3f})" for mode in modes),
            f"{known[form, 'data']['refitted']:.4f}",
        )
        for form in forms
    ]
    return [
        "## One layer, no training",
        "",
        note,
        "",
        *_table(("form", "fewer weights", *modes, "data, refitted"), body),
    ]


def _metrics(results: dict[str, Any]) -> list[str]:
    rows = results["metrics"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = [
        "## Metrics at equal ranks, no training: test accuracy, mean over calibration seeds ± standard deviation",
        "",
    ]
    body = []
    for net in dict.fromkeys(row["net"] for row in rows):
        for kind in ("bare", "refitted"):
            values = [[row[kind] for row in rows if (row["net"], row["metric"]) == (net, metric)] for metric in metrics]
            body.append((f"{net} (dense {results['dense'][net]:.4f})", kind, *map(spread, values)))
    return [*lines, *_table(("net", "", *metrics), body)]


def _elementwise(results: dict[str, Any]) -> list[str]:
    rows = results["elementwise"]
    note = (
        "First dense layer at rank 24, nothing trained. Dividing a low-rank approximation of a * W by a again gives a "
        "matrix of full rank: the row can be evaluated, but nothing became smaller."
    )
    body = [
        (row["way"], f"{row['accuracy']:.4f}", "yes" if row["deployable"] else f"NO, rank {row['rank_of_result']}")
        for row in rows
    ]
    return ["## Mahalanobis weighting", "", note, "", *_table(("way", "test accuracy", "deployable"), body)]


def _tuned(results: dict[str, Any]) -> list[str]:
    rows = results["tuned"]
    keys = list(dict.fromkeys((row["form"], row["mode"]) for row in rows))
    body = []
    for form, mode in keys:
        mine = [row for row in rows if (row["form"], row["mode"]) == (form, mode)]
        size = "" if form == "control" else f"{mine[0]['fewer_weights']:.2f}x"
        body.append((form, mode, size, spread([r["before"] for r in mine]), spread([r["after"] for r in mine])))
    note = (
        "Colour net, one layer (svd: both dense layers), 2 epochs of 6,000 images, Adam 1e-3, best validation epoch "
        "(the net before the first counts); mean over training seeds, ± where there are several; "
        '"data" starts from the refitted net, "paper" from paper mode as it is. Monochromatic is 2.9x to 3.0x with any '
        "number of colours and cannot reach 4x: the taps alone are a third of a three-channel layer."
    )
    return ["## Fine-tuned alike", "", note, "", *_table(("form", "mode", "fewer weights", "before", "after"), body)]


def _mild(results: dict[str, Any]) -> list[str]:
    rows = results["mild"]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    body = [(form, spread([row["accuracy"] for row in rows if row["form"] == form])) for form in forms]
    dense = results["dense"]["colour"]
    note = f"Refitted, nothing trained, mean over calibration seeds ± standard deviation (dense {dense:.4f})."
    return [
        "## Is a mild approximation better than the original?",
        "",
        note,
        "",
        *_table(("form", "test accuracy"), body),
    ]


def _cascade(results: dict[str, Any]) -> list[str]:
    rows = results["cascade"]
    body = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        before = "" if way == "control" else spread([r["before"] for r in mine])
        body.append((way, before, spread([r["after"] for r in mine])))
    note = (
        "C' = 6, then K = 8, then both dense layers at 4x. One epoch of 6,000 images per stage of the cascade (a fixed "
        "number, for all ways to see as many images), four all at once."
    )
    return ["## Cascade against all at once", "", note, "", *_table(("way", "untrained", "after"), body)]


PANELS = (
    ("conv1", "monochromatic", "conv1, monochromatic C'"),
    ("conv2", "outer", "conv2, outer K"),
    ("conv2", "bicluster", "conv2, two SVDs K1 K2"),
)
LINES = (
    ("paper mode", "s--", "paper", "accuracy"),
    ("data", "o-", "data", "accuracy"),
    ("refitted", "^-", "data", "refitted"),
)


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Speedup at real shapes over the change of accuracy: figures 3 and 4, a row per batch size."""
    timed = {
        (row["kind"], row["batch"]): row["speedup"] for row in results["speed"] if row["kind"] in {"conv1", "conv2"}
    }
    batches = sorted({batch for _, batch in timed})
    figure = Figure(figsize=(11, 3.9 * len(batches)), layout="constrained")
    for row, batch in enumerate(batches):
        for place, (kind, prefix, title) in enumerate(PANELS, 1):
            axes = figure.add_subplot(len(batches), len(PANELS), row * len(PANELS) + place)
            speedup = {form: v for form, v in timed[kind, batch].items() if form.startswith(prefix)}
            _curve(axes, results, speedup)
            axes.set(title=title, xlabel=f"speedup, batch {batch}", ylabel="change of accuracy, points")
    figure.savefig(path)


def _curve(axes: Any, results: dict[str, Any], speedup: dict[str, float]) -> None:
    dense = results["dense"]["colour"]
    known = {(row["form"], row["mode"]): row for row in results["bare"]}
    forms = [form for form in speedup if (form, "data") in known]
    for label, style, mode, value in LINES:
        points = sorted((speedup[form], 100 * (known[form, mode][value] - dense)) for form in forms)
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label)
    for form in forms:
        place = speedup[form], 100 * (known[form, "data"]["accuracy"] - dense)
        axes.annotate(form.partition(" ")[2], place, fontsize=7)
    axes.axhline(-1, color="0.7", linewidth=0.8)
    axes.legend(fontsize=7)
