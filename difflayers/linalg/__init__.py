"""Linear systems and least squares whose derivatives reuse the factorisation.

>>> import torch
>>> from difflayers.linalg import CG, LU, linear_solve
>>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], requires_grad=True)
>>> b = torch.tensor([1.0, 2.0])
>>> x = linear_solve(A, b, solver=CG())
>>> torch.allclose(x, linear_solve(A, b, solver=LU()))
True
>>> torch.autograd.grad(x.sum(), A)[0].shape
torch.Size([2, 2])
"""

from ._direct import LU, QR, Cholesky
from ._krylov import CG, GMRES
from ._learned_directions import LearnedDirections, ritz_residuals
from ._least_squares import least_squares, least_squares_ex
from ._linear_solve import linear_solve, linear_solve_ex
from ._minres import MINRES
from ._operator import LinearOperator, Tag
from ._recycled_gmres import RecycledGMRES, RecycledSpace, sort_systems
from ._sparse_direct import SuperLU
from ._sparse_matrix import SparseMatrix
from ._system import LinearSolver

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "MINRES",
    "QR",
    "Cholesky",
    "LearnedDirections",
    "LinearOperator",
    "LinearSolver",
    "RecycledGMRES",
    "RecycledSpace",
    "SparseMatrix",
    "SuperLU",
    "Tag",
    "least_squares",
    "least_squares_ex",
    "linear_solve",
    "linear_solve_ex",
    "ritz_residuals",
    "sort_systems",
]
