"""Cases of :mod:`difflayers.equilibrium`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Solution
from difflayers.equilibrium import ConvergentGraphSolver, graph_equilibrium, graph_equilibrium_ex
from difflayers.implicit import Anderson
from difflayers.linalg import GMRES, QR
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton

__all__ = ["CASES"]

EDGES = [[0, 0, 1, 2], [1, 2, 2, 0]]  # node 0 reads 1 and 2, 1 reads 2, 2 reads 0
WEIGHTS, TERMS, KAPPA = numbers([0.3, 0.5, 0.9, 0.6]), normal(41, 3, 3, 1), numbers(0.8)
SOURCE = "J. Park, J. Choo, J. Park, Convergent Graph Solvers, ICLR 2022"


def _edge_index(like: Tensor) -> Tensor:
    return torch.tensor(EDGES, device=like.device)


def _matrix(weights: Tensor) -> Tensor:
    """The edge weights as a matrix, entry by entry."""
    zero = torch.zeros_like(weights[..., 0])
    a, b, c, d = weights.unbind(-1)
    return torch.stack([zero, a, b, zero, zero, c, d, zero, zero], -1).unflatten(-1, (3, 3))


def _linear(weights: Tensor, B: Tensor, kappa: Tensor) -> Tensor:
    eye = torch.eye(3, dtype=B.dtype, device=B.device)
    return torch.linalg.solve(eye - kappa[..., None, None] * _matrix(weights), B)


def _curved(h: Tensor, weights: Tensor, B: Tensor, kappa: Tensor) -> Tensor:
    """The residual with an activation, one state a node."""
    moved = kappa[..., None] * (_matrix(weights) @ h.unsqueeze(-1)).squeeze(-1)
    return h - torch.tanh(moved + B.squeeze(-1))


def _many_steps(activation: Callable[[Any], Any]) -> Callable[..., np.ndarray]:
    """The update repeated until nothing moves any more, in numpy."""

    def solve(weights: np.ndarray, B: np.ndarray, kappa: np.ndarray) -> np.ndarray:
        A = np.zeros((3, 3))
        A[EDGES[0], EDGES[1]] = weights
        H = np.zeros_like(B)
        for _ in range(2000):
            H = activation(kappa * A @ H + B)
        return H

    return solve


def _reduced(solution: Solution[Tensor], dims: int) -> Solution[Tensor]:
    """One report for each graph instead of one for each column."""
    if solution.status.ndim == dims:
        return solution
    return replace(
        solution, status=solution.status.amax(0), steps=solution.steps.amax(0), residual=solution.residual.amax(0)
    )


def _case(name: str, solver: Any = None, starved: Any = None, **fields: Any) -> LayerCase:
    activation = fields.pop("activation", None)

    def run(layer: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def fn(weights: Tensor, B: Tensor, kappa: Tensor) -> Any:
            out = layer(weights, _edge_index(B), B, kappa, activation=activation, **options)
            return _reduced(out, B.ndim - 2) if isinstance(out, Solution) else out

        return fn

    common: dict[str, Any] = {
        "layer": "graph_equilibrium",
        "source": SOURCE,
        "event_ndims": (1, 2, 0),
        "oracle": per_element(_many_steps(np.tanh if activation else lambda t: t), (1, 2, 0)),
        "unrolled": _linear,
        "tolerant": run(graph_equilibrium, solver=solver, on_failure="nan"),
        "solution": run(graph_equilibrium_ex, solver=solver),
    }
    if starved is not None:
        common["starved"] = run(graph_equilibrium, solver=starved)
        common["starved_solution"] = run(graph_equilibrium_ex, solver=starved)
    return LayerCase(name, run(graph_equilibrium, solver=solver), (WEIGHTS, TERMS, KAPPA), **(common | fields))


def make_network() -> ConvergentGraphSolver:
    """A small network with fixed numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvergentGraphSolver(2, 1, 2, hidden=8, heads=2, learn_kappa=True).to("cpu", torch.float64)


def _without_edges(weights: Tensor, B: Tensor, kappa: Tensor) -> Tensor:
    return graph_equilibrium(weights[..., :0], _edge_index(B)[:, :0], B, kappa)


CASES: tuple[LayerCase, ...] = (
    _case(
        "graph_equilibrium linear",
        representative=True,
        names=("edge_weights", "B", "kappa"),
        hostile=(
            Hostile("zero weights", (0 * WEIGHTS, TERMS, KAPPA)),
            Hostile("zero terms", (WEIGHTS, 0 * TERMS, KAPPA)),
            Hostile("kappa zero", (WEIGHTS, TERMS, 0 * KAPPA)),
            Hostile("kappa almost one", (numbers([0.5, 0.5, 1.0, 1.0]), TERMS, numbers(0.99))),
            Hostile("no edges", (WEIGHTS, TERMS, KAPPA), fn=_without_edges, oracle=lambda w, B, k: B),
            Hostile("huge", (WEIGHTS, 1e100 * TERMS, KAPPA)),
        ),
        wrong=(
            Wrong("fewer weights than edges", (WEIGHTS[:3], TERMS, KAPPA), "edge_index: expected .*got 4"),
            Wrong("terms without columns", (WEIGHTS, TERMS[0, :, 0], KAPPA), "B: expected at least 2 dimensions"),
            Wrong(
                "fewer nodes than edges name", (WEIGHTS, TERMS[:, :2], KAPPA), r"edge_index: expected nodes in 0\.\.1"
            ),
        ),
        make_module=make_network,
        module_inputs=(normal(42, 3, 2), normal(43, 4, 1), torch.tensor(EDGES, device="cpu")),
    ),
    _case("graph_equilibrium QR", QR()),
    _case("graph_equilibrium GMRES", GMRES(), GMRES(max_steps=1)),
    _case(
        "graph_equilibrium tanh",
        Anderson(),
        Anderson(max_steps=1),
        activation=torch.tanh,
        unrolled=lambda *args: unrolled_newton(_curved, 3, (1, 2, 0))(*args).unsqueeze(-1),
        invariants=(lambda H, *args: _curved(H.squeeze(-1), *args),),
    ),
)
