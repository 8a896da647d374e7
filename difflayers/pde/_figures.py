"""Figures of a field, beside a reference, its error, and what the equation is missed by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ._declaration import PDE, Box
from ._derivatives import Jvp
from ._samplers import Place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = Tensor | Callable[[Tensor], Tensor]
COLOURS = {"field": "viridis", "error": "RdBu_r", "residual": "magma"}


def plot_field(
    field: Values,
    pde: PDE,
    reference: Values | None = None,
    *,
    grid: Sequence[Tensor] | None = None,
    index: int | tuple[int, ...] = (),
    component: str | None = None,
    params: Mapping[str, Any] | None = None,
    residual: bool = True,
    resolution: int = 101,
    snapshots: int = 4,
    units: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws a field, its reference, the error, and the residual of the equation.

    Fields of one coordinate become curves, those of two coordinates images, those of three rows of images at some
    values of the first coordinate. Of a :class:`ConstrainedField` the residual is drawn at the points where the
    equation was enforced, of another function on the grid. The boxes of experts are outlined.

    Args:
        field: A :class:`ConstrainedField`, a function (a network) of points ``(M, d)`` that returns ``(*batch, M)``, or
            ``(*batch, M, Q)`` for Q fields; or values on the grid, ``(*batch, n_1, ..., n_d)`` or with Q behind.
        pde: The equation, for coordinates, domain and residual.
        reference: Likewise, without a batch, and without Q.
        grid: The values of each coordinate, ``(n_i,)`` and increasing, at which to draw, such as those on which the
            reference was computed. None: `resolution` of each, equally spaced, in the domain; or the grid of a basis
            that was given as values on one.
        index: Of the element to draw, where `field` is a batch.
        component: Of several fields, the one to draw; None: the first.
        params: Those with which the layer was called.
        residual: Draw the residual.
        resolution: Points along each coordinate, at least 2.
        snapshots: How many values of the first of three coordinates are shown, at least 1.
        units: Of coordinates and fields, by name, for the labels.
        title: Above all.

    Returns:
        A figure, for ``figure.savefig(path)``. It is not registered with pyplot, and needs not be closed.

    Raises:
        ValueError: For values that do not fit the grid, an index that does not pick one element, or a domain with more
            than three coordinates.

    Not differentiable. Needs matplotlib.

    Example:
        >>> from difflayers.pde import Box, PDEConstraint, Poisson, plot_field
        >>> layer = PDEConstraint(Poisson(domain=Box(x=(0.0, 1.0)), f=2.0)).double()
        >>> field = layer(lambda x: x ** torch.arange(4, dtype=x.dtype))
        >>> figure = plot_field(field, layer.pde, lambda points: (points * (1 - points)).squeeze(-1))
        >>> [axis.get_title() for axis in figure.axes]
        ['u', 'error, relative L2 ...', 'residual, RMS ...']
    """
    d = len(pde.coords)
    if d > 3:
        raise ValueError(f"pde: expected at most three coordinates, got {d}")
    for name, value, least in (("resolution", resolution, 2), ("snapshots", snapshots, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    units = units or {}
    names = {name: name + (f" [{units[name]}]" if name in units else "") for name in (*pde.coords, *pde.fields)}
    chosen = pde.field(component or pde.fields[0])
    with torch.no_grad():
        view = _View(pde, (index,) if isinstance(index, int) else tuple(index), pde.fields.index(chosen))
        axes, kept = _axes(field, reference, pde, grid, resolution), None
        if d == 3:
            first = axes[0].cpu()
            wanted = first[0] + (first[-1] - first[0]) * torch.linspace(0, 1, snapshots, device="cpu")
            kept = (first - wanted[:, None].to(first)).abs().argmin(-1).unique()
        u, points = view.values("field", field, axes, kept)
        panels = [_Panel(names[chosen], u, "field")]
        if reference is not None:
            exact, _ = _View(pde, (), view.component).values("reference", reference, axes, kept)
            error = u - exact
            relative = float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(exact))
            panels.append(_Panel(f"{names[chosen]}, reference", exact, "field"))
            panels.append(_Panel(f"error, relative L2 {relative:.2g}", error, "error"))
        if residual and not isinstance(field, Tensor):
            panels.append(view.residual(field, points, params or {}))
    from matplotlib.figure import Figure

    boxes: tuple[Box, ...] = getattr(field, "boxes", ())
    figure = Figure(layout="constrained")
    if title is not None:
        figure.suptitle(title)
    labels = [names[c] for c in pde.coords]
    shown = [a.cpu() if kept is None or i else a.cpu()[kept] for i, a in enumerate(axes)]
    if d == 1:
        _draw_curves(figure, panels, shown, boxes, labels)
    else:
        _draw_images(figure, panels, shown, boxes, labels, pde)
    return figure


@dataclass
class _Panel:
    """What is drawn: values on the grid, or at scattered points."""

    title: str
    values: Tensor
    kind: Literal["field", "error", "residual"]
    points: Tensor | None = None

    def __post_init__(self) -> None:
        self.values = self.values.detach().to("cpu", torch.float64)
        self.points = None if self.points is None else self.points.detach().to("cpu", torch.float64)

    def slice(self, axes: list[Tensor], j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates and values of an image, or of points; of three coordinates at the j-th value of the first."""
        values = self.values
        if self.points is None:
            return axes[-2], axes[-1], values[j] if len(axes) == 3 else values
        own = [x.unique() for x in self.points.unbind(-1)]
        if math.prod(map(len, own)) == len(values):  # points of a grid
            place = torch.stack(
                [torch.searchsorted(a, x.contiguous()) for a, x in zip(own, self.points.unbind(-1), strict=True)]
            )
            grid = torch.full_like(values, math.nan).reshape(tuple(map(len, own)))
            grid[tuple(place)] = values
            return own[-2], own[-1], grid[(own[0] - axes[0][j]).abs().argmin()] if len(axes) == 3 else grid
        points = self.points
        if len(axes) == 3:  # those nearest to this snapshot
            here = (points[:, :1] - axes[0].to(points)).abs().argmin(-1) == j
            points, values = points[here], values[here]
        return points[:, -2], points[:, -1], values


@dataclass
class _View:
    """Of a field or reference the one element and component that is drawn."""

    pde: PDE
    index: tuple[int, ...]
    component: int

    def values(self, name: str, what: Values, axes: list[Tensor], kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values on the grid (with the snapshots `kept` of the first coordinate), and its points."""
        d, full = len(axes), tuple(map(len, axes))
        few = [a if kept is None or i else a[kept.to(a.device)] for i, a in enumerate(axes)]
        points = torch.cartesian_prod(*few).reshape(-1, d)
        if isinstance(what, Tensor) or _on_grid(what):
            u = self.one(name, what if isinstance(what, Tensor) else cast(Any, what)(), full)
            return (u if kept is None else u[kept.to(u.device)]), points
        if not callable(what):
            raise ValueError(f"{name}: expected a tensor or a function of points, got {type(what).__name__}")
        parts = [self.one(name, what(some), (len(some),)) for some in points.split(4096)]
        return torch.cat(parts).reshape(tuple(map(len, few))), points

    def one(self, name: str, given: Any, shape: tuple[int, ...]) -> Tensor:
        """The element and component."""
        u, several = given, len(self.pde.fields) > 1
        if not isinstance(u, Tensor):
            raise ValueError(f"{name}: expected a tensor or a function that returns one, got {type(u).__name__}")
        d, Q = len(shape), len(self.pde.fields)
        event = d + 1 if several and u.shape[-1:] == (Q,) and tuple(u.shape[-1 - d : -1]) == shape else d
        if tuple(u.shape[u.ndim - event :][:d]) != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name}: expected shape (*batch, {expected}), as the grid has, got {tuple(u.shape)}")
        if u.ndim - event != len(self.index):
            raise ValueError(
                f"index: expected {u.ndim - event} numbers, one for each batch dimension of {name} "
                f"{tuple(u.shape[: u.ndim - event])}, got {self.index}"
            )
        u = u[self.index]
        return u[..., self.component] if event > d else u

    def residual(self, field: Any, points: Tensor, params: Mapping[str, Any]) -> _Panel:
        """Where the equation was enforced, or on the grid."""
        pde, present = self.pde, None
        if hasattr(field, "terms"):
            terms = {name: t[self.index] for name, t in field.terms.items()}
            points, present = field.points, getattr(field, "present", None)
            shape = next(iter(terms.values())).shape
            points = points[self.index] if points.ndim > len(shape) + 1 else points
        else:

            def basis(point: Tensor) -> Tensor:
                return field(point.unsqueeze(0))[self.index].squeeze(0).unsqueeze(-1)

            found = Jvp().terms(basis, Place(points), pde, pde.terms).squeeze(-1)
            terms = dict(zip(pde.terms, found.unbind(-1), strict=True))
        named: dict[str, Any] = dict(zip(pde.coords, points.unbind(-1), strict=True))
        for name, value in {**pde.params, **params}.items():
            value = value if isinstance(value, Tensor) or not callable(value) else value(points)
            batched = isinstance(value, Tensor) and value.ndim > points.ndim - 1
            named[name] = value[self.index] if batched else value
        F = pde.residual(terms, named)
        F = torch.linalg.vector_norm(F, dim=-1) if F.ndim == points.ndim else F.abs()
        if present is not None:
            F, points = F[present], points[present]
        rms = float(F.square().mean().sqrt())
        return _Panel(f"residual, RMS {rms:.2g}", F.flatten(), "residual", points.reshape(-1, len(pde.coords)))


def _on_grid(field: Any) -> bool:
    """Whether the basis of a constrained field was given as values on a grid."""
    return isinstance(getattr(getattr(field, "_evaluate", None), "basis", None), Tensor)


def _axes(field: Any, reference: Any, pde: PDE, grid: Sequence[Tensor] | None, resolution: int) -> list[Tensor]:
    """The grid."""
    found = [t for t in (getattr(field, "points", None), field, reference) if isinstance(t, Tensor)]
    if isinstance(field, nn.Module):
        found = [p.detach() for p in field.parameters()] + found
    like = next((t for t in found if t.is_floating_point()), None)
    like = torch.empty(0, device="cpu") if like is None else like
    if _on_grid(field):
        if grid is not None:
            raise ValueError("grid: expected None for a basis that was given as values on a grid, got another")
        return [x.unique() for x in field.points.reshape(-1, len(pde.coords)).unbind(-1)]
    if grid is None:
        if isinstance(field, Tensor) or isinstance(reference, Tensor):
            raise ValueError("grid: expected the values of each coordinate, since a tensor is given on them, got None")
        return [torch.linspace(*b, resolution, dtype=like.dtype, device=like.device) for b in pde.domain.bounds]
    if len(grid) != len(pde.coords) or any(x.ndim != 1 or len(x) < 2 or not (x.diff() > 0).all() for x in grid):
        raise ValueError(
            f"grid: expected increasing values of {', '.join(pde.coords)}, one tensor (n,) each, got "
            f"{[tuple(x.shape) for x in grid]}"
        )
    return [x.to(like) if found else x for x in grid]


# ------------------------------------------------------------------------------------------------------------ drawing


def _draw_curves(
    figure: Figure, panels: list[_Panel], axes: list[Tensor], boxes: tuple[Box, ...], labels: list[str]
) -> None:
    """Fields of one coordinate: field and reference in one plot."""
    kinds = list(dict.fromkeys(panel.kind for panel in panels))
    figure.set_size_inches(4.2 * len(kinds), 3.2)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for i, panel in enumerate(p for p in panels if p.kind == kind):
            if panel.points is None:
                style: Any = {"color": "k", "ls": "--", "lw": 1.2} if i else {"color": "tab:blue", "lw": 2}
                axis.plot(axes[0].numpy(), panel.values.numpy(), label="reference" if i else "field", **style)
            else:
                axis.plot(panel.points[:, 0].numpy(), panel.values.numpy(), "o", ms=3, color="tab:blue")
            if i == 0:
                axis.set_title(panel.title)
        for box in boxes:
            axis.axvline(box.bounds[0][1], color="0.7", lw=0.8, zorder=0)
        if kind == "residual" and any((p.values > 0).any() for p in panels if p.kind == kind):
            axis.set_yscale("log")
        if kind == "error":
            axis.axhline(0, color="0.7", lw=0.8, zorder=0)
        if len([p for p in panels if p.kind == kind]) > 1:
            axis.legend(frameon=False)
        axis.set_xlabel(labels[0])
        axis.set_xlim(float(axes[0][0]), float(axes[0][-1]))


def _draw_images(
    figure: Figure, panels: list[_Panel], axes: list[Tensor], boxes: tuple[Box, ...], labels: list[str], pde: PDE
) -> None:
    """Fields of two coordinates in one row; of three, a row of snapshots each."""
    times = axes[0] if len(axes) == 3 else None
    plane = pde.domain.bounds[-2:]
    places = pde.time not in pde.coords[-2:]
    shape = (1, len(panels)) if times is None else (len(panels), len(times))
    size = (3.9 * shape[1], 3.3) if times is None else (2.5 * shape[1] + 1.2, 2.4 * shape[0])
    figure.set_size_inches(*size)
    plots = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    norms = _norms(panels)
    for k, panel in enumerate(panels):
        row = plots[0, k : k + 1] if times is None else plots[k]
        drawn: Any = None
        for j, axis in enumerate(row):
            style: Any = {"cmap": COLOURS[panel.kind], "norm": norms[panel.kind], "rasterized": True}
            x, y, F = (part.numpy() for part in panel.slice(axes, j))
            if F.ndim == 2:
                x, y, F = _closed(x, y, F, plane)
                drawn = axis.pcolormesh(x, y, F.T, shading="nearest", **style)
            else:
                axis.set_facecolor("0.85")
                drawn = axis.scatter(x, y, c=F, s=max(3.0, min(40.0, 8000 / max(len(F), 1))), lw=0, **style)
            for box in boxes:
                if times is None or box.bounds[0][0] <= float(times[j]) <= box.bounds[0][1]:
                    (a, b), (c, e) = box.bounds[-2:]
                    axis.plot([a, b, b, a, a], [c, c, e, e, c], color="k" if panel.kind == "error" else "w", lw=1.2)
            axis.set(xlim=plane[0], ylim=plane[1])
            if places:
                axis.set_aspect("equal")
            if times is None:
                axis.set_title(panel.title)
            elif k == 0:
                axis.set_title(f"{labels[0]} = {float(times[j]):.3g}")
            if times is None or k == len(panels) - 1:
                axis.set_xlabel(labels[-2])
            if j == 0 and (times is not None or k == 0):
                axis.set_ylabel(labels[-1])
        bar = figure.colorbar(drawn, ax=list(row), aspect=25 if times is None else 18, pad=0.02)
        if times is not None:
            bar.set_label(panel.title, fontsize="small")


def _closed(x: Any, y: Any, F: Any, plane: Sequence[tuple[float, float]]) -> tuple[Any, Any, Any]:
    """The image with the first values again at the upper ends of circles, whose grids leave it out."""
    import numpy as np

    nodes = [x, y]
    for i, (_, high) in enumerate(plane):
        gaps = np.diff(nodes[i])
        if np.ptp(gaps) < 1e-3 * gaps[0] and abs(nodes[i][-1] + gaps[0] - high) < 1e-3 * gaps[0]:
            nodes[i] = np.append(nodes[i], high)
            F = np.concatenate([F, np.take(F, [0], axis=i)], axis=i)
    return nodes[0], nodes[1], F


def _norms(panels: list[_Panel]) -> dict[str, Any]:
    """One scale of colours for field and reference, symmetric for the error, logarithmic for the residual."""
    from matplotlib.colors import LogNorm, Normalize

    def finite(kind: str) -> Tensor:
        values = torch.cat([p.values.flatten() for p in panels if p.kind == kind] or [panels[0].values.new_zeros(1)])
        values = values[values.isfinite()]
        return values if len(values) else values.new_zeros(1)

    field, error, residual = map(finite, ("field", "error", "residual"))
    most, high = float(error.abs().max()) or 1.0, float(residual.max())
    low = max(float(residual[residual > 0].quantile(0.02)) if high > 0 else 0.0, 1e-6 * high)
    return {
        "field": Normalize(float(field.min()), float(field.max())),
        "error": Normalize(-most, most),
        "residual": LogNorm(low, high, clip=True) if 0 < low < high else Normalize(0, high or 1.0),
    }
