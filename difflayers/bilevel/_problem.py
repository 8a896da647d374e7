r"""Two levels: :math:`\min_x F(x, y^*(x))` where :math:`y^*(x)` solves a problem of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bilevel:
    r"""A bilevel problem: an upper objective of what a lower problem makes of the upper variables.

    Solves ``min_x upper(x, y*(x))  where  y*(x) = argmin_y lower(x, y) + g(y, x)  subject to  constraint(x, y) = 0``.

    Each function is called as ``fn(x, y, batch)`` with `x` and `y` as they are given to :func:`hypergradient` or
    :class:`ArgminLayer`: a tensor, a pytree of tensors, or an ``nn.Module``, whose parameters that require a gradient
    are then the variables (parameters shared by two places count once). Evaluations leave the buffers of all modules in
    reach alone (BatchNorm in training mode uses its batch and keeps its statistics), and all products of one derivative
    see the same random numbers (one dropout mask).

    Args:
        upper: ``fn(x, y, batch) -> 0-dim tensor``, the upper objective F.
        lower: ``fn(x, y, batch) -> 0-dim tensor``, the lower objective f, twice differentiable.
        prox_lower: None, or ``fn(v, x, step) -> like y``, the proximal operator of ``step * g(., x)`` where the lower
            problem is to minimise ``f + g`` with a nonsmooth g. Plain torch, or a layer of :mod:`difflayers.proximal`:
            its derivative says what is on the support. Modules come in as dicts from names to tensors here.
        constraint: None, or ``fn(x, y) -> tensor`` (any shape) of the lower problem.
        equality: The constraint holds with equality. Inequalities are for methods that say they take them.

    Raises:
        ValueError: For something that is not callable, or a prox and a constraint together.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, hypergradient
        >>> train, valid = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0])
        >>> ridge = Bilevel(
        ...     upper=lambda x, y, batch: (y - valid).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - train).square().sum() / 2 + (x.exp() * y.square()).sum() / 2,
        ... )
        >>> x = torch.zeros(2)
        >>> hypergradient(ridge, x, train / 2).grad  # per feature: -(y - valid) y e^x / (1 + e^x)
        tensor([ 0.0000, -0.3750])

    Source: J. Bracken, J. McGill, Mathematical programs with optimization problems in the constraints, 1973.
    """

    upper: Callable[..., Tensor]
    lower: Callable[..., Tensor]
    prox_lower: Callable[..., Any] | None = None
    constraint: Callable[..., Tensor] | None = None
    equality: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "equality" or (value is None and field.name in ("prox_lower", "constraint")):
                continue
            if not callable(value):
                raise ValueError(f"{field.name}: expected a callable, got {type(value).__name__}")
        if self.equality and self.constraint is None:
            raise ValueError("equality: expected False without a constraint, got True")
        if self.prox_lower is not None and self.constraint is not None:
            raise ValueError("prox_lower: expected None next to a constraint, got a function")


def check_problem(problem: Any) -> Bilevel:
    """Refuses anything but a problem whose lower solution can be differentiated."""
    if not isinstance(problem, Bilevel):
        raise ValueError(f"problem: expected a Bilevel, got {type(problem).__name__}")
    if problem.constraint is not None and not problem.equality:
        raise ValueError("constraint: expected equality=True, got inequalities, which have no derivative here")
    return problem


def two_batches(batch: Any) -> tuple[Any, Any]:
    """The upper and the lower batch."""
    if batch is None:
        return None, None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"batch: expected None or a pair (upper_batch, lower_batch), got {got}")
    return batch[0], batch[1]
