"""`nn.MultiheadAttention` and the layers of which it consists: the same for every call, and what is no such thing."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import taut
from taut.core.modes import unfused
from taut.nn import Attention
from taut.structure.attention_form import MORE, OTHERWISE, attention_form, unlike

SETTINGS = st.fixed_dictionaries(
    {
        "num_heads": st.sampled_from([1, 2, 3]),
        "width": st.sampled_from([1, 2, 4]),
        "other_widths": st.booleans(),
        "bias": st.booleans(),
        "add_bias_kv": st.booleans(),
        "add_zero_attn": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.3]),
    }
)
CALLS = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([None, 1, 3]),
        "lengths": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "own": st.booleans(),
        "padding": st.sampled_from([None, torch.bool, torch.float64]),
        "mask": st.sampled_from([None, torch.bool, torch.float64]),
        "each": st.booleans(),
        "need_weights": st.booleans(),
        "average_attn_weights": st.booleans(),
        "training": st.booleans(),
    }
)


def module(num_heads, width, other_widths=False, **kinds):
    others = {"kdim": num_heads * width + 1, "vdim": num_heads * width + 2} if other_widths else {}
    made = nn.MultiheadAttention(num_heads * width, num_heads, dtype=torch.float64, **kinds, **others)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def mask_of(kind, *shape):
    """Of truth values, nothing of which is all true, or of numbers."""
    if kind != torch.bool:
        return torch.randn(shape, dtype=kind)
    hidden = torch.rand(shape) < 0.5
    hidden[..., 0] = False
    return hidden


def called(made, asked):
    """Arguments and keywords of a call."""
    batch, (queries, keys), own = asked["batch"], asked["lengths"], asked["own"]
    own = own and made.embed_dim == made.kdim == made.vdim
    keys = queries if own else keys

    def sequence(length, width):
        shape = (length, width) if batch is None else (batch, length, width)
        drawn = torch.randn(shape, dtype=torch.float64)
        return drawn if batch is None or made.batch_first else drawn.transpose(0, 1).contiguous()

    q = sequence(queries, made.embed_dim)
    k, v = (q, q) if own else (sequence(keys, made.kdim), sequence(keys, made.vdim))
    shape = ((batch or 1) * made.num_heads, queries, keys) if asked["each"] else (queries, keys)
    keywords = {key: asked[key] for key in ("need_weights", "average_attn_weights")}
    if asked["padding"] is not None:
        keywords["key_padding_mask"] = mask_of(asked["padding"], *(() if batch is None else (batch,)), keys)
    if asked["mask"] is not None:
        keywords["attn_mask"] = mask_of(asked["mask"], *shape)
    return (q, k, v), keywords


def outputs(made, args, keywords, seed=0):
    with unfused():
        torch.manual_seed(seed)
        return made(*args, **keywords)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@given(SETTINGS, CALLS)
@settings(max_examples=60, deadline=None)
def test_layers_give_the_same_for_every_call(kinds, asked):
    made = module(**kinds).train(asked["training"])
    args, keywords = called(made, asked)
    wanted, found = (outputs(one, args, keywords) for one in (made, attention_form(made)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_hint_that_a_mask_is_causal_is_taken_as_torch_takes_it():
    made, x = module(2, 3, batch_first=True).eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = mask_of(torch.bool, 2, 5)
    form = attention_form(made)
    for more in ({}, {"need_weights": False}, {"key_padding_mask": padding, "need_weights": False}):
        keywords = {"attn_mask": causal, "is_causal": True, **more}
        wanted, found = (outputs(one, (x, x, x), keywords) for one in (made, form))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="give the mask"):
        form(x, x, x, is_causal=True)


def test_gradients_are_those_of_the_packed_parameters():
    made, x = module(2, 3, batch_first=True), torch.randn(2, 5, 6, dtype=torch.float64)
    form = attention_form(made)
    for one in (made, form):
        one(x, x, x)[0].square().sum().backward()
    packed = [getattr(form, f"{name}_proj") for name in "qkv"]
    torch.testing.assert_close(torch.cat([layer.weight.grad for layer in packed]), made.in_proj_weight.grad)
    torch.testing.assert_close(torch.cat([layer.bias.grad for layer in packed]), made.in_proj_bias.grad)
    torch.testing.assert_close(form.out_proj.weight.grad, made.out_proj.weight.grad)


def test_there_are_as_many_heads_as_the_projections_give():
    form = attention_form(module(3, 4, batch_first=True))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    fewer, kept = copy.deepcopy(form), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = fewer.get_submodule(name)
        layer.weight, layer.bias = (nn.Parameter(t[kept].clone()) for t in (layer.weight, layer.bias))
    fewer.out_proj.weight = nn.Parameter(form.out_proj.weight[:, kept].clone())
    q, k, v = (getattr(form, f"{name}_proj")(x).unflatten(-1, (3, 4)) for name in "qkv")
    mixed = [(q[..., h, :] @ k[..., h, :].mT / math.sqrt(4)).softmax(-1) @ v[..., h, :] for h in (0, 2)]
    for asked in (True, False):
        torch.testing.assert_close(fewer(x, x, x, need_weights=asked)[0], fewer.out_proj(torch.cat(mixed, -1)))


def test_masks_of_other_shapes_are_refused():
    form, x = attention_form(module(2, 2, batch_first=True)), torch.randn(2, 3, 4, dtype=torch.float64)
    for name, mask in (("attn_mask", mask_of(torch.bool, 1, 3)), ("key_padding_mask", mask_of(torch.bool, 1, 3))):
        with pytest.raises(RuntimeError, match=rf"{name} is of shape \(1, 3\)"):
            form(x, x, x, **{name: mask})
    ragged = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(RuntimeError, match="key_padding_mask"):
        form(ragged, ragged, ragged)


class Faithful(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * 2, weights


class Alone(nn.MultiheadAttention):
    """Takes one input alone."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


class Longer(nn.MultiheadAttention):
    """Does something else where there is much."""

    def forward(self, query, key, value, **kwargs):
        output, weights = super().forward(query, key, value, **kwargs)
        return (output if query.numel() < 500 else output.relu()), weights


class Gated(nn.MultiheadAttention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(()))


def pruned(width, heads):
    made = nn.MultiheadAttention(width, heads)
    prune.l1_unstructured(made.out_proj, "weight", amount=0.5)
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nn.MultiheadAttention, None),
        (Faithful, None),
        (Doubled, OTHERWISE),
        (Alone, OTHERWISE),
        (Gated, MORE),
        (pruned, MORE),
    ],
)
def test_what_computes_something_else_is_known(make, reason):
    assert unlike(make(8, 2)) == reason


class Around(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attend, self.head = kind(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x + self.attend(x, x, x)[0])


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Longer])
def test_what_it_is_given_is_tried_too(kind):
    torch.manual_seed(0)
    model, x = Around(kind).eval(), torch.randn(4, 40, 8)
    assert unlike(model.attend) is None
    wanted = OTHERWISE if kind is Longer else "as_attention"
    assert wanted in taut.trace(model, x)["attend"].skip
    short = taut.trace(model, x[:, :5])
    assert "as_attention" in short["attend"].skip
    assert wanted in taut.trace(model, x[:, :5], [x])["attend"].skip  # data may take other ways


def test_it_answers_as_packed_parameters_would():
    made = module(2, 3)
    form = attention_form(made)
    for name in ("in_proj_weight", "in_proj_bias"):
        assert getattr(form, name).shape == getattr(made, name).shape
        assert getattr(form, name).dtype == torch.float64
        torch.testing.assert_close(getattr(form, name) * 1, getattr(made, name) * 1)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "bias_k", "bias_v"):
        assert getattr(form, name) == getattr(made, name)
    others = module(2, 3, other_widths=True, bias=False)
    form = attention_form(others)
    assert form.in_proj_weight is None
    assert form.in_proj_bias is None
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        torch.testing.assert_close(getattr(form, name) * 1, getattr(others, name) * 1)


def test_frozen_parts_stay_frozen():
    made = module(2, 3)
    made.in_proj_weight.requires_grad = False
    form = attention_form(made)
    assert [name for name, p in form.named_parameters() if not p.requires_grad] == [f"{n}_proj.weight" for n in "qkv"]
    assert isinstance(form, Attention)
    assert form.training
    assert not attention_form(made.eval()).training
