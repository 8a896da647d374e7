r"""The Lasso as a layer: sparse codes of signals in a dictionary, differentiable in everything.

.. math:: \min_z \tfrac12\|y - Dz\|^2 + \sum_j \lambda_j |z_j| + \tfrac\mu2\|z - c\|^2

On the support :math:`A = \{z_j \ne 0\}` the solution is smooth: its signs s stay, and

.. math:: D_A^T (D z - y) + \mu (z_A - c_A) + \lambda_A s_A = 0 .

So every derivative is a solve with :math:`D_A^T D_A + \mu I`, never one with the Gram matrix of all atoms, which is
singular as soon as there are more atoms than numbers in a signal. With w that solution for the cotangent of z,

.. math:: \bar y = D w, \quad \bar\lambda_j = -s_j w_j, \quad \bar D = (y - Dz) w^T - (Dw) z^T, \quad
    \bar\mu = -(z - c)^T w, \quad \bar c = \mu w .

R. Tibshirani, Regression shrinkage and selection via the lasso, 1996; J. Mairal, F. Bach, J. Ponce, Task-driven
dictionary learning, 2012, proposition 1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import lifted_under_autocast, opaque, physical
from difflayers.linalg._direct import direct_info, solve_columns
from difflayers.linalg._system import times

from ._lasso_solver import FISTA, minimise, refine, scaled
from ._operands import Number, check_range, per_element

NAMES = ("dictionary", "signal", "penalty", "ridge", "center")
NDIMS = (2, 1, 1, 0, 1)
Args = tuple[Tensor, ...]
_ALIKE = 10.0  # lengths of scaled atoms that one tolerance suits


def lasso(
    dictionary: Tensor,
    signal: Tensor,
    penalty: Number,
    *,
    weights: Tensor | None = None,
    ridge: Number = 0.0,
    center: Tensor | None = None,
    solver: FISTA | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """Sparse codes: the few atoms of a dictionary that make up a signal, and how much of each.

    Solves ``argmin_z 1/2 ||signal - dictionary z||^2 + penalty * sum_j weights_j |z_j| + ridge/2 ||z - center||^2``.

    Args:
        dictionary: ``(n, p)``, shared by all signals, or ``(*batch, n, p)``; its columns are the atoms.
        signal: ``(*batch, n)``.
        penalty: At least 0: a number, or a tensor ``(*batch)`` with one number an element.
        weights: ``(p)`` or ``(*batch, p)``, at least 0: factors of the penalty, one an atom. Ones if None; an atom of
            weight 0 is not penalised.
        ridge: At least 0: a number or a tensor ``(*batch)``. A small one makes the codes unique where atoms depend on
            each other.
        center: ``(p)`` or ``(*batch, p)`` point that the ridge pulls to; zero if None.
        solver: :class:`FISTA` with its tolerance and limits.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, p)`` codes, exactly zero off the support.

    Raises:
        ValueError: For a negative penalty, weight or ridge, a wrong shape or dtype, NaN or Inf, naming the argument.
        SolveError: In backward, where the atoms of a support depend on each other: the code is not unique then, and has
            no derivative. The value is one of the minimisers.

    Differentiable in every tensor argument, to any order, forward and reverse. At a kink (an atom just about to enter)
    the derivative is that of the zero branch. A penalty of ``max |dictionary^T signal|`` or more gives zero, with zero
    derivatives. Memory does not depend on the steps of the solver.

    Example:
        >>> import torch
        >>> from difflayers.proximal import lasso
        >>> D = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
        >>> signal = torch.tensor([0.5, 2.0], requires_grad=True)
        >>> z = lasso(D, signal, 0.2)
        >>> z
        tensor([0.0000, 1.2222, 0.7222], grad_fn=<SolutionMapBackward>)
        >>> torch.autograd.grad(z[1], signal)
        (tensor([-1.3333,  1.0000]),)

    Source: R. Tibshirani, Regression shrinkage and selection via the lasso, 1996; J. Mairal, F. Bach, J. Ponce,
    Task-driven dictionary learning, 2012, proposition 1.

    Departure: proximal gradient steps only come near; an active-set method finishes to rounding, for each element.
    """
    return _value(on_failure, dictionary, signal, penalty, weights, ridge, center, solver)


def lasso_ex(
    dictionary: Tensor,
    signal: Tensor,
    penalty: Number,
    *,
    weights: Tensor | None = None,
    ridge: Number = 0.0,
    center: Tensor | None = None,
    solver: FISTA | None = None,
) -> Solution[Tensor]:
    """As :func:`lasso`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        dictionary: Atoms.
        signal: Signals.
        penalty: Penalty.
        weights: Factors of the penalty.
        ridge: Ridge.
        center: What the ridge pulls to.
        solver: Solver.

    Returns:
        The codes with status and steps of every element. The residual is the largest violation of an optimality
        condition, relative to the lengths of atoms and signal.
    """
    return _solution(dictionary, signal, penalty, weights, ridge, center, solver)


# -------------------------------------------------------------------------------------------------- problem and adjoint


def stationarity(z: Tensor, D: Tensor, y: Tensor, lam: Tensor, mu: Tensor, c: Tensor) -> Tensor:
    """The condition above on the support of `z`, and ``z = 0`` off it."""
    active = (z != 0) | (lam == 0)
    z_A, lam = torch.where(active, z, 0), torch.where(active, lam, 0)
    slope = times(D.mT, times(D, z_A) - y) + mu.unsqueeze(-1) * (z_A - c) + lam * z_A.sign()
    return torch.where(active, slope, z)


def _solve(solver: FISTA, *args: Tensor) -> tuple[Tensor, Info, Args]:
    batch = torch.broadcast_shapes(*(a.shape[: a.ndim - k] for a, k in zip(args, NDIMS, strict=True)))
    sound = torch.ones(batch, dtype=torch.bool, device=args[0].device)
    for a, k in zip(args, NDIMS, strict=True):
        largest = torch.linalg.vector_norm(a, math.inf, dim=tuple(range(-k, 0))) if k else a
        sound = sound & torch.isfinite(largest)
    sound = sound.flatten()
    shared = args[0].shape[:-2].numel() == 1 and not _far_apart(args[0], args[3])
    D = args[0].reshape(args[0].shape[-2:]) if shared else _flat(args[0], batch, 2)
    y, lam, mu, c = (_flat(a, batch, k) for a, k in zip(args[1:], NDIMS[1:], strict=True))
    if not bool(sound.all()):  # failed elements are computed from zeros
        D = torch.where(torch.isfinite(D), D, 0)
        y, lam, mu, c = (
            torch.where(sound[(...,) + (None,) * k], a, 0) for a, k in zip((y, lam, mu, c), NDIMS[1:], strict=True)
        )
    P, atom, signal = scaled(D, y, lam, mu, c)
    z, info = minimise(P, solver)
    unit = signal / atom
    slope = times(D.mT, times(D, z * unit) - y) + mu.unsqueeze(-1) * (z * unit - c)
    z, (index, used, factor, singular) = refine(P, z, slope / atom / signal, solver.tolerance(z.dtype))
    scale = torch.where(used, atom.expand_as(z).gather(-1, index), 1)
    z = z * unit
    sound = sound & torch.isfinite(z).all(-1)  # lengths of huge signals overflow
    info = info._replace(status=torch.where(sound, info.status, int(Status.DIVERGED)))
    z = torch.where(sound.unsqueeze(-1), z, math.nan)
    z, *factors = (t.reshape((*batch, *t.shape[1:])) for t in (z, index, used, factor, scale, singular))
    return z, Info(*(t.reshape(batch) for t in info)), tuple(factors)


def _far_apart(D: Tensor, mu: Tensor) -> bool:
    """Whether ridges of a batch are so different that atoms scaled for the largest would be tiny beside another."""
    if mu.numel() < 2:
        return False
    length = torch.linalg.vector_norm(D, dim=-2).flatten()
    least, most = torch.where(torch.isfinite(mu), mu, 0).flatten().aminmax()
    length = length[length > 0]
    return bool((torch.hypot(length, most.sqrt()) > _ALIKE * torch.hypot(length, least.sqrt())).any())


def _flat(t: Tensor, batch: torch.Size, ndim: int) -> Tensor:
    """One batch dimension."""
    event = t.shape[t.ndim - ndim :]
    return t.expand((*batch, *event)).reshape((batch.numel(), *event))


def _adjoint(z: Tensor, args: Args, factors: Args, rhs: Tensor, transpose: bool) -> tuple[Tensor, Info]:
    """A symmetric solve on the support, refined twice with the atoms themselves; identity off it."""
    D, _, lam, mu, _ = args
    index, used, factor, scale, singular = factors
    full = torch.broadcast_shapes(rhs.shape[:-1], index.shape[:-1])
    rhs = rhs.expand((*full, rhs.shape[-1]))
    index, used = index.expand((*full, -1)), used.expand((*full, -1))
    if not index.shape[-1]:
        return rhs.clone(), direct_info(singular.expand(full), rhs, 1)
    active = (z != 0) | (lam == 0)
    off = torch.where(active, 0, rhs)
    wanted, x = rhs - off, torch.zeros_like(rhs)
    for attempt in range(3):
        left = wanted
        if attempt:
            left = torch.where(active, wanted - times(D.mT, times(D, x)) - mu.unsqueeze(-1) * x, 0)
        picked = torch.where(used, left.gather(-1, index), 0) / scale
        solved = solve_columns(lambda L, b: torch.cholesky_solve(b, L), (factor,), (2,), picked) / scale
        x = x.scatter_add(-1, index, torch.where(used, solved, 0))
    return x + off, direct_info(singular.expand(full), x, 1)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> Tensor:
    problem, args, dtype = _prepare(*given)
    try:
        return solution_map(problem, args, on_failure=on_failure).to(dtype)
    except ValueError:
        weights = given[3]
        if weights is not None:  # name what the caller passed, not the product with the penalty
            check_finite([("weights", physical(weights))])
        raise


@opaque
def _solution(*given: Any) -> Solution[Tensor]:
    problem, args, dtype = _prepare(*given)
    solution = solution_map_ex(problem, args)
    return replace(solution, value=solution.value.to(dtype))


def _prepare(
    dictionary: Any, signal: Any, penalty: Any, weights: Any, ridge: Any, center: Any, solver: FISTA | None
) -> tuple[ImplicitProblem, Args, torch.dtype]:
    """The problem, its checked arguments in the dtype of the solve, and the dtype of the result."""
    D, y = check_tensor("dictionary", dictionary, min_ndim=2), check_tensor("signal", signal, min_ndim=1)
    n, p = D.shape[-2:]
    if not n or not p:
        raise ValueError(f"dictionary: expected at least one row and one column, got shape {tuple(D.shape)}")
    check_shape("signal", y.shape[-1:], (n,), " in its last dimension as dictionary has rows")
    if center is not None and not isinstance(ridge, Tensor) and ridge == 0:
        raise ValueError("center: expected None without a ridge (it would have no effect), got a tensor")
    tensors = {"signal": y, "dictionary": D, "penalty": not_negative("penalty", penalty, y)}
    tensors["ridge"] = not_negative("ridge", ridge, y)
    for name, value in (("weights", weights), ("center", center)):
        if value is not None:
            check_shape(name, check_tensor(name, value, min_ndim=1).shape[-1:], (p,), " in its last dimension")
            tensors[name] = value if name == "center" else not_negative(name, value, y)
    tensors = {name: lifted_under_autocast(t) for name, t in tensors.items()}
    numbers = {name for name, value in (("penalty", penalty), ("ridge", ridge)) if not isinstance(value, Tensor)}
    check_same((name, t) for name, t in tensors.items() if name not in numbers)
    tensors = {name: t.to(compute_dtype(t.dtype)) for name, t in tensors.items()}
    y, lam = tensors["signal"], tensors["penalty"].unsqueeze(-1)
    broadcast_batch([("penalty", tuple(lam.shape[:-1])), ("weights", tuple(tensors.get("weights", lam).shape[:-1]))])
    lam = lam * tensors["weights"] if weights is not None else lam.expand(*lam.shape[:-1], p)
    args = (tensors["dictionary"], y, lam, tensors["ridge"], tensors.get("center", y.new_zeros(p)))
    problem = ImplicitProblem(
        solve=partial(_solve, solver or FISTA()),
        residual=stationarity,
        linear_solve=_adjoint,
        value_ndim=1,
        arg_ndims=NDIMS,
        factor_ndims=(1, 1, 2, 1, 0),
        symmetric=True,
        name="lasso",
        arg_names=NAMES,
    )
    return problem, args, signal.dtype


def not_negative(name: str, value: Any, like: Tensor) -> Tensor:
    """A tensor with no negative entry, as it came, or such a number as a tensor of the dtype that `like` is solved in.

    NaN in a tensor is left to the solve, which fails that element alone.
    """
    if not isinstance(value, Tensor):
        check_range(per_element(name, value, at_least=0))
        return torch.full((), float(value), dtype=compute_dtype(like.dtype), device=like.device)
    plain = physical(check_tensor(name, value))
    if not plain.is_meta and bool((plain < 0).any()):
        raise ValueError(f"{name}: expected at least 0, got {float(plain.amin()):g}")
    return value
