"""The pages say what works: their Python runs, their commands exist, their numbers come from committed results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from torch import Tensor, nn

import taut
from taut.cli.app import app, run
from taut.recipe import Recipe
from taut.structure import rules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"transformers"}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def optional(page: Path) -> list[str]:
    """What a page imports of the packages that no extra of ours brings."""
    imported = re.findall(r"^(?:import|from) (\w+)", "\n".join(blocks(page, "python")), re.MULTILINE)
    return sorted(OPTIONAL & set(imported))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)).eval()


def users_own() -> dict[str, Any]:
    """What the pages assume the reader to have."""
    model = build()
    calibration = list(torch.split(torch.randn(256, 16), 64))
    inputs = torch.randn(200, 16)
    labels = model(inputs).argmax(1)

    def accuracy(net: nn.Module) -> taut.Metric:
        return taut.Metric(float((net(inputs).argmax(1) == labels).float().mean()), len(labels))

    return {"model": model, "build": build, "calibration": calibration, "accuracy": accuracy}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in optional(page):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))  # what a page registers is its own
    names = users_own()
    for block in blocks(page, "python"):
        exec(compile(block, f"{page.name}", "exec"), names)  # noqa: S102 - our own documentation


def test_the_readme_reloads_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))  # what a page registers is its own
    names = users_own()
    exec(blocks(ROOT / "README.md", "python")[0], names)  # noqa: S102
    example, outputs = names["example"], names["outputs"]
    assert isinstance(outputs, Tensor)
    assert torch.equal(outputs, names["result"].model(example))


def test_own_model_takes_ten_lines() -> None:
    lines = [line for line in blocks(ROOT / "README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "taut":
            continue
        known = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_session_of_the_command_line_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/how-to/command-line.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))\n"
    )
    Path("tasks.py").write_text(blocks(page, "python")[0])
    Path("recipe.yaml").write_text(blocks(page, "yaml")[0])
    safetensors.torch.save_file(build().state_dict(), "net.safetensors")
    for line in "".join(blocks(page, "sh")).splitlines():
        assert run(shlex.split(line)[1:]) == 0, line


def test_the_recipe_of_the_docs_is_one(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/how-to/command-line.md", "yaml")
    (tmp_path / "r.yaml").write_text(block)
    assert Recipe.read(tmp_path / "r.yaml").budget == taut.Budget(macs=0.25)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_measured_numbers_are_those_of_the_committed_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `make readme`"
