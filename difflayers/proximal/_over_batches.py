"""Code that takes its parameters without batch dimensions, run where a ``vmap`` rule has put some in front of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.func import vmap


def over_batches(
    function: Callable[[Tensor, Sequence[Tensor]], Tensor],
    value: Tensor,
    tensors: Sequence[Tensor],
    ndims: Sequence[int],
    event_ndim: int,
) -> Tensor:
    """``function(value, tensors)``, vmapped over the batch dimensions that `tensors` have.

    Args:
        function: Takes tensors of exactly `ndims` dimensions, and a value with any number of batch dimensions; the
            result has the same ones.
        value: ``(*batch, event...)``, with all batch dimensions.
        tensors: Batch dimensions in front, aligned with the last ones of `value`; mostly there are none.
        ndims: Dimensions of each tensor that `function` knows.
        event_ndim: Trailing dimensions of `value` that belong to one element.
    """
    extra = max((t.ndim - k for t, k in zip(tensors, ndims, strict=True)), default=0)
    if extra <= 0:
        return function(value, tensors)
    place = value.ndim - event_ndim - extra
    first = [t.ndim - k == extra for t, k in zip(tensors, ndims, strict=True)]
    mapped = [f and t.shape[0] > 1 for t, f in zip(tensors, first, strict=True)]
    rest = [t.squeeze(0) if f and not m else t for t, f, m in zip(tensors, first, mapped, strict=True)]
    if not any(mapped):
        return over_batches(function, value, rest, ndims, event_ndim)
    return vmap(
        lambda value, *tensors: over_batches(function, value, tensors, ndims, event_ndim),
        in_dims=(place, *(0 if m else None for m in mapped)),
        out_dims=place,
    )(value, *rest)


def with_rank(
    function: Callable[[Tensor, Sequence[Tensor]], Tensor],
    value: Tensor,
    tensors: Sequence[Tensor],
    ndims: Sequence[int],
    batch_ndim: int,
    event_ndim: int,
) -> Tensor:
    """``function(value, tensors)`` of a function that takes exactly `batch_ndim` batch dimensions.

    Further ones in front of the value, which may also stand in front of `tensors`, are vmapped.
    """
    extra = value.ndim - event_ndim - batch_ndim
    if extra <= 0:
        return function(value, [t.reshape(t.shape[t.ndim - k :]) for t, k in zip(tensors, ndims, strict=True)])
    lead = [t.ndim - k - batch_ndim for t, k in zip(tensors, ndims, strict=True)]
    mapped = [n == extra and t.shape[0] > 1 for t, n in zip(tensors, lead, strict=True)]
    rest = [t.squeeze(0) if n == extra and not m else t for t, n, m in zip(tensors, lead, mapped, strict=True)]
    return vmap(
        lambda value, *tensors: with_rank(function, value, tensors, ndims, batch_ndim, event_ndim),
        in_dims=(0, *(0 if m else None for m in mapped)),
    )(value, *rest)
