"""Which runs the study consists of."""

from __future__ import annotations

from reductions import PUBLISHED

from taut.studies import Cell

LEVELS = (0.05, 0.2)
RANKS = {0.05: 7, 0.2: 27}
"""Share of the larger net's 18,720 convolution weights -> CP rank that keeps as many, 141 weights a rank."""

LARGER_SEEDS = 1

REWOUND = (0.1,)
SCRATCH = (0.05, 0.2)
PLANNED = (0.05, 0.1, 0.2)


def _cell(net: str, seed: int, way: str, experiment: str = "", level: float = 0) -> Cell:
    return {"net": net, "seed": seed, "way": way, "experiment": experiment, "level": level}


def trained(net: str, seeds: int) -> list[Cell]:
    """The nets from which everything starts: these come first."""
    return [_cell(net, seed, "dense") for seed in range(seeds)]


def tables(seeds: int, quick: bool) -> list[Cell]:
    """The four tables in the text's protocol with their control on every seed, and what one seed shows beside."""
    found = []
    for seed in range(seeds):
        found.append(_cell("lenet", seed, "control"))
        for experiment, level in PUBLISHED:
            if not quick or level in {0.05, 0.2, 1, 5}:
                found.append(_cell("lenet", seed, "text", experiment, level))
    return found if quick else found + beside()


def beside() -> list[Cell]:
    """On one seed: planned ranks, our metric with the refit, nets from scratch, two departures of the source."""
    found = [_cell("lenet", 0, "planned", "svd fc", level) for level in PLANNED]
    found += [_cell("lenet", 0, "data", "svd fc", level) for level in PLANNED]
    found += [_cell("lenet", 0, "data", "cp conv", rank) for rank in (1, 5)]
    found += [_cell("lenet", 0, "scratch", "magnitude fc", level) for level in SCRATCH]
    found += [_cell("lenet", 0, "code", "svd fc", 0.05), _cell("lenet", 0, "code", "cp conv", 1)]
    return found + [_cell("lenet", 0, "rewound", "magnitude fc", level) for level in REWOUND]


def larger(seeds: int) -> list[Cell]:
    """Magnitude and CP at equal shares on a net with twenty times the weights in its convolutions."""
    found = []
    for seed in range(seeds):
        found.append(_cell("larger", seed, "control"))
        for level in LEVELS:
            found.append(_cell("larger", seed, "text", "magnitude conv", level))
            found.append(_cell("larger", seed, "text", "cp conv", RANKS[level]))
    return found
