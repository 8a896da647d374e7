r"""Training a learned proximal network: l1 first, then proximal matching with a width that shrinks in stages."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor

from ._proximal_matching import proximal_matching_loss

Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class MatchingStage:
    """One stage of :func:`train_proximal`.

    Args:
        steps: Number of optimiser steps, at least 1.
        learning_rate: That of Adam, positive.
        gamma: Width of the proximal matching loss. None: the mean absolute error.
    """

    steps: int
    learning_rate: float
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma: expected None or a positive number, got {self.gamma}")


@dataclass(frozen=True)
class MatchingSchedule:
    """The stages of :func:`train_proximal`, in order: any, or one of the recipes below.

    Args:
        stages: At least one.
    """

    stages: tuple[MatchingStage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: expected at least one, got none")

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @staticmethod
    def paper(size: int, *, steps: int = 40_000) -> MatchingSchedule:
        """The paper's recipe for images: half of the steps in l1, then four widths, each half of the one before.

        Args:
            size: Numbers in one sample (pixels times channels); the last width is ``0.08 * sqrt(size)``.
            steps: Steps in all, at least 8.
        """
        if steps < 8:
            raise ValueError(f"steps: expected at least 8, got {steps}")
        quarter = steps // 8
        last = 0.08 * math.sqrt(size)
        return MatchingSchedule(
            (
                MatchingStage(steps=steps - 4 * quarter, learning_rate=1e-3),
                *(MatchingStage(steps=quarter, learning_rate=1e-4, gamma=last * 2 ** (3 - i)) for i in range(4)),
            )
        )

    @staticmethod
    def paper_scalar() -> MatchingSchedule:
        """The paper's recipe for one-dimensional data of unit scale, 44,000 steps."""
        plan = [
            *((10_000, 1e-3, None), (10_000, 1e-4, None), (2_000, 1e-3, 0.5), (2_000, 1e-4, 0.5), (4_000, 1e-4, 0.4)),
            *((4_000, 1e-4, 0.3), (4_000, 1e-5, 0.2), (4_000, 1e-5, 0.1), (4_000, 1e-6, 0.1)),
        ]
        return MatchingSchedule(tuple(MatchingStage(steps=n, learning_rate=lr, gamma=g) for n, lr, g in plan))

    @staticmethod
    def fast_scalar() -> MatchingSchedule:
        """A recipe for one-dimensional data of unit scale in 4,200 steps; a small network takes seconds."""
        plan = [
            *((1_500, 3e-3, None), (300, 1e-3, None)),
            *((400, 1e-3, g) for g in (0.5, 0.4, 0.3, 0.2, 0.1)),
            (400, 2e-4, 0.1),
        ]
        return MatchingSchedule(tuple(MatchingStage(steps=n, learning_rate=lr, gamma=g) for n, lr, g in plan))


@dataclass(frozen=True)
class TrainingRecord:
    """What came of :func:`train_proximal`.

    Attributes:
        losses: ``(steps)`` loss of every step, those before a resumption too; stages have losses of their own.
        schedule: The schedule that was followed.
        seconds: Wall-clock time of this call.
    """

    losses: Tensor
    schedule: MatchingSchedule
    seconds: float


def train_proximal(
    model: nn.Module,
    data: Tensor | Sampler,
    *,
    noise_std: float | tuple[float, float],
    schedule: MatchingSchedule | None = None,
    batch_size: int = 64,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
) -> TrainingRecord:
    r"""Trains `model`, in place, to be the prox of the data's negative log density, from clean samples alone.

    Every step draws clean samples x and adds Gaussian noise of standard deviation sigma; where ``model(x + noise)``
    minimises the proximal matching loss of a narrow width, it is the prox of :math:`-\sigma^2 \log p`. Adam, with one
    learning rate and one loss for each stage of the schedule.

    Args:
        model: A :class:`LearnedProximal`, or any denoiser. It is trained on the device of its parameters.
        data: Clean samples ``(count, event...)`` to draw from with replacement, or ``sampler(count, generator)`` that
            returns fresh ones; random numbers of a sampler must come from the generator it is given, which lives on the
            device of the model.
        noise_std: Standard deviation sigma of the noise, or a range ``(low, high)`` to draw one from in every step.
        schedule: Stages. None: ``MatchingSchedule.paper``, the paper's recipe for images.
        batch_size: Samples in one step.
        seed: Of the generator that draws samples and noise.
        checkpoint: File that is written every `checkpoint_every` steps and at the end, and from which training goes on
            if it exists: the numbers are the same, to the bit, as those of a run without interruption.
        checkpoint_every: Steps between two checkpoints.
        progress: Show a progress bar.

    Returns:
        The losses of all steps.

    Raises:
        ValueError: For bad arguments; a checkpoint of another schedule, seed, batch size or noise.
        FloatingPointError: Where the loss is not a number; the last checkpoint is left as it is.

    Example:
        >>> import torch
        >>> from difflayers.proximal import InputConvexNetwork, LearnedProximal, MatchingSchedule, MatchingStage
        >>> prox = LearnedProximal(InputConvexNetwork(1, hidden=8))
        >>> schedule = MatchingSchedule((MatchingStage(steps=3, learning_rate=1e-3),))
        >>> record = train_proximal(prox, torch.randn(100, 1), noise_std=0.5, schedule=schedule, progress=False)
        >>> record.losses.shape
        torch.Size([3])

    Source: Z. Fang, S. Buchanan, J. Sulam, What's in a Prior? Learned Proximal Networks for Inverse Problems, ICLR
    2024, section 3 and appendix (schedules).
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ValueError(f"model: expected a module with parameters, got {type(model).__name__} without any")
    for name, value in (("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    low, high = noise_std if isinstance(noise_std, tuple) else (noise_std, noise_std)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"noise_std: expected a positive number or a range of them, got {noise_std}")
    draw = _sampler(data, like)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    if schedule is None:
        probe = torch.Generator(device=like.device).manual_seed(seed)  # the run's own draws nothing for this
        schedule = MatchingSchedule.paper(draw(1, probe)[0].numel())
    run = _Run(model, schedule, draw, (low, high), batch_size, generator, like)
    settings = {"schedule": asdict(schedule), "noise_std": [low, high], "batch_size": batch_size, "seed": seed}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.restore(_matching(torch.load(path, map_location="cpu", weights_only=True), settings, path))
    start, before = time.perf_counter(), model.training
    model.train()
    try:
        run.to_the_end(path, settings, checkpoint_every, progress)
    finally:
        model.train(before)
    return TrainingRecord(run.losses.cpu(), schedule, time.perf_counter() - start)


def _sampler(data: Tensor | Sampler, like: Tensor) -> Sampler:
    """Fresh samples on the model's device, in its dtype."""
    if not isinstance(data, Tensor):
        if not callable(data):
            raise ValueError(f"data: expected a tensor or a sampler, got {type(data).__name__}")
        sampler = data

        def checked(count: int, generator: torch.Generator) -> Tensor:
            x = check_tensor("data (sampled)", sampler(count, generator), min_ndim=1)
            check_shape("data (sampled)", x.shape[:1], (count,), " in its first dimension")
            return x.to(like)

        return checked
    samples = check_tensor("data", data, min_ndim=1).detach()
    if not samples.shape[0]:
        raise ValueError("data: expected at least one sample, got none")

    def drawn(count: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(samples.shape[0], (count,), generator=generator, device=like.device)
        return samples[index.to(samples.device)].to(like)

    return drawn


def _matching(state: dict[str, Any], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state of a checkpoint, if it is one of the same run."""
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"checkpoint: expected a file that train_proximal wrote, got another in {path}")
    for name, value in settings.items():
        found = state["settings"].get(name)
        if found != value:
            raise ValueError(f"checkpoint: expected one written with {name}={value}, got {found} in {path}")
    return state


@dataclass
class _Run:
    """A training run that can be stopped after any step and taken up again."""

    model: nn.Module
    schedule: MatchingSchedule
    draw: Sampler
    noise_range: tuple[float, float]
    batch_size: int
    generator: torch.Generator
    like: Tensor
    done: int = 0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(p for p in self.model.parameters() if p.requires_grad)
        self.losses = self.like.detach().new_zeros(self.schedule.steps, dtype=torch.float32)

    def state(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything the next step depends on."""
        state = {
            "settings": settings,
            "done": self.done,
            "losses": self.losses[: self.done].cpu(),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
        }
        if self.like.is_cuda:
            state["cuda_generator"] = torch.cuda.get_rng_state(self.like.device)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state."""
        self.done = state["done"]
        self.losses[: self.done] = state["losses"].to(self.losses)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if self.like.is_cuda and "cuda_generator" in state:
            torch.cuda.set_rng_state(state["cuda_generator"], self.like.device)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Writes a checkpoint; an interruption leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(self.state(settings), unfinished)
        os.replace(unfinished, path)

    def to_the_end(self, path: Path | None, settings: dict[str, Any], every: int, progress: bool) -> None:
        """The steps that are left."""
        from tqdm import tqdm

        plan: Sequence[MatchingStage] = [stage for stage in self.schedule.stages for _ in range(stage.steps)]
        with tqdm(total=len(plan), initial=self.done, disable=not progress, mininterval=0.5) as bar:
            for k in range(self.done, len(plan)):
                self.step(plan[k])
                bar.update()
                save = path is not None and (self.done % every == 0 or self.done == len(plan))
                if save or self.done % 100 == 0 or self.done == len(plan):  # the only read-backs
                    loss = self.losses[self.done - 1].item()
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"the loss is {loss} after {self.done} steps: lower the learning rate")
                    name = "l1" if plan[k].gamma is None else f"matching at {plan[k].gamma:.3g}"
                    bar.set_postfix_str(f"{name}: {loss:.4f}", refresh=False)
                if save and path is not None:
                    self.save(path, settings)

    def step(self, stage: MatchingStage) -> None:
        """One step of Adam on fresh noise."""
        for group in self.optimiser.param_groups:
            group["lr"] = stage.learning_rate
        clean = self.draw(self.batch_size, self.generator)
        low, high = self.noise_range
        random: dict[str, Any] = {"generator": self.generator, "device": clean.device, "dtype": clean.dtype}
        sigma: float | Tensor = low
        if high > low:
            sigma = low + (high - low) * torch.rand((), **random)
        output = self.model(clean + sigma * torch.randn(clean.shape, **random))
        check_shape("model output", output.shape, clean.shape, " as its input has")
        if stage.gamma is None:
            loss = (output - clean).abs().mean()
        else:
            loss = proximal_matching_loss(output, clean, stage.gamma)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses[self.done] = loss.detach()
        self.done += 1
