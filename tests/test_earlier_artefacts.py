"""What an earlier version saved is read to the same function, and what it began is ended in the same weights.

The files were written on another machine, whose kernels add in another order: values agree but for that.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import taut
from cases import case, run
from fixtures.begun import training
from taut.methods import METHODS, settings
from taut.recipe import Recipe
from taut.training.loop import Trainer

HERE = Path(__file__).parent / "fixtures"


def test_no_method_is_missing():
    assert {path.name for path in (HERE / "saved").iterdir() if path.is_dir()} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_models_compute_the_same(method):
    with safe_open(HERE / "saved" / f"{method}.safetensors", "pt") as file:
        one = case(file.metadata()["case"])
        wanted = [file.get_tensor(key) for key in sorted(file.keys(), key=int)]
    _, example = one.make()
    model = taut.load(HERE / "saved" / method, base=one.build)
    for a, b in zip(run(model.eval(), example), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_plans_are_carried_out():
    text = (HERE / "plan.json").read_text()
    plan = taut.Plan.from_json(text)
    written = json.loads(plan.to_json())
    assert {kept.pop("code") for kept in written["kept"]} == {"kept"}  # came later
    assert written == json.loads(text)
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    small = taut.apply(model, plan, taut.observe(net, model, case("vgg").data()))
    assert taut.trace(small, example).cost.params == plan.after.params


def test_recipes_say_the_same():
    recipe = Recipe.read(HERE / "recipe.yaml")
    methods = [{method.name: settings(method)} for method in recipe.methods]
    wanted = json.loads((HERE / "recipe.json").read_text())
    assert holds(json.loads(json.dumps({**asdict(recipe), "methods": methods}, default=str)), wanted)


def holds(now, before):
    """Whether all that was said is still said; what can be said besides came later."""
    if isinstance(before, dict):
        return all(key in now and holds(now[key], value) for key, value in before.items())
    if isinstance(before, list):
        return len(now) == len(before) and all(map(holds, now, before))
    return now == before


def test_a_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    shutil.copytree(HERE / "run", tmp_path / "run")
    epochs, run_epoch = [], Trainer._epoch
    monkeypatch.setattr(
        Trainer, "_epoch", lambda self, *args: (epochs.append(self.position.epoch), run_epoch(self, *args))
    )
    ended = training(tmp_path / "run").state_dict()
    assert epochs == [1, 2, 3]
    wanted = load_file(HERE / "run.safetensors")
    assert ended.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(ended[key], value, rtol=0, atol=1e-4 * float(value.abs().max()))
