r"""Label-distributionally robust losses: the worst mean over the labels that an annotator could have meant.

.. math:: L(f, y) = \max_{p \in \Delta} \sum_k p_k d_k - \lambda \mathrm{KL}(p \| 1/K)
    = \lambda \log \tfrac1K \sum_k e^{d_k / \lambda}, \qquad d_k = f_k - f_y + c_k, \; c_y = 0

The adaptive form chooses the temperature for each sample, near :math:`\lambda_0`:

.. math:: \max_\lambda \; \lambda \log \tfrac1K \sum_k e^{d_k / \lambda}
    - \frac{a \log K}{2 \lambda_0} (\lambda - \lambda_0)^2, \qquad a > 1 .

Its maximisers solve :math:`\mathrm{KL}(p_\lambda \| 1/K) = a \log K \, (1 - \lambda / \lambda_0)`, which puts them
between :math:`\lambda_0 (1 - 1/a)` and :math:`\lambda_0`. Both sides fall with :math:`\lambda`, so there can be several
solutions: local maxima lie where the difference changes its sign downwards on a grid; each is found by Newton's method
in its bracket, and the best counts. The gradient is that of the loss at a fixed temperature (envelope theorem), the
second derivative follows the temperature.

D. Zhu, Y. Ying, T. Yang, Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness
and Adaptivity, 2023.

Symbols: ``d`` margins of the classes, ``K`` their number.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from difflayers._checks import check_same, check_tensor, compute_dtype, fits
from difflayers._solution import Info, Status
from difflayers.implicit import ImplicitProblem, envelope, solution_map
from difflayers.linalg._autodiff import autocast_off
from difflayers.proximal._operands import Number, check_range, check_that, per_element, per_entry

from ._exponents import exponents
from ._root_search import Terms, certain, find_root

Reduction = Literal["mean", "sum", "none"]

STARTS = 16
MEMORY = 2**20  # numbers that a step of the search may hold at once
FLAT = 1.5e-8  # a slope below the root of a rounding unit has no digit that is right


def label_robust_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Number = 1.0,
    margin: Number = 0.0,
    adaptive: Number | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The label-distributionally robust loss LDR-KL, and ALDR-KL, which adapts the temperature to each sample.

    Solves ``max_p sum_k p_k d_k - temperature * KL(p || 1/K)`` over the simplex, with ``d_k = logits_k - logits_y +
    margin`` and ``d_y = 0``; with `adaptive` ``= a`` also over the temperature, for ``a log(K) / (2 temperature)
    (lambda - temperature)^2`` less. Temperature 0 is the multiclass hinge loss of Crammer and Singer, 1 is
    cross-entropy less ``log K``, and large ones approach the mean of d.

    Args:
        logits: ``(*batch, K)``; a class at ``-inf`` is out of the question, but counts in K.
        targets: Integers from 0 to K - 1, of shape ``(*batch)`` or one that broadcasts to it.
        temperature: At least 0, with `adaptive` more: a number, or a tensor that broadcasts to the batch.
        margin: A number, or a tensor that broadcasts with `logits`; that of the target is not used.
        adaptive: None, or more than 1: a number, or a tensor that broadcasts to the batch. Temperatures stay between
            ``temperature * (1 - 1/adaptive)`` and `temperature`; the smaller `adaptive`, the more they vary. Samples
            with a large loss get a low temperature.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.

    Returns:
        The loss; of shape ``(*batch)`` for ``"none"``. NaN where the logits are.

    Raises:
        ValueError: For a target or a number out of range, a shape that does not fit, or a wrong dtype.
        SolveError: In the second derivative of the adaptive loss where two local maxima over the temperature have just
            merged into the best one, so that its second derivative is zero.

    Differentiable in `logits`, `temperature`, `margin` and `adaptive`, to any order; the gradient in the logits is
    ``p - e_y``. At temperature 0 tied classes share the gradient. Where two temperatures are equally good the adaptive
    loss has a kink: the derivative is that of the lower one.

    Example:
        >>> import torch
        >>> from difflayers.conic import label_robust_loss
        >>> logits, targets = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]]), torch.tensor([0, 2])
        >>> label_robust_loss(logits, targets, reduction="none")
        tensor([-0.9288,  1.9963])
        >>> label_robust_loss(logits, targets, temperature=0.0, margin=1.0, reduction="none")
        tensor([0., 4.])
        >>> label_robust_loss(logits, targets, adaptive=1.5, reduction="none")
        tensor([-0.7314,  2.2677])

    Source: D. Zhu, Y. Ying, T. Yang, Label Distributionally Robust Losses for Multi-class Classification, 2023:
    LDR-KL and ALDR-KL.
    Departure: the temperature solves its equation, with the margin and without a constant in the logarithm, instead of
    one update of a stored value each time a sample is seen.
    """
    d = _class_margins(logits, targets, margin)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    with autocast_off(logits):
        limits = {"at_least": 0.0} if adaptive is None else {"above": 0.0}
        peak = _beside_classes("temperature", temperature, d, **limits)
        if adaptive is None:
            loss = _fixed(d, peak)
        else:
            loss = _adaptive(d, peak, _beside_classes("adaptive", adaptive, d, above=1.0))
        loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
        return loss.to(logits.dtype)


class LabelRobustLoss(nn.Module):
    """:func:`label_robust_loss` as a module.

    Args:
        temperature: At least 0, with `adaptive` more.
        margin: What every class but the target gets on top.
        adaptive: None, or a number above 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: For numbers out of range, at the first call.

    Example:
        >>> import torch
        >>> from difflayers.conic import LabelRobustLoss
        >>> LabelRobustLoss(adaptive=1.5)(torch.zeros(4, 10), torch.arange(4))
        tensor(0.)

    Source: D. Zhu, Y. Ying, T. Yang, Label Distributionally Robust Losses for Multi-class Classification, 2023.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        margin: float = 0.0,
        adaptive: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature, self.margin, self.adaptive, self.reduction = temperature, margin, adaptive, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits ``(*batch, K)`` and targets ``(*batch)``."""
        return label_robust_loss(
            logits,
            targets,
            temperature=self.temperature,
            margin=self.margin,
            adaptive=self.adaptive,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"temperature={self.temperature}, margin={self.margin}, adaptive={self.adaptive}, "
            f"reduction={self.reduction!r}"
        )


# ------------------------------------------------------------------------------------------------------------ arguments


def _class_margins(logits: Tensor, targets: Tensor, margin: Number) -> Tensor:
    """``d``, in the dtype of the computation."""
    check_tensor("logits", logits, min_ndim=1)
    batch, K = logits.shape[:-1], logits.shape[-1]
    if K < 1:
        raise ValueError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: expected a tensor of integers, got {got}")
    if targets.device != logits.device:
        raise ValueError(f"targets: expected device {logits.device} as of logits, got {targets.device}")
    _check_fits("targets", targets, batch, "the batch of logits")
    check_that(
        (targets >= 0) & (targets < K), lambda: f"targets: expected integers from 0 to {K - 1}, got others among them"
    )
    index = targets.long().expand(batch).unsqueeze(-1)
    f = logits.to(compute_dtype(logits.dtype))
    if isinstance(margin, Tensor):
        check_tensor("margin", margin)
        check_same([("logits", logits), ("margin", margin)])
        _check_fits("margin", margin, logits.shape, "logits")
        margin = margin.to(f.dtype)
    check_range(per_entry("margin", margin))
    others = torch.arange(K, device=logits.device) != index
    # a target at -inf makes every other class infinitely likely; its own margin is 0 whatever it is
    return torch.where(others, f - f.gather(-1, index) + margin, 0)


def _beside_classes(name: str, number: Number, d: Tensor, **limits: float) -> Tensor:
    """A number for each sample as ``(*batch, 1)`` or ``(1,)``."""
    check_range(per_element(name, number, **limits))
    if not isinstance(number, Tensor):
        if number == math.inf:
            raise ValueError(f"{name}: expected a finite number, got inf")
        return d.new_full((1,), number)
    check_tensor(name, number)
    number = number.to(compute_dtype(number.dtype))
    check_same([("logits", d), (name, number)])
    _check_fits(name, number, d.shape[:-1], "the batch of logits")
    return number.unsqueeze(-1)


def _check_fits(name: str, t: Tensor, shape: torch.Size, of: str) -> None:
    if not fits(t.shape, shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)}, {of}, got {tuple(t.shape)}")


# ---------------------------------------------------------------------------------------------------- fixed temperature


def _fixed(d: Tensor, temperature: Tensor) -> Tensor:
    """The largest d where the temperature is 0, elsewhere the soft maximum; ``(*batch)``."""
    highest = d.detach().amax(-1, keepdim=True)
    top = torch.where(temperature.detach() == 0, d.amax(-1, keepdim=True), highest)
    return (top + temperature * _log_mean_exp(exponents(d - highest, temperature))).squeeze(-1)


def _log_mean_exp(x: Tensor) -> Tensor:
    """For exponents of at most 0, of which one is 0; exact to rounding for tiny ones too."""
    little = torch.expm1(x).mean(-1, keepdim=True)
    near = little.detach() > -0.5
    return torch.where(near, torch.where(near, little, 0).log1p(), x.exp().mean(-1, keepdim=True).log())


# ------------------------------------------------------------------------------------------------- adaptive temperature


def _adaptive(d: Tensor, peak: Tensor, adaptive: Tensor) -> Tensor:
    """The loss at the best temperature, ``(*batch)``."""
    if d.shape[-1] == 1:  # no other class: zero at every temperature
        return _fixed(d, peak)
    args = d, peak.expand(*d.shape[:-1], 1), adaptive.expand(*d.shape[:-1], 1)
    return envelope(_value, solution_map(_TEMPERATURE, args, on_failure="raise"), args)


def _value(temperature: Tensor, d: Tensor, peak: Tensor, adaptive: Tensor) -> Tensor:
    """What is maximised over the temperature."""
    cost = adaptive * math.log(d.shape[-1]) / 2 * (temperature - peak) * (temperature / peak - 1)
    return _fixed(d, temperature) - cost.squeeze(-1)


def _divergence(d: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``KL(p || 1/K)``, its derivative in the logarithm of the temperature, and the size of its terms."""
    x = exponents(d - d.detach().amax(-1, keepdim=True), temperature)
    p, log_mean = torch.softmax(x, -1), _log_mean_exp(x)
    mean = (p * x).sum(-1, keepdim=True)
    return mean - log_mean, -(p * (x - mean).square()).sum(-1, keepdim=True), mean.abs() + log_mean.abs()


def _balance(temperature: Tensor, d: Tensor, peak: Tensor, adaptive: Tensor) -> Tensor:
    """Minus the derivative of :func:`_value`, without units: negative below a local maximum, positive above."""
    return _divergence(d, temperature)[0] / (adaptive * math.log(d.shape[-1])) + (temperature / peak - 1)


def _find_temperature(d: Tensor, peak: Tensor, adaptive: Tensor) -> tuple[Tensor, Info, tuple[Tensor, ...]]:
    """The best of all local maxima that a grid of temperatures sees. The search is for ``log(temperature / peak)``."""
    wide, top, a = d.double(), peak.double(), adaptive.double()
    weight = a * math.log(d.shape[-1])

    def equation(t: Tensor) -> Terms:
        divergence, slope, size = _divergence(wide, top * t.exp())
        value = divergence / weight + torch.expm1(t)
        step = -value / (slope / weight + t.exp())
        return value, step, step, size / weight + t.exp() + 1

    lowest = torch.log1p(-1 / a)
    edges = lowest * torch.linspace(1, 0, STARTS, dtype=wide.dtype, device=wide.device)
    at_once = max(1, MEMORY // max(1, wide.numel()))  # many temperatures in one go, if the batch is small
    values = [
        _divergence(wide.unsqueeze(-2), (top * part.exp()).unsqueeze(-1))[0].squeeze(-1) / weight + torch.expm1(part)
        for part in edges[..., 1:-1].split(at_once, -1)
    ]
    # known: negative or zero at the lower end, positive or zero at the upper
    above = pad(pad((torch.cat(values, -1) >= 0).long(), (1, 0)), (0, 1), value=1)
    count = (above.diff(dim=-1) == 1).cumsum(-1)
    best = best_value = torch.full_like(lowest, -math.inf)
    for k in range(int(count[..., -1].amax()) if count.numel() else 0):  # seldom more than one
        # an element with fewer local maxima looks at its last one again
        which = torch.minimum(count[..., -1:], torch.full_like(count[..., -1:], k + 1))
        at = (count < which).sum(-1, keepdim=True)
        low, high = edges.gather(-1, at), edges.gather(-1, at + 1)
        t = find_root(equation, low, high, (low + high) / 2)
        value = _value(top * t.exp(), wide, top, a).unsqueeze(-1)
        better = ~(value <= best_value)  # NaN counts, so that it is seen
        best, best_value = torch.where(better, t, best), torch.where(better, value, best_value)
    temperature = top * best.exp()
    slope = (_divergence(wide, temperature)[1] / weight + best.exp()) / temperature
    return temperature.to(d.dtype), certain(best_value.squeeze(-1).to(d.dtype)), (slope.to(d.dtype),)


def _divide(
    value: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The linear system of the temperature. Where two maxima merge its slope is zero."""
    slope = factors[0]
    x = rhs / slope
    info, flat = certain(x.squeeze(-1)), (slope * args[1]).abs().squeeze(-1) <= FLAT
    return x, info._replace(status=torch.where(flat, int(Status.SINGULAR), info.status))


_TEMPERATURE = ImplicitProblem(
    solve=_find_temperature,
    residual=_balance,
    linear_solve=_divide,
    value_ndim=1,
    arg_ndims=(1, 1, 1),
    factor_ndims=(1,),
    symmetric=True,
    name="label_robust_loss",
    arg_names=("logits", "temperature", "adaptive"),
)
