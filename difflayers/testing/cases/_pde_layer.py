"""Cases of the layer that makes a field satisfy a declared equation, and of the power that equations need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difflayers.implicit import LevenbergMarquardt
from difflayers.pde import (
    PDE,
    Box,
    ConstrainedField,
    Dirichlet,
    Fixed,
    Initial,
    PDEConstraint,
    Poisson,
    safe_power,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton

__all__ = ["CASES"]

SOURCE = "N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints, 2024"
RIDGE = 0.5
POINTS = np.array([0.1, 0.4, 0.7, 1.0])


class _Logistic(PDE):
    """``u' + k u + u^2 = 0``."""

    coords, terms = ("t",), ("u", "u_t")
    domain = Box(t=(0.0, 1.0))
    params = {"k": 1.0}  # noqa: RUF012
    conditions = (Initial("start"),)

    def residual(self, T: Any, p: Any) -> Tensor:
        return T["u_t"] + p["k"] * T["u"] + T["u"] ** 2


def _points(like: Tensor) -> Tensor:
    return torch.as_tensor(POINTS, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _basis(a: Tensor) -> Any:
    """``sin(a_k x + k)``."""
    shift = torch.arange(a.shape[-1], dtype=a.dtype, device=a.device)
    return lambda point: torch.sin(a * point + shift)


def _line(like: Tensor, exact: bool) -> tuple[PDE, Fixed]:
    ends = {"x=0": 0 * _points(like)[:1], "x=1": _points(like)[-1:]}
    pde = Poisson(domain=Box(x=(0.0, 1.0)), conditions=(Dirichlet("x=0", "left", exact=exact), Dirichlet("x=1")))
    return pde, Fixed(_points(like), ends)


def _poisson(exact: bool = True, **options: Any) -> Any:
    def fn(a: Tensor, f: Tensor, left: Tensor) -> ConstrainedField:
        pde, sampler = _line(a, exact)
        layer = PDEConstraint(pde, sampler=sampler, ridge=RIDGE, **options).to(a)
        return layer(_basis(a), {"f": f}, {"left": left})

    return fn


def _logistic(**options: Any) -> Any:
    def fn(a: Tensor, k: Tensor, start: Tensor) -> ConstrainedField:
        sampler = Fixed(_points(a), {"t=0": 0 * _points(a)[:1]})
        layer = PDEConstraint(_Logistic(), sampler=sampler, ridge=RIDGE, **options).to(a)
        return layer(_basis(a), {"k": k}, {"start": start})

    return fn


def _weights(fn: Any) -> Any:
    return lambda *inputs: fn(*inputs).weights


def _poisson_oracle(a: np.ndarray, f: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The optimality system of the weighted rows, with rows by hand."""
    k = np.arange(len(a))
    J = -(a**2) * np.sin(np.outer(POINTS, a) + k) / np.sqrt(len(POINTS))
    at = lambda x: np.sin(a * x + k)  # noqa: E731
    H = J.T @ J + np.outer(at(1), at(1)) + RIDGE * np.eye(len(a))
    system = np.block([[H, at(0)[:, None]], [at(0)[None], np.zeros((1, 1))]])
    right = np.concatenate([J.T @ (-f * np.ones(len(POINTS))) / np.sqrt(len(POINTS)), left])
    return np.linalg.solve(system, right)[: len(a)]


def _logistic_oracle(a: np.ndarray, k: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Newton's method with derivatives by hand from the best of scipy."""
    from scipy.optimize import least_squares

    n, N = np.arange(len(a)), len(POINTS)
    U, V, first = np.sin(np.outer(POINTS, a) + n), a * np.cos(np.outer(POINTS, a) + n), np.sin(n)

    def rows(w: np.ndarray) -> np.ndarray:
        u = U @ w
        return np.concatenate([(V @ w + k * u + u**2) / np.sqrt(N), first @ w - start, np.sqrt(RIDGE) * w])

    w = least_squares(rows, np.zeros(len(a)), xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    for _ in range(3):
        u = U @ w
        J = np.concatenate([(V + (k + 2 * u)[:, None] * U) / np.sqrt(N), first[None], np.sqrt(RIDGE) * np.eye(len(a))])
        r = rows(w)
        H = J.T @ J + (U.T * (2 * r[:N] / np.sqrt(N))) @ U
        w = w - np.linalg.solve(H, J.T @ r)
    return w


def _poisson_twin(x: Tensor, a: Tensor, f: Tensor, left: Tensor) -> Tensor:
    """The gradient of the Lagrangian."""
    n = a.shape[-1]
    shift = torch.arange(n, dtype=a.dtype, device=a.device)
    w, nu = x[..., :n], x[..., n:]
    U = torch.sin(a.unsqueeze(-2) * _points(a) + shift)
    r = (-a.square().unsqueeze(-2) * U * w.unsqueeze(-2)).sum(-1) + f
    value = r.square().mean(-1) / 2 + (torch.sin(a + shift) * w).sum(-1).square() / 2 + RIDGE * w.square().sum(-1) / 2
    value = value + nu[..., 0] * ((torch.sin(shift) * w).sum(-1) - left[..., 0])
    return torch.autograd.grad(value.sum(), x, create_graph=True)[0]


def _logistic_twin(w: Tensor, a: Tensor, k: Tensor, start: Tensor) -> Tensor:
    shift = torch.arange(a.shape[-1], dtype=a.dtype, device=a.device)
    angle = a.unsqueeze(-2) * _points(a) + shift
    u = (torch.sin(angle) * w.unsqueeze(-2)).sum(-1)
    v = (a.unsqueeze(-2) * torch.cos(angle) * w.unsqueeze(-2)).sum(-1)
    miss = (torch.sin(shift) * w).sum(-1) - start[..., 0]
    value = (v + k * u + u**2).square().mean(-1) / 2 + miss.square() / 2 + RIDGE * w.square().sum(-1) / 2
    return torch.autograd.grad(value.sum(), w, create_graph=True)[0]


class _Network(nn.Module):
    """A basis that learns, under the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(A[0].clone())
        pde, sampler = _line(A, True)
        self.layer = PDEConstraint(pde, sampler=sampler, ridge=RIDGE).to(A)

    def forward(self, f: Tensor, left: Tensor) -> Tensor:
        """Weights of the basis."""
        return self.layer(_basis(self.a), {"f": f}, {"left": left}).weights


A = numbers([[1.0, 2.0, 0.5], [0.7, 1.5, 2.5]])
F, LEFT = numbers([[0.7], [1.3]]), numbers([[0.3], [-0.4]])
K, START = numbers([[0.4], [0.9]]), numbers([[0.5], [0.8]])
NDIMS = (1, 1, 1)

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "PDEConstraint poisson, exact",
        _weights(_poisson()),
        (A, F, LEFT),
        per_element(_poisson_oracle, NDIMS),
        event_ndims=NDIMS,
        names=(None, "params['f']", None),
        source=SOURCE,
        representative=True,
        unrolled=lambda a, f, left: unrolled_newton(_poisson_twin, a.shape[-1] + 1, NDIMS)(a, f, left)[
            ..., : a.shape[-1]
        ],
        tolerant=_weights(_poisson(on_failure="nan")),
        solution=_poisson(on_failure="ignore"),
        bad=(1, numbers([float("nan")])),
        hostile=(
            Hostile("constant basis functions, with a ridge", (0 * A, F, LEFT)),
            Hostile("no source", (A, 0 * F, LEFT)),
            Hostile("huge source", (A, 1e9 * F, LEFT)),
        ),
        wrong=(
            Wrong("a source of the wrong size", (A, normal(1, 2, 3), LEFT), r"params\['f'\]: expected 1 or 4 entries"),
            Wrong("values of the wrong size", (A, F, normal(1, 2, 3)), r"dirichlet x=0: expected 1 or 1 entries"),
        ),
        make_module=_Network,
        module_inputs=(F, LEFT),
        half=False,
        exact_bits=False,
    ),
    LayerCase(
        "PDEConstraint logistic",
        _weights(_logistic()),
        (A, K, START),
        per_element(_logistic_oracle, NDIMS),
        event_ndims=NDIMS,
        names=(None, "params['k']", None),
        source=SOURCE,
        unrolled=lambda a, k, start: unrolled_newton(_logistic_twin, a.shape[-1], NDIMS)(a, k, start),
        tolerant=_weights(_logistic(on_failure="nan")),
        solution=_logistic(on_failure="ignore"),
        starved=_weights(_logistic(solver=LevenbergMarquardt(max_steps=1))),
        starved_solution=_logistic(solver=LevenbergMarquardt(max_steps=1), on_failure="ignore"),
        bad=(1, numbers([float("nan")])),
        half=False,
        exact_bits=False,
    ),
    LayerCase(
        "safe_power",
        lambda u, e: safe_power(u, e, 0.1),
        (numbers([[0.3, -0.5, 2.0], [1.0, 0.2, -1.0]]), numbers([0.4])),
        lambda u, e: torch.from_numpy(np.power(np.maximum(u.cpu().numpy(), 0) + 0.1, e.cpu().numpy())).to(u),
        event_ndims=(1, 1),
        names=(None, None),
        representative=True,
        source="the retardation of PDEBench's diffusion-sorption equation",
    ),
)
