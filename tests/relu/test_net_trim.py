"""Net-Trim. Oracles: CVXPY with Clarabel on the program of the paper, and responses of the layers themselves."""

import copy

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers import SolveError, Status
from difflayers.relu import net_trim, net_trim_weights, net_trim_weights_ex

FLOAT = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def program(X: Tensor, Y: Tensor, tolerance: float, *, relu: bool = True, free: int = 0) -> float:
    """The optimal value."""
    on = (Y > 0).numpy() if relu else np.ones(Y.shape, dtype=bool)
    U = cp.Variable((Y.shape[1], X.shape[1]))
    V = X.numpy() @ U.T
    miss = cp.multiply(on, V - Y.numpy())
    radius = tolerance * float(np.linalg.norm(Y.numpy()[on]))
    constraints = [cp.norm(miss, "fro") <= radius if radius > 0 else miss == 0]
    if not on.all():
        constraints.append(cp.multiply(~on, V) <= 0)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(U[:, : X.shape[1] - free]))), constraints)
    problem.solve(cp.CLARABEL, tol_gap_abs=1e-8, tol_gap_rel=1e-8, tol_feas=1e-8)
    return float(problem.value)


def violations(U: Tensor, X: Tensor, Y: Tensor, tolerance: float, *, relu: bool = True) -> tuple[float, float]:
    """By how much the error is too large, and by how much silent responses speak, relative to all responses."""
    on = Y > 0 if relu else torch.ones_like(Y, dtype=torch.bool)
    V, size = X @ U.mT, float(Y[on].norm())
    silent = float(V[~on].max()) if bool((~on).any()) else 0.0
    return float((V - Y)[on].norm()) / size - tolerance, silent / size


SHAPES = [(40, 6, 4), (60, 30, 8), (12, 20, 3), (30, 120, 4), (1, 5, 2), (25, 1, 3)]


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.1, 0.6])
@pytest.mark.parametrize(("samples", "inputs", "neurons"), SHAPES)
def test_weights_are_optimal(samples: int, inputs: int, neurons: int, tolerance: float):
    X = normal(samples + inputs, samples, inputs)
    W = normal(neurons, neurons, inputs)
    for relu, free in ((True, 0), (False, 0), (True, 1)):
        if free and inputs == 1:
            continue
        X = torch.cat([X[:, : inputs - free], torch.ones(samples, free, dtype=FLOAT)], 1)
        Y = X @ W.mT
        if not bool((Y > 0).any()):
            continue
        found = net_trim_weights_ex(X, Y, tolerance, relu=relu, unpenalized=free)
        assert int(found.status) == Status.CONVERGED
        value = float(found.value[:, : inputs - free].abs().sum())
        best = program(X, Y, tolerance, relu=relu, free=free)
        assert value == pytest.approx(best, rel=1e-6, abs=1e-8)
        assert value <= float(W[:, : inputs - free].abs().sum()) * (1 + 1e-9)
        assert max(violations(found.value, X, Y, tolerance, relu=relu)) < 1e-8


def test_ties_zeros_and_dead_neurons():
    X = normal(0, 20, 6).round()
    X[:, 2] = 0
    X = torch.cat([X, X[:8]])
    W = normal(1, 4, 6)
    Y = X @ W.mT
    Y[:, 1] = -1.0
    for tolerance in (0.0, 0.05, 0.4):
        found = net_trim_weights_ex(X, Y, tolerance)
        assert int(found.status) == Status.CONVERGED
        assert float(found.value.abs().sum()) == pytest.approx(program(X, Y, tolerance), rel=1e-6)
        assert bool((found.value[1] == 0).all()) and bool((found.value[:, 2] == 0).all())
        assert max(violations(found.value, X, Y, tolerance)) < 1e-8


def test_columns_and_rows_are_added_where_the_first_choice_lacks_them():
    from difflayers.relu import _net_trim_solver as solver

    X, W = normal(2, 150, 110), normal(3, 3, 110)
    Y = X @ W.mT
    on, eps = (Y > 0)[None], 0.3 * Y.clamp_min(0).norm()[None]
    whole = solver.trim(X[None], Y[None], on, eps, 0, 1e-8, 300)
    # one step of ADMM tells next to nothing
    poor = solver.trim(X[None], Y[None], on, eps, 0, 1e-8, 1)
    assert int(whole.info.status) == int(poor.info.status) == Status.CONVERGED
    assert torch.allclose(whole.U, poor.U, atol=1e-9)
    assert torch.equal(whole.U == 0, poor.U == 0)


def test_silent_responses_are_added_where_the_first_choice_lacks_them():
    # far more samples than a restricted problem takes at once
    X, W = normal(2, 800, 5), normal(3, 4, 5)
    Y = X @ W.mT
    for max_steps in (300, 1):
        found = net_trim_weights_ex(X, Y, 0.4, max_steps=max_steps)
        assert int(found.status) == Status.CONVERGED
        assert float(found.value.abs().sum()) == pytest.approx(program(X, Y, 0.4), rel=1e-6)
        assert max(violations(found.value, X, Y, 0.4)) < 1e-8


def test_larger_errors_leave_fewer_weights():
    X, W = normal(4, 80, 15), normal(5, 6, 15)
    Y = X @ W.mT
    tolerance = torch.tensor([0.01, 0.1, 0.3, 0.9, 1.0, 2.0], dtype=FLOAT)
    U = net_trim_weights(X, Y, tolerance)
    norms, counts = U.abs().sum((-2, -1)), (U != 0).sum((-2, -1))
    assert bool((norms.diff() <= 0).all()) and bool((counts.diff() <= 0).all())
    assert int(counts[-1]) == int(counts[-2]) == 0 < int(counts[-3])


def test_impossible_responses_are_found_out():
    X = -normal(6, 30, 4).abs()
    Y = normal(7, 30, 3).abs()
    mixed = normal(8, 1, 5).expand(2, 5)
    for one, responses, tolerance in (
        (X, normal(9, 30, 3), 0.3),
        (mixed, Y[:2, :1] * torch.tensor([[1.0], [-1.0]]), 0.5),
    ):
        with pytest.raises(SolveError, match="INFEASIBLE"):
            net_trim_weights(one, responses, tolerance)
    with pytest.raises(SolveError, match="INFEASIBLE"):
        net_trim_weights(X, Y - 5, 0.01, relu=False)


@pytest.mark.parametrize("relu", [True, False])
def test_derivatives_are_differences(relu: bool):
    X, W, direction = normal(10, 14, 5), normal(11, 3, 5), normal(12, 3, 5)
    Y, tolerance = X @ W.mT + 0.1 * normal(13, 14, 3), torch.tensor(0.35, dtype=FLOAT)
    Y = torch.where((X @ W.mT > 0) == (Y > 0), Y, X @ W.mT)

    def loss(*given: Tensor) -> Tensor:
        return (direction * net_trim_weights(*given, relu=relu, unpenalized=1)).sum()

    given = [t.clone().requires_grad_() for t in (X, Y, tolerance)]
    gradients = torch.autograd.grad(loss(*given), given)
    for i, gradient in enumerate(gradients):
        step = normal(20 + i, *gradient.shape)
        sides = []
        for h in (1e-6, -1e-6):
            moved = [t.detach().clone() for t in given]
            moved[i] = moved[i] + h * step
            sides.append(float(loss(*moved)))
        assert float((gradient * step).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)


def test_without_tolerance_there_is_no_derivative():
    X = normal(14, 10, 3).requires_grad_()
    U = net_trim_weights(X, X.detach() @ normal(15, 2, 3).mT, 0.0)
    with pytest.raises(SolveError, match="SINGULAR"):
        U.sum().backward()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (40, 8)),
    "linear on sequences": (lambda: nn.Linear(8, 6, bias=False), (10, 4, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"), (6, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=(2, 1), groups=2), (6, 4, 7, 6)),
    "conv2d reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", dtype=FLOAT), (6, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (4, 2, 4, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("relu", [True, False])
def test_a_layer_keeps_its_responses(name: str, relu: bool):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    x = normal(0, *shape).to(layer.weight.dtype)
    before = copy.deepcopy(layer.state_dict())
    trimmed = net_trim(layer, x, tolerance=0.2, relu=relu)
    assert type(trimmed.layer) is type(layer)
    assert trimmed.status == Status.CONVERGED
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    with torch.no_grad():
        old, new = layer(x), trimmed.layer(x)
    if relu:
        assert float(new[old <= 0].max()) < 1e-5
        old, new = old.relu(), new.relu()
    assert float((new - old).norm() / old.norm()) == pytest.approx(trimmed.error, rel=1e-4)
    assert 0.1 < trimmed.error < 0.2 + 1e-6
    assert trimmed.sparsity == pytest.approx(float((trimmed.layer.weight == 0).double().mean()), abs=1e-12)
    assert trimmed.sparsity > 0.05
    exact = net_trim(layer, x, tolerance=1e-6, relu=relu).layer
    with torch.no_grad():
        assert float(((exact(x) - layer(x))[layer(x) > 0]).abs().max()) < 1e-4


def test_batches_outputs_and_biases():
    torch.manual_seed(1)
    layer = nn.Linear(10, 4, dtype=FLOAT)
    x = normal(1, 60, 10)
    whole = net_trim(layer, x, tolerance=0.1)
    parts = net_trim(layer, (part for part in x.split(25)), layer(x).detach().split(25), 0.1)
    assert torch.equal(whole.layer.weight, parts.layer.weight)
    penalized = net_trim(layer, x, tolerance=0.1, penalize_bias=True).layer
    total = lambda one, bias: float((one.weight.abs().sum() + bias * one.bias.abs().sum()).detach())  # noqa: E731
    assert total(whole.layer, 0) < total(penalized, 0)
    assert total(penalized, 1) < total(whole.layer, 1)
    X = torch.cat([x, torch.ones(60, 1, dtype=FLOAT)], 1)
    assert total(penalized, 1) == pytest.approx(program(X, layer(x).detach(), 0.1), rel=1e-7)


def test_wrong_calls_name_the_argument():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    for match, call in {
        "layer: expected a Linear, Conv1d, Conv2d or Conv3d, got ReLU": lambda: net_trim(nn.ReLU(), x),
        r"inputs: expected shape \(N, \.\.\., 4\) as of layer": lambda: net_trim(layer, x[:, :3]),
        r"inputs: expected shape \(N, 2, HW\) as of layer": lambda: net_trim(nn.Conv2d(2, 3, 2), x),
        "inputs: expected a tensor or batches of it, got int": lambda: net_trim(layer, 3),
        "inputs: expected at least one batch, got none": lambda: net_trim(layer, []),
        "inputs: expected dtype torch.float32 as of layer.weight": lambda: net_trim(layer, x.double()),
        r"outputs: expected shape \(5, 3\) as layer makes of inputs": lambda: net_trim(layer, x, x),
        "inputs: expected finite numbers, got 20 NaN": lambda: net_trim(
            layer, x.index_fill(0, torch.tensor([1]), 0) / 0
        ),
        "tolerance: expected at least 0, got -1": lambda: net_trim(layer, x, tolerance=-1),
        "unpenalized: expected a number of columns from 0 to 4": lambda: net_trim_weights(x, x, unpenalized=5),
        "rtol: expected more than 0": lambda: net_trim_weights(x, x, rtol=0),
        "max_steps: expected an integer of at least 1": lambda: net_trim_weights(x, x, max_steps=0),
        "X: expected at least one row": lambda: net_trim_weights(x[:0], x[:0]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_weights_that_something_computes_are_refused():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="layer: expected weight to be a parameter"):
        net_trim(layer, torch.randn(10, 3, generator=torch.Generator().manual_seed(0)))
