r"""Mirror Sinkhorn: convex objectives on transport polytopes, online, one normalisation a step.

.. math:: \min_{P \ge 0} F(P) \quad \text{s.t.} \quad P 1 = a, \; P^T 1 = b

A step multiplies the plan by :math:`\exp(-\eta_t G_t)`, with a gradient or a noisy one, and then makes the row sums
right if t is even, the column sums if it is odd; never both. The plans are averaged, and the average is rounded to the
polytope. The state is the logarithm of the plan: no step is too long for it.

M. Ballu, Q. Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy, settle
from difflayers.linalg._autodiff import autocast_off
from difflayers.proximal._identify import identify
from difflayers.proximal._operands import check_range, per_element

from ._rounding import check_marginals, rounded

Gradient = Callable[[Tensor, int], Tensor]
StepSize = float | Tensor | Callable[[int], Any]


def mirror_sinkhorn(
    gradient: Gradient,
    a: Tensor,
    b: Tensor,
    *,
    steps: int,
    step_size: StepSize,
    averaging: float = 1.0,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """Minimises a convex function of a coupling from its gradients, which may be noisy and arrive one at a time.

    Solves ``argmin_P F(P) s.t. P >= 0, P 1 = a, P^T 1 = b`` to an error of order ``1 / sqrt(steps)``, at the price of
    one gradient and one normalisation a step; the error of the marginals is removed by :func:`round_to_polytope`.

    Args:
        gradient: ``(P, t) -> G`` at the plan P of step ``t = 0, 1, ...``, whose sums are right on one side at least:
            ``(*batch, n, m)``, where there may be more batch dimensions than the masses have; an unbiased estimate will
            do. An entry of ``inf`` forbids that entry from then on, but for what rounding adds at the end: at most the
            residual of :func:`mirror_sinkhorn_ex`. Autograd is as it is outside; P is a constant.
        a: ``(*batch, n)`` masses of the rows, at least 0.
        b: ``(*batch, m)`` masses of the columns, at least 0, with the total of `a`.
        steps: Number of steps, at least 1; no other rule stops.
        step_size: Number above 0, or one for every element, ``(*batch)``: step t then has ``step_size / sqrt(t + 1)``.
            Or a function of t, whose value is taken as it is. Its unit is one over that of the gradient; for a
            gradient with a range of R, ``1 / R`` to ``10 / R`` is a good start, less where it is noisy.
        averaging: Weight of the plan after step t in the average, ``(t + 1) ** averaging``, at least 0. With 0, as in
            the paper, all plans count alike, and the first ones are seen in the result for long.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, n, m)`` the rounded average of the plans.

    Raises:
        ValueError: For shapes that do not fit, negative masses, totals that differ, and gradients that are no tensors.
        SolveError: For elements where NaN came up, or where all entries of a row or a column are forbidden.

    Not differentiable: no gradient flows to anything, also not to what `gradient` uses. A differentiable result takes
    an entropy: the minimiser of ``F(P) + eps KL(P | a b^T)`` is ``sinkhorn(G, a, b, eps=eps)`` at the root of
    ``G - grad F(sinkhorn(G, a, b, eps=eps), theta)``, and :func:`difflayers.implicit.root_find` has the exact
    derivative of that root in `theta`, `a` and `b`, where it finds it: the curvature of F should not be much above
    ``eps / P``.

    Example:
        >>> import torch
        >>> from difflayers.transport import mirror_sinkhorn
        >>> target = torch.tensor([[0.4, 0.3], [0.0, 0.1]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> mirror_sinkhorn(lambda P, t: P - target, half, half, steps=1000, step_size=1.0)  # the nearest, in squares
        tensor([[0.2997, 0.2003],
                [0.2003, 0.2997]])

    Source: M. Ballu, Q. Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023, algorithm 1.
    Departure: the average weighs later plans more, `averaging`; with noise and without, its error was smaller.
    """
    return _run(gradient, a, b, steps, step_size, averaging, on_failure).value


def mirror_sinkhorn_ex(
    gradient: Gradient, a: Tensor, b: Tensor, *, steps: int, step_size: StepSize, averaging: float = 1.0
) -> Solution[Tensor]:
    """As :func:`mirror_sinkhorn`, as an unchecked :class:`~difflayers.Solution`.

    Args:
        gradient: Gradient.
        a: Masses of the rows.
        b: Masses of the columns.
        steps: Number of steps.
        step_size: Step size.
        averaging: Exponent of the weights.

    Returns:
        The plan, the status of each element (all steps are taken, so that it is ``CONVERGED`` where the numbers are
        finite), the steps, and the L1 error that the sums of the average had before rounding, relative to its mass.
    """
    return _run(gradient, a, b, steps, step_size, averaging, "ignore")


def _run(
    gradient: Gradient,
    a: Tensor,
    b: Tensor,
    steps: int,
    step_size: StepSize,
    averaging: float,
    on_failure: OnFailure,
) -> Solution[Tensor]:
    check_policy(on_failure)
    if not callable(gradient):
        raise ValueError(f"gradient: expected a function of the plan and the step, got {type(gradient).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps}")
    if isinstance(averaging, bool) or not isinstance(averaging, int | float) or not 0 <= averaging < math.inf:
        raise ValueError(f"averaging: expected a finite number of at least 0, got {averaging!r}")
    check_marginals(a, b)
    length = _schedule(step_size)
    dtype, work = a.dtype, compute_dtype(a.dtype)
    a, b = a.detach().to(work), b.detach().to(work)
    with autocast_off(a):
        mean = _average(gradient, a, b, steps, length, averaging, dtype)
        error = ((mean.sum(-1) - a).abs().sum(-1) + (mean.sum(-2) - b).abs().sum(-1)) / a.sum(-1).clamp(min=_tiny(a))
        plan = rounded(mean, a, b)

        def settled(plan: Tensor, error: Tensor) -> tuple[Tensor, ...]:
            status = torch.where(torch.isfinite(error), int(Status.CONVERGED), int(Status.DIVERGED))
            info = Info(status, torch.full_like(status, steps), error)
            return settle(plan, info, on_failure, name="mirror_sinkhorn"), *info

        plan, *info = identify(settled, plan, error, ndims=(2, 0), found_ndims=(2, 0, 0, 0))
    return Solution(plan.to(dtype), *info)


def _average(
    gradient: Gradient,
    a: Tensor,
    b: Tensor,
    steps: int,
    length: Callable[[int], Any],
    averaging: float,
    dtype: torch.dtype,
) -> Tensor:
    """The mean of the plans; `log_P` is the state."""
    n, m = a.shape[-1], b.shape[-1]
    log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)
    log_P = log_a + log_b
    mean, total = torch.zeros_like(log_P), 0.0
    for t in range(steps):
        G = gradient(log_P.exp().to(dtype), t)
        if not isinstance(G, Tensor) or not G.is_floating_point():
            got = G.dtype if isinstance(G, Tensor) else type(G).__name__
            raise ValueError(f"gradient: expected a floating-point tensor, got {got}")
        if G.ndim < 2:
            raise ValueError(f"gradient: expected at least 2 dimensions, got shape {tuple(G.shape)}")
        check_shape("gradient", G.shape[-2:], (n, m), " in its last dimensions as the plan has")
        eta = length(t)
        if not isinstance(eta, Tensor | int | float):
            raise ValueError(f"step_size: expected a function that returns numbers, got {type(eta).__name__}")
        if isinstance(eta, Tensor):
            batches = (
                ("a", tuple(log_P.shape[:-2])),
                ("gradient", tuple(G.shape[:-2])),
                ("step_size", tuple(eta.shape)),
            )
            broadcast_batch(batches)
        eta = eta.detach().to(log_P)[..., None, None] if isinstance(eta, Tensor) else eta
        # what is zero stays zero, also where the gradient is not finite there
        log_P = torch.where(torch.isneginf(log_P), log_P, log_P - eta * G.detach().to(log_P))
        log_P = _normalised(log_P, log_a, -1) if t % 2 == 0 else _normalised(log_P, log_b, -2)
        total = total * (t / (t + 1)) ** averaging + 1  # all weights over that of this step, which may be huge
        mean = mean + (log_P.exp() - mean) / total
    return mean


def _normalised(log_P: Tensor, log_mass: Tensor, dim: int) -> Tensor:
    """Sums over `dim` made right; those that must be zero are."""
    off = log_mass - log_P.logsumexp(dim, keepdim=True)
    return log_P + torch.where(torch.isneginf(log_mass), 0, off)


def _schedule(step_size: StepSize) -> Callable[[int], Any]:
    if callable(step_size):
        return step_size
    if isinstance(step_size, Tensor):
        check_tensor("step_size", step_size)
        check_range(per_element("step_size", step_size, above=0))
    elif isinstance(step_size, bool) or not isinstance(step_size, int | float) or not 0 < step_size < math.inf:
        raise ValueError(f"step_size: expected a finite number above 0, a tensor or a function, got {step_size!r}")
    return lambda t: step_size / math.sqrt(t + 1)


def _tiny(t: Tensor) -> float:
    return torch.finfo(t.dtype).tiny
