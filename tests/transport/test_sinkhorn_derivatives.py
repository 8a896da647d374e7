"""Derivatives of plans, potentials and values.

Oracles, written down before the code: central differences of a converged solve, whose masses move along directions that
keep their totals equal; one-sided differences at a mass of zero; the envelope theorem for the value.
"""

import itertools

import pytest
import torch
from torch import Tensor

import difflayers
from difflayers.transport import KernelSinkhorn, sinkhorn, sinkhorn_ex, sinkhorn_value

D = torch.float64
TIGHT = KernelSinkhorn(rtol=1e-14)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def unit(*shape: int, seed: int = 0) -> Tensor:
    t = rand(*shape, seed=seed) + 0.1
    return t / t.sum(-1, keepdim=True)


def directional(fn, inputs: dict[str, Tensor], moves: dict[str, Tensor]) -> float:
    """The derivative along `moves` by differences of fourth order."""
    total = 0.0
    for k, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        total += weight * float(fn(**{name: t + k * 1e-4 * moves.get(name, 0) for name, t in inputs.items()}))
    return total / 12e-4


PARTS = {
    "plan": lambda **x: sinkhorn(**x, solver=TIGHT),
    "f": lambda **x: sinkhorn_ex(**x, solver=TIGHT).value.f,
    "g": lambda **x: sinkhorn_ex(**x, solver=TIGHT).value.g,
    "value": lambda **x: sinkhorn_value(**x, solver=TIGHT),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("soft", [(), ("rho_a",), ("rho_b",), ("rho_a", "rho_b")])
def test_derivatives_are_those_of_differences(part, soft):
    inputs = {
        "cost": rand(6, 5),
        "a": 1.3 * unit(6, seed=1),
        "b": 1.3 * unit(5, seed=2),
        "eps": torch.tensor(0.1, dtype=D),
    }
    inputs |= {name: torch.tensor(0.4 + 0.3 * i, dtype=D) for i, name in enumerate(soft)}
    weights = rand(*PARTS[part](**inputs).shape, seed=3) - 0.5

    def number(**x: Tensor) -> Tensor:
        out = PARTS[part](**x)
        return (weights * out).sum() + (weights * out.square()).sum()

    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    found = dict(zip(leaves, torch.autograd.grad(number(**leaves), list(leaves.values())), strict=True))
    for name in inputs:
        move = rand(*inputs[name].shape, seed=4) - 0.5
        moves = {name: move - move.mean() if name in ("a", "b") else move}
        expected = directional(number, inputs, moves)
        got = float((found[name] * moves[name]).sum())
        assert abs(got - expected) < 1e-8 * max(1, abs(expected)), name
    both = {"a": rand(6, seed=5), "b": rand(5, seed=6)}  # the common mass
    both["b"] *= both["a"].sum() / both["b"].sum()
    got = float((found["a"] * both["a"]).sum() + (found["b"] * both["b"]).sum())
    assert abs(got - directional(number, inputs, both)) < 1e-8


def test_unequal_changes_of_totals_count_as_scaled_to_the_geometric_mean():
    cost, a, b = rand(4, 3), unit(4, seed=1), unit(3, seed=2)
    weights, change = rand(4, 3, seed=3), rand(4, seed=4)
    x = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad((weights * sinkhorn(cost, x, b, eps=0.1, solver=TIGHT)).sum(), x)

    def scaled(a: Tensor) -> Tensor:
        half = (a.sum() / b.sum()).sqrt()
        return (weights * sinkhorn(cost, a / half, b * half, eps=0.1, solver=TIGHT)).sum()

    assert abs(float((slope * change).sum()) - directional(scaled, {"a": a}, {"a": change})) < 1e-8


def test_derivative_at_masses_of_zero_is_one_sided():
    cost, weights = rand(5, 4), rand(5, 4, seed=1) - 0.5
    a = torch.tensor([0.3, 0, 0.3, 0.4, 0], dtype=D)
    b = torch.tensor([0.5, 0, 0.25, 0.25], dtype=D)

    def number(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (weights * sinkhorn(cost, a, b, eps=0.1, solver=TIGHT)).sum()

    x = [t.clone().requires_grad_() for t in (cost, a, b)]
    slope_cost, slope_a, slope_b = torch.autograd.grad(number(*x), x)
    plan = sinkhorn(cost, a, b, eps=0.1)
    assert bool((plan[a == 0] == 0).all() and (plan[:, b == 0] == 0).all())
    move = rand(5, 4, seed=2)
    assert (
        abs(float((slope_cost * move).sum()) - directional(number, {"cost": cost, "a": a, "b": b}, {"cost": move}))
        < 1e-8
    )
    for i, j in itertools.product(range(5), range(4)):

        def step(h: float, i: int = i, j: int = j) -> float:
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            da[i], db[j] = h, h
            return float(number(cost, a + da, b + db))

        h = 1e-4  # third order, from one side
        right = (-11 * step(0) + 18 * step(h) - 9 * step(2 * h) + 2 * step(3 * h)) / (6 * h)
        assert abs(float(slope_a[i] + slope_b[j]) - right) < 1e-7


@pytest.mark.parametrize("eps", [0.1, 1e-2, 1e-4])
def test_potentials_at_masses_of_zero_are_soft_minima(eps):
    """Whatever found the others: Newton's method, to which such rows say nothing, or the iteration."""
    cost = (torch.arange(12, dtype=D).unsqueeze(-1) / 12 - rand(10)).abs()
    a, b = unit(12, seed=1), unit(10, seed=2)
    a[2::4], b[1::5] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    _, f, g = sinkhorn_ex(cost, a, b, eps=eps).value
    rows = -eps * ((g - cost) / eps + b.log()).logsumexp(-1)
    columns = -eps * ((f.unsqueeze(-1) - cost) / eps + a.log().unsqueeze(-1)).logsumexp(-2)
    torch.testing.assert_close(f[a == 0], rows[a == 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(g[b == 0], columns[b == 0], rtol=0, atol=1e-12)


def test_padding_changes_neither_plan_nor_gradient():
    cost, a, b = rand(2, 4, 3), unit(2, 4, seed=1), unit(2, 3, seed=2)
    wide = torch.full((2, 6, 5), 7.0, dtype=D)
    wide[:, :4, :3] = cost
    weights = rand(2, 4, 3, seed=3)
    pad = lambda t, k: torch.cat([t, t.new_zeros(2, k)], -1)  # noqa: E731
    small, large = cost.clone().requires_grad_(), wide.clone().requires_grad_()
    plan, padded = sinkhorn(small, a, b, eps=0.05), sinkhorn(large, pad(a, 2), pad(b, 2), eps=0.05)
    torch.testing.assert_close(padded[:, :4, :3], plan, rtol=0, atol=1e-11)
    (first,) = torch.autograd.grad((weights * plan).sum(), small)
    (second,) = torch.autograd.grad((weights * padded[:, :4, :3]).sum(), large)
    torch.testing.assert_close(second[:, :4, :3], first, rtol=0, atol=1e-9)
    assert bool((second[:, 4:] == 0).all() and (second[:, :, 3:] == 0).all())


@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5}, {"rho_a": 0.5, "rho_b": 0.7}])
def test_value_has_the_envelope_gradient(rho):
    x = {"cost": rand(5, 4) - 0.3, "a": unit(5, seed=1), "b": unit(4, seed=2), "eps": torch.tensor(0.2, dtype=D)}
    x = {name: t.requires_grad_() for name, t in x.items()}
    with difflayers.trace() as solves:
        value = sinkhorn_value(**x, **rho)
        slopes = dict(zip(x, torch.autograd.grad(value, list(x.values())), strict=True))
    assert [solve.phase for solve in solves] == ["forward"]  # no linear solve
    found = sinkhorn_ex(**x, **rho).value
    P, a, b = (t.detach() for t in (found.plan, x["a"], x["b"]))
    torch.testing.assert_close(slopes["cost"], P, rtol=0, atol=1e-9)
    kl = lambda p, q: (p * (p / q).log() - p + q).sum()  # noqa: E731
    torch.testing.assert_close(slopes["eps"], kl(P, a.unsqueeze(-1) * b), rtol=0, atol=1e-9)
    if not rho:
        f, g = found.f.detach(), found.g.detach()
        for name, potential in (("a", f), ("b", g)):
            torch.testing.assert_close(
                slopes[name] - slopes[name].mean(), potential - potential.mean(), rtol=0, atol=1e-9
            )
        total = float((slopes["a"] * a).sum() + (slopes["b"] * b).sum())
        assert abs(total - float((f * a).sum() + (g * b).sum())) < 1e-9  # moving the common mass


def test_backward_keeps_nothing_of_the_iterations():
    cost = rand(40, 40).requires_grad_()

    def kept(max_steps: int) -> int:
        sizes = []
        solver = KernelSinkhorn(max_steps=max_steps, newton_steps=0, rtol=0.0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = sinkhorn_ex(cost, eps=0.01, solver=solver)
        assert int(found.steps) == max_steps
        return sum(sizes)

    assert kept(10) == kept(1000) < 20 * cost.numel()


@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5, "rho_b": 2.0}])
def test_float32_gradient_at_small_eps(rho):
    cost, weights = rand(2, 20, 16).float(), rand(2, 20, 16, seed=1)
    slopes = []
    for dtype in (torch.float32, D):
        x = cost.to(dtype).requires_grad_()
        plan = sinkhorn(x, eps=1e-3, **rho)
        slopes.append(torch.autograd.grad(plan, x, weights.to(dtype))[0].to(D))
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 1e-2


def test_gradient_of_a_plan_with_separate_blocks_is_finite():
    """Two blocks that exchange no mass at all: the Schur complement has a second null vector."""
    cost = torch.full((6, 6), 1e4, dtype=D)
    cost[:3, :3], cost[3:, 3:] = rand(3, 3), rand(3, 3, seed=1)
    weights = torch.zeros(6, 6, dtype=D)
    weights[:3, :3] = rand(3, 3, seed=2)
    x, y = cost.clone().requires_grad_(), cost[:3, :3].clone().requires_grad_()
    mass = torch.full((6,), 1 / 6, dtype=D)
    (slope,) = torch.autograd.grad((weights * sinkhorn(x, mass, mass, eps=0.1)).sum(), x)
    (block,) = torch.autograd.grad((weights[:3, :3] * sinkhorn(y, mass[:3], mass[:3], eps=0.1)).sum(), y)
    torch.testing.assert_close(slope[:3, :3], block, rtol=0, atol=1e-8)
    assert float(slope[3:].abs().max()) < 1e-8
