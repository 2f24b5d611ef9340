"""`reproduce`: found from anywhere in a checkout, its answer is whether the bounds hold."""

import pytest

from taut.cli.app import run
from taut.errors import CallError, DataError
from taut.studies import Bound, environment, write_results
from taut.studies.reproducing import find_experiments, load_study, reproduce, studies

MAIN = """
def main(data, out, paper, quick, seeds):
    (out / "table.md").write_text(f"data {data} paper {paper} quick {quick} seeds {seeds}")
    return quick
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "mine" / "run.py").write_text(MAIN)
    (tmp_path / "experiments" / "broken").mkdir()
    (tmp_path / "experiments" / "broken" / "run.py").write_text("import no_such_package")
    (tmp_path / "src" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "src" / "deep")
    return tmp_path


def test_studies_are_found_from_the_current_folder_upward(checkout, tmp_path_factory, monkeypatch):
    assert find_experiments() == checkout / "experiments"
    assert studies(find_experiments()) == ["broken", "mine"]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(CallError, match="part of a checkout"):
        find_experiments()
    assert find_experiments(checkout / "experiments") == checkout / "experiments"
    with pytest.raises(CallError, match="no folder of experiments"):
        find_experiments(checkout / "missing")


def test_packages_are_looked_for_before_the_first_step(checkout):
    path = checkout / "experiments" / "mine" / "run.py"
    path.write_text("NEEDS = ('no_such_package', 'torch')\nraise ValueError('the first step')\n" + MAIN)
    with pytest.raises(CallError, match="study 'mine' needs a package: no_such_package is not installed: pip install"):
        reproduce("mine")
    path.write_text("NEEDS = ('torch',)\n" + MAIN)
    assert reproduce("mine", quick=True)[0]


def test_bad_studies_are_named(checkout):
    with pytest.raises(CallError, match=r"no study 'other'. There are: broken, mine"):
        load_study(find_experiments(), "other")
    with pytest.raises(DataError, match="no_such_package"):
        load_study(find_experiments(), "broken")


def test_a_study_runs_with_its_options(checkout):
    holds, target = reproduce("mine", quick=True, seeds=2)
    assert holds
    assert target.name == "taut-mine"
    assert (target / "table.md").read_text() == "data None paper False quick True seeds 2"


def test_a_folder_that_cannot_be_used_is_said_before_the_study_is_imported(checkout):
    (checkout / "file").write_text("x")
    with pytest.raises(CallError, match="is a file"):
        reproduce("broken", out=checkout / "file")


def test_the_command_line_and_its_exit_codes(checkout, capsys):
    assert run(["reproduce", "mine", "--quick", "--out", "there"]) == 0
    assert "quick True" in capsys.readouterr().out
    assert run(["reproduce", "mine"]) == 1
    assert "bound failed" in capsys.readouterr().err
    assert run(["reproduce"]) == 2
    assert "Which study? There are: broken, mine." in capsys.readouterr().err
    assert run(["reproduce", "mine", "--data", "missing"]) == 2
    assert run(["reproduce", "broken"]) == 4


def test_results_are_written_beside_their_environment(tmp_path):
    good, bad = Bound("a", 2.0, 3.0), Bound("b", 2.0, 3.0, at_most=True)
    assert write_results(tmp_path / "r.json", {}, {}, [good])
    assert not write_results(tmp_path / "r.json", {}, {}, [good, bad])
    assert not write_results(tmp_path / "r.json", {}, {}, [])
    assert str(bad).startswith("FAILS: b: 3 <= 2")
    assert environment()["versions"]["torch"]
