"""Cones against 40 digits, Clarabel and their definitions: values, duals, faces, extreme scales, batches."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from difflayers.conic import (
    DualExponential,
    DualPower,
    Exponential,
    Free,
    NonNegative,
    PositiveSemidefinite,
    Power,
    Product,
    RotatedSecondOrder,
    SecondOrder,
    Zero,
)
from difflayers.testing.cases import _conic_oracles as oracles
from tests.conic.cone_points import MIXED, THREE, VECTORS, batch, by_name, extremes, largest, nearest

# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("cone", THREE, ids=by_name)
def test_projection_to_rounding_at_any_scale(cone):
    x = extremes(1, 5, 8, 10)
    error = largest(cone.project(x) - nearest(cone, x)) / largest(x).clamp_min(1e-100)
    assert float(error.max()) < 1e-14


@pytest.mark.parametrize("cone", [*VECTORS, MIXED, PositiveSemidefinite()], ids=by_name)
def test_moreau(cone):
    x = batch(cone, 200) * 10 ** torch.linspace(-9, 9, 200, dtype=torch.float64)[(...,) + (None,) * cone.ndim]
    if cone.ndim == 2:
        x = (x + x.mT) / 2
    if cone in THREE:
        x = torch.cat([x, extremes(2, 0, 500, 343)])
    if cone == MIXED:  # the symmetric part of its matrices
        x[:, 10] = x[:, 11]
    onto, away = cone.project(x), cone.project_dual(-x)
    size = largest(x, cone.ndim).clamp_min(1e-100)
    assert float((largest(onto - away - x, cone.ndim) / size).max()) < 1e-14
    assert float(((onto * away).flatten(-cone.ndim).sum(-1).abs() / size**2).max()) < 1e-14
    # each part lies in its cone: any two points of a cone and its dual have a product of at least zero
    products = (onto / size[(...,) + (None,) * cone.ndim]).flatten(-cone.ndim) @ (
        away / size[(...,) + (None,) * cone.ndim]
    ).flatten(-cone.ndim).mT
    assert float(products.min()) > -1e-14


@pytest.mark.parametrize("cone", [*VECTORS[2:], MIXED, PositiveSemidefinite()], ids=by_name)
def test_projections_stay_where_they_are(cone):
    x = batch(cone, 300, seed=3)
    once = cone.project(x)
    assert float((cone.project(once) - once).abs().max()) < 1e-14
    assert float(cone.violation(once).max()) < 1e-14
    assert float(cone.violation(cone.radial_project(x)).max()) < 1e-14


def solved(variable, constraints, x: np.ndarray) -> np.ndarray:
    import cvxpy as cp

    problem = cp.Problem(cp.Minimize(cp.sum_squares(variable - x)), constraints)
    problem.solve(solver=cp.CLARABEL)
    return variable.value


@pytest.mark.parametrize("cone", [c for c in (*VECTORS, PositiveSemidefinite()) if "Dual" not in str(c)], ids=by_name)
def test_conventions_are_those_of_cvxpy(cone):
    import cvxpy as cp

    def constraints(z):
        match cone:
            case Zero():
                return [cp.Zero(z)]
            case Free():
                return []
            case NonNegative():
                return [cp.NonNeg(z)]
            case SecondOrder():
                return [cp.SOC(z[0], z[1:])]
            case RotatedSecondOrder():  # 2uv >= ||w||^2
                return [cp.quad_over_lin(z[2:], z[0]) <= 2 * z[1]]
            case Exponential():
                return [cp.ExpCone(z[0], z[1], z[2])]
            case Power():
                return [cp.PowCone3D(z[0], z[1], z[2], cone.alpha)]
            case PositiveSemidefinite():
                return [cp.PSD(z)]

    for x in batch(cone, 3, seed=4, n=3):
        x = (x + x.mT) / 2 if cone.ndim == 2 else x
        z = cp.Variable((3, 3), symmetric=True) if cone.ndim == 2 else cp.Variable(len(x))
        expected = torch.from_numpy(np.asarray(solved(z, constraints(z), x.numpy())))
        torch.testing.assert_close(cone.project(x), expected, atol=1e-4, rtol=0)


def test_dual_cones_by_their_definition():
    """No product with a point of the cone is negative, and a little further out some product is."""
    angles = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    rays = {
        Exponential(): torch.stack([angles, torch.ones_like(angles), angles.exp()], -1),
        Power(0.3): torch.stack([(0.7 * angles).exp(), (-0.3 * angles).exp(), torch.ones_like(angles)], -1),
    }
    for cone, boundary in rays.items():
        assert float((cone.violation(boundary) / largest(boundary)).max()) < 1e-12
        y = cone.project_dual(batch(cone, 200, seed=5))
        products = y @ boundary.mT
        assert float((products / largest(boundary)).min()) > -1e-12
        y = cone.dual().radial_project(torch.tensor([[-2.0, -1.0, -0.3], [-1.0, -2.0, -0.5]], dtype=torch.float64))
        assert float((y @ boundary.mT).amin(-1).abs().max()) < 1e-4  # on the boundary


@pytest.mark.parametrize("cone", [Exponential(), Power(0.3)], ids=by_name)
def test_radial_projection_to_rounding_at_any_scale(cone):
    along = oracles.exponential_along if cone == Exponential() else lambda v, d: oracles.power_along(v, d, cone.alpha)
    default = np.array([0.0, 1.0, 2.0] if cone == Exponential() else [1.0, 1.0, 0.0])
    x = extremes(6, 10, 20, 40)
    for d in (default, np.array([0.1, 0.7, 0.9] if cone == Exponential() else [0.5, 2.0, -0.6])):
        expected = torch.from_numpy(np.stack([along(v, d) for v in x.numpy()]))
        got = cone.radial_project(x, torch.from_numpy(d))
        size = torch.maximum(largest(x), largest(expected)).clamp_min(1e-100)
        assert float((largest(got - expected) / size).max()) < 1e-14
    torch.testing.assert_close(
        cone.radial_project(x), cone.radial_project(x, torch.from_numpy(default)), rtol=0, atol=0
    )


@pytest.mark.parametrize("cone", [SecondOrder(), RotatedSecondOrder()], ids=by_name)
def test_radial_projection_of_second_order_cones(cone):
    """It moves along the direction, forward, and no further than the boundary."""
    x = batch(cone, 200, seed=17)
    d = torch.tensor([1.3, 0.6, -0.2, 0.7], dtype=torch.float64)
    landed = cone.radial_project(x, d)
    t = ((landed - x) @ d) / (d @ d)
    torch.testing.assert_close(landed, x + t.unsqueeze(-1) * d, rtol=0, atol=1e-14)
    outside = cone.violation(x) > 0
    assert torch.equal(t > 0, outside)
    assert float(cone.violation(landed).max()) < 1e-14
    before = cone.violation(landed - 1e-6 * d)[outside]
    assert float(before.min()) > 1e-8


def test_points_of_the_cone_are_returned_as_they_are():
    points = {
        SecondOrder(): [5.0, 3.0, 4.0],
        RotatedSecondOrder(): [2.0, 1.0, 2.0],
        Exponential(): [0.0, 1.0, 1.0],
        DualExponential(): [-1.0, 0.1, 0.7],
        Power(0.5): [2.0, 2.0, -2.0],
        NonNegative(): [0.3, 0.1, 0.0],
    }
    for cone, point in points.items():
        for scale in (1.0, 2.0**40, 2.0**-40):
            x = scale * torch.tensor(point, dtype=torch.float64)
            assert torch.equal(cone.project(x), x)
            assert torch.equal(cone.radial_project(x), x)
            assert float(cone.violation(x)) == 0


def test_violation_is_the_distance():
    for cone in THREE:
        x = batch(cone, 3, seed=7)
        expected = torch.linalg.vector_norm(x - nearest(cone, x), dim=-1)
        torch.testing.assert_close(cone.violation(x), expected, rtol=1e-13, atol=1e-15)
    # next to the boundary it has digits that the difference of two points has not
    x = torch.tensor([5.0 - 1e-14, 3.0, 4.0], dtype=torch.float64)
    gap = 5 - float(x[0])
    torch.testing.assert_close(float(SecondOrder().violation(x)), gap / math.sqrt(2), rtol=0.03, atol=0)


# ----------------------------------------------------------------------------------------------- one object, one batch


@pytest.mark.parametrize("cone", [*VECTORS[2:], MIXED, PositiveSemidefinite()], ids=by_name)
def test_one_bad_element_spoils_no_other(cone):
    x = batch(cone, 5, seed=13)
    bad = x.clone()
    bad[2] = math.nan
    others = [0, 1, 3, 4]
    for method in (cone.project, cone.project_dual, cone.radial_project, cone.violation):
        clean, spoilt = method(x), method(bad)
        assert torch.equal(clean[others], spoilt[others])
        assert bool(torch.isnan(spoilt[2]).any())
        y, z = x.clone().requires_grad_(), bad.clone().requires_grad_()
        found, expected = (torch.autograd.grad(method(t)[others].sum(), t)[0] for t in (z, y))
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("cone", THREE, ids=by_name)
def test_infinite_and_missing_numbers_end_the_search(cone):
    x = torch.tensor(list(itertools.product([math.inf, -math.inf, math.nan, 1.0], repeat=3)), dtype=torch.float64)
    good = batch(cone, 3)
    for method in (cone.project, cone.radial_project, cone.violation):
        assert torch.equal(method(torch.cat([x, good]))[-3:], method(good))


@pytest.mark.parametrize("cone", [*VECTORS, MIXED, PositiveSemidefinite()], ids=by_name)
def test_cones_are_values(cone):
    for twin in (copy.deepcopy(cone), pickle.loads(pickle.dumps(cone))):
        assert twin == cone
        assert hash(twin) == hash(cone)
    assert cone.dual().dual() == cone
    with pytest.raises(AttributeError):
        cone.alpha = 0.5
    x = batch(cone, 3)
    torch.testing.assert_close(cone.project_dual(x), cone.dual().project(x), rtol=0, atol=0)


def test_own_duals_return_themselves():
    for cone in (NonNegative(), SecondOrder(), RotatedSecondOrder(), PositiveSemidefinite()):
        assert cone.dual() is cone
    assert Zero().dual() == Free()
    assert Power(0.3).dual() == DualPower(0.3)


def test_float32_is_computed_in_float64_where_it_matters():
    for cone in THREE:
        x = batch(cone, 50, seed=14).float()
        found = cone.project(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, cone.project(x.double()).float())


def test_product_is_its_parts():
    x = batch(MIXED, 4, seed=15)
    a, b, c, d, e = x.split([3, 3, 3, 4, 1], -1)
    for method in ("project", "project_dual", "radial_project"):
        of = lambda cone, x, method=method: getattr(cone, method)(x)  # noqa: E731
        matrix = of(PositiveSemidefinite(), d.unflatten(-1, (2, 2))).flatten(-2)
        expected = torch.cat(
            [of(SecondOrder(), a), of(Exponential(), b), of(Exponential(), c), matrix, of(Free(), e)], -1
        )
        torch.testing.assert_close(getattr(MIXED, method)(x), expected, rtol=0, atol=0)
    squares = [SecondOrder().violation(a), Exponential().violation(b), Exponential().violation(c)]
    squares.append(PositiveSemidefinite().violation(d.unflatten(-1, (2, 2))))
    torch.testing.assert_close(MIXED.violation(x), torch.stack(squares).square().sum(0).sqrt())
    nested = Product([(MIXED, 14), (NonNegative(), 2)])
    y = torch.cat([x, x[:, :2]], -1)
    torch.testing.assert_close(nested.project(y)[:, :14], MIXED.project(x), rtol=0, atol=0)
    inside = torch.cat([torch.tensor([2.0, 0, 1, 0, 1, 2, 0, 1, 2, 1, 0, 0, 1, -3], dtype=torch.float64)])
    moved = MIXED.radial_project(x, inside)
    assert float(MIXED.violation(moved).max()) < 1e-14
    with pytest.raises(ValueError, match="direction: expected points in the interior of Product"):
        MIXED.radial_project(x, inside.index_fill(0, torch.tensor([4]), 0.0))


def test_default_directions_are_interior():
    directions = {
        SecondOrder(): [1, 0, 0],
        RotatedSecondOrder(): [1, 1, 0],
        NonNegative(): [1, 1, 1],
        Exponential(): [0, 1, 2],
        DualExponential(): [-1, -1, 2],
        Power(0.3): [1, 1, 0],
        DualPower(0.3): [0.3, 0.7, 0],
    }
    for cone, direction in directions.items():
        x = batch(cone, 50, seed=16, n=3)
        d = torch.tensor(direction, dtype=torch.float64)
        torch.testing.assert_close(cone.radial_project(x), cone.radial_project(x, d), rtol=1e-13, atol=1e-13)
