r"""Restoring images with a learned (or any) prox in the place of a regulariser: plug-and-play.

.. math:: \min_x \tfrac12 \|A x - b\|^2 + \tfrac1\eta R(x), \qquad f = \operatorname{prox}_R

The derivative of the result is that of the fixed-point equation it satisfies (see ``_restoration_solvers.py``), by one
linear solve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, SolveWarning, _stacklevel, check_policy
from difflayers.implicit import Implicit, ImplicitProblem
from difflayers.implicit._engine import SolutionMap
from difflayers.implicit._engine import Task as EngineTask
from difflayers.linalg import GMRES
from difflayers.linalg._autodiff import autocast_off, opaque, physical, pullback, sample
from difflayers.linalg._captured import gradients_wanted, refuse_held, refuse_probed

from ._identify import identify
from ._restoration_solvers import ProximalGradient, RestorationSolver, Task, dot
from ._user_map import UserMap, WithPrior

_POWER_STEPS = 50
_POWER_RTOL = 1e-6  # growth in a step; below, the rest of an element is rounding, or a mode it hardly starts with
_REMEDY = "Pass an nn.Module, whose parameters are arguments of the solve, or call under torch.no_grad()"


@dataclass(frozen=True)
class Restoration(Solution[Tensor]):
    """The result of :func:`restore`.

    Attributes:
        value: ``(*batch, event...)`` restored images, differentiable.
        status: ``(*batch)`` integers, see :class:`~difflayers.Status`.
        steps: ``(*batch)`` steps that each element took.
        residual: ``(*batch)`` length of the last step.
        residuals: ``(steps, *batch)`` length of every step; constant once an element has stopped.
        objectives: ``(steps, *batch)`` objective ``eta/2 ||A x - b||^2 + R(x)`` after every step (for ``HQS`` the one
            it minimises), up to a constant; None where the prior of the prox is not known.
        norm: ``(*batch)`` estimate of ``||A^T A||`` by power iteration.
        eta: ``(*batch)`` factor of the data term: the step, or one over the penalty.
    """

    residuals: Tensor
    objectives: Tensor | None
    norm: Tensor
    eta: Tensor


def restore(
    observation: Tensor,
    operator: Callable[[Tensor], Tensor],
    prox: Callable[[Tensor], Tensor],
    *,
    solver: RestorationSolver = ProximalGradient(),
    init: Tensor | None = None,
    adjoint: Callable[[Tensor], Tensor] | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    event_ndim: int | None = None,
    on_failure: OnFailure = "raise",
) -> Restoration:
    r"""Recovers x from ``observation = operator(x) + noise`` with a prox as the prior.

    Solves ``argmin_x 1/2 ||operator(x) - observation||^2 + R(x) / eta``, where `prox` is the prox of R and eta the step
    (or one over the penalty) of the solver: a critical point of it where R is not convex. A prox that was trained to
    remove noise of standard deviation sigma has ``R = -sigma^2 log p``, so that the weights are those of the posterior
    mode for noise of standard deviation ``sigma / sqrt(eta)`` in the observation.

    Args:
        observation: ``(*batch, ...)``.
        operator: Linear map of images ``(*batch, event...)``, each batch element alone: a function, or a module whose
            parameters are then differentiated too.
        prox: ``fn(x)``, shaped like `x`: a :class:`LearnedProximal`, or a function such as
            ``lambda x: prox_l1(x, 0.1)``. To be differentiated in parameters it must be a module.
        solver: ``ProximalGradient()``, ``ADMM()`` or ``HQS()``.
        init: ``(*batch, event...)`` start; carries no gradient. None: the adjoint of the observation over the squared
            norm of the operator.
        adjoint: The adjoint of `operator`. None: by automatic differentiation; then `init` must be given unless
            observation and image have the same shape.
        prior: ``fn(x) -> (*batch)``, the function R, for the objective alone. None: that of a learned prox, known
            without an inversion.
        event_ndim: Trailing dimensions of one image. None: as the prox says, else all but the first.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"`` (no check that reads data).

    Returns:
        The images with status, steps, residuals and objectives of every element. A run that ends at ``max_steps``, or a
        step or penalty that breaks the condition under which convergence is proven, gives a
        :class:`~difflayers.SolveWarning`.

    Raises:
        ValueError: For shapes that do not fit, an operator that is not linear (it maps zero to something else), an
            adjoint that is none, or a function that captures tensors that are being differentiated.
        SolveError: For elements that diverged, or in backward where the fixed point is degenerate.

    Differentiable in `observation` and in the parameters of modules (`operator`, `adjoint`, `prox`), to any order, by
    the fixed point's implicit derivative, with eta held constant: as exact as the run has converged.

    Example:
        >>> import torch
        >>> from difflayers.proximal import prox_l1, restore
        >>> mask = torch.tensor([1.0, 0.0, 1.0])
        >>> result = restore(torch.tensor([[3.0, 0.0, 0.5]]), lambda x: mask * x, lambda x: prox_l1(x, 0.9))
        >>> result.value
        tensor([[2., 0., 0.]])

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, section 4; S. Venkatakrishnan, C. Bouman, B. Wohlberg, Plug-and-play priors for model based reconstruction,
    2013.

    Departure: the published scripts use steps beyond the bound of their theorem and clip after the prox.
    """
    check_policy(on_failure)
    if not isinstance(solver, RestorationSolver):
        raise ValueError(f"solver: expected ProximalGradient, ADMM or HQS, got {type(solver).__name__}")
    return _run(observation, operator, prox, solver, init, adjoint, prior, event_ndim, on_failure)


@opaque
def _run(*args: Any) -> Restoration:
    return _Restore(*args).run()


class _Restore:
    """One call: checked arguments, the fixed-point equation, the run."""

    def __init__(
        self,
        observation: Tensor,
        operator: Callable[[Tensor], Tensor],
        prox: Callable[[Tensor], Tensor],
        solver: RestorationSolver,
        init: Tensor | None,
        adjoint: Callable[[Tensor], Tensor] | None,
        prior: Callable[[Tensor], Tensor] | None,
        event_ndim: int | None,
        on_failure: OnFailure,
    ) -> None:
        self.dtype = check_tensor("observation", observation).dtype
        self.solver, self.on_failure = solver, on_failure
        self.b = observation.to(compute_dtype(self.dtype))
        self.init = None if init is None else check_tensor("init", init).to(compute_dtype(init.dtype))
        self.like = self._shape_of_image(adjoint)
        known = getattr(prox, "event_ndim", None) if event_ndim is None else event_ndim
        self.k: int = max(self.like.ndim - 1, min(self.like.ndim, 1)) if known is None else known
        if not 0 <= self.k <= self.like.ndim:
            raise ValueError(f"event_ndim: expected at most the {self.like.ndim} dimensions of an image, got {self.k}")
        batch_ndim = self.like.ndim - self.k
        check_shape(
            "observation", self.b.shape[:batch_ndim], self.like.shape[:batch_ndim], " as the batch of the images has"
        )
        self.obs_ndim = self.b.ndim - batch_ndim
        self.operator = UserMap("operator", operator, batch_ndim)
        self.adjoint = None if adjoint is None else UserMap("adjoint", adjoint, batch_ndim)
        self.prox = UserMap("prox", prox, batch_ndim)
        self.prior = None if prior is None else UserMap("prior", prior, batch_ndim)
        learned = isinstance(prox, nn.Module) and hasattr(prox, "forward_and_prior") and prior is None
        self.valued = UserMap("prox", WithPrior(prox), batch_ndim) if learned else None
        maps = [m for m in (self.operator, self.adjoint, self.prox) if m is not None]
        self.tensors = tuple(t for m in maps for t in m.tensors)
        self.names = tuple(name for m in maps for name in m.names)
        self.ndims = tuple(n for m in maps for n in m.ndims)
        given = [("observation", self.b), *zip(self.names, self.tensors, strict=True)]
        check_same(given if self.init is None else [*given, ("init", self.init)])
        with autocast_off(self.b):
            self._check_maps(maps)

    def _shape_of_image(self, adjoint: Any) -> Tensor:
        """A plain tensor like the image."""
        if self.init is not None:
            return sample(self.init)
        if adjoint is None:
            return sample(self.b)
        with torch.no_grad():
            back = UserMap("adjoint", adjoint, 0)
            return sample(check_tensor("adjoint output", back.alone(sample(self.b), back.tensors)))

    def _check_maps(self, maps: Sequence[UserMap]) -> None:
        """Shapes, linearity, and captured tensors."""
        x = torch.zeros_like(self.like)
        with torch.no_grad():
            try:
                out = check_tensor("operator output", self.operator.alone(x, self.operator.tensors))
            except RuntimeError as error:
                if self.init is not None or self.adjoint is not None:
                    raise
                raise ValueError(
                    "init: expected a start, since the operator does not take an image shaped like the observation "
                    f"({tuple(x.shape)}): {error}"
                ) from None
        if out.shape != self.b.shape and self.init is None and self.adjoint is None:
            raise ValueError(
                "init: expected a start, since the operator changes the shape of an image from "
                f"{tuple(x.shape)} to {tuple(out.shape)}"
            )
        check_shape("operator output", out.shape, self.b.shape, " as the observation has")
        if self.on_failure != "ignore" and not out.is_meta and bool((physical(out) != 0).any()):
            raise ValueError("operator: expected a linear map, got one that maps zero to something else")
        if gradients_wanted():
            for m in maps:
                refuse_held(m.function, m.name, _REMEDY)
                at = sample(self.b) if m is self.adjoint else x
                refuse_probed(lambda x, *t, m=m: m.alone(x, t), (at, *m.tensors), m.name, _REMEDY)

    def run(self) -> Restoration:
        """The restoration."""
        with autocast_off(self.b):
            (norm,) = identify(
                self._norm, self.b, *self.tensors, ndims=(self.obs_ndim, *self.ndims), found_ndims=(0,)
            )  # fmt: skip
            start = () if self.init is None else (self.init,)
            traces: list[Any] = []
            u, status, steps, residual = self._solve(norm, start, traces)
            failed = None
            if self.on_failure == "nan":  # they hand their cotangent to the map alone: 0 * NaN would reach the others
                failed = torch.isnan(u).flatten(u.ndim - self.k).any(-1) if self.k else torch.isnan(u)
                failed = failed[(...,) + (None,) * self.k]
            z = self.prox.alone(u if failed is None else torch.where(failed, 0, u), self.prox.tensors)
            z = z if failed is None else torch.where(failed, u, z)
        residuals, objectives = traces
        return Restoration(
            z.to(self.dtype), status, steps, residual, residuals, objectives, norm, self.solver.eta(norm)
        )

    def _solve(self, norm: Tensor, start: tuple[Tensor, ...], traces: list[Any]) -> tuple[Tensor, ...]:
        k, finish = self.k, list[Callable[[Tensor], Tensor]]()

        def residual(u: Tensor, b: Tensor, norm: Tensor, *rest: Tensor) -> Tensor:
            tensors = rest[len(start) :]
            z = self.prox(u, self._split(tensors)[2], k)
            eta = self.solver.eta(norm)[(...,) + (None,) * k]
            return u - z + eta * self._gradient(u if self.solver.smoothed else z, b, tensors)[1]

        def solve(b: Tensor, norm: Tensor, *rest: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
            tensors = rest[len(start) :]
            batch = self._batch(b, tensors)
            norm, b = norm.expand(batch), b.expand(*batch, *b.shape[b.ndim - self.obs_ndim :])
            task = self._task(b, norm, tensors)
            if start:
                x = rest[0].expand(*batch, *self._event).clone()
            else:
                x = task.adjoint / torch.where(norm > 0, norm, 1)[(...,) + (None,) * k]
            if not b.numel() or not x.numel():
                none = torch.zeros(batch, dtype=torch.int64, device=b.device)
                traces.extend((b.new_zeros(0, *batch), None))
                return x, Info(none, none, b.new_zeros(batch)), ()
            finish.append(lambda u: task.prox(u)[0])
            u, info, *found = self.solver.run(task, x)
            traces.extend(found)
            return u, info, ()

        problem = ImplicitProblem(
            solve=solve,
            residual=residual,
            value_ndim=k,
            arg_ndims=(self.obs_ndim, 0, *[k] * len(start), *self.ndims),
            adjoint=Implicit(GMRES()),
            name="restore",
            arg_names=("observation", "norm", *["init"] * len(start), *self.names),
        )
        task = EngineTask(problem, self.on_failure, lambda u: finish[0](u))
        return SolutionMap.apply(task, None, self.b, norm, *start, *self.tensors)[:4]

    @property
    def _event(self) -> torch.Size:
        return self.like.shape[self.like.ndim - self.k :]

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The tensors of operator, adjoint and prox."""
        i = len(self.operator.tensors)
        j = len(tensors) - len(self.prox.tensors)
        return tensors[:i], tensors[i:j], tensors[j:]

    def _batch(self, b: Tensor, tensors: Sequence[Tensor]) -> torch.Size:
        batches = [t.shape[: t.ndim - n] for t, n in zip(tensors, self.ndims, strict=True)]
        return torch.broadcast_shapes(b.shape[: b.ndim - self.obs_ndim], *batches)

    def _gradient(self, x: Tensor, b: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``A x - b`` and ``A^T (A x - b)``."""
        of_operator, of_adjoint, _ = self._split(tensors)
        if self.adjoint is not None:
            miss = self.operator(x, of_operator, self.k) - b
            return miss, self.adjoint(miss, of_adjoint, self.obs_ndim)
        out, pull = pullback(lambda x: self.operator(x, of_operator, self.k), x)
        return out - b, pull(out - b)[0]

    def _task(self, b: Tensor, norm: Tensor, tensors: Sequence[Tensor]) -> Task:
        """The problem on plain tensors."""
        of_prox = self._split(tensors)[2]

        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            miss, g = self._gradient(x, b, tensors)
            return dot(miss, miss, self.obs_ndim) / 2, g

        def prox(u: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.valued is not None:
                z, R = self.valued(u, of_prox, self.k)
            else:
                z = self.prox(u, of_prox, self.k)
                R = None if self.prior is None else self.prior(z, self.prior.tensors, self.k)
            check_shape("prox output", z.shape, u.shape, " as its input has")
            return z, R

        normal = lambda x: self._gradient(x, torch.zeros_like(b), tensors)[1]  # noqa: E731
        zero = b.new_zeros(*b.shape[: b.ndim - self.obs_ndim], *self._event)
        adjoint = -self._gradient(zero, b, tensors)[1]
        return Task(gradient, normal, adjoint, prox, self.solver.eta(norm), self.k)

    def _norm(self, b: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        """``||A^T A||`` of every element by power iteration; says so where the solver's step is too long for it."""
        batch, event = self._batch(b, tensors), self._event
        n = event.numel()
        ramp = torch.arange(1, n + 1, dtype=b.dtype, device=b.device)
        # a fixed start without pattern: the same result in every run
        v = (ramp * 0.7548776662466927 % 1 - 0.3).reshape(event).expand(*batch, *event)
        norm = b.new_zeros(batch)
        if not v.numel():
            return (norm,)
        zero = b.new_zeros(*batch, *b.shape[b.ndim - self.obs_ndim :])
        w, active = v, torch.ones(batch, dtype=torch.bool, device=b.device)
        for step in range(_POWER_STEPS):
            v = w / dot(w, w, self.k).sqrt().clamp_min(torch.finfo(w.dtype).tiny)[(...,) + (None,) * self.k]
            Av, w = self._gradient(v, zero, tensors)
            if not step and self.adjoint is not None and self.on_failure != "ignore":
                # at a start without pattern: the last vector may be one that a wrong adjoint treats alike
                self._check_adjoint(dot(Av, Av, self.obs_ndim), dot(v, w, self.k))
            before, norm = norm, torch.where(active, dot(w, w, self.k).sqrt(), norm)
            # each element alone; growth is slow at first where the start has little of the largest mode
            active = active & ((norm - before).abs() > _POWER_RTOL * norm)
            if not bool(active.any()):  # False for NaN too
                break
        if self.on_failure != "ignore":
            self._check_step(norm)
        return (norm,)

    def _check_adjoint(self, forth: Tensor, back: Tensor) -> None:
        """``<A v, A v>`` and ``<v, A^T A v>`` must agree."""
        if bool(((forth - back).abs() > 1e-2 * forth).any()):
            raise ValueError(
                "adjoint: expected the adjoint of the operator, got one with <A v, A v> != <v, A^T A v>: "
                f"{float(forth.flatten()[0]):.3g} and {float(back.flatten()[0]):.3g}"
            )

    def _check_step(self, norm: Tensor) -> None:
        """The step must not be too long."""
        condition = self.solver.condition()
        broken = self.solver.eta(norm) * norm >= 1
        if condition is not None and bool(broken.any()):
            warnings.warn(
                f"restore: {condition}, got ||A^T A|| = {float(norm[broken].max()):.3g} in {int(broken.sum())} of "
                f"{broken.numel()} elements: convergence is not guaranteed, and the objective may rise.",
                SolveWarning,
                stacklevel=_stacklevel(),
            )
