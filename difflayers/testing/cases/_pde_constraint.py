"""Cases of the coefficients that a differential equation determines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.implicit import LevenbergMarquardt
from difflayers.pde import residual_least_squares, residual_least_squares_ex, residual_least_squares_value
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton

__all__ = ["CASES"]

SOURCE = "N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints, 2024"
RIDGE = 1.0
NDIMS = (3, 1, 1)


def _decay(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    """``u' + k u - f``."""
    return u[..., 1] + p["k"] * u[..., 0] - p["f"]


def _logistic(u: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """``u' + k u + u^2 - f``."""
    return u["u_t"] + p["k"] * u["u"] + u["u"] ** 2 - p["f"]


def _pair(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    """A system of two equations."""
    return torch.stack([u[..., 0] * (1 + u[..., 1]) - p["f"], u[..., 1] - torch.sin(p["k"] * u[..., 0])], -1)


def _linear(B: np.ndarray, f: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(B[:, 1] + k * B[:, 0], f, rcond=None)[0]


def _newton(
    rows: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]], ridge: float = RIDGE
) -> Callable[..., np.ndarray]:
    """Newton's method with derivatives by hand from the best of scipy, on a basis of the solutions of ``C w = d``."""

    def solve(B: np.ndarray, f: np.ndarray, k: np.ndarray, *equality: np.ndarray) -> np.ndarray:
        from scipy.optimize import least_squares

        n = B.shape[-1]
        start, Z = np.zeros(n), np.eye(n)
        if equality:
            C, d = equality
            start, Z = np.linalg.pinv(C) @ d, np.linalg.svd(C)[2][len(C) :].T

        def stacked(v: np.ndarray) -> np.ndarray:
            w = start + Z @ v
            return np.concatenate([rows(B @ w, f, k)[0].ravel(), np.sqrt(ridge) * w])

        v = least_squares(stacked, np.zeros(Z.shape[1]), xtol=1e-14, ftol=1e-14, gtol=1e-14).x
        for _ in range(3):
            w = start + Z @ v
            r, dF, d2F = rows(B @ w, f, k)  # (N, Q), (N, Q, T), (N, Q, T, T)
            J = np.einsum("nqt,ntk->nqk", dF, B)
            bent = np.einsum("nq,nqts->nts", r, d2F)
            H = np.einsum("nqk,nql->kl", J, J) + np.einsum("ntk,nts,nsl->kl", B, bent, B) + ridge * np.eye(n)
            g = np.einsum("nqk,nq->k", J, r) + ridge * w
            v = v - np.linalg.solve(Z.T @ H @ Z, Z.T @ g)
        return start + Z @ v

    return solve


def _logistic_rows(T: np.ndarray, f: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, u_t = T.T
    r = (u_t + k * u + u**2 - f)[:, None]
    dF = np.stack([k + 2 * u, np.ones_like(u)], -1)[:, None]
    d2F = np.zeros((len(u), 1, 2, 2))
    d2F[:, 0, 0, 0] = 2
    return r, dF, d2F


def _pair_rows(T: np.ndarray, f: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = T.T
    r = np.stack([a * (1 + b) - f, b - np.sin(k * a)], -1)
    dF = np.stack([np.stack([1 + b, a], -1), np.stack([-k * np.cos(k * a), np.ones_like(a)], -1)], 1)
    d2F = np.zeros((len(a), 2, 2, 2))
    d2F[:, 0, 0, 1] = d2F[:, 0, 1, 0] = 1
    d2F[:, 1, 0, 0] = k**2 * np.sin(k * a)
    return r, dF, d2F


def _objective(solve: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def value(B: np.ndarray, f: np.ndarray, k: np.ndarray, *equality: np.ndarray) -> np.ndarray:
        w = solve(B, f, k, *equality)
        return (_logistic_rows(B @ w, f, k)[0] ** 2).sum() / 2 + RIDGE * w @ w / 2

    return value


def _run(layer: Callable[..., Any], residual: Callable[..., Tensor], **options: Any) -> Callable[..., Any]:
    named = residual is _logistic

    def fn(B: Tensor, f: Tensor, k: Tensor, *equality: Tensor) -> Any:
        basis = dict(zip(("u", "u_t"), B.unbind(-2), strict=True)) if named else B
        more: dict[str, Any] = {"equality": equality} if equality else {}
        return layer(basis, residual, {"f": f, "k": k}, **more, **options)

    return fn


def _twin(residual: Callable[..., Tensor], n: int, ridge: float, p: int = 0) -> Callable[..., Tensor]:
    """Newton in plain torch on the gradient of the Lagrangian."""

    def gradient(x: Tensor, B: Tensor, f: Tensor, k: Tensor, *equality: Tensor) -> Tensor:
        w = x[..., :n]
        T = (B * w[..., None, None, :]).sum(-1)
        terms: Any = {"u": T[..., 0], "u_t": T[..., 1]} if residual is _logistic else T
        value = residual(terms, {"f": f, "k": k}).square().sum() / 2 + ridge * w.square().sum() / 2
        if equality:
            C, d = equality
            value = value + (x[..., n:] * ((C * w.unsqueeze(-2)).sum(-1) - d)).sum()
        return torch.autograd.grad(value, x, create_graph=True)[0]

    solve = unrolled_newton(gradient, n + p, (*NDIMS, 2, 1) if p else NDIMS)
    return lambda *args: solve(*args)[..., :n]


def _captured(t: Tensor) -> Tensor:
    f, k = numbers([0.1, 0.2, 0.3]).to(t), numbers([0.4]).to(t)
    return residual_least_squares(BASIS.to(t), lambda u, p: _decay(u, p) + 0.1 * t.sum() * u[..., 0], {"f": f, "k": k})


def _case(
    name: str, inputs: tuple[Tensor, ...], residual: Callable[..., Tensor], oracle: Any, ridge: float, **fields: Any
) -> LayerCase:
    n = inputs[0].shape[-1]
    ndims = (*NDIMS, 2, 1)[: len(inputs)]
    options = {"ridge": ridge}
    starved = {"solver": LevenbergMarquardt(max_steps=1), **options}
    common: dict[str, Any] = {
        "layer": "residual_least_squares",
        "source": SOURCE,
        "event_ndims": ndims,
        "names": (None if residual is _logistic else "basis_terms", "params['f']", "params['k']", "C", "d")[
            : len(inputs)
        ],
        "unrolled": _twin(residual, n, ridge, 1 if len(inputs) > 3 else 0),
        "tolerant": _run(residual_least_squares, residual, on_failure="nan", **options),
        "solution": _run(residual_least_squares_ex, residual, **options),
    }
    if residual is not _decay:
        common["starved"] = _run(residual_least_squares, residual, **starved)
        common["starved_solution"] = _run(residual_least_squares_ex, residual, **starved)
    return LayerCase(
        name, _run(residual_least_squares, residual, **options), inputs, per_element(oracle, ndims), **(common | fields)
    )


BASIS = normal(41, 3, 2, 2)
SOURCE_TERMS, RATE = normal(42, 2, 3), numbers([0.7])
SAME = BASIS[..., :1].expand(3, 2, 2).clone()
DATA = (BASIS, SOURCE_TERMS, RATE)
WITH_ROW = (normal(43, 2, 2, 3), normal(44, 2), numbers([0.4]), numbers([[1.0, 0.5, -0.5]]), normal(45, 2, 1))


CASES: tuple[LayerCase, ...] = (
    _case(
        "residual_least_squares linear",
        DATA,
        _decay,
        _linear,
        0.0,
        representative=True,
        captured=_captured,
        hostile=(
            Hostile("duplicated basis functions", (SAME, *DATA[1:]), SolveError, "SINGULAR"),
            Hostile("a basis function of zeros", (BASIS * numbers([1.0, 0.0]), *DATA[1:]), SolveError, "SINGULAR"),
            Hostile(
                "duplicated basis functions with a ridge",
                (SAME, *DATA[1:]),
                fn=_run(residual_least_squares, _decay, ridge=1e-3),
            ),
            Hostile("huge basis", (1e100 * BASIS, *DATA[1:])),
            Hostile("tiny basis", (1e-100 * BASIS, *DATA[1:])),
            Hostile("huge source", (BASIS, 1e100 * SOURCE_TERMS, RATE)),
            Hostile("no source", (BASIS, 0 * SOURCE_TERMS, RATE)),
            Hostile("basis functions of very different size", (BASIS * numbers([1e5, 1e-5]), *DATA[1:])),
        ),
        wrong=(
            Wrong("a matrix for terms", (BASIS[0], *DATA[1:]), r"basis_terms: expected at least 3 dimensions"),
            Wrong(
                "parameters that do not fit",
                (BASIS, SOURCE_TERMS[..., :2], RATE),
                r"params\['f'\]: expected 1 or 3 entries in the last dimension.* got shape \(2, 2\)",
            ),
            Wrong(
                "batches that do not fit",
                (BASIS.expand(3, 3, 2, 2), *DATA[1:]),
                r"params\['f'\]: expected batch dimensions that broadcast",
            ),
            Wrong(
                "a residual of the wrong shape",
                DATA,
                r"residual output: expected shape \(\d, 3\).* got \(\d, 2\)",
                lambda B, f, k: residual_least_squares(B, lambda u, p: _decay(u, p)[..., 1:], {"f": f, "k": k}),
            ),
            Wrong(
                "points that see each other",
                DATA,
                "residual: expected a pointwise function",
                lambda B, f, k: residual_least_squares(
                    B.requires_grad_(), lambda u, p: _decay(u, p).diff(dim=-1, prepend=u[..., :1, 0]), {"f": f, "k": k}
                ),
            ),
        ),
    ),
    _case(
        "residual_least_squares linear, each its basis",
        (normal(46, 2, 2, 2, 2), normal(47, 2, 2), numbers([0.3])),
        _decay,
        _linear,
        0.0,
        bad=(0, normal(48, 2, 2, 1).expand(2, 2, 2)),
    ),
    _case(
        "residual_least_squares nonlinear",
        (BASIS, 0.3 * SOURCE_TERMS, RATE),
        _logistic,
        _newton(_logistic_rows),
        RIDGE,
        hostile=(
            Hostile("duplicated basis functions", (SAME, *DATA[1:])),
            Hostile("a basis function of zeros", (BASIS * numbers([1.0, 0.0]), *DATA[1:])),
            Hostile("a zero basis", (0 * BASIS, *DATA[1:])),
            Hostile("tiny basis", (1e-6 * BASIS, *DATA[1:])),
            Hostile("tiny source", (BASIS, 1e-9 * SOURCE_TERMS, RATE)),
        ),
        wrong=(
            Wrong(
                "a term that was not declared",
                DATA,
                "residual: expected one of the terms u, u_x, got 'u_t', which was not declared",
                lambda B, f, k: residual_least_squares(
                    {"u": B[..., 0, :], "u_x": B[..., 1, :]}, _logistic, {"f": f, "k": k}
                ),
            ),
        ),
    ),
    _case("residual_least_squares system", DATA, _pair, _newton(_pair_rows), RIDGE),
    _case(
        "residual_least_squares equality",
        WITH_ROW,
        _logistic,
        _newton(_logistic_rows),
        RIDGE,
        invariants=(lambda w, B, f, k, C, d: (C @ w.unsqueeze(-1)).squeeze(-1) - d,),
        hostile=(
            Hostile("a row of zeros", (*WITH_ROW[:3], 0 * WITH_ROW[3], WITH_ROW[4]), SolveError, "SINGULAR"),
            Hostile("duplicated basis functions", (WITH_ROW[0][..., [0, 0, 1]], *WITH_ROW[1:])),
        ),
        wrong=(
            Wrong("columns", (*WITH_ROW[:3], WITH_ROW[3][..., :2], WITH_ROW[4]), r"C: expected shape \(3,\)"),
            Wrong("right-hand side", (*WITH_ROW[:4], normal(1, 2)), r"d: expected shape \(1,\)"),
        ),
    ),
    LayerCase(
        "residual_least_squares_value",
        _run(residual_least_squares_value, _logistic, ridge=RIDGE),
        WITH_ROW,
        per_element(_objective(_newton(_logistic_rows)), (*NDIMS, 2, 1)),
        source=SOURCE,
        event_ndims=(*NDIMS, 2, 1),
        names=(None, "params['f']", "params['k']", "C", "d"),
        representative=True,
        tolerant=_run(residual_least_squares_value, _logistic, ridge=RIDGE, on_failure="nan"),
    ),
)
