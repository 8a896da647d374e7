"""scikit-learn estimators of convex ReLU networks.

Oracles: scikit-learn's own `check_estimator`; the convex program, called class by class on columns scaled by
`StandardScaler`; the optimal network's defining properties (zero from `alpha = 1` on, unchanged by units).
"""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine, make_moons
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from difflayers.relu import Logistic, Squared, beta_max, convex_gated_relu, convex_relu, predict
from difflayers.relu.sklearn import ConvexReLUClassifier, ConvexReLURegressor

ESTIMATORS = (ConvexReLUClassifier, ConvexReLURegressor)
WINE = load_wine(return_X_y=True)
DIABETES = tuple(a[:150] for a in load_diabetes(return_X_y=True))


def small(estimator, **options):
    return estimator(**{"n_gates": 12, "random_state": 0} | options)


def data_of(estimator):
    return WINE if estimator is ConvexReLUClassifier else DIABETES


# ------------------------------------------------------------------------------------------------------- conventions


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_check_estimator(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some checks warn by design
        results = check_estimator(small(estimator), on_skip=None, on_fail=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    assert [r["check_name"] for r in results if r["status"] == "skipped"] in ([], ["check_array_api_input"])


def test_the_library_does_not_import_scikit_learn():
    code = "import sys, difflayers.relu; print('sklearn' in sys.modules, hasattr(difflayers.relu, '_estimators'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pipeline_search_clone_and_pickle(estimator):
    X, y = data_of(estimator)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), small(estimator)), {f"{estimator.__name__.lower()}__alpha": [0.1, 2]}
    )
    search.fit(X, y)
    assert search.best_params_[f"{estimator.__name__.lower()}__alpha"] == 0.1  # from 1 on the network is zero
    assert np.array_equal(pickle.loads(pickle.dumps(search)).predict(X), search.predict(X))
    fitted = small(estimator, loss=Squared(), alpha=0.2).fit(X, y)
    fresh = clone(fitted)
    assert not hasattr(fresh, "solution_") and fresh.get_params() == fitted.get_params()
    assert np.array_equal(fresh.fit(X, y).predict(X), fitted.predict(X))


def test_learns_what_a_linear_model_cannot():
    X, y = make_moons(400, noise=0.15, random_state=0)
    scores = cross_val_score(ConvexReLUClassifier(0.01, n_gates=60, random_state=0), X, y, cv=3)
    assert scores.mean() > cross_val_score(LogisticRegression(), X, y, cv=3).mean() + 0.05
    x = np.linspace(-2, 2, 101)[:, None]
    bent = np.abs(x[:, 0]) + 100  # an offset is learned, not punished
    assert ConvexReLURegressor(0.01, random_state=0).fit(x, bent).score(x, bent) > 0.99
    assert LinearRegression().fit(x, bent).score(x, bent) < 0.01


# ---------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("gated", [True, False])
def test_classes_are_separate_programs(gated):
    X, y = WINE
    model = small(ConvexReLUClassifier, gated=gated, alpha=0.1, tol=1e-10).fit(X, y)
    Z = torch.tensor(np.c_[StandardScaler().fit_transform(X), np.ones(len(X))])
    for k, label in enumerate(model.classes_):
        side = torch.tensor(np.where(y == label, 1.0, -1.0))
        gates = model.solution_.gates.vectors
        beta = 0.1 * beta_max(Z, side, gates, loss=Logistic(), gated=gated)
        alone = (convex_gated_relu if gated else convex_relu)(Z, side, beta, gates, loss=Logistic())
        assert model.beta_[k] == pytest.approx(float(beta), rel=1e-12)
        assert model.objective_[k] == pytest.approx(float(alone.objective), rel=1e-9)
        assert np.abs(model.decision_function(X)[:, k] - predict(alone, Z).numpy()).max() < 1e-6
    assert (model.solution_.w is None) == gated
    assert model.dual_gap_.shape == (3,) and (model.dual_gap_ < 1e-6 * model.objective_).all()


def test_outputs_are_separate_programs():
    X, y = DIABETES
    Y = np.stack([y, -3 * y + X[:, 0], y**2], 1)
    together = small(ConvexReLURegressor, tol=1e-10).fit(X, Y)
    for k in range(3):
        alone = small(ConvexReLURegressor, tol=1e-10).fit(X, Y[:, k])
        assert together.predict(X)[:, k] == pytest.approx(alone.predict(X), rel=1e-8)
        assert together.objective_[k] == pytest.approx(alone.objective_, rel=1e-10)
    assert isinstance(alone.dual_gap_, float) and alone.predict(X).shape == y.shape


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_network_predicts_the_same(estimator, gated, fit_intercept):
    X, y = data_of(estimator)
    model = small(estimator, gated=gated, fit_intercept=fit_intercept).fit(X, y)
    network = model.to_network()
    output = network(torch.tensor(X)).detach().numpy()
    expected = model.decision_function(X) if estimator is ConvexReLUClassifier else model.predict(X)[:, None]
    assert np.abs(output - expected).max() < 1e-9 * np.abs(expected).max()
    assert [type(m).__name__ for m in network][1:] == (["Linear"] if gated else ["ReLU", "Linear"])
    decay = [p for p in network.parameters() if p.requires_grad]
    assert len(decay) == (4 if fit_intercept else 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_network(estimator):
    X, y = data_of(estimator)
    model = small(estimator, alpha=1.001).fit(X, y)
    assert not model.solution_.v.any() and model.n_iter_ >= 1
    network = model.to_network()
    assert network(torch.tensor(X)).isfinite().all()
    if estimator is ConvexReLURegressor:
        assert model.predict(X) == pytest.approx(np.full(len(X), y.mean()))
    else:
        assert model.predict_proba(X) == pytest.approx(np.full((len(X), 3), 1 / 3))
    assert small(estimator, alpha=0.99).fit(X, y).solution_.v.any()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_do_not_matter(scale):
    X, y = DIABETES
    plain = small(ConvexReLURegressor).fit(X, y)
    scaled = small(ConvexReLURegressor).fit(scale * X, scale * y, sample_weight=np.full(len(y), scale))
    assert scaled.predict(scale * X) / scale == pytest.approx(plain.predict(X), rel=1e-6)


def test_weights_of_classes_and_samples():
    X, y = WINE
    counts = np.bincount(y)
    balanced = small(ConvexReLUClassifier, class_weight="balanced").fit(X, y)
    by_hand = small(ConvexReLUClassifier).fit(X, y, sample_weight=(len(y) / 3 / counts)[y])
    assert balanced.decision_function(X) == pytest.approx(by_hand.decision_function(X), rel=1e-6, abs=1e-8)
    without = small(ConvexReLUClassifier).fit(X[y != 2], y[y != 2])
    ignored = small(ConvexReLUClassifier).fit(X, y, sample_weight=(y != 2).astype(float))
    assert ignored.decision_function(X)[:, 1] == pytest.approx(without.decision_function(X), rel=1e-6, abs=1e-8)


def test_probabilities():
    X, y = WINE
    model = small(ConvexReLUClassifier).fit(X, y)
    odds = 1 / (1 + np.exp(-model.decision_function(X)))
    assert model.predict_proba(X) == pytest.approx(odds / odds.sum(1, keepdims=True))
    assert np.exp(model.predict_log_proba(X)) == pytest.approx(model.predict_proba(X))
    two = small(ConvexReLUClassifier).fit(X, y == 0)
    assert two.predict_proba(X)[:, 1] == pytest.approx(1 / (1 + np.exp(-two.decision_function(X))))
    assert np.array_equal(two.predict(X), two.decision_function(X) > 0)
    assert not hasattr(small(ConvexReLUClassifier, loss=Squared()), "predict_proba")


def test_single_precision_stays():
    X, y = (a.astype(np.float32) for a in DIABETES)
    model = small(ConvexReLURegressor).fit(X, y)
    assert model.predict(X).dtype == np.float32 and model.to_network()[0].hidden.weight.dtype == torch.float32
    assert model.predict(X) == pytest.approx(small(ConvexReLURegressor).fit(*DIABETES).predict(DIABETES[0]), rel=1e-2)


def test_constant_labels_and_columns():
    X = np.c_[WINE[0], np.full(len(WINE[0]), 7.3)]
    model = small(ConvexReLURegressor).fit(X, np.full(len(X), 0.1))
    assert model.predict(X) == pytest.approx(np.full(len(X), 0.1)) and not model.solution_.v.any()
    with pytest.raises(ValueError, match="y: expected samples of at least two classes, got 1"):
        small(ConvexReLUClassifier).fit(X, np.zeros(len(X)))


# --------------------------------------------------------------------------------------------------------------- limits


def test_warns_when_not_converged_and_goes_on():
    X, y = DIABETES
    model = small(ConvexReLURegressor, max_iter=3, alpha=0.02)
    with pytest.warns(ConvergenceWarning, match="1 of 1 networks stopped after max_iter=3 steps"):
        model.fit(X, y)
    far = model.dual_gap_
    model.set_params(warm_start=True, max_iter=1000, random_state=1).fit(X, y)
    gates, steps = model.solution_.gates.vectors, model.n_iter_
    assert model.dual_gap_ < 1e-6 * far
    model.fit(X, y)
    assert torch.equal(model.solution_.gates.vectors, gates) and model.n_iter_ < steps
    cold = small(ConvexReLURegressor, alpha=0.02).fit(X, y)
    assert torch.equal(gates, cold.solution_.gates.vectors)  # of the first fit: seed 0
    assert model.predict(X) == pytest.approx(cold.predict(X), rel=1e-6)
    model.set_params(fit_intercept=False).fit(X, y)  # other columns: a cold start
    assert model.solution_.gates.vectors.shape[1] == X.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha: expected a number more than 0, got 0"),
        ({"tol": -1.0}, "tol: expected a number more than 0, got -1.0"),
        ({"n_gates": 0}, "n_gates: expected an integer of at least 1, got 0"),
        ({"max_iter": 2.5}, "max_iter: expected an integer of at least 1, got 2.5"),
        ({"loss": "squared"}, "loss: expected a loss such as"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        small(ConvexReLURegressor, **options).fit(*DIABETES)


def test_bad_weights():
    X, y = DIABETES
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        small(ConvexReLURegressor).fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match=r"[Ww]eight"):
        small(ConvexReLURegressor).fit(X, y, sample_weight=np.zeros(len(y)))
