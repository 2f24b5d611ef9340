"""Running sums of one layer against sums written out."""

import pytest
import torch
from torch import nn

from cases import sequential
from taut.decompose.svd import output_basis
from taut.errors import DataError
from taut.structure.collecting import (
    EXACT_LIMIT,
    FULL_LIMIT,
    SKETCH_BYTES,
    LayerMoments,
    form_of,
    second_moment,
    sketch_size,
    sketched,
)
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
    assert form_of(module, EXACT_LIMIT) == "full"


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
def test_moments_over_batches_are_means_over_samples(module, x, monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.ENOUGH", 0)
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
    torch.testing.assert_close(B.full, torch.einsum("ngi,ngj->gij", flat, flat) / 8, rtol=1e-4, atol=1e-5)
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


def test_a_sketch_of_a_wide_linear_is_bounded_and_means_over_samples(monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.EXACT_LIMIT", 100)
    module, x = nn.Linear(640, 200), torch.randn(2048, 640)
    m = moments(module, x[:2], samples=len(x))
    for part in x.split(512):
        m.add_input(part, module(part))
    weighting = m.finish()[0]
    assert weighting.full is None
    rows = weighting.sketch
    assert rows.shape == (1, 2 * 200 * 640 // 840, 640)
    assert float(rows.square().sum()) == pytest.approx(float(x.square().sum()) / len(x), rel=0.05)


def test_a_sketch_grows_with_the_rank_asked_for_and_stays_bounded():
    assert sketch_size(300, 10_000) == 2 * 300 * 10_000 // 10_300
    assert sketch_size(40_000, 40_000) * 40_000 * 4 <= SKETCH_BYTES


def spectrum_over_8_decades(n, k):
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    return torch.randn(n, k, dtype=torch.float64) * torch.logspace(0, -4, k).double() @ turn


@pytest.mark.parametrize("kind", ["large mean", "relu", "8 decades"])
def test_float32_sums_are_those_of_float64(kind, monkeypatch):
    """Elementwise to float32's rounding of the moment itself, also where a mean is 1,000 times what varies."""
    monkeypatch.setattr("taut.structure.collecting.ENOUGH", 0)
    n, k, rows = 4000, 48, 250
    if kind == "8 decades":
        x = spectrum_over_8_decades(n, k)
    else:
        x = torch.randn(n, k, dtype=torch.float64)
        x = x + 1000 if kind == "large mean" else x.relu()
    x = x.float()
    module = nn.Linear(k, 3)
    m = moments(module, x[:2], samples=n)
    for part in x.split(rows):
        m.add_input(part, module(part))
    found = m.finish()[0].full[0].double()
    wanted = x.double().T @ x.double() / n
    size = wanted.diagonal().sqrt()
    rounding = 2 * rows**0.5 * 2.0**-24  # of a sum over the rows of a part; how it is divided is the processor's
    assert float(((found - wanted) / torch.outer(size, size)).abs().max()) < rounding


def passed(module, x, held, samples=None):
    """Moments of a pass in which the samples `held` (a slice) judge the others."""
    m = moments(module, x[:2], samples=samples or len(x))
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[held] = False
    for some, out in ((x[keep], False), (x[~keep], True)):
        m.held = out
        m.add_input(some, module(some))
    return m.finish()[0]


@pytest.fixture(params=[1024, 64])
def large(monkeypatch, request):
    """From how many inputs on fewer rows than these are held as they are."""
    monkeypatch.setattr("taut.structure.collecting.LARGE", request.param)


@pytest.mark.parametrize("n", [40, 300, 1200])
@pytest.mark.usefixtures("large")
def test_few_rows_predict_what_fresh_rows_lose(n):
    """Energy lost by the best rank for the moment found, against the truth, at 0.3 to 10 rows per input."""
    k, rank = 128, 50
    scale = torch.arange(1, k + 1).float().rsqrt()
    module, x = nn.Linear(k, k), torch.randn(n, k) * scale
    found = passed(module, x, slice(0, max(8, n // 16)))
    W = module.weight.detach()[None, :, :, None]
    basis = output_basis(W, found)
    predicted = float(basis.lost(None)[rank]) / found.energy(W)
    dW = W[0, :, :, 0] - (basis.up[0, :, :rank] @ basis.down[0, :rank]).float() @ W[0, :, :, 0]
    true = float((dW * scale).square().sum() / (W[0, :, :, 0] * scale).square().sum())
    assert predicted == pytest.approx(true, rel=0.15)


@pytest.mark.usefixtures("large")
def test_nothing_is_free_for_want_of_samples():
    """32 samples of 256 inputs: beyond rank 32 the sample itself has no energy at all."""
    module, x = nn.Linear(256, 256), torch.randn(32, 256)
    W = module.weight.detach()[None, :, :, None]
    for held in (slice(0, 8), slice(0, 0)):
        found = passed(module, x, held)
        lost = output_basis(W, found).lost(None)
        assert float(lost[64]) / found.energy(W) == pytest.approx(0.377, abs=0.06)  # of the best, for inputs alike
        assert bool((lost[:-1] > 0).all())


def test_fewer_rows_than_inputs_have_the_moment_that_they_had(monkeypatch):
    module, x = nn.Linear(100, 3), torch.randn(60, 100) * torch.arange(1, 101).float().rsqrt()
    found = []
    for limit in (1024, 64):
        monkeypatch.setattr("taut.structure.collecting.LARGE", limit)
        found.append(passed(module, x, slice(0, 12)).full[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3 * float(found[0].diagonal().mean()))


@pytest.mark.parametrize("part", [30, 90])
def test_more_rows_than_were_to_come_are_summed(monkeypatch, part):
    """The example is shorter than the data."""
    monkeypatch.setattr("taut.structure.collecting.LARGE", 64)
    module, x = nn.Linear(100, 3), torch.randn(1800, 100) + 3
    m = moments(module, x[:2], samples=10)
    for some in x.split(part):
        m.add_input(some, module(some))
    found = m.finish()[0].full[0] * 10
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("whole", [10, 1000])
def test_a_wide_layer_that_only_held_out_rows_reach_is_known(monkeypatch, whole):
    monkeypatch.setattr("taut.structure.collecting.LARGE", 64)
    module, x = nn.Linear(100, 3), torch.randn(20, 100)
    m = moments(module, x[:2], samples=whole)
    m.held = True
    m.add_input(x, module(x))
    found = m.finish()[0].full[0]
    assert float(found.diagonal().sum()) == pytest.approx(float(x.square().sum()) / whole, rel=1e-3)


def test_one_sample_judges_itself_by_its_last_rows():
    module, x = nn.Linear(64, 64), torch.randn(1, 48, 64)
    m = moments(module, x)
    m.held = None
    m.add_input(x, module(x))
    found = m.finish()[0]
    values = torch.linalg.eigvalsh(found.full[0])
    assert float(values[0]) > 0.2 * float(values.mean())


def test_held_out_rows_count_where_there_are_enough():
    module, x = nn.Linear(4, 3), torch.randn(200, 4)
    found = passed(module, x, slice(0, 20)).full[0]
    torch.testing.assert_close(found, x.T @ x / 200, rtol=1e-5, atol=1e-6)


def test_a_layer_that_only_held_out_samples_reach_is_known():
    module, x = nn.Linear(4, 3), torch.randn(100, 4)
    found = passed(module, x, slice(None)).full[0]
    torch.testing.assert_close(found, x.T @ x / 100, rtol=1e-5, atol=1e-6)


def test_positions_are_those_of_the_data():
    """Texts of several lengths: the example's length says nothing."""
    module, x = nn.Linear(4, 3), torch.randn(6, 5, 4)
    m = moments(module, x[:2], samples=12)
    m.add_input(x, module(x))
    m.add_input(x[:, :2], module(x[:, :2]))
    assert m.finish()[2] == (6 * 5 + 6 * 2) / 12


def test_gradients_of_wide_outputs_are_rows_with_an_exact_diagonal(monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.LIMIT", 8)
    module, x = nn.Linear(5, 300), torch.randn(2000, 5)
    m = moments(module, x[:2], samples=len(x))
    grads = torch.randn(2000, 300) * torch.linspace(2, 0, 300)
    for part, grad in zip(x.split(500), grads.split(500), strict=True):
        m.add_input(part, module(part))
        m.add_gradient(grad, module(part))
    B = m.finish()[1]
    assert B.full is None
    assert B.rows.shape == (1, 1024, 300)
    torch.testing.assert_close(B.diagonal()[0], grads.square().sum(0) / 2000, rtol=1e-4, atol=1e-7)
    wanted = grads.T @ grads / 2000
    U = torch.randn(300, 40)
    torch.testing.assert_close(B.along(U[None])[0].float(), ((wanted @ U) * U).sum(0), rtol=0.25, atol=0)


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
