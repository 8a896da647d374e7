"""Cases of spectral risk, of label-robust losses and of feasible learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.conic import (
    KL,
    ChiSquare,
    Divergence,
    FeasibleLearning,
    LabelRobustLoss,
    esrm,
    extremile,
    label_robust_loss,
    spectral_risk,
    spectral_risk_weights,
    superquantile,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element

__all__ = ["CASES"]

RISK = "R. Mehta et al., Distributionally Robust Optimization with Bias and Variance Reduction, 2024"
LABELS = "D. Zhu, Y. Ying, T. Yang, Label Distributionally Robust Losses for Multi-class Classification, 2023"
FEASIBLE = "J. Ramirez et al., Feasible Learning, 2025"

Weigh = Callable[[np.ndarray, np.ndarray, float], tuple[float, np.ndarray]]


# -------------------------------------------------------------------------------------------------------- spectral risk


def _pooled(kind: type[Divergence]) -> Weigh:
    """Risk and weights by pooling adjacent violators one after the other."""

    def solve(losses: np.ndarray, sigma: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        n, q = len(losses), np.empty(len(losses))
        scale = 2 * n * strength if kind is ChiSquare else strength
        order = np.argsort(losses, kind="stable")

        def value(block: list[int]) -> float:
            x, total = losses[order[block]], sigma[block].sum()
            if kind is ChiSquare:
                return float(x.mean() - scale * total / len(block))
            spread = np.log(np.exp((x - x.max()) / scale).sum() / total) if total > 0 else np.inf
            return float(x.max() + scale * spread)

        blocks: list[list[int]] = []
        for i in range(n):
            blocks.append([i])
            while len(blocks) > 1 and value(blocks[-2]) > value(blocks[-1]):
                last = blocks.pop()
                blocks[-1] = blocks[-1] + last
        for block in blocks:
            x, total = losses[order[block]], sigma[block].sum()
            if kind is ChiSquare:
                q[order[block]] = total / len(block) + (x - x.mean()) / scale
            else:
                e = np.exp((x - x.max()) / scale)
                q[order[block]] = total * e / e.sum()
        if kind is ChiSquare:
            return float(q @ losses - strength * n * ((q - 1 / n) ** 2).sum()), q
        return float(q @ losses - strength * (q * np.log(n * np.maximum(q, 1e-300))).sum()), q

    return solve


def _sorted_mean(losses: np.ndarray) -> np.ndarray:
    return np.asarray(np.sort(losses) @ extremile(2.5).weights(len(losses), dtype=torch.float64).numpy())


def _risk_case(name: str, kind: type[Divergence], part: int, **fields: Any) -> LayerCase:
    """A case with losses, strength and spectrum as inputs; `part` 0: the risk, 1: its weights."""
    layer = spectral_risk_weights if part else spectral_risk

    def fn(losses: Tensor, strength: Tensor, sigma: Tensor) -> Tensor:
        return layer(losses, sigma, penalty=kind(strength))

    solve = _pooled(kind)
    losses, strength, sigma = normal(50, 2, 6), numbers([0.03, 0.3]), esrm(2.0).weights(6, dtype=torch.float64)
    return LayerCase(
        name,
        fn,
        (losses, strength, sigma),
        per_element(lambda x, nu, w: np.asarray(solve(x, w, float(nu))[part]), (1, 0, 1)),
        event_ndims=(1, 0, 1),
        names=("losses", "strength", "spectrum"),
        layer=layer.__name__,
        source=RISK,
        **fields,
    )


WIDE = normal(51, 2, 5)
TIES = numbers([[1.0, 2.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
SCALES = {
    "zero": (0 * WIDE, 0.1),
    "ties": (TIES, 0.1),
    "huge": (1e9 * WIDE, 1e8),
    "tiny": (1e-9 * WIDE, 1e-10),
    "strong": (WIDE, 1e6),
    "weak": (WIDE, 1e-9),
}
HOSTILE = (
    *(
        Hostile(f"{what}, {spectrum}", (losses, numbers(strength), spectrum.weights(5, dtype=torch.float64)))
        for what, (losses, strength) in SCALES.items()
        for spectrum in (esrm(2.0), superquantile(0.5))
    ),
    Hostile("one loss", (numbers([[2.0], [-1.0]]), numbers(0.1), numbers([1.0]))),
)
RISKS: tuple[LayerCase, ...] = (
    *(
        _risk_case(
            f"spectral_risk {kind.__name__}",
            kind,
            0,
            representative=kind is ChiSquare,
            hostile=HOSTILE,
            wrong=(
                Wrong("a weight too few", (WIDE, numbers(0.1), numbers([0.5, 0.5])), r"spectrum: expected 5 weights"),
                Wrong("falling", (WIDE, numbers(0.1), numbers([0.6, 0.1, 0.1, 0.1, 0.1])), r"spectrum: .* do not fall"),
                Wrong("negative strength", (WIDE, numbers(-0.1), numbers([0.2] * 5)), r"strength: expected at least 0"),
                Wrong("strengths", (WIDE, numbers([0.1] * 3), numbers([0.2] * 5)), r"strength: expected batch"),
            ),
        )
        for kind in (ChiSquare, KL)
    ),
    *(
        _risk_case(f"spectral_risk_weights {kind.__name__}", kind, 1, representative=kind is ChiSquare)
        for kind in (ChiSquare, KL)
    ),
    LayerCase(
        "spectral_risk without penalty",
        lambda losses: spectral_risk(losses, extremile(2.5)),
        (normal(52, 3, 5),),
        per_element(_sorted_mean, (1,)),
        names=("losses",),
        source=RISK,
        hostile=(
            Hostile("ties", (TIES,)),
            Hostile("huge", (1e9 * WIDE,)),
            Hostile("tiny", (1e-9 * WIDE,)),
        ),
        wrong=(Wrong("no loss", (WIDE[:, :0],), r"losses: expected at least one loss"),),
    ),
)


# -------------------------------------------------------------------------------------------------- label-robust losses


def _robust(d: np.ndarray, temperature: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Class 1 is the target."""
    d = d - d[1] + margin
    d[1] = 0.0
    if temperature == 0:
        return np.asarray(d.max())
    return np.asarray(d.max() + temperature * np.log(np.exp((d - d.max()) / temperature).mean()))


def _adaptive(d: np.ndarray, peak: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The best of a dense grid of temperatures, refined three times around its best point."""
    d, log_k = (d - d[1]) / peak, math.log(len(d))
    low, high, best = 1e-3, 2.0, -np.inf
    for _ in range(12):
        grid = np.linspace(low, high, 2001)
        fixed = d.max() + grid * np.log(np.exp((d - d.max()) / grid[:, None]).mean(-1))
        values = fixed - a * log_k / 2 * (grid - 1) ** 2
        k, best = int(values.argmax()), float(values.max())
        low, high = grid[max(k - 1, 0)], grid[min(k + 1, 2000)]
    return np.asarray(peak * best)


def _targets(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _loss(**fixed: Any) -> Callable[..., Tensor]:
    """The loss of class 1, with tensors for the options in `names`."""
    names = fixed.pop("names")

    def fn(logits: Tensor, *options: Tensor) -> Tensor:
        options_by_name = dict(zip(names, options, strict=True))
        return label_robust_loss(logits, _targets(logits), reduction="none", **options_by_name, **fixed)

    return fn


LOGITS = 2 * normal(53, 3, 4)
FIXED = _loss(names=("temperature", "margin"))
ADAPTIVE = _loss(names=("temperature", "adaptive"))
LOSSES: tuple[LayerCase, ...] = (
    LayerCase(
        "label_robust_loss LDR",
        FIXED,
        (LOGITS, numbers([0.3, 1.0, 20.0]), normal(54, 4)),
        per_element(_robust, (1, 0, 1)),
        event_ndims=(1, 0, 1),
        names=("logits", "temperature", "margin"),
        layer="label_robust_loss",
        source=LABELS,
        representative=True,
        make_module=lambda: LabelRobustLoss(temperature=0.5, margin=1.0),
        module_inputs=(LOGITS, torch.ones(3, dtype=torch.int64, device="cpu")),
        exempt={"module_learns": "a loss has no parameters, so there is nothing that could get a gradient"},
        hostile=(
            Hostile("hinge", (LOGITS, numbers(0.0), numbers([1.0] * 4))),
            Hostile("huge logits", (1e9 * LOGITS, numbers(1.0), numbers([1.0] * 4))),
            Hostile("tiny", (1e-9 * LOGITS, numbers(1e-9), numbers([0.0] * 4))),
            Hostile("cold", (LOGITS, numbers(1e-9), numbers([1.0] * 4))),
            Hostile("equal logits", (0 * LOGITS, numbers(0.0), numbers([0.0] * 4))),
            Hostile("one class", (LOGITS[:, :2], numbers(0.5), numbers([0.0] * 2))),
        ),
        wrong=(
            Wrong("negative", (LOGITS, numbers(-1.0), numbers([0.0] * 4)), r"temperature: expected at least 0"),
            Wrong("margins", (LOGITS, numbers(1.0), numbers([0.0] * 3)), r"margin: expected a shape that broadcasts"),
            Wrong("too few classes", (LOGITS[:, :1], numbers(1.0), numbers([0.0])), r"targets: expected integers from"),
        ),
    ),
    LayerCase(
        "label_robust_loss ALDR",
        ADAPTIVE,
        (LOGITS, numbers([0.3, 1.0, 20.0]), numbers([1.2, 2.0, 5.0])),
        per_element(_adaptive, (1, 0, 0)),
        event_ndims=(1, 0, 0),
        names=("logits", "temperature", "adaptive"),
        layer="label_robust_loss",
        source=LABELS,
        hostile=(
            Hostile("huge logits", (1e9 * LOGITS, numbers(1.0), numbers(2.0))),
            Hostile("huge", (1e9 * LOGITS, numbers(1e9), numbers(1.3))),
            Hostile("tiny", (1e-9 * LOGITS, numbers(1e-9), numbers(1.3))),
            Hostile("equal logits", (0 * LOGITS, numbers(1.0), numbers(2.0))),
            Hostile("hardly adaptive", (LOGITS, numbers(1.0), numbers(1e9))),
        ),
        wrong=(
            Wrong("zero", (LOGITS, numbers(0.0), numbers(2.0)), r"temperature: expected more than 0"),
            Wrong("one", (LOGITS, numbers(1.0), numbers(1.0)), r"adaptive: expected more than 1, got 1"),
        ),
    ),
)


# ---------------------------------------------------------------------------------------------------- feasible learning


def _constraints(**options: Any) -> FeasibleLearning:
    """Three samples with known multipliers, in evaluation mode."""
    with torch.device("cpu"):
        module = FeasibleLearning(3, tolerance=0.5, dual_lr=0.1, **options).double().eval()
    module.multipliers.copy_(numbers([0.0, 0.5, 2.0]))
    return module


def _weigh(losses: Tensor) -> Tensor:
    index = torch.tensor([2, 0, 1, 2], device=losses.device).expand(losses.shape)
    return _constraints(reduction="none").to(losses.device)(losses, index)


FEASIBILITY: tuple[LayerCase, ...] = (
    LayerCase(
        "FeasibleLearning",
        _weigh,
        (normal(55, 2, 4),),
        lambda losses: losses * numbers([2.0, 0.0, 0.5, 2.0]).to(losses),
        names=("losses",),
        source=FEASIBLE,
        representative=True,
        make_module=_constraints,
        module_inputs=(normal(56, 4), torch.tensor([0, 2, 2, 1], device="cpu")),
        exempt={"module_learns": "multipliers are a buffer that the forward pass updates, not parameters"},
        wrong=(
            Wrong(
                "index of another shape",
                (normal(55, 2, 4),),
                r"index: expected shape \(2, 4\)",
                lambda losses: _constraints()(losses, torch.tensor([0, 1], device=losses.device)),
            ),
            Wrong(
                "no such sample",
                (normal(55, 2),),
                r"index: expected numbers from 0 to 2, got 0 to 3",
                lambda losses: _constraints()(losses, torch.tensor([0, 3], device=losses.device)),
            ),
        ),
    ),
)

CASES: tuple[LayerCase, ...] = (*RISKS, *LOSSES, *FEASIBILITY)
