"""A nonlinear PDE constraint, forward and forward with backward: ours against the naive layer.

Four experts with 1000 points and 64 basis functions each find the coefficients of a field that obeys the viscous
Burgers equation `u_t + u u_x - nu u_xx = f` as well as it can, with a ridge. The naive layer takes the Jacobian of the
whole residual by `vmap(jacfwd)` in every step of the same damped Gauss-Newton method and differentiates through it. The
reference of the coefficients is Newton's method on the gradient of the objective, that of the gradients the implicit
function theorem, both with the full Hessian by autograd.

The unrolled layer runs as many steps as it needs to reach the error of 1e-6 in the coefficients, at which it counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from benchmarks.harness import Case, Contender, Options, run
from difflayers.implicit import GaussNewton
from difflayers.pde import residual_least_squares

EXPERTS, POINTS, BASIS = 4, 1000, 64
RIDGE, VISCOSITY = 1.0, 0.1
STEPS = (4, 6, 8, 10, 20)


def problem(device: str, size: tuple[int, int, int] = (EXPERTS, POINTS, BASIS)) -> tuple[Tensor, Tensor, Tensor]:
    """Random plane waves as basis functions with their derivatives, and a right-hand side no field fits exactly."""
    generator = torch.Generator().manual_seed(0)
    E, N, K = size
    wave, speed = (3 * torch.randn(E, 1, K, generator=generator, dtype=torch.float64) for _ in "xt")
    phase = 6 * torch.rand(E, 1, K, generator=generator, dtype=torch.float64)
    x, t = (torch.rand(E, N, 1, generator=generator, dtype=torch.float64) for _ in "xt")
    sine, cosine = torch.sin(wave * x + speed * t + phase), torch.cos(wave * x + speed * t + phase)
    B = torch.stack([sine, speed * cosine, wave * cosine, -(wave**2) * sine], -2) / K**0.5
    f = 0.03 * torch.sin(6 * x[..., 0]) + 0.01 * torch.randn(E, N, generator=generator, dtype=torch.float64)
    g = torch.randn(E, K, generator=generator, dtype=torch.float64)
    return B.to(device), f.to(device), g.to(device)


def burgers(u: Tensor, p: tuple[Tensor, Tensor]) -> Tensor:
    f, nu = p
    return u[..., 1] + u[..., 0] * u[..., 2] - nu * u[..., 3] - f


def ours(B: Tensor, f: Tensor, nu: Tensor) -> Tensor:
    return residual_least_squares(B, burgers, (f, nu), ridge=RIDGE)


def biased(B: Tensor, f: Tensor, nu: Tensor) -> Tensor:
    return residual_least_squares(B, burgers, (f, nu), ridge=RIDGE, curvature=GaussNewton())


def naive(steps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def solve(B: Tensor, f: Tensor, nu: Tensor) -> Tensor:
        def residual(w: Tensor, B: Tensor, f: Tensor) -> Tensor:
            return torch.cat([burgers(torch.einsum("ntk,k->nt", B, w), (f, nu)), RIDGE**0.5 * w])

        jacobian = vmap(jacfwd(residual), in_dims=(0, 0, 0))
        value = vmap(residual, in_dims=(0, 0, 0))
        w = B.new_zeros(B.shape[0], B.shape[-1])
        mu = B.new_full((B.shape[0],), 1e-3)
        for _ in range(steps):
            J, r = jacobian(w, B, f), value(w, B, f)
            H = J.mT @ J
            H = H + torch.diag_embed(mu[:, None] * H.diagonal(dim1=-2, dim2=-1))
            trial = w - torch.linalg.solve(H, (J.mT @ r[..., None])[..., 0])
            better = value(trial, B, f).square().sum(-1) <= r.square().sum(-1) * (1 + 1e-15)
            mu = torch.where(better, mu / 5, mu * 4)
            w = torch.where(better[:, None], trial, w)
        return w

    return solve


def exact(B: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, and the cotangents of B and f, an expert at a time."""
    coefficients, grads_B, grads_f = [], [], []
    nu = B.new_full((1,), VISCOSITY)
    start = ours(B, f, nu)

    def objective(w: Tensor, B: Tensor, f: Tensor) -> Tensor:
        return burgers(torch.einsum("ntk,k->nt", B, w), (f, nu)).square().sum() / 2 + RIDGE * w.square().sum() / 2

    for e in range(len(B)):
        w = start[e]
        for _ in range(3):
            w = w - torch.linalg.solve(hessian(objective)(w, B[e], f[e]), grad(objective)(w, B[e], f[e]))
        z = torch.linalg.solve(hessian(objective)(w, B[e], f[e]), g[e])
        pairing = lambda B, f, w=w, z=z: (grad(objective)(w, B, f) * z).sum()  # noqa: E731
        grad_B, grad_f = grad(pairing, argnums=(0, 1))(B[e], f[e])
        coefficients.append(w)
        grads_B.append(-grad_B)
        grads_f.append(-grad_f)
    return torch.stack(coefficients).detach(), torch.stack(grads_B), torch.stack(grads_f)


def steps_needed(B: Tensor, f: Tensor, nu: Tensor, w: Tensor) -> int:
    with torch.no_grad():
        for steps in STEPS:
            if float((naive(steps)(B, f, nu) - w).norm() / w.norm()) <= 1e-6:
                return steps
    return STEPS[-1]


def cases(options: Options) -> list[Case]:
    B, f, g = problem(options.device)
    nu = B.new_full((1,), VISCOSITY)
    w, grad_B, grad_f = exact(B, f, g)
    steps = steps_needed(B, f, nu, w)
    ways = {
        "difflayers.pde.residual_least_squares": ours,
        f"vmap(jacfwd), {steps} steps": naive(steps),
    }

    def forward(solve: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def job() -> Tensor:
            with torch.no_grad():
                return solve(B, f, nu)

        return job

    def both(solve: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.clone().requires_grad_() for t in (B, f)]

        def job() -> tuple[Tensor, ...]:
            out = solve(*leaves, nu)
            return (out.detach(), *torch.autograd.grad(out, leaves, g))

        return job

    def backward(solve: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.clone().requires_grad_() for t in (B, f)]
        out = None

        def job() -> tuple[Tensor, ...]:
            nonlocal out
            out = solve(*leaves, nu) if out is None else out
            return torch.autograd.grad(out, leaves, g, retain_graph=True)

        return job

    each = {**ways, "difflayers, Gauss-Newton adjoint (biased)": biased}
    return [
        Case("forward", [Contender(n, forward(s)) for n, s in ways.items()], w, memory=False),
        Case("backward alone", [Contender(n, backward(s)) for n, s in each.items()], (grad_B, grad_f), memory=False),
        Case("forward and backward", [Contender(n, both(s)) for n, s in each.items()], (w, grad_B, grad_f)),
    ]


def main(options: Options) -> None:
    run("pde_constraint", cases(options), options)
