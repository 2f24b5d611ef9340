"""Narrower layers are slices of the old ones, and whoever gives something else than before is named."""

import pytest
import torch
from torch import nn

from cases import sequential
from taut.core.example import Example
from taut.structure.narrowing import Cut, Departure, channel_axis, composed, departure, left_of, narrowed, trail


def index(*values):
    return torch.tensor(values, dtype=torch.long)


def cut(outputs, inputs, **more):
    return Cut(index(*outputs), index(*inputs), **more)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), lambda w: w[[0, 3]][:, [1, 2]]),
    "conv": (lambda: nn.Conv2d(4, 5, 3), lambda w: w[[0, 3]][:, [1, 2]]),
    "grouped": (lambda: nn.Conv1d(8, 4, 3, groups=2), lambda w: w[[0, 3]][:, [1, 2]]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 5, 3), lambda w: w[[1, 2]][:, [0, 3]]),
    "transposed in groups": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), lambda w: w[[0, 3]]),
    "embedding": (lambda: nn.Embedding(7, 4), lambda w: w[:, [0, 3]]),
    "norm": (lambda: nn.BatchNorm1d(4), lambda w: w[[0, 3]]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_left_is_a_slice(kind):
    build, part = LAYERS[kind]
    layer = build()
    left = left_of(layer, cut([0, 3], [1, 2]))
    assert torch.equal(left["weight"], part(layer.weight.detach()))
    assert left.keys() == layer.state_dict().keys()
    for key, t in left.items():
        if t.ndim == 1:
            assert torch.equal(t, layer.state_dict()[key][[0, 3]])
    if kind == "norm":
        assert left["num_batches_tracked"].shape == ()
        assert left["num_batches_tracked"] is not layer.num_batches_tracked


def test_all_inputs_stay_where_all_are_kept_and_a_bias_that_took_something_over_is_cut_too():
    layer = nn.Linear(3, 4)
    bias = torch.arange(4, dtype=torch.float64)
    left = left_of(layer, cut([1, 2], [0, 1, 2], bias=bias))
    assert torch.equal(left["weight"], layer.weight[[1, 2]])
    assert torch.equal(left["bias"], torch.tensor([1.0, 2.0]))
    assert left["bias"].dtype == layer.bias.dtype
    assert not any(t.requires_grad for t in left.values())


def test_two_cuts_are_one_in_indices_of_the_first_layer():
    first = {"a": cut([0, 2, 4], [1, 3]), "b": cut([1], [1])}
    then = {"a": cut([1, 2], [1]), "c": cut([0], [2])}
    both = composed(first, then)
    assert {name: (one.outputs.tolist(), one.inputs.tolist()) for name, one in both.items()} == {
        "a": ([2, 4], [3]),
        "b": ([1], [1]),
        "c": ([0], [2]),
    }
    assert both["b"] is first["b"]
    assert both["a"].widths == (2, 1, 0)
    assert cut([0], [0, 1], pick=index(0, 1)).widths == (1, 2, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(4, 4), (2, 3, 4), 2),
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5), 1),
        (nn.Conv2d(4, 4, 1), (4, 5, 5), 0),
        (nn.BatchNorm1d(4), (2, 4), 1),
    ],
)
def test_channels_lie_behind_the_batch_and_before_the_kernels_axes(layer, shape, axis):
    assert channel_axis(layer, torch.empty(shape)) == axis


# A net that is cut: the channel 2 of `a` is always zero, and `b` does not read it.


def net():
    torch.manual_seed(0)
    model = sequential(a=nn.Conv2d(2, 3, 3), act=nn.ReLU(), b=nn.Conv2d(3, 4, 1), act2=nn.ReLU(), c=nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2], model.c.weight[:, 3] = 0, 0, 0
    return model.double().eval()


X = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXAMPLE = Example(net(), X)
CUTS = {"a": cut([0, 1], [0, 1]), "b": cut([0, 1, 2], [0, 1]), "c": cut([0, 1], [0, 1, 2])}


def before(*names):
    return trail(net(), EXAMPLE, X, names)


def test_a_net_with_all_cuts_gives_the_same_and_its_layers_are_slices():
    small = narrowed(net(), CUTS)
    assert [tuple(small.get_submodule(name).weight.shape[:2]) for name in "abc"] == [(2, 2), (3, 2), (2, 3)]
    assert not any(p.requires_grad for p in small.parameters())
    assert torch.allclose(small(X), net()(X), rtol=0, atol=1e-12)
    assert departure(small, EXAMPLE, X, before("c"), CUTS) is None


def test_channels_that_still_arrive_are_left_out_before_the_layer():
    picks = {"c": cut([0, 1], [0, 1, 2], pick=index(0, 1, 2))}
    small = narrowed(net(), picks)
    assert small.c.weight.shape[1] == 3
    assert torch.allclose(small(X), net()(X), rtol=0, atol=1e-12)
    assert departure(small, EXAMPLE, X, before("b", "c"), picks) is None


def test_a_trail_is_what_every_layer_gave_call_by_call():
    seen = before("a", "b")
    assert seen.keys() == {"", "a", "b"}
    assert torch.equal(seen[""][0], net()(X))
    assert torch.equal(seen["a"][0], net().a(X))
    twice = nn.Sequential(shared := nn.Linear(2, 2), shared).double()
    x = torch.ones(1, 2, dtype=torch.float64)
    assert [t.shape for t in trail(twice, Example(twice, x), x, ["0"])["0"]] == [(1, 2), (1, 2)]


@pytest.mark.parametrize("last", [nn.Linear(9, 2).double(), nn.Threshold(1e9, float("nan"))], ids=["fails", "nan"])
def test_a_model_that_cannot_run_or_says_nothing_has_no_trail(last):
    model = nn.Sequential(nn.Linear(2, 2).double(), last)
    x = torch.ones(1, 2, dtype=torch.float64)
    assert trail(model, Example(model, x), x, ["0"]) is None
    assert not model[0]._forward_hooks


def test_the_first_layer_that_gives_something_else_is_named():
    seen = before("a", "b", "c")
    model = net()
    with torch.no_grad():
        model.b.bias[0] += 1e-3
    assert departure(model, EXAMPLE, X, seen, {}) == Departure("b")
    assert departure(net(), EXAMPLE, X, seen, {}) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_with_fewer_channels_is_held_against_what_is_left_and_read():
    seen = before("a")
    live = {"a": cut([0, 1], [0, 1], live=torch.tensor([True, False])), "b": CUTS["b"], "c": CUTS["c"]}
    assert departure(narrowed(net(), live), EXAMPLE, X, seen, live) is None
    assert departure(narrowed(net(), CUTS), EXAMPLE, X, seen, CUTS) == Departure(
        "a"
    )  # of which nobody said what is read
    moved = narrowed(net(), live)
    with torch.no_grad():
        moved.a.bias[1] += 1  # what nobody reads of it
    assert departure(moved, EXAMPLE, X, {"a": seen["a"], "": [moved(X)]}, live) is None
    with torch.no_grad():
        moved.a.bias[0] += 1
    assert departure(moved, EXAMPLE, X, seen, live) == Departure("a")


def test_an_output_that_changed_behind_the_layers_has_no_name():
    seen = before("a")
    model = net()
    with torch.no_grad():
        model.c.bias += 1
    assert departure(model, EXAMPLE, X, seen, {}) == Departure("")
    model.c = nn.Conv2d(9, 2, 1).double()  # it cannot run
    assert departure(model, EXAMPLE, X, seen, {}) == Departure("a", "out")  # the last that was reached


def test_a_layer_that_is_no_longer_called_is_named():
    seen = before("a", "b")
    model = net()
    b = model.b
    model.forward = lambda x: model.c(model.act2(nn.functional.conv2d(model.act(model.a(x)), b.weight, b.bias)))
    assert torch.equal(model(X), net()(X))
    assert departure(model, EXAMPLE, X, seen, {}) == Departure("b")


def test_train_flags_are_what_they_were():
    model = net()
    model.act.train()
    departure(model, EXAMPLE, X, before("a"), {})
    assert [module.training for module in model] == [False, True, False, False, False]
