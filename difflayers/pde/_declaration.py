"""What a differential equation is to the library: coordinates, fields, terms, and a pointwise residual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers.linalg._autodiff import opaque, physical

from ._conditions import Block, Condition


class Box:
    """A box of named coordinates, the domain of a :class:`PDE`.

    Args:
        **bounds: Lower and upper end of each coordinate, in the order of the coordinates of a point.

    Raises:
        ValueError: For a box without coordinates, or ends that do not increase.

    Example:
        >>> import torch
        >>> from difflayers.pde import Box
        >>> box = Box(t=(0.0, 500.0), x=(0.0, 1.0))
        >>> box.normalized(torch.tensor([250.0, 1.0]))  # what a network should see
        tensor([0., 1.])
    """

    def __init__(self, **bounds: tuple[float, float]) -> None:
        if not bounds:
            raise ValueError("Box: expected at least one coordinate, got none")
        for name, ends in bounds.items():
            if not (len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf):
                raise ValueError(f"{name}: expected a finite lower end below the upper one, got {ends}")
        self.names = tuple(bounds)
        self.bounds = tuple((float(low), float(high)) for low, high in bounds.values())

    def __repr__(self) -> str:
        return f"Box({', '.join(f'{n}={b}' for n, b in zip(self.names, self.bounds, strict=True))})"

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(d,)`` lower and upper ends, in the dtype of `like`."""
        low, high = zip(*self.bounds, strict=True)
        return like.new_tensor(low), like.new_tensor(high)

    def normalized(self, points: Tensor) -> Tensor:
        """The points with every coordinate mapped to [-1, 1]."""
        low, high = self.ends(points)
        return (2 * points - low - high) / (high - low)

    @opaque  # Dynamo would warn of the flag that is read here
    def check(self, name: str, points: Tensor) -> None:
        """Refuses points of another dimension, or outside (by more than rounding). Reads data."""
        d = len(self.names)
        if points.ndim < 2 or points.shape[-1] != d:
            raise ValueError(
                f"{name}: expected shape (*batch, N, {d}), one entry for each of {', '.join(self.names)}, got "
                f"{tuple(points.shape)}"
            )
        plain = physical(points)
        if plain.is_meta:
            return
        low, high = self.ends(plain)
        slack = 8 * torch.finfo(plain.dtype).eps * torch.maximum(low.abs(), high.abs())
        inside = ((plain >= low - slack) & (plain <= high + slack)).all(-1)
        if not bool(inside.all()):
            raise ValueError(
                f"{name}: expected points in {self}, got {int((~inside).sum())} outside, the first "
                f"{[round(float(v), 6) for v in plain[~inside][0]]}"
            )


class PDE:
    r"""A differential equation ``F(u, u_t, u_xx, ...; params) = 0`` on a box, with its conditions.

    Subclasses say what the equation is made of. A term is the name of a field, or that name with the coordinates by
    which it is differentiated: ``u``, ``u_t``, ``u_xx``, ``u_tx``.

    Args:
        domain: Another box than the class has.
        conditions: Other conditions.
        scales: Other typical sizes.
        **params: Other parameters: numbers, tensors of shape ``(*batch, 1)`` or ``(*batch, N)`` or 0-dimensional, or
            functions of points ``(N, d)`` that return ``(*batch, N)``. None: the caller of the layer has to pass it.

    Attributes:
        coords: Names of the coordinates, in the order of the entries of a point.
        fields: Names of the unknown fields.
        domain: The box.
        terms: The terms that `residual` uses.
        params: The parameters with their values.
        conditions: See :class:`Dirichlet`, :class:`Neumann`, :class:`Robin`, :class:`Initial`, :class:`Periodic`.
        scales: Typical sizes by which rows are divided, so that they weigh alike in any units: of the equation, as
            ``"residual"``, and of fields, by name, for their conditions. 1 where left out.
        time: Name of the coordinate that :class:`Initial` means.

    Raises:
        ValueError: For names that do not fit together, or a parameter that the equation does not have.

    Example:
        >>> from difflayers.pde import PDE, Box, Initial
        >>> class Decay(PDE):
        ...     coords, terms = ("t",), ("u", "u_t")
        ...     domain = Box(t=(0.0, 1.0))
        ...     params = {"k": 1.0}
        ...     conditions = (Initial(1.0),)
        ...
        ...     def residual(self, T, p):
        ...         return T["u_t"] + p["k"] * T["u"]
        >>> Decay(k=2.0)
        Decay(Box(t=(0.0, 1.0)), k=2.0)

    Source: the interface of N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024, whose constraint layer it serves.
    """

    coords: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("u",)
    domain: Box
    terms: tuple[str, ...] = ()
    params: Mapping[str, Any] = MappingProxyType({})
    conditions: tuple[Condition, ...] = ()
    scales: Mapping[str, float] = MappingProxyType({})
    time: ClassVar[str] = "t"

    def __init__(
        self,
        *,
        domain: Box | None = None,
        conditions: tuple[Condition, ...] | None = None,
        scales: Mapping[str, float] | None = None,
        **params: Any,
    ) -> None:
        if domain is not None:
            self.domain = domain
        if not isinstance(getattr(self, "domain", None), Box):
            raise ValueError(f"domain: expected a Box, got {getattr(self, 'domain', None)!r}")
        self.check_names()
        unknown = [name for name in params if name not in self.params]
        if unknown:
            raise ValueError(
                f"{unknown[0]}: expected one of the parameters {', '.join(self.params) or '(none)'} of "
                f"{type(self).__name__}, got another name"
            )
        self.params = {**self.params, **params}
        self.scales = {**self.scales, **(scales or {})}
        for name, size in self.scales.items():
            if name not in ("residual", *self.fields):
                raise ValueError(f"scales: expected names of residual, {', '.join(self.fields)}, got {name!r}")
            if not 0 < size < math.inf:
                raise ValueError(f"scales[{name!r}]: expected a number above 0, got {size!r}")
        if conditions is not None:
            self.conditions = tuple(conditions)
        self.blocks: tuple[Block, ...] = tuple(block for c in self.conditions for block in _checked(c).blocks(self))
        for block in self.blocks:
            for _, term in block.combination:
                self.parse(term)
        labels = [block.label for block in self.blocks]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"conditions: expected each kind once a side and field, got {twice[0]!r} twice")

    def __repr__(self) -> str:
        given = "".join(f", {k}={v}" for k, v in self.params.items() if isinstance(v, int | float))
        return f"{type(self).__name__}({self.domain}{given})"

    def residual(self, T: Mapping[str, Tensor], p: Mapping[str, Any]) -> Tensor:
        """What is zero at a solution, at each point alone.

        Args:
            T: The declared terms, ``(*batch, N)`` each.
            p: The parameters, and the coordinates of the points under their names.

        Returns:
            ``(*batch, N)``, or ``(*batch, N, Q)`` for a system of Q equations.
        """
        raise ValueError(f"residual: expected {type(self).__name__} to define it, got none")

    def check_names(self) -> None:
        """Refuses coordinates, fields and terms that do not fit together."""
        if self.domain.names != tuple(self.coords):
            raise ValueError(f"domain: expected the coordinates {', '.join(self.coords)}, got {self.domain}")
        for name in (*self.coords, *self.fields):
            if not name.isidentifier() or "_" in name:
                raise ValueError(f"coords, fields: expected identifiers without an underscore, got {name!r}")
        for a in self.coords:
            if any(b != a and b.startswith(a) for b in self.coords):
                raise ValueError(f"coords: expected no name to begin another, got {a!r} in {', '.join(self.coords)}")
        clash = {*self.coords} & {*self.params}
        if clash:
            raise ValueError(f"params: expected other names than those of the coordinates, got {sorted(clash)}")
        if not self.terms or not self.fields:
            raise ValueError("terms: expected at least one, got none")
        for term in self.terms:
            self.parse(term)

    def parse(self, term: str) -> tuple[int, tuple[int, ...]]:
        """Index of the field, and sorted indices of the coordinates by which it is differentiated."""
        field, _, tail = term.partition("_")
        if field not in self.fields or (not tail and "_" in term):
            raise ValueError(f"terms: expected a field ({', '.join(self.fields)}) first in a term, got {term!r}")
        word: list[int] = []
        while tail:
            first = [i for i, c in enumerate(self.coords) if tail.startswith(c)]
            if not first:
                raise ValueError(f"terms: expected coordinates ({', '.join(self.coords)}) after {field}_, got {term!r}")
            word.append(first[0])
            tail = tail[len(self.coords[first[0]]) :]
        return self.fields.index(field), tuple(sorted(word))

    def scale(self, name: str) -> float:
        """The typical size of the residual or of a field."""
        return self.scales.get(name, 1.0)

    def field(self, name: str | None) -> str:
        """The field a condition means."""
        if name is None and len(self.fields) == 1:
            return self.fields[0]
        if name not in self.fields:
            raise ValueError(f"field: expected one of {', '.join(self.fields)}, got {name!r}")
        return name

    def axis(self, coordinate: str) -> int:
        """Index of a coordinate."""
        if coordinate not in self.coords:
            raise ValueError(f"coordinate: expected one of {', '.join(self.coords)}, got {coordinate!r}")
        return self.coords.index(coordinate)

    def side(self, side: str) -> tuple[int, tuple[bool, ...]]:
        """Index of the coordinate of a side, and which ends it means: lower (False), upper (True)."""
        name, equals, end = side.partition("=")
        axis = self.axis(name.strip())
        if not equals:
            return axis, (False, True)
        end = end.strip()
        if end in ("low", "high"):
            return axis, (end == "high",)
        low, high = self.domain.bounds[axis]
        try:
            number = float(end)
        except ValueError:
            number = math.nan
        for bound, upper in ((low, False), (high, True)):
            if math.isclose(number, bound, rel_tol=1e-6, abs_tol=1e-9 * (high - low)):
                return axis, (upper,)
        raise ValueError(f"side: expected {name}=low, {name}=high or an end of {self.domain}, got {side!r}")


def _checked(condition: Any) -> Condition:
    if not isinstance(condition, Condition):
        raise ValueError(f"conditions: expected a tuple of conditions, got {type(condition).__name__} in it")
    return condition
