r"""What :func:`argmin` can be constrained by, and how it becomes flat functions of one vector per element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers._solution import Solution
from difflayers.linalg._autodiff import transforms_active
from difflayers.linalg._captured import refuse_held, refuse_probed

from ._arguments import Arguments, Unknown, check_output_dtype, check_output_tensor


@dataclass(frozen=True)
class Projection:
    """Keeps the unknown of :func:`argmin` in a convex set, given by the Euclidean projection onto it.

    The derivative is that of the fixed point ``z = P(z - step * grad)``: nothing flows along directions that the set
    blocks. On the boundary without pressure it is what autograd gives for `fn` there.

    Args:
        fn: ``fn(z, *args)``, the point of the set that is nearest to `z`, in the structure of `z`; differentiable.
    """

    fn: Callable[..., Any]


@dataclass(frozen=True)
class Prox:
    """Adds a convex term g to the objective of :func:`argmin`, smooth or not, given by its proximal operator.

    Args:
        fn: ``fn(z, step, *args) = argmin_u step * g(u) + ||u - z||^2 / 2``, in the structure of `z`; differentiable.
            `step` has the shape of the batch, as the functions of :mod:`difflayers.proximal` take it.
    """

    fn: Callable[..., Any]


@dataclass(frozen=True)
class Equality:
    """Demands ``fn(z, *args) = 0`` of the unknown of :func:`argmin`.

    Args:
        fn: ``(*batch)`` for one equation, or ``(*batch, m)``, twice differentiable; each batch element alone.
    """

    fn: Callable[..., Any]


@dataclass(frozen=True)
class Inequality:
    """Demands ``fn(z, *args) <= 0`` of the unknown of :func:`argmin`.

    In the derivative an inequality with a positive multiplier is an equality, and one without is absent; so is one that
    holds with equality and needs no multiplier.

    Args:
        fn: ``(*batch)`` for one inequality, or ``(*batch, m)``, twice differentiable; each batch element alone. Minus
            infinity (of a bound at infinity) is no inequality.
    """

    fn: Callable[..., Any]


Constraint = Projection | Prox | Equality | Inequality


@dataclass(frozen=True)
class ConstrainedSolution(Solution[Any]):
    """The result of :func:`argmin_ex` with equalities or inequalities.

    Attributes:
        multipliers: One tensor for each constraint, in the shape of its output: a tuple where `constraint` was one.
            Those of inequalities are at least 0, and exactly 0 where they are not active. Differentiable.
    """

    multipliers: Any = None


def split_constraint(constraint: Any) -> tuple[Constraint, ...]:
    """The constraints as a tuple, or a ``ValueError`` for what is none."""
    given = constraint if isinstance(constraint, tuple | list) else (constraint,)
    kinds = "Projection, Prox, Equality or Inequality"
    for one in given:
        if not isinstance(one, Constraint):
            raise ValueError(f"constraint: expected {kinds} (or a tuple of the last two), got {type(one).__name__}")
        if not callable(one.fn):
            raise ValueError(f"constraint: expected a callable in {type(one).__name__}, got {type(one.fn).__name__}")
    if not given:
        raise ValueError("constraint: expected at least one constraint or None, got an empty tuple")
    if len(given) > 1 and any(isinstance(one, Projection | Prox) for one in given):
        raise ValueError(
            "constraint: expected one Projection or Prox alone, or a tuple of Equality and Inequality, got "
            + ", ".join(type(one).__name__ for one in given)
        )
    return tuple(given)


def flat_map(one: Projection | Prox, unknown: Unknown, arguments: Arguments) -> Callable[..., Tensor]:
    """``(v, step, *tensors) -> like v`` on one vector per element; `step` has the shape of the batch."""

    def flat(v: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        args = arguments.rebuild(tensors)
        if isinstance(one, Prox):
            args = (step, *args)
        return unknown.check_output(one.fn(unknown.split(v), *args), v, "constraint")

    return flat


def flat_condition(one: Equality | Inequality, unknown: Unknown, arguments: Arguments) -> Callable[..., Tensor]:
    """``(z, *tensors) -> (*batch, m)`` on one vector per element."""

    def flat(z: Tensor, *tensors: Tensor) -> Tensor:
        out = _condition(one, unknown, arguments, z, tensors)
        k = z.ndim - 1
        out = out.flatten(k) if out.ndim > k else out.unsqueeze(-1)
        # a bound at infinity is none
        return torch.where(torch.isneginf(out), -1, out) if isinstance(one, Inequality) else out

    return flat


def _condition(
    one: Equality | Inequality, unknown: Unknown, arguments: Arguments, z: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    out = one.fn(unknown.split(z), *arguments.rebuild(tensors))
    check_output_tensor(out, "constraint")
    check_output_dtype(out, z, "constraint")
    batch = z.shape[:-1]
    if out.shape[: len(batch)] != batch:
        want = tuple(batch)
        raise ValueError(f"constraint output: expected shape {want} or {(*want, 'm')}, got {tuple(out.shape)}")
    return out


@dataclass(frozen=True)
class Layout:
    """Where the multipliers of each constraint lie behind the unknown: equalities first, then inequalities."""

    n: int
    p: int
    m: int
    slices: tuple[slice, ...]
    shapes: tuple[tuple[int, ...], ...]
    single: bool

    def multipliers(self, value: Tensor, dtype: torch.dtype) -> Any:
        """The multipliers in `value`, in the user's order and shapes."""
        batch = value.shape[:-1]
        found = tuple(
            value[..., where].reshape((*batch, *shape)).to(dtype)
            for where, shape in zip(self.slices, self.shapes, strict=True)
        )
        return found[0] if self.single else found


def join_conditions(
    objective: Callable[..., Tensor],
    constraint: Any,
    unknown: Unknown,
    arguments: Arguments,
    z: Tensor,
    tensors: Sequence[Tensor],
) -> tuple[Callable[..., Tensor], Layout]:
    """``(z, *tensors) -> (*batch, 1 + p + m)``: the objective, p equalities, m inequalities in one function."""
    given = split_constraint(constraint)
    k = z.ndim - 1
    with torch.no_grad():
        shapes = [
            tuple(_condition(one, unknown, arguments, z, tensors).shape[k:])
            for one in given
            if isinstance(one, Equality | Inequality)
        ]
    order = sorted(range(len(given)), key=lambda i: isinstance(given[i], Inequality))
    slices: list[Any] = [None] * len(given)
    at = n = z.shape[-1]
    p = 0
    for i in order:
        count = torch.Size(shapes[i]).numel()
        slices[i] = slice(at, at + count)
        at += count
        p += count if isinstance(given[i], Equality) else 0
    flats = [flat_condition(given[i], unknown, arguments) for i in order]  # type: ignore[arg-type]
    single = not isinstance(constraint, tuple | list)
    layout = Layout(n, p, at - n - p, tuple(slices), tuple(shapes), single)

    def parts(z: Tensor, *tensors: Tensor) -> Tensor:
        return torch.cat([objective(z, *tensors).unsqueeze(-1), *(flat(z, *tensors) for flat in flats)], -1)

    return parts, layout


def refuse_capturing(constraint: Any, probes: Sequence[tuple[Callable[..., Tensor], Sequence[Tensor]]]) -> None:
    """Refuses a constraint that holds a differentiated tensor."""
    for one in split_constraint(constraint):
        refuse_held(one.fn, "constraint")
    if transforms_active():
        for function, tensors in probes:
            refuse_probed(function, tensors, "constraint")
