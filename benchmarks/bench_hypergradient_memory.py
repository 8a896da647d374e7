"""Memory of a hypergradient by the number of terms: Neumann series and CG keep one graph, unrolling keeps every step.

The network of `bench_hypergradient`. From the lower solution, reverse mode through T gradient steps equals a Neumann
series of T terms with the same step: both are held against CG by hand with the same number of terms done as a series in
plain torch.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_hypergradient import Problem, network
from benchmarks.harness import Case, Contender, Options, run
from difflayers.bilevel import Bilevel, hypergradient
from difflayers.implicit import Implicit, Neumann
from difflayers.linalg import CG

TERMS = (10, 40, 160)


def unrolled(problem: Problem, steps: int, step: float) -> Callable[[], Tensor]:
    def job() -> Tensor:
        x, y = problem.x.detach().requires_grad_(), problem.y.detach().requires_grad_()
        z = y
        for _ in range(steps):
            (g,) = torch.autograd.grad(problem.lower(x, z), z, create_graph=True)
            z = z - step * g
        return torch.autograd.grad(problem.upper(x, z), x)[0]

    return job


def series(problem: Problem, terms: int, step: float) -> Tensor:
    """The sum of the series, term by term."""
    x, y = problem.x.detach().requires_grad_(), problem.y.detach().requires_grad_()
    fx, v = torch.autograd.grad(problem.upper(x, y), (x, y), allow_unused=True, materialize_grads=True)
    (g,) = torch.autograd.grad(problem.lower(x, y), y, create_graph=True)
    total = v
    for _ in range(terms - 1):
        v = v - step * torch.autograd.grad(g, y, v, retain_graph=True)[0]
        total = total + v
    return fx - step * torch.autograd.grad(g, x, total)[0]


def main(options: Options) -> None:
    problem = network(options.device)
    bilevel = Bilevel(lambda x, y, batch: problem.upper(x, y), lambda x, y, batch: problem.lower(x, y))
    step = 0.5 / problem.curvature()

    def ours(terms: int) -> Callable[[], Tensor]:
        def job() -> Tensor:
            adjoint = Neumann(terms, step=step)
            return hypergradient(bilevel, problem.x, problem.y, adjoint=adjoint, on_failure="ignore").grad

        return job

    def conjugate(steps: int) -> Callable[[], Tensor]:
        adjoint = Implicit(CG(rtol=1e-15, atol=0.0, max_steps=steps))
        return lambda: hypergradient(bilevel, problem.x, problem.y, adjoint=adjoint, on_failure="ignore").grad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = []
        for terms in TERMS:
            expected = series(problem, terms, step)
            contenders = [
                Contender("difflayers, Neumann", ours(terms)),
                Contender("difflayers, CG, as many steps", conjugate(terms), reference=conjugate(terms)()),
                Contender("plain torch, unrolled", unrolled(problem, terms, step)),
            ]
            cases.append(
                Case(f"network of {problem.y.numel():,} weights, {terms} terms", contenders, expected, target=1e-8)
            )
        run("hypergradient_memory", cases, options)
