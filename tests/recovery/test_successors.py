"""What follows a layer, step by step: who reads its output, what that becomes, and what the layer should give then."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from taut.recovery.successors import Following, Follows

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def watched(forward):
    """The trails behind the layers `a` and `b` of a net that computes `forward(watch, layer)`."""
    watch = Following(lambda _, t: t.clone())
    layers = {name: nn.Linear(4, 4) for name in "abc"}

    def layer(name, x):
        watch.enter(name, x)
        with watch.looking_away():
            y = layers[name](x)
        watch.layer(name, y)
        watch.leave(name, y)
        return y

    with watch, torch.no_grad():
        output = forward(layer)
        watch.returned(output)
    return watch


def behind(forward, name="a"):
    """What is certain behind a layer: (is there a sum, its partner, is it rectified); None for nothing."""
    found = watched(forward).certain(name)
    return None if found is None else (found[0].total is not None, found[0].partner, found[1])


@pytest.mark.parametrize("relu", [torch.relu, F.relu, lambda y: y.relu(), torch.relu_, lambda y: y.relu_()])
def test_every_relu_is_one(relu):
    assert behind(lambda layer: relu(layer("a", X))) == (False, None, True)


@pytest.mark.parametrize("other", [torch.tanh, F.gelu, lambda y: y.clamp(min=0.0), F.leaky_relu])
def test_nothing_else_is(other):
    assert behind(lambda layer: other(layer("a", X))) is None


@pytest.mark.parametrize(
    "add",
    [
        lambda y, z: y + z,
        lambda y, z: z + y,
        torch.add,
        lambda y, z: y.add(z),
        lambda y, z: y.add_(z),
        lambda y, z: y.__iadd__(z),
        lambda y, z: y.__radd__(z),
    ],
)
def test_every_sum_is_one_and_its_other_summand_is_found(add):
    def forward(layer):
        return add(layer("a", X), layer("b", torch.tanh(X)))

    assert behind(forward, "b") == (True, ("out", "a"), False)
    assert behind(forward, "a") is None  # the later one makes up for the earlier


def test_sums_that_are_none():
    for add in (
        lambda y, z: torch.add(y, z, alpha=2),
        lambda y, z: y + z[:1],
        lambda y, z: y + 1.0,
        lambda y, z: y - z,
    ):
        assert behind(lambda layer, add=add: add(layer("a", X), X)) is None

    def doubled(layer):
        y = layer("a", X)
        return y + y

    assert behind(doubled) is None


def test_the_sum_is_noted_as_it_was_and_a_summand_of_no_module_has_no_place():
    noise = torch.ones(5, 4)
    kept = []

    def forward(layer):
        total = layer("a", X) + noise
        kept.append(total.clone())
        return torch.relu_(total)

    watch = watched(forward)
    trail, rectified = watch.certain("a")
    assert rectified is False  # `clone` read the sum, too
    assert trail.partner is None
    assert torch.equal(trail.total, kept[0])


def test_what_is_read_twice_is_not_certain():
    def beside(layer):
        y = layer("a", X)
        return torch.relu(y), y

    def before_the_sum(layer):
        y = layer("a", X)
        return torch.relu(y + X), y.mean()

    def behind_the_sum(layer):
        total = layer("a", X) + X
        return torch.relu(total), total

    assert behind(beside) is None
    assert behind(before_the_sum) is None
    assert behind(behind_the_sum) == (True, ("in", "a"), False)


def test_sizes_are_no_use_of_values():
    def forward(layer):
        y = layer("a", X)
        assert y.shape == (5, 4)
        assert (y.dim(), y.numel(), len(y), y.is_contiguous()) == (2, 20, 5, True)
        return torch.relu(y)

    assert behind(forward) == (False, None, True)


def test_what_hooks_of_ours_read_does_not_count():
    watch = Following(lambda _, t: t)
    with watch:
        y = X * 1
        watch.layer("a", y)
        with watch.looking_away():
            y.mean()
            with watch.looking_away():
                y.sum()
            y.mean()
        watch.returned(torch.relu(y))
    assert watch.certain("a")[1]


def test_a_place_with_several_tensors_is_none():
    def forward(layer):
        first = layer("b", X)
        layer("b", torch.tanh(X))
        return layer("a", X * 2) + first

    assert behind(forward) == (True, None, False)


def test_a_summand_changed_in_place_is_no_longer_what_the_module_gave():
    def forward(layer):
        first = layer("b", X)
        first.mul_(2)
        return layer("a", X * 2) + first

    assert behind(forward) == (True, None, False)


def test_inputs_of_modules_are_places_too_and_the_first_one_is_kept():
    def forward(layer):
        y = layer("a", X)
        return layer("b", torch.tanh(y)) + X

    assert behind(forward, "b") == (True, ("in", "a"), False)


def test_a_norm_directly_behind_belongs_to_the_layer_and_a_second_one_does_not():
    watch = Following(lambda _, t: t.clone())
    with watch:
        y = X * 1
        watch.layer("a", y)
        z = torch.empty_like(y)
        watch.norm("first", y, z)
        watch.norm("second", z, torch.empty_like(z))
        watch.norm("foreign", X, torch.empty_like(X))
    assert watch.trails["a"].norm == "first"
    assert list(watch.trails) == ["a"]


# What a layer should give.


def channel(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def one(value):
    return torch.full((1, 1, 1), float(value), dtype=torch.float64)


ROWS = channel(-1, 0, 2)


def test_without_anything_new_a_layer_aims_at_what_it_gave():
    for follows in (
        Follows(one(2), one(1), None, None, rectified=True),
        Follows(one(2), one(1), channel(5, -5, 7), None, rectified=False),
    ):
        assert torch.allclose(follows.aim(ROWS, None), ROWS)


def test_a_branch_that_lost_something_is_made_up_for():
    """z = 2 y + 1 + other; the other summand is now smaller by 3."""
    other = channel(1, 1, 1)
    follows = Follows(one(2), one(1), 2 * ROWS + 1 + other, ("out", "b"), rectified=False)
    assert torch.allclose(follows.aim(ROWS, other - 3), ROWS + 1.5)
    assert torch.allclose(follows.aim(ROWS, other), ROWS)


def test_what_is_negative_stays_negative_and_what_became_positive_goes_back_to_zero():
    """z = y - 1: negative for the first two; now one of them is far below, and one above zero."""
    follows = Follows(one(1), one(-1), None, None, rectified=True)
    aim = follows.aim(ROWS, None, channel(-7, 3, 5))
    assert torch.allclose(aim, channel(-7, 1, 2))  # as it is; to z = 0; as it was
    assert follows.seen() is None
    summed = Follows(one(1), one(-1), ROWS - 1, None, rectified=True)
    assert torch.allclose(summed.seen().aim(ROWS, None, channel(-7, 3, 5)), ROWS)


def test_channels_that_a_norm_switches_off_aim_at_what_they_gave():
    rows = torch.tensor([[[1.0, 2.0]]])
    follows = Follows(torch.tensor([[[1.0, 1e-4]]]), torch.zeros(1, 1, 2), torch.full((1, 1, 2), 9.0), None, False)
    assert torch.equal(follows.aim(rows, torch.zeros(1, 1, 2)), torch.tensor([[[9.0, 2.0]]]))


def test_a_layer_with_fewer_outputs_is_followed_by_what_is_left():
    ramp = torch.arange(3.0).reshape(1, 1, 3)
    follows = Follows(ramp, ramp + 1, ramp + 2, ("out", "b"), rectified=True)
    left = follows.narrowed(lambda t: t[..., [0, 2]])
    assert (left.scale.tolist(), left.shift.tolist(), left.total.tolist()) == ([[[0, 2]]], [[[1, 3]]], [[[2, 4]]])
    assert (left.partner, left.rectified) == (("out", "b"), True)
    assert Follows(ramp, ramp, None, None, rectified=True).narrowed(lambda t: t[..., :1]).total is None
