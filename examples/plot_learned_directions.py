"""A network that proposes search directions for a Poisson equation, against conjugate gradients.

Conjugate gradients search along the residual. Here a small convolutional network without activations, which sees
residuals on a grid and its coarser copies, proposes the direction instead; the solver makes proposals conjugate and
steps along them, so the answer is right whatever the network says. It is trained once, on random mixtures of Ritz
vectors of the empty square, to leave as little of a residual as one step can. Then it solves for right-hand sides it
has not seen, on the square and on one with walls it has not seen.

The network saves iterations, a tenth is left on the square and less than half among the walls. But each has a network
in it: on one core, at this size, conjugate gradients take less time, and a direct solver less than both.

    python examples/plot_learned_directions.py [--quick] [--steps 300] [--out out/learned_directions]

Source: A. Kaneda et al., A deep conjugate direction method for iteratively solving linear systems, 2023.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from difflayers.linalg import CG, LearnedDirections, LinearOperator, Tag, linear_solve_ex, ritz_residuals

GRID = 48
RTOL = 1e-6
BATCH = 32
TESTS = 8
COLOURS = {"conjugate gradients": "#8a8f98", "learned directions": "#1f5fa8"}


class Cycle(nn.Module):
    """Convolutions on ever coarser grids and back: a linear map whose stencils are learned."""

    def __init__(self, levels: int = 5, channels: int = 6) -> None:
        super().__init__()

        def stencil(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

        self.first, self.last = stencil(1, channels), stencil(channels, 1)
        self.down = nn.ModuleList(stencil(channels, channels) for _ in range(levels))
        self.up = nn.ModuleList(stencil(channels, channels) for _ in range(levels))

    def forward(self, r: Tensor) -> Tensor:
        h, kept = self.first(r.reshape(-1, 1, GRID, GRID)), []
        for down in self.down:
            kept.append(h)
            h = down(functional.avg_pool2d(h, 2, ceil_mode=True))
        for up in self.up:
            fine = kept.pop()
            h = fine + up(functional.interpolate(h, size=fine.shape[-2:], mode="bilinear"))
        return self.last(h).reshape(r.shape)


def laplacian(v: Tensor) -> Tensor:
    """Five points with zeros around."""
    g = functional.pad(v.reshape(-1, GRID, GRID), (1, 1, 1, 1))
    inner = g[:, 1:-1, 1:-1]
    out = 4 * inner - g[:, :-2, 1:-1] - g[:, 2:, 1:-1] - g[:, 1:-1, :-2] - g[:, 1:-1, 2:]
    return out.reshape(v.shape)


def walls() -> Tensor:
    """1 in the open, 0 in a disc and in two walls."""
    x = (torch.arange(GRID) + 0.5) / GRID
    X, Y = torch.meshgrid(x, x, indexing="ij")
    solid = (X - 0.3).square() + (Y - 0.65).square() < 0.13**2
    solid |= ((X - 0.7).abs() < 0.03) & (Y < 0.6)
    solid |= ((Y - 0.25).abs() < 0.03) & (X < 0.45) & (X > 0.1)
    return (~solid).double().flatten()


def problem(free: Tensor) -> LinearOperator:
    """The Laplacian of the open cells, and the identity in walls."""
    return LinearOperator(
        lambda p, v: p[0] * laplacian(p[0] * v) + (1 - p[0]) * v, (free,), tags=Tag.POSITIVE_DEFINITE, param_ndims=(1,)
    )


def train(network: nn.Module, steps: int) -> tuple[list[float], float]:
    """Losses, and the seconds it took."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(GRID * GRID, generator=generator)
    data = ritz_residuals(laplacian, first, 2000, vectors=200, generator=generator)
    solver = LearnedDirections(network=network)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc="training", mininterval=1.0):
        some = torch.randint(len(data), (BATCH,), generator=generator)
        loss = solver.loss(laplacian, data[some]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, time.perf_counter() - start


def compare(network: nn.Module, free: Tensor, b: Tensor) -> dict:
    """Iterations, seconds and the history of one residual, for both ways."""
    A = problem(free)
    ways = {
        "conjugate gradients": lambda **more: CG(**more),
        "learned directions": lambda **more: LearnedDirections(network=lambda r: free * network(r), **more),
    }
    found = {}
    for name, way in ways.items():
        start = time.perf_counter()
        solution = linear_solve_ex(A, b, solver=way(rtol=RTOL))
        seconds = time.perf_counter() - start
        assert bool(solution.converged.all()), f"{name}: {solution.status.tolist()}"
        count = int(solution.steps[0])
        marks = sorted({round(count * i / 12) for i in range(13)})
        history = [linear_solve_ex(A, b[0], solver=way(rtol=0.0, max_steps=k)).residual / b[0].norm() for k in marks]
        found[name] = {
            "iterations": solution.steps.double().mean().item(),
            "milliseconds": 1e3 * seconds / len(b),
            "marks": marks,
            "history": [float(r) for r in history],
            "value": solution.value,
        }
    assert torch.allclose(*(f["value"] for f in found.values()), rtol=0, atol=1e-3 * float(b.norm(dim=-1).max()))
    return found


def direct(free: Tensor, b: Tensor) -> float:
    """Milliseconds a system of SuperLU, factorised once for all right-hand sides."""
    from scipy import sparse
    from scipy.sparse.linalg import splu

    ones = torch.ones(GRID).numpy()
    T = sparse.diags_array([-ones[1:], 2 * ones, -ones[1:]], offsets=[-1, 0, 1])
    eye, open_cells = sparse.eye_array(GRID), sparse.diags_array(free.numpy())
    A = open_cells @ (sparse.kron(T, eye) + sparse.kron(eye, T)) @ open_cells + sparse.diags_array(1 - free.numpy())
    start = time.perf_counter()
    splu(A.tocsc()).solve(b.numpy().T)
    return 1e3 * (time.perf_counter() - start) / len(b)


def draw(losses: list[float], results: dict, free: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", width_ratios=(1, 0.9, 1.3, 1.3))
    axes[0].semilogy(losses, color=COLOURS["learned directions"], lw=1)
    axes[0].set(xlabel="step of the training", title="left of a residual after one direction")
    with_walls = results["walls it has not seen"]["learned directions"]["value"][0].reshape(GRID, GRID)
    image = torch.where(free.reshape(GRID, GRID) > 0, with_walls, torch.nan)
    axes[1].set_facecolor("#3b3f46")
    axes[1].imshow(image.T.numpy(), origin="lower", cmap="viridis")
    axes[1].set(xticks=[], yticks=[], title="a solution, with walls")
    for axis, (title, found) in zip(axes[2:], results.items(), strict=True):
        for name, result in found.items():
            label = f"{name}: {result['iterations']:.0f} iterations, {result['milliseconds']:.1f} ms"
            axis.semilogy(result["marks"], result["history"], "o-", ms=3, lw=1.4, color=COLOURS[name], label=label)
        axis.axhline(RTOL, color="#c9cdd3", lw=1, zorder=0)
        axis.set(xlabel="iteration", title=title, ylim=(RTOL / 30, 300))
        axis.legend(frameon=False, fontsize=9, loc="upper right")
    axes[2].set_ylabel("relative residual")
    for axis in (axes[0], *axes[2:]):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    global GRID
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/learned_directions"))
    options = parser.parse_args()
    if options.quick:
        options.steps, GRID = 120, 24
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    network = Cycle()
    losses, seconds = train(network, options.steps)
    network.double()
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(TESTS, GRID * GRID, generator=generator, dtype=torch.float64)
    free = walls()
    results = {
        "the square it was trained on": compare(network, torch.ones_like(free), b),
        "walls it has not seen": compare(network, free, free * b),
    }
    draw(losses, results, free, options.out / "learned_directions.png")
    keep = ("iterations", "milliseconds")
    numbers = {title: {n: {k: r[k] for k in keep} for n, r in found.items()} for title, found in results.items()}
    for title, found in numbers.items():
        for name, result in found.items():
            print(f"{title}, {name}: {result['iterations']:.1f} iterations, {result['milliseconds']:.1f} ms a system")
    lu = direct(free, free * b)
    print(f"SuperLU: {lu:.1f} ms a system; training: {seconds:.0f} s")
    numbers |= {"training seconds": seconds, "SuperLU milliseconds": lu}
    (options.out / "results.json").write_text(json.dumps(numbers, indent=2))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    if options.steps >= 300:
        for found in results.values():
            assert found["learned directions"]["iterations"] < 0.5 * found["conjugate gradients"]["iterations"]


if __name__ == "__main__":
    main()
