"""Mass conserved on fronts and shocks: a network that predicts mean and variance, with and without the layer.

A small network learns the solutions of a generalised porous medium equation for some values of its parameter: the
front of u_t = (u^m u_x)_x for m in [1, 6], or the shock of a Stefan problem for a threshold in [0.5, 0.7]. It predicts
mean and variance at every point. Tested on parameters in between that it has not seen, it loses or makes mass. The
total mass at each time is known; the layer

    min 1/2 sum (u - mean)^2 / variance   s.t.   integral of u = mass

puts it right, where the network is unsure: at the front. Compared on the same networks: nothing; HardC (the same with
all variances equal); the layer behind a trained network; and a network trained through the layer, with as many steps.
That one may miss the mass, which the layer puts right, and in so short a training its field is no better.

    python examples/plot_conservation.py [--seeds 3] [--out out/conservation]

Source: D. Hansen, D. C. Maddix, S. Alizadeh, G. Gupta, M. W. Mahoney, Learning Physical Models that Can Respect
Conservation Laws, 2023.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from difflayers.pde import (
    conservation_operator,
    conserve,
    conserved_log_likelihood,
    porous_medium_mass,
    porous_medium_solution,
    stefan_mass,
    stefan_solution,
)

METHODS = ("network", "HardC", "layer", "trained through it")
POINTS, SLICES = 101, 8  # places on the grid, profiles in a training step


class Problem(NamedTuple):
    """A family of solutions with one parameter."""

    name: str
    parameter: str
    solution: Callable[..., Tensor]
    mass: Callable[..., Tensor]
    low: float
    high: float
    length: float
    end: float


PROBLEMS = (
    Problem("porous medium", "m", porous_medium_solution, porous_medium_mass, 1.0, 6.0, 1.0, 0.9),
    Problem("Stefan", "u*", stefan_solution, stefan_mass, 0.5, 0.7, 0.5, 0.1),
)


class Network(nn.Module):
    """Mean and variance of the field at every point of a grid, for a time and a parameter."""

    def __init__(self, problem: Problem, grid: Tensor) -> None:
        super().__init__()
        self.problem = problem
        self.register_buffer("grid", grid)
        self.body = nn.Sequential(
            nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def forward(self, t: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """``(slices,)`` times and parameters to ``(slices, points)`` means and variances, in float64."""
        p, shape = self.problem, (len(t), len(self.grid))
        inputs = torch.stack(
            [
                (2 * self.grid / p.length - 1).expand(shape),
                (2 * t / p.end - 1).unsqueeze(-1).expand(shape),
                (2 * (parameter - p.low) / (p.high - p.low) - 1).unsqueeze(-1).expand(shape),
            ],
            -1,
        )
        mean, raw = self.body(inputs).double().unbind(-1)
        return mean, 1e-6 + nn.functional.softplus(raw - 2).square()


def exact(problem: Problem, grid: Tensor, t: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Profiles and their masses, in float64."""
    t, parameter = t.double(), parameter.double()
    fields = problem.solution(grid.double(), t.unsqueeze(-1), parameter.unsqueeze(-1))
    return fields, problem.mass(t, parameter).unsqueeze(-1)


def train(problem: Problem, grid: Tensor, seen: Tensor, seed: int, steps: int, through: bool) -> Network:
    """Adam on the negative log-likelihood of profiles: of the prediction, or of what the layer makes of it."""
    torch.manual_seed(seed)
    model = Network(problem, grid)
    G = conservation_operator(grid.double())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in tqdm(range(steps), desc=f"{problem.name}, seed {seed}", mininterval=1.0, leave=False):
        t = problem.end * (0.02 + 0.98 * torch.rand(SLICES))
        parameter = seen[torch.randint(len(seen), (SLICES,))]
        u, _ = exact(problem, grid, t, parameter)
        mean, variance = model(t, parameter)
        if through:
            # the mass as the rows see it: what the quadrature misses at a shock would leave the loss without a minimum
            loss = -conserved_log_likelihood(u, mean, variance, u @ G.mT, G).mean() / POINTS
        else:
            loss = ((u - mean).square() / variance + variance.log()).mean() / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def study(problem: Problem, seed: int, steps: int) -> tuple[dict, dict]:
    """Errors on parameters that were not seen, of all methods; and one profile of each to draw."""
    grid = torch.linspace(0, problem.length, POINTS)
    generator = torch.Generator().manual_seed(100 + seed)
    draws = problem.low + (problem.high - problem.low) * torch.rand(28, generator=generator)
    seen, held_out = draws[:8], draws[8:]
    with torch.enable_grad():
        plain, through = (train(problem, grid, seen, seed, steps, mode) for mode in (False, True))
    G, times = conservation_operator(grid.double()), problem.end * torch.linspace(0.05, 1, 20)
    t, parameter = times.repeat(len(held_out)), held_out.repeat_interleave(len(times))
    u, mass = exact(problem, grid, t, parameter)
    mean, variance = plain(t, parameter)
    found = {
        "network": (mean, variance),
        "HardC": (conserve(mean, torch.ones_like(mean), mass, G)[0], variance),
        "layer": conserve(mean, variance, mass, G),
        "trained through it": conserve(*through(t, parameter), mass, G),
    }
    errors: dict = {"mass": {}, "mse": {}}
    for name, (middle, _) in found.items():
        gap = (torch.trapezoid(middle, grid.double()) - mass[:, 0]).abs().view(len(held_out), len(times))
        errors["mass"][name] = gap.amax(0).tolist()
        errors["mse"][name] = (middle - u).square().mean().item()
    shown = 12  # the time that is drawn, of the first held-out parameter
    profile = {name: [part[shown] for part in pair] for name, pair in found.items()}
    return errors, {"grid": grid, "times": times, "u": u[shown], "t": t[shown], "p": parameter[shown], **profile}


def draw(results: dict, shown: dict, path: Path) -> None:
    """A profile with its uncertainty, the mass error over time, and the error of the field."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("tab:grey", "tab:orange", "tab:blue", "tab:green"), strict=True))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for row, problem in zip(axes, PROBLEMS, strict=True):
        one, errors = shown[problem.name], results[problem.name]
        left, middle, right = row
        left.plot(one["grid"], one["u"], "k", lw=1, label="exact")
        for name in ("network", "layer"):
            mean, variance = one[name]
            left.plot(one["grid"], mean, color=colours[name], label=name)
            spread = 2 * variance.sqrt()
            left.fill_between(one["grid"], mean - spread, mean + spread, color=colours[name], alpha=0.15, lw=0)
        left.set(
            title=f"{problem.name}, {problem.parameter} = {float(one['p']):.2f} (not seen), t = {float(one['t']):.3f}",
            xlabel="x",
            ylabel="u, mean and two deviations",
        )
        left.legend(frameon=False)
        for name in METHODS:
            worst = torch.tensor([e["mass"][name] for e in errors], dtype=torch.float64).amax(0)
            middle.semilogy(one["times"], worst.clamp_min(1e-17), color=colours[name], label=name)
        middle.axhline(1e-10, color="k", lw=0.5, ls=":")
        middle.set(title="largest mass error of any run", xlabel="t", ylabel="|mass - known|")
        middle.legend(frameon=False, loc="center right", fontsize=9)
        mse = [[e["mse"][name] for e in errors] for name in METHODS]
        heights = [sum(values) / len(values) for values in mse]
        right.bar(range(len(METHODS)), heights, color=[colours[name] for name in METHODS])
        for i, values in enumerate(mse):
            right.plot([i] * len(values), values, "k.", ms=5)
        right.set_xticks(range(len(METHODS)), ["network", "HardC", "layer", "trained\nthrough it"])
        right.set(title="error on parameters not seen (dots: seeds)", ylabel="mean squared error")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Trains, tests, prints, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("out/conservation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    results: dict = {}
    shown: dict = {}
    for problem in PROBLEMS:
        runs = [study(problem, seed, options.steps) for seed in range(options.seeds)]
        results[problem.name], shown[problem.name] = [errors for errors, _ in runs], runs[0][1]
    print(f"{'MSE, 1e-4 (and largest mass error)':<28}" + "".join(f"{name:>26}" for name in METHODS))
    for problem in PROBLEMS:
        cells = []
        for name in METHODS:
            mse = torch.tensor([e["mse"][name] for e in results[problem.name]])
            mass = max(max(e["mass"][name]) for e in results[problem.name])
            cells.append(f"{1e4 * mse.mean():.2f} ({mass:.0e})")
            if name != "network":
                assert mass < 1e-10, f"{problem.name}, {name}: mass is off by {mass}"
        print(f"{problem.name:<28}" + "".join(f"{cell:>26}" for cell in cells))
    if options.steps >= 800:  # enough to be sure of the front but for its place
        for problem in PROBLEMS:
            network, layer = (sum(e["mse"][name] for e in results[problem.name]) for name in ("network", "layer"))
            assert layer < network, f"{problem.name}: the layer made the field worse, {layer} after {network}"
    draw(results, shown, options.out / "conservation.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")


if __name__ == "__main__":
    main()
