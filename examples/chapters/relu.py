"""Whom to believe: people label pictures, some of them at random, and training itself says whose labels to drop."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, ORANGE, axes, save
from chapters._training_gradients import Comparison, compare, descend, draw_descent, draw_errors
from difflayers.relu import ConvexReLUHead, ConvexReLUSolution, Gates, convex_gated_relu, predict, sample_gates

WRONG = (0.02, 0.02, 0.05, 0.1, 0.5, 0.5, 0.5, 0.9)  # how often each person is wrong: half of them guess, or worse
KINDS = ("careful",) * 4 + ("guessing",) * 3 + ("contrary",)
COLOURS = {"careful": BLUE, "guessing": ORANGE, "contrary": GREY}
GRID = (0.3, 1.0, 3.0, 10.0, 30.0)  # weight decay of the networks that are trained for comparison
AGREE = 0.65  # a share of labels: what a person has to share with a network of the checked ones


# ------------------------------------------------------------------------------------------------------------- digits


@dataclass
class Data:
    """scikit-learn's digits at 4 x 4 pixels; a label is 1 for odd digits and -1 for even ones."""

    images: Tensor
    who: Tensor  # the person who labelled each of them
    said: Tensor  # their labels
    right: Tensor  # what the labels should be, which nobody may learn from
    checked: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(each: int, checked: int, seed: int = 0) -> Data:
    """So many pictures for each person, and so many whose labels have been checked; the rest is for testing."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float64).view(-1, 8, 8) / 16
    x = nn.functional.avg_pool2d(x, 2).flatten(1)
    y = torch.tensor(digits % 2 * 2 - 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    x, y, n = (2 * (x - x.mean(0)))[order], y[order], each * len(WRONG)
    who = torch.arange(n) % len(WRONG)
    flipped = torch.rand(n, generator=generator) < torch.tensor(WRONG)[who]
    rest = n + checked
    return Data(x[:n], who, torch.where(flipped, -y[:n], y[:n]), y[:n], (x[n:rest], y[n:rest]), (x[rest:], y[rest:]))


def with_bias(x: Tensor) -> Tensor:
    """A column of ones."""
    return nn.functional.pad(x, (0, 1), value=1.0)


def everything(data: Data, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures of all people with these labels, and the checked ones."""
    return torch.cat([data.images, data.checked[0]]), torch.cat([labels, data.checked[1]])


# ----------------------------------------------------------------------------------------------------------- training


@dataclass
class Learned:
    """What the gradient through the training led to."""

    trust: list[list[float]]  # of each person, by step
    beta: list[float]
    loss: list[float]  # of checked labels
    seconds: float


def learn(data: Data, gates: Gates, steps: int) -> Learned:
    """Trusts everybody alike at first; each step trains a network to its optimum, and differentiates that."""
    head = ConvexReLUHead(3.0, gates, learn_beta=True, bias=True)
    score = torch.zeros(len(WRONG), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [score], "lr": 0.2}, {"params": [head.log_beta], "lr": 0.05}])
    (images, labels), out, start = data.checked, Learned([], [], [], 0.0), time.perf_counter()
    for _ in (bar := tqdm(range(steps), desc="trust", unit="step")):
        answers = head(data.images, data.said, images, sample_weight=score.sigmoid()[data.who])
        loss = nn.functional.softplus(-2 * labels * answers).mean()
        out.trust.append(score.sigmoid().tolist())
        out.beta.append(head.log_beta.exp().item())
        out.loss.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    out.trust.append(score.sigmoid().tolist())
    out.beta.append(head.log_beta.exp().item())
    out.seconds = time.perf_counter() - start
    return out


def fit(x: Tensor, y: Tensor, beta: float, gates: Gates, weight: Tensor | None = None) -> ConvexReLUSolution:
    """A network trained to its optimum."""
    return convex_gated_relu(with_bias(x), y, beta, gates.vectors, sample_weight=weight)


def accuracy(network: ConvexReLUSolution, data: Data) -> float:
    """On test pictures."""
    return (predict(network, with_bias(data.test[0])) * data.test[1] > 0).double().mean().item()


def best(x: Tensor, y: Tensor, gates: Gates, data: Data) -> float:
    """Of all betas of the grid, by test accuracy: more than anyone could know."""
    return max(accuracy(fit(x, y, beta, gates), data) for beta in GRID)


def rivals(data: Data, gates: Gates) -> dict[str, float]:
    """The same network without learned trust; the last line is told all right labels."""
    judge = predict(fit(*data.checked, 1.0, gates), with_bias(data.images)) * data.said > 0
    agreed = torch.stack([judge[data.who == i].double().mean() for i in range(len(WRONG))]) > AGREE
    some = agreed[data.who]
    mixed = everything(data, data.said)
    keep = torch.cat([some, torch.ones(len(data.checked[1]), dtype=torch.bool)])
    return {
        "everybody": best(data.images, data.said, gates, data),
        "checked": best(*data.checked, gates, data),
        "everybody and checked": best(*mixed, gates, data),
        "who agrees and checked": best(mixed[0][keep], mixed[1][keep], gates, data),
        "no wrong labels": best(*everything(data, data.right), gates, data),
    }


# ------------------------------------------------------------------------------------------------------------ figures


def draw_trust(found: Learned, path: Path) -> Path:
    """Trust by step."""
    figure, axis = axes(height=2.9)
    for i, kind in enumerate(KINDS):
        first = kind not in KINDS[:i]
        axis.plot([row[i] for row in found.trust], color=COLOURS[kind], lw=1.6, label=kind if first else None)
    axis.set(title="Weight of each person's labels", xlabel="step", ylim=(-0.02, 1.02))
    axis.legend(loc="center right", bbox_to_anchor=(1, 0.62))
    return save(figure, path)


def draw_accuracy(scores: dict[str, float], path: Path) -> Path:
    """Test accuracy of each way to train."""
    figure, axis = axes(height=2.9)
    names = list(scores)[::-1]
    colours = [BLUE if name.startswith("learned") else GREY for name in names]
    axis.barh(range(len(names)), [scores[name] for name in names], color=colours, height=0.62)
    for i, name in enumerate(names):
        axis.text(scores[name] - 0.008, i, f"{scores[name]:.1%}", va="center", ha="right", color="white", fontsize=8.5)
    axis.set(title="Accuracy on test pictures", xlim=(0.5, 1), xticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1])
    axis.set_yticks(range(len(names)), [name.replace(" and ", "\nand ") for name in names])
    axis.tick_params(axis="y", length=0, labelsize=8.5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------ chapter

SNIPPET = """
head = ConvexReLUHead(
    3.0, gates, learn_beta=True, bias=True
)
score = torch.zeros(8, requires_grad=True)

trust = score.sigmoid()[who]  # one a picture
# trained on what people said, asked about others
answers = head(images, said, checked, trust)
margins = 2 * labels * answers
nn.functional.softplus(-margins).mean().backward()
"""


@chapter("relu", title="A layer that trains a network", order=50)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    tiny = settings.tiny
    data = load(8 if tiny else 60, 20 if tiny else 80)
    gates = sample_gates(with_bias(data.images), 10 if tiny else 30, generator=torch.Generator().manual_seed(0))
    found = learn(data, gates, 3 if tiny else 25)
    trust, beta = torch.tensor(found.trust[-1], dtype=torch.float64)[data.who], found.beta[-1]
    weight = torch.cat([trust, torch.ones_like(data.checked[1])])
    final = fit(*everything(data, data.said), beta, gates, weight)
    scores = rivals(data, gates)
    scores = {"learned trust and checked": accuracy(final, data)} | scores
    gap = (final.gap / final.objective).item()
    problem = with_bias(data.images), data.said, trust, torch.tensor(beta, dtype=torch.float64), gates
    adam = descend(*problem, starts=5, steps=20 if tiny else 1500)
    gradients = compare(*problem, data.who, with_bias(data.checked[0]), data.checked[1], tiny=tiny)

    figures = (
        draw_trust(found, settings.out / "trust.png"),
        draw_accuracy(scores, settings.out / "accuracy.png"),
        draw_descent(adam, settings.out / "adam.png"),
        draw_errors(gradients, settings.out / "gradients.png"),
    )
    wrong = (data.said != data.right).double().mean()
    print(f"\n{len(WRONG)} people, {len(data.said)} labels, {wrong:.0%} of them wrong; {len(data.checked[1])} checked")
    print(f"{len(found.loss)} networks trained and differentiated in {found.seconds:.1f} s; trust in")
    print("  " + ", ".join(f"{kind} {t:.2f}" for kind, t in zip(KINDS, found.trust[-1], strict=True)))
    print("test accuracy")
    for name, share in scores.items():
        print(f"  {name:<28}{share:8.1%}")
    print(f"certified gap {gap:.0e}; Adam from five starts ends {min(adam.ends):.0e} to {max(adam.ends):.0e} above")
    print(f"gradient of the layer: error {gradients.error:.1e}, {gradients.kept / 2**20:.2f} MiB kept; unrolled:")
    for n, error, kept in zip(gradients.iterations, gradients.errors, gradients.unrolled, strict=True):
        print(f"  {n:>5} iterations {error:10.1e} {kept / 2**20:9.1f} MiB kept")
    numbers = {"scores": scores, "trust": found.trust[-1], "beta": found.beta, "loss": found.loss, "gap": gap}
    numbers |= {"seconds": found.seconds, "adam": adam.ends, "gradients": vars(gradients)}
    (settings.out / "relu.json").write_text(json.dumps(numbers, indent=2))

    assert gap < 1e-9 and min(adam.ends) > -1e-9, numbers
    assert gradients.error < 1e-4 and gradients.kept < gradients.unrolled[-1], numbers
    if not tiny:
        learned, everybody, checked, both, *_ = scores.values()
        assert learned > max(everybody, checked, both) + 0.02 and learned > 0.84, numbers
        assert min(found.trust[-1][:4]) > 0.6 > 0.2 > max(found.trust[-1][4:]), numbers
        assert gradients.errors[-1] > 10 * gradients.error, numbers
    return blocks(data, found, scores, gap, adam.ends, gradients, figures)


def blocks(
    data: Data,
    found: Learned,
    scores: dict[str, float],
    gap: float,
    ends: list[float],
    gradients: Comparison,
    figures: tuple[Path, Path, Path, Path],
) -> list[Block]:
    """What the page shows."""
    learned, everybody, checked, both, agreeing, told = scores.values()
    wrong = (data.said != data.right).double().mean()
    return [
        Text(
            f"A layer can train a network. Eight people have labelled {len(data.said) // len(WRONG)} pictures "
            "of digits each: odd or even? Four of them take care, three guess, and one says the contrary; "
            f"{wrong:.0%} of all labels are wrong, and nobody knows whose. Known are {len(data.checked[1])} further "
            "pictures whose labels have been checked. The layer trains a two-layer gated ReLU network on what people "
            "said, each picture with the weight of the person, until it is optimal; this network is asked about the "
            "checked pictures, and the gradient of its mistakes goes back through the training into the weights of "
            "the people, and into the weight decay."
        ),
        Code(SNIPPET),
        Figure(
            figures[:2],
            f"First: all weights begin at one half. Second: networks of the same gates on {len(data.test[1])} test "
            "pictures. For grey bars the weight decay is the best of five for these very pictures, which flatters "
            "them; the learned one has never seen them.",
            "Lines of careful people rise to one, those of guessing and contrary ones fall to zero; bars of accuracy.",
        ),
        Text(
            f"With learned weights, and the checked pictures beside them, {learned:.1%} of test pictures are told "
            f"right. All labels as they came give {everybody:.1%}, the checked ones alone {checked:.1%}, both "
            f"together {both:.1%}; without a single wrong label it would be {told:.1%}. Whoever thinks of it can "
            "also train on the checked pictures first, and drop the people who disagree with that network: with a "
            f"threshold of {AGREE:.0%} that comes to {agreeing:.1%}. The gradient needs no such idea, and no "
            "threshold; it would do the same for anything else that enters training. It is no oracle: so few checked "
            "pictures may take the weight from a careful person too, in another draw of them."
        ),
        Table(
            ("person", *(f"{i + 1}" for i in range(len(WRONG)))),
            [
                ("wrong labels", *(f"{w:.0%}" for w in _wrong(data))),
                ("weight", *(f"{t:.2f}" for t in found.trust[-1])),
            ],
            f"After {len(found.loss)} steps, each of which trains a network and differentiates it: "
            f"{found.seconds:.1f} s in all.",
        ),
        Heading("Trained, and done"),
        Text(
            "The training is a convex program, so there is one optimal value, and a certificate: the objective lies "
            f"at most {gap:.0e} of itself above it. Adam on the weights of the same network, from five random starts, "
            f"ends {min(ends):.0e} to {max(ends):.0e} above. That is near, and it had to be told when to stop; what "
            "it found depends on where it started, and a gradient through it on how it went."
        ),
        Figure(
            figures[2:],
            "First: how far above the optimum the objective is, relative to it. Second: gradient of the loss in the "
            "weights of the people and in the weight decay, against central differences of certified optima along "
            "random directions; unrolled: through so many accelerated proximal gradient steps.",
            "Five curves that fall slowly, and errors of the unrolled gradient that fall from one; the layer's is "
            "far below.",
        ),
        Text(
            "The usual gradient goes through a number of training steps. After "
            f"{gradients.iterations[-1]} of them it is still off by {gradients.errors[-1]:.0%}, and what is kept for "
            "it grows with them. The layer solves one linear system at the optimum; its gradient is off by "
            f"{gradients.error:.0e}, which is what differences can tell."
        ),
    ]


def _wrong(data: Data) -> list[float]:
    """Of each person."""
    wrong = (data.said != data.right).double()
    return [wrong[data.who == i].mean().item() for i in range(len(WRONG))]
