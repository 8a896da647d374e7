"""Other ways to compute proximal operators: the formulas that one writes first, and the two packages that have them.

The functions here are plain torch, so that autograd gives their derivatives, unless they say otherwise. `x` has shape
`(batch, n)` or `(batch, rows, columns)`. Some are wrong at places, as such code tends to be; the benchmark measures it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------- shrinking and clipping


def shrink(x: Tensor, t: float) -> Tensor:
    return x.sign() * torch.relu(x.abs() - t)


def shrink_norm(x: Tensor, t: float) -> Tensor:
    return x * torch.relu(1 - t / x.norm(dim=-1, keepdim=True))


def keep_large(x: Tensor, t: float) -> Tensor:
    return torch.where(x.abs() > (2 * t) ** 0.5, x, 0)


def huber(x: Tensor, t: float, width: float) -> Tensor:
    return torch.where(x.abs() <= width + t, x * width / (width + t), x - t * x.sign())


def log_penalty(x: Tensor, t: float, eps: float) -> Tensor:
    a = x.abs()
    root = (a - eps + ((a + eps) ** 2 - 4 * t).clamp_min(0).sqrt()) / 2
    better = t * torch.log(eps + root) + (root - a) ** 2 / 2 < t * np.log(eps) + a**2 / 2
    return x.sign() * torch.where((root > 0) & ((a + eps) ** 2 >= 4 * t) & better, root, 0)


def scad(x: Tensor, t: float, penalty: float, c: float) -> Tensor:
    middle = ((c - 1) * x - c * t * penalty * x.sign()) / (c - 1 - t)
    outer = torch.where(x.abs() <= c * penalty, middle, x)
    return torch.where(x.abs() <= penalty * (1 + t), shrink(x, t * penalty), outer)


def mcp(x: Tensor, t: float, penalty: float, c: float) -> Tensor:
    return torch.where(x.abs() <= c * penalty, c / (c - t) * shrink(x, t * penalty), x)


def hinge(x: Tensor, t: float, label: Tensor) -> Tensor:
    return x + label * (1 - label * x).clamp(0, t)


def poisson(x: Tensor, t: float, count: Tensor) -> Tensor:
    return (x - t + ((x - t) ** 2 + 4 * t * count).sqrt()) / 2


def entropy(x: Tensor, t: float, steps: int = 30) -> Tensor:
    """Newton's method for `log z` on `z + t (1 + log z) = x`, unrolled."""
    u = torch.where(x > t, x.clamp_min(t).log(), (x - t) / t)
    for _ in range(steps):
        z = u.exp()
        u = u - (z + t * (1 + u) - x) / (z + t)
    return u.exp()


def logistic(x: Tensor, t: float, label: Tensor, steps: int = 15) -> Tensor:
    """Newton's method on `z - t label sigmoid(-label z) = x`, unrolled."""
    z = x
    for _ in range(steps):
        p = torch.sigmoid(-label * z)
        z = z - (z - t * label * p - x) / (1 + t * p * (1 - p))
    return z


# ------------------------------------------------------------------------------------------------ by sorting, bisection


def simplex(x: Tensor, radius: float) -> Tensor:
    u = x.sort(dim=-1, descending=True).values
    sums = u.cumsum(-1) - radius
    k = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    count = (u * k > sums).sum(-1, keepdim=True)
    return torch.relu(x - sums.gather(-1, count - 1) / count)


def l1_ball(x: Tensor, radius: float) -> Tensor:
    inside = x.abs().sum(-1, keepdim=True) <= radius
    return torch.where(inside, x, x.sign() * simplex(x.abs(), radius))


def linf(x: Tensor, t: float) -> Tensor:
    return x - l1_ball(x, t)


def box_section(x: Tensor, lower: float, upper: float, total: float, steps: int = 40) -> Tensor:
    """Bisection without gradient for `sum clip(x - tau) = total`, then the formula for the entries that are free."""
    with torch.no_grad():
        low, high = x.amin(-1, keepdim=True) - upper, x.amax(-1, keepdim=True) - lower
        for _ in range(steps):
            tau = (low + high) / 2
            more = (x - tau).clamp(lower, upper).sum(-1, keepdim=True) > total
            low, high = torch.where(more, tau, low), torch.where(more, high, tau)
        tau = (low + high) / 2
        free = (x - tau > lower) & (x - tau < upper)
        fixed = torch.where(free, 0, (x - tau).clamp(lower, upper)).sum(-1, keepdim=True)
        count = free.sum(-1, keepdim=True).clamp_min(1)
    tau = (torch.where(free, x, 0).sum(-1, keepdim=True) + fixed - total) / count
    return (x - tau).clamp(lower, upper)


def isotonic(x: Tensor) -> Tensor:
    """The largest over left ends of the smallest over right ends of the mean between: n^2 numbers a vector."""
    n = x.shape[-1]
    sums = torch.nn.functional.pad(x.cumsum(-1), (1, 0))
    left, right = torch.arange(n, device=x.device)[:, None], torch.arange(1, n + 1, device=x.device)
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / (right - left).clamp_min(1)
    means = means.masked_fill(right <= left, torch.inf)
    smallest = means.flip(-1).cummin(-1).values.flip(-1)  # over right ends from here on
    return smallest.cummax(-2).values.diagonal(dim1=-2, dim2=-1)


def isotonic_by_rows(x: Tensor) -> Tensor:
    """scikit-learn finds the blocks, row by row; torch takes their means."""
    from sklearn.isotonic import isotonic_regression

    with torch.no_grad():
        fitted = np.stack([isotonic_regression(row) for row in x.detach().cpu().numpy()])
        block = torch.from_numpy(np.diff(fitted, axis=-1, prepend=fitted[:, :1]) > 0).to(x.device).cumsum(-1)
        size = torch.zeros_like(x).scatter_add(-1, block, torch.ones_like(x))
    return (torch.zeros_like(x).scatter_add(-1, block, x) / size.clamp_min(1)).gather(-1, block)


def slope(x: Tensor, t: float, weights: Tensor, increasing: Map) -> Tensor:
    """Sort, regress, clip, and back: with a way to regress."""
    a, order = x.abs().sort(dim=-1, descending=True)
    z = torch.relu(-increasing(t * weights - a))
    return x.sign() * torch.zeros_like(x).scatter(-1, order, z)


# ------------------------------------------------------------------------------------------------------ linear algebra


def affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return x - torch.linalg.solve(A @ A.mT, (x @ A.mT - b).mT).mT @ A


def quadratic(x: Tensor, t: float, Q: Tensor, q: Tensor) -> Tensor:
    eye = torch.eye(Q.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye + t * Q, (x - t * q).mT).mT


def on_singular_values(x: Tensor, shrink: Map) -> Tensor:
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    return (U * shrink(s)[..., None, :]) @ Vh


def on_eigenvalues(x: Tensor, shrink: Map) -> Tensor:
    values, Q = torch.linalg.eigh((x + x.mT) / 2)
    return (Q * shrink(values)[..., None, :]) @ Q.mT


def polar(x: Tensor, steps: int = 30) -> Tensor:
    """Newton-Schulz iterations, unrolled."""
    z = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(steps):
        z = 1.5 * z - 0.5 * z @ z.mT @ z
    return z


# ----------------------------------------------------------------------------------------------------- dual iterations


def total_variation(x: Tensor, t: float, edges: Tensor, steps: int) -> Tensor:
    """Accelerated projected gradient on the dual, unrolled; `edges` has shape `(m, 2)`."""
    tail, head = edges.unbind(-1)
    degree = torch.bincount(edges.flatten()).max()
    p = q = x.new_zeros(*x.shape[:-1], len(edges))

    def primal(p: Tensor) -> Tensor:
        return x + torch.zeros_like(x).index_add(-1, tail, p).index_add(-1, head, -p)

    for k in range(steps):
        z = primal(q)
        new = (q + (z[..., head] - z[..., tail]) / (2 * degree)).clamp(-t, t)
        p, q = new, new + k / (k + 3) * (new - p)
    return primal(p)


def image_total_variation(x: Tensor, t: float, steps: int) -> Tensor:
    """The isotropic kind, on `(batch, rows, columns)`: as above, with a ball at every pixel."""

    def primal(p: Tensor, q: Tensor) -> Tensor:
        down = torch.nn.functional.pad(p, (0, 0, 1, 0)) - torch.nn.functional.pad(p, (0, 0, 0, 1))
        across = torch.nn.functional.pad(q, (1, 0)) - torch.nn.functional.pad(q, (0, 1))
        return x - down - across

    def project(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        p_, q_ = torch.nn.functional.pad(p, (0, 0, 0, 1)), torch.nn.functional.pad(q, (0, 1))
        scale = t / (p_**2 + q_**2).clamp_min(t**2).sqrt()
        return p * scale[..., :-1, :], q * scale[..., :, :-1]

    p = old_p = x.new_zeros(*x.shape[:-2], x.shape[-2] - 1, x.shape[-1])
    q = old_q = x.new_zeros(*x.shape[:-2], x.shape[-2], x.shape[-1] - 1)
    for k in range(steps):
        z = primal(p, q)
        new_p, new_q = project(p + z.diff(dim=-2) / 8, q + z.diff(dim=-1) / 8)
        m = k / (k + 3)
        p, q = new_p + m * (new_p - old_p), new_q + m * (new_q - old_q)
        old_p, old_q = new_p, new_q
    return primal(old_p, old_q)


def doubly_stochastic(x: Tensor, steps: int) -> Tensor:
    """Dykstra's algorithm between the affine set and the non-negative matrices, unrolled."""
    n = x.shape[-1]
    z, correction = x, torch.zeros_like(x)
    for _ in range(steps):
        rows, columns = z.sum(-1, keepdim=True) - 1, z.sum(-2, keepdim=True) - 1
        y = z - rows / n - columns / n + rows.sum(-2, keepdim=True) / n**2
        z = torch.relu(y + correction)
        correction = y + correction - z
    return z


# ------------------------------------------------------------------------------------------------------------ packages


def deepinv_optim():
    """`deepinv.optim`, which imports torchvision; its wheels for CUDA fail beside a CPU torch for want of two names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        deepinv_optim.library = library  # the declarations live as long as it does
    import deepinv.optim

    return deepinv.optim


def numpy_rows(prox: Callable[[np.ndarray], np.ndarray]) -> Map:
    """A prox of NumPy that takes one vector, for each row or matrix; without gradient."""

    def run(x: Tensor) -> Tensor:
        rows = np.stack([prox(row) for row in x.flatten(1).cpu().numpy()])
        return torch.from_numpy(rows).to(x).view_as(x)

    return run


def numpy_entries(prox: Callable[[np.ndarray], np.ndarray]) -> Map:
    """A prox of NumPy that treats every entry alike, on all of them at once; without gradient."""
    return lambda x: torch.from_numpy(prox(x.cpu().numpy().ravel())).to(x).view_as(x)
