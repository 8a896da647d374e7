"""Sinkhorn's iteration against Newton's method with a sparse Hessian, at a small entropic weight.

Two problems: the assignment problem with uniform costs, 500 by 500, and the transport of one picture of a digit into
another, pixels as masses (with 1e-3 added) and squared distances as costs. Their costs range up to 1, and eps is
1/1200. Plans are then nearly sparse, and Sinkhorn's iteration hardly moves. After twenty of its steps Newton's method
takes over, whose Hessian keeps the large entries of the plan alone; a few steps reach rounding. (For a side as short as
that of the pictures the layer keeps all entries: nothing is to be saved.)

The error is that of the plan's sums in the L1 norm, relative to the mass. Both curves come from the public layer: it is
stopped after one step more each time, or goes on from its last potentials.

    python examples/plot_sparse_newton.py [--quick] [--steps 40000] [--out out/sparse_newton]

Source: X. Tang et al., Accelerating Sinkhorn Algorithm with Sparse Newton Iterations, 2024, section 5.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.transport import KernelSinkhorn, SparseNewton, TransportSolver, sinkhorn_ex

EPS = 1 / 1200
GOAL = 1e-12
FIRST = 20  # steps of Sinkhorn's before Newton's
D = torch.float64

Problem = tuple[Tensor, Tensor, Tensor]
Curve = list[tuple[int, float, float]]  # iterations, seconds, error


def assignment(n: int) -> Problem:
    """Uniform costs and equal masses."""
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=D)
    return cost, torch.full((n,), 1 / n, dtype=D), torch.full((n,), 1 / n, dtype=D)


def digits() -> Problem:
    """The first two pictures of the set: a zero and a one."""
    from sklearn.datasets import load_digits

    pictures = torch.tensor(load_digits().images[:2] / 16, dtype=D).flatten(1) + 1e-3
    a, b = pictures / pictures.sum(-1, keepdim=True)
    pixels = torch.cartesian_prod(torch.arange(8, dtype=D), torch.arange(8, dtype=D))
    cost = (pixels.unsqueeze(1) - pixels).square().sum(-1)
    return cost / cost.max(), a, b


def sinkhorn_curve(problem: Problem, steps: int, bar: tqdm) -> Curve:
    """In pieces, each of which goes on from the last."""
    cost, a, b = problem
    curve: Curve = []
    found, taken, seconds = None, 0, 0.0
    while taken < steps and (not curve or curve[-1][2] > GOAL):
        more = min(max(taken // 4, 5), steps - taken)
        solver = KernelSinkhorn(rtol=0, max_steps=more, check_every=more, newton_steps=0, scaling=False)
        start = time.perf_counter()
        found = sinkhorn_ex(cost, a, b, eps=EPS, solver=solver, warm_start=found)
        seconds += time.perf_counter() - start
        taken += more
        curve.append((taken, seconds, float(found.residual)))
        bar.update(more)
    return curve


def newton_curve(problem: Problem, bar: tqdm) -> Curve:
    """From the start each time, with one step more; the quickest of three runs."""
    cost, a, b = problem
    plain = {"newton_steps": 0, "scaling": False}
    solvers: list[TransportSolver] = [
        KernelSinkhorn(rtol=GOAL, max_steps=k, check_every=k, **plain) for k in range(5, FIRST + 1, 5)
    ]
    for steps in range(1, 81):
        solvers.append(SparseNewton(rtol=GOAL, max_steps=steps, sinkhorn_steps=FIRST, scaling=False, fallback=False))
    sinkhorn_ex(cost, a, b, eps=EPS, solver=solvers[-1])  # a first call, of what is loaded lazily
    curve: Curve = []
    for solver in solvers:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            found = sinkhorn_ex(cost, a, b, eps=EPS, solver=solver)
            seconds.append(time.perf_counter() - start)
        longest = max([min(seconds), *(point[1] for point in curve)])
        curve.append((int(found.steps), longest, float(found.residual)))
        bar.update(1)
        if bool(found.converged):
            break
    return curve


def until(curve: Curve, error: float) -> tuple[int, float] | None:
    """Iterations and seconds to an error."""
    return next(((k, seconds) for k, seconds, e in curve if e <= error), None)


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """Error against iterations and against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"Sinkhorn": "#d9822b", "sparse Newton": "#1f5fa8"}
    figure, axes = plt.subplots(len(curves), 2, figsize=(9, 3.1 * len(curves)), layout="constrained", sharey=True)
    for row, (title, both) in zip(axes, curves.items(), strict=True):
        for axis, column in zip(row, (0, 1), strict=True):
            for name, curve in both.items():
                x, y = [point[column] for point in curve], [max(point[2], 1e-16) for point in curve]
                axis.loglog(x, y, "o-", color=colours[name], markersize=3, linewidth=1.2, label=name)
            axis.axhline(GOAL, color="#999999", linewidth=0.6, linestyle=":")
            axis.set(xlabel=("iterations", "seconds")[column], title=title)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("error of the sums")
    axes[0][1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40_000, help="of Sinkhorn's iteration, at most")
    parser.add_argument("--size", type=int, default=500, help="of the assignment problem")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/sparse_newton"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.size = 300, 150
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    problems = {f"assignment, n = {options.size}": assignment(options.size), "two digits, n = 64": digits()}
    curves: dict[str, dict[str, Curve]] = {}
    with tqdm(unit=" steps", mininterval=0.5) as bar:
        for title, problem in problems.items():
            bar.set_description(title)
            newton = newton_curve(problem, bar)
            curves[title] = {"Sinkhorn": sinkhorn_curve(problem, options.steps, bar), "sparse Newton": newton}
    draw(curves, options.out / "sparse_newton.png")
    results = {}
    for title, both in curves.items():
        results[title] = {name: {"last": curve[-1], "to 1e-12": until(curve, GOAL)} for name, curve in both.items()}
        for name, curve in both.items():
            k, seconds, error = curve[-1]
            print(f"{title}, {name}: error {error:.1e} after {k} iterations, {seconds:.3f} s")
        iterations, seconds = (both["Sinkhorn"][-1][k] / both["sparse Newton"][-1][k] for k in (0, 1))
        bound = "" if until(both["Sinkhorn"], GOAL) else "more than "
        print(
            f"{title}: Sinkhorn takes {bound}{iterations:.0f} times the iterations, {bound}{seconds:.1f} times the time"
        )
        assert both["sparse Newton"][-1][0] <= (60 if title.startswith("assignment") else 100)
        assert both["sparse Newton"][-1][2] <= GOAL
        assert iterations > 20 or options.steps < 2000
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps > 10_000:
        assert next(iter(curves.values()))["Sinkhorn"][-1][0] > 10_000


if __name__ == "__main__":
    main()
