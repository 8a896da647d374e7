r"""Projections on sets given by linear equations or one linear inequality.

.. math:: P(x) = x - A^T \mu, \qquad A A^T \mu = A x - b

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2. A single row is a closed formula. Several rows
are a saddle point system in the projection and the multiplier, which one singular value decomposition of ``A`` solves,
forward and in every derivative, without squaring its condition number and also where rows depend on each other.
One well-conditioned ``A`` for a whole batch needs no more than the inverse of ``A A^T``.

Symbols: ``mu`` multiplier, ``z`` projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._system import times

from ._operands import Number, as_tensor, check_that, on_vectors, per_element, per_entry, per_event
from ._shared_inverse import on_sound, shared_inverse


def project_halfspace(x: Tensor, normal: Number, offset: Number, *, dim: int = -1) -> Tensor:
    """The nearest point on one side of a hyperplane.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. sum(normal * z) <= offset``.

    Args:
        x: Any shape.
        normal: Not zero: a tensor that broadcasts with `x`, or a number for all entries.
        offset: A number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a `normal` of zero, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `normal` and `offset`, to any order. On the hyperplane the derivative is that of the inside.

    Example:
        >>> import torch
        >>> project_halfspace(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]), 2.0)
        tensor([2., 1.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.3.
    """
    return on_vectors(_onto_halfspace, x, per_entry("normal", normal), per_element("offset", offset), dim=dim)


def project_hyperplane(x: Tensor, normal: Number, offset: Number, *, dim: int = -1) -> Tensor:
    """The nearest point on a hyperplane.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. sum(normal * z) = offset``.

    Args:
        x: Any shape.
        normal: Not zero: a tensor that broadcasts with `x`, or a number for all entries.
        offset: A number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        dim: The dimension of one vector.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a `normal` of zero, a shape that does not broadcast, or a dtype that is not floating point.

    Differentiable in `x`, `normal` and `offset`, to any order.

    Example:
        >>> import torch
        >>> project_hyperplane(torch.tensor([3.0, 1.0]), 1.0, 2.0)
        tensor([2., 0.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.2.
    """
    return on_vectors(_onto_hyperplane, x, per_entry("normal", normal), per_element("offset", offset), dim=dim)


def project_affine(x: Tensor, A: Tensor, b: Tensor, *, dim: int = -1, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest solution of linear equations.

    Solves ``argmin_z 1/2 ||z - x||^2 s.t. A z = b``.

    Args:
        x: Any shape; ``n`` entries along `dim`.
        A: ``(*batch, m, n)``; rows may depend on each other, if `b` agrees.
        b: ``(*batch, m)``.
        dim: The dimension of one vector.
        on_failure: ``"raise"``, ``"nan"`` (for failed elements alone) or ``"ignore"``.

    Returns:
        The projection, shaped like `x`.

    Raises:
        ValueError: For a shape that does not fit, a dtype that is not floating point, NaN or Inf.
        SolveError: Where the equations contradict each other.

    Differentiable in `x`, `A` and `b`, to any order; where rows depend on each other, along changes that keep the rank.

    Example:
        >>> import torch
        >>> project_affine(torch.tensor([3.0, 1.0, 5.0]), torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([2.0]))
        tensor([2., 0., 5.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.2.2.
    """
    check_policy(on_failure)
    n = _size(x, dim)

    def formula(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return _onto_affine(x, A, b, on_failure)

    return on_vectors(formula, x, *_equations(A, b, n), dim=dim)


def project_affine_ex(x: Tensor, A: Tensor, b: Tensor, *, dim: int = -1) -> Solution[Tensor]:
    """As :func:`project_affine`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        x: Any shape; ``n`` entries along `dim`.
        A: ``(*batch, m, n)``.
        b: ``(*batch, m)``.
        dim: The dimension of one vector.

    Returns:
        The projection with status, steps and, for every element, how far from solvable the equations are.
    """
    n = _size(x, dim)
    found: list[Solution[Tensor]] = []

    def formula(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        found.append(solution_map_ex(SADDLE_POINT, (x, A, b)))
        return found[0].value[..., :n]

    z = on_vectors(formula, x, *_equations(A, b, n), dim=dim)
    return Solution(z, found[0].status, found[0].steps, found[0].residual)


def _onto_hyperplane(x: Tensor, normal: Any, offset: Any) -> Tensor:
    unit, excess = _unit_and_excess(x, normal, offset)
    return _moved(x, -excess, unit)


def _onto_halfspace(x: Tensor, normal: Any, offset: Any) -> Tensor:
    unit, excess = _unit_and_excess(x, normal, offset)
    return _moved(x, -torch.relu(excess), unit)


def _moved(x: Tensor, far: Tensor, unit: Tensor) -> Tensor:
    """Every vector moved so far along its unit vector; one unit vector for a whole batch makes a matrix product."""
    return x + (far @ unit.unsqueeze(0) if unit.ndim == 1 and far.ndim > 1 else far * unit)


@opaque
def _onto_affine(x: Tensor, A: Tensor, b: Tensor, on_failure: OnFailure) -> Tensor:
    """One equation or several: by the multiplier where the rows of a shared `A` are far from dependent."""
    if A.ndim == 2:
        inverse = shared_inverse(A @ A.mT)
        move = None if inverse is None else on_sound(lambda gap: gap @ (inverse @ A), times(A, x) - b, on_failure)
        if move is not None:
            return x - move
    return solution_map(SADDLE_POINT, (x, A, b), on_failure=on_failure)[..., : x.shape[-1]]


def _unit_and_excess(x: Tensor, normal: Any, offset: Any) -> tuple[Tensor, Tensor]:
    """The unit normal, and the signed distance from the hyperplane: no product of two scales is ever formed."""
    normal = as_tensor(normal, x)
    normal = normal.expand(*normal.shape[:-1], x.shape[-1])
    length = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    check_that(length.detach() > 0, lambda: "normal: expected a vector that is not zero, got one of zeros")
    unit = normal / length
    along = (x @ unit).unsqueeze(-1) if unit.ndim == 1 else (unit * x).sum(-1, keepdim=True)
    return unit, along - offset / length


def _size(x: Any, dim: int) -> int:
    """Entries along `dim`; what is wrong with either is found later."""
    return x.shape[dim] if isinstance(x, Tensor) and -x.ndim <= dim < x.ndim else 0


def _equations(A: Tensor, b: Tensor, n: int) -> tuple[Any, ...]:
    check_tensor("b", b, min_ndim=1)
    m = b.shape[-1]
    check_tensor("A", A, min_ndim=2)
    return per_event("A", A, (m, n)), per_event("b", b, (m,))


def _optimality(value: Tensor, x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    n = x.shape[-1]
    z, mu = value[..., :n], value[..., n:]
    return torch.cat((z - x + times(A.mT, mu), times(A, z) - b), -1)


def _solve(x: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch = torch.broadcast_shapes(x.shape[:-1], A.shape[:-2], b.shape[:-1])
    eps = torch.finfo(x.dtype).eps
    good = torch.isfinite(A).all(-1).all(-1)  # one bad matrix would end the decomposition of all
    U, S, Vh = torch.linalg.svd(torch.where(good[..., None, None], A, 0), full_matrices=False)
    largest = S.amax(-1, keepdim=True) if S.shape[-1] else S.new_zeros((*S.shape[:-1], 1))
    inverse = torch.where(max(A.shape[-2:]) * eps * largest < S, 1 / S, 0)
    gap = times(A, x) - b
    c = times(U.mT, gap)
    z, mu = x - times(Vh.mT, inverse * c), times(U, inverse * (inverse * c))
    rest = torch.linalg.vector_norm(gap - times(U, (inverse > 0) * c), dim=-1)  # what no multiplier reaches
    size = largest.squeeze(-1) * torch.linalg.vector_norm(x, dim=-1) + torch.linalg.vector_norm(b, dim=-1)
    status = torch.where(rest > eps**0.75 * size, int(Status.INFEASIBLE), int(Status.CONVERGED))
    status = torch.where(torch.isfinite(rest) & good, status, int(Status.DIVERGED)).expand(batch)
    value = torch.cat((z.expand(*batch, -1), mu.expand(*batch, -1)), -1)
    return value, Info(status, torch.ones_like(status), rest.expand(batch)), (U, inverse, Vh)


def _solve_derivative(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    U, inverse, Vh = factors
    n = Vh.shape[-1]
    p, q = rhs[..., :n], rhs[..., n:]
    c = (inverse > 0) * times(Vh, p) - inverse * times(U.mT, q)
    v = torch.cat((p - times(Vh.mT, c), times(U, inverse * c)), -1)
    status = torch.zeros(v.shape[:-1], dtype=torch.int64, device=v.device)
    return v, Info(status, torch.ones_like(status), v.new_zeros(v.shape[:-1]))


SADDLE_POINT = ImplicitProblem(
    solve=_solve,
    residual=_optimality,
    linear_solve=_solve_derivative,
    value_ndim=1,
    arg_ndims=(1, 2, 1),
    factor_ndims=(2, 1, 2),
    symmetric=True,
    name="project_affine",
    arg_names=("x", "A", "b"),
)
