"""CVXPY problems as layers, against CVXPY itself.

Oracles, written before the code: the same problem solved by CVXPY with Clarabel at 1e-10, variables and dual variables;
closed forms and their derivatives by autograd; finite differences of the layer, whose values the first oracle knows.
"""

import copy
import math
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from difflayers import SolveError
from difflayers.conic import Clarabel, CvxpyLayer, Moreau

TIGHT = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
F64 = torch.float64


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tensors(values) -> list[Tensor]:
    return [torch.as_tensor(v, dtype=F64) for v in values]


def compare(problem, parameters, variables, values, *, tol=1e-6, gp=False, duals=()) -> CvxpyLayer:
    """Variables and dual variables of the layer, against those of CVXPY."""
    layer = CvxpyLayer(problem, parameters, [*variables, *duals], gp=gp)
    found = layer(*tensors(values))
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL, gp=gp, **TIGHT)
        expected = [v.value for v in (*variables, *duals)]
    for got, want in zip(found, expected, strict=True):
        dense = want.toarray() if hasattr(want, "toarray") else want
        np.testing.assert_allclose(got.numpy(), dense, atol=tol)
    return layer


# --------------------------------------------------------------------------------------------- bounds must not be lost


TARGET = np.array([1.0, 0.4, -3.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: (cp.Variable(3, nonneg=True), []),
        lambda: (cp.Variable(3, pos=True), []),
        lambda: ((x := cp.Variable(3)), [x >= 0]),
        lambda: (cp.Variable(3, bounds=[0, None]), []),
        lambda: (cp.Variable(3, bounds=[np.zeros(3), np.array([np.inf, 5, 7])]), []),
    ],
    ids=["nonneg", "pos", "constraint", "bounds", "arrays of bounds"],
)
@pytest.mark.parametrize("solver", [None, Moreau(), Clarabel()], ids=["default", "Moreau", "Clarabel"])
def test_lower_bounds(make, solver):
    """The projection on the simplex of (1, 0.4, -3) is (0.8, 0.2, 0)."""
    x, constraints = make()
    target = cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [*constraints, cp.sum(x) == 1])
    (found,) = CvxpyLayer(problem, [target], [x], solver=solver)(torch.tensor(TARGET))
    torch.testing.assert_close(found, torch.tensor([0.8, 0.2, 0.0], dtype=F64), atol=1e-11, rtol=0)


@pytest.mark.parametrize("attribute", [{"nonpos": True}, {"neg": True}, {"bounds": [-0.5, 0.1]}])
def test_other_bounds(attribute):
    x, target = cp.Variable(3, **attribute), cp.Parameter(3)
    compare(cp.Problem(cp.Minimize(cp.sum_squares(x - target))), [target], [x], [TARGET])


def test_bounds_of_second_order_and_semidefinite_cones_on_variables():
    """A variable alone in a cone is what the pair of cvxpylayers and moreau loses."""
    t, x, c = cp.Variable(), cp.Variable(3), cp.Parameter(3)
    compare(cp.Problem(cp.Minimize(t + c @ x), [cp.SOC(t, x), cp.sum(x) == 1]), [c], [x, t], [[0.2, -0.1, 0.3]])
    X, C = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3))
    C_value = normal(1, 3, 3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)))
    (found,) = CvxpyLayer(problem, [C], [X])(torch.tensor(C_value))
    values, Q = np.linalg.eigh((C_value + C_value.T) / 2)
    np.testing.assert_allclose(found.numpy(), (Q * np.maximum(values, 0)) @ Q.T, atol=1e-10)


# ------------------------------------------------------------------------------------------------- what CVXPY can say


def test_one_problem_of_many_kinds():
    x, t = cp.Variable(3, nonneg=True), cp.Variable()
    X, D = cp.Variable((2, 2), PSD=True), cp.Variable((3, 3), diag=True)
    B = cp.Variable(2, bounds=[np.array([0, -np.inf]), 1])
    a, g, d = cp.Parameter((4, 3)), cp.Parameter(nonneg=True), cp.Parameter(2)
    S = cp.Parameter((3, 3), PSD=True)
    constraints = [
        x <= 2, X >> 0.1 * np.eye(2), cp.SOC(t, x), t <= 5, cp.PowCone3D(x[0] + 1, x[1] + 1, x[2], 0.3),
        D[0, 0] >= 1, d <= B, cp.ExpCone(x[0], cp.Constant(1), t + 2),
    ]  # fmt: skip
    objective = (
        cp.sum_squares(a @ x - 1) + g * cp.norm(x, 2) + cp.quad_form(x, S) + cp.sum_squares(D - 0.3 * np.eye(3))
        + cp.norm(X - np.array([[1, 0.2], [0.2, 2]]), "nuc") ** 2 + cp.sum_squares(t - 3) + cp.sum(cp.exp(B))
        + cp.pnorm(x, 3) + cp.log_sum_exp(x)
    )  # fmt: skip
    root = normal(2, 3, 3)
    values = [normal(3, 4, 3), 0.3, root @ root.T, np.array([-1, -0.5])]
    compare(cp.Problem(cp.Minimize(objective), constraints), [a, g, S, d], [x, X, D, B, t], values, tol=1e-5)


def test_dual_variables():
    x, c = cp.Variable(3), cp.Parameter(3)
    plane, above, below = cp.sum(x) == 1, x >= 0, x[:2] <= 0.7
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [plane, above, below])
    duals = [k.dual_variables[0] for k in (plane, above, below)]
    layer = compare(problem, [c], [x], [TARGET], duals=duals)
    assert gradcheck(lambda c: layer(c), torch.tensor(TARGET, requires_grad=True))


def test_dual_variables_of_matrices_and_of_a_maximum():
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    cone, trace = X >> 0, cp.trace(X) == 1
    C_value = np.diag([3.0, 1, 2]) + 0.3
    problem = cp.Problem(cp.Maximize(cp.trace(C @ X)), [cone, trace])
    compare(problem, [C], [X], [C_value], duals=[cone.dual_variables[0], trace.dual_variables[0]])


def test_maximum_entropy_is_a_softmax_with_all_derivatives():
    x, c = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), [cp.sum(x) == 1])
    layer = CvxpyLayer(problem, [c], [x])
    solve, closed = (lambda c: layer(c)[0]), (lambda c: torch.softmax(c, -1))
    c_value = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=F64)
    for derivative in (lambda f: f, jacrev, jacfwd):
        torch.testing.assert_close(derivative(solve)(c_value), derivative(closed)(c_value), atol=1e-9, rtol=0)
    curve = lambda f: hessian(lambda c: f(c).square().sum())  # noqa: E731
    torch.testing.assert_close(curve(solve)(c_value), curve(closed)(c_value), atol=1e-8, rtol=0)


def test_geometric_program():
    u, v, k, e = cp.Variable(pos=True), cp.Variable(pos=True), cp.Parameter(pos=True), cp.Parameter()
    problem = cp.Problem(cp.Minimize(k * u / v + 1 / u), [v**2 <= 4, u**e <= 100])
    layer = compare(problem, [k, e], [u, v], [1.7, 0.5], gp=True, tol=1e-4)  # Clarabel's tolerance, in logarithms
    u_value, v_value = layer(*tensors([1.7, 0.5]))
    torch.testing.assert_close(u_value, torch.tensor((2 / 1.7) ** 0.5, dtype=F64))
    torch.testing.assert_close(v_value, torch.tensor(2.0, dtype=F64))
    slope = jacrev(lambda k: layer(k, torch.tensor(0.5, dtype=F64))[0])(torch.tensor(1.7, dtype=F64))
    torch.testing.assert_close(slope, torch.tensor(-0.5 * 2**0.5 * 1.7**-1.5, dtype=F64))
    with pytest.raises(ValueError, match="expected more than 0"):
        layer(torch.tensor(-1.0, dtype=F64), torch.tensor(0.5, dtype=F64))


@pytest.mark.parametrize("kind", ["symmetric", "PSD", "NSD", "diag", "sparsity", "nonneg", "nonpos"])
def test_attributes_of_parameters(kind):
    """min |M x - 1|^2 + |x|^2 / 10: a closed form in the matrix that the parameter stands for."""
    M_value = {
        "symmetric": np.array([[1.0, 2, 0], [2, -1, 0.5], [0, 0.5, 0.3]]),
        "PSD": np.diag([1.0, 2, 3]) + 0.2,
        "NSD": -np.diag([1.0, 2, 3]) - 0.2,
        "diag": np.diag([1.0, 2, 3]),
        "sparsity": np.array([[0, 1.0, 0], [2, 0, 0], [0.5, 0, 3]]),
        "nonneg": np.arange(9.0).reshape(3, 3),
        "nonpos": -np.arange(9.0).reshape(3, 3),
    }[kind]
    M = cp.Parameter((3, 3), **({"sparsity": M_value.nonzero()} if kind == "sparsity" else {kind: True}))
    x = cp.Variable(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(M @ x - 1) + cp.sum_squares(x) / 10)), [M], [x])
    start = torch.tensor(M_value)

    def effective(M: Tensor) -> Tensor:
        if kind in ("symmetric", "PSD", "NSD"):
            return (M + M.mT) / 2
        return M * (start != 0) if kind in ("diag", "sparsity") else M

    def closed(M: Tensor) -> Tensor:
        M = effective(M)
        return torch.linalg.solve(M.mT @ M + torch.eye(3, dtype=F64) / 10, M.mT.sum(-1))

    torch.testing.assert_close(layer(start)[0], closed(start), atol=1e-10, rtol=0)
    torch.testing.assert_close(jacrev(lambda M: layer(M)[0])(start), jacrev(closed)(start), atol=1e-9, rtol=0)


def test_a_quadratic_form_may_have_a_parameter():
    x, P, c = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.quad_form(x, P) + c @ x)), [P, c], [x])
    root = normal(4, 5, 3, 3)
    P_value, c_value = tensors([root @ root.swapaxes(-1, -2) + np.eye(3), normal(5, 3)])
    closed = -torch.linalg.solve(P_value, c_value.expand(5, 3)) / 2
    torch.testing.assert_close(layer(P_value, c_value)[0], closed, atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="positive semidefinite"):
        layer(-P_value, c_value)


def test_odd_problems():
    x, c = cp.Variable(3), cp.Parameter(3)
    compare(cp.Problem(cp.Minimize(0), [x == c]), [c], [x], [TARGET])
    compare(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= 1]), [], [x], [])
    compare(cp.Problem(cp.Minimize(cp.sum_squares(x - c))), [c], [x], [TARGET])
    Y, M = cp.Variable((2, 3)), cp.Parameter((2, 3))
    compare(cp.Problem(cp.Minimize(cp.norm(Y - M, "fro") ** 2 + cp.norm(Y, 1))), [M], [Y], [normal(6, 2, 3)])
    s, p = cp.Variable(), cp.Parameter()
    compare(cp.Problem(cp.Minimize((s - p) ** 2), [s >= 1]), [p], [s], [3.0])


# ------------------------------------------------------------------------------------------------------- the contract


def soft():
    """A second-order cone, linear rows, three parameters of different shapes."""
    x = cp.Variable(3, nonneg=True, name="x")
    A, c, r = cp.Parameter((2, 3), name="A"), cp.Parameter(3, name="c"), cp.Parameter(nonneg=True, name="r")
    rows = [A @ x <= 1, cp.norm(x - 1) <= r]
    return cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + c @ x), rows), [A, c, r], [x]


VALUES = tensors([normal(7, 2, 3), normal(8, 3), 1.3])


def test_any_subset_of_parameters_in_any_batch():
    layer = CvxpyLayer(*soft())
    batched = [v + 0.1 * torch.as_tensor(normal(9, 4, 2, *v.shape)) for v in VALUES]
    alone = vmap(vmap(lambda A, c, r: layer(A, c, r)[0]))(*batched)
    torch.testing.assert_close(layer(*batched)[0], alone, atol=1e-11, rtol=0)
    for mask in range(8):
        given = [b if mask >> i & 1 else v for i, (b, v) in enumerate(zip(batched, VALUES, strict=True))]
        x = layer(*given)[0]
        assert x.shape == ((4, 2, 3) if mask else (3,))
        full = [g.expand(4, 2, *v.shape) for g, v in zip(given, VALUES, strict=True)]
        torch.testing.assert_close(x.expand(4, 2, 3), layer(*full)[0], atol=1e-11, rtol=0)
    assert layer(batched[0][:0], VALUES[1], VALUES[2])[0].shape == (0, 2, 3)


def test_derivatives_of_first_and_second_order():
    layer = CvxpyLayer(*soft())
    inputs = [v.clone().requires_grad_() for v in VALUES]
    assert gradcheck(lambda *t: layer(*t)[0], inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(lambda *t: layer(*t)[0], inputs, check_fwd_over_rev=True, fast_mode=True)
    _, tangent = jvp(lambda r: layer(*VALUES[:2], r)[0], (VALUES[2],), (torch.ones((), dtype=F64),))
    torch.testing.assert_close(tangent, jacrev(lambda r: layer(*VALUES[:2], r)[0])(VALUES[2]), atol=1e-9, rtol=0)


def test_an_infeasible_element_harms_nobody():
    layer = CvxpyLayer(*soft(), on_failure="nan")
    c = torch.tensor(normal(10, 5, 3))
    A = VALUES[0].expand(5, 2, 3).clone()
    good = layer(A, c, VALUES[2])[0]
    A[3] = 0
    A[3, 0] = -100
    A[3, 1] = 100
    radius = torch.full((5,), 1.3, dtype=F64)
    radius[3] = 0.0
    A, radius = A.requires_grad_(), radius.requires_grad_()
    x = layer(A, c, radius)[0]
    others = [0, 1, 2, 4]
    assert torch.equal(x[others], good[others])
    assert x[3].isnan().all()
    for g in torch.autograd.grad(x[others].sum(), (A, radius)):
        assert torch.isfinite(g).all()
        assert (g[3] == 0).all()
    with pytest.raises(SolveError, match=r"elements 3.*INFEASIBLE"):
        CvxpyLayer(*soft())(A, c, radius)


def test_nan_in_a_parameter_with_a_sign_is_a_failure_of_its_element():
    A, c, r = VALUES
    radius = torch.stack([r, r * math.nan, r])
    x = CvxpyLayer(*soft(), on_failure="nan")(A, c, radius)[0]
    assert torch.equal(x[[0, 2]], CvxpyLayer(*soft())(A, c, r)[0].expand(2, -1))
    assert x[1].isnan().all()
    refused("r: expected finite numbers, at least 0, got nan", lambda: CvxpyLayer(*soft())(A, c, radius))


def test_copies_and_pickles():
    layer = CvxpyLayer(*soft())
    expected = layer(*VALUES)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.float32)):
        assert torch.equal(other(*VALUES)[0], expected)
    assert not layer.state_dict()
    assert "x(3,)" in repr(layer)


def test_dtype_of_parameters_is_kept():
    layer = CvxpyLayer(*soft())
    expected = layer(*VALUES)[0]
    single = [v.float().requires_grad_() for v in VALUES]
    x = layer(*single)[0]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, atol=1e-5, rtol=0)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(x.sum(), single))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(*single)[0], x)


# --------------------------------------------------------------------------------------------------------- bad input


def refused(message: str, make) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_problems_that_are_refused():
    x, p, r = cp.Variable(2, name="x"), cp.Parameter(name="p", nonneg=True), cp.Parameter(name="r", nonneg=True)
    product = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= 1, p * r * x[0] <= 2])
    refused(r"DPP.*constraint 1: ", lambda: CvxpyLayer(product, [p, r], [x]))
    concave = cp.Problem(cp.Minimize(p * cp.sqrt(x[0])))
    refused(r"disciplined convex \(DCP\).*objective: ", lambda: CvxpyLayer(concave, [p], [x]))
    whole = cp.Variable(2, integer=True, name="whole")
    refused(r"whole \(integer\)", lambda: CvxpyLayer(cp.Problem(cp.Minimize(cp.sum(whole))), [], [whole]))
    z = cp.Variable(2, complex=True, name="z")
    refused(r"z \(complex\)", lambda: CvxpyLayer(cp.Problem(cp.Minimize(cp.norm(z))), [], [z]))
    refused("problem: expected a cvxpy Problem, got int", lambda: CvxpyLayer(3, [], []))
    good = cp.Problem(cp.Minimize(p * cp.sum_squares(x)), [x >= r])
    refused("parameters: expected all parameters of the problem, r missing", lambda: CvxpyLayer(good, [p], [x]))
    refused("parameters: expected cvxpy Parameters, got float", lambda: CvxpyLayer(good, [p, 1.0], [x]))
    refused("solver: expected Moreau, a ConicSolver", lambda: CvxpyLayer(good, [p, r], [x], solver="SCS"))
    free = cp.Problem(cp.Minimize(p * x[0]))
    refused("problem: expected one with a constraint or a curved objective", lambda: CvxpyLayer(free, [p], [x]))
    refused("each of them once", lambda: CvxpyLayer(good, [p, p, r], [x]))
    refused("got q, which is none", lambda: CvxpyLayer(good, [p, r, cp.Parameter(name="q")], [x]))
    refused("variables: expected variables of the problem", lambda: CvxpyLayer(good, [p, r], [cp.Variable(2)]))
    refused("variables: expected a list", lambda: CvxpyLayer(good, [p, r], x))
    t = cp.Variable()
    cone = cp.SOC(t, x)
    refused("variables: expected duals of equalities", lambda: CvxpyLayer(
        cp.Problem(cp.Minimize(t), [cone]), [], [cone.dual_variables[0]]))  # fmt: skip


def test_values_that_are_refused():
    layer = CvxpyLayer(*soft())
    A, c, r = VALUES
    refused("parameters: expected 3 tensors, got 2", lambda: layer(A, c))
    refused(r"A: expected shape \(2, 3\) behind the batch, got \(3, 2\)", lambda: layer(A.mT, c, r))
    refused("c: expected at least 1 dimension", lambda: layer(A, r, r))
    refused("c: expected dtype", lambda: layer(A, c.float(), r))
    refused("c: expected batch dimensions that broadcast", lambda: layer(A.expand(2, 2, 3), c.expand(3, 3), r))
    refused("r: expected at least 0, got -1.3", lambda: layer(A, c, -r))
    refused(
        "c: expected finite numbers, got 1 NaN or Inf of 3", lambda: layer(A, c * torch.tensor([1, math.nan, 1]), r)
    )
    refused("A: expected a tensor, got ndarray", lambda: layer(A.numpy(), c, r))
