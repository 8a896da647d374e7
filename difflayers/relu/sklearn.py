"""scikit-learn estimators: two-layer ReLU networks trained to the global optimum.

They follow scikit-learn's conventions and pass its ``check_estimator``: use them in pipelines and searches over
parameters. Importing this module imports scikit-learn; nothing else of the library does.

>>> from sklearn.datasets import load_wine
>>> from difflayers.relu.sklearn import ConvexReLUClassifier
>>> X, y = load_wine(return_X_y=True)
>>> model = ConvexReLUClassifier(random_state=0).fit(X[::2], y[::2])
>>> bool(model.score(X[1::2], y[1::2]) > 0.9)
True
"""

from ._estimator_base import GatedUnits
from ._estimators import ConvexReLUClassifier, ConvexReLURegressor

__all__ = ["ConvexReLUClassifier", "ConvexReLURegressor", "GatedUnits"]
