"""ImplicitSGD against its update in numpy, autograd through unrolled training, and what it costs.

Oracles, written down before the code:

- The update with gradients of T4 by hand: T steps below, the truncated series, one step above; schedules that change
  from step to step; heavy-ball momentum on both levels as the formula of ``torch.optim.SGD`` says.
- From a lower solution, the derivative of T gradient steps by plain autograd equals the series of T terms, exactly.
- The point where x rests: with T large and a series of K terms, the zero of a linear function of x, by hand.
- Memory: the tensors that autograd holds at a time, and the numbers in the state.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from difflayers import SolveError, SolveWarning
from difflayers.bilevel import MFAC, Bilevel, ImplicitSGD, Linear, Power, minimize
from difflayers.implicit import Implicit, Neumann, OneStep, Unrolled
from difflayers.linalg import CG
from tests.bilevel.method_toys import STARTS, Quadratic, coupled, start, tensor

Q = Quadratic.random(3)
SGD = torch.optim.SGD


def series(q, rhs, step, terms):
    """step * sum_{j < terms} (1 - step H)^j rhs."""
    total, term = 0, step * rhs
    for _ in range(terms):
        total, term = total + term, term - step * q.H @ term
    return total


def hypergradient_by_hand(q, x, y, step, terms):
    return q.upper_x(x, y) + q.B.T @ series(q, q.upper_y(x, y), step, terms)  # J = -B^T


@pytest.mark.parametrize("own_step", [None, 0.7])
def test_updates_are_those_written_by_hand(own_step):
    gamma, rho = Power(0.2, -0.5), Linear(0.5, 1.0, 4)
    x, y = start(0, 3, 4)
    adjoint = Neumann(5, step=own_step) if own_step else None  # None: the step of the lower level, 20 terms
    algo = ImplicitSGD(Q.problem(), x, y, step=gamma, step_lower=rho, inner_steps=3, adjoint=adjoint)
    x, y = x.numpy(), y.numpy()
    for k in range(5):
        for _ in range(3):
            y = y - rho(k) * Q.lower_y(x, y)
        p = hypergradient_by_hand(Q, x, y, own_step or rho(k), 5 if own_step else 20)
        stats = algo.step()
        np.testing.assert_allclose(stats.upper, Q.upper_value(x, y), rtol=1e-12)
        np.testing.assert_allclose(stats.lower, Q.lower_value(x, y), rtol=1e-12)
        np.testing.assert_allclose(stats.infeasibility, np.linalg.norm(Q.lower_y(x, y)), rtol=1e-11)
        np.testing.assert_allclose(stats.stationarity, np.linalg.norm(p), rtol=1e-11)
        x = x - gamma(k) * p
        np.testing.assert_allclose(algo.x, x, rtol=1e-12)
        np.testing.assert_allclose(algo.y, y, rtol=1e-12)
        assert stats.gradients == (k + 1) * (3 + 2)
        assert stats.products == (k + 1) * ((5 if own_step else 20) + 1)  # one with J, one that measures the residual


def test_optimisers_of_torch_on_both_levels():
    x, y = start(0, 3, 4)
    algo = ImplicitSGD(
        Q.problem(project_upper=lambda x: x.clamp(-1, 1)), x, y, inner_steps=2, adjoint=Neumann(6, step=0.5),
        optimizer=partial(SGD, lr=0.1, momentum=0.9), optimizer_lower=partial(SGD, lr=0.3, momentum=0.5),
    )  # fmt: skip
    x, y = x.numpy(), y.numpy()
    m_x, m_y = None, None
    for _ in range(6):
        for _ in range(2):
            g = Q.lower_y(x, y)
            m_y = g if m_y is None else 0.5 * m_y + g
            y = y - 0.3 * m_y
        p = hypergradient_by_hand(Q, x, y, 0.5, 6)
        m_x = p if m_x is None else 0.9 * m_x + p
        x = np.clip(x - 0.1 * m_x, -1, 1)
        algo.step()
        np.testing.assert_allclose(algo.x, x, rtol=1e-12)
        np.testing.assert_allclose(algo.y, y, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_series_of_t_terms_is_the_derivative_of_t_steps_from_the_solution(steps):
    """A logistic lower problem, one ridge a weight; reverse mode through plain gradient steps."""
    r = np.random.default_rng(0)
    A, b, t = tensor(r.normal(size=(12, 4))), tensor(np.sign(r.normal(size=12))), tensor(r.normal(size=4))

    def lower(x, w, batch):
        return nn.functional.softplus(-b * (A @ w)).mean() + (x.exp() * w.square()).sum() / 2

    def upper(x, w, batch):
        return (w - t).square().sum() + x.square().sum() / 4

    x = tensor(0.3 * r.normal(size=4))
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(400):
        w = w - 0.4 * torch.func.grad(lower, argnums=1)(x, w, None)
    x_leaf = x.clone().requires_grad_()
    end = w
    for _ in range(steps):
        end = end - 0.4 * torch.func.grad(lower, argnums=1)(x_leaf, end, None)
    (wanted,) = torch.autograd.grad(upper(x_leaf, end, None), x_leaf)
    algo = ImplicitSGD(
        Bilevel(upper, lower), x, w, step=1.0, step_lower=0.4, inner_steps=1, adjoint=Neumann(steps, step=0.4)
    )
    algo.step()
    np.testing.assert_allclose(x - algo.x, wanted, rtol=1e-11)
    if steps == 1:
        other = ImplicitSGD(Bilevel(upper, lower), x, w, step=1.0, step_lower=0.4, adjoint=OneStep())
        other.step()
        # the series of one term with a step of 1
        np.testing.assert_allclose((x - other.x - x / 2) * 0.4, wanted - x / 2, rtol=1e-7)


@pytest.mark.parametrize("seed", STARTS)
def test_rests_where_the_truncated_series_does_and_at_the_optimum_without(seed):
    q = Quadratic.random()
    n = q.B.shape[1]
    for terms, adjoint in ((3, Neumann(3, step=0.9)), (None, Implicit(CG(rtol=1e-10)))):

        def gradient(x, terms=terms):
            y = np.linalg.solve(q.H, q.B @ x)
            return q.hypergradient(x) if terms is None else hypergradient_by_hand(q, x, y, 0.9, terms)

        zero = gradient(np.zeros(n))
        wanted = np.linalg.solve(np.stack([gradient(e) - zero for e in np.eye(n)], 1), -zero)
        algo = ImplicitSGD(q.problem(), *start(seed, 3, 4), step=0.3, step_lower=0.9, inner_steps=5, adjoint=adjoint)
        history = minimize(algo, 150, progress=False)
        np.testing.assert_allclose(algo.x, wanted, atol=1e-6)
        assert history.stationarity[-1] < 1e-6
    assert np.linalg.norm(wanted - q.optimum[0]) < 1e-10


def noisy(problem):
    return Bilevel(
        lambda x, y, b: problem.upper(x, y, None) + 0.1 * (y * b).sum(),
        lambda x, y, b: problem.lower(x, y, None) + 0.1 * (y * b).sum() * x.sum(),
    )


ADAM = {"optimizer": partial(torch.optim.Adam, lr=0.05), "optimizer_lower": partial(torch.optim.Adam, lr=0.02)}
OPTIONS = {
    "steps": {"step": Power(0.2, -0.5), "step_lower": 0.5},
    "optimisers": ADAM,
    "conjugate gradients": {"adjoint": Implicit(CG(rtol=1e-3), damping=0.1)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit(name):
    batches = [start(50 + k, 4, 4) for k in range(5)]

    def fresh(seed=0):
        return ImplicitSGD(noisy(Q.problem()), *start(seed, 3, 4), inner_steps=3, **OPTIONS[name])

    whole = fresh()
    wanted = [whole.step(*pair) for pair in batches]
    for stop in range(5):
        first = fresh()
        for pair in batches[:stop]:
            first.step(*pair)
        saved = first.state_dict()
        first.step(*batches[stop])  # what was saved is a copy
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        second = fresh(9)
        second.step(*batches[0])  # has a past of its own
        second.load_state_dict(torch.load(file, weights_only=True))
        assert [second.step(*pair) for pair in batches[stop:]] == wanted[stop:]
        assert torch.equal(second.x, whole.x) and torch.equal(second.y, whole.y) and second.counts == whole.counts


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_interrupted_inside_a_step_it_is_as_if_it_had_not_begun(name, level):
    p, left = Q.problem(), [10**9]

    def stopping(function):
        def run(x, y, batch):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(x, y, batch)

        return run

    functions = {"upper": p.upper, "lower": p.lower}
    functions[level] = stopping(functions[level])
    algo = ImplicitSGD(Bilevel(**functions), *start(0, 3, 4), inner_steps=3, **OPTIONS[name])
    twin = ImplicitSGD(p, *start(0, 3, 4), inner_steps=3, **OPTIONS[name])
    wanted = [twin.step() for _ in range(4)]
    algo.step()
    for k, after in enumerate((0, 2), start=1):
        if level == "upper" and after:
            continue
        left[0] = after
        with pytest.raises(KeyboardInterrupt):
            algo.step()
        left[0] = 10**9
        assert algo.step() == wanted[k]


def test_what_goes_wrong_is_said_and_undone():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    bad = Bilevel(
        lambda x, y, b: p.upper(x, y, None) + (torch.nan * y.sum() if b == "bad" else 0),
        lambda x, y, b: p.lower(x, y, None) + (torch.nan * y.sum() if b == "bad" else 0),
    )
    for options in (OPTIONS["steps"], OPTIONS["optimisers"]):
        for batches, message in ((("bad", None), "upper: gradient"), ((None, "bad"), "lower: gradient")):
            algo, twin = (ImplicitSGD(bad, x, y, **options) for _ in range(2))
            algo.step(), twin.step()
            before = algo.state_dict()["state"]
            with pytest.raises(ValueError, match=message):
                algo.step(*batches)
            assert all(torch.equal(algo.state[name], value) for name, value in before.items())
            assert algo.step() == twin.step()
    with pytest.warns(SolveWarning, match="ImplicitSGD"):
        ImplicitSGD(p, x, y, step_lower=0.1, adjoint=Neumann(5, step=3.0)).step()
    saddle = Bilevel(p.upper, lambda x, y, b: p.lower(x, y, b) - y.square().sum())
    with pytest.raises(SolveError, match="damping"):
        ImplicitSGD(saddle, x, y, step_lower=0.1, adjoint=Implicit(CG())).step()


def test_a_batch_for_every_lower_step():
    x, y = start(0, 3, 4)
    noise = [start(k, 4)[0] for k in range(3)]
    algo = ImplicitSGD(noisy(Q.problem()), x, y, step=0.1, step_lower=0.5, inner_steps=3, batch_per_step=True)
    algo.step(tensor(np.zeros(4)), noise)
    x, y = x.numpy(), y.numpy()
    for b in noise:
        y = y - 0.5 * (Q.lower_y(x, y) + 0.1 * x.sum() * b.numpy())
    np.testing.assert_allclose(algo.y, y, rtol=1e-12)
    adjoint = series(Q, Q.upper_y(x, y), 0.5, 20)
    p = Q.upper_x(x, y) + Q.B.T @ adjoint - 0.1 * (noise[-1].numpy() @ adjoint)  # J of the last batch
    np.testing.assert_allclose(algo.x, x - 0.1 * p, rtol=1e-11)
    with pytest.raises(ValueError, match="lower_batch: expected a sequence of 3 batches"):
        algo.step(None, noise[:2])


@pytest.mark.parametrize("sampled", [None, [2, 0]])
@pytest.mark.parametrize("adjoint", [Neumann(5, step=0.6), Implicit(CG(rtol=1e-12))])
def test_blocks_are_lower_problems_of_their_own(adjoint, sampled):
    """Three quadratics share x: p is the mean of theirs, and those that a step does not see stay as they are."""
    parts = [Quadratic.random(seed) for seed in (3, 4, 5)]
    data = [torch.stack([tensor(getattr(q, name)) for q in parts]) for name in ("H", "B", "A", "t")]
    rows = [0, 1, 2] if sampled is None else sampled

    def upper(x, y, batch):
        A, t = (m[rows] for m in batch[2:])
        return ((A @ y.unsqueeze(-1)).squeeze(-1) - t).square().sum(-1) / 2 + 0.15 * x.square().sum()

    def lower(x, y, batch):
        H, B = (m[rows] for m in batch[:2])
        return (y * ((H @ y.unsqueeze(-1)).squeeze(-1) / 2 - B @ x)).sum(-1)

    x, y = start(0, 3, 12)
    algo = ImplicitSGD(
        Bilevel(upper, lower, blocks=3), x, y.reshape(3, 4), step=0.2, step_lower=0.6, inner_steps=2, adjoint=adjoint
    )
    x, y = x.numpy(), y.reshape(3, 4).numpy().copy()
    for _ in range(3):
        p = []
        for i in rows:
            q = parts[i]
            for _ in range(2):
                y[i] = y[i] - 0.6 * q.lower_y(x, y[i])
            solved = np.linalg.solve(q.H, q.upper_y(x, y[i]))
            v = series(q, q.upper_y(x, y[i]), 0.6, 5) if isinstance(adjoint, Neumann) else solved
            p.append(q.upper_x(x, y[i]) + q.B.T @ v)
        x = x - 0.2 * np.mean(p, 0)
        algo.step(data, data, blocks=sampled)
        np.testing.assert_allclose(algo.x, x, rtol=1e-9)
        np.testing.assert_allclose(algo.y, y, rtol=1e-11)


def test_one_mask_for_the_products_and_a_new_one_for_every_lower_step():
    torch.manual_seed(0)
    ones = tensor(np.ones(200))

    def lower(x, y, batch):
        return (nn.functional.dropout(torch.ones_like(y), 0.5) * (y - x).square()).sum() / 4

    # every step with a mask of its own: the share of entries that no step of three has moved is an eighth
    algo = ImplicitSGD(Bilevel(lambda x, y, b: y.sum(), lower), 0 * ones, ones, step_lower=0.1, inner_steps=3)
    algo.step()
    assert 0.05 < float((algo.y == 1).double().mean()) < 0.2
    assert len(set(algo.y.tolist())) == 4
    # H and J see one mask: q = 1 / H where the mask is, so J q is -1 there and x moves by the step or not at all
    algo = ImplicitSGD(Bilevel(lambda x, y, b: y.sum(), lower), 0 * ones, ones, step=1.0, adjoint=Neumann(1, step=1.0))
    algo.step()
    assert set(algo.x.tolist()) == {0.0, -1.0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, t):
        return self.b(self.a(t).tanh())


def per_weight_problem():
    """One log decay for every weight of a network that has three times as many as it has samples."""
    torch.manual_seed(0)
    net = Net()
    decay = nn.ParameterList([nn.Parameter(torch.full_like(p, -6.0)) for p in net.parameters()])
    t = torch.randn(2, 12, 3)
    labels = (t[..., 0] + 0.5 * torch.randn(2, 12) > 0).long()

    def upper(x, y, batch):
        return nn.functional.cross_entropy(y(t[0]), labels[0])

    def lower(x, y, batch):
        ridge = sum((d.exp() * w.square()).sum() for d, w in zip(x, y.parameters(), strict=True))
        return nn.functional.cross_entropy(y(t[1]), labels[1]) + ridge / 2

    return Bilevel(upper, lower), decay, net


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_modules_are_trained_in_place_and_stay_in_float32():
    problem, decay, net = per_weight_problem()
    algo = ImplicitSGD(problem, decay, net, optimizer=partial(torch.optim.Adam, lr=0.1), step_lower=0.5, inner_steps=5)
    trained = ImplicitSGD(*per_weight_problem(), step=1e-9, step_lower=0.5, inner_steps=5)
    history, plain = (minimize(a, 60, progress=False) for a in (algo, trained))
    assert algo.x is decay and algo.y is net
    assert history.upper[-1] < plain.upper[-1] - 0.01
    assert all(p.grad is None and p.dtype == torch.float32 for p in [*decay, *net.parameters()])
    assert all(float((p.detach() + 4).abs().max()) > 0.1 for p in decay)


def held_bytes(**options) -> int:
    alive, most = [0], [0]

    class Kept:
        def __init__(self, t):
            self.t, self.bytes = t, t.numel() * t.element_size()
            alive[0] += self.bytes
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= self.bytes

    problem, decay, net = per_weight_problem()
    algo = ImplicitSGD(problem, decay, net, **options)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
        algo.step()
    return most[0]


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_memory_depends_neither_on_terms_nor_on_lower_steps():
    base = held_bytes(inner_steps=1, adjoint=Neumann(1, step=0.1))
    assert base == held_bytes(inner_steps=1, adjoint=Neumann(60, step=0.1)) > 0
    assert base == held_bytes(inner_steps=40, adjoint=Neumann(1, step=0.1))


def test_options_that_do_not_fit_are_named():
    p, (x, y) = Q.problem(), start(0, 3, 4)
    for options, message in (
        ({"step": "fast"}, "step: expected a number or a schedule"),
        ({"inner_steps": 0}, "inner_steps: expected an integer"),
        ({"step": 0.1, "optimizer": ADAM["optimizer"]}, "step: expected None next to an optimizer"),
        ({"optimizer_lower": lambda p: None}, "optimizer_lower: expected a function that returns a torch.optim"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: expected one that steps without a closure"),
        ({"adjoint": Unrolled(3)}, "adjoint: expected Neumann, Implicit or OneStep"),
        ({"adjoint": MFAC(3)}, "adjoint: expected Neumann, Implicit or OneStep"),
    ):
        with pytest.raises(ValueError, match=message):
            ImplicitSGD(p, x, y, **options)
    with pytest.raises(ValueError, match="constraint"):
        ImplicitSGD(coupled(2), tensor([0.0, 0.0]), (tensor([0.0, 0.0]), tensor([0.0, 0.0])))
    blocks = Bilevel(lambda x, y, b: y.sum(-1), lambda x, y, b: y.square().sum(-1) * x.sum(), blocks=2)
    with pytest.raises(ValueError, match="blocks: expected None next to an optimizer_lower"):
        ImplicitSGD(blocks, x, torch.stack([y, y]), optimizer_lower=ADAM["optimizer"]).step(blocks=[1])
    algo = ImplicitSGD(p, x, y, optimizer=ADAM["optimizer"])
    with pytest.raises(ValueError, match="optimizer"):
        algo.load_state_dict(ImplicitSGD(p, x, y).state_dict())
