"""How numbers and tables are written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut.core.text import count, fold, shape, some, table, unique_keys


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (4_560_000, "4.56M"),
        (15.5e9, "15.5G"),
        (-2500, "-2.5k"),
    ],
)
def test_count(n, text):
    assert count(n) == text


@given(st.integers(0, 10**12 - 10**9))
def test_count_is_short_and_close(n):
    text = count(n)
    assert "e" not in text
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)
    value = float(text.rstrip("kMG")) * unit
    assert value == pytest.approx(n, rel=6e-3)
    assert len(text) <= 6


@pytest.mark.parametrize("n", [999_600, 999_999, 999_999_999])
def test_count_rounds_up_into_the_next_unit(n):
    assert "e" not in count(n)


def test_some_of_many_names():
    assert some([]) == ""
    assert some(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert some(["a", "b", "c", "d"]) == "'a', 'b', 'c', ..."
    assert some(["a", "b"], most=1) == "'a', ..."


def test_fold_and_shape():
    assert fold(8, 2) == "4x"
    assert fold(1, 3) == "0.333x"
    assert fold(5, 0) == "-"
    assert shape((64, 3, 3, 3)) == "64x3x3x3"
    assert shape(()) == ""


def test_table_keeps_every_cell_and_aligns():
    text = table(("name", "n", "why"), [("a", "1", "x"), ("long", "1000", "[brackets] stay")], right=(1,))
    lines = text.splitlines()
    assert "[brackets] stay" in text
    assert lines[-2].split() == ["a", "1", "x"]
    assert lines[-1].index("1000") + 4 == lines[-2].index("1") + 1
    assert all(line == line.rstrip() for line in lines)


def test_table_wraps_only_the_last_column():
    text = table(("name", "why"), [("layer", "word " * 60)], width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert text.count("word") == 60
    assert text.count("layer") == 1


@pytest.mark.parametrize("cell", ["[bold]x[/bold]", "[/]", "\\[x]", "a\\", "[link=x]"])
def test_markup_in_a_cell_is_text(cell):
    assert cell in table(("a", "b"), [(cell, "end")])


def test_an_empty_table_has_its_headers():
    assert "name" in table(("name", "why"), [])


def test_unique_keys():
    assert json.loads('{"a": 1, "b": {"a": 2}}', object_pairs_hook=unique_keys) == {"a": 1, "b": {"a": 2}}
    with pytest.raises(ValueError, match="the key 'a' is repeated"):
        json.loads('{"b": 1, "a": 1, "a": 2}', object_pairs_hook=unique_keys)


def test_no_digit_of_a_wide_table_is_cut():
    numbers = [f"{1234567 + index}" * 3 for index in range(12)]
    lines = table([f"h{index}" for index in range(12)] + ["why"], [[*numbers, "word " * 40]]).splitlines()
    assert any(all(number in line for number in numbers) for line in lines)
    assert sum("word" in line for line in lines) > 1  # the last column wraps
    narrow = table(("a", "b"), [("1", "word " * 60)]).splitlines()
    assert max(map(len, narrow)) <= 160
