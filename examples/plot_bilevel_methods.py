"""All bilevel methods on four small problems with known optimum: distance to it against what they asked for.

    strongly convex   f = y'Hy / 2 - y'Bx,  F = |Ay - t|^2 / 2 + rho |x|^2 / 2            every method
    merely convex     f = |y1|^2 / 2 - x'y1,  F = |x - y2|^2 / 2 + |y1 - 1|^2 / 2          y2 is free below
    not convex        f = sin(x + y - c),  F = (x - a)^2 + (y - a - c)^2                  branches of minima
    coupled           f = |y1|^2 / 2 - x'y1 + sum y2  with  sum (x + y1 + y2) = 0         constraint of both levels

An oracle call is one gradient of either level or one product with a second derivative. Methods differ in what they
need: those of the first order never ask for a product, but solve a penalised problem, whose optimum is off by one over
the penalty. Methods with two loops (HOAG, MAID) have all calls of the lower solver counted, and their curve moves one
outer step at a time. Each method gets its best of six step lengths, chosen from a fourth start; what else it is told is
in the table SETTINGS. Shown is the middle of three other starts.

    python examples/plot_bilevel_methods.py [--quick] [--calls 1500] [--out out/bilevel_methods]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.bilevel import (
    BAMM,
    BOME,
    BOREP,
    F2SA,
    GPBGD,
    HOAG,
    LVHBA,
    MAID,
    MEHA,
    SOBA,
    VPBGD,
    Bilevel,
    Constant,
    ImplicitSGD,
    Method,
    PenaltyMethod,
    Power,
)
from difflayers.implicit import Implicit

SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
COLOURS = {  # first order: warm; with products: cold; two loops: green and grey
    "F2SA": "#d9822b", "F3SA": "#f0b35c", "PenaltyMethod": "#b5541c", "VPBGD": "#e0c040", "BOME": "#c7699b",
    "MEHA": "#d1495b", "LVHBA": "#8c2d04", "GPBGD": "#7a5195", "SOBA": "#1f5fa8", "BAMM": "#5b9bd5",
    "BOREP": "#7fc8e8", "ImplicitSGD": "#16365c", "HOAG": "#2f7d4f", "MAID": "#7aa95c",
}  # fmt: skip


def problems() -> dict[str, tuple[Bilevel, Tensor, Any, Callable[[Any, Any], float]]]:
    """Problem, shapes of x and y, and the distance of a pair to the optimum."""
    r = np.random.default_rng(0)
    n, d, rho = 5, 8, 0.3
    q, _ = np.linalg.qr(r.normal(size=(d, d)))
    a, _ = np.linalg.qr(r.normal(size=(d, d)))
    H, A = torch.tensor(q @ np.diag(np.linspace(0.5, 1.5, d)) @ q.T), torch.tensor(a)
    B, t = torch.tensor(r.normal(size=(d, n)) / 2), torch.tensor(r.normal(size=d))
    S = A @ torch.linalg.solve(H, B)
    best = torch.linalg.solve(S.mT @ S + rho * torch.eye(n, dtype=torch.float64), S.mT @ t)

    strongly = Bilevel(
        lambda x, y, batch: (A @ y - t).square().sum() / 2 + rho * x.square().sum() / 2,
        lambda x, y, batch: y @ H @ y / 2 - y @ (B @ x),
    )
    merely = Bilevel(
        lambda x, y, batch: (x - y["b"]).square().sum() / 2 + (y["a"] - 1).square().sum() / 2,
        lambda x, y, batch: y["a"].square().sum() / 2 - x @ y["a"],
    )
    # a = c = 2: the branch nearest 2 a is y = C + c - x with C = 3 pi / 2, and x = C / 2 on it
    branches = Bilevel(
        lambda x, y, batch: (x - 2).square().sum() + (y - 4).square().sum(),
        lambda x, y, batch: torch.sin(x + y - 2).sum(),
    )
    coupled = Bilevel(
        lambda x, y, batch: (x - y["b"]).square().sum() / 2 + (y["a"] - 1).square().sum() / 2,
        lambda x, y, batch: y["a"].square().sum() / 2 - x @ y["a"] + y["b"].sum(),
        constraint=lambda x, y: x.sum() + y["a"].sum() + y["b"].sum(),
        equality=True,
    )
    middle = torch.full((1,), 3 * torch.pi / 4, dtype=torch.float64)
    pair = lambda k: {"a": torch.zeros(k, dtype=torch.float64), "b": torch.zeros(k, dtype=torch.float64)}  # noqa: E731
    zeros = lambda k: torch.zeros(k, dtype=torch.float64)  # noqa: E731
    return {
        "strongly convex": (strongly, zeros(n), zeros(d), lambda x, y: float((x - best).norm())),
        "merely convex": (merely, zeros(n), pair(n), lambda x, y: float((x - 1).norm())),
        "not convex": (branches, middle, middle, lambda x, y: float((x - middle).norm())),
        "coupled": (coupled, zeros(n), pair(n), lambda x, y: float((x + 0.3).norm())),
    }


# method -> problem -> how to build it with its steps multiplied by s
Make = Callable[[Bilevel, Any, Any, float], Method]
STRONGLY: dict[str, Make] = {
    "F2SA": lambda p, x, y, s: F2SA(p, x, y, step=Power(0.5 * s, -1 / 3), step_lower=min(s, 1.0)),
    "PenaltyMethod": lambda p, x, y, s: PenaltyMethod(p, x, y, step=0.2 * s),
    "VPBGD": lambda p, x, y, s: VPBGD(p, x, y, penalty=Power(2.0, 1 / 3), step=Power(0.2 * s, -1 / 3), step_lower=0.5),
    "F3SA": lambda p, x, y, s: F2SA(p, x, y, step=Power(0.5 * s, -1 / 3), step_lower=min(s, 1.0), momentum=0.5),
    "GPBGD": lambda p, x, y, s: GPBGD(p, x, y, penalty=Power(2.0, 1 / 3), step=Power(0.2 * s, -1 / 3)),
    "BOME": lambda p, x, y, s: BOME(p, x, y, step=Power(0.3 * s, -1 / 3)),
    "MEHA": lambda p, x, y, s: MEHA(p, x, y, step=0.3 * s, step_lower=0.3 * s, step_theta=0.3),
    "SOBA": lambda p, x, y, s: SOBA(p, x, y, step=Constant(0.3 * s), step_lower=Constant(0.5)),
    "BAMM": lambda p, x, y, s: BAMM(p, x, y, step=0.3 * s),
    "BOREP": lambda p, x, y, s: BOREP(p, x, y, step=Power(s, -0.75)),
    "ImplicitSGD": lambda p, x, y, s: ImplicitSGD(
        p, x, y, step=0.3 * s, step_lower=0.5, inner_steps=3, adjoint=Implicit()
    ),
    "HOAG": lambda p, x, y, s: HOAG(p, x, y, lipschitz=1 / s),
    "MAID": lambda p, x, y, s: MAID(p, x, y, step=s),
}
SETTINGS: dict[str, dict[str, Make]] = {
    "strongly convex": STRONGLY,
    "merely convex": {name: STRONGLY[name] for name in ("VPBGD", "BOME", "MEHA", "BAMM")},
    "not convex": {
        "BOME": STRONGLY["BOME"],
        "VPBGD": STRONGLY["VPBGD"],
        "MEHA": lambda p, x, y, s: MEHA(
            p, x, y, step=0.05 * s, step_lower=0.05 * s, step_theta=0.1, proximal=0.4, penalty=Power(5.0, 0.45)
        ),
    },
    "coupled": {"LVHBA": lambda p, x, y, s: LVHBA(p, x, y, step=0.1 * s, step_inner=0.1, penalty=Power(1.0, 0.3))},
}


def start(shape: Any, seed: int, centre: float) -> Any:
    """Normal numbers about the centre; closer to it where other branches are not far."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.4 if centre else 1.0
    draw = lambda t: centre + spread * torch.randn(t.shape, generator=generator, dtype=t.dtype)  # noqa: E731
    return {k: draw(v) for k, v in shape.items()} if isinstance(shape, dict) else draw(shape)


def run(make: Make, case: Any, seed: int, scale: float, calls: int, centre: float) -> list[tuple[int, float]]:
    """Oracle calls and distances, relative to that of the start; empty where it diverges."""
    problem, x, y, distance = case
    x0, y0 = start(x, seed, centre), start(y, seed + 100, centre)
    algo = make(problem, x0, y0, scale)
    first, curve, used = distance(x0, y0), [], 0
    while used < calls:
        stats = algo.step()
        used = stats.gradients + stats.products
        curve.append((used, distance(algo.x, algo.y) / first))
        if not np.isfinite(curve[-1][1]):
            return []
    return curve


def plot(curves: dict[str, dict[str, list]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.6), sharey=True, width_ratios=(2, 1.3, 1.3, 1.3))
    for axis, (panel, by) in zip(axes, curves.items(), strict=True):
        for name, curve in sorted(by.items(), key=lambda item: -item[1][-1][1]):
            used, distance = np.array(curve).T
            axis.plot(used, distance, color=COLOURS[name], lw=1.6, label=f"{name}  {distance[-1]:.0e}")
        axis.set(yscale="log", title=panel, xlabel="gradients and products", xscale="log")
        axis.set_ylim(1e-10, 3)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, loc="lower left", frameon=False, title="at the end", title_fontsize=7)
    axes[0].set_ylabel("distance to the optimum / that of the start")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/bilevel_methods"))
    options = parser.parse_args()
    if options.quick:
        options.calls = 100
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[str, list]] = {}
    for panel, case in problems().items():
        centre = 2.0 if panel == "not convex" else 0.0
        curves[panel] = {}
        for name, make in tqdm(SETTINGS[panel].items(), desc=panel, mininterval=1.0):
            trial = {s: run(make, case, 9, s, options.calls // 2, centre) for s in SCALES}
            ends = {s: c[-1][1] if c else np.inf for s, c in trial.items()}
            scale = min(ends, key=lambda s: ends[s])
            found = [run(make, case, seed, scale, options.calls, centre) for seed in range(3)]
            found = sorted((c for c in found if c), key=lambda c: c[-1][1])
            curves[panel][name] = found[len(found) // 2]
            low, middle, high = (c[-1][1] for c in (found[0], found[len(found) // 2], found[-1]))
            tqdm.write(f"{panel:16} {name:14} step x {scale:<7} {middle:.1e}  ({low:.1e} to {high:.1e})")
            assert high < 0.6 or options.calls < 1000, f"{name} did not come nearer to the optimum of '{panel}'"
    table = {panel: {name: c[-1] for name, c in by.items()} for panel, by in curves.items()}
    (options.out / "results.json").write_text(json.dumps(table, indent=2))
    plot(curves, options.out / "bilevel_methods.png")


if __name__ == "__main__":
    main()
