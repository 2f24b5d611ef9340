"""The resolved plan of a model is found again, for that model and a plan that leads to it, and for no other."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from taut.artifact.provenance import before, hand_on, history, recall, remember
from taut.core.copying import NOTED
from taut.structure.surgery import clone
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


def test_what_was_done_goes_with_copies_and_none_is_made_of_it():
    model = nn.Linear(2, 2)
    remember(model, DONE, (SVD,))
    for copied in (copy.deepcopy(model), copy.copy(model), clone(model)):
        assert vars(copied)[NOTED] is vars(model)[NOTED]
    assert history(pickle.loads(pickle.dumps(model))) == (SVD, *DONE.steps)  # noqa: S301 - made right here
    assert set(model.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("text", ["", "{", '{"plan": 3}', None])
def test_what_cannot_be_read_is_not_known(text):
    model = nn.Linear(2, 2)
    vars(model)[NOTED] = text
    assert history(model) == ()


def test_settings_that_no_folder_could_hold_are_left_out_of_a_pickle():
    model = nn.Linear(2, 2)
    remember(model, Plan((replace(SVD, settings={"rank": object()}),)))
    assert history(pickle.loads(pickle.dumps(model))) == ()  # noqa: S301 - made right here


def test_a_part_that_is_changed_is_no_longer_what_made_it():
    parts = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    for part in parts:
        remember(part, DONE)
    remember(nn.Sequential(*parts), Plan((replace(SVD, layers=("1.0",)),)))
    assert [history(part) for part in parts] == [DONE.steps, ()]


def test_the_number_of_steps_says_which_of_two_plans_is_meant():
    model = nn.Linear(2, 2)
    first, second = channels(counts=[3, 4]), channels(counts=[2, 2])
    remember(model, Plan((second,)), (first,))
    assert before(model, Plan((channels(),))) == (first,)
    assert recall(model, Plan((channels(),))).steps == (second,)
    assert before(model, Plan((channels(), channels()))) == ()
    assert recall(model, Plan((channels(), channels()))).steps == (first, second)
    assert before(model, Plan((second, replace(SVD, layers=("c",))))) == (first,)  # one was rolled back
    assert before(model, Plan(())) == (first, second)


@pytest.mark.parametrize("by_hand", [False, True], ids=["planned", "by hand"])
@pytest.mark.parametrize("method", ["transposed", "transposed_spatial"])
def test_what_a_layer_resolves_is_saved_by_the_plan_that_was_applied(method, by_hand, tmp_path):
    """The stride of a transposed convolution stands in no plan before it is carried out."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 12, 4, 2, 1)).eval()

    model, x = make(), torch.randn(16, 3, 6, 6)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x, output="values")
    ranks = {"rank": 6} if method == "transposed_spatial" else {"rank_in": 4, "rank_out": 12}
    planned = taut.plan(net, stats, budget={"macs": 0.5}, methods=[method, "svd"])
    plan = Plan.of(net, [Step(("2",), method, ranks)]) if by_hand else planned
    assert method in {step.method for step in plan.steps}
    small = taut.apply(model, plan, stats)
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", base=make)(x), small(x))
