"""Conservation against the posterior of a Gaussian by elimination in mpmath, with fifty digits, see
`oracle_conservation`; its derivatives of first and second order by differences of these.
"""

from __future__ import annotations

from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor

from difflayers import SolveError
from difflayers.pde import conservation_operator, conserve
from tests.pde import oracle_conservation
from tests.pde.oracle_least_squares import F64, deviation, randn


def prediction(seed: int, n: int, m: int, full: bool) -> tuple[Tensor, ...]:
    """Mean, covariance, known integrals and rows, the first of which is a trapezoidal rule on uneven points."""
    grid = randn(seed, n).abs().add(0.05).cumsum(0)
    G = torch.cat([conservation_operator(grid), randn(seed + 1, m - 1, n)])
    step = grid.diff()
    weights = torch.cat([step[:1], step[:-1] + step[1:], step[-1:]]) / 2
    assert torch.allclose(G[0], weights, rtol=1e-14)
    L = randn(seed + 2, n, n)
    covariance = L @ L.T + 0.1 * torch.eye(n, dtype=F64) if full else L.diagonal() ** 2
    return 3 * randn(seed + 3, n), covariance, randn(seed + 4, m), G


def matrix(covariance: Tensor) -> Any:
    return oracle_conservation.exact(covariance if covariance.ndim == 2 else torch.diag(covariance))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-8, 0.3])
@pytest.mark.parametrize("m", [1, 3, 5])
def test_posterior_matches_fifty_digits(full: bool, noise: float, m: int) -> None:
    n = 6
    arguments = [*prediction(900 + m, n, m, full), torch.tensor(noise, dtype=F64)]
    exact = [oracle_conservation.exact(arguments[0]), matrix(arguments[1])]
    exact += [oracle_conservation.exact(one) for one in arguments[2:4]] + [mp.mpf(noise)]
    mean, covariance = (oracle_conservation.back(one) for one in oracle_conservation.posterior(*exact))
    if noise:
        other = oracle_conservation.precision_form(*exact)
        assert deviation(oracle_conservation.back(other[0]), mean) < 1e-20 + 1e-15
    x = [one.clone().requires_grad_() for one in arguments]
    u, S = conserve(*x) if noise else conserve(*x[:4])
    forms = (lambda C: C) if full else torch.diagonal
    assert deviation(u.detach(), mean[:, 0]) < 1e-12
    assert float((S.detach() - forms(covariance)).norm() / arguments[1].norm()) < 1e-12
    if not noise:
        assert (arguments[3] @ u.detach() - arguments[2]).abs().max() < 1e-12

    directions = [randn(950 + i, *one.shape) for i, one in enumerate(arguments)]
    directions[1] = directions[1] + directions[1].T if full else directions[1] * arguments[1]
    directions[4] = directions[4] * noise
    moved = [oracle_conservation.exact(directions[0]), matrix(directions[1])]
    moved += [oracle_conservation.exact(one) for one in directions[2:4]] + [mp.mpf(float(directions[4]))]
    bars = randn(960, n), randn(961, *S.shape)
    inputs = x if noise else x[:4]
    for order in (1, 2):
        slopes = [oracle_conservation.back(one) for one in oracle_conservation.along(exact, moved, order)]
        right = slopes[0][:, 0] @ bars[0] + (forms(slopes[1]) * bars[1]).sum()
        out = (u * bars[0]).sum() + (S * bars[1]).sum()
        for _ in range(order):
            gradients = torch.autograd.grad(out, inputs, create_graph=True)
            out = sum((g * d).sum() for g, d in zip(gradients, directions, strict=False))
        size = sum(float((g * d).detach().abs().sum()) for g, d in zip(gradients, directions, strict=False))
        assert abs(float(out.detach() - right)) < 1e-12 * (float(abs(right)) + size) * (1 if order == 1 else 100)


@pytest.mark.parametrize("full", [False, True])
def test_dependent_rows_need_a_noise(full: bool) -> None:
    mean, covariance, b, G = prediction(970, 6, 2, full)
    G, b = torch.cat([G, 2 * G[:1]]), torch.cat([b, 2 * b[:1]])
    with pytest.raises(SolveError, match="SINGULAR"):
        conserve(mean, covariance, b, G)
    u, S = conserve(mean, covariance, b, G, 1e-2)
    exact = [oracle_conservation.exact(mean), matrix(covariance), oracle_conservation.exact(b)]
    right, after = oracle_conservation.posterior(*exact, oracle_conservation.exact(G), mp.mpf(1e-2))
    assert deviation(u, oracle_conservation.back(right)[:, 0]) < 1e-12
    after = oracle_conservation.back(after)
    assert deviation(S, after if full else after.diagonal()) < 1e-12
