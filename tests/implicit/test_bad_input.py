"""Bad input is refused by name, and a bad element neither spoils nor hides in its batch."""

import functools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from difflayers import SolveError, Status
from difflayers.implicit import (
    LBFGS,
    Anderson,
    Bisection,
    Implicit,
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
from difflayers.linalg import GMRES, LU, QR, LinearOperator, Tag, linear_solve

F64 = torch.float64


def t(*values, **kwargs):
    return torch.tensor(values, dtype=F64, **kwargs)


def cubic(z, a):
    return z**3 + z - a


def cosine(z, a):
    return torch.cos(a * z) / 2


def bowl(z, a):
    return (z**4 / 4 + z**2 / 2 - a * z).sum(-1)


FORMS = {
    "root_find": (root_find, cubic),
    "fixed_point": (fixed_point, cosine),
    "argmin": (argmin, bowl),
    "nonlinear_least_squares": (nonlinear_least_squares, cubic),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


# ---------------------------------------------------------------------------------------------- values and shapes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_name_the_argument(form, bad):
    solve, fn = form
    good = torch.ones(3, 2, dtype=F64)
    spoilt = good.clone()
    spoilt[1, 0] = bad
    with pytest.raises(ValueError, match=r"init.*finite.*(NaN|Inf)"):
        solve(fn, spoilt, (good,))
    with pytest.raises(ValueError, match=r"args\[0\].*finite.*(NaN|Inf)"):
        solve(fn, good, (spoilt,))
    with pytest.raises(ValueError, match=r"args\[0\].*finite"):
        solve(fn, good, (spoilt,), arg_ndims=(1,))
    with pytest.raises(ValueError, match=r"args\[0\].*finite"):
        vmap(lambda z, a: solve(fn, z, (a,)))(good, spoilt)
    with pytest.raises(ValueError, match=r"args\[0\].*finite"):
        grad(lambda a: solve(fn, good, (a,)).sum())(spoilt)


def test_the_bad_leaf_of_a_tree_is_named():
    good = {"w": t(1.0), "v": [t(1.0), t(1.0)]}
    bad = {"w": t(1.0), "v": [t(1.0), t(math.nan)]}
    fn = lambda z, p: z**3 + z - p["w"] - p["v"][0] - p["v"][1]  # noqa: E731
    root_find(fn, t(0.0), (good,))
    with pytest.raises(ValueError, match=r"args\[0\].*v.*1.*finite"):
        root_find(fn, t(0.0), (bad,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_init_that_is_not_floating_point(form, dtype):
    solve, fn = form
    with pytest.raises(ValueError, match=r"init: expected a floating-point tensor, got torch\."):
        solve(fn, torch.ones(2, dtype=dtype), (torch.ones(2, dtype=F64),))


@pytest.mark.parametrize("init", [1.0, None, [1.0, 2.0], "one"])
def test_init_that_is_no_tensor(form, init):
    solve, fn = form
    with pytest.raises(ValueError, match=r"init.*expected.*got"):
        solve(fn, init, (t(1.0),))


def test_args_that_are_no_tuple(form):
    solve, fn = form
    with pytest.raises(ValueError, match=r"args: expected a tuple.*got"):
        solve(fn, t(0.0, 0.0), t(1.0, 1.0))


def test_mixed_devices_name_both(form):
    solve, fn = form
    with pytest.raises(ValueError, match=r"args\[0\]: expected device cpu.*got meta"):
        solve(fn, t(0.0, 0.0), (torch.ones(2, dtype=F64, device="meta"),))
    with pytest.raises(ValueError, match=r"expected device meta.*got cpu"):
        solve(fn, torch.ones(2, dtype=F64, device="meta"), (t(0.0, 0.0),))


def test_mixed_dtypes_name_both(form):
    solve, fn = form
    with pytest.raises(ValueError, match=r"args\[0\]: expected dtype torch.float64.*got torch.float32"):
        solve(fn, t(0.0, 0.0), (torch.ones(2),))
    with pytest.raises(ValueError, match=r"expected dtype torch.float64.*got torch.float32"):
        solve(lambda z, a, b: fn(z, a), t(0.0, 0.0), (t(1.0, 1.0), torch.ones(2)))


@pytest.mark.parametrize("ndim", [-1, 2, 5])
def test_event_ndim_that_does_not_fit(form, ndim):
    solve, fn = form
    with pytest.raises(ValueError, match=r"(init|event_ndim).*expected.*got"):
        solve(fn, t(0.0, 0.0), (t(1.0, 1.0),), event_ndim=ndim)


def test_arg_ndims_that_do_not_fit(form):
    solve, fn = form
    for wrong in [(1, 1), (), (3,)]:
        with pytest.raises(ValueError, match=r"(arg_ndims|args\[0\]).*expected.*got"):
            solve(fn, t(0.0, 0.0), (t(1.0, 1.0),), arg_ndims=wrong)


def test_batches_that_do_not_broadcast(form):
    solve, fn = form
    with pytest.raises(ValueError, match=r"args\[0\].*expected batch.*got"):
        solve(fn, torch.zeros(3, 2, dtype=F64), (torch.ones(4, 2, dtype=F64),), arg_ndims=(1,))


SQUARE = [("root_find", root_find, "residual"), ("fixed_point", fixed_point, "update")]


@pytest.mark.parametrize(("_", "solve", "argument"), SQUARE)
def test_output_that_differs_from_the_unknown(_, solve, argument):
    z, a = torch.zeros(4, 3, dtype=F64), torch.ones(4, 3, dtype=F64)
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*\(4, 3\).*got.*\(4, 2\)"):
        solve(lambda z, a: (z - a)[..., :2], z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*\(4, 3\).*got.*\(4,\)"):
        solve(lambda z, a: (z - a).sum(-1), z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*\(4, 3\).*got.*\(1, 4, 3\)"):
        solve(lambda z, a: (z - a)[None], z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*float64.*got.*float32"):
        solve(lambda z, a: (z / 2 - a).float(), z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*got"):
        solve(lambda z, a: (z - a, z), z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*got"):
        solve(lambda z, a: None, z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*got"):
        solve(lambda z, a: 1.0, z, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*got"):
        solve(lambda z, a: {"x": z["x"], "y": z["x"]}, {"x": z}, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*got"):
        solve(lambda z, a: {"y": z["x"]}, {"x": z}, (a,))
    with pytest.raises(ValueError, match=rf"{argument}.*expected.*cpu.*got.*meta"):
        solve(lambda z, a: torch.empty(4, 3, dtype=F64, device="meta"), z, (a,))


@pytest.mark.parametrize(
    "output",
    [lambda z, a: (z - a).square(), lambda z, a: (z - a).square().sum(), lambda z, a: (z - a).square().sum(-1)[:2]],
    ids=["per coordinate", "summed over the batch", "some elements"],
)
def test_objective_without_one_number_per_element(output):
    with pytest.raises(ValueError, match=r"objective.*expected.*\(4,\).*got"):
        argmin(output, torch.zeros(4, 3, dtype=F64), (torch.ones(4, 3, dtype=F64),))


def test_objective_that_ignores_its_unknown_has_no_derivative():
    """Every point is stationary; the Hessian is zero, so backward refuses."""
    a = t(1.0, 1.0, requires_grad=True)
    try:
        z = argmin(lambda z, a: a.square().sum(-1) + 0 * z.sum(-1), t(0.0, 0.0), (a,))
    except SolveError:
        return
    with pytest.raises(SolveError, match="adjoint"):
        z.sum().backward()


def test_options_that_do_not_exist(form):
    solve, fn = form
    with pytest.raises(ValueError, match=r'on_failure: expected "raise", "nan" or "ignore", got \'zero\''):
        solve(fn, t(0.0), (t(1.0),), on_failure="zero")


@pytest.mark.parametrize(
    ("solve", "fn", "solver"),
    [
        (root_find, cubic, LBFGS()),
        (root_find, cubic, Anderson()),
        (argmin, bowl, Picard()),
        (fixed_point, cosine, LBFGS()),
    ],
)
def test_a_solver_of_another_kind_is_refused(solve, fn, solver):
    with pytest.raises((ValueError, TypeError), match=r"solver.*expected.*got"):
        solve(fn, t(0.0), (t(1.0),), solver=solver)


@pytest.mark.parametrize(
    "options",
    [{"max_steps": 0}, {"max_steps": -1}, {"rtol": -1.0}, {"atol": -1.0}, {"check_every": 0}, {"rtol": math.nan}],
    ids=str,
)
@pytest.mark.parametrize("solver", [Newton, Anderson, Picard, LBFGS, LevenbergMarquardt, Bisection])
def test_solver_options_out_of_range(solver, options):
    with pytest.raises(ValueError, match=r"expected.*got"):
        solver(**options)


# -------------------------------------------------------------------------------------------------------- captured

GLOBAL = torch.tensor([0.5, 0.25], dtype=F64)


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(value.clone())

    def residual(self, z, a):
        return z**3 + z - a * self.w

    def forward(self, z, a):
        return self.residual(z, a)


class Plain:
    """Not a module: a tensor in a list in an attribute."""

    def __init__(self, w):
        self.deep = {"weights": [w]}

    def __call__(self, z, a):
        return z**3 + z - a * self.deep["weights"][0]


def closure(w):
    return lambda z, a: z**3 + z - a * w


def nested_closure(w):
    def inner():
        return w * 1.0

    def outer(z, a):
        return z**3 + z - a * inner()

    return outer


def partial(w):
    return functools.partial(lambda z, a, w: z**3 + z - a * w, w=w)


def default_argument(w):
    def fn(z, a, w=w):
        return z**3 + z - a * w

    return fn


def keyword_default(w):
    def fn(z, a, *, w=w):
        return z**3 + z - a * w

    return fn


def through_list(w):
    held = [{"w": w}]
    return lambda z, a: z**3 + z - a * held[0]["w"]


def through_partial_of_partial(w):
    return functools.partial(functools.partial(lambda w, z, a: z**3 + z - a * w, w))


def wrapped(w):
    fn = closure(w)

    @functools.wraps(fn)
    def outer(*xs):
        return fn(*xs)

    return outer


def lazily(w):
    """Used only for large |z|: neither the first evaluation nor its derivative sees it."""
    return lambda z, a: z**3 + z - a * torch.where(z.abs() > -1, w, 0 * w)


def global_function(z, a):
    return z**3 + z - a * GLOBAL


def captured_global(w):
    global GLOBAL
    GLOBAL = w
    return global_function


CAPTURES = {
    f.__name__: f
    for f in [
        closure,
        nested_closure,
        partial,
        default_argument,
        keyword_default,
        through_list,
        through_partial_of_partial,
        wrapped,
        lazily,
        Plain,
        captured_global,
    ]
}
CAPTURES["bound self"] = lambda w: Holder(w).residual
CAPTURES["module"] = lambda w: Holder(w)
CAPTURES["bound call"] = lambda w: Plain(w).__call__


@pytest.fixture(params=[c for c in CAPTURES if c not in ("bound self", "module")])
def capture(request):
    yield CAPTURES[request.param]
    captured_global(t(0.5, 0.25))


A = t(1.0, 2.0)
Z = torch.zeros(2, dtype=F64)
REFUSED = r"residual.*(captur|args)"


@pytest.mark.parametrize("name", CAPTURES)
def test_captured_parameter_is_refused_where_backward_would_lose_it(name):
    w = t(0.5, 0.25, requires_grad=True)
    for _ in range(2):  # each time, not only on the first call
        with pytest.raises(ValueError, match=REFUSED):
            root_find(CAPTURES[name](w), Z, (A,))
    with pytest.raises(ValueError, match=REFUSED):
        root_find(CAPTURES[name](w), Z, (A.clone().requires_grad_(),))
    captured_global(t(0.5, 0.25))


def test_captured_non_leaf_is_refused(capture):
    w = t(0.5, 0.25, requires_grad=True)
    with pytest.raises(ValueError, match=REFUSED):
        root_find(capture(w * 2), Z, (A,))


def test_captured_under_grad(capture):
    with pytest.raises(ValueError, match=REFUSED):
        grad(lambda w: root_find(capture(w), Z, (A,)).sum())(t(0.5, 0.25))
    with pytest.raises(ValueError, match=REFUSED):
        hessian(lambda w: root_find(capture(w), Z, (A,)).sum())(t(0.5, 0.25))


def test_captured_under_jvp_and_dual_level(capture):
    w = t(0.5, 0.25)
    with pytest.raises(ValueError, match=REFUSED):
        jvp(lambda w: root_find(capture(w), Z, (A,)), (w,), (w,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=REFUSED):
        root_find(capture(torch.autograd.forward_ad.make_dual(w, w)), Z, (A,))


def test_captured_under_vmap(capture):
    w = torch.stack([t(0.5, 0.25), t(1.5, 0.75)])
    with pytest.raises(ValueError, match=REFUSED):
        vmap(lambda w: root_find(capture(w), Z, (A,)))(w)
    with pytest.raises(ValueError, match=REFUSED):
        vmap(lambda w, a: root_find(capture(w), Z, (a,)))(w, w)
    with pytest.raises(ValueError, match=REFUSED):
        vmap(grad(lambda w: root_find(capture(w), Z, (A,)).sum()))(w)


@pytest.mark.parametrize("solve", ["fixed_point", "argmin", "nonlinear_least_squares"])
def test_captured_in_the_other_forms(solve):
    w = t(0.5, 0.25, requires_grad=True)
    fns = {
        "fixed_point": lambda w: lambda z, a: torch.cos(a * z) * w,
        "argmin": lambda w: lambda z, a: (z**2 * w - a * z).sum(-1),
        "nonlinear_least_squares": lambda w: lambda z, a: z**3 + z - a * w,
    }
    run = lambda w: FORMS[solve][0](fns[solve](w), Z, (A,))  # noqa: E731
    message = r"(update|objective|residual).*(captur|args)"
    run(w.detach())
    with pytest.raises(ValueError, match=message):
        run(w)
    for transform in (grad, jacrev, jacfwd):
        with pytest.raises(ValueError, match=message):
            transform(lambda w: run(w).sum())(w.detach())
    with pytest.raises(ValueError, match=message):
        vmap(run)(torch.stack([w.detach(), w.detach()]))


def test_the_other_callables_of_a_solver_are_not_a_hole():
    """A linear solver's preconditioner is not differentiated: a captured parameter there is harmless and allowed."""
    w = t(0.5, 0.25, requires_grad=True)
    solver = GMRES(preconditioner=lambda _, r: r * w.detach())
    root_find(cubic, Z, (A,), adjoint=Implicit(solver))


def test_captured_constants_are_allowed_everywhere(capture):
    w = t(0.5, 0.25)
    fn = capture(w)
    want = root_find(lambda z, a, w: z**3 + z - a * w, Z, (A, w))
    f = lambda a: root_find(fn, Z, (a,))  # noqa: E731
    torch.testing.assert_close(f(A), want)
    J = torch.diag(w / (1 + 3 * want**2))
    a = A.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(f(a).sum(), a)[0], J.sum(0))
    torch.testing.assert_close(jacrev(f)(A), J)
    torch.testing.assert_close(jacfwd(f)(A), J)
    torch.testing.assert_close(vmap(jacrev(f))(torch.stack([A, A]))[1], J)
    hessian(lambda a: f(a).sum())(A)
    with torch.no_grad():
        f(A)


def test_a_function_that_passed_once_is_looked_at_again():
    """The same function object, first with a constant, then with the same tensor turned into a parameter."""
    w = t(0.5, 0.25)
    for make in (closure, captured_global, Plain, default_argument, nested_closure, through_list):
        fn = make(w.clone().requires_grad_(False))
        root_find(fn, Z, (A,))
    w = t(0.5, 0.25)
    fns = [make(w) for make in (closure, Plain, default_argument, nested_closure, through_list, captured_global)]
    for fn in fns:
        root_find(fn, Z, (A,))
    w.requires_grad_()
    for fn in fns:
        with pytest.raises(ValueError, match=REFUSED):
            root_find(fn, Z, (A,))
    captured_global(t(0.5, 0.25))


# --------------------------------------------------------------------------------------------------- batch-coupled

COUPLED = {
    "mean": lambda z, a: z - a - 0.1 * z.mean(0),
    "cumsum": lambda z, a: z - a + 0.1 * z.cumsum(0),
    "backwards": lambda z, a: z - a + 0.1 * z.flip(0).cumsum(0).flip(0),
    "next element": lambda z, a: z - a + 0.1 * torch.cat([z[1:], 0 * z[:1]]),
    "element before": lambda z, a: z - a + 0.1 * torch.cat([0 * z[:1], z[:-1]]),
    "first onto last": lambda z, a: z - a + 0.1 * torch.cat([0 * z[1:], z[:1]]),
    "last onto first": lambda z, a: z - a + 0.1 * torch.cat([z[-1:], 0 * z[1:]]),
    "element two before": lambda z, a: z - a + 0.1 * z.roll(2, 0),
    "nonlinear": lambda z, a: z - a + 0.1 * torch.sin(z).prod(0),
    "attention": lambda z, a: z - a + 0.1 * torch.softmax(z @ z.mT, -1) @ z,
    "max": lambda z, a: z - a + 0.1 * z.amax(0),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 8])
def test_elements_that_see_each_other_are_refused(name, batch):
    if name == "element two before" and batch == 2:
        pytest.skip("in a batch of two this is the element itself")
    fn = COUPLED[name]
    g = torch.Generator().manual_seed(batch)
    a = torch.randn(batch, 3, dtype=F64, generator=g)
    message = r".*(event_ndim)"
    with pytest.raises(ValueError, match="residual" + message):
        root_find(lambda z, a: fn(z, a), torch.zeros(batch, 3, dtype=F64), (a,))
    with pytest.raises(ValueError, match="update" + message):
        fixed_point(lambda z, a: z - 0.3 * fn(z, a), torch.zeros(batch, 3, dtype=F64), (a,))
    with pytest.raises(ValueError, match="residual" + message):
        nonlinear_least_squares(lambda z, a: fn(z, a), torch.zeros(batch, 3, dtype=F64), (a,))
    # the remedy: the whole batch is one unknown
    z = root_find(lambda z, a: fn(z, a), torch.zeros(batch, 3, dtype=F64), (a,), event_ndim=2)
    torch.testing.assert_close(fn(z, a), torch.zeros_like(a), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["mean", "nonlinear"])
def test_coupled_objectives_are_refused(name):
    fn = {
        "mean": lambda z, a: ((z - a) ** 2).sum(-1) + z.mean(0).sum() * z[..., 0],
        "nonlinear": lambda z, a: ((z - a) ** 2).sum(-1) + 0.1 * torch.sin(z).sum(0).prod(),
    }[name]
    with pytest.raises(ValueError, match=r"objective.*event_ndim"):
        argmin(fn, torch.zeros(3, 2, dtype=F64), (torch.rand(3, 2, dtype=F64),))


def test_coupled_through_two_batch_dimensions():
    fn = lambda z, a: z - a + 0.1 * z.mean(0, keepdim=True)  # noqa: E731
    with pytest.raises(ValueError, match="event_ndim"):
        root_find(fn, torch.zeros(3, 2, 4, dtype=F64), (torch.rand(3, 2, 4, dtype=F64),))
    fn = lambda z, a: z - a + 0.1 * z.mean(1, keepdim=True)  # noqa: E731
    with pytest.raises(ValueError, match="event_ndim"):
        root_find(fn, torch.zeros(3, 2, 4, dtype=F64), (torch.rand(3, 2, 4, dtype=F64),))


def test_batchnorm_is_refused():
    norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False, dtype=F64)
    with pytest.raises(ValueError, match="event_ndim"):
        fixed_point(lambda z, a: 0.3 * norm(z) + a, torch.rand(5, 3, dtype=F64), (torch.rand(5, 3, dtype=F64),))


def test_a_function_checked_with_one_element_is_checked_again_with_two():
    fn = lambda z, a: z - a + 0.1 * z.mean(0)  # noqa: E731
    root_find(fn, torch.zeros(1, 3, dtype=F64), (torch.rand(1, 3, dtype=F64),))
    root_find(lambda z, a: fn(z[None], a[None])[0], torch.zeros(3, dtype=F64), (torch.rand(3, dtype=F64),))
    with pytest.raises(ValueError, match="event_ndim"):
        root_find(fn, torch.zeros(2, 3, dtype=F64), (torch.rand(2, 3, dtype=F64),))


def test_a_coupled_function_is_refused_every_time():
    def fn(z, a):
        return z - a + 0.1 * z.mean(0)

    for _ in range(3):
        with pytest.raises(ValueError, match="event_ndim"):
            root_find(fn, torch.zeros(2, 3, dtype=F64), (torch.rand(2, 3, dtype=F64),))


def test_coupling_under_transforms():
    def fn(z, a):
        return z - a + 0.1 * z.mean(0)

    z, a = torch.zeros(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)
    with pytest.raises(ValueError, match="event_ndim"):
        grad(lambda a: root_find(lambda z, a: fn(z, a), z, (a,)).sum())(a)
    with pytest.raises(ValueError, match="event_ndim"):
        vmap(lambda a: root_find(lambda z, a: fn(z, a), z, (a,)))(torch.stack([a, a, a]))
    with pytest.raises(ValueError, match="event_ndim"):
        vmap(grad(lambda a: root_find(lambda z, a: fn(z, a), z, (a,)).sum()))(torch.stack([a, a, a]))


def test_elements_that_only_look_coupled_are_allowed():
    """Shared constants of the batch, index-dependent arguments and detached statistics are no coupling of unknowns."""
    a = torch.rand(4, 3, dtype=F64)
    root_find(lambda z, a: z**3 + z - a + a.mean(0), torch.zeros(4, 3, dtype=F64), (a,))
    scale = torch.arange(1.0, 5.0, dtype=F64)[:, None]
    root_find(lambda z, a: z * scale - a, torch.zeros(4, 3, dtype=F64), (a,))


# ---------------------------------------------------------------------------------------------------- failed elements


def linear(z, A, b):
    return (A @ z[..., None])[..., 0] - b


def singular_batch():
    g = torch.Generator().manual_seed(3)
    A = torch.randn(5, 3, 3, generator=g, dtype=F64) + 3 * torch.eye(3, dtype=F64)
    harmless = A.clone()
    A[2] = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]], dtype=F64)
    A[4] = 0.0
    harmless[[2, 4]] = torch.eye(3, dtype=F64)
    b = torch.randn(5, 3, generator=g, dtype=F64)
    return A, harmless, b, torch.tensor([False, False, True, False, True])


def test_singular_jacobian_names_its_elements_and_carries_the_solution():
    A, _, b, bad = singular_batch()
    for kwargs in ({}, {"arg_ndims": (2, 1)}):
        with pytest.raises(SolveError, match=r"2 of 5.*elements 2, 4\).*SINGULAR") as error:
            root_find(linear, torch.zeros(5, 3, dtype=F64), (A, b), **kwargs)
        solution = error.value.solution
        assert solution.status.tolist() == [0, 0, int(Status.SINGULAR), 0, int(Status.SINGULAR)]
        assert solution.value.shape == (5, 3) and solution.steps.shape == (5,)
        torch.testing.assert_close(solution.value[~bad], torch.linalg.solve(A[~bad], b[~bad]))
        with pytest.raises(SolveError, match="elements 2, 4"):
            grad(lambda b: root_find(linear, torch.zeros(5, 3, dtype=F64), (A, b), **kwargs).sum())(b)  # noqa: B023
        with pytest.raises(SolveError, match=r"2.*4"):
            vmap(lambda A, b: root_find(linear, torch.zeros(3, dtype=F64), (A, b), **kwargs))(A, b)  # noqa: B023


def test_unbatched_failure_reads_well():
    with pytest.raises(SolveError, match="1 of 1") as error:
        root_find(linear, torch.zeros(3, dtype=F64), (torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64)))
    assert error.value.solution.status.shape == ()


def test_many_failures_are_summed_up():
    with pytest.raises(SolveError, match="and 12 more"):
        root_find(lambda z, a: z**2 + a, torch.ones(20, 1, dtype=F64), (torch.ones(20, 1, dtype=F64),))


CASES = {
    # (bad argument, harmless argument) per element, with the shared parameter w; the same functions for every element
    "no root": (root_find, lambda z, a, w: (w * z) ** 2 - a, [4.0, -1.0, 9.0, -2.0], 1.0),
    "no root, few": (root_find, lambda z, a, w: (w * z) ** 2 - a, [4.0, -1.0], 1.0),
    "singular": (root_find, lambda z, a, w: a * (z * w - 1) + 0 * z, [2.0, 0.0, 3.0], 1.0),
    "overflow": (root_find, lambda z, a, w: torch.exp(w * z * a) - 2, [1.0, 1e200, -1.0], 1.0),
    "nan in the residual": (root_find, lambda z, a, w: torch.sqrt(a) * w + z**3 + z, [1.0, -1.0, 3.0], 1.0),
    "diverging": (fixed_point, lambda z, a, w: z + a * torch.exp(w * z) * (a > 5) - 0.1 * w * z, [1.0, 1e3, 2.0], 1.0),
    "nan in the update": (fixed_point, lambda z, a, w: torch.log(a) * w + 0.1 * z, [2.0, -1.0, 3.0], 1.0),
    "unbounded": (argmin, lambda z, a, w: (a * (w * z - 1) ** 2 / 2 + z).sum(-1), [1.0, -1.0, 2.0], 1.0),
    "unbounded, flat": (argmin, lambda z, a, w: (a * (w * z - 1) ** 2 / 2 + z).sum(-1), [1.0, 0.0, 2.0], 1.0),
    "singular hessian": (argmin, lambda z, a, w: (a * (w * z) ** 2 / 2).sum(-1), [1.0, 0.0, 2.0], 1.0),
    "nan objective": (argmin, lambda z, a, w: (torch.sqrt(a) * (w * z - 1) ** 2).sum(-1), [1.0, -1.0, 2.0], 1.0),
    "nan residual": (
        nonlinear_least_squares,
        lambda z, a, w: torch.cat([torch.sqrt(a) * z - w, z**3 / 9], -1),
        [1.0, -1.0, 2.0],
        1.0,
    ),
    "flat residual": (nonlinear_least_squares, lambda z, a, w: a * (z**3 + z - w), [1.0, 0.0, 2.0], 1.0),
}
UNDIFFERENTIABLE = {"overflow", "nan in the residual", "nan in the update", "nan objective", "nan residual"}
FAILS_IN_FORWARD = set(CASES) - {"singular hessian", "flat residual"}  # these have solutions, but no derivative


@pytest.mark.parametrize("native", [False, True], ids=["vmapped", "batch-native"])
@pytest.mark.parametrize("name", CASES)
def test_a_failed_element_is_nan_alone_and_the_others_are_bit_equal(name, native):
    solve, fn, values, fill = CASES[name]
    kwargs = {"arg_ndims": (1, 0)} if native else {}
    if native:
        inner = fn
        fn = lambda z, a, w: inner(z, a, w[..., None])  # noqa: E731
    elif name in UNDIFFERENTIABLE:
        pytest.skip(
            "the derivative of the residual itself is NaN there: only arg_ndims can keep it out of shared gradients"
        )
    a = t(*values)[:, None]
    _run_case(name, solve, fn, a, kwargs, fill)


def _run_case(name, solve, fn, a, kwargs, fill):
    bad = {
        "no root": a[:, 0] < 0,
        "no root, few": a[:, 0] < 0,
        "singular": a[:, 0] == 0,
        "overflow": a[:, 0] > 10,
        "nan in the residual": a[:, 0] < 0,
        "diverging": a[:, 0] > 10,
        "nan in the update": a[:, 0] < 0,
        "unbounded": a[:, 0] < 0,
        "unbounded, flat": a[:, 0] == 0,
        "singular hessian": a[:, 0] == 0,
        "nan objective": a[:, 0] < 0,
        "nan residual": a[:, 0] < 0,
        "flat residual": a[:, 0] == 0,
    }[name]
    init = torch.full_like(a, 0.7)
    harmless = torch.where(bad[:, None], torch.full_like(a, fill), a)

    def run(a, mask_loss=True):
        a = a.clone().requires_grad_()
        w = torch.tensor(1.0, dtype=F64, requires_grad=True)
        z = solve(fn, init, (a, w), on_failure="nan", **kwargs)
        picked = z[~bad] if mask_loss else z
        ga, gw = torch.autograd.grad(picked.sin().sum(), (a, w), create_graph=True)
        loss = ga[~bad].square().sum() + gw.square()
        return z, ga, gw, *torch.autograd.grad(loss, (a, w))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, ga, gw, ha, hw = run(a)
        z0, ga0, gw0, ha0, hw0 = run(harmless)
    if name in FAILS_IN_FORWARD:
        assert z[bad].isnan().all()
    assert torch.equal(z[~bad], z0[~bad])
    assert torch.equal(ga[~bad], ga0[~bad])
    assert torch.equal(ga[bad], torch.zeros_like(ga[bad]))  # masked: exact zeros, not NaN
    assert gw.isfinite() and torch.equal(gw, gw0)
    assert torch.equal(ha[~bad], ha0[~bad]) and torch.equal(hw, hw0)
    assert ha.isfinite().all()
    # unmasked, the element's own gradient is NaN and nobody else's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ga = run_unmasked(solve, fn, init, a, kwargs)
    assert ga[bad].isnan().all()
    assert torch.equal(ga[~bad], ga0[~bad])
    if name in FAILS_IN_FORWARD:
        with pytest.raises(SolveError, match=rf"{int(bad.sum())} of {len(bad)}"):
            solve(fn, init, (a, torch.tensor(1.0, dtype=F64)), **kwargs)
    else:
        x = a.clone().requires_grad_()
        z = solve(fn, init, (x, torch.tensor(1.0, dtype=F64)), **kwargs)
        with pytest.raises(SolveError, match=r"adjoint.*1 of 3.*SINGULAR"):
            z.sum().backward()
        assert x.grad is None


def run_unmasked(solve, fn, init, a, kwargs):
    a = a.clone().requires_grad_()
    w = torch.tensor(1.0, dtype=F64)
    z = solve(fn, init, (a, w), on_failure="nan", **kwargs)
    return torch.autograd.grad(z.sin().sum(), a)[0]


def test_singular_matrices_leave_the_others_bit_equal():
    A, harmless, b, bad = singular_batch()
    z = torch.zeros(5, 3, dtype=F64)
    for solver in (Newton(), Newton(linear_solver=QR()), Newton(linear_solver=GMRES())):
        outs = []
        for M in (A, harmless):
            M, c = M.clone().requires_grad_(), b.clone().requires_grad_()
            x = root_find(linear, z, (M, c), arg_ndims=(2, 1), solver=solver, on_failure="nan")
            gM, gc = torch.autograd.grad(x[~bad].square().sum(), (M, c), create_graph=True)
            hM, hc = torch.autograd.grad(gM[~bad].square().sum() + gc[~bad].square().sum(), (M, c))
            outs.append((x, gM, gc, hM, hc))
        assert outs[0][0][bad].isnan().all()
        for got, want in zip(*outs, strict=True):
            assert torch.equal(got[~bad], want[~bad])
        for got in outs[0][1:]:
            assert torch.equal(got[bad], torch.zeros_like(got[bad]))


def test_one_failed_element_with_a_shared_matrix():
    """The shared parameter's gradient equals that of the batch without the element."""
    W = torch.randn(3, 3, dtype=F64) / 4
    a = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 1.0, 1.0], [2.0, 0.5, 1.5]], dtype=F64)
    fn = lambda z, a, W: z**2 + 0.1 * (W @ z[..., None])[..., 0] ** 2 - a  # noqa: E731

    def run(a, keep):
        M = W.clone().requires_grad_()
        z = root_find(fn, torch.ones_like(a), (a, M), on_failure="nan", arg_ndims=(1, 2))
        (g,) = torch.autograd.grad(z[keep].sum(), M, create_graph=True)
        return g, torch.autograd.grad(g.square().sum(), M)[0]

    got = run(a, torch.tensor([True, False, True]))
    want = run(a[[0, 2]], torch.tensor([True, True]))
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
    per_sample = vmap(
        grad(lambda M, a: root_find(fn, torch.ones_like(a), (a, M), on_failure="nan").nan_to_num().sum()),
        in_dims=(None, 0),
    )(W, a)
    torch.testing.assert_close(per_sample[0] + per_sample[2], got[0].detach(), rtol=1e-9, atol=1e-12)


def test_nan_policy_under_transforms():
    a = t(4.0, -1.0, 9.0)
    f = lambda a: root_find(lambda z, a: z**2 - a, torch.ones_like(a), (a,), event_ndim=0, on_failure="nan")  # noqa: E731
    want = t(0.25, math.nan, 1 / 6)
    torch.testing.assert_close(vmap(f)(a), t(2.0, math.nan, 3.0), equal_nan=True)
    torch.testing.assert_close(vmap(grad(f))(a), want, equal_nan=True)
    torch.testing.assert_close(grad(lambda a: f(a).sum())(a), want, equal_nan=True)
    torch.testing.assert_close(vmap(jacfwd(f))(a), want, equal_nan=True)
    _, tangent = jvp(f, (a,), (torch.ones_like(a),))
    torch.testing.assert_close(tangent, want, equal_nan=True)
    second = -1 / (4 * a.abs() ** 1.5)
    second[1] = math.nan
    torch.testing.assert_close(vmap(hessian(f))(a), second, equal_nan=True)
    torch.testing.assert_close(vmap(jacrev(jacrev(f)))(a), second, equal_nan=True)


# ------------------------------------------------------------------------------------- problems without a solution


@pytest.mark.parametrize("event_ndim", [0, 1])
def test_no_root(event_ndim):
    z = torch.full((2,) + (1,) * event_ndim, 0.7, dtype=F64)
    a = torch.ones_like(z)
    with pytest.raises(SolveError, match="2 of 2"):
        root_find(lambda z, a: z**2 + a, z, (a,), event_ndim=event_ndim)
    assert root_find_ex(lambda z, a: z**2 + a, z, (a,), event_ndim=event_ndim).failed.all()


def test_no_sign_change_is_infeasible():
    s = root_find_ex(lambda z, a: z**2 + a, t(0.5, 1.0), (t(1.0, 2.0),), event_ndim=0, solver=Bisection())
    assert s.status.tolist() == [Status.INFEASIBLE] * 2
    s = root_find_ex(
        lambda z, a: z - a, t(0.5, 0.5), (t(0.3, 7.0),), event_ndim=0, solver=Bisection(lower=0.0, upper=1.0)
    )
    assert s.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]


@pytest.mark.parametrize("solver", [Anderson(), Picard()])
def test_diverging_fixed_points_never_look_converged(solver):
    a = t(2.0, -3.0, 1.5)
    s = fixed_point_ex(
        lambda z, a: torch.exp(z * a) + 5, torch.ones(3, dtype=F64), (a.abs(),), event_ndim=0, solver=solver
    )
    assert not s.converged.any()
    s = fixed_point_ex(lambda z, a: z + a, torch.zeros(3, dtype=F64), (a,), event_ndim=0, solver=solver)
    assert not s.converged.any()


def test_picard_on_an_expanding_map_diverges():
    with pytest.raises(SolveError, match="DIVERGED"):
        fixed_point(lambda z, a: 2 * z + a, t(0.3), (t(1.0),), solver=Picard())


@pytest.mark.parametrize("solver", [LBFGS(), Newton()])
@pytest.mark.parametrize(
    "objective",
    [
        lambda z, a: (a * z).sum(-1),
        lambda z, a: -(a * z**2).sum(-1),
        lambda z, a: (a * z**3 + z).sum(-1),
        lambda z, a: -torch.exp(a * z).sum(-1),
        lambda z, a: -torch.log(1 + (a * z) ** 2).sum(-1) - z.sum(-1),
    ],
    ids=["linear", "concave", "cubic", "exponential", "logarithmic"],
)
def test_unbounded_objectives_never_look_converged(objective, solver):
    z, a = torch.full((2, 2), 0.5, dtype=F64), torch.ones(2, 2, dtype=F64)
    s = argmin_ex(objective, z, (a,), solver=solver)
    if isinstance(solver, Newton):  # documented: it accepts saddles and maxima, but they must be stationary
        s_gradient = grad(lambda z: objective(z, a).sum())(s.value)
        assert (~s.converged | (s_gradient.abs().amax(-1) < 1e-6)).all()
        return
    assert not s.converged.any()
    with pytest.raises(SolveError), warnings.catch_warnings():
        warnings.simplefilter("error")
        argmin(objective, z, (a,), solver=solver)


def test_lbfgs_at_a_maximum_is_not_a_minimiser():
    """init exactly at a stationary point that is no minimum: either it leaves, or the Hessian refuses it."""
    s = argmin_ex(lambda z, a: (z**4 / 4 - a * z**2 / 2).sum(-1), torch.full((1,), 1e-3, dtype=F64), (t(1.0),))
    assert s.converged.all()
    torch.testing.assert_close(s.value.abs(), t(1.0), rtol=1e-8, atol=1e-8)


def test_least_squares_without_a_minimiser_never_looks_converged():
    s = nonlinear_least_squares_ex(lambda z, a: torch.exp(-a * z), torch.zeros(1, dtype=F64), (t(1.0),))
    assert not bool(s.converged) or float(s.value) > 20  # the infimum is at infinity


# ----------------------------------------------------------------------------------------- the adjoint alone fails


def tangent_point(z, a):
    """T(z) = z - (z - 1)^2 * a with dT/dz = 1 at the fixed point z = 1, from where it starts."""
    return z - a * (z - 1) ** 2


def test_a_fixed_point_without_a_derivative_raises_in_backward():
    a = t(1.0, 2.0, 3.0).requires_grad_()
    init = torch.ones(3, dtype=F64)

    def update(z, a):
        return torch.stack(
            [
                z[..., 0] * 1.0,
                0.5 * z[..., 1] + a[..., 1],
                torch.cos(z[..., 2] * a[..., 2]) / 3,
            ],
            -1,
        )

    z = fixed_point(update, init, (a,))
    with pytest.raises(SolveError, match="adjoint") as error:
        z.sum().backward()
    assert int(error.value.solution.status) == Status.SINGULAR
    with pytest.raises(SolveError, match="adjoint"):
        grad(lambda a: fixed_point(update, init, (a,)).sum())(a.detach())
    with pytest.raises(SolveError, match="adjoint"):
        jacfwd(lambda a: fixed_point(update, init, (a,)))(a.detach())


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(LU()), Implicit(QR()), Implicit(GMRES())], ids=str)
@pytest.mark.parametrize("native", [False, True], ids=["vmapped", "batch-native"])
def test_only_the_element_whose_adjoint_fails_is_nan(adjoint, native):
    # element 1 sits at z = 1 with dT/dz = 1; the others are T(z) = z/2 + a
    def update(z, a, w):
        flat = (a == 2.0).to(z)
        return flat * tangent_point(z, a) + (1 - flat) * (0.5 * w * z + a)

    def run(values):
        a, w = t(*values).requires_grad_(), torch.tensor(1.0, dtype=F64, requires_grad=True)
        kwargs = {"arg_ndims": (0, 0)} if native else {}
        init = torch.ones(3, dtype=F64)
        z = fixed_point(update, init, (a, w), event_ndim=0, adjoint=adjoint, on_failure="nan", **kwargs)
        return z, a, w

    z, a, w = run([0.25, 2.0, 0.75])
    assert z.isfinite().all()
    (ga,) = torch.autograd.grad(z.sum(), a, retain_graph=True)
    torch.testing.assert_close(ga, t(2.0, math.nan, 2.0), equal_nan=True)
    # masked: exact zero there, and the shared gradient is that of the others
    ga, gw = torch.autograd.grad(z[[0, 2]].sum(), (a, w), create_graph=True)
    z0, a0, w0 = run([0.25, 0.3, 0.75])
    ga0, gw0 = torch.autograd.grad(z0[[0, 2]].sum(), (a0, w0), create_graph=True)
    assert torch.equal(ga, ga0) and torch.equal(gw, gw0)
    assert torch.equal(torch.autograd.grad(gw, w)[0], torch.autograd.grad(gw0, w0)[0])


def test_a_double_root_has_no_derivative():
    """(z - a)^2 = 0 from the solution itself: the value is kept, the derivative does not exist."""
    a = t(1.0, 2.0).requires_grad_()
    s = root_find_ex(lambda z, a: (z - a) ** 2, a.detach().clone(), (a,))
    torch.testing.assert_close(s.value.detach(), a.detach())
    with pytest.raises(SolveError, match="SINGULAR"):
        root_find(lambda z, a: (z - a) ** 2, a.detach().clone(), (a,)).sum().backward()


def test_ignore_reads_nothing_and_returns_what_it_has():
    a = t(-1.0, 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = root_find(lambda z, a: z**2 - a, torch.ones(2, dtype=F64), (a,), event_ndim=0, on_failure="ignore")
    assert z.shape == (2,)
    torch.testing.assert_close(z[1], torch.tensor(2.0, dtype=F64))
    with pytest.raises(ValueError, match="expected"):  # shapes are checked all the same
        root_find(lambda z, a: z[:1], torch.ones(2, dtype=F64), (a,), on_failure="ignore")


@pytest.mark.parametrize("solve", [root_find, fixed_point])
@pytest.mark.parametrize("batch", [1, 3])
def test_where_every_element_failed_shared_gradients_are_zero(solve, batch):
    W = torch.eye(2, dtype=F64, requires_grad=True)
    x = torch.full((batch, 2), torch.nan, dtype=F64)
    fn = lambda z, x, W: 0.3 * (W @ torch.tanh(z)[..., None])[..., 0] + x  # noqa: E731
    update = fn if solve is fixed_point else lambda z, x, W: z - fn(z, x, W)
    for ndims in (None, (1, 2)):
        z = solve(update, torch.zeros(batch, 2, dtype=F64), (x, W), on_failure="nan", arg_ndims=ndims)
        assert z.isnan().all()
        (g,) = torch.autograd.grad(torch.where(z.isnan(), 0, z).sum(), W)
        assert torch.equal(g, torch.zeros_like(g))
        (g,) = torch.autograd.grad(
            solve(update, torch.zeros(batch, 2, dtype=F64), (x, W), on_failure="nan", arg_ndims=ndims).sum(), W
        )
        assert g.isnan().all()


def test_complex_parameters_that_are_differentiated_are_refused():
    """Their gradient would be lost: unknowns are real."""
    w = torch.tensor([1.0 + 1.0j, 2.0, 3.0j], requires_grad=True)
    b = torch.ones(3)
    matvec = lambda params, v: v + (params[0].abs().square() * v)  # noqa: E731
    with pytest.raises(ValueError, match=r"params\[0\]: expected real numbers where a gradient is wanted"):
        linear_solve(LinearOperator(matvec, (w,), Tag.POSITIVE_DEFINITE), b)
    x = linear_solve(LinearOperator(matvec, (w.detach(),), Tag.POSITIVE_DEFINITE), b)
    torch.testing.assert_close(x, 1 / (1 + w.detach().abs().square()))
