"""One run of a method on one draw of the data, and what its weights are good for."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from difflayers import SolveError
from difflayers.bilevel import SABA, ArgminLayer, Bilevel
from difflayers.implicit import LBFGS

from .data import FEATURES, RIDGE, Split, upper, weighted
from .recipes import BLOCKS, Recipe

FIRST, POINTS = 10.0, 60  # calls up to the first point of a curve, and how many follow, ever wider apart


@dataclass(frozen=True)
class Run:
    """A run and its end.

    Attributes:
        calls: Gradients of either level and products with second derivatives up to each point of the curve, on all of
            the data of the level; one on a block counts as its share.
        curve: Test accuracy of the lower variables of the method there.
        weights: x, of which the sigmoid are the weights, at the end.
        gradients: Calls for gradients.
        products: Calls for products.
        seconds: Of all steps.
    """

    calls: list[float]
    curve: list[float]
    weights: Tensor
    gradients: float
    products: float
    seconds: float


def accuracy(y: Tensor, x: Tensor, labels: Tensor) -> float:
    return float(((x @ y).argmax(1) == labels).float().mean())


def f1(kept: Tensor, right: Tensor) -> float:
    """Of the labels that are kept as right ones."""
    return float(2 * (kept & right).sum() / (kept.sum() + right.sum()))


def fit(weights: Tensor, x: Tensor, labels: Tensor, ridge: float = RIDGE) -> Tensor:
    """The model trained on data weighted by sigmoids, infinity being 1, from zero."""
    problem = Bilevel(upper, lambda w, y, batch: weighted(w.sigmoid(), y, batch, ridge))
    with torch.no_grad():
        return ArgminLayer(problem, solver=LBFGS(rtol=1e-3))(weights, (x, labels), init=x.new_zeros(FEATURES + 1, 10))


def run(recipe: Recipe, settings: tuple[float, float], data: Split, budget: float) -> Run:
    """Steps until the budget of calls is spent, from the model trained on all labels with equal weights."""
    n = len(data.x)
    algo = recipe.make(torch.zeros(n), fit(torch.zeros(n), data.x, data.labels), *settings)
    blocks = BLOCKS if recipe.batches else 1
    rows = torch.arange(n).chunk(blocks)
    lower: list[tuple[Tensor, ...]] = [(data.x[r], data.labels[r], r) for r in rows]
    if blocks == 1:
        lower = [(data.x, data.labels)]
    validation = list(zip(data.x_validate.chunk(blocks), data.labels_validate.chunk(blocks), strict=True))
    numbered = isinstance(algo, SABA)
    g = torch.Generator().manual_seed(0)
    calls, curve, seconds, spent = [0.0], [accuracy(algo.y, data.x_test, data.labels_test)], 0.0, 0.0
    while spent < budget:
        i, j = torch.randint(blocks, (2,), generator=g).tolist()
        start = time.perf_counter()
        algo.step(*(((i, validation[i]), (j, lower[j])) if numbered else (validation[i], lower[j])))
        seconds += time.perf_counter() - start
        counts = algo.counts
        gradients, products = counts["upper"] + counts["lower"], counts["hvp"] + counts["cross"]
        if (gradients + products) / blocks == spent:  # it says it is at its end
            break
        spent = (gradients + products) / blocks
        if spent >= min(max(FIRST, calls[-1] * (budget / FIRST) ** (1 / POINTS)), budget):
            calls.append(spent)
            curve.append(accuracy(algo.y, data.x_test, data.labels_test))
    if not torch.isfinite(algo.y).all():
        raise FloatingPointError(f"{type(algo).__name__} diverged with the settings {settings}")
    return Run(calls, curve, recipe.weights(algo.x, settings), gradients / blocks, products / blocks, seconds)


@dataclass(frozen=True)
class Score:
    """What weights are worth: accuracies of models trained on weighted data, without and with validation data."""

    accuracy: float
    both: float
    f1: float


def score(weights: Tensor, data: Split) -> Score:
    """Models trained anew, so that nothing but the weights counts."""
    test, kept = (data.x_test, data.labels_test), weights >= 0
    one = torch.full((len(data.x_validate),), torch.inf)
    x, labels = torch.cat([data.x, data.x_validate]), torch.cat([data.labels, data.labels_validate])
    return Score(
        accuracy(fit(weights, data.x, data.labels), *test),
        accuracy(fit(torch.cat([weights, one]), x, labels), *test),
        f1(kept, ~data.wrong),
    )


def held_out_loss(recipe: Recipe, settings: tuple[float, float], data: Split, budget: float) -> float:
    """Loss on 300 of the validation pictures after a run with the others; infinite where it diverged."""
    x, labels = data.x_validate[700:], data.labels_validate[700:]
    data = data._replace(x_validate=data.x_validate[:700], labels_validate=data.labels_validate[:700])
    try:
        weights = run(recipe, settings, data, budget).weights
        return float(cross_entropy(x @ fit(weights, data.x, data.labels), labels))
    except (ArithmeticError, SolveError):
        return float("inf")
