"""Basis functions by formula, and their derivatives by sympy: what the layers of equations are compared to.

No derivative here comes from automatic differentiation in the coordinates, and no row from the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from tests.pde.oracle_least_squares import F64, Data, Program, deviation, randn

At = Callable[[str], Tensor]  # a term of the field by its name, at the points of a block
Block = tuple[float, Tensor, Callable[[At, Data], Tensor]]  # weight, points, what is zero there: (N,) or (N, Q)

_FUNCTIONS = {"sin": torch.sin, "cos": torch.cos, "exp": torch.exp, "tanh": torch.tanh, "sqrt": torch.sqrt}


class Formulas:
    """K basis functions of named coordinates and parameters, for one field or several.

    Args:
        coords: Names of the coordinates, in the order of a point.
        fields: For each field, K formulas with blanks between them; or those of the field u.
        parameters: Names of the parameters in the formulas.
    """

    def __init__(self, coords: Sequence[str], fields: dict[str, str] | str, parameters: str = "a") -> None:
        self.coords = sympy.symbols(list(coords))
        self.parameters = sympy.symbols([parameters])
        self.single = not isinstance(fields, dict)
        fields = fields if isinstance(fields, dict) else {"u": fields}
        self.fields = {name: [sympy.sympify(one) for one in formulas.split()] for name, formulas in fields.items()}
        self.names = {c.name: c for c in self.coords}
        self.compiled: dict[str, list[Callable[..., Tensor]]] = {}

    def _compile(self, expression: sympy.Expr) -> Callable[..., Tensor]:
        function = sympy.lambdify([*self.coords, *self.parameters], expression, modules=[_FUNCTIONS])
        return lambda *arguments: function(*arguments) + 0 * arguments[0]

    def _columns(self, name: str) -> list[Callable[..., Tensor]]:
        """The K functions of a term such as u_xx, by sympy."""
        if name not in self.compiled:
            field, *by = name.split("_")
            orders = [self.names[coordinate] for coordinate in "".join(by)]
            self.compiled[name] = [self._compile(sympy.diff(one, *orders) if by else one) for one in self.fields[field]]
        return self.compiled[name]

    def basis(self, a: Tensor) -> Callable[[Tensor], Tensor]:
        """The functions as the layer wants them: from one point to (K,), or (Q, K)."""

        def at(point: Tensor) -> Tensor:
            rows = [torch.stack([one(*point.unbind(), a) for one in self._columns(name)]) for name in self.fields]
            return rows[0] if self.single else torch.stack(rows)

        return at

    def term(self, name: str, points: Tensor, a: Tensor) -> Tensor:
        """(N, K) of a term."""
        return torch.stack([one(*points.unbind(-1), a) for one in self._columns(name)], -1)


class FieldProgram:
    """The sum of section 1.1, averaged over the points of each block: weight^2 / 2 mean |rows|^2 + ridge / 2 |w|^2."""

    def __init__(self, formulas: Formulas, ridge: float = 0.0, offset: Formulas | None = None) -> None:
        self.formulas, self.ridge, self.offset = formulas, ridge, offset

    def at(self, points: Tensor, w: Tensor, data: Data) -> At:
        def term(name: str) -> Tensor:
            value = self.formulas.term(name, points, data["a"]) @ w
            return value if self.offset is None else value + self.offset.term(name, points, data["o"])[:, 0]

        return term

    def value(self, w: Tensor, data: Data, blocks: Sequence[Block]) -> Tensor:
        total = self.ridge / 2 * w.square().sum()
        for weight, points, rows in blocks:
            if len(points):
                total = total + weight**2 / 2 * rows(self.at(points, w, data), data).square().sum() / len(points)
        return total

    def program(self, data: Data, blocks: Sequence[Block], exact: Sequence[Block] = ()) -> Program:
        def equality(w: Tensor, data: Data) -> Tensor:
            return torch.cat([rows(self.at(points, w, data), data) for _, points, rows in exact])

        K = len(next(iter(self.formulas.fields.values())))
        return Program(lambda w, data: self.value(w, data, blocks), equality if exact else None, data, K)


def uniform(seed: int, n: int, box: dict[str, tuple[float, float]], **fixed: float) -> Tensor:
    """Points of a box, those of a face with a coordinate fixed."""
    lower, upper = (torch.tensor([ends[i] for ends in box.values()], dtype=F64) for i in (0, 1))
    points = lower + (upper - lower) * (torch.erf(randn(seed, n, len(box))) + 1) / 2
    for name, value in fixed.items():
        points[:, list(box).index(name)] = value
    return points


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def shift(formulas: Formulas, a: Tensor) -> Callable[[Tensor], Tensor]:
    """The single function of `formulas`, without the last dimension: an offset."""
    basis = formulas.basis(a)
    return lambda point: basis(point)[..., 0]


def rms(rows: Tensor) -> float:
    return float(rows.detach().square().mean().sqrt())


def compare(field: Any, x: Data, program: Program, data: Data) -> Tensor:
    """Coefficients and all cotangents, against the program's; returns the oracle's coefficients."""
    w = field.value.detach().reshape(-1)
    assert (field.status == 0).all()
    v = program.polish(w)
    assert deviation(w, v[: len(w)]) < 1e-10
    bar = randn(999, *field.value.shape)
    gradients = torch.autograd.grad(field.value, list(x.values()), bar, retain_graph=True)
    right = program.cotangents(v, bar.reshape(-1))
    for name, mine in zip(x, gradients, strict=True):
        assert deviation(mine, right[name]) < 1e-8, name
    return v[: len(w)]


def leaves(data: Data) -> Data:
    return {name: value.clone().requires_grad_() for name, value in data.items()}
