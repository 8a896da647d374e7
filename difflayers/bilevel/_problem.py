r"""Two levels: :math:`\min_x F(x, y^*(x))` where :math:`y^*(x)` solves a problem of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

OPTIONAL = ("prox_lower", "project_upper", "project_lower", "project_joint", "constraint", "blocks")


@dataclass(frozen=True, eq=False)
class Bilevel:
    r"""A bilevel problem: an upper objective of what a lower problem makes of the upper variables.

    Solves ``min_{x in X} upper(x, y*(x))  where  y*(x) = argmin_{y in Y(x)} lower(x, y) + g(y, x)  subject to
    constraint(x, y) <= 0`` (or ``= 0``), each part of it where it is given.

    Each function is called as ``fn(x, y, batch)`` with `x` and `y` as they are given to :func:`hypergradient` or
    :class:`ArgminLayer`: a tensor, a pytree of tensors, or an ``nn.Module``, whose parameters that require a gradient
    are then the variables (parameters shared by two places count once). Evaluations leave the buffers of all modules in
    reach alone (BatchNorm in training mode uses its batch and keeps its statistics), and all products of one derivative
    see the same random numbers (one dropout mask).

    What a problem has beyond the two objectives is taken by those methods that can use it; the others refuse it and
    name those that take it. A prox and projections get modules as dicts from names to tensors.

    Args:
        upper: ``fn(x, y, batch) -> 0-dim tensor``, the upper objective F.
        lower: ``fn(x, y, batch) -> 0-dim tensor``, the lower objective f, twice differentiable.
        prox_lower: None, or ``fn(v, x, step) -> like y``, the proximal operator of ``step * g(., x)`` where the lower
            problem is to minimise ``f + g`` with a nonsmooth g. Plain torch, or a layer of :mod:`difflayers.proximal`:
            its derivative says what is on the support.
        project_upper: None, or ``fn(x) -> like x``, the projection onto the convex set X of the upper variables. For
            methods; a hypergradient does not depend on it.
        project_lower: None, or ``fn(y, x) -> like y``, the projection onto the convex set Y(x) of the lower variables:
            the prox of its indicator. In place of `prox_lower`.
        project_joint: None, or ``fn(x, y) -> (x, y)``, the projection onto a convex set of both, for methods that move
            both at once: where the constraint holds, or where the upper problem wants them. In place of
            `project_upper`.
        constraint: None, or ``fn(x, y) -> tensor`` (any shape) of the lower problem.
        equality: The constraint is ``= 0``; otherwise ``<= 0``.
        blocks: None, or the number m of independent lower problems that share x. Every tensor of y then is of shape
            ``(m, ...)``; `upper` and `lower` return ``(m,)`` tensors, whose entry i depends on ``y[i]`` alone
            (:class:`ArgminLayer` checks that of `lower`, nobody of the others). The upper objective is the mean of its
            m values, each lower one is minimised for itself. No module as y: ``torch.func.stack_module_state`` makes
            tensors of many.
        group: None, or a process group of ``torch.distributed`` (``torch.distributed.group.WORLD``, of a mesh
            ``mesh.get_group()``): the data are divided among its processes, and each function stands for the mean over
            them. A module in x or y that is wrapped in ``DistributedDataParallel`` brings its group along. See below.
        samples: None, or ``fn(batch) -> number``, how many samples the batch of a process has, for a mean over samples
            where processes have different numbers of them: each counts as much as it has. A process without any (0)
            takes part without calling the function. None: all processes count alike.

    **Data parallel.** Every process runs the same program with x and y the same (which is checked; broadcast them, or
    use the same seed) and batches of its own. `upper`, `lower` and `constraint` then are means over the processes of
    what each returns, and derivatives, solutions, steps and statistics are those that one process would get from all
    batches, the same everywhere (as far as the rounding of sums in another order). Every call is a collective one, in
    the same order in all processes; an error in the function of one is an error in all (one inside a backward pass
    alone is known to the others when their time limit is over). As under ``DistributedDataParallel``, random numbers
    such as dropout masks are each process's own, BatchNorm in training mode sees the batch of the process, and what
    comes behind an :class:`ArgminLayer` may differ between processes and stands for its mean: gradients in x are those
    of the mean, and gradients in the process's own batch those that averaging over the processes makes right. A prox
    and projections have no batch: they have to be the same everywhere, and so has what a :class:`MFAC` has seen. With
    `blocks` each process has blocks of its own, as many as it likes; of y it knows its own alone, and the upper
    objective is the mean over the blocks of all. A method that samples them wants the same share in every process, and
    its `infeasibility` is that of the process.

    Raises:
        ValueError: For something that is not callable, parts that exclude each other (a prox and a constraint or
            projection of y, a projection of both and one of x alone), blocks that are no number.

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
    _: KW_ONLY
    prox_lower: Callable[..., Any] | None = None
    project_upper: Callable[[Any], Any] | None = None
    project_lower: Callable[[Any, Any], Any] | None = None
    project_joint: Callable[[Any, Any], tuple[Any, Any]] | None = None
    constraint: Callable[..., Tensor] | None = None
    equality: bool = False
    blocks: int | None = None
    group: Any = None
    samples: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("upper", "lower", *OPTIONAL[:5]):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name in ("upper", "lower")):
                raise ValueError(f"{name}: expected a callable, got {type(value).__name__}")
        if self.equality and self.constraint is None:
            raise ValueError("equality: expected False without a constraint, got True")
        for name, other in _EXCLUDED:
            if getattr(self, name) is not None and getattr(self, other) is not None:
                raise ValueError(f"{name}: expected None next to {_NAMES.get(other, other)}, got a function")
        if self.blocks is not None and (
            isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1
        ):
            raise ValueError(f"blocks: expected None or an integer of at least 1, got {self.blocks!r}")
        if self.blocks is not None and (self.constraint is not None or self.project_joint is not None):
            name = "constraint" if self.constraint is not None else "project_joint"
            raise ValueError(f"{name}: expected None with blocks, got a function")
        if self.samples is not None and not callable(self.samples):
            raise ValueError(f"samples: expected None or a callable, got {type(self.samples).__name__}")
        if self.group is not None:
            check_group(self.group)

    @property
    def smooth(self) -> bool:
        """Whether the lower problem is to minimise a function, and nothing else."""
        return self.proximal is None and self.constraint is None

    @property
    def proximal(self) -> Callable[..., Any] | None:
        """The prox of the lower problem, ``fn(v, x, step)``: the projection onto Y(x) where that is what it has."""
        project = self.project_lower
        return self.prox_lower if project is None else lambda v, x, step: project(v, x)


_EXCLUDED = (
    ("prox_lower", "constraint"),
    ("prox_lower", "project_lower"),
    ("prox_lower", "project_joint"),
    ("project_upper", "project_joint"),
)
_NAMES = {"constraint": "a constraint"}


def check_group(group: Any) -> None:
    """Refuses anything but a process group."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(f"group: expected None or a process group of torch.distributed, got {type(group).__name__}")


def check_problem(problem: Any) -> Bilevel:
    """Refuses anything but a problem whose lower solution can be differentiated."""
    if not isinstance(problem, Bilevel):
        raise ValueError(f"problem: expected a Bilevel, got {type(problem).__name__}")
    if problem.constraint is not None and problem.project_lower is not None:
        raise ValueError("project_lower: expected None next to a constraint, got a function; LVHBA takes both")
    if problem.project_joint is not None and problem.constraint is None:
        raise ValueError(
            "project_joint: expected None without a constraint, got a function: GPBGD and VPBGD take a set of both"
        )
    return problem


def two_batches(batch: Any) -> tuple[Any, Any]:
    """The upper and the lower batch."""
    if batch is None:
        return None, None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"batch: expected None or a pair (upper_batch, lower_batch), got {got}")
    return batch[0], batch[1]
