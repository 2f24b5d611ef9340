"""Layers that are not reached: whether code may use them; what is not certain counts as used."""

import functools
import types
from collections import namedtuple

import pytest
import torch
from torch import nn

import taut
from taut.core.example import Example
from taut.structure.channels.groups import coupled
from taut.structure.channels.mentions import named_in_code

OTHER = types.ModuleType("other")
Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """Its aux and gain are used by nobody."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.gain, self.rest = nn.Parameter(torch.ones(8)), nn.ModuleList([nn.Linear(8, 2)])

    def forward(self, x):
        h = self.a(x)
        return self.b(h) if x.mean() > -9 else self.other(h)


def through(model, x):
    return model.aux(x)


class Router:
    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part(x)


class Helper:
    @staticmethod
    def route(model, x):
        return model.aux(x)


class Named(Net):
    def forward(self, x):
        return self.b(self.a(x)) if x.mean() > -9 else self.aux(self.a(x))


class Slotted:
    __slots__ = ("part",)


OTHER.route, OTHER.inner = through, types.ModuleType("inner")
OTHER.inner.route = through


def held(make):
    """A net that keeps what `make` makes of it under another name."""

    class Holding(Net):
        def __init__(self):
            super().__init__()
            self.kept = make(self)

        def other(self, x):
            return self.kept(x)

    return Holding


def coded(way):
    return type("Coded", (Net,), {"other": way})


class Beside(Net):
    other = None

    def features(self, x):
        return self.aux(self.a(x))


class Property(Net):
    @property
    def extra(self):
        return self.aux


class Cached(Net):
    @functools.cached_property
    def extra(self):
        return self.aux


def around(make):
    """A net whose code finds a part in a closure."""

    class Closing(Net):
        def __init__(self):
            super().__init__()
            part = make(self)
            self.route = lambda x: part(x + 1)

    return Closing


def slotted(net):
    slots = Slotted()
    slots.part = net.aux
    return slots


def hooked():
    net = Net()
    net.a.register_forward_hook(lambda module, args, output: net.aux(output) if args[0].mean() < -9 else None)
    return net


def replaced():
    net = Net()
    net.forward = types.MethodType(lambda self, x: self.b(self.a(x)) if x.mean() > -9 else self.aux(x), net)
    return net


NAMING = {
    "own forward": Named,
    "forward of a parent": type("Child", (Named,), {"forward": lambda self, x: super(Child, self).forward(x)}),
    "a method beside forward": Beside,
    "a property": Property,
    "a cached property": Cached,
    "a computed name": coded(lambda s, x: getattr(s, f"a{x}")(x)),
    "a name in a variable": coded(lambda s, x: [getattr(s, name)(x) for name in x]),
    "a name that is added up": coded(lambda s, x: getattr(s, "a" + x, None)(x)),
    "a constant name": coded(lambda s, x: getattr(s, "aux", None)(x)),
    "get_submodule": coded(lambda s, x: s.get_submodule(x)(x)),
    "children": coded(lambda s, x: list(s.children())[x](x)),
    "_modules": coded(lambda s, x: s._modules[x](x)),
    "a function": coded(lambda s, x: through(s, x + 1)),
    "a function of another module": coded(lambda s, x: OTHER.route(s, x + 1)),
    "a function of a module in a module": coded(lambda s, x: OTHER.inner.route(s, x + 1)),
    "a class with functions": coded(lambda s, x: Helper.route(s, x + 1)),
    "a tuple": held(lambda net: (net.aux,)),
    "a named tuple": held(lambda net: Pair(1, net.aux)),
    "a dict of lists": held(lambda net: {"a": [net.aux]}),
    "a list of the list": held(lambda net: [net.rest]),
    "a partial": held(lambda net: functools.partial(through, net)),
    "a method at hand": held(lambda net: Router(net.aux).__call__),
    "an object": held(lambda net: Router(net.aux)),
    "an object with slots": held(slotted),
    "a lambda": held(lambda net: lambda x: net.aux(x + 1)),
    "a closure": around(lambda net: net.aux),
    "a parameter in a list": held(lambda net: [net.gain]),
    "a parameter": coded(lambda s, x: x * s.gain),
    "one of a list": coded(lambda s, x: s.rest[0](x)),
    "a hook": hooked,
    "a forward of its own": replaced,
}
Child = NAMING["forward of a parent"]


@pytest.mark.parametrize("case", NAMING)
def test_what_code_may_use_keeps_the_channels(case):
    net, x = NAMING[case]().eval(), torch.rand(2, 6)
    coupling = coupled(net, Example(net, x))
    assert coupling.unreached
    assert coupling.groups == ()
    assert "the example does not reach" in coupling.stays["a"]


class Inner(nn.Module):
    """Is called, and has a gain of its own that it does not use."""

    def __init__(self):
        super().__init__()
        self.a, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.a(x).relu()


class Unused(Net):
    """Code of many kinds, none of which can find aux, gain, rest or what an inner module has."""

    def __init__(self):
        super().__init__()
        self.inner, self.slope = Inner(), nn.PReLU(8)
        self.act, self.sizes, self.settings = functools.partial(torch.relu), (1, 2), {"eps": 1e-5}
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return self.b(self.act(self.inner(self.a(x)) * getattr(self, "factor", 1)))

    def freeze(self):
        for parameter in self.parameters():
            parameter.requires_grad_(False)


def test_what_no_code_can_name_reads_nothing():
    net, x = Unused().eval(), torch.rand(2, 6)
    coupling = coupled(net, Example(net, x))
    assert coupling.unreached == ()
    assert {group.name for group in coupling.groups} == {"a", "inner.a"}


def test_the_reason_says_what_was_taken_as_unused():
    net = taut.trace(Unused().eval(), torch.rand(2, 6))
    assert "no code of the model names it" in str(net["aux"].skip)
    assert "no code" not in str(taut.trace(Beside().eval(), torch.rand(2, 6))["aux"].skip)


@pytest.mark.parametrize("wide", [16, 32, 5])
def test_a_layer_of_any_width_may_read_the_channels(wide):
    """Behind a flattening, a concatenation, a slice."""
    net, x = Named(), torch.rand(2, 6)
    net.aux = nn.Linear(wide, 3)
    assert coupled(net.eval(), Example(net, x)).groups == ()


def test_torch_names_its_own_parts():
    """Attention reads the weight of its projection, and does not call it."""
    net = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert named_in_code(net, ["0.out_proj"]) == ("0.out_proj",)


def test_compiled_code_may_name_anything():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    assert named_in_code(net, ["0.0"]) == ("0.0",)
