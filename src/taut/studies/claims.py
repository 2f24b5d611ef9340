"""Every claim of the sources beside what we found: read from the studies' folders, never written by hand.

experiments/NAME/published.json        {"title", "command", "claims": [...]}, each a `Claim`
experiments/NAME/results/results.json  may hold {"results": {"claims": {id: {"ours", "verdict", "why"}}}}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from taut.core import text
from taut.core.files import one_line
from taut.errors import CallError
from taut.types.budget import FORBID

REPRODUCED, CORRECTED, CONTRADICTED = "reproduced", "corrected", "contradicted"
UNCHECKABLE, OPEN = "not checkable here", "not run yet"
VERDICTS = (REPRODUCED, CORRECTED, CONTRADICTED, UNCHECKABLE, OPEN)


@dataclass(frozen=True)
class Claim:
    """One table, figure or statement of a source.

    Attributes:
        id: unique in its file. where: in the source. claim: in our words. published: the value or wording.
        missing: what would be needed to check it here. correction: what is wrong in print, and why.
        stand_in: what is used in place of something that is not here.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    id: str
    where: str
    claim: str
    published: str
    missing: str | None = None
    correction: str | None = None
    stand_in: str | None = None


@dataclass(frozen=True)
class Finding:
    """What a study found about a claim."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    ours: str
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Source:
    """The claims of one study's sources, and what was found.

    Attributes:
        name: of the study. title: of the source. command: that checks the claims.
        claims: in the order of the source. findings: by claim. written: whether the study exists.
    """

    name: str
    title: str
    command: str
    claims: tuple[Claim, ...]
    findings: dict[str, Finding] = field(default_factory=dict)
    written: bool = True

    def verdict(self, claim: Claim) -> tuple[str, str, str]:
        """Ours, the verdict, and why."""
        found = self.findings.get(claim.id)
        if found is not None:
            return found.ours, found.verdict, found.why or claim.correction or ""
        parts = {"missing": claim.missing, "with": claim.stand_in, "in print": claim.correction}
        remarks = "; ".join(f"{word}: {said}" for word, said in parts.items() if said)
        return "", OPEN if claim.missing is None else UNCHECKABLE, remarks


def read_sources(experiments: Path) -> list[Source]:
    """All studies that have a source.

    Raises:
        CallError: a file is not what it should be.
    """
    return [_source(path) for path in sorted(experiments.glob("*/published.json"))]


def _source(path: Path) -> Source:
    content = _json(path)
    results = path.parent / "results" / "results.json"
    try:
        claims = TypeAdapter(tuple[Claim, ...]).validate_python(content["claims"])
        found = _json(results)["results"].get("claims", {}) if results.exists() else {}
        findings = TypeAdapter(dict[str, Finding]).validate_python(found)
    except (KeyError, ValidationError) as error:
        raise CallError(f"'{path}' or its results are wrong: {one_line(error)}.") from None
    unknown = set(findings) - {claim.id for claim in claims}
    wrong = {finding.verdict for finding in findings.values()} - set(VERDICTS)
    if unknown or wrong or len({claim.id for claim in claims}) < len(claims):
        raise CallError(f"'{path}': repeated, unknown or misjudged claims {sorted(unknown | wrong)}.")
    written = (path.parent / "run.py").exists()
    return Source(path.parent.name, content["title"], content["command"], claims, findings, written)


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CallError(f"'{path}' cannot be read: {one_line(error)}.") from None
    return found


def summary(sources: Iterable[Source]) -> str:
    """How many claims of every source have which verdict."""
    rows = []
    for source in sources:
        counts = Counter(source.verdict(claim)[1] for claim in source.claims)
        rows.append((source.name, str(len(source.claims)), *(str(counts[verdict]) for verdict in VERDICTS)))
    return text.table(("study", "claims", *VERDICTS), rows, right=tuple(range(1, 2 + len(VERDICTS))))


def listing(sources: Iterable[Source]) -> str:
    """A row for every claim."""
    rows = []
    for source in sources:
        for claim in source.claims:
            ours, verdict, _ = source.verdict(claim)
            rows.append((source.name, claim.where, claim.published, ours or "-", verdict))
    return text.table(("study", "where", "published", "ours", "verdict"), rows)


def markdown(sources: Iterable[Source]) -> str:
    """The page docs/reproductions.md."""
    sources = list(sources)
    counts = [Counter(source.verdict(claim)[1] for claim in source.claims) for source in sources]
    lines = [
        "# What the sources claim, and what we found",
        "",
        "Written by `taut reproduce --list --out docs/reproductions.md` from each study's published.json and results: "
        "one line for every table, figure and statement of the sources. A verdict stands on a committed result. Until "
        "a study has run there is none; the remark says what is missing, what is used instead, or what is misprinted.",
        "",
        f"| study | claims | {' | '.join(VERDICTS)} |",
        "|---|" + "---|" * (1 + len(VERDICTS)),
    ]
    for source, count in zip(sources, counts, strict=True):
        lines.append(f"| {source.name} | {len(source.claims)} | " + " | ".join(str(count[v]) for v in VERDICTS) + " |")
    for source in sources:
        command = f"`{source.command}`" if source.written else f"`{source.command}` (not written yet)"
        lines += ["", f"## {_cell(source.title)}", "", f"Command: {command}", ""]
        lines += ["| where | claim | published | ours | verdict |", "|---|---|---|---|---|"]
        for claim in source.claims:
            ours, verdict, why = source.verdict(claim)
            said = f"{verdict}: {why}" if why else verdict
            lines.append(
                f"| {' | '.join(map(_cell, (claim.where, claim.claim, claim.published, ours or '-', said)))} |"
            )
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")
