"""Cases of :func:`~difflayers.implicit.fixed_point`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._solution import Solution, SolveError, SolveWarning
from difflayers.implicit import (
    Anderson,
    FixedPoint,
    Implicit,
    Neumann,
    Newton,
    OneStep,
    Picard,
    Unrolled,
    fixed_point,
    fixed_point_ex,
)
from difflayers.linalg import GMRES
from difflayers.testing._case import Hostile, LayerCase

from ._common import normal, numbers, per_element, unrolled_newton
from ._functions import DERIVATIVES, UNROLLED, C, W, act, fsolve, function_case, wrong_calls


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


def _fixed(
    name: str, update: Callable[..., Tensor], matrix: Tensor, solver: Any, starved: Any, **fields: Any
) -> LayerCase:
    linear = update is affine
    common: dict[str, Any] = {
        "invariants": (_minus(update),),
        "oracle": per_element(
            (lambda x, W: np.linalg.solve(np.eye(3) - W, x)) if linear else fsolve(_minus(update), 3), (1, 2)
        ),
        "unrolled": affine_solution if linear else unrolled_newton(_minus(update), 3, (1, 2)),
    }
    return function_case(
        name, FIXED, update, (X, matrix), ndims=(1, 2), event=(3,), solver=solver, starved=starved, **(common | fields)
    )


BIASED = "one step of the update stands for the whole: biased by design"

FIXED_POINTS = (
    _fixed(
        "fixed_point Anderson",
        deq,
        CONTRACTION,
        Anderson(),
        Anderson(max_steps=1),
        representative=True,
        wrong=wrong_calls(fixed_point, "update", lambda z, a: (z + a) / 3),
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
    _fixed(
        "fixed_point unrolled",
        affine,
        CONTRACTION,
        Picard(rtol=1e-15),
        None,
        options={"adjoint": Unrolled(80)},
        exempt=UNROLLED,
    ),
    _fixed(
        "fixed_point OneStep",
        deq,
        CONTRACTION,
        Anderson(),
        None,
        options={"adjoint": OneStep()},
        exempt=dict.fromkeys(DERIVATIVES, BIASED),
    ),
    function_case(
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


# -------------------------------------------------------------------------------------------------------- the module


class Cell(nn.Module):
    """The update of :func:`deq` with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            self.linear.weight.copy_(CONTRACTION)
            self.linear.bias.copy_(normal(16, 3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application."""
        return torch.tanh(self.linear(z) + x)


def make_layer(**options: Any) -> FixedPoint:
    """A deep-equilibrium layer with fixed numbers."""
    return FixedPoint(Cell(), **options)


class _Ex(nn.Module):
    """Lets ``functional_call`` reach ``forward_ex``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = make_layer(**options)

    def forward(self, x: Tensor) -> Solution[Tensor]:
        """The unchecked solution."""
        return self.layer.forward_ex(x)


def _called_ex(**options: Any) -> Callable[..., Solution[Tensor]]:
    layer = _Ex(**options)

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Solution[Tensor]:
        return functional_call(layer, {"layer.module.linear.weight": weight, "layer.module.linear.bias": bias}, (x,))

    return fn


def _called(**options: Any) -> Callable[..., Tensor]:
    layer = make_layer(**options)

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"module.linear.weight": weight, "module.linear.bias": bias}, (x,))

    return fn


def _cell(z: Tensor, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(act(W, z) + b + x)


MODULES = (
    LayerCase(
        "FixedPoint",
        _called(),
        (X, CONTRACTION, normal(16, 3)),
        per_element(fsolve(_minus(_cell), 3), (1, 2, 1)),
        (_minus(_cell),),
        (1, 2, 1),
        source="S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models, 2019",
        representative=True,
        unrolled=unrolled_newton(_minus(_cell), 3, (1, 2, 1)),
        tolerant=_called(on_failure="nan"),
        starved=_called(solver=Anderson(max_steps=1)),
        solution=_called_ex(),
        starved_solution=_called_ex(solver=Anderson(max_steps=1)),
        make_module=make_layer,
        module_inputs=(X,),
    ),
)
