"""From what a caller gives to the arguments of the problem, and from its potentials to a coupling."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import OnFailure
from difflayers.proximal._operands import check_that, shown

from ._sinkhorn_problem import ARGS, NDIMS, plan_of

# relative difference of totals that rounding, or a finite difference, explains
_TOTALS = {torch.float64: 5e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Coupling(NamedTuple):
    """A transport plan with its potentials.

    Attributes:
        plan: ``(*batch, n, m)``.
        f: ``(*batch, n)`` potential of the rows, in the unit of the cost.
        g: ``(*batch, m)`` potential of the columns. Where both marginals are constraints, a constant can be moved from
            one potential to the other; here their means under `a` and `b` are equal.
    """

    plan: Tensor
    f: Tensor
    g: Tensor


class Prepared(NamedTuple):
    """What the problem gets, and the way back to what was asked.

    Attributes:
        args: Of the problem, with the shorter side in the columns, costs from 0 where a constraint allows to shift
            them, and masses of 1 in elements that have none on a side.
        wide: Whether the sides were exchanged.
        shift: ``(*batch)`` what was taken from the cost.
        empty: ``(*batch)`` elements without mass on a side: their plan is zero.
        idle: ``(*batch)`` the value of a plan of zeros, of interest for those alone.
    """

    args: tuple[Tensor, ...]
    wide: bool
    shift: Tensor
    empty: Tensor
    idle: Tensor


def prepare(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: Any,
    rho_a: Any,
    rho_b: Any,
    dtype: torch.dtype | None = None,
) -> Prepared:
    """Checks what needs no data, and brings arguments into the form of the problem.

    `dtype` is that in which the masses were given, if they have been lifted since: totals differ by its rounding.
    """
    n, m = check_tensor("cost", cost, min_ndim=2).shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")
    for name, t, size, what in (("a", a, n, "rows"), ("b", b, m, "columns")):
        if t is not None:
            check_shape(name, check_tensor(name, t, min_ndim=1).shape[-1:], (size,), f" as cost has {what}")
    numbers = [_number(name, t, cost) for name, t in (("eps", eps), ("rho_a", rho_a), ("rho_b", rho_b))]
    given = [(name, t) for name, t in zip(ARGS, (cost, a, b, *numbers), strict=True) if t is not None]
    check_same(given)
    ndims = dict(zip(ARGS, NDIMS, strict=True))
    broadcast_batch((name, tuple(t.shape[: t.ndim - ndims[name]])) for name, t in given)
    close, work = _TOTALS.get(dtype or cost.dtype, 1e-4), compute_dtype(cost.dtype)
    cost, eps, rho_a, rho_b = (t.to(work) for t in (cost, *numbers))
    a = cost.new_full((n,), 1 / n) if a is None else a.to(work)
    b = cost.new_full((m,), 1 / m) if b is None else b.to(work)
    soft_a, soft_b = 1 / rho_a, 1 / rho_b
    if m > n:
        cost, a, b, soft_a, soft_b = cost.mT, b, a, soft_b, soft_a
    lowest = _lowest(cost.detach(), a, b) if cost.numel() else cost.new_zeros(cost.shape[:-2])
    shift = torch.where(((soft_a > 0) & (soft_b > 0)) | ~torch.isfinite(lowest), 0, lowest)
    idle = penalty_of_zero(a, soft_a) + penalty_of_zero(b, soft_b)
    args, empty = balanced((cost - shift[..., None, None], a, b, eps, soft_a, soft_b), close)
    return Prepared(args, m > n, shift, empty, idle)


def _lowest(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The smallest cost, between a row and a column with mass if the masses do not differ where the costs do not."""
    counts = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    if torch.broadcast_shapes(counts.shape, cost.shape) == cost.shape:
        cost = torch.where(counts, cost, torch.inf)
    return cost.amin((-2, -1))


def _number(name: str, value: Any, cost: Tensor) -> Tensor:
    if value is None and name != "eps":
        return cost.new_full((), math.inf)
    if isinstance(value, Tensor):
        return check_tensor(name, value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return cost.new_full((), value)


def of_total_one(name: str, masses: Tensor) -> Tensor:
    """Masses scaled to sum to one; a negative total keeps its sign, and is refused by the plan."""
    total = masses.sum(-1, keepdim=True).abs()
    check_that(total != 0, lambda: f"{name}: expected masses that are not all 0, got {shown(masses)}")
    return masses / total


def penalty_of_zero(mass: Tensor, soft: Tensor) -> Tensor:
    """``rho KL(0 | mass)`` where there is a penalty."""
    return torch.where(soft > 0, mass.sum(-1) / torch.where(soft > 0, soft, 1), 0)


def unequal(a: Tensor, b: Tensor, close: float) -> Tensor:
    """Totals that differ; NaN differs from nothing."""
    return (a - b).abs() > close * torch.maximum(a, b)


def refused(wrong: dict[str, Tensor], totals: tuple[Tensor, Tensor]) -> ValueError | None:
    """The error of the first thing that is wrong with an element, which is one flag an element for each expectation."""
    for expected, bad in wrong.items():
        if bool(bad.any()):
            i = int(bad.to(torch.int8).argmax())
            got = "others"
            if "equal totals" in expected:
                got = " and ".join(f"{t.expand_as(bad).flatten()[i].item():.6g}" for t in totals)
            return ValueError(f"{expected}, got {got} in element {i} of the batch")
    return None


def balanced(args: tuple[Tensor, ...], close: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Masses scaled to the geometric mean of both totals where both are constraints; see :func:`sinkhorn`.

    And the elements without mass, which get some, so that they have potentials. A side without mass that is a
    constraint empties the other one, if that is none.
    """
    cost, a, b, eps, soft_a, soft_b = args
    totals = a.sum(-1), b.sum(-1)
    none_a, none_b = totals[0] == 0, totals[1] == 0
    empty = (none_a & (none_b | (soft_b > 0))) | (none_b & (soft_a > 0))
    hard = (soft_a == 0) & (soft_b == 0)
    usual = hard & ~empty & ~unequal(*totals, close) & torch.isfinite(totals[0] + totals[1])
    ratio = torch.where(usual, totals[0], 1) / torch.where(usual, totals[1], 1)
    half, fill = ratio.sqrt().unsqueeze(-1), empty.unsqueeze(-1)
    a, b = (torch.where(fill, 1 / t.shape[-1], s) for t, s in ((a, a / half), (b, b * half)))
    return (cost, a, b, eps, soft_a, soft_b), empty


def centred(z: Tensor, data: Prepared) -> tuple[Tensor, Tensor]:
    """Both potentials, with equal means where a constant can be moved between them; that makes them differentiable."""
    cost, a, b, _, soft_a, soft_b = data.args
    n, s = cost.shape[-2], data.shift
    f, g = z[..., :n] + _share(soft_a == 0, s), z[..., n:] + _share(soft_a > 0, s)
    free = (soft_a == 0) & (soft_b == 0)
    move = torch.where(free, ((f * a).sum(-1) / a.sum(-1) - (g * b).sum(-1) / b.sum(-1)) / 2, 0).unsqueeze(-1)
    f, g = f - move, g + move
    return (g, f) if data.wide else (f, g)


def _share(mine: Tensor, shift: Tensor) -> Tensor:
    return torch.where(mine, shift, 0).unsqueeze(-1)


def warm_potentials(f: Tensor, g: Tensor, data: Prepared) -> Tensor:
    """Potentials of the problem from those that :func:`centred` gave."""
    f, g = (g, f) if data.wide else (f, g)
    soft_a = data.args[4]
    f, g = f - _share(soft_a == 0, data.shift), g - _share(soft_a > 0, data.shift)
    batch = torch.broadcast_shapes(f.shape[:-1], g.shape[:-1])
    return torch.cat([f.expand(*batch, f.shape[-1]), g.expand(*batch, g.shape[-1])], -1)


def plan_unless_failed(z: Tensor, data: Prepared, on_failure: OnFailure) -> Tensor:
    """The plan of potentials, zero for elements without mass, NaN for those whose potentials are NaN."""
    if on_failure == "raise":  # then there are none
        cost, a, b, eps, *_ = data.args
        plan = plan_of(z, cost, torch.where(data.empty.unsqueeze(-1), 0, a), b, eps)
    else:
        failed, safe, args = harmless(z, data)
        plan = plan_of(safe, *args[:4])
        plan = torch.where((failed | data.empty)[..., None, None], nan_of(z, failed)[..., None, None], plan)
    return plan.mT if data.wide else plan


def harmless(z: Tensor, data: Prepared) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Which elements have NaN for potentials, and the potentials and arguments with harmless numbers for those.

    Outside of the engine 0 * NaN would reach what the elements share. Failed ones hand their cotangent to the
    potentials alone, by :func:`nan_of`: there the engine answers zero to zero and NaN to all else.
    """
    failed = torch.isnan(z).any(-1)
    one, two = failed.unsqueeze(-1), failed[..., None, None]
    cost, a, b, eps, soft_a, soft_b = data.args
    numbers = (torch.where(failed, 1, t) for t in (eps, soft_a, soft_b))
    args = torch.where(two, 0, cost), torch.where(one, 1, a), torch.where(one, 1, b), *numbers
    return failed, torch.where(one, 0, z), args


def nan_of(z: Tensor, failed: Tensor) -> Tensor:
    """NaN for failed elements, 0 for the others."""
    return torch.where(failed, z.sum(-1), 0)
