"""The study's page: Tables 1 to 4 beside the printed ones, the open question, comparators, surgeons, vectors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reductions import PUBLISHED, SHARES

from taut.studies import Bound

Row = dict[str, Any]

TITLES = {
    "magnitude fc": "Table 1: magnitude pruning of the fully connected layers",
    "magnitude conv": "Table 2: magnitude pruning of the convolutions",
    "svd fc": "Table 3: SVD of the fully connected layers",
    "cp conv": "Table 4: CP of the convolutions",
}
LEVELS = {"magnitude fc": "kept", "magnitude conv": "kept", "svd fc": "singular values kept", "cp conv": "rank"}
CODE = {
    "svd fc": "one seed, as the source's programs: convolutions at random again, no biases in the dense layers",
    "cp conv": "one seed, as the source's programs: fully connected layers at random again",
}


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these settings."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "-"
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def mean(rows: Sequence[Row], key: str = "test") -> float:
    """Over the seeds."""
    return statistics.mean(row[key] for row in rows)


def level_name(experiment: str, level: float) -> str:
    """As it is printed."""
    return f"{level:.0f}" if experiment == "cp conv" else f"{100 * level:.0f} %"


def markdown(found: dict[str, Any], bounds: Sequence[Bound], kind: str) -> str:
    """The whole page."""
    lines = [
        "# LeNet-5 on letters",
        "",
        f"Images: {kind}. Training stops when the validation loss has not fallen for ten epochs; the best validation "
        "weights are kept; every reduced net starts from the same trained net of its seed, with all its weights and "
        "biases. Accuracy on test images, mean ± standard deviation over the seeds.",
        "",
        *baselines(found["tables"]),
    ]
    for experiment, title in TITLES.items():
        rows = pick(found["tables"], experiment=experiment)
        if rows:
            lines += ["", f"## {title}", "", *table(experiment, rows)]
    for title, part in (
        ("Is it the small convolutions? Twenty times the weights", larger(found.get("larger", []))),
        ("All methods on the same nets with the same training", comparators(found.get("comparators", {}))),
        ("Optimal brain surgeon beside masks alone, untrained", surgeons(found.get("surgeons", []))),
        ("Vector quantization of a dense net (784-500-300-10)", vectors(found.get("vectors", []))),
    ):
        if part:
            lines += ["", f"## {title}", "", *part]
    lines += ["", "## Bounds", "", *(f"- {bound}" for bound in bounds)]
    lines += ["", "## What is wrong or missing in print", "", *corrections()]
    left = [f"- {name}: {why}" for name, why in found.get("left out", {}).items()]
    return "\n".join([*lines, *(["", "## Left out", "", *left] if left else [])]) + "\n"


def corrections() -> list[str]:
    """Every correction once, with the places that it concerns."""
    claims = json.loads((Path(__file__).parent / "published.json").read_text())["claims"]
    places: dict[str, list[str]] = {}
    for claim in claims:
        if claim.get("correction"):
            places.setdefault(claim["correction"], []).append(claim["where"])
    return [f"- {', '.join(dict.fromkeys(where))}: {words}" for words, where in places.items()]


def baselines(rows: Sequence[Row]) -> list[str]:
    """The trained nets, and the same trained further without any reduction."""
    dense, control = pick(rows, way="dense"), pick(rows, way="control")
    return [
        "| net | parameters | epochs | accuracy |",
        "|---|--:|--:|--:|",
        "| published | 82554 | - | 91.1 |",
        *(
            f"| {name} | {some[0]['params']} | {spread([r['epochs'] for r in some], 1, 0)} | "
            f"{spread([r['test'] for r in some])} |"
            for name, some in (("trained", dense), ("control: trained further like the reduced ones", control))
            if some
        ),
    ]


def table(experiment: str, rows: Sequence[Row]) -> list[str]:
    """One of the four tables."""
    ways = [way for way in ("planned", "data", "scratch", "code", "rewound") if pick(rows, way=way)]
    names = {
        "planned": "one seed: ranks planned by taut at that size, untrained -> trained",
        "data": "one seed: data metric, refitted, untrained -> trained",
        "scratch": "one seed: equal size from scratch",
        "code": CODE.get(experiment, ""),
        "rewound": "one seed: rewound to the first weights",
    }
    head = [LEVELS[experiment], "share %", "parameters (printed)", "epochs (printed)", "printed", "ours, untrained"]
    lines = [
        f"| {' | '.join([*head, 'ours', *(names[way] for way in ways)])} |",
        "|--:" * (len(head) + 1 + len(ways)) + "|",
    ]
    for level in dict.fromkeys(row["level"] for row in rows):
        text = pick(rows, way="text", level=level)
        params, epochs, accuracy = PUBLISHED[experiment, level]
        counted, built = text[0]["params as counted"], text[0]["params"]
        size = f"{built} ({params})" if counted == built else f"{built}; {counted} as the source counts ({params})"
        share = f"{text[0]['share']:.2f}"
        if (experiment, level) in SHARES:
            share += f" ({SHARES[experiment, level]})"
        cells = [
            level_name(experiment, level),
            share,
            size,
            f"{spread([r['epochs'] for r in text], 1, 0)} ({epochs})",
            f"{accuracy:.1f}",
            spread([r["untrained"] for r in text]),
            spread([r["test"] for r in text]),
        ]
        for way in ways:
            some = pick(rows, way=way, level=level)
            words = spread([r["test"] for r in some])
            if way in {"data", "planned"} and some:
                words = f"{spread([r['untrained'] for r in some])} -> {words}"
            cells.append(words)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def larger(rows: Sequence[Row]) -> list[str]:
    """Magnitude and CP at equal shares of the larger net."""
    if not rows:
        return []
    lines = [
        "| net of 32 and 64 channels, convolutions | share % | untrained | trained |",
        "|---|--:|--:|--:|",
    ]
    order = sorted({(r["experiment"], r["way"], r["level"]) for r in rows}, key=lambda key: (key[0], key[1], key[2]))
    for experiment, way, level in order:
        some = pick(rows, experiment=experiment, way=way, level=level)
        name = {"dense": "trained", "control": "control"}.get(way, f"{experiment.partition(' ')[0]}, {way} {level:g}")
        share = f"{some[0]['share']:.1f}" if "share" in some[0] else "100"
        before = spread([r["untrained"] for r in some if "untrained" in r])
        lines.append(f"| {name} | {share} | {before} | {spread([r['test'] for r in some])} |")
    return lines


def comparators(studies: dict[str, dict[str, list[Row]]]) -> list[str]:
    """A row per net, method and size: bytes, latency, accuracy untrained and trained."""
    if not studies:
        return []
    lines = [
        "Bytes are those of the saved file (dense layers with zeros take their whole size), `zipped` the same file "
        "after zlib; faster: torch, 32 images, against the original in turns.",
        "",
        "| net | method | size | parameters | bytes | zipped | faster | untrained | trained |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for net, kinds in studies.items():
        bare = {(row["method"], row["size"]): row for row in kinds.get("untrained", [])}
        for row in kinds["trained"]:
            before = bare.get((row["method"], row["size"]), {}).get("accuracy")
            size = "" if row["size"] is None else f"{row['size']:g}"
            if row["accuracy"] is None:
                lines.append(f"| {net} | {row['method']} | {size} | - | - | - | - | - | {row['reason']} |")
                continue
            lines.append(
                f"| {net} | {row['method']} | {size} | {row['params']} | {row['bytes']} | {row['zipped']} | "
                f"{row['speedup']:.2f}x | {'-' if before is None else f'{100 * before:.1f}'} | "
                f"{100 * row['accuracy']:.1f} |"
            )
    return lines


def surgeons(rows: Sequence[Row]) -> list[str]:
    """Accuracy over sparsity, net by net."""
    if not rows:
        return []
    levels = [level for level, _ in rows[0]["curve"]]
    lines = [
        f"| net | method | dense | {' | '.join(f'{100 * level:.0f} % zero' for level in levels)} |",
        "|---|---|" + "--:|" * (1 + len(levels)),
    ]
    for net, method, refit in dict.fromkeys((row["net"], row["method"], row["refit"]) for row in rows):
        some = pick(rows, net=net, method=method, refit=refit)
        values = [spread([row["curve"][place][1] for row in some]) for place in range(len(levels))]
        lines.append(
            f"| {net} | {method}{', refitted' if refit else ''} | {100 * some[0]['dense']:.1f} | {' | '.join(values)} |"
        )
    return lines


def vectors(rows: Sequence[Row]) -> list[str]:
    """Bytes and accuracy per setting."""
    if not rows:
        return []
    lines = [
        "| data | setting | smaller file | smaller after zlib | before | untrained | trained |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for data, words in dict.fromkeys((row["data"], named(row["settings"])) for row in rows):
        some = [row for row in rows if row["data"] == data and named(row["settings"]) == words]
        ratio, zipped = (statistics.mean(row[key][0] / row[key][1] for row in some) for key in ("bytes", "zipped"))
        values = [spread([row[key] for row in some], digits=2) for key in ("before", "untrained", "trained")]
        lines.append(f"| {data} | {words} | {ratio:.1f}x | {zipped:.1f}x | {' | '.join(values)} |")
    return lines


def named(settings: Row) -> str:
    """A setting of the codebook in words."""
    if not settings:
        return "control"
    if "block" not in settings:
        return f"{settings['pruned']:.0%} pruned (obs), then int8" if "pruned" in settings else "int8"
    kind = "one codebook" if settings["shared"] else "a codebook per block"
    return f"blocks of {settings['block']}, {settings['codes']} codes, {kind}"
