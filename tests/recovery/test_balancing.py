"""Balancing: the same function, factors of one norm, and nothing else touched."""

import torch
from torch import nn

from taut.recovery.balancing import balance


def chain():
    return nn.Sequential(
        nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(5, 8, 1), nn.ReLU()
    )


def scaled(model, *scales):
    with torch.no_grad():
        for layer, scale in zip(model, scales, strict=False):
            layer.weight.mul_(scale)
    return model


def test_factors_get_one_norm_and_compute_the_same():
    model = nn.Sequential(scaled(chain(), 1e-3, 10.0, 300.0), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    x, outer = torch.randn(2, 4, 6, 6), model[2].weight.clone()
    before = model(x)
    balance(model)
    norms = [float(layer.weight.detach().norm()) for layer in model[0][:3]]
    assert max(norms) / min(norms) < 1.0001
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model[2].weight, outer)


def test_what_is_not_a_bare_chain_is_left_alone():
    tied = nn.Linear(4, 4, bias=False)
    frozen, hooked, zero = (scaled(chain(), 1e-3, 10.0) for _ in range(3))
    frozen[1].weight.requires_grad_(requires_grad=False)
    hooked[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        zero[1].weight.zero_()
    biased = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    models = (nn.Sequential(tied, tied), nn.Sequential(tied, nn.ReLU(), nn.Linear(4, 2)), hooked, zero, biased)
    for model in models:
        state = {name: t.clone() for name, t in model.state_dict().items()}
        balance(model)
        changed = [name for name, t in model.state_dict().items() if not torch.equal(t, state[name])]
        assert changed == []
    balance(frozen)
    assert float(frozen[1].weight.norm()) > 10 * float(frozen[0].weight.norm())
