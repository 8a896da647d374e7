"""The law of a rod: how heat conduction depends on temperature, learned from readings through its equation."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, INK, ORANGE, axes, save
from chapters._rod import (
    NOISE,
    START,
    Found,
    Readings,
    Rod,
    basis,
    log_law,
    measure,
    minimise,
    named,
    numerical,
    penalised,
    prior,
    products,
    true_conductivity,
)
from difflayers.implicit import Exact, GaussNewton
from difflayers.pde import PDEConstraint, Sobol

Basis = Callable[[Tensor], Tensor]
WEIGHTS = (1.0, 1e2, 1e4, 1e6)  # of the penalty
LAW = torch.linspace(0.1, 0.95, 100, dtype=torch.float64)  # temperatures


def constraint(points: int, curvature: Exact | GaussNewton = Exact()) -> PDEConstraint:
    """The layer."""
    sampler = Sobol(points=points, boundary=64)
    return PDEConstraint(
        Rod(), sampler=sampler, row_weights={"initial": 10.0}, ridge=1e-10, curvature=curvature
    ).double()


def misfit(layer: PDEConstraint, c: Tensor, data: Readings, functions: Basis = basis) -> Tensor:
    """Of a law: squared differences between readings and the field that obeys the equation with it, in noises."""
    return ((layer(functions, named(c))(data.points) - data.values) / NOISE).square().mean()


def learn(layer: PDEConstraint, data: Readings, most: int) -> Found:
    """The law, by L-BFGS on five numbers."""
    c = START.clone().requires_grad_()
    count, seconds = minimise(lambda: misfit(layer, c, data) + prior(c), [c], most)
    return Found(c.detach(), count, seconds)


# ------------------------------------------------------------------------------------------------------------- rivals


@dataclass
class Row:
    """All ways, on one set of readings."""

    layer: Found
    numerical: Found
    descent: list[Found]  # penalties, by weight
    newton: list[Found]


def compare(layer: PDEConstraint, data: Readings, tiny: bool) -> Row:
    """The equation as a constraint, in a numerical solver, and as a penalty."""
    most, sampler = (3, Sobol(64, 16)) if tiny else (1000, layer.sampler)
    assert isinstance(sampler, Sobol)
    return Row(
        learn(layer, data, most),
        numerical(data, 24 if tiny else 72),
        [penalised(data, sampler, weight, most) for weight in WEIGHTS],
        [penalised(data, sampler, weight, most, newton=True) for weight in WEIGHTS],
    )


@dataclass
class Gradient:
    """Errors of the gradient of the misfit in the law, relative, against central differences along the five axes."""

    functions: int
    residual: float  # of the equation, root mean square, of that of its first term
    exact: float
    gauss_newton: float


def gradient_errors(c: Tensor, data: Readings, points: int, size: tuple[int, int]) -> Gradient:
    """With few basis functions the equation cannot hold, with many it nearly does."""
    functions, layer = products(*size), constraint(points)
    with torch.no_grad():
        field = layer(functions, named(c))
        steps = 1e-4 * torch.eye(len(c), dtype=c.dtype)
        both = [[misfit(layer, c + s * step, data, functions) for s in (1, -1)] for step in steps]
    truth = torch.stack([(up - down) / 2e-4 for up, down in both])
    errors = []
    for curvature in (Exact(), GaussNewton()):
        x = c.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(misfit(constraint(points, curvature), x, data, functions), x)
        errors.append(((gradient - truth).norm() / truth.norm()).item())
    size_of = field.terms["u_t"].square().mean().sqrt()
    return Gradient(size[0] * size[1], (field.norms["residual"] / size_of).item(), *errors)


# ------------------------------------------------------------------------------------------------------------ figures


def draw_field(layer: PDEConstraint, c: Tensor, data: Readings, path: Path) -> Path:
    """Temperature along the rod at some times, with the readings."""
    figure, axis = axes(height=2.9)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    with torch.no_grad():
        field = layer(basis, named(c))
        for i, t in enumerate((0.1, 0.3, 0.6, 1.0)):
            shade = (ORANGE, "#b97a5e", "#6f6d84", BLUE)[i]
            axis.plot(x, field(torch.stack([torch.full_like(x, t), x], -1)), color=shade, lw=1.6, label=f"t = {t}")
            here = (data.points[:, 0] - t).abs() < 1e-9
            axis.plot(data.points[here, 1], data.values[here], "o", ms=3.5, color=shade)
    axis.set(title="Temperature and readings", xlabel="place", ylim=(0, None))
    axis.legend(loc="upper right", fontsize=8.5)
    return save(figure, path)


def draw_laws(row: Row, path: Path) -> Path:
    """Conductivities."""
    figure, axis = axes(height=2.9)
    lines = [
        (row.descent[0], f"penalty, weight {WEIGHTS[0]:g}", ORANGE, 1.2, "-"),
        (row.descent[2], f"penalty, weight {WEIGHTS[2]:g}", ORANGE, 1.2, ":"),
        (row.numerical, "numerical solver", GREY, 1.6, "--"),
        (row.layer, "layer", BLUE, 1.8, "-"),
    ]
    axis.plot(LAW, true_conductivity(LAW), color=INK, lw=1.2, label="true")
    for found, label, colour, width, style in lines:
        axis.plot(LAW, log_law(LAW, found.c).exp(), style, color=colour, lw=width, label=label)
    axis.set(title="Conductivity", xlabel="temperature", ylim=(0, 0.09))
    axis.legend(loc="upper left", fontsize=8)
    return save(figure, path)


def draw_weights(means: dict[str, list[float]], path: Path) -> Path:
    """Error of the law against the weight of the penalty; the layer has none."""
    figure, axis = axes(wide=True, height=2.7)
    axis.loglog(WEIGHTS, means["descent"], "o-", ms=4, color=ORANGE, label="penalty, L-BFGS")
    axis.loglog(WEIGHTS, means["newton"], "s-", ms=4, color="#e9bd8c", label="penalty, Gauss-Newton")
    axis.axhline(means["layer"][0], color=BLUE, lw=1.8, label="layer")
    axis.axhline(means["numerical"][0], color=GREY, ls="--", label="numerical solver")
    axis.set(title="Error of the law", xlabel="weight of the penalty", xticks=WEIGHTS, ylim=(0.05, 1.2))
    axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["5%", "10%", "20%", "50%", "100%"])
    axis.minorticks_off()
    axis.legend(loc="upper center", fontsize=8.5)
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------ chapter

SNIPPET = """
class Rod(PDE):
    coords = ("t", "x")
    terms = ("u", "u_t", "u_x", "u_xx")
    domain = Box(t=(0.0, 1.0), x=(0.0, 1.0))
    params = {f"c{i}": None for i in range(5)}
    conditions = (Initial(hot_end),)

    def residual(self, T, p):
        u, c = T["u"], [p[n] for n in self.params]
        k, s = log_law(u, c).exp(), slope(u, c)
        bent = T["u_xx"] + s * T["u_x"] ** 2
        return T["u_t"] - k * bent  # (k(u) u_x)_x

layer = PDEConstraint(Rod()).double()
c = {f"c{i}": law[i] for i in range(5)}
error = layer(basis, c)(points) - readings
error.square().mean().backward()
"""


@chapter("pde", title="A layer that obeys an equation", order=60)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    tiny = settings.tiny
    sets = [measure(seed) for seed in range(1 if tiny else 3)]
    points = 64 if tiny else 256
    layer = constraint(points)
    rows = [compare(layer, data, tiny) for data in tqdm(sets, desc="rod", unit="set of readings")]
    means = {
        "layer": [_mean([r.layer.error for r in rows])],
        "numerical": [_mean([r.numerical.error for r in rows])],
        "descent": [_mean([r.descent[i].error for r in rows]) for i in range(len(WEIGHTS))],
        "newton": [_mean([r.newton[i].error for r in rows]) for i in range(len(WEIGHTS))],
    }
    here = START + torch.tensor([0.5, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # on the way
    gradients = [gradient_errors(here, sets[0], points, size) for size in ((3, 3), (4, 5), (7, 8))]
    figures = (
        draw_field(layer, rows[0].layer.c, sets[0], settings.out / "field.png"),
        draw_laws(rows[0], settings.out / "laws.png"),
        draw_weights(means, settings.out / "weights.png"),
    )
    print(f"\n{len(sets[0].values)} readings, {NOISE} noise, {len(sets)} sets of them; error of the law")
    for name, errors in means.items():
        print(f"  {name:<12}" + "".join(f"{e:9.1%}" for e in errors))
    first = rows[0].layer
    print(f"layer: {first.evaluations} fields and gradients in {first.seconds:.1f} s; error of the gradient")
    for g in gradients:
        print(
            f"  {g.functions:>3} functions: residual {g.residual:.1%}, {g.exact:.0e}, Gauss-Newton {g.gauss_newton:.1%}"
        )
    numbers = {
        "errors": means,
        "gradients": [vars(g) for g in gradients],
        "evaluations": first.evaluations,
        "seconds": first.seconds,
    }
    (settings.out / "pde.json").write_text(json.dumps(numbers, indent=2))

    assert all(g.exact < 1e-5 for g in gradients), numbers
    if not tiny:
        assert gradients[0].gauss_newton > 0.01, numbers
        assert means["layer"][0] < 0.15 and means["layer"][0] < min(means["descent"]), numbers
        assert means["layer"][0] < 1.5 * means["numerical"][0], numbers
    return blocks(rows, means, gradients, figures)


def blocks(
    rows: list[Row], means: dict[str, list[float]], gradients: list[Gradient], figures: tuple[Path, Path, Path]
) -> list[Block]:
    """What the page shows."""
    first, first_penalty, K = rows[0].layer, rows[0].descent[0], 56
    (ours,), (solver,) = means["layer"], means["numerical"]
    worst, best, good = max(means["descent"]), min(means["descent"]), min(means["newton"])
    return [
        Text(
            "A rod is hot at one end. How well it conducts depends on how hot it is, and nobody knows how: eight "
            f"thermometers are read ten times each, with an error of {NOISE}. The layer is given an equation with a "
            f"law of five numbers in it, and {K} basis functions. It finds the field made of them that obeys the "
            "equation as well as it can, so every law has its field; and the gradient of how far this is from "
            "the readings goes back through the equation into the law."
        ),
        Code(SNIPPET),
        Figure(
            figures[:2],
            f"First: field of the learned law, after {first.evaluations} fields and their gradients "
            f"({first.seconds:.1f} s). Second: what was learned, with the equation as a constraint, in a numerical "
            f"solver, and as a penalty, by {first_penalty.evaluations} "
            f"evaluations of L-BFGS ({first_penalty.seconds:.1f} s). Temperatures below 0.1 and above 0.95 "
            "do not occur.",
            "Four temperature profiles through dots; conductivities that rise with the temperature.",
        ),
        Text(
            "The usual way to teach an equation to a network is a penalty on its residual: law and field are "
            "learned at once, and a weight says how much the equation counts. Too small, the field follows the noise; "
            "too large, nothing moves. The layer has no such weight, and its outer problem has five unknowns, not "
            f"{5 + K}."
        ),
        Figure(
            figures[2:],
            f"Root mean square error of the logarithm of the conductivity, mean over {len(rows)} sets of readings. The "
            "true law is not one of those that are fitted.",
            "Error against weight: that of the penalty falls and rises again, those of the layer and of the numerical "
            "solver are level lines.",
        ),
        Text(
            f"The layer ends with an error of {ours:.1%}, the penalty between {best:.1%} and {worst:.1%}. Where "
            "somebody minimises it to the end (here, Gauss-Newton steps on all unknowns can), a large weight leads "
            f"to the layer's own problem, and the best of four weights to {good:.1%}. A numerical solver, differenced "
            f"in each number of the law, comes to {solver:.1%}: for a rod and five numbers it is the thing to take. "
            "The layer is for equations inside a network: a law with many parameters costs one backward "
            "pass, and the basis may be learned, too."
        ),
        Heading("Is the gradient right?"),
        Text(
            "There are more points than functions, so the equation holds at none of them exactly. The field is a "
            "stationary point of the squared residual, and its derivative needs the whole Hessian there. Without "
            "curvature of the equation, as in the method of Gauss and Newton, it is that of another function: the "
            "more the residual is, the more so."
        ),
        Table(
            ("basis functions", "residual", "exact Hessian", "Gauss-Newton"),
            [(str(g.functions), f"{g.residual:.1%}", f"{g.exact:.0e}", f"{g.gauss_newton:.2g}") for g in gradients],
            "Relative error of the gradient of the misfit, in the five numbers of a law on the way, against central "
            "differences. Residual: of the equation, relative to its first term.",
        ),
    ]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
