"""Recovery on whole nets: better on held-out inputs, batch norms as torch's own, nothing touched that should not be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from cases import case, sequential, settle
from taut.core.data import collect
from taut.methods import METHODS
from taut.planning.candidates import survey
from taut.planning.knapsack import solve
from taut.recovery import successors as following
from taut.recovery.batch_norm import moments_of, reestimate
from taut.recovery.refit import mean_output, recover
from taut.recovery.samples import joined, refit_samples
from taut.recovery.targets import note_targets
from taut.structure.patches import input_rows, output_rows, positions
from taut.types import Group, Plan, Step


class Smooth(nn.Module):
    """Noise with a spectrum, as real images have: what makes calibration data worth something."""

    def forward(self, n):
        x = torch.randn(n, 3, 8, 8)
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) * 3


def smooth(n, seed):
    torch.manual_seed(seed)
    return Smooth()(n)


def fitted(name):
    """A net whose batch norms know the data."""
    model, _ = case(name).make()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    with torch.no_grad():
        for seed in range(10, 20):
            model.train()(smooth(200, seed))
    return model.eval()


def prepared(name="vgg", share=0.35, n=400):
    """A net, its plan at a share of the MACs, statistics and calibration data."""
    model, data = fitted(name), smooth(n, 1)
    net = taut.trace(model, data[:2])
    stats = taut.observe(net, model, data)
    return model, net, stats, taut.plan(net, stats, taut.Budget(macs=share)), data


def output_error(model, small, x):
    with torch.no_grad():
        wanted = model(x)
        return float((small.eval()(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_refit_lowers_the_error_on_held_out_inputs(name, share):
    model, _, stats, plan, data = prepared(name, share)
    assert plan.steps
    bare, refitted = taut.apply(model, plan, stats), taut.apply(model, plan, stats, data=data)
    held = smooth(300, 2)
    assert output_error(model, refitted, held) < 0.9 * output_error(model, bare, held)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_regard_for_what_follows_lowers_the_error_on_held_out_inputs(name, monkeypatch):
    model, _, stats, plan, data = prepared(name, 0.15)
    held = smooth(300, 3)
    with_regard = output_error(model, taut.apply(model, plan, stats, data=data), held)
    monkeypatch.setattr(following, "RECTIFIERS", frozenset())
    monkeypatch.setattr(following, "SUMS", frozenset())
    assert with_regard < 0.98 * output_error(model, taut.apply(model, plan, stats, data=data), held)


@pytest.mark.parametrize("method", ["svd", "spatial", "tucker"])
def test_one_layer_alone_is_refitted_well(method):
    """Upstream nothing changes, so the dense layer stays and its factors are cut in the present metric."""
    model = sequential(conv=nn.Conv2d(3, 16, 3, padding=1), act=nn.ReLU(), conv2=nn.Conv2d(16, 12, 3)).eval()
    data = smooth(200, 1)
    net = taut.trace(model, data[:2])
    stats = taut.observe(net, model, data)
    ranks = {"svd": {"rank": 4}, "spatial": {"rank": 8}, "tucker": {"rank_in": 8, "rank_out": 6}}[method]
    plan = Plan.of(net, [Step(("conv2",), method, ranks)])
    held = smooth(200, 2)
    bare, refitted = taut.apply(model, plan, stats), taut.apply(model, plan, stats, data=data)
    assert output_error(model, refitted, held) <= 1.02 * output_error(model, bare, held)
    torch.testing.assert_close(refitted.conv.weight, model.conv.weight, rtol=0, atol=1e-4)


def test_bias_takes_the_mean_of_what_is_missing():
    model, net, stats, plan, data = prepared()
    assert "fc" in {layer.name for layer in net.layers}
    small = taut.apply(model, plan, stats, data=data)
    (batch,) = joined(net.example, model, [x for x, _ in collect(net.example, data, refit_samples(net))])
    with torch.no_grad():
        missing = (model(batch) - small.eval()(batch)).mean(0)
        spread = (model(batch) - model(batch).mean(0)).square().mean().sqrt()
    assert float(missing.abs().max()) < 1e-3 * float(spread)


def test_factors_come_out_balanced():
    model, _, stats, plan, data = prepared()
    small = taut.apply(model, plan, stats, data=data)
    for step in plan.steps:
        first, *_, last = small.get_submodule(step.layers[0])
        ratio = float(first.weight.detach().norm() / last.weight.detach().norm())
        assert 0.02 < ratio < 50, (step.layers, ratio)
        if step.method == "svd":
            torch.testing.assert_close(
                first.weight.flatten(1).norm(dim=1), last.weight.flatten(1).norm(dim=0), rtol=1e-3, atol=1e-7
            )


# Batch norm.


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(5), (40, 5)),
        (nn.BatchNorm1d(5), (10, 5, 7)),
        (nn.BatchNorm2d(5), (6, 5, 4, 4)),
        (nn.BatchNorm3d(5, affine=False), (4, 5, 2, 3, 2)),
    ],
    ids=repr,
)
def test_reestimate_is_torchs_own_train_mode_where_the_stored_statistics_were_those_of_the_samples(norm, shape):
    x, before = 3 * torch.randn(shape) + 2, torch.randn(shape)
    torchs = type(norm)(5, momentum=None)
    torchs.train()(x)
    norm.running_mean, norm.running_var = (m.float() for m in moments_of([before]))
    reestimate(norm, moments_of([before]), [x])
    torch.testing.assert_close(norm.running_mean, torchs.running_mean)
    torch.testing.assert_close(norm.running_var, torchs.running_var)


def test_reestimate_leaves_what_did_not_move_and_untracked_norms_alone():
    norm, x = nn.BatchNorm1d(5), 7 * torch.randn(9, 5)
    reestimate(norm, moments_of([x]), [x])
    torch.testing.assert_close(norm.running_var, torch.ones(5))
    torch.testing.assert_close(norm.running_mean, torch.zeros(5))
    untracked = nn.BatchNorm1d(5, track_running_stats=False)
    reestimate(untracked, moments_of([x]), [torch.randn(4, 5)])
    assert untracked.running_mean is None


def test_one_value_per_channel_has_no_moments():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    x = torch.randn(1, 3)
    assert note_targets(model, taut.trace(model, x), ["0"], [x]).norms == {}


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_statistics_of_the_result_moved_as_far_as_its_activations_did(name, monkeypatch):
    monkeypatch.setattr(following, "RECTIFIERS", frozenset())  # no layer has another aim than what it gave
    monkeypatch.setattr(following, "SUMS", frozenset())
    model, net, stats, plan, data = prepared(name)
    small = taut.apply(model, plan, stats, data=data)
    (batch,) = joined(net.example, model, [x for x, _ in collect(net.example, data, refit_samples(net))])
    seen = {}
    norms = {n: m for n, m in small.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for net_ in (small, model):
        for name_ in norms:
            note = lambda _, args, key=(net_, name_): seen.update({key: args[0].detach().double()})  # noqa: E731
            net_.get_submodule(name_).register_forward_pre_hook(note)
        with torch.no_grad():
            net_.eval()(batch)
    for name_, norm in norms.items():
        old, now, then = model.get_submodule(name_), seen[small, name_], seen[model, name_]
        moved = now.mean((0, 2, 3)) - then.mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean.double(), old.running_mean + moved, rtol=1e-3, atol=1e-4)
        grown = now.var((0, 2, 3)) / then.var((0, 2, 3))
        torch.testing.assert_close(norm.running_var.double(), old.running_var * grown, rtol=5e-3, atol=1e-5)
        assert not torch.equal(norm.running_mean, old.running_mean)


def test_a_norm_that_follows_a_layer_takes_the_mean_and_others_do_not():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.b(torch.relu(self.norm(self.a(x))))

    model = Two().eval()
    x = torch.randn(20, 4)
    net = taut.trace(model, x[:2])
    targets = note_targets(model, net, ["a", "b"], [x]).layers
    assert targets["a"].norm == "norm"
    assert not targets["b"].norm
    torch.testing.assert_close(targets["a"].rows[0], model.a(x).detach()[targets["a"].seen[0].index])


def test_targets_survive_an_activation_in_place():
    plain, inplace = (
        sequential(a=nn.Linear(4, 6), act=nn.ReLU(inplace=flag), b=nn.Linear(6, 2)).eval() for flag in (False, True)
    )
    inplace.load_state_dict(plain.state_dict())
    x = torch.randn(30, 4)
    net = taut.trace(plain, x[:2])
    one, two = (note_targets(m, net, ["a", "b"], [x]).layers for m in (plain, inplace))
    assert all(torch.equal(one[n].rows, two[n].rows) for n in "ab")
    assert float(two["a"].rows.min()) < 0


# What refit must leave alone.


def test_a_layer_called_twice_is_left_as_its_rewrite_made_it():
    model, example = case("shared").make()
    data = torch.randn(300, 4, 4, 4)
    net = taut.trace(model, example)
    stats = taut.observe(net, model, data)
    plan = Plan.of(net, [Step(("twice",), "svd", {"rank": 3}), Step(("fc",), "svd", {"rank": 2})])
    bare, refitted = taut.apply(model, plan, stats), taut.apply(model, plan, stats, data=data)
    for a, b in zip(bare.twice.parameters(), refitted.twice.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bare.conv.weight, refitted.conv.weight)
    assert not torch.equal(bare.fc[1].bias, refitted.fc[1].bias)


def test_hooks_of_the_user_run_once_per_forward_and_stay():
    model, example = case("hooked").make()
    data = torch.randn(300, 24)
    net = taut.trace(model, example)
    stats = taut.observe(net, model, data)
    plan = Plan.of(net, [Step(("fc1",), "svd", {"rank": 4})])
    small = taut.apply(model, plan, stats, data=data)
    assert len(small.fc1._forward_hooks) == 1
    assert len(small.fc2._forward_pre_hooks) == 1
    assert not any(m._forward_pre_hooks for n, m in small.named_modules() if n != "fc2")


def test_exact_steps_alone_start_no_refit():
    model = sequential(conv=nn.Conv1d(2, 3, 64, padding=32), norm=nn.BatchNorm1d(3)).eval()
    data = torch.randn(40, 2, 4)
    net = taut.trace(model, data[:2])
    stats = taut.observe(net, model, data)
    (method,) = METHODS["dead_taps"]().candidates(net.group(["conv"]), None)
    small = taut.apply(model, Plan.of(net, [Step(("conv",), "dead_taps", vars(method))]), stats, data=data)
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)


def test_refit_is_repeatable_and_restores_random_state():
    model, _, stats, plan, data = prepared()
    before = torch.get_rng_state()
    one, two = (taut.apply(model, plan, stats, data=data) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_wide_layers_with_few_samples_are_refitted_too():
    """Fewer rows than columns: the dual form, a channel or sketch metric of the present inputs."""
    model = settle(
        sequential(conv=nn.Conv2d(257, 150, 3, padding=1), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(150 * 16, 4)),
        torch.randn(4, 257, 4, 4),
    )
    x = torch.randn(12, 257, 4, 4)
    net = taut.trace(model, x[:1])
    stats = taut.observe(net, model, x)
    assert stats.layers["conv"].weighting.full is not None
    assert stats.layers["fc"].weighting.full is not None
    plan = Plan.of(net, [Step(("conv",), "tucker", {"rank_in": 20, "rank_out": 4}), Step(("fc",), "svd", {"rank": 2})])
    small = taut.apply(model, plan, stats, data=x)
    assert all(bool(p.isfinite().all()) for p in small.parameters())
    assert output_error(model, small, x) < output_error(model, taut.apply(model, plan, stats), x)


# Samples.


def test_samples_grow_with_the_fan_in_and_are_bounded():
    def samples(model, x):
        return refit_samples(taut.trace(model, x))

    assert samples(sequential(fc=nn.Linear(4, 3)), torch.randn(2, 4)) == 256
    wide = samples(sequential(fc=nn.Linear(40, 3)), torch.randn(2, 40))
    assert 256 < wide <= 2048
    assert samples(sequential(fc=nn.Linear(4000, 3)), torch.randn(2, 4000)) == 2048
    assert samples(sequential(conv=nn.Conv1d(1, 64, 3)), torch.randn(1, 1, 30_000)) < 256


def test_recover_works_on_a_model_that_the_planner_left_mostly_alone():
    model, net, stats, plan, data = prepared(share=0.95)
    picks = solve(net, survey(net, stats, [METHODS["svd"]()]), taut.Budget(macs=0.95).limits(net.cost))
    assert picks is not None
    small = taut.apply(model, plan, stats)
    recover(model, small, plan.steps, stats, data)
    held = smooth(200, 3)
    assert output_error(model, small, held) < 0.05


def test_a_norm_called_twice_keeps_what_training_stored():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.left(x)) + self.norm(self.right(x))

    model, x = Siamese().eval(), torch.randn(200, 6)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x)
    plan = Plan.of(net, [Step(("left",), "svd", {"rank": 2})])
    small = taut.apply(model, plan, stats, data=x)
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert torch.equal(small.norm.running_var, model.norm.running_var)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 9)),
    "strided, dilated, grouped": (nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=(2, 1), groups=2), (6, 11, 12)),
    "reflected": (nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="reflect"), (6, 9, 9)),
    "one axis": (nn.Conv1d(6, 8, 5, stride=2, padding=3), (6, 20)),
    "three axes": (nn.Conv3d(4, 6, 3, padding=1), (4, 5, 5, 5)),
    "linear": (nn.Linear(12, 9), (12,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("method", ["svd", "spatial", "tucker"])
def test_the_output_of_the_mean_patch_is_the_mean_output(name, method):
    layer, shape = CONVOLUTIONS[name]
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    net = taut.trace(nn.Sequential(layer), x)
    group = Group((net.layers[0],))
    cut = METHODS[method]()
    if cut.refuses(group):
        assert name in {"linear", "one axis", "three axes"}
        return
    modules = {"0": layer}
    found = cut.factor(modules, {})
    small = cut.candidates(group, found)
    chain = next(iter(small[-1].rewrite(modules, found).modules.values()))
    with torch.no_grad():
        y = layer(x)
        index = torch.arange(positions(layer, y))
        mean = input_rows(layer, x, y, index).mean(1, keepdim=True)
        wanted = output_rows(layer, chain(x), index).mean(1)
        torch.testing.assert_close(mean_output(layer, chain, mean), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kernel", "padding", "ranges"), [(5, 2, [2, 3, 2, 3]), (4, "same", [1, 2, 1, 2])])
def test_dead_taps_beside_a_factorization_are_refitted_too(kernel, padding, ranges):
    """A cut kernel has no mean patch of the original's size; being exact, it needs no shift of its bias either."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(16, 16, kernel, padding=padding),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    x = torch.randn(64, 3, 8, 8)
    traced = taut.trace(net, x)
    steps = [Step(("0",), "svd", {"rank": 8}), Step(("3",), "dead_taps", {"ranges": ranges})]
    small = taut.apply(net, Plan.of(traced, steps), taut.observe(traced, net, x), data=x)
    with torch.no_grad():
        assert float((small(x) - net(x)).norm() / net(x).norm()) < 0.2
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
