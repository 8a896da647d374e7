r"""Growing the gates of a convex ReLU network: column generation over activation patterns.

A network that is optimal over some patterns is optimal over all of them where no unit direction u has

.. math:: |\nu^T (X u)_+| > \beta, \qquad \nu_k = -s_k\, l'(f_k, y_k) .

Directions beyond that are looked for by ascent from random starts along :math:`X^T (1[X u \ge 0] \circ \nu)`, whose
fixed points are the stationary directions inside cells; steps are shortened where they do not rise, which leads on to
maxima between cells. Their patterns join, and the program is solved again. M. Pilanci, T. Ergen, Neural Networks are
Convex Regularizers, 2020, for the dual constraint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import OnFailure

from ._convex_relu import ConeMethod, convex_relu
from ._gated_relu import convex_gated_relu
from ._gated_solver import FISTA
from ._gates import Gates
from ._losses import Loss
from ._relu_solution import ConvexReLUSolution, predict
from ._sampled_program import sample_directions
from ._training_call import checked_call

_STEPS = 40  # of the ascent from a start
_CENTRING, _SHORTER = 200, 0.9  # steps of a direction towards the middle of its cell, each shorter than the last
_STRICT = 64  # rounding units: a direction closer than that to a point is on the border of its cell


class GateSearch(NamedTuple):
    """What :func:`grow_gates` found.

    Attributes:
        network: The :class:`ConvexReLUSolution` over the last gates, which are its `gates`.
        objectives: ``(rounds + 1)`` values, of the network over the given gates and after each round: they never rise.
        settled: Whether the last search found nothing more; False where the number of rounds ended it.
    """

    network: ConvexReLUSolution
    objectives: Tensor
    settled: bool


def grow_gates(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    gates: Gates | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    gated: bool = False,
    rounds: int = 20,
    starts: int = 200,
    most: int = 50,
    rtol: float = 1e-6,
    solver: ConeMethod | FISTA | None = None,
    generator: torch.Generator | None = None,
    on_failure: OnFailure = "raise",
) -> GateSearch:
    """Trains a convex ReLU network, and adds activation patterns that it lacks until a search finds no more.

    Looks for unit directions u with ``|nu^T (X u)_+| > beta``, nu the negative slopes of the weighted loss: over all
    patterns an optimal network leaves none. A heuristic: the search climbs from random starts and may miss some, so
    that `settled` proves nothing; the gap of the network is that over its gates. Where the patterns can be counted,
    :func:`enumerate_gates` is sure.

    Args:
        X: ``(n, d)`` training data.
        y: ``(n)`` labels.
        beta: More than 0.
        gates: :class:`Gates` to begin with, or their vectors ``(P, d)``; kept.
        sample_weight: ``(n)``, or None.
        loss: Loss, or None for :class:`Squared`.
        gated: Train a gated network (:func:`convex_gated_relu`), for which patterns with ``||Z^T nu|| > beta`` are
            missing; else a ReLU network (:func:`convex_relu`).
        rounds: Largest number of searches.
        starts: Random starts of a search, for each sign.
        most: Largest number of patterns that a search adds: those most beyond beta.
        rtol: How far beyond beta a direction has to be, relative to beta.
        solver: Of the program; None for its default.
        generator: Source of randomness, on the device of X.
        on_failure: As for :func:`convex_relu`.

    Returns:
        A :class:`GateSearch`: the network, with its gates, the objective after every round, and whether it settled.

    Raises:
        ValueError: As :func:`convex_relu`, and for data with batch dimensions or limits below 1.

    Differentiable as :func:`convex_relu` over the last gates: the search is not part of the graph.

    Example:
        >>> import torch
        >>> from difflayers.relu import grow_gates
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = grow_gates(X, y, 0.1, X.new_tensor([[0.0, 1.0]]), generator=generator)
        >>> found.settled, bool(found.objectives[-1] < found.objectives[0])
        (True, True)

    Source: M. Pilanci, T. Ergen, Neural Networks are Convex Regularizers, 2020, section 3 (the dual program whose
    constraints are searched).
    """
    if check_tensor("X", X, min_ndim=2).ndim != 2:
        raise ValueError(f"X: expected shape (n, d), got {tuple(X.shape)}; gates differ between elements of a batch")
    for name, value in (("rounds", rounds), ("starts", starts), ("most", most)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not rtol > 0:
        raise ValueError(f"rtol: expected more than 0, got {rtol}")
    if loss is not None and not loss.smooth:
        raise ValueError(f"loss: expected a smooth loss, whose slopes show what is missing, got {loss!r}")
    train: Callable[..., ConvexReLUSolution] = convex_gated_relu if gated else convex_relu
    options: dict[str, Any] = {"sample_weight": sample_weight, "loss": loss, "solver": solver, "on_failure": on_failure}
    network = train(X, y, beta, gates, **options)
    objectives, settled = [network.objective.detach()], False
    for _ in range(rounds):
        new = _search(X, y, beta, network, sample_weight, loss, gated, starts, most, rtol, generator)
        settled = not len(new)
        if settled:
            break
        known = network.gates.vectors
        start = network._replace(v=_padded(network.v, new), w=None if network.w is None else _padded(network.w, new))
        network = train(X, y, beta, torch.cat([known, new]), warm_start=start, **options)
        objectives.append(network.objective.detach())
    return GateSearch(network, torch.stack(objectives), settled)


def _padded(neurons: Tensor, new: Tensor) -> Tensor:
    return torch.cat([neurons.detach(), torch.zeros_like(new)])


@torch.no_grad()
def _search(
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    network: ConvexReLUSolution,
    sample_weight: Tensor | None,
    loss: Loss | None,
    gated: bool,
    starts: int,
    most: int,
    rtol: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Unit directions ``(m, d)``, one for each new pattern that ought to be there, the most wanted first."""
    call = checked_call(X, y, beta, network.gates, sample_weight, loss)
    X, y, s, bound = call.args[:4]
    f = predict(network, X)
    wide = torch.float64 if X.device.type != "mps" else X.dtype
    nu, rows = (-s * call.loss.slope(f, y)).to(wide), X.to(wide)
    u = sample_directions(rows, starts, generator=generator)
    signs = torch.ones_like(u[:, 0])
    u, signs = torch.cat([u, u]), torch.cat([signs, -signs])
    drawn = u
    u, height = _climb(rows, nu, u, signs)
    if gated:  # a gate may be wanted whose own pattern does not hold the direction it asks for: the draws count too
        u = torch.cat([drawn[:starts], u])
        height = torch.linalg.vector_norm(_slope(rows, nu, u), dim=-1)
    wanted = height > (1 + rtol) * bound
    order = torch.argsort(torch.where(wanted, height, -torch.inf), descending=True, stable=True)
    u = u[order][: int(wanted.sum())]
    # the first of each pattern, in order, that the network does not have
    length = torch.linalg.vector_norm(rows, dim=-1)
    units = rows[length > 0] / length[length > 0].unsqueeze(-1)
    signs = 2 * torch.cat([network.gates.patterns[length > 0], units @ u.mT >= 0], 1).to(wide) - 1
    equal = signs.mT @ signs == len(units)
    u, room = _centred(units, u[~equal.triu(1).any(0)[network.gates.patterns.shape[1] :]][:most])
    return u[room > _STRICT * torch.finfo(X.dtype).eps].to(network.gates.vectors.dtype)


def _slope(X: Tensor, nu: Tensor, u: Tensor) -> Tensor:
    """``X^T (1[X u >= 0] nu)`` for directions ``(m, d)``."""
    return ((u @ X.mT >= 0) * nu) @ X


def _climb(X: Tensor, nu: Tensor, u: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Ascent on ``sign * nu^T (X u)_+`` over unit directions: where it ends, and how high."""
    height = signs * ((u @ X.mT).relu() @ nu)
    part = torch.ones_like(height)  # of the way to the fixed point's next direction
    for _ in range(_STEPS):
        g = signs.unsqueeze(-1) * _slope(X, nu, u)
        length = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        g = g / torch.where(length > 0, length, 1)
        new = (1 - part).unsqueeze(-1) * u + part.unsqueeze(-1) * g
        length = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
        new = torch.where(length > 0, new / torch.where(length > 0, length, 1), u)
        reached = signs * ((new @ X.mT).relu() @ nu)
        better = reached > height
        u, height = torch.where(better.unsqueeze(-1), new, u), torch.maximum(reached, height)
        part = torch.where(better, (1.5 * part).clamp_max(1), part / 2)
    return u, height


def _centred(units: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of the same cells, further from their borders, and the least angle of each to a point."""
    if not len(units):
        return u, torch.ones_like(u[:, 0])
    side = 2 * (u @ units.mT >= 0).to(u.dtype) - 1
    best, room = u, (side * (u @ units.mT)).amin(-1)
    for k in range(_CENTRING):
        nearest = (side * (u @ units.mT)).argmin(-1)
        u = u + side.gather(-1, nearest.unsqueeze(-1)) * units[nearest] * (_SHORTER**k / 2)
        u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
        least = (side * (u @ units.mT)).amin(-1)
        better = least > room
        best, room = torch.where(better.unsqueeze(-1), u, best), torch.maximum(least, room)
    return best, room
