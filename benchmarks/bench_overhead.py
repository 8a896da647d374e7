"""What the engine costs beyond the arithmetic: ours against the same loop written by hand in torch, without gradient.

Fixed points: ten Picard steps at the default tolerance, which is asserted of both. The hand-written loop applies the
update, takes the norm of the step, compares it with the tolerance, reads one flag back and leaves. Ours runs with
arguments that need a gradient, as in training. Forward+backward of ours is set against the same loop without gradient
(the target is a multiple of it) and against autograd through its ten steps. The linear update is the harder case, since
there is less arithmetic to hide behind.

Roots: Newton against a loop of `torch.func.jacrev` and `torch.linalg.solve`, and against one that knows its Jacobian.
Linear systems: `linear_solve` against `torch.linalg.solve`, forward and backward.

The reference is a dense solve in float64, and the implicit function theorem by hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Options, Result, Row, run
from difflayers.implicit import Newton, Picard, fixed_point, fixed_point_ex, root_find, root_find_ex
from difflayers.linalg import linear_solve

DTYPES = (torch.float64, torch.float32)
SIZES = ((1, 10), (64, 256))
DENSE_SIZES = ((1, 10), (64, 64))
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}  # the defaults of difflayers
STEPS = 10
TARGETS = {("forward", 1): 2.5, ("forward+backward", 1): 8.0, ("forward", 64): 1.5, ("forward+backward", 64): 3.0}

Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return z @ W.mT + b


def tanh(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ W.mT + b)


def linear_slope(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.ones_like(z)


def tanh_slope(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return 1 - torch.tanh(z @ W.mT + b) ** 2


UPDATES = {"linear": (linear, linear_slope), "tanh": (tanh, tanh_slope)}


def picard_by_hand(update: Update, z: Tensor, W: Tensor, b: Tensor, rtol: float) -> tuple[Tensor, int]:
    steps = 0
    while steps < 1000:
        steps += 1
        new = update(z, W, b)
        done = (torch.linalg.vector_norm(new - z, dim=-1) <= rtol * torch.linalg.vector_norm(new, dim=-1)).all()
        z = new
        if done.item():
            break
    return z, steps


def make_data(batch: int, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A multiple of an orthogonal matrix and an offset such that Picard takes ten steps from zero.

    The k-th step has length c^(k-1) |b| in the linear case, so that c^9 < rtol < c^8 asks for c = rtol^(1/8.5). The
    offset of the nonlinear case is small, which keeps its slope near 1.
    """
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    b = 0.05 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
    g = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    W = RTOL[dtype] ** (1 / (STEPS - 1.5)) * Q
    return [t.to(device, dtype) for t in (torch.zeros(batch, n), W, b, g)]


def fixed_point_reference(update: Update, slope: Update, data: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed point and cotangents in float64, by a dense solve with the slope D of the update: `(I - W^T D) v = g`."""
    z, W, b, g = (t.double() for t in data)
    for _ in range(100):
        z = update(z, W, b)
    d = slope(z, W, b)
    eye = torch.eye(W.shape[0], dtype=W.dtype, device=W.device)
    v = d * torch.linalg.solve(eye - W.mT * d.unsqueeze(-2), g.unsqueeze(-1)).squeeze(-1)
    return z, v.mT @ z, v


def fixed_point_cases(options: Options) -> list[Case]:
    made = []
    for name, (update, slope) in UPDATES.items():
        for batch, n in SIZES:
            for dtype in DTYPES:
                data = make_data(batch, n, dtype, options.device)
                made += fixed_point_pair(f"fixed_point {name}", update, slope, data)
    return made


def label(kind: str, job: str, z: Tensor) -> str:
    return f"{kind} {z.shape[0]}x{z.shape[1]} {str(z.dtype).removeprefix('torch.')} {job}"


def fixed_point_pair(kind: str, update: Update, slope: Update, data: list[Tensor]) -> list[Case]:
    z0, W, b, g = data
    rtol = RTOL[z0.dtype]
    W_, b_ = (t.clone().requires_grad_() for t in (W, b))
    steps = fixed_point_ex(update, z0, (W, b), solver=Picard()).steps
    by_hand = picard_by_hand(update, z0, W, b, rtol)[1]
    if not (int(steps.min()) <= int(steps.max()) == by_hand == STEPS):
        raise AssertionError(f"{kind}: expected {STEPS} steps of both, got {steps.tolist()} and {by_hand}")

    def ours() -> Tensor:
        return fixed_point(update, z0, (W_, b_), solver=Picard())

    def ours_backward() -> Result:
        z = ours()
        return (z.detach(), *torch.autograd.grad(z, (W_, b_), g))

    def hand() -> Tensor:
        with torch.no_grad():
            return picard_by_hand(update, z0, W, b, rtol)[0]

    def hand_unrolled() -> Result:
        z = picard_by_hand(update, z0, W_, b_, rtol)[0]
        return (z.detach(), *torch.autograd.grad(z, (W_, b_), g))

    reference = fixed_point_reference(update, slope, data)
    loop = Contender("hand-written loop without gradient", hand, reference[0])
    return [
        Case(label(kind, "forward", z0), [Contender("difflayers", ours), loop], reference[0]),
        Case(
            label(kind, "forward+backward", z0),
            [
                Contender("difflayers", ours_backward),
                loop,
                Contender("hand-written loop, autograd", hand_unrolled),
            ],
            reference,
        ),
    ]


# ----------------------------------------------------------------------------------------------------------- roots


def residual(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return z + z**3 + z @ W.mT - b


def jacobian(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return W + torch.diag_embed(1 + 3 * z**2)


def jacobian_by_autograd(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(residual), in_dims=(0, None, 0))(z, W, b)


def newton_by_hand(jacobian: Update, z: Tensor, W: Tensor, b: Tensor, rtol: float) -> tuple[Tensor, int]:
    """Without a line search; stops on the length of the step, as ours does."""
    steps = 0
    while steps < 100:
        steps += 1
        step = torch.linalg.solve(jacobian(z, W, b), residual(z, W, b))
        z = z - step
        done = (torch.linalg.vector_norm(step, dim=-1) <= rtol * torch.linalg.vector_norm(z, dim=-1)).all()
        if done.item():
            break
    return z, steps


def root_data(batch: int, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    z0, W, b, g = make_data(batch, n, torch.float32, device)
    return [t.to(dtype) for t in (z0, W, 4 * b, g)]


def root_reference(data: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Root and cotangents in float64, by the known Jacobian."""
    z, W, b, g = (t.double() for t in data)
    z, _ = newton_by_hand(jacobian, z, W, b, 1e-14)
    v = torch.linalg.solve(jacobian(z, W, b).mT, g)
    return z, -v.mT @ z, v


def root_cases(options: Options) -> list[Case]:
    made = []
    for batch, n in DENSE_SIZES:
        for dtype in DTYPES:
            made += root_pair(root_data(batch, n, dtype, options.device))
    return made


def root_pair(data: list[Tensor]) -> list[Case]:
    z0, W, b, g = data
    rtol = RTOL[z0.dtype]
    W_, b_ = (t.clone().requires_grad_() for t in (W, b))
    steps = int(root_find_ex(residual, z0, (W, b), solver=Newton()).steps.max())
    by_hand = newton_by_hand(jacobian, z0, W, b, rtol)[1]

    def ours() -> Tensor:
        return root_find(residual, z0, (W_, b_), solver=Newton())

    def ours_backward() -> Result:
        z = ours()
        return (z.detach(), *torch.autograd.grad(z, (W_, b_), g))

    def hand(jacobian: Update) -> Callable[[], Tensor]:
        def job() -> Tensor:
            with torch.no_grad():
                return newton_by_hand(jacobian, z0, W, b, rtol)[0]

        return job

    reference = root_reference(data)
    z = reference[0]
    loops = [
        Contender(f"hand-written loop, jacrev, {by_hand} steps", hand(jacobian_by_autograd), z),
        Contender(f"hand-written loop, known Jacobian, {by_hand} steps", hand(jacobian), z),
    ]
    name = f"difflayers, {steps} steps"
    return [
        Case(label("root_find Newton", "forward", z0), [Contender(name, ours), *loops], z),
        Case(label("root_find Newton", "forward+backward", z0), [Contender(name, ours_backward), *loops], reference),
    ]


# -------------------------------------------------------------------------------------------------- linear systems


def linear_solve_cases(options: Options) -> list[Case]:
    made = []
    for batch, n in DENSE_SIZES:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            A = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
            A += 2 * n**0.5 * torch.eye(n, dtype=torch.float64)
            b, g = torch.randn(2, batch, n, generator=generator, dtype=torch.float64)
            A, b, g = (t.to(options.device, dtype) for t in (A, b, g))
            x = torch.linalg.solve(A.double(), b.double())
            v = torch.linalg.solve(A.double().mT, g.double())
            reference = (x, -v.unsqueeze(-1) * x.unsqueeze(-2), v)
            ways = {"difflayers": linear_solve, "torch.linalg.solve": torch.linalg.solve}
            for job, pick in (("forward", reference[0]), ("forward+backward", reference)):
                backward = job != "forward"
                contenders = [Contender(way, solve_job(solve, A, b, g, backward)) for way, solve in ways.items()]
                made.append(Case(label("linear_solve", job, b), contenders, pick))
    return made


def solve_job(
    solve: Callable[[Tensor, Tensor], Tensor], A: Tensor, b: Tensor, g: Tensor, backward: bool
) -> Callable[[], Result]:
    A, b = (t.clone().requires_grad_() for t in (A, b))

    def job() -> Result:
        x = solve(A, b)
        return (x.detach(), *torch.autograd.grad(x, (A, b), g)) if backward else x

    return job


def verdict(rows: list[Row]) -> str:
    """Ours as a multiple of the hand-written loop, beside the target."""
    lines = ["ours / hand-written loop without gradient (target)"]
    for row in rows:
        if row.case.startswith("fixed_point") and row.contender == "hand-written loop without gradient":
            size, job = row.case.split()[2], row.case.split()[-1]
            target = TARGETS[job, int(size.split("x")[0])]
            multiple = 1 / row.ratio
            missed = "" if multiple <= target else "  MISSED"
            lines.append(f"  {row.case:<52} {multiple:6.2f} ({target:.1f}){missed}")
    return "\n".join(lines)


def main(options: Options) -> None:
    cases = fixed_point_cases(options) + root_cases(options) + linear_solve_cases(options)
    rows = run("overhead", cases, options, memory=False)
    if rows:
        print(verdict(rows), end="\n\n")
