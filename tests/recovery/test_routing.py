"""Layers that get other rows in every run aim at what their original weights give for those of now."""

import warnings

import torch
from torch import nn

import taut
from taut.recovery.routing import of_present_rows, routed
from taut.recovery.targets import Seen, Target
from taut.structure.product_uses import as_product


def target(layer, x, index):
    output = layer(x).detach()
    return Target({0: Seen(index, output[index][None], output.to("meta"))}, norm="norm")


def test_rows_that_stayed_keep_their_targets_and_others_get_new_ones():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(10, 4)
    known = target(layer, x, torch.arange(6))
    assert of_present_rows(layer, known, {0: x + 1}, always=False) is known
    for present, always in ((torch.randn(7, 4), False), (x.flip(0), True)):
        now = of_present_rows(layer, known, {0: present}, always=always)
        wanted = layer(present).detach()[now.seen[0].index][None]
        torch.testing.assert_close(now.rows, wanted)
        assert len(now.seen[0].index) == 6
        assert (now.norm, now.follows) == ("", None)
    assert of_present_rows(layer, known, {0: x[:0]}, always=False).seen == {}


def test_stacks_of_matrices_are_routed():
    model = nn.Sequential(
        as_product(torch.randn(3, 4, 5), (2,), (4,) * 3), as_product(torch.randn(12, 5), (1,), (6, 6))
    )
    assert routed(model, "0.1")
    assert not routed(model, "1.1")
    assert not routed(model, "1")


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.router = nn.Linear(16, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x).tanh()
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if len(rows):
                y = y.index_copy(0, rows, expert(x[rows]))
        return self.head(x + y)


def test_experts_in_a_list_are_solved_too():
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(128, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is read as.*")
        result = taut.compress(model, x, budget=taut.Budget(params=0.6), data=[x], compare=False)
    assert any("experts" in name for step in result.plan.steps for name in step.layers)


def test_rows_of_a_stack_get_targets_of_their_own():
    torch.manual_seed(0)
    stack, x = as_product(torch.randn(3, 4, 5), (2,), (), stacked=True), torch.randn(1, 15, 8)
    assert routed(nn.Sequential(stack), "0.0")
    (layer,) = stack.children()
    rows = layer(x).detach()[0].reshape(3, 4, 8).mT
    known = Target({0: Seen(torch.arange(6), rows[:, :6], layer(x).to("meta"))}, norm="norm")
    assert of_present_rows(layer, known, {0: x + 1}, always=False) is known
    now = of_present_rows(layer, known, {0: x[..., :7]}, always=False)
    torch.testing.assert_close(now.rows, rows[:, now.seen[0].index])
