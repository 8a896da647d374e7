"""A head that is trained to its global optimum inside the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor
from difflayers._solution import OnFailure, check_policy

from ._convex_relu import ConeMethod, convex_relu
from ._gated_relu import convex_gated_relu
from ._gated_solver import FISTA
from ._gates import Gates
from ._losses import Loss, Squared
from ._relu_solution import ConvexReLUSolution, predict


class ConvexReLUHead(nn.Module):
    """Trains a two-layer ReLU network on a training set to the global optimum, and predicts on queries.

    ``forward(X_train, y_train, X_query, sample_weight=None)`` solves :func:`convex_gated_relu`, or :func:`convex_relu`
    without the fixed gates, and applies the trained network. Gradients flow through the training: to the features (so
    to the network that made them), the labels, the sample weights, the queries, and to beta where it is learned.

    Args:
        beta: Weight decay, more than 0; the loss is a sum over the training set.
        gates: :class:`Gates`, or their vectors ``(P, d)``: a buffer. With a bias they have one entry more than the
            features, the last.
        gated: Neurons are linear where their gate is open (the cheaper problem, and a smoother one); if False they are
            ReLU units whose patterns on the training set are those of the gates.
        learn_beta: Make the logarithm of beta a parameter.
        bias: Append a column of ones to all features.
        multi_output: Labels have a last dimension of outputs, each with its own neurons.
        loss: As for :func:`convex_gated_relu` or :func:`convex_relu`.
        solver: As for :func:`convex_gated_relu` or :func:`convex_relu`.
        on_failure: As for :func:`convex_gated_relu`.

    Shape:
        Training features ``(*batch, n, d)``; labels ``(*batch, n)``, or ``(*batch, n, c)`` of several outputs; queries
        ``(*batch, m, d)``; weights ``(*batch, n)``. Predictions ``(*batch, m)`` or ``(*batch, m, c)``. Messages about
        the training set call it X and y, as :func:`convex_gated_relu` does.

    Differentiable in all inputs and parameters, to any order, with the gates' patterns held. Kinks of ReLU units that
    lie on training points move with them. At a beta above :func:`beta_max` the network is zero and passes no gradient:
    training that starts there does not move.

    Example:
        >>> import torch
        >>> from difflayers.relu import ConvexReLUHead
        >>> gates = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> head = ConvexReLUHead(0.1, gates)
        >>> features = torch.randn(10, 3, requires_grad=True)
        >>> prediction = head(features, torch.randn(10), torch.randn(4, 3))
        >>> prediction.shape, torch.autograd.grad(prediction.sum(), features)[0].shape
        (torch.Size([4]), torch.Size([10, 3]))

    Source: A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022, for the
    network; its derivative follows from the optimality conditions.
    """

    gates: Tensor

    def __init__(
        self,
        beta: float,
        gates: Gates | Tensor,
        *,
        gated: bool = True,
        learn_beta: bool = False,
        bias: bool = False,
        multi_output: bool = False,
        loss: Loss | None = None,
        solver: FISTA | ConeMethod | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta: expected more than 0, got {beta}")
        vectors = check_tensor("gates", gates.vectors if isinstance(gates, Gates) else gates)
        if vectors.ndim != 2 or not vectors.numel():
            raise ValueError(f"gates: expected vectors of shape (P, d), got {tuple(vectors.shape)}")
        check_policy(on_failure)
        if solver is not None and not isinstance(solver, FISTA if gated else ConeMethod):
            wanted = "FISTA()" if gated else "InteriorPoint(), ADMM(), AugmentedLagrangian()"
            raise ValueError(f"solver: expected {wanted} or None with gated={gated}, got {solver!r}")
        self.register_buffer("gates", vectors.detach().clone())
        log_beta = vectors.detach().new_full((), math.log(beta))
        self.log_beta = nn.Parameter(log_beta) if learn_beta else None
        self.beta, self.bias, self.loss, self.solver = float(beta), bias, loss or Squared(), solver
        self.gated, self.multi_output = gated, multi_output
        self.on_failure: OnFailure = on_failure

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"beta={self.beta:g}, gates={self.gates.shape[0]}, gated={self.gated}, "
            f"learn_beta={self.log_beta is not None}, bias={self.bias}, multi_output={self.multi_output}, "
            f"loss={self.loss!r}, solver={self.solver!r}, on_failure={self.on_failure!r}"
        )

    def train_network(
        self, X_train: Tensor, y_train: Tensor, sample_weight: Tensor | None = None
    ) -> ConvexReLUSolution:
        """The trained network; of labels with c outputs, ``(*batch, c)`` networks."""
        check_tensor("X", X_train, min_ndim=2)
        check_tensor("y", y_train, min_ndim=1 + self.multi_output)
        if self.multi_output:
            X_train, y_train = X_train.unsqueeze(-3), y_train.mT
            sample_weight = None if sample_weight is None else sample_weight.unsqueeze(-2)
        beta = self.beta if self.log_beta is None else self.log_beta.exp()
        train: Callable[..., ConvexReLUSolution] = convex_gated_relu if self.gated else convex_relu
        return train(
            self._with_bias(X_train),
            y_train,
            beta,
            self.gates,
            sample_weight=sample_weight,
            loss=self.loss,
            solver=self.solver,
            on_failure=self.on_failure,
        )

    def forward(self, X_train: Tensor, y_train: Tensor, X_query: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Predictions on the queries of the network trained on the training set."""
        network = self.train_network(X_train, y_train, sample_weight)
        check_shape("X_query", tuple(check_tensor("X_query", X_query, min_ndim=2).shape[-1:]), X_train.shape[-1:])
        query = self._with_bias(X_query)
        if self.multi_output:
            return predict(network, query.unsqueeze(-3)).mT
        return predict(network, query)

    def _with_bias(self, X: Tensor) -> Tensor:
        return nn.functional.pad(X, (0, 1), value=1.0) if self.bias else X
