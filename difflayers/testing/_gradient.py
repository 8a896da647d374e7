"""A gradient check for a whole model: random directions instead of single entries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from ._case import wave


@dataclass(frozen=True)
class GradientReport:
    """What :func:`check_gradient` found.

    Attributes:
        rows: Per tensor: its name, the slope by autograd, the slope by differences, and their relative difference, for
            the direction in which they differ most.
        tolerance: The largest relative difference that passes.
    """

    rows: tuple[tuple[str, float, float, float], ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest relative difference."""
        return max((row[3] for row in self.rows), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every tensor is within the tolerance."""
        return all(row[3] <= self.tolerance for row in self.rows)

    @property
    def message(self) -> str:
        """The comparison as a table, largest difference first."""
        rows = sorted(self.rows, key=lambda row: -row[3] if row[3] == row[3] else -float("inf"))
        width = max([len(row[0]) for row in rows] + [6])
        lines = [f"{'tensor':<{width}}  {'autograd':>12}  {'differences':>12}  {'relative':>9}"]
        for name, slope, difference, relative in rows:
            mark = "" if relative <= self.tolerance else "  <- differs"
            lines.append(f"{name:<{width}}  {slope:>12.4e}  {difference:>12.4e}  {relative:>9.1e}{mark}")
        return "\n".join(lines)


def check_gradient(
    model: nn.Module | Callable[..., Any],
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    directions: int = 3,
    step: float = 1e-6,
    tolerance: float = 1e-4,
    seed: int = 0,
    check: bool = True,
) -> GradientReport:
    """Compares the gradient of a model with central differences along random directions.

    The model is copied and runs in float64; the original, its gradients and its buffers stay as they are. Every
    parameter, and every floating-point tensor of the batch, is checked on its own, so the report names what is wrong.

    Args:
        model: A module, or a function of the batch.
        batch: A tensor, or a tuple (or dict) of what the model takes; integers and other objects are passed on.
        loss: Makes one number of the model's output. None: a weighted sum over all floating-point tensors in it.
        directions: Random directions for each tensor; at least 1.
        step: Half the distance between the two points of a difference, relative to the size of the tensor (at least 1).
        tolerance: Largest accepted difference relative to the larger slope, beyond what rounding in the loss explains.
        seed: Seeds the directions, and the model's own random numbers before each evaluation.
        check: Raise if the gradient is wrong. False: only report.

    Returns:
        The slopes of every tensor by both ways.

    Raises:
        AssertionError: With the table, if some slopes differ.
        ValueError: If there is nothing to differentiate, or the loss is not one finite number.

    Example:
        >>> import torch
        >>> from difflayers.testing import check_gradient
        >>> report = check_gradient(torch.nn.Linear(3, 2), torch.ones(4, 3))
        >>> report.passed, [row[0] for row in report.rows]
        (True, ['weight', 'bias', 'batch'])
    """
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model).double()
    leaves, spec = optree.tree_flatten(batch, none_is_leaf=True)
    paths = optree.tree_paths(batch, none_is_leaf=True)
    data = [t.detach().double().clone() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    named: list[tuple[str, Tensor]] = []
    if isinstance(model, nn.Module):
        named += [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for path, t in zip(paths, data, strict=True):
        if isinstance(t, Tensor) and t.is_floating_point():
            named.append(("batch" + "".join(f"[{key!r}]" for key in path), t.requires_grad_()))
    if not named:
        raise ValueError("batch: expected a module with parameters or a floating-point tensor, got neither")
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []

    def evaluate() -> Tensor:
        for b, before in buffers:  # running statistics must not drift between evaluations
            b.data.copy_(before)
        with torch.random.fork_rng(devices=_devices(named)):
            torch.manual_seed(seed)  # dropout draws the same mask every time
            args: Any = spec.unflatten(data)
            out = model(*args) if isinstance(args, tuple) else model(**args) if isinstance(args, dict) else model(args)
        total = loss(out) if loss is not None else _total(out)
        if total.numel() != 1 or not bool(torch.isfinite(total).all()):
            raise ValueError(f"loss: expected one finite number, got {total.detach()}")
        return total.reshape(())

    total = evaluate()
    if not total.requires_grad:
        raise ValueError("model: expected an output that depends on a parameter or the batch, got a constant")
    found = torch.autograd.grad(total, [t for _, t in named], allow_unused=True, materialize_grads=True)
    rounding = float(total.detach().abs().clamp_min(1)) * torch.finfo(torch.float64).eps / step
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = []
    for (name, t), g in zip(named, found, strict=True):
        worst: tuple[str, float, float, float] | None = None
        for _ in range(directions if t.numel() else 0):
            d = torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device)
            d = d / torch.linalg.vector_norm(d)
            h = step * max(float(torch.linalg.vector_norm(t.detach())), 1.0)
            slope = float((g * d).sum())
            difference = _difference(t, d, h, evaluate)
            gap, size = abs(slope - difference), max(abs(slope), abs(difference))
            # a difference carries the rounding of two losses, divided by the distance between them
            relative = 0.0 if gap <= 100 * rounding else gap / size if gap == gap else float("inf")
            row = (name, slope, difference, relative)
            worst = row if worst is None or row[3] > worst[3] else worst
        if worst is not None:
            rows.append(worst)
    report = GradientReport(tuple(rows), tolerance)
    if check and not report.passed:
        raise AssertionError(f"the gradient differs from central differences:\n{report.message}")
    return report


def _difference(t: Tensor, d: Tensor, h: float, evaluate: Callable[[], Tensor]) -> float:
    """A central difference of `evaluate` as `t` moves along `d`."""
    before = t.detach().clone()
    try:
        with torch.no_grad():
            t.copy_(before + h * d)
        ahead = float(evaluate().detach())
        with torch.no_grad():
            t.copy_(before - h * d)
        return (ahead - float(evaluate().detach())) / (2 * h)
    finally:
        with torch.no_grad():
            t.copy_(before)


def _total(out: Any) -> Tensor:
    parts = [t for t in optree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    if not parts:
        raise ValueError("model: expected a floating-point tensor in its output, got none")
    return sum(((wave(t) * t).sum() for t in parts), start=parts[0].new_zeros(()))


def _devices(named: list[tuple[str, Tensor]]) -> list[torch.device]:
    return sorted({t.device for _, t in named if t.device.type == "cuda"}, key=str)
