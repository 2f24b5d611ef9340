"""Another author's trained digit CNN: 4x fewer parameters without training, saved, reloaded, and its whole front.

.venv/bin/python experiments/spine/digit_cnn.py --data DIR     (DIR holds mnist/ with the four IDX files)

Calibration: 2,048 MNIST TRAIN images without labels. The budget is fixed beforehand; nothing is chosen on test images,
which are read once before and once after. The front is measured on 5,000 train images that calibration does not hold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import HERE, Bound, calibration, evaluation, finish, load, load_average, split_train
from digit import build, normalized, trained_net
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import taut

POINTS_LOST = 0.2
FRONT_SECONDS = 180.0


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs in batches of one fixed size."""
    with torch.no_grad():
        return torch.cat([model(x) for x in images.split(500)])


def reload(folder: Path, images: Path, result: Path) -> None:
    """What the fresh process does: build, load, run."""
    model = taut.load(folder, base=build)
    save_file({"outputs": outputs(model, load_file(images)["images"])}, result)


def reloads_equal(made: taut.Result, images: Tensor) -> bool:
    """Save, load in a fresh process, and compare outputs bit by bit."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        made.save(place / "small")
        save_file({"images": images.contiguous()}, place / "images.safetensors")
        paths = [str(place / part) for part in ("small", "images.safetensors", "outputs.safetensors")]
        subprocess.run([sys.executable, __file__, "--reload", *paths], check=True)
        return torch.equal(load_file(paths[-1])["outputs"], outputs(made.model, images))


def compressed(net: nn.Module, args: argparse.Namespace, batches: list[Tensor]) -> tuple[dict[str, Any], list[Bound]]:
    """Compress to the budget, measure on the test set, reload."""
    images, labels = load("mnist", "test", args.data)
    images = normalized(images)
    start = time.perf_counter()
    made = taut.compress(
        net,
        images[:1],
        budget=taut.Budget(params=args.params),
        data=batches,
        evaluate=evaluation(images, labels),  # only reported: a budget of params never looks at it
    )
    seconds = time.perf_counter() - start
    print(made.plan)
    print(made.comparison)
    found = made.comparison.to_dict()
    lost = 100 * (found["accuracy_before"] - found["accuracy_after"])
    equal = reloads_equal(made, images[:1000])
    bounds = [
        Bound("times fewer parameters", 1 / args.params, found["params_ratio"]),
        Bound("points of test accuracy lost", POINTS_LOST, lost, at_most=True),
        Bound("outputs bit-equal after reload in a fresh process (1: yes)", 1, float(equal)),
    ]
    return {"comparison": found, "points_lost": lost, "reload_equal": equal, "seconds": seconds}, bounds


def front(net: nn.Module, batches: list[Tensor], held: tuple[Tensor, Tensor]) -> tuple[list[dict[str, Any]], Bound]:
    """The whole front, timed."""
    start = time.perf_counter()
    found = taut.explore(net, held[0][:1], data=batches, evaluate=evaluation(*held))
    seconds = time.perf_counter() - start
    print(f"\nFront on validation images, {seconds:.0f} s:\n{found}")
    rows = [
        {
            "ratio": point.ratio,
            "params": point.after.params,
            "macs": point.after.macs,
            "bytes": point.after.bytes,
            "ms": point.ms_after,
            "validation": point.value,
        }
        for point in found.points
    ]
    return [*rows, {"seconds": seconds}], Bound("seconds of the front", FRONT_SECONDS, seconds, at_most=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with mnist/")
    parser.add_argument("--params", type=float, default=0.25, help="fraction of the parameters kept")
    parser.add_argument("--samples", type=int, default=2048, help="calibration images")
    parser.add_argument("--seed", type=int, default=0, help="which calibration images")
    parser.add_argument("--no-front", action="store_true", help="leave the front out")
    parser.add_argument("--reload", type=Path, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all parts; write results/digit_cnn.json."""
    args = arguments()
    if args.reload:
        reload(*args.reload)
        return
    net, load_before = trained_net(), load_average()
    train, _, held, labels = split_train("mnist", args.data)
    batches = calibration(normalized(train), args.samples, args.seed)
    results, bounds = compressed(net, args, batches)
    if not args.no_front:
        results["front"], bound = front(net, batches, (normalized(held), labels))
        bounds.append(bound)
    settings = {"params": args.params, "samples": args.samples, "seed": args.seed, "load_average_before": load_before}
    finish(HERE / "results" / "digit_cnn.json", settings, results, bounds)


if __name__ == "__main__":
    main()
