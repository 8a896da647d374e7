r"""Equilibria on graphs: :math:`H = \varphi(\kappa A H + B)` with a contracting, input-dependent edge map A."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_finite, check_same, check_shape, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import Anderson, IterativeSolver, fixed_point, fixed_point_ex
from difflayers.linalg import GMRES, LU, QR, LinearOperator, LinearSolver, linear_solve, linear_solve_ex
from difflayers.linalg._autodiff import opaque, physical, plain

DENSE_NODES = 256  # up to here one factorisation for each head costs less than a Krylov solve

Activation = Callable[[Tensor], Tensor]
EdgeWeights = Callable[[Tensor, Tensor, int], Tensor]


@opaque
def graph_equilibrium(
    edge_weights: Tensor,
    edge_index: Tensor,
    B: Tensor,
    kappa: float | Tensor = 0.5,
    *,
    activation: Activation | None = None,
    solver: LinearSolver | IterativeSolver | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    r"""The fixed point of a contraction along the edges of a graph.

    .. math:: H_i = \varphi\Big(\kappa \sum_{e : i \to j} a_e H_j + B_i\Big)

    where node i reads node j along every edge e with ``edge_index[:, e] = (i, j)``; an edge that is listed twice counts
    twice. For nonnegative weights whose sums over each node's edges are at most 1, and :math:`\kappa < 1`, the fixed
    point exists, is unique, and, without :math:`\varphi`, :math:`\|H\|_\infty \le \|B\|_\infty / (1 - \kappa)`. Proof:
    :math:`T(H) = \varphi(\kappa A H + B)` satisfies, for nonexpansive :math:`\varphi`,

    .. math:: \|T(H) - T(G)\|_\infty \le \kappa \max_i \sum_j A_{ij} \|H - G\|_\infty \le \kappa \|H - G\|_\infty,

    so Banach's theorem applies; with :math:`G = 0`, :math:`\|H\|_\infty \le \kappa \|H\|_\infty + \|B\|_\infty`.

    Without :math:`\varphi` it solves :math:`(I - \kappa A) H = B`: by one LU factorisation for each batch element up to
    256 nodes, beyond that by GMRES with products along the edges, so that no N x N matrix is formed.

    Args:
        edge_weights: ``(*batch, E)`` weights a; :func:`edge_sigmoid` and :func:`edge_softmax` make ones that contract.
        edge_index: ``(2, E)`` integers in 0..N-1, shared by the batch: first row the node that reads, second row the
            node that is read.
        B: ``(*batch, N, d)`` node terms; d columns share the map.
        kappa: ``(*batch)`` contraction factor in [0, 1), or one number. A number outside is refused, a tensor is not
            read.
        activation: Nonexpansive elementwise function without parameters (``torch.tanh``, ``torch.relu``), or None.
        solver: Without activation a linear solver (``LU()``, ``QR()``, ``GMRES()``), with one a fixed-point solver.
            None: by size, or ``Anderson()``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"`` (no check that reads data).

    Returns:
        ``(*batch, N, d)`` equilibrium.

    Raises:
        ValueError: For bad input, naming the argument.
        SolveError: If an element failed, for weights and kappa that do not contract.

    Differentiable in `edge_weights`, `B` and `kappa`, to any order, forward and reverse.

    Several graphs in one call: put them side by side as one graph without edges between them, by
    :func:`disjoint_union`. The stopping rule of GMRES and Anderson then holds for all of them together.

    Example:
        >>> import torch
        >>> from difflayers.equilibrium import graph_equilibrium
        >>> path = torch.tensor([[0, 1], [1, 2]])  # 0 reads 1, 1 reads 2
        >>> graph_equilibrium(torch.ones(2), path, torch.tensor([[0.0], [0.0], [1.0]]), 0.5).squeeze(-1)
        tensor([0.2500, 0.5000, 1.0000])

    Source: J. Park, J. Choo, J. Park, Convergent Graph Solvers, ICLR 2022, sections 3 and 4.

    Departure: a linear solve to rounding instead of at most 50 Picard steps (whose error after k steps is of order
    kappa^k) judged by one norm over the whole batch; derivatives of every order; edges instead of a dense N x N matrix
    for each head on large graphs.
    """
    problem = _Problem(edge_weights, edge_index, B, kappa, activation, solver, on_failure)
    try:
        if activation is None:
            columns = linear_solve(*problem.system, solver=problem.linear_solver, on_failure=on_failure)
            return columns.movedim(0, -1).to(B.dtype)
        return fixed_point(*problem.fixed_point, **problem.options, on_failure=on_failure).to(B.dtype)
    except ValueError:
        # name what the caller passed, not what was made of it
        check_finite([("edge_weights", physical(edge_weights)), ("B", physical(B)), ("kappa", physical(problem.kappa))])
        raise


@opaque
def graph_equilibrium_ex(
    edge_weights: Tensor,
    edge_index: Tensor,
    B: Tensor,
    kappa: float | Tensor = 0.5,
    *,
    activation: Activation | None = None,
    solver: LinearSolver | IterativeSolver | None = None,
) -> Solution[Tensor]:
    """As :func:`graph_equilibrium`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        edge_weights: Weights.
        edge_index: Edges.
        B: Node terms.
        kappa: Contraction factor.
        activation: Nonexpansive function or None.
        solver: Linear or fixed-point solver.

    Returns:
        The equilibrium with status, steps and residual. ``(d, *batch)``, one for each linear system, without
        activation; ``(*batch)`` with one.
    """
    problem = _Problem(edge_weights, edge_index, B, kappa, activation, solver, "nan")
    if activation is None:
        solution = linear_solve_ex(*problem.system, solver=problem.linear_solver)
        return replace(solution, value=solution.value.movedim(0, -1).to(B.dtype))
    solution = fixed_point_ex(*problem.fixed_point, **problem.options)
    return replace(solution, value=solution.value.to(B.dtype))


def edge_sigmoid(logits: Tensor, edge_index: Tensor, num_nodes: int) -> Tensor:
    r"""Contracting edge weights :math:`\sigma(l_e) / \mathrm{deg}(i)`, with deg(i) the edges by which i reads.

    The weights of a node sum to less than 1, and each may be chosen freely between 0 and 1/deg(i).

    Args:
        logits: ``(*batch, E)``.
        edge_index: ``(2, E)``, as in :func:`graph_equilibrium`.
        num_nodes: N.

    Returns:
        ``(*batch, E)`` weights.

    Differentiable in `logits`, to any order.

    Source: Convergent Graph Solvers, 2022. Departure: a sigmoid instead of clipping to [0, 1], whose gradient is zero
    outside.
    """
    _check_edges(edge_index, num_nodes, logits, data=False)
    degree = torch.zeros(num_nodes, dtype=logits.dtype, device=logits.device)
    degree = degree.index_add(0, edge_index[0], torch.ones_like(edge_index[0], dtype=logits.dtype))
    return torch.sigmoid(logits) / degree[edge_index[0]]


def edge_softmax(logits: Tensor, edge_index: Tensor, num_nodes: int) -> Tensor:
    """Contracting edge weights: a softmax over the edges by which each node reads; they sum to 1.

    Args:
        logits: ``(*batch, E)``.
        edge_index: ``(2, E)``, as in :func:`graph_equilibrium`.
        num_nodes: N.

    Returns:
        ``(*batch, E)`` weights.

    Differentiable in `logits`, to any order.

    Source: Convergent Graph Solvers, 2022 (attention form).
    """
    _check_edges(edge_index, num_nodes, logits, data=False)
    readers = edge_index[0]
    lowest = logits.new_full((*logits.shape[:-1], num_nodes), -torch.inf)
    top = lowest.scatter_reduce(-1, readers.expand_as(logits), logits.detach(), "amax")
    unit = torch.exp(logits - top[..., readers])
    return unit / unit.new_zeros((*unit.shape[:-1], num_nodes)).index_add(-1, readers, unit)[..., readers]


def disjoint_union(
    nodes: Sequence[Tensor], edges: Sequence[Tensor], edge_indices: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several graphs as one graph with no edges between them.

    Args:
        nodes: ``(*batch, N_g, F)`` for each graph g.
        edges: ``(*batch, E_g, F_e)`` for each graph.
        edge_indices: ``(2, E_g)`` for each graph.

    Returns:
        Nodes ``(*batch, N, F)``, edges ``(*batch, E, F_e)``, edge index ``(2, E)``, the graph of every node ``(N)``.
    """
    sizes = [x.shape[-2] for x in nodes]
    starts = [sum(sizes[:g]) for g in range(len(sizes))]
    index = torch.cat([e + start for e, start in zip(edge_indices, starts, strict=True)], -1)
    graph = torch.cat([e.new_full((size,), g) for g, (e, size) in enumerate(zip(edge_indices, sizes, strict=True))])
    return torch.cat(list(nodes), -2), torch.cat(list(edges), -2), index, graph


def _check_edges(edge_index: object, num_nodes: int, like: Tensor, *, data: bool) -> Tensor:
    if not isinstance(edge_index, Tensor):
        raise ValueError(f"edge_index: expected a tensor, got {type(edge_index).__name__}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"edge_index: expected an integer tensor (int64 or int32), got {edge_index.dtype}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape (2, E), got {tuple(edge_index.shape)}")
    if edge_index.device != like.device:
        raise ValueError(f"edge_index: expected device {like.device}, got {edge_index.device}")
    if like.ndim < 1 or like.shape[-1] != edge_index.shape[1]:
        raise ValueError(
            f"edge_index: expected {tuple(like.shape)[-1:]} edges as there are weights, got {edge_index.shape[1]}"
        )
    index: Tensor = plain("edge_index", edge_index)
    if data and index.numel() and not index.is_meta and not torch.compiler.is_compiling():
        low, high = (int(m) for m in index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index: expected nodes in 0..{num_nodes - 1}, got {low}..{high}")
    return index


class _Problem:
    """Checked arguments in the dtype of the solve, as a linear system or as an update."""

    def __init__(
        self,
        edge_weights: Tensor,
        edge_index: Tensor,
        B: Tensor,
        kappa: float | Tensor,
        activation: Activation | None,
        solver: LinearSolver | IterativeSolver | None,
        on_failure: OnFailure,
    ) -> None:
        check_policy(on_failure)
        check_tensor("edge_weights", edge_weights, min_ndim=1)
        check_tensor("B", B, min_ndim=2)
        edges = _check_edges(edge_index, B.shape[-2], edge_weights, data=on_failure != "ignore")
        if isinstance(kappa, Tensor):
            check_tensor("kappa", kappa)
        elif not 0 <= kappa < 1:
            raise ValueError(f"kappa: expected a number in [0, 1), got {kappa}")
        else:
            kappa = torch.full((), kappa, dtype=B.dtype, device=B.device)
        check_same([("B", B), ("edge_weights", edge_weights), ("kappa", kappa)])
        shapes = [("B", B.shape[:-2]), ("edge_weights", edge_weights.shape[:-1]), ("kappa", kappa.shape)]
        batch = broadcast_batch((name, tuple(shape)) for name, shape in shapes)
        want = LinearSolver if activation is None else IterativeSolver
        if solver is not None and not isinstance(solver, want):
            which = "without an activation" if activation is None else "with an activation"
            raise ValueError(f"solver: expected a {want.__name__} {which}, got {type(solver).__name__}")
        work = compute_dtype(B.dtype)
        self.weights, self.kappa = edge_weights.to(work), kappa.to(work)
        self.B = B.to(work).expand(*batch, *B.shape[-2:])
        self.edge_index = edges
        self.activation, self.solver = activation, solver

    @property
    def linear_solver(self) -> LinearSolver:
        """The given one, or one that suits the size."""
        if isinstance(self.solver, LinearSolver):
            return self.solver
        return LU() if self.B.shape[-2] <= DENSE_NODES else GMRES()

    @property
    def system(self) -> tuple[Tensor | LinearOperator, Tensor]:
        """``I - kappa A`` and the columns of B, which share one factorisation."""
        n, a, edge_index = self.B.shape[-2], self.weights, self.edge_index
        columns = self.B.movedim(-1, 0)
        if isinstance(self.linear_solver, LU | QR):
            flat = a.new_zeros((*a.shape[:-1], n * n)).index_add(-1, edge_index[0] * n + edge_index[1], a)
            identity = torch.eye(n, dtype=a.dtype, device=a.device)
            return identity - self.kappa[..., None, None] * flat.unflatten(-1, (n, n)), columns

        def matvec(params: tuple[Tensor, ...], v: Tensor) -> Tensor:
            a, kappa = params
            return v - kappa[..., None] * _gather(a[..., None], v[..., None], edge_index).squeeze(-1)

        return LinearOperator(matvec, (a, self.kappa), param_ndims=(1, 0)), columns

    @property
    def fixed_point(self) -> tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]:
        """Update, start and arguments."""
        activation, edge_index = self.activation, self.edge_index
        assert activation is not None

        def update(H: Tensor, a: Tensor, kappa: Tensor, B: Tensor) -> Tensor:
            return activation(kappa[..., None, None] * _gather(a[..., None], H, edge_index) + B)

        return update, torch.zeros_like(self.B), (self.weights, self.kappa, self.B)

    @property
    def options(self) -> dict[str, Any]:
        """Dimensions and solver of the fixed point."""
        return {"event_ndim": 2, "arg_ndims": (1, 0, 2), "solver": self.solver or Anderson()}


def _gather(weights: Tensor, H: Tensor, edge_index: Tensor) -> Tensor:
    """``A H``: what every node reads along its edges; weights ``(..., E, 1)``, H ``(..., N, d)``."""
    messages = weights * H[..., edge_index[1], :]
    return messages.new_zeros((*messages.shape[:-2], *H.shape[-2:])).index_add(-2, edge_index[0], messages)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b)]
    return nn.Sequential(*layers)


class _Messages(nn.Module):
    """One round of message passing with attention: updates the features of nodes and edges."""

    def __init__(self, nodes: int, edges: int, hidden: int) -> None:
        super().__init__()
        self.edge = mlp(2 * nodes + edges, hidden, hidden)
        self.attention = nn.Linear(hidden, 1)
        self.node = mlp(nodes + hidden, hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        reader, read = edge_index[0], edge_index[1]
        edges = self.edge(torch.cat([nodes[..., reader, :], nodes[..., read, :], edges], -1)).relu()
        share = edge_softmax(self.attention(edges).squeeze(-1), edge_index, nodes.shape[-2])
        message = share.unsqueeze(-1) * edges
        heard = message.new_zeros((*nodes.shape[:-1], message.shape[-1])).index_add(-2, reader, message)
        return self.node(torch.cat([nodes, heard], -1)).relu(), edges


class ConvergentGraphSolver(nn.Module):
    r"""A graph network whose hidden state is the equilibrium of contracting maps that it makes from its input.

    .. math:: H^{(m)} = \varphi\big(\kappa A^{(m)}_\theta(x) H^{(m)} + B^{(m)}_\theta(x)\big),  \qquad
        y = \mathrm{decoder}(H^{(1)}, \dots)

    Every node hears from every other that it can reach, with the parameters of a few message-passing rounds.

    Args:
        node_features: Features of a node.
        edge_features: Features of an edge.
        out_features: Outputs for each node.
        hidden: Width of encoder and decoder.
        heads: Number of equilibria.
        head_features: State of a node in each head.
        rounds: Rounds of message passing in the encoder, at least 1.
        kappa: Contraction factor in (0, 1); the reach of the equilibrium is about 1 / (1 - kappa) edges.
        learn_kappa: Learn one factor for each head, starting from `kappa`.
        edge_weights: :func:`edge_sigmoid` or :func:`edge_softmax`, or any function that makes weights contract.
        activation: Nonexpansive function :math:`\varphi` without parameters, or None for a linear equilibrium.
        solver: As in :func:`graph_equilibrium`.
        on_failure: As in :func:`graph_equilibrium`.

    Shape:
        Nodes ``(*batch, N, node_features)``, edges ``(*batch, E, edge_features)``, edge index ``(2, E)`` with the node
        that reads in the first row; output ``(*batch, N, out_features)``. Graphs of different sizes go side by side in
        one graph, see :func:`disjoint_union`.

    Differentiable in node and edge features and in the parameters, to any order (encoder and decoder are piecewise
    linear in places, by their ReLU).

    Example:
        >>> import torch
        >>> from difflayers.equilibrium import ConvergentGraphSolver
        >>> model = ConvergentGraphSolver(3, 2, 1, heads=4)
        >>> edge_index = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> model(torch.randn(4, 3), torch.randn(4, 2), edge_index).shape
        torch.Size([4, 1])

    Source: J. Park, J. Choo, J. Park, Convergent Graph Solvers, ICLR 2022.

    Departure: see :func:`graph_equilibrium` and :func:`edge_sigmoid`; kappa may be learned.
    """

    def __init__(
        self,
        node_features: int,
        edge_features: int,
        out_features: int,
        *,
        hidden: int = 64,
        heads: int = 16,
        head_features: int = 1,
        rounds: int = 1,
        kappa: float = 0.5,
        learn_kappa: bool = False,
        edge_weights: EdgeWeights = edge_sigmoid,
        activation: Activation | None = None,
        solver: LinearSolver | IterativeSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        sizes = {"hidden": hidden, "heads": heads, "head_features": head_features, "rounds": rounds}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < kappa < 1:
            raise ValueError(f"kappa: expected a number in (0, 1), got {kappa}")
        check_policy(on_failure)
        self.node_features, self.edge_features = node_features, edge_features
        self.heads, self.kappa = heads, kappa
        self.edge_weights, self.activation, self.solver = edge_weights, activation, solver
        self.on_failure: OnFailure = on_failure
        widths = [(node_features, edge_features), *[(hidden, hidden)] * (rounds - 1)]
        self.encoder = nn.ModuleList(_Messages(nodes, edges, hidden) for nodes, edges in widths)
        self.edge_head = nn.Linear(hidden, heads)
        self.node_head = nn.Linear(hidden, heads * head_features)
        self.decoder = mlp(heads * head_features, hidden, out_features)
        logit = torch.logit(self.edge_head.bias.detach().new_full((heads,), kappa))
        self.kappa_logit = nn.Parameter(logit) if learn_kappa else None

    def extra_repr(self) -> str:
        """The options that are not seen in the submodules."""
        name = getattr(self.activation, "__name__", repr(self.activation))
        return (
            f"heads={self.heads}, kappa={self.kappa}, learn_kappa={self.kappa_logit is not None}, "
            f"edge_weights={getattr(self.edge_weights, '__name__', self.edge_weights)}, activation={name}, "
            f"solver={self.solver}, on_failure={self.on_failure!r}"
        )

    def forward(self, nodes: Tensor, edges: Tensor, edge_index: Tensor) -> Tensor:
        """The outputs for every node."""
        check_tensor("nodes", nodes, min_ndim=2)
        check_tensor("edges", edges, min_ndim=2)
        check_shape("nodes", nodes.shape[-1:], (self.node_features,), " in the last dimension")
        check_shape("edges", edges.shape[-1:], (self.edge_features,), " in the last dimension")
        _check_edges(edge_index, nodes.shape[-2], edges[..., 0], data=self.on_failure != "ignore")
        for messages in self.encoder:
            nodes, edges = messages(nodes, edges, edge_index)
        weights = self.edge_weights(self.edge_head(edges).movedim(-1, 0), edge_index, nodes.shape[-2])
        B = self.node_head(nodes).unflatten(-1, (self.heads, -1)).movedim(-2, 0)
        kappa: float | Tensor = self.kappa
        if self.kappa_logit is not None:
            kappa = torch.sigmoid(self.kappa_logit).reshape(self.heads, *[1] * (nodes.ndim - 2))
        H = self.equilibrium(weights, edge_index, B, kappa)
        return self.decoder(H.movedim(0, -2).flatten(-2))

    def equilibrium(self, edge_weights: Tensor, edge_index: Tensor, B: Tensor, kappa: float | Tensor) -> Tensor:
        """The hidden state ``(heads, *batch, N, head_features)``; a place to override."""
        return graph_equilibrium(
            edge_weights,
            edge_index,
            B,
            kappa,
            activation=self.activation,
            solver=self.solver,
            on_failure=self.on_failure,
        )
