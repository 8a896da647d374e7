"""Clustering with neighbours.

Oracles, written down before the code: scipy's root of the fixed-point equation; the energy, written out with the sum
over pairs, which must fall step by step and whose gradient must be constant on every row; the adjoint equation of the
derivative, solved densely; differences.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import root
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import GMRES, LU
from difflayers.transport import (
    BoundOptimizer,
    SymmetricNewton,
    laplacian_clustering,
    laplacian_clustering_ex,
    transductive_clustering,
    transductive_clustering_ex,
)
from difflayers.transport._laplacian_clustering import _fixed, _Point

D = torch.float64


def problem(n: int = 7, k: int = 3, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, n, k, generator=g, dtype=D), torch.rand(*batch, n, n, generator=g, dtype=D)


def energy(Y: Tensor, unary: Tensor, W: Tensor, lam: float) -> Tensor:
    """The sum over pairs, term by term."""
    total = (unary * Y).sum() + torch.special.xlogy(Y, Y).sum()
    for p in range(len(Y)):
        for q in range(len(Y)):
            total = total - lam / 2 * W[p, q] * (Y[p] * Y[q]).sum()
    return total


def tilt(Y: Tensor, energy_of) -> float:
    """How far the gradient of an energy is from constant on every row, relative to its size."""
    Y = Y.detach().requires_grad_()
    g = torch.autograd.grad(energy_of(Y), Y)[0]
    return float((g - g.mean(-1, keepdim=True)).abs().max())


def plain(unary: Tensor, W: Tensor, lam: float, steps: int) -> Tensor:
    Y = (-unary).softmax(-1)
    for _ in range(steps):
        Y = (-unary + lam * W @ Y).softmax(-1)
    return Y


def test_root_of_the_fixed_point():
    unary, W = problem()
    S = ((W + W.T) / 2).numpy()

    def step(u: np.ndarray) -> np.ndarray:
        U = torch.from_numpy(u).reshape(7, 3)
        return (U + unary - 0.4 * torch.from_numpy(S) @ U.softmax(-1)).numpy().ravel()

    found = root(step, -unary.numpy().ravel(), tol=1e-14)
    expected = torch.from_numpy(found.x).reshape(7, 3).softmax(-1)
    torch.testing.assert_close(laplacian_clustering(unary, W, 0.4), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lam", [0.3, 1.5, 10.0, -4.0])
def test_stationary_and_no_higher_than_the_start(lam):
    unary, W = problem(seed=1)
    Y = laplacian_clustering(unary, W, lam)
    torch.testing.assert_close(Y.sum(-1), torch.ones(7, dtype=D))
    if float(Y.min()) > 1e-12:
        assert tilt(Y, lambda Y: energy(Y, unary, W, lam)) < 1e-7
    start = (-unary).softmax(-1)
    assert float(energy(Y, unary, W, lam)) <= float(energy(start, unary, W, lam))


@pytest.mark.parametrize("lam", [2.0, -6.0])
@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_energy_falls_step_by_step(lam):
    unary, W = problem(seed=2)
    path = [laplacian_clustering(unary, W, lam, solver=BoundOptimizer(max_steps=k)) for k in range(1, 30)]
    values = [float(energy(Y, unary, W, lam)) for Y in path]
    # what is returned is one step ahead of the path, which is not looked at before it is the next point of it
    assert all(min(b, c) <= a + 1e-12 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    assert values[-1] < values[0]


def test_the_energy_that_is_watched_is_that_of_the_pairs():
    unary, W = problem(seed=11)
    W = (W + W.T) / 2
    point = _Point.at(_fixed, (unary.unsqueeze(0),), 0.7 * W.unsqueeze(0), -unary.unsqueeze(0), torch.ones(1, dtype=D))
    expected = energy((-unary).softmax(-1), unary, W, 0.7)
    torch.testing.assert_close(point.energy[0], expected, rtol=1e-12, atol=0)


def test_beyond_contraction_where_plain_steps_alternate():
    unary, W = problem(seed=3)
    W = -(W + W.T) * 4
    one, two = plain(unary, W, 1.0, 1000), plain(unary, W, 1.0, 1001)
    assert float((one - two).abs().max()) > 0.1
    found = laplacian_clustering_ex(unary, W, 1.0)
    assert int(found.status) == Status.CONVERGED
    assert float(found.residual) <= 1e-10
    assert tilt(found.value, lambda Y: energy(Y, unary, W, 1.0)) < 1e-6
    again = (-unary + W @ found.value).softmax(-1)
    torch.testing.assert_close(again, found.value, rtol=0, atol=1e-9)


def test_positive_semidefinite_graphs_are_never_damped():
    unary, W = problem(seed=4)
    W = W.T @ W
    found = laplacian_clustering_ex(unary, W, 0.7)
    torch.testing.assert_close(found.value, plain(unary, W, 0.7, int(found.steps) + 1), rtol=0, atol=1e-12)


def test_only_the_symmetric_part_counts():
    unary, W = problem(seed=5)
    W.requires_grad_()
    values = [laplacian_clustering(unary, M, 0.8) for M in (W, W.mT, (W + W.mT) / 2)]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0, atol=1e-12)
    slope = torch.autograd.grad(values[0][0, 0], W)[0]
    torch.testing.assert_close(slope, slope.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjoint", [None, LU(), GMRES(rtol=1e-13)])
def test_adjoint_equation(adjoint):
    unary, W = problem(30, 4, seed=6)
    W, lam = (W + W.T) / 30, torch.tensor(1.5, dtype=D)
    G = problem(30, 4, seed=7)[0]
    inputs = [t.clone().requires_grad_() for t in (unary, W, lam)]
    Y = laplacian_clustering(*inputs, adjoint=adjoint)
    found = torch.autograd.grad((Y * G).sum(), inputs)
    Y = Y.detach()
    J = torch.zeros(30, 4, 30, 4, dtype=D)
    for i in range(30):
        J[i, :, i, :] = torch.diag(Y[i]) - torch.outer(Y[i], Y[i])
    J = J.reshape(120, 120)
    wide = torch.kron(W, torch.eye(4, dtype=D))
    p = torch.linalg.solve(torch.eye(120, dtype=D) - 1.5 * wide.T @ J, G.flatten())
    q = (J @ p).reshape(30, 4)
    of_W = 1.5 * q @ Y.T
    expected = -q, (of_W + of_W.T) / 2, (q * (W @ Y)).sum()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_second_derivatives():
    unary, W = problem(4, 3, seed=8, batch=(2,))
    lam = torch.tensor([0.5, 2.0], dtype=D)
    inputs = [t.requires_grad_() for t in (unary, W, lam)]
    assert torch.autograd.gradgradcheck(laplacian_clustering, inputs)


def test_forbidden_classes():
    unary, W = problem(seed=9)
    unary[2, 1] = torch.inf
    unary.requires_grad_()
    Y = laplacian_clustering(unary, W, 0.5)
    assert float(Y[2, 1].detach()) == 0
    slope = torch.autograd.grad((Y * Y).sum(), unary)[0]
    assert bool(torch.isfinite(slope).all())
    assert float(slope[2, 1]) == 0


@pytest.mark.parametrize("layer", ["laplacian", "transductive"])
def test_status_of_every_element(layer):
    unary, W = problem(seed=10, batch=(3,))
    unary[1, 0, 0] = torch.nan
    support, labels = torch.eye(3, dtype=D), torch.eye(3, dtype=D)
    few = BoundOptimizer(max_steps=2)
    if layer == "laplacian":
        call, ex, data = laplacian_clustering, laplacian_clustering_ex, (unary, W, 0.9)
    else:
        call, ex, data = transductive_clustering, transductive_clustering_ex, (unary, support, labels, W, 0.9)
    assert ex(*data).status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert ex(*data, solver=few).status.tolist() == [Status.MAX_STEPS, Status.DIVERGED, Status.MAX_STEPS]
    with pytest.warns(SolveWarning, match=f"{layer}_clustering"):
        Y = call(*data, solver=few, on_failure="nan")
    assert torch.isnan(Y).all(-1).all(-1).tolist() == [False, True, False]


def test_points_that_no_class_allows_are_infeasible():
    unary, W = problem(seed=12, batch=(2,))
    unary[1, 3] = torch.inf
    found = laplacian_clustering_ex(unary, W, 0.5)
    assert found.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]
    with pytest.raises(SolveError, match="INFEASIBLE"):
        laplacian_clustering(unary, W, 0.5)


@pytest.mark.parametrize("lam", [1e3, -1e3])
def test_rounding_of_large_logits_is_not_waited_for(lam):
    unary, W = (t.float() for t in problem(seed=13))
    found = laplacian_clustering_ex(unary, W - 0.5, lam)
    assert int(found.status) == Status.CONVERGED
    assert int(found.steps) < 1000
    assert float(found.residual) < 2e-3


def tasks(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=D)
    support, labels = centres + 0.7 * torch.randn(3, 2, generator=g, dtype=D), torch.eye(3, dtype=D)
    query = centres.repeat(4, 1) + 0.5 * torch.randn(12, 2, generator=g, dtype=D)
    W = (-(query[:, None] - query).square().sum(-1)).exp()
    return query, support, labels, W


def test_prototypes_are_stationary_together_with_the_assignment():
    query, support, labels, W = tasks()
    Y = transductive_clustering(query, support, labels, W, 0.6)
    means = (labels.T @ support + Y.T @ query) / (labels.sum(0) + Y.sum(0)).unsqueeze(-1)

    def full(Y: Tensor, m: Tensor) -> Tensor:
        distances = (query[:, None] - m).square().sum(-1)
        return energy(Y, distances, W, 0.6) + (labels * (support[:, None] - m).square().sum(-1)).sum()

    assert tilt(Y, lambda Y: full(Y, means)) < 1e-7
    m = means.clone().requires_grad_()
    assert float(torch.autograd.grad(full(Y, m), m)[0].abs().max()) < 1e-10
    fixed = laplacian_clustering((query[:, None] - means).square().sum(-1), W, 0.6)
    torch.testing.assert_close(fixed, Y, rtol=0, atol=1e-8)


def test_derivatives_with_prototypes():
    query, support, labels, W = tasks(1)
    inputs = (query[:4], support, labels + 0.1, W[:4, :4], torch.tensor(0.6, dtype=D))
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(transductive_clustering, inputs)
    assert torch.autograd.gradgradcheck(transductive_clustering, inputs)


def test_wrong_arguments():
    unary, W = problem()
    for call, message in (
        (lambda: laplacian_clustering(unary, W, "1"), "lam: expected a number or a tensor"),
        (lambda: laplacian_clustering(unary, W.float(), 1.0), "affinity: expected dtype"),
        (lambda: laplacian_clustering(unary[:, :0], W, 1.0), "unary: expected at least one class"),
        (lambda: laplacian_clustering(unary, W * torch.nan, 1.0), "affinity: expected finite"),
        (lambda: transductive_clustering(unary, unary[:0], unary[:0], W, 1.0), "labels: expected at least one class"),
        (lambda: transductive_clustering(unary, unary, -unary.abs(), W, 1.0), "labels: expected weights of at least 0"),
        (lambda: laplacian_clustering(unary, W, 1.0, solver=SymmetricNewton()), r"solver: expected BoundOptimizer\(\)"),
        (lambda: laplacian_clustering(unary, W, 1.0, adjoint="LU"), r"adjoint: expected LU\(\)"),
        (lambda: BoundOptimizer(rtol=-1), "rtol: expected"),
        (lambda: BoundOptimizer(max_steps=0), "max_steps: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
