"""`taut reproduce resemblyzer`: a trained LSTM that tells speakers apart, with half of its multiply-accumulates.

Untrained: taut's default call on partial utterances of other voices, three draws of these; the original as control.
Distilled: the same net trained on such partials without labels towards the original's embeddings, and the original
with the same training. Quality is the equal error rate over all pairs of utterances of 44 voices, which are in no other
part, and the mean cosine between an utterance's embedding and the original's. How fast the net is, speed.py measures.

Speech is made by Debian's espeak-ng, the weights come from a package (speech.py, speakers.py). --paper and --data
change nothing here.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import taut
from taut.artifact.manifest import taut_version
from taut.studies import Bound, Cell, run_grid, write_results
from taut.studies.grid import cells

NEEDS = ("accelerate", "resemblyzer")
"""Packages beside taut's own, looked for before the first step."""

sys.path.insert(0, str(Path(__file__).parent))

from speakers import embed, encoder, partials, untrained  # noqa: E402 - found through the line above
from speech import UTTERANCES, equal_error_rate, scores, utterances  # noqa: E402

HALF = {"macs": 0.5}
CALIBRATION, BATCH = 256, 64
"""Partials, of 160 frames each."""

TRAINING = [
    {"way": "taut", "seed": 0, "voices": "calibration", "utterances": 40, "epochs": 6},
    {"way": "original", "seed": 0, "voices": "calibration", "utterances": 40, "epochs": 6},
    {"way": "taut", "seed": 0, "voices": "training", "utterances": 12, "epochs": 5},
]
"""The last takes half an hour of one thread; the control's gradient is 0: longer training changes nothing."""

RATE = 1e-3

DRAWS = 200
"""Of the bootstrap over voices."""


class Study:
    """The original and the measured speech, and one function per kind of run."""

    def __init__(self, out: Path, quick: bool) -> None:
        """Read the weights, speak."""
        self.net, self.nets = encoder(), out / ("quick-nets" if quick else "nets")
        self.voices, self.count = (6, 3) if quick else (None, UTTERANCES)
        self.partials = 32 if quick else CALIBRATION
        self.training = [cell | {"utterances": 3, "epochs": 1} for cell in TRAINING[:2]] if quick else TRAINING
        self.mels, self.whose = utterances("measured", self.count, most=self.voices)

    def speech(self, part: str, count: int, seed: int) -> Tensor:
        """Partials of a part's voices, shuffled."""
        mels, _ = utterances(part, count, seed, most=self.voices)
        found = torch.cat([partials(mel) for mel in mels])
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]

    def loader(self, seed: int) -> list[Tensor]:
        """Calibration partials."""
        return list(self.speech("calibration", self.count, seed)[: self.partials].split(BATCH))

    @cached_property
    def original(self) -> Tensor:
        """The original's embeddings."""
        return embed(self.net, self.mels)

    def measured(self, net: nn.Module) -> dict[str, Any]:
        """Sizes as ratios, and the quality that is left."""
        found = embed(net, self.mels)
        first, second = scores(self.original, self.whose), scores(found, self.whose)
        costs = [taut.trace(each, partials(self.mels[0])).cost for each in (self.net, net)]
        ratios = {key: getattr(costs[0], key) / getattr(costs[1], key) for key in ("params", "macs", "bytes")}
        low, high = self.interval(first, second)
        return {
            **ratios,
            "cosine": float((found * self.original).sum(1).mean()),
            "error_before": equal_error_rate(*first),
            "error": equal_error_rate(*second),
            "points_low": low,
            "points_high": high,
        }

    def interval(
        self, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
    ) -> tuple[float, ...]:
        """95 % of a paired bootstrap over voices: points of equal error rate lost."""
        rng, whose, lost = np.random.default_rng(0), np.asarray(self.whose), []
        one, other = np.triu_indices(len(whose), 1)
        orders = [np.argsort(cosines, kind="stable") for cosines, _ in (first, second)]
        for _ in range(DRAWS):
            times = np.bincount(rng.integers(whose.max() + 1, size=whose.max() + 1), minlength=whose.max() + 1)
            weights = (times[whose[one]] * times[whose[other]]).astype(float)
            weights[first[1]] = times[whose[one[first[1]]]]  # a voice drawn twice is twice itself
            before, after = (
                equal_error_rate(cosines[order], same[order], weights[order])  # sorted: sorting is quick
                for order, (cosines, same) in zip(orders, (first, second), strict=True)
            )
            lost.append(100 * (after - before))
        return tuple(float(bound) for bound in np.percentile(lost, (2.5, 97.5)))

    def small(self, way: str, seed: int) -> nn.Module:
        """The original, or what the default call makes of it; kept for speed.py."""
        if way == "original":
            return self.net
        loader = self.loader(seed)
        made = taut.compress(self.net, loader[0], budget=HALF, data=loader, compare=False, seed=seed)
        made.save(self.nets / str(seed))
        return made.model

    def made(self, seed: int) -> nn.Module:
        """The default call's net, as it was kept."""
        folder = self.nets / str(seed)
        return taut.load(folder, base=untrained) if folder.is_dir() else self.small("taut", seed)

    def untrained(self, cell: Cell) -> dict[str, Any]:
        """Sizes and quality of one net."""
        start = time.perf_counter()
        net = self.small(cell["way"], cell["seed"])
        return {"seconds": time.perf_counter() - start} | self.measured(net)

    def trained(self, cell: Cell) -> dict[str, Any]:
        """Quality after distillation from the original."""
        small = self.net if cell["way"] == "original" else self.made(cell["seed"])
        train = self.speech(cell["voices"], cell["utterances"], 100)
        start = time.perf_counter()
        done = taut.finetune(
            small,
            None,
            None,
            list((train if cell["way"] != "original" else train[:BATCH]).split(BATCH)),  # the control's gradient is 0
            list(self.speech("validation", self.count, 0).split(BATCH)),
            teacher=self.net,
            example=train[:BATCH],
            schedule=(taut.Stage(epochs=cell["epochs"], rate=RATE),),
            folder=self.nets / f"training-{cell['way']}-{cell['voices']}",
            seed=cell["seed"],
        )
        minutes = (time.perf_counter() - start) / 60
        return {"minutes": minutes, "threads": torch.get_num_threads(), "partials": len(train)} | self.measured(done)


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json and table.md into `out`.

    Returns:
        Whether every stated bound holds.
    """
    del data, paper
    if shutil.which("espeak-ng") is None:
        (out / "table.md").write_text("Nothing was measured. There is no speech: apt-get install espeak-ng.\n")
        return False
    study, marker = Study(out, quick), "quick-" if quick else ""
    mark = f"taut {taut_version()}, torch {torch.__version__}, {study.partials} partials"
    grid = [*cells(way=["taut"], seed=range(1 if quick else seeds or 3)), {"way": "original", "seed": 0}]
    untrained = run_grid(grid, study.untrained, out / f"{marker}untrained.jsonl", "untrained", mark)
    trained_mark = f"{mark}, rate {RATE}"
    distilled = run_grid(study.training, study.trained, out / f"{marker}distilled.jsonl", "distilling", trained_mark)
    bounds = [] if quick else limits(untrained, distilled)
    (out / "table.md").write_text(markdown(untrained, distilled, bounds))
    settings = {
        "quick": quick,
        "seeds": len(untrained) - 1,
        "utterances": len(study.whose),
        "calibration": study.partials,
        "training": study.training,
        "rate": RATE,
        "batch": BATCH,
    }
    return write_results(out / "results.json", settings, {"untrained": untrained, "distilled": distilled}, bounds)


def limits(untrained: list[dict[str, Any]], distilled: list[dict[str, Any]]) -> list[Bound]:
    """What is asked of the default call, and of distillation."""
    ours = [row for row in untrained if row["way"] == "taut"]
    tuned = [row for row in distilled if row["way"] == "taut"][-1]
    lost = [100 * (row["error"] - row["error_before"]) for row in (*ours, tuned)]
    return [
        Bound("times fewer MACs", 2.0, min(row["macs"] for row in ours)),
        Bound("untrained: points of equal error rate lost, the worst seed", 1.0, max(lost[:-1]), at_most=True),
        Bound("untrained: mean cosine to the original, the worst seed", 0.98, min(row["cosine"] for row in ours)),
        Bound("distilled: points of equal error rate lost", 1.0, lost[-1], at_most=True),
        Bound("distilled: mean cosine to the original", 0.98, tuned["cosine"]),
    ]


def markdown(untrained: list[dict[str, Any]], distilled: list[dict[str, Any]], bounds: list[Bound]) -> str:
    """The page table.md."""
    names = ("net", "draw", "MACs", "parameters", "cosine", "equal error rate", "points lost, 95 %")
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]

    def line(row: dict[str, Any]) -> str:
        lost = 100 * (row["error"] - row["error_before"])
        parts = [row["way"], row["seed"], f"{row['macs']:.2f}x fewer", f"{row['params']:.2f}x fewer"]
        parts += [f"{row['cosine']:.4f}", f"{row['error']:.4f}"]
        parts += [f"{lost:.2f} ({row['points_low']:.2f} to {row['points_high']:.2f})"]
        return "| " + " | ".join(map(str, parts)) + " |"

    minutes = "; ".join(
        f"{row['way']}: {row['partials']} partials, {row['epochs']} epochs, {row['minutes']:.1f} minutes on "
        f"{row['threads']} threads"
        for row in distilled
    )
    lines = ["# Resemblyzer's speaker encoder", "", "## Untrained", "", *head, *map(line, untrained), ""]
    lines += ["## Distilled without labels", "", f"{minutes}.", "", *head, *map(line, distilled), ""]
    lines += ["## Bounds", "", *(f"- {bound}" for bound in bounds or ["No bound was tested."])]
    return "\n".join(lines) + "\n"
