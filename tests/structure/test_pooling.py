"""What calibration says of experts: of the rows that were sent to each, and of the others where these are few."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from taut.decompose.outputs import squared_error
from taut.structure import observation
from taut.structure.patches import grouped_weight
from taut.structure.pooling import pooled_statistics
from taut.types import Group

COUNT, C, N = 4, 16, 24


class Experts(nn.Module):
    """The first input says which expert a row is sent to; as transformers' Mixtral does, one after the other."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT, N, C) / C**0.5)
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        chosen, y = x[:, 0].round().long().clamp(0, COUNT - 1), x.new_zeros(len(x), N)
        for number in range(COUNT):
            rows = torch.where(chosen == number)[0]
            if len(rows):
                y = y.index_add(0, rows, F.linear(x[rows], self.up[number]))
        return self.head(y)


def rows(counts, seed):
    """Inputs of which so many go to each expert, in a random order."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.repeat_interleave(torch.arange(COUNT), torch.tensor(counts))
    x = torch.randn(len(chosen), C, generator=random) * torch.logspace(0, -2, C)
    x[:, 0] = chosen
    x[:, 1] += chosen / 2  # experts get rows of their own
    return x[torch.randperm(len(x), generator=random)]


def observed(counts, seed=0):
    """The statistics of the experts' layers, from rows of which so many go to each; the example reaches all."""
    torch.manual_seed(0)
    model, example = Experts().eval(), rows([1] * COUNT, 7)
    step = taut.Step(("up",), "as_layer")
    net = taut.trace(model, example)
    base = taut.apply(model, taut.Plan.of(net, [step]), taut.observe(net, model))
    net = taut.trace(base, example)
    return taut.observe(net, base, rows(counts, seed))


def test_moments_are_of_the_rows_that_were_sent_to_each():
    counts = [400, 60, 350, 200]
    stats, x = observed(counts), rows(counts, 0)
    for number, count in enumerate(counts):
        mine = x[x[:, 0] == number]
        found = stats.layers[f"up.{number}"]
        assert found.positions == pytest.approx(count / len(x), rel=0.1)
        wanted = mine.T @ mine / len(x)
        if count > 150:
            torch.testing.assert_close(found.weighting.full[0], wanted, rtol=0.1, atol=0.05 * float(wanted.max()))


def truth(number):
    x = rows([5000 * (number == k) for k in range(COUNT)], 5)
    return x.T @ x / len(x)


def fresh_loss(stats, number, rank):
    """What the low rank that statistics ask for loses on many other rows."""
    name, method = f"up.{number}", taut.methods.METHODS["svd"](rank=rank)
    group = Group((stats.network[name],))
    W = stats.modules[name].weight.detach()
    small = method.rewrite({name: stats.modules[name]}, stats.factors(group, method)).modules[name]
    dW = W - small[1].weight.detach() @ small[0].weight.detach()
    return float((dW @ truth(number) * dW).sum())


def test_an_expert_of_few_rows_loses_less_on_others(monkeypatch):
    own, pooled = [], []
    for seed in range(2):
        counts = [300, 4, 300, 200]
        pooled.append(fresh_loss(observed(counts, seed), 1, 4))
        with monkeypatch.context() as patch:
            patch.setattr(observation, "pooled_statistics", lambda model, layers, samples: layers)
            own.append(fresh_loss(observed(counts, seed), 1, 4))
    assert sum(pooled) < sum(own)


def test_an_expert_that_no_row_reached_is_taken_for_one_as_the_others():
    stats = observed([300, 0, 300, 200])
    damages = []
    for number in range(COUNT):
        name, method = f"up.{number}", taut.methods.METHODS["svd"](rank=1)
        damages.append(stats.damage(Group((stats.network[name],)), method))
    assert damages[1] > 0.2 * sum(damages) / COUNT
    assert stats.layers["up.1"].positions == pytest.approx(200 / 800, rel=0.1)
    assert fresh_loss(stats, 1, 4) < 0.3 * float(
        (stats.modules["up.1"].weight @ truth(1) * stats.modules["up.1"].weight).sum()
    )


def test_gradients_held_as_rows_are_pooled_too(monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.LIMIT", 4)
    stats = observed([300, 0, 300, 200])
    for number in range(COUNT):
        assert stats.layers[f"up.{number}"].outputs.rows is not None
    sizes = [float(stats.layers[f"up.{number}"].outputs.diagonal().sum()) for number in range(COUNT)]
    assert sizes[1] > 0.2 * sum(sizes) / COUNT


def test_layers_that_all_get_the_same_rows_stay_apart():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, N, C))

        def forward(self, x):
            q, k, v = (F.linear(x, self.w[number]) for number in range(3))
            return q * k.sigmoid() + v

    model, x = Heads().eval(), torch.randn(32, C)
    net = taut.trace(model, x)
    base = taut.apply(model, taut.Plan.of(net, [taut.Step(("w",), "as_layer")]), taut.observe(net, model))
    stats = taut.observe(taut.trace(base, x), base, x)
    assert pooled_statistics(base, stats.layers, 32) == stats.layers


class Batched(Experts):
    """The same in one batch, where rows of other experts are zero."""

    def forward(self, x):
        chosen = x[:, 0].round().long().clamp(0, COUNT - 1)
        mine = F.one_hot(chosen, COUNT).T[..., None]
        return self.head(torch.bmm(x * mine, self.up.mT).sum(0))


def test_matrices_of_one_layer_learn_from_each_other():
    torch.manual_seed(0)
    counts, model, x = [300, 0, 300, 60], Batched().eval(), rows([1] * COUNT, 7)
    net = taut.trace(model, x)
    base = taut.apply(model, taut.Plan.of(net, [taut.Step(("up",), "as_layer")]), taut.observe(net, model))
    data = rows(counts, 0)
    stats = taut.observe(taut.trace(base, x), base, data)
    A = stats.layers["up.0"].weighting.full
    for number in (0, 2):
        mine = data[data[:, 0] == number]
        wanted = mine.T @ mine / len(data)
        torch.testing.assert_close(A[number], wanted, rtol=0.1, atol=0.05 * float(wanted.max()))
    mean = (A[0] + A[2] + A[3]) * len(data) / sum(counts)
    torch.testing.assert_close(A[1] / A[1].trace(), mean / mean.trace(), rtol=0.1, atol=0.02)
    assert A[1].trace() > 0.2 * A.diagonal(dim1=1, dim2=2).sum() / COUNT


class Gated(nn.Module):
    """Experts whose outputs are weighted by a router, in one batch or one after the other: 0 of rows of others."""

    def __init__(self, *, batched):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.batched = nn.Parameter(torch.randn(COUNT, N, C) / C**0.5), batched
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        mine = F.one_hot(x[:, 0].round().long().clamp(0, COUNT - 1), COUNT).T[..., None]
        if self.batched:
            return self.head((torch.bmm(x * mine, self.up.mT) * mine).sum(0))
        y = x.new_zeros(len(x), N)
        for number in range(COUNT):
            rows = torch.where(mine[number, :, 0] == 1)[0]
            if len(rows):
                y = y.index_add(0, rows, F.linear(x[rows], self.up[number]))
        return self.head(y)


def stacked(counts, *, batched=True):
    """The layers of the experts, and what was observed of them."""
    model, x = Gated(batched=batched).eval(), rows([1] * COUNT, 7)
    net = taut.trace(model, x)
    base = taut.apply(model, taut.Plan.of(net, [taut.Step(("up",), "as_layer")]), taut.observe(net, model))
    return taut.observe(taut.trace(base, x), base, rows(counts, 0))


def wiped(stats, number):
    """What it costs by the statistics that all weights of an expert are zero."""
    batched = len(stats.network["up.0"].weight) > 2
    name = "up.0" if batched else f"up.{number}"
    known, dW = stats.layers[name], grouped_weight(stats.modules[name]).detach().clone()
    dW[[k for k in range(len(dW)) if batched and k != number]] = 0
    return float(known.damage(squared_error(known.weighting, dW, known.outputs), 0.0))


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("counts", [[200, 0, 200, 60], [200, 200, 200, 200]])
def test_matrices_of_one_layer_cost_what_they_do_apart(counts, limit, monkeypatch):
    monkeypatch.setattr("taut.structure.collecting.ENOUGH", 2)  # no estimates from held-out rows
    if limit is not None:  # gradients are held as rows
        monkeypatch.setattr("taut.structure.collecting.LIMIT", limit)
    together, apart = (
        [wiped(stats, number) for number in range(COUNT)] for stats in (stacked(counts), stacked(counts, batched=False))
    )
    assert together == pytest.approx(apart, rel=0.02)


def test_a_stack_of_which_no_row_reaches_one_has_a_low_rank():
    stats = stacked([300, 0, 200, 60])
    for metric in ("fisher", "data"):
        method = taut.methods.METHODS["svd"](rank=4, metric=metric)
        factors = stats.factors(Group((stats.network["up.0"],)), method)
        built = method.rewrite({"up.0": stats.modules["up.0"]}, factors).modules["up.0"]
        assert all(bool(part.weight.isfinite().all()) for part in built)
