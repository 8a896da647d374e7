"""Training of a gated ReLU network to its global optimum: ours, forward and with the derivative, against its peers.

The problem is `min_u 1/2 ||sum_i Z_i u_i - y||^2 + beta sum_i ||u_i||` for random data, 50 sampled gates and beta =
0.01 n. Every contender returns the fit on the training set, which is unique where the neurons may not be. Ours runs
twice: to a relative subgradient of 1e-6, whose duality gap is far below 1e-6, and to rounding with the derivative of
the fit in X and y. CVXPY with Clarabel is asked for the same gap of 1e-6; scnn, the library of the paper, once for the
loosest of its tolerances at which its objective is within 1e-6, and once for its default, where it need not be so good.
The reference is Clarabel at its tightest.
"""

import warnings

import torch
from torch import Tensor

from benchmarks import relu_peers
from benchmarks.harness import Case, Contender, Options, run
from difflayers.relu import FISTA, Gates, convex_gated_relu, predict, sample_gates

SHAPES = {"n = 500, d = 20, 50 gates": (500, 20, 50), "n = 100, d = 5, 50 gates": (100, 5, 50)}


class Clarabel:
    """The problem in CVXPY, set up once: what is timed is canonicalisation with new labels and the solve."""

    def __init__(self, X: Tensor, gates: Gates, beta: float) -> None:
        import cvxpy as cp

        mask = gates.patterns.double()
        n, d = X.shape
        self.Z = (mask.unsqueeze(-1) * X.unsqueeze(1)).flatten(1).numpy()
        self.y = cp.Parameter(n)
        self.u = cp.Variable((mask.shape[1], d))
        fit = self.Z @ cp.vec(self.u, order="C")
        objective = cp.sum_squares(fit - self.y) / 2 + beta * cp.sum(cp.norm(self.u, axis=1))
        self.task = cp.Problem(cp.Minimize(objective))

    def __call__(self, y: Tensor, tol: float) -> Tensor:
        self.y.value = y.numpy()
        self.task.solve(solver="CLARABEL", tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
        return torch.from_numpy(self.Z @ self.u.value.ravel())


def case(name: str, n: int, d: int, count: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    gates = sample_gates(X, count, generator=generator)
    y = torch.sin(2 * X[:, 0]) + X[:, -1].abs() + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    beta = 0.01 * n
    clarabel = Clarabel(X, gates, beta)
    expected = clarabel(y, 1e-12)
    Xd, yd, G = (t.to(device) for t in (X, y, gates.vectors))

    def forward() -> Tensor:
        network = convex_gated_relu(Xd, yd, beta, G, solver=FISTA(rtol=1e-6))
        assert float(network.gap) <= 1e-6 * float(network.objective)
        return predict(network, Xd).cpu()

    def with_derivative() -> Tensor:
        data = [t.clone().requires_grad_() for t in (Xd, yd)]
        fit = predict(convex_gated_relu(*data, beta, G), data[0])
        torch.autograd.grad(fit.square().sum(), data)
        return fit.detach().cpu()

    contenders = [
        Contender("difflayers.relu.convex_gated_relu, gap 1e-6", forward),
        Contender("the same to rounding, with the derivative", with_derivative),
        Contender("CVXPY with Clarabel, gap 1e-6", lambda: clarabel(y, 1e-6)),
    ]
    if relu_peers.available():
        contenders += scnn(X, y, beta, gates)
    return Case(name, contenders, expected, target=1e-3)


def scnn(X: Tensor, y: Tensor, beta: float, gates: Gates) -> list[Contender]:
    """R-FISTA at the accuracy that the others are asked for, and at its default."""
    best = convex_gated_relu(X, y, beta, gates).objective

    def train(tol: float) -> tuple[Tensor, Tensor]:
        """Fit and objective."""
        u, vectors = relu_peers.scnn_gated(X, y, beta, gates.vectors, tol)
        fit = torch.where(X @ vectors.mT >= 0, X @ u.mT, 0).sum(-1)
        return fit, (fit - y).square().sum() / 2 + beta * u.norm(dim=-1).sum()

    good = (tol for tol in relu_peers.TOLERANCES if train(tol)[1] <= (1 + 1e-6) * best)
    tol = next(good, relu_peers.TOLERANCES[-1])
    return [
        Contender("scnn R-FISTA, objective within 1e-6", lambda: train(tol)[0], settings=lambda: f"tol {tol:.0e}"),
        Contender("scnn R-FISTA, its default tolerance", lambda: train(1e-6)[0], settings=lambda: "tol 1e-06"),
    ]


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference, which asks for more than it can get
        run("gated_relu", [case(name, *shape, options.device) for name, shape in SHAPES.items()], options)
