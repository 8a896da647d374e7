"""What the engine promises: derivatives of any order against closed forms and unrolled loops, and no silent failure.

No oracle here comes from the library: second-order partials are written by hand, the 30-dimensional system is
differentiated through plain Newton steps in torch, the linear equilibrium through numpy.
"""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import difflayers
from difflayers import SolveWarning
from difflayers.implicit import (
    LBFGS,
    Anderson,
    Bisection,
    Implicit,
    LevenbergMarquardt,
    Neumann,
    Newton,
    OneStep,
    Picard,
    Unrolled,
    argmin,
    argmin_ex,
    fixed_point,
    fixed_point_ex,
    nonlinear_least_squares,
    nonlinear_least_squares_ex,
    root_find,
    root_find_ex,
)
from difflayers.linalg import CG, GMRES, LU, linear_solve
from difflayers.testing import saved_bytes
from tests.modes import inference

F64 = torch.float64


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=tol, atol=tol)


# ---------------------------------------------------------------------------------------------- scalar closed forms


def implicit_derivatives(Fz, Fzz, Ft, Fzt, Ftt):
    """First and second derivatives of z(t) with F(z, t) = 0, from partials written by hand."""
    first = [-f / Fz for f in Ft]
    p = len(Ft)
    second = [
        [-(Ftt[i][j] + Fzt[i] * first[j] + Fzt[j] * first[i] + Fzz * first[i] * first[j]) / Fz for j in range(p)]
        for i in range(p)
    ]
    return first, second


def cubic_oracle(a, c):
    """c y^3 + y = a: the root by the hyperbolic form of Cardano's formula, y(1) = 1 at a = 2, c = 1."""
    y = 2 / math.sqrt(3 * c) * math.sinh(math.asinh(1.5 * math.sqrt(3 * c) * a) / 3)
    first, second = implicit_derivatives(
        1 + 3 * c * y**2, 6 * c * y, [-1.0, y**3], [0.0, 3 * y**2], [[0.0, 0.0], [0.0, 0.0]]
    )
    d = 1 + 3 * c * y**2
    third_aaa = -6 * c / d**4 + 108 * c**2 * y**2 / d**5  # from y' = 1/d, y'' = -6 c y / d^3
    return y, first, second, third_aaa


def cosine_oracle(a, b):
    """z = cos(a z + b): bisection for the root, partials of z - cos(a z + b) by hand."""
    lo, hi = -1.0, 1.0
    for _ in range(200):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if mid - math.cos(a * mid + b) < 0 else (lo, mid)
    z = (lo + hi) / 2
    s, k = math.sin(a * z + b), math.cos(a * z + b)
    first, second = implicit_derivatives(
        1 + a * s, a * a * k, [z * s, s], [s + a * z * k, a * k], [[z * z * k, z * k], [z * k, k]]
    )
    return z, first, second


CUBIC = {
    "root_find": lambda a, c: root_find(lambda y, a, c: c * y**3 + y - a, torch.zeros_like(a), (a, c), event_ndim=0),
    "root_find bisection": lambda a, c: root_find(
        lambda y, a, c: c * y**3 + y - a, torch.zeros_like(a), (a, c), event_ndim=0, solver=Bisection()
    ),
    "root_find arg_ndims": lambda a, c: root_find(
        lambda y, a, c: c * y**3 + y - a, torch.zeros_like(a), (a, c), event_ndim=0, arg_ndims=(0, 0)
    ),
    "root_find event": lambda a, c: root_find(
        lambda y, a, c: c * y**3 + y - a, torch.zeros_like(a).reshape(1), (a, c), event_ndim=1
    )[0],
    "fixed_point": lambda a, c: fixed_point(
        lambda y, a, c: y - (c * y**3 + y - a) / 8, torch.zeros_like(a), (a, c), event_ndim=0
    ),
    "fixed_point newton": lambda a, c: fixed_point(
        lambda y, a, c: y - (c * y**3 + y - a) / 8, torch.zeros_like(a), (a, c), event_ndim=0, solver=Newton()
    ),
    "argmin": lambda a, c: argmin(
        lambda y, a, c: c * y**4 / 4 + y**2 / 2 - a * y, torch.zeros_like(a), (a, c), event_ndim=0
    ),
    "argmin newton": lambda a, c: argmin(
        lambda y, a, c: c * y**4 / 4 + y**2 / 2 - a * y, torch.zeros_like(a), (a, c), event_ndim=0, solver=Newton()
    ),
    "least squares": lambda a, c: nonlinear_least_squares(
        lambda y, a, c: c * y**3 + y - a, torch.zeros_like(a).reshape(1), (a, c)
    )[0],
}
COSINE = {
    "root_find": lambda a, b: root_find(
        lambda z, a, b: z - torch.cos(a * z + b), torch.zeros_like(a), (a, b), event_ndim=0
    ),
    "root_find bisection": lambda a, b: root_find(
        lambda z, a, b: z - torch.cos(a * z + b),
        torch.zeros_like(a),
        (a, b),
        event_ndim=0,
        solver=Bisection(lower=-1.5, upper=1.5),
    ),
    "fixed_point": lambda a, b: fixed_point(
        lambda z, a, b: torch.cos(a * z + b), torch.zeros_like(a), (a, b), event_ndim=0
    ),
    "fixed_point picard": lambda a, b: fixed_point(
        lambda z, a, b: torch.cos(a * z + b), torch.zeros_like(a), (a, b), event_ndim=0, solver=Picard()
    ),
    "argmin": lambda a, b: argmin(
        lambda z, a, b: z * z / 2 - torch.sin(a * z + b) / a, torch.zeros_like(a), (a, b), event_ndim=0
    ),
}


def second_derivatives(f, x, y):
    """Value, gradient and Hessian three ways: autograd, torch.func forward over reverse, forward over forward."""
    x = x.clone().requires_grad_()
    y = y.clone().requires_grad_()
    value = f(x, y)
    first = torch.autograd.grad(value, (x, y), create_graph=True)
    second = [torch.autograd.grad(g, (x, y), retain_graph=True) for g in first]
    yield value.detach(), torch.stack(first).detach(), torch.stack([torch.stack(row) for row in second])
    t = torch.stack([x, y]).detach()
    g = lambda t: f(t[0], t[1])  # noqa: E731
    yield g(t), grad(g)(t), hessian(g)(t)
    yield g(t), jacfwd(g)(t), jacfwd(jacfwd(g))(t)
    yield g(t), jacrev(g)(t), jacrev(jacrev(g))(t)
    yield g(t), jacfwd(g)(t), jacrev(jacfwd(g))(t)


@pytest.mark.parametrize("form", CUBIC)
@pytest.mark.parametrize("point", [(2.0, 1.0), (-0.7, 0.6)])
def test_cubic_has_its_closed_form_derivatives(form, point):
    y, first, second, _ = cubic_oracle(*point)
    t = torch.tensor(point, dtype=F64)
    for got in second_derivatives(CUBIC[form], t[0], t[1]):
        for actual, want in zip(got, (y, first, second), strict=True):
            close(actual, want)


@pytest.mark.parametrize("form", COSINE)
@pytest.mark.parametrize("point", [(1.0, 0.0), (0.8, 0.3)])
def test_cosine_has_its_closed_form_derivatives(form, point):
    z, first, second = cosine_oracle(*point)
    t = torch.tensor(point, dtype=F64)
    for got in second_derivatives(COSINE[form], t[0], t[1]):
        for actual, want in zip(got, (z, first, second), strict=True):
            close(actual, want)


@pytest.mark.parametrize("form", ["root_find", "fixed_point", "argmin", "least squares"])
def test_third_derivative_of_the_cubic(form):
    *_, third = cubic_oracle(2.0, 1.0)
    a, c = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.tensor(1.0, dtype=F64)
    d = CUBIC[form](a, c)
    for _ in range(3):
        (d,) = torch.autograd.grad(d, a, create_graph=True)
    close(d.detach(), third)
    f = lambda a: CUBIC[form](a, c)  # noqa: E731
    close(grad(grad(grad(f)))(a.detach()), third)
    close(jacfwd(jacrev(jacfwd(f)))(a.detach()), third)


def test_batched_cubic_with_one_shared_coefficient_sums_its_gradient():
    a = torch.linspace(-3, 3, 7, dtype=F64).requires_grad_()
    c = torch.tensor(0.9, dtype=F64, requires_grad=True)
    y = root_find(lambda y, a, c: c * y**3 + y - a, torch.zeros(7, dtype=F64), (a, c), event_ndim=0)
    ga, gc = torch.autograd.grad(y.sum(), (a, c), create_graph=True)
    (gcc,) = torch.autograd.grad(gc, c)
    want = [cubic_oracle(v, 0.9) for v in a.tolist()]
    close(ga.detach(), [w[1][0] for w in want])
    close(gc.detach(), sum(w[1][1] for w in want))
    close(gcc, sum(w[2][1][1] for w in want))


# --------------------------------------------------------------------------------- a 30-dimensional nonlinear system
# grad_z of |z|^2/2 + 0.025 sum z^4 + 0.3 sum log cosh(W z) - b z, that is z + 0.1 z^3 + 0.3 W^T tanh(W z) - b


def act(W, z):
    return (W @ z[..., None])[..., 0]


def system(z, b, W):
    return z + 0.1 * z**3 + 0.3 * act(W.mT, torch.tanh(act(W, z))) - b


def energy(z, b, W):
    u = act(W, z)
    log_cosh = torch.logaddexp(u, -u)
    return z.square().sum(-1) / 2 + 0.025 * z.pow(4).sum(-1) + 0.3 * log_cosh.sum(-1) - (b * z).sum(-1)


def reference(b, W, steps=9):
    """Plain Newton steps with a Jacobian written by hand, all of them differentiated by torch."""
    z = torch.zeros_like(b + W[..., 0])
    eye = torch.eye(b.shape[-1], dtype=b.dtype)
    for _ in range(steps):
        slope = 1 - torch.tanh(act(W, z)).square()
        J = eye + 0.3 * torch.diag_embed(z.square()) + 0.3 * W.mT @ (slope[..., :, None] * W)
        z = z - torch.linalg.solve(J, system(z, b, W))
    return z


SYSTEM = {
    "root_find": lambda b, W, **k: root_find(system, torch.zeros_like(b), (b, W), **k),
    "fixed_point": lambda b, W, **k: fixed_point(
        lambda z, b, W: z - 0.5 * system(z, b, W), torch.zeros_like(b), (b, W), **k
    ),
    "argmin": lambda b, W, **k: argmin(energy, torch.zeros_like(b), (b, W), **k),
    "least squares": lambda b, W, **k: nonlinear_least_squares(system, torch.zeros_like(b), (b, W), **k),
}


def thirty():
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=F64)  # noqa: E731
    return 2 * draw(30), draw(30, 30) / 30**0.5, draw(30), draw(30), draw(30, 30)


def test_the_reference_solves_the_system():
    b, W, *_ = thirty()
    z = reference(b, W)
    assert system(z, b, W).abs().max() < 1e-13
    close(torch.func.grad(energy)(z, b, W), torch.zeros(30))


@pytest.mark.parametrize("form", SYSTEM)
def test_thirty_dimensions_to_second_order(form):
    b, W, weight, db, dW = thirty()
    f = SYSTEM[form]

    def derivatives(fn):
        x, M = b.clone().requires_grad_(), W.clone().requires_grad_()
        z = fn(x, M)
        loss = (weight * z).sum()
        gx, gM = torch.autograd.grad(loss, (x, M), create_graph=True)
        along_b = torch.autograd.grad((gx * db).sum(), (x, M), retain_graph=True)
        along_W = torch.autograd.grad((gM * dW).sum(), (x, M))
        return [t.detach() for t in (z, gx, gM, *along_b, *along_W)]

    for got, want in zip(derivatives(f), derivatives(reference), strict=True):
        close(got, want)


@pytest.mark.parametrize("form", SYSTEM)
def test_thirty_dimensions_full_hessian_and_jacobian(form):
    b, W, weight, _, dW = thirty()
    f = SYSTEM[form]
    close(jacfwd(f)(b, W), jacrev(reference)(b, W))
    close(jacrev(f)(b, W), jacrev(reference)(b, W))
    scalar = lambda fn: lambda b: (weight * fn(b, W)).sum()  # noqa: E731
    close(hessian(scalar(f))(b), torch.autograd.functional.hessian(scalar(reference), b))
    # mixed: derivative of the Jacobian in b along a direction of W
    mixed = lambda fn: torch.func.jvp(lambda M: grad(lambda x: (weight * fn(x, M)).sum())(b), (W,), (dW,))[1]  # noqa: E731
    along = lambda x, M: torch.autograd.functional.jvp(  # noqa: E731
        lambda M: torch.autograd.grad((weight * reference(x, M)).sum(), x, create_graph=True)[0], M, dW
    )[1]
    close(mixed(f), along(b.clone().requires_grad_(), W).detach())


def test_least_squares_with_a_residual_left_over_uses_the_exact_curvature():
    """Tall residual, not zero at the solution; the reference polishes by Newton on the stationarity condition."""
    t = torch.linspace(-1, 1, 9, dtype=F64)

    def residual(z, y):
        return z[..., :1] * torch.exp(z[..., 1:] * t) - y

    def unrolled(y):
        z = torch.tensor([1.0, 0.5], dtype=F64)
        for _ in range(12):
            e = torch.exp(z[1] * t)
            r = z[0] * e - y
            J = torch.stack([e, z[0] * t * e], -1)
            te, tte = (r * t * e).sum(), (r * z[0] * t * t * e).sum()
            H = J.mT @ J + torch.stack([torch.stack([torch.zeros_like(te), te]), torch.stack([te, tte])])
            z = z - torch.linalg.solve(H, J.mT @ r)
        return z

    y = 1.3 * torch.exp(0.7 * t) + 0.4 * torch.sin(9 * t)
    f = lambda y: nonlinear_least_squares(residual, torch.tensor([1.0, 0.5], dtype=F64), (y,))  # noqa: E731
    assert residual(f(y), y).norm() > 0.5
    close(f(y), unrolled(y))
    close(jacrev(f)(y), jacrev(unrolled)(y))
    close(jacfwd(f)(y), jacrev(unrolled)(y))
    close(jacfwd(jacrev(f))(y), jacrev(jacrev(unrolled))(y))


# --------------------------------------------------------------------------------------------- linear equilibrium


def random_map(kind, n, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(-0.95, 0.95, n)
    values[0] = 0.95
    if kind == "symmetric":
        Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        return Q * values @ Q.T
    if kind == "non-normal":
        V = rng.standard_normal((n, n)) + 1.5 * np.eye(n)
        return V * values @ np.linalg.inv(V)
    if kind == "triangular":  # a strong non-normal part above the diagonal
        return np.diag(values) + np.triu(rng.standard_normal((n, n)), 1) / n
    W = rng.standard_normal((n, n))
    return W * (0.95 / np.abs(np.linalg.eigvals(W)).max())  # complex eigenvalues


@pytest.mark.parametrize("form", ["fixed_point", "root_find", "picard"])
@pytest.mark.parametrize("kind", ["symmetric", "non-normal", "triangular", "complex"])
@pytest.mark.parametrize("n", [5, 30, 80])
def test_linear_equilibrium_gradient(form, kind, n):
    for seed in range(2):
        W, rng = random_map(kind, n, seed), np.random.default_rng(100 + seed)
        b, c = rng.standard_normal(n), rng.standard_normal(n)
        A = np.eye(n) - W
        z = np.linalg.solve(A, b)
        v = np.linalg.solve(A.T, c)
        W_t, b_t = torch.tensor(W, requires_grad=True), torch.tensor(b, requires_grad=True)
        if form == "root_find":
            got = root_find(lambda z, W, b: z - act(W, z) - b, torch.zeros(n, dtype=F64), (W_t, b_t))
        else:
            solver = Anderson() if form == "fixed_point" else Picard()
            got = fixed_point(lambda z, W, b: act(W, z) + b, torch.zeros(n, dtype=F64), (W_t, b_t), solver=solver)
        (got * torch.tensor(c)).sum().backward()
        scale = max(1.0, np.linalg.norm(v)), max(1.0, np.linalg.norm(v) * np.linalg.norm(z))
        assert np.linalg.norm(b_t.grad.numpy() - v) <= 1e-8 * scale[0]
        assert np.linalg.norm(W_t.grad.numpy() - np.outer(v, z)) <= 1e-8 * scale[1]


def test_linear_equilibrium_batched_with_shared_map():
    n, B = 12, 6
    W = torch.tensor(random_map("non-normal", n, 3), requires_grad=True)
    b = torch.randn(B, n, dtype=F64, requires_grad=True)
    c = torch.randn(B, n, dtype=F64)
    z = fixed_point(lambda z, W, b: act(W, z) + b, torch.zeros(B, n, dtype=F64), (W, b), arg_ndims=(2, 1))
    (z * c).sum().backward()
    A = np.eye(n) - W.detach().numpy()
    zz, vv = np.linalg.solve(A, b.detach().numpy().T), np.linalg.solve(A.T, c.numpy().T)
    assert np.linalg.norm(W.grad.numpy() - vv @ zz.T) <= 1e-8 * np.linalg.norm(vv @ zz.T)
    assert np.linalg.norm(b.grad.numpy() - vv.T) <= 1e-8 * np.linalg.norm(vv)


# ---------------------------------------------------------------------------------------------- starved solvers


def contraction(z, b):
    return 0.9 * torch.sin(z + z.roll(1, -1)) / 2 + b


def rosenbrock(z, b):
    return 100 * (z[..., 1] - z[..., 0] ** 2) ** 2 + (b[..., 0] - z[..., 0]) ** 2 + b[..., 1] * 0


STARVED = {
    "Newton": lambda b: root_find(lambda z, b: z**3 + z - b, 3 + 0 * b.detach(), (b,), solver=Newton(max_steps=1)),
    "Newton on a fixed point": lambda b: fixed_point(
        lambda z, b: torch.cos(z * b), 0 * b.detach(), (b,), solver=Newton(max_steps=1)
    ),
    "Newton on a gradient": lambda b: argmin(
        lambda z, b: (z**4 / 4 - b * z).sum(-1), 1 + 0 * b.detach(), (b,), solver=Newton(max_steps=1)
    ),
    "Anderson": lambda b: fixed_point(contraction, torch.zeros_like(b.detach()), (b,), solver=Anderson(max_steps=1)),
    "Picard": lambda b: fixed_point(contraction, torch.zeros_like(b.detach()), (b,), solver=Picard(max_steps=1)),
    "LBFGS": lambda b: argmin(rosenbrock, -1 + torch.zeros_like(b.detach()), (b,), solver=LBFGS(max_steps=1)),
    "LevenbergMarquardt": lambda b: nonlinear_least_squares(
        lambda z, b: torch.stack([10 * (z[..., 1] - z[..., 0] ** 2), b[..., 0] - z[..., 0], 0.1 * z[..., 1]], -1),
        -1 + torch.zeros_like(b.detach()),
        (b,),
        solver=LevenbergMarquardt(max_steps=1),
    ),
    "Bisection": lambda b: root_find(
        lambda z, b: z**3 + z - b.sum(-1),
        torch.zeros_like(b.detach()).sum(-1),
        (b,),
        event_ndim=0,
        solver=Bisection(max_steps=1),
    ),
    "CG": lambda b: linear_solve(
        torch.diag(torch.tensor([1.0, 2.0], dtype=F64)) + 0.1,
        b + torch.tensor([0.0, 1.0]).to(b),
        solver=CG(max_steps=1),
    ),
    "GMRES": lambda b: linear_solve(torch.tensor([[1.0, 2.0], [-1.0, 3.0]], dtype=F64), b, solver=GMRES(max_steps=1)),
}


@pytest.mark.parametrize("name", STARVED)
def test_a_starved_solver_always_warns(name):
    f = STARVED[name]
    b = torch.tensor([[0.7, 0.4], [1.1, -0.3], [0.5, 0.9]], dtype=F64)
    b = b.clone().requires_grad_()
    for _ in range(2):  # every time, not only the first
        with pytest.warns(SolveWarning):
            f(b)
    with pytest.warns(SolveWarning):
        f(b.detach())
    with pytest.warns(SolveWarning):
        vmap(f)(b.detach())
    with pytest.warns(SolveWarning):
        grad(lambda b: f(b).sum())(b.detach())
    with pytest.warns(SolveWarning):
        vmap(grad(lambda b: f(b).sum()))(b.detach())
    with pytest.warns(SolveWarning):
        jacfwd(f)(b.detach()[0])
    with pytest.warns(SolveWarning), torch.no_grad():
        f(b.detach())
    with pytest.warns(SolveWarning), inference():
        f(b.detach().clone())


@pytest.mark.parametrize("name", ["Newton", "Anderson", "Picard", "LBFGS", "LevenbergMarquardt", "Bisection"])
def test_a_starved_solver_warns_without_read_backs_too(name):
    """check_every=None runs a fixed number of steps; the report is still made."""
    solver = {
        "Newton": Newton,
        "Anderson": Anderson,
        "Picard": Picard,
        "LBFGS": LBFGS,
        "LevenbergMarquardt": LevenbergMarquardt,
        "Bisection": Bisection,
    }[name](max_steps=2, check_every=None)
    a = torch.tensor([2.0, 5.0], dtype=F64, requires_grad=True)
    z = torch.zeros(2, dtype=F64)
    with pytest.warns(SolveWarning):
        if name in ("Anderson", "Picard"):
            fixed_point(lambda z, a: a - 0.8 * torch.sin(3 * z), z, (a,), event_ndim=0, solver=solver)
        elif name == "LBFGS":
            argmin(lambda z, a: z**4 + torch.cosh(z) - a * z, z, (a,), event_ndim=0, solver=solver)
        elif name == "LevenbergMarquardt":
            nonlinear_least_squares(lambda z, a: z**3 + torch.sinh(z) - a[..., None], z[:, None], (a,), solver=solver)
        else:
            root_find(lambda z, a: z**3 + torch.sinh(z) - a, z, (a,), event_ndim=0, solver=solver)


@pytest.mark.parametrize("solver", [GMRES(max_steps=1), CG(max_steps=1)], ids=["GMRES", "CG"])
def test_a_starved_adjoint_warns_in_backward(solver):
    b, W, *_ = thirty()
    b = b[:4].clone().requires_grad_()
    W = W[:4, :4]
    z = argmin(energy, torch.zeros(4, dtype=F64), (b, W), adjoint=Implicit(solver))
    with pytest.warns(SolveWarning, match="adjoint"):
        z.sum().backward()
    f = lambda b: argmin(energy, torch.zeros(4, dtype=F64), (b, W), adjoint=Implicit(solver)).sum()  # noqa: E731
    with pytest.warns(SolveWarning, match="adjoint"):
        grad(f)(b.detach())
    with pytest.warns(SolveWarning, match="adjoint"):
        vmap(grad(f))(b.detach().expand(2, 4))
    with pytest.warns(SolveWarning, match="adjoint"):
        torch.func.jvp(f, (b.detach(),), (torch.tensor([1.0, 2.0, -1.0, 0.3], dtype=F64),))


def test_a_converged_solver_does_not_warn_and_a_mixed_batch_counts_its_starved_elements():
    a = torch.tensor([0.0, 2000.0, 0.0], dtype=F64)
    solver = Newton(max_steps=3)
    with pytest.warns(SolveWarning, match="1 of 3"):
        root_find(lambda y, a: y**3 + y - a, torch.zeros(3, dtype=F64), (a,), event_ndim=0, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root_find(lambda y, a: y**3 + y - a, torch.zeros(3, dtype=F64), (0 * a,), event_ndim=0, solver=solver)


@pytest.mark.parametrize("max_steps", [1, 2])
def test_ex_forms_stay_silent_when_starved(max_steps):
    a = torch.tensor([2.0, 5.0], dtype=F64, requires_grad=True)
    z = torch.zeros(2, dtype=F64)
    runs = [
        root_find_ex(lambda z, a: z**3 + z - a, z, (a,), event_ndim=0, solver=Newton(max_steps=max_steps)),
        fixed_point_ex(lambda z, a: a - 0.9 * torch.sin(z), z, (a,), event_ndim=0, solver=Picard(max_steps=max_steps)),
        argmin_ex(lambda z, a: z**4 + torch.cosh(z) - a * z, z, (a,), event_ndim=0, solver=LBFGS(max_steps=max_steps)),
        nonlinear_least_squares_ex(
            lambda z, a: z**3 + torch.sinh(z) - a[:, None],
            z[:, None],
            (a,),
            solver=LevenbergMarquardt(max_steps=max_steps),
        ),
    ]
    for run in runs:
        assert run.status.tolist() == [1, 1], run
        assert not run.converged.any() and not run.failed.any()
        assert (run.residual > 1e-6).all()
        run.value.sum().backward()  # differentiable all the same


# ------------------------------------------------------------------------ every transform, every solver and adjoint

GRID = [
    ("root_find", Newton(), LU()),
    ("root_find", Newton(), GMRES()),
    ("root_find", Newton(linear_solver=GMRES()), None),
    ("fixed_point", Anderson(), LU()),
    ("fixed_point", Anderson(), GMRES()),
    ("fixed_point", Newton(), None),
    ("argmin", LBFGS(), LU()),
    ("argmin", LBFGS(), GMRES()),
    ("argmin", LBFGS(), CG()),
]


def label(case):
    (form, solver, linear_solver), arg_ndims = case
    inner = getattr(solver, "linear_solver", None)
    names = [form, *(type(s).__name__ for s in (solver, inner, linear_solver) if s), "batch-native" * bool(arg_ndims)]
    return "-".join(filter(None, names))


# batch-native once for every form
CASES = [(case, None) for case in GRID] + [(GRID[i], (1, 2)) for i in (0, 4, 8)]


@pytest.fixture(params=CASES, ids=label)
def grid(request):
    (form, solver, linear_solver), arg_ndims = request.param
    return lambda b, W: SYSTEM[form](b, W, solver=solver, adjoint=Implicit(linear_solver), arg_ndims=arg_ndims)


def small(*batch):
    g = torch.Generator().manual_seed(4)
    return torch.randn(*batch, 3, generator=g, dtype=F64), torch.randn(3, 3, generator=g, dtype=F64) / 2


TOL = 2e-9  # second derivatives with Krylov adjoints at their default tolerance


def test_jacobians_agree_with_each_other_and_the_reference(grid):
    b, W = small()
    for argnums in (0, 1):
        want = jacrev(reference, argnums)(b, W)
        close(jacrev(grid, argnums)(b, W), want, TOL)
        close(jacfwd(grid, argnums)(b, W), want, TOL)
    want = jacrev(jacrev(reference))(b, W)
    close(jacfwd(jacfwd(grid))(b, W), want, TOL)
    close(jacrev(jacrev(grid))(b, W), want, TOL)
    close(jacfwd(jacrev(grid))(b, W), want, TOL)
    close(jacrev(jacfwd(grid))(b, W), want, TOL)
    close(jacfwd(jacrev(grid, 1))(b, W), jacrev(jacrev(reference, 1))(b, W), TOL)


def test_vmapped_hessian(grid):
    b, W = small(3)
    loss = lambda f: lambda b, W: f(b, W).pow(2).sum()  # noqa: E731
    want = torch.stack([torch.autograd.functional.hessian(lambda x: loss(reference)(x, W), x) for x in b])
    close(vmap(hessian(loss(grid)), in_dims=(0, None))(b, W), want, TOL)
    want = torch.stack([torch.autograd.functional.hessian(lambda M: loss(reference)(x, M), W) for x in b])  # noqa: B023
    close(vmap(hessian(loss(grid), 1), in_dims=(0, None))(b, W), want, TOL)


def test_per_sample_gradients(grid):
    b, W = small(3)
    loss = lambda f: lambda W, b: f(b, W).pow(2).sum()  # noqa: E731
    want = torch.stack([grad(loss(reference))(W, x) for x in b])
    close(vmap(grad(loss(grid)), in_dims=(None, 0))(W, b), want, TOL)
    M, x = W.clone().requires_grad_(), b.clone()
    out = loss(grid)(M, x)
    close(torch.autograd.grad(out, M)[0], want.sum(0), TOL)


def test_vmap_over_shared_parameters_and_nested(grid):
    b, W = small(3)
    Ws = torch.stack([W, 0.5 * W, -W, W.mT])
    want = torch.stack([torch.stack([reference(x, M) for x in b]) for M in Ws])
    close(vmap(grid, in_dims=(None, 0))(b, Ws), want, TOL)  # batch inside, parameters vmapped
    nested = vmap(vmap(grid, in_dims=(0, None)), in_dims=(None, 0))
    close(nested(b, Ws), want, TOL)
    swapped = vmap(vmap(grid, in_dims=(None, 0)), in_dims=(0, None), out_dims=1)
    close(swapped(b, Ws), want, TOL)
    last = vmap(grid, in_dims=(None, 2), out_dims=1)
    close(last(b, Ws.movedim(0, 2)), want.movedim(0, 1), TOL)
    g = vmap(vmap(grad(lambda b, M: grid(b, M).sin().sum()), in_dims=(0, None)), in_dims=(None, 0))(b, Ws)
    want = torch.stack([torch.stack([grad(lambda x: reference(x, M).sin().sum())(x) for x in b]) for M in Ws])  # noqa: B023
    close(g, want, TOL)


def test_third_derivative_of_the_system(grid):
    b, W = small()
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    third = lambda f: jacrev(jacfwd(jacrev(lambda x: (weight * f(x, W)).sum())))(b)  # noqa: E731
    want = jacrev(jacrev(jacrev(lambda x: (weight * reference(x, W)).sum())))(b)
    assert want.abs().max() > 1e-3
    close(third(grid), want, 1e-8)


def test_gradgradcheck_of_the_system(grid):
    b, W = small(2)
    b, W = b.requires_grad_(), W.requires_grad_()
    torch.autograd.gradcheck(grid, (b, W), fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(grid, (b, W), fast_mode=True)


# ---------------------------------------------------------------------------------------------------------- memory


def kept_bytes(run):
    """Bytes that autograd keeps for backward (a warm-up first: a function is checked for captured tensors once)."""
    run()
    return saved_bytes(run)[1]


def picard(steps, adjoint):
    g = torch.Generator().manual_seed(5)
    W = torch.randn(40, 40, generator=g, dtype=F64)
    W = (0.99 * torch.linalg.qr(W)[0]).requires_grad_()
    b = torch.randn(8, 40, generator=g, dtype=F64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return fixed_point(
            lambda z, W, b: torch.tanh(act(W, z)) + 1e-3 * b,
            torch.zeros(8, 40, dtype=F64),
            (W, b),
            solver=Picard(max_steps=steps, rtol=0.0),
            adjoint=adjoint,
        )


def test_backward_memory_does_not_grow_with_the_steps():
    few, many = (kept_bytes(lambda s=s: picard(s, Implicit())) for s in (10, 1000))
    assert few == many > 0
    assert many <= 10 * (8 * 40 + 40 * 40) * 8  # a few copies of value and arguments
    with difflayers.trace() as solves:
        picard(10, Implicit())
        picard(1000, Implicit())
    assert solves[0].steps.max() == 10 and solves[1].steps.max() > 100  # the second one did take them


def test_unrolled_memory_grows_with_the_steps():
    few, many = (kept_bytes(lambda s=s: picard(s, Unrolled(s))) for s in (10, 100))
    assert many > 5 * few


@pytest.mark.parametrize("solver", [Newton, Anderson, LBFGS])
def test_saved_memory_of_the_other_solvers(solver):
    if solver is Newton and torch.__version__ < "2.7":
        pytest.skip(
            "torch 2.6 keeps for good what a hook gave it for a vmapped backward pass (without hooks it does not)"
        )
    b, W, *_ = thirty()
    form = {Newton: "root_find", Anderson: "fixed_point", LBFGS: "argmin"}[solver]

    def run(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)
            x, M = b.clone().requires_grad_(), W.clone().requires_grad_()
            return SYSTEM[form](x, M, solver=solver(max_steps=steps, rtol=0.0))

    assert kept_bytes(lambda: run(3)) == kept_bytes(lambda: run(60))


# -------------------------------------------------------------------------------------------- unrolled against itself


def test_unrolled_equals_the_loop_written_by_hand():
    b, W = small(2)
    x, M = b.clone().requires_grad_(), W.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        got = fixed_point(
            lambda z, b, W: torch.tanh(act(W, z)) + b,
            torch.zeros(2, 3, dtype=F64),
            (x, M),
            solver=Picard(max_steps=4),
            adjoint=Unrolled(4),
        )
    z = torch.zeros(2, 3, dtype=F64)
    for _ in range(4):
        z = torch.tanh(act(M, z)) + x
    close(got.detach(), z.detach(), 1e-12)
    for g, w in zip(
        torch.autograd.grad(got.sin().sum(), (x, M)), torch.autograd.grad(z.sin().sum(), (x, M)), strict=True
    ):
        close(g, w, 1e-12)


# ------------------------------------------------------------------------------------------- adjoints that are biased


def test_one_step_and_neumann_are_the_sums_they_claim():
    """On z = W z + b: OneStep gives c, Neumann(K, step=1) the first K terms of the series for (I - W^T)^-1 c."""
    g = torch.Generator().manual_seed(6)
    W = torch.randn(4, 4, generator=g, dtype=F64)
    W = 0.6 * W / torch.linalg.matrix_norm(W, 2)
    b, c = torch.randn(4, generator=g, dtype=F64), torch.randn(4, generator=g, dtype=F64)
    z = torch.tensor(np.linalg.solve(np.eye(4) - W.numpy(), b.numpy()))

    def gradients(adjoint):
        x, M = b.clone().requires_grad_(), W.clone().requires_grad_()
        value = fixed_point(lambda z, W, b: act(W, z) + b, torch.zeros(4, dtype=F64), (M, x), adjoint=adjoint)
        return torch.autograd.grad((value * c).sum(), (x, M))

    v = torch.zeros(4, dtype=F64)
    for terms in range(1, 30):
        v = c + W.T @ v  # the sum of the first `terms` powers
        if terms in (1, 2, 5, 29):
            for got, want in zip(gradients(Neumann(terms, step=1.0)), (v, torch.outer(v, z)), strict=True):
                close(got, want)
    for got, want in zip(gradients(OneStep()), (c, torch.outer(c, z)), strict=True):
        close(got, want)
    exact = torch.tensor(np.linalg.solve(np.eye(4) - W.numpy().T, c.numpy()))
    close(gradients(Neumann(200))[0], exact, 1e-8)


def test_a_diverging_neumann_series_warns():
    b = torch.ones(2, dtype=F64, requires_grad=True)
    W = torch.tensor([[0.0, 1.5], [-1.5, 0.0]], dtype=F64)
    z = fixed_point(
        lambda z, W, b: act(W, z) + b, torch.zeros(2, dtype=F64), (W, b), solver=Newton(), adjoint=Neumann(30, step=1.0)
    )
    with pytest.warns(SolveWarning):
        z.sum().backward()


def test_backward_twice_and_in_any_order():
    b, W, weight, *_ = thirty()
    x, M = b.clone().requires_grad_(), W.clone().requires_grad_()
    z = root_find(system, torch.zeros_like(b), (x, M))
    one = torch.autograd.grad((weight * z).sum(), x, retain_graph=True)[0]
    two = torch.autograd.grad((weight * z).sum(), x, retain_graph=True)[0]
    assert torch.equal(one, two)
    (2 * (weight * z).sum()).backward()
    assert torch.equal(x.grad, 2 * one) or torch.allclose(x.grad, 2 * one, rtol=1e-13, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_an_argument_changed_in_place_is_noticed():
    """torch's own rule: what backward needs must not be modified."""
    a = torch.tensor([2.0, 10.0], dtype=F64)
    x = (a.clone().requires_grad_()) * 1.0
    y = root_find(lambda y, a: y**3 + y - a**2, torch.ones(2, dtype=F64), (x,))
    x.mul_(3)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_inference_mode_gives_the_same_values():
    b, W, *_ = thirty()
    for form in SYSTEM.values():
        want = form(b, W)
        with inference():
            torch.testing.assert_close(form(b, W), want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(form(b.clone(), W.clone()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", SYSTEM)
def test_inside_activation_checkpointing(form):
    b, W, weight, *_ = thirty()
    f = SYSTEM[form]
    want = grad(lambda x: (weight * f(x, W)).sum())(b)
    x = b.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: (weight * f(x, W)).sum(), x, use_reentrant=False).backward()
    close(x.grad, want)
    y = b.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        z = f(y, W)
    (weight * z).sum().backward()
    close(y.grad, want)
