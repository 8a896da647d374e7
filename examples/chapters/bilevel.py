"""Ten pictures instead of a thousand: the training set is what is learned, through the training it is for."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, ORANGE, axes, save
from difflayers.bilevel import ArgminLayer, Bilevel
from difflayers.implicit import LBFGS
from difflayers.testing import saved_bytes

Weights = dict[str, Tensor]
DECAY = -4.0  # logarithm of the weight decay to begin with
CONDENSED = "ten learned pictures"
STEPS = (10, 30, 100, 300, 1000)  # of the training that is recorded


# ------------------------------------------------------------------------------------------------------------- digits


@dataclass
class Data:
    """scikit-learn's digits, a thousand to learn from and the others for the test, pixels between 0 and 1."""

    images: Tensor
    labels: Tensor
    test: tuple[Tensor, Tensor]

    def each(self, choose: int | None, generator: torch.Generator | None = None) -> Tensor:
        """One picture of each digit: of random ones, or the mean of all."""
        pictures = []
        for digit in range(10):
            of = self.images[self.labels == digit]
            pictures.append(of.mean(0) if choose is None else of[torch.randint(len(of), (1,), generator=generator)[0]])
        return torch.stack(pictures)


def load(count: int = 1000, seed: int = 0) -> Data:
    """Shuffled."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images)[order] / 16, torch.tensor(labels)[order]
    return Data(x[:count], y[:count], (x[1000:], y[1000:]))


# ------------------------------------------------------------------------------------------------------ the two levels


def scores(w: Weights, images: Tensor) -> Tensor:
    """Logistic regression."""
    return images @ w["weight"].mT + w["bias"]


def training_loss(x: Weights, w: Weights, batch: None = None) -> Tensor:
    """Of the ten pictures of x, one a digit, with its weight decay."""
    ten = torch.arange(10)
    return (
        F.cross_entropy(scores(w, x["images"]), ten) + x["decay"].exp() * sum(v.square().sum() for v in w.values()) / 2
    )


def real_loss(w: Weights, data: Data) -> Tensor:
    """Of the trained weights, on real pictures."""
    return F.cross_entropy(scores(w, data.images), data.labels)


def zeros() -> Weights:
    return {"weight": torch.zeros(10, 64, dtype=torch.float64), "bias": torch.zeros(10, dtype=torch.float64)}


PROBLEM = Bilevel(upper=lambda x, w, data: real_loss(w, data), lower=training_loss)
TRAIN = ArgminLayer(PROBLEM, solver=LBFGS(rtol=1e-8), init=zeros())


@dataclass
class Learned:
    """What the gradient through the training led to."""

    x: Weights
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


def condense(data: Data, steps: int) -> Learned:
    """Starts at the mean picture of each digit."""
    decay = torch.tensor(DECAY, dtype=torch.float64, requires_grad=True)
    x = {"images": data.each(None).requires_grad_(), "decay": decay}
    optimiser = torch.optim.Adam([{"params": [x["images"]], "lr": 0.03}, {"params": [decay], "lr": 0.05}])
    out, start = Learned(x), time.perf_counter()
    for _ in (bar := tqdm(range(steps), desc="ten pictures", unit="step")):
        loss = real_loss(TRAIN(x), data)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            x["images"].clamp_(0, 1)
        out.loss.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    out.seconds = time.perf_counter() - start
    out.x = {name: value.detach() for name, value in x.items()}
    return out


def accuracy(images: Tensor, decay: float, data: Data) -> float:
    """Of logistic regression trained on ten pictures, on the test."""
    with torch.no_grad():
        w = TRAIN({"images": images, "decay": torch.tensor(decay, dtype=torch.float64)})
    return (scores(w, data.test[0]).argmax(-1) == data.test[1]).double().mean().item()


def rivals(data: Data, draws: int) -> dict[str, float]:
    """The same model without learned pictures; each with the best of some weight decays on the test."""
    from sklearn.linear_model import LogisticRegression

    pixels, labels, *test = (t.numpy() for t in (data.images, data.labels, *data.test))
    full = max(LogisticRegression(C=C, max_iter=1000).fit(pixels, labels).score(*test) for C in (0.1, 1.0, 10.0, 100.0))
    best = lambda images: max(accuracy(images, decay, data) for decay in (-8.0, -6.0, -4.0, -2.0))  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    random = [best(data.each(1, generator)) for _ in range(draws)]
    return {
        "ten real pictures": sum(random) / len(random),
        "ten mean pictures": best(data.each(None)),
        "all thousand pictures": float(full),
    }


def nearest(images: Tensor, data: Data) -> float:
    """Another model on the same ten pictures: the label of the nearest one."""
    return (torch.cdist(data.test[0], images).argmin(-1) == data.test[1]).double().mean().item()


# ----------------------------------------------------------------------------------------------------------- gradients


def unrolled(x: Weights, steps: int) -> Weights:
    """Training with momentum, recorded: what a gradient through the training usually means."""
    w, v = {k: t.requires_grad_() for k, t in zeros().items()}, zeros()
    for _ in range(steps):
        g = torch.autograd.grad(training_loss(x, w), list(w.values()), create_graph=True)
        v = {k: 0.9 * v[k] + g[i] for i, k in enumerate(w)}
        w = {k: w[k] - 1.0 * v[k] for k in w}
    return w


@dataclass
class Gradients:
    """Relative errors of gradients against differences, and bytes kept for backward; of the layer last."""

    errors: list[float]
    kept: list[int]


def compare(x: Weights, data: Data, counts: tuple[int, ...]) -> Gradients:
    """Along random directions, at the learned pictures."""
    tight = ArgminLayer(PROBLEM, solver=LBFGS(rtol=1e-12, max_steps=5000), init=zeros())
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, *x["images"].shape, generator=generator, dtype=torch.float64)

    def moved(direction: Tensor, h: float) -> float:
        with torch.no_grad():
            return real_loss(tight(x | {"images": x["images"] + h * direction}), data).item()

    def slope(direction: Tensor, h: float = 1e-3) -> float:
        near, far = (moved(direction, k * h) - moved(direction, -k * h) for k in (1, 2))
        return (8 * near - far) / (12 * h)

    truth = torch.tensor([slope(d) for d in directions], dtype=torch.float64)

    def measured(train) -> tuple[float, int]:
        images = x["images"].clone().requires_grad_()
        loss, kept = saved_bytes(lambda: real_loss(train(x | {"images": images}), data))
        (g,) = torch.autograd.grad(loss, images)
        found = (directions * g).flatten(1).sum(1)
        return ((found - truth).norm() / truth.norm()).item(), kept

    rows = [measured(lambda x, n=n: unrolled(x, n)) for n in counts] + [measured(TRAIN)]
    return Gradients([row[0] for row in rows], [row[1] for row in rows])


# ------------------------------------------------------------------------------------------------------------- figures


def draw_pictures(data: Data, learned: Tensor, path: Path) -> Path:
    """Real, mean and learned ones below each other."""
    import matplotlib.pyplot as plt

    axes()  # the look of all chapters
    plt.close("all")
    rows = {"real": data.each(1, torch.Generator().manual_seed(0)), "mean": data.each(None), "learned": learned}
    rows["difference"] = learned - learned.mean(0)
    figure, grid = plt.subplots(4, 10, figsize=(5.2, 2.1), layout="constrained")
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        look = {"cmap": "gray_r", "vmin": 0, "vmax": 1}
        if name == "difference":
            look = {"cmap": "PuOr", "vmin": -float(pictures.abs().max()), "vmax": float(pictures.abs().max())}
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.view(8, 8).numpy(), **look)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#dde2e8")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return save(figure, path)


def draw_accuracy(shares: dict[str, float], path: Path) -> Path:
    """Test accuracy of each training set."""
    figure, axis = axes(height=2.4)
    names = list(shares)[::-1]
    colours = [BLUE if name == CONDENSED else GREY for name in names]
    axis.barh(range(len(names)), [shares[name] for name in names], color=colours, height=0.62)
    for i, name in enumerate(names):
        axis.text(shares[name] - 0.008, i, f"{shares[name]:.1%}", va="center", ha="right", color="white", fontsize=8.5)
    axis.set(title="Accuracy on test pictures", xlim=(0.5, 1), xticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1])
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0, labelsize=8.5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return save(figure, path)


def draw_errors(found: Gradients, counts: tuple[int, ...], path: Path) -> Path:
    """Error of the gradient against training steps that are recorded."""
    figure, axis = axes(height=2.4)
    axis.plot(counts, found.errors[:-1], "o-", color=ORANGE, label="recorded training")
    axis.axhline(found.errors[-1], color=BLUE, label="layer")
    axis.set(title="Error of the gradient", xlabel="training steps", xscale="log", yscale="log")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------- chapter

SNIPPET = """
problem = Bilevel(upper=real_loss, lower=training_loss)
train = ArgminLayer(problem, init=weights)

x = {"images": ten, "decay": decay}  # what is learned
trained = train(x)                   # to its optimum
loss = F.cross_entropy(scores(trained, real), labels)
loss.backward()                      # ten.grad
"""


@chapter("bilevel", title="A layer whose input is a training set", order=70)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    tiny = settings.tiny
    data, counts = load(100 if tiny else 1000), STEPS[:2] if tiny else STEPS
    found = condense(data, 2 if tiny else 50)
    decay = found.x["decay"].item()
    shares = {CONDENSED: accuracy(found.x["images"], decay, data)} | rivals(data, 2 if tiny else 10)
    other = {"learned": nearest(found.x["images"], data), "mean": nearest(data.each(None), data)}
    gradients = compare(found.x, data, counts)
    figures = (
        draw_pictures(data, found.x["images"], settings.out / "pictures.png"),
        draw_accuracy(shares, settings.out / "accuracy.png"),
        draw_errors(gradients, counts, settings.out / "gradients.png"),
    )
    print(
        f"\n{len(found.loss)} trainings differentiated in {found.seconds:.1f} s; loss {found.loss[0]:.2f} to ", end=""
    )
    print(f"{found.loss[-1]:.2f}; test accuracy")
    for name, share in shares.items():
        print(f"  {name:<24}{share:8.1%}")
    print(f"nearest of ten pictures: learned {other['learned']:.1%}, mean {other['mean']:.1%}")
    print("error of the gradient, MiB kept")
    for name, error, kept in zip((*counts, "layer"), gradients.errors, gradients.kept, strict=True):
        print(f"  {name:>6} {error:10.1e} {kept / 2**20:8.2f}")
    numbers = {"shares": shares, "loss": found.loss, "seconds": found.seconds, "decay": decay, "nearest": other}
    numbers |= {"gradients": vars(gradients)}
    (settings.out / "bilevel.json").write_text(json.dumps(numbers, indent=2))

    assert gradients.errors[-1] < 1e-3 and gradients.kept[-1] < gradients.kept[0], numbers
    if not tiny:
        learned, real, mean, full = shares.values()
        assert learned > max(real + 0.2, mean + 0.04, 0.93) and learned > full - 0.03, numbers
        assert gradients.errors[0] > 100 * gradients.errors[-1], numbers
    return blocks(found, shares, other, gradients, counts, figures, len(data.test[1]))


def blocks(
    found: Learned,
    shares: dict[str, float],
    other: dict[str, float],
    gradients: Gradients,
    counts: tuple[int, ...],
    figures: tuple[Path, Path, Path],
    tests: int,
) -> list[Block]:
    """What the page shows."""
    learned, real, mean, full = shares.values()
    return [
        Text(
            "Training is an inner problem too, and a training set is its input. A thousand pictures of digits are to "
            "be replaced by ten: such that logistic regression, trained on those ten alone, tells the thousand. The "
            "layer trains it to the optimum; the loss of the trained model on real pictures goes back through that "
            "training into the pixels of the ten, and into the weight decay."
        ),
        Code(SNIPPET),
        Figure(
            figures[:1],
            "A real picture of each digit; the mean of all of its pictures, where the learned ones begin; the learned "
            f"ones after {len(found.loss)} steps; and how those differ from their own mean. They look alike: what a "
            "model learns is in the differences.",
            "Four rows of ten small pictures of the digits zero to nine; the learned ones are grey and alike, their "
            "differences have the shapes of the digits.",
        ),
        Figure(
            figures[1:],
            f"First: logistic regression on {tests} test pictures. Grey: the weight decay that is best on these very "
            "pictures, and for real ones the mean over ten draws. Second: against central differences of training to "
            "full precision, at the learned pictures.",
            "Bars of accuracy, and an error of the recorded training that falls with its length.",
        ),
        Text(
            f"Trained on the ten learned pictures it tells {learned:.1%} of test pictures; on all thousand {full:.1%}, "
            f"on the ten means {mean:.1%}, on ten real ones {real:.1%}. That took {len(found.loss)} trainings, "
            f"{found.seconds:.1f} s. They are not good for this model alone: as examples for the nearest neighbour "
            f"they are worth {other['learned']:.1%}, the means {other['mean']:.1%}."
        ),
        Heading("Through the training, not along it"),
        Table(
            ("", *(f"{n} steps" for n in counts), "layer"),
            [
                ("error", *(f"{e:.0e}" for e in gradients.errors)),
                ("kept, MiB", *(f"{k / 2**20:.1f}" for k in gradients.kept)),
            ],
            "Error of the gradient, and what is kept for the backward pass: training steps recorded, and the layer.",
        ),
        Text(
            "A gradient along recorded training steps is that of an unfinished training, and keeps all of them. The "
            "layer keeps the trained weights alone and solves one linear system; how the weights were found does not "
            "enter. Penalties, weights of samples, augmentations or a common start for many tasks are learned the "
            "same way."
        ),
    ]
