"""Sparse codes, forward and backward: ours against unrolled FISTA, and forward against scikit-learn's Lasso.

Every contender computes `z = argmin 1/2 ||y - D z||^2 + penalty ||z||_1` and the cotangents of `D` and `y` for a given
cotangent of `z`; scikit-learn computes `z` alone. The reference takes the support from coordinate descent of
scikit-learn at a tolerance of 1e-14 and solves on it by a QR factorisation: with `r = y - D z` and `w = G^-1 g` on the
support, the cotangents are `r w^T - (D w) z^T` and `D w`.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.proximal import lasso

UNROLLED_STEPS = 300
SHAPES = {"256 signals, 64x256": (256, 64, 256), "1 signal, 10000x200": (1, 10_000, 200)}


def unrolled_fista(D: Tensor, y: Tensor, penalty: float) -> Tensor:
    step = 1 / torch.linalg.matrix_norm(D.detach(), 2) ** 2
    z = v = y.new_zeros(len(y), D.shape[1])
    t = 1.0
    for _ in range(UNROLLED_STEPS):
        u = v - step * ((v @ D.mT - y) @ D)
        new = torch.nn.functional.softshrink(u, float(penalty * step))
        grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, v, t = new, new + (t - 1) / grown * (new - z), grown
    return z


def scikit_learn(D: Tensor, y: Tensor, penalty: float, tol: float = 1e-8) -> Tensor:
    from sklearn.linear_model import Lasso

    model = Lasso(alpha=penalty / D.shape[0], fit_intercept=False, tol=tol, max_iter=1_000_000)
    codes = model.fit(D.numpy(), y.numpy().T).coef_
    return torch.from_numpy(np.atleast_2d(codes).copy())


def reference(D: Tensor, y: Tensor, penalty: float, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signs = scikit_learn(D, y, penalty, tol=1e-14).sign()
    z, w = torch.zeros_like(signs), torch.zeros_like(signs)
    for i, s in enumerate(signs):
        A = s != 0
        Q, R = torch.linalg.qr(D[:, A])
        z[i, A] = torch.linalg.solve(R, Q.mT @ y[i] - torch.linalg.solve(R.mT, penalty * s[A]))
        w[i, A] = torch.linalg.solve(R, torch.linalg.solve(R.mT, g[i, A]))
    Dw = w @ D.mT
    return z, (y - z @ D.mT).mT @ w - Dw.mT @ z, Dw


def forward_backward(
    solve: Callable[..., Tensor], D: Tensor, y: Tensor, penalty: float, g: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    D, y = (x.detach().clone().requires_grad_() for x in (D, y))

    def job() -> tuple[Tensor, ...]:
        z = solve(D, y, penalty)
        return (z.detach(), *torch.autograd.grad(z, (D, y), g))

    return job


def case(name: str, count: int, n: int, p: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    D = torch.nn.functional.normalize(torch.randn(n, p, generator=generator, dtype=torch.float64), dim=0)
    codes = torch.randn(count, p, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(count, p, generator=generator) < 0.05)
    y = codes @ D.mT + 0.05 * torch.randn(count, n, generator=generator, dtype=torch.float64)
    g = torch.randn(count, p, generator=generator, dtype=torch.float64)
    penalty = 0.1
    expected = tuple(t.to(device) for t in reference(D, y, penalty, g))
    on_device = [t.to(device) for t in (D, y)]
    ways = {"difflayers.proximal.lasso": lasso, f"autograd through {UNROLLED_STEPS} FISTA steps": unrolled_fista}
    contenders = [
        Contender(way, forward_backward(solve, *on_device, penalty, g.to(device))) for way, solve in ways.items()
    ]
    contenders.append(Contender("sklearn Lasso, forward alone", lambda: scikit_learn(D, y, penalty), expected[0].cpu()))
    return Case(name, contenders, expected, target=1e-4)


def main(options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of its own tolerance
        run("lasso", [case(name, *shape, options.device) for name, shape in SHAPES.items()], options)
