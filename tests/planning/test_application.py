"""`apply`: steps carried out, rolled back or refused, and the plan that says so."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from cases import case, run, sequential, untouched
from taut import CallError, Plan, Step
from taut.methods.as_linear import AsLinear
from taut.planning import execution
from taut.planning.application import apply_plan
from taut.structure.outputs import Outputs


def observed(name):
    model, example = case(name).make()
    net = taut.trace(model, example)
    return model, example, net, taut.observe(net, model, case(name).data())


def test_steps_are_done_in_order_and_the_rest_is_a_deep_copy():
    model, example, net, stats = observed("mlp")
    plan = Plan.of(net, [Step(("fc2",), "svd", {"rank": 4}), Step(("fc1",), "svd", {"rank": 3})])
    with untouched(model):
        small, done = apply_plan(model, plan, stats)
    assert isinstance(small.fc1, nn.Sequential)
    assert small.fc2[0].weight.shape == (4, 48)
    assert torch.equal(small.fc3.weight, model.fc3.weight)
    assert small.fc3.weight is not model.fc3.weight
    assert [s.layers for s in done.steps] == [("fc2",), ("fc1",)]
    for step in done.steps:
        assert step.before == net.group(step.layers).cost
        assert step.after.params == sum(p.numel() for p in small.get_submodule(step.layers[0]).parameters())
        assert step.settings["metric"] == "data"
    assert [t.shape for t in run(small, example)] == [t.shape for t in run(model, example)]


def test_the_done_plan_replays_to_the_same_bits():
    model, _, net, stats = observed("vgg")
    small, done = apply_plan(model, taut.plan(net, stats, taut.Budget(macs=0.4)), stats)
    again = taut.apply(model, Plan.from_json(done.to_json()), stats)
    assert done.steps
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))


def test_an_empty_plan_is_a_bit_equal_copy():
    model, example, _, stats = observed("resnet")
    for data in (None, case("resnet").data()):
        small = taut.apply(model, Plan(()), stats, data=data)
        assert small is not model
        assert all(torch.equal(a, b) for a, b in zip(run(small, example), run(model, example), strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_factors_are_those_of_the_plan():
    """Applying computes nothing again: the decomposition is the planner's."""
    model, _, net, stats = observed("mlp")
    plan = taut.plan(net, stats, taut.Budget(params=0.5))
    cached = dict(stats._cache)
    taut.apply(model, plan, stats)
    assert set(stats._cache) == set(cached)
    assert all(stats._cache[key] is value for key, value in cached.items())


class Picky(nn.Module):
    """Code that looks into what stands in the place of its layer, deeper than a stand-in shows."""

    def __init__(self):
        super().__init__()
        self.fc, self.free = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        if isinstance(self.fc, nn.Sequential) and self.fc[0].out_features < 16:
            raise TypeError("my layer must not be so narrow")
        return self.free(torch.relu(self.fc(x)))


@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_a_rewrite_that_breaks_the_model_is_rolled_back_with_its_reason(data):
    model, x = Picky(), torch.randn(64, 16)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x)
    plan = Plan.of(net, [Step(("fc",), "svd", {"rank": 3}), Step(("free",), "svd", {"rank": 3})])
    with untouched(model):
        small, done = apply_plan(model, plan, stats, x if data else None)
    assert [s.layers for s in done.steps] == [("free",)]
    assert done.kept[-1].layer == "fc"
    assert done.kept[-1].reason.startswith("rolled back: ")
    assert "my layer must not be so narrow" in done.kept[-1].reason
    assert type(small.fc) is nn.Linear
    assert small.fc.weight.data_ptr() != model.fc.weight.data_ptr()
    if not data:
        assert torch.equal(small.fc.weight, model.fc.weight)


def test_a_cut_that_is_not_exact_on_this_model_is_rolled_back():
    """Taps that are alive, cut by hand: the output moves, so the step is undone."""
    model, x = sequential(conv=nn.Conv1d(2, 3, 9, padding=4), pool=nn.AdaptiveAvgPool1d(2)), torch.randn(8, 2, 3)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x)
    assert net["conv"].live == ((2, 7),)
    small, done = apply_plan(model, Plan.of(net, [Step(("conv",), "dead_taps", {"ranges": [3, 6]})]), stats)
    assert done.steps == ()
    assert "changed although the method is exact" in done.kept[-1].reason
    assert torch.equal(small(x), model(x))
    _, done = apply_plan(model, Plan.of(net, [Step(("conv",), "dead_taps", {"ranges": [2, 7]})]), stats)
    assert len(done.steps) == 1


def test_two_steps_on_one_layer():
    """Dead taps first, then Tucker on what is left, addressed by the original name."""
    model, x = sequential(conv=nn.Conv1d(8, 8, 64, padding=32)), torch.randn(64, 8, 4)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x)
    cut = Step(("conv",), "dead_taps", {"ranges": [28, 36]})
    once = taut.apply(model, Plan.of(net, [cut]), stats)
    inner = taut.trace(sequential(conv=once.conv), x[:2])["conv"] if isinstance(once.conv, nn.Conv1d) else None
    if inner is None:
        (inner,) = [layer for layer in taut.trace(once, x[:2]).layers if layer.kind == "Conv1d"]
        inner = replace(inner, name="conv")
    second = Step(("conv",), "tucker", {"rank_in": 8, "rank_out": 8}, taut.types.Group((inner,)), allow_growth=True)
    small = taut.apply(model, Plan((*Plan.of(net, [cut]).steps, second)), stats)
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(m, nn.Conv1d) for m in small.modules()) == 3


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(("nowhere",), "svd", {"rank": 1}), "does not have: 'nowhere'"),
        (Step(("fc1",), "magic"), "Unknown method 'magic'"),
        (Step(("fc1",), "svd", {"size": 1}), "Unknown setting 'size' of method 'svd'"),
        (Step(("fc1",), "svd", {"rank": 24}), "would not shrink layer 'fc1'"),
        (Step(("fc1",), "spatial", {"rank": 2}), "spatial does not apply to layer 'fc1'"),
        (Step(("fc1", "fc2"), "svd", {"rank": 2}), "one layer at a time"),
        (Step(("fc1",), "svd", {"rank": 2, "metric": "x"}), "'metric' of svd must be one of"),
    ],
)
def test_wrong_steps_are_refused_before_anything_is_touched(step, message):
    model, _, _, stats = observed("mlp")
    with untouched(model), pytest.raises(CallError, match=message):
        taut.apply(model, Plan((Step(("fc2",), "svd", {"rank": 2}), step)), stats)


def test_growth_is_done_on_request():
    model, _, net, stats = observed("mlp")
    step = Step(("fc1",), "svd", {"rank": 24}, allow_growth=True)
    small, done = apply_plan(model, Plan.of(net, [step]), stats)
    assert done.steps[0].after.params > done.steps[0].before.params
    x = torch.randn(5, 24)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_plan_without_groups_finds_them_in_the_network():
    model, _, net, stats = observed("mlp")
    step = Step(("fc1",), "svd", {"rank": 3})
    one, two = taut.apply(model, Plan((step,)), stats), taut.apply(model, Plan.of(net, [step]), stats)
    assert torch.equal(one.fc1[0].weight, two.fc1[0].weight)


def test_statistics_of_a_copy_serve_as_well():
    """The weights decide, not the identity of the object."""
    model, _, net, stats = observed("mlp")
    plan = Plan.of(net, [Step(("fc1",), "svd", {"rank": 3})])
    one, two = taut.apply(model, plan, stats), taut.apply(copy.deepcopy(model), plan, stats)
    assert torch.equal(one.fc1[0].weight, two.fc1[0].weight)


def test_the_result_survives_a_deep_copy_and_a_state_dict():
    model, example, net, stats = observed("vgg")
    small = taut.apply(model, taut.plan(net, stats, taut.Budget(macs=0.4)), stats, data=case("vgg").data())
    other = copy.deepcopy(small)
    other.load_state_dict(small.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(run(small, example), run(other, example), strict=True))


def test_the_result_trains():
    model, _, net, stats = observed("mlp")
    small = taut.apply(model, taut.plan(net, stats, taut.Budget(params=0.4)), stats, data=case("mlp").data())
    x, y = torch.randn(64, 24), torch.randint(0, 5, (64,))
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in small.parameters())


class Doubling(nn.Linear):
    """Gives twice what its weight gives; among others, the next time that it is asked, something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def plain_forms(monkeypatch, wrong, count=5):
    """A network of such layers, what becomes of them, and how often it was run; `wrong` get a wrong plain form."""
    model, x = nn.Sequential(*(Doubling(6, 6) for _ in range(count))).eval(), torch.randn(4, 6)
    net = taut.trace(model, x)
    rewrite, runs = AsLinear.rewrite, []

    def rewritten(self, modules, factors):
        made = rewrite(self, modules, factors)
        for name in modules.keys() & wrong:
            made.modules[name].weight.data.mul_(3)
        return made

    monkeypatch.setattr(AsLinear, "rewrite", rewritten)
    monkeypatch.setattr(Outputs, "run", lambda *a, run=Outputs.run, **k: runs.append(1) or run(*a, **k))
    steps = [Step((layer.name,), "as_linear") for layer in net.layers]
    small, done = apply_plan(model, Plan.of(net, steps), taut.observe(net, model))
    torch.testing.assert_close(small(x), model(x))
    return small, done, len(runs)


def test_plain_forms_are_tried_all_at_once(monkeypatch):
    torch.manual_seed(0)
    small, done, few = plain_forms(monkeypatch, set())
    assert all(type(layer) is nn.Linear for layer in small)
    assert len(done.steps) == len(small)
    assert plain_forms(monkeypatch, set(), count=7)[2] == few


def test_a_wrong_plain_form_alone_is_rolled_back(monkeypatch):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="'3' is left as it was"):
        small, done, _ = plain_forms(monkeypatch, {"3"})
    assert [type(layer) is nn.Linear for layer in small] == [True, True, True, False, True]
    assert [kept.layer for kept in done.kept if "changed although the method is exact" in kept.reason] == ["3"]
    assert small[3].weight.shape == (6, 6)


def test_steps_behind_a_plain_form_that_was_rolled_back_have_its_reason(monkeypatch):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.f = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x):
            return self.f(self.a(x, x, x)[0])

    def departs(outputs, most, small, before=None):
        return "it broke" if before is not None else None

    model, x = Attending().eval(), torch.randn(2, 3, 8)
    net, svd = taut.trace(model, x), {"rank": 2}
    steps = [taut.Step(("a",), "as_attention"), *(taut.Step((name,), "svd", svd) for name in ("a.q_proj", "f"))]
    monkeypatch.setattr(execution, "departs", departs)
    with pytest.warns(UserWarning, match="'a' is left as it was: rolled back: it broke"):
        small, done = apply_plan(model, taut.Plan.of(net, steps), taut.observe(net, model))
    assert [step.layers for step in done.steps] == [("f",)]
    reasons = {kept.layer: kept.reason for kept in done.kept}
    assert reasons == {"a": "rolled back: it broke", "a.q_proj": "'a' has no plain form: rolled back: it broke"}
    assert type(small.a) is nn.MultiheadAttention
