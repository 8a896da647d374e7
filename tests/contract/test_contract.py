"""Every layer of the library through every clause of the contract."""

import pytest
import torch

from difflayers.testing import CLAUSES, LayerCase, run_clause
from difflayers.testing.cases import all_cases

CASES = [case for cases in all_cases().values() for case in cases]
PAIRS = [
    pytest.param(case, clause, id=f"{case.name}-{name}".replace(" ", "_"))
    for case in CASES
    for name, clause in CLAUSES.items()
    if name not in case.exempt and clause.needs(case) is None
]


@pytest.mark.parametrize(("case", "clause"), PAIRS)
def test_contract(case: LayerCase, clause, device: torch.device):
    result = run_clause(case, clause, device)
    assert result.outcome == "passed", f"{case.name} breaks {clause.name} ({clause.promise}): {result.message}"


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exemptions_name_a_clause_and_a_reason(case: LayerCase):
    assert set(case.exempt) <= set(CLAUSES)
    assert all(len(reason) > 20 for reason in case.exempt.values())


def test_every_layer_has_one_costly_run():
    layers = {case.of for case in CASES}
    assert {case.of for case in CASES if case.representative} == layers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_an_oracle(case: LayerCase):
    assert case.oracle is not None
