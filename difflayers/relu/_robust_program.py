r"""The robust training problem as a cone program, solved by Clarabel, with a certificate of its own.

With :math:`q_k = \sum_i d_{ki} (v_i - w_i)`, blocks :math:`p_b` for the :math:`v_i` and then the :math:`w_i`,
:math:`a_k \ge \|q_k\|_*` and :math:`n_b \ge \|p_b\|_*` in the dual norm of the ball (over perturbed columns):

.. math:: \min \sum_k s_k\, l(x_k^T q_k, a_k) + \beta \sum_b \|p_b\| \quad \text{s.t.} \quad
    e_{kb}\, x_k^T p_b - \epsilon\, n_b \ge 0 .

For any :math:`\alpha_k` in the domain of the loss's conjugate, :math:`\rho \ge 0`, :math:`\omega_k \in \alpha_k
\epsilon B` and :math:`\omega_b \in \epsilon \sum_k \rho_{bk} B` (B the unit ball of the perturbation), the numbers

.. math:: c_b = \pm \sum_k d_{kb} (-\alpha_k l'_k x_k - \omega_k) + \sum_k \rho_{bk} e_{kb} x_k - \omega_b

bound the optimum from below once they are scaled to :math:`\|c_b\| \le \beta`: the Lagrangian is then least at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ._robust_rows import NARROW, Array, Norm, Program, dual_norm, norm_rows, norm_sizes, or_one, widths

Kind = Literal["squared", "hinge", "logistic"]
SHARP = 1e-6  # what the solver is asked for, in units of the wanted gap: the gap adds up many residuals
GOOD = 1e-3  # a gap in these units that is not worth another attempt
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"max_step_fraction": 0.9, "equilibrate_enable": False},
    {"max_step_fraction": 0.9, "static_regularization_constant": 1e-10},
)


class RobustData(NamedTuple):
    """One training problem: float64 arrays and numbers."""

    X: Array
    y: Array
    s: Array
    beta: float
    epsilon: float
    M: Array  # (n, P) booleans


class RobustResult(NamedTuple):
    """Neurons, the multipliers a derivative of the value needs, and how good they are.

    Attributes:
        p: ``(2, P, d)`` neurons of positive and of negative output.
        rho: ``(2, P, n)`` multipliers of the cells.
        slope: ``(n)`` subgradients at kinks of the loss: of ``|f - y|`` in -1..1, of the hinge in 0..1.
        gap: How far the objective may lie above the optimum.
        residual: The same, relative to the objective of the zero network.
        steps: Iterations.
        narrow: Whether every cell is too narrow for epsilon.
    """

    p: Array
    rho: Array
    slope: Array
    gap: float
    residual: float
    steps: int
    narrow: bool


def solve_robust(data: RobustData, columns: Array, kind: Kind, norm: Norm, rtol: float, max_steps: int) -> RobustResult:
    """Solves one problem; `columns` are the indices of perturbed columns of X."""
    X, y, s, beta, epsilon, M = data
    n, P = M.shape
    size, height = or_one(np.abs(X).max()), or_one(np.abs(y).max()) if kind == "squared" else 1.0
    most = or_one(float((s * _loss(kind, 0 * y, 0 * y, y)).sum()))
    data = RobustData(
        X / size,
        y / height,
        s * height**2 / most,
        beta * height / (size * most),
        epsilon / size if len(columns) else 0.0,
        M,
    )
    width, inside = widths(data.X, M, data.epsilon, columns, norm)
    kept = width > NARROW if data.epsilon > 0 else np.ones(P, dtype=bool)
    narrow = not bool(kept.any())
    first = np.zeros(P, dtype=bool)
    first[np.unique(M, axis=1, return_index=True)[1]] = True  # of equal patterns one is enough
    kept &= first
    part = _Part(data._replace(M=M[:, kept]), columns, kind, norm)
    found = part.at_zero() if narrow else part.best(inside[kept], width[kept], rtol, max_steps)
    p, rho = np.zeros((2, P, X.shape[1])), np.zeros((2, P, n))
    p[:, kept] = found.p.reshape(2, -1, X.shape[1]) * height / size
    rho[:, kept] = found.rho.reshape(2, -1, n) * most / height
    return found._replace(p=p, rho=rho, gap=found.gap * most, narrow=narrow)


class _Multipliers(NamedTuple):
    alpha: Array  # (n) at least 0: of the margin, or of |f - y| + epsilon a
    eta: Array  # (n) times alpha: of f - y; unused for margins
    omega: Array  # (n, d) worst perturbations times their multiplier
    rho: Array  # (2P, n) of the cells
    shift: Array  # (2P, d) the same of the cells


@dataclass
class _Part:
    """The program over gates whose cells are wide enough, in units of the data."""

    data: RobustData
    columns: Array
    kind: Kind
    norm: Norm

    def __post_init__(self) -> None:
        M = self.data.M
        self.signs = np.repeat([1.0, -1.0], M.shape[1])
        self.D = np.tile(M.T, (2, 1)).astype(float)  # (2P, n)
        self.E = 2 * self.D - 1
        self.robust = self.data.epsilon > 0

    def at_zero(self) -> RobustResult:
        """The zero network, where there is no other."""
        y = self.data.y
        slope = -np.sign(y) if self.kind == "squared" else np.ones(len(y))
        return RobustResult(np.zeros((0, 1)), np.zeros((0, 1)), slope, 0.0, 0.0, 0, True)

    def best(self, inside: Array, width: Array, rtol: float, max_steps: int) -> RobustResult:
        """The best of few attempts, judged by the gap."""
        q, P = self.build()
        d, best, steps = self.data.X.shape[1], None, 0
        for settings in ATTEMPTS:
            x, z, more = self.program.solve(q, P, max(SHARP * rtol, 1e-14), max_steps - steps, settings)
            steps += more
            m, c = self.multipliers(z)
            p = self.clean(self.program.value(x, "p", -1, d), c, np.tile(inside, (2, 1)), np.tile(width, 2))
            gap = self.objective(p) - self.lower_bound(m, c)
            gap = max(gap, 0.0) if np.isfinite(gap) else np.inf
            if best is None or gap < best.gap:
                best = RobustResult(p, m.rho, self.slope(p, m), gap, gap, steps, False)
            if gap <= GOOD * rtol or steps >= max_steps:
                break
        assert best is not None
        return best._replace(steps=steps)

    def build(self) -> tuple[Array, Array]:
        """The program, the linear part of its objective and the diagonal of the quadratic one."""
        import clarabel  # type: ignore[import-untyped]

        X, _, s, beta, epsilon, _ = self.data
        (n, d), B = X.shape, len(self.D)
        sizes = {"p": B * d, "length": B, "q": n * d, "loss": n}
        for name, count in (("p", B), ("q", n)):
            sizes |= norm_sizes(name, count, self.columns, self.norm, epsilon)
        program = self.program = Program(sizes | ({"aux": n} if self.kind == "logistic" else {}))
        j = np.arange(d)
        b, k = np.nonzero(self.D)
        sums = np.arange(n * d), "q", np.arange(n * d), 1.0
        terms = sums, (k[:, None] * d + j, "p", b[:, None] * d + j, -self.signs[b][:, None])
        program.add("sums", [clarabel.ZeroConeT(n * d)], n * d, *terms)
        binding = np.nonzero((X != 0).any(1) | self.robust)[0]
        self.binding = binding
        m = len(binding)
        at = np.arange(B)[:, None] * m + np.arange(m)
        cells: list[Any] = [
            (at[..., None], "p", (np.arange(B) * d)[:, None, None] + j, self.E[:, binding, None] * X[binding])
        ]
        if self.robust:
            cells.append((at, "pnorm", np.arange(B)[:, None], -epsilon))
        program.add("cells", [clarabel.NonnegativeConeT(B * m)], B * m, *cells)
        heads = np.arange(B) * (1 + d)
        lengths = (heads, "length", np.arange(B), 1.0), (heads[:, None] + 1 + j, "p", np.arange(B * d).reshape(B, d), 1)
        program.add("lengths", [clarabel.SecondOrderConeT(1 + d)] * B, B * (1 + d), *lengths)
        for name, count in (("p", B), ("q", n)):
            norm_rows(program, name, name, count, d, self.columns, self.norm, epsilon)
        self._loss_rows(program)
        squared = self.kind == "squared"
        q = program.objective(length=beta, loss=0.0 if squared else s)
        return q, program.objective(loss=s) if squared else np.zeros(program.width)

    def _loss_rows(self, program: Program) -> None:
        import clarabel

        X, y, _, _, epsilon, _ = self.data
        n, d = X.shape
        k = np.arange(n)
        at = k[:, None], "q", (k * d)[:, None] + np.arange(d)
        loss = k, "loss", k, 1.0
        if self.kind == "squared":
            worse = [(k, "qnorm", k, -epsilon)] if self.robust else []
            for sign, label in ((1.0, "over"), (-1.0, "under")):
                terms = loss, (*at, sign * X), *worse
                program.add(label, [clarabel.NonnegativeConeT(n)], n, *terms, b=-sign * y)
            return
        margin = y[:, None] * X
        if self.kind == "hinge":
            worse = [(k, "qnorm", k, -epsilon * np.abs(y))] if self.robust else []
            program.add("hinge", [clarabel.NonnegativeConeT(n)], n, loss, (*at, margin), *worse, b=-1.0)
            program.add("flat", [clarabel.NonnegativeConeT(n)], n, loss)
            return
        # log(1 + exp(-m)) <= t where exp(-m - t) <= r and exp(-t) <= 1 - r
        cones, ones = [clarabel.ExponentialConeT()] * n, np.tile([0.0, 1.0, 0.0], n)
        worse = [(3 * k, "qnorm", k, epsilon * np.abs(y))] if self.robust else []
        first = (3 * k[:, None], "q", at[2], -margin), (3 * k, "loss", k, -1.0), (3 * k + 2, "aux", k, 1.0), *worse
        program.add("wrong", cones, 3 * n, *first, b=ones)
        second = (3 * k, "loss", k, -1.0), (3 * k + 2, "aux", k, -1.0)
        program.add("right", cones, 3 * n, *second, b=ones + np.tile([0.0, 0.0, 1.0], n))

    def fit(self, p: Array) -> tuple[Array, Array]:
        """Predictions, and how much a perturbation of unit size can change them."""
        q = (self.D * self.signs[:, None]).T @ p
        worst = dual_norm(q[:, self.columns], self.norm) if self.robust else np.zeros(len(q))
        return (q * self.data.X).sum(1), worst

    def objective(self, p: Array) -> float:
        """The objective at neurons in their cells."""
        f, worst = self.fit(p)
        each = _loss(self.kind, f, self.data.epsilon * worst, self.data.y)
        return float((self.data.s * each).sum() + self.data.beta * np.linalg.norm(p, axis=1).sum())

    def multipliers(self, z: dict[str, Array]) -> tuple[_Multipliers, Array]:
        """Exactly admissible multipliers, and the ``c_b`` they give."""
        X, y, s, _, epsilon, _ = self.data
        (n, d), B = X.shape, len(self.D)
        eta, reach = np.zeros(n), epsilon * np.abs(y)
        if self.kind == "squared":
            over, under = np.maximum(z["over"], 0), np.maximum(z["under"], 0)
            alpha, eta, reach = over + under, under - over, np.full(n, epsilon)
            alpha, eta = np.where(s > 0, alpha, 0), np.where(s > 0, eta, 0)
        elif self.kind == "hinge":
            alpha = np.clip(z["hinge"], 0, s)
        else:
            alpha = np.clip(-z["wrong"][::3], 0, s)
        rho = np.zeros((B, n))
        rho[:, self.binding] = np.maximum(z["cells"], 0).reshape(B, -1)
        omega = self._worst(z, "q", n, d, alpha * reach)
        shift = self._worst(z, "p", B, d, epsilon * rho.sum(1))
        pulled = (-eta if self.kind == "squared" else alpha * y)[:, None] * X - omega
        c = self.signs[:, None] * (self.D @ pulled) + (rho * self.E) @ X - shift
        return _Multipliers(alpha, eta, omega, rho, shift), c

    def _worst(self, z: dict[str, Array], name: str, count: int, d: int, radius: Array) -> Array:
        """Multipliers of the norms, in the ball times `radius`."""
        out = np.zeros((count, d))
        if not self.robust:
            return out
        if self.norm == "l1":
            found = (z[name + "below"] - z[name + "above"]).reshape(count, -1)
            out[:, self.columns] = np.clip(found, -radius[:, None], radius[:, None])
            return out
        found = -z[name + "ball"].reshape(count, -1)[:, 1:]
        long = np.linalg.norm(found, axis=1)
        out[:, self.columns] = found * np.minimum(1, radius / np.where(long > 0, long, 1))[:, None]
        return out

    def lower_bound(self, m: _Multipliers, c: Array) -> float:
        """Lagrangian duality, with all multipliers scaled so that zero minimises the Lagrangian."""
        s, y = self.data.s, self.data.y
        with np.errstate(all="ignore"):
            scale = min(1.0, self.data.beta / or_one(np.linalg.norm(c, axis=1).max()))
            alpha = scale * m.alpha
            if self.kind == "squared":
                return float((-scale * m.eta * y - np.where(s > 0, alpha**2 / (2 * or_one(s)), 0)).sum())
            if self.kind == "hinge":
                return float(alpha.sum())
            t = np.where(s > 0, alpha / or_one(s), 0)
            entropy = -np.where(t > 0, t * np.log(or_one(t)), 0) - np.where(t < 1, (1 - t) * np.log1p(-t), 0)
            return float((s * entropy).sum())

    def clean(self, p: Array, c: Array, inside: Array, width: Array) -> Array:
        """Exact zeros where a neuron is not active, and what rounding took out of its cell put back."""
        room = 1 - np.linalg.norm(c, axis=1) / self.data.beta
        p = np.where((np.linalg.norm(p, axis=1) > room)[:, None], p, 0)
        narrow = self.data.epsilon * dual_norm(p[:, self.columns], self.norm) if self.robust else np.zeros(len(p))
        miss = np.maximum((narrow[:, None] - self.E * (p @ self.data.X.T)).max(1), 0)
        return p + np.where(width > 0, miss / or_one(width), 0)[:, None] * inside

    def slope(self, p: Array, m: _Multipliers) -> Array:
        """Subgradients of the loss at its kinks: of the two that go with a multiplier, the one further off zero."""
        s, y = self.data.s, self.data.y
        f, worst = self.fit(p)
        if self.kind == "squared":
            eta = np.clip(np.where(m.alpha > 0, m.eta / or_one(m.alpha), 0), -1, 1)
            return np.where(np.abs(f - y) > 1 - np.abs(eta), np.sign(f - y), eta)
        if self.kind == "hinge":
            miss = 1 - y * f + np.abs(y) * self.data.epsilon * worst
            tau = np.where(s > 0, m.alpha / or_one(s), 0.5)
            return np.where(miss > 1 - tau, 1.0, np.where(-miss > tau, 0.0, tau))
        return np.zeros(len(y))


def _loss(kind: Kind, f: Array, worse: Array, y: Array) -> Array:
    """The loss of a prediction that may be `worse` by so much."""
    if kind == "squared":
        return (np.abs(f - y) + worse) ** 2 / 2
    margin = y * f - np.abs(y) * worse
    return np.maximum(1 - margin, 0) if kind == "hinge" else np.logaddexp(0, -margin)
