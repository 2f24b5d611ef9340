"""Channels that go, silenced in place: on whatever device the weights are."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from taut.structure.channels.cuts import silence
from taut.structure.channels.groups import ChannelGroup, Member

GIVING = {
    "linear": lambda device: nn.Linear(3, 4, device=device),
    "conv": lambda device: nn.Conv2d(3, 4, 3, bias=False, device=device),
    "transposed": lambda device: nn.ConvTranspose2d(3, 4, 2, device=device),
    "embedding": lambda device: nn.Embedding(9, 4, device=device),
}


def silenced(layer):
    """The second and the last of four channels go."""
    group = ChannelGroup("0", (Member("0", "out", torch.arange(4)[:, None], 4),))
    assert silence(nn.Sequential(layer), [group], [torch.tensor([1, 3])]) == []
    return layer


@pytest.mark.parametrize("kind", GIVING)
def test_what_a_layer_gives_there_is_zero(kind):
    layer = silenced(GIVING[kind]("cpu"))
    if kind == "embedding":
        y = layer(torch.arange(9))
    else:
        y = layer(torch.randn(2, 3) if kind == "linear" else torch.randn(2, 3, 5, 5))
    y = y.transpose(0, 1)
    assert not y[[1, 3]].any()
    assert y[[0, 2]].flatten(1).any(1).all()


@pytest.mark.parametrize("kind", GIVING)
def test_weights_on_another_device(kind):
    """Tensors without values, which refuse an index of another device as those of an accelerator do."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert silenced(GIVING[kind]("meta")).weight.device.type == "meta"
