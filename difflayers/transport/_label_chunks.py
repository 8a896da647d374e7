"""Chunks of a data set, from whatever holds it: what a pass over the data sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Chunk = Any  # a tensor or array (*heads, n, K), or a list of one (n, K) for every head


def chunks_of(source: Any, rows: int) -> Iterator[Chunk]:
    """One pass over a source."""
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim < 2:
            raise ValueError(f"log_probs: expected at least 2 dimensions, got shape {tuple(source.shape)}")
        yield from (source[..., i : i + rows, :] for i in range(0, source.shape[-2], rows))
    elif isinstance(source, list | tuple):
        sizes = {len(head) for head in source}
        if len(sizes) != 1:
            raise ValueError(f"log_probs: expected heads with equal numbers of rows, got {sorted(sizes)}")
        yield from ([head[i : i + rows] for head in source] for i in range(0, sizes.pop(), rows))
    elif callable(source):
        yield from source()
    else:
        iterator = iter(source) if isinstance(source, Iterable) else None
        if iterator is None or iterator is source:
            raise ValueError(
                "log_probs: expected a tensor, an array, a list of heads, or something that gives its chunks anew in "
                f"every pass (a loader, or a function that returns an iterator), got {type(source).__name__}"
            )
        yield from iterator


def joined(parts: list[Tensor], lead: tuple[int, ...] | None) -> Any:
    """What heads gave, in the form in which they came."""
    return parts if lead is None else torch.stack(parts).reshape(*lead, *parts[0].shape)


def dtype_of(chunk: Chunk) -> torch.dtype:
    """That of the numbers, for the tolerance."""
    first = chunk[0] if isinstance(chunk, list | tuple) else chunk
    return torch.float64 if str(first.dtype).endswith("float64") else torch.float32


def matrices(chunk: Chunk) -> tuple[list[Tensor], tuple[int, ...] | None]:
    """One float64 matrix a head, and the leading dimensions; None for a list of heads."""
    if isinstance(chunk, list | tuple):
        return [_matrix(head) for head in chunk], None
    t = _matrix(chunk)
    lead = tuple(t.shape[:-2])
    return list(t.reshape(math.prod(lead), *t.shape[-2:])), lead


def _matrix(x: Any) -> Tensor:
    t = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    if not t.is_floating_point() or t.ndim < 2:
        raise ValueError(f"log_probs: expected floating-point chunks (*heads, n, K), got {t.dtype} {tuple(t.shape)}")
    return (t.cpu() if t.device.type == "mps" else t).to(torch.float64)  # mps has no float64


def checked(chunk: Chunk, priors: list[Tensor], where: str) -> tuple[list[Tensor], tuple[int, ...] | None]:
    """The matrices of a chunk, one for every prior, which they must fit."""
    parts, lead = matrices(chunk)
    expected = [len(prior) for prior in priors]
    if [x.shape[-1] if x.ndim == 2 else None for x in parts] != expected:
        raise ValueError(
            f"log_probs: expected (n, K) for every head with K = {expected}, got {[tuple(x.shape) for x in parts]}"
            + where
        )
    if len({len(x) for x in parts}) > 1:
        raise ValueError(f"log_probs: expected as many rows for every head, got {[len(x) for x in parts]}{where}")
    for number, (prior, x) in enumerate(zip(priors, parts, strict=True)):
        if prior.device != x.device:
            raise ValueError(f"log_probs: expected device {prior.device}, got {x.device}{where}")
        # NaN and inf do not compare; -inf forbids a cluster, and one must be left
        good = (x < math.inf).all() & (torch.where(prior > 0, x, -math.inf) > -math.inf).any(-1).all()
        if not bool(good):
            what = "NaN" if bool(x.isnan().any()) else "inf" if bool((x == math.inf).any()) else "rows of -inf"
            raise ValueError(
                f"log_probs: expected numbers below inf, and a finite one a row, got {what}{where}, head {number}"
            )
    return parts, lead
