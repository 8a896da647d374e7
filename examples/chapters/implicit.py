"""Digits with a layer that is a fixed point: accuracy, solver steps, and the memory of the backward pass."""

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import difflayers
from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, ORANGE, axes, save
from difflayers.implicit import Anderson, FixedPoint, Implicit, Picard, Unrolled
from difflayers.testing import saved_bytes

HIDDEN = 48
BOUND = 0.95  # of the cell's weight, so that the update contracts


# -------------------------------------------------------------------------------------------------------------- models


class Cell(nn.Module):
    """``f(z, x) = tanh(W z + x)``."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Once(nn.Module):
    """The cell applied once: the same parameters without the inner problem."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.module = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.tanh(x), x)


def network(middle: nn.Module) -> nn.Sequential:
    """Pixels, the layer in the middle, ten classes."""
    return nn.Sequential(nn.Linear(64, HIDDEN), middle, nn.Linear(HIDDEN, 10))


def fixed_point_network(seed: int) -> nn.Sequential:
    """With the layer."""
    torch.manual_seed(seed)
    return network(FixedPoint(Cell(), spectral_normalization=BOUND))


def plain_network(seed: int) -> nn.Sequential:
    """Without it: same parameters, same start."""
    torch.manual_seed(seed)
    return network(Once(Cell()))


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Run:
    """What one training run showed."""

    model: nn.Sequential
    accuracy: list[float]  # on the test set, after every epoch
    steps: list[float]  # mean solver steps of an epoch
    most_steps: list[int]
    seconds: float


def digits(tiny: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits, a fifth of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(a, dtype=torch.float32) for a in split[:2])
    y_train, y_test = (torch.tensor(a) for a in split[2:])
    return (x_train[:192], x_test[:64], y_train[:192], y_test[:64]) if tiny else (x_train, x_test, y_train, y_test)


def train(model: nn.Sequential, data: tuple[Tensor, ...], epochs: int, name: str) -> Run:
    """AdamW, batches of 64, a cosine schedule."""
    x_train, x_test, y_train, y_test = data
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    generator = torch.Generator().manual_seed(0)
    run, start = Run(model, [], [], [], 0.0), time.perf_counter()
    for _ in (bar := tqdm(range(epochs), desc=f"{name:<16}", unit="epoch")):
        with difflayers.trace() as solves:
            for index in torch.randperm(len(x_train), generator=generator).split(64):
                loss = nn.functional.cross_entropy(model(x_train[index]), y_train[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        schedule.step()
        with torch.no_grad():
            run.accuracy.append((model(x_test).argmax(-1) == y_test).float().mean().item())
        steps = torch.cat([s.steps for s in solves if s.phase == "forward"]).float() if solves else torch.zeros(1)
        run.steps.append(steps.mean().item())
        run.most_steps.append(int(steps.max()))
        bar.set_postfix(accuracy=f"{run.accuracy[-1]:.1%}", steps=f"{run.steps[-1]:.1f}")
    run.seconds = time.perf_counter() - start
    return run


# -------------------------------------------------------------------------------------------------------------- memory


def forced(adjoint: str, steps: int, seed: int = 0) -> tuple[FixedPoint, Tensor]:
    """A layer that takes exactly `steps` steps, and its input."""
    torch.manual_seed(seed)
    layer = FixedPoint(
        Cell(64),
        solver=Picard(max_steps=steps, check_every=None),
        adjoint=Implicit() if adjoint == "implicit" else Unrolled(steps),
        spectral_normalization=0.8,
        on_failure="ignore",
    )
    return layer, torch.randn(128, 64)


def kept_bytes(adjoint: str, steps: int) -> int:
    """Bytes of the distinct tensors that autograd keeps between forward and backward."""
    layer, x = forced(adjoint, steps)
    return saved_bytes(lambda: layer(x))[1]


MEASURE = """
import sys, torch
from chapters.implicit import forced

torch.set_num_threads(1)

def peak():  # not ru_maxrss: a process inherits that from its parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

for name in ("implicit", "unrolled"):  # whatever is loaded on first use is loaded here
    layer, x = forced(name, 2)
    layer(x).square().mean().backward()
before = peak()
layer, x = forced(sys.argv[1], int(sys.argv[2]))
layer(x).square().mean().backward()
print(peak() - before)
"""


def peak_bytes(adjoint: str, steps: int) -> int:
    """How much forward and backward raise the peak resident memory of a fresh process (Linux)."""
    here = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, adjoint, str(steps)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def gradient_gap(steps: int) -> float:
    """Relative difference between the implicit gradient and that of many unrolled steps, in float64."""
    grads = []
    for adjoint in ("implicit", "unrolled"):
        layer, x = forced(adjoint, steps)
        layer, x = layer.double(), x[:8].double()
        layer(x).square().sum().backward()
        grads.append(layer.module.linear.weight.grad)
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


# ------------------------------------------------------------------------------------------------------------- figures


def draw_training(runs: dict[str, Run], out: Path) -> tuple[Path, Path]:
    """Accuracy and solver steps over the epochs."""
    figure, axis = axes()
    for (name, run), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
        axis.plot(range(1, len(run.accuracy) + 1), [100 * a for a in run.accuracy], color=colour, label=name)
    axis.set(title="Test accuracy, %", xlabel="epoch", ylim=(80, 100))
    axis.legend(loc="lower right")
    accuracy = save(figure, out / "accuracy.png")
    figure, axis = axes()
    run = runs["fixed point"]
    epochs = range(1, len(run.steps) + 1)
    axis.plot(epochs, run.most_steps, color=GREY, label="slowest digit")
    axis.plot(epochs, run.steps, color=BLUE, label="mean")
    axis.set(title="Solver steps in an epoch", xlabel="epoch", ylim=(0, None))
    axis.legend(loc="lower right")
    return accuracy, save(figure, out / "steps.png")


def draw_solve(model: nn.Sequential, x: Tensor, most: int, path: Path) -> tuple[Path, dict[str, list[float]]]:
    """Residual of the test digits against steps, for two solvers, in float64 on the trained layer."""
    curves: dict[str, list[float]] = {}
    layer = FixedPoint(copy.deepcopy(model[1].module), spectral_normalization=BOUND).double()
    with torch.no_grad():
        x = model[0](x).double()
        for solver in (Anderson, Picard):
            curves[solver.__name__] = []
            for steps in range(1, most + 1):
                layer.solver = solver(max_steps=steps, check_every=None, rtol=0.0)
                curves[solver.__name__].append(layer.forward_ex(x).residual.median().item())
    figure, axis = axes(wide=True)
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
        axis.plot(range(1, most + 1), curve, color=colour, label=name)
    axis.set(yscale="log", xlabel="solver steps", title="Residual |f(z, x) − z| of the median digit")
    axis.legend()
    return save(figure, path), curves


def draw_memory(rows: list[dict], path: Path) -> Path:
    """What autograd keeps, by adjoint and steps."""
    figure, axis = axes(wide=True, height=2.2)
    names = [f"{r['adjoint']}, {r['steps']} steps" for r in rows]
    values = [r["saved"] / 2**20 for r in rows]
    bars = axis.barh(names, values, color=[BLUE if r["adjoint"] == "implicit" else ORANGE for r in rows], height=0.6)
    axis.bar_label(bars, [size(r["saved"]) for r in rows], padding=4)
    axis.set(xscale="log", xlim=(min(values) / 2, max(values) * 6), title="Kept for the backward pass, MiB (log scale)")
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    return save(figure, path)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 2 else f"{count / 2**10:.0f} KiB"


# ------------------------------------------------------------------------------------------------------------- chapter

SNIPPET = """
class Cell(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)

model = nn.Sequential(
    nn.Linear(64, 48),
    FixedPoint(Cell(), spectral_normalization=0.95),
    nn.Linear(48, 10),
)
"""


@chapter("implicit", title="A layer that is a fixed point", order=10)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    epochs, few, many = (2, 5, 20) if settings.tiny else (30, 10, 1000)
    data = digits(settings.tiny)
    runs = {
        "fixed point": train(fixed_point_network(0), data, epochs, "fixed point"),
        "cell once": train(plain_network(0), data, epochs, "cell once"),
    }
    parameters = {name: sum(p.numel() for p in r.model.parameters()) for name, r in runs.items()}
    with difflayers.trace() as solves:
        nn.functional.cross_entropy(runs["fixed point"].model(data[1]), data[3]).backward()
    forward = solves[0]
    steps = forward.steps.float()

    rows = []
    for name in ("implicit", "unrolled"):
        for count in (few, many):
            peak = None if settings.tiny or not sys.platform.startswith("linux") else peak_bytes(name, count)
            rows.append({"adjoint": name, "steps": count, "saved": kept_bytes(name, count), "peak": peak})
    gap = gradient_gap(200)

    training = draw_training(runs, settings.out)
    solve, curves = draw_solve(
        runs["fixed point"].model, data[1], 10 if settings.tiny else 40, settings.out / "solve.png"
    )
    memory = draw_memory(rows, settings.out / "memory.png")

    last = {name: r.accuracy[-1] for name, r in runs.items()}
    tests = len(data[1])
    print(f"\ntest accuracy on {tests} digits (one digit is {1 / tests:.2%}):")
    for name, r in runs.items():
        print(f"  {name:<12} {last[name]:6.1%}   {parameters[name]} parameters   {r.seconds:5.1f} s of training")
    print(f"solver steps on the test set: mean {steps.mean():.1f}, at most {int(steps.max())}; "
          f"largest residual {forward.residual.max():.1e}")  # fmt: skip
    print("memory of the backward pass, one layer, batch of 128, width 64:")
    for r in rows:
        peak = "" if r["peak"] is None else f"   peak of a process +{size(r['peak'])}"
        print(f"  {r['adjoint']:<9} {r['steps']:>5} steps   saved {size(r['saved']):>10}{peak}")
    print(f"implicit gradient against 200 unrolled steps, relative difference: {gap:.1e}")
    numbers = {"accuracy": last, "parameters": parameters, "memory": rows, "gradient gap": gap, "residuals": curves}
    (settings.out / "implicit.json").write_text(json.dumps(numbers, indent=2))

    saved = {(r["adjoint"], r["steps"]): r["saved"] for r in rows}
    assert saved["implicit", few] == saved["implicit", many]
    assert gap < 1e-8
    if not settings.tiny:
        assert last["fixed point"] > 0.94 and last["cell once"] > 0.94, last
        assert saved["unrolled", many] > 50 * saved["unrolled", few]
        assert int(steps.max()) < 100 and forward.residual.max() < 1e-3

    right = {name: round(a * tests) for name, a in last.items()}
    lead = right["fixed point"] - right["cell once"]
    compared = "as many as" if lead == 0 else f"{abs(lead)} {'more' if lead > 0 else 'fewer'} than"
    return [
        Text(
            "An ordinary layer computes its output. This one describes it: the output z of the cell f is the vector "
            "that the cell maps to itself, z = f(z, x). A solver finds it, and the gradient comes from the implicit "
            "function theorem: one linear system at the solution, however the solver got there."
        ),
        Code(SNIPPET),
        Heading("Does it learn?"),
        Text(
            f"Both networks read scikit-learn's 8 × 8 digits and have the same {parameters['fixed point']} parameters "
            "and the same start. In one the cell is solved for its fixed point, in the other it is applied once. Of "
            f"{tests} test digits the fixed point gets {right['fixed point']} right, {compared} the cell applied once. "
            "A few digits either way are chance: on a task this easy the layer does not earn its price, "
            f"{runs['fixed point'].seconds:.1f} s of training instead of {runs['cell once'].seconds:.1f} s. What this "
            "run shows is that it trains like any other layer."
        ),
        Table(
            ("network", "test accuracy", "parameters", "training"),
            [(n, f"{last[n]:.1%}", f"{parameters[n]}", f"{r.seconds:.1f} s") for n, r in runs.items()],
        ),
        Figure(
            training,
            "Test accuracy after every epoch, and steps of the solver, as difflayers.trace() saw them.",
            "Two line charts over the epochs: test accuracy of both networks, and steps of the fixed-point solver.",
        ),
        Heading("What does the solver do?"),
        Text(
            f"On the test set the trained layer takes {steps.mean():.1f} steps on average and {int(steps.max())} at "
            "most: every digit stops on its own. The weight of the cell is kept at a norm of at most "
            f"{BOUND}, so that the cell contracts, a fixed point exists, and there is only one. Anderson acceleration "
            "mixes the last iterates and gets further in the same number of steps than repeating the cell (Picard)."
        ),
        Figure(
            (solve,),
            "The same trained layer in float64, solved in two ways: how far the median digit is from its fixed point.",
            "Line chart on a logarithmic scale: residual against solver steps for Anderson and Picard.",
        ),
        Heading("What does the gradient cost?"),
        Text(
            "Backward through the solver's steps keeps every step in memory. The implicit gradient keeps the "
            f"solution, so {many} steps cost what {few} cost. Where the solver has converged, the two gradients agree: "
            f"here to a relative difference of {gap:.0e}."
        ),
        Figure(
            (memory,),
            f"Distinct tensors that autograd keeps between forward and backward, for exactly {few} and {many} steps "
            "of one layer of width 64 with a batch of 128.",
            "Bar chart on a logarithmic scale: memory of the implicit and the unrolled backward pass.",
        ),
        Table(
            ("backward", "steps", "kept", "process peak"),
            [
                (r["adjoint"], f"{r['steps']}", size(r["saved"]), "–" if r["peak"] is None else "+" + size(r["peak"]))
                for r in rows
            ],
            "Process peak: by how much forward and backward raise the peak resident memory of a fresh process. It "
            "includes what the allocator keeps and temporaries, and is good to a few MiB.",
        ),
    ]
