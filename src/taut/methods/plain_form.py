"""What methods share that give one layer its plain form: there is nothing to decompose, and nothing is damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from taut.types import Group, Method


class PlainForm:
    """Base of the exact methods that `taut.compress` carries out first; subclasses are frozen dataclasses.

    They define `refuses`, `restored`, `rewrite`, `skeleton` and `cost`.
    """

    name: ClassVar[str]
    uses_statistics: ClassVar[bool] = False
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ()

    def refuses(self, group: Group) -> str | None:
        """Why the layer has no other plain form, or None."""
        raise NotImplementedError

    def family(self) -> str:
        """There is nothing to decompose."""
        return self.name

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> None:
        """Nothing."""
        del modules, stats

    def candidates(self, group: Group, factors: object) -> Sequence[Self]:
        """Itself, where the layer has another plain form."""
        del factors
        return [] if self.refuses(group) else [self]

    def damage(self, factors: object) -> float | None:
        """None is done."""
        del factors
        return 0.0

    def exact_case(self, group: Group) -> tuple[Method, nn.Module] | None:
        """None: a plain layer has nothing to become."""
        del group
        return None
