r"""The arguments of a convex training problem, checked and brought to one dtype: what all its functions begin with."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import Solution
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, opaque, physical

from ._gates import Gates
from ._losses import Loss, Squared
from ._relu_solution import ConvexReLUSolution

WarmStart = ConvexReLUSolution | Solution[ConvexReLUSolution] | None


class TrainingCall:
    """Checked arguments in the dtype of the solve.

    Attributes:
        args: ``(X, y, s, beta, M)``, with M the patterns of X, and the neurons to start from where there are some:
            ``(P, d)``, with those of negative output below where `signed`.
        loss: The loss.
        vectors: The gates' vectors.
        dtype: Of the results.
    """

    args: tuple[Tensor, ...]

    def __init__(
        self,
        X: Any,
        y: Any,
        beta: Any,
        gates: Any,
        sample_weight: Any,
        loss: Loss | None,
        warm_start: WarmStart = None,
        *,
        signed: bool = False,
    ) -> None:
        X, y = check_tensor("X", X, min_ndim=2), check_tensor("y", y, min_ndim=1)
        n, d = X.shape[-2:]
        if not n or not d:
            raise ValueError(f"X: expected at least one row and one column, got shape {tuple(X.shape)}")
        check_shape("y", tuple(y.shape[-1:]), (n,), " in its last dimension as X has rows")
        G = check_tensor("gates", gates.vectors if isinstance(gates, Gates) else gates, min_ndim=2)
        if G.shape[-1] != d or not G.shape[-2]:
            raise ValueError(f"gates: expected vectors of shape (..., P, {d}) as of X, P > 0, got {tuple(G.shape)}")
        check_finite([("gates", physical(G))])
        self.loss = loss or Squared()
        if not isinstance(self.loss, Loss):
            raise ValueError(f"loss: expected Squared() or another loss of difflayers.relu, got {loss!r}")
        self.loss.check_labels(y)
        s = torch.ones(n, dtype=y.dtype, device=y.device)
        if sample_weight is not None:
            s = check_tensor("sample_weight", sample_weight, min_ndim=1)
            check_shape("sample_weight", tuple(s.shape[-1:]), (n,), " in its last dimension as X has rows")
            _at_least_zero("sample_weight", s, strict=False)
        beta = check_beta(beta, y)
        named = {"X": X, "y": y, "sample_weight": s, "beta": beta, "gates": G}
        if warm_start is not None:
            earlier = warm_start.value if isinstance(warm_start, Solution) else warm_start
            if not isinstance(earlier, ConvexReLUSolution):
                raise ValueError(f"warm_start: expected a ConvexReLUSolution or None, got {type(earlier).__name__}")
            init = check_tensor("warm_start", earlier.v, min_ndim=2).detach()
            check_shape("warm_start", tuple(init.shape[-2:]), tuple(G.shape[-2:]), " of its last two dimensions")
            if signed:
                init = torch.cat([init, torch.zeros_like(init) if earlier.w is None else earlier.w.detach()], -2)
            named["warm_start"] = init
        named = {name: lifted_under_autocast(t) for name, t in named.items()}
        check_same(named.items())
        ndims = {"X": 2, "y": 1, "sample_weight": 1, "beta": 0, "gates": 2, "warm_start": 2}
        shapes = {name: tuple(t.shape[: t.ndim - ndims[name]]) for name, t in named.items()}
        whole, start = broadcast_batch(shapes.items()), shapes.pop("warm_start", ())
        if broadcast_batch(shapes.items()) != whole:
            raise ValueError(f"warm_start: expected no more batch dimensions than the problem has, got {start}")
        self.dtype = y.dtype
        with autocast_off(named["X"]):
            named = {name: t.to(compute_dtype(t.dtype)) for name, t in named.items()}
            self.vectors = named["gates"].detach()
            named["gates"] = named["X"].detach() @ self.vectors.mT >= 0
        self.args = tuple(named.values())


@opaque
def checked_call(X: Tensor, y: Tensor, beta: Any, gates: Any, sample_weight: Any, loss: Loss | None) -> TrainingCall:
    """Checked arguments, for other functions of the same problem."""
    return TrainingCall(X, y, beta, gates, sample_weight, loss)


def check_beta(beta: Any, like: Tensor) -> Tensor:
    """A weight decay above 0 as a tensor; NaN passes."""
    if not isinstance(beta, Tensor):
        if not isinstance(beta, Real):
            raise ValueError(f"beta: expected a number or a tensor, got {type(beta).__name__}")
        beta = torch.full((), float(beta), dtype=like.dtype, device=like.device)
    _at_least_zero("beta", check_tensor("beta", beta), strict=True)
    return beta


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def without_failed(bad: Tensor, X: Tensor, y: Tensor, s: Tensor, beta: Tensor, *, y_ndim: int = 1) -> Data:
    """The data with harmless numbers in failed elements: nothing of those may reach gradients that others share."""
    each = bad[..., None]
    labels = each if y_ndim == 1 else each[..., None]
    X, y = torch.where(each[..., None], 0, X), torch.where(labels, 0, y)
    return X, y, torch.where(each, 1, s), torch.where(bad, 1, beta)


def for_solver(args: Sequence[Tensor], ndims: Sequence[int]) -> tuple[torch.Size, Tensor, list[Tensor]]:
    """What a solver gets of ``(X, y, s, beta, M)`` and further numbers: the batch, its sound elements, the arguments.

    The arguments have one batch dimension and double precision, since which neurons are active turns on differences
    that single precision does not see where beta is small. Elements with NaN or Inf, not sound, come as harmless
    numbers.
    """
    batch = torch.broadcast_shapes(*(a.shape[: a.ndim - k] for a, k in zip(args, ndims, strict=False)))
    flat = []
    for a, k in zip(args, ndims, strict=False):
        event = a.shape[a.ndim - k :]
        flat.append(a.expand((*batch, *event)).reshape((batch.numel(), *event)))
    sound = torch.ones(batch.numel(), dtype=torch.bool, device=args[0].device)
    for a in flat[:4]:
        sound = sound & torch.isfinite(a.flatten(1) if a.ndim > 1 else a.unsqueeze(-1)).all(-1)
    if not sound.is_meta and not bool(sound.all()):
        X, y, s, beta = (torch.where(sound[(...,) + (None,) * k], a, 0) for a, k in zip(flat[:4], ndims, strict=False))
        flat[:4] = X, y, s, torch.where(sound, beta, 1)
    return batch, sound, [t.to(wide_dtype(t)) for t in flat]


def wide_dtype(t: Tensor) -> torch.dtype:
    """Double precision, where the device has it; other than real numbers stay what they are."""
    return torch.float64 if t.is_floating_point() and t.device.type != "mps" else t.dtype


def _at_least_zero(name: str, value: Tensor, *, strict: bool) -> None:
    """NaN is left to the solve, which fails that element alone."""
    plain = physical(value)
    if plain.is_meta:
        return
    wrong = plain <= 0 if strict else plain < 0
    if bool(wrong.any()):
        least = "more than 0" if strict else "at least 0"
        raise ValueError(f"{name}: expected {least}, got {float(plain[wrong].amin()):g}")
