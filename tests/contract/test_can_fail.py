"""The contract can fail: every clause finds a layer that breaks it, in fast mode too, and a right one passes all."""

import pytest
import torch

from difflayers.testing import CLAUSES, check_layer
from tests.contract.toys import ALSO, BROKEN, GOOD, MORE


def broken_clauses(case, device: torch.device) -> set[str]:
    return {result.clause for result in check_layer(case, device=device, stop=False) if result.outcome == "failed"}


def test_every_clause_has_a_layer_that_breaks_it():
    assert set(BROKEN) == set(CLAUSES)


@pytest.mark.parametrize("clause", BROKEN)
def test_a_wrong_layer_is_caught_by_its_clause(clause: str, device: torch.device):
    assert broken_clauses(BROKEN[clause], device) == {clause} | ALSO.get(clause, set())


@pytest.mark.parametrize(("case", "expected"), MORE, ids=lambda p: getattr(p, "name", ""))
def test_natural_mistakes_are_caught(case, expected: set[str], device: torch.device):
    assert broken_clauses(case, device) == expected


def test_a_right_layer_passes_everything(device: torch.device):
    results = check_layer(GOOD, device=device)
    assert [(r.clause, r.outcome) for r in results] == [(name, "passed") for name in CLAUSES]


def test_the_error_names_layer_and_clause():
    case = BROKEN["gradgradcheck"]
    with pytest.raises(AssertionError, match=r"detached second derivative breaks gradgradcheck \(Second derivatives"):
        check_layer(case)


def test_an_exemption_from_a_clause_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="got no_such_clause"):
        check_layer(GOOD, clauses=["no_such_clause"])
