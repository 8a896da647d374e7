"""Linear systems against numpy: values, derivatives to second order, failures, cost."""

import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import SolveError, SolveWarning, Status
from difflayers.linalg import CG, GMRES, LU, QR, Cholesky, LinearOperator, Tag, linear_solve, linear_solve_ex

F64 = torch.float64
GENERAL = [LU(), QR(), GMRES()]
DEFINITE = [Cholesky(), CG()]
name = lambda s: type(s).__name__  # noqa: E731


def t(*values):
    return torch.tensor(values, dtype=F64)


def general(*batch, n=4, seed=0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal((*batch, n, n)) * min(1, 2 / n**0.5) + 3 * np.eye(n))


def definite(*batch, n=4, seed=0):
    M = general(*batch, n=n, seed=seed)
    return M @ M.mT + torch.eye(n, dtype=F64)


def right(*shape, seed=1):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def numpy_solve(A, b):
    return torch.tensor(np.linalg.solve(A.detach().numpy(), b.detach().numpy()[..., None])[..., 0])


SYSTEMS = [(s, general) for s in GENERAL] + [(s, definite) for s in [*DEFINITE, *GENERAL]]
both = pytest.mark.parametrize(("solver", "make"), SYSTEMS, ids=lambda x: name(x) if not callable(x) else x.__name__)

# ---------------------------------------------------------------------------------------------------------- values


@both
@pytest.mark.parametrize("n", [1, 2, 5, 30, 90])
def test_values_equal_numpy(solver, make, n):
    A, b = make(3, n=n), right(3, n)
    torch.testing.assert_close(linear_solve(A, b, solver=solver), numpy_solve(A, b), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(linear_solve(A[0], b[0], solver=solver), numpy_solve(A[0], b[0]), rtol=1e-8, atol=1e-9)


@both
def test_batches_broadcast(solver, make):
    A, b = make(2, 1), right(3, 4)
    want = numpy_solve(A.expand(2, 3, 4, 4), b.expand(2, 3, 4))
    torch.testing.assert_close(linear_solve(A, b, solver=solver), want, rtol=1e-9, atol=1e-10)
    many = right(5, 2, 3, 4)
    want = numpy_solve(A.expand(5, 2, 3, 4, 4), many)
    torch.testing.assert_close(linear_solve(A, many, solver=solver), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [None, *GENERAL, *DEFINITE], ids=name)
def test_empty_systems_and_batches(solver):
    A, b = torch.zeros(3, 0, 0, dtype=F64, requires_grad=True), torch.zeros(3, 0, dtype=F64, requires_grad=True)
    x = linear_solve(A, b, solver=solver)
    assert x.shape == (3, 0)
    torch.autograd.grad(x.sum(), (A, b))
    A, b = torch.zeros(0, 2, 2, dtype=F64, requires_grad=True), torch.zeros(0, 2, dtype=F64, requires_grad=True)
    x = linear_solve(A, b, solver=solver)
    assert x.shape == (0, 2)
    assert torch.autograd.grad(x.sum(), (A, b))[0].shape == (0, 2, 2)
    shared = torch.eye(2, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(linear_solve(shared, b, solver=solver).sum(), shared)
    assert torch.equal(g, torch.zeros(2, 2, dtype=F64))


@pytest.mark.parametrize("solver", [*GENERAL, *DEFINITE], ids=name)
def test_one_by_one(solver):
    a, b = torch.tensor([[4.0]], dtype=F64, requires_grad=True), torch.tensor([2.0], dtype=F64, requires_grad=True)
    x = linear_solve(a, b, solver=solver)
    assert x.item() == 0.5
    ga, gb = torch.autograd.grad(x.sum(), (a, b), create_graph=True)
    assert ga.item() == -0.125 and gb.item() == 0.25
    assert torch.autograd.grad(ga.sum(), a)[0].item() == 2 * 2 / 64


@pytest.mark.parametrize("solver", [None, *GENERAL, *DEFINITE], ids=name)
def test_zero_right_hand_side(solver):
    A = definite(2)
    s = linear_solve_ex(A, torch.zeros(2, 4, dtype=F64), solver=solver)
    assert s.converged.all() and torch.equal(s.value, torch.zeros(2, 4, dtype=F64))
    b = torch.zeros(2, 4, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(linear_solve(A, b, solver=solver).sum(), b)
    torch.testing.assert_close(g, numpy_solve(A.mT, torch.ones(2, 4, dtype=F64)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [None, LU(), QR()], ids=name)
def test_badly_scaled_rows_and_columns_are_not_singular(solver):
    for A in (
        torch.diag(t(1.0, 1e-20)),
        torch.diag(t(1e20, 1e-20)),
        t(1e-18, 1.0)[:, None] * general(n=2),  # rows
        general(n=2) * t(1e-18, 1.0),  # columns
        1e-30 * general(n=3),
        1e30 * general(n=3),
    ):
        b = right(A.shape[0])
        s = linear_solve_ex(A, b, solver=solver)
        assert s.converged.all(), A
        # componentwise against numpy on the equilibrated system
        r, c = 1 / A.abs().amax(1), 1 / A.abs().amax(0)
        r = 1 / (A * c).abs().amax(1)
        want = c * numpy_solve(r[:, None] * A * c, r * b)
        torch.testing.assert_close(s.value, want, rtol=1e-10, atol=0)


def test_badly_scaled_positive_definite():
    d = t(1e-15, 1.0, 1e12)
    A = d[:, None] * definite(n=3) * d
    b = d * right(3)
    want = numpy_solve(A / d[:, None] / d, b / d) / d
    torch.testing.assert_close(linear_solve(A, b, solver=Cholesky()), want, rtol=1e-10, atol=0)


def test_ill_conditioned_two_hundred():
    """Condition number 1e8, solution known: direct solvers are backward stable."""
    rng = np.random.default_rng(5)
    Q = [np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in range(2)]
    d = np.logspace(0, -8, 200)
    A, x = torch.tensor(Q[0] * d @ Q[1]), torch.tensor(rng.standard_normal(200))
    b = A @ x
    for solver in (None, LU(), QR()):
        got = linear_solve(A, b, solver=solver)
        assert (A @ got - b).norm() <= 1e-12 * b.norm()
        assert (got - x).norm() <= 1e-6 * x.norm()
    S = torch.tensor(Q[0] * d @ Q[0].T)
    got = linear_solve((S + S.mT) / 2, S @ x, solver=Cholesky())
    assert (got - x).norm() <= 1e-6 * x.norm()


@pytest.mark.parametrize("solver", [LU(), QR(), Cholesky()], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(solver, dtype):
    A, b = definite(2).to(dtype), right(2, 4).to(dtype)
    x = linear_solve(A, b, solver=solver)
    assert x.dtype == dtype
    want = numpy_solve(A.double(), b.double())
    torch.testing.assert_close(x.double(), want, rtol=3 * float(torch.finfo(dtype).eps) * 10, atol=1e-2)


# ----------------------------------------------------------------------------------------------------- derivatives


@both
def test_derivatives_to_second_order(solver, make):
    A, b = make(2, n=3).requires_grad_(), right(2, 3).requires_grad_()
    sym = (lambda A: (A + A.mT) / 2) if make is definite else (lambda A: A)
    f = lambda A, b: linear_solve(sym(A), b, solver=solver)  # noqa: E731
    gradcheck(f, (A, b), check_forward_ad=True, check_batched_grad=True, atol=1e-6)
    gradgradcheck(f, (A, b), atol=1e-6)


@both
def test_derivatives_equal_those_of_torch(solver, make):
    A, b, w = make(2), right(2, 4), right(2, 4, seed=2)
    sym = (lambda A: (A + A.mT) / 2) if make is definite else (lambda A: A)
    f = lambda A, b: (linear_solve(sym(A), b, solver=solver) * w).sum()  # noqa: E731
    g = lambda A, b: (torch.linalg.solve(sym(A), b) * w).sum()  # noqa: E731
    for k in (0, 1):
        torch.testing.assert_close(grad(f, k)(A, b), grad(g, k)(A, b), rtol=1e-8, atol=1e-9)
        want = jacrev(grad(g, k), 0)(A, b)
        torch.testing.assert_close(jacrev(grad(f, k), 0)(A, b), want, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(jacfwd(grad(f, k), 0)(A, b), want, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(jacfwd(jacfwd(f, k), 0)(A, b), want, rtol=1e-7, atol=1e-8)


@both
def test_vmap_and_per_sample(solver, make):
    A, b = make(3), right(3, 4)
    f = lambda A, b: linear_solve(A, b, solver=solver)  # noqa: E731
    want = numpy_solve(A, b)
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)  # noqa: E731
    close(vmap(f)(A, b), want)
    close(vmap(f, in_dims=(None, 0))(A[0], b), numpy_solve(A[:1].expand(3, 4, 4), b))
    close(vmap(f, in_dims=(0, None))(A, b[0]), numpy_solve(A, b[:1].expand(3, 4)))
    close(vmap(f, in_dims=(2, 1), out_dims=1)(A.movedim(0, 2), b.mT), want.mT)
    nested = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(A, b)
    close(nested, numpy_solve(A[:, None].expand(3, 3, 4, 4), b[None].expand(3, 3, 4)))
    per_sample = vmap(grad(lambda A, b: f(A, b).square().sum()), in_dims=(None, 0))(A[0], b)
    M = A[0].clone().requires_grad_()
    close(per_sample.sum(0), torch.autograd.grad(f(M, b).square().sum(), M)[0])
    H = vmap(hessian(lambda b, A: f(A, b).square().sum()))(b, A)
    inverse = torch.linalg.inv(A)
    close(H, 2 * inverse.mT @ inverse)


def test_cholesky_gradient_is_symmetric():
    A, b = definite().requires_grad_(), right(4)
    for solver in DEFINITE:
        (g,) = torch.autograd.grad(linear_solve(A, b, solver=solver).square().sum(), A)
        torch.testing.assert_close(g, g.mT)


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("solver", [None, LU(), QR(), Cholesky(), GMRES()], ids=name)
def test_singular_elements_are_named_and_nan_alone(solver):
    A = definite(4)
    harmless = A.clone()
    A[1] = torch.ones(4, 4, dtype=F64)
    A[3] = 0
    harmless[[1, 3]] = torch.eye(4, dtype=F64)
    b, good = right(4, 4), [0, 2]
    with pytest.raises(SolveError, match=r"2 of 4.*elements 1, 3\)"):
        linear_solve(A, b, solver=solver)
    results = []
    for M in (A, harmless):
        M, c, w = (
            M.clone().requires_grad_(),
            b.clone().requires_grad_(),
            torch.tensor(1.0, dtype=F64, requires_grad=True),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)
            x = linear_solve(M, w * c, solver=solver, on_failure="nan")
            first = torch.autograd.grad(x[good].square().sum(), (M, c, w), create_graph=True)
            second = torch.autograd.grad(first[0][good].square().sum() + first[2], (M, c, w))
        results.append((x, *first, *second))
    assert results[0][0][[1, 3]].isnan().all()
    for got, want in zip(*results, strict=True):
        if got.ndim:
            assert torch.equal(got[good], want[good])
        else:
            assert got.isfinite() and torch.equal(got, want)


@pytest.mark.parametrize("solver", [LU(), QR()], ids=name)
@pytest.mark.parametrize("n", [2, 3, 10, 60])
def test_rank_deficient_matrices_are_found(solver, n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        U = rng.standard_normal((n, n - 1))
        A = torch.tensor(U @ rng.standard_normal((n - 1, n)))
        assert linear_solve_ex(A, right(n), solver=solver).status.item() == Status.SINGULAR
    A = general(n=n)
    A[:, 0] = A[:, 1]
    assert linear_solve_ex(A, right(n), solver=solver).status.item() == Status.SINGULAR
    A = general(n=n)
    A[-1] = 0
    assert linear_solve_ex(A, right(n), solver=solver).status.item() == Status.SINGULAR


def test_indefinite_is_singular_for_the_definite_solvers():
    A = torch.diag_embed(torch.stack([t(1.0, 2.0, 3.0), t(1.0, -2.0, 3.0), t(-1.0, -2.0, -3.0)]))
    b = torch.ones(3, 3, dtype=F64)
    for solver in DEFINITE:
        s = linear_solve_ex(A, b, solver=solver)
        assert s.status.tolist() == [0, Status.SINGULAR, Status.SINGULAR], solver
        with pytest.raises(SolveError, match="1, 2"):
            linear_solve(A, b, solver=solver)
        torch.testing.assert_close(s.value[0], t(1.0, 0.5, 1 / 3))


def test_asymmetric_matrices_are_refused_by_the_definite_solvers():
    for solver in DEFINITE:
        with pytest.raises(ValueError, match=r"A.*symmetric"):
            linear_solve(general(), right(4), solver=solver)


def test_operators_must_declare_what_a_solver_needs():
    A = LinearOperator(lambda p, v: p[0] * v, (t(1.0, 2.0),))
    for solver in DEFINITE:
        with pytest.raises(ValueError, match=r"(?i)positive.definite"):
            linear_solve(A, t(1.0, 1.0), solver=solver)


@pytest.mark.parametrize("solver", [None, LU(), CG()], ids=name)
def test_bad_input_is_named(solver):
    A, b = definite(2), right(2, 4)
    solve = lambda A, b: linear_solve(A, b, solver=solver)  # noqa: E731
    with pytest.raises(ValueError, match=r"A.*expected.*got.*\(2, 4, 3\)"):
        solve(A[..., :3], b)
    with pytest.raises(ValueError, match=r"b.*expected.*4.*got.*3"):
        solve(A, b[..., :3])
    with pytest.raises(ValueError, match=r"A.*expected.*got"):
        solve(A[0, 0], b)
    with pytest.raises(ValueError, match=r"expected.*broadcast.*got"):
        solve(A, right(3, 4))
    with pytest.raises(ValueError, match=r"A.*floating.*int64"):
        solve(A.long(), b)
    with pytest.raises(ValueError, match=r"b.*floating.*int64"):
        solve(A, b.long())
    with pytest.raises(ValueError, match=r"[Ab].*expected dtype torch.float.*got torch.float"):
        solve(A, b.float())
    with pytest.raises(ValueError, match=r"[Ab].*expected device.*got.*(meta|cpu)"):
        solve(A, b.to("meta"))
    for bad in (torch.nan, torch.inf):
        M, c = A.clone(), b.clone()
        M[1, 2, 2] = bad
        c[1, 2] = bad
        with pytest.raises(ValueError, match=r"A.*finite"):
            solve(M, b)
        with pytest.raises(ValueError, match=r"b.*finite"):
            solve(A, c)
        with pytest.raises(ValueError, match=r"b.*finite"):
            vmap(solve)(A, c)
    with pytest.raises(ValueError, match=r"A.*expected"):
        solve([[1.0]], b)
    with pytest.raises(ValueError, match="on_failure"):
        linear_solve(A, b, solver=solver, on_failure="no")


# -------------------------------------------------------------------------------------------- cost: one factorisation


@pytest.fixture
def count(monkeypatch):
    calls = {}
    for key in ("lu_factor_ex", "lu_factor", "cholesky_ex", "cholesky", "qr", "inv", "solve", "solve_ex", "lstsq"):
        real = getattr(torch.linalg, key)

        def counted(*args, _real=real, _key=key, **kwargs):
            calls[_key] = calls.get(_key, 0) + 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, key, counted)
    return calls


@pytest.mark.parametrize(
    ("solver", "want"),
    [(LU(), "lu_factor_ex"), (Cholesky(), "cholesky_ex"), (QR(), "qr"), (None, "lu_factor_ex")],
    ids=str,
)
def test_all_orders_share_one_factorisation(count, solver, want):
    A, b = definite(2).requires_grad_(), right(6, 2, 4).requires_grad_()  # six right-hand sides in front
    x = linear_solve(A, b, solver=solver)
    first = torch.autograd.grad(x.square().sum(), (A, b), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (A, b), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in second), (A, b))
    assert count == {want: 1}


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, lambda f: jacfwd(jacrev(f)), lambda f: vmap(f, in_dims=(None, 0))]
)
def test_all_transforms_share_one_factorisation(count, transform):
    A, b = general(n=3), right(5, 3)
    transform(lambda A, b: linear_solve(A, b, solver=LU()))(A, b)
    assert count == {"lu_factor_ex": 1}


def test_the_factor_is_not_copied_for_every_right_hand_side(monkeypatch):
    """n = 100 with 400 right-hand sides: the factorised matrix has no batch dimension of 400."""
    shapes = []
    real = torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda A, **k: (shapes.append(tuple(A.shape)), real(A, **k))[1])
    linear_solve(general(n=100), right(400, 100), solver=LU())
    assert np.prod(shapes[0]) == 100 * 100


# ----------------------------------------------------------------------------------------------------------- Krylov


def test_cg_takes_as_many_steps_as_distinct_eigenvalues():
    d = t(1.0, 1.0, 4.0, 4.0, 9.0)
    s = linear_solve_ex(torch.diag(d), torch.ones(5, dtype=F64), solver=CG())
    assert s.converged.all() and s.steps.item() == 3
    s = linear_solve_ex(torch.diag(d), torch.ones(5, dtype=F64), solver=GMRES())
    assert s.converged.all() and s.steps.item() <= 4  # one product may go to the first residual


def test_cg_accepts_its_final_iterate():
    """Exactly as many steps as it needs: the last iterate is measured, not thrown away."""
    d = t(1.0, 4.0, 9.0)
    for solver in (CG(max_steps=3), GMRES(max_steps=4), CG(max_steps=3, check_every=None)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = linear_solve(torch.diag(d), torch.ones(3, dtype=F64), solver=solver)
        torch.testing.assert_close(x, 1 / d)
    s = linear_solve_ex(torch.diag(d), torch.ones(3, dtype=F64), solver=CG(max_steps=2))
    assert s.status.item() == Status.MAX_STEPS and s.steps.item() == 2
    assert s.residual.item() < torch.ones(3, dtype=F64).norm()


def test_krylov_steps_are_per_element_and_independent_of_the_batch():
    A = torch.stack([torch.eye(6, dtype=F64), definite(n=6), torch.diag(t(1, 2, 3, 4, 5, 6.0))])
    b = right(3, 6)
    for solver in (CG(), GMRES()):
        s = linear_solve_ex(A, b, solver=solver)
        assert s.steps[0] <= 2 and s.steps[1] > 2
        for i in range(3):
            alone = linear_solve_ex(A[i : i + 1], b[i : i + 1], solver=solver)
            assert alone.steps[0] == s.steps[i]
            torch.testing.assert_close(alone.value[0], s.value[i], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("solver", [CG, GMRES])
def test_warm_start(solver):
    A, b = definite(n=8), right(8)
    x = numpy_solve(A, b)
    cold = linear_solve_ex(A, b, solver=solver())
    warm = linear_solve_ex(A, b, solver=solver(), init=x)
    near = linear_solve_ex(A, b, solver=solver(rtol=1e-8), init=x + 1e-7)
    assert warm.steps.item() == 0 < near.steps.item() < cold.steps.item()
    torch.testing.assert_close(warm.value, x)
    start = torch.zeros(8, dtype=F64, requires_grad=True)
    M = A.clone().requires_grad_()
    x = linear_solve(M, b, solver=solver(), init=start)
    assert torch.autograd.grad(x.sum(), (M, start), allow_unused=True)[1] is None


def test_warm_start_of_the_wrong_shape():
    for init in (torch.zeros(3, dtype=F64), torch.zeros(4), torch.full((4,), torch.nan, dtype=F64)):
        with pytest.raises(ValueError, match="init"):
            linear_solve(definite(), right(4), solver=CG(), init=init)


def test_preconditioners_save_steps_and_change_nothing_else():
    d = torch.logspace(0, 6, 40, dtype=F64)
    A = torch.diag(d) + 0.1 * torch.ones(40, 40, dtype=F64)
    b = right(40)
    jacobi = lambda params, r: r / d  # noqa: E731
    for solver in (CG, GMRES):
        plain = linear_solve_ex(A, b, solver=solver(max_steps=5000))
        good = linear_solve_ex(A, b, solver=solver(preconditioner=jacobi))
        assert good.converged.all() and good.steps.item() < (10 if solver is CG else 30) < plain.steps.item()
        torch.testing.assert_close(good.value, numpy_solve(A, b), rtol=1e-6, atol=1e-10)
        M = A.clone().requires_grad_()
        (g,) = torch.autograd.grad(linear_solve(M, b, solver=solver(preconditioner=jacobi)).sum(), M)
        x, v = numpy_solve(A, b), numpy_solve(A, torch.ones(40, dtype=F64))
        want = -torch.outer(v, x)
        want = (want + want.mT) / 2 if solver is CG else want
        torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-9)


def test_a_preconditioner_sees_the_parameters():
    d = torch.logspace(0, 5, 20, dtype=F64, requires_grad=True)
    A = LinearOperator(lambda p, v: p[0] * v, (d,), tags=Tag.POSITIVE_DEFINITE)
    s = linear_solve_ex(A, torch.ones(20, dtype=F64), solver=CG(preconditioner=lambda p, r: r / p[0]))
    assert s.converged.all() and s.steps.item() == 1
    (g,) = torch.autograd.grad(s.value.sum(), d)
    torch.testing.assert_close(g, -1 / d.detach() ** 2)


def test_gmres_on_a_cyclic_shift_stalls_until_the_last_step():
    """The classical worst case: no progress for n - 1 steps, then exact. Wider cycles follow one that is too short."""
    n = 12
    A, b = torch.roll(torch.eye(n, dtype=F64), 1, 0), torch.eye(n, dtype=F64)[0]
    s = linear_solve_ex(A, b, solver=GMRES(restart=n))
    assert s.converged.all() and n <= s.steps.item() <= n + 1
    torch.testing.assert_close(s.value, numpy_solve(A, b))
    s = linear_solve_ex(A, b, solver=GMRES(restart=n - 2, max_steps=n - 2))
    assert not s.converged.any()
    s = linear_solve_ex(A, b, solver=GMRES(restart=n - 2))
    torch.testing.assert_close(s.value, numpy_solve(A, b))


def test_gmres_on_rotations_and_skew_matrices():
    angle = torch.tensor(1.5707963267948966, dtype=F64)
    c, s = torch.cos(angle), torch.sin(angle)
    R = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    for b in (t(1.0, 0.0), t(0.0, 1.0), t(3.0, -4.0)):
        torch.testing.assert_close(linear_solve(R, b, solver=GMRES()), R.mT @ b)
    K = general(n=6)
    K = K - K.mT
    torch.testing.assert_close(
        linear_solve(K, right(6), solver=GMRES()), numpy_solve(K, right(6)), rtol=1e-8, atol=1e-9
    )


def test_gmres_with_restarts_reaches_the_tolerance():
    A, b = torch.eye(60, dtype=F64) + general(n=60) / 40, right(60)
    s = linear_solve_ex(A, b, solver=GMRES(restart=5))
    assert s.converged.all() and s.steps.item() > 5
    assert (A @ s.value - b).norm() <= 1.01e-10 * b.norm()


@pytest.mark.parametrize("restart", [5, 20, 30, 60])
@pytest.mark.parametrize("make", [definite, general], ids=["definite", "general"])
def test_gmres_on_many_well_conditioned_systems(make, restart):
    """Twenty systems at once that finish at different steps of their last cycle."""
    for seed in range(3):
        A, b = make(20, n=60, seed=seed), right(20, 60, seed=seed)
        if make is general:
            A = A + 2 * torch.eye(60, dtype=F64)
        s = linear_solve_ex(A, b, solver=GMRES(restart=restart))
        assert s.status.tolist() == [0] * 20
        torch.testing.assert_close(s.value, numpy_solve(A, b), rtol=1e-7, atol=1e-8)
        assert (((A @ s.value[..., None])[..., 0] - b).norm(dim=-1) <= 1.01e-10 * b.norm(dim=-1)).all()


def test_gmres_on_inconsistent_systems_does_not_look_converged():
    A = torch.diag(t(1.0, 2.0, 0.0))
    s = linear_solve_ex(A, torch.ones(3, dtype=F64), solver=GMRES())
    assert not s.converged.any() and s.value.isfinite().all()


def test_cg_on_inconsistent_semidefinite_systems_does_not_look_converged():
    s = linear_solve_ex(torch.diag(t(1.0, 2.0, 0.0)), torch.ones(3, dtype=F64), solver=CG())
    assert not s.converged.any()


def test_scale_does_not_matter():
    A, b = definite(n=6), right(6)
    for scale in (1e-100, 1e-30, 1e30, 1e100):
        for solver in (CG(), GMRES(), LU(), QR(), Cholesky()):
            for x in (
                linear_solve(scale * A, b, solver=solver) * scale,
                linear_solve(A, scale * b, solver=solver) / scale,
            ):
                torch.testing.assert_close(x, numpy_solve(A, b), rtol=1e-8, atol=1e-9)


def test_not_converged_warns_with_its_residual():
    for solver in (CG(max_steps=2), GMRES(max_steps=2)):
        with pytest.warns(SolveWarning, match="residual"):
            linear_solve(definite(n=9), right(9), solver=solver)


# --------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("solver", [None, LU(), GMRES(), CG(), Cholesky()], ids=name)
@pytest.mark.parametrize("native", [False, True])
def test_operator_parameters_get_their_gradient(solver, native):
    """(diag(d) + u u^T) x = b in matvec form against the same matrix written out."""
    d, u, b = right(2, 4).abs() + 1, right(4, seed=3), right(2, 4, seed=4)

    def f(d, u, b):
        A = LinearOperator(
            lambda p, v: p[0] * v + p[1] * (p[1] * v).sum(-1, keepdim=True),
            (d, u),
            tags=Tag.POSITIVE_DEFINITE,
            param_ndims=(1, 1) if native else None,
        )
        return linear_solve(A, b, solver=solver)

    dense = lambda d, u, b: torch.linalg.solve(torch.diag_embed(d) + torch.outer(u, u), b)  # noqa: E731
    torch.testing.assert_close(f(d, u, b), dense(d, u, b), rtol=1e-8, atol=1e-9)
    for k in range(3):
        torch.testing.assert_close(jacrev(f, k)(d, u, b), jacrev(dense, k)(d, u, b), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(jacfwd(f, k)(d, u, b), jacrev(dense, k)(d, u, b), rtol=1e-8, atol=1e-9)
    loss = lambda f: lambda d, u, b: f(d, u, b).sin().sum()  # noqa: E731
    got, want = (hessian(loss(g), argnums=1)(d, u, b) for g in (f, dense))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    inputs = [x.clone().requires_grad_() for x in (d, u, b)]
    gradgradcheck(f, inputs, fast_mode=True)
    per_sample = vmap(grad(lambda u, d, b: f(d, u, b).sin().sum()), in_dims=(None, 0, 0))(u, d, b)
    want = vmap(grad(lambda u, d, b: dense(d, u, b).sin().sum()), in_dims=(None, 0, 0))(u, d, b)
    torch.testing.assert_close(per_sample, want, rtol=1e-8, atol=1e-9)


def test_operator_that_is_not_symmetric_uses_its_transpose_backwards():
    P = general(n=5)
    f = lambda P, b: linear_solve(LinearOperator(lambda p, v: (p[0] @ v[..., None])[..., 0], (P,)), b)  # noqa: E731
    for solver in (None, GMRES()):
        g = lambda P, b: linear_solve(  # noqa: E731
            LinearOperator(lambda p, v: (p[0] @ v[..., None])[..., 0], (P,)),
            b,
            solver=solver,  # noqa: B023
        )
        torch.testing.assert_close(
            jacrev(g)(P, right(5)), jacrev(torch.linalg.solve)(P, right(5)), rtol=1e-8, atol=1e-9
        )
    assert torch.allclose(f(P, right(5)), numpy_solve(P, right(5)))


def test_large_operators_are_never_written_out():
    """n = 200000: a dense matrix would take 320 GB."""
    n = 200_000
    d = torch.linspace(1, 2, n, dtype=F64, requires_grad=True)
    for tags in (Tag.POSITIVE_DEFINITE, Tag.NONE):
        A = LinearOperator(lambda p, v: p[0] * v, (d,), tags=tags)
        x = linear_solve(A, torch.ones(n, dtype=F64))
        torch.testing.assert_close(x.detach(), 1 / d.detach(), rtol=1e-8, atol=0)
        (g,) = torch.autograd.grad(x.sum(), d)
        torch.testing.assert_close(g, -1 / d.detach() ** 2, rtol=1e-7, atol=0)


def test_captured_operator_parameters_are_refused():
    w = t(1.0, 2.0).requires_grad_()
    with pytest.raises(ValueError, match="params"):
        linear_solve(LinearOperator(lambda p, v: w * v), t(1.0, 1.0))
    with pytest.raises(ValueError, match="params"):
        linear_solve(LinearOperator(lambda p, v: w * v), t(1.0, 1.0), solver=GMRES())
    with pytest.raises(ValueError, match="params"):
        grad(lambda w: linear_solve(LinearOperator(lambda p, v: w * v), t(1.0, 1.0)).sum())(w.detach())
    constant = w.detach()
    x = linear_solve(LinearOperator(lambda p, v: constant * v), t(1.0, 1.0))
    torch.testing.assert_close(x, 1 / constant)


def test_operator_output_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"matvec.*expected.*\(3,\).*got.*\(2,\)"):
        linear_solve(LinearOperator(lambda p, v: v[..., :2]), t(1.0, 1.0, 1.0))


def test_autocast_is_off_inside():
    A, b = definite().float(), right(4).float()
    want = linear_solve(A, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for solver in (LU(), QR(), Cholesky(), CG(), GMRES()):
            M = A.clone().requires_grad_()
            x = linear_solve(M, b, solver=solver)
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)
            (g,) = torch.autograd.grad(x.sum(), M)
            v = torch.linalg.solve(A.double().mT, torch.ones(4, dtype=F64))
            exact = -torch.outer(v, want.double())
            exact = (exact + exact.mT) / 2 if isinstance(solver, Cholesky | CG) else exact
            torch.testing.assert_close(g.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [CG, GMRES])
def test_options_out_of_range_are_named(solver):
    for name, bad in (("rtol", -1.0), ("atol", -1.0), ("max_steps", -1), ("max_steps", True), ("check_every", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            solver(**{name: bad})


@pytest.mark.parametrize("solver", [LU(), QR()], ids=name)
def test_an_operator_that_ignores_its_vector_is_singular(solver):
    nothing = LinearOperator(lambda p, v: 0 * p[0], (torch.ones(3, dtype=F64),))
    with pytest.raises(SolveError):
        linear_solve(nothing, torch.ones(3, dtype=F64), solver=solver)
