"""Hypergradients at a given lower solution: ours against CG written by hand in plain torch, torchopt, BOAT and betty.

Two lower problems: logistic regression with one weight decay per feature (d = 1,000, n = 2,000), and a network with
100,000 weights that are pulled to their start, as in meta-learning, with one strength per tensor. The upper loss is
that of validation data. Everyone gets the solution of the lower problem; what is timed is one hypergradient, from both
losses to the gradient of the hyperparameters. The linear solver of everyone gets the loosest tolerance whose result has
an error of at most 1e-8.

The loop by hand is what one writes who knows how: one graph of the lower gradient for all products, and nothing
checked. Normal equations, torchopt's way out for matrices that are not definite, take two products a step and square
the condition number. The reference of logistic regression is a dense solve; that of the network CG by hand at a
relative tolerance of 1e-13.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchopt
from torch import Tensor, nn
from torchopt.diff.implicit import custom_root

from benchmarks import bilevel_peers
from benchmarks.harness import AsLooseAs, Case, Contender, Options, run
from difflayers.bilevel import Bilevel, hypergradient
from difflayers.implicit import Implicit
from difflayers.linalg import CG

LADDER = tuple(10.0**-k for k in range(2, 14))
TARGET = 1e-8
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Losses of flat vectors: logarithms of penalties x, weights y."""

    upper: Loss
    lower: Loss
    x: Tensor
    y: Tensor

    def ours(self, rtol: float) -> Callable[[], Tensor]:
        problem = Bilevel(lambda x, y, batch: self.upper(x, y), lambda x, y, batch: self.lower(x, y))
        adjoint = Implicit(CG(rtol=rtol))
        return lambda: hypergradient(problem, self.x, self.y, adjoint=adjoint).grad

    def by_hand(self, rtol: float) -> Callable[[], Tensor]:
        def job() -> Tensor:
            x, y = self.x.detach().requires_grad_(), self.y.detach().requires_grad_()
            fx, b = torch.autograd.grad(self.upper(x, y), (x, y), allow_unused=True, materialize_grads=True)
            (g,) = torch.autograd.grad(self.lower(x, y), y, create_graph=True)
            q, r = torch.zeros_like(b), b.clone()
            p, rr = r.clone(), r @ r
            stop = rtol * rtol * rr
            while rr > stop:
                (Hp,) = torch.autograd.grad(g, y, p, retain_graph=True)
                alpha = rr / (p @ Hp)
                q += alpha * p
                r -= alpha * Hp
                rr, before = r @ r, rr
                p = r + (rr / before) * p
            (Jq,) = torch.autograd.grad(g, x, q)
            return fx - Jq

        return job

    def on_the_map(self, rtol: float) -> Callable[[], Tensor]:
        def job() -> Tensor:
            x, y = self.x.detach().requires_grad_(), self.y.detach().requires_grad_()
            fx, b = torch.autograd.grad(self.upper(x, y), (x, y), allow_unused=True, materialize_grads=True)
            (g,) = torch.autograd.grad(self.lower(x, y), y, create_graph=True)
            mapped = y - g
            v, r = torch.zeros_like(b), b
            p, rr = r, r @ r
            stop = rtol * rtol * rr
            while rr > stop:
                Ap = p - torch.autograd.grad(mapped, y, p, retain_graph=True)[0]
                alpha = rr / (p @ Ap)
                v, r = v + alpha * p, r - alpha * Ap
                rr, before = r @ r, rr
                p = r + (rr / before) * p
            return fx + torch.autograd.grad(mapped, x, v)[0]

        return job

    def torchopt(self, solve: Callable[..., Callable[..., object]], rtol: float) -> Callable[[], Tensor]:
        optimality = torch.func.grad(lambda y, x: self.lower(x, y))

        def job() -> Tensor:
            @custom_root(optimality, argnums=1, solve=solve(rtol=rtol, atol=0.0, maxiter=2000))
            def solution(start: Tensor, x: Tensor) -> Tensor:
                return start

            x = self.x.detach().requires_grad_()
            return torch.autograd.grad(self.upper(x, solution(self.y, x)), x)[0]

        return job

    def curvature(self) -> float:
        """The largest eigenvalue of H, by power iteration."""
        y = self.y.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.lower(self.x, y), y, create_graph=True)
        v = numbers(7, y.numel(), device=str(y.device))
        for _ in range(100):
            v = v / v.norm()
            (v,) = torch.autograd.grad(g, y, v, retain_graph=True)
        return float(v.norm())

    def dense(self) -> Tensor:
        fx, b = torch.func.grad(self.upper, (0, 1))(self.x, self.y)
        H = torch.func.hessian(self.lower, 1)(self.x, self.y)
        _, pull = torch.func.vjp(lambda x: torch.func.grad(self.lower, 1)(x, self.y), self.x)
        return fx - pull(torch.linalg.solve(H, b))[0]


def numbers(seed: int, *shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def logistic(d: int, n: int, device: str) -> Problem:
    weights = numbers(0, d, device=device) / d**0.5
    X, V = numbers(1, n, d, device=device), numbers(2, n // 2, d, device=device)
    t, v = (X @ weights).sign(), (V @ weights).sign()
    x = -2 + numbers(3, d, device=device) / 2

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(-v * (V @ y)).mean()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(-t * (X @ y)).mean() + (x.exp() * y.square()).sum() / 2

    y = torch.zeros_like(x)
    for _ in range(12):  # Newton, by formula
        s = torch.sigmoid(-t * (X @ y))
        g = -X.mT @ (t * s) / n + x.exp() * y
        y = y - torch.linalg.solve((X.mT * (s * (1 - s) / n)) @ X + torch.diag(x.exp()), g)
    return Problem(upper, lower, x, y)


def network(device: str, hidden: int = 1330, samples: int = 300) -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double().to(device)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    sizes = [p.numel() for p in net.parameters()]
    X, V = numbers(4, samples, 64, device=device), numbers(5, samples, 64, device=device)
    teacher = numbers(6, 64, 10, device=device)
    t, v = (X @ teacher).argmax(-1), (V @ teacher).argmax(-1)

    def tree(y: Tensor) -> dict[str, Tensor]:
        return {name: part.reshape(shape) for part, (name, shape) in zip(y.split(sizes), shapes.items(), strict=True)}

    def loss(y: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net, tree(y), (inputs,)), labels)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        pull = sum(a.exp() * part.square().sum() for a, part in zip(x, (y - start).split(sizes), strict=True))
        return loss(y, X, t) + pull / 2

    x = torch.full((4,), -2.0, dtype=torch.float64, device=device)
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    y = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([y], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = lower(x, y)
        value.backward()
        return value

    optimiser.step(closure)
    return Problem(lambda x, y: loss(y, V, v), lower, x, y.detach())


def case(name: str, problem: Problem, expected: Tensor) -> Case:
    def fitted(name: str, build: Callable[[float], Callable[[], Tensor]]) -> Contender:
        fn = AsLooseAs(build, LADDER, expected, TARGET, "rtol")
        return Contender(name, fn, settings=fn.settings)

    solvers = torchopt.linear_solve
    contenders = [
        fitted("difflayers.bilevel.hypergradient", problem.ours),
        fitted("CG by hand, plain torch", problem.by_hand),
        fitted("torchopt custom_root, CG", lambda rtol: problem.torchopt(solvers.solve_cg, rtol)),
        fitted("torchopt custom_root, normal CG", lambda rtol: problem.torchopt(solvers.solve_normal_cg, rtol)),
        fitted("CG on the gradient step, plain torch", problem.on_the_map),
    ]
    losses = (problem.upper, problem.lower, problem.x, problem.y)
    if bilevel_peers.available("boat_torch"):
        build = lambda tolerance: bilevel_peers.boat_cg(*losses, tolerance=tolerance)  # noqa: E731
        fn = AsLooseAs(build, LADDER, expected, TARGET, "tolerance")
        contenders.append(Contender("BOAT, CG", fn, settings=fn.settings))
    if bilevel_peers.available("betty"):
        build = lambda n: bilevel_peers.betty_cg(*losses, iterations=n)  # noqa: E731
        fn = AsLooseAs(build, (1, 2, 5, 10, 20, 50, 100), expected, TARGET, "iterations")
        contenders.append(Contender("betty, CG", fn, settings=fn.settings))
        step = 1 / problem.curvature()
        build = lambda n: bilevel_peers.betty_neumann(*losses, iterations=n, step=step)  # noqa: E731
        fn = AsLooseAs(build, (20, 50, 100, 200, 500, 1000, 2000), expected, TARGET, "iterations")
        contenders.append(Contender("betty, Neumann", fn, settings=fn.settings))
    return Case(name, contenders, expected, target=TARGET)


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regression, net = logistic(1000, 2000, options.device), network(options.device)
        cases = [
            case("logistic regression, d = 1,000, n = 2,000", regression, regression.dense()),
            case(f"network of {net.y.numel():,} weights", net, net.by_hand(1e-13)()),
        ]
        run("hypergradient", cases, options)
