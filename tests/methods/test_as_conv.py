"""Convolutions with a forward of their own, and those that only seem to be convolutions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import taut
from cases import StandardConv, own_conv
from taut.methods import as_conv
from taut.nn import SamePad
from taut.structure import own_forms
from taut.structure.conv_form import conv_form
from taut.structure.support import CONVOLUTION
from taut.types import Plan, Step


def overriding(forward, kind=nn.Conv2d):
    return type("Own", (kind,), {"forward": forward})


def standardized(self, x):
    normed = functional.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
    return self._conv_forward(x, normed.reshape(self.weight.shape), self.bias)


def by_size(x, kernel, stride, dilation):
    """As TensorFlow pads: an oracle of its own."""
    flat = []
    for n, k, s, d in list(zip(x.shape[2:], kernel, stride, dilation, strict=True))[::-1]:
        more = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        flat += [more // 2, more - more // 2]
    return functional.pad(x, flat)


def same(self, x):
    x = by_size(x, self.kernel_size, self.stride, self.dilation)
    return torch.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def rounded(self, x):
    step = self.weight.abs().max() / 7
    return self._conv_forward(x, self.weight + ((self.weight / step).round() * step - self.weight).detach(), self.bias)


def one_sided(self, x):
    return functional.conv2d(functional.pad(x, (0, 1, 2, 0)), self.weight, self.bias, self.stride)


def causal(self, x):
    x = functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
    return functional.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation)


def mirrored(self, x):
    return functional.conv2d(functional.pad(x, (1, 1, 1, 1), "reflect"), self.weight, self.bias, self.stride)


def mirrored_unevenly(self, x):
    return functional.conv2d(functional.pad(x, (0, 1, 1, 0), "reflect"), self.weight, self.bias, self.stride)


def scaled(self, x):
    return self._conv_forward(x * 0.5, self.weight, None) * self.weight.abs().sum((1, 2, 3))[:, None, None] + 1.0


class Bare(nn.Module):
    """No subclass of a convolution at all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.groups = 2

    def forward(self, x):
        return functional.conv2d(x, self.weight, stride=(2, 1), padding=1, groups=2)


class Wrapper(nn.Conv2d):
    """As detectron2's, with nothing behind it."""

    def __init__(self, *arguments, **settings):
        norm, activation = settings.pop("norm", None), settings.pop("activation", None)
        super().__init__(*arguments, **settings)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


CONVOLUTIONS = {
    "standardized": lambda: overriding(standardized)(4, 6, 3, padding=1),
    "standardized, in groups": lambda: overriding(standardized)(4, 6, 3, stride=2, groups=2, bias=False),
    "scaled, padded by size": lambda: StandardConv(4, 6, 3, stride=2),
    "padded by size, stride 1": lambda: overriding(same)(4, 6, 3),
    "padded by size, even kernel": lambda: overriding(same)(4, 6, 4),
    "padded by size, stride 3": lambda: overriding(same)(4, 6, (5, 2), stride=(3, 2)),
    "padded by size, dilated": lambda: overriding(same)(4, 6, 3, stride=2, dilation=(2, 1)),
    "rounded": lambda: overriding(rounded)(4, 6, 3),
    "on two sides": lambda: overriding(one_sided)(4, 6, 3, stride=2),
    "causal": lambda: overriding(causal, nn.Conv1d)(4, 6, 3, dilation=2),
    "mirrored": lambda: overriding(mirrored)(4, 6, 3, stride=2),
    "mirrored unevenly": lambda: overriding(mirrored_unevenly)(4, 6, 3, stride=2),
    "scaled before and behind": lambda: overriding(scaled)(4, 6, 3, padding=1),
    "no subclass": Bare,
    "a wrapper": lambda: Wrapper(4, 6, 3, padding=1),
    "three axes": lambda: overriding(lambda self, x: self._conv_forward(x, self.weight * 2, self.bias), nn.Conv3d)(
        4, 6, (3, 1, 2), padding=(1, 0, 1)
    ),
    "torch's own padding": lambda: overriding(lambda self, x: self._conv_forward(x, self.weight * 2, self.bias))(
        4, 6, (4, 3), padding="same", padding_mode="circular"
    ),
}


def noted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self._conv_forward(x, self.weight * self.calls, self.bias)


def wider_far_out(self, x):
    return functional.conv2d(functional.pad(x, [x.shape[-1] // 4] * 4), self.weight, self.bias)


def turned(self, x):
    return self._conv_forward(x.flip(-1), self.weight, self.bias)


OTHERS = {
    "activated": lambda self, x: self._conv_forward(x, self.weight, self.bias).relu(),
    "activated far out": lambda self, x: self._conv_forward(x, self.weight, self.bias).clamp(-20, 20),
    "of its input": lambda self, x: self._conv_forward(x, self.weight * x.mean(), self.bias),
    "dropped in training": lambda self, x: self._conv_forward(
        x, functional.dropout(self.weight, 0.5, self.training), self.bias
    ),
    "with a state": noted,
    "twice": lambda self, x: self._conv_forward(x, self.weight, None) + self._conv_forward(x, self.weight, self.bias),
    "cropped": lambda self, x: self._conv_forward(x[..., 1:], self.weight, self.bias),
    "turned": turned,
    "padded in its own way": wider_far_out,
    "padded with ones": lambda self, x: self._conv_forward(functional.pad(x, [1] * 4, value=1.0), self.weight, None),
    "a pair": lambda self, x: (self._conv_forward(x, self.weight, self.bias), x),
    "in single precision": lambda self, x: functional.conv2d(x.float(), self.weight.float()).to(x),
    "pooled": lambda self, x: functional.max_pool2d(self._conv_forward(x, self.weight, self.bias), 2),
    "normed": lambda self, x: functional.instance_norm(self._conv_forward(x, self.weight, self.bias)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_become_plain_ones_that_compute_the_same_at_every_size(name, tmp_path):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]()
    axes = layer.weight.ndim - 2
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 4, *(9, 12, 7)[:axes])
    net = taut.trace(model, x)
    assert net["0"].skip == CONVOLUTION
    before = copy.deepcopy(model.state_dict())
    small = taut.apply(model, Plan.of(net, [Step(("0",), "as_conv")]), taut.observe(net, model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kinds = {type(part) for part in small[0].modules() if not list(part.children())}
    assert {kind for kind in kinds if not kind.__module__.startswith("torch.nn.")} <= {SamePad}
    for size in ((9, 12, 7), (8, 8, 8), (13, 10, 9), (5, 11, 6)):
        y = torch.randn(3, 4, *size[:axes]) * 3
        torch.testing.assert_close(small(y), model(y), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(small.train()(y), model.train()(y), rtol=1e-4, atol=1e-4)
        small.eval()
        model.eval()
    taut.save(small, Plan.of(net, [Step(("0",), "as_conv")]), tmp_path / "small")
    torch.manual_seed(1)
    again = taut.load(tmp_path / "small", base=lambda: nn.Sequential(CONVOLUTIONS[name]()))
    assert torch.equal(again(x), small(x))
    small(x.requires_grad_()).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_stays(name):
    torch.manual_seed(0)
    layer = overriding(OTHERS[name])(4, 6, 3, padding=1)
    assert conv_form(layer) is None


def test_what_has_something_behind_it_stays_and_so_do_transposed_ones_and_experts():
    assert conv_form(Wrapper(4, 6, 3, norm=nn.BatchNorm2d(6))) is None
    assert conv_form(Wrapper(4, 6, 3, activation=functional.relu)) is None
    assert conv_form(nn.ConvTranspose2d(4, 6, 3)) is None
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.randn(3, 4, 5))
    experts.forward = lambda x: torch.einsum("nd,edo->neo", x, experts.weight)
    assert conv_form(experts) is None


def test_compress_does_it_first_and_load_again(tmp_path):
    model, x = own_conv().eval(), torch.randn(64, 4, 9, 10)
    result = taut.compress(model, x, budget=taut.Budget(macs=0.5), data=[x], methods="low rank", compare=False)
    assert {"as_conv"} == {step.method for step in result.plan.steps[:2]}
    assert any(step.layers == ("strided",) and step.method != "as_conv" for step in result.plan.steps)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    result.save(tmp_path / "small")
    other = torch.randn(3, 4, 12, 11)
    assert torch.equal(taut.load(tmp_path / "small", base=own_conv)(other), result.model(other))


def test_layers_that_nothing_else_changes_keep_their_own_form():
    model, x = own_conv().eval(), torch.randn(8, 4, 9, 10)
    result = taut.compress(model, x, budget=taut.Budget(macs=0.9), keep=["odd"], compare=False)
    assert type(result.model.odd) is StandardConv
    assert torch.equal(result.model.odd.gain, model.odd.gain)
    assert type(result.model.plain) is not nn.Conv2d or type(result.model.strided) is not StandardConv


def test_weights_are_those_of_the_layers_own_dtype():
    """What is rounded by steps may round otherwise in float64."""
    layer = overriding(rounded)(16, 24, 3).bfloat16()
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 16, 6, 6).bfloat16()
    net = taut.trace(model, x)
    small = taut.apply(model, Plan.of(net, [Step(("0",), "as_conv")]), taut.observe(net, model))
    assert torch.equal(small(x), model(x))


def test_inspect_counts_what_it_becomes():
    seen = taut.inspect(own_conv().eval(), torch.randn(2, 4, 9, 10))
    assert seen.share("low rank", "macs") == 1
    assert "as_conv first" in str(seen)


def test_the_padding_exports_as_it_is(tmp_path):
    model, x = own_conv().eval(), torch.randn(4, 4, 9, 10)
    net = taut.trace(model, x)
    small = taut.apply(model, Plan.of(net, [Step(("strided",), "as_conv")]), taut.observe(net, model))
    made = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(parity.holds for parity in taut.export(small, x, tmp_path / "small.onnx").parity)


@pytest.mark.parametrize("name", ["standardized", "scaled before and behind", "scaled, padded by size"])
def test_a_form_is_shown_once_and_its_weight_computed_anew(name, monkeypatch):
    shown = []
    monkeypatch.setattr(own_forms, "conv_form", lambda module: shown.append(module) or conv_form(module))
    model = nn.Sequential(CONVOLUTIONS[name]()).eval()
    net = taut.trace(model, torch.randn(2, 4, 9, 9), [torch.randn(3, 4, 11, 11)])
    assert net["0"].skip == CONVOLUTION
    assert len(shown) == 1
    known, wide = net.forms["0"], copy.deepcopy(model[0]).double()
    assert known.conv.weight.numel() == 0
    wide.weight.data.mul_(1.5)  # what it is computed from may be another by now
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    if name != "scaled before and behind":  # a gain that the weight decides belongs to its values then
        torch.testing.assert_close(known.of(wide)(x), wide(x))
    torch.testing.assert_close(known.of(copy.deepcopy(model[0]).double())(x), copy.deepcopy(model[0]).double()(x))


def test_carrying_out_what_was_traced_shows_nothing_again(monkeypatch):
    model, x = nn.Sequential(CONVOLUTIONS["standardized"]()).eval(), torch.randn(2, 4, 9, 9)
    net = taut.trace(model, x)
    stats = taut.observe(net, model, None)
    monkeypatch.setattr(as_conv, "conv_form", lambda module: pytest.fail("it was shown before"))
    small = taut.apply(model, Plan.of(net, [Step(("0",), "as_conv")]), stats)
    assert type(small[0]) is nn.Conv2d
    torch.testing.assert_close(small(x), model(x))


def test_where_what_was_traced_no_longer_holds_the_layer_stays():
    model, x = nn.Sequential(CONVOLUTIONS["scaled before and behind"]()).eval(), torch.randn(2, 4, 9, 9)
    net = taut.trace(model, x)
    stats = taut.observe(net, model, None)
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(1, 9, len(model[0].weight))[:, None, None, None])
    with pytest.warns(UserWarning, match="the output on the example changed although the method is exact"):
        small = taut.apply(model, Plan.of(net, [Step(("0",), "as_conv")]), stats)
    assert type(small[0]) is type(model[0])
    assert torch.equal(small(x), model(x))
