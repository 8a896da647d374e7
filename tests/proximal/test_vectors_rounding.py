"""Where rounding decides: ties, offsets, infinite and vanishing operands, and formulas that change into each other."""

import pytest
import torch
from torch.func import hessian, jacrev

from difflayers.proximal import (
    conjugate_prox,
    project_affine,
    project_affine_ex,
    project_box,
    project_capped_simplex,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_simplex,
    prox_group_l2,
    prox_hinge,
    prox_l0,
    prox_l1,
    prox_l2,
    prox_linf,
    prox_logistic,
    prox_nuclear,
    prox_poisson,
    prox_quadratic,
    prox_quadratic_ex,
    prox_tv1d,
    soft_topk,
)
from difflayers.proximal._shared_inverse import shared_inverse

F64 = torch.float64


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ------------------------------------------------------------------------------------------------ one threshold for all


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: project_simplex(x, 0.6),
        lambda x: project_l1_ball(x, 0.6),
        lambda x: x - prox_linf(x, 0.6),
        lambda x: project_capped_simplex(x, 0.6, upper=0.4),
        lambda x: soft_topk(x, 2),
    ],
)
def test_derivatives_of_quantised_data_are_projections(f, dtype):
    """Where an entry just reaches zero, rounding must not put it on different sides in sum and count."""
    torch.manual_seed(0)
    for x in torch.randint(-9, 10, (100, 6)).to(dtype) / 10:
        J = jacrev(f)(x)
        torch.testing.assert_close(J, J.mT, atol=1e-5, rtol=0)
        torch.testing.assert_close(J @ J, J, atol=1e-5, rtol=0)


def test_threshold_of_quantised_data_is_found_in_a_few_steps(monkeypatch):
    torch.manual_seed(0)
    steps, relu = [], torch.relu
    monkeypatch.setattr(torch, "relu", lambda x: steps.append(1) or relu(x))
    for k in range(1, 9):
        x = torch.randint(-9, 1, (20, 2000)).float() / 10
        radius = (x.double() + k / 10).clamp_min(0).sum(-1).float()
        z = project_simplex(x, radius)
        torch.testing.assert_close(z.sum(-1), radius, atol=1e-3, rtol=1e-5)
    assert len(steps) < 8 * 20


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (F64, 1e9), (F64, 1e12)])
def test_capped_simplex_beside_a_large_offset(dtype, offset):
    torch.manual_seed(0)
    y = torch.randn(50, dtype=dtype) + offset
    z, expected = (project_capped_simplex(x, 5.0) for x in (y, y - offset))
    torch.testing.assert_close(z, expected, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------- far from one


@pytest.mark.parametrize("inf", [float("inf"), torch.tensor(float("inf"), dtype=F64)])
def test_infinite_steps_and_radii(inf):
    x = vec(3.0, -2.0, 0.5)
    torch.testing.assert_close(project_l1_ball(x, inf), x)
    torch.testing.assert_close(prox_linf(x, inf), torch.zeros_like(x))
    torch.testing.assert_close(prox_l0(x, inf), torch.zeros_like(x))


@pytest.mark.parametrize("scale", [1e-24, 1e-21, 1e18, 1e30])
def test_norms_whose_square_leaves_the_range(scale):
    x = torch.tensor([3.0, 4.0]) * scale
    small, groups = torch.ones(2), torch.tensor([0, 0])
    torch.testing.assert_close(project_l2_ball(x, 4 * scale) / scale, torch.tensor([2.4, 3.2]))
    for z in (prox_l2(x, scale), prox_group_l2(x, scale, 2), prox_group_l2(x, scale, groups)):
        torch.testing.assert_close(z / scale, torch.tensor([2.4, 3.2]))
    slope = jacrev(lambda x: prox_l2(x, scale))(x) @ small
    torch.testing.assert_close(slope, jacrev(lambda x: prox_l2(x, 1.0))(torch.tensor([3.0, 4.0])) @ small)


def test_nothing_to_solve():
    assert prox_quadratic(torch.zeros(2, 0), 1.0, torch.zeros(0, 0)).shape == (2, 0)
    assert project_affine(torch.zeros(2, 0), torch.zeros(1, 0), torch.zeros(1)).shape == (2, 0)


# ---------------------------------------------------------------------------------------- steps of a prox by identity


def test_conjugate_step_per_element_counts_dim_from_either_end():
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 3, dtype=F64), vec(0.3, 1.0, 2.0)
    expected = torch.stack([conjugate_prox(prox_tv1d, x[..., i], float(t[i]), dim=-1) for i in range(3)], -1)
    for dim in (1, -2):
        torch.testing.assert_close(conjugate_prox(prox_tv1d, x, t, dim=dim), expected)
        torch.testing.assert_close(conjugate_prox(lambda x, t, dim: prox_tv1d(x, t, dim=dim), x, t, dim=dim), expected)


def test_conjugate_refuses_a_step_that_may_belong_to_rows_or_to_matrices():
    x, t = torch.ones(3, 3, 2, dtype=F64), vec(0.3, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"t: expected a number, or 2 dimensions .* got shape \(3,\)"):
        conjugate_prox(lambda x, t: prox_nuclear(x, t), x, t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: project_box(x, [0, 0, 0], 1.0), r"lower: expected a number or a tensor, got list"),
        (lambda x: project_halfspace(x, [1, 0, 0], 1.0), r"normal: expected a number or a tensor, got list"),
        (lambda x: prox_l1(x, None), r"t: expected a number or a tensor, got None"),
        (lambda x: prox_hinge(x, 0.1, None), r"labels: expected a number or a tensor, got None"),
        (lambda x: prox_l1(x, 1.0, dim=None), r"dim: expected a dimension of x, .* got None"),
    ],
)
def test_operands_of_a_wrong_kind(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3))


# -------------------------------------------------------------------------------- explicit inverse and solver agree


@pytest.mark.parametrize(
    ("f", "other"),
    [
        (
            lambda x, A: project_affine(x, A[:2], A[2, :2]),
            lambda x, A: project_affine_ex(x, A[:2], A[2, :2]).value,
        ),
        (lambda x, A: prox_quadratic(x, 0.2, A), lambda x, A: prox_quadratic_ex(x, 0.2, A).value),
    ],
)
def test_shared_inverse_agrees_with_the_solver(f, other):
    torch.manual_seed(0)
    x, A = torch.randn(3, 4, dtype=F64), torch.eye(4, dtype=F64) + torch.randn(4, 4, dtype=F64) / 10
    assert shared_inverse(A[:2] @ A[:2].mT) is not None
    torch.testing.assert_close(f(x, A), other(x, A))
    for derivative in (jacrev, torch.func.jacfwd):
        for i in (0, 1):
            torch.testing.assert_close(derivative(f, i)(x, A), derivative(other, i)(x, A))
    second = [hessian(lambda x, A, g=g: g(x, A).sin().sum(), (0, 1))(x, A) for g in (f, other)]
    torch.testing.assert_close(*second)


def test_shared_inverse_leaves_what_is_hard_to_the_solver():
    assert shared_inverse(torch.diag(torch.tensor([1.0, 1.0, 1e-3]))) is None
    assert shared_inverse(torch.diag(torch.tensor([1.0, 1.0, -1.0]))) is None
    assert shared_inverse(torch.zeros(3, 3)) is None
    assert shared_inverse(torch.eye(3) * 1e-42) is None
    assert torch.vmap(lambda s: torch.tensor(shared_inverse(torch.eye(3) * s) is None))(torch.ones(2)).all()


# ---------------------------------------------------------------------------------------------- where formulas change


def test_a_radius_of_zero_grows_at_the_top():
    x, zero = vec(1.3, -0.7, 0.2, -2.0), torch.zeros((), dtype=F64)
    for f, expected in [
        (project_simplex, vec(1, 0, 0, 0)),
        (project_l1_ball, vec(0, 0, 0, -1)),
        (prox_linf, vec(0, 0, 0, 1)),
    ]:
        for derivative in (jacrev, torch.func.jacfwd):
            torch.testing.assert_close(derivative(lambda t, f=f: f(x, t))(zero), expected)
        t = zero.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(x, t) @ expected, t)
        torch.testing.assert_close(slope, torch.ones_like(slope))


def test_logistic_with_margins_far_on_the_wrong_side():
    x, labels = torch.tensor([-0.5, 1.0]), torch.tensor([30.0, -1.0])
    torch.testing.assert_close(conjugate_prox(prox_logistic, x, 1e-9, labels=labels), torch.tensor([-0.5, 0.5]))
    for dtype in (torch.float32, F64):
        z = prox_logistic(torch.tensor([-1e3], dtype=dtype), 1e4, torch.tensor([1e4], dtype=dtype))
        torch.testing.assert_close(z, torch.tensor([1.1512915e-3], dtype=dtype), rtol=1e-6, atol=0)
    z = prox_logistic(vec(-1e13), 1e14, 1e4)
    torch.testing.assert_close(1e18 * torch.sigmoid(-1e4 * z), 1e13 + z, rtol=1e-10, atol=0)


def test_conjugate_of_poisson_keeps_small_numbers():
    x = torch.tensor([-1e-9, 1e-9, 2.0])
    torch.testing.assert_close(conjugate_prox(prox_poisson, x, 1e-9, counts=0.0), torch.tensor([-1e-9, 1e-9, 1.0]))


def test_masked_entries_that_leave_too_little_room():
    x = vec(1.0, -torch.inf, -torch.inf)
    torch.testing.assert_close(soft_topk(x, 1), vec(1, 0, 0))
    with pytest.raises(ValueError, match=r"k: expected at most 1, .* got 2"):
        soft_topk(x, 2)
    with pytest.raises(ValueError, match=r"total: expected at most 0.5, .* got 1"):
        project_capped_simplex(x, 1.0, upper=0.5)


def test_a_projection_is_no_prox_with_a_step():
    """Its second argument would be taken for the step."""
    with pytest.raises(ValueError, match=r"prox: expected a function prox.x, t., got project_simplex"):
        conjugate_prox(project_simplex, torch.ones(3), 1.0)
