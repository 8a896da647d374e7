"""A blind oracle of ``argmin(constraint=...)``, written from its documentation alone.

Oracles, written down first. Quadratic programs: all active sets tried in numpy, refined in long double, derivatives of
first and second order from the Taylor series of their KKT systems (:mod:`tests.implicit.enumerated_programs`). Random
problems without convexity: whatever is called solved is checked on its own: feasible, stationary with the multipliers
that are returned, curved upwards along the active rows (numpy eigenvalues), and its gradient against the KKT system of
the active rows. A ball: ``c r / |c|`` and its multiplier ``(|c| / r - 1) / 2`` under torch's own derivatives. Sets by
projection: the same programs with the set written as rows; the ball by bisection on its multiplier.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import SolveError, Status, proximal
from difflayers.implicit import Anderson, Equality, Implicit, Inequality, Newton, Projection, Prox, argmin, argmin_ex
from difflayers.linalg import GMRES, MINRES
from tests.implicit.enumerated_programs import Program, direction, program, solve

DATA = (2, 1, 2, 1, 2, 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def times(A, z):
    return (A @ z[..., None])[..., 0]


def quadratic(z, Q, c, *_):
    return (z * times(Q, z)).sum(-1) / 2 - (c * z).sum(-1)


BELOW = Inequality(lambda z, Q, c, G, h, A, b: times(G, z) - h)
EQUAL = Equality(lambda z, Q, c, G, h, A, b: times(A, z) - b)


def stack(programs):
    return [torch.tensor(np.array([vars(p)[k] for p in programs])) for k in "QcGhAb"]


def distance(z, c, *_):
    return (z - c).square().sum(-1) / 2


def names(solution):
    return [Status(int(s)).name for s in solution.status]


@pytest.mark.parametrize("seed, d, m, p", [(0, 2, 3, 0), (1, 3, 5, 1), (2, 4, 4, 2), (3, 1, 4, 0)])
def test_programs_to_second_order(seed, d, m, p):
    """Values, multipliers and two derivatives along random directions, at scales between 1e-6 and 1e6, in one batch."""
    rng = np.random.default_rng(seed)
    scales = [{}, {}, {"objective": 1e6, "unit": 1e-3}, {"objective": 1e-6}, {"rows": 1e6}, {"unit": 1e5, "rows": 1e3}]
    programs, solutions = [], []
    for scale in scales:
        while True:
            drawn = program(rng, d, m, p, **scale)
            found = drawn.solution()
            if found[4] > 1e-4:
                break
        programs.append(drawn)
        solutions.append(found)
    slopes = [direction(rng, q) for q in programs]
    t = torch.zeros(len(programs), dtype=torch.float64, requires_grad=True)
    data = tuple(a + t.view(-1, *(1,) * (a.ndim - 1)) * b for a, b in zip(stack(programs), stack(slopes), strict=True))
    start = torch.zeros(len(programs), d, dtype=torch.float64)
    solution = argmin_ex(quadratic, start, data, constraint=(BELOW, EQUAL), arg_ndims=DATA)
    assert names(solution) == ["CONVERGED"] * len(programs)
    outputs = (solution.value, *solution.multipliers)
    weights = [torch.tensor(rng.normal(size=v.shape)) for v in outputs]
    derivatives = []
    for v, w in zip(outputs, weights, strict=True):
        first = torch.autograd.grad((v * w).sum(), t, create_graph=True)[0]
        derivatives.append((first, torch.autograd.grad(first.sum(), t, retain_graph=True)[0]))
    for i, (q, (z, multipliers, other, S, _)) in enumerate(zip(programs, solutions, strict=True)):
        for v, expected in zip(outputs, (z, multipliers, other), strict=True):
            error = np.abs(v[i].detach().numpy() - expected)
            # a multiplier that is zero by chance is as exact as the gradient that it is measured by
            assert (error <= 1e-8 * max(np.abs(expected).max(initial=0), 1e-4 * np.abs(q.c).max())).all()
        inactive = np.setdiff1d(np.arange(m), S)
        assert (solution.multipliers[0][i].detach().numpy()[inactive] == 0).all()
        for order, expected in enumerate(q.along(slopes[i], S)):
            for pair, w, e in zip(derivatives, weights, expected, strict=True):
                terms = e * w[i].numpy()
                assert abs(pair[order][i].item() - terms.sum()) <= 1e-6 * np.abs(terms).sum() + 1e-300


@pytest.mark.parametrize("blind", [True, False])
def test_one_bad_element(blind):
    """NaN, contradicting rows, dependent active rows and a weakly active row, side by side with a good element."""
    c = tensor([2.0, 1.0], [2.0, 1.0], [float("nan"), 1.0], [2.0, 1.0], [0.5, 0.5]).requires_grad_()
    rows = tensor([1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 0.0])  # of z0 + z1: factors and bounds
    bounds = tensor([1.0, 9.0], [1.0, 1.0], [1.0, 9.0], [1.0, -3.0], [1.0, 9.0])
    rows = torch.cat([torch.ones(5, 1, dtype=torch.float64), rows[:, 1:]], 1)
    both = Inequality(lambda z, c, rows, bounds: rows * z.sum(-1, keepdim=True) - bounds)
    options = {"constraint": both, "arg_ndims": None if blind else (1, 1, 1)}
    data = c, rows, bounds
    start = torch.zeros(5, 2, dtype=torch.float64)
    solution = argmin_ex(distance, start, data, **options)
    found = names(solution)
    assert found[0] == found[1] == found[4] == "CONVERGED"
    assert found[2] != "CONVERGED" and found[3] == "INFEASIBLE"
    z = argmin(distance, start, data, **options, on_failure="nan")
    half = tensor([1.0, 0.0])
    assert torch.allclose(z[0], half) and torch.allclose(z[1], half) and torch.allclose(z[4], c[4])
    assert z[2:4].isnan().all()
    got = torch.autograd.grad(z[:, 0].sum(), c)[0]
    assert torch.allclose(got[0], tensor(0.5, -0.5)) and got[1].isnan().all()
    assert torch.allclose(got[4], tensor(1.0, 0.0))  # the row at its bound needs no multiplier: absent
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(argmin(distance, start[1:2], [a[1:2] for a in data], **options).sum(), c)


def projected(c, r):
    return torch.where(c.norm() > r, c * r / c.norm(), c)


def in_ball(c, r, linear_solver=None):
    ball = Inequality(lambda z, c, r: z.square().sum(-1) - r**2)
    adjoint = Implicit(linear_solver)
    return argmin_ex(distance, torch.zeros(2, dtype=torch.float64), (c, r), constraint=ball, adjoint=adjoint)


def test_ball_under_transforms():
    c, r = tensor(3.0, 4.0), torch.tensor(2.0, dtype=torch.float64)

    def value(c, r):
        return in_ball(c, r).value

    def pressure(c, r):
        return in_ball(c, r).multipliers.reshape(())

    def multiplier(c, r):
        return (c.norm() / r - 1) / 2

    for transform in (jacrev, jacfwd, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(jacrev(f)))):
        assert torch.allclose(transform(value)(c, r), transform(projected)(c, r), atol=1e-11)
    assert torch.allclose(hessian(pressure)(c, r), hessian(multiplier)(c, r), atol=1e-11)
    many, radii = tensor([3.0, 4.0], [1.0, 1.0], [-5.0, 1.0], [0.1, 0.2]), tensor(2.0, 0.5, 1.0, 1.0)
    assert torch.allclose(vmap(jacrev(value, 1))(many, radii), vmap(jacrev(projected, 1))(many, radii), atol=1e-11)
    expected = vmap(grad(multiplier))(many, radii) * tensor(1.0, 1.0, 1.0, 0.0)[:, None]
    assert torch.allclose(vmap(grad(pressure))(many, radii), expected, atol=1e-11)


@pytest.mark.parametrize("linear_solver", [MINRES(), GMRES()])
def test_ball_by_other_linear_solvers(linear_solver):
    c, r = tensor(3.0, 4.0), torch.tensor(2.0, dtype=torch.float64)
    got = jacrev(lambda c: in_ball(c, r, linear_solver).value)(c)
    assert torch.allclose(got, jacrev(projected)(c, r), atol=1e-9)


@pytest.mark.parametrize("seed, d, m, equal", [(0, 2, 3, 0), (1, 4, 2, 1), (2, 3, 4, 0), (3, 5, 2, 1)])
def test_what_is_called_solved_without_convexity(seed, d, m, equal):
    """sin waves, a quartic and indefinite quadratics; rows with curvature of both signs that depend on the data."""
    rng, n = np.random.default_rng(seed), 12
    Q, W, phase, c, U, V, E, start, w = (
        torch.tensor(rng.normal(size=(n, *s)))
        for s in ((d, d), (3, d), (3,), (d,), (m, d), (m, d, d), (equal, d), (d,), (d,))
    )
    bound = torch.tensor(rng.uniform(0, 1, (n, m)))
    x = torch.tensor(rng.normal(size=(n, 2)) / 2).requires_grad_()

    def f(z, x, Q, W, phase, c, *_):
        waves = 1.5 * (times(W, z) + phase + x[..., :1]).sin().sum(-1)
        return waves + 0.1 * z.pow(4).sum(-1) + (z * times(Q, z)).sum(-1) / 3 + (c * z).sum(-1) * (1 + x[..., 1])

    def g(z, x, Q, W, phase, c, U, V, bound, E):
        curved = torch.einsum("...i,...mij,...j->...m", z, V, z)
        return times(U, z) * (1 + 0.3 * x[..., 1:]) + 0.4 * curved - bound

    def h(z, x, Q, W, phase, c, U, V, bound, E):
        return times(E, z) + 0.3 * z.square().sum(-1, keepdim=True) * x[..., :1]

    rest = (Q, W, phase, c, U, V, bound, E)
    constraint = (Inequality(g), Equality(h)) if equal else (Inequality(g),)
    solution = argmin_ex(f, start, (x, *rest), constraint=constraint, arg_ndims=(1, 2, 2, 1, 1, 2, 3, 1, 2))
    got = torch.autograd.grad((solution.value * w).sum(), x)[0]
    solved = [i for i, name in enumerate(names(solution)) if name == "CONVERGED"]
    assert len(solved) >= n - 4
    for i in solved:
        z, multipliers = solution.value[i].detach(), [v[i].detach() for v in solution.multipliers]
        data = [a[i] for a in rest]
        assert (multipliers[0] >= 0).all()
        active = multipliers[0] > 0

        def conditions(z, x, data=data, multipliers=multipliers, active=active):
            def lagrangian(z):
                total = f(z, x, *data) + multipliers[0] @ g(z, x, *data)
                return total + multipliers[1] @ h(z, x, *data) if equal else total

            return torch.cat([grad(lagrangian)(z), g(z, x, *data)[active], h(z, x, *data)])

        theta, size = x[i].detach(), 1 + float(multipliers[0].max())
        assert float(g(z, theta, *data).max()) <= 1e-8
        assert float(conditions(z, theta).abs().max()) <= 1e-7 * size
        by_z, by_x = (jacfwd(conditions, k)(z, theta).numpy() for k in (0, 1))
        rows = by_z[d:]
        basis = np.linalg.svd(rows)[2][len(rows) :].T if len(rows) else np.eye(d)
        curvature = np.linalg.eigvalsh(basis.T @ by_z[:d] @ basis).min(initial=np.inf)
        assert curvature > 0
        if curvature < 1e-3:
            continue  # beyond the precision of what follows
        K = np.block([[by_z[:d], rows.T], [rows, np.zeros((len(rows), len(rows)))]])
        expected = w[i].numpy() @ -np.linalg.solve(K, by_x)[:d]
        assert np.allclose(got[i].numpy(), expected, rtol=1e-6, atol=1e-7)


def box(z, Q, c, r):
    return torch.minimum(torch.maximum(z, -r[..., None]), r[..., None])


def simplex(z, Q, c, r):
    return r[..., None] * proximal.project_simplex(z / r[..., None])


def ball(z, Q, c, r):
    norm = z.norm(dim=-1, keepdim=True)
    return torch.where(norm > r[..., None], z * r[..., None] / norm, z)


def rows_of(shape, q, r):
    """The set as rows, and the derivative of their bounds in r."""
    d = len(q.c)
    if shape is box:
        return Program(q.Q, q.c, np.vstack([np.eye(d), -np.eye(d)]), np.full(2 * d, r), q.A, q.b), np.ones(2 * d), []
    return Program(q.Q, q.c, -np.eye(d), np.zeros(d), np.ones((1, d)), np.array([r])), np.zeros(d), [1.0]


def by_bisection(q, r):
    """The minimiser in a ball: (Q + mu) z = c with |z| = r."""
    low, high, one = 0.0, 2 * np.linalg.norm(q.c) / r, np.eye(len(q.c))
    for _ in range(120):
        mu = (low + high) / 2
        z = np.linalg.solve(q.Q + mu * one, q.c)
        low, high = (mu, high) if np.linalg.norm(z) > r else (low, mu)
    return z, np.block([[q.Q + mu * one, z[:, None]], [z[None], np.zeros((1, 1))]])


@pytest.mark.parametrize("solver", [None, Anderson(), Newton()])
@pytest.mark.parametrize("shape", [box, simplex, ball])
def test_projections(shape, solver):
    rng, n, d = np.random.default_rng(5), 6, 4
    units = [1.0, 1.0, 1.0, 1.0, 1e6, 1e-6] if solver is None else [1.0] * n
    programs = [program(rng, d, 0, 0, unit=u, objective=1 / u) for u in units]
    sizes = rng.uniform(0.5, 1.5, n) * units
    if shape is ball:  # smaller than the free minimiser
        sizes = np.array([np.linalg.norm(np.linalg.solve(q.Q, q.c)) for q in programs]) * rng.uniform(0.2, 0.8, n)
    Q, c = stack(programs)[:2]
    data = (Q, c.requires_grad_(), torch.tensor(sizes).requires_grad_())
    z = argmin(
        quadratic,
        torch.zeros(n, d, dtype=torch.float64),
        data,
        constraint=Projection(shape),
        solver=solver,
        arg_ndims=(2, 1, 0),
    )
    w = rng.normal(size=(n, d))
    by_c, by_r = torch.autograd.grad((z * torch.tensor(w)).sum(), data[1:])
    for i, q in enumerate(programs):
        if shape is ball:
            expected, K = by_bisection(q, sizes[i])
            bounds = np.array([sizes[i]])
        else:
            written, g, e = rows_of(shape, q, sizes[i])
            expected, _, _, S, margin = written.solution()
            assert margin > 1e-4
            K, bounds = written.kkt(S), np.concatenate([g[S], e])
        q_adjoint = solve(K, np.concatenate([w[i], np.zeros(len(K) - d)]))
        assert np.allclose(z[i].detach().numpy() / units[i], expected / units[i], atol=1e-7)
        curvature = np.abs(q.Q).max()
        assert np.allclose(by_c[i].numpy() * curvature, q_adjoint[:d] * curvature, atol=1e-5)
        assert abs(float(by_r[i]) - q_adjoint[d:] @ bounds) <= 1e-5


def test_soft_threshold_is_a_lasso():
    """All signs tried; derivatives on the support."""
    rng, n, d = np.random.default_rng(6), 6, 3
    programs = [program(rng, d, 0, 0) for _ in range(n)]
    Q, c = stack(programs)[:2]
    weight = torch.tensor(rng.uniform(0.5, 1.5, n)).requires_grad_()

    def soft(z, step, Q, c, weight):
        return z.sign() * (z.abs() - (step * weight)[..., None]).clamp(min=0)

    start = torch.zeros(n, d, dtype=torch.float64)
    z = argmin(quadratic, start, (Q, c, weight), constraint=Prox(soft), arg_ndims=(2, 1, 0))
    got = torch.autograd.grad(z.sum(), weight)[0]
    for i, q in enumerate(programs):
        t = weight[i].item()
        for code in np.ndindex(*(3,) * d):
            sign = np.array(code) - 1.0
            S = np.flatnonzero(sign)
            y, inner = np.zeros(d), np.linalg.inv(q.Q[np.ix_(S, S)])
            y[S] = inner @ (q.c - t * sign)[S]
            if (y[S] * sign[S] > 0).all() and (np.abs(q.c - q.Q @ y)[sign == 0] < t).all():
                break
        assert np.allclose(z[i].detach().numpy(), y, atol=1e-8)
        assert np.isclose(float(got[i]), -(inner @ sign[S]).sum(), atol=1e-7)
