r"""ImplicitSGD: millions of hyperparameters by a few training steps and a truncated Neumann series at a time.

.. math:: y \mathrel{-}= \alpha \nabla_y f \quad (T \text{ times}), \qquad
    q = s \sum_{j < K} (I - s H)^j \nabla_y F, \qquad x \mathrel{-}= \gamma (\nabla_x F - J q)

The graph of one lower gradient serves all products, so that memory depends on neither T nor K. From a lower solution,
K terms with :math:`s = \alpha` are the derivative of K gradient steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difflayers.implicit import Implicit, Neumann, OneStep
from difflayers.linalg import LinearSolver

from ._evaluation import Evaluation
from ._hypergradient import definite
from ._method import Method, Seen, StepStats, norm
from ._options import check_count
from ._outer_step import solve_adjoint
from ._problem import Bilevel
from ._schedules import Constant, Schedule, as_schedule
from ._variables import Variables

_TERMS = 20

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class ImplicitSGD(Method):
    r"""Alternates training steps and a step along the stochastic hypergradient.

    Solves ``min_x upper(x, y*(x))``, as far as training gets: neither level is solved. One step is an *outer* one: T
    warm steps of y on the lower objective, then one of x along ``grad_x F - J q`` at the new y, with q from a Neumann
    series or a linear solver that starts from the last q. Built for millions of hyperparameters, such as a penalty for
    every weight of a network: costs T gradients and K products, and the memory of a few vectors. So many fit a small
    validation set as weights fit a training set: hold out a third set.

    Args:
        problem: The problem, without prox and constraint; with or without blocks, some or all of which a step may take.
        x: Upper variables: tensor, pytree of tensors, or module.
        y: Lower variables.
        step: gamma, of x. None: 0.1.
        step_lower: alpha, of y; below ``2 / L_f``. None: 0.1.
        inner_steps: T.
        adjoint: ``Neumann(terms, step)``, ``Implicit(CG(), damping)`` or ``OneStep()`` (q is ``grad_y F``). None: 20
            terms with the step of y, or an estimated one next to `optimizer_lower`.
        optimizer: In place of `step`: ``fn(parameters) -> torch.optim.Optimizer``, called once with a list of
            parameters, one for each tensor of x; ``functools.partial(torch.optim.Adam, lr=0.01)``.
        optimizer_lower: In place of `step_lower`, the same for y.
        batch_per_step: The lower batch of a step is a sequence of T batches, one a training step; the last one is that
            of H and J.

    Random numbers (dropout) are new in every training step, and the same in all products of one adjoint solve.
    ``infeasibility`` is ``|grad_y f|`` after the training steps, ``stationarity`` next to an optimizer the norm of the
    hypergradient.

    Attributes:
        adjoint: q, with the structure of y; ``init`` of :func:`hypergradient`.
        optimizers: Those that were made, by level, ``"x"`` and ``"y"``: where schedulers of torch find them. Their
            state is part of :meth:`state_dict`, that of schedulers is not.

    Raises:
        ValueError: For bad input, naming the argument; in a step for gradients that are not finite. The method is then
            as before the step.
        SolveError: In a step where the Hessian is not positive definite, for ``Implicit(CG())``. A Neumann series that
            grows is a :class:`~difflayers.SolveWarning`.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bilevel, ImplicitSGD
        >>> problem = Bilevel(
        ...     upper=lambda x, y, batch: (y - 1).square().sum() / 2,
        ...     lower=lambda x, y, batch: (y - 2 * x).square().sum() / 2,
        ... )
        >>> algo = ImplicitSGD(problem, torch.zeros(3), torch.zeros(3), step=0.1, step_lower=0.5)
        >>> for _ in range(100):
        ...     stats = algo.step()
        >>> algo.x
        tensor([0.5000, 0.5000, 0.5000])

    Source: J. Lorraine, P. Vicol, D. Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation,
    2020, algorithms 1 to 3.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"project_upper", "blocks"})

    def __init__(
        self,
        problem: Bilevel,
        x: Any,
        y: Any,
        *,
        step: float | Schedule | None = None,
        step_lower: float | Schedule | None = None,
        inner_steps: int = 10,
        adjoint: Neumann | Implicit | OneStep | None = None,
        optimizer: MakeOptimizer | None = None,
        optimizer_lower: MakeOptimizer | None = None,
        batch_per_step: bool = False,
    ) -> None:
        super().__init__(problem, x, y)
        if adjoint is not None and not isinstance(adjoint, Neumann | Implicit | OneStep):
            raise ValueError(f"adjoint: expected Neumann, Implicit or OneStep, got {type(adjoint).__name__}")
        self.inner_steps, self.batch_per_step = check_count("inner_steps", inner_steps), bool(batch_per_step)
        self.gamma, self.rho = _step("", step, optimizer), _step("_lower", step_lower, optimizer_lower)
        self._movers = {
            name: _Mover(f"optimizer{suffix}", make, variables, self.state[name])
            for name, suffix, make, variables in (
                ("x", "", optimizer, self.x_variables),
                ("y", "_lower", optimizer_lower, self.y_variables),
            )
            if make is not None
        }
        if isinstance(adjoint, Implicit):
            adjoint = definite(adjoint, self.y_variables.size)
        self._adjoint = adjoint
        self._lower_batches: list[Any] | None = None
        self.state["q"] = torch.zeros_like(self.state["y"])

    @property
    def adjoint(self) -> Any:
        """The adjoint, with the structure of y."""
        return self.y_variables.present(self.state["q"])

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of torch, by level."""
        return {name: mover.optimizer for name, mover in self._movers.items()}

    def step(self, upper_batch: Any = None, lower_batch: Any = None, **options: Any) -> StepStats:
        """Takes one outer step.

        Args:
            upper_batch: Handed to the upper objective as it is.
            lower_batch: Handed to the lower objective; with `batch_per_step` a sequence of T batches.
            **options: Those of :meth:`Method.step`.

        Returns:
            :class:`StepStats` of x before the step and y after the training steps.
        """
        self._lower_batches = None
        if self.batch_per_step:
            many = isinstance(lower_batch, Sequence | Tensor)
            if not many or len(lower_batch) != self.inner_steps:
                got = f"{len(lower_batch)}" if many else type(lower_batch).__name__
                raise ValueError(f"lower_batch: expected a sequence of {self.inner_steps} batches, got {got}")
            self._lower_batches = list(lower_batch)
            lower_batch = lower_batch[0]
        try:
            return super().step(upper_batch, lower_batch, **options)
        finally:
            self._lower_batches = None  # nobody else's to keep

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the batches, copied: tensors and plain Python objects."""
        return {**super().state_dict(), "optimizers": self._saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, to the last bit.

        Args:
            state_dict: Of the same method with the same options, on variables of the same shapes.

        Raises:
            ValueError: For the state of another method, of other shapes or of other optimizers; nothing has changed
                then.
        """
        found = state_dict.get("optimizers", {})
        if set(found) != set(self._movers):
            raise ValueError(f"state_dict: expected an optimizer of {sorted(self._movers)}, got of {sorted(found)}")
        before = self._saved()
        try:
            self._restore(copy.deepcopy(found))
            super().load_state_dict(state_dict)
        except BaseException:
            self._restore(before)
            raise

    def _update(self, at: Evaluation, k: int) -> Seen:
        before = self._saved()
        try:
            return self._outer_step(at, k)
        except BaseException:
            self._restore(before)
            raise

    def _outer_step(self, at: Evaluation, k: int) -> Seen:
        if "y" in self._movers and not isinstance(at.rows, slice):
            raise ValueError("blocks: expected None next to an optimizer_lower, whose state is of all blocks, got some")
        x, y, q = self.state["x"], self.state["y"][at.rows], self.state["q"][at.rows]
        for here in self._evaluations(at):
            y = self._moved("y", y, here.lower_in_y(x, y), self.rho(k))
            at = here
        upper, (lower, slope) = at.upper(x, y), at.slope(x, y)
        q = solve_adjoint("ImplicitSGD", slope, upper.y, self._solver(k), q)
        p = upper.x - slope.cross(q)
        gamma = self.gamma(k)
        x_next = self._onto_upper(self._moved("x", x, p, gamma))
        self.state.update(x=x_next, y=at.put(self.state["y"], y), q=at.put(self.state["q"], q))
        stationarity = norm(p) if "x" in self._movers else norm(x - x_next) / gamma
        return Seen(upper.value, lower, stationarity, norm(slope.value.detach()))

    def _evaluations(self, at: Evaluation) -> Iterable[Evaluation]:
        """One for every training step, each with random numbers of its own."""
        for batch in self._lower_batches or [at.batches["lower"]] * self.inner_steps:
            yield Evaluation(self, at.batches["upper"], batch, None if isinstance(at.rows, slice) else at.rows)

    def _solver(self, k: int) -> LinearSolver:
        adjoint = self._adjoint
        if adjoint is None:
            adjoint = Neumann(_TERMS, step="estimated" if "y" in self._movers else self.rho(k))
        return (Neumann(1, step=1.0) if isinstance(adjoint, OneStep) else adjoint).solver(self.y_variables.size, True)

    def _moved(self, name: str, value: Tensor, gradient: Tensor, step: float) -> Tensor:
        mover = self._movers.get(name)
        return value - step * gradient if mover is None else mover(value, gradient)

    def _saved(self) -> dict[str, Any]:
        return {name: copy.deepcopy(mover.optimizer.state_dict()) for name, mover in self._movers.items()}

    def _restore(self, saved: dict[str, Any]) -> None:
        for name, mover in self._movers.items():
            mover.optimizer.load_state_dict(saved[name])


class _Mover:
    """An optimiser of torch as a function of a vector and its gradient."""

    def __init__(self, argument: str, make: MakeOptimizer, variables: Variables, vector: Tensor) -> None:
        self.variables = variables
        self.parameters = [nn.Parameter(leaf.clone()) for leaf in variables.split(vector)]
        optimizer = make(self.parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"{argument}: expected a function that returns a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(f"{argument}: expected one that steps without a closure, got LBFGS")
        self.optimizer = optimizer

    def __call__(self, vector: Tensor, gradient: Tensor) -> Tensor:
        split = self.variables.split
        with torch.no_grad():
            for parameter, value, part in zip(self.parameters, split(vector), split(gradient), strict=True):
                parameter.copy_(value)
                parameter.grad = part
            self.optimizer.step()
            moved = self.variables.join([p.detach() for p in self.parameters]).clone()
        self.optimizer.zero_grad()
        return moved


def _step(suffix: str, step: Any, optimizer: Any) -> Schedule:
    if step is None:
        return Constant(0.1)
    if optimizer is not None:
        raise ValueError(f"step{suffix}: expected None next to an optimizer{suffix}, got {step!r}")
    return as_schedule(f"step{suffix}", step)
