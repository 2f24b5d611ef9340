"""Blocks taken out: what is left, what makes up for it, and what cannot go."""

import pytest
import torch
from torch import nn

import taut
from cases import sequential, untouched
from taut import CallError, Plan, Step
from taut.nn import Skipped
from taut.planning.application import apply_plan


class Residual(nn.Module):
    """x + scale f(x), with the branch as a module of its own."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.body, self.scale = sequential(a=nn.Linear(8, 16), r=nn.ReLU(), b=nn.Linear(16, 8)), scale
        self.kind = "residual"

    def forward(self, x):
        return x + self.scale * self.body(x)


class Asking(nn.Module):
    """Reads a plain attribute of every block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Residual(scale) for scale in (1.0, 0.05, 1.0))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if block.kind == "residual":
                x = block(x)
        return self.last(x)


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    model, data = Asking().eval(), [torch.randn(64, 8) for _ in range(4)]
    net = taut.trace(model, data[0])
    return model, data, net, taut.observe(net, model, data)


def test_the_block_that_does_least_goes_and_what_follows_makes_up_for_it(known, tmp_path):
    model, data, _, _ = known
    with untouched(model):
        result = taut.compress(model, data[0], budget={"macs": 0.75}, data=data, methods=["blocks"])
    (step,) = result.plan.steps
    assert (step.layers, step.method, step.settings) == (("blocks.1",), "blocks", {"way": "pass"})
    assert not list(result.model.blocks[1].parameters())
    assert taut.trace(result.model, data[0]).cost == result.plan.after
    result.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", Asking())
    assert torch.equal(again(data[0]), result.model(data[0]))
    bare = taut.apply(model, result.plan, taut.observe(taut.trace(model, data[0]), model, data))
    x = torch.randn(256, 8)
    wanted, (refitted, unfitted) = model(x), (small(x) for small in (result.model, bare))
    assert (refitted - wanted).square().mean() < 0.5 * (unfitted - wanted).square().mean()


def test_blocks_ranks_and_channels_share_a_budget_and_are_saved(known, tmp_path):
    model, data, _, _ = known
    methods = ["svd", "channels", "blocks"]
    result = taut.compress(model, data[0], budget={"macs": 0.4}, data=data, methods=methods)
    assert taut.trace(result.model, data[0]).cost.macs <= 0.4 * taut.trace(model, data[0]).cost.macs
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", Asking())(data[0]), result.model(data[0]))


def test_a_narrowed_block_can_still_go_and_the_plan_is_saved(known, tmp_path):
    model, data, net, stats = known
    steps = [taut.whole(net, "channels", macs=0.8), Step(("blocks.1",), "blocks")]
    small = taut.apply(model, Plan.of(net, steps), stats, data=data)
    assert isinstance(small.blocks[1], Skipped)
    taut.save(small, Plan.of(net, steps), tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", Asking())(data[0]), small(data[0]))


def test_branches_go_as_zeros(known):
    data = known[1]
    torch.manual_seed(1)
    branch = nn.Sequential(nn.Linear(8, 8), Branches(), nn.Linear(8, 4)).eval()
    net = taut.trace(branch, data[0])
    small = taut.apply(
        branch, Plan.of(net, [Step(("1.one",), "blocks", {"way": "zero"})]), taut.observe(net, branch, data)
    )
    x = branch[0](data[0])
    assert torch.equal(small(data[0]), branch[2](x + branch[1].two(x)))
    result = taut.compress(branch, data[0], budget={"macs": 0.7}, data=data, methods=["blocks"])
    assert {step.settings["way"] for step in result.plan.steps} == {"zero"}


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (sequential(a=nn.Linear(8, 8), r=nn.Tanh(), b=nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        return x + self.one(x) + self.two(x)


def test_what_is_no_block_or_holds_what_is_kept_is_refused(known):
    model, _, net, stats = known
    with pytest.raises(CallError, match=r"'first'.*no block"):
        taut.apply(model, Plan.of(net, [Step(("first",), "blocks")]), stats)
    with pytest.raises(CallError, match=r"'way' of blocks must be one of pass, zero\. Got 'jump'"):
        taut.methods.Blocks(way="jump")
    with pytest.raises(CallError, match=r"'blocks.1.body.a'.*kept"):
        Plan.of(net.keeping(["blocks.1.body.a"]), [Step(("blocks.1",), "blocks")])
    held = net.keeping({"blocks.1.body.a": 0.5})
    small, plan = apply_plan(model, Plan.of(held, [Step(("blocks.1",), "blocks")]), stats)
    assert not isinstance(small.blocks[1], Skipped)
    assert "50% of 'blocks.1.body.a' has to stay" in plan.kept[0].reason


def test_a_block_of_the_users_keep_stays(known):
    model, data, _, _ = known
    result = taut.compress(
        model, data[0], budget={"macs": 0.75}, data=data, methods=["blocks"], keep=["blocks.1.body.b"]
    )
    assert ("blocks.1",) not in {step.layers for step in result.plan.steps}


class Scaled(nn.Module):
    """Holds a parameter beside its layers, so that it is a layer, too."""

    def __init__(self):
        super().__init__()
        self.body, self.gamma = (
            sequential(a=nn.Linear(8, 8), r=nn.Tanh(), b=nn.Linear(8, 8)),
            nn.Parameter(torch.ones(8)),
        )

    def forward(self, x):
        return x + self.gamma * self.body(x)


def test_a_block_with_a_parameter_of_its_own_is_meant_by_its_name(known):
    data = known[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Scaled(), Scaled(), nn.Linear(8, 4)).eval()
    net = taut.trace(model, data[0])
    assert net["1"].block is None
    small = taut.apply(model, Plan.of(net, [Step(("1",), "blocks")]), taut.observe(net, model, data))
    assert isinstance(small[1], Skipped)
    assert torch.equal(small(data[0]), model[3](model[2](model[0](data[0]))))


def test_steps_within_a_block_that_went_go_with_it(known):
    model, data, net, stats = known
    plan = Plan.of(net, [Step(("blocks.1",), "blocks"), Step(("blocks.1.body.a",), "svd", {"rank": 2})])
    small, done = apply_plan(model, plan, stats, data)
    assert isinstance(small.blocks[1], Skipped)
    assert [step.method for step in done.steps] == ["blocks"]
    assert done.kept[-1].reason == "it went with 'blocks.1'"


BEHIND = {
    "a layer in it": lambda net: Step(("blocks.1.body.a",), "svd", {"rank": 2}),
    "channels": lambda net: taut.whole(net, "channels", macs=0.7),
    "pruning": lambda net: taut.whole(net, "magnitude", sparsity=0.5, spare=[-1]),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("staged", [False, True])
def test_what_comes_behind_blocks_leaves_out_what_went_and_is_saved(known, tmp_path, name, staged):
    model, data, net, stats = known
    plan = Plan.of(net, [Step(("blocks.1",), "blocks"), BEHIND[name](net)])
    if staged:
        stages = (taut.Stage(steps=(0,), epochs=0), taut.Stage(steps=(1,), epochs=0))
        small = taut.finetune(model, plan, stats, data, lambda model: 0.0, schedule=stages)
    else:
        small = taut.apply(model, plan, stats, data=data)
    assert isinstance(small.blocks[1], Skipped)
    if name == "pruning":
        assert (
            sum(int((m.weight == 0).sum()) for m in small.modules() if isinstance(m, nn.Linear)) == (64 + 4 * 128) // 2
        )
        assert bool(small.last.weight.all())
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", Asking())(data[0]), small(data[0]))
