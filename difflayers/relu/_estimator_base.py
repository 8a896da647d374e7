"""What the scikit-learn estimators share: parameters, scales, gates, training of all outputs, and the module."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from difflayers._checks import default_rtol
from difflayers._solution import Solution, SolveError

from ._beta_max import beta_max
from ._cone_interior_point import InteriorPoint
from ._convex_relu import convex_relu_ex
from ._gated_relu import convex_gated_relu_ex
from ._gated_solver import FISTA
from ._gates import sample_gates
from ._losses import Loss
from ._relu_solution import ConvexReLUSolution, predict
from ._robust_relu import ClarabelSolver

Array = np.ndarray
DTYPES = (np.float64, np.float32)


class GatedUnits(nn.Module):
    """Hidden units that are linear where a gate of their own is open.

    Computes ``1[gate(x) >= 0] * hidden(x)``, unit by unit.

    Args:
        gate: Linear map whose signs open the gates.
        hidden: Linear map with as many outputs.

    Shape:
        Input ``(*batch, d)``, output ``(*batch, m)``.

    Differentiable in input and parameters of `hidden`; the gates jump.
    """

    def __init__(self, gate: nn.Linear, hidden: nn.Linear) -> None:
        super().__init__()
        self.gate, self.hidden = gate, hidden

    def forward(self, x: Tensor) -> Tensor:
        """The units."""
        return torch.where(self.gate(x) >= 0, self.hidden(x), 0)


class ConvexReLUBase(BaseEstimator):
    """What the regressor and the classifier share; see there for the parameters."""

    _default_loss: Loss

    def __init__(
        self,
        alpha: float = 0.03,
        *,
        n_gates: int = 100,
        gated: bool = True,
        loss: Loss | None = None,
        fit_intercept: bool = True,
        standardize: bool = True,
        tol: float = 1e-8,
        max_iter: int = 1000,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
    ) -> None:
        self.alpha = alpha
        self.n_gates = n_gates
        self.gated = gated
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device

    # ------------------------------------------------------------------------------------------------------- training

    def _train(self, X: Array, y: Array, weight: Array) -> None:
        """Trains on labels ``(n, c)`` and fills the attributes."""
        self._check_parameters()
        used = weight > 0  # a sample of weight 0 is as good as absent, also to gates and scales
        if not used.any():
            raise ValueError("sample_weight: expected a positive weight, got none")
        X, y, weight = X[used], y[used], weight[used]
        self._learn_scales(X, weight)
        self._offset, y = self._centred(y, weight)
        Z, labels = self._features(X), torch.tensor(y.T.copy(), device=self.device)  # copies: arrays may be read-only
        s = torch.tensor(weight, device=self.device)
        gates, init = self._gates(Z, len(labels))
        loss = self._loss()
        top = beta_max(Z, labels, gates, sample_weight=s, loss=loss, gated=self.gated)
        beta = torch.where(top == 0, 1, self.alpha * top)
        found = self._solve(Z, labels, beta, gates, s, loss, init)
        self._report(found)
        solution, single = found.value, len(labels) == 1
        self.beta_ = beta[0].item() if single else beta.cpu().numpy()
        self.dual_gap_ = solution.gap[0].item() if single else solution.gap.cpu().numpy()
        self.objective_ = solution.objective[0].item() if single else solution.objective.cpu().numpy()
        self.n_iter_ = max(1, int(found.steps.max()))  # a zero network is found without a step
        self.solution_ = solution

    def _solve(
        self, X: Tensor, y: Tensor, beta: Tensor, gates: Tensor, s: Tensor, loss: Loss, init: ConvexReLUSolution | None
    ) -> Solution[ConvexReLUSolution]:
        rtol = self.tol if X.dtype == torch.float64 else max(self.tol, default_rtol(None, X.dtype))
        if self.gated:
            solver = FISTA(rtol=rtol, max_steps=self.max_iter)
            return convex_gated_relu_ex(X, y, beta, gates, sample_weight=s, loss=loss, solver=solver, warm_start=init)
        kind = InteriorPoint if loss.smooth else ClarabelSolver
        method = kind(rtol=rtol, max_steps=self.max_iter)
        return convex_relu_ex(X, y, beta, gates, sample_weight=s, loss=loss, solver=method)

    def _report(self, found: Solution[ConvexReLUSolution]) -> None:
        if bool(found.failed.any()):
            raise SolveError(f"{type(self).__name__}: no network was found; rescale the data", found)
        late = int((~found.converged).sum())
        if late:
            warnings.warn(
                f"{type(self).__name__}: {late} of {found.status.numel()} networks stopped after max_iter="
                f"{self.max_iter} steps, duality gap at most {float(found.value.gap.max()):.1e}; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _gates(self, Z: Tensor, outputs: int) -> tuple[Tensor, ConvexReLUSolution | None]:
        """Vectors of the gates, and the earlier network where it goes on."""
        earlier = getattr(self, "solution_", None) if self.warm_start else None
        shape = (outputs, earlier.gates.vectors.shape[0], Z.shape[-1]) if earlier is not None else None
        if earlier is not None and earlier.v.shape == shape and (earlier.w is None) == self.gated:
            return earlier.gates.vectors.to(Z), earlier._replace(v=earlier.v.to(Z))
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        generator = torch.Generator().manual_seed(int(seed))
        # drawn alike for all devices and dtypes
        return sample_gates(Z.cpu().double(), self.n_gates, generator=generator).vectors.to(Z), None

    # ----------------------------------------------------------------------------------------------- scales and inputs

    def _learn_scales(self, X: Array, weight: Array) -> None:
        """Weighted means and standard deviations of the columns; no shift without an intercept."""
        mean = np.average(X, axis=0, weights=weight)
        scale = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weight))
        constant = scale <= 10 * np.finfo(X.dtype).eps * np.abs(X).max(axis=0)
        centred, scaled = self.standardize and self.fit_intercept, self.standardize
        self._mean = mean.astype(X.dtype) if centred else np.zeros_like(mean, dtype=X.dtype)
        self._scale = np.where(constant | (not scaled), 1, scale).astype(X.dtype)

    def _features(self, X: Array) -> Tensor:
        """Scaled, with the column of ones."""
        Z = (X - self._mean) / self._scale
        if self.fit_intercept:
            Z = np.concatenate([Z, np.ones_like(Z[:, :1])], axis=1)
        return torch.tensor(Z, device=self.device)

    def _centred(self, y: Array, weight: Array) -> tuple[Array, Array]:
        return np.zeros(y.shape[1], y.dtype), y

    def _outputs(self, X: Any) -> Array:
        """``(m, c)`` predictions of the networks."""
        check_is_fitted(self, "solution_")
        X = validate_data(self, X, dtype=DTYPES, reset=False)
        Z = self._features(X.astype(self._mean.dtype, copy=False))
        return predict(self.solution_, Z).mT.cpu().numpy() + self._offset

    # ---------------------------------------------------------------------------------------------------------- others

    def _loss(self) -> Loss:
        return self._default_loss if self.loss is None else self.loss

    def _check_parameters(self) -> None:
        """scikit-learn asks for checks in `fit`, not before."""
        for name in ("alpha", "tol"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and float(value) > 0):
                raise ValueError(f"{name}: expected a number more than 0, got {value!r}")
        for name in ("n_gates", "max_iter"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and int(value) >= 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not (self.loss is None or isinstance(self.loss, Loss)):
            raise ValueError(f"loss: expected a loss such as Squared() or None, got {self.loss!r}")

    def to_network(self) -> nn.Sequential:
        """The ordinary torch network, from raw columns to outputs: scaling, intercept and offset are in its weights.

        Returns:
            ``Sequential(Linear, ReLU, Linear)``, with :class:`GatedUnits` for the first two of a gated network; input
            ``(*batch, n_features)``, output ``(*batch, n_outputs)``. Hidden units are those that are active in some
            output, balanced: their weight decay is the penalty that was trained with.
        """
        check_is_fitted(self, "solution_")
        v, w = self.solution_.v, self.solution_.w
        signed = [(v, 1.0)] if w is None else [(v, 1.0), (w, -1.0)]
        gates, hidden, out = [], [], []
        for neurons, sign in signed:
            size = torch.linalg.vector_norm(neurons, dim=-1)
            output, gate = (size > 0).nonzero().unbind(-1)
            root = size[output, gate].sqrt()
            gates.append(self.solution_.gates.vectors[gate])
            hidden.append(neurons[output, gate] / root.unsqueeze(-1))
            out.append(sign * root.unsqueeze(-1) * nn.functional.one_hot(output, len(v)))
        units = self._linear(torch.cat(hidden))
        last = _linear(torch.cat(out).mT, torch.tensor(self._offset, device=v.device))
        if w is not None:
            return nn.Sequential(units, nn.ReLU(), last)
        return nn.Sequential(GatedUnits(self._linear(torch.cat(gates)).requires_grad_(False), units), last)

    def _linear(self, weight: Tensor) -> nn.Linear:
        """Rows that act on scaled columns, and ones, as a map of the raw ones."""
        d = self.n_features_in_
        scale, mean = (torch.tensor(a, device=weight.device) for a in (self._scale, self._mean))
        raw = weight[:, :d] / scale
        return _linear(raw, weight[:, d] - raw @ mean if self.fit_intercept else None)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        return tags


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with these weights; none is drawn, nor warned of where the network has no hidden units."""
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
