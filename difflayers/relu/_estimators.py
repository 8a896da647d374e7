r"""scikit-learn estimators of convex ReLU networks; imported by :mod:`difflayers.relu.sklearn` only.

A network is trained for each output, all of them as one batch that shares its data and gates. Weight decay is given
relative to the smallest one at which the network is zero, which makes it a number without units: the trained network
follows rescaled data, labels and sample weights.
"""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from difflayers._checks import default_rtol
from difflayers._solution import Solution, SolveError

from ._beta_max import beta_max
from ._cone_interior_point import InteriorPoint
from ._convex_relu import convex_relu_ex
from ._gated_relu import convex_gated_relu_ex
from ._gated_solver import FISTA
from ._gates import sample_gates
from ._losses import Logistic, Loss, Squared
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


class _ConvexReLU(BaseEstimator):
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


class ConvexReLURegressor(RegressorMixin, _ConvexReLU):
    r"""Regression by a two-layer ReLU network, trained to the global optimum.

    Minimises ``sum_k s_k loss(f_k, y_k) + beta * sum_i ||u_i||`` over the neurons of random gates, the convex form of
    a two-layer network with weight decay `beta`; for several outputs, a network each, trained together.

    Args:
        alpha: Weight decay relative to the smallest one at which the network is zero, :func:`beta_max`; more than 0.
            Above 1 the network is zero.
        n_gates: Random gates, the hidden units that can become active. Data with fewer activation patterns have fewer.
        gated: Gated ReLU units; False: ReLU units, by the program with cone constraints, which takes longer.
        loss: :class:`Squared` if None, or another loss of :mod:`difflayers.relu`.
        fit_intercept: Give the hidden units a bias, and the output that of the mean label.
        standardize: Scale columns to standard deviation 1, and, with an intercept, to mean 0.
        tol: Where training has converged: largest norm of a neuron's shortest subgradient, relative to beta, of gated
            networks; certified duality gap, relative to the objective, of ReLU networks. Of data in single precision
            at least 1e-5.
        max_iter: Largest number of steps.
        warm_start: Keep the gates of the last fit, where the numbers of columns and outputs are the same, and start a
            gated network from it.
        random_state: Of the gates: a number, a ``RandomState`` or None.
        device: Where to train, such as ``"cuda"``; the CPU if None.

    Attributes:
        solution_: :class:`ConvexReLUSolution` on scaled columns, with one batch dimension for the outputs.
        beta_: Weight decay; an array for several outputs, as the next two.
        objective_: Value of the objective.
        dual_gap_: How far the objective may lie above the optimum over these gates.
        n_iter_: Steps taken.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X had some.

    Trains in the dtype of X if that is float32 or float64, in float64 otherwise.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> from difflayers.relu.sklearn import ConvexReLURegressor
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = ConvexReLURegressor(alpha=0.1, random_state=0).fit(X, y)
        >>> bool(model.dual_gap_ < 1e-6 * model.objective_)
        True

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022.
    """

    _default_loss = Squared()

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexReLURegressor:
        """Trains the network.

        Args:
            X: ``(n, d)``.
            y: ``(n)``, or ``(n, c)`` of several outputs.
            sample_weight: ``(n)``, at least 0; ones if None.

        Returns:
            The estimator.
        """
        X, y = validate_data(self, X, y, dtype=DTYPES, multi_output=True, y_numeric=True)
        weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        y = np.asarray(y, dtype=X.dtype)
        self._flat = y.ndim == 1
        self._train(X, y.reshape(len(y), -1), weight)
        return self

    def predict(self, X: Any) -> Array:
        """Predictions ``(n)``, or ``(n, c)``."""
        found = self._outputs(X)
        return found[:, 0] if self._flat else found

    def _centred(self, y: Array, weight: Array) -> tuple[Array, Array]:
        if not self.fit_intercept:
            return super()._centred(y, weight)
        mean = np.average(y, axis=0, weights=weight).astype(y.dtype)
        rest = y - mean
        constant = np.abs(rest).max(axis=0) <= 10 * np.finfo(y.dtype).eps * np.abs(y).max(axis=0)
        return mean, np.where(constant, 0, rest).astype(y.dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _has_probabilities(model: ConvexReLUClassifier) -> bool:
    if not isinstance(model._loss(), Logistic):
        raise AttributeError(f"predict_proba: expected loss Logistic(), got {model.loss!r}")
    return True


class ConvexReLUClassifier(ClassifierMixin, _ConvexReLU):
    r"""Classification by two-layer ReLU networks, trained to the global optimum.

    Minimises ``sum_k s_k loss(f_k, y_k) + beta * sum_i ||u_i||`` over the neurons of random gates, for labels -1 and 1.
    Of more than two classes, each has a network that tells it from the rest; all are trained as one batch.

    Args:
        alpha: Weight decay relative to the smallest one at which the network is zero, as of
            :class:`ConvexReLURegressor`; each class has its own.
        n_gates: Random gates.
        gated: Gated ReLU units; False: ReLU units.
        loss: :class:`Logistic` if None, which has probabilities, or another loss of :mod:`difflayers.relu`.
        fit_intercept: Give the hidden units a bias.
        standardize: Scale columns.
        class_weight: ``"balanced"``, a dictionary from classes to weights, or None.
        tol: Tolerance of training.
        max_iter: Largest number of steps.
        warm_start: Start from the last fit.
        random_state: Of the gates.
        device: Where to train.

    Attributes:
        classes_: The labels.
        solution_: :class:`ConvexReLUSolution` with one batch dimension, of one entry for two classes.
        beta_: Weight decay, an array for more than two classes, as the next two.
        objective_: Value of the objective.
        dual_gap_: How far the objective may lie above the optimum over these gates.
        n_iter_: Steps taken.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X had some.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> from difflayers.relu.sklearn import ConvexReLUClassifier
        >>> X, y = load_breast_cancer(return_X_y=True)
        >>> model = ConvexReLUClassifier(random_state=0).fit(X, y)
        >>> model.predict_proba(X).shape
        (569, 2)

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022.
    """

    _default_loss = Logistic()

    def __init__(
        self,
        alpha: float = 0.03,
        *,
        n_gates: int = 100,
        gated: bool = True,
        loss: Loss | None = None,
        fit_intercept: bool = True,
        standardize: bool = True,
        class_weight: Any = None,
        tol: float = 1e-8,
        max_iter: int = 1000,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__(
            alpha,
            n_gates=n_gates,
            gated=gated,
            loss=loss,
            fit_intercept=fit_intercept,
            standardize=standardize,
            tol=tol,
            max_iter=max_iter,
            warm_start=warm_start,
            random_state=random_state,
            device=device,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexReLUClassifier:
        """Trains a network for two classes, one for each of more.

        Args:
            X: ``(n, d)``.
            y: ``(n)`` labels of at least two classes.
            sample_weight: ``(n)``, at least 0; ones if None.

        Returns:
            The estimator.
        """
        X, y = validate_data(self, X, y, dtype=DTYPES)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        self.classes_ = np.unique(y)
        present = len(np.unique(y[weight > 0]))
        if present < 2:
            raise ValueError(f"y: expected samples of at least two classes, got {present} class")
        if self.class_weight is not None:
            counted = weight > 0  # a sample of weight 0 is as good as absent
            weight = weight.copy()
            weight[counted] *= compute_sample_weight(self.class_weight, y[counted])
        which = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        self._train(X, np.where(y[:, None] == which, 1, -1).astype(X.dtype), weight)
        return self

    def decision_function(self, X: Any) -> Array:
        """Outputs of the networks: ``(n)`` for two classes, positive for the second; else ``(n, classes)``."""
        found = self._outputs(X)
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: Any) -> Array:
        """Classes ``(n)``."""
        found = self._outputs(X)
        index = found.argmax(axis=1) if found.shape[1] > 1 else (found[:, 0] > 0).astype(int)
        return self.classes_[index]

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> Array:
        """Probabilities ``(n, classes)``; of more than two classes, those of one against the rest, normalised."""
        found = torch.from_numpy(self._outputs(X))
        if found.shape[1] == 1:
            return torch.sigmoid(torch.cat([-found, found], 1)).numpy()
        return torch.softmax(nn.functional.logsigmoid(found), 1).numpy()

    @available_if(_has_probabilities)
    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of the probabilities, without underflow."""
        found = torch.from_numpy(self._outputs(X))
        if found.shape[1] == 1:
            return nn.functional.logsigmoid(torch.cat([-found, found], 1)).numpy()
        return torch.log_softmax(nn.functional.logsigmoid(found), 1).numpy()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with these weights; none is drawn, nor warned of where the network has no hidden units."""
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
