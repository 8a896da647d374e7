"""A rod that conducts better where it is hot: the equation, measurements, and rivals of the layer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from difflayers.pde import PDE, Box, Initial, Jvp, Sobol

TERMS = 5  # numbers of the law
NOISE = 0.01
START = torch.tensor([-4.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def hot_end(points: Tensor) -> Tensor:
    """Temperature in the beginning: flat at both ends, which are insulated."""
    return 0.1 + 0.85 * torch.cos(torch.pi / 2 * points[..., 1]) ** 4


def true_conductivity(u):
    """Not of the form that is fitted, on purpose. Tensors and arrays."""
    exp = torch.exp if isinstance(u, Tensor) else np.exp
    return 0.015 + 0.05 / (1 + exp((0.5 - u) / 0.1))


def log_law(u, c):
    """``log k(u) = sum_i c_i (2 u - 1)^i``."""
    out = c[-1]
    for i in range(TERMS - 2, -1, -1):
        out = c[i] + (2 * u - 1) * out
    return out


def slope(u, c):
    """Its derivative."""
    return 2 * sum(i * c[i] * (2 * u - 1) ** (i - 1) for i in range(1, TERMS))


class Rod(PDE):
    """``u_t = (k(u) u_x)_x`` with ``k = exp(law)``."""

    coords, terms = ("t", "x"), ("u", "u_t", "u_x", "u_xx")
    domain = Box(t=(0.0, 1.0), x=(0.0, 1.0))
    params = MappingProxyType({f"c{i}": None for i in range(TERMS)})
    conditions = (Initial(hot_end),)

    def residual(self, T, p):
        u, c = T["u"], [p[f"c{i}"] for i in range(TERMS)]
        return T["u_t"] - log_law(u, c).exp() * (T["u_xx"] + slope(u, c) * T["u_x"] ** 2)


def named(c: Tensor) -> dict[str, Tensor]:
    """The numbers of the law as parameters of the equation."""
    return {f"c{i}": c[i] for i in range(TERMS)}


def products(powers: int, waves: int) -> Callable[[Tensor], Tensor]:
    """Basis functions: powers of t times cosines of x, whose slope vanishes at the ends."""

    def basis(point: Tensor) -> Tensor:
        t, x = point.unbind()
        in_time = (2 * t - 1) ** torch.arange(powers, dtype=t.dtype)
        return (in_time[:, None] * torch.cos(torch.pi * torch.arange(waves, dtype=t.dtype) * x)).flatten()

    return basis


basis = products(7, 8)


# ------------------------------------------------------------------------------------------------------- measurements


def finite_volumes(conductivity: Callable, cells: int, times: int = 41) -> np.ndarray:
    """``(times, cells)`` temperatures, in cells of equal width."""
    from scipy.integrate import solve_ivp
    from scipy.sparse import diags

    x = (np.arange(cells) + 0.5) / cells

    def rate(_, u):
        flux = conductivity((u[1:] + u[:-1]) / 2) * (u[1:] - u[:-1]) * cells
        return np.diff(flux, prepend=0, append=0) * cells

    begin = hot_end(torch.tensor(np.stack([0 * x, x], -1))).numpy()
    band = diags([1.0, 1.0, 1.0], [-1, 0, 1], (cells, cells))
    grid = np.linspace(0, 1, times)
    with np.errstate(invalid="ignore", over="ignore"):  # SciPy's first step subtracts memory it has not filled
        found = solve_ivp(rate, (0, 1), begin, "BDF", grid, rtol=1e-7, atol=1e-9, jac_sparsity=band)
    if not found.success or not np.isfinite(found.y).all():
        raise RuntimeError(f"the integrator failed: {found.message}")
    return found.y.T


@dataclass
class Readings:
    """What thermometers have said."""

    points: Tensor
    values: Tensor


def measure(seed: int = 0) -> Readings:
    """Eight thermometers, ten times each."""
    generator = torch.Generator().manual_seed(seed)
    t, x = torch.linspace(0.1, 1, 10, dtype=torch.float64), torch.arange(8, dtype=torch.float64) / 8 + 1 / 16
    exact = torch.tensor(at_thermometers(true_conductivity, 264))
    noise = NOISE * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    return Readings(torch.cartesian_prod(t, x), exact + noise)


def at_thermometers(conductivity: Callable, cells: int) -> np.ndarray:
    """Of a number of cells that is an odd multiple of eight: thermometers are then in the middle of a cell."""
    return finite_volumes(conductivity, cells)[4::4, cells // 16 :: cells // 8].flatten()


def law_error(c) -> float:
    """Root mean square of the logarithm, where it has been measured."""
    u = torch.linspace(0.1, 0.95, 100, dtype=torch.float64)
    with torch.no_grad():
        return (log_law(u, torch.as_tensor(c)) - true_conductivity(u).log()).square().mean().sqrt().item()


def prior(c: Tensor) -> Tensor:
    """A little weight decay, the same for everybody."""
    return 0.01 * c[1:].square().sum()


# --------------------------------------------------------------------------------------------------------------- rivals


@dataclass
class Found:
    """A law."""

    c: Tensor
    evaluations: int
    seconds: float

    @property
    def error(self) -> float:
        return law_error(self.c)


def minimise(loss: Callable[[], Tensor], variables: list[Tensor], most: int) -> tuple[int, float]:
    """L-BFGS; evaluations and seconds."""
    options = {"max_iter": most, "max_eval": most, "history_size": 30, "line_search_fn": "strong_wolfe"}
    optimiser = torch.optim.LBFGS(variables, tolerance_grad=1e-6, tolerance_change=1e-9, **options)
    count, start = 0, time.perf_counter()

    def closure() -> Tensor:
        nonlocal count
        count += 1
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return count, time.perf_counter() - start


def penalised(data: Readings, sampler: Sobol, weight: float, most: int, *, newton: bool = False) -> Found:
    """The equation as a penalty: law and field at once, from the field that fits the readings best.

    With `newton`, by Gauss-Newton steps on all variables instead of L-BFGS.
    """
    pde, like = Rod(), data.values.new_zeros(())
    inside, first = sampler.interior(pde, like).points, sampler.face(pde, 0, False, like).points
    B = Jvp().terms(basis, inside, pde, pde.terms)
    at_first, at_data = (Jvp().terms(basis, p, pde, ("u",)).squeeze(-2) for p in (first, data.points))
    K, begin = B.shape[-1], hot_end(first)
    rows = torch.cat([at_first, at_data, 1e-3 * torch.eye(K, dtype=B.dtype)])
    w = torch.linalg.lstsq(rows, torch.cat([begin, data.values, B.new_zeros(K)])).solution
    z = torch.cat([START, w])

    def parts(z: Tensor) -> Tensor:
        c, w = z[:TERMS], z[TERMS:]
        residual = pde.residual(dict(zip(pde.terms, (B @ w).unbind(-1), strict=True)), named(c))
        equation = torch.cat([residual / len(residual) ** 0.5, 10 * (at_first @ w - begin) / len(begin) ** 0.5])
        misfit = (at_data @ w - data.values) / NOISE / len(data.values) ** 0.5
        return torch.cat([misfit, weight**0.5 * equation, 0.1 * c[1:]])

    if newton:
        from scipy.optimize import least_squares

        jacobian, start = torch.func.jacfwd(parts), time.perf_counter()
        found = least_squares(
            lambda z: parts(torch.tensor(z)).numpy(),
            z.numpy(),
            lambda z: jacobian(torch.tensor(z)).numpy(),
            method="lm",
            max_nfev=most,
        )
        return Found(torch.tensor(found.x[:TERMS]), found.nfev, time.perf_counter() - start)
    z.requires_grad_()
    count, seconds = minimise(lambda: parts(z).square().sum(), [z], most)
    return Found(z.detach()[:TERMS], count, seconds)


def numerical(data: Readings, cells: int) -> Found:
    """A numerical solver, and differences of it in every number of the law: how it has always been done."""
    from scipy.optimize import least_squares

    start, solves = time.perf_counter(), 0

    def parts(c):
        nonlocal solves
        solves += 1
        u = at_thermometers(lambda u: np.exp(log_law(u, c)), cells)
        return np.concatenate([(u - data.values.numpy()) / NOISE / len(u) ** 0.5, 0.1 * c[1:]])

    found = least_squares(parts, START.numpy(), method="lm", xtol=1e-6, diff_step=1e-4)  # above the error of the solver
    return Found(torch.tensor(found.x), solves, time.perf_counter() - start)
