"""Hypergradients against closed forms and brute force; the oracles were written without reading the implementation.

Closed forms by hand in `oracle_closed.py` (ridge and logistic regression with one penalty a feature, elastic net on
its support, equality constraints by the optimality system), dense Hessians of plain objectives and differences of
re-solved problems in `oracle_dense.py`. Fixed by the definition of the problem, not by the code: an identity Hessian,
a right-hand side of zero, a Hessian that is singular but consistent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers import SolveError, SolveWarning, Status
from difflayers.bilevel import ArgminLayer, Bilevel, Hypergradient, hypergradient
from difflayers.implicit import Implicit, Neumann
from difflayers.linalg import CG, LU, MINRES, QR, Cholesky
from tests.bilevel import oracle_dense as dense
from tests.bilevel.oracle_cases import ADJOINTS, AT, EQUAL, F64, NET, RIDGE, SOUND, TIGHT, far, problem
from tests.bilevel.oracle_closed import Box, tensor


@pytest.mark.parametrize(("name", "adjoint"), SOUND)
def test_closed_form(name: str, adjoint: str) -> None:
    P, made, at = problem(name)
    exact = P.exact(at)
    x, y = tensor(at), tensor(exact.y)
    found = hypergradient(made, x, y, adjoint=ADJOINTS[adjoint])
    assert isinstance(found, Hypergradient)
    assert far(found.grad, exact.gradient) < (1e-8 if adjoint == "default" else 1e-10)
    assert abs(float(found.value) - exact.value) < 1e-12 * (1 + abs(exact.value))
    assert float(found.stationarity) < 1e-12
    assert int(found.status) == Status.CONVERGED
    assert bool(found.converged) and not bool(found.failed)
    assert found.adjoint.shape == y.shape and found.products >= 0


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_brute_force_agrees(name: str) -> None:
    """The same numbers a third way: differences of order six of re-solved problems."""
    P, made, at = problem(name)
    x = tensor(at)
    y = dense.solve(P.lower, x, torch.zeros(at.size, dtype=F64))
    found = hypergradient(made, x, y)
    assert far(found.grad, dense.sixth(dense.resolved(P.upper, P.lower, y), x)) < 1e-8
    H = torch.autograd.functional.hessian(lambda v: P.lower(x, v), y)
    q = torch.linalg.solve(H, torch.autograd.functional.jacobian(lambda v: P.upper(x, v), y))
    assert far(found.adjoint, q) < 1e-8


def test_lasso_off_the_support() -> None:
    """A penalty off the support moves nothing: its gradient is that of the direct term alone, to the last bit."""
    exact = NET.exact(AT["net"])
    x = tensor(AT["net"])
    found = hypergradient(
        Bilevel(lambda x, y, b: NET.upper(0 * x, y), NET.lower, prox_lower=NET.soft), x, tensor(exact.y)
    )
    off = torch.as_tensor(exact.y == 0)
    assert off.sum() == 3
    assert (found.grad[:-1][off] == 0).all()
    assert far(found.grad, exact.gradient - NET.rho * AT["net"]) < 1e-8


def test_box() -> None:
    """Bounds that depend on x: the active ones pass their derivative on, through the prox alone."""
    P, at = Box.random(), np.array([-0.5, 0.0, 0.3, -0.2])
    y, gradient, jacobian = P.exact(at)
    assert 0 < (np.abs(y) == np.exp(at)).sum() < 4
    made = Bilevel(P.upper, P.lower, prox_lower=P.clamp)
    assert far(hypergradient(made, tensor(at), tensor(y)).grad, gradient) < 1e-10
    solve = ArgminLayer(made, init=torch.zeros(4, dtype=F64))
    assert far(solve(tensor(at)), y) < 1e-9
    assert far(torch.func.jacrev(solve)(tensor(at)), jacobian) < 1e-9
    assert far(torch.func.jacfwd(solve)(tensor(at)), jacobian) < 1e-9


def test_scalars() -> None:
    """y = sin x, Phi = x sin(x)^2 + x, all of shape ()."""
    made = Bilevel(lambda x, y, b: x * y**2 + x, lambda x, y, b: 0.5 * x.exp() * (y - x.sin()) ** 2)
    x = torch.tensor(0.7, dtype=F64)
    for adjoint in ADJOINTS.values():
        found = hypergradient(made, x, x.sin(), adjoint=adjoint)
        assert found.grad.shape == () and found.adjoint.shape == ()
        assert far(found.grad, 2 * x * x.sin() * x.cos() + x.sin() ** 2 + 1) < 1e-13


@pytest.mark.parametrize("adjoint", ["default", "cg", "minres", "gmres", "lu", "cholesky"])
def test_identity_hessian(adjoint: str) -> None:
    """y = x, Phi = |x - t|^2 / 2: one step of any Krylov method."""
    t = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    made = Bilevel(lambda x, y, b: 0.5 * ((y - t) ** 2).sum(), lambda x, y, b: 0.5 * (y**2).sum() - x @ y)
    x = torch.tensor([0.5, 0.25, -1.0], dtype=F64)
    found = hypergradient(made, x, x.clone(), adjoint=ADJOINTS[adjoint])
    assert far(found.grad, x - t) < 1e-14 and int(found.steps) <= 2


def test_right_hand_side_zero() -> None:
    """A vanishing derivative of the upper objective in y: q = 0 without an iteration."""
    x, y = tensor(AT["ridge"]), tensor(RIDGE.exact(AT["ridge"]).y)
    stationary = y.clone()
    for upper in (lambda x, y, b: (x**3).sum(), lambda x, y, b: (x**3).sum() + ((y - stationary) ** 2).sum()):
        found = hypergradient(Bilevel(upper, RIDGE.lower), x, y)
        assert torch.equal(found.grad, 3 * x**2)
        assert not found.adjoint.any() and int(found.status) == Status.CONVERGED
        assert found.products <= 1 and int(found.steps) == 0


def test_x_unused_by_lower() -> None:
    t = torch.tensor([1.0, 2.0], dtype=F64)
    made = Bilevel(lambda x, y, b: (x**2).sum() * y.sum(), lambda x, y, b: 0.5 * ((y - t) ** 2).sum())
    x = torch.tensor([1.0, -3.0, 2.0], dtype=F64)
    assert far(hypergradient(made, x, t).grad, 2 * x * 3) < 1e-15
    nowhere = Bilevel(lambda x, y, b: (y**2).sum(), made.lower)
    assert torch.equal(hypergradient(nowhere, x, t).grad, torch.zeros_like(x))
    parts = {"used": x, "unused": torch.ones(2, 2, dtype=F64)}
    split = Bilevel(lambda x, y, b: (x["used"] ** 2).sum() * y.sum(), made.lower)
    found = hypergradient(split, parts, t).grad
    assert torch.equal(found["unused"], torch.zeros(2, 2, dtype=F64)) and far(found["used"], 6 * x) < 1e-15


def test_y_partly_unused() -> None:
    """A leaf of y that neither objective sees: a zero block of the Hessian, consistent, gradient as without it."""
    exact = RIDGE.exact(AT["ridge"])
    made = Bilevel(lambda x, y, b: RIDGE.upper(x, y["w"]), lambda x, y, b: RIDGE.lower(x, y["w"]))
    y = {"w": tensor(exact.y), "idle": torch.ones(3, dtype=F64)}
    found = hypergradient(made, tensor(AT["ridge"]), y)
    assert far(found.grad, exact.gradient) < 1e-8
    assert torch.equal(found.adjoint["idle"], torch.zeros(3, dtype=F64))


def tree_problem() -> tuple[Bilevel, Any, Any]:
    """Both variables nested, with scalars, matrices and an empty leaf."""
    r = np.random.default_rng(5)
    A, B = tensor(r.normal(size=(3, 2))), tensor(r.normal(size=4))

    def lower(x: Any, y: Any, batch: Any) -> Tensor:
        W, (s, v) = y["W"], y["rest"]
        fit = ((A @ W - x["a"]) ** 2).sum() + ((v - s * B) ** 2).sum() + torch.cosh(s - x["b"][0])
        return fit + (x["b"][1].exp() * v**2).sum() + 0.1 * (W**4).sum()

    def upper(x: Any, y: Any, batch: Any) -> Tensor:
        return (y["W"].sin().sum() + y["rest"][0] ** 2 + y["rest"][1].cos().sum()) * x["b"][0] + (x["a"] ** 2).sum()

    x = {"a": tensor(r.normal(size=(3, 2))), "b": (torch.tensor(0.8, dtype=F64), tensor(r.normal(size=4)))}
    y = {"W": torch.zeros(2, 2, dtype=F64), "rest": [torch.tensor(0.5, dtype=F64), torch.zeros(4, dtype=F64)]}
    return Bilevel(upper, lower), x, y


def test_pytrees() -> None:
    made, x, start = tree_problem()
    upper = dense.on_vectors(lambda a, b: made.upper(a, b, None), x, start)
    lower = dense.on_vectors(lambda a, b: made.lower(a, b, None), x, start)
    u, v = dense.flat(x)[0], dense.flat(start)[0]
    v = dense.solve(lower, u, v)
    found = hypergradient(made, x, dense.flat(start)[1](v))
    wanted, q = dense.gradient(upper, lower, u, v)
    assert found.grad["a"].shape == (3, 2) and found.grad["b"][0].shape == ()
    assert isinstance(found.grad["b"], tuple) and isinstance(found.adjoint["rest"], list)
    assert far(dense.flat(found.grad)[0], wanted) < 1e-8 and far(dense.flat(found.adjoint)[0], q) < 1e-8
    assert far(dense.flat(found.grad)[0], dense.sixth(dense.resolved(upper, lower, v), u)) < 1e-7


def test_batches_reach_their_functions() -> None:
    """(upper batch, lower batch), each to its own function and to no other."""
    exact = RIDGE.exact(AT["ridge"])
    A, b, C, c = (tensor(a) for a in (RIDGE.A, RIDGE.b, RIDGE.C, RIDGE.c))

    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * ((batch["A"] @ y - batch["b"]) ** 2).sum() + 0.5 * (x.exp() * y**2).sum()

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * ((batch[0] @ y - batch[1]) ** 2).sum() + 0.5 * RIDGE.rho * (x**2).sum()

    found = hypergradient(Bilevel(upper, lower), tensor(AT["ridge"]), tensor(exact.y), ((C, c), {"A": A, "b": b}))
    assert far(found.grad, exact.gradient) < 1e-8


@pytest.mark.parametrize("free", [0.0, 1.0])
@pytest.mark.parametrize("adjoint", ["default", "cg", "minres"])
def test_singular_hessian(free: float, adjoint: str) -> None:
    """T1 of the page, d = 6: consistent where y_2 = x; elsewhere the implicit function theorem says nothing: flag."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * ((x - y[3:]) ** 2).sum() + 0.5 * ((y[:3] - 1) ** 2).sum()

    made = Bilevel(upper, lambda x, y, b: 0.5 * (y[:3] ** 2).sum() - x @ y[:3])
    y = torch.cat([x, x + free])
    if not free:
        found = hypergradient(made, x, y, adjoint=ADJOINTS[adjoint])
        assert far(found.grad, x - 1) < 1e-10 and not found.adjoint[3:].any()
        return
    with pytest.raises(SolveError):
        hypergradient(made, x, y, adjoint=ADJOINTS[adjoint])
    found = hypergradient(made, x, y, adjoint=ADJOINTS[adjoint], on_failure="ignore")
    assert bool(found.failed)


@pytest.mark.parametrize("diagonal", [(1.0, -1.0, 2.0), (-1.0, -1.0, -1.0), (5.0, 4.0, -1e-3)])
def test_indefinite_hessian(diagonal: tuple[float, ...]) -> None:
    """A saddle is no minimiser: said by name, damping suggested, and nothing silently returned."""
    D = torch.tensor(diagonal, dtype=F64)
    made = Bilevel(lambda x, y, b: (y**2 / 2).sum() + y.sum(), lambda x, y, b: 0.5 * (D * y**2).sum() - x @ y)
    x = torch.tensor([1.0, 0.3, -0.4], dtype=F64)
    with pytest.raises(SolveError, match="damping"):
        hypergradient(made, x, x / D)
    found = hypergradient(made, x, x / D, on_failure="ignore")
    assert bool(found.failed) and not bool(found.converged)
    found = hypergradient(made, x, x / D, on_failure="nan")
    assert torch.isnan(found.grad).all()
    damping = 1.5
    helped = hypergradient(made, x, x / D, adjoint=Implicit(CG(rtol=TIGHT), damping=damping))
    assert far(helped.grad, (x / D + 1) / (D + damping)) < 1e-10


@pytest.mark.parametrize("solver", [None, Cholesky(), LU(), QR()])
def test_indefinite_and_dense(solver: Any) -> None:
    """A direct solver holds the whole matrix, and so can tell; Neumann's series runs away."""
    D, x = torch.tensor([1.0, -1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.3, -0.4], dtype=F64)
    made = Bilevel(lambda x, y, b: (y**2 / 2).sum() + y.sum(), lambda x, y, b: 0.5 * (D * y**2).sum() - x @ y)
    with pytest.raises(SolveError, match="damping"):
        hypergradient(made, x, x / D, adjoint=Implicit(solver))
    with pytest.warns(SolveWarning):
        hypergradient(made, x, x / D, adjoint=Neumann(50))


def test_damping_with_equalities() -> None:
    """Damping makes the Hessian definite, so it belongs to its block alone: E q = 0 stays."""
    e, exact = np.exp(AT["equal"]), EQUAL.exact(AT["equal"])
    K = np.block([[EQUAL.Q + np.diag(e + 0.5), EQUAL.E.T], [EQUAL.E, np.zeros((2, 2))]])
    q, m = np.split(np.linalg.solve(K, np.append(EQUAL.C.T @ (EQUAL.C @ exact.y - EQUAL.c), [0.0, 0.0])), [5])
    found = hypergradient(
        problem("equal")[1], tensor(AT["equal"]), tensor(exact.y), adjoint=Implicit(LU(), damping=0.5)
    )
    assert far(found.adjoint, q) < 1e-10
    assert far(found.grad, EQUAL.rho * AT["equal"] - e * exact.y * q + EQUAL.W.T @ m) < 1e-10


def test_damping_with_a_prox() -> None:
    """In units of the Hessian on the support, not of the proximal step."""
    at, exact = AT["net"], NET.exact(AT["net"])
    e, S = np.exp(at), np.flatnonzero(exact.y)
    q = np.zeros(6)
    H = NET.A[:, S].T @ NET.A[:, S] + (e[-1] + 0.5) * np.eye(S.size)
    q[S] = np.linalg.solve(H, (NET.C.T @ (NET.C @ exact.y - NET.c))[S])
    wanted = NET.rho * at - np.append(e[:-1] * np.sign(exact.y) * q, e[-1] * exact.y @ q)
    found = hypergradient(problem("net")[1], tensor(at), tensor(exact.y), adjoint=Implicit(LU(), damping=0.5))
    assert far(found.grad, wanted) < 1e-10


@pytest.mark.parametrize("damping", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_damping(name: str, damping: float) -> None:
    P, made, at = problem(name)
    x, y = tensor(at), tensor(P.exact(at).y)
    wanted, q = dense.gradient(P.upper, P.lower, x, y, damping)
    for solver in (CG(rtol=TIGHT), MINRES(rtol=TIGHT), LU()):
        found = hypergradient(made, x, y, adjoint=Implicit(solver, damping=damping))
        assert far(found.grad, wanted) < 1e-10 and far(found.adjoint, q) < 1e-10


def test_gradient_inside_an_objective() -> None:
    """`lower` takes a gradient step of its own by autograd, `upper` a gradient penalty: both are plain functions."""
    P, _, at = problem("logistic")
    x, start = tensor(at), tensor(P.exact(at).y)

    def lower(x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        (g,) = torch.autograd.grad((y**4).sum() / 4, y, create_graph=True)  # y^3
        return P.lower(x, y - 0.1 * g)

    def upper(x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        (g,) = torch.autograd.grad(P.upper(x, y), y, create_graph=True)
        return (g**2).sum()

    y = dense.solve(lambda x, y: P.lower(x, y - 0.1 * y**3), x, start)
    C, c = tensor(P.C), tensor(P.c)
    wanted, _ = dense.gradient(
        lambda x, y: ((C.T @ (C @ y - c)) ** 2).sum(), lambda x, y: P.lower(x, y - 0.1 * y**3), x, y
    )
    assert far(hypergradient(Bilevel(upper, lower), x, y).grad, wanted) < 1e-8
