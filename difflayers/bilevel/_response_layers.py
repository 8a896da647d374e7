"""Layers whose weights follow the hyperparameters: what :class:`SelfTuning` puts in place of those of a module."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

TUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Point:
    """Where all layers of one module are evaluated; set for the time of a call.

    Attributes:
        x: Hyperparameters before their ranges, from their start: ``(n,)``, or ``(B, n)`` with a row for each sample.
        values: The same in their ranges, ``(n,)`` or ``(B, n)``.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.values: Tensor | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """Both of them."""
        if self.x is None or self.values is None:
            raise RuntimeError("SelfTuning: expected its layers to be called by SelfTuning or one of its losses")
        return self.x, self.values


class Response(nn.Module):
    """``W(x) u + b(x)`` with ``W(x) = W0 + s * W1`` and ``b(x) = b0 + s * b1``, ``s = V x`` one number a row.

    Args:
        layer: ``W0`` and ``b0``; taken over.
        point: Where it is evaluated.
        n: Number of hyperparameters.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, point: Point, n: int) -> None:
        super().__init__()
        self.base, self.response, self.point = layer, copy.deepcopy(layer), point
        self.response.reset_parameters()
        self.scale = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0], n))  # as the module was, at every x

    def scales(self, x: Tensor) -> Tensor:
        """s, ``(out,)`` or ``(B, out)``."""
        return x @ self.scale.mT

    def forward(self, u: Tensor) -> Tensor:
        """The layer at the point."""
        x, _ = self.point.both()
        s, plain, moved = self.scales(x), self.base(u), self.response(u)
        if x.ndim == 2:
            _check_batch(u, x)
        if not isinstance(self.base, nn.Linear):
            s = s.reshape(*s.shape, *(1,) * (self.base.weight.ndim - 2))
        elif x.ndim == 2:
            s = s.reshape(len(s), *(1,) * (plain.ndim - 2), s.shape[-1])
        return plain + s * moved

    def squared_norm(self) -> Tensor:
        """``|W(x)|^2``, a number or ``(B,)``."""
        s = self.scales(self.point.both()[0])
        W0, W1 = self.base.weight.flatten(1), self.response.weight.flatten(1)
        rows = (W0 * W0).sum(1) + 2 * s * (W0 * W1).sum(1) + s * s * (W1 * W1).sum(1)
        return rows.sum(-1)

    def at(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Weight and bias at one x."""
        s = self.scales(x)
        for name, base in self.base.named_parameters():
            yield name, base + s.reshape(-1, *(1,) * (base.ndim - 1)) * self.response.get_parameter(name)


class TunedDropout(nn.Module):
    """Dropout whose rate is one of the hyperparameters, in each sample its own.

    Args:
        point: Where it is evaluated.
        index: Which of them.
    """

    def __init__(self, point: Point, index: int) -> None:
        super().__init__()
        self.point, self.index = point, index

    def forward(self, u: Tensor) -> Tensor:
        """Zeros at the rate of the sample, what is left scaled up; nothing in evaluation."""
        if not self.training:
            return u
        rate = self.point.both()[1][..., self.index]
        if rate.ndim:
            _check_batch(u, rate)
            rate = rate.reshape(len(rate), *(1,) * (u.ndim - 1))
        return torch.where(torch.rand_like(u) < rate, 0, u / (1 - rate))


def _check_batch(u: Tensor, x: Tensor) -> None:
    if u.shape[:1] != x.shape[:1]:
        raise ValueError(f"x: expected a row for each of the {u.shape[0] if u.ndim else 0} samples, got {len(x)}")


def replace_layers(module: nn.Module, point: Point, names: list[str]) -> nn.Module:
    """`module` with responses for its layers and tuned dropouts where a hyperparameter has the name of one."""
    owners: dict[int, set[int]] = {}
    for owner in module.modules():
        for p in owner.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(id(owner))
    made: dict[int, nn.Module] = {}

    def replaced(path: str, layer: nn.Module) -> nn.Module:
        if id(layer) in made:
            return made[id(layer)]
        if type(layer) in TUNABLE and any(p.requires_grad for p in layer.parameters()):
            if any(len(owners[id(p)]) > 1 for p in layer.parameters()):
                raise ValueError(f"module: expected layers with weights of their own, but those of {path!r} are shared")
            made[id(layer)] = Response(layer, point, len(names))  # type: ignore[arg-type]
        elif path in names:
            if type(layer) is not nn.Dropout:
                raise ValueError(
                    f"hyperparameters: {path!r} is the name of a {type(layer).__name__}, expected an nn.Dropout"
                )
            made[id(layer)] = TunedDropout(point, names.index(path))
        else:
            made[id(layer)] = layer
            for name, child in list(layer._modules.items()):  # named_children() names a shared one once
                if child is not None:
                    setattr(layer, name, replaced(f"{path}.{name}".lstrip("."), child))
        return made[id(layer)]

    return replaced("", module)
