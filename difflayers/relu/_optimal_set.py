r"""All optimal networks of a training problem: a polytope.

The fit f and the slopes :math:`q_i` of ``_one_network.py`` are the same for all of them, so an optimal network is
:math:`p_i = a_i h_i` with :math:`h_i = q_i / \|q_i\|` and

.. math:: a \ge 0, \qquad \sum_i a_i\, \sigma_i Z_i h_i = f, \qquad a_i = 0 \text{ unless } \|q_i\| = \beta .

The sum of a is the penalty over beta, the same everywhere in the set. A. Mishkin, M. Pilanci, Optimal Sets and Solution
Paths of ReLU Networks, 2023, theorem 3.4 and proposition 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from difflayers._checks import check_shape, check_tensor

from ._losses import Loss
from ._one_network import OneNetwork
from ._polytope import Polytope
from ._relu_solution import ConvexReLUSolution

Rule = Literal["least_squares", "least_sum", "largest_sum", "least_maximum"]
NOT_OPTIMAL = 1e-3


def optimal_set(
    solution: ConvexReLUSolution,
    X: Tensor,
    y: Tensor,
    beta: float | Tensor,
    *,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    slack: float | None = None,
) -> OptimalSet:
    """All networks over the gates of a solution that are as good as it.

    They fit the training data alike and have the same penalty, but differ elsewhere. Neurons that are zero in the
    solution belong to the set where the slope of the loss in them is as long as beta; so do gates with equal patterns.

    Args:
        solution: Optimal, of :func:`convex_gated_relu` or :func:`convex_relu`; without batch dimensions.
        X: ``(n, d)`` data that it was trained on.
        y: ``(n)`` labels.
        beta: Weight decay, a number.
        sample_weight: ``(n)`` weights, or None. The fit on samples of weight 0 is free.
        loss: Smooth loss, or None for :class:`Squared`. Where it has straight parts, as :class:`Huber`, the set is that
            of optimal networks with the same fit.
        slack: Neurons whose slope is within this share of beta belong to the set, in [0, 1). None: 1e-7 (float32:
            1e-4), or what the solution's accuracy asks for. A larger one, such as 0.01, gives the networks of the same
            fit and these directions; their penalty is at most ``1 / (1 - slack)`` of the least.

    Returns:
        An :class:`OptimalSet`.

    Raises:
        ValueError: For a solution that is not optimal for this problem or has batch dimensions, a loss with kinks, or
            a wrong shape or dtype.

    Not differentiable: where the optimum is not unique it has no derivative.

    Example:
        >>> import torch
        >>> from difflayers.relu import convex_gated_relu, optimal_set, predict
        >>> X, y = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([1.0, 2.0])
        >>> gates = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # equal on the data, different at -1/2
        >>> networks = optimal_set(convex_gated_relu(X, y, 0.1, gates), X, y, 0.1)
        >>> networks.dimension
        1
        >>> ends = networks.extreme_points(8, generator=torch.Generator().manual_seed(0))
        >>> sorted(float(predict(end, torch.tensor([[-0.5, 1.0]]))) != 0 for end in ends)
        [False, True]

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, theorem 3.4.

    Departure: cone multipliers are not asked for. The q of a cell is the projection of the slope onto it, which is the
    same for all of them.
    """
    if slack is not None and not 0 <= slack < 1:
        raise ValueError(f"slack: expected None or a number in [0, 1), got {slack}")
    network = OneNetwork.of(solution, X, y, beta, sample_weight, loss, trained=False)
    size = float(network.beta)
    narrow = solution.v.dtype != torch.float64
    least = max(slack or 0.0, 1e-4 if narrow else 1e-7)
    q = network.into_cells(network.pull(network.p), (1 - max(least, NOT_OPTIMAL)) * size)
    length, active = torch.linalg.vector_norm(q, dim=-1), network.active
    norm = torch.linalg.vector_norm(network.p, dim=-1)
    wrong = torch.where(active, torch.linalg.vector_norm(q * norm.unsqueeze(-1) - size * network.p, dim=-1), 0)
    wrong = torch.where(active, wrong / (size * torch.where(active, norm, 1)), length / size - 1).clamp_min(0)
    error = float(wrong.amax())
    # neurons rounded to single precision miss the optimum by what rounding makes of the fit, over beta
    bends = network.s * network.loss.largest_curvature(network.y) * network.fit(network.p).abs()
    moved = float((bends * torch.linalg.vector_norm(network.X, dim=-1)).sum())
    rounding = torch.finfo(solution.v.dtype).eps * moved / size
    if not error <= max(NOT_OPTIMAL, rounding):
        raise ValueError(
            f"solution: expected an optimal network of this problem, got one that violates optimality by {error:.1e} "
            f"of beta; pass the data, weights, loss and beta it was trained with"
        )
    if slack is None:
        least = max(least, 10 * error)
    blocks = (active | (length >= (1 - least) * size)).nonzero().squeeze(-1)
    return OptimalSet(network, blocks, q[blocks] / length[blocks].unsqueeze(-1), error)


@dataclass(frozen=True, eq=False)
class OptimalSet:
    """The optimal networks of a training problem, made by :func:`optimal_set`.

    Networks are :class:`ConvexReLUSolution`, as of a solver, with the objective and gap of their own.

    Attributes:
        blocks: ``(m)`` the neurons that may be active, as indices: of a gate, or P plus that of a gate for those of
            negative output.
        directions: ``(m, d)`` the direction of each, of length one.
    """

    _network: OneNetwork
    blocks: Tensor
    directions: Tensor
    _error: float

    def __repr__(self) -> str:
        """Sizes."""
        return f"OptimalSet(neurons={len(self.blocks)}, dimension={self.dimension})"

    @cached_property
    def _columns(self) -> Tensor:
        return self._network.columns(self.directions, self.blocks)

    @cached_property
    def _polytope(self) -> Polytope:
        counts = self._network.s > 0
        eps = torch.finfo(self._network.solution.v.dtype).eps
        return Polytope(self._columns[counts], self.amounts, max(eps**0.6, 10 * self._error))

    @cached_property
    def amounts(self) -> Tensor:
        """``(m)``: the norms of these neurons in the given solution."""
        return torch.linalg.vector_norm(self._network.p[self.blocks], dim=-1)

    @property
    def dimension(self) -> int:
        """That of the polytope; 0 where the network is unique."""
        return self._polytope.dimension if len(self.blocks) else 0

    @property
    def is_unique(self) -> bool:
        """Whether the given solution is the only optimal network over its gates.

        Of a ReLU network that may be so of the neurons while the function is unique: one that lies on a border between
        cells is in both of them.
        """
        return self.dimension == 0

    def network(self, amounts: Tensor) -> ConvexReLUSolution:
        """The network with neurons ``amounts[i] * directions[i]``.

        Args:
            amounts: ``(m)``, at least 0. Whether it is a member of the set is seen by its objective.
        """
        check_shape("amounts", tuple(check_tensor("amounts", amounts).shape), tuple(self.blocks.shape))
        p = torch.zeros_like(self._network.p)
        p[self.blocks] = amounts.detach().to(p).unsqueeze(-1) * self.directions
        return self._network.report(p)

    def center(self) -> ConvexReLUSolution:
        """The analytic center: every neuron is active that is so in any optimal network."""
        return self.network(self._polytope.centre if len(self.blocks) else self.amounts)

    def minimum_norm(self) -> ConvexReLUSolution:
        """The network with the least ``sum_i ||p_i||^2``; it is unique."""
        eye = torch.eye(len(self.blocks), dtype=torch.float64, device="cpu")
        return self.network(self._polytope.nearest(eye, torch.zeros_like(self.amounts)))

    def extreme_points(self, count: int, *, generator: torch.Generator | None = None) -> list[ConvexReLUSolution]:
        """Corners of the set, each the optimum of a random linear objective.

        A corner is a minimal network: none of its neurons can be dropped by scaling the others.

        Args:
            count: Objectives drawn, at least 1.
            generator: Source of randomness, on the CPU.

        Returns:
            At most `count` networks, all different.
        """
        _at_least_one("count", count)
        corners: list[Tensor] = []
        for _ in range(count):
            cost = torch.randn(len(self.blocks), dtype=torch.float64, device="cpu", generator=generator)
            corner = self._polytope.corner(cost)
            if not any(torch.allclose(corner, other, rtol=0, atol=1e-6 * self._polytope.scale) for other in corners):
                corners.append(corner)
        return [self.network(corner) for corner in corners]

    def sample(
        self, count: int, *, generator: torch.Generator | None = None, steps: int = 200
    ) -> list[ConvexReLUSolution]:
        """Random members, by hit and run from the center.

        Args:
            count: Networks wanted, at least 1, each the end of its own chain.
            generator: Source of randomness, on the CPU.
            steps: Of a chain, at least 1. The law tends to the uniform one on the polytope of amounts.
        """
        _at_least_one("count", count)
        _at_least_one("steps", steps)

        def draw(rows: int, k: int) -> tuple[Tensor, Tensor]:
            options = {"dtype": torch.float64, "device": "cpu", "generator": generator}
            return torch.randn((rows, k), **options), torch.rand(rows, **options)  # type: ignore[call-overload]

        return [self.network(a) for a in self._polytope.random(count, steps, draw)]

    def select(self, rule: Rule) -> ConvexReLUSolution:
        """The network that is best by a rule about its contributions ``c_i = ||Z_i p_i||`` to the fit.

        Args:
            rule: ``"least_squares"``, ``"least_sum"``, ``"largest_sum"`` or ``"least_maximum"`` of c.

        Raises:
            ValueError: For another rule.

        Departure: the paper's c are factors on the neurons of one solution, which leaves out those that are zero
        there. The sum of norms of neurons is the same for all optimal networks and would select nothing.
        """
        if rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
        weights = torch.linalg.vector_norm(self._columns[self._network.s > 0], dim=0)
        polytope = self._polytope
        if rule == "least_squares":
            return self.network(polytope.nearest(weights.diag(), torch.zeros_like(weights)))
        if rule == "least_maximum":
            return self.network(polytope.flattest(weights))
        return self.network(polytope.corner(weights if rule == "least_sum" else -weights))

    def best_on(self, X: Tensor, y: Tensor, *, sample_weight: Tensor | None = None) -> ConvexReLUSolution:
        """The network with the least squared error on other data: what validation can still choose.

        Args:
            X: ``(m, d)`` points.
            y: ``(m)`` labels.
            sample_weight: ``(m)`` weights of at least 0, or None.

        Returns:
            The one of least norm, if there are several.
        """
        network = self._network
        check_tensor("X", X, min_ndim=2)
        check_shape("X", (X.ndim, X.shape[-1]), (2, network.X.shape[1]), " for its dimensions and columns")
        check_shape("y", tuple(check_tensor("y", y).shape), (len(X),))
        X, y = X.detach().to(network.X), y.detach().to(network.X)
        heights = X @ self.directions.mT
        if network.constrained:
            heights = heights.relu()
        else:
            vectors = network.solution.gates.vectors.detach().to(network.X)
            heights = torch.where(X @ vectors[self.blocks].mT >= 0, heights, 0)
        heights = heights * network.signs[self.blocks]
        if sample_weight is not None:
            check_shape("sample_weight", tuple(check_tensor("sample_weight", sample_weight).shape), (len(X),))
            root = sample_weight.detach().to(y).clamp_min(0).sqrt()
            heights, y = heights * root.unsqueeze(-1), y * root
        return self.network(self._polytope.nearest(heights, y))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
