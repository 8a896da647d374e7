r"""Entropic transport on :func:`~difflayers.implicit.solution_map`: the pattern for a layer with an adjoint of its own.

The potentials (f, g) of the plan :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij})/\epsilon)` make its sums equal to a
and b; they are unique up to a constant. The Jacobian of that condition is, up to :math:`1/\epsilon`,

.. math:: \begin{pmatrix} \mathrm{diag}(P 1) & P \\ P^T & \mathrm{diag}(P^T 1) \end{pmatrix}

so one Cholesky factor of the Schur complement, made once at the solution, serves every derivative. The plan is an
explicit function of the potentials and stays with autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers._checks import check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex


def log_plan(z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Logarithm of the plan of potentials ``z = (f, g)``."""
    n = cost.shape[-2]
    f, g = z[..., :n], z[..., n:]
    moved = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps[..., None, None]
    return moved + a.log().unsqueeze(-1) + b.log().unsqueeze(-2)


def marginal_error(z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Row and column sums of the plan, less what they must be."""
    P = log_plan(z, cost, a, b, eps).exp()
    rows, columns = P.sum(-1) - a, P.sum(-2) - b
    return torch.cat([rows, columns], -1)


def _sums(z: Tensor, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    P = log_plan(z, *args).exp()
    return P, P.sum(-1), P.sum(-2)


def _sinkhorn(
    cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, max_steps: int
) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """Sinkhorn in the logarithm; every element keeps its potentials once its sums are right."""
    batch = torch.broadcast_shapes(cost.shape[:-2], a.shape[:-1], b.shape[:-1], eps.shape)
    n, m = cost.shape[-2:]
    e, tol = eps.unsqueeze(-1), 1e3 * torch.finfo(cost.dtype).eps
    z = cost.new_zeros(*batch, n + m)
    steps = torch.zeros(batch, dtype=torch.int64, device=cost.device)
    active = torch.ones(batch, dtype=torch.bool, device=cost.device)
    error = torch.full(batch, math.inf, dtype=cost.dtype, device=cost.device)
    for _ in range(max_steps):
        g = z[..., n:]
        f = -e * torch.logsumexp((g.unsqueeze(-2) - cost) / e.unsqueeze(-1) + b.log().unsqueeze(-2), -1)
        g = -e * torch.logsumexp((f.unsqueeze(-1) - cost) / e.unsqueeze(-1) + a.log().unsqueeze(-1), -2)
        shift = (f.mean(-1, keepdim=True) - g.mean(-1, keepdim=True)) / 2
        z = torch.where(active.unsqueeze(-1), torch.cat([f - shift, g + shift], -1), z)
        steps = steps + active
        error = marginal_error(z, cost, a, b, eps).abs().sum(-1)
        active = active & (error > tol)  # a NaN stops too: nothing more to be had
        if not bool(active.any()):
            break
    P, r, c = _sums(z, (cost, a, b, eps))
    scaled = P / r.sqrt().unsqueeze(-1) / c.sqrt().unsqueeze(-2)
    null = (c / c.sum(-1, keepdim=True)).sqrt()
    eye = torch.eye(m, dtype=cost.dtype, device=cost.device)
    factor, _ = torch.linalg.cholesky_ex(eye - scaled.mT @ scaled + null.unsqueeze(-1) * null.unsqueeze(-2))
    sound = torch.isfinite(error) & torch.isfinite(cost).flatten(-2).all(-1).expand(batch)
    status = torch.where(active, int(Status.MAX_STEPS), int(Status.CONVERGED))
    return z, Info(torch.where(sound, status, int(Status.DIVERGED)), steps, error), (factor,)


def _adjoint(
    z: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The system above, symmetric; constants ``(t, -t)`` are projected out on both sides."""
    (factor,) = factors
    n, m = args[0].shape[-2:]
    P, r, c = _sums(z, args)
    null = torch.cat([rhs.new_ones(n), -rhs.new_ones(m)]) / math.sqrt(n + m)
    rhs = (rhs - (rhs * null).sum(-1, keepdim=True) * null) * args[3].unsqueeze(-1)
    top, bottom = rhs[..., :n], rhs[..., n:]
    q = (bottom - (P.mT @ (top / r).unsqueeze(-1)).squeeze(-1)) / c.sqrt()
    factor = factor.expand(*q.shape[:-1], m, m)
    beta = torch.cholesky_solve(q.unsqueeze(-1), factor).squeeze(-1) / c.sqrt()
    alpha = (top - (P @ beta.unsqueeze(-1)).squeeze(-1)) / r
    x = torch.cat([alpha, beta], -1)
    x = x - (x * null).sum(-1, keepdim=True) * null
    batch = x.shape[:-1]
    status = torch.where(torch.isfinite(x).all(-1), int(Status.CONVERGED), int(Status.SINGULAR))
    steps = torch.zeros(batch, dtype=torch.int64, device=x.device)
    return x, Info(status, steps, x.new_zeros(batch))


def problem(max_steps: int = 5000) -> ImplicitProblem:
    """The inner problem: what a solution is, how to find one, how to solve with its Jacobian."""
    return ImplicitProblem(
        solve=lambda cost, a, b, eps: _sinkhorn(cost, a, b, eps, max_steps),
        residual=marginal_error,
        linear_solve=_adjoint,
        value_ndim=1,
        arg_ndims=(2, 1, 1, 0),
        factor_ndims=(2,),
        name="transport_plan",
        arg_names=("cost", "a", "b", "eps"),
    )


def _arguments(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits to weights; half precision is lifted."""
    for name, t, k in (("cost", cost, 2), ("a", a, 1), ("b", b, 1), ("eps", eps, 0)):
        check_tensor(name, t, min_ndim=k)
    work = compute_dtype(cost.dtype)
    cost, a, b, eps = (t.to(compute_dtype(t.dtype)) if t.dtype == cost.dtype != work else t for t in (cost, a, b, eps))
    return cost, a.softmax(-1), b.softmax(-1), eps


def transport_plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, *, max_steps: int = 5000, on_failure: OnFailure = "raise"
) -> Tensor:
    """The plan for a cost, logits of both marginals, and a temperature."""
    args = _arguments(cost, a, b, eps)
    z = solution_map(problem(max_steps), args, on_failure=on_failure)
    # outside the map 0 * NaN would reach what the elements share: failed ones are computed from harmless numbers, and
    # hand their cotangent to the map alone, which answers with zero to zero and with NaN to everything else
    failed = torch.isnan(z).any(-1)[..., None, None]
    safe = torch.where(failed.squeeze(-1), 0, z)
    plan = log_plan(safe, torch.where(failed, 0, args[0]), *args[1:]).exp()
    return torch.where(failed, z.sum(-1)[..., None, None], plan).to(cost.dtype)


def transport_plan_ex(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, *, max_steps: int = 5000) -> Solution[Tensor]:
    """As :func:`transport_plan`, returning an unchecked solution."""
    args = _arguments(cost, a, b, eps)
    solution = solution_map_ex(problem(max_steps), args)
    plan = log_plan(solution.value, *args).exp().to(cost.dtype)
    return Solution(plan, solution.status, solution.steps, solution.residual)
