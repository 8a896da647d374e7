r"""LV-HBA: a lower problem with constraints that both levels share, by its proximal Lagrangian value function.

.. math:: v(x, y, z) = \min_\theta \max_{\lambda \in Z} f(x, \theta) + \lambda^T g(x, \theta)
    + \tfrac{1}{2 \gamma_1} \|\theta - y\|^2 - \tfrac{1}{2 \gamma_2} \|\lambda - z\|^2

is at most f where g holds, with equality at the lower solutions and their multipliers z. The method descends
:math:`F / c + f - v` over :math:`\{g \le 0\}` with the gradients of v that the envelope theorem gives.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._group import group_of
from ._method import Method, Seen, norm
from ._objective import Objective
from ._options import check_number
from ._oracles import _gradient, _joined
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class LVHBA(Method):
    r"""Single-loop, Hessian-free method for lower problems with coupled constraints.

    Solves ``min_{x, y} upper(x, y)`` over the solutions of ``min_y f(x, y)  subject to  g(x, y) <= 0`` (or ``= 0``),
    f and g convex in y, where `constraint` of the problem is g. Every step is a proximal gradient step of ``theta``, of
    its multipliers ``lambda``, of ``(x, y)``, projected onto ``{g <= 0}``, and of ``z`` towards lambda: iterates
    satisfy the constraint.

    The penalised problem of the last ``c`` is what is solved; infeasibility falls as c grows. Rows of the constraint
    are scaled to gradients of norm one, :attr:`multipliers` are those of the constraint as it was given.

    Args:
        problem: The problem, with a constraint; of its optional parts also `project_joint`, the projection onto the set
            where the constraint holds (and x and y are in sets of their own; None: the orthogonal projection, for
            affine equalities), and `project_lower`, the projection of theta where y has a set of its own.
        x: Upper variables: tensor, pytree of tensors, or module; projected with y, if the constraint is violated.
        y: Lower variables; start of theta too.
        step: alpha, of x and y; below `step_inner`: where f is flat, theta has to follow y faster than y leaves it.
        step_inner: eta, of theta and lambda; with ``|grad_y g| = s`` it is stable below
            ``2 / gamma_1 / (1 / gamma_1^2 + s^2)``.
        step_multiplier: beta, of z; below ``2 gamma_2``.
        proximal: ``(gamma_1, gamma_2)``.
        penalty: c, that grows with an exponent of less than 1/2.
        bound: Largest (scaled) multiplier, of Z.

    ``infeasibility`` is ``|y - theta| / gamma_1``, the norm of the gradient of v in y.

    Raises:
        ValueError: For bad input, naming the argument; no `project_joint` for constraints that are not affine
            equalities.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import LVHBA, Bilevel
        >>> problem = Bilevel(  # y = (1 - x, x)
        ...     upper=lambda x, y, batch: (y[0] - 0.3).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y[1] - x).square().sum() / 2,
        ...     constraint=lambda x, y: y.sum() - 1,
        ...     equality=True,
        ... )
        >>> algo = LVHBA(problem, torch.zeros(1), torch.zeros(2), step=0.2, step_inner=0.2)
        >>> for _ in range(1000):
        ...     stats = algo.step()
        >>> algo.x, algo.y
        (tensor([0.7000]), tensor([0.3000, 0.7000]))

    Source: W. Yao, C. Yu, S. Zeng, J. Zhang, Constrained Bi-Level Optimization: Proximal Lagrangian Value Function
    Approach and Hessian-free Algorithm, 2024, algorithm 1.

    Departure: rows are scaled; z starts from zero (a published toy starts it at the known multiplier).
    """

    takes: ClassVar[frozenset[str]] = frozenset({"constraint", "project_joint", "project_lower"})
    needs: ClassVar[frozenset[str]] = frozenset({"constraint"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Constant(0.05),
        step_inner: float | Schedule = Constant(0.1),
        step_multiplier: float | Schedule = Constant(0.5),
        proximal: tuple[float, float] = (1.0, 1.0),
        penalty: float | Schedule = Power(1.0, 0.3),
        bound: float = 1000.0,
    ) -> None:
        super().__init__(problem, x, y)
        self.alpha, self.eta = as_schedule("step", step), as_schedule("step_inner", step_inner)
        self.beta, self.penalty = as_schedule("step_multiplier", step_multiplier), as_schedule("penalty", penalty)
        if not (isinstance(proximal, tuple) and len(proximal) == 2 and min(proximal) > 0):
            raise ValueError(f"proximal: expected a pair of numbers above 0, got {proximal!r}")
        self.proximal, self.bound = proximal, check_number("bound", bound, ends="(]")
        rows = self._rows(self.state["x"], self.state["y"])
        size = torch.linalg.vector_norm(rows, dim=-1)
        self.state["scale"] = torch.where(size > 0, 1 / size, 1)
        if problem.project_joint is None:
            there = self._rows(self.state["x"] + 1, self.state["y"] - 1)
            close = torch.finfo(rows.dtype).eps ** 0.5 * size.unsqueeze(-1)
            if not problem.equality or bool(((rows - there).abs() > close).any()):
                raise ValueError(
                    "project_joint: expected a projection onto the set where the constraint holds, got None, which is "
                    "for affine equalities"
                )
            self._back = torch.linalg.pinv(rows * self.state["scale"].unsqueeze(-1))
        self.state["x"], self.state["y"] = self._feasible(self.state["x"], self.state["y"])
        self.state["y"] = self.state["y"].clone()
        self._write_modules()
        self.state["theta"] = self.state["y"].clone()
        self.state["lambda"], self.state["z"] = torch.zeros_like(size), torch.zeros_like(size)

    @property
    def multipliers(self) -> Tensor:
        """The multipliers of the constraint, flat, as it was given."""
        return self.state["lambda"] * self.state["scale"]

    def _update(self, at: Evaluation, k: int) -> Seen:
        x, y, z, theta, dual = (self.state[name] for name in ("x", "y", "z", "theta", "lambda"))
        alpha, eta, c = self.alpha(k), self.eta(k), self.penalty(k)
        gamma_1, gamma_2 = self.proximal
        g, _, g_y = self._constraint(x, theta, dual)
        moved = theta - eta * (at.lower_in_y(x, theta) + g_y + (theta - y) / gamma_1)
        dual = self._onto_bounds(dual + eta * (g - (dual - z) / gamma_2))
        theta = self._prox(moved, x, eta)
        upper, lower = at.upper(x, y), at.lower(x, y)
        _, g_x, _ = self._constraint(x, theta, dual)
        d_x = upper.x / c + lower.x - at.lower_in_x(x, theta) - g_x
        d_y = upper.y / c + lower.y - (y - theta) / gamma_1
        x_next, y_next = self._feasible(x - alpha * d_x, y - alpha * d_y)
        z = self._onto_bounds(z + self.beta(k) * (dual - z) / gamma_2)
        gap = norm(y - theta) / gamma_1
        self.state.update({"x": x_next, "y": y_next, "z": z, "theta": theta, "lambda": dual})
        return Seen(upper.value, lower.value, norm(x - x_next, y - y_next) / alpha, gap)

    def _constraint(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scaled constraint, and the gradients in x and y of its product with weights."""
        xs = [leaf.detach().requires_grad_() for leaf in self.x_variables.split(x)]
        ys = [leaf.detach().requires_grad_() for leaf in self.y_variables.split(y)]
        with torch.enable_grad():
            g = self._function()(xs, ys).reshape(-1) * self.state["scale"]
            product = (weights * g).sum()
        parts = _gradient(product, [*xs, *ys])
        self.counts["constraint"] += 1
        return g.detach(), _joined(parts[: len(xs)]), _joined(parts[len(xs) :])

    def _rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradients of all rows of the constraint in ``(x, y)``."""
        leaves = [leaf.detach().requires_grad_() for leaf in (*self.x_variables.split(x), *self.y_variables.split(y))]
        k = len(self.x_variables.leaves)
        with torch.enable_grad():
            g = self._function()(leaves[:k], leaves[k:]).reshape(-1)
        if not g.requires_grad:
            raise ValueError("constraint: expected a function of x and y, got one that uses neither")
        return torch.stack([_joined(_gradient(row, leaves, retain_graph=True)) for row in g])

    def _function(self) -> Objective:
        assert self.problem.constraint is not None
        both = self.x_variables, self.y_variables
        group = group_of(self.problem, *both)
        function = Objective(self.problem.constraint, "constraint", *both, scalar=False, group=group)
        function.refuse_captured()
        return function

    def _feasible(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The projection onto the set where the constraint holds."""
        with torch.no_grad():
            if self.problem.project_joint is not None:
                return self._onto_joint(x, y)
            g = self._function()(self.x_variables.split(x), self.y_variables.split(y)).reshape(-1) * self.state["scale"]
            w = torch.cat([x, y]) - self._back @ g
            return w[: x.numel()], w[x.numel() :]

    def _onto_bounds(self, dual: Tensor) -> Tensor:
        return dual.clamp(-self.bound if self.problem.equality else 0.0, self.bound)
