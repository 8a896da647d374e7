"""Exact optima, one instance after the other, with the time that the solvers take.

A solver gets its arrays ready made and is called through its own interface; the time is that of handing over the model
and solving it, without writing the arrays down.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.conic import Knapsack, ProductionPlanning


class Optima(NamedTuple):
    """Optimal values and the mean time of one instance."""

    values: Tensor
    seconds: float


def solve_knapsacks(instances: Knapsack, *, solver: str = "choose", progress: bool = True) -> Optima:
    """By HiGHS; `solver` is its option: its own choice (the dual simplex method), "simplex" or "ipm"."""
    highs, values, spent = highs_session(solver), [], 0.0
    for one in tqdm(list(zip(*(t.double().numpy() for t in instances), strict=True)), "HiGHS", disable=not progress):
        model = highs_model(*one)
        start = time.perf_counter()
        values.append(run_highs(highs, model))
        spent += time.perf_counter() - start
    return Optima(torch.tensor(values, dtype=torch.float64), spent / max(1, len(values)))


def highs_session(solver: str = "choose"):
    """HiGHS, silent, on one thread."""
    import highspy

    highs = highspy.Highs()
    for option, value in (("output_flag", False), ("threads", 1), ("solver", solver)):
        highs.setOptionValue(option, value)
    return highs


def run_highs(highs, model) -> float:
    """The optimum of a model."""
    import highspy

    highs.passModel(model)
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS: {highs.getModelStatus()}")
    return highs.getInfo().objective_function_value


def highs_model(prices: np.ndarray, weights: np.ndarray, capacity: np.ndarray):
    """``min -prices x, weights x <= capacity, 0 <= x <= 1``."""
    import highspy

    m, n = weights.shape
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n, m
    model.col_cost_, model.col_lower_, model.col_upper_ = -prices, np.zeros(n), np.ones(n)
    model.row_lower_, model.row_upper_ = np.full(m, -highspy.kHighsInf), capacity
    A = model.a_matrix_
    A.format_, A.num_col_, A.num_row_ = highspy.MatrixFormat.kRowwise, n, m
    A.start_, A.index_, A.value_ = np.arange(0, m * n + 1, n), np.tile(np.arange(n), m), weights.ravel()
    return model


def solve_plans(instances: ProductionPlanning, *, progress: bool = True) -> Optima:
    """By Clarabel at its own tolerances, which leave a relative error of about 1e-7."""
    values, spent = [], 0.0
    for one in tqdm(list(zip(*(t.double().numpy() for t in instances), strict=True)), "Clarabel", disable=not progress):
        model = clarabel_model(*one)
        start = time.perf_counter()
        values.append(run_clarabel(model))
        spent += time.perf_counter() - start
    return Optima(torch.tensor(values, dtype=torch.float64), spent / max(1, len(values)))


def clarabel_model(holding: np.ndarray, ordering: np.ndarray, resources: np.ndarray, capacity: float):
    """``min holding x + ordering t, resources x <= capacity``, and ``(x + t, x - t, 2)`` in second-order cones."""
    import clarabel
    from scipy.sparse import csc_matrix

    n = len(holding)
    items, cone = np.arange(n), 1 + 3 * np.arange(n)
    rows = np.concatenate([np.zeros(n, dtype=int), cone, cone, cone + 1, cone + 1])
    columns = np.concatenate([items, items, n + items, items, n + items])
    one = np.ones(n)
    A = csc_matrix((np.concatenate([resources, -one, -one, -one, one]), (rows, columns)), shape=(1 + 3 * n, 2 * n))
    b = np.zeros(1 + 3 * n)
    b[0], b[3::3] = capacity, 2.0
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    cones = [clarabel.NonnegativeConeT(1)] + [clarabel.SecondOrderConeT(3)] * n
    return csc_matrix((2 * n, 2 * n)), np.concatenate([holding, ordering]), A, b, cones, settings


def run_clarabel(model) -> float:
    """The optimum of a model."""
    import clarabel

    solution = clarabel.DefaultSolver(*model).solve()
    if str(solution.status) != "Solved":
        raise RuntimeError(f"Clarabel: {solution.status}")
    return solution.obj_val


def exact_plans(instances: ProductionPlanning) -> Tensor:
    """To the last digits, all instances at once: bisection for the price where the resource is just used up."""
    d, e, rho, v = (t.double() for t in instances)

    def used(y: Tensor) -> Tensor:
        return (rho * (e / (d + rho * y.unsqueeze(-1))).sqrt()).sum(-1)

    low = torch.zeros_like(v)
    high = ((e * rho).sqrt().sum(-1) / v).square()  # at this price less than the capacity is used
    for _ in range(80):
        middle = (low + high) / 2
        scarce = used(middle) > v
        low, high = torch.where(scarce, middle, low), torch.where(scarce, high, middle)
    y = torch.where(used(torch.zeros_like(v)) <= v, 0, (low + high) / 2)
    return 2 * (e * (d + rho * y.unsqueeze(-1))).sqrt().sum(-1) - v * y
