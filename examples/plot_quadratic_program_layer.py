"""Reading digits that nobody labelled: a network that looks at Sudokus, and a quadratic program that knows their rules.

A puzzle of 4 x 4 cells shows photographs of handwritten digits in some cells; the others are blank. The network turns
each photograph into scores for the digits 1 to 4, and a quadratic program fills in the board,

    argmin_x  curvature / 2 ||x||^2 - scores^T x   s.t.  every row, column, box and cell holds each digit once, x >= 0,

with x[cell, digit] between 0 and 1. Training compares the *blank* cells with their solution. Which digit a photograph
shows is never said: that has to come through the rules, as the gradient of the program.

The same network is trained in two ways more. In two stages: on photographs with labels, few or many, and only then put
before the program. And end to end on the same kind of puzzles, for ten times as many steps, but with dense layers where
the program was, which have to learn the rules too.

    python examples/plot_quadratic_program_layer.py [--quick] [--steps 300] [--out out/quadratic_program_layer]

Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, section 4.4.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.conic import QuadraticProgram

SIDE, DIGITS, CELLS = 4, 4, 16
BLANKS = 8
CURVATURE = 0.3
BATCH = 32
LABELS = (1, 2, 5, 20, 100)  # photographs with a label, a digit


# ---------------------------------------------------------------------------------------------------------------- data


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """Pictures of each digit, 8 x 8 pixels: those to learn from, and those to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    learn, test = [], []
    for digit in range(1, DIGITS + 1):
        own = torch.tensor(x[labels == digit] / 16, dtype=torch.float32)
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(digit))]
        learn.append(own[:120])
        test.append(own[120:])
    return learn, test


def units() -> np.ndarray:
    """Rows, columns and boxes as lists of cells."""
    cells = np.arange(CELLS).reshape(SIDE, SIDE)
    boxes = cells.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(SIDE, SIDE)
    return np.concatenate([cells, cells.T, boxes])


def rules() -> tuple[Tensor, Tensor]:
    """Equalities ``A x = 1``: each digit once in every unit, one digit in every cell; independent rows only."""
    rows = []
    for unit, digit in itertools.product(units(), range(DIGITS)):
        row = np.zeros((CELLS, DIGITS))
        row[unit, digit] = 1
        rows.append(row.ravel())
    rows += list(np.kron(np.eye(CELLS), np.ones(DIGITS)))
    kept: list[np.ndarray] = []
    for row in rows:
        if np.linalg.matrix_rank(np.array([*kept, row])) > len(kept):
            kept.append(row)
    return torch.tensor(np.array(kept), dtype=torch.float64), torch.ones(len(kept), dtype=torch.float64)


def boards() -> np.ndarray:
    """All 288 solved boards, ``(288, 16)`` with digits 0 to 3."""
    rows = list(itertools.permutations(range(DIGITS)))
    every = np.array([sum(four, ()) for four in itertools.product(rows, repeat=SIDE)], dtype=np.int8)
    for unit in units():
        every = every[(np.sort(every[:, unit], 1) == np.arange(DIGITS)).all(1)]
    return every.astype(np.int64)


class Puzzles:
    """Puzzles with one solution, drawn with photographs in the cells that are shown."""

    def __init__(self, pictures: list[Tensor], seed: int) -> None:
        self.pictures, self.solved = pictures, boards()
        self.random = np.random.default_rng(seed)

    def one(self) -> tuple[np.ndarray, np.ndarray]:
        """A solved board and which of its cells are blank."""
        while True:
            board = self.solved[self.random.integers(len(self.solved))]
            blank = np.zeros(CELLS, bool)
            blank[self.random.permutation(CELLS)[:BLANKS]] = True
            if (self.solved[:, ~blank] == board[~blank]).all(1).sum() == 1:
                return board, blank

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Photographs ``(size, 16, 64)``, solutions ``(size, 16)`` and blank cells ``(size, 16)``."""
        drawn = [self.one() for _ in range(size)]
        solution = torch.from_numpy(np.array([board for board, _ in drawn]))
        blank = torch.from_numpy(np.array([blank for _, blank in drawn]))
        shown = torch.empty(size, CELLS, 64)
        for digit, own in enumerate(self.pictures):
            place = solution == digit
            shown[place] = own[self.random.integers(len(own), size=int(place.sum()))]
        return shown * ~blank[..., None], solution, blank


# -------------------------------------------------------------------------------------------------------------- models


def reader() -> nn.Module:
    """The network that looks at one photograph."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIGITS))


class Solver(nn.Module):
    """Reads the cells that are shown, and fills in the board: by the program, or by dense layers."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.read, self.head = reader(), head

    def forward(self, shown: Tensor, blank: Tensor) -> Tensor:
        scores = self.read(shown).softmax(-1) * ~blank[..., None]
        return self.head(-scores.flatten(-2)).unflatten(-1, (CELLS, DIGITS))


class Program(nn.Module):
    """The quadratic program, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        A, b = rules()
        eye = torch.eye(CELLS * DIGITS, dtype=torch.float64)
        self.program = QuadraticProgram(CURVATURE * eye, G=-eye, h=torch.zeros_like(eye[0]), A=A, b=b)

    def forward(self, q: Tensor) -> Tensor:
        return self.program(q.double()).to(q.dtype)


def dense() -> nn.Module:
    """What learns the rules from data instead."""
    torch.manual_seed(1)
    sizes = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 64)
    layers = [sizes[0], nn.ReLU(), sizes[1], nn.ReLU(), sizes[2], nn.Unflatten(-1, (CELLS, DIGITS)), nn.Softmax(-1)]
    return nn.Sequential(*layers, nn.Flatten(-2))


# ------------------------------------------------------------------------------------------------------------ training


def train_end_to_end(model: Solver, learn: list[Tensor], test: list[Tensor], steps: int, name: str) -> list[tuple]:
    """Adam on the blank cells; returns how well the photographs are read on the way, which no loss asks for."""
    puzzles, curve = Puzzles(learn, 0), []
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in tqdm(range(steps), desc=name, mininterval=1.0):
        if step % 5 == 0 and step < 300:
            curve.append((step, reading(model.read, test)))
        shown, solution, blank = puzzles.batch(BATCH)
        optimiser.zero_grad()
        miss = model(shown, blank) - F.one_hot(solution, DIGITS)
        miss[blank].square().sum(-1).mean().backward()
        optimiser.step()
    return [*curve, (steps, reading(model.read, test))]


def train_on_labels(learn: list[Tensor], count: int) -> nn.Module:
    """Cross-entropy on `count` labelled photographs of each digit."""
    read = reader()
    x = torch.cat([own[:count] for own in learn])
    labels = torch.arange(DIGITS).repeat_interleave(count)
    optimiser = torch.optim.Adam(read.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(300):
        optimiser.zero_grad()
        F.cross_entropy(read(x), labels).backward()
        optimiser.step()
    return read


@torch.no_grad()
def reading(read: nn.Module, test: list[Tensor]) -> float:
    """The share of unseen photographs whose digit has the largest score.

    Scores count under the names that fit best: dense layers may call the digits what they like.
    """
    said = torch.stack([F.one_hot(read(own).argmax(-1), DIGITS).float().mean(0) for own in test])
    names = torch.tensor(list(itertools.permutations(range(DIGITS))))
    return said[torch.arange(DIGITS), names].mean(-1).max().item()


@torch.no_grad()
def solved(model: Solver, shown: Tensor, solution: Tensor, blank: Tensor) -> float:
    """The share of puzzles with every blank cell right."""
    right = model(shown, blank).argmax(-1) == solution
    return (right | ~blank).all(-1).float().mean().item()


# -------------------------------------------------------------------------------------------------------------- figure


def draw_puzzle(axis, model: Solver, test: list[Tensor]) -> None:
    """One unseen puzzle: photographs where it shows any, what the program says elsewhere."""
    shown, solution, blank = Puzzles(test, 2).batch(1)
    with torch.no_grad():
        x = model(shown, blank)[0]
    for cell, (row, column) in enumerate(itertools.product(range(SIDE), repeat=2)):
        where = (column + 0.1, column + 0.9, SIDE - row - 0.9, SIDE - row - 0.1)
        if not blank[0, cell]:
            axis.imshow(shown[0, cell].reshape(8, 8).numpy(), cmap="gray_r", extent=where, vmin=0, vmax=1)
            continue
        digit = int(x[cell].argmax())
        colour = "#1f5fa8" if digit == solution[0, cell] else "#c0392b"
        axis.text(column + 0.5, SIDE - row - 0.52, digit + 1, color=colour, fontsize=26, ha="center", va="center")
        axis.text(column + 0.95, SIDE - row - 0.95, f"{x[cell, digit]:.2f}", color="0.5", fontsize=7, ha="right")
    for k in range(SIDE + 1):
        style = {"color": "black", "linewidth": 1.8 if k % 2 == 0 else 0.6}
        axis.plot([0, SIDE], [k, k], **style)
        axis.plot([k, k], [0, SIDE], **style)
    axis.set(xlim=(-0.05, 4.05), ylim=(-0.05, 4.05), aspect="equal", title="an unseen puzzle, blanks filled in")
    axis.axis("off")


def draw(model: Solver, test: list[Tensor], curves: dict, read: dict, share: dict, path: Path) -> None:
    """A puzzle, how reading is learned, how many puzzles are solved."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 3.9), layout="constrained", width_ratios=(1, 1.35, 1.35))
    draw_puzzle(axes[0], model, test)
    colours = {"program": "#1f5fa8", "dense layers": "#d9822b"}
    for (name, curve), colour in zip(curves.items(), colours.values(), strict=True):
        early = [point for point in curve if point[0] <= 300]
        axes[1].plot(
            *zip(*early, strict=True),
            color=colour,
            label=f"no labels, {name} ({curve[-1][0]} steps in all)",
            linewidth=2,
        )
    for count in LABELS:
        accuracy = read[labelled(count)]
        axes[1].axhline(accuracy, color="0.75", linewidth=0.8, zorder=0)
        above = 0.008 if count == max(LABELS) else -0.008  # the two best are close
        axes[1].text(307, accuracy + above, count, va="center", fontsize=8, color="0.45")
    axes[1].text(307, 0.94, "labels\na digit", va="top", fontsize=8, color="0.45")
    axes[1].set(xlabel="training step", xlim=(-5, 305), ylim=(0.3, 1.03), title="unseen photographs read correctly")
    axes[1].legend(frameon=False, loc="lower right")
    tones = [colours["program"], colours["dense layers"], *["0.72"] * len(LABELS)]
    bars = axes[2].barh(list(share), list(share.values()), color=tones, height=0.65)
    axes[2].bar_label(bars, fmt="{:.0%}", padding=3)
    axes[2].invert_yaxis()
    axes[2].set(xlim=(0, 1.12), xticks=[], title="unseen puzzles solved completely")
    for axis in axes[1:]:
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].spines["bottom"].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def labelled(count: int) -> str:
    """The name of a network trained in two stages."""
    return f"two stages, {count} label{'s' * (count > 1)} a digit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of training with the program")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/quadratic_program_layer"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 25
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    learn, test = photographs()
    models = {"no labels, program": Solver(Program()), "no labels, dense layers": Solver(dense())}
    lengths = options.steps, 10 * options.steps
    curves = {
        name.split(", ")[1]: train_end_to_end(model, learn, test, steps, name)
        for (name, model), steps in zip(models.items(), lengths, strict=True)
    }
    for count in LABELS:
        models[labelled(count)] = Solver(Program())
        models[labelled(count)].read = train_on_labels(learn, count)
    read = {name: reading(model.read, test) for name, model in models.items()}
    unseen = Puzzles(test, 1).batch(300)
    share = {name: solved(model, *unseen) for name, model in models.items()}
    draw(models["no labels, program"], test, curves, read, share, options.out / "sudoku.png")
    (options.out / "results.json").write_text(json.dumps({"photographs": read, "puzzles": share}, indent=2))
    width = max(map(len, models))
    print(f"{'':{width}}  photographs  puzzles")
    for name in models:
        print(f"{name:{width}}  {read[name]:11.1%}  {share[name]:7.1%}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 300:
        ours, few, enough = "no labels, program", labelled(5), labelled(20)
        assert read[ours] >= 0.97 and share[ours] >= 0.95
        assert share[ours] > max(share[few], share["no labels, dense layers"]) + 0.2
        assert share[ours] >= share[enough] - 0.02


if __name__ == "__main__":
    main()
