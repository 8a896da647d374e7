"""A blind oracle of lower problems with inequalities or a set, written from the documentation alone.

Oracles, written down first. ``min y'Qy/2 - (C x)'y`` subject to ``G y <= h + B x``, or on a box or a simplex whose size
depends on x: all active sets tried in numpy (:mod:`tests.implicit.enumerated_programs`), the adjoint from the KKT
matrix of the rows found. Points that are no solution: statements of the docstrings, by hand. A linear module under a
bound on its weight: the free weight is a one-dimensional ridge regression in closed form.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflayers import SolveError, proximal
from difflayers.bilevel import ArgminLayer, Bilevel, hypergradient
from difflayers.implicit import Implicit
from difflayers.linalg import GMRES, LU, MINRES, QR
from tests.implicit.enumerated_programs import Program, program, solve


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(rng, kind, d, n, scale):
    """A program at x with a margin, its parts that depend on x, and a target of the upper objective."""
    while True:
        q, x, t = program(rng, d, 4, 0, **scale), rng.normal(size=n), rng.normal(size=d)
        C = rng.normal(size=(d, n)) * np.abs(q.c).max()
        q.c = C @ x
        t = t * np.linalg.norm(np.linalg.solve(q.Q, q.c))
        none = np.zeros((0, n))
        if kind == "rows":
            by_x, sum_by_x = rng.normal(size=(4, n)) * np.abs(q.h)[:, None], none
            q.h = q.h + by_x @ x
        else:
            size = np.abs(t).mean() * (1 + 0.1 * x[0])
            slope = np.eye(1, n) * 0.1 * np.abs(t).mean()
            if kind == "box":
                q = Program(q.Q, q.c, np.vstack([np.eye(d), -np.eye(d)]), np.full(2 * d, size), q.A, q.b)
                by_x, sum_by_x = np.repeat(slope, 2 * d, 0), none
            else:
                q = Program(q.Q, q.c, -np.eye(d), np.zeros(d), np.ones((1, d)), np.array([size]))
                by_x, sum_by_x = np.zeros((d, n)), slope
        found = q.solution()
        if found is not None and found[4] > 1e-3:
            return q, x, t, C, by_x, sum_by_x, found


def problem(kind, q, x, t, C, by_x, dtype):
    Q, T, C, G, B, h = (torch.tensor(a, dtype=dtype) for a in (q.Q, t, C, q.G, by_x, q.h - by_x @ x))
    half = float(np.abs(t).mean())

    def onto_box(y, x):
        size = half * (1 + 0.1 * x[0])
        return torch.minimum(torch.maximum(y, -size), size)

    def onto_simplex(y, x):
        size = half * (1 + 0.1 * x[0])
        return size * proximal.project_simplex(y / size)

    parts = {
        "rows": {"constraint": lambda x, y: G @ y - h - B @ x},
        "box": {"project_lower": onto_box},
        "simplex": {"project_lower": onto_simplex},
    }
    return Bilevel(
        lambda x, y, batch: (y - T).square().sum() / 2,
        lambda x, y, batch: y @ Q @ y / 2 - (C @ x) @ y,
        **parts[kind],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["rows", "box", "simplex"])
def test_programs(kind, dtype):
    scales = [{}, {}, {"objective": 1e5}, {"objective": 1e-5, "unit": 1e4}, {"unit": 1e-4}, {"rows": 1e5}]
    rng = np.random.default_rng(3)
    for scale in scales if dtype == torch.float64 else scales[:2]:
        for d, n in ((1, 1), (4, 2)):
            q, x, t, C, by_x, sum_by_x, (y, _, _, S, _) = draw(rng, kind, d, n, scale)
            K = q.kkt(S)
            adjoint = solve(K, np.concatenate([y - t, np.zeros(len(K) - d)]))
            expected = C.T @ adjoint[:d] + by_x[S].T @ adjoint[d : d + len(S)] + sum_by_x.T @ adjoint[d + len(S) :]
            p, at = problem(kind, q, x, t, C, by_x, dtype), torch.tensor(x, dtype=dtype)
            tol = (1e-6 if dtype == torch.float64 else 3e-3) * max(np.abs(expected).max(), np.abs(y - t).max() ** 2)
            got = hypergradient(p, at, torch.tensor(y, dtype=dtype)).grad
            assert np.allclose(got.numpy(), expected, rtol=0, atol=tol)
            at.requires_grad_()
            layer = ArgminLayer(p)(at, init=torch.zeros(d, dtype=dtype))
            size = np.abs(y).max() + 1e-30
            assert np.allclose(layer.detach().numpy() / size, y / size, atol=1e-6 if dtype == torch.float64 else 3e-3)
            got = torch.autograd.grad(p.upper(at, layer, None), at)[0]
            assert np.allclose(got.numpy(), expected, rtol=0, atol=tol)


def total(x, y, batch):
    return y.sum()


def near(x, y, batch):
    return (y - x).square().sum() / 2


BOUNDED = Bilevel(total, near, constraint=lambda x, y: y - 1)


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ((3.0, 0.5), (1.0, 0.5), (0.0, 1.0)),
        ((1.0, 0.5), (1.0, 0.5), (1.0, 1.0)),  # weakly active: absent
        ((1 + 1e-4, 0.5), (1.0, 0.5), (0.0, 1.0)),
        ((3.0, 1 - 1e-7), (1.0, 1 - 1e-7), (0.0, 1.0)),  # all but at its bound, without pressure
        ((3.0, 4.0), (1.0, 1.0), (0.0, 0.0)),  # no freedom left
    ],
)
def test_rows_are_read_off_the_point(x, y, expected):
    for factor in (1.0, 1e8, 1e-8):
        scaled = Bilevel(total, near, constraint=lambda x, y, factor=factor: factor * (y - 1))
        assert torch.allclose(hypergradient(scaled, tensor(*x), tensor(*y)).grad, tensor(*expected), atol=1e-9)


@pytest.mark.parametrize("y, match", [((1.1, 0.5), "row 0"), ((1 + 1e-5, 0.5), "row 0")])
def test_points_outside(y, match):
    with pytest.raises(ValueError, match=match):
        hypergradient(BOUNDED, tensor(3.0, 0.5), tensor(*y))


def test_point_that_leaves_its_bound():
    with pytest.raises(ValueError, match="negative"):
        hypergradient(BOUNDED, tensor(0.2, 0.5), tensor(1.0, 0.5))


@pytest.mark.parametrize("solver", [None, MINRES(), GMRES(), LU(), QR()])
def test_saddles_do_not_pass(solver):
    """-y0^2 + y1^2 + x'y has its stationary point inside of the set, and it is none of its minima."""

    def saddle(x, y, batch):
        return x @ y - y[0].square() + y[1].square()

    adjoint = None if solver is None else Implicit(solver)
    x, y = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(SolveError):
        hypergradient(Bilevel(total, saddle, constraint=lambda x, y: y[0] - 2), x, y, adjoint=adjoint)
    box = Bilevel(total, saddle, project_lower=lambda y, x: y.clamp(-2, 2))
    if solver is None:
        with pytest.raises(SolveError):
            hypergradient(box, x, y)
        with pytest.raises(SolveError):
            ArgminLayer(box)(x, init=y)
    # held by the bound along the direction that bends downwards, it is one: y1 = -x1 / 2
    assert torch.allclose(hypergradient(box, tensor(0.1, 0.2), tensor(-2.0, -0.1)).grad, tensor(0.0, -0.5))


def test_dependent_rows_have_no_multipliers_but_a_hypergradient():
    twice = Bilevel(total, near, constraint=lambda x, y: torch.stack([y[0] - 1, y[0] - 1]))
    x = tensor(3.0, 0.5)
    assert torch.allclose(hypergradient(twice, x, tensor(1.0, 0.5)).grad, tensor(0.0, 1.0), atol=1e-9)
    y = ArgminLayer(twice)(x.requires_grad_(), init=torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(y, tensor(1.0, 0.5))
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(y.sum(), x)


def test_contradicting_rows():
    empty = Bilevel(total, near, constraint=lambda x, y: torch.stack([y.sum() - x[0], 1 + x[0] - y.sum()]))
    with pytest.raises(SolveError, match="INFEASIBLE"):
        ArgminLayer(empty)(tensor(0.3, 0.5), init=torch.zeros(2, dtype=torch.float64))


def test_module_under_a_bound():
    """w = (w0, w1) with w0 = 1 at its bound: w1 = u1'(t - u0) / (u1'u1 + n e^x)."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    t = u @ tensor(2.0, 0.3)
    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)

    def fit(x, y, batch):
        return (y(u)[:, 0] - t).square().mean() + x.exp() * y.weight.square().sum()

    def error(x, y, batch):
        return (y(u)[:, 0] - t).square().mean()

    p = Bilevel(error, fit, constraint=lambda x, y: y.weight[0, 0] - 1)

    def by_hand(x):
        w1 = u[:, 1] @ (t - u[:, 0]) / (u[:, 1] @ u[:, 1] + 20 * x.exp())
        return torch.stack([torch.ones_like(w1), w1])

    x = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((u @ by_hand(x) - t).square().mean(), x)[0]
    w = ArgminLayer(p)(x, init=module)["weight"]
    assert torch.allclose(w[0], by_hand(x))
    assert torch.allclose(torch.autograd.grad((u @ w[0] - t).square().mean(), x)[0], expected)
    with torch.no_grad():
        module.weight.copy_(w)
    assert torch.allclose(hypergradient(p, x.detach(), module).grad, expected)
