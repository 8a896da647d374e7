"""The smoothed derivative of a quadratic program.

Oracle: the minimiser with logarithmic barriers by a damped Newton method in numpy, moved by central differences.
"""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from difflayers import SolveError, SolveWarning, Status, trace
from difflayers.conic import InteriorPoint, Moreau, quadratic_program, quadratic_program_ex

F64 = torch.float64
ARGUMENTS = ("P", "q", "G", "h", "A", "b")


def program(seed: int = 0, batch: int = 3, n: int = 4, m: int = 5) -> list[torch.Tensor]:
    """Strictly feasible, with one equality; P, G and A shared."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    root, G, A, inside = draw(n, n), draw(m, n), draw(1, n), 0.3 * draw(batch, n)
    slack = 0.1 + torch.rand(batch, m, generator=generator, dtype=F64)
    return [root @ root.T / n + 0.3 * torch.eye(n, dtype=F64), draw(batch, n), G, inside @ G.T + slack, A, inside @ A.T]


def central(P, q, G, h, A, b, kappa, start):
    """The minimiser of the barrier function on the equalities, from a point inside: x, multipliers."""
    P = (P + P.T) / 2
    x = start
    for _ in range(200):
        s = h - G @ x
        H = P + kappa * G.T @ np.diag(s**-2.0) @ G
        K = np.block([[H, A.T], [A, np.zeros((len(b), len(b)))]])
        right = np.concatenate([-(P @ x + q + kappa * G.T @ (1 / s)), b - A @ x])
        step, y = np.split(np.linalg.solve(K, right), [len(q)])
        t = 1.0
        while (h - G @ (x + t * step) <= 0.01 * s).any():
            t /= 2
        x = x + t * step
    return x, y, kappa / (h - G @ x)


def moved(data, i, direction, kappa, starts, step=1e-6):
    """Central differences of the oracle along `direction` of argument `i`."""
    sides = []
    for sign in (1, -1):
        at = [t.numpy().copy() for t in data]
        at[i] = at[i] + sign * step * direction.numpy()
        P, q, G, h, A, b = at
        sides.append([np.concatenate(central(P, q[k], G, h[k], A, b[k], kappa, starts[k])) for k in range(len(q))])
    return torch.from_numpy((np.array(sides[0]) - np.array(sides[1])) / (2 * step))


def starts_of(data, kappa):
    """Points inside: the analytic centre of the constraints by minimising the largest excess."""
    from scipy.optimize import linprog

    _, q, G, h, A, b = (t.numpy() for t in data)
    found = []
    for k in range(len(q)):
        n, m = q.shape[-1], len(G)
        rows, equal = np.c_[G, np.ones(m)], np.c_[A, np.zeros(len(A))]
        best = linprog(np.r_[np.zeros(n), -1.0], rows, h[k], equal, b[k], bounds=[(None, None)] * n + [(None, 1.0)])
        found.append(best.x[:n])
    return found


@pytest.mark.parametrize("kappa", [1e-3, 0.5])
@pytest.mark.parametrize("i", range(6), ids=ARGUMENTS)
def test_derivative_is_that_of_the_central_path(i, kappa):
    data = program()
    direction = torch.cos(torch.arange(data[i].numel(), dtype=F64)).reshape(data[i].shape)

    def point(t):
        P, q, G, h, A, b = (t if k == i else d for k, d in enumerate(data))
        x, y, z, _ = quadratic_program_ex(P, q, G, h, A, b, smoothing=kappa).value
        return torch.cat([x, y, z], -1)

    _, slope = torch.func.jvp(point, (data[i],), (direction,))
    expected = moved(data, i, direction, kappa, starts_of(data, kappa))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    leaf = data[i].clone().requires_grad_()
    g = torch.sin(torch.arange(slope.numel(), dtype=F64)).reshape(slope.shape)
    (pulled,) = torch.autograd.grad(point(leaf), leaf, g)
    torch.testing.assert_close((pulled * direction).sum(), (g * slope).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [Moreau(), InteriorPoint()])
def test_value_is_sharp(solver):
    data = program()
    data[1].requires_grad_()
    sharp = quadratic_program_ex(*data, solver=solver)
    found = quadratic_program_ex(*data, solver=solver, smoothing=0.1)
    for a, b in zip(found.value, sharp.value, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(quadratic_program(*data, solver=solver, smoothing=0.1), sharp.value.x)
    assert bool(found.converged.all()) and torch.equal(found.steps, sharp.steps)


def test_tends_to_the_exact_derivative():
    """The error falls with kappa, where slack and multiplier are never both small."""
    data = [t.requires_grad_() for t in program(20)]
    point = quadratic_program_ex(*data).value
    assert float(torch.maximum(point.s, point.z).detach().min()) > 0.05  # strict complementarity
    exact = torch.autograd.grad(quadratic_program(*data).sin().sum(), data)
    errors = []
    for kappa in (1e-4, 1e-6, 1e-8):
        near = torch.autograd.grad(quadratic_program(*data, smoothing=kappa).sin().sum(), data)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(near, exact, strict=True)))
    assert errors[0] < 0.05
    assert errors[1] < 0.02 * errors[0] and errors[2] < 0.02 * errors[1]


def test_second_derivatives_are_those_of_the_smoothed_map():
    """The gradient of all outputs, as a function of the data, against its own central differences."""
    data = program(1)
    data[3][0, 1] = math.inf
    unbounded = torch.isinf(data[3])

    def slope(P, q, G, bounds, A, b):
        h = torch.where(unbounded, math.inf, bounds)
        x, y, z, _ = quadratic_program_ex(P, q, G, h, A, b, smoothing=0.05).value
        return torch.autograd.grad(torch.cat([x, y, z], -1), (q, G), weight, create_graph=True)

    weight = torch.cos(torch.arange(3 * 10, dtype=F64)).reshape(3, 10)
    leaves = [torch.where(torch.isinf(t), 0, t).requires_grad_() for t in data]
    assert gradcheck(slope, leaves, fast_mode=True)


def test_vertex_of_a_linear_program_gets_a_gradient_that_leads_somewhere():
    """Costs are learned so that a wanted vertex is optimal: with the exact derivative nothing moves."""
    P, eye = torch.zeros(3, 3, dtype=F64), torch.eye(3, dtype=F64)
    G, h = torch.cat([eye, -eye]), torch.ones(6, dtype=F64)
    wanted = torch.tensor([1.0, -1.0, 1.0], dtype=F64)

    def train(**options):
        q = torch.tensor([1.0, -1.0, 1.0], dtype=F64, requires_grad=True)
        for _ in range(60):
            loss = (quadratic_program(P, q, G, h, **options) - wanted).square().sum()
            (slope,) = torch.autograd.grad(loss, q)
            q = (q - 0.1 * slope).detach().requires_grad_()
        return slope, quadratic_program(P, q, G, h).detach()

    slope, x = train()
    assert bool((slope.abs() < 1e-12).all()) and not torch.allclose(x, wanted)
    _, x = train(smoothing=0.1)
    torch.testing.assert_close(x, wanted)


def test_where_a_constraint_turns_active_the_derivative_is_in_between():
    """min 1/2 x^2 + q x, x <= 0 at q = 0: one-sided derivatives 0 and -1, exact element -1, central path -1/2."""
    one = torch.ones(1, 1, dtype=F64)
    q = torch.zeros(1, dtype=F64, requires_grad=True)
    slope = lambda **options: torch.autograd.grad(  # noqa: E731
        quadratic_program(one, q, one, torch.zeros(1, dtype=F64), **options), q
    )[0].item()
    assert slope() == pytest.approx(-1)
    assert slope(smoothing=1e-4) == pytest.approx(-0.5)


def test_without_inequalities_it_is_exact_and_without_a_gradient_it_costs_nothing():
    P, q, G, h, A, b = program()
    q.requires_grad_()
    exact, smooth = (
        torch.autograd.grad(quadratic_program(P, q, A=A, b=b, **options).sin().sum(), q)[0]
        for options in ({}, {"smoothing": 0.1})
    )
    assert torch.equal(exact, smooth)
    with torch.no_grad(), trace() as solves:
        quadratic_program(P, q, G, h, A, b, smoothing=0.1)
    assert len(solves) == 1
    with trace() as solves:
        quadratic_program(P, q, G, h, A, b, smoothing=0.1)
    assert [record.name for record in solves][1] == "quadratic_program[smoothing=0.1]"


def test_infinite_bounds_bind_nothing():
    P, q, G, h, A, b = program()
    h[:, 1] = math.inf
    rest = [0, 2, 3, 4]
    slopes = []
    for rows, bounds in ((G, h), (G[rest], h[:, rest])):
        leaf, bounds = q.clone().requires_grad_(), bounds.clone().requires_grad_()
        x = quadratic_program(P, leaf, rows, bounds, A, b, smoothing=0.01)
        slopes.append(torch.autograd.grad(x.sin().sum(), (leaf, bounds)))
    torch.testing.assert_close(slopes[0][0], slopes[1][0])
    torch.testing.assert_close(slopes[0][1][:, rest], slopes[1][1])
    assert bool((slopes[0][1][:, 1] == 0).all())


def test_elements_without_a_point_inside_fail_alone():
    P, q, G, h, A, b = program()
    h[1, 0] = float((quadratic_program(P, q, G, h, A, b)[1] * G[0]).sum())
    G, h = torch.cat([G, -G[:1]]), torch.cat([h, 100 + torch.zeros(3, 1, dtype=F64)], -1)
    h[1, -1] = -h[1, 0]  # the first row is an equality
    q.requires_grad_()
    assert bool(quadratic_program_ex(P, q.detach(), G, h, A, b).converged.all())
    with pytest.raises((SolveError, SolveWarning), match=r"smoothing=0.01"):
        quadratic_program(P, q, G, h, A, b, smoothing=0.01)
    found = quadratic_program_ex(P, q, G, h, A, b, smoothing=0.01)
    assert [s == Status.CONVERGED for s in found.status.tolist()] == [True, False, True]
    assert bool(torch.isfinite(found.value.x).all())


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, math.inf, True, "small", torch.ones(())])
def test_wrong_kappa(wrong):
    with pytest.raises(ValueError, match="smoothing: expected a positive number or None"):
        quadratic_program(*program(), smoothing=wrong)


def test_vmap_and_batches_agree():
    data = program()
    q = data[1].clone().requires_grad_()
    (whole,) = torch.autograd.grad(quadratic_program(data[0], q, *data[2:], smoothing=0.05).sin().sum(), q)
    P, _, G, _, A, _ = data
    one = torch.func.grad(lambda q, h, b: quadratic_program(P, q, G, h, A, b, smoothing=0.05).sin().sum())
    torch.testing.assert_close(torch.func.vmap(one)(data[1], data[3], data[5]), whole)


def test_single_precision_keeps_small_slacks():
    """Slacks of 1e-6 beside bounds of 1: the gradient is that of double precision."""
    data = program(20)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in data]
        x = quadratic_program(*leaves, smoothing=1e-6)
        assert x.dtype == dtype
        slopes.append(torch.autograd.grad(x.sin().sum(), leaves))
    for single, double in zip(*slopes, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)
