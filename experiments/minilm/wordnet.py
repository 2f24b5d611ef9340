"""Texts of WordNet (Debian: apt-get install wordnet-base), and the metric: definitions found by a use of their word.

A pair is a word in an example sentence, and the definition of the sense that the sentence shows; both were written by
WordNet's authors, in one gloss. Queries are "word: sentence"; all definitions of the pairs that are measured are the
candidates, and the reciprocal rank of the right one is averaged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/wordnet")
KINDS = ("noun", "verb", "adj", "adv")
SHORTEST = 25
"""Letters of a sentence and of a definition, at least."""

MEASURED, VALIDATION = 10_000, 1_000
"""Pairs: a text of one of them is in no other part."""

DRAWS = 2000
"""Of the bootstrap."""

Pair = tuple[str, str]


@cache
def _glosses() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """(first word, sentences, definition) of every synset."""
    found = []
    for kind in KINDS:
        for line in (FOLDER / f"data.{kind}").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue  # the licence
            head, gloss = line.split(" | ", 1)
            word = head.split()[4].replace("_", " ")
            sentences = tuple(re.findall(rf'"([^"]{{{SHORTEST},}})"', gloss))
            found.append((word, sentences, gloss.split('"')[0].strip(" ;")))
    return tuple(found)


@cache
def _shuffled() -> tuple[Pair, ...]:
    """All pairs with definitions of their own, as (query, definition)."""
    seen: set[str] = set()
    pairs = []
    for word, sentences, definition in _glosses():
        if sentences and len(definition) > SHORTEST and definition not in seen:
            seen.add(definition)
            pairs.append((f"{word}: {sentences[0]}", definition))
    random.Random(0).shuffle(pairs)  # noqa: S311 - reproducible draws, no secret
    return tuple(pairs)


def measured_pairs(count: int = MEASURED) -> list[Pair]:
    """Of those that nothing else is done with."""
    return list(_shuffled()[:count])


def validation_texts(count: int) -> list[str]:
    """Queries and definitions of other pairs: for choices."""
    return [text for pair in _shuffled()[MEASURED : MEASURED + VALIDATION] for text in pair][:count]


def calibration_texts(count: int, seed: int) -> list[str]:
    """Queries and definitions of the pairs that are left, without saying what belongs together."""
    rest = [text for pair in _shuffled()[MEASURED + VALIDATION :] for text in pair]
    return random.Random(1000 + seed).sample(rest, count)  # noqa: S311


def training_texts() -> list[str]:
    """All of these, and the definitions of synsets without a sentence."""
    measured = {text for pair in _shuffled()[: MEASURED + VALIDATION] for text in pair}
    rest = [text for pair in _shuffled()[MEASURED + VALIDATION :] for text in pair]
    rest += [f"{word}: {text}" for word, sentences, text in _glosses() if not sentences and text not in measured]
    random.Random(1).shuffle(rest)  # noqa: S311
    return rest


def reciprocal_ranks(queries: Tensor, definitions: Tensor, part: int = 1000) -> Tensor:
    """Of each query's own definition among all, by cosine."""
    ranks = []
    for start in range(0, len(queries), part):
        scores = queries[start : start + part] @ definitions.T
        own = scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))]
        ranks.append((scores > own[:, None]).sum(1) + 1)
    return 1 / torch.cat(ranks).double()


def relative_loss(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Share of the mean reciprocal rank that was lost, in percent, with 95 % of a paired bootstrap over queries."""
    first, second = np.asarray(before), np.asarray(after)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(first), size=len(first))
        draws.append(100 * (1 - second[chosen].mean() / first[chosen].mean()))
    low, high = np.percentile(draws, (2.5, 97.5))
    return {
        "mrr": float(second.mean()),
        "lost_percent": float(100 * (1 - second.mean() / first.mean())),
        "lost_low": float(low),
        "lost_high": float(high),
    }
