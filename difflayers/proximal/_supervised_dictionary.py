r"""Supervised dictionary learning: atoms that reconstruct signals and predict their labels at once.

.. math:: \min_{W, \beta, H, \omega} \frac1N \sum_i \ell(y_i, \beta^T W^T x_i + \omega^T c_i)
    + \frac\xi N \|X - W H\|_F^2

The unknowns enter as :math:`A = W\beta` and :math:`B = W H` alone. So one minimises over the stacked matrix
:math:`[A, B]` of rank at most k, which is convex but for the rank: gradient steps, each followed by a truncated SVD.

J. Lee, H. Lyu, W. Yao, Supervised dictionary learning with auxiliary covariates, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers._checks import check_shape, check_tensor
from difflayers.linalg._system import times

from ._sparse_coding import check_sizes


class SupervisedDictionary(nn.Module):
    r"""A classifier on few features that it learns together with a reconstruction of the signals.

    Args:
        n_features: Numbers in a signal.
        n_atoms: Atoms, at most `n_features`: the rank k.
        n_classes: Classes of the label.
        n_covariates: Further numbers that go to the classifier alone.
        reconstruction: Weight :math:`\xi` of the reconstruction, above 0: large, the atoms are those of principal
            component analysis; small, those of a low-rank classifier.
        device: Of the parameters; None: torch's default.
        dtype: Of the parameters; None: torch's default.

    Shape:
        Signals ``(*batch, n_features)``, covariates ``(*batch, n_covariates)``, logits ``(*batch, n_classes)``. Centre
        and scale the signals beforehand.

    :meth:`fit` finds the parameters; they are ordinary parameters, so that the layer can also be trained further, or
    inside a larger network, by gradients.

    Example:
        >>> import torch
        >>> from difflayers.proximal import SupervisedDictionary
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] + x[:, 1] > 0).long()
        >>> model = SupervisedDictionary(8, 2)
        >>> losses = model.fit(x, labels)
        >>> bool((model(x).argmax(-1) == labels).float().mean() > 0.9), model.encode(x).shape
        (True, torch.Size([100, 2]))

    Source: J. Lee, H. Lyu, W. Yao, Supervised dictionary learning with auxiliary covariates, 2022, algorithm 1 (filter
    form).

    Departure: the blocks are scaled by the number of signals, so that one step length suits both; a constant step that
    makes the objective fall at every step.
    """

    dictionary: Tensor

    def __init__(
        self,
        n_features: int,
        n_atoms: int,
        n_classes: int = 2,
        *,
        n_covariates: int = 0,
        reconstruction: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_features=n_features, n_atoms=n_atoms, n_classes=n_classes - 1)
        if n_atoms > n_features:
            raise ValueError(f"n_atoms: expected at most {n_features}, the number of features, got {n_atoms}")
        if n_covariates < 0:
            raise ValueError(f"n_covariates: expected at least 0, got {n_covariates}")
        if not reconstruction > 0:
            raise ValueError(f"reconstruction: expected more than 0, got {reconstruction}")
        self.reconstruction = reconstruction
        atoms = torch.linalg.qr(torch.randn(n_features, n_atoms, device=device, dtype=dtype))[0]
        self.dictionary = nn.Parameter(atoms)
        self.coefficients = nn.Parameter(atoms.new_zeros(n_atoms, n_classes))
        self.covariate_weights = nn.Parameter(atoms.new_zeros(n_covariates, n_classes))
        self.bias = nn.Parameter(atoms.new_zeros(n_classes))

    def extra_repr(self) -> str:
        """The options."""
        (n, k), (c, q) = self.dictionary.shape, self.covariate_weights.shape
        return f"{n}, {k}, {q}, n_covariates={c}, reconstruction={self.reconstruction}"

    def encode(self, x: Tensor) -> Tensor:
        """``(*batch, n_atoms)`` features."""
        return x @ self.dictionary

    def reconstruct(self, codes: Tensor) -> Tensor:
        """The signals that codes stand for."""
        return times(self.dictionary, codes)

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Logits of the classes."""
        logits = self.encode(x) @ self.coefficients + self.bias
        return logits if covariates is None else logits + covariates @ self.covariate_weights

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        labels: Tensor,
        covariates: Tensor | None = None,
        *,
        rtol: float = 1e-6,
        max_steps: int = 2000,
    ) -> list[float]:
        """Projected gradient steps on the lifted problem, from the current parameters.

        Args:
            x: ``(N, n_features)`` signals.
            labels: ``(N)`` integers.
            covariates: ``(N, n_covariates)``, where there are any.
            rtol: Stop when a step lowers the objective by less than this fraction of it.
            max_steps: Largest number of steps.

        Returns:
            The objective before every step and at the end; it never rises.
        """
        N, q = self._check(x, labels, covariates), self.bias.shape[0]
        target = F.one_hot(labels, q).to(x.dtype)
        extra = x.new_ones(N, 1) if covariates is None else torch.cat([x.new_ones(N, 1), covariates], -1)
        omega = torch.cat([self.bias[None], self.covariate_weights[: extra.shape[-1] - 1]])
        X = x.mT / N**0.5  # scaled as B is, so that both blocks have curvatures of one size
        A = self.dictionary @ self.coefficients
        B = self.dictionary @ (self.dictionary.mT @ X)
        # cross-entropy bends by at most 1/2 of what its features do
        bend = torch.linalg.matrix_norm(torch.cat([x, extra], -1), 2) ** 2 / (2 * N)
        step = 1 / torch.clamp(bend, min=2 * self.reconstruction)
        losses: list[float] = []
        for _ in range(max_steps + 1):
            logits = x @ A + extra @ omega
            miss = B - X
            losses.append(float(F.cross_entropy(logits, labels) + self.reconstruction * miss.square().sum()))
            small = len(losses) > 1 and losses[-2] - losses[-1] < rtol * abs(losses[-2])
            if small or len(losses) > max_steps:  # the last loss is that at the end
                break
            slope = (logits.softmax(-1) - target) / N
            theta = torch.cat([A - step * (x.mT @ slope), B - step * 2 * self.reconstruction * miss], -1)
            omega = omega - step * (extra.mT @ slope)
            W = torch.linalg.svd(theta, full_matrices=False)[0][:, : self.dictionary.shape[-1]]
            A, B = (W @ (W.mT @ block) for block in (theta[:, :q], theta[:, q:]))
            self.dictionary.copy_(W)
        self.coefficients.copy_(self.dictionary.mT @ A)
        self.bias.copy_(omega[0])
        self.covariate_weights[: len(omega) - 1] = omega[1:]
        return losses

    def _check(self, x: Tensor, labels: Tensor, covariates: Tensor | None) -> int:
        check_shape("x", check_tensor("x", x, min_ndim=2).shape, (len(x), self.dictionary.shape[0]))
        if labels.dtype != torch.int64:
            raise ValueError(f"labels: expected int64, got {labels.dtype}")
        check_shape("labels", labels.shape, (len(x),), " as x has rows")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.bias):
            raise ValueError(f"labels: expected 0..{len(self.bias) - 1}, got {int(labels.min())}..{int(labels.max())}")
        if covariates is not None:
            check_shape("covariates", covariates.shape, (len(x), self.covariate_weights.shape[0]))
        return len(x)
