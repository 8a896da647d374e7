r"""Sparse coding: signals written in few atoms of a dictionary that is learned with them.

.. math:: \min_{D, z} \tfrac12\|y - Dz\|^2 + \lambda\|z\|_1, \qquad \|D_j\| = 1

B. Olshausen, D. Field, Emergence of simple-cell receptive field properties by learning a sparse code for natural
images, 1996.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from difflayers._solution import OnFailure, check_policy
from difflayers.implicit import envelope
from difflayers.linalg._system import times

from ._lasso import lasso
from ._lasso_solver import FISTA


class SparseCoding(nn.Module):
    """A layer that maps signals to their sparse codes in a learned dictionary of unit atoms.

    The atoms are columns of a free weight divided by their lengths, so they have length one at every moment and under
    every optimiser; without that the penalty could be dodged by long atoms and short codes.

    Args:
        n_features: Numbers in a signal.
        n_atoms: Numbers in a code; may exceed `n_features`.
        penalty: Weight of the codes' absolute values, above 0.
        learn_penalty: Learn it, as the exponential of a parameter.
        ridge: At least 0; a small one makes codes unique where atoms depend on each other.
        solver: :class:`FISTA`, as in :func:`lasso`.
        on_failure: As in :func:`lasso`.
        device: Of the parameters; None: torch's default.
        dtype: Of the parameters; None: torch's default.

    Shape:
        Signals ``(*batch, n_features)``, codes ``(*batch, n_atoms)``.

    Differentiable in the signals, the weight and the learned penalty, to any order, by :func:`lasso`. To learn a
    dictionary, minimise ``objective(signals).mean()``: its gradient needs no linear solve. To learn it for another end,
    put a loss on the codes.

    Example:
        >>> import torch
        >>> from difflayers.proximal import SparseCoding
        >>> layer = SparseCoding(64, 128, penalty=0.5)
        >>> codes = layer(torch.randn(10, 64))
        >>> codes.shape, layer.reconstruct(codes).shape
        (torch.Size([10, 128]), torch.Size([10, 64]))

    Source: J. Mairal, F. Bach, J. Ponce, Task-driven dictionary learning, 2012.
    """

    def __init__(
        self,
        n_features: int,
        n_atoms: int,
        penalty: float = 0.1,
        *,
        learn_penalty: bool = False,
        ridge: float = 0.0,
        solver: FISTA | None = None,
        on_failure: OnFailure = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_features=n_features, n_atoms=n_atoms)
        if not penalty > 0:
            raise ValueError(f"penalty: expected more than 0, got {penalty}")
        if not ridge >= 0:
            raise ValueError(f"ridge: expected at least 0, got {ridge}")
        check_policy(on_failure)
        self.n_features, self.n_atoms, self.ridge, self.solver = n_features, n_atoms, ridge, solver
        self.on_failure: OnFailure = on_failure
        self.weight = nn.Parameter(unit_atoms(torch.randn(n_features, n_atoms, device=device, dtype=dtype)))
        self.initial_penalty = penalty
        log = self.weight.detach().new_full((), math.log(penalty))
        self.log_penalty = nn.Parameter(log) if learn_penalty else None

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"{self.n_features}, {self.n_atoms}, penalty={self.initial_penalty}, "
            f"learn_penalty={self.log_penalty is not None}, ridge={self.ridge}, solver={self.solver}, "
            f"on_failure={self.on_failure!r}"
        )

    @property
    def dictionary(self) -> Tensor:
        """``(n_features, n_atoms)`` with columns of length one."""
        return unit_atoms(self.weight)

    @property
    def penalty(self) -> float | Tensor:
        """The penalty, a tensor where it is learned."""
        return self.initial_penalty if self.log_penalty is None else self.log_penalty.exp()

    def forward(self, signal: Tensor) -> Tensor:
        """The codes."""
        return lasso(
            self.dictionary,
            signal,
            self.penalty,
            ridge=self.ridge,
            solver=self.solver,
            on_failure=self.on_failure,
        )

    def reconstruct(self, codes: Tensor) -> Tensor:
        """The signals that codes stand for."""
        return times(self.dictionary, codes)

    def objective(self, signal: Tensor) -> Tensor:
        """``(*batch)`` what the codes minimise, at the codes."""
        ridge = self.weight.detach().new_full((), self.ridge)
        args = (self.dictionary, signal, torch.zeros_like(ridge) + self.penalty, ridge)
        return envelope(_energy, self(signal), args)


def _energy(z: Tensor, D: Tensor, y: Tensor, penalty: Tensor, ridge: Tensor) -> Tensor:
    """What :func:`lasso` minimises."""
    fit, size = (times(D, z) - y).square().sum(-1), z.square().sum(-1)
    return (fit + ridge * size) / 2 + penalty * z.abs().sum(-1)


def unit_atoms(weight: Tensor) -> Tensor:
    """Columns of length one; zero stays zero."""
    length = torch.linalg.vector_norm(weight, dim=-2, keepdim=True)
    return weight / length.clamp_min(torch.finfo(weight.dtype).tiny)


def check_sizes(**sizes: int) -> None:
    """Refuses sizes below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
