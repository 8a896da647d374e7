"""A learned proximal network, its prox and its prior: ours against the published recipe.

Both evaluate the same potential. "Prox" is the gradient of the potential, with the cotangents of its input and of the
parameters. "Prior" inverts the network and returns the value of the regulariser; a row of its own shows what ours takes
with the gradient, which the recipe does not have. The recipe inverts by SciPy's nonlinear conjugate gradients, one
sample at a time in float32, or by 2000 steps of Adam on the convex objective. (As published it then returns the prox
where the potential's value belongs; here it gets the right formula.) The reference is Newton's method in float64 with
dense Hessians.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Contender, Options, Result, run
from difflayers.proximal import InputConvexNetwork, LearnedProximal

SHAPES: dict[str, tuple[int, int | tuple[int, ...]]] = {
    "32 vectors of 64": (32, 64),
    "4 images of 14x14": (4, (1, 14, 14)),
}
TARGET = 1e-3


def published_prox(potential: nn.Module, y: Tensor) -> Tensor:
    """Turns gradients on at the caller's tensor, and always keeps a graph."""
    y.requires_grad_(True)
    return torch.autograd.grad(potential(y).sum(), y, create_graph=True)[0]


def prior_at(potential: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (x * y - x * x / 2).flatten(1).sum(-1) - potential(y)


def published_prior_by_cg(potential: nn.Module, x: Tensor) -> Tensor:
    from scipy.optimize import minimize

    def value_and_slope(y: np.ndarray, target: Tensor) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(y).to(target).view_as(target).requires_grad_()
        value = potential(point).sum() - (point * target).sum()
        (slope,) = torch.autograd.grad(value, point)
        return value.item(), slope.double().flatten().cpu().numpy()

    found = []
    for one in x.split(1):
        start = one.flatten().double().cpu().numpy()
        solved = minimize(value_and_slope, start, (one,), method="CG", jac=True, options={"gtol": 1e-5})
        found.append(torch.from_numpy(solved.x).to(x).view_as(one))
    with torch.no_grad():
        return prior_at(potential, x, torch.cat(found))


def published_prior_by_adam(potential: nn.Module, x: Tensor, steps: int = 2000) -> Tensor:
    y = torch.zeros_like(x).requires_grad_()
    optimiser = torch.optim.Adam([y], 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        (potential(y).sum() - (y * x).sum()).backward(inputs=[y])
        optimiser.step()
    with torch.no_grad():
        return prior_at(potential, x, y)


def newton(potential: nn.Module, x: Tensor, start: Tensor, steps: int = 4) -> Tensor:
    """The inverse in float64, from a point nearby."""

    def slope(y: Tensor) -> Tensor:
        return torch.func.grad(lambda y: potential(y.view(1, *x.shape[1:])).sum())(y)

    y = start.flatten(1)
    for _ in range(steps):
        moves = [torch.linalg.solve(torch.func.jacrev(slope)(p), slope(p) - q) for p, q in zip(y, x.flatten(1))]  # noqa: B905
        y = y - torch.stack(moves)
    return y.view_as(x).detach()


def evaluate(prox: Callable[[Tensor], Tensor], y: Tensor, g: Tensor, parameters: Iterable[Tensor]) -> Result:
    """The prox, and the cotangents of its input and of the parameters."""
    z = prox(y)
    return (z.detach(), *torch.autograd.grad(z, (y, *parameters), g))


def cases(options: Options) -> Iterator[Case]:
    for name, (batch, shape) in SHAPES.items():
        torch.manual_seed(0)
        potential = InputConvexNetwork(shape, hidden=32)
        exact = copy.deepcopy(potential).double()
        generator = torch.Generator().manual_seed(0)
        y, g = (torch.randn(batch, *potential.shape, generator=generator) for _ in range(2))
        wide = y.double().requires_grad_()
        x = published_prox(exact, wide).detach().float()
        reference = evaluate(partial(published_prox, exact), wide, g.double(), exact.parameters())
        source = newton(exact, x.double(), wide.detach())
        with torch.no_grad():
            prior = prior_at(exact, x.double(), source)

        potential, x, y, g = (a.to(options.device) for a in (potential, x, y, g))
        ours, weights = LearnedProximal(potential), list(potential.parameters())
        y.requires_grad_()
        ways = {"difflayers": ours, "published": partial(published_prox, potential)}
        jobs = {way: partial(evaluate, prox, y, g, weights) for way, prox in ways.items()}
        made = [Contender(way, job) for way, job in jobs.items()]
        yield Case(f"prox of {name}", made, [a.detach().to(options.device) for a in reference])

        jobs = {
            "difflayers": partial(ours_prior, ours, x),
            "published, conjugate gradients": partial(published_prior_by_cg, potential, x),
            "published, Adam": partial(published_prior_by_adam, potential, x),
        }
        made = [Contender(way, job) for way, job in jobs.items()]
        yield Case(f"prior of {name}", made, prior.to(options.device), target=TARGET)
        with_gradient = Contender("difflayers", partial(ours_prior_and_gradient, ours, x.clone().requires_grad_()))
        yield Case(f"prior and gradient of {name}", [with_gradient], [prior, source - x.double().cpu()], target=TARGET)


def ours_prior(prox: LearnedProximal, x: Tensor) -> Tensor:
    with torch.no_grad():
        return prox.prior(x)


def ours_prior_and_gradient(prox: LearnedProximal, x: Tensor) -> Result:
    R = prox.prior(x)
    return R.detach(), *torch.autograd.grad(R.sum(), x)


def main(options: Options) -> None:
    run("learned_proximal", list(cases(options)), options, memory=False)
