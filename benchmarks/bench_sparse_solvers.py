"""Linear systems of grids, forward and with the gradients of matrix and right-hand side: ours, torch-sla and SciPy.

Sparse systems are of finite volumes on 100 by 100 cells: a permeability with a contrast of about 50 (positive
definite), the same less a multiple of the identity (indefinite), and with convection (not symmetric, 50 by 50 cells).
Direct solvers do the whole job in every call, factorisation included. Iterative ones take the loosest tolerance of a
ladder at which solution and gradients have an error of 1e-6, and all have a Jacobi preconditioner, which is torch-sla's
default. Its iterations have a fixed relative tolerance of 1e-10 beside the absolute one of the ladder.
SciPy has no gradients: its rows with a backward pass write the adjoint down by hand, with the same factorisation.

Two small cases show whether derivatives are right rather than how long they take: a product with the Hessian, and the
gradient of a least-squares solution in its matrix. torch-sla 0.4.0 gets both wrong without a word (its backward pass is
not differentiable in what it depends on, and leaves out the term of the residual); the errors say so.

The references are SciPy's SuperLU with a step of refinement, the adjoint on paper, and for the small cases dense torch.
torch-sla comes by `pip install torch-sla`, and is left out where it is not installed.
"""

import warnings
from collections.abc import Callable
from importlib import util
from typing import Any

import numpy as np
import torch
from scipy import linalg as dense_linalg
from scipy import sparse
from scipy.sparse import linalg as scipy_linalg
from torch import Tensor

from benchmarks.harness import AsLooseAs, Case, Contender, Options, run
from difflayers.linalg import CG, GMRES, MINRES, LinearSolver, SparseMatrix, SuperLU, least_squares, linear_solve

D = torch.float64
TARGET = 1e-6
TOLERANCES = [10.0**-k for k in range(5, 15)]
BATCH = 8

Job = Callable[[], Any]


def available() -> bool:
    """Whether torch-sla can be used; says so where it cannot."""
    if util.find_spec("torch_sla") is None:
        print("torch-sla: left out, it is not installed")
        return False
    return True


class Problem:
    """A sparse system with a cotangent, as everyone wants it, and its solution with gradients."""

    def __init__(self, A: sparse.csr_array, seed: int = 0) -> None:
        A = A.tocsr()
        A.sort_indices()
        rng = np.random.default_rng(seed)
        self.scipy, self.b, self.g = A, rng.standard_normal(A.shape[0]), rng.standard_normal(A.shape[0])
        coo = A.tocoo()
        self.row, self.col = (torch.tensor(t, dtype=torch.int64) for t in (coo.row, coo.col))
        self.ours = SparseMatrix(torch.tensor(A.indptr), torch.tensor(A.indices), torch.tensor(A.data), A.shape)
        lu = scipy_linalg.splu(A.tocsc())
        x = lu.solve(self.b)
        x = x + lu.solve(self.b - A @ x)
        w = lu.solve(self.g, trans="T")
        w = w + lu.solve(self.g - A.T @ w, trans="T")
        self.x, self.w = torch.tensor(x), torch.tensor(w)
        self.grad = -self.w[self.row] * self.x[self.col]
        self.symmetric_grad = (self.grad - self.w[self.col] * self.x[self.row]) / 2
        self.right, self.cotangent = torch.tensor(self.b), torch.tensor(self.g)


def darcy(size: int, shift: float = 0.0, convection: float = 0.0) -> sparse.csr_array:
    """Five points with harmonic means, in units of the cell."""
    t = (np.arange(size) + 0.5) / size
    a = np.exp(2 * np.sin(7 * t)[:, None] * np.cos(5 * t))
    index = np.arange(size * size).reshape(size, size)
    A = sparse.lil_array((size * size, size * size)).tocsr()
    for axis in (0, 1):
        low, high = (np.moveaxis(a, axis, 0)[s] for s in (slice(None, -1), slice(1, None)))
        i, j = (np.moveaxis(index, axis, 0)[s].ravel() for s in (slice(None, -1), slice(1, None)))
        face = (2 * low * high / (low + high)).ravel()
        drift = convection / size / 2 * np.ones_like(face)
        entries = ((i, i, face), (j, j, face), (i, j, drift - face), (j, i, -drift - face))
        for end in (0, -1):
            edge = np.moveaxis(index, axis, 0)[end]
            entries += ((edge, edge, 2 * np.moveaxis(a, axis, 0)[end]),)
        for rows, cols, values in entries:
            A = A + sparse.coo_array((values, (rows, cols)), A.shape)
    return (A - shift * sparse.eye_array(size * size)).tocsr()


# ------------------------------------------------------------------------------------------------------- contenders


def both(solve: Callable[[Tensor, Tensor], Tensor], p: Problem) -> Job:
    """Solution, and gradients of values and right-hand side, by autograd."""
    values, b = p.ours.values.clone().requires_grad_(), p.right.clone().requires_grad_()

    def job() -> tuple[Tensor, ...]:
        x = solve(values, b)
        return (x.detach(), *torch.autograd.grad(x, (values, b), p.cotangent))

    return job


def forward(solve: Callable[[Tensor, Tensor], Tensor], p: Problem) -> Job:
    def job() -> Tensor:
        with torch.no_grad():
            return solve(p.ours.values, p.right)

    return job


def ours(p: Problem, solver: LinearSolver) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda values, b: linear_solve(p.ours._replace(values=values), b, solver=solver)


def peer(p: Problem, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from torch_sla import spsolve

    def solve(values: Tensor, b: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an iteration ended early is seen in its result
            return spsolve(values, p.row, p.col, p.scipy.shape, b, **options)

    return solve


def scipy_direct(p: Problem, backward: bool) -> Job:
    def job() -> Tensor | tuple[Tensor, ...]:
        lu = scipy_linalg.splu(p.scipy.tocsc())
        x = torch.from_numpy(lu.solve(p.b))
        if not backward:
            return x
        w = torch.from_numpy(lu.solve(p.g, trans="T"))
        return x, -w[p.row] * x[p.col], w

    return job


def scipy_iterative(p: Problem, name: str, backward: bool, tolerance: float) -> Job:
    method = getattr(scipy_linalg, name)
    options: dict[str, Any] = {"M": sparse.diags_array(1 / p.scipy.diagonal())}
    options |= {"restart": 30} if name == "gmres" else {}

    def job() -> Tensor | tuple[Tensor, ...]:
        x = torch.from_numpy(method(p.scipy, p.b, rtol=tolerance, maxiter=5000, **options)[0])
        if not backward:
            return x
        w = torch.from_numpy(method(p.scipy.T.tocsr(), p.g, rtol=tolerance, maxiter=5000, **options)[0])
        return x, -w[p.row] * x[p.col], w

    return job


# ------------------------------------------------------------------------------------------------------------ cases


def direct(title: str, p: Problem, sla: bool) -> list[Case]:
    cases = []
    for backward in (False, True):
        way = both if backward else forward
        contenders = [Contender("difflayers SuperLU", way(ours(p, SuperLU()), p))]
        if sla:
            contenders.append(Contender("torch-sla scipy lu", way(peer(p, backend="scipy", method="lu"), p)))
        contenders.append(Contender("SciPy splu" + ", adjoint by hand" * backward, scipy_direct(p, backward)))
        reference = (p.x, p.grad, p.w) if backward else p.x
        cases.append(Case(f"{title}, {_pass(backward)}", contenders, reference, target=1e-6))
    return cases


def iterative(title: str, p: Problem, method: str, solver: Callable[..., LinearSolver], sla: bool) -> list[Case]:
    cases, reciprocal = [], 1 / torch.from_numpy(p.scipy.diagonal())

    def jacobi(_: Any, r: Tensor) -> Tensor:
        return reciprocal * r

    for backward in (False, True):
        way, reference = both if backward else forward, (p.x, p.grad, p.w) if backward else p.x
        # CG and MINRES see the symmetric part of a matrix, and their gradients are symmetric
        own = (p.x, p.symmetric_grad, p.w) if backward and method != "gmres" else reference

        def loosest(
            name: str, build: Callable[[float], Job], label: str = "rtol", reference: Any = reference
        ) -> Contender:
            job = AsLooseAs(build, TOLERANCES, reference, TARGET, label)
            return Contender(name, job, reference, job.settings)

        contenders = [
            loosest(
                f"difflayers {solver.__name__}",
                lambda t, way=way: way(ours(p, solver(rtol=t, max_steps=5000, preconditioner=jacobi)), p),
                reference=own,
            )
        ]
        if sla:
            contenders.append(
                loosest(
                    f"torch-sla pytorch {method}",
                    lambda t, way=way: way(
                        peer(p, backend="pytorch", method=method, atol=t * float(p.right.norm()), maxiter=5000), p
                    ),
                    "atol/|b|",
                )
            )
        contenders.append(
            loosest(
                f"SciPy {method}" + ", adjoint by hand" * backward,
                lambda t, backward=backward: scipy_iterative(p, method, backward, t),
            )
        )
        cases.append(Case(f"{title}, {_pass(backward)}", contenders, reference, target=TARGET, memory=False))
    return cases


def _pass(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def batch(p: Problem, sla: bool) -> Case:
    """Eight matrices of one pattern, forward and backward."""
    scale = 1 + torch.arange(BATCH, dtype=D)[:, None] / BATCH
    values, right = (p.ours.values * scale).requires_grad_(), p.right.expand(BATCH, -1).clone().requires_grad_()
    g = p.cotangent.expand(BATCH, -1)

    def job(solve: Callable[[], Tensor]) -> Job:
        def run_one() -> tuple[Tensor, ...]:
            x = solve()
            return (x.detach(), *torch.autograd.grad(x, (values, right), g))

        return run_one

    def peers() -> Tensor:
        from torch_sla import spsolve_batch_same_layout

        return spsolve_batch_same_layout(values, p.row, p.col, p.scipy.shape, right)

    contenders = [Contender("difflayers SuperLU", job(lambda: linear_solve(p.ours._replace(values=values), right)))]
    if sla:
        contenders.append(Contender("torch-sla batch of one layout", job(peers)))
    return Case(
        f"{BATCH} matrices of one pattern, forward and backward",
        contenders,
        (p.x / scale, p.grad / scale**2, p.w / scale),
        target=1e-5,
        memory=False,
    )


def dense(n: int = 1000) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(n, n, generator=generator, dtype=D) + n**0.5 * torch.eye(n, dtype=D)
    b, g = (torch.randn(n, generator=generator, dtype=D) for _ in "bg")
    x, w = torch.linalg.solve(A, b), torch.linalg.solve(A.mT, g)
    leaves = [t.clone().requires_grad_() for t in (A, b)]

    def with_gradients(solve: Callable[[Tensor, Tensor], Tensor]) -> Job:
        def job() -> tuple[Tensor, ...]:
            out = solve(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        return job

    def by_hand() -> tuple[Tensor, ...]:
        factors = dense_linalg.lu_factor(A.numpy())
        x = torch.from_numpy(dense_linalg.lu_solve(factors, b.numpy()))
        w = torch.from_numpy(dense_linalg.lu_solve(factors, g.numpy(), trans=1))
        return x, -torch.outer(w, x), w

    contenders = [
        Contender("difflayers LU", with_gradients(linear_solve)),
        Contender("torch.linalg.solve", with_gradients(torch.linalg.solve)),
        Contender("SciPy lu_factor, adjoint by hand", by_hand),
    ]
    return [
        Case(f"dense, n = {n}, forward and backward", contenders, (x, -torch.outer(w, x), w), target=1e-6, memory=False)
    ]


def right_or_wrong() -> list[Case]:
    """Derivatives of torch-sla that are wrong without a word, beside ours."""
    from torch_sla import spsolve

    generator = torch.Generator().manual_seed(0)
    n, k = 40, 8
    A = torch.randn(n, n, generator=generator, dtype=D) + 10 * torch.eye(n, dtype=D)
    M, b, v = (torch.randn(*s, generator=generator, dtype=D) for s in ((n, k), (n,), (n * n,)))
    rows = {m: [t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")] for m in (n, k)}
    crow = torch.arange(n + 1) * n

    def curved(solve: Callable[[Tensor], Tensor]) -> Job:
        values = A.flatten().clone().requires_grad_()

        def job() -> Tensor:
            (slope,) = torch.autograd.grad(solve(values).square().sum(), values, create_graph=True)
            return torch.autograd.grad(slope @ v, values)[0]

        return job

    def sloped(solve: Callable[[Tensor], Tensor]) -> Job:
        values = M.flatten().clone().requires_grad_()
        return lambda: torch.autograd.grad(solve(values).square().sum(), values)[0]

    hessian = curved(lambda values: torch.linalg.solve(values.reshape(n, n), b))()
    gradient = sloped(lambda values: torch.linalg.pinv(values.reshape(n, k)) @ b)()
    return [
        Case(
            "a product with the Hessian, n = 40",
            [
                Contender("difflayers", curved(lambda t: linear_solve(SparseMatrix(crow, rows[n][1], t, (n, n)), b))),
                Contender("torch-sla scipy lu", curved(lambda t: spsolve(t, *rows[n], (n, n), b, backend="scipy"))),
            ],
            hessian,
            target=1e-6,
            memory=False,
        ),
        Case(
            "gradient of least squares in the matrix, 40 x 8",
            [
                Contender("difflayers", sloped(lambda t: least_squares(t.reshape(n, k), b))),
                Contender(
                    "torch-sla pytorch lsqr",
                    sloped(lambda t: spsolve(t, *rows[k], (n, k), b, backend="pytorch", method="lsqr")),
                ),
            ],
            gradient,
            target=1e-6,
            memory=False,
        ),
    ]


def main(options: Options) -> None:
    sla = available()
    definite, indefinite, general = Problem(darcy(100)), Problem(darcy(100, shift=0.02)), Problem(darcy(50, 0.0, 20.0))
    cases = direct("direct, n = 10000", definite, sla)
    cases += iterative("definite, n = 10000", definite, "cg", CG, sla)
    cases += iterative("indefinite, n = 10000", indefinite, "minres", MINRES, sla)
    cases += iterative("not symmetric, n = 2500", general, "gmres", GMRES, sla)
    cases += [batch(general, sla), *dense(), *(right_or_wrong() if sla else [])]
    run("sparse_solvers", cases, options)
