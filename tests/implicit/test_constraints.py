"""``argmin`` under equalities and inequalities.

Oracles, none of them of this library: the published minimisers of W. Hock, K. Schittkowski, Test examples for nonlinear
programming codes, 1981 (problems 35, 43, 71, 76, 100); the projection onto a ball in closed form, ``r x / ||x||`` with
multiplier ``||x|| / r - 1``, differentiated by autograd; the projection onto the simplex by sorting, in numpy; a linear
system solved by hand for a quadratic program whose active set is known.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import SolveError, Status
from difflayers.implicit import (
    ConstrainedSolution,
    Equality,
    Implicit,
    Inequality,
    Newton,
    argmin,
    argmin_ex,
)
from difflayers.linalg import MINRES


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def distance(z, x, *_):
    return (z - x).square().sum(-1) / 2


def ball(z, x, r):
    return (z.square().sum(-1) - r * r) / 2


# ---------------------------------------------------------------------------------------------------- published optima


def hs43(z):
    a, b, c, d = z.unbind(-1)
    return a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d


def hs43_conditions(z):
    a, b, c, d = z.unbind(-1)
    return -torch.stack(
        [
            8 - a**2 - b**2 - c**2 - d**2 - a + b - c + d,
            10 - a**2 - 2 * b**2 - c**2 - 2 * d**2 + a + d,
            5 - 2 * a**2 - b**2 - c**2 - 2 * a + b + d,
        ],
        -1,
    )


def hs71(z):
    return z[..., 0] * z[..., 3] * (z[..., 0] + z[..., 1] + z[..., 2]) + z[..., 2]


def hs100(z):
    a, b, c, d, e, f, g = z.unbind(-1)
    return (
        (a - 10) ** 2 + 5 * (b - 12) ** 2 + c**4 + 3 * (d - 11) ** 2 + 10 * e**6 + 7 * f**2 + g**4 - 4 * f * g
        - 10 * f - 8 * g
    )  # fmt: skip


def hs100_conditions(z):
    a, b, c, d, e, f, g = z.unbind(-1)
    return -torch.stack(
        [
            127 - 2 * a**2 - 3 * b**4 - c - 4 * d**2 - 5 * e,
            282 - 7 * a - 3 * b - 10 * c**2 - d + e,
            196 - 23 * a - b**2 - 6 * f**2 + 8 * g,
            -4 * a**2 - b**2 + 3 * a * b - 2 * c**2 - 5 * f + 11 * g,
        ],
        -1,
    )


def hs35(z):
    a, b, c = z.unbind(-1)
    return 9 - 8 * a - 6 * b - 4 * c + 2 * a**2 + 2 * b**2 + c**2 + 2 * a * b + 2 * a * c


def hs76(z):
    a, b, c, d = z.unbind(-1)
    return a**2 + b**2 / 2 + c**2 + d**2 / 2 - a * c + c * d - a - 3 * b + c - d


def hs76_conditions(z):
    a, b, c, d = z.unbind(-1)
    rows = [a + 2 * b + c + d - 5, 3 * a + b + 2 * c - d - 4, 1.5 - b - 4 * c]
    return torch.cat([torch.stack(rows, -1), -z], -1)


HS71 = (
    Inequality(lambda z: 25 - z.prod(-1)),
    Equality(lambda z: z.square().sum(-1) - 40),
    Inequality(lambda z: torch.cat([1 - z, z - 5], -1)),
)
HS35 = Inequality(lambda z: torch.cat([(z * z.new_tensor([1.0, 1.0, 2.0])).sum(-1, keepdim=True) - 3, -z], -1))
PUBLISHED = {
    "35": (hs35, HS35, numbers(0.5, 0.5, 0.5), 1 / 9),
    "43": (hs43, Inequality(hs43_conditions), numbers(0, 0, 0, 0), -44.0),
    "71": (hs71, HS71, numbers(1, 5, 5, 1), 17.0140173),
    "71, start far outside": (hs71, HS71, numbers(-10, 30, 5, 0), 17.0140173),
    "76": (hs76, Inequality(hs76_conditions), numbers(0.5, 0.5, 0.5, 0.5), -4.681818181),
    "100": (hs100, Inequality(hs100_conditions), numbers(1, 2, 0, 4, 0, 1, 1), 680.6300573),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_minimum(name):
    f, constraint, start, best = PUBLISHED[name]
    found = argmin_ex(f, start, constraint=constraint)
    assert found.status == Status.CONVERGED and found.residual < 1e-12
    assert float(f(found.value)) == pytest.approx(best, rel=1e-8)
    for one in constraint if isinstance(constraint, tuple) else (constraint,):
        g = one.fn(found.value)
        assert (g.abs() if isinstance(one, Equality) else g).max() < 1e-9


def test_multipliers_are_those_of_the_lagrangian():
    found = argmin_ex(hs71, numbers(1, 5, 5, 1), constraint=HS71)
    assert isinstance(found, ConstrainedSolution)
    z = found.value.detach().requires_grad_()
    product, sphere, box = found.multipliers
    assert product.shape == () and sphere.shape == () and box.shape == (8,)
    lagrangian = hs71(z) + product * HS71[0].fn(z) + sphere * HS71[1].fn(z) + (box * HS71[2].fn(z)).sum()
    assert torch.autograd.grad(lagrangian, z)[0].abs().max() < 1e-9
    assert (box[1:] == 0).all() and box[0] > 1 and product > 0  # z_0 = 1 alone is at its bound


# -------------------------------------------------------------------------------------------------------- derivatives


def onto_ball(x, r, **options):
    start = torch.zeros_like(x)
    return argmin(distance, start, (x, r), constraint=Inequality(ball), **options)


def onto_ball_closed(x, r):
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > r, x * r / norm, x)


X = numbers(0.3, -0.2, 0.1, 1.0, 2.0, -2.0, -0.5, 1.5, 0.5).reshape(3, 3)  # inside, outside, outside
R = numbers(1.2)[0]


@pytest.mark.parametrize("declared", [None, (1, 0)])
def test_projection_onto_a_ball_to_second_order(declared):
    x, r = X.clone().requires_grad_(), R.clone().requires_grad_()
    options = {"arg_ndims": declared}
    got, want = onto_ball(x, r, **options), onto_ball_closed(x, r)
    assert (got - want).abs().max() < 1e-12
    weight = numbers(1.0, -2.0, 0.5)
    first = [torch.autograd.grad(((v + v**2) * weight).sum(), (x, r), create_graph=True) for v in (got, want)]
    for a, b in zip(*first, strict=True):
        assert (a - b).abs().max() < 1e-11
    second = [torch.autograd.grad((g[0].square() * weight).sum() + g[1] ** 2, (x, r)) for g in first]
    for a, b in zip(*second, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("declared", [None, (1, 0)])
def test_multipliers_and_their_derivative(declared):
    x, r = X.clone().requires_grad_(), R.clone().requires_grad_()
    found = argmin_ex(distance, torch.zeros(3, 3).double(), (x, r), constraint=Inequality(ball), arg_ndims=declared)
    norm = torch.linalg.vector_norm(x, dim=-1)
    want = (norm / r - 1).relu()
    assert (found.multipliers - want).abs().max() < 1e-12 and found.multipliers[0] == 0
    got, want = (torch.autograd.grad(v.square().sum(), (x, r)) for v in (found.multipliers, want))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("declared", [None, (1, 0)])
def test_transforms(declared):
    def layer(x, r):
        return onto_ball(x, r, arg_ndims=declared)

    want = onto_ball_closed
    assert (vmap(layer, (0, None))(X, R) - want(X, R)).abs().max() < 1e-12
    for mode in (jacrev, jacfwd):
        assert (mode(layer)(X, R) - mode(want)(X, R)).abs().max() < 1e-11
    curved = vmap(hessian(lambda x, r: layer(x, r).square().sum()), (0, None))(X, R)
    expected = vmap(hessian(lambda x, r: want(x, r).square().sum()), (0, None))(X, R)
    assert (curved - expected).abs().max() < 1e-9
    per_sample = vmap(grad(lambda r, x: layer(x, r).sum()), (None, 0))(R, X)
    assert (per_sample - vmap(grad(lambda r, x: want(x, r).sum()), (None, 0))(R, X)).abs().max() < 1e-11


def _sorted_simplex(x):
    u = np.sort(x)[::-1]
    rho = np.nonzero(u * np.arange(1, len(x) + 1) > np.cumsum(u) - 1)[0][-1]
    return np.maximum(x - (np.cumsum(u)[rho] - 1) / (rho + 1), 0)


def test_equalities_and_inequalities_together():
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    constraint = (Inequality(lambda z, x: -z), Equality(lambda z, x: z.sum(-1) - 1))
    z = argmin(distance, torch.zeros(5, 4).double(), (x,), constraint=constraint)
    want = torch.from_numpy(np.stack([_sorted_simplex(row) for row in x.detach().numpy()]))
    assert (z - want).abs().max() < 1e-12
    weight = torch.arange(4.0).double()
    (g,) = torch.autograd.grad((z * weight).sum(), x)
    support = want > 0
    mean = (support * weight).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
    assert (g - torch.where(support, weight - mean, 0)).abs().max() < 1e-11
    by_minres = argmin(
        distance, torch.zeros(5, 4).double(), (x,), constraint=constraint, adjoint=Implicit(MINRES(rtol=1e-12))
    )
    assert (torch.autograd.grad((by_minres * weight).sum(), x)[0] - g).abs().max() < 1e-9


def test_newton_takes_equalities():
    x = numbers(1.0, 2.0).requires_grad_()
    line = Equality(lambda z, x: z.sum(-1) - 1)
    for solver in (None, Newton()):
        z = argmin(distance, numbers(5.0, 0.0), (x,), constraint=line, solver=solver)
        assert (z - numbers(0.0, 1.0)).abs().max() < 1e-12
        assert (torch.autograd.grad(z[0], x)[0] - numbers(0.5, -0.5)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="solver: expected one that finds a constrained, got Newton"):
        argmin(distance, numbers(5.0, 0.0), (x,), constraint=Inequality(lambda z, x: z), solver=Newton())


# ------------------------------------------------------------------------------------------------ what an element feels


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
def test_scales(scale):
    """The unknown in other units: the same solution in those units, the same derivative."""
    x, r = (scale * X).requires_grad_(), scale * R
    z = onto_ball(x, r)
    assert (z / scale - onto_ball_closed(X, R)).abs().max() < 1e-10
    got = torch.autograd.grad(z[1, 0], x)[0]
    again = X.clone().requires_grad_()
    assert (got - torch.autograd.grad(onto_ball_closed(again, R)[1, 0], again)[0]).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
def test_scales_of_the_parts(scale):
    """Objective and constraint in units of their own, and a start at any distance."""
    f = lambda z, x, r: scale * distance(z, x)  # noqa: E731
    g = Inequality(lambda z, x, r: ball(z, x, r) / scale)
    want = onto_ball_closed(X, R)
    for start in (torch.zeros_like(X), scale * torch.ones_like(X)):
        found = argmin_ex(f, start, (X, R), constraint=g)
        assert (found.status == 0).all() and (found.value - want).abs().max() < 1e-9
        assert (found.multipliers[0] == 0) and (found.multipliers[1:] > 0).all()


def test_float32_and_half():
    z = onto_ball(X.float(), R.float())
    assert z.dtype == torch.float32 and (z - onto_ball_closed(X, R)).abs().max() < 2e-6
    z = onto_ball(X.bfloat16(), R.bfloat16())
    assert z.dtype == torch.bfloat16 and (z - onto_ball_closed(X, R)).abs().max() < 2e-2


def _between(z, low, high):
    return torch.cat([low - z, z - high], -1)


def test_one_infeasible_element_among_others():
    low = numbers(0.0, 2.0, -1.0).reshape(3, 1)
    high = numbers(1.0, 1.0, 1.0).reshape(3, 1)
    run = lambda low: argmin_ex(  # noqa: E731
        lambda z, low, high: (z - 3).square().sum(-1),
        torch.zeros(3, 1).double(),
        (low, high),
        constraint=Inequality(_between),
        arg_ndims=(1, 1),
    )
    found, healthy = run(low), run(numbers(0.0, 0.5, -1.0).reshape(3, 1))
    assert found.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]
    for i in (0, 2):
        assert torch.equal(found.value[i], healthy.value[i])
        assert torch.equal(found.multipliers[i], healthy.multipliers[i])
    high.requires_grad_()
    options = {"constraint": Inequality(_between), "arg_ndims": (1, 1)}
    f = lambda z, low, high: (z - 3).square().sum(-1)  # noqa: E731
    with pytest.raises(SolveError, match="INFEASIBLE"):
        argmin(f, torch.zeros(3, 1).double(), (low, high), **options)
    z = argmin(f, torch.zeros(3, 1).double(), (low, high), on_failure="nan", **options)
    assert z.isnan().flatten().tolist() == [False, True, False]
    assert torch.autograd.grad(z[[0, 2]].sum(), high)[0].flatten().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("n", [1, 3])
def test_none_active_and_all_active(n):
    x = torch.full((n,), 0.5, dtype=torch.float64, requires_grad=True)
    up = numbers(2.0)[0].requires_grad_()
    z = argmin(distance, torch.zeros(n).double(), (x, up), constraint=Inequality(lambda z, x, up: z - up))
    g = torch.autograd.grad(z.sum(), (x, up))
    assert (z - x).abs().max() < 1e-15 and g[0].tolist() == [1.0] * n and g[1] == 0
    low = numbers(0.25)[0].requires_grad_()
    z = argmin(distance, torch.zeros(n).double(), (x, low), constraint=Inequality(lambda z, x, up: z - up))
    g = torch.autograd.grad(z.sum(), (x, low))
    assert (z - 0.25).abs().max() < 1e-14 and g[0].abs().max() < 1e-14 and float(g[1]) == pytest.approx(n)


def test_a_scalar_unknown():
    up = numbers(1.0)[0].requires_grad_()
    z = argmin(
        lambda z, up: (z - 3) ** 2, up.detach() * 0, (up,), event_ndim=0, constraint=Inequality(lambda z, up: z - up)
    )
    assert z.item() == pytest.approx(1.0, abs=1e-14) and torch.autograd.grad(z, up)[0].item() == pytest.approx(1.0)


def test_no_constraint_in_the_tensor():
    none = Inequality(lambda z, x: z[..., :0])
    assert (argmin(distance, torch.zeros(3, 3).double(), (X,), constraint=none) - X).abs().max() < 1e-12


def test_empty_batch():
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    found = argmin_ex(distance, torch.zeros(0, 3).double(), (x, R), constraint=Inequality(ball))
    assert found.value.shape == (0, 3) and found.multipliers.shape == (0,)
    layer = lambda x: argmin(distance, torch.zeros(3).double(), (x, R), constraint=Inequality(ball))  # noqa: E731
    assert vmap(layer)(x).shape == (0, 3) and vmap(jacrev(layer))(x).shape == (0, 3, 3)
