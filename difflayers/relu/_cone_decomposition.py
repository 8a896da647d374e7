r"""From gated networks to ReLU networks: every neuron as the difference of two that keep to the cell of its gate.

With :math:`K_i = \mathrm{diag}(e_{\cdot i}) X`, whose product with a vector is at least 0 inside the cell of gate i,

.. math:: u_i = v_i - w_i, \quad K_i v_i \ge 0, \quad K_i w_i \ge 0 \quad\Rightarrow\quad
    1[x_k^T g_i \ge 0]\, x_k^T u_i = (x_k^T v_i)_+ - (x_k^T w_i)_+ \text{ on the data.}

In w alone: :math:`K_i w_i \ge b_i = (-K_i u_i)_+`. The gate itself is strictly inside its cell, so
:math:`w_i = c\, g_i` with c large enough always does; the penalty grows. A. Mishkin, A. Sahiner, M. Pilanci, Fast
Convex Optimization for Two-Layer ReLU Networks, 2022, section 3.

The exact decomposition minimises :math:`\|u + w\| + \|w\|` over :math:`K w \ge b` by Newton's method on

.. math:: \varphi_\mu(u + w) + \varphi_\mu(w) - \mu \sum_k \log (K w - b)_k, \qquad
    \varphi_\mu(w) = \min_t\, t - \mu \log(t^2 - \|w\|^2) ,

with falling :math:`\mu`, for all neurons at once (S. Boyd, L. Vandenberghe, Convex Optimization, 2004, section 11.3).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_shape, check_tensor

from ._gated_solver import active_blocks
from ._relu_solution import ConvexReLUSolution
from ._training_call import check_beta

Method = Literal["closed", "exact", "approximate"]
_ON_GATE = 1e-12  # a point whose angle with a gate is less lies on it
_ACCURACY = 1e-10  # of the exact decomposition, relative to the neuron
_FACTOR, _STEPS = 0.1, 200  # by which mu falls; Newton steps in all
_LENGTHS = tuple(0.5**k for k in range(10))  # tried along a Newton direction
_APPROXIMATE_STEPS, _APPROXIMATE_WEIGHT = 300, 1e-10


class ConeDecomposition(NamedTuple):
    """A ReLU network made of a gated one.

    Attributes:
        network: The :class:`ConvexReLUSolution` with neurons v and w; its predictions on the training data are those of
            the gated network.
        growth: ``(*batch)`` penalty ``sum ||v_i|| + ||w_i||`` over that of the gated network, ``sum ||u_i||``: at least
            1, and 1 for the zero network.
    """

    network: ConvexReLUSolution
    growth: Tensor


def cone_decomposition(
    solution: ConvexReLUSolution, X: Tensor, beta: float | Tensor, *, method: Method = "exact"
) -> ConeDecomposition:
    """The ReLU network with the fit of a gated network: its neurons as differences inside the cells of their gates.

    Solves, for every active neuron u, ``argmin_{v,w} ||v|| + ||w||`` with ``v - w = u`` and v, w in the cell of its
    gate (`method` ``"exact"``), or finds longer ones at less cost.

    Args:
        solution: Of :func:`convex_gated_relu`.
        X: ``(*batch, n, d)`` data that it was trained on.
        beta: Weight decay that it was trained with, for objective and gap.
        method: ``"exact"``: the shortest decomposition, to a relative 1e-9 unless a cell is thinner than about 1e-5; a
            small second-order cone program for each neuron, all at once. ``"closed"``: ``w = c g`` along the gate's
            vector g, with the least c that does. ``"approximate"``: least squares of what is missing, by proximal
            gradient steps, and the closed form for the rest.

    Returns:
        A :class:`ConeDecomposition`: network and growth of the penalty. Predictions on the training data stay, up to
        rounding; between points they change. The objective is that of the ReLU network, and the gap bounds its distance
        to the best ReLU network over these gates, by the gated network as a lower bound. Zero neurons stay zero; one
        inside its cell stays as it is, and one whose negative is there becomes ``w = -u``.

    Raises:
        ValueError: For a solution that has negative neurons already, a method that does not exist, data of a wrong
            shape or dtype or with other patterns, and for a gate through points of the data (``x^T g = 0``) whose cell
            is so flat that a neuron cannot be decomposed.

    Points on a gate count as open, as they do in training; the gate's vector is moved off them to the inside of the
    closed cell where it has one, and where it has none the closed form is used. Not differentiable:
    :func:`convex_relu` is.

    Example:
        >>> import torch
        >>> from difflayers.relu import cone_decomposition, convex_gated_relu, enumerate_gates, predict
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
        >>> gated = convex_gated_relu(X, y, 0.1, enumerate_gates(X))
        >>> network, growth = cone_decomposition(gated, X, 0.1)
        >>> torch.allclose(predict(network, X), predict(gated, X)), bool(growth > 1)
        (True, True)

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, section 3
    and appendix D (cone decompositions).

    Departure: the approximate decomposition ends inside the cells, by the closed form.
    """
    if method not in ("exact", "closed", "approximate"):
        raise ValueError(f'method: expected "exact", "closed" or "approximate", got {method!r}')
    if solution.w is not None:
        raise ValueError("solution: expected a gated network, which has no negative neurons w, got one with w")
    beta = check_beta(beta, solution.v)
    v, gates, patterns = solution.v.detach(), solution.gates.vectors.detach(), solution.gates.patterns
    X = check_tensor("X", X, min_ndim=2).detach()
    check_shape("X", tuple(X.shape[-2:]), (patterns.shape[-2], v.shape[-1]), " in its last two dimensions")
    batch = torch.broadcast_shapes(v.shape[:-2], X.shape[:-2], patterns.shape[:-2])
    wide = torch.float64 if v.device.type != "mps" else v.dtype
    X, patterns, gates, u = (
        t.to(wide).expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (X, patterns, gates, v)
    )
    index, used = active_blocks(u)
    at = index.unsqueeze(-1)
    p = torch.take_along_dim(u, at, -2)
    cells = _Cells.of(X, torch.take_along_dim(patterns, index.unsqueeze(-2), -1), used)
    w = _decomposed(cells, p, torch.take_along_dim(gates, at, -2), used, method)
    place = at.expand_as(w)
    negative = torch.zeros_like(u).scatter(-2, place, torch.where(used.unsqueeze(-1), w, 0))
    positive = u.scatter(-2, place, torch.where(used.unsqueeze(-1), _sum(p, w), p))
    before, after = _penalty(u), _penalty(positive) + _penalty(negative)
    growth = torch.where(before > 0, after / torch.where(before > 0, before, 1), 1 + 0 * before)
    grown, growth = (after - before).reshape(batch).to(v.dtype) * beta, growth.reshape(batch).to(v.dtype)
    positive, negative = (t.reshape(*batch, *t.shape[1:]).to(v.dtype) for t in (positive, negative))
    objective, gap = (t.detach() + grown for t in (solution.objective, solution.gap))
    network = ConvexReLUSolution(positive, negative, objective, gap, solution.gates)
    return ConeDecomposition(network, growth)


class _Cells(NamedTuple):
    """The cells of blocks: ``K w >= 0`` with rows of length one."""

    rows: Tensor  # (B, n, d), unit points
    side: Tensor  # (B, a, n): 1 or -1; 0 for points at the origin, and everywhere where a block is not used

    @staticmethod
    def of(X: Tensor, patterns: Tensor, used: Tensor) -> _Cells:
        length = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
        there = (length > 0).mT & used.unsqueeze(-1)
        return _Cells(X / torch.where(length > 0, length, 1), (2 * patterns.mT - 1) * there)

    def height(self, w: Tensor) -> Tensor:
        """``K w``: at least 0 inside."""
        return self.side * (w @ self.rows.mT)

    def adjoint(self, rho: Tensor) -> Tensor:
        """``K^T rho``."""
        return (self.side * rho) @ self.rows

    def weighted_gram(self, weight: Tensor) -> Tensor:
        """``K^T diag(weight) K``."""
        d, weight = self.rows.shape[-1], weight * self.side.square()
        if d <= weight.shape[-2]:
            dyads = (self.rows.unsqueeze(-1) * self.rows.unsqueeze(-2)).flatten(-2)
            return (weight @ dyads).unflatten(-1, (d, d))
        rows = self.rows.unsqueeze(1)
        return (weight.unsqueeze(-1) * rows).mT @ rows


def _penalty(u: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u, dim=-1).sum(-1)


def _sum(u: Tensor, w: Tensor) -> Tensor:
    """``u + w``, exactly zero where w is ``-u``."""
    return torch.where((w == -u).all(-1, keepdim=True), 0, u + w)


def _decomposed(cells: _Cells, u: Tensor, gates: Tensor, used: Tensor, method: Method) -> Tensor:
    """The w of every block, in the units of u."""
    size = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    unit = u / torch.where(size > 0, size, 1)
    b = (-cells.height(unit)).clamp_min(0)
    b = torch.where(b <= 4 * torch.finfo(u.dtype).eps, 0, b)  # on the border, up to rounding
    inside = (b == 0).all(-1, keepdim=True)
    opposite = (cells.height(unit) <= 4 * torch.finfo(u.dtype).eps).all(-1, keepdim=True) & ~inside
    inner, room = _inner(cells, gates)
    split = (~inside & ~opposite).squeeze(-1)
    impossible = split & ((b > 0) & (room <= 0)).any(-1)
    if bool(impossible.any()):
        raise ValueError(
            f"solution: expected gates strictly between the points of X, got {int(impossible.sum())} active neurons of "
            "a gate with x^T g = 0 at some points, whose cell holds no difference that equals them; draw gates by "
            "`sample_gates` or `enumerate_gates`"
        )
    w = _shifted(torch.zeros_like(unit), b, inner, room)
    if method == "approximate":
        w = _shifted(*_near(cells, b), inner, room)
    if method == "exact":
        # a flat cell has no interior: there the closed form stays
        going = split & ((room > 0) | (cells.side == 0)).all(-1)
        if bool(going.any()):
            w = torch.where(going.unsqueeze(-1), _shortest(cells, unit, b, w, inner, going), w)
    w = torch.where(inside, 0, torch.where(opposite, -unit, w))
    return torch.where(opposite, -u, w * size)


def _inner(cells: _Cells, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors inside the cells, and their heights: at least 0, and more wherever a cell is not flat."""
    length = torch.linalg.vector_norm(gates, dim=-1, keepdim=True)
    g = gates / torch.where(length > 0, length, 1)
    room = cells.height(g)
    # float32 gates are that far from where they were
    if bool((room < -1e-5).any()):
        raise ValueError("X: expected the data that solution was trained on, got data with other activation patterns")
    on = (room <= _ON_GATE) & (cells.side != 0)
    lift = cells.adjoint(on.to(g.dtype))
    rise = cells.height(lift)
    falls = (rise < 0) & ~on
    reach = torch.where(falls, room / torch.where(falls, -rise, 1), 1).amin(-1, keepdim=True).clamp_max(1) / 2
    moved = torch.where(on.any(-1, keepdim=True), g + reach * lift, g)
    moved = moved / torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    better = (cells.height(moved) > 0) | (cells.side == 0)
    g = torch.where(better.all(-1, keepdim=True), moved, g)
    room = cells.height(g)
    return g, torch.where(room <= _ON_GATE, 0, room)


def _shifted(w: Tensor, missing: Tensor, inner: Tensor, room: Tensor) -> Tensor:
    """``w + c g`` with the least c that makes up for what is missing."""
    c = torch.where(missing > 0, missing / torch.where(room > 0, room, 1), 0).amax(-1, keepdim=True)
    return w + c * inner


def _near(cells: _Cells, b: Tensor) -> tuple[Tensor, Tensor]:
    """Proximal gradient steps on ``1/2 ||(b - K w)_+||^2 + 1e-10 ||w||``: w, and what is missing."""
    step = 1 / torch.linalg.matrix_norm(cells.rows, 2).square().clamp_min(1e-300)[:, None, None]
    w = torch.zeros_like(cells.adjoint(b))
    z, t = w, torch.ones_like(w[..., :1])
    for _ in range(_APPROXIMATE_STEPS):
        new = z + step * cells.adjoint((b - cells.height(z)).clamp_min(0))
        length = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
        new = new * (1 - step * _APPROXIMATE_WEIGHT / torch.where(length > 0, length, 1)).clamp_min(0)
        uphill = ((z - new) * (new - w)).sum(-1, keepdim=True) > 0
        t = torch.where(uphill, 1, t)
        grown = (1 + (1 + 4 * t * t).sqrt()) / 2
        z, w, t = new + (t - 1) / grown * (new - w), new, grown
    return w, (b - cells.height(w)).clamp_min(0)


# -------------------------------------------------------------------------------------------------- the exact one


def _shortest(cells: _Cells, u: Tensor, b: Tensor, w: Tensor, inner: Tensor, going: Tensor) -> Tensor:
    """Newton's method on the barrier function, from `w` and a little further inside; every block has its own mu."""
    w = w * (1 + 1 / 8) + inner / 8
    counted = cells.side != 0
    degree = counted.sum(-1, keepdim=True) + 4
    mu = (torch.linalg.vector_norm(w, dim=-1, keepdim=True) + 1) / degree
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    for _ in range(_STEPS):
        s = torch.where(counted, cells.height(w) - b, 1)
        least = _ACCURACY * (1 + torch.linalg.vector_norm(w, dim=-1, keepdim=True)) / degree
        slope_w, bend_w = _smooth_norm(w, mu, eye)
        slope_v, bend_v = _smooth_norm(u + w, mu, eye)
        weight = mu / s
        gradient = slope_w + slope_v - cells.adjoint(weight)
        hessian = bend_w + bend_v + cells.weighted_gram(weight / s)
        move = -_solve(hessian, gradient)
        decrement = -(gradient * move).sum(-1, keepdim=True) / mu
        centred = ~(decrement > 0.1)
        going = going & ~(centred & (mu <= least)).squeeze(-1)
        if not bool(going.any()):
            break
        rise = cells.height(move)
        falls = counted & (rise < 0)
        reach = torch.where(falls, -s / torch.where(falls, rise, 1), math.inf).amin(-1, keepdim=True)
        tried = (0.99 * reach).clamp_max(1) * w.new_tensor(_LENGTHS)  # (B, a, T)
        change = _barrier(w, move, s, rise, mu, tried) + _barrier(u + w, move, None, None, mu, tried)
        lowest, at = change.nan_to_num(nan=math.inf).min(-1, keepdim=True)
        take = going.unsqueeze(-1) & (lowest < 0)
        w = torch.where(take, w + tried.gather(-1, at) * move, w)
        # where rounding hides the descent a block is as central as it gets
        down = going.unsqueeze(-1) & (centred | (lowest >= 0))
        mu = torch.where(down, torch.maximum(_FACTOR * mu, least / 2), mu)
    return w


def _smooth_norm(w: Tensor, mu: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of ``phi_mu``, which is ``r - mu log(mu + r)`` with ``r = sqrt(mu^2 + ||w||^2)``."""
    r = torch.hypot(mu, torch.linalg.vector_norm(w, dim=-1, keepdim=True))
    slope = w / (mu + r)
    bend = eye / (mu + r).unsqueeze(-1) - slope.unsqueeze(-1) * (slope / r).unsqueeze(-2)
    return slope, bend


def _barrier(w: Tensor, move: Tensor, s: Tensor | None, rise: Tensor | None, mu: Tensor, t: Tensor) -> Tensor:
    """The change of ``phi_mu`` (and of the logarithms) after steps `t`, without cancellation."""
    square = w.square().sum(-1, keepdim=True)
    grown = t * (2 * (w * move).sum(-1, keepdim=True) + t * move.square().sum(-1, keepdim=True))
    r = (mu.square() + square).sqrt()
    new = (mu.square() + (square + grown).clamp_min(0)).sqrt()
    more = grown / (r + new)
    change = more - mu * torch.log1p(more / (mu + r))
    if s is None or rise is None:
        return change
    return change - mu * torch.log1p(t.unsqueeze(-1) * (rise / s).unsqueeze(-2)).sum(-1)


def _solve(A: Tensor, rhs: Tensor) -> Tensor:
    """A positive definite solve after scaling to a diagonal of ones; with a ridge where that fails, else zero."""
    scale = A.diagonal(dim1=-2, dim2=-1).rsqrt()
    scaled = A * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(scaled)
    failed = (info != 0)[..., None, None]
    if bool(failed.any()):
        ridge = 64 * torch.finfo(A.dtype).eps * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        eased, info = torch.linalg.cholesky_ex(scaled + ridge)
        factor = torch.where(failed, eased, factor)
    x = torch.cholesky_solve((rhs * scale).unsqueeze(-1), factor).squeeze(-1) * scale
    return torch.where((info == 0).unsqueeze(-1) & torch.isfinite(x), x, 0)
