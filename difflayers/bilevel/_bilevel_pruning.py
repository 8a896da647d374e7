r"""BiP: pruning as a bilevel problem, the mask above and the weights below.

.. math:: \min_m \ell(m \odot \theta^*(m)), \qquad
    \theta^*(m) = \arg\min_\theta \ell(m \odot \theta) + \frac\gamma2 \|\theta\|^2

with m binary and of a given number of ones. With :math:`g = \nabla \ell` at :math:`m \odot \theta` and the curvature
of the loss neglected, :math:`m \odot g + \gamma \theta = 0` gives :math:`d\theta^*/dm = -\mathrm{diag}(g)/\gamma`, so

.. math:: \frac{d\ell}{dm} = \Big(\theta - \frac1\gamma m \odot g\Big) \odot g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers._checks import check_shape
from difflayers.linalg._autodiff import gradients

from ._method import StepStats, norm
from ._options import check_number
from ._schedules import Constant, Schedule, as_schedule


class BilevelPruning(nn.Module):
    r"""A module whose weights are masked to an exact sparsity, with a mask that is trained next to the weights.

    Solves ``min_m loss(m * theta*(m))`` over binary masks m with a given number of zeros, where ``theta*(m)`` minimises
    ``loss(m * theta) + gamma / 2 |theta|^2``. Every entry has a score; the mask is one on the largest. A step trains
    the weights under the mask with your optimiser, then moves the scores by ``-step * dl/dm`` with ``dl/dm = (theta - m
    g / gamma) g`` at the binary mask and ``g = dl/d(m * theta)``. A masked weight keeps its value, so that it may
    return.

    Calling it calls the module with masked weights. Its parameters are those of the module, for your optimiser; scores
    and masks are buffers. ``state_dict()`` with that of the optimiser resumes a run to the last bit.

    Args:
        module: The module to prune; its parameters are trained in place.
        sparsity: Share of zeros, in [0, 1): of all pruned weights together; or a mapping from parameter names to the
            share in each, the others staying dense.
        gamma: Of the lower problem, above 0. The larger it is, the less the mask sees that the weights will follow.
        step: Length of a step of the scores, which start from ``|theta|``, divided by the largest.
        per_layer: The same sparsity in every tensor instead of in all together.
        rows: Whole rows (units, filters: index 0 of a weight) with their bias, if any, instead of single weights.
        exclude: Names of parameters or submodules that stay dense. Parameters of fewer than two dimensions (biases,
            scales of norms) always do, but for the biases of pruned rows.
        decay: Weight decay of the pruned weights in the lower step.

    Attributes:
        masks: Dict from parameter names to boolean tensors, True where a weight is kept.

    Raises:
        ValueError: For bad input, naming the argument.
        FloatingPointError: In a step with a gradient that is not finite; scores and mask are then as before, and
            weights too where it is that of the lower problem.

    Differentiable in the inputs and parameters of the module: the gradient of a masked weight is zero.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import BilevelPruning
        >>> linear = torch.nn.Linear(4, 1, bias=False)
        >>> linear.load_state_dict({"weight": torch.tensor([[3.0, 2.0, 0.0, -1.0]])})
        <All keys matched successfully>
        >>> u = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 1.0, 1.0])
        >>> t = linear(u).detach()
        >>> pruning = BilevelPruning(linear, 0.5, gamma=10.0)
        >>> pruning.masks["weight"]  # the first weight is large, and its input small
        tensor([[ True,  True, False, False]])
        >>> optimizer = torch.optim.SGD(pruning.parameters(), 0.05)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> for _ in range(100):
        ...     stats = pruning.step(loss, optimizer, (u, t), (u, t))
        >>> pruning.masks["weight"]
        tensor([[False,  True, False,  True]])
        >>> pruning.export()["weight"].count_nonzero()
        tensor(2)

    Source: Y. Zhang, Y. Yao, P. Ram, P. Zhao, T. Chen, M. Hong, Y. Wang, S. Liu, Advancing Model Pruning via Bi-level
    Optimization, 2022, algorithm 1.

    Departure: the derivative has the factor m that follows from the lower problem, where the published code multiplies
    the gradients of all parameters without it. Gamma enters the derivative alone unless ``decay=gamma``: a decay as
    large as a good gamma keeps networks from learning.
    """

    steps: Tensor

    def __init__(
        self,
        module: nn.Module,
        sparsity: float | Mapping[str, float],
        *,
        gamma: float = 1.0,
        step: float | Schedule = Constant(0.1),
        per_layer: bool = False,
        rows: bool = False,
        exclude: Sequence[str] = (),
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
        self.module, self.rows, self.beta = module, bool(rows), as_schedule("step", step)
        self.gamma, self.decay = check_number("gamma", gamma), check_number("decay", decay, ends="[)")
        names = _prunable(module, exclude)
        if isinstance(sparsity, Mapping):
            unknown = [name for name in sparsity if name not in names]
            if unknown or not sparsity:
                raise ValueError(f"sparsity: expected names from {names}, got {unknown}")
            shares = {name: _share(sparsity[name], f"[{name!r}]") for name in names if name in sparsity}
            self.groups: list[tuple[tuple[str, ...], float]] = [((name,), share) for name, share in shares.items()]
        elif not names:
            raise ValueError(f"module: expected parameters of two dimensions or more, got none in {type(module)}")
        else:
            share = _share(sparsity)
            self.groups = [((name,), share) for name in names] if per_layer else [(tuple(names), share)]
        found = dict(module.named_parameters())
        # what one score decides on: a tensor, or the rows of a weight and their entry in the bias
        self.members = {name: _members(name, module, exclude, self.rows) for group, _ in self.groups for name in group}
        self.scores, self.kept = nn.Module(), nn.Module()
        for group, _ in self.groups:
            sizes = [self._size(found[name].detach()) for name in group]
            largest = torch.stack([size.max() for size in sizes]).max().clamp_min(torch.finfo(sizes[0].dtype).tiny)
            for name, size in zip(group, sizes, strict=True):
                self.scores.register_buffer(_key(name), size / largest)
                self.kept.register_buffer(_key(name), torch.ones_like(size, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=sizes[0].device))
        self._evaluated_at: dict[str, Tensor] | None = None
        self._select()

    def extra_repr(self) -> str:
        """The options, and what is kept."""
        kept, of = (sum(int(f(mask)) for mask in self.masks.values()) for f in (torch.sum, torch.numel))
        return f"kept={kept} of {of}, gamma={self.gamma}, decay={self.decay}, rows={self.rows}"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks in the shape of the parameters."""
        found = dict(self.module.named_parameters())
        return {
            member: self._spread(self.kept.get_buffer(_key(name)), found[member]).expand_as(found[member])
            for name, members in self.members.items()
            for member in members
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module with masked weights."""
        if self._evaluated_at is not None:
            return functional_call(self.module, self._evaluated_at, args, kwargs)
        return functional_call(self.module, self._masked(), args, kwargs)

    def step(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        upper_batch: Any = None,
        lower_batch: Any = None,
    ) -> StepStats:
        """Takes one step of the weights, then one of the mask.

        Args:
            loss: ``loss(model, batch) -> 0-dim tensor`` with `model` this layer.
            optimizer: Of ``parameters()``, of any kind. For more steps on the weights use it as usual in between.
            upper_batch: For the mask.
            lower_batch: For the weights.

        Returns:
            :class:`StepStats`; ``stationarity`` is the norm of ``dl/dm``, ``infeasibility`` that of the gradient of the
            lower problem in all parameters.
        """
        optimizer.zero_grad()
        with torch.enable_grad():
            value = _scalar(loss(self, lower_batch))
            value.backward()
        decayed = {member for members in self.members.values() for member in members} if self.decay else ()
        slopes = []
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                if name in decayed:
                    parameter.grad.add_(parameter.detach(), alpha=self.decay)
                slopes.append(parameter.grad.detach())
        slope = norm(*slopes) if slopes else value.detach().new_zeros(())
        _refuse_infinite("lower problem", slope, value)
        optimizer.step()
        upper, direction = self.update_mask(loss, upper_batch)
        steps = int(self.steps)
        return StepStats(steps, upper, value.detach(), direction, slope, gradients=2 * steps, products=0)

    def update_mask(self, loss: Callable[[nn.Module, Any], Tensor], batch: Any = None) -> tuple[Tensor, Tensor]:
        """Moves the scores along the implicit gradient, and takes the new largest ones as the mask.

        Args:
            loss: As in :meth:`step`.
            batch: For the mask.

        Returns:
            The loss, and the norm of ``dl/dm``.
        """
        with torch.no_grad():
            at = {name: z.requires_grad_() for name, z in self._masked().items()}
        # buffers are cloned, so that statistics see the batches of the weights alone
        self._evaluated_at = at | {name: b.clone() for name, b in self.module.named_buffers()}
        try:
            with torch.enable_grad():
                value = _scalar(loss(self, batch))
                slopes = gradients(value, list(at.values()))
        finally:
            self._evaluated_at = None
        gradient = self.mask_gradient(dict(zip(at, slopes, strict=True)))
        length = norm(*gradient.values())
        _refuse_infinite("mask", length, value)
        step = self.beta(int(self.steps))
        for name, direction in gradient.items():
            self.scores.get_buffer(_key(name)).sub_(direction, alpha=step)
        self.steps += 1
        self._select()
        return value.detach(), length

    @torch.no_grad()
    def mask_gradient(self, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``dl/dm`` by name from ``g = dl/d(m * theta)``; one number a row for rows."""
        found, masks, out = dict(self.module.named_parameters()), self.masks, {}
        for name, members in self.members.items():
            terms = []
            for member in members:
                theta, g = found[member], slopes[member]
                term = (theta - masks[member] * g / self.gamma) * g
                terms.append(term.flatten(1).sum(1) if self.rows and term.ndim > 1 else term)
            out[name] = sum(terms[1:], terms[0])
        return out

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """The state dict of the plain module, with zeros where the mask has them; copied."""
        plain = self.module.state_dict()
        masks = self.masks
        first: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            first.setdefault(id(parameter), name)
            mask = masks.get(first[id(parameter)])
            if mask is not None:
                plain[name] = plain[name].where(mask, 0)
        return {name: value.detach().clone() for name, value in plain.items()}

    def _masked(self) -> dict[str, Tensor]:
        found = dict(self.module.named_parameters())
        return {name: found[name] * mask for name, mask in self.masks.items()}

    def _size(self, theta: Tensor) -> Tensor:
        """What scores start from: magnitudes; of rows, their root mean square."""
        return theta.square().flatten(1).mean(1).sqrt() if self.rows else theta.abs()

    def _spread(self, mask: Tensor, theta: Tensor) -> Tensor:
        return mask.reshape(-1, *(1,) * (theta.ndim - 1)) if self.rows else mask

    @torch.no_grad()
    def _select(self) -> None:
        """The mask of the scores; equal scores in the order of the entries."""
        for group, share in self.groups:
            scores = [self.scores.get_buffer(_key(name)) for name in group]
            flat = torch.cat([s.reshape(-1) for s in scores])
            keep = flat.numel() - round(share * flat.numel())
            chosen = torch.zeros_like(flat, dtype=torch.bool)
            chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
            parts = chosen.split([s.numel() for s in scores])
            for name, part, s in zip(group, parts, scores, strict=True):
                self.kept.get_buffer(_key(name)).copy_(part.reshape(s.shape))


def _key(name: str) -> str:
    return name.replace(".", "/")  # buffers may not have a dot in their name


def _prunable(module: nn.Module, exclude: Sequence[str]) -> list[str]:
    if isinstance(exclude, str):
        raise ValueError(f"exclude: expected a sequence of names, got the string {exclude!r}")
    known = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_modules()}
    for name in exclude:
        if name not in known:
            raise ValueError(f"exclude: expected names of parameters or submodules, got {name!r}")
    return [n for n, p in module.named_parameters() if p.ndim >= 2 and p.requires_grad and not _within(n, exclude)]


def _within(name: str, exclude: Sequence[str]) -> bool:
    return any(name == out or name.startswith(f"{out}.") for out in exclude)


def _members(name: str, module: nn.Module, exclude: Sequence[str], rows: bool) -> tuple[str, ...]:
    path, _, kind = name.rpartition(".")
    layer, bias = module.get_submodule(path), f"{path}.bias".lstrip(".")
    if not rows or kind != "weight" or not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (name,)
    return (name,) if layer.bias is None or _within(bias, exclude) else (name, bias)


def _share(value: Any, where: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"sparsity{where}: expected a share of at least 0 and below 1, got {value!r}")
    return float(value)


def _refuse_infinite(where: str, length: Tensor, value: Tensor) -> None:
    """Before anything moves: weights and the moments of an optimiser would not come back."""
    if not bool(torch.isfinite(length)):
        raise FloatingPointError(
            f"BilevelPruning: the gradient in the {where} is not finite (loss {float(value.detach()):.3g})"
        )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"loss output: expected a tensor, got {type(value).__name__}")
    check_shape("loss output", value.shape, (), ", one number (take the mean or the sum)")
    return value
