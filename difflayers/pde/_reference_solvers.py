r"""Numerical reference solutions, made on the spot: nothing is downloaded, the same seed gives the same field.

Diffusion-sorption by finite volumes with an implicit integrator of high order, and the vorticity of an incompressible
flow on the unit torus by a pseudo-spectral method. They are accurate, not fast at any price; both say how accurate, and
:func:`cached_reference` keeps them in a file.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_tensor, compute_dtype

Fields = TypeVar("Fields", Tensor, tuple[Tensor, ...])


def diffusion_sorption_reference(
    initial: float | Tensor = 0.1,
    *,
    cells: int = 128,
    times: int | Sequence[float] = 101,
    end: float = 500.0,
    diffusion: float = 5e-4,
    porosity: float = 0.29,
    density: float = 2880.0,
    freundlich: float = 3.5e-4,
    exponent: float = 0.874,
    outflow_sign: float = -1.0,
    rtol: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Diffusion through a soil that holds back what passes: ``u_t = D / R(u) u_xx`` on the unit interval.

    The retardation is ``R = 1 + (1 - p)/p rho k n (u + 1e-6)^(n - 1)``; ``u = 1`` at ``x = 0``, and ``u = s D u_x`` at
    ``x = 1``. Second order in the width of a cell: with the defaults the largest difference to a solution on 1024 cells
    is 2.5e-4 from time 50 on.

    Args:
        initial: Concentration in the beginning, at least 0: a number, or a tensor ``(cells,)``.
        cells: At least 3.
        times: How many, equally spaced from 0 to `end`; or the times themselves, increasing, from 0 on.
        end: Last time, where `times` is a number.
        diffusion: D.
        porosity: p.
        density: rho.
        freundlich: k.
        exponent: n; 1 makes the equation linear.
        outflow_sign: s: -1 lets the flux out, as the published data do; +1 is what some papers print.
        rtol: Relative tolerance in time; the absolute one is a hundredth of it.

    Returns:
        ``(cells,)`` centres, ``(times,)`` and ``(times, cells)`` concentrations, in float64 on the CPU.

    Raises:
        ValueError: For arguments outside their range.
        RuntimeError: Where the integrator fails.

    Not differentiable. Needs scipy.

    Example:
        >>> from difflayers.pde import diffusion_sorption_reference
        >>> x, t, u = diffusion_sorption_reference(0.1, cells=16, times=3)
        >>> u.shape
        torch.Size([3, 16])

    Source: M. Takamoto and others, PDEBench, 2022, appendix, for equation and constants; N. Chalapathi, Y. Du, A. S.
    Krishnapriyan, Scaling physics-informed hard constraints with mixture-of-experts, 2024, for the use.
    """
    import numpy as np
    from scipy.integrate import solve_ivp
    from scipy.sparse import diags

    if not isinstance(cells, int) or cells < 3:
        raise ValueError(f"cells: expected an integer of at least 3, got {cells!r}")
    numbers = {"density": density, "freundlich": freundlich, "exponent": exponent}
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: expected at least 0, got {number}")
    if not math.isfinite(outflow_sign):
        raise ValueError(f"outflow_sign: expected a number, got {outflow_sign}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol: expected a number between 0 and 1, got {rtol}")
    h, ratio = 1 / cells, outflow_sign * diffusion * cells
    if not diffusion > 0 or abs(ratio - 0.5) < 1e-9:
        raise ValueError(f"diffusion: expected more than 0, and not the width of a cell over 2, got {diffusion}")
    if not 0 < porosity < 1:
        raise ValueError(f"porosity: expected a number between 0 and 1, got {porosity}")
    given = torch.as_tensor(initial, dtype=torch.float64, device="cpu").detach()
    if given.shape not in ((), (cells,)):
        raise ValueError(f"initial: expected a number or shape ({cells},), got shape {tuple(given.shape)}")
    start = given.expand(cells).numpy()
    if not ((start >= 0) & np.isfinite(start)).all():
        raise ValueError(f"initial: expected at least 0, got {start.min():g} to {start.max():g}")
    if not 0 < end < math.inf:
        raise ValueError(f"end: expected more than 0, got {end}")
    t = np.linspace(0.0, end, times) if isinstance(times, int) else np.asarray(times, dtype=float)
    if t.ndim != 1 or len(t) < 1 or t[0] != 0 or not (np.diff(t) > 0).all() or not np.isfinite(t).all():
        raise ValueError(f"times: expected increasing times from 0 on, got {times!r}")
    x = (np.arange(cells) + 0.5) * h
    factor, mirror = (1 - porosity) / porosity * density * freundlich * exponent, -(ratio + 0.5) / (0.5 - ratio)

    def change(_: float, u: Any) -> Any:
        wide = np.concatenate([[2 - u[0]], u, [mirror * u[-1]]])  # beyond the ends, so that the boundary rows hold
        retardation = 1 + factor * (np.maximum(u, 0) + 1e-6) ** (exponent - 1)
        return diffusion / retardation * (wide[2:] - 2 * u + wide[:-2]) / h**2

    if len(t) == 1:
        u = start[None]
    else:
        # SciPy's first step subtracts memory it has not filled, and does not use the result; NumPy may warn of it.
        with np.errstate(invalid="ignore", over="ignore"):
            found = solve_ivp(
                change,
                (0.0, t[-1]),
                start,
                method="BDF",
                t_eval=t,
                rtol=rtol,
                atol=rtol / 100,
                jac_sparsity=diags([1.0, 1.0, 1.0], [-1, 0, 1], shape=(cells, cells)),
            )
        if not found.success or not np.isfinite(found.y).all():
            raise RuntimeError(f"diffusion_sorption_reference: the integrator failed: {found.message}")
        u = found.y.T
    return torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(np.ascontiguousarray(u))


def gaussian_random_field(
    size: int, *, seed: int, length: float = 0.2, modes: int = 12, count: int | None = None
) -> Tensor:
    r"""Smooth random fields on the unit torus, with mean 0 over the torus and standard deviation 1 at every point.

    Fourier modes up to `modes` in each direction have independent normal coefficients with variances proportional to
    ``exp(-(2 pi length |k|)^2 / 2)``: correlations fall off like ``exp(-r^2 / (2 length^2))``, but for the mean.

    Args:
        size: Points in each direction. The field does not depend on it: a finer grid shows the same field.
        seed: Of the random numbers.
        length: Correlation length, above 0, in units of the torus.
        modes: Highest wave number; make it no less than ``1 / length``.
        count: None: one field. A number: so many in a batch dimension, of which the first are those of a lower count.

    Returns:
        ``(size, size)`` or ``(count, size, size)`` in float64 on the CPU.

    Raises:
        ValueError: For a length that is not above 0, or numbers below 1.

    Not differentiable.

    Example:
        >>> from difflayers.pde import gaussian_random_field
        >>> gaussian_random_field(32, seed=0).shape
        torch.Size([32, 32])
    """
    for name, number in (("size", size), ("modes", modes), ("count", 1 if count is None else count)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {number!r}")
    if not 0 < length < math.inf:
        raise ValueError(f"length: expected more than 0, got {length}")
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    first, second = torch.arange(modes + 1, **like), torch.arange(-modes, modes + 1, **like)
    square = first[:, None].square() + second.square()
    amplitude = torch.exp(-((2 * math.pi * length) ** 2) * (square - 1) / 4)  # the lowest mode has 1, at any length
    half = (first[:, None] > 0) | (second > 0)  # one of each pair of opposite modes, none for the mean
    amplitude = torch.where(half, amplitude, 0)
    amplitude = amplitude / torch.linalg.vector_norm(amplitude)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    one = (*amplitude.shape, 2)
    drawn = torch.stack([torch.randn(one, generator=generator, **like) for _ in range(count or 1)])
    coefficients = torch.view_as_complex(drawn) * amplitude
    place = 2j * math.pi * torch.arange(size, **like) / size
    field = (torch.exp(place[:, None] * first) @ coefficients @ torch.exp(place[:, None] * second).mT).real
    return field[0] if count is None else field


def navier_stokes_reference(
    vorticity: Tensor,
    times: Sequence[float],
    viscosity: float,
    *,
    forcing: Tensor | None = None,
    courant: float = 0.5,
) -> Tensor:
    r"""The vorticity of an incompressible flow on the unit torus: ``w_t + u . grad w = nu lap w + f``.

    Pseudo-spectral with the 2/3 rule, which keeps the quadratic term free of aliases; Runge-Kutta of fourth order in
    time on ``exp(nu |k|^2 t) w``, so that diffusion is exact and puts no bound on the step.

    Args:
        vorticity: ``(*batch, n, n)`` on the points ``(i/n, j/n)``, x first; its mean has to vanish, and is dropped.
            Modes above n/3 are dropped too.
        times: Increasing, from 0 on.
        viscosity: nu, at least 0.
        forcing: ``(*batch, n, n)``, constant in time. None: no forcing.
        courant: Longest step, in units of the time that the fastest point takes through one cell.

    Returns:
        ``(*batch, times, n, n)`` in the dtype and on the device of `vorticity`.

    Raises:
        ValueError: For fields that are not square, times that do not increase, a negative viscosity, NaN or Inf.
        RuntimeError: Where the steps are too long for the flow; lower `courant`.

    Not differentiable. Batch elements share their steps.

    Example:
        >>> import torch
        >>> from difflayers.pde import gaussian_random_field, navier_stokes_reference
        >>> start = gaussian_random_field(16, seed=0, modes=4)
        >>> navier_stokes_reference(start, [0.0, 0.1], 1e-2).shape
        torch.Size([2, 16, 16])

    Source: Z. Li and others, Fourier Neural Operator for Parametric Partial Differential Equations, 2021, appendix, for
    the task; S. A. Orszag, 1971, for the 2/3 rule.
    """
    check_tensor("vorticity", vorticity, min_ndim=2)
    n = vorticity.shape[-1]
    if vorticity.shape[-2] != n or n < 4:
        raise ValueError(f"vorticity: expected a square of at least 4 by 4 points, got {tuple(vorticity.shape[-2:])}")
    stops = [float(s) for s in times]
    fine = all(map(math.isfinite, stops)) and all(a < b for a, b in pairwise(stops))
    if not stops or not fine or stops[0] < 0:
        raise ValueError(f"times: expected increasing times from 0 on, got {times!r}")
    if not 0 <= viscosity < math.inf:
        raise ValueError(f"viscosity: expected at least 0, got {viscosity}")
    if not 0 < courant < math.inf:
        raise ValueError(f"courant: expected more than 0, got {courant}")
    if forcing is not None and check_tensor("forcing", forcing, min_ndim=2).shape[-2:] != vorticity.shape[-2:]:
        raise ValueError(f"forcing: expected shape ({n}, {n}) as of vorticity, got {tuple(forcing.shape[-2:])}")
    fields = [("vorticity", vorticity), *([] if forcing is None else [("forcing", forcing)])]
    check_same(fields)
    check_finite(fields)
    batch = broadcast_batch([(name, tuple(field.shape[:-2])) for name, field in fields])
    if not math.prod(batch):  # transforms of nothing are refused
        return vorticity.new_zeros((*batch, len(stops), n, n))
    dtype = vorticity.dtype
    vorticity = vorticity.to(compute_dtype(dtype))
    with torch.no_grad():
        flow = _Flow(n, viscosity, vorticity, forcing)
        w, now, seen = flow.coefficients(vorticity), 0.0, []
        w = w.expand((*batch, *w.shape[-2:]))
        for stop in stops:
            while stop - now > 1e-12 * max(stop, 1.0):
                fastest = float(flow.speed(w))
                left = stop - now
                longest = courant / n / fastest if fastest > 0 else left
                if forcing is not None:  # a flow at rest is about to move
                    longest = min(longest, 0.1 * courant)
                steps = max(1, math.ceil(left / longest))
                w = flow.step(w, left / steps)
                now += left / steps
            now = stop
            seen.append(flow.field(w))
            if not bool(torch.isfinite(seen[-1]).all()):
                raise RuntimeError(f"navier_stokes_reference: the flow diverged before time {stop}; lower `courant`")
        return torch.stack(seen, -3).to(dtype)


class _Flow:
    """Wave numbers and the right-hand side in Fourier space."""

    def __init__(self, n: int, viscosity: float, like: Tensor, forcing: Tensor | None) -> None:
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        whole, half = torch.fft.fftfreq(n, 1 / n, **options), torch.fft.rfftfreq(n, 1 / n, **options)
        self.n, kx, ky = n, 2 * math.pi * whole[:, None], 2 * math.pi * half
        square = kx.square() + ky.square()
        self.kept = (3 * whole.abs() < n)[:, None] & (3 * half.abs() < n) & (square > 0)
        self.kx, self.ky, self.decay = kx, ky, viscosity * square
        self.inverse = torch.where(square > 0, 1 / torch.where(square > 0, square, 1), 0)
        self.force = torch.zeros_like(square) if forcing is None else self.coefficients(forcing.to(like))

    def coefficients(self, field: Tensor) -> Tensor:
        return torch.where(self.kept, torch.fft.rfft2(field), 0)

    def field(self, w: Tensor) -> Tensor:
        return torch.fft.irfft2(w, s=(self.n, self.n))

    def velocity(self, w: Tensor) -> tuple[Tensor, Tensor]:
        stream = w * self.inverse
        return self.field(1j * self.ky * stream), self.field(-1j * self.kx * stream)

    def speed(self, w: Tensor) -> Tensor:
        u, v = self.velocity(w)
        return torch.maximum(u.abs().amax(), v.abs().amax()) if u.numel() else u.new_zeros(())

    def change(self, w: Tensor) -> Tensor:
        """Advection and forcing; diffusion is taken along exactly."""
        u, v = self.velocity(w)
        moved = u * self.field(1j * self.kx * w) + v * self.field(1j * self.ky * w)
        return self.force - self.coefficients(moved)

    def step(self, w: Tensor, dt: float) -> Tensor:
        half = torch.exp(-self.decay * (dt / 2))
        first = self.change(w)
        second = self.change(half * (w + dt / 2 * first))
        third = self.change(half * w + dt / 2 * second)
        fourth = self.change(half * (half * w + dt * third))
        return half * (half * (w + dt / 6 * first) + dt / 3 * (second + third)) + dt / 6 * fourth


def cached_reference(path: str | os.PathLike[str], make: Callable[..., Fields], *args: Any, **options: Any) -> Fields:
    """What ``make(*args, **options)`` returns, kept in a file for the next call with the same arguments.

    Args:
        path: The file; its folder is made where there is none. A file of other arguments is replaced.
        make: A function of this module, or another of some module's top level (that name is what is compared) that
            returns a tensor or a tuple of tensors.
        args: Its arguments: tensors, numbers, strings, None, and lists or tuples of those.
        options: Likewise.

    Returns:
        The tensor or tuple, without gradient.

    Raises:
        ValueError: Where `path` holds something else than a reference, or for arguments that could not be compared.

    Example:
        >>> import tempfile, pathlib
        >>> from difflayers.pde import cached_reference, gaussian_random_field
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "field.pt"
        >>> field = cached_reference(file, gaussian_random_field, 16, seed=0)
        >>> bool((cached_reference(file, gaussian_random_field, 16, seed=0) == field).all())
        True
    """
    path = Path(path)
    name = f"{getattr(make, '__module__', None)}.{getattr(make, '__qualname__', '<unnamed>')}"
    if "<" in name:  # a lambda, or a function within a function: another may have the same name
        raise ValueError(f"make: expected a function of a module's top level, got {name}")
    call = [name, _plain("args", args), {key: _plain(key, options[key]) for key in sorted(options)}]
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True)
            made, value = kept["call"], kept["value"]
        except Exception as error:
            raise ValueError(f"path: expected a file of cached_reference, or none, got {path} ({error})") from None
        if _equal(made, call):
            return value
    value = make(*args, **options)
    if not all(isinstance(t, Tensor) for t in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"make: expected a function that returns a tensor or a tuple of tensors, got {type(value)}")
    # clones: of a view the whole storage would be written
    value = tuple(t.detach().clone() for t in value) if isinstance(value, tuple) else value.detach().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all: another process may be reading
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        torch.save({"call": call, "value": value}, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return value


def _plain(name: str, argument: Any) -> Any:
    """What can be written, read again and compared."""
    if isinstance(argument, list | tuple):
        return [_plain(name, a) for a in argument]
    for kind in (bool, int, float, str):  # NumPy's float64 is a float, and would be written as something else
        if isinstance(argument, kind):
            return kind(argument)
    if argument is None or isinstance(argument, torch.dtype):
        return argument
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    raise ValueError(f"{name}: expected tensors, numbers, strings and lists of those, got {type(argument).__name__}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(type(a) is type(b) and (a == b or (a != a and b != b)))
