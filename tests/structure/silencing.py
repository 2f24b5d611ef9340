"""What a narrower net should compute: what the wide one does with zeros in the weights around what goes."""

import torch
from torch import nn

from taut.methods.narrow_layers import slim
from taut.structure.channels.cuts import cuts_of
from taut.structure.surgery import clone, replace

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def silenced(model, groups, gone):
    """The wide net with zeros in the weights that read or give the channels that go: what is meant by a cut."""
    wide = clone(model)
    for group, index in zip(groups, gone, strict=True):
        for member in group.members if len(index) else ():
            module = wide.get_submodule(member.layer)
            places = member.index[index].flatten().tolist()
            with torch.no_grad():
                for place in places:
                    if member.end == "in":
                        _column(module, place).zero_()
                    elif member.end == "out":
                        _row(module, place).zero_()
                        if getattr(module, "bias", None) is not None:
                            module.bias[place] = 0
    return wide


def _column(module, place):
    """All weights that meet input channel `place`."""
    if isinstance(module, TRANSPOSED):
        return module.weight[place]
    groups = getattr(module, "groups", 1)
    per_group, rows = module.weight.shape[1], len(module.weight) // groups
    start = place // per_group * rows
    return module.weight[start : start + rows, place % per_group]


def _row(module, place):
    swapped = isinstance(module, TRANSPOSED | nn.Embedding)
    return module.weight[:, place] if swapped else module.weight[place]


def narrow(model, groups, gone):
    small = clone(model)
    for name, cut in cuts_of(small, groups, gone).items():
        replace(small, name, slim(small.get_submodule(name), cut))
    return small


def halves(groups):
    """Every group without half of its channels alone, and all groups at once."""
    half = [torch.arange(group.size)[group.size % 2 :: 2] for group in groups]
    none = torch.zeros(0, dtype=torch.int64)
    alone = [[half[i] if i == place else none for i in range(len(groups))] for place in range(len(groups))]
    return [*alone, half]
