r"""Predictive sparse decomposition: a fast encoder that learns to predict exact sparse codes.

.. math:: \min_z \|y - Bz\|^2 + \lambda\|z\|_1 + \alpha\|z - F(y)\|^2, \qquad F(y) = g \tanh(W y + d)

(no halves, as in the paper). The code layer is exact and differentiable; the encoder is what runs at test time.
K. Kavukcuoglu, M. Ranzato, Y. LeCun, Fast inference in sparse coding algorithms with applications to object
recognition, 2008, equations 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import envelope
from difflayers.linalg._system import times

from ._lasso import lasso
from ._lasso_solver import FISTA
from ._sparse_coding import check_sizes, unit_atoms


class PredictiveSparseDecomposition(nn.Module):
    r"""A dictionary and an encoder that are trained to agree.

    Args:
        n_features: Numbers in a signal.
        n_atoms: Numbers in a code.
        penalty: :math:`\lambda`, above 0.
        consistency: :math:`\alpha`, above 0: how strongly codes are drawn to the encoder's prediction.
        solver: :class:`FISTA`, as in :func:`lasso`.
        on_failure: As in :func:`lasso`.
        device: Of the parameters; None: torch's default.
        dtype: Of the parameters; None: torch's default.

    Shape:
        Signals ``(*batch, n_features)``, codes ``(*batch, n_atoms)``. Calling the module gives the prediction, which
        takes one product; :meth:`codes` gives the exact minimiser.

    Train with ``objective(signals).mean()``: its gradient in dictionary and encoder is that at fixed codes, without a
    linear solve. :meth:`codes` is differentiable in everything, to any order, for losses on the codes themselves.

    Example:
        >>> import torch
        >>> from difflayers.proximal import PredictiveSparseDecomposition
        >>> model = PredictiveSparseDecomposition(16, 32, penalty=0.2)
        >>> signals = torch.randn(5, 16)
        >>> model(signals).shape, model.codes(signals).shape, model.objective(signals).shape
        (torch.Size([5, 32]), torch.Size([5, 32]), torch.Size([5]))

    Source: K. Kavukcuoglu, M. Ranzato, Y. LeCun, Fast inference in sparse coding algorithms, 2008, equations 3 and 4.

    Departure: codes are exact instead of a few descent steps from the prediction, and unit atoms are a
    parametrisation instead of a projection after every step.
    """

    def __init__(
        self,
        n_features: int,
        n_atoms: int,
        penalty: float = 0.1,
        consistency: float = 1.0,
        *,
        solver: FISTA | None = None,
        on_failure: OnFailure = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_features=n_features, n_atoms=n_atoms)
        for name, value in (("penalty", penalty), ("consistency", consistency)):
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        check_policy(on_failure)
        self.penalty, self.consistency, self.solver = penalty, consistency, solver
        self.on_failure: OnFailure = on_failure
        self.weight = nn.Parameter(unit_atoms(torch.randn(n_features, n_atoms, device=device, dtype=dtype)))
        self.encoder = nn.Linear(n_features, n_atoms, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.ones_like(self.encoder.bias))

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"penalty={self.penalty}, consistency={self.consistency}, solver={self.solver}, "
            f"on_failure={self.on_failure!r}"
        )

    @property
    def dictionary(self) -> Tensor:
        """``(n_features, n_atoms)`` with columns of length one."""
        return unit_atoms(self.weight)

    def forward(self, signal: Tensor) -> Tensor:
        """The predicted codes."""
        return self.gain * torch.tanh(self.encoder(signal))

    def codes(self, signal: Tensor) -> Tensor:
        """The codes that minimise the objective."""
        return self._codes(signal, self(signal))

    def _codes(self, signal: Tensor, predicted: Tensor) -> Tensor:
        return lasso(  # half the objective
            self.dictionary,
            signal,
            self.penalty / 2,
            ridge=self.consistency,
            center=predicted,
            solver=self.solver,
            on_failure=self.on_failure,
        )

    def reconstruct(self, codes: Tensor) -> Tensor:
        """The signals that codes stand for."""
        return times(self.dictionary, codes)

    def objective(self, signal: Tensor) -> Tensor:
        """``(*batch)`` what the codes minimise, at the codes."""
        predicted = self(signal)
        weights = self.gain.detach().new_tensor([self.penalty, self.consistency])
        args = (self.dictionary, signal, predicted, weights)
        return envelope(_energy, self._codes(signal, predicted), args)


def _energy(z: Tensor, B: Tensor, y: Tensor, predicted: Tensor, weights: Tensor) -> Tensor:
    fit, miss = (times(B, z) - y).square().sum(-1), (z - predicted).square().sum(-1)
    return fit + weights[0] * z.abs().sum(-1) + weights[1] * miss
