r"""scikit-learn estimators of convex ReLU networks; imported by :mod:`difflayers.relu.sklearn` only.

A network is trained for each output, all of them as one batch that shares its data and gates. Weight decay is given
relative to the smallest one at which the network is zero, which makes it a number without units: the trained network
follows rescaled data, labels and sample weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import nn

from ._estimator_base import DTYPES, Array, ConvexReLUBase
from ._losses import Logistic, Loss, Squared


class ConvexReLURegressor(RegressorMixin, ConvexReLUBase):
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


class ConvexReLUClassifier(ClassifierMixin, ConvexReLUBase):
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
