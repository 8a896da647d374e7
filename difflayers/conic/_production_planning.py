r"""Resource-constrained production planning: generator, and its form for dual bounds.

.. math:: \min_x \sum_j d_j x_j + \frac{e_j}{x_j} \quad \text{s.t.} \quad \rho^T x \le v, \; x > 0

With :math:`t_j \ge 1 / x_j`, that is :math:`(x_j, t_j, \sqrt 2)` in the rotated second-order cone, the objective is
linear. H. Ziegler, Solving certain singly constrained convex optimization problems in production planning, 1982; M.
Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 5.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._completions import HyperbolicCompletion


class ProductionPlanning(NamedTuple):
    r"""Planning instances, ``min holding^T x + sum(ordering / x) s.t. resources^T x <= capacity, x > 0``.

    The properties `A`, `b`, `c` and `completion` are what :func:`dual_bound` takes, for the variables ``(x, t)`` with
    ``t >= 1 / x``; the multiplier is that of ``-resources^T x - (-capacity) >= 0``, at least 0. The bound is the closed
    form ``-capacity y + 2 sum(sqrt(ordering * (holding + resources y)))``, finite for every ``y >= 0``.

    Attributes:
        holding: ``(*batch, n)`` costs of a unit, d.
        ordering: ``(*batch, n)`` costs of an inverse unit, e.
        resources: ``(*batch, n)`` that a unit takes.
        capacity: ``(*batch)`` resources there are.
    """

    holding: Tensor
    ordering: Tensor
    resources: Tensor
    capacity: Tensor

    @property
    def A(self) -> Tensor:
        """``(*batch, 1, 2 n)`` the row of the resource."""
        return torch.cat([-self.resources, torch.zeros_like(self.resources)], -1).unsqueeze(-2)

    @property
    def b(self) -> Tensor:
        """``(*batch, 1)`` its right-hand side."""
        return -self.capacity.unsqueeze(-1)

    @property
    def c(self) -> Tensor:
        """``(*batch, 2 n)`` costs of x and of t."""
        return torch.cat([self.holding, self.ordering], -1)

    @property
    def completion(self) -> HyperbolicCompletion:
        """``x_j t_j >= 1``."""
        return HyperbolicCompletion(1.0)

    @property
    def features(self) -> Tensor:
        """``(*batch, 3 n + 1)`` all data in a row: holding, ordering, resources, capacity."""
        return torch.cat([self.holding, self.ordering, self.resources, self.capacity.unsqueeze(-1)], -1)


def sample_production_planning(
    count: int,
    *,
    items: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ProductionPlanning:
    r"""Random production planning instances of the benchmark's distribution.

    Per item: demand in [1, 100], production cost p in [1, 10], holding rate in [0.05, 2], factors alpha in [0.1, 1.5]
    and beta in [0.1, 2]; per instance: the share eta in [0.25, 0.75] of all resources that there is. All uniform. Then
    ``holding = p * rate / 2, ordering = alpha * p * demand, resources = beta * p, capacity = eta * sum(resources)``.

    Args:
        count: Number of instances.
        items: n.
        generator: Of the random numbers, on the CPU. None: torch's own.
        dtype: None: the default one.
        device: None: the default one.

    Returns:
        Instances with a batch dimension of `count`.

    Example:
        >>> import torch
        >>> from difflayers.conic import sample_production_planning
        >>> instances = sample_production_planning(8, items=10, generator=torch.Generator().manual_seed(0))
        >>> instances.c.shape
        torch.Size([8, 20])

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, section 5.2.
    """
    for name, value, least in (("count", count, 0), ("items", items, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")

    n = (count, items)
    demand, cost, rate = uniform(1, 100, *n), uniform(1, 10, *n), uniform(0.05, 2, *n)
    alpha, beta, eta = uniform(0.1, 1.5, *n), uniform(0.1, 2, *n), uniform(0.25, 0.75, count)
    resources = beta * cost
    data = (cost * rate / 2, alpha * cost * demand, resources, eta * resources.sum(-1))
    where = torch.get_default_device() if device is None else torch.device(device)
    return ProductionPlanning(*(t.to(device=where, dtype=dtype or torch.get_default_dtype()) for t in data))
