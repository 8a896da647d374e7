"""Constraint layers against rows built by hand.

The oracle, in `oracle_fields`: derivatives of the basis by sympy, the averaged sum of squares written out for each
problem, minimised by Newton's method and differentiated by a dense implicit function theorem (`oracle_least_squares`).
Gradients with respect to parameters of the basis, of the equation, of the offset, and the values of conditions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflayers.pde import (
    PDE,
    Box,
    Burgers,
    DiffusionSorption,
    Dirichlet,
    Fixed,
    Initial,
    Neumann,
    PDEConstraint,
    Periodic,
    Poisson,
    Robin,
)
from tests.pde.oracle_fields import At, Block, FieldProgram, Formulas, compare, number, rms, shift, uniform
from tests.pde.oracle_least_squares import Data, deviation, leaves, randn

# --------------------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("exact", [False, True])
def test_heat_with_periodic_and_neumann_conditions(exact: bool) -> None:
    box = {"t": (0.0, 1.0), "x": (0.0, 2.0)}

    class Conduction(PDE):
        coords, terms = ("t", "x"), ("u", "u_t", "u_xx")
        domain, params = Box(**box), {"c": 0.3, "f": None}
        conditions = (Initial("u0"), Periodic("x", exact=exact), Neumann("x=2", "h"))

        def residual(self, T: Any, p: Any) -> Tensor:
            return T["u_t"] - p["c"] * T["u_xx"] - p["f"] * p["x"]

    ends = 2 if exact else 7
    inside, start, left = uniform(0, 30, box), uniform(1, 9, box, t=0), uniform(2, ends, box, x=0)
    right = left.clone()
    right[:, 1] = 2
    formulas = Formulas("tx", "1 x t exp(-a*t)*cos(pi*x*a) x**2*t sin(a*x)*t**2 x**2 x**3 sin(pi*x)*(1+a*t)")
    weights = {"residual": 0.7, "initial": 3.0, "neumann x=2": 0.5} | ({} if exact else {"periodic u x": 2.0})
    sampler = Fixed(inside, {"t=0": start, "x=0": left, "x=2": right})
    layer = PDEConstraint(Conduction(), sampler=sampler, row_weights=weights, ridge=1e-3).double()
    data = {"a": number(0.9), "c": number(0.4), "f": randn(5, 30), "u0": randn(6, 9), "h": number(0.3)}
    x = leaves(data)
    field = layer(formulas.basis(x["a"]), {"c": x["c"], "f": x["f"]}, {"u0": x["u0"], "h": x["h"]})
    assert field.linear.all()

    oracle = FieldProgram(formulas, 1e-3)

    def seam(name: str) -> Block:
        def rows(at: At, d: Data) -> Tensor:
            return at(name)[:ends] - at(name)[ends:]

        # as many rows as points on one end: the mean of a block is over both
        return (2.0 if name == "u" else 1.0) * 2**0.5, torch.cat([left, right]), rows

    blocks: list[Block] = [
        (0.7, inside, lambda at, d: at("u_t") - d["c"] * at("u_xx") - d["f"] * inside[:, 1]),
        (3.0, start, lambda at, d: at("u") - d["u0"]),
        (0.5, right, lambda at, d: at("u_x") - d["h"]),
    ]
    seams = [seam("u"), seam("u_x")]
    w = compare(field, x, oracle.program(data, blocks if exact else blocks + seams, seams if exact else ()), data)
    names = ["residual", "initial", "neumann x=2"]
    for name, (_, points, rows) in zip(names, blocks, strict=True):
        assert abs(float(field.norms[name]) - rms(rows(oracle.at(points, w, data), data))) < 1e-10
    for name, (_, points, rows) in zip(["periodic u x", "periodic u_x x"], seams, strict=True):
        assert abs(float(field.norms[name]) - rms(rows(oracle.at(points, w, data), data))) < 1e-10
    points = uniform(3, 11, box)
    assert deviation(field(points), oracle.at(points, w, data)("u")) < 1e-10
    assert deviation(field.terms["u_xx"], oracle.at(inside, w, data)("u_xx")) < 1e-9


@pytest.mark.parametrize("exact", [False, True])
def test_burgers_with_an_offset(exact: bool) -> None:
    box = {"t": (0.0, 1.0), "x": (-1.0, 1.0)}
    formulas = Formulas("tx", " ".join(f"x**{i}*t**{j}*(1+a*x*t)" for i in range(4) for j in range(3)))
    offset = Formulas("tx", "sin(a*x)*exp(-t)")
    inside, start = uniform(3, 40, box), uniform(4, 3, box, t=0)
    left, right = uniform(5, 5, box, x=-1), uniform(6, 6, box, x=1)
    slope = Dirichlet("x", value=lambda points: 0.3 * points[..., 0])
    layer = PDEConstraint(
        Burgers(conditions=(Initial("u0", exact=exact), slope), scales={"residual": 2.0, "u": 0.5}),
        sampler=Fixed(inside, {"t=0": start, "x=-1": left, "x=1": right}),
        row_weights={"residual": 1.5},
        ridge=1e-2,
    ).double()
    data = {"a": number(0.3), "nu": number(0.1), "u0": 0.5 * randn(7, 3), "o": number(1.2)}
    x = leaves(data)
    field = layer(formulas.basis(x["a"]), {"nu": x["nu"]}, {"u0": x["u0"]}, offset=shift(offset, x["o"]))
    assert not field.linear.any()
    initial: Block = (2.0, start, lambda at, d: at("u") - d["u0"])
    blocks: list[Block] = [
        (0.75, inside, lambda at, d: at("u_t") + at("u") * at("u_x") - d["nu"] * at("u_xx")),
        (2.0, left, lambda at, d: at("u") - 0.3 * left[:, 0]),
        (2.0, right, lambda at, d: at("u") - 0.3 * right[:, 0]),
    ]
    oracle = FieldProgram(formulas, 1e-2, offset)
    program = oracle.program(data, blocks if exact else [*blocks, initial], [initial] if exact else ())
    w = compare(field, x, program, data)
    points = uniform(8, 11, box)
    assert deviation(field(points), oracle.at(points, w, data)("u")) < 1e-10


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_diffusion_sorption_and_the_sign_of_its_outflow(sign: float) -> None:
    box = {"t": (0.0, 500.0), "x": (0.0, 1.0)}
    formulas = Formulas("tx", "1 x x**2 t/500 x*t/500 exp(-a*x) exp(-a*x)*t/500 x**3 x**2*t/500")
    inside, start = uniform(13, 40, box), uniform(14, 5, box, t=0)
    left, right = uniform(15, 5, box, x=0), uniform(16, 6, box, x=1)
    layer = PDEConstraint(
        DiffusionSorption(sign=sign),
        sampler=Fixed(inside, {"t=0": start, "x=0": left, "x=1": right}),
        row_weights={"residual": 500.0, "initial": 1.5},
        ridge=1e-4,
    ).double()
    data = {"a": 3.0, "D": 5e-4, "nf": 0.874, "porosity": 0.29, "rho": 2880.0, "kf": 3.5e-4}
    data = {name: number(value) for name, value in data.items()} | {"u0": randn(7, 5) * 0.1}  # some are negative
    x = leaves(data)
    params = {name: x[name] for name in ("D", "nf", "porosity", "rho", "kf")}
    field = layer(formulas.basis(x["a"]), params, {"u0": x["u0"]})

    def sorption(at: At, d: Data) -> Tensor:
        u, factor = at("u"), (1 - d["porosity"]) / d["porosity"] * d["rho"] * d["kf"] * d["nf"]
        power = (torch.where(u > 0, u, 0) + 1e-6) ** (d["nf"] - 1)
        return at("u_t") - d["D"] / (1 + factor * power) * at("u_xx")

    blocks: list[Block] = [
        (500.0, inside, sorption),
        (1.5, start, lambda at, d: at("u") - d["u0"]),
        (1.0, left, lambda at, d: at("u") - 1),
        (1.0, right, lambda at, d: at("u") - sign * d["D"] * at("u_x")),
    ]
    compare(field, x, FieldProgram(formulas, 1e-4).program(data, blocks), data)


def test_a_system_of_two_fields_with_all_conditions() -> None:
    box = {"t": (0.0, 1.0), "x": (0.0, 2.0)}

    class Waves(PDE):
        coords, fields, terms = ("t", "x"), ("u", "v"), ("u", "u_t", "v_x", "v", "v_t", "u_x")
        domain, params = Box(**box), {"c": 1.3}
        conditions = (
            Initial("u0", field="u"),
            Initial("v0", order=1, field="v"),
            Dirichlet("x", field="u", exact=True),
            Robin("x=2", a="c", b=2.0, value="h", field="v"),
            Neumann("x=low", 0.5, field="v"),
        )

        def residual(self, T: Any, p: Any) -> Tensor:
            first = T["u_t"] - p["c"] * T["v_x"] * T["u"]
            return torch.stack([first, T["v_t"] - p["c"] * T["u_x"] + p["x"]], -1)

    formulas = Formulas(
        "tx",
        {
            "u": "x x**2 sin(a*x)*t t 0 1 exp(-x*a) 0",
            "v": "1 0 cos(a*x) t*x exp(-t)*x**2 x**3*t x t",
        },
    )
    inside, start = uniform(20, 30, box), uniform(21, 9, box, t=0)
    left, right = uniform(22, 1, box, x=0), uniform(23, 1, box, x=2)
    sampler = Fixed(inside, {"t=0": start, "x=0": left, "x=2": right})
    layer = PDEConstraint(Waves(), sampler=sampler, ridge=1e-3).double()
    data = {"a": number(0.9), "c": number(0.8), "u0": randn(8, 9), "v0": number(0.4), "h": number(-0.3)}
    x = leaves(data)
    field = layer(formulas.basis(x["a"]), {"c": x["c"]}, {name: x[name] for name in ("u0", "v0", "h")})

    def waves(at: At, d: Data) -> Tensor:
        first = at("u_t") - d["c"] * at("v_x") * at("u")
        return torch.stack([first, at("v_t") - d["c"] * at("u_x") + inside[:, 1]], -1)

    blocks: list[Block] = [
        (1.0, inside, waves),
        (1.0, start, lambda at, d: at("u") - d["u0"]),
        (1.0, start, lambda at, d: at("v_t") - d["v0"]),
        (1.0, right, lambda at, d: d["c"] * at("v") + 2 * at("v_x") - d["h"]),
        (1.0, left, lambda at, d: at("v_x") - 0.5),
    ]
    exact: list[Block] = [(1.0, side, lambda at, d: at("u")) for side in (left, right)]
    oracle = FieldProgram(formulas, 1e-3)
    w = compare(field, x, oracle.program(data, blocks, exact), data)
    points = uniform(24, 5, box)
    at = oracle.at(points, w, data)
    assert deviation(field(points), torch.stack([at("u"), at("v")], -1)) < 1e-10


def test_poisson_in_the_plane() -> None:
    box = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
    formulas = Formulas("xy", "1 x y x*y x**2 y**2 sin(a*x)*y exp(a*y)*x**2")
    inside = uniform(30, 30, box)
    sides = {
        f"{c}={e}": uniform(31 + i, 3 + i, box, **{c: int(e)}) for i, (c, e) in enumerate(("x0", "x1", "y0", "y1"))
    }
    pde = Poisson(domain=Box(**box))
    layer = PDEConstraint(pde, sampler=Fixed(inside, sides), row_weights={"dirichlet x=0": 2.0}).double()
    data = {"a": number(0.9), "f": randn(8, 30)}
    x = leaves(data)
    field = layer(formulas.basis(x["a"]), {"f": x["f"]})
    blocks: list[Block] = [(1.0, inside, lambda at, d: at("u_xx") + at("u_yy") + d["f"])]
    blocks += [(2.0 if name == "x=0" else 1.0, points, lambda at, d: at("u")) for name, points in sides.items()]
    compare(field, x, FieldProgram(formulas).program(data, blocks), data)
