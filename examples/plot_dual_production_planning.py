"""Bounds for production planning from a network: one price for the shared resource makes a certified bound.

``min d^T x + sum e_j / x_j s.t. rho^T x <= v`` plans how much to make of each product, with 10 and with 100 products. A
network reads the data and says the price of the resource; the dual of the rotated cones is completed in closed form,
so every nonnegative price gives a bound. Contenders get the same time: a graph network of some 40 weights, the paper's
network on all data in a row, and DC3, which predicts the cones' dual variables too and corrects them by gradient steps,
without ever making them quite feasible; what its price is worth once it is completed is shown.

The graph network counts in units of the price that would be best if holding were free. In the benchmark's distribution
holding hardly matters, so that a fixed share of that price, without a network, is already very good: it is shown too.

    python examples/plot_dual_production_planning.py [--quick] [--seconds 4] [--out out/dual_production_planning]

Source: M. Tanneau, P. Van Hentenryck, Dual Lagrangian Learning for Conic Optimization, NeurIPS 2024, section 5.2.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from dual_lagrangian.dc3 import DC3, judge, train_dc3
from dual_lagrangian.figure import draw
from dual_lagrangian.networks import Flat, PlanningPrice
from dual_lagrangian.optima import exact_plans, solve_plans
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

from difflayers.conic import ProductionPlanning, sample_production_planning

SIZES = (10, 100)
SOLVED = 256  # by Clarabel, to check the optima


def compare(items: int, options: argparse.Namespace) -> dict:
    """Trains all contenders on one size, draws the figure, returns the numbers."""
    counts = (512, 64, 64) if options.quick else (8192, 512, 4096)
    generator = torch.Generator().manual_seed(0)
    data, validation, test = (
        sample_production_planning(count, items=items, generator=generator, dtype=torch.float64) for count in counts
    )
    known, exact = exact_plans(validation), exact_plans(test)
    solved = solve_plans(ProductionPlanning(*(t[:SOLVED] for t in test)))

    unit = ((data.ordering * data.resources).sqrt().sum(-1) / data.capacity).square().mean()
    flat = Flat(data.features, 1, max(128, 4 * items), unit)
    contenders = {"graph network": (PlanningPrice(1, 8), 1e-2), "the paper's network": (flat, 1e-2)}
    curves, spread = {}, {}
    for name, (network, lr) in contenders.items():
        proxy = proxy_of(network, data)
        _, curves[name], _ = train(proxy, data, validation, known, lr=lr, max_seconds=options.seconds)
        spread[name] = gaps(bounds(proxy, test), exact)
    model = DC3(PlanningPrice(1, 8))
    curves["DC3, completed"] = train_dc3(
        model, data, options.seconds, watch=lambda t: (t, judge(model, validation, known).completed)
    )
    rule = float(fixed_share(test, exact, best_fixed_share(validation, known)).mean())
    run = inference(proxy_of(contenders["graph network"][0], data), compiled=not options.quick)
    times = race(run, test, {"Clarabel": solve_plans})
    draw(
        curves,
        {name: gap.clamp(min=1e-9).numpy() for name, gap in spread.items()},
        {"one fixed share": rule},
        options.out / f"planning_{items}.png",
    )
    return {
        "mean gap": {name: float(gap.mean()) for name, gap in spread.items()} | {"one fixed share": rule},
        "largest gap": {name: float(gap.max()) for name, gap in spread.items()},
        "smallest gap": {name: float(gap.min()) for name, gap in spread.items()},
        "DC3": judge(model, test, exact)._asdict(),
        "Clarabel against bisection": float(gaps(solved.values, exact[:SOLVED]).abs().max()),
        "times": times,
    }


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="training time of each contender, for each size")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/dual_production_planning"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = min(options.seconds, 0.3)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    results = {f"{items} products": compare(items, options) for items in SIZES}
    (options.out / "results.json").write_text(json.dumps(results, indent=2))
    for size, found in results.items():
        for name, gap in found["mean gap"].items():
            most = f", at most {found['largest gap'][name]:.4%}" if name in found["largest gap"] else ""
            print(f"{size}, {name}: gap {gap:.4%} on average{most}")
        dc3, times = found["DC3"], found["times"]
        claim = f"claims {-dc3['claimed']:+.2%} of the optimum, {dc3['above']:.0%} above it"
        print(f"{size}, DC3: {claim}; completed {dc3['completed']:.4%}")
        each, solver = 1e6 * times["each_seconds"], 1e6 * times["solver_seconds"]["Clarabel"]
        ratio = times["ratios"]["Clarabel"]
        print(f"{size}: network and certificate {each:.2f} us, Clarabel {solver:.0f} us an instance: {ratio:.0f} times")
    print(f"{time.perf_counter() - start:.0f} s; figures and numbers in {options.out}")
    for found in results.values():
        assert min(found["smallest gap"].values()) >= -1e-9  # bounds are bounds
        assert found["Clarabel against bisection"] <= 1e-5
        if not options.quick:
            assert found["mean gap"]["graph network"] <= 1e-3
            assert found["mean gap"]["graph network"] < found["DC3"]["completed"]
    return options.out


if __name__ == "__main__":
    main()
