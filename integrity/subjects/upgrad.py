"""The direction that no objective resists: torchjd and ours."""

from collections.abc import Callable

import torch
from torch import Tensor

from integrity.harness import Calls, Contender, Problem
from integrity.subjects._conic_references import upgrad

ORDER = 20


def problem() -> Problem:
    J = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    J[:, 0] -= J[:, 1] + J[:, 2] / 2  # so that the objectives conflict
    bad = J.clone()
    bad[1, 0, 0] = torch.nan
    return Problem(
        name="upgrad",
        text="The sum of the gradients of 3 objectives in 5 parameters, each projected on the directions that no "
        "objective resists; 3 Jacobians. Expected: the active sets of the quadratic programs, in the Gramian.",
        inputs=(J,),
        shared=(False,),
        reference=upgrad,
        bad=(bad,),
        bad_text="an entry of its Jacobian is NaN",
    )


def ours() -> Calls:
    from difflayers.conic import BlockPivoting, UPGrad

    solve = UPGrad()
    starved = UPGrad(solver=BlockPivoting(warm_steps=0, max_steps=1))
    return Calls(solve, starved, one=solve, bad=UPGrad(on_failure="nan"))


def torchjd(**options: float) -> Calls:
    from torchjd.aggregation import UPGrad
    from torchjd.linalg import QuadprogProjector

    aggregator: Callable[[Tensor], Tensor] = UPGrad(projector=QuadprogProjector(**options))
    return Calls(lambda J: torch.stack([aggregator(one) for one in J]), one=aggregator)


def subjects() -> list[tuple[Problem, list[Contender]]]:
    first = "documented as not differentiable"
    contenders = [
        Contender(
            name="difflayers `UPGrad`",
            package="torch-difflayers",
            call='UPGrad()(J); bad: on_failure="nan"; starved: solver=BlockPivoting(warm_steps=0, max_steps=1)',
            build=ours,
            tolerance=1e-10,
        ),
        Contender(
            name="torchjd",
            package="torchjd",
            call="UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0))(J), one Jacobian after the other",
            build=lambda: torchjd(norm_eps=0.0, reg_eps=0.0),
            tolerance=0,
            missing={"starved": "quadprog ends by itself"},
            remarks=dict.fromkeys(("first order", "second order", "forward mode"), first),
        ),
    ]
    return [(problem(), contenders)]
