"""Retrieval in clutter: generalized sum pooling against average and max pooling.

A picture is a 3 x 3 collage. Some cells show its class, the others show things that say nothing about it. A network
describes each cell, the descriptions are pooled to one embedding, and embeddings of one class should lie close
together: what is measured is recall@1, how often the nearest of all other test pictures has the same class.

Average pooling mixes the clutter in. Generalized sum pooling moves a given share of the mass of the nine cells to
learned prototypes, wherever that is cheapest, and averages what was moved: the prototypes learn what matters, and the
rest is left out.

Two tasks. *Digits*: classes are the digits 0 to 5, clutter the digits 6 to 9, test pictures are made of digits never
seen in training. *Faces*: every face is a class of its own, shown in shifted, mirrored, noisy copies, and clutter are
patches that show no face; the faces of the test were never seen, so the embedding has to carry over to new classes. The
faces are the 100 that scikit-image ships (a part of Labeled Faces in the Wild, one picture a person).

    python examples/plot_generalized_sum_pool.py [--quick] [--steps 100] [--seeds 3] [--out out/generalized_sum_pool]

Source: Y. Z. Gurbuz, O. Sener, A. A. Alatan, Generalized Sum Pooling for Metric Learning, 2023.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.transport import GeneralizedSumPool, zero_shot_loss

CELLS = 9
DISTRACTORS = (6, 7, 8)  # cells of the nine
CHANNELS = 32
BATCH = 96
VIEWS = 32  # of a face
POOLS = ("average", "max", "sum pooling", "sum pooling, zero-shot loss")
COLOURS = dict(zip(POOLS, ("#d9822b", "#7a7a7a", "#1f5fa8", "#56a3d9"), strict=True))


class Digits:
    """Collages of digits: classes 0 to 5 among digits 6 to 9."""

    side, classes = 8, 6

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.parts = {"train": order[:900], "test": order[900:]}
        self.x, self.labels = x - x.mean(), labels

    def collages(self, part: str, count: int, distractors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(count, 9, pixels)`` cells in random order, and the labels."""
        rows = self.parts[part]
        labels = torch.arange(count) % self.classes
        cells = self.x.new_empty(count, CELLS, self.x.shape[-1])
        for k in range(self.classes):
            of_class = rows[self.labels[rows] == k]
            wanted = labels == k
            picks = torch.randint(len(of_class), (int(wanted.sum()), CELLS), generator=generator)
            cells[wanted] = self.x[of_class[picks]]
        clutter = rows[self.labels[rows] >= self.classes]
        picks = torch.randint(len(clutter), (count, distractors), generator=generator)
        cells[:, CELLS - distractors :] = self.x[clutter[picks]]
        return shuffled(cells, generator), labels


class Faces:
    """Collages of faces among patches that show none; other faces, and other patches, in the test."""

    side, classes = 21, 60

    def __init__(self) -> None:
        from skimage.data import lfw_subset

        pictures = torch.tensor(lfw_subset(), dtype=torch.float32)
        pictures = pictures - pictures.mean((-2, -1), keepdim=True)
        pictures = pictures / pictures.square().mean((-2, -1), keepdim=True).sqrt()
        order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
        self.parts = {}
        for part, rows in {"train": order[:60], "test": order[60:]}.items():
            generator = torch.Generator().manual_seed(1)
            both = torch.stack([pictures[:100][rows], pictures[100:][rows]])  # faces, others
            copies = both.unsqueeze(2).expand(-1, -1, VIEWS, -1, -1).flatten(0, 2)
            self.parts[part] = self.views(copies, generator).unflatten(0, (2, len(rows), VIEWS))

    def collages(self, part: str, count: int, distractors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(count, 9, pixels)`` cells in random order, and the labels."""
        faces, others = self.parts[part]
        labels = torch.arange(count) % len(faces)
        shown = torch.randint(VIEWS, (count, CELLS), generator=generator)
        clutter = torch.randint(len(others), (count, distractors), generator=generator)
        kept = CELLS - distractors
        cells = torch.cat([faces[labels[:, None], shown[:, :kept]], others[clutter, shown[:, kept:]]], 1)
        return shuffled(cells, generator), labels

    def views(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Shifted, mirrored, brighter or darker, with noise."""
        count, room = len(pictures), pictures.shape[-1] - self.side + 1
        rows, columns = (torch.randint(room, (count, 1), generator=generator) + torch.arange(self.side) for _ in "xy")
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
        views = pictures[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
        gain = 0.7 + 0.6 * torch.rand(count, 1, generator=generator)
        return gain * views + 0.5 * torch.randn(views.shape, generator=generator)


def shuffled(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Cells in an order of their own for each collage."""
    order = torch.rand(cells.shape[:2], generator=generator).argsort(-1)
    return cells.take_along_dim(order.unsqueeze(-1), 1)


class Embedding(nn.Module):
    """Cells to descriptions to one vector of length one."""

    def __init__(self, pixels: int, kind: str) -> None:
        super().__init__()
        self.describe = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, CHANNELS))
        self.pool = GeneralizedSumPool(CHANNELS, 16, ratio=0.3, gamma=10.0) if kind.startswith("sum") else None
        self.kind = kind

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embedding, and the attributes where there are some."""
        tokens, attributes = self.describe(cells), None
        if self.pool is not None:
            pooled, attributes, _ = self.pool.detailed(tokens)
        else:
            pooled = tokens.mean(1) if self.kind == "average" else tokens.amax(1)
        return F.normalize(pooled, dim=-1), attributes


def train(task: Digits | Faces, kind: str, distractors: int, seed: int, steps: int) -> Embedding:
    """Cross entropy on cosines with one learned vector a class; the same for every kind of pooling."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = Embedding(task.side**2, kind)
    proxies = nn.Parameter(torch.randn(task.classes, CHANNELS))
    embeddings = nn.Parameter(torch.randn(task.classes, CHANNELS) / CHANNELS**0.5)  # for the zero-shot loss
    if model.pool is not None:
        with torch.no_grad():
            cells, _ = task.collages("train", BATCH, distractors, generator)
            model.pool.initialise_(model.describe(cells))
    optimiser = torch.optim.Adam([*model.parameters(), proxies, embeddings], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        cells, labels = task.collages("train", BATCH, distractors, generator)
        embedded, attributes = model(cells)
        loss = F.cross_entropy(10 * embedded @ F.normalize(proxies, dim=-1).mT, labels)
        if kind.endswith("zero-shot loss"):
            loss = loss + 0.1 * zero_shot_loss(attributes, labels, embeddings)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def recall(task: Digits | Faces, model: Embedding, distractors: int) -> float:
    """Recall@1 among 600 unseen collages."""
    cells, labels = task.collages("test", 600, distractors, torch.Generator().manual_seed(99))
    embedded, _ = model(cells)
    return float((labels[nearest(embedded)] == labels).float().mean())


def nearest(embedded: Tensor) -> Tensor:
    """The most similar other one."""
    return (embedded @ embedded.mT).fill_diagonal_(-2).argmax(-1)


# ------------------------------------------------------------------------------------------------------------- figure


def collage(cells: Tensor, side: int) -> Tensor:
    """Nine cells as one picture."""
    return cells.reshape(3, 3, side, side).permute(0, 2, 1, 3).reshape(3 * side, 3 * side)


def draw(tasks: dict, models: dict, table: dict, path: Path) -> None:
    """Where the pool looks, and recall against clutter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    titles = {"digits": "digits never seen, of known classes", "faces": "faces never seen, a class each"}
    figure = plt.figure(figsize=(12.5, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=(1, 1, 1, 1, 1.75))
    for row, (name, task) in enumerate(tasks.items()):
        cells, _ = task.collages("test", 4, 6, torch.Generator().manual_seed(5))
        with torch.no_grad():
            weights = models[name].pool.detailed(models[name].describe(cells)).weights
        for column in range(4):
            axis = figure.add_subplot(grid[row, column])
            picture, side = collage(cells[column], task.side), task.side
            axis.imshow(picture.numpy(), cmap="gray", vmin=float(picture.min()), vmax=float(picture.max()))
            for k, weight in enumerate(weights[column].tolist()):
                corner = (k % 3 * side - 0.5, k // 3 * side - 0.5)
                share = min(1.0, weight * CELLS * 0.3)  # of the cell, which is pooled
                axis.add_patch(Rectangle(corner, side, side, color="#0b1f3a", alpha=0.8 * (1 - share), linewidth=0))
                axis.text(
                    corner[0] + 0.06 * side, corner[1] + 0.94 * side, f"{weight:.0%}", color="#ffd166", fontsize=8
                )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_title(f"{name}: weight of each cell in the pooled feature", loc="left", fontsize=10)
        axis = figure.add_subplot(grid[row, 4])
        for kind in POOLS:
            values = torch.tensor([table[name][kind][str(d)] for d in DISTRACTORS])
            axis.plot(DISTRACTORS, values.mean(-1).tolist(), "o-", color=COLOURS[kind], markersize=4, label=kind)
            low, high = values.amin(-1).tolist(), values.amax(-1).tolist()
            axis.fill_between(DISTRACTORS, low, high, color=COLOURS[kind], alpha=0.15, lw=0)
        axis.set(xlabel="cells of nine that are clutter", ylabel="recall@1", title=titles[name])
        axis.set_xticks(DISTRACTORS)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/generalized_sum_pool"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 5, 1
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tasks = {"digits": Digits(), "faces": Faces()}
    table: dict = {name: {kind: {str(d): [] for d in DISTRACTORS} for kind in POOLS} for name in tasks}
    runs = [(name, kind, d, s) for name in tasks for kind in POOLS for d in DISTRACTORS for s in range(options.seeds)]
    models = {}
    for name, kind, distractors, seed in tqdm(runs, mininterval=1.0):
        model = train(tasks[name], kind, distractors, seed, options.steps)
        table[name][kind][str(distractors)].append(recall(tasks[name], model, distractors))
        if kind == "sum pooling" and distractors == 6:
            models.setdefault(name, model)
    draw(tasks, models, table, options.out / "generalized_sum_pool.png")
    (options.out / "results.json").write_text(json.dumps(table, indent=2))
    mean = {
        name: {kind: [sum(v) / len(v) for v in kinds[kind].values()] for kind in POOLS} for name, kinds in table.items()
    }
    for name in tasks:
        print(f"\n{name}: recall@1, mean of {options.seeds} seeds")
        print(f"{'cells that are clutter':30s}" + "".join(f"{d:>8d}" for d in DISTRACTORS))
        for kind in POOLS:
            print(f"{kind:30s}" + "".join(f"{value:8.1%}" for value in mean[name][kind]))
    if options.steps >= 100:
        faces, digits = (
            dict(zip(DISTRACTORS, zip(*mean[k].values(), strict=True), strict=True)) for k in ("faces", "digits")
        )
        for d in (6, 7):  # two or three cells show the face
            average, highest, ours, _ = faces[d]
            assert ours > average + 0.1
            assert ours > highest + 0.05
        # digits are easy to tell from clutter: there is little to gain, and a single cell of nine is for max pooling
        assert all(ours > average - 0.02 for average, _, ours, _ in digits.values())
    print(f"\n{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")


if __name__ == "__main__":
    main()
