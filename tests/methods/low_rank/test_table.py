"""Embeddings of fewer columns: the best ones for what is read, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

import taut
from taut.measure.latency_model import built_ops
from taut.structure.asides import smoothed
from taut.types import Plan, Step


class Reader(nn.Module):
    """Reads a table by tokens, one by positions, and answers for each."""

    def __init__(self, **settings):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 12, **settings), nn.Embedding(10, 12)
        self.mix, self.classes = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.classes(self.mix(x).relu().mean(1))


def ids(samples=64, seed=0):
    """Few words often, most of them seldom."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 10, generator=random).pow(3).mul(40).long()


def built(**settings):
    torch.manual_seed(0)
    return Reader(**settings).eval()


def step(model, rank, data=None, **settings):
    net = taut.trace(model, ids(4))
    stats = taut.observe(net, model, data)
    one = Step(("words",), "table", {"rank": rank, **settings})
    return taut.apply(model, Plan.of(net, [one]), stats)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_table_of_that_rank_loses_less_of_what_is_read(rank):
    model, data = built(), torch.cat([ids(256), torch.arange(40).reshape(4, 10)])
    small = step(model, rank, data)
    counts = torch.bincount(data.flatten(), minlength=40).double()
    lost = (small.words[1](small.words[0].weight) - model.words.weight).double().square().sum(1) @ counts
    best = torch.linalg.svdvals(counts.sqrt()[:, None] * model.words.weight.double())[rank:].square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-4)
    small = step(model, rank, data, metric="frobenius")
    plain = (small.words[1](small.words[0].weight) - model.words.weight).double().square().sum(1) @ counts
    assert plain > best * 1.01


def test_damage_is_what_the_output_loses():
    """The output is the table's own, read as values: half its squared change."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Embedding(20, 8)).eval(), ids(512) % 20
    net = taut.trace(model, data[:4])
    stats = taut.observe(net, model, data, output="values")
    for rank in (2, 5):
        plan = Plan.of(net, [Step(("0",), "table", {"rank": rank})])
        method = taut.methods.resolve(plan.steps[0])
        group = net.group(["0"])
        small = taut.apply(model, plan, stats)
        measured = (small(data) - model(data)).square().sum() / (2 * len(data))
        assert stats.damage(group, method) == pytest.approx(float(measured), rel=0.05)


def test_rows_that_no_sample_read_count_as_much_as_those_read_once():
    shares = smoothed(torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0]).double())
    assert float(shares.sum()) == pytest.approx(1)
    assert 0 < float(shares[3]) == float(shares[4]) < float(shares[0])
    assert torch.equal(smoothed(torch.tensor([3.0, 1.0]).double()), torch.tensor([0.75, 0.25]).double())
    assert torch.equal(smoothed(torch.zeros(4).double()), torch.full((4,), 0.25).double())


def test_a_budget_of_params_takes_it_and_one_of_macs_does_not(tmp_path):
    model, data = built(), ids(128)
    before = copy.deepcopy(model.state_dict())
    low_rank = {"methods": "low rank", "data": [data], "compare": False}
    result = taut.compress(model, data[:4], budget=taut.Budget(params=0.6), **low_rank)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(step.method == "table" for step in result.plan.steps)
    assert result.plan.after.params <= 0.6 * result.plan.before.params
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=built)(data), result.model(data))
    assert all(parity.holds for parity in result.export(tmp_path / "small.onnx").parity)
    other = taut.compress(model, data[:4], budget=taut.Budget(macs=0.6), data=[data], compare=False)
    assert not any(step.method == "table" for step in other.plan.steps)


def test_settings_stay_and_the_padding_is_zero_and_trains():
    model = built(padding_idx=3, scale_grad_by_freq=True)
    small = step(model, 4, ids())
    table = small.words[0]
    assert (table.padding_idx, table.scale_grad_by_freq, table.num_embeddings) == (3, True, 40)
    assert not small.words(torch.tensor([[3]])).any()
    small.train()(ids()).sum().backward()
    assert small.words[1].weight.grad.any()
    assert not table.weight.grad[3].any()


def test_what_renormalizes_or_is_read_by_other_code_stays():
    class Reading(Reader):
        def forward(self, ids):
            return super().forward(ids) + self.words.weight.mean()

    reading = "head.weight = words.weight"
    for model, words in ((built(max_norm=1.0), "max_norm"), (Reading().eval(), reading)):
        net = taut.trace(model, ids(4))
        assert words in net["words"].whole
        plan, stats = Plan.of(net, [Step(("words",), "table", {"rank": 2})]), taut.observe(net, model)
        assert words in next(one.reason for one in taut.plan(net, stats, {"params": 1.0}).kept if one.layer == "words")
        with pytest.raises(taut.CallError, match=words):
            taut.apply(model, plan, stats)
        assert net["places"].whole is None


def test_rows_that_are_multiplied_by_a_number_are_so_afterwards():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 3

    model = built()
    model.words = Scaled(40, 12).eval()
    exact = taut.apply(
        model,
        Plan.of(net := taut.trace(model, ids(4)), [Step(("words",), "table", {"rank": 12}, allow_growth=True)]),
        taut.observe(net, model),
    )
    torch.testing.assert_close(exact(ids()), model(ids()), rtol=0, atol=1e-5)


def test_shapes_and_types_are_answered():
    class Asking(Reader):
        def forward(self, ids):
            return super().forward(ids).to(self.words.weight.dtype) / self.words.embedding_dim

    model = Asking().eval()
    small = step(model, 4, ids())
    assert small(ids()).shape == (64, 3)
    assert small.words.embedding_dim == 12


def test_without_data_the_weights_decide():
    model = built()
    small = step(model, 5)
    lost = (small.words[1](small.words[0].weight) - model.words.weight).double().square().sum()
    best = torch.linalg.svdvals(model.words.weight.double())[5:].square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-4)


def test_what_it_does_when_it_runs_is_told_for_predictions_of_time():
    group, method = taut.trace(built(), ids(4)).group(["words"]), taut.methods.resolve(Step((), "table", {"rank": 3}))
    assert built_ops(group, method)[:, 0].sum() == method.cost(group).macs


def test_inspect_says_so():
    seen = taut.inspect(built(), ids(4))
    assert next(reach for reach in seen.layers if reach.layer.name == "words").default == ("table",)


def language_model(*, tied):
    """GPT-2, tiny."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - seconds

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=200, n_embd=16, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=tied, use_cache=False
    )
    return GPT2LMHeadModel(config).eval()


def test_a_language_model_generates_with_its_cache_and_a_tied_table_stays(tmp_path):
    tokens = torch.randint(0, 200, (8, 10))
    model = language_model(tied=False)
    net = taut.trace(model, {"input_ids": tokens})
    plan = Plan.of(net, [Step(("transformer.wte",), "table", {"rank": 4})])
    small = taut.apply(model, plan, taut.observe(net, model, [{"input_ids": tokens}]))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ended = small.generate(tokens, use_cache=True, **settings)
    assert torch.equal(ended, small.generate(tokens, use_cache=False, **settings))
    taut.save(small, plan, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: language_model(tied=False))
    assert torch.equal(again(tokens).logits, small(tokens).logits)
    assert (
        "shared with 'lm_head'" in taut.trace(language_model(tied=True), {"input_ids": tokens})["transformer.wte"].skip
    )
