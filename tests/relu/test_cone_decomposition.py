"""Gated networks turned into ReLU networks.

Oracles: cvxpy with Clarabel for the shortest decomposition of each neuron; the definition (difference, cells, fit) for
all of them; the closed form in two lines; the ReLU program over the same gates for the certificate.
"""

import itertools
import warnings

import cvxpy as cp
import pytest
import torch
from torch import Tensor

from difflayers.relu import (
    ConvexReLUSolution,
    Gates,
    TwoLayerReLU,
    beta_max,
    cone_decomposition,
    convex_gated_relu,
    convex_relu,
    predict,
    sample_gates,
    to_network,
)

METHODS = ("closed", "approximate", "exact")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(seed: int, n: int, d: int, count: int, fraction: float) -> tuple[Tensor, Tensor, float, ConvexReLUSolution]:
    X = normal(seed, n, d)
    y = torch.sin(2 * X[:, 0]) + X[:, -1].abs()
    gates = sample_gates(X, count, generator=torch.Generator().manual_seed(seed))
    beta = fraction * float(beta_max(X, y, gates))
    return X, y, beta, convex_gated_relu(X, y, beta, gates)


def network_of(u: Tensor, X: Tensor, vectors: Tensor) -> ConvexReLUSolution:
    """Any neurons, trained or not."""
    zero = u.new_zeros(u.shape[:-2])
    return ConvexReLUSolution(u, None, zero, zero, Gates(vectors, X @ vectors.mT >= 0))


def check(gated: ConvexReLUSolution, X: Tensor, network: ConvexReLUSolution, tol: float = 1e-9) -> None:
    """Differences, cells, fit."""
    size = gated.v.abs().max() + network.v.abs().max()
    assert torch.allclose(network.v - network.w, gated.v, rtol=0, atol=tol * float(size))
    side = 2 * gated.gates.patterns.to(X.dtype).mT - 1
    for p in (network.v, network.w):
        assert (side * (p @ X.mT)).min() >= -tol * size * X.abs().max()
    assert (predict(network, X) - predict(gated, X)).abs().max() <= tol * size * X.abs().max()


def shortest(u: Tensor, K: Tensor) -> float:
    v, w = cp.Variable(len(u)), cp.Variable(len(u))
    task = cp.Problem(
        cp.Minimize(cp.norm(v) + cp.norm(w)), [v - w == u.numpy(), K.numpy() @ v >= 0, K.numpy() @ w >= 0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return float(task.value)


@pytest.mark.parametrize(
    ("n", "d", "count", "fraction"), [(20, 2, 30, 0.02), (30, 4, 40, 0.01), (100, 5, 20, 0.2), (8, 12, 20, 0.01)]
)
def test_every_neuron_is_the_shortest_difference(n: int, d: int, count: int, fraction: float):
    X, _, beta, gated = trained(n, n, d, count, fraction)
    network, growth = cone_decomposition(gated, X, beta)
    check(gated, X, network)
    active = gated.v.any(-1).nonzero().squeeze(-1).tolist()
    expected = [shortest(gated.v[i], (2 * gated.gates.patterns[:, i : i + 1].double() - 1) * X) for i in active]
    found = (network.v.norm(dim=-1) + network.w.norm(dim=-1))[active]
    assert torch.allclose(found, found.new_tensor(expected), rtol=1e-8)
    assert torch.isclose(growth, found.sum() / gated.v.norm(dim=-1).sum(), rtol=1e-10)
    silent = ~gated.v.any(-1)
    assert silent.any() and not network.v[silent].any() and not network.w[silent].any()


def test_all_methods_keep_the_fit_and_the_exact_one_is_shortest():
    X, y, beta, gated = trained(3, 40, 3, 25, 0.02)
    relu = convex_relu(X, y, beta, gated.gates)
    growth = {}
    for method in METHODS:
        network, growth[method] = cone_decomposition(gated, X, beta, method=method)
        check(gated, X, network)
        f = predict(network, X)
        assert (f - predict(gated, X)).abs().max() < 1e-9
        penalty = network.v.norm(dim=-1).sum() + network.w.norm(dim=-1).sum()
        assert torch.isclose(network.objective, ((f - y) ** 2).sum() / 2 + beta * penalty, rtol=1e-9)
        # the certificate holds for the best ReLU network over these gates
        assert float(network.objective - network.gap) <= float(relu.objective) <= float(network.objective)
        module = to_network(network)
        assert isinstance(module, TwoLayerReLU)
        assert torch.allclose(module(X), f, atol=1e-9)
    assert 1 < growth["exact"] < growth["approximate"] < growth["closed"]


def test_the_closed_form_moves_along_the_gate():
    X, _, beta, gated = trained(5, 25, 3, 20, 0.02)
    w = cone_decomposition(gated, X, beta, method="closed").network.w
    seen = 0
    for i, (u, g) in enumerate(zip(gated.v, gated.gates.vectors, strict=True)):
        e = 2.0 * (X @ g >= 0) - 1
        if not u.any() or not (e * (X @ u) > 0).any():
            continue
        c = (-e * (X @ u) / (X @ g).abs()).clamp_min(0).max()
        assert torch.allclose(w[i], c * g, rtol=1e-9, atol=1e-12)
        seen += 1
    assert seen > 3


@pytest.mark.parametrize("method", METHODS)
def test_neurons_inside_their_cell_or_opposite_are_left_alone(method):
    X = normal(1, 12, 3)
    vectors = normal(2, 4, 3)
    u = torch.stack([vectors[0], -2 * vectors[1], 0 * vectors[2], normal(3, 3)])
    network, _ = cone_decomposition(network_of(u, X, vectors), X, 0.1, method=method)
    assert torch.equal(network.v[0], u[0]) and not network.w[0].any()
    assert torch.equal(network.w[1], -u[1]) and not network.v[1].any()
    assert not network.v[2].any() and not network.w[2].any()
    assert network.v[3].any() and network.w[3].any()


@pytest.mark.parametrize("method", METHODS)
def test_hostile_data(method):
    X, vectors, u = normal(4, 10, 3), normal(5, 6, 3), normal(6, 6, 3)
    zero_row, twins, flat = X.clone(), X.clone(), X.clone()
    zero_row[0] = 0
    twins[1] = 2 * twins[0]
    flat[:, 2] = -flat[:, 1]
    for points in (zero_row, twins, flat, X[:2], 1e9 * X, 1e-9 * X):
        gated = network_of(u, points, vectors)
        check(gated, points, cone_decomposition(gated, points, 0.1, method=method).network)
    # the answer has the scale of the neurons
    big = cone_decomposition(network_of(1e9 * u, X, vectors), X, 0.1, method=method)
    small = cone_decomposition(network_of(1e-9 * u, 1e6 * X, vectors), 1e6 * X, 0.1, method=method)
    assert torch.allclose(big.network.w / 1e9, small.network.w * 1e9, rtol=1e-6)
    one = cone_decomposition(network_of(u[:1, :1], X[:, :1], vectors[:1, :1]), X[:, :1], 0.1, method=method)
    assert float(one.growth) == 1
    nothing = cone_decomposition(network_of(0 * u, X, vectors), X, 0.1, method=method)
    assert float(nothing.growth) == 1 and not nothing.network.w.any()
    assert cone_decomposition(network_of(u.new_zeros(0, 6, 3), X, vectors), X, 0.1, method=method).growth.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_batches_single_precision_and_a_lost_element(method):
    X, vectors, u = normal(7, 2, 10, 3), normal(8, 6, 3), normal(9, 4, 2, 6, 3)
    gated = ConvexReLUSolution(u, None, u.new_zeros(4, 2), u.new_zeros(4, 2), Gates(vectors, X @ vectors.mT >= 0))
    network, growth = cone_decomposition(gated, X, 0.1, method=method)
    assert growth.shape == network.objective.shape == (4, 2)
    for i, j in itertools.product(range(4), range(2)):
        alone = network_of(u[i, j], X[j], vectors)
        expected = cone_decomposition(alone, X[j], 0.1, method=method)
        assert torch.allclose(network.w[i, j], expected.network.w, rtol=1e-7, atol=1e-9)
    lost = u.clone()
    lost[2, 1, 0, 0] = torch.nan
    others, _ = cone_decomposition(gated._replace(v=lost), X, 0.1, method=method)
    assert torch.isnan(others.v[2, 1]).any()
    sound = torch.ones(4, 2, dtype=torch.bool)
    sound[2, 1] = False
    assert torch.equal(others.w[sound], network.w[sound])
    single = network_of(u[0, 0].float(), X[0].float(), vectors.float())
    found = cone_decomposition(single, X[0].float(), 0.1, method=method).network
    assert found.w.dtype == found.objective.dtype == torch.float32
    check(single, X[0].float(), found, tol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_points_on_a_gate(method):
    X, vectors, u = normal(10, 8, 3), normal(11, 4, 3), normal(12, 4, 3)
    X[0] = torch.tensor([0.0, 1.0, 0.0])
    vectors[:, 1] = 0  # the first point lies on all gates, so it counts as open
    gated = network_of(u, X, vectors)
    assert gated.gates.patterns[0].all()
    check(gated, X, cone_decomposition(gated, X, 0.1, method=method).network)
    # with its opposite the cells are flat: neurons across them are no differences, those along them are
    X = torch.cat([X, -X[:1]])
    with pytest.raises(ValueError, match="solution: expected gates strictly between the points of X, got 4 active"):
        cone_decomposition(network_of(u, X, vectors), X, 0.1, method=method)
    u[:, 1] = 0
    gated = network_of(u, X, vectors)
    check(gated, X, cone_decomposition(gated, X, 0.1, method=method).network)


def test_thin_cells():
    X = normal(13, 10, 3)
    X[1] = X[0] + 1e-4 * X[1]
    gate = torch.linalg.lstsq(X[:2], X.new_tensor([1e-5, -1e-5])).solution
    gated = network_of(normal(14, 1, 3), X, gate[None])
    network, growth = cone_decomposition(gated, X, 0.1)
    K = (2 * gated.gates.patterns.double() - 1) * X
    assert growth > 1e3
    assert abs(float(growth) * float(gated.v.norm()) / shortest(gated.v[0], K) - 1) < 1e-8
    check(gated, X, network)


def test_bad_input_is_named():
    X, _, beta, gated = trained(6, 10, 2, 5, 0.1)
    network = cone_decomposition(gated, X, beta).network
    with pytest.raises(ValueError, match="solution: expected a gated network, which has no negative neurons w"):
        cone_decomposition(network, X, beta)
    with pytest.raises(ValueError, match='method: expected "exact", "closed" or "approximate", got \'best\''):
        cone_decomposition(gated, X, beta, method="best")
    with pytest.raises(ValueError, match=r"X: expected shape \(10, 2\) in its last two dimensions, got \(9, 2\)"):
        cone_decomposition(gated, X[1:], beta)
    with pytest.raises(ValueError, match="X: expected the data that solution was trained on"):
        cone_decomposition(gated, -X, beta)
