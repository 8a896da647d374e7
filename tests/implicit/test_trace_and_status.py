"""What a solve reports: trace(), status and steps per element, `_ex` forms, SolveError.solution."""

import threading
import warnings
from collections import namedtuple

import pytest
import torch
from torch.func import grad, jvp, vmap

import difflayers
from difflayers import Record, Solution, SolveError, SolveWarning, Status
from difflayers.implicit import (
    LBFGS,
    Anderson,
    Bisection,
    Implicit,
    ImplicitProblem,
    Info,
    LevenbergMarquardt,
    Newton,
    Picard,
    argmin,
    argmin_ex,
    fixed_point,
    fixed_point_ex,
    nonlinear_least_squares_ex,
    root_find,
    root_find_ex,
    solution_map,
)
from difflayers.linalg import CG, GMRES, LU, linear_solve, linear_solve_ex

F64 = torch.float64


def t(*values, **kwargs):
    return torch.tensor(values, dtype=F64, **kwargs)


def halving(a, **kwargs):
    """z = z/2 + a: from zero, Picard's residual after k steps is a / 2^k."""
    return fixed_point(lambda z, a: z / 2 + a, torch.zeros_like(a), (a,), event_ndim=0, solver=Picard(), **kwargs)


# ---------------------------------------------------------------------------------------------------------- trace


def test_trace_records_forward_and_adjoint():
    a = t(1.0, 2.0, 3.0, requires_grad=True)
    with difflayers.trace() as solves:
        z = halving(a)
        assert [s.phase for s in solves] == ["forward"]
        z.sum().backward()
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    assert all(isinstance(s, Record) and s.seconds >= 0 for s in solves)
    assert solves[0].name == "fixed_point" and "fixed_point" in solves[1].name
    for s in solves:
        assert s.status.shape == s.steps.shape == s.residual.shape == (3,)
        assert not s.status.is_floating_point() and not s.steps.is_floating_point()
        assert not s.residual.requires_grad
        assert (s.status == Status.CONVERGED).all()
    # the residual ||T(z) - z|| = a/2^k against 1e-10 ||T(z)|| = 1e-10 * 2a: about 32 steps
    assert (solves[0].steps >= 30).all() and (solves[0].steps <= 35).all()
    assert (solves[0].residual <= 1e-10 * 2 * a.detach() * 1.01).all()


def test_trace_counts_second_order_adjoints():
    a = t(1.0, requires_grad=True)
    with difflayers.trace() as solves:
        z = root_find(lambda z, a: z**3 + z - a, torch.zeros_like(a), (a,))
        (g,) = torch.autograd.grad(z.sum(), a, create_graph=True)
        first = len(solves)
        g.sum().backward()
    assert first == 2 and len(solves) > first
    assert {s.phase for s in solves[1:]} == {"adjoint"}


def test_adjoint_after_the_block_and_on_another_thread_reports_to_its_forward():
    a = t(1.0, 2.0, requires_grad=True)
    with difflayers.trace() as solves:
        z = halving(a)
    z.sum().backward()
    assert [s.phase for s in solves] == ["forward", "adjoint"]

    with difflayers.trace() as solves:
        z = halving(a)
        failures = []

        def work():
            try:
                z.sum().backward()
            except BaseException as error:  # pragma: no cover
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not failures
    assert [s.phase for s in solves] == ["forward", "adjoint"]

    z = halving(a)  # no trace ran here: a trace around the backward alone is not its own
    with difflayers.trace() as solves:
        z.sum().backward()
    assert [s.phase for s in solves] in ([], ["adjoint"])


def test_another_thread_does_not_hear_this_trace():
    with difflayers.trace() as solves:
        thread = threading.Thread(target=lambda: halving(t(1.0)))
        thread.start()
        thread.join()
    assert solves == []


def test_nested_traces_both_listen():
    a = t(1.0, requires_grad=True)
    with difflayers.trace() as outer:
        halving(a)
        with difflayers.trace() as inner:
            z = halving(a)
        z.backward()
    halving(a)
    assert [s.phase for s in outer] == ["forward", "forward", "adjoint"]
    assert [s.phase for s in inner] == ["forward", "adjoint"]


def test_trace_ends_when_the_block_raises():
    with pytest.raises(RuntimeError, match="mine"), difflayers.trace() as solves:
        raise RuntimeError("mine")
    halving(t(1.0))
    assert solves == []


def test_trace_under_transforms():
    a = t(1.0, 2.0)
    with difflayers.trace() as solves:
        vmap(lambda a: halving(a))(a)
    (only,) = solves
    assert only.status.shape == (2,)
    assert type(only.status) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(only.status)
    assert only.steps.tolist()  # a plain tensor that can be read
    with difflayers.trace() as solves:
        grad(lambda a: halving(a).sum())(a)
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    with difflayers.trace() as solves:
        jvp(lambda a: halving(a), (a,), (a,))
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    with difflayers.trace() as solves:
        vmap(grad(lambda a: halving(a)))(a)
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    for s in solves:
        s.steps.tolist(), s.residual.tolist(), s.status.tolist()


def test_trace_records_a_failed_solve():
    with difflayers.trace() as solves, pytest.raises(SolveError):
        root_find(lambda z, a: z**2 + a, t(0.5), (t(1.0),))
    assert len(solves) == 1 and (solves[0].status > Status.MAX_STEPS).all()


def test_trace_of_linear_solves():
    A, b = torch.eye(3, dtype=F64) * 2, torch.ones(4, 3, dtype=F64, requires_grad=True)
    with difflayers.trace() as solves:
        linear_solve(A, b).sum().backward()
        linear_solve(A, b.detach(), solver=CG())
    assert [s.phase for s in solves] == ["forward", "adjoint", "forward"]
    assert solves[0].status.shape == (4,)


def test_krylov_adjoint_steps_are_recorded():
    a = t(1.0, 2.0, 3.0, 4.0, requires_grad=True)
    with difflayers.trace() as solves:
        z = root_find(lambda z, a: a * z - 1, torch.zeros_like(a), (a,), adjoint=Implicit(GMRES()))
        z.sum().backward()
    assert solves[1].phase == "adjoint"
    assert 1 <= int(solves[1].steps) <= 6  # four distinct eigenvalues: four products


# --------------------------------------------------------------------------------------------- status per element


def test_picard_steps_are_those_of_each_element():
    """z = r z + 1 from 0: residual r^k, solution 1/(1-r)."""
    r = t(0.0, 0.1, 0.5, 0.9)
    s = fixed_point_ex(lambda z, r: r * z + 1, torch.zeros(4, dtype=F64), (r,), event_ndim=0, solver=Picard(rtol=1e-6))
    assert s.status.tolist() == [0] * 4 and s.converged.all() and not s.failed.any()
    for ratio, k in zip(r.tolist(), s.steps.tolist(), strict=True):
        z = count = 0.0
        while abs(ratio * z + 1 - z) > 1e-6 * abs(ratio * z + 1):
            z, count = ratio * z + 1, count + 1
        assert abs(k - count) <= 1, (ratio, k, count)
    torch.testing.assert_close(s.value, 1 / (1 - r), rtol=1e-4, atol=0)


def test_an_element_does_not_depend_on_its_batch():
    """Data-dependent stopping is per element: bit-equal alone and in company."""
    a = t(0.3, 5.0, -40.0, 1e-3)
    g = torch.Generator().manual_seed(0)
    b = torch.randn(4, 3, dtype=F64, generator=g)
    W = torch.randn(3, 3, dtype=F64, generator=g) / 3
    runs = [
        lambda i: root_find_ex(lambda z, a: z**3 + z - a, 0 * a[i], (a[i],), event_ndim=0),
        lambda i: root_find_ex(lambda z, a: z**3 + z - a, 0 * a[i], (a[i],), event_ndim=0, solver=Bisection()),
        lambda i: fixed_point_ex(lambda z, b: torch.tanh(z.cumsum(-1)) / 3 + b, 0 * b[i], (b[i],)),
        lambda i: fixed_point_ex(lambda z, b: torch.tanh(z.cumsum(-1)) / 3 + b, 0 * b[i], (b[i],), solver=Picard()),
        lambda i: argmin_ex(lambda z, b: (z**4 / 4 + z**2 / 2 - b * z).sum(-1), 0 * b[i], (b[i],)),
        lambda i: nonlinear_least_squares_ex(lambda z, b: z**3 + z.flip(-1) - b, 0 * b[i], (b[i],)),
    ]
    for run in runs:
        together = run(slice(0, 4))
        for i in range(4):
            alone = run(slice(i, i + 1))
            assert int(alone.steps[0]) == int(together.steps[i])
            assert int(alone.status[0]) == int(together.status[i])
            torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-14, atol=1e-15)
    s = fixed_point_ex(lambda z, b, W: torch.tanh(z @ W) + b, torch.zeros(4, 3, dtype=F64), (b, W))
    assert s.steps.shape == (4,)


@pytest.mark.parametrize("check_every", [7, 1000, None])
@pytest.mark.parametrize("solver", [Newton, Bisection, Picard, Anderson, LBFGS, LevenbergMarquardt])
def test_checking_rarely_or_never_still_converges(solver, check_every):
    """Running on past the solution must not lose it."""
    a = t(0.3, 5.0, -40.0)
    options = solver(check_every=check_every, max_steps=200)
    z = 0 * a
    if solver in (Picard, Anderson):
        s = fixed_point_ex(lambda z, a: torch.cos(z) / 2 + a, z, (a,), event_ndim=0, solver=options)
    elif solver is LBFGS:
        s = argmin_ex(lambda z, a: z * z / 2 - torch.sin(z) / 2 - a * z, z, (a,), event_ndim=0, solver=options)
    elif solver is LevenbergMarquardt:
        s = nonlinear_least_squares_ex(lambda z, a: z - torch.cos(z) / 2 - a, z[:, None], (a[:, None],), solver=options)
    else:
        s = root_find_ex(lambda z, a: z - torch.cos(z) / 2 - a, z, (a,), event_ndim=0, solver=options)
    assert s.status.tolist() == [0, 0, 0]
    want = a.clone()
    for _ in range(200):
        want = want - (want - torch.cos(want) / 2 - a) / (1 + torch.sin(want) / 2)
    torch.testing.assert_close(s.value.reshape(3), want, rtol=1e-9, atol=1e-9)


def test_statuses_of_a_mixed_batch():
    a = t(2.0, -1.0, 1e12)
    s = root_find_ex(lambda z, a: z**2 - a, torch.ones(3, dtype=F64), (a,), event_ndim=0, solver=Newton(max_steps=8))
    assert s.status[0] == Status.CONVERGED and s.status[1] in (Status.DIVERGED, Status.MAX_STEPS, Status.SINGULAR)
    assert s.status[2] == Status.MAX_STEPS
    assert s.converged.tolist() == [True, False, False]
    assert s.steps[0] < 8 and s.steps[2] == 8


def test_zero_is_a_solution_in_no_time():
    z = torch.zeros(2, dtype=F64)
    for s in (
        root_find_ex(lambda z, a: a * z, z, (t(1.0, 2.0),)),
        fixed_point_ex(lambda z, a: a * z, z, (t(0.5, 0.2),)),
        argmin_ex(lambda z, a: (a * z**2).sum(-1), z, (t(1.0, 2.0),)),
        nonlinear_least_squares_ex(lambda z, a: a * z, z, (t(1.0, 2.0),)),
    ):
        assert s.status.item() == Status.CONVERGED
        assert s.steps.item() <= 1
        assert torch.equal(s.value, z)


def test_solution_starts_converged():
    a = t(2.0, 10.0)
    y = t(1.0, 2.0)
    s = root_find_ex(lambda y, a: y**3 + y - a, y, (a,), event_ndim=0)
    assert (s.steps <= 1).all() and torch.allclose(s.value, y, rtol=1e-14)


def test_residual_is_that_of_the_returned_value():
    b = torch.randn(3, 4, dtype=F64)
    T = lambda z, b: 0.3 * torch.tanh(z.cumsum(-1)) + b  # noqa: E731
    for solver in (Picard(rtol=1e-4), Anderson(rtol=1e-4)):
        s = fixed_point_ex(T, torch.zeros_like(b), (b,), solver=solver)
        actual = (T(s.value, b) - s.value).norm(dim=-1)
        assert (actual <= 1e-4 * T(s.value, b).norm(dim=-1) * (1 + 1e-9)).all()
        assert (actual <= s.residual * 1.0001).all()
    A = torch.randn(3, 4, 4, dtype=F64) + 4 * torch.eye(4, dtype=F64)
    for solver in (LU(), GMRES(rtol=1e-3)):
        s = linear_solve_ex(A, b, solver=solver)
        actual = ((A @ s.value[..., None])[..., 0] - b).norm(dim=-1)
        torch.testing.assert_close(s.residual, actual, rtol=1e-5, atol=1e-14)


# ------------------------------------------------------------------------------------------------- the `_ex` forms

Pair = namedtuple("Pair", "x y")


def test_ex_forms_never_raise_or_warn():
    a = t(-1.0, 4.0, requires_grad=True)
    one = torch.ones(2, dtype=F64)
    calls = [
        lambda: root_find_ex(lambda z, a: z**2 - a, one, (a,), event_ndim=0),
        lambda: root_find_ex(lambda z, a: a * 0 * z + 1, one, (a,), event_ndim=0),
        lambda: root_find_ex(lambda z, a: z**2 - a, one, (a,), event_ndim=0, solver=Bisection()),
        lambda: fixed_point_ex(lambda z, a: 3 * z + a, one, (a,), event_ndim=0, solver=Picard()),
        lambda: fixed_point_ex(lambda z, a: torch.exp(z) + a + 9, one, (a,), event_ndim=0, solver=Picard()),
        lambda: argmin_ex(lambda z, a: a * z, one, (a,), event_ndim=0),
        lambda: argmin_ex(lambda z, a: a * z**2, one, (a,), event_ndim=0, solver=LBFGS(max_steps=1)),
        lambda: nonlinear_least_squares_ex(
            lambda z, a: torch.exp(z) * a[:, None], one[:, None], (a,), solver=LevenbergMarquardt(max_steps=1)
        ),
        lambda: linear_solve_ex(torch.zeros(2, 2, dtype=F64), a),
        lambda: linear_solve_ex(-torch.eye(2, dtype=F64), a, solver=CG()),
        lambda: linear_solve_ex(torch.diag(t(1.0, 50.0)), a, solver=GMRES(max_steps=1)),
    ]
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            s = call()
        assert isinstance(s, Solution)
        assert s.status.shape == s.steps.shape == s.residual.shape
        assert not s.converged.all()


def test_ex_value_carries_the_gradient():
    a = t(2.0, 10.0, requires_grad=True)
    s = root_find_ex(lambda y, a: y**3 + y - a, torch.ones(2, dtype=F64), (a,), event_ndim=0)
    torch.testing.assert_close(torch.autograd.grad(s.value.sum(), a)[0], t(1 / 4, 1 / 13))
    assert not s.residual.requires_grad


def test_ex_under_vmap_returns_statuses_per_element():
    a = t(4.0, -1.0, 9.0)
    f = lambda a: root_find_ex(lambda z, a: z**2 - a, torch.ones_like(a), (a,), event_ndim=0)  # noqa: E731
    value, status, steps = vmap(lambda a: (f(a).value, f(a).status, f(a).steps))(a)
    assert status[0] == status[2] == 0 and status[1] > 1
    torch.testing.assert_close(value[[0, 2]], t(2.0, 3.0))
    assert steps.shape == (3,)


def test_solve_error_carries_the_structure_of_the_unknown():
    init = {"p": Pair(torch.ones(3, 1, dtype=F64), torch.ones(3, 2, dtype=F64)), "q": [torch.ones(3, 1, dtype=F64)]}
    a = t(4.0, -1.0, 9.0)[:, None]

    def residual(z, a):
        p, (q,) = z["p"], z["q"]
        return {"p": Pair(p.x**2 - a, p.y - a), "q": [q - p.x]}

    with pytest.raises(SolveError, match="1 of 3") as error:
        root_find(residual, init, (a,))
    s = error.value.solution
    assert isinstance(s, Solution) and isinstance(s.value["p"], Pair)
    assert s.failed.tolist() == [False, True, False]
    torch.testing.assert_close(s.value["p"].x[[0, 2]], t(2.0, 3.0)[:, None])
    torch.testing.assert_close(s.value["q"][0][[0, 2]], t(2.0, 3.0)[:, None])
    assert s.value["p"].y.shape == (3, 2)


def test_solve_error_survives_pickle():
    import pickle

    with pytest.raises(SolveError) as error:
        root_find(lambda z, a: z**2 + a, t(0.5), (t(1.0),))
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and torch.equal(again.solution.status, error.value.solution.status)


def test_several_batch_dimensions_in_the_message_and_the_report():
    a = torch.ones(2, 3, dtype=F64)
    a[1, 2] = -1
    with pytest.raises(SolveError, match=r"1 of 6 .*\(1, 2\)") as error:
        root_find(lambda z, a: z**2 - a, 2 * torch.ones(2, 3, dtype=F64), (a,), event_ndim=0)
    assert error.value.solution.status.shape == (2, 3)


def test_warning_points_at_the_caller():
    with pytest.warns(SolveWarning) as caught:
        root_find(lambda z, a: z**3 - a, t(0.7), (t(5.0),), solver=Newton(max_steps=1))
    assert caught[0].filename == __file__
    assert "residual" in str(caught[0].message) and "max_steps" in str(caught[0].message)


def test_starved_and_failed_together():
    """Element 0 is far from done, element 1 has a zero Jacobian at once."""
    fn = lambda z, a: (z**2 - a) * (a > 0) + 1.0 * (a < 0)  # noqa: E731
    a, init, solver = t(1e12, -1.0), t(1.0, 0.7), Newton(max_steps=9)
    s = root_find_ex(fn, init, (a,), event_ndim=0, solver=solver)
    assert s.status.tolist() == [Status.MAX_STEPS, Status.SINGULAR]
    with pytest.warns(SolveWarning, match="1 of 2"):
        z = root_find(fn, init, (a,), event_ndim=0, solver=solver, on_failure="nan")
    assert z[0].isfinite() and z[1].isnan()


def test_argmin_status_of_unbounded():
    s = argmin_ex(lambda z, a: (a * z).sum(-1), torch.zeros(2, 1, dtype=F64), (torch.ones(2, 1, dtype=F64),))
    assert (s.status == Status.UNBOUNDED).all()
    with pytest.raises(SolveError, match="UNBOUNDED"):
        argmin(lambda z, a: (a * z).sum(-1), torch.zeros(2, 1, dtype=F64), (torch.ones(2, 1, dtype=F64),))


@pytest.mark.parametrize("scale", [1e-100, 1e-20, 1e20, 1e100])
def test_scale_does_not_change_the_status(scale):
    """No absolute threshold decides what has converged, diverged or is unbounded."""
    a, zero = t(1.0, 2.0) * scale, torch.zeros(2, dtype=F64)
    for s, factor in (
        (root_find_ex(lambda z, a: 3 * z - a, zero, (a,)), 1 / 3),
        (fixed_point_ex(lambda z, a: z / 2 + a, zero, (a,)), 2.0),
        (fixed_point_ex(lambda z, a: z / 2 + a, zero, (a,), solver=Picard()), 2.0),
        (argmin_ex(lambda z, a: (z * z / 2 - a * z).sum(-1), zero, (a,)), 1.0),
        (nonlinear_least_squares_ex(lambda z, a: 3 * z - a, zero, (a,)), 1 / 3),
    ):
        assert s.status.item() == Status.CONVERGED
        torch.testing.assert_close(s.value, factor * a, rtol=1e-9, atol=0)


def test_trace_of_an_authors_solve_of_matrices():
    """The residual of an adjoint solve is measured on whole events, which an author's solve takes unflattened."""

    def report(like):
        ok = torch.zeros(like.shape[:-2], dtype=torch.int64)
        return Info(ok, ok, like.new_zeros(ok.shape))

    half = ImplicitProblem(
        solve=lambda A: (A / 2, report(A), ()),
        residual=lambda Z, A: 2 * Z - A,
        linear_solve=lambda value, args, factors, rhs, transpose: (rhs / 2, report(rhs)),
        value_ndim=2,
        arg_ndims=(2,),
    )
    A = torch.ones(3, 2, 4, dtype=torch.float64, requires_grad=True)
    with difflayers.trace() as solves:
        solution_map(half, (A,)).sum().backward()
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    assert torch.equal(solves[1].residual, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(A.grad, torch.full_like(A, 0.5))
