r"""Linear systems as a layer.

.. math:: A(\theta)\, x = b

The cotangent of ``b`` is ``w = A^{-T} g``, that of the parameters ``-d_theta <w, A(theta) x>``: one more solve with the
stored factorisation, at every order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution, check_policy

from ._autodiff import autocast_off, lifted_under_autocast, opaque, transforms_active
from ._captured import gradients_wanted, refuse_complex, refuse_held, refuse_probed, refuse_seen
from ._direct import LU, QR, Cholesky
from ._krylov import CG, GMRES
from ._learned_directions import LearnedDirections
from ._minres import MINRES
from ._operator import LinearOperator, MatrixSystem, OperatorSystem, Tag, check_matrix
from ._sparse_direct import SparseSystem, SuperLU
from ._sparse_matrix import SparseMatrix, from_coordinates, is_sparse, take_apart
from ._system import LinearSolver, LinearSystem, Params, solve_system, with_solver

DENSE_LIMIT = 64  # above, n products and an n x n factorisation cost more than a Krylov solve of a sound system


def default_solver(n: int, *, dense: bool, positive_definite: bool) -> LinearSolver:
    """Factorise small systems and matrices, iterate on large operators."""
    if dense or n <= DENSE_LIMIT:
        return LU()
    return CG() if positive_definite else GMRES()


def linear_solve(
    A: Tensor | SparseMatrix | LinearOperator,
    b: Tensor,
    *,
    solver: LinearSolver | None = None,
    init: Tensor | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    r"""Solves :math:`A x = b` with a derivative that reuses the factorisation.

    Args:
        A: ``(*batch, n, n)`` matrix, or a :class:`LinearOperator` on ``(*batch, n)``; a sparse matrix is a
            :class:`SparseMatrix` with values ``(*batch, nnz)``, or a tensor ``(n, n)`` of layout ``torch.sparse_csr``
            or ``torch.sparse_coo``, whose gradient has its layout.
        b: ``(*batch, n)`` right-hand side; batch dimensions of `A` and `b` broadcast. Several right-hand sides go in
            front: ``(k, *batch, n)``; they share one factorisation.
        solver: ``LU()``, ``Cholesky()``, ``QR()``, ``SuperLU()``, ``CG()``, ``MINRES()``, ``GMRES()`` or another Krylov
            solver of this module. None: LU for matrices and operators up to n = 64, else CG or GMRES by the operator's
            tags; for a sparse matrix SuperLU on the CPU and GMRES elsewhere. ``Cholesky``, ``CG`` and ``MINRES`` solve
            with the symmetric part of a matrix (one that is far from symmetric is refused); of an operator the first
            two need the tag positive definite, the third the tag symmetric.
        init: ``(*batch, n)`` start of an iterative solver; carries no gradient.
        on_failure: ``"raise"`` (:class:`~difflayers.SolveError` naming the elements), ``"nan"`` (NaN for failed
            elements alone) or ``"ignore"`` (no check that reads data).

    Returns:
        ``(*batch, n)`` solution.

    Raises:
        ValueError: For a wrong shape, dtype, device, NaN or Inf, naming the argument.
        SolveError: For a singular, indefinite or diverging element.

    Differentiable in `A` (or the operator's params) and `b`, to any order, forward and reverse.

    Example:
        >>> import torch
        >>> from difflayers.linalg import linear_solve
        >>> A = torch.tensor([[2.0, 0.0], [1.0, 4.0]], requires_grad=True)
        >>> x = linear_solve(A, torch.tensor([2.0, 5.0]))
        >>> x.sum().backward()
        >>> A.grad
        tensor([[-0.3750, -0.3750],
                [-0.2500, -0.2500]])
    """
    return _solve(A, b, solver, init, on_failure).value


def linear_solve_ex(
    A: Tensor | SparseMatrix | LinearOperator,
    b: Tensor,
    *,
    solver: LinearSolver | None = None,
    init: Tensor | None = None,
) -> Solution[Tensor]:
    """As :func:`linear_solve`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        A: Matrix or operator, as in :func:`linear_solve`.
        b: Right-hand side.
        solver: Solver object, or None.
        init: Start of an iterative solver.

    Returns:
        The solution with status, steps and the measured residual norm of every element.
    """
    return _solve(A, b, solver, init, "ignore", measure=True)


@opaque
def _solve(
    A: Tensor | SparseMatrix | LinearOperator,
    b: Tensor,
    solver: LinearSolver | None,
    init: Tensor | None,
    on_failure: OnFailure,
    measure: bool = False,
) -> Solution[Tensor]:
    check_policy(on_failure)
    dtype = check_tensor("b", b, min_ndim=1).dtype
    A, b = lifted_under_autocast(A), lifted_under_autocast(b)
    system, params = _system(A, b, solver, on_failure)
    work = compute_dtype(dtype)
    params = tuple(p.to(work) if p.is_floating_point() else p for p in params)
    rhs = b.to(work)
    if system.param_ndims is not None:
        shapes = [tuple(p.shape[: p.ndim - k]) for p, k in zip(params, system.param_ndims, strict=True)]
        batch = broadcast_batch(
            [("b", tuple(rhs.shape[:-1])), *zip(system.param_names or ["A.params"] * len(shapes), shapes, strict=True)]
        )
        rhs = rhs.expand((*batch, rhs.shape[-1]))
    if init is not None:
        init = check_tensor("init", init, min_ndim=1)
        check_same([("b", b), ("init", init)])
        if isinstance(system.solver, LU | QR | Cholesky | SuperLU):
            raise ValueError(f"init: expected None for the direct solver {system.solver}, got a tensor")
        check_shape("init", init.shape[-1:], rhs.shape[-1:], " in its last dimension as b has")
        broadcast_batch([("b", tuple(rhs.shape[:-1])), ("init", tuple(init.shape[:-1]))])
        init = init.detach().to(work).expand_as(rhs)
    if rhs.shape[-1] == 0:
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        nothing = sum((p.sum() * 0 for p in params if p.is_floating_point()), rhs.sum())  # keeps the graph connected
        return Solution((rhs + nothing).to(dtype), status, status, rhs.detach().sum(-1))
    x, status, steps, residual = solve_system(system, rhs, params, init)
    if measure:
        with torch.no_grad(), autocast_off(rhs):
            residual = torch.linalg.vector_norm(system.apply(params, x, False) - rhs, dim=-1)
    return Solution(x.to(dtype), status, steps, residual)


def _system(
    A: Tensor | SparseMatrix | LinearOperator, b: Tensor, solver: LinearSolver | None, on_failure: OnFailure
) -> tuple[LinearSystem, Params]:
    n = b.shape[-1]
    needs_positive = isinstance(solver, CG | Cholesky | LearnedDirections)
    needs_symmetry = needs_positive or isinstance(solver, MINRES)
    if isinstance(A, LinearOperator):
        check_same([("b", b), *((f"params[{i}]", p) for i, p in enumerate(A.params) if p.is_floating_point())])
        if gradients_wanted():
            refuse_complex((f"params[{i}]", p) for i, p in enumerate(A.params))
            refuse_held(A.matvec, "A.matvec", remedy="Pass it in `params`")
            operands = (*A.params, b)
            product = lambda *p: A.matvec(p[:-1], p[-1])  # noqa: E731
            if transforms_active():
                refuse_probed(product, operands, "A.matvec", "Pass it in `params`")
            else:
                with torch.enable_grad():
                    refuse_seen([product(*(p.detach() for p in operands))], "A.matvec", "Pass it in `params`")
        positive = bool(A.tags & Tag.POSITIVE_DEFINITE)
        if needs_positive and not positive:
            raise ValueError(f"A: expected tags=Tag.POSITIVE_DEFINITE for {type(solver).__name__}, got {A.tags}")
        if needs_symmetry and not A.symmetric:
            raise ValueError(f"A: expected tags=Tag.SYMMETRIC for {type(solver).__name__}, got {A.tags}")
        solver = solver or default_solver(n, dense=False, positive_definite=positive)
        system: LinearSystem = OperatorSystem(
            solver, A.param_ndims, on_failure=on_failure, symmetric=A.symmetric, matvec=A.matvec
        )
        return with_solver(system, solver), A.params
    if is_sparse(A):
        check_same([("b", b), ("A", A.values if isinstance(A, SparseMatrix) else A)])
        if isinstance(A, Tensor) and A.layout == torch.sparse_coo:
            A = from_coordinates("A", A)
        pattern, values = take_apart("A", A)
        if pattern.shape[0] != pattern.shape[1]:
            raise ValueError(f"A: expected a square matrix, got {pattern.shape}")
        _check_columns(pattern.shape[1], n)
        solver = solver or (SuperLU() if values.device.type == "cpu" else GMRES())
        system = SparseSystem(
            solver, (1,), on_failure=on_failure, symmetric=needs_symmetry, param_names=("A",), pattern=pattern
        )
        return with_solver(system, solver), (lifted_under_autocast(values),)
    A = check_matrix("A", A)
    check_same([("b", b), ("A", A)])
    _check_columns(A.shape[-1], n)
    solver = solver or default_solver(n, dense=True, positive_definite=False)
    system = MatrixSystem(solver, (2,), on_failure=on_failure, symmetric=needs_symmetry, param_names=("A",))
    if needs_symmetry and on_failure != "ignore":
        _SymmetryCheck.apply(A, type(solver).__name__)
    return with_solver(replace(system), solver), (A,)


def _check_columns(columns: int, n: int) -> None:
    if columns != n:
        raise ValueError(f"b: expected {columns} entries in the last dimension as A has columns, got {n}")


class _SymmetryCheck(torch.autograd.Function):
    """Reads data, so it runs in a Function's forward: on plain tensors, also under ``vmap``."""

    @staticmethod
    def forward(A: Tensor, solver: str) -> Tensor:
        # far above rounding and finite differences, far below a matrix that was never meant to be symmetric
        worst = (A - A.mT).abs().amax((-1, -2)) > 1e-3 * A.abs().amax((-1, -2)) if A.numel() else A.new_zeros(())
        if not A.is_meta and bool(worst.any()):
            raise ValueError(
                f"A: expected a symmetric matrix for {solver}, got one that differs from its transpose by more than "
                "0.1 %; use LU() or GMRES()"
            )
        return A.new_empty(())

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, *_: object) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: object, *_: object) -> None:
        return None

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None, ...], A: Tensor, solver: str) -> tuple[Tensor, None]:
        dim = in_dims[0]
        return _SymmetryCheck.apply(A if dim is None else A.movedim(dim, 0), solver), None
