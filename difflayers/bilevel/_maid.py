r"""MAID: lower problem and adjoint as accurate as the next certified decrease of the upper objective needs.

With :math:`|\hat y - y^*| \le \varepsilon` and an adjoint residual of at most :math:`\delta`, both are tightened until
the error bound :math:`\omega` of the hypergradient p is below :math:`(1 - \eta) |p|`. Then
:math:`x^+ = x - \beta \rho^i p` for the first i at which

.. math:: F(x^+, \hat y^+) + s^+ - F(x, \hat y) + s \le -c\, \beta \rho^i |p|^2, \qquad
    s = |\nabla_y F|\, \varepsilon + \tfrac{L_F}{2} \varepsilon^2,

where s bounds :math:`|F(x, \hat y) - \Phi(x)|`, so that :math:`\Phi` decreases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_finite
from difflayers._solution import Solution, SolveError, Status
from difflayers.implicit import LBFGS
from difflayers.linalg import CG

from ._error_bound import Constants, Estimates, Smoothness, error_bound
from ._evaluation import Evaluation, Gradient
from ._hypergradient import _AdjointSystem
from ._lower_solve import Descent, descend
from ._method import Method, Seen, StepStats, norm
from ._oracles import Recorded
from ._problem import Bilevel

_SEARCHES = 3  # in one step
_TRIALS = 10  # of the first one
_LOWER = (
    "(a) a lower objective that is not strongly convex or has no minimum at this x, (b) too few steps, "
    "solver=LBFGS(max_steps=...), (c) NaN in the data"
)
_ADJOINT = "(a) a lower objective that is not strongly convex: add a ridge to `lower`, (b) NaN in the data"


@dataclass(frozen=True)
class MAIDStats(StepStats):
    """What one step of :class:`MAID` saw.

    Attributes:
        outcome: ``"moved"``; ``"stationary"``: the true hypergradient is certified to be at most ``tol`` in norm;
            ``"exhausted"``: rounding does not let the hypergradient be any more accurate; ``"line search failed"``. x
            has moved in the first case alone.
        epsilon: Accuracy of the lower solution that was asked for last.
        delta: That of the adjoint.
        error: The bound omega on the error of the hypergradient.
        length: Of the step along it, 0 where there was none.
        trials: Points at which the line searches solved the lower problem.
    """

    outcome: str
    epsilon: float
    delta: float
    error: float
    length: float
    trials: int


class _Point(NamedTuple):
    """A point with a lower solution, its adjoint, and what they are worth."""

    p: Tensor
    mapping: Tensor  # p, or the projected step over its length
    upper: Gradient
    lower: Tensor
    constants: Constants
    distance: float
    error: float
    rounded: bool  # the lower solution is as good as its dtype
    outcome: str


class MAID(Method):
    r"""Descent on the upper objective with a lower problem solved only as well as the next step needs.

    Solves ``min_x upper(x, y*(x))`` for a strongly convex lower objective, full batches (the same in every step). One
    step is one outer iteration: lower problem and adjoint are tightened until the hypergradient is a direction of
    descent, a line search ends at the first point where the true objective is certified to have decreased, and the
    accuracies are relaxed again. Neither accuracy nor step length has to be tuned.

    All rests on an error bound with the constants of :class:`Smoothness`. What they are not told is estimated, which
    are heuristics: ``strong_convexity`` by half of the smallest Ritz value of a few Lanczos steps; ``upper``,
    ``upper_in_x`` and ``cross_norm`` (beyond 16 upper variables) by power iterations, at the present point; ``hessian``
    and ``cross`` by difference quotients along two directions, of which a fading maximum is kept.

    Args:
        problem: The problem, without prox, constraint and blocks.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        smoothness: Known constants; certificates are proofs where all are given.
        epsilon: First accuracy of the lower solution, ``|y - y*|``.
        delta: First accuracy of the adjoint, ``|H q - grad_y upper|``.
        step: beta, first trial length.
        tighten: tau in (0, 1), factor of both accuracies where they do not suffice.
        relax: nu of at least 1, their factor after a step.
        backtrack: rho in (0, 1), from one trial length to the next; an accepted one is followed by 10/9 of it.
        angle: eta in (0, 1): the error of the hypergradient is at most ``1 - eta`` of its norm.
        decrease: c below eta: of ``length * |p|^2``, the least decrease. None: ``eta ** 2``.
        tol: Stationary is a point whose true hypergradient is certainly not longer.
        solver: Of the lower problem, its tolerances apart.
        linear_solver: Of the adjoint, its tolerances apart.

    ``stationarity`` is ``|p|`` (with ``project_upper`` that of the projected step), ``infeasibility`` the bound on
    ``|y - y*|``, both where the step started from. All work is in ``counts``, also that of estimates and of trials.

    Attributes:
        adjoint: q, with the structure of y; ``init`` of :func:`hypergradient`.

    Raises:
        ValueError: For bad input, naming the argument.
        SolveError: From a step whose lower problem has no solution near y; the method is then as before.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import MAID, Bilevel
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = MAID(problem, torch.zeros(1), torch.zeros(1), tol=1e-2)
        >>> while (stats := algo.step()).outcome == "moved":
        ...     pass
        >>> stats.outcome
        'stationary'
        >>> algo.x
        tensor([0.50])

    Source: M. S. Salehi, S. Mukherjee, L. Roberts, M. J. Ehrhardt, An adaptively inexact first-order method for bilevel
    optimization with application to hyperparameter learning, 2023, algorithms 3.1 and 3.2.

    Departure: certificates are those of the accuracies reached, where these are better than what was asked for, and of
    the adjoint at hand where that is shorter than ``|grad_y upper| / mu``. Accuracy that no trial could do with, by the
    linear model of the decrease, is tightened before it; a failed line search tightens the lower problem alone, and the
    next one starts below the lengths at which the upper objective did not fall at all. With ``project_upper`` the
    projected step takes the place of ``p``.
    """

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        smoothness: Smoothness = Smoothness(),
        epsilon: float = 0.1,
        delta: float = 0.1,
        step: float = 0.1,
        tighten: float = 0.5,
        relax: float = 1.05,
        backtrack: float = 0.5,
        angle: float = 1e-4,
        decrease: float | None = None,
        tol: float = 1e-6,
        solver: LBFGS = LBFGS(),
        linear_solver: CG = CG(),
    ) -> None:
        super().__init__(problem, x, y)
        for name, value in (("epsilon", epsilon), ("delta", delta), ("step", step)):
            _check(name, value, 0, math.inf)
        for name, value in (("tighten", tighten), ("backtrack", backtrack), ("angle", angle)):
            _check(name, value, 0, 1)
        self.relax = _check("relax", relax, 1, math.inf, closed=True)
        self.decrease = angle**2 if decrease is None else _check("decrease", decrease, 0, angle)
        self.tol = _check("tol", tol, 0, math.inf, closed=True)
        for name, option, kind in (
            ("smoothness", smoothness, Smoothness), ("solver", solver, LBFGS), ("linear_solver", linear_solver, CG)
        ):  # fmt: skip
            if not isinstance(option, kind):
                raise ValueError(f"{name}: expected {kind.__name__}(...), got {type(option).__name__}")
        self.tighten, self.backtrack, self.angle = tighten, backtrack, angle
        self.solver, self.linear_solver = solver, linear_solver
        self.estimates = Estimates(smoothness)
        self.state["q"] = torch.zeros_like(self.state["y"])
        self.state.update(self.estimates.vectors(self.state["x"], self.state["y"]))
        self.plain.update(epsilon=float(epsilon), delta=float(delta), step=float(step), stiffness=0.0)
        self.plain.update(self.estimates.numbers())
        self._seen: dict[str, Any] = {}

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["q"])

    def step(
        self, upper_batch: Any = None, lower_batch: Any = None, *, blocks: Tensor | Sequence[int] | None = None
    ) -> MAIDStats:
        """Takes one outer iteration.

        Args:
            upper_batch: Handed to the upper objective as it is.
            lower_batch: Handed to the lower objective.
            blocks: None.

        Returns:
            :class:`MAIDStats` of the point the step started from.

        Raises:
            SolveError: Where the lower problem or the adjoint at this x was not solved; all is then as before.
        """
        stats = super().step(upper_batch, lower_batch, blocks=blocks)
        return MAIDStats(**vars(stats), **self._seen)

    def _update(self, at: Evaluation, k: int) -> Seen:
        if k == 0:
            self.state["x"] = self._onto_upper(self.state["x"])
        searches, trials, length, outcome, constants = 0, 0, 0.0, "", None
        while not outcome:
            here = self._inexact_gradient(at, k == 0, constants)
            constants = here.constants
            epsilon, delta, outcome = self.plain["epsilon"], self.plain["delta"], here.outcome
            if outcome or self._tightened_for_a_decrease(here):
                continue
            tried, length = self._search(at, here, _TRIALS + searches)
            searches, trials = searches + 1, trials + tried
            if length:
                outcome = "moved"
            elif here.rounded or searches == _SEARCHES:
                outcome = "line search failed"
            else:
                self.plain["epsilon"] *= self.tighten
        self._seen = {
            "outcome": outcome, "epsilon": epsilon, "delta": delta, "error": here.error, "length": length,
            "trials": trials,
        }  # fmt: skip
        return Seen(here.upper.value, here.lower, norm(here.mapping), here.lower.new_tensor(here.distance))

    def _inexact_gradient(self, at: Evaluation, first: bool, constants: Constants | None) -> _Point:
        """A hypergradient that is a direction of descent, or the reason why there is none."""
        x, plain = self.state["x"], self.plain
        while True:
            lower, slope, rounded = self._lower_solution(at, x)
            y, gradient = self.state["y"], float(norm(slope.value.detach()))
            upper = at.upper(x, y)
            residual = self._adjoint(slope, upper.y)
            q = self.state["q"]
            p = upper.x - slope.cross(q)
            # estimates are of the step, but in the first one, which may begin far from a lower solution
            steps, last = (20 if first and constants is None else 6), None if first else constants
            constants = self.estimates(at, x, y, slope, q, upper.y, self.state, plain, steps, last)
            distance = gradient / constants.strong_convexity
            error = error_bound(constants, distance, residual, float(norm(q)), float(norm(upper.y)))
            mapping = p
            if self.problem.project_upper is not None:
                mapping = (x - self._onto_upper(x - plain["step"] * p)) / plain["step"]
            size = float(norm(mapping))
            if not math.isfinite(size + error):
                raise FloatingPointError("MAID: the hypergradient or its error bound is not finite")
            rounded = rounded or plain["epsilon"] <= torch.finfo(y.dtype).eps * float(norm(y))
            rough = residual <= plain["delta"] and plain["delta"] > torch.finfo(y.dtype).eps * float(norm(upper.y))
            outcome = ""
            if size + error <= self.tol:
                outcome = "stationary"
            elif error > (1 - self.angle) * size:
                plain["epsilon"] *= 1 if rounded else self.tighten
                plain["delta"] *= self.tighten if rough else 1
                if rough or not rounded:
                    continue
                outcome = "exhausted"
            return _Point(p, mapping, upper, lower, constants, distance, error, rounded, outcome)

    def _tightened_for_a_decrease(self, here: _Point) -> bool:
        """Tightens the lower solution where the linear model says that no step could be certified."""
        size, plain, lipschitz = float(norm(here.mapping)), self.plain, here.constants.upper
        gain, epsilon = plain["step"] * size * (size + here.error), plain["epsilon"]

        def slack() -> float:
            """At both ends of the step, and as much to spare."""
            return 2 * (
                _slack(here.upper, min(epsilon, here.distance), lipschitz) + _slack(here.upper, epsilon, lipschitz)
            )

        if here.rounded or slack() <= gain:
            return False
        while slack() > gain and epsilon > 0:
            epsilon *= self.tighten
        plain["epsilon"] = epsilon
        return True

    def _search(self, at: Evaluation, here: _Point, most: int) -> tuple[int, float]:
        """Backtracks to a certified decrease, and goes there: the number of trials and the length, 0 where x stays."""
        x, y, plain, lipschitz = self.state["x"], self.state["y"], self.plain, here.constants.upper
        old, size = float(here.upper.value), float(norm(here.mapping))
        slack = _slack(here.upper, here.distance, lipschitz)
        first, tried, falls = plain["step"], 0, False
        for i in range(most):
            length = first * self.backtrack**i
            if length * size * (size + here.error) <= slack and not here.rounded:
                break  # shorter ones decrease the objective by less than what is known of it
            tried += 1
            x_next = self._onto_upper(x - length * here.p)
            mu = self.estimates.convexity(at, x_next, y, plain)
            end = self._descend(at, x_next, y, mu * plain["epsilon"]) if 0 < mu < math.inf else None
            if end is not None and end.status == Status.CONVERGED:
                upper = at.upper(x_next, end.y)
                new = float(upper.value)
                rounding = 8 * torch.finfo(x.dtype).eps * (abs(old) + abs(new))
                wanted = self.decrease * float(norm(x - x_next)) ** 2 / length + rounding
                lipschitz = self.estimates.upper(at, x_next, end.y, lipschitz)
                if old - slack - new - _slack(upper, end.gradient / mu, lipschitz) >= wanted:
                    self.state.update(x=x_next, y=end.y)
                    for name in ("epsilon", "delta"):
                        plain[name] *= self.relax
                    plain["step"] = 10 / 9 * length
                    return tried, length
                falls = falls or old - new >= wanted
            if not falls:
                plain["step"] = length * self.backtrack
        return tried, 0.0

    def _lower_solution(self, at: Evaluation, x: Tensor) -> tuple[Tensor, Recorded, bool]:
        """Solves the lower problem at x to the present accuracy; its value there, and the gradient with its graph."""
        y, plain, rounded = self.state["y"], self.plain, False
        value, slope = at.slope(x, y)
        mu = self.estimates.convexity(at, x, y, plain, slope, self.state)
        if not float(norm(slope.value.detach())) <= mu * plain["epsilon"]:
            end = self._descend(at, x, y, mu * plain["epsilon"])
            if end.status != Status.CONVERGED:
                self._refuse_end("the lower problem was not solved", end.y, end.status, end.steps, end.gradient, _LOWER)
            if end.rounded:
                plain["epsilon"] = max(plain["epsilon"], end.gradient / mu)
            self.state["y"], rounded = end.y, end.rounded
            value, slope = at.slope(x, end.y)
        return value, slope, rounded

    def _descend(self, at: Evaluation, x: Tensor, y: Tensor, tolerance: float) -> Descent:
        leaves = at.x.split(x)

        def function(y: Tensor) -> Tensor:
            at.counts["lower"] += 1
            return at.objectives["lower"](leaves, at.y.split(y), at.batches["lower"])

        with torch.no_grad():
            end = descend(self.solver, function, y, tolerance, self.plain["stiffness"])
        self.plain["stiffness"] = end.stiffness or self.plain["stiffness"]
        return end

    def _adjoint(self, slope: Recorded, rhs: Tensor) -> float:
        """Solves the adjoint system to the present accuracy, and returns the residual."""
        solver = replace(self.linear_solver, rtol=0.0, atol=self.plain["delta"])
        system = _AdjointSystem(solver, None, name="MAID", symmetric=True, recorded=slope)
        q, info = solver.solve(system, (), (), rhs, True, self.state["q"])
        status, residual = Status(int(info.status)), float(info.residual)
        if status > Status.MAX_STEPS:
            check_finite([("lower: gradient in y", slope.value.detach()), ("upper: gradient in y", rhs)])
            self._refuse_end(
                "the lower Hessian is not positive definite", q, status, int(info.steps), residual, _ADJOINT
            )
        self.state["q"] = q
        return residual

    def _refuse_end(self, what: str, value: Tensor, status: Status, steps: int, residual: float, causes: str) -> None:
        code, count = (value.new_full((), number, dtype=torch.int64) for number in (int(status), steps))
        raise SolveError(
            f"MAID: {what} at step {self.steps + 1} ({status.name} after {steps} steps, residual {residual:.2e}). "
            f"Likely causes: {causes}. The method is as before the step.",
            Solution(self.y_variables.present(value), code, count, value.new_tensor(residual)),
        )


def _slack(upper: Gradient, distance: float, lipschitz: float) -> float:
    """How far the upper objective can be from that of the lower solution."""
    return float(norm(upper.y)) * distance + lipschitz / 2 * distance**2


def _check(name: str, value: Any, low: float, high: float, closed: bool = False) -> float:
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (low < value < high or (closed and value == low))
    )
    if not inside:
        raise ValueError(f"{name}: expected a number between {low} and {high}, got {value!r}")
    return float(value)
