"""Quadratic programs, forward and backward: ours against moreau's torch API, cvxpylayers' default and qpth.

Every contender computes `x = argmin 1/2 x'Px + q'x s.t. Gx <= h, Ax = b` and the cotangents of all six data for a given
cotangent of `x`; `P`, `G` and `A` are shared by the batch, and there are as many dense inequalities as variables, and
a fifth as many equalities. Every contender keeps its default settings, except that qpth gets expanded matrices: it
averages the gradients of shared ones over the batch. cvxpylayers takes the Cholesky factor of `P`, as its grammar
demands, and is left out where one call takes ten seconds.

The reference takes the active set from Clarabel at a tolerance of 1e-12 and solves the KKT system of it by a dense LU
factorisation, with two steps of iterative refinement in extended precision, once for `x` and the multipliers and once
for the cotangents: with `K (u, v) = -(g, 0)` they are `u` of `q`, `-v` of the bounds, `(u x' + x u') / 2` of `P` and
`y u' + v x'` of the rows with multipliers `y`.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.conic import InteriorPoint, quadratic_program

SIZES = (10, 50, 100)
BATCHES = (1, 128)
TOO_SLOW = {("cvxpylayers", 128, 100)}
F64 = torch.float64

Layer = Callable[..., Tensor]


def programs(batch: int, n: int) -> tuple[Tensor, ...]:
    """Feasible by construction."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    root, G, A, q, x = draw(n, n), draw(n, n), draw(n // 5, n), draw(batch, n), draw(batch, n)
    h = x @ G.T + torch.rand(batch, n, generator=generator, dtype=F64)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=F64), q, G, h, A, x @ A.T


def active_sets(data: Sequence[Tensor]) -> np.ndarray:
    import clarabel
    from scipy import sparse

    P, q, G, h, A, b = (t.numpy() for t in data)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    rows, upper = sparse.csc_matrix(np.concatenate([A, G])), sparse.csc_matrix(np.triu(P))
    cones = [clarabel.ZeroConeT(len(A)), clarabel.NonnegativeConeT(len(G))]
    found = []
    for q_i, h_i, b_i in zip(q, h, b, strict=True):
        solution = clarabel.DefaultSolver(upper, q_i, rows, np.concatenate([b_i, h_i]), cones, settings).solve()
        found.append(np.array(solution.z) > np.array(solution.s))
    return np.array(found)[:, len(A) :]


def accurate_solve(K: np.ndarray, right: np.ndarray) -> np.ndarray:
    wide, x = K.astype(np.longdouble), np.linalg.solve(K, right).astype(np.longdouble)
    for _ in range(2):
        x += np.linalg.solve(K, (right - wide @ x).astype(float))
    return x.astype(float)


def reference(data: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """``x`` and the cotangents of ``P, q, G, h, A, b``."""
    P, q, G, h, A, b = (t.numpy() for t in data)
    n, p = len(P), len(A)
    of_P, of_G, of_A = np.zeros_like(P), np.zeros_like(G), np.zeros_like(A)
    of_q, of_h, of_b, x = np.zeros_like(q), np.zeros_like(h), np.zeros_like(b), np.zeros_like(q)
    for i, on in enumerate(active_sets(data)):
        C = np.concatenate([A, G[on]])
        K = np.block([[P, C.T], [C, np.zeros((len(C), len(C)))]])
        point = accurate_solve(K, np.concatenate([-q[i], b[i], h[i][on]]))
        w = accurate_solve(K, np.concatenate([-g[i].numpy(), np.zeros(len(C))]))
        x[i], y, u, v = point[:n], point[n:], w[:n], w[n:]
        rows = np.outer(y, u) + np.outer(v, x[i])
        of_P += (np.outer(u, x[i]) + np.outer(x[i], u)) / 2
        of_A, of_G[on] = of_A + rows[:p], of_G[on] + rows[p:]
        of_q[i], of_b[i], of_h[i, on] = u, -v[:p], -v[p:]
    return tuple(map(torch.from_numpy, (x, of_P, of_q, of_G, of_h, of_A, of_b)))


def moreau_api(batch: int, n: int) -> Layer:
    import moreau.torch

    p = n // 5

    def dense(rows: int) -> tuple[Tensor, Tensor]:
        return torch.arange(rows + 1) * n, torch.arange(n).repeat(rows)

    cones = moreau.Cones(num_zero_cones=p, num_nonneg_cones=n)
    settings = moreau.Settings(device="cpu", batch_size=batch, enable_grad=True)
    solver = moreau.torch.Solver(n, p + n, *dense(n), *dense(p + n), cones, settings)

    def layer(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return solver.solve(P.reshape(-1), torch.cat([A, G]).reshape(-1), q, torch.cat([b, h], -1)).x

    return layer


def cvxpylayers_default(batch: int, n: int) -> Layer:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    p, x = n // 5, cp.Variable(n)
    root, q, G, h, A, b = (cp.Parameter(shape) for shape in ((n, n), n, (n, n), n, (p, n), p))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(root @ x) / 2 + q @ x), [G @ x <= h, A @ x == b])
    compiled = CvxpyLayer(problem, [root, q, G, h, A, b], [x])
    return lambda P, *rest: compiled(torch.linalg.cholesky(P).mT, *rest)[0]


def qpth_default(batch: int, n: int) -> Layer:
    from qpth.qp import QPFunction

    solve = QPFunction(verbose=-1)
    return lambda P, q, G, h, A, b: solve(*(M.expand(batch, *M.shape[-k:]) for M, k in zip(
        (P, q, G, h, A, b), (2, 1, 2, 1, 2, 1), strict=True)))  # fmt: skip


PEERS: dict[str, tuple[str, Callable[[int, int], Layer]]] = {
    "moreau.torch.Solver": ("moreau", moreau_api),
    "cvxpylayers, default solver": ("cvxpylayers", cvxpylayers_default),
    "qpth": ("qpth", qpth_default),
}


def forward_backward(build: Callable[[], Layer], data: Sequence[Tensor], g: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_() for t in data]
    made: list[Layer] = []

    def job() -> tuple[Tensor, ...]:
        if not made:
            made.append(build())
        x = made[0](*leaves)
        return (x.detach(), *torch.autograd.grad(x, leaves, g))

    return job


def case(batch: int, n: int, device: str) -> Case:
    data = programs(batch, n)
    g = torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected = tuple(t.to(device) for t in reference(data, g))
    on_device, g_device = [t.to(device) for t in data], g.to(device)

    def interior_point(*data: Tensor) -> Tensor:
        return quadratic_program(*data, solver=InteriorPoint())

    ours: dict[str, Layer] = {
        "difflayers.conic.quadratic_program": quadratic_program,
        "the same, InteriorPoint": interior_point,
    }
    contenders = [
        Contender(name, forward_backward(lambda layer=layer: layer, on_device, g_device))  # type: ignore[misc]
        for name, layer in ours.items()
    ]
    for name, (package, build) in PEERS.items():
        if util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
        elif (package, batch, n) not in TOO_SLOW:
            made: Any = lambda build=build: build(batch, n)  # noqa: E731
            contenders.append(Contender(name, forward_backward(made, data, g), tuple(t.cpu() for t in expected)))
    return Case(f"batch {batch}, n = {n}", contenders, expected, memory=False, target=1e-9)


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moreau's of its choice of solver, qpth's of its stagnation
        run("quadratic_program", [case(batch, n, options.device) for batch in BATCHES for n in SIZES], options)
