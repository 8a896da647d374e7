"""Directions from a network. Oracles: dense solves, conjugate gradients written down here, the gradient on paper."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import LearnedDirections, LinearOperator, Tag, linear_solve, linear_solve_ex

F64 = torch.float64


def definite(*batch, n=12, seed=0):
    rng = np.random.default_rng(seed)
    M = torch.tensor(rng.standard_normal((*batch, n, n)))
    return M @ M.mT + torch.eye(n, dtype=F64), torch.tensor(rng.standard_normal((*batch, n)))


def network(n, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n, 20), nn.Tanh(), nn.Linear(20, n)).double()


def conjugate_gradients(A, b, steps):
    x, r = torch.zeros_like(b), b
    p, found = r, []
    for _ in range(steps):
        alpha = (r @ r) / (p @ A @ p)
        x, new = x + alpha * p, r - alpha * (A @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
        found.append(x)
    return found


def stopped(A, b, f, steps):
    return linear_solve_ex(A, b, solver=LearnedDirections(network=f, max_steps=steps)).value


def test_identity_is_conjugate_gradients():
    A, b = definite()
    for k, want in enumerate(conjugate_gradients(A, b, 6), 1):
        torch.testing.assert_close(stopped(A, b, lambda r: r, k), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_never_grows(seed):
    """In the norm of A, for networks that know nothing."""
    A, b = definite(seed=seed)
    exact, f = torch.linalg.solve(A, b), network(12, seed)
    errors = [float(e @ A @ e) for e in (stopped(A, b, f, k) - exact for k in range(12))]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_perfect_network_needs_one_step():
    A, b = definite(3)
    f = lambda r: torch.linalg.solve(A, r)  # noqa: E731
    solution = linear_solve_ex(A, b, solver=LearnedDirections(network=f))
    assert solution.steps.tolist() == [1, 1, 1]
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, b))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_breakdown_falls_back_to_the_residual(bad):
    A, b = definite(n=4)
    A = A + 20 * torch.eye(4, dtype=F64)
    for f in (lambda r: r * bad, lambda r: torch.ones_like(r)):
        solution = linear_solve_ex(A, b, solver=LearnedDirections(network=f))
        assert solution.converged
        torch.testing.assert_close(solution.value, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


def test_the_derivative_does_not_pass_the_network():
    A, b = definite(n=6)
    f = network(6)
    mixed = lambda r: r + 0.01 * f(r)  # noqa: E731
    A.requires_grad_()
    x = linear_solve(A, b, solver=LearnedDirections(network=mixed))
    g = torch.linspace(-1, 1, 6, dtype=F64)
    (got,) = torch.autograd.grad(x, A, g)
    M = A.detach()
    q, y = torch.linalg.solve(M, g), torch.linalg.solve(M, b)
    torch.testing.assert_close(got, -(torch.outer(q, y) + torch.outer(y, q)) / 2, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in f.parameters())


def test_gradient_of_the_loss():
    """The formula of the paper, which is orthogonal to the proposal: its length does not matter."""
    A, r = definite(n=8)
    r = r / r.norm()
    f = torch.tensor(np.random.default_rng(2).standard_normal(8)).requires_grad_()
    solver = LearnedDirections(network=lambda r: f)
    (got,) = torch.autograd.grad(solver.loss(lambda v: v @ A, r), f)
    with torch.no_grad():
        d = A @ f
        alpha = (f @ r) / (f @ d)
        rho = r - alpha * d
        want = -2 * ((rho @ d) * (r - 2 * alpha * d) / (f @ d) + alpha * (A @ rho))
    torch.testing.assert_close(got, want)
    assert abs(float(got @ f.detach())) < 1e-12 * float(got.norm() * f.detach().norm())


class Scaling(nn.Module):
    """A positive factor for every unknown."""

    def __init__(self, n):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(n, dtype=F64))

    def forward(self, r):
        return r * self.log.exp()


def test_training_saves_steps():
    """The network can learn the scales of a badly scaled matrix."""
    n = 60
    d = torch.logspace(0, 1, n, dtype=F64)
    A = d[:, None] * (torch.eye(n, dtype=F64) + 0.3 / n * torch.ones(n, n, dtype=F64)) * d
    f, product = Scaling(n), lambda v: v @ A
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, n, generator=generator, dtype=F64)
    optimiser = torch.optim.Adam(f.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        loss = LearnedDirections(network=f).loss(product, data).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    b = torch.randn(5, n, generator=generator, dtype=F64)
    learned, plain = (linear_solve_ex(A, b, solver=LearnedDirections(network=g)) for g in (f, nn.Identity()))
    assert learned.converged.all() and int(learned.steps.max()) < int(plain.steps.min())


def test_ends():
    A, b = definite(3, n=6)
    solver = LearnedDirections(network=lambda r: r)
    assert (linear_solve(A, 0 * b, solver=solver) == 0).all()
    exact = linear_solve(A, b, solver=LearnedDirections(network=lambda r: r, rtol=1e-13))
    assert (linear_solve_ex(A, b, solver=solver, init=exact).steps == 0).all()
    spoilt = b.clone()
    spoilt[1] = torch.nan
    assert linear_solve_ex(A, spoilt, solver=solver).status.tolist() == [0, Status.DIVERGED, 0]
    with pytest.raises(SolveError, match="SINGULAR"):
        linear_solve(-A, b, solver=solver)
    with pytest.warns(SolveWarning, match="stopped after 1 steps"):
        linear_solve(A, b, solver=LearnedDirections(network=lambda r: r, max_steps=1))


def test_bad_input():
    A, b = definite(n=4)
    solver = LearnedDirections(network=lambda r: r)
    with pytest.raises(ValueError, match="A: expected a symmetric matrix for LearnedDirections"):
        linear_solve(A.tril(), b, solver=solver)
    with pytest.raises(ValueError, match=r"A: expected tags=Tag.POSITIVE_DEFINITE for LearnedDirections"):
        linear_solve(LinearOperator(lambda p, v: v), b, solver=solver)
    operator = LinearOperator(lambda p, v: 2 * v, tags=Tag.POSITIVE_DEFINITE)
    torch.testing.assert_close(linear_solve(operator, b, solver=solver), b / 2)
    with pytest.raises(ValueError, match=r"network: expected directions of shape \(4,\), got \(3,\)"):
        linear_solve(A, b, solver=LearnedDirections(network=lambda r: r[..., :3]))
    with pytest.raises(ValueError, match="network: expected a function"):
        LearnedDirections(network=None)
