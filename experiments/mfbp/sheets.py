"""The tables and figures of the study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from protocols import PUBLISHED
from rules import WRONG

from taut.studies import Bound

Row = dict[str, Any]

NAMES = {
    "control": "not pruned, same training (control)",
    "sum": "MFBP, sum",
    "product": "MFBP, product (default)",
    "reconstruction": "MFBP, reconstruction",
    "magnitude": "magnitude",
    "random": "random",
    "source": "the source's rule",
    "committed code": "the committed code's rule",
    "later text": "the later text's rule",
    "mfbp": "MFBP, sum",
    "factored": "factored (SVD)",
    "shared": "factored (shared bases)",
    "small": "small, from scratch",
}

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantile of Student's t over the number of pairs."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(values)
    if not values:
        return "-"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences."""
    mean = statistics.mean(differences)
    if len(differences) not in T95:
        return mean, mean
    half = T95[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


def pick(rows: Iterable[Row], **wish: Any) -> list[Row]:
    """The rows with these settings."""
    return [row for row in rows if all(row.get(key) == value for key, value in wish.items())]


def markdown(results: dict[str, Any], bounds: Sequence[Bound]) -> str:
    """The page."""
    lines = ["# Pruning by joint tri-factorization (MFBP)", ""]
    for name, write in PARTS.items():
        if results.get(name):
            lines += write(results[name])
    return "\n".join([*lines, "## Bounds", "", *(f"- {bound}" for bound in bounds), ""])


def _finished(rows: list[Row]) -> list[str]:
    body = []
    for net, level in PUBLISHED:
        control = pick(rows, net=net, rule="control")
        before = [row["before"]["accuracy"] for row in control]
        dense = {row["seed"]: row["before"]["accuracy"] for row in control}
        if not control:
            continue
        published = PUBLISHED[net, level]
        body.append(
            (
                f"{net}, {level:.2%}",
                "published",
                f"AUC {published[0]:.5f}",
                f"AUC {published[1]:.5f}",
                "",
                "",
                "",
            )
        )
        body.append(("", NAMES["control"], spread(before), *_scores(control), "", ""))
        for rule in ("sum", "product", "magnitude", "random", "source", "committed code", "later text"):
            mine = pick(rows, net=net, sparsity=level, rule=rule)
            if mine:
                low, high = interval([row["after"]["accuracy"] - dense[row["seed"]] for row in mine])
                change = f"{100 * low:+.2f} to {100 * high:+.2f}" if len(mine) > 1 else f"{100 * low:+.2f} (one seed)"
                zeros = statistics.mean(row["zeros"] for row in mine)
                body.append(("", NAMES[rule], "", *_scores(mine), change, f"{zeros:.1%}"))
    head = ("net, pruned", "rule", "accuracy before", "accuracy after", "true AUC after", "AUC of labels after")
    # the published rows print AUC of labels, which is about 1 - (10 / 18) error
    return [
        "## The finished protocol: one pruning of the trained net, then training (full MNIST)",
        "",
        _length(rows),
        "",
        *table((*head, "change of accuracy against its own dense net, points", "zeros"), [_wide(r) for r in body]),
        *(f"- {NAMES[rule]}: {said}." for rule, said in WRONG.items()),
        "",
    ]


def _wide(row: tuple[str, ...]) -> tuple[str, ...]:
    """Published rows have fewer cells."""
    return row if len(row) == 8 else (*row[:3], row[3], "", "", "", "")


def _scores(rows: list[Row]) -> tuple[str, str, str]:
    return tuple(spread([row["after"][key] for row in rows]) for key in ("accuracy", "auc", "auc of labels"))  # type: ignore[return-value]


def _length(rows: list[Row]) -> str:
    from protocols import LENGTHS  # noqa: PLC0415 - of the runs at hand

    kind = rows[0]["kind"]
    images, epochs, more = LENGTHS[kind]
    said = "the source's settings (no biases, weights of .01, RMSprop, rank 5)" if kind == "paper" else "improved ones"
    return (
        f"{images:,} training images, {epochs} epochs, then {more} more after the pruning ({said}: He's weights, "
        "biases, Adam along half a cosine, dropout .2 and .5, none after the pruning, for the control neither); the "
        "source trained 100 and 50 epochs. The epoch is "
        "chosen on 10,000 other training images, the test images are seen once."
        if kind != "paper"
        else f"{images:,} training images, {epochs} epochs, then {more} more after the pruning; {said}."
    )


def _ramps(rows: list[Row]) -> list[str]:
    body = []
    for images, net, sparsity in sorted({(r["images"], r["net"], r["sparsity"]) for r in rows}, reverse=True):
        mine = pick(rows, images=images, net=net, sparsity=sparsity)
        for rule, name in NAMES.items():
            some = pick(mine, rule=rule)
            if some:
                body.append(
                    (
                        f"{net}, {LABELS[images]}",
                        f"{sparsity:.0%}",
                        name,
                        spread([row["dense"] for row in some]),
                        spread([row["after"] for row in some]),
                        f"{statistics.mean(row['zeros'] for row in some):.1%}",
                        f"{statistics.mean(row['dead'] for row in some):.0f}",
                    )
                )
    return table(("net", "wanted", "rule", "dense", "after", "zeros", "dead units"), body)


LABELS = {
    "few": "3,500 images",
    "longer": "3,500 images, three epochs in between and ten at the end",
    "many": "50,000 images",
    "quick": "3,500 images",
}


def _deep(rows: list[Row]) -> list[str]:
    note = (
        "Trained, then ten prunings on a cubic ramp with an epoch after each, all by `taut.finetune`; He's weights, no "
        "dropout. The same 4,000 digits for all rules of a seed, 500 of them to choose the epoch on; 1,000 test digits "
        "(10,000 with 50,000 images)."
    )
    return ["## Rules on the same ramp", "", note, "", *_ramps(rows)]


def _convs(rows: list[Row]) -> list[str]:
    body = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for scope in ("convolutions", "dense", "together"):
            for sparsity in sorted({row["sparsity"] for row in pick(rows, data=data, scope=scope)}):
                mine = {row["rule"]: row for row in pick(rows, data=data, scope=scope, sparsity=sparsity)}
                values = [f"{mine[rule]['after']:.4f}" if rule in mine else "" for rule in CONV_RULES]
                dense = next(iter(mine.values()))["dense"]
                body.append((data, scope if sparsity else "(nothing)", f"{sparsity:.0%}", f"{dense:.4f}", *values))
    note = (
        "Two convolutions and two dense layers, 8,000 training images, five prunings with an epoch in between and "
        "three at the end, one seed."
    )
    head = ("data", "what is pruned", "zeros there", "dense", *(NAMES[rule] for rule in CONV_RULES))
    return ["## A convolutional net", "", note, "", *table(head, body)]


CONV_RULES = ("control", "sum", "product", "magnitude", "random", "source")


def _alexnet(rows: list[Row]) -> list[str]:
    body = [
        (
            row["part"],
            f"{row['relations']} of {row['types']} types",
            f"{row['weights']:,}",
            f"{row['numbers']:,}",
            f"{row['error']:.3f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
        if row["part"] != "trained"
    ]
    head = ("what is factorized", "relations", "weights", "numbers in the factors", "relative error", "seconds")
    lines = ["## AlexNet's real shapes", "", "Random weights: seconds and sizes count, errors are those of noise.", ""]
    lines += table(head, body)
    known = [row for row in rows if row["part"] == "trained"]
    if known:
        said = [(row["rule"], f"{row['sparsity']:.0%}", f"{row['top_1_error']:.4f}") for row in known]
        lines += [
            "Trained weights, nothing trained after the pruning:",
            "",
            *table(("rule", "pruned", "top-1 error"), said),
        ]
    return lines


def _draft(rows: list[Row]) -> list[str]:
    body = []
    for row in rows:
        curve = row["curve"]
        last = curve[-1]
        body.append(
            (row["net"], WAYS[row["way"]], f"{last['auc']:.4f}", f"{last['accuracy']:.4f}", f"{last['zeros']:.1%}")
        )
    note = (
        "The source's settings (no biases, weights of .01, RMSprop, 784-625-625-10 and five hidden layers). Its table "
        "of compression rates was announced and never printed: these are ours, as the share of weights that is zero. "
        "auc.svg shows the epochs."
    )
    head = ("net", "way", "true AUC at the end", "accuracy", "pruned")
    return ["## The draft's protocol: curves over the epochs, and its missing table", "", note, "", *table(head, body)]


WAYS = {"plain": "not pruned", "sum": "MFBP, sum, from epoch 40", "source": "the source's rule, from epoch 40"}


def _robust(rows: list[Row]) -> list[str]:
    lines = ["## Generalization and robustness", ""]
    for images in sorted({row["images"] for row in rows}):
        for wrong in sorted({row["wrong"] for row in rows}):
            body = []
            here = pick(rows, images=images, wrong=wrong)
            for way, sparsity in dict.fromkeys((row["way"], row["sparsity"]) for row in here):
                mine = pick(here, way=way, sparsity=sparsity)
                body.append(
                    (
                        NAMES.get(way, way),
                        f"{sparsity:.0%}" if sparsity else "",
                        spread([row["train"] for row in mine]),
                        spread([row["test"] for row in mine]),
                        f"{100 * statistics.mean(row['train'] - row['test'] for row in mine):.1f}",
                        spread([row["noisy"] for row in mine]),
                        f"{statistics.mean(row['seconds'] for row in mine):.1f}",
                    )
                )
            head = ("net", "smaller by", "training images", "test", "gap, points", "noisy test images", "training, s")
            said = f", {wrong:.0%} of the labels wrong" if wrong else ""
            lines += [f"{images:,} images{said}:", "", *table(head, body)]
    return lines


def _deployed(rows: list[Row]) -> list[str]:
    body = [
        (
            f"{row['net']}, {row['sparsity']:.0%}",
            NAMES[row["rule"]],
            f"{row['masked']:.4f} / {row['accuracy']:.4f}",
            *(f"{row[key][0]:,} -> {row[key][1]:,}" for key in ("params", "bytes")),
            str(row["batch"]),
            f"{row['ms'][0]:.3f} -> {row['ms'][1]:.3f}",
            f"{row['speedup']:.2f}x",
        )
        for row in rows
    ]
    note = (
        "Dead units, channels and inputs taken out of the pruned net; the dense net and it each in the fastest of "
        "eager, channels_last, ONNX Runtime and OpenVINO, timed in turns."
    )
    head = (
        "net, pruned",
        "rule",
        "accuracy masked / without dead units",
        "parameters",
        "file, bytes",
        "batch",
        "ms",
        "",
    )
    return ["## Really smaller, really faster", "", note, "", *table(head, body)]


def _sharing(rows: list[Row]) -> list[str]:
    body = []
    for share in sorted({row["share"] for row in rows}):
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = pick(rows, share=share, way=way)
            if mine:
                body.append(
                    (
                        f"{share:.1%}",
                        SHARED[way],
                        *(spread([row[key] for row in mine]) for key in ("bare", "after")),
                        f"{statistics.mean(row['values'] for row in mine):,.0f}",
                        f"{statistics.mean(row['macs'] for row in mine):,.0f}",
                    )
                )
    head = ("parameters kept", "way", "untrained", "after training", "values stored", "MACs")
    note = "The five-layer net of 3,500 digits, five epochs of training after one compression; 10,000 test digits."
    return ["## Shared bases against separate factors and masks, at equal parameters", "", note, "", *table(head, body)]


SHARED = {
    "shared": "one basis per layer of neurons, shared",
    "svd": "separate factors (SVD in the metric of the data, planned)",
    "magnitude": "mask, magnitude",
    "mfbp": "mask, MFBP sum",
}


def _facts(rows: list[Row]) -> list[str]:
    found = {row["fact"]: row for row in rows}
    lines = ["## Smaller measurements", ""]
    if "bound" in found:
        body = [
            (str(r["rank"]), f"{r['joint']:.3f}", f"{r['separate']:.3f}", f"{r['seconds']:.2f}")
            for r in found["bound"]["rows"]
        ]
        lines += ["Relative error of H over the rank, five-layer net:", ""]
        lines += table(("rank", "one basis per layer", "separate SVDs (lower bound)", "seconds"), body)
    if "denoising" in found:
        body = [
            (
                f"{r['noise']:.1f}",
                f"{r['error']:.2f}",
                f"{r['error factored']:.2f}",
                f"{r['accuracy']:.3f}",
                f"{r['accuracy factored']:.3f}",
            )
            for r in found["denoising"]["rows"]
        ]
        head = ("noise on the weights", "distance to the clean net", "of its H", "accuracy", "of its H")
        lines += [f"Noise on the weights (clean net {found['denoising']['accuracy']:.3f}):", "", *table(head, body)]
    if "widths" in found:
        body = [
            (
                str(r["width"]),
                f"{statistics.mean(r['first']):.3f}",
                f"{statistics.mean(r['last']):.3f}",
                spread(r["last"]),
            )
            for r in found["widths"]["rows"]
        ]
        lines += ["Nets of several widths from scratch, 4,000 images, three seeds and three rates:", ""]
        lines += table(("hidden units", "test after one epoch", "at the end", "spread"), body)
    return lines


PARTS = {
    "finished": _finished,
    "deep": _deep,
    "convs": _convs,
    "alexnet": _alexnet,
    "deployed": _deployed,
    "sharing": _sharing,
    "draft": _draft,
    "robust": _robust,
    "facts": _facts,
}
