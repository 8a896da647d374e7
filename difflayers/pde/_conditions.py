"""Conditions on the faces of a domain: boundary and initial values, linear in the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ._declaration import PDE

Value = float | Tensor | str | Callable[[Tensor], Tensor]
Coefficient = float | str | Callable[[Mapping[str, Any]], Any]


class Block(NamedTuple):
    """Rows of one condition at one end of a coordinate: ``sum coefficient * term = value``.

    Attributes:
        label: Its name in reports.
        axis: Index of the coordinate.
        upper: At the upper end; both ends, the lower minus the upper, where `paired`.
        combination: Coefficients and names of terms.
        value: Right-hand side.
        exact: Holds exactly, not in the least-squares sense.
        field: Name of the field.
        paired: See `upper`.
    """

    label: str
    axis: int
    upper: bool
    combination: tuple[tuple[Coefficient, str], ...]
    value: Value
    exact: bool
    field: str
    paired: bool = False


class Condition:
    """Something linear that a field satisfies on a face of the domain."""

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        raise ValueError(f"conditions: expected Dirichlet, Neumann, Robin, Initial or Periodic, got {self!r}")


@dataclass(frozen=True)
class Dirichlet(Condition):
    """The field has given values on a side: ``u = value``.

    Args:
        side: ``"x=0"`` (an end of the domain), ``"x=low"``, ``"x=high"``, or ``"x"`` for both.
        value: A number, a tensor ``(*batch, 1)`` or ``(*batch, m)``, a function of points ``(m, d)`` that returns
            ``(*batch, m)``, or the name under which the caller of the layer passes one of these.
        exact: The rows hold exactly, not in the least-squares sense.
        field: Of several fields, the one that is meant.

    Example:
        >>> from difflayers.pde import Dirichlet
        >>> Dirichlet("x=0", 1.0)
        Dirichlet(side='x=0', value=1.0, exact=False, field=None)
    """

    side: str
    value: Value = 0.0
    exact: bool = False
    field: str | None = None

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        return _on_sides(pde, "dirichlet", self, lambda f, c: ((1.0, f),))


@dataclass(frozen=True)
class Neumann(Condition):
    """The derivative by the coordinate of the side (not along the outward normal) is given: ``u_x = value``.

    Args:
        side: As in :class:`Dirichlet`.
        value: As there.
        exact: As there.
        field: As there.

    Example:
        >>> from difflayers.pde import Neumann
        >>> Neumann("x=high").side
        'x=high'
    """

    side: str
    value: Value = 0.0
    exact: bool = False
    field: str | None = None

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        return _on_sides(pde, "neumann", self, lambda f, c: ((1.0, f"{f}_{c}"),))


@dataclass(frozen=True)
class Robin(Condition):
    """A combination of the field and its derivative by the coordinate of the side: ``a u + b u_x = value``.

    Args:
        side: As in :class:`Dirichlet`.
        a: A number, the name of a parameter, or a function of the dictionary of parameters.
        b: Likewise.
        value: As in :class:`Dirichlet`.
        exact: As there.
        field: As there.

    Example:
        >>> from difflayers.pde import Robin
        >>> Robin("x=1", a=1.0, b="D").b
        'D'
    """

    side: str
    a: Coefficient
    b: Coefficient
    value: Value = 0.0
    exact: bool = False
    field: str | None = None

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        return _on_sides(pde, "robin", self, lambda f, c: ((self.a, f), (self.b, f"{f}_{c}")))


@dataclass(frozen=True)
class Initial(Condition):
    """The field at the beginning of time, or its derivative by time.

    Args:
        value: As in :class:`Dirichlet`.
        order: 0: the field; 1: its time derivative.
        exact: As in :class:`Dirichlet`.
        field: As there.

    Example:
        >>> from difflayers.pde import Initial
        >>> Initial("u0").order
        0
    """

    value: Value = 0.0
    order: int = 0
    exact: bool = False
    field: str | None = None

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        field, time = pde.field(self.field), pde.time
        if time not in pde.coords:
            raise ValueError(f"Initial: expected a coordinate {time!r}, got {', '.join(pde.coords)}")
        if self.order not in (0, 1):
            raise ValueError(f"order: expected 0 or 1, got {self.order!r}")
        term = f"{field}_{time}" if self.order else field
        name = "initial" if len(pde.fields) == 1 else f"initial {field}"
        label = name + (" velocity" if self.order else "")
        return [Block(label, pde.coords.index(time), False, ((1.0, term),), self.value, self.exact, field)]


@dataclass(frozen=True)
class Periodic(Condition):
    """The field, and with `order` 1 its derivative too, is the same at both ends of a coordinate.

    Args:
        coordinate: Its name.
        order: Highest derivative by the coordinate that agrees.
        exact: As in :class:`Dirichlet`.
        field: As there.

    Example:
        >>> from difflayers.pde import Periodic
        >>> Periodic("x").order
        1
    """

    coordinate: str
    order: int = 1
    exact: bool = False
    field: str | None = None

    def blocks(self, pde: PDE) -> list[Block]:
        """Its rows."""
        field, axis = pde.field(self.field), pde.axis(self.coordinate)
        if not isinstance(self.order, int) or self.order < 0:
            raise ValueError(f"order: expected an integer of at least 0, got {self.order!r}")
        terms = [field, *(f"{field}_{self.coordinate * k}" for k in range(1, self.order + 1))]
        return [
            Block(f"periodic {term} {self.coordinate}", axis, False, ((1.0, term),), 0.0, self.exact, field, True)
            for term in terms
        ]


def _on_sides(
    pde: PDE, kind: str, given: Dirichlet | Neumann | Robin, combination: Callable[[str, str], Any]
) -> list[Block]:
    field = pde.field(given.field)
    axis, ends = pde.side(given.side)
    name = kind if len(pde.fields) == 1 else f"{kind} {field}"
    coordinate = pde.coords[axis]
    return [
        Block(
            f"{name} {coordinate}={pde.domain.bounds[axis][upper]:g}",
            axis,
            upper,
            combination(field, coordinate),
            given.value,
            given.exact,
            field,
        )
        for upper in ends
    ]
