"""What the study says about the claims of the sources; every number is read from the results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from typing import Any

from mlps import BATCH, FIVE, FOUR, TWO, WIDE
from protocols import DRAFT_EPOCHS, LENGTHS, PUBLISHED
from readings import Found, Row, measured, one
from robust import IMAGES, WRONG
from sheets import interval, pick

HERE = "MNIST, dense nets, three seeds"


def findings(results: dict[str, Any]) -> Found:
    """Claim -> ours, verdict, why."""
    facts = {row["fact"]: row for row in results["facts"]}
    return {
        **_protocol(results["finished"]),
        **_rules(results),
        **_curves(results["draft"]),
        **_general(results["robust"]),
        **_small(results["robust"], facts),
        **_method(results, facts),
        **measured(facts),
        **_convs(results["convs"], results["deployed"]),
    }


def mean(rows: Iterable[Row], key: str) -> float:
    """Of one result over rows."""
    return statistics.mean(row[key] for row in rows)


def after(rows: Iterable[Row], key: str = "accuracy") -> float:
    """Mean score after training."""
    return statistics.mean(row["after"][key] for row in rows)


def _protocol(rows: list[Row]) -> Found:
    found: Found = {}
    images, epochs, more = LENGTHS["full"]
    kept, said = [], []
    for place, (net, level) in enumerate(PUBLISHED, 1):
        control = pick(rows, net=net, rule="control")
        mine = pick(rows, net=net, sparsity=level, rule="product")
        before, now = (
            statistics.mean(r[k]["auc of labels"] for r in s) for k, s in (("before", control), ("after", mine))
        )
        dense = {row["seed"]: row["before"]["accuracy"] for row in control}
        low, high = interval([row["after"]["accuracy"] - dense[row["seed"]] for row in mine])
        published = PUBLISHED[net, level]
        fell = published[1] < published[0] - 0.0006
        ours_fell = high < 0
        kept.append(not ours_fell)
        said.append(f"{after(mine):.4f}")
        found[f"final-table-row-{place}"] = one(
            f"AUC of labels {before:.4f} -> {now:.4f}; accuracy {statistics.mean(dense.values()):.4f} -> "
            f"{after(mine):.4f} (change {100 * low:+.2f} to {100 * high:+.2f} points)",
            ours_fell <= fell,
            f"mean of {len(mine)} seeds, improved settings, {epochs} and {more} epochs instead of 100 and 50; the "
            f"control with the same training ends at {after(control):.4f}",
        )
    return found | {
        "outline-redundancy": one(
            f"{list(PUBLISHED)[1][1]:.0%} of the weights pruned at no loss beyond the interval",
            all(kept[:2]),
            HERE,
        ),
        "draft-abstract-size": one(
            f"no loss beyond the interval in {sum(kept)} of {len(kept)} rows at 66 to 94 % pruned, each against its "
            "dense net; against the control with the same training all are lower",
            sum(kept) >= len(kept) - 2,
            "MNIST, three seeds; smaller is the number of weights that are not zero, the file is not",
        ),
        "final-table": one(
            f"accuracy after {', '.join(said)}; no loss beyond the interval in {sum(kept)} of {len(kept)} rows",
            sum(kept) >= len(kept) - 2,
            "the two rows of highest pruning are the ones where a loss may show; the control with the same training is "
            "in the table",
        ),
        "final-widths": one(f"{weights(TWO):,} and {weights(FOUR):,} weights built", True, corrected=True),
        "final-data": one(f"{images:,} / 10,000 / 10,000, fixed shuffle", True),
        "draft-mnist": one("60,000 and 10,000 images of 28 x 28 read from the IDX files", True),
        "final-auc": _auc(rows),
        "final-reversed-rule": _versus(rows, "later text", "the reversed rule"),
        "draft-todo-5": _versus(rows, "source", "the source's rule at equal pruning", doubted=True),
        "draft-criterion": _versus(rows, "source", "the source's rule at equal pruning"),
        "final-schedule": one(f"{epochs} epochs, ONE pruning, {more} epochs", True, "shortened", corrected=True),
    }


def weights(widths: tuple[int, ...]) -> int:
    """Of a dense net without biases."""
    return sum(a * b for a, b in itertools.pairwise(widths))


def _auc(rows: list[Row]) -> dict[str, str]:
    scores = [row["before"] for row in pick(rows, rule="control")]
    gap = max(abs(s["auc of labels"] - (1 - 10 / 18 * (1 - s["accuracy"]))) for s in scores)
    true = statistics.mean(s["auc"] for s in scores)
    labels = statistics.mean(s["auc of labels"] for s in scores)
    ours = f"of labels {labels:.4f}, at most {gap:.4f} from 1 - (10/18) error; true AUC {true:.5f}"
    return one(ours, True, "the published values are AUC of hard labels", corrected=True)


def _versus(rows: list[Row], rule: str, name: str, *, doubted: bool = False) -> dict[str, str]:
    parts, worse = [], 0
    pairs = [(net, level) for net, level in PUBLISHED if pick(rows, net=net, sparsity=level, rule=rule)]
    for net, level in pairs:
        theirs = pick(rows, net=net, sparsity=level, rule=rule)
        seeds = {row["seed"] for row in theirs}
        ours = [row for row in pick(rows, net=net, sparsity=level, rule="sum") if row["seed"] in seeds]
        parts.append(f"{after(theirs):.4f} against {after(ours):.4f}")
        worse += after(theirs) < after(ours)
    why = f"{name} is worse in {worse} of {len(pairs)} rows after training, one seed; rank 50 where the source says 5"
    ours_said = f"accuracy {name} against the sum |W| + |H|: {', '.join(parts)}"
    return one(ours_said, (worse < len(pairs) / 2) != doubted, why)


def _rules(results: dict[str, Any]) -> Found:
    deep = results["deep"]

    def at(rule: str, **wish: Any) -> float:
        return mean(pick(deep, net="5 hidden", sparsity=0.98, rule=rule, **wish), "after")

    few = {rule: at(rule, images="few") for rule in ("control", "sum", "product", "magnitude", "random", "source")}
    said = ", ".join(f"{rule} {value:.3f}" for rule, value in few.items())
    dead = {rule: mean(pick(deep, images="few", net="5 hidden", sparsity=0.98, rule=rule), "dead") for rule in few}
    where = "98 % of five hidden layers pruned, 3,500 digits, ten alternations"
    iterated = pick(deep, images="few", net="2 hidden", sparsity=0.98, rule="magnitude")
    return {
        "draft-prune-nodes": one(
            f"{dead['product']:.0f} (product), {dead['sum']:.0f} (sum), {dead['magnitude']:.0f} (magnitude) of 3,125 "
            "hidden units dead",
            dead["product"] > dead["magnitude"],
            f"{where}: the product of W and H empties most units; the published rule scores single weights",
            corrected=True,
        ),
        "draft-han-threshold": one(
            f"accuracy {mean(iterated, 'dense'):.3f} -> {mean(iterated, 'after'):.3f} with two hidden layers, "
            f"{few['magnitude']:.3f} with five",
            mean(iterated, "after") > mean(iterated, "dense") - 0.05,
            "98 % pruned in ten rounds: it works in the shallow net and fails in the deep one",
        ),
        "draft-shared-basis": one(said, few["sum"] > few["magnitude"], where),
    }


def _curves(rows: list[Row]) -> Found:
    by = {(row["net"], row["way"]): row["curve"] for row in rows}
    images, plain, times = DRAFT_EPOCHS["full"]
    found: Found = {}
    names = {("2 hidden", "plain"): "net-2", ("5 hidden", "plain"): "net-5"}
    names |= {("2 hidden", "sum"): "net-2-pruned", ("5 hidden", "sum"): "net-5-pruned"}
    for (net, way), name in names.items():
        curve = by[net, way]
        first = next((i + 1 for i, p in enumerate(by[net, "plain"]) if p["auc"] > 0.9), None)
        stalled = f"; the net leaves chance at epoch {first}" if net == "5 hidden" else ""
        found[f"draft-figure-3-{name}"] = one(
            f"AUC {curve[0]['auc']:.4f} -> {curve[-1]['auc']:.4f}, accuracy {curve[-1]['accuracy']:.4f}, "
            f"{curve[-1]['zeros']:.0%} pruned{stalled}",
            curve[-1]["auc"] > 0.9,
            "one seed, the source's settings; its curve has no printed value",
        )
    end = {key: curve[-1] for key, curve in by.items()}
    drop = end["2 hidden", "plain"]["auc"] - end["2 hidden", "sum"]["auc"]
    source = end["2 hidden", "source"]
    return found | {
        "draft-figure-3": one(
            f"two hidden layers end at {end['2 hidden', 'plain']['auc']:.4f}, pruned "
            f"{end['2 hidden', 'sum']['auc']:.4f}; five at "
            f"{end['5 hidden', 'plain']['auc']:.4f}, pruned {end['5 hidden', 'sum']['auc']:.4f}",
            drop < 0.005,
            "with the sum |W| + |H|, a cubic ramp to 90 %; only the course can be compared",
        ),
        "draft-compression-rate": one(
            f"{end['2 hidden', 'sum']['zeros']:.0%} of the weights at AUC {end['2 hidden', 'sum']['auc']:.4f}, by the "
            f"source's rule at {source['auc']:.4f}",
            True,
            "announced and not printed in the source; these are ours",
            corrected=True,
        ),
        "draft-four-networks": one(f"{len(names)} nets, {weights(WIDE):,} and {weights(FIVE):,} weights", True),
        "draft-schedule-plain": one(f"{plain + 2 * times} epochs, {images:,} images, batches of {BATCH}", True),
        "draft-schedule-pruned": one(f"{plain} + {2 * times} epochs, {times} prunings", True),
    }


def _general(rows: list[Row]) -> Found:
    gains: dict[str, list[float]] = {}
    noisy: dict[str, list[float]] = {}
    wrong: list[float] = []
    for images in IMAGES:
        for share in WRONG:
            here = pick(rows, images=images, wrong=share)
            base = {row["seed"]: row for row in pick(here, way="dense, extra epochs")}
            for way in ("mfbp", "magnitude", "factored"):
                for row in pick(here, way=way):
                    other = base.get(row["seed"])
                    if other:
                        gains.setdefault(way, []).append(row["test"] - other["test"])
                        noisy.setdefault(way, []).append(row["noisy"] - other["noisy"])
                        wrong += [row["test"] - other["test"]] if share and way == "mfbp" else []

    def said(values: dict[str, list[float]]) -> str:
        return ", ".join(
            f"{way} {100 * statistics.mean(v):+.1f} points (better in {sum(x > 0 for x in v)} of {len(v)})"
            for way, v in values.items()
        )

    better = statistics.mean(gains["factored"] + gains["mfbp"]) > 0
    sturdy = statistics.mean(noisy["factored"] + noisy["mfbp"]) > 0
    where = "over-sized net on 1,000 to 50,000 images, 0 and 20 % wrong labels, 50 to 90 % fewer weights; against the "
    where += "dense net with the same extra epochs"
    dense = {(r["images"], r["wrong"], r["seed"]): r for r in pick(rows, way="dense, extra epochs")}
    gap = [
        (row["train"] - row["test"]) - (other["train"] - other["test"])
        for row in pick(rows, way="mfbp")
        if (other := dense.get((row["images"], row["wrong"], row["seed"])))
    ]
    return {
        "draft-abstract-generalize": one(f"clean test images: {said(gains)}", better, where),
        "draft-intro-prune-large": one(f"clean test images: {said(gains)}", better, where),
        "draft-abstract-robust": one(f"noisy test images: {said(noisy)}", sturdy, where),
        "draft-pruning-size-overfit": one(
            f"gap between training and test images {100 * statistics.mean(gap):+.1f} points, test "
            f"{100 * statistics.mean(gains['mfbp']):+.1f} points",
            statistics.mean(gap) < 0 and statistics.mean(gains["mfbp"]) > 0,
            where,
        ),
        "outline-problems-solved": one(
            f"generalization: {said(gains)}; time and storage only without the dead units, interpretation: basis.svg",
            better,
            "each benefit measured apart; generalization is the one that does not come by itself" if not better else "",
        ),
    }


def _small(rows: list[Row], facts: dict[str, Row]) -> Found:
    wins, total, times = 0, 0, []
    for small in pick(rows, way="small"):
        key = {k: small[k] for k in ("images", "wrong", "seed")}
        pruned = pick(rows, way="mfbp", sparsity=small["sparsity"], **key)
        dense = pick(rows, way="dense", **key)
        if pruned and dense:
            total, wins = total + 1, wins + (pruned[0]["test"] > small["test"])
            if dense[0]["seconds"] > 0.5:
                times.append((dense[0]["seconds"] + pruned[0]["seconds"]) / small["seconds"])
    found: Found = {
        "draft-augasta-time": one(
            f"large, pruned and trained on takes {statistics.median(times):.1f} times the time of the small net "
            f"(median of {len(times)}); its test accuracy is higher in {wins} of {total}",
            statistics.median(times) <= 1.0,
            "training on masked weights costs as much as on dense ones; seconds on a shared processor",
        )
    }
    if "widths" in facts:
        by = {row["width"]: row for row in facts["widths"]["rows"]}
        widths = sorted(by)
        first = {w: statistics.mean(by[w]["first"]) for w in widths}
        last = {w: statistics.mean(by[w]["last"]) for w in widths}
        spread = {w: statistics.stdev(by[w]["last"]) for w in widths}
        said = ", ".join(f"{w} units {last[w]:.3f}" for w in widths)
        where = "two hidden layers from scratch on 4,000 images, three seeds and three rates"
        found |= {
            "draft-intro-large-learn-fast": one(
                ", ".join(f"{w} units {first[w]:.3f}" for w in widths) + " after one epoch",
                first[widths[-1]] > first[widths[1]] > first[widths[0]],
                where,
            ),
            "draft-intro-oversized-overfit": one(said, last[widths[-1]] < max(last.values()) - 0.005, where),
            "draft-intro-small-generalize": one(said, last[widths[1]] > last[widths[-1]], where),
            "draft-intro-small-hard-to-train": one(said, last[widths[0]] < last[widths[-1]] - 0.05, where),
            "draft-intro-small-sensitive": one(
                ", ".join(f"{w} units ± {spread[w]:.3f}" for w in widths),
                spread[widths[0]] > 2 * spread[widths[-1]],
                where,
            ),
        }
    return found


def _method(results: dict[str, Any], facts: dict[str, Row]) -> Found:
    finished = results["finished"]
    bare = pick(finished, rule="sum")
    lost = statistics.mean(r["before"]["accuracy"] - r["bare"]["accuracy"] for r in bare)
    left = statistics.mean(r["before"]["accuracy"] - r["after"]["accuracy"] for r in bare)
    control = pick(finished, rule="control")
    gained = statistics.mean(r["after"]["accuracy"] - r["before"]["accuracy"] for r in control)
    healed = one(
        f"one pruning costs {100 * lost:.1f} points on the mean; after training {-100 * left:+.2f} against before, the "
        f"unpruned control {100 * gained:+.2f}",
        left < lost,
        HERE,
    )
    sharing = results.get("sharing", [])
    said = ", ".join(
        f"{share:.1%}: shared {mean(pick(sharing, share=share, way='shared'), 'after'):.3f}, SVD "
        f"{mean(pick(sharing, share=share, way='svd'), 'after'):.3f}"
        for share in sorted({row["share"] for row in sharing})
    )
    least = min((row["share"] for row in sharing), default=0)
    pays = bool(sharing) and mean(pick(sharing, share=least, way="shared"), "after") > mean(
        pick(sharing, share=least, way="svd"), "after"
    )
    joint = facts["stacked"]
    return {
        "draft-finetune-recovers": healed,
        "draft-finetune-bias": healed,
        "draft-intro-pruning-keeps": healed,
        "outline-method": one("whole-network step `mfbp`, dense and convolutional nets", True, HERE),
        "draft-algorithm": one(
            "train, then repeat factorize, score, raise the mask, fine-tune (`taut.ramp`, `taut.alternate`)",
            True,
            "the source's to-do 3, written and run",
            corrected=True,
        ),
        "draft-all-relations": one("every matrix and kernel offset of the net is one relation of the graph", True),
        "draft-theorem-3-1": one("G_i S_ij G_j^T built, and its error measured", True, corrected=True),
        "draft-equation-1": one(
            said or "-", bool(sharing), "share KEPT; built nets hold that many values", corrected=True
        ),
        "draft-todo-2": one(said or "-", bool(sharing), "the network-wide size equation as a function", corrected=True),
        "draft-abstract-low-dim": one(
            said or "-",
            bool(sharing),
            "as factors with shared bases the net really holds that share of the parameters"
            + ("" if pays else "; separate factors are better at equal size here"),
            corrected=True,
        ),
        "draft-simple-case": one(
            f"relative error {joint['joint']:.6f} jointly, {joint['stacked']:.6f} by the SVD of [W_0^T | W_1]",
            abs(joint["joint"] - joint["stacked"]) < 1e-4,
            corrected=True,
        ),
    }


def _convs(rows: list[Row], deployed: list[Row]) -> Found:
    if not rows:
        return {}

    def at(data: str, scope: str, sparsity: float, rule: str) -> Row:
        return pick(rows, data=data, scope=scope, sparsity=sparsity, rule=rule)[0]

    ours = at("mnist", "together", 0.9, "sum")
    control = {data: at(data, "together", 0.0, "control")["after"] for data in ("mnist", "fashion-mnist")}
    parts = ", ".join(f"{scope} {at('fashion-mnist', scope, 0.9, 'sum')['after']:.4f}" for scope in SCOPES)
    dense = ours["dense"]
    fashion = at("fashion-mnist", "together", 0.9, "sum")
    faster = [row for row in deployed if row["net"].startswith("conv")]
    said = ", ".join(f"{row['speedup']:.1f}x at batch {row['batch']}" for row in faster if row["rule"] == "sum")
    return {
        "final-conv-mnist": one(
            f"accuracy {dense:.4f} -> {ours['after']:.4f} at 90 % zeros, the control {control['mnist']:.4f}",
            ours["after"] > control["mnist"] - 0.005,
            "one seed",
        ),
        "outline-separate-factorization": one(
            f"Fashion-MNIST at 90 %: {parts} (dense {fashion['dense']:.4f})",
            True,
            "each kernel offset is one relation; faster only once dead channels are cut out: " + said,
            corrected=True,
        ),
        "outline-keeps-or-improves": one(
            f"MNIST {dense:.4f} -> {ours['after']:.4f}, Fashion-MNIST {fashion['dense']:.4f} -> {fashion['after']:.4f}",
            all(row["after"] > control[row["data"]] - 0.005 for row in (ours, fashion)),
            f"90 % of all layers pruned, one seed; the control with the same training {control['mnist']:.4f} and "
            f"{control['fashion-mnist']:.4f}: unchanged, not better",
        ),
    }


SCOPES = ("convolutions", "dense", "together")
