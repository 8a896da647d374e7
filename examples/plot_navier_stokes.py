"""Vorticity of a plane flow without solution data: soft penalty, one constraint, and experts in space or time.

A small Fourier network sees the vorticity w0 at the beginning and proposes 16 basis functions that vanish there, with
their stream functions; the flow is w0 plus their combination. Four ways to combine them, trained on the residual of
the Navier-Stokes equation alone, with the same network, initial fields and number of steps:

- soft penalty: the weights are a last layer, trained like all others; one combination for all flows;
- one constraint: for each flow the weights that minimise its residual, found by the layer, in training as in tests;
- experts in space: the same on every quarter of the torus, with weights of its own each;
- experts in time: the same on both halves of the time.

Tested on initial fields that were not seen, against a pseudo-spectral solver on a finer grid; and the network that was
trained with one constraint is tested with experts in space as well. Experts always have the smaller residual, since
they have more freedom. The error is another matter: given the same network, experts in space are better than one
constraint; but one constraint, which can do less, makes the network learn more, and in so short a training that counts
for more. An expert of the second half of the time does not know where the first one ended, and loses its way. The flows
are smooth and a solver needs milliseconds for them: this is about constraints, not about speed.

    python examples/plot_navier_stokes.py [--quick] [--seeds 3] [--out out/navier_stokes]

Source: N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with mixture-of-experts,
2024, section 4.2. Departure: the residual is squared once in the inner problem, not twice; derivatives know that the
torus has no edge; the grid is coarse, the viscosity large.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from difflayers.pde import (
    Box,
    DomainExperts,
    Grid,
    HardBoxes,
    NavierStokes2D,
    PDEConstraint,
    Spectral,
    gaussian_random_field,
    navier_stokes_reference,
    plot_field,
    train,
)

METHODS = ("soft penalty", "one constraint", "experts in space", "experts in time")
LATER = "one, then experts"  # trained with one constraint, tested with experts in space
ALL = (*METHODS, LATER)
SIZE, SLICES, END = 12, 5, 1.0  # points in each direction, in time, and its end
VISCOSITY, AMPLITUDE = 0.01, 3.0
FUNCTIONS, POWERS, WIDTH, MODES = 16, 3, 12, 3
SEEN, HELD_OUT, BATCH = 64, 16, 4
DOMAIN = Box(t=(0.0, END), x=(0.0, 1.0), y=(0.0, 1.0))
GRID = Grid(DOMAIN, periodic=("x", "y"), spacing="chebyshev", t=SLICES, x=SIZE, y=SIZE)
TIMES = GRID.nodes[0]


class Vorticity(NavierStokes2D):
    """The vorticity equation alone: the stream functions of the basis satisfy Poisson's equation as they are made."""

    def __init__(self) -> None:
        super().__init__(domain=DOMAIN, conditions=(), nu=VISCOSITY)
        self.terms = ("w_t", "w_x", "w_y", "w_xx", "w_yy", "psi_x", "psi_y")

    def residual(self, T, p):
        flow = T["psi_y"] * T["w_x"] - T["psi_x"] * T["w_y"]
        return T["w_t"] + flow - p["nu"] * (T["w_xx"] + T["w_yy"])


class Waves:
    """Derivatives, smoothing and stream functions by Fourier series on the torus."""

    number = torch.fft.fftfreq(SIZE, 1 / SIZE, dtype=torch.float64)
    kx, ky = 2 * math.pi * number[:, None], 2 * math.pi * torch.arange(SIZE // 2 + 1, dtype=torch.float64)
    square = kx.square() + ky.square()
    kept = (kx.abs() <= 8 * math.pi) & (ky <= 8 * math.pi) & (square > 0)
    inverse = torch.where(kept, 1 / square.clamp_min(1.0), 0)

    @staticmethod
    def times(factor: Tensor, field: Tensor) -> Tensor:
        return torch.fft.irfft2(factor * torch.fft.rfft2(field), s=(SIZE, SIZE))


def with_stream_function(w: Tensor) -> Tensor:
    """``(*batch, n, n)`` vorticities to ``(*batch, n, n, 2)``, with psi of ``laplace psi = -w``."""
    return torch.stack([w, Waves.times(Waves.inverse, w)], -1)


class Spectrum(nn.Module):
    """A layer of a Fourier neural operator: a matrix for each low wave number, and one for each point."""

    def __init__(self) -> None:
        super().__init__()
        shape = WIDTH, WIDTH, 2 * MODES + 1, MODES + 1, 2
        self.waves = nn.Parameter(torch.randn(shape, dtype=torch.float64) / WIDTH)
        self.points = nn.Conv2d(WIDTH, WIDTH, 1, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        m, rows = MODES, list(range(-MODES, MODES + 1))
        low = torch.einsum(
            "bixy,ioxy->boxy", torch.fft.rfft2(h)[:, :, rows, : m + 1], torch.view_as_complex(self.waves)
        )
        spectrum = low.new_zeros(*low.shape[:2], SIZE, SIZE // 2 + 1)
        spectrum[:, :, rows, : m + 1] = low
        return torch.fft.irfft2(spectrum, s=(SIZE, SIZE)) + self.points(h)


class Network(nn.Module):
    """Basis functions for a flow: polynomials in time that vanish at 0, with fields as coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(6, WIDTH, 1, dtype=torch.float64)
        self.layers = nn.ModuleList([Spectrum(), Spectrum()])
        self.project = nn.Conv2d(WIDTH, FUNCTIONS * POWERS, 1, dtype=torch.float64)
        self.last = nn.Parameter(torch.randn(FUNCTIONS, dtype=torch.float64) / FUNCTIONS**0.5)  # soft penalty only

    def forward(self, w0: Tensor) -> Tensor:
        """``(batch, n, n)`` to ``(batch, times, n, n, 2, K)``."""
        w_x, w_y = (Waves.times(1j * k * Waves.kept, w0) for k in (Waves.kx, Waves.ky))
        psi = Waves.times(Waves.inverse, w0)
        u, v = Waves.times(1j * Waves.ky * Waves.kept, psi), -Waves.times(1j * Waves.kx * Waves.kept, psi)
        moved = Waves.times(Waves.kept, u * w_x + v * w_y) / AMPLITUDE
        spread = Waves.times(-VISCOSITY * Waves.square, w0) / AMPLITUDE
        h = self.lift(torch.stack([w0 / AMPLITUDE, u, v, moved, spread, 30 * Waves.times(Waves.inverse, moved)], 1))
        for layer in self.layers:
            h = h + nn.functional.gelu(layer(h))
        fields = Waves.times(Waves.kept, self.project(h)).unflatten(1, (FUNCTIONS, POWERS))
        powers = torch.stack([(TIMES / END) ** (p + 1) for p in range(POWERS)], -1)
        return torch.einsum("bkpxyq,tp->btxyqk", with_stream_function(fields), powers)


PROBLEM, DERIVATIVES = Vorticity(), Spectral(GRID)
ONE = PDEConstraint(PROBLEM, derivatives=DERIVATIVES, ridge=1e-6)
LAYERS = {
    "one constraint": ONE,
    "experts in space": DomainExperts(ONE, HardBoxes(x=2, y=2)),
    "experts in time": DomainExperts(ONE, HardBoxes(t=2)),
}


def solved(method: str, network: Network, w0: Tensor):
    """``(batch, points)`` residuals, and the field: a call gives its ``(batch, times, n, n, 2)`` values."""
    basis = network(w0)
    start = with_stream_function(w0).unsqueeze(1).expand(-1, SLICES, -1, -1, -1)
    if method == "soft penalty":
        flow = start + basis @ network.last
        terms = DERIVATIVES.terms(flow.unsqueeze(-1), None, PROBLEM, PROBLEM.terms).squeeze(-1)
        named = dict(zip(PROBLEM.terms, terms.unbind(-1), strict=True))
        return PROBLEM.residual(named, PROBLEM.params), lambda: flow
    field = LAYERS[method](basis, offset=start)
    F = PROBLEM.residual(field.terms, PROBLEM.params)
    present = getattr(field, "present", None)  # experts with fewer points than others repeat some
    return F.flatten(1) if present is None else F[:, present], field


def trained(method: str, seen: Tensor, seed: int, steps: int) -> Network:
    """Adam on the residual; no solution is used."""
    torch.manual_seed(seed)
    network, generator = Network(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(step: int) -> Tensor:
        w0 = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        return solved(method, network, w0)[0].square().mean(-1).sqrt().mean()

    train(loss, optimizer, steps, scheduler=schedule, max_norm=1.0, generator=generator)
    return network.eval()


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 errors, of each flow and at each time: ``(batch,)`` and ``(batch, times)``."""
    off, size = (f.square().flatten(2).sum(-1) for f in (found - expected, expected))
    return torch.stack([(off.sum(-1) / size.sum(-1)).sqrt(), *(off / size).sqrt().unbind(-1)], -1)


def study(seed: int, steps: int) -> tuple[dict, dict]:
    """All methods, trained and tested; and what is drawn of them."""
    fine = AMPLITUDE * gaussian_random_field(2 * SIZE, seed=seed, length=0.25, modes=5, count=SEEN + HELD_OUT)
    flows = navier_stokes_reference(fine[SEEN:], TIMES.tolist(), VISCOSITY)[..., ::2, ::2]
    seen, held_out = fine[:SEEN, ::2, ::2], fine[SEEN:, ::2, ::2]
    diffused = Waves.times(torch.exp(-VISCOSITY * Waves.square * TIMES[:, None, None]), held_out.unsqueeze(1))
    results: dict = {"diffusion alone": {"error": relative(diffused, flows).mean(0).tolist()}}
    shown: dict = {"reference": flows[0]}
    networks = {method: trained(method, seen, seed, steps) for method in METHODS}
    torch.manual_seed(seed)
    fresh = Network()  # what all of them started from
    for name in ALL:
        network, method = (networks[name], name) if name != LATER else (networks["one constraint"], "experts in space")
        with torch.no_grad():
            F, field = solved(method, network, held_out)
            w, before = field()[..., 0], solved(method, fresh, held_out)[1]()[..., 0]
        results[name] = {
            "error": relative(w, flows).mean(0).tolist(),
            "untrained": float(relative(before, flows)[:, 0].mean()),
            "residual": float(F.square().mean().sqrt()),
            "converged": method == "soft penalty" or bool((field.status == 0).all()),
        }
        shown[name] = {"w": w[0], "boxes": getattr(field, "boxes", ()), "field": field}
    return results, shown


def draw(results: list, shown: dict, path: Path) -> None:
    """A flow, the errors of all methods on it, and their statistics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(ALL, ("tab:grey", "tab:blue", "tab:green", "tab:orange", "tab:purple"), strict=True))
    figure, ((first, last, over, bars), below) = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    reference = shown["reference"]
    style = {"origin": "lower", "extent": (0, 1, 0, 1)}
    high = float(reference.abs().max())
    for axis, k, name in ((first, 0, "0"), (last, -1, f"{END:g}")):
        image = axis.imshow(reference[k].mT.numpy(), cmap="viridis", vmin=-high, vmax=high, **style)
        axis.set(title=f"held-out flow, t = {name}", xlabel="x", ylabel="y")
    figure.colorbar(image, ax=[first, last], location="bottom", aspect=40, shrink=0.6, label="vorticity, reference")
    drawn = [name for name in ALL if name != "experts in time"]
    error = {name: shown[name]["w"][-1] - reference[-1] for name in drawn}
    most = max(float(e.abs().max()) for e in error.values())
    for axis, name in zip(below, drawn, strict=True):
        image = axis.imshow(error[name].mT.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, **style)
        for box in shown[name]["boxes"]:
            (left, right), (bottom, top) = box.bounds[1:]
            axis.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], "k", lw=1)
        axis.set(title=name, xlabel="x", xlim=(0, 1), ylim=(0, 1))
    below[0].set_ylabel("y")
    figure.colorbar(
        image, ax=list(below), location="bottom", aspect=60, shrink=0.4, label=f"error of the vorticity, t = {END:g}"
    )
    for name in ALL:
        mean = torch.tensor([run[name]["error"][1:] for run in results]).mean(0)
        over.plot(TIMES.numpy(), 100 * mean.numpy(), "o-", ms=4, color=colours[name], label=name)
    over.set(title="mean error over time", xlabel="t", ylabel="relative L2 error, %")
    over.legend(frameon=False, fontsize=9)
    for i, name in enumerate(ALL):
        values = [100 * run[name]["error"][0] for run in results]
        bars.bar(i, sum(values) / len(values), color=colours[name])
        bars.plot([i] * len(values), values, "k.", ms=5)
    diffusion = 100 * sum(run["diffusion alone"]["error"][0] for run in results) / len(results)
    bars.axhline(diffusion, color="k", lw=1, ls=":")
    bars.text(-0.4, diffusion, "diffusion alone", va="bottom", fontsize=9)
    bars.set_xticks(range(len(ALL)), [name.replace(" ", "\n") for name in ALL], fontsize=8)
    bars.set(title="on flows not seen (dots: seeds)", ylabel="relative L2 error, %", ylim=(0, 1.15 * diffusion))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Trains, tests, prints, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small data, few steps, no claims")
    parser.add_argument("--out", type=Path, default=Path("out/navier_stokes"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 1, 4
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    runs = [study(seed, options.steps) for seed in range(options.seeds)]
    results, shown = [run for run, _ in runs], runs[0][1]
    print(f"{'held-out flows':<18}{'relative L2 error, %':>24}{'untrained basis':>18}{'residual':>12}")
    mean: dict = {}
    for name in ("diffusion alone", *ALL):
        errors = 100 * torch.tensor([run[name]["error"][0] for run in results])
        mean[name] = float(errors.mean())
        line = f"{name:<18}{mean[name]:>16.2f} +- {errors.std(correction=0):.2f}"
        if name in ALL:
            before, residual = (sum(run[name][key] for run in results) / len(runs) for key in ("untrained", "residual"))
            line += f"{100 * before:>18.1f}{residual:>12.3f}"
            mean[f"{name}, residual"] = residual
        print(line)
    assert all(run[name]["converged"] for run in results for name in ALL)
    if not options.quick:
        assert mean[f"{LATER}, residual"] < mean["one constraint, residual"], "more freedom, the same network"
    if options.steps >= 100:
        assert mean["one constraint"] < 0.9 * mean["soft penalty"] < 0.5 * mean["diffusion alone"]
        assert mean[LATER] < mean["one constraint"] < 7.0
    draw(results, shown, options.out / "navier_stokes.png")
    w, psi = shown["reference"], Waves.times(Waves.inverse, shown["reference"])
    figure = plot_field(shown[LATER]["field"], PROBLEM, torch.stack([w, psi], -1), index=0, title=LATER)
    figure.savefig(options.out / "field.png", dpi=110)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - start:.0f} s; figures and numbers in {options.out}")


if __name__ == "__main__":
    main()
