"""Layers that compute what a plain layer does, but would lose something there: they stay, with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

import taut
from taut.nn import Recurrent
from taut.structure.losses import PARTLY_TRAINED, STATE, ZEROS
from taut.structure.support import COMPUTED, CONVOLUTION, JOINED, LINEAR, RECURRENT


def masked(kind, **more):
    """A layer whose weight is masked at every call; nothing of the mask is in its weight."""

    class Masked(kind):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.register_buffer("mask", torch.ones_like(self.weight).flatten(1).tril().view_as(self.weight))

        forward = more.get("forward")

    return Masked


def masked_in_place(self, x):
    """As PixelCNNs do: the mask is in the weight from the first call on."""
    self.weight.data *= self.mask
    return self._conv_forward(x, self.weight, self.bias)


class Mask(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like).tril())

    def forward(self, weight):
        return weight * self.mask


class Frozen(nn.Linear):
    """A mask that is a frozen parameter."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mask = nn.Parameter(torch.ones_like(self.weight).tril(), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight * self.mask, self.bias)


def parametrized():
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight))
    return layer


def already_masked():
    layer = masked(nn.Conv2d, forward=masked_in_place)(4, 6, 3, padding=1)
    layer.weight.data *= layer.mask
    return layer


linear_mask = masked(nn.Linear, forward=lambda self, x: functional.linear(x, self.weight * self.mask, self.bias))
conv_mask = masked(nn.Conv2d, forward=lambda self, x: self._conv_forward(x, self.weight * self.mask, self.bias))
FLAT, IMAGE = (8, 6), (4, 4, 9, 9)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: linear_mask(6, 5), FLAT),
        (parametrized, FLAT),
        (lambda: conv_mask(4, 6, 3, padding=1), IMAGE),
        (already_masked, IMAGE),
    ],
)
def test_structural_zeros_stay(make, shape):
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert taut.trace(model, torch.randn(shape))["0"].skip == ZEROS
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_mask_that_is_a_frozen_parameter_stays():
    assert taut.trace(nn.Sequential(Frozen(6, 5)).eval(), torch.randn(8, 6))["0"].skip == PARTLY_TRAINED
    frozen = nn.Sequential(Frozen(6, 5)).eval().requires_grad_(False)
    assert taut.trace(frozen, torch.randn(8, 6))["0"].skip == ZEROS


def test_a_masked_autoencoder_stays_one():
    torch.manual_seed(0)
    model = nn.Sequential(linear_mask(12, 12), nn.ReLU(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    x = torch.randn(64, 12)
    small = taut.compress(model, x, budget={"params": 0.8}, data=[x], compare=False).model
    jacobian = torch.func.jacrev(small[0])(x[0])
    assert not jacobian.triu(1).any()
    assert jacobian.any()


def test_zeros_that_other_parameters_would_fill_are_no_structure():
    class Gained(nn.Conv2d):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.gain = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))

        def forward(self, x):
            return self._conv_forward(x, self.weight * self.gain, self.bias)

    def ternary(self, x):
        return functional.linear(x, (self.weight / self.weight.abs().mean()).round().clamp(-1, 1), self.bias)

    torch.manual_seed(0)
    assert taut.trace(nn.Sequential(Gained(4, 6, 3)).eval(), torch.randn(IMAGE))["0"].skip == CONVOLUTION
    rounded = type("Ternary", (nn.Linear,), {"forward": ternary})(6, 5)
    assert taut.trace(nn.Sequential(rounded).eval(), torch.randn(FLAT))["0"].skip == LINEAR
    pruned = prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5)
    assert taut.trace(nn.Sequential(pruned).eval(), torch.randn(FLAT))["0"].skip == COMPUTED


class Observed(nn.Conv2d):
    """Keeps the largest input of training, as layers do that are to be quantized."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return super().forward(x)


class Averaged(nn.Linear):
    """Keeps a running mean of its inputs."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_buffer("mean", torch.zeros(self.in_features))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return super().forward(x)


def counting(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return nn.Conv2d.forward(self, x)


def logging(self, x):
    self.seen = (*getattr(self, "seen", ()), x.shape[0])
    return nn.Linear.forward(self, x)


def caching(self, x):
    if getattr(self, "scaled", None) is None or self.training:
        self.scaled = self.weight * 2
    return functional.linear(x, self.scaled, self.bias)


def overriding(kind, forward, *arguments):
    return type("Own", (kind,), {"forward": forward})(*arguments)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Observed(4, 6, 3), IMAGE),
        (lambda: Averaged(6, 5), FLAT),
        (lambda: overriding(nn.Conv2d, counting, 4, 6, 3), IMAGE),
        (lambda: overriding(nn.Linear, logging, 6, 5), FLAT),
    ],
)
def test_what_keeps_a_state_stays(make, shape):
    torch.manual_seed(0)
    assert taut.trace(nn.Sequential(make()).eval(), torch.randn(shape))["0"].skip == STATE


def test_a_copy_of_its_weight_is_no_state():
    layer = overriding(nn.Linear, caching, 6, 5)
    assert taut.trace(nn.Sequential(layer).eval(), torch.randn(FLAT))["0"].skip == LINEAR


def rolled(self, x):
    return nn.Conv2d.forward(self, torch.cat([x[:, :1].roll(1, 0), x[:, 1:]], 1))


def clamped(self, x):
    return nn.Conv2d.forward(self, x.clamp(-1e4, 1e4))


def large(self, x):
    y = nn.Conv2d.forward(self, x)
    return y if x.shape[-1] < 32 else y * 0.5


def long(self, x):
    y = nn.Linear.forward(self, x) * 2
    return y.cumsum(-2) if y.ndim > 2 and y.shape[1] > 8 else y


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: overriding(nn.Conv2d, rolled, 4, 6, 3), torch.ones(IMAGE)),
        (lambda: overriding(nn.Conv2d, clamped, 4, 6, 3), torch.full(IMAGE, 1e5)),
        (lambda: overriding(nn.Conv2d, large, 4, 6, 3), torch.ones(2, 4, 32, 40)),
        (lambda: overriding(nn.Linear, long, 6, 5), torch.ones(2, 9, 6)),
    ],
)
def test_what_is_something_else_at_other_batches_sizes_and_magnitudes_stays(layer, x):
    torch.manual_seed(0)
    model = nn.Sequential(layer()).eval()
    assert taut.trace(model, x * torch.randn(x.shape))["0"].skip not in {LINEAR, CONVOLUTION, None}


def test_sizes_that_the_data_bring_count_too():
    torch.manual_seed(0)
    model = nn.Sequential(overriding(nn.Conv2d, large, 4, 6, 3), nn.AdaptiveAvgPool2d(1)).eval()
    net = taut.trace(model, torch.randn(2, 4, 16, 16), [torch.randn(4, 4, 40, 40)])
    assert "on what the network gives it" in net["0"].skip


class Adapted(nn.Linear):
    """A frozen weight with a thin product that is trained."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Adapter(nn.Module):
    """The same as a parametrization."""

    def __init__(self, like):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, like.shape[1])), nn.Parameter(torch.randn(like.shape[0], 2))

    def forward(self, weight):
        return weight + self.up @ self.down


def test_adapters_stay_and_what_is_trained_as_a_whole_goes():
    torch.manual_seed(0)
    x, layer = torch.randn(FLAT), nn.Linear(6, 5)
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Adapter(layer.weight))
    assert taut.trace(nn.Sequential(layer).eval(), x)["0"].skip == PARTLY_TRAINED
    assert taut.trace(nn.Sequential(Adapted(6, 5)).eval(), x)["0"].skip == PARTLY_TRAINED
    for learns in (True, False):
        model = nn.Sequential(Adapted(6, 5).requires_grad_(learns)).eval()
        net = taut.trace(model, x)
        assert net["0"].skip == LINEAR
        made = taut.apply(model, taut.Plan.of(net, [taut.Step(("0",), "as_linear")]), taut.observe(net, model))
        assert {p.requires_grad for p in made.parameters()} == {learns}


def test_a_bias_that_alone_is_trained_stays_so():
    def doubled(self, x):
        return functional.linear(x, self.weight * 2, self.bias)

    layer = overriding(nn.Linear, doubled, 6, 5)
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer).eval()
    net = taut.trace(model, torch.randn(FLAT))
    made = taut.apply(model, taut.Plan.of(net, [taut.Step(("0",), "as_linear")]), taut.observe(net, model))
    assert (made[0].weight.requires_grad, made[0].bias.requires_grad) == (False, True)


def test_recurrent_layers_keep_what_is_trained_of_them():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 4, bidirectional=True)

        def forward(self, x):
            return self.lstm(x)[0]

    model, x = Last().eval(), torch.randn(5, 3, 6)
    model.lstm.weight_hh_l0.requires_grad_(False)
    model.lstm.bias_ih_l0.requires_grad_(False)
    model.lstm.bias_ih_l0_reverse.requires_grad_(False)
    assert taut.trace(model, x)["lstm"].skip == RECURRENT
    again = Recurrent.of(model.lstm).restored()
    flags = {name: p.requires_grad for name, p in model.lstm.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
    model.lstm.weight_ih_l0.requires_grad_(False)
    assert taut.trace(model, x)["lstm"].skip == JOINED
