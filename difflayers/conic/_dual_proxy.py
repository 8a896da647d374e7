"""A network whose output is made a certified bound: projected on the dual cone, then completed.

M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, figure 1 and section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from difflayers._solution import OnFailure, check_policy

from ._completion import Completion
from ._cones import Cone, Product
from ._dual_bound import DualPoint, dual_bound


@runtime_checkable
class DualProjection(Protocol):
    """How a prediction is made a point of the dual cone. A frozen dataclass."""

    def project(self, cone: Cone, y: Tensor) -> Tensor:
        """Points `y` ``(*batch, m)``, moved into the dual cone of `cone`."""


@dataclass(frozen=True)
class Euclidean:
    """The nearest point of the dual cone, :meth:`Cone.project_dual`.

    Of a prediction far outside it may be a corner, where no gradient passes.
    """

    def project(self, cone: Cone, y: Tensor) -> Tensor:
        """Points `y` ``(*batch, m)``, projected on the dual cone of `cone`."""
        return cone.project_dual(y)


@dataclass(frozen=True)
class Radial:
    """The point where the way along an inner direction enters the dual cone, :meth:`Cone.radial_project`.

    Cheaper than the nearest point for exponential, power and semidefinite cones. The direction is the one that the
    class of the dual cone names.
    """

    def project(self, cone: Cone, y: Tensor) -> Tensor:
        """Points `y` ``(*batch, m)``, moved into the dual cone of `cone`."""
        return cone.dual().radial_project(y)


class DualProxy(nn.Module):
    r"""A network that predicts multipliers, and from them certified lower bounds of a conic program.

    For ``min_x c^T x s.t. Ax - b in K, Hx - h in C`` the output of the network is projected on the dual cone of K and
    completed, so that whatever the network says is a bound: weak duality certifies it. Projection and bound are
    computed in float64 whatever the dtype of network and data, since float32 would be wrong by more than a small gap;
    the gradient flows back to the network in its own dtype. A bound certifies the program whose data are the numbers
    given: data that were rounded to float32 are another program's.

    Args:
        network: Maps features to ``(*batch, m)`` multipliers of ``Ax - b in K``; with a
            :class:`BoxQuadraticCompletion` to ``(*batch, m + n)``, w behind them.
        cone: K, or :class:`NonNegative` for rows ``Ax >= b``.
        completion: The block that bounds x. None: it is passed in every call.
        projection: :class:`Euclidean` or :class:`Radial`.
        on_failure: Of completions that solve: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Example:
        >>> import torch
        >>> from difflayers.conic import BoxCompletion, DualProxy, NonNegative
        >>> proxy = DualProxy(torch.nn.Linear(3, 2), NonNegative(), BoxCompletion(0.0, 1.0))
        >>> A, b, c = torch.rand(2, 4), torch.rand(2), torch.rand(5, 4)
        >>> point = proxy(torch.randn(5, 3), A, b, c)
        >>> point.bound.shape, point.bound.dtype
        (torch.Size([5]), torch.float64)

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, section 3.
    """

    def __init__(
        self,
        network: nn.Module,
        cone: Cone,
        completion: Completion | None = None,
        *,
        projection: DualProjection | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(cone, Cone):
            raise ValueError(f"cone: expected a Cone, got {type(cone).__name__}")
        if completion is not None and not isinstance(completion, Completion):
            raise ValueError(f"completion: expected a Completion or None, got {type(completion).__name__}")
        if projection is not None and not isinstance(projection, DualProjection):
            raise ValueError(f"projection: expected Euclidean(), Radial() or None, got {projection!r}")
        check_policy(on_failure)
        self.network = network
        self.cone = cone
        self.completion = completion
        self.projection: DualProjection = projection or Euclidean()
        self.on_failure: OnFailure = on_failure

    def forward(
        self, features: Any, A: Tensor, b: Tensor, c: Tensor, *, completion: Completion | None = None
    ) -> DualPoint:
        """Certified bounds.

        Args:
            features: What the network takes.
            A: ``(*batch, m, n)``, as for :func:`dual_bound`.
            b: ``(*batch, m)``.
            c: ``(*batch, n)``.
            completion: In place of the module's own, where its data vary between calls.

        Returns:
            A :class:`DualPoint` in float64, differentiable in the network's parameters and in everything given.
        """
        completion = completion or self.completion
        if completion is None:
            raise ValueError("completion: expected one in this call or in the module, got None in both")
        y, w = self.multipliers(features, b.shape[-1], completion.predicted(c.shape[-1]))
        A, b, c = (t.to(torch.float64) for t in (A, b, c))
        return dual_bound(y, A, b, c, completion.to(y), w=w, on_failure=self.on_failure)

    def multipliers(self, features: Any, rows: int, predicted: int = 0) -> tuple[Tensor, Tensor | None]:
        """The certificate itself: multipliers in the dual cone, and w.

        Args:
            features: What the network takes.
            rows: m.
            predicted: How many numbers follow, ``completion.predicted(n)``.

        Returns:
            ``(*batch, m)`` multipliers and ``(*batch, predicted)`` numbers, or None where there are none; float64.
        """
        raw = self.network(features)
        if not isinstance(raw, Tensor) or raw.shape[-1:] != (rows + predicted,):
            got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"network output: expected {rows + predicted} entries in the last dimension, got {got}")
        y, w = raw.to(torch.float64).split((rows, predicted), -1)
        cone = self.cone if self.cone.ndim == 1 else Product([(self.cone, rows)])
        return self.projection.project(cone, y), w if predicted else None

    def extra_repr(self) -> str:
        """Cone, completion, projection."""
        name = None if self.completion is None else type(self.completion).__name__
        return f"cone={self.cone}, completion={name}, projection={self.projection}"
