r"""One trained network beside its training problem: what questions about a solution begin with.

Neurons of positive output and, of a ReLU network, those of negative output behind them form one list of blocks p with
signs :math:`\sigma`. With :math:`\nu = -s \circ l'(f, y)` at its fit f, a network is optimal if every block has

.. math:: q_i = \Pi_i(\sigma_i Z_i^T \nu), \qquad \|q_i\| \le \beta, \qquad p_i = \tfrac{\|p_i\|}{\beta}\, q_i ,

where :math:`\Pi_i` is the identity for a gated network and, for a ReLU network, the projection onto the cell of the
pattern: it adds :math:`K_i^T \rho_i` with the multipliers :math:`\rho_i \ge 0` that make the sum shortest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._checks import check_shape, check_tensor

from ._gated_task import lengths
from ._losses import Loss
from ._relu_solution import ConvexReLUSolution
from ._training_call import checked_call


@dataclass(frozen=True, eq=False)
class OneNetwork:
    """A network and its problem without batch dimensions, on the CPU in double precision, without derivatives.

    Attributes:
        solution: The network as it was given.
        X: ``(n, d)``.
        y: ``(n)``.
        s: ``(n)``.
        beta: A number.
        M: ``(n, P)`` patterns, zeros and ones.
        loss: Loss of one prediction, smooth.
        p: ``(B, d)`` blocks: P of them, or 2 P of a ReLU network.
        signs: ``(B)`` of their output.
        gates: ``(B)`` which pattern each has.
    """

    solution: ConvexReLUSolution
    X: Tensor
    y: Tensor
    s: Tensor
    beta: Tensor
    M: Tensor
    loss: Loss
    p: Tensor
    signs: Tensor
    gates: Tensor

    @staticmethod
    def of(
        solution: ConvexReLUSolution,
        X: Tensor,
        y: Tensor,
        beta: float | Tensor,
        weight: Tensor | None,
        loss: Loss | None,
        *,
        smooth: bool = True,
        trained: bool = True,
    ) -> OneNetwork:
        """Checks the arguments; refuses a loss with kinks if `smooth`, and data it was not trained on if `trained`."""
        v, w = check_tensor("solution", solution.v, min_ndim=2), solution.w
        call = checked_call(X, y, beta, solution.gates, weight, loss)
        if smooth and not call.loss.smooth:
            raise ValueError(f"loss: expected a smooth loss, got {call.loss!r}, which has kinks")
        for name, t, ndim in zip(("X", "y", "sample_weight", "beta"), call.args, (2, 1, 1, 0), strict=False):
            if t.ndim != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(t.shape)}; pick one problem")
        if v.ndim != 2:
            raise ValueError(f"solution: expected one network, got neurons of shape {tuple(v.shape)}; pick an element")
        check_shape("solution", tuple(v.shape), tuple(call.vectors.shape), " as of its gates")
        X, y, s, beta, M = (t.detach().to("cpu", torch.float64) for t in call.args)
        p, gates = v.detach(), torch.arange(len(v), device="cpu")
        signs = torch.ones_like(gates)
        if w is not None:
            p, gates, signs = torch.cat([p, w.detach()]), torch.cat([gates, gates]), torch.cat([signs, -signs])
        p = p.to("cpu", torch.float64)
        if not bool(torch.isfinite(p).all()):
            raise ValueError("solution: expected finite neurons, got NaN or Inf")
        network = OneNetwork(solution, X, y, s, beta, M, call.loss, p, signs.double(), gates)
        if trained:
            network.check_objective()
        return network

    def check_objective(self) -> None:
        """Refuses data, weights or a beta that are not those of the solution: its objective is another there."""
        said, found = self.solution.objective.item(), self.objective(self.p).item()
        if not abs(said - found) <= torch.finfo(self.solution.v.dtype).eps ** 0.4 * max(abs(said), abs(found)):
            raise ValueError(
                f"solution: expected the one of this X, y, beta, sample_weight and loss, where its objective would be "
                f"{found:.6g}, got one of objective {said:.6g}"
            )

    def objective(self, p: Tensor) -> Tensor:
        """What is minimised."""
        data = (self.s * self.loss.value(self.fit(p), self.y)).sum()
        return data + self.beta * lengths(p).sum()

    @property
    def constrained(self) -> bool:
        """Whether neurons keep to their cells."""
        return self.solution.w is not None

    @property
    def active(self) -> Tensor:
        """``(B)``."""
        return (self.p != 0).any(-1)

    def columns(self, p: Tensor, blocks: Tensor) -> Tensor:
        """``(n, b)``: what neurons `p` in some blocks contribute to the predictions."""
        return self.M[:, self.gates[blocks]] * (self.X @ p.mT) * self.signs[blocks]

    def fit(self, p: Tensor) -> Tensor:
        """The predictions of neurons, one a block."""
        return self.columns(p, torch.arange(len(p), device="cpu")).sum(-1)

    def pull(self, p: Tensor) -> Tensor:
        """``(B, d)``: the slopes along which blocks want to grow, the cells left aside."""
        nu = -self.s * self.loss.slope(self.fit(p), self.y)
        return self.signs.unsqueeze(-1) * ((self.M * nu.unsqueeze(-1)).mT @ self.X)[self.gates]

    def into_cells(self, pull: Tensor, least: Tensor | float) -> Tensor:
        """The q of each block: nearest points in the cells, for those longer than `least`; the others as they are."""
        if not self.constrained:
            return pull
        found = pull.clone()
        for i in (torch.linalg.vector_norm(pull, dim=-1) > least).nonzero().squeeze(-1).tolist():
            found[i], _ = nearest_in_cell(pull[i], self.X, self.M[:, self.gates[i]])
        return found

    def report(self, p: Tensor) -> ConvexReLUSolution:
        """Other neurons as a solution: the lower bound on the optimum is that of the solution given."""
        given, half = self.solution, len(self.solution.v)
        p = p.to(given.v)
        v, w = (p, None) if given.w is None else (p[:half], p[half:])
        objective = self.objective(p.to(self.p)).to(given.objective)
        bound = (given.objective - given.gap).detach()
        return ConvexReLUSolution(v, w, objective, (objective - bound).clamp_min(0), given.gates)


def nearest_in_cell(a: Tensor, X: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point to `a` of all u with ``x_k^T u >= 0`` where `on` is 1 and ``<= 0`` where it is 0.

    And independent unit vectors, in rows, that it is perpendicular to: of the data that hold it back.
    """
    from scipy.optimize import nnls

    length, size = torch.linalg.vector_norm(X, dim=-1), torch.linalg.vector_norm(a)
    there = length > 0
    rows = ((2 * on - 1) / torch.where(there, length, 1)).unsqueeze(-1)[there] * X[there]
    if not bool(size > 0) or bool((rows @ a >= 0).all()):
        return a, rows[:0]
    rho, _ = nnls(rows.mT.numpy(), -(a / size).numpy(), maxiter=30 * max(len(rows), 10))
    border = rows[torch.as_tensor(rho > 0, device="cpu")]
    # on the face that was found the projection is linear, and right to rounding
    return a - border.mT @ torch.linalg.lstsq(border.mT, a.unsqueeze(-1), driver="gelsd").solution.squeeze(-1), border
