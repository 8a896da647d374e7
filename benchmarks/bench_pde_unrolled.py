"""Differentiating through the steps of the solver against the implicit function theorem: time and memory.

Both run the stated number of steps on the problem of `bench_pde_constraint`, smaller; autograd records those of the
unrolled layer. Ours stops where it has converged, so that it starts from a point from which it needs more steps, too,
and its memory is seen not to grow with them. Errors are those of coefficients and gradients.
"""

import warnings

import torch
from torch import Tensor

from benchmarks.bench_pde_constraint import RIDGE, VISCOSITY, burgers, exact, naive, problem
from benchmarks.harness import Case, Contender, Options, run
from difflayers.pde import residual_least_squares, residual_least_squares_ex

SIZE = (4, 500, 16)
STEPS = (4, 8, 16)
FAR = (0.01, 1.0, 3.0)  # distances of the starts from the solution


def cases(options: Options) -> list[Case]:
    B, f, g = problem(options.device, SIZE)
    nu = B.new_full((1,), VISCOSITY)
    reference = exact(B, f, g)
    w = reference[0]

    def both(solve):
        leaves = [t.clone().requires_grad_() for t in (B, f)]

        def job() -> tuple[Tensor, ...]:
            out = solve(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        return job

    def implicit(init: Tensor) -> Contender:
        found = residual_least_squares_ex(B, burgers, (f, nu), ridge=RIDGE, init=init)
        steps = int(found.steps.max())
        solve = lambda B, f: residual_least_squares(B, burgers, (f, nu), ridge=RIDGE, init=init)  # noqa: E731
        return Contender(f"implicit, {steps} steps", both(solve), settings=lambda: f"steps {steps}")

    def unrolled(steps: int) -> Contender:
        solve = naive(steps)
        return Contender(f"unrolled, {steps} steps", both(lambda B, f: solve(B, f, nu)))

    direction = torch.randn(SIZE[0], SIZE[2], generator=torch.Generator().manual_seed(7), dtype=B.dtype).to(B.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = {c.name: c for c in (implicit(w + far * direction) for far in FAR)}
    return [Case("forward and backward", [*ours.values(), *map(unrolled, STEPS)], reference)]


def main(options: Options) -> None:
    run("pde_unrolled", cases(options), options)
