"""Entropic transport: the plan, its value and the Sinkhorn divergence, against POT and geomloss.

The reference is 300 alternating steps in the logarithm, differentiated by autograd through all of them: the costs are
so even that they converge to rounding in a tenth of that.
"""

from typing import Any

import torch
from torch import Tensor

from integrity.harness import Calls, Contender, Problem, Solve

ORDER = 30
OURS = "torch-difflayers"
EPS = 0.3  # of the cost
BLUR = (EPS / 2) ** 0.5  # geomloss: the cost is half the squared distance, eps = blur^2; ours is twice that
DOUBLE = torch.float64


def data(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def masses(logits: Tensor) -> Tensor:
    """A gradient in the masses is known up to a constant, one in logits without doubt."""
    return logits.softmax(-1)


def uniform(size: int, like: Tensor) -> Tensor:
    return torch.full((size,), 1 / size, dtype=like.dtype)


def spoiled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first = inputs[0].clone()
    first[1, 0, 0] = torch.nan
    return first, *inputs[1:]


# ------------------------------------------------------------------------------------------------------ references


def potentials(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.zeros_like(b)
    for _ in range(300):
        u = a.log() - (v - cost / EPS).logsumexp(-1)
        v = b.log() - (u[:, None] - cost / EPS).logsumexp(-2)
    return u, v


def reference_plan(cost: Tensor, logits: Tensor) -> Tensor:
    u, v = potentials(cost, masses(logits), uniform(cost.shape[-1], cost))
    return (u[:, None] + v - cost / EPS).exp()


def value_between(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u, v = potentials(cost, a, b)
    plan = (u[:, None] + v - cost / EPS).exp()
    return (plan * cost).sum() + EPS * (plan * (plan / (a[:, None] * b)).log()).sum()


def reference_value(cost: Tensor, logits: Tensor) -> Tensor:
    return value_between(cost, masses(logits), uniform(cost.shape[-1], cost))


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(-1)


def reference_divergence(x: Tensor, y: Tensor) -> Tensor:
    a, b = uniform(len(x), x), uniform(len(y), y)
    between = value_between(squared(x, y), a, b)
    return between - value_between(squared(x, x), a, a) / 2 - value_between(squared(y, y), b, b) / 2


# ------------------------------------------------------------------------------------------------- plans and values


def ours(what: str) -> Calls:
    from difflayers import transport

    function = getattr(transport, what)

    def call(policy: str, **options: Any) -> Solve:
        def solve(cost: Tensor, logits: Tensor) -> Tensor:
            solver = transport.KernelSinkhorn(**options) if options else None
            return function(cost, masses(logits), eps=EPS, solver=solver, on_failure=policy)

        return solve

    few = call("raise", max_steps=1, newton_steps=0, check_every=1)
    return Calls(call("raise"), starved=few, bad=call("nan"), one=call("raise"))


def pot_alone(what: str, grad: str) -> Calls:
    """`ot.solve`, which takes one problem at a time."""
    import ot

    def one(cost: Tensor, logits: Tensor, tol: float = 1e-14, steps: int = 10_000) -> Tensor:
        b = uniform(cost.shape[-1], cost)
        found = ot.solve(cost, masses(logits), b, reg=EPS, max_iter=steps, tol=tol, grad=grad)
        return getattr(found, what)

    def every(**options: Any) -> Solve:
        return lambda cost, logits: torch.stack([one(c, logits, **options) for c in cost])

    return Calls(every(), starved=every(steps=2), one=one, single=every(tol=1e-6))


def pot_batch(what: str, grad: str) -> Calls:
    """`ot.batch.solve_batch`."""
    import ot

    def every(tol: float = 1e-14, steps: int = 10_000) -> Solve:
        def solve(cost: Tensor, logits: Tensor) -> Tensor:
            a = masses(logits).expand(cost.shape[0], -1)
            b = uniform(cost.shape[-1], cost).expand(cost.shape[0], -1)
            found = ot.batch.solve_batch(cost, EPS, a, b, max_iter=steps, tol=tol, reg_type="kl", grad=grad)
            return getattr(found, what)

        return solve

    return Calls(every(), starved=every(steps=2), single=every(tol=1e-6))


ALONE = "ot.solve(cost, a, b, reg=0.3, max_iter=10_000, tol=1e-14, grad={grad!r}).{what}"
BATCH = "ot.batch.solve_batch(cost, 0.3, a, b, max_iter=10_000, tol=1e-14, reg_type='kl', grad={grad!r}).{what}"


def pot(kind: str, what: str, grad: str, label: str = "", **texts: Any) -> Contender:
    build, call = (pot_alone, ALONE) if kind == "ot.solve" else (pot_batch, BATCH)
    return Contender(
        name=f"POT `{kind}`, {grad}{label}",
        package="POT",
        call=call.format(grad=grad, what=what),
        build=lambda: build(what, grad),
        tolerance=1e-14,
        **texts,
    )


NO_BATCH = {"bad element": "takes one problem at a time"}
LAST = {"first order": "documented as the gradient of the last iteration alone"}

MASSES = "right in the costs; the gradient in the masses is that of `reg_type='entropy'`, the default is 'KL'"

COST = (data(0, 3, 5, 4), data(1, 5))


def plan_problem() -> tuple[Problem, list[Contender]]:
    problem = Problem(
        name="entropic-plan",
        text="The plan of entropic transport, `min_P <C, P> + 0.3 KL(P | a b^T)` with sums `a` and `b`: 3 costs of "
        "5 x 4, masses `a` of the rows that are the softmax of shared logits, `b` uniform.",
        inputs=COST,
        shared=(False, True),
        reference=reference_plan,
        bad=spoiled(COST),
        bad_text="one cost is NaN",
    )
    call = "difflayers.transport.sinkhorn(cost, a, eps=0.3)"
    return problem, [
        Contender("difflayers `sinkhorn`", OURS, call, lambda: ours("sinkhorn"), 1e-10),
        pot("ot.solve", "plan", "autodiff", missing=NO_BATCH),
        pot("ot.batch.solve_batch", "plan", "autodiff"),
        pot("ot.solve", "plan", "last_step", " (approximate)", missing=NO_BATCH, remarks=LAST),
    ]


def value_problem() -> tuple[Problem, list[Contender]]:
    problem = Problem(
        name="entropic-value",
        text="The optimal value of entropic transport, `min_P <C, P> + 0.3 KL(P | a b^T)`: costs and masses of the "
        "problem of the plan.",
        inputs=COST,
        shared=(False, True),
        reference=reference_value,
        bad=spoiled(COST),
        bad_text="one cost is NaN",
    )
    call = "difflayers.transport.sinkhorn_value(cost, a, eps=0.3)"
    return problem, [
        Contender("difflayers `sinkhorn_value`", OURS, call, lambda: ours("sinkhorn_value"), 1e-10),
        pot("ot.solve", "value", "autodiff", missing=NO_BATCH),
        pot("ot.solve", "value", "envelope", missing=NO_BATCH, remarks={"first order": MASSES}),
        pot("ot.batch.solve_batch", "value", "autodiff"),
        pot(
            "ot.batch.solve_batch",
            "value",
            "envelope",
            remarks={"first order": "right in the costs; the gradient in the masses comes back as zero"},
        ),
    ]


# ------------------------------------------------------------------------------------------------------- divergences


def our_divergence() -> Calls:
    from difflayers.transport import KernelSinkhorn, sinkhorn_divergence

    def call(policy: str, **options: Any) -> Solve:
        solver = KernelSinkhorn(**options) if options else None
        return lambda x, y: sinkhorn_divergence(x, y, eps=EPS, solver=solver, on_failure=policy)

    few = call("raise", max_steps=1, newton_steps=0, check_every=1)
    return Calls(call("raise"), starved=few, bad=call("nan"), one=call("raise"))


def samples_loss() -> Calls:
    """`SamplesLoss`: half the divergence, its cost being half of ours."""
    from geomloss import SamplesLoss

    def call(scaling: float, diameter: float | None = None) -> Solve:
        loss = SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=scaling, diameter=diameter, backend="tensorized")
        return lambda x, y: 2 * loss(x, y.expand(x.shape[0], *y.shape).contiguous())

    known = call(0.999, diameter=1.5)
    return Calls(call(0.999), starved=call(0.1), one=lambda x, y: known(x[None], y)[0])


def solve_sample() -> Calls:
    """`geomloss.ot.solve_sample`, whose cost is ours."""
    from geomloss import ot

    def one(x: Tensor, y: Tensor, steps: int = 300) -> Tensor:
        return ot.solve_sample(x, y, reg=EPS, debias=True, max_iter=steps).value

    def every(**options: Any) -> Solve:
        return lambda x, y: torch.stack([one(points, y, **options) for points in x])

    return Calls(every(), starved=every(steps=2), one=one)


def divergence_problem() -> tuple[Problem, list[Contender]]:
    inputs = (data(2, 3, 5, 2), data(3, 4, 2))
    problem = Problem(
        name="sinkhorn-divergence",
        text="The Sinkhorn divergence `OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2` of 3 clouds of 5 points in the plane "
        "and one shared cloud of 4, squared distances, eps = 0.3.",
        inputs=inputs,
        shared=(False, True),
        reference=reference_divergence,
        bad=spoiled(inputs),
        bad_text="one coordinate is NaN",
    )
    return problem, [
        Contender(
            "difflayers `sinkhorn_divergence`",
            OURS,
            "difflayers.transport.sinkhorn_divergence(x, y, eps=0.3)",
            our_divergence,
            1e-10,
        ),
        Contender(
            "geomloss `SamplesLoss`",
            "geomloss",
            "2 * SamplesLoss('sinkhorn', p=2, blur=0.15**0.5, scaling=0.999, backend='tensorized')(x, y)",
            samples_loss,
            1e-6,
            remarks={
                "first order": "there is no tolerance; `scaling` near 1 is the documented way to accuracy",
                "second order": "a comment in its source, not its docstring, says that these may be wrong",
                "vmap": "with `diameter` given; without it, it is read off the points by `.item()`, and vmap raises",
                "starved": "scaling=0.1",
            },
        ),
        Contender(
            "geomloss `ot.solve_sample` (in development)",
            "geomloss",
            "geomloss.ot.solve_sample(x, y, reg=0.3, debias=True, max_iter=300).value",
            solve_sample,
            1e-6,
            missing=NO_BATCH,
            remarks={
                "first order": "a factor of two; its docstring warns that the interface may change, and says nothing "
                "of gradients but that the value serves as a loss; `tol` is not implemented",
                "starved": "max_iter=2",
            },
        ),
    ]


def subjects() -> list[tuple[Problem, list[Contender]]]:
    return [plan_problem(), value_problem(), divergence_problem()]
