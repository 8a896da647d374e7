"""Cases of :mod:`difflayers.implicit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError, SolveWarning
from difflayers.implicit import (
    LBFGS,
    Anderson,
    Bisection,
    GaussNewton,
    Implicit,
    LevenbergMarquardt,
    Neumann,
    Newton,
    OneStep,
    Picard,
    Unrolled,
    argmin,
    argmin_ex,
    fixed_point,
    fixed_point_ex,
    nonlinear_least_squares,
    nonlinear_least_squares_ex,
    root_find,
    root_find_ex,
)
from difflayers.linalg import CG, GMRES
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import batch_shape, normal, numbers, per_element, unrolled_newton
from ._transport_plan import transport_plan, transport_plan_ex

__all__ = ["CASES"]


def act(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, batch dimensions broadcast."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def zeros(args: tuple[Tensor, ...], ndims: tuple[int, ...], event: tuple[int, ...], value: float = 0.0) -> Tensor:
    """A start for every element of the batch."""
    like = next((a for a in args if a.is_floating_point()), args[0])
    return like.new_full((*batch_shape(args, ndims), *event), value)


def _case(
    name: str,
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    *,
    ndims: tuple[int, ...],
    event: tuple[int, ...],
    solver: Any,
    starved: Any = None,
    start: float = 0.0,
    declared: bool = True,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> LayerCase:
    """A user's function solved by one of the engine's four functions."""
    plain, ex = pair
    event_options = {"event_ndim": len(event), "arg_ndims": ndims if declared else None, **(options or {})}

    def run(layer: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda *args: layer(function, zeros(args, ndims, event, start), args, **{**event_options, **more})

    def captured(t: Tensor) -> Tensor:
        rest = tuple(x[0] if x.ndim > k else x for x, k in zip(inputs[1:], ndims[1:], strict=True))
        rest = tuple(x.to(t) for x in rest)
        batch = zeros((t, *rest), ndims, event, start)
        more = {**event_options, "arg_ndims": ndims[1:] if declared else None}
        return plain(lambda z, *args: function(z, t, *args), batch.detach(), rest, solver=solver, **more)

    common: dict[str, Any] = {
        "layer": plain.__name__,
        "event_ndims": ndims,
        "names": tuple(f"args[{i}]" for i in range(len(inputs))),
        "tolerant": run(plain, solver=solver, on_failure="nan"),
        "solution": run(ex, solver=solver),
        "captured": captured,
        "source": "the implicit function theorem",
    }
    if starved is not None:
        common["starved"] = run(plain, solver=starved)
        common["starved_solution"] = run(ex, solver=starved)
    return LayerCase(name, run(plain, solver=solver), inputs, **(common | fields))


# ------------------------------------------------------------------------------------------------------------- roots


def coupled(z: Tensor, b: Tensor, W: Tensor) -> Tensor:
    """A monotone system with a full Jacobian."""
    return z + 0.2 * torch.tanh(act(W, z)) + z**3 - b


def depressed(y: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """One cubic equation an element."""
    return y**3 + c * y - a


def cardano(a: Tensor, c: Tensor) -> Tensor:
    """The real root in closed form (c > 0)."""
    root = (a.square() / 4 + c**3 / 27).sqrt()
    return (root + a / 2) ** (1 / 3) - (root - a / 2) ** (1 / 3)


def _fsolve(residual: Callable[..., Tensor], n: int, start: float = 0.0) -> Callable[..., np.ndarray]:
    def solve(*args: np.ndarray) -> np.ndarray:
        from scipy import optimize

        tensors = [torch.from_numpy(np.array(a)) for a in args]
        f = lambda z: residual(torch.from_numpy(z), *tensors).numpy()  # noqa: E731
        z = np.full(n, start)
        for _ in range(3):  # a restart gains the digits that one run leaves
            z = optimize.root(f, z, tol=1e-14).x
        return z

    return solve


ROOT = (root_find, root_find_ex)
B, W = normal(11, 2, 3), normal(12, 3, 3)
MILD = (0.3 * B, 0.3 * W)
UNROLLED = {
    "autocast_of_backward": "plain autograd through the steps: torch leaves backward under autocast to the user",
    "solves_are_traced": "there is no adjoint solve",
}
A = numbers([-3.0, 0.5, 10.0])
C = numbers(1.5)


def _root(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    common: dict[str, Any] = {
        "oracle": per_element(_fsolve(coupled, 3), (1, 2)),
        "invariants": (coupled,),
        "unrolled": unrolled_newton(coupled, 3, (1, 2)),
    }
    inputs = fields.pop("inputs", (B, W))
    return _case(
        name, ROOT, coupled, inputs, ndims=(1, 2), event=(3,), solver=solver, starved=starved, **(common | fields)
    )


def _wrong_calls(layer: Callable[..., Any], argument: str, good: Callable[..., Any]) -> tuple[Wrong, ...]:
    """Mistakes in a call, whatever the function."""
    three, two = normal(1, 3), normal(1, 2)
    return (
        Wrong("output of another shape", (three,), f"{argument} output: expected shape .* got", lambda a: layer(lambda z, a: z[..., :2], torch.zeros_like(a), (a,))),
        Wrong("output of another dtype", (three,), f"{argument} output: expected", lambda a: layer(lambda z, a: good(z, a).float(), torch.zeros_like(a), (a,))),
        Wrong("init of too few dimensions", (three,), "init: expected at least 2 dimensions", lambda a: layer(good, a, (a,), event_ndim=2)),
        Wrong("init that is no tensor", (three,), "init: expected a tensor", lambda a: layer(good, "start", (a,))),
        Wrong("args that are no tuple", (three,), "args: expected a tuple", lambda a: layer(good, a, a)),
        Wrong("batches that do not fit", (normal(1, 2, 3), normal(1, 4, 3)), "args.0.: expected batch dimensions", lambda z, a: layer(good, z, (a,), arg_ndims=(1,))),
        Wrong("too few dimensions", (three, two), "args.0.: expected at least 2 dimensions", lambda z, a: layer(good, z, (a,), arg_ndims=(2,))),
        Wrong("another policy", (three,), "on_failure: expected", lambda a: layer(good, a, (a,), on_failure="zero")),
        Wrong("integer init", (torch.ones(3, dtype=torch.int64, device="cpu"),), "init: expected a floating-point", lambda a: layer(good, a, ())),
    )  # fmt: skip


def pairs(z: dict[str, Tensor], b: Tensor, W: Tensor) -> dict[str, Tensor]:
    """The system of :func:`coupled`, its unknown a tree."""
    left = coupled(torch.cat([z["head"], z["tail"]], -1), b, W)
    return {"head": left[..., :1], "tail": left[..., 1:]}


def _tree_case() -> LayerCase:
    def run(layer: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        def fn(b: Tensor, W: Tensor) -> Any:
            start = {"head": torch.zeros_like(b[..., :1]), "tail": torch.zeros_like(b[..., 1:])}
            batch = batch_shape((b, W), (1, 2))
            start = {k: v.expand(*batch, v.shape[-1]) for k, v in start.items()}
            z = layer(lambda z, args: pairs(z, args["b"], args["W"]), start, ({"b": b, "W": W},), **more)
            if isinstance(z, dict):
                return torch.cat([z["head"], z["tail"]], -1)
            return type(z)(torch.cat([z.value["head"], z.value["tail"]], -1), z.status, z.steps, z.residual)

        return fn

    return LayerCase(
        "root_find trees",
        run(root_find),
        (B, W),
        per_element(_fsolve(coupled, 3), (1, 2)),
        event_ndims=(1, 2),
        names=("args[0]['b']", "args[0]['W']"),
        unrolled=unrolled_newton(coupled, 3, (1, 2)),
        tolerant=run(root_find, on_failure="nan"),
        solution=run(root_find_ex),
        starved=run(root_find, solver=Newton(max_steps=1)),
        starved_solution=run(root_find_ex, solver=Newton(max_steps=1)),
    )


def _dependent(z: Tensor, b: Tensor) -> Tensor:
    total = (z - b).sum(-1, keepdim=True)
    return torch.cat([total, 2 * total, 3 * total], -1)


def _no_root(z: Tensor, b: Tensor, W: Tensor) -> Tensor:
    return z.square() + 1 + 0 * (b + act(W, z))


ROOTS = (
    _root(
        "root_find Newton",
        Newton(),
        Newton(max_steps=1),
        representative=True,
        wrong=_wrong_calls(root_find, "residual", lambda z, a: z - a),
        hostile=(
            Hostile("large", (1e9 * B, W)),
            Hostile("huge", (1e80 * B, W), may_fail=True),
            Hostile("tiny", (1e-80 * B, W)),
            Hostile("zero", (0 * B, W)),
            Hostile("zero parameters", (B, 0 * W)),
            Hostile("no root", (B, W), SolveError, "DIVERGED", lambda b, W: root_find(_no_root, b, (b, W))),
            Hostile("dependent equations", (B, W), SolveError, "SINGULAR", lambda b, W: root_find(_dependent, b, (b,))),
        ),
    ),
    _root("root_find Newton, undeclared", Newton(), Newton(max_steps=1), declared=False),
    _root("root_find Newton, GMRES adjoint", Newton(), None, options={"adjoint": Implicit(GMRES())}),
    _root(
        "root_find Newton, GMRES everywhere, undeclared",
        Newton(linear_solver=GMRES()),
        None,
        declared=False,
        options={"adjoint": Implicit(GMRES())},
    ),
    _root("root_find Newton, Neumann adjoint", Newton(), None, inputs=MILD, options={"adjoint": Neumann(60)}),
    _root(
        "root_find Newton, unrolled",
        Newton(),
        None,
        inputs=MILD,
        options={"adjoint": Unrolled(8)},
        exempt=UNROLLED,
    ),
    _tree_case(),
    *(
        _case(
            f"root_find {type(solver).__name__}, one number{'' if declared else ', undeclared'}",
            ROOT,
            depressed,
            (A, C),
            ndims=(0, 0),
            event=(),
            solver=solver,
            starved=type(solver)(max_steps=1),
            start=1.0,
            declared=declared,
            oracle=per_element(lambda a, c: np.array(_real_root(a, c)), (0, 0)),
            invariants=(depressed,),
            unrolled=cardano,
            hostile=(Hostile("tie: inflection at the root", (0 * A, C)), Hostile("large", (1e12 * A, C))),
        )
        for solver, declared in ((Newton(), True), (Newton(), False), (Bisection(), True))
    ),
)


def _real_root(a: np.ndarray, c: np.ndarray) -> float:
    roots = np.roots([1.0, 0.0, float(c), -float(a)])
    return float(roots[np.argmin(np.abs(roots.imag))].real)


# ------------------------------------------------------------------------------------------------------ fixed points


def deq(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """A deep-equilibrium layer of one matrix."""
    return torch.tanh(act(W, z) + x)


def affine(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """A linear layer: its fixed point is a linear solve."""
    return act(W, z) + x


def cosine(z: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """``z = cos(a z) / c``."""
    return torch.cos(a * z) / c


def affine_solution(x: Tensor, W: Tensor) -> Tensor:
    """The fixed point of :func:`affine`."""
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return torch.linalg.solve(eye - W, x.unsqueeze(-1)).squeeze(-1)


def _minus(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, *args: z - update(z, *args)


def _bisect_cosine(a: np.ndarray, c: np.ndarray) -> np.ndarray:
    low, high = 0.0, float(np.pi / 2 / a)  # the update decreases there
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.cos(a * middle) / c > middle else (low, middle)
    return np.array((low + high) / 2)


FIXED = (fixed_point, fixed_point_ex)
X = normal(13, 2, 3)
CONTRACTION = 0.6 * W / torch.linalg.matrix_norm(W, 2)
SLOW = 0.95 * W / torch.linalg.eigvals(W).abs().max()
RATES = numbers([0.4, 0.9, 1.1])


def _fixed(name: str, update: Callable[..., Tensor], matrix: Tensor, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    linear = update is affine
    common: dict[str, Any] = {
        "invariants": (_minus(update),),
        "oracle": per_element(
            (lambda x, W: np.linalg.solve(np.eye(3) - W, x)) if linear else _fsolve(_minus(update), 3), (1, 2)
        ),
        "unrolled": affine_solution if linear else unrolled_newton(_minus(update), 3, (1, 2)),
    }
    return _case(
        name, FIXED, update, (X, matrix), ndims=(1, 2), event=(3,), solver=solver, starved=starved, **(common | fields)
    )


BIASED = "one step of the update stands for the whole: biased by design"
DERIVATIVES = (
    *("gradcheck", "gradcheck_full", "gradgradcheck", "implicit_equals_unrolled", "hessians_agree", "vmapped_hessian"),
)

FIXED_POINTS = (
    _fixed(
        "fixed_point Anderson",
        deq,
        CONTRACTION,
        Anderson(),
        Anderson(max_steps=1),
        representative=True,
        wrong=_wrong_calls(fixed_point, "update", lambda z, a: (z + a) / 3),
        hostile=(
            Hostile("huge input", (1e100 * X, CONTRACTION)),
            Hostile("tiny input", (1e-100 * X, CONTRACTION)),
            Hostile("zero input", (0 * X, CONTRACTION)),
            Hostile("zero matrix", (X, 0 * W)),
            Hostile("not a contraction", (X, 2 * SLOW), SolveError, "DIVERGED", lambda x, W: _picard(affine, x, W)),
            Hostile(
                "no fixed point", (X, 0 * W), SolveWarning, "stopped after", lambda x, W: fixed_point(_drift, x, (x,))
            ),
        ),
    ),
    _fixed("fixed_point Anderson, undeclared", deq, CONTRACTION, Anderson(), Anderson(max_steps=1), declared=False),
    _fixed("fixed_point Anderson, slow", affine, SLOW, Anderson(), Anderson(max_steps=1), oracle_tol=1e-7, tol=1e-7),
    _fixed("fixed_point Picard", affine, CONTRACTION, Picard(), Picard(max_steps=1)),
    _fixed("fixed_point Picard, damped", deq, CONTRACTION, Picard(damping=0.7), Picard(max_steps=1, damping=0.7)),
    _fixed("fixed_point Newton", deq, CONTRACTION, Newton(), Newton(max_steps=1)),
    _fixed("fixed_point GMRES adjoint", deq, CONTRACTION, Anderson(), None, options={"adjoint": Implicit(GMRES())}),
    _fixed(
        "fixed_point GMRES adjoint, undeclared",
        deq,
        CONTRACTION,
        Anderson(),
        None,
        declared=False,
        options={"adjoint": Implicit(GMRES())},
    ),
    _fixed("fixed_point Neumann", affine, CONTRACTION, Picard(), None, options={"adjoint": Neumann(80, step=1.0)}),
    _fixed("fixed_point unrolled", affine, CONTRACTION, Picard(), None, options={"adjoint": Unrolled(80)}, exempt=UNROLLED),
    _fixed(
        "fixed_point OneStep",
        deq,
        CONTRACTION,
        Anderson(),
        None,
        options={"adjoint": OneStep()},
        exempt=dict.fromkeys(DERIVATIVES, BIASED),
    ),
    _case(
        "fixed_point Anderson, one number",
        FIXED,
        cosine,
        (RATES, C),
        ndims=(0, 0),
        event=(),
        solver=Anderson(),
        starved=Anderson(max_steps=1),
        oracle=per_element(_bisect_cosine, (0, 0)),
        invariants=(_minus(cosine),),
        unrolled=lambda a, c: unrolled_newton(
            lambda z, a, c: _minus(cosine)(z, a.unsqueeze(-1), c.unsqueeze(-1)), 1, (0, 0), 0.5
        )(a, c).squeeze(-1),
    ),
)


def _picard(update: Callable[..., Tensor], x: Tensor, W: Tensor) -> Tensor:
    return fixed_point(update, torch.zeros_like(x), (x, W), solver=Picard(max_steps=5000))


def _drift(z: Tensor, x: Tensor) -> Tensor:
    return z + 1e-3 + 0 * x


# ---------------------------------------------------------------------------------------------------------- minimisers


def quartic(z: Tensor, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """A strictly convex objective with a full Hessian that is not constant."""
    return (
        (z - x).square().sum(-1) / 2
        + c * z.square().square().sum(-1) / 4
        + torch.nn.functional.softplus((w * z).sum(-1))
    )


def quartic_gradient(z: Tensor, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """Its gradient, by hand."""
    return z - x + c.unsqueeze(-1) * z**3 + w * torch.sigmoid((w * z).sum(-1, keepdim=True))


ARGMIN = (argmin, argmin_ex)
MINIMUM = (normal(14, 2, 3), normal(15, 3), numbers(0.7))


def _minimum(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    ndims = (1, 1, 0)
    common: dict[str, Any] = {
        "oracle": per_element(_fsolve(quartic_gradient, 3), ndims),
        "invariants": (quartic_gradient,),
        "unrolled": unrolled_newton(quartic_gradient, 3, ndims),
    }
    return _case(
        name, ARGMIN, quartic, MINIMUM, ndims=ndims, event=(3,), solver=solver, starved=starved, **(common | fields)
    )


def _wrong_objective() -> tuple[Wrong, ...]:
    whole = lambda a: argmin(lambda z, a: (z - a).square(), torch.zeros_like(a), (a,))  # noqa: E731
    return (Wrong("an objective without a sum", (normal(1, 3),), "objective output: expected shape .* got", whole),)


def _downhill(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return argmin(lambda z, x: -(z - x).square().sum(-1), torch.ones_like(x), (x,))


def _valley(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """A minimiser that is not unique: any value is fine, a derivative does not exist."""
    x = x.detach().clone().requires_grad_()
    z = argmin(lambda z, x: (z - x).sum(-1).square(), torch.zeros_like(x), (x,))
    return torch.autograd.grad(z.sum(), x)[0]


MINIMA = (
    _minimum(
        "argmin LBFGS",
        LBFGS(),
        LBFGS(max_steps=1),
        representative=True,
        wrong=_wrong_objective(),
        hostile=(
            Hostile("tiny", tuple(1e-60 * t for t in MINIMUM)),
            Hostile("zero", tuple(0 * t for t in MINIMUM)),
            Hostile("large", (1e6 * MINIMUM[0], MINIMUM[1], MINIMUM[2])),
            Hostile("unbounded below", MINIMUM, SolveError, "UNBOUNDED", _downhill),
            Hostile("a valley", MINIMUM, SolveError, "SINGULAR", _valley),
        ),
    ),
    _minimum("argmin LBFGS, undeclared", LBFGS(), LBFGS(max_steps=1), declared=False),
    _minimum("argmin LBFGS, CG adjoint", LBFGS(), None, options={"adjoint": Implicit(CG())}),
    _minimum("argmin LBFGS, CG adjoint, undeclared", LBFGS(), None, declared=False, options={"adjoint": Implicit(CG())}),
    _minimum("argmin LBFGS, GMRES adjoint", LBFGS(), None, options={"adjoint": Implicit(GMRES())}),
    _minimum("argmin Newton", Newton(), Newton(max_steps=1)),
)


# ------------------------------------------------------------------------------------------ nonlinear least squares


def fit(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A weighted fit of ``z0 exp(z1 t)`` at four times; its residual does not vanish."""
    t = torch.arange(4, dtype=z.dtype, device=z.device) / 3
    return w * (z[..., :1] * torch.exp(z[..., 1:] * t) - y)


def fit_gradient(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """``J^T r``, by hand."""
    t = torch.arange(4, dtype=z.dtype, device=z.device) / 3
    wave = torch.exp(z[..., 1:] * t)
    r = w.square() * (z[..., :1] * wave - y)
    return torch.stack([(wave * r).sum(-1), (z[..., :1] * t * wave * r).sum(-1)], -1)


def _scipy_fit(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    from scipy import optimize

    r = lambda z: fit(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(w)).numpy()  # noqa: E731
    z = optimize.least_squares(r, np.ones(2), xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    # the last digits, which a solver of least squares cannot see in its objective
    f = lambda z: fit_gradient(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(w)).numpy()  # noqa: E731
    return optimize.root(f, z, tol=1e-14).x


SQUARES = (nonlinear_least_squares, nonlinear_least_squares_ex)
DATA = (numbers([[1.0, 1.6, 1.9, 3.1], [2.0, 1.9, 1.2, 1.1], [1.0, 1.1, 1.7, 1.8]]), numbers([1.0, 0.8, 1.2, 0.9]))
GAUSS_NEWTON = "drops the curvature of the residual: biased where the residual is not zero"


def _fit(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    common: dict[str, Any] = {
        "oracle": per_element(_scipy_fit, (1, 1)),
        "invariants": (fit_gradient,),
        "unrolled": _fit_unrolled,
    }
    return _case(
        name,
        SQUARES,
        fit,
        DATA,
        ndims=(1, 1),
        event=(2,),
        start=1.0,
        solver=solver,
        starved=starved,
        **(common | fields),
    )


def _fit_unrolled(y: Tensor, w: Tensor) -> Tensor:
    """Newton on ``J^T r`` from the solution: three steps carry derivatives of any order that is asked for."""
    z = nonlinear_least_squares(fit, zeros((y, w), (1, 1), (2,), 1.0), (y.detach(), w.detach())).requires_grad_()
    with torch.enable_grad():
        for _ in range(3):
            r = fit_gradient(z, y, w)
            rows = [torch.autograd.grad(r[..., i].sum(), z, create_graph=True)[0] for i in range(2)]
            z = z - torch.linalg.solve(torch.stack(rows, -2), r)
    return z


FITS = (
    _fit(
        "nonlinear_least_squares LevenbergMarquardt",
        LevenbergMarquardt(),
        LevenbergMarquardt(max_steps=1),
        representative=True,
        hostile=(
            Hostile("residual zero", (2 * torch.exp(numbers([[0.0, 0.1, 0.2, 0.3]])), DATA[1])),
            Hostile("large", (1e6 * DATA[0], DATA[1]), may_fail=True),
            Hostile("small", (1e-6 * DATA[0], DATA[1])),
            Hostile("a weight of zero", (DATA[0], DATA[1] * numbers([1.0, 1.0, 0.0, 1.0]))),
            Hostile(
                "rank deficient",
                DATA,
                SolveError,
                "SINGULAR",
                lambda y, w: _flat_fit(y),
            ),
        ),
    ),
    _fit("nonlinear_least_squares undeclared", LevenbergMarquardt(), LevenbergMarquardt(max_steps=1), declared=False),
    _fit("nonlinear_least_squares CG adjoint", LevenbergMarquardt(), None, options={"adjoint": Implicit(CG())}),
    _fit(
        "nonlinear_least_squares GaussNewton",
        LevenbergMarquardt(),
        None,
        options={"curvature": GaussNewton()},
        exempt=dict.fromkeys(DERIVATIVES, GAUSS_NEWTON),
    ),
)


def _flat_fit(y: Tensor) -> Tensor:
    """Two unknowns of which only the sum matters: a value, but no derivative."""
    y = y.detach().clone().requires_grad_()
    start = y.new_ones(*y.shape[:-1], 2)
    z = nonlinear_least_squares(lambda z, y: z.sum(-1, keepdim=True) - y, start, (y,))
    return torch.autograd.grad(z.sum(), y)[0]


# --------------------------------------------------------------------------------------- a layer with its own adjoint


def _plan_by_scaling(cost: np.ndarray, a: np.ndarray, b: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Matrix scaling in plain numpy, far beyond convergence."""
    a, b = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
    K = np.exp(-cost / eps)
    v = np.ones_like(b)
    for _ in range(20000):
        u = a / (K @ v)
        v = b / (K.T @ u)
    return u[:, None] * K * v


def _plan_unrolled(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """Sinkhorn in the logarithm under autograd."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    S = -cost / eps[..., None, None]
    for _ in range(300):
        S = S - S.logsumexp(-1, keepdim=True) + log_a.unsqueeze(-1)
        S = S - S.logsumexp(-2, keepdim=True) + log_b.unsqueeze(-2)
    return S.exp()


def _sums_are_right(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    return torch.cat([plan.sum(-1) - a.softmax(-1), plan.sum(-2) - b.softmax(-1)], -1)


PLAN = (normal(17, 2, 2, 3).abs(), normal(18, 2), normal(19, 3), numbers(0.5))

PLANS = (
    LayerCase(
        "solution_map transport plan",
        transport_plan,
        PLAN,
        per_element(_plan_by_scaling, (2, 1, 1, 0)),
        (_sums_are_right,),
        (2, 1, 1, 0),
        names=("cost", "a", "b", "eps"),
        source="M. Cuturi, Sinkhorn distances, 2013; the pattern for authors of layers",
        representative=True,
        unrolled=_plan_unrolled,
        tolerant=partial(transport_plan, on_failure="nan"),
        solution=transport_plan_ex,
        starved=partial(transport_plan, max_steps=1),
        starved_solution=partial(transport_plan_ex, max_steps=1),
        hostile=(
            Hostile("cost zero: every plan entry a product", (0 * PLAN[0], *PLAN[1:])),
            Hostile("ties in the cost", (torch.ones_like(PLAN[0]), *PLAN[1:])),
            Hostile("one marginal almost empty", (PLAN[0], numbers([0.0, -40.0]), *PLAN[2:])),
            Hostile("cold", (*PLAN[:3], numbers(0.05)), may_fail=True),
        ),
        wrong=(
            Wrong("batches that do not fit", (PLAN[0], normal(1, 5, 2), *PLAN[2:]), "a: expected batch dimensions"),
            Wrong("cost without columns", (PLAN[0][0, 0], *PLAN[1:]), "cost: expected at least 2 dimensions"),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (*ROOTS, *FIXED_POINTS, *MINIMA, *FITS, *PLANS)
