"""Cases of dual bounds and of dual proxies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difflayers._solution import SolveError
from difflayers.conic import (
    BallCompletion,
    BoxCompletion,
    BoxQuadraticCompletion,
    DualProxy,
    EllipsoidCompletion,
    HyperbolicCompletion,
    NonNegative,
    PolytopeCompletion,
    Product,
    QuadraticCompletion,
    SecondOrder,
    SimplexCompletion,
    SolverCompletion,
    SpectraplexCompletion,
    dual_bound,
    dual_bound_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

SOURCE = "M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024"
Inner = Callable[..., float]
PLAIN = {
    "autocast_of_backward": "products with A are plain torch, whose backward follows the autocast mode it is run under"
}
NO_ADJOINT = {"solves_are_traced": "the envelope theorem leaves no adjoint solve to trace"}


def _oracle(inner: Inner, ndims: tuple[int, ...]) -> Callable[..., Tensor]:
    """``b^T y + inner(c - A^T y, data)`` with the minimum computed some other way."""

    def whole(y: np.ndarray, A: np.ndarray, b: np.ndarray, c: np.ndarray, *data: np.ndarray) -> np.ndarray:
        return np.asarray(b @ y + inner(c - np.tensordot(y, A, 1), *data))

    return per_element(whole, ndims)


def _over_corners(r: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    return min(float(r @ x) for x in itertools.product(*zip(lower, upper, strict=True)))


def _by_clarabel(r: np.ndarray, block: Callable[[Any, Any], tuple[list[Any], Any]], tol: float = 1e-10) -> float:
    import cvxpy as cp

    x = cp.Variable(r.shape, symmetric=r.ndim == 2)
    constraints, extra = block(cp, x)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(r, x)) + extra), constraints)
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tol)
    return float(problem.solve(solver=cp.CLARABEL, **tolerances))


def _over_ball(r: np.ndarray, radius: np.ndarray, center: np.ndarray, p: float) -> float:
    # cones of powers are solved less exactly than others
    return _by_clarabel(r, lambda cp, x: ([cp.norm(x - center, p) <= float(radius)], 0), 1e-9)


def _over_ellipsoid(r: np.ndarray, D: np.ndarray, radius: np.ndarray) -> float:
    return _by_clarabel(r, lambda cp, x: ([cp.norm(D @ x) <= float(radius)], 0))


def _over_quadratic(r: np.ndarray, Q: np.ndarray) -> float:
    values, V = np.linalg.eigh((Q + Q.T) / 2)
    return float(-(((V.T @ r) ** 2) / values).sum() / 2)


def _over_hyperbola(r: np.ndarray) -> float:
    n = len(r) // 2
    return _by_clarabel(
        r, lambda cp, x: ([cp.SOC(x[i] + x[i + n], cp.hstack([2, x[i] - x[i + n]])) for i in range(n)], 0)
    )


def _over_spectraplex(S: np.ndarray) -> float:
    return float(np.linalg.eigvals((S + S.T) / 2).real.min())


def _over_rows(r: np.ndarray, H: np.ndarray, h: np.ndarray) -> float:
    from scipy.optimize import linprog

    return float(linprog(r, A_ub=-H, b_ub=-h, bounds=(None, None)).fun)


def _over_cone(r: np.ndarray, h: np.ndarray) -> float:
    return _by_clarabel(r, lambda cp, x: ([cp.SOC(x[0] - h[0], x[1:] - h[1:3]), x[0] <= -h[-1]], 0))


def _case(name: str, make: Callable[..., Any], inner: Inner, inputs: tuple[Tensor, ...], **fields: Any) -> LayerCase:
    """A bound for a completion made of the inputs from the fifth on."""
    ndims = fields.pop("event_ndims", (1, 2, 1, 1))
    solves = fields.pop("solves", False)

    def run(bound: Callable[..., Any], *data: Tensor, **options: Any) -> Any:
        return bound(*data[:4], make(*data[4:]), **options)

    def value(*data: Tensor, **options: Any) -> Tensor:
        return run(dual_bound, *data, **options).bound

    def solution(*data: Tensor) -> Any:
        from dataclasses import replace

        found = run(dual_bound_ex, *data)
        return replace(found, value=found.value.bound)

    y, A, b, c = inputs[:4]
    common: dict[str, Any] = {
        "layer": "dual_bound",
        "source": SOURCE,
        "event_ndims": ndims,
        "oracle": _oracle(inner, ndims),
        "exempt": PLAIN | (NO_ADJOINT if solves else {}),
        "wrong": (
            Wrong("rows", (y, A[:1], b, c, *inputs[4:]), r"A: expected shape .* as of y and c, got"),
            Wrong("right-hand sides", (y, A, b[..., :1], c, *inputs[4:]), r"b: expected shape .* as of y, got"),
            Wrong("integers", (y.long(), A, b, c, *inputs[4:]), r"y: expected a floating-point tensor"),
        ),
    }
    if solves:
        common |= {"tolerant": functools.partial(value, on_failure="nan"), "solution": solution}
    return LayerCase(name, value, inputs, **(common | fields))


A = numbers([[1.0, -0.5, 0.3], [0.2, 0.8, -0.6]])
y, b, c = normal(41, 2, 2).abs(), numbers([0.7, -0.4]), normal(43, 2, 3)
lower, upper = numbers([-1.0, 0.0, -0.5]), numbers([0.5, 2.0, 1.0])
Q = numbers([[2.0, 0.3], [0.3, 1.0]])
A2, c2 = A[:, :2].contiguous(), normal(44, 2, 2)
radius, center = numbers([0.7, 1.6]), numbers([0.4, -0.2, 0.1])


def _box_quadratic(y: Tensor, A: Tensor, b: Tensor, c: Tensor, Q: Tensor, w: Tensor) -> Tensor:
    return dual_bound(y, A, b, c, BoxQuadraticCompletion(Q, -1.0, 0.5), w=w).bound


def _under_tangent(
    y: np.ndarray, A: np.ndarray, b: np.ndarray, c: np.ndarray, Q: np.ndarray, w: np.ndarray
) -> np.ndarray:
    Q = (Q + Q.T) / 2
    inner = _over_corners(c - y @ A + Q @ w, -np.ones(len(c)), 0.5 * np.ones(len(c)))
    return np.asarray(b @ y - w @ Q @ w / 2 + inner)


class _Bounds(nn.Module):
    """A proxy that returns the bound alone, in the dtype of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2), nn.Softplus())
        weights = nn.utils.parameters_to_vector(network.parameters())
        nn.utils.vector_to_parameters(torch.cos(torch.arange(float(len(weights)), device="cpu")), network.parameters())
        self.proxy = DualProxy(network.double(), NonNegative(), BoxCompletion(0.0, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        return self.proxy(features, A, b, c).bound.to(features.dtype)


def _proxy(features: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    proxy = DualProxy(nn.Identity(), Product([(NonNegative(), 1), (SecondOrder(), 2)]), BoxCompletion(-1.0, 2.0))
    return proxy(features, A, b, c).bound.to(features.dtype)


def _proxy_oracle(v: np.ndarray, A: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    t, size = v[1], abs(v[2])
    ahead = v[1:] if size <= t else np.zeros(2) if size <= -t else (t + size) / 2 * np.array([1, np.sign(v[2])])
    y = np.concatenate([[max(v[0], 0)], ahead])
    return np.asarray(b @ y + _over_corners(c - y @ A, -np.ones(len(c)), 2 * np.ones(len(c))))


CASES: tuple[LayerCase, ...] = (
    _case(
        "dual_bound BoxCompletion",
        BoxCompletion,
        _over_corners,
        (y, A, b, c, lower, upper),
        event_ndims=(1, 2, 1, 1, 1, 1),
        names=("y", "A", "b", "c", "lower", "upper"),
        representative=True,
        hostile=(
            Hostile("no cost", (0 * y, A, b, 0 * c, lower, upper)),
            Hostile("ties", (y, A, b, y @ A, lower, upper)),
            Hostile("huge", (1e9 * y, A, b, 1e9 * c, lower, upper)),
            Hostile("tiny", (1e-9 * y, A, b, 1e-9 * c, lower, upper)),
            Hostile("a point", (y, A, b, c, lower, lower)),
            Hostile("empty box", (y, A, b, c, upper, lower), ValueError, r"lower: expected at most upper"),
        ),
    ),
    *(
        _case(
            f"dual_bound BallCompletion p={p:g}",
            functools.partial(lambda radius, center, p: BallCompletion(radius, p, center), p=p),
            functools.partial(_over_ball, p=p),
            (y, A, b, c, radius, center),
            event_ndims=(1, 2, 1, 1, 0, 1),
            hostile=(
                Hostile("no cost", (0 * y, A, b, 0 * c, radius, center)),
                Hostile("a zero cost", (0 * y, A, b, c * numbers([1.0, 0.0, 1.0]), radius, center)),
                Hostile("negative radius", (y, A, b, c, -radius, center), ValueError, r"radius: expected at least 0"),
            ),
            oracle_tol=1e-7,
        )
        for p in (1.0, 1.5, 2.0, 4.0, np.inf)
    ),
    _case(
        "dual_bound EllipsoidCompletion",
        EllipsoidCompletion,
        _over_ellipsoid,
        (y, A2, b, c2, numbers([[1.0, 0.2], [-0.4, 2.0]]), radius),
        event_ndims=(1, 2, 1, 1, 2, 0),
        solves=True,
        hostile=(Hostile("no cost", (0 * y, A2, b, 0 * c2, Q, radius)),),
        oracle_tol=1e-7,
    ),
    _case(
        "dual_bound QuadraticCompletion",
        QuadraticCompletion,
        _over_quadratic,
        (y, A2, b, c2, Q),
        event_ndims=(1, 2, 1, 1, 2),
        names=("y", "A", None, "c", "Q"),
        solves=True,
        hostile=(
            Hostile("indefinite", (y, A2, b, c2, -Q), SolveError, "SINGULAR"),
            Hostile("no cost", (0 * y, A2, b, 0 * c2, Q)),
        ),
    ),
    LayerCase(
        "dual_bound BoxQuadraticCompletion",
        _box_quadratic,
        (y, A2, b, c2, Q, normal(45, 2, 2)),
        oracle=per_element(_under_tangent, (1, 2, 1, 1, 2, 1)),
        event_ndims=(1, 2, 1, 1, 2, 1),
        names=("y", "A", "b", "c", "Q", "w"),
        layer="dual_bound",
        source=SOURCE,
        exempt=PLAIN,
        hostile=(
            Hostile("indefinite", (y, A2, b, c2, -Q, c2), ValueError, r"Q: expected a positive semidefinite matrix"),
            Hostile("singular", (y, A2, b, c2, 0 * Q, c2)),
        ),
        wrong=(Wrong("short w", (y, A2, b, c2, Q, c2[..., :1]), r"w: expected shape \(2,\)"),),
    ),
    _case(
        "dual_bound SimplexCompletion",
        SimplexCompletion,
        lambda r, total: float(min(total * r)),
        (y, A, b, c, radius),
        event_ndims=(1, 2, 1, 1, 0),
        hostile=(Hostile("ties", (0 * y, A, b, numbers([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]]), radius)),),
    ),
    _case(
        "dual_bound PolytopeCompletion",
        PolytopeCompletion,
        lambda r, V: min(float(r @ v) for v in V),
        (y, A2, b, c2, numbers([[0.0, 1.0], [1.0, -1.0], [-2.0, 0.5]])),
        event_ndims=(1, 2, 1, 1, 2),
        hostile=(Hostile("a vertex twice", (y, A2, b, c2, numbers([[1.0, 2.0], [1.0, 2.0]]))),),
    ),
    _case(
        "dual_bound HyperbolicCompletion",
        HyperbolicCompletion,
        _over_hyperbola,
        (
            y,
            numbers([[-1.0, -0.5, 0.0, -0.3], [-0.2, -0.8, 0.0, 0.0]]),
            b,
            numbers([[1.0, 0.3, 2.0, 0.9]]).expand(2, 4),
        ),
        event_ndims=(1, 2, 1, 1),
        oracle_tol=1e-7,
    ),
    _case(
        "dual_bound SpectraplexCompletion",
        SpectraplexCompletion,
        _over_spectraplex,
        (y, normal(46, 2, 2, 2), b, normal(47, 2, 2, 2)),
        event_ndims=(1, 3, 1, 2),
        representative=True,
        wrong=(),
        hostile=(
            Hostile("a double eigenvalue", (0 * y, normal(46, 2, 2, 2), b, numbers([[[2.0, 0.0], [0.0, 2.0]]] * 2))),
            Hostile("zero", (0 * y, normal(46, 2, 2, 2), b, 0 * normal(47, 2, 2, 2))),
        ),
    ),
    _case(
        "dual_bound SolverCompletion of rows",
        lambda H, h: SolverCompletion(H, h, NonNegative()),
        _over_rows,
        (y, A2, b, c2, numbers([[1.0, 0.2], [-0.3, 1.0], [-1.0, -1.0]]), numbers([-1.0, -0.7, -1.5])),
        event_ndims=(1, 2, 1, 1, 2, 1),
        names=("y", "A", None, "c", None, None),
        solves=True,
        hostile=(
            Hostile(
                "unbounded", (y, A2, b, c2, numbers([[1.0, 0.2]]), numbers([-1.0])), SolveError, "UNBOUNDED|MAX_STEPS"
            ),
        ),
    ),
    _case(
        "dual_bound SolverCompletion of a cone",
        lambda h: SolverCompletion(
            torch.cat(
                [torch.eye(3, dtype=h.dtype, device=h.device), -torch.eye(3, dtype=h.dtype, device=h.device)[:1]]
            ),
            h,
            Product([(SecondOrder(), 3), (NonNegative(), 1)]),
        ),
        _over_cone,
        (y, A, b, c, numbers([-0.5, 0.2, 0.1, -2.0])),
        event_ndims=(1, 2, 1, 1, 1),
        solves=True,
        oracle_tol=1e-7,
    ),
    LayerCase(
        "DualProxy",
        _proxy,
        (numbers([[0.5, 0.3, -0.9], [-0.3, 1.0, 0.4]]), normal(48, 3, 2), normal(49, 3), normal(50, 2, 2)),
        oracle=per_element(_proxy_oracle, (1, 2, 1, 1)),
        event_ndims=(1, 2, 1, 1),
        source=SOURCE,
        representative=True,
        make_module=_Bounds,
        module_inputs=(normal(51, 2, 3),),
        hostile=(
            Hostile("a corner", (numbers([[-1.0, -1.0, 0.5]] * 2), normal(48, 3, 2), normal(49, 3), normal(50, 2, 2))),
        ),
        wrong=(
            Wrong(
                "short output",
                (normal(51, 2, 2), normal(48, 3, 2), normal(49, 3), normal(50, 2, 2)),
                r"network output: expected 3 entries in the last dimension, got",
            ),
        ),
    ),
)
