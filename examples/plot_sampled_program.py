"""Random directions, exact optimum, random starts: three ways to train a small ReLU network, and what a detour costs.

A network with weight decay is trained on 30 points of a bumpy surface (two inputs and a bias).

1. Over all activation patterns the convex program gives the global optimum, with a certificate.
2. The sampled convex program draws directions of neurons and solves a lasso for their output weights: an upper bound
   that comes down to the optimum as directions are added, slowly.
3. L-BFGS trains the network itself, with 40 hidden units, from 20 random starts. None is better than the optimum.

A gated network is trained faster than a ReLU network and turned into one with the same fit: every neuron becomes the
difference of two that keep to the cell of its gate. The price is the penalty. It is drawn for the three decompositions,
for several strengths of weight decay, beside that of the ReLU network which the convex program trains over those gates.

    python examples/plot_sampled_program.py [--quick] [--seeds 4] [--starts 20] [--out out/sampled_program]

Sources: Y. Bai, T. Gautam, S. Sojoudi, Efficient Global Optimization of Two-Layer ReLU Networks, 2023 (sampled
program); A. Mishkin, A. Sahiner, M. Pilanci, Fast Convex Optimization for Two-Layer ReLU Networks, 2022
(decompositions).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.relu import (
    TwoLayerReLU,
    beta_max,
    cone_decomposition,
    convex_gated_relu,
    convex_relu,
    enumerate_gates,
    predict,
    sample_directions,
    sample_gates,
    sampled_convex_program,
)

D = torch.float64
POINTS, UNITS, BETA = 30, 40, 0.05
COUNTS = (10, 30, 100, 300, 1000, 3000)
STRENGTHS = (0.3, 0.1, 0.03, 0.01)
METHODS = ("closed", "approximate", "exact")


def surface() -> tuple[Tensor, Tensor]:
    """Points of a square with a column of ones, and the heights there with a little noise."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(POINTS, 2, generator=generator, dtype=D) - 2
    y = torch.sin(2 * x[:, 0]) * torch.cos(x[:, 1]) + 0.1 * torch.randn(POINTS, generator=generator, dtype=D)
    return torch.cat([x, torch.ones(POINTS, 1, dtype=D)], 1), y


def sampled_values(X: Tensor, y: Tensor, seeds: int) -> list[list[float]]:
    """The value over more and more directions, each set part of the next, for every seed."""
    values = []
    for seed in tqdm(range(seeds), desc="sampled programs"):
        U = sample_directions(X, max(COUNTS), generator=torch.Generator().manual_seed(seed))
        values.append([float(sampled_convex_program(X, y, BETA, U[:count]).objective) for count in COUNTS])
    return values


def descent_values(X: Tensor, y: Tensor, starts: int) -> list[float]:
    """The decayed loss at which L-BFGS ends, for every start."""
    values = []
    for seed in tqdm(range(starts), desc="L-BFGS"):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(UNITS, 3, generator=generator, dtype=D) / 3**0.5
        network = TwoLayerReLU(weight, torch.randn(UNITS, generator=generator, dtype=D) / UNITS**0.5)
        optimiser = torch.optim.LBFGS(
            network.parameters(), max_iter=1000, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss(network: TwoLayerReLU = network) -> Tensor:
            decay = sum(p.square().sum() for p in network.parameters())
            return (network(X) - y).square().sum() / 2 + BETA / 2 * decay

        def closure(optimiser: torch.optim.Optimizer = optimiser, loss=loss) -> Tensor:
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        optimiser.step(closure)
        values.append(float(loss().detach()))
    return values


def penalties(X: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Penalties over that of the gated network: of its decompositions, and of the ReLU network over the same gates."""
    gates = sample_gates(X, 60, generator=torch.Generator().manual_seed(0))
    largest = float(beta_max(X, y, gates))
    found: dict[str, list[float]] = {name: [] for name in (*METHODS, "ReLU network")}
    for strength in tqdm(STRENGTHS, desc="decompositions"):
        beta = strength * largest
        gated = convex_gated_relu(X, y, beta, gates)
        for method in METHODS:
            network, growth = cone_decomposition(gated, X, beta, method=method)
            assert (predict(network, X) - predict(gated, X)).abs().max() < 1e-9
            found[method].append(float(growth))
        trained = convex_relu(X, y, beta, gates)
        penalty = (trained.v.norm(dim=-1) + trained.w.norm(dim=-1)).sum() / gated.v.norm(dim=-1).sum()
        found["ReLU network"].append(float(penalty))
    return found


def draw(best: float, sampled: list[list[float]], descent: list[float], growth: dict, path: Path) -> None:
    """Values above the optimum, and penalties."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1.35, 1))
    above = 100 * (torch.tensor(sampled) / best - 1)
    left.fill_between(COUNTS, above.amin(0), above.amax(0), color="#1f5fa8", alpha=0.2, linewidth=0)
    left.plot(
        COUNTS, above.mean(0), "o-", color="#1f5fa8", markersize=4, label=f"sampled program, {len(sampled)} draws"
    )
    starts = 100 * (torch.tensor(descent) / best - 1)
    place = torch.full_like(starts, 4.0 * COUNTS[-1]) * torch.linspace(0.8, 1.25, len(starts))
    left.plot(place, starts, "o", color="#d9822b", markersize=4, alpha=0.8, label=f"L-BFGS, {len(starts)} starts")
    left.set(xscale="log", yscale="log", xlabel="directions", ylabel="objective above the optimum, %")
    left.set_title("how near to the global optimum")
    left.axvline(2 * COUNTS[-1], color="0.8", linewidth=0.8)
    left.text(place.mean(), 0.02, "40 trained\nunits", ha="center", va="bottom", transform=left.get_xaxis_transform())
    left.set_ylim(bottom=0.4 * float(torch.cat([above.flatten(), starts]).amin()))
    left.set_xticks([count for count in COUNTS if count in (10, 100, 1000)])
    left.minorticks_off()
    left.legend(frameon=False, loc="lower left")
    colours = {"closed": "#9bb8d9", "approximate": "#5b8fc7", "exact": "#1f5fa8", "ReLU network": "#d9822b"}
    names = {method: f"{method} decomposition" for method in METHODS} | {"ReLU network": "trained ReLU network"}
    for i, (name, values) in enumerate(growth.items()):
        right.bar(torch.arange(len(values)) + 0.2 * (i - 1.5), values, 0.19, color=colours[name], label=names[name])
    right.set(
        yscale="log", xlabel="weight decay, part of the largest useful", ylabel="penalty over that of the gated one"
    )
    right.set_xticks(range(len(STRENGTHS)), [f"{s:g}" for s in STRENGTHS])
    right.set_title("what the detour over a gated network costs")
    right.axhline(1, color="0.6", linewidth=0.8)
    right.set_ylim(0.1, 8 * max(max(v) for v in growth.values()))
    right.legend(frameon=False, loc="upper left", ncols=2, fontsize=8.5)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="draws of directions")
    parser.add_argument("--starts", type=int, default=20, help="starts of L-BFGS")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/sampled_program"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.starts = 1, 2
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    X, y = surface()
    gates = enumerate_gates(X)
    optimum = convex_relu(X, y, BETA, gates)
    best = float(optimum.objective)
    sampled, descent = sampled_values(X, y, options.seeds), descent_values(X, y, options.starts)
    growth = penalties(X, y)
    draw(best, sampled, descent, growth, options.out / "sampled_program.png")
    mean = torch.tensor(sampled).mean(0)
    results = {
        "patterns": len(gates.vectors),
        "optimum": best,
        "gap": float(optimum.gap),
        "sampled": dict(zip(map(str, COUNTS), mean.tolist(), strict=True)),
        "L-BFGS": {"best": min(descent), "mean": sum(descent) / len(descent), "worst": max(descent)},
        "penalty over the gated one": {
            name: dict(zip(map(str, STRENGTHS), v, strict=True)) for name, v in growth.items()
        },
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"optimum over all {len(gates.vectors)} patterns: {best:.6f}, gap {float(optimum.gap):.1e}")
    for count, value in zip(COUNTS, mean.tolist(), strict=True):
        print(f"{count:6d} directions: {100 * (value / best - 1):.3f} % above, on average")
    low, high = min(descent), max(descent)
    print(f"L-BFGS from {len(descent)} starts: {100 * (low / best - 1):.3f} % to {100 * (high / best - 1):.3f} % above")
    for i, strength in enumerate(STRENGTHS):
        print(f"beta {strength:g} of the largest: " + ", ".join(f"{name} {v[i]:.1f}" for name, v in growth.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    # the certificate, and what it promises
    assert float(optimum.gap) < 1e-6 * best
    assert min(descent) > best * (1 - 1e-6)
    for values in sampled:
        assert values == sorted(values, reverse=True) and values[-1] > best * (1 - 1e-6)
        assert values[-1] < 1.01 * best < values[0]
    for i in range(len(STRENGTHS)):
        assert 1 <= growth["exact"][i] <= growth["approximate"][i] * (1 + 1e-6) <= growth["closed"][i] * (1 + 2e-6)


if __name__ == "__main__":
    main()
