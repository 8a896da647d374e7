"""Residual least squares against oracles written from the mathematics alone.

The oracles, in `oracle_least_squares`: Newton's method with fifty digits on hand-written
derivatives, its solutions differenced for derivatives of first and second order; the plain objective differentiated
twice by torch with a dense implicit function theorem, entry by entry; and scipy.optimize.least_squares. None of them
has seen the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor

from difflayers import SolveError, Status
from difflayers.implicit import GaussNewton
from difflayers.pde import (
    residual_least_squares,
    residual_least_squares_ex,
    residual_least_squares_value,
    safe_power,
)
from tests.pde.oracle_least_squares import F64, Data, Dense, Digits, Jet, Residual, deviation, leaves, numbers, randn

N, K = 9, 4


def heat(u: Tensor, p: Data) -> Tensor:
    return u[..., 1] - p["nu"] * u[..., 2] - p["f"]


def heat_jet(T: list[Any], p: dict[str, Any]) -> Jet:
    return [(T[1] - p["nu"] * T[2] - p["f"], [mp.mpf(0), mp.mpf(1), -p["nu"]], [[0] * 3] * 3)]


def burgers(u: Tensor, p: Data) -> Tensor:
    return u[..., 1] + u[..., 0] * u[..., 2] - p["nu"] * u[..., 2] - p["f"]


def burgers_jet(T: list[Any], p: dict[str, Any]) -> Jet:
    F = T[1] + T[0] * T[2] - p["nu"] * T[2] - p["f"]
    return [(F, [T[2], mp.mpf(1), T[0] - p["nu"]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]])]


def quartic(u: Tensor, p: Data) -> Tensor:
    return u[..., 0] ** 2 * u[..., 1] ** 2 + p["nu"] * u[..., 2] - p["f"]


def quartic_jet(T: list[Any], p: dict[str, Any]) -> Jet:
    a, b, c = T
    F = a**2 * b**2 + p["nu"] * c - p["f"]
    return [(F, [2 * a * b**2, 2 * a**2 * b, p["nu"]], [[2 * b**2, 4 * a * b, 0], [4 * a * b, 2 * a**2, 0], [0, 0, 0]])]


SHIFT = 0.01


def sorption(u: Tensor, p: Data) -> Tensor:
    return (1 + 2 * safe_power(u[..., 0], p["nu"] - 1, SHIFT)) * u[..., 1] - 0.3 * u[..., 2] - p["f"]


def sorption_jet(T: list[Any], p: dict[str, Any]) -> Jet:
    u, n = T[0], p["nu"] - 1
    base, slope = max(u, mp.mpf(0)) + mp.mpf(SHIFT), mp.mpf(1 if u > 0 else 0)
    R, R1, R2 = 1 + 2 * base**n, slope * 2 * n * base ** (n - 1), slope * 2 * n * (n - 1) * base ** (n - 2)
    F = R * T[1] - mp.mpf(0.3) * T[2] - p["f"]
    return [(F, [R1 * T[1], R, -mp.mpf(0.3)], [[R2 * T[1], R1, 0], [R1, 0, 0], [0, 0, 0]])]


def system(u: Tensor, p: Data) -> Tensor:
    return torch.stack([burgers(u, p), torch.sin(u[..., 0]) + u[..., 1] * u[..., 2] - 1], -1)


def system_jet(T: list[Any], p: dict[str, Any]) -> Jet:
    sine, cosine = mp.sin(T[0]), mp.cos(T[0])
    second = (sine + T[1] * T[2] - 1, [cosine, T[2], T[1]], [[-sine, 0, 0], [0, 0, 1], [0, 1, 0]])
    return [*burgers_jet(T, p), second]


EQUATIONS: dict[str, tuple[Residual, Callable[[list[Any], dict[str, Any]], Jet]]] = {
    "heat": (heat, heat_jet),
    "burgers": (burgers, burgers_jet),
    "quartic": (quartic, quartic_jet),
    "sorption": (sorption, sorption_jet),
    "system": (system, system_jet),
}
EVERYTHING = "offset weights A y t C d ridge center"


def problem(seed: int, parts: str = EVERYTHING) -> Data:
    """Data of a misfit that stays: nothing is solved exactly."""
    r = [randn(100 * seed + i, *shape) for i, shape in enumerate([(N, 3, K), (N,), (N, 3), (N,), (3, K), (3,), (3,)])]
    data = {"basis": r[0], "nu": torch.tensor(0.3, dtype=F64), "f": r[1]}
    more = {
        "offset": 0.5 * r[2] + 0.3,
        "weights": r[3].abs() + 0.5,
        "A": r[4],
        "y": r[5],
        "t": r[6].abs() + 0.3,
        "C": randn(100 * seed + 7, 2, K),
        "d": randn(100 * seed + 8, 2),
        "ridge": torch.tensor(0.2, dtype=F64),
        "center": randn(100 * seed + 9, K),
    }
    return data | {name: more[name] for name in parts.split()}


def ours(residual: Residual, data: Data, function: Callable[..., Any] = residual_least_squares, **options: Any) -> Any:
    rows = None
    if "A" in data:
        rows = (data["A"], data["y"], data["t"]) if "t" in data else (data["A"], data["y"])
    return function(
        data["basis"],
        residual,
        {name: value for name, value in data.items() if name not in Dense.OWN},
        offset=data.get("offset"),
        weights=data.get("weights"),
        rows=rows,
        equality=(data["C"], data["d"]) if "C" in data else None,
        ridge=data.get("ridge", 0.0),
        center=data.get("center"),
        **options,
    )


def cotangents(residual: Residual, data: Data, bar: Tensor, **options: Any) -> tuple[Tensor, Data]:
    x = leaves(data)
    w = ours(residual, x, **options)
    return w.detach(), dict(zip(x, torch.autograd.grad(w, list(x.values()), bar), strict=True))


# ------------------------------------------------------------------------------------------ values and all derivatives

CASES = [
    ("heat", "", 0),
    ("heat", "weights A y t", 1),
    ("heat", "offset C d", 2),
    ("heat", "ridge center", 3),
    ("heat", EVERYTHING, 4),
    ("burgers", "", 5),
    ("burgers", EVERYTHING, 6),
    ("quartic", "A y ridge center", 7),
    ("quartic", EVERYTHING, 8),
    ("sorption", "offset weights ridge", 13),
    ("sorption", EVERYTHING, 10),
    ("system", "C d", 11),
    ("system", EVERYTHING, 12),
]


@pytest.mark.parametrize(("name", "parts", "seed"), CASES)
def test_values_and_two_derivatives_match_fifty_digits(name: str, parts: str, seed: int) -> None:
    residual, jet = EQUATIONS[name]
    data = problem(seed, parts)
    solution = ours(residual, data, residual_least_squares_ex)
    assert int(solution.status) == Status.CONVERGED
    assert bool(solution.linear) == (name == "heat")
    oracle = Digits(jet, data)
    v = oracle.solve([*solution.value.tolist(), *solution.multipliers.tolist()])
    assert deviation(solution.value, numbers(v[:K])) < 1e-10
    assert deviation(solution.multipliers, numbers(v[K:])) < 1e-10

    bar = randn(seed + 50, K)
    directions = {k: randn(seed + 60 + i, *x.shape) for i, (k, x) in enumerate(data.items())}
    first, second = (numbers(oracle.along(v, directions, order)[:K]) for order in (1, 2))
    h = torch.zeros((), dtype=F64, requires_grad=True)
    w = ours(residual, {k: x + h * directions[k] for k, x in data.items()})
    (slope,) = torch.autograd.grad(w @ bar, h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, h)
    assert deviation(slope.detach(), first @ bar) < 1e-8
    assert deviation(curvature, second @ bar) < 1e-8
    _, forward = torch.func.jvp(lambda x: ours(residual, x), (data,), (directions,))
    assert deviation(forward, first) < 1e-8


@pytest.mark.parametrize(("name", "parts", "seed"), CASES)
def test_every_cotangent_matches_the_dense_implicit_function_theorem(name: str, parts: str, seed: int) -> None:
    residual, _ = EQUATIONS[name]
    data, bar = problem(seed, parts), randn(seed + 70, K)
    w, gradients = cotangents(residual, data, bar)
    oracle = Dense(residual, data)
    v = oracle.polish(w)
    assert deviation(w, v[:K]) < 1e-10
    null = oracle.null(w)
    assert torch.linalg.eigvalsh(null.T @ oracle.curvature(w) @ null)[0] > 0, "a minimum, not a saddle"
    for which, right in oracle.cotangents(v, bar).items():
        assert deviation(gradients[which], right) < 1e-8, which


@pytest.mark.parametrize(("name", "parts", "seed"), [CASES[i] for i in (4, 6, 10, 12)])
def test_the_smallest_value_and_its_gradient(name: str, parts: str, seed: int) -> None:
    """The envelope theorem, with the multipliers of the equalities."""
    residual, _ = EQUATIONS[name]
    data = problem(seed, parts)
    x = leaves(data)
    value = ours(residual, x, residual_least_squares_value)
    oracle = Dense(residual, data)
    v = oracle.polish(ours(residual, data))

    def lagrangian(data: Data) -> Tensor:
        return oracle.value(v[:K], data) + (v[K:] @ (data["C"] @ v[:K] - data["d"]) if "C" in data else 0)

    assert deviation(value, lagrangian(data)) < 1e-12
    gradients = torch.autograd.grad(value, list(x.values()))
    for which, right in zip(gradients, torch.func.grad(lagrangian)(data).values(), strict=True):
        assert deviation(which, right) < 1e-10


def test_linear_cotangents_are_the_closed_forms() -> None:
    """numpy's closed form of section 1.3, with extended precision in the products."""
    data, bar = problem(20, "weights ridge center"), randn(1, K)
    w, gradients = cotangents(heat, data, bar)
    A = data["basis"][:, 1] - data["nu"] * data["basis"][:, 2]
    s2, ridge = data["weights"] ** 2, data["ridge"]
    H = A.T @ (s2[:, None] * A) + ridge * torch.eye(K, dtype=F64)
    right = torch.linalg.solve(H, A.T @ (s2 * data["f"]) + ridge * data["center"])
    z, r = torch.linalg.solve(H, bar), data["f"] - A @ right
    rows = s2[:, None] * (torch.outer(r, z) - torch.outer(A @ z, right))
    assert deviation(w, right) < 1e-12
    assert deviation(gradients["basis"][:, 1], rows) < 1e-11
    assert deviation(gradients["basis"][:, 2], -data["nu"] * rows) < 1e-11
    assert deviation(gradients["f"], s2 * (A @ z)) < 1e-11
    assert deviation(gradients["weights"], 2 * data["weights"] * r * (A @ z)) < 1e-11
    assert deviation(gradients["ridge"], -(z @ (right - data["center"]))) < 1e-11
    assert deviation(gradients["center"], ridge * z) < 1e-11


@pytest.mark.parametrize("name", ["heat", "burgers"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_of_the_basis_do_not_matter(name: str, scale: float) -> None:
    residual, _ = EQUATIONS[name]
    data, bar = problem(14, "offset weights"), randn(2, K)
    w, gradients = cotangents(residual, data, bar)
    moved, others = cotangents(residual, data | {"basis": scale * data["basis"]}, scale * bar)
    assert deviation(scale * moved, w) < 1e-10
    assert deviation(scale * others.pop("basis"), gradients.pop("basis")) < 1e-8
    assert all(deviation(others[k], gradients[k]) < 1e-8 for k in others)


@pytest.mark.parametrize("name", ["heat", "burgers", "system"])
@pytest.mark.parametrize("ridge", [1.0, 1e-6])
def test_duplicated_basis_functions_with_a_ridge(name: str, ridge: float) -> None:
    """Two equal columns: their coefficients are equal, and the derivatives of the field those of fifty digits. Those of
    the coefficients apart from the field are 1/ridge times less well determined."""
    residual, jet = EQUATIONS[name]
    data = problem(15, "offset weights A y")
    data["basis"], data["A"] = data["basis"][..., [0, 1, 2, 0]], data["A"][:, [0, 1, 2, 0]]
    data["ridge"] = torch.tensor(ridge, dtype=F64)
    bar = data["basis"][0, 0] + data["basis"][3, 0]  # the field at two points
    w, gradients = cotangents(residual, data, bar)
    assert abs(w[0] - w[3]) < 1e-14 / ridge
    oracle = Digits(jet, data)
    v = oracle.solve(w.tolist())
    assert abs(bar @ (w - numbers(v))) < 1e-10
    for i, (which, mine) in enumerate(gradients.items()):
        direction = randn(80 + i, *data[which].shape)
        right = numbers(oracle.along(v, {which: direction})) @ bar
        assert torch.isfinite(mine).all()
        # a direction that tears the equal columns apart: an ulp of the data moves the exact derivative by 1e-8 as well
        tears = which in ("basis", "A")
        assert deviation((mine * direction).sum(), right) < (1e-10 + 1e-13 / ridge if tears else 1e-10), which
    _, sharp = cotangents(residual, data, torch.tensor([1.0, 0, 0, -1], dtype=F64))
    assert all(torch.isfinite(mine).all() for mine in sharp.values())


# ---------------------------------------------------------------------------------------------- what others would find


def test_gauss_newton_derivatives_are_off_by_more_than_14_per_cent() -> None:
    """The documented case: Burgers with a misfit of order one. The exact Hessian agrees with fifty digits."""
    data, bar = problem(6), randn(56, K)
    w, exact = cotangents(burgers, data, bar)
    _, biased = cotangents(burgers, data, bar, curvature=GaussNewton())
    oracle = Digits(burgers_jet, data)
    start = ours(burgers, data, residual_least_squares_ex)
    v = oracle.solve([*start.value.tolist(), *start.multipliers.tolist()])
    right = torch.stack([numbers(oracle.along(v, {"f": one})[:K]) @ bar for one in torch.eye(N, dtype=F64)])
    assert deviation(exact["f"], right) < 1e-8
    assert deviation(biased["f"], right) > 0.14  # here 0.26
    dense = Dense(burgers, data)
    theirs = dense.gauss_newton_cotangents(dense.polish(w), bar)
    assert deviation(biased["f"], theirs["f"]) < 1e-8, "the bias is that of the formula, and nothing else"


@pytest.mark.parametrize(("name", "seed"), [("burgers", 6), ("system", 12), ("sorption", 10), ("burgers", 16)])
def test_scipy_finds_no_lower_value_from_twenty_starts(name: str, seed: int) -> None:
    residual, _ = EQUATIONS[name]
    data = problem(seed)
    w = ours(residual, data)
    oracle = Dense(residual, data)
    mine = float(oracle.value(w, data))
    value = ours(residual, data, residual_least_squares_value)
    assert abs(float(value) / mine - 1) < 1e-12
    assert deviation(w, oracle.scipy(data["center"])) < 1e-6
    others = [float(oracle.value(oracle.scipy(2 * randn(500 + i, K)), data)) for i in range(20)]
    assert min(others) > mine * (1 - 1e-12)


def test_from_the_same_start_scipy_ends_in_the_same_local_minimum() -> None:
    """The quartic has several minima; Levenberg-Marquardt is local, and this says so."""
    data = problem(8, "A y t ridge")
    oracle = Dense(quartic, data)
    values = set()
    for i in range(6):
        start = randn(600 + i, K)
        w = ours(quartic, data, init=start)
        v = oracle.polish(w)
        assert deviation(w, v[:K]) < 1e-9
        assert torch.linalg.eigvalsh(oracle.curvature(w))[0] > 0
        values.add(round(float(oracle.value(w, data)), 8))
        near = oracle.scipy(w + 1e-4 * randn(700 + i, K))
        assert deviation(near, w) < 1e-6
    assert len(values) > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_heavy_row_is_nearly_an_equality(seed: int) -> None:
    """Row scales of 1 to a million, nonlinear: no early stop, and the answer of fifty digits."""
    data = problem(seed, "offset A y ridge")
    data["A"], data["y"] = data["A"][:1], data["y"][:1]
    heavy = data | {"t": torch.full((1,), 1e6, dtype=F64)}
    solution = ours(burgers, heavy, residual_least_squares_ex)
    assert int(solution.status) == Status.CONVERGED
    right = numbers(Digits(burgers_jet, heavy).solve(solution.value.tolist()))
    assert deviation(solution.value, right) < 1e-9
    exact = {k: x for k, x in data.items() if k not in ("A", "y")} | {"C": data["A"], "d": data["y"]}
    assert deviation(ours(burgers, exact, init=solution.value), right) < 1e-8


# -------------------------------------------------------------------------------------------------- elements of a batch


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")  # the sorption of element 1 stops at a kink
@pytest.mark.parametrize("name", sorted(EQUATIONS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_bad_element_changes_no_bit_of_the_others(name: str, value: float) -> None:
    residual, _ = EQUATIONS[name]
    each = [problem(seed) for seed in (6, 4, 12)]
    data = {k: torch.stack([one[k] for one in each]) for k in each[0]} | {"nu": torch.tensor(0.3, dtype=F64)}
    bar = randn(4, 3, K)
    bar[1] = 0
    w, gradients = cotangents(residual, data, bar, on_failure="nan")
    for which in ("basis", "f", "C", "A"):
        spoiled = {k: x.clone() for k, x in data.items()}
        spoiled[which][1].view(-1)[0] = value
        v, others = cotangents(residual, spoiled, bar, on_failure="nan")
        assert torch.equal(v[[0, 2]], w[[0, 2]])
        for k, mine in others.items():
            assert torch.equal(mine, gradients[k]) if k == "nu" else torch.equal(mine[[0, 2]], gradients[k][[0, 2]]), k


@pytest.mark.parametrize(
    ("residual", "options", "message"),
    [
        (lambda u, p: u[..., 1].sum(), {}, "residual output: expected shape"),
        (lambda u, p: u[..., :-1, 1], {}, "residual output: expected shape"),
        (lambda u, p: u[..., 1] - u[..., 0].mean(), {}, "pointwise"),
        (lambda u, p: u[..., 1] - u[..., 0].roll(1, -1), {}, "pointwise"),
        (lambda u, p: u[..., 1] - p[..., None], {}, "pointwise"),
        (lambda u, p: u[..., 1] - p, {"ridge": -1.0}, "ridge"),
        (lambda u, p: u[..., 1] - p, {"weights": torch.ones(3, dtype=F64)}, "weights"),
        (lambda u, p: u[..., 1] - p, {"equality": (torch.eye(K, dtype=F64), torch.ones(K, dtype=F64))}, "C: expected"),
    ],
)
def test_bad_input_is_named(residual: Residual, options: dict[str, Any], message: str) -> None:
    data = problem(0)
    with pytest.raises(ValueError, match=message):
        residual_least_squares(data["basis"], residual, data["f"], **options)


def test_undeclared_terms_and_ambiguous_problems_are_refused() -> None:
    data = problem(0)
    terms = {"u": data["basis"][:, 0], "u_x": data["basis"][:, 1]}
    with pytest.raises(ValueError, match="u_t"):
        residual_least_squares(terms, lambda u, p: u["u_t"] - p, data["f"])
    rows = torch.cat([problem(0)["C"], problem(0)["C"][:1]])
    for d in (torch.zeros(3, dtype=F64), torch.arange(3, dtype=F64)):  # dependent, and contradictory
        with pytest.raises(SolveError, match="SINGULAR"):
            residual_least_squares(data["basis"], lambda u, p: u[..., 1] - p, data["f"], equality=(rows, d))
    with pytest.raises(SolveError, match="SINGULAR"):
        residual_least_squares(data["basis"][..., [0, 1, 1]], lambda u, p: u[..., 1] - p, data["f"])
    with pytest.raises(SolveError, match="SINGULAR"):
        residual_least_squares(data["basis"][:2], lambda u, p: u[..., 1] - p, data["f"][:2])
