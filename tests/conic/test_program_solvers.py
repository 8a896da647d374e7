"""What lies under `quadratic_program`: solvers, the KKT system on the active set, and gradients written out.

Oracles: the same problem solved alone; the residual's own derivative; a dense LU factorisation of the KKT matrix in
numpy; for dependent rows the pseudo-inverse, whose multipliers are the smallest.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from difflayers import Status
from difflayers.conic import InteriorPoint, Moreau, _moreau, _program_kkt, quadratic_program, quadratic_program_ex
from difflayers.conic._interior_point import _Data, _Reduced

F64 = torch.float64
SOLVERS = [Moreau(), InteriorPoint()]


def drawer(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=F64)


def problem(batch: tuple[int, ...], n: int, p: int = 2, seed: int = 0) -> list[torch.Tensor]:
    draw = drawer(seed)
    root, G, A, x = draw(n, n), draw(n, n), draw(p, n), draw(*batch, n)
    P = root @ root.T / n + 0.1 * torch.eye(n, dtype=F64)
    return [P, draw(*batch, n), G, x @ G.T + draw(*batch, n).abs(), A, x @ A.T]


def test_threads_do_not_share_a_solver():
    """A solver of moreau holds the data of its problem and releases the interpreter while it solves."""
    problems = [problem((32,), 24, seed=k) for k in range(4)]
    expected = [quadratic_program(*data) for data in problems]

    def work(k: int) -> bool:
        return all(torch.equal(quadratic_program(*problems[k]), expected[k]) for _ in range(15))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_public_interface_of_moreau_gives_the_same(monkeypatch):
    """The compiled solver is asked below its checks; a version without that part is asked in the open."""

    class Open:
        def __init__(self, solver):
            self.setup, self.solve, self.solver = solver.setup, solver.solve, solver

        info = property(lambda self: self.solver.info)

    data = problem((3,), 8)
    expected = quadratic_program(*data)
    compiled = _moreau._solvers.compiled
    monkeypatch.setattr(_moreau._solvers, "compiled", lambda *sizes: Open(compiled(*sizes)))
    assert torch.equal(quadratic_program(*data), expected)


SHAPES = {
    "shared matrices": ((), (4,), (), (4,), (), (4,)),
    "everything batched": ((4,),) * 6,
    "only G batched": ((), (), (4,), (), (), ()),
    "broadcast": ((5, 1), (4,), (1, 4), (5, 4), (), (1,)),
    "no batch": ((),) * 6,
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("given", ["GA", "G", "A", ""])
def test_gradients_written_out_are_those_of_the_residual(shapes, given):
    """The plain backward pass has a formula, the differentiable one goes through the residual; P is not symmetric."""
    draw, n = drawer(), 4
    skew = draw(*shapes[0], n, n)
    root = draw(*shapes[0], n, n)
    P = root @ root.mT + torch.eye(n, dtype=F64) + (skew - skew.mT)
    data = {"P": P, "q": draw(*shapes[1], n), "G": draw(*shapes[2], 3, n), "h": draw(*shapes[3], 3).abs() / 4}
    data |= {"A": draw(*shapes[4], 1, n), "b": draw(*shapes[5], 1) / 4}
    leaves = {k: t.requires_grad_() for k, t in data.items() if k in "Pq" or k.upper().replace("H", "G") in given
              or (k == "b" and "A" in given)}  # fmt: skip
    point = quadratic_program_ex(**leaves).value
    assert bool((point.z > 0).any()) or "G" not in given
    out = torch.cat([point.x, point.y, point.z], -1).sin().sum()
    expected = torch.autograd.grad(out, list(leaves.values()), create_graph=True)
    some = [t for k, t in leaves.items() if k in "qG"]
    for found, wanted in (
        (torch.autograd.grad(out, list(leaves.values()), retain_graph=True), expected),
        (torch.autograd.grad(out, some), [g for k, g in zip(leaves, expected, strict=True) if k in "qG"]),
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)


def kkt_matrix(P: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cat([P, C.T], 1), torch.cat([C, torch.zeros(len(C), len(C), dtype=F64)], 1)])


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_kkt_solve_is_as_accurate_as_a_dense_factorisation(condition):
    """Measured in extended precision: without refinement, elimination loses half of the digits at 1e10."""
    draw, n, r = drawer(), 30, 18
    Q = torch.linalg.qr(draw(n, n))[0]
    P = (Q * torch.logspace(0, -np.log10(condition), n, dtype=F64)) @ Q.T
    P, C = (P + P.T) / 2, draw(r, n)
    r1, r2 = draw(1, n), draw(1, r)
    factors = _program_kkt.factorise(P, C, torch.ones(1, r, dtype=F64))
    u, v, info = _program_kkt.solve(factors, r1, r2)
    K, right = kkt_matrix(P, C).numpy(), torch.cat([r1, r2], -1)[0].numpy()
    exact = np.linalg.solve(K, right).astype(np.longdouble)
    for _ in range(4):
        exact += np.linalg.solve(K, (right - K.astype(np.longdouble) @ exact).astype(float))
    found = torch.cat([u, v], -1)[0].numpy()
    error, dense = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (found, np.linalg.solve(K, right)))
    assert error < 3 * dense + 1e-14
    assert int(info.status) == Status.CONVERGED


def test_an_element_that_needs_refinement_leaves_the_others_to_the_bit():
    draw, n, r = drawer(), 12, 5
    root, C, active = draw(2, n, n), draw(2, r, n), torch.ones(2, r, dtype=F64)
    good = root @ root.mT + torch.eye(n, dtype=F64)
    bad = good.clone()
    bad[1] = torch.diag(torch.logspace(0, -10, n, dtype=F64))
    r1, r2 = draw(2, n), draw(2, r)
    first, second = (_program_kkt.solve(_program_kkt.factorise(P, C, active), r1, r2)[:2] for P in (good, bad))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_elements_leave_the_others_to_the_bit_where_matrices_are_shared(solver):
    """64 elements, one infeasible and one unbounded, P with a null space that the constraints leave open."""
    draw = drawer()
    P, G, q = torch.diag(torch.tensor([1.0, 2, 3, 0], dtype=F64)), draw(6, 4), draw(64, 4)
    G[:, 3] = G[:, 3].abs()  # the last variable may fall, and does where its cost is positive
    q[:, 3] = -1
    G, h = torch.cat([G, -G[:1]]), draw(64, 7).abs() + 0.1
    q_bad, h_bad = q.clone(), h.clone()
    h_bad[5, 0], h_bad[5, 6] = -5, -5
    q_bad[9, 3] = 1
    h[9, 6], h_bad[9, 6] = 1e3, torch.inf
    rest = torch.ones(64, dtype=torch.bool)
    rest[[5, 9]] = False

    def run(q, h):
        leaves = [t.clone().requires_grad_() for t in (P, q, G, h)]
        x = quadratic_program(*leaves, solver=solver, on_failure="nan")
        return quadratic_program_ex(P, q, G, h, solver=solver).status, x, torch.autograd.grad(x[rest].sum(), leaves)

    _, x, first = run(q, h)
    status, y, second = run(q_bad, h_bad)
    assert status[5] == Status.INFEASIBLE and status[9] == Status.UNBOUNDED
    assert bool((status[rest] == Status.CONVERGED).all())
    assert torch.equal(x[rest], y[rest]) and bool(torch.isnan(y[[5, 9]]).all())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dependent_equalities(solver):
    """The active set of moreau gives up on them. Of their multipliers the smallest are differentiated."""
    P = torch.diag(torch.tensor([1.0, 2, 3], dtype=F64))
    q = torch.tensor([[1.0, -2, 0.5], [0.3, 0.2, 0.1]], dtype=F64, requires_grad=True)
    A, b = torch.tensor([[1.0], [1], [2]], dtype=F64).expand(3, 3), torch.tensor([1.0, 1, 2], dtype=F64)
    b.requires_grad_()
    x = quadratic_program(P, q, A=A, b=b, solver=solver)
    inverse = torch.linalg.pinv(kkt_matrix(P, A))
    expected = torch.cat([-q, b.expand(2, 3)], -1) @ inverse
    torch.testing.assert_close(x, expected[:, :3])
    found, wanted = (torch.autograd.grad(t[:, 0].sum(), (q, b)) for t in (x, expected))
    for a, c in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, c)


@dataclasses.dataclass(frozen=True)
class Sloppy:
    """A solver of somebody else's, right to two digits."""

    def solve(self, P, q, G, h, A, b):
        x, y, z, status, steps = Moreau().solve(P, q, G, h, A, b)
        draw = drawer()
        return x + 0.01 * draw(*x.shape), y + 0.01 * draw(*y.shape), z + 0.01 * draw(*z.shape).abs(), status, steps


def test_the_active_set_of_a_sloppy_solver_is_corrected():
    data = problem((64,), 12)
    found, expected = quadratic_program_ex(*data, solver=Sloppy()), quadratic_program_ex(*data)
    guess = Sloppy().solve(*data)
    slack = data[3] - guess[0] @ data[2].T
    assert bool(((guess[2] > slack) != (expected.value.z > 0)).any())  # there is something to correct
    assert bool(found.converged.all()) and float(found.residual.max()) < 1e-12
    for a, b in zip(found.value, expected.value, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_interior_point_meets_tight_tolerances_and_ends_in_the_exact_point():
    """Some of these have a multiplier and a slack of 1e-5 on one row, which an interior point takes for each other."""
    data = problem((128,), 10, seed=0)
    for rtol in (None, 1e-11):
        found, expected = quadratic_program_ex(*data, solver=InteriorPoint(rtol)), quadratic_program_ex(*data)
        assert bool(found.converged.all()) and float(found.residual.max()) < 1e-13
        for a, b in zip(found.value, expected.value, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_float32_is_solved_in_float64():
    """At 1e-9, which float32 cannot reach; a float32 interior point gives up on most of these."""
    draw, n = drawer(), 30
    scale = torch.logspace(0, -4, n, dtype=F64)
    root = draw(n, n) * scale
    data = [t.float() for t in (root.T @ root, draw(8, n) * scale, draw(n, n), draw(8, n).abs())]
    found, exact = (
        quadratic_program_ex(*(t.to(dtype) for t in data), solver=InteriorPoint()) for dtype in (torch.float32, F64)
    )
    assert found.value.x.dtype == torch.float32 and bool(found.converged.all())
    assert torch.equal(found.steps, exact.steps)
    error = torch.linalg.vector_norm(found.value.x - exact.value.x, dim=-1)
    assert bool((error < 1e-4 * torch.linalg.vector_norm(exact.value.x, dim=-1)).all())


def test_steps_of_the_interior_point_are_refined():
    """At weights that span 16 decades, as they do close to the solution."""
    draw, n, m, p = drawer(), 12, 20, 3
    root = draw(n, n)
    w = torch.logspace(-8, 8, m, dtype=F64)[None]
    data = _Data(root @ root.T, draw(1, n), draw(m, n), draw(1, m), draw(p, n), draw(1, p), w > 0)
    system = _Reduced(data, w)
    t, r_e = draw(1, n), draw(1, p)

    def miss(dx, dy):
        H = data.P + data.G.T @ (w[0, :, None] * data.G)
        return float((t - dx @ H - dy @ data.A).abs().max() + (dx @ data.A.T + r_e).abs().max())

    assert miss(*system.solve(t, r_e)) < 0.1 * miss(*system.once(t, r_e))


def test_matrices_are_factorised_once(monkeypatch):
    """P, and the Gram matrix of its rows; what is known of P serves the check, the solver and the derivative."""
    seen = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda H: seen.append(tuple(H.shape)) or factorise(H))
    leaves = [t.requires_grad_() for t in problem((3,), 6)]
    quadratic_program(*leaves).sum().backward()
    assert seen == [(6, 6), (3, 8, 8)]
