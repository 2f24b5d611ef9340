"""An embedding and a head of one weight: one factorization at both ends, which stays one."""

import copy

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import taut
from taut.measure.latency_model import built_ops
from taut.methods import resolve
from taut.nn import Tied
from taut.planning.application import apply_plan
from taut.types import Plan, Step

WORDS, WIDTH = 60, 12


class LM(nn.Module):
    """A language model as they are written: scaled inputs of a tied head, and what else there may be of its weight."""

    def __init__(self, *, bias=False, lent=False, tables=1, **settings):
        super().__init__()
        if tables > 1:  # one that is never called, and one for the encoder
            self.shared, self.before = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.words = nn.Embedding(WORDS, WIDTH, **settings)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if lent:
            self.bias = nn.Parameter(torch.randn(WORDS))
            self.head.bias = self.bias
        for table in (self.shared, self.before, self.words) if tables > 1 else (self.words,):
            table.weight = self.head.weight

    def forward(self, ids):
        x = self.words(ids)
        if hasattr(self, "before"):
            x = x + self.before(ids.flip(1))
        return self.head(x.cumsum(1).tanh() * WIDTH**-0.5 + self.mid(x).tanh())


def ids(samples=48, seed=0):
    """Few words often, most of them seldom."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 8, generator=random).pow(2).mul(WORDS).long()


def built(**settings):
    torch.manual_seed(0)
    return LM(**settings).eval()


def made(model, rank, data=None, **settings):
    """The model with its weight in factors, the plan that was carried out, and what it stands on."""
    net = taut.trace(model, ids(4))
    stats = taut.observe(net, model, data, output="logits")
    (group,) = net.tied
    plan = Plan.of(net, [Step(group.names, "tied", {"rank": rank, **settings}, allow_growth=True)])
    return *apply_plan(model, plan, stats), stats


VARIANTS = {"plain": {}, "bias": {"bias": True}, "lent bias": {"bias": True, "lent": True}, "tables": {"tables": 3}}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@EVERY_VARIANT
def test_full_rank_is_the_dense_weight_and_costs_are_those_of_what_was_built(variant):
    model = built(**variant)
    small, plan, _ = made(model, WIDTH)
    torch.testing.assert_close(small(ids()), model(ids()), rtol=0, atol=1e-5)
    (step,) = plan.steps
    assert taut.trace(small, ids(4)).cost.params == plan.before.params - step.before.params + step.after.params
    assert set(map(id, model.parameters())).isdisjoint(map(id, small.parameters()))
    assert isinstance(model.head.weight, nn.Parameter)


@pytest.mark.parametrize("rank", [2, 5])
def test_without_data_it_is_the_truncated_svd(rank):
    small, _, _ = made(model := built(), rank)
    best = torch.linalg.svdvals(model.head.weight.double())[rank:].square().sum()
    lost = (small.head.dense() - model.head.weight).double().square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-4)
    assert torch.equal(small.head.dense(), small.words.dense())


@EVERY_VARIANT
def test_damage_is_that_of_the_change_at_every_end(variant):
    """Of an embedding by the rows that are read and its gradients, of the head by its inputs and theirs."""
    model = built(**variant)
    small, plan, stats = made(model, 5, ids(64))
    dW = (model.head.weight - small.head.dense()).detach().double()
    wanted = 0.0
    for name in plan.steps[0].layers:
        seen = stats.seen(name)
        if name == "head":
            wanted += float(seen.outputs.error(seen.weighting, dW[None, :, :, None])) / (2 * seen.positions)
        elif name != "shared":
            read = dW.T @ (seen.counts[:, None] * dW)
            wanted += float((seen.outputs.full[0].double() * read).sum()) / (2 * seen.positions)
    (group,) = stats.network.tied
    assert stats.damage(group, resolve(plan.steps[0])) == pytest.approx(wanted, rel=1e-4)


def test_what_the_ends_tell_makes_it_better():
    """By both ends together the output moves less than by the weights alone, and than without regard to the loss."""
    model, data, fresh = built(), ids(512), ids(512, seed=1)
    with torch.no_grad():  # rows of words that are read seldom are long
        model.head.weight.mul_(torch.linspace(0.5, 3, WORDS)[:, None])
        wanted = model(fresh).log_softmax(-1)
        moved = {
            metric: float(
                (wanted.exp() * (wanted - made(model, 4, data, metric=metric)[0](fresh).log_softmax(-1))).sum()
            )
            for metric in ("fisher", "data", "frobenius")
        }
    assert moved["fisher"] < moved["data"] < moved["frobenius"]


@EVERY_VARIANT
def test_a_budget_takes_it_and_the_result_loads_to_the_same_bits(variant, tmp_path):
    model, data = built(**variant), ids(64)
    before = copy.deepcopy(model.state_dict())
    result = taut.compress(
        model, data[:4], budget={"params": 0.5}, data=[data], output="logits", keep="mid", compare=False
    )
    assert [step.method for step in result.plan.steps] == ["tied"]
    assert sum(p.numel() for p in result.model.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result.save(tmp_path / "small")
    again = taut.load(tmp_path / "small", base=lambda: built(**variant))
    assert torch.equal(again(ids(seed=3)), result.model(ids(seed=3)))
    assert len(list(again.parameters())) == len(list(result.model.parameters()))
    tokens = ids(2)
    for _ in range(3):
        following = [net(tokens)[:, -1].argmax(-1, keepdim=True) for net in (result.model, again)]
        assert torch.equal(*following)
        tokens = torch.cat([tokens, following[0]], 1)


def test_it_is_exported(tmp_path):
    small, _, _ = made(built(bias=True), 4)
    exported = taut.export(small, ids(4), tmp_path / "small.onnx")
    assert all(parity.holds for parity in exported.parity)
    stored = [tuple(one.dims) for one in onnx.load(exported.path).graph.initializer]
    assert sum(size in {(WORDS, 4), (4, WORDS)} for size in stored) == 1
    assert sum(size in {(WIDTH, 4), (4, WIDTH)} for size in stored) == 1


def test_both_ends_train_the_same_factors():
    small, _, _ = made(built(bias=True, lent=True), 4)
    small.train()
    for name in ("words", "head"):  # one end at a time
        small.zero_grad()
        x = small.words(ids()).detach() if name == "head" else small.words(ids())
        (small.head(x) if name == "head" else x).square().mean().backward()
        assert all(bool(p.grad.any()) for p in (small.words.table.weight, small.words[1].weight))
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    before = small.head.dense().detach().clone()
    functional.cross_entropy(small(ids()).flatten(0, 1), ids().flatten()).backward()
    optimizer.step()
    assert not torch.equal(small.head.dense(), before)
    moved = copy.deepcopy(small).double().half().float()
    for net in (small, moved):
        assert net.words.table.weight is net.head.table.weight
        assert net.words[1].weight is net.head[0].weight
        assert net.bias is net.head.bias


def test_frozen_stays_frozen_and_settings_of_the_table_stay(tmp_path):
    model = built(padding_idx=3, scale_grad_by_freq=True)
    model.head.weight.requires_grad = False
    small, plan, _ = made(model, 4)
    taut.save(small, plan, tmp_path / "small")
    for net in (small, taut.load(tmp_path / "small", base=lambda: model)):
        assert not any(p.requires_grad for end in (net.words, net.head) for p in end.parameters())
        assert (net.words.padding_idx, net.words.table.padding_idx, net.words.scale_grad_by_freq) == (3, 3, True)


def test_other_code_reads_what_it_read_before():
    small, _, _ = made(built(bias=True), 4)
    words, head = small.words, small.head
    assert (words.num_embeddings, words.embedding_dim, words.padding_idx) == (WORDS, WIDTH, None)
    assert (head.out_features, head.in_features) == (WORDS, WIDTH)
    assert words.weight.shape == head.weight.shape == (WORDS, WIDTH)
    assert head.weight.dtype == torch.float32
    torch.testing.assert_close(functional.linear(torch.ones(WIDTH), head.weight), head.dense().sum(1))
    assert torch.equal(head(torch.zeros(WIDTH)), head.bias)
    before = dict(small.state_dict())
    head.weight = small.get_parameter("words.weight")  # as libraries tie
    assert before.keys() == small.state_dict().keys()
    with pytest.raises(AttributeError, match="in factors"):
        head.weight = nn.Parameter(torch.zeros(WORDS, WIDTH))
    with pytest.raises(AttributeError, match="in factors"):
        head.weight = Tied(nn.Embedding(WORDS, 2), nn.Parameter(torch.zeros(WIDTH, 2))).weight
    head.bias = nn.Parameter(torch.ones(WORDS))
    assert torch.equal(head(torch.zeros(WIDTH)), torch.ones(WORDS))
    with pytest.raises(AttributeError, match="stride"):
        head.stride  # noqa: B018


@pytest.mark.parametrize("end", ["words", "head"])
def test_what_is_kept_protects_both_ends(end):
    model, data = built(), ids()
    kept = taut.trace(model, data[:4]).keeping(end)
    stats = taut.observe(kept, model, data, output="logits")
    with pytest.raises(taut.BudgetError):
        taut.plan(kept, stats, {"params": 0.5})
    by_hand = Plan.of(kept, [Step(("words", "head"), "tied", {"rank": 2})])
    with pytest.raises(taut.CallError, match="shared with"):
        taut.apply(model, by_hand, stats)
    small = taut.apply(model, taut.plan(kept, stats, {"params": 0.9}), stats, data=[data])
    assert small.words.weight is small.head.weight
    assert torch.equal(small.head.weight, model.head.weight)


@pytest.mark.parametrize("end", ["words", "head"])
def test_floors_hold_and_what_would_go_below_stays_as_it_was(end):
    model, data = built(), ids()
    net = taut.trace(model, data[:4]).keeping({end: 0.5})
    stats = taut.observe(net, model, data, output="logits")
    with pytest.raises(taut.BudgetError):
        taut.plan(net, stats, {"params": 0.44})
    (step,) = (one for one in taut.plan(net, stats, {"params": 0.5}).steps if one.method == "tied")
    assert step.settings["rank"] * (WORDS + WIDTH) == 0.5 * WORDS * WIDTH
    low = Plan.of(net, [Step(("words", "head"), "tied", {"rank": 2})])
    small, done = apply_plan(model, low, stats)
    assert not done.steps
    assert "has to stay, as asked" in done.kept[-1].reason
    assert small.words.weight is small.head.weight
    assert small.words.weight is not model.words.weight
    assert torch.equal(small.words.weight, model.words.weight)


@pytest.mark.parametrize("reading", [True, False], ids=["tied", "table"])
def test_what_a_method_takes_does_not_stand_in_the_way_of_a_budget(reading):
    model, data = built(), ids()
    if not reading:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    net = taut.trace(model, data[:4])
    with pytest.raises(taut.BudgetError) as by_plan:
        taut.plan(net, taut.observe(net, model), {"params": 0.01})
    with pytest.raises(taut.BudgetError) as by_search:
        taut.compress(model, data[:4], budget={"params": 0.01}, methods=["tied", "table"], compare=False)
    for error in (by_plan, by_search):
        words = "cannot be changed", "Left alone", "shared with", "is a table"
        assert not [one for one in words if one in str(error.value)]


class Computing(LM):
    def forward(self, ids):
        return super().forward(ids) + self.head.weight.mean()


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * WIDTH**0.5


class Tanh(nn.Embedding):
    def forward(self, x):
        return super().forward(x).tanh()


def with_words(kind):
    """The model with an embedding of another class."""
    model = built()
    weight, model.words = model.words.weight, kind(WORDS, WIDTH)
    model.words.weight = weight
    return model.eval()


LEFT = {
    "max_norm": (lambda: built(max_norm=1.0), "renormalizes"),
    "computed with": (lambda: Computing().eval(), "computes with it"),
    "own forward": (lambda: with_words(Tanh), "overrides forward"),
}


@pytest.mark.parametrize(("make", "words"), LEFT.values(), ids=LEFT)
def test_what_computes_something_else_stays_and_says_why(make, words):
    model = make()
    net = taut.trace(model, ids(4))
    assert all(words in net[name].whole for name in ("words", "head"))
    with pytest.raises(taut.CallError, match=words):
        taut.apply(model, Plan.of(net, [Step(("words", "head"), "tied", {"rank": 2})]), taut.observe(net, model))
    found = taut.inspect(model, ids(4))
    assert all(words in reach.blocked for reach in found.layers if reach.layer.name in {"words", "head"})


def test_rows_that_are_multiplied_by_a_number_are_so_afterwards(tmp_path):
    model = with_words(Scaled)
    whole, _, _ = made(model, WIDTH)
    torch.testing.assert_close(whole(ids()), model(ids()), rtol=0, atol=1e-5)
    small, plan, stats = made(model, 4, ids(64))
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: with_words(Scaled))(ids()), small(ids()))
    torch.testing.assert_close(small.words.to_plain()(ids()), small.words(ids()))
    dW = (model.head.weight - small.head.dense()).detach().double()
    seen = {name: stats.seen(name) for name in ("words", "head")}
    wanted = (
        float((seen["words"].outputs.full[0].double() * (dW.T @ (seen["words"].counts[:, None] * dW))).sum()) * WIDTH
    )
    wanted += float(seen["head"].outputs.error(seen["head"].weighting, dW[None, :, :, None]))
    (group,) = stats.network.tied
    assert stats.damage(group, resolve(plan.steps[0])) == pytest.approx(wanted / (2 * 8), rel=1e-4)


def test_all_layers_of_the_weight_are_taken_or_none():
    model = built(tables=3)
    net = taut.trace(model, ids(4))
    assert net["head"].tied == ("shared", "before", "words", "head")
    for names in (("words", "head"), ("head",)):
        with pytest.raises(taut.CallError, match=r"shared with .* lacks 'shared'"):
            taut.apply(model, Plan.of(net, [Step(names, "tied", {"rank": 2})]), taut.observe(net, model))
    apart = built()
    group = net.group(["mid"])
    assert "share a weight" in resolve(Step((), "tied")).refuses(group)
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    assert taut.trace(apart, ids(4)).tied == ()


def test_the_layers_of_the_weight_are_named_in_any_order(tmp_path):
    model = built(tables=3)
    net = taut.trace(model, ids(4))
    names = ("head", "words", "shared", "before")
    plan, stats = Plan.of(net, [Step(names, "tied", {"rank": 2})]), taut.observe(net, model)
    small, done = apply_plan(model, plan, stats)
    assert torch.equal(small(ids()), made(model, 2)[0](ids()))
    assert done.steps[0].after == made(model, 2)[1].steps[0].after
    taut.save(small, done, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: built(tables=3))(ids()), small(ids()))
    twice = Plan.of(net, [Step((*names[:3], "head"), "tied", {"rank": 2})])
    with pytest.raises(taut.CallError, match="lacks 'before'"):
        taut.apply(model, twice, stats)


def bagged():
    model = built()
    model.bag = nn.EmbeddingBag(WORDS, WIDTH)
    model.bag.weight = model.head.weight
    return model.eval()


STANDING = {
    "max_norm": (lambda: built(max_norm=1.0), {}, "renormalizes"),
    "computed with": (lambda: Computing().eval(), {}, "computes with it"),
    "a bag": (bagged, {}, "'bag' of kind EmbeddingBag: only embeddings and linear layers"),
    "other end kept": (built, {"head": 1.0}, "'head', which holds its weight, is kept as asked"),
    "floor": (built, {"head": 0.999}, "of 'head', which holds its weight, has to stay, as asked"),
}


@pytest.mark.parametrize(("make", "keep", "words"), STANDING.values(), ids=STANDING)
def test_plans_and_budgets_say_what_stands_in_the_way(make, keep, words):
    model = make()
    net = taut.trace(model, ids(4))
    kept = {one.layer: one.reason for one in taut.plan(net, taut.observe(net, model), {"params": 0.99}, keep=keep).kept}
    assert words in kept["words"]
    with pytest.raises(taut.BudgetError, match=r"Left alone|At the least") as found:
        taut.compress(model, ids(4), budget={"params": 0.05}, keep=keep, compare=False)
    assert words in str(found.value)


def test_what_no_longer_holds_one_weight_is_refused():
    model = built()
    net = taut.trace(model, ids(4))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    modules = {name: model.get_submodule(name) for name in ("words", "head")}
    with pytest.raises(taut.CallError, match="do not"):
        resolve(Step((), "tied", {"rank": 2})).factor(modules, {})
    assert net.tied[0].names == ("words", "head")


@EVERY_VARIANT
def test_what_it_does_when_it_runs_is_told_for_predictions_of_time(variant):
    net = taut.trace(built(**variant), ids(4))
    (group,), method = net.tied, resolve(Step((), "tied", {"rank": 3}))
    assert built_ops(group, method)[:, 0].sum() == method.cost(group).macs


def test_inspect_says_so():
    seen = taut.inspect(built(), ids(4))
    assert {reach.layer.name: reach.default for reach in seen.layers} == {
        "words": ("tied",),
        "mid": ("svd",),
        "head": ("tied",),
    }


def test_plain_layers_of_the_ends_compute_the_same():
    small, _, _ = made(built(bias=True, padding_idx=2), 4)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(small.head.to_plain()(x), small.head(x))
    words = small.words.to_plain()
    torch.testing.assert_close(words(ids()), small.words(ids()))
    assert words.padding_idx == 2


def test_factors_can_be_factorized_again(tmp_path):
    model = built(bias=True, padding_idx=2)
    once, _, _ = made(model, 6)
    net = taut.trace(once, ids(4))
    (group,) = net.tied
    again = Plan.of(net, [Step(group.names, "tied", {"rank": 3})])
    small, done = apply_plan(once, again, taut.observe(net, once))
    assert taut.trace(small, ids(4)).cost.params < net.cost.params
    words, head = small.words, small.head
    assert (words.padding_idx, words.num_embeddings, words.embedding_dim) == (2, WORDS, WIDTH)
    torch.testing.assert_close(words.weight + 0, head.weight + 0)
    for end, x in ((words, ids()), (head, torch.randn(3, WIDTH))):
        torch.testing.assert_close(end.to_plain()(x), end(x))
    assert words.to_plain().padding_idx == 2
    before = [id(p) for p in small.parameters()]
    head.weight = words.weight
    assert before == [id(p) for p in small.parameters()]
    words.weight.requires_grad = False
    assert not any(p.requires_grad for end in (words, head) for name, p in end.named_parameters() if "bias" not in name)
    head.bias = nn.Parameter(torch.ones(WORDS))
    assert torch.equal(head(torch.zeros(WIDTH)), torch.ones(WORDS))
    taut.save(small, done, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", base=lambda: model)
    assert torch.equal(loaded(ids()), small(ids()))
    assert len(list(loaded.parameters())) == len(list(small.parameters()))
