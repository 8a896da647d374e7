"""What every process computes for test_distributed.py: hypergradients and the layer; see tests/processes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # as DistributedDataParallel does: once, before the processes part
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from difflayers.bilevel import MFAC, ArgminLayer, FiniteDifference, hypergradient
from difflayers.implicit import LBFGS, Implicit, Neumann, OneStep, Unrolled
from difflayers.linalg import CG, GMRES, LU, MINRES
from tests.bilevel import distributed_problems as d
from tests.bilevel.distributed_problems import data, part, problem, start
from tests.bilevel.distributed_steps import ERRORS as ERRORS
from tests.bilevel.distributed_steps import STEP_CASES

place = d.place
Case = Callable[[Any], list[Tensor]]


def batches(group: Any, n: int = d.SAMPLES, processes: int | None = None) -> tuple[d.Batch, d.Batch]:
    return part(data(3, n), group, processes), part(data(4, n), group, processes)


def report(found: Any) -> list[Tensor]:
    leaves = [t for tree in (found.grad, found.adjoint) for t in (tree.values() if isinstance(tree, dict) else [tree])]
    return [*leaves, found.value, found.stationarity, found.status, found.steps, found.residual]


def exact(adjoint: Any = None, **options: Any) -> Case:
    """A hypergradient at a point that is no minimum."""
    return lambda group: report(
        hypergradient(problem(group, **options), *start(), batches(group), adjoint=adjoint, init=d.randn(5, seed=9))
    )


def mfac(group: Any) -> list[Tensor]:
    adjoint = MFAC(3, damping=0.1)
    adjoint.update(d.randn(3, 5, seed=8))
    return report(hypergradient(problem(group), *start(), batches(group), adjoint=adjoint))


def uneven(group: Any) -> list[Tensor]:
    return report(hypergradient(problem(group, samples=d.count), *start(), batches(group, 25)))


def without_samples(group: Any) -> list[Tensor]:
    """Of three processes the last has none."""
    p = problem(group, samples=d.count)
    return report(hypergradient(p, *start(), batches(group, 24, 2)))


def pieces(group: Any) -> list[Tensor]:
    """Functions that do not depend on everything in every process."""
    p = d.Bilevel(d.pieces_upper, d.pieces_lower, group=group)
    own = part((d.PIECES, d.PIECES), group)[0]
    dense = hypergradient(p, *start(), (own, own), adjoint=Implicit(LU()))
    return [*report(hypergradient(p, *start(), (own, own))), dense.grad, *second(p, own, group)]


def modules(group: Any) -> list[Tensor]:
    x, y = d.Net(seed=10), d.Net(seed=20)
    p = d.Bilevel(d.module_upper, d.module_lower, group=group)
    return report(hypergradient(p, x, y, batches(group), adjoint=Implicit(CG(), damping=0.1)))


def wrapped(group: Any) -> list[Tensor]:
    """The group is that of DistributedDataParallel."""
    x, y = d.Net(seed=10), d.Net(seed=20)
    wx, wy = (x, y) if group is None else (DistributedDataParallel(x), DistributedDataParallel(y))
    p = d.Bilevel(d.module_upper, d.module_lower)
    adjoint = Implicit(CG(), damping=0.1)
    found = report(hypergradient(p, x, wy, batches(group), adjoint=adjoint))
    return found + report(hypergradient(p, wx, y, batches(group), adjoint=adjoint))


def outer(y: Tensor, x: Tensor, group: Any) -> Tensor:
    """A loss behind the layer, of a process's own samples."""
    X, t = part(data(3), group)
    return (X @ y - t).sin().mean() + (x * y).sum().square()


def second(p: Any, batch: Any, group: Any, **options: Any) -> list[Tensor]:
    """Value, gradient and second derivative of the layer and what is behind it."""
    x = start()[0].requires_grad_()
    layer = ArgminLayer(p, init=start()[1], **options)
    y = layer(x, batch)
    (first,) = torch.autograd.grad(outer(y, x, group), x, create_graph=True)
    (again,) = torch.autograd.grad((first.sin() * part(data(7), group)[0].mean(0)).sum(), x)  # also of each its own
    return [y.detach(), *d.averaged([first, again], group)]


def layer(**options: Any) -> Case:
    keys = ("prox_lower", "constraint", "equality")
    parts = {k: options[k] for k in keys if k in options}
    rest = {k: v for k, v in options.items() if k not in keys}
    return lambda group: second(problem(group, **parts), batches(group)[1], group, **rest)


def by_batch(group: Any) -> list[Tensor]:
    """Gradients of each process's own samples, of the sum of the losses; the loss is the same everywhere."""
    x = start()[0].requires_grad_()
    X, t = data(4)
    own = part((X, t), group)[0].clone().requires_grad_()
    y = ArgminLayer(problem(group), init=start()[1])(x, (own, part((X, t), group)[1]))
    (g,) = torch.autograd.grad(y.square().sum() * 1.0, own)
    full = torch.zeros_like(X)
    full[(n := len(own)) * d.rank_of(group) : n * (d.rank_of(group) + 1)] = g
    return d.averaged([full], group)


def transforms(group: Any) -> list[Tensor]:
    """vmap over x, jvp, and many cotangents at once."""
    run = ArgminLayer(problem(group), init=start()[1], solver=LBFGS(rtol=1e-13))
    batch = batches(group)[1]
    many = torch.stack(start())
    out = [torch.func.vmap(lambda x: run(x, batch))(many)]
    out += torch.func.jvp(lambda x: run(x, batch), (start()[0],), (start()[1],))
    out.append(torch.func.jacrev(lambda x: run(x, batch))(start()[0]))
    x = start()[0].requires_grad_()
    y = run(x, batch)
    out += torch.autograd.grad(y, x, torch.eye(5, dtype=d.F64), is_grads_batched=True)
    return [t.detach() for t in out]


def module_layer(group: Any) -> list[Tensor]:
    x, y = d.Net(seed=10), d.Net(seed=20)
    p = d.Bilevel(d.module_upper, d.module_lower, group=group)
    solution = ArgminLayer(p, init=y, solver=LBFGS(rtol=1e-12))(x, batches(group)[1])
    X, t = part(data(3), group)
    loss = (torch.func.functional_call(y, solution, (X,)).squeeze(-1) - t).square().mean()
    return [
        *(v.detach() for v in solution.values()),
        *d.averaged(torch.autograd.grad(loss, list(x.parameters())), group),
    ]


def dropout(group: Any) -> list[Tensor]:
    """Each process has its mask, in all products the same. Zeros: what is off from the mean written out."""
    W, r = d.size_of(group), d.rank_of(group)
    (X, t), x, y = data(4), *start()

    def masked(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return ((X * mask) @ y - t).square().mean() + (x.exp() * y.square()).sum()

    def drawn(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return masked(x, y, nn.functional.dropout(torch.ones_like(X)))

    masks = []
    for i in range(W):
        torch.manual_seed(i)
        nn.functional.dropout(torch.ones_like(X))  # the upper function comes first
        masks.append(nn.functional.dropout(torch.ones_like(X)))
    torch.manual_seed(r)

    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return nn.functional.dropout(torch.ones_like(X)).mean() * 0 + y.square().sum()

    got = hypergradient(d.Bilevel(upper, drawn, group=group), x, y, adjoint=Implicit(CG(rtol=1e-14)))
    whole = d.Bilevel(upper, lambda x, y, b: torch.stack([masked(x, y, m) for m in masks]).mean())
    return [got.grad - hypergradient(whole, x, y, adjoint=Implicit(CG(rtol=1e-14))).grad]


CASES: dict[str, Case] = {
    "cg": exact(),
    "damping": exact(Implicit(CG(), damping=0.3)),
    "dense": exact(Implicit(LU())),
    "minres": exact(Implicit(MINRES())),
    "neumann": exact(Neumann(4)),
    "one step": exact(OneStep()),
    "finite difference": exact(FiniteDifference(radius=1e-1)),
    "prox": exact(Implicit(GMRES()), prox_lower=d.soft_threshold),
    "equality": exact(constraint=d.plane, equality=True),
    "equality, dense": exact(Implicit(LU()), constraint=d.plane, equality=True),
    "mfac": mfac,
    "uneven": uneven,
    "without samples": without_samples,
    "pieces": pieces,
    "modules": modules,
    "wrapped": wrapped,
    "dropout": dropout,
    "layer": layer(),
    "layer, neumann": layer(adjoint=Neumann(4)),
    "layer, unrolled": layer(adjoint=Unrolled(8)),
    "layer, prox": layer(prox_lower=d.soft_threshold),
    "layer, equality": layer(constraint=d.plane, equality=True),
    "layer, modules": module_layer,
    "by batch": by_batch,
    "transforms": transforms,
}
CASES |= STEP_CASES
