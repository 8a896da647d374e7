"""Entropic transport in mpmath at 100 digits: Newton's method on the dual, and differences of it.

Written from the statement of the problem in the docstrings alone. `solve` maximises the concave dual

    sum_i A(a_i, f_i) + sum_j B(b_j, g_j) - eps sum_ij a_i b_j (exp((f_i + g_j - C_ij) / eps) - 1)

with ``A(a, f) = a f`` for a constraint and ``rho a (1 - exp(-f / rho))`` for a penalty; `gap` certifies the answer by
the distance between the primal and the dual objective. With 100 digits a forward difference of step 1e-22 has a
relative error near 1e-22 at the first order and near 1e-20 at the second, and it is one-sided at a mass of zero, as
the documented derivative is.
"""

import mpmath
import numpy as np
from mpmath import mpf

DIGITS = 100
STEP = "1e-22"


def numbers(x):
    """The floats of an array or a tensor, as exact mpmath numbers of the same shape."""
    x = np.asarray(x, dtype=np.float64)
    return np.array([mpf(float(v)) for v in x.ravel()], dtype=object).reshape(x.shape)


def exp(x):
    return np.array([mpmath.exp(v) for v in x.ravel()], dtype=object).reshape(x.shape)


def log(x):
    return np.array([mpmath.log(v) for v in x.ravel()], dtype=object).reshape(x.shape)


def _equalized(a, b, rho_a, rho_b):
    """Both constraints: the documented scaling of both sides to the geometric mean of their totals."""
    if rho_a is None and rho_b is None:
        ratio = mpmath.sqrt(b.sum() / a.sum())
        a, b = a * ratio, b / ratio
    return a, b


def _start(cost, a, b, eps, rho_a, rho_b):
    """Log-domain Sinkhorn in numpy floats, with eps halved from the range of the cost."""
    with np.errstate(divide="ignore"):
        C, la, lb, eps = np.float64(cost), np.log(np.float64(a)), np.log(np.float64(b)), float(eps)
    f, g = np.zeros(len(la)), np.zeros(len(lb))
    finite = C[np.isfinite(C)]
    now = max(eps, finite.max() - finite.min())
    while True:
        ta, tb = (1.0 if rho is None else float(rho) / (float(rho) + now) for rho in (rho_a, rho_b))
        for _ in range(300):
            f = -ta * now * np.logaddexp.reduce(lb + (g - C) / now, axis=1)
            g = -tb * now * np.logaddexp.reduce(la[:, None] + (f[:, None] - C) / now, axis=0)
        if now == eps:
            return numbers(f), numbers(g)
        now = max(eps, now / 2)


def _dual(cost, a, b, eps, rho_a, rho_b, f, g):
    def side(a, f, rho):
        return (a * f).sum() if rho is None else rho * (a * (1 - exp(-f / rho))).sum()

    P = a[:, None] * b * exp((f[:, None] + g - cost) / eps)
    return side(a, f, rho_a) + side(b, g, rho_b) - eps * (P.sum() - a.sum() * b.sum()), P


def _newton(cost, a, b, eps, rho_a, rho_b, f, g):
    n, m = cost.shape
    hard = rho_a is None and rho_b is None
    for _ in range(200):
        value, P = _dual(cost, a, b, eps, rho_a, rho_b, f, g)
        r, c = P.sum(1), P.sum(0)
        ra, cb = (a if rho_a is None else a * exp(-f / rho_a)), (b if rho_b is None else b * exp(-g / rho_b))
        gradient = np.concatenate([ra - r, cb - c])
        H = mpmath.zeros(n + m)
        for i in range(n):
            H[i, i] = r[i] / eps + (0 if rho_a is None else ra[i] / rho_a)
            for j in range(m):
                H[i, n + j] = H[n + j, i] = P[i, j] / eps
        for j in range(m):
            H[n + j, n + j] = c[j] / eps + (0 if rho_b is None else cb[j] / rho_b)
        if hard:  # the null vector (1, -1), which the gradient has no part in
            sign = [1] * n + [-1] * m
            for i in range(n + m):
                for j in range(n + m):
                    H[i, j] += sign[i] * sign[j] * (a.sum() / eps)
        step = np.array(list(mpmath.lu_solve(H, mpmath.matrix(list(gradient)))), dtype=object)
        size, slope, t = max(abs(step)) / eps, (gradient * step).sum(), mpf(1)
        while size > mpf("1e-9") and _dual(cost, a, b, eps, rho_a, rho_b, f + t * step[:n], g + t * step[n:])[0] < (
            value + t * slope / 10
        ):
            t /= 2
        f, g = f + t * step[:n], g + t * step[n:]
        if size < mpf(10) ** (-DIGITS // 2):  # the next error is its square, but for a mass as small as STEP
            return f, g
    raise AssertionError("the oracle has not converged")


def solve(cost, a, b, eps, rho_a=None, rho_b=None, start=None):
    """``(plan, f, g, value)`` of one problem, in mpmath numbers. `start`: potentials of a nearby problem."""
    a, b = _equalized(a, b, rho_a, rho_b)
    rows, columns = np.array([v > 0 for v in a]), np.array([v > 0 for v in b])
    inner = cost[np.ix_(rows, columns)], a[rows], b[columns], eps, rho_a, rho_b
    f, g = _start(*inner) if start is None else (start[0][rows], start[1][columns])
    f, g = _newton(*inner, f, g)
    # A row without mass takes no part; its potential is what its own optimality condition makes of the others'.
    ta, tb = (1 if rho is None else rho / (rho + eps) for rho in (rho_a, rho_b))
    all_f = -ta * eps * log((b[columns] * exp((g - cost[:, columns]) / eps)).sum(1))
    all_g = -tb * eps * log((a[rows][:, None] * exp((f[:, None] - cost[rows]) / eps)).sum(0))
    if rho_a is None and rho_b is None:  # the documented constant: equal means under a and b
        shift = ((b * all_g).sum() / b.sum() - (a * all_f).sum() / a.sum()) / 2
        all_f, all_g = all_f + shift, all_g - shift
    value, plan = _dual(cost, a, b, eps, rho_a, rho_b, all_f, all_g)
    return plan, all_f, all_g, value


def _divergence(p, q):
    """``KL(p | q)`` of unnormalised masses."""
    terms = [(x * mpmath.log(x / y) if x > 0 else 0) - x + y for x, y in zip(p.ravel(), q.ravel(), strict=True)]
    return sum(terms, mpf(0))


def gap(cost, a, b, eps, rho_a=None, rho_b=None):
    """``(primal - dual, error of the constraints)`` at the answer: both zero prove that it is the solution."""
    plan, _, _, value = solve(cost, a, b, eps, rho_a, rho_b)
    a, b = _equalized(a, b, rho_a, rho_b)
    allowed = np.array([mpmath.isfinite(v) for v in cost.ravel()]).reshape(cost.shape)
    primal = (cost[allowed] * plan[allowed]).sum() + eps * _divergence(plan, a[:, None] * b)
    error = mpf(0)
    for sums, masses, rho in ((plan.sum(1), a, rho_a), (plan.sum(0), b, rho_b)):
        if rho is None:
            error = max(error, abs(sums - masses).max())
        else:
            primal = primal + rho * _divergence(sums, masses)
    return primal - value, error


def divergence(x, y, a, b, eps, rho=None):
    """The Sinkhorn divergence of two clouds under the squared distance, by its definition.

    Between constraints the totals are equal, and what the difference of totals adds has no part in it.
    """

    def value(x, y, a, b):
        return solve(((x[:, None] - y) ** 2).sum(-1), a, b, eps, rho, rho)[3]

    excess = 0 if rho is None else a.sum() - b.sum()
    return value(x, y, a, b) - value(x, x, a, a) / 2 - value(y, y, b, b) / 2 + eps * excess**2 / 2


def gradient(function, x):
    """Forward differences of a scalar function of a list of mpmath arrays, in every finite entry of each."""
    h, base, out = mpf(STEP), function(x), []
    for k, part in enumerate(x):
        d = np.zeros(part.shape)
        for index in np.ndindex(part.shape):
            if mpmath.isfinite(part[index]):
                moved = part.copy()
                moved[index] += h
                d[index] = float((function([*x[:k], moved, *x[k + 1 :]]) - base) / h)
        out.append(d)
    return out


def product(function, x, v):
    """The Hessian of a scalar function times `v`, by differences of differences."""
    h = mpf(STEP)
    there = [np.array(p + h * d, dtype=object) for p, d in zip(x, v, strict=True)]
    base, ahead, out = function(x), function(there), []
    for k, part in enumerate(x):
        d = np.zeros(part.shape)
        for index in np.ndindex(part.shape):
            if mpmath.isfinite(part[index]):
                here, far = part.copy(), there[k].copy()
                here[index] += h
                far[index] += h
                mixed = (
                    function([*there[:k], far, *there[k + 1 :]]) - ahead - function([*x[:k], here, *x[k + 1 :]]) + base
                )
                d[index] = float(mixed / h / h)
        out.append(d)
    return out
