"""`python -m benchmarks.relu_scaling` times the steps of the solvers of convex ReLU networks as the training set grows.

The paper factors a matrix of size 2 d P and solves with it in every iteration of ADMM: O((d P)^2) a step,
after O((d P)^3). Ours needs one n x n factor and O(n^2 + n d P) a step. A step of the interior-point method factors
anew: O(n d^2 P + min(n, d P)^2 max(n, d P)). Random data, d = 20 inputs; seconds are the least of three runs, one
thread. Writes a table and a figure to `benchmarks/results/`.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import ROOT
from difflayers.relu import sample_gates
from difflayers.relu._cone_admm import _Loop as ADMMLoop
from difflayers.relu._cone_interior_point import _Loop as InteriorLoop
from difflayers.relu._cone_newton import solve_factor
from difflayers.relu._cone_problem import ConeProblem, normalise

D, GATES = 20, 50
SIZES = (250, 500, 1000, 2000, 3500, 5000)
COUNTS = (25, 50, 100, 200)
FIXED = 1000  # samples where the number of gates grows
Row = dict[str, float]


def draw(n: int, gates: int) -> ConeProblem:
    """A problem in the solvers' units."""
    generator = torch.Generator().manual_seed(n)
    X = torch.randn(n, D, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    patterns = sample_gates(X, gates, generator=generator).patterns.to(X.dtype)
    return normalise(ConeProblem(X, y, torch.ones_like(y), torch.tensor(0.01 * n, dtype=X.dtype), patterns))[0]


def least(job: Callable[[], object], repeat: int) -> float:
    """Seconds of one call, the least of three rounds of `repeat` calls."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeat):
            job()
        best = min(best, (time.perf_counter() - start) / repeat)
    return best


def row(n: int, gates: int) -> Row:
    """Seconds of the set-up of ADMM, of its step and of a step of the interior-point method."""
    problem = draw(n, gates)
    start = time.perf_counter()
    admm = ADMMLoop(problem, 1.0)
    setup = time.perf_counter() - start
    interior = InteriorLoop(problem)
    point = interior.start()
    return {
        "n": n,
        "gates": problem.M.shape[-1],
        "ADMM set-up": setup,
        "ADMM step": least(admm.step, 10),
        "interior-point step": least(lambda: interior.step(point), 1),
    }


def dense_step(n: int, gates: int) -> float:
    """Seconds of the paper's solve in one step: with a factor of the whole matrix, of size 2 d P."""
    size = 2 * D * gates
    factor = torch.eye(size, dtype=torch.float64) + torch.randn(size, size, dtype=torch.float64).tril() / size
    factor = factor.mT.contiguous().mT  # column by column, as LAPACK's are
    rhs = torch.randn(size, dtype=torch.float64)
    return least(lambda: solve_factor(factor, rhs), 3)


def slope(rows: list[Row], by: str, key: str) -> float:
    """The exponent of growth over the last rows."""
    first, last = rows[-3], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last[by] / first[by])


def table(rows: list[Row]) -> list[str]:
    keys = list(rows[0])
    head = ["| " + " | ".join(keys) + " |", "| " + " | ".join("---:" for _ in keys) + " |"]
    cells = ([f"{r[k]:.0f}" if k in ("n", "gates") else f"{r[k] * 1e3:.1f} ms" for k in keys] for r in rows)
    return head + ["| " + " | ".join(each) + " |" for each in cells]


def draw_figure(by_size: list[Row], by_gates: list[Row], dense: list[Tensor | float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    for axis, rows, by in ((axes[0], by_size, "n"), (axes[1], by_gates, "gates")):
        for key, marker in (("ADMM step", "o"), ("interior-point step", "s"), ("ADMM set-up", "^")):
            label = f"{key}, slope {slope(rows, by, key):.1f}"
            axis.loglog([r[by] for r in rows], [r[key] for r in rows], marker=marker, label=label)
    axes[1].loglog([r["gates"] for r in by_gates], dense, "k:", marker="x", label="solve with the paper's matrix")
    axes[0].set(xlabel="samples n", ylabel="seconds", title=f"{GATES} gates, {D} inputs")
    axes[1].set(xlabel="gates P", title=f"n = {FIXED}, {D} inputs")
    for axis, ticks in zip(axes, (SIZES, COUNTS), strict=True):
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(ROOT / "benchmarks" / "results" / "relu_scaling.png", dpi=120)


def main() -> None:
    """Everything, with a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    by_size = [row(n, GATES) for n in tqdm(SIZES, desc="samples")]
    by_gates = [row(FIXED, P) for P in tqdm(COUNTS, desc="gates")]
    dense = [dense_step(FIXED, P) for P in tqdm(COUNTS, desc="the paper's matrix")]
    for each, seconds in zip(by_gates, dense, strict=True):
        each["solve with the paper's matrix"] = seconds
    lines = ["# Steps of the solvers of convex ReLU networks", "", *table(by_size), "", *table(by_gates), ""]
    last = by_size[-1]
    lines.append(
        "Growth of an ADMM step in n, over the last three rows: "
        f"n^{slope(by_size, 'n', 'ADMM step'):.2f}; in the number "
        f"of gates: P^{slope(by_gates, 'gates', 'ADMM step'):.2f}. One thread, n up to {last['n']:.0f}."
    )
    (ROOT / "benchmarks" / "results" / "relu_scaling.md").write_text("\n".join(lines) + "\n")
    draw_figure(by_size, by_gates, dense)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
