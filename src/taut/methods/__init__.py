"""The methods: one file each, and the one table that is the whole registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import cast

from taut.core.extras import missing
from taut.core.text import brief
from taut.errors import CallError
from taut.methods.as_attention import AsAttention
from taut.methods.as_conv import AsConv
from taut.methods.as_layer import AsLayer
from taut.methods.as_linear import AsLinear
from taut.methods.as_recurrent import AsRecurrent
from taut.methods.bake import Bake
from taut.methods.blocks import Blocks
from taut.methods.channels.channels import Channels
from taut.methods.channels.dead_taps import DeadTaps
from taut.methods.channels.dead_units import DeadUnits
from taut.methods.clustered.bicluster import Bicluster
from taut.methods.clustered.monochromatic import Monochromatic
from taut.methods.clustered.outer import Outer
from taut.methods.compact_weights.codebook import Codebook
from taut.methods.compact_weights.fastfood import Fastfood
from taut.methods.compact_weights.hashed import Hashed
from taut.methods.compact_weights.int8 import Int8
from taut.methods.earlier_contract import accept
from taut.methods.low_rank.cp import CP
from taut.methods.low_rank.lowrank_sparse import LowRankSparse
from taut.methods.low_rank.shared import Shared
from taut.methods.low_rank.spatial import Spatial
from taut.methods.low_rank.svd import SVD
from taut.methods.low_rank.table import Table
from taut.methods.low_rank.tied import Tied
from taut.methods.low_rank.transposed import Transposed
from taut.methods.low_rank.transposed_spatial import TransposedSpatial
from taut.methods.low_rank.tucker import Tucker
from taut.methods.masks.magnitude import Magnitude
from taut.methods.masks.mfbp import MFBP
from taut.methods.masks.obs import OBS
from taut.types import Method, Setting, Step
from taut.types.method import METHODS as METHODS
from taut.types.method import MethodLike

METHODS |= {
    "svd": SVD,
    "spatial": Spatial,
    "tucker": Tucker,
    "table": Table,
    "tied": Tied,
    "transposed": Transposed,
    "transposed_spatial": TransposedSpatial,
    "cp": CP,
    "bake": Bake,
    "as_linear": AsLinear,
    "as_conv": AsConv,
    "as_attention": AsAttention,
    "as_recurrent": AsRecurrent,
    "as_layer": AsLayer,
    "dead_taps": DeadTaps,
    "dead_units": DeadUnits,
    "channels": Channels,
    "blocks": Blocks,
    "monochromatic": Monochromatic,
    "bicluster": Bicluster,
    "outer": Outer,
    "magnitude": Magnitude,
    "mfbp": MFBP,
    "obs": OBS,
    "shared": Shared,
    "lowrank_sparse": LowRankSparse,
    "codebook": Codebook,
    "int8": Int8,
    "hashed": Hashed,
    "fastfood": Fastfood,
}


LOW_RANK = "low rank"
"""In the place of a method: all that are tried unasked, but `channels`."""


def resolve(step: Step) -> Method:
    """The method object that a step names.

    Raises:
        CallError: the method or one of its settings is unknown.
    """
    kind = METHODS.get(step.method)
    if kind is None:
        raise CallError(f"Unknown method '{step.method}'. Known: {', '.join(METHODS)}.")
    accept(kind)
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(step.settings) - known)
    if unknown:
        raise CallError(f"Unknown setting '{unknown[0]}' of method '{step.method}'. Known: {', '.join(sorted(known))}.")
    method: Method = kind(**step.settings)
    return method


def settings(method: Method) -> dict[str, Setting]:
    """The fields of a method as plain data."""
    return asdict(method)  # type: ignore[call-overload, no-any-return]


def asked(item: object) -> Method:
    """The method object that a name, one {name: settings} or a method object stands for.

    Raises:
        CallError: it is none of these, the method or one of its settings is unknown, or a rank is none.
    """
    if isinstance(item, str):
        item = {item: {}}
    if isinstance(item, Mapping):
        if len(item) != 1:
            raise CallError(f"A method must be a name or one name: settings. Got {brief(item)} instead.")
        ((name, values),) = item.items()
        if name not in METHODS:
            unknown = f"'{LOW_RANK}' has no settings" if name == LOW_RANK else f"Unknown method '{name}'"
            raise CallError(
                f"{unknown}. Known: {', '.join(METHODS)}; and '{LOW_RANK}': those tried unasked, but channels."
            )
        if not isinstance(values, Mapping):
            raise CallError(f"The settings of method '{name}' must be a mapping. Got {brief(values)} instead.")
        item = resolve(Step((), str(name), {str(key): value for key, value in values.items()}))
    if isinstance(item, type) or not hasattr(item, "refuses"):
        raise CallError(
            "A method must be a name, as 'svd', a name with settings, as {'svd': {'metric': 'data'}}, or a method "
            f"object, as taut.methods.SVD(). Got {brief(item)} instead."
        )
    accept(type(item))
    method = cast(Method, item)
    _check_ranks(method)
    return method


def choose(wish: Iterable[MethodLike] | None) -> tuple[Method, ...]:
    """Names, names with settings, or method objects as method objects; None gives the rows of METHODS marked default.

    Args:
        wish: several of what `asked` reads, or one mapping of names to settings. "low rank", alone or among others,
            stands for the rows marked default that are not asked for by themselves.

    Raises:
        CallError: a name or a setting is unknown, a rank is none, or no method is given.
    """
    if wish is None:
        wish = LOW_RANK
    if isinstance(wish, str):
        wish = (wish,)
    if isinstance(wish, Mapping):
        wish = [{name: values} for name, values in wish.items()]
    if not isinstance(wish, Iterable):
        raise CallError(f"The methods must be names or method objects, in a list. Got {brief(wish)} instead.")
    chosen = _all_asked(list(wish))
    for method in chosen:
        absent = missing(*getattr(type(method), "packages", ()))
        if absent is not None:
            raise CallError(f"{method.name} needs a package: {absent}.")
    if not chosen:
        raise CallError(f"At least one method is needed. Known: {', '.join(METHODS)}.")
    return chosen


def _all_asked(wish: list[MethodLike]) -> tuple[Method, ...]:
    """The method objects of every item; `LOW_RANK` leaves out what other items ask for, with settings of its own."""
    found = [None if _means_low_rank(item) else asked(item) for item in wish]
    apart = {method.name for method in found if method is not None}
    defaults = [asked(name) for name, kind in METHODS.items() if kind.default and name not in apart]
    return tuple(method for one in found for method in (defaults if one is None else [one]))


def _means_low_rank(item: object) -> bool:
    return isinstance(item, str | Mapping) and item in (LOW_RANK, {LOW_RANK: {}})


def _check_ranks(method: Method) -> None:
    """Refuse a rank that no layer can have; how large one may be is the layer's to say.

    Raises:
        CallError: it is no whole number from 1 on.
    """
    for key in method.rank_settings:
        rank = getattr(method, key, None)
        if rank is not None and (type(rank) is not int or rank < 1):
            raise CallError(
                f"The '{key}' of {method.name} must be a whole number, at least 1. Got {brief(rank)} instead."
            )
