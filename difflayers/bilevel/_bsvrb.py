r"""BSVRB: many lower problems that share x, of which a step sees a few, with estimators that remember the rest.

For the sampled blocks i, with gradients at this and at the last point of the run on the same batch,

.. math:: h_i \leftarrow (1 - \alpha) h_i + \alpha g_i + \gamma (g_i - g_i^{last}), \qquad
    \gamma = \frac{m - I}{I (1 - \alpha)} + 1 - \alpha

(MSVR): h_i is off by e before; the true gradient changes by D. If i is sampled, with probability I / m, it is off by
:math:`(1 - \alpha) e + (\gamma - 1 + \alpha) D` after, else by e - D: this gamma is the one for which the mean square
has no product of e and D.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._method import Method, Seen, norm
from ._options import check_number
from ._problem import Bilevel
from ._schedules import Constant, Power, Schedule, as_schedule


class BSVRB(Method):
    r"""Blockwise variance-reduced steps on the lower problems, their adjoints and the hypergradient.

    Solves ``min_x 1/m sum_i upper_i(x, y_i*(x))`` where ``y_i*(x)`` minimises a strongly convex ``lower_i(x, .)``: a
    :class:`Bilevel` with ``blocks=m``. ``algo.step(upper_batch, lower_batch, blocks=index)`` sees I of the blocks,
    drawn uniformly, all at the old point: h_i tracks ``grad_y f_i`` and ``y_i -= tau h_i``; u_i tracks ``H_i v_i -
    grad_y F_i`` and ``v_i -= tau' u_i``; z tracks the mean of ``grad_x F_i - J_i v_i`` and ``x -= eta z``. The others
    keep their y, v, h and u to the last bit. Each direction is evaluated twice, at this and at the last point on the
    same batches: two gradients of each level and two products with H and J a step.

    With all blocks in every step and the same batches it is :class:`SOBA`.

    Args:
        problem: The problem, with ``blocks``; of its other optional parts `project_upper`.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables, tensors of shape ``(m, ...)``.
        step: eta, of x.
        step_lower: tau, of y; below about ``I / (m L_f)``, since a change of y is made up for by gamma.
        step_adjoint: tau', of v; alike.
        rate: alpha of h and u, in (0, 1): how much of a new gradient they take. Noise of batches is left with a
            variance of ``alpha / (2 - alpha)`` times its own.
        rate_upper: The same of z (STORM). Falling with the square of `step` it takes away what the choice of the blocks
            does to x; constants leave x in a neighbourhood.
        radius: Of the ball in which each v_i is kept.

    ``infeasibility`` is the mean over the sampled blocks of ``|grad_y f_i|``.

    Attributes:
        adjoint: v, with the structure of y.

    Raises:
        ValueError: For bad input, naming the argument; in a step for gradients that are not finite. The method is then
            as before the step.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import BSVRB, Bilevel
        >>> t = torch.tensor([0.0, 1.0, 2.0, 5.0])
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - batch).square() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square() / 2,
        ...     blocks=4,
        ... )
        >>> algo = BSVRB(problem, torch.zeros(()), torch.zeros(4))
        >>> generator = torch.Generator().manual_seed(0)
        >>> for _ in range(600):
        ...     index = torch.randperm(4, generator=generator)[:2]
        ...     stats = algo.step(t[index], blocks=index)
        >>> bool((algo.x - 1).abs() < 0.1)  # 2 x is to be the mean of t
        True

    Source: Q. Hu, Z.-H. Qiu, Z. Guo, L. Zhang, T. Yang, Blockwise Stochastic Variance-Reduced Methods with Parallel
    Speedup for Multi-Block Bilevel Optimization, 2023, algorithm 2 (v2).

    Departure: the estimators of a block start with the gradient of its first sample.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"project_upper", "blocks"})
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule = Power(0.05, -1 / 3),
        step_lower: float | Schedule = Constant(0.2),
        step_adjoint: float | Schedule = Constant(0.2),
        rate: float | Schedule = Power(0.5, -2 / 3),
        rate_upper: float | Schedule = Power(0.5, -2 / 3),
        radius: float = 1000.0,
    ) -> None:
        super().__init__(problem, x, y)
        self.eta, self.tau = as_schedule("step", step), as_schedule("step_lower", step_lower)
        self.tau_v = as_schedule("step_adjoint", step_adjoint)
        self.alpha, self.beta = as_schedule("rate", rate), as_schedule("rate_upper", rate_upper)
        for name, schedule in (("rate", self.alpha), ("rate_upper", self.beta)):
            check_number(name, schedule(0), high=1.0)
        self.radius = check_number("radius", radius, ends="(]")
        x_now, y_now = self.state["x"], self.state["y"]
        zeros = torch.zeros_like(y_now)
        self.state.update(
            v=zeros, h=zeros, u=zeros, z=torch.zeros_like(x_now), x_last=x_now, y_last=y_now, v_last=zeros,
            visited=y_now.new_zeros(len(y_now), 1),
        )  # fmt: skip

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["v"])

    def _update(self, at: Evaluation, k: int) -> Seen:
        s, rows = self.state, at.rows
        alpha = check_number("rate", self.alpha(k), high=1.0)
        beta, eta = check_number("rate_upper", self.beta(k), high=1.0), self.eta(k)
        x, y, v = s["x"], s["y"][rows], s["v"][rows]
        values, now = self._directions(at, x, y, v)
        h, u, z = now
        if k > 0:
            _, last = self._directions(at, s["x_last"], s["y_last"][rows], s["v_last"][rows])
            old, share = s["visited"][rows] > 0, len(y) / len(s["y"])
            h = torch.where(old, msvr(s["h"][rows], now[0], last[0], alpha, share), now[0])
            u = torch.where(old, msvr(s["u"][rows], now[1], last[1], alpha, share), now[1])
            z = (1 - beta) * (s["z"] - last[2]) + now[2]
        at.refuse_infinite(lower_gradient_in_y=h, adjoint_direction=u, hypergradient=z)
        v_next = v - self.tau_v(k) * u
        size = torch.linalg.vector_norm(v_next, dim=-1, keepdim=True)
        v_next = v_next * torch.where(size > self.radius, self.radius / size, 1)
        x_next = self._onto_upper(x - eta * z)
        y_next = y - self.tau(k) * h
        self.state.update(
            x=x_next, y=at.put(s["y"], y_next), v=at.put(s["v"], v_next), h=at.put(s["h"], h), u=at.put(s["u"], u),
            z=z, x_last=x, y_last=s["y"], v_last=s["v"], visited=at.put(s["visited"], torch.ones_like(y[:, :1])),
        )  # fmt: skip
        return Seen(*values, norm(x - x_next) / eta, torch.linalg.vector_norm(now[0], dim=-1).mean())

    def _directions(
        self, at: Evaluation, x: Tensor, y: Tensor, v: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Both values, and the directions of y, v (a row a block) and x."""
        upper, (lower, slope) = at.upper(x, y), at.slope(x, y)
        bend, cross = slope.pull(v) - upper.y, upper.x - slope.cross(v)
        return (upper.value, lower), (slope.value.detach(), bend, cross)


def msvr(estimate: Tensor, now: Tensor, last: Tensor, rate: float, share: float) -> Tensor:
    """The estimator of a sampled block: `now` and `last` on one sample, `share` of the blocks are sampled a step."""
    gamma = (1 - share) / (share * (1 - rate)) + 1 - rate
    return (1 - rate) * estimate + rate * now + gamma * (now - last)
