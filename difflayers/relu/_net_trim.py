r"""Net-Trim: sparse layers with nearly the responses of trained ones, by convex programming.

.. math:: \min_U \|U\|_1 \quad \text{s.t. } \|(X U^T - Y)_\Omega\|_F \le \epsilon, \qquad (X U^T)_{\Omega^c} \le 0,
    \qquad \Omega = \{Y > 0\}

A. Aghasi, A. Abdi, N. Nguyen, J. Romberg, Net-Trim: Convex Pruning of Deep Neural Networks with Performance Guarantee,
2017.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Info, OnFailure, Solution, check_policy, settle
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque, physical

from ._net_trim_problem import NDIMS, kept, trimming, unpack

Layer = TypeVar("Layer", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Batches = Tensor | Iterable[Tensor]


class TrimmedLayer(NamedTuple):
    """What :func:`net_trim` returns.

    Attributes:
        layer: A copy of the layer with sparse weights.
        sparsity: The share of its weights that are zero, biases not counted.
        error: The change of its responses, behind the ReLU if there is one, relative to the responses asked for.
        steps: Steps of the solver, the most of all groups.
        status: See :class:`~difflayers.Status`, the worst of all groups.
    """

    layer: Any
    sparsity: float
    error: float
    steps: int
    status: int


@torch.no_grad()
def net_trim(
    layer: Layer,
    inputs: Batches,
    outputs: Batches | None = None,
    tolerance: float = 0.1,
    *,
    relu: bool = True,
    penalize_bias: bool = False,
    rtol: float = 1e-8,
    max_steps: int = 300,
    on_failure: OnFailure = "raise",
) -> TrimmedLayer:
    """Prunes a trained layer: the least sum of absolute weights that keeps its responses to data.

    Solves ``min ||U||_1`` such that responses above zero move by at most `tolerance`, relative and all together, and
    those that the ReLU silences stay silent. Layers of a network are pruned one after the other, each on its own
    responses ("parallel" Net-Trim), or each with the inputs that the pruned layers before it make and the outputs of
    the original network ("cascade"; there a larger `tolerance` may be needed for a solution to exist).

    Args:
        layer: :class:`torch.nn.Linear`, or a convolution in one to three dimensions with any stride, padding, dilation
            and groups. It is left as it is.
        inputs: What the layer gets, ``(N, ...)`` or batches of it: the more samples, the less it learns them by heart.
        outputs: What it shall return for them, with or without the ReLU, ``(N, ...)`` or batches; None: what it does.
        tolerance: At least 0. With 0 no response may change: what is pruned then are weights that the data cannot see.
        relu: A ReLU follows. Without one, as in the last layer, all responses are to be kept.
        penalize_bias: Count the bias in the norm, as the paper does; else it costs nothing and is never pruned.
        rtol: Largest relative gap and violation of a solution that counts as one.
        max_steps: Steps of ADMM, which only comes near; an interior-point method finishes.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Returns:
        A :class:`TrimmedLayer`. Pruned weights are zeros exactly.

    Raises:
        ValueError: For another layer, a wrong shape or dtype, NaN or Inf, a negative tolerance, naming the argument.
        SolveError: If no weights meet the constraints, which happens only for `outputs` of your own.

    Not differentiable: a tool for a trained network. :func:`net_trim_weights` is.

    Example:
        >>> import torch
        >>> from difflayers.relu import net_trim
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(20, 10)
        >>> trimmed = net_trim(layer, torch.randn(50, 20), tolerance=0.3)
        >>> trimmed.sparsity > 0.2, round(trimmed.error, 3)
        (True, 0.3)

    Source: A. Aghasi, A. Abdi, N. Nguyen, J. Romberg, Net-Trim: Convex Pruning of Deep Neural Networks with
    Performance Guarantee, 2017.

    Departure: groups of a convolution are pruned apart, each to the tolerance. The bias is free by default.
    """
    x, wanted = _checked(layer, inputs, outputs)
    check_policy(on_failure)
    wanted = wanted.clamp_min(0) if relu else wanted
    X, Y = _samples(layer, x, wanted)
    if layer.bias is not None:
        X = functional.pad(X, (0, 1), value=1.0)
    free = int(layer.bias is not None and not penalize_bias)
    found = net_trim_weights_ex(X, Y, tolerance, relu=relu, unpenalized=free, rtol=rtol, max_steps=max_steps)
    U = settle(found.value, Info(found.status, found.steps, found.residual), on_failure, name="net_trim").flatten(0, 1)
    new: Any = copy.deepcopy(layer)
    size = new.weight[0].numel()
    new.weight.copy_(U[:, :size].reshape(new.weight.shape))
    if new.bias is not None:
        new.bias.copy_(U[:, size])
    got = new(x)
    miss = torch.linalg.vector_norm((got.clamp_min(0) if relu else got) - wanted)
    error = miss / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(miss.dtype).tiny)
    sparsity = 1 - int(torch.count_nonzero(new.weight)) / new.weight.numel()
    return TrimmedLayer(new, sparsity, float(error), int(found.steps.max()), int(found.status.max()))


def net_trim_weights(
    X: Tensor,
    Y: Tensor,
    tolerance: float | Tensor = 0.1,
    *,
    relu: bool = True,
    unpenalized: int = 0,
    rtol: float = 1e-8,
    max_steps: int = 300,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The weights of least absolute sum with nearly the given responses.

    Solves ``argmin_U ||U||_1`` such that ``||(X U^T - Y)_on|| <= tolerance * ||Y_on||`` and ``(X U^T)_off <= 0``, with
    "on" the responses above zero.

    Args:
        X: ``(*batch, N, d)`` inputs, one sample a row; a bias is a column of ones.
        Y: ``(*batch, N, m)`` responses to be kept, of m neurons.
        tolerance: At least 0: a number, or a tensor ``(*batch)``. From 1 on the weights are zero. To allow it to every
            neuron by itself, make neurons a batch dimension: ``(X.unsqueeze(-3), Y.mT.unsqueeze(-1))``.
        relu: A ReLU follows; otherwise all responses are "on".
        unpenalized: So many columns of X, the last, do not count in the norm.
        rtol: Largest relative gap and violation of a solution that counts as one.
        max_steps: Steps of ADMM, which only comes near.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        U ``(*batch, m, d)``, with exact zeros; solved in double precision whatever the dtype.

    Raises:
        ValueError: For a wrong shape or dtype, a negative tolerance, NaN or Inf, naming the argument.
        SolveError: If no weights meet the constraints. Never where Y are responses of some weights.

    Differentiable in `X`, `Y` and `tolerance` (on the current zeros, signs and silent responses at zero), to any order,
    where the tolerance is more than 0. With tolerance 0 the problem is a linear program without a derivative, and
    backward raises ``SolveError``. A response that is zero is "off" and has derivative zero.

    Example:
        >>> import torch
        >>> from difflayers.relu import net_trim_weights
        >>> X = torch.tensor([[1.0, 1.0, 0.1], [2.0, 2.0, 0.0], [-1.0, -1.0, 0.3]])
        >>> Y = (X @ torch.tensor([[0.5, 0.5, 0.2]]).mT).relu()
        >>> U = net_trim_weights(X, Y, 0.1)
        >>> (U[..., 2] == 0).item(), round(float(U.abs().sum()), 3)
        (True, 0.904)

    Source: A. Aghasi, A. Abdi, N. Nguyen, J. Romberg, Net-Trim: Convex Pruning of Deep Neural Networks with
    Performance Guarantee, 2017.

    Departure: ADMM only tells which weights and responses matter; an interior-point method on these, and Newton's
    method on the optimality conditions, finish to rounding. The derivative is ours.
    """
    return _value(on_failure, X, Y, tolerance, relu, unpenalized, rtol, max_steps)


def net_trim_weights_ex(
    X: Tensor,
    Y: Tensor,
    tolerance: float | Tensor = 0.1,
    *,
    relu: bool = True,
    unpenalized: int = 0,
    rtol: float = 1e-8,
    max_steps: int = 300,
) -> Solution[Tensor]:
    """As :func:`net_trim_weights`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        X: Inputs.
        Y: Responses.
        tolerance: Relative error allowed.
        relu: A ReLU follows.
        unpenalized: Columns that cost nothing.
        rtol: Tolerance of the solver.
        max_steps: Steps of ADMM.

    Returns:
        The weights with status and steps of every element. The residual is the largest of the relative duality gap and
        the relative violations.
    """
    return _solution(X, Y, tolerance, relu, unpenalized, rtol, max_steps)


class _Call:
    """The problem that a call means, and its checked arguments in the dtype of the solve."""

    problem: ImplicitProblem
    args: tuple[Tensor, ...]

    def __init__(
        self, X: Any, Y: Any, tolerance: Any, relu: bool, unpenalized: int, rtol: float, max_steps: int
    ) -> None:
        X, Y = check_tensor("X", X, min_ndim=2), check_tensor("Y", Y, min_ndim=2)
        if not X.shape[-2] or not X.shape[-1]:
            raise ValueError(f"X: expected at least one row and one column, got shape {tuple(X.shape)}")
        check_shape("Y", tuple(Y.shape[-2:-1]), tuple(X.shape[-2:-1]), " in its last dimension but one as X has rows")
        if not Y.shape[-1]:
            raise ValueError(f"Y: expected at least one column, got shape {tuple(Y.shape)}")
        if not isinstance(unpenalized, int) or not 0 <= unpenalized <= X.shape[-1]:
            raise ValueError(f"unpenalized: expected a number of columns from 0 to {X.shape[-1]}, got {unpenalized!r}")
        if not isinstance(rtol, int | float) or not rtol > 0:
            raise ValueError(f"rtol: expected more than 0, got {rtol!r}")
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps: expected an integer of at least 1, got {max_steps!r}")
        if not isinstance(tolerance, Tensor):
            tolerance = torch.full((), float(tolerance), dtype=Y.dtype, device=Y.device)
        plain = physical(check_tensor("tolerance", tolerance))
        if not plain.is_meta and bool((plain < 0).any()):
            raise ValueError(f"tolerance: expected at least 0, got {float(plain.amin()):g}")
        named = {"X": X, "Y": Y, "tolerance": tolerance}
        named = {name: lifted_under_autocast(t) for name, t in named.items()}
        check_same(named.items())
        broadcast_batch((name, tuple(t.shape[: t.ndim - k])) for (name, t), k in zip(named.items(), NDIMS, strict=True))
        self.dtype, self.shape = X.dtype, (X.shape[-2], X.shape[-1], Y.shape[-1])
        X, Y, tolerance = (t.to(compute_dtype(t.dtype)) for t in named.values())
        with autocast_off(X):
            # a NaN fails its element by Y itself, and may not spoil the gradient of the radius
            total = torch.where(kept(relu, Y) & torch.isfinite(Y), Y, 0).square().sum((-2, -1))
            radius = tolerance * torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0)
        self.args = X, Y, radius
        self.problem = trimming(relu, unpenalized, float(rtol), max_steps)

    def weights(self, z: Tensor) -> Tensor:
        """U of all unknowns."""
        return unpack(z, *self.shape)[0].to(self.dtype)


@opaque
def _value(on_failure: OnFailure, *given: Any) -> Tensor:
    call = _Call(*given)
    return call.weights(solution_map(call.problem, call.args, on_failure=on_failure))


@opaque
def _solution(*given: Any) -> Solution[Tensor]:
    call = _Call(*given)
    found = solution_map_ex(call.problem, call.args)
    return replace(found, value=call.weights(found.value))


def _checked(layer: Any, inputs: Batches, outputs: Batches | None) -> tuple[Tensor, Tensor]:
    """Inputs and wanted outputs of the layer."""
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        raise ValueError(f"layer: expected a Linear, Conv1d, Conv2d or Conv3d, got {type(layer).__name__}")
    computed = [name for name in ("weight", "bias") if name not in layer._parameters]
    if computed:
        raise ValueError(
            f"layer: expected {computed[0]} to be a parameter, got one that is computed; remove what does it"
        )
    x = _gathered("inputs", inputs)
    if isinstance(layer, nn.Linear):
        fits, shape = x.ndim > 1 and x.shape[-1] == layer.in_features, f"(N, ..., {layer.in_features})"
    else:
        fits = x.ndim == layer.weight.ndim and x.shape[1] == layer.in_channels
        shape = f"(N, {layer.in_channels}, {'DHW'[5 - layer.weight.ndim :]})"
    if not fits or not x.numel():
        raise ValueError(f"inputs: expected shape {shape} as of layer, with at least one sample, got {tuple(x.shape)}")
    check_same([("layer.weight", layer.weight), ("inputs", x)])
    made = layer.forward(x)  # no hooks: the trimmed layer has those of its own
    wanted = made if outputs is None else _gathered("outputs", outputs)
    check_same([("layer.weight", layer.weight), ("outputs", wanted)])
    check_shape("outputs", tuple(wanted.shape), tuple(made.shape), " as layer makes of inputs")
    check_finite([("layer.weight", layer.weight), ("inputs", x), ("outputs", wanted)])
    return x, wanted


def _gathered(name: str, data: Any) -> Tensor:
    """One tensor of a tensor or of batches."""
    if not isinstance(data, Tensor) and not isinstance(data, Iterable):
        raise ValueError(f"{name}: expected a tensor or batches of it, got {type(data).__name__}")
    parts = [data] if isinstance(data, Tensor) else list(data)
    if not parts:
        raise ValueError(f"{name}: expected at least one batch, got none")
    parts = [check_tensor(name, part, min_ndim=1) for part in parts]
    for part in parts[1:]:
        check_shape(name, tuple(part.shape[1:]), tuple(parts[0].shape[1:]), " behind the first dimension, as before")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _samples(layer: Any, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """X ``(groups, N, d)`` and Y ``(groups, N, m)``: every place of a convolution is a sample."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).unsqueeze(0), wanted.flatten(0, -2).unsqueeze(0)
    spatial = layer.weight.ndim - 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(spatial):
        size, dilation = layer.kernel_size[axis], layer.dilation[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, layer.stride[axis])[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, 2 + spatial)  # (N, groups, *places, channels, *kernel)
    X = x.movedim(1, 0).flatten(2 + spatial).flatten(1, -2)
    Y = wanted.unflatten(1, (layer.groups, -1)).movedim(2, -1).movedim(1, 0).flatten(1, -2)
    return X, Y
