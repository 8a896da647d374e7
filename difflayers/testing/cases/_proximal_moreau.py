"""Cases of the Moreau envelope, the prox of any function, and MoreauGrad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._solution import Solution, SolveError
from difflayers.implicit import LBFGS
from difflayers.proximal import (
    L1,
    GroupL2,
    MoreauGrad,
    moreau_envelope,
    moreau_envelope_ex,
    prox_l1,
    prox_of,
    prox_of_ex,
)
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton
from ._functions import fsolve

X = normal(50, 2, 3)
T = numbers([0.4, 0.9])
W = normal(51, 3)
NDIMS = (1, 0, 1)


# ------------------------------------------------------------------------------------------------ envelope and prox


def wavy(z: Tensor, w: Tensor) -> Tensor:
    """Weakly convex: its second derivative is at least -0.3."""
    return torch.nn.functional.softplus((w * z).sum(-1)) + 0.3 * torch.cos(z).sum(-1)


def stationary(z: Tensor, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """The gradient of the prox objective, by hand."""
    slope = w * torch.sigmoid((w * z).sum(-1, keepdim=True)) - 0.3 * torch.sin(z)
    return t.unsqueeze(-1) * slope + z - x


def _value(z: Tensor, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return wavy(z, w) + (z - x).square().sum(-1) / (2 * t)


def _envelope_by_scipy(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> np.ndarray:
    z = fsolve(stationary, 3)(x, t, w)
    return _value(*(torch.from_numpy(np.array(v)) for v in (z, x, t, w))).numpy()


def _envelope_unrolled(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _value(unrolled_newton(stationary, 3, NDIMS)(x, t, w), x, t, w)


def _run(layer: Callable[..., Any], objective: Callable[..., Tensor] = wavy, **options: Any) -> Callable[..., Any]:
    return lambda x, t, w: layer(objective, x, t, (w,), **{"arg_ndims": (1,), **options})


def _alone(solution: Callable[..., Any]) -> Callable[..., Solution[Tensor]]:
    """The envelope of the pair."""

    def fn(*args: Tensor) -> Solution[Tensor]:
        found = solution(*args)
        return replace(found, value=found.value.envelope)

    return fn


def _captured(layer: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(lambda z, w: wavy(z, w) + (z * x).sum(-1), torch.zeros_like(x.detach()), 0.5, (W.to(x),))


def _concave(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """-z^2: no envelope for steps from 1/2 on; the start is its maximum where x is zero."""
    return moreau_envelope(lambda z: -z.square().sum(-1), x, t)


def weighted_l1(z: Tensor, w: Tensor) -> Tensor:
    """Not smooth."""
    return (w.abs() * z.abs()).sum(-1)


def _huber(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """The envelope of :func:`weighted_l1` in closed form."""
    a, bound = w.abs(), t.unsqueeze(-1)
    inside = x.abs() <= a * bound
    return torch.where(inside, x.square() / (2 * bound), a * x.abs() - bound * a.square() / 2).sum(-1)


def _soft(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return prox_l1(x, t, weights=w.abs())


STARVED = LBFGS(max_steps=1)
NO_SOLVE = {"solves_are_traced": "the first derivative of an envelope needs no linear solve"}
SOURCE = "N. Parikh, S. Boyd, Proximal Algorithms, 2014"
SCALES = (
    Hostile("zero", (0 * X, T, W)),
    Hostile("tiny step", (X, 1e-9 * T, W)),
    Hostile("far away", (1e6 * X, T, W)),
    Hostile("ties", (torch.ones_like(X), T, torch.ones_like(W))),
)
WRONG = (
    Wrong("negative step", (X, -T, W), "t: expected"),
    Wrong("steps of another batch", (X, numbers([1.0, 1.0, 1.0]), W), "t: expected batch dimensions"),
)

ENVELOPES = (
    LayerCase(
        "moreau_envelope",
        _run(moreau_envelope),
        (X, T, W),
        per_element(_envelope_by_scipy, NDIMS),
        event_ndims=NDIMS,
        names=("x", None, r"args[0]"),
        source=SOURCE + ", section 3.1",
        representative=True,
        unrolled=_envelope_unrolled,
        tolerant=_run(moreau_envelope, on_failure="nan"),
        solution=_alone(_run(moreau_envelope_ex)),
        starved=_run(moreau_envelope, solver=STARVED),
        starved_solution=_alone(_run(moreau_envelope_ex, solver=STARVED)),
        captured=_captured(moreau_envelope),
        hostile=(
            *SCALES,
            Hostile("not weakly convex enough", (X, T + 0.2, W), SolveError, "UNBOUNDED", _concave),
            Hostile("started at a maximum", (0 * X, T + 0.2, W), SolveError, "UNBOUNDED", _concave),
        ),
        wrong=(*WRONG, Wrong("no step", (X, 0 * T, W), "t: expected more than 0, got 0")),
        exempt=NO_SOLVE,
    ),
    LayerCase(
        "moreau_envelope undeclared",
        _run(moreau_envelope, arg_ndims=None),
        (X, T, W),
        per_element(_envelope_by_scipy, NDIMS),
        event_ndims=NDIMS,
        unrolled=_envelope_unrolled,
        source=SOURCE + ", section 3.1",
    ),
    LayerCase(
        "moreau_envelope of a known prox",
        _run(moreau_envelope, weighted_l1, prox=_soft),
        (X, T, W),
        _huber,
        event_ndims=NDIMS,
        unrolled=_huber,
        source=SOURCE + ", section 6.5.2",
        hostile=(
            Hostile("zero", (0 * X, T, W)),
            Hostile("huge", (1e9 * X, 1e9 * T, W)),
            Hostile("tiny", (1e-9 * X, 1e-9 * T, W)),
        ),
        wrong=(Wrong("no step", (X, 0 * T, W), "t: expected more than 0, got 0"),),
    ),
    LayerCase(
        "prox_of",
        _run(prox_of),
        (X, T, W),
        per_element(fsolve(stationary, 3), NDIMS),
        (stationary,),
        event_ndims=NDIMS,
        names=("x", None, r"args[0]"),
        source=SOURCE + ", section 1.1",
        representative=True,
        unrolled=unrolled_newton(stationary, 3, NDIMS),
        tolerant=_run(prox_of, on_failure="nan"),
        solution=_run(prox_of_ex),
        starved=_run(prox_of, solver=STARVED),
        starved_solution=_run(prox_of_ex, solver=STARVED),
        captured=_captured(prox_of),
        hostile=(*SCALES, Hostile("no step", (X, 0 * T, W))),
        wrong=WRONG,
    ),
)

# ------------------------------------------------------------------------------------------------------- MoreauGrad

IMAGES = normal(52, 2, 3)
WEIGHT = normal(53, 2, 3)
STEP = 0.8


class Score(nn.Module):
    """Sum of softplus units: convex, and its curvature is at most a quarter of the squared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x: Tensor) -> Tensor:
        """One score for each image."""
        return torch.nn.functional.softplus(x.flatten(1) @ self.weight.mT).sum(-1)


class _Ex(nn.Module):
    """Lets ``functional_call`` reach ``forward_ex``."""

    def __init__(self, layer: MoreauGrad) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Solution[Tensor]:
        """The unchecked solution."""
        return self.layer.forward_ex(x)


def _layer(penalty: Any, **options: Any) -> MoreauGrad:
    return MoreauGrad(Score(), penalty, t=STEP, noise=0.0, event_ndim=1, **options)


def _called(penalty: Any, **options: Any) -> Callable[..., Tensor]:
    layer = _layer(penalty, **options)
    return lambda x, w: functional_call(layer, {"model.weight": w}, (x,))


def _called_ex(penalty: Any, **options: Any) -> Callable[..., Solution[Tensor]]:
    layer = _Ex(_layer(penalty, **options))
    return lambda x, w: functional_call(layer, {"layer.model.weight": w}, (x,))


def _by_short_steps(shrink: Callable[[np.ndarray, float], np.ndarray]) -> Callable[..., np.ndarray]:
    """Proximal gradient with one safe step length, far beyond convergence."""

    def solve(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        step = float(1 / (np.linalg.norm(w, 2) ** 2 / 4 + 1 / STEP))
        d = np.zeros_like(x)
        for _ in range(3000):
            slope = w.T @ (1 + np.tanh(w @ (x + d) / 2)) / 2 + d / STEP
            d = shrink(d - step * slope, step)
        return -d / STEP

    return solve


def _soft_numpy(v: np.ndarray, step: float) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - 0.25 * step, 0)


def _blocks_numpy(v: np.ndarray, step: float) -> np.ndarray:
    parts = (v[:2], v[2:])  # the last one is cut
    return np.concatenate([p * np.maximum(1 - 0.15 * step / np.linalg.norm(p), 0) for p in parts])


def _saliency(name: str, penalty: Any, shrink: Callable[..., Any], **fields: Any) -> LayerCase:
    return LayerCase(
        name,
        _called(penalty),
        (IMAGES, WEIGHT),
        per_element(_by_short_steps(shrink), (1, 2)),
        event_ndims=(1, 2),
        source="J. Zhang, F. Farnia, MoreauGrad, ICCV 2023",
        tolerant=_called(penalty, on_failure="nan"),
        solution=_called_ex(penalty),
        starved=_called(penalty, max_steps=1),
        starved_solution=_called_ex(penalty, max_steps=1),
        **fields,
    )


SALIENCY = (
    _saliency("MoreauGrad", None, lambda v, step: v),
    _saliency(
        "MoreauGrad L1",
        L1(0.25),
        _soft_numpy,
        representative=True,
        make_module=partial(_layer, L1(0.25)),
        module_inputs=(IMAGES,),
        hostile=(
            Hostile("zero", (0 * IMAGES, WEIGHT)),
            Hostile("a penalty that leaves nothing", (IMAGES, 1e-3 * WEIGHT)),
            Hostile("far away", (1e3 * IMAGES, WEIGHT)),
        ),
        wrong=(
            Wrong("an image without dimensions", (IMAGES[0, 0], WEIGHT), "x: expected at least 1 dim"),
            Wrong(
                "a class that does not exist",
                (IMAGES, WEIGHT),
                "target: expected classes in 0..2",
                lambda x, w: MoreauGrad(nn.Identity(), noise=0.0, event_ndim=1)(x, 4),
            ),
            Wrong(
                "negative weight", (IMAGES, WEIGHT), "weight: expected", lambda x, w: MoreauGrad(Score(), L1(-1.0))(x)
            ),
            Wrong("no step", (IMAGES, WEIGHT), "t: expected more than 0", lambda x, w: MoreauGrad(Score(), t=0.0)(x)),
        ),
    ),
    _saliency("MoreauGrad GroupL2", GroupL2(0.15, 2), _blocks_numpy),
)

CASES: tuple[LayerCase, ...] = (*ENVELOPES, *SALIENCY)
