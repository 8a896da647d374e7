r"""The value of entropic transport, and the divergence that is zero between equal measures.

.. math:: \mathrm{OT}_\epsilon(a, b) = \min_P \langle C, P \rangle + \epsilon \, \mathrm{KL}(P \,|\, a b^T)
    = \max_{f, g} \langle a, f \rangle + \langle b, g \rangle
    - \epsilon \sum_{ij} a_i b_j \big( e^{(f_i + g_j - C_{ij}) / \epsilon} - 1 \big)

Its derivative is the partial one at the solution (envelope theorem): the plan for the cost, the potentials for the
masses. No linear system is solved for it.

J. Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019; T. Sejourne et al.,
Sinkhorn Divergences for Unbalanced Optimal Transport, 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers.implicit import envelope, solution_map
from difflayers.linalg import LinearSolver

from ._coupling import Prepared, harmless, nan_of, prepare
from ._iteration import gain
from ._point_cloud import PointCloud
from ._point_problem import prepare_points
from ._point_sinkhorn import point_value
from ._sinkhorn_problem import log_ratio
from ._sinkhorn_solve import problem_for
from ._solvers import TransportSolver


def sinkhorn_value(
    cost: Tensor | PointCloud,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    solver: TransportSolver | None = None,
    adjoint: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The optimal value of entropic transport, with the envelope gradient.

    Solves ``min_P <cost, P> + eps KL(P | a b^T) s.t. P 1 = a, P^T 1 = b``, or with penalties in the place of
    constraints; see :func:`sinkhorn`. The value contains the entropy: it is neither ``<cost, P>`` nor a distance.

    Conventions: this is the ``value`` of POT's ``ot.solve(..., reg=eps, reg_type="KL")`` for balanced problems; with
    ``"entropy"``, ``sum P log P`` in the place of KL, that differs by ``-eps (H(a) + H(b))`` for masses of total 1,
    H the entropy of a marginal. ``ot.sinkhorn2`` returns ``<cost, P>``, whose gradient is not the plan; here that is
    ``(cost * sinkhorn(cost, ...)).sum((-2, -1))``, with the full derivative. geomloss has half the squared distance for
    a cost, and ``eps = blur^p``.

    Args:
        cost: ``(*batch, n, m)``, or a :class:`PointCloud`, whose costs are not stored.
        a: ``(*batch, n)`` masses of the rows; None: ``1 / n`` each.
        b: ``(*batch, m)`` masses of the columns; None: ``1 / m`` each.
        eps: Strength of the entropy.
        rho_a: Penalty of the row sums.
        rho_b: Penalty of the column sums.
        solver: As for :func:`sinkhorn`.
        adjoint: As for :func:`sinkhorn`; of interest for second derivatives alone.
        on_failure: As for :func:`sinkhorn`.

    Returns:
        ``(*batch)`` values.

    Raises:
        ValueError: As :func:`sinkhorn`.
        SolveError: As :func:`sinkhorn`.

    Differentiable in every argument, to any order: the gradient in `cost` is the plan. The second order takes one
    linear solve.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn, sinkhorn_value
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> value = sinkhorn_value(cost, eps=0.5)
        >>> torch.allclose(torch.autograd.grad(value, cost)[0], sinkhorn(cost, eps=0.5))
        True

    Source: J. Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019, eq. 2.
    """
    if isinstance(cost, PointCloud):
        points = prepare_points(cost, a, b, eps, rho_a, rho_b)
        return point_value(points, solver, adjoint, on_failure).to(cost.x.dtype)
    data = prepare(cost, a, b, eps, rho_a, rho_b)
    return value_of(data, solver, adjoint, on_failure).to(cost.dtype)


def value_of(
    data: Prepared, solver: TransportSolver | None, adjoint: LinearSolver | None, on_failure: OnFailure
) -> Tensor:
    """The value of a prepared problem."""
    z = solution_map(*problem_for(data, solver, adjoint), on_failure=on_failure)
    args, shift, failed = data.args, data.shift, None
    if on_failure != "raise":
        failed, safe, args = harmless(z, data)
        shift = torch.where(failed, 0, shift)
    _, x, y, _, soft_a, _ = args
    # the shift is zero unless one of the sums is what its mass says
    value = envelope(_dual, z if failed is None else safe, args)
    value = value + shift * torch.where(soft_a == 0, x.sum(-1), y.sum(-1))
    if failed is not None:
        value = torch.where(failed, nan_of(z, failed), value)
    return torch.where(data.empty, data.idle, value)


def _dual(z: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, soft_a: Tensor, soft_b: Tensor) -> Tensor:
    n = cost.shape[-2]
    grown = torch.expm1(log_ratio(z, cost, a, b, eps)) * a.unsqueeze(-1) * b.unsqueeze(-2)
    return gain(a, z[..., :n], soft_a) + gain(b, z[..., n:], soft_b) - eps * grown.sum((-2, -1))
