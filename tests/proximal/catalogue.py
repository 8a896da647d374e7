"""The catalogue's operators a second time, for tests: by brute force, by numpy and scipy, and by cvxpy.

Written from the definitions alone. Scalar functions: the best point of a grid, refined by bisection. The others: a
short accurate algorithm, held against cvxpy, which is given the definition.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression, lsq_linear

from difflayers import proximal

F64 = torch.float64
N = 5

# ------------------------------------------------------------------------------------------ oracles of scalar functions


def scalar(penalty: Callable[..., Any], slope: Callable[..., Any], low: float = -np.inf) -> Callable[..., np.ndarray]:
    """Brute force: the best point of a grid, then bisection on the slope between its neighbours."""

    def oracle(x, t, **p):
        reach = np.abs(x).max() + 2 * t + 4
        grid = np.unique(np.append(np.linspace(max(low, -reach), reach, 20001), 0.0))[:, None]
        best = (t * penalty(grid, **p) + (grid - x) ** 2 / 2).argmin(0)
        left, right = grid[np.maximum(best - 1, 0), 0], grid[np.minimum(best + 1, len(grid) - 1), 0]
        for _ in range(64):
            middle = (left + right) / 2
            rising = t * slope(middle, **p) + middle - x > 0
            left, right = np.where(rising, left, middle), np.where(rising, middle, right)
        return (left + right) / 2

    return oracle


def hard(x, t):
    """The better of the two candidates of the l0 penalty."""
    return np.where(x**2 / 2 > t, x, 0)


def scad(z, lam, a):
    """Piecewise: linear, quadratic, constant."""
    m = np.abs(z)
    middle = (2 * a * lam * m - m**2 - lam**2) / (2 * (a - 1))
    return np.where(m <= lam, lam * m, np.where(m <= a * lam, middle, lam**2 * (a + 1) / 2))


def scad_slope(z, lam, a):
    """Its derivative away from zero."""
    m = np.abs(z)
    return np.sign(z) * np.where(m <= lam, lam, np.maximum(a * lam - m, 0) / (a - 1))


def xlogx(z):
    """``z log z``, 0 at 0."""
    return z * np.log(np.where(z > 0, z, 1))


def log_of(z):
    """``log z`` with a large negative number at 0."""
    return np.log(np.maximum(z, 1e-300))


SCALAR = {
    "prox_l1": scalar(lambda z, weights: weights * np.abs(z), lambda z, weights: weights * np.sign(z)),
    "prox_squared_l2": scalar(lambda z: z**2 / 2, lambda z: z),
    "prox_elastic_net": scalar(
        lambda z, l1, l2: l1 * np.abs(z) + l2 * z**2 / 2, lambda z, l1, l2: l1 * np.sign(z) + l2 * z
    ),
    "prox_huber": scalar(
        lambda z, delta: np.where(np.abs(z) <= delta, z**2 / (2 * delta), np.abs(z) - delta / 2),
        lambda z, delta: np.clip(z / delta, -1, 1),
    ),
    "prox_nonnegative_l1": scalar(lambda z: z, np.ones_like, low=0),
    "prox_log": scalar(lambda z, eps: np.log(eps + np.abs(z)), lambda z, eps: np.sign(z) / (eps + np.abs(z))),
    "prox_entropy": scalar(xlogx, lambda z: log_of(z) + 1, low=0),
    "prox_poisson": scalar(
        lambda z, counts: z - counts * log_of(z), lambda z, counts: 1 - counts / np.maximum(z, 1e-300), low=0
    ),
    "prox_logistic": scalar(
        lambda z, labels: np.logaddexp(0, -labels * z), lambda z, labels: -labels / (1 + np.exp(labels * z))
    ),
    "prox_hinge": scalar(
        lambda z, labels: np.maximum(1 - labels * z, 0), lambda z, labels: np.where(labels * z < 1, -labels, 0)
    ),
    "prox_scad": scalar(scad, scad_slope),
    "prox_mcp": scalar(
        lambda z, lam, gamma: np.where(
            np.abs(z) <= gamma * lam, lam * np.abs(z) - z**2 / (2 * gamma), gamma * lam**2 / 2
        ),
        lambda z, lam, gamma: np.sign(z) * np.maximum(lam - np.abs(z) / gamma, 0),
    ),
}

# ------------------------------------------------------------------------------------------------ oracles of the others


def root(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """By bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2


def shrink_norm(x, t):
    """The prox of the Euclidean norm, or of the Frobenius norm."""
    norm = np.linalg.norm(x)
    return 0 * x if norm <= t else (1 - t / norm) * x


def cap(x, t):
    """The prox of the largest magnitude: everything is cut at the height that removes t in all."""
    a = np.abs(x)
    if a.sum() <= t:
        return 0 * x
    height = root(lambda s: np.maximum(a - s, 0).sum() - t, 0.0, a.max())
    return np.clip(x, -height, height)


def group(x, t, groups, weights):
    """Norms of groups."""
    labels = np.arange(len(x)) // groups if isinstance(groups, int) else groups
    z = 0 * x
    for label in np.unique(labels):
        z[labels == label] = shrink_norm(x[labels == label], t * weights[label])
    return z


def slope_norm(x, t, weights):
    """Sorted l1 by scipy's isotonic regression."""
    order = np.argsort(-np.abs(x))
    fit = isotonic_regression(np.abs(x)[order] - t * weights, increasing=False).x
    z = np.zeros_like(x)
    z[order] = np.maximum(fit, 0)
    return z * np.sign(x)


def differences(n: int, edges: np.ndarray) -> np.ndarray:
    """One row an edge."""
    D = np.zeros((edges.shape[1], n))
    D[np.arange(len(D)), edges[0]] = -1
    D[np.arange(len(D)), edges[1]] = 1
    return D


def graph_tv(x, t, edges, weights):
    """The dual problem by bounded least squares with an active set."""
    D = differences(len(x), edges)
    bound = np.maximum(t * np.broadcast_to(weights, len(D)), 1e-300)
    return x - D.T @ lsq_linear(D.T, x, (-bound, bound), method="bvls", tol=1e-15, max_iter=500).x


def chain(n: int) -> np.ndarray:
    """Edges between neighbours."""
    return np.stack([np.arange(n - 1), np.arange(1, n)])


def grid_edges(rows: int, columns: int) -> np.ndarray:
    """Edges between vertical, then between horizontal neighbours."""
    index = np.arange(rows * columns).reshape(rows, columns)
    vertical = np.stack([index[:-1].ravel(), index[1:].ravel()])
    return np.concatenate([vertical, np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()])], 1)


def tv2d(x, t, isotropic):
    """Anisotropic as a graph. Isotropic: flat pixels from cvxpy, then Newton on what is left."""
    if not isotropic:
        return graph_tv(x.ravel(), t, grid_edges(*x.shape), 1.0).reshape(x.shape)
    D = differences(x.size, grid_edges(*x.shape))
    rough = solve_cvxpy("prox_tv2d", x=x, t=t, isotropic=True).ravel()
    pixels = [np.flatnonzero(D[:, i] < 0) for i in range(x.size)]
    flat = [len(rows) > 0 and np.linalg.norm(D[rows] @ rough) < 1e-4 for rows in pixels]
    joined = np.eye(x.size)
    for rows, is_flat in zip(pixels, flat, strict=True):
        joined = joined + (np.abs(D[rows]).T @ np.abs(D[rows]) if is_flat else 0)
    reach = np.linalg.matrix_power((joined > 0).astype(float), x.size) > 0
    P = np.unique(reach, axis=0).astype(float).T
    moving = [D[rows] @ P for rows, is_flat in zip(pixels, flat, strict=True) if len(rows) and not is_flat]
    y = np.linalg.lstsq(P, rough, rcond=None)[0]

    def energy(y):
        return ((P @ y - x.ravel()) ** 2).sum() / 2 + t * sum(np.linalg.norm(d @ y) for d in moving)

    for _ in range(60):
        g, H = P.T @ (P @ y - x.ravel()), P.T @ P
        for d in moving:
            v = d @ y
            r = np.linalg.norm(v)
            g = g + t * d.T @ v / r
            H = H + t * d.T @ (np.eye(len(v)) - np.outer(v, v) / r**2) @ d / r
        step = np.linalg.solve(H, g)
        length = 1.0
        while energy(y - length * step) > energy(y) + 1e-12 and length > 1e-6:
            length /= 2
        y = y - length * step
    assert np.abs(g).max() < 1e-11
    return (P @ y).reshape(x.shape)


def simplex(x, radius=1.0):
    """By sorting."""
    s = np.sort(x)[::-1]
    means = (np.cumsum(s) - radius) / np.arange(1, len(x) + 1)
    return np.maximum(x - means[s > means][-1], 0)


def capped(x, total, upper):
    """The threshold by bisection, sharpened on the free entries."""
    tau = root(lambda s: np.clip(x - s, 0, upper).sum() - total, (x - upper).min() - 1, x.max() + 1)
    z = np.clip(x - tau, 0, upper)
    free = (z > 1e-9) & (z < upper - 1e-9)
    if free.any():
        z[free] += (total - z.sum()) / free.sum()
    return z


def l1_ball(x, radius):
    """Signs times a simplex."""
    return x if np.abs(x).sum() <= radius else np.sign(x) * simplex(np.abs(x), radius)


def l2_ball(x, radius, center):
    """Towards the centre."""
    d = x - center
    return center + d * min(1.0, radius / np.linalg.norm(d))


def affine(x, A, b):
    """By numpy's least squares."""
    return x - np.linalg.lstsq(A, A @ x - b, rcond=None)[0]


def spectral(x, f):
    """A function of the singular values."""
    U, s, V = np.linalg.svd(x, full_matrices=False)
    return U @ np.diag(f(s)) @ V


def eigen_box(x, lower, upper):
    """Eigenvalues clipped."""
    l, U = np.linalg.eigh(x)
    return U @ np.diag(np.clip(l, lower, upper)) @ U.T


def transport(x, a, b):
    """Semismooth Newton on the dual."""
    m, n = x.shape
    u = np.zeros(m + n)

    def plan(u):
        return np.maximum(x + u[:m, None] + u[None, m:], 0)

    def dual(u):
        return (plan(u) ** 2).sum() / 2 - u @ np.concatenate([a, b])

    for _ in range(200):
        z = plan(u)
        r = np.concatenate([a - z.sum(1), b - z.sum(0)])
        if np.abs(r).max() < 1e-14:
            break
        M = (z > 0).astype(float)
        step = np.linalg.lstsq(np.block([[np.diag(M.sum(1)), M], [M.T, np.diag(M.sum(0))]]), r, rcond=1e-12)[0]
        if np.linalg.norm(step) < 1e-12:
            step = r
        length = 1.0
        while dual(u + length * step) > dual(u) - 1e-4 * length * (r @ step) + 1e-14 and length > 1e-9:
            length /= 2
        u = u + length * step
    assert np.abs(r).max() < 1e-10
    return z


def conjugate(x, t, prox, **p):
    """Closed forms of the prox of ``t g*``."""
    if prox == "prox_l1":
        return np.clip(x, -p["weights"], p["weights"])
    if prox == "prox_l2":
        return l2_ball(x, 1.0, 0)
    if prox == "prox_squared_l2":
        return x / (1 + t)
    if prox == "prox_linf":
        return l1_ball(x, 1.0)
    if prox == "prox_huber":
        return np.clip(x / (1 + t * p["delta"]), -1, 1)
    assert prox == "prox_entropy"  # whose conjugate is exp(z - 1)
    return scalar(lambda z: np.exp(z - 1), lambda z: np.exp(z - 1))(x, t)


OTHER = {
    "prox_l2": shrink_norm,
    "prox_linf": cap,
    "prox_l0": hard,
    "prox_group_l2": group,
    "prox_slope": slope_norm,
    "prox_nuclear": lambda x, t: spectral(x, lambda s: np.maximum(s - t, 0)),
    "prox_spectral_l2": lambda x, t: spectral(x, lambda s: cap(s, t)),
    "prox_tv1d": lambda x, t, weights: graph_tv(x, t, chain(len(x)), weights),
    "prox_tv2d": tv2d,
    "prox_graph_tv": lambda x, t, edges, weights: graph_tv(x, t, edges, weights),
    "prox_quadratic": lambda x, t, Q, q: np.linalg.solve(np.eye(len(x)) + t * Q, x - t * q),
    "project_simplex": simplex,
    "project_capped_simplex": capped,
    "project_l1_ball": l1_ball,
    "project_l2_ball": l2_ball,
    "project_linf_ball": lambda x, radius: np.clip(x, -radius, radius),
    "project_box": lambda x, lower, upper: np.clip(x, lower, upper),
    "project_nonnegative": lambda x: np.maximum(x, 0),
    "project_halfspace": lambda x, normal, offset: x - max(normal @ x - offset, 0) * normal / (normal @ normal),
    "project_hyperplane": lambda x, normal, offset: x - (normal @ x - offset) * normal / (normal @ normal),
    "project_affine": affine,
    "project_isotonic": lambda x, weights, decreasing: (
        isotonic_regression(x, weights=weights, increasing=not decreasing).x
    ),
    "project_nuclear_ball": lambda x, radius: spectral(x, lambda s: l1_ball(s, radius)),
    "project_spectral_box": eigen_box,
    "project_stiefel": lambda x: spectral(x, np.ones_like),
    "project_transport": transport,
    "conjugate_prox": conjugate,
    "soft_topk": lambda x, k, temperature: capped(x / temperature, k, 1.0),
}
ORACLES = SCALAR | OTHER

# ----------------------------------------------------------------------------------------------------- cvxpy as a judge


def models(cp: Any) -> dict[str, Callable[..., tuple[Any, list[Any]]]]:
    """The definitions: a penalty, and constraints."""

    def tv(z, rows):
        return sum(cp.norm(cp.hstack(r)) for r in rows)

    def pixels(z):
        m, n = z.shape
        for i in range(m):
            for j in range(n):
                parts = ([z[i + 1, j] - z[i, j]] if i + 1 < m else []) + ([z[i, j + 1] - z[i, j]] if j + 1 < n else [])
                if parts:
                    yield parts

    def group_norms(z, groups, weights):
        labels = np.arange(z.shape[0]) // groups if isinstance(groups, int) else groups
        return sum(w * cp.norm(z[np.flatnonzero(labels == g)]) for g, w in enumerate(weights))

    def sorted_l1(z, weights):
        steps = weights - np.append(weights[1:], 0)
        return sum(s * cp.sum_largest(cp.abs(z), k + 1) for k, s in enumerate(steps))

    return {
        "prox_l1": lambda z, weights: (weights @ cp.abs(z), []),
        "prox_l2": lambda z: (cp.norm(z), []),
        "prox_linf": lambda z: (cp.norm(z, "inf"), []),
        "prox_group_l2": lambda z, groups, weights: (group_norms(z, groups, weights), []),
        "prox_slope": lambda z, weights: (sorted_l1(z, weights), []),
        "prox_nuclear": lambda z: (cp.normNuc(z), []),
        "prox_spectral_l2": lambda z: (cp.sigma_max(z), []),
        "prox_tv1d": lambda z, weights: (weights @ cp.abs(cp.diff(z)), []),
        "prox_tv2d": lambda z, isotropic: (
            (tv(z, pixels(z)), [])
            if isotropic
            else (cp.sum(cp.abs(cp.diff(z, axis=0))) + cp.sum(cp.abs(cp.diff(z, axis=1))), [])
        ),
        "prox_graph_tv": lambda z, edges, weights: (weights @ cp.abs(z[edges[0]] - z[edges[1]]), []),
        "prox_quadratic": lambda z, Q, q: (cp.quad_form(z, cp.psd_wrap(Q)) / 2 + q @ z, []),
        "project_simplex": lambda z, radius: (0, [z >= 0, cp.sum(z) == radius]),
        "project_capped_simplex": lambda z, total, upper: (0, [z >= 0, z <= upper, cp.sum(z) == total]),
        "project_l1_ball": lambda z, radius: (0, [cp.norm1(z) <= radius]),
        "project_l2_ball": lambda z, radius, center: (0, [cp.norm(z - center) <= radius]),
        "project_linf_ball": lambda z, radius: (0, [cp.abs(z) <= radius]),
        "project_box": lambda z, lower, upper: (0, [z >= lower, z <= upper]),
        "project_nonnegative": lambda z: (0, [z >= 0]),
        "project_halfspace": lambda z, normal, offset: (0, [normal @ z <= offset]),
        "project_hyperplane": lambda z, normal, offset: (0, [normal @ z == offset]),
        "project_affine": lambda z, A, b: (0, [A @ z == b]),
        "project_isotonic": lambda z, decreasing, weights=None: (
            0,
            [cp.diff(z) <= 0 if decreasing else cp.diff(z) >= 0],
        ),
        "project_nuclear_ball": lambda z, radius: (0, [cp.normNuc(z) <= radius]),
        "project_spectral_box": lambda z, lower, upper: (
            0,
            [z == z.T, z - lower * np.eye(len(lower * np.eye(z.shape[0]))) >> 0, upper * np.eye(z.shape[0]) - z >> 0],
        ),
        "project_transport": lambda z, a, b: (0, [z >= 0, cp.sum(z, axis=1) == a, cp.sum(z, axis=0) == b]),
        "soft_topk": lambda z, k, temperature: (0, [z >= 0, z <= 1, cp.sum(z) == k]),
    }


def solve_cvxpy(name: str, x: np.ndarray, t: float = 1.0, **p: Any) -> np.ndarray:
    """CLARABEL as accurate as it gets."""
    import cvxpy as cp

    z = cp.Variable(x.shape)
    weight = p.get("weights") if name == "project_isotonic" else None
    target = x / p["temperature"] if name == "soft_topk" else x
    penalty, constraints = models(cp)[name](z, **p)
    distance = cp.sum_squares(z - target) if weight is None else cp.sum(cp.multiply(weight, cp.square(z - target)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate": the comparison tells
        cp.Problem(cp.Minimize(t * penalty + distance / 2), constraints).solve(
            solver="CLARABEL", tol_gap_abs=1e-14, tol_gap_rel=1e-14, tol_feas=1e-14, tol_ktratio=1e-12
        )
    assert z.value is not None
    return z.value


MODELLED = frozenset(models(None))

# ------------------------------------------------------------------------------------------------ rows of the catalogue


@dataclass(frozen=True, eq=False)
class Row:
    """One operator with a batch of two inputs."""

    name: str
    inputs: dict[str, np.ndarray]  # differentiable, batch first
    static: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    convex: bool = True  # a convex penalty or set
    degrees: dict[str, int] = field(default_factory=dict)  # how an input scales when the result scales with `out`
    out: int = 1
    together: tuple[str, ...] = ()  # inputs that only move together

    @property
    def is_prox(self) -> bool:
        """Has a step."""
        return "t" in self.inputs

    @property
    def ids(self) -> str:
        """For pytest."""
        return f"{self.name} {self.note}".strip().replace(" ", "-")

    def call(self, **tensors: torch.Tensor) -> torch.Tensor:
        """The operator."""
        static = dict(self.static)
        if self.name == "conjugate_prox":
            return proximal.conjugate_prox(
                getattr(proximal, static.pop("prox")), tensors.pop("x"), tensors.pop("t"), **tensors, **static
            )
        for key, value in static.items():
            if isinstance(value, np.ndarray):
                constant = torch.from_numpy(value)
                static[key] = constant.to(tensors["x"].dtype) if constant.is_floating_point() else constant
        if self.name == "prox_graph_tv" and "weights" in tensors:
            static["weights"] = tensors.pop("weights")
        return getattr(proximal, self.name)(tensors.pop("x"), **tensors, **static)

    def oracle(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The oracle for every element."""
        rows = []
        for i in range(2):
            static = {k: v[i] if isinstance(v, np.ndarray) and k in ("labels",) else v for k, v in self.static.items()}
            rows.append(ORACLES[self.name](**{k: v[i] for k, v in inputs.items()}, **static))
        return np.stack(rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs in torch."""
        return {k: torch.from_numpy(np.array(v)) for k, v in self.inputs.items()}


def draw(seed: int, *shape: int, scale: float = 1.5) -> np.ndarray:
    """Normal numbers for two elements."""
    return scale * np.random.default_rng(seed).standard_normal((2, *shape))


def positive(seed: int, *shape: int, low: float = 0.4, high: float = 1.2) -> np.ndarray:
    """Uniform numbers for two elements."""
    return np.random.default_rng(seed).uniform(low, high, (2, *shape))


def symmetric(seed: int, n: int) -> np.ndarray:
    """Symmetric matrices."""
    A = draw(seed, n, n)
    return (A + A.transpose(0, 2, 1)) / 2


def definite(seed: int, n: int) -> np.ndarray:
    """Positive definite matrices."""
    A = draw(seed, n, n, scale=0.7)
    return A @ A.transpose(0, 2, 1)


T = np.array([0.45, 0.8])
X = draw(1, N)
LABELS = np.array([[1.0, -1, 1, 1, -1], [-1.0, -1, 1, -1, 1]])
CYCLE = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [0, 4], [1, 3]]).T
ORTHOGONAL = np.stack([np.linalg.qr(m)[0] for m in draw(60, 4, 3)])
LINEAR = {"x": 1, "t": 1}

ROWS = [
    Row("prox_l1", {"x": X, "t": T, "weights": positive(2, N)}, degrees=LINEAR),
    Row("prox_l2", {"x": X, "t": T}, degrees=LINEAR),
    Row("prox_l2", {"x": 0.1 * X, "t": T}, note="zero", degrees=LINEAR),
    Row("prox_squared_l2", {"x": X, "t": T}, degrees={"x": 1}),
    Row("prox_linf", {"x": X, "t": np.array([1.9, 0.6])}, degrees=LINEAR),
    Row("prox_linf", {"x": X, "t": np.array([50.0, 60.0])}, note="zero", degrees=LINEAR),
    Row("prox_l0", {"x": X, "t": T}, convex=False, degrees={"x": 1, "t": 2}),
    Row(
        "prox_elastic_net",
        {"x": X, "t": T, "l1": np.array([0.7, 1.1]), "l2": np.array([0.9, 0.3])},
        degrees={"x": 1, "l1": 1},
    ),
    Row("prox_huber", {"x": X, "t": T, "delta": np.array([0.6, 0.4])}, degrees=LINEAR | {"delta": 1}),
    Row(
        "prox_group_l2",
        {"x": draw(3, 6), "t": T, "weights": positive(4, 3)},
        {"groups": 2},
        note="size",
        degrees=LINEAR,
    ),
    Row(
        "prox_group_l2",
        {"x": draw(5, 6), "t": T, "weights": positive(6, 3)},
        {"groups": np.array([0, 2, 1, 1, 2, 2])},
        note="labels",
        degrees=LINEAR,
    ),
    Row("prox_nonnegative_l1", {"x": X, "t": T}, degrees=LINEAR),
    Row("prox_log", {"x": X, "t": T, "eps": np.array([0.3, 1.4])}, convex=False, degrees={"x": 1, "t": 2, "eps": 1}),
    Row("prox_entropy", {"x": X, "t": T}),
    Row(
        "prox_poisson",
        {"x": X, "t": T, "counts": positive(7, N, low=0.2, high=4.0)},
        degrees=LINEAR | {"counts": 1},
    ),
    Row("prox_logistic", {"x": X, "t": 3 * T}, {"labels": LABELS}),
    Row("prox_hinge", {"x": X, "t": T}, {"labels": LABELS}),
    Row(
        "prox_scad",
        {"x": 2 * X, "t": T, "lam": np.array([0.8, 0.5]), "a": np.array([3.7, 2.5])},
        convex=False,
        degrees={"x": 1, "lam": 1},
    ),
    Row(
        "prox_mcp",
        {"x": 2 * X, "t": T, "lam": np.array([0.8, 0.5]), "gamma": np.array([3.0, 1.6])},
        convex=False,
        degrees={"x": 1, "lam": 1},
    ),
    Row("prox_slope", {"x": X, "t": T, "weights": -np.sort(-positive(8, N), axis=1)}, degrees=LINEAR),
    Row(
        "prox_slope",
        {
            "x": np.array([[2.0, 1.9, -1.95, 0.5, 3.0], [-1.2, 1.25, 0.1, -3.0, 2.9]]),
            "t": np.array([0.8, 0.5]),
            "weights": np.tile(np.linspace(1.5, 0.1, N), (2, 1)),
        },
        note="merging",
        degrees=LINEAR,
    ),
    Row("prox_nuclear", {"x": draw(9, 4, 3), "t": T}, note="tall", degrees=LINEAR),
    Row("prox_nuclear", {"x": draw(10, 2, 4), "t": 2 * T}, note="wide", degrees=LINEAR),
    Row(
        "prox_nuclear",
        {"x": np.stack([2 * np.eye(3), np.diag([1.5, 1.5, 0.1])]), "t": T},
        note="repeated",
        degrees=LINEAR,
    ),
    Row("prox_nuclear", {"x": 2 * ORTHOGONAL, "t": T}, note="orthogonal", degrees=LINEAR),
    Row("prox_spectral_l2", {"x": draw(11, 4, 3), "t": 3 * T}, note="tall", degrees=LINEAR),
    Row("prox_spectral_l2", {"x": draw(12, 2, 4), "t": T}, note="wide", degrees=LINEAR),
    Row("prox_tv1d", {"x": draw(13, 7), "t": T, "weights": positive(14, 6)}, degrees=LINEAR),
    Row("prox_tv2d", {"x": draw(15, 3, 4), "t": 0.4 * T}, {"isotropic": False}, note="anisotropic", degrees=LINEAR),
    Row("prox_tv2d", {"x": draw(16, 3, 4), "t": 0.7 * T}, {"isotropic": True}, note="isotropic", degrees=LINEAR),
    Row(
        "prox_graph_tv", {"x": draw(17, 5), "t": 0.6 * T, "weights": positive(18, 6)}, {"edges": CYCLE}, degrees=LINEAR
    ),
    Row("prox_quadratic", {"x": X, "t": T, "Q": definite(19, N), "q": draw(20, N)}, degrees={"x": 1, "q": 1}),
    Row("project_simplex", {"x": X, "radius": T}, degrees={"x": 1, "radius": 1}),
    Row(
        "project_capped_simplex",
        {"x": X, "total": np.array([2.3, 1.7]), "upper": positive(40, N, low=0.3, high=0.9)},
        degrees={"x": 1, "total": 1, "upper": 1},
    ),
    Row("project_l1_ball", {"x": X, "radius": T}, degrees={"x": 1, "radius": 1}),
    Row("project_l1_ball", {"x": 0.05 * X, "radius": T}, note="inside", degrees={"x": 1, "radius": 1}),
    Row("project_l2_ball", {"x": X, "radius": T, "center": draw(21, N)}, degrees={"x": 1, "radius": 1, "center": 1}),
    Row("project_linf_ball", {"x": X, "radius": T}, degrees={"x": 1, "radius": 1}),
    Row(
        "project_box",
        {"x": X, "lower": -positive(22, N), "upper": positive(23, N)},
        degrees={"x": 1, "lower": 1, "upper": 1},
    ),
    Row("project_nonnegative", {"x": X}, degrees={"x": 1}),
    Row(
        "project_halfspace",
        {"x": X, "normal": X + draw(24, N), "offset": np.array([-0.3, 0.5])},
        note="outside",
        degrees={"x": 1, "offset": 1},
    ),
    Row(
        "project_halfspace",
        {"x": X, "normal": draw(25, N), "offset": np.array([50.0, 50.0])},
        note="inside",
        degrees={"x": 1, "offset": 1},
    ),
    Row(
        "project_hyperplane",
        {"x": X, "normal": draw(26, N), "offset": np.array([0.7, -0.2])},
        degrees={"x": 1, "offset": 1},
    ),
    Row("project_affine", {"x": X, "A": draw(27, 2, N), "b": draw(28, 2)}, degrees={"x": 1, "b": 1}),
    Row("project_isotonic", {"x": draw(29, 7)}, {"weights": None, "decreasing": False}, degrees={"x": 1}),
    Row("project_isotonic", {"x": draw(30, 7)}, {"weights": None, "decreasing": True}, "decreasing", degrees={"x": 1}),
    Row(
        "project_isotonic",
        {"x": draw(31, 7), "weights": positive(32, 7)},
        {"decreasing": False},
        "weighted",
        degrees={"x": 1},
    ),
    Row("project_nuclear_ball", {"x": draw(33, 4, 3), "radius": 2 * T}, degrees={"x": 1, "radius": 1}),
    Row("project_nuclear_ball", {"x": draw(34, 2, 3), "radius": 50 * T}, note="inside", degrees={"x": 1, "radius": 1}),
    Row(
        "project_spectral_box",
        {"x": symmetric(35, 4), "lower": np.array([-0.3, 0.1]), "upper": np.array([0.9, 0.8])},
        degrees={"x": 1, "lower": 1, "upper": 1},
    ),
    Row("project_stiefel", {"x": draw(36, 4, 3)}, note="tall", convex=False, degrees={"x": 1}, out=0),
    Row("project_stiefel", {"x": draw(37, 3, 3)}, note="square", convex=False, degrees={"x": 1}, out=0),
    Row(
        "project_transport",
        {"x": draw(38, 3, 4, scale=0.5), "a": np.full((2, 3), 1 / 3), "b": np.tile([0.1, 0.4, 0.2, 0.3], (2, 1))},
        degrees={"x": 1, "a": 1, "b": 1},
        together=("a", "b"),
    ),
    Row("conjugate_prox", {"x": X, "t": T, "weights": positive(39, N)}, {"prox": "prox_l1"}, "l1"),
    Row("conjugate_prox", {"x": X, "t": T}, {"prox": "prox_l2"}, "l2"),
    Row("conjugate_prox", {"x": X, "t": T}, {"prox": "prox_squared_l2"}, "squared_l2"),
    Row("conjugate_prox", {"x": X, "t": T}, {"prox": "prox_linf"}, "linf"),
    Row("conjugate_prox", {"x": X, "t": T, "delta": np.array([0.6, 0.4])}, {"prox": "prox_huber"}, "huber"),
    Row("conjugate_prox", {"x": X, "t": T}, {"prox": "prox_entropy"}, "entropy"),
    Row("soft_topk", {"x": X, "k": np.array([2.0, 1.6]), "temperature": np.array([0.8, 1.3])}),
]
