"""A sequence of Darcy systems solved by GMRES that recycles its subspace, in the given order and sorted.

Data for a neural operator of porous-medium flow are solutions of many systems that differ in one field,

    -div(kappa grad p) + velocity . grad p = f    on the unit square, p = 0 on its boundary,

with log kappa a random smooth field. Restarted GMRES forgets what it learned about the operator at every restart and
at every system. RecycledGMRES keeps the directions that slow it down, from cycle to cycle, and from system to system;
it gains most where the next system is near the last one, so the sequence is sorted first. All search in 40 dimensions
at a time, for which RecycledGMRES stores twice as many vectors as SciPy's GMRES, which is therefore run with 80
dimensions as well. Products with the matrix are counted, those that bring recycled directions into a new system among
them (SciPy's count has also the one that measures the residual at a restart, one in 40 or fewer), and every solution is
compared with SuperLU.

    python examples/plot_recycled_krylov.py [--quick] [--systems 40] [--out out/recycled_krylov]

Source: H. Wang et al., Accelerating data generation for neural operators via Krylov subspace recycling, 2024.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from difflayers.linalg import RecycledGMRES, RecycledSpace, SparseMatrix, linear_solve, linear_solve_ex, sort_systems

GRID = 48
RTOL = 1e-8
RESTART, RECYCLE = 40, 10
VELOCITY = 2.0
MODES = 2  # smooth modes of log kappa in each direction
WAYS = ("GMRES", "GMRES, twice the memory", "deflated, within a system", "recycled, as drawn", "recycled, sorted")
COLOURS = ("#8a8f98", "#b9bdc4", "#9bb8d9", "#d9822b", "#1f5fa8")


def permeabilities(count: int, size: int) -> Tensor:
    """Random fields ``(count, size, size)``: exponentials of a few cosine modes, contrast about 10."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    wave = torch.stack([torch.cos(torch.pi * k * x) for k in range(MODES)])
    weight = 1 / (1 + torch.arange(MODES)[:, None] + torch.arange(MODES)).double()
    c = torch.randn(count, MODES, MODES, generator=generator, dtype=torch.float64) * weight
    return torch.exp(0.75 * torch.einsum("nij,ix,jy->nxy", c, wave, wave))


def assemble(kappa: Tensor) -> SparseMatrix:
    """Finite volumes for all fields at once: one pattern, values ``(count, nnz)``, in units of the cell."""
    from scipy import sparse

    size = kappa.shape[-1]
    h, n = 1 / size, size * size
    index = torch.arange(n).reshape(size, size)
    rows, cols, values, diagonal = [], [], [], torch.zeros_like(kappa)
    for dim in (1, 2):  # harmonic mean of the two cells at a face; the boundary is half a cell away
        a, b = kappa.narrow(dim, 0, size - 1), kappa.narrow(dim, 1, size - 1)
        face = 2 * a * b / (a + b)
        drift = VELOCITY * h / 2 * torch.ones_like(face)  # central differences of the convection
        low, high = index.narrow(dim - 1, 0, size - 1), index.narrow(dim - 1, 1, size - 1)
        for here, there, entry in ((low, high, drift - face), (high, low, -drift - face)):
            rows.append(here.flatten())
            cols.append(there.flatten())
            values.append(entry.flatten(1))
        diagonal.narrow(dim, 0, size - 1).add_(face)
        diagonal.narrow(dim, 1, size - 1).add_(face)
        for edge in (0, size - 1):
            diagonal.select(dim, edge).add_(2 * kappa.select(dim, edge))
    rows, cols = torch.cat([*rows, index.flatten()]), torch.cat([*cols, index.flatten()])
    values = torch.cat([*values, diagonal.flatten(1)], 1)
    order = torch.argsort(rows * n + cols)
    crow = torch.tensor(sparse.csr_array((np.ones(len(rows)), (rows.numpy(), cols.numpy())), (n, n)).indptr)
    return SparseMatrix(crow, cols[order], values[:, order], (n, n))


def at(A: SparseMatrix, i: int) -> SparseMatrix:
    return A._replace(values=A.values[i])


def run(A: SparseMatrix, b: Tensor, exact: Tensor, way: str, order: Tensor) -> dict:
    """Products and seconds of every system, in the order they are solved."""
    products, seconds = [], []
    space = RecycledSpace() if way.startswith("recycled") else None
    solver = RecycledGMRES(rtol=RTOL, restart=RESTART, recycle=RECYCLE, space=space, max_steps=5000)
    for i in tqdm(order.tolist(), desc=way, mininterval=1.0):
        start = time.perf_counter()
        if way in WAYS[:2]:
            value, count = scipy_gmres(at(A, i), b, RESTART * (1 + WAYS.index(way)))
        else:
            solution = linear_solve_ex(at(A, i), b, solver=solver)
            assert bool(solution.converged), f"system {i}: {solution.residual}"
            value, count = solution.value, int(solution.steps)
        seconds.append(time.perf_counter() - start)
        products.append(count)
        error = float((value - exact[i]).norm() / exact[i].norm())
        assert error < 1e-5, f"system {i}: error {error:.1e}"
    return {"products": products, "seconds": seconds}


def scipy_gmres(A: SparseMatrix, b: Tensor, restart: int) -> tuple[Tensor, int]:
    """The peer: SciPy's GMRES with the same tolerance."""
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, gmres

    M = sparse.csr_array((A.values.numpy(), A.col_indices.numpy(), A.crow_indices.numpy()), A.shape)
    count = 0

    def product(v):
        nonlocal count
        count += 1
        return M @ v

    operator = LinearOperator(A.shape, matvec=product, dtype=np.float64)
    x, info = gmres(operator, b.numpy(), rtol=RTOL, restart=restart, maxiter=500)
    assert info == 0
    return torch.from_numpy(x), count


def draw(kappa: Tensor, exact: Tensor, results: dict, path: Path) -> None:
    """Two systems, products of each, and the totals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(0.55, 0.55, 1.7, 1.2))
    for i in range(2):
        for j, (name, field) in enumerate((("log permeability", kappa.log()), ("pressure", exact))):
            axis = figure.add_subplot(grid[i, j])
            axis.imshow(field[i].reshape(GRID, GRID).numpy(), cmap="viridis" if j else "cividis")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(name, fontsize=10)
    axis = figure.add_subplot(grid[:, 2])
    for (name, result), colour in zip(results.items(), COLOURS, strict=True):
        axis.plot(range(1, len(result["products"]) + 1), result["products"], "o-", color=colour, ms=3, lw=1, label=name)
    axis.set(xlabel="system, in the order of solving", ylabel="products with the matrix", ylim=(0, None))
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis = figure.add_subplot(grid[:, 3])
    means = [float(np.mean(result["products"])) for result in results.values()]
    bars = axis.barh([name.replace(", ", ",\n") for name in results], means, color=COLOURS, height=0.62)
    seconds = [1e3 * float(np.mean(result["seconds"])) for result in results.values()]
    axis.bar_label(bars, [f" {m:.0f}  ({s:.0f} ms)" for m, s in zip(means, seconds, strict=True)], fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="products a system (and time)", xlim=(0, 1.4 * max(means)))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", type=int, default=40, help="length of the sequence")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/recycled_krylov"))
    options = parser.parse_args()
    if options.quick:
        options.systems = 8
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    kappa = permeabilities(options.systems, GRID)
    A = assemble(kappa)
    b = torch.full((GRID * GRID,), 1 / GRID**2, dtype=torch.float64)
    exact = linear_solve(A, b)  # SuperLU
    drawn = torch.arange(options.systems)
    order = sort_systems(kappa.log())
    results = {way: run(A, b, exact, way, order if way.endswith("sorted") else drawn) for way in WAYS}
    draw(kappa, exact, results, options.out / "recycled_krylov.png")
    means = {way: float(np.mean(result["products"])) for way, result in results.items()}
    seconds = {way: float(np.mean(result["seconds"])) for way, result in results.items()}
    (options.out / "results.json").write_text(json.dumps({"products": means, "seconds": seconds}, indent=2))
    print("products a system: " + ", ".join(f"{way} {value:.1f}" for way, value in means.items()))
    print("milliseconds a system: " + ", ".join(f"{way} {1e3 * value:.0f}" for way, value in seconds.items()))
    print(f"{time.perf_counter() - start:.0f} s; figure and numbers in {options.out}")
    assert means[WAYS[3]] < 0.8 * means[WAYS[1]] < 0.8 * means[WAYS[0]]
    if options.systems >= 40:  # neighbours are near enough then
        assert means[WAYS[4]] < means[WAYS[3]] < 0.8 * means[WAYS[2]] < 0.7 * means[WAYS[1]]


if __name__ == "__main__":
    main()
