"""Experts on parts of a domain against the same problems built by hand, one at a time and joined.

The oracle, in `oracle_fields`: each expert has the points in its box and the rows that touch it, with averages over its
own; the coupled problem is one dense program of all coefficients. Partitions of unity are read off the field by its
derivative in the coefficients. A failed expert is compared to the last bit with a harmless one in its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.pde import (
    PDE,
    Box,
    Continuity,
    Dirichlet,
    DomainExperts,
    FiniteDifference,
    Fixed,
    Grid,
    HardBoxes,
    Initial,
    PartitionOfUnity,
    PDEConstraint,
)
from tests.pde.oracle_fields import At, Block, FieldProgram, Formulas, compare, number, rms, shift, uniform
from tests.pde.oracle_least_squares import F64, Data, Program, deviation, leaves, randn

BOX = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}


class Forced(PDE):
    """Burgers with a source."""

    coords, terms = ("t", "x"), ("u", "u_t", "u_x", "u_xx")
    domain, params = Box(**BOX), {"nu": 0.1, "f": None}
    conditions = (Initial("u0"), Dirichlet("x=low", 0.3), Dirichlet("x=high", "g"))

    def residual(self, T: Any, p: Any) -> Tensor:
        return T["u_t"] + T["u"] * T["u_x"] - p["nu"] * T["u_xx"] - p["f"]


def within(points: Tensor, box: Box) -> Tensor:
    lower, upper = box.ends(points)
    return ((points >= lower - 1e-12) & (points <= upper + 1e-12)).all(-1)


INSIDE, START = uniform(141, 120, BOX), uniform(42, 20, BOX, t=0)
LEFT, RIGHT = uniform(43, 14, BOX, x=-1), uniform(44, 15, BOX, x=1)
FACES = {"t=0": START, "x=-1": LEFT, "x=1": RIGHT}
FORMULAS = Formulas("tx", " ".join(f"x**{i}*t**{j}*(1+a*x*t)" for i in range(3) for j in range(2)))
OFFSET = Formulas("tx", "sin(a*x)*exp(-t)")
DATA = {"a": number(0.3), "nu": number(0.1), "u0": randn(7, 20) * 0.5, "g": randn(8, 15) * 0.3, "o": number(1.2)}
DATA["f"] = 0.3 * randn(9, 120)


def forced(gate: Any, data: Data, **options: Any) -> Any:
    constraint = PDEConstraint(Forced(), sampler=Fixed(INSIDE, FACES), row_weights={"initial": 2.0}, ridge=1e-2)
    layer = DomainExperts(constraint, gate, **options).double()
    params, values = {"nu": data["nu"], "f": data["f"]}, {"u0": data["u0"], "g": data["g"]}
    return layer, layer(FORMULAS.basis(data["a"]), params, values, offset=shift(OFFSET, data["o"]))


def blocks_of(box: Box, everywhere: bool) -> list[Block]:
    i, s, l, r = (
        within(points, box) if k == 0 or not everywhere else torch.ones(len(points), dtype=torch.bool)
        for k, points in enumerate((INSIDE, START, LEFT, RIGHT))
    )
    return [
        (1.0, INSIDE[i], lambda at, d: at("u_t") + at("u") * at("u_x") - d["nu"] * at("u_xx") - d["f"][i]),
        (2.0, START[s], lambda at, d: at("u") - d["u0"][s]),
        (1.0, LEFT[l], lambda at, d: at("u") - 0.3),
        (1.0, RIGHT[r], lambda at, d: at("u") - d["g"][r]),
    ]


@pytest.mark.filterwarnings("ignore:DomainExperts. experts 4 touch no condition")
@pytest.mark.parametrize("conditions", ["touching", "all"])
@pytest.mark.parametrize("gate", [HardBoxes(t=2, x=3), HardBoxes(x=(-0.5, 0.2)), PartitionOfUnity(0.4, t=2, x=3)])
def test_every_expert_is_a_problem_of_its_own(gate: Any, conditions: Any) -> None:
    x = leaves(DATA)
    layer, field = forced(gate, x, conditions=conditions)
    oracle = FieldProgram(FORMULAS, 1e-2, OFFSET)
    assert (field.status == Status.CONVERGED).all()
    bars, total, W = randn(3, *field.value.shape), {name: torch.zeros_like(one) for name, one in DATA.items()}, []
    for e, box in enumerate(layer.boxes):
        blocks = blocks_of(box, conditions == "all")
        program = oracle.program(DATA, blocks)
        W.append(program.polish(field.value[e].detach()))
        assert deviation(field.value[e], W[e]) < 1e-10
        for name, one in program.cotangents(W[e], bars[e]).items():
            total[name] += one
        names = ("residual", "initial", "dirichlet x=-1", "dirichlet x=1")
        for name, (_, points, rows) in zip(names, blocks, strict=True):
            size = rms(rows(oracle.at(points, W[e], DATA), DATA)) if len(points) else 0.0
            assert abs(float(field.norms[name][e]) - size) < 1e-9
    gradients = torch.autograd.grad(field.value, list(x.values()), bars, retain_graph=True)
    for name, mine in zip(x, gradients, strict=True):
        assert deviation(mine, total[name]) < 1e-8, name

    points = uniform(45, 200, BOX)
    each = torch.stack([oracle.at(points, w, DATA)("u") for w in W], -1)
    inside = torch.stack([within(points, box) for box in layer.boxes], -1)
    alone = inside.sum(-1) == 1
    assert alone.any() and bool(alone.all()) == (type(gate) is HardBoxes)
    value = field(points)
    assert deviation(value[alone], each[alone, inside[alone].int().argmax(-1)]) < 1e-10
    low, high = each.masked_fill(~inside, torch.inf).amin(-1), each.masked_fill(~inside, -torch.inf).amax(-1)
    assert ((value >= low - 1e-10) & (value <= high + 1e-10)).all()


def test_a_partition_of_unity_sums_to_one_and_is_smooth() -> None:
    x = leaves(DATA)
    with pytest.warns(SolveWarning, match="experts 4"):
        layer, field = forced(PartitionOfUnity(0.5, t=2, x=3), x)

    def functions(points: Tensor) -> Tensor:
        """(N, E): the derivative of the field by a coefficient, divided by its basis function."""
        basis = FORMULAS.term("u", points, DATA["a"])[:, 0]
        columns = [torch.autograd.grad(one, field.value, retain_graph=True)[0][:, 0] for one in field(points)]
        return torch.stack(columns) / basis[:, None]

    points = uniform(46, 60, BOX)
    chi = functions(points)
    inside = torch.stack([within(points, box) for box in layer.boxes], -1)
    assert (chi.sum(-1) - 1).abs().max() < 1e-14 * 10
    assert chi.min() > -1e-15 and not chi[~inside].any()
    assert ((chi > 1e-3) & (chi < 0.999)).any()
    line = torch.stack([torch.full((401,), 0.2, dtype=F64), torch.linspace(-1, 1, 401, dtype=F64)], -1)
    second = functions(line).diff(n=2, dim=0) / (1 / 200) ** 2
    jumps = second.diff(dim=0).abs().amax()
    assert jumps < 0.2 * second.abs().amax(), "the second derivative has no jump"


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_continuity_is_one_joint_problem(order: int, exact: bool, ends: bool) -> None:
    """A line in three parts; exact or weighted seams, exact or weighted ends."""
    box, cuts = {"x": (0.0, 2.0)}, (0.5, 1.2)

    class Line(PDE):
        coords, terms = ("x",), ("u", "u_x", "u_xx")
        domain, params = Box(**box), {"c": 1.0, "f": None}
        conditions = (Dirichlet("x=0", 0.4, exact=ends), Dirichlet("x=2", "h", exact=ends))

        def residual(self, T: Any, p: Any) -> Tensor:
            return T["u_xx"] + p["c"] * T["u"] * T["u_x"] - p["f"]

    formulas, K = Formulas("x", "1 x x**2*(1+a*x) sin(a*x) cos(2*x)"), 5
    inside, left, right = uniform(50, 40, box), uniform(51, 1, box, x=0), uniform(52, 1, box, x=2)
    constraint = PDEConstraint(
        Line(scales={"residual": 2.0, "u": 0.5}),
        sampler=Fixed(inside, {"x=0": left, "x=2": right}),
        row_weights={"residual": 0.7},
        ridge=1e-2,
    )
    layer = DomainExperts(constraint, HardBoxes(x=cuts), continuity=Continuity(order, weight=3.0, exact=exact)).double()
    data = {"a": number(0.7), "c": number(0.3), "f": randn(4, 40), "h": number(1.3)}
    x = leaves(data)
    field = layer(formulas.basis(x["a"]), {"c": x["c"], "f": x["f"]}, {"h": x["h"]})
    mine = [within(inside, one) for one in layer.boxes]

    def jumps(w: Tensor, d: Data) -> Tensor:
        """Of the field on the two seams, and of its derivative times the mean width of the boxes beside each."""
        W, rows = w.view(3, K).diff(dim=0), []
        for name, factors in (("u", (1.0, 1.0)), ("u_x", (0.6, 0.75)))[: order + 1]:
            for difference, cut, factor in zip(W, cuts, factors, strict=True):
                rows.append(factor * formulas.term(name, torch.tensor([[cut]], dtype=F64), d["a"]) @ difference)
        return torch.cat(rows)

    def sides(w: Tensor, d: Data) -> Tensor:
        W = w.view(3, K)
        lower, upper = (formulas.term("u", one, d["a"]) for one in (left, right))
        return torch.cat([lower @ W[0] - 0.4, upper @ W[2] - d["h"]])

    oracle = FieldProgram(formulas, 1e-2)

    def objective(w: Tensor, d: Data) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for e in range(3):

            def line(at: At, d: Data, e: int = e) -> Tensor:
                return at("u_xx") + d["c"] * at("u") * at("u_x") - d["f"][mine[e]]

            total = total + oracle.value(w.view(3, K)[e], d, [(0.35, inside[mine[e]], line)])
        if not ends:
            total = total + 2 * sides(w, d).square().sum()
        return total if exact else total + 18 * jumps(w, d).square().sum()

    def equality(w: Tensor, d: Data) -> Tensor:
        return torch.cat([rows(w, d) for rows, hard in ((sides, ends), (jumps, exact)) if hard])

    w = compare(field, x, Program(objective, equality if ends or exact else None, data, 3 * K), data)
    assert deviation(field.jumps, jumps(w, data)[:2].abs()) < 1e-10
    assert [seam.at for seam in field.seams] == list(cuts)


def test_jumps_on_a_grid_are_those_of_its_nodes() -> None:
    grid = Grid(Box(**BOX), t=5, x=9)
    values = randn(60, 5, 9, 4)
    pde = Forced(f=0.0, conditions=(Initial(0.2), Dirichlet("x", 0.0)))
    constraint = PDEConstraint(pde, derivatives=FiniteDifference(grid), ridge=1e-2)
    layer = DomainExperts(constraint, HardBoxes(x=2)).double()
    field = layer(values)
    fields = torch.einsum("txk,ek->etx", values, field.value)
    assert deviation(field.jumps, (fields[0, :, 4] - fields[1, :, 4]).square().mean().sqrt()[None]) < 1e-10


BAD = {
    "nan": ("f", float("nan")),
    "inf": ("f", float("inf")),
    "huge": ("f", 1e200),
    "diverging": ("k", 1e300),
}


@pytest.mark.parametrize("bad", sorted(BAD))
@pytest.mark.parametrize("gate", [HardBoxes(x=4), PartitionOfUnity(0.1, x=4)])
def test_a_failed_expert_changes_no_bit_of_the_others(bad: str, gate: Any) -> None:
    box = {"x": (0.0, 4.0)}

    class Line(PDE):
        coords, terms = ("x",), ("u", "u_x", "u_xx")
        domain, params = Box(**box), {"f": None, "k": None}
        conditions = (Dirichlet("x=0", 0.4, exact=True), Dirichlet("x=4", "h"))

        def residual(self, T: Any, p: Any) -> Tensor:
            return T["u_xx"] + T["u"] * T["u_x"] - p["f"] + p["k"] * torch.exp(T["u"])

    formulas = Formulas("x", "1 x x**2*(1+a*x) sin(a*x) cos(2*x)")
    inside, left, right = uniform(70, 60, box), uniform(71, 1, box, x=0), uniform(72, 1, box, x=4)
    hit = (inside[:, 0] > 1.3) & (inside[:, 0] < 1.7)  # points of expert 1 alone
    sampler = Fixed(inside, {"x=0": left, "x=4": right})
    data = {"a": number(0.7), "h": number(1.3), "f": randn(4, 60), "k": torch.zeros(60, dtype=F64)}

    def run(data: Data, on_failure: Any) -> tuple[Any, Data]:
        constraint = PDEConstraint(Line(), sampler=sampler, ridge=1e-2, on_failure=on_failure)
        with pytest.warns(SolveWarning, match="experts 1, 2"):
            layer = DomainExperts(constraint, gate).double()
        x = leaves(data)
        field = layer(formulas.basis(x["a"]), {"f": x["f"], "k": x["k"]}, {"h": x["h"]})
        others = field(torch.tensor([[0.5], [2.5], [3.5]], dtype=F64)).sum() + field.value[[0, 2, 3]].square().sum()
        others = others + field.terms["u_x"][[0, 2, 3]].sum()
        return field, dict(zip(x, torch.autograd.grad(others, list(x.values())), strict=True))

    name, value = BAD[bad]
    spoiled = data | {name: torch.where(hit, value, data[name])}
    harmless, right_gradients = run(data, "nan")
    field, gradients = run(spoiled, "nan")
    assert (harmless.status == Status.CONVERGED).all()
    assert field.status.tolist() == [0, int(field.status[1]), 0, 0] and field.status[1] > Status.MAX_STEPS
    assert field.value[1].isnan().all()
    assert torch.equal(field.value[[0, 2, 3]], harmless.value[[0, 2, 3]])
    for which, mine in gradients.items():
        assert torch.equal(mine, right_gradients[which]) or torch.equal(mine[~hit], right_gradients[which][~hit]), which
    if bad in ("huge", "diverging"):
        with pytest.raises(SolveError, match=r"elements 1\)") as error:
            run(spoiled, "raise")
        assert error.value.solution.status.shape == (4,)
    else:
        with pytest.raises(ValueError, match=f"params..{name}.*finite"):
            run(spoiled, "raise")


def test_a_singular_expert_is_named_and_harms_nobody() -> None:
    """Expert 1 has two points for five coefficients; the same number of points elsewhere, so shapes agree."""
    box = {"x": (0.0, 3.0)}

    class Line(PDE):
        coords, terms = ("x",), ("u", "u_xx")
        domain, params = Box(**box), {"f": 1.0}
        conditions = (Dirichlet("x"),)

        def residual(self, T: Any, p: Any) -> Tensor:
            return T["u_xx"] + T["u"] - p["f"]

    formulas = Formulas("x", "1 x x**2*(1+a*x) sin(a*x) cos(2*x)")
    outer, middle = uniform(80, 40, box), 1.2 + 0.6 * torch.rand(12, 1, dtype=F64)
    outer = outer[(outer[:, 0] < 1) | (outer[:, 0] > 2)]
    faces = {"x=0": torch.zeros(1, 1, dtype=F64), "x=3": torch.full((1, 1), 3.0, dtype=F64)}

    def run(points: Tensor, on_failure: Any = "nan") -> Any:
        constraint = PDEConstraint(Line(), sampler=Fixed(points, faces), on_failure=on_failure)
        with pytest.warns(SolveWarning, match="touch no condition"):
            layer = DomainExperts(constraint, HardBoxes(x=3)).double()
        return layer(formulas.basis(number(0.7)))

    harmless, field = run(torch.cat([outer, middle])), run(torch.cat([outer, middle[:2].repeat(6, 1)]))
    assert harmless.status.tolist() == [0, 0, 0]
    assert field.status.tolist() == [0, int(Status.SINGULAR), 0]
    assert torch.equal(field.value[[0, 2]], harmless.value[[0, 2]])
    with pytest.raises(SolveError, match=r"elements 1\)"):
        run(torch.cat([outer, middle[:2].repeat(6, 1)]), "raise")
