"""Cases of :func:`~difflayers.implicit.root_find`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError, SolveWarning
from difflayers.implicit import Bisection, Implicit, Neumann, Newton, Unrolled, root_find, root_find_ex
from difflayers.linalg import GMRES
from difflayers.testing._case import Hostile, LayerCase

from ._common import batch_shape, normal, numbers, per_element, unrolled_newton
from ._functions import UNROLLED, C, W, act, fsolve, function_case, wrong_calls


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


ROOT = (root_find, root_find_ex)
B = normal(11, 2, 3)
MILD = (0.3 * B, 0.3 * W)
A = numbers([-3.0, 0.5, 10.0])


def _root(name: str, solver: Any, starved: Any, **fields: Any) -> LayerCase:
    common: dict[str, Any] = {
        "oracle": per_element(fsolve(coupled, 3), (1, 2)),
        "invariants": (coupled,),
        "unrolled": unrolled_newton(coupled, 3, (1, 2)),
    }
    inputs = fields.pop("inputs", (B, W))
    return function_case(
        name, ROOT, coupled, inputs, ndims=(1, 2), event=(3,), solver=solver, starved=starved, **(common | fields)
    )


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
        per_element(fsolve(coupled, 3), (1, 2)),
        event_ndims=(1, 2),
        names=("args[0]['b']", "args[0]['W']"),
        exempt={"wrong_dtype_is_refused": "the case derives the start from the argument, so the start is named first"},
        unrolled=unrolled_newton(coupled, 3, (1, 2)),
        tolerant=run(root_find, on_failure="nan"),
        solution=run(root_find_ex),
        starved=run(root_find, solver=Newton(max_steps=1)),
        starved_solution=run(root_find_ex, solver=Newton(max_steps=1)),
    )


def _dependent(z: Tensor, b: Tensor) -> Tensor:
    total = (z - b).sum(-1, keepdim=True)
    return torch.cat([total, 2 * total, 3 * total], -1)


def _rootless(b: Tensor, W: Tensor) -> Tensor:
    return root_find(_no_root, b, (b, W))


def _no_root(z: Tensor, b: Tensor, W: Tensor) -> Tensor:
    return z.square() + 1 + 0 * (b + act(W, z))


ROOTS = (
    _root(
        "root_find Newton",
        Newton(),
        Newton(max_steps=1),
        representative=True,
        wrong=wrong_calls(root_find, "residual", lambda z, a: z - a),
        hostile=(
            Hostile("large", (1e4 * B, W)),
            Hostile("very large", (1e9 * B, W), may_fail=True),
            Hostile("huge", (1e80 * B, W), may_fail=True),
            Hostile("tiny", (1e-80 * B, W)),
            Hostile("zero", (0 * B, W)),
            Hostile("zero parameters", (B, 0 * W)),
            Hostile(
                "no root",
                (B, W),
                (SolveError, SolveWarning),
                "root_find .forward",
                lambda b, W: root_find(_no_root, b, (b, W)),
            ),
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
        function_case(
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
