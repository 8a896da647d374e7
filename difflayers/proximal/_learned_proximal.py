r"""Learned proximal networks: the gradient of a convex potential is the prox of a prior that can be evaluated.

.. math:: f = \nabla\psi = \operatorname{prox}_R, \qquad R(x) = \langle x, y \rangle - \tfrac12 \|x\|^2 - \psi(y),
    \quad y = f^{-1}(x) = \arg\min_y \psi(y) - \langle x, y \rangle

A map is the prox of some function, convex or not, if and only if it is the gradient of a convex potential (R.
Gribonval, M. Nikolova, A Characterization of Proximity Operators, 2020). R is an optimal value, so that
:math:`\nabla R(x) = y - x` and :math:`\partial_\theta R = -\partial_\theta \psi(y)` need no linear solve;
:math:`\nabla^2 R = P^{-1} - I` with :math:`P = \nabla^2 \psi(y)`.

Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._checks import check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, Status, check_policy
from difflayers.implicit import LBFGS, ImplicitProblem, IterativeSolver, envelope
from difflayers.implicit._engine import SolutionMap, Task
from difflayers.implicit._fixed_point_module import _lock, _own_tensors
from difflayers.implicit._iterate import Function
from difflayers.implicit._lbfgs import gradient_of, value_and_gradient
from difflayers.linalg._autodiff import autocast_off, opaque, transforms_active
from difflayers.linalg._captured import gradients_wanted, refuse_probed
from difflayers.linalg._system import norm

from ._over_batches import over_batches

_MANY = 100  # steps that a solvable inverse needs at most to show some progress


class LearnedProximal(nn.Module):
    r"""The gradient of a convex potential, which is the proximal operator of a learned prior.

    Solves ``forward(x) = argmin_z R(z) + 1/2 ||z - x||^2``, where the prior R is defined by the potential psi.

    Args:
        potential: Any ``nn.Module`` that maps ``(*batch, event...)`` to one number for each element, convex and twice
            differentiable in its input: :class:`InputConvexNetwork`. That it is convex is not checked.
        event_ndim: Trailing dimensions that form one element. None: that of the potential, if it says so, else 1.
        solver: Minimiser (or root solver) for the inverse, which works in float64 and returns the dtype of `x`. Its
            default tolerance for float32 is 1e-6.
        on_failure: For the inverse and the prior: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or
            ``"ignore"``.

    Shape:
        ``forward`` and ``inverse`` keep the shape ``(*batch, event...)``; ``prior`` returns ``(*batch)``.

    Raises:
        ValueError: For an input that is not a floating-point tensor of the parameters' dtype, or a potential that does
            not return one number for each element.
        SolveError: In ``inverse`` and ``prior``, for elements outside the range of the network: there the prior is
            infinite, or the minimum is not attained. A strongly convex potential has no such elements.

    Differentiable in `x` and in every parameter, to any order, forward and reverse; grad mode decides whether a graph
    is kept, and ``requires_grad`` of the input is never touched. The derivative of the prior costs no linear solve at
    first order.

    Example:
        >>> import torch
        >>> from difflayers.proximal import InputConvexNetwork, LearnedProximal
        >>> _ = torch.manual_seed(0)
        >>> prox = LearnedProximal(InputConvexNetwork(2, strong_convexity=0.5)).double()
        >>> y = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
        >>> x = prox(y)
        >>> torch.allclose(prox.inverse(x), y)
        True
        >>> x = x.detach().requires_grad_()
        >>> torch.allclose(torch.autograd.grad(prox.prior(x).sum(), x)[0], y - x)
        True

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024.

    Departure: the published inverse runs nonlinear conjugate gradients one sample at a time in NumPy, and its prior
    returns the prox in place of the potential's value.
    """

    def __init__(
        self,
        potential: nn.Module,
        *,
        event_ndim: int | None = None,
        solver: IterativeSolver = LBFGS(),
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(potential, nn.Module):
            raise ValueError(f"potential: expected an nn.Module, got {type(potential).__name__}")
        found: Any = getattr(potential, "event_ndim", 1) if event_ndim is None else event_ndim
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise ValueError(f"event_ndim: expected an integer of at least 0, got {found}")
        if solver.finds not in ("minimum", "root"):
            raise ValueError(f"solver: expected one that finds a minimum or a root, got {type(solver).__name__}")
        check_policy(on_failure)
        self.potential = potential
        self.event_ndim = found
        self.solver = solver
        self.on_failure: OnFailure = on_failure

    def extra_repr(self) -> str:
        """The options."""
        return f"event_ndim={self.event_ndim}, solver={self.solver}, on_failure={self.on_failure!r}"

    def forward(self, x: Tensor) -> Tensor:
        """The prox of the learned prior."""
        return self._evaluate(x)[1]

    def forward_and_prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z = forward(x)`` and ``prior(z)`` for the price of the first: the inverse of `z` is known to be `x`."""
        potential, z = self._evaluate(x)
        inner = (z * (x - z / 2)).flatten(x.ndim - self.event_ndim).sum(-1) if self.event_ndim else z * (x - z / 2)
        return z, inner - potential

    def inverse(self, x: Tensor) -> Tensor:
        """The point `y` with ``forward(y) = x``."""
        return self._inverse(x, self.on_failure).value

    def inverse_ex(self, x: Tensor) -> Solution[Tensor]:
        """As :meth:`inverse`, returning an unchecked :class:`~difflayers.Solution`."""
        return self._inverse(x, "ignore")

    def prior(self, x: Tensor) -> Tensor:
        """The learned prior R at `x`, up to a constant."""
        return self._prior(x, self.on_failure).value

    def prior_ex(self, x: Tensor) -> Solution[Tensor]:
        """As :meth:`prior`, returning an unchecked :class:`~difflayers.Solution`."""
        return self._prior(x, "ignore")

    @opaque
    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Potential and gradient."""
        names, tensors = self._arguments(x)
        own = self._own().values()
        lifted = any(t.dtype != mine.dtype for t, mine in zip(tensors, own, strict=True))
        # a graph is for somebody: the gradient of a constant hangs on autograd's own leaf
        wanted = transforms_active() or any(t.requires_grad for t in (x, *own))
        work = x.to(compute_dtype(x.dtype))
        with autocast_off(x), torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            psi = lambda y: self._potential(y, names if lifted else (), tensors)  # noqa: E731
            value, z = value_and_gradient(psi, work)
        return value.to(x.dtype), z.to(x.dtype)

    @opaque
    def _inverse(self, x: Tensor, on_failure: OnFailure) -> Solution[Tensor]:
        names, tensors = self._arguments(x)
        solution = self._solve(x.to(compute_dtype(x.dtype)), names, tensors, on_failure)
        return replace(solution, value=solution.value.to(x.dtype))

    @opaque
    def _prior(self, x: Tensor, on_failure: OnFailure) -> Solution[Tensor]:
        names, tensors = self._arguments(x)
        work = x.to(compute_dtype(x.dtype))
        solution = self._solve(work, names, tensors, on_failure)
        y, event = solution.value, tuple(range(-self.event_ndim, 0))
        failed = None
        if on_failure == "nan":
            # 0 * NaN would reach the shared parameters: failed elements are computed from harmless numbers, and hand
            # their cotangent to the map alone
            failed = torch.isnan(y).any(event, keepdim=True) if event else torch.isnan(y)
            nan = y
            y, work = torch.where(failed, 0, y), torch.where(failed, 0, work)

        def energy(y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
            return self._potential(y, names, tensors) - ((x * y).sum(event) if event else x * y)

        with autocast_off(x):
            lowest = envelope(energy, y, (work, *tensors))
            R = -lowest - (work.square().sum(event) if event else work.square()) / 2
            if failed is not None:
                total = nan.sum(event) if event else nan
                R = torch.where(failed.reshape(R.shape), total, R)
        return Solution(R.to(x.dtype), solution.status, solution.steps, solution.residual)

    def _solve(
        self, x: Tensor, names: Sequence[str], tensors: Sequence[Tensor], on_failure: OnFailure
    ) -> Solution[Tensor]:
        """The inverse as a differentiable function of `x` and the potential's tensors."""
        if gradients_wanted():
            psi = lambda y, *tensors: self._potential(y, names, tensors)  # noqa: E731
            refuse_probed(psi, (x, *tensors), "potential", "Register it as a parameter or buffer of the potential")
        task = Task(self._problem(names, tensors), on_failure)
        return Solution(*SolutionMap.apply(task, None, x, *tensors)[:4])

    def _problem(self, names: Sequence[str], tensors: Sequence[Tensor]) -> ImplicitProblem:
        """The inverse as the engine sees it."""
        k, ndims = self.event_ndim, tuple(t.ndim for t in tensors)

        def psi(y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            return self._potential(y, names, tensors)

        def gradient(y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            return value_and_gradient(lambda y: psi(y, tensors), y)[1]

        def residual(y: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
            return over_batches(gradient, y, tensors, ndims, k) - x

        def solve(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
            batches = [t.shape[: t.ndim - n] for t, n in zip((x, *tensors), (k, *ndims), strict=True)]
            batch, event = torch.broadcast_shapes(*batches), x.shape[x.ndim - k :]
            # in float64: near the minimum, differences of a float32 potential are rounding
            wide = x.dtype if x.device.type == "mps" else torch.float64
            flat = x.to(wide).expand(*batch, *event).reshape(*batch, event.numel())
            lifted = [t.to(wide) for t in tensors]
            y, info = _minimise(
                lambda z: over_batches(psi, z.reshape(*z.shape[:-1], *event), lifted, ndims, k),
                flat,
                # for float32, a little more than the rounding that follows keeps
                self.solver if self.solver.rtol is not None or x.dtype == wide else replace(self.solver, rtol=1e-6),
            )
            info = info._replace(residual=info.residual.to(x.dtype))
            return y.to(x.dtype).reshape(*batch, *event), info, ()

        return ImplicitProblem(
            solve=solve,
            residual=residual,
            value_ndim=k,
            arg_ndims=(k, *ndims),
            symmetric=True,
            name="LearnedProximal.inverse",
            arg_names=("x", *(f"potential.{name}" for name in names)),
        )

    def _own(self) -> dict[str, Tensor]:
        own = _own_tensors(self.potential, "_parameters") | _own_tensors(self.potential, "_buffers")
        return {name: t for name, t in own.items() if t.is_floating_point()}

    def _arguments(self, x: Tensor) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        """Names and tensors of the potential, in the dtype of the solve."""
        check_tensor("x", x, min_ndim=self.event_ndim)
        own = self._own()
        lifted = {name: t.to(compute_dtype(t.dtype)) for name, t in own.items()}
        check_same([*((f"potential.{n}", t) for n, t in lifted.items()), ("x", x.to(compute_dtype(x.dtype)))])
        return tuple(own), tuple(lifted.values())

    def _potential(self, y: Tensor, names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
        """The potential of every element, with its parameters given (or as they are, without names)."""
        if names:
            with _lock(self.potential):
                replaced = dict(zip(names, tensors, strict=True))
                out = functional_call(self.potential, replaced, (y,), tie_weights=False)
        else:
            out = self.potential(y)
        if not isinstance(out, Tensor):
            raise ValueError(f"potential output: expected a tensor, got {type(out).__name__}")
        batch = tuple(y.shape[: y.ndim - self.event_ndim])
        check_shape("potential output", out.shape, batch, ", one number for each element")
        return out


def _minimise(psi: Function, x: Tensor, solver: IterativeSolver) -> tuple[Tensor, Info]:
    """The minimiser of ``psi(y) - <x, y>`` from ``y = x``, for every element of ``(*batch, n)``."""
    # a line search takes the rounding of an objective from its size, which must not cancel; in sums over an image it is
    # some hundred units of the terms
    level = 100 * (psi(x).abs() + x.square().sum(-1))
    energy: Function = lambda y: psi(y) - (x * y).sum(-1) + level  # noqa: E731
    slope = gradient_of(energy)
    y, info = solver.solve(energy if solver.finds == "minimum" else slope, x.clone())
    # where many steps have not lowered the gradient, there is no minimum: x is outside the range
    astray = norm(slope(y)) > 1e-3 * (norm(x) + norm(slope(x)))
    finished = (info.status == Status.CONVERGED) | ((info.status == Status.MAX_STEPS) & (info.steps >= _MANY))
    return y, info._replace(status=torch.where(astray & finished, int(Status.DIVERGED), info.status))
