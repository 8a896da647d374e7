"""Fields that satisfy a declared equation.

Oracles, written before the code: closed-form solutions of heat, Poisson, Burgers and porous-medium equations, which a
rich basis has to reproduce; numpy's least squares on rows assembled by hand; central differences of the layer solved
again for moved data.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, Status
from difflayers.pde import (
    PDE,
    Box,
    Burgers,
    Dirichlet,
    FiniteDifference,
    Fixed,
    GeneralizedPorousMedium,
    Grid,
    Heat,
    Initial,
    NavierStokes2D,
    Neumann,
    PDEConstraint,
    Poisson,
    Robin,
    Sobol,
    Spectral,
    porous_medium_solution,
    viscous_burgers_solution,
)

F64 = torch.float64
LINE = Box(x=(0.0, 1.0))


def chebyshev(s: Tensor, n: int) -> Tensor:
    """First n polynomials on [-1, 1]."""
    out = [torch.ones_like(s), s]
    while len(out) < n:
        out.append(2 * s * out[-1] - out[-2])
    return torch.stack(out[:n], -1)


def product(box: Box, nt: int, nx: int, shape) -> object:
    """Chebyshev in t times ``shape(x)``, a basis."""

    def basis(point: Tensor) -> Tensor:
        s = box.normalized(point)[0]
        return (chebyshev(s, nt)[:, None] * shape(point[1])).flatten()

    return basis


def places(box: Box, n: int = 41) -> Tensor:
    return Grid(box, **dict.fromkeys(box.names, n)).points(torch.zeros((), dtype=F64))


def fourier(x: Tensor) -> Tensor:
    k = torch.arange(1, 4, dtype=F64)
    return torch.cat([torch.ones(1, dtype=F64), torch.sin(k * x), torch.cos(k * x)])


def test_heat_is_reproduced():
    pde = Heat(c=0.7)
    layer = PDEConstraint(pde, sampler=Sobol(300, 24)).double()
    start = lambda p: torch.sin(p[:, 1]) + 0.3 * torch.cos(2 * p[:, 1])  # noqa: E731
    field = layer(product(pde.domain, 12, 7, fourier), values={"u0": start})
    p = places(pde.domain)
    exact = torch.exp(-0.7 * p[:, 0]) * torch.sin(p[:, 1]) + 0.3 * torch.exp(-2.8 * p[:, 0]) * torch.cos(2 * p[:, 1])
    assert (field(p) - exact).abs().max() < 1e-8
    assert bool(field.linear) and int(field.status) == Status.CONVERGED
    assert set(field.norms) == {"residual", "initial", "periodic u x", "periodic u_x x"}
    assert max(float(n) for n in field.norms.values()) < 1e-8


def test_burgers_is_reproduced():
    pde = Burgers(nu=0.2, domain=Box(t=(0.0, 0.4), x=(-1.0, 1.0)))
    k = torch.arange(1, 13, dtype=F64)
    basis = product(pde.domain, 9, 12, lambda x: torch.sin(math.pi * k * x))
    layer = PDEConstraint(pde, sampler=Sobol(600, 60)).double()
    field = layer(basis, values={"u0": lambda p: -torch.sin(math.pi * p[:, 1])})
    p = places(pde.domain, 21)
    exact = viscous_burgers_solution(p[:, 1], p[:, 0], 0.2)
    assert (field(p) - exact).abs().max() < 1e-4
    assert not bool(field.linear) and int(field.status) == Status.CONVERGED


def test_porous_medium_behind_the_front_is_reproduced():
    box = Box(t=(2.0, 3.0), x=(0.0, 1.0))
    truth = lambda p: porous_medium_solution(p[:, 1], p[:, 0], 2.0)  # noqa: E731
    pde = GeneralizedPorousMedium("porous", m=2.0, domain=box)
    basis = product(box, 7, 7, lambda x: chebyshev(2 * x - 1, 7))
    layer = PDEConstraint(pde, sampler=Sobol(300, 30)).double()
    field = layer(basis, values={"u0": truth, "left": truth, "right": truth})
    p = places(box, 21)
    assert (field(p) - truth(p)).abs().max() < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_poisson_in_two_dimensions(exact: bool):
    pde = Poisson(conditions=(Dirichlet("x", exact=exact), Dirichlet("y", exact=exact)))
    basis = lambda p: (chebyshev(2 * p[0] - 1, 9)[:, None] * chebyshev(2 * p[1] - 1, 9)).flatten()  # noqa: E731
    source = lambda p: 2 * math.pi**2 * torch.sin(math.pi * p[:, 0]) * torch.sin(math.pi * p[:, 1])  # noqa: E731
    field = PDEConstraint(pde, sampler=Sobol(256, 9)).double()(basis, {"f": source})
    p = places(pde.domain, 21)
    assert (field(p) - torch.sin(math.pi * p[:, 0]) * torch.sin(math.pi * p[:, 1])).abs().max() < 1e-4
    if exact:  # corners see two conditions, and dependent rows are dropped
        assert max(float(v) for k, v in field.norms.items() if k != "residual") < 1e-10
        assert 0 < field.multipliers.shape[-1] < 36


def test_grids_give_the_field_of_forward_mode():
    pde = Heat(domain=Box(t=(0.0, 1.0), x=(0.0, 2 * math.pi)), conditions=(Initial("u0"),))
    grid = Grid(pde.domain, periodic=("x",), spacing="chebyshev", t=12, x=8)
    basis = product(pde.domain, 10, 7, fourier)
    values = torch.vmap(basis)(grid.points(torch.zeros((), dtype=F64))).unflatten(0, grid.shape)
    start = {"u0": lambda p: torch.sin(p[:, 1])}
    on_grid = PDEConstraint(pde, derivatives=Spectral(grid))(values, values=start)
    assert (on_grid.terms["u"] - torch.exp(-on_grid.points[:, 0]) * torch.sin(on_grid.points[:, 1])).abs().max() < 1e-7
    forward = PDEConstraint(pde, sampler=grid).double()(basis, values=start)
    assert (on_grid.terms["u"] - forward.terms["u"]).abs().max() < 1e-8
    with pytest.raises(ValueError, match="points: expected a basis that is a function"):
        on_grid(on_grid.points)


def test_neumann_and_robin_by_hand():
    """``u'' = -2``, ``u'(0) = 1``, ``u(1) + 2 u'(1) = 3``: ``u = -x^2 + x + 5``."""
    pde = Poisson(domain=LINE, conditions=(Neumann("x=0", 1.0), Robin("x=1", 1.0, lambda p: 1.0 * p["f"], 3.0)), f=2.0)
    field = PDEConstraint(pde).double()(lambda p: p ** torch.arange(4, dtype=F64))
    torch.testing.assert_close(field.weights, torch.tensor([5.0, 1.0, -1.0, 0.0], dtype=F64))


def test_objective_is_a_weighted_mean():
    """Against numpy's least squares on rows assembled by hand."""
    points = torch.rand(7, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    faces = {"x=0": torch.zeros(1, 1, dtype=F64), "x=1": torch.ones(1, 1, dtype=F64)}
    pde = Poisson(domain=LINE, conditions=(Dirichlet("x=0", 1.0), Dirichlet("x=1", "end")))
    weights = {"residual": 2.0, "dirichlet x=1": 0.5}
    layer = PDEConstraint(pde, sampler=Fixed(points, faces), row_weights=weights, ridge=0.1)
    f = torch.linspace(0, 1, 7, dtype=F64)
    field = layer.double()(
        lambda p: p ** torch.arange(3, dtype=F64), {"f": f}, {"end": torch.tensor([[0.4], [0.7]], dtype=F64)}
    )
    for i, end in enumerate((0.4, 0.7)):
        rows = np.concatenate(
            [np.tile([0, 0, 2.0], (7, 1)) * 2 / math.sqrt(7), [[1, 0, 0]], [[0.5] * 3], math.sqrt(0.1) * np.eye(3)]
        )
        right = np.concatenate([-f.numpy() * 2 / math.sqrt(7), [1], [0.5 * end], np.zeros(3)])
        w = np.linalg.lstsq(rows, right, rcond=None)[0]
        np.testing.assert_allclose(field.weights[i].numpy(), w, rtol=1e-10)
        assert field.norms["residual"][i].item() == pytest.approx(np.sqrt(np.mean((2 * w[2] + f.numpy()) ** 2)))
        assert field.norms["dirichlet x=1"][i].item() == pytest.approx(abs(w.sum() - end))
        assert field.objective[i].item() == pytest.approx(np.sum((rows @ w - right) ** 2) / 2, rel=1e-10)


def test_offset_lifts_the_initial_values():
    pde = Heat(conditions=(), c=0.5)
    layer = PDEConstraint(pde, sampler=Sobol(200)).double()
    basis = product(pde.domain, 10, 1, lambda x: torch.sin(x)[None])
    field = layer(lambda p: p[0] * basis(p), offset=lambda p: torch.sin(p[1]))
    p = places(pde.domain, 11)
    assert (field(p) - torch.exp(-0.5 * p[:, 0]) * torch.sin(p[:, 1])).abs().max() < 1e-9
    assert torch.equal(field(p[:11]), torch.sin(p[:11, 1]))  # t = 0


def test_offset_counts_in_conditions():
    """``u'' = -2``, ``u'(0) = 1``, ``u(1) = 3``, from ``x^3 + 7``: ``u = -x^2 + x + 3``."""
    for exact in (False, True):
        pde = Poisson(domain=LINE, conditions=(Neumann("x=0", 1.0, exact), Dirichlet("x=1", 3.0, exact)), f=2.0)
        field = PDEConstraint(pde).double()(cubic, offset=lambda p: p[0] ** 3 + 7)
        torch.testing.assert_close(field.weights, torch.tensor([-4.0, 1.0, -1.0, -1.0], dtype=F64))
        p = places(LINE, 5)
        torch.testing.assert_close(field(p), 3 + p[:, 0] - p[:, 0] ** 2)


def test_streamfunction_system():
    """A decaying cell of Taylor's; mixed basis functions have to be told apart by the two equations."""
    pde = NavierStokes2D(nu=0.02, domain=Box(t=(0.0, 0.5), x=(0.0, 1.0), y=(0.0, 1.0)))
    rate = 8 * math.pi**2 * 0.02

    def basis(point: Tensor) -> Tensor:
        t, x, y = point.unbind()
        cell = torch.cos(2 * math.pi * x) * torch.cos(2 * math.pi * y) * chebyshev(4 * t - 1, 9)
        zero = torch.zeros_like(cell)
        return torch.stack([torch.cat([cell, zero]), torch.cat([zero, cell])])

    start = lambda p: torch.cos(2 * math.pi * p[:, 1]) * torch.cos(2 * math.pi * p[:, 2])  # noqa: E731
    field = PDEConstraint(pde, sampler=Sobol(128, 16)).double()(basis, values={"w0": start})
    p = places(pde.domain, 6)
    exact = start(p) * torch.exp(-rate * p[:, 0])
    got = field(p)
    assert got.shape == (216, 2)
    assert (got[:, 0] - exact).abs().max() < 1e-6
    assert (got[:, 1] - exact / (8 * math.pi**2)).abs().max() < 1e-6


class Net(nn.Module):
    def __init__(self, d: int, K: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, K)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_against_solving_again(exact: bool):
    torch.manual_seed(1)
    pde = Burgers(conditions=(Initial("u0"), Dirichlet("x=low", "left", exact=exact)))
    layer = PDEConstraint(pde, sampler=Sobol(40, 2 if exact else 8), ridge=1e-3)
    net = Net(2, 5)
    data = {
        "nu": torch.tensor(0.1, dtype=F64),
        "left": torch.tensor(0.2, dtype=F64),
        "shift": torch.tensor(0.3, dtype=F64),
    }
    weight = net.body[0].weight

    def loss() -> Tensor:
        values = {"u0": lambda p: torch.sin(3 * p[:, 1] + data["shift"]), "left": data["left"]}
        field = layer(net, {"nu": data["nu"]}, values)
        return (field(torch.tensor([[0.5, 0.1], [0.9, -0.3]], dtype=F64)) ** 2).sum() + field.terms[
            "u_x"
        ].square().mean()

    for t in data.values():
        t.requires_grad_()
    names = ["nu", "left", "shift"]
    grads = torch.autograd.grad(loss(), [*data.values(), weight])
    with torch.no_grad():
        probes = [(data[n], (), g) for n, g in zip(names, grads[:3], strict=True)]
        probes += [(weight, (i, j), grads[3][i, j]) for i, j in ((0, 1), (4, 0))]
        for t, index, g in probes:
            ends, h = [], 1e-5
            for move in (h, -2 * h):
                t[index] += move
                ends.append(loss().item())
            t[index] += h
            assert g.item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)


def test_experts_have_their_own_points():
    """Two halves of a line, one basis: each its own polynomial; equal to each alone."""
    pde = Poisson(domain=LINE, conditions=(Dirichlet("x", "u"),))
    points = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(2), dtype=F64) / 2
    points[1] += 0.5
    faces = {"x=0": torch.zeros(1, 1, dtype=F64), "x=1": torch.ones(1, 1, dtype=F64)}
    basis = lambda p: p ** torch.arange(4, dtype=F64)  # noqa: E731
    u = torch.tensor([[1.0], [2.0]], dtype=F64)
    f = lambda p: torch.cos(3 * p[..., 0])  # noqa: E731
    both = PDEConstraint(pde, sampler=Fixed(points, faces)).double()(basis, {"f": f}, {"u": u})
    for e in range(2):
        one = PDEConstraint(pde, sampler=Fixed(points[e], faces)).double()(basis, {"f": f}, {"u": u[e]})
        torch.testing.assert_close(both.weights[e], one.weights, rtol=1e-12, atol=1e-12)
    assert both(points).shape == (2, 2, 6)
    torch.testing.assert_close(both(points)[1, 0], both(points[0])[1])


def test_a_failing_element_stays_alone():
    pde = Poisson(domain=LINE, conditions=(Dirichlet("x", exact=True),))
    scale = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.nan, 1.0, 1.0, 1.0]], dtype=F64)
    basis = lambda s: lambda p: s * p ** torch.arange(4, dtype=F64)  # noqa: E731
    with pytest.raises(ValueError, match="basis: expected finite numbers"):
        PDEConstraint(pde).double()(basis(scale))
    field = PDEConstraint(pde, on_failure="nan").double()(basis(scale))
    alone = PDEConstraint(pde).double()(basis(scale[:1]))
    assert torch.equal(field.weights[0], alone.weights[0])
    assert field.weights[1].isnan().all() and int(field.status[1]) > Status.MAX_STEPS


def test_dependent_basis_functions_are_reported_and_a_ridge_helps():
    pde = Poisson(domain=LINE)
    basis = lambda p: p ** torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=F64)  # noqa: E731
    with pytest.raises(SolveError, match=r"PDEConstraint .*SINGULAR"):
        PDEConstraint(pde).double()(basis)
    field = PDEConstraint(pde, ridge=1e-8).double()(basis)
    assert field(torch.tensor([[0.5]], dtype=F64)).item() == pytest.approx(0.125, rel=1e-5)


class Wrong(Poisson):
    what = "shape"

    def residual(self, T, p):
        if self.what == "shape":
            return T["u"][..., 1:]
        if self.what == "term":
            return T["u_x"]
        return T["u"] - p["z"]


def _wrong(what: str) -> PDE:
    pde = Wrong(domain=LINE)
    pde.what = what
    return pde


def cubic(p: Tensor) -> Tensor:
    return p ** torch.arange(4, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PDEConstraint(_wrong("shape")).double()(cubic), "residual output: expected shape"),
        (
            lambda: PDEConstraint(_wrong("term")).double()(cubic),
            "residual: expected one of the terms u, u_xx, got 'u_x'",
        ),
        (
            lambda: PDEConstraint(_wrong("name")).double()(cubic),
            "residual: expected one of the parameters f, x, got 'z'",
        ),
        (lambda: PDEConstraint(Poisson(domain=LINE))(cubic), "basis: expected torch.float32 as the points are"),
        (
            lambda: PDEConstraint(Poisson(domain=LINE)).double()(cubic, {"g": 1.0}),
            "params: expected names of f, got 'g'",
        ),
        (lambda: PDEConstraint(Heat()).double()(cubic), r"values\['u0'\]: expected a number"),
        (
            lambda: PDEConstraint(Poisson(domain=LINE)).double()(cubic, {"f": torch.ones(3, dtype=F64)}),
            r"params\['f'\]: expected 1 or 256 entries",
        ),
        (
            lambda: PDEConstraint(Poisson(domain=LINE)).double()(cubic)(torch.full((1, 1), 1.5, dtype=F64)),
            "points: expected points in Box",
        ),
        (
            lambda: PDEConstraint(
                Burgers(conditions=(Initial(1.0, exact=True), Dirichlet("x=low", exact=True))),
                sampler=Grid(Burgers.domain, t=3, x=3),
            ).double()(lambda p: (chebyshev(p[0], 4)[:, None] * chebyshev(p[1], 4)).flatten()),
            "conditions: expected exact rows that some combination .* contradiction in",
        ),
        (
            lambda: PDEConstraint(Poisson(domain=LINE, conditions=(Dirichlet("x", exact=True),))).double()(
                lambda p: p ** torch.arange(2, dtype=F64)
            ),
            "conditions: expected fewer independent exact rows than the 2 basis functions, got 2",
        ),
        (
            lambda: PDEConstraint(Poisson(), row_weights={"bc": 1.0}),
            "row_weights: expected names of residual, dirichlet x=0",
        ),
        (lambda: PDEConstraint(Poisson), "pde: expected an instance of PDE"),
        (lambda: PDEConstraint(Poisson(), derivatives=Sobol()), r"derivatives: expected Jvp\(\)"),
        (
            lambda: PDEConstraint(
                Poisson(), derivatives=FiniteDifference(Grid(Poisson.domain, x=5, y=5)), sampler=Sobol()
            ),
            "sampler: expected None or the grid of the derivatives",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_module_is_copied_pickled_and_prints():
    layer = PDEConstraint(Poisson(domain=LINE)).double()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(cubic).weights, layer(cubic).weights)
    assert "Poisson(Box(x=(0.0, 1.0)), f=1.0)" in repr(layer)
    assert not layer.state_dict()
