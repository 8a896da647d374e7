"""A layer of one's own, as docs/write_your_own.md builds it: the soft quantile of a sample, held to the contract.

python examples/own_layer.py
"""

from dataclasses import replace
from functools import partial

import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import nn

from difflayers import SolveError
from difflayers.implicit import ImplicitProblem, Info, Status, solution_map, solution_map_ex
from difflayers.testing import Hostile, LayerCase, Wrong, check_layer


# The residual.
def distance(z, x, eps):
    return (z.unsqueeze(-1) - x) / eps.unsqueeze(-1)


def residual(z, x, q, eps):
    return distance(z, x, eps).sigmoid().mean(-1) - q


# The solver.
def slope(z, x, eps):
    return (distance(z, x, eps) / 2).cosh().square().reciprocal().mean(-1) / (4 * eps)


def solve(x, q, eps, max_steps=100):
    tol = 4 * torch.finfo(x.dtype).eps
    lower, upper = x.amin(-1) + eps * q.logit(), x.amax(-1) + eps * q.logit()  # the root lies between
    sound = (upper - lower).isfinite() & (eps > 0)
    z, active, steps = (lower + upper) / 2, sound, torch.zeros_like(sound, dtype=torch.int64)
    for _ in range(max_steps):
        error, steps = residual(z, x, q, eps), steps + active
        lower, upper = torch.where(error < 0, z, lower), torch.where(error > 0, z, upper)
        active = active & (error.abs() > tol) & (upper - lower > tol * z.abs())
        if not active.any():
            break
        newton = z - error / slope(z, x, eps)
        inside = (lower < newton) & (newton < upper)
        z = torch.where(active, torch.where(inside, newton, (lower + upper) / 2), z)
    status = torch.where(active, int(Status.MAX_STEPS), int(Status.CONVERGED))
    status = torch.where(sound, status, int(Status.INFEASIBLE))
    return z, Info(status, steps, error.abs()), (slope(z, x, eps),)


# The adjoint.
def linear_solve(z, args, factors, rhs, transpose):
    (slope,), eps = factors, args[2]
    regular = slope * eps > torch.finfo(rhs.dtype).eps ** 0.5
    status = torch.where(regular, int(Status.CONVERGED), int(Status.SINGULAR)).expand(rhs.shape)
    return rhs / slope, Info(status, torch.zeros_like(status), torch.zeros_like(rhs))


# The layer.
PROBLEM = ImplicitProblem(
    solve=solve, residual=residual, linear_solve=linear_solve, value_ndim=0, arg_ndims=(1, 0, 0), factor_ndims=(0,),
    name="soft_quantile", arg_names=("x", "q", "eps"),
)  # fmt: skip


def soft_quantile(x, q, eps, problem=PROBLEM, on_failure="raise"):
    for name, t in zip(problem.arg_names, (x, q, eps), strict=True):
        if not t.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {t.dtype}")
    args = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, q, eps)]  # half precision is lifted
    return solution_map(problem, args, on_failure=on_failure).to(x.dtype)


# The module.
class SoftQuantile(nn.Module):
    def __init__(self, q=0.5, eps=0.1):
        super().__init__()
        self.logit_q, self.log_eps = nn.Parameter(torch.tensor(q).logit()), nn.Parameter(torch.tensor(eps).log())

    def forward(self, x):
        return soft_quantile(x, self.logit_q.sigmoid(), self.log_eps.exp())

    def extra_repr(self):
        return f"q={self.logit_q.sigmoid().item():.3g}, eps={self.log_eps.exp().item():.3g}"


# What is known about it.
def root(x, q, eps):
    return brentq(lambda z: expit((z - x) / eps).mean() - q[0], min(x - 20 * eps), max(x + 20 * eps), xtol=1e-30)


def by_scipy(x, q, eps):
    full = torch.broadcast_tensors(x, q.unsqueeze(-1), eps.unsqueeze(-1))
    rows = zip(*(t.reshape(-1, t.shape[-1]).double().cpu().numpy() for t in full), strict=True)
    return torch.tensor([root(*row) for row in rows], dtype=torch.float64).reshape(full[0].shape[:-1])


def unrolled(x, q, eps):
    z = x.mean(-1)
    for _ in range(50):
        z = z - residual(z, x, q, eps) / slope(z, x, eps)
    return z


# The case.
x = torch.tensor([[0.3, -1.2, 0.8, 2.0, -0.1], [1.0, 1.1, -0.4, 0.2, 0.6]], dtype=torch.float64)
q, eps = torch.tensor([0.25, 0.6], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
far = torch.tensor([0.0, 0.0, 0.0, 1e2, 1e2], dtype=torch.float64)  # any z between 0 and 100 will do
starved = replace(PROBLEM, solve=partial(solve, max_steps=1))
CASE = LayerCase(
    "soft_quantile",
    soft_quantile,
    (x, q, eps),
    oracle=by_scipy,
    invariants=(residual,),
    event_ndims=(1, 0, 0),
    names=("x", "q", "eps"),
    representative=True,
    unrolled=unrolled,
    tolerant=partial(soft_quantile, on_failure="nan"),
    solution=lambda *args: solution_map_ex(PROBLEM, args),
    starved=partial(soft_quantile, problem=starved),
    starved_solution=lambda *args: solution_map_ex(starved, args),
    hostile=(
        Hostile("ties", (0 * x + 1, q, eps)),
        Hostile("huge", (1e9 * x, q, 1e9 * eps)),
        Hostile("tiny", (1e-9 * x, q, 1e-9 * eps)),
        Hostile("sharp", (x, q + 0.05, 1e-3 * eps)),
        Hostile(
            "flat", (far, 0.6 + 0 * eps, eps), fn=torch.func.grad(soft_quantile), raises=SolveError, match="SINGULAR"
        ),
        Hostile("a share above one", (x, q + 1, eps), raises=SolveError, match="INFEASIBLE"),
    ),
    wrong=(
        Wrong("a number for a sample", (x[0, 0], q, eps), "x: expected at least 1 dimension"),
        Wrong("batches that do not fit", (x, torch.cat([q, q]), eps), "q: expected batch dimensions"),
    ),
    make_module=lambda: SoftQuantile(0.3, 0.5).double(),
    module_inputs=(x,),
)

if __name__ == "__main__":
    results = check_layer(CASE, stop=False)
    for result in results:
        print(f"{result.clause:28} {result.outcome:8} {result.message}")
    print(sum(result.outcome == "passed" for result in results), "of", len(results), "clauses passed")
