"""What marks padding is shown by running the model: which values, which inputs, which axis."""

import warnings

import pytest
import torch
from torch import nn

import taut
from taut import DataError
from taut.core.padding import ADDED, ONES, OWN, ZEROS, real_positions
from taut.structure.calling import read_example
from taut.structure.padding import real_share

WORDS, WIDE, LONG = 20, 8, 9


class Attending(nn.Module):
    """One layer of attention; `form` says how the mask is meant."""

    def __init__(self, form="ones", causal=False, pooled=False):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.causal, self.pooled = form, causal, pooled
        self.words, self.head = nn.Embedding(WORDS, WIDE), nn.Linear(WIDE, 5)
        self.q, self.k, self.v = (nn.Linear(WIDE, WIDE) for _ in range(3))

    def forward(self, input_ids, attention_mask):
        x, mask = self.words(input_ids), attention_mask
        scores = self.q(x) @ self.k(x).mT
        if self.form == "added":
            scores = scores + mask[:, None]
        elif self.form != "ignored":
            gone = mask == 0 if self.form == "ones" else mask != 0
            scores = scores.masked_fill(gone if self.form == "pairs" else gone[:, None], -1e9)
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        x = x + scores.softmax(-1) @ self.v(x)
        return self.head(x[:, 0] if self.pooled else x)


def lengths(count, least=3):
    return torch.arange(LONG) < torch.arange(count)[:, None] % (LONG - least) + least


def batch(mask):
    ids = torch.randint(1, WORDS, (len(mask), LONG), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


REAL = lengths(6)
MEANT = {
    "ones": ("ones", REAL.long(), ONES),
    "true": ("ones", REAL, ONES),
    "floats": ("ones", REAL.float(), ONES),
    "nothing padded": ("ones", torch.ones(6, LONG), ONES),
    "true at padding": ("zeros", ~REAL, ZEROS),
    "ones at padding": ("zeros", (~REAL).long(), ZEROS),
    "nothing padded, and zeros": ("zeros", torch.zeros(6, LONG, dtype=torch.bool), ZEROS),
    "added": ("added", torch.where(REAL, 0.0, -1e4), ADDED),
    "added, nothing padded": ("added", torch.zeros(6, LONG), ADDED),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MEANT)
def test_which_values_are_padding_is_shown_by_the_outputs(name, causal):
    form, mask, reading = MEANT[name]
    for pooled in (False, True) if not causal else (False,):
        model = Attending(form, causal, pooled).eval()
        inputs = batch(mask)
        call = read_example(model, inputs)
        assert call.marking["attention_mask"].reading == reading
        masks = real_positions(call, inputs)
        assert masks == {} if "nothing" in name else torch.equal(masks["attention_mask"], REAL)


@pytest.mark.parametrize("form", ["zeros", "added"])
def test_a_mask_that_is_meant_otherwise_gives_the_same_as_one_by_its_name(form):
    found = []
    for way, mask in (("ones", REAL), (form, ~REAL if form == "zeros" else torch.where(REAL, 0.0, -1e9))):
        model, inputs = Attending(way).eval(), batch(mask)
        found.append(taut.observe(taut.trace(model, inputs), model, [inputs]))
    for name, layer in found[0].layers.items():
        torch.testing.assert_close(found[1].layers[name].weighting.full, layer.weighting.full)
    real = int(REAL.sum())
    assert all(f"attention_mask: {real} of {6 * LONG} positions real" in str(stats) for stats in found)


def test_a_mask_that_says_nothing_of_any_position_is_none():
    model, inputs = Attending("ignored").eval(), batch(torch.zeros(6, LONG))
    assert real_positions(read_example(model, inputs), inputs) == {}
    stats = taut.observe(taut.trace(model, inputs), model, [inputs])
    assert stats.layers["head"].positions == LONG
    for mask in ("attention_mask", lambda inputs: inputs["attention_mask"]):
        with pytest.raises(DataError, match="says of no position that it is real: of 54 values 0 are not 0"):
            taut.observe(stats.network, model, [inputs], mask=mask)


class Leaking(nn.Module):
    """A convolution over positions, whatever the mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.a, self.b = nn.Embedding(WORDS, WIDE), nn.Conv1d(WIDE, 6, 5, padding=2), nn.Linear(6, 5)

    def forward(self, input_ids, attention_mask):
        return self.b(self.a(self.words(input_ids).mT).mT)


def test_a_mask_that_the_model_does_not_heed_is_not_used_and_that_is_said_once():
    model, inputs = Leaking().eval(), batch(REAL.long())
    with pytest.warns(UserWarning, match=r"'attention_mask' is not used as a mask.*`mask=`") as noted:
        stats = taut.observe(taut.trace(model, inputs), model, [inputs])
    assert sum("mask" in str(one.message) for one in noted) == 1
    assert stats.layers["b"].positions == LONG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = taut.observe(stats.network, model, [inputs], mask="attention_mask", output="logits")
    assert stats.layers["b"].positions == float(REAL.sum()) / 6


def test_a_mask_of_pairs_is_none_of_positions():
    """As many samples as positions."""
    causal = torch.ones(LONG, LONG, dtype=torch.bool).triu(1)
    for form in ("pairs", "ignored"):
        model, inputs = Attending(form).eval(), batch(causal)
        with pytest.warns(UserWarning, match="not used as a mask"):
            assert real_positions(read_example(model, inputs), inputs) == {}


class Mixing(nn.Module):
    """Layers over positions and over channels; each its own number."""

    def __init__(self, wide):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.across = nn.Embedding(WORDS, wide), nn.Linear(LONG, LONG)
        self.along, self.head = nn.Linear(wide, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) * attention_mask[..., None]
        x = x + self.across(x.mT).mT * attention_mask[..., None]
        return self.head(self.along(x).relu() * attention_mask[..., None])


def test_no_layer_is_masked_for_the_coincidence_of_sizes():
    """The model takes no shorter sequences, and its channels are as many as its positions."""
    model, inputs = Mixing(LONG).eval(), batch(REAL.long())
    for mask in (None, lambda inputs: inputs["attention_mask"]):
        with pytest.warns(UserWarning, match=r"mask.* is not used"):
            stats = taut.observe(taut.trace(model, inputs), model, [inputs], mask=mask)
        assert {stats.layers[name].positions for name in ("across", "along", "head")} == {float(LONG)}


class Turned(nn.Module):
    """Of any length; `across` is over the channels of each position, as a gate over (channel, position) is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.along, self.gate = nn.Embedding(WORDS, LONG), nn.Linear(LONG, 7), nn.Linear(1, 3)
        self.head = nn.Linear(7, 3)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) * attention_mask[..., None]
        gate = self.gate(x.sum(1)[..., None]).mean((1, 2))  # (sample, channel, 1): as many as positions
        return self.head(self.along(x).relu() * gate[:, None, None])


@pytest.mark.parametrize("own", [False, True])
def test_which_axis_is_that_of_positions_is_seen_from_shorter_sequences(own):
    model, inputs = Turned().eval(), batch(REAL.long())
    mask = "attention_mask" if own else None
    stats = taut.observe(taut.trace(model, inputs), model, [inputs], mask=mask)
    call = stats.network.example
    assert call.marking[OWN if own else "attention_mask"].ways["gate"] == ""
    share = float(REAL.sum()) / 6
    assert {name: layer.positions for name, layer in stats.layers.items()} == {
        "along": share,
        "gate": float(LONG),
        "head": share,
    }


class Labelled(nn.Module):
    """A masked language model that wants labels, for its loss alone; or a decoder that reads them."""

    def __init__(self, decoder):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = decoder
        self.words, self.body, self.head = nn.Embedding(WORDS, WIDE), nn.Linear(WIDE, 16), nn.Linear(16, WORDS)

    def forward(self, input_ids, labels):
        ids = labels.clamp_min(0).roll(1, 1) if self.decoder else input_ids
        x = self.words(ids) + self.words(input_ids).mean(1, keepdim=True)
        scores = self.head(self.body(x).relu())
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), scores


@pytest.mark.parametrize("decoder", [False, True])
def test_labels_mark_padding_only_where_a_decoder_reads_them(decoder):
    inputs = batch(REAL.long())
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"].masked_fill(~REAL, -100)}
    model = Labelled(decoder).eval()
    stats = taut.observe(taut.trace(model, inputs), model, [inputs])
    assert stats.network.example.answers == {"labels"}
    assert stats.layers["body"].positions == (float(REAL.sum()) / 6 if decoder else LONG)


class Both(nn.Module):
    """An encoder and a decoder, each with its mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDE)
        self.left, self.right, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 5)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        x = self.left(self.words(input_ids)) * attention_mask[..., None]
        y = self.right(self.words(decoder_input_ids)) * decoder_attention_mask[..., None]
        weights = (y @ y.mT).masked_fill(decoder_attention_mask[:, None] == 0, -1e9).softmax(-1)
        return self.head(weights @ y + x.sum(1, keepdim=True))


def test_every_mask_speaks_of_the_layers_of_its_own_inputs():
    """Both sequences are as long, so that sizes say nothing."""
    model, one, two = Both().eval(), batch(REAL.long()), batch(lengths(6, 5).long().flip(0))
    inputs = one | {f"decoder_{key}": value for key, value in two.items()}
    stats = taut.observe(taut.trace(model, inputs), model, [inputs])
    shares = [float(part["attention_mask"].sum()) / 6 for part in (one, two)]
    assert [stats.layers[name].positions for name in ("left", "right", "head")] == [shares[0], shares[1], shares[1]]
    share = real_share(stats.network.example, [(inputs, None)])
    net = stats.network
    assert [share(net[n]) * LONG for n in ("left", "right", "head")] == pytest.approx([shares[0], shares[1], shares[1]])


def test_a_part_of_the_output_that_shorter_sequences_have_not_is_no_error():
    model, inputs = Attending().eval(), batch(REAL.long())
    part = lambda output: output.reshape(-1, LONG, 5)[:, LONG - 1]  # noqa: E731
    call = read_example(model, inputs, part)
    assert call.marking["attention_mask"].ways == {}


def test_nothing_more_is_run_where_there_is_no_mask():
    model, calls = Labelled(False).body, []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain = torch.randn(6, LONG, WIDE)
    read_example(model, plain)
    count = len(calls)
    read_example(model, {"input": plain})
    assert len(calls) == 2 * count
    assert read_example(model, plain).marking == {}
