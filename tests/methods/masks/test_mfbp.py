"""MFBP: H of whole nets against an independent factorization, the links, the scores, the rules of the sources."""

import copy
import itertools

import pytest
import torch
from torch import nn

import taut
from cases import case, sequential
from taut import CallError, Plan
from taut.core.example import Example
from taut.decompose.trifactor import Relation, signed
from taut.methods.masks.mfbp import MFBP


def chain(*widths, seed=0):
    torch.manual_seed(seed)
    layers = {}
    for place, (a, b) in enumerate(itertools.pairwise(widths)):
        layers |= {f"fc{place}": nn.Linear(a, b, dtype=torch.float64), f"act{place}": nn.ReLU()}
    return sequential(**layers)


def looked(model, example, **settings):
    network = taut.trace(model, example)
    places = {layer.name: layer.name for layer in network.layers if layer.skip is None}
    method, factors = MFBP(**settings).look(model, Example(model, example), places)
    return method, factors.scores, {name: model.get_submodule(name) for name in places}


def test_the_chain_is_factorized_at_once():
    net = chain(12, 20, 16, 4)
    method, _, modules = looked(net, torch.randn(2, 12, dtype=torch.float64), rank=3)
    relations = [Relation.of(str(i), str(i + 1), net[2 * i].weight.detach().mT) for i in range(3)]
    wanted = signed(relations, dict.fromkeys("0123", 3))
    for place, H in enumerate(method.reconstructions(modules)):
        torch.testing.assert_close(H.mT[None], wanted.compose(place), rtol=1e-6, atol=1e-8)


def test_full_rank_reconstructs_every_layer():
    model, example = case("vgg").make()
    method, _, modules = looked(model, example, rank=1000)
    for H, module in zip(method.reconstructions(modules), modules.values(), strict=True):
        torch.testing.assert_close(H, module.weight.detach(), rtol=1e-4, atol=1e-5)


def test_a_kernel_offset_is_a_relation_and_a_flatten_gives_one_per_position():
    model, example = case("vgg").make()
    method, _, modules = looked(model, example, rank=2)
    assert method.links == [0, 1, 1, 2, 2, 3]
    H1, H2, H3 = method.reconstructions(modules)
    # one basis of rank 2 for conv2's outputs serves conv2 and the linear layer behind the flatten
    joined = torch.cat([H2.permute(0, 1, 2, 3).flatten(1), H3.reshape(10, 24, 4).transpose(0, 1).flatten(1)], 1)
    assert torch.linalg.matrix_rank(joined, rtol=1e-4) == 2
    assert torch.linalg.matrix_rank(torch.cat([H1.flatten(1), H2.transpose(0, 1).flatten(1)], 1), rtol=1e-4) == 2


def test_depthwise_weights_are_their_own_reconstruction():
    torch.manual_seed(0)
    net = sequential(a=nn.Conv1d(4, 6, 3), b=nn.Conv1d(6, 6, 3, groups=6), c=nn.Conv1d(6, 6, 1, groups=2))
    method, _, modules = looked(net, torch.randn(2, 4, 12), rank=1)
    Ha, Hb, Hc = method.reconstructions(modules)
    assert torch.equal(Hb, net.b.weight.detach())
    assert not torch.allclose(Ha, net.a.weight)
    for group in Hc.reshape(2, 3, 3):
        assert torch.linalg.matrix_rank(group, rtol=1e-4) == 1


def test_planted_structure_survives_noise_that_magnitude_keeps():
    """Weights of low rank under noise: the score with H keeps the planted ones."""
    torch.manual_seed(0)
    net = chain(40, 40, 40, 40)
    planted = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            rows = torch.randperm(40)[:8]
            columns = torch.randperm(40)[:8]
            clean = torch.zeros(40, 40, dtype=torch.float64)
            clean[rows[:, None], columns] = 1.5 * torch.randn(8, 1).double() @ torch.randn(1, 8).double()
            layer.weight.data = clean + 0.5 * torch.randn(40, 40)
            planted.append(clean != 0)
    network = taut.trace(net, torch.randn(2, 40, dtype=torch.float64))
    stats = taut.observe(network, net)
    hits = {}
    for method, settings in (("mfbp", {"rank": 2, "score": "product"}), ("magnitude", {})):
        small = taut.apply(net, Plan((taut.whole(network, method, sparsity=0.96, **settings),)), stats)
        kept = [m.weight != 0 for m in small if isinstance(m, nn.Linear)]
        hits[method] = sum(int((k & p).sum()) for k, p in zip(kept, planted, strict=True)) / sum(
            int(k.sum()) for k in kept
        )
    assert hits["mfbp"] > hits["magnitude"] + 0.05


def test_the_sources_rule_wipes_an_output_layer_that_is_reproduced():
    net = chain(30, 40, 40, 5)
    network = taut.trace(net, torch.randn(2, 30, dtype=torch.float64))
    stats = taut.observe(network, net)
    small = taut.apply(net, Plan((taut.whole(network, "mfbp", sparsity=0.5, score="residual", rank=20),)), stats)
    kept = [float((m.weight != 0).double().mean()) for m in small if isinstance(m, nn.Linear)]
    assert kept[2] < 0.5 * kept[0]


@pytest.mark.parametrize("solver", ["signed", "dfmf"])
def test_two_runs_prune_the_same(solver):
    net = chain(30, 40, 20)
    network = taut.trace(net, torch.randn(2, 30, dtype=torch.float64))
    step = taut.whole(network, "mfbp", sparsity=0.5, solver=solver)
    first, second = (taut.apply(net, Plan((step,)), taut.observe(network, net)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_all_zero_matrices_are_finite():
    net = chain(10, 12, 8, 4)
    for parameter in net.parameters():
        parameter.data.zero_()
    method, scores, modules = looked(net, torch.randn(2, 10, dtype=torch.float64))
    assert all(bool((s == -torch.inf).all()) for s in scores)
    assert all(bool(torch.isfinite(H).all()) for H in method.reconstructions(modules))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "magnitude"}, "score"),
        ({"solver": "newton"}, "solver"),
        ({"rank": 0}, "rank"),
        ({"links": [0, 1, 2]}, "links"),
        ({"links": [0, 1, 1, 1]}, "links"),
        ({"links": [0, 1, 2, 0]}, "links"),
    ],
)
def test_bad_settings_are_named(settings, said):
    net = chain(10, 12, 8)
    with pytest.raises(CallError, match=said):
        looked(net, torch.randn(2, 10, dtype=torch.float64), **settings)


def test_the_links_stand_in_the_plan():
    net = chain(10, 12, 8)
    network = taut.trace(net, torch.randn(2, 10, dtype=torch.float64))
    _, plan = taut.planning.application.apply_plan(
        net, Plan((taut.whole(network, "mfbp", sparsity=0.5),)), taut.observe(network, net)
    )
    assert plan.steps[0].settings["links"] == [0, 1, 1, 2]
    assert Plan.from_json(plan.to_json()) == plan
    again = taut.apply(net, plan, taut.observe(network, net))
    assert copy.deepcopy(again)(torch.randn(2, 10, dtype=torch.float64)).shape == (2, 8)
