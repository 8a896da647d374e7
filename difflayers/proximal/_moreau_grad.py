r"""MoreauGrad: sparse, stable saliency maps, as gradients of the Moreau envelope of a classifier's score.

.. math:: d^* = \arg\min_d f(x + d) + \frac{1}{2\lambda} \|d\|^2 + \eta\,\Omega(d), \qquad
    \nabla M(x) = -d^* / \lambda, \qquad d^* = -\lambda\, S_\eta(\nabla f(x + d^*))

f is the score of one class, averaged over noisy copies of the image, :math:`\Omega` nothing, the l1 norm or the sum of
norms over patches, and :math:`S_\eta` its prox. Proximal gradient steps find the support A; on it the problem is
smooth, and the derivative of :math:`d^*` is that of a minimiser: one solve with
:math:`H_{AA} + I / \lambda` (and the curvature of the norms).

J. Zhang, F. Farnia, MoreauGrad: Sparse and Robust Interpretation of Neural Networks via Moreau Envelope, ICCV 2023.
Symbols: ``t`` lambda, ``eta`` weight of the penalty, ``g`` gradient of f, ``tau`` step length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from difflayers._checks import (
    broadcast_batch,
    check_finite,
    check_same,
    check_shape,
    check_tensor,
    compute_dtype,
    default_rtol,
)
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import Implicit
from difflayers.implicit._argmin import ARGMIN
from difflayers.implicit._fixed_point_module import _own_tensors, _Update, refuse_stateful
from difflayers.implicit._problem import solve_inner
from difflayers.linalg import CG
from difflayers.linalg._autodiff import physical

from ._moreau_problem import L1, NAME, Found, GroupL2, Inputs, Problem
from ._operands import Number, check_range, per_element

LAYER = replace(ARGMIN, name=NAME, argument="model")


class MoreauGrad(nn.Module):
    r"""Which entries of an input a classifier's score depends on: the gradient of the score's Moreau envelope.

    Solves ``argmin_d f(x + d) + ||d||^2 / (2 t) + weight * penalty(d)`` for every image, with f the mean score over
    noisy copies, and returns ``-d / t``. Entries that the penalty switches off are exactly zero.

    Args:
        model: ``model(images) -> (N, classes)`` for ``(N, event...)``, or ``-> (N)``, the score itself. Images must not
            see each other. Twice differentiable: with ReLU the score has kinks, at which the solve stops short of its
            tolerance and warns.
        penalty: None, ``L1(weight)`` or ``GroupL2(weight, patch)``.
        t: Positive. Where f is L-weakly convex and ``t < 1 / L`` the map without penalty is a
            ``max(1 / t, L / (1 - t L))``-Lipschitz function of the image (for a noise that does not follow it); beyond,
            it belongs to a local minimum.
        noise: Standard deviation of the noise, as a fraction of the range ``max(x) - min(x)`` of each image.
        samples: Number of noisy copies; every image of a batch gets the same noise.
        event_ndim: Trailing dimensions of one image.
        rtol: The iteration ends where ``||d + t S(grad f(x + d))|| <= rtol ||d||``. None picks it by dtype.
        max_steps: Largest number of its steps.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed images alone) or ``"ignore"``.

    Shape:
        Images ``(*batch, event...)``, `target` ``(*batch)`` integers or one for all (None: the class with the largest
        score for the image itself); output like the images. In the call, `generator` draws the noise, and
        `noise`, ``(samples, event...)``, replaces the draw of standard normal numbers.

    Raises:
        ValueError: When called, for bad input or a model that cannot be iterated (active dropout, BatchNorm in training
            mode).
        SolveError: If an element failed, or in backward if the inner Hessian is singular.

    Differentiable in the images (the noise follows their range), in `t`, in the penalty's weight where it is a tensor,
    and in the model's parameters and buffers, to any order. The derivative keeps the support: entries that are zero
    stay zero.

    Example:
        >>> import torch
        >>> from difflayers.proximal import L1, MoreauGrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> explain = MoreauGrad(model, L1(0.1), noise=0.0, event_ndim=1)
        >>> explain(torch.randn(16, 4), target=2).shape
        torch.Size([16, 4])

    Source: J. Zhang, F. Farnia, MoreauGrad: Sparse and Robust Interpretation of Neural Networks via Moreau Envelope,
    ICCV 2023, algorithm 1.

    Departure: the solution, stopped on the residual of its fixed-point equation, instead of the mean of the last 100
    iterates, which is not sparse; step lengths by line search; any channels, batch and device; derivatives of the
    solution instead of a masked gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: L1 | GroupL2 | None = None,
        *,
        t: Number = 1.0,
        noise: float = 0.1,
        samples: int = 32,
        event_ndim: int = 3,
        rtol: float | None = None,
        max_steps: int = 1000,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected an nn.Module, got {type(model).__name__}")
        if penalty is not None and not isinstance(penalty, L1 | GroupL2):
            raise ValueError(f"penalty: expected None, L1 or GroupL2, got {type(penalty).__name__}")
        if penalty is not None:
            check_range(per_element("weight", penalty.weight, at_least=0))
        check_range(per_element("t", t, above=0))
        check_range(per_element("noise", noise, at_least=0))
        for name, value in {"samples": samples, "event_ndim": event_ndim, "max_steps": max_steps}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_policy(on_failure)
        self.model, self.penalty, self.t = model, penalty, t
        self.noise, self.samples, self.event_ndim = noise, samples if noise else 1, event_ndim
        self.rtol, self.max_steps = rtol, max_steps
        self.on_failure: OnFailure = on_failure

    def extra_repr(self) -> str:
        """The options that are not seen in the model."""
        return (
            f"penalty={self.penalty}, t={self.t}, noise={self.noise}, samples={self.samples}, "
            f"event_ndim={self.event_ndim}, rtol={self.rtol}, max_steps={self.max_steps}, "
            f"on_failure={self.on_failure!r}"
        )

    def forward(
        self,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The saliency map of every image."""
        return self._solve(x, target, generator, noise, self.on_failure).value

    def forward_ex(
        self,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Solution[Tensor]:
        """As calling the layer, returning an unchecked :class:`~difflayers.Solution`."""
        return self._solve(x, target, generator, noise, "ignore")

    def _solve(self, x: Tensor, target: Any, generator: Any, noise: Any, on_failure: OnFailure) -> Solution[Tensor]:
        check_tensor("x", x, min_ndim=self.event_ndim)
        event, dtype = x.shape[x.ndim - self.event_ndim :], x.dtype
        refuse_stateful(self.model, [n for n, m in self.model.named_modules() if _drops(m)])
        own = {**_own_tensors(self.model, "_parameters"), **_own_tensors(self.model, "_buffers")}
        floats = {name: _lift(p) for name, p in own.items() if p.is_floating_point()}
        update = _Update(self.model, tuple(m.training for m in self.model.modules()))
        groups = self.penalty.groups(event, x.device) if self.penalty else None
        problem = Problem(update, tuple(floats), event, self.penalty, groups)
        x = _lift(x)
        inputs = self._inputs(problem, x, target, generator, noise, floats)
        tensors = tuple(floats.values())
        start, mask, info = problem.search(
            inputs, tensors, default_rtol(self.rtol, x.dtype), self.max_steps, on_failure
        )
        try:
            solution = solve_inner(
                LAYER,
                problem.smooth,
                start,
                (mask, inputs, tensors),
                event_ndim=1,
                arg_ndims=None,
                solver=Found(),
                adjoint=Implicit(CG()),
                on_failure=on_failure,
            )
        except ValueError:
            # name what the caller passed, not what was made of it
            check_finite([("x", physical(x)), *((f"model.{name}", physical(p)) for name, p in floats.items())])
            raise
        d = solution.value
        lost = torch.isnan(d.detach()).any(-1, keepdim=True)
        salient = torch.where(mask, -torch.where(lost, 0, d) / inputs.t.unsqueeze(-1), 0)
        salient = torch.where(lost, d, salient).reshape(inputs.x.shape).to(dtype)
        status = torch.where(solution.failed, solution.status, info.status)
        return Solution(salient, status, info.steps, info.residual)

    def _inputs(
        self, problem: Problem, x: Tensor, target: Any, generator: Any, noise: Any, tensors: dict[str, Tensor]
    ) -> Inputs:
        """Everything checked, with one batch shape."""
        event = problem.event
        if noise is None:
            draw = torch.randn if self.noise else torch.zeros
            options = {"generator": generator} if self.noise else {}
            noise = draw((self.samples, *event), dtype=x.dtype, device=x.device, **options)
        check_shape("noise", check_tensor("noise", noise, min_ndim=1).shape[1:], event, " behind the samples")
        weight = self.penalty.weight if self.penalty else 0.0
        t, eta = (v if isinstance(v, Tensor) else x.new_full((), v) for v in (self.t, weight))
        noise, t, eta = _lift(noise), _lift(t), _lift(eta)
        check_same([("x", x), ("noise", noise), ("t", t), ("weight", eta), *tensors.items()])
        shape = x.shape[: x.ndim - self.event_ndim]
        batch = broadcast_batch([("x", tuple(shape)), ("t", tuple(t.shape)), ("weight", tuple(eta.shape))])
        x = x.expand(*batch, *event)
        flat = torch.where(torch.isfinite(x), x, 0).flatten(len(batch))
        spread = (flat.amax(-1) - flat.amin(-1)) * self.noise if flat.shape[-1] else flat.sum(-1)
        with torch.no_grad():
            scores = problem.model(x, tuple(tensors.values()))
        if scores.ndim == len(batch):
            if target is not None:
                raise ValueError("target: expected None for a model that returns one score, got a class")
            return Inputs(x, spread, noise, x.new_zeros(*batch, 0), t, eta)
        count = scores.shape[-1]
        chosen = scores.argmax(-1) if target is None else _classes(target, batch, count, x.device)
        choice = chosen.unsqueeze(-1) == torch.arange(count, device=x.device)
        return Inputs(x, spread, noise, choice.to(x.dtype).expand(*batch, count), t, eta)


def _lift(t: Tensor) -> Tensor:
    """Half precision to float32."""
    return t.to(compute_dtype(t.dtype))


def _drops(module: nn.Module) -> bool:
    """Whether a module draws a mask in every evaluation."""
    return isinstance(module, _DropoutNd) and module.training and bool(module.p)


def _classes(target: Any, batch: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """The class of every image as integers."""
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((), target, device=device)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target: expected integers, got {got}")
    if target.ndim:
        check_shape("target", target.shape, batch, ", one class for each image")
    plain = physical(target)
    if plain.numel() and not plain.is_meta and not (int(plain.min()) >= 0 and int(plain.max()) < count):
        raise ValueError(f"target: expected classes in 0..{count - 1}, got {int(plain.min())}..{int(plain.max())}")
    return target
