r"""What every bilevel method asks of a problem: gradients of both levels and products with second derivatives, counted.

With :math:`H = \nabla^2_{yy} f` and :math:`J = \nabla^2_{xy} f` (rows of x, columns of y) at one point and batch: the
graph of :math:`\nabla_y f` is built once, each product is one backward pass through it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from difflayers.linalg._autodiff import gradients

from ._curvature import Curvature
from ._group import announced, group_of
from ._objective import Objective
from ._problem import Bilevel, two_batches
from ._variables import Variables, check_devices


class Recorded:
    """A vector-valued function of y and x at one point, with its graph: products with both Jacobians.

    Args:
        value: The function, a vector.
        y: Leaves it is differentiated in first, of as many numbers as `value`.
        x: The others.
        symmetric: The Jacobian in y is a Hessian.
        counts: Where products are counted.
        normals: ``(m, n)`` gradients of constraints whose m multipliers follow the n numbers of y; None without.
        curvature: Looks at the curvature that a minimum has, where that is not of the Jacobian itself.
        count: With blocks, how many products with x are means over, where it is not the rows of `value`.

    With blocks `value` is a matrix of one row a block, whose row i depends on row i of y alone; so are the vectors of y
    that come and go, and products with x are means over the blocks.
    """

    def __init__(
        self,
        value: Tensor,
        y: Sequence[Tensor],
        x: Sequence[Tensor],
        symmetric: bool,
        counts: Counter[str],
        normals: Tensor | None = None,
        curvature: Callable[[], Curvature] | None = None,
        count: int | None = None,
    ) -> None:
        self.value, self.y, self.x, self.symmetric, self.counts = value, list(y), list(x), symmetric, counts
        self.normals, self.curvature = normals, curvature
        self.gap = torch.linalg.vector_norm(value.detach(), dim=-1)  # how far from a lower solution
        self.rows = value.shape[0] if value.ndim == 2 else None
        self.count = count or self.rows or 1

    def pull(self, v: Tensor) -> Tensor:
        """The transposed Jacobian in y times v: ``H v``."""
        self.counts["hvp"] += 1
        return self._backward(self.y, v, self.rows)

    def cross(self, v: Tensor) -> Tensor:
        """The transposed Jacobian in x times v: ``J v``."""
        self.counts["cross"] += 1
        product = self._backward(self.x, v)
        return product if self.rows is None else product / self.count

    def push(self, u: Tensor) -> Tensor:
        """The Jacobian in y times u: ``H u`` by one more differentiation where it is not symmetric."""
        if self.symmetric:
            return self.pull(u)
        self.counts["hvp"] += 1
        return self._forward(self.y, u, self.rows)

    def cross_t(self, u: Tensor) -> Tensor:
        """The Jacobian in x times u: ``J^T u``."""
        self.counts["cross_t"] += 1
        product = self._forward(self.x, u)
        return product if self.rows is None else product / self.count

    def matrix(self) -> Tensor:
        """The transposed Jacobian in y, one product per unit vector, all at once; of each block."""
        n = self.value.shape[-1]
        self.counts["hvp"] += n
        eye = torch.eye(n, dtype=self.value.dtype, device=self.value.device)
        rows = () if self.rows is None else (self.rows,)
        if not self.value.requires_grad:
            return eye.new_zeros(*rows, n, n)
        units = eye if self.rows is None else eye.unsqueeze(1).expand(n, self.rows, n)
        parts = torch.autograd.grad(
            self.value, self.y, units, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        lengths = [leaf.numel() if self.rows is None else leaf.numel() // self.rows for leaf in self.y]
        blocks = [
            eye.new_zeros(n, *rows, length) if part is None else part.reshape(n, *rows, length)
            for part, length in zip(parts, lengths, strict=True)
        ]
        return torch.cat(blocks, -1).movedim(0, -1)

    def _backward(
        self, leaves: Sequence[Tensor], v: Tensor, rows: int | None = None, *, create_graph: bool = False
    ) -> Tensor:
        if not self.value.requires_grad:
            return _joined([torch.zeros_like(leaf) for leaf in leaves], rows)
        return _joined(gradients(self.value, leaves, v, retain_graph=True, create_graph=create_graph), rows)

    def _forward(self, leaves: Sequence[Tensor], u: Tensor, rows: int | None = None) -> Tensor:
        probe = torch.zeros_like(self.value).requires_grad_()
        with torch.enable_grad():
            pulled = self._backward(leaves, probe, rows, create_graph=True)  # linear in the probe
        if not pulled.requires_grad:
            return torch.zeros_like(probe)
        return gradients(pulled, probe, u)[0]


class Oracles:
    """Both levels of a problem at one point and one pair of batches, evaluated as far as anybody asks.

    Vectors go in and out flat: ``x_variables.present(v)`` and ``y_variables.present(v)`` give them their structure.

    Args:
        problem: The problem.
        x: Upper variables.
        y: Lower variables.
        batch: None or ``(upper_batch, lower_batch)``.
        counts: A counter to go on with: ``"upper"`` and ``"lower"`` gradients, ``"hvp"``, ``"cross"``, ``"cross_t"``.
    """

    def __init__(
        self, problem: Bilevel, x: Any, y: Any, batch: Any = None, *, counts: Counter[str] | None = None
    ) -> None:
        self.problem, self.counts = problem, Counter() if counts is None else counts
        with announced(problem, x, y):
            self.upper_batch, self.lower_batch = two_batches(batch)
            self.x_variables, self.y_variables = Variables("x", x), Variables("y", y, problem.blocks)
            named = ((v.labels, v.leaves) for v in (self.y_variables, self.x_variables))
            check_devices(pair for labels, leaves in named for pair in zip(labels, leaves, strict=True))
        self.x, self.y = self.x_variables.constants(), self.y_variables.constants()
        self.group = group_of(problem, self.x_variables, self.y_variables)
        self._upper = Objective(problem.upper, "upper", self.x_variables, self.y_variables, group=self.group)
        self._lower = Objective(problem.lower, "lower", self.x_variables, self.y_variables, group=self.group)
        self._upper.refuse_captured(self.upper_batch)
        self._lower.refuse_captured(self.lower_batch)
        self._upper_result: tuple[Tensor, Tensor, Tensor] | None = None
        self._value: Tensor | None = None
        self._slope: Recorded | None = None

    def upper(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, gradient in x and gradient in y of the upper objective; with blocks, of the mean and of each one."""
        if self._upper_result is None:
            self.counts["upper"] += 1
            with torch.enable_grad():
                value = self._upper(self.x, self.y, self.upper_batch)
            check_graph("upper", value)
            parts, k = _gradient(value, [*self.x, *self.y]), len(self.x)
            mean, in_x = self._upper.mean(value), self._upper.of_mean(_joined(parts[:k]), value)
            self._upper_result = mean, in_x, self.y_variables.join(parts[k:])
        return self._upper_result

    def lower(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, gradient in x and gradient in y of the lower objective."""
        slope, value = self.slope(), self._value
        assert value is not None
        in_x = _joined(_gradient(value, self.x, retain_graph=True))
        return self._lower.mean(value), self._lower.of_mean(in_x, value), slope.value.detach()

    def slope(self) -> Recorded:
        """The lower gradient in y with its graph."""
        if self._slope is None:
            self.counts["lower"] += 1
            with torch.enable_grad():
                self._value = self._lower(self.x, self.y, self.lower_batch)
                check_graph("lower", self._value)
                slope = self.y_variables.join(_gradient(self._value, self.y, create_graph=True))
            self._slope = Recorded(slope, self.y, self.x, True, self.counts, count=self._lower.rows)
        return self._slope

    def hvp(self, v: Tensor) -> Tensor:
        """``H v``."""
        return self.slope().pull(v)

    def cross(self, v: Tensor) -> Tensor:
        """``J v``, a vector of x."""
        return self.slope().cross(v)

    def cross_t(self, u: Tensor) -> Tensor:
        """``J^T u``, a vector of y."""
        return self.slope().cross_t(u)

    def x_of_blocks(self) -> list[Tensor]:
        """The leaves of x for functions of both beside the objectives: derivatives by x are those of all processes."""
        if self.group is None or self.problem.blocks is None:
            return self.x
        with torch.enable_grad():
            return self.group.of_blocks(self.x)

    def lower_gradients_at(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the lower objective in x and in y at another vector y, same x, batch and random numbers."""
        self.counts["lower"] += 1
        leaves = [leaf.detach().requires_grad_() for leaf in self.y_variables.split(y)]
        with torch.enable_grad():
            value = self._lower(self.x, leaves, self.lower_batch)
        check_graph("lower", value)
        parts, k = _gradient(value, [*self.x, *leaves]), len(self.x)
        return self._lower.of_mean(_joined(parts[:k]), value), self.y_variables.join(parts[k:])

    def optimality(self, damping: float = 0.0) -> Recorded:
        """What is zero at a lower solution, as a function of y (and of multipliers): see :mod:`._optimality`.

        Next to a prox or a constraint, `damping` is added to the Hessian.
        """
        from ._optimality import kkt_residual, prox_residual

        if self.problem.proximal is not None:
            return prox_residual(self, self.problem.proximal, damping)
        if self.problem.constraint is not None:
            return kkt_residual(self, self.problem.constraint, damping)
        return self.slope()

    def objective_of_constraint(self, constraint: Callable[..., Any]) -> Objective:
        """The constraint as a function of leaves."""
        both = self.x_variables, self.y_variables
        function = Objective(constraint, "constraint", *both, scalar=False, group=self.group)
        function.refuse_captured()
        return function


def check_graph(name: str, value: Tensor) -> None:
    """Refuses a value that nothing can be differentiated through."""
    if not value.requires_grad:
        raise ValueError(
            f"{name}: expected a differentiable function of x and y, got a value without a graph (it uses neither, or "
            "was computed under no_grad or from `.item()` or NumPy)"
        )


def _gradient(
    value: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool | None = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    of_sum = None if value.ndim == 0 else torch.ones_like(value)
    parts = gradients(value, leaves, of_sum, retain_graph=retain_graph, create_graph=create_graph)
    return tuple(part.to_dense() if part.layout is torch.sparse_coo else part for part in parts)


def _joined(leaves: Sequence[Tensor], rows: int | None = None) -> Tensor:
    if rows is None:
        flat = [leaf.reshape(-1) for leaf in leaves]
    else:
        flat = [leaf.reshape(rows, leaf.numel() // rows) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)
