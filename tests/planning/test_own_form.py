"""Layers that nothing changed get their own form back; what a refit moved stays plain, as its plan says."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from transformers.pytorch_utils import Conv1D

import taut
from taut.planning.plain_form import idle_forms, in_own_form, in_plain_form


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        y = self.first(x)
        if hasattr(self, "a"):
            y = self.a(y, y, y)[0]
        if hasattr(self, "rnn"):
            y = self.rnn(y)[0]
        if hasattr(self, "w"):
            y = y @ self.w
        if hasattr(self, "heads"):
            y = torch.einsum("btc,hcd->bthd", y, self.heads).flatten(2)
        if hasattr(self, "qkv"):
            q, k, v = (F.linear(y, part) for part in self.qkv.weight.chunk(3))
            y = q * k + v
        return self.c(y.contiguous()) if hasattr(self, "c") else y


LAYERS = {
    "attention": lambda: {"a": nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)},
    "attention of other widths": lambda: {"a": nn.MultiheadAttention(8, 2, batch_first=True, bias=False)},
    "recurrent": lambda: {"rnn": nn.LSTM(8, 4, batch_first=True, bidirectional=True)},
    "parameter": lambda: {"w": nn.Parameter(torch.randn(8, 6))},
    "parameter of three axes": lambda: {"heads": nn.Parameter(torch.randn(2, 8, 3))},
    "weight in parts": lambda: {"qkv": nn.Linear(8, 24)},
    "linear of another class": lambda: {"c": Conv1D(6, 8)},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_go_back(kind):
    torch.manual_seed(0)
    model, x = Net(first=nn.Linear(8, 8), **LAYERS[kind]()).eval(), torch.randn(2, 3, 8)
    base, _, exact = in_plain_form(model, taut.trace(model, x))
    refitted = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in refitted.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert idle_forms(base, base, exact, ()) == exact
    assert bool(idle_forms(refitted, base, exact, ())) is (kind == "recurrent")
    own = in_own_form(refitted, model, exact)
    torch.testing.assert_close(own(x), refitted(x), rtol=1e-5, atol=1e-6)
    assert {name: t.shape for name, t in own.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert not torch.allclose(own(x), model(x), rtol=1e-2)
    assert not idle_forms(_cut(refitted), base, exact, ())


def _cut(model):
    """With a chain in the place of the first layer inside of a plain form."""
    made = copy.deepcopy(model)
    name = next(n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n != "first" and "states" not in n)
    if name == "qkv":
        name = "qkv.weight.1"
    old = made.get_submodule(name)
    chain = nn.Sequential(nn.Linear(old.in_features, 2, bias=False), nn.Linear(2, old.out_features))
    made.set_submodule(name, chain)
    return made


def test_computed_weights_stay_plain_where_a_refit_moved_them():
    model, x = (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()).eval(),
        torch.randn(2, 8),
    )
    base, _, exact = in_plain_form(model, taut.trace(model, x))
    assert idle_forms(base, base, exact, ()) == exact
    refitted = copy.deepcopy(base)
    with torch.no_grad():
        refitted[0].weight.add_(1)
    assert not idle_forms(refitted, base, exact, ())


def test_compressed_with_data(tmp_path):
    def build():
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        return Net(first=first, c=Conv1D(2, 8)).eval()

    model, x = build(), torch.randn(64, 3, 8)
    result = taut.compress(model, x[:4], budget={"params": 0.9}, data=[x], methods=["svd"], compare=False)
    assert type(result.model.c) is nn.Linear  # the refit moved it
    assert ("c",) in {step.layers for step in result.plan.steps if step.method == "as_linear"}
    again = taut.apply(model, result.plan, taut.observe(taut.trace(model, x[:4]), model, [x]), data=[x])
    torch.testing.assert_close(again(x), result.model(x))
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", build)(x), result.model(x))
