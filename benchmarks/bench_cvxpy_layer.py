"""CVXPY problems as layers, forward and backward: ours against cvxpylayers.

Batches of 32, float64: a linear program in its right-hand sides and costs, a portfolio with a second-order cone, an
entropy maximisation with exponential cones. cvxpylayers runs with its default solver (diffcp) at its default tolerance
and at 1e-10. The reference knows no cones: with the active rows from Clarabel at 1e-12 it takes Newton's method on the
optimality conditions in the problem's own variables to rounding, and its derivative is that of one more step.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.conic import CvxpyLayer

BATCH, N = 32, 10
TARGET = 1e-6


@dataclass(frozen=True)
class Example:
    """A problem, its parameters' values, and the same in plain torch.

    `rows(x, *values)` are zero at equalities and at most zero at inequalities; `equalities` of them come first.
    """

    name: str
    problem: cp.Problem
    parameters: list[cp.Parameter]
    variable: cp.Variable
    values: list[Tensor]
    objective: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    equalities: int


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def examples() -> Iterator[Example]:
    G = normal(1, 2 * N, N)
    x, c, h = cp.Variable(N), cp.Parameter(N), cp.Parameter(2 * N)
    box = torch.eye(N, dtype=torch.float64)
    yield Example(
        "linear program",
        cp.Problem(cp.Minimize(c @ x), [G.numpy() @ x <= h, x <= 5, x >= -5]),
        [c, h],
        x,
        [normal(2, BATCH, N), 1 + normal(3, BATCH, 2 * N).abs()],
        lambda x, c, h: c @ x,
        lambda x, c, h: torch.cat([G @ x - h, box @ x - 5, -box @ x - 5]),
        0,
    )
    F = normal(4, N, N) / 3
    x, mu, risk = cp.Variable(N), cp.Parameter(N), cp.Parameter(nonneg=True)
    utility = mu @ x - risk * cp.norm(F.numpy() @ x, 2) - 0.1 * cp.sum_squares(x)
    yield Example(
        "portfolio, second-order cone",
        cp.Problem(cp.Maximize(utility), [cp.sum(x) == 1, x >= 0]),
        [mu, risk],
        x,
        [0.3 * normal(5, BATCH, N), torch.tensor(0.5, dtype=torch.float64)],
        lambda x, mu, risk: risk * (F @ x).norm() + 0.1 * x @ x - mu @ x,
        lambda x, mu, risk: torch.cat([x.sum()[None] - 1, -x]),
        1,
    )
    x, c, a = cp.Variable(N), cp.Parameter(N), cp.Parameter((2, N))
    yield Example(
        "entropy, exponential cones",
        cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), [cp.sum(x) == 1, a @ x <= 0.1]),
        [c, a],
        x,
        [normal(6, BATCH, N), normal(7, 2, N)],
        lambda x, c, a: torch.special.xlogy(x, x).sum() - c @ x,
        lambda x, c, a: torch.cat([x.sum()[None] - 1, a @ x - 0.1]),
        1,
    )


def start(example: Example, values: list[Tensor]) -> Tensor:
    for parameter, value in zip(example.parameters, values, strict=True):
        parameter.value = value.detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example.problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.from_numpy(np.array(example.variable.value))


def exact(example: Example, values: list[Tensor]) -> Tensor:
    """One element, with the graph of one step of Newton at the solution."""
    x = start(example, values)
    constants = [v.detach() for v in values]
    slack = example.rows(x, *constants)
    active = slack > -1e-6
    active[: example.equalities] = True
    gradient = torch.func.grad(example.objective)
    select = lambda x, *v: example.rows(x, *v)[active]  # noqa: E731

    def conditions(z: Tensor, *v: Tensor) -> Tensor:
        x, y = z[:N], z[N:]
        pull = torch.func.vjp(lambda x: select(x, *v), x)[1]
        return torch.cat([gradient(x, *v) + pull(y)[0], select(x, *v)])

    J = torch.func.jacrev(select)(x, *constants)
    y = -torch.linalg.lstsq(J.mT, gradient(x, *constants).unsqueeze(-1)).solution.squeeze(-1)
    z = torch.cat([x, y])
    for step in range(6):
        v = values if step == 5 else constants
        K = torch.func.jacrev(conditions)(z.detach(), *constants)
        z = z.detach() - torch.linalg.solve(K, conditions(z.detach(), *v))
    return z[:N]


def reference(example: Example, g: Tensor) -> tuple[Tensor, ...]:
    values = [v.clone().requires_grad_() for v in example.values]
    batched = [v.ndim > len(p.shape) for v, p in zip(values, example.parameters, strict=True)]
    elements = [[v[i] if b else v for v, b in zip(values, batched, strict=True)] for i in range(BATCH)]
    x = torch.stack([exact(example, element) for element in elements])
    return (x.detach(), *torch.autograd.grad(x, values, g))


def job(layer: Any, example: Example, g: Tensor, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
    values = [v.clone().requires_grad_() for v in example.values]

    def forward_backward() -> tuple[Tensor, ...]:
        (x,) = layer(*values, **options)
        return (x.detach(), *torch.autograd.grad(x, values, g))

    return forward_backward


def case(example: Example) -> Case:
    from cvxpylayers.torch import CvxpyLayer as Peer

    g = normal(8, BATCH, N)
    layers = [make(example.problem, example.parameters, [example.variable]) for make in (CvxpyLayer, Peer)]
    tight = {"solver_args": {"eps": 1e-10, "max_iters": 100_000}}
    expected = reference(example, g)
    # the exact derivative of a vertex in its costs is zero, of which no error can be relative
    kept = [k for k, t in enumerate(expected) if float(t.norm()) > 1e-9]
    pick = lambda f: lambda: tuple(f()[k] for k in kept)  # noqa: E731
    contenders = [
        Contender("difflayers CvxpyLayer", pick(job(layers[0], example, g))),
        Contender("cvxpylayers", pick(job(layers[1], example, g))),
        Contender("cvxpylayers at 1e-10", pick(job(layers[1], example, g, **tight))),
    ]
    return Case(f"{example.name}, batch {BATCH}", contenders, [expected[k] for k in kept], target=TARGET)


@functools.lru_cache
def cases() -> list[Case]:
    return [case(example) for example in examples()]


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpylayers', of its own solver
        run("cvxpy_layer", cases(), options)
