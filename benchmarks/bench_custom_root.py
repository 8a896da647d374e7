"""The gradient of a root or a fixed point by the implicit function theorem: ours against torchopt's `custom_root`.

Everyone runs the same solver, a loop written by hand: Picard for fixed points, Newton for roots. `solution_map` and
`custom_root` receive that loop and the residual, so that what differs is the adjoint and the machinery around it.
`fixed_point` and `root_find` run their own solver at the same tolerance. The linear solver of the adjoint gets the
loosest tolerance whose result has an error of at most 1e-8 in float64 and 1e-4 in float32.

Second derivatives follow in a table of their own, without times: of torchopt and torchdeq they are wrong, and neither
says so.
"""

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchdeq import get_deq
from torchopt.diff.implicit import custom_root

from benchmarks.bench_overhead import (
    fixed_point_reference,
    jacobian_by_autograd,
    label,
    make_data,
    newton_by_hand,
    picard_by_hand,
    residual,
    root_data,
    root_reference,
    tanh,
    tanh_slope,
)
from benchmarks.harness import AsLooseAs, Case, Contender, Options, Result, environment, run
from difflayers.implicit import (
    Implicit,
    ImplicitProblem,
    Info,
    Newton,
    Picard,
    Status,
    fixed_point,
    root_find,
    solution_map,
)
from difflayers.linalg import GMRES

DTYPES = (torch.float64, torch.float32)
TARGET = {torch.float64: 1e-8, torch.float32: 1e-4}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LADDER = {torch.float64: [10.0**-k for k in range(7, 13)], torch.float32: [10.0**-k for k in range(3, 8)]}

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


class Job:
    """One problem: its residual, a hand-written solver for it, and how each contender differentiates that."""

    def __init__(self, data: list[Tensor], residual: Solve, loop: Solve) -> None:
        self.z0, W, b, self.g = data
        self.W, self.b = W.clone().requires_grad_(), b.clone().requires_grad_()
        self.residual, self.loop = residual, loop

    def finish(self, z: Tensor) -> Result:
        return (z.detach(), *torch.autograd.grad(z, (self.W, self.b), self.g))

    def solution_map(self, adjoint: Implicit) -> Callable[[], Result]:
        def solve(W: Tensor, b: Tensor) -> tuple[Tensor, Info, tuple[()]]:
            z = self.loop(self.z0, W, b)
            count = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
            return z, Info(count + int(Status.CONVERGED), count, torch.zeros_like(z[..., 0])), ()

        problem = ImplicitProblem(
            solve=solve, residual=self.residual, value_ndim=1, arg_ndims=(2, 1), adjoint=adjoint, name="benchmark"
        )
        return lambda: self.finish(solution_map(problem, (self.W, self.b)))

    def public(self, function: Callable[..., Tensor], inner: Solve, **options: Any) -> Callable[[], Result]:
        return lambda: self.finish(function(inner, self.z0, (self.W, self.b), **options))

    def torchopt(self, solve: Any) -> Callable[[], Result]:
        def loop(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
            with torch.no_grad():
                return self.loop(z, W, b)

        solver = custom_root(self.residual, argnums=(1, 2), solve=solve)(loop)
        return lambda: self.finish(solver(self.z0, self.W, self.b))


def make_case(kind: str, job: Job, public: Callable[[Implicit], Callable[[], Result]], exact: Result) -> Case:
    dtype = job.z0.dtype
    few = job.z0.numel() <= 64
    memory = not few and dtype == torch.float64

    def krylov(tolerance: float) -> Implicit:
        return Implicit(GMRES(rtol=tolerance))

    def fitted(name: str, build: Callable[[Any], Callable[[], Result]]) -> Contender:
        fn = AsLooseAs(build, LADDER[dtype], exact, TARGET[dtype])
        return Contender(name, fn, settings=fn.settings)

    contenders = [
        Contender("difflayers.solution_map, same loop", job.solution_map(Implicit())),
        fitted("difflayers.solution_map, same loop, GMRES", lambda tol: job.solution_map(krylov(tol))),
        fitted(f"difflayers.{kind}, GMRES", lambda tol: public(krylov(tol))),
        fitted("torchopt normal_cg", lambda tol: job.torchopt(torchopt.linear_solve.solve_normal_cg(rtol=tol))),
        Contender("torchopt defaults", job.torchopt(None)),
    ]
    if few:  # it builds one matrix for the whole batch
        contenders.append(Contender("torchopt inv", job.torchopt(torchopt.linear_solve.solve_inv())))
    return Case(label(kind, "forward+backward", job.z0), contenders, exact, memory, TARGET[dtype])


def cases(options: Options) -> list[Case]:
    made = []
    for batch, n in ((1, 10), (64, 256)):
        for dtype in DTYPES:
            data = make_data(batch, n, dtype, options.device)
            rtol = TOLERANCE[dtype]
            job = Job(data, lambda z, W, b: z - tanh(z, W, b), lambda *a, rtol=rtol: picard_by_hand(tanh, *a, rtol)[0])
            exact = fixed_point_reference(tanh, tanh_slope, data)
            public = lambda adjoint, job=job: job.public(fixed_point, tanh, solver=Picard(), adjoint=adjoint)  # noqa: E731
            made.append(make_case("fixed_point", job, public, exact))
    for batch, n in ((1, 10), (64, 64)):
        for dtype in DTYPES:
            data = root_data(batch, n, dtype, options.device)
            rtol = TOLERANCE[dtype]
            job = Job(data, residual, lambda *a, rtol=rtol: newton_by_hand(jacobian_by_autograd, *a, rtol)[0])
            public = lambda adjoint, job=job: job.public(root_find, residual, solver=Newton(), adjoint=adjoint)  # noqa: E731
            made.append(make_case("root_find", job, public, root_reference(data)))
    return made


# ---------------------------------------------------------------------------------------------- second derivatives


def cubic(y: Tensor, a: Tensor) -> Tensor:
    return y**3 + y - a


def cubic_update(y: Tensor, a: Tensor) -> Tensor:
    return y - (y**3 + y - a) / 8  # contracts by 1/2 at the solution for a = 2


def cosine(z: Tensor, a: Tensor) -> Tensor:
    return z - torch.cos(a * z)


def cosine_update(z: Tensor, a: Tensor) -> Tensor:
    return torch.cos(a * z)


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def cubic_exact(a: float) -> tuple[float, float]:
    y = bisect(lambda y: y**3 + y - a, -a - 1, a + 1)
    return 1 / (3 * y**2 + 1), -6 * y / (3 * y**2 + 1) ** 3


def cosine_exact(a: float) -> tuple[float, float]:
    """First and second derivative of F(z, a) = z - cos(a z) = 0 by the chain rule."""
    z = bisect(lambda z: z - math.cos(a * z), 0, 1)
    s, c = math.sin(a * z), math.cos(a * z)
    F_z, F_a, F_zz, F_za, F_aa = 1 + a * s, z * s, a * a * c, s + a * z * c, z * z * c
    slope = -F_a / F_z
    return slope, -(F_aa + 2 * F_za * slope + F_zz * slope**2) / F_z


def by_torchopt(residual: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def newton(z: Tensor, a: Tensor) -> Tensor:
        z, a = z.detach(), a.detach()
        for _ in range(50):
            with torch.enable_grad():
                at = z.detach().requires_grad_()
                r = residual(at, a)
                (slope,) = torch.autograd.grad(r.sum(), at)
            z = z - r.detach() / slope
        return z

    solve = custom_root(residual, argnums=1, solve=torchopt.linear_solve.solve_normal_cg(rtol=1e-14))(newton)
    return lambda a: solve(torch.full_like(a, 0.5), a)


def by_torchdeq(update: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    tight = {"f_tol": 1e-14, "b_tol": 1e-14, "f_max_iter": 500, "b_max_iter": 500}
    deq = get_deq(ift=True, **tight)
    return lambda a: deq(lambda z: update(z, a), torch.full_like(a, 0.5).detach())[0][-1]


def two_derivatives(solve: Callable[[Tensor], Tensor], a: float) -> tuple[float, float]:
    at = torch.tensor([[a]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(solve(at).sum(), at, create_graph=True)
    if not first.requires_grad:
        return first.item(), 0.0
    (second,) = torch.autograd.grad(first.sum(), at, allow_unused=True)
    return first.item(), 0.0 if second is None else second.item()


def second_derivatives() -> list[dict[str, Any]]:
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    problems = {
        "y**3 + y = a at a = 2": (2.0, cubic_exact, cubic, cubic_update),
        "z = cos(a z) at a = 1": (1.0, cosine_exact, cosine, cosine_update),
    }
    rows = []
    for name, (a, exact, equation, update) in problems.items():
        ways = {
            "difflayers.root_find": lambda a, f=equation: root_find(f, half, (a,)),
            "difflayers.fixed_point": lambda a, f=update: fixed_point(f, half, (a,)),
            "torchopt custom_root": by_torchopt(equation),
            "torchdeq IFT": by_torchdeq(update),
        }
        expected = exact(a)
        rows.append({"problem": name, "by": "exact", "first": expected[0], "second": expected[1], "verdict": ""})
        for way, solve in ways.items():
            got = two_derivatives(solve, a)
            right = [abs(g - e) <= 1e-8 * abs(e) for g, e in zip(got, expected, strict=True)]
            wrong = " and ".join(order for order, ok in zip(("first", "second"), right, strict=True) if not ok)
            verdict = f"WRONG: {wrong}" if wrong else "right"
            rows.append({"problem": name, "by": way, "first": got[0], "second": got[1], "verdict": verdict})
    return rows


def main(options: Options) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")  # it calls functorch by its old name
    run("custom_root", cases(options), options)
    if options.memory_of is not None:
        return
    rows = second_derivatives()
    print("second derivatives\n")
    for row in rows:
        print("{problem:<22} {by:<24} first {first:+.10f}  second {second:+.10f}  {verdict}".format(**row).rstrip())
    print(flush=True)
    report = {"name": "second_derivatives", **environment(options), "rows": rows}
    (options.results / "second_derivatives.json").write_text(json.dumps(report, indent=2) + "\n")
