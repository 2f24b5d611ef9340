"""What stands behind a factor's first layer, solved again on what that layer now gives.

A layer of large fan-in is refitted from fewer rows than it has inputs. Behind its new first layer only r channels are
left, and there the rows suffice: with z the unfolded output of the first layer, M = argmin E|y - M z - b|^2 + lambda
|M - M0|^2, M0 the product of the layers behind, and M cut again to their rank by its leading directions in E[z z^T].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from taut.decompose.balance import level, orthogonalize
from taut.decompose.linalg import metric_factor
from taut.decompose.outputs import OutputMoment
from taut.decompose.svd import directions
from taut.methods.factorization import regular
from taut.recovery.samples import ROWS
from taut.recovery.solving import Moments, least_squares
from taut.recovery.targets import Target, together
from taut.structure.patches import bias_of, fan_in, grouped_weight, groups_of, input_rows, weight_of
from taut.structure.surgery import shallow

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

WIDEST = 4096
"""Unfolded channels behind the first layer up to which their second moment is held."""


def refit_rest(chain: nn.Module, inputs: Mapping[int, Tensor], target: Target, B: OutputMoment | None) -> None:
    """Solve the layers behind the first of `chain` again, in place.

    Args:
        chain: two or three layers without anything between them.
        inputs: present inputs of the first, batch by batch.
        target: what the original gave behind the last.
        B: weight of the outputs, or None.
    """
    parts: list[Any] = list(chain.children())
    if not isinstance(chain, nn.Sequential) or len(parts) not in {2, 3}:
        return
    alike = {groups_of(part) if isinstance(part, LAYERS) else 0 for part in parts}
    if len(alike) > 1 or fan_in(parts[1]) > WIDEST:
        return  # clustered channels: the layers behind the first are not one matrix
    first, second, last = parts[0], parts[1], parts[-1]
    some = target.thinned(max(1, min(ROWS, (1 << 26) // fan_in(second))))
    rows = [input_rows(second, first(inputs[n]), seen.output, seen.index) for n, seen in some.seen.items()]
    centred = bias_of(last) is not None
    moments = Moments.of(together(rows), centred=centred)
    if moments.gram is None:
        return
    M, bias = least_squares(_product(parts), moments, some.rows, centred=centred)
    if bias is not None:
        last.bias.data = bias.to(last.bias)
    if last is second:
        second.weight.data = M.reshape(second.weight.shape).to(second.weight)
        return
    weight = regular(B)
    half = None if weight is None else metric_factor(weight)
    M = M.double()
    r = second.weight.shape[0] // groups_of(second)
    basis = directions(M @ moments.gram @ M.mT, half, r)
    core = torch.einsum("gqo,gok->gqk", basis.down[:, :r], M)
    taps = weight_of(second)[0, 0].numel()
    cube = core.reshape(*core.shape[:2], -1, taps)  # (g, q, r_in, taps)
    up, flipped = orthogonalize(basis.up[..., :r].mT, cube.transpose(1, 2))
    factors = level(first.weight.double(), flipped.transpose(1, 2), up.mT)
    for part, factor in zip(parts, factors, strict=True):
        part.weight.data = factor.reshape(part.weight.shape).to(part.weight).contiguous()


def _product(parts: list[Any]) -> nn.Module:
    """One layer in place of all behind the first, with the bias of the last."""
    second, last = parts[1], parts[-1]
    if last is second:
        return cast(nn.Module, second)
    product: Any = shallow(second)
    core, up = grouped_weight(second), grouped_weight(last)[..., 0]
    whole = torch.einsum("goq,gqcs->gocs", up, core)
    product.weight = nn.Parameter(whole.flatten(0, 1).reshape(-1, *weight_of(second).shape[1:]), requires_grad=False)
    product.bias = last.bias
    return cast(nn.Module, product)
