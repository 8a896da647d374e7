"""Hypergradients of a ridge regression, against betty and BOAT.

All of them compute one gradient of the upper objective at a given lower solution, which here is the exact one. So that
the same questions can be asked of all, that gradient is put behind an autograd Function: forward is the validation loss
at the lower solution, backward the package's own hypergradient.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from integrity.harness import Calls, Contender, Problem, Solve

ORDER = 50
OURS = "torch-difflayers"
DOUBLE = torch.float64

Grads = tuple[Tensor, Tensor]
Hypergradient = Callable[[Tensor, Tensor, Tensor], Grads]  # of (t, p, w): in t and p, at the lower solution w


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


TRAINING = normal(0, 12, 6)
TRAINING /= torch.linalg.matrix_norm(TRAINING, 2)
VALIDATION, LABELS = normal(1, 8, 6), normal(2, 8)


def lower_solution(t: Tensor, p: Tensor) -> Tensor:
    A = TRAINING.to(t)
    return torch.linalg.solve(A.mT @ A + p.exp().diag(), A.mT @ t)


def lower(t: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return ((TRAINING.to(w) @ w - t).square().sum() + (p.exp() * w.square()).sum()) / 2


def upper(w: Tensor) -> Tensor:
    return (VALIDATION.to(w) @ w - LABELS.to(w)).square().sum() / 2


def validation_loss(t: Tensor, p: Tensor) -> Tensor:
    return upper(lower_solution(t, p))


class _Solved(torch.autograd.Function):
    """The validation loss of one element, with a hypergradient for a derivative."""

    @staticmethod
    def forward(ctx: Any, hypergradient: Hypergradient, t: Tensor, p: Tensor) -> Tensor:
        ctx.hypergradient = hypergradient
        w = lower_solution(t, p)
        ctx.save_for_backward(t, p, w)
        return upper(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        with torch.enable_grad():
            in_t, in_p = ctx.hypergradient(*(tensor.detach() for tensor in ctx.saved_tensors))
        if in_t.dtype != g.dtype or in_p.dtype != g.dtype:  # autograd would cast it without a word
            raise TypeError(f"a hypergradient of {in_t.dtype} and {in_p.dtype} out of {g.dtype}")
        return None, g * in_t, g * in_p


def behind(hypergradient: Hypergradient) -> Solve:
    return lambda t, p: torch.stack([_Solved.apply(hypergradient, target, p) for target in t])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what they print or log at import and set-up."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            os.environ.setdefault("MPLBACKEND", "agg")  # BOAT imports pyplot
            yield
    finally:
        logging.disable(logging.NOTSET)


class Above(nn.Module):
    """The upper variables: targets and logarithms of penalties."""

    def __init__(self, t: Tensor, p: Tensor) -> None:
        super().__init__()
        self.t, self.p = nn.Parameter(t.clone()), nn.Parameter(p.clone())

    def forward(self) -> Grads:
        return self.t, self.p


class Below(nn.Module):
    """The lower variables."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self) -> Tensor:
        return self.w


# -------------------------------------------------------------------------------------------------------------- ours


def our_hypergradient() -> Calls:
    from difflayers.bilevel import Bilevel, hypergradient
    from difflayers.implicit import Implicit
    from difflayers.linalg import CG

    problem = Bilevel(lambda x, w, batch: upper(w), lambda x, w, batch: lower(*x, w))

    def call(**options: Any) -> Solve:
        adjoint = Implicit(CG(**options))
        return behind(lambda t, p, w: hypergradient(problem, (t, p), w, adjoint=adjoint).grad)

    return Calls(call(), starved=call(max_steps=1))


def our_layer() -> Calls:
    from difflayers.bilevel import ArgminLayer, Bilevel
    from difflayers.implicit import LBFGS

    problem = Bilevel(lambda x, w, batch: upper(w), lambda x, w, batch: lower(*x, w))

    def call(**options: Any) -> tuple[Solve, Solve]:
        layer = ArgminLayer(problem, solver=LBFGS(**options))
        one = lambda t, p: upper(layer((t, p), init=t.new_zeros(6)))  # noqa: E731
        return lambda t, p: torch.stack([one(target, p) for target in t]), one

    solve, one = call()
    return Calls(solve, starved=call(max_steps=2)[0], one=one)


# ------------------------------------------------------------------------------------------------------------- peers


def betty(**options: Any) -> Calls:
    """`get_grads` along the path that its engine finds."""
    with quiet():
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.hypergradient import get_grads
        from betty.problems import ImplicitProblem

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return upper(self.inner())

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return lower(*self.outer(), self.module())

    def problem(kind: type, name: str, module: nn.Module, config: Any) -> Any:
        optimizer, loader = torch.optim.SGD(module.parameters(), lr=1.0), [torch.zeros(1)]
        return kind(name=name, config=config, module=module, optimizer=optimizer, train_data_loader=loader)

    def call(options: dict[str, Any]) -> Solve:
        def hypergradient(t: Tensor, p: Tensor, w: Tensor) -> Grads:
            with quiet():
                outer = problem(Outer, "outer", Above(t, p), Config(**options))
                inner = problem(Inner, "inner", Below(w), Config(**options))
                dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
                Engine(config=EngineConfig(train_iters=1), problems=[outer, inner], dependencies=dependencies)
            (path,) = outer.paths
            return tuple(get_grads(outer.training_step(None), path, False, False))

        return behind(hypergradient)

    few = {name: 1 if name.endswith("iterations") else value for name, value in options.items()}
    return Calls(call(options), starved=call(few))


def boat(operator: str, tolerance: float = 1e-14) -> Calls:
    """The operators `CG` and `NS` on the map of one gradient step of length 1, which contracts here."""
    with quiet():
        import boat_torch.na_ol as operators
        import higher

    def lower_objective(feed: Any, ul_model: Above, ll_model: Any, params: list[Tensor] | None = None) -> Tensor:
        return lower(*ul_model(), ll_model(params=params))

    def upper_objective(feed: Any, ul_model: Above, ll_model: Any, params: list[Tensor] | None = None) -> Tensor:
        unused = 0 * sum(tensor.sum() for tensor in ul_model())  # it wants a direct gradient
        return upper(ll_model(params=params)) + unused

    def call(k: int, tolerance: float = tolerance) -> Solve:
        def hypergradient(t: Tensor, p: Tensor, w: Tensor) -> Grads:
            above, below = Above(t, p), Below(w)
            optimiser = torch.optim.SGD(below.parameters(), lr=1.0)
            config = {
                "gm_op": "NGD", "lower_level_opt": optimiser, "CG": {"tolerance": tolerance, "k": k},
                "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
            }  # fmt: skip
            solver = getattr(operators, operator)(
                lower_objective, upper_objective, below, above, list(below.parameters()), list(above.parameters()),
                config,
            )  # fmt: skip
            with higher.innerloop_ctx(below, optimiser) as (model, _):
                solver.compute_gradients({}, {}, model)
            return above.t.grad.clone(), above.p.grad.clone()

        return behind(hypergradient)

    return Calls(call(2000), starved=call(2), single=call(2000, 1e-5))


# ---------------------------------------------------------------------------------------------------------- problem

NUMBER = "a hypergradient is a number without a graph"
NO_GRAPH = {
    "second order": NUMBER,
    "forward mode": NUMBER,
    "vmap": NUMBER,
    "bad element": "takes one lower problem at a time",
}

ASTRAY = NO_GRAPH | {"starved": "its gradient is wrong with all its iterations"}


def subjects() -> list[tuple[Problem, list[Contender]]]:
    inputs = (normal(3, 3, 12), 0.5 * normal(4, 6) - 1.5)
    problem = Problem(
        name="hypergradient",
        text="The validation loss of a ridge regression as a function of its training targets `t` and the logarithms "
        "`p` of its penalties: 3 vectors of 12 targets, 6 weights, shared penalties. The lower solution is given, and "
        "exact; the Hessian's eigenvalues are between 0.4 and 1.2. What is starved is the linear solve.",
        inputs=inputs,
        shared=(False, True),
        reference=validation_loss,
    )
    config = "betty.hypergradient.get_grads(loss, path, False, False), Config({})"
    operator = "boat_torch.na_ol.{}(...).compute_gradients({{}}, {{}}, model), {{'tolerance': {}, 'k': 2000}}"
    return [
        (
            problem,
            [
                Contender(
                    "difflayers `hypergradient`",
                    OURS,
                    "difflayers.bilevel.hypergradient(problem, (t, p), w).grad",
                    our_hypergradient,
                    1e-10,
                    missing=NO_GRAPH,
                ),
                Contender(
                    "difflayers `ArgminLayer`",
                    OURS,
                    "upper(difflayers.bilevel.ArgminLayer(problem)((t, p), init=zeros))",
                    our_layer,
                    1e-10,
                    missing={"bad element": "takes one lower problem at a time"},
                    remarks={"starved": "its own lower solve"},
                ),
                Contender(
                    "betty, conjugate gradients",
                    "betty-ml",
                    config.format("type='cg', cg_iterations=6, cg_alpha=1.0"),
                    lambda: betty(type="cg", cg_iterations=6, cg_alpha=1.0),
                    0.0,
                    missing=ASTRAY,
                    remarks={
                        "first order": "6 iterations for 6 weights, where the method ends; it has no tolerance, and no "
                        "number of iterations from 1 to 12 comes nearer than 0.58"
                    },
                ),
                Contender(
                    "betty, 1000 terms of Neumann's series",
                    "betty-ml",
                    config.format("type='neumann', neumann_iterations=1000, neumann_alpha=1.0"),
                    lambda: betty(type="neumann", neumann_iterations=1000, neumann_alpha=1.0),
                    0.0,
                    missing=NO_GRAPH,
                ),
                Contender(
                    "BOAT, conjugate gradients",
                    "boat-torch",
                    operator.format("CG", "1e-14"),
                    lambda: boat("CG"),
                    1e-14,
                    missing=ASTRAY,
                    remarks={"first order": "returns the iterate before the one that met the tolerance"},
                ),
                Contender(
                    "BOAT, conjugate gradients, tolerance below rounding",
                    "boat-torch",
                    operator.format("CG", "1e-20"),
                    lambda: boat("CG", 1e-20),
                    1e-20,
                    missing=NO_GRAPH,
                    remarks={"first order": "one step more than is needed makes up for the one that is dropped"},
                ),
                Contender(
                    "BOAT, Neumann's series",
                    "boat-torch",
                    operator.format("NS", "1e-14"),
                    lambda: boat("NS"),
                    1e-14,
                    missing=NO_GRAPH,
                ),
            ],
        )
    ]
