"""Total variation on graphs: against a conic solver, against the exact solver for chains, and by its own proof."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.proximal import DualGradient, prox_graph_tv, prox_graph_tv_ex, prox_tv1d


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_graph(nodes: int, edges: int, seed: int = 0) -> Tensor:
    """A random tree and some more edges."""
    generator = torch.Generator().manual_seed(seed)
    tree = [[int(torch.randint(i, (), generator=generator)), i] for i in range(1, nodes)]
    more = torch.randint(nodes, (edges - len(tree), 2), generator=generator)
    return torch.cat([torch.tensor(tree), more]).T


def chain(n: int) -> Tensor:
    return torch.stack([torch.arange(n - 1), torch.arange(1, n)])


def grid(height: int, width: int) -> Tensor:
    index = torch.arange(height * width).reshape(height, width)
    right = torch.stack([index[:, :-1].flatten(), index[:, 1:].flatten()])
    return torch.cat([right, torch.stack([index[:-1].flatten(), index[1:].flatten()])], 1)


def conic(x: Tensor, bound: Tensor, edges: Tensor) -> Tensor:
    import cvxpy as cp

    z = cp.Variable(len(x))
    tail, head = edges.numpy()
    objective = bound.numpy() @ cp.abs(z[head] - z[tail]) + cp.sum_squares(z - x.numpy()) / 2
    cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.from_numpy(z.value)


@pytest.mark.parametrize("t", [0.05, 0.3, 2.0])
@pytest.mark.parametrize(
    "edges", [random_graph(14, 13), random_graph(14, 25), grid(4, 4)], ids=["tree", "graph", "grid"]
)
def test_equals_conic_solver(edges: Tensor, t: float):
    x, w = normal(int(edges.max()) + 1), normal(edges.shape[1], seed=1).exp()
    expected = conic(x, t * w, edges)
    torch.testing.assert_close(prox_graph_tv(x, t, edges, weights=w), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("t", [0.1, 3.0, 1e4])
def test_equals_the_exact_solver_on_a_chain(t: float):
    n = 300
    x, w, g = normal(2, n).cumsum(-1), normal(2, n - 1, seed=1).exp(), normal(2, n, seed=2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    leaves = [v.clone().requires_grad_() for v in (x, w)]
    z = prox_graph_tv(leaves[0][:, order], t, order.argsort()[chain(n)], weights=leaves[1])[:, order.argsort()]
    expected = prox_tv1d(leaves[0], t, weights=leaves[1])
    torch.testing.assert_close(z, expected, atol=1e-11, rtol=0)
    for found, wanted in zip(*(torch.autograd.grad(v, leaves, g) for v in (z, expected)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


def test_derivative_is_that_of_the_conic_solver():
    edges = random_graph(10, 16)
    x, t, w = normal(10), torch.tensor(0.3, dtype=torch.float64), normal(16, seed=1).exp()
    g = normal(10, seed=2)
    leaves = [v.clone().requires_grad_() for v in (x, t, w)]
    found = torch.autograd.grad(prox_graph_tv(leaves[0], leaves[1], edges, weights=leaves[2]), leaves, g)
    h = 1e-3  # piecewise linear: only the solver's own error is divided
    for i, move in enumerate([normal(10, seed=3), torch.ones((), dtype=torch.float64), normal(16, seed=4)]):
        ends = []
        for sign in (1, -1):
            data = [x, t, w]
            data[i] = data[i] + sign * h * move
            ends.append(conic(data[0], data[1] * data[2], edges))
        slope = ((ends[0] - ends[1]) * g).sum().item() / (2 * h)
        assert (found[i] * move).sum().item() == pytest.approx(slope, abs=1e-6)


def test_the_residual_bounds_the_distance_to_the_minimiser():
    edges = grid(16, 16)
    x = normal(256) + (torch.arange(256) % 16 > 7)
    exact = prox_graph_tv_ex(x, 0.8, edges)
    assert exact.status == Status.CONVERGED
    assert exact.residual < 1e-8
    for steps in (1, 5, 20, 50):
        early = prox_graph_tv_ex(x, 0.8, edges, solver=DualGradient(max_steps=steps, check_every=5))
        assert torch.linalg.vector_norm(early.value - exact.value) <= early.residual + 1e-8
    assert early.residual < 20


def test_a_wrong_partition_is_never_taken_for_converged():
    edges = grid(12, 12)
    for seed in range(8):
        x = normal(3, 144, seed=seed)
        solution = prox_graph_tv_ex(x, 0.5, edges, solver=DualGradient(max_steps=40, check_every=2))
        exact = prox_graph_tv(x, 0.5, edges)
        error = torch.linalg.vector_norm(solution.value - exact, dim=-1)
        assert (error[solution.converged] < 1e-8).all()


def test_ties_are_one_piece():
    star = torch.tensor([[0, 0, 0], [1, 2, 3]])
    x = torch.tensor([0.5, 1.0, 0.0, 0.5], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: prox_graph_tv(x, 0.5, star), x)
    torch.testing.assert_close(J, torch.full((4, 4), 0.25, dtype=torch.float64))
    # without weight nothing is joined, and pieces with equal values are two where no edge joins them
    J = torch.autograd.functional.jacobian(lambda x: prox_graph_tv(x, 0.0, star), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(J, torch.eye(4, dtype=torch.float64))
    pairs = torch.tensor([[0, 2], [1, 3]])
    J = torch.autograd.functional.jacobian(lambda x: prox_graph_tv(x, 1.0, pairs), torch.ones(4, dtype=torch.float64))
    assert J[0, 2] == 0
    assert J[0, 1] == 0.5


def test_an_endless_step_gives_the_mean_of_every_component():
    edges = torch.tensor([[0, 1, 3], [1, 2, 4]])
    x = normal(6)
    z = prox_graph_tv(x, math.inf, edges)
    expected = torch.cat([x[:3].mean().expand(3), x[3:5].mean().expand(2), x[5:]])
    torch.testing.assert_close(z, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales(scale: float):
    edges, x = random_graph(50, 90), normal(2, 50)
    z = prox_graph_tv(scale * x, 0.4 * scale, edges) / scale
    torch.testing.assert_close(z, prox_graph_tv(x, 0.4, edges), atol=1e-10, rtol=0)


def test_order_in_a_pair_loops_repetitions_and_integers():
    edges, x = random_graph(12, 20), normal(12)
    z = prox_graph_tv(x, 0.3, edges)
    torch.testing.assert_close(prox_graph_tv(x, 0.3, edges.flip(0)), z, atol=1e-12, rtol=0)
    torch.testing.assert_close(prox_graph_tv(x, 0.3, edges.int()), z)
    torch.testing.assert_close(prox_graph_tv(x, 0.15, torch.cat([edges, edges], 1)), z, atol=1e-12, rtol=0)
    loops = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(prox_graph_tv(x, 0.3, torch.cat([edges, loops], 1)), z, atol=1e-12, rtol=0)
    assert (prox_graph_tv(x, 0.3, edges[:, :0]) == x).all()


def test_batches_and_dim():
    edges, x = random_graph(9, 15), normal(2, 9, 3)
    t = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    z = prox_graph_tv(x, t, edges, dim=1)
    for i in range(2):
        for k in range(3):
            alone = prox_graph_tv(x[i, :, k], t[0, k].item(), edges)
            torch.testing.assert_close(z[i, :, k], alone, atol=1e-12, rtol=0)


def test_single_precision():
    edges, x = random_graph(40, 70), normal(3, 40)
    z = prox_graph_tv(x.float(), 0.3, edges)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), prox_graph_tv(x, 0.3, edges), atol=1e-5, rtol=0)
    # the pieces are found in double precision, and those of the rounded signal exactly
    x = (2 * normal(6, 256)).float()
    ring = torch.arange(256)
    edges = torch.cat([torch.stack([ring, (ring + k) % 256]) for k in (1, 17)], 1)
    z, exact = prox_graph_tv(x, 0.7, edges), prox_graph_tv(x.double(), float(torch.tensor(0.7)), edges)
    for single, double in zip(z, exact, strict=True):
        assert len(single.unique()) == len(double.unique())


def test_a_slow_rise_is_no_tie():
    x = 1.7e9 + torch.arange(2000, dtype=torch.float64) * 1e-6
    assert (prox_graph_tv(x, 1e-12, chain(2000)) == x).all()


def test_failures_are_told():
    edges, x = grid(10, 10), normal(2, 100)
    with pytest.warns(SolveWarning, match="prox_graph_tv"):
        prox_graph_tv(x, 5.0, edges, solver=DualGradient(max_steps=2))
    x[1, 3] = math.nan
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        prox_graph_tv(x, 0.3, edges)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = prox_graph_tv(x, 0.3, edges, on_failure="nan")
    assert z[0].isfinite().all()
    assert z[1].isnan().all()
    assert issubclass(SolveError, RuntimeError)
    assert prox_graph_tv_ex(x, 0.3, edges).status.tolist() == [Status.CONVERGED, Status.DIVERGED]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1], [1, 2]], r"edges: expected a tensor, got list"),
        (torch.zeros(3, 2, dtype=torch.int64), r"edges: expected shape \(2, m\), got \(3, 2\)"),
        (torch.zeros(2, 2), r"edges: expected an integer tensor"),
        (torch.tensor([[0, 1], [1, 4]]), r"edges: expected nodes in 0\.\.3, got 0\.\.4"),
        (torch.tensor([[0], [-1]]), r"edges: expected nodes in 0\.\.3, got -1\.\.0"),
    ],
)
def test_bad_edges_are_refused(edges: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        prox_graph_tv(normal(4), 0.3, edges)


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"max_steps": 0}, {"check_every": 0}])
def test_bad_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        DualGradient(**options)
