"""Padded positions count nowhere: not in moments, not in refits, not in outputs; the same with any amount of them."""

import pytest
import torch
from torch import nn

import taut
from taut import CallError, DataError
from taut.core.padding import real_positions, real_rows
from taut.recovery.batch_norm import moments_of
from taut.recovery.judging import Judge
from taut.structure.calling import read_example
from taut.structure.kinds import Reader
from taut.structure.padding import Padding
from taut.training.losses import Objective

WORDS, WIDE = 20, 12
LENGTHS = (3, 5, 2, 6, 4, 5, 3, 6)


class Block(nn.Module):
    """Attention that respects the mask, and a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDE, WIDE) for _ in range(3))
        self.up, self.down, self.norm = nn.Linear(WIDE, 24), nn.Linear(24, WIDE), nn.LayerNorm(WIDE)

    def forward(self, x, real):
        scores = self.q(x) @ self.k(x).mT / WIDE**0.5
        x = x + scores.masked_fill(~real[:, None], -1e9).softmax(-1) @ self.v(x)
        return self.norm(x + self.down(self.up(x).relu()))


class Encoder(nn.Module):
    """As BERT: scores of words at every position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.block, self.head = nn.Embedding(WORDS, WIDE), Block(), nn.Linear(WIDE, WORDS)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.block(self.words(input_ids), attention_mask.bool()))}


class Torchs(nn.Module):
    """torch's own encoder, time first or batch first, whose mask is true at padding."""

    def __init__(self, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDE, 2, 24, batch_first=batch_first)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDE, WORDS)

    def forward(self, src, src_key_padding_mask):
        return self.head(self.body(src, src_key_padding_mask=src_key_padding_mask))


class Convolved(nn.Module):
    """Channels before time, with a batch norm; what is padding is silenced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv1d(4, 16, 1), nn.BatchNorm1d(16), nn.Conv1d(16, 5, 1)

    def forward(self, x, padding_mask):
        y = self.norm(self.a(x)).relu()
        return self.b(y * ~padding_mask[:, None])


class Flat(nn.Module):
    """All positions in a row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x, attention_mask):
        y = self.b(self.a(x.flatten(0, 1)).relu())
        return y.view(*x.shape[:2], 5)


def words(lengths, most, other=0):
    """Sequences filled up to `most`, with words that are not to matter."""
    noise = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, WORDS, (length,), generator=noise) for length in lengths]
    ids = torch.full((len(rows), most), other)
    mask = torch.zeros(len(rows), most, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def apart(batch):
    """The same sequences one by one, without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = zip(batch["input_ids"], lengths, strict=True)
    return [{"input_ids": ids[None, :n], "attention_mask": torch.ones(1, n, dtype=torch.long)} for ids, n in rows]


def masked_loss(output, targets):
    """One that draws nothing, and looks at real positions alone, as the models' own do."""
    return (output["logits"].log_softmax(-1)[..., :3].sum(-1) * targets).sum(1)


def observed(model, example, batches, **settings):
    return taut.observe(taut.trace(model, example), model, batches, **settings)


def test_moments_are_those_of_the_sequences_one_by_one():
    model, batch = Encoder().eval(), words(LENGTHS * 4, 9)
    padded = observed(model, batch, [(batch, batch["attention_mask"])], loss=masked_loss)
    alone = observed(model, batch, [(one, one["attention_mask"]) for one in apart(batch)], loss=masked_loss)
    for name, one in alone.layers.items():
        other = padded.layers[name]
        assert other.positions == one.positions == sum(LENGTHS) / len(LENGTHS)
        assert other.weighting.full is not None
        torch.testing.assert_close(other.outputs.full, one.outputs.full)
        torch.testing.assert_close(other.taylor, one.taylor)
    net = padded.network
    sums = {}
    for name in padded.layers:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, args, __, name=name: sums.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for one in apart(batch):
            model(**one)
    for name, parts in sums.items():
        rows = torch.cat(parts)
        energy = rows.double().square().sum() / len(LENGTHS * 4)
        trace = padded.layers[name].weighting.full.diagonal(dim1=-2, dim2=-1).sum()
        assert float(trace) == pytest.approx(float(energy), rel=1e-4), name
    assert net.example.mask is None


@pytest.mark.parametrize("spare", [1, 7])
def test_plans_and_refits_are_the_same_with_any_amount_of_padding(spare):
    model, lengths = Encoder().eval(), LENGTHS * 6
    results = []
    for most, other in ((6, 0), (6 + spare, 7)):
        batch = words(lengths, most, other)
        batches = [{k: v[i : i + 8] for k, v in batch.items()} for i in range(0, len(lengths), 8)]
        example = {k: v[:8] for k, v in batch.items()}
        stats = observed(model, example, batches)
        plan = taut.plan(stats.network, stats, taut.Budget(params=0.8))
        results.append((stats, plan, taut.apply(model, plan, stats, data=batches)))
    (tight, first, one), (loose, second, two) = results
    assert [step.settings for step in first.steps] == [step.settings for step in second.steps]
    for name, layer in tight.layers.items():
        torch.testing.assert_close(layer.weighting.full, loose.layers[name].weighting.full)
        torch.testing.assert_close(layer.outputs.full, loose.layers[name].outputs.full)
    short, long = words(lengths, 6), words(lengths, 6 + spare)
    real = short["attention_mask"].bool()
    torch.testing.assert_close(one(**short)["logits"][real], two(**long)["logits"][:, :6][real], rtol=1e-3, atol=1e-3)


def test_damage_divergence_and_agreement_look_at_real_positions_alone():
    model, batch = Encoder().eval(), words(LENGTHS, 9)
    call = read_example(model, batch)

    class Spoiled(Encoder):
        def forward(self, input_ids, attention_mask):
            scores = super().forward(input_ids, attention_mask)["logits"]
            return {"logits": torch.where(attention_mask[..., None] == 0, scores.flip(-1) + 3, scores)}

    judge = Judge(call, model, [batch], ["logits"])
    assert judge.divergence(Spoiled().eval()) == 0
    assert judge.agreement(Spoiled().eval()) == 1
    unmasked = Judge(
        read_example(model, batch, mask=lambda inputs: torch.ones_like(inputs["attention_mask"])),
        model,
        [batch],
        ["logits"],
    )
    assert unmasked.divergence(Spoiled().eval()) > 1
    assert unmasked.agreement(Spoiled().eval()) < 0.8


def test_distillation_looks_at_real_positions_alone():
    model, batch = Encoder().eval(), words(LENGTHS, 9)
    call = read_example(model, batch)
    output = model(**batch)
    other = {"logits": torch.where(batch["attention_mask"][..., None] == 0, -output["logits"], output["logits"])}
    for kind in ("logits", "values"):
        objective = Objective(None, None, (), kind, Reader(model, call))
        objective.settle(output, batch)
        assert float(objective(other, None, output, batch)) == pytest.approx(0, abs=1e-6)
        assert float(objective({"logits": -output["logits"]}, None, output, batch)) > 0.1


def test_norms_and_convolutions_leave_padding_out():
    model = Convolved().eval()
    x, mask = torch.randn(16, 4, 7), torch.arange(7) >= torch.randint(2, 7, (16, 1))
    spoiled = torch.where(mask[:, None], 50.0, x)
    budget = taut.Budget(params=0.8)
    results = []
    for data in (x, spoiled):
        batch = {"x": data, "padding_mask": mask}
        stats = observed(model, batch, [batch])
        plan = taut.plan(stats.network, stats, budget, methods=("svd",))
        results.append(taut.apply(model, plan, stats, data=[batch]))
        assert stats.layers["a"].positions == float((~mask).sum()) / 16
    for a, b in zip(*(net.state_dict().values() for net in results), strict=True):
        torch.testing.assert_close(a, b)
    rows = x.movedim(1, -1)[~mask]
    mean, var = moments_of([spoiled], [~mask])
    torch.testing.assert_close(mean, rows.double().mean(0))
    torch.testing.assert_close(var, rows.double().var(0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_masks(batch_first):
    model = Torchs(batch_first).eval()
    src, mask = torch.randn(8, 5, WIDE), torch.arange(5) >= torch.randint(2, 5, (8, 1))
    batch = {"src": src if batch_first else src.transpose(0, 1), "src_key_padding_mask": mask}
    stats = observed(model, batch, [batch])
    assert stats.layers["head"].positions == float((~mask).sum()) / 8


def test_positions_in_a_row():
    model, mask = Flat().eval(), torch.arange(6) < torch.randint(2, 6, (8, 1))
    batch = {"x": torch.randn(8, 6, 4), "attention_mask": mask.long()}
    stats = observed(model, batch, [batch])
    assert stats.layers["a"].positions == stats.layers["b"].positions == float(mask.sum()) / 8


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x, extra):
        return self.b(self.a(x).relu())


def test_a_mask_of_the_users_own():
    model, mask = Unnamed().eval(), torch.arange(6) < torch.randint(2, 6, (8, 1))
    x, share = torch.randn(8, 6, 4), float(mask.sum()) / 8
    batch = {"x": x, "extra": mask}
    assert observed(model, batch, [batch]).layers["a"].positions == 6
    assert observed(model, batch, [batch], mask="extra").layers["a"].positions == share
    assert observed(model, batch, [batch], mask=lambda inputs: inputs["extra"]).layers["a"].positions == share
    row = (x, mask)
    assert observed(model, row, [row], mask="extra").layers["a"].positions == share
    result = taut.compress(model, batch, budget=taut.Budget(params=0.9), data=[batch], mask="extra")
    assert result.example.mask == "extra"


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ("nonsense", CallError, "The mask 'nonsense' is no input of the model. Inputs: x, extra"),
        (lambda inputs: inputs["none"], CallError, "The mask raised KeyError: 'none'"),
        (lambda inputs: inputs["x"][:, 0, 0], DataError, r"must be a tensor \(samples, positions\).*Got float32\[8\]"),
        (lambda _: 3, DataError, "Got int instead"),
        (lambda _: [[1], [1, 0]], DataError, r"\(samples, positions\)"),
        (lambda _: torch.ones(5, 3), DataError, "each of the 8 samples of the batch.*Got float32.5, 3. instead"),
        (lambda x, extra: extra, CallError, "missing 1 required.*It gets one argument, the inputs"),
        (
            lambda inputs: torch.ones(len(inputs["x"]), 7),
            DataError,
            "marks 7 positions.*nothing in the model has as many",
        ),
        (True, CallError, "must be the name of an input, or a function.*Got bool instead"),
        (torch.ones(8, 6), CallError, r"or a function.*Got float32\[8, 6\] instead"),
    ],
)
def test_masks_that_are_none(mask, error, words):
    batch = {"x": torch.randn(8, 6, 4), "extra": torch.ones(8, 6)}
    with pytest.raises(error, match=words):
        taut.compress(Unnamed().eval(), batch, budget=taut.Budget(params=0.9), data=[batch], mask=mask)


@pytest.mark.parametrize("form", [lambda t: t.numpy(), lambda t: t.tolist()])
def test_a_mask_may_be_an_array_or_rows(form):
    mask = torch.arange(6) < torch.tensor([[6], [3], [2], [5], [4], [1], [6], [2]])
    batch = {"x": torch.randn(8, 6, 4), "extra": mask}
    model, share = Unnamed().eval(), float(mask.sum()) / 8
    stats = observed(model, batch, [batch], mask=lambda inputs: form(inputs["extra"]))
    assert stats.layers["a"].positions == share


@pytest.mark.parametrize("pick", [lambda _: None, lambda _: "a", lambda _: [], lambda o: o.argmax(-1)])
def test_a_part_of_the_output_that_counts_nothing_is_refused(pick):
    batch = {"x": torch.randn(8, 6, 4), "extra": torch.ones(8, 6)}
    with pytest.raises(CallError, match=r"holds tensors in floating point. Got .* of the output float32\[8, 6, 5\]"):
        observed(Unnamed().eval(), batch, [batch], output=pick)


def test_where_a_mask_is_found():
    model, batch = Encoder().eval(), words(LENGTHS, 9)
    call = read_example(model, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(real_positions(call, batch)["attention_mask"], real)
    assert real_positions(call, batch | {"attention_mask": torch.ones_like(real)}) == {}
    row = read_example(model, tuple(batch.values()))
    assert torch.equal(real_positions(row, tuple(batch.values()))["attention_mask"], real)
    wide = real[:, None, :, None].expand(-1, 1, -1, 9)  # a mask of pairs is none of positions
    assert real_positions(call, batch | {"attention_mask": wide}) == {}
    added = torch.where(real, 0.0, -1e9)  # nor is one that is added: its name says nothing of its sign
    assert real_positions(call, batch | {"attention_mask": added}) == {}
    torchs = read_example(Torchs().eval(), {"src": torch.randn(8, 9, WIDE), "src_key_padding_mask": ~real})
    for padding in (~real, torch.where(real, 0.0, -torch.inf)):
        inputs = torchs.value | {"src_key_padding_mask": padding}
        assert torch.equal(real_positions(torchs, inputs)["src_key_padding_mask"], real)


def test_which_layers_a_mask_speaks_of():
    call = read_example(nn.Linear(3, 3), torch.randn(2, 3))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = [True, True, False, True, False, False]
    assert real_rows(call, {"a": mask}, (2, 3)).tolist() == flat
    assert real_rows(call, {"a": mask}, (6,)).tolist() == flat
    assert real_rows(call, {"a": mask}, (3, 2)).tolist() == mask.T.flatten().tolist()
    assert real_rows(call, {"a": mask}, (2, 3, 2)).tolist() == [value for value in flat for _ in range(2)]
    for sizes in ((2,), (2, 4), (7,), (4, 3)):
        assert real_rows(call, {"a": mask}, sizes) is None
    assert real_rows(call, {"a": mask, "b": ~mask}, (2, 3)) is None  # every position is real to one of them
    assert Padding(call, torch.randn(2, 3)).of("", (2, 3)) is None
