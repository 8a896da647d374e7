r"""The nuclear norm of a Jacobian: a regulariser that asks a network to be locally of low rank.

.. math:: \|J\|_* = \sum_i \sigma_i(J) = \min_{J = G H} \tfrac12 (\|G\|_F^2 + \|H\|_F^2)

The exact norm is the trace of :math:`S = (J^T J)^{1/2}`, the solution of :math:`S^2 = J^T J`, whose derivatives are
right at repeated singular values, where autograd through the SVD gives NaN. For a network :math:`f = g \circ h` the
right-hand side needs no singular values; at the minimum over g and h it is the norm, and three estimators of it are at
hand.

C. Scarvelis, J. Solomon, Nuclear norm regularization for deep learning, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from difflayers._checks import check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Status
from difflayers.implicit import ImplicitProblem, solution_map
from difflayers.linalg._autodiff import check_inference_mode, forward_mode_lock, opaque

Function = Callable[[Tensor], Tensor]


def jacobian_nuclear_norm(
    function: Function, x: Tensor, *, event_ndim: int = 1, on_failure: OnFailure = "raise"
) -> Tensor:
    """The sum of the singular values of a function's Jacobian, at every element of a batch.

    Args:
        function: Maps ``(*batch, event...)`` to ``(*batch, ...)``, batch elements not seeing each other (a network in
            evaluation mode). Its parameters are differentiated as usual.
        x: ``(*batch, event...)``.
        event_ndim: Trailing dimensions of `x` that make one input.
        on_failure: ``"raise"``, ``"nan"`` (NaN for elements with a Jacobian that is not finite) or ``"ignore"``.

    Returns:
        ``(*batch)`` norms. One vector-Jacobian product for each output, or one Jacobian-vector product for each input,
        whichever are fewer, and one SVD.

    Raises:
        ValueError: For a wrong dtype or a Jacobian that is not finite.

    Differentiable in whatever the Jacobian depends on, to any order as far as `function` is. Right at repeated singular
    values; at zero ones the derivative is the subgradient of least norm, and second derivatives ignore their kink.

    Example:
        >>> import torch
        >>> from difflayers.proximal import jacobian_nuclear_norm
        >>> A = torch.eye(2, requires_grad=True)  # repeated singular values
        >>> norm = jacobian_nuclear_norm(lambda x: x @ A.mT, torch.zeros(2))
        >>> norm, torch.autograd.grad(norm, A)[0]
        (tensor(2., grad_fn=<SumBackward1>), tensor([[1., 0.],
                [0., 1.]]))

    Source: C. Scarvelis, J. Solomon, Nuclear norm regularization for deep learning, 2024, section 3.
    """
    if on_failure != "nan" or event_ndim < 1:
        return nuclear_norm(jacobian(function, x, event_ndim), on_failure)
    # in reverse, 0 * NaN would reach parameters of the function: failed inputs are computed from zeros
    check_tensor("x", x, min_ndim=event_ndim)
    sound = torch.isfinite(x).flatten(x.ndim - event_ndim).all(-1)
    value = nuclear_norm(jacobian(function, torch.where(_widened(sound, x), x, 0), event_ndim), on_failure)
    return torch.where(sound, value, math.nan)


def _widened(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(*t.shape, *[1] * (like.ndim - t.ndim))


def jacobian(function: Function, x: Tensor, event_ndim: int) -> Tensor:
    """``(*batch, outputs, inputs)``, of flattened events."""
    if event_ndim < 1:
        raise ValueError(f"event_ndim: expected at least 1, got {event_ndim}")
    check_tensor("x", x, min_ndim=event_ndim)
    batch = x.ndim - event_ndim
    n = x.shape[batch:].numel()
    check_inference_mode()
    y, pull = vjp(function, x)
    _check_batch(y, x, batch)
    m = y.shape[batch:].numel()
    if m <= n:
        units = torch.eye(m, dtype=y.dtype, device=y.device).reshape((m, *y.shape[batch:]))
        J = vmap(lambda e: pull(e.expand_as(y))[0])(units)  # (m, *batch, event...)
    else:
        units = torch.eye(n, dtype=x.dtype, device=x.device).reshape((n, *x.shape[batch:]))
        with forward_mode_lock:
            J = vmap(lambda e: jvp(function, (x,), (e.expand_as(x),))[1])(units)  # (n, *batch, ...)
    J = J.reshape((len(units), *x.shape[:batch], n if m <= n else m))
    return J.movedim(0, -2) if m <= n else J.movedim(0, -1)


def _check_batch(y: Tensor, x: Tensor, batch: int) -> None:
    if y.shape[:batch] != x.shape[:batch]:
        raise ValueError(
            f"function: expected an output that begins with the batch {tuple(x.shape[:batch])} of x, "
            f"got shape {tuple(y.shape)}"
        )


# ------------------------------------------------------------------------------------------------------- nuclear norm


def nuclear_norm(J: Tensor, on_failure: OnFailure = "raise") -> Tensor:
    """The sum of singular values of ``(*batch, m, n)`` matrices, with derivatives of every order."""
    tall = (J if J.shape[-1] <= J.shape[-2] else J.mT).to(compute_dtype(J.dtype))
    return _root(tall, on_failure).diagonal(dim1=-2, dim2=-1).sum(-1).to(J.dtype)


@opaque
def _root(J: Tensor, on_failure: OnFailure) -> Tensor:
    problem = ImplicitProblem(
        solve=_svd,
        residual=_square,
        linear_solve=_sylvester,
        value_ndim=2,
        arg_ndims=(2,),
        factor_ndims=(2, 1),
        symmetric=True,
        name="jacobian_nuclear_norm",
        arg_names=("Jacobian",),
    )
    return solution_map(problem, (J,), on_failure=on_failure)


def _square(S: Tensor, J: Tensor) -> Tensor:
    return S @ S - J.mT @ J


def _svd(J: Tensor) -> tuple[Tensor, Info, tuple[Tensor, Tensor]]:
    """The root from singular values of J itself: squares would lose the small ones."""
    sound = torch.isfinite(J).flatten(-2).all(-1)
    _, sigma, Vh = torch.linalg.svd(torch.where(sound[..., None, None], J, 0), full_matrices=False)
    S = torch.where(sound[..., None, None], (Vh.mT * sigma.unsqueeze(-2)) @ Vh, math.nan)
    status = torch.where(sound, int(Status.CONVERGED), int(Status.DIVERGED))
    return S, Info(status, torch.zeros_like(status), torch.zeros_like(sigma[..., 0])), (Vh.mT, sigma)


def _sylvester(
    S: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """``S X + X S = rhs`` in the basis of the singular vectors; zero for pairs of singular values that are zero."""
    V, sigma = factors
    sums = sigma.unsqueeze(-1) + sigma.unsqueeze(-2)
    least = torch.finfo(sigma.dtype).eps * max(args[0].shape[-2:]) * sums.amax((-1, -2), keepdim=True)
    inside = V.mT @ rhs @ V
    x = V @ torch.where(sums > least, inside / torch.where(sums > least, sums, 1), 0) @ V.mT
    status = torch.where(torch.isfinite(x).flatten(-2).all(-1), int(Status.CONVERGED), int(Status.DIVERGED))
    return x, Info(status, torch.zeros_like(status), torch.zeros_like(x[..., 0, 0]))


# ---------------------------------------------------------------------------------------------------------- estimators


@dataclass(frozen=True)
class ExactJacobian:
    """Squared Frobenius norms from whole Jacobians: no noise, as many products as outputs."""

    def squared_norm(self, function: Function, x: Tensor, event_ndim: int, generator: torch.Generator | None) -> Tensor:
        """``||J||_F^2`` at every element."""
        return jacobian(function, x, event_ndim).square().sum((-1, -2))


@dataclass(frozen=True)
class Hutchinson:
    """Squared lengths of vector-Jacobian products with normal vectors: unbiased.

    Args:
        samples: Vectors an element.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")

    def squared_norm(self, function: Function, x: Tensor, event_ndim: int, generator: torch.Generator | None) -> Tensor:
        """An estimate of ``||J||_F^2``."""
        many, mean = _repeated(x, event_ndim, self.samples)
        check_inference_mode()
        y, pull = vjp(function, many)
        _check_batch(y, many, many.ndim - event_ndim)
        return mean(pull(_noise(y, generator))[0])


@dataclass(frozen=True)
class Denoising:
    """Squared changes under small noise: values of the function alone, nothing is differentiated twice in training.

    Args:
        sigma: Standard deviation of the noise. The bias is of order ``sigma ** 2``; below about 1e-3 differences of
            float32 numbers lose their digits.
        samples: Perturbations an element.
    """

    sigma: float = 1e-2
    samples: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {self.sigma}")
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")

    def squared_norm(self, function: Function, x: Tensor, event_ndim: int, generator: torch.Generator | None) -> Tensor:
        """An estimate of ``||J||_F^2``."""
        many, mean = _repeated(x, event_ndim, self.samples)
        y = function(many)
        _check_batch(y, many, many.ndim - event_ndim)
        return mean((function(many + self.sigma * _noise(many, generator)) - y) / self.sigma)


def _repeated(x: Tensor, event_ndim: int, samples: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`x` several times along its first dimension, and the mean over the copies of squared lengths of such a batch."""
    batch = x.shape[: x.ndim - event_ndim]
    many = x.repeat(samples, *[1] * (x.ndim - 1)) if batch else x.expand((samples, *x.shape))

    def mean(t: Tensor) -> Tensor:
        return t.reshape((samples, *batch, -1)).square().sum(-1).mean(0)

    return many, mean


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def jacobian_nuclear_penalty(
    outer: Function,
    inner: Function,
    x: Tensor,
    *,
    estimator: ExactJacobian | Hutchinson | Denoising = Denoising(),
    event_ndim: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Half the squared Frobenius norms of the Jacobians of both halves of a network.

    The value ``1/2 (||J_outer(inner(x))||_F^2 + ||J_inner(x)||_F^2)`` is at least the nuclear norm of the Jacobian of
    ``outer(inner(x))``. Training makes them equal: minimising over both halves, as wide between them as the rank, is
    minimising the nuclear norm, without a singular value decomposition.

    Args:
        outer: Maps ``inner(x)`` to the output of the network.
        inner: Maps ``(*batch, event...)`` to ``(*batch, ...)``; batch elements must not see each other.
        x: ``(*batch, event...)``.
        estimator: :class:`Denoising` (the paper's, cheapest), :class:`Hutchinson` or :class:`ExactJacobian`.
        event_ndim: Trailing dimensions of `x` that make one input.
        generator: Of the random numbers.

    Returns:
        ``(*batch)`` penalties.

    Differentiable in whatever the functions depend on.

    Example:
        >>> import torch
        >>> from difflayers.proximal import ExactJacobian, jacobian_nuclear_penalty
        >>> double = lambda x: 2 * x
        >>> jacobian_nuclear_penalty(double, double, torch.zeros(3), estimator=ExactJacobian())
        tensor(12.)

    Source: C. Scarvelis, J. Solomon, Nuclear norm regularization for deep learning, 2024, theorem 3.1 and equation 6.
    """
    check_tensor("x", x, min_ndim=event_ndim)
    hidden = inner(x)
    between = hidden.ndim - (x.ndim - event_ndim)
    first = estimator.squared_norm(inner, x, event_ndim, generator)
    return (first + estimator.squared_norm(outer, hidden, between, generator)) / 2
