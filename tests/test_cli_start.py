"""Help and errors of the command line do not wait for torch, and a signal at any moment is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taut.cli.listing import method_rows
from taut.methods import METHODS
from taut.methods.plain_form import PlainForm
from taut.search.session import JUDGED

MAIN = "from taut.cli import main; main()"


LINES = {
    "--help": 0,
    "--version": 0,
    "methods": 0,
    "compress --help": 0,
    "nonsense": 2,
    "compress --nonsense": 2,
    "compress net:build --task missing.py": 2,
    "compress net:build --task task.py --budget macs=1": 2,
    "compress net --task task.py": 2,
    "compress net:build --task task.py --weights missing.pt": 2,
    "explore net:build --task task.py --recipe missing.yaml": 2,
    "benchmark net:build --task missing.py": 2,
    "compress no_such_module:build --task task.py": 2,
}


def test_torch_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def example():\n    return 1\n")
    program = (
        "import sys\nfrom taut.cli.app import run\n"
        "for line in sys.argv[1:]:\n"
        "    code = run(line.split())\n"
        "    print(code, 'torch' in sys.modules or 'numpy' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *LINES], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    expected = [(line, f"{code} False") for line, code in LINES.items()]
    lines = done.stderr.splitlines()
    found = [line for line in lines if not line.startswith("error: ")]
    assert list(zip(LINES, found, strict=False)) == expected, done.stderr
    assert len(lines) == len(LINES) + sum(code > 0 for code in LINES.values())


def test_methods_are_listed_as_they_are() -> None:
    def when(name, kind):
        if name == "channels":
            return f"from {JUDGED} samples"
        return "first, always" if issubclass(kind, PlainForm) else "default" if kind.default else "on request"

    kinds = [(name, when(name, kind), (kind.__doc__ or "").partition("\n")[0]) for name, kind in METHODS.items()]
    assert method_rows() == kinds


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("moment", ["imports", "work"])
def test_a_signal_is_one_line(number: signal.Signals, code: int, word: str, moment: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "import os, time\n"
        "open('importing', 'w').close()\n"
        f"{'time.sleep(60)' if moment == 'imports' else ''}\n"
        "import torch\n"
        "def net():\n    return torch.nn.Linear(8, 8)\n"
        "def example():\n    return torch.ones(2, 8)\n"
        "def evaluate(model):\n    open('working', 'w').close()\n    time.sleep(60)\n"
    )
    (tmp_path / "nets.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(8, 8)\n")
    process = start(["evaluate", "nets:net", "--task", "task.py"], tmp_path)
    mark = tmp_path / ("importing" if moment == "imports" else "working")
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    lines = [line for line in err.splitlines() if not line.startswith("Importing")]  # progress, on a busy machine
    assert (out, lines) == ("", [f"error: {word}; nothing was left half-written."])
