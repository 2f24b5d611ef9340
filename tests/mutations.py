"""How many small faults the tests notice: `python tests/mutations.py --count 30`; no part of the suite.

Each fault is one changed expression of src/taut, drawn by a seed and put into a copy of the tree. Only the tests that
mirror its module run, and for a method its part of the contract. With `--tree DIR` the faults are drawn from the lines
that another tree has word for word in the same module, or in the one that docs/renames.md names, and put into both.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", ".hypothesis", "dist")

COMPARED = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
COMPUTED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+"}
JOINED = {ast.And: "or", ast.Or: "and"}


@dataclass(frozen=True)
class Fault:
    """One line of a module as it was, and as it is with the fault.

    Attributes:
        module: path below src/taut. number: of the line, from 0. old, new: the line.
    """

    module: str
    number: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module}:{self.number + 1}  {self.old.strip()}  ->  {self.new.strip()}"


def faults(path: Path, module: str) -> Iterator[Fault]:
    """Every fault that can be made in a file."""
    text = path.read_text()
    lines = text.splitlines()
    for node in computing(ast.parse(text)):
        for start, end, words in changes(node):
            if start[0] == end[0] and lines[start[0]].isascii():
                line = lines[start[0]]
                yield Fault(module, start[0], line, f"{line[: start[1]]}{words}{line[end[1] :]}")


def computing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that compute something: no annotations, no decorators, no words of messages."""
    if isinstance(node, ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in {"annotation", "returns", "decorator_list"}:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from computing(child)


Place = tuple[int, int]


def begin(node: ast.expr | ast.stmt) -> Place:
    return node.lineno - 1, node.col_offset


def end(node: ast.expr | ast.stmt) -> Place:
    return (node.end_lineno or node.lineno) - 1, node.end_col_offset or node.col_offset


def changes(node: ast.AST) -> Iterator[tuple[Place, Place, str]]:
    """From where to where what is put."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield end(node.left), begin(node.comparators[0]), f" {COMPARED[type(node.ops[0])]} "
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and simple(node.left) and simple(node.right):
        yield end(node.left), begin(node.right), f" {COMPUTED[type(node.op)]} "
    elif isinstance(node, ast.BoolOp) and len(node.values) == 2 and all(map(simple, node.values)):
        yield end(node.values[0]), begin(node.values[1]), f" {JOINED[type(node.op)]} "
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield begin(node), begin(node.operand), ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield begin(node), end(node), str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield begin(node), end(node), str(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield begin(node.value), end(node.value), "None"


def simple(node: ast.expr) -> bool:
    """Whether no brackets can stand around it: its end is where it seems to be."""
    return isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def modules(tree: Path) -> dict[str, Path]:
    """The files of src/taut, by their paths below it."""
    source = tree / "src/taut"
    return {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*.py"))}


def renames() -> dict[str, str]:
    """Old paths by new ones, as docs/renames.md has them."""
    rows = re.findall(
        r"^\| `taut\.([\w.]+)` \| `taut\.([\w.]+)` \|$", (ROOT / "docs/renames.md").read_text(), re.MULTILINE
    )
    return {f"{new.replace('.', '/')}.py": f"{old.replace('.', '/')}.py" for old, new in rows}


def in_both(fault: Fault, other: dict[str, Path]) -> Fault | None:
    """The fault in the other tree: its line stands once in the module, or in the one that it was before."""
    for name in (fault.module, renames().get(fault.module, "")):
        lines = other[name].read_text().splitlines() if name in other else []
        if lines.count(fault.old) == 1:
            return Fault(name, lines.index(fault.old), fault.old, fault.new)
    return None


def commands(tree: Path, module: str) -> list[list[str]]:
    """What pytest is told: the mirroring files, else those that import the module; the contract of its methods."""
    path = Path(module)
    mirrors = [
        p for p in (tree / "tests").rglob(f"test_{path.stem}.py") if p.parent.name in {path.parent.name, "tests"}
    ]
    found = mirrors or importing(tree, module) or [p for user in users(tree, module) for p in importing(tree, user)]
    runs = [[str(p.relative_to(tree))] for p in sorted(found)[:MOST_FILES]]
    source = tree / "src/taut" / module
    beside = sorted(source.parent.glob("*.py")) if path.parts[0] == "methods" and len(path.parts) > 2 else []
    methods = names(source) or [name for p in beside for name in names(p)]
    return [*runs, ["tests/test_contract.py", "-k", " or ".join(methods)]] if methods else runs


MOST_FILES = 3
"""Test files that are run for a module that none mirrors."""


def names(path: Path) -> list[str]:
    """The methods that a module defines."""
    return re.findall(r'^    name: ClassVar\[str\] = "(\w+)"$', path.read_text(), re.MULTILINE)


def imports(path: Path, module: str) -> bool:
    words = f"taut.{module.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
    room, _, stem = words.rpartition(".")
    text = path.read_text()
    return (
        re.search(rf"^from {re.escape(words)} import|^from {re.escape(room)} import .*\b{stem}\b", text, re.MULTILINE)
        is not None
    )


def importing(tree: Path, module: str) -> list[Path]:
    """Test files that import a module."""
    return [path for path in sorted((tree / "tests").rglob("test_*.py")) if imports(path, module)]


def users(tree: Path, module: str) -> list[str]:
    """Other modules that import it."""
    return [name for name, path in modules(tree).items() if imports(path, module)]


def with_fault(text: str, fault: Fault) -> str:
    """The module with its one line changed."""
    lines = text.splitlines(keepends=True)
    return "".join([*lines[: fault.number], f"{fault.new}\n", *lines[fault.number + 1 :]])


def is_python(text: str) -> bool:
    """Whether it is: a bracket may have been cut."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def outcome(tree: Path, fault: Fault, seconds: float) -> str:
    """What became of it: caught, missed, slow, or untested where no test is found."""
    path = tree / "src/taut" / fault.module
    text = path.read_text()
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    runs, slow = commands(tree, fault.module), False
    try:
        path.write_text(with_fault(text, fault))
        for words in runs:
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *words]
            try:
                done = subprocess.run(
                    command, cwd=tree, env=environment, capture_output=True, timeout=seconds, check=False
                )
            except subprocess.TimeoutExpired:
                slow = True
                continue
            if done.returncode not in {0, 5}:  # 5: no test was chosen
                return "caught"
    finally:
        path.write_text(text)
    return "slow" if slow else "missed" if runs else "untested"


def drawn(count: int, seed: int, only: str, other: dict[str, Path] | None) -> list[tuple[Fault, Fault | None]]:
    """Faults, each with itself in the other tree."""
    pool = [f for name, path in modules(ROOT).items() if name.startswith(only) for f in faults(path, name)]
    random.Random(seed).shuffle(pool)
    pairs: list[tuple[Fault, Fault | None]] = []
    for fault in pool:
        there = None if other is None else in_both(fault, other)
        if (other is None or there is not None) and is_python(
            with_fault(modules(ROOT)[fault.module].read_text(), fault)
        ):
            pairs.append((fault, there))
        if len(pairs) == count:
            break
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30, help="how many faults")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", default="", help="modules whose path below src/taut begins so")
    parser.add_argument("--seconds", type=float, default=60, help="for each run of pytest")
    parser.add_argument("--tree", type=Path, help="another tree, to be held against this one")
    wish = parser.parse_args()
    pairs = drawn(wish.count, wish.seed, wish.only, None if wish.tree is None else modules(wish.tree))
    with tempfile.TemporaryDirectory() as folder:
        trees = [ROOT] if wish.tree is None else [ROOT, wish.tree]
        copies = [Path(shutil.copytree(tree, Path(folder, str(at)), ignore=LEFT_OUT)) for at, tree in enumerate(trees)]
        found: list[list[str]] = []
        for pair in pairs:
            both = [fault for fault in pair if fault is not None]
            found.append([outcome(copy, fault, wish.seconds) for copy, fault in zip(copies, both, strict=True)])
            print("  ".join(f"{words:8}" for words in found[-1]), pair[0], flush=True)
    for tree, column in zip(trees, zip(*found, strict=True), strict=True):
        print(f"{tree}: {column.count('caught')} of {len(column)} caught, {column.count('slow')} not in time")


if __name__ == "__main__":
    main()
