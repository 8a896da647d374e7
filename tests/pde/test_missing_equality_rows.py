"""Elements of a batch with fewer exact rows than others: rows of zeros stand for none.

Oracle: the same element alone, with its zero rows left out (and without `equality` where none
is left), whose values and derivatives are tested elsewhere against dense systems.
"""

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from difflayers import SolveError, Status
from difflayers.pde import residual_least_squares, residual_least_squares_ex, residual_least_squares_value

F64 = torch.float64
N, K, P = 12, 6, 3
KEPT = [[0, 1, 2], [0, 2], [1], []]  # rows of each element
E = len(KEPT)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def heat(u: Tensor, p: Tensor) -> Tensor:
    return u[..., 1] - 0.3 * u[..., 2] - p


def burgers(u: Tensor, p: Tensor) -> Tensor:
    return u[..., 1] + u[..., 0] * u[..., 2] - p


RESIDUALS = pytest.mark.parametrize("F", [heat, burgers])


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, f, C, d = normal(0, E, N, 3, K), normal(1, E, N), normal(2, E, P, K), 0.3 * normal(3, E, P)
    for e, rows in enumerate(KEPT):
        gone = [i for i in range(P) if i not in rows]
        C[e, gone], d[e, gone] = 0, 0
    return B, f, C, d


def alone(F, e: int, B: Tensor, f: Tensor, C: Tensor, d: Tensor, solve=residual_least_squares_ex, ridge=0.2):
    rows = KEPT[e]
    return solve(B[e], F, f[e], ridge=ridge, equality=(C[e, rows], d[e, rows]) if rows else None)


@RESIDUALS
def test_values_multipliers_and_reports_are_those_without_the_rows(F):
    B, f, C, d = data()
    found = residual_least_squares_ex(B, F, f, ridge=0.2, equality=(C, d))
    assert found.converged.all()
    for e, rows in enumerate(KEPT):
        expected = alone(F, e, B, f, C, d)
        assert (found.value[e] - expected.value).abs().max() < 1e-10
        torch.testing.assert_close(found.multipliers[e, rows], expected.multipliers, rtol=0, atol=1e-10)
        assert (found.multipliers[e, [i for i in range(P) if i not in rows]] == 0).all()
        assert found.steps[e] == expected.steps and found.linear[e] == expected.linear


@RESIDUALS
def test_cotangents_are_those_without_the_rows_and_zero_for_the_rows(F):
    B, f, C, d = data()
    g, h = normal(4, E, K), normal(5, E, P)

    def weighed(found, e, rows):
        return (found.value * g[e]).sum() + (found.multipliers * h[e, rows]).sum()

    leaves = [t.clone().requires_grad_() for t in (B, f, C, d)]
    found = residual_least_squares_ex(leaves[0], F, leaves[1], ridge=0.2, equality=(leaves[2], leaves[3]))
    got = torch.autograd.grad((found.value * g).sum() + (found.multipliers * h).sum(), leaves)
    for e, rows in enumerate(KEPT):
        own = [t.clone().requires_grad_() for t in (B, f, C, d)]
        expected = torch.autograd.grad(weighed(alone(F, e, *own), e, rows), own, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[e], torch.zeros_like(a[e]) if b is None else b[e], rtol=0, atol=1e-10)


@RESIDUALS
def test_forward_and_second_derivatives_are_those_without_the_rows(F):
    B, f, C, d = data()
    moves = [normal(10 + i, *t.shape) for i, t in enumerate((B, f, C, d))]

    def together(a: Tensor) -> Tensor:
        moved = [t + a[0] * m + a[1] * m.roll(1, 0) for t, m in zip((B, f, C, d), moves, strict=True)]
        # a row of zeros stays one: the move of its entries is no move
        missing = (C == 0).all(-1)
        moved[2], moved[3] = torch.where(missing[..., None], 0, moved[2]), torch.where(missing, 0, moved[3])
        found = residual_least_squares_ex(moved[0], F, moved[1], ridge=0.2, equality=(moved[2], moved[3]))
        return torch.cat([found.value, found.multipliers], -1).square().sum(-1)

    def apart(a: Tensor) -> Tensor:
        moved = [t + a[0] * m + a[1] * m.roll(1, 0) for t, m in zip((B, f, C, d), moves, strict=True)]
        found = [alone(F, e, *moved) for e in range(E)]
        return torch.stack([x.value.square().sum() + x.multipliers.square().sum() for x in found])

    zero = torch.zeros(2, dtype=F64)
    for derivative in (jacfwd, jacrev, hessian):
        got, expected = derivative(together)(zero), derivative(apart)(zero)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)


@RESIDUALS
def test_entries_of_a_missing_row_have_the_derivative_zero(F):
    B, f, C, d = data()
    missing = (C == 0).all(-1)
    solve = lambda C, d: residual_least_squares(B, F, f, ridge=0.2, equality=(C, d))  # noqa: E731
    tangents = torch.where(missing[..., None], normal(20, *C.shape), 0), torch.where(missing, normal(21, *d.shape), 0)
    assert (jvp(solve, (C, d), tangents)[1] == 0).all()

    def pull(C: Tensor, d: Tensor) -> Tensor:
        leaves = C.clone().requires_grad_(), d.clone().requires_grad_()
        grads = torch.autograd.grad(solve(*leaves).square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return [*grads, *again]

    for g in pull(C, d):
        assert (g[missing] == 0).all() and (g[~missing] != 0).any()


@RESIDUALS
def test_the_optimal_value_and_vmap_agree(F):
    B, f, C, d = data()
    value = residual_least_squares_value(B, F, f, ridge=0.2, equality=(C, d))
    expected = torch.stack([alone(F, e, B, f, C, d, residual_least_squares_value) for e in range(E)])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    solve = lambda B, f, C, d: residual_least_squares(B, F, f, ridge=0.2, equality=(C, d))  # noqa: E731
    torch.testing.assert_close(vmap(solve)(B, f, C, d), solve(B, f, C, d), rtol=0, atol=1e-12)
    # one C for a batch of everything else
    shared = residual_least_squares(B, F, f, ridge=0.2, equality=(C[1], d[1]))
    short = residual_least_squares(B, F, f, ridge=0.2, equality=(C[1, [0, 2]], d[1, [0, 2]]))
    torch.testing.assert_close(shared, short, rtol=0, atol=1e-10)


@RESIDUALS
def test_a_row_of_zeros_with_another_right_side_is_a_contradiction_of_its_element(F):
    B, f, C, d = data()
    good = residual_least_squares(B, F, f, ridge=0.2, equality=(C, d))
    d[1, 1] = 1e-3
    found = residual_least_squares_ex(B, F, f, ridge=0.2, equality=(C, d))
    assert (found.status == Status.SINGULAR).tolist() == [False, True, False, False]
    with pytest.raises(SolveError, match="elements 1"):
        residual_least_squares(B, F, f, ridge=0.2, equality=(C, d))
    leaf = d.clone().requires_grad_()
    w = residual_least_squares(B, F, f, ridge=0.2, equality=(C, leaf), on_failure="nan")
    assert torch.isnan(w[1]).all() and torch.equal(w[[0, 2, 3]], good[[0, 2, 3]])
    assert torch.isfinite(torch.autograd.grad(w[[0, 2, 3]].sum(), leaf)[0][[0, 2, 3]]).all()


def test_dependent_rows_and_nan_are_still_reported():
    B, f, C, d = data()
    C[0, 2] = C[0, 1]
    C[1, 1, 0] = torch.nan
    found = residual_least_squares_ex(B, burgers, f, ridge=0.2, equality=(C, d))
    assert found.failed.tolist() == [True, True, False, False]
