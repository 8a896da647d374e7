"""Transport between points whose costs are not stored.

Oracles: Sinkhorn's iteration in the logarithm on the whole matrix, iterated to a standstill in float64, written here
without the library, and differences of fourth order of it; the library's own path with a matrix, which other tests
check against conic solvers; for values POT. Memory is what torch's allocator counts, so that a stored matrix shows.
"""

import dataclasses
import subprocess
import sys

import ot
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import difflayers
from difflayers.linalg import CG, Cholesky
from difflayers.testing.cases._common import numbers
from difflayers.transport import (
    Cosine,
    Euclidean,
    KernelSinkhorn,
    LogSinkhorn,
    PointCloud,
    Sinkhorn,
    SparseNewton,
    SquaredEuclidean,
    _point_kernel,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_ex,
    sinkhorn_value,
)
from difflayers.transport._point_solver import Points, Solver

D = torch.float64
TIGHT = {"solver": LogSinkhorn(rtol=1e-14), "adjoint": CG(rtol=1e-13)}
DENSE = {"solver": KernelSinkhorn(rtol=1e-14), "adjoint": Cholesky()}
COSTS = [SquaredEuclidean(), Euclidean(), Cosine()]
RHOS = [{}, {"rho_a": 0.7}, {"rho_b": 0.6}, {"rho_a": 0.7, "rho_b": 1.3}]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def unit(*shape: int, seed: int = 0) -> Tensor:
    t = rand(*shape, seed=seed) + 0.1
    return t / t.sum(-1, keepdim=True)


def data(n: int = 6, m: int = 5) -> dict[str, Tensor]:
    return {
        "x": rand(n, 2),
        "y": rand(m, 2, seed=1) + 0.2,
        "a": unit(n, seed=2),
        "b": unit(m, seed=3),
        "eps": numbers(0.2),
    }


def reference(C: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho_a=None, rho_b=None) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and potentials of one element, by alternate soft minima to a standstill."""
    ka, kb = (1 if rho is None else 1 + eps / rho for rho in (rho_a, rho_b))
    hard = rho_a is None and rho_b is None
    if hard:  # as documented
        a, b = a * (b.sum() / a.sum()).sqrt(), b * (a.sum() / b.sum()).sqrt()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(100_000):
        old = g
        f = -eps * torch.logsumexp((g - C) / eps + b.log(), -1) / ka
        g = -eps * torch.logsumexp((f.unsqueeze(-1) - C) / eps + a.log().unsqueeze(-1), -2) / kb
        if float((g - old).abs().max()) < 1e-15:
            break
    if hard:
        shift = ((f * a).sum() / a.sum() - (g * b).sum() / b.sum()) / 2
        f, g = f - shift, g + shift
    return a.unsqueeze(-1) * b * ((f.unsqueeze(-1) + g - C) / eps).exp(), f, g


def cost_matrix(cost, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(cost, Cosine):
        return 1 - (x / x.norm(dim=-1, keepdim=True)) @ (y / y.norm(dim=-1, keepdim=True)).mT
    square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    return square.sqrt() if isinstance(cost, Euclidean) else square


def number(plan: Tensor, f: Tensor, g: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Something that all of a coupling enters; the plan as a function of vectors, or as a matrix."""
    there = plan.apply(v) if not isinstance(plan, Tensor) else plan @ v
    back = plan.apply(u, transpose=True) if not isinstance(plan, Tensor) else plan.mT @ u
    return there.square().sum() + (back * (1 + back)).sum() + f.square().sum() + (g * g.detach().cos()).sum()


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("cost", COSTS, ids=repr)
@pytest.mark.parametrize("rho", RHOS, ids=lambda rho: "-".join(rho) or "hard")
def test_coupling_and_value_are_those_of_the_matrix(cost, rho):
    z = data(9, 7)
    v, u = rand(7, 3, seed=4), rand(9, seed=5)
    args = z["a"], z["b"]
    cloud = PointCloud(z["x"], z["y"], cost, rows=4)
    found = sinkhorn_ex(cloud, *args, eps=z["eps"], **rho, **TIGHT)
    plan, f, g = reference(cost_matrix(cost, z["x"], z["y"]), *args, z["eps"], **rho)
    assert bool(found.converged)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=0, atol=1e-11)  # noqa: E731
    close(found.value.f, f)
    close(found.value.g, g)
    close(found.value.plan, plan)
    close(sinkhorn(cloud, *args, eps=z["eps"], **rho, **TIGHT), plan)
    close(found.value.apply(v), plan @ v)
    close(found.value.apply(v[:, 0]), plan @ v[:, 0])
    close(found.value.apply(u, transpose=True), plan.mT @ u)
    want = sinkhorn_value(cost_matrix(cost, z["x"], z["y"]), *args, eps=z["eps"], **rho, **DENSE)
    close(sinkhorn_value(cloud, *args, eps=z["eps"], **rho, **TIGHT), want)


def test_value_and_plan_are_those_of_pot():
    z = data(30, 20)
    cost = torch.cdist(z["x"], z["y"]).square()
    found = ot.solve(cost.numpy(), z["a"].numpy(), z["b"].numpy(), reg=0.2, reg_type="KL", max_iter=10**5, tol=1e-14)
    cloud = PointCloud(z["x"], z["y"], rows=7)
    value = sinkhorn_value(cloud, z["a"], z["b"], eps=0.2, **TIGHT)
    assert abs(float(value) - float(found.value)) < 1e-10
    plan = sinkhorn(cloud, z["a"], z["b"], eps=0.2, **TIGHT)
    torch.testing.assert_close(plan, torch.as_tensor(found.plan), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("cost", COSTS, ids=repr)
def test_blocks_equal_one_block(rows, cost):
    z = data(11, 6)
    v, u = rand(6, 2, seed=4), rand(11, 2, seed=5)

    def run(size: int) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in z.items()}
        cloud = PointCloud(leaves["x"], leaves["y"], cost, rows=size)
        rest = {name: leaves[name] for name in ("a", "b", "eps")}
        found = sinkhorn_ex(cloud, **rest, rho_a=0.5, **TIGHT).value
        total = number(found, found.f, found.g, v, u) + sinkhorn_value(cloud, **rest, **TIGHT)
        slopes = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(s.square().sum() for s in slopes), list(leaves.values()))
        return [total, *slopes, *second]

    for got, want in zip(run(rows), run(100), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_block_size_is_bounded(monkeypatch):
    monkeypatch.setattr(_point_kernel, "ENTRIES", {"cpu": 64})
    size = _point_kernel.block_rows
    x, y = torch.zeros(50, 3), torch.zeros(8, 3)
    assert size(SquaredEuclidean(), x, y, torch.Size(())) == 8
    assert size(SquaredEuclidean(), x, y, torch.Size((4,))) == 2
    assert size(Euclidean(), x, y, torch.Size(())) == 2  # which keeps differences
    assert size(Cosine(), x, torch.zeros(500, 3), torch.Size(())) == 1


# ------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("cost", COSTS, ids=repr)
@pytest.mark.parametrize("rho", RHOS, ids=lambda rho: "-".join(rho) or "hard")
def test_derivatives_are_those_of_differences(cost, rho):
    inputs = {**data(), **{name: numbers(r) for name, r in rho.items()}, "v": rand(5, seed=4), "u": rand(6, seed=5)}

    def ours(x, y, v, u, **rest):
        found = sinkhorn_ex(PointCloud(x, y, cost, rows=2), **rest, **TIGHT).value
        return number(found, found.f, found.g, v, u)

    def other(x, y, v, u, a, b, eps, **rest):
        plan, f, g = reference(cost_matrix(cost, x, y), a, b, eps, **rest)
        there, back = plan @ v, plan.mT @ u
        return there.square().sum() + (back * (1 + back)).sum() + f.square().sum() + (g * weights).sum()

    weights = reference(cost_matrix(cost, inputs["x"], inputs["y"]), *(inputs[k] for k in ("a", "b", "eps")), **rho)[2]
    weights = weights.cos()  # which `number` holds fixed
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    found = dict(zip(leaves, torch.autograd.grad(ours(**leaves), list(leaves.values())), strict=True))
    for name, t in inputs.items():
        move, expected = rand(*t.shape, seed=6) - 0.5, 0.0
        for k, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            expected += weight * float(other(**inputs | {name: t + k * 3e-4 * move})) / 36e-4
        assert abs(float((found[name] * move).sum()) - expected) < 1e-8 * max(1, abs(expected)), name


@pytest.mark.parametrize("rho", [{}, {"rho_a": 0.5, "rho_b": 0.7}])
def test_value_has_the_gradient_of_differences_without_a_solve(rho):
    inputs = {**data(), **{name: numbers(r) for name, r in rho.items()}}
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}

    def ours(x, y, **rest):
        return sinkhorn_value(PointCloud(x, y, rows=2), **rest, **TIGHT)

    def other(x, y, a, b, eps, rho_a=None, rho_b=None):
        C = cost_matrix(SquaredEuclidean(), x, y)
        P = reference(C, a, b, eps, rho_a, rho_b)[0]
        kl = lambda p, q: (p * (p / q).log() - p + q).sum()  # noqa: E731
        if rho_a is None:
            a, b = a * (b.sum() / a.sum()).sqrt(), b * (a.sum() / b.sum()).sqrt()
        value = (C * P).sum() + eps * kl(P, a.unsqueeze(-1) * b)
        return value if rho_a is None else value + rho_a * kl(P.sum(-1), a) + rho_b * kl(P.sum(-2), b)

    with difflayers.trace() as solves:
        found = dict(zip(leaves, torch.autograd.grad(ours(**leaves), list(leaves.values())), strict=True))
    assert [solve.phase for solve in solves] == ["forward"]
    for name, t in inputs.items():
        move, expected = rand(*t.shape, seed=6) - 0.5, 0.0
        for k, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            expected += weight * float(other(**inputs | {name: t + k * 3e-4 * move})) / 36e-4
        assert abs(float((found[name] * move).sum()) - expected) < 1e-8, name


@pytest.mark.parametrize("rho", [{}, {"rho_b": 0.7}])
def test_second_derivatives_pass_gradgradcheck(rho):
    z = data(3, 2)

    def fn(x, y, a, eps, v):
        found = sinkhorn_ex(PointCloud(x, y, rows=2), a / a.sum(), eps=eps, **rho, **TIGHT).value
        return found.apply(v), found.g

    inputs = [z["x"], z["y"], z["a"], z["eps"], rand(2, seed=4)]
    inputs = [t.requires_grad_() for t in inputs]
    assert gradcheck(fn, inputs, fast_mode=True)
    assert gradgradcheck(fn, inputs, fast_mode=True)


def test_transforms_give_what_they_give_for_a_matrix():
    z = data(4, 3)
    args = (z["x"], z["y"], z["a"], z["eps"], rand(3, 2, seed=4), rand(4, seed=5))

    def make(points: bool):
        def fn(x, y, a, eps, v, u):
            cloud = PointCloud(x, y, rows=2)
            options = TIGHT if points else DENSE
            c = sinkhorn_ex(cloud if points else cloud.matrix(), a, eps=eps, rho_a=0.6, **options).value
            plan = c if points else c.plan
            value = sinkhorn_value(cloud if points else cloud.matrix(), a, eps=eps, rho_a=0.6, **options)
            return number(plan, c.f, c.g, v, u.unsqueeze(-1)) + value

        return fn

    ours, theirs = make(True), make(False)
    moves = tuple(torch.full_like(t, 0.3) for t in args)
    dims = (0, None, 0, None, None, 0)
    some = tuple(t if d is None else torch.stack([t, 0.9 * t, 1.1 * t]) for t, d in zip(args, dims, strict=True))

    def results(fn):
        yield jvp(fn, args, moves)
        yield jacfwd(jacrev(fn, argnums=(0, 2, 3)), argnums=(0, 2, 3))(*args)
        yield vmap(fn, dims)(*some)
        yield vmap(grad(fn, argnums=(0, 1, 4)), dims)(*some)
        yield jacrev(lambda *s: vmap(fn, dims)(*s), argnums=(0, 1))(*some)

    for got, want in zip(results(ours), results(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------- edges


def test_batches_broadcast_and_nan_stays_in_its_element():
    x, y, eps = rand(3, 8, 2), rand(5, 2, seed=1), numbers([1.0, 0.01, 1e-3])
    v = rand(3, 5, seed=2)
    alone = [sinkhorn_ex(PointCloud(x[i], y), eps=eps[i]).value.apply(v[i]) for i in range(3)]
    together = sinkhorn_ex(PointCloud(x, y, rows=3), eps=eps)
    torch.testing.assert_close(together.value.apply(v), torch.stack(alone), rtol=0, atol=1e-9)
    assert together.value.shape == (3, 8, 5)
    x[1, 0, 0] = torch.nan
    shared = y.clone().requires_grad_()
    bad = sinkhorn_ex(PointCloud(x, shared, rows=3), eps=eps)
    assert bad.failed.tolist() == [False, True, False]
    out = bad.value.apply(v)
    assert bool(torch.isnan(out[1]).all())
    torch.testing.assert_close(out[[0, 2]], torch.stack([alone[0], alone[2]]), rtol=0, atol=1e-9)
    plan = sinkhorn(PointCloud(x, shared), eps=eps, on_failure="nan")
    (slope,) = torch.autograd.grad((plan[0] * plan[0]).sum(), shared)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_masses_of_zero(eps):
    x, y = rand(12, 2).requires_grad_(), rand(9, 2, seed=1)
    a, b = unit(12, seed=2), unit(9, seed=3)
    a[::3], b[1::4] = 0, 0
    a, b = (a / a.sum()).requires_grad_(), b / b.sum()
    ours = sinkhorn_ex(PointCloud(x, y, rows=5), a, b, eps=eps, **TIGHT).value
    theirs = sinkhorn_ex(PointCloud(x, y).matrix(), a, b, eps=eps, **DENSE).value
    torch.testing.assert_close(ours.f, theirs.f, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.g, theirs.g, rtol=0, atol=1e-10)
    v = rand(9, seed=4)
    totals = ((out * out).sum() for out in (ours.apply(v), theirs.plan @ v))
    totals = (
        t + (c.f * c.f.cos().detach()).sum() + c.g.square().sum() for t, c in zip(totals, (ours, theirs), strict=True)
    )
    got, want = (torch.autograd.grad(total, (x, a)) for total in totals)
    for s, t in zip(got, want, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rho", [{}, {"rho_a": 1e-2}, {"rho_a": 1e-3, "rho_b": 1e-3}, {"rho_a": 1e3, "rho_b": 1e3}])
@pytest.mark.parametrize("eps", [1.0, 1e-2, 1e-3])
def test_small_eps_and_extreme_penalties_reach_the_tolerance(rho, eps):
    x, y, a, b = rand(40, 2), rand(30, 2, seed=1), unit(40, seed=2), unit(30, seed=3)
    found = sinkhorn_ex(PointCloud(x, y, rows=16), a, b, eps=eps, **rho)
    assert bool(found.converged)
    assert float(found.residual) < 1e-10
    want = sinkhorn_value(PointCloud(x, y).matrix(), a, b, eps=eps, **rho)
    got = sinkhorn_value(PointCloud(x, y, rows=16), a, b, eps=eps, **rho)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_single_precision_down_to_a_thousandth_of_the_range():
    x, y = rand(40, 2), rand(30, 2, seed=1)
    eps = 1e-3 * float(PointCloud(x, y).matrix().max())
    exact = sinkhorn(PointCloud(x, y), eps=eps)
    found = sinkhorn_ex(PointCloud(x.float(), y.float(), rows=7), eps=eps)
    assert found.value.plan.dtype == torch.float32
    assert bool(found.converged)
    assert float((found.value.plan - exact).abs().sum()) < 2e-3


def test_a_start_out_of_the_range_of_the_kernel_is_survived():
    x, y = rand(12, 2), rand(9, 2, seed=1)
    found = sinkhorn_ex(PointCloud(x, y, rows=5), eps=0.01)
    for way in (-1e5, 1e5):
        start = dataclasses.replace(found.value, g=found.value.g + way * rand(9, seed=2))
        again = sinkhorn_ex(PointCloud(x, y, rows=5), eps=0.01, warm_start=start)
        assert bool(again.converged)
        torch.testing.assert_close(again.value.plan, found.value.plan, rtol=0, atol=1e-10)


def test_a_step_out_of_the_range_of_the_kernel_is_one_of_the_logarithm():
    x, y, a, b = rand(1, 12, 2), rand(1, 9, 2, seed=1), unit(1, 12, seed=2), unit(1, 9, seed=3)
    eps, soft = numbers([0.01]), numbers([0.5])
    p = Points(x, y, a, b, eps, soft, soft)
    g = -1e4 * rand(1, 9, seed=4)
    found = Solver(SquaredEuclidean(), 5, LogSinkhorn()).visit(p, torch.zeros_like(a), g, eps)
    C = cost_matrix(SquaredEuclidean(), x, y)
    f = -0.01 * torch.logsumexp((g.unsqueeze(-2) - C) / 0.01 + b.log().unsqueeze(-2), -1) / 1.005
    following = -0.01 * torch.logsumexp((f.unsqueeze(-1) - C) / 0.01 + a.log().unsqueeze(-1), -2) / 1.005
    torch.testing.assert_close(found.f, f, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.following, following, rtol=1e-12, atol=0)


def test_warm_start_saves_steps():
    x, y = rand(40, 2), rand(30, 2, seed=1)
    first = sinkhorn_ex(PointCloud(x, y), eps=0.01)
    same = sinkhorn_ex(PointCloud(x, y), eps=0.01, warm_start=first)
    near = sinkhorn_ex(PointCloud(x + 1e-3, y), eps=0.01, warm_start=first.value)
    dense = sinkhorn_ex(PointCloud(x, y).matrix(), eps=0.01, warm_start=first)
    assert int(first.steps) > 20
    assert int(same.steps) <= 1
    assert int(near.steps) <= 6
    assert int(dense.steps) <= 1
    assert all(bool(s.converged) for s in (same, near, dense))


def test_elements_without_mass_have_a_plan_of_zeros():
    x, y = rand(2, 4, 2).requires_grad_(), rand(3, 2, seed=1)
    a = torch.stack([unit(4), torch.zeros(4, dtype=D)])
    cloud = PointCloud(x, y)
    out = sinkhorn_ex(cloud, a, eps=0.1, rho_b=0.5).value.apply(rand(2, 3, seed=2))
    assert bool((out[1] == 0).all() and (out[0] > 0).all())
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert bool((slope[1] == 0).all() and torch.isfinite(slope).all())
    values = sinkhorn_value(cloud, a, eps=0.1, rho_b=0.5)
    assert float(values[1].detach()) == pytest.approx(0.5)  # the penalty of 1, the total of b


def test_divergence_without_matrices_is_the_same():
    x, y = rand(9, 2).requires_grad_(), rand(7, 2, seed=1)
    for options in ({}, {"rho": 0.5}, {"cost": Euclidean(), "rho": 0.5}):
        results = []
        for free in (False, True):
            value = sinkhorn_divergence(x, y, eps=0.1, matrix_free=free, **options)
            results.append((value, *torch.autograd.grad(value, x)))
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_module_takes_points():
    x, y = rand(5, 2), rand(4, 2, seed=1)
    layer = Sinkhorn(0.2, learnable=True).double()
    torch.testing.assert_close(layer(PointCloud(x, y)), layer(PointCloud(x, y).matrix()), rtol=0, atol=1e-10)


def test_wrong_calls_are_refused():
    x, y = rand(5, 2), rand(4, 2, seed=1)
    cloud = PointCloud(x, y)
    coupling = sinkhorn_ex(cloud, eps=0.1).value
    weights = torch.ones(2, dtype=D, requires_grad=True)
    for match, call in {
        "solver: expected LogSinkhorn": lambda: sinkhorn_ex(cloud, eps=0.1, solver=SparseNewton()),
        "adjoint: expected CG": lambda: sinkhorn_ex(cloud, eps=0.1, adjoint=Cholesky()),
        r"v: expected shape \(4,\) or \(4, 'k'\), got \(5,\)": lambda: coupling.apply(x[:, 0]),
        r"v: expected shape \(5,\)": lambda: coupling.apply(y[:, 0], transpose=True),
        "v: expected dtype": lambda: coupling.apply(y[:, 0].float()),
        "x: expected at least one point": lambda: PointCloud(x[:0], y),
        "cost: expected SquaredEuclidean": lambda: PointCloud(x, y, 3),
        "rows: expected None": lambda: PointCloud(x, y, rows=0),
        "cost": lambda: PointCloud(x, y, lambda p, q: SquaredEuclidean()(p * weights, q * weights)),
        "warm_start: expected potentials of 5 rows": lambda: sinkhorn(
            cloud, eps=0.1, warm_start=sinkhorn_ex(PointCloud(y, x), eps=0.1)
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_large_plans_are_refused_before_anything_is_solved():
    x = torch.linspace(0, 1, 5000).unsqueeze(-1)
    with difflayers.trace() as solves, pytest.raises(ValueError, match="plan: expected at most 16777216 entries"):
        sinkhorn(PointCloud(x, x), eps=0.1)
    assert not solves


# ------------------------------------------------------------------------------------------------------------ memory


def peak(run) -> int:
    """Bytes that torch's allocator held at once for `run`, beyond what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most


def test_memory_does_not_hold_a_matrix(monkeypatch):
    """At n = m = 800 the matrix has 5.1 MB, a block of 2^14 entries 0.13 MB, of which there are a few at a time."""
    monkeypatch.setattr(_point_kernel, "ENTRIES", {"cpu": 2**14})
    n, few = 800, {"solver": LogSinkhorn(rtol=1e-6), "adjoint": CG(rtol=1e-4)}
    inputs = {"x": rand(n, 2), "y": rand(n, 2, seed=1), "a": unit(n, seed=2), "b": unit(n, seed=3), "eps": numbers(1.0)}
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    v = rand(n, 2, seed=4).requires_grad_()
    saved: list[int] = []

    def run(x, y, **rest):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            found = sinkhorn_ex(PointCloud(x, y), **rest, **few).value
            total = number(found, found.f, found.g, v, v) + sinkhorn_value(PointCloud(x, y), **rest, **few)
        slopes = torch.autograd.grad(total, [*leaves.values(), v], create_graph=True)
        torch.autograd.grad(slopes[0].square().sum(), x)

    most = peak(lambda: run(**leaves))
    assert most < 4e6
    assert max(saved) <= 2 * n
    dense = peak(lambda: SquaredEuclidean()(inputs["x"].detach(), inputs["y"].detach()))
    assert dense > 5e6  # the measure sees it


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e8), (torch.float32, 1e4)])
def test_an_outlier_out_of_reach_hides_no_error_and_spoils_no_gradient(dtype, far):
    """A penalty leaves it where it is; plan and derivatives of the others are those without it."""
    x, y = rand(7, 2).to(dtype), rand(5, 2, seed=1).to(dtype)
    a, b = x.new_full((8,), 1 / 8), y.new_full((5,), 1 / 5)
    tol = 1e-8 if dtype == torch.float64 else 1e-4
    for distance in (30.0, far):
        points = torch.cat([x, x[:1] + distance]).requires_grad_()
        near = x.clone().requires_grad_()
        options = {"eps": 0.5, "rho_a": 1.0, "rho_b": 1.0}
        found = sinkhorn_ex(PointCloud(points, y), a, b, **options)
        plain = sinkhorn_ex(PointCloud(near, y), a[:7], b, **options)
        assert bool(found.converged) and float(found.residual) < (1e-7 if dtype == torch.float64 else 1e-4)
        results = []
        for solution, given in ((found, points), (plain, near)):
            moved = solution.value.apply(y)[:7]
            first = torch.autograd.grad(moved.square().sum(), given, create_graph=True)[0]
            results.append((moved, first, torch.autograd.grad(first.square().sum(), given)[0]))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got[:7], expected[:7], rtol=10 * tol, atol=tol)
        assert bool(torch.isfinite(torch.cat([results[0][1], results[0][2]])).all())


def test_one_penalised_side_needs_few_steps():
    """Totals differ, and the penalty is strong: a constant moves between the potentials."""
    x, y = rand(6, 2), rand(5, 2, seed=1)
    a, b = torch.full((6,), 1 / 6, dtype=D), torch.full((5,), 0.3, dtype=D)
    found = sinkhorn_ex(PointCloud(x, y), a, b, eps=1.0, rho_b=1e4)
    assert bool(found.converged) and int(found.steps) < 200


def test_the_process_grows_by_less_than_a_matrix():
    """What stays is allocated before what comes and goes, so that no holes are left between blocks."""
    code = """
import resource, torch
from difflayers.transport import PointCloud, sinkhorn_value
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
draw = lambda n: torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).requires_grad_()
x = draw(300)
sinkhorn_value(PointCloud(x, draw(301)), eps=20.0).backward()
before, x = peak(), draw(8000)
sinkhorn_value(PointCloud(x, draw(8001)), eps=20.0).backward()
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 0.25 * 4 * 8000 * 8001
