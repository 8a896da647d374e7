"""Training a dual proxy: no labels, only the bound itself, which is made as high as it gets."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from difflayers._checks import check_shape

from ._completion import Completion
from ._dual_proxy import DualProxy


@dataclass(frozen=True, eq=False)
class DualInstances:
    """Instances of one conic program: what :func:`train_dual_proxy` learns from.

    Tensors have the instances in their first dimension, or are shared by all (as many dimensions as one instance has).
    Indexing gives the instances picked.

    Args:
        features: ``(count, ...)`` what the network takes: a tensor, or a nested structure of them.
        A: ``(count, m, n)`` or ``(m, n)``.
        b: ``(count, m)`` or ``(m)``.
        c: ``(count, n)`` or ``(n)``.
        completion: Where its data vary between instances, or x is a matrix; None: that of the proxy.
        scale: ``(count)`` positive numbers that the bounds are divided by in the loss, the size of the optimum for
            example. None: 1.

    Example:
        >>> import torch
        >>> from difflayers.conic import DualInstances
        >>> instances = DualInstances(torch.rand(10, 3), torch.rand(2, 4), torch.rand(10, 2), torch.rand(10, 4))
        >>> len(instances[:5]), instances[:5].A.shape
        (5, torch.Size([2, 4]))
    """

    features: Any
    A: Tensor
    b: Tensor
    c: Tensor
    completion: Completion | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        count, k = len(self), 1 if self.completion is None else self.completion.ndim
        for name, t, ndim in (("A", self.A, 1 + k), ("b", self.b, 1), ("c", self.c, k)):
            if t.ndim != ndim and (t.ndim != ndim + 1 or t.shape[0] != count):
                raise ValueError(
                    f"{name}: expected {ndim} dimensions, or {count} instances before, got {tuple(t.shape)}"
                )
        if self.scale is not None:
            check_shape("scale", self.scale.shape, (count,))

    def __len__(self) -> int:
        return int(optree.tree_leaves(self.features)[0].shape[0])

    def __getitem__(self, index: Any) -> DualInstances:
        k = 1 if self.completion is None else self.completion.ndim
        pick = lambda t, ndim: t[index] if t.ndim > ndim else t  # noqa: E731
        return DualInstances(
            optree.tree_map(lambda t: t[index], self.features),
            pick(self.A, 1 + k),
            pick(self.b, 1),
            pick(self.c, k),
            None if self.completion is None else self.completion.select(index),
            None if self.scale is None else self.scale[index],
        )

    def to(self, device: torch.device | str) -> DualInstances:
        """The same on another device."""
        move = lambda t: t.to(device)  # noqa: E731
        return DualInstances(
            optree.tree_map(move, self.features),
            self.A.to(device),
            self.b.to(device),
            self.c.to(device),
            None if self.completion is None else self.completion.to(device),
            None if self.scale is None else self.scale.to(device),
        )


class InstanceSet(Protocol):
    """What :func:`train_dual_proxy` draws from: :class:`DualInstances`, or anything that makes them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> DualInstances:
        """The instances at the integers `index`, on the CPU."""


@dataclass(frozen=True)
class DualTrainingRecord:
    """What came of :func:`train_dual_proxy`, epochs before a resumption included.

    Attributes:
        losses: ``(epochs)`` mean loss over the training set, while the weights moved.
        validation_losses: ``(epochs)`` mean loss over the validation set after each epoch; without one, `losses`.
        learning_rates: ``(epochs)`` that of each epoch.
        best_epoch: Whose weights the proxy has now, counted from 0; -1: those it had before.
        seconds: Wall-clock time of training.
    """

    losses: Tensor
    validation_losses: Tensor
    learning_rates: Tensor
    best_epoch: int
    seconds: float


def train_dual_proxy(
    proxy: DualProxy,
    data: InstanceSet,
    *,
    validation: InstanceSet | None = None,
    epochs: int = 1024,
    batch_size: int = 128,
    lr: float = 1e-4,
    patience: int = 32,
    min_lr: float = 1e-7,
    generator: torch.Generator | None = None,
    max_seconds: float = math.inf,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> DualTrainingRecord:
    r"""Trains `proxy`, in place, to give high bounds: no optimum needs to be known.

    Minimises the mean of ``-L(y) / scale`` by Adam. After `patience` epochs without a lower validation loss the rate is
    halved, and training goes on from the best weights (and Adam's averages of that time). At the end, and if it is
    interrupted, the proxy has the best weights.

    Args:
        proxy: Trained on the device of its parameters.
        data: Instances to learn from, in mini-batches that are shuffled in every epoch.
        validation: Instances that judge an epoch. None: the loss of the epoch itself.
        epochs: Most epochs, those before a resumption included.
        batch_size: Instances in one step.
        lr: First learning rate.
        patience: Epochs without improvement before the rate is halved.
        min_lr: Training ends when the rate falls below.
        generator: On the CPU; shuffles. None: one with seed 0.
        max_seconds: Training stops before an epoch that would probably end after so many seconds of this call.
        checkpoint: File that is written after an epoch, every `checkpoint_seconds` seconds, and at the end, and from
            which training goes on if it exists: the numbers are the same, to the bit, as those of a run without
            interruption.
        checkpoint_seconds: Seconds between two checkpoints, at least.
        progress: Show a progress bar.

    Returns:
        Losses and rates of all epochs.

    Raises:
        ValueError: For bad arguments; a checkpoint of another run: other options, network or program.
        FloatingPointError: Where the loss is not a number or a bound is infinite; the last checkpoint is left as it is.

    Example:
        >>> import torch
        >>> from difflayers.conic import BoxCompletion, DualInstances, DualProxy, NonNegative
        >>> proxy = DualProxy(torch.nn.Linear(4, 2), NonNegative(), BoxCompletion(0.0, 1.0))
        >>> c = torch.rand(100, 4)
        >>> instances = DualInstances(c, torch.rand(2, 4), torch.rand(2), c)
        >>> record = train_dual_proxy(proxy, instances, epochs=3, progress=False)
        >>> record.losses.shape
        torch.Size([3])

    Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, 2024, section 4 and appendix
    (schedule).
    """
    if not isinstance(proxy, DualProxy):
        raise ValueError(f"proxy: expected a DualProxy, got {type(proxy).__name__}")
    like = next((p for p in proxy.parameters() if p.requires_grad), None)
    if like is None:
        raise ValueError("proxy: expected a network with parameters, got one without any")
    for name, value, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1), ("patience", patience, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    for name, number in (("lr", lr), ("min_lr", min_lr), ("max_seconds", max_seconds)):
        if not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    for name, instances in (("data", data), ("validation", validation)):
        if instances is not None and not len(instances):
            raise ValueError(f"{name}: expected at least one instance, got none")
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    path = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {"batch_size": batch_size, "lr": lr, "patience": patience, "instances": len(data)}
    if path is not None:
        settings["weights"] = {name: list(t.shape) for name, t in proxy.state_dict().items()}
        if isinstance(data, DualInstances):  # others are made when asked
            settings["program"] = _fingerprint(proxy, data)
    run = _Run(proxy, data, validation, batch_size, patience, generator, like, lr)
    if path is not None and path.exists():
        run.restore(_matching(path, settings))
    before = proxy.training
    try:
        run.to_the_end(epochs, min_lr, max_seconds, path, settings, checkpoint_seconds, progress)
    finally:
        proxy.load_state_dict(run.best["model"])
        proxy.train(before)
    losses, judged, rates = torch.tensor(run.history, dtype=torch.float64, device="cpu").reshape(-1, 3).unbind(-1)
    return DualTrainingRecord(losses, judged, rates, run.best_epoch, run.seconds)


def _fingerprint(proxy: DualProxy, data: DualInstances) -> str:
    """Of cone, completion and the first instances: data of the same size may be of another program."""
    few = data[torch.arange(min(len(data), 16), device="cpu")]
    completion = few.completion or proxy.completion
    fields = {} if completion is None else vars(completion)
    numbers = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
    words = f"{proxy.cone} {proxy.projection} {type(completion).__name__} {numbers}"
    found = hashlib.blake2b(words.encode(), digest_size=16)
    held: Any = [few.features, few.A, few.b, few.c, few.scale, *fields.values()]
    for t in filter(torch.is_tensor, optree.tree_leaves(held)):
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _matching(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint, if it is one of the same run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError):
        state = None
    if not isinstance(state, dict) or not {"settings", "now", "best", "generator"} <= state.keys():
        raise ValueError(f"checkpoint: expected a file that train_dual_proxy wrote, got another in {path}")
    for name, value in settings.items():
        found = state["settings"].get(name, value)  # what an older file does not have
        if found != value:
            which = f"the same {name}" if name in ("weights", "program") else f"{name}={value}, got {found}"
            raise ValueError(f"checkpoint: expected one written with {which} in {path}")
    return state


@dataclass
class _Run:
    """A training run that can be stopped after any epoch and taken up again."""

    proxy: DualProxy
    data: InstanceSet
    validation: InstanceSet | None
    batch_size: int
    patience: int
    generator: torch.Generator
    like: Tensor
    lr: float
    history: list[tuple[float, float, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_loss: float = math.inf
    stale: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam((p for p in self.proxy.parameters() if p.requires_grad), lr=self.lr)
        self.best = self.weights()

    def weights(self) -> dict[str, Any]:
        """Copies of the network's weights and Adam's averages."""
        return copy.deepcopy({"model": self.proxy.state_dict(), "optimiser": self.optimiser.state_dict()})

    def state(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything the next epoch depends on."""
        state = {
            "settings": settings,
            "now": self.weights(),
            "best": self.best,
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            **{name: getattr(self, name) for name in ("history", "best_epoch", "best_loss", "stale", "lr", "seconds")},
        }
        if self.like.is_cuda:
            state["cuda_generator"] = torch.cuda.get_rng_state(self.like.device)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state."""
        self.proxy.load_state_dict(state["now"]["model"])
        self.optimiser.load_state_dict(state["now"]["optimiser"])
        self.best = state["best"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        for name in ("history", "best_epoch", "best_loss", "stale", "lr", "seconds"):
            setattr(self, name, state[name])
        if self.like.is_cuda and "cuda_generator" in state:
            torch.cuda.set_rng_state(state["cuda_generator"], self.like.device)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Writes a checkpoint; an interruption leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(self.state(settings), unfinished)
        os.replace(unfinished, path)

    def to_the_end(
        self,
        epochs: int,
        min_lr: float,
        max_seconds: float,
        path: Path | None,
        settings: dict[str, Any],
        checkpoint_seconds: float,
        progress: bool,
    ) -> None:
        """The epochs that are left."""
        from tqdm import tqdm

        steps = -(-len(self.data) // self.batch_size)
        start, before, saved, longest = time.perf_counter(), self.seconds, time.perf_counter(), 0.0
        with tqdm(
            total=epochs * steps, initial=len(self.history) * steps, disable=not progress, mininterval=0.5
        ) as bar:
            while len(self.history) < epochs and self.lr >= min_lr:
                began = time.perf_counter()
                if began - start + longest > max_seconds:
                    break
                loss = self.epoch(bar)
                judged = loss if self.validation is None else self.judge()
                if not math.isfinite(loss + judged):
                    raise FloatingPointError(
                        f"the loss is {loss}, {judged} in validation, in epoch {len(self.history)}: lower the learning "
                        "rate; infinite bounds come from completions that do not bound every variable"
                    )
                self.history.append((loss, judged, self.lr))
                self.react(judged)
                now = time.perf_counter()
                longest, self.seconds = max(longest, now - began), before + now - start
                bar.set_postfix_str(f"loss {judged:.5g}, best {self.best_loss:.5g}, rate {self.lr:.1e}", refresh=False)
                if path is not None and now - saved >= checkpoint_seconds:
                    self.save(path, settings)
                    saved = time.perf_counter()
        if path is not None:
            self.save(path, settings)

    def react(self, judged: float) -> None:
        """Keeps the best weights, or goes back to them with half the rate."""
        if judged < self.best_loss:
            self.best_loss, self.best_epoch, self.stale, self.best = judged, len(self.history) - 1, 0, self.weights()
            return
        self.stale += 1
        if self.stale == self.patience:
            self.stale, self.lr = 0, self.lr / 2
            self.proxy.load_state_dict(self.best["model"])
            self.optimiser.load_state_dict(self.best["optimiser"])

    def epoch(self, bar: Any) -> float:
        """Every instance once, in random order; the loss is read once."""
        self.proxy.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        order = torch.randperm(len(self.data), generator=self.generator, device="cpu")
        total = torch.zeros((), dtype=torch.float64, device=self.like.device)
        for index in order.split(self.batch_size):
            loss = self.loss(self.data[index])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += loss.detach() * len(index)
            bar.update()
        return float(total) / len(self.data)

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss over the validation set."""
        assert self.validation is not None
        self.proxy.eval()
        parts = torch.arange(len(self.validation), device="cpu").split(self.batch_size)
        total = sum(self.loss(self.validation[index]) * len(index) for index in parts)
        return float(total) / len(self.validation)

    def loss(self, instances: DualInstances) -> Tensor:
        """The mean of the negative bounds, each over its scale."""
        i = instances.to(self.like.device)
        bound = self.proxy(i.features, i.A, i.b, i.c, completion=i.completion).bound
        return -(bound if i.scale is None else bound / i.scale).mean()
