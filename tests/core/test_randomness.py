"""Random states: taken, put back, and left alone."""

import random

import numpy as np
import torch

from taut.core.randomness import capture, own_states, restore, seed_all


def draw():
    random.gauss(0, 1)
    return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))  # noqa: NPY002


def test_restored_states_draw_the_same_again():
    draw()
    found = capture()
    first = draw()
    restore(found)
    assert draw() == first


def test_states_survive_as_tensors_of_plain_dtypes():
    assert {t.dtype for t in capture().values()} <= {torch.uint8, torch.int64, torch.float64}


def test_seeds_depend_on_every_part():
    drawn = []
    for parts in ((1, 2, 3), (1, 2, 4), (2, 2, 3), (1, 2, 3)):
        seed_all(*parts)
        drawn.append(draw())
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_the_callers_states_are_left_alone():
    before = draw_after(capture())
    state = capture()
    with own_states():
        seed_all(5)
        draw()
    assert draw_after(capture()) == draw_after(state)
    assert before


def draw_after(state):
    restore(state)
    values = draw()
    restore(state)
    return values
