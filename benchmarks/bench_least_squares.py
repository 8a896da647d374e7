"""Linear least squares, forward and backward: ours against autograd through three textbook ways.

Every contender computes `w = argmin 1/2 ||A w - y||^2` and the cotangents of `A` and `y` for a given cotangent of `w`.
The reference is the closed form: with `r = y - A w`, `H = A^T A` and `z = H^-1 g`, the cotangents are
`r z^T - (A z) w^T` and `A z`; both solves go through a QR factorisation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, run
from difflayers.linalg import least_squares

SHAPES = {"4000x60": (4000, 60), "16x1000x128": (16, 1000, 128)}


def through_qr(A: Tensor, y: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(A)
    return torch.linalg.solve_triangular(R, Q.mT @ y[..., None], upper=True)[..., 0]


def through_normal_equations(A: Tensor, y: Tensor) -> Tensor:
    L = torch.linalg.cholesky(A.mT @ A)
    return torch.cholesky_solve(A.mT @ y[..., None], L)[..., 0]


def through_lstsq(A: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(A, y[..., None]).solution[..., 0]


def closed_form(A: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Q, R = torch.linalg.qr(A)
    w = torch.linalg.solve_triangular(R, Q.mT @ y[..., None], upper=True)
    half = torch.linalg.solve_triangular(R.mT, g[..., None], upper=False)
    z = torch.linalg.solve_triangular(R, half, upper=True)
    r, Az = y[..., None] - A @ w, A @ z
    return w[..., 0], r * z.mT - Az * w.mT, Az[..., 0]


def forward_backward(
    solve: Callable[[Tensor, Tensor], Tensor], A: Tensor, y: Tensor, g: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    A, y = (x.detach().clone().requires_grad_() for x in (A, y))

    def job() -> tuple[Tensor, ...]:
        w = solve(A, y)
        return (w.detach(), *torch.autograd.grad(w, (A, y), g))

    return job


def cases(options: Options) -> list[Case]:
    made = []
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        A, y, g = (
            torch.randn(size, generator=generator, dtype=torch.float64).to(options.device)
            for size in (shape, shape[:-1], (*shape[:-2], shape[-1]))
        )
        ways = {
            "difflayers.linalg.least_squares": least_squares,
            "autograd through torch.linalg.qr": through_qr,
            "autograd through normal equations": through_normal_equations,
            "autograd through torch.linalg.lstsq": through_lstsq,
        }
        contenders = [Contender(way, forward_backward(solve, A, y, g)) for way, solve in ways.items()]
        made.append(Case(name, contenders, closed_form(A, y, g)))
    return made


def main(options: Options) -> None:
    run("least_squares", cases(options), options)
