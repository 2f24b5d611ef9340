"""`Budget(drop=0.01)` searched on validation images must hold on a test split that the search never saw.

.venv/bin/python experiments/spine/drop.py --data DIR     (DIR holds mnist/ and, unless the system does, fashion-mnist/)

For another author's digit CNN (MNIST) and for the two Fashion-MNIST nets of experiments/nets. Calibration: 2,048 train
images without labels; the search evaluates on 5,000 other train images; the test split is read once, at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import HERE, Bound, calibration, evaluation, finish, load, load_average, split_train, trained
from digit import normalized, trained_net
from torch import Tensor, nn

import taut

DROP = 0.01

Task = tuple[Callable[[], nn.Module], str, Callable[[Tensor], Tensor]]

TASKS: dict[str, Task] = {
    "digit_cnn": (trained_net, "mnist", normalized),
    "vgg": (lambda: trained("vgg"), "fashion-mnist", lambda x: x),
    "resnet": (lambda: trained("resnet"), "fashion-mnist", lambda x: x),
}


def search(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], Bound]:
    """Compress with a budget of drop, then look at the test split."""
    build, images, prepare = TASKS[name]
    net = build()
    x, _, held, labels = split_train(images, args.data)
    batches = calibration(prepare(x), args.samples, args.seed)
    on_valid = evaluation(prepare(held), labels)
    start = time.perf_counter()
    made = taut.compress(net, batches[0][:1], budget=taut.Budget(drop=DROP), data=batches, evaluate=on_valid)
    seconds = time.perf_counter() - start
    test, test_labels = load(images, "test", args.data)
    on_test = evaluation(prepare(test), test_labels)
    before, after = on_test(net).value, on_test(made.model).value
    found = made.comparison.to_dict()
    row = {
        "params_ratio": found["params_ratio"],
        "macs_ratio": found["macs_ratio"],
        "validation": [found["accuracy_before"], found["accuracy_after"]],
        "test": [before, after],
        "test_drop": before - after,
        "seconds": seconds,
    }
    print(
        f"{name:10s} parameters {found['params_ratio']:.2f}x, MACs {found['macs_ratio']:.2f}x fewer; validation "
        f"{found['accuracy_before']:.4f} -> {found['accuracy_after']:.4f}; test {before:.4f} -> {after:.4f}; "
        f"{seconds:.0f} s",
        flush=True,
    )
    return row, Bound(f"{name}: drop of test accuracy", DROP, before - after, at_most=True)


def main() -> None:
    """Search for every net; write results/drop.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with mnist/")
    parser.add_argument("--nets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--samples", type=int, default=2048, help="calibration images")
    parser.add_argument("--seed", type=int, default=0, help="which calibration images")
    args = parser.parse_args()
    load_before = load_average()
    found = {name: search(name, args) for name in args.nets}
    settings = {"drop": DROP, "samples": args.samples, "seed": args.seed, "load_average_before": load_before}
    results = {name: row for name, (row, _) in found.items()}
    finish(HERE / "results" / "drop.json", settings, results, [bound for _, bound in found.values()])


if __name__ == "__main__":
    main()
