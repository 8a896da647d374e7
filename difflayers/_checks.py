"""Checks of what a caller passes in, with one voice: argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, value: object, *, min_ndim: int = 0) -> Tensor:
    """Refuses anything but a real floating-point tensor with at least `min_ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.ndim < min_ndim:
        raise ValueError(f"{name}: expected at least {dimensions(min_ndim)}, got shape {tuple(value.shape)}")
    return value


def dimensions(count: int) -> str:
    """How many, in words."""
    return "1 dimension" if count == 1 else f"{count} dimensions"


def check_same(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses floating-point tensors that live on different devices or have different dtypes."""
    first: tuple[str, Tensor] | None = None
    for name, t in tensors:
        if first is None:
            first = (name, t)
            continue
        if t.device != first[1].device:
            raise ValueError(f"{name}: expected device {first[1].device} as of {first[0]}, got {t.device}")
        if t.dtype != first[1].dtype and t.is_floating_point():
            raise ValueError(f"{name}: expected dtype {first[1].dtype} as of {first[0]}, got {t.dtype}")


def check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...], why: str = "") -> None:
    """Refuses a shape that differs from the expected one."""
    if tuple(got) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}{why}, got {tuple(got)}")


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Names the first argument that contains NaN or Inf. Reads data: call it on a failure path only."""
    for name, t in tensors:
        if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all()):
            bad = int((~torch.isfinite(t)).sum())
            raise ValueError(f"{name}: expected finite numbers, got {bad} NaN or Inf of {t.numel()}")


def check_not_nan(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The same for NaN alone, where infinite numbers have a meaning."""
    for name, t in tensors:
        if t.is_floating_point() and not t.is_meta and bool(torch.isnan(t).any()):
            bad = int(torch.isnan(t).sum())
            raise ValueError(f"{name}: expected finite numbers, got {bad} NaN of {t.numel()}")


def broadcast_batch(named: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """The common batch shape of several arguments, or a ``ValueError`` naming the one that does not fit."""
    batch: tuple[int, ...] = ()
    for name, shape in named:
        if shape == batch or not shape:
            continue
        if not batch:
            batch = tuple(shape)
            continue
        try:
            batch = torch.broadcast_shapes(batch, shape)
        except RuntimeError:
            raise ValueError(f"{name}: expected batch dimensions that broadcast with {batch}, got {shape}") from None
    return batch


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` broadcasts to `target` without widening it."""
    # sequences of equal lengths: Dynamo of torch 2.6 cannot stop at the end of the shorter one
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(shape, target[len(target) - len(shape) :], strict=True)
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype solvers work in: half and bfloat16 are lifted to float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def default_rtol(rtol: float | None, dtype: torch.dtype) -> float:
    """`rtol`, or the library's default for `dtype`."""
    if rtol is not None:
        return rtol
    return 1e-10 if dtype == torch.float64 else 1e-5


def check_options(solver: Any, **least: int) -> None:
    """Refuses, in the options of a solver, tolerances below 0 and numbers of steps below the `least` ones."""
    for name in ("rtol", "atol"):
        got = getattr(solver, name, None)
        if got is not None and not (isinstance(got, int | float) and got >= 0):
            raise ValueError(f"{name}: expected None or a number of at least 0, got {got!r}")
    if "check_every" not in least and getattr(solver, "check_every", None) is not None:
        least = {**least, "check_every": 1}
    for name, number in least.items():
        got = getattr(solver, name)
        if isinstance(got, bool) or not isinstance(got, int) or got < number:
            raise ValueError(f"{name}: expected an integer of at least {number}, got {got!r}")


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors that name arguments of what is called, or items of them, name those of the caller instead."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(":")
        for name, own in names.items():
            if argument == name or argument.startswith(f"{name}["):
                raise ValueError(f"{own}{argument.removeprefix(name)}:{rest}") from None
        raise
