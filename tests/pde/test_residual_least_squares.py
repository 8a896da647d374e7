"""Coefficients that a differential equation determines.

Oracles, written before the code. Linear residual: numpy's least squares on the assembled rows, and the closed forms of
the cotangents (with the rank-one term of the misfit). Nonlinear: scipy.optimize.least_squares and Newton's method on
the gradient by autograd, no library code; derivatives by re-solving moved data, and by the dense KKT system with the
full Hessian.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares as scipy_least_squares
from torch import Tensor
from torch.func import grad, hessian, jacrev

from difflayers import SolveError, SolveWarning
from difflayers.implicit import GaussNewton, LevenbergMarquardt
from difflayers.pde import residual_least_squares, residual_least_squares_ex, residual_least_squares_value
from difflayers.testing import saved_bytes

F64 = torch.float64
E, N, K = 3, 14, 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def burgers(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return u[..., 1] + u[..., 0] * u[..., 2] - p["nu"] * u[..., 2] - p["f"]


def heat(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return u[..., 1] - p["nu"] * u[..., 2] - p["f"]


def system(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.stack([burgers(u, p), torch.sin(u[..., 0]) + u[..., 1]], -1)


def data(seed: int = 0) -> dict[str, Tensor]:
    """Everything the layer takes, with a misfit that is far from zero."""
    return {
        "B": normal(seed, E, N, 3, K),
        "T0": 0.3 * normal(seed + 1, E, N, 3),
        "nu": torch.tensor([[0.2], [0.4], [0.3]], dtype=F64),
        "f": normal(seed + 2, E, N),
        "s": normal(seed + 3, N).abs() + 0.5,
        "A": normal(seed + 4, 3, K),
        "y": normal(seed + 5, E, 3),
        "row_weights": normal(seed + 6, 3).abs() + 0.5,
        "ridge": torch.tensor(0.3, dtype=F64),
        "center": normal(seed + 7, K),
        "C": normal(seed + 8, 1, K),
        "d": 0.3 * normal(seed + 9, E, 1),
    }


def layer(F, t: dict[str, Tensor], solve=residual_least_squares, exact: bool = True, **options):
    return solve(
        t["B"],
        F,
        {"nu": t["nu"], "f": t["f"]},
        offset=t["T0"],
        weights=t["s"],
        rows=(t["A"], t["y"], t["row_weights"]),
        ridge=t["ridge"],
        center=t["center"],
        equality=(t["C"], t["d"]) if exact else None,
        **options,
    )


def objective(F, w: Tensor, t: dict[str, Tensor]) -> Tensor:
    """Of one element, written out."""
    terms = t["T0"] + torch.einsum("ntk,k->nt", t["B"], w)
    r = F(terms, {"nu": t["nu"], "f": t["f"]})
    r = t["s"].reshape(-1, *[1] * (r.ndim - 1)) * r
    rows = t["row_weights"] * (t["A"] @ w - t["y"])
    return (r.square().sum() + rows.square().sum() + t["ridge"] * (w - t["center"]).square().sum()) / 2


BATCHED = {"B", "T0", "nu", "f", "y", "d"}


def element(t: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    return {name: v[e] if name in BATCHED else v for name, v in t.items()}


def gradient_of_lagrangian(F, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    w, nu = x[:K], x[K:]
    top = grad(lambda w: objective(F, w, t))(w)
    return top if not nu.numel() else torch.cat([top + t["C"].mT @ nu, t["C"] @ w - t["d"]])


def newton(F, x: Tensor, t: dict[str, Tensor], steps: int = 4) -> Tensor:
    for _ in range(steps):
        J = jacrev(lambda x: gradient_of_lagrangian(F, x, t))(x)
        x = x - torch.linalg.solve(J, gradient_of_lagrangian(F, x, t))
    return x


def dense_cotangents(F, w: Tensor, nu: Tensor, g: Tensor, t: dict[str, Tensor], names) -> dict[str, Tensor]:
    """The implicit function theorem with the dense Jacobian, summed over elements."""
    total = {n: torch.zeros_like(t[n]) for n in names}
    for e in range(E):
        one = element(t, e)
        x = newton(F, torch.cat([w[e], nu[e]]), one)
        J = jacrev(lambda x, one=one: gradient_of_lagrangian(F, x, one))(x)
        z = torch.linalg.solve(J.mT, torch.cat([g[e], torch.zeros_like(nu[e])]))
        for n in names:
            moved = grad(lambda v, n=n, x=x, one=one, z=z: gradient_of_lagrangian(F, x, one | {n: v}) @ z)(one[n])
            if n in BATCHED:
                total[n][e] -= moved
            else:
                total[n] -= moved
    return total


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("F", [burgers, system])
def test_nonlinear_value_is_that_of_scipy(F):
    t = data()
    found = layer(F, t, residual_least_squares_ex, exact=False)
    assert found.converged.all() and not found.linear.any()
    for e in range(E):
        one = element(t, e)

        def stacked(w, one=one):
            w = torch.from_numpy(w)
            r = F(one["T0"] + torch.einsum("ntk,k->nt", one["B"], w), one)
            r = one["s"].reshape(-1, *[1] * (r.ndim - 1)) * r
            rows = one["row_weights"] * (one["A"] @ w - one["y"])
            return torch.cat([r.flatten(), rows, one["ridge"].sqrt() * (w - one["center"])]).numpy()

        start = t["center"].numpy()
        expected = scipy_least_squares(stacked, start, xtol=1e-15, ftol=1e-15, gtol=1e-13).x
        expected = newton(F, torch.from_numpy(expected), one | {"C": t["C"][:0]})
        assert torch.allclose(found.value[e], expected, rtol=0, atol=1e-10)


def test_equality_holds_and_the_multipliers_solve_the_lagrangian():
    t = data(20)
    found = layer(burgers, t, residual_least_squares_ex)
    assert found.converged.all()
    for e in range(E):
        x = torch.cat([found.value[e], found.multipliers[e]])
        assert gradient_of_lagrangian(burgers, x, element(t, e)).abs().max() < 1e-10


def test_linear_residual_is_recognised_and_solved_in_one_step():
    t = data(40)
    found = layer(heat, t, residual_least_squares_ex, exact=False)
    assert found.linear.all() and found.converged.all() and found.steps.tolist() == [1] * E
    for e in range(E):
        one = element(t, e)
        form = torch.tensor([0.0, 1.0, -float(one["nu"])], dtype=F64)
        rows = torch.cat([one["s"][:, None] * torch.einsum("t,ntk->nk", form, one["B"]),
                          one["row_weights"][:, None] * one["A"], 0.3**0.5 * torch.eye(K, dtype=F64)])  # fmt: skip
        right = torch.cat([one["s"] * (one["f"] - one["T0"] @ form), one["row_weights"] * one["y"],
                           0.3**0.5 * one["center"]])  # fmt: skip
        expected = np.linalg.lstsq(rows.numpy(), right.numpy(), rcond=None)[0]
        assert np.abs(found.value[e].numpy() - expected).max() < 1e-12


def test_elements_that_are_linear_may_stand_beside_others():
    B, f = normal(60, 3, N, 2, K), normal(61, 3, N)
    F = lambda u, p: u[..., 1] + p["a"] * u[..., 0] ** 2 - p["f"]  # noqa: E731
    a = torch.tensor([[0.0], [0.3], [0.0]], dtype=F64)
    found = residual_least_squares_ex(B, F, {"a": a, "f": f}, ridge=0.5)
    assert found.linear.tolist() == [True, False, True] and found.converged.all()
    alone = residual_least_squares(B[1], F, {"a": a[1], "f": f[1]}, ridge=0.5)
    assert torch.allclose(found.value[1], alone, rtol=0, atol=1e-12)


def test_terms_by_name_and_a_weight_of_zero():
    t = data(70)
    named = {n: t["B"][:, :, i] for i, n in enumerate(("u", "u_t", "u_x"))}
    offset = {n: t["T0"][:, :, i] for i, n in ((2, "u_x"), (0, "u"), (1, "u_t"))}
    F = lambda u, p: u["u_t"] + u["u"] * u["u_x"] - p["nu"] * u["u_x"] - p["f"]  # noqa: E731
    weights = torch.ones(N, dtype=F64)
    weights[-4:] = 0
    got = residual_least_squares(named, F, {"nu": t["nu"], "f": t["f"]}, offset=offset, weights=weights, ridge=0.1)
    short = slice(0, N - 4)
    params = {"nu": t["nu"], "f": t["f"][:, short]}
    expected = residual_least_squares(t["B"][:, short], burgers, params, offset=t["T0"][:, short], ridge=0.1)
    assert torch.allclose(got, expected, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("F", [heat, burgers, system])
def test_cotangents_are_those_of_the_dense_system(F, exact):
    t = data(80)
    names = [n for n in t if exact or n not in "Cd"]
    found = layer(F, t, residual_least_squares_ex, exact)
    g = normal(90, E, K)
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    w = layer(F, leaves, exact=exact)
    got = dict(zip(names, torch.autograd.grad(w, [leaves[n] for n in names], g), strict=True))
    expected = dense_cotangents(F, found.value, found.multipliers, g, t, names)
    for n in names:
        assert (got[n] - expected[n]).abs().max() < 1e-8 * max(1, float(expected[n].abs().max())), n


def test_linear_cotangents_have_the_closed_form():
    """``A_bar = S^2 (r z^T - (A z) w^T)`` and so on; without the first term it is another derivative."""
    A, y, s = normal(100, N, K), normal(101, N), normal(102, N).abs() + 0.5
    lam, w0, g = 0.3, normal(103, K), normal(104, K)
    H = A.mT @ (s[:, None] ** 2 * A) + lam * torch.eye(K, dtype=F64)
    w = torch.linalg.solve(H, A.mT @ (s**2 * y) + lam * w0)
    z, r = torch.linalg.solve(H, g), y - A @ w
    leaves = [t.clone().requires_grad_() for t in (A, y, s, torch.tensor(lam, dtype=F64), w0)]
    got = residual_least_squares(
        leaves[0][:, None], lambda u, y: u[..., 0] - y, leaves[1], weights=leaves[2], ridge=leaves[3], center=leaves[4]
    )
    expected = (
        s[:, None] ** 2 * (r[:, None] * z - (A @ z)[:, None] * w),
        s**2 * (A @ z),
        2 * s * r * (A @ z),
        -z @ (w - w0),
        lam * z,
    )
    assert torch.allclose(got, w, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, leaves, g), expected, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_solving_again_agrees_with_the_exact_hessian_and_not_with_gauss_newton():
    t = data(110)
    g = normal(111, E, K)
    move = 1e-5

    def along(sign: float) -> float:
        return float((layer(burgers, t | {"f": t["f"] + sign * move * normal(112, E, N)}) * g).sum())

    expected = (along(1) - along(-1)) / (2 * move)
    slopes = {}
    for name, options in (("exact", {}), ("biased", {"curvature": GaussNewton()})):
        f = t["f"].clone().requires_grad_()
        w = layer(burgers, t | {"f": f}, **options)
        slopes[name] = float((torch.autograd.grad(w, f, g)[0] * normal(112, E, N)).sum())
    assert abs(slopes["exact"] / expected - 1) < 1e-7
    assert abs(slopes["biased"] / expected - 1) > 0.02


def test_gauss_newton_is_exact_where_the_residual_is_zero():
    B, w = normal(120, N, 2, K), normal(121, K)
    T = torch.einsum("ntk,k->nt", B, w)
    F = lambda u, f: u[..., 1] + u[..., 0] ** 2 - f  # noqa: E731
    f = T[:, 1] + T[:, 0] ** 2
    grads = []
    for curvature in ({}, {"curvature": GaussNewton()}):
        leaf = f.clone().requires_grad_()
        grads.append(torch.autograd.grad(residual_least_squares(B, F, leaf, init=w, **curvature).sum(), leaf)[0])
    assert torch.allclose(*grads, rtol=0, atol=1e-8)


def test_second_derivatives_are_those_of_newtons_method():
    t = element(data(130), 0)

    def ours(v: Tensor) -> Tensor:
        moved = {"nu": v[:1], "f": t["f"] + v[1]}
        return residual_least_squares(t["B"], burgers, moved, ridge=0.3).square().sum()

    start = residual_least_squares(t["B"], burgers, {"nu": t["nu"], "f": t["f"]}, ridge=0.3)

    def unrolled(v: Tensor) -> Tensor:
        moved = {"nu": v[:1], "f": t["f"] + v[1]}

        def loss(w: Tensor) -> Tensor:
            r = burgers(torch.einsum("ntk,k->nt", t["B"], w), moved)
            return (r.square().sum() + 0.3 * w.square().sum()) / 2

        w = start
        for _ in range(4):
            w = w - torch.linalg.solve(hessian(loss)(w), grad(loss)(w))
        return w.square().sum()

    v = torch.cat([t["nu"], torch.zeros(1, dtype=F64)])
    assert torch.allclose(hessian(ours)(v), hessian(unrolled)(v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("exact", [False, True])
def test_the_optimal_value_has_the_envelope_gradient(exact):
    t = data(140)
    leaves = {n: v.clone().requires_grad_() for n, v in t.items() if exact or n not in "Cd"}
    value = layer(burgers, t | leaves, residual_least_squares_value, exact)
    w = layer(burgers, t | leaves, exact=exact)
    direct = torch.stack([objective(burgers, w[e], element(t | leaves, e)) for e in range(E)])
    assert torch.allclose(value, direct, rtol=0, atol=1e-10)
    got = torch.autograd.grad(value.sum(), list(leaves.values()))
    through = torch.autograd.grad(direct.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    for n, a, b in zip(leaves, got, through, strict=True):
        assert (a - b).abs().max() < 1e-8 * max(1, float(b.abs().max())), n


# ------------------------------------------------------------------------------------------------------------ failure


@pytest.mark.parametrize("F", [heat, burgers])
@pytest.mark.parametrize("kind", ["nan", "singular", "diverging"])
def test_a_bad_element_is_reported_and_leaves_the_others_alone(F, kind):
    t = data(150)
    B, f = t["B"].clone(), t["f"].clone()
    if kind == "nan":
        f[1, 3] = torch.nan
    elif kind == "singular":
        B[1, ..., 1] = B[1, ..., 0]
    else:
        f[1, 3] = torch.inf
    good = residual_least_squares(t["B"], F, {"nu": t["nu"], "f": t["f"]})
    with pytest.raises((SolveError, ValueError)):
        residual_least_squares(B, F, {"nu": t["nu"], "f": f})
    nu = t["nu"].clone().requires_grad_()
    w = residual_least_squares(B, F, {"nu": nu, "f": f}, on_failure="nan")
    assert torch.isnan(w[1]).all()
    assert torch.equal(w[[0, 2]], good[[0, 2]])
    report = residual_least_squares_ex(B, F, {"nu": t["nu"], "f": f})
    assert report.failed.tolist() == [False, True, False]
    leaf = t["nu"].clone().requires_grad_()
    clean = residual_least_squares(t["B"], F, {"nu": leaf, "f": t["f"]})
    got = torch.autograd.grad(w[[0, 2]].sum(), nu)[0]
    assert torch.equal(got[[0, 2]], torch.autograd.grad(clean[[0, 2]].sum(), leaf)[0][[0, 2]])


def test_the_error_names_the_element():
    B = normal(160, 3, N, 3, K)
    B[2, ..., 1] = B[2, ..., 0]
    params = {"nu": torch.full((1,), 0.3, dtype=F64), "f": normal(161, N)}
    with pytest.raises(SolveError, match="elements 2"):
        residual_least_squares(B, burgers, params)


@pytest.mark.parametrize("F", [heat, burgers, system])
def test_duplicated_basis_functions_with_a_ridge_have_finite_gradients(F):
    t = data(170)
    B = t["B"][..., [0, 0, 1, 1]].clone().requires_grad_()
    ridge = torch.tensor(1e-6, dtype=F64, requires_grad=True)
    w = residual_least_squares(B, F, {"nu": t["nu"], "f": t["f"]}, ridge=ridge)
    assert torch.allclose(w[:, 0], w[:, 1], rtol=0, atol=1e-6)
    for g in torch.autograd.grad((w * normal(171, E, K)).sum(), (B, ridge)):
        assert torch.isfinite(g).all()


def test_a_solver_that_stops_early_warns():
    t = data(180)
    with pytest.warns(SolveWarning, match="before they met the tolerance"):
        layer(burgers, t, solver=LevenbergMarquardt(max_steps=1))


def test_a_saddle_is_no_solution():
    """w = 0 is stationary for ``(u^2 - 1)^2``, and a maximum."""
    B = torch.ones(2, 1, 1, dtype=F64)
    with pytest.raises(SolveError, match="SINGULAR"):
        residual_least_squares(B, lambda u, p: u[..., 0] ** 2 - 1)


def test_the_graph_does_not_grow_with_the_steps():
    def kept(init: Tensor) -> tuple[int, int]:
        t = data(190)
        B, params = t["B"].clone().requires_grad_(), {"nu": t["nu"], "f": t["f"]}
        w, size = saved_bytes(lambda: residual_least_squares(B, burgers, params, ridge=0.5, init=init))
        assert w.requires_grad
        steps = residual_least_squares_ex(t["B"], burgers, params, ridge=0.5, init=init).steps
        return size, int(steps.max())

    t = data(190)
    solution = residual_least_squares(t["B"], burgers, {"nu": t["nu"], "f": t["f"]}, ridge=0.5)
    (few, short), (many, long) = kept(solution), kept(torch.zeros(K, dtype=F64) + 3)
    assert short < long
    assert many <= few


def test_a_captured_tensor_is_refused():
    nu = torch.tensor(0.3, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"residual: .*captures.*`params`"):
        residual_least_squares(normal(200, N, 2, K), lambda u, p: u[..., 1] - nu * u[..., 0])


def test_a_residual_is_looked_at_first_inside_a_transform():
    """Points that see each other are found there too; a closure that is pointwise works."""
    B = torch.randn(2, 5, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = 1.0
    found = torch.func.vmap(lambda B: residual_least_squares(B, lambda u, p: u[..., 0] - c))(B)
    torch.testing.assert_close(found, residual_least_squares(B, lambda u, p: u[..., 0] - c))
    with pytest.raises(ValueError, match="residual: expected a pointwise function"):
        torch.func.vmap(lambda B: residual_least_squares(B, lambda u, p: u[..., 0] - u[..., 0].mean(-1, True) * c))(B)
