"""The lower solution as a layer where the problem has inequalities, a set of its own, or blocks.

Oracles: Clarabel through cvxpy for values and central differences of it for gradients; hypergradients at the solution
(tested against closed forms elsewhere); a loop over blocks; gradgradcheck for second derivatives.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from difflayers import SolveError, SolveWarning, Status
from difflayers.bilevel import MEHA, MFAC, ArgminLayer, Bilevel, hypergradient
from difflayers.implicit import Anderson, Implicit, Neumann, Newton, OneStep
from difflayers.linalg import MINRES
from tests.bilevel.method_toys import tensor
from tests.bilevel.ridge import F64
from tests.bilevel.test_hypergradient_blocks import HYPER, PROBLEM, A, Y, d, lower, m, single, t, tree
from tests.bilevel.test_hypergradient_inequalities import X, program, solve, upper


def test_inequalities():
    x = tensor(X).requires_grad_()
    layer = ArgminLayer(program(), init=torch.zeros(5, dtype=F64))
    solution = layer.forward_ex(x)
    y, dual = solve(X)
    np.testing.assert_allclose(solution.value.detach(), y, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(solution.multipliers.detach(), dual, rtol=1e-5, atol=1e-7)
    assert solution.multipliers[dual < 1e-6].count_nonzero() == 0
    torch.autograd.backward(program().upper(x, layer(x), None))
    expected = [(upper(X + e) - upper(X - e)) / 2e-4 for e in 1e-4 * np.eye(3)]
    np.testing.assert_allclose(x.grad, expected, rtol=1e-5, atol=1e-6)
    found = hypergradient(program(), tensor(X), solution.value.detach())
    torch.testing.assert_close(x.grad, found.grad, rtol=1e-6, atol=1e-8)
    assert gradcheck(lambda x: layer(x), (x,)) and gradgradcheck(lambda x: layer(x).square(), (x,))


def test_second_order_where_the_constraint_bends():
    """y = x0 c / |c| in the ball |y| <= x0: in closed form, so are its derivatives of any order."""
    problem = Bilevel(
        lambda x, y, b: y.sum(),
        lambda x, y, b: (y - x[1:]).square().sum() / 2,
        constraint=lambda x, y: y @ y - x[0] ** 2,
    )
    layer = ArgminLayer(problem, init=torch.zeros(3, dtype=F64))
    x = tensor([2.0, 3.0, -4.0, 12.0])

    def closed(x):
        return x[0] * x[1:] / x[1:].square().sum().sqrt()

    w = tensor([1.0, 2.0, -1.0])
    torch.testing.assert_close(layer(x), closed(x), rtol=1e-7, atol=1e-9)
    for derivative in (torch.func.jacrev, torch.func.hessian):
        got = derivative(lambda x: w @ layer(x))(x)
        torch.testing.assert_close(got, derivative(lambda x: w @ closed(x))(x), rtol=1e-5, atol=1e-7)


def test_infeasible_and_redundant():
    """y <= -1 and y >= x: infeasible at x = 0. Equalities twice over: the value is right, backward may only raise."""
    box = Bilevel(
        lambda x, y, b: y.sum(), lambda x, y, b: (y**2).sum(), constraint=lambda x, y: torch.cat([y + 1, x - y])
    )
    with pytest.raises(SolveError, match="INFEASIBLE"):
        ArgminLayer(box, init=torch.zeros(1, dtype=F64))(tensor([0.0]))
    torch.testing.assert_close(
        ArgminLayer(box, init=torch.zeros(1, dtype=F64))(tensor([-2.0])), tensor([-1.0]), rtol=1e-6, atol=0
    )
    twice = Bilevel(
        lambda x, y, b: y.sum(),
        lambda x, y, b: (y**2).sum(),
        constraint=lambda x, y: (y.sum() - x).repeat(2),
        equality=True,
    )
    x = tensor(3.0).requires_grad_()
    y = ArgminLayer(twice, init=torch.zeros(3, dtype=F64))(x)
    torch.testing.assert_close(y, torch.ones(3, dtype=F64), rtol=1e-7, atol=0)
    try:
        y.sum().backward()
    except SolveError:
        return
    torch.testing.assert_close(x.grad, tensor(1.0))


@pytest.mark.parametrize("adjoint", [None, Neumann(400), OneStep()], ids=str)
def test_projection(adjoint):
    """Bounds y <= x of a quadratic with coupled variables: the derivative at the solution by `hypergradient`."""
    p = program()
    problem = Bilevel(
        lambda x, y, b: (y * torch.arange(5)).sum(),
        lambda x, y, b: p.lower(tensor(X), y, None) / 20,
        project_lower=lambda y, x: torch.minimum(y, x),
    )
    x = tensor([0.2, 0.3, 0.1, 2.0, -0.5]).requires_grad_()
    y = ArgminLayer(problem, init=torch.zeros(5, dtype=F64), adjoint=adjoint)(x)
    held = (y == x).detach()
    assert 1 < held.sum() < 5
    problem.upper(x, y, None).backward()
    expected = hypergradient(problem, x.detach(), y.detach()).grad
    if isinstance(adjoint, OneStep):
        assert (x.grad[~held] == 0).all() and not torch.allclose(x.grad, expected, rtol=1e-3)
    else:
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_maximiser_is_not_returned_as_a_solution():
    """x y^2 / 2 - 3 y + |y| has no minimum for x < 0; y = 4 / x is where its smooth part is largest."""
    problem = Bilevel(
        lambda x, y, b: y,
        lambda x, y, b: x * y**2 / 2 - 3 * y,
        prox_lower=lambda v, x, step: v.sign() * (v.abs() - step).clamp_min(0),
    )
    at_it = ArgminLayer(problem, init=tensor(-4.0), on_failure="nan")
    assert at_it.forward_ex(tensor(-1.0)).status == Status.SINGULAR and at_it(tensor(-1.0)).isnan()
    for solver in (None, Anderson(), Newton()):
        layer = ArgminLayer(problem, init=tensor(-3.9), solver=solver)
        torch.testing.assert_close(layer(tensor(2.0)), tensor(1.0), rtol=1e-6, atol=0)
        with pytest.raises(SolveError):
            layer(tensor(-1.0))
        assert layer.forward_ex(tensor(-1.0)).status > Status.MAX_STEPS
        if solver is not None:  # inside of transforms nobody looks at where other solvers end
            continue
        both = torch.func.vmap(lambda x, layer=layer: layer.forward_ex(x).value)(tensor([2.0, -1.0, 1.0]))
        torch.testing.assert_close(both[[0, 2]], tensor([1.0, 2.0]), rtol=1e-6, atol=0)
        masked = ArgminLayer(problem, init=tensor(-3.9), solver=solver, on_failure="nan")
        x = tensor([2.0, -1.0, 1.0]).requires_grad_()
        values = torch.func.vmap(masked)(x)
        assert values.isnan().tolist() == [False, True, False]
        (slopes,) = torch.autograd.grad(values[[0, 2]].sum(), x)
        torch.testing.assert_close(slopes[[0, 2]], tensor([-0.5, -2.0]), rtol=1e-5, atol=0)


def test_captured_tensors_are_named_after_their_function():
    c = tensor(1.0).requires_grad_()
    both = lambda x, y, b: y.sum(), lambda x, y, b: (y - x).square().sum()
    x, y = tensor([1.0, 2.0]), torch.zeros(2, dtype=F64)
    for part, function in (
        ("prox_lower", lambda v, x, step: v * c),
        ("project_lower", lambda y, x: y * c),
        ("constraint", lambda x, y: y * c),
    ):
        with pytest.raises(ValueError, match=f"^{part}: "):
            ArgminLayer(Bilevel(*both, **{part: function}), init=y)(x)


@pytest.mark.parametrize("adjoint", [None, Implicit(MINRES()), Neumann(4, 0.02)], ids=str)
def test_blocks_are_a_loop(adjoint):
    x = HYPER.clone().requires_grad_()
    layer = ArgminLayer(PROBLEM, init=tree(Y), adjoint=adjoint)
    y = layer(x)
    alone = [ArgminLayer(single(i), init=tree(Y[i]), adjoint=adjoint)(x) for i in range(m)]
    for name in ("a", "b"):
        torch.testing.assert_close(y[name], torch.stack([one[name] for one in alone]), rtol=1e-8, atol=1e-9)
    (got,) = torch.autograd.grad(PROBLEM.upper(x, y, None).mean(), x)
    each = [torch.autograd.grad(single(i).upper(x, alone[i], None), x)[0] for i in range(m)]
    torch.testing.assert_close(got, torch.stack(each).mean(0), rtol=1e-6, atol=1e-8)
    at = {name: value.detach() for name, value in y.items()}
    found = hypergradient(PROBLEM, HYPER, at, adjoint=adjoint).grad
    torch.testing.assert_close(got, found, rtol=1e-6, atol=1e-7)


def test_second_derivatives_and_transforms_of_blocks():
    layer = ArgminLayer(PROBLEM, init=tree(Y))
    x = (HYPER / 2).requires_grad_()
    assert gradgradcheck(lambda x: layer(x)["a"], (x,))
    batch = torch.func.vmap(lambda x: layer(x)["a"])(torch.stack([HYPER, HYPER / 2]))
    torch.testing.assert_close(batch, torch.stack([layer(HYPER)["a"], layer(HYPER / 2)["a"]]), rtol=1e-8, atol=1e-9)


def test_one_bad_block():
    """One without a minimum: the others are the same to the last bit, and so are their gradients under "nan"."""
    second = torch.arange(m) == 1

    def spoiled(x, y, b):
        return torch.where(second, y["a"].sum(-1) - x.exp().sum() * y["a"].square().sum(-1), lower(x, y, A, t))

    problem = Bilevel(PROBLEM.upper, spoiled, blocks=m)
    good = ArgminLayer(PROBLEM, init=tree(Y))(HYPER)
    with pytest.raises(SolveError, match=r"1 of 4 .*\(elements 1\)"):
        ArgminLayer(problem, init=tree(Y))(HYPER)
    x = HYPER.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        solution = ArgminLayer(problem, init=tree(Y), on_failure="ignore").forward_ex(x)
        masked = ArgminLayer(problem, init=tree(Y), on_failure="nan")(x)
    assert solution.failed.tolist() == [False, True, False, False]
    others = torch.tensor([0, 2, 3])
    for y in (solution.value, masked):
        assert all(torch.equal(y[name][others], good[name][others]) for name in ("a", "b"))
    assert masked["b"][1].isnan().all()
    (got,) = torch.autograd.grad(masked["b"][others].sum(), x)
    x = HYPER.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ArgminLayer(PROBLEM, init=tree(Y))(x)["b"][others].sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_blocks_with_a_prox_of_their_own_step():
    """Soft thresholds of |y_i - c_i|^2 k_i / 2 at x / k_i, curvatures k that differ by 1000 from block to block."""
    k, c = tensor([1.0, 30.0, 1000.0]), torch.linspace(-2, 2, 12, dtype=F64).reshape(3, 4)
    problem = Bilevel(
        lambda x, y, b: y.sum(-1),
        lambda x, y, b: k * (y - c).square().sum(-1) / 2,
        prox_lower=lambda v, x, step: v.sign() * (v.abs() - step * x).clamp_min(0),
        blocks=3,
    )
    x = tensor(0.7).requires_grad_()
    y = ArgminLayer(problem, init=torch.zeros(3, 4, dtype=F64))(x)
    bound = (x / k).unsqueeze(-1)
    torch.testing.assert_close(y, c.sign() * (c.abs() - bound).clamp_min(0), rtol=1e-7, atol=1e-9)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad((c.sign() * (c.abs() - bound).clamp_min(0)).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_bad_input_is_named():
    soft = PROBLEM.lower
    mixed = Bilevel(PROBLEM.upper, soft, prox_lower=lambda v, x, step: v, blocks=m)
    with pytest.raises(ValueError, match="prox_lower: expected tensors of y with as many dimensions"):
        ArgminLayer(mixed, init=tree(Y))(HYPER)
    with pytest.raises(ValueError, match=r"init\['a'\]: expected shape \(4, ...\), a row a block"):
        ArgminLayer(PROBLEM, init=tree(Y[:2]))(HYPER)
    with pytest.raises(ValueError, match=r"adjoint: .* or blocks, got MFAC"):
        ArgminLayer(PROBLEM, adjoint=MFAC(2))
    with pytest.raises(ValueError, match="without a prox, got OneStep"):
        ArgminLayer(PROBLEM, adjoint=OneStep())
    with pytest.raises(ValueError, match="adjoint: expected Implicit with a constraint, got Neumann"):
        ArgminLayer(program(), adjoint=Neumann(3))
    with pytest.raises(ValueError, match="solver: expected"):
        ArgminLayer(program(), init=torch.zeros(5, dtype=F64), solver=Anderson())(tensor(X))
    assert d == 5


def test_polish_goes_through_the_layer():
    """MEHA on the projected problem, then the lower problem solved: y = min(3, x) of (y - 3)^2 / 2 on y <= x."""
    problem = Bilevel(
        lambda x, y, b: (y - 2).square().sum(),
        lambda x, y, b: (y - 3).square().sum() / 2,
        project_lower=lambda y, x: torch.minimum(y, x),
    )
    algo = MEHA(problem, tensor([1.5]), tensor([0.0]))
    algo.step()
    x = algo.x.clone()
    torch.testing.assert_close(algo.polish(), x, rtol=1e-8, atol=0)
