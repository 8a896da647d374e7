"""Two clouds of points in the place of a matrix of costs, and the coupling between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difflayers._checks import check_same, check_tensor
from difflayers.linalg._autodiff import opaque
from difflayers.linalg._captured import gradients_wanted, refuse_held, refuse_probed

from ._costs import Cost, SquaredEuclidean, check_points

PLAN_LIMIT = 2**24  # entries of a plan that is given out as a matrix


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Two clouds of points, for :func:`sinkhorn`, :func:`sinkhorn_ex` and :func:`sinkhorn_value` in place of a cost.

    The matrix of costs is never stored: blocks of it are computed where they are needed, again for every step and every
    derivative, in memory that grows with n + m. This pays where the matrix would not fit; below, the matrix is quicker.

    Args:
        x: ``(*batch, n, d)`` points.
        y: ``(*batch, m, d)`` points.
        cost: Of a pair; any :class:`Cost` that looks at each pair alone and does not capture what is differentiated.
        rows: Rows of a block; None: so many that a block has about 2^18 entries (elsewhere than on a
            CPU: 2^22).

    Raises:
        ValueError: For points that do not fit, a cost that is none, or that captures a differentiated tensor.

    Example:
        >>> import torch
        >>> from difflayers.transport import PointCloud, sinkhorn_ex
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> coupling = sinkhorn_ex(PointCloud(x, torch.tensor([[0.0], [1.0], [2.0]])), eps=0.5).value
        >>> coupling.apply(torch.ones(3))
        tensor([0.5000, 0.5000], grad_fn=<...>)
        >>> 2 * coupling.apply(torch.tensor([[0.0], [1.0], [2.0]]))  # where the mass of each point goes, on average
        tensor([[0.3573],
                [1.6427]], grad_fn=<...>)
    """

    x: Tensor
    y: Tensor
    cost: Cost = SquaredEuclidean()
    rows: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_points(self.x, self.y)
        for name, t in (("x", self.x), ("y", self.y)):
            if t.shape[-2] == 0:
                raise ValueError(f"{name}: expected at least one point, got shape {tuple(t.shape)}")
        if not callable(self.cost):
            raise ValueError(f"cost: expected SquaredEuclidean() or another function of the points, got {self.cost!r}")
        if self.rows is not None and not self.rows >= 1:
            raise ValueError(f"rows: expected None or a number of at least 1, got {self.rows}")
        if gradients_wanted():
            _refuse_capturing(self.cost, self.x, self.y)

    @property
    def dtype(self) -> torch.dtype:
        """Of the points."""
        return self.x.dtype

    def matrix(self) -> Tensor:
        """``(*batch, n, m)``, all of it."""
        return self.cost(self.x, self.y)


@dataclass(frozen=True, eq=False)
class PointCoupling:
    """A transport plan between points, with its potentials, that is not stored.

    Attributes:
        f: ``(*batch, n)`` potential of the points `x`, in the unit of the cost.
        g: ``(*batch, m)`` potential of the points `y`; as of a :class:`Coupling`.
        shape: Of the plan.
    """

    f: Tensor
    g: Tensor
    shape: torch.Size
    _apply: Callable[[Tensor, bool], Tensor] = field(repr=False)
    _plan: Callable[[], Tensor] = field(repr=False)

    @opaque
    def apply(self, v: Tensor, *, transpose: bool = False) -> Tensor:
        """The plan times vectors.

        Args:
            v: ``(*batch, m)`` with as many dimensions as `g`, or ``(*batch, m, k)`` with one more; n in the place of m
                with `transpose`.
            transpose: The transposed plan.

        Returns:
            ``(*batch, n)`` or ``(*batch, n, k)``; m in the place of n with `transpose`.

        Raises:
            ValueError: For vectors that do not fit.

        Differentiable in `v` and in all that the plan depends on, to any order, in memory of ``n + m`` vectors.

        Example:
            >>> import torch
            >>> from difflayers.transport import PointCloud, sinkhorn_ex
            >>> coupling = sinkhorn_ex(PointCloud(torch.rand(4, 2), torch.rand(5, 2)), eps=0.5).value
            >>> coupling.apply(torch.ones(4), transpose=True)
            tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
        """
        count = self.shape[-2 if transpose else -1]
        check_tensor("v", v, min_ndim=1)
        check_same((("the plan", self.f), ("v", v)))
        ndim = len(self.shape) - 1
        vector = v.ndim == ndim
        if v.ndim not in (ndim, ndim + 1) or v.shape[-1 if vector else -2] != count:
            shapes = (*self.shape[:-2], count), (*self.shape[:-2], count, "k")
            raise ValueError(f"v: expected shape {shapes[0]} or {shapes[1]}, got {tuple(v.shape)}")
        return self._apply(v.unsqueeze(-1), transpose).squeeze(-1) if vector else self._apply(v, transpose)

    @property
    def plan(self) -> Tensor:
        """``(*batch, n, m)``: the plan as a matrix, differentiable.

        Raises:
            ValueError: Above 2^24 entries, the batch included.
        """
        return self._matrix()

    @opaque
    def _matrix(self) -> Tensor:
        check_small(self.shape)
        return self._plan()


@opaque
def _refuse_capturing(cost: Cost, x: Tensor, y: Tensor) -> None:
    """Refuses a cost that captures what is differentiated."""
    refuse_held(cost, "cost")
    if x.numel() and y.numel():
        refuse_probed(cost, (x[..., :1, :], y[..., :1, :]), "cost")


def check_small(shape: torch.Size) -> None:
    """Refuses plans that are too large for a matrix."""
    if shape.numel() > PLAN_LIMIT:
        raise ValueError(
            f"plan: expected at most {PLAN_LIMIT} entries, got shape {tuple(shape)}; use sinkhorn_ex and .apply(v), or "
            "pass the matrix of costs instead of the PointCloud"
        )
