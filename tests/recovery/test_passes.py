"""The order of layers over several batches, and the passes in which they are solved."""

from taut.recovery.passes import MOST, merged, passes


def test_one_order_stays_as_it_is():
    assert merged(["abcd"]) == list("abcd")


def test_what_two_ways_share_comes_after_both():
    assert merged([list("abd"), list("acd")]) == list("abcd")
    assert merged([list("ad"), list("abcd")]) == list("abcd")


def test_orders_that_contradict_each_other_are_broken_somewhere():
    assert sorted(merged([list("abc"), list("cba")])) == list("abc")


def test_one_batch_needs_one_pass():
    assert passes(list("abc"), 1) == [list("abc")]


def test_several_batches_need_one_for_every_layer_up_to_a_limit():
    assert passes(list("abc"), 2) == [["a"], ["b"], ["c"]]
    many = [str(number) for number in range(100)]
    divided = passes(many, 2)
    assert len(divided) <= MOST
    assert [point for part in divided for point in part] == many


def test_nothing_to_solve_needs_no_pass():
    assert passes([], 2) == []
