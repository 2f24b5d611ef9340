"""The list of claims: every verdict from a file, the page equal to what the files say."""

import json
from pathlib import Path

import pytest

from taut.errors import CallError
from taut.studies.claims import OPEN, VERDICTS, listing, markdown, read_sources, summary

ROOT = Path(__file__).parents[2]
CLAIMS = [
    {"id": "a", "where": "table 1", "claim": "It is | fast.", "published": "2x", "missing": None, "correction": None},
    {"id": "b", "where": "text", "claim": "It is small.", "published": "yes", "missing": "a phone", "correction": None},
    {"id": "c", "where": "text", "claim": "5 + 5.", "published": "11", "missing": None, "correction": "It is 10."},
    {"id": "d", "where": "text", "claim": "Soon.", "published": "yes", "missing": None, "correction": None},
]


def study(folder, claims=CLAIMS, found=None):
    (folder / "mine" / "results").mkdir(parents=True)
    content = {"title": "A title", "command": "taut reproduce mine", "claims": claims}
    (folder / "mine" / "published.json").write_text(json.dumps(content))
    if found is not None:
        (folder / "mine" / "results" / "results.json").write_text(json.dumps({"results": {"claims": found}}))


def test_verdicts_come_from_results_corrections_and_what_is_missing(tmp_path):
    study(tmp_path, found={"a": {"ours": "2.1x", "verdict": "reproduced"}})
    (source,) = read_sources(tmp_path)
    assert [source.verdict(claim) for claim in source.claims] == [
        ("2.1x", "reproduced", ""),
        ("", "not checkable here", "missing: a phone"),
        ("", OPEN, "in print: It is 10."),
        ("", OPEN, ""),
    ]
    page = markdown([source])
    assert "(not written yet)" in page
    assert "| table 1 | It is \\| fast. | 2x | 2.1x | reproduced |" in page
    assert "2.1x" in listing([source])
    assert "mine" in summary([source])


def test_wrong_files_are_named(tmp_path):
    study(tmp_path, found={"z": {"ours": "", "verdict": "reproduced"}})
    with pytest.raises(CallError, match="'z'"):
        read_sources(tmp_path)
    study(tmp_path / "b", [CLAIMS[0], CLAIMS[0]])
    with pytest.raises(CallError, match="repeated"):
        read_sources(tmp_path / "b")
    study(tmp_path / "c", [{"id": "a"}])
    with pytest.raises(CallError, match="wrong"):
        read_sources(tmp_path / "c")


def test_the_page_of_this_project_is_what_its_files_say():
    sources = read_sources(ROOT / "experiments")
    assert (ROOT / "docs" / "reproductions.md").read_text() == markdown(sources)
    names = {source.name for source in sources}
    assert {"mfbp", "linear-structure", "prune-then-tucker", "lenet-letters"} <= names
    for source in sources:
        assert all(source.verdict(claim)[1] in VERDICTS for claim in source.claims)
