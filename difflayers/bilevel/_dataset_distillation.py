r"""RCIG: a small set of synthetic data on which networks learn what they would learn from all data.

With the features h of a network linearised at its initial weights, :math:`h(u) + \partial h(u) v`, a fixed random head
:math:`W_0` and a ridge regression W of what is left, :math:`\hat t(u) = (h(u) + \partial h(u) v) W_0 + h(u) W`. On the
synthetic data :math:`x = (U, T)`, with :math:`K = h(U) h(U)^\top / p` and :math:`r = T - (h(U) + \partial h(U) v) W_0`,

.. math:: f(x, v) = \min_W \frac12 \|r - h(U) W\|^2 + \frac{\rho p}2 \|W\|^2 + \frac\delta2 \|v\|^2
    = \frac\rho2 \langle r, (K + \rho I)^{-1} r \rangle + \frac\delta2 \|v\|^2

is a convex quadratic in v. The upper objective is the squared error of :math:`\hat t` on real data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from difflayers._checks import check_same, check_shape, check_tensor
from difflayers._solution import Solution, SolveError, Status
from difflayers.implicit import Implicit
from difflayers.linalg import CG
from difflayers.linalg._autodiff import forward_mode_lock

from ._hypergradient import Adjoint, Hypergradient, hypergradient
from ._method import StepStats, norm
from ._options import check_count, check_number
from ._problem import Bilevel

_BETAS = (0.9, 0.999)


class DatasetDistillation(nn.Module):
    r"""Synthetic data that are trained so that networks trained on them fit real data.

    Solves ``min_x mean over networks of 1/2 |prediction(real) - target|^2`` over synthetic inputs and targets x, where
    each network, linearised at random initial weights, is trained on x. A step draws a network from a pool, trains it a
    little further on x, and moves x along the implicit gradient; networks that are old are replaced by new ones. All of
    the state is in parameters and buffers: ``state_dict()`` resumes to the last bit.

    Args:
        features: Makes a new network without its head each time: a module from ``(N, *shape)`` to ``(N, p)`` with
            weights that are random. It is used in evaluation mode, and has to be twice differentiable: smooth
            activations.
        images: ``(S, *shape)``, where the synthetic inputs start; random real ones, for example.
        labels: ``(S, C)``, where their targets start: centred one-hot rows, for example.
        models: Size of the pool.
        lower_steps: Steps of Adam on the network a step.
        lower_rate: Their length.
        age: Steps of Adam after which a network is replaced.
        ridge: rho, above 0.
        decay: delta, of the weights; above 0, it makes the minimum unique.
        rate: Length of a step (AdaBelief) of the images, and of the labels.
        learn_labels: Labels are trained too.
        adjoint: As in :func:`hypergradient`. None: conjugate gradients, 30 steps at most.
        seed: Of all random numbers. The random state of torch is left alone.

    Attributes:
        images: Parameter.
        labels: Parameter.

    Raises:
        ValueError: For bad input, naming the argument.
        SolveError: In a step whose adjoint system has no solution; nothing but the network drawn has changed then.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import DatasetDistillation
        >>> u = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> t = u.prod(1, keepdim=True).sign()
        >>> def features():
        ...     return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh())
        >>> distillation = DatasetDistillation(features, u[:4], t[:4], rate=0.03)
        >>> losses = [float(distillation.step((u, t)).upper) for _ in range(100)]
        >>> sum(losses[-20:]) < 0.8 * sum(losses[:20])
        True
        >>> images, labels = distillation.dataset()

    Source: N. Loo, R. Hasani, M. Lechner, D. Rus, Dataset Distillation with Convexified Implicit Gradients, 2023,
    algorithm 1.

    Departure: the adjoint system is solved by conjugate gradients instead of Adam at a constant rate, which does not
    converge; the lower objective has a decay, so that its Hessian is definite.
    """

    steps: Tensor
    made: Tensor
    products: Tensor

    def __init__(
        self,
        features: Callable[[], nn.Module],
        images: Tensor,
        labels: Tensor,
        *,
        models: int = 10,
        lower_steps: int = 20,
        lower_rate: float = 1e-2,
        age: int = 300,
        ridge: float = 1e-2,
        decay: float = 1e-2,
        rate: float = 1e-2,
        learn_labels: bool = True,
        adjoint: Adjoint | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_same([("images", check_tensor("images", images, min_ndim=1)), ("labels", check_tensor("labels", labels))])
        if labels.ndim != 2 or len(labels) != len(images) or not labels.numel():
            raise ValueError(f"labels: expected shape ({len(images)}, C), got {tuple(labels.shape)}")
        if not callable(features) or isinstance(features, nn.Module):
            raise ValueError(f"features: expected a function that makes a network, got {type(features).__name__}")
        for name, value in (("lower_rate", lower_rate), ("ridge", ridge), ("decay", decay), ("rate", rate)):
            check_number(name, value)
        self.features, self.seed = features, int(seed)
        self.lower_steps, self.age = check_count("lower_steps", lower_steps), check_count("age", age)
        self.lower_rate, self.rate = float(lower_rate), float(rate)
        self.adjoint = Implicit(CG(rtol=1e-3, max_steps=30)) if adjoint is None else adjoint
        self.images = nn.Parameter(images.detach().clone())
        self.labels = nn.Parameter(labels.detach().clone(), requires_grad=bool(learn_labels))
        for name in ("steps", "made", "products"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=images.device))
        self.pool = nn.Module()
        network, first = self._new_network(0)
        self.linearised = Linearised(network, float(ridge), float(decay))
        self.problem = Bilevel(self.linearised.upper, self.linearised.lower)
        width = self._width(first)
        models = check_count("models", models)
        for name in ("base", "tangent", "mean", "square"):
            self.pool.register_buffer(name, first.new_zeros(models, first.numel()))
        self.pool.register_buffer("head", first.new_zeros(models, width, labels.shape[1]))
        self.pool.register_buffer("ages", torch.zeros(models, dtype=torch.long, device=images.device))
        for k in range(models):
            self._renew(k)
        self.moments = nn.Module()
        for name in ("images", "labels"):
            for moment in ("mean", "square"):
                self.moments.register_buffer(f"{name}_{moment}", torch.zeros_like(self.get_parameter(name).detach()))

    def extra_repr(self) -> str:
        """Sizes and options."""
        models, lower = len(self.pool.get_buffer("ages")), self.linearised
        return f"images={tuple(self.images.shape)}, models={models}, ridge={lower.ridge}, decay={lower.decay}"

    def dataset(self) -> tuple[Tensor, Tensor]:
        """Copies of images and labels."""
        return self.images.detach().clone(), self.labels.detach().clone()

    def step(self, real_batch: tuple[Tensor, Tensor]) -> StepStats:
        """Trains one network of the pool a little, and moves the synthetic data.

        Args:
            real_batch: Inputs ``(N, *shape)`` and targets ``(N, C)``, made like `labels`.

        Returns:
            :class:`StepStats`; ``stationarity`` is the norm of the gradient in images and labels, ``infeasibility``
            that of the lower gradient of the network.
        """
        self._check(real_batch)
        ages = self.pool.get_buffer("ages")
        k = int(torch.randint(len(ages), (), generator=self._generator(2, int(self.steps)), device="cpu"))
        self._train(k)
        result = self.gradient(k, real_batch)
        low = self._lower(k, self.pool.get_buffer("tangent")[k])
        self._descend(result.grad)
        if int(ages[k]) >= self.age:
            self._renew(k)
        self.steps += 1
        self.products += result.products + 1  # and one mixed product
        steps, length, products = int(self.steps), norm(*result.grad.values()), int(self.products)
        gradients = steps * (self.lower_steps + 2)
        return StepStats(steps, result.value, low.detach(), length, result.stationarity, gradients, products)

    def gradient(self, model: int, real_batch: tuple[Tensor, Tensor]) -> Hypergradient:
        """The gradient of the upper objective in images and labels, through one network of the pool as it is.

        Args:
            model: Its number.
            real_batch: As in :meth:`step`.

        Raises:
            SolveError: Where the adjoint system has no solution. That it was not solved to its tolerance is in the
                result alone.
        """
        self._check(real_batch)
        at = self._at(model)
        x = {"images": self.images.detach(), "labels": self.labels.detach()}
        batches = ((*real_batch, *at), at)
        y = self.pool.get_buffer("tangent")[model]
        result = hypergradient(self.problem, x, y, batches, adjoint=self.adjoint, on_failure="ignore")
        if bool(result.failed) or not bool(torch.isfinite(norm(*result.grad.values()))):
            raise SolveError(
                f"DatasetDistillation: the adjoint solve ended as {Status(int(result.status)).name} after "
                f"{int(result.steps)} steps. Likely causes: (a) lower_rate too large for the network, (b) NaN in the "
                "data, (c) decay or ridge below the rounding error",
                Solution(result, result.status, result.steps, result.residual),
            )
        return result

    def _check(self, real_batch: Any) -> None:
        if not isinstance(real_batch, tuple | list) or len(real_batch) != 2:
            raise ValueError(f"real_batch: expected a pair (inputs, targets), got {type(real_batch).__name__}")
        inputs, targets = real_batch
        check_same([("images", self.images), ("real_batch[0]", inputs), ("real_batch[1]", targets)])
        check_shape("real_batch[0]", inputs.shape, (len(inputs), *self.images.shape[1:]))
        check_shape("real_batch[1]", targets.shape, (len(inputs), self.labels.shape[1]))

    def _at(self, k: int) -> tuple[Tensor, Tensor]:
        return self.pool.get_buffer("base")[k], self.pool.get_buffer("head")[k]

    def _lower(self, k: int, tangent: Tensor) -> Tensor:
        x = {"images": self.images.detach(), "labels": self.labels.detach()}
        return self.linearised.lower(x, tangent, self._at(k))

    def _train(self, k: int) -> None:
        """Steps of Adam on the tangent weights of one network."""
        pool, ages = self.pool, self.pool.get_buffer("ages")
        tangent, mean, square = (pool.get_buffer(name)[k].clone() for name in ("tangent", "mean", "square"))
        for t in range(int(ages[k]) + 1, int(ages[k]) + self.lower_steps + 1):
            with torch.enable_grad():
                at = tangent.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._lower(k, at), at)
            mean, square = _moved(mean, slope, _BETAS[0]), _moved(square, slope * slope, _BETAS[1])
            tangent = tangent - self.lower_rate * _direction(mean, square, t)
        for name, value in (("tangent", tangent), ("mean", mean), ("square", square)):
            pool.get_buffer(name)[k] = value
        ages[k] += self.lower_steps

    @torch.no_grad()
    def _descend(self, gradient: dict[str, Tensor]) -> None:
        """AdaBelief: steps are short where the gradient differs from its mean."""
        for name, slope in gradient.items():
            if self.get_parameter(name).requires_grad:
                mean, square = (self.moments.get_buffer(f"{name}_{moment}") for moment in ("mean", "square"))
                mean.copy_(_moved(mean, slope, _BETAS[0]))
                square.copy_(_moved(square, (slope - mean) ** 2, _BETAS[1]))
                self.get_parameter(name).sub_(self.rate * _direction(mean, square, int(self.steps) + 1))

    def _seed(self, kind: int, k: int) -> int:
        """Of the k-th network (0), its head (1), or draw from the pool (2); CPU generators take 32 bits of it."""
        return (1_000_003 * self.seed + 3 * k + kind) % 2**32

    def _generator(self, kind: int, k: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(kind, k))

    def _new_network(self, k: int) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(0, k))
            network = self.features()
        if not isinstance(network, nn.Module) or not list(network.parameters()):
            raise ValueError(f"features: expected a function that makes a module with parameters, got {network!r}")
        network = network.to(self.images).eval().requires_grad_(False)
        return network, torch.cat([p.reshape(-1) for p in network.parameters()])

    @torch.no_grad()
    def _renew(self, k: int) -> None:
        pool, made = self.pool, int(self.made)
        pool.get_buffer("base")[k] = self._new_network(made)[1]
        head = pool.get_buffer("head")
        drawn = torch.randn(head.shape[1:], generator=self._generator(1, made), dtype=head.dtype, device="cpu")
        head[k] = drawn.to(head.device) / math.sqrt(head.shape[1])
        for name in ("tangent", "mean", "square", "ages"):
            pool.get_buffer(name)[k] = 0
        self.made += 1

    def _width(self, base: Tensor) -> int:
        with torch.no_grad():
            h = self.linearised.features(self.images, base)
        if h.ndim != 2 or len(h) != len(self.images):
            raise ValueError(f"features output: expected shape ({len(self.images)}, p), got {tuple(h.shape)}")
        return h.shape[1]


class Linearised:
    """Both objectives, on networks whose weights are a vector.

    Args:
        network: Any of them: what the weights are put into.
        ridge: rho.
        decay: delta.
    """

    def __init__(self, network: nn.Module, ridge: float, decay: float) -> None:
        self.network, self.ridge, self.decay = network, ridge, decay
        named = dict(network.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]

    def features(self, u: Tensor, weights: Tensor) -> Tensor:
        """``h(u)``."""
        parts = zip(self.names, weights.split(self.sizes), self.shapes, strict=True)
        return functional_call(self.network, {name: part.reshape(shape) for name, part, shape in parts}, (u,))

    def outputs(self, u: Tensor, base: Tensor, head: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and outputs without the regression."""
        with forward_mode_lock:
            h, dh = jvp(lambda weights: self.features(u, weights), (base,), (tangent,))
        return h, (h + dh) @ head

    def lower(self, x: dict[str, Tensor], tangent: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The lower objective of a network ``(base, head)``."""
        h, out = self.outputs(x["images"], *batch, tangent)
        r = x["labels"] - out
        return self.ridge / 2 * (r * self._dual(h, r)).sum() + self.decay / 2 * tangent.square().sum()

    def upper(self, x: dict[str, Tensor], tangent: Tensor, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Half the squared error on ``(inputs, targets, base, head)``, of an element on average."""
        u, t, base, head = batch
        h, out = self.outputs(x["images"], base, head, tangent)
        W = h.mT @ self._dual(h, x["labels"] - out) / h.shape[1]
        h_real, out_real = self.outputs(u, base, head, tangent)
        return (out_real + h_real @ W - t).square().sum(-1).mean() / 2

    def _dual(self, h: Tensor, r: Tensor) -> Tensor:
        """``(K + rho I)^{-1} r``."""
        K = h @ h.mT / h.shape[1]
        return torch.linalg.solve(K + self.ridge * torch.eye(len(K), dtype=K.dtype, device=K.device), r)


def _moved(mean: Tensor, value: Tensor, beta: float) -> Tensor:
    return beta * mean + (1 - beta) * value


def _direction(mean: Tensor, square: Tensor, t: int) -> Tensor:
    """Of Adam, without the bias of the first steps."""
    return mean / (1 - _BETAS[0] ** t) / ((square / (1 - _BETAS[1] ** t)).sqrt() + 1e-8)
