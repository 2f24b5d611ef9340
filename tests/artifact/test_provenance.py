"""The resolved plan of a model is found again, for that model and a plan that leads to it, and for no other."""

import gc
import weakref
from dataclasses import replace

import pytest
from torch import nn

from taut.artifact.provenance import hand_on, recall, remember
from taut.types import Plan, Step

NAMES = "a", "b"
ASKED = {"macs": 0.5, "even": True}
"""What a user says of the channels; how many stay of which layer is decided when the plan is carried out."""


def channels(**settings):
    return Step(NAMES, "channels", ASKED | settings)


DONE = Plan((channels(counts=[3, 4]),))
SVD = Step(("a",), "svd", {"rank": 2})


def test_a_plan_that_only_the_network_resolves_gets_the_steps_that_were_carried_out():
    model, asked = nn.Linear(2, 2), Plan((channels(),), unit="loss")
    remember(model, DONE)
    assert recall(model, asked) == replace(asked, steps=DONE.steps)
    assert recall(model, DONE) == DONE


def test_a_step_that_was_rolled_back_is_left_out():
    model = nn.Linear(2, 2)
    remember(model, DONE)
    assert recall(model, Plan((SVD, channels()))).steps == DONE.steps


@pytest.mark.parametrize(
    "asked",
    [
        Plan((channels(macs=0.4),)),
        Plan((replace(channels(), layers=("a",)),)),
        Plan((SVD,)),
        Plan(()),
    ],
    ids=["other settings", "other layers", "nothing open", "empty"],
)
def test_a_plan_that_does_not_lead_there_stays_what_it_is(asked):
    model = nn.Linear(2, 2)
    remember(model, DONE)
    assert recall(model, asked) is asked


def test_steps_in_another_order_are_another_plan():
    model, steps = nn.Linear(2, 2), (channels(counts=[3, 4]), replace(SVD, layers=("c",)))
    remember(model, Plan(steps))
    assert recall(model, Plan((channels(), steps[1]))).steps == steps
    turned = Plan((steps[1], channels()))
    assert recall(model, turned) is turned


def test_a_model_of_which_nothing_is_known_has_the_plan_itself():
    asked = Plan((channels(),))
    assert recall(nn.Linear(2, 2), asked) is asked


def test_the_trained_model_inherits_what_was_done():
    model, trained, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    remember(model, DONE)
    hand_on(model, trained)
    assert recall(trained, Plan((channels(),))).steps == DONE.steps
    hand_on(other, trained)  # of which nothing is known: nothing is forgotten
    assert recall(trained, Plan((channels(),))).steps == DONE.steps


def test_no_model_is_held_for_its_plan():
    model = nn.Linear(2, 2)
    held = weakref.ref(model)
    remember(model, DONE)
    del model
    gc.collect()
    assert held() is None


def test_the_last_plan_counts():
    model, later = nn.Linear(2, 2), Plan((channels(counts=[2, 2]),))
    remember(model, DONE)
    remember(model, later)
    assert recall(model, Plan((channels(),))).steps == later.steps
