"""Cases of doubly stochastic projections, rate reduction and clustering with neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Solution
from difflayers.linalg import CG, GMRES
from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import (
    BoundOptimizer,
    ManifoldLinearizing,
    SymmetricNewton,
    doubly_stochastic,
    doubly_stochastic_ex,
    laplacian_clustering,
    laplacian_clustering_ex,
    rate_reduction,
    transductive_clustering,
    transductive_clustering_ex,
)

from ._common import numbers, per_element

__all__ = ["CASES"]

DING = "T. Ding et al., Unsupervised Manifold Linearizing and Clustering, 2023"
YU = "Y. Yu et al., Maximal Coding Rate Reduction, 2020"
ZIKO = "I. Ziko et al., Laplacian Regularized Few-Shot Learning, 2020"
ZIKO2 = "I. Ziko et al., Transductive Few-Shot Learning: Clustering is All You Need?, 2021"
INF = np.inf
PRODUCTS = {"autocast_of_backward": "products of features are plain torch, which autocast halves in backward"}


# ------------------------------------------------------------------------------------------------- doubly stochastic


def _projection(affinity: np.ndarray, gamma: Any) -> np.ndarray:
    """Sinkhorn's iteration on the symmetric part, with two potentials, to a standstill."""
    logs = (affinity + affinity.T) / 2 / gamma
    f, g = np.zeros(len(logs)), np.zeros(len(logs))

    def soft(x: np.ndarray) -> np.ndarray:
        top = x.max(1)
        return np.asarray(top + np.log(np.exp(x - top[:, None]).sum(1)))

    for _ in range(50_000):
        old = f
        f = -soft(logs + g)
        g = -soft(logs.T + f)
        if np.abs(f - old).max() <= 1e-15 * np.abs(f).max():
            break
    return np.asarray(np.exp(logs + f[:, None] + g))


def _stochastic(P: Tensor, *_: Tensor) -> Tensor:
    return torch.cat([P.sum(-1) - 1, P.sum(-2) - 1, (P - P.mT).flatten(-2)], -1)


def _plan(*data: Any, **options: Any) -> Any:
    found = doubly_stochastic_ex(*data, **options)
    return Solution(found.value.plan, found.status, found.steps, found.residual)


def _potential(affinity: Tensor, gamma: Tensor) -> Tensor:
    return doubly_stochastic_ex(affinity, gamma).value.f


def _potential_oracle(affinity: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    P = _projection(affinity, gamma)
    return np.asarray((gamma * np.log(np.diag(P)) - np.diag(affinity)) / 2)


AFFINITY = numbers(
    [[[1.0, 0.3, -0.2], [0.5, 0.8, 0.1], [0.0, 0.7, 0.9]], [[0.1, 0.9, 0.4], [1.2, 0.2, 0.6], [0, 0, 1]]]
)
GAMMA = numbers(0.3)
OUTSIDE = torch.full((3, 3), -torch.inf, dtype=torch.float64, device="cpu")
LOOP = AFFINITY + torch.where(torch.eye(3, dtype=torch.bool, device="cpu"), -torch.inf, 0.0)
STAR = OUTSIDE.clone()
STAR[0, 1:] = 1.0
STAR[1:, 0] = 1.0
PAIR = numbers([[[-INF, 0.5], [0.3, -INF]], [[-INF, 1.0], [2.0, -INF]]])
STARVED = SymmetricNewton(max_steps=1, rtol=1e-12)


def _forbidding(affinity: Tensor, gamma: Tensor, adjoint: Any = None, **options: Any) -> Tensor:
    """Between the first point and the other two alone: a bipartite support, with weights that allow it."""
    none = affinity.new_full((4, 4), -torch.inf)
    none[:2, 2:] = 0
    none[2:, :2] = 0
    corner = affinity[..., :2, :2]
    wide = torch.cat([torch.cat([corner, corner], -1), torch.cat([corner, corner], -1)], -2)
    return doubly_stochastic(wide + none, gamma, adjoint=adjoint, **options)


def _forbidding_oracle(affinity: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    corner = affinity[:2, :2]
    P = np.zeros((4, 4))
    P[:2, 2:] = _two_sided((corner + corner.T) / 2, gamma)
    P[2:, :2] = P[:2, 2:].T
    return P


def _two_sided(A: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Two by two: the odds of the diagonal are those of the product of the entries, halved."""
    x = 1 / (1 + np.exp(-(A[0, 0] + A[1, 1] - A[0, 1] - A[1, 0]) / (2 * gamma)))
    return np.array([[x, 1 - x], [1 - x, x]])


_PROJECTIONS = (
    LayerCase(
        "doubly_stochastic",
        doubly_stochastic,
        (AFFINITY, GAMMA),
        per_element(_projection, (2, 0)),
        invariants=(_stochastic,),
        event_ndims=(2, 0),
        names=("affinity", "gamma"),
        source=DING,
        representative=True,
        tolerant=lambda *data: doubly_stochastic(*data, on_failure="nan"),
        solution=_plan,
        starved=lambda *data: doubly_stochastic(*data, solver=STARVED),
        starved_solution=lambda *data: _plan(*data, solver=STARVED),
        exact_bits=False,
        hostile=(
            Hostile("small numbers", (AFFINITY * 1e-9, GAMMA * 1e-9)),
            Hostile("large numbers", (AFFINITY * 1e9, GAMMA * 1e9)),
            Hostile("small gamma", (AFFINITY, GAMMA * 1e-2)),
            Hostile("large gamma", (AFFINITY, GAMMA * 1e4)),
            Hostile("equal affinities", (torch.ones_like(AFFINITY), GAMMA)),
            Hostile("without loops", (LOOP, GAMMA)),
            Hostile("one pair, bipartite", (PAIR, GAMMA)),
            Hostile("a star carries none", (STAR.expand(2, 3, 3), GAMMA), RuntimeError, "INFEASIBLE"),
            Hostile("nothing allowed", (OUTSIDE.expand(2, 3, 3), GAMMA), RuntimeError, "INFEASIBLE"),
            Hostile("gamma of zero", (AFFINITY, GAMMA * 0), ValueError, "gamma: expected"),
        ),
        wrong=(
            Wrong("a vector", (AFFINITY[0, 0], GAMMA), "affinity: expected at least 2 dimensions"),
            Wrong("not square", (AFFINITY[:, 1:], GAMMA), "affinity: expected square matrices"),
        ),
    ),
    LayerCase(
        "doubly_stochastic CG",
        lambda *data: doubly_stochastic(*data, adjoint=CG()),
        (AFFINITY, GAMMA),
        per_element(_projection, (2, 0)),
        event_ndims=(2, 0),
        source=DING,
        exact_bits=False,
    ),
    LayerCase(
        "doubly_stochastic bipartite",
        _forbidding,
        (AFFINITY[:, :2, :2].contiguous(), GAMMA),
        per_element(_forbidding_oracle, (2, 0)),
        event_ndims=(2, 0),
        source=DING,
        exact_bits=False,
    ),
    LayerCase(
        "doubly_stochastic_ex potential",
        _potential,
        (AFFINITY, GAMMA),
        per_element(_potential_oracle, (2, 0)),
        layer="doubly_stochastic",
        event_ndims=(2, 0),
        source=DING,
        exact_bits=False,
    ),
)


# ---------------------------------------------------------------------------------------------------- rate reduction


def _rates(features: np.ndarray, membership: np.ndarray, distortion: float = 0.5) -> Any:
    n, d = features.shape
    alpha = d / distortion**2
    total = np.linalg.slogdet(np.eye(d) + alpha / n * features.T @ features)[1] / 2
    for row in membership:
        w = row.sum()
        if w > 0:
            inside = np.eye(d) + alpha / w * features.T @ np.diag(row) @ features
            total -= w / (2 * n) * np.linalg.slogdet(inside)[1]
    return total


def _learned(features: np.ndarray, clustering: np.ndarray) -> Any:
    Z, C = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (features, clustering))
    return -_rates(Z, _projection(C @ C.T, 0.4))


def _module() -> ManifoldLinearizing:
    return ManifoldLinearizing(gamma=0.4)


FEATURES = numbers([[[0.6, 0.8], [1.0, 0.1], [-0.5, 0.7]], [[0.2, -0.9], [0.7, 0.7], [-1.0, 0.3]]])
SHARES = numbers([[0.7, 0.1, 0.2], [0.3, 0.9, 0.8]])
HEADS = numbers([[[0.5, -0.4], [0.9, 0.3], [-0.2, 0.8]], [[0.1, 0.6], [0.7, -0.3], [0.4, 0.4]]])
ORIGIN = FEATURES.clone()
ORIGIN[0, 0] = 0

_RATES = (
    LayerCase(
        "rate_reduction",
        rate_reduction,
        (FEATURES, SHARES),
        per_element(_rates, (2, 2)),
        event_ndims=(2, 2),
        source=YU,
        exempt=PRODUCTS,
        representative=True,
        hostile=(
            Hostile("small features", (FEATURES * 1e-9, SHARES)),
            Hostile("large features", (FEATURES * 1e9, SHARES)),
            Hostile("a group without members", (FEATURES, SHARES * numbers([[1.0], [0.0]]))),
            Hostile("equal features", (FEATURES[:, :1].expand(2, 3, 2).clone(), SHARES / 2)),
            Hostile("features of zero", (FEATURES * 0, SHARES)),
        ),
        wrong=(
            Wrong("a vector", (FEATURES[0, 0], SHARES), "features: expected at least 2 dimensions"),
            Wrong("shares of others", (FEATURES, SHARES[:, 1:]), r"membership: expected shape \(3,\) in its last"),
        ),
    ),
    LayerCase(
        "rate_reduction many dimensions",
        rate_reduction,
        (FEATURES.mT.contiguous(), SHARES[:, :2].contiguous()),
        per_element(_rates, (2, 2)),
        event_ndims=(2, 2),
        source=YU,
        exempt=PRODUCTS,
    ),
    LayerCase(
        "ManifoldLinearizing",
        lambda *data: _module()(*data),
        (FEATURES, HEADS),
        per_element(_learned, (2, 2)),
        event_ndims=(2, 2),
        source=DING,
        representative=True,
        make_module=_module,
        module_inputs=(FEATURES, HEADS),
        exempt=PRODUCTS | {"module_learns": "a loss has no parameters, so there is nothing that could get a gradient"},
        exact_bits=False,
        hostile=(
            Hostile("large features", (FEATURES * 1e9, HEADS * 1e9)),
            Hostile("twins", (FEATURES[:, [0, 0, 1]], torch.ones_like(HEADS))),
            Hostile("a feature of zero", (ORIGIN, HEADS)),
        ),
        wrong=(Wrong("fewer rows", (FEATURES, HEADS[:, 1:]), r"clustering: expected shape \(3,\) as many rows"),),
    ),
)


# -------------------------------------------------------------------------------------------------------- clustering


def _softmax(U: np.ndarray) -> np.ndarray:
    E = np.exp(U - U.max(1, keepdims=True))
    return np.asarray(E / E.sum(1, keepdims=True))


def _root(step: Any, U: np.ndarray) -> np.ndarray:
    """Plain steps towards the fixed point, then MINPACK to rounding."""
    from scipy.optimize import root

    for _ in range(200):
        U = step(U)
    found = root(lambda u: u - step(u.reshape(U.shape)).ravel(), U.ravel(), tol=1e-15).x.reshape(U.shape)
    return _softmax(min((U, found), key=lambda V: float(np.abs(step(V) - V).max())))


def _neighbours(unary: np.ndarray, W: np.ndarray, lam: np.ndarray) -> np.ndarray:
    W = (W + W.T) / 2
    return _root(lambda U: -unary + lam * W @ _softmax(U), -unary)


def _prototypes(
    query: np.ndarray, support: np.ndarray, labels: np.ndarray, W: np.ndarray, lam: np.ndarray
) -> np.ndarray:
    W = (W + W.T) / 2

    def costs(Y: np.ndarray) -> np.ndarray:
        means = (labels.T @ support + Y.T @ query) / (labels.sum(0) + Y.sum(0))[:, None]
        return np.asarray(((query[:, None] - means) ** 2).sum(-1))

    return _root(lambda U: -costs(_softmax(U)) + lam * W @ _softmax(U), -costs(np.zeros((len(query), labels.shape[1]))))


UNARY = numbers([[[0.1, 0.9], [0.5, 0.4], [1.2, 0.2]], [[0.0, 0.3], [0.6, 0.8], [0.2, -0.4]]])
GRAPH = numbers([[0.2, 0.7, 0.1], [0.5, 0.0, 0.4], [0.3, 0.6, 0.1]])
LAM = numbers(0.8)
QUERY = numbers([[[-0.6], [0.2], [0.9]], [[-0.9], [-0.1], [1.4]]])
SUPPORT = numbers([[-1.0], [1.1]])
LABELS = numbers([[1.0, 0.2], [0.1, 0.9]])
ONE_STEP = BoundOptimizer(max_steps=1)
GRAPH_NAMES = ("affinity", "lam")

_CLUSTERINGS = (
    LayerCase(
        "laplacian_clustering",
        laplacian_clustering,
        (UNARY, GRAPH, LAM),
        per_element(_neighbours, (2, 2, 0)),
        event_ndims=(2, 2, 0),
        names=("unary", *GRAPH_NAMES),
        source=ZIKO,
        representative=True,
        tolerant=lambda *data: laplacian_clustering(*data, on_failure="nan"),
        solution=laplacian_clustering_ex,
        starved=lambda *data: laplacian_clustering(*data, solver=ONE_STEP),
        starved_solution=lambda *data: laplacian_clustering_ex(*data, solver=ONE_STEP),
        exact_bits=False,
        hostile=(
            Hostile("small costs", (UNARY * 1e-9, GRAPH * 1e-9, LAM)),
            Hostile("large costs", (UNARY * 1e9, GRAPH, LAM)),
            Hostile("strong neighbours", (UNARY, 1e3 * GRAPH.T @ GRAPH, LAM)),
            Hostile("no neighbours", (UNARY, GRAPH, LAM * 0)),
            Hostile("neighbours that differ", (UNARY, -GRAPH, LAM)),
            Hostile("equal costs", (torch.ones_like(UNARY), GRAPH, LAM)),
        ),
        wrong=(
            Wrong("a vector", (UNARY[0, 0], GRAPH, LAM), "unary: expected at least 2 dimensions"),
            Wrong("fewer points", (UNARY[:, 1:], GRAPH, LAM), r"affinity: expected shape \(2, 2\) for the points"),
        ),
    ),
    LayerCase(
        "laplacian_clustering GMRES",
        lambda *data: laplacian_clustering(*data, adjoint=GMRES()),
        (UNARY, GRAPH, LAM),
        per_element(_neighbours, (2, 2, 0)),
        event_ndims=(2, 2, 0),
        source=ZIKO,
        exact_bits=False,
    ),
    LayerCase(
        "transductive_clustering",
        transductive_clustering,
        (QUERY, SUPPORT, LABELS, GRAPH, LAM),
        per_element(_prototypes, (2, 2, 2, 2, 0)),
        event_ndims=(2, 2, 2, 2, 0),
        names=("query", "support", "labels", *GRAPH_NAMES),
        source=ZIKO2,
        representative=True,
        tolerant=lambda *data: transductive_clustering(*data, on_failure="nan"),
        solution=transductive_clustering_ex,
        starved=lambda *data: transductive_clustering(*data, solver=ONE_STEP),
        starved_solution=lambda *data: transductive_clustering_ex(*data, solver=ONE_STEP),
        exact_bits=False,
        hostile=(
            Hostile("far points", (QUERY * 1e4, SUPPORT * 1e4, LABELS, GRAPH, LAM)),
            Hostile("equal queries", (QUERY * 0 + 0.3, SUPPORT, LABELS, GRAPH, LAM)),
            Hostile("sharp labels", (QUERY, SUPPORT, LABELS.round(), GRAPH, LAM)),
        ),
        wrong=(
            Wrong("labels", (QUERY, SUPPORT, LABELS[1:], GRAPH, LAM), r"labels: expected shape \(2,\) rows as support"),
            Wrong("dimensions", (QUERY.mT, SUPPORT, LABELS, GRAPH, LAM), "support: expected shape"),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (*_PROJECTIONS, *_RATES, *_CLUSTERINGS)
