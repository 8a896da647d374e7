"""Distil a wide network into a narrow one: cross-entropy, the KL divergence to the teacher, and the Sinkhorn distance.

A network with 256 hidden units teaches networks with 8 to read digits. The KL divergence compares what both say about
one picture at a time; `SinkhornDistillation` compares everything the student says about a batch with everything the
teacher says, by the cheapest plan between them,

    <W, P>,  P = argmin_P <W, P> + eps sum P log P,  W_ij = |p_i - q_j|_1,

and its gradient is that of the plan at convergence. The published code differentiates 20 normalisations instead; the
figure shows what that gives along the training. Students of all ways, weights and seeds train at once. The weight of
the Sinkhorn distance is chosen on pictures for validation, accuracies are on others. On these pictures the three ways
end closer to each other than five seeds could tell apart.

    python examples/plot_sinkhorn_distillation.py [--quick] [--steps 1000] [--out out/sinkhorn_distillation]

Source: X. Cui et al., Sinkhorn Distance Minimization for Knowledge Distillation, 2024.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm

from difflayers.transport import Manhattan, SinkhornDistillation

SEEDS = 5
BATCH = 64
TEMPERATURE = 2.0
WEIGHTS = (0.001, 0.01, 0.1)  # of the sum over the batch; the paper has the first
ROUNDS = (5, 10, 20, 50, 100, 200)
COLOURS = ("#8c8c8c", "#d9822b", "#1f5fa8")
LOOK_EVERY = 50


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures of 8 x 8 pixels and their labels: to learn from, to choose a weight by, to test on."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = zip(("learn", "validate", "test"), order.split((800, 400, len(x) - 1200)), strict=True)
    return {name: (x[part], labels[part]) for name, part in parts}


def networks(hidden: int, copies: int) -> list[Tensor]:
    """Two layers each, one network a seed, `copies` times."""
    models = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((64, hidden), (1, hidden), (hidden, 10), (1, 10))
        scales = (1 / 8, 1 / 8, 1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        models.append([s * (2 * torch.rand(n, generator=generator) - 1) for n, s in zip(sizes, scales, strict=True)])
    return [torch.stack(p).repeat(copies, 1, 1).requires_grad_() for p in zip(*models, strict=True)]


def logits(p: list[Tensor], x: Tensor) -> Tensor:
    """``(networks, pictures, 10)`` for pictures ``(pictures, 64)`` or ``(networks, pictures, 64)``."""
    return (x @ p[0] + p[1]).relu() @ p[2] + p[3]


def accuracy(p: list[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (logits(p, x).argmax(-1) == labels).float().mean(-1)


def batches(count: int, steps: int) -> Tensor:
    """``(steps, SEEDS, BATCH)`` pictures, the same ones for every way."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(count, (steps, BATCH), generator=generator) for _ in range(SEEDS)], 1)


def teach(data: dict[str, tuple[Tensor, Tensor]], steps: int) -> list[Tensor]:
    x, labels = data["learn"]
    p = networks(256, 1)
    optimizer = torch.optim.Adam(p, lr=3e-3)
    for pick in tqdm(batches(len(x), steps // 2), desc="teachers", mininterval=1.0):
        optimizer.zero_grad()
        cross_entropy(logits(p, x[pick]).flatten(0, 1), labels[pick].flatten()).backward()
        optimizer.step()
    return [t.detach() for t in p]


def unrolled_slope(student: Tensor, teacher: Tensor, rounds: int) -> Tensor:
    """The gradient of the released loss: so many normalisations of rows and columns, differentiated."""
    x = student.detach().requires_grad_()
    W = Manhattan()((x / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1))
    P = torch.exp(-W / 0.1)
    for _ in range(rounds):
        P = P / P.sum(-1, keepdim=True)
        P = P / P.sum(-2, keepdim=True)
    return torch.autograd.grad((P * W).sum(), x)[0]


def slope_errors(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Relative errors of those gradients, ``(networks,)`` for each number of normalisations."""
    student, teacher = student.detach().double(), teacher.double()
    x = student.clone().requires_grad_()
    loss = SinkhornDistillation(TEMPERATURE, reduction="sum")
    exact = torch.autograd.grad(loss(x, teacher), x)[0].flatten(1)
    off = [(unrolled_slope(student, teacher, k).flatten(1) - exact).norm(dim=-1) for k in ROUNDS]
    return [e / exact.norm(dim=-1) for e in off]


def learn(data: dict[str, tuple[Tensor, Tensor]], teachers: list[Tensor], steps: int) -> tuple[dict, Tensor]:
    """Students of all ways: accuracies ``(ways, seeds)`` along the way, and errors of unrolled gradients."""
    x, labels = data["learn"]
    ways = 2 + len(WEIGHTS)
    p = networks(8, ways)
    optimizer = torch.optim.Adam(p, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    distance = SinkhornDistillation(TEMPERATURE, reduction="none")
    with_kl = torch.tensor([0.0] + [1.0] * (ways - 1)).unsqueeze(-1)
    weights = torch.tensor(WEIGHTS).unsqueeze(-1)
    curves: dict[str, list[Tensor]] = {"validate": [], "test": [], "step": []}
    errors = []
    for step, pick in enumerate(tqdm(batches(len(x), steps), desc="students", mininterval=1.0)):
        with torch.no_grad():
            target = logits(teachers, x[pick])
        out = logits(p, x[pick].repeat(ways, 1, 1)).unflatten(0, (ways, SEEDS))
        said, wanted = (out / TEMPERATURE).log_softmax(-1), (target / TEMPERATURE).log_softmax(-1)
        truth = labels[pick].expand(ways, SEEDS, BATCH)
        ce = cross_entropy(out.flatten(0, 2), truth.flatten(), reduction="none").view(truth.shape).mean(-1)
        kl = kl_div(said, wanted.expand_as(said), reduction="none", log_target=True).sum(-1).mean(-1)
        moved = BATCH * distance(out[2:], target.expand_as(out[2:]))
        optimizer.zero_grad()
        ((ce + with_kl * TEMPERATURE**2 * kl).sum() + (weights * moved).sum()).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            curves["step"].append(torch.tensor(step + 1))
            for name in ("validate", "test"):
                curves[name].append(accuracy(p, *data[name]).view(ways, SEEDS))
            errors.append(torch.stack(slope_errors(out[2], target)))  # at the paper's weight
    return {name: torch.stack(curve) for name, curve in curves.items()}, torch.stack(errors)


def draw(rows: dict[str, Tensor], curves: dict, ways: list[int], errors: Tensor, path: Path) -> None:
    """Accuracies at the end and along the way, and how far unrolled gradients are off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1, 1.2, 1.2))
    mean = [float(100 * r.mean()) for r in rows.values()]
    bars = [float(100 * r.std() / math.sqrt(SEEDS)) for r in rows.values()]
    colours = ("#444444", *COLOURS)
    for i, values in enumerate(rows.values()):
        axes[0].errorbar(i, mean[i], bars[i], fmt="o", color=colours[i], capsize=4)
        axes[0].plot(torch.linspace(-0.2, 0.2, SEEDS) + i, 100 * values, ".", color=colours[i], alpha=0.35)
        axes[0].annotate(f"{mean[i]:.1f}", (i, mean[i]), (9, -3), textcoords="offset points", color=colours[i])
    axes[0].set_xticks(range(len(rows)), [name.replace(" + ", "\n+ ") for name in rows])
    axes[0].set(xlim=(-0.5, len(rows) - 0.3), ylabel="percent", title="accuracy, mean and standard error")
    for way, name, colour, dash in zip(ways, list(rows)[1:], COLOURS, ("-", "-", "--"), strict=True):
        axes[1].plot(curves["step"], 100 * curves["test"][:, way].mean(-1), dash, color=colour, label=name)
    last = 100 * curves["test"][-1].mean(-1)
    axes[1].set(xlabel="step", ylabel="percent", title="accuracy of students, mean of the seeds")
    axes[1].set_ylim(float(last.min()) - 10, float(last.max()) + 1)
    share = 100 * errors.movedim(1, 0).flatten(1)
    axes[2].plot(ROUNDS, share.mean(-1), "o-", color=COLOURS[2], markersize=4, label="mean along the training")
    axes[2].fill_between(
        ROUNDS, share.amin(-1), share.amax(-1), color=COLOURS[2], alpha=0.2, linewidth=0, label="range"
    )
    axes[2].axvline(20, color=COLOURS[1], linewidth=1, linestyle="--", label="published code")
    axes[2].set(
        xscale="log", xlabel="unrolled normalisations", ylabel="percent", title="error of the unrolled gradient"
    )
    axes[2].set_ylim(bottom=0)
    axes[2].set_xticks(ROUNDS, [str(k) for k in ROUNDS])
    axes[2].minorticks_off()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1:]:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of the students")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/sinkhorn_distillation"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 60
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = digits()
    teachers = teach(data, options.steps)
    curves, errors = learn(data, teachers, options.steps)
    best = 2 + int(curves["validate"][-1, 2:].mean(-1).argmax())
    ways = [0, 1, best]
    rows = {"teacher": accuracy(teachers, *data["test"])}
    rows |= {n: curves["test"][-1, w] for n, w in zip(("CE", "CE + KL", "CE + KL + SinKD"), ways, strict=True)}
    draw(rows, curves, ways, errors, options.out / "sinkhorn_distillation.png")
    gain = rows["CE + KL + SinKD"] - rows["CE + KL"]
    results = {
        "accuracy": {n: {"mean": float(r.mean()), "error": float(r.std() / math.sqrt(SEEDS))} for n, r in rows.items()},
        "weight of SinKD": WEIGHTS[best - 2],
        "gain over KL": {"mean": float(gain.mean()), "error": float(gain.std() / math.sqrt(SEEDS))},
        "all weights": dict(zip(WEIGHTS, curves["test"][-1, 2:].mean(-1).tolist(), strict=True)),
        "error of unrolled gradients": dict(zip(ROUNDS, errors.mean((0, 2)).tolist(), strict=True)),
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, row in results["accuracy"].items():
        print(f"{name:16} {row['mean']:6.1%} +- {row['error']:.1%}")
    print(f"weight of SinKD, by validation: {results['weight of SinKD']}; others on test: {results['all weights']}")
    print(
        f"gain over KL, seed by seed: {results['gain over KL']['mean']:+.2%} +- {results['gain over KL']['error']:.2%}"
    )
    off = results["error of unrolled gradients"]
    print("relative error of unrolled gradients: " + ", ".join(f"{k} rounds {e:.1%}" for k, e in off.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 1000:
        assert rows["teacher"].mean() > rows["CE"].mean() + 0.01
        assert rows["CE + KL"].mean() > rows["CE"].mean() - 0.005
        assert rows["CE + KL + SinKD"].mean() > rows["CE + KL"].mean() - 0.01
        assert off[20] > 0.05 and off[20] > 3 * off[200]


if __name__ == "__main__":
    main()
