"""The command line: list, check, demo."""

import subprocess
import sys

import pytest

from difflayers.__main__ import main
from difflayers.testing.cases import all_cases
from tests.contract.toys import BROKEN, GOOD


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


def test_check_passes_for_a_right_layer(cases, capsys):
    assert main(["check", "--family", "good", "--clause", "gradcheck", "--clause", "gradgradcheck"]) == 0
    out = capsys.readouterr().out
    assert "1 cases, 0 broken clauses" in out
    assert "good    good       2       0       0" in out


def test_check_fails_for_a_wrong_layer(cases, capsys):
    assert main(["check", "--clause", "gradcheck", "--clause", "gradgradcheck", "--verbose"]) == 1
    out = capsys.readouterr().out
    assert "detached second derivative breaks gradgradcheck" in out
    assert "2 cases, 1 broken clauses" in out


def test_check_says_when_nothing_matches(cases, capsys):
    assert main(["check", "--case", "no such case"]) == 2


def test_check_says_when_the_device_is_not_there(capsys):
    assert main(["check", "--device", "nonsense"]) == 2
    assert "cannot be used here" in capsys.readouterr().err


def test_demo_says_what_to_run(capsys):
    assert main(["demo"]) == 0
    assert "make demo" in capsys.readouterr().out


def test_a_wrong_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--family", "none"])


def test_the_module_runs():
    command = [sys.executable, "-m", "difflayers", "check", "--case", "linear_solve LU batched", "--clause", "oracle"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "1 cases, 0 broken clauses" in run.stdout
