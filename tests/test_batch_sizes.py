"""Every batch counts, at its own size: lengths, image sizes and batch sizes that a model may not take together."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import taut
from taut import Budget
from taut.types import Plan, Step


class Tokens(nn.Module):
    """Words of sentences of any length, pooled and classified."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.b, self.head = (
            nn.Embedding(50, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(self.words(x))))).mean(1))


class FixedBatch(nn.Module):
    """Works on four samples at a time, no more and no less."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x.view(4, -1))))


class Stateful(nn.Module):
    """Starts from a hidden state of batch 8."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(8, 16))
        self.a, self.b, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        state = self.state
        for step in range(x.shape[1]):
            state = torch.tanh(self.a(x[:, step]) + self.b(state))
        return self.out(state)


class Detector(nn.Module):
    """Takes a list of images, each of its own size, and gives a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, images):
        return [self.fc(torch.relu(self.b(torch.relu(self.a(x[None])))).mean((2, 3)))[0] for x in images]


class Seq(nn.Module):
    """A recurrent network that takes time first."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(6, 20), nn.Linear(20, 12)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


def error(model, small, batches):
    with torch.no_grad():
        pairs = [(torch.as_tensor(model(x)), torch.as_tensor(small(x))) for x in batches]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def compressed(model, example, data, **settings):
    net = taut.trace(model, example)
    stats = taut.observe(net, model, data)
    steps = [Step((name,), "svd", {"rank": rank}) for name, rank in settings.items()]
    return taut.apply(model, Plan.of(net, steps), stats, data=data)


def test_the_order_of_short_and_long_batches_does_not_matter():
    model = Tokens().eval()
    short, long = torch.randint(50, (2, 2)), [torch.randint(50, (16, 12)) for _ in range(8)]
    held = [torch.randint(50, (64, 12))]
    first, last, without = (
        error(model, compressed(model, long[0], data, a=6, b=6), held)
        for data in ([short, *long], [*long, short], long)
    )
    assert first == pytest.approx(last, rel=0.25)
    assert first < 1.5 * without


def test_images_of_many_sizes_all_count():
    conv = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 6)).eval()
    sizes = [(6, 6), (9, 5), (12, 12), (7, 8)] * 4
    data = [torch.randn(8, 3, *size) for size in sizes]
    held = [torch.randn(8, 3, *size) for size in sizes]
    whole, single = (compressed(model, data[0], used, **{"0.2": 8}) for used in (data, data[:1]))
    assert error(model, whole, held) < 0.9 * error(model, single, held)


@pytest.mark.parametrize(("net", "shape"), [(FixedBatch, (4, 12)), (Stateful, (8, 5, 12))])
@pytest.mark.parametrize("methods", [None, ("channels", "svd")])
def test_nets_of_one_batch_size_are_compressed_at_that_size(net, shape, methods):
    model, data = net().eval(), [torch.randn(shape) for _ in range(12)]
    result = taut.compress(model, data[0], budget=taut.Budget(params=0.6), data=data, methods=methods)
    assert result.comparison.after.params <= 0.6 * result.comparison.before.params
    assert error(model, result.model, data) < 0.5
    bare = taut.apply(model, result.plan, taut.observe(taut.trace(model, data[0]), model, data))
    assert error(model, result.model, data) <= 1.05 * error(model, bare, data)


class Skip(nn.Module):
    """Keeps a skip connection on itself, for four samples at a time."""

    def __init__(self, keeps):
        super().__init__()
        self.a, self.b, self.c, self.out, self.keeps = *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4), keeps

    def forward(self, x):
        h = torch.relu(self.a(x.view(4, -1)))
        self.skip = h
        h = torch.relu(self.c(torch.relu(self.b(h))))
        return self.out(h + (self.skip if self.keeps else 0))


def test_what_a_forward_keeps_on_the_model_is_never_another_batchs():
    torch.manual_seed(0)
    kept = Skip(keeps=True).eval()
    data = [torch.randn(4, 16) for _ in range(64)]
    held = [torch.randn(4, 16) for _ in range(16)]
    assert error(kept, compressed(kept, data[0], data, b=6, c=6), held) < 0.05


def test_maps_kept_on_the_model_have_the_size_of_their_own_batch():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.inner, self.up = (
                nn.Conv2d(3, 16, 3, 2, 1),
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.Conv2d(16, 8, 3, 1, 1),
            )

        def forward(self, x):
            self.skips = [self.down(x)]
            return self.up(torch.relu(self.inner(torch.relu(self.skips[0]))) + self.skips.pop()).mean((2, 3))

    torch.manual_seed(0)
    model = UNet().eval()
    data = [torch.randn(8, 3, size, size) for size in (12, 16, 20) for _ in range(3)]
    small = compressed(model, data[0], data, inner=6)
    assert error(model, small, data) < 0.2


def test_settings_that_a_forward_makes_around_a_layer_are_left_as_they_were():
    class Set(Tokens):
        def forward(self, x):
            with sdpa_kernel(SDPBackend.MATH):
                return super().forward(x)

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    data = [torch.randint(50, (8, length)) for length in (4, 7, 9)]
    compressed(Set().eval(), data[0], data, a=6)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_a_layer_that_two_ways_share_is_solved_on_both():
    class Ways(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.d, self.out = (
                nn.Linear(16, 16),
                nn.Linear(16, 16),
                nn.BatchNorm1d(16),
                nn.Linear(16, 16),
                nn.Linear(16, 4),
            )

        def forward(self, x):
            h = self.a(x) if bool(x.mean() < 1) else self.norm(self.b(x))
            return self.out(torch.relu(self.d(torch.relu(h))))

    torch.manual_seed(0)
    model = Ways().eval()
    data = [torch.randn(32, 16) + 3 * (i % 2) for i in range(16)]
    data = [x[:31] if i % 2 else x for i, x in enumerate(data)]
    net = taut.trace(model, data[0], data)
    net.example.divisible = False  # each batch has a run of its own
    stats = taut.observe(net, model, data)
    small = taut.apply(model, Plan.of(net, [Step(("d",), "svd", {"rank": 6})]), stats, data=data)
    first, second = error(model, small, data[::2]), error(model, small, data[1::2])
    assert max(first, second) < 0.15


def test_random_models_aim_at_what_the_same_draw_gave():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 4)

        def forward(self, x):
            h = nn.functional.dropout(torch.relu(self.a(x)), 0.5, training=True)
            return self.c(torch.relu(self.b(h)))

    torch.manual_seed(0)
    model, x = Noisy().eval(), torch.randn(1024, 16)
    small = compressed(model, x[:4], [x], b=16)
    with torch.no_grad():
        runs = [torch.stack([net(x) for _ in range(16)]) for net in (model, small)]
    assert float(runs[1].var(0).mean()) > 0.5 * float(runs[0].var(0).mean())


@pytest.mark.parametrize("sensitivity", [False, True])
def test_lists_of_images_are_counted_and_compressed(sensitivity):
    model, images = Detector().eval(), [torch.randn(3, 16, 16), torch.randn(3, 12, 20)]
    net = taut.trace(model, images[:1] * 3)
    assert net.example.batch == 3
    assert net.cost.macs == 3 * 9 * 16 * 14 * 14 + 16 * 9 * 16 * 12 * 12 + 16 * 4
    data = [[torch.randn(3, 16, 16), torch.randn(3, 12, 20)] for _ in range(8)] + [[torch.randn(3, 9, 9)]]
    result = taut.compress(model, images, budget=taut.Budget(macs=0.5), data=data, sensitivity=sensitivity)
    assert result.comparison.after.macs <= 0.5 * result.comparison.before.macs
    held = [torch.randn(3, 16, 16) for _ in range(16)]
    with torch.no_grad():
        wanted, given = torch.stack(model(held)), torch.stack(result.model(held))
    assert (wanted - given).norm() < 0.2 * (wanted - wanted.mean(0)).norm() + 0.1 * wanted.norm()


def test_a_list_of_feature_maps_is_one_sample_per_row():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, maps):
            return self.a(maps[0]).mean((2, 3)) + self.b(maps[1]).mean((2, 3))

    net = taut.trace(Pyramid().eval(), [torch.randn(5, 3, 8, 8), torch.randn(5, 3, 6, 6)])
    assert net.example.batch == 5
    assert net.cost.macs == 3 * 9 * 8 * (36 + 16)


def test_time_first_is_counted_per_sequence_and_never_divided_in_time():
    model, data = Seq().eval(), [torch.randn(9, 4, 6) for _ in range(6)]
    net = taut.trace(model, data[0])
    assert net.example.batch == 4
    assert net.cost.macs == 9 * (3 * 20 * (6 + 20) + 20 * 12)
    small = compressed(model, data[0], data, fc=5)
    assert error(model, small, data) < 0.5
    (rows,) = [stats.positions for name, stats in taut.observe(net, model, data).layers.items() if name == "fc"]
    assert rows == 9


def test_a_loader_that_fills_the_same_memory_again_is_read_as_it_comes():
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).eval()

    class Loader:
        def __iter__(self):
            buffer = torch.empty(32, 12)
            for place in range(4):
                buffer.zero_()
                buffer[:, 3 * place : 3 * place + 3] = torch.randn(32, 3)
                yield buffer

    moment = taut.observe(taut.trace(model, torch.randn(2, 12)), model, Loader()).layers["0"].weighting.full
    assert bool((moment[0].diagonal() > 0.05).all())


@pytest.mark.parametrize(("net", "shape"), [(FixedBatch, (4, 12)), (Seq, (9, 4, 6))])
def test_what_has_one_batch_size_or_takes_time_first_is_exported_as_it_runs(net, shape, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = net().eval(), torch.randn(shape)
    written = taut.export(model, x, tmp_path / "model.onnx")
    assert all(parity.holds for parity in written.parity)
    assert {parity.samples for parity in written.parity} == ({4} if net is FixedBatch else {64, 1})


@pytest.mark.parametrize(
    "wrap", [lambda xs: xs, lambda xs: (xs,), lambda xs: {"images": xs}], ids=["list", "tuple", "dict"]
)
@pytest.mark.parametrize("fill", [torch.randn, torch.zeros, torch.ones], ids=["noise", "zeros", "ones"])
def test_lists_of_images_are_known_wherever_they_stand(wrap, fill):
    class Wrapped(Detector):
        def forward(self, images):
            return super().forward(images["images"] if isinstance(images, dict) else images), {"loss": torch.zeros(())}

    net = taut.trace(Wrapped().eval(), wrap([fill(3, 16, 16), fill(3, 16, 16)]))
    assert net.example.samples.listed
    assert net.example.batch == 2


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_examples_that_say_nothing_are_tried_on_noise(fill):
    assert taut.trace(Seq().eval(), fill(9, 4, 6)).example.batch == 4
    mean = nn.Sequential(nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 4))
    assert not taut.trace(mean.eval(), fill(5, 12)).example.divisible
    assert taut.trace(nn.Sequential(nn.Linear(12, 4)).eval(), fill(5, 12)).example.divisible


def test_experts_that_no_token_of_a_batch_reaches_are_observed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                y[chosen == number] = expert(x[chosen == number])
            return y

    torch.manual_seed(0)
    model = Experts().eval()
    data = [torch.randn(n, 8) for n in (64, 3, 1, 40)]
    result = taut.compress(model, data[0], budget=taut.Budget(params=0.8), data=data, methods=["svd"])
    assert result.comparison.after.params <= 0.8 * result.comparison.before.params


def test_outputs_of_lengths_that_depend_on_values_have_a_mixed_plan():
    class Kept(Detector):
        def forward(self, images):
            return [y[y > 0.05] for y in super().forward(images)]

    torch.manual_seed(0)
    model, images = Kept().eval(), [torch.randn(3, 12, 12) for _ in range(32)]
    result = taut.compress(
        model, images[:4], budget=taut.Budget(macs=0.5), data=[images], methods=("channels", "svd", "tucker")
    )
    assert result.comparison.after.macs <= 0.5 * result.comparison.before.macs


def test_outputs_in_objects_are_seen():
    @dataclass(slots=True)
    class Out:
        scores: torch.Tensor

    class Named(Tokens):
        def forward(self, x):
            return Out(Tokens.forward(self, x))

    model, data = Named().eval(), [torch.randint(50, (16, 6))]
    stats = taut.observe(taut.trace(model, data[0]), model, data)
    assert stats.unit == "loss"
    assert stats.kinds == ("logits",)


def test_a_forward_that_yields_is_run_to_its_end():
    class Yielding(Detector):
        def forward(self, images):
            yield from super().forward(images)

    images = [torch.randn(3, 8, 8), torch.randn(3, 8, 8)]
    assert taut.trace(Yielding().eval(), images).cost.macs == taut.trace(Detector().eval(), images).cost.macs


# Where the samples are, when it is not obvious.


class Between(nn.Module):
    """Does something between its two layers."""

    def __init__(self, between):
        super().__init__()
        self.a, self.c, self.between = nn.Linear(16, 24), nn.Linear(24, 5), between

    def forward(self, x):
        return self.c(self.between(self.a(x)))


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("between", "divisible"),
    [
        (lambda h: h.relu(), True),
        (lambda h: h.relu().cumsum(0), False),
        (lambda h: h - h[:1], False),
        (lambda h: h - h[-1:], False),
        (lambda h: h / h.abs().max(), False),
    ],
    ids=["apart", "sums", "first", "last", "largest"],
)
def test_samples_that_know_of_each_other_are_not_taken_apart(between, divisible, size):
    assert taut.trace(Between(between).eval(), torch.randn(size, 16)).example.divisible == divisible


@pytest.mark.parametrize("size", [6, 12, 24])
def test_models_that_take_samples_by_threes(size):
    class Triplets(Between):
        def forward(self, x):
            h = self.a(x).relu().view(-1, 3, 24)
            return self.c(h - h.mean(1, keepdim=True)).view(-1, 5)

    model, data = Triplets(None).eval(), [torch.randn(size, 16) for _ in range(10)]
    result = taut.compress(model, data[0], budget=Budget(params=0.7), data=data)
    assert result.model(data[0]).shape == (size, 5)


class Masked(nn.Module):
    """Attention with a mask for all samples."""

    def __init__(self):
        super().__init__()
        self.q, self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x, mask):
        y = nn.functional.scaled_dot_product_attention(self.q(x), x, x, attn_mask=mask)
        return self.g(self.f(y).relu())


@pytest.mark.parametrize("sizes", [(9, 9, 9), (32, 32, 9)])
def test_a_mask_for_all_samples_is_not_cut_where_it_is_as_long_as_they_are_many(sizes):
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    data = [(torch.randn(size, 9, 16), mask) for size in sizes]
    result = taut.compress(Masked().eval(), (torch.randn(4, 9, 16), mask), budget=Budget(params=0.6), data=data)
    assert result.model(*data[0]).shape == (sizes[0], 9, 16)


class Cells(nn.Module):
    """A loop over the steps on the first axis."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        state, states = x.new_zeros(x.shape[1], 8), []
        for step in x:
            state = self.cell(self.out(step), state)
            states.append(state)
        return torch.stack(states)


class Crossing(nn.Module):
    """Queries and keys of different lengths, time first."""

    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, q, k):
        return self.out(self.attend(q, k, k)[0])


class Bags(nn.Module):
    """As many samples as there are offsets."""

    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(50, 8), nn.Linear(8, 5)

    def forward(self, words, offsets):
        return self.out(self.bag(words, offsets))


@pytest.mark.parametrize(
    ("model", "inputs", "samples", "macs"),
    [
        (Cells, torch.randn(9, 4, 8), 4, 9 * (8 * 8 + 6 * 8 * 8)),
        (Crossing, (torch.randn(7, 3, 8), torch.randn(5, 3, 8)), 3, 64 * (7 * 3 + 5 * 2) + 2 * 7 * 5 * 8),
        (Bags, (torch.randint(0, 50, (40,)), torch.arange(0, 40, 5)), 8, 40),
    ],
    ids=["cells", "crossing", "bags"],
)
def test_samples_are_counted_where_they_are(model, inputs, samples, macs):
    net = taut.trace(model().eval(), inputs)
    assert net.example.batch == samples
    assert net.cost.macs == macs


class Packed(nn.Module):
    """Takes lengths as plain numbers."""

    def __init__(self):
        super().__init__()
        self.gru, self.a, self.c = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.c(self.a(self.gru(packed)[1][0]).relu())


@pytest.mark.parametrize("short", [[], [(torch.randn(3, 9, 8), [9, 9, 2])]], ids=["full", "short last"])
def test_plain_numbers_go_with_their_samples(short):
    model = Packed().eval()
    example = torch.randn(4, 9, 8), [9, 7, 5, 3]
    data = [(torch.randn(4, 9, 8), [9, 7, 5, 3]) for _ in range(5)] + short
    net = taut.trace(model, example)
    assert net.example.divisible
    stats = taut.observe(net, model, data)
    assert stats.samples == 20 + 3 * bool(short)
    joined = net.example.samples.joined([data[0], data[1]])
    assert joined[1] == [9, 7, 5, 3] * 2
    assert net.example.samples.cut(joined, slice(3, 6), 8)[1] == [3, 9, 7]
    plan = taut.plan(net, stats, budget=Budget(params=0.95))
    assert taut.apply(model, plan, stats, data=data)(*example).shape == (4, 5)


@pytest.mark.parametrize("kind", [list, tuple])
def test_numbers_that_are_no_samples_stay_whole_where_they_are_as_many(kind):
    """A size of two numbers, and batches of two samples."""

    class Resizing(Between):
        def forward(self, x, size):
            return self.c(self.a(nn.functional.interpolate(x[:, None], size=tuple(size))[:, 0]).relu())

    data = [(torch.randn(2, 9, 16), kind([steps, 16])) for steps in (5, 5, 7, 7)]
    model = Resizing(None).eval()
    result = taut.compress(model, (torch.randn(4, 9, 16), kind([5, 16])), budget=Budget(params=0.7), data=data)
    assert result.model(*data[2]).shape == (2, 7, 5)
    samples = taut.trace(model, (torch.randn(4, 9, 16), kind([5, 16]))).example.samples
    assert samples.signature(data[0]) != samples.signature(data[2])
    assert samples.cut(data[0], slice(1), 2)[1] == kind([5, 16])
