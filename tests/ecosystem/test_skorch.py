"""skorch: layers as scikit-learn estimators, fitted, cloned, pickled and searched over."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflayers.proximal import SparseCoding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    skorch = pytest.importorskip("skorch")
    pytest.importorskip("sklearn")

EPOCHS = 3


class Coded(nn.Module):
    """Regression on a sparse code."""

    def __init__(self, penalty: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.coding, self.last = SparseCoding(4, 6, penalty), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.coding(x))


def data() -> tuple[np.ndarray, np.ndarray]:
    """Twenty samples."""
    torch.manual_seed(3)
    x = torch.randn(20, 4)
    return x.numpy(), x.abs().sum(-1, keepdim=True).numpy()


def estimator(**options: object) -> skorch.NeuralNetRegressor:
    """Full batches in order, so that a loop by hand can follow."""
    settings = {"max_epochs": EPOCHS, "lr": 0.05, "batch_size": -1, "train_split": None, "verbose": 0}
    return skorch.NeuralNetRegressor(Coded, **{**settings, **options})


def test_fitting():
    X, y = data()
    net = estimator(module__penalty=0.2).fit(X, y)
    model = Coded(0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.from_numpy(X)), torch.from_numpy(y)).backward()
        optimizer.step()
    for got, want, start in zip(net.module_.parameters(), model.parameters(), Coded(0.2).parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert not torch.equal(got, start)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(net)).predict(X), net.predict(X))


def test_a_search_over_the_penalty():
    """An option of a layer is a hyperparameter like any other: the scores are those of fits by hand."""
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV, KFold

    X, y = data()
    folds = KFold(2)
    search = GridSearchCV(estimator(), {"module__penalty": [0.05, 1.0]}, cv=folds, refit=False).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    for penalty, score in zip((0.05, 1.0), scores, strict=True):
        net = clone(estimator()).set_params(module__penalty=penalty)
        by_hand = [net.fit(X[train], y[train]).score(X[test], y[test]) for train, test in folds.split(X)]
        np.testing.assert_allclose(score, np.mean(by_hand), rtol=1e-6)
    assert scores[0] != scores[1]
