r"""What the double-loop methods share: the adjoint system :math:`H q = \nabla_y F` at one point of an outer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, Solution, SolveError, Status, settle, timed
from difflayers.linalg import LinearSolver
from difflayers.linalg._system import LinearSystem, Params

from ._oracles import Recorded


@dataclass(frozen=True, eq=False)
class _Hessian(LinearSystem):
    """The lower Hessian at one point."""

    recorded: Recorded = None  # type: ignore[assignment]

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        return self.recorded.pull(v)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        return self.recorded.matrix()


def solve_adjoint(name: str, slope: Recorded, upper_y: Tensor, solver: LinearSolver, init: Tensor) -> Tensor:
    """The solution q of ``H q = grad_y F``.

    Args:
        name: The method, for messages.
        slope: The lower gradient with its graph.
        upper_y: Gradient of the upper objective in y.
        solver: The solver.
        init: Where an iteration starts.

    Returns:
        q, without history.

    Raises:
        ValueError: For a gradient that is not finite.
        SolveError: For a Hessian that is not positive definite.
    """
    system = _Hessian(solver, None, name=name, symmetric=True, recorded=slope)

    def solve() -> tuple[Tensor, Info]:
        return solver.solve(system, (), solver.factor(system, (), upper_y), upper_y, True, init)

    with torch.no_grad():
        q, info = timed(name, "adjoint", solve)

    def diagnose() -> None:
        check_finite([("lower: gradient in y", slope.value.detach()), ("upper: gradient in y", upper_y)])
        if bool((info.status == Status.SINGULAR).any()):
            raise SolveError(
                f"{name} (adjoint): the lower Hessian is not positive definite at y ({int(info.steps.max())} steps, "
                f"residual {float(info.residual.max()):.2e}). Likely causes: (a) y is no minimum: solve the lower "
                "problem further, (b) its minimum is not isolated: add a ridge to `lower`, or damping to the adjoint, "
                "Implicit(CG(), damping=1e-3). The method is as before the step; the error's `.solution` carries what "
                "was reached.",
                Solution(q, *info),
            )

    return settle(q, info, "raise", name=name, phase="adjoint", diagnose=diagnose)
