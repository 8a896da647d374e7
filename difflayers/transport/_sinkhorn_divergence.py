r"""The Sinkhorn divergence: entropic transport without its bias, zero between equal measures.

.. math:: S_\epsilon(a, b) = \mathrm{OT}_\epsilon(a, b) - \tfrac12 \mathrm{OT}_\epsilon(a, a)
    - \tfrac12 \mathrm{OT}_\epsilon(b, b) + \tfrac\epsilon2 \Big(\sum a - \sum b\Big)^2

with the values of :func:`sinkhorn_value`; the last term vanishes where the totals agree.

J. Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019; T. Sejourne et al.,
Sinkhorn Divergences for Unbalanced Optimal Transport, 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._checks import compute_dtype
from difflayers._solution import OnFailure

from ._costs import Cost, SquaredEuclidean, check_points, cost_of_pairs
from ._coupling import prepare
from ._point_cloud import PLAN_LIMIT, PointCloud
from ._point_problem import prepare_points
from ._point_sinkhorn import point_value
from ._sinkhorn_value import value_of
from ._solvers import TransportSolver


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho: float | Tensor | None = None,
    cost: Cost = SquaredEuclidean(),
    solver: TransportSolver | None = None,
    matrix_free: bool | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The debiased value of entropic transport between two weighted clouds of points.

    Solves ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` with OT the value of :func:`sinkhorn_value`, plus, with
    penalties, ``eps / 2 (sum a - sum b)^2``. For :class:`SquaredEuclidean` and :class:`Euclidean` it is at least 0,
    convex in each measure, and 0 for equal ones.

    Args:
        x: ``(*batch, n, d)`` points.
        y: ``(*batch, m, d)`` points.
        a: ``(*batch, n)`` masses of `x`, at least 0; None: ``1 / n`` each.
        b: ``(*batch, m)`` masses of `y`; None: ``1 / m`` each.
        eps: Strength of the entropy, in the unit of the cost.
        rho: Strength of the penalty on both marginals, in the unit of the cost; None: they are constraints.
        cost: :class:`SquaredEuclidean`, :class:`Euclidean`, :class:`Cosine`, or any function of the points whose
            result is ``(*batch, n, m)``.
        solver: As for :func:`sinkhorn`.
        matrix_free: Recomputes the costs by blocks instead of storing them, see :class:`PointCloud`; None: where one of
            the three matrices, with its batch, would have more than 2^24 entries.
        on_failure: As for :func:`sinkhorn`.

    Returns:
        ``(*batch)`` divergences.

    Raises:
        ValueError: As :func:`sinkhorn`, and for clouds of different dimension.
        SolveError: As :func:`sinkhorn`.

    Differentiable in `x`, `y`, `a`, `b`, `eps` and `rho`, to any order; at equal measures the gradient is zero, to
    rounding. That in the masses needs an `eps` at which all points exchange mass: without penalties the potentials of
    parts that exchange less than the tolerance are known up to a constant each (below 1e-2 of the range of the costs,
    for a few points far apart).

    Conventions: the entropy is that relative to the product of the masses, and it is part of the value. The
    ``SamplesLoss("sinkhorn", p=2, blur=s, reach=r)`` of geomloss takes ``|x - y|^2 / 2``, ``eps = s^2`` and
    ``rho = r^2``: twice its value is this one at ``eps=2 * s**2``, ``rho=2 * r**2``. The
    ``empirical_sinkhorn_divergence`` of POT combines the terms ``<cost, plan>`` of the three plans, without entropy,
    and cuts the result off at 0: another number, with another gradient.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn_divergence
        >>> x = torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
        >>> sinkhorn_divergence(x, x.detach() + 1, eps=0.1)
        tensor(1.0000, grad_fn=<...>)

    Source: J. Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019, eq. 3;
    T. Sejourne et al., Sinkhorn Divergences for Unbalanced Optimal Transport, 2019, definition 6.
    """
    check_points(x, y)
    if not callable(cost):
        raise ValueError(f"cost: expected SquaredEuclidean() or another function of the points, got {cost!r}")
    points, others = x, y
    x, y, a, b, eps, rho = (_lifted(t) for t in (points, others, a, b, eps, rho))

    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    if matrix_free is None:
        matrix_free = batch.numel() * max(x.shape[-2], y.shape[-2]) ** 2 > PLAN_LIMIT

    def value(p: Tensor, q: Tensor, s: Tensor | None, t: Tensor | None) -> Tensor:
        if matrix_free:
            cloud = PointCloud(p, q, cost)
            return point_value(prepare_points(cloud, s, t, eps, rho, rho, points.dtype), solver, None, on_failure)
        data = prepare(cost_of_pairs(cost, p, q), s, t, eps, rho, rho, dtype=points.dtype)
        return value_of(data, solver, None, on_failure)

    S = value(x, y, a, b) - value(x, x, a, a) / 2 - value(y, y, b, b) / 2
    if rho is not None:
        excess = (1 if a is None else a.sum(-1)) - (1 if b is None else b.sum(-1))
        S = S + eps * excess**2 / 2
    return S.to(points.dtype)


def _lifted(t: Any) -> Any:
    return t.to(compute_dtype(t.dtype)) if isinstance(t, Tensor) else t
