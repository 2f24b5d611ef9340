"""What the export to ONNX says: a remedy where an output is no tensor, and nothing of what its helpers say."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from taut.measure import onnx


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("transformers.cache_utils.DynamicCache", "set model.config.use_cache = False"),
        ("__main__.Answer", "returns the tensors of the Answer alone"),
    ],
)
def test_outputs_that_are_no_tensors_have_a_remedy(kind: str, said: str) -> None:
    reason = onnx._reason(
        RuntimeError(f"Found <class '{kind}'> in output, which is not a known type. If this type holds tensors, ...")
    )
    assert reason.endswith("which is not a known type.")
    assert said in onnx._remedy(reason, nn.Linear(1, 1))
    assert onnx._remedy("RuntimeError: something else", nn.Linear(1, 1)) == ""


@pytest.mark.parametrize("reason", ["No ONNX function found for 'transformers.grouped_mm_fallback'", "data-dependent"])
def test_experts_that_are_not_exported_have_a_remedy(reason: str) -> None:
    """What torch's exporter says of transformers' mixtures; see findings/experts-three-ways-of-which-one-exports.sh."""

    class Mixture(nn.Linear):
        def set_experts_implementation(self, way: str) -> None:
            """As in transformers."""

    assert "set_experts_implementation('batched_mm')" in onnx._remedy(reason, Mixture(1, 1))
    assert onnx._remedy(reason, nn.Linear(1, 1)) == ""


def test_helpers_are_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    name = "onnxscript.optimizer._constant_folding"
    with onnx._silence():
        logging.getLogger(name).warning("Evaluation failed: cannot reshape array")
    assert not caplog.records
    logging.getLogger(name).warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]
