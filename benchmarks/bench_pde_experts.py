"""One global constraint against 4 and 8 experts on one device, forward and backward.

All fit the same field equation with the same number of points in all. Experts either share a total number of basis
functions, or each have as many as the global solve. The page on experts says that they are not cheaper on one device at
equal rows; the cost of a solve is about `rows * K^2`, so that it is the basis functions of each expert that decide. The
problems differ, so each contender is compared with a reference of its own.
"""

import torch
from torch import Tensor

from benchmarks.bench_pde_constraint import VISCOSITY, exact, ours, problem
from benchmarks.harness import Case, Contender, Options, run

ROWS, BASIS = 4000, 32
EXPERTS = (1, 4, 8)


def cases(options: Options) -> list[Case]:
    def contender(experts: int, basis: int) -> Contender:
        B, f, g = problem(options.device, (experts, ROWS // experts, basis))
        nu = B.new_full((1,), VISCOSITY)
        leaves = [t.requires_grad_() for t in (B, f)]

        def job() -> tuple[Tensor, ...]:
            out = ours(*leaves, nu)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        name = "one global solve" if experts == 1 else f"{experts} experts"
        told = lambda: f"{ROWS // experts} rows and {basis} functions each"  # noqa: E731
        return Contender(name, job, exact(B.detach(), f.detach(), g), told)

    equal = [contender(e, BASIS) for e in EXPERTS]
    total = [contender(e, BASIS // e) for e in EXPERTS]
    nothing = torch.zeros((), device=options.device)  # each contender brings its own reference
    return [Case("equal functions each", equal, nothing), Case("equal functions in all", total, nothing)]


def main(options: Options) -> None:
    run("pde_experts", cases(options), options)
