"""What stands where a block of layers was taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.answering import Answer

WAYS = PASS, ZERO = "pass", "zero"
"""The input goes on as it is; or nothing is added, where the block was a branch of a sum."""


class Skipped(nn.Module):
    """Gives its input, or zeros, in the form in which the block that stood here gave its output.

    Attributes:
        way: "pass" or "zero".
        source: where among its arguments the block found its input: a position, or a keyword.
        items: None for a tensor; else that many in a tuple, of which all but the first are None.
        answers: attributes of the block that hold plain values: other code may read them.
    """

    def __init__(
        self,
        way: str = PASS,
        source: int | str = 0,
        items: int | None = None,
        answers: Mapping[str, Answer] | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.way, self.source, self.items, self.answers = way, source, items, dict(answers or {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A tensor of its own: the code behind it may write to it."""
        x: Tensor = args[self.source] if isinstance(self.source, int) else kwargs[self.source]
        output = x.clone() if self.way == PASS else torch.zeros_like(x)
        return output if self.items is None else (output, *[None] * (self.items - 1))

    def __getattr__(self, name: str) -> Any:
        """What the block would answer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            answers = self.__dict__.get("answers", {})
            if name not in answers:
                raise
        return answers[name]

    def extra_repr(self) -> str:
        """The way."""
        return self.way
