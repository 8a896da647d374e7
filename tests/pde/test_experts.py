"""A domain divided among experts.

Oracles, written before the code: numpy's least squares on the rows of each box, assembled by hand; the constraint layer
on a box alone; direct evaluation on seams; the solution of a whole problem that continuous polynomial pieces reproduce.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, SolveWarning, Status
from difflayers.pde import (
    Box,
    Burgers,
    Continuity,
    DiffusionSorption,
    Dirichlet,
    DomainExperts,
    FiniteDifference,
    Fixed,
    Grid,
    HardBoxes,
    Heat,
    Helmholtz,
    Initial,
    PartitionOfUnity,
    PDEConstraint,
    Periodic,
    Poisson,
    Sobol,
    Spectral,
)

F64 = torch.float64
LINE = Box(x=(0.0, 1.0))
BAR = Box(t=(0.0, 1.0), x=(-1.0, 1.0))


class Waves(nn.Module):
    """A small network of t and x."""

    def __init__(self, K: int = 6, d: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, K)).double()
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=F64)

    def forward(self, point: Tensor) -> Tensor:
        return self.net(point)


def powers(K: int):
    return lambda point: point ** torch.arange(K, dtype=F64)


def start(points: Tensor) -> Tensor:
    return -torch.sin(math.pi * points[:, 1])


def burgers(sampler=Sobol(points=40, boundary=6), **options) -> PDEConstraint:
    return PDEConstraint(Burgers(nu=0.1), ridge=1e-2, sampler=sampler, **options).double()


def test_each_expert_is_the_constraint_on_its_own_box():
    layer = DomainExperts(burgers(), HardBoxes(x=(-0.2, 0.4))).double()
    basis = Waves()
    field = layer(basis, values={"u0": start})
    assert field.value.shape == (3, 6) and [s.at for s in field.seams] == [-0.2, 0.4]
    assert [b.bounds[1] for b in field.boxes] == [(-1.0, -0.2), (-0.2, 0.4), (0.4, 1.0)]
    for e, conditions in enumerate(((Dirichlet("x=-1"),), (), (Dirichlet("x=1"),))):
        pde = Burgers(nu=0.1, conditions=(Initial("u0"), *conditions))
        own = Sobol(points=40, boundary=6, seed=100 * e)  # on the box, whose faces are drawn from the same seeds
        box = Burgers(nu=0.1, domain=field.boxes[e], conditions=())
        inside = own.interior(box, torch.zeros((), dtype=F64)).points
        torch.testing.assert_close(field.points[e], inside)
        faces = {"t=0": own.face(box, 0, False, inside).points}
        faces |= {c.side: own.face(box, 1, c.side == "x=1", inside).points for c in conditions}
        alone = PDEConstraint(pde, ridge=1e-2, sampler=Fixed(inside, faces)).double()(basis, values={"u0": start})
        torch.testing.assert_close(field.value[e], alone.value, rtol=1e-8, atol=1e-10)
        assert field.norms["residual"][e].item() == pytest.approx(alone.norms["residual"].item(), rel=1e-8)
        assert field.norms["initial"][e].item() == pytest.approx(alone.norms["initial"].item(), rel=1e-8)
    points = torch.tensor([[0.5, -0.5], [0.5, -0.2], [0.5, 0.3], [0.5, 0.9]], dtype=F64)
    expected = torch.stack([basis(p) @ field.value[e] for p, e in zip(points, (0, 1, 1, 2), strict=True)])
    torch.testing.assert_close(field(points), expected)


def test_linear_experts_by_hand():
    points = torch.linspace(0, 1, 9, dtype=F64)[:, None]
    faces = {"x=0": points[:1], "x=1": points[-1:]}
    pde = Poisson(domain=LINE, conditions=(Dirichlet("x=0", 1.0), Dirichlet("x=1", "end")))
    layer = DomainExperts(PDEConstraint(pde, sampler=Fixed(points, faces), ridge=0.1), HardBoxes(x=2)).double()
    f = torch.linspace(1, 2, 9, dtype=F64)
    end = torch.tensor([[0.4], [0.7]], dtype=F64)
    field = layer(powers(3), {"f": f}, {"end": end})
    assert field.value.shape == (2, 2, 3) and bool(field.linear.all())
    x = points[:, 0].numpy()
    for i in range(2):
        for e, mine in enumerate((x < 0.5, x >= 0.5)):
            n = mine.sum()
            condition = [[1, 1 * e, 1 * e]]
            rows = np.concatenate([np.tile([0, 0, 2.0], (n, 1)) / math.sqrt(n), condition, math.sqrt(0.1) * np.eye(3)])
            right = np.concatenate([-f.numpy()[mine] / math.sqrt(n), [(1, end[i, 0].item())[e]], np.zeros(3)])
            w = np.linalg.lstsq(rows, right, rcond=None)[0]
            np.testing.assert_allclose(field.value[i, e].numpy(), w, rtol=1e-10)
            miss = np.sqrt(np.mean((2 * w[2] + f.numpy()[mine]) ** 2))
            assert field.norms["residual"][i, e].item() == pytest.approx(miss)
            assert field.objective[i, e].item() == pytest.approx(np.sum((rows @ w - right) ** 2) / 2, rel=1e-10)
        jump = [1, 0.5, 0.25] @ (field.value[i, 0] - field.value[i, 1]).numpy()
        assert field.jumps[i].item() == pytest.approx(abs(jump))
    assert field.norms["dirichlet x=1"][0, 0] == 0  # a condition that the expert does not have


def test_shares_of_a_partition_add_up_and_blend():
    tiling = PartitionOfUnity(overlap=0.5, x=4, y=(0.3,)).tiling(Box(x=(0.0, 2.0), y=(0.0, 1.0)))
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(500, dtype=F64) * torch.tensor([2.0, 1.0])
    corners = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.5, 0.3], [2.0, 0.0], [1.0, 0.3]], dtype=F64)
    index, share = tiling.mix(torch.cat([points, corners]))
    assert share is not None and bool((share >= 0).all()) and bool(((index >= 0) & (index < 8)).all())
    torch.testing.assert_close(share.sum(-1), torch.ones(505, dtype=F64), rtol=1e-15, atol=0)
    member = tiling.members(torch.cat([points, corners]))
    used = torch.zeros(505, 8, dtype=F64).scatter_add(1, index, share)
    assert bool((used.mT[~member] == 0).all())  # nobody speaks outside its box
    torch.testing.assert_close(used[502], torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=F64) / 4)  # cuts cross

    layer = DomainExperts(burgers(), PartitionOfUnity(overlap=0.5, x=2)).double()
    basis = Waves()
    field = layer(basis, values={"u0": start})
    at = torch.tensor([[0.3, -0.26], [0.3, -0.125], [0.3, 0.0], [0.3, 0.26]], dtype=F64)
    s = ((at[:, 1] + 0.25) / 0.5).clamp(0, 1)
    s = 6 * s**5 - 15 * s**4 + 10 * s**3
    u = torch.stack([basis(at) @ field.value[e] for e in range(2)])
    torch.testing.assert_close(field(at), (1 - s) * u[0] + s * u[1])
    assert [b.bounds[1] for b in field.boxes] == [(-1.0, 0.25), (-0.25, 1.0)]


@pytest.mark.parametrize("derivatives", ["difference", "spectral"])
@pytest.mark.parametrize("gate", [HardBoxes(x=3), PartitionOfUnity(overlap=0.4, x=3, t=2)])
def test_values_on_a_grid_are_divided(derivatives, gate):
    if derivatives == "difference":
        grid = Grid(BAR, t=8, x=17)
        inner = burgers(None, derivatives=FiniteDifference(grid))
    else:
        grid = Grid(BAR, spacing="chebyshev", t=8, x=17)
        inner = burgers(None, derivatives=Spectral(grid))
    points = grid.points(torch.zeros((), dtype=F64))
    basis = Waves()
    values = basis(points).unflatten(0, grid.shape).detach()
    layer = DomainExperts(inner, gate, conditions="all").double()
    field, alike = layer(values, values={"u0": start}), layer(basis, values={"u0": start})
    torch.testing.assert_close(field.value, alike.value, rtol=1e-9, atol=1e-12)
    tiling = layer.tiling
    for e in range(tiling.count):
        chosen = field.points[e][field.present[e]]
        box = field.boxes[e]
        inside = torch.stack([p for p in points if all(a <= x <= b for x, (a, b) in zip(p, box.bounds, strict=True))])
        if isinstance(gate, PartitionOfUnity):
            torch.testing.assert_close(chosen, inside)
    if not isinstance(gate, PartitionOfUnity):
        assert int(field.present.sum()) == len(points)  # each node once
    torch.testing.assert_close(field(), alike(points).unflatten(0, grid.shape))
    given = start(grid.points(torch.zeros((), dtype=F64)).unflatten(0, grid.shape)[0])
    torch.testing.assert_close(layer(values, values={"u0": given}).value, field.value, rtol=1e-9, atol=1e-12)


def test_continuous_pieces_reproduce_a_wave():
    wave = Helmholtz(domain=Box(x=(0.0, 6.0)), conditions=(Dirichlet("x=0"), Dirichlet("x=6", 1.0)), k=2.0, f=0.0)
    at = torch.linspace(0, 6, 61, dtype=F64)[:, None]
    truth = (torch.sin(2 * at) / math.sin(12.0))[:, 0]
    centred = lambda point: (point / 3 - 1) ** torch.arange(12, dtype=F64)  # noqa: E731
    inner = PDEConstraint(wave, sampler=Sobol(points=40))
    for exact in (False, True):
        layer = DomainExperts(inner, HardBoxes(x=3), continuity=Continuity(1, exact=exact)).double()
        field = layer(centred)
        assert (field(at) - truth).abs().max() < 2e-3
        assert bool((field.jumps < (1e-8 if exact else 1e-2)).all())
        assert field.status.tolist() == [0, 0, 0]
    alone = inner.double()(centred)
    assert (alone(at) - truth).abs().max() > 5 * (field(at) - truth).abs().max()  # one polynomial does worse


def test_continuity_is_one_problem_by_hand():
    points = torch.linspace(0, 1, 9, dtype=F64)[:, None]
    faces = {"x=0": points[:1], "x=1": points[-1:]}
    for exact in (False, True):
        conditions = (Dirichlet("x=0", 1.0, exact=exact), Dirichlet("x=1", -1.0))
        pde = Poisson(domain=LINE, conditions=conditions, f=2.0)
        inner = PDEConstraint(pde, sampler=Fixed(points, faces), ridge=0.1)
        layer = DomainExperts(inner, HardBoxes(x=2), continuity=Continuity(1, weight=2.0, exact=exact)).double()
        w = layer(powers(3)).value.flatten().numpy()
        rows, right = [], []
        for e, n in ((0, 4), (1, 5)):
            block = np.zeros((n, 6))
            block[:, 3 * e + 2] = 2 / math.sqrt(n)
            rows, right = [*rows, block], [*right, np.full(n, -2 / math.sqrt(n))]
        left, end = np.array([[1.0, 0, 0, 0, 0, 0]]), np.array([[0, 0, 0, 1.0, 1, 1]])
        seam = np.array([[1, 0.5, 0.25, -1, -0.5, -0.25], [0, 0.5, 0.5, 0, -0.5, -0.5]])  # slopes times the width
        rows, right = [*rows, end, math.sqrt(0.1) * np.eye(6)], [*right, [-1.0], np.zeros(6)]
        if not exact:
            rows, right = [*rows, left, 2 * seam], [*right, [1.0], np.zeros(2)]
            expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0]
        else:
            A, y, C = np.concatenate(rows), np.concatenate(right), np.concatenate([left, seam])
            system = np.block([[A.T @ A, C.T], [C, np.zeros((3, 3))]])
            expected = np.linalg.solve(system, np.concatenate([A.T @ y, [1.0, 0, 0]]))[:6]
        np.testing.assert_allclose(w, expected, rtol=1e-8, atol=1e-10)
        rows, right = np.concatenate(rows), np.concatenate(right)
        assert layer(powers(3)).objective.item() == pytest.approx(np.sum((rows @ expected - right) ** 2) / 2)


def test_periodic_grids_have_a_seam_at_their_ends():
    circle = Box(t=(0.0, 0.5), x=(0.0, 2 * math.pi))
    grid = Grid(circle, periodic=("x",), t=6, x=24)
    heat = Heat(domain=circle, conditions=(Initial("u0"),))
    inner = PDEConstraint(heat, derivatives=FiniteDifference(grid, accuracy=4), ridge=1e-8).double()
    field = DomainExperts(inner, HardBoxes(x=3)).double()(Waves(8), values={"u0": lambda p: torch.sin(p[:, 1])})
    assert [(s.lower, s.upper) for s in field.seams] == [(0, 1), (1, 2), (2, 0)]
    nodes = grid.points(field.value)[:: grid.shape[1]]  # x = 0 at all times
    jump = Waves(8)(nodes) @ (field.value[2] - field.value[0])
    assert field.jumps[2].item() == pytest.approx(jump.square().mean().sqrt().item(), rel=1e-10)


@pytest.mark.parametrize("sick", [math.nan, 0.0])
def test_a_failed_expert_leaves_the_others_as_they_are(sick):
    """Basis functions that are NaN, or vanish, beyond x = 0.4: without a ridge the last expert has no solution."""

    class Cut(Waves):
        fill = None

        def forward(self, point: Tensor) -> Tensor:
            out = self.net(point)
            return out if self.fill is None else torch.where(point[1] > 0.4, self.fill, out)

    pde = Burgers(nu=0.1, conditions=(Initial("u0"),))
    inner = PDEConstraint(pde, sampler=Sobol(points=40, boundary=6), on_failure="nan")
    layer = DomainExperts(inner, HardBoxes(x=(-0.2, 0.4))).double()
    at = torch.tensor([[0.5, -0.5], [0.5, 0.1]], dtype=F64)
    results = []
    for fill in (None, sick):
        basis = Cut(4)
        basis.fill = fill
        field = layer(basis, values={"u0": start})
        results.append((field.value[:2], *torch.autograd.grad(field(at).sum(), basis.parameters())))
    for healthy, beside in zip(*results, strict=True):
        assert torch.equal(healthy, beside)
    assert bool(torch.isnan(field.value[2]).all()) and field.status[2] > Status.MAX_STEPS
    assert not field.failed[:2].any()
    loud = DomainExperts(PDEConstraint(pde, sampler=Sobol(points=40, boundary=6)), HardBoxes(x=(-0.2, 0.4))).double()
    if sick == 0:
        with pytest.raises(SolveError, match=r"1 of 3.*2") as caught:
            loud(basis, values={"u0": start})
        assert torch.equal(caught.value.solution.value[:2, :4], field.value[:2])


def test_an_expert_that_sees_no_condition_is_announced():
    with pytest.warns(SolveWarning, match="experts 1, 2 touch no condition"):
        DomainExperts(PDEConstraint(Burgers(conditions=(Initial("u0"),))), HardBoxes(t=3))
    DomainExperts(PDEConstraint(Burgers(conditions=(Initial("u0"),))), HardBoxes(t=3), conditions="all")


def test_scales_divide_rows():
    pde = DiffusionSorption()
    scaled = DiffusionSorption(scales={"residual": 1 / 500, "u": 0.5})
    weights = {"residual": 500.0, "initial": 2.0, "dirichlet x=0": 2.0, "robin x=1": 2.0}
    basis = Waves(5)
    narrow = lambda p: basis(p / torch.tensor([500.0, 1.0], dtype=F64))  # noqa: E731
    values = {"u0": 0.1}
    one = PDEConstraint(pde, ridge=1e-3, row_weights=weights).double()(narrow, values=values)
    two = PDEConstraint(scaled, ridge=1e-3).double()(narrow, values=values)
    torch.testing.assert_close(one.value, two.value, rtol=1e-7, atol=1e-9)
    for bad, message in (({"v": 1.0}, "scales: expected names of residual, u, got 'v'"), ({"u": 0.0}, "above 0")):
        with pytest.raises(ValueError, match=message):
            DiffusionSorption(scales=bad)


@pytest.mark.parametrize("continuity", [None, Continuity()])
def test_a_start_at_the_solution_takes_few_steps(continuity):
    layer = DomainExperts(burgers(), HardBoxes(x=2), continuity=continuity).double()
    first = layer(Waves(), values={"u0": start})
    again = layer(Waves(), values={"u0": start}, init=first.value)
    torch.testing.assert_close(again.value, first.value, rtol=1e-8, atol=1e-10)
    assert bool((again.steps < first.steps).all())
    with pytest.raises(ValueError, match=r"init: expected a tensor \(\*batch, 2, K\), got \(3, 6\)"):
        layer(Waves(), values={"u0": start}, init=first.value[[0, 1, 0]])
    with pytest.raises(ValueError, match="points: expected dtype torch"):
        first(torch.zeros(1, 2))


def test_bad_input_is_named():
    inner = PDEConstraint(Poisson(domain=LINE), ridge=0.1)
    for message, make in (
        ("constraint: expected a PDEConstraint", lambda: DomainExperts(Poisson(), HardBoxes(x=2))),
        ("gate: expected HardBoxes", lambda: DomainExperts(inner, 2)),
        ("gate: expected coordinates of", lambda: DomainExperts(inner, HardBoxes(y=2))),
        ("gate: expected cuts of x between 0 and 1", lambda: DomainExperts(inner, HardBoxes(x=(0.5, 1.5)))),
        ("conditions: expected", lambda: DomainExperts(inner, HardBoxes(x=2), conditions="some")),
        ("continuity: expected", lambda: DomainExperts(inner, HardBoxes(x=2), continuity=1)),
        ("x: expected a number of boxes", lambda: HardBoxes(x=0)),
        ("x: expected a number of boxes", lambda: HardBoxes(x=(0.5, 0.2))),
        ("HardBoxes: expected at least one coordinate", lambda: HardBoxes()),
        ("overlap: expected", lambda: PartitionOfUnity(overlap=1.5, x=2)),
        ("order: expected 0 or 1", lambda: Continuity(2)),
        ("weight: expected", lambda: Continuity(weight=-1.0)),
        ("points: expected", lambda: Continuity(points=0)),
        (
            "periodic condition between experts",
            lambda: DomainExperts(PDEConstraint(Heat(conditions=(Initial("u0"), Periodic("x")))), HardBoxes(x=2)),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    few = PDEConstraint(Poisson(domain=LINE, conditions=()), sampler=Fixed(torch.tensor([[0.1]], dtype=F64)), ridge=0.1)
    with pytest.raises(ValueError, match="sampler: expected points in the box of every expert, got none for expert 1"):
        DomainExperts(few, HardBoxes(x=2)).double()(powers(3))
    field = DomainExperts(inner, HardBoxes(x=2)).double()(powers(3))
    with pytest.raises(ValueError, match="points: expected points in"):
        field(torch.tensor([[1.5]], dtype=F64))
    with pytest.raises(ValueError, match="points: expected a tensor where there is no grid"):
        field()


def test_modules_copy_and_show_themselves():
    layer = DomainExperts(PDEConstraint(Poisson(domain=LINE), ridge=0.1), HardBoxes(x=2)).double()
    assert "HardBoxes(x=2)" in repr(layer) and layer.state_dict() == {}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(powers(3)).value, layer(powers(3)).value)
