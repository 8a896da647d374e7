"""Two methods written by hand from the parts of the library: solve, differentiate, step."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from difflayers.bilevel import ArgminLayer, Bilevel, hypergradient
from difflayers.implicit import LBFGS, Implicit
from difflayers.linalg import CG


class ImplicitGradient:
    """The lower problem solved by L-BFGS, the adjoint system by CG, both from where the last step left them."""

    def __init__(self, problem: Bilevel, x: Tensor, y: Tensor, *, step: float, rtol: float) -> None:
        self.problem, self.x, self.y, self.q = problem, x, y, None
        self.step_length, self.adjoint = step, Implicit(CG(rtol=rtol))
        self.counts: Counter[str] = Counter()

        def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
            self.counts["lower"] += 1
            return problem.lower(x, y, batch)

        self.solve = ArgminLayer(Bilevel(problem.upper, lower), solver=LBFGS())

    def step(self, upper_batch: Any, lower_batch: Any) -> None:
        with torch.no_grad():
            self.y = self.solve(self.x, lower_batch, init=self.y)
        found = hypergradient(
            self.problem, self.x, self.y, (upper_batch, lower_batch), init=self.q, adjoint=self.adjoint
        )
        self.q = found.adjoint
        self.x = self.x - self.step_length * found.grad
        self.counts.update(upper=1, lower=1, hvp=found.products, cross=1)


class Unrolling:
    """Gradient steps on the lower problem from where the last ones ended, and autograd through all of them."""

    def __init__(
        self, problem: Bilevel, x: Tensor, y: Tensor, *, step: float, step_lower: float, inner_steps: int
    ) -> None:
        self.problem, self.x, self.y = problem, x, y
        self.step_length, self.step_lower, self.inner_steps = step, step_lower, inner_steps
        self.counts: Counter[str] = Counter()

    def step(self, upper_batch: Any, lower_batch: Any) -> None:
        x, y = self.x.detach().requires_grad_(), self.y.detach().requires_grad_()
        for _ in range(self.inner_steps):
            value = self.problem.lower(x, y, lower_batch)
            y = y - self.step_lower * torch.autograd.grad(value, y, create_graph=True)[0]
        (slope,) = torch.autograd.grad(self.problem.upper(x, y, upper_batch), x)
        self.x, self.y = self.x - self.step_length * slope, y.detach()
        self.counts.update(upper=1, lower=self.inner_steps, hvp=self.inner_steps, cross=self.inner_steps)
