"""The command line: list, check, demo."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from difflayers.__main__ import main
from difflayers.testing import CLAUSES
from difflayers.testing.cases import all_cases
from tests.contract.toys import BROKEN, GOOD

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cases(monkeypatch):
    """Two toy layers instead of the library's, one of them broken."""
    found = {"good": (GOOD,), "bad": (BROKEN["gradgradcheck"],)}
    monkeypatch.setattr("difflayers.__main__.all_cases", lambda: found)
    return found


def test_list_names_every_layer(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for family, found in all_cases().items():
        for layer in {case.of for case in found}:
            assert any(line.split()[:2] == [family, layer] for line in lines)


@pytest.fixture
def runs(monkeypatch):
    """Which clauses were asked of which case, without running any."""
    seen = {}

    def check_layer(case, *, clauses, **options):
        seen[case.name] = list(clauses)
        return []

    monkeypatch.setattr("difflayers.__main__.check_layer", check_layer)
    return seen


def test_check_passes_for_a_right_layer(cases, capsys):
    assert main(["check", "--family", "good", "--clause", "gradcheck", "--clause", "gradgradcheck"]) == 0
    out = capsys.readouterr().out
    assert "1 cases, 0 broken clauses" in out
    heading, row = (line for line in out.splitlines() if "good" in line)
    assert heading.startswith("good --") and row.split()[:4] == ["good", "2", "0", "0"]


def test_check_fails_for_a_wrong_layer(cases, capsys):
    assert main(["check", "--clause", "gradcheck", "--clause", "gradgradcheck", "--verbose"]) == 1
    out = capsys.readouterr().out
    assert "detached second derivative breaks gradgradcheck" in out
    assert "2 cases, 1 broken clauses" in out


def test_the_quick_profile_is_every_layer_with_a_fixed_set_of_clauses(runs, capsys):
    """One representative case a layer, so no layer is left out; what is left out is said."""
    assert main(["check"]) == 0
    found = [case for cases in all_cases().values() for case in cases]
    representative = {case.name for case in found if case.representative}
    quick = [name for name, c in CLAUSES.items() if c.quick]
    assert set(runs) == representative and all(clauses == quick for clauses in runs.values())
    assert {"oracle", "gradcheck", "gradgradcheck", "vmap_equals_loop", "one_bad_element"} < set(quick) < set(CLAUSES)
    out = " ".join(capsys.readouterr().out.split())
    share = f"{len(representative)} of {len(found)} cases, {len(quick)} of {len(CLAUSES)} clauses"
    assert f"{share}; --full runs all of them. Clauses left out: gradcheck_full" in out


def test_a_wrong_layer_is_found_by_the_quick_profile(monkeypatch, capsys):
    wrong = replace(BROKEN["gradgradcheck"], representative=True)
    monkeypatch.setattr("difflayers.__main__.all_cases", lambda: {"bad": (wrong,)})
    assert main(["check"]) == 1
    assert "breaks gradgradcheck" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--full"], ["--case", "e"], ["--clause", "oracle"]])
def test_what_is_asked_for_is_run_in_full(cases, runs, capsys, asked):
    """The toys have one representative case of two, which the quick profile alone would stay with."""
    assert main(["check", *asked]) == 0
    clauses = ["oracle"] if "--clause" in asked else list(CLAUSES)
    names = {"good", "detached second derivative"} - ({"good"} if "--case" in asked else set())
    assert set(runs) == names and all(found == clauses for found in runs.values())
    assert ("--full runs all" in capsys.readouterr().out) == (asked != ["--full"])


def test_the_table_fits_into_80_columns(monkeypatch, capsys):
    failing = replace(BROKEN["gradcheck"], name="layer " + 100 * "x", representative=True)
    exempt = replace(GOOD, name="exempt", exempt={"oracle": "a reason that goes on for a while " * 4})
    monkeypatch.setattr("difflayers.__main__.all_cases", lambda: {"toys": (failing, exempt)})
    assert main(["check", "--clause", "gradcheck", "--clause", "oracle", "--verbose"]) == 1
    table = capsys.readouterr().out.split("\nlayer x")[0].splitlines()
    assert len(table) > 10 and max(map(len, table)) <= 80
    assert any(line.startswith("  layer x") and "xxx...  " in line for line in table)


def test_check_says_when_nothing_matches(cases, capsys):
    assert main(["check", "--case", "no such case"]) == 2


def test_check_says_when_the_device_is_not_there(capsys):
    assert main(["check", "--device", "nonsense"]) == 2
    assert "cannot be used here" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been run; the run says that it failed."""
    seen = []

    def run(command, check):
        seen.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("difflayers.__main__.subprocess.run", run)
    return seen


def test_demo_runs_the_quickstart(started, monkeypatch):
    monkeypatch.setattr("difflayers.__main__.find_spec", lambda name: "is there")
    assert main(["demo"]) == 1
    assert main(["demo", "--family", "transport", "--family", "pde"]) == 1
    script = str(ROOT / "examples" / "quickstart.py")
    chapters = ["--chapter", "transport", "--chapter", "pde"]
    assert started == [[sys.executable, script], [sys.executable, script, *chapters]]


def test_demo_says_what_it_needs(started, monkeypatch, capsys):
    monkeypatch.setattr("difflayers.__main__.find_spec", lambda name: None)
    assert main(["demo"]) == 2 and not started
    assert "needs matplotlib and sklearn" in capsys.readouterr().err


def test_demo_says_where_the_examples_are(started, monkeypatch, tmp_path, capsys):
    """Beside an installed package there is no examples/quickstart.py, or one of somebody else."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart.py").touch()
    monkeypatch.setattr("difflayers.__main__.ROOT", tmp_path)
    assert main(["demo", "--family", "transport"]) == 2 and not started
    said = " ".join(capsys.readouterr().err.split())
    assert "examples/ of the repository" in said and "quickstart.py --chapter transport" in said


def test_a_wrong_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--family", "none"])


def test_the_module_runs():
    command = [sys.executable, "-m", "difflayers", "check", "--case", "linear_solve LU batched", "--clause", "oracle"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "1 cases, 0 broken clauses" in run.stdout
