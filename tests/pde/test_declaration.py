"""Declared equations, their residuals, conditions and points.

Oracles, written before the code: solutions whose terms are derivatives by hand or by autograd of the closed form, on
which every residual has to vanish (and not on a disturbed one); arithmetic by hand for powers and retardation; the box
itself for points.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad

from difflayers.pde import (
    PDE,
    Advection,
    Box,
    Burgers,
    DiffusionSorption,
    Dirichlet,
    Fixed,
    GeneralizedPorousMedium,
    Grid,
    Heat,
    Helmholtz,
    Initial,
    NavierStokes2D,
    Neumann,
    Periodic,
    Poisson,
    Robin,
    Sobol,
    porous_medium_solution,
    safe_power,
    viscous_burgers_solution,
)

F64 = torch.float64
LIKE = torch.zeros((), dtype=F64)


def autograd_terms(pde: PDE, points: Tensor, **fields) -> dict[str, Tensor]:
    """Terms of closed forms by reverse mode."""
    out = {}
    columns = [c.clone().requires_grad_() for c in points.unbind(-1)]
    for name in pde.terms:
        field, word = pde.parse(name)
        u = fields[pde.fields[field]](*columns)
        for c in word:
            u = torch.autograd.grad(u.sum(), columns[c], create_graph=True, materialize_grads=True)[0]
        out[name] = u.detach()
    return out


def wave(c: float):
    return lambda t, x: torch.exp(-c * t) * torch.sin(x)


SOLVED = [
    (Heat(c=0.7), {"u": wave(0.7)}, {}),
    (Advection(a=2.0), {"u": lambda t, x: torch.sin(x - 2 * t)}, {}),
    (
        Poisson(),
        {"u": lambda x, y: torch.sin(2 * x) * torch.cos(y)},
        {"f": lambda x, y: 5 * torch.sin(2 * x) * torch.cos(y)},
    ),
    (Helmholtz(k=3.0), {"u": lambda x, y: torch.sin(2 * x) * y}, {"f": lambda x, y: 5 * torch.sin(2 * x) * y}),
    (
        Burgers(nu=0.1, domain=Box(t=(0.3, 1.0), x=(-1.0, 1.0))),
        {"u": lambda t, x: viscous_burgers_solution(x, t, 0.1)},
        {},
    ),
    (GeneralizedPorousMedium("heat", c=0.7), {"u": wave(0.7)}, {}),
    (
        GeneralizedPorousMedium("porous", m=3.0, domain=Box(t=(2.0, 3.0), x=(0.0, 1.0))),
        {"u": lambda t, x: porous_medium_solution(x, t, 3.0)},
        {},
    ),
    (
        NavierStokes2D(nu=0.01),
        {
            "w": lambda t, x, y: (
                torch.cos(2 * math.pi * x) * torch.cos(2 * math.pi * y) * torch.exp(-0.08 * math.pi**2 * t)
            ),
            "psi": lambda t, x, y: (
                torch.cos(2 * math.pi * x)
                * torch.cos(2 * math.pi * y)
                * torch.exp(-0.08 * math.pi**2 * t)
                / (8 * math.pi**2)
            ),
        },
        {},
    ),
]


@pytest.mark.parametrize(("pde", "fields", "sources"), SOLVED, ids=lambda v: repr(v)[:30])
def test_residuals_vanish_on_solutions(pde: PDE, fields, sources):
    points = Sobol(50, seed=3).interior(pde, LIKE).points
    T = autograd_terms(pde, points, **fields)
    p = {**pde.params, **{name: f(*points.unbind(-1)) for name, f in sources.items()}}
    size = max(t.abs().max() for t in T.values())
    assert pde.residual(T, p).abs().max() <= 1e-10 * size
    for name in pde.terms:  # each term counts
        moved = T | {name: T[name] + 0.1}
        if name != "u" or (not isinstance(pde, Heat | Poisson) and getattr(pde, "kind", "") != "heat"):
            assert pde.residual(moved, p).abs().max() > 1e-4


def test_stefan_conducts_above_the_threshold():
    pde = GeneralizedPorousMedium("stefan", u_star=0.5, width=0.1)
    T = {"u": torch.tensor([0.2, 0.5, 0.9], dtype=F64), "u_t": torch.zeros(3, dtype=F64)}
    T |= {"u_x": torch.tensor([1.0, 2.0, 3.0], dtype=F64), "u_xx": torch.tensor([0.5, 0.5, 0.5], dtype=F64)}
    k = lambda u: 1 / (1 + np.exp(-(u - 0.5) / 0.1))  # noqa: E731
    u, h = T["u"].numpy(), 1e-6
    expected = -k(u) * 0.5 - (k(u + h) - k(u - h)) / (2 * h) * T["u_x"].numpy() ** 2
    np.testing.assert_allclose(pde.residual(T, pde.params).numpy(), expected, rtol=1e-8)


def test_given_velocity_enters_the_vorticity_equation():
    pde = NavierStokes2D("given", u=2.0, v=-1.0, nu=0.5)
    T = {n: torch.full((1,), float(i + 1), dtype=F64) for i, n in enumerate(pde.terms)}
    assert pde.residual(T, pde.params).item() == pytest.approx(1 + 2 * 2 - 3 - 0.5 * (4 + 5))


def test_retardation_by_hand_and_frozen_below_zero():
    pde = DiffusionSorption()
    u = torch.tensor([0.3, 0.0, -0.2], dtype=F64, requires_grad=True)
    T = {"u": u, "u_t": torch.zeros(3, dtype=F64), "u_xx": torch.ones(3, dtype=F64)}
    R = 1 + (1 - 0.29) / 0.29 * 2880 * 3.5e-4 * 0.874 * (np.array([0.3, 0.0, 0.0]) + 1e-6) ** (0.874 - 1)
    out = pde.residual(T, pde.params)
    np.testing.assert_allclose(out.detach().numpy(), -5e-4 / R, rtol=1e-13)
    slope = torch.autograd.grad(out.sum(), u)[0]
    assert slope[0] < 0 and (slope[1:] == 0).all()


def test_safe_power_has_no_nan_at_any_order():
    u = torch.tensor([-1.0, 0.0, 4.0], dtype=F64, requires_grad=True)
    e = torch.tensor(0.5, dtype=F64, requires_grad=True)
    for shift in (0.0, 1e-3):
        value = safe_power(u, e, shift)
        np.testing.assert_allclose(value.detach().numpy(), [shift**0.5, shift**0.5, (4 + shift) ** 0.5], rtol=1e-14)
        du, de = torch.autograd.grad(value.sum(), (u, e), create_graph=True)
        np.testing.assert_allclose(du.detach().numpy(), [0, 0, 0.5 * (4 + shift) ** -0.5], rtol=1e-14)
        second = torch.autograd.grad(du.sum() + de, (u, e))
        assert all(torch.isfinite(t).all() for t in (de, *second))
    with pytest.raises(ValueError, match="exponent: expected at least 0 without a shift"):
        safe_power(u, -0.5)


def test_terms_are_parsed():
    pde = NavierStokes2D()
    assert pde.parse("psi_yx") == (1, (1, 2))
    assert pde.parse("w") == (0, ())
    assert pde.parse("w_ttx") == (0, (0, 0, 1))


def test_sides_and_labels():
    pde = Burgers(
        conditions=(
            Initial("u0"),
            Dirichlet("x=-1"),
            Neumann("x=high"),
            Robin("x=1", 1.0, "nu"),
            Periodic("x", order=0),
        )
    )
    assert [b.label for b in pde.blocks] == ["initial", "dirichlet x=-1", "neumann x=1", "robin x=1", "periodic u x"]
    assert [(b.axis, b.upper) for b in pde.blocks] == [(0, False), (1, False), (1, True), (1, True), (1, False)]


class Misspelt(PDE):
    coords, terms = ("x",), ("u_z",)
    domain = Box(x=(0.0, 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Misspelt, r"terms: expected coordinates \(x\) after u_, got 'u_z'"),
        (lambda: Burgers(viscosity=1.0), "viscosity: expected one of the parameters nu of Burgers"),
        (lambda: Burgers(domain=Box(x=(0.0, 1.0))), "domain: expected the coordinates t, x"),
        (lambda: Burgers(conditions=(Dirichlet("x=3"),)), "side: expected x=low, x=high or an end of"),
        (lambda: Burgers(conditions=(Dirichlet("z"),)), "coordinate: expected one of t, x, got 'z'"),
        (lambda: Burgers(conditions=(Initial(), Initial())), "conditions: expected each kind once"),
        (lambda: Burgers(conditions=("x=0",)), "conditions: expected a tuple of conditions, got str"),
        (lambda: NavierStokes2D(conditions=(Initial(),)), "field: expected one of w, psi, got None"),
        (lambda: Box(x=(1.0, 0.0)), "x: expected a finite lower end below"),
        (lambda: GeneralizedPorousMedium("ice"), 'kind: expected "heat"'),
        (lambda: Sobol(points=0), "points: expected an integer of at least 1"),
        (lambda: Grid(Box(x=(0.0, 1.0)), x=1), "x: expected at least 2 nodes"),
        (lambda: Grid(Box(x=(0.0, 1.0)), y=3), "Grid: expected a size for each of x"),
    ],
)
def test_bad_declarations_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_sobol_points_are_seeded_inside_and_on_faces():
    pde = NavierStokes2D(domain=Box(t=(0.0, 2.0), x=(-1.0, 0.0), y=(3.0, 4.0)))
    one = Sobol(64, 16, seed=5)
    p = one.interior(pde, LIKE).points
    assert p.shape == (64, 3) and p.dtype == F64
    assert torch.equal(p, Sobol(64, 16, seed=5).interior(pde, LIKE).points)
    assert not torch.equal(p, Sobol(64, 16, seed=6).interior(pde, LIKE).points)
    pde.domain.check("points", p)
    assert (p.mean(0) - torch.tensor([1.0, -0.5, 3.5], dtype=F64)).abs().max() < 0.03  # they fill the box
    low, high = (one.face(pde, 1, upper, LIKE).points for upper in (False, True))
    assert (low[:, 1] == -1).all() and (high[:, 1] == 0).all()
    assert torch.equal(low[:, [0, 2]], high[:, [0, 2]])


def test_grid_faces_are_its_own_points():
    pde = Burgers()
    grid = Grid(pde.domain, t=3, x=4)
    place = grid.face(pde, 1, True, LIKE)
    assert torch.equal(grid.points(LIKE)[place.indices], place.points)
    assert (place.points[:, 1] == 1).all() and len(place.points) == 3
    with pytest.raises(ValueError, match="grid: expected no condition at the ends of x"):
        Grid(pde.domain, periodic=("x",), t=3, x=4).face(pde, 1, True, LIKE)


def test_fixed_points_are_checked():
    pde = Burgers()
    with pytest.raises(ValueError, match=r"points: expected points in Box.*got 1 outside, the first \[2.0, 0.0\]"):
        Fixed(torch.tensor([[0.5, 0.5], [2.0, 0.0]])).interior(pde, LIKE)
    with pytest.raises(ValueError, match="faces: expected points for t=low, got none"):
        Fixed(torch.zeros(1, 2)).face(pde, 0, False, LIKE)
    with pytest.raises(ValueError, match=r"expected points on that side, got one 0\.5 away"):
        Fixed(torch.zeros(1, 2), {"t=0": torch.tensor([[0.5, 0.0]])}).face(pde, 0, False, LIKE)


def test_points_may_be_made_and_checked_inside_a_transform():
    def total(x: Tensor) -> Tensor:
        assert torch.equal(Grid(Box(x=(0.0, 1.0)), x=x).points(x), x.unsqueeze(-1))
        Box(x=(0.0, 1.0)).check("points", x.unsqueeze(-1))
        with pytest.raises(ValueError, match=r"points: expected points in Box.*got 1 outside, the first \[2.0\]"):
            Box(x=(0.0, 1.0)).check("points", 2 * x.unsqueeze(-1))
        return x.sum()

    assert torch.equal(grad(total)(torch.tensor([0.0, 0.3, 1.0])), torch.ones(3))


@pytest.mark.parametrize(
    "pde", [Heat(), DiffusionSorption(), NavierStokes2D(), GeneralizedPorousMedium("stefan")], ids=repr
)
def test_equations_are_copied_and_pickled(pde: PDE):
    for other in (copy.deepcopy(pde), pickle.loads(pickle.dumps(pde))):
        assert repr(other) == repr(pde) and other.terms == pde.terms and other.blocks == pde.blocks
