"""Cases of generalized sum pooling: the coupling, the module, the zero-shot loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import GeneralizedSumPool, gsp_coupling, zero_shot_loss

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

GURBUZ = "Y. Z. Gurbuz et al., Generalized Sum Pooling for Metric Learning, 2023"
PRODUCTS = "inner products are plain torch, whose backward follows the autocast mode it is run under"


def _masses(cost: np.ndarray, stay: np.ndarray, ratio: Any, gamma: Any) -> np.ndarray:
    """Residual above plan: the stationary point for a multiplier of the mass, which bisection finds."""
    n = cost.shape[1]
    energy = -gamma * np.concatenate([stay[None], cost])

    def at(multiplier: float) -> np.ndarray:
        moved = energy.copy()
        moved[1:] += multiplier
        mass = np.exp(moved - moved.max(0))
        return np.asarray(mass / mass.sum(0) / n)

    low, high = -60 - 2 * np.abs(energy).max(), 60 + 2 * np.abs(energy).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1:].sum() < ratio else (low, middle)
    return at((low + high) / 2)


def _coupling(cost: Tensor, stay: Tensor | None, ratio: Any, gamma: Any) -> Tensor:
    """Residual above plan."""
    residual, plan = gsp_coupling(cost, ratio, gamma, residual_cost=stay)
    return torch.cat([residual.unsqueeze(-2), plan], -2)


def _sums(value: Tensor, cost: Tensor, stay: Tensor, ratio: Tensor, gamma: Tensor) -> Tensor:
    mass = value[..., 1:, :].sum((-2, -1)) - ratio
    return torch.cat([value.sum(-2) - 1 / value.shape[-1], mass.unsqueeze(-1)], -1)


COST = numbers([[[0.1, 0.7, 1.3, 0.4], [0.9, 0.2, 0.5, 0.8]], [[0.4, 0.3, 0.8, 0.1], [1.1, 0.6, 0.0, 0.9]]])
STAY, RATIO, GAMMA = numbers([0.1, 0.3, 0.0, 0.2]), numbers([0.3, 0.65]), numbers(4.0)
HALF = numbers([0.5, 0.5])


def _whole(cost: np.ndarray, stay: np.ndarray, ratio: Any, gamma: Any) -> np.ndarray:
    """At a ratio of 1."""
    mass = np.exp(-gamma * (cost - cost.min(0)))
    return np.concatenate([0 * stay[None], mass / mass.sum(0) / cost.shape[1]])


def _module() -> GeneralizedSumPool:
    pool = GeneralizedSumPool(2, 2, 0.4, 3.0, learnable=True, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        pool.prototypes.copy_(PROTOTYPES)
    return pool


TOKENS, PROTOTYPES = normal(40, 2, 3, 2) * 0.8, numbers([[0.4, -0.2], [1.2, 0.9]])
LOGIT, LOG = numbers(-0.4), numbers(1.1)
MODULE = _module()


def _pooled(tokens: Tensor, prototypes: Tensor, logit: Tensor, log: Tensor) -> Tensor:
    parameters = {"prototypes": prototypes, "logit_ratio": logit, "log_gamma": log}
    return functional_call(MODULE, parameters, (tokens,))


def _pooled_oracle(tokens: np.ndarray, prototypes: np.ndarray, logit: Any, log: Any) -> np.ndarray:
    def ball(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.maximum(1, np.linalg.norm(x, axis=-1, keepdims=True)))

    cost = np.linalg.norm(ball(prototypes)[:, None] - ball(tokens), axis=-1)
    ratio = 1 / (1 + np.exp(-logit))
    residual = _masses(cost, np.zeros(len(tokens)), ratio, np.exp(log))[0]
    return np.asarray((1 / len(tokens) - residual) @ tokens / ratio)


LABELS = torch.tensor([0, 2, 1, 0], device="cpu")
ATTRIBUTES, EMBEDDINGS = normal(41, 2, 4, 2).softmax(-1), normal(42, 3, 2)


def _loss(attributes: Tensor, embeddings: Tensor) -> Tensor:
    return zero_shot_loss(attributes, LABELS.to(attributes.device), embeddings)


def _loss_oracle(attributes: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Ridge regression as ordinary least squares with more rows."""
    losses = []
    for one, other in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))):
        labels = LABELS.numpy()
        rows = np.concatenate([attributes[one], np.sqrt(0.05) * np.eye(2)])
        targets = np.concatenate([embeddings[labels[one]], np.zeros((2, 2))])
        W = np.linalg.lstsq(rows, targets, rcond=None)[0]
        logits = 9.5 * attributes[other] @ W @ embeddings.T
        top = logits.max(1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        losses.extend(-logs[[0, 1], labels[other]])
    return np.asarray(np.mean(losses))


CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "gsp_coupling",
        _coupling,
        (COST, STAY, RATIO, GAMMA),
        per_element(_masses, (2, 1, 0, 0)),
        (_sums,),
        (2, 1, 0, 0),
        names=("cost", "residual_cost", "ratio", "gamma"),
        source=GURBUZ,
        representative=True,
        hostile=(
            Hostile("small numbers", (COST * 1e-9, STAY * 1e-9, RATIO, GAMMA * 1e9)),
            Hostile("large numbers", (COST * 1e9, STAY * 1e9, RATIO, GAMMA * 1e-9)),
            Hostile("low temperature", (COST, STAY, RATIO, GAMMA * 2500)),
            Hostile("low temperature, whole positions", (COST, STAY, HALF, GAMMA * 2500)),
            Hostile("high temperature", (COST, STAY, RATIO, GAMMA * 1e-6)),
            Hostile("little mass", (COST, STAY, RATIO * 1e-6, GAMMA)),
            Hostile("nearly all", (COST, STAY, 1 - RATIO * 1e-9, GAMMA)),
            Hostile("all", (COST, STAY, RATIO * 0 + 1, GAMMA), oracle=per_element(_whole, (2, 1, 0, 0))),
            Hostile("equal costs", (torch.ones_like(COST), STAY * 0, HALF, GAMMA)),
            Hostile("ratio of zero", (COST, STAY, RATIO * 0, GAMMA), ValueError, "ratio: expected more than 0"),
            Hostile("ratio of two", (COST, STAY, HALF * 4, GAMMA), ValueError, "ratio: expected at most 1"),
            Hostile("gamma of zero", (COST, STAY, RATIO, GAMMA * 0), ValueError, "gamma: expected more than 0"),
        ),
        wrong=(
            Wrong("a vector", (COST[0, 0], STAY, RATIO, GAMMA), "cost: expected at least 2 dimensions"),
            Wrong("columns", (COST, STAY[1:], RATIO, GAMMA), r"residual_cost: expected shape \(4,\)"),
            Wrong("batch", (COST, STAY, numbers([0.1, 0.2, 0.3]), GAMMA), "ratio: expected batch dimensions"),
        ),
    ),
    LayerCase(
        "GeneralizedSumPool",
        _pooled,
        (TOKENS, PROTOTYPES, LOGIT, LOG),
        per_element(_pooled_oracle, (2, 2, 0, 0)),
        event_ndims=(2, 2, 0, 0),
        names=("features", None, None, None),
        source=GURBUZ,
        representative=True,
        exempt={
            "several_batch_dimensions": "four dimensions are images, channels before positions",
            "autocast_of_backward": PRODUCTS,
        },
        make_module=_module,
        module_inputs=(TOKENS,),
        hostile=(
            Hostile("zeros", (TOKENS * 0, PROTOTYPES, LOGIT, LOG)),
            Hostile("small features", (TOKENS * 1e-9, PROTOTYPES, LOGIT, LOG)),
            Hostile("large features", (TOKENS * 1e9, PROTOTYPES, LOGIT, LOG)),
            Hostile("features at prototypes", (PROTOTYPES[[0, 1, 1]].expand(2, 3, 2).clone(), PROTOTYPES, LOGIT, LOG)),
            Hostile("low temperature", (TOKENS, PROTOTYPES, LOGIT, LOG + 6)),
        ),
        wrong=(
            Wrong("channels", (TOKENS[..., :1], PROTOTYPES, LOGIT, LOG), "features: expected C = 2 channels"),
            Wrong("a vector", (TOKENS[0, 0], PROTOTYPES, LOGIT, LOG), "features: expected at least 2 dimensions"),
        ),
    ),
    LayerCase(
        "zero_shot_loss",
        _loss,
        (ATTRIBUTES, EMBEDDINGS),
        per_element(_loss_oracle, (2, 2)),
        event_ndims=(2, 2),
        names=("attributes", "class_embeddings"),
        source=GURBUZ,
        representative=True,
        exempt={"autocast_of_backward": PRODUCTS},
        hostile=(
            Hostile("zeros", (ATTRIBUTES * 0, EMBEDDINGS)),
            Hostile("equal attributes", (ATTRIBUTES[:, :1].expand(2, 4, 2).clone(), EMBEDDINGS)),
            Hostile("large embeddings", (ATTRIBUTES, EMBEDDINGS * 1e3)),
        ),
        wrong=(
            Wrong("a vector", (ATTRIBUTES[0, 0], EMBEDDINGS), "attributes: expected at least 2 dimensions"),
            Wrong("rows", (ATTRIBUTES[:, :3], EMBEDDINGS), "labels: expected 3 in the last dimension"),
            Wrong("classes", (ATTRIBUTES, EMBEDDINGS[:2]), "labels: expected 0 to 1"),
        ),
    ),
)
