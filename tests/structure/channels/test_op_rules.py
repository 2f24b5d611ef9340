"""Heads of attention: which go, together with what, and what keeps them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import taut
from cases import run
from taut.nn import Attention
from taut.structure.channels.groups import coupled
from taut.types import Plan

HEADS, WIDTH = 4, 3


class KeysCache:
    """What a model keeps for its next call."""

    def __init__(self):
        self.keys = self.values = torch.zeros(0)

    def update(self, k, v):
        self.keys, self.values = torch.cat([self.keys, k], -2), torch.cat([self.values, v], -2)
        return self.keys, self.values


class Attending(nn.Module):
    """Attention of several queries to every key, with its heads left open in its code.

    `cached` keeps keys and values, and gives them back beside the output.
    """

    def __init__(self, shared=1, cached=False):
        super().__init__()
        self.shared, self.cached = shared, cached
        self.inside, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.o = nn.Linear(12, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 12)
        self.k, self.v = (nn.Linear(12, HEADS * WIDTH // shared) for _ in range(2))

    def forward(self, x):
        x = self.inside(x)
        q, k, v = (layer(x).view(*x.shape[:2], -1, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v))
        cache = KeysCache()
        k, v = cache.update(k, v) if self.cached else (k, v)
        y = self.attend(q, *(t.repeat_interleave(self.shared, 1) for t in (k, v)))
        out = self.head(x + self.o(y.transpose(1, 2).flatten(2)))
        return {"out": out, "cache": cache} if self.cached else out

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


class Weighed(Attending):
    """Computes its mean weights, and does something with them, or not."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def attend(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        mean = weights.mean(1)
        return weights @ v + (mean[:, None, :, :1] if self.read else 0)


class Fixed(Attending):
    """Attends to keys of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("own", torch.randn(HEADS, 6, WIDTH))

    def attend(self, q, k, v):
        del k
        return functional.scaled_dot_product_attention(q, self.own.expand(len(q), -1, -1, -1)[:, :, : v.shape[2]], v)


def heads(model, x):
    """Layer -> how many of its channels go with each of the heads."""
    coupling = coupled(model.eval(), taut.trace(model, x).example)
    group = [group for group in coupling.groups if any(member.layer == "q" for member in group.of("out"))]
    return {m.layer: tuple(m.index.shape) for one in group for m in one.members}, coupling.stays


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_keys_go_with_all_of_their_queries(shared, cached):
    torch.manual_seed(0)
    groups, _ = heads(Attending(shared, cached), torch.randn(2, 6, 5))
    count = HEADS // shared
    if count == 1:
        assert not groups  # one has to stay
        return
    assert groups == {
        "q": (count, WIDTH * shared),
        "k": (count, WIDTH),
        "v": (count, WIDTH),
        "o": (count, WIDTH * shared),
    }


def test_a_mean_over_heads_keeps_them_where_it_is_used():
    torch.manual_seed(0)
    groups, _ = heads(Weighed(read=False), torch.randn(2, 6, 5))
    assert set(groups) == {"q", "k", "v", "o"}
    groups, stays = heads(Weighed(read=True), torch.randn(2, 6, 5))
    assert not groups
    assert "'mean' mixes" in stays["q"]


def test_heads_that_meet_others_of_fixed_number_stay():
    torch.manual_seed(0)
    groups, stays = heads(Fixed(), torch.randn(2, 6, 5))
    assert not groups
    assert "fixed width in 'bmm'" in stays["q"]


class Packed(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inside, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.attend = Attention(12, HEADS, batch_first=True, **settings)

    def forward(self, x):
        x = self.inside(x)
        return self.head(x + self.attend(x, x, x)[0])


@pytest.mark.parametrize("make", [Packed, lambda: Attending(2, cached=True)], ids=["own", "cached"])
def test_heads_are_taken_out_saved_and_loaded(make, tmp_path):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(16, 6, 5)
    net = taut.trace(model, x)
    plan = Plan.of(net, [taut.whole(net, "channels", sparsity=0.5, even=True)])
    small = taut.apply(model, plan, taut.observe(net, model, [x]), [x])
    widths = {name: layer.out_features for name, layer in small.named_modules() if isinstance(layer, nn.Linear)}
    assert {widths[name] for name in widths if name.endswith(("q", "q_proj"))} == {HEADS * WIDTH // 2}
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", make)
    assert torch.equal(run(again, x)[0], run(small, x)[0])


def test_more_keys_of_its_own_keep_the_heads_of_attention():
    model, x = Packed(add_bias_kv=True).eval(), torch.randn(2, 6, 5)
    stays = coupled(model, taut.trace(model, x).example).stays
    assert "fixed width in 'cat'" in stays["attend.k_proj"]


def test_a_language_model_with_shared_keys_generates_the_same_with_its_cache_and_without():
    """As it comes from the library, with its cache among the outputs; a batch that is padded; attention op by op."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    words = {"input_ids": torch.randint(1, 30, (4, 6))}
    net = taut.trace(model, words)
    plan = Plan.of(net, [taut.whole(net, "channels", sparsity=0.5, even=True)])
    small = taut.apply(model, plan, taut.observe(net, model, [words], output="logits"), [words])
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (8, 16)
    assert attention.k_proj.weight.shape == (4, 16)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = [small.generate(**words, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*made)
    padded = torch.ones(4, 6, dtype=torch.long)
    padded[0, :3] = 0
    outputs = []
    for way in ("sdpa", "eager"):
        small.set_attn_implementation(way)
        outputs.append(small(**words, attention_mask=padded).logits[padded.bool()])
    torch.testing.assert_close(*outputs)
