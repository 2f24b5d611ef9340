"""Which operations cost nothing, which do, and which are not known."""

import pytest
import torch

from taut.measure.formulas import OpCall
from taut.measure.operations import describe_operation, outer_macs

aten = torch.ops.aten


@pytest.mark.parametrize(
    "function",
    [
        aten.mul.Tensor,
        aten.relu_.default,
        aten.relu.out,
        aten.t.default,
        aten.native_layer_norm.default,
        aten.native_batch_norm.default,
        aten._weight_norm_interface.default,
        aten.embedding.default,
        aten.index.Tensor,
        aten.cat.default,
        aten._to_copy.default,
        aten._softmax.default,
        aten.sum.dim_IntList,
        aten.upsample_bicubic2d.default,
        aten._prelu_kernel.default,
        aten.gelu_backward.default,
        aten.max_pool2d_with_indices.default,
    ],
    ids=str,
)
def test_light_operations(function):
    operation = describe_operation(function)
    assert operation.light
    assert operation.formula is None


@pytest.mark.parametrize(
    "function",
    [
        aten.linalg_matrix_exp.default,
        aten._linalg_solve_ex.default,
        aten.linalg_inv_ex.default,
        aten.linalg_qr.default,
        aten.cholesky_solve.default,
        aten.quantized_lstm.input,
        aten.mkldnn_rnn_layer_backward.default,
    ],
    ids=str,
)
def test_operations_that_nobody_counts(function):
    operation = describe_operation(function)
    assert not operation.light
    assert operation.formula is None


def test_every_form_of_an_operation_is_the_same_operation():
    forms = [aten.addmm.default, aten.addmm.out, aten.addmm_.default]
    assert {describe_operation(form).name for form in forms} == {"aten::addmm"}
    assert describe_operation(aten.addmm.default).title == "aten.addmm"
    assert [describe_operation(form).writes for form in forms] == [(), ("out",), (0,)]
    call = OpCall((1, 2, 3), {"out": 4}, 4)
    assert describe_operation(aten.addmm.out).written(call) == [4]
    assert describe_operation(aten.addmm_.default).written(call) == [1]


def test_torch_s_formulas_hold_where_there_is_no_better_one():
    x, w = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    settings = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    operation = describe_operation(aten.convolution.default)
    assert operation.macs(OpCall((x, w, *settings), {}, torch.ones(2, 4, 6, 6))) == 2 * 36 * 4 * 27


def test_a_formula_that_fails_is_no_count():
    operation = describe_operation(aten.mm.default)
    assert operation.macs(OpCall(("no tensor",), {}, None)) is None


def test_outer_products_are_larger_than_either_factor():
    column, row, both = torch.ones(3, 1), torch.ones(4), torch.ones(3, 4)
    assert outer_macs([column, row], column * row) == 12
    assert outer_macs([both, row], both * row) == 0
    assert outer_macs([both], both * 2) == 0
    assert outer_macs([column + 0j, row], (column + 0j) * row) == 4 * 12
