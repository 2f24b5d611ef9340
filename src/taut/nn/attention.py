"""Attention with projections of its own for queries, keys and values: what `nn.MultiheadAttention` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from taut.nn.answering import Described

Output = tuple[Tensor, Tensor | None]

PROJECTIONS = "q_proj", "k_proj", "v_proj"
"""The layers by which inputs become queries, keys and values."""


class Attention(nn.Module):
    """Multi-head attention, softmax(Q Kᵀ / sqrt(d) + mask) V of every head, with an `nn.Linear` for each projection.

    It is called as `nn.MultiheadAttention` is, and gives the same (Vaswani et al. 2017, "Attention Is All You Need").
    How many heads there are is read from what the projections give: with layers in their places that give fewer heads
    it goes on working.

    What other code asks of the packed parameters (`in_proj_weight`, `in_proj_bias`) is answered; torch's encoder layers
    are told that the projections are not packed, and run one operation after the other.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers, or what takes their places.
        bias_k, bias_v: one more key and value for all samples, or None.
        embed_dim, kdim, vdim: widths of queries, keys and values as they come in.
        num_heads: heads that it was made with. head_dim: width of a head.
        dropout: share of the attention weights that are zero in training.
        batch_first: whether the batch is the first axis. add_zero_attn: whether there is one more key, of zeros.
    """

    def __init__(  # noqa: PLR0913 - the settings of nn.MultiheadAttention
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `nn.MultiheadAttention`."""
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn

        def linear(inputs: int) -> nn.Linear:
            return nn.Linear(inputs, embed_dim, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(embed_dim), linear(self.kdim), linear(self.vdim)
        self.out_proj = linear(embed_dim)
        self.bias_k: nn.Parameter | None
        self.bias_v: nn.Parameter | None
        for name in ("bias_k", "bias_v"):
            blank = torch.empty(1, 1, embed_dim, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(nn.init.xavier_normal_(blank)) if add_bias_kv else None)

    def forward(  # noqa: PLR0913, PLR0917 - as nn.MultiheadAttention is called
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        """Attend; with the weights where these are needed.

        Args:
            query: (batch, length, width), time first where `batch_first` is not set; or of one sample (length, width).
            key: likewise, of another length.
            value: of the keys' length.
            key_padding_mask: (batch, keys), true at keys that are padding, or numbers that are added.
            need_weights: whether the attention weights are wanted, too.
            attn_mask: (queries, keys) or (batch * heads, queries, keys), true where nothing is seen, or added.
            average_attn_weights: whether these are averaged over the heads.
            is_causal: a hint that `attn_mask` is causal.

        Raises:
            RuntimeError: `is_causal` without a mask, or a mask of another shape.
        """
        if any(t.is_nested for t in (query, key, value)):
            raise RuntimeError("taut.nn.Attention takes no nested tensors: pad them, and give a key_padding_mask.")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask, too.")
        batched = query.ndim == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (1, 2, 0, 3)
        q, k, v = (
            _by_heads(layer(t), self.head_dim).permute(order)
            for layer, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if hinted else attn_mask, key_padding_mask, q, k)
        k, v = self._longer(k, self.bias_k), self._longer(v, self.bias_v)
        mixed, weights = self._mixed(q, k, v, mask, causal=hinted, need_weights=need_weights)
        back = [order.index(axis) for axis in range(4)]
        output = self.out_proj(mixed.permute(back).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, need_weights: bool
    ) -> Output:
        """The values of every head, mixed by its weights, and these where they are needed."""
        share, scale = self.dropout if self.training else 0.0, self.head_dim**-0.5
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, share, causal, scale=scale), None
        scores = (q * scale) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = functional.dropout(weights, share) if share else weights
        return weights @ v, weights

    def _longer(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (batch, heads, length, width) with those that are the same for all samples."""
        if bias is not None:
            one = _by_heads(bias, self.head_dim).transpose(1, 2)
            t = torch.cat([t, one.expand(len(t), -1, -1, -1)], 2)
        return functional.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to scores (batch, heads, queries, keys), as a tensor of four axes; None where nothing is."""
        batch, heads, queries, _ = q.shape
        keys, more = k.shape[2], (self.bias_k is not None) + self.add_zero_attn
        total: Tensor | None = None
        if attn_mask is not None:
            _expect(attn_mask, "attn_mask", (queries, keys), (batch * heads, queries, keys))
            added = _added(attn_mask, q.dtype)
            total = added.view(*((1, 1) if added.ndim == 2 else (batch, heads)), queries, keys)
        if padding is not None:
            _expect(padding, "key_padding_mask", (batch, keys))
            added = _added(padding, q.dtype).view(batch, 1, 1, keys)
            total = added if total is None else total + added
        return functional.pad(total, (0, more)) if total is not None and more else total

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether the projections are packed into one parameter."""
        return False

    @property
    def in_proj_weight(self) -> Any:
        """The projections' weights below each other; None where their inputs are of different widths."""
        if not self.embed_dim == self.kdim == self.vdim:
            return None
        return self._described((3 * self.embed_dim, self.embed_dim), "weight", PROJECTIONS)

    @property
    def in_proj_bias(self) -> Any:
        """The projections' biases in a row; None where they have none."""
        if getattr(self.q_proj, "bias", True) is None:
            return None
        return self._described((3 * self.embed_dim,), "bias", PROJECTIONS)

    @property
    def q_proj_weight(self) -> Any:
        """The weight of the projection of queries."""
        return self._described((self.embed_dim, self.embed_dim), "weight", ["q_proj"])

    @property
    def k_proj_weight(self) -> Any:
        """The weight of the projection of keys."""
        return self._described((self.embed_dim, self.kdim), "weight", ["k_proj"])

    @property
    def v_proj_weight(self) -> Any:
        """The weight of the projection of values."""
        return self._described((self.embed_dim, self.vdim), "weight", ["v_proj"])

    def _described(self, shape: tuple[int, ...], name: str, layers: Sequence[str]) -> Any:
        def held() -> list[Any]:
            return [getattr(getattr(self, layer), name) for layer in layers]

        return Described(shape, self, lambda: held()[0] if len(layers) == 1 else torch.cat(held()), parts=held)

    def extra_repr(self) -> str:
        """What the layers do not tell."""
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}, dropout={self.dropout}"


def _by_heads(t: Tensor, width: int) -> Tensor:
    """What a projection gives, head by head."""
    # -1 says that the number may change, which whoever follows channels reads; an empty batch has no -1.
    return t.view(*t.shape[:-1], -1 if t.numel() else t.shape[-1] // width, width)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to scores."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _expect(mask: Tensor, name: str, *shapes: tuple[int, ...]) -> None:
    """Say which mask is of another shape; compilers do not know every length, and leave that to `view`."""
    if not torch.compiler.is_compiling() and tuple(mask.shape) not in shapes:
        words = " or ".join(str(shape) for shape in shapes)
        raise RuntimeError(f"{name} is of shape {tuple(mask.shape)}: it has to be {words}.")
