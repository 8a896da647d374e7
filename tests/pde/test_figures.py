"""Figures of fields: what is drawn is compared, number by number, with values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from difflayers.pde import (
    PDE,
    Box,
    Fixed,
    Grid,
    Heat,
    NavierStokes2D,
    PDEConstraint,
    Poisson,
    Spectral,
    plot_field,
)

pytest.importorskip("matplotlib")

HEAT = Heat(c=0.5)
LINE = Poisson(domain=Box(x=(0.0, 1.0)), f=2.0)
T, X = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64), torch.linspace(0, 6, 5, dtype=torch.float64)


def exact(points):
    return torch.exp(-0.5 * points[..., 0]) * points[..., 1].sin()


def parabola(points):
    return (points * (1 - points)).squeeze(-1)


def images(figure):
    """Values by title, with the first coordinate first, and the limits of the colours."""
    found = {}
    for axis in figure.axes:
        for drawn in axis.collections:
            if axis.get_title():
                values = torch.as_tensor(drawn.get_array().filled(math.nan))
                found.setdefault(axis.get_title().partition(",")[0], (values.mT if values.ndim == 2 else values, drawn))
    return found


def test_images_of_field_reference_and_error():
    figure = plot_field(lambda p: 1.25 * exact(p), HEAT, lambda p: exact(p), grid=(T, X), units={"x": "m", "u": "K"})
    points = torch.cartesian_prod(T, X)
    u = exact(points).reshape(3, 5)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["u [K]", "u [K], reference", "error, relative L2 0.25"]
    meshes = [axis.collections[0] for axis in figure.axes[:3]]
    drawn = [torch.as_tensor(mesh.get_array().data).mT for mesh in meshes]
    for found, expected in zip(drawn, (1.25 * u, u, 0.25 * u), strict=True):
        torch.testing.assert_close(found, expected)
    assert meshes[0].get_clim() == meshes[1].get_clim() == (float(1.25 * u.min()), float(1.25 * u.max()))
    low, high = meshes[2].get_clim()
    assert low == -high and high == pytest.approx(float(0.25 * u.abs().max()))
    assert figure.axes[0].get_xlabel() == "t" and figure.axes[0].get_ylabel() == "x [m]"
    assert figure.axes[0].get_xlim() == (0.0, 1.0) and figure.axes[0].get_ylim() == (0.0, 2 * math.pi)


def test_residual_of_a_function_is_that_of_its_derivatives():
    shown = images(plot_field(lambda p: p[:, 0] * p[:, 1] ** 2, HEAT, grid=(T, X), params={"c": 3.0}))
    t, x = torch.meshgrid(T, X, indexing="ij")
    torch.testing.assert_close(shown["residual"][0], (x**2 - 3.0 * 2 * t).abs())


def test_residual_of_a_constrained_field_is_drawn_where_it_was_enforced():
    points = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heat = Heat(conditions=())
    layer = PDEConstraint(heat, sampler=Fixed(points), ridge=1e-3).double()
    field = layer(lambda p: torch.stack([p[0] * p[1], p[1] ** 2, p[0]]), params={"c": lambda p: p[:, 1]})
    panel, drawn = images(plot_field(field, heat, grid=(T, X), params={"c": lambda p: p[:, 1]}))["residual"]
    a, b, c = field.value
    x = points[:, 1]
    torch.testing.assert_close(panel, (a * x + c - x * 2 * b).abs())
    torch.testing.assert_close(torch.as_tensor(drawn.get_offsets().data), points)


def test_curves():
    layer = PDEConstraint(LINE, ridge=1e-3).double()
    field = layer(lambda x: x ** torch.arange(4, dtype=x.dtype))
    figure = plot_field(field, LINE, parabola, resolution=11, title="line")
    x = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    above, error, residual = figure.axes
    for line, expected in zip(above.lines, (field(x), parabola(x)), strict=True):
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected)
    torch.testing.assert_close(torch.as_tensor(error.lines[0].get_ydata()), field(x) - parabola(x))
    off = field.terms["u_xx"] + 2.0
    torch.testing.assert_close(torch.as_tensor(residual.lines[0].get_ydata()), off.abs())
    assert residual.get_title() == f"residual, RMS {off.square().mean().sqrt():.2g}"
    assert residual.get_title().endswith(f"{field.norms['residual']:.2g}")
    assert figure.get_suptitle() == "line" and above.get_xlabel() == "x"


def test_basis_on_a_grid_and_element_of_a_batch():
    square = Grid(Box(x=(0.0, 1.0), y=(0.0, 2.0)), spacing="chebyshev", x=6, y=5)
    pde = Poisson(domain=square.domain)
    basis = torch.randn(2, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    field = PDEConstraint(pde, derivatives=Spectral(square), ridge=1e-2).double()(basis)
    shown = images(plot_field(field, pde, torch.zeros(6, 5, dtype=torch.float64), index=1))
    torch.testing.assert_close(shown["u"][0], (basis[1] * field.value[1]).sum(-1))
    F = (field.terms["u_xx"] + field.terms["u_yy"] + 1)[1].reshape(6, 5).abs()
    torch.testing.assert_close(shown["residual"][0], F)
    with pytest.raises(ValueError, match="grid: expected None for a basis"):
        plot_field(field, pde, grid=(T, X), index=1)


def test_snapshots_of_two_fields():
    ns = NavierStokes2D(nu=0.1)
    t, g = torch.linspace(0, 1, 7, dtype=torch.float64), torch.arange(6, dtype=torch.float64) / 6

    def flow(p):  # Taylor-Green: both equations hold
        waves = (2 * math.pi * p[:, 1]).cos() * (2 * math.pi * p[:, 2]).cos()
        w = waves * torch.exp(-8 * math.pi**2 * 0.1 * p[:, 0])
        return torch.stack([w, w / (8 * math.pi**2)], -1)

    values = flow(torch.cartesian_prod(t, g, g)).reshape(7, 6, 6, 2)
    figure = plot_field(flow, ns, values, grid=(t, g, g), component="psi", snapshots=3)
    plots = figure.axes[:12]  # 4 rows: field, reference, error, residual
    assert [axis.get_title() for axis in plots[:3]] == ["t = 0", "t = 0.5", "t = 1"]
    drawn = [torch.as_tensor(axis.collections[0].get_array().data).mT for axis in plots]
    for k, i in enumerate((0, 3, 6)):
        for shown in (drawn[k], drawn[3 + k]):
            torch.testing.assert_close(shown[:6, :6], values[i, :, :, 1])
            torch.testing.assert_close(shown[6], shown[0])  # the torus is closed
            torch.testing.assert_close(shown[:, 6], shown[:, 0])
        assert drawn[6 + k].abs().max() < 1e-12 and drawn[9 + k].max() < 1e-10


def test_boxes_of_experts_and_points_that_do_not_count():
    points = torch.tensor([[[0.1, 1.0], [0.2, 2.0]], [[0.3, 5.0], [0.3, 5.0]]], dtype=torch.float64)
    terms = {"u": points[..., 0], "u_t": torch.tensor([[1.0, 2.0], [3.0, 77.0]]).double(), "u_xx": 0 * points[..., 0]}

    class Experts(SimpleNamespace):
        def __call__(self, at):
            return exact(at)

    boxes = Box(t=(0.0, 1.0), x=(0.0, 3.0)), Box(t=(0.0, 1.0), x=(3.0, 2 * math.pi))
    present = torch.tensor([[True, True], [True, False]])
    field = Experts(points=points, terms=terms, boxes=boxes, present=present)
    figure = plot_field(field, HEAT, grid=(T, X))
    assert images(figure)["residual"][0].tolist() == [1.0, 2.0, 3.0]
    corners = [line.get_xydata()[:, 1].max() for line in figure.axes[0].lines]
    assert corners == [3.0, 2 * math.pi]


def test_what_is_not_finite_is_left_white(tmp_path):
    figure = plot_field(lambda p: torch.where(p[:, 0] > 0.5, math.nan, exact(p)), HEAT, exact, grid=(T, X))
    assert images(figure)["u"][0][2].isnan().all()
    figure.savefig(tmp_path / "field.png")
    plot_field(lambda p: p[:, 0] * math.nan, HEAT, exact, grid=(T, X)).savefig(tmp_path / "nan.png")
    assert (tmp_path / "field.png").stat().st_size > 10_000


def test_networks_and_figures_leave_no_trace():
    import matplotlib.pyplot as plt

    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    shown = images(plot_field(net, HEAT, resolution=4))
    assert shown["u"][0].shape == (4, 4) and shown["residual"][0].shape == (4, 4)
    assert not plt.get_fignums() and net[0].weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reference": torch.zeros(3, 4)},
            r"reference: expected shape \(\*batch, 3, 5\), as the grid has, got \(3, 4\)",
        ),
        ({"reference": torch.zeros(3, 5), "grid": None}, "grid: expected the values of each coordinate"),
        ({"grid": (T,)}, "grid: expected increasing values of t, x"),
        ({"grid": (T, X.flip(0))}, "grid: expected increasing values of t, x"),
        ({"grid": (T, X + 1)}, "expected points in Box"),
        ({"index": 1}, r"index: expected 0 numbers, one for each batch dimension of field \(\), got \(1,\)"),
        ({"component": "v"}, "field: expected one of u, got 'v'"),
        ({"resolution": 1}, "resolution: expected an integer of at least 2, got 1"),
        ({"snapshots": 0}, "snapshots: expected an integer of at least 1, got 0"),
        ({"field": 3.0}, "field: expected a tensor or a function of points, got float"),
        ({"field": lambda p: 0.0}, "field: expected a tensor or a function that returns one, got float"),
    ],
)
def test_bad_arguments(arguments, message):
    layer = PDEConstraint(HEAT, ridge=1e-3).double()
    field = layer(lambda p: torch.stack([p[0], p[1]]), values={"u0": 0.0})
    with pytest.raises(ValueError, match=message):
        plot_field(**({"field": field, "pde": HEAT, "grid": (T, X)} | arguments))


def test_four_coordinates():
    class Wide(PDE):
        coords, terms = ("t", "x", "y", "z"), ("u",)
        domain = Box(t=(0.0, 1.0), x=(0.0, 1.0), y=(0.0, 1.0), z=(0.0, 1.0))

    with pytest.raises(ValueError, match="pde: expected at most three coordinates, got 4"):
        plot_field(lambda p: p[:, 0], Wide())
