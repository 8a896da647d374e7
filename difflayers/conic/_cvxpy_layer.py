"""Any parametrised convex problem that CVXPY can express, as a layer.

A. Agrawal, B. Amos, S. Barratt, S. Boyd, S. Diamond, J. Z. Kolter, Differentiable Convex Optimization Layers, 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor
from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import solution_map
from difflayers.linalg._autodiff import autocast_off, physical
from difflayers.proximal._operands import check_range, per_element

from ._canonical import Canonical, Entries, canonicalise
from ._conic_problem import conic_problem
from ._conic_program import Program
from ._conic_solvers import ConicSolver, check_solver
from ._moreau import Moreau

if TYPE_CHECKING:
    import cvxpy


class CvxpyLayer(nn.Module):
    """The solution of a CVXPY problem as a function of its parameters.

    Args:
        problem: A ``cvxpy.Problem`` that follows the rules of disciplined parametrised programming (DPP), with real,
            continuous variables. ``quad_form(x, P)`` with a parameter P (``PSD=True``) may stand in the objective.
        parameters: All parameters of the problem, in the order in which `forward` takes their values.
        variables: Those to return: variables of the problem, and ``dual_variables`` of its equalities, inequalities and
            semidefinite constraints.
        gp: The problem is a geometric program (DGP).
        solver: :class:`Moreau` or :class:`Clarabel`, as for :func:`conic_program`.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Shape:
        One tensor a parameter, ``(*batch, *parameter.shape)``, any of them with batch dimensions, which broadcast;
        output: a tuple with ``(*batch, *variable.shape)`` for each variable, in the dtype of the parameters.

    Raises:
        ValueError: For a problem that is not DPP (the parts that are not are named), integer or complex variables,
            parameters or variables that do not belong to it; in `forward`, for shapes or signs that do not fit.
        SolveError: For elements that are infeasible or unbounded; in backward, where a variable is not unique.

    Differentiable in every parameter, as :func:`conic_program` is. Of a symmetric parameter the symmetric part counts.
    Bounds of variables, as attributes or constraints, are rows like any other. CVXPY is needed to build the layer, not
    to call, copy or pickle it. Meant for canonical forms of up to some hundreds of rows and unknowns, which are dense.

    Example:
        >>> import cvxpy, torch
        >>> from difflayers.conic import CvxpyLayer
        >>> x, target = cvxpy.Variable(3, nonneg=True), cvxpy.Parameter(3)
        >>> problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm(x - target)), [cvxpy.sum(x) == 1])
        >>> layer = CvxpyLayer(problem, [target], [x])
        >>> target = torch.tensor([0.9, 0.5, -2.0], requires_grad=True)
        >>> (solution,) = layer(target)
        >>> solution.round(decimals=4)
        tensor([0.7000, 0.3000, 0.0000], grad_fn=<RoundBackward1>)
        >>> torch.autograd.grad(solution[0], target)[0].round(decimals=4)
        tensor([ 0.5000, -0.5000,  0.0000])

    Source: A. Agrawal et al., Differentiable Convex Optimization Layers, 2019.
    Departure: the derivative is that of :func:`conic_program`; the canonical form never has cones or bounds directly on
    variables.
    """

    def __init__(
        self,
        problem: cvxpy.Problem,
        parameters: Sequence[cvxpy.Parameter],
        variables: Sequence[cvxpy.Variable],
        *,
        gp: bool = False,
        solver: Moreau | ConicSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        check_solver(solver)
        self.form: Canonical = canonicalise(problem, parameters, variables, gp)
        self.solver = solver
        self.on_failure: OnFailure = on_failure

    def extra_repr(self) -> str:
        """Parameters, variables and size."""
        show = lambda entries: ", ".join(f"{e.name}{e.shape}" for e in entries)  # noqa: E731
        rows, unknowns = self.form.A.shape
        return (
            f"parameters=[{show(self.form.parameters)}], variables=[{show(self.form.variables)}], "
            f"unknowns={unknowns}, rows={rows}, solver={self.solver}, on_failure={self.on_failure!r}"
        )

    def forward(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The variables, one tensor each."""
        form = self.form
        vectors = self._vectors(parameters)
        like = vectors[0] if vectors else form.q.constant
        dtype = parameters[0].dtype if parameters else torch.get_default_dtype()
        with autocast_off(like):
            q, A, b = (part.at(vectors, like) for part in (form.q, form.A, form.b))
            P = None if form.P is None else form.P.at(vectors, like)
            program = Program(q, A, b, P, form.layout)
            problem = conic_problem(program.layout, P is not None, self.solver)
            try:
                point = solution_map(problem, program.args, on_failure=self.on_failure)
            except ValueError:
                check_finite((e.name, physical(t)) for e, t in zip(form.parameters, parameters, strict=True))
                raise
            x, y, _ = program.point(point) if any(e.dual for e in form.variables) else (program.x(point), point, None)
            batch = broadcast_batch(
                (e.name, tuple(v.shape[:-1])) for e, v in zip(form.parameters, vectors, strict=True)
            )
            return tuple(self._entry(e, y if e.dual else x, batch).to(dtype) for e in form.variables)

    def _vectors(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Checked values, in float64, as vectors of the entries that count."""
        form = self.form
        if len(parameters) != len(form.parameters):
            raise ValueError(f"parameters: expected {len(form.parameters)} tensors, got {len(parameters)}")
        out = []
        for k, (entries, value) in enumerate(zip(form.parameters, parameters, strict=True)):
            ndim = len(entries.shape)
            check_tensor(entries.name, value, min_ndim=ndim)
            check_shape(entries.name, tuple(value.shape[value.ndim - ndim :]), entries.shape, " behind the batch")
            logarithmic = form.logarithmic is not None and form.logarithmic[k]
            if logarithmic or entries.sign != "any":
                below = entries.sign == "nonpos"
                number = -value if below else value
                if self.on_failure != "raise":  # NaN is a failure of its element alone
                    number = torch.where(torch.isnan(number), 1, number)
                limit = {"above": 0.0} if logarithmic else {"at_least": 0.0}
                check_range(per_element("-" * below + entries.name, number, **limit))
            value = value.double()
            flat = value.flatten(value.ndim - ndim) if ndim else value.unsqueeze(-1)
            first, second = entries.first.to(value.device), entries.second.to(value.device)
            flat = flat[..., first] if first is second else (flat[..., first] + flat[..., second]) / 2
            out.append(flat.log() if logarithmic else flat)
        check_same((e.name, t) for e, t in zip(form.parameters, parameters, strict=True))
        broadcast_batch((e.name, tuple(v.shape[:-1])) for e, v in zip(form.parameters, out, strict=True))
        return out

    def _entry(self, entries: Entries, t: Tensor, batch: tuple[int, ...]) -> Tensor:
        assert entries.weight is not None
        value = t[..., entries.first.to(t.device)] * entries.weight.to(t)
        if self.form.logarithmic is not None and not entries.dual:
            value = value.exp()
        return value.expand(*batch, value.shape[-1]).reshape((*batch, *entries.shape))
