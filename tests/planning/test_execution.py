"""Steps carried out in place: tried all at once, and one by one where what comes of them departs."""

import pytest
import torch
from torch import nn

import taut
from cases import sequential, untouched
from taut import Plan, Step
from taut.planning import execution
from taut.planning.application import apply_plan


def chain(count):
    torch.manual_seed(0)
    model = sequential(**{f"l{number}": nn.Linear(16, 16) for number in range(count)})
    x = torch.randn(64, 16)
    net = taut.trace(model, x[:2])
    plan = Plan.of(net, [Step((layer.name,), "svd", {"rank": 3}) for layer in net.layers])
    return model, plan, taut.observe(net, model, x), x


def counting(monkeypatch):
    trials = []
    departs = execution.departs
    monkeypatch.setattr(execution, "departs", lambda *args: trials.append(args[1]) or departs(*args))
    return trials


@pytest.mark.parametrize("refit", [False, True], ids=["bare", "refit"])
def test_any_number_of_steps_is_tried_once(monkeypatch, refit):
    for count in (2, 7):
        model, plan, stats, x = chain(count)
        with monkeypatch.context() as patch:
            trials = counting(patch)
            _, done = apply_plan(model, plan, stats, x if refit else None)
        assert len(done.steps) == count
        assert trials == [None]  # on all inputs


def is_narrow(layer):
    return isinstance(layer, nn.Sequential) and layer[0].out_features < 16


class Together(nn.Module):
    """Breaks when both of its first layers have become two: each alone would do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        if is_narrow(self.a) and is_narrow(self.b):
            raise TypeError("one of us has to stay")
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("refit", [False, True], ids=["bare", "refit"])
def test_where_steps_depart_together_the_one_is_found(recwarn, refit):
    model, x = Together(), torch.randn(64, 16)
    net = taut.trace(model, x[:2])
    plan = Plan.of(net, [Step((name,), "svd", {"rank": 3}) for name in "abc"])
    with untouched(model):
        small, done = apply_plan(model, plan, taut.observe(net, model, x), x if refit else None)
    assert [step.layers for step in done.steps] == [("a",), ("c",)]
    assert [(kept.layer, kept.code) for kept in done.kept] == [("b", "rolled back")]
    assert torch.equal(small.b.weight, model.b.weight) or refit
    assert len([w for w in recwarn if "'b' is left as it was" in str(w.message)]) == 1


def test_a_model_that_a_later_step_cannot_look_into_is_carried_out_one_by_one():
    """The method of channels runs what an earlier step left: there it meets a model that runs no more."""

    class Stern(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

        def forward(self, x):
            if is_narrow(self.c):
                raise TypeError("c must be one layer")
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    model, x = Stern(), torch.randn(64, 16)
    net = taut.trace(model, x[:2])
    narrow = Step(("a", "b", "c"), "channels", {"macs": 0.5})
    plan = Plan.of(net, [Step(("c",), "svd", {"rank": 1}), narrow])
    with pytest.warns(UserWarning, match="'c' is left as it was: rolled back"):
        small, done = apply_plan(model, plan, taut.observe(net, model, x))
    assert [step.method for step in done.steps] == ["channels"]
    assert small(x).shape == (64, 16)


def test_an_exact_step_is_tried_for_itself(monkeypatch):
    model = sequential(conv=nn.Conv1d(2, 3, 9, padding=4), pool=nn.AdaptiveAvgPool1d(2), flat=nn.Flatten())
    x = torch.randn(8, 2, 3)
    net = taut.trace(model, x[:2])
    trials = counting(monkeypatch)
    plan = Plan.of(net, [Step(("conv",), "dead_taps", {"ranges": [2, 7]})])
    _, done = apply_plan(model, plan, taut.observe(net, model, x))
    assert len(done.steps) == 1
    assert trials == [execution.QUICK]


def test_an_exact_step_behind_a_broken_one_is_not_blamed():
    """Tried on a model that an earlier step broke, and a later one mends, it would be rolled back for nothing."""

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.conv, self.pool = nn.Conv1d(2, 3, 9, padding=4), nn.AdaptiveAvgPool1d(2)

        def forward(self, x):
            if is_narrow(self.a) and not is_narrow(self.b):
                raise TypeError("both or none")
            return self.b(self.a(x)), self.pool(self.conv(x[:, :6].reshape(-1, 2, 3)))

    model, x = Together(), torch.randn(8, 16)
    net = taut.trace(model, x[:2])
    low = {"rank": 3}
    steps = [Step(("a",), "svd", low), Step(("conv",), "dead_taps", {"ranges": [2, 7]}), Step(("b",), "svd", low)]
    with pytest.warns(UserWarning, match="'a' is left as it was") as told:
        _, done = apply_plan(model, Plan.of(net, steps), taut.observe(net, model, x))
    assert [step.layers for step in done.steps] == [("conv",), ("b",)]
    assert [kept.layer for kept in done.kept if kept.code == "rolled back"] == ["a"]
    assert not [w for w in told if "'conv'" in str(w.message)]
