"""Which channels go together: tiny nets whose answer is known, and the narrower net against the silenced one."""

import pytest
import torch
from torch import nn

import taut
from cases import untouched
from structure import staying, wired
from structure.silencing import halves, narrow, silenced
from structure.wired import Net, draw, settled
from taut.core.example import Example
from taut.core.modes import quiet
from taut.core.tensors import map_tensors
from taut.structure.channels.groups import coupled
from taut.structure.surgery import clone

OUTPUT = "they reach the model's output"


def found_in(model, *inputs):
    """Group -> how many channels, and its members as layer.end x indices per channel; and what stays."""
    value = inputs[0] if len(inputs) == 1 else inputs
    model.eval()
    with untouched(model), quiet():
        coupling = coupled(model, Example(model, value))
    groups = {
        group.name: (group.size, " ".join(sorted(_member(member) for member in group.members)))
        for group in coupling.groups
    }
    return groups, dict(coupling.stays)


def _member(member):
    times = member.index.shape[1]
    return f"{member.layer}.{member.end}" + (f"*{times}" if times > 1 else "")


def assert_cuts_are_silence(model, *inputs):
    """In float64 the narrower net gives exactly what the wide one gives without these channels."""
    value = inputs[0] if len(inputs) == 1 else inputs
    example = Example(model, value)
    with quiet():
        groups = coupled(model.eval(), example).groups
    wide = clone(model).double()
    probe = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example.value)
    assert groups
    with torch.no_grad():
        for gone in halves(groups):
            small = narrow(wide, groups, gone)
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in wide.parameters())
            wanted = example.run(silenced(wide, groups, gone), probe)
            torch.testing.assert_close(example.run(small, probe), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", wired.KNOWN)
def test_known_groups_and_what_a_cut_computes(build):
    net, x, wanted = build()
    groups, stays = found_in(net, x)
    assert groups == wanted
    assert OUTPUT in stays.values()
    assert_cuts_are_silence(net, x)


@pytest.mark.parametrize("build", [wired.encoder_layer, wired.group_norm])
def test_norms_over_channels_run(build):
    """What is left is normalized without what is gone, so that the values differ."""
    net, x, *_ = build()
    example = Example(net.eval(), x)
    with quiet():
        groups = coupled(net, example).groups
    with torch.no_grad():
        for gone in halves(groups):
            assert example.run(narrow(net, groups, gone)).isfinite().all()


@pytest.mark.parametrize("sizes", [(2, 3, 6), (6,)])
def test_layer_norm_goes_along(sizes):
    net = Net(lambda s, x: s.c(s.n(s.a(x))), a=nn.Linear(6, 8), n=settled(nn.LayerNorm(8)), c=nn.Linear(8, 3))
    x = draw(*sizes)
    groups, _ = found_in(net, x)
    assert groups == {"a": (8, "a.out c.in n.through")}
    with torch.no_grad():
        small = narrow(net, *_halved(net, x))
    assert small.n.normalized_shape == (4,)
    assert small(x).shape == (*sizes[:-1], 3)


def _halved(net, x):
    with quiet():
        groups = coupled(net, Example(net, x)).groups
    return groups, halves(groups)[-1]


def test_an_encoder_layer_loses_inner_neurons_and_nothing_that_attention_reads():
    net, x = wired.encoder_layer()
    groups, stays = found_in(net, x)
    assert groups == {"linear1": (12, "linear1.out linear2.in")}
    assert set(stays) == {"linear2"}


def test_where_concatenated_channels_are_read():
    net, x, _ = wired.concatenation()
    with quiet():
        first, second = coupled(net, Example(net, x)).groups
    (reader,) = second.of("in")
    assert reader.index.flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert (reader.width, first.of("in")[0].width) == (10, 10)
    assert [len(group.of("out", "in")) for group in (first, second)] == [2, 2]


def test_where_flattened_channels_are_read():
    for build, wanted in ((wired.sequential, [4, 5, 6, 7]), (wired.channels_last_flattened, [1, 7, 13, 19])):
        net, x, _ = build()
        with quiet():
            group = coupled(net.eval(), Example(net, x)).groups[-1]
        assert group.of("in")[0].index[1].tolist() == wanted


# What stays, and why.


FIXED = "fixed width in '{}'"
MIXES = "the operation '{}' mixes these channels"
STAYS = (
    (staying.both_reach_the_output, {}, {"a": OUTPUT}),
    (staying.fixed_parts, {}, {"a": "takes some of them by their place ('split_with_sizes')"}),
    (staying.sliced, {}, {"a": "takes some of them by their place ('slice')"}),
    (staying.picked, {}, {"a": "takes some of them by their place ('index')"}),
    (staying.written_into_a_buffer, {}, {"a": FIXED.format("copy_")}),
    (wired.zero_padded_shortcut, wired.zero_padded_shortcut()[2], {"b": FIXED.format("constant_pad_nd")}),
    (staying.tied, {}, {"embed": "shares a parameter with another", "mid": "shares a parameter with another"}),
    (staying.recurrent, {}, {"a": "they are read by 'rnn', a LSTM, which is not made narrower"}),
    (staying.used_by_other_code, {}, {"a": "other code uses a parameter of 'a'"}),
    (staying.scale_of_its_own, {}, {"a": FIXED.format("mul")}),
    (staying.softmax_over_them, {}, {"a": MIXES.format("_softmax")}),
    (staying.mean_over_them, {}, {"a": MIXES.format("mean")}),
    (staying.functional_convolution, {}, {"a": MIXES.format("convolution")}),
    (staying.grouped_transposed, {}, {"a": "'middle' is a grouped transposed convolution"}),
    (staying.weight_normed, {}, {"a": MIXES.format("convolution")}),
    (staying.normalized_on_several_axes, {}, {"a": "'middle' normalizes several axes at once"}),
    (staying.forward_of_its_own, {}, {"a": MIXES.format("convolution")}),
    (staying.rolled, {}, {"a": MIXES.format("roll")}),
    (staying.windows, {}, {"a": MIXES.format("unfold")}),
    (staying.all_at_once, {"g": (4, "c.in*3 g.out*3")}, {"a": "they can only go all at once"}),
    (
        staying.across_positions,
        {"mix": (8, "head.in mix.out")},
        {"stem": "'mix' computes across the axis on which they lie"},
    ),
    (staying.queries_and_keys, {}, {"q": "no layer reads them", "k": "no layer reads them"}),
    (staying.norm_shared_with_the_input, {}, {"a": "'n' also reads an input of fixed width"}),
    (
        staying.gated_by_one_channel,
        {"a": (8, "a.out c.in")},
        {"gate": "a single channel is spread over others in 'mul'"},
    ),
    (wired.outer_product, wired.outer_product()[2], {"a": "a single channel is spread over others"}),
)


@pytest.mark.parametrize(("build", "groups", "reasons"), STAYS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_stays_and_why(build, groups, reasons):
    net, x, *_ = build()
    found, stays = found_in(net, x)
    assert found == groups
    for layer, reason in reasons.items():
        assert reason in stays[layer]


class Choosing(nn.Module):
    """Which branch runs depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.bright, self.dark, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(8, 7), nn.Linear(7, 2)

    def forward(self, x):
        y = self.a(x)
        return self.c(self.bright(y) if x.mean() > -9 else self.dark(y))


def test_nothing_goes_where_the_example_does_not_reach_a_layer():
    groups, stays = found_in(Choosing(), draw(2, 6))
    assert groups == {}
    assert set(stays) == {"a", "bright", "c"}
    assert "the example does not reach 'dark', which may read or give any channels" in stays["a"]
    assert "'dark'" in stays["bright"]  # as wide, and read by the same layer


def test_what_no_code_names_reads_nothing():
    class Holding(nn.Module):
        """Has a layer, a norm, a slope, a parameter and a buffer as wide as its channels, and uses none."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused, self.slope = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 8), nn.PReLU(8)
            self.norm, self.gain = nn.BatchNorm1d(8), nn.Parameter(torch.ones(8))
            self.register_buffer("shift", torch.zeros(8))
            self.rest = nn.ModuleList([nn.Linear(8, 3)])

        def forward(self, x):
            return self.b(self.a(x).relu() * getattr(self, "factor", 1))

    groups, stays = found_in(Holding(), draw(2, 6))
    assert groups["a"][0] == 8
    assert set(stays) == {"b"}


def test_a_second_name_of_a_tied_weight_reads_nothing_of_its_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.embed = nn.Embedding(9, 6), nn.Embedding(9, 6)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 9)
            self.embed.weight = self.head.weight = self.shared.weight
            self.bias = self.head.bias

        def forward(self, x):
            return self.head(self.b(self.a(self.embed(x)).relu()) + 0 * len(self.shared.weight))

    groups, stays = found_in(Tied(), torch.randint(0, 9, (2, 4)))
    assert groups["a"][0] == 8
    assert "shares a parameter" in stays["embed"]
    assert "a" not in stays


def test_what_training_alone_reads_goes_along():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).relu()
            return (self.b(h), self.aux(h)) if self.training else self.b(h)

    groups, _ = found_in(Auxiliary(), draw(2, 6))
    assert "aux.in" in groups["a"][1]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_branch_on_the_sign_is_taken_both_ways(seed):
    net = Choosing()
    net = Net(lambda s, x: s.c(s.bright(s.a(x)) if x.mean() > 0 else s.dark(s.a(x))), **dict(net.named_children()))
    with quiet(seed):
        (first, second), stays = found_in(net, draw(2, 6) + 3)[0].values(), found_in(net, draw(2, 6) + 3)[1]
    assert first == (8, "a.out bright.in dark.in")
    assert second == (7, "bright.out c.in dark.out")
    assert set(stays) == {"c"}


def test_a_branch_that_only_other_inputs_take_counts_too():
    """Beside the example the net runs on noise, whose mean is not above one here."""
    net = Choosing()
    way = lambda s, x: s.c(s.bright(s.a(x)) if x.mean() > 1 else s.dark(s.a(x)).flip(1))  # noqa: E731
    net = Net(way, a=net.a, bright=net.bright, dark=net.dark, c=net.c)
    groups, stays = found_in(net, draw(2, 6) + 3)
    assert groups == {"a": (8, "a.out bright.in dark.in"), "bright": (7, "bright.out c.in dark.out")}
    assert set(stays) == {"c"}


@pytest.mark.parametrize("build", [wired.sequential, wired.fused_attention, wired.u_net])
def test_the_same_answer_twice(build):
    net, x, _ = build()
    example = Example(net.eval(), x)
    with quiet():
        first, second = (coupled(net, example).groups for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert one.name == two.name
        assert all(torch.equal(a.index, b.index) for a, b in zip(one.members, two.members, strict=True))


class Glancing(nn.Module):
    """Looks at a layer's parameters, and uses them or does not."""

    def __init__(self, look):
        super().__init__()
        self.a, self.b, self.c, self.look = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), look

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        seen = self.look(self.b, x)
        return self.c(x + seen if isinstance(seen, torch.Tensor) and seen.ndim else x)


GLANCES = {
    "type": lambda b, _: b.weight.data.dtype,
    "detached": lambda b, _: b.weight.detach().dtype,
    "turned": lambda b, _: (b.weight.T.shape, b.weight.t().dtype),
    "state dict": lambda b, _: [v.dtype for v in b.state_dict().values()] and None,
    "new zeros": lambda b, _: b.weight.new_zeros(3).dtype,
    "zeros like": lambda b, _: torch.zeros_like(b.bias) is None,
}

USES = {
    "detached": lambda b, x: x @ b.weight.detach(),
    "turned": lambda b, x: nn.functional.linear(x, b.weight.t()),
    "turned twice": lambda b, x: x @ b.weight.t().detach().t(),
    "as a layer's input": lambda b, x: b(b.weight.detach()).sum() * x,
}


@pytest.mark.parametrize("glance", GLANCES)
def test_a_look_at_a_parameter_without_its_values_holds_nothing(glance):
    model, x = Glancing(GLANCES[glance]).eval(), torch.randn(5, 6)
    reach = taut.inspect(model, x).layers[1]
    assert reach.outputs == (8, 8), reach.pinned
    assert reach.blocked in {None, "no rank makes it smaller"}, reach.blocked


@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_parameter_s_values_holds_its_channels(use):
    model, x = Glancing(USES[use]).eval(), torch.randn(5, 6)
    assert taut.inspect(model, x).layers[1].outputs[0] == 0
