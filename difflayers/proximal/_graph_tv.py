r"""Total variation on a graph: the nearest signal that jumps across few edges.

.. math:: \operatorname{prox}(x) = \arg\min_z \; t \sum_{e = (i, j)} w_e |z_j - z_i| + \tfrac12 \|z - x\|^2

The result is constant on connected pieces, and on a piece C it is the mean of x plus the pull of its neighbours,

.. math:: z_C = \operatorname{mean}_C(x) + \frac{t}{|C|} \sum_{\text{edges } e} w_e \operatorname{sign}(z_j - z_C) ,

which is the residual of the layer: given the pieces it is plain torch. What finds the pieces is in
:mod:`difflayers.proximal._flow_solver`. Source: A. Chambolle, J. Darbon, On total variation minimization and surface
evolution using parametric maximum flows, 2009, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure, Solution, Status
from difflayers.implicit import ImplicitProblem, solution_map, solution_map_ex
from difflayers.linalg._autodiff import opaque, plain

from ._flow_solver import DualGradient, Edges, minimise
from ._identify import identify
from ._operands import Number, as_tensor, on_vectors, per_element, per_event
from ._partition import block_means

NDIMS = (1, 1, 1, 1, 1, 1, 0, 0, 0)  # of x, t, weights, and of what is found


def prox_graph_tv(
    x: Tensor,
    t: Number,
    edges: Tensor,
    *,
    weights: Number | None = None,
    dim: int = -1,
    solver: DualGradient | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The prox of (anisotropic) total variation on a graph.

    Solves ``argmin_z t * sum_e weights_e |z_j - z_i| + 1/2 ||z - x||^2`` with ``edges[:, e] = (i, j)``.

    Args:
        x: Any shape; `dim` runs over the n nodes.
        t: Step, at least 0: a number, or a tensor that broadcasts to the batch (the shape of `x` without `dim`).
        edges: ``(2, m)`` integers in 0..n-1, a pair of nodes a column, shared by the batch; the order within a pair
            does not matter, and a pair listed twice counts twice.
        weights: At least 0: a number, ``(m)`` or ``(*batch, m)``. None: all 1.
        dim: The dimension of one signal.
        solver: Tolerance and limits.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        The minimiser, shaped like `x`. The pieces are proved to be right, so that it is exact up to rounding, unless a
        warning says otherwise.

    Raises:
        ValueError: For a negative `t` or `weights`, NaN or Inf in `x`, edges out of range, or a wrong shape or dtype.

    Differentiable in `x`, `t` and `weights`, to any order. At a kink (neighbouring pieces with equal values) the
    derivative is that of one joint piece. Nodes are never joined along an edge without weight.

    Example:
        >>> import torch
        >>> star = torch.tensor([[0, 0, 0], [1, 2, 3]])
        >>> prox_graph_tv(torch.tensor([0.0, 1.0, 2.0, -3.0]), 0.5, star)
        tensor([ 0.5000,  0.5000,  1.5000, -2.5000])

    Source: A. Chambolle, J. Darbon, On total variation minimization and surface evolution using parametric maximum
    flows, 2009. Departure: accelerated gradients on the flow, with a proof of the pieces, instead of maximum flows.
    """
    graph, solver = _graph(x, edges, dim, on_failure), solver or DualGradient()
    operands = _operands(t, weights, graph)
    return on_vectors(
        lambda *args: solution_map(graph_problem(graph), graph_arguments(graph, solver, *args), on_failure=on_failure),
        x,
        *operands,
        dim=dim,
    )


def prox_graph_tv_ex(
    x: Tensor,
    t: Number,
    edges: Tensor,
    *,
    weights: Number | None = None,
    dim: int = -1,
    solver: DualGradient | None = None,
) -> Solution[Tensor]:
    """As :func:`prox_graph_tv`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        x: Signals.
        t: Step.
        edges: Pairs of nodes.
        weights: Of the edges.
        dim: The dimension of one signal.
        solver: Tolerance and limits.

    Returns:
        The minimiser with the status of every element; its residual bounds the Euclidean distance to the minimiser.
    """
    graph, solver = _graph(x, edges, dim, "ignore"), solver or DualGradient()
    found: list[Solution[Tensor]] = []

    def formula(*args: Any) -> Tensor:
        found.append(solution_map_ex(graph_problem(graph), graph_arguments(graph, solver, *args)))
        return found[0].value

    value = on_vectors(formula, x, *_operands(t, weights, graph), dim=dim)
    return Solution(value, found[0].status, found[0].steps, found[0].residual)


@opaque
def _graph(x: Tensor, edges: Tensor, dim: int, on_failure: OnFailure) -> Edges:
    check_tensor("x", x, min_ndim=1)
    if not isinstance(edges, Tensor):
        raise ValueError(f"edges: expected a tensor, got {type(edges).__name__}")
    if edges.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"edges: expected an integer tensor (int64 or int32), got {edges.dtype}")
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ValueError(f"edges: expected shape (2, m), got {tuple(edges.shape)}")
    if edges.device != x.device:
        raise ValueError(f"edges: expected device {x.device} as of x, got {edges.device}")
    nodes = x.shape[dim] if -x.ndim <= dim < x.ndim else 0  # a wrong dim is refused in a moment
    pairs = edges.to(torch.int64)
    tail, head = (plain("edges", pairs[i]) for i in range(2))  # what a transform computes, it wraps
    if nodes and on_failure != "ignore" and pairs.numel() and not pairs.is_meta:
        low, high = (int(m) for m in plain("edges", pairs).aminmax())
        if low < 0 or high >= nodes:
            raise ValueError(f"edges: expected nodes in 0..{nodes - 1}, got {low}..{high}")
    return Edges(tail, head, nodes)


def _operands(t: Number, weights: Number | None, graph: Edges) -> tuple[Any, Any]:
    weights = 1.0 if weights is None else weights
    m = len(graph.tail)
    per_edge = isinstance(weights, Tensor) and weights.ndim > 0
    w = per_event("weights", weights, (m,), at_least=0) if per_edge else per_element("weights", weights, at_least=0)
    return per_element("t", t, at_least=0), w


def graph_arguments(graph: Edges, solver: DualGradient, x: Tensor, t: Number, w: Number) -> tuple[Tensor, ...]:
    """What is differentiated, and what the algorithm finds: pieces and jumps, the value, the report."""
    t, w = (v if isinstance(v, Tensor) else as_tensor(v, x).unsqueeze(-1) for v in (t, w))
    found = identify(lambda *args: find(graph, solver, *args), x, t, w, ndims=NDIMS[:3], found_ndims=NDIMS[3:])
    return x, t, w, *found


def graph_problem(graph: Edges, name: str = "prox_graph_tv") -> ImplicitProblem:
    return ImplicitProblem(
        solve=lambda x, t, w, pieces, jumps, z, *info: (z, Info(*(i.clone() for i in info)), ()),
        residual=lambda z, x, t, w, pieces, jumps, *_: z - _on_pieces(graph, x, t, w, pieces, jumps),
        linear_solve=_adjoint,
        value_ndim=1,
        arg_ndims=NDIMS,
        name=name,
        arg_names=("x", "t", "weights", "pieces", "jumps", "value", "status", "steps", "residual"),
    )


def _on_pieces(graph: Edges, x: Tensor, t: Tensor, w: Tensor, pieces: Tensor, jumps: Tensor) -> Tensor:
    """What the value must be, given its pieces and the signs of its jumps."""
    across = jumps != 0  # an infinite step makes no jumps, and no NaN
    pull = torch.where(across, t, 0) * torch.where(across, w, 0) * jumps
    pieces, pulled = torch.broadcast_tensors(pieces, x - graph.divergence(pull))
    return block_means(pulled, pieces)


def _adjoint(
    z: Tensor, args: tuple[Tensor, ...], factors: tuple[Tensor, ...], rhs: Tensor, transpose: bool
) -> tuple[Tensor, Info]:
    """The pieces do not move with z: the derivative of the residual is the identity."""
    zero = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
    return rhs.clone(), Info(zero + int(Status.CONVERGED), zero, rhs.new_zeros(zero.shape))


def find(graph: Edges, solver: DualGradient, x: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Pieces and jumps, the value, status, steps and residual, in float64 whatever comes in."""
    batch = torch.broadcast_shapes(x.shape[:-1], t.shape[:-1], w.shape[:-1])
    count, n, m = batch.numel(), graph.nodes, len(graph.tail)
    signal = x.expand(*batch, n).reshape(count, n).double()
    bound = (t * w).expand(*batch, m).reshape(count, m).double()
    sound = torch.isfinite(signal).all(-1)
    signal = torch.where(sound.unsqueeze(-1), signal, 0)
    z, info = minimise(signal, bound, graph, solver)
    pieces, jumps = graph.pieces(z, bound)
    z = torch.where(sound.unsqueeze(-1), z, torch.nan)
    status = torch.where(sound, info.status, int(Status.DIVERGED))
    found = pieces, jumps.to(x.dtype), z.to(x.dtype), status, info.steps, info.residual.to(x.dtype)
    return tuple(f.reshape((*batch, *f.shape[1:])) for f in found)
