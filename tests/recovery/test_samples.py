"""Batches of a refit: joined only where the model then gives each the same."""

import torch
from torch import nn

import taut
from taut.recovery.samples import affordable, joined


class Apply(nn.Module):
    """A layer, called by a function."""

    def __init__(self, forward, layer=None):
        super().__init__()
        self.layer, self.function = layer or nn.Linear(4, 3), forward

    def forward(self, x):
        return self.function(self.layer, x)


def groups(model, example, batches):
    net = taut.trace(model.eval(), example)
    return joined(net.example, model, batches)


def test_batches_of_one_shape_become_one_and_others_stay_apart():
    a, b, odd = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 6, 4)
    one, other = groups(Apply(lambda layer, x: layer(x)), a, [a, odd, b])
    assert torch.equal(one, torch.cat([a, b]))
    assert other is odd


def test_what_all_samples_share_has_to_be_the_same():
    def scaled(layer, x):
        return layer(x["x"]) * x["factor"]

    batches = [{"x": torch.randn(n, 4), "factor": torch.tensor(f)} for n, f in ((3, 1.0), (2, 2.0), (4, 1.0))]
    both, alone = groups(Apply(scaled), batches[0], batches)
    assert len(both["x"]) == 7
    assert alone is batches[1]


def test_a_model_of_one_batch_size_gets_its_batches_as_they_come():
    x = [torch.randn(4, 4) for _ in range(3)]
    assert groups(Apply(lambda layer, x: layer(x.view(4, -1))), x[0], x) == x
    single = [torch.randn(1, 4) for _ in range(3)]
    assert groups(Apply(lambda layer, x: layer(x.view(1, -1))), single[0], single) == single


def test_samples_that_see_each_other_are_not_joined():
    x = [torch.randn(4, 4) for _ in range(3)]
    assert groups(Apply(lambda layer, x: layer(x - x.mean(0))), x[0], x) == x


def test_steps_in_time_are_no_samples():
    lstm = nn.LSTM(4, 3)
    x = [torch.randn(7, 2, 4) for _ in range(3)]
    (whole,) = groups(Apply(lambda layer, x: layer(x)[0], lstm), x[0], x)
    assert torch.equal(whole, torch.cat(x, 1))


def test_lists_of_images_are_joined_as_lists():
    x = [[torch.randn(4), torch.randn(4)], [torch.randn(4)]]
    (whole,) = groups(Apply(lambda layer, xs: [layer(x) for x in xs]), x[0], x)
    assert len(whole) == 3
    padded = Apply(lambda layer, xs: [layer(nn.functional.pad(x, (0, max(map(len, xs)) - len(x)))) for x in xs])
    padded.layer = nn.AdaptiveAvgPool1d(2)
    uneven = [[torch.randn(1, 4), torch.randn(1, 4)], [torch.randn(1, 6)]]
    assert len(groups(padded, uneven[0], uneven)) <= 2


def test_larger_images_than_the_example_are_fewer():
    model = nn.Conv2d(3, 4, 3)
    net = taut.trace(nn.Sequential(model).eval(), torch.randn(2, 3, 8, 8))
    batches = [(torch.randn(32, 3, 16, 16), None) for _ in range(4)]
    assert sum(len(x) for x in affordable(net.example, batches)) == 32
    same = [(torch.randn(32, 3, 8, 8), None) for _ in range(4)]
    assert sum(len(x) for x in affordable(net.example, same)) == 128
