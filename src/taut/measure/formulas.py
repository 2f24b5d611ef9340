"""What the operations of torch cost, in multiply-accumulates.

A multiply-accumulate (MAC) is half of what torch.utils.flop_counter counts, and its formulas hold for whatever has none
here: convolutions, fused attention on GPUs, operations that a user registered there. The formulas here are for what it
lacks or gets wrong:

- sparse operands cost their stored values, not their shape;
- a product of complex numbers is four of real ones;
- in a bilinear form every weight costs one per sample, in a distance every pair one per coordinate;
- a Fourier transform of n complex values costs 2.5 n log2(n), which is half of the usual count of 5 n log2(n)
  operations, and half of that where one side is real;
- attention is counted in full, causal or not.

Elementwise work, sums, normalization, lookups and resampling are not multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


class OpCall(NamedTuple):
    """One call of an operation: its arguments, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def result(self) -> Any:
        """What it returned, the first where there are several."""
        return self.out[0] if isinstance(self.out, list | tuple) and self.out else self.out


Formula = Callable[[OpCall], int]
"""The multiply-accumulates of one call."""


def product(a: Tensor, b: Tensor) -> int:
    """MACs of `a @ b`, batched or not, for vectors and for sparse matrices too."""
    columns = b.size(-1) if b.ndim > 1 else 1
    if b.layout not in SPARSE:
        return (_stored(a) if a.layout in SPARSE else a.numel()) * columns
    if a.layout not in SPARSE:
        return _stored(b) * (a.shape[-2] if a.ndim > 1 else 1)
    left, right = (t.to_sparse(layout=torch.sparse_coo)._indices() for t in (a, b))
    reads, offers = (torch.bincount(axis, minlength=a.shape[-1]) for axis in (left[-1], right[-2]))
    return int((reads * offers).sum())


def _stored(matrix: Tensor) -> int:
    """Values that a sparse tensor stores."""
    return (matrix._values() if matrix.layout is torch.sparse_coo else matrix.values()).numel()


def _product(call: OpCall) -> int:
    return product(*call.args[:2])


def _added_product(call: OpCall) -> int:
    return product(*call.args[1:3])


def _sampled_product(call: OpCall) -> int:
    mask, factor = call.args[:2]
    return _stored(mask) * int(factor.shape[-1])


def _sum_over_last(call: OpCall) -> int:
    """Every output sums over the last axis of the input: a linear layer, whatever its weight looks like."""
    return int(call.out.numel() * call.args[0].size(-1))


def _grouped_product(call: OpCall) -> int:
    """One product per group; the axis that the offsets cut may be longer than what they use."""
    a, b = call.args[:2]
    if a.ndim == b.ndim == 3:
        return product(a, b)
    sizes = {"rows": a.shape[-2], "inner": a.shape[-1], "columns": b.shape[-1]}
    cut = "columns" if a.ndim == 3 else "rows" if b.ndim == 3 else "inner"
    for ends in (*call.args[2:], *call.kwargs.values()):
        if isinstance(ends, Tensor) and ends.dtype == torch.int32 and ends.ndim == 1 and ends.device.type != "meta":
            sizes[cut] = int(ends[-1])
    return math.prod(sizes.values())


def _per_output(weight: Tensor, axis: int = 0) -> int:
    """Weights behind one output, or before one input of a transposed convolution."""
    return weight.numel() // weight.shape[axis]


def _convolution(call: OpCall) -> int:
    return int(call.result.numel()) * _per_output(call.args[1])


def _transposed_convolution(call: OpCall) -> int:
    return int(call.args[0].numel()) * _per_output(call.args[1])


def _time_first_convolution(call: OpCall) -> int:
    return int(call.out.numel()) * _per_output(call.args[1], -1)


def _packed_weight(call: OpCall) -> int:
    """A quantized linear layer or convolution, whose weight is inside an opaque object."""
    return int(call.out.numel()) * _per_output(call.args[1].unpack()[0])


def _bilinear(call: OpCall) -> int:
    shapes = []
    for factor, axes in zip(call.args[:3], call.args[3:6], strict=True):
        shape = list(factor.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        shapes.append(shape)
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _distances(call: OpCall) -> int:
    return int(call.out.numel() * call.args[0].shape[-1])


def _weighted_bags(call: OpCall) -> int:
    """A bag with weights is a weighted sum of rows; one without multiplies nothing."""
    table, indices = call.args[:2]
    weights = call.kwargs.get("per_sample_weights", call.args[6] if len(call.args) > 6 else None)
    return 0 if weights is None else int(indices.numel() * table.shape[-1])


def attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """MACs of both products of attention, (..., heads, length, width) each; several queries may share a key."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention(call: OpCall) -> int:
    return attention(*call.args[:3])


def _attention_gradient(call: OpCall) -> int:
    """Scores and their gradient, and those of the query, the key and the value."""
    query, key, value = call.args[1:4]
    return 2 * attention(query, key, value) + attention(query, key, query) // 2


def _lengths(x: Tensor) -> list[int]:
    """Of every sequence of a batch, also of a nested one."""
    return [part.shape[0] for part in x.unbind()]


def _multi_head(call: OpCall) -> int:
    """The packed projection of query, key and value, both products, and the projection of the result."""
    query, key, _, width, _, packed, _, projection = call.args[:8]
    third, pairs = packed.numel() // 3, list(zip(_lengths(query), _lengths(key), strict=True))
    return sum(q * (third + projection.numel()) + 2 * k * third + 2 * q * k * width for q, k in pairs)


def _encoder_layer(call: OpCall) -> int:
    x, width, _, packed, _, projection = call.args[:6]
    matrices = sum(weight.numel() for weight in (packed, projection, call.args[14], call.args[16]))
    return sum(length * matrices + 2 * length**2 * width for length in _lengths(x))


def _recurrent(weights: Callable[[tuple[Any, ...]], Any]) -> Formula:
    """Every matrix of a recurrent layer is used once at every step of every sequence."""

    def macs(call: OpCall) -> int:
        matrices = sum(weight.numel() for weight in weights(call.args) if weight.ndim == 2)
        return int(call.args[0].shape[:-1].numel() * matrices)

    return macs


def _fourier(real: str = "") -> Formula:
    """Args: which side is real, "input" or "output"."""

    def macs(call: OpCall) -> int:
        side = call.out if real == "output" else call.args[0]
        size = math.prod(side.shape[axis] for axis in call.args[1])
        return round((1.25 if real else 2.5) * float(side.numel()) * math.log2(max(1, size)))

    return macs


def _table(formula: Formula, names: str, space: str = "aten") -> dict[str, Formula]:
    return {f"{space}::{name}": formula for name in names.split()}


RECURRENT: dict[str, Formula] = {
    **_table(_recurrent(lambda args: args[1:3]), "mkldnn_rnn_layer"),
    **_table(_recurrent(lambda args: args[1]), "_cudnn_rnn miopen_rnn"),
    **_table(_recurrent(lambda args: args[2]), "_lstm_mps"),
}
"""Whole recurrent layers."""

FORMULAS: dict[str, Formula] = {
    **_table(_product, "mm bmm mv dot vdot hspmm _int_mm _scaled_mm _scaled_mm_v2"),
    **_table(_product, "_sparse_mm_reduce_impl _sparse_sparse_matmul"),
    **_table(_added_product, "addmm baddbmm addbmm addmv _addmm_activation _sparse_addmm sspaddmm"),
    **_table(_sampled_product, "sparse_sampled_addmm"),
    **_table(_grouped_product, "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
    **_table(_grouped_product, "grouped_mm_fallback", "transformers"),
    **_table(_sum_over_last, "linear mkldnn_linear _mps_linear _mixed_dtypes_linear"),
    **_table(_sum_over_last, "affine_grid_generator cudnn_affine_grid_generator"),
    **_table(_sum_over_last, "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu"),
    **_table(_sum_over_last, "_weight_int4pack_mm_with_scales_and_zeros _dyn_quant_matmul_4bit"),
    **_table(_sum_over_last, "_linear_pointwise", "mkldnn"),
    **_table(_packed_weight, "linear linear_relu linear_dynamic linear_relu_dynamic linear_dynamic_fp16", "quantized"),
    **_table(_packed_weight, "conv1d conv1d_relu conv2d conv2d_relu conv3d conv3d_relu", "quantized"),
    **_table(_convolution, "mkldnn_convolution _slow_conv2d_forward slow_conv3d_forward"),
    **_table(_convolution, "slow_conv_dilated2d slow_conv_dilated3d"),
    **_table(_convolution, "_conv_depthwise2d conv_depthwise3d miopen_convolution miopen_depthwise_convolution"),
    **_table(_convolution, "miopen_convolution_relu miopen_convolution_add_relu cudnn_convolution_relu"),
    **_table(_convolution, "cudnn_convolution_add_relu _nnpack_spatial_convolution _mps_convolution"),
    **_table(_convolution, "_convolution_pointwise", "mkldnn"),
    **_table(_convolution, "deform_conv2d", "torchvision"),
    **_table(_transposed_convolution, "slow_conv_transpose2d slow_conv_transpose3d cudnn_convolution_transpose"),
    **_table(_transposed_convolution, "miopen_convolution_transpose _mps_convolution_transpose"),
    **_table(_transposed_convolution, "_convolution_transpose_pointwise", "mkldnn"),
    **_table(_time_first_convolution, "conv_tbc"),
    **_table(_bilinear, "_trilinear"),
    **_table(_distances, "_cdist_forward _euclidean_dist _pdist_forward"),
    **_table(_weighted_bags, "_embedding_bag _embedding_bag_forward_only"),
    **_table(_attention, "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"),
    **_table(_attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_table(_attention, "_scaled_dot_product_fused_attention_overrideable _triton_scaled_dot_attention"),
    **_table(_attention, "_scaled_dot_product_attention_math_for_mps"),
    **_table(_attention_gradient, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    **_table(_multi_head, "_native_multi_head_attention _triton_multi_head_attention"),
    **_table(_encoder_layer, "_transformer_encoder_layer_fwd"),
    **_table(_fourier(), "_fft_c2c"),
    **_table(_fourier("input"), "_fft_r2c"),
    **_table(_fourier("output"), "_fft_c2r"),
    **RECURRENT,
}
"""By the name that torch's dispatcher knows the operation by."""
