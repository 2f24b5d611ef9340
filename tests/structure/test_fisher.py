"""How outputs are read, and the losses whose gradients weigh them."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from taut.errors import CallError
from taut.structure.fisher import KINDS, choose_kinds, divergence, float_outputs, output_kind, sampled_loss


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (torch.linspace(-2, 3, 12).reshape(4, 3), "logits"),
        (torch.linspace(-2, 3, 8).reshape(4, 2), "logits"),  # two classes are enough
        (torch.randn(4, 3).softmax(1), "probabilities"),
        (torch.randn(4, 7, 3).softmax(-1), "probabilities"),
        (torch.rand(4, 3) * 0.3, "sigmoid"),
        (torch.rand(4, 1), "sigmoid"),
        (torch.rand(4), "sigmoid"),
        (torch.linspace(-2, 3, 4)[:, None], "values"),
        (torch.randn(4, 3, 8, 8), "values"),
        (torch.linspace(-2, 3, 4), "values"),
        (torch.tensor(-1.5), "values"),
    ],
)
def test_output_kind(output, kind):
    assert output_kind(output) == kind


def test_kinds_of_nested_outputs_and_the_wish():
    output = {"a": torch.randn(4, 3), "b": (torch.rand(4, 5) * 0.1, torch.ones(4, dtype=torch.int64))}
    assert len(float_outputs(output)) == 2
    assert choose_kinds(output, "auto") == ["logits", "sigmoid"]
    for kind in KINDS:
        assert choose_kinds(output, kind) == [kind, kind]
    with pytest.raises(
        CallError, match=r"must be one of auto, logits, probabilities, sigmoid, values\. Got 'nonsense'"
    ):
        choose_kinds(output, "nonsense")


def fisher(output_of, kind, z, draws=4000):
    """Mean over draws of the outer product of gradients at z (one sample), by autograd."""
    random = torch.Generator().manual_seed(0)
    many = z.expand(draws, -1).clone().requires_grad_()
    (grad,) = torch.autograd.grad(sampled_loss(output_of(many), [kind], random), many)
    return grad.T @ grad / draws


@pytest.mark.parametrize(("kind", "output_of"), [("logits", lambda z: z), ("probabilities", lambda z: z.softmax(-1))])
def test_class_outputs_give_the_fisher_information_of_the_softmax(kind, output_of):
    z = torch.tensor([0.5, -1.0, 1.5])
    p = z.softmax(0)
    wanted = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(fisher(output_of, kind, z), wanted, rtol=0, atol=0.02)


def test_sigmoid_outputs_give_the_fisher_information_of_bernoullis():
    z = torch.tensor([0.5, -1.0, 2.0])
    p = z.sigmoid()
    torch.testing.assert_close(fisher(torch.sigmoid, "sigmoid", z), torch.diag(p * (1 - p)), rtol=0, atol=0.02)


def test_values_give_the_identity():
    found = fisher(lambda z: z, "values", torch.randn(3))
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    torch.testing.assert_close(found, torch.eye(3), rtol=0, atol=0.06)


def test_labels_come_from_the_generator_alone():
    output = torch.randn(8, 5)
    torch.manual_seed(1)
    one = sampled_loss(output, ["logits"], torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = sampled_loss(output, ["logits"], torch.Generator().manual_seed(3))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_finite_for_certain_outputs_of_every_dtype(kind, dtype):
    for output in (torch.eye(4), torch.zeros(4, 4) if kind in {"values", "sigmoid", "logits"} else torch.eye(4)):
        z = output.to(dtype).requires_grad_()
        loss = sampled_loss(z, [kind], torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(loss, z)
        assert bool(loss.isfinite())
        assert bool(grad.isfinite().all())


def test_several_outputs_add_up():
    outputs = (torch.randn(4, 3), torch.randn(4, 3))
    alone = [sampled_loss(t, ["values"], torch.Generator().manual_seed(0)) for t in outputs[:1]]
    both = sampled_loss(outputs, ["values", "values"], torch.Generator().manual_seed(0))
    signs = torch.Generator().manual_seed(0)
    torch.empty(4, 3).bernoulli_(0.5, generator=signs)
    alone.append(sampled_loss(outputs[1], ["values"], signs))
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_divergence_against_torch():
    p, q = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence(["logits"], p, q) == pytest.approx(float(kl))
    assert divergence(["probabilities"], p.softmax(-1), q.softmax(-1)) == pytest.approx(float(kl))
    assert divergence(["values"], p, q) == pytest.approx(float((p - q).square().sum()) / 12)
    a, b = torch.distributions.Bernoulli(p.sigmoid()), torch.distributions.Bernoulli(q.sigmoid())
    wanted = float(torch.distributions.kl_divergence(a, b).sum()) / 6
    assert divergence(["sigmoid"], p.sigmoid(), q.sigmoid()) == pytest.approx(wanted, rel=1e-6)
    assert divergence(["values", "logits"], (p, p), (q, p)) == pytest.approx(float((p - q).square().sum()) / 12)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_divergence_is_never_negative_by_rounding(kind):
    p = torch.randn(64, 5).softmax(-1)
    for scale in (1 - 1e-7, 1 + 1e-7):
        assert divergence([kind], p, (p.double() * scale).float()) >= 0
    assert math.isnan(divergence([kind], p, p * float("nan")))


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_zero_for_equal_outputs_and_positive_otherwise(kind):
    p = torch.rand(5, 4).softmax(-1)
    assert divergence([kind], p, p) == pytest.approx(0, abs=1e-12)
    assert divergence([kind], p, p.flip(-1)) > 0
