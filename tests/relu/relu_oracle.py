"""The globally optimal two-layer ReLU network and its derivatives, for two or three inputs, without the library.

Written from the statement of the problem in the docstrings and from published mathematics alone, before the code of
the layer was read. It minimises ``1/2 sum_k s_k (f_k - y_k)^2 + beta sum_i ||p_i||`` over networks
``f(x) = sum_i sign_i (x^T p_i)_+`` of any width:

1. `cells` lists all activation patterns: mid-angles of the 2n sorted borders in the plane; in space the plane's
   arrangement around each ray ``+-(x_i x x_j)`` where two borders meet.
2. `interior_point` gives Clarabel the convex program over all patterns, at a tolerance of 1e-13.
3. Its residual nu tells in which directions neurons may lie: in each cell the longest ``u`` that is the projection of
   ``+-Z_i^T nu`` onto the cell, by non-negative least squares. A second one takes few of them that make the fit.
4. `polish` solves the optimality conditions of these neurons, with ``x_k^T p_i = 0`` at kinks, by Newton's method
   with residuals in long double.
5. The duality gap over all cells, by the projections again, decides whether this is the optimum.

Derivatives are differences of all five steps, patterns included, extrapolated to step zero. `solve` fails rather than
to return anything whose gap is not near rounding. Rows of weight zero are left out from the beginning.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import clarabel
import numpy as np
from scipy import optimize, sparse

Array = np.ndarray[Any, Any]


class Data(NamedTuple):
    """A training set with its weight decay: ``(n, d)``, ``(n)``, ``(n)``, number."""

    X: Array
    y: Array
    s: Array
    beta: float


class Optimum(NamedTuple):
    """Neurons ``(a, d)`` with signs ``(a)`` and kinks ``(a, n)``, multipliers ``(a, n)`` of the kinks, and the rest."""

    neurons: Array
    signs: Array
    kinks: Array
    multipliers: Array
    objective: float
    gap: float
    # unit neurons (J, d) that any optimal network is made of, and their signs
    directions: Array
    direction_signs: Array
    # least 1 - ||q|| / beta over the cells that hold no such neuron
    margin: float


# --------------------------------------------------------------------------------------------------------- 1. patterns


def _plane_cells(X: Array) -> Array:
    """A unit vector in each cell of the plane, ``(P, 2)``."""
    X = X[np.linalg.norm(X, axis=1) > 0]
    angles = np.arctan2(X[:, 1], X[:, 0])
    borders = np.sort(np.concatenate([angles + np.pi / 2, angles - np.pi / 2]) % (2 * np.pi))
    borders = np.append(borders, borders[0] + 2 * np.pi)
    wide = np.diff(borders) > 1e-12
    middles = ((borders[1:] + borders[:-1]) / 2)[wide]
    return np.stack([np.cos(middles), np.sin(middles)], 1)


def _space_cells(X: Array) -> Array:
    """A vector in each cell of space that touches a ray where borders meet: all of them if X has rank three."""
    found = []
    for i, j in itertools.combinations(range(len(X)), 2):
        ray = np.cross(X[i], X[j])
        if np.linalg.norm(ray) <= 1e-12 * np.linalg.norm(X[i]) * np.linalg.norm(X[j]):
            continue
        ray /= np.linalg.norm(ray)
        heights = X @ ray
        on = np.abs(heights) <= 1e-12 * np.linalg.norm(X, axis=1)
        basis = np.linalg.svd(ray[None])[2][1:]
        around = _plane_cells(X[on] @ basis.T) @ basis
        step = 0.5 * np.min(np.abs(heights[~on]), initial=1.0) / max(1.0, np.linalg.norm(X, axis=1).max())
        found += [ray + step * around, -ray + step * around]
    return np.concatenate(found)


def cells(X: Array) -> Array:
    """All patterns ``1[X g > 0]`` of strict neurons, ``(P, n)``."""
    inside = _plane_cells(X) if X.shape[1] == 2 else _space_cells(X)
    return np.unique(inside @ X.T > 0, axis=0)


# --------------------------------------------------------------------------------------------------- 2. interior point


def interior_point(data: Data, masks: Array, signs: Array, equilibrate: bool = True) -> tuple[Array, float]:
    """Fit ``(n)`` and objective of Clarabel's optimum over neurons of these patterns ``(B, n)`` and signs ``(B)``.

    Variables: neurons, their lengths, the fit.
    """
    X, y, s, beta = data
    (n, d), count = X.shape, len(masks)
    size = count * (d + 1) + n
    fit = np.zeros((n, size))
    fit[:, : count * d] = (signs[:, None, None] * masks[:, :, None] * X).transpose(1, 0, 2).reshape(n, -1)
    fit[:, count * (d + 1) :] = -np.eye(n)
    cone = np.zeros((count, n, size))
    ball = np.zeros((count, d + 1, size))
    for i in range(count):
        cone[i, :, i * d : (i + 1) * d] = -np.where(masks[i], 1.0, -1.0)[:, None] * X
        ball[i, 0, count * d + i] = -1
        ball[i, 1:, i * d : (i + 1) * d] = -np.eye(d)
    A = np.concatenate([fit, cone.reshape(-1, size), ball.reshape(-1, size)])
    P = np.concatenate([np.zeros(count * (d + 1)), s])
    q = np.concatenate([np.zeros(count * d), np.full(count, beta), -s * y])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-13
    settings.max_threads = 1
    settings.equilibrate_enable = equilibrate
    cones = [clarabel.ZeroConeT(n), clarabel.NonnegativeConeT(count * n)] + count * [clarabel.SecondOrderConeT(d + 1)]
    problem = sparse.diags(P).tocsc(), q, sparse.csc_matrix(A), np.zeros(len(A)), cones, settings
    result = clarabel.DefaultSolver(*problem).solve()
    # "insufficient progress" beyond 1e-10 is welcome: the duality gap at the end decides, not this status
    return np.array(result.x)[-n:], result.obj_val + (s * y**2).sum() / 2


# ------------------------------------------------------------------------------------- 3. where the neurons may lie


def both_signs(masks: Array) -> tuple[Array, Array]:
    return np.concatenate([masks, masks]), np.repeat([1.0, -1.0], len(masks))


def slopes(data: Data, masks: Array, nu: Array) -> tuple[Array, Array]:
    """For both signs of each cell, ``(2P, d)``: the projection of ``sign Z^T nu`` onto the cell; and the signs."""
    rows, signs = both_signs(masks)
    out = np.zeros((len(rows), data.X.shape[1]))
    for i, (mask, sign) in enumerate(zip(rows, signs, strict=True)):
        K = np.where(mask, 1.0, -1.0)[:, None] * data.X
        start = sign * (data.X.T @ (mask * nu))
        out[i] = start + K.T @ optimize.nnls(K.T, -start)[0]
    return out, signs


def directions(data: Data, masks: Array, nu: Array, tolerance: float) -> tuple[Array, Array, float]:
    """Different unit slopes whose length is beta, their signs, and the margin of the others."""
    found, signs = slopes(data, masks, nu)
    lengths = np.linalg.norm(found, axis=1)
    there = lengths >= data.beta * (1 - tolerance)
    margin = 1 - np.max(lengths[~there], initial=0.0) / data.beta
    units: list[Array] = []
    kept: list[float] = []
    for unit, sign in zip(found[there] / lengths[there, None], signs[there], strict=True):
        if all(sign != other or np.linalg.norm(unit - u) > 1e-6 for u, other in zip(units, kept, strict=True)):
            units.append(unit)
            kept.append(sign)
    return np.array(units).reshape(-1, data.X.shape[1]), np.array(kept), margin


def activations(X: Array, neurons: Array, signs: Array) -> Array:
    """``sign_i (x_k^T p_i)_+``, ``(n, a)``."""
    return signs * np.maximum(X @ neurons.T, 0)


# ------------------------------------------------------------------------------------------------------------ 4. polish


def polish(data: Data, neurons: Array, signs: Array, kinks: Array) -> tuple[Array, Array]:
    """Neurons and multipliers, in long double, where the optimality conditions of the given structure hold.

    ``sign_i Z_i^T S (f - y) + beta p_i / ||p_i|| + sum_k m_ik x_k = 0`` and ``x_k^T p_i = 0`` for the kinks (i, k).
    Newton's matrix is in double; the residual in long double makes its last steps iterative refinement.
    """
    X, y, s = (np.longdouble(v) for v in data[:3])
    beta = np.longdouble(data.beta)
    (a, d), n = neurons.shape, len(y)
    p = np.longdouble(neurons)
    which, row = np.nonzero(kinks)
    masks = (neurons @ data.X.T > 0) & ~kinks
    G = (signs[:, None, None] * masks[:, :, None] * X).transpose(1, 0, 2).reshape(n, a * d)
    C = np.zeros((len(which), a, d), np.longdouble)
    C[np.arange(len(which)), which] = X[row]
    C = C.reshape(-1, a * d)
    G64, C64 = np.float64(G), np.float64(C)
    m = np.zeros(len(which), np.longdouble)
    best = np.inf
    for step in range(60):
        lengths = np.sqrt((p**2).sum(1, keepdims=True))
        h = p / lengths
        slope = G.T @ (s * (G @ p.ravel() - y)) + beta * h.ravel()
        if step == 0:
            m += np.linalg.lstsq(C64.T, -np.float64(slope), rcond=None)[0]
        residual = np.concatenate([slope + C.T @ m, C @ p.ravel()])
        H = G64.T @ (data.s[:, None] * G64)
        for i in range(a):
            block = slice(i * d, (i + 1) * d)
            H[block, block] += np.float64(beta * (np.eye(d) - np.outer(h[i], h[i])) / lengths[i])
        K = np.block([[H, C64.T], [C64, np.zeros((len(which), len(which)))]])
        size = float(np.abs(residual).max())
        if size == 0 or (step > 8 and size >= best):
            break
        best = min(best, size)
        # parallel rows on one kink make K singular, but not the neurons: least norm
        change = np.linalg.lstsq(K, np.float64(-residual / size), rcond=1e-13)[0] * size
        p, m = p + change[: a * d].reshape(a, d), m + change[a * d :]
    multipliers = np.zeros((a, n), np.longdouble)
    multipliers[which, row] = m
    return p, multipliers


# ------------------------------------------------------------------------------------------------------- 5. certificate


def objective(data: Data, neurons: Array, signs: Array) -> Any:
    """Loss and penalty of a network."""
    fit = activations(data.X, neurons, signs).sum(1)
    return (data.s * (fit - data.y) ** 2).sum() / 2 + data.beta * np.sqrt((neurons**2).sum(1)).sum()


def duality_gap(data: Data, masks: Array, fit: Array, value: float) -> float:
    """How far the objective `value` of a network with this fit can lie above the optimum. Weights are positive."""
    nu = data.s * (data.y - fit)
    longest = np.linalg.norm(slopes(data, masks, nu)[0], axis=1).max()
    quadratic = (nu**2 / data.s).sum()
    if quadratic == 0:
        return value
    factor = np.clip(data.y @ nu / quadratic, 0, data.beta / longest if longest > 0 else np.inf)
    return value - float(factor * (data.y @ nu) - factor**2 * quadratic / 2)


def _structure(data: Data, masks: Array, fit: Array, tolerance: float) -> Optimum:
    """The optimum, if the neurons are those whose slope at this fit is within the tolerance of beta."""
    X, y, s, beta = data
    units, signs, _ = directions(data, masks, s * (y - fit), tolerance)
    amount = optimize.nnls(activations(X, units, signs), fit)[0] if len(units) else np.zeros(0)
    used = amount > 1e-8 * amount.max(initial=0)
    units, signs, amount = units[used], signs[used], amount[used]
    kinks = np.abs(units @ X.T) < 1e-6 * np.linalg.norm(X, axis=1)
    p, m = np.zeros(units.shape, np.longdouble), np.zeros(kinks.shape)
    if used.any():
        p, m = polish(data, amount[:, None] * units, signs, kinks)
    # kinks are exact zeros of the network, not the rounding of them
    hidden = np.where(kinks.T, 0, np.maximum(X @ p.T, 0)) * signs
    value = (s * (hidden.sum(1) - y) ** 2).sum() / 2 + beta * np.sqrt((p**2).sum(1)).sum()
    fit = np.float64(hidden.sum(1))
    gap = duality_gap(data, masks, fit, float(value))
    units, unit_signs, margin = directions(data, masks, s * (y - fit), 1e-9)
    return Optimum(p, signs, kinks, m, value, gap, units, unit_signs, margin)


def weighted(data: Data) -> Data:
    """The data without its rows of weight zero."""
    there = data.s > 0
    return Data(data.X[there], data.y[there], data.s[there], data.beta)


def solve(data: Data) -> Optimum:
    """The optimal network, certified; one with independent activations."""
    data = weighted(data)
    masks = cells(data.X)
    scale = (data.s * data.y**2).sum() / 2
    tried = []
    for equilibrate in (True, False):
        fit, _ = interior_point(data, *both_signs(masks), equilibrate)
        for tolerance in (1e-6, 1e-5, 1e-7, 1e-4, 1e-8, 1e-3):
            best = _structure(data, masks, fit, tolerance)
            if abs(best.gap) <= 1e-13 * scale:
                return best
            tried.append(best.gap)
    raise ArithmeticError(f"no certified optimum, gaps {tried} of {scale}")


def beta_max(data: Data) -> float:
    """The smallest weight decay of which the network is zero."""
    data = weighted(data)
    return float(np.linalg.norm(slopes(data, cells(data.X), data.s * data.y)[0], axis=1).max())


# --------------------------------------------------------------------------------------------- functions of the optimum


def predict(best: Optimum, queries: Array) -> Array:
    return activations(np.longdouble(queries), best.neurons, best.signs).sum(1)


def parts(data: Data, best: Optimum) -> tuple[Array, Array]:
    """Activations of all directions at rows that count, and the fit that the optimal networks make of them."""
    X = weighted(data).X
    return activations(X, best.directions, best.direction_signs), np.float64(predict(best, X))


def envelope(data: Data, best: Optimum) -> dict[str, Array]:
    """Gradients of the optimal value by the envelope theorem. A row of weight zero has its loss as the only one."""
    X, y, s = data[:3]
    r = predict(best, X) - y
    full = np.zeros((len(best.signs), len(y)))
    full[:, s > 0] = best.multipliers
    kinks = np.zeros(full.shape, bool)
    kinks[:, s > 0] = best.kinks
    masks = (best.neurons @ X.T > 0) & ~kinks
    slope = best.signs[:, None] * masks * (s * r) + full
    penalty = np.sqrt((best.neurons**2).sum(1)).sum()
    return {"X": slope.T @ best.neurons, "y": -s * r, "s": r**2 / 2, "beta": penalty}


def spread(data: Data, best: Optimum, queries: Array) -> float:
    """How far predictions of optimal networks differ at most: two linear programs a query over their polyhedron."""
    if not len(best.directions):
        return 0.0
    A, fit = parts(data, best)
    widths = []
    for row in activations(queries, best.directions, best.direction_signs):
        ends = [optimize.linprog(sign * row, A_eq=A, b_eq=fit, bounds=(0, None)) for sign in (1, -1)]
        if any(end.status for end in ends):
            raise ArithmeticError([end.message for end in ends])
        widths.append(abs(ends[0].fun + ends[1].fun))
    return max(widths)


def minimal_sizes(data: Data, best: Optimum) -> set[int]:
    """Numbers of neurons of all minimal optimal networks: each set of directions that makes the fit independently."""
    A, fit = parts(data, best)
    sizes = set()
    for size in range(A.shape[1] + 1):
        for subset in map(list, itertools.combinations(range(A.shape[1]), size)):
            amount, rest = optimize.nnls(A[:, subset], fit) if size else (np.ones(0), np.linalg.norm(fit))
            exact = rest <= 1e-9 * np.linalg.norm(fit) and (amount > 1e-7 * amount.max(initial=0)).all()
            if exact and np.linalg.matrix_rank(A[:, subset], tol=1e-7 * np.linalg.norm(A)) == size:
                sizes.add(size)
    return sizes


# --------------------------------------------------------------------------------------------------------- derivatives


def moved(data: Data, name: str, index: tuple[int, ...], step: float) -> Data:
    changed = np.array(getattr(data, name))
    changed[index] += step
    return data._replace(**{name: changed})


def difference(along: Callable[[float], Any], step: float, one_sided: bool = False) -> Any:
    """The slope of ``along(t)`` at zero: central differences extrapolated to an error of ``step^6``, or ``step^4``."""
    if one_sided:
        weights = {0: -25 / 12, 1: 4, 2: -3, 3: 4 / 3, 4: -1 / 4}
    else:
        weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
        weights |= {-k: -w for k, w in weights.items()}
    return sum(np.longdouble(w) * along(k * step) for k, w in weights.items()) / np.longdouble(step)


def second_difference(along: Callable[[float], Any], step: float) -> Any:
    """The second derivative of ``along(t)`` at zero, to an error of ``step^6``."""
    weights = {0: -49 / 18, 1: 3 / 2, 2: -3 / 20, 3: 1 / 90}
    weights |= {-k: w for k, w in weights.items()}
    return sum(np.longdouble(w) * along(k * step) for k, w in weights.items()) / np.longdouble(step) ** 2


def gradient(data: Data, value: Callable[[Data, Optimum], Any], step: float = 1e-4) -> dict[str, Array]:
    """Derivatives of ``value(data, optimum)`` in X, y, s and beta, in the last dimensions of each."""
    out = {}
    for name in Data._fields:
        shape = np.shape(getattr(data, name))
        columns = []
        for index in np.ndindex(*shape):

            def along(t: float, name: str = name, index: tuple[int, ...] = index) -> Any:
                there = moved(data, name, index, t)
                return value(there, solve(there))

            border = name == "s" and data.s[index] == 0
            idle = name in "Xy" and data.s[index[0]] == 0
            columns.append(0 * value(data, solve(data)) if idle else difference(along, step, border))
        first = np.shape(columns[0])
        out[name] = np.moveaxis(np.array(columns).reshape(*shape, *first), range(-len(first), 0), range(len(first)))
    return out


def curvature(data: Data, value: Callable[[Optimum], Any], direction: Array, step: float = 1e-3) -> Array:
    """``H direction`` of the Hessian H of a number ``value(optimum)`` in y, by differences in two directions."""

    def at(k: int, t: float, u: float) -> Any:
        there = data._replace(y=data.y + u * direction + t * np.eye(len(data.y))[k])
        return value(solve(there))

    def row(k: int) -> Any:
        return difference(lambda u: difference(lambda t: at(k, t, u), step), step)

    return np.array([row(k) for k in range(len(data.y))])


# --------------------------------------------------------------------------------------------- the non-convex training


def descend(data: Data, width: int, starts: int, seed: int = 0) -> Array:
    """Objectives that L-BFGS reaches from random starts, ``(starts)``: weights and outputs, with decay of both.

    The kinks of a good network lie on data, where L-BFGS cannot go on, so the ReLU is at first rounded off.
    """
    X, y, s, beta = data
    d = X.shape[1]
    rng = np.random.default_rng(seed)

    def loss(theta: Array, width_of_kink: float) -> tuple[float, Array]:
        W, out = theta[: width * d].reshape(width, d), theta[width * d :]
        z = X @ W.T
        root = np.sqrt(z**2 + width_of_kink**2)
        hidden, rise = (z + root) / 2, (1 + z / np.where(root > 0, root, 1)) / 2
        r = hidden @ out - y
        back = (s * r)[:, None] * rise * out
        slope = np.concatenate([(back.T @ X + beta * W).ravel(), hidden.T @ (s * r) + beta * out])
        return float((s * r**2).sum() / 2 + beta * (theta**2).sum() / 2), slope

    values = []
    for _ in range(starts):
        theta = rng.standard_normal(width * (d + 1))
        for kink in (0.1, 0.01, 1e-3, 1e-4, 1e-6):
            theta = optimize.minimize(loss, theta, (kink,), "L-BFGS-B", jac=True, options={"maxiter": 200}).x
        values.append(loss(theta, 0.0)[0])
    return np.array(values)
