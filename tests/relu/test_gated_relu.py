"""Gated ReLU networks against other ways to train them.

Oracles: cvxpy with Clarabel for the optimal value; central differences of re-solved problems, whose patterns follow
the data, for derivatives; scikit-learn's Lasso where there is one feature; linear programs and brute force for pruning.
"""

import itertools
import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.relu import (
    FISTA,
    Gates,
    Logistic,
    Squared,
    beta_max,
    convex_gated_relu,
    convex_gated_relu_ex,
    enumerate_gates,
    from_network,
    minimal_network,
    predict,
    sample_gates,
    to_network,
)
from difflayers.relu._block_hessian import Blocks
from difflayers.relu._gated_interior import interior_point
from difflayers.relu._gated_task import GatedTask


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, n: int, d: int, count: int, logistic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data with a bend, labels, weights, gates."""
    X, noise = normal(seed, n, d), normal(seed + 1, n)
    y = torch.sin(2 * X[:, 0]) + X[:, -1].abs() + 0.3 * noise
    gates = normal(seed + 2, count, d)
    return X, (y - y.mean()).sign() if logistic else y, 0.5 + normal(seed + 3, n).abs(), gates


def clarabel(X: Tensor, y: Tensor, s: Tensor, beta: float, G: Tensor, logistic: bool) -> float:
    u = cp.Variable((len(G), X.shape[1]))
    mask = (X @ G.mT >= 0).double().numpy()
    f = cp.sum(cp.multiply(mask, X.numpy() @ u.T), axis=1)
    each = cp.logistic(-cp.multiply(y.numpy(), f)) if logistic else cp.square(f - y.numpy()) / 2
    task = cp.Problem(cp.Minimize(s.numpy() @ each + beta * cp.sum(cp.norm(u, axis=1))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(task.value)


CASES = [
    # samples, inputs, gates, beta over beta_max
    (20, 2, 8, 0.1),
    (20, 2, 40, 0.01),  # the active-set search gets lost, the interior point does not
    (30, 4, 80, 0.001),
    (12, 3, 40, 0.3),
    (60, 3, 10, 0.05),  # the Hessian itself is the smaller system
    (15, 2, 6, 0.999),
]


@pytest.mark.parametrize("logistic", [False, True], ids=["squared", "logistic"])
@pytest.mark.parametrize(("n", "d", "count", "fraction"), CASES)
def test_value_is_that_of_clarabel(n: int, d: int, count: int, fraction: float, logistic: bool):
    X, y, s, G = problem(n, n, d, count, logistic)
    loss = Logistic() if logistic else Squared()
    beta = fraction * float(beta_max(X, y, G, sample_weight=s, loss=loss))
    found = convex_gated_relu(X, y, beta, G, sample_weight=s, loss=loss)
    expected = clarabel(X, y, s, beta, G, logistic)
    assert math.isclose(float(found.objective), expected, rel_tol=1e-7)
    assert 0 <= float(found.gap) <= 1e-9 * expected
    # the certificate is true: nobody is below it
    assert float(found.objective - found.gap) <= expected * (1 + 1e-9)
    assert int((found.v != 0).any(-1).sum()) <= n
    f = predict(found, X)
    each = torch.nn.functional.softplus(-y * f) if logistic else (f - y) ** 2 / 2
    assert torch.isclose((s * each).sum() + beta * found.v.norm(dim=-1).sum(), found.objective, rtol=1e-12)


def test_gap_is_a_true_bound_far_from_the_optimum():
    X, y, s, G = problem(5, 20, 2, 12, False)
    best = float(convex_gated_relu(X, y, 0.5, G, sample_weight=s).objective)
    with pytest.warns(SolveWarning):
        found = convex_gated_relu(X, y, 0.5, G, sample_weight=s, solver=FISTA(max_steps=2))
    assert float(found.gap) > 1e-3
    assert float(found.objective - found.gap) <= best <= float(found.objective)


@pytest.mark.parametrize("loss", [Squared(), Logistic()])
def test_beta_max_is_where_the_network_vanishes(loss):
    X, y, s, G = problem(3, 15, 3, 9, isinstance(loss, Logistic))
    top = beta_max(X, y, G, sample_weight=s, loss=loss)
    X.requires_grad_()
    above = convex_gated_relu(X, y, top * 1.000001, G, sample_weight=s, loss=loss)
    assert not above.v.any()
    assert not torch.autograd.grad(above.v.sum(), X)[0].any()
    below = convex_gated_relu(X, y, top * 0.999, G, sample_weight=s, loss=loss)
    assert below.v.any()


def test_one_feature_is_a_lasso():
    X, y = normal(1, 40, 1), normal(2, 40)
    gates = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    v = convex_gated_relu(X, y, 0.8, gates).v
    columns = torch.cat([X.relu(), -(-X).relu()], 1)
    model = Lasso(alpha=0.8 / 40, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(columns.numpy(), y.numpy())
    assert torch.allclose(v.squeeze(-1), torch.from_numpy(model.coef_), atol=1e-9)


@pytest.mark.parametrize("logistic", [False, True], ids=["squared", "logistic"])
@pytest.mark.parametrize(("n", "d", "count"), [(8, 2, 6), (30, 2, 5), (6, 4, 12)])
def test_derivatives_are_those_of_solving_again(n: int, d: int, count: int, logistic: bool):
    X, y, s, G = problem(n + 10 * d, n, d, count, logistic)
    loss = Logistic() if logistic else Squared()
    beta = 0.15 * beta_max(X, y, G, sample_weight=s, loss=loss)
    query = normal(9, 5, d)
    data = [t.clone().requires_grad_() for t in (X, y, s, beta)]

    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        found = convex_gated_relu(X, y, beta, G, sample_weight=s, loss=loss)
        return (predict(found, query) * torch.arange(1.0, 6.0, dtype=torch.float64)).sum(), found.objective

    for which, tol in ((0, 1e-6), (1, 1e-8)):
        found = torch.autograd.grad(run(*data)[which], data)
        for i, (t, g) in enumerate(zip(data, found, strict=True)):
            way, h = normal(20 + i, *t.shape), 1e-5
            ends = [[x + sign * h * way if x is t else x for x in data] for sign in (1, -1)]
            with torch.no_grad():
                difference = (run(*ends[0])[which] - run(*ends[1])[which]) / (2 * h)
            assert torch.isclose((g * way).sum(), difference, rtol=tol, atol=tol), (which, i)


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("n", [40, 9])
def test_both_forms_of_the_hessian_are_the_hessian(n: int, zeros: int):
    B, d, P = 2, 3, 5
    X, M, u = normal(0, B, n, d), (normal(1, B, n, P) > 0).double(), normal(2, B, P, d)
    beta, curvature = 0.5 + normal(3, B).abs(), normal(4, B, n).abs()
    curvature[:, :zeros] = 0
    index, used = torch.tensor([[0, 2, 4, 1], [1, 3, 0, 2]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    blocks = Blocks.of(X, M, u, beta, curvature, index, used)
    assert blocks.direct == (n == 40)
    g = normal(5, 2, B, 4, d) * used.unsqueeze(-1)
    q = blocks.solve(blocks.factorise(), g, refinements=0)
    for b in range(B):
        k = int(used[b].sum())
        H = torch.zeros(k * d, k * d, dtype=torch.float64)
        Z = torch.cat([M[b, :, i : i + 1] * X[b] for i in index[b, :k].tolist()], 1)
        H += Z.mT @ torch.diag(curvature[b]) @ Z
        for j, i in enumerate(index[b, :k].tolist()):
            h, size = u[b, i] / u[b, i].norm(), u[b, i].norm()
            H[j * d : (j + 1) * d, j * d : (j + 1) * d] += beta[b] / size * (torch.eye(d).double() - torch.outer(h, h))
        for e in range(2):
            expected = torch.linalg.solve(H, g[e, b, :k].flatten())
            assert torch.allclose(q[e, b, :k].flatten(), expected, rtol=1e-8, atol=1e-9)
            assert not q[e, b, k:].any()


def test_predictions_answer_labels_as_a_projection_does():
    """df/dy is symmetric with eigenvalues in [0, 1]: the solution is a prox of the labels."""
    X, y, _, G = problem(2, 10, 2, 8, False)
    J = torch.autograd.functional.jacobian(lambda y: predict(convex_gated_relu(X, y, 0.3, G), X), y)
    assert torch.allclose(J, J.mT, atol=1e-10)
    values = torch.linalg.eigvalsh(J)
    assert values.min() > -1e-10
    assert values.max() < 1 + 1e-10


def test_value_is_concave_in_beta():
    X, y, _, G = problem(2, 25, 3, 20, False)
    betas = torch.linspace(0.05, 1.0, 20, dtype=torch.float64).requires_grad_()
    found = convex_gated_relu(X, y, betas, G)
    (slope,) = torch.autograd.grad(found.objective.sum(), betas)
    assert torch.allclose(slope, found.v.norm(dim=-1).sum(-1), rtol=1e-12)
    assert (slope.diff() < 0).all()
    assert (found.objective.diff() > 0).all()


def test_interior_point_alone_comes_close():
    X, y, s, G = problem(4, 20, 2, 30, False)
    M = (X @ G.mT >= 0).double()
    _, first = np.unique(M.numpy(), axis=1, return_index=True)
    task = GatedTask(X[None], M[None][..., first], y[None], s[None], torch.full((1,), 0.05).double(), Squared())
    u, steps = interior_point(task)
    best = convex_gated_relu(X, y, 0.05, G, sample_weight=s).objective
    assert int(steps) < 40
    assert torch.isclose(task.objective(u)[0], best, rtol=1e-7)


def test_margin_is_the_distance_to_the_next_neuron():
    """Between two values of beta at which a neuron enters, the margin falls to zero."""
    X, y, s, G = problem(3, 15, 2, 8, False)
    top = float(beta_max(X, y, G, sample_weight=s))
    betas = torch.linspace(0.2, 1.2, 2001, dtype=torch.float64) * top
    found = convex_gated_relu(X, y, betas, G, sample_weight=s)
    active = (found.v != 0).any(-1)
    changes = (active[1:] & ~active[:-1]).any(-1) | (active[:-1] & ~active[1:]).any(-1)
    assert found.margin is not None
    assert changes.any()
    assert (found.margin[:-1][changes].minimum(found.margin[1:][changes]) < 5e-3).all()
    assert torch.isclose(found.margin[-1], torch.tensor(1 - 1 / 1.2).double(), rtol=1e-12)


# -------------------------------------------------------------------------------------------------------------- pruning


def test_network_is_minimal_and_no_smaller_one_exists():
    """Among all subsets of the neurons that an optimum may have, none smaller reproduces the fit (brute force)."""
    X, y, _, _ = problem(7, 6, 2, 1, False)
    gates = enumerate_gates(X)
    beta = 0.2
    found = convex_gated_relu(X, y, beta, gates)
    f, active = predict(found, X), int((found.v != 0).any(-1).sum())
    pull = (gates.patterns.double() * (y - f)[:, None]).mT @ X
    admissible = (pull.norm(dim=-1) > beta * (1 - 1e-7)).nonzero().squeeze(-1).tolist()
    columns = torch.stack([gates.patterns[:, i].double() * (X @ pull[i]) for i in admissible], 1).numpy()
    assert active >= 2
    smallest = min(
        k
        for k in range(1, active + 1)
        for chosen in itertools.combinations(range(len(admissible)), k)
        if scipy.optimize.nnls(columns[:, list(chosen)], f.numpy())[1] < 1e-8
    )
    assert smallest == active


def test_pruning_keeps_fit_and_objective():
    """An optimal network is split over repeated and complementary gates by hand, and found again."""
    X, y, s, _ = problem(8, 12, 2, 1, False)
    gates = enumerate_gates(X)
    best = convex_gated_relu(X, y, 0.3, gates, sample_weight=s)
    vectors = torch.cat([gates.vectors, gates.vectors])
    patterns = torch.cat([gates.patterns, gates.patterns], 1)
    split = best._replace(v=torch.cat([0.3 * best.v, 0.7 * best.v]), gates=Gates(vectors, patterns))
    pruned = minimal_network(split, X)
    count = lambda solution: int((solution.v != 0).any(-1).sum())  # noqa: E731
    assert count(split) == 2 * count(best)
    assert count(pruned) == count(best)
    assert torch.allclose(predict(pruned, X), predict(best, X), rtol=1e-9)
    again = from_network(to_network(pruned), X, y, 0.3, sample_weight=s)
    assert torch.isclose(again.objective, best.objective, rtol=1e-9)
    assert float(again.gap) >= 0


def test_repeated_gates_do_not_spoil_the_derivative():
    X, y, _, G = problem(8, 10, 2, 6, False)
    X.requires_grad_()
    once = convex_gated_relu(X, y, 0.2, G)
    twice = convex_gated_relu(X, y, 0.2, torch.cat([G, G, 2 * G]))
    assert torch.equal(once.v != 0, twice.v[:6] != 0)
    assert not twice.v[6:].any()
    (a,), (b,) = (torch.autograd.grad(predict(t, X.detach()).square().sum(), X) for t in (once, twice))
    assert torch.allclose(a, b, rtol=1e-9)


# --------------------------------------------------------------------------------------------------- batches and starts


def test_elements_do_not_feel_each_other():
    X, y, s, G = problem(1, 20, 2, 30, False)
    betas = torch.tensor([0.01, 0.3, 5.0, 1e4], dtype=torch.float64)
    found = convex_gated_relu_ex(X, y, betas, G, sample_weight=s)
    assert found.converged.all()
    assert not found.value.v[-1].any()
    for i, beta in enumerate(betas):
        alone = convex_gated_relu(X, y, beta, G, sample_weight=s)
        assert torch.allclose(found.value.v[i], alone.v, atol=1e-9)


def test_a_bad_element_is_alone():
    X, y, _, G = problem(1, 12, 2, 6, False)
    X, y = X.expand(3, 12, 2).clone(), torch.stack([y, y + 1, -y])
    y[1, 0] = math.nan
    found = convex_gated_relu_ex(X, y, 0.3, G)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    kept = convex_gated_relu(X, y, 0.3, G, on_failure="nan")
    assert torch.isnan(kept.objective).tolist() == [False, True, False]
    with pytest.raises((SolveError, ValueError), match="y: expected finite"):
        convex_gated_relu(X, y, 0.3, G)


def test_warm_starts_change_steps_and_nothing_else():
    X, y, _, G = problem(6, 40, 3, 12, False)
    cold = convex_gated_relu_ex(X, y, 0.5, G)
    warm = convex_gated_relu_ex(X, y, 0.5, G, warm_start=cold)
    assert torch.allclose(cold.value.v, warm.value.v, atol=1e-10)
    assert int(warm.steps) < int(cold.steps)
    other = convex_gated_relu(X, y, 0.5, G, warm_start=convex_gated_relu(X, -y, 0.1, G))
    assert torch.allclose(cold.value.v, other.v, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_scales_of_the_data_are_free(scale: float):
    X, y, _, G = problem(6, 15, 3, 12, False)
    once = convex_gated_relu(X, y, 0.5, G)
    inputs = convex_gated_relu(X * scale, y, 0.5 * scale, G)
    labels = convex_gated_relu(X, y * scale, 0.5 * scale, G)
    assert torch.allclose(inputs.v * scale, once.v, rtol=1e-8, atol=1e-10)
    assert torch.allclose(labels.v / scale, once.v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("logistic", [False, True], ids=["squared", "logistic"])
def test_single_precision(logistic: bool):
    X, y, s, G = problem(20, 30, 3, 40, logistic)
    loss = Logistic() if logistic else Squared()
    expected = convex_gated_relu(X, y, 0.3, G, sample_weight=s, loss=loss)
    X, y, s, G = (t.float() for t in (X, y, s, G))
    found = convex_gated_relu_ex(X, y, 0.3, G, sample_weight=s, loss=loss)
    assert found.converged
    assert found.value.v.dtype == torch.float32
    assert torch.isclose(found.value.objective.double(), expected.objective, rtol=1e-5)
    assert torch.allclose(predict(found.value, X).double(), predict(expected, X.double()), atol=2e-3)


@pytest.mark.parametrize("change", ["constant labels", "no labels", "one sample", "a constant column", "one gate"])
def test_poor_data_are_fine(change: str):
    X, y, s, G = problem(2, 12, 2, 20, False)
    if change == "constant labels":
        y = torch.ones_like(y)
    elif change == "no labels":
        y = torch.zeros_like(y)
    elif change == "one sample":
        X, y, s = X[:1], y[:1], s[:1]
    elif change == "a constant column":
        X[:, 1] = 1
    else:
        G = G[:1]
    found = convex_gated_relu(X, y, 0.1, G, sample_weight=s)
    assert math.isclose(float(found.objective), clarabel(X, y, s, 0.1, G, False), rel_tol=1e-7, abs_tol=1e-8)


def test_gates_of_the_wrong_kind_and_labels_0_and_1_are_refused():
    X, y, _, G = problem(2, 12, 2, 20, False)
    with pytest.raises(ValueError, match="y: expected labels -1 and 1 for the logistic loss, got"):
        convex_gated_relu(X, (y > 0).double(), 0.1, G, loss=Logistic())
    with pytest.raises(ValueError, match="gates: expected a tensor, got list"):
        convex_gated_relu(X, y, 0.1, [[1.0, 2.0]])
    with pytest.raises(ValueError, match="beta: expected more than 0, got -1"):
        convex_gated_relu(X, y, -1.0, G)
    with pytest.raises(ValueError, match=r"warm_start: expected shape \(20, 2\)"):
        convex_gated_relu(X, y, 0.1, G, warm_start=convex_gated_relu(X, y, 0.1, G[:3]))
    with pytest.raises(ValueError, match="rtol: expected more than 0, got 0"):
        FISTA(rtol=0)
    with pytest.raises(ValueError, match="max_steps: expected at least 1, got 0"):
        FISTA(max_steps=0)


def test_enumerated_gates_reach_what_sampled_ones_do_not():
    X, y, _, _ = problem(5, 10, 2, 1, False)
    every = convex_gated_relu(X, y, 0.2, enumerate_gates(X)).objective
    some = convex_gated_relu(X, y, 0.2, sample_gates(X, 4, generator=torch.Generator().manual_seed(0))).objective
    assert every < some - 1e-6
