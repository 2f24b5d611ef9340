"""What is public: every name typed in `__all__`, documented, importable, and nothing else without an underscore."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import taut

PACKAGES = ("taut", "taut.criteria", "taut.decompose", "taut.measure", "taut.methods")
VERBS = ("apply", "compare", "compress", "explore", "load", "observe", "plan", "save", "trace")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_function_of_the_package(verb: str) -> None:
    assert verb in taut.__all__
    assert inspect.isfunction(getattr(taut, verb))


@pytest.mark.parametrize("name", taut.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    found = getattr(taut, name)
    assert inspect.getdoc(found), f"taut.{name} has no docstring"
    if inspect.isfunction(found):
        hints = {p.name: p.annotation for p in inspect.signature(found).parameters.values()}
        assert inspect.Parameter.empty not in hints.values(), f"taut.{name} has an untyped argument"


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_resolves(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names)
    assert all(hasattr(module, name) for name in names)


def test_nothing_else_of_ours_is_public() -> None:
    """Submodules appear as attributes once imported; functions and classes must be in `__all__`."""
    assert all(hasattr(taut, name) for name in taut.__all__)  # imported when they are first asked for
    own = {
        name
        for name, value in vars(taut).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    }
    assert own == set(taut.__all__)


def test_public_names_are_in_the_documentation() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "src/taut/__init__.py"]
    words = set(re.findall(r"\w+", "\n".join(page.read_text() for page in pages)))
    assert set(taut.__all__) <= words, set(taut.__all__) - words


def test_dir_is_complete_before_anything_is_imported() -> None:
    code = (
        "import sys, taut; assert {*taut.__all__, 'methods', 'measure', '__doc__'} <= set(dir(taut)); "
        "assert 'torch' not in sys.modules; "
        "assert taut.methods.SVD; from taut import *; assert Budget and compress; "
        "assert not hasattr(taut, 'nonsense'); assert set(taut._HOMES) == set(taut.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_taut_prints_nothing_and_needs_no_extra() -> None:
    extras = "{'matplotlib', 'mlxtend', 'onnx', 'typer'}"
    code = f"import sys, taut; assert taut.compress; assert not {extras} & set(sys.modules), sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


EARLIER = [
    (package, name)
    for package, names in json.loads((Path(__file__).parent / "fixtures" / "public.json").read_text()).items()
    for name in [*names, *(["METHODS"] if package == "taut.methods" else [])]
]


@pytest.mark.parametrize(("package", "name"), EARLIER)
def test_what_was_public_still_works(package: str, name: str) -> None:
    assert hasattr(importlib.import_module(package), name)


def test_no_function_is_hidden_by_a_module_of_its_name() -> None:
    modules = {path.stem for path in (ROOT / "src" / "taut").iterdir()}
    assert not modules & {name for name in taut.__all__ if inspect.isfunction(getattr(taut, name))}


def test_the_layers_of_the_documentation_are_those_that_are_held() -> None:
    done = subprocess.run([sys.executable, "docs/layers.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `make readme`"


@pytest.mark.parametrize(("old", "new"), [("Pace", "LatencyModel"), ("Stopwatch", "LatencyMeter")])
def test_old_names_warn_and_lead_to_the_new_ones(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now taut.measure.{new}"):
        found = getattr(taut.measure, old)
    assert found is getattr(taut.measure, new)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = taut.measure.Nothing
