"""Knapsack bounds from a network: valid whatever it says, and within a fraction of a percent of the optimum.

A network reads the prices, weights and capacities of ``max p^T x s.t. W x <= v, 0 <= x <= 1`` and says a price for each
capacity. Every nonnegative price gives a bound, in closed form. Training makes the bounds tight; no instance is ever
solved for it. Three contenders get the same time: a graph network of some 70 weights, the paper's network on all data
in a row, and DC3, which predicts a full dual solution and corrects it by gradient steps, but never quite makes it
feasible, so that its own value is no bound; what its prices are worth once they are completed is shown.

    python examples/plot_dual_knapsack.py [--quick] [--seconds 8] [--out out/dual_knapsack]

Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 5.1.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from dual_lagrangian.dc3 import DC3, judge, train_dc3
from dual_lagrangian.figure import draw
from dual_lagrangian.networks import Flat, KnapsackPrices
from dual_lagrangian.optima import solve_knapsacks
from dual_lagrangian.training import (
    best_fixed_share,
    bounds,
    fixed_share,
    gaps,
    inference,
    proxy_of,
    race,
    train,
)

from difflayers.conic import sample_knapsack

CONSTRAINTS, ITEMS = 5, 100
HIDDEN = 2 * (CONSTRAINTS + ITEMS)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="training time of each contender")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/dual_knapsack"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.5)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()

    counts = (512, 64, 64) if options.quick else (8192, 512, 4096)
    generator = torch.Generator().manual_seed(0)
    data, validation, test = (
        sample_knapsack(count, constraints=CONSTRAINTS, items=ITEMS, generator=generator) for count in counts
    )
    known, exact = (solve_knapsacks(instances).values for instances in (validation, test))

    flat = Flat(data.features, CONSTRAINTS, HIDDEN, (data.prices.sum(-1, True) / (CONSTRAINTS * data.capacity)).mean())
    contenders = {"graph network": (KnapsackPrices(), 1e-2), "the paper's network": (flat, 1e-3)}
    curves, spread = {}, {}
    for name, (network, lr) in contenders.items():
        proxy = proxy_of(network, data)
        _, curves[name], _ = train(proxy, data, validation, known, lr=lr, max_seconds=options.seconds)
        spread[name] = gaps(bounds(proxy, test), exact)
    model = DC3(KnapsackPrices())
    seen = train_dc3(model, data, options.seconds, watch=lambda t: (t, judge(model, validation, known).completed))
    curves["DC3, completed"], dc3 = seen, judge(model, test, exact)
    share = best_fixed_share(validation, known)
    rule = float(fixed_share(test, exact, share).mean())

    run = inference(proxy_of(contenders["graph network"][0], data), compiled=not options.quick)
    solvers = {"HiGHS": solve_knapsacks, "its interior point method": partial(solve_knapsacks, solver="ipm")}
    times = race(run, test, solvers)
    draw(curves, {k: v.numpy() for k, v in spread.items()}, {"one fixed share": rule}, options.out / "knapsack.png")
    results = {
        "mean gap": {name: float(gap.mean()) for name, gap in spread.items()} | {"one fixed share": rule},
        "largest gap": {name: float(gap.max()) for name, gap in spread.items()},
        "smallest gap": {name: float(gap.min()) for name, gap in spread.items()},
        "DC3": dc3._asdict(),
        "times": times,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, gap in spread.items():
        print(f"{name}: gap {gap.mean():.3%} on average, at most {gap.max():.3%}; never below {gap.min():.1e}")
    print(f"one share of all value for every capacity, {share:.3f}, no network: {rule:.3%}")
    print(f"DC3: claims {-dc3.claimed:+.2%} of the optimum, {dc3.above:.0%} above it; completed {dc3.completed:.3%}")
    print(f"network and certificate: {1e6 * times['each_seconds']:.2f} us an instance")
    for solver, ratio in times["ratios"].items():
        print(f"{solver}: {1e6 * times['solver_seconds'][solver]:.0f} us an instance, {ratio:.0f} times as much")
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    assert all(float(gap.min()) >= -1e-9 for gap in spread.values())  # bounds are bounds
    if not options.quick:
        assert results["mean gap"]["graph network"] <= 4e-3
        assert results["mean gap"]["graph network"] < min(rule, dc3.completed)
    return options.out


if __name__ == "__main__":
    main()
