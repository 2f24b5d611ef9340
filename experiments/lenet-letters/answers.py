"""What the runs say about the source's claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from lenet import CONV, FC, WIDTHS, lenet
from letters import EMNIST
from printed import Row, level_name, mean, pick
from reductions import DENSE, PUBLISHED, SHARES

from taut.studies.claims import CONTRADICTED, CORRECTED, REPRODUCED

Found = dict[str, dict[str, str]]

BASELINE = 91.1
PATIENCE = 10
WEIGHTS, PER_RANK = 18_720, 141
"""Of the larger net's convolutions, and of a CP term over both."""

POINT = 1.0
TABLES = {"magnitude fc": 1, "magnitude conv": 2, "svd fc": 3, "cp conv": 4}
ALIKE = {0.05: 1, 0.2: 5, 0.5: 10, 0.75: 15}
"""Share that magnitude keeps of the convolutions -> the CP rank that keeps about as much."""


def one(ours: str, holds: bool, why: str = "", *, corrected: bool = False) -> dict[str, str]:
    """A finding: ours, the verdict, and why."""
    verdict = CONTRADICTED if not holds else CORRECTED if corrected else REPRODUCED
    return {"ours": ours, "verdict": verdict, "why": why}


def findings(found: dict[str, Any], kind: str) -> Found:
    """Claim -> ours, verdict, why."""
    book = Book(found["tables"], kind)
    return {
        **counts(book),
        **masks(found["facts"]),
        **rows_of_tables(book),
        **tables(book),
        **protocol(book),
        **discussion(book, found.get("larger", [])),
    }


class Book:
    """The rows of the four tables, and how far a net is from the trained one of its seed, in points."""

    def __init__(self, rows: list[Row], kind: str) -> None:
        """Remember them."""
        self.rows, self.kind = rows, kind
        self.dense = {row["seed"]: 100 * row["test"] for row in pick(rows, way="dense")}
        self.where = "" if kind == EMNIST else "letters from fonts: changes against the trained net are compared"

    def change(self, experiment: str, level: float, way: str = "text", beside: str = "") -> float:
        """Points above the trained net, mean over the seeds; only those that have a row of the way `beside` too."""
        seeds = {row["seed"] for row in pick(self.rows, experiment=experiment, level=level, way=beside or way)}
        rows = pick(self.rows, experiment=experiment, level=level, way=way)
        return statistics.mean(100 * row["test"] - self.dense[row["seed"]] for row in rows if row["seed"] in seeds)

    def control(self) -> float:
        """The same of the net that is trained further and not reduced."""
        return statistics.mean(100 * row["test"] - self.dense[row["seed"]] for row in pick(self.rows, way="control"))

    def printed(self, experiment: str, level: float) -> float:
        """The same of the source."""
        return PUBLISHED[experiment, level][2] - BASELINE

    def levels(self, experiment: str) -> list[float]:
        """Those of a table."""
        return [level for name, level in PUBLISHED if name == experiment]

    def changes(self, experiment: str) -> str:
        """All changes of a table in words."""
        parts = [f"{level_name(experiment, lv)}: {self.change(experiment, lv):+.1f}" for lv in self.levels(experiment)]
        return ", ".join(parts)


def counts(book: Book) -> Found:
    """What follows from the built nets alone."""
    dense = pick(book.rows, way="dense")[0]["params"]
    text = pick(book.rows, way="text", seed=0)
    equal = sum(row["params as counted"] == PUBLISHED[row["experiment"], row["level"]][0] for row in text)
    shares = {
        (r["experiment"], r["level"]): (f"{r['share']:.2f}", f"{r['share as counted']:.2f}")
        for r in text
        if (r["experiment"], r["level"]) in SHARES
    }
    svd = [shares["svd fc", level] for level in book.levels("svd fc")]
    cp = [shares["cp conv", level] for level in book.levels("cp conv")]
    rank5 = pick(text, experiment="cp conv", level=5)[0]
    gone = dense - pick(text, experiment="cp conv", level=1)[0]["params"]
    all_svd = all(
        counted == f"{SHARES['svd fc', lv]:.2f}" for lv, (_, counted) in zip(book.levels("svd fc"), svd, strict=True)
    )
    all_cp = all(w == f"{SHARES['cp conv', lv]:.2f}" for lv, (w, _) in zip(book.levels("cp conv"), cp, strict=True))
    _, _, c, d = WIDTHS
    grown = int(0.75 * d) * (c + d)
    conv, behind = (
        sum(p.numel() for name in part for p in lenet().get_submodule(name).parameters()) for part in (CONV, FC)
    )
    built = f"built nets: {equal} of {len(text)} printed totals"
    return {
        "intro-architecture": one(f"{dense} parameters as built", dense == DENSE, corrected=True),
        "intro-compare-rank": one(built, equal == len(text)),
        "setup-four-experiments": one(built, equal == len(text)),
        "setup-magnitude-levels": one(built, equal == len(text)),
        "setup-svd-levels": one(built, equal == len(text)),
        "setup-cp-ranks": one(built, equal == len(text)),
        "threshold-from-share": one(built, equal == len(text), "n - int(removed n) weights stay", corrected=True),
        "svd-two-layers": one(built, equal == len(text), "int(share of the smaller side)", corrected=True),
        "svd-both-layers": one(
            f"{len(FC)} dense layers, {built}", equal == len(text), "the totals need all", corrected=True
        ),
        "svd-parameters": one(
            f"second layer at 75 %: {grown} weights in place of {c * d}",
            grown > c * d,
            "it grows there",
            corrected=True,
        ),
        "cp-shapes": one("41 weights a rank over both layers", all_cp, "the letters are mixed up", corrected=True),
        "cp-four-tensors": one(
            f"rank 5: {rank5['params']} parameters", all_cp, "the first layer grows from rank 5 on", corrected=True
        ),
        "cp-rank-5-size": one(
            f"{rank5['share']:.2f} % of 918 weights stay", False, "205 weights, a cut of 77.7 %, as its own table says"
        ),
        "setup-svd-shares": one(
            f"{', '.join(counted for _, counted in svd)} % with the middle biases, {', '.join(w for w, _ in svd)} % "
            "without",
            all_svd,
            "the source counts a bias for every middle unit, which its layers need not have",
            corrected=True,
        ),
        "setup-cp-shares": one(f"{', '.join(w for w, _ in cp)} %", all_cp),
        "results-section-sizes": one(f"{behind} and {conv} parameters", behind + conv == dense),
        "abstract-conv-contributes-little": one(f"{gone} of {dense} parameters at most", gone < 0.02 * dense),
    }


def masks(facts: dict[str, float]) -> Found:
    """Equations 2 to 4 and algorithm 1, tried out."""
    adam, sgd = facts["adam, gradient"], facts["sgd, gradient"]
    said = f"largest removed weight after 20 steps: {sgd:.1g} with plain descent, {adam:.1g} with Adam's old moments"
    why = "the weights have to be masked as well; ours stay at 0"
    return {
        "equation-3": one(said, sgd == 0, why, corrected=adam > 0),
        "algorithm-1": one(said, sgd == 0, why, corrected=adam > 0),
        "equation-4": one("zeros are what is held at zero", facts["adam, hold"] == 0),
        "magnitude-threshold": one("zeros are what is held at zero", facts["adam, hold"] == 0),
    }


def rows_of_tables(book: Book) -> Found:
    """Every row: the total exactly, and whether its distance to the net it comes from is within a point of ours."""
    found = {}
    for experiment, number in TABLES.items():
        for place, level in enumerate(book.levels(experiment), 1):
            rows = pick(book.rows, experiment=experiment, level=level, way="text")
            ours, theirs = book.change(experiment, level), book.printed(experiment, level)
            counted = rows[0]["params as counted"]
            words = f"{counted} parameters, {mean(rows, 'epochs'):.0f} epochs, {100 * mean(rows):.1f} % ({ours:+.1f})"
            near = abs(ours - theirs) <= POINT and counted == PUBLISHED[experiment, level][0]
            why = f"printed {theirs:+.1f} against its trained net. {book.where}"
            found[f"table-{number}-row-{place}"] = one(words, near, why)
    return found


def tables(book: Book) -> Found:
    """The course of every table."""
    fc = [book.change("magnitude fc", level) for level in book.levels("magnitude fc")]
    conv = {level: book.change("magnitude conv", level) for level in book.levels("magnitude conv")}
    svd = {level: book.change("svd fc", level) for level in book.levels("svd fc")}
    cp = {level: book.change("cp conv", level) for level in book.levels("cp conv")}
    return {
        "table-1": one(book.changes("magnitude fc"), max(fc) - min(fc) <= POINT, "the same at every level, it says"),
        "table-2": one(book.changes("magnitude conv"), min(conv[lv] for lv in (0.2, 0.5, 0.75)) >= -POINT),
        "table-3": one(book.changes("svd fc"), svd[0.05] < -20 and svd[0.5] >= -POINT, _collapse(book)),
        "table-4": one(book.changes("cp conv"), min(cp[rank] for rank in (5, 10, 15)) >= -POINT),
    }


def _collapse(book: Book) -> str:
    code, text = (book.change("svd fc", 0.05, way, "code") for way in ("code", "text"))
    planned = book.change("svd fc", 0.05, "planned")
    return (
        f"5 %, one seed: {text:+.1f} points with trained convolutions and biases, {code:+.1f} as the source's "
        f"programs, {planned:+.1f} with ranks planned at that size instead of one singular value for 26 letters"
    )


def protocol(book: Book) -> Found:
    """What the source departs from, and how long its nets trained."""
    rewound, kept = (book.change("magnitude fc", 0.1, way, "rewound") for way in ("rewound", "text"))
    said = f"10 % kept, one seed: {kept:+.1f} points continued, {rewound:+.1f} rewound"
    epochs = [mean(pick(book.rows, way="text", experiment=e, level=lv), "epochs") for e, lv in PUBLISHED]
    return {
        "magnitude-no-rewinding": one(said, kept >= rewound, "continuing is as good or better"),
        "results-epochs-recovery": one(
            f"{min(epochs):.0f} to {max(epochs):.0f} epochs",
            min(epochs) >= PATIENCE,
            "the ten epochs without improvement are counted in: 10 means that none helped",
            corrected=True,
        ),
        "intro-smaller-avoid": _from_scratch(book),
    }


def _from_scratch(book: Book) -> dict[str, str]:
    rows = [row for row in pick(book.rows, way="scratch") if row["experiment"] == "magnitude fc"]
    levels = sorted({row["level"] for row in rows})
    small = {lv: book.change("magnitude fc", lv, "scratch") for lv in levels}
    gaps = {lv: book.change("magnitude fc", lv, "text", "scratch") - small[lv] for lv in levels}
    words = ", ".join(f"{level_name('magnitude fc', lv)}: {gap:+.1f}" for lv, gap in gaps.items())
    return one(
        f"one seed, pruned above a net of equal size from scratch, points: {words}",
        min(small.values()) >= -POINT,
        "a net that is small from the start avoids the cost, not always the loss",
    )


def discussion(book: Book, larger: list[Row]) -> Found:
    """Abstract and discussion."""
    change = book.change
    svd, magnitude = change("svd fc", 0.05), change("magnitude fc", 0.05)
    gaps = {share: change("cp conv", rank) - change("magnitude conv", share) for share, rank in ALIKE.items()}
    said = ", ".join(f"{share:.0%}: {gap:+.1f}" for share, gap in gaps.items())
    leads = {lv: change("magnitude conv", lv) - change("magnitude fc", lv) for lv in book.levels("magnitude fc")}
    lead = ", ".join(f"{share:.0%}: {gap:+.1f}" for share, gap in leads.items())

    def size(experiment: str, way: str = "text") -> int:
        return int(pick(book.rows, experiment=experiment, level=0.05, way=way)[0]["params"])

    scratch = change("magnitude fc", 0.05, "scratch")
    sides = {
        "magnitude fc": change("magnitude fc", 0.05, "text", "scratch"),
        "svd fc": change("svd fc", 0.05, "text", "code"),
    }
    planned = f"20 % is asked for; with ranks planned at its size {change('svd fc', 0.2, 'planned'):+.1f} (one seed)"
    near: Callable[[float, float], bool] = lambda value, limit: value >= -limit  # noqa: E731
    svd_better = [lv for lv in book.levels("svd fc") if change("svd fc", lv) >= change("magnitude fc", lv)]
    collapse = one(f"SVD {svd:+.1f}, magnitude {magnitude:+.1f} points", svd < magnitude - 20, _collapse(book))
    found = {
        "abstract-singular-values-matter": collapse,
        "discussion-svd-drop": collapse,
        "discussion-singular-hypothesis": one(
            f"SVD at or above magnitude at {len(svd_better)} of 5 levels; {collapse['ours']}",
            svd < magnitude - POINT and not svd_better[1:],
            f"with ranks planned at the size of 5 % {change('svd fc', 0.05, 'planned'):+.1f}, of 20 % "
            f"{change('svd fc', 0.2, 'planned'):+.1f} points (one seed): which singular values stay counts",
        ),
        "abstract-compare": one(
            f"one seed: {size('magnitude fc')} parameters by magnitude {sides['magnitude fc']:+.1f}, "
            f"{size('svd fc')} by SVD {sides['svd fc']:+.1f}, a net of {size('magnitude fc', 'scratch')} from scratch "
            f"{scratch:+.1f} points",
            max(abs(side - scratch) for side in sides.values()) > POINT,
            "which parameters stay matters, not their number alone",
        ),
        "abstract-fc-approximated": one(book.changes("svd fc"), near(change("svd fc", 0.2), POINT), planned),
        "abstract-conv-preserves": one(f"convolutions above dense layers, points: {lead}", min(leads.values()) > 0),
        "discussion-conv-per-share": one(f"points: {lead}", min(leads.values()) > 0, "same share of its own section"),
        "discussion-fc-sustain": one(book.changes("magnitude fc"), near(change("magnitude fc", 0.1), 3), book.where),
        "discussion-methods-similar": one(
            f"{book.changes('magnitude fc')}; SVD {book.changes('svd fc')}",
            all(abs(change("svd fc", lv) - change("magnitude fc", lv)) <= 3 for lv in book.levels("svd fc")[1:]),
            "from 10 % on, within three points",
        ),
        "discussion-conv-methods-similar": one(
            f"CP above magnitude at like share, points: {said}", max(abs(gap) for gap in gaps.values()) <= 2
        ),
    }
    if larger:
        found["discussion-small-conv"] = open_question(larger, gaps)
    return found


def open_question(rows: list[Row], small: dict[float, float]) -> dict[str, str]:
    """Whether the likeness of CP and magnitude comes only from small convolutions: then larger ones would differ."""
    pairs = []
    for share in sorted({row["level"] for row in rows if row["experiment"] == "magnitude conv"}):
        blind = 100 * mean(pick(rows, experiment="magnitude conv", level=share))
        terms = [row for row in rows if row["experiment"] == "cp conv" and row["way"] == "text"]
        near = min({row["level"] for row in terms}, key=lambda rank: abs(rank * PER_RANK - share * WEIGHTS))
        pairs.append((share, 100 * mean(pick(terms, level=near)) - blind))
    words = ", ".join(f"{share:.0%}: {gap:+.1f}" for share, gap in pairs)
    differ = max(abs(gap) for _, gap in pairs) > max(2 * POINT, *(abs(gap) for gap in small.values()))
    return one(
        f"CP above magnitude on 32 and 64 channels, one seed, points: {words}",
        differ,
        "they differ more than on the small ones" if differ else "they are as alike on twenty times the weights",
    )
