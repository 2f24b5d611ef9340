"""What of an output counts, and what it is: by targets, names, values and shapes, or as it is asked for."""

import collections
import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import taut
from taut import CallError
from taut.recipe import Recipe
from taut.recovery.judging import Judge
from taut.structure.answers import Wish, answers_of
from taut.structure.calling import read_example
from taut.structure.fisher import divergence
from taut.structure.kinds import Kind, class_axis, name_of, rows_of

WORDS, LONG, WIDE = 11, 6, 8
IDS = torch.randint(0, WORDS, (4, LONG), generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(4, LONG, WIDE)
IMAGES = torch.randn(4, 3, 8, 8)


class DynamicCache:
    """Keys and values, as transformers keep them."""

    def __init__(self, x):
        self.layers = [x.clone(), x.clone()]


@dataclasses.dataclass
class Record:
    logits: Any = None
    loss: Any = None
    hidden_states: Any = None
    past_key_values: Any = None


class Net(nn.Module):
    """A body, and a head that says what is returned."""

    def __init__(self, body, give=lambda y, x: y):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.give = body(), give

    def forward(self, x):
        y = x
        for layer in self.body:
            y = layer(y)
        return self.give(y, x)


def words():
    return nn.Sequential(nn.Embedding(WORDS, WIDE), nn.Linear(WIDE, 16), nn.ReLU(), nn.Linear(16, WORDS))


class Direction(nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return nn.functional.normalize(x, dim=self.axis)


def tagger():
    return nn.Sequential(nn.Embedding(WORDS, WIDE), nn.Linear(WIDE, 3))


def encoder():
    return nn.Sequential(nn.Embedding(WORDS, WIDE), nn.Linear(WIDE, WIDE), nn.LayerNorm(WIDE))


def series(outputs):
    return lambda: nn.Sequential(nn.Linear(WIDE, 16), nn.ReLU(), nn.Linear(16, outputs))


def maps(outputs, *last):
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1), *last)


def rows(outputs):
    return lambda: nn.Sequential(nn.Linear(WIDE, outputs))


def directions(body, axis=-1, *before):
    return lambda: nn.Sequential(*body(), *before, Direction(axis))


def classes(*shape, count=3):
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(1))


READ = {
    "words": (words, IDS, None, "logits"),
    "tags": (tagger, IDS, None, "logits"),
    "words, time first": (lambda: nn.Sequential(*words()), IDS.T, None, "logits"),
    "hidden states": (encoder, IDS, None, "values"),
    "series": (series(5), SERIES, None, "values"),
    "tags of a series": (series(5), SERIES, classes(4, LONG, count=5), "logits"),
    "ignored targets": (series(5), SERIES, classes(4, LONG, count=5).index_fill(1, torch.tensor([0]), -100), "logits"),
    "targets that are no classes": (series(5), SERIES, classes(4, LONG, count=50), "values"),
    "logarithms": (lambda: nn.Sequential(*series(5)(), nn.LogSoftmax(-1)), SERIES, None, "logits"),
    "segments": (maps(6), IMAGES, None, "logits"),
    "segments of two classes": (maps(2), IMAGES, None, "logits"),
    "segments by targets": (maps(3), IMAGES, classes(4, 8, 8), "logits"),
    "segments with a border": (maps(3), IMAGES, classes(4, 8, 8).index_fill(1, torch.tensor([0]), 255), "logits"),
    "segments with an axis": (maps(3), IMAGES, classes(4, 1, 8, 8), "logits"),
    "one channel": (maps(1), IMAGES, None, "values"),
    "images": (maps(3), IMAGES, None, "values"),
    "values by targets": (maps(6), IMAGES, torch.randn(4, 6, 8, 8), "values"),
    "features": (maps(6, nn.BatchNorm2d(6)), IMAGES, None, "values"),
    "features that are never negative": (maps(6, nn.Softplus(0.1)), IMAGES, None, "values"),
    "a softmax over channels": (maps(6, nn.Softmax(1)), IMAGES, None, "probabilities"),
    "a sigmoid": (maps(6, nn.Sigmoid()), IMAGES, None, "sigmoid"),
    "rows": (rows(5), SERIES[:, 0], None, "logits"),
    "classes of rows": (rows(5), SERIES[:, 0], classes(4, count=5), "logits"),
    "numbers in rows": (rows(5), SERIES[:, 0], torch.randn(4, 5), "values"),
    "several labels": (rows(5), SERIES[:, 0], classes(4, 5, count=2).float(), "logits"),
    "soft labels": (rows(5), SERIES[:, 0], torch.rand(4, 5).softmax(-1), "logits"),
    "one number": (rows(1), SERIES[:, 0], None, "values"),
    "directions": (directions(rows(5)), SERIES[:, 0], None, "values"),
    "directions that are never negative": (directions(rows(5), -1, nn.Softplus()), SERIES[:, 0], None, "values"),
    "directions of words": (directions(words), IDS, None, "values"),
    "directions at every place": (directions(maps(6), 1, nn.Softplus()), IMAGES, None, "values"),
    "directions that targets name": (directions(rows(5)), SERIES[:, 0], classes(4, count=5), "logits"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_an_output_is_read_as_it_is_meant(name):
    body, x, targets, wanted = READ[name]
    model = Net(body).eval()
    net = taut.trace(model, x)
    assert taut.observe(net, model, [x if targets is None else (x, targets)]).kinds == (wanted,)


NAMED = {
    "image_embeds": "values",
    "last_hidden_state": "values",
    "pred_boxes": "values",
    "predictedDepth": "values",
    "logits": "logits",
    "feature_scores": "logits",
    "statement": "logits",
    "workflow": "logits",
    "resampled": "logits",
    "": "logits",
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_outputs_are_read_before_their_shapes_and_by_whole_words(name):
    for body, x in ((rows(5), SERIES[:, 0]), (words, IDS)):
        model = Net(body, lambda y, _: {name: y}).eval()
        assert taut.observe(taut.trace(model, x), model, [x]).kinds == (NAMED[name],)
    model = Net(maps(4, nn.Sigmoid()), lambda y, _: {name: y}).eval()
    wanted = {"logits": "sigmoid"}.get(NAMED[name], NAMED[name])
    assert taut.observe(taut.trace(model, IMAGES), model, [IMAGES]).kinds == (wanted,)


@pytest.mark.parametrize("name", ["words", "segments", "rows", "values by targets", "segments by targets", "images"])
def test_logits_by_shape_alone_are_said_once(name):
    body, x, targets, _ = READ[name]
    model = Net(body).eval()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        data = [x if targets is None else (x, targets)]
        taut.compress(model, x, budget=taut.Budget(params=0.9), data=data, compare=False)
    said = [str(one.message) for one in noted if "by its shape alone" in str(one.message)]
    assert len(said) == (name in {"words", "segments"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taut.observe(taut.trace(model, x), model, data, output="values")


def test_classes_on_another_axis_by_targets():
    model = Net(series(5), lambda y, _: y.transpose(1, 2)).eval()
    stats = taut.observe(taut.trace(model, SERIES), model, [(SERIES, classes(4, LONG, count=5))])
    assert stats.kinds == ("logits along axis 1",)
    for kind in (*stats.kinds, *copy.deepcopy(stats.kinds)):
        assert (kind, name_of(kind), class_axis(kind, 3)) == (Kind("logits", 1), "logits", 1)
    straight = Net(series(5)).eval()
    same = taut.observe(taut.trace(straight, SERIES), straight, [(SERIES, classes(4, LONG, count=5))])
    for name, layer in same.layers.items():
        torch.testing.assert_close(stats.layers[name].outputs.full, layer.outputs.full)


def test_damage_of_maps_is_that_of_their_classes():
    a, b = torch.randn(2, 2, 5, 3, 3)
    last = [t.movedim(1, -1).flatten(0, 2) for t in (a, b)]
    wanted = divergence(["logits"], *last) * len(last[0]) / 2
    assert divergence(["logits"], a, b) == pytest.approx(wanted)
    assert class_axis("logits", 3) == 2
    assert class_axis(Kind("probabilities", 1), 3) == 1
    assert rows_of(a, "logits").shape == (2, 3, 3, 5)
    assert rows_of(a, "values") is a
    real = torch.rand(2, 3, 3) > 0.5
    assert rows_of(a, "values", real).shape == rows_of(a, "logits", real).shape == (int(real.sum()), 5)


def pair(y, x):
    return y, tuple((torch.ones(len(x), 2, LONG, 4), torch.ones(len(x), 2, LONG, 4)) for _ in range(2))


GIVEN = {
    "object": lambda y, _: Record(y, None, (y, y)),
    "cache": lambda y, _: Record(y, None, None, DynamicCache(y)),
    "cache in a tuple": lambda y, _: (y, DynamicCache(y)),
    "cache of old": pair,
    "dict": lambda y, _: {
        "loss": y.mean(),
        "logits": y,
        "hidden_states": (y, y),
        "attentions": (y,),
        "last_hidden_state": y,
    },
    "named": lambda y, _: collections.namedtuple("Output", "logits loss")(y, y.mean()),
    "user's": lambda y, _: collections.UserDict(logits=y, encoder_last_hidden_state=y),
}


@pytest.mark.parametrize("name", GIVEN)
def test_caches_losses_and_inner_states_do_not_count(name):
    """The plan and its damage are those of the network that gives its answer alone; the samples can be cut."""
    bare, model = Net(words).eval(), Net(words, GIVEN[name]).eval()
    call = read_example(model, IDS)
    assert [t.shape for t in answers_of(call, call.run(model)).tensors] == [(4, LONG, WORDS)]
    assert call.divisible
    found = []
    for one in (bare, model):
        net = taut.trace(one, IDS)
        stats = taut.observe(net, one, [IDS])
        found.append((stats.kinds, [s.damage for s in taut.plan(net, stats, taut.Budget(params=0.9)).steps]))
    assert found[0] == found[1]
    assert found[0][0] == ("logits",)


def test_what_is_given_alone_counts_whatever_it_is_called():
    call = read_example(nn.Identity(), SERIES)
    for output in ({"hidden_states": SERIES}, {"loss": SERIES.mean()}, (SERIES, SERIES), [SERIES]):
        assert answers_of(call, output).tensors
    boxes = {"logits": SERIES, "pred_boxes": SERIES[..., :4], "aux_loss": SERIES.sum(), "start_logits": SERIES[..., 0]}
    assert answers_of(call, boxes).names == ("logits", "pred_boxes", "start_logits")


def several(y, x):
    return {"depth": y, "extra": [y.detach() * 0, {"inner": 3 * y}]}


PARTS = [
    ("depth", ("values",)),
    ("extra.1.inner", ("logits",)),
    ("1.1.inner:values", ("values",)),
    (lambda output: output["depth"] * 2, ("logits",)),
    ("depth:logits", ("logits",)),
    (0, ("logits",)),
    ("values", ("values",) * 3),
]


@pytest.mark.parametrize(("output", "kinds"), PARTS, ids=[str(number) for number in range(len(PARTS))])
def test_the_part_that_counts_is_asked_for(output, kinds):
    model = Net(maps(6), several).eval()
    stats = taut.observe(taut.trace(model, IMAGES), model, [IMAGES], output=output)
    assert stats.kinds == kinds


def test_what_is_asked_for_decides_damage_judgement_and_training():
    model = Net(maps(6), lambda y, x: {"mask": y, "noise": y.flip(1) * 100}).eval()
    alone = Net(maps(6)).eval()
    settings = {"budget": taut.Budget(params=0.8), "data": [IMAGES], "compare": False}
    wanted, result = taut.compress(alone, IMAGES, **settings), taut.compress(model, IMAGES, output="mask", **settings)
    assert [s.damage for s in result.plan.steps] == [s.damage for s in wanted.plan.steps]
    for a, b in zip(result.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(a, b)
    call = result.example
    assert call.output == Wish("mask")
    spoiled = Net(maps(6), lambda y, x: {"mask": y, "noise": y * 0}).eval()
    assert Judge(call, model, [IMAGES], ["logits"]).divergence(spoiled) == 0
    assert Judge(call, model, [IMAGES], ["logits"]).agreement(spoiled) == 1
    tuning = taut.Finetune([IMAGES], [IMAGES], schedule=(taut.Stage(epochs=1),))
    one, two = (
        taut.compress(net, IMAGES, finetune=tuning, output=o, **settings)
        for net, o in ((model, "mask"), (alone, "auto"))
    )
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CallError, match="no such part"):
        taut.explore(model, IMAGES, data=[IMAGES], evaluate=None, output="none")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("nonsense", "has no such part: it has depth, extra"),
        ("extra.7", "has no such part: it is a list of 2"),
        ("depth.x", "has no such part: it is one tensor"),
        (9, "Got '9' instead, and the output has no such part"),
        ("depth:nonsense", "Behind the colon .* must be one of logits"),
        (3.5, "must be one of auto, logits"),
        (lambda output: output["none"], "given as 'output' raised KeyError"),
    ],
)
def test_parts_that_there_are_not(output, words):
    model = Net(maps(6), several).eval()
    with pytest.raises(CallError, match=words):
        taut.compress(model, IMAGES, budget=taut.Budget(params=0.8), data=[IMAGES], output=output)


def test_a_recipe_says_what_counts():
    recipe = Recipe.of({"output": "depth:values", "mask": "extra"})
    assert (recipe.output, recipe.mask) == ("depth:values", "extra")
    for wrong in ({"output": 3.5}, {"output": "a:nonsense"}, {"mask": 3}):
        with pytest.raises(CallError, match=next(iter(wrong))):
            Recipe.of(wrong)


# The real ones.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def texts(count, length, *, labels=True):
    ids = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) < torch.arange(count)[:, None] % length + 2).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    return batch | {"labels": ids.masked_fill(mask == 0, -100)} if labels else batch


def real_model(transformers, name):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_models_of_transformers_take_their_loaders(transformers, name):
    torch.manual_seed(0)
    model, loader = real_model(transformers, name).eval(), [texts(8, 6), texts(8, 9), texts(3, 6)]
    stats = taut.observe(taut.trace(model, loader[0]), model, loader)
    assert stats.kinds == ("logits",)
    assert stats.network.example.divisible
    assert stats.network.example.answers == ({"labels"} if name == "t5" else set())
    plan = taut.plan(stats.network, stats, taut.Budget(params=0.95)) if name != "gpt2" else taut.Plan(())
    small = taut.apply(model, plan, stats, data=loader)
    assert torch.isfinite(small(**loader[1]).logits).all()
