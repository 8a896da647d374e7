"""Conic programs against answers that nobody had to solve for.

Oracles, written before the code:

- optimal by construction: slacks and multipliers chosen by hand on the surfaces of each cone and its dual, orthogonal
  to each other, then q and b so that the optimality conditions hold at a chosen x;
- closed forms, differentiated by autograd: a linear function on an ellipsoid; maximum entropy (a softmax, by
  exponential cones); a geometric program of two terms; a linear function on the unit ball of a p-norm (power cones);
  the smallest eigenvalue (a semidefinite cone);
- finite differences, for multipliers and slacks, whose values the first oracle knows.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from difflayers import SolveError, Status, trace
from difflayers.conic import (
    Clarabel,
    DualExponential,
    DualPower,
    Exponential,
    Free,
    Moreau,
    NonNegative,
    PositiveSemidefinite,
    Power,
    Product,
    RotatedSecondOrder,
    SecondOrder,
    Zero,
    conic_program,
    conic_program_ex,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tol * max(1.0, float(b.detach().abs().max()))


# ------------------------------------------------------------------------------------------- optimal by construction


def complementary(cone: object) -> tuple[Tensor, Tensor]:
    """A slack in the cone and an orthogonal multiplier in its dual, both on the boundary, by hand."""
    r, a = 0.7, 0.3
    match cone:
        case Zero():
            return numbers(0, 0), numbers(1, -2)
        case Free():
            return numbers(3, -1), numbers(0, 0)
        case NonNegative():
            return numbers(1, 0, 2), numbers(0, 3, 0)
        case SecondOrder():  # (|w|, w) and (|w|, -w)
            return numbers(3, 1, 2, 2), numbers(6, -2, -4, -4)
        case RotatedSecondOrder():  # 2uv = w^2: (u, v, w) and (v, u, -w)
            return numbers(1, 2, 2), numbers(4, 2, -4)
        case PositiveSemidefinite():
            u, v, w = numbers(1, 2, -1), numbers(1, 0, 1), numbers(1, -1, -1)
            return torch.outer(u, u).flatten(), (torch.outer(v, v) + torch.outer(w, w) / 2).flatten()
        case Exponential():  # the ray and the normal at x / y = r
            e = math.exp(r)
            return numbers(r, 1, e) * 1.5, numbers(-1, r - 1, 1 / e) * 0.8
        case DualExponential():
            e = math.exp(r)
            return numbers(-1, r - 1, 1 / e) * 0.8, numbers(r, 1, e) * 1.5
        case Power():  # x^a y^(1-a) = z at x = 2, y = 1, and minus the gradient of z - x^a y^(1-a)
            return numbers(2, 1, 2**a), numbers(a * 2 ** (a - 1), (1 - a) * 2**a, -1)
        case DualPower():
            return numbers(a * 2 ** (a - 1), (1 - a) * 2**a, -1), numbers(2, 1, 2**a)
        case _:
            raise AssertionError(cone)


EVERY = (
    DualPower(0.3), Exponential(), PositiveSemidefinite(), NonNegative(), RotatedSecondOrder(), Power(0.3),
    SecondOrder(), Free(), DualExponential(), Zero(),
)  # fmt: skip


def constructed(cones: tuple, n: int, seed: int, batch: int = 3, quadratic: bool = True) -> tuple:
    s, y = (torch.cat(t) for t in zip(*map(complementary, cones), strict=True))
    parts = [(cone, len(complementary(cone)[0])) for cone in cones]
    assert abs(float(s @ y)) < 1e-14
    A, x = normal(seed, len(s), n), normal(seed + 1, batch, n)
    start = 0
    for cone, dim in parts:
        if isinstance(cone, PositiveSemidefinite):  # symmetric matrices, as s is
            block = A[start : start + dim].reshape(3, 3, n)
            A[start : start + dim] = ((block + block.transpose(0, 1)) / 2).reshape(dim, n)
        start += dim
    half = normal(seed + 2, n, n)
    P = half @ half.T / n + 0.1 * torch.eye(n, dtype=torch.float64) if quadratic else None
    q = -(y @ A) - (0 if P is None else x @ P)
    return q.expand(batch, n), A, x @ A.T + s, parts, P, x, y, s


@pytest.mark.parametrize("cone", EVERY, ids=str)
@pytest.mark.parametrize("solver", [Moreau(), Clarabel()], ids=["Moreau", "Clarabel"])
def test_every_cone_alone(cone, solver):
    q, A, b, parts, P, x, y, s = constructed((cone, NonNegative()), 4, 7)
    found = conic_program_ex(q, A, b, parts, P, solver=solver)
    assert found.converged.all()
    close(found.value.x, x, 1e-10)
    close(found.value.s, s.expand_as(b), 1e-9)
    if isinstance(cone, Zero | Free | NonNegative | Exponential | DualExponential):  # n = 4: these y are unique
        close(found.value.y, y.expand_as(b), 1e-8)


@pytest.mark.parametrize("solver", [None, Moreau(), Clarabel()], ids=["default", "Moreau", "Clarabel"])
def test_all_cones_at_once_in_any_order(solver):
    q, A, b, parts, P, x, y, s = constructed(EVERY, 22, 11)
    found = conic_program_ex(q, A, b, parts, P, solver=solver)
    close(found.value.x, x, 1e-9)
    close(found.value.y, y.expand_as(b), 1e-8)
    close(found.value.s, s.expand_as(b), 1e-8)
    assert float(found.residual.max()) < 1e-12
    nested = [(Product(parts[:4]), sum(d for _, d in parts[:4])), *parts[4:]]
    close(conic_program(q, A, b, Product(nested), P, solver=solver), x, 1e-9)


def test_all_orders_of_derivatives_with_all_cones():
    cones = (Exponential(), NonNegative(), RotatedSecondOrder(), Power(0.3), SecondOrder(), Free(), Zero())
    q, A, b, parts, P, *_ = constructed(cones, 12, 17, batch=1)
    inputs = [t.clone().requires_grad_() for t in (q, A, b, P)]

    def solve(q: Tensor, A: Tensor, b: Tensor, P: Tensor) -> Tensor:
        return conic_program(q, A, b, parts, P)

    assert gradcheck(solve, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(solve, inputs, fast_mode=True, atol=1e-4)


def test_multipliers_and_slacks_are_differentiable():
    cones = (Exponential(), PositiveSemidefinite(), NonNegative(), SecondOrder(), RotatedSecondOrder())
    q, A, b, parts, P, *_ = constructed(cones, 14, 19, batch=2)
    inputs = [t.clone().requires_grad_() for t in (q, A, b, P)]
    assert gradcheck(lambda *t: tuple(conic_program_ex(*t[:3], parts, t[3]).value), inputs, fast_mode=True)


def test_of_a_matrix_the_symmetric_part_counts():
    """Half of an entry in each of its rows, or all of it in one, or in the other."""
    q, A, b, parts, P, x, *_ = constructed((PositiveSemidefinite(),), 4, 23)
    upper, lower = (torch.ones(3, 3, dtype=torch.float64).triu(k).tril(3) for k in (0, 1))
    weight = (upper + lower).flatten()
    close(conic_program(q, A * weight[:, None], b * weight, parts, P), x, 1e-9)
    transposed = weight.reshape(3, 3).T.flatten()
    close(conic_program(q, A * transposed[:, None], b * transposed, parts, P), x, 1e-9)


# --------------------------------------------------------------------------------------------------------- closed forms


def agree(solve, closed, inputs: tuple[Tensor, ...], tol: float = 1e-8) -> None:
    """Value, Jacobian in both modes, and Hessian."""
    every = tuple(range(len(inputs)))
    close(solve(*inputs), closed(*inputs), tol)
    expected = jacrev(closed, every)(*inputs)
    for mode in (jacrev, jacfwd):
        for got, want in zip(mode(solve, every)(*inputs), expected, strict=True):
            close(got, want, 10 * tol)
    cotangent = torch.arange(1.0, 1 + closed(*inputs).numel(), dtype=torch.float64)
    number = lambda f: lambda *t: (f(*t).flatten() * cotangent).sum()  # noqa: E731
    for got, want in zip(hessian(number(solve))(*inputs), hessian(number(closed))(*inputs), strict=True):
        close(got, want, 100 * tol)


def test_linear_function_on_an_ellipsoid():
    F, c, q = normal(1, 3, 3) + 2 * torch.eye(3, dtype=torch.float64), normal(2, 3), normal(3, 3)

    def solve(q: Tensor, F: Tensor, c: Tensor) -> Tensor:  # |F x - c| <= 1
        A = torch.cat([F.new_zeros(1, 3), -F])
        return conic_program(q, A, torch.cat([c.new_ones(1), -c]), [(SecondOrder(), 4)])

    def closed(q: Tensor, F: Tensor, c: Tensor) -> Tensor:
        w = torch.linalg.solve(F.T, q)
        return torch.linalg.solve(F, c - w / w.norm())

    agree(solve, closed, (q, F, c))


def test_maximum_entropy_is_a_softmax():
    """max c'x + sum of entropies: (-t_i, x_i, 1) in the exponential cone says t_i >= x_i log x_i."""
    n = 4
    rows = torch.zeros(3 * n + 1, 2 * n, dtype=torch.float64)
    b = torch.zeros(3 * n + 1, dtype=torch.float64)
    for i in range(n):
        rows[3 * i, n + i], rows[3 * i + 1, i], b[3 * i + 2] = 1, -1, 1
    rows[-1, :n], b[-1] = 1, 1
    cones = [(Exponential(), 3)] * n + [(Zero(), 1)]
    c = numbers(0.3, -1.2, 2.0, 0.0)
    solve = lambda c: conic_program(torch.cat([-c, torch.ones_like(c)]), rows, b, cones)[:n]  # noqa: E731
    agree(solve, lambda c: torch.softmax(c, -1), (c,))
    batch = normal(4, 5, n)
    close(vmap(jacrev(solve))(batch), vmap(jacrev(lambda c: torch.softmax(c, -1)))(batch), 1e-8)


def test_geometric_program_of_two_terms():
    """min a exp(x) + exp(-x) / a at x = -log a; the epigraphs are (x + log a, 1, t)."""

    def solve(log_a: Tensor) -> Tensor:
        A = log_a.new_tensor([[-1, 0, 0], [0, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, 0], [0, 0, -1]])
        zero, one = torch.zeros_like(log_a), torch.ones_like(log_a)
        b = torch.stack([log_a, one, zero, -log_a, one, zero], -1)
        return conic_program(log_a.new_tensor([0.0, 1, 1]), A, b, [(Exponential(), 3)] * 2)[..., 0]

    log_a = numbers(0.7, -1.1)
    x, tangent = jvp(solve, (log_a,), (torch.ones_like(log_a),))
    close(x, -log_a, 1e-9)
    close(tangent, -torch.ones(2, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("p", [1.5, 3.0])
def test_linear_function_on_the_ball_of_a_p_norm(p):
    """(r_i, 1, x_i) in the power cone of 1/p says |x_i|^p <= r_i."""
    n = 3
    A = torch.zeros(3 * n + 1, 2 * n, dtype=torch.float64)
    b = torch.zeros(3 * n + 1, dtype=torch.float64)
    for i in range(n):
        A[3 * i, n + i], b[3 * i + 1], A[3 * i + 2, i] = -1, 1, -1
    A[-1, n:], b[-1] = 1, 1
    cones = [(Power(1 / p), 3)] * n + [(NonNegative(), 1)]

    def closed(q: Tensor) -> Tensor:
        dual = p / (p - 1)
        norm = q.abs().pow(dual).sum(-1, keepdim=True) ** (1 / dual)
        return -q.sign() * (q.abs() / norm) ** (dual - 1)

    q = numbers(0.5, -1.3, 0.8)
    agree(lambda q: conic_program(torch.cat([q, torch.zeros_like(q)]), A, b, cones)[:n], closed, (q,))


def test_smallest_eigenvalue():
    """min <C, X> on the spectraplex is v v^T, v the bottom eigenvector; derivatives of first and second order."""
    k = 3
    spread = torch.eye(k * k, dtype=torch.float64)
    A = torch.cat([-spread, torch.eye(k, dtype=torch.float64).flatten()[None], _antisymmetric(k)])
    b = torch.zeros(len(A), dtype=torch.float64)
    b[k * k] = 1
    cones = [(PositiveSemidefinite(), k * k), (Zero(), 1 + k * (k - 1) // 2)]

    def solve(C: Tensor) -> Tensor:
        return conic_program(((C + C.mT) / 2).flatten(-2), A, b, cones)

    def closed(C: Tensor) -> Tensor:
        v = torch.linalg.eigh((C + C.mT) / 2)[1][..., 0]
        return (v.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)

    C = normal(5, k, k)
    close(solve(C), closed(C), 1e-9)
    close(jacrev(solve)(C), jacrev(closed)(C), 1e-8)
    close(jacfwd(solve)(C), jacrev(closed)(C), 1e-8)
    weights = normal(6, k * k)
    for f in (solve, closed):
        x = C.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x) @ weights, x, create_graph=True)
        (h,) = torch.autograd.grad((g * normal(7, k, k)).sum(), x)
        if f is solve:
            got = h
    close(got, h, 1e-7)


def _antisymmetric(k: int) -> Tensor:
    """Rows that say X_ij = X_ji."""
    rows = []
    for i in range(k):
        for j in range(i):
            row = torch.zeros(k, k, dtype=torch.float64)
            row[i, j], row[j, i] = 1, -1
            rows.append(row.flatten())
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------- batches, failures


BALL = [(SecondOrder(), 4), (NonNegative(), 3)]


def ball(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A linear function on the unit ball below a plane of each coordinate."""
    eye = torch.eye(3, dtype=torch.float64)
    A = torch.cat([torch.zeros(1, 3, dtype=torch.float64), -eye, eye]).expand(batch, 7, 3).clone()
    b = torch.cat([numbers(1, 0, 0, 0).expand(batch, 4), numbers(0.4).expand(batch, 3)], -1).clone()
    return normal(31, batch, 3), A, b


@pytest.mark.parametrize("solver", [None, Moreau(), Clarabel()], ids=["default", "Moreau", "Clarabel"])
def test_failing_elements_fail_alone(solver):
    q, A, b = ball(8)
    others = [0, 1, 3, 4, 6]
    good = conic_program(q, A, b, BALL, solver=solver)[others]
    b[2, 4] = -5  # infeasible: x_0 <= -5
    A[5], b[5] = 0, numbers(1, 0, 0, 0, 1, 1, 1)  # unbounded
    q[7, 0] = math.nan
    leaves = [t.requires_grad_() for t in (q, A, b)]
    status = conic_program_ex(*leaves, BALL, solver=solver).status
    assert [status[i] for i in (2, 5, 7)] == [Status.INFEASIBLE, Status.UNBOUNDED, Status.DIVERGED]
    assert (status[others] == Status.CONVERGED).all()
    x = conic_program(*leaves, BALL, solver=solver, on_failure="nan")
    assert torch.equal(x[others], good)
    assert x[[2, 5, 7]].isnan().all()
    for g in torch.autograd.grad(x[others].sum(), leaves):
        assert torch.isfinite(g).all()
        assert (g[[2, 5, 7]] == 0).all()
    with pytest.raises(SolveError, match=r"2 of 6 .*elements 2, 5.*INFEASIBLE.*UNBOUNDED"):
        conic_program(q[:6], A[:6], b[:6], BALL, solver=solver)


def test_any_subset_may_be_shared_and_gradients_are_sums():
    q, A, b = ball(2)
    P = torch.eye(3, dtype=torch.float64)
    shared = [t[0].clone() for t in (q, A, b)] + [P]
    full = [t.expand(4, 2, *t.shape).clone() for t in shared]
    pairs = [*enumerate(zip(full, shared, strict=True))]
    for mask in range(1, 16):
        given = [(f if mask >> i & 1 else s).clone().requires_grad_() for i, (f, s) in pairs]
        x = conic_program(*given[:3], BALL, given[3])
        assert x.shape == (4, 2, 3)
        for i, g in enumerate(torch.autograd.grad(x.sum(), given)):
            if mask >> i & 1:
                continue
            alone = [t.clone().requires_grad_() for t in shared]
            one = torch.autograd.grad(conic_program(*alone[:3], BALL, alone[3]).sum(), alone)[i]
            close(g, 8 * one, 1e-10)


def test_empty_batch_no_rows_and_one_unknown():
    q, A, b = ball(2)
    assert conic_program(q[:0], A[:0], b[:0], BALL).shape == (0, 3)
    P = numbers(2, 1, 4).diag()
    close(conic_program(q, A[0, :0], b[0, :0], [], P), -q / P.diagonal(), 1e-14)
    with pytest.raises(SolveError, match="UNBOUNDED"):
        conic_program(q, A[0, :0], b[0, :0], [])
    assert conic_program(numbers(1), -torch.ones(1, 1).double(), numbers(0), [(NonNegative(), 1)]).abs() < 1e-12


@pytest.mark.parametrize("size", [1e-9, 1e9])
@pytest.mark.parametrize("which", range(4))
def test_any_scale(size, which):
    """The optimality conditions hold to rounding of their largest term, whatever is how large."""
    q, A, b, parts, P, *_ = constructed((SecondOrder(), Exponential(), NonNegative()), 5, 37)
    data = [q, A, b, P]
    data[which] = data[which] * size
    found = conic_program_ex(*data[:3], parts, data[3])
    assert found.converged.all()
    x, y, s = found.value
    for terms in ((x @ data[3], data[0], y @ data[1]), (x @ data[1].T, s, -data[2])):
        largest = torch.stack([t.abs().amax(-1) for t in terms]).amax(0)
        assert float((sum(terms).abs().amax(-1) / largest).max()) < 1e-11
    assert float(((y * s).sum(-1) / (y.norm(dim=-1) * s.norm(dim=-1))).abs().max()) < 1e-11


def test_redundant_rows_leave_the_minimiser_its_derivative():
    """x = argmin |x + q|^2 / 2 on a plane that is stated three times: multipliers are not unique, x is."""
    q = numbers(-1.0, -2.0).requires_grad_()
    A = numbers(1, 1, 1, 1, 2, 2).reshape(3, 2)
    for cone in (Zero(), NonNegative()):
        x = conic_program(q, A, numbers(1, 1, 2), [(cone, 3)], torch.eye(2, dtype=torch.float64))
        close(x, numbers(0, 1), 1e-12)
        close(torch.autograd.grad(x[0], q)[0], numbers(-0.5, 0.5), 1e-10)


def test_what_is_not_unique_has_no_derivative():
    q = numbers(1.0, 0.0).requires_grad_()
    eye = torch.eye(2, dtype=torch.float64)
    x = conic_program(q, torch.cat([eye, -eye]), torch.ones(4).double(), [(NonNegative(), 4)])  # on a square
    close(torch.autograd.grad(x[0], q, retain_graph=True)[0], numbers(0, 0), 1e-12)
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(x[1], q)


def test_rows_without_a_multiplier_count_as_absent():
    q = numbers(0.0, -1.0).requires_grad_()  # x >= 0 holds with nothing to spare and no force for the first entry
    eye = torch.eye(2, dtype=torch.float64)
    x = conic_program(q, -eye, torch.zeros(2).double(), [(NonNegative(), 2)], eye)
    close(torch.autograd.grad(x.sum(), q)[0], numbers(-1, -1), 1e-12)


# ----------------------------------------------------------------------------------------------------- dtypes, checks


def test_dtypes_are_kept():
    q, A, b = ball(2)
    exact = conic_program(q, A, b, BALL)
    for dtype, tol in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        point = conic_program_ex(q.to(dtype), A.to(dtype), b.to(dtype), BALL).value
        assert {t.dtype for t in point} == {dtype}
        close(point.x.double(), exact, tol)


def test_trace_says_who_solved():
    q, A, b = ball(2)
    q.requires_grad_()
    with trace() as solves:
        conic_program(q, A, b, BALL).sum().backward()
    assert [s.phase for s in solves] == ["forward", "adjoint"]
    assert "Moreau" in solves[0].name
    assert float(solves[1].residual.max()) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(2, 6, 3)}, "A: expected 7 rows, those of 2 cones"),
        ({"A": torch.zeros(2, 7, 2)}, "A: expected 3 columns as of q"),
        ({"b": torch.zeros(2, 6)}, "b: expected 7 entries, one per row of A"),
        ({"b": torch.zeros(3, 7)}, "b: expected batch dimensions that broadcast"),
        ({"P": torch.zeros(3)}, "P: expected at least 2 dimensions"),
        ({"P": -torch.eye(3)}, "P: expected a positive semidefinite matrix"),
        ({"q": torch.zeros(2, 3, dtype=torch.int64)}, "q: expected a floating-point tensor"),
        ({"A": torch.zeros(2, 7, 3, dtype=torch.float32)}, "A: expected dtype"),
        ({"b": torch.full((2, 7), math.inf)}, "b: expected finite numbers"),
        ({"cones": [(NonNegative(), 7, 1)]}, "cones: expected a Product or pairs"),
        ({"cones": [(PositiveSemidefinite(), 7)]}, "cones: .*square matrix"),
        ({"cones": 3}, "cones: expected a Product or pairs"),
        ({"q": torch.zeros(2, 0), "A": torch.zeros(2, 7, 0)}, "q: expected at least 1 variable"),
        ({"solver": "SCS"}, "solver: expected Moreau, a ConicSolver"),
    ],
)
def test_bad_input(change, message):
    q, A, b = ball(2)
    to = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() and "dtype" not in message else t  # noqa: E731
    data = {"q": q, "A": A, "b": b, "cones": BALL, "P": None} | {k: to(t) for k, t in change.items()}
    with pytest.raises(ValueError, match=message):
        conic_program(**data)
