"""Running sums of one layer against sums written out."""

import pytest
import torch
from torch import nn

from cases import sequential
from taut.errors import DataError
from taut.structure.collecting import FULL_LIMIT, SKETCH_ROWS, LayerMoments, form_of, second_moment, sketched
from taut.structure.patches import input_rows, positions
from taut.structure.tracing import trace


def moments(module, x, samples=None, seed=0):
    """`LayerMoments` of a bare layer, traced on x."""
    net = trace(sequential(layer=module), x)
    return LayerMoments(module, net["layer"], samples or len(x), seed)


def unfolded(module, x):
    out = module(x)
    return input_rows(module, x, out, torch.arange(positions(module, out))).double()


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (nn.Linear(FULL_LIMIT, 2), "full"),
        (nn.Linear(FULL_LIMIT + 1, 2), "sketch"),
        (nn.Conv2d(256, 2, 3), "full"),
        (nn.Conv2d(257, 2, 3), "channel"),
        (nn.Conv2d(514, 2, 3, groups=2), "channel"),
        (nn.Conv2d(512, 2, 3, groups=2), "full"),
        (nn.Conv1d(4000, 2, 1), "sketch"),
    ],
    ids=lambda v: v if isinstance(v, str) else repr(v),
)
def test_form_keeps_memory_bounded(module, form):
    assert form_of(module) == form


def test_second_moment_of_channels_is_the_mean_over_offsets():
    conv = nn.Conv2d(6, 4, 3, groups=2)
    rows = unfolded(conv, torch.randn(2, 6, 5, 5))
    taps = rows.reshape(2, -1, 3, 9)
    wanted = torch.einsum("gnct,gndt->gcd", taps, taps) / 9
    torch.testing.assert_close(second_moment(conv, rows, "channel"), wanted)
    torch.testing.assert_close(second_moment(conv, rows, "full"), rows.mT @ rows)


def test_sketch_keeps_the_moment_in_expectation():
    rows = torch.randn(1, 64, 5, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    many = torch.stack([sketched(rows, 16, random) for _ in range(3000)])
    assert many.shape == (3000, 1, 16, 5)
    found = (many.mT @ many).mean(0)
    wanted = rows.mT @ rows
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03 * float(wanted.max()))


def test_few_rows_are_no_sketch():
    rows = torch.randn(1, 8, 5)
    assert sketched(rows, 8, torch.Generator()) is rows


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(5, 3), torch.randn(8, 5)),
        (nn.Linear(5, 3), torch.randn(8, 4, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(8, 4, 9)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(8, 3, 7, 7)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_moments_over_batches_are_means_over_samples(module, x):
    m = moments(module, x)
    grads = torch.randn(module(x).shape)
    for part, grad in zip(x.split(3), grads.split(3), strict=True):
        m.add_input(part, module(part))
        m.add_gradient(grad, module(part))
    weighting, B, per_sample, taylor = m.finish()
    rows = unfolded(module, x)
    torch.testing.assert_close(weighting.full, (rows.mT @ rows / 8).float(), rtol=1e-4, atol=1e-5)
    groups = getattr(module, "groups", 1)
    flat = grads if isinstance(module, nn.Linear) else grads.movedim(1, -1)
    flat = flat.reshape(-1, groups, flat.shape[-1] // groups)
    torch.testing.assert_close(B, torch.einsum("ngi,ngj->gij", flat, flat) / 8, rtol=1e-4, atol=1e-5)
    assert per_sample == positions(module, module(x)) / 8
    products = (module(x) * grads).detach()
    if not isinstance(module, nn.Linear):
        products = products.movedim(1, -1)
    wanted = products.reshape(8, -1, products.shape[-1]).mean(1).abs().mean(0)
    torch.testing.assert_close(taylor, wanted, rtol=1e-4, atol=1e-6)


def test_sampled_positions_estimate_all_of_them():
    """A wide field: a share of the positions, scaled up, gives the same moment to a few per cent."""
    module, x = nn.Conv2d(1, 1, 2), torch.randn(2, 1, 180, 180)
    m = moments(module, x)
    m.add_input(x, module(x))
    assert positions(module, module(x)) > 8192
    rows = unfolded(module, x)
    wanted = rows.mT @ rows / 2
    found = m.finish()[0].full
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0.06 * float(wanted.max()))
    assert not torch.allclose(found, wanted.float(), rtol=1e-5)


def test_a_sketch_of_a_wide_linear_is_bounded_and_means_over_samples():
    module, x = nn.Linear(FULL_LIMIT + 6, 2), torch.randn(2 * SKETCH_ROWS, FULL_LIMIT + 6)
    m = moments(module, x[:2], samples=len(x))
    for part in x.split(SKETCH_ROWS // 2):
        m.add_input(part, module(part))
        assert m.A.shape[1] <= SKETCH_ROWS
    weighting = m.finish()[0]
    assert weighting.full is None
    rows = weighting.sketch
    assert rows.shape == (1, SKETCH_ROWS, FULL_LIMIT + 6)
    total = float(x.square().sum()) / len(x)
    assert float(rows.square().sum()) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(value):
    module, x = nn.Linear(5, 3), torch.randn(2, 5)
    m = moments(module, x)
    x[0, 0] = value
    with pytest.raises(DataError, match="input of layer 'layer' is not finite"):
        m.add_input(x, module(x))


def test_nothing_seen_is_nothing_known():
    weighting, B, positions_, _ = moments(nn.Linear(5, 3), torch.randn(2, 5)).finish()
    assert not weighting.known
    assert B is None
    assert positions_ == 1


def test_outputs_are_handed_over_once():
    m = moments(nn.Linear(5, 3), torch.randn(2, 5))
    m.outputs.append(torch.ones(1))
    assert len(m.take_outputs()) == 1
    assert m.take_outputs() == []
