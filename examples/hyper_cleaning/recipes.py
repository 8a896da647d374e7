"""Every method of the table: how two settings make it, which values of them there are, and which were chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difflayers.bilevel import (
    BAMM,
    BOME,
    BOREP,
    F2SA,
    GPBGD,
    HOAG,
    LVHBA,
    MAID,
    MEHA,
    SABA,
    SOBA,
    VPBGD,
    Exponential,
    ImplicitSGD,
    PenaltyMethod,
    Power,
    Smoothness,
)

from .data import CLEANING, RIDGE, coupled
from .double_loop import ImplicitGradient, Unrolling

RATE = 2.0  # of the lower problem, whose largest curvature is about a half
BLOCKS = 4  # of the data, for methods that are made for batches

Values = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """A method, its settings, and the choice among all pairs of them on another draw of the data.

    Attributes:
        group: Panel of the figure.
        make: ``make(x, y, first, second)``: the method from a start.
        first: Values of the first setting.
        second: Values of the second setting.
        chosen: Those of the table, from ``plot_hyper_cleaning.py --tune``.
        batches: Works on random blocks of the data.
    """

    group: str
    make: Callable[[Tensor, Tensor, float, float], Any]
    first: Values
    second: Values
    chosen: tuple[float, float]
    batches: bool = False

    def weights(self, x: Any, settings: tuple[float, float]) -> Tensor:
        """What the sigmoid gets."""
        return (settings[1] * len(x["weights"])) ** 0.5 * x["weights"] if isinstance(x, dict) else x


# A sample has a share of 1/n in the lower objective, and so have its gradients: steps of x are multiples of n.


def implicit_gradient(x: Tensor, y: Tensor, step: float, rtol: float) -> ImplicitGradient:
    return ImplicitGradient(CLEANING, x, y, step=step * len(x), rtol=rtol)


def unrolling(x: Tensor, y: Tensor, step: float, steps: float) -> Unrolling:
    return Unrolling(CLEANING, x, y, step=step * len(x), step_lower=RATE, inner_steps=int(steps))


def hoag(x: Tensor, y: Tensor, tolerance: float, rate: float) -> HOAG:
    return HOAG(CLEANING, x, y, tolerances=Exponential(tolerance, rate))


def maid(x: Tensor, y: Tensor, step: float, epsilon: float) -> MAID:
    known = Smoothness(strong_convexity=RIDGE, upper_in_x=0.0)
    return MAID(CLEANING, x, y, smoothness=known, step=step * len(x), epsilon=epsilon, delta=RIDGE * epsilon)


def implicit_sgd(x: Tensor, y: Tensor, step: float, steps: float) -> ImplicitSGD:
    return ImplicitSGD(CLEANING, x, y, step=step * len(x), step_lower=RATE, inner_steps=int(steps))


def soba(x: Tensor, y: Tensor, step: float, rate: float) -> SOBA:
    return SOBA(CLEANING, x, y, step=step * len(x), step_lower=rate)


def saba(x: Tensor, y: Tensor, step: float, rate: float) -> SABA:
    return SABA(CLEANING, x, y, upper_blocks=BLOCKS, lower_blocks=BLOCKS, step=step * len(x), step_lower=rate)


def borep(x: Tensor, y: Tensor, step: float, rate: float) -> BOREP:
    step = Power(step * len(x) ** 0.5, -0.5)
    return BOREP(CLEANING, x, y, step=step, step_lower=rate, step_adjoint=rate, epochs=0)


def bamm(x: Tensor, y: Tensor, step: float, mixing: float) -> BAMM:
    mu = Power(mixing, -0.25)
    return BAMM(CLEANING, x, y, step=step * len(x), step_lower=RATE, step_adjoint=RATE, mixing=mu)


def f2sa(x: Tensor, y: Tensor, step: float, ratio: float) -> F2SA:
    return F2SA(CLEANING, x, y, step=Power(step, -1 / 3), step_lower=RATE, ratio=ratio * len(x))


def f3sa(x: Tensor, y: Tensor, step: float, ratio: float) -> F2SA:
    momentum = Power(1.0, -0.5)
    return F2SA(CLEANING, x, y, step=Power(step, -1 / 3), step_lower=RATE, ratio=ratio * len(x), momentum=momentum)


def penalty(x: Tensor, y: Tensor, weight: float, step: float) -> PenaltyMethod:
    return PenaltyMethod(CLEANING, x, y, weight=Power(weight, -1 / 5), step=step * len(x), step_lower=RATE)


def vpbgd(x: Tensor, y: Tensor, gamma: float, ratio: float) -> VPBGD:
    return VPBGD(CLEANING, x, y, penalty=gamma, step=RATE, step_lower=RATE, ratio=ratio * len(x))


def gpbgd(x: Tensor, y: Tensor, gamma: float, ratio: float) -> GPBGD:
    return GPBGD(CLEANING, x, y, penalty=gamma, step=RATE, ratio=ratio * len(x))


def bome(x: Tensor, y: Tensor, step: float, ratio: float) -> BOME:
    return BOME(CLEANING, x, y, step=step, step_lower=RATE, ratio=ratio * len(x))


def meha(x: Tensor, y: Tensor, c: float, step: float) -> MEHA:
    return MEHA(
        CLEANING,
        x,
        y,
        step=step * len(x),
        step_lower=RATE,
        step_theta=RATE,
        proximal=10.0,
        penalty=Power(c, 0.3),
    )


def lvhba(x: Tensor, y: Tensor, c: float, ratio: float) -> LVHBA:
    start = {"weights": x, "radius": torch.linalg.vector_norm(y)}
    problem = coupled((ratio * len(x)) ** 0.5)
    return LVHBA(problem, start, y, step=0.4, step_inner=0.6, proximal=(2.0, 2.0), penalty=Power(c, 0.3))


LOOPS, SYSTEM, PENALTY, VALUE = "two loops", "one loop, linear system", "one loop, penalty", "one loop, value function"

RECIPES = {
    "implicit gradient": Recipe(LOOPS, implicit_gradient, (2.0, 6.0, 20.0), (0.1, 0.01, 0.001), (6.0, 0.1)),
    "unrolling": Recipe(LOOPS, unrolling, (6.0, 20.0, 60.0), (5, 20, 80), (20.0, 20)),
    "HOAG": Recipe(LOOPS, hoag, (0.1, 0.01, 0.001), (0.8, 0.9, 0.97), (0.1, 0.8)),
    "MAID": Recipe(LOOPS, maid, (1.0, 3.0, 10.0), (1.0, 10.0, 100.0), (10.0, 100.0)),
    "ImplicitSGD": Recipe(LOOPS, implicit_sgd, (6.0, 20.0, 60.0), (5, 10, 20), (20.0, 10)),
    "SOBA": Recipe(SYSTEM, soba, (0.2, 0.8, 3.0), (0.5, 1.0, 2.0), (3.0, 1.0)),
    "SABA": Recipe(SYSTEM, saba, (0.05, 0.2, 0.8), (0.1, 0.2, 0.5), (0.2, 0.2), True),
    "BOREP": Recipe(SYSTEM, borep, (0.3, 1.0, 3.0), (0.2, 0.5, 1.0), (0.3, 0.2), True),
    "BAMM": Recipe(SYSTEM, bamm, (0.2, 0.8, 3.0), (0.03, 0.1, 0.3), (0.8, 0.1)),
    "F2SA": Recipe(PENALTY, f2sa, (2.0, 4.0, 8.0), (0.3, 1.0, 3.0), (4.0, 1.0)),
    "F3SA": Recipe(PENALTY, f3sa, (2.0, 4.0, 8.0), (0.1, 0.3, 1.0), (4.0, 0.3), True),
    "PenaltyMethod": Recipe(PENALTY, penalty, (0.1, 0.3, 1.0), (0.2, 0.5, 1.0), (0.3, 0.5)),
    "VPBGD": Recipe(PENALTY, vpbgd, (1.0, 5.0, 20.0), (0.3, 1.0, 3.0), (5.0, 1.0)),
    "GPBGD": Recipe(PENALTY, gpbgd, (1.0, 3.0, 10.0), (10.0, 100.0, 1000.0), (3.0, 100.0)),
    "BOME": Recipe(VALUE, bome, (1.0, 2.0, 4.0), (3.0, 30.0, 300.0), (2.0, 30.0)),
    "MEHA": Recipe(VALUE, meha, (0.5, 2.0, 8.0), (3.0, 10.0, 30.0), (2.0, 10.0)),
    "LVHBA": Recipe(VALUE, lvhba, (0.03, 0.1, 0.3), (10.0, 30.0, 100.0), (0.03, 100.0)),
}
