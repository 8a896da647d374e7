r"""Total variation of an image: the nearest image with short edges.

.. math:: \operatorname{prox}(x) = \arg\min_z \; t \sum_i \|(Dz)_i\| + \tfrac12 \|z - x\|^2, \qquad
    (Dz)_{ij} = (z_{i,j+1} - z_{ij}, \; z_{i+1,j} - z_{ij})

with differences across the border of the image left out (Neumann). With Euclidean norms (isotropic) the result is
constant on pieces C, which flat pixels, :math:`(Dz)_i = 0`, join, and it is smooth in between: with the mean over every
piece as :math:`\Pi`,

.. math:: z = \Pi\Big(x - t D^T \frac{d}{\|d\|}\Big), \qquad d = Dz \text{ where pixels are not flat, else } 0 .

This is the residual of the layer. Its derivative in z is :math:`I + t \Pi D^T W D` with
:math:`W_i = (I - \hat d_i \hat d_i^T) / \|d_i\|`. With sums of absolute values (anisotropic) it is total variation on
the graph of pixels. L. Rudin, S. Osher, E. Fatemi, Nonlinear total variation based noise removal algorithms, 1992.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import plain

from ._flow_solver import TIE, DualGradient, Edges
from ._graph_tv import graph_arguments, graph_problem
from ._grid_system import difference, divergence
from ._identify import identify
from ._operands import Number, as_tensor, on_matrices, per_element
from ._partition import block_means
from ._tv2d_gradient import minimise as minimise_by_gradients
from ._tv2d_interior import TV2DInteriorPoint
from ._tv2d_interior import minimise as minimise_by_interior_point
from ._tv2d_pieces import Pieces, curvature, pixel_edges, pull, solve_on_pieces, times

Solver = TV2DInteriorPoint | DualGradient

LARGE = 64  # the shorter side from which on gradients are the default for isotropic total variation
LARGEST_SYSTEM = 1 << 24  # numbers in the blocks of what is factorised at once
TIGHT, LOOSE = 1e-10, 1e-3  # what the solvers aim at without rtol
NDIMS = (2, 2, 2, 2, 2, 0, 0, 0)  # of x and t, and of what is found


def prox_tv2d(
    x: Tensor,
    t: Number,
    *,
    isotropic: bool = True,
    solver: TV2DInteriorPoint | DualGradient | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The prox of total variation of an image (Rudin, Osher, Fatemi).

    Solves ``argmin_z t * sum_i |(Dz)_i| + 1/2 ||z - x||^2`` with the differences of pixel i to its neighbours to the
    right and below in ``(Dz)_i``; those across the border are left out.

    Args:
        x: ``(*batch, H, W)``.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch.
        isotropic: Euclidean length of the two differences; otherwise the sum of their absolute values.
        solver: For isotropic total variation ``TV2DInteriorPoint()``, which is exact and costs about
            ``20 H W min(H, W)^2`` flops a step, or ``DualGradient(rtol)``; None takes the latter, to a relative
            distance of 1e-3 that is proved (and is far less as a rule), where the shorter side exceeds 64. Otherwise
            ``DualGradient()``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        The minimiser, shaped like `x`.

    Raises:
        ValueError: For a negative `t`, NaN or Inf in `x`, or a wrong shape or dtype.

    Differentiable in `x` and `t`, to any order. Pixels whose two differences are zero count as flat, so at a kink the
    derivative is that of one joint piece.

    Example:
        >>> import torch
        >>> image = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> prox_tv2d(image, 0.3)
        tensor([[0.1500, 0.1500, 0.7000],
                [0.1500, 0.1500, 0.7000],
                [0.1500, 0.1500, 0.7000]])

    Source: L. Rudin, S. Osher, E. Fatemi, Nonlinear total variation based noise removal algorithms, 1992.
    Departure: an interior-point method and a proof of the flat pixels instead of gradient descent in time.
    """
    return _apply(lambda *given: solution_map(*given, on_failure=on_failure), x, t, isotropic, solver)


def prox_tv2d_ex(
    x: Tensor, t: Number, *, isotropic: bool = True, solver: TV2DInteriorPoint | DualGradient | None = None
) -> Solution[Tensor]:
    """As :func:`prox_tv2d`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        x: Images.
        t: Step.
        isotropic: Which total variation.
        solver: Tolerance and limits.

    Returns:
        The minimiser with the status of every element; its residual bounds the Euclidean distance to the minimiser.
    """
    found: list[Solution[Tensor]] = []

    def run(*given: Any) -> Tensor:
        found.append(solution_map_ex(*given))
        return found[0].value

    value = _apply(run, x, t, isotropic, solver)
    return replace(found[0], value=value)


def _apply(run: Callable[..., Tensor], x: Tensor, t: Number, isotropic: bool, solver: Solver | None) -> Tensor:
    """What `run` makes of the problem and its arguments."""
    check_tensor("x", x, min_ndim=2)
    height, width = x.shape[-2:]
    if solver is None:
        exact = min(height, width) <= LARGE
        solver = TV2DInteriorPoint() if isotropic and exact else DualGradient()
    if not isinstance(solver, TV2DInteriorPoint | DualGradient if isotropic else DualGradient):
        expected = "TV2DInteriorPoint or DualGradient" if isotropic else "DualGradient, since isotropic is False"
        raise ValueError(f"solver: expected {expected}, got {type(solver).__name__}")

    def formula(x: Tensor, t: Number) -> Tensor:
        t = as_tensor(t, x).expand(1, 1) if not isinstance(t, Tensor) else t
        if isotropic:
            found = identify(lambda *args: _find(solver, *args), x, t, ndims=NDIMS[:2], found_ndims=NDIMS[2:])
            return run(ISOTROPIC, (x, t, *found))
        edges = pixel_edges(height, width, x.device)
        graph = Edges(plain("tail", edges.tail), plain("head", edges.head), edges.nodes)
        assert isinstance(solver, DualGradient)
        args = graph_arguments(graph, solver, x.flatten(-2), t[..., 0], 1.0)
        return run(graph_problem(graph, "prox_tv2d"), args).unflatten(-1, (height, width))

    return on_matrices(formula, x, per_element("t", t, at_least=0))


# ------------------------------------------------------------------------------------------------- isotropic variation


def _optimality(z: Tensor, x: Tensor, t: Tensor, blocks: Tensor, flat: Tensor, *_: Tensor) -> Tensor:
    """``z`` less what it must be, given which pixels are flat and the pieces that they join."""
    pulled = x - divergence(pull(t, difference(z), flat))
    pulled, blocks = torch.broadcast_tensors(pulled, blocks)
    return z - block_means(pulled.flatten(-2), blocks.flatten(-2)).reshape(pulled.shape)


def _adjoint(
    z: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """Solves with ``I + Pi K`` or its transpose, ``K = t D^T W D``, by one solve on the images in the range of Pi."""
    _, t, blocks, flat, *_ = args
    batch = torch.broadcast_shapes(*(v.shape[:-2] for v in (z, t, blocks, rhs)))
    event = z.shape[-2:]
    z, t, blocks, flat, rhs = (v.expand(*batch, *event).reshape(-1, *event) for v in (z, t, blocks, flat, rhs))
    parts = zip(*(_split(v, z) for v in (z, t, blocks, flat, rhs)), strict=True)
    v = torch.cat([_invert(part, transpose) for part in parts]).reshape(*batch, *event)
    status = torch.where(torch.isfinite(v).flatten(-2).all(-1), int(Status.CONVERGED), int(Status.SINGULAR))
    return v, Info(status, torch.ones_like(status), v.new_zeros(batch))


def _invert(given: tuple[Tensor, ...], transpose: bool) -> Tensor:
    z, t, blocks, flat, rhs = given
    M, pieces = curvature(t, difference(z), flat), Pieces(blocks)
    if transpose:
        return rhs - _bend(M, solve_on_pieces(pieces, M, rhs))
    return rhs - solve_on_pieces(pieces, M, _bend(M, rhs))


def _split(v: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Parts of a batch whose factorised systems have a bounded size."""
    height, width = like.shape[-2:]
    return v.split(max(1, LARGEST_SYSTEM // (height * width * min(height, width))))


def _bend(M: Tensor, v: Tensor) -> Tensor:
    return divergence(times(M, difference(v)))


def _find(solver: Solver, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Pieces and flat pixels, the value, status, steps and residual, in float64 whatever comes in."""
    batch = torch.broadcast_shapes(x.shape[:-2], t.shape[:-2])
    event = x.shape[-2:]
    image, bound = (v.expand(*batch, *event).reshape(batch.numel(), *event).double() for v in (x, t))
    sound = torch.isfinite(image).flatten(1).all(-1)
    image = torch.where(sound[:, None, None], image, 0)
    moves = bound > 0  # without a step the image stays as it is
    z, info = _minimise(solver, torch.where(moves, image, 0), torch.where(moves, bound, 1), x.dtype)
    z = torch.where(moves, z, image).to(x.dtype)
    flat = ~(difference(z) != 0).any(1)
    joined = Pieces.joined_by(flat).blocks
    blocks = torch.where(moves, joined, torch.arange(event.numel(), device=x.device).reshape(event))
    z = torch.where(sound[:, None, None], z, torch.nan)
    status = torch.where(sound, info.status, int(Status.DIVERGED))
    found = blocks, flat, z, status, info.steps, info.residual.to(x.dtype)
    return tuple(f.reshape((*batch, *f.shape[1:])) for f in found)


def _minimise(solver: Solver, x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Info]:
    if not x.numel():
        zero = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        return x, Info(zero + int(Status.CONVERGED), zero, x.new_zeros(x.shape[:1]))
    norm = torch.linalg.vector_norm(x, dim=(-1, -2))
    spread = torch.linalg.vector_norm(x - x.mean((-1, -2), keepdim=True), dim=(-1, -2))
    rounding = TIE * torch.finfo(x.dtype).eps * norm
    if isinstance(solver, DualGradient):
        return minimise_by_gradients(x, b, solver, torch.maximum((solver.rtol or LOOSE) * spread, rounding))
    enough = solver.rtol or (1e-6 if dtype == torch.float64 else 1e-4)
    goal, accepted = (torch.maximum(rtol * spread, rounding) for rtol in (solver.rtol or TIGHT, enough))
    parts = zip(_split(x, x), _split(b, x), _split(goal, x), _split(accepted, x), strict=True)
    solved = [minimise_by_interior_point(*part, solver.max_steps) for part in parts]
    return torch.cat([z for z, _ in solved]), Info(*map(torch.cat, zip(*(info for _, info in solved), strict=True)))


ISOTROPIC = ImplicitProblem(
    solve=lambda x, t, blocks, flat, z, *info: (z, Info(*(i.clone() for i in info)), ()),
    residual=_optimality,
    linear_solve=_adjoint,
    value_ndim=2,
    arg_ndims=NDIMS,
    name="prox_tv2d",
    arg_names=("x", "t", "pieces", "flat", "value", "status", "steps", "residual"),
)
