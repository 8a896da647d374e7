"""What a user writes, as ``mypy --strict`` reads it; run by tests/ecosystem/test_typing.py, which checks the types."""

from typing import assert_type

import torch
from torch import Tensor, nn

import difflayers
from difflayers import Solution, SolveError, Status, trace
from difflayers.bilevel import SOBA, ArgminLayer, Bilevel, Hypergradient, hypergradient
from difflayers.conic import ProgramPoint, QuadraticProgram, quadratic_program, quadratic_program_ex
from difflayers.equilibrium import ConvergentGraphSolver
from difflayers.implicit import Anderson, FixedPoint, Implicit, Newton, WarmStart, fixed_point, root_find_ex
from difflayers.linalg import CG, LinearOperator, Tag, least_squares, linear_solve
from difflayers.pde import ConstrainedField, Heat, PDEConstraint
from difflayers.proximal import SparseCoding, lasso, project_simplex
from difflayers.relu import ConvexReLUHead
from difflayers.testing import check_gradient
from difflayers.transport import Coupling, Sinkhorn, sinkhorn, sinkhorn_ex


class Cell(nn.Module):
    """An update."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def functions(x: Tensor, A: Tensor) -> Tensor:
    """Layers as functions."""
    assert_type(linear_solve(A, x, solver=CG(rtol=1e-8)), Tensor)
    operator = LinearOperator(lambda params, v: params[0] * v, (x,), tags=Tag.SYMMETRIC)
    assert_type(linear_solve(operator, x), Tensor)
    assert_type(least_squares(A, x, ridge=0.1), Tensor)
    assert_type(quadratic_program(A, x), Tensor)
    assert_type(quadratic_program_ex(A, x), Solution[ProgramPoint])
    assert_type(sinkhorn(A, eps=0.1), Tensor)
    assert_type(sinkhorn_ex(A, eps=0.1), Solution[Coupling])
    assert_type(lasso(A, x, 0.1), Tensor)
    assert_type(project_simplex(x), Tensor)
    z: Tensor = fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.zeros_like(x), (x,), solver=Anderson())
    report = root_find_ex(lambda z, x: z**3 + z - x, x, (x,), solver=Newton(max_steps=20))
    assert_type(report.status, Tensor)
    assert_type(report.steps, Tensor)
    return z


def layers(x: Tensor) -> Tensor:
    """Layers as modules."""
    model = nn.Sequential(
        nn.Linear(4, 4), FixedPoint(Cell(), adjoint=Implicit()), QuadraticProgram(P=torch.eye(4)), SparseCoding(4, 8)
    )
    head = ConvexReLUHead(0.1, torch.randn(5, 4))
    assert_type(head.train_network(x, x[:, 0]).objective, Tensor)
    Sinkhorn(0.1, learnable=True)
    ConvergentGraphSolver(3, 2, 1)
    WarmStart(10)
    out: Tensor = model(x)
    return out


def field(basis: nn.Module) -> Tensor:
    """A differential equation."""
    found: ConstrainedField = PDEConstraint(Heat(c=0.5))(basis, values={"u0": lambda points: points[:, 1].sin()})
    assert_type(found.objective, Tensor)
    return found(found.points)


def tuned(x: Tensor, y: Tensor) -> Tensor:
    """Two levels."""
    problem = Bilevel(upper=lambda x, y, batch: y.sum(), lower=lambda x, y, batch: (x.exp() * y - 1).square().sum())
    assert_type(hypergradient(problem, x, y), Hypergradient)
    method = SOBA(problem, x, y)
    method.step()
    solved: Tensor = ArgminLayer(problem)(x, init=y)
    return solved


def failures(x: Tensor) -> list[str]:
    """Reports and errors."""
    with trace() as solves:
        try:
            functions(x, x)
        except SolveError as error:
            assert_type(error.solution.status, Tensor)
    assert_type(difflayers.__version__, str)
    report = check_gradient(Cell(), (x, x), check=False)
    assert_type(report.passed, bool)
    return [f"{solve.name} {solve.phase} {Status(int(solve.status.max())).name}" for solve in solves]
