"""What the bilevel family asked of the engine's adjoints: damping, and a Neumann series that judges its own step.

Oracles: dense algebra with the eigenvalues known.
"""

import pytest
import torch

from difflayers import SolveWarning, Status
from difflayers.implicit import Implicit, Neumann, argmin
from difflayers.implicit._adjoints import NeumannSeries
from difflayers.linalg import CG, GMRES, LU, MINRES
from difflayers.linalg._operator import MatrixSystem

F64 = torch.float64
EIGENVALUES = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=F64)
Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
H = Q @ torch.diag(EIGENVALUES) @ Q.mT
B = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64)


def series(terms: int, step: float | None, b: torch.Tensor = B):
    solver = NeumannSeries(terms, step)
    system = MatrixSystem(solver, (2,), symmetric=True)
    return solver.solve(system, (H,), (), b, True, None)


@pytest.mark.parametrize("terms", [4, 5, 12, 60, 400])
@pytest.mark.parametrize("factor", [0.1, 0.6, 0.999, 1.01, 1.3, 3.0, 40.0])
def test_a_step_is_too_long_beyond_two_over_the_largest_eigenvalue(terms, factor):
    _, info = series(terms, 2 * factor / 4.0)
    flagged = info.status != Status.CONVERGED
    if factor > 1.1 or (factor > 1 and terms > 12):
        assert flagged.all()
    elif factor < 1:
        assert not flagged.any()
        decay = (1 - 2 * factor / 4.0 * EIGENVALUES) ** terms
        torch.testing.assert_close(info.residual, ((B @ Q) * decay).norm(dim=-1), rtol=1e-6, atol=1e-12)


def test_no_alarm_where_the_direction_is_missing():
    """A right-hand side without the stiff direction: the series converges, whatever the step would do there."""
    b = Q[:, 0] + Q[:, 1]
    _, info = series(30, 2.2 / 4.0, b)
    assert info.status == Status.CONVERGED
    torch.testing.assert_close(info.residual, ((1 - 0.55 * EIGENVALUES[:2]) ** 30).norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("terms", [5, 6, 9])
def test_alarm_while_the_residual_still_shrinks(terms):
    """A thousandth of the right-hand side grows, the rest shrinks: seen from the products, not from the residual."""
    b = Q @ torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-3], dtype=F64)
    sizes = [float((b @ Q * (1 - 0.55 * EIGENVALUES) ** k).norm()) for k in range(terms + 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert series(terms, 0.55, b)[1].status == Status.MAX_STEPS


def test_zero_right_hand_side():
    x, info = series(5, 0.4, torch.zeros(2, 5, dtype=F64))
    assert not x.any() and (info.status == Status.CONVERGED).all()


@pytest.mark.parametrize("step", [None, "estimated"])
def test_estimated_step(step):
    assert Neumann(3, step=step).solver(5, True) == NeumannSeries(3, None)
    x, _ = series(2000, None)
    torch.testing.assert_close(x, torch.linalg.solve(H, B.mT).mT, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="step: expected a number"):
        Neumann(3, step="guessed")


@pytest.mark.parametrize("solver", [None, CG(), MINRES(), GMRES(), LU()], ids=str)
def test_damping_to_second_order(solver):
    """argmin of z'Hz/2 - x'z: the damped derivative is (H + d I)^-1, exactly."""
    x = B[0].clone().requires_grad_()

    def objective(z, x):
        return (z * (H @ z)).sum(-1) / 2 - (x * z).sum(-1)

    z = argmin(objective, torch.zeros(5, dtype=F64), (x,), adjoint=Implicit(solver, damping=0.3))
    (g,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    inverse = torch.linalg.inv(H + 0.3 * torch.eye(5, dtype=F64))
    torch.testing.assert_close(z, torch.linalg.solve(H, B[0]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(g, 2 * inverse @ z, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x)[0], 2 * inverse @ inverse.sum(-1), rtol=1e-7, atol=1e-9)


def test_damping_is_checked():
    for bad in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="damping: expected"):
            Implicit(damping=bad)


def test_no_warning_without_a_reason(recwarn):
    series(50, 0.45)
    assert not [w for w in recwarn if issubclass(w.category, SolveWarning)]
