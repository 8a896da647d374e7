"""HOAG and ImplicitSGD on modules, pytrees and float32, next to the same run on plain tensors.

Oracles: the plain float64 run, which has tests of its own; closed forms of method_toys.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from difflayers.bilevel import HOAG, Bilevel, ImplicitSGD, minimize
from difflayers.implicit import Implicit
from difflayers.linalg import CG, MINRES
from tests.bilevel.method_toys import Quadratic, convex_not_strongly, start, tensor

Q = Quadratic.random(3)
METHODS = {
    "HOAG": (HOAG, {"lipschitz": 0.3}),
    "ImplicitSGD": (ImplicitSGD, {"step": 0.2, "step_lower": 0.5, "inner_steps": 3}),
    "ImplicitSGD, Adam": (
        ImplicitSGD,
        {name: lambda p: torch.optim.Adam(p, lr=0.05) for name in ("optimizer", "optimizer_lower")},
    ),
}


class Weights(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.first, self.rest = (nn.Parameter(v.clone()) for v in (value[:1], value[1:]))

    def forward(self):
        return torch.cat([self.first, self.rest])


@pytest.mark.parametrize("name", METHODS)
def test_modules_and_pytrees_run_as_tensors_do(name):
    method, options = METHODS[name]
    p, (x, y) = Q.problem(), start(0, 3, 4)
    plain = method(p, x, y, **options)
    x_module, y_module = Weights(x), Weights(y)
    modules = method(
        Bilevel(lambda x, y, b: p.upper(x(), y(), b), lambda x, y, b: p.lower(x(), y(), b)),
        x_module,
        y_module,
        **options,
    )
    trees = method(
        Bilevel(lambda x, y, b: p.upper(x["x"], torch.cat(y), b), lambda x, y, b: p.lower(x["x"], torch.cat(y), b)),
        {"x": x}, (y[:1], y[1:]), **options,
    )  # fmt: skip
    for _ in range(5):
        a, b, c = plain.step(), modules.step(), trees.step()
        assert abs(a.upper - b.upper) < 1e-10 and abs(a.upper - c.upper) < 1e-10
    assert modules.x is x_module and modules.y is y_module
    np.testing.assert_allclose(x_module().detach(), plain.x, rtol=1e-9)
    np.testing.assert_allclose(torch.cat(trees.y), plain.y, rtol=1e-9)
    assert x_module.first.grad is None and not any(v.requires_grad for v in modules.state.values())


@pytest.mark.parametrize("name", METHODS)
def test_single_precision_stays_and_ends_near_the_optimum(name):
    method, options = METHODS[name]
    q = Quadratic.random()
    H, B, A, t = (tensor(a).float() for a in (q.H, q.B, q.A, q.t))
    problem = Bilevel(
        lambda x, y, b: (A @ y - t).square().sum() / 2 + q.rho * x.square().sum() / 2,
        lambda x, y, b: y @ H @ y / 2 - y @ B @ x,
    )
    x, y = (v.float() for v in start(0, 3, 4))
    algo = method(problem, x, y, **options)
    with torch.no_grad():
        minimize(algo, 200 if "Adam" in name else 100, progress=False)
    assert all(value.dtype == torch.float32 for value in algo.state.values())
    # Adam with a constant rate stays within a multiple of it
    assert np.linalg.norm(algo.x.numpy() - q.optimum[0]) < (0.05 if "Adam" in name else 5e-3)


def test_hessian_that_is_singular_needs_an_adjoint_that_takes_it():
    """T1: y_2 is not in f, and F wants it to be x: no adjoint exists, damped or not it says nothing of y_2."""
    x, y = torch.zeros(2, dtype=torch.float64), (tensor([1.0, 1.0]), tensor([2.0, 2.0]))
    with pytest.raises(RuntimeError, match="damping"):
        HOAG(convex_not_strongly(2), x, y).step()
    algo = HOAG(convex_not_strongly(2), x, y, adjoint=Implicit(CG(), damping=1e-2))
    stats = algo.step()
    assert torch.isfinite(stats.upper)
    assert HOAG(Q.problem(), *start(0, 3, 4), adjoint=Implicit(MINRES())).step().products > 0
