"""UPGrad and projections on dual cones.

Oracles, none of which shares code with the layer:

- every set of free entries tried, up to 6 objectives (`every_active_set` of the cases): the weights;
- the primal problem ``min ||g - J^T u||^2 s.t. J g >= 0`` by Clarabel, one right-hand side after the other: the point;
- the optimality conditions, which are sufficient, for many objectives;
- what the paper proves: no conflict, the mean where no gradients conflict, linearity in the scale of each gradient;
- finite differences for derivatives of both orders, also with more objectives than parameters.
"""

import pickle
import sys

import cvxpy
import numpy as np
import pytest
import torch
from torch import nn

from difflayers import SolveError, SolveWarning
from difflayers.conic import (
    BlockPivoting,
    UPGrad,
    _dual_cone,
    _torchjd,
    dual_cone_weights,
    dual_cone_weights_ex,
    torchjd_projector,
    upgrad_weights,
    upgrad_weights_ex,
)
from difflayers.testing.cases._conic_upgrad import every_active_set


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(seed: int, *shape: int) -> torch.Tensor:
    """Entries -1, 0, 1: ties, equal and opposite rows, rows of zeros."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).double()


def directions(J: torch.Tensor, **options) -> torch.Tensor:
    return UPGrad(**options)(J)


def violation(J: torch.Tensor, U: torch.Tensor, W: torch.Tensor) -> float:
    """Of the optimality conditions, for rows U and W of one Jacobian, in units of the largest weighted row."""
    length = J.norm(dim=-1)
    scale = (torch.maximum(W.abs(), U.abs()) * length.unsqueeze(-2)).amax(-1, keepdim=True)
    slope = (W @ J) @ J.mT / torch.where(length > 0, length, 1).unsqueeze(-2) / scale
    room = (W - U) * length.unsqueeze(-2) / scale
    return float(torch.stack([(-slope).amax(), (-room).amax(), (slope * room).abs().amax()]).amax())


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("make", [normal, signs])
@pytest.mark.parametrize("m, d", [(2, 3), (3, 1), (4, 2), (5, 5), (6, 4), (6, 9)])
def test_points_are_those_of_every_active_set(make, m, d):
    J, u = make(m + 10 * d, 4, m, d), make(3, 5, 4, m)
    G = J @ J.mT
    found = dual_cone_weights(u, G)
    for i in range(4):
        for k in range(5):
            expected = every_active_set(u[k, i].numpy(), G[i].numpy())
            np.testing.assert_allclose((found[k, i] @ J[i]).numpy(), expected @ J[i].numpy(), atol=1e-10)
            assert (found[k, i] - u[k, i]).min() > -1e-14


@pytest.mark.parametrize("m, d", [(12, 20), (16, 5), (10, 2)])
def test_points_are_projections_by_clarabel(m, d):
    J, u = normal(m, m, d), normal(d, 3, m)
    found = dual_cone_weights(u, J @ J.mT) @ J
    g = cvxpy.Variable(d)
    for row, expected in zip(u, found, strict=True):
        program = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(g - (row @ J).numpy())), [J.numpy() @ g >= 0])
        program.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        np.testing.assert_allclose(expected.numpy(), g.value, atol=1e-6)


@pytest.mark.parametrize("m, d", [(96, 192), (96, 96), (96, 70), (64, 8)])
@pytest.mark.parametrize("make", [normal, signs])
def test_many_objectives_meet_the_optimality_conditions(make, m, d):
    J = make(m + d, 2, m, d) + 0.1 * make(1, d)
    found = dual_cone_weights_ex(torch.eye(m, dtype=J.dtype).unsqueeze(1), J @ J.mT)
    assert found.converged.all()
    assert violation(J, torch.eye(m, dtype=J.dtype), found.value.movedim(0, -2)) < 1e-11


def test_nearly_equal_and_nearly_opposite_gradients():
    sides = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(-1)
    for noise in (1e-3, 1e-5, 1e-7):
        J = sides * normal(1, 8) + noise * normal(2, 20, 6, 8)
        W = dual_cone_weights(torch.eye(6, dtype=J.dtype).unsqueeze(1), J @ J.mT).movedim(0, -2)
        assert violation(J, torch.eye(6, dtype=J.dtype), W) < 1e-9


def test_ridge_is_that_of_the_trace():
    G, u = normal(0, 5, 3), normal(1, 5)
    G = G @ G.T
    ridged = G + 0.01 * G.trace() * torch.eye(5, dtype=G.dtype)
    expected = every_active_set(u.numpy(), ridged.numpy())
    np.testing.assert_allclose(dual_cone_weights(u, G, ridge=0.01).numpy(), expected, atol=1e-10)
    preference = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4], dtype=G.dtype)
    rows = [every_active_set(c * e, ridged.numpy()) for c, e in zip(preference.numpy(), np.eye(5), strict=True)]
    np.testing.assert_allclose(upgrad_weights(G, preference, ridge=0.01).numpy(), sum(rows), atol=1e-10)


def test_single_precision_stays_close():
    J = normal(0, 8, 24, 40)
    found = directions(J.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), directions(J), rtol=0, atol=3e-6)


def test_batch_elements_do_not_mix():
    J = normal(0, 6, 7, 5)
    torch.testing.assert_close(directions(J), torch.stack([directions(one) for one in J]), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("m, d", [(5, 9), (9, 5), (30, 20)])
def test_no_objective_resists(m, d):
    J = normal(m, 50, m, d) * torch.logspace(-6, 6, m, dtype=torch.float64).unsqueeze(-1)
    g = directions(J)
    cosines = (J @ g.unsqueeze(-1)).squeeze(-1) / J.norm(dim=-1) / J.norm(dim=-1).mean(-1, keepdim=True)
    assert cosines.min() > -1e-13


def test_mean_where_no_gradients_conflict():
    J = normal(0, 4, 6, 8).abs()
    torch.testing.assert_close(directions(J), J.mean(-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [3, 12])
def test_linear_in_the_scale_of_each_gradient(d):
    J, (a, b) = normal(d, 6, d), normal(1, 2, 6).exp()
    of = lambda scale: directions(scale.unsqueeze(-1) * J)  # noqa: E731
    torch.testing.assert_close(of(2 * a + 3 * b), 2 * of(a) + 3 * of(b), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_passes_through(scale, dtype):
    J = normal(2, 5, 4).to(dtype)
    tight = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(directions(J * scale) / scale, directions(J), rtol=tight, atol=tight)
    G = J @ J.T
    torch.testing.assert_close(upgrad_weights(G * scale), upgrad_weights(G), rtol=tight, atol=tight)


def test_order_of_objectives_does_not_matter():
    J, c = normal(3, 9, 6), torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(directions(J[order], preference=c[order]), directions(J, preference=c))


def test_two_conflicting_objectives_never_rise():
    """Distances to two points, in a bent metric; the mean gradient raises one of them on the same way."""
    A, B = torch.diag(torch.tensor([1.0, 30.0])), torch.diag(torch.tensor([20.0, 1.0]))
    ends = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])

    def losses(x):
        return torch.stack([(x - ends[0]) @ A @ (x - ends[0]), (x - ends[1]) @ B @ (x - ends[1])])

    def rises(combine):
        x, worst = torch.tensor([-0.5, 2.0]), 0.0
        for _ in range(100):
            before = losses(x)
            x = x - 5e-3 * combine(torch.func.jacrev(losses)(x))
            worst = max(worst, float((losses(x) - before).max()))
        return worst

    assert rises(UPGrad()) < 1e-5 < 1e-3 < rises(lambda J: J.mean(0))


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("m, d", [(4, 6), (5, 2), (3, 1), (6, 4)])
def test_derivatives_of_both_orders(m, d):
    J = normal(m + d, m, d).requires_grad_()
    c = torch.linspace(0.1, 1.0, m, dtype=torch.float64).requires_grad_()

    def direction(J, c):
        return (upgrad_weights(J @ J.mT, c).unsqueeze(-2) @ J).squeeze(-2)

    assert torch.autograd.gradcheck(direction, (J, c), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(direction, (J, c))


def test_derivatives_in_the_vector_to_project():
    u, J = normal(12, 2, 5).requires_grad_(), normal(13, 5, 7).requires_grad_()
    weights = lambda u, J: dual_cone_weights(u, J @ J.T)  # noqa: E731
    held = weights(u, J) == u
    assert held.any() and not held.all()
    assert torch.autograd.gradcheck(weights, (u, J), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(weights, (u, J))


def test_derivative_is_zero_where_gradients_balance():
    """Objectives on all sides: the direction is zero, and stays so nearby."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.2]], dtype=torch.float64, requires_grad=True)
    g = directions(J)
    assert g.abs().max() < 1e-14
    assert torch.autograd.grad(g.sum(), J)[0].abs().max() < 1e-10


def test_equal_gradients_count_as_one_with_both_preferences():
    """Value, and the derivative along a move of both."""
    J, move = normal(4, 3, 4), normal(5, 3, 4)
    twice, c = [0, 1, 1, 2], torch.tensor([0.2, 0.1, 0.3, 0.4], dtype=torch.float64)
    merged = torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64)
    apart = torch.func.jvp(lambda J: directions(J[twice], preference=c), (J,), (move,))
    joint = torch.func.jvp(lambda J: directions(J, preference=merged), (J,), (move,))
    assert (directions(J, preference=merged) - merged @ J).abs().max() > 0.1  # they do conflict
    torch.testing.assert_close(apart, joint, rtol=1e-8, atol=1e-8)


def test_rows_of_zeros_count_as_absent():
    J = normal(6, 4, 5)
    J[2] = 0
    J.requires_grad_()
    g = directions(J)
    slope = torch.autograd.grad(g.sum(), J, create_graph=True)[0]
    torch.testing.assert_close(g, directions(J[[0, 1, 3]]) * 3 / 4)
    assert (slope[2] == 0).all() and (slope[[0, 1, 3]] != 0).any()
    assert torch.isfinite(torch.autograd.grad(slope.square().sum(), J)[0]).all()
    nothing = torch.zeros(3, 4, requires_grad=True)
    directions(nothing).sum().backward()
    assert (directions(nothing) == 0).all() and (nothing.grad == 0).all()


def test_preference_can_be_learned():
    model = UPGrad(nn.Parameter(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)))
    J = normal(7, 3, 5)
    assert torch.autograd.gradcheck(lambda c: torch.func.functional_call(model, {"preference": c}, J), model.preference)


# --------------------------------------------------------------------------------------------------------------- solver


@pytest.mark.parametrize("patience", [-1, 3])
@pytest.mark.parametrize("m, d", [(8, 12), (12, 4), (24, 24), (40, 20)])
def test_every_way_to_the_free_entries_ends_at_the_same_point(monkeypatch, patience, m, d):
    """Without a first guess, and with primal steps alone (no patience with blocks)."""
    J = normal(m + d, 6, m, d)
    expected = directions(J)
    monkeypatch.setattr(_dual_cone, "PATIENCE", patience)
    found = upgrad_weights_ex(J @ J.mT, solver=BlockPivoting(warm_steps=0))
    assert found.converged.all() and (found.steps > 1).any()
    torch.testing.assert_close((found.value.unsqueeze(-2) @ J).squeeze(-2), expected, rtol=1e-9, atol=1e-9)


def test_a_careful_step_stops_at_the_first_bound():
    room, move = (
        torch.tensor([[2.0, 1.0, 3.0]] * 3),
        torch.tensor([[1.0, -4.0, -6.0], [1.0, -4.0, -6.0], [0.0, -0.5, 1.0]]),
    )
    found = _dual_cone._length(room, move, torch.tensor([True, False, True]))
    assert found.squeeze(-1).tolist() == [0.25, 1.0, 1.0]


def test_submatrices_in_several_chunks(monkeypatch):
    J = normal(8, 3, 10, 14)
    expected = directions(J)
    monkeypatch.setattr(_dual_cone, "CHUNK", 400)
    torch.testing.assert_close(directions(J), expected)


def test_what_fails_is_said():
    J = normal(9, 3, 6, 8)
    G = J @ J.mT
    with pytest.warns(SolveWarning, match="stopped after 1 steps"):
        upgrad_weights(G, solver=BlockPivoting(warm_steps=0, max_steps=1))
    G[1] = -G[1]
    with pytest.raises(SolveError, match=r"elements \(?1"):
        upgrad_weights(G)
    found = upgrad_weights(G, on_failure="nan")
    assert torch.isnan(found[1]).all()
    torch.testing.assert_close(found[[0, 2]], upgrad_weights(G[[0, 2]]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="jacobian: expected finite"):
        directions(J * torch.nan)
    with pytest.raises(ValueError, match="max_steps: expected at least 1"):
        BlockPivoting(max_steps=0)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1)])
def test_empty_and_single(shape):
    J = normal(0, *shape).requires_grad_()
    g = directions(J)
    assert g.shape == (*shape[:-2], shape[-1])
    g.sum().backward()
    torch.testing.assert_close(g, J.mean(-2) if shape == (1, 1) else torch.zeros_like(g))


# -------------------------------------------------------------------------------------------------------------- torchjd


def test_torchjd_takes_the_projector():
    from torchjd.aggregation import DualProj
    from torchjd.aggregation import UPGrad as Theirs

    J, c = normal(10, 6, 9), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    projector = torchjd_projector()
    torch.testing.assert_close(Theirs(projector=projector)(J), directions(J))
    torch.testing.assert_close(Theirs(c, projector=projector)(J), directions(J, preference=c))
    torch.testing.assert_close(DualProj(projector=projector)(J), dual_cone_weights(c * 0 + 1 / 6, J @ J.mT) @ J)
    U = normal(11, 2, 3, 6)
    for one in (projector, pickle.loads(pickle.dumps(torchjd_projector(ridge=1e-4)))):
        weights = one(U, J @ J.mT)
        expected = dual_cone_weights(U.reshape(6, 6), J @ J.mT, ridge=one.ridge).reshape(2, 3, 6)
        torch.testing.assert_close(weights, expected)
    assert repr(projector) == "torchjd_projector(ridge=0.0, solver=None)"


def test_torchjd_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.linalg", None)
    _torchjd._projector_class.cache_clear()
    with pytest.raises(ImportError, match="pip install torchjd"):
        torchjd_projector()
