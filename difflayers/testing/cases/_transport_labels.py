"""Cases of soft labels and of routers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import AuxLossFreeBalancer, KernelSinkhorn, SinkhornRouter, self_label, self_label_ex
from difflayers.transport import sinkhorn_routing as routing

from ._common import numbers, per_element
from ._transport_sinkhorn import STARVED, _plan

__all__ = ["CASES"]

ASANO = "Y. M. Asano et al., Self-labelling via simultaneous clustering and representation learning, 2020"
CLARK = "A. Clark et al., Unified Scaling Laws for Routed Language Models, 2022"
HAN = "X. Y. Han, Y. Zhong, A Theoretical Framework for Auxiliary-Loss-Free Load Balancing, 2025"

LOG_PROBS = numbers(
    [
        [[-0.2, -2.1, -2.9], [-0.4, -1.3, -2.7], [-0.9, -0.8, -2.2]],
        [[-1.2, -0.9, -1.3], [-0.3, -1.9, -2.2], [-0.1, -3.1, -3.2]],
    ]
)
PRIOR, EPS = numbers([0.2, 0.5, 0.3]), numbers(0.4)
SHARES = numbers([0.3, 0.4, 0.3])


def _soft(**options: Any) -> Callable[..., Any]:
    def call(log_probs: Tensor, prior: Tensor, eps: Tensor) -> Any:
        return self_label(log_probs, prior, eps=eps, soft=True, **options)

    return call


def _soft_solution(**options: Any) -> Callable[..., Any]:
    def call(log_probs: Tensor, prior: Tensor, eps: Tensor) -> Any:
        found = self_label_ex(log_probs, prior, eps=eps, soft=True, **options)
        return type(found)(found.value.labels, found.status, found.steps, found.residual)

    return call


def _soft_oracle(log_probs: np.ndarray, prior: np.ndarray, eps: np.ndarray) -> np.ndarray:
    n = len(log_probs)
    return n * _plan(-log_probs, np.full(n, 1 / n), prior / prior.sum(), eps)


def _sizes(soft: Tensor, log_probs: Tensor, prior: Tensor, eps: Tensor) -> Tensor:
    return soft.mean(-2) - prior / prior.sum(-1, keepdim=True)


def _plan_weights(**options: Any) -> Callable[..., Tensor]:
    def call(logits: Tensor, shares: Tensor, eps: Tensor) -> Tensor:
        return routing(logits, None, shares, eps=eps, top_k=2, plan_weights=True, **options).weights

    return call


def _plan_weights_oracle(logits: np.ndarray, shares: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """The second plan has what experts lack of twice their shares, and no entry that was chosen before."""
    rows, wanted = np.arange(len(logits)), shares / shares.sum()
    first = _soft_oracle(logits, shares, eps)
    taken = first.argmax(-1)
    lack = np.maximum(2 * wanted - np.bincount(taken, minlength=len(shares)) / len(logits), 0)
    cost = -logits.astype(np.float64)
    cost[rows, taken] = np.inf
    cost[:, lack == 0] = 0  # nothing comes there
    second = len(logits) * _plan(cost, np.full(len(logits), 1 / len(logits)), lack / lack.sum(), eps)
    weight = first[rows, taken]
    return np.stack([weight, (1 - weight) * second.max(-1)], -1)


def _gates_oracle(logits: np.ndarray) -> np.ndarray:
    """Softmax at the largest entries of the plan."""
    n, m = logits.shape
    plan = _plan(-logits, np.full(n, 1 / n), np.full(m, 1 / m), np.float64(0.1))
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return gates[np.arange(n), plan.argmax(-1)][:, None]


def _gates(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda logits: routing(logits, **options).weights


class _Weights(nn.Module):
    """Logits of a linear map, routed."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate, self.router = nn.Linear(3, 3, bias=False, dtype=torch.float64, device="cpu"), router.double()
        with torch.no_grad():
            self.gate.weight.copy_(numbers([[1.0, 0.2, -0.3], [0.1, 0.9, 0.4], [-0.2, 0.3, 1.1]]))

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.router(self.gate(x)).weights
        return weights

    def extra_repr(self) -> str:
        return "weights"


def _router() -> SinkhornRouter:
    router = SinkhornRouter(3, top_k=2, eps=0.3, plan_weights=True).double().eval()
    router.potential.copy_(numbers([0.4, -0.1, -0.3]))
    return router


def _router_oracle(logits: np.ndarray) -> np.ndarray:
    moved = np.exp((logits + np.array([0.4, -0.1, -0.3])) / 0.3)
    return -np.sort(-moved / moved.sum(-1, keepdims=True), -1)[:, :2]


def _balancer() -> AuxLossFreeBalancer:
    balancer = AuxLossFreeBalancer(3, top_k=2, normalize=True).double().eval()
    balancer.bias.copy_(numbers([-0.6, 0.1, 0.5]))
    return balancer


def _balancer_oracle(gates: np.ndarray) -> np.ndarray:
    """The best of all pairs of experts, the larger sum first."""
    bias = np.array([-0.6, 0.1, 0.5])
    found = []
    for row in gates:
        i, j = max(itertools.permutations(range(3), 2), key=lambda pair: (row + bias)[list(pair)] @ [2.0, 1.0])
        found.append(np.array([row[i], row[j]]) / (row[i] + row[j]))
    return np.array(found)


ROUTER, BALANCER = _router(), _balancer()
GATES = numbers([[[0.6, 0.3, 0.2], [0.9, 0.5, 0.25]], [[1.9, 0.4, 0.3], [0.4, 0.7, 0.1]]])
TIES = "equal entries in float32 or of ties are chosen in the order of the experts, by either way of rounding"

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "self_label",
        _soft(),
        (LOG_PROBS, PRIOR, EPS),
        per_element(_soft_oracle, (2, 1, 0)),
        invariants=(_sizes,),
        event_ndims=(2, 1, 0),
        names=("log_probs", "prior", "eps"),
        source=ASANO,
        representative=True,
        tolerant=_soft(on_failure="nan"),
        solution=_soft_solution(),
        starved=_soft(solver=STARVED),
        starved_solution=_soft_solution(solver=STARVED),
        exact_bits=False,
        hostile=(
            Hostile("small eps", (LOG_PROBS, PRIOR, EPS * 0.05)),
            Hostile("large eps", (LOG_PROBS, PRIOR, EPS * 1e4)),
            Hostile("logits", (LOG_PROBS * 10 + 3, PRIOR, EPS * 10)),
            Hostile("an empty cluster", (LOG_PROBS, numbers([0.0, 0.6, 0.4]), EPS)),
            Hostile("much mass", (LOG_PROBS, PRIOR * 1e9, EPS)),
            Hostile("equal rows", (LOG_PROBS[:, :1].expand_as(LOG_PROBS).clone(), PRIOR, EPS)),
            Hostile("negative masses", (LOG_PROBS, -PRIOR, EPS), ValueError, "prior: expected"),
            Hostile("eps of zero", (LOG_PROBS, PRIOR, EPS * 0), ValueError, "eps: expected"),
        ),
        wrong=(
            Wrong("a vector", (LOG_PROBS[0, 0], PRIOR, EPS), "log_probs: expected at least 2 dimensions"),
            Wrong("clusters", (LOG_PROBS, PRIOR[:2], EPS), r"prior: expected shape \(3,\) as log_probs has clusters"),
        ),
    ),
    LayerCase(
        "sinkhorn_routing plan",
        _plan_weights(),
        (LOG_PROBS, SHARES, EPS),
        per_element(_plan_weights_oracle, (2, 1, 0)),
        event_ndims=(2, 1, 0),
        names=("logits", "shares", "eps"),
        source=CLARK,
        representative=True,
        tolerant=_plan_weights(on_failure="nan"),
        exact_bits=False,
        hostile=(
            Hostile("small eps", (LOG_PROBS, SHARES, EPS * 0.2)),
            Hostile("large eps", (LOG_PROBS, SHARES, EPS * 1e3)),
            Hostile("negative shares", (LOG_PROBS, -SHARES, EPS), ValueError, "shares: expected"),
            Hostile("an expert without a share", (LOG_PROBS, numbers([0.5, 0.0, 0.5]), EPS)),
        ),
        wrong=(
            Wrong("a vector", (LOG_PROBS[0, 0], SHARES, EPS), "logits: expected at least 2 dimensions"),
            Wrong("shares", (LOG_PROBS, SHARES[:2], EPS), r"shares: expected shape \(3,\) as logits has experts"),
        ),
    ),
    LayerCase(
        "sinkhorn_routing gates",
        _gates(solver=KernelSinkhorn()),
        (LOG_PROBS,),
        per_element(_gates_oracle, (2,)),
        event_ndims=(2,),
        names=("logits",),
        source=CLARK,
        tolerant=_gates(on_failure="nan"),
        exact_bits=False,
    ),
    LayerCase(
        "SinkhornRouter",
        lambda logits: ROUTER.to(logits.device)(logits).weights,
        (LOG_PROBS,),
        per_element(_router_oracle, (2,)),
        event_ndims=(2,),
        source=CLARK,
        representative=True,
        make_module=lambda: _Weights(_router()),
        module_inputs=(LOG_PROBS[0],),
    ),
    LayerCase(
        "AuxLossFreeBalancer",
        lambda gates: BALANCER.to(gates.device)(gates).weights,
        (GATES,),
        per_element(_balancer_oracle, (2,)),
        event_ndims=(2,),
        source=HAN,
        representative=True,
        make_module=lambda: _Weights(_balancer()),
        module_inputs=(LOG_PROBS[0],),
    ),
)
