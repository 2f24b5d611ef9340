"""Distillation: zero where both agree, its gradient towards the original, and its scale against torch's own losses."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from taut.errors import CallError, DataError
from taut.training.losses import TEMPERATURE, Objective, Reading


def distillation(kinds, original, output):
    return Reading.of(original, kinds).distance(original, output)


OUTPUTS = {
    "logits": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    "probabilities": torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).softmax(-1),
    "sigmoid": torch.rand(6, 5, generator=torch.Generator().manual_seed(0)),
    "values": torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_nothing_to_learn_where_both_agree(kind):
    output = OUTPUTS[kind].clone().requires_grad_()
    loss = distillation([kind], OUTPUTS[kind], output)
    loss.backward()
    slope = output.grad - (output.grad.mean(-1, keepdim=True) if kind == "probabilities" else 0)  # they sum to one
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert float(slope.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_step_against_the_gradient_comes_closer(kind):
    other = (OUTPUTS[kind].flip(0) * 0.75 + 0.05).requires_grad_()  # rows of five still sum to one
    before = distillation([kind], OUTPUTS[kind], other)
    before.backward()
    after = distillation([kind], OUTPUTS[kind], other.detach() - 1e-3 * other.grad)
    assert 0 < after.item() < before.item()


def test_logits_are_hintons_loss():
    p, q = torch.randn(4, 7), torch.randn(4, 7)
    soft, mine = ((t / TEMPERATURE).softmax(-1) for t in (p, q))
    expected = TEMPERATURE**2 * (soft * (soft / mine).log()).sum(-1).mean()
    torch.testing.assert_close(distillation(["logits"], p, q), expected)


def test_sigmoid_is_the_bernoulli_divergence():
    p, q = torch.rand(4, 7) * 0.9 + 0.05, torch.rand(4, 7) * 0.9 + 0.05
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    torch.testing.assert_close(distillation(["sigmoid"], p, q), expected)


def test_several_outputs_add_up():
    a, b = OUTPUTS["logits"], OUTPUTS["values"]
    both = distillation(["logits", "values"], (a, {"map": b}), (a + 1e-1, {"map": b + 1e-1}))
    one = distillation(["values"], b, b + 1e-1)
    torch.testing.assert_close(both, one)  # a shift of all logits changes nothing


def test_outputs_must_match():
    with pytest.raises(DataError, match="same shapes"):
        distillation(["logits"], torch.randn(2, 3), torch.randn(2, 4))


def test_shares_of_loss_and_distillation():
    output, targets, original = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    label, soft = functional.cross_entropy(output, targets), distillation(["logits"], original, output)
    mixed = Objective(nn.functional.cross_entropy, 0.25, ["logits"])
    mixed.settle(original)
    torch.testing.assert_close(mixed(output, targets, original), 0.75 * label + 0.25 * soft)
    assert not Objective(nn.functional.cross_entropy, None).distills
    assert Objective(None, None).distills


def test_what_is_missing_is_named():
    with pytest.raises(CallError, match="needs a loss"):
        Objective(None, 0.5)
    with pytest.raises(DataError, match="needs targets"):
        Objective(nn.functional.cross_entropy, None)(torch.randn(2, 3), None, None)


def test_values_are_measured_on_one_scale_whatever_the_batch():
    original = torch.randn(8, 2, 3, 3)
    reading = Reading.of(original, output="values")
    whole = reading.distance(original, original * 1.01)
    parts = [reading.distance(one, one * 1.01) for one in original.split(1)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert reading.scales[0] == pytest.approx(float(original.var(0, correction=0).mean()), rel=1e-5)
    assert 0 < float(Reading.of(original[:1], ["values"]).distance(original[:1], original[:1] * 1.01)) < 1e-3


def test_the_kind_that_is_known_or_wished_is_taken():
    boxes = torch.randn(4, 4)
    assert Reading.of(boxes).kinds == ("logits",)
    assert Reading.of(boxes, output="values").kinds == ("values",)
    assert Reading.of(boxes, ["values"]).kinds == ("values",)
    with pytest.raises(DataError, match="floating-point"):
        Reading.of(torch.ones(2, dtype=torch.long))
