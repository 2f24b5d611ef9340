"""Budgets that cannot be met: limits held first, else the nearest network that still works; and what is said."""

import re

import pytest
import torch
from torch import nn

import taut
from taut import Budget, BudgetError
from taut.search import nearest
from taut.search.nearest import STEP, WORKS, WORTH, find_nearest
from taut.search.session import Session


class Gated(nn.LSTM):
    """A recurrent layer of its own kind: what it computes, nobody knows."""

    def forward(self, input, hx=None):  # noqa: A002 - torch's name
        return super().forward(input, hx)


class Blocked(nn.Module):
    """A recurrent layer that no method touches, and linear layers that some do."""

    def __init__(self):
        super().__init__()
        self.rnn, self.a, self.b = Gated(12, 48, batch_first=True), nn.Linear(48, 32), nn.Linear(32, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(self.rnn(x)[0][:, -1])))


def unmet(model, x, budget, **settings):
    with pytest.raises(BudgetError) as caught:
        taut.compress(model, x[:4], budget=budget, data=[x], **settings)
    return caught.value


def agreement(model, small, x):
    with torch.no_grad():
        return float((model(x).argmax(1) == small(x).argmax(1)).double().mean())


@pytest.fixture(scope="module")
def blocked():
    torch.manual_seed(0)
    model = Blocked().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.6 if parameter.ndim > 1 else 0)  # answers that differ from input to input
    return model, torch.randn(256, 7, 12)


def test_the_smallest_network_is_not_taken_where_it_does_not_work(blocked):
    model, x = blocked
    error = unmet(model, x, Budget(params=0.05), methods=["svd"])
    chosen = agreement(model, error.best.model, x)
    assert chosen > 0.8
    small = taut.apply(model, smallest(model, x), taut.observe(taut.trace(model, x[:4]), model, x), data=x)
    assert agreement(model, small, x) < chosen - 0.2


def smallest(model, x):
    net = taut.trace(model, x[:4])
    return taut.types.Plan.of(net, [taut.types.Step((name,), "svd", {"rank": 1}) for name in ("a", "b")])


def test_one_step_up_the_front_wins_little(blocked):
    model, x = blocked
    session = Session.open(model, x[:4], [x], ["svd"])
    limits = {"params": 0.05 * session.network.cost.params}
    chosen = find_nearest(session, limits)
    cost = session.cost(chosen.model).params
    larger = session.best_within({"params": cost + STEP * session.network.cost.params})
    assert chosen.agreement >= WORKS
    assert session.judge.agreement(larger[0]) - chosen.agreement <= WORTH


def test_limits_that_can_be_held_are_held(blocked):
    model, x = blocked
    net = taut.trace(model, x[:4])
    best = unmet(model, x, Budget(params=0.05, macs=0.999), methods=["svd"]).best
    assert best.comparison.after.macs <= 0.999 * net.cost.macs


def test_the_message_says_what_was_reached_how_and_what_blocks(blocked, monkeypatch):
    model, x = blocked
    monkeypatch.setattr(taut.recovery.judging.Judge, "agreement", lambda *_: 0.985)
    error = unmet(model, x, Budget(params=0.05), methods=["svd"])
    after = error.best.comparison.after
    text = str(error)
    assert f"reaches params {taut.core.text.count(after.params)} of" in text
    assert "by svd" in text
    assert "98.5% of the original's answers" in text
    assert "Gated with 87% of the parameters ('rnn': Gated overrides forward: it may compute something else)" in text


def test_reasons_are_true_where_the_budget_is_not_met(blocked):
    model, x = blocked
    plan = unmet(model, x, Budget(params=0.05), methods=["svd"]).best.plan
    assert not [kept for kept in plan.kept if "met without it" in kept.reason]


def test_where_nothing_works_the_network_stays_as_it_is(blocked, monkeypatch):
    model, x = blocked
    monkeypatch.setattr(taut.recovery.judging.Judge, "agreement", lambda *_: 0.1)
    error = unmet(model, x, Budget(params=0.05), methods=["svd"])
    assert not error.best.plan.steps
    assert torch.equal(error.best.model(x), model(x))
    assert "the closest is the original" in str(error)
    assert {kept.reason for kept in error.best.plan.kept if kept.layer in "ab"} == {
        "no network near the budget works with it changed"
    }


def test_more_methods_never_make_it_worse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    x = torch.randn(64, 3, 8, 8)
    limits = Budget(macs=0.004)
    found = {}
    for methods in (("svd",), ("channels",), ("channels", "svd")):
        best = unmet(model.eval(), x, limits, methods=methods).best
        found[methods] = (best.comparison.after.macs / best.comparison.before.macs, agreement(model, best.model, x))
    both = found["channels", "svd"]
    for methods in (("svd",), ("channels",)):
        cost, agreed = found[methods]
        assert both[0] <= cost + STEP or both[1] >= agreed - WORTH


def test_a_plan_that_was_rolled_back_is_met_by_other_layers():
    class Deep(nn.Module):
        """Code that looks into what replaced its first layer, deeper than tracing sees."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            if isinstance(self.a, nn.Sequential) and self.a[0].out_features < 64:
                raise TypeError("no")
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    model, x = Deep().eval(), torch.randn(256, 64)
    with torch.no_grad():
        model.a.weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64))  # the first choice of any planner
    with pytest.warns(UserWarning, match="'a' is left as it was: rolled back"):
        result = taut.compress(model, x[:4], budget=Budget(params=0.6), data=[x], methods=["svd"])
    assert result.comparison.after.params <= 0.6 * result.comparison.before.params
    assert next(kept.reason for kept in result.plan.kept if kept.layer == "a").startswith("rolled back")


def test_shares_whose_plan_does_not_hold_the_limits_are_not_chosen():
    """Low rank is rolled back everywhere, and then diverges by nothing: channels alone meet the budget."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

        def forward(self, x):
            for layer in (self.a, self.b, self.c):
                if isinstance(layer, nn.Sequential) and layer[0].out_features < min(
                    layer[0].in_features, layer[1].out_features
                ):
                    raise TypeError("no")
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model, x = Picky().eval(), torch.randn(256, 32)
    model.b.weight.data = torch.randn(64, 4) @ torch.randn(4, 64) / 16  # ranks are what promises most
    with pytest.warns(UserWarning, match="rolled back"):
        result = taut.compress(model, x[:4], budget=Budget(macs=0.5), data=[x], methods=["channels", "svd"])
    assert result.comparison.after.macs <= 0.5 * result.comparison.before.macs
    assert [step.method for step in result.plan.steps] == ["channels"]


def test_the_walk_ends_at_the_whole_network(blocked):
    model, x = blocked
    session = Session.open(model, x[:4], [x], ["svd"])
    tried = []

    def ways(aims):
        tried.append(aims["params"])
        return iter(())

    object.__setattr__(session, "alternatives", ways)
    chosen = nearest.find_nearest(session, {"params": 10.0})
    assert not chosen.plan.steps
    assert tried == sorted(tried)
    assert tried[-1] < session.network.cost.params


@pytest.mark.parametrize(
    ("methods", "key"),
    [
        *((("svd",), key) for key in ("params", "macs", "bytes")),
        *((("channels",), key) for key in ("params", "macs", "bytes")),
        (("channels", "svd"), "params"),
    ],
)
def test_the_least_that_is_named_is_the_least_that_the_methods_reach(methods, key):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)).eval(), torch.randn(64, 8)
    error = unmet(model, x, Budget(**{key: 5}), methods=methods, compare=False)
    narrow = {"params": 8 + 1 + 6 + 6, "macs": 8 + 6}  # one channel
    thin = {"params": 8 + 16 + 16 + 16 + 6 + 6, "macs": 8 + 16 + 16 + 6}  # rank 1
    least = (thin if methods == ("svd",) else narrow).get(key)
    said = re.search(rf"At the least these methods leave {key} ([\d.]+k?) of", str(error)).group(1)
    assert said == str(least) or key == "bytes"
    amount = float(said.removesuffix("k")) * (1000 if said.endswith("k") else 1)
    assert amount <= getattr(error.best.plan.after, key) * 1.01
    assert "most of it in '2' (" in str(error) or "most of it in '0' (" in str(error)


def test_what_an_exact_step_freed_is_not_said_to_block():
    normed = nn.utils.parametrizations.weight_norm
    model, x = nn.Sequential(normed(nn.Linear(8, 16)), nn.ReLU(), normed(nn.Linear(16, 6))).eval(), torch.randn(64, 8)
    text = str(unmet(model, x, Budget(params=5), methods=["svd"], keep={"2": 0.9}, compare=False))
    assert "90% of it stays, as asked" in text
    assert "parametrization" not in text
