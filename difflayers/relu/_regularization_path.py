r"""Trained networks along weight decay, from the zero network on.

Between two values :math:`\beta > \beta'` slopes mostly change by less than :math:`\beta - \beta'`, so gates with
:math:`\|Z_i^T \nu\| < 2 \beta' - \beta` at the last network are left out (the strong rule of R. Tibshirani et al.,
Strong rules for discarding predictors in Lasso-type problems, 2012). What is found is checked on all gates, and gates
that were left out wrongly come back, so the networks are those of all gates. The rule leaves out much on fine grids,
and nothing where beta is halved. A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023,
section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_tensor

from ._convex_relu import ConeMethod, convex_relu
from ._gated_relu import convex_gated_relu
from ._gated_solver import FISTA
from ._gated_task import lengths
from ._gates import Gates
from ._losses import Loss
from ._one_network import OneNetwork, nearest_in_cell
from ._relu_solution import ConvexReLUSolution
from ._training_call import checked_call

EXCEEDS = 1e-8  # of beta: slopes of gates left out that are longer bring them back


class PathPoint(NamedTuple):
    """One network of a path.

    Attributes:
        beta: Its weight decay.
        solution: The network, over all gates.
        penalty: The sum of the norms of its neurons: the slope of the optimal value in beta.
        neurons: How many are active.
        gates: How many gates the solver saw after screening.
    """

    beta: Tensor
    solution: ConvexReLUSolution
    penalty: Tensor
    neurons: int
    gates: int


class RegularizationPath(NamedTuple):
    """A whole path, from the largest beta to the smallest.

    Attributes:
        betas: ``(k)``.
        objective: ``(k)`` optimal values: concave and not decreasing in beta.
        penalty: ``(k)`` sums of norms of neurons, the derivative of the optimal value in beta.
        neurons: ``(k)`` integers, how many are active.
        solutions: The networks.
    """

    betas: Tensor
    objective: Tensor
    penalty: Tensor
    neurons: Tensor
    solutions: tuple[ConvexReLUSolution, ...]

    @staticmethod
    def of(points: Iterable[PathPoint]) -> RegularizationPath:
        """Of points as :func:`follow_path` yields them, at least one."""
        several = list(points)
        if not several:
            raise ValueError("points: expected at least one, got none")
        betas = torch.stack([p.beta for p in several])
        neurons = torch.tensor([p.neurons for p in several], device=betas.device)
        objective = torch.stack([p.solution.objective for p in several])
        penalty = torch.stack([p.penalty for p in several])
        return RegularizationPath(betas, objective, penalty, neurons, tuple(p.solution for p in several))


def regularization_path(
    X: Tensor,
    y: Tensor,
    betas: Tensor | Iterable[float] | None = None,
    *,
    gates: Gates | Tensor,
    gated: bool = True,
    n_betas: int = 30,
    smallest: float = 1e-3,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | ConeMethod | None = None,
    screening: bool = True,
) -> RegularizationPath:
    """Optimal networks for many values of weight decay.

    Solves :func:`convex_gated_relu` or :func:`convex_relu` for each, from the largest to the smallest, warm started,
    over the gates that may be active.

    Args:
        X: ``(n, d)`` training data.
        y: ``(n)`` labels.
        betas: ``(k)`` numbers more than 0, in any order. None: a geometric grid from the beta at which the network
            becomes zero down to a share of it.
        gates: :class:`Gates`, or their vectors ``(P, d)``.
        gated: Whether the networks are gated; False: ReLU networks.
        n_betas: Length of the geometric grid, at least 2.
        smallest: Its last entry relative to the first, in (0, 1).
        sample_weight: ``(n)`` weights, or None.
        loss: Loss, or None for :class:`Squared`.
        solver: As for the function that solves.
        screening: Leave out gates that will hardly be active. The networks are the same, sooner.

    Returns:
        A :class:`RegularizationPath`. :func:`follow_path` gives the networks one by one instead.

    Raises:
        ValueError: For a beta that is not positive, a wrong grid, batch dimensions, a wrong shape or dtype.

    Differentiable as the networks are: each is the layer's result, with gates held. A grid of its own is a constant.

    Example:
        >>> import torch
        >>> from difflayers.relu import enumerate_gates, regularization_path
        >>> X = torch.tensor([[-2.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> path = regularization_path(X, torch.tensor([2.0, 1.0, 1.0, 2.0]), gates=enumerate_gates(X), n_betas=4)
        >>> path.neurons.tolist()[0], bool((path.objective.diff() < 0).all())
        (0, True)

    Source: A. Mishkin, M. Pilanci, Optimal Sets and Solution Paths of ReLU Networks, 2023, section 4.
    """
    return RegularizationPath.of(
        follow_path(
            X,
            y,
            betas,
            gates=gates,
            gated=gated,
            n_betas=n_betas,
            smallest=smallest,
            sample_weight=sample_weight,
            loss=loss,
            solver=solver,
            screening=screening,
        )
    )


def follow_path(
    X: Tensor,
    y: Tensor,
    betas: Tensor | Iterable[float] | None = None,
    *,
    gates: Gates | Tensor,
    gated: bool = True,
    n_betas: int = 30,
    smallest: float = 1e-3,
    sample_weight: Tensor | None = None,
    loss: Loss | None = None,
    solver: FISTA | ConeMethod | None = None,
    screening: bool = True,
    start: PathPoint | None = None,
) -> Iterator[PathPoint]:
    """As :func:`regularization_path`, one network after the other: what was found before an interruption is kept.

    Args:
        X: Training data.
        y: Labels.
        betas: Values of weight decay, or None.
        gates: Gates.
        gated: Whether the networks are gated.
        n_betas: Length of a grid of its own.
        smallest: Its last entry relative to the first.
        sample_weight: Weights of the samples, or None.
        loss: Loss, or None.
        solver: As for the function that solves.
        screening: Leave out gates that will hardly be active.
        start: The last point of an interrupted path, to go on from: betas from its own on are not solved again.

    Yields:
        A :class:`PathPoint` for every beta, from the largest to the smallest.
    """
    path = _Path(X, y, gates, gated, sample_weight, loss, solver, screening)
    grid = path.grid(betas, n_betas, smallest)
    if start is not None:
        grid = grid[grid < start.beta.detach()]
    return path.points(grid, start)


class _Path:
    """The arguments that all points share."""

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        gates: Gates | Tensor,
        gated: bool,
        sample_weight: Tensor | None,
        loss: Loss | None,
        solver: FISTA | ConeMethod | None,
        screening: bool,
    ) -> None:
        call = checked_call(X, y, 1.0, gates, sample_weight, loss)
        vectors = gates.vectors if isinstance(gates, Gates) else gates
        ndims = {"X": (X, 2), "y": (y, 1), "gates": (vectors, 2), "sample_weight": (sample_weight, 1)}
        for name, (t, ndim) in ndims.items():
            if t is not None and t.ndim != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(t.shape)}; pick one problem")
        if screening and not call.loss.smooth:
            raise ValueError(f"screening: expected False for {call.loss!r}, whose slopes the fit does not determine")
        if solver is not None and isinstance(solver, FISTA) != gated:
            raise ValueError(f"solver: expected one of {'gated' if gated else 'ReLU'} networks, got {solver!r}")
        self.X, self.y, self.vectors, self.patterns = X, y, vectors.detach(), call.args[4]
        self.weight, self.loss, self.solver, self.gated, self.screening = sample_weight, loss, solver, gated, screening

    def grid(self, betas: Tensor | Iterable[float] | None, n_betas: int, smallest: float) -> Tensor:
        """Falling."""
        if betas is None:
            if n_betas < 2:
                raise ValueError(f"n_betas: expected at least 2, got {n_betas}")
            if not 0 < smallest < 1:
                raise ValueError(f"smallest: expected a number in (0, 1), got {smallest}")
            top = self.largest()
            steps = torch.arange(n_betas, dtype=torch.float64, device="cpu") / (n_betas - 1)
            return (top * torch.exp(steps * math.log(smallest))).to(self.y.detach())
        grid = betas if isinstance(betas, Tensor) else torch.tensor(list(betas), dtype=self.y.dtype, device="cpu")
        grid = check_tensor("betas", grid)
        if grid.ndim != 1 or not len(grid) or not bool((grid > 0).all()):
            raise ValueError(f"betas: expected numbers more than 0 of shape (k), got {grid.tolist()}")
        return grid.to(self.y.device).sort(descending=True).values

    def largest(self) -> float:
        """The beta from which on the network is zero; 1 where it is always zero."""
        zero = self.zero()
        network = OneNetwork.of(
            zero, self.X.detach(), self.y.detach(), 1.0, self.weight, self.loss, smooth=False, trained=False
        )
        pull = network.pull(network.p)
        norms = torch.linalg.vector_norm(pull, dim=-1)
        if self.gated:
            return float(norms.amax()) or 1.0
        best = 0.0
        for i in norms.argsort(descending=True).tolist():
            if float(norms[i]) <= best:  # a projection is no longer than what is projected
                break
            point, _ = nearest_in_cell(pull[i], network.X, network.M[:, network.gates[i]])
            best = max(best, float(torch.linalg.vector_norm(point)))
        return best or 1.0

    def zero(self) -> ConvexReLUSolution:
        """The zero network."""
        v = torch.zeros_like(self.vectors, dtype=self.y.dtype)
        nothing = v.new_zeros(())
        gates = Gates(self.vectors, self.patterns)
        return ConvexReLUSolution(v, None if self.gated else v, nothing, nothing, gates)

    def points(self, grid: Tensor, start: PathPoint | None) -> Iterator[PathPoint]:
        """Solves."""
        solution = self.zero() if start is None else start.solution
        before = grid.new_tensor(self.largest()) if start is None else start.beta.detach()
        for beta in grid:
            kept = self.strong(solution, beta, before)
            while True:
                solution = self.solve(solution, beta, kept)
                missed, excess = self.missed(solution, beta, kept)
                if not bool(missed.any()):
                    break
                kept = kept | missed
            # of the dual point that the gap comes from the share 1 / (1 + excess) is feasible for all gates
            solution = solution._replace(gap=solution.gap + excess * (solution.objective.detach() - solution.gap))
            before = beta
            both = solution.v if solution.w is None else torch.cat([solution.v, solution.w])
            neurons = int((both.detach() != 0).any(-1).sum())
            yield PathPoint(beta, solution, lengths(both).sum(-1), neurons, int(kept.sum()))

    def norms(self, solution: ConvexReLUSolution, beta: Tensor) -> tuple[OneNetwork, Tensor, Tensor]:
        """The network, the slopes of its blocks and their lengths."""
        data = self.X.detach(), self.y.detach(), beta.detach(), self.weight, self.loss
        network = OneNetwork.of(solution, *data, trained=False)
        pull = network.pull(network.p)
        return network, pull, torch.linalg.vector_norm(pull, dim=-1)

    def strong(self, solution: ConvexReLUSolution, beta: Tensor, before: Tensor) -> Tensor:
        """``(P)``: gates that may be active at `beta`."""
        if not self.screening:
            return torch.ones(len(self.vectors), dtype=torch.bool, device=self.vectors.device)
        network, _, norms = self.norms(solution, before)
        blocks = network.active | (norms >= float(2 * beta - torch.maximum(before, beta)))
        kept = self.by_gate(blocks)
        if not bool(kept.any()):  # a solver wants at least one
            kept[int(norms.argmax()) % len(kept)] = True
        return kept.to(self.vectors.device)

    def by_gate(self, blocks: Tensor) -> Tensor:
        """Whether a gate has any of the blocks."""
        return blocks.view(-1, len(self.vectors)).any(0)

    def missed(self, solution: ConvexReLUSolution, beta: Tensor, kept: Tensor) -> tuple[Tensor, float]:
        """``(P)``: gates left out that have to be there, and by how much slopes of the others exceed beta, at most."""
        if bool(kept.all()):
            return torch.zeros_like(kept), 0.0
        network, pull, norms = self.norms(solution, beta)
        size, out = float(beta), ~kept.to(norms.device)[network.gates]
        excess = torch.where(out, norms / size - 1, 0).clamp_min(0)
        for i in excess.nonzero().squeeze(-1).tolist() if network.constrained else ():
            point, _ = nearest_in_cell(pull[i], network.X, network.M[:, network.gates[i]])
            excess[i] = (torch.linalg.vector_norm(point) / size - 1).clamp_min(0)
        missed = excess > max(EXCEEDS, 100 * torch.finfo(self.y.dtype).eps)
        return self.by_gate(missed).to(kept.device), float(torch.where(missed, 0, excess).amax())

    def solve(self, earlier: ConvexReLUSolution, beta: Tensor, kept: Tensor) -> ConvexReLUSolution:
        """Over some gates, told as a solution over all."""
        at = kept.nonzero().squeeze(-1)
        w = None if earlier.w is None else earlier.w.detach()[at]
        warm = earlier._replace(v=earlier.v.detach()[at], w=w)
        X, y, vectors, weight, loss, solver = self.X, self.y, self.vectors[at], self.weight, self.loss, self.solver
        if isinstance(solver, FISTA) or (solver is None and self.gated):
            found = convex_gated_relu(
                X, y, beta, vectors, sample_weight=weight, loss=loss, solver=solver, warm_start=warm
            )
        else:
            found = convex_relu(X, y, beta, vectors, sample_weight=weight, loss=loss, solver=solver, warm_start=warm)

        def everywhere(some: Tensor) -> Tensor:
            return torch.zeros_like(self.vectors, dtype=some.dtype).index_copy(0, at, some)

        w = None if found.w is None else everywhere(found.w)
        gates = Gates(self.vectors, self.patterns)
        return found._replace(v=everywhere(found.v), w=w, gates=gates)
