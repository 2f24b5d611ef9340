"""The net that breaks other tools: nothing breaks, every skipped layer says why, and nobody's state is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taut
from cases import NETS, bits, case, run, surroundings, untouched
from taut import Budget, BudgetError
from taut.core.tensors import tensors
from taut.planning.plain_form import PLAIN_FORMS
from taut.structure.support import STILL_NARROWED

BUDGETS = [Budget(macs=0.8), Budget(params=0.9), Budget(macs=0.85, params=0.95, bytes=0.95)]
SKIPPED = {
    "up": "transposed",
    "normed": "parametrization",
    "embed": "shared",
    "out": "shared with 'embed'",
    "lstm": "as_recurrent",
    "attend": "packed",
    "attend.out_proj": "never called",
    "encode.self_attn": "packed",
    "encode.self_attn.out_proj": "never called",
    "encode.linear1": "",
    "encode.linear2": "",
    "encode.norm1": "normalization",
    "block.norm1": "normalization",
    "spare": "never called",
}
"""Layers of `Everything` that no method may touch, and a word of the reason; those of the encoder may be handled."""


@pytest.fixture(scope="module")
def everything():
    return (*case("everything").make(), case("everything").data())


@pytest.fixture(scope="module")
def result(everything):
    """At the first budget; nobody changes it."""
    with untouched(everything[0]):
        return compressed(everything)


def compressed(everything, budget=BUDGETS[0], data=True, **settings):
    model, example, batches = everything
    return taut.compress(model, example, budget=budget, data=batches if data else None, **settings)


def same_bits(a, b):
    """Whether two models hold the same names with the same bits."""
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(bits(mine[key]) == bits(theirs[key]) for key in mine)


def test_every_skipped_layer_has_its_reason(everything):
    model, example, _ = everything
    with untouched(model):
        net = taut.trace(model, example)
    for name, word in SKIPPED.items():
        reason = net[name].skip
        if word or reason is not None:
            assert word in reason
            assert len(reason.split()) >= 3
    free = {layer.name for layer in net.layers if layer.skip is None}
    assert {"stem", "block.conv1", "block.conv2", "one", "three", "grouped", "mix", "classes"} <= free
    assert any("lstm" in note for note in net.uncounted)
    table = str(net)
    assert all(name in table for name in SKIPPED)


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
@pytest.mark.parametrize("budget", BUDGETS, ids=["macs", "params", "all"])
def test_nothing_breaks_at_a_budget(everything, result, budget, data):
    model, example, _ = everything
    with untouched(model):
        result = result if data and budget is BUDGETS[0] else compressed(everything, budget, data)
        net = taut.trace(model, example)
    limits = budget.limits(net.cost)
    assert all(getattr(result.comparison.after, key) <= limit for key, limit in limits.items())
    assert all(getattr(result.plan.after, key) == getattr(result.comparison.after, key) for key in limits)
    assert result.plan.steps
    assert all(step.after.lowers(step.before) or step.method in PLAIN_FORMS.values() for step in result.plan.steps)
    alone = {la.name for la in net.layers if la.skip is not None and la.skip not in {*PLAIN_FORMS, *STILL_NARROWED}}
    freed = {f"{layer.name}." for layer in net.layers if layer.skip in PLAIN_FORMS}  # what is inside is a layer then
    changed = {name for step in result.plan.steps for name in step.layers}
    assert not {name for name in changed & alone if not name.startswith(tuple(freed))}
    told = {name for step in result.plan.steps for name in step.layers} | {kept.layer for kept in result.plan.kept}
    assert {layer.name for layer in net.layers if layer.macs} <= told
    assert all(len(kept.reason.split()) >= 3 for kept in result.plan.kept)
    before, after = run(model, example), run(result.model, example)
    assert [(t.shape, t.dtype) for t in before] == [(t.shape, t.dtype) for t in after]
    assert all(bool(t.isfinite().all()) for t in after)
    assert set(result.model.eval()(**example)) == {"classes", "next"}


def test_ties_and_weight_norm_survive(everything, result):
    small = result.model
    assert small.out.weight is small.embed.weight
    assert sum(1 for name in small.state_dict() if name in {"out.weight", "embed.weight"}) == 2
    assert nn.utils.parametrize.is_parametrized(small.normed, "weight")
    assert small.out.weight.data_ptr() != everything[0].out.weight.data_ptr()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_changes_nothing(everything, result, mode):
    with mode():
        with untouched(everything[0]):
            found = compressed(everything, compare=False)
        assert same_bits(result.model, found.model)
        assert found.plan == result.plan
    small = found.model
    assert not any(t.is_inference() for t in (*small.parameters(), *small.buffers()))
    small.zero_grad()
    sum(t.float().sum() for t in tensors(small.train()(**everything[1]))).backward()
    assert small.mix[0].weight.grad is not None if isinstance(small.mix, nn.Sequential) else True


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_verbs_one_by_one_in_the_callers_mode(everything, mode):
    model, example, batches = everything
    with mode(), untouched(model):
        net = taut.trace(model, example)
        stats = taut.observe(net, model, batches)
        plan = taut.plan(net, stats, BUDGETS[0])
        small = taut.apply(model, plan, stats, data=batches)
        comparison = taut.compare(model, small, None, example)
    assert comparison.after.macs <= 0.8 * comparison.before.macs
    assert not any(t.is_inference() for t in (*small.parameters(), *small.buffers()))


def test_inputs_made_in_inference_mode(everything):
    model = everything[0]
    with torch.inference_mode():
        example, batches = case("everything").inputs(), case("everything").data()
    result = taut.compress(model, example, budget=BUDGETS[0], data=batches, compare=False)
    assert result.plan.steps


def test_a_model_made_in_inference_mode():
    """Its parameters are inference tensors, which autograd refuses."""
    with torch.inference_mode():
        model, example = case("vgg").make()
    with untouched(model):
        result = taut.compress(model, example, budget=Budget(macs=0.5), data=case("vgg").data())
    assert all(bool(t.isfinite().all()) for t in run(result.model, example))


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_budget_of_one_is_a_bit_equal_copy(name):
    model, example = case(name).make()
    with untouched(model):
        result = taut.compress(model, example, budget=Budget(params=1.0, macs=1.0, bytes=1.0))
    assert result.plan.steps == ()
    assert result.model is not model
    assert same_bits(model, result.model)
    for a, b in zip(run(model, example), run(result.model, example), strict=True):
        assert torch.equal(a, b)
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert mine.isdisjoint(
        t.untyped_storage().data_ptr() for t in (*result.model.parameters(), *result.model.buffers())
    )
    assert [(n, m.training) for n, m in model.named_modules()] == [
        (n, m.training) for n, m in result.model.named_modules()
    ]


@pytest.mark.parametrize("name", [one.name for one in NETS])
def test_every_net_is_compressed_or_refused_in_words(name):
    """At a fraction of the parameters: a result within it, or a BudgetError with the best there is."""
    model, example = case(name).make()
    with untouched(model):
        try:
            result = taut.compress(model, example, budget=Budget(params=0.8), data=case(name).data())
            assert result.comparison.after.params <= 0.8 * result.comparison.before.params
        except BudgetError as error:
            result = error.best
    assert result.comparison.after.params <= result.comparison.before.params
    assert result.comparison.after.macs <= result.comparison.before.macs
    before, after = run(model, example), run(result.model, example)
    assert [(t.shape, t.dtype) for t in before] == [(t.shape, t.dtype) for t in after]
    assert all(bool(t.isfinite().all()) for t in after)


def test_what_was_saved_loads_to_the_same_outputs(everything, result, tmp_path):
    result.save(tmp_path / "small")
    loaded = taut.load(tmp_path / "small", base=lambda: case("everything").make()[0])
    assert same_bits(result.model, loaded)
    assert loaded.out.weight is loaded.embed.weight
    for a, b in zip(run(result.model, everything[1]), run(loaded, everything[1]), strict=True):
        assert torch.equal(a, b)


def test_the_result_is_a_module_like_any_other(everything, result):
    """It copies, trains and compresses again."""
    _, example, batches = everything
    small = copy.deepcopy(result.model)
    assert same_bits(result.model, small)
    around = small.train()(**example)
    sum(t.sum() for t in around.values()).backward()
    idle = {name for name, p in small.named_parameters() if p.requires_grad and p.grad is None}
    assert {name.partition(".")[0] for name in idle} == {"spare"}
    small.zero_grad()
    again = taut.compress(small.eval(), example, budget=Budget(params=0.95), data=batches)
    assert again.comparison.after.params <= 0.95 * again.comparison.before.params


def test_default_dtype_of_the_caller_does_not_leak():
    model, example = case("vgg").make()
    torch.set_default_dtype(torch.float64)
    try:
        around = surroundings()
        result = taut.compress(model, example, budget=Budget(macs=0.5), data=case("vgg").data())
        assert surroundings() == around
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in run(result.model, example))


def test_evaluate_sees_eval_mode_and_flags_return(everything):
    model, example, batches = everything
    model = copy.deepcopy(model).train()
    model.block.eval()
    seen = []

    def evaluate(net):
        seen.append(any(module.training for module in net.modules()))
        return 1.0

    with untouched(model):
        result = taut.compress(model, example, budget=BUDGETS[0], data=batches, evaluate=evaluate)
    assert seen
    assert not any(seen)
    assert result.model.training
    assert result.model.mix.training
    assert not any(module.training for module in result.model.block.modules())
