"""Dual bounds of 4096 instances: a trained proxy against HiGHS and Clarabel, which solve them exactly, one by one.

All contenders get the same 4096 instances. A network is trained for some seconds beforehand, on other instances. The
error is that of all bounds together against the optimum, about the mean gap: the proxy's is what it pays for its speed.
Solvers get models that were written down before the clock starts, and run on one thread, with their own tolerances.
Batches of this size are the proxy's home; larger sizes are in `python -m benchmarks.dual_table`.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Case, Contender, Options, run
from difflayers.conic import sample_knapsack, sample_production_planning

sys.path.append(str(ROOT / "examples"))

from dual_lagrangian import optima
from dual_lagrangian.networks import KnapsackPrices, PlanningPrice
from dual_lagrangian.training import inference, proxy_of, train

COUNT, TRAINING_SECONDS = 4096, 10.0


def knapsack(m: int, n: int, *, newton: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: sample_knapsack(count, constraints=m, items=n, generator=generator)  # noqa: E731
    data, validation, test = draw(8192), draw(512), draw(COUNT)
    known = optima.solve_knapsacks(validation).values
    models = [optima.highs_model(*one) for one in zip(*(t.double().numpy() for t in test), strict=True)]
    solvers = {}
    for name, solver in (("HiGHS", "choose"), ("HiGHS, interior point", "ipm")):
        session = optima.highs_session(solver)
        solvers[name] = lambda session=session: _values(optima.run_highs(session, model) for model in models)
    network = KnapsackPrices(newton=newton)
    return case(f"knapsack, {m}x{n}", network, data, validation, known, test, solvers)


def planning(n: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    draw = lambda c: sample_production_planning(c, items=n, generator=generator, dtype=torch.float64)  # noqa: E731
    data, validation, test = draw(8192), draw(512), draw(COUNT)
    models = [optima.clarabel_model(*one) for one in zip(*(t.numpy() for t in test), strict=True)]
    solvers = {"Clarabel": lambda: _values(map(optima.run_clarabel, models))}
    known = optima.exact_plans(validation)
    return case(f"production planning, {n}", PlanningPrice(1, 8), data, validation, known, test, solvers)


def case(name: str, network, data: Any, validation: Any, known: Tensor, test: Any, solvers: dict) -> Case:
    proxy = proxy_of(network, data)
    record, _, _ = train(proxy, data, validation, known, max_seconds=TRAINING_SECONDS)
    reference = next(iter(solvers.values()))() if "knapsack" in name else optima.exact_plans(test)
    told = lambda: f"{record.seconds:.0f} s of training"  # noqa: E731
    contenders = []
    for way, compiled in (("compiled", True), ("eager", False)):
        job = inference(proxy, compiled=compiled)
        contenders.append(Contender(f"difflayers DualProxy, {way}", lambda job=job: job(*test), settings=told))
    contenders += [Contender(solver, fn) for solver, fn in solvers.items()]
    return Case(name, contenders, reference, memory=False)


def _values(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [knapsack(5, 100), knapsack(10, 200), knapsack(30, 100, newton=True), planning(10), planning(100)]
    run("dual_bounds", cases, options, memory=False)
