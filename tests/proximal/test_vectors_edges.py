"""Kinks, zero vectors, extreme scales, steps of zero, dimensions, bad input."""

import pytest
import torch
from torch.func import hessian, jacrev

from difflayers import proximal
from difflayers.proximal import (
    conjugate_prox,
    project_affine,
    project_box,
    project_capped_simplex,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_simplex,
    prox_elastic_net,
    prox_entropy,
    prox_group_l2,
    prox_hinge,
    prox_huber,
    prox_l1,
    prox_l2,
    prox_linf,
    prox_log,
    prox_logistic,
    prox_mcp,
    prox_poisson,
    prox_quadratic,
    prox_scad,
    soft_topk,
)

F64 = torch.float64


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ---------------------------------------------------------------------------------------------------------- zero, kinks


@pytest.mark.parametrize(
    "f",
    [
        lambda x: prox_l2(x, 0.5),
        lambda x: prox_l2(x, 0.0),
        lambda x: prox_group_l2(x, 0.5, 2),
        lambda x: prox_group_l2(x, 0.5, torch.tensor([0, 1, 1, 0], device=x.device)),
        lambda x: project_l2_ball(x, 0.5),
        lambda x: project_l2_ball(x, 0.0),
        lambda x: project_l2_ball(x, 0.5, center=x.detach()),
        lambda x: conjugate_prox(prox_l2, x, 2.0),
    ],
)
def test_no_nan_at_the_zero_vector(f):
    x = torch.zeros(4, dtype=F64)
    assert torch.isfinite(jacrev(f)(x)).all()
    assert torch.isfinite(hessian(f)(x)).all()
    # and half a group of zeros beside one that is not
    assert torch.isfinite(hessian(f)(vec(0, 0, 3, 4))).all()


def test_zero_vector_takes_the_stated_branch():
    x, eye = torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)
    torch.testing.assert_close(jacrev(lambda x: prox_l2(x, 0.5))(x), 0 * eye)
    torch.testing.assert_close(jacrev(lambda x: project_l2_ball(x, 0.5))(x), eye)
    torch.testing.assert_close(jacrev(lambda x: project_l1_ball(x, 0.5))(x), eye)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
def test_numbers_and_tensors_take_the_same_branch_at_kinks(as_tensor):
    p = (lambda v: vec(v)[0]) if as_tensor else float
    x = vec(1, -1, 0, 2, -0.5)
    cases = [
        (lambda x: prox_l1(x, p(1)), (0, 0, 0, 1, 0)),
        (lambda x: proximal.prox_nonnegative_l1(x, p(1)), (0, 0, 0, 1, 0)),
        (lambda x: prox_elastic_net(x, p(1), l1=p(1), l2=p(1)), (0, 0, 0, 0.5, 0)),
        (lambda x: prox_huber(x, p(1), delta=p(1)), (0.5, 0.5, 0.5, 0.5, 0.5)),
        (lambda x: prox_hinge(x, p(1), p(1)), (0, 1, 0, 1, 1)),
        (lambda x: proximal.prox_l0(x, p(0.5)), (0, 0, 0, 1, 0)),
        (lambda x: prox_scad(x, p(0.5), lam=p(1), a=p(2)), (1, 1, 0, 2, 0)),
        (lambda x: prox_mcp(x, p(1), lam=p(1), gamma=p(2)), (0, 0, 0, 2, 0)),
        (lambda x: project_box(x, p(-1), p(1)), (0, 0, 1, 0, 1)),
        (lambda x: proximal.project_linf_ball(x, p(1)), (0, 0, 1, 0, 1)),
        (lambda x: conjugate_prox(prox_l1, x, p(3)), (0, 0, 1, 0, 1)),
    ]
    for i, (f, expected) in enumerate(cases):
        torch.testing.assert_close(jacrev(f)(x), torch.diag(vec(*expected)), msg=f"case {i}")


def test_bounds_of_a_box_and_their_derivatives_sum_to_one():
    x = vec(0, 1, 0.5, -1, 2)
    parts = jacrev(project_box, (0, 1, 2))(x, torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64))
    torch.testing.assert_close(sum(parts), torch.eye(5, dtype=F64))


def test_poisson_on_both_sides_of_its_kink():
    J = jacrev(lambda x: prox_poisson(x, 0.5, 0.0))(vec(0.5, 0.7, 0.2))
    torch.testing.assert_close(J, torch.diag(vec(0, 1, 0)))
    slope = jacrev(lambda x: prox_poisson(x, 0.5, 2.0))(vec(0.5))  # no kink with counts: half at x = t
    torch.testing.assert_close(slope, vec(0.5)[None])


# --------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize(
    ("f", "degrees"),
    [
        (lambda x, t: prox_l1(x, t), (1, 1)),
        (lambda x, t: prox_l2(x, t), (1, 1)),
        (lambda x, t: prox_linf(x, t), (1, 1)),
        (lambda x, t: prox_group_l2(x, t, 2), (1, 1)),
        (lambda x, t: prox_huber(x, t, delta=0.7 * t), (1, 1)),
        (lambda x, t: prox_log(x, t * t, eps=0.3 * t), (1, 1)),
        (lambda x, t: prox_entropy(x, t) * 0 + prox_poisson(x, t, t), (1, 1)),
        (lambda x, t: project_simplex(x, t), (1, 1)),
        (lambda x, t: project_l1_ball(x, t), (1, 1)),
        (lambda x, t: project_l2_ball(x, t, center=0.2 * t), (1, 1)),
        (lambda x, t: project_capped_simplex(x, t, upper=0.4 * t), (1, 1)),
        (lambda x, t: project_halfspace(x, 3.0 * t, t * t), (1, 1)),
        (lambda x, t: soft_topk(x, 2.5, temperature=t) * t, (1, 1)),
    ],
)
def test_float32_scales_with_its_input(f, degrees, scale):
    """Everything times a billion, or a billionth: the result scales along, and the derivatives stay."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    x64 = x.double()
    expected = f(x64, torch.tensor(0.8, dtype=F64))
    found = f(x * scale, torch.tensor(0.8 * scale)) / scale
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
    slopes = jacrev(f, (0, 1))(x64, torch.tensor(0.8, dtype=F64))
    at_scale = jacrev(f, (0, 1))(x * scale, torch.tensor(0.8 * scale))
    for a, b in zip(at_scale, slopes, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_entropy_where_exponentials_overflow_and_vanish():
    x = torch.tensor([1e9, 1e3, 0.0, -1e3, -1e9], dtype=F64)
    for t in (1e-9, 1e-3):
        y, step = x.clone().requires_grad_(), torch.tensor(t, dtype=F64, requires_grad=True)
        z = prox_entropy(y, step)
        torch.testing.assert_close(z[:2], x[:2] - t * (z[:2].log() + 1), rtol=1e-15, atol=0)
        slopes = torch.autograd.grad(z.sum(), (y, step), create_graph=True)
        second = torch.autograd.grad(sum(s.sum() for s in slopes), (y, step))
        assert all(torch.isfinite(s).all() for s in (z, *slopes, *second))
    z = prox_entropy(torch.tensor([-50.0, -80.0]), 1.0)  # float32, down to its smallest numbers
    torch.testing.assert_close(z.log(), torch.tensor([-51.0, -81.0]), rtol=1e-6, atol=0)


def test_third_derivative_of_a_root():
    """``z + t log z + t = x``: by differentiating ``z' = z / (z + t)`` by hand."""
    third = jacrev(jacrev(jacrev(lambda x: prox_entropy(x[None], 0.8)[0])))(torch.tensor(0.7, dtype=F64))
    z, t = prox_entropy(vec(0.7), 0.8)[0], 0.8
    first = z / (z + t)
    expected = t * first / (z + t) ** 3 - 3 * z * t * first / (z + t) ** 4
    torch.testing.assert_close(third, expected)


def test_logistic_with_large_steps_and_small_labels():
    for t, x, y in ((1e9, -1e9, 1.0), (1e9, 5.0, -1.0), (1e-9, 1e9, 1.0), (1e18, 1.0, 1e-9), (7.0, 0.0, 30.0)):
        z = prox_logistic(vec(x), t, y)
        left = z - x - t * y * torch.sigmoid(-y * z)
        conditioning = 1 + t * y * y * torch.sigmoid(y * z) * torch.sigmoid(-y * z)
        assert float((left / conditioning).abs()) <= 1e-14 * max(1, float(z.abs())), (t, x, y)


# ------------------------------------------------------------------------------------------------ arguments, dimensions


def test_dimension_and_broadcasting_of_entries():
    x, w = torch.randn(3, 5, 4, dtype=F64), torch.rand(5, dtype=F64)
    t = torch.rand(3, 4, dtype=F64)
    moved = x.movedim(1, -1)
    f = prox_l1(moved, t, weights=w)
    torch.testing.assert_close(prox_l1(x, t, weights=w[:, None], dim=1), f.movedim(-1, 1))
    g = prox_group_l2(moved, t, torch.tensor([0, 1, 0, 1, 1]), weights=torch.tensor([0.3, 0.9], dtype=F64))
    found = prox_group_l2(x, t, torch.tensor([0, 1, 0, 1, 1]), weights=torch.tensor([0.3, 0.9], dtype=F64), dim=1)
    torch.testing.assert_close(found, g.movedim(-1, 1))
    Q = torch.eye(5, dtype=F64) * torch.arange(1, 6)
    torch.testing.assert_close(prox_quadratic(x, t, Q, w, dim=1).movedim(1, -1), prox_quadratic(moved, t, Q, w))
    A, b = torch.randn(2, 5, dtype=F64), torch.randn(2, dtype=F64)
    torch.testing.assert_close(project_affine(x, A, b, dim=-2).movedim(1, -1), project_affine(moved, A, b))


def test_groups_by_size_and_by_label_agree():
    x = torch.randn(4, 6, dtype=F64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(prox_group_l2(x, 0.7, 2), prox_group_l2(x, 0.7, labels))
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    torch.testing.assert_close(prox_group_l2(x[:, order], 0.7, labels[order]), prox_group_l2(x, 0.7, 2)[:, order])
    torch.testing.assert_close(prox_group_l2(x, 0.7, 6), prox_l2(x, 0.7))
    torch.testing.assert_close(prox_group_l2(x, 0.7, 1), prox_l1(x, 0.7))


def test_one_entry_and_no_elements():
    x = torch.randn(3, 1, dtype=F64)
    torch.testing.assert_close(project_simplex(x), torch.ones(3, 1, dtype=F64))
    torch.testing.assert_close(prox_linf(x, 0.3), prox_l1(x, 0.3))
    torch.testing.assert_close(soft_topk(x, 1), torch.ones(3, 1, dtype=F64))
    for f in (project_simplex, prox_entropy, lambda x: soft_topk(x, 1), lambda x: prox_group_l2(x, 0.1, 1)):
        t = (0.5,) if f is prox_entropy else ()
        assert f(torch.zeros(0, 4), *t).shape == (0, 4)


def test_one_bad_entry_stays_alone():
    x = torch.randn(3, 4, dtype=F64)
    spoilt = x.clone()
    spoilt[1, 2] = torch.nan
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1, 2] = False
    y = torch.ones(4, dtype=F64)
    entrywise = [
        lambda x: prox_l1(x, 0.5),
        lambda x: prox_l1(x, vec(0.5)),
        lambda x: prox_huber(x, 0.5),
        lambda x: prox_hinge(x, 0.5, y),
        lambda x: proximal.prox_l0(x, 0.5),
        lambda x: prox_log(x, 0.5),
        lambda x: prox_scad(x, 0.5),
        lambda x: prox_mcp(x, 0.5),
        lambda x: prox_entropy(x, 0.5),
        lambda x: prox_poisson(x, 0.5, y),
        lambda x: prox_logistic(x, 0.5, y),
        lambda x: project_box(x, -0.5, 0.5),
        lambda x: project_box(x, -y, y),
    ]
    for i, f in enumerate(entrywise):
        z = f(spoilt)
        assert torch.isnan(z[1, 2]), f"case {i}"
        torch.testing.assert_close(z[keep], f(x)[keep], rtol=0, atol=0, msg=f"case {i}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prox_group_l2(x, 1.0, 3), r"groups: expected a divisor of 4 or \(4,\) integers, got 3"),
        (lambda x: prox_group_l2(x, 1.0, torch.tensor([0, -1, 0, 1])), "groups: expected labels of at least 0, got -1"),
        (lambda x: prox_group_l2(x, 1.0, torch.ones(4)), r"groups: expected integers, got torch.float32"),
        (lambda x: prox_scad(x, 2.0, a=3.0), r"a: expected more than 1 \+ t, got 3 with t = 2"),
        (lambda x: prox_mcp(x, 3.0), r"gamma: expected more than t, got 3 with t = 3"),
        (lambda x: project_box(x, 1.0, 0.0), r"upper: expected at least lower, 1, got 0"),
        (lambda x: project_capped_simplex(x, 4.5), r"total: expected at most 4, the sum of upper, got 4.5"),
        (lambda x: project_halfspace(x, 0.0, 1.0), r"normal: expected a vector that is not zero"),
        (lambda x: soft_topk(x, 5), r"k: expected at most 4, the number of entries, got 5"),
        (lambda x: prox_quadratic(x, 1.0, torch.eye(3, dtype=F64)), r"Q: expected shape \(4, 4\)"),
        (lambda x: prox_quadratic(x, 1.0, torch.eye(4, dtype=F64), vec(1)), r"q: expected shape \(4,\)"),
        (lambda x: project_affine(x, torch.ones(2, 4, dtype=F64), vec(1, 2, 3)), r"A: expected shape \(3, 4\)"),
        (lambda x: prox_entropy(x, float("nan")), r"t: expected at least 0, got nan"),
        (lambda x: conjugate_prox(prox_l1, x, 0.0), r"t: expected more than 0, got 0"),
        (lambda x: conjugate_prox(prox_log, x, 1.0), r"prox: expected the prox of a convex function, got prox_log"),
        (lambda x: prox_logistic(x, 1.0, torch.ones(3, dtype=F64)), r"labels: expected a number or a shape"),
        (lambda x: prox_l1(x, 1.0, dim=2), r"dim: expected a dimension of x"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, dtype=F64))
