"""Recipes: the settings as YAML, and everything that YAML silently allows refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import taut
from taut.methods import choose
from taut.methods.low_rank.svd import SVD
from taut.methods.low_rank.tucker import Tucker
from taut.recipe import MAX_BYTES, Recipe, Training


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return Recipe.read(path)


def test_a_full_recipe(tmp_path: Path) -> None:
    text = "budget: {macs: 0.25, params: 1000}\nmethods: [svd, tucker: {metric: fisher}]\nseed: 3\n"
    text += "finetune: {epochs: 5, cascade: true}\nsensitivity: true\n"
    found = read(tmp_path, text)
    budget, methods = taut.Budget(macs=0.25, params=1000), (SVD(), Tucker(metric="fisher"))
    assert found == Recipe(budget, methods, Training(epochs=5, cascade=True), sensitivity=True, seed=3)


@pytest.mark.parametrize("text", ["low rank", "[low rank]", "[low rank: {}]"])
def test_low_rank_alone(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"methods: {text}").methods == choose(None)
    assert read(tmp_path, "methods: [low rank, channels]").methods == choose(["low rank", "channels"])


def test_the_short_form_of_a_budget(tmp_path: Path) -> None:
    assert read(tmp_path, "budget: macs=0.25,drop=0.01").budget == taut.Budget(macs=0.25, drop=0.01)
    assert read(tmp_path, "budget: {macs: 50%, bytes: 500kB}").budget == taut.Budget(macs=0.5, bytes=500_000)


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == Recipe()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "budgets: {macs: 0.5}",
            "Unknown recipe key 'budgets'. Known: budget, methods, finetune, sensitivity, align, compare, seed, keep, "
            "output, mask.",
        ),
        ("budget: {speed: 3}", "Unknown budget key 'speed'"),
        ("budget: {macs: 0.5, macs: 0.25}", "the key 'macs' is repeated"),
        ("seed: 1\nseed: 2", "the key 'seed' is repeated"),
        ("budget: {macs: 1.5}", "fraction kept"),
        ("budget: {macs: true}", "must be a number"),
        ("budget: {macs: half}", "must be a number"),
        ("budget: [1]", "must be a taut.Budget"),
        ("methods: [magic]", "Unknown method 'magic'"),
        ("methods: high rank", "must be a list of names or of name: settings, or low rank"),
        ("methods: [low rank: {metric: data}]", "'low rank' has no settings"),
        ("methods: [svd: {rang: 3}]", "Unknown setting 'rang'"),
        ("methods: [svd: 3]", "must be a mapping"),
        ("methods: [{svd: {}, tucker: {}}]", "one name: settings"),
        ("methods: svd", "must be a list"),
        ("methods: []", "must be a list"),
        ("seed: 1.5", "must be a whole number"),
        ("seed: true", "must be a whole number"),
        ("- 1", "must be a mapping"),
        ("budget: {macs", "is not valid"),
        ("seed: 2024-99-99", "is not valid"),
        ("? [1]\n: 2", "is not valid"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: &a [1]\nb: *a", "aliases are not allowed"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("#" * (MAX_BYTES + 1), "larger than"),
        ("seed: \x00", "is not valid"),
    ],
)
def test_bad_recipes_are_one_line_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(taut.CallError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert said in message
    assert "recipe.yaml" in message
    assert "\n" not in message
    assert len(message) < 600


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(taut.CallError, match="cannot be read: No such file"):
        Recipe.read(tmp_path / "none.yaml")
