"""Derivatives of projections on cones: differences in 40 digits, repeated eigenvalues, kinks; the search for roots."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap

import difflayers
import difflayers.conic._positive_semidefinite as psd
import difflayers.conic._root_search as root_search
from difflayers.conic import (
    DualExponential,
    DualPower,
    Exponential,
    NonNegative,
    PositiveSemidefinite,
    Power,
    RotatedSecondOrder,
    SecondOrder,
)
from difflayers.proximal._identify import identify
from difflayers.proximal._spectral import operate
from tests.conic.cone_points import MIXED, THREE, VECTORS, batch, by_name, exact, extremes, largest

# -------------------------------------------------------------------------------------------------------- derivatives


def differences(cone, v: list[float], order: int) -> np.ndarray:
    """Derivatives of the projection in 40 digits."""
    with mpmath.workdps(40):
        size = max(abs(c) for c in v)
        h = size * mpmath.mpf(10) ** (-9 if order == 1 else -7)

        def at(*steps: tuple[int, int]) -> np.ndarray:
            p = [mpmath.mpf(c) for c in v]
            for i, s in steps:
                p[i] += s * h
            return np.array(exact(cone, p), dtype=object)

        if order == 1:
            rows = [(at((i, 1)) - at((i, -1))) / (2 * h) for i in range(3)]
            return np.stack(rows, -1).astype(float)
        pairs = [
            [sum(s * t * at((i, s), (j, t)) for s in (1, -1) for t in (1, -1)) / (4 * h * h) for j in range(3)]
            for i in range(3)
        ]
        return np.moveaxis(np.array(pairs, dtype=object), -1, 0).astype(float) * size


# on the surface: ordinary points, points next to each face, next to the cone and next to its polar cone
SURFACE = {
    Exponential(): [
        [1.0, 1.2, 0.7],
        [1.0, -30.0, 1.0],
        [-1.0, 0.02, -1.0],
        [0.3, -1.0, 1e-4],
        [1.0, 1e-6, 1e5],
        [0.2, 0.5, 0.745],
    ],
    DualExponential(): [[-1.0, -1.2, -0.7], [-1.0, 30.0, -1.0], [1.0, -0.02, 1.0], [1.0, 0.3, -1e3]],
    Power(0.3): [
        [0.4, 0.7, -1.5],
        [-0.6, 0.9, 0.5],
        [0.8, -0.7, -1.1],
        [-1.0, 1.0, 1e-3],
        [1.0, -1.0, 1e-3],
        [0.0, 1.0, 0.5],
    ],
    Power(0.5): [[-1.0, 1.0, 1e-3], [1.0, 1e-4, 2e-2], [0.0, 0.0, 1.0], [-1.0, -1.0, 2.1]],
    DualPower(0.9): [[-0.4, -0.7, 1.5], [0.6, -0.9, 0.5], [-1.0, 1.0, 1e-3]],
}


@pytest.mark.parametrize("cone", SURFACE, ids=by_name)
def test_first_derivatives_in_forty_digits(cone):
    for v in SURFACE[cone]:
        found = jacrev(cone.project)(torch.tensor(v, dtype=torch.float64))
        np.testing.assert_allclose(found, differences(cone, v, 1), atol=1e-11)


@pytest.mark.parametrize("cone", SURFACE, ids=by_name)
def test_second_derivatives_in_forty_digits(cone):
    for v in SURFACE[cone][1:2]:
        x = torch.tensor(v, dtype=torch.float64)
        found = jacrev(jacrev(cone.project))(x) * x.abs().max()
        np.testing.assert_allclose(found, differences(cone, v, 2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cone", SURFACE, ids=by_name)
def test_third_derivatives(cone):
    x, step = torch.tensor(SURFACE[cone][0], dtype=torch.float64), 1e-5 * torch.eye(3, dtype=torch.float64)
    for method in (cone.project, cone.radial_project):
        second = jacrev(jacrev(method))
        expected = torch.stack([(second(x + h) - second(x - h)) / 2e-5 for h in step], -1)
        torch.testing.assert_close(jacrev(second)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cone", [*VECTORS[2:], MIXED], ids=by_name)
def test_jacobians_are_those_of_projections(cone):
    """Symmetric, spectrum between 0 and 1, and by homogeneity J x = P(x), H x = 0."""
    x = batch(cone, 100, seed=8)
    if cone in THREE:
        x = torch.cat([x, extremes(9, 0, 300, 343)])
    J = vmap(jacrev(cone.project))(x)
    size = largest(x).clamp_min(1e-100)
    assert bool(torch.isfinite(J).all())
    assert float((J - J.mT).abs().max()) < 1e-13
    spectrum = torch.linalg.eigvalsh((J + J.mT) / 2)
    assert float(spectrum.min()) > -1e-12
    assert float(spectrum.max()) < 1 + 1e-12
    onto = (J @ x.unsqueeze(-1)).squeeze(-1)
    assert float((largest(onto - cone.project(x)) / size).max()) < 1e-14
    H = vmap(jacrev(jacrev(cone.project)))(x)
    assert bool(torch.isfinite(H).all())
    assert float(torch.einsum("bijk,bk->bij", H, x).abs().max()) < 1e-10


@pytest.mark.parametrize("cone", [Exponential(), Power(0.3)], ids=by_name)
def test_the_search_is_short(cone, monkeypatch):
    calls = []
    original = root_search.find_root

    def counting(equation, *bracket):
        def counted(x):
            calls.append(1)
            return equation(x)

        return original(counted, *bracket)

    monkeypatch.setattr(f"difflayers.conic._{type(cone).__name__.lower()}.find_root", counting)
    cone.project(batch(cone, 5000))
    assert len(calls) <= 20
    calls.clear()
    cone.project(torch.cat([extremes(10, 0, 5000, 343), torch.full((1, 3), math.nan, dtype=torch.float64)]))
    assert len(calls) <= 70


def test_repeated_eigenvalues():
    cone = PositiveSemidefinite()
    generator = torch.Generator().manual_seed(11)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    for values in ([2.0, 2.0, -1.0, -1.0], [1.0, 1.0, 1.0, -3.0], [-1.0, -1.0, -1.0, -1.0]):
        x = ((Q * torch.tensor(values, dtype=torch.float64)) @ Q.mT).requires_grad_()
        assert gradcheck(cone.project, x, check_forward_ad=True)
        assert gradgradcheck(cone.project, x)
    E = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    E, values = E + E.mT, torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=torch.float64)
    x = (Q * values) @ Q.mT
    weights = torch.tensor([[1, 1, 2 / 3, 2 / 3]] * 2 + [[2 / 3, 2 / 3, 0, 0]] * 2, dtype=torch.float64)
    moved = torch.func.jvp(cone.project, (x,), (E,))[1]
    torch.testing.assert_close(moved, Q @ (weights * (Q.mT @ E @ Q)) @ Q.mT)


def test_multiple_least_eigenvalue():
    """A subgradient, the same in every basis; right to second order where the eigenvalues next to it are multiple."""
    cone = PositiveSemidefinite()
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(12), dtype=torch.float64))[0]
    x = (Q * torch.tensor([-1.0, -1.0, 2.0, 3.0], dtype=torch.float64)) @ Q.mT
    slope = torch.func.grad(lambda x: cone.radial_project(x).trace())(x)
    torch.testing.assert_close(slope, torch.eye(4, dtype=torch.float64) - 4 * (Q[:, :2] @ Q[:, :2].mT) / 2)
    x = ((Q * torch.tensor([-1.0, 2.0, 2.0, 2.0], dtype=torch.float64)) @ Q.mT).requires_grad_()
    d = torch.eye(4, dtype=torch.float64) + 0.1 * Q @ Q.diag().diag() @ Q.mT
    d = ((d + d.mT) / 2).requires_grad_()
    assert gradcheck(cone.radial_project, x)
    assert gradgradcheck(cone.radial_project, x)
    assert gradcheck(cone.radial_project, (x, d), check_forward_ad=True)
    assert gradgradcheck(cone.radial_project, (x, d))


@pytest.mark.parametrize("values", [[-1.0, 0.0, 2.0, 3.0], [-1.0, 2.0, 2.0, 3.0]])
def test_the_projector_on_the_least_eigenvalue(values):
    """Its own second derivative, of which the radial projection sees only a part."""
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(14), dtype=torch.float64))[0]
    x = ((Q * torch.tensor(values, dtype=torch.float64)) @ Q.mT).requires_grad_()

    def projector(x):
        x = (x + x.mT) / 2
        spectrum = identify(psd._spectrum, x, ndims=(2,), found_ndims=psd.LeastProjector.ndims)
        return operate(psd._LEAST, x, spectrum)

    assert gradcheck(projector, x, check_forward_ad=True)
    assert gradgradcheck(projector, x)
    # two equal eigenvalues that move together: the projector on both is differentiable along such a line
    both = (Q * torch.tensor([-1.0, -1.0, 2.0, 3.0], dtype=torch.float64)) @ Q.mT
    S = torch.randn(4, 4, generator=torch.Generator().manual_seed(15), dtype=torch.float64)

    def turned(s):  # eigenvectors that turn, eigenvalues that do not
        R = torch.matrix_exp(s * (S - S.mT))
        return R @ both @ R.mT

    line = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: projector(turned(s)), line)
    assert gradgradcheck(lambda s: projector(turned(s)), line)


def test_third_derivatives_of_matrices_are_refused():
    x = batch(PositiveSemidefinite(), 1, n=2)[0]
    for method in (PositiveSemidefinite().project, PositiveSemidefinite().radial_project):
        with pytest.raises(RuntimeError, match="not of third"):
            jacrev(jacrev(jacrev(method)))(x)


# -------------------------------------------------------------------------------------------------------------- kinks


def slope(cone, point) -> torch.Tensor:
    return jacrev(cone.project)(torch.tensor(point, dtype=torch.float64))


def test_kinks_are_as_documented():
    one, none = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(slope(NonNegative(), [0.0, 1.0, -1.0]), torch.diag(one[1]))
    for cone in (SecondOrder(), RotatedSecondOrder(), *THREE):
        assert torch.equal(slope(cone, [0.0, 0.0, 0.0]), none)
    assert torch.equal(slope(SecondOrder(), [5.0, 3.0, 4.0]), one)
    assert torch.equal(slope(SecondOrder(), [-5.0, 3.0, 4.0]), none)
    assert torch.equal(slope(RotatedSecondOrder(), [2.0, 1.0, 2.0]), one)
    assert torch.equal(slope(Exponential(), [0.0, 1.0, 1.0]), one)
    assert torch.equal(slope(Exponential(), [-1.0, 0.0, 2.0]), torch.diag(one[0] + one[2]))
    assert torch.equal(slope(Power(0.5), [2.0, 2.0, -2.0]), one)


@pytest.mark.parametrize(("alpha", "keeps"), [(0.3, 1.0), (0.5, 3 / 7), (0.7, 0.0)])
def test_the_flat_side_of_the_power_cone(alpha: float, keeps: float):
    """Beyond x = 0 the projection is differentiable at z = 0, and what it does there depends on the exponent."""
    point = [-2.0, 3.0, 0.0]  # of z it keeps y / (y - 2x), if alpha is one half
    expected = torch.diag(torch.tensor([0.0, 1.0, keeps], dtype=torch.float64))
    torch.testing.assert_close(slope(Power(alpha), point), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(slope(Power(alpha), [*point[:2], 1e-60]), expected, rtol=0, atol=1e-14)
    flipped = torch.diag(torch.tensor([1.0, 0.0, keeps], dtype=torch.float64))
    torch.testing.assert_close(slope(Power(1 - alpha), [3.0, -2.0, 0.0]), flipped, rtol=0, atol=1e-14)
    if alpha == 0.5:  # then to second order too
        at, beside = (
            jacrev(jacrev(Power(alpha).project))(torch.tensor([*point[:2], z], dtype=torch.float64)) for z in (0, 1e-7)
        )
        torch.testing.assert_close(at, beside, rtol=0, atol=1e-6)


def test_radial_derivative_by_the_normal():
    """I - d g' / (g' d) at the landing point, with the normal g."""
    v, d = torch.tensor([1.0, -0.4, 0.3], dtype=torch.float64), torch.tensor([0.1, 0.7, 0.9], dtype=torch.float64)
    x, y, _ = landed = Exponential().radial_project(v, d)
    e = (x / y).exp()
    g = torch.stack([e, e * (1 - x / y), -torch.ones_like(e)])
    expected = torch.eye(3, dtype=torch.float64) - torch.outer(d, g) / (g @ d)
    torch.testing.assert_close(jacrev(lambda v: Exponential().radial_project(v, d))(v), expected)
    assert bool((landed != v).all())


def test_semidefinite_second_derivatives_forward_over_reverse():
    """As an implicit layer needs them: the derivative of a vector-Jacobian product in the vector."""
    X = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert gradgradcheck(PositiveSemidefinite().project, X, check_fwd_over_rev=True)


def test_a_trace_sees_the_scalar_root_of_a_projection():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with difflayers.trace() as solves:
        Exponential().project(x).sum().backward()
    assert {s.phase for s in solves} == {"forward", "adjoint"}
    assert all(float(s.residual.max()) < 1e-12 for s in solves)
