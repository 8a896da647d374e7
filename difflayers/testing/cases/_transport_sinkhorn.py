"""Cases of entropic transport plans, potentials and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from difflayers.linalg import CG
from difflayers.testing._case import Hostile, LayerCase, Wrong
from difflayers.transport import KernelSinkhorn, LogSinkhorn, Sinkhorn, sinkhorn, sinkhorn_ex, sinkhorn_value

from ._common import numbers, per_element

__all__ = ["CASES"]

CUTURI = "M. Cuturi, Sinkhorn Distances, 2013"
CHIZAT = "L. Chizat et al., Scaling Algorithms for Unbalanced Optimal Transport Problems, 2018"
FEYDY = "J. Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019"
HARD = np.float64(np.inf)


def _potentials(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, eps: np.ndarray, rho_a: Any = HARD, rho_b: Any = HARD
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Alternate minimisation in the logarithm, in double precision to a standstill: plan, f, g."""
    if np.isinf(rho_a) and np.isinf(rho_b):
        b = b / b.sum() * a.sum()

    def soft(mass: np.ndarray, moved: np.ndarray) -> np.ndarray:
        top = moved.max(0)
        return np.asarray(top + np.log((mass[:, None] * np.exp(moved - top)).sum(0)))

    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(100_000):
        old = np.concatenate([f, g])
        f = -eps * soft(b, (g[:, None] - cost.T) / eps) / (1 + eps / rho_a)
        g = -eps * soft(a, (f[:, None] - cost) / eps) / (1 + eps / rho_b)
        if np.abs(np.concatenate([f, g]) - old).max() <= 1e-15 * np.abs(old).max():
            break
    moved = np.minimum((f[:, None] + g - cost) / eps, 700.0)
    if np.isinf(rho_a) and np.isinf(rho_b):
        shift = (f @ a / a.sum() - g @ b / b.sum()) / 2
        f, g = f - shift, g + shift
    return a[:, None] * b * np.exp(moved), f, g


def _plan(*data: Any) -> np.ndarray:
    return _potentials(*data)[0]


def _value(cost: np.ndarray, a: np.ndarray, b: np.ndarray, eps: Any, rho_a: Any = HARD, rho_b: Any = HARD) -> Any:
    """The primal objective at the plan."""
    P = _plan(cost, a, b, eps, rho_a, rho_b)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        some = p > 0
        return float((p[some] * np.log(p[some] / q[some])).sum() - p.sum() + q.sum())

    total = (cost[P > 0] * P[P > 0]).sum() + eps * kl(P, a[:, None] * b)
    total += 0 if np.isinf(rho_a) else rho_a * kl(P.sum(1), a)
    return total + (0 if np.isinf(rho_b) else rho_b * kl(P.sum(0), b))


def _nothing(cost: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(cost)


def _idle(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho_a: Any = 0.0, rho_b: Any = 0.0) -> Tensor:
    return (rho_a * a.sum(-1) + rho_b * b.sum(-1)).expand(cost.shape[:-2])


def _called(make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``(cost, a, b, eps, rho_a, rho_b)``, of which the penalties may be missing."""

    def call(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, *rho: Tensor) -> Any:
        if not rho and (a.device, a.dtype) == (b.device, b.dtype):  # some clauses scale an input; totals must agree
            ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).abs()
            b = b * torch.where(torch.isfinite(ratio), ratio, 1)
        return make(cost, a, b, eps=eps, **dict(zip(("rho_a", "rho_b")[: len(rho)], rho, strict=True)), **options)

    return call


def _only(part: str) -> Callable[..., Any]:
    def solution(*data: Any, **options: Any) -> Any:
        found = sinkhorn_ex(*data, **options)
        return replace(found, value=getattr(found.value, part))

    return solution


def _sums(P: Tensor, cost: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
    return torch.cat([P.sum(-1) - a, P.sum(-2) - b], -1)


COST = numbers([[[0.1, 0.7, 1.3], [0.9, 0.2, 0.5]], [[0.4, -0.3, 0.8], [1.1, 0.6, 0.0]]])
A, B = numbers([0.4, 0.6]), numbers([[0.3, 0.5, 0.2], [0.25, 0.35, 0.4]])
EPS, RHO = numbers(0.2), numbers(0.5)
TALL, WIDE = (COST.mT.contiguous(), B, A, EPS), (COST, A, B, EPS)
NAMES = ("cost", "a", "b", "eps", "rho_a", "rho_b")
NDIMS = (2, 1, 1, 0, 0, 0)


def _hostile(plain: Callable[..., Tensor], nothing: Any, *inputs: Tensor) -> tuple[Hostile, ...]:
    cost, a, b, *rest = inputs
    empty, e = torch.zeros_like(a), rest[0]
    first = a.clone()
    first[..., 0] = 0
    first = first * (a.sum(-1, keepdim=True) / first.sum(-1, keepdim=True))
    more = rest[1:]
    forbidden = cost.clone()
    forbidden[0, 0, 0] = torch.inf
    return (
        Hostile("small numbers", (cost * 1e-9, a, b, *(t * 1e-9 for t in rest))),
        Hostile("large numbers", (cost * 1e9, a, b, *(t * 1e9 for t in rest))),
        Hostile("little mass", (cost, a * 1e-9, b * 1e-9, *rest)),
        Hostile("much mass", (cost, a * 1e9, b * 1e9, *rest)),
        Hostile("small eps", (cost, a, b, e * 1e-2, *more), may_fail=False),
        Hostile("large eps", (cost, a, b, e * 1e4, *more)),
        Hostile("equal costs", (torch.ones_like(cost), a, b, *rest)),
        Hostile("equal rows", (cost[..., :1, :].expand_as(cost).clone(), a, b, *rest)),
        Hostile("a row without mass", (cost, first, b, *rest)),
        Hostile("negative mass", (cost, -a, b, *rest), ValueError, "a: expected masses"),
        Hostile("no mass", (cost, empty, b if len(more) == 2 else b * 0, *rest), fn=plain, oracle=nothing),
        Hostile("a forbidden entry", (forbidden, a, b, *rest)),
        Hostile("eps of zero", (cost, a, b, e * 0, *more), ValueError, "eps: expected"),
    )


def _case(name: str, make: Callable[..., Any], inputs: tuple[Tensor, ...], oracle: Any, **fields: Any) -> LayerCase:
    options = fields.pop("options", {})
    cost, a, b, *rest = inputs
    n, m = cost.shape[-2:]

    def plain(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, *rho: Tensor) -> Tensor:
        return make(cost, a, b, eps=eps, **dict(zip(("rho_a", "rho_b")[: len(rho)], rho, strict=True)), **options)

    common: dict[str, Any] = {
        "source": CUTURI if len(inputs) == 4 else CHIZAT,
        "event_ndims": NDIMS[: len(inputs)],
        "names": NAMES[: len(inputs)],
        "oracle": per_element(oracle, NDIMS[: len(inputs)]),
        "tolerant": _called(make, on_failure="nan", **options),
        "hostile": _hostile(plain, fields.pop("nothing", _nothing), *inputs),
        "wrong": (
            Wrong("a vector", (cost[0, 0], a, b, *rest), "cost: expected at least 2 dimensions"),
            Wrong("rows", (cost, a[..., 1:], b, *rest), rf"a: expected shape \({n},\) as cost has rows"),
            Wrong("columns", (cost, a, b[..., 1:], *rest), rf"b: expected shape \({m},\) as cost has columns"),
        ),
    }
    return LayerCase(name, _called(make, **options), inputs, **(common | fields))


STARVED = KernelSinkhorn(max_steps=1, check_every=1, newton_steps=0)


def _plan_case(name: str, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    options = fields.get("options", {})
    more: dict[str, Any] = {"layer": "sinkhorn", "solution": _called(_only("plan"), **options), "exact_bits": False}
    return _case(name, sinkhorn, inputs, _plan, **(more | fields))


def _part(index: int) -> Callable[..., np.ndarray]:
    return lambda *data: _potentials(*data)[index]


def _potentials_case(name: str, part: str, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    return LayerCase(
        name,
        lambda *data: _called(_only(part))(*data).value,
        inputs,
        per_element(_part(("plan", "f", "g").index(part)), NDIMS[: len(inputs)]),
        layer="sinkhorn",
        source=CUTURI if len(inputs) == 4 else CHIZAT,
        event_ndims=NDIMS[: len(inputs)],
        exact_bits=False,
        **fields,
    )


def _module() -> Sinkhorn:
    return Sinkhorn(0.2, rho_a=0.5, learnable=True).double()


MODULE = _module()


def _module_called(log_eps: Tensor, log_rho: Tensor, cost: Tensor) -> Tensor:
    return functional_call(MODULE, {"log_eps": log_eps, "log_rho_a": log_rho}, (cost,))


def _module_oracle(log_eps: np.ndarray, log_rho: np.ndarray, cost: np.ndarray) -> np.ndarray:
    n, m = cost.shape
    return _plan(cost, np.full(n, 1 / n), np.full(m, 1 / m), np.exp(log_eps), np.exp(log_rho))


CASES: tuple[LayerCase, ...] = (
    _plan_case(
        "sinkhorn",
        TALL,
        representative=True,
        invariants=(_sums,),
        starved=_called(sinkhorn, solver=STARVED),
        starved_solution=_called(_only("plan"), solver=STARVED),
    ),
    _plan_case("sinkhorn LogSinkhorn CG", WIDE, options={"solver": LogSinkhorn(newton_steps=0), "adjoint": CG()}),
    _plan_case("sinkhorn both penalised", (*TALL, RHO, numbers([0.3, 2.0]))),
    _plan_case("sinkhorn one penalised", (*WIDE, RHO)),
    _potentials_case("sinkhorn_ex f", "f", TALL),
    _potentials_case("sinkhorn_ex g penalised", "g", (*WIDE, RHO)),
    _case("sinkhorn_value", sinkhorn_value, WIDE, _value, source=FEYDY, representative=True, nothing=_idle),
    _case("sinkhorn_value penalised", sinkhorn_value, (*TALL, RHO, numbers(0.8)), _value, source=FEYDY, nothing=_idle),
    LayerCase(
        "Sinkhorn",
        _module_called,
        (EPS.log(), RHO.log(), COST),
        per_element(_module_oracle, (0, 0, 2)),
        source=CHIZAT,
        event_ndims=(0, 0, 2),
        representative=True,
        make_module=_module,
        module_inputs=(COST,),
        exact_bits=False,
    ),
)
