"""A quadratic program, a projection on the simplex and one on an ellipsoid: cvxpylayers, qpth, moreau and ours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from integrity.harness import Answer, Calls, Contender, Problem
from integrity.subjects import _conic_references as references

ORDER = 10
F64 = torch.float64
BATCH = 3
OURS = "torch-difflayers"
TIGHT = {"eps": 1e-8, "max_iters": 10000, "acceleration_lookback": 0}  # what the README of cvxpylayers recommends


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -------------------------------------------------------------------------------------------------------- problems


def quadratic() -> Problem:
    n = 4
    R, A = normal(1, n, n) / 2 + torch.eye(n, dtype=F64), normal(2, 1, n)
    rows = normal(3, 2, n)
    G = torch.cat([rows, -rows[:1]])
    q, b = 2 * normal(4, BATCH, n), normal(5, BATCH, 1) / 4
    h = torch.tensor([0.3, 0.5, 3.0], dtype=F64) + 0.1 * normal(6, BATCH, 3).abs()
    bad = h.clone()
    bad[1, 2] = -2.0
    return Problem(
        name="quadratic-program",
        text="`argmin_x |Rx|^2 / 2 + q'x` subject to `Gx <= h`, `Ax = b` with 4 variables, 3 inequalities and one "
        "equality; 3 elements share R, G and A. Expected: the KKT system of the active set.",
        inputs=(R, q, G, h, A, b),
        shared=(True, False, True, False, True, False),
        reference=lambda R, q, G, h, A, b: references.quadratic(R.mT @ R, q, G, h, A, b),
        bad=(R, q, G, bad, A, b),
        bad_text="two inequalities contradict each other",
    )


def simplex() -> Problem:
    v = normal(7, BATCH, 5)
    bad = v.clone()
    bad[1, 2] = torch.nan
    total = torch.tensor(1.5, dtype=F64)
    return Problem(
        name="projection-on-a-simplex",
        text="`argmin_x |x - v|^2 / 2` subject to `x >= 0`, `sum(x) = t` with 5 variables; 3 elements share t. "
        "Expected: the closed form.",
        inputs=(v, total),
        shared=(False, True),
        reference=references.simplex,
        bad=(bad, total),
        bad_text="an entry of v is NaN",
    )


def ellipsoid() -> Problem:
    F = normal(8, 3, 3) / 2 + torch.eye(3, dtype=F64)
    v, r = 2 * normal(9, BATCH, 3), torch.tensor([0.5, 0.7, 0.4], dtype=F64)
    bad = r.clone()
    bad[1] = -1.0
    return Problem(
        name="projection-on-an-ellipsoid",
        text="`argmin_x |x - v|^2 / 2` subject to `|Fx| <= r`, a second-order cone, with 3 variables; 3 elements share "
        "F. Expected: the root of the equation in the multiplier, by Newton's method to rounding.",
        inputs=(F, v, r),
        shared=(True, False, False),
        reference=references.ellipsoid,
        bad=(F, v, bad),
        bad_text="its radius is negative, so that it is infeasible",
    )


# ---------------------------------------------------------------------------------------------- CVXPY, ours and theirs

Parts = tuple[Any, list[Any], Any]


def cvxpy_quadratic() -> Parts:
    import cvxpy as cp

    x = cp.Variable(4)
    R, q, G, h, A, b = (cp.Parameter(shape) for shape in ((4, 4), 4, (3, 4), 3, (1, 4), 1))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x) / 2 + q @ x), [G @ x <= h, A @ x == b])
    return problem, [R, q, G, h, A, b], x


def cvxpy_simplex() -> Parts:
    import cvxpy as cp

    x, v, total = cp.Variable(5), cp.Parameter(5), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2), [x >= 0, cp.sum(x) == total]), [v, total], x


def cvxpy_ellipsoid() -> Parts:
    import cvxpy as cp

    x, F, v, r = cp.Variable(3), cp.Parameter((3, 3)), cp.Parameter(3), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v) / 2), [cp.norm(F @ x) <= r]), [F, v, r], x


def theirs(parts: Callable[[], Parts], tight: dict[str, Any], starved: dict[str, Any], **options: Any) -> Calls:
    from cvxpylayers.torch import CvxpyLayer

    def call(arguments: dict[str, Any]) -> Callable[..., Tensor]:
        problem, parameters, x = parts()
        layer = CvxpyLayer(problem, parameters=parameters, variables=[x], solver_args=arguments, **options)
        return lambda *inputs: layer(*inputs)[0]

    return Calls(call(tight), call(starved), one=call(tight))


def with_moreau(parts: Callable[[], Parts], starved: str) -> Calls:
    import moreau

    options = {"set": {"active_set_settings": moreau.ActiveSetSettings(iter_limit=1)}, "cone": {"max_iter": 3}}
    return theirs(parts, {}, options[starved], solver="MOREAU")


def our_layer(parts: Callable[[], Parts]) -> Calls:
    from difflayers.conic import Clarabel, CvxpyLayer

    def call(**options: Any) -> Callable[..., Tensor]:
        problem, parameters, x = parts()
        layer = CvxpyLayer(problem, parameters, [x], **options)
        return lambda *inputs: layer(*inputs)[0]

    solve = call()
    return Calls(solve, call(solver=Clarabel(max_steps=1)), one=solve, bad=call(on_failure="nan"))


def cvxpy_contenders(parts: Callable[[], Parts], starved: str = "set") -> list[Contender]:
    few = "active_set_settings=ActiveSetSettings(iter_limit=1)" if starved == "set" else "max_iter=3"
    return [
        Contender(
            name="difflayers `CvxpyLayer`",
            package=OURS,
            call='CvxpyLayer(problem, parameters, [x]); bad: on_failure="nan"; starved: solver=Clarabel(max_steps=1)',
            build=lambda: our_layer(parts),
            tolerance=1e-10,
        ),
        Contender(
            name="cvxpylayers",
            package="cvxpylayers",
            call="CvxpyLayer(problem, parameters=parameters, variables=[x]); starved: solver_args=dict(max_iters=5)",
            build=lambda: theirs(parts, {}, {"max_iters": 5}),
            tolerance=1e-4,
        ),
        Contender(
            name="cvxpylayers, eps 1e-8",
            package="cvxpylayers",
            call="CvxpyLayer(..., solver_args=dict(eps=1e-8, max_iters=10000, acceleration_lookback=0)); "
            "starved: max_iters=5",
            build=lambda: theirs(parts, TIGHT, TIGHT | {"max_iters": 5}),
            tolerance=1e-8,
        ),
        Contender(
            name="cvxpylayers, MOREAU",
            package="cvxpylayers",
            call='CvxpyLayer(problem, parameters=parameters, variables=[x], solver="MOREAU"); '
            f"starved: solver_args=dict({few})",
            build=lambda: with_moreau(parts, starved),
            tolerance=1e-6 if starved == "set" else 1e-8,
        ),
    ]


# ------------------------------------------------------------------------------------------------ quadratic programs

Data = Callable[..., tuple[Tensor, ...]]  # from the inputs to P, q, G, h, A, b, any of them shared or not


def quadratic_data(R: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return R.mT @ R, *rest


def simplex_data(v: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    n = v.shape[-1]
    eye = torch.eye(n, dtype=v.dtype)
    return eye, -v, -eye, v.new_zeros(n), v.new_ones(1, n), total.reshape(1)


def our_program(data: Data) -> Calls:
    from difflayers.conic import quadratic_program

    solve = lambda *inputs: quadratic_program(*data(*inputs))  # noqa: E731
    bad = lambda *inputs: quadratic_program(*data(*inputs), on_failure="nan")  # noqa: E731
    return Calls(solve, one=solve, bad=bad)


def our_interior_point(data: Data) -> Calls:
    from difflayers.conic import InteriorPoint, quadratic_program

    def call(**options: Any) -> Callable[..., Tensor]:
        limits = {"max_steps": options.pop("max_steps")} if "max_steps" in options else {}
        return lambda *inputs: quadratic_program(*data(*inputs), solver=InteriorPoint(**limits), **options)

    return Calls(call(), call(max_steps=0), one=call(), bad=call(on_failure="nan"))


def qpth(data: Data) -> Calls:
    from qpth.qp import QPFunction

    def call(**options: Any) -> Callable[..., Tensor]:
        return lambda *inputs: QPFunction(**options)(*data(*inputs))

    def expanded(*inputs: Tensor) -> Tensor:
        given = data(*inputs)
        batch = max(len(t) for t, k in zip(given, (2, 1) * 3, strict=True) if t.ndim > k)
        return QPFunction(verbose=0)(*(t.expand(batch, *t.shape[-k:]) for t, k in zip(given, (2, 1) * 3, strict=True)))

    return Calls(call(verbose=0), call(verbose=0, maxIter=3), bad=expanded)


def moreau(data: Data, solver: str) -> Calls:
    import moreau
    from moreau.torch import Solver

    def dense(rows: int, n: int) -> tuple[Tensor, Tensor]:
        return torch.arange(rows + 1) * n, torch.arange(n).repeat(rows)

    def call(**options: Any) -> Callable[..., Answer]:
        solvers: dict[int, Solver] = {}

        def solve(*inputs: Tensor) -> Answer:
            P, q, G, h, A, b = data(*inputs)
            batch, n, m, p = len(q), q.shape[-1], h.shape[-1], b.shape[-1]
            if batch not in solvers:
                settings = moreau.Settings(device="cpu", batch_size=batch, enable_grad=True, solver=solver, **options)
                cones = moreau.Cones(num_zero_cones=p, num_nonneg_cones=m)
                solvers[batch] = Solver(n, p + m, *dense(n, n), *dense(p + m, n), cones, settings)
            bounds = torch.cat([b.expand(batch, p), h.expand(batch, m)], -1)
            x = solvers[batch].solve(P.reshape(-1), torch.cat([A, G]).reshape(-1), q, bounds).x
            said = {s.name for s in solvers[batch].info.status} - {"Solved"}
            return x, ", ".join(sorted(said))

        return solve

    if solver == "ipm":
        tight = moreau.IPMSettings(tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        return Calls(call(ipm_settings=tight), call(ipm_settings=tight, max_iter=3))
    settings = [moreau.ActiveSetSettings(primal_tol=1e-10, **limit) for limit in ({}, {"iter_limit": 1})]
    return Calls(*(call(active_set_settings=each) for each in settings))


def program_contenders(data: Data) -> list[Contender]:
    return [
        Contender(
            name="difflayers `quadratic_program`",
            package=OURS,
            call='quadratic_program(P, q, G, h, A, b); bad: on_failure="nan"',
            build=lambda: our_program(data),
            tolerance=1e-10,
            missing={"starved": "the active-set method ends by itself, and no option limits its steps"},
        ),
        Contender(
            name="difflayers `quadratic_program`, `InteriorPoint`",
            package=OURS,
            call='quadratic_program(..., solver=InteriorPoint()); bad: on_failure="nan"; starved: max_steps=0',
            build=lambda: our_interior_point(data),
            tolerance=1e-9,
        ),
        Contender(
            name="qpth",
            package="qpth",
            call="QPFunction(verbose=0)(Q, p, G, h, A, b); starved: maxIter=3; bad: matrices expanded",
            build=lambda: qpth(data),
            tolerance=1e-12,
        ),
        Contender(
            name="moreau, active set",
            package="moreau",
            call='moreau.torch.Solver(..., Settings(device="cpu", batch_size=3, enable_grad=True, solver="active_set", '
            "active_set_settings=ActiveSetSettings(primal_tol=1e-10))).solve(P, A, q, b); starved: iter_limit=1",
            build=lambda: moreau(data, "active_set"),
            tolerance=1e-10,
        ),
        Contender(
            name="moreau, interior point",
            package="moreau",
            call='solver="ipm", ipm_settings=IPMSettings(tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10); '
            "starved: max_iter=3",
            build=lambda: moreau(data, "ipm"),
            tolerance=1e-10,
        ),
    ]


def our_simplex() -> Calls:
    from difflayers.proximal import project_simplex

    return Calls(project_simplex, one=project_simplex)


def our_cones() -> Calls:
    from difflayers.conic import Clarabel, SecondOrder, conic_program

    def call(**options: Any) -> Callable[..., Tensor]:
        def solve(F: Tensor, v: Tensor, r: Tensor) -> Tensor:
            n = v.shape[-1]
            A = torch.cat([F.new_zeros(1, n), -F])
            b = torch.cat([r[..., None], torch.zeros_like(v)], -1)
            eye = torch.eye(n, dtype=v.dtype)
            return conic_program(-v, A, b, [(SecondOrder(), n + 1)], eye, **options)

        return solve

    return Calls(call(), call(solver=Clarabel(max_steps=1)), one=call(), bad=call(on_failure="nan"))


def subjects() -> list[tuple[Problem, list[Contender]]]:
    closed = Contender(
        name="difflayers `project_simplex`",
        package=OURS,
        call="project_simplex(v, t)",
        build=our_simplex,
        tolerance=0,
        missing={"starved": "a closed form"},
    )
    cones = Contender(
        name="difflayers `conic_program`",
        package=OURS,
        call='conic_program(-v, A, b, [(SecondOrder(), 4)], P); bad: on_failure="nan"; '
        "starved: solver=Clarabel(max_steps=1)",
        build=our_cones,
        tolerance=1e-10,
    )
    return [
        (quadratic(), ours_first(program_contenders(quadratic_data) + cvxpy_contenders(cvxpy_quadratic))),
        (simplex(), ours_first([closed, *program_contenders(simplex_data), *cvxpy_contenders(cvxpy_simplex)])),
        (ellipsoid(), ours_first([cones, *cvxpy_contenders(cvxpy_ellipsoid, "cone")])),
    ]


def ours_first(contenders: list[Contender]) -> list[Contender]:
    return sorted(contenders, key=lambda contender: not contender.ours)
