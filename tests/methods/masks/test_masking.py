"""What the masking methods share, through magnitude: exact counts, spared layers, zeros that stay."""

import pytest
import torch
from torch import nn

import taut
from cases import case, sequential, untouched
from taut import CallError, Plan, Step
from taut.methods import resolve


def made(seed=0, **more):
    torch.manual_seed(seed)
    net = sequential(a=nn.Linear(12, 20), r=nn.ReLU(), b=nn.Linear(20, 16), s=nn.ReLU(), c=nn.Linear(16, 4), **more)
    x = torch.randn(8, 12)
    network = taut.trace(net, x)
    return net, x, network, taut.observe(network, net, [torch.randn(64, 12)])


def pruned(net, network, stats, method="magnitude", **settings):
    return taut.apply(net, Plan((taut.whole(network, method, **settings),)), stats)


def zeros(net):
    return [int((m.weight == 0).sum()) for m in net.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("method", ["magnitude", "mfbp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.99])
def test_exactly_the_wanted_number_over_all_layers(method, sparsity):
    net, _, network, stats = made()
    with untouched(net):
        small = pruned(net, network, stats, method, sparsity=sparsity) if sparsity else net
    assert sum(zeros(small)) == round(sparsity * (240 + 320 + 64))


def test_nothing_to_prune_is_refused_as_every_step_without_effect():
    net, _, network, stats = made()
    with pytest.raises(CallError, match="would prune nothing"):
        pruned(net, network, stats, sparsity=0.0)


def test_the_lowest_go():
    net, _, network, stats = made()
    small = pruned(net, network, stats, sparsity=0.6)
    before = torch.cat([m.weight.abs().flatten() for m in net.modules() if isinstance(m, nn.Linear)])
    after = torch.cat([m.weight.flatten() for m in small.modules() if isinstance(m, nn.Linear)])
    assert before[after == 0].max() <= before[after != 0].min()


def test_of_every_layer_the_same_share():
    net, _, network, stats = made()
    assert zeros(pruned(net, network, stats, sparsity=0.25, select="layer")) == [60, 80, 16]


def test_spared_layers_keep_all_their_weights():
    net, _, network, stats = made()
    found = zeros(pruned(net, network, stats, sparsity=0.5, spare=[2]))
    assert found[2] == 0
    assert sum(found) == 280


def test_biases_are_not_pruned_and_pruned_stays_pruned():
    net, _, network, stats = made()
    first = pruned(net, network, stats, sparsity=0.5)
    for module in first.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= -3  # the order of sizes changes nothing for what is zero
    again = taut.trace(first, torch.randn(8, 12))
    second = pruned(first, again, taut.observe(again, first), sparsity=0.8)
    for name in "abc":
        a, b = first.get_submodule(name), second.get_submodule(name)
        assert bool((b.weight[a.weight == 0] == 0).all())
        assert torch.equal(a.bias, b.bias)
    assert sum(zeros(second)) == round(0.8 * 624)


def test_a_threshold_prunes_what_lies_below_it():
    net, _, network, stats = made()
    small = pruned(net, network, stats, select="threshold", threshold=0.1, sparsity=0.0)
    for before, after in zip(net.parameters(), small.parameters(), strict=True):
        if before.ndim == 2:
            assert torch.equal(after, torch.where(before.abs() >= 0.1, before, 0))


def test_the_plan_knows_how_many_weights_are_left():
    net, x, network, stats = made()
    done = taut.planning.application.apply_plan(net, Plan((taut.whole(network, "magnitude", sparsity=0.9),)), stats)
    (step,) = done[1].steps
    assert step.settings["zeros"] == sum(zeros(done[0])) == 562
    assert step.after.nonzero == sum(int((p != 0).sum()) for p in done[0].parameters())
    assert (step.after.params, step.after.macs) == (step.before.params, step.before.macs)
    assert taut.trace(done[0], x).cost.nonzero == step.after.nonzero


def test_save_and_load_give_the_zeros_back(tmp_path):
    net, x, network, stats = made()
    small, plan = taut.planning.application.apply_plan(net, Plan((taut.whole(network, "mfbp", sparsity=0.9),)), stats)
    taut.save(small, plan, tmp_path / "small")
    back = taut.load(tmp_path / "small", base=lambda: made(seed=5)[0])
    assert torch.equal(back(x), small(x))
    assert zeros(back) == zeros(small)


@pytest.mark.parametrize(
    "name", ["inception", "lstm", "attention", "encoder", "tied", "shared", "weight_norm", "pruned", "bfloat16"]
)
def test_whole_nets_of_others_run_on(name):
    model, example = case(name).make()
    network = taut.trace(model, example)
    stats = taut.observe(network, model)
    with untouched(model):
        for method in ("magnitude", "mfbp"):
            taut.apply(model, Plan((taut.whole(network, method, sparsity=0.5),)), stats)


def test_frozen_layers_and_hooks_are_kept():
    net, _, network, stats = made()
    net.b.weight.requires_grad_(requires_grad=False)
    calls = []
    net.a.register_forward_hook(lambda *_: calls.append(1))
    small = pruned(net, network, stats, sparsity=0.5)
    small(torch.randn(2, 12))
    assert not small.b.weight.requires_grad
    assert small.a.weight.requires_grad
    assert len(calls) >= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.5}, "sparsity"),
        ({"sparsity": 0.5, "select": "row"}, "select"),
        ({"sparsity": 0.5, "select": "threshold"}, "select"),
        ({"sparsity": 0.5, "spare": [3]}, "spare"),
        ({"sparsity": 0.5, "score": "taylor"}, "score"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "mfbp"])
def test_bad_settings_are_named(method, settings, said):
    net, _, network, stats = made()
    with pytest.raises(CallError, match=said):
        pruned(net, network, stats, method, **settings)


def test_an_unknown_setting_or_method():
    _, _, network, _ = made()
    with pytest.raises(CallError, match="Unknown setting"):
        taut.whole(network, "mfbp", amount=0.5)
    with pytest.raises(CallError, match="Unknown method"):
        taut.whole(network, "lottery")


def test_a_network_without_a_layer_to_prune():
    net = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))
    network = taut.trace(net, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(CallError, match="takes no layer"):
        taut.whole(network, "magnitude", sparsity=0.5)


def test_masks_are_no_candidates_of_a_budget():
    _, _, network, stats = made()
    with pytest.raises(CallError, match=r"taut\.whole"):
        taut.plan(network, stats, taut.Budget(params=0.5), methods=["magnitude"])


def test_a_refit_leaves_pruned_layers_alone_and_solves_the_others():
    net, _, network, stats = made()
    step = Step(("a",), "magnitude", {"sparsity": 0.7}, network.group(["a"]))
    small = taut.apply(net, Plan((step,)), stats, data=[torch.randn(256, 12)])
    assert zeros(small)[0] == 168
    assert not torch.equal(small.b.weight, net.b.weight)


def test_resolved_settings_give_the_method_back():
    method = resolve(Step((), "mfbp", {"sparsity": 0.5, "links": [0, 1], "zeros": 7}))
    assert (method.sparsity, method.links, method.zeros) == (0.5, [0, 1], 7)


def test_a_second_pruning_in_one_plan_counts_what_the_first_one_pruned():
    net, _, network, stats = made()
    first = taut.whole(network, "magnitude", score="random", sparsity=0.5, seed=1)
    for second in (
        taut.whole(network, "magnitude", score="random", sparsity=0.6, seed=2),
        taut.whole(network, "mfbp", sparsity=0.6),
        taut.whole(network, "magnitude", score="wanda", sparsity=0.6),
    ):
        assert sum(zeros(taut.apply(net, Plan((first, second)), stats))) == round(0.6 * 624)


def test_layers_left_out_by_name_and_counted_from_the_end():
    net, _, network, stats = made()
    step = taut.whole(network, "mfbp", without=("a",), sparsity=0.5)
    assert step.layers == ("b", "c")
    assert zeros(taut.apply(net, Plan((step,)), stats))[0] == 0
    assert zeros(pruned(net, network, stats, sparsity=0.5, spare=[-1]))[2] == 0
    with pytest.raises(CallError, match="no layer 'head'"):
        taut.whole(network, "mfbp", without=("head",))


def test_channels_last_stays_channels_last():
    net = sequential(a=nn.Conv2d(4, 8, 3), r=nn.ReLU(), b=nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    network = taut.trace(net, torch.randn(2, 4, 9, 9))
    for method in ("magnitude", "mfbp"):
        small = pruned(net, network, taut.observe(network, net), method, sparsity=0.5)
        assert small.b.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_committed_codes_threshold_does_not_compound_in_a_ramp():
    net, _, network, stats = made()
    step = taut.whole(network, "mfbp", sparsity=0.8, score="residual", select="unchecked percentiles")
    once = sum(zeros(taut.apply(net, Plan((step,)), stats)))
    ramped = sum(zeros(taut.apply(net, Plan(taut.ramp(step, 5)), stats)))
    assert abs(ramped - once) < 0.1 * 624


def test_the_share_that_is_asked_for_goes_or_it_is_an_error():
    net, _, network, stats = made()
    with torch.no_grad():
        next(net.parameters()).mul_(100.0)  # one layer of another scale

    def taken(select):
        step = taut.whole(network, "magnitude", sparsity=0.8, select=select)
        small = taut.apply(net, Plan((step,)), stats)
        return sum(zeros(small)) / sum(module.weight.numel() for module in net.modules() if hasattr(module, "weight"))

    for select in ("global", "layer"):
        assert abs(taken(select) - 0.8) < 0.01
    with pytest.raises(CallError, match=r"would take \d\d\.\d% of the weights, not the 80\.0% that were asked for"):
        taken("percentiles")
    assert abs(taken("unchecked percentiles") - 0.8) > 0.05


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mfbp", {"sparsity": "0.9"}),
        ("mfbp", {"rank": "a"}),
        ("magnitude", {"spare": 2}),
        ("magnitude", {"select": "threshold", "threshold": "x"}),
        ("mfbp", {"links": [0, 1, 1, "a"]}),
    ],
)
def test_settings_of_a_wrong_type_are_refused_when_the_step_is_made(method, settings):
    _, _, network, _ = made()
    with pytest.raises(CallError, match=str(list(settings)[-1])):
        taut.whole(network, method, **settings)


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    net, _, network, stats = made()
    assert sum(zeros(pruned(net, network, stats, sparsity=numpy.float32(0.5)))) == 312


def test_a_plan_over_many_layers_can_be_read():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)])
    network = taut.trace(net, torch.randn(2, 8))
    _, plan = taut.planning.application.apply_plan(
        net, Plan((taut.whole(network, "mfbp", sparsity=0.5),)), taut.observe(network, net)
    )
    shown = str(plan)
    assert "30 layers, 0 ... 29" in shown
    assert "60 numbers" in shown
    assert max(map(len, shown.splitlines())) <= 160
    assert "mfbp" in shown
    assert len(plan.without(["3"]).kept) == 30


@pytest.mark.parametrize("method", ["magnitude", "obs", "mfbp"])
@pytest.mark.parametrize(("select", "counts"), [("2:4", [120, 160, 32]), ("1:8", [200, 272, 56])])
def test_of_every_run_of_inputs_so_many_stay(method, select, counts):
    """Of 12 and of 20 inputs the last four are a shorter run of eight: one of them stays, too."""
    net, _, network, stats = made()
    stay, run = map(int, select.split(":"))
    step = taut.whole(network, method, select=select)
    small = taut.apply(net, Plan((step,)), stats)
    assert zeros(small) == counts
    for layer in (small.a, small.b, small.c):
        assert all(int(part.ne(0).sum(-1).max()) <= stay for part in layer.weight.split(run, -1))
    assert resolve(step).cost(step.group).nonzero == step.group.cost.nonzero - sum(counts)


def test_runs_of_convolutions_are_of_channels_and_hold_in_the_refit_and_in_training():
    torch.manual_seed(0)
    net = sequential(a=nn.Conv2d(8, 6, 3), r=nn.ReLU(), f=nn.Flatten(), b=nn.Linear(24, 3))
    data = [torch.randn(16, 8, 4, 4) for _ in range(2)]
    network = taut.trace(net, data[0])
    stats = taut.observe(network, net, data)
    plan = Plan((taut.whole(network, "magnitude", score="wanda", select="2:4", spare=[-1]),))
    for small in (
        taut.apply(net, plan, stats, data=data),
        taut.finetune(net, plan, stats, data, lambda model: 0.0, schedule=(taut.Stage(steps=(0,), epochs=1),)),
    ):
        assert int(small.a.weight.ne(0).unflatten(1, (2, 4)).sum(2).max()) == 2
        assert int(small.a.weight.eq(0).sum()) == small.a.weight.numel() // 2
        assert bool(small.b.weight.all())


def test_runs_say_how_much_goes():
    for share in (0.9, 0.5):
        with pytest.raises(CallError, match=r"'sparsity' of magnitude must be 0\.75 where 'select' is 1:4"):
            resolve(Step((), "magnitude", {"select": "1:4", "sparsity": share}))
    assert resolve(Step((), "magnitude", {"select": "1:3", "sparsity": 0.667})).sparsity == 1 - 1 / 3
    for select in ("4:2", "0:4", "2:2", "2 of 4"):
        with pytest.raises(CallError, match="N:M such as 2:4"):
            resolve(Step((), "magnitude", {"select": select}))
    assert resolve(Step((), "obs", {"select": "1:4"})).sparsity == 0.75


def test_layers_of_which_more_has_to_stay_than_runs_leave_are_not_pruned():
    net, _, network, stats = made()
    step = taut.whole(network, "magnitude", select="2:4", keep={"b": 0.6})
    assert zeros(taut.apply(net, Plan((step,)), stats)) == [120, 0, 32]
