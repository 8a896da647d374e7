"""Penalties by gradients: one for all features, one for each feature, one for each weight.

Five folds of the training data have weights of their own; the penalties, e^x, are shared. The lower problem trains all
five, the upper objective is the loss of each fold's weights on the part that they have not seen: what
cross-validation minimises over a grid, as a function that has a gradient,

    min_x  mean_folds loss_valid(w_fold(x)),    w_fold(x) = argmin_w loss_train(w) + 1/2 sum_j e^(x_j) w_j^2.

On the left, the logistic regression of breast cancer: how far cross-validation is from its optimum (known from dense
Newton solves and scipy) against evaluations, with HOAG's three schedules of tolerances, with exact solves, with
ImplicitSGD, which solves nothing, and with a grid and random draws. On the right, three tasks on unseen data, next to
scikit-learn's estimators on the same folds: a penalty for each feature lowers the cross-validation far below what one
penalty can, and helps on unseen data where features of no use are to go, but not where the folds are small.

The elastic net has a kink, which HOAG does not take: there Adam follows the support-aware derivative of ArgminLayer.

    python examples/plot_hyperparameters.py [--quick] [--out out/hyperparameters]

Sources: F. Pedregosa, Hyperparameter optimization with approximate gradient, 2016; J. Lorraine, P. Vicol, D. Duvenaud,
Optimizing Millions of Hyperparameters by Implicit Differentiation, 2020; Q. Bertrand et al., Implicit differentiation
for fast hyperparameter selection in non-smooth convex learning, 2022.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from difflayers.bilevel import HOAG, ArgminLayer, Bilevel, Constant, Exponential, ImplicitSGD, Power, minimize
from difflayers.implicit import LBFGS, AcceleratedProximalGradient, Implicit, Neumann
from difflayers.linalg import LU

FOLDS = 5
BOX = (-8.0, 1.0)
KINDS = {"diabetes": "square", "breast_cancer": "logistic", "digits": "classes"}
TRAIN = {"diabetes": 300, "breast_cancer": 300, "digits": 200}


@dataclass
class Task:
    """Standardised data with a column of ones, a loss per sample, and the folds."""

    X: Tensor
    t: Tensor
    unseen: tuple[Tensor, Tensor]
    seen: Tensor  # (FOLDS, n): the samples that a fold is trained on
    kind: str  # of loss: "square", "logistic" or "classes"

    @property
    def outputs(self) -> int:
        return 10 if self.kind == "classes" else 1

    def losses(self, w: Tensor, X: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """``(folds, n)`` losses of weights ``(folds, d + 1, outputs)``."""
        scores, t = torch.einsum("nd,fdc->fnc", self.X if X is None else X, w), self.t if t is None else t
        if self.kind == "classes":
            return F.cross_entropy(scores.movedim(-1, 1), t.expand(len(w), -1), reduction="none")
        scores = scores.squeeze(-1)
        return F.softplus(-t * scores) if self.kind == "logistic" else (scores - t).square() / 2

    def start(self) -> Tensor:
        return torch.zeros(FOLDS, self.X.shape[1], self.outputs, dtype=torch.float64)


def load(name: str, seed: int) -> Task:
    from sklearn import datasets

    X, t = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name == "diabetes":  # next to 20 columns of noise, which should not matter
        X, t = np.hstack([X / X.std(0), np.random.default_rng(100 + seed).normal(size=(len(X), 20))]), t / 50
    order = np.random.default_rng(seed).permutation(len(X))
    learn, unseen = order[: TRAIN[name]], order[TRAIN[name] :]
    scale = X[learn].std(0)
    X = (X - X[learn].mean(0)) / np.where(scale > 0, scale, 1)
    t = t - t[learn].mean() if name == "diabetes" else 2.0 * t - 1 if name == "breast_cancer" else t
    X = torch.tensor(np.hstack([X, np.ones((len(X), 1))]))
    part = torch.arange(len(learn)) % FOLDS
    seen = part != torch.arange(FOLDS).unsqueeze(1)
    t = torch.tensor(t)
    return Task(X[learn], t[learn], (X[unseen], t[unseen]), seen, KINDS[name])


def cross_validation(task: Task) -> Bilevel:
    """The problem; x has a shape that broadcasts to ``(d, outputs)``."""
    train = task.seen / task.seen.sum(1, keepdim=True)
    valid = ~task.seen / (~task.seen).sum(1, keepdim=True)

    def upper(x: Tensor, w: Tensor, batch: None) -> Tensor:
        return (task.losses(w) * valid).sum() / FOLDS

    def lower(x: Tensor, w: Tensor, batch: None) -> Tensor:
        return (task.losses(w) * train).sum() + (x.exp() * w[:, :-1].square()).sum() / 2

    return Bilevel(upper, lower, project_upper=lambda x: x.clamp(*BOX))


def refit(task: Task, x: Tensor) -> Tensor:
    """Weights of all training data with these penalties."""
    everything = Bilevel(
        lambda x, w, batch: w.sum(),
        lambda x, w, batch: task.losses(w).mean() + (x.exp() * w[:, :-1].square()).sum() / 2,
    )
    with torch.no_grad():
        return ArgminLayer(everything, solver=LBFGS(max_steps=5000, rtol=1e-6))(x, init=task.start()[:1])


def on_unseen(task: Task, w: Tensor) -> dict[str, float]:
    """Mean loss on unseen data (for squares: mean squared error), and the share of errors of a classifier."""
    X, t = task.unseen
    loss, scores = task.losses(w, X, t).mean().item(), (X @ w[0]).squeeze(-1)
    if task.kind == "square":
        return {"loss": 2 * loss}
    wrong = scores.argmax(-1) != t if task.kind == "classes" else scores * t <= 0
    return {"loss": loss, "errors": wrong.double().mean().item()}


# -------------------------------------------------------------------------------------------------------- suboptimality


class Dense:
    """Cross-validation of the logistic regression by Newton's method in numpy: the reference."""

    def __init__(self, task: Task) -> None:
        self.X, self.t, self.seen = task.X.numpy(), task.t.numpy(), task.seen.numpy()
        self.w = np.zeros((FOLDS, self.X.shape[1]))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient."""
        penalty = np.append(np.broadcast_to(np.exp(x), self.X.shape[1] - 1), 0.0)
        value, grad = 0.0, np.zeros(self.X.shape[1] - 1)
        for k, seen in enumerate(self.seen):
            X, t, w = self.X[seen], self.t[seen], self.w[k]
            for _ in range(100):
                p = 1 / (1 + np.exp(t * (X @ w)))
                H = (X * (p * (1 - p))[:, None]).T @ X / len(X) + np.diag(penalty)
                step = np.linalg.solve(H, penalty * w - X.T @ (t * p) / len(X))
                w = w - step * min(1.0, 3.0 / max(np.abs(X @ step).max(), 1e-300))
                if np.abs(step).max() < 1e-11:
                    break
            self.w[k] = w
            X, t = self.X[~seen], self.t[~seen]
            value += np.logaddexp(0, -t * (X @ w)).mean() / FOLDS
            slope = -X.T @ (t / (1 + np.exp(t * (X @ w)))) / len(X) / FOLDS
            grad -= (penalty * w * np.linalg.solve(H, slope))[:-1]
        return value, grad if np.size(x) > 1 else grad.sum(keepdims=True)


def best(dense: Dense, n: int) -> float:
    """The optimum, from scipy."""
    from scipy import optimize

    if n == 1:
        return optimize.minimize_scalar(lambda x: dense(np.array([x]))[0], bounds=BOX, options={"xatol": 1e-9}).fun
    starts = [np.full(n, c) for c in (0.0, -4.0, -7.0)]  # it has many stationary points
    more = {"jac": True, "bounds": [BOX] * n, "options": {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-8}}
    return min(optimize.minimize(dense, x, method="L-BFGS-B", **more).fun for x in starts)


NAMES = ("HOAG, exponential", "HOAG, quadratic", "HOAG, cubic", "exact", "ImplicitSGD", "random draws", "grid")


def gradient_methods(task: Task, n: int) -> dict:
    """What runs; all of them start from penalties of one."""
    x, problem = torch.zeros(n, 1, dtype=torch.float64), cross_validation(task)
    tolerances = Exponential(1e-1, 0.9), Power(1e-1, -2.0), Power(1e-1, -3.0), Constant(1e-12)
    pairs = zip(NAMES[:4], tolerances, strict=True)
    methods = {name: HOAG(problem, x, task.start(), tolerances=eps) for name, eps in pairs}
    curvature = float(torch.linalg.eigvalsh(task.X.mT @ task.X / len(task.X))[-1]) / 4 * 1.25 + np.exp(BOX[1])
    methods["ImplicitSGD"] = ImplicitSGD(
        problem, x, task.start(), optimizer=partial(torch.optim.Adam, lr=0.3), step_lower=1 / curvature, inner_steps=5,
        adjoint=Neumann(10, step=1 / curvature),
    )  # fmt: skip
    return methods


def run(algo, budget: int, phi, name: str) -> list[tuple[int, float]]:
    """Evaluations so far and the exact cross-validation at the point they led to."""
    curve = []
    with tqdm(total=budget, desc=name, mininterval=1.0) as bar:
        while not curve or curve[-1][0] < budget:
            stats = algo.step()
            x = algo.accepted[0] if isinstance(algo, HOAG) else algo.x
            curve.append((stats.gradients + stats.products, phi(x)))
            bar.update(min(curve[-1][0], budget) - bar.n)
    return curve


def search(task: Task, points: np.ndarray, budget: int, phi) -> list[tuple[int, float]]:
    """Solves at given points by L-BFGS of scipy, each from the last solution, counting gradients."""
    from scipy import optimize

    problem, w, curve, spent = cross_validation(task), task.start(), [], 0
    both = torch.func.grad_and_value(lambda w, x: problem.lower(x, w.reshape(task.start().shape), None))
    for point in tqdm(points, desc="search", mininterval=1.0):
        x = torch.tensor(point).reshape(-1, 1)
        at = lambda w, x=x: tuple(v.numpy() for v in both(torch.tensor(w), x)[::-1])  # noqa: E731
        result = optimize.minimize(at, w.reshape(-1), jac=True, method="L-BFGS-B", options={"gtol": 1e-4})
        w, spent = result.x, spent + result.nfev
        if spent > budget:
            break
        curve.append((spent, phi(x)))
    return curve


def convergence(budgets: dict[int, int]) -> dict[str, dict]:
    """Best cross-validation so far, for one penalty and for one for each feature, and the optima."""
    task, curves = load("breast_cancer", 0), {}
    for n, budget in budgets.items():
        dense = Dense(task)
        phi = lambda x, dense=dense: dense(x.numpy().reshape(-1))[0]  # noqa: E731
        start = [(1, phi(torch.zeros(n, 1)))]
        found = {name: start + run(a, budget, phi, name) for name, a in gradient_methods(task, n).items()}
        draws = np.random.default_rng(0).uniform(*BOX, size=(60, n))
        found["random draws"] = start + search(task, draws, budget, phi)
        if n == 1:
            found["grid"] = start + search(task, np.linspace(BOX[1], BOX[0], 16)[:, None], budget, phi)
        curves[str(n)] = {"optimum": best(dense, n)}
        for name, curve in found.items():
            at, values = zip(*curve, strict=True)
            curves[str(n)][name] = list(zip(at, np.minimum.accumulate(values).tolist(), strict=True))
    return curves


# ---------------------------------------------------------------------------------------------------------- unseen data


def elastic_net(task: Task, steps: int) -> Tensor:
    """One l1 penalty for each feature and one l2 penalty by Adam, through the supports; weights of all the data."""

    def shrink(v: Tensor, x: Tensor, step: Tensor) -> Tensor:
        threshold = torch.cat([step * x[:-1].exp(), x.new_zeros(1)]).reshape(-1, 1)
        return v.sign() * (v.abs() - threshold).clamp_min(0)

    def smooth(weights: Tensor):
        return lambda x, w, batch: (task.losses(w) * weights).sum() + x[-1].exp() * w[:, :-1].square().sum() / 2

    train = task.seen / task.seen.sum(1, keepdim=True)
    problem = Bilevel(cross_validation(task).upper, smooth(train), prox_lower=shrink)
    layer = ArgminLayer(problem, solver=AcceleratedProximalGradient(max_steps=5000, rtol=1e-6), adjoint=Implicit(LU()))
    d = task.X.shape[1] - 1
    x = torch.full((d + 1,), -3.0, dtype=torch.float64).requires_grad_()
    optimiser, w = torch.optim.Adam([x], lr=0.1), task.start()
    for _ in tqdm(range(steps), desc="elastic net", mininterval=1.0):
        optimiser.zero_grad()
        w = layer(x, init=w.detach())
        problem.upper(x, w, None).backward()
        optimiser.step()
        with torch.no_grad():
            x.clamp_(*BOX)
    with torch.no_grad():
        whole = Bilevel(problem.upper, smooth(torch.ones(1, len(task.X)) / len(task.X)), prox_lower=shrink)
        return ArgminLayer(whole, solver=layer.solver)(x, init=w[:1])


def scikit_learn(name: str, task: Task) -> dict[str, Tensor]:
    """Weights by the estimators with built-in cross-validation, on the same folds."""
    from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV

    X, t = task.X[:, :-1].numpy(), task.t.numpy()
    folds = [(np.flatnonzero(seen), np.flatnonzero(~seen)) for seen in task.seen.numpy()]
    if name == "diabetes":
        models = {
            "RidgeCV": RidgeCV(len(X) * np.exp(np.linspace(*BOX, 31)), cv=folds),
            "ElasticNetCV": ElasticNetCV(l1_ratio=[0.5, 0.9, 1.0], cv=folds, max_iter=20_000),
        }
    else:
        models = {
            "LogisticRegressionCV": LogisticRegressionCV(
                Cs=np.exp(-np.linspace(*BOX, 16)) / len(X), l1_ratios=(0.0,), cv=folds, scoring="neg_log_loss",
                max_iter=2000, use_legacy_attributes=False,
            )
        }  # fmt: skip
    weights = {}
    for title, model in models.items():
        model.fit(X, t)
        w = np.vstack([np.atleast_2d(model.coef_).T, np.reshape(model.intercept_, (1, -1))])
        weights[title] = torch.tensor(w).unsqueeze(0)
    return weights


def compare(name: str, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    task = load(name, seed)
    d, steps = task.X.shape[1] - 1, 4 if quick else 30
    weights, problem = scikit_learn(name, task), cross_validation(task)
    for title, shape in {"one penalty": (1, 1), "one for each feature": (d, 1)}.items():
        algo = HOAG(problem, torch.full(shape, -3.0, dtype=torch.float64), task.start())
        minimize(algo, steps // (2 if name == "digits" else 1))
        weights[f"HOAG, {title}"] = refit(task, algo.accepted[0])
    if name == "digits":
        adam = {"optimizer": partial(torch.optim.Adam, lr=0.1), "optimizer_lower": partial(torch.optim.Adam, lr=0.02)}
        algo = ImplicitSGD(problem, torch.full((d, 10), -3.0, dtype=torch.float64), task.start(), **adam)
        minimize(algo, 2 * steps)
        weights["ImplicitSGD, one for each weight"] = refit(task, algo.x)
    results = {title: on_unseen(task, w) for title, w in weights.items()}
    if name == "diabetes":
        weights["elastic net, one for each feature"] = elastic_net(task, 3 if quick else 40)
        for title in ("ElasticNetCV", "elastic net, one for each feature"):
            results[title] = on_unseen(task, weights[title])
            results[title]["features"] = int((weights[title][0, :-1] != 0).sum())
    return results


# ------------------------------------------------------------------------------------------------------------- reports

COLOURS = ("#1f5fa8", "#2f8fd0", "#7fbde8", "#d9822b", "#3a9a5c", "#b0b0b0", "#606060")
REFERENCE = {"diabetes": "RidgeCV", "breast_cancer": "LogisticRegressionCV", "digits": "LogisticRegressionCV"}


def draw(curves: dict, unseen: dict, path: Path) -> None:
    """Convergence for one penalty and for thirty; losses on unseen data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=(1, 1, 1.05))
    left, middle, right = axes
    for axis, n in ((left, "1"), (middle, "30")):
        optimum = curves[n]["optimum"]
        for name, colour in zip(NAMES, COLOURS, strict=True):
            if name in curves[n]:
                at, values = zip(*curves[n][name], strict=True)
                values = [max(v - optimum, 1e-13) for v in values] if n == "1" else values
                axis.step(at, values, where="post", color=colour, label=name, linewidth=1.8)
    left.set(yscale="log", ylim=(1e-12, 1), xlim=(0, 600), title="one penalty: distance from the optimum")
    left.set(xlabel="gradients and products", ylabel="cross-validation loss, less the optimum")
    for n, text, shift, style in (("1", "best single penalty", 2e-3, ":"), ("30", "best found by scipy", -6e-3, "--")):
        middle.axhline(curves[n]["optimum"], color="black", linestyle=style, linewidth=1)
        middle.text(1480, curves[n]["optimum"] + shift, text, ha="right", fontsize=9)
    middle.set(title="one penalty for each of 30 features", xlabel="gradients and products", xlim=(0, 1500))
    middle.set(ylabel="cross-validation loss", ylim=(0.045, 0.16))
    left.legend(frameon=False, fontsize=8.5, loc="lower left")
    row, ticks = 0.0, []
    for name, seeds in unseen.items():
        right.text(0.01, row, f"{name}: {REFERENCE[name]} is 1", transform=right.get_yaxis_transform(), va="center")
        for title in (title for title in seeds[0] if title != REFERENCE[name]):
            row += 1
            ratio = [one[title]["loss"] / one[REFERENCE[name]]["loss"] for one in seeds]
            colour = "#606060" if "CV" in title else "#3a9a5c" if "Implicit" in title else "#1f5fa8"
            right.plot(ratio, [row] * len(ratio), "o", color=colour, alpha=0.45, markersize=6)
            right.plot([np.mean(ratio)], [row], "|", color=colour, markersize=18, markeredgewidth=2.5)
            ticks.append((row, title))
        row += 1.2
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(*zip(*ticks, strict=True), fontsize=8.5)
    right.set_ylim(row - 0.6, -0.7)
    right.set(xlabel="loss on unseen data, in units of scikit-learn's", title="unseen data, three seeds and their mean")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/hyperparameters"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    quick, start = options.quick, time.perf_counter()
    curves = convergence({1: 150, 30: 150} if quick else {1: 600, 30: 1500})
    names = ("diabetes", "breast_cancer") if quick else tuple(KINDS)
    unseen = {name: [compare(name, seed, quick) for seed in range(1 if quick else 3)] for name in names}
    draw(curves, unseen, options.out / "hyperparameters.png")
    single = curves["1"].pop("optimum")
    first = lambda curve: next((k for k, value in curve if value < single + 1e-4), float("inf"))  # noqa: E731
    needed = {name: first(curve) for name, curve in curves["1"].items()}
    reached = {name: curve[-1][1] for name, curve in curves["30"].items() if name != "optimum"}
    results = {"evaluations to 1e-4": needed, "curves": curves, "unseen": unseen}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print("evaluations until one penalty is 1e-4 from the optimum: ", end="")
    print(", ".join(f"{name} {count:g}" for name, count in needed.items()))
    print(f"thirty penalties, where the best single one has {single:.4f}: ", end="")
    print(", ".join(f"{name} {value:.4f}" for name, value in reached.items()))
    means = {(name, title): {} for name, seeds in unseen.items() for title in seeds[0]}
    for (name, title), row in means.items():
        row.update({key: np.mean([one[title][key] for one in unseen[name]]) for key in unseen[name][0][title]})
        print(f"{name:14s} {title:34s}" + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if not quick:
        assert all(1.25 * needed[name] < needed["exact"] for name in NAMES[:3])
        assert all(reached[name] < 0.9 * single < reached["exact"] for name in NAMES[:3])
        loss = {key: row["loss"] for key, row in means.items()}
        assert all(loss[name, "HOAG, one penalty"] < 1.03 * loss[name, REFERENCE[name]] for name in KINDS)
        assert loss["diabetes", "HOAG, one for each feature"] < loss["diabetes", "RidgeCV"]
        # many penalties fit five folds of 200 pictures so well that they say little of other pictures
        assert loss["digits", "HOAG, one for each feature"] > loss["digits", "HOAG, one penalty"]


if __name__ == "__main__":
    main()
