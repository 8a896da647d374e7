"""CG of one system, which masks nothing, against CG of a batch."""

import pytest
import torch

from difflayers.linalg import CG, linear_solve_ex

RHS = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MATRICES = {
    "definite": torch.tensor([1.0, 2, 3, 5, 8, 13], dtype=torch.float64),
    "bends at once": -torch.ones(6, dtype=torch.float64),
    "bends later": torch.tensor([1.0, 2, 3, 5, 8, -0.1], dtype=torch.float64),
    "nan": torch.tensor([1.0, 2, 3, 5, 8, torch.nan], dtype=torch.float64),
}


@pytest.mark.parametrize("preconditioner", [None, lambda params, r: r / torch.arange(1, 7, dtype=r.dtype)])
@pytest.mark.parametrize("max_steps", [0, 3, 100])
@pytest.mark.parametrize("rhs", [RHS, torch.zeros_like(RHS)], ids=["rhs", "zero"])
@pytest.mark.parametrize("eigenvalues", MATRICES.values(), ids=MATRICES)
def test_one_system_ends_as_it_would_in_a_batch(eigenvalues, rhs, max_steps, preconditioner):
    A = torch.diag(eigenvalues)
    solver = CG(max_steps=max_steps, preconditioner=preconditioner)
    alone = linear_solve_ex(A, rhs, solver=solver)
    batch = linear_solve_ex(A.expand(2, 6, 6), torch.stack([rhs, 2 * rhs]), solver=solver)
    assert alone.status == batch.status[0]
    assert alone.steps == batch.steps[0]
    torch.testing.assert_close(alone.value, batch.value[0], rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(alone.residual, batch.residual[0], rtol=1e-6, atol=1e-12, equal_nan=True)
