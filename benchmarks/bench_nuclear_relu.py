"""Training of a gated ReLU network with vector outputs to its global optimum: ours, and with the derivative, and CVXPY.

The problem is `min_U 1/2 ||sum_i Z_i U_i - Y||^2 + beta sum_i ||U_i||_*` for random data and sampled gates. Every
contender returns the fit on the training set, which is unique where the neurons may not be. Ours runs twice: to a
relative subgradient of 1e-6, whose duality gap is far below 1e-6, and to rounding with the derivative of the fit in X
and Y. Clarabel is asked for a gap of 1e-6 and has every nuclear norm as a semidefinite block; SCS runs with the loosest
tolerance whose fit is as good as such a gap makes sure of. The reference is Clarabel at its tightest.
"""

import warnings

import torch
from torch import Tensor

from benchmarks.harness import AsLooseAs, Case, Contender, Options, run
from difflayers.relu import FISTA, Gates, convex_gated_relu_vector, predict_vector, sample_gates

SHAPES = {
    "n = 500, d = 10, c = 5, 30 gates, beta = 0.05 n": (500, 10, 5, 30, 0.05),
    "n = 100, d = 5, c = 3, 20 gates, beta = 0.05 n": (100, 5, 3, 20, 0.05),
    "n = 40, d = 4, c = 2, 8 gates, beta = 0.02 n": (40, 4, 2, 8, 0.02),
}
TARGET = 1e-3


class Peer:
    """The problem in CVXPY, set up once: what is timed is canonicalisation with new labels and the solve."""

    def __init__(self, X: Tensor, gates: Gates, beta: float, outputs: int) -> None:
        import cvxpy as cp

        n = len(X)
        Z = [(gates.patterns[:, i : i + 1] * X).numpy() for i in range(gates.patterns.shape[1])]
        self.Y = cp.Parameter((n, outputs))
        U = [cp.Variable((X.shape[1], outputs)) for _ in Z]
        self.fit = sum(z @ u for z, u in zip(Z, U, strict=True))
        norms = sum(cp.normNuc(u) for u in U)
        self.task = cp.Problem(cp.Minimize(cp.sum_squares(self.fit - self.Y) / 2 + beta * norms))

    def clarabel(self, Y: Tensor, tol: float) -> Tensor:
        self.Y.value = Y.numpy()
        self.task.solve(solver="CLARABEL", tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
        return torch.from_numpy(self.fit.value)

    def scs(self, Y: Tensor, tol: float) -> Tensor:
        self.Y.value = Y.numpy()
        self.task.solve(solver="SCS", eps_abs=tol, eps_rel=tol, max_iters=100_000)
        return torch.from_numpy(self.fit.value)


def case(name: str, n: int, d: int, c: int, count: int, scale: float, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    gates = sample_gates(X, count, generator=generator)
    W = torch.randn(d, c, generator=generator, dtype=torch.float64)
    Y = torch.sin(X @ W) + X[:, :1].abs() + 0.3 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    beta = scale * n
    peer = Peer(X, gates, beta, c)
    expected = peer.clarabel(Y, 1e-12)
    Xd, Yd, G = (t.to(device) for t in (X, Y, gates.vectors))

    def forward() -> Tensor:
        network = convex_gated_relu_vector(Xd, Yd, beta, G, solver=FISTA(rtol=1e-6))
        assert float(network.gap) <= 1e-6 * float(network.objective)
        return predict_vector(network, Xd).cpu()

    def with_derivative() -> Tensor:
        data = [t.clone().requires_grad_() for t in (Xd, Yd)]
        fit = predict_vector(convex_gated_relu_vector(*data, beta, G), data[0])
        torch.autograd.grad(fit.square().sum(), data)
        return fit.detach().cpu()

    scs = AsLooseAs(lambda tol: lambda: peer.scs(Y, tol), (1e-3, 1e-4, 1e-5, 1e-6, 1e-7), expected, TARGET, "eps")
    contenders = [
        Contender("difflayers.relu.convex_gated_relu_vector, gap 1e-6", forward),
        Contender("the same to rounding, with the derivative", with_derivative),
        Contender("CVXPY with Clarabel, gap 1e-6", lambda: peer.clarabel(Y, 1e-6)),
        Contender("CVXPY with SCS", scs, settings=scs.settings),
    ]
    return Case(name, contenders, expected, target=TARGET)


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a peer that stops short of its tolerance
        run("nuclear_relu", [case(name, *shape, options.device) for name, shape in SHAPES.items()], options)
