"""Which modules can be taken out as a block, and what a cache counts."""

import pytest
import torch
from torch import nn

from taut.core.example import Example
from taut.structure.blocks import cache_departs, departs_without, find_blocks, private_parameters, without
from taut.structure.tracing import trace


class Residual(nn.Module):
    """x + f(x); what it gives it gives in a form of its own."""

    def __init__(self, width=6, form=lambda y: y):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.form = form

    def forward(self, x, scale=1.0):
        return self.form(x + scale * self.body(x))


class Model(nn.Module):
    def __init__(self, *blocks, run=None):
        super().__init__()
        self.head, self.blocks, self.tail = nn.Linear(6, 6), nn.ModuleList(blocks), nn.Linear(6, 3)
        self.run = run or (lambda model, x: [x := block(x) for block in model.blocks][-1])

    def forward(self, x):
        return self.tail(self.run(self, self.head(x)))


def blocks_of(model):
    example = Example(model, torch.randn(4, 6))
    trace(model, example)
    return find_blocks(model, example)


def test_blocks_give_the_shape_that_they_take():
    blocks = blocks_of(Model(Residual(), Residual()))
    assert set(blocks) == {"blocks.0", "blocks.1"}  # of a body, which holds the same, the block around it
    assert blocks["blocks.1"].block.layers == ("blocks.1.body.0", "blocks.1.body.2")
    assert (blocks["blocks.1"].block.source, blocks["blocks.1"].block.items) == (0, None)


@pytest.mark.parametrize(
    ("form", "run", "wanted"),
    [
        (lambda y: (y,), lambda m, x: [x := b(x)[0] for b in m.blocks][-1], (0, 1)),
        (lambda y: (y, None, None), lambda m, x: [x := b(x)[0] for b in m.blocks][-1], (0, 3)),
        (lambda y: y, lambda m, x: [x := b(scale=2.0, x=x) for b in m.blocks][-1], ("x", None)),
        (lambda y: (y, y.mean()), lambda m, x: [x := b(x)[0] for b in m.blocks][-1], None),
        (lambda y: {"y": y}, lambda m, x: [x := b(x)["y"] for b in m.blocks][-1], None),
        (lambda y: y[:, :3], lambda m, x: [x := torch.cat([b(x), b(x)], 1) for b in m.blocks][-1], None),
        (lambda y: y, lambda m, x: [x := b(x) * m.blocks[0].body[0].bias.sum() for b in m.blocks][-1], "others"),
    ],
    ids=["a tuple of one", "with nothing beside", "by keyword", "a second value", "a dict", "narrower", "read"],
)
def test_a_block_is_known_by_its_calls(form, run, wanted):
    blocks = blocks_of(Model(Residual(form=form), Residual(form=form), run=run))
    found = {name: (layer.block.source, layer.block.items) for name, layer in blocks.items()}
    if wanted is None:
        assert not any(name in found for name in ("blocks.0", "blocks.1"))
    elif wanted == "others":  # code outside reads what is inside of the first
        assert "blocks.0" not in found
        assert found["blocks.1"] == (0, None)
    else:
        assert found["blocks.0"] == wanted


def test_blocks_that_stand_twice_stay():
    shared = Residual()
    assert not blocks_of(Model(shared, shared))


def test_without_a_block_the_model_computes_the_rest_and_is_itself_again():
    model = Model(Residual(), Residual()).eval()
    x = torch.randn(4, 6)
    whole, blocks = model(x), blocks_of(model)
    with without(model, blocks["blocks.0"], "pass"):
        assert torch.equal(model(x), model.tail(model.blocks[1](model.head(x))))
    with without(model, blocks["blocks.0"], "zero"):
        assert torch.equal(model(x), model.tail(model.blocks[1](torch.zeros(4, 6))))
    assert torch.equal(model(x), whole)


def test_parameters_that_others_hold_too_do_not_go():
    model = Model(Residual(), Residual())
    model.blocks[1].body[0].weight = model.blocks[0].body[0].weight
    assert private_parameters(model, "blocks.1") == 36 + 6 + 6


def test_a_cache_that_counts_in_a_layer_keeps_it():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 30, "n_positions": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens)).eval()
    example = Example(model, {"input_ids": torch.randint(3, 30, (2, 6))})
    trace(model, example)
    blocks = find_blocks(model, example)
    assert cache_departs(model, example) is None
    assert "cache" in departs_without(model, example, blocks["transformer.h.0"], "pass")
    assert departs_without(model, example, blocks["transformer.h.1"], "pass") is None
