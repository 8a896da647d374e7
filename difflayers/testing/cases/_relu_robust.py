"""Cases of robust convex ReLU networks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.relu import (
    L2,
    ClarabelSolver,
    Gates,
    Hinge,
    LInf,
    Logistic,
    Loss,
    Robustness,
    Squared,
    certified_margin,
    robust_convex_relu,
    robust_convex_relu_ex,
)
from difflayers.relu import ConvexReLUSolution as Trained
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023"
NDIMS = (2, 1, 1, 0, 0)
NAMES = ("X", "y", "sample_weight", "beta", "epsilon")
GATES = numbers([[1.0, 0.3], [-0.8, 0.5], [0.1, -1.0]])
Ball = type[Robustness]


def _cvxpy(loss: Loss, ball: Ball) -> Callable[..., np.ndarray]:
    """The worst case written by hand, corner by corner of the ball where it has corners."""

    def solve(X: np.ndarray, y: np.ndarray, s: np.ndarray, beta: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        import cvxpy as cp

        open_gates = X @ GATES.numpy().T >= 0
        (n, d), P = X.shape, len(GATES)
        v, w = cp.Variable((P, d)), cp.Variable((P, d))
        corners = [float(epsilon) * np.array(c) for c in itertools.product((-1.0, 1.0), repeat=d)]
        rules, total = [], beta * (cp.sum(cp.norm(v, 2, axis=1)) + cp.sum(cp.norm(w, 2, axis=1)))
        for k in range(n):
            q = sum((v[i] - w[i] for i in range(P) if open_gates[k, i]), 0 * v[0])
            for i in range(P):
                side = 1.0 if open_gates[k, i] else -1.0
                for p in (v[i], w[i]):
                    if ball is L2:
                        rules.append(side * (X[k] @ p) >= float(epsilon) * cp.norm(p, 2))
                    else:
                        rules += [side * ((X[k] + corner) @ p) >= 0 for corner in corners]
            if ball is L2:
                worse = float(epsilon) * cp.norm(q, 2)
            else:
                worse = cp.maximum(*(corner @ q for corner in corners))
            f = X[k] @ q
            if isinstance(loss, Squared):
                each = cp.square(cp.pos(cp.abs(f - y[k]) + worse)) / 2
            else:
                margin = y[k] * f - abs(y[k]) * worse
                each = cp.pos(1 - margin) if isinstance(loss, Hinge) else cp.logistic(-margin)
            total = total + s[k] * each
        problem = cp.Problem(cp.Minimize(total), rules)
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        return np.array(problem.value)

    return solve


def _call(make: Callable[..., Any], pick: Callable[[Any], Any], ball: Ball, **options: Any) -> Callable[..., Any]:
    def run(X: Tensor, y: Tensor, s: Tensor, beta: Tensor, epsilon: Tensor) -> Any:
        gates = GATES.to(X) if X.is_floating_point() else GATES.to(y)
        return pick(make(X, y, beta, gates, ball(epsilon), sample_weight=s, **options))

    return run


def _objective(found: Any) -> Any:
    if isinstance(found, Trained):
        return found.objective
    return replace(found, value=found.value.objective)


def _quietly(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For data that are meant to be too narrow."""

    def run(*inputs: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return fn(*inputs)

    return run


ONCE = "neurons of a cone program have no derivative, so the objective has a first one only; tests/relu check it alone"
NO_SECOND = dict.fromkeys(
    (
        *("gradgradcheck", "hessians_agree", "vmapped_hessian", "shared_gradient_is_a_sum"),
        *("tolerance_changes_nothing", "one_bad_element"),
    ),
    ONCE,
)
NO_ADJOINT = {"solves_are_traced": "the derivative of the objective is the Lagrangian's, without an adjoint solve"}


def _case(name: str, inputs: tuple[Tensor, ...], loss: Loss, ball: Ball = LInf, **fields: Any) -> LayerCase:
    X, y, s, beta, epsilon = inputs
    fn = _call(robust_convex_relu, _objective, ball, loss=loss)
    gap = _call(robust_convex_relu, lambda found: found.gap, ball, loss=loss)
    starved = {"solver": ClarabelSolver(max_steps=2), "loss": loss}
    oracle = per_element(_cvxpy(loss, ball), NDIMS)
    common: dict[str, Any] = {
        "layer": "robust_convex_relu",
        "source": SOURCE,
        "event_ndims": NDIMS,
        "names": NAMES,
        "invariants": (lambda _, *data: gap(*data),),
        "tolerant": _call(robust_convex_relu, _objective, ball, loss=loss, on_failure="nan"),
        "solution": _call(robust_convex_relu_ex, _objective, ball, loss=loss),
        "starved": _call(robust_convex_relu, _objective, ball, **starved),
        "starved_solution": _call(robust_convex_relu_ex, _objective, ball, **starved),
        "hostile": _hostile(inputs, loss, ball)[: None if isinstance(loss, Squared) and ball is LInf else 5],
        "wrong": (
            Wrong("labels", (X, y[..., :1], s, beta, epsilon), r"y: expected shape \(\d,\) in its last dimension"),
            Wrong("weights", (X, y, s[..., :1], beta, epsilon), r"sample_weight: expected shape"),
            Wrong("columns", (X[..., :1], y, s, beta, epsilon), r"gates: expected vectors of shape \(\.\.\., P, 1\)"),
            Wrong("radii", (X, y, s, beta, epsilon.new_ones(7)), r"epsilon: expected batch dimensions that broadcast"),
        ),
        "exempt": NO_SECOND | NO_ADJOINT,
        "exact_bits": False,
        # the solver stops at a gap of about 1e-12, and the derivative moves with its root at worst
        "tol": 1e-7,
    }
    return LayerCase(name, fn, inputs, oracle, **(common | fields))


def _hostile(inputs: tuple[Tensor, ...], loss: Loss, ball: Ball) -> tuple[Hostile, ...]:
    X, y, s, beta, epsilon = inputs
    fn = _call(robust_convex_relu, _objective, ball, loss=loss)
    oracle = per_element(_cvxpy(loss, ball), NDIMS)
    return (
        Hostile("a huge beta", (X, y, s, beta + 1000, epsilon)),
        Hostile("no perturbation", (X, y, s, beta, 0 * epsilon)),
        Hostile("cells too narrow", (X, y, s, beta, epsilon + 100), fn=_quietly(fn), oracle=_at_zero(loss)),
        Hostile("a zero row", (torch.cat([0 * X[..., :1, :], X[..., 1:, :]], -2), y, s, beta, 0 * epsilon)),
        Hostile("duplicate rows", (torch.cat([X[..., :1, :], X[..., :-1, :]], -2), y, s, beta, epsilon)),
        Hostile("a sample without weight", (X, y, s * (s > s.min()), beta, epsilon)),
        # the neurons scale against the data, so the value stays
        Hostile("huge data", (X * 1e6, y, s, beta * 1e6, epsilon * 1e6), oracle=_at(oracle, inputs)),
        Hostile("tiny data", (X * 1e-6, y, s, beta * 1e-6, epsilon * 1e-6), oracle=_at(oracle, inputs)),
        Hostile("beta is zero", (X, y, s, 0 * beta, epsilon), ValueError, "beta: expected more than 0, got 0"),
        Hostile("a negative radius", (X, y, s, beta, -epsilon), ValueError, "epsilon: expected at least 0, got -"),
    )


def _at(oracle: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return lambda *_: oracle(*inputs)


def _at_zero(loss: Loss) -> Callable[..., Tensor]:
    return lambda X, y, s, beta, epsilon: (s * loss.value(0 * y, y)).sum(-1) + 0 * beta + 0 * epsilon


SHARED = normal(3, 4, 2), normal(4, 2, 4), 0.5 + normal(5, 4).abs(), numbers([0.3, 0.15]), numbers(0.1)
EACH = normal(6, 2, 3, 2), normal(7, 2, 3), 0.5 + normal(8, 3).abs(), numbers(0.1), numbers([0.05, 0.1])
SIGNS = numbers([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]])
NEURONS = normal(12, 2, 2)


def _margin(p: Tensor, X: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    nothing = p.new_zeros(())
    v, w = p.split(1, -2)
    return certified_margin(Trained(v, w, nothing, nothing, Gates(v.detach(), nothing > 0)), X, y, LInf(epsilon))


def _bound(p: np.ndarray, X: np.ndarray, y: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
    """The better of two bounds, neuron by neuron."""
    out = []
    for x, label in zip(X, y, strict=True):
        flat, each = label * (max(x @ p[0], 0) - max(x @ p[1], 0)), 0.0
        total, extra = np.zeros(2), 0.0
        for sign, one in zip((1.0, -1.0), p, strict=True):
            t, r = x @ one, epsilon * np.abs(one).sum()
            total += sign * one * (t > 0)
            extra += max(r - abs(t), 0) if sign * label < 0 else 0
            low, high = max(t - r, 0), max(t + r, 0)
            each += (max(t, 0) - low) if sign * label > 0 else (high - max(t, 0))
        out.append(flat - abs(label) * min(epsilon * np.abs(total).sum() + extra, each))
    return np.array(out)


CASES: tuple[LayerCase, ...] = (
    _case("robust_convex_relu", SHARED, Squared(), representative=True),
    _case("robust_convex_relu each its data", EACH, Squared()),
    _case("robust_convex_relu hinge", (SHARED[0], SIGNS, *SHARED[2:]), Hinge()),
    _case("robust_convex_relu logistic", (SHARED[0], SIGNS, *SHARED[2:]), Logistic()),
    _case("robust_convex_relu L2", SHARED, Squared(), L2),
    LayerCase(
        "certified_margin",
        _margin,
        (NEURONS, normal(13, 2, 3, 2), normal(14, 2, 3), numbers([0.2, 0.4])),
        per_element(_bound, (2, 2, 1, 0)),
        source=SOURCE,
        event_ndims=(2, 2, 1, 0),
        names=("v", "X", "y", "epsilon"),
        representative=True,
        exact_bits=False,
        exempt={"autocast_of_backward": "products of the data are plain torch, which autocast halves in backward"},
    ),
)
