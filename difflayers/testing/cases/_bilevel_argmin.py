"""Cases of :class:`~difflayers.bilevel.ArgminLayer`.

The layer has one unknown a call; batches are ``vmap`` over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Solution
from difflayers.bilevel import ArgminLayer, Bilevel
from difflayers.implicit import LBFGS, Anderson, Newton
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import batch_shape, normal, numbers, per_element, unrolled_newton

NO_EMPTY = {"empty_batch": "the layer has one unknown a call; torch's vmap over calls takes no empty batch"}
SOURCE = "bilevel optimisation: the lower solution as a layer"


def _mapped(solve: Callable[..., Any], ndims: Sequence[int]) -> Callable[..., Any]:
    """`solve` of one element for all elements of a batch, by ``vmap``."""

    def fn(*args: Tensor) -> Any:
        batch = batch_shape(args, ndims)
        in_dims = tuple(0 if a.ndim > k else None for a, k in zip(args, ndims, strict=True))
        if not batch or all(d is None for d in in_dims):
            return solve(*args)
        if not batch.numel():  # of which torch's vmap knows nothing: shapes and dtypes of one made-up element
            made = (
                a if d is None else a.new_ones(a.shape[a.ndim - k :])
                for a, k, d in zip(args, ndims, in_dims, strict=True)
            )
            out = solve(*made)
            return (
                tuple(t.new_empty(batch + t.shape) for t in out)
                if isinstance(out, tuple)
                else out.new_empty(batch + out.shape)
            )
        flat = [
            a if d is None else a.expand(batch + a.shape[a.ndim - k :]).reshape((-1, *a.shape[a.ndim - k :]))
            for a, k, d in zip(args, ndims, in_dims, strict=True)
        ]
        out = torch.func.vmap(solve, in_dims=in_dims)(*flat)
        parts = out if isinstance(out, tuple) else (out,)
        shaped = tuple(t.reshape(batch + t.shape[1:]) for t in parts)
        return shaped if isinstance(out, tuple) else shaped[0]

    return fn


def _forms(problem: Bilevel, n: int, ndims: Sequence[int], **options: Any) -> tuple[Any, Any]:
    """The layer and its ``_ex`` form as functions of (x, data), for batches."""

    def start(x: Tensor) -> Tensor:
        return x.new_zeros(n)

    def value(x: Tensor, data: Tensor) -> Tensor:
        return ArgminLayer(problem, **options)(x, data, init=start(data))

    def parts(x: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        s = ArgminLayer(problem, **options).forward_ex(x, data, init=start(data))
        return s.value, s.status, s.steps, s.residual

    def solution(x: Tensor, data: Tensor) -> Solution[Tensor]:
        return Solution(*_mapped(parts, ndims)(x, data))

    return _mapped(value, ndims), solution


# ------------------------------------------------------------------------------------------ ridge with a quartic term


def _lower(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """One penalty per coordinate on the logarithmic scale, a coupling, and a term that is not quadratic."""
    return (y - a).square().sum() / 2 + (x.exp() * y.square()).sum() / 2 + y.sum() ** 2 / 4 + y.pow(4).sum() / 4


def _slope(y: Tensor, x: Tensor, a: Tensor) -> Tensor:
    return y - a + x.exp() * y + y.sum(-1, keepdim=True) / 2 + y**3


def _newton(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    y = np.zeros_like(a)
    for _ in range(100):
        slope = y - a + np.exp(x) * y + y.sum() / 2 + y**3
        step = np.linalg.solve(np.diag(1 + np.exp(x) + 3 * y * y) + 0.5, slope)
        y = y - step / max(1.0, float(np.abs(step).max()))
    return y


SMOOTH = Bilevel(upper=lambda x, y, batch: y.square().sum(), lower=_lower)
NDIMS = (1, 1)
INPUTS = (normal(21, 3) / 2, normal(22, 2, 3))
FN, SOLUTION = _forms(SMOOTH, 3, NDIMS)
STARVED, STARVED_SOLUTION = _forms(SMOOTH, 3, NDIMS, solver=LBFGS(max_steps=1))


# ------------------------------------------------------------------------------- lasso with one penalty per coordinate

DESIGN = normal(23, 6, 3)
WEIGHTS, TARGETS = numbers([0.4, 0.6, 3.0]), normal(24, 2, 6)


def _soft(v: Tensor, x: Tensor, step: Tensor) -> Tensor:
    return v - torch.maximum(torch.minimum(v, step * x), -step * x)


def _fit(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return (DESIGN.to(t) @ y - t).square().sum() / 2


def _descent(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Coordinate descent."""
    D, y = DESIGN.numpy(), np.zeros(3)
    for _ in range(2000):
        for j in range(3):
            rest = D[:, j] @ (t - D @ y + D[:, j] * y[j])
            y[j] = np.sign(rest) * max(abs(rest) - x[j], 0) / (D[:, j] @ D[:, j])
    return y


LASSO = Bilevel(upper=SMOOTH.upper, lower=_fit, prox_lower=_soft)
LASSO_FN, LASSO_SOLUTION = _forms(LASSO, 3, NDIMS)
LASSO_STARVED, LASSO_STARVED_SOLUTION = _forms(LASSO, 3, NDIMS, solver=Anderson(max_steps=1))


# ------------------------------------------------------------------------------------------- equality: a given mean


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return y.mean() - x[0]


def _eliminated(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The projection onto the coordinates with that mean."""
    return a - a.mean() + x[0]


EQUAL = Bilevel(upper=SMOOTH.upper, lower=lambda x, y, a: (y - a).square().sum(), constraint=_mean, equality=True)
EQUAL_FN, EQUAL_SOLUTION = _forms(EQUAL, 3, NDIMS)
EQUAL_STARVED, EQUAL_STARVED_SOLUTION = _forms(EQUAL, 3, NDIMS, solver=Newton(max_steps=1))


# -------------------------------------------------------------------- inequality: a largest mean, one of two reaches it


def _half_space(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The projection onto the coordinates with a mean of at most x."""
    return a - max(a.mean() - x[0], 0.0)


BOUND = Bilevel(upper=SMOOTH.upper, lower=EQUAL.lower, constraint=_mean)
BOUND_FN, BOUND_SOLUTION = _forms(BOUND, 3, NDIMS)

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "ArgminLayer",
        FN,
        INPUTS,
        per_element(_newton, NDIMS),
        (lambda y, x, a: _slope(y, x, a),),
        NDIMS,
        names=("x", None),
        source=SOURCE,
        representative=True,
        unrolled=unrolled_newton(_slope, 3, NDIMS),
        tolerant=_forms(SMOOTH, 3, NDIMS, on_failure="nan")[0],
        solution=SOLUTION,
        starved=STARVED,
        starved_solution=STARVED_SOLUTION,
        half=False,
        exact_bits=False,
        exempt=NO_EMPTY,
        hostile=(Hostile("no data", (INPUTS[0], 0 * INPUTS[1])),),
        wrong=(
            Wrong(
                "a loss that is no number",
                INPUTS,
                r"lower output: expected shape \(\), one number",
                lambda x, a: ArgminLayer(Bilevel(SMOOTH.upper, lambda x, y, b: y))(x, init=torch.zeros_like(x)),
            ),
            Wrong("no start", INPUTS, "init: expected a tensor", lambda x, a: ArgminLayer(SMOOTH)(x, a[0])),
        ),
    ),
    LayerCase(
        "ArgminLayer prox",
        LASSO_FN,
        (WEIGHTS, TARGETS),
        per_element(_descent, NDIMS),
        (),
        NDIMS,
        names=("x", None),
        source=SOURCE,
        tolerant=_forms(LASSO, 3, NDIMS, on_failure="nan")[0],
        solution=LASSO_SOLUTION,
        starved=LASSO_STARVED,
        starved_solution=LASSO_STARVED_SOLUTION,
        half=False,
        exact_bits=False,
        exempt=NO_EMPTY,
    ),
    LayerCase(
        "ArgminLayer equality",
        EQUAL_FN,
        (numbers([0.7]), INPUTS[1]),
        per_element(_eliminated, NDIMS),
        (),
        NDIMS,
        names=("x", None),
        source=SOURCE,
        tolerant=_forms(EQUAL, 3, NDIMS, on_failure="nan")[0],
        solution=EQUAL_SOLUTION,
        half=False,
        exact_bits=False,
        exempt=NO_EMPTY,
    ),
    LayerCase(
        "ArgminLayer inequality",
        BOUND_FN,
        (numbers([0.1]), INPUTS[1]),
        per_element(_half_space, NDIMS),
        (),
        NDIMS,
        names=("x", None),
        source=SOURCE,
        tolerant=_forms(BOUND, 3, NDIMS, on_failure="nan")[0],
        solution=BOUND_SOLUTION,
        half=False,
        exact_bits=False,
        exempt=NO_EMPTY,
    ),
)
