"""Online transport: costs arrive one noisy sample at a time, and the plan is there at any moment.

What it costs to serve demand j from source i is never seen, only one noisy observation of the whole matrix a step. The
plan is wanted that is cheapest on average, and, in a second problem, one that also shares loads, with the convex
objective

    F(P) = <C, P> + n / 2 sum P^2 .

`mirror_sinkhorn` takes a gradient from one observation and one normalisation a step, at 50 x 50 unknowns, and keeps no
history. Its gap to the optimum, which linear programming and a conic solver give, falls like 1 / sqrt(steps) or faster.
All seeds run at once, as a batch.

    python examples/plot_mirror_sinkhorn.py [--quick] [--steps 3200] [--out out/mirror_sinkhorn]

Source: M. Ballu, Q. Berthet, Mirror Sinkhorn: Fast Online Optimization on Transport Polytopes, 2023.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.transport import mirror_sinkhorn

N = 50
SEEDS = 4
NOISES = (0.0, 0.3, 1.0)  # standard deviation of an observation; costs lie in [0, 1]
STEP_SIZE = 3.0
COLOURS = ("#8c8c8c", "#1f5fa8", "#d9822b")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Distances in the unit square between sources and demands, and their masses."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, N, 2, generator=generator, dtype=torch.float64)
    masses = 0.2 + torch.rand(2, N, generator=generator, dtype=torch.float64)
    a, b = masses / masses.sum(-1, keepdim=True)
    C = torch.cdist(places[0], places[1])
    return C / C.max(), a, b


def objectives(C: Tensor) -> dict:
    """``name: (F, gradient given an observed cost)``, batched."""
    return {
        "cheapest": (lambda P: (C * P).sum((-2, -1)), lambda P, cost: cost),
        "with shared loads": (
            lambda P: (C * P + N / 2 * P.square()).sum((-2, -1)),
            lambda P, cost: cost + N * P,
        ),
    }


def optimum(name: str, C: Tensor, a: Tensor, b: Tensor) -> float:
    """By a solver that sees the true costs. The unknown is ``N^2 P``, of order 1."""
    import cvxpy

    P = cvxpy.Variable((N, N), nonneg=True)
    F = cvxpy.sum(cvxpy.multiply(C.numpy(), P)) / N
    if name != "cheapest":
        F = F + cvxpy.sum_squares(P) / (2 * N**2)
    rows, columns = N**2 * a.numpy(), N**2 * b.numpy()
    program = cvxpy.Problem(cvxpy.Minimize(F), [cvxpy.sum(P, 1) == rows, cvxpy.sum(P, 0) == columns])
    program.solve(cvxpy.CLARABEL)
    return program.value / N


def gaps(name: str, data: tuple[Tensor, ...], counts: list[int], noise: float, best: float) -> Tensor:
    """``(counts, seeds)``: a run for every number of steps, since its average knows where it ends."""
    C, a, b = data
    F, slope = objectives(C)[name]
    found = []
    for steps in counts:
        generator = torch.Generator().manual_seed(1)

        def gradient(P: Tensor, _: int, generator: torch.Generator = generator) -> Tensor:
            seen = C + noise * torch.randn(SEEDS, N, N, generator=generator, dtype=C.dtype)
            return slope(P, seen)

        found.append(F(mirror_sinkhorn(gradient, a, b, steps=steps, step_size=STEP_SIZE)) - best)
    return torch.stack(found)


def fitted(counts: list[int], gap: Tensor) -> float:
    """The slope of the gap in the steps, both in the logarithm."""
    return float(np.polyfit(np.log(counts), gap.mean(-1).log().numpy(), 1)[0])


def draw(counts: list[int], curves: dict[str, dict[float, Tensor]], path: Path) -> None:
    """Gaps against steps, with a line of slope -1/2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, (name, of) in zip(axes, curves.items(), strict=True):
        for (noise, gap), colour in zip(of.items(), COLOURS, strict=True):
            label = f"noise {noise:g}, slope {fitted(counts, gap):.2f}"
            axis.plot(counts, gap.mean(-1), "o-", color=colour, markersize=4, label=label)
            axis.fill_between(counts, gap.amin(-1), gap.amax(-1), color=colour, alpha=0.2, linewidth=0)
        top = max(float(gap[0].mean()) for gap in of.values())
        line = 1.5 * top * (torch.tensor(counts) / counts[0]) ** -0.5
        axis.plot(counts, line, "--", color="#444444", linewidth=1, label="slope -1/2")
        axis.set(
            xscale="log", yscale="log", xlabel="steps, one observation each", ylabel="gap to the optimum", title=name
        )
        axis.set_xticks(counts, [f"{c}" for c in counts])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        lowest = min(float(gap.min()) for gap in of.values())
        axis.set_ylim(bottom=lowest / 6)
        axis.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3200, help="steps of the longest run")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/mirror_sinkhorn"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 320
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = problem()
    counts = [options.steps // 2**k for k in reversed(range(6))]
    runs = tqdm([(name, noise) for name in objectives(data[0]) for noise in NOISES], desc="runs")
    best = {name: optimum(name, *data) for name in objectives(data[0])}
    curves: dict[str, dict[float, Tensor]] = {name: {} for name in best}
    for name, noise in runs:
        curves[name][noise] = gaps(name, data, counts, noise, best[name])
    draw(counts, curves, options.out / "mirror_sinkhorn.png")
    results = {
        name: {str(noise): {"gap": gap[-1].mean().item(), "slope": fitted(counts, gap)} for noise, gap in of.items()}
        for name, of in curves.items()
    }
    (options.out / "results.json").write_text(json.dumps({"optimum": best} | results, indent=2))
    for name, of in results.items():
        print(f"{name}: optimum {best[name]:.4f}")
        for noise, row in of.items():
            print(f"  noise {noise}: gap {row['gap']:.1e} after {counts[-1]} steps, slope {row['slope']:.2f}")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    for of in curves.values():
        for gap in of.values():
            assert float(gap.min()) > -1e-7  # no plan beats the optimum
            assert float(gap[-1].mean()) < float(gap[0].mean())
    if options.steps >= 1600:
        assert all(row["slope"] < -0.5 for of in results.values() for noise, row in of.items() if noise != "1.0")
        assert all(of["1.0"]["slope"] < -0.4 for of in results.values())


if __name__ == "__main__":
    main()
