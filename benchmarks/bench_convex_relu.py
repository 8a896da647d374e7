"""Convex ReLU networks with their cone constraints: ours against CVXPY with Clarabel, and against scnn.

Every contender minimises `1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||)` over all
neurons that keep to their cells, at beta = 0.01 n, for the patterns of random gates. The result is the objective and
100 times the largest violation of a cone, plus one: an error of 1e-6 stands for 1e-6 of the objective and for a
violation of 1e-8. Every contender takes the loosest tolerance of a ladder that reaches it; where none does, the row
says how near it came. Ours is the public layer, whose network is minimal and settled to rounding; once more with the
derivative of its fit in X and y, and once its solver alone. CVXPY builds its problem anew, as a user's call does;
Clarabel alone starts from the canonical form that CVXPY made of it before the clock runs. scnn's augmented Lagrangian
is run at its
default tolerance of 1e-6.

The reference is the objective of Clarabel at a tolerance of 1e-10, and no violation.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import relu_peers
from benchmarks.harness import AsLooseAs, Case, Contender, Options, run
from difflayers.relu import Gates, InteriorPoint, convex_relu, predict, sample_gates
from difflayers.relu._cone_problem import ConeProblem

SHAPES = ((100, 10, 20), (500, 20, 50))  # n, d, gates
LADDER = [10.0**-k for k in range(5, 12)]
TARGET = 1e-6
F64 = torch.float64


def training_data(n: int, d: int, gates: int) -> tuple[ConeProblem, Gates]:
    """Labels of a network with five neurons, and noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    X = draw(n, d)
    y = (X @ draw(d, 5)).relu() @ draw(5) + 0.1 * draw(n)
    found = sample_gates(X, gates, generator=generator)
    return ConeProblem(X, y, torch.ones_like(y), torch.tensor(0.01 * n, dtype=F64), found.patterns.to(F64)), found


def result(problem: ConeProblem, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    neurons = torch.cat([v, w]).to(F64)
    return problem.objective(neurons), 1 + 100 * problem.violation(neurons)


def ours(problem: ConeProblem, rtol: float, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    there = ConeProblem(*(t.to(device) for t in (problem.X, problem.y, problem.s, problem.beta, problem.M)))

    def job() -> tuple[Tensor, Tensor]:
        found = InteriorPoint(rtol=rtol).solve(there)
        return result(problem, found.v.cpu(), found.w.cpu())

    return job


def layer(problem: ConeProblem, gates: Gates, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    X, y, beta, vectors = (t.to(device) for t in (problem.X, problem.y, problem.beta, gates.vectors))

    def job() -> tuple[Tensor, Tensor]:
        found = convex_relu(X, y, beta, vectors)
        assert found.w is not None
        return result(problem, found.v.cpu(), found.w.cpu())

    return job


def with_derivative(problem: ConeProblem, gates: Gates, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    X, y, beta, vectors = (t.to(device) for t in (problem.X, problem.y, problem.beta, gates.vectors))

    def job() -> tuple[Tensor, Tensor]:
        inputs = [t.detach().requires_grad_() for t in (X, y)]
        found = convex_relu(*inputs, beta, vectors)
        torch.autograd.grad(predict(found, X).square().sum(), inputs)
        assert found.w is not None
        return result(problem, found.v.detach().cpu(), found.w.detach().cpu())

    return job


def scnn(problem: ConeProblem, gates: Gates, tol: float) -> Callable[[], tuple[Tensor, Tensor]]:
    def job() -> tuple[Tensor, Tensor]:
        v, w, vectors = relu_peers.scnn_relu(problem.X, problem.y, float(problem.beta), gates.vectors, tol)
        own = dataclasses.replace(problem, M=(problem.X @ vectors.mT >= 0).to(F64))  # it reorders gates
        return result(own, v, w)

    return job


def model(problem: ConeProblem) -> tuple[Any, Any, Any]:
    import cvxpy

    X, y, M = (t.numpy() for t in (problem.X, problem.y, problem.M))
    v, w = (cvxpy.Variable((X.shape[1], M.shape[1])) for _ in range(2))
    fit = cvxpy.sum(cvxpy.multiply(M, X @ (v - w)), axis=1)
    norms = cvxpy.sum(cvxpy.norm(v, 2, axis=0)) + cvxpy.sum(cvxpy.norm(w, 2, axis=0))
    objective = cvxpy.sum_squares(fit - y) / 2 + float(problem.beta) * norms
    cones = [cvxpy.multiply(2 * M - 1, X @ v) >= 0, cvxpy.multiply(2 * M - 1, X @ w) >= 0]
    return cvxpy.Problem(cvxpy.Minimize(objective), cones), v, w


def neurons_of(v: Any, w: Any) -> tuple[Tensor, Tensor]:
    """NaN where the solver returned nothing."""
    values = (np.full(x.shape, np.nan) if x.value is None else x.value for x in (v, w))
    first, second = (torch.from_numpy(np.ascontiguousarray(x.T)) for x in values)
    return first, second


def cvxpy_clarabel(problem: ConeProblem, tol: float, threads: int) -> Callable[[], tuple[Tensor, Tensor]]:
    def job() -> tuple[Tensor, Tensor]:
        program, v, w = model(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.solve(solver="CLARABEL", max_threads=threads, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
        return result(problem, *neurons_of(v, w))

    return job


def clarabel_alone(problem: ConeProblem, tol: float, threads: int) -> Callable[[], tuple[Tensor, Tensor]]:
    import clarabel
    from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import dims_to_solver_cones
    from scipy import sparse

    program, v, w = model(problem)
    data, chain, inverse = program.get_problem_data("CLARABEL", solver_opts={})
    P = sparse.triu(data["P"]).tocsc()
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, threads
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tol

    def job() -> tuple[Tensor, Tensor]:
        cones = dims_to_solver_cones(data["dims"])
        found = clarabel.DefaultSolver(P, data["c"], data["A"], data["b"], cones, settings).solve()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program.unpack_results(found, chain, inverse)
        return result(problem, *neurons_of(v, w))

    return job


def case(n: int, d: int, gates: int, options: Options) -> Case:
    problem, vectors = training_data(n, d, gates)
    expected = (cvxpy_clarabel(problem, 1e-10, options.threads)()[0], torch.ones((), dtype=F64))
    ways: dict[str, Callable[[float], Callable[[], tuple[Tensor, Tensor]]]] = {
        "difflayers, its solver alone": lambda tol: ours(problem, tol, options.device),
        "CVXPY with Clarabel": lambda tol: cvxpy_clarabel(problem, tol, options.threads),
        "Clarabel, canonical form given": lambda tol: clarabel_alone(problem, tol, options.threads),
    }
    contenders = [
        Contender("difflayers", layer(problem, vectors, options.device)),
        Contender("difflayers, with the derivative", with_derivative(problem, vectors, options.device)),
    ]
    for name, build in ways.items():
        job = AsLooseAs(build, LADDER, expected, TARGET)
        contenders.append(Contender(name, job, settings=job.settings))
    if relu_peers.available():
        contenders.append(Contender("scnn, its default tolerance", scnn(problem, vectors, 1e-6)))
    return Case(f"n = {n}, d = {d}, {gates} gates", contenders, expected, memory=n < 500, target=TARGET)


def main(options: Options) -> None:
    run("convex_relu", [case(*shape, options) for shape in SHAPES], options)
