r"""The prox of a quadratic: one linear system.

.. math:: (I + t Q)\, z = x - t q

N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.1.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._system import times

from ._operands import Number, Operand, as_column, on_vectors, optional, per_element, per_event
from ._shared_inverse import on_sound, shared_inverse


def prox_quadratic(
    x: Tensor, t: Number, Q: Tensor, q: Tensor | None = None, *, dim: int = -1, on_failure: OnFailure = "raise"
) -> Tensor:
    """The prox of a quadratic function.

    Solves ``argmin_z t * (1/2 z' Q z + q' z) + 1/2 ||z - x||^2``.

    Args:
        x: Any shape; ``n`` entries along `dim`.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        Q: ``(*batch, n, n)``, of which the symmetric part counts; ``I + t Q`` must be positive definite.
        q: ``(*batch, n)``; None: zero.
        dim: The dimension of one vector.
        on_failure: ``"raise"``, ``"nan"`` (for failed elements alone) or ``"ignore"``.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative or NaN `t`, a shape that does not fit, a dtype that is not floating point, NaN or
            Inf.
        SolveError: Where ``I + t Q`` is not positive definite, so that there is no minimiser.

    Differentiable in `x`, `t`, `Q` and `q`, to any order, with the factorisation of the forward pass.

    Example:
        >>> import torch
        >>> Q = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> prox_quadratic(torch.tensor([2.0, 4.0]), 1.0, Q)
        tensor([1., 1.])

    Source: N. Parikh, S. Boyd, Proximal Algorithms, 2014, section 6.1.1.
    """
    check_policy(on_failure)

    def formula(*args: Any) -> Tensor:
        return minimise_quadratic(quadratic_arguments(*args), on_failure)

    return on_vectors(formula, x, *quadratic_operands(Q, q, t), dim=dim)


def prox_quadratic_ex(x: Tensor, t: Number, Q: Tensor, q: Tensor | None = None, *, dim: int = -1) -> Solution[Tensor]:
    """As :func:`prox_quadratic`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        x: Any shape; ``n`` entries along `dim`.
        t: Step, at least 0.
        Q: ``(*batch, n, n)``.
        q: ``(*batch, n)`` or None.
        dim: The dimension of one vector.

    Returns:
        The minimiser with status, steps and the norm of ``z - x + t (Q z + q)`` of every element.
    """
    found: list[Solution[Tensor]] = []

    def formula(*args: Any) -> Tensor:
        args = quadratic_arguments(*args)
        solution = solution_map_ex(QUADRATIC, args)
        with torch.no_grad():
            residual = torch.linalg.vector_norm(_stationarity(solution.value, *args), dim=-1)
        found.append(replace(solution, residual=residual))
        return solution.value

    z = on_vectors(formula, x, *quadratic_operands(Q, q, t), dim=dim)
    return Solution(z, found[0].status, found[0].steps, found[0].residual)


def quadratic_operands(Q: Tensor, q: Tensor | None, t: Number) -> tuple[Operand, ...]:
    """Step, matrix and vector."""
    check_tensor("Q", Q, min_ndim=2)
    n = Q.shape[-1]
    return per_element("t", t, at_least=0), per_event("Q", Q, (n, n)), optional(per_event("q", q, (n,)))


def quadratic_arguments(x: Tensor, t: Any, Q: Tensor, q: Any) -> tuple[Tensor, ...]:
    """The arguments of the implicit problem."""
    if Q.shape[-1] != x.shape[-1]:
        n = x.shape[-1]
        raise ValueError(f"Q: expected shape ({n}, {n}) as x has {n} entries, got {tuple(Q.shape)}")
    return x, as_column(t, x), Q, torch.zeros_like(x[..., :1]).expand_as(x) if q is None else q


@opaque
def minimise_quadratic(args: tuple[Tensor, ...], on_failure: OnFailure) -> Tensor:
    """The prox itself."""
    x, t, Q, q = args
    if Q.ndim == 2 and t.ndim == 1:
        inverse = shared_inverse(_matrix(t, Q))
        z = None if inverse is None else on_sound(lambda rhs: rhs @ inverse, x - t * q, on_failure)
        if z is not None:
            return z
    return solution_map(QUADRATIC, args, on_failure=on_failure)


def _matrix(t: Tensor, Q: Tensor) -> Tensor:
    """``I + t Q`` of the symmetric part."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return eye + (t.unsqueeze(-1) / 2) * (Q + Q.mT)


def _stationarity(z: Tensor, x: Tensor, t: Tensor, Q: Tensor, q: Tensor) -> Tensor:
    return z - x + t * (times((Q + Q.mT) / 2, z) + q)


def _solve(x: Tensor, t: Tensor, Q: Tensor, q: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    batch = torch.broadcast_shapes(x.shape[:-1], t.shape[:-1], Q.shape[:-2], q.shape[:-1])
    L, broken = torch.linalg.cholesky_ex(_matrix(t, Q))
    z = _with_factor(L, x - t * q)
    finite = torch.isfinite(z.sum(-1)) & torch.isfinite(L.diagonal(dim1=-2, dim2=-1).sum(-1))
    status = torch.where(finite, int(Status.CONVERGED), int(Status.DIVERGED))
    status = torch.where(broken > 0, int(Status.SINGULAR), status).expand(batch)
    return z.expand(*batch, -1), Info(status, torch.ones_like(status), z.new_zeros(batch)), (L,)


def _with_factor(L: Tensor, b: Tensor) -> Tensor:
    """``(L L^T)^-1 b``; one factor for a whole batch takes it as rows."""
    if L.ndim == 2:
        half = torch.linalg.solve_triangular(L.mT, b.unsqueeze(0).flatten(0, -2), upper=True, left=False)
        return torch.linalg.solve_triangular(L, half, upper=False, left=False).contiguous().view(b.shape)
    batch = torch.broadcast_shapes(L.shape[:-2], b.shape[:-1])
    L, b = L.expand(*batch, *L.shape[-2:]), b.expand(*batch, b.shape[-1])
    return torch.cholesky_solve(b.unsqueeze(-1), L).squeeze(-1)


def _solve_derivative(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    x = _with_factor(factors[0], rhs)
    status = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return x, Info(status, torch.ones_like(status), x.new_zeros(x.shape[:-1]))


QUADRATIC = ImplicitProblem(
    solve=_solve,
    residual=_stationarity,
    linear_solve=_solve_derivative,
    value_ndim=1,
    arg_ndims=(1, 1, 2, 1),
    factor_ndims=(2,),
    symmetric=True,
    name="prox_quadratic",
    arg_names=("x", "t", "Q", "q"),
)
