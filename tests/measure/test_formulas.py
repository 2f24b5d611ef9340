"""Every operation against its multiply-accumulates by hand; each reads a parameter, and none leaves a note."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    bilinear,
    conv2d,
    conv_transpose2d,
    embedding_bag,
    linear,
    scaled_dot_product_attention,
    unfold,
)

from taut.measure.tally import Tally

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse .* beta"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

B, I, O = 3, 4, 5  # noqa: E741 - samples, inputs, outputs
ADJACENCY = torch.tensor([[1.0, 0, 2], [0, 0, 3], [4, 0, 0], [0, 5, 6], [0, 0, 0]])
STORED = 6


class Uses(nn.Module):
    """Calls a function with its input and its parameters."""

    def __init__(self, function, *shapes, dtype=torch.float32):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape).to(dtype) for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.weights)


def tally(function, *shapes, x=None, dtype=torch.float32):
    model = Uses(function, *shapes, dtype=dtype)
    counted = Tally(model)
    x = (torch.randn(B, I) if x is None else x).to(dtype)
    with torch.no_grad(), counted.watching(model):
        model(x)
    return counted


def macs(function, *shapes, **settings):
    counted = tally(function, *shapes, **settings)
    assert not counted.uncounted
    return counted.macs


VECTORS_AND_MATRICES = {
    "linear": (linear, [(O, I)], B * I * O),
    "matmul": (lambda x, w: x @ w, [(I, O)], B * I * O),
    "mv": (torch.mv, [(I,)], B * I),
    "matrix @ vector": (lambda x, w: x @ w, [(I,)], B * I),
    "batch @ vector": (lambda x, w: x[None].expand(2, -1, -1) @ w, [(I,)], 2 * B * I),
    "vector @ matrix": (lambda x, w: x[0] @ w, [(I, O)], I * O),
    "vector @ vector": (lambda x, w: x[0] @ w, [(I,)], I),
    "addmv": (lambda x, b, w: torch.addmv(b, x, w), [(B,), (I,)], B * I),
    "addmv in place": (lambda x, w: x.new_zeros(B).addmv_(x, w), [(I,)], B * I),
    "dot": (lambda x, w: torch.dot(x[0], w), [(I,)], I),
    "vdot": (lambda x, w: torch.vdot(x[0], w), [(I,)], I),
    "inner": (torch.inner, [(O, I)], B * I * O),
    "addmm in place": (lambda x, w: x.new_zeros(B, O).addmm_(x, w), [(I, O)], B * I * O),
    "mm into a tensor": (lambda x, w: torch.mm(x, w, out=x.new_zeros(B, O)), [(I, O)], B * I * O),
    "baddbmm": (lambda x, b, w: torch.baddbmm(b, x[None], w), [(1, B, O), (1, I, O)], B * I * O),
    "baddbmm in place": (lambda x, w: x.new_zeros(1, B, O).baddbmm_(x[None], w), [(1, I, O)], B * I * O),
    "addbmm": (lambda x, w: torch.addbmm(x.new_zeros(B, O), x[None], w), [(1, I, O)], B * I * O),
    "multi_dot": (lambda x, v, w: torch.linalg.multi_dot([x, v, w]), [(I, O), (O, 2)], I * O * 2 + B * I * 2),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), [(O, I)], B * I * O),
    "einsum of three": (lambda x, w: torch.einsum("bi,oij,bj->bo", x, w, x), [(O, I, I)], B * O * I * I + B * O * I),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([1], [1])), [(O, I)], B * I * O),
    "kron": (lambda x, v, w: x @ torch.kron(v, w), [(2, 2), (2, 2)], B * I * I),
    "bilinear": (lambda x, w: bilinear(x, x[:, :2], w), [(O, I, 2)], B * O * I * 2),
    "cdist": (torch.cdist, [(O, I)], B * O * I),
    "cdist by products": (torch.cdist, [(30, I)], B * 30 * I),
    "cdist of other norms": (lambda x, w: torch.cdist(x, w, p=1.0), [(O, I)], B * O * I),
    "pdist": (lambda x, w: nn.functional.pdist(w) + x[0, 0], [(O, I)], O * (O - 1) // 2 * I),
    "outer": (lambda x, w: torch.outer(x[0], w), [(O,)], I * O),
    "addr": (lambda x, w: torch.addr(x.new_zeros(I, O), x[0], w), [(O,)], I * O),
    "by hand": (lambda x, w: (x[:, None] * w).sum(-1), [(O, I)], B * I * O),
    "a scale": (lambda x, w: x * w, [(I,)], 0),
    "complex": (lambda x, w: x.to(torch.complex64) @ torch.view_as_complex(w), [(I, O, 2)], 4 * B * I * O),
    "under autocast": (torch.autocast("cpu", torch.bfloat16)(linear), [(O, I)], B * I * O),
    "in inference mode": (torch.inference_mode()(linear), [(O, I)], B * I * O),
    "mkldnn": (lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), [(O, I)], B * I * O),
    "bags": (
        lambda x, t, w: embedding_bag(torch.ones(B, 2).long(), t, per_sample_weights=w.expand(B, 2), mode="sum") + x,
        [(7, I), (2,)],
        B * 2 * I,
    ),
    "bags without weights": (lambda x, t: embedding_bag(torch.ones(B, 2).long(), t) + x, [(7, I)], 0),
}


@pytest.mark.parametrize("name", VECTORS_AND_MATRICES)
def test_products(name):
    function, shapes, expected = VECTORS_AND_MATRICES[name]
    assert macs(function, *shapes) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "mv", "addmv", "dot", "bilinear", "baddbmm", "by hand"])
def test_products_in_other_numbers(name, dtype):
    function, shapes, expected = VECTORS_AND_MATRICES[name]
    assert macs(function, *shapes, dtype=dtype) == expected


IMAGE = (2, I, 5, 5)
CONVOLUTIONS = {
    "plain": (conv2d, (O, I, 3, 3), 9 * I * O * 9),
    "depthwise": (lambda x, w: conv2d(x, w, groups=I), (I, 1, 3, 3), 9 * I * 9),
    "transposed": (lambda x, w: conv_transpose2d(x, w, stride=2), (I, O, 3, 3), 25 * I * O * 9),
    "transposed, grouped": (lambda x, w: conv_transpose2d(x, w, stride=2, groups=2), (I, O, 3, 3), 25 * I * O * 9),
    "slow": (lambda x, w: torch._C._nn.thnn_conv2d(x, w, (3, 3)), (O, I, 3, 3), 9 * I * O * 9),
    "dilated": (lambda x, w: torch._C._nn.slow_conv_dilated2d(x, w, (3, 3)), (O, I, 3, 3), 9 * I * O * 9),
    "slow, transposed": (lambda x, w: torch._C._nn.slow_conv_transpose2d(x, w, (3, 3)), (I, O, 3, 3), 25 * I * O * 9),
    "mkldnn": (
        lambda x, w: torch.mkldnn_convolution(x, w, None, [0, 0], [1, 1], [1, 1], 1),
        (O, I, 3, 3),
        9 * I * O * 9,
    ),
    "unfolded": (lambda x, w: w @ unfold(x, 3), (O, I * 9), 9 * I * O * 9),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    function, shape, per_sample = CONVOLUTIONS[name]
    assert macs(function, shape, x=torch.randn(IMAGE)) == 2 * per_sample


def test_convolutions_over_time_and_volume():
    assert macs(torch.conv_tbc, (3, I, O), (O,), x=torch.randn(8, 2, I)) == 6 * 2 * I * O * 3
    volume = torch.randn(2, I, 4, 4, 4)
    assert macs(lambda x, w: torch._C._nn.slow_conv3d(x, w, (3, 3, 3)), (O, I, 3, 3, 3), x=volume) == 16 * I * O * 27


LAYOUTS = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_matrices_cost_what_they_store(layout):
    matrix = LAYOUTS[layout](ADJACENCY)
    assert macs(lambda x, w: matrix @ (x @ w), (I, 2)) == B * I * 2 + STORED * 2
    assert macs(lambda x, w: torch.sparse.mm(matrix, x * w), (I,)) == STORED * I
    assert macs(lambda x, w: matrix @ (x @ w), (I,)) == B * I + STORED
    assert macs(lambda x, w: (x.t() @ matrix.t()) * w, (O,)) == I * STORED


def test_sparse_sums_and_products_of_sparse_matrices():
    sparse, rows = ADJACENCY.to_sparse_csr(), ADJACENCY.count_nonzero(1)
    assert macs(lambda x, b: torch.sparse.addmm(b, ADJACENCY.to_sparse(), x), (O, I)) == STORED * I
    assert macs(lambda x, a, b: torch.sparse.sampled_addmm(sparse, a, b).to_dense() + x[0, 0], (O, 7), (7, B)) == (
        STORED * 7
    )
    squared = macs(lambda x, w: (sparse.t().to_sparse_csr() @ sparse).to_dense() * w + x[0, 0], (B,))
    assert squared == int((rows**2).sum())
    blocks = torch.eye(4).to_sparse_bsr(2)
    assert macs(lambda x, w: blocks @ (x.t() * w), (B,)) == 8 * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_cost_the_rows_that_they_take(dtype):
    ends = torch.tensor([3, 7], dtype=torch.int32)
    x = torch.randn(8, 16)
    for grouped in (torch._grouped_mm, nn.functional.grouped_mm):

        def experts(x, w, grouped=grouped):
            return grouped(x, w, offs=ends)

        assert macs(experts, (2, 16, 32), x=x, dtype=dtype) == 7 * 16 * 32
    assert macs(torch._grouped_mm, (2, 16, 32), x=torch.randn(2, 8, 16), dtype=dtype) == 2 * 8 * 16 * 32
    ends = torch.tensor([8, 16], dtype=torch.int32)
    assert macs(lambda x, w: torch._grouped_mm(x, w, offs=ends), (16, 32), x=x, dtype=dtype) == 8 * 16 * 32
    assert macs(lambda x, w: torch._grouped_mm(x[None].expand(2, -1, -1), w, offs=ends), (16, 32), x=x) == 8 * 16 * 16


def test_weights_of_fewer_bits():
    codes, scales = torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
    assert macs(lambda x, w: torch._weight_int8pack_mm(x, codes, scales) * w, (32,), x=torch.randn(B, 64)) == (
        B * 64 * 32
    )
    weight = torch.quantize_per_tensor(torch.randn(O, I), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    assert macs(lambda x, w: torch.ops.quantized.linear_dynamic(x, packed) * w, (O,)) == B * I * O


def test_fourier_transforms_by_the_usual_count():
    complex_one = round(2.5 * B * 8 * math.log2(8))
    x = torch.randn(B, 8)
    assert macs(lambda x, w: torch.fft.fft(x + 0j) * w, (8,), x=x) == complex_one
    assert macs(lambda x, w: torch.fft.rfft(x) * w, (5,), x=x) == complex_one // 2
    assert macs(lambda x, w: torch.fft.irfft(x[:, :5] + 0j) * w, (8,), x=x) == complex_one // 2
    assert macs(lambda x, w: torch.fft.rfft2(x) * w, (5,), x=x) == round(1.25 * B * 8 * math.log2(B * 8))


HEADS = (2, 4, 6, 8)
PAIRS = 2 * 4 * 6 * 6


def attend(**settings):
    def function(x, w):
        return scaled_dot_product_attention(x * w, x, x, **settings)

    return function


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"attn_mask": torch.zeros(6, 6)}, {"attn_mask": torch.ones(6, 6).bool()}],
    ids=["plain", "causal", "added mask", "mask"],
)
def test_attention_costs_the_same_in_every_kernel(backend, settings):
    def forced(x, w):
        with sdpa_kernel(backend):
            return attend(**settings)(x, w)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert macs(forced, (8,), x=torch.randn(HEADS), dtype=dtype) == PAIRS * 16


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_of_other_shapes(backend):
    def grouped(x, w):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(x * w, x[:, :2], x[:, :2], enable_gqa=True)

    def shorter(x, w):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(x * w, x[..., :5, :], x[..., :5, :])

    assert macs(grouped, (8,), x=torch.randn(HEADS)) == PAIRS * 16
    assert macs(shorter, (8,), x=torch.randn(HEADS)) == 2 * 4 * 6 * 5 * 16
    with sdpa_kernel(SDPBackend.MATH):
        narrow = macs(lambda x, w: scaled_dot_product_attention(x * w, x, x[..., :3]), (8,), x=torch.randn(HEADS))
    assert narrow == PAIRS * (8 + 3)


def test_gradients_inside_a_forward_pass():
    def force(x, w):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.func.grad(lambda x: attend()(x, w).sum())(x)

    assert macs(force, (8,), x=torch.randn(HEADS)) == PAIRS * (2 + 5) * 8
    assert macs(lambda x, w: torch.func.grad(lambda x: (x @ w).sum())(x), (I, O)) == 2 * B * I * O


def attention_macs(lengths, width, *, keys=None):
    """Four projections and two products per sequence."""
    pairs = list(zip(lengths, keys or lengths, strict=True))
    return sum(2 * (q + k) * width**2 + 2 * q * k * width for q, k in pairs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_fast_path_of_attention(need_weights):
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    counted = Tally(layer)
    with torch.no_grad(), counted.watching(layer):
        layer(x, x, x, need_weights=need_weights)
    assert counted.macs == attention_macs([5] * 3, 8)
    assert not counted.uncounted


def test_fused_encoder_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    parts = layer.self_attn, layer.norm1, layer.norm2, layer.linear1, layer.linear2
    attention, first, second, up, down = parts
    weights = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
    norms = first.weight, first.bias, second.weight, second.bias

    def fused(x):
        settings = *weights, False, False, 1e-5, *norms, up.weight, up.bias, down.weight, down.bias
        return torch._transformer_encoder_layer_fwd(x, 8, 2, *settings)

    for x in (torch.randn(3, 5, 8), torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(2, 8)])):
        counted = Tally(layer)
        with torch.no_grad(), counted:
            fused(x)
        lengths = [part.shape[0] for part in x.unbind()]
        assert counted.macs == attention_macs(lengths, 8) + sum(lengths) * 2 * 8 * 16
        assert not counted.uncounted


def test_padding_is_left_out_where_the_encoder_leaves_it_out():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    counted = Tally(encoder)
    with torch.no_grad(), counted.watching(encoder):
        encoder(torch.randn(3, 5, 8), src_key_padding_mask=padding)
    assert counted.macs == 2 * (attention_macs([4, 3, 5], 8) + 12 * 2 * 8 * 16)


def by_cells(module, lengths):
    """The matrices of every cell, at every step of every sequence."""
    matrices = [p.numel() for name, p in module.named_parameters() if name.startswith("weight")]
    alive = [sum(length > step for length in lengths) for step in range(max(lengths))]
    return sum(number * size for number in alive for size in matrices)


RECURRENT = {
    "lstm": lambda **settings: nn.LSTM(8, 6, **settings),
    "gru": lambda **settings: nn.GRU(8, 6, **settings),
    "rnn": lambda **settings: nn.RNN(8, 6, **settings),
    "relu": lambda **settings: nn.RNN(8, 6, nonlinearity="relu", **settings),
}
FORMS = {
    "batch first": ({"batch_first": True}, lambda x: x, [5, 5, 5]),
    "time first": ({}, lambda x: x.transpose(0, 1), [5, 5, 5]),
    "unbatched": ({}, lambda x: x[0], [5]),
    "packed": (
        {"batch_first": True},
        lambda x: nn.utils.rnn.pack_padded_sequence(x, [2, 5, 4], batch_first=True, enforce_sorted=False),
        [5, 4, 2],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_in_every_form(kind, form):
    settings, shaped, lengths = FORMS[form]
    stacks = [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "bias": False}]
    for stack in stacks + [{"proj_size": 3, "bidirectional": True, "num_layers": 2}] * (kind == "lstm"):
        module = RECURRENT[kind](**settings, **stack).eval()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for gradient in (False, True):
                counted = Tally(module.to(dtype))
                with torch.set_grad_enabled(gradient), counted.watching(module):
                    module(shaped(torch.randn(3, 5, 8).to(dtype)))
                assert (counted.macs, counted.own[""]) == (by_cells(module, lengths),) * 2, (stack, dtype, gradient)
                assert not counted.uncounted


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(3, 8), (8,)])
def test_cells(cell, shape):
    module = cell(8, 6)
    counted = Tally(module)
    with torch.no_grad(), counted.watching(module):
        module(torch.randn(shape))
    assert counted.macs == (3 if len(shape) > 1 else 1) * (module.weight_ih.numel() + module.weight_hh.numel())
