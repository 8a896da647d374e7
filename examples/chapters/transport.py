"""Cameras with crossed wires: a network that can read, and labels, are enough to find where each wire belongs."""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plan_gradients import Gradients, compare, draw
from chapters._plots import BLUE, GREY, INK, ORANGE, axes, save
from difflayers import Solution, Status
from difflayers.transport import Coupling, sinkhorn, sinkhorn_ex

PIXELS, CAMERAS = 64, 4
EPS = 0.1
RARE = 0.01  # of all images
SHOWN = (0, 5, 10, 20, 50, 100, 400)  # steps of training after which pictures are kept


# ------------------------------------------------------------------------------------------------------------- cameras


@dataclass
class Data:
    """scikit-learn's 8 x 8 digits: some that the reader learns from, some that cameras see, and some for testing."""

    read: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    wires: Tensor  # (CAMERAS, PIXELS): the pixel that each wire comes from, which nothing here may learn from

    def signals(self, images: Tensor) -> Tensor:
        """``(CAMERAS, images, PIXELS)``, what the same images look like through each camera."""
        return torch.stack([images[:, w] for w in self.wires])


def load(tiny: bool) -> Data:
    """A fifth of the digits for testing; the reader and the cameras halve the rest."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    x, x_test = (torch.tensor(a, dtype=torch.float32) for a in split[:2])
    y, y_test = (torch.tensor(a) for a in split[2:])
    half, test = len(x) // 2, 64 if tiny else None
    generator = torch.Generator().manual_seed(0)
    wires = torch.stack([torch.randperm(PIXELS, generator=generator) for _ in range(CAMERAS)])
    return Data((x[:half], y[:half]), (x[half:], y[half:]), (x_test[:test], y_test[:test]), wires)


def learn_to_read(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """An ordinary network; noise on its images makes it look at all of their pixels. Fixed from then on."""
    torch.manual_seed(0)
    reader = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            noisy = x[index] + 0.2 * torch.randn(len(index), PIXELS)
            optimiser.zero_grad()
            nn.functional.cross_entropy(reader(noisy), y[index]).backward()
            optimiser.step()
    return reader.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- models


class Softmax(nn.Module):
    """Scores of wires and pixels; each wire shares itself out among pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(CAMERAS, PIXELS, PIXELS))

    def plan(self) -> Tensor:
        return (self.scores / EPS).softmax(-1)

    def forward(self, signals: Tensor) -> Tensor:
        return signals @ self.plan()


class Wiring(Softmax):
    """The same, and no pixel gets more than a wire: an optimal transport plan."""

    last: Solution[Coupling] | None = None  # to start from

    def plan(self) -> Tensor:
        ones = self.scores.new_ones(PIXELS)
        self.last = sinkhorn_ex(-self.scores, ones, ones, eps=EPS, warm_start=self.last)
        assert bool(self.last.converged.all())
        return self.last.value.plan


MODELS = {"softmax": (Softmax, ORANGE), "Sinkhorn": (Wiring, BLUE)}


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Run:
    """What one way of wiring led to; shares are means over cameras."""

    model: Softmax
    plans: dict[int, Tensor] = field(default_factory=dict)  # by step
    seconds: float = 0.0
    right: float = 0.0  # share of wires whose largest weight is at their pixel
    ink: float = 0.0  # share of all ink that these carry
    crowd: float = 0.0  # weight at the pixel that gets most
    idle: float = 0.0  # pixels that are no wire's first choice
    error: float = 0.0  # of test images, root mean square over pixels
    soldered: float = 0.0  # the same, with every wire at its first choice alone
    accuracy: float = 0.0  # of the reader on test images
    read: float = 0.0  # the same, soldered


def loss_of(reader: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, summed over cameras."""
    return nn.functional.cross_entropy(reader(images).flatten(0, 1), labels.flatten()) * len(images)


def train(name: str, data: Data, reader: nn.Module, steps: int) -> Run:
    """Adam on the scores; every camera sees images of its own, and is told their labels."""
    run, generator = Run(MODELS[name][0]()), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(run.model.parameters(), 0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    signals, labels = data.signals(data.seen[0]), data.seen[1]
    camera = torch.arange(CAMERAS)[:, None]
    start = time.perf_counter()
    for step in (bar := tqdm(range(steps), desc=f"{name:<12}", unit="step")):
        if step in SHOWN:
            run.plans[step] = run.model.plan().detach()
        index = torch.randint(len(labels), (CAMERAS, 128), generator=generator)
        loss = loss_of(reader, run.model(signals[camera, index]), labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item() / CAMERAS:.3f}")
    run.seconds = time.perf_counter() - start
    run.plans[steps] = run.model.plan().detach()
    return run


@torch.no_grad()
def measure(run: Run, data: Data, reader: nn.Module) -> None:
    """How much of the wiring is right, and what it does to images."""
    plan, (images, labels) = run.model.plan(), data.test
    choice, seen = plan.argmax(-1), data.seen[0]
    ink, used = seen.sum(0)[data.wires], (seen > 0).double().mean(0)[data.wires] > RARE
    right = choice == data.wires
    run.right = right[used].double().mean().item()
    run.ink = (right * ink).sum().item() / ink.sum().item()
    run.crowd = plan.sum(-2).max(-1).values.mean().item()
    run.idle = sum(PIXELS - len(c.unique()) for c in choice) / CAMERAS
    soft, hard = (data.signals(images) @ p for p in (plan, solder(plan)))
    run.error, run.soldered = ((x - images).square().mean().sqrt().item() for x in (soft, hard))
    run.accuracy, run.read = ((reader(x).argmax(-1) == labels).double().mean().item() for x in (soft, hard))


def solder(plan: Tensor) -> Tensor:
    """Every wire at its first choice."""
    return nn.functional.one_hot(plan.argmax(-1), PIXELS).to(plan.dtype)


def gradients(model: Softmax, data: Data, reader: nn.Module, tiny: bool) -> Gradients:
    """Of the training loss in the scores of the first camera, in float64."""
    images, labels = (t[:64] for t in data.seen)
    signals = images[:, data.wires[0]].double()
    reader = copy.deepcopy(reader).double()

    def loss(plan: Tensor) -> Tensor:
        log = reader(signals @ plan).log_softmax(-1)
        return -log[..., torch.arange(len(labels)), labels].mean(-1)

    return compare(loss, -model.scores.detach()[0].double(), EPS, tiny)


# -------------------------------------------------------------------------------------------------------- one bad one


def spoil(model: Softmax, index: int) -> tuple[list[str], bool]:
    """One score of one camera is no number: statuses, and whether all others have the same plan and gradient."""
    cost, ones = -model.scores.detach(), torch.ones(PIXELS)
    bad = cost.clone()
    bad[index, 0, 0] = torch.nan
    others = torch.arange(len(cost)) != index
    results = []
    for c in (cost, bad):
        c.requires_grad_()
        plan = sinkhorn(c, ones, ones, eps=EPS, on_failure="nan")
        (gradient,) = torch.autograd.grad(plan[others].square().sum(), c)
        results.append((plan[others], gradient[others]))
    status = sinkhorn_ex(bad, ones, ones, eps=EPS).status
    return [Status(s).name for s in status.tolist()], all(map(torch.equal, *results))


# ------------------------------------------------------------------------------------------------------------- figures


def draw_rows(rows: dict[str, Tensor], titles: list[str], path: Path) -> Path:
    """Images in named rows."""
    count = len(next(iter(rows.values())))
    figure, axis = axes(wide=True, height=0.36 + 5.2 * len(rows) / (count + 1.9))
    axis.remove()
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.view(8, 8).numpy(), cmap="Greys", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(visible=True, color="#dde2e8")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for panel, title in zip(panels[0], titles, strict=False):
        panel.set_title(title, fontsize=8.5, loc="center", color=GREY)
    return save(figure, path)


def draw_crowd(name: str, plan: Tensor, path: Path) -> Path:
    """How many wires end at each pixel, all parts added up."""
    figure, axis = axes(height=3.0)
    load = plan.sum(-2).view(8, 8)
    axis.imshow(load.numpy(), cmap="Blues", vmin=0, vmax=5)
    for i, j in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
        text = f"{load[i, j]:.1f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if load[i, j] > 3 else INK)
    axis.set(title=f"{name}: wires that end at each pixel", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------- chapter

SNIPPET = """
class Wiring(nn.Module):
    def __init__(self, cameras):
        super().__init__()
        # of 64 wires and 64 pixels
        scores = torch.zeros(cameras, 64, 64)
        self.scores = nn.Parameter(scores)

    def forward(self, signals):
        one = torch.ones(64)
        # every wire and every pixel once
        plan = sinkhorn(-self.scores, one, one, eps=0.1)
        return signals @ plan  # into the reader
"""


@chapter("transport", title="A layer that assigns", order=40)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    data = load(settings.tiny)
    reader = learn_to_read(*data.read, 2 if settings.tiny else 15)
    runs = {name: train(name, data, reader, 10 if settings.tiny else max(SHOWN)) for name in MODELS}
    for r in runs.values():
        measure(r, data, reader)
    soft, wired = runs.values()
    signals, (images, labels) = data.signals(data.test[0]), data.test
    able, before = ((reader(x).argmax(-1) == labels).double().mean().item() for x in (images, signals))
    found = gradients(wired.model, data, reader, settings.tiny)
    statuses, same = spoil(wired.model, 1)

    last = {name: r.plans[max(r.plans)][0] for name, r in runs.items()}
    some = [int((labels == k).nonzero()[0]) for k in range(10)]
    rows = {"written": images[some], "seen": signals[0, some]}
    rows |= {name: signals[0, some] @ solder(plan) for name, plan in last.items()}
    pictures = draw_rows(rows, [], settings.out / "digits.png")
    rows = {name: torch.stack([signals[0, some[3]] @ p[0] for p in r.plans.values()]) for name, r in runs.items()}
    progress = draw_rows(rows, [f"{step}" for step in soft.plans], settings.out / "progress.png")
    crowds = tuple(draw_crowd(name, plan, settings.out / f"{name.lower()}.png") for name, plan in last.items())
    curves = draw(found, settings.out)

    print(f"\n{CAMERAS} cameras with crossed wires, {len(labels)} test digits, of which the reader gets {able:.1%};")
    print(f"through crossed wires {before:.1%}, and through plans:")
    print("             wires right      ink   idle   fullest   error of images, soldered     read, soldered  training")
    for name, r in runs.items():
        print(
            f"  {name:<10}{r.right:12.1%}{r.ink:9.1%}{r.idle:7.1f}{r.crowd:10.2f}{r.error:18.3f}{r.soldered:10.3f}"
            f"{r.accuracy:9.1%}{r.read:10.1%}{r.seconds:8.1f} s"
        )
    print(f"gradient of the layer: error {found.error:.1e}, {found.layer_kept[0] / 1024:.0f} KiB kept after "
          f"{found.layer_iterations[0]} iterations as after {found.layer_iterations[1]}; unrolled:")  # fmt: skip
    for n, error, kept in zip(found.iterations, found.errors, found.kept, strict=True):
        print(f"  {n:>5} iterations {error:10.1e} {kept / 1024:9.0f} KiB kept")
    print(f"one camera with a score that is NaN: {', '.join(statuses)}; all others unchanged: {same}")
    numbers = {name: {k: v for k, v in vars(r).items() if isinstance(v, float)} for name, r in runs.items()}
    numbers |= {"gradients": vars(found), "statuses": statuses, "same": same, "before": before, "able": able}
    (settings.out / "transport.json").write_text(json.dumps(numbers, indent=2))

    assert same and statuses == ["CONVERGED", "DIVERGED", "CONVERGED", "CONVERGED"], numbers
    assert found.layer_kept[0] == found.layer_kept[1] < found.kept[0], numbers
    assert wired.crowd < 1.001 < soft.crowd, numbers
    if not settings.tiny:
        assert wired.right > max(0.75, soft.right + 0.04) and wired.ink > max(0.85, soft.ink - 0.02), numbers
        assert wired.error < min(0.18, 0.9 * soft.error) and wired.soldered < 0.9 * soft.soldered, numbers
        assert wired.idle < 12 < soft.idle and min(wired.accuracy, soft.accuracy) > 0.92 > 0.2 > before, numbers
        assert found.error < 1e-6 and found.errors[2] > 0.05 and found.errors[-1] < 0.05, numbers
    return blocks(runs, found, before, able, len(data.seen[1]), pictures, progress, crowds, curves)


def blocks(
    runs: dict[str, Run],
    found: Gradients,
    before: float,
    able: float,
    count: int,
    pictures: Path,
    progress: Path,
    crowds: tuple[Path, ...],
    curves: tuple[Path, Path],
) -> list[Block]:
    """What the page shows."""
    soft, wired = runs.values()
    middle = len(found.iterations) // 3
    return [
        Text(
            "A layer can put things in their places. Four cameras look at handwritten digits, and in each of them "
            f"somebody has crossed all {PIXELS} wires between sensor and output. A network that has learnt to read "
            f"from a good camera gets {able:.1%} of digits right, and {before:.1%} through these. It stays as it is. "
            "All that is learnt is a score for every wire and every pixel, all that is known are the labels of "
            f"{count} digits: "
            "no camera ever shows the picture that it should have shown. The layer turns scores into a plan in which "
            "every wire and every pixel is used once, and the reader's mistakes tell the plan what to change."
        ),
        Code(SNIPPET),
        Figure(
            (pictures,),
            "Digits that training did not see, as they were written, as the first camera shows them, and with each "
            "wire soldered to the pixel where it has the largest weight after training.",
            "Four rows of ten digits: legible, noise, roughly legible with holes and blots, legible.",
        ),
        Figure(
            (progress,),
            "A test digit through both plans after so many steps of training.",
            "A digit that appears out of grey over the course of training, once for softmax and once for Sinkhorn.",
        ),
        Heading("One wire, one pixel"),
        Text(
            "For comparison, the same scores go through a softmax, by which each wire shares itself out among pixels "
            "without regard to the others. The reader is content with either: it gets "
            f"{soft.accuracy:.1%} with softmax and {wired.accuracy:.1%} with Sinkhorn. But what softmax finds is no "
            f"wiring. Several wires end at one pixel, {soft.crowd:.1f} of them at the fullest, and {soft.idle:.0f} "
            f"pixels of {PIXELS} are no wire's first choice; with Sinkhorn, {wired.idle:.0f}. That no place can be "
            f"taken twice is knowledge, and it shows: {wired.right:.0%} of wires find their own pixel instead of "
            f"{soft.right:.0%}, and the pictures are off by {wired.error:.2f} instead of {soft.error:.2f}. The price: "
            f"{wired.seconds:.1f} s of training instead of {soft.seconds:.1f} s."
        ),
        Figure(
            crowds,
            "Weights of all wires added up at each pixel of the first camera.",
            "Two maps of 8 by 8 numbers: between 0.1 and 3 or 4 for softmax, 1.0 everywhere for Sinkhorn.",
        ),
        Table(
            ("plan", "wires right", "ink right", "idle", "error", "soldered", "read", "time"),
            [
                (name, f"{r.right:.0%}", f"{r.ink:.0%}", f"{r.idle:.0f}", *errors, f"{r.accuracy:.1%}", seconds)
                for name, r, errors, seconds in (
                    (name, r, (f"{r.error:.2f}", f"{r.soldered:.2f}"), f"{r.seconds:.1f} s") for name, r in runs.items()
                )
            ],
            "Wires right: largest weight at the wire's own pixel, of the wires that carry ink in more than "
            f"{RARE:.0%} of the digits; the others matter to nobody. Ink right: share of all ink that goes through "
            "them. Idle: pixels that are no wire's first choice. Error: root mean square over pixels that range from "
            "0 to 1, through the plan and soldered. Means over the cameras, on test digits.",
        ),
        Heading("Is the gradient right?"),
        Text(
            "A plan is found by scaling rows and columns in turn, and the usual gradient goes through a fixed "
            "number of these iterations. That is the gradient of something else: for the plan that was learnt, "
            f"{found.iterations[middle]} unrolled iterations are {found.errors[middle]:.0%} off, and "
            f"{found.iterations[-1]} of them keep {found.kept[-1] / 2**20:.0f} MiB for one plan. The layer solves one "
            f"linear system at the solution. Its gradient is off by {found.error:.0e}, which is what differences can "
            f"tell, and it keeps {found.layer_kept[0] / 2**10:.0f} KiB, after {found.layer_iterations[0]} iterations "
            f"as after {found.layer_iterations[1]}."
        ),
        Figure(
            curves,
            "Gradient of the training loss in the scores of one camera, in float64: difference from central "
            "differences of plans that have converged, along random directions; and distinct tensors that autograd "
            "keeps between forward and backward.",
            "Two charts against iterations: the error of the unrolled gradient falls slowly while its memory grows; "
            "the layer's are both flat and far below.",
        ),
        Heading("One broken camera"),
        Text(
            "Now one score of the second camera is not a number. The status of this camera is DIVERGED, that of the "
            'others CONVERGED, and with on_failure="nan" their plans and gradients are the same to the last bit.'
        ),
    ]
