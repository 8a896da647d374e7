"""The plan, the coupling and the value of entropic transport between points, without a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._solution import OnFailure, Solution
from difflayers.implicit import envelope, solution_map, solution_map_ex
from difflayers.linalg import LinearSolver

from ._coupling import centred, nan_of
from ._iteration import gain
from ._point_cloud import PointCloud, PointCoupling, check_small
from ._point_kernel import batch_of
from ._point_problem import Equations, PreparedPoints, point_problem, prepare_points
from ._solvers import TransportSolver


def point_plan(cloud: PointCloud, *masses: Any, on_failure: OnFailure, **options: Any) -> Tensor:
    """The plan as a matrix."""
    data = prepare_points(cloud, *masses)
    x, y, a, b, eps, *_ = data.args
    check_small(torch.Size((*batch_of(x, y, a, b, eps), x.shape[-2], y.shape[-2])))
    z = solution_map(*point_problem(data, **options), on_failure=on_failure)
    return _coupling(z, data, cloud.x.dtype, on_failure).plan


def point_coupling(cloud: PointCloud, *masses: Any, **options: Any) -> Solution[PointCoupling]:
    """The coupling with its potentials."""
    data = prepare_points(cloud, *masses)
    found = solution_map_ex(*point_problem(data, **options))
    coupling = _coupling(found.value, data, cloud.x.dtype, "ignore")
    return Solution(coupling, found.status, found.steps, found.residual)


def _coupling(z: Tensor, data: PreparedPoints, dtype: torch.dtype, on_failure: OnFailure) -> PointCoupling:
    """Zero for elements without mass, NaN for those whose potentials are NaN."""
    empty, n = data.base.empty, data.args[0].shape[-2]
    failed, safe, (x, y, a, b, eps, *_) = _harmless(z, data, on_failure)
    equations = Equations(data.cost, data.rows)

    def settled(out: Tensor) -> Tensor:
        if failed is not None:
            out = torch.where((failed | empty)[..., None, None], nan_of(z, failed)[..., None, None], out)
        return out.to(dtype)

    if failed is None:
        a = torch.where(empty.unsqueeze(-1), 0, a)

    def apply(v: Tensor, transpose: bool) -> Tensor:
        v = v.to(x.dtype)
        if transpose:
            (out,) = equations.products(safe, x, y, eps, left=a.unsqueeze(-1) * v)
            return settled(b.unsqueeze(-1) * out)
        (out,) = equations.products(safe, x, y, eps, right=b.unsqueeze(-1) * v)
        return settled(a.unsqueeze(-1) * out)

    def plan() -> Tensor:
        return settled(equations.kernel(safe, x, y, eps) * a.unsqueeze(-1) * b.unsqueeze(-2))

    f, g = (t.to(dtype) for t in centred(z, data.base))
    return PointCoupling(f, g, torch.Size((*f.shape[:-1], n, g.shape[-1])), apply, plan)


def _harmless(
    z: Tensor, data: PreparedPoints, on_failure: OnFailure
) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
    """As :func:`._coupling.harmless`; None where nothing can have failed."""
    if on_failure == "raise":
        return None, z, data.args
    failed = torch.isnan(z).any(-1)
    one, two = failed.unsqueeze(-1), failed[..., None, None]
    x, y, a, b, *numbers = data.args
    safe = (torch.where(two, 0, x), torch.where(two, 0, y), torch.where(one, 1, a), torch.where(one, 1, b))
    return failed, torch.where(one, 0, z), (*safe, *(torch.where(failed, 1, t) for t in numbers))


def point_value(
    data: PreparedPoints, solver: TransportSolver | None, adjoint: LinearSolver | None, on_failure: OnFailure
) -> Tensor:
    """The value of a prepared problem."""
    z = solution_map(*point_problem(data, solver, adjoint), on_failure=on_failure)
    failed, safe, args = _harmless(z, data, on_failure)
    equations = Equations(data.cost, data.rows)

    def dual(
        z: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: Tensor, soft_a: Tensor, soft_b: Tensor
    ) -> Tensor:
        n = x.shape[-2]
        (grown,) = equations.products(z, x, y, eps, less_one=b.unsqueeze(-1))
        total = (a * grown.squeeze(-1)).sum(-1)
        return gain(a, z[..., :n], soft_a) + gain(b, z[..., n:], soft_b) - eps * total

    value = envelope(dual, safe, args)
    if failed is not None:
        value = torch.where(failed, nan_of(z, failed), value)
    return torch.where(data.base.empty, data.base.idle, value)
