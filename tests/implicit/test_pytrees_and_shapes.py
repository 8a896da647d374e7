"""Structures, event and batch dimensions, dtypes: what goes in comes out."""

from collections import namedtuple
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers.implicit import (
    LBFGS,
    Anderson,
    Bisection,
    LevenbergMarquardt,
    Newton,
    Picard,
    argmin,
    argmin_ex,
    fixed_point,
    fixed_point_ex,
    nonlinear_least_squares,
    nonlinear_least_squares_ex,
    root_find,
    root_find_ex,
)

F64 = torch.float64
Pair = namedtuple("Pair", "x y")


class Theta(NamedTuple):
    scale: Tensor
    shift: dict


def t(*values):
    return torch.tensor(values, dtype=F64)


def cubic_root(a, c=1.0):
    """The real root of c y^3 + y = a in closed form."""
    k = (3 * c) ** 0.5
    return 2 / k * torch.sinh(torch.asinh(1.5 * k * a) / 3)


# ------------------------------------------------------------------------------------------------------ structures


def coupled(z, a, b):
    """Triangular, so that the solution is two cubic roots in a row."""
    x = z["x"] ** 3 + z["x"] - a
    u = z["rest"][0] ** 3 + z["rest"][0] - b * z["x"].sum(-1, keepdim=True)
    return {"x": x, "rest": (u, z["rest"][1] - z["rest"][0].sum(-1, keepdim=True))}


def coupled_solution(a, b):
    x = cubic_root(a)
    u = cubic_root(b * x.sum(-1, keepdim=True))
    return {"x": x, "rest": (u, u.sum(-1, keepdim=True))}


def flat(tree):
    return torch.cat([tree["x"], *tree["rest"]], -1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("native", [False, True])
def test_a_dict_of_tensors_and_tuples(batch, native):
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(*batch, 2, generator=g, dtype=F64), torch.randn(*batch, 4, generator=g, dtype=F64)
    init = {
        "x": torch.zeros(*batch, 2, dtype=F64),
        "rest": (torch.zeros(*batch, 4, dtype=F64), torch.zeros(*batch, 1, dtype=F64)),
    }
    kwargs = {"arg_ndims": (1, 1)} if native else {}
    f = lambda a, b: root_find(coupled, init, (a, b), **kwargs)  # noqa: E731
    z = f(a, b)
    assert type(z) is dict and type(z["rest"]) is tuple
    want = coupled_solution(a, b)
    assert z["x"].shape == (*batch, 2) and z["rest"][1].shape == (*batch, 1)
    torch.testing.assert_close(flat(z), flat(want))
    for k in (0, 1):
        got = grad(lambda a, b: flat(f(a, b)).sin().sum(), k)(a, b)
        torch.testing.assert_close(got, grad(lambda a, b: flat(coupled_solution(a, b)).sin().sum(), k)(a, b))
    if not batch:
        J = jacfwd(lambda a: flat(f(a, b)))(a)
        torch.testing.assert_close(J, jacrev(lambda a: flat(coupled_solution(a, b)))(a))
        H = hessian(lambda a: flat(f(a, b)).sum())(a)
        torch.testing.assert_close(H, hessian(lambda a: flat(coupled_solution(a, b)).sum())(a), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["root_find", "fixed_point", "argmin", "nonlinear_least_squares"])
def test_named_tuples_of_unknowns_and_arguments(form):
    """Minimise a (x - s)^2 / 2 + (y - x)^2 / 2: x = y = s, in four ways."""
    theta = Theta(t(2.0, 3.0), {"s": [t(0.5, -0.5), 1.5]})
    gradient = lambda z, p, k: Pair(p.scale * (z.x - k * p.shift["s"][0]) - (z.y - z.x), z.y - z.x)  # noqa: E731
    calls = {
        "root_find": lambda p, k: root_find(gradient, Pair(0 * p.scale, 0 * p.scale), (p, k)),
        "fixed_point": lambda p, k: fixed_point(
            lambda z, p, k: Pair(*(u - 0.25 * v for u, v in zip(z, gradient(z, p, k), strict=True))),
            Pair(0 * p.scale, 0 * p.scale),
            (p, k),
        ),
        "argmin": lambda p, k: argmin(
            lambda z, p, k: (p.scale * (z.x - k * p.shift["s"][0]) ** 2 + (z.y - z.x) ** 2).sum(-1) / 2,
            Pair(0 * p.scale, 0 * p.scale),
            (p, k),
        ),
        "nonlinear_least_squares": lambda p, k: nonlinear_least_squares(
            lambda z, p, k: torch.cat([z.x - k * p.shift["s"][0], z.y - z.x], -1),
            Pair(0 * p.scale, 0 * p.scale),
            (p, k),
        ),
    }
    z = calls[form](theta, 2)
    assert type(z) is Pair
    torch.testing.assert_close(z.x, t(1.0, -1.0), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(z.y, t(1.0, -1.0), rtol=1e-8, atol=1e-8)
    s = theta.shift["s"][0].clone().requires_grad_()
    z = calls[form](Theta(theta.scale, {"s": [s, 1.5]}), 2)
    (g,) = torch.autograd.grad(z.y.sum() + 3 * z.x.sum(), s)
    torch.testing.assert_close(g, t(8.0, 8.0), rtol=1e-8, atol=1e-8)


def test_nested_arg_ndims():
    p = {"W": torch.eye(2, dtype=F64).expand(3, 1, 2, 2) * 2, "b": torch.arange(8.0, dtype=F64).reshape(4, 2)}
    fn = lambda z, p: (p["W"] @ z[..., None])[..., 0] - p["b"]  # noqa: E731
    z = root_find(fn, torch.zeros(2, dtype=F64), (p,), arg_ndims=({"W": 2, "b": 1},))
    assert z.shape == (3, 4, 2)
    torch.testing.assert_close(z, (p["b"] / 2).expand(3, 4, 2))


def test_python_numbers_in_args():
    a = t(2.0, 10.0).requires_grad_()
    f = lambda a, k, i: root_find(lambda y, a, k, i: k * y**3 + i * y - a, t(1.0, 1.0), (a, k, i), event_ndim=0)  # noqa: E731
    y = f(a, 1, 1.0)
    torch.testing.assert_close(y.detach(), t(1.0, 2.0))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], t(1 / 4, 1 / 13))
    assert f(a.detach(), 1, 1).dtype == F64
    torch.testing.assert_close(vmap(lambda a: f(a, 1, 1.0))(torch.stack([a.detach()] * 2))[1], y.detach())
    torch.testing.assert_close(root_find(lambda y, a, k: y - k * a, t(0.0), (t(1.0), 3), arg_ndims=(1, 0)), t(3.0))


def test_what_is_no_number_in_args_is_named():
    with pytest.raises(ValueError, match=r"args\[1\]: expected a tensor or a Python number, got str"):
        root_find(lambda y, a, mode: y - a, t(0.0), (t(1.0), "fast"))
    with pytest.raises(ValueError, match=r"args\[1\]: expected a floating-point tensor, got torch.int64"):
        root_find(lambda y, a, i: y - a[..., i], t(0.0), (t(1.0), torch.tensor([0])))


# ----------------------------------------------------------------------------------------------- event and batch


@pytest.mark.parametrize("event", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 1, 3)])
def test_event_dimensions(event, batch):
    """The event only says what is solved together; a separable system has the same solution for each."""
    a = torch.linspace(-2, 2, max(1, torch.Size((*batch, *event)).numel()), dtype=F64).reshape((*batch, *event))
    want, k = cubic_root(a), len(event)
    residual = lambda y, a: y**3 + y - a  # noqa: E731
    over = lambda x: x.flatten(-k).sum(-1) if k else x  # noqa: E731
    init = torch.zeros_like(a)
    runs = {
        "newton": lambda a, **o: root_find_ex(residual, init, (a,), event_ndim=k, **o),
        "fixed": lambda a, **o: fixed_point_ex(lambda y, a: y - residual(y, a) / 8, init, (a,), event_ndim=k, **o),
        "argmin": lambda a, **o: argmin_ex(
            lambda y, a: over(y**4 / 4 + y**2 / 2 - a * y), init, (a,), event_ndim=k, **o
        ),
    }
    if k:
        runs["lm"] = lambda a, **o: nonlinear_least_squares_ex(residual, init, (a,), event_ndim=k, **o)
    else:
        runs["bisection"] = lambda a, **o: root_find_ex(residual, init, (a,), event_ndim=0, solver=Bisection(), **o)
    for native in ({}, {"arg_ndims": (k,)}):
        for name, run in runs.items():
            s = run(a, **native)
            assert s.value.shape == a.shape and s.status.shape == batch == s.steps.shape, name
            torch.testing.assert_close(s.value, want, rtol=1e-8, atol=1e-9, msg=name)
            x = a.clone().requires_grad_()
            (g,) = torch.autograd.grad(run(x, **native).value.sum(), x)
            torch.testing.assert_close(g, 1 / (1 + 3 * want**2), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("form", [root_find, fixed_point])
def test_batch_dimensions_of_init_and_arguments_broadcast(form):
    A = torch.randn(3, 1, 2, 2, dtype=F64) / 4
    b = torch.randn(5, 2, dtype=F64)
    c = torch.tensor(0.3, dtype=F64)
    update = lambda z, A, b, c: c[..., None] * torch.tanh((A @ z[..., None])[..., 0]) + b  # noqa: E731
    fn = update if form is fixed_point else lambda z, *p: z - update(z, *p)
    f = lambda A, b, c, init: form(fn, init, (A, b, c), arg_ndims=(2, 1, 0))  # noqa: E731
    z = f(A, b, c, torch.zeros(2, dtype=F64))
    assert z.shape == (3, 5, 2)
    want = torch.zeros(3, 5, 2, dtype=F64)
    for _ in range(100):
        want = update(want, A, b, c)
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-9)
    assert f(A, b, c, torch.zeros(7, 1, 1, 2, dtype=F64)).shape == (7, 3, 5, 2)
    inputs = [x.clone().requires_grad_() for x in (A, b, c)]
    got = torch.autograd.grad(f(*inputs, torch.zeros(2, dtype=F64)).square().sum(), inputs)
    loop = torch.zeros(3, 5, 2, dtype=F64)
    for _ in range(100):
        loop = update(loop, *inputs)
    for g, w, x in zip(got, torch.autograd.grad(loop.square().sum(), inputs), inputs, strict=True):
        assert g.shape == x.shape
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8)
    vmapped = vmap(f, in_dims=(None, None, 0, None))(A, b, torch.stack([c, 2 * c]), torch.zeros(2, dtype=F64))
    torch.testing.assert_close(vmapped[0], want, rtol=1e-9, atol=1e-9)
    assert vmapped.shape == (2, 3, 5, 2)


def test_shared_argument_without_arg_ndims():
    W = torch.randn(3, 3, dtype=F64) / 4
    b = torch.randn(2, 4, 3, dtype=F64)
    z = fixed_point(lambda z, W, b: torch.tanh(z @ W) + b, torch.zeros(2, 4, 3, dtype=F64), (W, b))
    torch.testing.assert_close(z, torch.tanh(z @ W) + b, rtol=1e-9, atol=1e-9)
    assert z.shape == (2, 4, 3)


def test_vmapped_init_and_in_dims_that_are_not_first():
    a = torch.linspace(-2, 2, 6, dtype=F64).reshape(2, 3)
    init = torch.rand(3, 2, dtype=F64)
    f = lambda z, a: root_find(lambda y, a: y**3 + y - a, z, (a,))  # noqa: E731
    got = vmap(f, in_dims=(0, 1), out_dims=1)(init, a)
    torch.testing.assert_close(got, cubic_root(a))
    got = vmap(f, in_dims=(0, None))(init, a[:, 0])
    torch.testing.assert_close(got, cubic_root(a[:, 0]).expand(3, 2))


FORMS = {
    "root_find": (root_find_ex, lambda z, a: z**3 + z - a),
    "fixed_point": (fixed_point_ex, lambda z, a: torch.cos(z) / 2 + a),
    "argmin": (argmin_ex, lambda z, a: (z**2 / 2 - a * z).sum(-1)),
    "nonlinear_least_squares": (nonlinear_least_squares_ex, lambda z, a: z**3 + z - a),
}
SOLVERS = {
    "root_find": [Newton()],
    "fixed_point": [Anderson(), Picard(), Newton()],
    "argmin": [LBFGS(), Newton()],
    "nonlinear_least_squares": [LevenbergMarquardt(), LBFGS()],
}
EVERY = [(form, solver) for form in FORMS for solver in SOLVERS[form]]
every = pytest.mark.parametrize(("form", "solver"), EVERY, ids=lambda x: x if isinstance(x, str) else type(x).__name__)


@every
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 0, 3), (4, 0), (0,), (0, 0)])
@pytest.mark.parametrize("native", [False, True])
def test_empty_batches_and_zero_size_events(form, solver, shape, native):
    solve, fn = FORMS[form]
    a = torch.zeros(shape, dtype=F64, requires_grad=True)
    w = torch.ones(shape[-1], dtype=F64, requires_grad=True)
    s = solve(
        lambda z, a, w: fn(z, a * w),
        torch.zeros(shape, dtype=F64),
        (a, w),
        solver=solver,
        arg_ndims=(1, 1) if native else None,
    )
    assert s.value.shape == shape and s.status.shape == shape[:-1] and s.status.numel() == s.converged.sum()
    ga, gw = torch.autograd.grad(s.value.sum(), (a, w), create_graph=True)
    assert ga.shape == shape and torch.equal(gw, torch.zeros_like(w))
    plain = {"root_find": root_find, "fixed_point": fixed_point, "argmin": argmin}.get(form, nonlinear_least_squares)
    assert plain(fn, torch.zeros(shape, dtype=F64), (a,), solver=solver).shape == shape


@every
def test_non_contiguous_input_gives_the_same(form, solver):
    solve, fn = FORMS[form]
    a = torch.randn(3, 4, dtype=F64)
    want = solve(fn, torch.zeros(4, 3, dtype=F64), (a.t().contiguous(),), solver=solver).value
    assert torch.equal(solve(fn, torch.zeros(3, 4, dtype=F64).t(), (a.t(),), solver=solver).value, want)
    wide = torch.zeros(4, 6, dtype=F64)
    wide[:, ::2] = a.t()
    assert torch.equal(solve(fn, torch.zeros(1, 1, dtype=F64).expand(4, 3), (wide[:, ::2],), solver=solver).value, want)
    x = a.t().requires_grad_()
    (g,) = torch.autograd.grad(solve(fn, torch.zeros(4, 3, dtype=F64), (x,), solver=solver).value.sum(), x)
    assert g.shape == (4, 3)
    cotangent = torch.ones(1, 1, dtype=F64).expand(4, 3)  # stride zero
    (h,) = torch.autograd.grad(solve(fn, torch.zeros(4, 3, dtype=F64), (x,), solver=solver).value, x, cotangent)
    assert torch.equal(g, h)


@every
def test_inputs_are_not_written_to(form, solver):
    solve, fn = FORMS[form]
    a, init = torch.randn(4, 3, dtype=F64), torch.zeros(4, 3, dtype=F64)
    kept = a.clone()
    z = solve(fn, init, (a,), solver=solver).value
    assert torch.equal(a, kept) and torch.equal(init, torch.zeros(4, 3, dtype=F64))
    z.zero_()  # the result is the user's own
    assert torch.equal(init, torch.zeros(4, 3, dtype=F64))
    already = solve(fn, solve(fn, init, (a,), solver=solver).value, (a,), solver=solver).value
    assert already.data_ptr() != init.data_ptr()


@every
def test_init_carries_no_gradient(form, solver):
    solve, fn = FORMS[form]
    init = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    a = torch.randn(2, 3, dtype=F64)
    s = solve(fn, init, (a,), solver=solver)
    assert not s.value.requires_grad
    z = solve(fn, init * 1.0, (a.requires_grad_(),), solver=solver).value
    assert torch.autograd.grad(z.sum(), init, allow_unused=True)[0] is None
    torch.testing.assert_close(
        grad(lambda i: solve(fn, i, (a.detach(),), solver=solver).value.sum())(init.detach()),
        torch.zeros(2, 3, dtype=F64),
    )
    J = jacfwd(lambda i: solve(fn, i, (a.detach(),), solver=solver).value)(init.detach())
    assert torch.equal(J, torch.zeros_like(J))


# ------------------------------------------------------------------------------------------------------------ dtypes


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_in_is_dtype_out(form, solver, dtype):
    solve, fn = FORMS[form]
    a64 = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    want = solve(fn, torch.zeros(2, 3, dtype=F64), (a64,), solver=solver).value
    a = a64.to(dtype).requires_grad_()
    s = solve(fn, torch.zeros(2, 3, dtype=dtype), (a,), solver=solver)
    assert s.value.dtype == dtype and s.converged.all()
    tolerance = max(4 * torch.finfo(dtype).eps, 2e-5)
    torch.testing.assert_close(s.value.double(), want, rtol=tolerance, atol=tolerance)
    (g,) = torch.autograd.grad(s.value.sum(), a)
    x = a64.clone().requires_grad_()
    (exact,) = torch.autograd.grad(solve(fn, torch.zeros(2, 3, dtype=F64), (x,), solver=solver).value.sum(), x)
    assert g.dtype == dtype
    torch.testing.assert_close(g.double(), exact, rtol=20 * tolerance, atol=20 * tolerance)


@every
def test_autocast_is_off_inside(form, solver):
    solve, _ = FORMS[form]
    W = torch.randn(3, 3) / 4
    W = W @ W.T + torch.eye(3) / 2
    a = torch.randn(2, 3)
    fns = {
        "root_find": lambda z, a, W: z @ W - a,
        "fixed_point": lambda z, a, W: 0.5 * torch.tanh(z @ W) + a,
        "argmin": lambda z, a, W: ((z @ W) * z).sum(-1) / 2 - (a * z).sum(-1),
        "nonlinear_least_squares": lambda z, a, W: z @ W - a,
    }
    want = solve(fns[form], torch.zeros(2, 3), (a, W), solver=solver).value
    x, M = a.clone().requires_grad_(), W.clone().requires_grad_()
    exact = torch.autograd.grad(solve(fns[form], torch.zeros(2, 3), (x, M), solver=solver).value.sum(), (x, M))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = solve(fns[form], torch.zeros(2, 3), (x, M), solver=solver)
        assert s.value.dtype == torch.float32
        torch.testing.assert_close(s.value.detach(), want, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(s.value.sum(), (x, M), create_graph=True)
        second = torch.autograd.grad(got[1].square().sum(), M)[0]
    for g, w in zip(got, exact, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.detach(), w, rtol=1e-4, atol=1e-4)
    assert second.isfinite().all()


def test_default_dtype_and_device_do_not_leak_in():
    a = t(2.0, 10.0).requires_grad_()
    with torch.device("meta"):
        y = root_find(lambda y, a: y**3 + y - a, torch.ones(2, dtype=F64, device="cpu"), (a,), event_ndim=0)
        (g,) = torch.autograd.grad(y.sum(), a, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), a)
    assert y.device.type == g.device.type == h.device.type == "cpu"
    torch.testing.assert_close(g.detach(), t(1 / 4, 1 / 13))


@every
def test_meta_default_device_for_every_solver(form, solver):
    solve, fn = FORMS[form]
    a = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3).requires_grad_()
    init = torch.zeros(2, 3, dtype=F64)
    want = solve(fn, init, (a,), solver=solver).value
    with torch.device("meta"):
        got = solve(fn, init, (a,), solver=solver).value
        (g,) = torch.autograd.grad(got.sum(), a, create_graph=True)
        torch.autograd.grad(g.sum(), a, allow_unused=True)
    assert torch.equal(got, want)
