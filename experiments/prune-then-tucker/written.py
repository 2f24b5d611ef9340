"""The page of the study: table.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from automatic_ranks import LITERATURE
from contest import EPOCHS as CONTEST_EPOCHS
from contest import FAST, FRACTIONS, PEERS, RUNTIMES, SIDES, interval, unpacked
from matched import COMPARED, TITLES, WAYS, gains
from pipelines import EPOCHS, IMAGES

from taut.studies import Bound

CAPTION = f"""Fashion-MNIST, nets trained before (`experiments/nets`). Every run, the control included, learns {EPOCHS}
epochs of {IMAGES:,} images with Adam; after two steps half of them each. Best validation epoch, accuracy on all test
images. Sizes are fractions of the dense net's. A seed decides the order of the training images; the trained net that
all start from is the same. Means over seeds ± half of their range. The levels of the runs were set so that the curves
cover the accuracies compared, after a first look at such curves (rows that lay too far are in the table). GoogLeNet has
a quarter of the source's width."""


def markdown(found: dict[str, Any], bounds: Sequence[Bound]) -> str:
    """All tables."""
    parts = ["# Filter pruning, then Tucker with automatic ranks", "", CAPTION, ""]
    parts += _curves(found["pipelines"]) + _matched(found["matched"]) + _contest(found) + _automatic(found["automatic"])
    parts += ["## Bounds", "", *(f"- {bound}" for bound in bounds), ""]
    return "\n".join(parts)


def _curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Curves",
        "",
        "![curves](curves.svg)",
        "",
        "| net | way | level | seeds | parameters | MACs | accuracy |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for net in dict.fromkeys(row["net"] for row in rows):
        for way in ("control", *WAYS):
            mine = [row for row in rows if row["net"] == net and row["way"] == way]
            for level in dict.fromkeys(str(row["level"]) for row in mine):
                same = [row for row in mine if str(row["level"]) == level]
                mean = {key: sum(r[key] for r in same) / len(same) for key in ("params", "macs", "accuracy")}
                spread = (max(r["accuracy"] for r in same) - min(r["accuracy"] for r in same)) / 2
                told = f"{mean['accuracy']:.4f}" + (f" ± {spread:.4f}" if len(same) > 1 else "")
                told_level = "" if level == "None" else level.strip("[]")
                lines.append(
                    f"| {net} | {TITLES.get(way, way)} | {told_level} | {len(same)} | {mean['params']:.3f} | "
                    f"{mean['macs']:.3f} | {told} |"
                )
    return [*lines, ""]


def _matched(table: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## At matched accuracy",
        "",
        "Times smaller at so many points below the control, interpolated between runs, never beyond them. Gains over "
        "the better of pruning and Tucker alone: of pruning, then Tucker / Tucker, then pruning / one plan; and of one "
        "plan over planned ranks as well. Factors are geometric means over the seeds. The source: up to 57 % for "
        "compression, up to 48 % for FLOPs, without saying against what.",
        "",
        f"| net | points lost | size | {' | '.join(TITLES[way] for way in WAYS)} | gains |",
        "|---" * (4 + len(WAYS)) + "|",
    ]
    known = {(w, g["net"], g["drop"], g["size"]): g["gain"] for w in COMPARED for g in gains(table, *w)}
    for row in table:
        found = [known.get((way, row["net"], row["drop"], row["size"])) for way in COMPARED]
        values = " | ".join(f"{row[way]:.2f}x" if way in row else "-" for way in WAYS)
        told = " / ".join("-" if gain is None else f"{gain:+.0%}" for gain in found)
        lines.append(f"| {row['net']} | {row['drop']} | {row['size']} | {values} | {told} |")
    return [*lines, ""]


def _contest(found: dict[str, Any]) -> list[str]:
    rows = {(row["net"], row["side"], row["macs"]): row for row in found["contest"]}
    speeds = {(row["net"], row["side"], row["macs"]): row for row in found["speeds"]}
    lines = [
        "## Beside Torch-Pruning 1.6.1",
        "",
        f"Equal MACs, one seed; all learn {CONTEST_EPOCHS} epochs of the same 12,000 images. The difference is to the "
        "better of the peer's two importances, with its paired 95 % interval over test images. Speed: dense over "
        f"compressed, each in its fastest runtime of {', '.join(RUNTIMES)}. The training is short, and does not "
        "lift the control: a net may be best before it, and then stays as it was. 'As fast' has a budget of time "
        "beside that of MACs: what the faster of the peer's two nets takes, measured before, at a batch of 32. The "
        "peer prunes in one shot, without rounding of widths; its nets start at chance since it moves no other "
        "weights.",
        "",
        "| net | MACs kept | side | MACs | parameters | untrained | tuned | difference | speed, batch 1 / 32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if not any(row["side"] in PEERS for row in found["contest"]):
        lines.insert(2, "Torch-Pruning is not installed (pip install torch-pruning==1.6.1): its rows are left out.\n")
    for net in dict.fromkeys(row["net"] for row in found["contest"]):
        for macs in (1.0, *FRACTIONS):
            peers = [rows[net, peer, macs] for peer in PEERS if (net, peer, macs) in rows]
            best = max(peers, key=lambda row: _mean(row, "after") or 0.0) if peers else None
            for side in ("control", *SIDES, FAST, *PEERS):
                row = rows.get((net, side, macs))
                if row is None:
                    continue
                difference = ""
                if side in {"ours", FAST} and best is not None:
                    mean, half = interval(
                        unpacked(row["after"], row["images"]), unpacked(best["after"], best["images"])
                    )
                    difference = f"{100 * mean:+.2f} ± {100 * half:.2f}"
                fast = speeds.get((net, side, macs), {})
                told = " / ".join(f"{fast[k]:.2f}x" if k in fast else "-" for k in ("batch 1", "batch 32"))
                after = _mean(row, "after")
                lines.append(
                    f"| {net} | {macs} | {'Torch-Pruning, ' if side in PEERS else ''}{side} | {row['cost']:.3f} | "
                    f"{row['params']:.3f} | {_mean(row, 'before'):.4f} | {'' if after is None else f'{after:.4f}'} | "
                    f"{difference} | {told} |"
                )
    return [*lines, ""]


def _mean(row: dict[str, Any], when: str) -> float | None:
    return float(unpacked(row[when], row["images"]).mean()) if when in row else None


def _automatic(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Tucker-2 with ranks by variational Bayes",
        "",
        "Ours: untrained, with refit, classifiers kept; accuracy of test images (CREPE: raw pitch accuracy). The "
        "literature (Kim et al. 2016, from memory): after fine-tuning on ImageNet, not comparable.",
        "",
        "| net | factor of the ranks | weights | FLOPs | dense | compressed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['net']} | {row['vbmf']} | not here: {row['missing'][:80]} | | | |")
        else:
            lines.append(
                f"| {row['net']} | {row['vbmf']} | {row['weights']:.2f}x | {row['flops']:.2f}x | {row['dense']:.4f} | "
                f"{row['accuracy']:.4f} |"
            )
    for line in LITERATURE:
        lines.append(
            f"| {line['net']} (literature) | 1 | {line['weights']}x | {line['flops']}x | | "
            f"-{line['drop']} top-5 points |"
        )
    return [*lines, ""]
