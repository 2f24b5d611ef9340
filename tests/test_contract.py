"""The contract of every method: each row of METHODS on every net and layer flavour of cases.py."""

from __future__ import annotations

import copy
from dataclasses import replace as replace_fields
from functools import cache, cached_property
from itertools import product

import pytest
import torch
from torch import nn

import taut
from cases import CASES, LAYERS, case, macs_by_module, run, state, surroundings, untouched
from taut import CallError, Plan, Step
from taut.core.tensors import tensors
from taut.decompose import cp as cp_fits
from taut.decompose import sharing
from taut.methods import METHODS, resolve, settings
from taut.methods.channels.channels import READ_ELSEWHERE
from taut.methods.factorization import Unplanned
from taut.methods.layer_factory import random_layer, refuse_layer
from taut.methods.low_rank import cp
from taut.nn import Answering, Reorder
from taut.planning.application import apply_plan
from taut.structure.support import (
    ATTENTION,
    COMPUTED,
    CONVOLUTION,
    LINEAR,
    MULTIPLIED,
    RECURRENT,
    SHARED_WEIGHT,
    STILL_NARROWED,
    TABLE,
    TRANSPOSED,
    UNFACTORIZED,
)
from taut.structure.surgery import answering, clone, replace
from taut.types import Group, Looking, Slimming, shrinks

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* is left as it was. no channels can:UserWarning")
"""What filter pruning says of each layer that it meets alone."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}
"""Largest error relative to the largest output where a method is exact; the halves have 8 and 11 bits."""

SIZES = {"codebook": "codes", "hashed": "share"}
"""The setting that says how much is kept, where it is not a rank."""

WHOLE = torch.uint8, torch.int8, torch.int32
"""Types of codes, quantized weights and places, which never become those of the layer."""

EVERY_CASE = pytest.mark.parametrize("name", [one.name for one in CASES])
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_FLAVOUR = "cp", "dead_taps"
"""Methods with code for a kernel's axes one by one, whose layers differ with their number: all flavours of each."""

LONE_FLAVOURS = "default", "circular_same_even"
"""Of one and three dimensions for methods that leave a kernel in one piece: what differs are the layers' classes, and
the padding by sides."""

OWN_FORWARD = [
    name
    for name, kind in METHODS.items()
    if kind.masks or name in {"channels", "codebook", "dead_units", "fastfood", "hashed", "int8", "shared"}
]
"""Methods that keep a layer's own forward pass: to them one, two and three dimensions are the same code."""

FLAVOURS = (
    "default",
    "stride",
    "groups",
    "depthwise",
    "no_bias",
    "circular_same_even",
    "same_even_dilated",
    "replicate",
)
"""Of two dimensions for those that keep the forward pass; all others meet every one."""

TAKEN = {
    "as_conv": (CONVOLUTION,),
    "as_attention": (ATTENTION,),
    "as_linear": (LINEAR,),
    "as_layer": (MULTIPLIED,),
    "bake": (COMPUTED,),
    "as_recurrent": (RECURRENT,),
    "dead_units": UNFACTORIZED,
    "table": (TABLE,),
    "tied": (SHARED_WEIGHT.partition("'")[0],),
    "transposed": (TRANSPOSED,),
    "transposed_spatial": (TRANSPOSED,),
    "channels": (*STILL_NARROWED, READ_ELSEWHERE),
}
"""Methods that bake or narrow layers, and how the reasons start for which other methods leave a layer alone."""

METRICS = "frobenius", "data", "fisher"

LARGE, LIKE_OTHERS = ("everything", "inception", "resnet"), ("fastfood", "hashed", "int8", "mfbp", "obs")
"""Nets of many layers, and methods whose way through them is that of magnitude or of codebook."""


def flavours(method, dims):
    """The flavours of a convolution on which a method is tried; None for all."""
    if method in EVERY_FLAVOUR:
        return None
    if method in OWN_FORWARD:
        return FLAVOURS if dims == "conv2d" else ("default",)
    return None if dims == "conv2d" else LONE_FLAVOURS


def meets(method, one):
    """Whether a method is tried on a case: one of its flavours, or a net, with a layer that it takes."""
    dims, _, flavour = one.name.partition("_")
    few = flavours(method, dims) if dims in {"conv1d", "conv2d", "conv3d"} else None
    if (few is not None and flavour not in few) or (method in LIKE_OTHERS and one.name in LARGE):
        return False
    return bool(setup(one.name).groups(method))


@pytest.fixture
def _quick(monkeypatch):
    """Fits of a step or two: what a step builds, and what that costs, does not depend on how near they come."""
    monkeypatch.setattr(cp, "EFFORT", {"sweeps": 2, "tol": 1e-4, "restarts": 1})
    monkeypatch.setattr(cp_fits, "FEW_SWEEPS", 1)
    monkeypatch.setattr(sharing, "ITERATIONS", 2)


DEFAULT_METHODS = [name for name, kind in METHODS.items() if kind.default]


class Setup:
    """A case traced and observed once; every test must leave it as it is."""

    def __init__(self, name):
        self.case = case(name)
        self.model, self.example = self.case.make()
        with untouched(self.model):
            self.net = taut.trace(self.model, self.example)

    @cached_property
    def stats(self):
        """What the layers see."""
        with untouched(self.model):
            return taut.observe(self.net, self.model, self.case.data())

    @cached_property
    def outputs(self):
        """Of the original for the example."""
        return run(self.model, self.example)

    @cached_property
    def macs(self):
        """Of the original's modules for the whole batch, by torch's own counter."""
        return macs_by_module(self.model, self.example)

    @property
    def batch(self):
        """Samples of the example."""
        return len(tensors(self.example)[0])

    def groups(self, method):
        """The groups to which a method applies."""
        own = (None, *getattr(METHODS[method], "of_their_own", ()))
        rewritable = [layer for layer in (*self.net.layers, *self.net.blocks) if layer.skip in own]
        groups = [*(Group((layer,)) for layer in rewritable), *self.net.tied]
        return [group for group in groups if METHODS[method]().refuses(group) is None]

    def candidates(self, method, group):
        kind = METHODS[method]()
        return kind.candidates(group, self.stats.factors(group, kind))

    def resolved(self, method, group):
        """Three resolved methods from smallest to exact, whether they shrink anything or not."""
        full = METHODS[method]().exact_case(group)[0]
        if METHODS[method].masks:
            return [replace_fields(full, sparsity=sparsity, zeros=None) for sparsity in (0.9, 0.5, 0.0)]
        size = SIZES.get(method, "rank")
        ranks = {key: value for key, value in settings(full).items() if key.startswith(size) and value is not None}
        small = {key: lowered(value, 0) for key, value in ranks.items()}
        middle = {key: lowered(value, 2) for key, value in ranks.items()}
        return [resolve(Step(group.names, method, settings(full) | some)) for some in (small, middle, {})]

    def plan(self, method, size):
        """Every layer that the method takes rewritten, `size` 0 to 2 from smallest to exact."""
        steps = []
        for group in self.groups(method):
            chosen = self.resolved(method, group)[size]
            steps.append(Step(group.names, method, settings(chosen), allow_growth=True))
        return Plan.of(self.net, steps)


def lowered(rank, by):
    """A rank, or a list of one per type of channels, over `by`, 1 for 0; a share, a tenth of it for 0."""
    if isinstance(rank, list):
        return [lowered(one, by) for one in rank]
    if isinstance(rank, float):
        return rank / (by or 10)
    return max(1, rank // by) if by else 1


@cache
def setup(name):
    """The case's net, traced once."""
    return Setup(name)


PAIRS = [(method, one.name) for method in METHODS for one in CASES if meets(method, one)]
EVERY_PAIR = pytest.mark.parametrize(("method", "name"), PAIRS)
EVERY_LAYER = pytest.mark.parametrize(
    ("method", "name"), [(m, name) for m, name in PAIRS if m in DEFAULT_METHODS and name in {o.name for o in LAYERS}]
)


def dtype_of(module):
    """Of its parameters."""
    return next(module.parameters()).dtype


def error(found, wanted):
    """The largest deviation relative to the largest wanted value."""
    scale = max(float(wanted.double().abs().max()), 1e-30)
    return float((found.double() - wanted.double()).abs().max()) / scale


def owned(module):
    """Names and tensors of a module tree, by reference."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


# Shapes, harmlessness, plain layers, skeletons.


@EVERY_PAIR
@pytest.mark.usefixtures("_quick")
def test_a_plan_from_its_json_rewrites_its_layers_as_their_skeletons_and_keeps_all_else(method, name):
    """The model itself; shapes and dtypes of the output; other tensors; modules built from the plan alone."""
    s = setup(name)
    plan = s.plan(method, 1)
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    told = str(plan)
    assert all(layer in told for step in plan.steps for layer in step.layers)
    with untouched(s.model):
        small, done = apply_plan(s.model, again, s.stats)
    outputs = run(small, s.example)
    same_form(outputs, s.outputs)
    all_else_is_kept(s.model, small, METHODS[method], {layer for step in plan.steps for layer in step.layers})
    rebuilt = s.case.make()[0]
    for step in done.steps:
        for layer, module in resolve(step).skeleton(step.group).items():
            built = module.to(dtype_of(s.model.get_submodule(layer)))
            replace(rebuilt, layer, answering(built, next(one for one in step.group.layers if one.name == layer)))
    rebuilt.load_state_dict(small.state_dict(), strict=True)
    for step in done.steps:
        assert repr(rebuilt.get_submodule(step.layers[0])) == repr(small.get_submodule(step.layers[0]))
    for a, b in zip(outputs, run(rebuilt, s.example), strict=True):
        assert torch.equal(a, b)


def same_form(found, wanted):
    """Shapes, dtypes and devices of outputs, which are finite."""
    assert [(t.shape, t.dtype, t.device) for t in found] == [(t.shape, t.dtype, t.device) for t in wanted]
    assert all(bool(t.isfinite().all()) for t in found)


def all_else_is_kept(model, small, kind, rewritten):
    """Memory of its own, plain layers where they are promised, and names, dtypes, values and flags of other tensors."""
    old, new = owned(model), owned(small)
    assert {t.untyped_storage().data_ptr() for t in new.values()}.isdisjoint(
        t.untyped_storage().data_ptr() for t in old.values()
    )
    for layer in rewritten if kind.plain else ():
        parts = [part for part in small.get_submodule(layer).modules() if type(part) is not Answering]
        assert all(type(part).__module__.startswith("torch.nn.") for part in parts)
    assert {t.dtype for t in new.values()} <= {t.dtype for t in old.values()} | (set() if kind.plain else set(WHOLE))
    moved = not kind.plain  # a neighbour may have taken over the order of its channels
    inside = tuple(f"{layer}." for layer in rewritten | aliases(model, rewritten))
    for key, tensor in old.items():
        if not key.startswith(inside):
            assert new[key].dtype == tensor.dtype
            assert torch.equal(*(t.flatten().sort().values if moved else t for t in (new[key], tensor)))
            assert new[key].requires_grad == tensor.requires_grad
            assert new[key].stride() == tensor.stride()


@pytest.mark.parametrize("name", ["vgg", "resnet", "inception", "encoder", "tied", "shared", "float64", "bfloat16"])
@pytest.mark.parametrize("method", DEFAULT_METHODS)
def test_recovery_leaves_the_model_untouched_too(method, name):
    s = setup(name)
    with untouched(s.model):
        small = taut.apply(s.model, s.plan(method, 1), s.stats, data=s.case.data())
    same_form(run(small, s.example), s.outputs)


# Exactness.


@EVERY_PAIR
def test_exact_case(method, name):
    """Planted layers take the originals' places; the net with their rewrites computes the same on other inputs."""
    s, kind = setup(name), METHODS[method]
    groups = s.groups(method)
    at_once = 1 if issubclass(kind, Slimming) else 6  # whose roundings together stay below the tolerance of one
    for start in range(0, len(groups), at_once):
        cases = {group.names: kind().exact_case(group) for group in groups[start : start + at_once]}
        planted, net, stats = with_planted(s, kind(), groups[start : start + at_once], cases)
        steps = [Step(names, method, settings(exact), allow_growth=True) for names, (exact, _) in cases.items()]
        done = taut.apply(planted, Plan.of(net, steps), stats)
        same_kind = kind.exact or kind.masks or issubclass(kind, Slimming)
        for (place, *_), (_, layer) in cases.items():
            assert type(done.get_submodule(place)) is not type(layer) or same_kind
        for batch in (s.example, *s.case.data(batches=1, size=3)):
            for wanted, found in zip(run(planted, batch), run(done, batch), strict=True):
                if wanted.is_floating_point():
                    assert error(found, wanted) <= TOLERANCE[wanted.dtype]


def with_planted(s, method, groups, cases):
    """The net with the layers of exact cases, traced and observed; the original where any layers of that shape do."""
    if all(any_does(group, cases[group.names][1]) for group in groups):
        return s.model, s.net, s.stats
    planted, alike = clone(s.model), True
    for place, *others in cases:
        layer = cases[place, *others][1].to(dtype_of(s.model.get_submodule(place)))
        alike &= type(layer) is type(s.model.get_submodule(place))
        replace(planted, place, layer)
        for other in others:
            planted.get_submodule(other).weight = layer.weight
    net = s.net if alike else taut.trace(planted, s.example)
    return planted, net, taut.observe(net, planted, s.case.data() if method.uses_statistics else None)


def any_does(group, layer):
    """Whether the layer of an exact case is any of its shape, as the original is one."""
    if len(group.layers) > 1 or refuse_layer(group.layer):
        return False
    drawn = random_layer(group.layer)
    return all(torch.equal(a, b) for a, b in zip(layer.parameters(), drawn.parameters(), strict=True))


@EVERY_LAYER
def test_every_metric_is_exact_at_full_rank_and_finite_at_rank_one(method, name):
    s = setup(name)
    for group, metric in product(s.groups(method), METRICS):
        small, _, full = (
            Step(group.names, method, settings(m) | {"metric": metric}, allow_growth=True)
            for m in s.resolved(method, group)
        )
        (found,) = run(taut.apply(s.model, Plan.of(s.net, [full]), s.stats), s.example)
        assert error(found, s.outputs[0]) <= TOLERANCE[found.dtype], metric
        same_form(run(taut.apply(s.model, Plan.of(s.net, [small]), s.stats), s.example), s.outputs)


@EVERY_LAYER
def test_refit_keeps_full_rank_exact(method, name):
    s = setup(name)
    small = taut.apply(s.model, s.plan(method, 2), s.stats, data=s.case.data())
    for wanted, found in zip(s.outputs, run(small, s.example), strict=True):
        assert error(found, wanted) <= 10 * TOLERANCE[wanted.dtype]


@EVERY_LAYER
def test_more_rank_never_hurts_on_the_calibration_data(method, name):
    """Damage falls with the rank, and is zero at full rank."""
    s = setup(name)
    for group in s.groups(method):
        kind = METHODS[method]()
        factors = s.stats.factors(group, kind)
        small, middle, full = (m.damage(factors) for m in s.resolved(method, group))
        assert 0 <= full <= middle * (1 + 1e-6) + 1e-9
        assert middle <= small * (1 + 1e-6) + 1e-9
        assert full <= 1e-4 * small + 1e-12


# Costs.


@EVERY_PAIR
@pytest.mark.usefixtures("_quick")
def test_a_step_costs_what_its_module_does_and_grows_a_layer_only_on_request(method, name):
    """All layers in one model, at the smallest size and at the largest; one by one where steps reach into others."""
    s, groups = setup(name), setup(name).groups(method)
    blocks = any(layer.block for group in groups for layer in group.layers)
    for some in [[group] for group in groups] if blocks or issubclass(METHODS[method], Slimming) else [groups]:
        ends = [(group, s.resolved(method, group)[::2]) for group in some]
        costs_are_kept(s, [(group, small, small == large) for group, (small, large) in ends])
        if larger := [(group, large, True) for group, (small, large) in ends if small != large]:
            costs_are_kept(s, larger)


def costs_are_kept(s, chosen):
    """Of groups with resolved methods, in one model, and whether each is as large as it can be."""
    steps = []
    for group, kind, largest in chosen:
        smaller = shrinks(kind, group)
        step = Step(group.names, kind.name, settings(kind), allow_growth=not smaller)
        if not smaller and largest:
            refused(s, replace_fields(step, allow_growth=False), kind)
        steps.append(step)
    small = taut.apply(s.model, Plan.of(s.net, steps), s.stats)
    same_form(run(small, s.example), s.outputs)
    for group, kind, _ in chosen:
        costs_what_it_says(s.model, small, group, kind.cost(group))
    counted, changes = (
        macs_by_module(small, s.example),
        [kind.cost(group).macs - group.cost.macs for group, kind, _ in chosen],
    )
    assert sum(changes) * s.batch == counted[""] - s.macs[""]
    for (group, _, _), change in zip(chosen, changes, strict=True):
        assert change * s.batch == sum(counted.get(name, 0) - s.macs.get(name, 0) for name in group.names)


def costs_what_it_says(model, small, group, cost):
    """Parameters, bytes and values that are not zero of what was built for a group."""
    original, built = (nn.ModuleList(each.get_submodule(name) for name in group.names) for each in (model, small))
    assert group.cost.params == sum(p.numel() for p in original.parameters())
    assert cost.params == sum(p.numel() for p in built.parameters())
    orders = {f"{key}.order" for key, part in built.named_modules() if isinstance(part, Reorder)}
    held = built.state_dict(keep_vars=True)
    stored = {id(t): t for key, t in held.items() if key not in orders}  # neighbours may take it
    assert cost.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert sum(int(p.count_nonzero()) for p in built.parameters()) <= cost.nonzero
    full = all(full_rank(p) for p in original.parameters() if p.ndim > 1)
    assert not full or sum(map(filled, built.parameters())) == cost.nonzero


def full_rank(weight):
    """Whether nothing of it is zero, and no factor or remainder of it has to be: else no size tells how much is."""
    matrix = weight.detach().flatten(1).double()
    return bool(weight.all()) and int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) == min(matrix.shape)


def filled(parameter):
    """How many of its values are not zero; all where they are whole numbers: which round to zero no size tells."""
    return int(parameter.count_nonzero()) if parameter.is_floating_point() else parameter.numel()


def refused(s, step, method):
    """A step that would not make its layer smaller; one that takes channels out leaves it, and says why."""
    if isinstance(method, Slimming):
        stays(s, step)
        return
    with untouched(s.model), pytest.raises(CallError, match=f"layer '{step.layers[0]}'.*allow_growth"):
        taut.apply(s.model, Plan.of(s.net, [step]), s.stats)


def stays(s, step):
    """A step that takes channels out finds none in a layer alone: the layer is as it was, and the plan says why."""
    with untouched(s.model):
        small, done = apply_plan(s.model, Plan.of(s.net, [step]), s.stats)
    assert not done.steps
    assert [kept.layer for kept in done.kept] == list(step.layers)
    assert all(len(kept.reason.split()) >= 3 for kept in done.kept)
    for key, tensor in owned(s.model).items():
        assert torch.equal(owned(small)[key], tensor)


@EVERY_CASE
def test_costs_of_layers_add_up(name):
    s = setup(name)
    assert s.net.cost.params == sum(p.numel() for p in s.model.parameters())
    assert sum(layer.params for layer in s.net.layers) == s.net.cost.params
    if not s.net.uncounted:
        assert s.net.cost.macs * s.batch == s.macs[""]


# Empty plans.


@EVERY_CASE
def test_an_empty_plan_gives_the_model_itself_anew(name):
    s = setup(name)
    with untouched(s.model):
        small, done = apply_plan(s.model, Plan.of(s.net, []), s.stats)
    assert not done.steps
    old, new = owned(s.model), owned(small)
    assert list(old) == list(new)
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(old.values(), new.values(), strict=True)
    )
    for a, b in zip(s.outputs, run(small, s.example), strict=True):
        assert torch.equal(a, b)


# What is refused, and what is not.


@pytest.mark.parametrize("method", DEFAULT_METHODS)
@pytest.mark.parametrize("rank", [10**6, 0, -1, 2.5, True, "8", None])
def test_impossible_rank_is_a_call_error(method, rank):
    s = next(s for s in map(setup, ("conv2d_padding", "keywords", "transposed", "tied")) if s.groups(method))
    group = s.groups(method)[0]
    (key, *_) = (key for key in settings(METHODS[method]()) if key.startswith("rank"))
    full = settings(s.resolved(method, group)[2])
    step = Step(group.names, method, full | {key: rank}, allow_growth=True)
    words = rf"'{key}' of {method} on layer '{group.names[0]}'.*Got {rank}"
    with untouched(s.model), pytest.raises(CallError, match=words):
        taut.apply(s.model, Plan.of(s.net, [step]), s.stats)


@pytest.mark.parametrize(
    ("method", "name"), [pair for pair in PAIRS if not issubclass(METHODS[pair[0]], Unplanned | Looking)]
)
def test_candidates_only_shrink(method, name):
    s = setup(name)
    for group in s.groups(method):
        offered = s.candidates(method, group)
        smallest = s.resolved(method, group)[0]
        assert offered or method not in DEFAULT_METHODS or not shrinks(smallest, group)
        assert all(shrinks(one, group) for one in offered)
        assert len(set(map(repr, offered))) == len(offered)
        assert all(resolve(Step(group.names, one.name, settings(one))) == one for one in offered)


@EVERY_CASE
def test_planner_never_grows_a_layer(name):
    s = setup(name)
    budget = taut.Budget(params=0.9)
    try:
        plan = taut.plan(s.net, s.stats, budget)
    except taut.BudgetError:
        return  # nothing to shrink; test_bad_input reads the message
    assert all(step.after.lowers(step.before) for step in plan.steps)
    assert plan.after.params <= 0.9 * plan.before.params
    assert Plan.from_json(plan.to_json()) == plan


@EVERY_CASE
def test_nothing_is_dropped_without_a_reason(name):
    """Every module that owns parameters is in the network, and each method takes it, or refuses it in words."""
    s = setup(name)
    listed = {layer.name for layer in s.net.layers}
    owners = {n for n, m in s.model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert {owner for owner in owners if ".parametrizations." not in owner} <= listed
    for (method, kind), layer in product(METHODS.items(), s.net.layers):
        reason = kind().refuses(s.net.group([layer.name]))
        assert reason is None or len(reason.split()) >= 3
        if layer.skip is not None and (reason is not None or not layer.skip.startswith(TAKEN.get(method, ()))):
            assert reason.startswith(tuple(filter(None, (layer.skip, layer.whole))))
            step = Step((layer.name,), method, {}, Group((layer,)), allow_growth=True)  # a block may be called so, too
            with untouched(s.model), pytest.raises(CallError, match=f"layer '{layer.name}'"):
                taut.apply(s.model, Plan.of(s.net, [step]), s.stats)


@pytest.mark.parametrize(
    ("layer", "example"),
    [
        (nn.ConvTranspose1d(4, 4, 3), torch.randn(2, 4, 8)),
        (nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 4, 2), torch.randn(2, 4, 4, 4, 4)),
        (nn.Bilinear(4, 4, 4), (torch.randn(2, 4), torch.randn(2, 4))),
        (nn.PReLU(), torch.randn(2, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_layers_are_skipped_with_a_reason(layer, example):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, *args):
            return self.inner(*args)

    net = taut.trace(Holder(), example)
    assert len(net["inner"].skip.split()) >= 3
    assert net["inner"].skip in str(net).replace("\n", " ") or net["inner"].skip.split()[0] in str(net)


@pytest.mark.parametrize(("method", "layer"), [("nonsense", "conv"), ("svd", "no_such_layer")])
def test_unknown_names_are_call_errors(method, layer):
    s = setup("conv2d_padding")
    with untouched(s.model), pytest.raises(CallError, match=r"nonsense|no_such_layer"):
        taut.apply(s.model, Plan.of(s.net, [Step((layer,), method, {"rank": 1})]), s.stats)


def test_unknown_settings_are_call_errors():
    with pytest.raises(CallError, match="Unknown setting 'ranks' of method 'svd'"):
        resolve(Step(("conv",), "svd", {"ranks": 3}))
    s = setup("conv2d_padding")
    step = Step(("conv",), "svd", {"rank": 3, "metric": "nonsense"})
    with untouched(s.model), pytest.raises(CallError, match="nonsense"):
        taut.apply(s.model, Plan.of(s.net, [step]), s.stats)


# What a layer carries beside its weight.


@pytest.mark.parametrize("method", DEFAULT_METHODS)
@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_hooks_are_kept(method, data):
    s = setup("hooked")
    if not s.groups(method):
        pytest.skip("no layer of this method in the net")
    small = taut.apply(s.model, s.plan(method, 2), s.stats, data=s.case.data() if data else None)
    for wanted, found in zip(run(s.model, s.example), run(small, s.example), strict=True):
        assert error(found, wanted) <= 1e-4  # the hooks double, and add: losing one would be seen
    for before, after in zip(state(s.model).items(), state(s.model).items(), strict=True):
        assert before == after
    (hook,) = s.model.fc1._forward_hooks.values()
    calls = hook.calls
    run(small, s.example)
    assert hook.calls == calls + 1


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_frozen_stays_frozen(data):
    s = setup("frozen")
    small = taut.apply(s.model, s.plan("svd", 1), s.stats, data=s.case.data() if data else None)
    assert not any(p.requires_grad for p in small.fc1.parameters())
    parts = dict(small.fc2.named_parameters())
    assert {name: p.requires_grad for name, p in parts.items()} == {name: not name.endswith("bias") for name in parts}
    assert all(p.requires_grad for p in small.fc3.parameters())


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_frozen_weight_with_a_trainable_bias(data):
    s = setup("frozen_weight")
    small = taut.apply(s.model, s.plan("svd", 1), s.stats, data=s.case.data() if data else None)
    assert {n: p.requires_grad for n, p in small.fc1.named_parameters()} == {
        n: n.endswith("bias") for n, _ in small.fc1.named_parameters()
    }


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_training_flags_are_kept_module_by_module(data):
    s = setup("resnet")
    model = copy.deepcopy(s.model).train()
    model.block1.eval()
    model.block2.conv2.eval()
    net = taut.trace(model, s.example)
    stats = taut.observe(net, model, s.case.data())
    plan = Plan.of(net, s.plan("svd", 1).steps)
    with untouched(model):
        small = taut.apply(model, plan, stats, data=s.case.data() if data else None)
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        known = name if name in flags else name.rpartition(".")[0]
        assert module.training == flags[known], name


def aliases(model, names):
    """Other names of the same modules."""
    inside = {id(model.get_submodule(name)) for name in names}
    return {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in inside}


@EVERY_METHOD
def test_ties_are_kept(method):
    s = setup("tied")
    small = taut.apply(s.model, s.plan(method, 1), s.stats)
    ends = [set(small.get_submodule(name).parameters()) for name in ("out", "embed")]
    assert ends[0] == ends[1] != set()
    s = setup("shared")
    plan = s.plan(method, 1)
    small = taut.apply(s.model, plan, s.stats)
    assert small.conv is small.alias
    touched = {layer for step in plan.steps for layer in step.layers}
    assert small.conv is not s.model.conv
    kind = METHODS[method]
    replaced = "conv" in touched and not (kind.masks or kind.exact or issubclass(kind, Slimming))
    assert replaced == (type(small.conv) is not nn.Conv2d)


def test_alternating_dtypes_and_devices_are_those_of_the_layer():
    """A float64 layer between float32 ones keeps its own dtype."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.second = nn.Linear(12, 12).double()

        def forward(self, x):
            return self.second(self.first(x).double())

    model, example = Mixed(), torch.randn(4, 12)
    net = taut.trace(model, example)
    stats = taut.observe(net, model, [torch.randn(16, 12)])
    plan = Plan.of(net, [Step((name,), "svd", {"rank": 2}) for name in ("first", "second")])
    for data in (None, [torch.randn(16, 12)]):
        small = taut.apply(model, plan, stats, data=data)
        assert {p.dtype for p in small.first.parameters()} == {torch.float32}
        assert {p.dtype for p in small.second.parameters()} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["vgg", "resnet", "encoder", "tied", "lstm", "conv2d_groups", "conv1d_same_even"])
@pytest.mark.parametrize("method", DEFAULT_METHODS)
def test_device_kept(method, name):
    s = setup(name)
    model = copy.deepcopy(s.model).cuda()
    net = taut.trace(model, s.example)
    stats = taut.observe(net, model, s.case.data())
    for data in (None, s.case.data()):
        small = taut.apply(model, Plan.of(net, s.plan(method, 1).steps), stats, data=data)
        assert {t.device.type for t in owned(small).values()} == {"cuda"}
        assert all(bool(t.isfinite().all()) for t in run(small, s.example))


# Repeatability.


@pytest.mark.parametrize("name", ["vgg", "resnet", "lstm", "encoder", "tied", "everything", "float16"])
def test_one_seed_gives_the_same_bytes(name, tmp_path):
    s = setup(name)
    folders = []
    for turn in range(2):
        torch.manual_seed(turn)  # the caller's random state must not matter
        torch.rand(turn)
        around = surroundings()
        result = taut.compress(
            s.model, s.example, budget=taut.Budget(params=0.985), data=s.case.data(), methods=DEFAULT_METHODS, seed=3
        )
        assert surroundings() == around
        assert result.plan.steps
        folders.append(tmp_path / str(turn))
        result.save(folders[-1])
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "comparison.json"}
        for folder in folders
    )
    assert "model.safetensors" in first
    assert first == second


# Pruned stays pruned.


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.masks])
def test_a_lower_sparsity_on_a_sparser_net_brings_nothing_back(method):
    s = setup("vgg")
    sparse = taut.apply(s.model, Plan((taut.whole(s.net, "magnitude", sparsity=0.8),)), s.stats)
    net = taut.trace(sparse, s.example)
    stats = taut.observe(net, sparse, s.case.data())
    step = replace_fields(taut.whole(net, method, sparsity=0.3), allow_growth=True)
    again = taut.apply(sparse, Plan((step,)), stats, data=s.case.data())
    for before, after in zip(sparse.parameters(), again.parameters(), strict=True):
        assert before.ndim < 2 or not bool(((before == 0) & (after != 0)).any())
