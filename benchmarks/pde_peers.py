"""theseus, a library of differentiable nonlinear least squares, on our problems. `pip install theseus-ai` (0.2.3).

Its dependency scikit-sparse 0.5.0 is built from source with the headers of SuiteSparse. Where it is missing, theseus is
installed by `pip install --no-deps theseus-ai torchlie torchkin urdf_parser_py lxml`, and an empty module stands in:
the dense Cholesky solver, which small dense problems want, does not use it.

Its implicit mode differentiates one step of Gauss and Newton at the solution, so that its gradient lacks the curvature
of the residual.
"""

import sys
from collections.abc import Callable
from importlib import util
from types import ModuleType

import torch
from torch import Tensor

PACKAGE = "theseus-ai"
SOURCE = "theseus"  # the module's name


def available() -> bool:
    """Whether theseus can be used; says so where it cannot."""
    if util.find_spec(SOURCE) is None:
        print(f"theseus: left out, {PACKAGE} is not installed")
        return False
    if util.find_spec("sksparse") is None:
        stand_in = ModuleType("sksparse.cholmod")
        for name in ("Factor", "CholmodNotPositiveDefiniteError", "analyze_AAt", "cholesky_AAt"):
            setattr(stand_in, name, type(name, (Exception,), {}))
        sys.modules["sksparse"], sys.modules["sksparse.cholmod"] = ModuleType("sksparse"), stand_in
    try:
        import theseus  # noqa: F401
    except ImportError as error:
        print(f"theseus: left out, {error}")
        return False
    return True


def theseus_layer(
    residual: Callable[[Tensor, Tensor, Tensor], Tensor], B: Tensor, f: Tensor, rows: int, steps: int, mode: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Levenberg-Marquardt from zero on ``residual(w, B, f)`` of `rows` numbers; `mode` is its backward mode."""
    import theseus

    N, T, K = B.shape[-3:]
    kind = {"dtype": B.dtype}

    def error(optim_vars, aux_vars):
        (w,), (B, f) = optim_vars, aux_vars
        return residual(w.tensor, B.tensor.unflatten(-1, (N, T, K)), f.tensor)

    cost = theseus.AutoDiffCostFunction(
        [theseus.Vector(K, name="w", **kind)],
        error,
        rows,
        cost_weight=theseus.ScaleCostWeight(torch.ones(1, 1, **kind)),
        aux_vars=[theseus.Variable(B.flatten(1), name="B"), theseus.Variable(f, name="f")],
        autograd_mode="vmap",
    )
    objective = theseus.Objective(**kind)
    objective.add(cost)
    optimizer = theseus.LevenbergMarquardt(
        objective,
        linear_solver_cls=theseus.CholeskyDenseSolver,
        max_iterations=steps,
        step_size=1.0,
        abs_err_tolerance=0.0,
        rel_err_tolerance=0.0,
    )
    layer = theseus.TheseusLayer(optimizer)
    options = {"damping": 1e-3, "adaptive_damping": True, "backward_mode": mode}

    def solve(B: Tensor, f: Tensor) -> Tensor:
        start = {"w": B.new_zeros(B.shape[0], K), "B": B.flatten(1), "f": f}
        return layer.forward(start, optimizer_kwargs=options)[0]["w"]

    return solve
