"""Completions against Clarabel on the block of constraints each one stands for.

Oracles: the inner minimum by cvxpy with Clarabel at 1e-10; feasibility of x as cvxpy sees it; dual feasibility and
equality of both values for z (optimality is certified without any solver); the solver's completion of the same rows;
finite differences.
"""

import math

import cvxpy as cp
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers import SolveError, Status
from difflayers.conic import (
    BallCompletion,
    BoxCompletion,
    BoxQuadraticCompletion,
    Completion,
    EllipsoidCompletion,
    HyperbolicCompletion,
    NonNegative,
    PolytopeCompletion,
    Product,
    QuadraticCompletion,
    SecondOrder,
    SimplexCompletion,
    SolverCompletion,
    SpectraplexCompletion,
    dual_bound,
    dual_bound_ex,
)
from tests.conic.dual_blocks import BLOCKS, CENTER, LOWER, UPPER, VERTICES, Block, D, N, costs, numbers, rand

blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
with_rows = pytest.mark.parametrize("block", [b for b in BLOCKS if b.H is not None], ids=lambda block: block.name)


def complete(completion: Completion, r: Tensor, **options):
    """The completion alone: a bound without rows."""
    m = r.new_zeros(0)
    return dual_bound(m, r.new_zeros(0, *r.shape[-completion.ndim :]), m, r, completion, **options)


# ------------------------------------------------------------------------------------------------------- the minimum


@blocks
def test_minimum_is_clarabels(block: Block):
    r = costs(block, 3, 6)
    expected = numbers([block.minimum(e.numpy()) for e in r])
    torch.testing.assert_close(complete(block.completion, r).bound, expected, rtol=1e-8, atol=1e-8)


@blocks
def test_minimiser_is_feasible_and_attains_the_minimum(block: Block):
    r = costs(block, 4, 6)
    point = complete(block.completion, r)
    assert max(block.distance(x) for x in point.x) < 1e-12
    k = block.completion.ndim
    torch.testing.assert_close((r * point.x).flatten(-k).sum(-1), point.bound, rtol=1e-13, atol=1e-13)


@with_rows
def test_multipliers_certify_the_minimum(block: Block):
    r = costs(block, 5, 6)
    point = complete(block.completion, r)
    assert bool((block.cone.dual().violation(point.z) < 1e-12).all())
    torch.testing.assert_close(point.z @ block.H, r.flatten(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point.z @ block.h, point.bound, rtol=1e-12, atol=1e-12)


@with_rows
def test_closed_form_is_the_solvers_completion(block: Block):
    r = costs(block, 6, 4)
    closed = complete(block.completion, r)
    solved = complete(SolverCompletion(block.H, block.h, block.cone), r.flatten(1))
    torch.testing.assert_close(solved.bound, closed.bound, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solved.x.reshape(closed.x.shape), closed.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solved.z, closed.z, rtol=1e-6, atol=1e-6)


def test_quadratic_is_clarabels_and_has_no_multipliers():
    Q, r = D @ D.T, rand(7, 3, N)
    x = cp.Variable(N)
    expected = [
        cp.Problem(cp.Minimize(cp.quad_form(x, Q.numpy()) / 2 + e.numpy() @ x)).solve(solver=cp.CLARABEL) for e in r
    ]
    point = complete(QuadraticCompletion(Q), r)
    torch.testing.assert_close(point.bound, numbers(expected), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(point.x @ Q, -r)
    assert point.z.shape == (3, 0)


def test_box_quadratic_bounds_the_quadratic_program_and_meets_it_at_its_minimiser():
    F = rand(8, 2, N)
    Q, r = F.T @ F, rand(9, N)  # singular
    x = cp.Variable(N)
    box = [x >= LOWER.numpy(), x <= UPPER.numpy()]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F.numpy() @ x) / 2 + r.numpy() @ x), box)
    optimum = float(problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10))
    completion = BoxQuadraticCompletion(Q, LOWER, UPPER)
    w = rand(10, 500, N)
    assert float((complete(completion, r, w=w).bound - optimum).max()) <= 1e-10
    at_best = complete(completion, r, w=torch.from_numpy(x.value))
    assert abs(float(at_best.bound) - optimum) < 1e-8
    # the certificate: z >= 0 with z_l - z_u = r + Q w
    z = complete(completion, r, w=w).z
    assert bool((z >= 0).all())
    torch.testing.assert_close(z[:, :N] - z[:, N:], r + w @ Q)


# ------------------------------------------------------------------------------------------------------- derivatives


@blocks
def test_derivative_is_the_minimiser(block: Block):
    r = costs(block, 11, 5).requires_grad_()
    point = complete(block.completion, r)
    found = torch.autograd.grad(point.bound.sum(), r)[0]
    torch.testing.assert_close(found, point.x.detach(), rtol=1e-12, atol=1e-12)


def _derivative_cases():
    R = numbers([0.7, 1.6])
    Q = D @ D.T
    yield "box", BoxCompletion, (LOWER, UPPER + 0.1)
    for p in (1, 1.25, 2, 3, math.inf):
        yield f"ball p={p:g}", lambda R, c, p=p: BallCompletion(R, p, c), (R, CENTER)
    yield "ellipsoid", EllipsoidCompletion, (D, R, CENTER)
    yield "quadratic", QuadraticCompletion, (Q,)
    yield "simplex", SimplexCompletion, (R,)
    yield "polytope", PolytopeCompletion, (VERTICES,)
    yield "solver", lambda H, h: SolverCompletion(H, h, Product([(SecondOrder(), N + 1)])), _ball_rows()


def _ball_rows():
    H = torch.cat([torch.zeros(1, N), torch.eye(N)]).double() + 0.1 * rand(12, N + 1, N)
    return H, numbers([-1.0, 0.1, 0.0, 0.2, -0.3])


@pytest.mark.parametrize(
    ("name", "make", "data"), list(_derivative_cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_derivatives_in_the_data(name, make, data):
    def bound(r, *data):
        return complete(make(*data), r).bound

    inputs = tuple(t.clone().requires_grad_() for t in (rand(13, 2, N), *data))
    assert gradcheck(bound, inputs, check_forward_ad=True)
    assert gradgradcheck(bound, inputs)


def test_derivatives_of_hyperbola_and_spectraplex():
    inputs = (rand(14, 2, N).abs() + 0.2, numbers([0.5, 2.0]))
    inputs = tuple(t.requires_grad_() for t in inputs)
    of_pairs = lambda r, k: complete(HyperbolicCompletion(k), r).bound  # noqa: E731
    assert gradcheck(of_pairs, inputs) and gradgradcheck(of_pairs, inputs)
    inputs = (rand(15, 2, 3, 3).requires_grad_(), numbers([0.7, 1.6]).requires_grad_())
    of_matrices = lambda S, trace: complete(SpectraplexCompletion(trace), S).bound  # noqa: E731
    assert gradcheck(of_matrices, inputs) and gradgradcheck(of_matrices, inputs)


def test_quadratic_gradient_is_the_tables():
    Q, r = (D @ D.T).requires_grad_(), rand(16, N)
    point = complete(QuadraticCompletion(Q), r)
    found = torch.autograd.grad(point.bound, Q)[0]
    torch.testing.assert_close(found, torch.outer(point.x, point.x).detach() / 2)


@pytest.mark.parametrize("name", ["box", "simplex", "polytope", "ball p=1", "ball p=inf"])
def test_second_derivatives_of_polyhedra_are_zero(name):
    block = next(b for b in BLOCKS if b.name == name)
    hessian = torch.autograd.functional.hessian(lambda r: complete(block.completion, r).bound, costs(block, 17, 1)[0])
    assert bool((hessian == 0).all())


def test_first_derivative_needs_no_linear_solve(monkeypatch):
    """With every solve forbidden after the forward pass."""
    import difflayers.linalg._system as system

    r = rand(18, 3, N).requires_grad_()
    bounds = [complete(make(*data), r).bound for _, make, data in [*_derivative_cases()] if make is QuadraticCompletion]
    bounds += [
        complete(EllipsoidCompletion(D), r).bound,
        complete(SolverCompletion(*_ball_rows(), SecondOrder()), r).bound,
    ]

    def forbidden(*_, **__):
        raise AssertionError("a linear solve in backward")

    monkeypatch.setattr(torch.linalg, "lu_solve", forbidden)
    monkeypatch.setattr(torch.linalg, "solve_triangular", forbidden)
    monkeypatch.setattr(system, "solve_system", forbidden)
    for bound in bounds:
        slope = torch.autograd.grad(bound.sum(), r, create_graph=True)[0]
        assert torch.isfinite(slope).all()
        with pytest.raises(AssertionError, match="a linear solve"):  # the second derivative needs one
            torch.autograd.grad(slope.sum(), r)


# ------------------------------------------------------------------------------------------------------ kinks, infinity


@blocks
def test_minimiser_at_a_kink_is_feasible_and_gives_a_supergradient(block: Block):
    if block.positive:
        r = torch.full((N,), 0.5, dtype=torch.float64)
    else:
        r = torch.zeros_like(costs(block, 19, 1)[0])
    r = r.requires_grad_()
    point = complete(block.completion, r)
    slope = torch.autograd.grad(point.bound, r)[0]
    torch.testing.assert_close(slope, point.x.detach())
    assert block.distance(point.x.detach()) < 1e-12
    others = costs(block, 20, 200)
    k = block.completion.ndim
    above = point.bound + ((others - r) * slope).flatten(-k).sum(-1)
    assert bool((complete(block.completion, others).bound <= above + 1e-12).all())
    hessian = torch.autograd.functional.hessian(lambda r: complete(block.completion, r).bound, r.detach())
    assert bool(torch.isfinite(hessian).all())


def test_documented_points_at_ties():
    zero = torch.zeros(N, dtype=torch.float64)
    assert torch.equal(complete(BoxCompletion(LOWER, UPPER), zero).x, (LOWER + UPPER) / 2)
    assert torch.equal(complete(BallCompletion(2.0, center=CENTER), zero).x, CENTER)
    assert torch.equal(complete(EllipsoidCompletion(D, center=CENTER), zero).x, CENTER)
    tie = numbers([1.0, -2.0, -2.0, 0.0])
    assert torch.equal(complete(SimplexCompletion(), tie).x, numbers([0, 0.5, 0.5, 0]))
    assert torch.equal(complete(BallCompletion(1.0, 1), tie).x, numbers([0, 0.5, 0.5, 0]))
    twice = torch.stack([CENTER, LOWER, CENTER])
    assert torch.allclose(complete(PolytopeCompletion(twice), zero).x, (2 * CENTER + LOWER) / 3)
    S = torch.diag(numbers([3.0, 1.0, 1.0]))
    X = complete(SpectraplexCompletion(), S).x
    torch.testing.assert_close(X, torch.diag(numbers([0, 0.5, 0.5])))


def test_repeated_eigenvalues_have_finite_derivatives():
    S = torch.eye(3, dtype=torch.float64).requires_grad_()
    bound = complete(SpectraplexCompletion(), S).bound
    slope = torch.autograd.grad(bound, S, create_graph=True)[0]
    torch.testing.assert_close(slope, torch.eye(3).double() / 3)
    assert bool(torch.isfinite(torch.autograd.grad((slope * rand(21, 3, 3)).sum(), S)[0]).all())


def test_a_missing_bound_is_minus_infinity_only_where_it_is_asked_for():
    lower = numbers([0.0, -math.inf, -math.inf])
    upper = numbers([math.inf, 1.0, math.inf])
    r = numbers([[1.0, -2.0, 0.0], [1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [1.0, -2.0, 1e-300]])
    r.requires_grad_()
    point = complete(BoxCompletion(lower, upper), r)
    assert point.bound.tolist() == [-2.0, -math.inf, -math.inf, -math.inf]
    assert point.x[0].tolist() == [0.0, 1.0, 0.0]
    slopes = torch.autograd.grad(point.bound.sum(), r)[0]
    assert bool(torch.isfinite(slopes).all())
    status = dual_bound_ex(r.new_zeros(0), r.new_zeros(0, 3), r.new_zeros(0), r, BoxCompletion(lower, upper)).status
    assert status.tolist() == [Status.CONVERGED, *[Status.UNBOUNDED] * 3]


def test_hyperbola_at_and_beyond_its_limits():
    inf = math.inf
    pairs = [(4.0, 1.0, 4.0, 0.5, 2.0), (-1.0, 1.0, -inf, inf, 0.0), (1.0, -1.0, -inf, 0.0, inf)]
    pairs += [(0.0, 1.0, 0.0, inf, 0.0), (1.0, 0.0, 0.0, 0.0, inf), (0.0, 0.0, 0.0, 1.0, 1.0)]
    for pi, tau, bound, x, t in pairs:
        r = numbers([pi, tau]).requires_grad_()
        point = complete(HyperbolicCompletion(), r)
        assert point.bound.item() == bound, (pi, tau)
        assert point.x.tolist() == [x, t], (pi, tau)
        assert bool(torch.isfinite(torch.autograd.grad(point.bound, r)[0]).all())
    assert math.isnan(complete(HyperbolicCompletion(), torch.tensor([math.nan, 1.0])).bound.item())


@blocks
def test_right_at_all_scales(block: Block):
    r = costs(block, 22, 3)
    expected = complete(block.completion, r)
    for scale in (2.0**-300, 2.0**-30, 2.0**30, 2.0**300):
        point = complete(block.completion, scale * r)
        torch.testing.assert_close(point.bound / scale, expected.bound, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(point.x, expected.x, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- failure


def test_a_singular_quadratic_fails_alone():
    Q = torch.stack([torch.eye(2), torch.zeros(2, 2), 2 * torch.eye(2)]).double()
    r = rand(23, 3, 2).requires_grad_()
    with pytest.raises(SolveError, match="SINGULAR"):
        complete(QuadraticCompletion(Q), r)
    point = complete(QuadraticCompletion(Q), r, on_failure="nan")
    assert torch.isnan(point.bound).tolist() == [False, True, False]
    kept = torch.autograd.grad(point.bound[[0, 2]].sum(), r)[0]
    assert bool(torch.isfinite(kept).all())
    m = r.new_zeros(0)
    status = dual_bound_ex(m, r.new_zeros(0, 2), m, r, QuadraticCompletion(Q)).status
    assert status.tolist() == [Status.CONVERGED, Status.SINGULAR, Status.CONVERGED]


def test_an_unbounded_block_fails_alone():
    H, h = torch.eye(2).double(), torch.zeros(2).double()
    r = numbers([[1.0, 1.0], [-1.0, 1.0]]).requires_grad_()
    with pytest.raises(SolveError, match="UNBOUNDED"):
        complete(SolverCompletion(H, h, NonNegative()), r)
    point = complete(SolverCompletion(H, h, NonNegative()), r, on_failure="nan")
    assert point.bound[0].item() == pytest.approx(0, abs=1e-12) and math.isnan(point.bound[1].item())
    assert bool(torch.isfinite(torch.autograd.grad(point.bound[0], r)[0]).all())


def test_bounded_and_strictly_feasible_blocks_complete_every_cost():
    """The claim: then a completion exists whatever y, and with it r. An unbounded block has none for some r."""
    G = torch.cat([rand(24, 5, 3), torch.eye(3), -torch.eye(3)]).double()
    h = -torch.ones(11, dtype=torch.float64)  # 0 is strictly feasible, |x_i| <= 1
    r = 10 * rand(25, 40, 3)
    m = r.new_zeros(0)
    for cone in (NonNegative(), Product([(SecondOrder(), 5), (NonNegative(), 6)])):
        inner = h.clone()
        if isinstance(cone, Product):
            inner[1:5] = 0  # (1, 0, 0, 0, 0) lies in the interior
        found = dual_bound_ex(m, r.new_zeros(0, 3), m, r, SolverCompletion(G, inner, cone))
        point = found.value
        assert bool(found.converged.all())
        torch.testing.assert_close(point.z @ G, r, rtol=1e-8, atol=1e-8)
        dual = cone.dual()
        assert bool((dual.violation(point.z) < 1e-8).all())
        torch.testing.assert_close(point.z @ inner, point.bound, rtol=1e-8, atol=1e-8)
    half = dual_bound_ex(m, r.new_zeros(0, 3), m, r, SolverCompletion(G[5:8], h[5:8], NonNegative()))
    assert torch.equal(half.converged, (r > 0).all(-1))


# ------------------------------------------------------------------------------------------------------ data and input


def test_select_and_to_move_tensors_alone():
    completion = BallCompletion(torch.rand(5), 3.0, CENTER)
    some = completion.select(torch.tensor([0, 3]))
    assert torch.equal(some.radius, completion.radius[[0, 3]])
    assert some.center is CENTER and some.p == 3.0
    assert completion.to(torch.float64).radius.dtype == torch.float64
    assert completion.radius.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoxCompletion(1.0, 0.0), "lower: expected at most upper, 0, got 1"),
        (lambda: BoxCompletion(math.nan, 0.0), "lower: expected at most upper"),
        (lambda: BoxCompletion("0", 1.0), "lower: expected a number or a tensor, got str"),
        (lambda: BallCompletion(-1.0), "radius: expected at least 0, got -1"),
        (lambda: BallCompletion(1.0, 0.5), "p: expected a number of at least 1, got 0.5"),
        (lambda: EllipsoidCompletion(torch.zeros(3)), "D: expected at least 2 dimensions"),
        (lambda: QuadraticCompletion(2.0), "Q: expected a tensor, got float"),
        (lambda: BoxQuadraticCompletion(-torch.eye(2), 0.0, 1.0), "Q: expected a positive semidefinite matrix"),
        (lambda: SimplexCompletion(-1.0), "total: expected at least 0, got -1"),
        (lambda: PolytopeCompletion(torch.zeros(0, 3)), "vertices: expected at least 1"),
        (lambda: SpectraplexCompletion(math.nan), "trace: expected at least 0"),
        (lambda: HyperbolicCompletion(-1.0), "product: expected at least 0"),
        (lambda: SolverCompletion(torch.eye(2), torch.zeros(3), NonNegative()), "h: expected 2 entries"),
        (lambda: SolverCompletion(torch.eye(2), torch.zeros(2), "R+"), "cone: expected a Cone, got str"),
        (
            lambda: SolverCompletion(torch.eye(2), torch.zeros(2), Product([(NonNegative(), 3)])),
            "cone: expected 2 rows",
        ),
    ],
)
def test_bad_data_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (BoxCompletion(torch.zeros(2), 1.0), "lower: expected a number or 3 entries as x has"),
        (BallCompletion(1.0, center=torch.zeros(2)), "center: expected a number or 3 entries"),
        (EllipsoidCompletion(torch.eye(2)), r"D: expected shape \(..., 3, 3\) as of c"),
        (QuadraticCompletion(torch.eye(2)), r"Q: expected shape \(..., 3, 3\) as of c"),
        (PolytopeCompletion(torch.zeros(4, 2)), "vertices: expected points with 3 entries"),
        (HyperbolicCompletion(), "c: expected an even number of variables"),
        (SolverCompletion(torch.eye(2), torch.zeros(2), NonNegative()), "H: expected 3 columns"),
        (BoxCompletion(torch.zeros(3).double(), 1.0), "lower: expected dtype torch.float32 as of y"),
        (BallCompletion(torch.ones(5)), "radius: expected batch dimensions that broadcast"),
    ],
)
def test_data_that_do_not_fit_are_refused(completion, message):
    with pytest.raises(ValueError, match=message):
        complete(completion, torch.zeros(2, 3))


def test_blocks_are_what_they_say():
    """A wrong set would be compared with a wrong formula."""
    x = numbers([0.0, 1.0, 0.5, 0.3])
    assert BLOCKS[0].distance(x) == 0
    assert BLOCKS[0].distance(x + 1) == pytest.approx(0.5)
