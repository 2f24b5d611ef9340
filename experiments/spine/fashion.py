"""Untrained compression of the Fashion-MNIST nets: test accuracy over budgets and calibration seeds.

.venv/bin/python experiments/spine/fashion.py [--data DIR]     (DIR holds fashion-mnist/, unless the system does)

Per net and seed 2,048 train images without labels calibrate; budgets are fractions of the MACs, fixed beforehand;
nothing is chosen on the test split. "bare" leaves out the refit and the batch-norm re-estimation (no data in apply).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import HERE, Bound, calibration, evaluation, finish, load, load_average, split_train, trained

import taut

LIMITS = {("vgg", 8): 2.0, ("resnet", 4): 3.0}
"""Points below the dense net that the mean over seeds may lose."""

AIMS = {("vgg", 8): 1.5, ("resnet", 4): 2.3}


def one_seed(name: str, args: argparse.Namespace, seed: int, train: Any, accuracy: Any) -> list[dict[str, Any]]:
    """Every budget for one net and one set of calibration images."""
    net = trained(name)
    batches = calibration(train, args.samples, seed)
    start = time.perf_counter()
    network = taut.trace(net, batches[0][:1])
    stats = taut.observe(network, net, batches)
    print(f"{name} seed {seed}: observed in {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for ratio in args.ratios:
        start = time.perf_counter()
        plan = taut.plan(network, stats, budget=taut.Budget(macs=1 / ratio))
        bare = taut.apply(net, plan, stats)
        refit = taut.apply(net, plan, stats, data=batches)
        macs = taut.trace(refit, batches[0][:1]).cost.macs
        row = {
            "net": name,
            "seed": seed,
            "ratio": ratio,
            "macs_ratio": network.cost.macs / macs,
            "params_ratio": network.cost.params / sum(p.numel() for p in refit.parameters()),
            "bare": accuracy(bare).value,
            "refit": accuracy(refit).value,
            "seconds": time.perf_counter() - start,
        }
        print(
            f"{name} seed {seed} MACs /{row['macs_ratio']:.2f}: bare {row['bare']:.4f}, refitted {row['refit']:.4f}",
            flush=True,
        )
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]], dense: dict[str, float], seeds: int) -> list[dict[str, Any]]:
    """Mean and spread over seeds, printed as a table."""
    table = []
    print(f"\n{'net':8s}{'MACs':>6s}{'dense':>9s}{'bare':>9s}{'refitted':>10s}{'+-':>7s}{'points lost':>13s}")
    for name, ratio in dict.fromkeys((row["net"], row["ratio"]) for row in rows):
        mine = [row for row in rows if (row["net"], row["ratio"]) == (name, ratio)]
        refit = [row["refit"] for row in mine]
        mean, spread = statistics.mean(refit), statistics.stdev(refit) if seeds > 1 else 0.0
        bare = statistics.mean(row["bare"] for row in mine)
        lost = 100 * (dense[name] - mean)
        table.append(
            {
                "net": name,
                "ratio": ratio,
                "dense": dense[name],
                "bare_mean": bare,
                "refit_mean": mean,
                "refit_sd": spread,
                "refit_range": [min(refit), max(refit)],
                "points_lost": lost,
                "params_ratio": statistics.mean(row["params_ratio"] for row in mine),
            }
        )
        print(f"{name:8s}{'/' + str(ratio):>6s}{dense[name]:9.4f}{bare:9.4f}{mean:10.4f}{spread:7.4f}{lost:13.2f}")
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with fashion-mnist/")
    parser.add_argument("--nets", nargs="+", default=["vgg", "resnet"])
    parser.add_argument("--ratios", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2048, help="calibration images")
    return parser.parse_args()


def main() -> None:
    """Run everything; write results/fashion.json."""
    args = arguments()
    load_before = load_average()
    accuracy = evaluation(*load("fashion-mnist", "test", args.data))
    train = split_train("fashion-mnist", args.data)[0]
    dense = {name: accuracy(trained(name)).value for name in args.nets}
    rows = [
        row for name in args.nets for seed in range(args.seeds) for row in one_seed(name, args, seed, train, accuracy)
    ]
    table = summary(rows, dense, args.seeds)
    bounds = [
        Bound(f"{row['net']} at MACs /{row['ratio']}: points lost", limit, row["points_lost"], at_most=True)
        for row in table
        for limit in [LIMITS.get((row["net"], row["ratio"]))]
        if limit is not None
    ]
    for row in table:
        aim = AIMS.get((row["net"], row["ratio"]))
        if aim is not None:
            reached = "reached" if row["points_lost"] <= aim else "missed"
            print(f"aim for {row['net']} at /{row['ratio']}, {aim} points: {reached}")
    settings = {"samples": args.samples, "seeds": args.seeds, "ratios": args.ratios, "load_average_before": load_before}
    finish(HERE / "results" / "fashion.json", settings, {"table": table, "runs": rows}, bounds)


if __name__ == "__main__":
    main()
