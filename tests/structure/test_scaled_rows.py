"""Embeddings that multiply their rows by a number are told from those that do something else."""

import pytest
import torch
from torch import nn

from taut.structure.scaled_rows import scale_of


class Fixed(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 0.5


class Held(nn.Embedding):
    """As Gemma's: a buffer that is not saved, in the weight's own type."""

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.register_buffer("size", torch.tensor(48**0.5), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.size.to(self.weight.dtype)


class Saved(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("size", torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.size


class Learned(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.size = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.size


class Shifted(nn.Embedding):
    """As OPT's positions: other rows than are asked for."""

    def forward(self, x):
        return super().forward(x + 2)


class Normed(nn.Embedding):
    def forward(self, x):
        return nn.functional.normalize(super().forward(x), dim=-1)


class Dropped(nn.Embedding):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Padded(nn.Embedding):
    def forward(self, x):
        return super().forward(x).masked_fill((x == self.padding_idx)[..., None], 0)


class Placed(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * torch.arange(1, x.shape[-1] + 1)[:, None]


class Nothing(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 0


def test_numbers_are_found():
    assert scale_of(nn.Embedding(40, 6)) == 1
    assert scale_of(Fixed(40, 6, padding_idx=30)) == 0.5
    assert scale_of(Held(40, 6)) == pytest.approx(48**0.5)
    assert scale_of(Held(40, 6).bfloat16()) == 6.9375


@pytest.mark.parametrize("kind", [Saved, Learned, Shifted, Normed, Dropped, Placed, Nothing])
def test_what_is_no_number_is_none(kind):
    assert scale_of(kind(40, 6)) is None


@pytest.mark.parametrize("row", [1, 30])
def test_a_row_that_is_treated_apart_is_seen(row):
    assert scale_of(Padded(40, 6, padding_idx=row)) is None


def test_the_embedding_is_as_it_was():
    table = Held(40, 6, padding_idx=30).train()
    before = table.weight.clone()
    scale_of(table)
    assert torch.equal(table.weight, before)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx, table.training) == (40, 6, 30, True)
