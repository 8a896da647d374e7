"""Cases of sparse coding and of other layers with an inner solve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import SolveError
from difflayers.proximal import (
    FISTA,
    PredictiveSparseDecomposition,
    SparseCoding,
    lasso,
    lasso_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element


def _code(D: np.ndarray, y: np.ndarray, lam: np.ndarray, mu: float = 0.0, c: np.ndarray | None = None) -> np.ndarray:
    """Every pattern of signs, and the one that gives the lowest objective."""
    p = D.shape[1]
    c = np.zeros(p) if c is None else c
    lam = np.broadcast_to(lam, (p,))
    best, lowest = np.zeros(p), math.inf
    for pattern in itertools.product((0.0, 1.0, -1.0), repeat=p):
        signs = np.array(pattern)
        A = np.flatnonzero(signs)
        z = np.zeros(p)
        G = D[:, A].T @ D[:, A] + mu * np.eye(len(A))
        z[A] = np.linalg.lstsq(G, D[:, A].T @ y + mu * c[A] - lam[A] * signs[A], rcond=None)[0]
        value = ((y - D @ z) ** 2).sum() / 2 + (lam * np.abs(z)).sum() + mu / 2 * ((z - c) ** 2).sum()
        if np.all(z * signs >= 0) and value < lowest:
            best, lowest = z, value
    return best


def _on_support(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The closed form on the support that the oracle finds: exact derivatives by autograd."""

    def solve(D: Tensor, y: Tensor, lam: Tensor, mu: Tensor, c: Tensor) -> Tensor:
        signs = oracle(D, y, lam, mu, c).sign()
        D_A = D * signs.abs().unsqueeze(-2)
        G = D_A.mT @ D_A + torch.diag_embed(torch.where(signs == 0, 1, mu.unsqueeze(-1)))
        pull = (D_A.mT @ y.unsqueeze(-1)).squeeze(-1) + signs.abs() * mu.unsqueeze(-1) * c - lam * signs
        return torch.linalg.solve(G, pull.unsqueeze(-1)).squeeze(-1)

    return solve


def _lasso_case(
    name: str, inputs: tuple[Tensor, ...], ndims: tuple[int, ...], names: tuple[str, ...], **fields: Any
) -> LayerCase:
    """Dictionary, signal and penalty, and what `names` adds to them."""

    def call(solve: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *x: solve(*x[:3], **dict(zip(names[3:], x[3:], strict=True)), **options)

    def full(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of dictionary, signal, penalties of the atoms, ridge and center."""

        def run(*x: Tensor) -> Tensor:
            D, y, lam = x[:3]
            more = dict(zip(names[3:], x[3:], strict=True))
            lam = lam.unsqueeze(-1) * more.get("weights", torch.ones_like(D[..., 0, :]))
            return solve(D, y, lam, more.get("ridge", y.new_zeros(())), more.get("center", torch.zeros_like(lam)))

        return run

    oracle = per_element(_code, (2, 1, 1, 0, 1))
    starved = FISTA(max_steps=1)
    return LayerCase(
        name,
        call(lasso),
        inputs,
        full(oracle),
        event_ndims=ndims,
        names=names,
        layer="lasso",
        source="R. Tibshirani, 1996; derivative: J. Mairal, F. Bach, J. Ponce, 2012, proposition 1",
        unrolled=full(_on_support(oracle)),
        tolerant=call(lasso, on_failure="nan"),
        solution=call(lasso_ex),
        starved=call(lasso, solver=starved),
        starved_solution=call(lasso_ex, solver=starved),
        exact_bits=False,
        **fields,
    )


D = normal(30, 3, 4)
Y = normal(31, 2, 3)
PENALTY = numbers([0.2, 0.4])
TWINS = torch.cat([D[:, :3], D[:, :1]], -1)
CODES: tuple[LayerCase, ...] = (
    _lasso_case(
        "lasso",
        (D, Y, PENALTY),
        (2, 1, 0),
        ("dictionary", "signal", "penalty"),
        representative=True,
        hostile=(
            Hostile("zero signal", (D, 0 * Y, PENALTY)),
            Hostile("zero dictionary", (0 * D, Y, PENALTY)),
            Hostile("an atom of zeros", (D * numbers([1.0, 0.0, 1.0, 1.0]), Y, PENALTY)),
            Hostile("a penalty that shuts all atoms out", (D, Y, 100 * PENALTY)),
            Hostile("huge", (1e9 * D, 1e9 * Y, 1e18 * PENALTY)),
            Hostile("tiny", (1e-9 * D, 1e-9 * Y, 1e-18 * PENALTY)),
            Hostile("atoms of very different length", (D * numbers([1e-6, 1.0, 1e6, 1.0]), Y, PENALTY)),
            Hostile("just at the kink", (numbers([[1.0, 0.0], [0.0, 1.0]]), numbers([0.5, 2.0]), numbers(0.5))),
            Hostile("an atom alone", (numbers([[2.0]]), numbers([3.0]), numbers(0.5))),
            Hostile(
                "equal atoms: no derivative of the code",
                (TWINS, Y, PENALTY),
                SolveError,
                r"lasso \(adjoint\).*SINGULAR",
                fn=lambda *x: torch.autograd.grad(lasso(x[0].requires_grad_(), *x[1:]).sum(), x[0])[0],
            ),
            Hostile("equal atoms: the fit is unique", (TWINS, Y, PENALTY), fn=lambda *x: _fit(TWINS, *x[1:])),
        ),
        wrong=(
            Wrong("negative penalty", (D, Y, -PENALTY), r"penalty: expected at least 0, got -0\.4"),
            Wrong("penalty of every atom", (D, Y, numbers([0.1] * 4)), r"penalty: expected batch dimensions"),
            Wrong(
                "signal of the wrong length", (D, Y[..., :2], PENALTY), r"signal: expected shape \(3,\) .* got \(2,\)"
            ),
            Wrong("no columns", (D[:, :0], Y, PENALTY), r"dictionary: expected at least one row and one column"),
        ),
    ),
    _lasso_case(
        "lasso with a dictionary for each signal",
        (normal(32, 2, 2, 3), normal(33, 2, 2), numbers(0.6), numbers([1.0, 0.5, 2.0])),
        (2, 1, 0, 1),
        ("dictionary", "signal", "penalty", "weights"),
    ),
    _lasso_case(
        "lasso with a ridge",
        (normal(34, 2, 4), normal(35, 2, 2), numbers([0.2, 0.3]), numbers([0.5, 0.1]), normal(36, 4)),
        (2, 1, 0, 0, 1),
        ("dictionary", "signal", "penalty", "ridge", "center"),
    ),
)


def _fit(D: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    return (lasso(D, y, penalty) @ D.mT).sum(-1)


# ------------------------------------------------------------------------------------------------------------ modules


def make_coding() -> SparseCoding:
    """Two features, three atoms, fixed numbers."""
    return _seeded(lambda **where: SparseCoding(2, 3, 0.3, learn_penalty=True, **where))


class _Exact(PredictiveSparseDecomposition):
    """Called, it gives the exact codes."""

    def forward(self, signal: Tensor) -> Tensor:
        return self._codes(signal, super().forward(signal))


def make_decomposition() -> PredictiveSparseDecomposition:
    """The same with an encoder."""
    return _seeded(lambda **where: _Exact(2, 3, 0.4, 0.5, **where))


def _seeded(make: Callable[..., Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(device="cpu", dtype=torch.float64)


def _unit(weight: Tensor) -> Tensor:
    return weight / weight.norm(dim=-2, keepdim=True)


def _coding(weight: Tensor, y: Tensor, log_penalty: Tensor) -> Tensor:
    """The module with numbers from outside."""
    return torch.func.functional_call(CODING, {"weight": weight, "log_penalty": log_penalty}, (y,))


def _coding_oracle(weight: Tensor, y: Tensor, log_penalty: Tensor) -> Tensor:
    return per_element(_code, (2, 1, 0))(_unit(weight), y, log_penalty.exp())


def _decomposition(weight: Tensor, y: Tensor, encoder: Tensor, gain: Tensor) -> Tensor:
    parameters = {"weight": weight, "encoder.weight": encoder, "gain": gain, "encoder.bias": torch.zeros_like(gain)}
    return torch.func.functional_call(DECOMPOSITION, parameters, (y,))


def _decomposition_oracle(weight: Tensor, y: Tensor, encoder: Tensor, gain: Tensor) -> Tensor:
    predicted = gain * torch.tanh((encoder @ y.unsqueeze(-1)).squeeze(-1))
    lam, mu = weight.new_tensor(0.2), weight.new_tensor(0.5)  # half of the paper's objective
    return per_element(_code, (2, 1, 0, 0, 1))(_unit(weight), y, lam, mu, predicted)


CODING, DECOMPOSITION = make_coding(), make_decomposition()
MODULES: tuple[LayerCase, ...] = (
    LayerCase(
        "SparseCoding",
        _coding,
        (normal(37, 2, 3), normal(38, 2, 2), numbers(-1.0)),
        _coding_oracle,
        event_ndims=(2, 1, 0),
        source="J. Mairal, F. Bach, J. Ponce, Task-driven dictionary learning, 2012",
        representative=True,
        make_module=make_coding,
        module_inputs=(normal(38, 2, 2),),
        exact_bits=False,
    ),
    LayerCase(
        "PredictiveSparseDecomposition",
        _decomposition,
        (normal(39, 2, 3), normal(40, 2, 2), normal(41, 3, 2), normal(42, 3)),
        _decomposition_oracle,
        event_ndims=(2, 1, 2, 1),
        source="K. Kavukcuoglu, M. Ranzato, Y. LeCun, 2008: fast inference in sparse coding algorithms",
        representative=True,
        make_module=make_decomposition,
        module_inputs=(normal(40, 2, 2),),
        exempt=dict.fromkeys(
            ("autocast_of_forward", "autocast_of_backward"),
            "the encoder is an ordinary linear layer, which autocast halves on purpose",
        ),
        exact_bits=False,
    ),
)

CASES: tuple[LayerCase, ...] = (*CODES, *MODULES)
