"""scnn: a model trained in float32 predicts in float64; by default it minimises with another penalty (scaled data)."""

import numpy as np
from scnn.metrics import Metrics
from scnn.models import ConvexGatedReLU
from scnn.optimize import optimize_model
from scnn.regularizers import NeuronGL1
from scnn.solvers import RFISTA

rng = np.random.default_rng(0)
X, y, G = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 3), (12, 1), (3, 5)))
X[:, 0] *= 10


def train(**settings):
    model = ConvexGatedReLU(G)
    found, _ = optimize_model(model, RFISTA(model, tol=1e-9), Metrics(), X, y, None, None, NeuronGL1(0.1), **settings)
    f = found(X)
    objective = ((f - y) ** 2).sum() / 24 + 0.1 * np.linalg.norm(found.parameters[0], axis=-1).sum()
    return f.dtype, round(float(objective), 4)


print("expected float32, and an objective of", train(return_convex=True, unitize_data=False)[1])
print("got     ", *train(return_convex=True))
