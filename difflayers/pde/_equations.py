"""Equations that are shipped, and the power that their fractional exponents need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ._conditions import Dirichlet, Initial, Periodic, Robin
from ._declaration import PDE, Box

Terms = Mapping[str, Tensor]
Params = Mapping[str, Any]


def safe_power(u: Tensor, exponent: float | Tensor, shift: float = 0.0) -> Tensor:
    """``(max(u, 0) + shift)^exponent``, for fields that may become negative on the way.

    Where u is not above 0 the power is frozen at its value there, ``shift^exponent`` (0 without a shift), and all its
    derivatives by u are 0.

    Args:
        u: Any shape.
        exponent: A number or a tensor that broadcasts with `u`; above 0 if there is no shift.
        shift: At least 0.

    Returns:
        The power, in the shape of both.

    Raises:
        ValueError: For a negative shift, or a negative exponent without a shift.

    Differentiable in `u` and `exponent`, to any order, without NaN.

    Example:
        >>> import torch
        >>> from difflayers.pde import safe_power
        >>> safe_power(torch.tensor([-1.0, 0.0, 4.0]), 0.5)
        tensor([0., 0., 2.])
    """
    if not shift >= 0:
        raise ValueError(f"shift: expected at least 0, got {shift}")
    if shift == 0 and not isinstance(exponent, Tensor) and exponent < 0:
        raise ValueError(f"exponent: expected at least 0 without a shift, got {exponent}")
    positive = u > 0
    if shift > 0:
        return (torch.where(positive, u, 0) + shift) ** exponent
    return torch.where(positive, torch.where(positive, u, 1) ** exponent, 0)


class _Spatial(PDE):
    """An equation with a Laplacian: any number of places, with or without time, by the names in the box."""

    def __init__(self, *, domain: Box | None = None, conditions: Any = None, **params: Any) -> None:
        box = self.domain if domain is None else domain
        timed = "t" in self.coords
        if timed and "t" not in box.names:
            raise ValueError(f"domain: expected a coordinate t, got {box}")
        self.coords = box.names
        self.places = tuple(c for c in box.names if not (timed and c == "t"))
        if not self.places:
            raise ValueError(f"domain: expected a coordinate of place, got {box}")
        self.terms = (*(("u", "u_t") if timed else ("u",)), *(f"u_{c}{c}" for c in self.places))
        given = self.default_conditions() if conditions is None else conditions
        super().__init__(domain=domain, conditions=given, **params)

    def default_conditions(self) -> Any:
        """Zero on all sides."""
        return tuple(Dirichlet(c) for c in self.places)

    def laplacian(self, T: Terms) -> Tensor:
        """Sum of the second derivatives."""
        out = T[f"u_{self.places[0]}{self.places[0]}"]
        for c in self.places[1:]:
            out = out + T[f"u_{c}{c}"]
        return out


class Poisson(_Spatial):
    """``laplace u + f = 0`` with ``u = 0`` on the boundary.

    Args:
        domain: A box with any number of coordinates; the unit square.
        conditions: Others than zero on all sides.
        f: Source.

    Example:
        >>> from difflayers.pde import Box, Poisson
        >>> Poisson(domain=Box(x=(0.0, 1.0))).terms
        ('u', 'u_xx')

    Source: S. D. Poisson, 1813.
    """

    coords = ("x", "y")
    domain = Box(x=(0.0, 1.0), y=(0.0, 1.0))
    terms = ("u",)
    params = MappingProxyType({"f": 1.0})

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``laplace u + f``."""
        return self.laplacian(T) + p["f"]


class Helmholtz(_Spatial):
    """``laplace u + k^2 u = f`` with ``u = 0`` on the boundary.

    Args:
        domain: A box with any number of coordinates; the unit square.
        conditions: Others than zero on all sides.
        k: Wave number. Where ``k^2`` is an eigenvalue of the box there is no unique solution.
        f: Source.

    Example:
        >>> from difflayers.pde import Helmholtz
        >>> Helmholtz(k=5.0)
        Helmholtz(Box(x=(0.0, 1.0), y=(0.0, 1.0)), k=5.0, f=1.0)

    Source: H. von Helmholtz, 1860.
    """

    coords = ("x", "y")
    domain = Box(x=(0.0, 1.0), y=(0.0, 1.0))
    terms = ("u",)
    params = MappingProxyType({"k": 1.0, "f": 1.0})

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``laplace u + k^2 u - f``."""
        return self.laplacian(T) + p["k"] ** 2 * T["u"] - p["f"]


class Heat(_Spatial):
    """``u_t = c laplace u + f``, periodic, from ``u0``.

    Args:
        domain: A box with t and any number of places; one period of the sine.
        conditions: Others than ``Initial("u0")`` and periodicity in every place.
        c: Conductivity.
        f: Source.

    Example:
        >>> from difflayers.pde import Heat
        >>> Heat().terms
        ('u', 'u_t', 'u_xx')

    Source: J. Fourier, 1822.
    """

    coords = ("t", "x")
    domain = Box(t=(0.0, 1.0), x=(0.0, 2 * math.pi))
    terms = ("u",)
    params = MappingProxyType({"c": 1.0, "f": 0.0})

    def default_conditions(self) -> Any:
        """Initial values and periodicity."""
        return (Initial("u0"), *(Periodic(c) for c in self.places))

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``u_t - c laplace u - f``."""
        return T["u_t"] - p["c"] * self.laplacian(T) - p["f"]


class Advection(PDE):
    """``u_t + a u_x = 0`` from ``u0``, with ``inflow`` at the lower end: for a above 0.

    Args:
        domain: Box of t and x.
        conditions: Others than ``Initial("u0")`` and ``Dirichlet("x=low", "inflow")``.
        a: Speed.

    Example:
        >>> from difflayers.pde import Advection
        >>> Advection(a=3.0).params
        {'a': 3.0}

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """

    coords = ("t", "x")
    domain = Box(t=(0.0, 1.0), x=(0.0, 1.0))
    terms = ("u_t", "u_x")
    params = MappingProxyType({"a": 1.0})
    conditions = (Initial("u0"), Dirichlet("x=low", "inflow"))

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``u_t + a u_x``."""
        return T["u_t"] + p["a"] * T["u_x"]


class Burgers(PDE):
    """``u_t + u u_x = nu u_xx`` from ``u0``, zero at both ends.

    Args:
        domain: Box of t and x.
        conditions: Others than ``Initial("u0")`` and ``Dirichlet("x")``.
        nu: Viscosity, at least 0.

    Example:
        >>> from difflayers.pde import Burgers
        >>> Burgers(nu=0.1)
        Burgers(Box(t=(0.0, 1.0), x=(-1.0, 1.0)), nu=0.1)

    Source: J. M. Burgers, A mathematical model illustrating the theory of turbulence, 1948.
    """

    coords = ("t", "x")
    domain = Box(t=(0.0, 1.0), x=(-1.0, 1.0))
    terms = ("u", "u_t", "u_x", "u_xx")
    params = MappingProxyType({"nu": 0.05})
    conditions = (Initial("u0"), Dirichlet("x"))

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``u_t + u u_x - nu u_xx``."""
        return T["u_t"] + T["u"] * T["u_x"] - p["nu"] * T["u_xx"]


def _outflow(p: Params) -> Any:
    return -p["sign"] * p["D"]


class DiffusionSorption(PDE):
    r"""Diffusion of a pollutant that sticks to the ground: ``R(u) u_t = D u_xx``.

    The retardation is ``R(u) = 1 + (1 - porosity) / porosity rho kf nf (u + 1e-6)^(nf - 1)``, frozen where u is
    negative. ``u = 1`` at the lower end, ``u - sign D u_x = 0`` at the upper one, ``u0`` in the beginning.

    Args:
        domain: Box of t and x; 500 time units on the unit interval.
        conditions: Others than these.
        D: Diffusion.
        porosity: Between 0 and 1.
        rho: Density.
        kf: Freundlich's parameter.
        nf: Freundlich's exponent.
        sign: -1 as the benchmark's data has it, or 1 as the paper on experts has.

    Example:
        >>> from difflayers.pde import DiffusionSorption
        >>> DiffusionSorption().terms
        ('u', 'u_t', 'u_xx')

    Source: M. Takamoto and others, PDEBench: An extensive benchmark for scientific machine learning, 2022.

    Departure: the residual is ``u_t - D / R(u) u_xx``, in the units of the time derivative.
    """

    coords = ("t", "x")
    domain = Box(t=(0.0, 500.0), x=(0.0, 1.0))
    terms = ("u", "u_t", "u_xx")
    params = MappingProxyType({"D": 5e-4, "porosity": 0.29, "rho": 2880.0, "kf": 3.5e-4, "nf": 0.874, "sign": -1.0})
    conditions = (Initial("u0"), Dirichlet("x=low", 1.0), Robin("x=high", 1.0, _outflow))

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``u_t - D / R(u) u_xx``."""
        factor = (1 - p["porosity"]) / p["porosity"] * p["rho"] * p["kf"] * p["nf"]
        retardation = 1 + factor * safe_power(T["u"], p["nf"] - 1, 1e-6)
        return T["u_t"] - p["D"] / retardation * T["u_xx"]


class GeneralizedPorousMedium(PDE):
    """``u_t = (k(u) u_x)_x`` from ``u0``, with ``left`` and ``right`` at the ends.

    Args:
        kind: ``"heat"``: k = c. ``"porous"``: k = u^m, frozen at 0 where u is negative. ``"stefan"``: k rises from 0 to
            1 around `u_star` over a `width`, a logistic function: a jump would have no derivative to learn from.
        domain: Box of t and x.
        conditions: Others than ``Initial("u0")``, ``Dirichlet("x=low", "left")`` and ``Dirichlet("x=high", "right")``.
        **params: ``c``, ``m``, or ``u_star`` and ``width``.

    Raises:
        ValueError: For a kind that does not exist.

    Example:
        >>> from difflayers.pde import GeneralizedPorousMedium
        >>> GeneralizedPorousMedium("porous", m=3.0)
        GeneralizedPorousMedium(Box(t=(0.0, 1.0), x=(0.0, 1.0)), m=3.0)

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023.
    """

    coords = ("t", "x")
    domain = Box(t=(0.0, 1.0), x=(0.0, 1.0))
    terms: tuple[str, ...] = ("u", "u_t", "u_x", "u_xx")
    conditions = (Initial("u0"), Dirichlet("x=low", "left"), Dirichlet("x=high", "right"))

    def __init__(
        self,
        kind: Literal["heat", "porous", "stefan"] = "porous",
        *,
        domain: Box | None = None,
        conditions: Any = None,
        **params: Any,
    ) -> None:
        kinds = {"heat": {"c": 1.0}, "porous": {"m": 1.0}, "stefan": {"u_star": 0.6, "width": 0.02}}
        if kind not in kinds:
            raise ValueError(f'kind: expected "heat", "porous" or "stefan", got {kind!r}')
        self.kind, self.params = kind, kinds[kind]
        if kind == "heat":
            self.terms = ("u", "u_t", "u_xx")
        super().__init__(domain=domain, conditions=conditions, **params)

    def residual(self, T: Terms, p: Params) -> Tensor:
        """``u_t - k u_xx - k' u_x^2``."""
        u = T["u"]
        if self.kind == "heat":
            return T["u_t"] - p["c"] * T["u_xx"]
        if self.kind == "porous":
            m = p["m"]
            k, slope = safe_power(u, m), m * torch.where(u > 0, torch.where(u > 0, u, 1) ** (m - 1), 0)
        else:
            k = torch.sigmoid((u - p["u_star"]) / p["width"])
            slope = k * (1 - k) / p["width"]
        return T["u_t"] - k * T["u_xx"] - slope * T["u_x"] ** 2


class NavierStokes2D(PDE):
    r"""Vorticity of a plane incompressible flow: ``w_t + u w_x + v w_y = nu laplace w + f``, periodic, from ``w0``.

    Args:
        velocity: ``"streamfunction"``: a second field psi with ``laplace psi = -w``, ``u = psi_y``, ``v = -psi_x``; a
            basis function then has two entries, and the residual two components. Psi is determined up to a constant: a
            ridge, or a basis without constants, fixes it. ``"given"``: u and v are parameters, as in an iteration that
            freezes the flow; the equation is linear then.
        domain: Box of t, x and y.
        conditions: Others than these.
        **params: ``nu``, ``f``, and where the velocity is given ``u`` and ``v``.

    Raises:
        ValueError: For a velocity of another name.

    Example:
        >>> from difflayers.pde import NavierStokes2D
        >>> NavierStokes2D(nu=1e-3).fields
        ('w', 'psi')

    Source: N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024, section 4.2.
    """

    coords = ("t", "x", "y")
    domain = Box(t=(0.0, 1.0), x=(0.0, 1.0), y=(0.0, 1.0))

    def __init__(
        self,
        velocity: Literal["streamfunction", "given"] = "streamfunction",
        *,
        domain: Box | None = None,
        conditions: Any = None,
        **params: Any,
    ) -> None:
        if velocity not in ("streamfunction", "given"):
            raise ValueError(f'velocity: expected "streamfunction" or "given", got {velocity!r}')
        self.velocity = velocity
        own = ("w_t", "w_x", "w_y", "w_xx", "w_yy")
        self.params = {"nu": 1e-3, "f": 0.0}
        if velocity == "given":
            self.fields, self.terms = ("w",), own
            self.params = {**self.params, "u": None, "v": None}
        else:
            self.fields, self.terms = ("w", "psi"), ("w", *own, "psi_x", "psi_y", "psi_xx", "psi_yy")
        if conditions is None:
            sides = tuple(Periodic(c, field=f) for f in self.fields for c in ("x", "y"))
            conditions = (Initial("w0", field="w"), *sides)
        super().__init__(domain=domain, conditions=conditions, **params)

    def residual(self, T: Terms, p: Params) -> Tensor:
        """The equation of the vorticity, and with a stream function Poisson's too."""
        given = self.velocity == "given"
        u, v = (p["u"], p["v"]) if given else (T["psi_y"], -T["psi_x"])
        flow = T["w_t"] + u * T["w_x"] + v * T["w_y"] - p["nu"] * (T["w_xx"] + T["w_yy"]) - p["f"]
        return flow if given else torch.stack([flow, T["w"] + T["psi_xx"] + T["psi_yy"]], -1)
