"""Plans at a small entropic weight: Newton's method with sparse Hessians against Sinkhorn's iteration, ours and POT's.

Every contender computes one plan, without derivatives. Each takes the loosest tolerance of a ladder at which the L1
error of the sums, both sides together and measured from its plan, is below that of the case. Assignment problems have
uniform costs and equal masses, the pictures are two of scikit-learn's digits with 1e-3 added, at squared distances.
Costs range up to 1, and eps is 1/1200. On assignments contenders that only iterate take part at an error of 1e-4: a
smaller one costs them ten thousand iterations and more.

The reference is a plan with the right sums to rounding: a plan of this form with those sums is the only one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import ot
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.transport import KernelSinkhorn, SparseNewton, TransportSolver, sinkhorn

EPS = 1 / 1200
TOLERANCES = [10.0**-k for k in range(3, 14)]
D = torch.float64

Problem = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Problem, float], Tensor]


def sums_error(plan: Tensor, a: Tensor, b: Tensor) -> float:
    return float((plan.sum(-1) - a).abs().sum() + (plan.sum(-2) - b).abs().sum())


class Loosest:
    """A plan with the first tolerance of the ladder that meets the error of the sums."""

    def __init__(self, way: Way, problem: Problem, goal: float) -> None:
        self.way, self.problem, self.goal = way, problem, goal
        self.chosen: float | None = None
        self.note = ""

    def __call__(self) -> Tensor:
        for tolerance in TOLERANCES if self.chosen is None else []:
            error = sums_error(self.way(self.problem, tolerance), *self.problem[1:])
            if error <= self.goal:
                self.chosen, self.note = tolerance, f"{tolerance:.0e}, sums {error:.1e}"
                break
        if self.chosen is None:
            self.chosen, self.note = TOLERANCES[-1], f"does not reach sums of {self.goal:.0e}"
        return self.way(self.problem, self.chosen)

    def settings(self) -> str:
        return self.note


def ours(make: Callable[[float], TransportSolver]) -> Way:
    def plan(problem: Problem, tolerance: float) -> Tensor:
        cost, a, b = problem
        return sinkhorn(cost, a, b, eps=EPS, solver=make(tolerance))

    return plan


def pot(method: str) -> Way:
    def plan(problem: Problem, tolerance: float) -> Tensor:
        cost, a, b = problem
        return ot.sinkhorn(a, b, cost, EPS, method, numItermax=20_000, stopThr=tolerance)

    return plan


NEWTON: dict[str, Way] = {
    "SparseNewton": ours(lambda tol: SparseNewton(rtol=tol)),
    "KernelSinkhorn": ours(lambda tol: KernelSinkhorn(rtol=tol)),
}
ITERATION: dict[str, Way] = {
    "KernelSinkhorn without Newton's method": ours(
        lambda tol: KernelSinkhorn(rtol=tol, newton_steps=0, scaling=False, max_steps=20_000)
    ),
    "ot.sinkhorn sinkhorn_log": pot("sinkhorn_log"),
    "ot.sinkhorn sinkhorn_stabilized": pot("sinkhorn_stabilized"),
}


def assignment(n: int) -> Problem:
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=D)
    return cost, cost.new_full((n,), 1 / n), cost.new_full((n,), 1 / n)


def digits() -> Problem:
    from sklearn.datasets import load_digits

    pictures = torch.tensor(load_digits().images[:2] / 16, dtype=D).flatten(1) + 1e-3
    a, b = pictures / pictures.sum(-1, keepdim=True)
    pixels = torch.cartesian_prod(torch.arange(8, dtype=D), torch.arange(8, dtype=D))
    cost = (pixels.unsqueeze(1) - pixels).square().sum(-1)
    return cost / cost.max(), a, b


def reference(problem: Problem) -> Tensor:
    cost, a, b = problem
    plan = sinkhorn(cost, a, b, eps=EPS, solver=KernelSinkhorn(rtol=1e-14))
    assert sums_error(plan, a, b) < 1e-12
    return plan


def case(name: str, problem: Problem, goal: float, ways: dict[str, Way], device: str, memory: bool) -> Case:
    cost, a, b = (t.to(device) for t in problem)
    contenders = []
    for way_name, way in ways.items():
        job = Loosest(way, (cost, a, b), goal)
        contenders.append(Contender(way_name, job, settings=job.settings))
    return Case(f"{name}, sums to {goal:.0e}", contenders, reference((cost, a, b)), memory=memory)


def main(options: Options) -> None:
    cases = []
    for n in (200, 500):
        problem = assignment(n)
        cases.append(case(f"assignment {n}", problem, 1e-4, NEWTON | ITERATION, options.device, memory=n == 500))
        cases.append(case(f"assignment {n}", problem, 1e-11, NEWTON, options.device, memory=False))
    cases.append(case("assignment 1500", assignment(1500), 1e-11, NEWTON, options.device, memory=True))
    for goal in (1e-4, 1e-11):
        cases.append(case("digits", digits(), goal, NEWTON | ITERATION, options.device, memory=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that end early while the ladder is climbed
        run("sparse_newton", cases, options)
