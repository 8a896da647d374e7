"""``torch.func.vmap`` over no elements; messages that name what to change; a residual that ignores its unknown.

Oracle: shapes, and the text of the message.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from difflayers import SolveWarning
from difflayers.implicit import Equality, Inequality, Neumann, Newton, Projection, argmin, nonlinear_least_squares

CONSTRAINTS = [
    None,
    Projection(lambda z, x: z.relu()),
    Equality(lambda z, x: z.sum(-1)),
    Inequality(lambda z, x: z - 1),
]


def objective(z, x):
    return (z - x).square().sum(-1) / 2 + 0.1 * z.square().square().sum(-1)


@pytest.mark.parametrize("declared", [None, (1,)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_vmap_over_no_elements(constraint, declared):
    none = torch.zeros(0, 3, dtype=torch.float64)

    def layer(x):
        return argmin(objective, torch.zeros(3).double(), (x,), constraint=constraint, arg_ndims=declared)

    assert vmap(layer)(none).shape == (0, 3)
    assert vmap(jacrev(layer))(none).shape == vmap(jacfwd(layer))(none).shape == (0, 3, 3)
    assert vmap(grad(lambda x: layer(x).sum()))(none).shape == (0, 3)


@pytest.mark.parametrize(("step", "says"), [(3.0, "step=3: expected less than 2 over"), (None, r"\(step=None\)")])
def test_neumann_names_its_step(step, says):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    sign = 1.0 if step else -1.0  # at a maximiser no step helps
    f = lambda z, x: sign * (z - x).square().sum(-1)  # noqa: E731
    z = argmin(f, torch.zeros(3).double(), (x,), solver=Newton(), adjoint=Neumann(5, step=step))
    with pytest.warns(SolveWarning, match=says):
        z.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        argmin(lambda z, x: (z - x).square().sum(-1), z.detach(), (x,), adjoint=Neumann(80)).sum().backward()


def test_a_residual_that_ignores_its_unknown():
    """Its Jacobian is zero: torch's vmap used to bring the process down there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = nonlinear_least_squares(lambda z, y: y + 0 * z[..., :1].detach(), START, (torch.ones(2, 1).double(),))
    assert torch.equal(z, START)


START = torch.zeros(2, 3, dtype=torch.float64)
