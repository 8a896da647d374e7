"""Conjugate directions proposed by a network, for symmetric positive definite maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_finite, check_options, check_tensor
from difflayers._solution import Info

from ._krylov import _dot, _finish, _norm, _scaled
from ._system import LinearSolver, LinearSystem, Params


@dataclass(frozen=True, kw_only=True)
class LearnedDirections(LinearSolver):
    """Conjugate directions from a network (DCDM), for symmetric positive definite maps.

    Each step asks the network for a direction, makes it conjugate to the last two and minimises along it. The error in
    the norm of the map never increases, whatever the network says; with the identity for a network the method is
    conjugate gradients. Where a proposal is not finite or brings nothing new, the residual takes its place. How fast it
    converges is up to the network: a bad one needs many steps, and ends in a warning. The derivative of a solve is that
    of ``A x = b`` and never goes through the network; :meth:`loss` trains it, on :func:`ritz_residuals`.

    Args:
        network: ``fn(r)`` from residuals of unit length ``(*batch, n)`` to directions of that shape, each element
            alone: a function or an ``nn.Module``.
        rtol: Relative tolerance on ``||b - A x||``; None picks it by dtype.
        atol: Absolute tolerance.
        max_steps: Largest number of directions.
        check_every: Steps between read-backs of the stopping flag; None runs `max_steps` without one.

    Source: A. Kaneda et al., A deep conjugate direction method for iteratively solving linear systems, 2023
    (algorithm 1).
    Departure: proposals are made conjugate twice over, against rounding; one in the span of the last two is replaced.
    """

    network: Callable[[Tensor], Tensor]
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    check_every: int | None = 1

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise ValueError(f"network: expected a function of residuals, got {type(self.network).__name__}")
        check_options(self, max_steps=0)

    def loss(self, product: Callable[[Tensor], Tensor], residuals: Tensor) -> Tensor:
        r"""What one step along the proposal leaves of each residual: ``||r - alpha A f(r)||^2``.

        Solves ``alpha = f^T r / f^T A f``, the minimiser of the error along the proposal ``f``.

        Args:
            product: The symmetric positive definite map, ``(*batch, n)`` to that shape.
            residuals: ``(*batch, n)``; brought to unit length.

        Returns:
            ``(*batch)`` losses; the mean over a batch of residuals trains the network.

        Differentiable in the parameters of the network and whatever `product` depends on.
        """
        r = residuals / torch.where(_norm(residuals) > 0, _norm(residuals), 1)
        f = self.network(r)
        Af = product(f)
        curvature = _dot(f, Af)
        flat = curvature == 0  # a proposal, or a residual, of zeros leaves all of the residual
        step = torch.where(flat, 0, _dot(f, r) / torch.where(flat, 1, curvature))
        return (r - step * Af).square().sum(-1)

    def solve(
        self, system: LinearSystem, params: Params, factors: Params, rhs: Tensor, transpose: bool, init: Tensor | None
    ) -> tuple[Tensor, Info]:
        product = system.operator(params, rhs, transpose)
        length, rhs, init, tol = _scaled(rhs, init, self.atol, self.rtol)
        x = torch.zeros_like(rhs) if init is None else init
        r = rhs if init is None else rhs - product(x)
        norm = _norm(r)
        active = norm > tol
        broken, steps = torch.zeros_like(active), torch.zeros(norm.shape, dtype=torch.int64, device=rhs.device)
        nothing = torch.zeros_like(rhs), torch.zeros_like(rhs), torch.ones_like(norm)
        pairs = nothing, nothing  # the last two directions, their images and curvatures
        for k in range(self.max_steps):
            if self.check_every and k % self.check_every == 0 and not bool(active.any()):
                break
            s = r / torch.where(norm > 0, norm, 1)
            q, fit = self._conjugate(self._proposal(s), pairs)
            Aq = product(q)
            a = _dot(q, Aq)
            poor = active & ~(fit & (a > 0))
            if self.check_every is None or bool(poor.any()):
                d, fit = self._conjugate(s, pairs)
                q = torch.where(poor, torch.where(fit, d, s), q)
                Aq = torch.where(poor, product(q), Aq)
                a = torch.where(poor, _dot(q, Aq), a)
            broken = broken | (active & ~(a > 0))
            active = active & ~broken
            a = torch.where(active, a, 1)
            q, Aq = torch.where(active, q, 0), torch.where(active, Aq, 0)
            alpha = _dot(q, r) / a
            x = x + alpha * q
            r = r - alpha * Aq
            pairs = pairs[1], (q, Aq, a)
            steps = steps + active
            norm = _norm(r)
            active = active & (norm > tol)
        return _finish(x, _norm(rhs - product(x)), tol, steps, broken, length, ~active)

    @staticmethod
    def _conjugate(q: Tensor, pairs: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> tuple[Tensor, Tensor]:
        """The part of a proposal that is conjugate to earlier directions, in unit length, and whether there is one."""
        before = _norm(q)
        fit = torch.isfinite(before) & (before > 0)
        q = torch.where(fit, q / torch.where(fit, before, 1), 0)
        for _ in range(2):
            q = q - sum(p * _dot(q, Ap) / a for p, Ap, a in pairs)
        size = _norm(q)
        fit = fit & (size > torch.finfo(q.dtype).eps ** 0.5)  # else rounding is all that is left of it
        return torch.where(fit, q / torch.where(fit, size, 1), 0), fit

    @torch.no_grad()
    def _proposal(self, r: Tensor) -> Tensor:
        q = self.network(r)
        if q.shape != r.shape:
            raise ValueError(f"network: expected directions of shape {tuple(r.shape)}, got {tuple(q.shape)}")
        return q.to(r.dtype)


@torch.no_grad()
def ritz_residuals(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    vectors: int = 64,
    weight: float = 9.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Residuals on which a network learns directions: random mixtures of approximate eigenvectors.

    The iteration leaves most of what belongs to small eigenvalues, which random vectors hardly contain. So Lanczos'
    method finds Ritz vectors, and the lower half of the spectrum gets more weight.

    Args:
        product: The symmetric map, ``(n)`` to that shape.
        start: ``(n)`` vector from which Lanczos begins, for example a right-hand side; says dtype and device.
        count: How many residuals.
        vectors: Ritz vectors, at most n; fewer where the start contains fewer eigenvectors. All are kept in memory.
        weight: Of the lower half, relative to the upper.
        generator: Of the random numbers, on the device of `start`.

    Returns:
        ``(count, n)`` vectors of unit length.

    Raises:
        ValueError: For a start that is zero or not a vector, NaN or Inf, or numbers below 1.

    Not differentiable.

    Example:
        >>> import torch
        >>> from difflayers.linalg import ritz_residuals
        >>> d = torch.linspace(1, 9, 50)
        >>> r = ritz_residuals(lambda v: d * v, torch.ones(50), 10, generator=torch.Generator().manual_seed(0))
        >>> r.shape, bool(((d * r * r).sum(-1) < 4).all())
        (torch.Size([10, 50]), True)

    Source: A. Kaneda et al., A deep conjugate direction method for iteratively solving linear systems, 2023 (section on
    training data); C. Lanczos, 1950.
    Departure: Lanczos vectors are made orthogonal to all earlier ones, twice, so that no Ritz vector is found again.
    """
    check_tensor("start", start, min_ndim=1)
    check_finite([("start", start)])
    for name, number in (("count", count), ("vectors", vectors)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {number!r}")
    length = torch.linalg.vector_norm(start)
    if start.ndim != 1 or not bool(length > 0):
        raise ValueError(f"start: expected a vector that is not zero, got shape {tuple(start.shape)}")
    Q, steps = (start / length).unsqueeze(0), min(vectors, len(start))
    images = []
    while True:
        w = product(Q[-1])
        images.append(w)
        size = torch.linalg.vector_norm(w)
        for _ in range(2):
            w = w - (Q @ w) @ Q
        left = torch.linalg.vector_norm(w)
        if len(Q) == steps or not bool(left > 100 * torch.finfo(w.dtype).eps * size):
            break
        Q = torch.cat([Q, (w / left).unsqueeze(0)])
    T = Q @ torch.stack(images).mT
    _, S = torch.linalg.eigh((T + T.mT) / 2)  # ascending
    c = torch.randn(count, len(Q), generator=generator, dtype=start.dtype, device=start.device)
    c[:, : (len(Q) + 1) // 2] *= weight
    return torch.nn.functional.normalize(c @ (S.mT @ Q), dim=-1)
