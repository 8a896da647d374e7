"""A gated ReLU network trained to its global optimum, against scnn.

The reference finds the active neurons by a long run of accelerated proximal gradient steps in plain torch, and then
takes three steps of Newton's method on them, through which autograd differentiates: it is exact from the first on.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from integrity.harness import Calls, Contender, Problem, Solve

ORDER = 70
OURS = "torch-difflayers"
DOUBLE = torch.float64
BETA = 0.4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


DATA, GATES, POINTS = normal(0, 12, 3), normal(1, 5, 3), normal(2, 4, 3)


def features(X: Tensor, gates: Tensor) -> Tensor:
    """``(n, P d)``: the data as often as there are gates, zero where a gate is closed."""
    return ((X @ gates.mT >= 0).to(X.dtype)[..., None] * X[:, None]).flatten(1)


def minimiser(A: Tensor, y: Tensor, beta: Tensor) -> Tensor:
    """Of ``||A u - y||^2 / 2 + beta sum_i ||u_i||``, by FISTA."""
    step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
    u = v = A.new_zeros(len(GATES), DATA.shape[1])
    for k in range(5000):
        moved = v - step * (A.mT @ (A @ v.flatten() - y)).view_as(v)
        size = moved.norm(dim=-1, keepdim=True)
        new = moved * torch.relu(1 - step * beta / size.clamp_min(1e-300))
        u, v = new, new + k / (k + 3) * (new - u)
    return u


def trained(y: Tensor, beta: Tensor) -> Tensor:
    """Predictions of the trained network at a few points."""
    A, B = features(DATA, GATES).to(y), features(POINTS, GATES).to(y)
    with torch.no_grad():
        u = minimiser(A, y, beta)
        active = (u.norm(dim=-1) > 0).repeat_interleave(u.shape[-1])
    A, B, z = A[:, active], B[:, active], u.flatten()[active]
    for _ in range(3):
        blocks = z.view(-1, DATA.shape[1])
        size = blocks.norm(dim=-1, keepdim=True)
        unit = blocks / size
        bend = (torch.eye(3, dtype=y.dtype) - unit[:, :, None] * unit[:, None]) / size[..., None]
        slope = A.mT @ (A @ z - y) + beta * unit.flatten()
        z = z - torch.linalg.solve(A.mT @ A + beta * torch.block_diag(*bend), slope)
    return B @ z


def ours() -> Calls:
    from difflayers.relu import FISTA, convex_gated_relu, predict

    def call(policy: str, **options: Any) -> Solve:
        def solve(y: Tensor, beta: Tensor) -> Tensor:
            X, gates, points = (t.to(y.dtype) for t in (DATA, GATES, POINTS))
            X, points = (t.expand(*y.shape[:-1], *t.shape) for t in (X, points))
            network = convex_gated_relu(X, y, beta, gates, solver=FISTA(**options), on_failure=policy)
            return predict(network, points)

        return solve

    return Calls(call("raise"), starved=call("raise", max_steps=1), bad=call("nan"), one=call("raise"))


def scnn(**settings: Any) -> Calls:
    """NumPy in and out."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    class Heard(logging.Handler):
        """Its warnings go to a logger, and so to the terminal."""

        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logging.getLogger("scnn").addHandler(Heard(logging.WARNING))

    def one(y: Tensor, beta: Tensor, max_iters: int, tol: float) -> Tensor:
        dtype = str(y.dtype).removeprefix("torch.")
        model = ConvexGatedReLU(np.ascontiguousarray(GATES.mT.numpy()).astype(dtype))
        penalty = NeuronGL1(beta.item() / len(y))  # it minimises the mean of squares over 2
        X, labels = DATA.to(y.dtype).numpy(), y.detach()[:, None].numpy()
        solver = RFISTA(model, max_iters=max_iters, tol=tol)
        found, _ = optimize_model(
            model, solver, Metrics(), X, labels, regularizer=penalty, return_convex=True, dtype=dtype, **settings
        )
        return torch.from_numpy(np.array(found(POINTS.to(y.dtype).numpy()))).reshape(-1)

    def call(max_iters: int = 100_000, tol: float = 1e-14) -> Solve:
        def solve(y: Tensor, beta: Tensor) -> tuple[Tensor, str]:
            said.clear()
            x = torch.stack([one(labels, beta, max_iters, tol) for labels in y])
            return x, said[0] if said else ""

        return solve

    return Calls(call(), starved=call(max_iters=2), single=call(tol=1e-9))


NO_DERIVATIVE = "takes and returns NumPy arrays: no derivative"
MISSING = {
    **dict.fromkeys(("first order", "second order", "forward mode", "vmap", "shared sum"), NO_DERIVATIVE),
    "bad element": "trains one network at a time",
}
CALL = "optimize_model(model, RFISTA(model, max_iters=100_000, tol=1e-14), Metrics(), X, y, NeuronGL1(0.4 / 12), {})"


def subjects() -> list[tuple[Problem, list[Contender]]]:
    inputs = (normal(3, 3, 12), torch.tensor(BETA, dtype=DOUBLE))
    spoiled = inputs[0].clone()
    spoiled[1, 0] = torch.nan
    problem = Problem(
        name="gated-relu-network",
        text="A two-layer network of 5 gated ReLU neurons trained to the global optimum, "
        "`min_u ||f(u) - y||^2 / 2 + beta sum ||u_i||`: 3 vectors of 12 labels, inputs of 3 numbers, a shared `beta`; "
        "what counts are its predictions at 4 points.",
        inputs=inputs,
        shared=(False, True),
        reference=trained,
        bad=(spoiled, inputs[1]),
        bad_text="one label is NaN",
    )
    return [
        (
            problem,
            [
                Contender(
                    "difflayers `convex_gated_relu`",
                    OURS,
                    "difflayers.relu.predict(difflayers.relu.convex_gated_relu(X, y, beta, gates), points)",
                    ours,
                    1e-10,
                ),
                Contender(
                    "scnn, `unitize_data=False`",
                    "pyscnn",
                    CALL.format("dtype='float64', return_convex=True, unitize_data=False"),
                    lambda: scnn(unitize_data=False),
                    1e-14,
                    missing=MISSING,
                    remarks={"dtype": "weights are trained in float32, predictions come in float64"},
                ),
                Contender(
                    "scnn, its default `unitize_data=True`",
                    "pyscnn",
                    CALL.format("dtype='float64', return_convex=True"),
                    lambda: scnn(),
                    1e-14,
                    missing=MISSING,
                    remarks={"dtype": "it takes the gates and the penalty of data scaled to columns of length 1"},
                ),
            ],
        )
    ]
