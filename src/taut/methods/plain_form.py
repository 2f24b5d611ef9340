"""What methods share that give one layer its plain form: there is nothing to decompose, and nothing is damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from taut.structure.surgery import clone, swap
from taut.types import Group, Layer, Method


class PlainForm:
    """Base of the exact methods that `taut.compress` carries out first; subclasses are frozen dataclasses.

    They define `refuses`, `restored`, `rewrite`, `skeleton` and `cost`; and `own_form`, `give_back` and `untouched`
    where the way back is another than here.
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

    def own_form(self, plain: nn.Module, own: nn.Module, layer: Layer) -> nn.Module:
        """The layer in the form that it had, with the values of the plain form, as far as they may be others.

        Args:
            plain: the layer in its plain form.
            own: a copy of the original.
            layer: as the step found it.
        """
        if layer.computed:
            fill(own, plain.state_dict())
        return own

    def give_back(self, model: nn.Module, original: nn.Module, layer: Layer) -> None:
        """Put the layer in the form that it had into `model`, in place."""
        plain = model.get_submodule(layer.name)
        swap(model, plain, self.own_form(plain, clone(original.get_submodule(layer.name)), layer))

    def untouched(self, now: nn.Module, before: nn.Module, layer: Layer) -> bool:
        """Whether the plain form is what it was, bit for bit; a bias beside a computed weight may be another.

        What a refit moved stays plain: the plan, carried out again, would not refit a layer that it does not name.

        Args:
            now: the plain form.
            before: the same as the step left it.
            layer: as the step found it.
        """
        return same_values(now, before, layer.computed or tuple(dict(before.named_parameters())))

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


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into those tensors of a module that have their names and shapes."""
    with torch.no_grad():
        for key, t in module.state_dict().items():
            if key in values and t.shape == values[key].shape:
                t.copy_(values[key])


def same_values(one: nn.Module, other: nn.Module, names: Sequence[str]) -> bool:
    """Whether two modules have parameters of the same names, and those of `names` the same values."""
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in names)
