r"""Learning features and clusters at once: the rate reduction of a doubly stochastic membership.

.. math:: \max_{Z, C} \; R(Z) - R_c(Z, \Pi), \qquad \Pi = \mathrm{doubly\_stochastic}(C C^T, \gamma)

T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023.
"""

from __future__ import annotations

from torch import Tensor, nn

from difflayers._checks import check_same, check_shape, check_tensor
from difflayers._solution import OnFailure, check_policy
from difflayers.linalg._autodiff import autocast_off

from ._costs import _direction as unit
from ._doubly_stochastic import SymmetricNewton, doubly_stochastic
from ._rate_reduction import check_distortion, rate_reduction


class ManifoldLinearizing(nn.Module):
    """The loss of manifold linearizing and clustering, with two heads of a network as its inputs.

    Both are brought to unit length. The inner products of the second, projected onto doubly stochastic matrices, say
    who is whose neighbour; the loss is minus the rate reduction of the first under that membership. It is minimal
    where each cluster spans a subspace of its own, orthogonal to the others, and fills it.

    Args:
        gamma: Strength of the entropy of the membership, above 0: large for large clusters.
        distortion: As for :func:`rate_reduction`.
        solver: As for :func:`doubly_stochastic`.
        on_failure: As for :func:`doubly_stochastic`.

    Example:
        >>> import torch
        >>> from difflayers.transport import ManifoldLinearizing
        >>> loss = ManifoldLinearizing(gamma=0.2)
        >>> loss
        ManifoldLinearizing(gamma=0.2, distortion=0.5)
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(50, 8, requires_grad=True)
        >>> loss(features, features).backward()
        >>> loss.membership(features.detach()).sum(-1).sub(1).abs().max() < 1e-4
        tensor(True)

    Source: T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023, equations 4 and 5.
    """

    def __init__(
        self,
        *,
        gamma: float,
        distortion: float = 0.5,
        solver: SymmetricNewton | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        check_distortion(distortion)
        if not isinstance(gamma, int | float) or isinstance(gamma, bool) or not 0 < gamma < float("inf"):
            raise ValueError(f"gamma: expected a finite number above 0, got {gamma}")
        if not (solver is None or isinstance(solver, SymmetricNewton)):
            raise ValueError(f"solver: expected SymmetricNewton() or None, got {solver!r}")
        self.gamma, self.distortion, self.solver, self.on_failure = gamma, distortion, solver, on_failure

    def membership(self, clustering: Tensor) -> Tensor:
        """The doubly stochastic membership.

        Args:
            clustering: ``(*batch, n, k)`` the second head.

        Returns:
            ``(*batch, n, n)``.
        """
        check_tensor("clustering", clustering, min_ndim=2)
        with autocast_off(clustering):
            C = unit(clustering)
            affinity = C @ C.mT
        return doubly_stochastic(affinity, self.gamma, solver=self.solver, on_failure=self.on_failure)

    def forward(self, features: Tensor, clustering: Tensor) -> Tensor:
        """The loss, to be minimised.

        Args:
            features: ``(*batch, n, d)`` the first head.
            clustering: ``(*batch, n, k)`` the second head, of the same n inputs.

        Returns:
            ``(*batch)`` minus the rate reduction, in nats.
        """
        check_tensor("features", features, min_ndim=2)
        check_tensor("clustering", clustering, min_ndim=2)
        check_same([("features", features), ("clustering", clustering)])
        check_shape("clustering", clustering.shape[-2:-1], features.shape[-2:-1], " as many rows as features has")
        return -rate_reduction(unit(features), self.membership(clustering), distortion=self.distortion)

    def extra_repr(self) -> str:
        """Settings."""
        parts = [f"gamma={self.gamma}", f"distortion={self.distortion}"]
        parts += [f"solver={self.solver!r}"] if self.solver is not None else []
        return ", ".join(parts)
