"""A blind oracle of problems with blocks, and of methods that take them or solve both levels in turn.

Oracles, written down first. ``blocks=m`` is m separate problems: closed forms of each, and the mean of their gradients.
Optima of methods by hand: ``f_i = a_i |y|^2 / 2 - x'y``, ``F_i = |y - t_i|^2 / 2 + rho |x|^2 / 2`` has
``y_i = x / a_i`` and ``x = mean(t_i / a_i) / (mean(1 / a_i^2) + rho)``; ``f = y'Hy / 2 - x'y`` with the same F has
``(H^-2 + rho) x = H^-1 t``; ``f = e^y + y^2 / 2 - x y``, ``F = (y - 1)^2`` has ``y = 1`` at ``x = e + 1``.
A method that was saved and loaded, or that met an exception, goes on as its twin that was not.
"""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch

from difflayers import SolveError
from difflayers.bilevel import BOREP, BSVRB, HOAG, MAID, ArgminLayer, Bilevel, ImplicitSGD, hypergradient
from difflayers.implicit import Implicit, Neumann
from difflayers.linalg import CG


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


CURVES = tensor(1.0, 2.0, 0.5, 1.5)
TARGETS = tensor([1.0, -2.0], [0.5, 0.3], [-1.0, 2.0], [2.0, 1.0])
RHO = 0.3


def pull(x, y, batch):
    t = TARGETS if batch is None else TARGETS[batch]
    return (y - t).square().sum(1) / 2 + RHO * x.square().sum() / 2


def bowls(x, y, batch):
    return (CURVES if batch is None else CURVES[batch]) * y.square().sum(1) / 2 - y @ x


BOWLS = Bilevel(pull, bowls, blocks=4)
BEST = (TARGETS / CURVES[:, None]).mean(0) / ((1 / CURVES.square()).mean() + RHO)


def free(x):
    return torch.stack([x / a for a in CURVES])


def boxed(x):
    return torch.stack([torch.minimum(torch.maximum(x / a, -x[0]), x[0]) for a in CURVES])


@pytest.mark.parametrize("solution", [free, boxed])
def test_blocks_are_separate_problems(solution):
    """Also with a box whose size is x[0]."""
    set_of = {} if solution is free else {"project_lower": lambda y, x: torch.minimum(torch.maximum(y, -x[0]), x[0])}
    problem, x = Bilevel(pull, bowls, blocks=4, **set_of), tensor(0.7, -1.1).requires_grad_()
    y = solution(x)
    value = (y - TARGETS).square().sum(1).div(2).mean() + RHO * x.square().sum() / 2
    expected = torch.autograd.grad(value, x)[0]
    got = hypergradient(problem, x.detach(), y.detach())
    assert torch.allclose(got.grad, expected, atol=1e-10) and torch.allclose(got.value, value.detach())
    layer = ArgminLayer(problem)(x, init=zeros(4, 2))
    assert torch.allclose(layer, y, atol=1e-9)
    assert torch.allclose(torch.autograd.grad(pull(x, layer, None).mean(), x)[0], expected, atol=1e-9)


def weighted(x, y, batch):
    return batch * (y - x).square().sum(1) / 2


def last(x, y, batch):
    return y.sum(1)


@pytest.mark.parametrize("weight", [-2.0, 0.0, float("nan")])
def test_one_bad_block(weight):
    """It is named, and the others of a layer are right."""
    problem, x, weights = Bilevel(last, weighted, blocks=3), tensor(1.0, 2.0), tensor(1.0, weight, 3.0)
    y = x.expand(3, 2).clone()
    assert torch.allclose(hypergradient(problem, x, y, (None, weights.abs().nan_to_num() + 1)).grad, tensor(1.0, 1.0))
    with pytest.raises(SolveError, match="1"):
        hypergradient(problem, x, y, (None, weights))
    if weight == 0:
        return  # every y is a minimum
    layer = ArgminLayer(problem, on_failure="nan")(x, weights, init=zeros(3, 2))
    assert torch.allclose(layer[::2], y[::2]) and layer[1].isnan().all()


def test_shapes_of_blocks():
    x, y = tensor(1.0, 2.0), tensor(1.0, 2.0).expand(3, 2).clone()
    with pytest.raises(ValueError, match="upper"):
        hypergradient(Bilevel(lambda x, y, batch: y.sum(), lambda x, y, b: (y - x).square().sum(1), blocks=3), x, y)
    with pytest.raises(ValueError, match="y"):
        hypergradient(Bilevel(last, lambda x, y, b: (y - x).square().sum(1), blocks=4), x, y)
    for wrong in (0, True, 1.0, -1):
        with pytest.raises(ValueError, match="blocks"):
            Bilevel(last, weighted, blocks=wrong)


def test_blocks_of_trees():
    """a = p, b = q sum(a): of sum(a) + b the gradient is 1 + q in p, and sum(p) in q."""
    problem = Bilevel(
        lambda x, y, batch: y["a"].sum(1) + y["b"],
        lambda x, y, batch: (y["a"] - x["p"]).square().sum(1) + (y["b"] - x["q"] * y["a"].sum(1)).square(),
        blocks=3,
    )
    x = {"p": tensor(1.0, 2.0), "q": torch.tensor(2.0, dtype=torch.float64)}
    y = ArgminLayer(problem)(x, init={"a": zeros(3, 2), "b": zeros(3)})
    assert torch.allclose(y["a"], x["p"].expand(3, 2)) and torch.allclose(y["b"], torch.full_like(y["b"], 6.0))
    got = hypergradient(problem, x, y).grad
    assert torch.allclose(got["p"], tensor(3.0, 3.0)) and torch.allclose(got["q"], torch.full_like(got["q"], 3.0))


H, T = tensor([2.0, 0.5], [0.5, 1.0]), tensor(1.0, -2.0)
QUADRATIC = Bilevel(
    lambda x, y, batch: (y - T).square().sum() / 2 + RHO * x.square().sum() / 2,
    lambda x, y, batch: y @ H @ y / 2 - x @ y,
)
INVERSE = torch.linalg.inv(H)
BEST_QUADRATIC = torch.linalg.solve(INVERSE @ INVERSE + RHO * torch.eye(2, dtype=torch.float64), INVERSE @ T)
EXPONENTIAL = Bilevel(
    lambda x, y, batch: (y - 1).square().sum(),
    lambda x, y, batch: (y.exp() - x * y).sum() + y.square().sum() / 2,
)
BEST_EXPONENTIAL = tensor(1.0).exp() + 1
exact = partial(ImplicitSGD, step=0.3, step_lower=0.4, adjoint=Implicit(CG()))
METHODS = {
    "hoag": (partial(HOAG, QUADRATIC, zeros(2), zeros(2)), 60, BEST_QUADRATIC, 1e-5),
    "hoag exponential": (partial(HOAG, EXPONENTIAL, tensor(1.0), zeros(1)), 60, BEST_EXPONENTIAL, 1e-5),
    "maid": (partial(MAID, QUADRATIC, zeros(2), zeros(2), tol=1e-6), 60, BEST_QUADRATIC, 1e-4),
    "maid exponential": (partial(MAID, EXPONENTIAL, tensor(1.0), zeros(1), tol=1e-6), 60, BEST_EXPONENTIAL, 1e-4),
    "implicit sgd": (partial(exact, QUADRATIC, zeros(2), zeros(2)), 100, BEST_QUADRATIC, 1e-4),
    "implicit sgd blocks": (
        partial(exact, BOWLS, zeros(2), zeros(4, 2), adjoint=Neumann(60, step=0.4)),
        80,
        BEST,
        1e-4,
    ),
    "borep": (partial(BOREP, QUADRATIC, zeros(2), zeros(2)), 900, BEST_QUADRATIC, 2e-2),
    "bsvrb": (partial(BSVRB, BOWLS, zeros(2), zeros(4, 2), step=0.1), 400, BEST, 1e-3),
}


@pytest.mark.parametrize("name", METHODS)
def test_optima_by_hand(name):
    make, steps, best, tol = METHODS[name]
    algo = make()
    for _ in range(steps):
        algo.step()
    assert float((algo.x - best).abs().max()) <= tol * float(best.abs().max())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded(name):
    make = METHODS[name][0]
    algo, other = make(), make()
    for _ in range(1 + len(name) % 7):  # some number of steps
        algo.step()
    other.step()
    file = io.BytesIO()
    torch.save(algo.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        a, b = algo.step(), other.step()
        assert same(vars(a), vars(b))
        assert same(algo.state_dict(), other.state_dict()) and same(algo.counts, other.counts)


class BoomError(Exception):
    """Raised in the middle of a step."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [1, 2])
def test_exception_in_a_step(name, at):
    make = METHODS[name][0]
    problem, left = make.args[0], [0]

    def watched(function):
        def call(x, y, batch):
            left[0] -= 1
            if left[0] == 0:
                raise BoomError
            return function(x, y, batch)

        return call

    watching = Bilevel(watched(problem.upper), watched(problem.lower), blocks=problem.blocks)
    algo, twin = make.func(watching, *make.args[1:], **make.keywords), make()
    for _ in range(3):
        algo.step()
        twin.step()
    left[0] = at
    with pytest.raises(BoomError):
        algo.step()
    assert same(algo.state_dict(), twin.state_dict())
    algo.step()
    twin.step()
    assert same(algo.state_dict(), twin.state_dict())


def test_blocks_that_are_not_sampled_rest():
    algo = BSVRB(BOWLS, zeros(2), zeros(4, 2))
    generator, average = torch.Generator().manual_seed(0), zeros(2)
    for k in range(350):
        index = torch.randperm(4, generator=generator)[:2]
        rest, before = [i for i in range(4) if i not in index.tolist()], algo.y
        algo.step(index, index, blocks=index)
        assert torch.equal(before[rest], algo.y[rest])
        average = average + algo.x * (k >= 200) / 150
    assert float((average - BEST).abs().max()) < 0.1 * float(BEST.abs().max())
