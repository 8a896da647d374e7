"""Digits read by their likeness to known ones: the exact sparse code against one step of it, and softmax."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, INK, ORANGE, axes, save
from difflayers.proximal import lasso, prox_l1

WIDTH = 64
KNOWN = 30  # labelled digits of each class
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
TRIALS = 3  # of the noise


# -------------------------------------------------------------------------------------------------------------- models


class Reader(nn.Module):
    """Weighs known digits by their likeness to a new one; each weight is a vote for a label."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.embedding = nn.Linear(64, WIDTH, bias=False)
        self.threshold = nn.Parameter(torch.tensor(threshold).log())
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        return self.scale * self.weights(x, known) @ nn.functional.one_hot(labels, 10).float()

    def embed(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.embedding(x), dim=-1)


class SparseCode(Reader):
    """``argmin_z 1/2 ||x - D z||^2 + threshold * ||z||_1``, with the embedded known digits as columns of D."""

    def weights(self, x: Tensor, known: Tensor) -> Tensor:
        return lasso(self.embed(known).mT, self.embed(x), self.threshold.exp())


class OneStep(Reader):
    """The first step towards it: correlations, shrunk."""

    def weights(self, x: Tensor, known: Tensor) -> Tensor:
        return prox_l1(self.embed(x) @ self.embed(known).mT, self.threshold.exp())


class Attention(Reader):
    """Softmax of the correlations; the threshold is its temperature."""

    def weights(self, x: Tensor, known: Tensor) -> Tensor:
        return (self.embed(x) @ self.embed(known).mT / self.threshold.exp()).softmax(-1)


READERS = {"sparse code": (SparseCode, 0.1), "one step": (OneStep, 0.5), "softmax": (Attention, 0.1)}


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Data:
    """scikit-learn's 8 x 8 digits."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def split(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which training digits are known, and which are to be read."""
        order = torch.randperm(len(self.y_train), generator=generator)
        y = self.y_train[order]
        rank = (nn.functional.one_hot(y, 10).cumsum(0) - 1).gather(1, y[:, None])[:, 0]
        return order[rank < KNOWN], order[rank >= KNOWN]


@dataclass
class Run:
    """What one training run showed."""

    model: Reader
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)  # mean over an epoch
    accuracy: dict[float, float] = field(default_factory=dict)  # by noise
    consulted: float = 0.0  # known digits with a weight, on average


def digits(tiny: bool) -> Data:
    """A fifth of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images / 16, labels, test_size=0.2, random_state=0, stratify=labels
    )
    x, y = ([torch.tensor(a) for a in pair] for pair in ((x_train, x_test), (y_train, y_test)))
    train, test = (500, 64) if tiny else (None, None)
    return Data(x[0][:train].float(), y[0][:train], x[1][:test].float(), y[1][:test])


def train(name: str, data: Data, epochs: int) -> Run:
    """Adam; in every epoch other digits are known."""
    torch.manual_seed(0)
    kind, threshold = READERS[name]
    run = Run(kind(threshold))
    optimiser = torch.optim.Adam(run.model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in (bar := tqdm(range(epochs), desc=f"{name:<12}", unit="epoch")):
        known, unread = data.split(generator)
        losses = []
        for index in unread.split(128):
            votes = run.model(data.x_train[index], data.x_train[known], data.y_train[known])
            loss = score(votes, data.y_train[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        run.loss.append(sum(losses) / len(losses))
        bar.set_postfix(loss=f"{run.loss[-1]:.3f}")
    run.seconds = time.perf_counter() - start
    return run


def score(votes: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(votes, labels)


# ---------------------------------------------------------------------------------------------------------------- test


@torch.no_grad()
def measure(run: Run, data: Data) -> None:
    """Accuracy under noise, and how many known digits have a say."""
    generator = torch.Generator().manual_seed(1)
    known, _ = data.split(generator)
    x, y = data.x_train[known], data.y_train[known]
    for noise in NOISE:
        right = 0.0
        for _ in range(TRIALS):
            seen = data.x_test + noise * torch.randn(data.x_test.shape, generator=generator)
            right += (run.model(seen, x, y).argmax(-1) == data.y_test).float().mean().item() / TRIALS
        run.accuracy[noise] = right
    run.consulted = (run.model.weights(data.x_test, x) != 0).float().sum(-1).mean().item()


@dataclass
class Reading:
    """How one digit was read."""

    digit: Tensor
    label: int
    weights: Tensor  # of the digits that have a say, largest first
    images: Tensor
    labels: Tensor
    change: float  # in the votes, when only these are known


@torch.no_grad()
def read_one(model: Reader, data: Data, index: int) -> Reading:
    """Takes away all known digits without a weight, and reads again."""
    known, _ = data.split(torch.Generator().manual_seed(1))
    digit, x, y = data.x_test[index : index + 1], data.x_train[known], data.y_train[known]
    weights = model.weights(digit, x)[0]
    order = weights.abs().argsort(descending=True)[: int((weights != 0).sum())]
    change = (model(digit, x[order], y[order]) - model(digit, x, y)).abs().max().item()
    return Reading(digit[0], int(data.y_test[index]), weights[order], x[order], y[order], change)


# ------------------------------------------------------------------------------------------------------------- figures


def draw_noise(runs: dict[str, Run], path: Path) -> Path:
    """Accuracy against noise."""
    figure, axis = axes()
    for (name, run), colour in zip(runs.items(), (BLUE, ORANGE, GREY), strict=True):
        axis.plot(run.accuracy.keys(), [100 * a for a in run.accuracy.values()], "o-", ms=3, color=colour, label=name)
    axis.set(title="Test accuracy, %", xlabel="standard deviation of the noise", ylim=(None, 100))
    axis.legend(loc="lower left")
    return save(figure, path)


def draw_consulted(runs: dict[str, Run], path: Path) -> Path:
    """Digits with a say."""
    figure, axis = axes()
    bars = axis.barh(list(runs), [r.consulted for r in runs.values()], color=[BLUE, ORANGE, GREY], height=0.6)
    axis.bar_label(bars, [f"{r.consulted:.0f}" for r in runs.values()], padding=4)
    axis.set(title=f"Known digits with a say, of {10 * KNOWN}", xlim=(0, 11.5 * KNOWN))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    return save(figure, path)


def draw_reading(reading: Reading, path: Path) -> Path:
    """The digit, and those it is made of."""
    count = min(len(reading.weights), 9)
    figure, axis = axes(wide=True, height=1.2)
    axis.remove()
    pictures = [reading.digit, *reading.images[:count]]
    titles = ["new", *(f"{w:+.2f}" for w in reading.weights[:count].tolist())]
    names = ["", *(f"a {label}" for label in reading.labels[:count].tolist())]
    for panel, picture, title, name in zip(
        figure.subplots(1, count + 1, squeeze=False)[0], pictures, titles, names, strict=True
    ):
        panel.imshow(picture.view(8, 8).numpy(), cmap="Greys", vmin=0, vmax=1)
        panel.set_title(title, fontsize=9.5, loc="center", color=BLUE if name else INK)
        panel.set_xlabel(name, fontsize=9.5)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------- chapter

SNIPPET = """
class Reader(nn.Module):
    def forward(self, x, known, labels):
        # known digits are the columns of D
        D, y = self.embed(known).mT, self.embed(x)
        # argmin 1/2 |y - D z|^2 + threshold |z|_1
        z = lasso(D, y, self.threshold.exp())
        # each known digit votes for its label
        return self.scale * z @ one_hot(labels, 10)
"""


@chapter("proximal", title="A layer that chooses", order=20)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    data = digits(settings.tiny)
    runs = {name: train(name, data, 1 if settings.tiny else 6) for name in READERS}
    for r in runs.values():
        measure(r, data)
    reading = read_one(runs["sparse code"].model, data, 3)
    pictures = draw_noise(runs, settings.out / "noise.png"), draw_consulted(runs, settings.out / "consulted.png")
    picture = draw_reading(reading, settings.out / "reading.png")

    print(f"\ntest accuracy on {len(data.y_test)} digits, with {10 * KNOWN} known ones:")
    print("  " + "noise".ljust(12) + "".join(f"{noise:>8.1f}" for noise in NOISE) + "   with a say   training")
    for name, r in runs.items():
        accuracy = "".join(f"{a:>8.1%}" for a in r.accuracy.values())
        print(f"  {name:<12}{accuracy}{r.consulted:>13.1f}{r.seconds:>9.1f} s")
    print(f"without the others, the votes for one digit change by {reading.change:.1e}")
    numbers = {
        name: {"accuracy": list(r.accuracy.values()), "consulted": r.consulted, "loss": r.loss}
        for name, r in runs.items()
    }
    (settings.out / "proximal.json").write_text(json.dumps(numbers | {"change": reading.change}, indent=2))

    code, step, soft = runs.values()
    assert reading.change < 1e-3 and code.consulted < 30 and soft.consulted == 10 * KNOWN
    if not settings.tiny:
        assert code.accuracy[0.0] > 0.94 and step.accuracy[0.0] > 0.92, numbers
        assert code.accuracy[0.3] > max(step.accuracy[0.3], soft.accuracy[0.3]) - 0.05, numbers
        assert code.consulted < min(step.consulted, soft.consulted) / 4, numbers
    return blocks(runs, reading, pictures, picture)


def blocks(runs: dict[str, Run], reading: Reading, pictures: tuple[Path, Path], picture: Path) -> list[Block]:
    """What the page shows."""
    code, step, soft = runs.values()
    return [
        Text(
            "A layer can choose. This one writes a new digit as a combination of as few known digits as possible: it "
            "solves a lasso for every input, and training differentiates through the solution. Only the chosen digits "
            "vote, and the gradient runs through them alone, by one small linear system for each input."
        ),
        Code(SNIPPET),
        Heading("With the inner problem and without"),
        Text(
            f"Three networks with the same parameters read scikit-learn's digits by {10 * KNOWN} known ones. The "
            "sparse code is the minimiser of the lasso. One step is the first step of an algorithm that would get "
            "there: correlations, shrunk by a threshold. Softmax is what attention does. In the sparse code, known "
            f"digits compete: what one explains needs no other. It listens to {code.consulted:.0f} of them, where one "
            f"step listens to {step.consulted:.0f} and softmax to {soft.consulted:.0f}. That is what it buys. In "
            "accuracy the three hardly differ, and a few digits either way are chance: "
            f"{code.accuracy[0.0]:.1%}, {step.accuracy[0.0]:.1%} and {soft.accuracy[0.0]:.1%} of clean digits; "
            f"{code.accuracy[0.3]:.1%}, {step.accuracy[0.3]:.1%} and {soft.accuracy[0.3]:.1%} under noise of 0.3, "
            f"which training did not see. The price: {code.seconds:.1f} s of training instead of {step.seconds:.1f} s."
        ),
        Figure(
            pictures,
            "Accuracy on noisy test digits (training saw none of the noise), and known digits with a weight that is "
            "not zero.",
            "Line chart of test accuracy against noise for three networks, and a bar chart of digits consulted.",
        ),
        Table(
            ("network", "clean", "noise 0.3", "with a say", "training"),
            [
                (n, f"{r.accuracy[0.0]:.1%}", f"{r.accuracy[0.3]:.1%}", f"{r.consulted:.0f}", f"{r.seconds:.1f} s")
                for n, r in runs.items()
            ],
        ),
        Heading("Who had a say?"),
        Text(
            f"A zero is a zero: take away the known digits that were not chosen, and the votes for this "
            f"{reading.label} change by {reading.change:.0e}."
        ),
        Figure(
            (picture,),
            "A new digit, and the known ones with the largest weights.",
            "A handwritten digit beside the known digits that it was composed of, with their weights.",
        ),
    ]
