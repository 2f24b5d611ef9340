"""Which runs the study consists of."""

from __future__ import annotations

from reductions import PUBLISHED

from taut.studies import Cell

LEVELS = (0.05, 0.2, 0.5)
RANKS = {0.05: 7, 0.2: 27, 0.5: 66}
"""Share of the larger net's 18,720 convolution weights -> CP rank that keeps as many, 141 weights a rank."""

LARGER_SEEDS = 1

REWOUND = (0.1,)


def _cell(net: str, seed: int, way: str, experiment: str = "", level: float = 0) -> Cell:
    return {"net": net, "seed": seed, "way": way, "experiment": experiment, "level": level}


def trained(net: str, seeds: int) -> list[Cell]:
    """The nets from which everything starts: these come first."""
    return [_cell(net, seed, "dense") for seed in range(seeds)]


def tables(seeds: int, quick: bool) -> list[Cell]:
    """The four tables: the text's protocol, ours, controls, nets of equal size from scratch, and two departures."""
    found = []
    for seed in range(seeds):
        found.append(_cell("lenet", seed, "control"))
        for experiment, level in PUBLISHED:
            if quick and level not in {0.05, 0.2, 1, 5}:
                continue
            factored = not experiment.startswith("magnitude")
            found.append(_cell("lenet", seed, "text", experiment, level))
            if factored:
                found.append(_cell("lenet", seed, "data", experiment, level))
            if not quick and (experiment == "magnitude fc" or (experiment == "svd fc" and seed == 0)):
                found.append(_cell("lenet", seed, "scratch", experiment, level))
            if factored and seed == 0:
                found.append(_cell("lenet", seed, "code", experiment, level))
        if not quick:
            found += [_cell("lenet", seed, "rewound", "magnitude fc", level) for level in REWOUND]
    return found


def larger(seeds: int) -> list[Cell]:
    """Magnitude and CP at equal shares on a net with twenty times the weights in its convolutions."""
    found = []
    for seed in range(seeds):
        found.append(_cell("larger", seed, "control"))
        for level in LEVELS:
            found.append(_cell("larger", seed, "text", "magnitude conv", level))
            found.append(_cell("larger", seed, "text", "cp conv", RANKS[level]))
            found.append(_cell("larger", seed, "data", "cp conv", RANKS[level]))
    return found
