"""What follows a layer in the original is found for certain or not at all, and says what the layer should aim at."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from taut.recovery import targets
from taut.recovery.batch_norm import moments_of, moved
from taut.recovery.skip_inputs import Others
from taut.recovery.successors import Follows
from taut.recovery.targets import Noted, note_targets
from taut.types import Plan, Step


class Net(nn.Module):
    """Two convolutions and a batch norm; what is done with them is the test's."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()
        self.fast = nn.ReLU(inplace=True)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.made = forward

    def forward(self, x):
        return self.made(self, x)


def in_place_sum(m, x):
    h = m.a(x)
    y = m.b(h)
    y += h
    return torch.relu_(y)


def read_twice(m, x):
    y = m.b(m.a(x))
    return torch.cat([F.relu(y), y], 1)


def sum_read_twice(m, x):
    h = m.a(x)
    s = m.b(h) + h
    return torch.relu(s) + s


def rectified_in_place_then_read_twice(m, x):
    y = m.fast(m.b(m.a(x)))
    return torch.cat([y, y], 1)


def changed_before_the_sum(m, x):
    h = m.a(x)
    y = m.b(h)
    h.mul_(2)
    return y + h


def branch_read_twice(m, x):
    h = m.a(x)
    y = m.b(h)
    return y + h + y.mean()


def written_into_a_buffer(m, x):
    y = m.b(m.a(x))
    buffer = torch.zeros(len(x), 4, *y.shape[2:])
    buffer[:, :4] = y
    return F.relu(y) + buffer


@torch.jit.script
def scripted(y: torch.Tensor) -> torch.Tensor:
    return torch.relu(y) - y


def read_by_script(m, x):
    y = m.b(m.a(x))
    return torch.relu(y) + scripted(y)


def sum_read_by_script(m, x):
    h = m.a(x)
    s = m.b(h) + h
    return torch.relu(s) + scripted(s)


def returned_too(m, x):
    y = m.b(m.a(x))
    return {"head": torch.relu(y), "features": y}


def sum_returned_too(m, x):
    h = m.a(x)
    s = m.b(h) + h
    return torch.relu(s), s


def with_dropout(m, x):
    h = m.a(x)
    return torch.relu(F.dropout(m.b(h), training=False) + h)


def by_keyword(m, x):
    return torch.relu(input=m.b(m.a(x)))


def other_precision(m, x):
    h = m.a(x)
    return m.b(h) + h.double()


SEEN = {  # forward -> (rectified, partner, has a sum) of layer b, None where nothing is certain
    "module": (lambda m, x: m.act(m.b(m.a(x))), (True, None, False)),
    "function": (lambda m, x: F.relu(m.b(m.a(x))), (True, None, False)),
    "method in place": (lambda m, x: m.b(m.a(x)).relu_(), (True, None, False)),
    "in place, then read twice": (rectified_in_place_then_read_twice, (True, None, False)),
    "norm": (lambda m, x: m.fast(m.norm(m.b(m.a(x)))), (True, None, False)),
    "another activation": (lambda m, x: F.gelu(m.b(m.a(x))), None),
    "read twice": (read_twice, None),
    "branch read twice": (branch_read_twice, None),
    "pooled before": (lambda m, x: F.relu(F.max_pool2d(m.b(m.a(x)), 2)), None),
    "constant": (lambda m, x: F.relu(m.b(m.a(x)) + 1), None),
    "sum in place": (in_place_sum, (True, ("out", "a"), True)),
    "sum read twice": (sum_read_twice, (False, ("out", "a"), True)),
    "partner changed in between": (changed_before_the_sum, (False, None, True)),
    "sum behind a norm": (lambda m, x: m.norm(m.b(h := m.a(x))) + h, (False, ("out", "a"), True)),
    "partner of no module": (lambda m, x: torch.relu(torch.sin(h := m.a(x)) + m.b(h)), (True, None, True)),
    "partner that a layer reads": (lambda m, x: m.b(h := torch.tanh(m.a(x))) + h, (False, ("in", "b"), True)),
    "doubled": (lambda m, x: (y := m.b(m.a(x))) + y, None),
    "written into a buffer": (written_into_a_buffer, None),
    "read by script": (read_by_script, None),
    "sum read by script": (sum_read_by_script, (False, ("out", "a"), True)),
    "returned too": (returned_too, None),
    "sum returned too": (sum_returned_too, (False, ("out", "a"), True)),
    "dropout": (with_dropout, (True, ("out", "a"), True)),
    "keyword": (by_keyword, None),
    "other precision": (other_precision, (False, None, True)),
    "norm called twice": (lambda m, x: F.relu(m.norm(m.b(m.norm(m.a(x))))), None),
}


def noted(model, x):
    model = model.eval()
    return note_targets(model, taut.trace(model, x[:2]), ["a", "b"], [x]).layers


@pytest.mark.parametrize("name", SEEN)
def test_what_follows_is_found_for_certain_or_not_at_all(name):
    forward, wanted = SEEN[name]
    model, x = Net(forward), torch.randn(6, 3, 5, 5)
    follows = noted(model, x)["b"].follows
    if wanted is None:
        assert follows is None
        return
    rectified, partner, summed = wanted
    assert (follows.rectified, follows.partner) == (rectified, partner)
    assert summed == (follows.total is not None)


class Activating(nn.BatchNorm2d):
    """A batch norm with its activation inside."""

    def forward(self, x):
        return F.silu(super().forward(x))


@pytest.mark.parametrize("kind", ["subclass", "hook"])
def test_a_norm_that_does_more_than_normalize_is_not_taken_for_one(kind):
    model = Net(lambda m, x: m.norm(m.b(h := m.a(x))) + h)
    if kind == "hook":
        model.norm.register_forward_hook(lambda module, args, output: -output)
    else:
        model.norm = Activating(4)
    assert noted(model, torch.randn(6, 3, 5, 5))["b"].follows is None


def test_a_norm_of_another_axis_is_not_the_layers():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.relu(self.norm(self.b(self.a(x))))

    model, x = Mixer().eval(), torch.randn(30, 4, 6)
    net = taut.trace(model, x[:2])
    target = note_targets(model, net, ["a", "b"], [x]).layers["b"]
    assert (target.norm, target.follows) == ("", None)
    plan = Plan.of(net, [Step(("a",), "svd", {"rank": 2})])
    assert taut.apply(model, plan, taut.observe(net, model, x), data=x)(x).isfinite().all()


@pytest.mark.parametrize("forward", [by_keyword, other_precision, with_dropout, in_place_sum], ids=lambda f: f.__name__)
def test_nets_with_unusual_operations_are_refitted(forward):
    model, x = Net(forward).eval(), torch.randn(40, 3, 6, 6)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x, output="values")  # the error below is squared
    plan = Plan.of(net, [Step(("a",), "svd", {"rank": 2})])
    bare, refitted = (taut.apply(model, plan, stats, data=data) for data in (None, x))
    with torch.no_grad():
        wanted = model(x)
        assert (refitted(x) - wanted).norm() < (bare(x) - wanted).norm()


def test_few_rows_are_not_aimed_at_anew(monkeypatch):
    model, x = Net(lambda m, x: torch.relu(m.b(m.a(x)))).eval(), torch.randn(8, 3, 6, 6)
    net = taut.trace(model, x[:2])
    plan, stats = Plan.of(net, [Step(("b",), "svd", {"rank": 2})]), taut.observe(net, model, x)
    few = taut.apply(model, plan, stats, data=x[:4])
    monkeypatch.setattr("taut.recovery.refit.ROUNDS", 0)
    plain = taut.apply(model, plan, stats, data=x[:4])
    assert all(torch.equal(a, b) for a, b in zip(few.state_dict().values(), plain.state_dict().values(), strict=True))


def test_the_affine_map_and_the_total_are_those_of_the_model():
    model, x = Net(lambda m, x: torch.relu(m.norm(m.b(h := m.a(x))) + h)), torch.randn(6, 3, 5, 5)
    target = noted(model, x)["b"]
    with torch.no_grad():
        h = model.a(x)
        z = (model.norm(model.b(h)) + h).movedim(1, -1).reshape(-1, 4)[target.seen[0].index]
    torch.testing.assert_close(target.follows.total[0], z, atol=1e-5, rtol=1e-5)
    aim = target.follows.aim(target.rows, None)
    torch.testing.assert_close(aim, target.rows, atol=1e-5, rtol=1e-4)
    other = torch.randn_like(target.rows)
    z = target.follows.scale * target.follows.aim(target.rows, other) + target.follows.shift + other
    torch.testing.assert_close(z, target.follows.total, atol=1e-5, rtol=1e-5)


def test_channels_that_a_norm_switches_off_aim_at_what_they_gave():
    rows, scale = torch.randn(1, 9, 3), torch.tensor([2.0, 0.0, 1e-9]).reshape(1, 1, 3)
    follows = Follows(scale, torch.zeros(1, 1, 3), scale * rows + 5, None, rectified=True)
    aim = follows.aim(rows, torch.ones_like(rows), torch.randn_like(rows))
    assert torch.equal(aim[..., 1:], rows[..., 1:])
    assert not torch.equal(aim[..., 0], rows[..., 0])


def surrogate(z, present):
    """Squared error of what is positive, and of what should not be."""
    return torch.where(z > 0, z - present, present.clamp(min=0)).square().sum()


def test_rounds_of_least_squares_reach_the_minimum_of_the_rectified_error():
    torch.manual_seed(0)
    x, z = torch.randn(200, 4).double(), torch.randn(200, 1).double() * 2 - 1
    follows = Follows(*(torch.full((1, 1, 1), v).double() for v in (1.0, 0.0)), z[None], None, rectified=True)
    present, errors = torch.zeros_like(z), []
    for _ in range(200):
        aim = follows.aim(z[None], torch.zeros_like(z[None]), present[None])[0]
        present = x @ torch.linalg.lstsq(x, aim).solution
        errors.append(float(surrogate(z, present)))
    assert all(new <= old + 1e-9 for old, new in pairwise(errors))
    best = minimize(lambda w: float(surrogate(z, x @ torch.from_numpy(w)[:, None])), np.zeros(4))
    assert errors[-1] == pytest.approx(best.fun, rel=1e-6)


def test_moments_move_with_what_is_wanted():
    rows, wanted = torch.randn(2, 40, 3), 3 * torch.randn(2, 40, 3) + 1
    whole = moments_of([rows.transpose(0, 1).flatten(1)])
    found = moved(whole, rows, wanted)
    torch.testing.assert_close(found, moments_of([wanted.transpose(0, 1).flatten(1)]))


def test_a_branch_makes_up_for_the_other():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip, self.body = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.skip(x) + self.body(x)

    torch.manual_seed(0)
    model, x = Sum().eval(), torch.randn(600, 12)
    net = taut.trace(model, x[:2])
    small = taut.apply(model, Plan.of(net, [Step(("skip",), "svd", {"rank": 3})]), taut.observe(net, model, x), data=x)
    held = torch.randn(300, 12)
    torch.testing.assert_close(small(held), model(held), atol=2e-2, rtol=0)


def test_other_summands_are_held_no_longer_than_needed():
    model, x = Net(lambda m, x: torch.relu(m.b(h := m.a(x)) + h)).eval(), torch.randn(6, 3, 5, 5)
    target = noted(model, x)["b"]
    others = Others(model, {"b": target})
    others.watch()
    with torch.no_grad():
        model(x)
        assert list(others.held) == [("out", "a")]
        assert others.rows(model.b, target, 0).shape == target.rows.shape
        assert not others.held
        model(x)
    assert not others.held
    assert others.rows(model.b, target, 0) is None


def test_one_run_of_the_original_serves_every_plan_with_the_same_result(monkeypatch):
    model, x = Net(lambda m, x: F.relu(m.norm(m.b(m.a(x))))).eval(), torch.randn(40, 3, 6, 6)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x)
    plans = [Plan.of(net, [Step(("b",), "svd", {"rank": rank})]) for rank in (3, 2)]
    wanted = [taut.apply(model, plan, stats, data=x) for plan in plans]
    runs, noted = [], Noted(x, net)
    monkeypatch.setattr(targets, "note_targets", lambda *args: runs.append(1) or note_targets(*args))
    found = [taut.apply(model, plan, stats, data=noted) for plan in plans]
    assert len(runs) == 1
    for a, b in zip(wanted, found, strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(b.state_dict()[name], value)


def test_a_model_that_does_not_run_on_few_samples_is_proved_on_all():
    def many(m, x):
        if len(x) < 12:
            raise ValueError("at least 12 samples")
        return torch.relu(m.b(m.a(x)))

    model, x = Net(many).eval(), torch.randn(40, 3, 6, 6)
    net = taut.trace(model, x[:12])
    assert note_targets(model, net, ["a", "b"], [x]).layers["b"].follows.rectified
