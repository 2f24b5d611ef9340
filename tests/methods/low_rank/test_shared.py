"""Shared bases: one Parameter per type of channels, sizes by the network-wide equation, exactness by planted nets."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from cases import case, macs, run, sequential
from taut import CallError, Plan, Step
from taut.decompose.sharing import Term, share_bases
from taut.decompose.sizing import numbers, thrifty
from taut.decompose.trifactor import Relation
from taut.decompose.weighting import Weighting
from taut.methods.low_rank.shared import Shared
from taut.nn import Basis
from taut.planning.application import apply_plan


class Residual(nn.Module):
    """Strides, dilation, a sum that three layers feed, a flatten with 16 features a channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, stride=2)
        self.a = nn.Conv2d(12, 10, 3, padding=2, dilation=2, bias=False)
        self.b = nn.Conv2d(10, 12, (1, 3), padding="same", padding_mode="reflect")
        self.fc = nn.Linear(12 * 16, 20)
        self.out = nn.Linear(20, 6)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu().flatten(1)
        return self.out(self.fc(x).relu())


LINKS = [0, 1, 1, 2, 2, 1, 1, 3, 3, 4]
"""Types of Residual: image, sum, inside, hidden, classes."""
IMAGE = (3, 8, 8)


def mlp():
    return sequential(
        a=nn.Linear(30, 40), act=nn.ReLU(), b=nn.Linear(40, 40), act2=nn.ReLU(), c=nn.Linear(40, 5, bias=False)
    )


def made(model, shape, data=True, **settings):
    """The network, its statistics, the net with shared bases and the plan."""
    x = torch.randn(2, *shape, dtype=next(model.parameters()).dtype)
    net = taut.trace(model, x)
    stats = taut.observe(net, model, [torch.randn(64, *shape).to(x)] if data else None)
    step = replace(taut.whole(net, "shared", **settings), allow_growth=True)
    small, plan = apply_plan(model, Plan.of(net, [step]), stats)
    return x, small, plan, stats


def planted(model, ranks, links):
    """The weights projected on random bases of these ranks."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    bases = {}
    for place, layer in enumerate(layers):
        W = layer.weight.data
        for axis, number in ((0, links[2 * place + 1]), (1, links[2 * place])):
            size = W.shape[axis] // (16 if axis and place == 3 and W.shape[1] == 192 else 1)
            if number not in bases:
                bases[number] = torch.linalg.qr(torch.randn(size, ranks[number]).to(W))[0]
            P = bases[number] @ bases[number].mT
            inner = W.shape[axis] // len(P)
            W = torch.tensordot(torch.kron(P, torch.eye(inner).to(W)), W.movedim(axis, 0), 1).movedim(0, axis)
        layer.weight.data = W.contiguous()
    return model


def bases_of(model):
    return [m for m in model.modules() if isinstance(m, Basis)]


def test_types_are_found_over_a_sum_and_a_flatten():
    _, small, plan, _ = made(Residual(), IMAGE, rank=4)
    assert plan.steps[0].settings["links"] == LINKS
    weights = [small.stem[-1], small.a[0], small.b[-1], small.fc[0]]
    assert all(basis.weight is weights[0].weight for basis in weights)
    assert small.fc[0].inner == 16
    assert len({id(basis.weight) for basis in bases_of(small)}) == 3


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
def test_full_rank_is_the_dense_net(data):
    model = Residual().double()
    x, small, plan, _ = made(model, IMAGE, data, share=1.0)
    assert not bases_of(small)
    assert plan.steps[0].after == replace(plan.steps[0].before)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("data", [True, False], ids=["data", "weights"])
def test_planted_bases_are_exact(data):
    ranks = [3, 5, 4, 7, 6]
    model = planted(Residual().double(), ranks, LINKS)
    x, small, _, _ = made(model, IMAGE, data, ranks=ranks)
    assert len(bases_of(small)) == 8
    for part in (x, torch.randn_like(x)):
        torch.testing.assert_close(small(part), model(part), rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
@pytest.mark.parametrize(("build", "shape"), [(Residual, IMAGE), (mlp, (30,))], ids=["residual", "mlp"])
def test_parameters_are_those_of_the_size_equation(build, shape, share):
    model = build()
    x, small, plan, _ = made(model, shape, share=share)
    (step,) = plan.steps
    biases = sum(layer.weight[0] for layer in step.group.layers if layer.bias)
    weights = step.before.params - biases
    assert step.after.params == sum(p.numel() for p in small.parameters())
    assert step.after.params - biases <= share * weights
    assert step.after.params - biases >= 0.75 * share * weights
    assert step.after.bytes == 4 * step.after.params
    assert step.after.macs * len(x) == macs(small, x)
    frame = Shared(**step.settings).frame(step.group.layers)
    ranks = {str(number): rank for number, rank in enumerate(step.settings["ranks"])}
    assert numbers(frame.named(), ranks, frame.links()) == step.after.params - biases


def test_a_basis_that_saves_nothing_is_merged():
    sizes, links = {"0": 784, "1": 20, "2": 10}, [("0", "1", 1), ("1", "2", 1)]
    assert thrifty(sizes, {"0": 5, "1": 5, "2": 5}, links) == {"0": 784, "1": 5, "2": 10}
    assert thrifty(sizes, {"0": 2, "1": 15, "2": 5}, links)["0"] == 2


def test_statistics_lower_the_output_error():
    model = mlp()
    x = torch.randn(512, 30) * torch.linspace(0.05, 2, 30)
    net = taut.trace(model, x[:2])
    step = replace(taut.whole(net, "shared", ranks=[30, 10, 10, 5]), allow_growth=True)
    error = {}
    for data in (None, [x]):
        small = taut.apply(model, Plan.of(net, [step]), taut.observe(net, model, data))
        error[data is None] = float((small(x) - model(x)).detach().square().sum())
    assert error[False] < 0.6 * error[True]


@pytest.mark.parametrize("form", ["none", "full", "channel", "sketch"])
def test_errors_are_those_of_the_weights(form):
    n, m, o = 6, 3, 8
    W = torch.randn(m, n, o).double()
    X = torch.randn(50, n, m).double()
    full = torch.einsum("rnm,rpq->nmpq", X, X)
    weighting = {
        "none": Weighting(),
        "full": Weighting(full=full.reshape(1, n * m, n * m)),
        "channel": Weighting(channel=torch.einsum("nmpm->np", full)[None]),
        "sketch": Weighting(sketch=X.flatten(1)[None]),
    }[form]
    term = Term(Relation("in", "out", W), weighting)
    found = share_bases([term], {"in": 4, "out": 5})
    H = torch.einsum("ok,kjm,nj->onm", found.bases["out"], found.cores[0], found.bases["in"])
    C = {"none": torch.eye(n * m).double(), "full": weighting.full, "sketch": full.reshape(n * m, n * m)}.get(form)
    C = torch.kron(weighting.channel[0], torch.eye(m)).double() if C is None else C.reshape(n * m, n * m)
    C = C + 1e-4 * C.diagonal().mean() * torch.eye(n * m) * (form != "none")
    dense = W.permute(2, 1, 0).flatten(1)
    wanted = [torch.trace(part @ C @ part.T) for part in (dense - H.flatten(1), dense)]
    assert found.errors[0] == pytest.approx(float(wanted[0] / wanted[1]), rel=1e-6)


def test_one_parameter_per_type_is_saved_once_and_loaded_tied(tmp_path):
    x, small, plan, _ = made(Residual().eval(), IMAGE, share=0.3)
    taut.save(small, plan, tmp_path / "small")
    loaded = taut.load(tmp_path / "small", Residual)
    assert torch.equal(loaded(x), small(x))
    assert sum(p.numel() for p in loaded.parameters()) == plan.steps[0].after.params
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size - 4 * plan.steps[0].after.params < 2000
    tied, again = ([[a.weight is b.weight for b in bases_of(net)] for a in bases_of(net)] for net in (small, loaded))
    assert tied == again


def test_a_plan_that_was_never_resolved_can_be_saved(tmp_path):
    model = Residual().eval()
    x = torch.randn(2, *IMAGE)
    net = taut.trace(model, x)
    for wish in ({"share": 0.3}, {"rank": 4}, {"rank": 9}):
        step = replace(taut.whole(net, "shared", **wish), allow_growth=True)
        plan = Plan.of(net, [step])
        small = taut.apply(model, plan, taut.observe(net, model, [torch.randn(16, *IMAGE)]))
        taut.save(small, plan, tmp_path / "small")
        loaded = taut.load(tmp_path / "small", Residual)
        assert torch.equal(loaded(x), small(x))
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.parameters())


def test_training_and_copies_keep_the_ties():
    model = mlp()
    x, _, _, stats = made(model, (30,), share=0.4)
    step = replace(taut.whole(stats.network, "shared", share=0.4), allow_growth=True)
    data = [torch.randn(32, 30) for _ in range(4)]
    schedule = (taut.Stage((0,), epochs=2, rate=1e-2),)
    tuned = taut.finetune(model, Plan.of(stats.network, [step]), stats, data, data, schedule=schedule)
    bare = taut.apply(model, Plan.of(stats.network, [step]), stats)
    for net in (tuned, copy.deepcopy(tuned)):
        assert net.a[-1].weight is net.b[0].weight
        assert net.a[-1].weight.requires_grad
    assert not torch.equal(tuned.a[-1].weight, bare.a[-1].weight)
    assert sum(p.numel() for p in tuned.parameters()) == sum(p.numel() for p in bare.parameters())
    assert run(tuned, x)[0].isfinite().all()


def test_recovery_leaves_shared_layers_alone():
    model = Residual().eval()
    x, small, plan, stats = made(model, IMAGE, share=0.3)
    again = taut.apply(model, Plan.of(stats.network, plan.steps), stats, data=[torch.randn(32, *IMAGE)])
    assert torch.equal(again(x), small(x))


def test_it_is_exported_as_it_computes(tmp_path):
    pytest.importorskip("onnxruntime")
    x, small, _, _ = made(Residual().eval(), IMAGE, share=0.3)
    assert all(parity.holds for parity in taut.export(small, x, tmp_path / "small.onnx").parity)


def test_dtypes_do_not_mix():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12).double()

        def forward(self, x):
            return self.second(self.first(x).double())

    _, small, plan, _ = made(Mixed(), (12,), rank=3)
    assert plan.steps[0].settings["links"] == [0, 1, 2, 3]
    assert {p.dtype for p in small.first.parameters()} == {torch.float32}
    assert {p.dtype for p in small.second.parameters()} == {torch.float64}
    assert plan.steps[0].after.bytes == sum(p.numel() * p.element_size() for p in small.parameters())


def test_frozen_layers_freeze_the_bases_that_they_use():
    model = mlp()
    model.a.requires_grad_(requires_grad=False)
    _, small, _, _ = made(model, (30,), rank=6)
    assert not small.b[0].weight.requires_grad
    assert small.c[0].weight.requires_grad


@pytest.mark.parametrize("name", ["resnet", "vgg", "inception", "shared", "everything", "lstm", "attention"])
def test_whole_nets(name):
    model, example = case(name).make()
    net = taut.trace(model, example)
    step = replace(taut.whole(net, "shared", share=0.5), allow_growth=True)
    small, plan = apply_plan(model, Plan.of(net, [step]), taut.observe(net, model, case(name).data()))
    assert not [kept for kept in plan.kept if "rolled back" in kept.reason]
    saved = plan.steps[0].before.params - plan.steps[0].after.params
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == saved > 0
    assert all(bool(t.isfinite().all()) for t in run(small, example))


def test_groups_are_refused():
    net = taut.trace(sequential(conv=nn.Conv1d(8, 8, 3, groups=2)), torch.randn(2, 8, 9))
    assert "grouped" in Shared().refuses(net.group(["conv"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0}, "'share' of shared must be in"),
        ({"share": 1.5}, "'share' of shared must be in"),
        ({"share": True}, "'share' of shared must be in"),
        ({"share": "a"}, "'share' of shared must be in"),
        ({"share": float("nan")}, "'share' of shared must be in"),
        ({"share": 0.001}, "rank 1 already store"),
        ({"rank": 0}, "'rank' of shared must be at least 1"),
        ({"rank": 2.0}, "'rank' of shared must be at least 1"),
        ({"rank": 2, "share": 0.5}, "not both"),
        ({"ranks": [1, 2]}, "'ranks' of shared must be a list of 4"),
        ({"ranks": [31, 2, 2, 2]}, "between 1 and 30 for type 0. Got 31"),
        ({"links": [0, 1]}, "'links' must hold two numbers for each of 3 layers"),
        ({"links": [0, 1, 1, 0, 0, 2]}, "'links' join"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(CallError, match=words):
        made(mlp(), (30,), **settings)


def test_growth_is_asked_for():
    model = sequential(conv=nn.Conv2d(8, 8, 1), act=nn.ReLU(), last=nn.Conv2d(8, 8, 1))
    net = taut.trace(model, torch.randn(2, 8, 4, 4))
    stats = taut.observe(net, model)
    with pytest.raises(CallError, match="allow_growth"):
        taut.apply(model, Plan.of(net, [Step(("conv", "last"), "shared", {"ranks": [8, 7, 8]})]), stats)
