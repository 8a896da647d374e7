"""Every operator of the catalogue against an oracle that shares nothing with it: values, derivatives, scales, kinks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jacrev, jvp

from difflayers import proximal
from tests.proximal.catalogue import MODELLED, ORACLES, ROWS, Row, X, solve_cvxpy

F64 = torch.float64
EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ids)


JUDGED = [r for r in ROWS if r.name in MODELLED]  # the others: brute force, and closed forms of nonconvex problems


@pytest.mark.parametrize("row", JUDGED, ids=lambda row: row.ids)
def test_oracle_is_that_of_cvxpy(row):
    expected = row.oracle(row.inputs)
    for i in range(2):
        found = solve_cvxpy(row.name, **{k: v[i] for k, v in row.inputs.items()}, **row.static)
        np.testing.assert_allclose(found, expected[i], atol=1e-7, rtol=0)


# ----------------------------------------------------------------------------------------------- values and derivatives


@EVERY
def test_value(row):
    found = row.call(**row.tensors())
    assert found.dtype == F64
    np.testing.assert_allclose(found.numpy(), row.oracle(row.inputs), atol=1e-7, rtol=0)


STEPS = np.array([0.25, 0.5, 1.0])
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {  # what sorts or branches, with the name of its number per element
    "prox_linf": ("t", {}),
    "prox_slope": ("t", {"weights": np.repeat(np.linspace(1.5, 0.5, 6), 2)}),
    "prox_tv1d": ("t", {"weights": np.ones(11)}),
    "prox_graph_tv": ("t", {"edges": np.stack([np.arange(12), np.arange(1, 13) % 12]), "weights": np.ones(12)}),
    "project_simplex": ("radius", {}),
    "project_l1_ball": ("radius", {}),
    "project_capped_simplex": ("total", {"upper": 0.5}),
    "project_isotonic": ("", {"decreasing": False, "weights": None}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_many_values_with_ties(name):
    number, options = LOOPS[name]
    x = np.round(2 * np.random.default_rng(6).standard_normal((30, 12))) / 2
    given = {number: np.tile(STEPS, 10)} if number else {}
    expected = [ORACLES[name](x=x[i], **{k: v[i] for k, v in given.items()}, **options) for i in range(30)]
    constants = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    numbers = {k: torch.from_numpy(v) for k, v in given.items()}
    found = getattr(proximal, name)(torch.from_numpy(x), **numbers, **constants)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-7, rtol=0)


def tangent(row: Row, name: str) -> dict[str, np.ndarray]:
    """A direction in one input, or in those that move together."""
    seed = 100 + sorted(row.inputs).index(name)
    names = row.together if name in row.together else (name,)
    moves = {k: np.random.default_rng(seed + len(k)).standard_normal(row.inputs[k].shape) for k in names}
    if (row.name, name) == ("project_spectral_box", "x") or name == "Q":
        moves = {k: (v + v.transpose(0, 2, 1)) / 2 for k, v in moves.items()}
    if row.name == "prox_slope" and name == "weights":
        moves = {k: -np.sort(-v, axis=1) for k, v in moves.items()}
    if row.name == "project_transport" and name in row.together:
        moves["a"] -= moves["a"].mean(1, keepdims=True)
        moves["b"] -= moves["b"].mean(1, keepdims=True)
    return moves


def slope_of(row: Row, moves: dict[str, np.ndarray]) -> np.ndarray:
    """Central differences of fourth order of the oracle, at two lengths that must agree."""

    def at(s):
        return row.oracle(row.inputs | {k: row.inputs[k] + s * v for k, v in moves.items()})

    found = []
    for h in (1e-3, 2.5e-4):
        found.append((8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h))
    scale = max(1, np.abs(found[0]).max())
    assert np.abs(found[0] - found[1]).max() < 3e-7 * scale, "the oracle has a kink here: choose another point"
    return found[1]


@EVERY
def test_derivative_in_every_input(row):
    tensors = row.tensors()
    for name in row.inputs:
        moves = tangent(row, name)
        expected = slope_of(row, moves)
        at = {k: tensors[k] for k in moves}
        along = {k: torch.from_numpy(v) for k, v in moves.items()}
        _, found = jvp(lambda moved: row.call(**(tensors | moved)), (at,), (along,))
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6 * scale, rtol=0, err_msg=f"jvp in {name}")
        leaves = {k: v.clone().requires_grad_() for k, v in at.items()}
        z = row.call(**(tensors | leaves))
        w = torch.from_numpy(np.random.default_rng(5).standard_normal(z.shape))
        if not z.requires_grad:
            assert np.abs(expected).max() < 1e-9, f"no gradient in {name}"
            continue
        grads = torch.autograd.grad((z * w).sum(), list(leaves.values()), allow_unused=True)
        product = sum((g * v).sum() for g, v in zip(grads, along.values(), strict=True) if g is not None)
        want = float((torch.from_numpy(expected) * w).sum())
        assert abs(float(product) - want) <= 1e-6 * scale * w.abs().sum(), f"vjp in {name}"


# ------------------------------------------------------------------------------------------------------------ structure


def jacobian(row: Row, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, value and Jacobian in x of one element."""
    tensors = row.tensors()

    def one(x):
        return row.call(**(tensors | {"x": torch.stack([x if j == i else tensors["x"][j] for j in range(2)])}))[i]

    x = tensors["x"][i]
    J = jacrev(one)(x)
    return x, one(x), J.reshape(x.numel(), x.numel())


@EVERY
def test_jacobian_is_symmetric_positive_semidefinite_and_a_contraction(row):
    for i in range(2):
        x, _, J = jacobian(row, i)
        if row.name == "project_isotonic" and "weights" in row.inputs:
            w = torch.from_numpy(row.inputs["weights"][i]).sqrt()
            J = w[:, None] * J / w  # symmetric in the weighted metric
        if row.name == "soft_topk":
            J = row.inputs["temperature"][i] * J  # a projection of x / temperature
        if row.name == "project_spectral_box":
            n = x.shape[0]
            swap = torch.eye(n * n, dtype=F64).reshape(n, n, n, n).transpose(0, 1).reshape(n * n, n * n)
            half = (torch.eye(n * n, dtype=F64) + swap) / 2
            J = half @ J @ half  # on symmetric matrices
        torch.testing.assert_close(J, J.mT, atol=1e-8, rtol=0)
        spectrum = torch.linalg.eigvalsh((J + J.mT) / 2)
        assert spectrum.min() > -1e-8
        if row.convex:
            assert spectrum.max() < 1 + 1e-8


@pytest.mark.parametrize("row", [r for r in ROWS if r.is_prox and r.name != "conjugate_prox"], ids=lambda row: row.ids)
def test_derivative_in_the_step_follows_from_that_in_x(row):
    tensors = row.tensors()
    _, dz = jvp(lambda t: row.call(**(tensors | {"t": t})), (tensors["t"],), (torch.ones(2, dtype=F64),))
    for i in range(2):
        x, z, J = jacobian(row, i)
        expected = -(J @ (x - z).flatten()) / tensors["t"][i]
        torch.testing.assert_close(dz[i].flatten(), expected, atol=1e-8, rtol=1e-8)


# ------------------------------------------------------------------------------------------------ scales, ties, no step


@pytest.mark.parametrize("scale", [1e9, 1e-9])
@pytest.mark.parametrize("row", [r for r in ROWS if r.degrees], ids=lambda row: row.ids)
def test_scale(row, scale):
    tensors = row.tensors()
    scaled = {k: v * scale ** row.degrees.get(k, 0) for k, v in tensors.items()}
    expected = torch.from_numpy(row.oracle(row.inputs))
    found = row.call(**scaled) / scale**row.out
    size = expected.abs().max().clamp_min(1e-12)
    torch.testing.assert_close(found / size, expected / size, atol=1e-7, rtol=0)
    moves = {"x": torch.from_numpy(tangent(row, "x")["x"])}
    expected_slope = jvp(lambda x: row.call(**(tensors | {"x": x})), (tensors["x"],), (moves["x"],))[1]
    slope = jvp(lambda x: row.call(**(scaled | {"x": x})), (scaled["x"],), (moves["x"],))[1]
    slope = slope * scale ** (1 - row.out)
    torch.testing.assert_close(slope, expected_slope, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("t", [1e-9, 1e-3, 1e3, 1e9])
def test_conjugate_is_right_at_every_step(t):
    x = torch.from_numpy(X)
    for name, expected in (("prox_l1", np.clip(X, -1, 1)), ("prox_squared_l2", X / (1 + t))):
        found = proximal.conjugate_prox(getattr(proximal, name), x, t)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-15 if t < 1 else 1e-7 / t + 1e-12)


def flat_jacobian(name: str, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The Jacobian in x as a matrix."""
    return jacrev(lambda x: getattr(proximal, name)(x, **options))(x).reshape(x.numel(), x.numel())


def vec(*values: float) -> torch.Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=F64)


def block(*sizes: int) -> torch.Tensor:
    """Averages over blocks."""
    return torch.block_diag(*(torch.full((k, k), 1 / k, dtype=F64) for k in sizes))


EYE2 = torch.eye(2, dtype=F64)
KINKS: list[tuple[str, torch.Tensor, dict[str, Any], torch.Tensor, torch.Tensor]] = [
    ("prox_l1", vec(1, -1, 0, 2), {"t": 1.0}, vec(0, 0, 0, 1), torch.diag(vec(0, 0, 0, 1))),
    ("prox_l2", vec(3, 4), {"t": 5.0}, vec(0, 0), 0 * EYE2),
    ("prox_l2", vec(0, 0), {"t": 1.0}, vec(0, 0), 0 * EYE2),
    ("prox_linf", vec(2, 2, 1), {"t": 1.0}, vec(1.5, 1.5, 1), block(2, 1)),
    ("prox_linf", vec(1, -1), {"t": 2.0}, vec(0, 0), 0 * EYE2),
    ("prox_linf", vec(0, 0), {"t": 2.0}, vec(0, 0), 0 * EYE2),
    ("prox_l0", vec(2, -2, 3), {"t": 2.0}, vec(0, 0, 3), torch.diag(vec(0, 0, 1))),
    ("prox_elastic_net", vec(1, 3), {"t": 1.0, "l1": 1.0, "l2": 1.0}, vec(0, 1), torch.diag(vec(0, 0.5))),
    ("prox_huber", vec(2, 3), {"t": 1.0, "delta": 1.0}, vec(1, 2), torch.diag(vec(0.5, 1))),
    ("prox_nonnegative_l1", vec(1, -1, 2), {"t": 1.0}, vec(0, 0, 1), torch.diag(vec(0, 0, 1))),
    ("prox_group_l2", vec(3, 4, 0, 0), {"t": 5.0, "groups": 2}, vec(0, 0, 0, 0), torch.zeros(4, 4, dtype=F64)),
    ("prox_hinge", vec(1, 0.5), {"t": 0.5, "labels": vec(1, 1)}, vec(1, 1), 0 * EYE2),
    (
        "prox_scad",
        vec(0.5, 1.5, 3, 4),
        {"t": 0.5, "lam": 1.0, "a": 3.0},
        vec(0, 1, 3, 4),
        torch.diag(vec(0, 1, 4 / 3, 1)),
    ),
    ("prox_mcp", vec(1, 3, 4), {"t": 1.0, "lam": 1.0, "gamma": 3.0}, vec(0, 3, 4), torch.diag(vec(0, 1.5, 1))),
    ("prox_tv1d", vec(1, 1, 1), {"t": 0.5}, vec(1, 1, 1), block(3)),
    ("prox_tv2d", torch.ones(2, 2, dtype=F64), {"t": 0.5}, torch.ones(2, 2, dtype=F64), block(4)),
    (
        "prox_nuclear",
        torch.zeros(2, 2, dtype=F64),
        {"t": 0.5},
        torch.zeros(2, 2, dtype=F64),
        torch.zeros(4, 4).double(),
    ),
    ("prox_spectral_l2", torch.zeros(2, 2, dtype=F64), {"t": 0.5}, 0 * EYE2, torch.zeros(4, 4, dtype=F64)),
    ("project_simplex", vec(1, 0, 0), {}, vec(1, 0, 0), torch.zeros(3, 3, dtype=F64)),
    ("project_simplex", vec(0, 0, 0), {}, vec(1 / 3, 1 / 3, 1 / 3), torch.eye(3, dtype=F64) - block(3)),
    (
        "project_capped_simplex",
        vec(1, 0, 0.4, 0.6),
        {"total": 2.0},
        vec(1, 0, 0.4, 0.6),
        torch.block_diag(torch.zeros(2, 2, dtype=F64), EYE2 - block(2)),
    ),
    ("project_l2_ball", vec(3, 4), {"radius": 5.0}, vec(3, 4), EYE2),
    ("project_linf_ball", vec(1, 0.5), {"radius": 1.0}, vec(1, 0.5), torch.diag(vec(0, 1))),
    ("project_box", vec(0, 1, 0.5), {"lower": 0.0, "upper": 1.0}, vec(0, 1, 0.5), torch.diag(vec(0, 0, 1))),
    ("project_nonnegative", vec(0, 1), {}, vec(0, 1), torch.diag(vec(0, 1))),
    ("project_isotonic", vec(1, 1, 2), {}, vec(1, 1, 2), block(2, 1)),
]


@pytest.mark.parametrize(
    ("name", "x", "options", "value", "slopes"), KINKS, ids=[f"{k[0]}-{i}" for i, k in enumerate(KINKS)]
)
def test_kink_convention(name, x, options, value, slopes):
    torch.testing.assert_close(getattr(proximal, name)(x, **options), value, atol=1e-12, rtol=0)
    torch.testing.assert_close(flat_jacobian(name, x, options), slopes, atol=1e-10, rtol=0)


def test_bounds_of_a_box_share_the_derivative_with_x():
    x, lower, upper = vec(0, 1, 0.5, -1, 2), torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64)
    parts = jacrev(proximal.project_box, argnums=(0, 1, 2))(x, lower, upper)
    torch.testing.assert_close(sum(parts), torch.eye(5, dtype=F64))
    torch.testing.assert_close(parts[1].diagonal(), vec(1, 0, 0, 1, 0))


H = torch.tensor([[0.3, -1.2], [0.7, 0.4]], dtype=F64)


def test_matrix_operators_at_repeated_singular_values():
    S, K = (H + H.mT) / 2, (H - H.mT) / 2
    z, dz = jvp(lambda X: proximal.prox_nuclear(X, 0.5), (2 * EYE2,), (H,))
    torch.testing.assert_close(z, 1.5 * EYE2)
    torch.testing.assert_close(dz, S + 0.75 * K)
    z, dz = jvp(proximal.project_stiefel, (2 * EYE2,), (H,))
    torch.testing.assert_close(z, EYE2)
    torch.testing.assert_close(dz, 0.5 * K)
    z, dz = jvp(
        lambda X: proximal.project_spectral_box(X, 0.0, 5.0), (torch.diag(vec(0, 1)),), (torch.diag(vec(1, 1)),)
    )
    torch.testing.assert_close(z, torch.diag(vec(0, 1)))
    torch.testing.assert_close(dz, torch.diag(vec(0, 1)), msg="an eigenvalue at its bound stays there")


@pytest.mark.parametrize("row", [r for r in ROWS if r.is_prox and r.name != "conjugate_prox"], ids=lambda row: row.ids)
def test_no_step_is_a_projection_on_the_domain(row):
    tensors = row.tensors()
    tensors["t"] = torch.zeros(2, dtype=F64)
    leaf = tensors["x"].clone().requires_grad_()
    z = row.call(**(tensors | {"x": leaf}))
    bounded = row.name in ("prox_nonnegative_l1", "prox_entropy", "prox_poisson")
    expected = tensors["x"].clamp_min(0) if bounded else tensors["x"]
    torch.testing.assert_close(z.detach(), expected, atol=1e-12, rtol=1e-12)
    (slope,) = torch.autograd.grad(z.sum(), leaf)
    assert bool(torch.isfinite(slope).all())


# ------------------------------------------------------------------------------------------------ what may be passed in


def first_of_each() -> list[Row]:
    """One row an operator."""
    return list({row.name: row for row in reversed(ROWS)}.values())[::-1]


EACH = pytest.mark.parametrize("row", first_of_each(), ids=lambda row: row.name)


@EACH
def test_dtypes(row):
    tensors = row.tensors()
    single = row.call(**{k: v.float() for k, v in tensors.items()})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), row.call(**tensors), atol=2e-4, rtol=2e-4)
    for bad in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=r"^x: "):
            row.call(**(tensors | {"x": tensors["x"].to(bad)}))


@pytest.mark.parametrize("row", [r for r in first_of_each() if r.is_prox], ids=lambda row: row.name)
def test_steps(row):
    tensors = row.tensors()
    for bad in (-tensors["t"], torch.tensor([0.5, float("nan")], dtype=F64), -1.0):
        with pytest.raises(ValueError, match=r"^t: "):
            row.call(**(tensors | {"t": bad}))
    with pytest.raises(ValueError, match=r"^t: "):
        row.call(**(tensors | {"t": torch.ones(3, dtype=F64)}))
    both = row.call(**tensors)
    stacked = {k: v.unsqueeze(0) for k, v in tensors.items()} | {"t": tensors["t"]}
    torch.testing.assert_close(row.call(**stacked), both.unsqueeze(0))
    stacked["t"] = tensors["t"].unsqueeze(-1)  # (2, 1) against a batch of (1, 2) widens it
    with pytest.raises(ValueError, match=r"^t: "):
        row.call(**stacked)
    number = row.call(**(tensors | {"t": float(tensors["t"][0])}))
    torch.testing.assert_close(number[0], both[0])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("prox_l1", {"t": 1.0, "weights": -1.0}, "weights"),
        ("prox_elastic_net", {"t": 1.0, "l1": -1.0, "l2": 1.0}, "l1"),
        ("prox_elastic_net", {"t": 1.0, "l1": 1.0, "l2": -1.0}, "l2"),
        ("prox_huber", {"t": 1.0, "delta": -1.0}, "delta"),
        ("prox_log", {"t": 1.0, "eps": -1.0}, "eps"),
        ("prox_poisson", {"t": 1.0, "counts": -1.0}, "counts"),
        ("prox_scad", {"t": 3.0, "lam": 1.0, "a": 3.0}, "a"),
        ("prox_mcp", {"t": 3.0, "lam": 1.0, "gamma": 2.0}, "gamma"),
        ("project_simplex", {"radius": -1.0}, "radius"),
        ("project_capped_simplex", {"total": 10.0}, "total"),
        ("project_capped_simplex", {"total": -1.0}, "total"),
        ("project_l1_ball", {"radius": -1.0}, "radius"),
        ("project_l2_ball", {"radius": -1.0}, "radius"),
        ("project_linf_ball", {"radius": -1.0}, "radius"),
        ("project_box", {"lower": 1.0, "upper": 0.0}, "lower|upper"),
    ],
)
def test_empty_sets_and_wrong_parameters(name, options, match):
    with pytest.raises(ValueError, match=rf"^({match}): "):
        getattr(proximal, name)(torch.from_numpy(X), **options)


def test_conjugate_of_what_is_not_convex():
    with pytest.raises(ValueError, match=r"^prox: "):
        proximal.conjugate_prox(proximal.prox_l0, torch.from_numpy(X), 1.0)


VECTORS = [
    r
    for r in first_of_each()
    if r.inputs["x"].ndim == 2
    and set(r.inputs) <= {"x", "t", "radius", "total"}
    and r.name != "conjugate_prox"
    and "labels" not in r.static
]


@pytest.mark.parametrize("row", VECTORS, ids=lambda row: row.name)
def test_dimension_of_the_vectors(row):
    tensors = row.tensors()
    function, x = getattr(proximal, row.name), tensors.pop("x")
    expected = function(x, **tensors, **row.static)
    torch.testing.assert_close(function(x.mT, **tensors, **row.static, dim=0).mT, expected)


def test_soft_topk_becomes_top_k():
    x = torch.from_numpy(X)
    hard_choice = torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0)
    torch.testing.assert_close(proximal.soft_topk(x, 2, temperature=1e-6), hard_choice)
    soft = proximal.soft_topk(x, 2, temperature=1.0)
    torch.testing.assert_close(soft.sum(-1), torch.full((2,), 2.0, dtype=F64))
    assert soft.min() >= 0 and soft.max() <= 1


def test_every_operator_has_a_row():
    made = {n for n in proximal.__all__ if n.startswith(("prox_", "project_", "conjugate_", "soft_"))}
    assert {n for n in made if not n.endswith("_ex")} - {"prox_of"} == {row.name for row in ROWS}
