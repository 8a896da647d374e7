r"""How far a hypergradient from an inexact lower solution and an inexact adjoint can be from the true one.

With :math:`|\hat y - y^*| \le \varepsilon` and :math:`|H q - \nabla_y F| \le \delta` at :math:`\hat y`, where
:math:`a \ge |H^{-1} \nabla_y F|`, which is the smaller of :math:`|\nabla_y F| / \mu` and :math:`|q| + \delta / \mu`:

.. math:: |q - q^*| \le \frac{\delta + (L_H a + L_F) \varepsilon}{\mu}, \qquad
    |p - \nabla \Phi| \le \omega = L_{F_x} \varepsilon + |J| |q - q^*| + L_J \varepsilon |q^*|
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._solution import Solution, SolveError, Status

from ._evaluation import Evaluation, _leaves
from ._method import norm
from ._oracles import Recorded, _gradient

Value = float | Callable[[Any, Any], float | Tensor]

_ROWS = 16  # so many upper variables or fewer: the norm of J from its Gram matrix
_MARGIN = 0.5  # of the smallest Ritz value, which is never below the smallest eigenvalue
_FADE = 0.8  # of an estimated Lipschitz constant from one estimate to the next


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    r"""Constants of a bilevel problem, for the error bound of a hypergradient.

    Each is a number, ``fn(x, y) -> number`` where it depends on where the method is, or None: estimated, see
    :class:`MAID`. With H and J the second derivatives of the lower objective in y, and in x and y:

    Args:
        strong_convexity: mu, the smallest eigenvalue that H can have at this x.
        upper: Lipschitz constant in y of the gradient of the upper objective in y.
        upper_in_x: That of its gradient in x; 0 where the upper objective is a function of y alone.
        hessian: Lipschitz constant of H in y.
        cross: Lipschitz constant of J in y.
        cross_norm: Largest singular value of J at this x and y.

    Raises:
        ValueError: For a number that is not finite, or below 0 (``strong_convexity``: not above).

    Example:
        >>> from difflayers.bilevel import Smoothness
        >>> Smoothness(strong_convexity=lambda x, y: float(x.exp().min()), hessian=0.0).certified
        False

    Source: M. S. Salehi, S. Mukherjee, L. Roberts, M. J. Ehrhardt, An adaptively inexact first-order method for bilevel
    optimization with application to hyperparameter learning, 2023, assumptions 1 to 3.
    """

    strong_convexity: Value | None = None
    upper: Value | None = None
    upper_in_x: Value | None = None
    hessian: Value | None = None
    cross: Value | None = None
    cross_norm: Value | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not callable(value):
                _checked(field.name, value)

    @property
    def certified(self) -> bool:
        """Whether all are given, so that the bound is one and not an estimate."""
        return all(getattr(self, field.name) is not None for field in fields(self))


def _checked(name: str, value: Any) -> float:
    positive = name == "strong_convexity"
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ValueError(f"{name}: expected None, a number or a function, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name}: expected a finite number {'above' if positive else 'of at least'} 0, got {number}")
    return number


class Constants(NamedTuple):
    """The constants at one point."""

    strong_convexity: float
    upper: float
    upper_in_x: float
    hessian: float
    cross: float
    cross_norm: float


def error_bound(c: Constants, epsilon: float, delta: float, adjoint: float, slope: float) -> float:
    """Omega; `adjoint` is the norm of q and `slope` that of the upper gradient in y."""
    mu = c.strong_convexity
    true_adjoint = min(slope / mu, adjoint + delta / mu)
    moved = (c.hessian * true_adjoint + c.upper) * epsilon / mu
    at_solution = min(true_adjoint + moved, (slope + c.upper * epsilon) / mu)
    return c.upper_in_x * epsilon + c.cross_norm * (delta / mu + moved) + c.cross * epsilon * at_solution


def smallest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[float, Tensor]:
    """The smallest Ritz value of a symmetric map after some Lanczos steps, and its vector."""
    basis = [start / norm(start)]
    diagonal: list[float] = []
    off: list[float] = []
    for k in range(min(steps, start.numel())):
        w = product(basis[k])
        diagonal.append(float(basis[k] @ w))
        rows = torch.stack(basis)
        for _ in range(2):
            w = w - rows.mT @ (rows @ w)
        length = float(norm(w))
        if not length > 1e-6 * max(map(abs, diagonal)):  # also NaN
            break
        off.append(length)
        basis.append(w / length)
    k = len(diagonal)
    if not all(map(math.isfinite, diagonal)):
        return math.nan, start
    tridiagonal = torch.diag(start.new_tensor(diagonal).double())
    for i, value in enumerate(off[: k - 1]):
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = value
    values, vectors = torch.linalg.eigh(tridiagonal)
    return float(values[0]), torch.stack(basis[:k]).mT @ vectors[:, 0].to(start)


def largest_singular_value(
    product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[float, Tensor]:
    """Power iteration on ``product(transposed(v))``: a lower bound of the singular value, and its vector."""
    v, value = start, 0.0
    for _ in range(steps):
        length = float(norm(v))
        if not length > 0:
            return value, start
        u = transposed(v / length)
        value, v = float(norm(u)), product(u)
    return value, v if float(norm(v)) > 0 else start


def spread(n: int, like: Tensor) -> Tensor:
    """A fixed low-discrepancy vector to start iterations from: the same result every run."""
    ramp = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    return ramp * 0.7548776662466927 % 1 - 0.5


class Estimates:
    """The constants where a method is: given ones as they are, the others from products at that point.

    Args:
        given: What is known.
    """

    def __init__(self, given: Smoothness) -> None:
        self.given = given

    def vectors(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What power iterations start from and go on with, by name."""
        g = self.given
        wanted = {
            "lowest": (g.strong_convexity, y.numel()),
            "crossing": (g.cross_norm, x.numel()),
            "bending": (g.upper, y.numel()),
        }
        return {name: spread(n, y) for name, (value, n) in wanted.items() if value is None}

    def numbers(self) -> dict[str, float | None]:
        """What else goes from one estimate to the next."""
        return {"strong_convexity": None, "hessian": 0.0, "cross": 0.0}

    def convexity(
        self,
        at: Evaluation,
        x: Tensor,
        y: Tensor,
        plain: dict[str, Any],
        slope: Recorded | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> float:
        """The given constant of strong convexity at x, or the last estimate, or a first one by `slope`.

        Without a slope this is a trial, where nobody looks whether the given one is a positive number.
        """
        given = self._known("strong_convexity", at, x, y, check=slope is not None)
        if given is None and plain["strong_convexity"] is None and slope is not None and state is not None:
            plain["strong_convexity"] = self._smallest(slope, state, 20)
        return plain["strong_convexity"] if given is None else given

    def __call__(
        self,
        at: Evaluation,
        x: Tensor,
        y: Tensor,
        slope: Recorded,
        q: Tensor,
        upper_y: Tensor,
        state: dict[str, Tensor],
        plain: dict[str, Any],
        steps: int,
        last: Constants | None = None,
    ) -> Constants:
        """All constants at x and y.

        Args:
            at: The objectives.
            x: Upper variables.
            y: Lower variables.
            slope: The lower gradient there.
            q: The adjoint there.
            upper_y: The upper gradient in y, which it is to be the solution for.
            state: Vectors of the last estimate, replaced by those of this one.
            plain: Its numbers, alike.
            steps: Of Lanczos; power iterations make a third of them.
            last: Where not None, estimates are these, and only what is given is looked up here.
        """
        found = {name: self._known(name, at, x, y) for name in Constants._fields}
        if last is not None:
            return Constants(*(getattr(last, name) if value is None else value for name, value in found.items()))
        if found["strong_convexity"] is None:
            plain["strong_convexity"] = found["strong_convexity"] = self._smallest(slope, state, steps)
        if found["cross_norm"] is None:
            found["cross_norm"] = _cross_norm(slope, state, steps // 3)
        if found["upper"] is None or found["upper_in_x"] is None:
            start = state.get("bending", q if float(norm(q)) > 0 else spread(y.numel(), y))
            norms = _upper_norms(_upper_slope(at, x, y), start, steps // 3)
            for name, value in zip(("upper", "upper_in_x"), norms[:2], strict=True):
                found[name] = value if found[name] is None else found[name]
            if "bending" in state:
                state["bending"] = norms[2]
        if found["hessian"] is None or found["cross"] is None:
            v = q if float(norm(q)) > 0 else upper_y  # a rough adjoint may be zero, the true one is not
            distance = float(norm(slope.value.detach())) / found["strong_convexity"]
            radius = max(distance, torch.finfo(y.dtype).eps ** (1 / 3) * max(float(norm(y)), float(norm(v))))
            for name, value in zip(("hessian", "cross"), _quotients(at, x, y, slope, v, radius), strict=True):
                if found[name] is None:
                    plain[name] = found[name] = max(value, _FADE * plain[name])
        return Constants(**found)

    def upper(self, at: Evaluation, x: Tensor, y: Tensor, last: float) -> float:
        """The given Lipschitz constant of the upper gradient here, or the last estimate."""
        given = self._known("upper", at, x, y, check=False)
        return last if given is None else given

    def _known(self, name: str, at: Evaluation, x: Tensor, y: Tensor, check: bool = True) -> Any:
        value = getattr(self.given, name)
        if callable(value):
            with torch.no_grad():
                value = value(at.x.present(x), at.y.present(y))
            return _checked(name, value) if check else float(value)
        return None if value is None else float(value)

    def _smallest(self, slope: Recorded, state: dict[str, Tensor], steps: int) -> float:
        """Half of the smallest Ritz value."""
        value, state["lowest"] = smallest_eigenvalue(slope.pull, state["lowest"], steps)
        if not value > 0:
            v = state["lowest"]
            code, count = (v.new_full((), number, dtype=torch.int64) for number in (int(Status.SINGULAR), steps))
            raise SolveError(
                f"MAID: the lower Hessian is not positive definite (an eigenvalue is at most {value:.2e}). Likely "
                "causes: (a) a lower objective that is not strongly convex: add a ridge to it, (b) NaN in the data",
                Solution(v, code, count, v.new_tensor(value)),
            )
        return _MARGIN * value


def _cross_norm(slope: Recorded, state: dict[str, Tensor], steps: int) -> float:
    """Norm of J: exact for few upper variables, else by power iteration, from below."""
    start = state["crossing"]
    if start.numel() > _ROWS:
        value, state["crossing"] = largest_singular_value(slope.cross, slope.cross_t, start, steps)
        return value
    eye = torch.eye(start.numel(), dtype=start.dtype, device=start.device)
    return float(torch.linalg.matrix_norm(torch.stack([slope.cross_t(e) for e in eye]), 2))


def _upper_norms(slope: Recorded, start: Tensor, steps: int) -> tuple[float, float, Tensor]:
    """Norms of the second derivatives of the upper objective, in y and in x and y, by power iteration."""
    mixed, _ = largest_singular_value(slope.cross_t, slope.cross, start, steps)
    value, start = largest_singular_value(slope.pull, slope.pull, start, steps)
    return value, mixed, start


def _quotients(at: Evaluation, x: Tensor, y: Tensor, slope: Recorded, v: Tensor, radius: float) -> tuple[float, float]:
    """How ``H v`` and ``J v`` change along v and along the lower gradient, at the distance `radius`."""
    length = float(norm(v))
    if not length > 0:
        return 0.0, 0.0
    bend, cross = slope.pull(v), slope.cross(v)
    hessian = mixed = 0.0
    for direction in (v, slope.value.detach()):
        size = float(norm(direction))
        if size > 0:
            _, there = at.slope(x, y + (radius / size) * direction)
            hessian = max(hessian, float(norm(there.pull(v) - bend)) / (radius * length))
            mixed = max(mixed, float(norm(there.cross(v) - cross)) / (radius * length))
    return hessian, mixed


def _upper_slope(at: Evaluation, x: Tensor, y: Tensor) -> Recorded:
    """The upper gradient in y with its graph."""
    at.counts["upper"] += 1
    xs, ys = _leaves(at.x, x, True), _leaves(at.y, y, True)
    with torch.enable_grad():
        value = at.objectives["upper"](xs, ys, at.batches["upper"])
        slope = at.y.join(_gradient(value, ys, create_graph=True))
    return Recorded(slope, ys, xs, True, at.counts)
