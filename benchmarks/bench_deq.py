"""A deep-equilibrium layer, forward and backward: ours against torchdeq and against unrolling.

Every contender finds `z = tanh(W z + x)` from zero and the cotangents of `W` and `x` for a given cotangent of `z`. Each
gets the loosest tolerance (one for forward and backward) with which its result, gradient included, has an error of at
most 1e-8 in float64 and 1e-4 in float32; the table tells which. torchdeq is also given the number of steps it turns out
to need as its limit, because it pads its traces up to the limit. The rows called "defaults" show what a user gets
without choosing anything.

The reference is Newton's method in float64 with a dense Jacobian of every batch element, and the implicit function
theorem with the same Jacobian.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchdeq import get_deq

from benchmarks.harness import AsLooseAs, Case, Contender, Options, Result, run
from difflayers.implicit import Anderson, Implicit, IterativeSolver, Picard, Unrolled, fixed_point
from difflayers.linalg import GMRES

SIZES = ((1, 10), (64, 256))
RADII = (0.5, 0.9)
DTYPES = (torch.float64, torch.float32)
TARGET = {torch.float64: 1e-8, torch.float32: 1e-4}
LADDER = {
    torch.float64: [10 ** (-k / 2) for k in range(15, 24)],
    torch.float32: [10 ** (-k / 2) for k in range(7, 14)],
}
STEPS = [k for scale in (10, 100) for k in range(scale, 10 * scale, scale // 5)]
LIMIT = 1000


def update(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.mT + x)


def make_data(batch: int, n: int, radius: float) -> tuple[Tensor, ...]:
    """Weights of the given spectral radius, and an input so small that the slope of tanh stays near 1."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    W *= radius / torch.linalg.eigvals(W).abs().max()
    x, g = torch.randn(2, batch, n, generator=generator, dtype=torch.float64)
    return torch.zeros_like(x), W, 0.1 * x, g


def reference(z: Tensor, W: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eye = torch.eye(W.shape[0], dtype=W.dtype)
    for _ in range(50):
        z = update(z, W, x)
    for _ in range(5):
        new = update(z, W, x)
        slope = (1 - new**2).unsqueeze(-1)
        z = z - torch.linalg.solve(eye - slope * W, z - new)
    slope = (1 - z**2).unsqueeze(-1)
    v = slope.squeeze(-1) * torch.linalg.solve((eye - slope * W).mT, g)
    return z, v.mT @ z, v


class Job:
    """One problem; makes the jobs of all contenders."""

    def __init__(self, z0: Tensor, W: Tensor, x: Tensor, g: Tensor) -> None:
        self.z0, self.g = z0, g
        self.W, self.x = W.clone().requires_grad_(), x.clone().requires_grad_()

    def finish(self, z: Tensor) -> Result:
        return (z.detach(), *torch.autograd.grad(z, (self.W, self.x), self.g))

    def ours(
        self, solver: IterativeSolver, adjoint: Implicit | Unrolled, on_failure: str = "raise"
    ) -> Callable[[], Result]:
        options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "on_failure": on_failure}
        return lambda: self.finish(fixed_point(update, self.z0, (self.W, self.x), **options))

    def torchdeq(self, **options: Any) -> Callable[[], Result]:
        deq = get_deq(**options)
        return lambda: self.finish(deq(lambda z: update(z, self.W, self.x), self.z0)[0][-1])

    def torchdeq_ift(self, solver: str, tolerance: float) -> Callable[[], Result]:
        options = {"ift": True, "f_solver": solver, "b_solver": solver, "f_tol": tolerance, "b_tol": tolerance}
        options |= {"f_stop_mode": "rel", "b_stop_mode": "rel"}
        deq = get_deq(**options, f_max_iter=LIMIT, b_max_iter=LIMIT)
        steps = []
        z, info = deq(lambda z: update(z, self.W, self.x), self.z0, backward_writer=steps.append)
        self.finish(z[-1])
        forward, backward = (int(i["nstep"].max()) + 1 for i in (info, steps[0]))
        return self.torchdeq(**options, f_max_iter=forward, b_max_iter=backward)

    def unrolled(self, tolerance: float) -> Callable[[], Result]:
        def job() -> Result:
            z = self.z0
            for _ in range(LIMIT):
                new = update(z, self.W, self.x)
                with torch.no_grad():
                    move, size = (torch.linalg.vector_norm(t, dim=-1) for t in (new - z, new))
                    done = (move <= tolerance * size).all()
                z = new
                if done.item():
                    break
            return self.finish(z)

        return job


def contenders(job: Job, exact: Result) -> Iterator[Contender]:
    dtype, n = job.z0.dtype, job.z0.shape[-1]

    def fitted(name: str, build: Callable[[Any], Callable[[], Result]], ladder: Any = LADDER[dtype]) -> Contender:
        fn = AsLooseAs(build, ladder, exact, TARGET[dtype], "tol" if ladder is LADDER[dtype] else "steps")
        return Contender(name, fn, settings=fn.settings)

    def adjoint(tolerance: float) -> Implicit:
        return Implicit() if n <= 64 else Implicit(GMRES(rtol=tolerance))

    yield fitted("difflayers Anderson", lambda tol: job.ours(Anderson(rtol=tol), adjoint(tol)))
    yield fitted("difflayers Picard", lambda tol: job.ours(Picard(rtol=tol), adjoint(tol)))
    yield Contender("difflayers defaults", job.ours(Anderson(), Implicit()))
    yield fitted("difflayers Picard, Unrolled", lambda k: job.ours(Picard(rtol=0.0), Unrolled(k), "ignore"), STEPS)
    yield fitted("torchdeq IFT, anderson", lambda tol: job.torchdeq_ift("anderson", tol))
    yield fitted("torchdeq IFT, fixed_point_iter", lambda tol: job.torchdeq_ift("fixed_point_iter", tol))
    yield Contender("torchdeq defaults, ift=True", job.torchdeq(ift=True))
    yield Contender("torchdeq defaults", job.torchdeq())
    yield fitted("hand-written loop, autograd", job.unrolled)


def cases(options: Options) -> list[Case]:
    made = []
    for batch, n in SIZES:
        for radius in RADII:
            for dtype in DTYPES:
                name = f"{batch}x{n} radius {radius} {str(dtype).removeprefix('torch.')}"
                if options.memory_of and options.memory_of[0] != name:
                    continue
                data = make_data(batch, n, radius)
                exact = tuple(t.to(options.device) for t in reference(*data))
                job = Job(*(t.to(options.device, dtype) for t in data))
                memory = (batch, radius, dtype) == (64, 0.9, torch.float64)
                made.append(Case(name, list(contenders(job, exact)), exact, memory, TARGET[dtype]))
    return made


def main(options: Options) -> None:
    run("deq", cases(options), options)
