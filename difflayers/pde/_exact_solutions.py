r"""Closed-form solutions with moving fronts and shocks, and their total mass: what conservation is tried on.

The generalised porous medium equation :math:`u_t = (k(u) u_x)_x` is easy for constant k (heat), hard where k vanishes
with u (porous medium: a front of finite speed) and hardest where k jumps (Stefan: a shock).

All functions are plain torch, broadcast their arguments, and are differentiable wherever the solution is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor
from difflayers.linalg._autodiff import physical

Number = float | Tensor
Field = Callable[[Tensor], Tensor]


def heat_solution(x: Tensor, t: Number, conductivity: Number = 1.0) -> Tensor:
    """The solution ``exp(-c t) sin(x)`` of ``u_t = c u_xx`` with period ``2 pi``; its mass is 0.

    Args:
        x: Places, any shape.
        t: Times, a number or a tensor that broadcasts with `x`.
        conductivity: c, above 0, likewise.

    Returns:
        The field, with the shape of all arguments together.

    Differentiable in every argument, to any order.

    Example:
        >>> import torch
        >>> heat_solution(torch.tensor([0.0, 1.5708]), 1.0)
        tensor([0.0000, 0.3679])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    x, t, c = _operands(x, t=t, conductivity=conductivity)
    return torch.exp(-c * t) * x.sin()


def porous_medium_solution(x: Tensor, t: Number, m: Number) -> Tensor:
    """The front ``u = (m max(t - x, 0))^(1/m)`` of ``u_t = (u^m u_x)_x``, at rest in the beginning.

    The field is 0 at time 0, and ``(m t)^(1/m)`` at ``x = 0``; the front stands at ``x = t``, with infinite slope for
    m above 1.

    Args:
        x: Places at least 0, any shape.
        t: Times at least 0, a number or a tensor that broadcasts with `x`.
        m: Exponent above 0, likewise.

    Returns:
        The field.

    Differentiable in every argument behind the front, and 0 before it.

    Example:
        >>> import torch
        >>> porous_medium_solution(torch.tensor([0.0, 0.5, 1.5]), 1.0, 2.0)
        tensor([1.4142, 1.0000, 0.0000])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    x, t, m = _operands(x, t=t, m=m)
    _above("m", m, 0)
    _at_least("t", t, 0)
    behind = t > x
    depth = torch.where(behind, t - x, 1)  # a power of 0 has no slope: nothing before the front may meet it
    return _passing_nan(torch.where(behind, (m * depth) ** (1 / m), 0), x, t)


def porous_medium_mass(t: Tensor, m: Number) -> Tensor:
    """The integral of :func:`porous_medium_solution` over ``x >= 0``: ``m^(1 + 1/m) / (m + 1) t^(1 + 1/m)``.

    Args:
        t: Times at least 0, any shape.
        m: Exponent above 0.

    Returns:
        The mass. It is right on a domain that still contains the front, ``x = t``.

    Differentiable in every argument.

    Example:
        >>> import torch
        >>> porous_medium_mass(torch.tensor(1.0), 1.0)
        tensor(0.5000)

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    t, m = _operands(t, m=m)
    _above("m", m, 0)
    _at_least("t", t, 0)
    return m ** (1 + 1 / m) / (m + 1) * t ** (1 + 1 / m)


def barenblatt_solution(x: Tensor, t: Number, m: Number, mass_constant: Number = 1.0) -> Tensor:
    r"""The spreading hill of ``u_t = (u^m u_x)_x`` on the line, that a point of mass becomes.

    With ``s = t / (m + 1)``: ``u = s^(-1/(m+2)) max(C - m / (2 (m+1) (m+2)) x^2 s^(-2/(m+2)), 0)^(1/m)``.

    Args:
        x: Places, any shape.
        t: Times above 0, a number or a tensor that broadcasts with `x`.
        m: Exponent above 0, likewise.
        mass_constant: C, above 0, likewise; the mass, which stays the same, grows with it.

    Returns:
        The field.

    Differentiable in every argument inside the hill, and 0 outside.

    Example:
        >>> import torch
        >>> barenblatt_solution(torch.tensor([0.0, 1.0, 9.0]), 2.0, 1.0)
        tensor([1.0000, 0.9167, 0.0000])

    Source: G. I. Barenblatt, 1952; J. L. Vazquez, The Porous Medium Equation, 2006, section 4.4 (there ``u_t =
    (u^M)_xx``, M = m + 1, with time divided by m + 1 here).
    """
    x, t, m, C = _operands(x, t=t, m=m, mass_constant=mass_constant)
    _above("m", m, 0)
    _above("t", t, 0)
    _above("mass_constant", C, 0)
    s = t / (m + 1)
    height = C - m / (2 * (m + 1) * (m + 2)) * x.square() * s ** (-2 / (m + 2))
    inside = height > 0
    return _passing_nan(torch.where(inside, s ** (-1 / (m + 2)) * torch.where(inside, height, 1) ** (1 / m), 0), x)


def stefan_solution(x: Tensor, t: Number, u_star: Number) -> Tensor:
    r"""A Stefan problem: heat conducted only where ``u >= u_star``, into a medium at 0, with a shock at the border.

    ``u_t = (k(u) u_x)_x`` with ``k = 1`` for ``u >= u_star`` and 0 below, ``u = 1`` at ``x = 0`` and ``u = 0`` in the
    beginning. Then ``u = 1 - (1 - u_star) erf(x / (2 sqrt(t))) / erf(z)`` up to ``x = 2 z sqrt(t)``, where it falls
    from ``u_star`` to 0, with z the root of ``u_star erf(z) z exp(z^2) = (1 - u_star) / sqrt(pi)``.

    Args:
        x: Places at least 0, any shape.
        t: Times at least 0, a number or a tensor that broadcasts with `x`.
        u_star: Between 0 and 1, likewise.

    Returns:
        The field.

    Differentiable in every argument off the shock.

    Example:
        >>> import torch
        >>> stefan_solution(torch.tensor([0.0, 0.2, 0.5]), 0.1, 0.6)
        tensor([1.0000, 0.7455, 0.0000])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix; J. R.
    Cannon, The One-Dimensional Heat Equation, 1984, chapter 17.
    """
    x, t, u_star = _operands(x, t=t, u_star=u_star)
    z = _stefan_root(u_star)
    _at_least("t", t, 0)
    later = t > 0
    root = torch.where(later, t, 1).sqrt()
    u = 1 - (1 - u_star) * torch.erf(x / (2 * root)) / torch.erf(z)
    hot = torch.where(later, x <= 2 * z * root, x <= 0)
    return _passing_nan(torch.where(hot & later, u, torch.where(hot, torch.ones_like(u), 0)), x, t)


def stefan_mass(t: Tensor, u_star: Number) -> Tensor:
    """The integral of :func:`stefan_solution` over ``x >= 0``: ``2 (1 - u_star) / erf(z) sqrt(t / pi)``.

    Args:
        t: Times at least 0, any shape.
        u_star: Between 0 and 1.

    Returns:
        The mass. It is right on a domain that still contains the shock, at ``2 z sqrt(t)``.

    Differentiable in every argument, for t above 0.

    Example:
        >>> import torch
        >>> stefan_mass(torch.tensor(0.1), 0.6)
        tensor(0.2630)

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    t, u_star = _operands(t, u_star=u_star)
    _at_least("t", t, 0)
    return 2 * (1 - u_star) / torch.erf(_stefan_root(u_star)) * (t / math.pi).sqrt()


def advection_solution(x: Tensor, t: Number, speed: Number) -> Tensor:
    """A step that moves through the unit interval: ``u_t + a u_x = 0`` with ``u = 1`` up to ``x = 1/2 + a t``, then 0.

    Args:
        x: Places, any shape.
        t: Times, a number or a tensor that broadcasts with `x`.
        speed: a, above 0, likewise.

    Returns:
        The field. Its mass on the unit interval is ``1/2 + min(a t, 1/2)``.

    Not differentiable: constant wherever it does not jump.

    Example:
        >>> import torch
        >>> advection_solution(torch.tensor([0.2, 0.6, 0.8]), 0.1, 2.0)
        tensor([1., 1., 0.])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    x, t, a = _operands(x, t=t, speed=speed)
    _above("speed", a, 0)
    return _passing_nan((x - a * t <= 0.5).to(x.dtype), x, t)


def inviscid_burgers_solution(x: Tensor, t: Number, a: Number) -> Tensor:
    """A ramp that steepens into a shock: ``u_t + (u^2/2)_x = 0`` on ``[-1, 1]``, from ``u = -a x`` on ``[-1, 0]``.

    In the beginning u is a at -1 and before, and 0 from 0 on. The ramp becomes a shock at time ``1/a``, which then
    moves at speed ``a/2``.

    Args:
        x: Places, any shape.
        t: Times at least 0, a number or a tensor that broadcasts with `x`.
        a: Height, above 0, likewise.

    Returns:
        The field. Its mass on ``[-1, 1]`` is ``a/2 (1 + a t)``, until the shock leaves at time ``3/a``.

    Differentiable on either side of kinks and shock.

    Example:
        >>> import torch
        >>> inviscid_burgers_solution(torch.tensor([-0.8, -0.25, 0.5]), 0.25, 2.0)
        tensor([2., 1., 0.])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, appendix.
    """
    x, t, a = _operands(x, t=t, a=a)
    _above("a", a, 0)
    _at_least("t", t, 0)
    steep = a * t >= 1
    head = torch.where(steep, (a * t - 1) / 2, 0)  # where the field becomes 0
    foot = torch.where(steep, head, a * t - 1)  # up to where it is a
    length = torch.where(steep, -1, a * t - 1)
    return _passing_nan(torch.where(x <= foot, a, torch.where(x < head, a * x / length, 0)), x, t)


def viscous_burgers_solution(
    x: Tensor,
    t: Number,
    viscosity: float,
    *,
    initial: Field | None = None,
    potential: Field | None = None,
    speed: float = 1.0,
    nodes: int = 2001,
) -> Tensor:
    r"""The solution of ``u_t + u u_x = nu u_xx`` on the line by the Cole-Hopf formula, with one integral a point.

    ``u(x, t)`` is the mean of ``u_0`` under weights proportional to ``exp(-(U_0(y) + (x - y)^2 / (2 t)) / (2 nu))``,
    with ``U_0`` an antiderivative of ``u_0``.

    Args:
        x: Places, any shape.
        t: Times at least 0, a number or a tensor that broadcasts with `x`.
        viscosity: nu, above 0.
        initial: ``u_0``, elementwise; None: ``-sin(pi x)``, of period 2.
        potential: Its antiderivative, elementwise; given with `initial`, or not at all.
        speed: A bound of ``|u_0|``: how far a point can have come from in a unit of time.
        nodes: Of the quadrature, which converges faster than any power. The narrowest weights are about ``sqrt(nu t)``
            wide, in a window of ``2 speed t``.

    Returns:
        The field.

    Raises:
        ValueError: For arguments outside their range, or an `initial` that exceeds `speed`.

    Differentiable in `x` and `t`, to any order, for t above 0.

    Example:
        >>> import torch
        >>> viscous_burgers_solution(torch.tensor([-0.5, 0.5], dtype=torch.float64), 0.5, 0.05)
        tensor([ 0.5599, -0.5599], dtype=torch.float64)

    Source: E. Hopf, The partial differential equation u_t + u u_x = mu u_xx, 1950; J. D. Cole, 1951. C. Basdevant and
    others, Spectral and finite difference solutions of the Burgers equation, 1986, for the default.
    """
    if (initial is None) != (potential is None):
        raise ValueError("potential: expected to be given with initial, or neither, got one of both")
    if not viscosity > 0:
        raise ValueError(f"viscosity: expected more than 0, got {viscosity}")
    if not isinstance(nodes, int) or nodes < 2:
        raise ValueError(f"nodes: expected an integer of at least 2, got {nodes!r}")
    start: Field = initial or (lambda y: -torch.sin(math.pi * y))
    summed: Field = potential or (lambda y: torch.cos(math.pi * y) / math.pi)
    place, now = torch.broadcast_tensors(*_operands(x, t=t))
    _at_least("t", now, 0)
    later = now > 0
    span = torch.where(later, now, 1).unsqueeze(-1)
    reach = speed * span + 14 * (2 * viscosity * span).sqrt()
    shift = torch.linspace(-1, 1, nodes, dtype=place.dtype, device=place.device) * reach
    y = place.unsqueeze(-1) - shift
    u = start(y)
    if bool((physical(u).abs() > speed * (1 + 1e-3)).any()):
        raise ValueError(f"speed: expected a bound of |initial|, got {speed} where that is {float(u.abs().max()):g}")
    weights = torch.softmax(-(summed(y) + shift.square() / (2 * span)) / (2 * viscosity), -1)
    return torch.where(later, (weights * u).sum(-1), start(place))


def _stefan_root(u_star: Tensor) -> Tensor:
    """The z of the shock, by bisection in float64 down to its rounding, and its derivatives by steps of Newton."""
    plain = u_star.detach()
    if not bool(((physical(plain) > 0) & (physical(plain) < 1)).all()):
        raise ValueError(f"u_star: expected numbers between 0 and 1, got {_shown(plain)}")
    u = plain.to(torch.float64)
    low, high = torch.zeros_like(u), torch.full_like(u, 20.0)
    for _ in range(60):
        z = (low + high) / 2
        over = _stefan_balance(z, u)[0] > 0
        low, high = torch.where(over, low, z), torch.where(over, z, high)
    z, u = (low + high) / 2, u_star.to(torch.float64)
    for _ in range(2):  # each doubles the order up to which derivatives are right
        balance, slope = _stefan_balance(z, u)
        z = z - balance / slope
    return z.to(u_star.dtype)


def _stefan_balance(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of both sides, their difference, and its derivative in z."""
    f = torch.erf(z)
    balance = u.log() + f.log() + z.log() + z.square() - ((1 - u) / math.pi**0.5).log()
    return balance, 2 / math.pi**0.5 * torch.exp(-z.square()) / f + 1 / z + 2 * z


def _passing_nan(u: Tensor, *operands: Tensor) -> Tensor:
    """Comparisons with NaN are false, and would make a number of it."""
    for operand in operands:
        u = torch.where(torch.isnan(operand), operand, u)
    return u


def _operands(first: Tensor, **others: Number) -> list[Tensor]:
    """All arguments as tensors beside the first."""
    name = "t" if "t" not in others else "x"
    check_tensor(name, first)
    tensors = [first]
    for key, value in others.items():
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{key}: expected a number or a tensor, got {type(value).__name__}")
            value = first.new_full((), value)
        tensors.append(check_tensor(key, value))
    check_same(zip((name, *others), tensors, strict=True))
    return tensors


def _above(name: str, value: Tensor, least: float) -> None:
    if not bool((physical(value) > least).all()):
        raise ValueError(f"{name}: expected more than {least:g}, got {_shown(value)}")


def _at_least(name: str, value: Tensor, least: float) -> None:
    """NaN passes: it shows in the result."""
    if bool((physical(value) < least).any()):
        raise ValueError(f"{name}: expected at least {least:g}, got {_shown(value)}")


def _shown(value: Tensor) -> str:
    plain = physical(value)
    return f"{float(plain.min()):g} to {float(plain.max()):g}"
