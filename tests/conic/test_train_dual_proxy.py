"""Training dual proxies.

Oracles: the optimum by bisection, which no bound may exceed; a run without interruption; a schedule by hand.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from difflayers.conic import (
    BoxCompletion,
    DualInstances,
    DualProxy,
    NonNegative,
    sample_knapsack,
    sample_production_planning,
    train_dual_proxy,
)
from tests.conic.dual_blocks import network


def planning(count: int, seed: int) -> DualInstances:
    of = sample_production_planning(count, items=3, generator=torch.Generator().manual_seed(seed))
    features = (of.features.log() - 2) / 2
    return DualInstances(features, of.A, of.b, of.c, scale=2 * (of.ordering * of.holding).sqrt().sum(-1))


class Exp(nn.Module):
    """Multipliers span decades."""

    def forward(self, x):
        return (3 * x).exp()


def proxy_for_planning(seed: int = 0) -> DualProxy:
    of = sample_production_planning(1, items=3)
    return DualProxy(nn.Sequential(network(10, 1, seed), Exp()), NonNegative(), of.completion)


def optima(of: DualInstances) -> np.ndarray:
    """By bisection on the slope of the concave bound."""
    A, b, c = (t.double() for t in (of.A, of.b, of.c))
    d, e, rho, v = c[:, :3], c[:, 3:], -A[:, 0, :3], -b
    low, high = torch.zeros(len(of), 1).double(), torch.full((len(of), 1), 1e9).double()
    for _ in range(200):
        middle = (low + high) / 2
        rising = (rho * (e / (d + rho * middle)).sqrt()).sum(-1, keepdim=True) > v
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return (-v * high + 2 * (e * (d + rho * high)).sqrt().sum(-1, keepdim=True)).squeeze(-1).numpy()


def test_training_closes_the_gap():
    data, validation = planning(1024, 1), planning(256, 2)
    proxy = proxy_for_planning()
    best = optima(validation)

    def gap():
        with torch.no_grad():
            bound = proxy(validation.features, validation.A, validation.b, validation.c).bound.numpy()
        assert (bound <= best * (1 + 1e-9)).all()
        return ((best - bound) / best).mean()

    before = gap()
    record = train_dual_proxy(
        proxy, data, validation=validation, epochs=60, batch_size=64, lr=1e-2, patience=4, progress=False
    )
    assert gap() < 0.01 < 0.1 < before
    assert record.losses.shape == record.validation_losses.shape == record.learning_rates.shape
    assert record.best_epoch == int(record.validation_losses.argmin())
    assert record.learning_rates[-1] < record.learning_rates[0] == 1e-2
    with torch.no_grad():
        bound = proxy(validation.features, validation.A, validation.b, validation.c).bound
    mean = -float((bound / validation.scale).mean())
    assert mean == pytest.approx(float(record.validation_losses.min()), rel=1e-6)  # it has the best weights


def test_rate_is_halved_after_stale_epochs_until_the_least():
    """A frozen loss: without an effect of the weights nothing improves after the first epoch."""
    proxy = DualProxy(network(3, 2), NonNegative(), BoxCompletion(0.0, 1.0))
    data = DualInstances(torch.rand(10, 3), torch.zeros(2, 4), torch.zeros(2), torch.ones(10, 4))
    record = train_dual_proxy(proxy, data, epochs=50, lr=0.8, patience=2, min_lr=0.15, progress=False)
    assert record.learning_rates.tolist() == [0.8] * 3 + [0.4] * 2 + [0.2] * 2
    assert record.best_epoch == 0


class Interrupts:
    """Instances that end the program at one of many calls."""

    def __init__(self, data: DualInstances, call: int) -> None:
        self.data, self.left = data, call

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.data[index]


def weights(proxy: DualProxy) -> torch.Tensor:
    return nn.utils.parameters_to_vector(proxy.parameters()).detach()


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    data, validation = planning(100, 3), planning(40, 4)
    options = {"validation": validation, "epochs": 9, "batch_size": 32, "lr": 0.05, "patience": 3, "progress": False}
    straight = proxy_for_planning()
    expected = train_dual_proxy(straight, data, **options)
    path = tmp_path / "run" / "checkpoint.pt"
    proxy = proxy_for_planning()
    with pytest.raises(KeyboardInterrupt):
        train_dual_proxy(proxy, Interrupts(data, 4 * 5 + 2), **options, checkpoint=path, checkpoint_seconds=0)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]) == 5 and saved["stale"] > 0
    judged = torch.tensor([h[1] for h in saved["history"]])
    with torch.no_grad():
        v = validation
        now = -float((proxy(v.features, v.A, v.b, v.c).bound / v.scale).mean())
    assert now == pytest.approx(float(judged.min()), rel=1e-6)  # the best so far, also after the interruption
    other = proxy_for_planning(seed=5)
    record = train_dual_proxy(other, data, **options, checkpoint=path)
    assert torch.equal(weights(other), weights(straight))
    assert torch.equal(record.losses, expected.losses)
    assert torch.equal(record.validation_losses, expected.validation_losses)
    assert torch.equal(record.learning_rates, expected.learning_rates)
    again = train_dual_proxy(proxy_for_planning(seed=6), data, **options, checkpoint=path)  # nothing is left to do
    assert torch.equal(again.losses, expected.losses)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    data, path = planning(20, 5), tmp_path / "c.pt"
    train_dual_proxy(proxy_for_planning(), data, epochs=1, lr=1e-2, progress=False, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint: expected one written with lr=0\.5, got 0\.01"):
        train_dual_proxy(proxy_for_planning(), data, epochs=1, lr=0.5, progress=False, checkpoint=path)
    options = {"epochs": 1, "lr": 1e-2, "progress": False, "checkpoint": path}
    with pytest.raises(ValueError, match="checkpoint: expected one written with the same program"):
        train_dual_proxy(proxy_for_planning(), planning(20, 6), **options)
    with pytest.raises(ValueError, match="checkpoint: expected one written with the same weights"):
        train_dual_proxy(DualProxy(nn.Linear(data.features.shape[-1], 1), NonNegative()), data, **options)
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="checkpoint: expected a file that train_dual_proxy wrote"):
        train_dual_proxy(proxy_for_planning(), data, **options)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match="checkpoint: expected a file that train_dual_proxy wrote"):
        train_dual_proxy(proxy_for_planning(), data, **options)


def test_time_limit_ends_training_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    """With a clock of our own: each look at it takes a second."""
    import difflayers.conic._train_dual_proxy as module

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls):
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(module, "time", Clock)
    data, path = planning(20, 6), tmp_path / "c.pt"
    options = {"lr": 1e-2, "progress": False, "checkpoint": path, "checkpoint_seconds": math.inf}
    first = train_dual_proxy(proxy_for_planning(), data, epochs=100, max_seconds=20.0, **options)
    assert 3 <= len(first.losses) <= 20 and first.seconds <= 20
    assert path.exists()
    second = train_dual_proxy(proxy_for_planning(), data, epochs=len(first.losses) + 2, **options)
    assert len(second.losses) == len(first.losses) + 2 and second.seconds > first.seconds
    assert torch.equal(second.losses[: len(first.losses)], first.losses)


def test_an_infinite_bound_ends_training_and_keeps_the_weights():
    proxy = DualProxy(network(3, 2), NonNegative(), BoxCompletion(0.0, math.inf))
    before = weights(proxy)
    data = DualInstances(torch.rand(10, 3), -torch.ones(2, 4), torch.zeros(2), -torch.ones(10, 4))
    with pytest.raises(FloatingPointError, match="do not bound every variable"):
        train_dual_proxy(proxy, data, epochs=3, progress=False)
    assert torch.equal(weights(proxy), before)


def test_sets_may_be_made_when_asked_for():
    """Instances that are put together from raw data a batch at a time give the same numbers."""
    of = sample_knapsack(50, constraints=2, items=6, generator=torch.Generator().manual_seed(7))
    made = lambda of: DualInstances(of.features / 1000, of.A, of.b, of.c, scale=of.prices.sum(-1))  # noqa: E731

    class Lazy:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            return made(of._replace(**{k: v[index] for k, v in of._asdict().items()}))

    runs = []
    for data in (made(of), Lazy()):
        proxy = DualProxy(network(20, 2), NonNegative(), of.completion)
        runs.append(train_dual_proxy(proxy, data, epochs=3, batch_size=16, lr=1e-2, progress=False).losses)
    assert torch.equal(*runs)


def test_progress_bar_shows_the_loss(capsys):
    train_dual_proxy(proxy_for_planning(), planning(20, 8), epochs=2, lr=1e-2)
    assert "loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs: expected at least 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"patience": 0}, "patience: expected at least 1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"max_seconds": math.nan}, "max_seconds: expected a positive number"),
        ({"validation": planning(0, 1)}, "validation: expected at least one instance"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_dual_proxy(proxy_for_planning(), planning(4, 1), progress=False, **options)
    with pytest.raises(ValueError, match="proxy: expected a network with parameters"):
        train_dual_proxy(DualProxy(nn.Identity(), NonNegative()), planning(4, 1), progress=False)
