"""The lower solution as a layer: value, Jacobian and second derivatives against closed forms by hand.

The outer objective is written on top of the layer in plain torch, so its gradient and Hessian are those of
`oracle_closed.py`. Other fixed points: `vmap` and a loop, forward and reverse mode, first and last element of a batch
in which one problem has no minimum.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, SolveWarning, Status
from difflayers.bilevel import ArgminLayer, Bilevel, hypergradient
from difflayers.implicit import Implicit, Neumann, Newton, Unrolled
from difflayers.linalg import CG, LU
from tests.bilevel import oracle_dense as dense
from tests.bilevel.oracle_cases import ADJOINTS, AT, F64, RIDGE, TIGHT, far, problem
from tests.bilevel.oracle_closed import neumann, tensor


def layer(name: str, **options: Any) -> tuple[Any, ArgminLayer, np.ndarray]:
    P, made, at = problem(name)
    size = at.size - 1 if name == "net" else at.size
    options.setdefault("init", torch.zeros(size, dtype=F64))
    return P, ArgminLayer(made, **options), at


NAMES = ["ridge", "logistic", "net", "equal"]


@pytest.mark.parametrize("name", NAMES)
def test_value_gradient_hessian(name: str) -> None:
    P, solve, at = layer(name)
    exact = P.exact(at)
    x = tensor(at).requires_grad_()
    y = solve(x)
    assert far(y, exact.y) < 1e-8
    (g,) = torch.autograd.grad(P.upper(x, y), x, create_graph=True)
    assert far(g, exact.gradient) < 1e-7
    H = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0] for one in g])
    assert far(H, exact.hessian) < 1e-6
    assert far(H, H.T) < 1e-6


@pytest.mark.parametrize("name", ["ridge", "logistic", "equal"])
def test_tight(name: str) -> None:
    """With Newton's method and a direct adjoint there is nothing left but rounding, to second order."""
    P, solve, at = layer(name, solver=Newton(), adjoint=Implicit(LU()))
    exact = P.exact(at)
    x = tensor(at).requires_grad_()
    y = solve(x)
    assert far(y, exact.y) < 1e-11
    (g,) = torch.autograd.grad(P.upper(x, y), x, create_graph=True)
    assert far(g, exact.gradient) < 1e-9
    assert far(torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0] for one in g]), exact.hessian) < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name: str) -> None:
    """Jacobians by reverse and forward mode, Hessian forward over reverse, products: the closed forms."""
    P, solve, at = layer(name)
    exact = P.exact(at)
    x = tensor(at)
    assert far(torch.func.jacrev(solve)(x), exact.jacobian) < 1e-7
    assert far(torch.func.jacfwd(solve)(x), exact.jacobian) < 1e-7
    assert far(torch.func.hessian(lambda x: P.upper(x, solve(x)))(x), exact.hessian) < 1e-6
    _, t = torch.func.jvp(solve, (x,), (torch.ones_like(x),))
    assert far(t, exact.jacobian.sum(1)) < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    _, solve, at = layer(name)
    x = tensor(at).requires_grad_()
    assert torch.autograd.gradcheck(solve, (x,), eps=1e-4, atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda x: solve(x).square().sum(), (x,), eps=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name: str) -> None:
    P, solve, at = layer(name)
    xs = tensor(at) + 0.05 * torch.randn(4, at.size, dtype=F64)
    wanted = [P.exact(one.numpy()) for one in xs]
    assert far(torch.func.vmap(solve)(xs), np.stack([one.y for one in wanted])) < 1e-8
    gradient = torch.func.vmap(torch.func.grad(lambda x: P.upper(x, solve(x))))(xs)
    assert far(gradient, np.stack([one.gradient for one in wanted])) < 1e-7


def test_one_of_a_batch_diverges() -> None:
    """Element 1 has no minimum (curvature x = -1): NaN there, exact beside it, in value and gradient."""
    made = Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: (0.5 * x * y**2 - y).sum())
    solve = ArgminLayer(made, init=torch.ones(2, dtype=F64), on_failure="nan")
    xs = torch.tensor([1.0, -1.0, 4.0], dtype=F64).requires_grad_()
    y = torch.func.vmap(solve)(xs)
    good = torch.tensor([0, 2])
    assert far(y[good], (1 / xs[good])[:, None].expand(2, 2)) < 1e-8
    assert torch.isnan(y[1]).all()
    y[good].sum().backward()
    assert xs.grad is not None and far(xs.grad[good], -2 / xs[good].detach() ** 2) < 1e-7


def test_scalars() -> None:
    made = Bilevel(lambda x, y, b: y, lambda x, y, b: 0.5 * x.exp() * (y - x.sin()) ** 2)
    solve = ArgminLayer(made, init=torch.zeros((), dtype=F64))
    x = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y = solve(x)
    assert y.shape == () and far(y, x.sin()) < 1e-9
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert far(g, x.cos()) < 1e-9
    assert far(torch.autograd.grad(g, x)[0], -x.sin()) < 1e-7


def test_batch_is_differentiable() -> None:
    """y = M^{-1} A^T b: dy/db = M^{-1} A^T, and the derivative in A by differences of the closed form."""
    exact = RIDGE.exact(AT["ridge"])
    M = RIDGE.hessian_yy(AT["ridge"])

    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * ((batch["A"] @ y - batch["b"]) ** 2).sum() + 0.5 * (x.exp() * y**2).sum()

    solve = ArgminLayer(Bilevel(RIDGE.upper, lower), init=torch.zeros(5, dtype=F64))
    A, b, x = tensor(RIDGE.A).requires_grad_(), tensor(RIDGE.b).requires_grad_(), tensor(AT["ridge"])
    y = solve(x, {"A": A, "b": b, "rows": torch.arange(3), "note": None})
    assert far(y, exact.y) < 1e-8
    v = torch.linspace(1, 2, 5, dtype=F64)
    into_A, into_b = torch.autograd.grad(y @ v, (A, b))
    assert far(into_b, RIDGE.A @ np.linalg.solve(M, v.numpy())) < 1e-7

    def closed(a: Tensor) -> Tensor:
        B = a.view(12, 5)
        return torch.linalg.solve(B.T @ B + torch.diag(x.exp()), B.T @ tensor(RIDGE.b)) @ v

    assert far(into_A.reshape(-1), dense.sixth(closed, A.detach().reshape(-1))) < 1e-7


def test_pytrees() -> None:
    """x and y nested: the structure of the start comes back, every leaf of x has its gradient."""
    A, b = tensor(RIDGE.A), tensor(RIDGE.b)
    exact = RIDGE.exact(AT["ridge"])

    def lower(x: Any, y: Any, batch: Any) -> Tensor:
        w = torch.cat([y["two"], y["one"][0][None], y["rest"].reshape(-1)])
        logs = torch.cat([x[0], x[1]["last"].reshape(-1)])
        return 0.5 * ((A @ w - b) ** 2).sum() + 0.5 * (logs.exp() * w**2).sum()

    start = {
        "two": torch.zeros(2, dtype=F64),
        "one": (torch.zeros((), dtype=F64),),
        "rest": torch.zeros(2, 1, dtype=F64),
    }
    at = tensor(AT["ridge"])
    x = (
        at[:3].clone().requires_grad_(),
        {"last": at[3:].view(1, 2).clone().requires_grad_(), "idle": torch.ones(2, dtype=F64)},
    )
    y = ArgminLayer(Bilevel(lambda x, y, b: y["one"][0], lower), init=start)(x)
    assert isinstance(y["one"], tuple) and y["rest"].shape == (2, 1)
    w = torch.cat([y["two"], y["one"][0][None], y["rest"].reshape(-1)])
    assert far(w, exact.y) < 1e-8
    first, last = torch.autograd.grad(w.sum(), (x[0], x[1]["last"]))
    assert far(torch.cat([first, last.reshape(-1)]), exact.jacobian.sum(0)) < 1e-7


def test_x_unused() -> None:
    """Zeros or None, as for any function that ignores its argument; not an error."""
    t = torch.tensor([1.0, 2.0], dtype=F64)
    solve = ArgminLayer(
        Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: ((y - t) ** 2).sum()), init=torch.zeros_like(t)
    )
    x = torch.ones(3, dtype=F64, requires_grad=True)
    y = solve(x)
    assert far(y, t) < 1e-9
    (x.sum() + y.sum()).backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_start_moves_nothing() -> None:
    """The start has no derivative, and the answer from elsewhere is the same; the call's start wins."""
    P, solve, at = layer("logistic")
    start = torch.full((4,), 3.0, dtype=F64, requires_grad=True)
    x = tensor(at).requires_grad_()
    y = solve(x, init=start)
    assert far(y, P.exact(at).y) < 1e-7
    assert torch.autograd.grad(y.sum(), start, allow_unused=True)[0] is None or not start.grad
    solve = layer("logistic", solver=Newton())[1]
    near = solve.forward_ex(x, init=tensor(P.exact(at).y))
    far_off = solve.forward_ex(x, init=start)
    assert int(near.steps) <= 2 < int(far_off.steps)
    assert bool(near.converged) and int(near.status) == Status.CONVERGED


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    P, made, at = problem(name)
    exact = P.exact(at)
    size = len(exact.y)
    solve = ArgminLayer(made, init=torch.zeros(size))
    x = tensor(at, torch.float32).requires_grad_()
    y = solve(x)
    assert y.dtype == torch.float32 and far(y, exact.y) < 1e-3
    (g,) = torch.autograd.grad(P.upper(x, y), x)
    assert g.dtype == torch.float32 and far(g, exact.gradient) < 1e-2


@pytest.mark.parametrize("adjoint", ["cg", "minres", "gmres", "lu", "cholesky"])
def test_adjoints(adjoint: str) -> None:
    P, solve, at = layer("ridge", adjoint=ADJOINTS[adjoint])
    exact = P.exact(at)
    assert far(torch.func.jacrev(solve)(tensor(at)), exact.jacobian) < 1e-7
    assert far(torch.func.hessian(lambda x: P.upper(x, solve(x)))(tensor(at)), exact.hessian) < 1e-6


def test_inexact_adjoints() -> None:
    """Neumann: K terms of the dense series; damping: the damped dense inverse; unrolling: near the closed form."""
    P, made, at = problem("ridge")
    exact, x = P.exact(at), tensor(at).requires_grad_()
    H, start = P.hessian_yy(at), torch.zeros(5, dtype=F64)
    alpha = 1 / np.linalg.eigvalsh(H)[-1]
    g = P.C.T @ (P.C @ exact.y - P.c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        for terms in (1, 3, 10):
            solve = ArgminLayer(made, init=start, adjoint=Neumann(terms, step=alpha), solver=Newton())
            (found,) = torch.autograd.grad(P.upper(x.detach(), solve(x)), x)
            assert far(found, -np.exp(at) * exact.y * neumann(H, g, alpha, terms)) < 1e-8
    solve = ArgminLayer(made, init=start, adjoint=Implicit(CG(rtol=TIGHT), damping=2.0), solver=Newton())
    (found,) = torch.autograd.grad(P.upper(x.detach(), solve(x)), x)
    assert far(found, -np.exp(at) * exact.y * np.linalg.solve(H + 2 * np.eye(5), g)) < 1e-8
    solve = ArgminLayer(made, init=start, adjoint=Unrolled(60))
    (found,) = torch.autograd.grad(P.upper(x, solve(x)), x)
    assert far(found, exact.gradient) < 1e-5


def test_captured_tensor_is_refused() -> None:
    """A parameter that comes in by closure has no way to its gradient: an error that says so, or the right one."""
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    made = Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: 0.5 * ((y - theta * x) ** 2).sum())
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    try:
        y = ArgminLayer(made, init=torch.zeros(2, dtype=F64))(x)
    except ValueError:
        return
    y.sum().backward()
    assert theta.grad is not None and far(theta.grad, x.detach()) < 1e-8


def test_failures_are_said() -> None:
    """No minimum, a saddle, not a scalar, NaN in the data, no start: named."""
    x = torch.ones(2, dtype=F64, requires_grad=True)
    start = torch.ones(2, dtype=F64)
    for lower in (
        lambda x, y, b: -(y**2).sum() + (x * y).sum(),
        lambda x, y, b: (x * y).sum(),
        lambda x, y, b: ((y - torch.nan * x) ** 2).sum(),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((SolveError, SolveWarning)):
                ArgminLayer(Bilevel(lambda x, y, b: y.sum(), lower), init=start)(x)
    with pytest.raises((ValueError, TypeError), match="lower"):
        ArgminLayer(Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: (y - x) ** 2), init=start)(x)
    with pytest.raises((ValueError, TypeError), match="init"):
        ArgminLayer(Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: ((y - x) ** 2).sum()))(x)
    with pytest.raises((ValueError, TypeError)):
        Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: ((y - x) ** 2).sum(), equality=True)


def test_contradicting_equalities() -> None:
    """y_1 = x and y_1 = x + 1 at once: infeasible or singular, not a least-squares answer in silence."""
    made = Bilevel(
        lambda x, y, b: y.sum(),
        lambda x, y, b: 0.5 * (y**2).sum(),
        constraint=lambda x, y: torch.stack([y[0] - x[0], y[0] - x[0] - 1]),
        equality=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((SolveError, SolveWarning)):
            ArgminLayer(made, init=torch.zeros(2, dtype=F64))(torch.ones(1, dtype=F64))


def test_nonlinear_equality() -> None:
    """The point of the circle |y| = x_2 next to (cos x_1, sin x_1) times 3: y = x_2 (cos x_1, sin x_1)."""

    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return 0.5 * ((y - 3 * torch.stack([x[0].cos(), x[0].sin()])) ** 2).sum()

    made = Bilevel(lambda x, y, b: y.prod(), lower, constraint=lambda x, y: (y @ y - x[1] ** 2)[None], equality=True)
    solve = ArgminLayer(made, init=torch.tensor([1.0, 1.0], dtype=F64))
    x = torch.tensor([0.6, 2.0], dtype=F64, requires_grad=True)

    def closed(x: Tensor) -> Tensor:
        return x[1] * torch.stack([x[0].cos(), x[0].sin()])

    assert far(solve(x), closed(x)) < 1e-8
    assert far(torch.func.jacrev(solve)(x), torch.func.jacrev(closed)(x)) < 1e-7
    wanted = torch.func.hessian(lambda x: closed(x).prod())(x)
    assert far(torch.func.hessian(lambda x: solve(x).prod())(x), wanted) < 1e-6
    found = hypergradient(made, x.detach(), closed(x).detach())
    assert far(found.grad, torch.func.grad(lambda x: closed(x).prod())(x)) < 1e-8


def test_network_as_the_start() -> None:
    """A module as the start: names to trained tensors, stationary, with the dense Jacobian of the trained weights."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    A, b = torch.randn(12, 2, dtype=F64), torch.randn(12, 1, dtype=F64)
    before = {name: p.clone() for name, p in net.state_dict().items()}

    def lower(x: Tensor, m: nn.Module, batch: Any) -> Tensor:
        weights = torch.cat([p.reshape(-1) for p in m.parameters()])
        return ((m(batch[0]) - batch[1]) ** 2).mean() + 0.5 * (x.exp() * weights**2).sum()

    v, back = dense.flat([p.detach() for p in net.parameters()])
    x = torch.linspace(-2, -1, v.numel(), dtype=F64, requires_grad=True)
    found = ArgminLayer(Bilevel(lambda x, m, b: m(A).sum(), lower), init=net)(x, (A, b))
    assert list(found) == list(before)
    v = torch.cat([one.detach().reshape(-1) for one in found.values()])

    def plain(u: Tensor, v: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(before, back(v), strict=True)), (A,))
        return ((out - b) ** 2).mean() + 0.5 * (u.exp() * v**2).sum()

    at = x.detach()
    assert torch.autograd.functional.jacobian(lambda v: plain(at, v), v).norm() < 1e-6
    wanted, _ = dense.gradient(lambda u, v: v.square().sum(), plain, at, dense.solve(plain, at, v))
    (g,) = torch.autograd.grad(sum(one.square().sum() for one in found.values()), x)
    assert far(g, wanted) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("adjoint", ["default", "cg", "cholesky", "lu"])
def test_saddle(adjoint: str) -> None:
    """From its start the solve slides into the saddle (0.1, 0): forward or backward says so."""
    made = Bilevel(lambda x, y, b: y.sum(), lambda x, y, b: 0.5 * (y[0] ** 2 - y[1] ** 2) + y[1] ** 4 / 4 - x @ y)
    x = torch.tensor([0.1, 0.0], dtype=F64, requires_grad=True)
    with pytest.raises(SolveError):
        ArgminLayer(made, init=torch.zeros(2, dtype=F64), adjoint=ADJOINTS[adjoint])(x).sum().backward()
