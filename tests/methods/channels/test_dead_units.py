"""Dead units as a step: carried out, counted, saved, trained and exported; `compact` has tests of its own."""

import copy

import pytest
import torch
from torch import nn

import taut
from cases import case, macs, run, sequential, settle, untouched
from taut import CallError, Plan, Step
from taut.artifact.checkpoint import load_plan
from taut.methods.channels.dead_units import DeadUnits
from taut.nn import Pick
from taut.planning.application import apply_plan
from taut.planning.plan import whole
from taut.types import Group, alternate, ramp


def image(*shape):
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def convolutional():
    """A convolutional net with norms of unusual settings."""
    torch.manual_seed(0)
    net = sequential(
        one=nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(8, eps=1e-2, momentum=0.3),
        act=nn.PReLU(8),
        two=nn.Conv2d(8, 8, 3, padding=1),
        still=nn.BatchNorm2d(8, track_running_stats=False),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        three=nn.Linear(32, 12),
        tanh=nn.Tanh(),
        four=nn.Linear(12, 5),
    )
    return settle(net, image())


def pruned(model):
    """Zeros that leave four channels or neurons of every layer without work."""
    with torch.no_grad():
        model.one.weight[:, 0] = 0
        model.two.weight[:, :4] = 0
        model.two.weight[5] = 0
        model.three.weight[:, 12:24] = 0
        model.four.weight[:, 3:7] = 0
    return model


def planned(model, x, *steps, data=None):
    net = taut.trace(model, x)
    stats = taut.observe(net, model, data)
    return Plan.of(net, [*steps, whole(net, "dead_units")]), stats


def carried_out(model, x):
    plan, stats = planned(model, x)
    return apply_plan(model, plan, stats)


def close(found, wanted, tolerance=1e-5):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_the_step_takes_them_out_and_says_what_is_left():
    model, x = pruned(convolutional()), image()
    with untouched(model):
        small, done = carried_out(model, x)
    assert done.kept == ()
    (step,) = done.steps
    assert step.layers == ("one", "norm", "act", "two", "still", "three", "four")
    assert step.settings["widths"] == [4, 2, 1, 4, 4, 0, 4, 4, 0, 5, 4, 0, 5, 5, 0, 8, 20, 0, 5, 8, 0]
    close(run(small, x), run(model, x))
    close(run(small, image(3, 3, 8, 8)), run(model, image(3, 3, 8, 8)))
    assert (small.norm.eps, small.norm.momentum) == (1e-2, 0.3)
    assert small.still.running_mean is None
    assert step.after.params == sum(p.numel() for p in small.parameters())
    assert step.after.bytes == sum(p.numel() * p.element_size() for p in small.parameters())
    assert (step.before.macs - step.after.macs) * 2 == macs(model, x) - macs(small, x)
    assert torch.equal(small.two.weight, model.two.weight[[0, 1, 2, 6, 7], 4:])
    assert torch.equal(small.one[1].weight, model.one.weight[4:, 1:])
    assert torch.equal(small.norm.running_var, model.norm.running_var[4:])
    assert torch.equal(small.act.weight, model.act.weight[4:])


@pytest.mark.parametrize("resolved", [True, False], ids=["the plan as done", "the plan as made"])
def test_saved_and_loaded_bit_by_bit(tmp_path, resolved):
    model, x = pruned(convolutional()), image()
    plan, stats = planned(model, x)
    small, done = apply_plan(model, plan, stats)
    taut.save(small, done if resolved else plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", convolutional)
    assert all(torch.equal(a, b) for a, b in zip(run(small, x), run(again, x), strict=True))
    assert repr(again) == repr(small)
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        n: t.dtype for n, t in small.state_dict().items()
    }
    assert load_plan(tmp_path / "small") == done  # a folder tells what was done, however it was asked for
    close(run(copy.deepcopy(again), x), run(model, x))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_behind_pruning_in_one_plan(tmp_path, name):
    model, x = case(name).make()
    net = taut.trace(model, x)
    plan, stats = planned(model, x, whole(net, "mfbp", sparsity=0.8), whole(net, "magnitude", sparsity=0.95))
    masked = taut.apply(model, Plan(plan.steps[:2]), stats)
    with untouched(model):
        small, done = apply_plan(model, plan, stats)
    assert [step.method for step in done.steps] == ["mfbp", "magnitude", "dead_units"]
    close(run(small, x), run(masked, x))
    assert taut.compare(model, small, example=x, evaluate=None).after.macs < net.cost.macs / 2
    for number, saved in enumerate((plan, done)):
        taut.save(small, saved, tmp_path / str(number))
        again = taut.load(tmp_path / str(number), lambda: case(name).make()[0])
        assert all(torch.equal(a, b) for a, b in zip(run(small, x), run(again, x), strict=True))
    again = taut.apply(model, Plan.from_json(done.to_json()), stats)
    assert all(torch.equal(a, b) for a, b in zip(run(small, x), run(again, x), strict=True))


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_recovery_comes_before_it_and_leaves_the_original_alone(name):
    """Units are taken out of the refitted net: what the recovery made of the norms is kept."""
    model, x = case(name).make()
    net, data = taut.trace(model, x), case(name).data()
    plan, stats = planned(model, x, whole(net, "magnitude", sparsity=0.9), data=data)
    with untouched(model):
        masked = taut.apply(model, Plan(plan.steps[:1]), stats, data=data)
        small = taut.apply(model, plan, stats, data=data)
    close(run(small, x), run(masked, x))


def test_a_recovery_behind_it_meets_narrower_norms():
    model, x, data = pruned(convolutional()), image(), [image(16, 3, 8, 8)]
    model.add_module("other", nn.Linear(5, 5))
    net = taut.trace(model, x)
    group = net.group([name for name in whole(net, "dead_units").layers if name != "other"])
    steps = [Step(group.names, "dead_units"), Step(("other",), "svd", {"rank": 2})]
    plan, stats = Plan.of(net, steps), taut.observe(net, model, data)
    with untouched(model):
        small, done = apply_plan(model, plan, stats, data)
    assert [step.method for step in done.steps] == ["dead_units", "svd"]
    assert small.norm.num_features == 4
    assert all(bool(t.isfinite().all()) for t in run(small, x))


def test_nothing_dead_is_noted_and_nothing_is_changed(recwarn):
    model, x = convolutional(), image()
    with untouched(model):
        small, done = carried_out(model, x)
    assert done.steps == ()
    assert [kept.layer for kept in done.kept] == ["one", "norm", "act", "two", "still", "three", "four"]
    assert all("nothing is dead" in kept.reason for kept in done.kept)
    assert sum(kept.cost.params for kept in done.kept) == sum(p.numel() for p in model.parameters())
    assert not [w for w in recwarn if "left as it was" in str(w.message)]
    assert all(torch.equal(a, b) for a, b in zip(run(small, x), run(model, x), strict=True))
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in small.state_dict().values()}


def test_a_plan_with_nothing_dead_can_be_saved_as_it_was_made(tmp_path):
    model, x = convolutional(), image()
    plan, stats = planned(model, x)
    small = taut.apply(model, plan, stats)
    taut.save(small, plan, tmp_path / "same")
    again = taut.load(tmp_path / "same", convolutional)
    assert all(torch.equal(a, b) for a, b in zip(run(small, x), run(again, x), strict=True))


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_last_stage_of_a_schedule(tmp_path, epochs):
    model, x = convolutional(), image(32, 3, 8, 8)
    net = taut.trace(model, x)
    plan = Plan.of(net, [*ramp(whole(net, "mfbp", sparsity=0.93), 2), whole(net, "dead_units")])
    stats = taut.observe(net, model)
    schedule = alternate(plan, epochs=1, last=epochs, rate=1e-3)
    with untouched(model):
        first = taut.finetune(model, plan, stats, [x], None, schedule=schedule, folder=tmp_path / "state")
        second = taut.finetune(model, plan, stats, [x], None, schedule=schedule, folder=tmp_path / "state")
    assert sum(p.numel() for p in first.parameters()) < 0.6 * net.cost.params
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    zeros = [int((p == 0).sum()) for p in first.parameters() if p.ndim > 1]
    assert any(zeros)
    taut.save(first, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", convolutional)
    assert all(torch.equal(a, b) for a, b in zip(run(first, x), run(again, x), strict=True))


def test_training_goes_on_in_the_narrow_net():
    model, x = pruned(convolutional()), image(16, 3, 8, 8)
    small, _ = carried_out(model, x)
    small.train()
    target = torch.randn(16, 5)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = (small(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_export_computes_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    small, _ = carried_out(pruned(convolutional().requires_grad_(requires_grad=True)), image())
    small.still = nn.Identity()  # a norm without statistics depends on the batch
    done = taut.export(small, image(), tmp_path / "small.onnx")
    assert all(parity.holds for parity in done.parity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    model = sequential(one=nn.Linear(20, 16), act=nn.ReLU(), two=nn.Linear(16, 5)).to(dtype)
    with torch.no_grad():
        model.one.weight[:, :5], model.one.weight[0], model.two.weight[:, 1] = 0, 0, 0
        model.one.bias[0] = 1
    x = image(4, 20).to(dtype)
    small, done = carried_out(model, x)
    assert done.steps[0].settings["widths"] == [14, 15, 1, 5, 14, 0]
    assert {p.dtype for p in small.parameters()} == {dtype}
    close(run(small, x), run(model, x), {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype])


def test_hooks_frozen_weights_and_modes_stay():
    model, x = pruned(convolutional()), image()
    model.one.weight.requires_grad = False
    model.norm.bias.requires_grad = False
    model.norm.train()
    seen = []
    model.one.register_forward_hook(lambda _, args, output: seen.append((args[0].shape[1], output.shape[1])))
    small, _ = carried_out(model, x)
    seen.clear()
    run(small, x)
    assert seen == [(3, 4)]
    assert not small.one[1].weight.requires_grad
    assert [p.requires_grad for p in small.norm.parameters()] == [True, False]
    assert small.two.weight.requires_grad
    assert small.norm.training
    assert not small.two.training


def test_a_second_step_goes_on_where_the_first_stopped():
    model, x = pruned(convolutional()), image()
    small, _ = carried_out(model, x)
    with torch.no_grad():
        small.four.weight[:, :2] = 0
    smaller, done = carried_out(small, x)
    assert smaller.three.weight.shape == (6, 20)
    close(run(smaller, x), run(small, x))
    assert all(step.after.lowers(step.before) for step in done.steps)


def test_tied_and_uncalled_norms_are_not_taken():
    model = sequential(one=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), two=nn.Conv2d(4, 4, 1), again=nn.BatchNorm2d(4))
    model.again.weight = model.norm.weight
    net = taut.trace(model, image())
    assert "shared" in net["again"].skip
    assert whole(net, "dead_units").layers == ("one", "two")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.PReLU(4)])
def test_what_stands_between_is_taken_and_what_mixes_is_needed(layer):
    net = taut.trace(sequential(layer=layer), image(2, 4, 5, 5))
    assert DeadUnits().refuses(net.group(["layer"])) is None
    assert DeadUnits().exact_case(net.group(["layer"])) is None


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.PReLU(), nn.ConvTranspose2d(4, 4, 1), nn.LayerNorm(5)])
def test_other_layers_are_refused_in_words(layer):
    net = taut.trace(sequential(layer=layer), image(2, 4, 5, 5))
    assert len(DeadUnits().refuses(net.group(["layer"])).split()) >= 3


@pytest.mark.parametrize(
    "widths",
    [[], [4], [5, 3, 0], [4, 4, 0], [0, 3, 0], [4, 3, 2], [4.0, 3, 0], [4, 3, True], [4, 3, 0, 4, 4, 0, 1, 1, 1]],
)
def test_widths_that_do_not_fit_are_named(widths):
    net = taut.trace(sequential(one=nn.Conv2d(3, 4, 1)), image())
    with pytest.raises(CallError, match=r"'widths' of dead_units.*'one'"):
        DeadUnits(widths=widths).cost(net.group(["one"]))
    with pytest.raises(CallError, match=r"'widths' of dead_units.*'one'"):
        DeadUnits(widths=widths).skeleton(net.group(["one"]))


def test_unresolved_it_costs_what_the_layers_cost():
    net = taut.trace(convolutional(), image())
    group = Group(tuple(layer for layer in net.layers if DeadUnits().refuses(Group((layer,))) is None))
    assert DeadUnits().cost(group) == group.cost
    assert DeadUnits().candidates(group, None) == []
    assert DeadUnits().damage(None) == 0.0
    assert DeadUnits.exact
    assert not DeadUnits.default


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_a_pick_and_its_plain_layer_give_the_same(axes):
    pick = Pick(torch.tensor([4, 1, 1]), axes)
    for x in (image(2, 6, *[3] * axes), image(6, *[3] * axes)):
        torch.testing.assert_close(pick(x), pick.to_plain(6)(x))
    assert pick.to_plain(6).weight.shape[:2] == (3, 6)
    assert "3 channels" in repr(pick)
    assert pick.index.dtype == torch.int32


class Auxiliary(nn.Module):
    """With a head that only training uses."""

    def __init__(self, inputs):
        super().__init__()
        self.one, self.two, self.aux = nn.Linear(inputs, 8), nn.Linear(8, 5), nn.Linear(8, 2)
        with torch.no_grad():
            self.one.weight[:, : inputs // 2] = 0
            self.one.weight[0], self.one.bias[0] = 0, 0

    def forward(self, x):
        h = self.one(x).relu()
        return (self.two(h), self.aux(h)) if self.training else self.two(h)


def test_layers_that_the_example_does_not_call_are_named():
    _, done = carried_out(Auxiliary(1).eval(), image(4, 1))
    assert done.steps == ()
    assert all("nothing is dead" in kept.reason and "'aux'" in kept.reason for kept in done.kept)


def test_where_only_inputs_are_left_out_a_warning_names_them():
    with pytest.warns(UserWarning, match="no layer narrower.*'aux'"):
        _, done = carried_out(Auxiliary(20).eval(), image(4, 20))
    assert done.steps[0].settings["widths"] == [8, 10, 1, 5, 8, 0]


def test_a_mask_of_the_example_is_not_taken_for_all_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
            with torch.no_grad():
                self.a.weight[:8], self.a.bias[:8] = 0, 1
                self.a.bias[0] = -1

        def forward(self, x, mask):
            return self.b(self.a(x).relu() * mask.unsqueeze(-1))

    model, x, mask = Masked().eval(), image(4, 5, 6), torch.ones(4, 5, dtype=torch.bool)
    small, done = carried_out(model, (x, mask))
    assert done.steps[0].settings["widths"] == [15, 6, 0, 3, 15, 0]
    close(run(small, (x, image(4, 5) > 0)), run(model, (x, image(4, 5) > 0)))
