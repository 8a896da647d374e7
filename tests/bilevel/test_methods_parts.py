"""The optional parts of a problem in methods: projections, blocks, and state that is no tensor.

Oracles: optima on paper. With blocks: each block's functions written out in numpy, block by block, gradients by hand.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from difflayers.bilevel import (
    BAMM,
    BOME,
    F2SA,
    GPBGD,
    LVHBA,
    MEHA,
    SOBA,
    VPBGD,
    Bilevel,
    Method,
    PenaltyMethod,
    minimize,
)
from difflayers.bilevel._method import Seen, norm
from tests.bilevel.method_toys import Quadratic, start, tensor

Q = Quadratic.random(3)
CALLABLES = ("prox_lower", "project_upper", "project_lower", "project_joint", "constraint")
TAKEN = {
    BAMM: {"project_upper"},
    BOME: {"project_upper"},
    F2SA: {"project_upper"},
    SOBA: {"project_upper"},
    MEHA: {"project_upper", "prox_lower", "project_lower"},
    PenaltyMethod: {"project_upper", "prox_lower", "project_lower"},
    VPBGD: {"project_upper", "prox_lower", "project_lower", "project_joint"},
    GPBGD: {"project_upper", "project_joint"},
    LVHBA: {"constraint", "project_joint", "project_lower"},
}


@pytest.mark.parametrize("method", TAKEN, ids=lambda m: m.__name__)
def test_what_a_method_does_not_take_is_refused_with_the_names_of_those_that_do(method):
    x, y = start(0, 3, 4)
    for part in CALLABLES:
        problem = Q.problem(**{part: lambda *args: args[0]})
        if part in TAKEN[method]:
            assert part in method.takes
            continue
        with pytest.raises(ValueError, match=f"{part}: expected None for {method.__name__}, got a function") as error:
            method(problem, x, y)
        for other, taken in TAKEN.items():
            assert (other.__name__ in str(error.value).split("taken by")[1]) == (part in taken)
    if method is not LVHBA:
        with pytest.raises(ValueError, match=f"blocks: expected None for {method.__name__}, got 3"):
            method(Q.problem(blocks=3), x, y)
        with pytest.raises(ValueError, match="blocks: expected None for a problem without blocks"):
            method(Q.problem(), x, y).step(blocks=[0])


def test_projection_of_the_lower_variables_depends_on_the_upper_ones():
    """y = argmin (y - 3)^2 / 2 over y <= x is min(x, 3); F = (y - 2)^2 / 2 + x^2 / 2 least at x = y = 1.

    MEHA's envelope: theta and y are in Y(x), so that F / c + f - v is descended along with x; from x > 3 the
    constraint is inactive, y = 3. The set moves with x, so only theta and y of a fixed x have a known place: x is held
    by its projection onto one point.
    """
    for fixed, best in ((1.0, 1.0), (5.0, 3.0)):
        problem = Bilevel(
            lambda x, y, b: ((y - 2).square() + x.square()).sum() / 2,
            lambda x, y, b: (y - 3).square().sum() / 2,
            project_upper=lambda x, at=fixed: torch.full_like(x, at),
            project_lower=lambda y, x: torch.minimum(y, x),
        )
        algo = MEHA(problem, tensor([fixed]), tensor([-4.0]), penalty=1e6)
        for _ in range(300):
            algo.step()
        np.testing.assert_allclose(algo.state["theta"], [best], atol=1e-5)
        np.testing.assert_allclose(algo.y, [best], atol=1e-5)


@pytest.mark.parametrize("method", [VPBGD, GPBGD])
def test_joint_projection(method):
    """F = (x - 2)^2 / 2 + (y - 2)^2 / 2, f = (y - x)^2 / 2 in the disc x^2 + y^2 <= 2: x = y = 1, for any penalty."""

    def onto(x, y):
        size = (x.square() + y.square()).sum().sqrt()
        shrink = torch.where(size > 2**0.5, 2**0.5 / size, 1)
        return x * shrink, y * shrink

    problem = Bilevel(
        lambda x, y, b: ((y - 2).square() + (x - 2).square()).sum() / 2,
        lambda x, y, b: (y - x).square().sum() / 2,
        project_joint=onto,
    )
    algo = method(problem, tensor([0.3]), tensor([-1.0]), penalty=3.0)
    for _ in range(1000):
        algo.step()
        assert float(algo.x.square() + algo.y.square()) <= 2 + 1e-12
    np.testing.assert_allclose([float(algo.x), float(algo.y)], 1, atol=1e-8)
    with pytest.raises(ValueError, match="ratio: expected 1 with project_joint"):
        method(problem, tensor([0.3]), tensor([-1.0]), ratio=2.0)
    with pytest.raises(ValueError, match="project_joint output: expected a pair"):
        method(Q.problem(project_joint=lambda x, y: x), *start(0, 3, 4)).step()


class Rows(Method):
    """One gradient step of the sampled blocks and of x along the mean of their hypergradients, adjoints alike."""

    takes = frozenset({"blocks"})

    def __init__(self, problem, x, y, fail_at=None):
        super().__init__(problem, x, y)
        self.state["q"] = torch.zeros_like(self.state["y"])
        self.plain.update(rate=0.1, history=[], fail_at=fail_at)

    def _update(self, at, k):
        x, y, q = self.state["x"], self.state["y"][at.rows], self.state["q"][at.rows]
        upper, lower, (_, slope) = at.upper(x, y), at.lower(x, y), at.slope(x, y)
        assert torch.equal(lower.y, slope.value) and torch.equal(at.lower_in_x(x, y), lower.x)
        self.plain["rate"] *= 0.9
        self.plain["history"].append(float(upper.value))
        if k == self.plain["fail_at"]:
            raise KeyboardInterrupt
        rate = self.plain["rate"]
        new = {"y": y - rate * lower.y, "q": q - rate * (slope.pull(q) - upper.y)}
        for name, rows in new.items():
            self.state[name] = at.put(self.state[name], rows)
        direction = upper.x - slope.cross(q)
        self.state["x"] = x - rate * direction
        return Seen(upper.value, lower.value, norm(direction), norm(lower.y))


def blocks_problem(m=3):
    """Blocks of unlike curvature; y is a pair of tensors (m, 2) and (m,)."""
    c = torch.arange(1.0, m + 1, dtype=torch.float64)

    def upper(x, y, batch):
        c_ = c if batch is None else c[batch]
        return ((y[0] - 1).square().sum(-1) + c_ * y[1].square()) / 2 + x.square().sum() * c_

    def lower(x, y, batch):
        c_ = c if batch is None else c[batch]
        return c_ * y[0].square().sum(-1) / 2 - y[0] @ x + (y[1] - c_ * x[0]).square()

    return Bilevel(upper, lower, blocks=m)


def by_hand(x, y, q, i, c):
    """Gradients of block i: of F in (x, y), of f in y, H q and J q; y and q are (first, second, third) numbers."""
    upper_y = np.array([y[0] - 1, y[1] - 1, c * y[2]])
    lower_y = np.array([c * y[0] - x[0], c * y[1] - x[1], 2 * (y[2] - c * x[0])])
    return 2 * c * x, upper_y, lower_y, np.array([c, c, 2.0]) * q, np.array([-q[0] - 2 * c * q[2], -q[1]])


def test_blocks_are_sampled_and_seen_by_row():
    x, y = tensor([0.5, -1.0]), (tensor(np.arange(6).reshape(3, 2) / 4), tensor([1.0, -1.0, 0.5]))
    algo = Rows(blocks_problem(), x, y)
    xn, rows = x.numpy(), np.concatenate([y[0].numpy(), y[1].numpy()[:, None]], 1)
    np.testing.assert_array_equal(algo.state["y"], rows)
    qn, rate = np.zeros((3, 3)), 0.1
    for index in [None, [2, 0], None, torch.tensor([1])]:
        algo.step(index, index, blocks=index)
        rate *= 0.9
        seen = range(3) if index is None else [int(i) for i in index]
        parts = {i: by_hand(xn, rows[i], qn[i], i, i + 1.0) for i in seen}
        xn = xn - rate * np.mean([p[0] - p[4] for p in parts.values()], 0)
        for i, (_, upper_y, lower_y, bend, _) in parts.items():
            rows[i], qn[i] = rows[i] - rate * lower_y, qn[i] - rate * (bend - upper_y)
        np.testing.assert_allclose(algo.x, xn, rtol=1e-13)
        np.testing.assert_allclose(algo.state["y"], rows, rtol=1e-13)
        np.testing.assert_allclose(algo.state["q"], qn, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(algo.y[0], rows[:, :2])
    np.testing.assert_allclose(algo.y[1], rows[:, 2])


def test_minimize_samples_blocks():
    index = [torch.tensor([2, 0]), torch.tensor([1])]
    x, y = tensor([0.5, -1.0]), (tensor(np.arange(6).reshape(3, 2) / 4), tensor([1.0, -1.0, 0.5]))
    run, hand = Rows(blocks_problem(), x, y), Rows(blocks_problem(), x, y)
    minimize(run, 5, upper_batches=index, lower_batches=index, blocks=index, progress=False)
    for k in range(5):
        hand.step(index[k % 2], index[k % 2], blocks=index[k % 2])
    assert all(torch.equal(value, hand.state[name]) for name, value in run.state.items())
    with pytest.raises(ValueError, match="blocks: expected an iterable of batches, got a tensor"):
        minimize(run, 5, blocks=index[0], progress=False)


@pytest.mark.parametrize("method", [m for m in TAKEN if m is not LVHBA], ids=lambda m: m.__name__)
def test_a_step_does_not_depend_on_the_gradient_mode(method):
    algo, other = (method(Q.problem(), *start(0, 3, 4)) for _ in range(2))
    for _ in range(2):
        algo.step()
        with torch.no_grad():
            other.step()
    assert all(torch.equal(value, other.state[name]) for name, value in algo.state.items())
    frozen = Bilevel(lambda x, y, b: (x.sum() + y.sum()).detach(), Q.problem().lower)
    with pytest.raises(ValueError, match="upper: expected a differentiable function"):
        method(frozen, *start(0, 3, 4)).step()


def test_bad_blocks_are_named():
    x, y = tensor([0.5, -1.0]), (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    algo = Rows(blocks_problem(), x, y)
    for bad in ([0, 0], [3], [-1], [], [0.5], [True, False, False], [[0]]):
        with pytest.raises(ValueError, match="blocks: expected"):
            algo.step(blocks=bad)
    with pytest.raises(ValueError, match=r"y\[1\]: expected shape \(3, ...\)"):
        Rows(blocks_problem(), x, (y[0], y[1][:2]))
    with pytest.raises(ValueError, match="y: expected a tensor or a pytree of tensors with blocks, got Linear"):
        Rows(blocks_problem(), x, torch.nn.Linear(2, 2, dtype=torch.float64))
    problem = blocks_problem()
    with pytest.raises(ValueError, match=r"lower output: expected shape \(3,\), one number a block"):
        Rows(Bilevel(problem.upper, lambda x, y, b: problem.lower(x, y, b).sum(), blocks=3), x, y).step()
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="blocks: expected None or an integer of at least 1"):
            Bilevel(problem.upper, problem.lower, blocks=bad)


def test_plain_state_is_saved_to_the_last_bit_and_rolled_back():
    x, y = tensor([0.5, -1.0]), (tensor(np.arange(6).reshape(3, 2) / 4), tensor([1.0, -1.0, 0.5]))
    algo = Rows(blocks_problem(), x, y, fail_at=3)
    for _ in range(3):
        algo.step()
    file = io.BytesIO()
    torch.save(algo.state_dict(), file)
    before = algo.state_dict()
    with pytest.raises(KeyboardInterrupt):
        algo.step()
    assert algo.plain == before["plain"] and algo.plain["rate"] == 0.1 * 0.9 * 0.9 * 0.9 and algo.steps == 3
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Rows(blocks_problem(), x, y)
    again.load_state_dict(saved)
    saved["plain"]["history"].append(0.0)  # ours is a copy
    for method in (algo, again):
        method.plain["fail_at"] = None
        method.step()
    assert again.plain == algo.plain and len(again.plain["history"]) == 4
    assert all(torch.equal(value, again.state[name]) for name, value in algo.state.items())
    del saved["plain"]["rate"]
    with pytest.raises(ValueError, match="state_dict: expected values of"):
        again.load_state_dict(saved)


def test_parts_that_exclude_each_other():
    for first, second, said in (
        ("prox_lower", "constraint", "a constraint"),
        ("prox_lower", "project_lower", "project_lower"),
        ("prox_lower", "project_joint", "project_joint"),
        ("project_upper", "project_joint", "project_joint"),
    ):
        with pytest.raises(ValueError, match=f"{first}: expected None next to {said}"):
            Q.problem(**{first: lambda *a: a[0], second: lambda *a: a[0]})
    for part in CALLABLES:
        with pytest.raises(ValueError, match=f"{part}: expected a callable, got int"):
            Q.problem(**{part: 3})
    with pytest.raises(ValueError, match=r"group: expected None or a process group of torch.distributed, got str"):
        Q.problem(group="gloo")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: 1.0, "project_upper output: expected shape \\(2,\\) as x has, got float"),
        (lambda x: x[:1], "project_upper output: expected shape \\(2,\\) as x has, got \\(1,\\)"),
        (lambda x: (x, x), "project_upper output: expected the structure of x"),
    ],
)
def test_what_a_projection_returns_is_checked(returned, message):
    problem = Bilevel(lambda x, y, b: y.sum() ** 2, lambda x, y, b: (y - x).square().sum(), project_upper=returned)
    with pytest.raises(ValueError, match=message):
        SOBA(problem, torch.zeros(2), torch.zeros(2)).step()
    bad_module = Bilevel(problem.upper, lambda x, y, b: (y - x.weight).square().sum(), project_upper=lambda x: [])
    with pytest.raises(ValueError, match=r"expected a dict of \['weight'\] as x has, got list"):
        SOBA(bad_module, torch.nn.Linear(1, 1, bias=False), torch.zeros(1)).step()
