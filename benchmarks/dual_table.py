"""`python -m benchmarks.dual_table` trains every size of both problems to the end of the recipe and writes a table.

This takes hours; it can be stopped at any time and goes on from its checkpoints when it is called again. Rows that are
done are kept. `--seconds` bounds the training of one row: a row that had not come to the end of the recipe by then says
so. `--rows` picks, for example `--rows "knapsack 5x100"`.

The recipe: 8192 instances, batches of 128, Adam from 1e-2 (from 1e-3 for the paper's network on knapsacks), the rate
halved whenever 6 epochs brought nothing on 512 other instances, until it is a hundredth. Judged on 4096 new instances.
Times are of one thread and per instance: the network's of all 4096 instances, the solver's of 64 of them, in turn.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import ROOT
from difflayers.conic import Knapsack, ProductionPlanning, sample_knapsack, sample_production_planning

sys.path.append(str(ROOT / "examples"))

from dual_lagrangian.dc3 import DC3, judge, train_dc3
from dual_lagrangian.networks import Flat, KnapsackPrices, PlanningPrice
from dual_lagrangian.optima import exact_plans, solve_knapsacks, solve_plans
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

KNAPSACKS = [(m, n) for m in (5, 10, 30) for n in (100, 200, 500)]
PLANS = [10, 20, 50, 100, 200, 500, 1000]
DESIGNS = ("fixed share", "graph", "newton", "paper", "DC3 penalty 10", "DC3 penalty 100")


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem, its size, and how to draw, solve and model it."""

    name: str
    sample: Callable[[int, torch.Generator], Any]
    optima: Callable[[Any], torch.Tensor]
    solvers: dict[str, Callable[[Any], Any]]
    networks: dict[str, Callable[[Any], nn.Module]]


def knapsack(m: int, n: int) -> Size:
    def paper(data: Knapsack) -> nn.Module:
        return Flat(data.features, m, 2 * (m + n), (data.prices.sum(-1, True) / (m * data.capacity)).mean())

    return Size(
        f"knapsack {m}x{n}",
        lambda count, generator: sample_knapsack(count, constraints=m, items=n, generator=generator),
        lambda data: solve_knapsacks(data).values,
        {"HiGHS": solve_knapsacks, "HiGHS ipm": partial(solve_knapsacks, solver="ipm")},
        {"graph": lambda _: KnapsackPrices(), "newton": lambda _: KnapsackPrices(newton=True), "paper": paper},
    )


def planning(n: int) -> Size:
    def paper(data: ProductionPlanning) -> nn.Module:
        unit = ((data.ordering * data.resources).sqrt().sum(-1) / data.capacity).square().mean()
        return Flat(data.features, 1, max(128, 4 * n), unit)

    return Size(
        f"planning {n}",
        lambda count, generator: sample_production_planning(count, items=n, generator=generator, dtype=torch.float64),
        exact_plans,
        {"Clarabel": solve_plans},
        {"graph": lambda _: PlanningPrice(1, 8), "paper": paper},
    )


def rows_of(size: Size, options: argparse.Namespace, done: dict[str, dict]) -> None:
    """Trains what is missing of one size, and saves after each row."""
    wanted = [f"{size.name}, {d}" for d in DESIGNS if d in size.networks or "DC3" in d or d == "fixed share"]
    wanted = [
        name for name in wanted if name not in done and (not options.rows or any(r in name for r in options.rows))
    ]
    if not wanted:
        return
    generator = torch.Generator().manual_seed(0)
    data, validation, test = (size.sample(c, generator) for c in (options.instances, 512, 4096))
    known, exact = size.optima(validation), size.optima(test)
    for name in wanted:
        print(f"\n{name}", flush=True)
        design = name.partition(", ")[2]
        torch.manual_seed(0)
        row: dict[str, Any] = {"test_instances": len(exact)}
        if design == "fixed share":
            gap = fixed_share(test, exact, best_fixed_share(validation, known))
        elif design.startswith("DC3"):
            model = DC3(size.networks["graph"](data))
            train_dc3(model, data, options.dc3_seconds, penalty=float(design.split()[-1]))
            row |= judge(model, test, exact)._asdict() | {"seconds": options.dc3_seconds}
            gap = None
        else:
            torch.compiler.reset()  # or the compiler gives up on the eighth proxy, and runs it as it is
            proxy = proxy_of(size.networks[design](data), data)
            checkpoint = options.out / "checkpoints" / f"{name.replace(' ', '_').replace(',', '')}.pt"
            record, curve, ended = train(
                proxy,
                data,
                validation,
                known,
                lr=1e-3 if design == "paper" and "knapsack" in size.name else 1e-2,
                max_seconds=options.seconds,
                checkpoint=checkpoint,
            )
            gap = gaps(bounds(proxy, test), exact)
            row |= {
                "parameters": sum(p.numel() for p in proxy.parameters() if p.requires_grad),
                "seconds": record.seconds,
                "epochs": len(record.losses),
                "ended": ended,
                **race(inference(proxy, compiled=not options.eager), test, size.solvers),
                "curve": curve,
            }
        if gap is not None:
            row |= {"gap": float(gap.mean()), "largest": float(gap.max()), "smallest": float(gap.min())}
        done[name] = row
        write(done, options.out)


def write(done: dict[str, dict], out: Path) -> None:
    """The numbers, and a table for people."""
    (out / "dual_table.json").write_text(json.dumps(done, indent=1) + "\n")
    (out / "dual_table.md").write_text(table(done) + "\n")


def table(done: dict[str, dict]) -> str:
    """One line a row, in Markdown."""
    head = ("size, design", "weights", "training s", "mean gap", "largest", "above optimum", "us each", "solver / ours")
    lines = [head, ("---",) * len(head)]
    for name, row in done.items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        if "claimed" in row:
            gap = f"claims {100 * row['claimed']:.3f} %, completed {100 * row['completed']:.3f} %"
            cells = ("", seconds, gap, f"violation {row['violation']:.1e}", f"{row['above']:.1%}", "", "")
        else:
            seconds += "" if row.get("ended", True) else " (not ended)"
            worst = max(0.0, -row["smallest"])
            each = f"{1e6 * row['each_seconds']:.2f}" if "each_seconds" in row else ""
            us = {k: 1e6 * v for k, v in row.get("solver_seconds", {}).items()}
            ratios = ", ".join(f"{k} {us[k]:.0f} us: {v:.0f}" for k, v in row.get("ratios", {}).items())
            gaps_ = (f"{100 * row['gap']:.4f} %", f"{100 * row['largest']:.4f} %", f"{worst:.0e}")
            cells = (str(row.get("parameters", "")), seconds, *gaps_, each, ratios)
        lines.append((name, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dual_table", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="most training time of a row in this call")
    parser.add_argument("--dc3-seconds", type=float, default=30.0, help="training time of DC3")
    parser.add_argument("--instances", type=int, default=8192, help="to learn from")
    parser.add_argument("--rows", nargs="*", help="names, or parts of names, of the rows wanted; all by default")
    parser.add_argument("--eager", action="store_true", help="time inference without compiling it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scratch" / "dual_table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    path = options.out / "dual_table.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for size in [*(knapsack(*s) for s in KNAPSACKS), *(planning(n) for n in PLANS)]:
        rows_of(size, options, done)
    print(table(done))


if __name__ == "__main__":
    main()
