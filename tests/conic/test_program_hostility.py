"""Programs where careless code goes wrong: at the apex of a cone, in any unit, beside a neighbour that fails.

Oracles: minimisers that are zero by construction; the same program in other units; a batch with harmless elements in
the place of those that fail, to the bit.
"""

import math

import pytest
import torch
from torch import Tensor

from difflayers import Status
from difflayers.conic import (
    BallCompletion,
    BoxCompletion,
    Exponential,
    NonNegative,
    PolytopeCompletion,
    Product,
    SecondOrder,
    SimplexCompletion,
    SolverCompletion,
    Zero,
    conic_program,
    conic_program_ex,
    dual_bound,
    quadratic_program_ex,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
SCALES = [1e-9, 1e-6, 1e6, 1e9]


def draws(seed: int):
    """A source of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------ the apex


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_apex_of_a_cone_is_a_solution(seed, curved):
    """``b = 0`` and multipliers inside the dual cone: the minimiser is zero, and so is every term of feasibility."""
    draw = draws(seed)
    n, cones = 5, [(NonNegative(), 8), (SecondOrder(), 4)]
    A, root = draw(12, n), draw(n, n)
    y = torch.cat([draw(8).abs() + 0.1, torch.tensor([3.0], dtype=torch.float64), draw(3) / 3])
    P, q = (root @ root.T if curved else torch.zeros_like(root)), -A.T @ y
    found = conic_program_ex(q, A, torch.zeros(12, dtype=torch.float64), cones, P)
    assert found.status == Status.CONVERGED
    assert float(found.value.x.abs().max()) <= 1e-9
    rows = A[:8]
    sparse = quadratic_program_ex(P.to_sparse_csr(), -rows.T @ y[:8], rows.to_sparse_csr(), 0 * y[:8])
    assert sparse.status == Status.CONVERGED
    assert float(sparse.value.x.abs().max()) <= 1e-9


def test_a_point_inside_the_polar_cone_is_projected_on_zero():
    point = torch.tensor([-5.0, 1.0, 1.0])
    x = conic_program(-point, -torch.eye(3), torch.zeros(3), [(SecondOrder(), 3)], torch.eye(3))
    assert x.abs().max() <= 1e-12


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("curvature", [1.0, 0.0])
def test_a_sparse_program_may_have_any_units(scale, curvature):
    draw = draws(2)
    n, inside = 6, draw(6)
    root, G, A, q = draw(n, n), torch.cat([draw(8, n), torch.eye(n), -torch.eye(n)]), draw(2, n), draw(3, n)
    P = curvature * (root @ root.T + torch.eye(n))
    h, b = G @ inside + 0.3, A @ inside
    csr = lambda M: M.to_sparse_csr()  # noqa: E731

    def solve(P, q, G, h, A, b):
        found = quadratic_program_ex(csr(P), q, csr(G), h, csr(A), b)
        assert found.converged.all()
        return found.value

    x, y, z, s = solve(P, q, G, h, A, b)
    got = solve(scale * P, scale * q, G, h, A, b)  # of the objective
    for one, expected in zip(got, (x, scale * y, scale * z, s), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(solve(P, q, scale * G, scale * h, scale * A, scale * b).x, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solve(P / scale, q, G, scale * h, A, scale * b).x / scale, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_a_solvers_completion_may_have_any_units(scale):
    draw = draws(3)
    n, inside = 4, draw(4)
    H = torch.cat([draw(3, n), torch.eye(n), -torch.eye(n)])
    h, r, m = H @ inside - 0.5, draw(5, n), draw(0)

    def complete(r: Tensor, H: Tensor, h: Tensor):
        return dual_bound(m, draw(0, n), m, r, SolverCompletion(H, h, NonNegative()))

    expected = complete(r, H, h)
    costs, units, rows = complete(scale * r, H, h), complete(r, H, scale * h), complete(r, scale * H, scale * h)
    for point, bound, x in ((costs, scale, 1.0), (units, scale, scale), (rows, 1.0, 1.0)):
        torch.testing.assert_close(point.bound / bound, expected.bound, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(point.x / x, expected.x, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- neighbours


def batch_of(size: int, n: int, cones: list, seed: int) -> list[Tensor]:
    """``q, A, b, P`` with A and P shared; row 1 is zero, which a negative bound makes infeasible."""
    draw = draws(seed)
    A, root, x = draw(sum(dim for _, dim in cones), n), draw(n, n), draw(size, n)
    A[1] = 0
    v = draw(size, A.shape[0])
    s = Product(cones).project(v)
    y, P = s - v, root @ root.T / n
    y[:, 1] = 0
    b = times(A, x) + s
    b[:, 1] = 1
    return [-times(P, x) - times(A.T, y), A, b, P]


def spoil(kind: str, b: Tensor) -> Tensor:
    b = b.clone()
    if kind == "infeasible":
        b[0, 1] = -1
    elif kind == "large and infeasible":  # other units than those of its neighbours
        b[0] *= 1e9
        b[0, 1] = -1e9
    else:
        b[0, 2] = math.nan
    return b


@pytest.mark.parametrize("kind", ["infeasible", "large and infeasible", "NaN"])
@pytest.mark.parametrize(("size", "n"), [(2, 4), (3, 12), (5, 30), (17, 12)])
def test_neighbours_of_a_failing_element_keep_their_bits(kind, size, n):
    cones = [(Zero(), 1), (NonNegative(), n), (SecondOrder(), 4), (Exponential(), 3)]
    q, A, b, P = batch_of(size, n, cones, n)
    weights = draws(4)(size - 1, n)

    def run(b: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, A, b, P)]
        x = conic_program(*leaves[:3], cones, leaves[3], on_failure="nan")[1:]
        return [x.detach(), *torch.autograd.grad((x * weights).sum(), leaves)]

    for got, expected in zip(run(spoil(kind, b)), run(b), strict=True):
        assert torch.equal(got, expected)


def test_a_batch_of_equal_matrices_is_no_shared_matrix():
    """An element whose matrix differs from all others changes nothing for these."""
    cones = [(Zero(), 1), (NonNegative(), 6), (SecondOrder(), 3)]
    q, A, b, P = batch_of(9, 6, cones, 5)
    many, other = P.expand(9, 6, 6).clone(), P.expand(9, 6, 6).clone()
    other[0] = 2 * torch.eye(6)
    assert torch.equal(conic_program(q, A, b, cones, many)[1:], conic_program(q, A, b, cones, other)[1:])


@pytest.mark.parametrize(
    "completion",
    [
        BoxCompletion(-1.0, 2.0),
        BallCompletion(1.0),
        BallCompletion(1.0, 3.0),
        SimplexCompletion(),
        PolytopeCompletion(draws(6)(5, 4)),
    ],
    ids=lambda c: type(c).__name__,
)
def test_nan_multipliers_leave_the_gradient_of_shared_rows_alone(completion):
    draw = draws(7)
    y, A, b, c = draw(3, 2).abs(), draw(2, 4).requires_grad_(), draw(2), draw(3, 4)
    gradients = []
    for bad in (0.5, math.nan):
        y[1, 0] = bad
        bound = dual_bound(y, A, b, c, completion, on_failure="nan").bound
        assert bool(bound[1].isnan()) == math.isnan(bad)
        gradients += torch.autograd.grad(bound[[0, 2]].sum(), A)
    assert torch.equal(*gradients)
