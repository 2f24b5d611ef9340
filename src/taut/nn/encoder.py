"""torch's encoder with layers that take no nested tensors: what it gives at padded positions stays what it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FUSED_ON = frozenset({"cpu", "cuda", "xpu"})
"""Devices on which torch's encoder makes its input a nested tensor."""


class FilledEncoder(nn.TransformerEncoder):
    """Runs its layers on padded tensors, and fills padded positions with zeros where torch's encoder does.

    Made with `enable_nested_tensor=True`, the default, torch's encoder drops padded positions in front of its layers,
    and gives zeros there, which go through its last norm: in eval mode, without gradients, for a padding mask that is
    left aligned, and no other mask.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `nn.TransformerEncoder`."""
        if src_key_padding_mask is None or mask is not None or not self._fills(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=None, is_causal=is_causal is True, src_key_padding_mask=src_key_padding_mask
            )
        said = src_key_padding_mask.logical_not()
        aligned = (said[:, :-1] | said[:, 1:].logical_not()).all()
        output = output.masked_fill((aligned & said.logical_not())[..., None], 0.0)
        return output if self.norm is None else self.norm(output)

    def _fills(self, src: Tensor) -> bool:
        """Whether torch would take a nested tensor in place of this input, as far as its padding mask allows."""
        first = self.layers[0]
        fused = torch.backends.mha.get_fastpath_enabled() and not first.training and not torch.is_autocast_enabled()
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters()))
        return fused and not tracked and src.dim() == 3 and not src.is_nested and src.device.type in FUSED_ON
