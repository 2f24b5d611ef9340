"""Batch norms with a forward of their own, as timm's BatchNormAct2d: narrower with the layers around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import taut
from cases import sequential

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class NormAct(nn.BatchNorm2d):
    """A norm and an activation in one."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.act = act()

    def forward(self, x):
        y = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(y)


class Mixing(nn.BatchNorm2d):
    """No norm channel by channel."""

    def forward(self, x):
        return super().forward(x).softmax(1)


def net(norm):
    torch.manual_seed(0)
    model = sequential(
        a=nn.Conv2d(3, 16, 3),
        norm=norm(16),
        b=nn.Conv2d(16, 16, 3),
        norm2=norm(16),
        pool=nn.Flatten(),
        c=nn.Linear(64, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
def test_they_become_narrower(act, tmp_path):
    def build():
        return net(lambda channels: NormAct(channels, act))

    model = build()
    result = taut.compress(model, X, budget=taut.Budget(macs=0.5), data=[X], methods=("channels",), compare=False)
    norm = result.model.norm
    assert type(norm) is NormAct
    assert norm.num_features == len(norm.weight) == len(norm.running_var) == result.model.a.out_channels < 16
    assert len(model.norm.weight) == 16
    result.save(tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=build)(X), result.model(X))


def test_what_mixes_channels_keeps_them():
    model = net(Mixing)
    with pytest.warns(UserWarning, match="batch and instance norms"), pytest.raises(taut.BudgetError) as raised:
        taut.compress(model, X, budget=taut.Budget(macs=0.5), data=[X], methods=("channels",), compare=False)
    best = raised.value.best.model
    assert best.a.out_channels == best.b.out_channels == 16
    torch.testing.assert_close(best(X), model(X))


def test_a_norm_with_tensors_beside_is_no_such_norm():
    class Scaled(NormAct):
        def __init__(self, channels):
            super().__init__(channels)
            self.scale = nn.Parameter(torch.ones(channels))

    skip = taut.trace(net(Scaled), X)["norm"].skip
    assert skip == "normalization has nothing to factorize"
