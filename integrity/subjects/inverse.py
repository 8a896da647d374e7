"""Layers of inverse problems, against deepinv: regularised least squares and total variation."""

from typing import Any

import torch
from torch import Tensor

from integrity.harness import Calls, Contender, Inputs, Problem, Solve

ORDER = 60
OURS = "torch-difflayers"
DOUBLE = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def spoiled(inputs: Inputs) -> Inputs:
    first = inputs[0].clone()
    first.view(len(first), -1)[1, 0] = torch.nan
    return first, *inputs[1:]


def deepinv() -> Any:
    """The package; its import of torchvision fails where torch has no CUDA, for want of two names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        deepinv.declared = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as it is referred to
        for name in ("nms", "qnms"):
            deepinv.declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import deepinv as package

    return package


# ----------------------------------------------------------------------------------------- regularised least squares

MAP = normal(0, 5, 6)


def closed_form(y: Tensor, gamma: Tensor) -> Tensor:
    A = MAP.to(y)
    return torch.linalg.solve(A.mT @ A + torch.eye(6, dtype=y.dtype) / gamma, A.mT @ y + 1 / gamma)


def our_least_squares() -> Calls:
    from difflayers.proximal import data_consistency

    def call(policy: str, **options: Any) -> Solve:
        def solve(y: Tensor, gamma: Tensor) -> Tensor:
            ones = y.new_ones(*y.shape[:-1], 6)
            return data_consistency(lambda z, A: z @ A.mT, ones, y, gamma, params=(MAP.to(y),), on_failure=policy)

        return solve

    return Calls(call("raise"), bad=call("nan"), one=call("raise"))


def deepinv_least_squares(name: str) -> Calls:
    package = deepinv()
    function = getattr(package.optim.linear, name)

    def call(tol: float = 1e-14, steps: int = 100, eps: float = 1e-30) -> Solve:
        def solve(y: Tensor, gamma: Tensor) -> Tensor:
            A = MAP.to(y)
            physics = package.physics.LinearPhysics(A=lambda x, **_: x @ A.mT, A_adjoint=lambda y, **_: y @ A)
            given = (physics,) if name.endswith("backward") else (physics.A, physics.A_adjoint)
            z = y.new_ones(len(y), 6)
            return function(*given, y, z=z, gamma=gamma, tol=tol, max_iter=steps, eps=eps, verbose=True)

        return solve

    return Calls(call(), starved=call(steps=2), single=call(tol=1e-6))


def least_squares() -> tuple[Problem, list[Contender]]:
    inputs = (normal(1, 3, 5), torch.tensor(0.7, dtype=DOUBLE))
    problem = Problem(
        name="regularised-least-squares",
        text="The prox of a data term, `argmin_x ||A x - y||^2 + ||x - 1||^2 / gamma`: 3 measurements `y` of 5 "
        "numbers, 6 unknowns, a shared `gamma`.",
        inputs=inputs,
        shared=(False, True),
        reference=closed_form,
        bad=spoiled(inputs),
        bad_text="one measurement is NaN",
    )
    options = "z=ones, gamma=gamma, tol=1e-14, max_iter=100, eps=1e-30, verbose=True)"
    return problem, [
        Contender(
            "difflayers `data_consistency`",
            OURS,
            "difflayers.proximal.data_consistency(operator, ones, y, gamma, params=(A,))",
            our_least_squares,
            1e-10,
            missing={"starved": "a number of steps asks for the derivative of that iterate, by its documentation"},
        ),
        Contender(
            "deepinv `least_squares_implicit_backward`",
            "deepinv",
            "deepinv.optim.linear.least_squares_implicit_backward(physics, y, " + options,
            lambda: deepinv_least_squares("least_squares_implicit_backward"),
            1e-14,
            remarks={"second order": "documented as first order only"},
        ),
        Contender(
            "deepinv `least_squares`, unrolled",
            "deepinv",
            "deepinv.optim.linear.least_squares(physics.A, physics.A_adjoint, y, " + options,
            lambda: deepinv_least_squares("least_squares"),
            1e-14,
        ),
    ]


# ---------------------------------------------------------------------------------------------------- total variation

LEVELS = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.5], dtype=DOUBLE)
PIECES = ((0, 3, 1.0), (3, 7, -2.0), (7, 9, 1.0))  # a piece lower than its neighbours rises, one higher falls


def by_pieces(x: Tensor, t: Tensor) -> Tensor:
    """Columns of one pixel: means of the pieces, moved towards each other; the pieces are known and stay."""
    column = x[0, :, 0]
    means = [(column[i:j].mean() + sign * t / (j - i)).expand(j - i) for i, j, sign in PIECES]
    return torch.cat(means)[None, :, None]


def our_total_variation() -> Calls:
    from difflayers.proximal import DualGradient, TV2DInteriorPoint, prox_tv2d

    def call(policy: str, solver: Any) -> Solve:
        return lambda x, t: prox_tv2d(x, t, solver=solver, on_failure=policy)

    exact, few = TV2DInteriorPoint(), DualGradient(max_steps=1, check_every=1)
    return Calls(call("raise", exact), starved=call("raise", few), bad=call("nan", exact), one=call("raise", exact))


def deepinv_total_variation() -> Calls:
    prior = deepinv().optim.TVPrior

    def call(crit: float = 1e-10, steps: int = 3000) -> Solve:
        return lambda x, t: prior(def_crit=crit, n_it_max=steps).prox(x, gamma=t)

    return Calls(call(), starved=call(steps=5), single=call(crit=1e-6))


def total_variation() -> tuple[Problem, list[Contender]]:
    inputs = (LEVELS[None, None, :, None] + 0.05 * normal(2, 3, 1, 9, 1), torch.tensor(0.3, dtype=DOUBLE))
    problem = Problem(
        name="total-variation",
        text="The prox of total variation, `argmin_z ||z - x||^2 / 2 + t TV(z)`: 3 images of one column of 9 pixels "
        "with three levels, so that the pieces are known and the reference is a closed form; a shared `t`.",
        inputs=inputs,
        shared=(False, True),
        reference=by_pieces,
        bad=spoiled(inputs),
        bad_text="one pixel is NaN",
    )
    return problem, [
        Contender(
            "difflayers `prox_tv2d`",
            OURS,
            "difflayers.proximal.prox_tv2d(x, t)",
            our_total_variation,
            1e-10,
            remarks={"starved": "DualGradient; the default solver, an interior point, is right after one step here"},
        ),
        Contender(
            "deepinv `TVPrior.prox`",
            "deepinv",
            "deepinv.optim.TVPrior(def_crit=1e-10, n_it_max=3000).prox(x, gamma=t)",
            deepinv_total_variation,
            1e-10,
        ),
    ]


def subjects() -> list[tuple[Problem, list[Contender]]]:
    return [least_squares(), total_variation()]
