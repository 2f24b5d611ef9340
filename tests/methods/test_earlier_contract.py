"""A method class written by a user against the contract of before works, and says what to change."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import taut
from taut import Budget, Plan, Step
from taut.methods import METHODS, accept, choose
from taut.types import Cost, Group, Method, Rewrite


@dataclass(frozen=True)
class Mine:
    """Two thin layers in place of a Linear: what a user wrote who read the contract as it was."""

    rank: int | None = None
    name: ClassVar[str] = "mine"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "outputs"})
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def refuses(self, group: Group) -> str | None:
        single = len(group.layers) == 1 and group.layer.kind == "Linear"
        return None if single else "mine takes one Linear"

    def family(self) -> str:
        return "mine"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Any:
        (module,) = modules.values()
        assert all(known.weighting is not None for known in stats.values())
        return torch.linalg.svd(module.weight.detach(), full_matrices=False)

    def candidates(self, group: Group, factors: Any) -> list[Mine]:
        options = [replace(self, rank=rank) for rank in range(1, min(group.layer.weight) + 1)]
        return [option for option in options if option.cost(group).lowers(group.cost)]

    def damage(self, factors: Any) -> float | None:
        return float((factors[1][self.rank :] ** 2).sum())

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Any) -> Rewrite:
        ((name, module),) = modules.items()
        U, s, V = factors
        first, second = nn.Linear(V.shape[1], self.rank, bias=False), nn.Linear(self.rank, len(U))
        with torch.no_grad():
            first.weight.copy_(V[: self.rank])
            second.weight.copy_(U[:, : self.rank] * s[: self.rank])
            second.bias.copy_(module.bias)
        return Rewrite({name: nn.Sequential(first, second)}, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        rows, columns = group.layer.weight
        return {group.layer.name: nn.Sequential(nn.Linear(columns, self.rank, bias=False), nn.Linear(self.rank, rows))}

    def cost(self, group: Group) -> Cost:
        rows, columns = group.layer.weight
        weights = (rows + columns) * (self.rank or 0)
        macs = group.layer.per_sample(weights * group.layer.positions)
        return Cost(weights + rows, weights + rows, macs, 4 * (weights + rows))

    def exact_case(self, group: Group) -> None:
        return None


@dataclass(frozen=True)
class Idle(Mine):
    """A method over the whole network that never finds anything, and says so in bare words."""

    name: ClassVar[str] = "idle"

    def look(self, model: nn.Module, example: Any, places: Mapping[str, str], stats: Any = None) -> Any:
        return "there is nothing to find"


@pytest.fixture
def earlier(monkeypatch):
    """The two classes as a user's program has them: registered, and never seen by taut."""
    kinds = {
        kind.name: dataclass(frozen=True)(type(kind.__name__, (kind,), {"__annotations__": {}}))
        for kind in (Mine, Idle)
    }
    for name, kind in kinds.items():
        monkeypatch.setitem(METHODS, name, kind)
    return kinds


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)).eval(), torch.randn(64, 24)


def test_it_is_planned_applied_saved_and_loaded(earlier, tmp_path):
    model, x = net()
    with pytest.warns(DeprecationWarning, match="Mine says with 'needs'.*uses_statistics"):
        result = taut.compress(model, x[:2], budget=Budget(params=0.6), data=[x], methods=[earlier["mine"]()])
    assert {step.method for step in result.plan.steps} == {"mine"}
    assert result.plan.after.params <= 0.6 * result.plan.before.params
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", lambda: net()[0])(x), result.model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        choose(["mine"])  # once is enough


def test_its_ranks_are_aligned(earlier):
    model, x = net()
    traced = taut.trace(model, x[:2])
    with pytest.warns(DeprecationWarning, match="uses_statistics"):
        plan = taut.plan(traced, taut.observe(traced, model, [x]), Budget(params=0.6), ["mine"], align=4)
    assert all(step.settings["rank"] % 4 == 0 for step in plan.steps)


def test_bare_words_for_nothing_to_do_are_understood(earlier):
    model, x = net()
    traced = taut.trace(model, x[:2])
    accept(earlier["idle"])
    step = Step(("0",), "idle", {"rank": 2}, allow_growth=True)
    with pytest.warns(DeprecationWarning, match=r"Idle\.look gives bare words"):
        small = taut.apply(model, Plan.of(traced, [step]), taut.observe(traced, model))
    assert torch.equal(small(x), model(x))


def test_needs_of_our_own_methods_is_answered_and_warns():
    with pytest.warns(DeprecationWarning, match="now uses_statistics"):
        assert METHODS["svd"].needs == {"inputs", "outputs"}
    with pytest.warns(DeprecationWarning, match="now uses_statistics"):
        assert METHODS["mfbp"]().needs == frozenset()


def test_what_a_class_made_of_ours_says_itself_counts():
    @dataclass(frozen=True)
    class Blind(METHODS["svd"]):
        rank_b: int = 3
        needs: ClassVar[frozenset[str]] = frozenset()

    with pytest.warns(DeprecationWarning, match="Blind says with 'needs'"):
        accept(Blind)
    assert not Blind().uses_statistics
    assert METHODS["svd"].uses_statistics is True
    assert Blind.rank_settings == ("rank", "rank_b")


def test_ranks_of_a_class_are_its_own_whoever_came_first(earlier):
    @dataclass(frozen=True)
    class Two(earlier["mine"]):
        rank_b: int = 3

    with pytest.warns(DeprecationWarning, match="Mine says"):
        accept(earlier["mine"])
    accept(Two)
    assert (earlier["mine"].rank_settings, Two.rank_settings) == (("rank",), ("rank", "rank_b"))


def test_the_type_of_factors_is_still_there():
    with pytest.warns(DeprecationWarning, match=r"Factors is now the type parameter of taut\.types\.Method"):
        assert taut.types.Factors is Any


def test_the_author_sees_the_warning_under_pythons_own_filters():
    program = (
        "from methods.test_earlier_contract import *\n"
        "class Own(Mine):\n"
        "    needs = frozenset({'inputs'})\n"
        "choose([Own()])\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root, env={**os.environ}
    )
    assert "DeprecationWarning: The method Own says with 'needs'" in done.stderr


def test_the_documentation_names_what_the_contract_asks_for():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    for name in Method.__annotations__:
        assert f"`{name}`" in page


def test_a_class_of_today_is_left_as_it_is():
    before = {name: dict(vars(kind)) for name, kind in METHODS.items()}
    for kind in METHODS.values():
        accept(kind)
    assert before == {name: dict(vars(kind)) for name, kind in METHODS.items()}
