"""`ImplicitProblem` at work: the entropic transport plan, its own Sinkhorn solve and its own structured adjoint.

The inner problem: potentials (f, g) with marginals a and b of the plan P = a b exp((f + g - C)/eps). The potentials are
fixed up to a constant, so the Jacobian is singular along (1, -1), and the linear solve projects that direction on both
sides. It eliminates f (the Jacobian's upper block is diagonal) and solves for g with one Cholesky factor, made in the
forward pass.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import difflayers
from difflayers import Info, SolveError, SolveWarning, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex

F64 = torch.float64


def plan_of(z, C, a, b, eps):
    n = C.shape[-2]
    f, g = z[..., :n, None], z[..., None, n:]
    return a[..., :, None] * b[..., None, :] * torch.exp((f + g - C) / eps[..., None, None])


def marginals(z, C, a, b, eps):
    P = plan_of(z, C, a, b, eps)
    return torch.cat([P.sum(-1) - a, P.sum(-2) - b], -1)


def make_problem(tolerance=1e-14, max_steps=4000, fail=False):
    def solve(C, a, b, eps):
        n, m = C.shape[-2:]
        batch = torch.broadcast_shapes(C.shape[:-2], a.shape[:-1], b.shape[:-1], eps.shape)
        f, g = C.new_zeros(*batch, n), C.new_zeros(*batch, m)
        e = eps[..., None]
        steps = torch.zeros(batch, dtype=torch.int64, device=C.device)
        for _ in range(max_steps):
            f = -e * torch.logsumexp(b.log()[..., None, :] + (g[..., None, :] - C) / e[..., None], -1)
            g = -e * torch.logsumexp(a.log()[..., :, None] + (f[..., :, None] - C) / e[..., None], -2)
            error = marginals(torch.cat([f, g], -1), C, a, b, eps).abs().sum(-1)
            steps = steps + (error > tolerance)
            if not bool((error > tolerance).any()):
                break
        gauge = (f.mean(-1, keepdim=True) - g.mean(-1, keepdim=True)) / 2
        z = torch.cat([f - gauge, g + gauge], -1)
        status = torch.where(error > tolerance, int(Status.MAX_STEPS), int(Status.CONVERGED))
        if fail:
            status = torch.where(C.flatten(-2).amax(-1).expand(batch) > 50, int(Status.INFEASIBLE), status)
        P = plan_of(z, C, a, b, eps)
        r, c = P.sum(-1), P.sum(-2)
        S = torch.diag_embed(c) - P.mT @ (P / r[..., :, None])  # Schur complement of diag(r): null vector is one
        S = S + torch.ones_like(S) / m
        return z, Info(status, steps, error), (torch.linalg.cholesky_ex(S)[0],)

    def linear_solve(z, args, factors, rhs, transpose):  # the Jacobian [diag r, P; P^T, diag c] / eps is symmetric
        C, a, b, eps = args
        (L,) = factors
        n, m = C.shape[-2:]
        P = plan_of(z, C, a, b, eps)
        null = torch.cat([rhs.new_ones(n), -rhs.new_ones(m)]) / (n + m) ** 0.5
        project = lambda x: x - (x * null).sum(-1, keepdim=True) * null  # noqa: E731
        q = project(rhs) * eps[..., None]
        top, bottom, r = q[..., :n], q[..., n:], P.sum(-1)
        right = bottom - (P.mT @ (top / r)[..., None])[..., 0]
        y = torch.cholesky_solve(right[..., None], L.expand(*right.shape[:-1], m, m))[..., 0]
        x = (top - (P @ y[..., None])[..., 0]) / r
        out = project(torch.cat([x, y], -1))
        done = torch.zeros(out.shape[:-1], dtype=torch.int64, device=out.device)
        return out, Info(done, done + 1, torch.zeros_like(out[..., 0]))

    return ImplicitProblem(
        solve=solve,
        residual=marginals,
        linear_solve=linear_solve,
        value_ndim=1,
        arg_ndims=(2, 1, 1, 0),
        factor_ndims=(2,),
        symmetric=True,
        name="sinkhorn",
        arg_names=("cost", "a", "b", "eps"),
    )


SINKHORN = make_problem()


def plan(C, a, b, eps, problem=SINKHORN, **kwargs):
    """An explicit function of the potentials: autograd composes it outside the map."""
    return plan_of(solution_map(problem, (C, a, b, eps), **kwargs), C, a, b, eps)


def draw(*batch, n=3, m=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(*batch, n, m, generator=g, dtype=F64)
    a = torch.rand(n, generator=g, dtype=F64) + 0.5
    b = torch.rand(m, generator=g, dtype=F64) + 0.5
    return C, a / a.sum(), b / b.sum(), torch.tensor(0.3, dtype=F64)


def log_domain(C, a, b, eps, steps=120):
    """The same plan by differentiating through a plain Sinkhorn loop."""
    f, g = torch.zeros_like(C[..., 0]), torch.zeros_like(C[..., 0, :])
    for _ in range(steps):
        f = -eps * torch.logsumexp(b.log() + (g[..., None, :] - C) / eps, -1)
        g = -eps * torch.logsumexp(a.log()[:, None] + (f[..., :, None] - C) / eps, -2)
    return a[:, None] * b * torch.exp((f[..., :, None] + g[..., None, :] - C) / eps)


def test_plan_is_optimal_by_a_general_solver():
    """The primal problem min <C, P> + eps KL(P | a b) in scipy, over the free parameters of the transport polytope."""
    C, a, b, eps = (x.numpy() for x in draw(n=3, m=3))
    ref = np.outer(a, b)
    basis = np.array([np.outer(u, v).ravel() for u in ([1, -1, 0], [0, 1, -1]) for v in ([1, -1, 0], [0, 1, -1])])

    def objective(t):
        P = ref + (t @ basis).reshape(3, 3)
        if (P <= 0).any():
            return np.inf, np.zeros(4)
        value = (C * P).sum() + eps * (P * np.log(P / ref) - P + ref).sum()
        return value, basis @ (C + eps * np.log(P / ref)).ravel()

    best = minimize(objective, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-12})
    got = plan(*draw(n=3, m=3)).numpy()
    assert np.abs(got - (ref + (best.x @ basis).reshape(3, 3))).max() < 1e-7
    assert objective(np.linalg.lstsq(basis.T, (got - ref).ravel(), rcond=None)[0])[0] <= best.fun + 1e-12


def test_plan_and_its_derivatives_equal_the_unrolled_ones():
    C, a, b, eps = draw(2)
    torch.testing.assert_close(plan(C, a, b, eps), log_domain(C, a, b, eps), rtol=1e-10, atol=1e-12)
    weight = torch.randn(3, 4, dtype=F64)
    loss = lambda f: lambda C, e: (f(C, a, b, e) * weight).sin().sum()  # noqa: E731
    for k in (0, 1):
        got, want = grad(loss(plan), k)(C[0], eps), grad(loss(log_domain), k)(C[0], eps)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        got = jacfwd(grad(loss(plan), k), k)(C[0], eps)
        want = jacrev(grad(loss(log_domain), k), k)(C[0], eps)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradcheck_and_gradgradcheck(batch):
    C, a, b, eps = draw(*batch)
    f = lambda C, a, b, e: plan(C, a / a.sum(), b / b.sum(), e)  # noqa: E731
    inputs = [x.clone().requires_grad_() for x in (C, a, b, eps)]
    gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    gradgradcheck(f, inputs, fast_mode=True)


def test_gradcheck_in_full_once():
    f = lambda C, e: plan(C, *draw()[1:3], e)  # noqa: E731
    C, _, _, eps = draw()
    gradcheck(f, (C.requires_grad_(), eps.requires_grad_()), check_forward_ad=True)
    gradgradcheck(f, (C, eps))


def test_the_envelope_of_the_dual():
    """The gradient of the optimal value in the cost is the plan: an identity the engine does not know."""
    C, a, b, eps = draw()

    def value(C):
        P = plan(C, a, b, eps)
        return (C * P).sum() + eps * (P * (P / (a[:, None] * b)).log() - P).sum()

    torch.testing.assert_close(grad(value)(C), plan(C, a, b, eps), rtol=1e-9, atol=1e-11)


@pytest.fixture
def count(monkeypatch):
    """How often each factorisation of torch was called, on how many matrices."""
    calls = {}
    for name in (
        "cholesky_ex",
        "cholesky",
        "lu_factor_ex",
        "lu_factor",
        "qr",
        "inv",
        "solve",
        "solve_ex",
        "lstsq",
        "eigh",
    ):
        real = getattr(torch.linalg, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            calls[_name] = calls.get(_name, 0) + 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    return calls


def test_forward_backward_and_double_backward_cost_one_factorisation(count):
    C, a, b, eps = (x.requires_grad_() for x in draw(2))
    P = plan(C, a, b, eps)
    assert count == {"cholesky_ex": 1}
    first = torch.autograd.grad(P.square().sum(), (C, a, b, eps), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (C, a, b, eps), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in second), C)  # and a third order
    assert count == {"cholesky_ex": 1}


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(lambda C: f(C).square().sum()),
        lambda f: hessian(lambda C: f(C).square().sum()),
        lambda f: jacfwd(f),
        lambda f: jacrev(jacrev(lambda C: f(C).square().sum())),
        lambda f: vmap(hessian(lambda C: f(C).square().sum())),
    ],
    ids=["grad", "hessian", "jacfwd", "jacrev twice", "vmapped hessian"],
)
def test_one_factorisation_under_transforms(count, transform):
    C, a, b, eps = draw(2)
    transform(lambda C: plan(C, a, b, eps))(C)
    assert count == {"cholesky_ex": 1}


def test_vmap_also_over_shared_arguments():
    C, a, b, eps = draw(3)
    es = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    want = torch.stack([log_domain(x, a, b, eps) for x in C])
    torch.testing.assert_close(vmap(plan, in_dims=(0, None, None, None))(C, a, b, eps), want)
    want = torch.stack([log_domain(C, a, b, e, 300) for e in es])
    torch.testing.assert_close(vmap(plan, in_dims=(None, None, None, 0))(C, a, b, es), want)
    f = vmap(vmap(plan, in_dims=(0, None, None, None)), in_dims=(None, None, None, 0))
    torch.testing.assert_close(f(C, a, b, es), want)
    sums = vmap(grad(lambda e, C: plan(C, a, b, e).square().sum()), in_dims=(None, 0))(eps, C)
    e = eps.clone().requires_grad_()
    total = torch.autograd.grad(plan(C, a, b, e).square().sum(), e)[0]
    torch.testing.assert_close(sums.sum(), total)


def test_vmapped_hessian_equals_a_loop():
    C, a, b, eps = draw(2)
    f = lambda C: (plan(C, a, b, eps) * torch.arange(12.0, dtype=F64).reshape(3, 4)).sum()  # noqa: E731
    g = lambda C: (log_domain(C, a, b, eps) * torch.arange(12.0, dtype=F64).reshape(3, 4)).sum()  # noqa: E731
    want = torch.stack([jacrev(jacrev(g))(x) for x in C])
    for H in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(vmap(H(f))(C), want, rtol=1e-8, atol=1e-9)


def test_trace_and_report():
    C, a, b, eps = draw(2)
    with difflayers.trace() as solves:
        plan(C.requires_grad_(), a, b, eps).sum().backward()
    assert [(s.name, s.phase) for s in solves] == [("sinkhorn", "forward"), ("sinkhorn", "adjoint")]
    s = solution_map_ex(SINKHORN, (C, a, b, eps))
    assert s.status.shape == (2,) and s.converged.all() and (s.steps > 1).all()
    assert (s.residual < 1e-13).all()
    torch.testing.assert_close(marginals(s.value, C, a, b, eps), torch.zeros(2, 7, dtype=F64))


def test_starved_and_failed():
    C, a, b, eps = draw(3)
    with pytest.warns(SolveWarning, match="sinkhorn"):
        plan(C, a, b, eps, make_problem(max_steps=2))
    C[1] = 100.0
    problem = make_problem(fail=True)
    with pytest.raises(SolveError, match=r"sinkhorn.*1 of 3.*elements 1\).*INFEASIBLE"):
        plan(C, a, b, eps, problem)
    harmless = C.clone()
    harmless[1] = 0.5
    results = []
    for cost in (C, harmless):
        x, e = cost.clone().requires_grad_(), eps.clone().requires_grad_()
        z = solution_map(problem, (x, a, b, e), on_failure="nan")
        gx, ge = torch.autograd.grad(z[[0, 2]].square().sum(), (x, e), create_graph=True)
        results.append((z[[0, 2]], gx[[0, 2]], ge, *torch.autograd.grad(ge + gx[0].sum(), (x, e))))
    assert z.isfinite().all()
    for got, want in zip(*results, strict=True):
        assert torch.equal(torch.nan_to_num(got, 7.0), torch.nan_to_num(want, 7.0)) and got.isfinite().all()


def test_arguments_that_do_not_fit():
    C, a, b, eps = draw(2)
    with pytest.raises(ValueError, match=r"cost.*expected.*got"):
        solution_map(SINKHORN, (C[0, 0], a, b, eps))
    with pytest.raises(ValueError, match=r"b.*expected.*float64.*got.*float32"):
        solution_map(SINKHORN, (C, a, b.float(), eps))
    with pytest.raises(ValueError, match=r"expected.*got"):
        solution_map(SINKHORN, (C, a, b))
    with pytest.raises(ValueError, match=r"eps.*expected batch.*got"):
        solution_map(SINKHORN, (C, a, b, torch.ones(3, dtype=F64)))
    with pytest.raises(ValueError, match=r"a.*expected.*meta|a.*device"):
        solution_map(SINKHORN, (C, a.to("meta"), b, eps))
    bad = C.clone()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"cost.*finite"):
        solution_map(make_problem(max_steps=3, fail=True), (bad + 100, a, b, eps))


def test_integer_arguments_are_data():
    """No gradient, no error."""

    def solve(a, index):
        ok = torch.zeros(a.shape[:-1], dtype=torch.int64)
        return a.gather(-1, index).sqrt(), Info(ok, ok, torch.zeros_like(a[..., 0])), ()

    problem = ImplicitProblem(
        solve=solve, residual=lambda z, a, index: z * z - a.gather(-1, index), value_ndim=1, arg_ndims=(1, 1)
    )
    a = torch.tensor([1.0, 4.0, 9.0], dtype=F64, requires_grad=True)
    z = solution_map(problem, (a, torch.tensor([2, 0])))
    torch.testing.assert_close(z.detach(), torch.tensor([3.0, 1.0], dtype=F64))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), a)[0], torch.tensor([0.5, 0.0, 1 / 6], dtype=F64))


def test_a_failed_element_does_not_reach_the_others_through_its_factors():
    """sqrt as a layer with its own factor 2 sqrt(a): NaN for a negative number, at both orders only there."""

    def solve(a, s):
        z = a.sqrt() * s
        ok = torch.where(torch.isfinite(z), int(Status.CONVERGED), int(Status.DIVERGED))
        return z, Info(ok, torch.zeros_like(ok), torch.zeros_like(z)), (2 * z,)

    def linear_solve(value, args, factors, rhs, transpose):
        ok = torch.zeros(rhs.shape, dtype=torch.int64)
        return rhs / factors[0], Info(ok, ok, torch.zeros_like(rhs))

    problem = ImplicitProblem(
        solve=solve, residual=lambda z, a, s: z * z - a * s * s, linear_solve=linear_solve,
        value_ndim=0, arg_ndims=(0, 0), factor_ndims=(0,),
    )  # fmt: skip
    a = torch.tensor([4.0, -1.0, 9.0], dtype=F64, requires_grad=True)
    s = torch.tensor(1.5, dtype=F64, requires_grad=True)
    keep = torch.tensor([0, 2])
    z = solution_map(problem, (a, s), on_failure="nan")
    first = torch.autograd.grad(z[keep].sum(), (a, s), create_graph=True)
    second = torch.autograd.grad(first[0][keep].sum(), (a, s))
    exact = a.detach()[keep]
    torch.testing.assert_close(first[0][keep], 1.5 / 2 / exact.sqrt())
    torch.testing.assert_close(first[1], exact.sqrt().sum())
    torch.testing.assert_close(second[0][keep], -1.5 / 4 * exact**-1.5)
    torch.testing.assert_close(second[1], (1 / 2 / exact.sqrt()).sum())
    assert first[0][1] == 0 and second[0][1] == 0


def test_second_derivative_of_one_number_without_a_batch():
    def report(like):
        ok = torch.zeros(like.shape, dtype=torch.int64)
        return Info(ok, ok, torch.zeros_like(like))

    root = ImplicitProblem(
        solve=lambda a: (a.sqrt(), report(a), (2 * a.sqrt(),)),
        residual=lambda z, a: z * z - a,
        linear_solve=lambda value, args, factors, rhs, transpose: (rhs / factors[0], report(rhs)),
        value_ndim=0,
        arg_ndims=(0,),
        factor_ndims=(0,),
    )
    a = torch.tensor(4.0, dtype=torch.float64)
    found = torch.autograd.functional.hessian(lambda a: solution_map(root, (a,)), a)
    torch.testing.assert_close(found, -0.25 * a**-1.5)


def test_forward_mode_where_a_failed_element_shares_an_argument():
    def solve(a, b):
        product = a * b
        status = torch.where(product > 0, int(Status.CONVERGED), int(Status.DIVERGED))
        return product.abs().sqrt(), Info(status, torch.ones_like(status), torch.zeros_like(product)), ()

    root = ImplicitProblem(solve=solve, residual=lambda z, a, b: z * z - a * b, value_ndim=0, arg_ndims=(0, 0))
    a = torch.tensor([[1.0, 4.0, -1.0], [9.0, 16.0, 25.0]], dtype=torch.float64)
    b = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    value, tangent = torch.func.jvp(lambda b: solution_map(root, (a, b), on_failure="nan"), (b,), (torch.ones_like(b),))
    failed = a * b < 0
    expected = (a / b).abs().sqrt() / 2
    assert torch.isnan(value[failed]).all() and torch.isnan(tangent[failed]).all()
    torch.testing.assert_close(tangent[~failed], expected[~failed], rtol=1e-14, atol=0)
