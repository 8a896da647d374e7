r"""Distillation by transport between what a student and a teacher say about the samples of a batch.

.. math:: \langle W, P \rangle, \qquad P = \arg\min_{P 1 = 1/B, \; P^T 1 = 1/B} \langle W, P \rangle
    + \epsilon \sum P \log P, \qquad W_{ij} = \| p^s_i - p^t_j \|_1

with the probabilities :math:`p = \mathrm{softmax}(\text{logits} / T)` of both. The loss is not the optimal value: the
entropy is no part of it, and its derivative is not the plan. It moves with the plan too,

.. math:: d \langle W, P \rangle = \langle P, dW \rangle + \langle W, dP \rangle,

for which :func:`sinkhorn` has the exact derivative, whatever number of iterations was needed.

X. Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, 2024.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype, renamed
from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import solution_map
from difflayers.linalg._autodiff import autocast_off

from ._costs import Cosine, Cost, cost_of_pairs
from ._coupling import plan_unless_failed, prepare
from ._manhattan import Manhattan
from ._sinkhorn_solve import problem_for
from ._solvers import TransportSolver

Reduction = Literal["mean", "sum", "none"]


def sinkhorn_distillation(
    student: Tensor,
    teacher: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor = 0.1,
    cost: Cost = Cosine(),
    solver: TransportSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The cost of moving a student's hidden states to a teacher's, by the entropic plan between all pairs of them.

    Solves ``<W, P>`` for ``P = argmin <W, P> + eps KL(P | a b^T) s.t. P 1 = a, P^T 1 = b`` with ``W = cost(student,
    teacher)``. What is matched with each other stands in the dimension before the last; everything before that is a
    problem of its own:

    - ``(B, d)``: the samples of a batch, as in the paper;
    - ``(B, T, d)``: the tokens of each sequence among themselves, B losses. ``states.flatten(0, 1)`` matches all tokens
      of the batch instead, ``states.flatten(1)`` whole sequences.

    States of different width need a projection of the student's first, as in other losses on hidden states.

    Args:
        student: ``(*batch, n, d)`` states.
        teacher: ``(*batch, m, d)`` states; constants, no gradient flows to them.
        a: ``(*batch, n)`` masses of the student's states, at least 0, as zeros for padding; None: ``1 / n`` each.
        b: ``(*batch, m)`` masses of the teacher's states, with equal total; None: ``1 / m`` each.
        eps: Strength of the entropy, above 0, in the unit of the cost.
        cost: :class:`Cosine`, from 0 to 2 as the distance between probabilities, so that the paper's `eps` fits;
            :class:`Manhattan`, :class:`Euclidean`, :class:`SquaredEuclidean` or any function of the states with an
            `eps` of their scale.
        solver: As for :func:`sinkhorn`.
        on_failure: As for :func:`sinkhorn`.

    Returns:
        ``(*batch)`` losses.

    Raises:
        ValueError: As :func:`sinkhorn`, and for states of different width.
        SolveError: As :func:`sinkhorn`.

    Differentiable in `student`, `a`, `b` and `eps`, to any order, through the cost and through the plan. The second
    derivative through :class:`Manhattan` is that away from its kinks.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn_distillation
        >>> student, teacher = torch.eye(3).requires_grad_(), torch.eye(3).roll(1, 0)
        >>> sinkhorn_distillation(student, teacher)  # the same states, in another order
        tensor(9.0791e-05, grad_fn=<...>)

    Source: X. Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, 2024; its batch of distributions
    is a batch of states here.
    """
    check_tensor("student", student, min_ndim=2)
    check_tensor("teacher", teacher, min_ndim=2)
    check_same([("student", student), ("teacher", teacher)])
    check_shape("teacher", teacher.shape[-1:], student.shape[-1:], " in its last dimension as student has")
    broadcast_batch([("student", tuple(student.shape[:-2])), ("teacher", tuple(teacher.shape[:-2]))])
    if not callable(cost):
        raise ValueError(f"cost: expected Cosine() or another function of the states, got {cost!r}")
    dtype, work = student.dtype, compute_dtype(student.dtype)
    with autocast_off(student):
        W = cost_of_pairs(cost, student.to(work), teacher.detach().to(work))
        a, b, eps = (_lifted(t, dtype) for t in (a, b, eps))
        with renamed(cost="student, teacher"):
            data = prepare(W, a, b, eps, None, None, dtype=dtype)
        problem, args = problem_for(data, solver, None)
        problem = dataclasses.replace(problem, arg_names=("student, teacher", *problem.arg_names[1:]))
        P = plan_unless_failed(solution_map(problem, args, on_failure=on_failure), data, on_failure)
        if on_failure == "raise":
            return (W * P).sum((-2, -1)).to(dtype)
        total = P.sum((-2, -1))
        failed = torch.isnan(total)
        W, P = (torch.where(failed[..., None, None], 0, t) for t in (W, P))
        return torch.where(failed, total, (W * P).sum((-2, -1))).to(dtype)


class SinkhornDistillation(nn.Module):
    """The Sinkhorn distance between the softened predictions of a student and of a teacher on a batch (SinKD).

    A loss to add to cross-entropy and to the Kullback-Leibler divergence of each prediction, which see one sample at a
    time; this one compares every prediction of the student with every one of the teacher. Where the mass is lies in
    `reduction`: the plan of the paper has mass 1 in every row, that here has mass 1 in all. With ``"sum"`` the loss is
    the paper's, whose weight beside the other two is 0.001; ``"mean"`` is that divided by the number of samples B, and
    its weight is 0.001 B.

    Args:
        temperature: Divides the logits of both, above 0. As in the paper, the loss is not multiplied by its square.
        eps: Strength of the entropy, above 0; distances go from 0 to 2.
        reduction: ``"mean"`` over samples, ``"sum"``, or ``"none"``: the mean of every batch by itself.
        cost: Of hidden states, in :meth:`states`; see :func:`sinkhorn_distillation`.
        solver: As for :func:`sinkhorn`.
        on_failure: As for :func:`sinkhorn`.

    For the derivative of the distances the differences of all pairs are kept, ``B * B * classes`` numbers.

    Differentiable in the student's logits or states to any order, through the plan as well; the teacher's are
    constants. Where probabilities coincide, the derivative of their distance counts as zero. For a derivative in the
    temperature, call :func:`sinkhorn_distillation` on probabilities with ``cost=Manhattan()``.

    Example:
        >>> import torch
        >>> from difflayers.transport import SinkhornDistillation
        >>> loss = SinkhornDistillation()
        >>> loss
        SinkhornDistillation(temperature=2.0, eps=0.1, reduction='mean')
        >>> student = torch.tensor([[4.0, 0.0], [0.0, 4.0]], requires_grad=True)
        >>> teacher = torch.tensor([[6.0, 0.0], [0.0, 6.0]])
        >>> loss(student, teacher).backward()
        >>> student.grad
        tensor([[-0.0525,  0.0525],
                [ 0.0525, -0.0525]])

    Source: X. Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, 2024.
    Departure: the full derivative at convergence; the published code differentiates 20 iterations, from a kernel that
    underflows at a small `eps`.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        eps: float = 0.1,
        *,
        reduction: Reduction = "mean",
        cost: Cost = Cosine(),
        solver: TransportSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("eps", eps)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
        if not callable(cost):
            raise ValueError(f"cost: expected Cosine() or another function of the states, got {cost!r}")
        check_policy(on_failure)
        self.temperature, self.eps, self.reduction = temperature, eps, reduction
        self.cost, self.solver, self.on_failure = cost, solver, on_failure

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss on logits.

        Args:
            student_logits: ``(*batch, B, classes)``; every leading index is a batch by itself.
            teacher_logits: Of the same shape; constants.
            mask: ``(*batch, B)`` booleans, False for padding; None: all count.

        Returns:
            One number; for ``reduction="none"`` ``(*batch)`` of them.
        """
        _check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
        work = compute_dtype(student_logits.dtype)
        student, teacher = _unmasked(mask, student_logits, teacher_logits.detach())
        p, q = (_probabilities(t.to(work) / self.temperature) for t in (student, teacher))
        with renamed(**{"student, teacher": "student_logits, teacher_logits"}):
            return self._loss(p, q, mask, Manhattan()).to(student_logits.dtype)

    def states(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss on hidden states of equal width, by the `cost` of this module.

        Args:
            student: ``(*batch, B, d)``: samples of a batch, or tokens of ``*batch`` sequences.
            teacher: Of the same shape; constants.
            mask: ``(*batch, B)`` booleans, False for padding; None: all count.

        Returns:
            One number; for ``reduction="none"`` ``(*batch)`` of them.
        """
        _check_pair("student", student, "teacher", teacher)
        return self._loss(*_unmasked(mask, student, teacher), mask, self.cost)

    def _loss(self, student: Tensor, teacher: Tensor, mask: Tensor | None, cost: Cost) -> Tensor:
        mass, count = None, student.new_full((), student.shape[-2])
        if mask is not None:
            mass = mask.to(compute_dtype(student.dtype))
            count = mass.sum(-1)
            mass = mass / count.clamp(min=1).unsqueeze(-1)
        loss = sinkhorn_distillation(
            student, teacher, mass, mass, eps=self.eps, cost=cost, solver=self.solver, on_failure=self.on_failure
        )
        if self.reduction == "none":
            return loss
        count = count.to(compute_dtype(loss.dtype)).expand(loss.shape)
        total = (count * loss).sum()
        return (total if self.reduction == "sum" else total / count.sum().clamp(min=1)).to(loss.dtype)

    def extra_repr(self) -> str:
        """Settings."""
        parts = [f"temperature={self.temperature}, eps={self.eps}, reduction={self.reduction!r}"]
        parts += [f"cost={self.cost!r}"] if self.cost != Cosine() else []
        parts += [f"solver={self.solver!r}"] if self.solver is not None else []
        return ", ".join(parts)


def _lifted(t: Any, dtype: torch.dtype) -> Any:
    """What is in the precision of the states to that of the computation; anything else is for others to refuse."""
    return t.to(compute_dtype(dtype)) if isinstance(t, Tensor) and t.dtype == dtype else t


def _unmasked(mask: Tensor | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for padding, whatever stands there."""
    if mask is None:
        return student, teacher
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a tensor of booleans, got {got}")
    check_shape("mask", mask.shape, student.shape[:-1], " as the student's, less the last dimension")
    on = mask.unsqueeze(-1)
    return torch.where(on, student, 0), torch.where(on, teacher, 0)


def _probabilities(logits: Tensor) -> Tensor:
    """Of elements with NaN only NaN; a logit of -inf is a class of probability zero."""
    bad = torch.isnan(logits.detach().softmax(-1)).any(-1, keepdim=True).any(-2, keepdim=True)
    p = torch.where(bad, 0, logits).softmax(-1)
    return torch.where(bad, logits.sum((-2, -1), keepdim=True) * 0, p)


def _check_pair(name: str, student: Tensor, other: str, teacher: Tensor) -> None:
    check_tensor(name, student, min_ndim=2)
    check_tensor(other, teacher, min_ndim=2)
    check_same([(name, student), (other, teacher)])
    check_shape(other, teacher.shape, student.shape, f" as {name} has")
