"""Masks: held through optimizers, copies and files, baked into plain layers; pruning in schedules."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import taut
from cases import sequential
from taut import CallError, Plan, Stage, Step
from taut.nn import Mask, bake, fill_plain, hold_zeros, masked, plain_state

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
}


def made(seed=0):
    torch.manual_seed(seed)
    return sequential(a=nn.Linear(12, 20), r=nn.ReLU(), b=nn.Linear(20, 16), s=nn.ReLU(), c=nn.Linear(16, 4))


def sparse():
    net = made()
    for module in (net.a, net.b):
        module.weight.data *= torch.rand_like(module.weight) > 0.6
    return net


def zeros(net):
    return {name: (p == 0) for name, p in net.named_parameters() if p.ndim == 2}


def batches(count=6):
    torch.manual_seed(3)
    x = torch.randn(count * 32, 12)
    return list(zip(x.split(32), x[:, :4].argmax(1).split(32), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_survive_the_optimizer(optimizer):
    net = sparse()
    before = zeros(net)
    hold_zeros(net)
    assert list(masked(net)) == ["a", "b"]
    made_of = OPTIMIZERS[optimizer](net.parameters())
    for _ in range(5):
        net(torch.randn(8, 12)).square().sum().backward()
        made_of.step()
    bake(net)
    assert not masked(net)
    after = zeros(net)
    assert all(torch.equal(before[name], after[name]) for name in ("a.weight", "b.weight"))
    assert all(type(module).__module__.startswith("torch.nn") for module in net)
    assert not torch.equal(net.c.weight, made().c.weight)


def test_what_the_optimizer_did_before_the_mask_does_not_come_back():
    net = made()
    momentum = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(8, 12)).square().sum().backward()
    momentum.step()
    net.a.weight.data[:, :6] = 0
    hold_zeros(net)
    net(torch.randn(8, 12)).square().sum().backward()
    momentum.step()
    assert bool((bake(net).a.weight[:, :6] == 0).all())


def test_a_masked_net_is_copied_and_stored_and_exported_baked(tmp_path):
    net, x = hold_zeros(sparse()), torch.randn(4, 12)
    wanted = net(x)
    assert torch.equal(copy.deepcopy(net)(x), wanted)
    other = hold_zeros(sparse())
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), wanted)
    assert torch.equal(bake(copy.deepcopy(net))(x), wanted)
    path = tmp_path / "net.onnx"
    taut.export(bake(net), x, path)
    assert path.stat().st_size < 2 * 4 * sum(p.numel() for p in net.parameters()) + 8000


def test_plain_state_is_that_of_the_baked_net_and_loads_into_a_masked_one():
    net = hold_zeros(sparse())
    state = plain_state(net)
    other = hold_zeros(sparse())
    for parameter in other.parameters():
        parameter.data.mul_(2)
    fill_plain(other, state)
    plain = bake(net).state_dict()
    assert set(state) == set(plain)
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert all(torch.equal(a, b) for a, b in zip(bake(other).parameters(), net.parameters(), strict=True))


def test_only_the_named_layers_and_none_without_zeros():
    assert list(masked(hold_zeros(sparse(), ["b", "c"]))) == ["b"]
    assert not masked(hold_zeros(made()))


def test_a_parametrization_of_the_users_stays():
    net = sequential(a=torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), b=nn.Linear(6, 3))
    net.b.weight.data[0] = 0
    hold_zeros(net)
    assert list(masked(net)) == ["b"]
    state = plain_state(net)
    assert "a.parametrizations.weight.original0" in state
    bake(net)
    assert torch.nn.utils.parametrize.is_parametrized(net.a)


def test_a_mask_says_zero_even_where_the_weight_is_not_finite():
    mask = Mask(torch.tensor([True, False]))
    assert mask(torch.tensor([1.0, float("nan")])).tolist() == [1.0, 0.0]


# Schedules.


def ramped(method="mfbp", times=4, sparsity=0.9, **more):
    net = made()
    x = batches(1)[0][0]
    network = taut.trace(net, x)
    step = taut.whole(network, method, sparsity=sparsity, **more)
    return net, Plan.of(network, taut.ramp(step, times)), taut.observe(network, net, [x])


def tuned(net, plan, stats, **more):
    more = {"schedule": taut.alternate(plan, epochs=2), "loss": nn.functional.cross_entropy} | more
    return taut.finetune(net, plan, stats, batches(), batches(2), **more)


@pytest.mark.parametrize(("method", "more"), [("mfbp", {}), ("magnitude", {"score": "wanda"})])
def test_a_ramp_ends_at_the_wanted_sparsity_and_learns(method, more):
    net, plan, stats = ramped(method, **more)
    small = tuned(net, plan, stats)
    assert sum(int(z.sum()) for z in zeros(small).values()) == round(0.9 * 624)
    assert not masked(small)
    assert not torch.equal(small.b.bias, net.b.bias)


def test_pruned_stays_pruned_from_stage_to_stage():
    net, plan, stats = ramped(times=3)
    whole = tuned(net, plan, stats)
    first = tuned(net, Plan(plan.steps[:1]), stats, schedule=(Stage((0,), epochs=2),))
    for name, gone in zeros(first).items():
        assert bool(zeros(whole)[name][gone].all())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_of_a_stage_keeps_the_zeros(optimizer):
    net, plan, stats = ramped(times=1)
    stage = Stage((0,), epochs=3, optimizer=optimizer, weight_decay=0.1, rate=0.01)
    small = tuned(net, plan, stats, schedule=(stage,))
    assert sum(int(z.sum()) for z in zeros(small).values()) == round(0.9 * 624)


def test_a_ramp_that_was_interrupted_goes_on_as_if_it_had_not(tmp_path):
    net, plan, stats = ramped(times=3)
    wanted = tuned(net, plan, stats)

    class StopError(Exception):
        pass

    seen = 0

    def stopping(inputs, targets):
        nonlocal seen
        seen += 1
        if seen == 23:
            raise StopError
        return nn.functional.cross_entropy(inputs, targets)

    stopping.__qualname__ = "loss"

    def whole(inputs, targets):
        return nn.functional.cross_entropy(inputs, targets)

    whole.__qualname__ = "loss"
    with pytest.raises(taut.DataError) as raised:
        tuned(net, plan, stats, loss=stopping, folder=tmp_path / "run")
    assert isinstance(raised.value.__cause__, StopError)
    found = tuned(net, plan, stats, loss=whole, folder=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


def test_frozen_layers_are_pruned_but_not_trained():
    net, plan, stats = ramped(times=1)
    stages = (Stage((0,), train="none", epochs=2),)
    small = tuned(net, plan, stats, schedule=stages)
    kept = small.b.weight != 0
    assert torch.equal(small.b.weight[kept], net.b.weight[kept])


def test_a_ramp_is_cubic_and_ends_exactly():
    steps = taut.ramp(Step(("a",), "mfbp", {"sparsity": 0.8, "rank": 3}), 4)
    found = [step.settings["sparsity"] for step in steps]
    assert found == pytest.approx([0.8 * (1 - 0.75**3), 0.8 * 0.875, 0.8 * (1 - 0.25**3), 0.8])
    assert found[-1] == 0.8
    assert all(step.settings["rank"] == 3 for step in steps)
    assert [s.settings["sparsity"] for s in taut.ramp(steps[-1], 1)] == [0.8]


def test_a_ramp_needs_a_sparsity_and_steps():
    with pytest.raises(CallError, match="sparsity"):
        taut.ramp(Step(("a",), "svd", {"rank": 3}))
    with pytest.raises(CallError, match="times"):
        taut.ramp(Step(("a",), "mfbp", {"sparsity": 0.8}), 0)


def test_alternating_is_one_stage_per_step():
    _, plan, _ = ramped(times=3)
    stages = taut.alternate(plan, epochs=2, last=7, rate=0.01)
    assert [stage.steps for stage in stages] == [(0,), (1,), (2,)]
    assert [stage.epochs for stage in stages] == [2, 2, 7]
    assert {stage.rate for stage in stages} == {0.01}
    assert dataclasses.replace(stages[0], epochs=7, steps=(2,)) == stages[2]


def test_what_a_caller_masked_stays_masked_and_is_given_back_baked():
    net, plan, stats = ramped(times=1)
    small = taut.apply(net, plan, stats)
    before = zeros(small)
    settings = {"loss": nn.functional.cross_entropy, "example": batches(1)[0][0], "schedule": (Stage(epochs=2),)}
    trained = taut.finetune(hold_zeros(copy.deepcopy(small)), None, None, batches(), None, **settings)
    assert not masked(trained)
    assert all(torch.equal(before[name], z) for name, z in zeros(trained).items())
    settings["schedule"] = (Stage(epochs=2, hold_zeros=True),)
    trained = taut.finetune(small, None, None, batches(), None, **settings)
    assert all(torch.equal(before[name], z) for name, z in zeros(trained).items())


def test_a_spared_layer_of_zeros_learns():
    net = made()
    net.c.weight.data.zero_()
    network = taut.trace(net, batches(1)[0][0])
    plan = Plan.of(network, [taut.whole(network, "magnitude", sparsity=0.5, spare=[-1])])
    small = tuned(net, plan, taut.observe(network, net), schedule=(Stage((0,), epochs=2, rate=0.01),))
    assert int((small.c.weight == 0).sum()) < 16  # units that are off for all inputs have no gradient
    assert int((small.a.weight == 0).sum()) > 0


def test_what_must_fail_fails_before_anything_is_trained():
    net, plan, stats = ramped(times=2)
    network = stats.network

    def loss(*_):
        raise AssertionError("trained")

    for steps, said in (
        ([*plan.steps, Step(("b",), "svd", {"rank": 99})], "rank"),
        ([Step(("b",), "svd", {"rank": 2}), *plan.steps], "earlier step"),
        ([*plan.steps, Step(("r",), "svd", {"rank": 2})], "r"),
    ):
        bad = Plan.of(network, steps) if said != "r" else Plan(tuple(steps))
        with pytest.raises(CallError, match=said):
            tuned(net, bad, stats, loss=loss, schedule=taut.alternate(bad))
    with pytest.raises(CallError, match="sparsity"):
        taut.ramp(Step(("a",), "magnitude", {"sparsity": 1.0}), 4)


def test_a_masked_model_is_saved_baked_and_its_layers_ask_for_that(tmp_path):
    net, plan, stats = ramped(times=1)
    small, done = taut.planning.application.apply_plan(net, plan, stats)
    x = torch.randn(4, 12)
    held = hold_zeros(copy.deepcopy(small))
    taut.save(held, done, tmp_path / "small")
    assert masked(held)
    assert torch.equal(taut.load(tmp_path / "small", base=made)(x), small(x))
    assert "bake" in (taut.trace(held, x)["a"].skip or "")


def test_names_that_no_module_has_are_refused():
    with pytest.raises(CallError, match="typo"):
        hold_zeros(sparse(), ["a", "typo"])
    assert list(masked(hold_zeros(sparse(), "a"))) == ["a"]


def test_a_hook_that_knows_the_model_does_not_copy_it():
    net = made()

    class Knows:
        copies = 0

        def __init__(self, model):
            self.model = model

        def __call__(self, *_):
            pass

        def __deepcopy__(self, memo):
            Knows.copies += 1
            return self

    net.b.register_forward_hook(Knows(net))
    network = taut.trace(net, torch.randn(2, 12))
    stats = taut.observe(network, net)
    Knows.copies = 0
    small = taut.apply(net, Plan((taut.whole(network, "magnitude", sparsity=0.5),)), stats)
    assert len(small.b._forward_hooks) == 1
    assert Knows.copies <= 5  # the model's copy, and two each to run the original and the result, in both modes
