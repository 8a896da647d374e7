"""Total variation of a signal: against a dynamic programme, a conic solver, and the optimality conditions."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.proximal import prox_tv1d


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dynamic_programme(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """One signal in O(n): the derivative of the best cost so far, as a queue of knots (N. A. Johnson, 2013)."""
    n = len(x)
    low, high = np.empty(n - 1), np.empty(n - 1)
    knots: deque[tuple[float, float, float]] = deque()  # position, change of slope and of offset
    a, b, c, d = 1.0, -x[0], 1.0, -x[0]  # slope and offset of the first and of the last piece
    for i in range(n - 1):
        while knots and a * knots[0][0] + b < -t[i]:
            _, da, db = knots.popleft()
            a, b = a + da, b + db
        low[i] = (-t[i] - b) / a
        while knots and c * knots[-1][0] + d > t[i]:
            _, da, db = knots.pop()
            c, d = c - da, d - db
        high[i] = (t[i] - d) / c
        knots.appendleft((low[i], a, b + t[i]))
        knots.append((high[i], -c, t[i] - d))
        a, b, c, d = 1.0, -t[i] - x[i + 1], 1.0, t[i] - x[i + 1]
    while knots and a * knots[0][0] + b < 0:
        _, da, db = knots.popleft()
        a, b = a + da, b + db
    z = np.empty(n)
    z[-1] = -b / a
    for i in reversed(range(n - 1)):
        z[i] = min(max(z[i + 1], low[i]), high[i])
    return z


def reference(x: Tensor, t: Tensor) -> Tensor:
    """`t` for every pair of neighbours."""
    t = t.expand(*x.shape[:-1], x.shape[-1] - 1)
    return torch.from_numpy(np.stack([dynamic_programme(a, b) for a, b in zip(x.numpy(), t.numpy(), strict=True)]))


def conic(x: Tensor, t: Tensor) -> Tensor:
    import cvxpy as cp

    z = cp.Variable(len(x))
    objective = t.numpy() @ cp.abs(cp.diff(z)) + cp.sum_squares(z - x.numpy()) / 2
    cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.from_numpy(z.value)


SIGNALS = {
    "noise": lambda n: normal(2, n),
    "rounded": lambda n: normal(2, n).round(),
    "falling": lambda n: normal(2, n).sort(-1, descending=True).values,
    "walk": lambda n: normal(2, n).cumsum(-1),
    "rounded walk": lambda n: normal(2, n).sign().cumsum(-1),
    "line": lambda n: torch.arange(n, dtype=torch.float64).expand(2, n),
    "alternating": lambda n: torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n)[:n].expand(2, n),
    "steps": lambda n: (torch.arange(n) // 7 % 3).double().expand(2, n),
    "growing": lambda n: (2.0 ** torch.arange(n, dtype=torch.float64).clamp_max(500)).expand(2, n),
    "growing and alternating": lambda n: ((-2.0) ** torch.arange(n, dtype=torch.float64).clamp_max(500)).expand(2, n),
    "heavy tails": lambda n: torch.exp(20 * normal(2, n)) * normal(2, n, seed=1).sign(),
    "small on large": lambda n: 1e9 + 1e-3 * normal(2, n),
}


@pytest.mark.parametrize("n", [2, 3, 17, 300])
@pytest.mark.parametrize("signal", SIGNALS)
def test_equals_dynamic_programme(signal: str, n: int):
    x = SIGNALS[signal](n)
    w = normal(2, n - 1, seed=4).abs()
    largest = x.abs().amax()
    for t in (0.0, 1e-3, 0.25, 1.0, 30.0, 1e4):
        for weights in (None, w):
            z = prox_tv1d(x, t, weights=weights)
            expected = reference(x, torch.full_like(w, t) if weights is None else t * w)
            # the reference rounds relative to t too
            assert (z - expected).abs().amax().item() <= 1e-13 * (largest.item() + 100 * t)


@pytest.mark.parametrize("t", [0.1, 0.6, 2.0])
def test_equals_conic_solver(t: float):
    x, w = normal(15), normal(14, seed=1).exp()
    torch.testing.assert_close(prox_tv1d(x, t, weights=w), conic(x, t * w), atol=1e-7, rtol=0)


def violations(x: Tensor, z: Tensor, bound: Tensor) -> Tensor:
    """How far the flow ``cumsum(x - z)`` is from the sign of the jumps where there is one, and beyond the bound."""
    flow = (x - z).cumsum(-1)
    ends = flow[..., -1:].abs()
    flow, jump = flow[..., :-1], z.diff(dim=-1)
    off = torch.where(jump == 0, (flow.abs() - bound).clamp_min(0), (flow + bound * jump.sign()).abs())
    return torch.cat([off, ends], -1)


@pytest.mark.parametrize("t", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("signal", ["noise", "walk", "falling", "line", "heavy tails", "steps"])
def test_optimality_conditions_of_long_signals(signal: str, t: float):
    x = SIGNALS[signal](20_000)
    bound = t * torch.exp(3 * normal(2, 19_999, seed=5))
    z = prox_tv1d(x, 1.0, weights=bound)
    scale = x.abs().amax() + x.diff(dim=-1).abs().sum(-1).amax()
    assert (violations(x, z, bound).amax() / scale).item() < 1e-12


def test_rounds_stay_few_where_every_cut_peels_off_little(monkeypatch: pytest.MonkeyPatch):
    import difflayers.proximal._tv1d as module

    rounds = []
    minimise = module._minimise
    monkeypatch.setattr(module, "_minimise", lambda *args: rounds.append(1) or minimise(*args))
    x = 2.0 ** (torch.arange(10_000, dtype=torch.float64) / 10 - 500)
    prox_tv1d(x, 1e-3)
    assert len(rounds) < 100
    rounds.clear()
    prox_tv1d(normal(10_000).cumsum(-1), 1.0)
    assert len(rounds) < 20


def test_no_step_and_an_endless_one():
    x = normal(3, 10).round(decimals=1)
    assert (prox_tv1d(x, 0.0) == x).all()
    J = torch.autograd.functional.jacobian(lambda x: prox_tv1d(x, 0.0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(J, torch.eye(4, dtype=torch.float64))  # nothing pulls, so ties do not join
    for t in (1e12, math.inf):
        leaf = x.clone().requires_grad_()
        z = prox_tv1d(leaf, t)
        torch.testing.assert_close(z, x.mean(-1, keepdim=True).expand_as(x), atol=1e-14, rtol=0)
        assert torch.autograd.grad(z.sum(), leaf)[0].isfinite().all()


def test_derivative_is_that_of_the_reference():
    x, w, g = normal(2, 12), normal(2, 11, seed=1).exp(), normal(2, 12, seed=2)
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    leaves = [v.clone().requires_grad_() for v in (x, t, w)]
    found = torch.autograd.grad(prox_tv1d(leaves[0], leaves[1], weights=leaves[2]), leaves, g)
    moves = [normal(*v.shape, seed=3 + i) for i, v in enumerate(leaves)]
    h = 1e-6
    for i in range(3):
        ends = []
        for sign in (1, -1):
            data = [v.clone() for v in (x, t, w)]
            data[i] += sign * h * moves[i]
            ends.append(reference(data[0], data[1].unsqueeze(-1) * data[2]))
        slope = ((ends[0] - ends[1]) * g).sum().item() / (2 * h)
        assert (found[i] * moves[i]).sum().item() == pytest.approx(slope, abs=1e-6)


def test_ties_are_one_piece():
    # the flow just reaches its bound inside: 0.5, 0.5 | 1, 0 would be pieces with equal values
    x = torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: prox_tv1d(x, 0.5), x)
    torch.testing.assert_close(J, torch.full((4, 4), 0.25, dtype=torch.float64))


def test_single_precision_is_right_to_its_rounding():
    x = normal(3, 2000).cumsum(-1).float()
    z = prox_tv1d(x, 0.7)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), prox_tv1d(x.double(), float(np.float32(0.7))), atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales(scale: float):
    x = normal(2, 200).cumsum(-1)
    torch.testing.assert_close(prox_tv1d(scale * x, scale) / scale, prox_tv1d(x, 1.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_element_keeps_it_to_itself(bad: float):
    x = normal(3, 20)
    spoilt = x.clone()
    spoilt[1, 5] = bad
    z = prox_tv1d(spoilt, 0.3)
    assert not z[1].isfinite().any()
    assert (z[[0, 2]] == prox_tv1d(x, 0.3)[[0, 2]]).all()


def test_dim_and_shapes_of_weights():
    x = normal(2, 5, 3)
    w = normal(4, 1, seed=1).exp()
    z = prox_tv1d(x, torch.tensor([[0.2, 0.3, 0.4]], dtype=torch.float64), weights=w, dim=1)
    for k in range(3):
        expected = reference(x[..., k], (0.2 + 0.1 * k) * w.T.expand(2, 4))
        torch.testing.assert_close(z[..., k], expected, atol=1e-13, rtol=0)
    one = torch.ones(1, dtype=torch.float64)
    assert (prox_tv1d(x, 0.3, weights=one) == prox_tv1d(x, 0.3)).all()
    assert (prox_tv1d(x[..., :1], 0.3) == x[..., :1]).all()
    assert (prox_tv1d(x[..., :1], 0.3, weights=one[:0]) == x[..., :1]).all()
    assert prox_tv1d(x[..., :0], 0.3).shape == (2, 5, 0)
    with pytest.raises(ValueError, match=r"weights: expected 2 entries along dim -1, one for each pair"):
        prox_tv1d(x, 0.3, weights=torch.ones(3, dtype=torch.float64))


def test_a_step_or_weight_of_zero_has_its_one_sided_derivative():
    """A smoothing strength that is learned from zero on must get a gradient."""
    x = torch.tensor([1.3, -0.7, 0.2, -2.0], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    slope = torch.func.jacrev(lambda t: prox_tv1d(x, t))(zero)
    torch.testing.assert_close(slope, torch.tensor([-1.0, 2.0, -2.0, 1.0], dtype=torch.float64))
    weights = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    slope = torch.func.jacrev(lambda w: prox_tv1d(x, 0.1, weights=w))(weights)[:, 0]
    torch.testing.assert_close(slope, torch.tensor([-0.1, 0.1, 0.0, 0.0], dtype=torch.float64))
