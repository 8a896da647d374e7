"""Memory of a fixed point, forward and backward, after 10 and after 1000 solver steps: ours against unrolling.

The update `tanh(W z + b)` contracts so well that ten steps solve it; a tolerance of zero lets the solver run on. So
the gradient is the same in all rows, and what differs is what was kept for it.
"""

from collections.abc import Callable

import torch

from benchmarks.bench_overhead import fixed_point_reference, make_data, tanh, tanh_slope
from benchmarks.harness import Case, Contender, Options, Result, run
from difflayers.implicit import Implicit, Picard, Unrolled, fixed_point

STEPS = (10, 1000)


def cases(options: Options) -> list[Case]:
    z0, W, b, g = data = make_data(16, 256, torch.float64, options.device)
    W_, b_ = (t.clone().requires_grad_() for t in (W, b))

    def ours(steps: int, adjoint: Implicit | Unrolled) -> Callable[[], Result]:
        def job() -> Result:
            solver = Picard(rtol=0.0, max_steps=steps, check_every=None)
            z = fixed_point(tanh, z0, (W_, b_), solver=solver, adjoint=adjoint, on_failure="ignore")
            return (z.detach(), *torch.autograd.grad(z, (W_, b_), g))

        return job

    def by_hand(steps: int) -> Callable[[], Result]:
        def job() -> Result:
            z = z0
            for _ in range(steps):
                z = tanh(z, W_, b_)
            return (z.detach(), *torch.autograd.grad(z, (W_, b_), g))

        return job

    exact = fixed_point_reference(tanh, tanh_slope, data)
    made = []
    for k in STEPS:
        ways = {
            "difflayers Implicit": ours(k, Implicit()),
            "difflayers Unrolled": ours(k, Unrolled(k)),
            "hand-written loop, autograd": by_hand(k),
        }
        made.append(Case(f"16x256 float64, {k} steps", [Contender(name, fn) for name, fn in ways.items()], exact))
    return made


def main(options: Options) -> None:
    run("memory", cases(options), options)
