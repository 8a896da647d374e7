"""Minimisers and fixed points by the implicit function theorem, against torchopt and torchdeq."""

import warnings
from typing import Any

import torch
from torch import Tensor

from integrity.harness import Calls, Contender, Inputs, Problem, Solve

ORDER = 40
OURS = "torch-difflayers"
DOUBLE = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def spoiled(inputs: Inputs) -> Inputs:
    first = inputs[0].clone()
    first[1, 0] = torch.nan
    return first, *inputs[1:]


# --------------------------------------------------------------------------------------------------------- minimiser

DESIGN = normal(0, 8, 4)


def closed_form(t: Tensor, penalty: Tensor) -> Tensor:
    A = DESIGN.to(t)
    return torch.linalg.solve(A.mT @ A + penalty.exp().diag(), A.mT @ t)


def slope(w: Tensor, t: Tensor, penalty: Tensor) -> Tensor:
    """Of the objective, for a batch."""
    A = DESIGN.to(w)
    return (w @ A.mT - t) @ A + penalty.exp() * w


def objective(w: Tensor, t: Tensor, penalty: Tensor) -> Tensor:
    return ((w @ DESIGN.to(w).mT - t).square().sum(-1) + (penalty.exp() * w.square()).sum(-1)) / 2


def our_argmin() -> Calls:
    from difflayers.implicit import LBFGS, Implicit, argmin
    from difflayers.linalg import CG

    def call(policy: str, **options: Any) -> Solve:
        def solve(t: Tensor, penalty: Tensor) -> Tensor:
            start = t.new_zeros(*t.shape[:-1], 4)
            return argmin(objective, start, (t, penalty), arg_ndims=(1, 1), on_failure=policy, **options)

        return solve

    short = {"solver": LBFGS(max_steps=2), "adjoint": Implicit(CG(max_steps=1))}
    return Calls(call("raise"), starved=call("raise", **short), bad=call("nan"), one=call("raise"))


def torchopt_root(linear_solve: str, **options: Any) -> Calls:
    """`custom_root` around a solver that is exact: what is asked for is torchopt's derivative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from torchopt import linear_solve as solvers
        from torchopt.diff.implicit import custom_root

    def call(**options: Any) -> Solve:
        @custom_root(slope, argnums=(1, 2), solve=getattr(solvers, linear_solve)(**options))
        def minimise(w: Tensor, t: Tensor, penalty: Tensor) -> Tensor:
            with torch.no_grad():
                A = DESIGN.to(t)
                return torch.linalg.solve(A.mT @ A + penalty.exp().diag(), (t @ A).mT).mT

        return lambda t, penalty: minimise(t.new_zeros(len(t), 4), t, penalty)

    starved = None if linear_solve == "solve_inv" else call(**{**options, "maxiter": 1})
    return Calls(call(**options), starved=starved)


def minimiser() -> tuple[Problem, list[Contender]]:
    inputs = (normal(1, 3, 8), normal(2, 4))
    problem = Problem(
        name="minimiser",
        text="A ridge regression as an inner problem, `argmin_w ||A w - t||^2 / 2 + sum exp(p) w^2 / 2`: 3 targets `t` "
        "of 8 samples, 4 weights, shared logarithms `p` of penalties. torchopt leaves the inner solver to its user, so "
        "it gets an exact one; what is starved there is the linear solve of its backward pass.",
        inputs=inputs,
        shared=(False, True),
        reference=closed_form,
        bad=spoiled(inputs),
        bad_text="one target is NaN",
    )
    root = "custom_root(slope, argnums=(1, 2), solve=torchopt.linear_solve.{})(minimise)"
    dense = {"starved": "a dense solve, without iterations"}
    return problem, [
        Contender(
            "difflayers `argmin`",
            OURS,
            "difflayers.implicit.argmin(objective, zeros, (t, p), arg_ndims=(1, 1))",
            our_argmin,
            1e-10,
        ),
        Contender(
            "torchopt `custom_root`, normal CG (its default)",
            "torchopt",
            root.format("solve_normal_cg(rtol=1e-14, maxiter=1000)"),
            lambda: torchopt_root("solve_normal_cg", rtol=1e-14, maxiter=1000),
            1e-14,
        ),
        Contender(
            "torchopt `custom_root`, CG",
            "torchopt",
            root.format("solve_cg(rtol=1e-14, maxiter=1000)"),
            lambda: torchopt_root("solve_cg", rtol=1e-14, maxiter=1000),
            1e-14,
        ),
        Contender(
            "torchopt `custom_root`, dense",
            "torchopt",
            root.format("solve_inv()"),
            lambda: torchopt_root("solve_inv"),
            0.0,
            missing=dense,
        ),
        Contender(
            "torchopt `custom_root`, 10 terms of Neumann's series (approximate)",
            "torchopt",
            root.format("solve_inv(ns=True, alpha=0.1)"),
            lambda: torchopt_root("solve_inv", ns=True, alpha=0.1),
            1e-14,
            missing={"starved": "the row itself is the series that ends early"},
            remarks={"first order": "documented as an approximation; 10 terms are its default"},
        ),
    ]


# ------------------------------------------------------------------------------------------------------- fixed point


def update(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return torch.tanh((W @ z[..., None])[..., 0] + x)


def iterated(x: Tensor, W: Tensor) -> Tensor:
    """A contraction by 0.6: 100 steps reach rounding, and so do their derivatives."""
    z = torch.zeros_like(x)
    for _ in range(100):
        z = update(z, x, W)
    return z


def our_fixed_point() -> Calls:
    from difflayers.implicit import Anderson, fixed_point

    def call(policy: str, **options: Any) -> Solve:
        def solve(x: Tensor, W: Tensor) -> Tensor:
            solver = Anderson(**options)
            return fixed_point(update, torch.zeros_like(x), (x, W), arg_ndims=(1, 2), solver=solver, on_failure=policy)

        return solve

    return Calls(call("raise"), starved=call("raise", max_steps=3), bad=call("nan"), one=call("raise"))


def torchdeq(**options: Any) -> Calls:
    """A call returns statistics, with the residual of every element: a user can look at it."""
    from torchdeq import get_deq

    def call(tolerance: float = 1e-14, steps: int = 500) -> Solve:
        limits = {"f_tol": tolerance, "b_tol": tolerance, "f_max_iter": steps, "b_max_iter": 500}
        deq = get_deq(**limits, **options)

        def solve(x: Tensor, W: Tensor) -> tuple[Tensor, str]:
            z, info = deq(lambda z: update(z, x, W), torch.zeros_like(x))
            left = info["abs_lowest"]
            missed = ~(left <= max(tolerance, 1e-12))
            return z[-1], f"abs_lowest = {float(left.max()):.1e}" if bool(missed.any()) else ""

        return solve

    return Calls(call(), starved=call(steps=3), single=call(1e-6))


def equilibrium() -> tuple[Problem, list[Contender]]:
    W = normal(4, 6, 6)
    inputs = (normal(3, 3, 6), 0.6 * W / torch.linalg.matrix_norm(W, 2))
    problem = Problem(
        name="equilibrium",
        text="A deep-equilibrium layer, `z = tanh(W z + x)`: 3 inputs of 6 numbers, shared weights of norm 0.6.",
        inputs=inputs,
        shared=(False, True),
        reference=iterated,
        bad=spoiled(inputs),
        bad_text="one input is NaN",
    )
    tight = "f_tol=1e-14, b_tol=1e-14, f_max_iter=500, b_max_iter=500"
    call = "torchdeq.get_deq({}, " + tight + ")(lambda z: update(z, x, W), zeros)[0][-1]"
    return problem, [
        Contender(
            "difflayers `fixed_point`",
            OURS,
            "difflayers.implicit.fixed_point(update, zeros, (x, W), arg_ndims=(1, 2))",
            our_fixed_point,
            1e-10,
        ),
        Contender("torchdeq, `ift=True`", "torchdeq", call.format("ift=True"), lambda: torchdeq(ift=True), 1e-14),
        Contender(
            "torchdeq, `hook_ift=True`",
            "torchdeq",
            call.format("hook_ift=True"),
            lambda: torchdeq(hook_ift=True),
            1e-14,
        ),
        Contender(
            "torchdeq, 100 steps unrolled (approximate)",
            "torchdeq",
            call.format("grad=100"),
            lambda: torchdeq(grad=100),
            1e-14,
        ),
        Contender(
            "torchdeq, the default of one step (approximate)",
            "torchdeq",
            call.format("grad=1"),
            lambda: torchdeq(),
            1e-14,
            remarks={"first order": "documented as the gradient of one step"},
        ),
    ]


def subjects() -> list[tuple[Problem, list[Contender]]]:
    return [minimiser(), equilibrium()]
