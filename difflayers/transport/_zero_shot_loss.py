r"""The zero-shot prediction loss: attributes must explain classes by a linear map that was fitted to other examples.

.. math:: W = X_A^T (X_A X_A^T + \lambda I)^{-1} Y_A, \qquad
    \ell = -\log \operatorname{softmax}_k \big(\beta \, X_B W E^T\big)_{y_B}

where A and B are the halves of a batch, X attributes, E embeddings of all classes and Y those of the examples'
classes; and with A and B exchanged. Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling for Metric Learning,
2023, section 4.3.

Symbols: ``lambda`` ridge, ``beta`` scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_tensor, compute_dtype
from difflayers.linalg import Cholesky, linear_solve
from difflayers.linalg._autodiff import autocast_off, physical

from ._costs import confined


def zero_shot_loss(
    attributes: Tensor, labels: Tensor, class_embeddings: Tensor, *, ridge: float = 0.05, scale: float = 9.5
) -> Tensor:
    """How badly the attributes of each half of a batch predict the classes of the other half.

    Ridge regression ``W = argmin ||X_A W - Y_A||^2 + ridge ||W||^2`` of one half's class embeddings on its attributes
    gives predictions ``X_B W`` for the other half; the loss is their mean cross entropy, with logits ``scale * X_B W
    E^T``. It asks for attributes that carry over: sort a batch so that its halves share no class, and those of one half
    have to predict classes that were not fitted.

    Args:
        attributes: ``(*batch, B, m)``, from :meth:`GeneralizedSumPool.detailed`; the first ``B // 2`` rows are one
            half.
        labels: ``(*batch, B)`` integers from 0 to ``K - 1``.
        class_embeddings: ``(*batch, K, d)``, usually a parameter that is learned with the rest.
        ridge: Strength of the ridge, above 0.
        scale: Factor of the logits.

    Returns:
        ``(*batch)`` means over the B examples: one number without batch dimensions.

    Raises:
        ValueError: For fewer than two examples, or a wrong shape, dtype, device or number, naming the argument.

    Differentiable in `attributes` and `class_embeddings`, to any order.

    Example:
        >>> import torch
        >>> from difflayers.transport import zero_shot_loss
        >>> attributes = torch.eye(2).repeat(4, 1).requires_grad_()
        >>> zero_shot_loss(attributes, torch.tensor([0, 1]).repeat(4), torch.eye(2))
        tensor(0.0001, grad_fn=<...>)

    Source: Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling for Metric Learning, 2023, section 4.3;
    settings of the published code.
    """
    check_tensor("attributes", attributes, min_ndim=2)
    check_tensor("class_embeddings", class_embeddings, min_ndim=2)
    check_same([("attributes", attributes), ("class_embeddings", class_embeddings)])
    count, m = attributes.shape[-2:]
    if count < 2 or m == 0:
        raise ValueError(f"attributes: expected at least 2 rows and 1 column, got shape {tuple(attributes.shape)}")
    if class_embeddings.shape[-2] == 0:
        raise ValueError(f"class_embeddings: expected at least 1 row, got shape {tuple(class_embeddings.shape)}")
    _check_labels(labels, attributes, class_embeddings.shape[-2])
    broadcast_batch(
        (name, tuple(t.shape[: t.ndim - k]))
        for name, t, k in (
            ("attributes", attributes, 2),
            ("labels", labels, 1),
            ("class_embeddings", class_embeddings, 2),
        )
    )
    for name, number, least in (("ridge", ridge, 0.0), ("scale", scale, -math.inf)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not least < number < math.inf:
            raise ValueError(f"{name}: expected a finite number{' above 0' * (least == 0)}, got {number!r}")
    dtype, work, half = attributes.dtype, compute_dtype(attributes.dtype), count // 2
    with autocast_off(attributes):
        (X, of_X), (E, of_E) = confined(attributes.to(work), 2), confined(class_embeddings.to(work), 2)
        own = labels.unsqueeze(-1) == torch.arange(E.shape[-2], device=labels.device)
        Y = own.to(work) @ E
        A, B = (X[..., :half, :], Y[..., :half, :]), (X[..., half:, :], Y[..., half:, :])
        # each half is predicted by what was fitted to the other
        predicted = torch.cat([A[0] @ _ridge_regression(*B, ridge), B[0] @ _ridge_regression(*A, ridge)], -2)
        logs = (scale * (predicted @ E.mT)).log_softmax(-1)
        return (of_X + of_E - torch.where(own, logs, 0).sum(-1).mean(-1)).to(dtype)


def _ridge_regression(X: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """``W = X^T (X X^T + ridge I)^-1 Y``, by the smaller of the two systems that give it."""
    rows, columns = X.shape[-2:]
    wide = rows <= columns
    system = (X @ X.mT if wide else X.mT @ X) + ridge * torch.eye(min(rows, columns), dtype=X.dtype, device=X.device)
    right = Y if wide else X.mT @ Y
    # the columns of the right-hand side go in front of all batch dimensions, where they share a factor
    right = right.expand(*torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2]), *right.shape[-2:])
    solved = linear_solve(system, right.movedim(-1, 0), solver=Cholesky(), on_failure="ignore").movedim(0, -1)
    return X.mT @ solved if wide else solved


def _check_labels(labels: Tensor, attributes: Tensor, classes: int) -> None:
    """Refuses labels that do not fit; reads one flag."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected a tensor of integers, got {what}")
    count = attributes.shape[-2]
    if tuple(labels.shape[-1:]) != (count,):
        raise ValueError(
            f"labels: expected {count} in the last dimension, one for each row of attributes, "
            f"got shape {tuple(labels.shape)}"
        )
    if labels.device != attributes.device:
        raise ValueError(f"labels: expected device {attributes.device} as of attributes, got {labels.device}")
    if torch.compiler.is_compiling() or labels.is_meta:
        return
    plain = physical(labels)
    if plain.numel() and bool((plain < 0).any() | (plain >= classes).any()):
        raise ValueError(
            f"labels: expected 0 to {classes - 1}, one row of class_embeddings each, "
            f"got {int(plain.min())} to {int(plain.max())}"
        )
