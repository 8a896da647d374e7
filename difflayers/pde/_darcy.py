"""Flow through a porous medium: the equation with a coefficient that varies, and a reference by finite volumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor
from difflayers.linalg import CG, LinearSolver, SparseMatrix, linear_solve
from difflayers.linalg._autodiff import forward_mode_lock, physical, push_forward

from ._declaration import Box
from ._equations import Params, Terms, _Spatial

UNIT_SQUARE = Box(x=(0.0, 1.0), y=(0.0, 1.0))
Coefficient = float | Tensor | Callable[[Tensor], Tensor]


class Darcy(_Spatial):
    """``-div(a grad u) = f`` with ``u = 0`` on the boundary: pressure in a medium of permeability a.

    The equation needs the gradient of a too. Where a is a function, it is found by forward mode; so a call of the layer
    that has another coefficient passes ``params=darcy.coefficient(a)``, which holds both.

    Args:
        domain: A box with any number of coordinates; the unit square.
        conditions: Others than zero on all sides.
        a: Permeability, above 0: a number, a tensor ``(*batch, 1)``, or a function of points ``(N, d)`` that returns
            ``(*batch, N)``, each point alone; None: the caller of the layer has to pass it.
        f: Source.

    Raises:
        ValueError: For a coefficient given by its values at points, of which there is no gradient.

    Example:
        >>> from difflayers.pde import Box, Darcy
        >>> Darcy(domain=Box(x=(0.0, 1.0)), a=lambda points: 1 + points[:, 0]).terms
        ('u', 'u_x', 'u_xx')

    Source: H. Darcy, 1856.
    """

    coords: tuple[str, ...] = ("x", "y")
    domain = UNIT_SQUARE
    terms: tuple[str, ...] = ("u",)

    def __init__(
        self, *, domain: Box | None = None, conditions: Any = None, a: Coefficient | None = 1.0, f: Any = 1.0
    ) -> None:
        self.coords = (self.domain if domain is None else domain).names
        self.params = MappingProxyType({**self.coefficient(a), "f": f})
        super().__init__(domain=domain, conditions=conditions)
        self.terms = ("u", *(f"u_{c}" for c in self.places), *(f"u_{c}{c}" for c in self.places))

    def coefficient(self, a: Coefficient | None) -> dict[str, Any]:
        """The coefficient and its derivatives, as the `params` of a call.

        Args:
            a: As in the constructor.
        """
        if isinstance(a, Tensor) and a.ndim and a.shape[-1] != 1:
            raise ValueError(
                "a: expected a number, a tensor (*batch, 1) or a function of points, whose gradient can be taken, got "
                f"a tensor of shape {tuple(a.shape)}"
            )
        varies = callable(a) and not isinstance(a, Tensor)
        none = None if a is None else 0.0
        slopes = {f"da/d{c}": _slope(a, i) if varies else none for i, c in enumerate(self.coords)}  # type: ignore[arg-type]
        return {"a(x)": a, **slopes}

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``-a laplace u - grad a . grad u - f``."""
        out = -p["a(x)"] * self.laplacian(T) - p["f"]
        for c in self.places:
            out = out - p[f"da/d{c}"] * T[f"u_{c}"]
        return out


def _slope(a: Callable[[Tensor], Tensor], axis: int) -> Callable[[Tensor], Tensor]:
    """The derivative of a function of points by one coordinate, at all points in one pass: each is alone."""

    def slope(points: Tensor) -> Tensor:
        along = torch.zeros_like(points)
        along[..., axis] = 1
        with forward_mode_lock:
            if forward_ad._current_level >= 0:  # torch does not nest forward mode
                return push_forward(a, (points,), (along,))
            return torch.func.jvp(a, (points,), (along,))[1]

    return slope


def darcy_reference(
    a: Tensor, f: Tensor | float, *, domain: Box = UNIT_SQUARE, solver: LinearSolver | None = None
) -> Tensor:
    r"""The solution of ``-div(a grad u) = f`` with ``u = 0`` on the boundary, by finite volumes.

    Five points in the plane: the flux through a face has the harmonic mean of the two cells, through a face on the
    boundary that of the cell over half a width. Second order in the width, also where a jumps at faces.

    Args:
        a: ``(*batch, n_1, ..., n_d)`` permeability of the cells, above 0, whose centres are ``low + (i + 1/2) h``.
        f: Source: the same shape, or one that broadcasts in the batch, or a number.
        domain: The box, with as many coordinates as a cell has indices; the unit square.
        solver: Of the linear system; None: ``SuperLU()`` on the CPU, ``CG()`` elsewhere.

    Returns:
        ``(*batch, n_1, ..., n_d)`` solution in the cells.

    Raises:
        ValueError: For a permeability that is not above 0, shapes that do not fit, NaN or Inf.
        SolveError: Where an iterative solver fails.

    Differentiable in `a` and `f`, to any order.

    Example:
        >>> import torch
        >>> from difflayers.pde import darcy_reference
        >>> u = darcy_reference(torch.ones(32, 32, dtype=torch.float64), 1.0)
        >>> print(f"{u.max():.4f}")  # of a membrane: 0.0737
        0.0736

    Source: S. V. Patankar, Numerical Heat Transfer and Fluid Flow, 1980, section 4.2.
    """
    d = len(domain.names)
    check_tensor("a", a, min_ndim=d)
    source = f if isinstance(f, Tensor) else a.new_full((), f)
    check_tensor("f", source, min_ndim=d if source.ndim else 0)
    check_same([("a", a), ("f", source)])
    cells = a.shape[a.ndim - d :]
    source = source if source.ndim else source.expand(cells)
    check_shape("f", source.shape[source.ndim - d :], cells, " in its last dimensions, the cells of a")
    broadcast_batch([("a", tuple(a.shape[: a.ndim - d])), ("f", tuple(source.shape[: source.ndim - d]))])
    if 0 in cells:
        raise ValueError(f"a: expected at least one cell in each direction, got {tuple(cells)}")
    if not torch.compiler.is_compiling():
        check_finite([("a", physical(a)), ("f", physical(source))])
        plain = physical(a)
        if not plain.is_meta and bool((plain <= 0).any()):
            raise ValueError(f"a: expected a permeability above 0, got {float(plain.min()):g}")
    if solver is None and a.device.type != "cpu":
        solver = CG()
    A = _five_points(a, [n / (high - low) for n, (low, high) in zip(cells, domain.bounds, strict=True)])
    return linear_solve(A, source.flatten(source.ndim - d), solver=solver).unflatten(-1, cells)


def _five_points(a: Tensor, widths: list[float]) -> SparseMatrix:
    """Fluxes out of every cell; `widths` are the reciprocals."""
    d = len(widths)
    cells = a.shape[a.ndim - d :]
    n = math.prod(cells)
    index = torch.arange(n, device=a.device).reshape(cells)
    rows, cols, values, total = [index.flatten()], [index.flatten()], [], torch.zeros_like(a)
    for k, inverse in enumerate(widths):
        dim, size = k - d, cells[k]
        low, high = a.narrow(dim, 0, size - 1), a.narrow(dim, 1, size - 1)
        face = 2 * inverse**2 * (low / (low + high)) * high
        first, last = (2 * inverse**2 * a.narrow(dim, end, 1) for end in (0, size - 1))
        total = total + torch.cat([first, face], dim) + torch.cat([face, last], dim)
        here, there = index.narrow(dim, 0, size - 1).flatten(), index.narrow(dim, 1, size - 1).flatten()
        rows, cols = [*rows, here, there], [*cols, there, here]
        values += [-face.flatten(face.ndim - d)] * 2
    row, col = torch.cat(rows), torch.cat(cols)
    entries = torch.cat([total.flatten(total.ndim - d), *values], -1)
    order = torch.argsort(row * n + col)
    crow = torch.searchsorted(row[order].contiguous(), torch.arange(n + 1, device=a.device))
    return SparseMatrix(crow, col[order], entries[..., order], (n, n))
