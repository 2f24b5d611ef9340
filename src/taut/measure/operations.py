"""Which operations of torch multiply and accumulate, which do not, and of which nobody knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from taut.measure.formulas import FORMULAS, Formula, OpCall

OUTER = {"aten::mul", "aten::addcmul", "aten::addr"}
"""Products of two tensors, element by element."""

CREATING = {"aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift"}
"""Operations whose input is a tensor that Python code has just written down."""

WITHOUT_PRODUCTS = {"prims", "prim", "profiler", "c10d", "_c10d_functional", "torchvision", "rngprims"}
"""Namespaces other than aten that multiply no matrices, but for what has a formula."""

_LIGHT = {
    "copies, views, lookups": """
        as_strided assert block_diag cat channel_shuffle chunk_cat clone coalesce col2im conj constant_pad convert_
        copy detach diag efficientzerotensor embedding flip fused_sdp_choice gather im2col index jagged_to
        lazy_clone lift local_scalar lu_unpack masked mkldnn_reorder mkldnn_reshape mkldnn_transpose narrow
        nested_from nested_get nested_tensor nnz nonzero pack_padded pad_packed padded_dense pin_memory pixel_ put
        reflection_pad repeat replication_pad reshape resize roll rot90 scatter select set slice sparse_broadcast
        sparse_mask sparse_resize spdiags split squeeze stack take to_ transpose tril triu unfold unique unsafe_
        unsqueeze validate view where""",
    "properties, checks": """
        cudnn_init_dropout cudnn_rnn_flatten dense_dim dimI dimV functional_assert functional_sym record_stream size
        sparse_dim stride sym_""",
    "new tensors, random numbers": """
        arange bartlett bernoulli binomial blackman cauchy dirichlet empty exponential eye fft_fftfreq fft_rfftfreq
        fill full geometric hamming hann kaiser linspace log_normal logspace multinomial new_ normal ones philox
        poisson rand sample_dirichlet scalar_tensor sparse_compressed sparse_coo_tensor standard_gamma uniform zero""",
    "normalization, activation, dropout": """
        batch_norm cudnn_batch_norm fused_dropout fused_rms_norm gelu glu hardswish log_sigmoid log_softmax
        miopen_batch_norm native_batch_norm native_dropout native_group_norm native_layer_norm native_norm prelu
        quantized_batch_norm renorm rms_norm rrelu safe_softmax softmax thnn_fused transform_bias weight_norm""",
    "reductions, orders, comparisons": """
        all amax amin any arg bincount bucketize count_nonzero cum dist equal has_ histc histogram is kthvalue
        linalg__powsum linalg_check_errors linalg_vector_norm logcumsumexp logsumexp max mean median min mode nan
        norm prod searchsorted segment_reduce sort sparse_csr_prod sparse_csr_sum sparse_log_softmax sparse_softmax
        sparse_sum std sum topk trace var""",
    "pooling, resampling, losses": """
        adaptive_ avg_pool binary_cross ctc_loss cudnn_ctc_loss cudnn_grid_sampler fractional_max grid_sampler hash
        huber mkldnn_adaptive mkldnn_max_pool mse_loss multi_margin multilabel nll_loss quantized_max_pool smooth_l1
        soft_margin upsample use_cudnn use_miopen""",
    "elementwise, also to fewer bits": """
        add_relu addr complex copysign dequantize fake_quantize floor_divide foreach fused_moving_avg int_repr
        linalg_cross logaddexp make_per polar q_ quantize_per""",
}
LIGHT = tuple(name for names in _LIGHT.values() for name in names.split())
"""How the names of aten's operations begin whose work is linear in the elements moved; most others have a tag."""


@dataclass(frozen=True)
class Operation:
    """What a count has to know about one overload of an operation.

    Attributes:
        name: as torch's dispatcher spells it, without the overload and the underscore of one that works in place:
            "aten::mm".
        formula: what it costs, None where nobody knows.
        light: its work is linear in the elements that it moves, none of it multiply-accumulates.
        writes: positions and names of the arguments that it changes.
        random: its result is another one every time.
    """

    name: str
    formula: Formula | None
    light: bool
    writes: tuple[int | str, ...]
    random: bool

    @property
    def title(self) -> str:
        """The name as Python code has it, "aten.mm"."""
        return self.name.replace("::", ".")

    def written(self, call: OpCall) -> list[Any]:
        """The arguments that a call changes."""
        by_position = [call.args[key] for key in self.writes if isinstance(key, int) and key < len(call.args)]
        return by_position + [call.kwargs[key] for key in self.writes if isinstance(key, str) and key in call.kwargs]

    def macs(self, call: OpCall) -> int | None:
        """Multiply-accumulates of one call, None where they are not known."""
        if self.formula is None:
            return None
        try:
            macs = self.formula(call)
        except Exception:  # a nested tensor has no shape, a registered formula may fail: a count stops no run
            return None
        return macs * (1 if "_fft_" in self.name else _real_products(call.result))


def describe_operation(function: Any) -> Operation:
    """What is to know about an `OpOverload`."""
    schema = function._schema
    space, _, name = str(schema.name).partition("::")
    name = name if name.endswith("__") else name.rstrip("_")
    aliases = [argument.alias_info for argument in schema.arguments]
    formula = FORMULAS.get(f"{space}::{name}") or torch_formula(function._overloadpacket)
    light = (
        _is_elementwise(space, name.removesuffix("_backward"))
        or any(alias is not None and not alias.is_write for alias in aliases)  # a view
        or space in WITHOUT_PRODUCTS
        or (space == "aten" and _is_light(name))
    )
    writes = tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return Operation(
        f"{space}::{name}",
        formula,
        light and formula is None,
        writes,
        torch.Tag.nondeterministic_seeded in function.tags,
    )


def _is_elementwise(space: str, name: str) -> bool:
    """Torch tags operations as such, but not every form that writes into an argument."""
    packet = getattr(getattr(torch.ops, space), name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _is_light(name: str) -> bool:
    copies = name == "t" or name.endswith("_copy")
    return copies or name.removesuffix("_backward").lstrip("_").startswith(LIGHT)


def torch_formula(key: Any) -> Formula | None:
    """What torch's own counter knows about an operation, or about one that takes functions, such as flex_attention."""
    formula = flop_registry.get(key)
    return None if formula is None else lambda call: int(formula(*call.args, **call.kwargs, out_val=call.out)) // 2


def outer_macs(operands: list[Tensor], result: Tensor) -> int:
    """MACs of a matrix product that is written with an operation of OUTER: the result is larger than either factor.

    `(x[:, None] * weight).sum(-1)` costs what `x @ weight.T` does.
    """
    factors = [factor.numel() for factor in operands[-2:]]
    return result.numel() * _real_products(result) if len(factors) > 1 and result.numel() > max(factors) else 0


def _real_products(result: Any) -> int:
    """Products of real numbers in one of the result's numbers."""
    return 4 if isinstance(result, Tensor) and result.is_complex() else 1
