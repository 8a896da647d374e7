"""Entropic transport as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._solution import OnFailure, check_policy
from difflayers.linalg import LinearSolver

from ._point_cloud import PointCloud
from ._sinkhorn import sinkhorn
from ._solvers import TransportSolver

_NAMES = ("eps", "rho_a", "rho_b")


class Sinkhorn(nn.Module):
    """The entropic transport plan, with `eps` and the penalties as settings or as parameters to learn.

    Without masses the plan's entries sum to 1 and its n rows to 1 / n: times n, its rows are like those of a softmax.

    Args:
        eps: As for :func:`sinkhorn`.
        rho_a: As for :func:`sinkhorn`.
        rho_b: As for :func:`sinkhorn`.
        learnable: Makes those that are given parameters; their logarithms are learned, so that they stay positive.
        solver: As for :func:`sinkhorn`.
        adjoint: As for :func:`sinkhorn`.
        on_failure: As for :func:`sinkhorn`.

    Example:
        >>> import torch
        >>> from difflayers.transport import Sinkhorn
        >>> layer = Sinkhorn(0.1)
        >>> layer
        Sinkhorn(eps=0.1)
        >>> layer(torch.rand(8, 5, 7)).sum((-2, -1))
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """

    def __init__(
        self,
        eps: float,
        *,
        rho_a: float | None = None,
        rho_b: float | None = None,
        learnable: bool = False,
        solver: TransportSolver | None = None,
        adjoint: LinearSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        self.solver, self.adjoint, self.on_failure, self.learnable = solver, adjoint, on_failure, learnable
        for name, value in zip(_NAMES, (eps, rho_a, rho_b), strict=True):
            if not (value is None and name != "eps"):
                if not isinstance(value, int | float):
                    got = type(value).__name__
                    raise ValueError(f"{name}: expected a number, which learnable=True learns, got {got}")
                if not 0 < value < math.inf:
                    raise ValueError(f"{name}: expected a finite number above 0, got {value}")
                if learnable:
                    log = torch.tensor(math.log(value), device=torch.get_default_device())
                    self.register_parameter(f"log_{name}", nn.Parameter(log))
                    continue
            setattr(self, name, value)

    def forward(self, cost: Tensor | PointCloud, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The plan.

        Args:
            cost: ``(*batch, n, m)``, or a :class:`PointCloud`.
            a: ``(*batch, n)`` or None.
            b: ``(*batch, m)`` or None.

        Returns:
            ``(*batch, n, m)``.
        """
        eps, rho_a, rho_b = (self._strength(name, cost) for name in _NAMES)
        return sinkhorn(
            cost,
            a,
            b,
            eps=eps,
            rho_a=rho_a,
            rho_b=rho_b,
            solver=self.solver,
            adjoint=self.adjoint,
            on_failure=self.on_failure,
        )

    def _strength(self, name: str, like: Tensor | PointCloud) -> Any:
        log = getattr(self, f"log_{name}", None)
        return getattr(self, name) if log is None else log.to(like.dtype).exp()

    def extra_repr(self) -> str:
        """Settings."""
        with torch.no_grad():
            logs = {name: getattr(self, f"log_{name}", None) for name in _NAMES}
            values = [getattr(self, name) if log is None else float(log.exp()) for name, log in logs.items()]
        parts = [f"{name}={value:.4g}" for name, value in zip(_NAMES, values, strict=True) if value is not None]
        parts += ["learnable=True"] if self.learnable else []
        parts += [f"solver={self.solver!r}"] if self.solver is not None else []
        parts += [f"adjoint={self.adjoint!r}"] if self.adjoint is not None else []
        return ", ".join(parts)
