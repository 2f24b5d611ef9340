"""Which modules can be taken out as a block, and what a cache counts."""

import types

import pytest
import torch
from torch import nn

import taut
from taut.core.example import Example
from taut.structure.blocks import cache_agrees, departs_without, find_blocks, private_parameters, without
from taut.structure.tracing import trace
from taut.types import Plan, Step


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
    own = private_parameters(model)
    assert own["blocks.1"] == 36 + 6 + 6
    assert own["blocks"] == 3 * 36 + 4 * 6


SIZES = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(transformers):
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SIZES)), {}


def t5(transformers):
    sizes = {"num_layers": 2, "num_decoder_layers": 3, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **SIZES, decoder_start_token_id=0))
    return model, {"decoder_input_ids": torch.randint(3, 30, (2, 5))}


def whisper(transformers):
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 8, "max_target_positions": 16, "decoder_start_token_id": 1, **SIZES}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
    return model, {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(3, 30, (2, 5))}


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (gpt2, "transformer.h.0", "transformer.h.1"),
        (t5, None, "decoder.block.1.layer.2"),
        (whisper, "model.decoder.layers.0.self_attn", "model.decoder.layers.1"),
    ],
)
def test_a_cache_that_counts_in_a_layer_keeps_it(make, first, second):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make(transformers)
    inputs = inputs or {"input_ids": torch.randint(3, 30, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    if make is t5:
        inputs["input_ids"] = torch.randint(3, 30, (2, 6))
    example = Example(model.eval(), inputs)
    trace(model, example)
    assert cache_agrees(model, example) is True
    blocks = find_blocks(model, example)
    if first is not None:
        assert "counts its positions wrongly" in departs_without(model, example, blocks[first], "pass")
    assert departs_without(model, example, blocks[second], "pass") is None


class Remembering(nn.Module):
    """Keeps what it has seen in a dictionary of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 6), nn.ModuleList([Residual(), Residual()]), nn.Linear(6, 3)

    def forward(self, x, past=None):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            if past is not None:
                past[number] = x
            x = block(x)
        return self.last(x)


def test_where_a_cache_cannot_be_tried_blocks_stay():
    model = Remembering().eval()
    example = Example(model, torch.randn(4, 6))
    trace(model, example)
    reason = departs_without(model, example, find_blocks(model, example)["blocks.1"], "pass")
    assert "'past'" in reason
    assert "could not be tried" in reason


class Training(nn.Module):
    """Reads what is inside of a block when it is trained."""

    def __init__(self):
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Residual(), Residual()]), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        y = self.last(x)
        return y + 0 * self.blocks[0].body[0].weight.sum() if self.training else y


def test_what_training_reads_of_a_block_keeps_it():
    assert set(blocks_of(Training().eval())) == {"blocks.1"}


class Noted(Residual):
    """Keeps what it saw, under two names."""

    scale = property(lambda self: self.aux)

    def forward(self, x):
        y = self.body(x)
        self.aux, self.number = y.pow(2).mean(), float(y.detach().sum())
        return x + self.used(y)

    def used(self, y):
        return y if self.aux is not None else 0 * y

    def penalty(self):
        return self.aux


class Reader(nn.Module):
    """Reads something of its blocks, or of the first one, in one way or another."""

    def __init__(self):
        super().__init__()
        self.r, self.tail = nn.ModuleList([Noted(), Noted(), Noted()]), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.r:
            x = block(x)
        return self.tail(x)


class Trained(Reader):
    def forward(self, x):
        return (super().forward(x), sum(r.aux for r in self.r)) if self.training else super().forward(x)


class Evaluated(Reader):
    def forward(self, x):
        return super().forward(x) + 0 * self.r[0].number


class Asked(Reader):
    def loss(self):
        return torch.stack([r.aux for r in self.r]).sum()


class Called(Reader):
    def loss(self):
        return sum(r.penalty() for r in self.r)


class ByString(Reader):
    def loss(self):
        return sum(getattr(r, "scale", 0) for r in self.r)


class ByHelper(Reader):
    def loss(self):
        return summed(self.r)


class ByModule(Reader):
    def loss(self):
        return helpers.summed(self.r)


class ByHook(Reader):
    def __init__(self):
        super().__init__()
        self.tail.register_forward_pre_hook(lambda *_: summed(self.r) if self.tail.in_features < 0 else None)


def summed(blocks):
    return sum(block.aux for block in blocks)


READ = {Reader: None, Trained: "aux", Evaluated: "number", Asked: "aux", Called: "penalty", ByString: "scale"}
helpers = types.ModuleType("helpers")
helpers.summed = summed
READ |= {ByHelper: "aux", ByModule: "aux", ByHook: "aux"}


@pytest.mark.parametrize("kind", READ)
def test_what_other_code_reads_of_a_block_keeps_it(kind):
    model = kind().eval()
    example = Example(model, torch.randn(4, 6))
    trace(model, example)
    reason = departs_without(model, example, find_blocks(model, example)["r.0"], "pass")
    assert (reason is None) == (READ[kind] is None)
    assert reason is None or f"'{READ[kind]}'" in reason


def test_a_model_whose_training_reads_a_block_still_trains():
    model, x = Trained().eval(), torch.randn(8, 6)
    net = trace(model, x)
    with pytest.warns(UserWarning, match="reads its attribute 'aux'"):
        small = taut.apply(model, Plan.of(net, [Step(("r.0",), "blocks")]), taut.observe(net, model, [x]))
    assert len(small.train()(x)) == 2


class Pooling(nn.Module):
    """Keeps the shape of short inputs alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        return x + self.body(x) if x.shape[1] < 10 else (x + self.body(x))[:, ::2]


def test_what_is_no_block_on_the_data_is_none():
    model = nn.Sequential(nn.Linear(6, 6), Pooling(), Residual(), nn.Linear(6, 3)).eval()
    short, long = torch.randn(2, 4, 6), torch.randn(2, 12, 6)
    assert {block.name for block in trace(model, short).blocks} == {"1", "2"}
    assert {block.name for block in trace(model, short, [long]).blocks} == {"2"}
