"""What the benchmark of proximal operators compares: the operators that treat every entry alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import proximal_peers as peers
from benchmarks.proximal_oracles import Oracle, by_differences, by_grid
from benchmarks.proximal_peers import Map, numpy_entries
from difflayers import proximal

BATCH, N = 1024, 256
SIDE = 16
ROWS = 8  # that the oracles compute
T = 0.7


@dataclass(frozen=True)
class Problem:
    """One operator, ways to compute it, and what it should return.

    Attributes:
        name: That of our function.
        ours: Our function with its parameters.
        x: The input.
        oracle: Result and derivative for a few rows.
        peers: Differentiable ways.
        forward_only: Ways without a gradient.
    """

    name: str
    ours: Map
    x: Tensor
    oracle: Oracle
    peers: dict[str, Map] = field(default_factory=dict)
    forward_only: dict[str, Map] = field(default_factory=dict)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """On the default device, but the same numbers on each."""
    x = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device())


def on_entries() -> Iterator[Problem]:
    """Operators that treat every entry alike."""
    from pyproximal import L0, L1, SCAD, Huber

    deepinv = peers.deepinv_optim()
    X = 2 * normal(BATCH, N)
    label, count = normal(BATCH, N, seed=1).sign(), normal(BATCH, N, seed=2).abs().mul(3).round()
    label_, count_ = (a[:ROWS].double().cpu().numpy() for a in (label, count))
    absolute, sign = np.abs, np.sign
    yield Problem(
        "prox_l1",
        lambda x: proximal.prox_l1(x, T),
        X,
        by_grid(absolute, sign, T),
        {
            "torch": partial(peers.shrink, t=T),
            "torch softshrink": partial(F.softshrink, lambd=T),
            "deepinv": lambda x: deepinv.L1Prior().prox(x, gamma=T),
        },
        {"pyproximal": numpy_entries(lambda x: L1().prox(x, T))},
    )
    yield Problem(
        "prox_nonnegative_l1",
        lambda x: proximal.prox_nonnegative_l1(x, T),
        X,
        by_grid(absolute, sign, T, lowest=0.0),
        {"torch": lambda x: torch.relu(x - T)},
    )
    yield Problem(
        "prox_squared_l2",
        lambda x: proximal.prox_squared_l2(x, T),
        X,
        by_grid(lambda z: z**2 / 2, lambda z: z, T),
        {"torch": lambda x: x / (1 + T), "deepinv": lambda x: deepinv.Tikhonov().prox(x, gamma=T)},
    )
    yield Problem(
        "prox_l0",
        lambda x: proximal.prox_l0(x, T),
        X,
        by_grid(lambda z: (z != 0) * 1.0, lambda z: 0 * z, T),
        {"torch": partial(peers.keep_large, t=T)},
        {"pyproximal": numpy_entries(lambda x: L0().prox(x, T))},
    )
    yield Problem(
        "prox_elastic_net",
        lambda x: proximal.prox_elastic_net(x, T, l2=0.5),
        X,
        by_grid(lambda z: absolute(z) + z**2 / 4, lambda z: sign(z) + z / 2, T),
        {"torch": lambda x: peers.shrink(x, T) / (1 + T * 0.5)},
    )
    yield Problem(
        "prox_huber",
        lambda x: proximal.prox_huber(x, T, delta=0.5),
        X,
        by_grid(lambda z: np.where(absolute(z) <= 0.5, z**2, absolute(z) - 0.25), lambda z: np.clip(z / 0.5, -1, 1), T),
        {"torch": partial(peers.huber, t=T, width=0.5)},
        {"pyproximal": numpy_entries(lambda x: Huber(0.5).prox(x, T))},
    )
    yield Problem(
        "prox_log",
        lambda x: proximal.prox_log(x, T, eps=0.5),
        X,
        by_grid(lambda z: np.log(0.5 + absolute(z)), lambda z: sign(z) / (0.5 + absolute(z)), T),
        {"torch": partial(peers.log_penalty, t=T, eps=0.5)},
        {"pyproximal": numpy_entries(lambda x: pyproximal_log(x, T, 0.5))},
    )
    yield Problem(
        "prox_scad",
        lambda x: proximal.prox_scad(x, T),
        X,
        by_grid(scad_value, scad_slope, T),
        {"torch": partial(peers.scad, t=T, penalty=1.0, c=3.7)},
        {"pyproximal": numpy_entries(lambda x: SCAD(1.0, 3.7).prox(x, T))},
    )
    yield Problem(
        "prox_mcp",
        lambda x: proximal.prox_mcp(x, T),
        X,
        by_grid(
            lambda z: np.where(absolute(z) <= 3, absolute(z) - z**2 / 6, 1.5),
            lambda z: sign(z) * np.maximum(1 - absolute(z) / 3, 0),
            T,
        ),
        {"torch": partial(peers.mcp, t=T, penalty=1.0, c=3.0)},
    )
    yield Problem(
        "prox_hinge",
        lambda x: proximal.prox_hinge(x, T, label),
        X,
        by_grid(lambda z: np.maximum(1 - label_ * z, 0), lambda z: -label_sign(label_, z), T),
        {"torch": partial(peers.hinge, t=T, label=label)},
    )
    yield Problem(
        "prox_logistic",
        lambda x: proximal.prox_logistic(x, T, label),
        X,
        by_grid(lambda z: np.logaddexp(0, -label_ * z), lambda z: -label_ / (1 + np.exp(label_ * z)), T),
        {
            "torch, Newton unrolled": partial(peers.logistic, t=T, label=label),
            "deepinv default prox": deepinv_default(lambda z: F.softplus(-label * z).sum(-1), T),
        },
    )
    yield Problem(
        "prox_entropy",
        lambda x: proximal.prox_entropy(x, T),
        X,
        by_grid(lambda z: z * np.log(z), lambda z: 1 + np.log(z), T, lowest=0.0),
        {"torch, Newton unrolled": partial(peers.entropy, t=T)},
    )
    yield Problem(
        "prox_poisson",
        lambda x: proximal.prox_poisson(x, T, count),
        X,
        by_grid(lambda z: z - np.where(count_ > 0, count_ * np.log(z), 0), lambda z: 1 - count_ / z, T, lowest=0.0),
        {
            "torch": partial(peers.poisson, t=T, count=count),
            "deepinv": lambda x: deepinv.PoissonLikelihood(bkg=0.0, denormalize=False).d.prox(x, count, gamma=T),
        },
    )
    for name, ours, way in (
        ("project_box", lambda x: proximal.project_box(x, -0.5, 1.0), lambda x: x.clamp(-0.5, 1.0)),
        ("project_linf_ball", lambda x: proximal.project_linf_ball(x, 1.0), lambda x: x.clamp(-1.0, 1.0)),
        ("project_nonnegative", lambda x: proximal.project_nonnegative(x), torch.relu),
    ):
        low, high = {"project_box": (-0.5, 1.0), "project_linf_ball": (-1.0, 1.0)}.get(name, (0.0, np.inf))
        yield Problem(name, ours, X, by_differences(partial(np.clip, a_min=low, a_max=high)), {"torch": way})


def pyproximal_log(x: np.ndarray, t: float, eps: float) -> np.ndarray:
    """Its penalty is `log(z / eps + 1)` with another factor."""
    from pyproximal import Log

    return Log(sigma=np.log(1 / eps + 1), gamma=1 / eps).prox(x, t)


def scad_value(z: np.ndarray) -> np.ndarray:
    a, c = np.abs(z), 3.7
    return np.where(a <= 1, a, np.where(a <= c, (2 * c * a - a**2 - 1) / (2 * (c - 1)), (c + 1) / 2))


def scad_slope(z: np.ndarray) -> np.ndarray:
    return np.sign(z) * np.clip((3.7 - np.abs(z)) / 2.7, 0, 1)


def label_sign(label: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.where(label * z < 1, label, 0)


def deepinv_default(g: Callable[[Tensor], Tensor], t: float) -> Map:
    """What deepinv does with a function it has no formula for: 50 steps of gradient descent."""
    deepinv = peers.deepinv_optim()
    prior = deepinv.Prior(g=g)
    return lambda x: prior.prox(x, gamma=t)
