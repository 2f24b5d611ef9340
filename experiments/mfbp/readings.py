"""What the smaller measurements say about the claims of the sources."""

from __future__ import annotations

from typing import Any

from taut.studies.claims import CONTRADICTED, CORRECTED, REPRODUCED

Found = dict[str, dict[str, str]]
Row = dict[str, Any]


def one(ours: str, holds: bool, why: str = "", *, corrected: bool = False) -> dict[str, str]:
    """A finding: ours, the verdict, and why."""
    verdict = CONTRADICTED if not holds else CORRECTED if corrected else REPRODUCED
    return {"ours": ours, "verdict": verdict, "why": why}


def measured(facts: dict[str, Row]) -> Found:
    """Claim -> ours, verdict, why, by what was measured."""
    found: Found = {}
    if "spectra" in facts:
        a, b = facts["spectra"]["trained"], facts["spectra"]["untrained"]
        said = f"50 of 625 directions hold {a['leading']:.0%} trained, {b['leading']:.0%} untrained"
        structure = one(
            said,
            a["leading"] > 1.1 * b["leading"],
            "five-layer net on 3,500 digits: He's random start fills the spectrum",
        )
        found |= {
            "outline-denil-structure": structure,
            "draft-denil-sparse": one(
                f"{said}; kurtosis {a['kurtosis']:.1f} against {b['kurtosis']:.1f} (normal: 3)",
                a["leading"] > 1.1 * b["leading"],
                "structure yes; few weights are exactly or nearly zero without pruning",
                corrected=a["kurtosis"] < 6,
            ),
        }
    if "overlap" in facts:
        o = facts["overlap"]
        said = f"overlap of leading outputs and next inputs {o['trained']:.2f}, untrained {o['untrained']:.2f}"
        found["draft-intro-dependence"] = one(
            f"{said}, by chance {o['chance']:.2f}", o["trained"] > 1.5 * o["untrained"], "rank 50 of 625"
        )
    if "denoising" in facts:
        rows = facts["denoising"]["rows"]
        nearer = sum(row["error factored"] < row["error"] for row in rows)
        better = sum(row["accuracy factored"] > row["accuracy"] for row in rows)
        said = ", ".join(f"{r['accuracy']:.3f} -> {r['accuracy factored']:.3f}" for r in rows)
        found["draft-abstract-denoising"] = one(
            f"H is nearer to the clean weights in {nearer} of {len(rows)} cases, more accurate in {better}: {said}",
            better > len(rows) / 2,
            "noise of .5, 1 and 2 times the size of each matrix put on the trained weights, rank 50",
        )
    if "relu" in facts:
        zero = facts["relu"]["zero"]
        found["draft-relu-sparse"] = one(f"{min(zero):.0%} to {max(zero):.0%} of hidden values zero", min(zero) > 0.4)
    if "vanishing" in facts:
        small, he = facts["vanishing"]["0.01"], facts["vanishing"]["He"]
        found["draft-relu-gradient"] = one(
            f"gradient of the first layer {small['gradients'][0]:.1e} with weights of .01, {he['gradients'][0]:.1e} "
            "with He's",
            small["gradients"][0] > 0.01 * he["gradients"][0],
            "five hidden layers: the rectifier does not help a signal that the initial weights have made vanish",
        )
        found["draft-relu-pretraining"] = one(
            f"five layers train with weights of .01 (draft-figure-3-net-5): logits of {small['logits']:.1e} at the "
            f"start, {he['logits']:.1f} with He's",
            True,
            "RMSprop divides the vanishing gradients by their own size",
        )
    if "dropout" in facts:
        d = facts["dropout"]
        gap = {k: d[k]["train"] - d[k]["test"] for k in ("with", "without")}
        found["draft-dropout"] = one(
            f"gap {100 * gap['with']:.1f} points with, {100 * gap['without']:.1f} without; test "
            f"{d['with']['test']:.3f}, {d['without']['test']:.3f}",
            gap["with"] < gap["without"],
            "two hidden layers, 4,000 images, 30 epochs",
        )
    if "latent" in facts:
        a, b = facts["latent"]["basis"], facts["latent"]["random"]
        found["draft-latent-features"] = one(
            f"50 coordinates in the first basis tell digits apart at {a:.3f}, 50 random ones at {b:.3f}",
            a > b,
            "basis.svg",
        )
    if "bound" in facts:
        rows = facts["bound"]["rows"]
        said = ", ".join(f"rank {r['rank']}: {r['joint']:.2f} ({r['separate']:.2f})" for r in rows)
        found["draft-objective-fit"] = one(
            f"relative error {said}", rows[0]["joint"] < 0.5, "in brackets separate SVDs; good only at high rank"
        )
    return found
