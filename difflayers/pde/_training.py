"""A training loop that may be stopped anywhere and taken up again with the same numbers, to the bit."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


@dataclass(frozen=True, eq=False)
class TrainingHistory:
    """What happened in :func:`train`.

    Attributes:
        losses: ``(steps,)`` loss of every step, before its update; in float64 on the CPU, as are the rates.
        learning_rates: ``(steps,)`` learning rate of the first group of parameters in every step.
        seconds: Time of all steps, those before an interruption included.
        resumed: Steps that a checkpoint had done already when this call began.

    Example:
        >>> import torch
        >>> from difflayers.pde import TrainingHistory
        >>> TrainingHistory(torch.ones(3), torch.full((3,), 0.1), 2.0, 0).losses.shape
        torch.Size([3])
    """

    losses: Tensor
    learning_rates: Tensor
    seconds: float
    resumed: int


def train(
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    state: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    max_norm: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> TrainingHistory:
    """Minimises a loss, shows how far it is, and goes on where an earlier call with the same file was stopped.

    A run that was stopped and started again ends with the same numbers, to the bit, as one without interruption.

    Args:
        loss: ``loss(step)`` returns a tensor with one entry, for steps from 0. Random numbers have to come from torch's
            own generator of the CPU or of the parameters' device, from `generator`, or from the number of the step. An
            optimizer that asks several times in one step (``LBFGS``) finds the same random numbers each time.
        optimizer: Of torch. All that it updates is part of the checkpoint.
        steps: How many in all. More than a checkpoint was written for prolongs that run.
        state: What else the run depends on: objects with ``state_dict`` and ``load_state_dict`` by name, such as
            modules with buffers. Give the network here in any case: ``torch.load(checkpoint)["state"]`` has it then.
        scheduler: Of the learning rate, advanced after every step (``ReduceLROnPlateau``: with the loss).
        max_norm: Gradients with a larger Euclidean norm, over all parameters, are scaled down to it.
        checkpoint: File to go on from if it exists; learning rate and other settings of optimizer and scheduler are
            then those of the file. It is written every `every` steps, at the end, and where an exception or Ctrl-C ends
            a step before its update; it is never left half written. Processes of one run need a file each.
        every: Steps between two checkpoints, at least 1.
        generator: A generator from which `loss` draws.
        progress: Show a progress bar.

    Returns:
        The losses of all steps, also of those before an interruption.

    Raises:
        ValueError: For bad arguments; a loss that is not one number or does not depend on the parameters; a checkpoint
            of another run.
        FloatingPointError: Where the loss or its gradient is not finite, naming the step: parameters are those before
            it, and the last checkpoint stays as it is.

    Example:
        >>> import torch
        >>> from difflayers.pde import train
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.LBFGS([x])
        >>> history = train(lambda step: (x - 3).square().sum(), optimizer, 2, progress=False)
        >>> x
        tensor([3., 3.], requires_grad=True)
    """
    for name, value, least in (("steps", steps, 0), ("every", every, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm!r}")
    if state is not None and not isinstance(state, Mapping):
        raise ValueError(f"state: expected a mapping from names to objects, got {type(state).__name__}")
    for name, item in (state or {}).items():
        if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
            raise ValueError(f"state[{name!r}]: expected an object with state_dict, got {type(item).__name__}")
    run = _Run(loss, optimizer, dict(state or {}), scheduler, max_norm, generator)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.restore(path, steps)
    resumed = run.done
    bar: Any = nullcontext()
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, initial=resumed, mininterval=0.5)
    saved = resumed
    with bar:
        try:
            while run.done < steps:
                run.step()
                if progress:
                    bar.update()
                    bar.set_postfix_str(f"loss {run.losses[-1]:.4g}, rate {run.rates[-1]:.2g}", refresh=False)
                if path is not None and (run.done % every == 0 or run.done == steps):
                    run.save(path)
                    saved = run.done
        except FloatingPointError:
            raise
        except BaseException:
            if path is not None and run.whole and run.done > saved:
                run.save(path)
            raise
    losses, rates = torch.tensor([run.losses, run.rates], dtype=torch.float64, device="cpu")
    return TrainingHistory(losses, rates, run.seconds, resumed)


@dataclass
class _Run:
    """A run between two steps, or in one that has not changed anything yet (`whole`)."""

    loss: Callable[[int], Tensor]
    optimizer: torch.optim.Optimizer
    state: dict[str, Any]
    scheduler: Any
    max_norm: float | None
    generator: torch.Generator | None
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    whole: bool = True
    readable: bool = False

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = next((p.device for p in self.parameters if p.device.type != "cpu"), None)
        # one device for all, of which mps alone does not ask which
        self.device: Any = None if device is None else torch.get_device_module(device)
        self.which = () if device is None or device.type == "mps" else (device,)
        self.before = self.random(), self.buffers()

    @property
    def done(self) -> int:
        return len(self.losses)

    def random(self) -> dict[str, Tensor]:
        """States of all generators."""
        found = {"torch": torch.get_rng_state()}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        if self.device is not None:
            found["device"] = self.device.get_rng_state(*self.which)
        return found

    def rewind(self, random: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(random["torch"])
        if self.generator is not None:
            self.generator.set_state(random["generator"])
        if self.device is not None and "device" in random:
            self.device.set_rng_state(random["device"], *self.which)

    def buffers(self) -> dict[str, dict[str, Any]]:
        """Copies of what a forward pass may change: all of the state that the optimizer does not update."""
        own = {p.data_ptr() for p in self.parameters}

        def kept(value: Any) -> bool:
            return not isinstance(value, Tensor) or value.data_ptr() not in own

        states = {name: item.state_dict() for name, item in self.state.items()}
        return {n: {k: copy.deepcopy(v) for k, v in s.items() if kept(v)} for n, s in states.items()}

    def step(self) -> None:
        """One step of the optimizer."""
        start, rate = time.perf_counter(), float(self.optimizer.param_groups[0]["lr"])
        evaluated: list[float] = []

        def closure() -> Tensor:
            if evaluated:
                self.rewind(self.before[0])
            self.optimizer.zero_grad()
            value = self.evaluate()
            evaluated.append(float(value.detach()))
            self.whole = False
            return value

        self.optimizer.step(closure)  # type: ignore[arg-type]
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(evaluated[0])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(evaluated[0])
        self.rates.append(rate)
        self.seconds += time.perf_counter() - start
        self.before = self.random(), self.buffers()
        self.whole = True

    def evaluate(self) -> Tensor:
        """The loss and its gradient, both finite."""
        value = self.loss(self.done)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a tensor with one entry, got {got}")
        if not value.requires_grad:
            raise ValueError("loss: expected a tensor that depends on the parameters, got one without a gradient")
        value = value.reshape(())
        hint = f"in step {self.done}: lower the learning rate, or set max_norm"
        if not math.isfinite(number := float(value.detach())):
            raise FloatingPointError(f"the loss is {number} {hint}")
        value.backward()
        gradients = [g.coalesce().values() if g.is_sparse else g for p in self.parameters if (g := p.grad) is not None]
        if not gradients:
            raise ValueError("loss: expected a tensor that depends on the parameters of the optimizer, got another")
        if not all(g.isfinite().all() for g in gradients):
            raise FloatingPointError(f"the loss is {number:.6g}, but its gradient is not finite, {hint}")
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        return value

    def shapes(self) -> dict[str, Any]:
        """What tells this run from others."""
        names = [n for group in self.optimizer.param_groups for n in group.get("param_names", ())]
        states = {name: item.state_dict() for name, item in self.state.items()}
        return {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "generator": self.generator is not None,
            "names of parameters": names,
            "shapes of parameters": [[*p.shape] for p in self.parameters],
            "dtypes of parameters": [str(p.dtype) for p in self.parameters],
            "names in state": list(states),
            **{
                f"state[{n!r}]": {k: [*v.shape] for k, v in s.items() if isinstance(v, Tensor)}
                for n, s in states.items()
            },
        }

    def save(self, path: Path) -> None:
        """Writes the state at the last step that was done: all of it, or the file stays as it is."""
        random, buffers = self.before
        content = {
            "run": self.shapes(),
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "state": {name: {**item.state_dict(), **buffers[name]} for name, item in self.state.items()},
            "random": random,
            "losses": torch.tensor([self.losses, self.rates], dtype=torch.float64, device="cpu"),
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            torch.save(content, unfinished)
            if not self.readable:  # better now than after the interruption
                _loaded(Path(unfinished), "state: expected tensors, numbers, strings and containers of them")
                self.readable = True
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    def restore(self, path: Path, steps: int) -> None:
        """Goes on from a file."""
        kept = _loaded(path, f"checkpoint: expected a file that train wrote, or none, got {path}")
        found = kept["run"]
        for name, value in self.shapes().items():
            if found.get(name) != value:
                raise ValueError(
                    f"checkpoint: expected one of this run, with {name} {value}, got {found.get(name)} in {path}"
                )
        done = kept["losses"].shape[-1]
        if steps < done:
            raise ValueError(f"steps: expected at least the {done} that the checkpoint has done, got {steps}")
        with torch.no_grad():
            for p, value in zip(self.parameters, kept["parameters"], strict=True):
                p.copy_(value)
        for name, item in self.state.items():
            item.load_state_dict(kept["state"][name])
        self.optimizer.load_state_dict(kept["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(kept["scheduler"])
        self.rewind(kept["random"])
        self.losses, self.rates = kept["losses"].tolist()
        self.seconds = kept["seconds"]
        self.before = self.random(), self.buffers()


def _loaded(path: Path, expected: str) -> dict[str, Any]:
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        return {**kept, "run": kept["run"]}
    except Exception as error:
        raise ValueError(f"{expected} ({error})") from None
