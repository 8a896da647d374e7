"""Cases of learned proximal networks: the prox, its inverse, its prior, and restoration with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._checks import compute_dtype
from difflayers._solution import Solution
from difflayers.implicit import LBFGS
from difflayers.proximal import InputConvexNetwork, LearnedProximal, ProximalGradient, restore
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, numbers, per_element, unrolled_newton
from ._functions import act, fsolve

SOURCE = "Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks, ICLR 2024"
BETA, MU, STEP = 2.0, 0.25, 0.4
X, SKIP, FREE = normal(31, 3, 2), normal(32, 3, 2), normal(33, 3, 3)
AUTOCAST = {
    "autocast_of_backward": "the prox is plain torch, whose backward follows the autocast mode that it is run under; "
    "torch asks to run it outside"
}
NO_ADJOINT = "the first derivative of an optimal value is that of the objective: it needs no linear solve"


def make_network(**options: Any) -> LearnedProximal:
    """A small network whose numbers bfloat16 holds exactly."""
    with torch.device("cpu"):
        prox = LearnedProximal(
            InputConvexNetwork(2, hidden=3, layers=1, beta=BETA, strong_convexity=MU), **options
        ).double()
        with torch.no_grad():
            for i, p in enumerate(prox.parameters()):
                p.copy_((normal(34 + i, *p.shape) * 8).round() / 16)
    return prox


class _Method(nn.Module):
    """Lets ``functional_call`` reach a method."""

    def __init__(self, method: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.prox = make_network(**options)
        self.method = method

    def forward(self, x: Tensor) -> Any:
        """The method's result."""
        return getattr(self.prox, self.method)(x)


class Sigmoid(nn.Module):
    """The gradient of a sum of softplus functions, so a prox."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.ones(2, device="cpu", dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Entry by entry."""
        return torch.sigmoid(self.sharpness * x)


class _Restoration(nn.Module):
    """Lets ``functional_call`` reach operator and prox."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.prox, self.options = Sigmoid(), options
        self.operator = nn.Linear(2, 2, bias=False, device="cpu", dtype=torch.float64)

    def forward(self, observation: Tensor) -> Solution[Tensor]:
        """The images, unchecked or not."""
        return restore(observation, self.operator, self.prox, **self.options)


def _called(module: nn.Module, *names: str) -> Callable[..., Any]:
    """`module` as a function of its input and the parameters of these names, the others in the dtype of the input."""

    def fn(x: Tensor, *given: Tensor) -> Any:
        dtype, device = compute_dtype(given[0].dtype), given[0].device
        own = {name: p.detach().to(device, dtype) for name, p in module.named_parameters()}
        return functional_call(module, own | dict(zip(names, given, strict=True)), (x,))

    return fn


def _method(method: str, **options: Any) -> Callable[..., Any]:
    names = ("prox.potential.skips.1.weight", "prox.potential.hidden_to_hidden.0.free")
    return _called(_Method(method, options), *names)


def _restoration(**options: Any) -> Callable[..., Any]:
    return _called(_Restoration(options), "operator.weight", "prox.sharpness")


def _restored(**options: Any) -> Callable[..., Any]:
    solution = _restoration(**options)
    return lambda *args: solution(*args).value


def _numbers(like: Tensor) -> dict[str, Tensor]:
    return {name: p.detach().to(like) for name, p in make_network().potential.named_parameters()}


def _layers(y: Tensor, skip: Tensor, free: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both layers before their activation."""
    own = _numbers(y)
    first = act(own["skips.0.weight"], y) + own["skips.0.bias"]
    z = torch.logaddexp(BETA * first, torch.zeros_like(first)) / BETA
    weight = torch.log1p(free.exp()) / 3
    return first, act(weight, z) + act(skip, y) + own["skips.1.bias"], own


def potential(y: Tensor, skip: Tensor, free: Tensor) -> Tensor:
    """The potential, written out."""
    _, second, own = _layers(y, skip, free)
    z = torch.logaddexp(BETA * second, torch.zeros_like(second)) / BETA
    readout = torch.log1p(own["readout.free"].exp()).squeeze(0) / 3
    return (readout * z).sum(-1) + (own["linear"] * y).sum(-1) + MU / 2 * y.square().sum(-1)


def gradient(y: Tensor, skip: Tensor, free: Tensor) -> Tensor:
    """Its gradient, by hand."""
    first, second, own = _layers(y, skip, free)
    readout = torch.log1p(own["readout.free"].exp()).squeeze(0) / 3
    back = torch.sigmoid(BETA * second) * readout
    back_first = torch.sigmoid(BETA * first) * act((torch.log1p(free.exp()) / 3).mT, back)
    return act(own["skips.0.weight"].mT, back_first) + act(skip.mT, back) + own["linear"] + MU * y


def _miss(y: Tensor, x: Tensor, skip: Tensor, free: Tensor) -> Tensor:
    return gradient(y, skip, free) - x


def _prior(x: Tensor, skip: Tensor, free: Tensor) -> Tensor:
    y = unrolled_newton(_miss, 2, (1, 2, 2))(x, skip, free)
    return (x * y).sum(-1) - x.square().sum(-1) / 2 - potential(y, skip, free)


def _prior_by_scipy(x: np.ndarray, skip: np.ndarray, free: np.ndarray) -> np.ndarray:
    y = fsolve(_miss, 2)(x, skip, free)
    psi = potential(torch.from_numpy(y), torch.from_numpy(np.array(skip)), torch.from_numpy(np.array(free)))
    return np.asarray(x @ y - x @ x / 2 - psi.item())


def _fixed_point(x: Tensor, b: Tensor, A: Tensor, sharpness: Tensor) -> Tensor:
    return x - torch.sigmoid(sharpness * (x - STEP * act(A.mT, act(A, x) - b)))


def _learned(name: str, method: str, **fields: Any) -> LayerCase:
    common: dict[str, Any] = {
        "event_ndims": (1, 2, 2),
        "names": ("x", None, None),
        "layer": "LearnedProximal",
        "source": SOURCE,
        "wrong": (Wrong("another size", (normal(1, 3, 4), SKIP, FREE), r"y: expected shape \(2,\) .*got \(4,\)"),),
        "hostile": (
            Hostile("zero", (0 * X, SKIP, FREE)),
            Hostile("far away", (1e6 * X, SKIP, FREE)),
            Hostile("tiny", (1e-9 * X, SKIP, FREE)),
            Hostile("flat activations", (X, SKIP, FREE - 30)),
        ),
    }
    if method != "forward":
        starved = LBFGS(max_steps=1)
        common["tolerant"] = _method(method, on_failure="nan")
        common["starved"] = _method(method, solver=starved)
        common["solution"] = _method(f"{method}_ex")
        common["starved_solution"] = _method(f"{method}_ex", solver=starved)
    return LayerCase(name, _method(method), (X, SKIP, FREE), **(common | fields))


SOLVER, STARVED = ProximalGradient(step=STEP), ProximalGradient(step=STEP, max_steps=1)
OBSERVED, A, SHARPNESS = normal(35, 3, 2), normal(36, 2, 2), numbers([1.0, 2.0])

CASES: tuple[LayerCase, ...] = (
    _learned(
        "LearnedProximal",
        "forward",
        oracle=gradient,
        representative=True,
        make_module=make_network,
        module_inputs=(X,),
        exempt=AUTOCAST,
    ),
    _learned(
        "LearnedProximal inverse",
        "inverse",
        oracle=per_element(fsolve(_miss, 2), (1, 2, 2)),
        invariants=(_miss,),
        unrolled=unrolled_newton(_miss, 2, (1, 2, 2)),
    ),
    _learned(
        "LearnedProximal prior",
        "prior",
        oracle=per_element(_prior_by_scipy, (1, 2, 2)),
        unrolled=_prior,
        exempt={"solves_are_traced": NO_ADJOINT},
    ),
    LayerCase(
        "restore",
        _restored(solver=SOLVER),
        (OBSERVED, A, SHARPNESS),
        per_element(fsolve(_fixed_point, 2), (1, 2, 1)),
        (_fixed_point,),
        (1, 2, 1),
        names=("observation", None, None),
        source=SOURCE,
        representative=True,
        exempt=AUTOCAST,
        unrolled=unrolled_newton(_fixed_point, 2, (1, 2, 1)),
        tolerant=_restored(solver=SOLVER, on_failure="nan"),
        solution=_restoration(solver=SOLVER, on_failure="ignore"),
        starved=_restored(solver=STARVED),
        starved_solution=_restoration(solver=STARVED, on_failure="ignore"),
        hostile=(
            Hostile("zero", (0 * OBSERVED, A, SHARPNESS)),
            Hostile("zero operator", (OBSERVED, 0 * A, SHARPNESS)),
            Hostile("rank one", (OBSERVED, numbers([[0.5, 0.5], [0.5, 0.5]]), SHARPNESS)),
            Hostile("tiny", (1e-9 * OBSERVED, A, SHARPNESS)),
            Hostile("huge", (1e9 * OBSERVED, A, SHARPNESS)),
        ),
        wrong=(Wrong("another size", (OBSERVED, A[:1], SHARPNESS), r"init: expected a start, since .*\(3, 1\)"),),
    ),
)
