"""Hidden units go in coupled groups: rows of every gate, columns of what reads them, states that are handed on."""

import pytest
import torch
from torch import nn

import taut
from recurrent import NETS, Streaming, Tagger
from taut.planning.plain_form import in_plain_form
from taut.structure.channels.groups import coupled


def coupling(model, x):
    opened, net, _ = in_plain_form(model, taut.trace(model, x))
    return coupled(opened, net.example)


def seeded(name):
    make, inputs = NETS[name]
    torch.manual_seed(0)
    return make().eval(), inputs(4)


@pytest.mark.parametrize("name", NETS)
def test_every_unit_may_go_and_takes_all_its_gates_along(name):
    groups = [g for g in coupling(*seeded(name)).groups if any(".states." in m.layer for m in g.members)]
    assert sum(group.size for group in groups) == (48 if name == "recognizer" else 24)
    for group in groups:
        for member in group.members:
            if ".states." in member.layer:
                gates = member.width // 24
                assert member.index.shape == (24, gates)
                assert bool((member.index % 24 == member.index[:, :1] % 24).all())


def test_a_decoder_loses_the_units_of_its_encoder():
    (group,) = [g for g in coupling(*seeded("translator")).groups if g.size == 24]
    sides = {(m.layer, m.end): m.index for m in group.members}
    assert torch.equal(sides["encoder.states.0", "in"], sides["decoder.states.0", "in"])
    assert sides["out", "in"].shape == (24, 2)


def test_units_of_layers_and_directions_go_by_importance():
    model, x = seeded("tagger")
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(torch.arange(1.0, 25))
        model.rnn.weight_hh_l0_reverse.mul_(torch.arange(24.0, 0, -1))
        model.rnn.weight_ih_l1.zero_()
        model.rnn.weight_ih_l1_reverse.zero_()
    (group,) = [g for g in coupling(model, x).groups if g.size == 24]
    sides = {m.layer: m.index[:, 0] for m in group.members if ".states." in m.layer and m.end == "in"}
    pairs = dict(zip(sides["rnn.states.0"].tolist(), sides["rnn.states.1"].tolist(), strict=True))
    # exactly ordered weights are paired exactly the other way round, but for the noise of random columns
    assert sum(abs(pairs[unit] - (23 - unit)) for unit in pairs) < 24 * 3


def test_units_go_together_in_the_orders_that_are_given():
    model, x = seeded("tagger")
    opened, net, _ = in_plain_form(model, taut.trace(model, x))
    given = {}

    def orders(groups):
        given.update({group.members[0].layer: group.size for group in groups})
        random = torch.Generator().manual_seed(3)
        found = [torch.randperm(group.size, generator=random) for group in groups]
        for group, order in zip(groups, found, strict=True):
            for member in group.of("in"):
                if ".states." in member.layer:
                    first[member.layer] = int(member.index[order[0], 0]), int(member.index[order[-1], 0])
        return found

    first = {}
    (group,) = [g for g in coupled(opened, net.example, orders).groups if g.size == 24]
    sides = {m.layer: m.index[:, 0].tolist() for m in group.members if ".states." in m.layer and m.end == "in"}
    for place in (0, 1):
        rows = {sides[name].index(ends[place]) for name, ends in first.items()}
        assert len(rows) == 1
    assert set(first) == {f"rnn.states.{number}" for number in range(4)}


def test_states_that_reach_the_output_stay():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 10), torch.zeros(1, 4, 24), torch.zeros(1, 4, 24)
    found = coupling(Streaming().eval(), x)
    assert not found.groups
    assert found.stays["rnn.states.0"] == "they reach the model's output"


class Odd(Tagger):
    """Hands on states of another form."""

    def forward(self, words):
        first, (h, c) = self.rnn(self.embed(words))
        turned = h.flip(-1)
        return self.out(self.rnn(self.embed(words), (turned, c))[0] + first)


def test_units_that_change_places_go_together():
    torch.manual_seed(0)
    groups = [g for g in coupling(Odd().eval(), torch.randint(0, 30, (4, 6))).groups if g.size != 12]
    assert all(m.index.shape[1] % 2 == 0 for g in groups for m in g.members if m.layer == "rnn.states.0")
    for group in groups:
        inside = next(m.index for m in group.members if (m.layer, m.end) == ("rnn.states.0", "in"))
        assert bool((inside.sum(1) == 23).all())


class Sliced(nn.Module):
    """Takes units by their place."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(10, 24, bidirectional=True, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.out(y[..., :24] + y[..., 24:])


def test_units_taken_by_place_stay_with_the_reason():
    torch.manual_seed(0)
    found = coupling(Sliced().eval(), torch.randn(4, 6, 10))
    assert not found.groups
    assert "by their place" in found.stays["rnn.states.1"]


def test_narrowed_networks_compute_what_silenced_ones_do():
    for name in NETS:
        model, x = seeded(name)
        opened, net, _ = in_plain_form(model, taut.trace(model, x))
        step = taut.whole(net, "channels", sparsity=0.3, hidden=True)
        with torch.no_grad():
            small = taut.apply(opened, taut.Plan((step,)), taut.observe(net, opened))
        sizes = [m.hidden_size for m in small.modules() if hasattr(m, "hidden_size")]
        assert all(size < 24 for size in sizes), name


class Single(nn.Module):
    """One sequence without an axis of samples."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def test_units_of_a_single_sequence_go():
    (group,) = coupling(Single().eval(), torch.randn(5, 6)).groups
    assert group.size == 8
    assert ("out", "in") in {(member.layer, member.end) for member in group.members}
