"""Ridge regression with one hyperparameter per feature: the problem and its closed form."""

import torch
from torch import Tensor

from difflayers.bilevel import Bilevel

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, T, XV, TV = randn(20, 7, seed=1), randn(20, seed=2), randn(15, 7, seed=3), randn(15, seed=4)
HYPER = randn(7, seed=5)


def ridge() -> Bilevel:
    return Bilevel(
        upper=lambda x, y, batch: (XV @ y - TV).square().sum() / 2,
        lower=lambda x, y, batch: (X @ y - T).square().sum() / 2 + (x.exp() * y.square()).sum() / 2,
    )


def ridge_oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    H = X.mT @ X + torch.diag(x.exp())
    y = torch.linalg.solve(H, X.mT @ T)
    return y, -x.exp() * y * torch.linalg.solve(H, XV.mT @ (XV @ y - TV))


def hessian_scale() -> float:
    return float(torch.linalg.eigvalsh(X.mT @ X + torch.diag(HYPER.exp()))[-1])
