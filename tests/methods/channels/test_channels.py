"""Filter pruning as a step: what it costs, what it computes, how it is saved, trained, and followed by other steps."""

import pytest
import torch
from torch import nn

import taut
from cases import FLAVOURS, macs, run, sequential, settle, untouched
from structure import staying, wired
from structure.silencing import narrow, silenced
from structure.wired import Net
from taut import CallError, Plan, Step
from taut.core.example import Example
from taut.core.modes import quiet
from taut.measure.latency_model import LatencyModel, model_ops
from taut.methods.channels.channels import Channels
from taut.methods.channels.importance import CRITERIA, curves_of
from taut.methods.channels.widths import width_grid
from taut.planning.application import apply_plan
from taut.planning.plan import whole
from taut.structure.channels.cuts import cuts_of
from taut.structure.channels.groups import coupled
from taut.structure.surgery import clone
from taut.types import ramp


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches(count=2, size=48):
    return [draw(size, 3, 6, 6, seed=place) for place in range(count)]


def net(dtype=torch.float32):
    """Convolutions, one with a batch norm and one in groups, and dense layers."""
    torch.manual_seed(0)
    layers = sequential(
        a=nn.Conv2d(3, 16, 3, padding=1, bias=False),
        n=nn.BatchNorm2d(16, eps=1e-2, momentum=0.3),
        r=nn.ReLU(),
        b=nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2),
        t=nn.Tanh(),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        c=nn.Linear(96, 20),
        s=nn.SiLU(),
        d=nn.Linear(20, 5),
    )
    return settle(layers, draw(4, 3, 6, 6)).to(dtype)


X = draw(2, 3, 6, 6)


def planned(model, x, *steps, data=None):
    """The plan of steps that a traced network makes, and its statistics."""
    traced = taut.trace(model, x)
    return Plan.of(traced, [step(traced) for step in steps]), taut.observe(traced, model, data)


def channels(**settings):
    return lambda traced: whole(traced, "channels", **settings)


def pruned(model, x, data=None, refit=True, **settings):
    """The narrower model, and its plan as it was carried out."""
    plan, stats = planned(model, x, channels(**settings), data=data)
    with untouched(model):
        return apply_plan(model, plan, stats, data if refit else None)


def counts(plan, place=0):
    return plan.steps[place].settings["counts"]


def distance(model, small, x):
    (wanted,), (found,) = run(model, x), run(small, x)
    return float((wanted - found).norm() / wanted.norm())


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 0.0}, "'macs' of channels must be a share kept, in \\(0, 1\\]. Got 0.0"),
        ({"macs": True}, "'macs' of channels must be.*Got True"),
        ({"params": 1.5}, "'params' of channels must be.*Got 1.5"),
        ({"params": "half"}, "'params' of channels must be.*Got 'half'"),
        ({"sparsity": 1.0}, "'sparsity' of channels must be a share of the channels, in \\[0, 1\\). Got 1.0"),
        ({"sparsity": -0.1}, "'sparsity' of channels must be.*Got -0.1"),
        ({"macs": 0.5, "criterion": "size"}, "'criterion' of channels must be one of obs.*Got 'size'"),
        ({"macs": 0.5, "align": 0}, "'align' of channels must be a whole number, at least 1. Got 0"),
        ({"macs": 0.5, "align": 2.0}, "'align' of channels must be.*Got 2.0"),
        ({"macs": 0.5, "even": 1}, "'even' of channels must be True or False. Got 1"),
    ],
)
def test_settings_that_mean_nothing_are_call_errors(settings, message):
    with pytest.raises(CallError, match=message):
        Channels(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs 'macs', 'params', 'sparsity', 'latency' or 'counts'. Got none"),
        ({"counts": [8]}, "'counts' of channels must be one number for each of 3 groups.*Got \\[8\\]"),
        ({"counts": [8, 0, 3]}, "between 1 and \\[8, 12, 20\\]. Got \\[8, 0, 3\\]"),
        ({"counts": [8, 12, 21]}, "between 1 and \\[8, 12, 20\\]. Got \\[8, 12, 21\\]"),
        ({"counts": 8}, "'counts' of channels must be.*Got 8"),
        ({"widths": [8, 3, 8, 8, 12, 4, 10, 48, 5, 10]}, "'widths' of channels are a record"),
        ({"widths": [4]}, "'widths' of channels must hold outputs and inputs for each of 5 layers"),
    ],
)
def test_settings_that_no_such_network_meets_are_call_errors(settings, message):
    model = net()
    with untouched(model), pytest.raises(CallError, match=message):
        pruned(model, X, **settings)


@pytest.mark.parametrize(
    ("settings", "far"),
    [
        ({"sparsity": 0.999}, r"0.075 of the channels"),
        ({"macs": 1e-6}, r"of the macs"),
        ({"macs": 1e-6, "params": 1e-6}, r"of the macs and .* of the params"),
        ({"macs": 1e-6, "even": True}, r"of the macs"),
    ],
)
def test_what_cannot_be_met_says_how_far_it_goes(settings, far):
    model = net()
    with untouched(model), pytest.raises(CallError, match=f"No widths of channels meet .*: one channel a group.*{far}"):
        pruned(model, X, **settings)


@pytest.mark.parametrize("settings", [{"macs": 1.0}, {"sparsity": 0.0}, {"counts": [8, 12, 20]}])
def test_nothing_to_do_is_said(settings):
    model = net()
    small, plan = pruned(model, X, **settings)
    assert not plan.steps
    assert {kept.reason for kept in plan.kept} == {"no channels have to go: what is asked holds already"}
    assert torch.equal(run(small, X)[0], run(model, X)[0])


# Costs.


def cost(model, x):
    return {"macs": macs(model, x), "params": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize(
    ("build", "asked", "even"),
    [
        (net, {"macs": 0.4}, False),
        (net, {"params": 0.3}, False),
        (net, {"macs": 0.5, "params": 0.3}, False),
        (net, {"macs": 0.4, "params": 0.4}, True),
        (wired.residual, {"macs": 0.4}, False),
        (wired.u_net, {"params": 0.5}, True),
        (wired.depthwise_with_multiplier, {"params": 0.5}, False),
    ],
)
def test_the_counted_cost_is_met_and_not_undercut_without_need(build, asked, even):
    """One step wider on the grid of widths, any group would break a limit."""
    model, x = (build(), X) if build is net else build()[:2]
    small, plan = pruned(model.eval(), x, criterion="l2", even=even, **asked)
    before, after = cost(model, x), cost(small, x)
    assert all(after[key] <= share * before[key] for key, share in asked.items())
    assert plan.steps[0].after.macs == after["macs"] // 2
    assert plan.steps[0].after.params == after["params"]
    sizes = [group.size for group in groups_of(model, x)]
    for place, (count, size) in enumerate(zip(counts(plan), sizes, strict=True)):
        wider = list(counts(plan))
        wider[place] = min((w for w in width_grid(size) if w > count), default=size)
        if not even and wider not in (counts(plan), sizes):
            more = cost(pruned(model, x, counts=wider, criterion="l2")[0], x)
            assert any(more[key] > share * before[key] for key, share in asked.items())


RATES = [2e-6, 1e-6, 1e-5, 1e-4, 4.0]


@pytest.mark.parametrize("build", [net, wired.residual, wired.u_net, wired.depthwise_with_multiplier])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_the_predicted_time_is_met_and_not_undercut_without_need(build, share):
    """As with counted costs: the time of the narrower network, predicted from what its layers really do."""
    model, x = (build(), X) if build is net else build()[:2]
    pace = LatencyModel(tuple(RATES[:4]), int(RATES[4]), 0.0, "eager")

    def time(model):
        return pace.of(model_ops(model.eval(), Example(model, x)))

    small, plan = pruned(model.eval(), x, criterion="l2", latency=share, rates=RATES)
    assert time(small) <= share * time(model) * (1 + 1e-9)
    assert plan.steps[0].settings["rates"] is plan.steps[0].settings["latency"] is None
    sizes = [group.size for group in groups_of(model, x)]
    for place, (count, size) in enumerate(zip(counts(plan), sizes, strict=True)):
        wider = list(counts(plan))
        wider[place] = min((w for w in width_grid(size) if w > count), default=size)
        if wider not in (counts(plan), sizes):
            assert time(pruned(model, x, counts=wider, criterion="l2")[0]) > share * time(model)


@pytest.mark.parametrize(
    "rates", [None, [], [1.0] * 4, [1.0] * 4 + [-1.0], [1.0] * 4 + ["8"], [1.0] * 4 + [0.0], [1.0] * 4 + [1.5], 1.0]
)
def test_no_time_is_predicted_without_rates(rates):
    with pytest.raises(CallError, match="rates"):
        Channels(latency=0.5, rates=rates)


def groups_of(model, x):
    with quiet():
        return coupled(model, Example(model, x)).groups


@pytest.mark.parametrize(("sparsity", "even"), [(0.3, False), (0.5, True), (0.8, False)])
def test_sparsity_is_the_share_of_all_channels_that_may_go(sparsity, even):
    _, plan = pruned(net(), X, criterion="l1", sparsity=sparsity, even=even)
    left = sum(counts(plan))
    assert left <= (1 - sparsity) * 40
    assert left >= (1 - sparsity) * 40 - 4


def test_even_takes_the_same_share_of_every_group():
    _, plan = pruned(net(), X, sparsity=0.5, even=True, criterion="l2")
    assert counts(plan) == [4, 6, 10]


def test_widths_are_multiples():
    _, plan = pruned(net(), X, macs=0.4, align=4, criterion="l2")
    assert all(count % 4 == 0 for count in counts(plan))
    _, plan = pruned(net(), X, macs=0.4, align=4, even=True, criterion="l2")
    assert all(count % 4 == 0 for count in counts(plan))


# Which channels go.


def chosen(criterion, model, x, data):
    """The channels of the first layer that are left when one of them has to go."""
    small, _ = pruned(model, x, data, refit=False, counts=[5], criterion=criterion)
    rows = [(model.a.weight - row).flatten(1).abs().sum(1).argmin() for row in small.a.weight]
    return sorted(int(row) for row in rows)


def planted(criterion):
    """A net of six channels of which number 2 is the one that the criterion means."""
    torch.manual_seed(0)
    model = settle(sequential(a=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6), r=nn.ReLU(), c=nn.Conv2d(6, 4, 1)), X)
    with torch.no_grad():
        model.n.weight.fill_(1.0)
        model.a.weight /= model.a.weight.flatten(1).norm(dim=1)[:, None, None, None]
        if criterion in {"l1", "l2"}:
            model.a.weight[2] *= 0.1
        elif criterion == "bn":
            model.n.weight[2] = 0.1
        elif criterion == "median":
            model.a.weight[2] = model.a.weight[[0, 1, 3, 4, 5]].mean(0)
        elif criterion == "residual":
            model.a.weight[2] = 0.6 * model.a.weight[0] - 0.8 * model.a.weight[1]
        elif criterion == "energy":
            model.n.weight[2], model.n.bias[2] = 0.1, -0.2
        else:
            model.c.weight[:, 2] = 0.0
    return model


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_finds_the_channel_that_it_means(criterion):
    model = planted(criterion)
    assert chosen(criterion, model, X, batches()) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_with_data_and_without(criterion):
    model = net()
    traced = taut.trace(model, X)
    plan = Plan.of(traced, [whole(traced, "channels", macs=0.5, criterion=criterion)])
    for data, far in ((batches(1), 0.7), (None, 1.0)):
        stats = taut.observe(traced, model, data)
        if data is None and criterion in {"taylor", "energy"}:
            with pytest.raises(CallError, match=f"'criterion' {criterion} of channels needs calibration data"):
                apply_plan(model, plan, stats)
            continue
        small, done = apply_plan(model, plan, stats)
        assert done.steps[0].settings["criterion"] == criterion
        assert distance(model, small, draw(16, 3, 6, 6)) < far


def redundant():
    """Sixteen channels: six of small filters, and five large ones twice, the second time at another scale."""
    torch.manual_seed(0)
    model = net()
    model = sequential(a=nn.Conv2d(3, 16, 3), r=nn.ReLU(), c=nn.Conv2d(16, 8, 3), f=nn.Flatten(), d=nn.Linear(32, 5))
    with torch.no_grad():
        model.a.weight[6:11] *= 2
        model.a.bias[6:11] *= 2
        for key in ("weight", "bias"):
            values = getattr(model.a, key)
            values[11:] = 1.5 * values[6:11]
    return model.eval()


def test_what_others_can_stand_in_for_goes_for_free_and_weights_move():
    model = redundant()
    small, _ = pruned(model, X, batches(), criterion="obs", counts=[11, 8])
    by_size, _ = pruned(model, X, batches(), criterion="l2", counts=[11, 8])
    x = draw(64, 3, 6, 6)
    assert distance(model, small, x) < 1e-3
    assert distance(model, by_size, x) > 20 * distance(model, small, x)


def test_moved_weights_are_nearer_than_sliced_ones_before_any_refit():
    model, x = net(), draw(64, 3, 6, 6)
    plan, stats = planned(model, X, channels(macs=0.5, criterion="l2"), data=batches())
    moved = taut.apply(model, plan, stats)
    sliced = taut.apply(model, plan, taut.observe(taut.trace(model, X), model))
    refit = taut.apply(model, plan, stats, batches())
    assert distance(model, refit, x) < distance(model, moved, x) < distance(model, sliced, x)


@pytest.mark.parametrize("build", [net, wired.residual])
def test_surgery_is_nearer_than_the_norm_untrained(build):
    model, x = (build(), X) if build is net else build()[:2]
    shape = x.shape[1:]
    data = [draw(48, *shape, seed=place) for place in range(2)]
    smooth = [t.cumsum(-1).cumsum(-2) / 3 for t in data]  # neighbouring pixels are alike, as in pictures
    nearer = []
    for criterion in ("obs", "l2"):
        small, _ = pruned(model.eval(), x, smooth, criterion=criterion, macs=0.4)
        nearer.append(distance(model, small, draw(64, *shape, seed=9).cumsum(-1).cumsum(-2) / 3))
    assert nearer[0] < nearer[1]


class Sized(nn.Module):
    """A transposed convolution that is told how large its output is to be, or not."""

    def __init__(self, *size):
        super().__init__()
        self.a, self.up, self.last = nn.Conv2d(3, 12, 3), nn.ConvTranspose2d(12, 6, 2, 2), nn.Conv2d(6, 2, 1)
        self.size = size

    def forward(self, x):
        return self.last(self.up(self.a(x), *self.size))


@pytest.mark.parametrize("size", [(), ([8, 8],), ([9, 9],)], ids=str)
def test_of_what_a_transposed_convolution_reads_the_least_goes_and_the_rest_makes_up(size):
    """Three of its inputs follow from the others: nothing is lost without them."""
    model = Sized(*size).eval()
    with torch.no_grad():
        model.a.weight[9:], model.a.bias[9:] = model.a.weight[:3] * 2, model.a.bias[:3] * 2
    small, _ = pruned(model, X, [X], counts=[9, 6])
    assert tuple(small.up.weight.shape) == (9, 6, 2, 2)
    assert distance(model, small, X) < 1e-2


# What is kept of a layer.


@pytest.mark.parametrize(
    "flavour",
    ["stride", "same_even_dilated", "dilation", "no_bias", "reflect", "circular", "groups", "depthwise_multiplied"],
)
def test_every_flavour_of_convolution(flavour):
    settings = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, **FLAVOURS[flavour]}
    layer = nn.Conv1d(**settings)
    a, c = nn.Conv1d(3, 8, 1), nn.Conv1d(layer.out_channels, 4, 1)
    model, x = Net(lambda s, x: s.c(s.b(s.a(x))), a=a, b=layer, c=c).eval(), draw(2, 3, 9)
    groups = groups_of(model, x)
    assert {member.layer for group in groups for member in group.members} == {"a", "b", "c"}
    small, plan = pruned(model, x, sparsity=0.3, criterion="l2", align=1)
    wide, gone = clone(model).double(), []
    for group, count in zip(groups, counts(plan), strict=True):
        gone.append(torch.from_numpy(curve(model, group).order[: group.size - count].copy()))
    with torch.no_grad():
        wanted = silenced(wide, groups, gone)(x.double())
        torch.testing.assert_close(small.double()(x.double()), wanted, rtol=1e-9, atol=1e-9)
    for key in ("stride", "dilation", "padding_mode", "kernel_size"):
        assert getattr(small.b, key) == getattr(layer, key)


def curve(model, group):
    return curves_of(model, [group], {}, "l2", {})[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", [True, False], ids=["refit", "bare"])
def test_dtypes_stay(dtype, data):
    model, x = net(dtype), X.to(dtype)
    small, _ = pruned(model, x, [t.to(dtype) for t in batches()] if data else None, macs=0.5)
    assert {t.dtype for t in small.state_dict().values()} - {torch.int64} == {dtype}
    assert bool(run(small, x)[0].isfinite().all())


def test_flags_hooks_and_settings_stay():
    model = net().train()
    model.b.eval()
    model.a.weight.requires_grad_(requires_grad=False)
    model.c.bias.requires_grad_(requires_grad=False)
    seen = []
    model.b.register_forward_hook(lambda *_: seen.append("b"))
    model.n.register_forward_pre_hook(lambda *_: seen.append("n"))
    small, _ = pruned(model, X, batches(), macs=0.5)
    seen.clear()
    run(small, X)
    assert seen == ["n", "b"]
    assert {name: m.training for name, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert (small.n.eps, small.n.momentum) == (1e-2, 0.3)
    assert small.n.num_batches_tracked == model.n.num_batches_tracked


def test_a_frozen_layer_becomes_narrower_and_stays_frozen():
    model = net().requires_grad_(requires_grad=False)
    small, plan = pruned(model, X, macs=0.5)
    assert plan.steps
    assert not any(p.requires_grad for p in small.parameters())


def test_one_module_in_two_places_is_one_afterwards():
    model, x, _ = wired.two_names()
    small, plan = pruned(model.eval(), x, sparsity=0.5)
    assert small.b is small.other
    assert small.b.weight.shape == (counts(plan)[1], counts(plan)[0])


def test_tied_weights_stay_tied():
    model, words = staying.tied()
    model.wide, model.back = nn.Linear(8, 16), nn.Linear(16, 8)
    model.way = lambda s, x: s.out(s.back(torch.relu(s.wide(s.mid(s.embed(x))))))
    small, plan = pruned(model.eval(), words, sparsity=0.5)
    assert plan.steps[0].layers == ("mid", "wide", "back")
    assert small.wide.out_features == small.back.in_features == counts(plan)[1] <= 8
    assert small.out.weight is small.embed.weight
    assert small.out.weight is not model.out.weight


def test_batch_norm_without_affine():
    model, x, _ = wired.norm_without_affine()
    small, plan = pruned(model.eval(), x, [draw(32, 3, 4, 4)], sparsity=0.5)
    assert small.middle.num_features == len(small.middle.running_mean) == counts(plan)[0] == len(small.a.weight)
    assert small.middle.weight is None


# What cannot go.


def reasons(plan):
    return {kept.layer: kept.reason for kept in plan.kept}


@pytest.mark.filterwarnings("ignore:Layer .* is left as it was:UserWarning")
def test_a_group_that_reaches_the_output_is_told():
    model, x = staying.both_reach_the_output()
    small, plan = pruned(model.eval(), x, sparsity=0.5)
    assert not plan.steps
    assert "'a': they reach the model's output" in reasons(plan)["a"]
    assert torch.equal(run(small, x)[0], run(model, x)[0])


@pytest.mark.filterwarnings("ignore:Layer .* is left as it was:UserWarning")
def test_a_forward_pass_that_depends_on_data_is_told():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.dark = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.mean() > -9 else self.dark(self.a(x))

    _, plan = pruned(Choosing().eval(), draw(2, 6), sparsity=0.5)
    assert not plan.steps
    assert "the example does not reach 'dark'" in reasons(plan)["a"]


def fixed_shape():
    """The number of channels is written into forward."""
    way = lambda s, x: s.d(torch.relu(s.c(s.b(s.a(x)).view(-1, 24))))  # noqa: E731
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "c": nn.Linear(24, 10), "d": nn.Linear(10, 3)}
    return Net(way, **layers), draw(2, 3, 6, 6), "the narrower network does not run", ("b",)


def scaled_by_the_number_of_channels():
    fused = Net(lambda s, x: s.c(torch.tanh(y := s.a(x)) / y.shape[-1]), a=nn.Linear(6, 8), c=nn.Linear(8, 8))
    both = Net(lambda s, x: s.d(torch.relu(s.c(s.fused(x)))), fused=fused, c=nn.Linear(8, 9), d=nn.Linear(9, 3))
    return both, draw(2, 6), "what is computed from the others depends on how many there are", ("fused.a",)


@pytest.mark.filterwarnings("ignore:Layer .* is left as it was:UserWarning")
@pytest.mark.parametrize("build", [fixed_shape, scaled_by_the_number_of_channels])
def test_what_does_not_survive_the_trial_stays_and_the_rest_goes(build):
    model, x, reason, names = build()
    small, plan = pruned(model.eval(), x, sparsity=0.4)
    assert {name for name, told in reasons(plan).items() if reason in told} == set(names)
    for name in names:
        assert small.get_submodule(name).weight.shape[0] == model.get_submodule(name).weight.shape[0]
    sizes = [group.size for group in groups_of(model, x)]
    assert sum(counts(plan)) < sum(sizes)
    again, done = pruned(model, x, counts=counts(plan))
    assert done.steps[0].after == plan.steps[0].after
    assert torch.equal(run(again, x)[0], run(small, x)[0])
    _, refused = pruned(model, x, counts=[max(1, size // 2) for size in sizes])
    assert not refused.steps
    assert all("cannot go" in told and reason in told for told in reasons(refused).values())


def test_a_group_with_a_layer_that_is_left_out_stays():
    model = net()
    traced = taut.trace(model, X)
    plan = Plan.of(traced, [whole(traced, "channels", without=["c"], sparsity=0.5)])
    small, done = apply_plan(model, plan, taut.observe(traced, model))
    assert reasons(done)["b"] == "they also belong to 'c', which is none of the step's layers"
    assert small.c is not model.c
    assert torch.equal(small.c.weight, model.c.weight)
    assert counts(done) == [4]


# Plans: saved, made twice, followed by others.


def test_two_runs_give_the_same_bytes(tmp_path):
    for place in range(2):
        small, plan = pruned(net(), X, batches(), macs=0.4)
        taut.save(small, plan, tmp_path / str(place))
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


FOLLOWED = {
    "alone": (),
    "tucker and svd": (
        lambda _: Step(("a",), "tucker", {"rank_in": 2, "rank_out": 4}),
        lambda _: Step(("c",), "svd", {"rank": 2}),
    ),
    "ranks by the weights": (
        lambda _: Step(("a",), "tucker", {"vbmf": 1.0}),
        lambda _: Step(("c",), "svd", {"vbmf": 0.5}),
    ),
    "more channels": (channels(sparsity=0.4),),
    "magnitude": (lambda traced: whole(traced, "magnitude", sparsity=0.5),),
}


@pytest.mark.parametrize(("name", "data"), [*((name, True) for name in FOLLOWED), ("tucker and svd", False)])
def test_other_steps_behind_it_are_carried_out_saved_and_replayed(name, data, tmp_path):
    model = net()
    seen = batches() if data else None
    plan, stats = planned(model, X, channels(sparsity=0.4, even=True), *FOLLOWED[name], data=seen)
    with untouched(model):
        small, done = apply_plan(model, plan, stats, seen)
    assert done.steps[0].method == "channels"
    assert len(done.steps) == 1 + len(FOLLOWED[name]) - (name == "ranks by the weights" and len(done.kept) > 1)
    assert Plan.from_json(done.to_json()) == done
    if data:
        assert distance(model, small, draw(32, 3, 6, 6)) < 0.7
    for place, saved in enumerate((plan, done)):
        taut.save(small, saved, tmp_path / str(place))
        again = taut.load(tmp_path / str(place), net)
        assert torch.equal(run(again, X)[0], run(small, X)[0])
        assert repr(again) == repr(small)
    replayed = taut.apply(model, Plan.from_json(done.to_json()), stats, seen)
    assert torch.equal(run(replayed, X)[0], run(small, X)[0])
    traced = taut.trace(model, X)
    for step in done.steps[1:]:
        assert step.before.params < traced.group(step.layers).cost.params


def test_a_later_rank_must_fit_the_narrower_layer():
    plan, stats = planned(net(), X, channels(sparsity=0.4), lambda _: Step(("c",), "svd", {"rank": 20}))
    with pytest.raises(CallError, match="'rank' of svd on layer 'c' must be between 1 and"):
        taut.apply(net(), plan, stats)


# Training in between.


def trained(model, plan, stats, schedule):
    return taut.finetune(model, plan, stats, batches(1), batches(1, 8), schedule=schedule)


def test_stages_of_pruning_training_and_tucker(tmp_path):
    model = net()
    plan, stats = planned(model, X, channels(macs=0.5), lambda _: Step(("a",), "tucker", {"rank_in": 2, "rank_out": 4}))
    stages = (taut.Stage((0,), epochs=1), taut.Stage((1,), epochs=1))
    with untouched(model):
        small = trained(model, plan, stats, stages)
    assert macs(small, X) < 0.5 * macs(model, X)
    assert len(list(small.a.children())) == 3
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", net)
    assert torch.equal(run(again, X)[0], run(small, X)[0])
    assert distance(model, small, draw(32, 3, 6, 6)) < 0.6


def test_a_ramp_ends_at_its_sparsity():
    model = net()
    traced = taut.trace(model, X)
    steps = ramp(whole(traced, "channels", sparsity=0.6, criterion="l2", align=1), 2)
    shares = [step.settings["sparsity"] for step in steps]
    left = torch.tensor([1 - share for share in shares]).cumprod(0)
    assert left[-1] == pytest.approx(0.4)
    assert [float(1 - value) for value in left] == pytest.approx([0.6 * (1 - (1 - t / 2) ** 3) for t in (1, 2)])
    plan = Plan.of(traced, steps)
    small = trained(model, plan, taut.observe(traced, model), taut.alternate(plan, epochs=1))
    sizes = [group.size for group in groups_of(small, X)]
    assert 40 * 0.4 - 3 <= sum(sizes) <= 40 * 0.4


# Statistics of the narrower network.


def test_statistics_are_those_of_the_narrower_network(monkeypatch):
    """What goes is read with weights of zero beforehand, so that all others see and give what they did."""
    monkeypatch.setattr("taut.structure.collecting.ENOUGH", 0)  # how few rows are judged depends on the width
    model = net()
    groups = groups_of(model, X)
    gone = [torch.arange(group.size)[::3] for group in groups]
    model = silenced(model, groups, gone)
    cuts = cuts_of(model, groups, gone)
    small = narrow(model, groups, gone)
    wide = taut.observe(taut.trace(model, X), model, batches())
    wanted = taut.observe(taut.trace(small, X), small, batches())
    layers = [taut.trace(small, X)[name] for name in cuts]
    found = wide.narrowed(small, layers, {name: (cut.outputs, cut.inputs) for name, cut in cuts.items()})
    assert found.network.layers == wanted.network.layers
    assert found.network.cost.params == wanted.network.cost.params
    assert list(found.layers) == list(wanted.layers)
    for name, one in wanted.layers.items():
        other = found.layers[name]
        torch.testing.assert_close(other.weighting.full, one.weighting.full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.outputs.full, one.outputs.full, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.taylor, one.taylor, rtol=1e-3, atol=1e-6)
        assert other.positions == one.positions
        assert found.modules[name] is small.get_submodule(name)


@pytest.mark.parametrize("words", ["", "so wide it must be"])
def test_a_check_of_a_width_without_words_is_named_by_its_kind(words):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 64), nn.Linear(64, 10)

        def forward(self, x):
            h = torch.relu(self.a(x))
            if h.shape[1] != 64:
                raise AssertionError(*([words] if words else []))
            return self.b(h)

    with pytest.warns(UserWarning, match=words or "AssertionError"):
        _, plan = pruned(Strict().eval(), torch.randn(16, 20), sparsity=0.3)
    assert plan.steps == ()
