"""What each layer could become: keeping it first, nothing that another option beats, nothing that grows."""

from hypothesis import given
from hypothesis import strategies as st

from planning.knapsacks import observed, option
from taut.methods import METHODS
from taut.planning.candidates import Option, pareto, survey

POINTS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_pareto_by_brute_force(rows):
    options = [option(i, p, m, float(d)) for i, (p, m, d) in enumerate(rows)]
    kept = pareto(options)
    assert kept[0] is options[0]

    def key(o):
        return (o.damage, o.cost.macs, o.cost.params)

    for o in options:
        assert any(all(a <= b for a, b in zip(key(k), key(o), strict=True)) for k in kept)
    for o in kept[1:]:
        others = [k for k in options if k is not o and all(a <= b for a, b in zip(key(k), key(o), strict=True))]
        assert all(key(k) == key(o) for k in others)
    assert len({key(k) for k in kept[1:]}) == len(kept) - 1


def test_survey_offers_keeping_first_and_never_growth():
    net, stats = observed("resnet")
    choices = survey(net, stats, [kind() for kind in METHODS.values() if kind.default])
    assert {c.group.layer.name for c in choices} <= {layer.name for layer in net.layers if layer.skip is None}
    for choice in choices:
        assert choice.options[0] == Option(None, choice.group.layer.cost, 0.0)
        assert all(o.cost.lowers(choice.options[0].cost) for o in choice.options[1:])
        assert all(o.damage >= 0 for o in choice.options)
