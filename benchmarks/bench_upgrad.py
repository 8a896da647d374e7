"""Weights of UPGrad: ours against TorchJD with its quadprog projector, which solves one program a row.

Every contender turns Gramians into weights with the ridge of TorchJD, 1e-4 of the trace, and the mean as preference.
Gramians are those of random Gaussian Jacobians with twice as many parameters as objectives, and of the gradients of
single examples: a network with one hidden layer on scikit-learn's digits, at the start and after 200 steps. TorchJD
computes in double precision whatever comes in, so it gets double precision; ours gets both.

The reference takes which entries are above their bound from quadprog, solves for them by a pivoted LU factorisation in
numpy, and checks the optimality conditions. Backward is ours alone: TorchJD is not differentiable.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from benchmarks.harness import Case, Contender, Options, run
from difflayers.conic import upgrad_weights

RIDGE = 1e-4
OBJECTIVES = (8, 64, 128)
BATCH = 32


def torchjd(gramian: Tensor) -> Tensor:
    from torchjd.aggregation import UPGradWeighting

    weighting = UPGradWeighting()
    return torch.stack([weighting(one) for one in gramian.flatten(0, -3)]).reshape(gramian.shape[:-1])


def reference(gramian: Tensor) -> Tensor:
    """One Gramian after the other, one row after the other."""
    from torchjd.linalg import QuadprogProjector

    m, total = gramian.shape[-1], []
    for one in gramian.flatten(0, -3) if gramian.ndim > 2 else gramian[None]:
        G = (one / one.trace() + RIDGE * torch.eye(m, dtype=one.dtype)).numpy()
        rows = QuadprogProjector()(torch.eye(m, dtype=one.dtype) / m, one).numpy()
        for row, bound in zip(rows, np.eye(m) / m, strict=True):
            free = row > bound + 1e-10
            row[:] = bound
            row[free] = np.linalg.solve(G[np.ix_(free, free)], -G[np.ix_(free, ~free)] @ bound[~free])
            assert (row >= bound).all() and (G @ row)[~free].min() > -1e-12
        total.append(torch.from_numpy(rows.sum(0)))
    return torch.stack(total).reshape(gramian.shape[:-1])


def gaussian(m: int, count: int = 1) -> Tensor:
    J = torch.randn(count, m, 2 * m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    return (J @ J.mT).squeeze(0)


def digits(m: int, steps: int) -> Tensor:
    """The Gramian of the gradients of `m` examples, after `steps` steps of training."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        pick = torch.randint(len(x), (32,), generator=generator)
        optimiser.zero_grad()
        cross_entropy(model(x[pick]), labels[pick]).backward()
        optimiser.step()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (image,)), label)

    pick = torch.randint(len(x), (m,), generator=generator)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x[pick], labels[pick])
    J = torch.cat([g.flatten(1) for g in gradients.values()], -1).double()
    return J @ J.mT


def case(name: str, gramian: Tensor, device: str) -> Case:
    expected, G = reference(gramian), gramian.to(device)
    single, leaf = G.float(), G.clone().requires_grad_()
    cotangent = torch.linspace(-1, 1, G.shape[-1], dtype=G.dtype, device=device).expand(G.shape[:-1])

    def backward() -> Tensor:
        weights = upgrad_weights(leaf, ridge=RIDGE)
        torch.autograd.grad(weights, leaf, cotangent)
        return weights.detach()

    contenders = [
        Contender("difflayers.conic.upgrad_weights", lambda: upgrad_weights(G, ridge=RIDGE)),
        Contender("the same in float32", lambda: upgrad_weights(single, ridge=RIDGE)),
        Contender("difflayers, with backward", backward),
        Contender(
            "torchjd UPGradWeighting (quadprog)", lambda: torchjd(G if G.ndim > 2 else G[None]).view(G.shape[:-1])
        ),
    ]
    return Case(name, contenders, expected.to(device), target=1e-4, memory=False)


def main(options: Options) -> None:
    gramians = {f"{m} objectives, Gaussian": gaussian(m) for m in OBJECTIVES}
    for m in OBJECTIVES:
        gramians |= {f"{m} digits, {steps} steps": digits(m, steps) for steps in (0, 200)}
    gramians[f"8 objectives, Gaussian, batch {BATCH}"] = gaussian(8, BATCH)
    run("upgrad", [case(name, G, options.device) for name, G in gramians.items()], options)
