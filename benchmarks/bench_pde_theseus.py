"""A nonlinear PDE constraint against theseus, at equal accuracy of the coefficients, and the gradients of both.

The problem of `bench_pde_constraint`, smaller. theseus takes the fewest steps of a ladder that bring the coefficients
to an error of 1e-6. The gradient is compared with the exact one: that of theseus' implicit mode comes from a step of
Gauss and Newton, so that its error does not vanish where the residual does not; its unrolled mode costs memory for all
steps.
"""

import torch
from torch import Tensor

from benchmarks import pde_peers
from benchmarks.bench_pde_constraint import RIDGE, VISCOSITY, biased, burgers, exact, ours, problem
from benchmarks.harness import AsLooseAs, Case, Contender, Options, run

SIZE = (4, 400, 24)
TARGET = 1e-6
STEPS = (4, 6, 8, 10, 15, 20)


def cases(options: Options) -> list[Case]:
    B, f, g = problem(options.device, SIZE)
    nu = B.new_full((1,), VISCOSITY)
    w, grad_B, grad_f = exact(B, f, g)

    def residual(w: Tensor, B: Tensor, f: Tensor) -> Tensor:
        terms = torch.einsum("...ntk,...k->...nt", B, w)
        return torch.cat([burgers(terms, (f, nu)), RIDGE**0.5 * w], -1)

    def forward(solve):
        def job() -> Tensor:
            with torch.no_grad():
                return solve(B, f)

        return job

    def both(solve):
        leaves = [t.clone().requires_grad_() for t in (B, f)]

        def job() -> tuple[Tensor, ...]:
            out = solve(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        return job

    mine = lambda B, f: ours(B, f, nu)  # noqa: E731
    without_curvature = lambda B, f: biased(B, f, nu)  # noqa: E731
    plain = [Contender("difflayers.pde.residual_least_squares", forward(mine))]
    full = [
        Contender("difflayers.pde.residual_least_squares", both(mine)),
        Contender("difflayers, Gauss-Newton adjoint (biased)", both(without_curvature)),
    ]
    if pde_peers.available():
        rows = SIZE[1] + SIZE[2]
        peer = lambda steps, mode: pde_peers.theseus_layer(residual, B, f, rows, steps, mode)  # noqa: E731
        ladder = AsLooseAs(lambda n: forward(peer(n, "unroll")), STEPS, w, TARGET, "steps")
        ladder()
        steps = int(ladder.settings().split()[1].rstrip(",;")) if ladder.settings() else STEPS[-1]
        plain.append(Contender("theseus", ladder, settings=ladder.settings))
        for mode in ("implicit", "unroll"):
            told = lambda: f"steps {steps}"  # noqa: E731
            full.append(Contender(f"theseus, {mode}", both(peer(steps, mode)), settings=told))
    return [
        Case("forward", plain, w, memory=False, target=TARGET),
        Case("forward and backward", full, (w, grad_B, grad_f)),
    ]


def main(options: Options) -> None:
    run("pde_theseus", cases(options), options)
