"""Directions from a network. Oracles: dense solves, conjugate gradients written down here, the gradient on paper.

Ritz vectors: eigenvectors by numpy where Lanczos has found all, and the weights of their mixtures by medians.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import (
    CG,
    LearnedDirections,
    LinearOperator,
    Tag,
    linear_solve,
    linear_solve_ex,
    ritz_residuals,
)

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


class Cycle(nn.Module):
    """Convolutions on ever coarser lines and back, without activations."""

    def __init__(self, levels=5, channels=4):
        super().__init__()
        stencil = lambda i, o: nn.Conv1d(i, o, 3, padding=1, bias=False)  # noqa: E731
        self.first, self.last = stencil(1, channels), stencil(channels, 1)
        self.down = nn.ModuleList(stencil(channels, channels) for _ in range(levels))
        self.up = nn.ModuleList(stencil(channels, channels) for _ in range(levels))

    def forward(self, r):
        h, kept = self.first(r.unsqueeze(-2)), []
        for down in self.down:
            kept.append(h)
            h = down(nn.functional.avg_pool1d(h, 2))
        for up in self.up:
            h = kept.pop() + up(nn.functional.interpolate(h, scale_factor=2, mode="linear"))
        return self.last(h).squeeze(-2)


def test_poisson_on_a_line_needs_fewer_steps_than_conjugate_gradients():
    """These need as many as there are unknowns, since information moves by one cell a step."""
    n, steps = 64, 200
    ones = torch.ones(n, dtype=F64)
    A = 2 * torch.diag(ones) - torch.diag(ones[1:], 1) - torch.diag(ones[1:], -1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=F64)
    data = ritz_residuals(lambda v: A @ v, start, 128, generator=generator)
    torch.manual_seed(0)
    f = Cycle().double()
    optimiser = torch.optim.Adam(f.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        LearnedDirections(network=f).loss(lambda v: v @ A, data).mean().backward()
        optimiser.step()
        schedule.step()
    b = torch.randn(20, n, generator=generator, dtype=F64)  # held out
    learned, plain = (linear_solve_ex(A, b, solver=s) for s in (LearnedDirections(network=f, rtol=1e-3), CG(rtol=1e-3)))
    assert learned.converged.all() and plain.converged.all()
    assert learned.steps.double().mean() < 0.7 * plain.steps.double().mean()
    assert plain.steps.double().mean() > 55


def test_ritz_vectors_are_eigenvectors_in_the_end():
    """With as many as unknowns; every residual is a mixture, the lower half with nine times the weight."""
    A, start = definite(n=10)
    generator = torch.Generator().manual_seed(0)
    r = ritz_residuals(lambda v: A @ v, start, 4000, generator=generator)
    torch.testing.assert_close(r.norm(dim=-1), torch.ones(4000, dtype=F64))
    _, Q = np.linalg.eigh(A.numpy())
    parts = (r @ torch.tensor(Q)).abs()
    ratios = (parts[:, :5] / parts[:, 5:]).median(0).values  # of two normal numbers: 1
    assert ((ratios > 8) & (ratios < 10)).all()
    parts = (ritz_residuals(lambda v: A @ v, start, 4000, weight=1.0, generator=generator) @ torch.tensor(Q)).abs()
    ratios = (parts[:, :5] / parts[:, 5:]).median(0).values
    assert ((ratios > 0.9) & (ratios < 1.1)).all()


def test_ritz_vectors_of_few_steps_span_the_krylov_space():
    A, start = definite(n=20)
    r = ritz_residuals(lambda v: A @ v, start, 50, vectors=4, generator=torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(r)) == 4
    krylov = torch.stack([torch.linalg.matrix_power(A, k) @ start for k in range(4)])
    krylov = krylov / krylov.norm(dim=-1, keepdim=True)
    assert int(torch.linalg.matrix_rank(torch.cat([krylov, r]), tol=1e-8)) == 4
    again = ritz_residuals(lambda v: A @ v, start, 50, vectors=4, generator=torch.Generator().manual_seed(0))
    assert r.equal(again)


def test_lanczos_ends_with_the_space():
    """Two distinct eigenvalues: two vectors, whatever was asked for. No gradient is recorded."""
    d = torch.tensor([1.0] * 5 + [3.0] * 5, requires_grad=True)
    r = ritz_residuals(lambda v: d * v, torch.ones(10), 7, vectors=8)
    assert r.shape == (7, 10) and r.dtype == torch.float32 and not r.requires_grad
    torch.testing.assert_close(r[:, :5].std(-1) + r[:, 5:].std(-1), torch.zeros(7), rtol=0, atol=1e-6)
    one = ritz_residuals(lambda v: 2 * v, torch.ones(3), 2)
    torch.testing.assert_close(one.abs(), torch.full((2, 3), 3**-0.5))
    for wrong in (torch.zeros(3), torch.ones(2, 3), torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="start: expected"):
            ritz_residuals(lambda v: 2 * v, wrong, 2)
    with pytest.raises(ValueError, match="count: expected an integer of at least 1, got 0"):
        ritz_residuals(lambda v: 2 * v, torch.ones(3), 0)


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


def test_a_residual_or_proposal_of_zeros_has_a_loss():
    residuals = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=torch.float64)
    product = lambda v: 2 * v  # noqa: E731
    assert LearnedDirections(network=lambda r: r).loss(product, residuals).tolist() == [0.0, 0.0]
    assert LearnedDirections(network=torch.zeros_like).loss(product, residuals).tolist() == [0.0, 1.0]
