"""The methods that cluster channels in whole nets: refit, folded orders, saving, and `compress`; all three alike."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

import taut
from cases import sequential
from taut import Plan, Step
from taut.methods import resolve
from taut.nn import Reorder
from taut.planning.application import apply_plan


class Residual(nn.Module):
    """The layer's outputs are added to its inputs: neither side may have another order."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


def plain():
    return sequential(
        first=nn.Conv2d(4, 32, 5, padding=2),
        norm=nn.BatchNorm2d(32),
        act=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(2),
        second=nn.Conv2d(32, 16, 3),
        norm2=nn.BatchNorm2d(16),
        act2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(144, 5),
    )


def sound():
    return sequential(
        first=nn.Conv1d(4, 24, 9, stride=2),
        act=nn.Tanh(),
        second=nn.Conv1d(24, 8, 5, dilation=2),
        mean=nn.AdaptiveAvgPool1d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(8, 4),
    )


NETS = {"plain": (plain, (4, 10, 10)), "residual": (Residual, (4, 8, 8)), "sound": (sound, (4, 60))}
BICLUSTER = {"inputs": 2, "outputs": 2, "rank_in": 3, "rank_out": 3}
OUTER = {"inputs": 4, "outputs": 2, "rank": 3}
CASES = {  # method and net -> layer, settings, sides that cannot be folded
    ("monochromatic", "plain"): ("first", {"colours": 4}, ""),
    ("monochromatic", "residual"): ("body", {"colours": 4}, "o"),
    ("monochromatic", "sound"): ("first", {"colours": 6}, ""),
    ("bicluster", "plain"): ("second", BICLUSTER, ""),
    ("bicluster", "residual"): ("body", BICLUSTER, "o"),
    ("bicluster", "sound"): ("second", BICLUSTER, ""),
    ("outer", "plain"): ("second", OUTER, ""),
    ("outer", "residual"): ("body", OUTER, "io"),
    ("outer", "sound"): ("second", OUTER, ""),
}
PARTS = {"monochromatic": 2, "bicluster": 3, "outer": 4}
EVERY = pytest.mark.parametrize("case", CASES, ids=" ".join)


class Setup:
    def __init__(self, case):
        self.method, name = case
        self.layer, settings, self.left = CASES[case]
        self.build, shape = NETS[name]
        torch.manual_seed(1)
        self.model = self.build().eval()
        mixing = torch.randn(shape[0], shape[0])
        self.data = [torch.einsum("cd,nd...->nc...", mixing, torch.randn(64, *shape)) for _ in range(2)]
        self.example = self.data[0][:2]
        self.net = taut.trace(self.model, self.example)
        self.stats = taut.observe(self.net, self.model, self.data)
        self.plan = Plan.of(self.net, [Step((self.layer,), self.method, settings)])

    @cache  # noqa: B019 - as many as there are cases
    def applied(self, data):
        """The net with the plan carried out, without or with a refit, and the plan as it was."""
        return apply_plan(self.model, self.plan, self.stats, self.data if data else None)

    def wrong(self, small):
        with torch.no_grad():
            return sum(float((small(x) - self.model(x)).square().sum()) for x in self.data)


@cache
def setup(case):
    """Made once; every test leaves it as it is."""
    return Setup(case)


@EVERY
def test_refit_lowers_the_error_on_the_calibration_data(case):
    s = setup(case)
    assert s.wrong(s.applied(data=True)[0]) < s.wrong(s.applied(data=False)[0])


@EVERY
@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
def test_orders_are_folded_where_that_is_exact(case, data):
    s = setup(case)
    small, plan = s.applied(data=data)
    (step,) = plan.steps
    assert sum(isinstance(module, Reorder) for module in small.modules()) == len(s.left)
    assert step.settings["reorders"] == s.left
    assert len(small.get_submodule(s.layer)) == PARTS[s.method] + len(s.left)
    if not data:  # the net with the fitted kernel in the layer's place computes the same
        wanted, method = copy.deepcopy(s.model), resolve(step)
        layer = wanted.get_submodule(s.layer)
        layer.weight.data = method.fit(s.stats.factors(step.group, method)).W.reshape(layer.weight.shape).float()
        with torch.no_grad():
            torch.testing.assert_close(small(s.data[1]), wanted(s.data[1]), rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("data", [False, True], ids=["bare", "refit"])
@pytest.mark.parametrize("mine", [False, True], ids=["plan as done", "plan as written"])
def test_save_and_load(case, mine, data, tmp_path):
    s = setup(case)
    small, done = s.applied(data=data)
    taut.save(small, s.plan if mine else done, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=s.build)
    with torch.no_grad():
        assert torch.equal(again(s.data[0]), small(s.data[0]))
    assert repr(again) == repr(small)


@pytest.mark.parametrize("method", PARTS)
def test_compress_uses_it_when_named_and_saves(method, tmp_path):
    s = setup((method, "sound"))
    result = taut.compress(s.model, s.example, budget=taut.Budget(params=0.95), data=s.data, methods=[method])
    assert result.plan.after.params <= 0.95 * result.plan.before.params
    assert {step.method for step in result.plan.steps} == {method}
    result.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", base=s.build)
    with torch.no_grad():
        assert torch.equal(again(s.example), result.model(s.example))
