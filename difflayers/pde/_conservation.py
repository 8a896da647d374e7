r"""Conservation laws imposed on a predicted field and its uncertainty.

.. math:: \min_u \tfrac12 \|u - \mu\|^2_{\Sigma^{-1}} + \tfrac1{2\sigma^2} \|G u - b\|^2, \qquad
    \tilde\mu = \mu - \Sigma G^T P^{-1} (G \mu - b), \quad \tilde\Sigma = \Sigma - \Sigma G^T P^{-1} G \Sigma, \quad
    P = \sigma^2 I + G \Sigma G^T

A network predicts a Gaussian; the rows of G integrate the field, b is what is known about the integrals. The correction
goes where the network is unsure: at fronts.

D. Hansen, D. C. Maddix, S. Alizadeh, G. Gupta, M. W. Mahoney, Learning Physical Models that Can Respect Conservation
Laws, 2023.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque, physical

from ._conservation_problem import DIAGONAL, FULL, NAMES, log_likelihood

Rule = Literal["trapezoid", "left", "right", "periodic"]


def conserve(
    mean: Tensor,
    covariance: Tensor,
    b: Tensor,
    G: Tensor,
    noise: float | Tensor = 0.0,
    *,
    on_failure: OnFailure = "raise",
) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of a Gaussian prediction, given that its integrals are known.

    Solves ``argmin_u 1/2 ||u - mean||^2`` in the norm of the inverse covariance, plus ``1/(2 noise) ||G u - b||^2``, or
    subject to ``G u = b`` where the noise is 0, and updates the covariance: Bayes' rule for a Gaussian.

    Args:
        mean: ``(*batch, n)`` predicted field.
        covariance: ``(*batch, n)``, a diagonal (variances, at least 0), or ``(*batch, n, n)``, symmetric positive
            semidefinite, of which the symmetric part is used. A vector ``(n,)`` serves any batch; otherwise there are
            as many batch dimensions as `mean` has, some of size 1 perhaps.
        b: ``(*batch, m)`` known integrals.
        G: ``(*batch, m, n)`` rows that integrate, see :func:`conservation_operator`.
        noise: Variance of `b`, at least 0: a number, or a tensor ``(*batch)``. 0: the equations hold to rounding.
        on_failure: ``"raise"``, ``"nan"`` (for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n)`` mean, and the covariance in the form it was given. Of a diagonal covariance only the diagonal of
        the result is returned; no n x n matrix is formed.

    Raises:
        ValueError: For a negative variance or noise, a shape that does not fit, a wrong dtype, NaN or Inf, naming the
            argument.
        SolveError: ``SINGULAR`` where ``noise I + G covariance G^T`` is singular to rounding: with noise 0, rows of `G`
            that depend on each other, or that see no entry with a variance (drop rows, or pass a small noise); and
            where a variance comes out negative, because the covariance was not positive semidefinite.

    Differentiable in every argument, to any order, forward and reverse, with the factorisation of the forward pass.

    Example:
        >>> import torch
        >>> from difflayers.pde import conserve
        >>> mean, variance = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 3.0])
        >>> conserve(mean, variance, torch.tensor([10.0]), torch.ones(1, 3))
        (tensor([1., 3., 6.]), tensor([0.0000, 0.7500, 0.7500]))

    Source: D. Hansen, D. C. Maddix, S. Alizadeh, G. Gupta, M. W. Mahoney, Learning Physical Models that Can Respect
    Conservation Laws, 2023, section 3. Their HardC, the nearest field in the plain norm, is
    ``conserve(mean, torch.ones_like(mean), b, G)[0]``.

    Departure: the noise of several rows is independent (a multiple of the identity; the authors' program fills the
    matrix with ones), and the result keeps the dtype of the input, so that float64 conserves to 1e-15 or so.
    """
    check_policy(on_failure)
    call = _Call(mean, covariance, b, G, noise, on_failure)
    return call.present(_value(call.problem, call.args, on_failure))


def conserve_ex(
    mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: float | Tensor = 0.0
) -> Solution[tuple[Tensor, Tensor]]:
    """As :func:`conserve`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        mean: Predicted field.
        covariance: Diagonal or matrix.
        b: Known integrals.
        G: Rows that integrate.
        noise: Variance of `b`.

    Returns:
        Mean and covariance with status, steps and the norm by which the equations are missed, for every element.
    """
    call = _Call(mean, covariance, b, G, noise, "ignore")
    found = _solution(call.problem, call.args)
    return Solution(call.present(found.value), found.status, found.steps, found.residual)


def conserved_log_likelihood(
    u: Tensor, mean: Tensor, covariance: Tensor, b: Tensor, G: Tensor, noise: float | Tensor = 0.0
) -> Tensor:
    r"""The log-density of a field under the corrected prediction: a loss to train a network through the layer with.

    Computes ``log N(u; mean, covariance) + log N(b; G u, noise I) - log N(b; G mean, noise I + G covariance G^T)``, by
    Bayes' rule the log-density of `u` under what :func:`conserve` returns as a full covariance. With noise 0 that
    covariance is singular and the density lives on the fields with ``G u = b``: the middle term, which is infinite
    there, is left out, and what remains is that density up to a constant of `G` alone. `u` then has to satisfy the
    equations to rounding, which is not checked: elsewhere the value means nothing and has no upper bound in `mean`.
    Where `b` is known exactly and the rows are a quadrature, pass ``u @ G.mT`` for `b` in training, or a noise of the
    size of the squared error of the quadrature.

    With noise 0 the value is the log-density of `u` under the prediction less that of the integrals of `u`, and stays
    the same as `mean` moves along ``covariance G^T``. A network trained by it alone lets the integrals of its
    predictions drift, and has to shape an ever larger correction by its variances: add a term that holds ``G mean``
    to `b` loosely, or begin with a network trained without the layer (as in the authors' published experiments, which
    apply it behind a trained network only).

    Args:
        u: ``(*batch, n)`` true field.
        mean: ``(*batch, n)`` predicted one.
        covariance: As in :func:`conserve`, positive definite.
        b: ``(*batch, m)`` known integrals.
        G: ``(*batch, m, n)`` rows that integrate.
        noise: Variance of `b`: a number at least 0, or a tensor ``(*batch)`` above 0.

    Returns:
        ``(*batch)`` log-densities.

    Raises:
        ValueError: As :func:`conserve`.
        SolveError: For a covariance that is singular or not positive definite, or rows that depend on each other.

    Differentiable in every argument, to any order, forward and reverse.

    Example:
        >>> import torch
        >>> from difflayers.pde import conserved_log_likelihood
        >>> u, mean = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> conserved_log_likelihood(u, mean, torch.ones(2), torch.tensor([3.0]), torch.ones(1, 2))
        tensor(-0.8224)

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, section 3.

    Departure: the known integrals enter as they were given, so that noisy ones can be; the authors' program takes
    those of `u`.
    """
    call = _Call(mean, covariance, b, G, noise, "raise")
    compiling = torch.compiler.is_compiling()
    if isinstance(noise, Tensor) and not compiling and bool((physical(noise) == 0).any()):
        raise ValueError("noise: expected the number 0, or a tensor above 0 (another density), got a tensor with zeros")
    dtype = check_tensor("u", u, min_ndim=1).dtype
    check_same([("mean", mean), ("u", u)])
    check_shape("u", tuple(u.shape[-1:]), tuple(mean.shape[-1:]), " in its last dimension as mean has")
    broadcast_batch([("mean", tuple(mean.shape[:-1])), ("u", tuple(u.shape[:-1]))])
    u = lifted_under_autocast(u).to(call.dtype)
    with autocast_off(u):
        value = log_likelihood(u, *call.args, call.diagonal, bool(isinstance(noise, Tensor) or noise > 0))
    return value.to(dtype)


def conservation_operator(
    grid: Tensor, rule: Rule = "trapezoid", *, period: float | None = None, slices: int | None = None
) -> Tensor:
    r"""The row of quadrature weights that integrates a field on a grid: the `G` of :func:`conserve`.

    Args:
        grid: ``(*batch, n)`` points in increasing order, at least 2, with any spacing.
        rule: ``"trapezoid"``; ``"left"`` or ``"right"``, the Riemann sums that take a cell's value from that end of it;
            ``"periodic"``, the trapezoidal rule on a circle.
        period: Length of the circle, larger than ``grid[-1] - grid[0]``; for the periodic rule alone.
        slices: None: one row. A number T: one row for each of T time slices that lie behind each other in one vector of
            T n entries. Where slices are uncorrelated, one row and a batch dimension for time is the same, and cheaper.

    Returns:
        ``(*batch, 1, n)``, or ``(*batch, T, T n)`` with the row in T blocks.

    Raises:
        ValueError: For points that do not increase, fewer than 2, a rule that does not exist, a period that is missing
            or too short, or given to another rule.

    Differentiable in `grid`, to any order: the weights are linear in it.

    Example:
        >>> import torch
        >>> from difflayers.pde import conservation_operator
        >>> conservation_operator(torch.tensor([0.0, 1.0, 3.0]))
        tensor([[0.5000, 1.5000, 1.0000]])

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023, section 3 and
    appendix (there equispaced; trapezoid and right Riemann).
    """
    check_tensor("grid", grid, min_ndim=1)
    if rule not in ("trapezoid", "left", "right", "periodic"):
        raise ValueError(f'rule: expected "trapezoid", "left", "right" or "periodic", got {rule!r}')
    if slices is not None and (isinstance(slices, bool) or not isinstance(slices, int) or slices < 1):
        raise ValueError(f"slices: expected None or an integer of at least 1, got {slices!r}")
    if grid.shape[-1] < 2:
        raise ValueError(f"grid: expected at least 2 points, got {grid.shape[-1]}")
    if (period is None) == (rule == "periodic"):
        expected = "a length for the periodic rule" if period is None else f"None for the rule {rule!r}"
        raise ValueError(f"period: expected {expected}, got {period}")
    if period is not None and not (isinstance(period, int | float) and math.isfinite(period)):
        raise ValueError(f"period: expected a length, got {period!r}")
    widths = grid.diff(dim=-1)
    if not torch.compiler.is_compiling():
        check_finite([("grid", physical(grid))])
        _increasing(physical(widths))
    pad = torch.nn.functional.pad
    if rule == "periodic":
        assert period is not None
        last = period - (grid[..., -1:] - grid[..., :1])
        if not torch.compiler.is_compiling() and not last.is_meta and not bool((physical(last) > 0).all()):
            raise ValueError(f"period: expected more than the length of the grid, got {period}")
        around = torch.cat([widths, last], -1)
        row = (around + torch.cat([last, widths], -1)) / 2
    elif rule == "left":
        row = pad(widths, (0, 1))
    elif rule == "right":
        row = pad(widths, (1, 0))
    else:
        row = (pad(widths, (0, 1)) + pad(widths, (1, 0))) / 2
    if slices is None:
        return row.unsqueeze(-2)
    eye = torch.eye(slices, dtype=row.dtype, device=row.device)
    return (eye.unsqueeze(-1) * row[..., None, None, :]).flatten(-2)


class Conservation(nn.Module):
    r"""Known integrals imposed on the prediction of a network: the last layer of one that predicts mean and variance.

    Args:
        G: ``(m, n)`` rows that integrate, see :func:`conservation_operator`; kept as a buffer, or as a parameter if it
            is one.
        noise: Variance of the known integrals, at least 0; 0: the equations hold to rounding.
        on_failure: As in :func:`conserve`.

    Shape:
        ``layer(mean, covariance, b)`` with mean ``(*batch, n)``, covariance ``(*batch, n)`` or ``(*batch, n, n)`` and b
        ``(*batch, m)``; returns mean and covariance in these shapes.

    Example:
        >>> import torch
        >>> from difflayers.pde import Conservation, conservation_operator
        >>> grid = torch.linspace(0, 1, 5)
        >>> layer = Conservation(conservation_operator(grid))
        >>> mean, variance = layer(torch.ones(5), torch.ones(5), torch.tensor([0.5]))
        >>> torch.trapezoid(mean, grid)
        tensor(0.5000)

    Source: D. Hansen and others, Learning Physical Models that Can Respect Conservation Laws, 2023.
    """

    G: Tensor

    def __init__(self, G: Tensor, noise: float = 0.0, *, on_failure: OnFailure = "raise") -> None:
        super().__init__()
        check_policy(on_failure)
        check_tensor("G", G, min_ndim=2)
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise ValueError(f"noise: expected a number of at least 0, got {noise!r}")
        if isinstance(G, nn.Parameter):
            self.G = G
        else:
            self.register_buffer("G", G)
        self.noise, self.on_failure = float(noise), on_failure

    def extra_repr(self) -> str:
        """Equations, entries and noise."""
        m, n = self.G.shape[-2:]
        return f"{m}, {n}, noise={self.noise:g}"

    def forward(self, mean: Tensor, covariance: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance that respect the known integrals."""
        return conserve(mean, covariance, b, self.G, self.noise, on_failure=self.on_failure)


# --------------------------------------------------------------------------------------------------------------- parts


@opaque
def _value(problem: ImplicitProblem, args: tuple[Tensor, ...], on_failure: OnFailure) -> Tensor:
    with autocast_off(args[0]):
        return solution_map(problem, args, on_failure=on_failure)


@opaque
def _solution(problem: ImplicitProblem, args: tuple[Tensor, ...]) -> Solution[Tensor]:
    with autocast_off(args[0]):
        return solution_map_ex(problem, args)


class _Call:
    """Checked arguments in the dtype of the solve, and the problem they belong to."""

    def __init__(self, mean: Any, covariance: Any, b: Any, G: Any, noise: Any, on_failure: OnFailure) -> None:
        self.given = check_tensor("mean", mean, min_ndim=1).dtype
        n = mean.shape[-1]
        check_tensor("covariance", covariance, min_ndim=1)
        check_tensor("b", b, min_ndim=1)
        check_tensor("G", G, min_ndim=2)
        if not isinstance(noise, Tensor):
            if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
                raise ValueError(f"noise: expected a tensor or a number of at least 0, got {noise!r}")
            noise = mean.new_full((), noise)
        check_tensor("noise", noise)
        self.diagonal = covariance.ndim in (1, mean.ndim)
        event = (n,) if self.diagonal else (n, n)
        if (
            covariance.ndim not in (1, mean.ndim, mean.ndim + 1)
            or covariance.shape[covariance.ndim - len(event) :] != event
        ):
            raise ValueError(
                f"covariance: expected shape {(*mean.shape[:-1], n)} (a diagonal) or {(*mean.shape[:-1], n, n)} for a "
                f"mean of shape {tuple(mean.shape)}, got {tuple(covariance.shape)}"
            )
        check_shape("G", tuple(G.shape[-2:]), (b.shape[-1], n), f" behind its batch, for b {tuple(b.shape)}")
        args = [lifted_under_autocast(t) for t in (mean, covariance, b, G, noise)]
        check_same(zip(NAMES, args, strict=True))
        self.problem = DIAGONAL if self.diagonal else FULL
        ndims = self.problem.arg_ndims or ()
        broadcast_batch([(name, tuple(t.shape[: t.ndim - k])) for name, t, k in zip(NAMES, args, ndims, strict=True)])
        if on_failure != "ignore":
            variances = covariance if self.diagonal else covariance.diagonal(dim1=-2, dim2=-1)
            _not_negative("covariance", variances, "variances")
            _not_negative("noise", noise, "variances")
        self.dtype = compute_dtype(self.given)
        mean, covariance, b, G, noise = (t.to(self.dtype) for t in args)
        if not self.diagonal:
            covariance = (covariance + covariance.mT) / 2
        self.args = (mean, covariance, b, G, noise)

    def present(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance without the multipliers, in the caller's dtype."""
        n, m = self.args[3].shape[-1], self.args[3].shape[-2]
        if self.diagonal:
            mean, covariance = value[..., :n], value[..., n + m : 2 * n + m]
        else:
            mean, covariance = value[..., :n, 0], value[..., :n, 1:]
        return mean.to(self.given), covariance.to(self.given)


def _increasing(widths: Tensor) -> None:
    if not widths.is_meta and not bool((widths > 0).all()):
        raise ValueError(f"grid: expected increasing points, got a step of {float(widths.min()):g}")


def _not_negative(name: str, numbers: Tensor, what: str) -> None:
    """Refuses numbers below 0; NaN is left to the solve, where it is one element's failure. Reads one flag."""
    plain = physical(numbers)
    if plain.is_meta or torch.compiler.is_compiling():
        return
    if bool((plain < 0).any()):
        raise ValueError(f"{name}: expected {what} of at least 0, got {float(plain[plain < 0].min()):g}")
