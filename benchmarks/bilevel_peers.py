"""BOAT and betty on our problems: one hypergradient at a given lower solution, with their CG and Neumann series.

Both are trainers that take steps of both levels. What is timed is their own code for the hypergradient alone: BOAT's
operator `CG` on a model of `higher`, betty's `get_grads` along the path that its engine found. Neither takes a dtype or
a tolerance besides what is used here: BOAT stops at an absolute residual, betty after a number of iterations.

`make .venv/.bench` installs both without what they ask for: BOAT for an old numpy, betty for a Python below 3.11. They
work with newer ones.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Job = Callable[[], Tensor]


def available(source: str) -> bool:
    """Whether a peer can be used; says so where it cannot."""
    if util.find_spec(source) is None:
        print(f"{source}: left out, it is not installed")
        return False
    return True


class Weights(nn.Module):
    """A model that is its weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self) -> Tensor:
        """The weights."""
        return self.weights


def boat_cg(upper: Loss, lower: Loss, x: Tensor, y: Tensor, *, tolerance: float, steps: int = 2000) -> Job:
    """BOAT's conjugate gradients on the map of one gradient step of length 1."""
    import higher

    with _quiet():
        from boat_torch.na_ol.cg import CG

    above, below = Weights(x), Weights(y)
    optimiser = torch.optim.SGD(below.parameters(), lr=1.0)

    def lower_objective(feed: Any, ul_model: Weights, ll_model: Any, params: list[Tensor] | None = None) -> Tensor:
        return lower(ul_model(), ll_model(params=params))

    def upper_objective(feed: Any, ul_model: Weights, ll_model: Any, params: list[Tensor] | None = None) -> Tensor:
        return upper(ul_model(), ll_model(params=params))

    config = {
        "gm_op": "NGD", "lower_level_opt": optimiser, "CG": {"tolerance": tolerance, "k": steps},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
    }  # fmt: skip
    operator = CG(
        lower_objective, upper_objective, below, above, list(below.parameters()), list(above.parameters()), config
    )

    def job() -> Tensor:
        above.zero_grad()
        with higher.innerloop_ctx(below, optimiser) as (model, _):
            operator.compute_gradients({}, {}, model)
        return above.weights.grad.clone()

    return job


def betty_cg(upper: Loss, lower: Loss, x: Tensor, y: Tensor, *, iterations: int) -> Job:
    """betty's conjugate gradients, `cg_alpha = 1`."""
    return _betty(upper, lower, x, y, type="cg", cg_iterations=iterations, cg_alpha=1.0)


def betty_neumann(upper: Loss, lower: Loss, x: Tensor, y: Tensor, *, iterations: int, step: float) -> Job:
    """betty's Neumann series."""
    return _betty(upper, lower, x, y, type="neumann", neumann_iterations=iterations, neumann_alpha=step)


def _betty(upper: Loss, lower: Loss, x: Tensor, y: Tensor, **options: Any) -> Job:
    with _quiet():
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.hypergradient import get_grads
        from betty.problems import ImplicitProblem

    class Above(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return upper(self.module(), self.below())

    class Below(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return lower(self.above(), self.module())

    def problem(kind: type, name: str, weights: Tensor, config: Any) -> Any:
        module = Weights(weights)
        optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
        loader = [torch.zeros(1)]
        return kind(name=name, config=config, module=module, optimizer=optimiser, train_data_loader=loader)

    with _quiet():
        above = problem(Above, "above", x, Config(**options))
        below = problem(Below, "below", y, Config(**options))
        Engine(
            config=EngineConfig(train_iters=1), problems=[above, below],
            dependencies={"u2l": {above: [below]}, "l2u": {below: [above]}},
        )  # fmt: skip
    (path,) = above.paths

    def job() -> Tensor:
        loss = above.training_step(None)
        (direct,) = torch.autograd.grad(
            loss, list(above.trainable_parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        (through,) = get_grads(loss, path, False, False)
        return direct + through

    return job


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what they print or log at import and set-up."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            os.environ.setdefault("MPLBACKEND", "agg")  # BOAT imports pyplot
            yield
    finally:
        logging.disable(logging.NOTSET)
