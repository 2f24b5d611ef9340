"""Data as people have them: loaders of dicts with labels, datasets, arrays and lists, with more or less than needed."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import taut
from taut import DataError, ModelError
from taut.core.data import collect
from taut.core.formats import collated
from taut.structure.calling import read_example

WORDS, WIDE, LONG = 30, 12, 5
X, Y = torch.randn(48, 10, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 4


class Output(collections.OrderedDict):
    """As transformers' outputs: entries are attributes, too."""

    def __getattr__(self, name):
        return self[name]


@dataclasses.dataclass
class Answer:
    loss: object = None
    logits: object = None


class Tagger(nn.Module):
    """Takes what tokenizers and collators give, as transformers' models do."""

    form = Output

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDE)
        self.a, self.b, self.head = nn.Linear(WIDE, 24), nn.Linear(24, WIDE), nn.Linear(WIDE, WORDS)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        x = self.words(input_ids)
        if token_type_ids is not None:
            x = x + token_type_ids[..., None]
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        scores = self.head(x + self.b(self.a(x).relu()))
        if labels is None:
            return self.form(logits=scores)
        return self.form(loss=nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), logits=scores)


class AnswersAsObject(Tagger):
    form = Answer


class NeedsLabels(Tagger):
    """As encoder-decoder models, which make the decoder's input of the labels."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        if labels is None:
            raise ValueError("You have to specify either decoder_input_ids or decoder_inputs_embeds")
        shifted = labels.roll(1, -1).clamp_min(0)
        return super().forward(input_ids * 0 + shifted, attention_mask, labels=labels.clamp_min(0))


class ConditionedOnLabels(nn.Module):
    """Labels that change the answer are inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.kinds, self.b = nn.Linear(10, 16), nn.Embedding(4, 16), nn.Linear(16, 10)

    def forward(self, x, y=None):
        h = self.a(x)
        return self.b((h if y is None else h + self.kinds(y)).relu())


class OfDict(nn.Module):
    """One argument with all in it."""

    def __init__(self):
        super().__init__()
        self.body = plain()

    def forward(self, batch):
        x = self.body(batch["x"])
        return x * batch["scale"][:, None] if "scale" in batch else x


class OfAttributes(nn.Module):
    """One argument whose entries are read as attributes."""

    def __init__(self):
        super().__init__()
        self.body = plain()

    def forward(self, batch):
        return self.body(batch.x)


class Entries(collections.UserDict):
    """As a tokenizer's BatchEncoding."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class OfKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = plain()

    def forward(self, **entries):
        return self.body(entries["x"])


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))


def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))


def ids(count=4, length=LONG):
    return torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(count + length))


def entries(count=4, length=LONG, **more):
    return {"input_ids": ids(count, length), "attention_mask": torch.ones(count, length, dtype=torch.long)} | more


def read(model, example, data, limit=1000):
    call = read_example(model.eval(), example)
    batches = collect(call, data, limit)
    for inputs, _ in batches:
        call.run(model, inputs)
    return call, batches


class Items(Dataset):
    """A map-style dataset that says nothing of its end."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        row = tuple(column[index] for column in self.columns)
        return row if len(row) > 1 else row[0]


class Lines:
    """As a Hugging Face dataset: rows are dicts of plain lists and texts."""

    def __init__(self, lengths=(LONG,) * 8):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index):
        count = self.lengths[index]
        return {"text": "t" * count, "input_ids": [index] * count, "attention_mask": [1] * count, "label": index}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    label: torch.Tensor


# What of a batch goes into the model, and what are targets.

LABELS = ids().roll(1, 0)
NAMED = [
    ("labels", entries(), entries(labels=LABELS)),
    ("labels in the example", entries(labels=LABELS), entries(labels=LABELS)),
    ("labels first", {"labels": LABELS, **entries()}, {"labels": LABELS, **entries()}),
    ("labels of the example alone", entries(labels=LABELS), (entries(), LABELS)),
    (
        "surplus",
        entries(idx=torch.arange(4), text=["a"] * 4),
        entries(labels=LABELS, idx=torch.arange(4), text=["b"] * 4),
    ),
    ("another order", entries(), dict(reversed(entries(labels=LABELS).items()))),
    ("user's mapping", Entries(entries()), Entries(entries(labels=LABELS))),
    ("a name for targets of our own", entries(), (entries(), LABELS, {"path": "x"})),
    ("target", entries(), entries(target=LABELS)),
    ("without names", ids(), {"input_ids": ids(), "labels": LABELS}),
]


@pytest.mark.parametrize(("example", "batch"), [case[1:] for case in NAMED], ids=[case[0] for case in NAMED])
@pytest.mark.parametrize("kind", [Tagger, AnswersAsObject])
def test_entries_by_name(kind, example, batch):
    model = kind().eval()
    call, ((inputs, targets),) = read(model, example, [batch])
    assert torch.equal(targets, LABELS)
    held = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    assert list(held) == [key for key in ("input_ids", "attention_mask") if key in held]
    outputs = call.run(model, inputs)
    assert "loss" not in outputs if isinstance(outputs, dict) else outputs.loss is None


def test_optional_entries_may_lack_anywhere():
    model, kinds = Tagger().eval(), torch.ones(4, LONG, dtype=torch.long)
    full = entries(token_type_ids=kinds)
    _, batches = read(model, full, [entries(), full, {"input_ids": ids()}])
    assert [len(inputs) for inputs, _ in batches] == [2, 3, 1]
    _, batches = read(model, {"input_ids": ids()}, [full, entries(), {"input_ids": ids(), "token_type_ids": None}])
    assert [list(inputs) for inputs, _ in batches] == [list(full), list(entries()), ["input_ids"]]


def test_labels_that_the_model_needs_are_inputs_and_targets():
    model = NeedsLabels().eval()
    call, ((inputs, targets),) = read(model, entries(labels=LABELS), [entries(labels=LABELS)])
    assert torch.equal(inputs["labels"], LABELS)
    assert torch.equal(targets, LABELS)
    assert call.answers == {"labels"}


def test_labels_that_change_the_answer_are_inputs():
    model = ConditionedOnLabels().eval()
    _, ((inputs, _),) = read(model, {"x": X[:8], "y": Y[:8]}, [{"x": X, "y": Y}])
    assert list(inputs) == ["x", "y"]
    _, ((inputs, targets),) = read(model, {"x": X[:8]}, [{"x": X, "y": Y}])
    assert list(inputs) == ["x"]
    assert torch.equal(targets, Y)


@pytest.mark.parametrize("example", [{"x": X[:8]}, {"x": X[:8], "label": Y[:8]}])
@pytest.mark.parametrize("kind", [OfDict, OfKeywords])
def test_models_of_one_dict_and_of_any_keywords(kind, example):
    batch = {"x": X, "label": Y, "path": ["p"] * 48}
    _, ((inputs, targets),) = read(kind(), example, [batch])
    assert list(inputs) == ["x"]
    assert torch.equal(targets, Y)


def test_a_model_of_one_dict_takes_what_it_finds():
    scaled = {"x": X, "scale": torch.full((48,), 2.0)}
    _, batches = read(OfDict(), {"x": X[:8]}, [scaled, {"x": X}])
    assert [list(inputs) for inputs, _ in batches] == [["x", "scale"], ["x"]]
    _, batches = read(OfDict(), {k: v[:8] for k, v in scaled.items()}, [{"x": X}])
    assert [list(inputs) for inputs, _ in batches] == [["x"]]
    model = OfAttributes()
    call, ((inputs, _),) = read(model, Entries(x=X[:8]), [Entries(x=X, y=Y)])
    assert torch.equal(call.run(model, inputs), model.body(X))


def test_several_targets_come_by_name():
    spans = {"start_positions": Y[:4], "end_positions": Y[4:8]}
    _, ((_, targets),) = read(Tagger(), entries(), [entries(**spans)])
    assert targets.keys() == spans.keys()


TUPLES = [
    ((X[:8], Y[:8], ["m"] * 8), "meta"),
    ((X[:8], Y[:8], torch.arange(8), {"a": 1}), "four"),
    (Pair(X[:8], Y[:8]), "named tuple"),
    (Record(X[:8], Y[:8]), "dataclass"),
    ({"image": X[:8], "label": Y[:8]}, "one entry that fits"),
    ([(x, y) for x, y in zip(X[:8], Y[:8], strict=True)], "not collated"),
    ((X[:8].double().numpy(), Y[:8].numpy()), "arrays"),
    ([X[:8], Y[:8]], "list"),
]


@pytest.mark.parametrize("batch", [case[0] for case in TUPLES], ids=[case[1] for case in TUPLES])
@pytest.mark.parametrize("own", [False, True], ids=["tensor", "as batch"])
def test_entries_by_position(batch, own):
    """The example may be a batch itself, with all that a loader gives."""
    model = plain()
    call, ((inputs, targets),) = read(model, batch if own else X[:8], [batch])
    assert torch.equal(inputs, X[:8])
    assert inputs.dtype == call.value.dtype == torch.float32
    assert torch.equal(targets, Y[:8])


def test_arguments_and_targets_in_a_row():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(10, 4)

        def forward(self, x, scale):
            return self.a(x) * scale[:, None]

    data = TensorDataset(X, torch.rand(48), Y)
    for example in ((X[:8], torch.rand(8)), [X[:8], torch.rand(8), Y[:8]]):
        call, batches = read(Two(), example, DataLoader(data, 24))
        assert isinstance(call.value, tuple)
        assert [len(inputs) for inputs, _ in batches] == [2, 2]
        assert torch.equal(torch.cat([targets for _, targets in batches]), Y)


# Where batches come from.


@pytest.mark.parametrize(
    "data",
    [
        Items(X, Y),
        Items(X, Y.tolist(), ["p"] * 48),
        Items(X.double().numpy(), Y.numpy()),
        Items(X),
        Stream(),
        list(zip(X, Y.tolist(), strict=True)),
        list(X),
        (X.numpy(), Y.numpy()),
        DataLoader(Items(X.double().numpy(), Y.numpy()), 8),
        DataLoader(Items(X, Y), batch_size=None),
        [X[:24], X[24:], X[:0]],
        [(X[:24], Y[:24]), (X[:0], Y[:0]), (X[24:], Y[24:])],
    ],
    ids=lambda data: type(data).__name__,
)
def test_all_samples_are_read_whatever_holds_them(data):
    _, batches = read(plain(), X[:8], data)
    rows = torch.cat([inputs for inputs, _ in batches])
    assert rows.dtype == torch.float32
    assert torch.equal(rows[rows[:, 0].argsort()], X[X[:, 0].argsort()])
    if batches[0][1] is not None:
        assert torch.equal(torch.cat([targets for _, targets in batches])[rows[:, 0].argsort()], Y[X[:, 0].argsort()])


def test_samples_of_a_dataset_come_in_an_order_of_their_own_that_is_the_same_each_time():
    first, second = (read(plain(), X[:8], Items(X, Y), limit=16)[1] for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert len(first[0][0]) == 16
    assert not torch.equal(first[0][0], X[:16])


def test_lines_of_any_length():
    _, batches = read(Tagger(), entries(), Lines((3, 4, 3, 4, 4)))
    assert sorted(tuple(inputs["input_ids"].shape) for inputs, _ in batches) == [(2, 3), (3, 4)]
    assert sorted(int(t) for _, targets in batches for t in targets) == list(range(5))


@pytest.mark.parametrize("form", [list, tuple])
def test_images_in_lists(form):
    pictures = form(torch.randn(3, 6, 6) for _ in range(12))
    _, batches = read(images(), torch.randn(4, 3, 6, 6), pictures)
    assert sum(len(inputs) for inputs, _ in batches) == 12
    _, batches = read(images(), torch.randn(4, 3, 6, 6), DataLoader(list(pictures), 4, collate_fn=list))
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(4, 3, 6, 6)] * 3


def test_a_fixed_batch_is_filled():
    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(10, 4)

        def forward(self, x):
            return self.a(x.view(4, 10)).view(4, 4)

    _, batches = read(Four(), X[:4], Items(X[:10]))
    assert [len(inputs) for inputs, _ in batches] == [4, 4]


def test_lists_of_targets_are_cut_with_their_samples():
    _, batches = read(plain(), X[:8], [(X[:6], [0, 1, 2, 3, 0, 1])], limit=4)
    assert batches[0][1] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("example", "value"),
    [
        (X[:8].double().numpy(), X.numpy()),
        (X[:8].numpy(), X.double()),
        (X[:8].numpy(), X.numpy()[::-1].astype(">f8")),
        (X[:8].double().numpy(), np.broadcast_to(X[:1].numpy(), (48, 10))),
    ],
    ids=["double", "tensor", "bytes swapped", "read only"],
)
def test_arrays_are_of_the_type_of_the_model(example, value):
    call, ((inputs, _),) = read(plain(), example, [value])
    assert call.value.dtype == inputs.dtype == torch.float32
    assert np.allclose(inputs, value)


def test_a_model_in_double_precision_keeps_it():
    _, ((inputs, _),) = read(plain().double(), X[:8].double().numpy(), [X.double().numpy()])
    assert inputs.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_arrays_of_any_width_are_of_the_type_of_the_model(dtype, kind):
    model, x = plain().to(dtype), X.numpy().astype(kind)
    data = [(x, Y.numpy())], x, Items(x, Y.numpy()), Items(x), DataLoader(Items(x), 48, collate_fn=list)
    for form in data:
        call, ((inputs, _), *_) = read(model, x[:8], form)
        assert call.value.dtype == inputs.dtype == dtype
        call.run(model, inputs)


def test_arrays_of_a_type_that_the_model_has_stay():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.Embedding(4, 10).half(), nn.Linear(10, 4)

        def forward(self, x):
            return self.a(x + self.table.weight.float().mean(0))

    _, ((inputs, _),) = read(Mixed(), X[:8].numpy(), [X.numpy()])
    assert torch.equal(inputs, X)


@pytest.mark.parametrize(
    ("model", "value", "words"),
    [
        (plain(), X[:8].half(), "The input is float16, the model's weights are float32: convert the input as in train"),
        (plain().half(), X[:8], "The input is float32, the model's weights are float16: convert"),
        (plain(), X[:8].byte(), "The input is uint8, the model's weights are float32: convert"),
        (plain(), X[:8].byte().numpy(), "The input is uint8, the model's weights are float32: convert"),
    ],
)
def test_an_input_of_another_type_is_named_with_the_remedy(model, value, words):
    with pytest.raises(ModelError, match=words):
        read_example(model, value)


def test_a_batch_of_another_type_is_named_with_the_remedy():
    with pytest.raises(ModelError, match="The input is float16, the model's weights are float32: convert"):
        taut.observe(taut.trace(plain(), X[:8]), plain(), [X.half()])


# Words.


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"attention_mask": torch.ones(4, LONG, dtype=torch.long), "text": "a"}, "it lacks 'input_ids'"),
        ({"input_ids": ["a text"], "labels": LABELS}, "'input_ids' is a list, not a tensor"),
        ({"input_ids": ids().float(), "labels": LABELS}, "float32 where the example's is int64: convert it as in"),
        ({"input_ids": ids()[None]}, "'input_ids' has 3 dimensions where the example's has 2"),
        ((ids(), LABELS), "give dicts with the entries 'input_ids', 'attention_mask'"),
    ],
)
def test_an_unfit_batch_names_what_differs(batch, words):
    call = read_example(Tagger().eval(), entries())
    with pytest.raises(DataError, match=words):
        collect(call, [batch], 10)
    with pytest.raises(DataError, match=rf"{words}.*It is batch 2 of the data"):
        collect(call, [entries(), entries(), batch], 10)


def test_entries_that_an_example_cannot_hold_are_not_dropped():
    call = read_example(Tagger().eval(), ids())
    with pytest.raises(DataError, match="give the example as a dict, too"):
        collect(call, [entries()], 10)


def test_a_mapping_of_datasets_is_not_one():
    with pytest.raises(DataError, match="of train, test: give one of them"):
        read(plain(), X[:8], {"train": Items(X), "test": Items(X)})


def test_an_example_that_no_call_takes_tells_the_first_error():
    with pytest.raises(ModelError, match=r"\(float32\[8, 4\], int64\[8\]\)"):
        read_example(plain(), (torch.randn(8, 4), Y[:8]))


def test_samples_of_other_forms_are_not_stacked():
    with pytest.raises(ValueError, match="shapes"):
        collated([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="lengths"):
        collated([(torch.ones(2),), (torch.ones(2), 1)])


class Broken(Items):
    def __getitem__(self, index):
        raise OSError("disk gone")


@pytest.mark.parametrize("use", ["data", "finetune"])
def test_a_dataset_that_fails_is_named(use):
    broken = Broken(X)
    tuning = taut.Finetune(broken if use == "finetune" else Items(X), Items(X), None, (taut.Stage(epochs=1),))
    with pytest.raises(DataError, match=r"data.* raised OSError: disk gone"):
        taut.compress(
            plain(), X[:8], budget=taut.Budget(params=0.8), data=broken if use == "data" else None, finetune=tuning
        )


# The whole way.


def test_a_loader_with_labels_serves_every_verb(tmp_path):
    model, loader = Tagger().eval(), [entries(count, labels=ids(count)) for count in (8, 6)]
    example = next(iter(loader))
    budget = taut.Budget(params=0.8)

    def loss(output, targets):
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())

    def evaluate(net):
        with torch.no_grad():
            return -float(sum(loss(net(**batch), batch["labels"]) for batch in loader))

    tuning = taut.Finetune(loader, loader, loss, (taut.Stage(epochs=1),))
    result = taut.compress(model, example, budget=budget, data=loader, evaluate=evaluate, finetune=tuning)
    assert result.comparison.after.params <= 0.8 * result.comparison.before.params
    bare = [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in loader]
    same = taut.compress(
        model, bare[0][0], budget=budget, data=bare, finetune=taut.Finetune(bare, bare, loss, tuning.schedule)
    )
    for a, b in zip(result.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    result.save(tmp_path / "small")
    assert taut.load(tmp_path / "small", base=model)(**example).logits.shape == (8, LONG, WORDS)


def test_a_dataset_trains():
    torch.manual_seed(0)
    model, data = plain().eval(), Items(X, Y.tolist())
    tuning = taut.Finetune(data, data, nn.functional.cross_entropy, (taut.Stage(epochs=2),))
    one, two = (
        taut.compress(model, X[:8], budget=taut.Budget(params=0.7), data=data, finetune=tuning) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
