r"""Self-tuning networks: the weights are trained as a function of the hyperparameters.

.. math:: W(x) = W_0 + \mathrm{diag}(V x) W_1, \qquad b(x) = b_0 + \mathrm{diag}(V x) b_1

With :math:`\phi` all of :math:`W_0, W_1, b_0, b_1, V`, two steps on
:math:`\min_\phi \mathbb E_e f(\hat w_\phi(x + e), x + e)` alternate with one on
:math:`\min_{x, \sigma} \mathbb E_e F(\hat w_\phi(x + e)) - \tau\, \mathrm{Ent}(\sigma)`, where
:math:`e \sim N(0, \sigma^2)`: every sample of a batch sees its own.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from difflayers._checks import check_same, check_shape, check_tensor

from ._method import StepStats, norm
from ._options import check_number
from ._response_layers import Point, Response, replace_layers


class Hyperparameter(NamedTuple):
    """A number with a range, for :class:`SelfTuning`.

    It is tuned on the scale on which its range is the whole line: by the logarithm of its distance to `low` without an
    upper end, else by the logit.

    Attributes:
        value: Where it starts, inside of the range.
        low: Lower end.
        high: Upper end; ``inf`` for none.

    Example:
        >>> from difflayers.bilevel import Hyperparameter
        >>> Hyperparameter(0.2, high=0.9)
        Hyperparameter(value=0.2, low=0.0, high=0.9)
    """

    value: float
    low: float = 0.0
    high: float = math.inf


class SelfTuning(nn.Module):
    r"""A module whose weights follow its hyperparameters, which are tuned in the same run that trains it.

    Solves ``min_x F(w*(x))`` with ``w*(x) = argmin_w f(w, x)`` for a few hyperparameters x that the upper objective
    does not see, through an affine model of the best response: in every ``nn.Linear`` and convolution ``W(x) = W0 + (V
    x) * W1`` row by row, the bias alike. It is fitted on random hyperparameters around the current ones, another in
    each sample of a batch; how far around is tuned too.

    Calling it calls the module with the weights at the current hyperparameters, or at those given.

    Args:
        module: The module; copied. At first the weights are its own at every x. The layers with a response are those of
            type ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``, other parameters are trained as they are.
        hyperparameters: Dict from names to :class:`Hyperparameter` (or a positive number, the start). The name of an
            ``nn.Dropout`` of the module tunes its rate; the lower objective gets all of them.
        scale: Standard deviation of the perturbation to begin with, on the scale of the logarithm or logit.
        entropy: tau.

    Shape:
        ``layer(u, x=None)``: x is ``(n,)``, or ``(B, n)`` with a row for each sample, on the scale of the logarithm
        or logit, as ``layer.x``.

    Attributes:
        x: Parameter ``(n,)``, the hyperparameters on that scale.
        log_scale: Parameter ``(n,)``, the logarithm of the standard deviations.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in the input, in x and in all parameters, to any order.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Hyperparameter, SelfTuning
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
        >>> tuned = SelfTuning(net, {"1": Hyperparameter(0.2, high=0.9), "decay": 1e-3})
        >>> def lower(model, values, batch):  # the mean over samples, each with its own decay
        ...     u, t = batch
        ...     return ((model(u) - t).square().mean(1) + values["decay"] * tuned.squared_norm()).mean()
        >>> def upper(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> optimizers = torch.optim.Adam(tuned.response_parameters()), torch.optim.Adam(tuned.hyper_parameters())
        >>> batch = torch.randn(16, 4), torch.randn(16, 2)
        >>> stats = tuned.step(lower, upper, *optimizers, [batch, batch], batch)
        >>> {name: f"{float(value):.1g}" for name, value in tuned.values().items()}
        {'1': '0.2', 'decay': '0.001'}

    Source: M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, Self-Tuning Networks: Bilevel Optimization of
    Hyperparameters using Structured Best-Response Functions, 2019, section 3 and algorithm 1.

    Departure: x enters ``V x`` as its distance to the start, which W0 makes up for; V starts from zero; weight and bias
    of a layer share one V. The upper objective is evaluated with the module in evaluation mode.
    """

    steps: Tensor
    gradients: Tensor
    start: Tensor

    def __init__(
        self,
        module: nn.Module,
        hyperparameters: Mapping[str, Hyperparameter | float],
        *,
        scale: float = 0.5,
        entropy: float = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
        if not hyperparameters:
            raise ValueError("hyperparameters: expected at least one, got none")
        check_number("scale", scale)
        self.ranges = {name: _range(name, h) for name, h in hyperparameters.items()}
        self.entropy, self._point = check_number("entropy", entropy, ends="[)"), Point()
        self.module = replace_layers(copy.deepcopy(module), self._point, list(self.ranges))
        first = next((p for p in module.parameters() if p.requires_grad), None)
        if first is None or not any(isinstance(m, Response) for m in self.module.modules()):
            raise ValueError("module: expected an nn.Linear or a convolution that is trained, got none")
        start = [_free(h) for h in self.ranges.values()]
        self.x = nn.Parameter(first.detach().new_tensor(start))
        self.log_scale = nn.Parameter(torch.full_like(self.x, math.log(scale)))
        self.register_buffer("start", self.x.detach().clone())
        for name in ("steps", "gradients"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=first.device))

    def extra_repr(self) -> str:
        """The hyperparameters where they are."""
        return ", ".join(f"{name}={float(value):.4g}" for name, value in self.values().items())

    def forward(self, u: Any, x: Tensor | None = None) -> Any:
        """The module with the weights at `x`."""
        with self._at(self.x if x is None else x):
            return self.module(u)

    def values(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """The hyperparameters in their ranges, by name.

        Args:
            x: ``(..., n)``; None: the current ones, detached.
        """
        each = (self.x.detach() if x is None else x).unbind(-1)
        return {name: _value(raw, h) for (name, h), raw in zip(self.ranges.items(), each, strict=True)}

    def scales(self) -> dict[str, Tensor]:
        """Standard deviations of the perturbation, on the scale of the logarithm or logit."""
        return dict(zip(self.ranges, self.log_scale.detach().exp().unbind(-1), strict=True))

    def hyper_parameters(self) -> list[nn.Parameter]:
        """For the upper optimiser: x and the scales."""
        return [self.x, self.log_scale]

    def response_parameters(self) -> list[nn.Parameter]:
        """For the lower optimiser: all others."""
        return list(self.module.parameters())

    def squared_norm(self) -> Tensor:
        """Sum of the squares of all weights with a response, of every sample in an objective: ``(B,)``.

        Outside of an objective it is one number, at the current hyperparameters.
        """
        layers = [m for m in self.module.modules() if isinstance(m, Response)]
        with contextlib.nullcontext() if self._point.x is not None else self._at(self.x):
            return sum((m.squared_norm() for m in layers[1:]), layers[0].squared_norm())

    def perturbed(self, size: int, noise: Tensor | None = None) -> Tensor:
        """Hyperparameters around the current ones, differentiable in both parameters.

        Args:
            size: How many.
            noise: ``(size, n)`` in place of standard normal numbers.
        """
        if noise is None:
            noise = torch.randn(size, self.x.numel(), dtype=self.x.dtype, device=self.x.device)
        check_shape("noise", noise.shape, (size, self.x.numel()))
        return self.x + self.log_scale.exp() * noise

    def lower_loss(self, objective: Callable[..., Tensor], batch: Any, *, noise: Tensor | None = None) -> Tensor:
        """The lower objective at random hyperparameters, differentiable in the response alone.

        Args:
            objective: ``fn(model, values, batch) -> 0-dim tensor``, the mean over the samples of the batch; `values` is
                a dict from names to tensors ``(B,)``, the hyperparameters of each sample.
            batch: A tensor or pytree of them, all with one row a sample.
            noise: As in :meth:`perturbed`.
        """
        with self._at(self.perturbed(_size(batch), noise).detach()) as x:
            return _scalar("lower", objective(self.module, self.values(x), batch))

    def upper_loss(self, objective: Callable[..., Tensor], batch: Any, *, noise: Tensor | None = None) -> Tensor:
        """The upper objective at random hyperparameters, less tau times the entropy of their distribution.

        Args:
            objective: ``fn(model, batch) -> 0-dim tensor``, the mean over the samples of the batch.
            batch: A tensor or pytree of them, all with one row a sample.
            noise: As in :meth:`perturbed`.
        """
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        try:
            with self._at(self.perturbed(_size(batch), noise)):
                value = _scalar("upper", objective(self.module, batch))
        finally:
            for m, mode in modes:
                m.training = mode
        constant = self.x.numel() / 2 * math.log(2 * math.pi * math.e)
        return value - self.entropy * (self.log_scale.sum() + constant)

    def step(
        self,
        lower: Callable[..., Tensor],
        upper: Callable[..., Tensor],
        lower_optimizer: torch.optim.Optimizer,
        upper_optimizer: torch.optim.Optimizer,
        lower_batches: Sequence[Any],
        upper_batch: Any,
    ) -> StepStats:
        """One lower step on each of some batches (two in the paper), then one upper step.

        Args:
            lower: As in :meth:`lower_loss`.
            upper: As in :meth:`upper_loss`.
            lower_optimizer: Of :meth:`response_parameters`.
            upper_optimizer: Of :meth:`hyper_parameters`.
            lower_batches: Batches of training data.
            upper_batch: A batch of validation data.

        Returns:
            :class:`StepStats`; ``stationarity`` is the norm of the upper gradient in x and the scales,
            ``infeasibility`` that of the last lower one in the response.
        """
        if not lower_batches:
            raise ValueError("lower_batches: expected at least one batch, got none")
        for batch in lower_batches:
            low, slope = _descend(self.lower_loss, lower, batch, self.response_parameters(), lower_optimizer)
        up, direction = _descend(self.upper_loss, upper, upper_batch, self.hyper_parameters(), upper_optimizer)
        self.steps += 1
        self.gradients += len(lower_batches) + 1
        return StepStats(int(self.steps), up, low, direction, slope, gradients=int(self.gradients), products=0)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """The state dict of the plain module with the weights at the current hyperparameters; copied."""
        plain = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        for path, layer in self.module.named_modules(remove_duplicate=False):
            if isinstance(layer, Response):
                prefix = f"{path}." if path else ""
                plain = {name: value for name, value in plain.items() if not name.startswith(prefix)}
                plain.update({f"{prefix}{name}": value for name, value in layer.at(self.x - self.start)})
        return plain

    @contextlib.contextmanager
    def _at(self, x: Tensor) -> Iterator[Tensor]:
        n = len(self.ranges)
        check_same([("parameters", self.x), ("x", check_tensor("x", x))])
        if x.ndim not in (1, 2) or x.shape[-1] != n:
            raise ValueError(f"x: expected shape ({n},) or (B, {n}), got {tuple(x.shape)}")
        before = self._point.x, self._point.values
        self._point.x, self._point.values = x - self.start, torch.stack(list(self.values(x).values()), -1)
        try:
            yield x
        finally:
            self._point.x, self._point.values = before


def _descend(
    loss: Callable[..., Tensor],
    objective: Callable[..., Tensor],
    batch: Any,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[Tensor, Tensor]:
    """One step of an optimiser on its own parameters alone; the loss and the norm of its gradient."""
    with torch.enable_grad():
        value = loss(objective, batch)
        wanted = [p for p in parameters if p.requires_grad]
        slopes = torch.autograd.grad(value, wanted, allow_unused=True)
    optimizer.zero_grad()
    for p, slope in zip(wanted, slopes, strict=True):
        p.grad = slope
    optimizer.step()
    optimizer.zero_grad()
    found = [slope for slope in slopes if slope is not None]
    return value.detach(), norm(*found) if found else value.detach().new_zeros(())


def _range(name: str, given: Any) -> Hyperparameter:
    h = given if isinstance(given, Hyperparameter) else Hyperparameter(given)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in h)
    if not numbers or not -math.inf < h.low < h.value < h.high or math.isinf(h.value):
        raise ValueError(f"hyperparameters[{name!r}]: expected low < value < high, got {given!r}")
    return h


def _free(h: Hyperparameter) -> float:
    if math.isinf(h.high):
        return math.log(h.value - h.low)
    return math.log((h.value - h.low) / (h.high - h.value))


def _value(raw: Tensor, h: Hyperparameter) -> Tensor:
    if math.isinf(h.high):
        return h.low + raw.exp()
    return h.low + (h.high - h.low) * raw.sigmoid()


def _size(batch: Any) -> int:
    leaves = [leaf for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves:
        raise ValueError("batch: expected a tensor or a pytree of tensors with one row a sample, got none")
    return leaves[0].shape[0]


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} output: expected a tensor, got {type(value).__name__}")
    check_shape(f"{name} output", value.shape, (), ", one number (take the mean over the samples)")
    return value
