r"""HOAG: hyperparameters by gradients that are only as exact as they need to be.

Outer step k solves the lower problem and the adjoint system, each from where the last one ended, to a tolerance
:math:`\varepsilon_k`, and takes a gradient step of length :math:`1 / L`:

.. math:: \hat y_k \approx y^*(x_k), \qquad H q_k \approx \nabla_y F, \qquad p_k = \nabla_x F - J q_k, \qquad
    x_{k+1} = P(x_k - p_k / L)

Where the tolerances are summable, :math:`x_k` tends to a stationary point. L is learned from the values
:math:`F_k = F(x_k, \hat y_k)` that are known anyway; a value that is far too large sends the method back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Info, settle, timed
from difflayers.implicit import LBFGS, Implicit
from difflayers.implicit._iterate import Function, IterativeSolver, iterate
from difflayers.implicit._lbfgs import gradient_of
from difflayers.linalg import CG, LinearSolver

from ._evaluation import Evaluation
from ._hypergradient import definite
from ._method import Method, Seen, norm
from ._options import check_number
from ._oracles import Recorded
from ._outer_step import solve_adjoint
from ._problem import Bilevel
from ._schedules import Exponential, Schedule, as_schedule


@dataclass(frozen=True, kw_only=True)
class _WarmLBFGS(LBFGS):
    """L-BFGS whose first trial is of a given length."""

    first: Tensor

    def start(self, function: Function, z: Tensor) -> Any:
        state = super().start(function, z)
        return state._replace(t=torch.where(self.first > 0, self.first, state.t))


def _warm(solver: LBFGS, slope: Recorded) -> LBFGS:
    """The solver with the minimum along the gradient as its first trial: from near the solution, a short way."""
    g = slope.value.detach()
    bend = (g * slope.pull(g)).sum()
    first = torch.where(bend > 0, (g * g).sum() / torch.where(bend > 0, bend, 1), 0)
    return _WarmLBFGS(**{field.name: getattr(solver, field.name) for field in fields(LBFGS)}, first=first)


_FLOOR = 1e-12  # no tolerance below it
_PATIENCE = 3  # rejections in a row
_GROWTH = 0.2  # a value larger by this share is worse than any error explains


class HOAG(Method):
    r"""Gradient descent on hyperparameters with approximate gradients, of smooth strongly convex lower problems.

    Solves ``min_x upper(x, y*(x))``. One step is an *outer* one: the lower problem is solved from the last y to
    ``|grad_y f| <= eps_k scale``, the adjoint system from the last q to ``|H q - grad_y F| <= eps_k |grad_y F|``, then
    x moves by ``-p / L`` with the hypergradient p. The new value ``F_k = F - <q, grad_y f>``, which is that of the
    exact lower solution but for terms of second order, decides on the length of the next move. With D the length of the
    last one, ``slack = |F_0| eps_k^2 / 4 + 5/4 eps_{k-1} |p_{k-1}| D`` an error that F may have, and
    ``bend = <p_k - p_{k-1}, x_k - x_{k-1}> / D^2`` the curvature along the move:

    - If F rose by more than the slack, and either the move overshot, ``<p_k, x_k - x_{k-1}> > 0``, or F rose by a
      fifth, the step is rejected: x, y, q and F are again those of the last point, and the move from there is shorter:
      L becomes 1.25 times the bend, at least 2 and at most 10 times what it was. After three rejections in a row the
      last point itself is solved again, and that to half the tolerance, as is all from then on.
    - Otherwise L is multiplied by 1.25 for a bend above L, by 0.95 for one above ``L / 2``, and by 0.7 below.

    Give it the same full batches at every step: values of different batches do not compare.

    Args:
        problem: The problem, without prox and constraint. A box is its ``project_upper``; logarithms of penalties, say,
            between -6 and 6.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables, the start of the first solve.
        tolerances: eps, summable: ``Exponential(1e-3, 0.9)``, ``Power(1e-3, -2.0)`` or ``Power(1e-3, -3.0)``; at least
            1e-12, 2e-6 in float32. ``Constant(1e-12)`` solves everything exactly.
        solver: Of the lower problem, from :mod:`difflayers.implicit`: LBFGS, or a root solver for the gradient. Its own
            ``rtol`` is where no tolerance asks for more; ``atol`` is set from eps, in that solver's measure of errors.
        adjoint: ``Implicit(linear_solver, damping)``; the ``rtol`` of an iterative linear solver is set to eps.
        lipschitz: First L; the first move is by ``p / (0.95 L)``. None: ``|p_0| / sqrt(n)``, so that n variables move
            by about one each. (Where that gradient is below a thousandth of ``|F_0|``, L is ``|F_0|``.)
        rule: ``"published"`` takes F as it is and ``slack = |F_0| (eps_k / 4 + 5/4 eps_{k-1} D)``. L is multiplied by
            0.95 where F fell by ``L D^2 - slack``; where it rose by a fifth and the slack the step is rejected, L
            doubled and the tolerance halved; otherwise L stays.
        scale: What the gradient of the lower problem is compared with. None: its norm at the start.
        convexity: None, or ``fn(x) -> number``: a lower bound of the curvature of the lower problem in y, up to a
            factor, such as the smallest of the penalties. `scale` is multiplied by it, relative to that of the first x
            if `scale` is None: then eps bounds the distance to the lower solution at any x, not its gradient.

    ``stationarity`` is that of the projected gradient, ``L |x - P(x - p / L)|``; ``infeasibility`` is ``|grad_y f|``
    at the approximate solution.

    Attributes:
        accepted: ``(x, y)`` of the last point that was not rejected; ``algo.x`` is where its gradient leads.
        adjoint: q there, ``init`` of :func:`hypergradient`.
        lipschitz: L; 0 before a gradient was seen.
        tolerance: eps of the next step.
        counts: Also ``"rejected"`` steps.

    Raises:
        ValueError: For bad input, naming the argument; in a step for gradients that are not finite. The method is then
            as before the step, also for the next one.
        SolveError: In a step where the lower problem or the adjoint system has no solution.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import HOAG, Bilevel
        >>> X, t = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 2.0])
        >>> ridge = Bilevel(  # one penalty e^x for each feature
        ...     upper=lambda x, y, batch: (y - torch.tensor([0.8, 0.2])).square().sum(),
        ...     lower=lambda x, y, batch: (X @ y - t).square().sum() + (x.exp() * y.square()).sum(),
        ...     project_upper=lambda x: x.clamp(-6, 6),
        ... )
        >>> algo = HOAG(ridge, torch.zeros(2), torch.zeros(2))
        >>> for _ in range(60):
        ...     stats = algo.step()
        >>> algo.x.exp()  # y = 4 / (4 + e^x)
        tensor([ 1.0, 16.0])

    Source: F. Pedregosa, Hyperparameter optimization with approximate gradient, 2016, algorithm 1 and section 4.

    Departure: the corrected rule. By the published one L falls for its slack alone where the upper problem is convex,
    since an exact step brings less than ``L D^2``, and F may rise for ever, by less than a fifth a step or within a
    slack that lets x wander about. Both rules compare both ends of one move, go back at a rejection, solve a point
    again after three of them (its own value may have been the wrong one), and measure F in units of ``|F_0|``, so that
    units do not matter.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"project_upper"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        tolerances: float | Schedule = Exponential(1e-3, 0.9),
        solver: IterativeSolver = LBFGS(history=10, max_steps=10_000),
        adjoint: Implicit = Implicit(CG()),
        lipschitz: float | None = None,
        rule: Literal["corrected", "published"] = "corrected",
        scale: float | None = None,
        convexity: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(problem, x, y)
        self.tolerances = as_schedule("tolerances", tolerances)
        if not isinstance(solver, IterativeSolver) or solver.finds not in ("minimum", "root"):
            raise ValueError(
                f"solver: expected one of difflayers.implicit that finds a minimum or a root, got {solver}"
            )
        if not isinstance(adjoint, Implicit):
            raise ValueError(f"adjoint: expected Implicit, got {type(adjoint).__name__}")
        if convexity is not None and not callable(convexity):
            raise ValueError(f"convexity: expected None or a function of x, got {type(convexity).__name__}")
        self.solver, self._adjoint = solver, definite(adjoint, self.y_variables.size)
        if rule not in ("corrected", "published"):
            raise ValueError(f'rule: expected "corrected" or "published", got {rule!r}')
        self.rule, self.convexity = rule, convexity
        zero = torch.zeros_like(self.state["x"])
        self.state.update(last_x=zero, p=zero, q=torch.zeros_like(self.state["y"]))
        self.plain.update(
            lipschitz=None if lipschitz is None else check_number("lipschitz", lipschitz),
            scale=None if scale is None else check_number("scale", scale),
            halvings=0, in_a_row=0, unit=None, value=None, epsilon=None,
        )  # fmt: skip

    @property
    def accepted(self) -> tuple[Any, Any]:
        """The last point that was not rejected, as trees; dicts from names to tensors for modules."""
        x = self.state["last_x" if self.steps else "x"]
        return self.x_variables.present(x), self.y_variables.present(self.state["y"])

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["q"])

    @property
    def lipschitz(self) -> float:
        """One over the step length."""
        return self.plain["lipschitz"] or 0.0

    @property
    def tolerance(self) -> float:
        """That of the next step."""
        floor = max(_FLOOR, 16 * torch.finfo(self.state["y"].dtype).eps)
        return max(self.tolerances(self.steps) * 0.5 ** self.plain["halvings"], floor)

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, epsilon = self.state["x"], self.tolerance
        y, lower, slope = self._lower_solution(at, x, self.state["y"], epsilon)
        upper = at.upper(x, y)
        q = solve_adjoint("HOAG", slope, upper.y, self._linear_solver(epsilon), self.state["q"])
        p = upper.x - slope.cross(q)
        value = float(upper.value)
        if not math.isfinite(value) or not bool(torch.isfinite(p).all()):
            check_finite([("upper output", upper.value), ("hypergradient", p)])
        correction = 0.0 if self.rule == "published" else float((q * slope.value.detach()).sum())
        rejected = self._judge(x, p, value - correction, epsilon)
        again = False
        if rejected:  # and after three in a row, what is known of the base may be too coarse: it is solved again
            self.plain["in_a_row"] += 1
            again = self.plain["in_a_row"] % _PATIENCE == 0
            self.plain["halvings"] += again or self.rule == "published"
            self.counts["rejected"] += 1
        else:
            self.state.update(last_x=x, p=p, y=y, q=q)
            self.plain.update(epsilon=epsilon, in_a_row=0)
        base, L = self.state["last_x"], self.lipschitz
        x_next = base if again or not L else self._onto_upper(base - self.state["p"] / L)
        self.state["x"] = x_next
        return Seen(upper.value, lower, norm(base - x_next) * L, norm(slope.value.detach()))

    def _judge(self, x: Tensor, p: Tensor, value: float, epsilon: float) -> bool:
        """The next L from the value at x, and whether x is rejected."""
        known, L, size = self.plain, self.plain["lipschitz"], float(norm(p))
        first = known["value"] is None
        if first:
            known["unit"] = abs(value) or 1.0
        unit, rejected = known["unit"], False
        if L is None and size > 0:
            L = size / math.sqrt(p.numel()) if size > 1e-3 * unit else unit
        move = x - self.state["last_x"]
        length = 1.0 if first else float(norm(move))
        if first and L is not None:  # nothing to compare with
            L *= 0.95
        elif L is not None and length > 0:  # else it is the same point, solved again
            rise, error = value - known["value"], 1.25 * known["epsilon"] * length
            leap = rise >= _GROWTH * abs(known["value"])
            if self.rule == "published":
                slack = unit * (0.25 * epsilon + error)
                rejected = leap and rise > slack
                L *= 2.0 if rejected else 0.95 if rise <= slack - L * length**2 else 1.0
            else:
                last_p, rounding = self.state["p"], 16 * torch.finfo(x.dtype).eps * abs(value)
                slack = 0.25 * unit * epsilon**2 + error * float(norm(last_p)) + rounding
                bend = float(((p - last_p) * move).sum()) / length**2
                rejected = rise > slack and (leap or float((p * move).sum()) > 0)
                if rejected:
                    L *= min(max(1.25 * bend / L, 2.0), 10.0)
                else:
                    L *= 1.25 if bend > L else 0.95 if 2 * bend > L else 0.7
        known["lipschitz"] = L
        if not rejected:
            known["value"] = value
        return rejected

    def _lower_solution(self, at: Evaluation, x: Tensor, y: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Recorded]:
        """A y near the lower solution, the lower objective and its gradient there."""
        value, slope = at.slope(x, y)
        size = float(norm(slope.value.detach()))
        if not math.isfinite(size):
            check_finite([("lower: gradient in y", slope.value.detach())])
        factor = self._convexity(x)
        if self.plain["scale"] is None:
            self.plain["scale"] = size / factor
        tolerance = epsilon * self.plain["scale"] * factor
        if size <= tolerance:
            return y, value, slope
        solver = replace(self.solver, atol=tolerance)
        xs, known = self.x_variables.split(x), [(value, slope.value.detach())]

        def objective(z: Tensor) -> Tensor:
            if known and isinstance(solver, LBFGS):  # at the start, where value and gradient are known
                f, g = known.pop()
                return f + (g * (z - z.detach())).sum()
            at.counts["lower"] += 1
            return at.objectives["lower"](xs, self.y_variables.split(z), at.batches["lower"])

        def solve() -> tuple[Tensor, Info]:
            if isinstance(solver, LBFGS):  # without the last digits, which its own `solve` would add
                return iterate(_warm(solver, slope), objective, y)
            return solver.solve(objective if solver.finds == "minimum" else gradient_of(objective), y)

        with torch.no_grad():
            found, info = timed("HOAG", "lower", solve)
        y = settle(found, info, "raise", name="HOAG", phase="lower")
        return y, *at.slope(x, y)

    def _convexity(self, x: Tensor) -> float:
        if self.convexity is None:
            return 1.0
        tree = self.x_variables.present(x)
        with torch.no_grad():
            value = self.convexity(tree)
        number = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"convexity output: expected a positive number, got {value!r}")
        return number

    def _linear_solver(self, epsilon: float) -> LinearSolver:
        inner = self._adjoint.linear_solver or CG()
        if hasattr(inner, "rtol"):
            inner = replace(inner, rtol=epsilon)  # type: ignore[type-var]
        return replace(self._adjoint, linear_solver=inner).solver(self.y_variables.size, True)
