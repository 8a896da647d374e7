"""Bloop: the direction of two losses, and where it leads.

Oracles, written down before the code:

- the formula in numpy for a sequence of random gradients, the average taken before it hears of the new gradient;
- the auxiliary part of the direction is orthogonal to that average, whatever the network, batches and weights;
- main = (a'w - b)^2 / 2, aux = |w - c|^2 / 2 and gradient steps of length eta: from the second step on the average is a
  multiple of a, so the component along a contracts by 1 - eta |a|^2 and every other one by 1 - eta weight, a step: the
  point of the line a'w = b next to c is met to exactly what is left of these powers. The weighted sum ends at
  (a a' + weight) w = a b + weight c;
- main = |A w - b|^2 / 2 of rank two: components off the rows of A contract by 1 - eta weight_k exactly (the average is
  in the row space from the second step on). Those in it obey e+ = (1 - eta H) e - eta weight r, where r is a projection
  of the gradient of aux, hence no longer: |e| <= (1 - eta h)^k |e_1| + weight sup |r| / h for a constant weight, h the
  least nonzero eigenvalue;
- the direction is linear in both gradients while the average stands still, so micro-batches sum up to the whole.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from difflayers.bilevel import Bloop, Power
from tests.bilevel.method_toys import STARTS, start, tensor


def by_hand(gradients, weights, rho):
    """Directions for pairs of gradients, numpy; `weights` one number an entry."""
    average, directions = np.zeros_like(gradients[0][0]), []
    for main, aux in gradients:
        scale = average @ (weights * average)
        share = (aux @ (weights * average)) / scale if scale > 0 else 0.0
        directions.append(main + weights * (aux - share * average))
        average = (1 - rho) * average + rho * main
    return directions, average


@pytest.mark.parametrize("rho", [0.01, 0.3, 1.0])
def test_directions_are_those_written_by_hand(rho):
    r = np.random.default_rng(0)
    gradients = [(r.normal(size=7), r.normal(size=7)) for _ in range(6)]
    wanted, average = by_hand(gradients, np.full(7, 0.7), rho)
    bloop = Bloop(tensor(np.zeros(7)), weight=0.7, rho=rho)
    for (main, aux), direction in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(bloop.direction(tensor(main), tensor(aux)), direction, rtol=1e-12)
    np.testing.assert_allclose(bloop.average, average, rtol=1e-12)
    assert bloop.steps == 6


def test_schedules_and_groups_written_by_hand():
    r = np.random.default_rng(1)
    a, b = (nn.Parameter(tensor(r.normal(size=n))) for n in (3, 4))
    bloop = Bloop([{"params": [a], "weight": 0.5}, {"params": b}], weight=2.0, rho=lambda k: 1 / (k + 2))
    average = np.zeros(7)
    for k in range(5):
        main, aux = r.normal(size=7), r.normal(size=7)
        weights = np.array([0.5] * 3 + [2.0] * 4)
        square = average @ (weights * average)
        share = aux @ (weights * average) / square if k else 0.0
        wanted = main + weights * (aux - share * average)
        if k:
            assert abs((wanted - main) @ average) < 1e-12
        average = average + (main - average) / (k + 2)
        a.grad = b.grad = None
        flat, m, x = torch.cat([a, b]), tensor(main), tensor(aux)
        bloop.backward(flat @ m, flat @ x)
        np.testing.assert_allclose(torch.cat([a.grad, b.grad]), wanted, rtol=1e-11)


def test_a_group_of_weight_zero_is_trained_by_main_alone():
    a, b = (nn.Parameter(tensor(np.arange(1.0, 4.0))) for _ in range(2))
    bloop = Bloop([{"params": [a]}, {"params": [b], "weight": 0.0}])
    for _ in range(3):
        a.grad = b.grad = None
        bloop.backward((a * b).square().sum(), (a - 3 * b).square().sum())
        np.testing.assert_allclose(b.grad, (2 * a * a * b).detach(), rtol=1e-14)
        assert not torch.allclose(a.grad, (2 * a * b * b).detach())


def network(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def losses(model, batch):
    x, t = batch
    out = model(x)
    return nn.functional.cross_entropy(out, t), (model(x + 0.1 * x.flip(0)) - out).square().mean()


def batches(n, size=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 5, generator=g, dtype=dtype), torch.randint(3, (size,), generator=g)) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_aux_adds_is_orthogonal_to_the_average(dtype):
    """The sum of two vectors is rounded by eps times its size, and so is their difference, found here again."""
    model = network(0, dtype)
    bloop = Bloop(model, weight=20.0, rho=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for k, batch in enumerate(batches(8, dtype=dtype)):
        main, aux = losses(model, batch)
        plain = torch.cat([g.flatten() for g in torch.autograd.grad(main, list(model.parameters()), retain_graph=True)])
        before = torch.cat([v.flatten() for v in bloop.average.values()])
        optimizer.zero_grad()
        stats = bloop.backward(main, aux)
        added = torch.cat([p.grad.flatten() for p in model.parameters()]) - plain
        assert added.norm() > 0
        size = plain.norm() + added.norm()
        assert abs(added @ before) <= 4 * torch.finfo(dtype).eps * size * before.norm()
        assert size < 300 * added.norm()  # so that this says something
        assert (k == 0) == (before.norm() == 0)
        assert (stats.main, stats.aux) == (main.detach(), aux.detach()) and stats.step == k + 1
        assert abs(stats.cosine) <= 1 and (k == 0) == (stats.cosine == 0)
        optimizer.step()


@pytest.mark.parametrize("seed", STARTS)
def test_least_aux_on_the_minimisers_of_main_rank_one(seed):
    r = np.random.default_rng(seed)
    a, c, b = r.normal(size=5), r.normal(size=5), 1.5
    a /= np.linalg.norm(a)
    optimum = c + a * (b - a @ c)
    w = nn.Parameter(start(seed, 5)[0])
    bloop, eta, weight, steps = Bloop([w], weight=0.4, rho=0.3), 0.5, 0.4, 60
    optimizer = torch.optim.SGD([w], lr=eta)
    A, C = tensor(a), tensor(c)
    first = None
    for k in range(steps):
        optimizer.zero_grad()
        bloop.backward((A @ w - b).square() / 2, (w - C).square().sum() / 2)
        optimizer.step()
        error = w.detach().numpy() - optimum
        if k == 0:
            first = error
    along, across = a * (a @ first), first - a * (a @ first)
    left = (1 - eta) ** (steps - 1) * along + (1 - eta * weight) ** (steps - 1) * across
    np.testing.assert_allclose(error, left, atol=1e-13)
    assert np.linalg.norm(error) < 1e-5
    mixed = np.linalg.solve(np.outer(a, a) + weight * np.eye(5), a * b + weight * c)
    assert np.linalg.norm(mixed - optimum) == pytest.approx(weight / (1 + weight) * abs(a @ c - b))  # far away


@pytest.mark.parametrize("seed", STARTS)
def test_least_aux_on_the_minimisers_of_main_rank_two(seed):
    r = np.random.default_rng(seed)
    rows, _ = np.linalg.qr(r.normal(size=(6, 2)))
    A = np.diag([1.0, 0.7]) @ rows.T
    b, c = r.normal(size=2), r.normal(size=6)
    into = rows @ rows.T
    optimum = np.linalg.pinv(A) @ b + (c - into @ c)
    eta, h, weight, steps = 0.5, 0.49, 0.1, 300
    w = nn.Parameter(start(seed, 6)[0])
    bloop = Bloop(w, weight=weight, rho=0.1)
    T, B, C = tensor(A), tensor(b), tensor(c)
    errors, pushes = [], []
    for _ in range(steps):
        w.grad = None
        pushes.append(np.linalg.norm(into @ (w.detach().numpy() - c)))
        bloop.backward((T @ w - B).square().sum() / 2, (w - C).square().sum() / 2)
        with torch.no_grad():
            w -= eta * w.grad
        errors.append(w.detach().numpy() - optimum)
    off = (1 - eta * weight) ** (steps - 1) * (errors[0] - into @ errors[0])
    np.testing.assert_allclose(errors[-1] - into @ errors[-1], off, atol=1e-12)
    for k, error in enumerate(errors):
        bound = (1 - eta * h) ** k * np.linalg.norm(into @ errors[0]) + weight * max(pushes) / h
        assert np.linalg.norm(into @ error) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("seed", STARTS)
def test_falling_weight_leaves_no_bias(seed):
    """The same of rank two with weight_k = (k + 1)^{-1/2}: the bound on e falls with the weight, the rest by its sum.

    With |1 - eta H| <= q = 1 - eta h and pushes of at most s, |e_K| <= q^K |e_0| + eta s sum_j q^(K - 1 - j) weight_j,
    evaluated with the pushes seen; 3000 steps leave prod (1 - eta weight_j) < exp(-eta sum weight_j) = exp(-54) of the
    rest.
    """
    r = np.random.default_rng(seed)
    rows, _ = np.linalg.qr(r.normal(size=(4, 2)))
    A = np.diag([1.0, 0.7]) @ rows.T
    b, c = r.normal(size=2), r.normal(size=4)
    into = rows @ rows.T
    optimum = np.linalg.pinv(A) @ b + (c - into @ c)
    eta, q, steps = 0.5, 1 - 0.5 * 0.49, 3000
    w = start(seed, 4)[0]
    bloop = Bloop(w, weight=Power(1.0, -0.5), rho=0.1)
    T, B, C = tensor(A), tensor(b), tensor(c)
    bound = np.linalg.norm(into @ (w.numpy() - optimum))
    for k in range(steps):
        bound = q * bound + eta * (k + 1) ** -0.5 * np.linalg.norm(into @ (w.numpy() - c))
        w = w - eta * bloop.direction(T.mT @ (T @ w - B), w - C)
    assert bound < 0.2 * np.linalg.norm(optimum)
    assert np.linalg.norm(w.numpy() - optimum) <= bound + 1e-12


def test_micro_batches_sum_up_to_the_whole():
    model = network(1, torch.float64)
    twin = copy.deepcopy(model)
    whole, parts = Bloop(model.parameters(), rho=0.3), Bloop(twin.parameters(), rho=0.3)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in (model, twin)]
    for x, t in batches(4, 8, torch.float64):
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole.backward(nn.functional.cross_entropy(model(x), t), model(x).square().mean())
        for k, piece in enumerate(torch.arange(8).chunk(4)):
            out = twin(x[piece])
            stats = parts.backward(
                nn.functional.cross_entropy(out, t[piece]) / 4, out.square().mean() / 4, update=k == 3
            )
            assert stats.step == parts.steps
        assert whole.steps == parts.steps
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)
        for optimizer in optimizers:
            optimizer.step()


def test_gradients_that_are_none():
    a, b, c, d = (nn.Parameter(tensor(np.array([1.0, -2.0]))) for _ in range(4))
    bloop = Bloop([a, b, c, d], rho=0.5)
    bloop.backward(a.square().sum(), (a * b).square().sum())
    np.testing.assert_allclose(b.grad, [2.0, -16.0])
    assert c.grad is None and d.grad is None
    assert bloop.average[1].abs().sum() == 0
    d.requires_grad_(False)  # frozen on the way
    a.grad = None
    bloop.backward((a * c).square().sum(), b.sum())  # orthogonal to the average, which is of a alone
    np.testing.assert_allclose(a.grad, [2.0, -16.0])
    assert d.grad is None and c.grad is not None
    b.grad = c.grad = a.grad = None
    bloop.backward(a.sum(), a.sum())  # of c nothing now, but its average is projected out
    average = np.array([1 / 4 * 2 + 1 / 2 * 2, 1 / 4 * -4 + 1 / 2 * -16, 0, 0, 1 / 2 * 2, 1 / 2 * -16])
    e = np.array([1, 1, 0, 0, 0, 0.0])
    wanted = 2 * e - (e @ average) / (average @ average) * average
    assert b.grad is None  # nobody knows of it
    np.testing.assert_allclose(torch.cat([a.grad, c.grad]), wanted[[0, 1, 4, 5]], rtol=1e-12)


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    """Also between two micro-batches, with the state of Adam and the gradients next to it."""
    data = batches(8)

    def run(model, bloop, optimizer, steps):
        for k in steps:
            bloop.backward(*losses(model, data[k]), update=k % 2 == 1)
            if k % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()

    def parts(seed):
        model = network(seed)
        return model, Bloop(model, rho=Power(0.5, -0.3)), torch.optim.Adam(model.parameters(), lr=0.01)

    whole = parts(3)
    run(*whole, range(8))
    for stop in range(8):
        first, second, file = parts(3), parts(4), io.BytesIO()
        run(*first, range(stop))
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        run(*second, range(stop, 8))
        for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
            assert torch.equal(p, q)
        assert all(torch.equal(v, second[1].average[name]) for name, v in whole[1].average.items())
        assert second[1].steps == 4


def test_trees_modules_and_parameters_agree():
    model = network(2)
    p = {name: q.detach().clone() for name, q in model.named_parameters()}
    tree = {"layers": (p["0.weight"], [p["0.bias"], p["2.weight"]]), "last": p["2.bias"]}
    of_tree, of_module, of_list = Bloop(tree, rho=0.4), Bloop(model, rho=0.4), Bloop(model.parameters(), rho=0.4)
    for batch in batches(3):
        main, aux = losses(model, batch)
        g, h = (
            dict(zip(p, torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), strict=True))
            for loss in (main, aux)
        )
        model.zero_grad()
        of_list.backward(main, aux, retain_graph=True)
        wanted = {name: q.grad.clone() for name, q in model.named_parameters()}
        h["2.bias"] = None if h["2.bias"].abs().max() == 0 else h["2.bias"]
        found = of_module.direction(g, h)
        nested = of_tree.direction(
            *({"layers": (t["0.weight"], [t["0.bias"], t["2.weight"]]), "last": t["2.bias"]} for t in (g, h))
        )
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(nested["layers"][1][1], wanted["2.weight"])
        torch.testing.assert_close(nested["last"], wanted["2.bias"])


def test_scales_half_precision_and_numbers_that_are_not_finite():
    r = np.random.default_rng(0)
    m, a = torch.tensor(r.normal(size=(2, 50)), dtype=torch.float32)
    for size in (1e-30, 1.0, 1e30):  # squares of the first are zero, of the last infinite
        bloop = Bloop(torch.zeros(50), rho=1.0)
        bloop.direction(size * m, a)
        added = bloop.direction(0 * m, a)
        assert abs(float(added @ m / (added.norm() * m.norm()))) < 1e-6 and added.norm() > 0.5 * a.norm()
    half = Bloop(torch.zeros(50, dtype=torch.bfloat16), rho=1e-3)
    for _ in range(100):
        half.direction(m.bfloat16(), a.bfloat16())
    torch.testing.assert_close(half.average.float(), (1 - 0.999**100) * m.bfloat16().float(), rtol=2e-2, atol=1e-4)
    assert half.direction(m.bfloat16(), a.bfloat16()).dtype == torch.bfloat16
    bloop = Bloop(torch.zeros(50), rho=0.5)
    bloop.direction(m, a)
    before = bloop.average
    found = bloop.direction(torch.where(torch.arange(50) == 3, torch.nan, m), a)
    assert found[3].isnan() and int(found.isnan().sum()) == 1
    assert torch.equal(bloop.average, before)


def test_interrupted_it_is_as_if_it_had_not_begun():
    w = nn.Parameter(torch.ones(3))
    bloop = Bloop([w])
    bloop.backward(w.square().sum(), w.sum())
    before, grad = bloop.state_dict(), w.grad.clone()

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bloop.backward(w.square().sum(), Stop.apply(w).sum())
    assert torch.equal(w.grad, grad) and bloop.steps == 1
    assert torch.equal(bloop.state_dict()["average"][0], before["average"][0])


def test_bad_input_is_named():
    w = nn.Parameter(torch.ones(3))
    for options, message in (
        ({"rho": 0.0}, "rho: expected a number in \\(0, 1\\], got 0.0"),
        ({"rho": 1.5}, "rho: expected"),
        ({"weight": -1.0}, "weight: expected a number of at least 0"),
        ({"weight": "much"}, "weight: expected a number or a schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            Bloop([w], **options)
    with pytest.raises(ValueError, match="rho: expected a number in"):
        Bloop([w], rho=lambda k: 2.0).backward(w.sum(), w.sum())
    for empty in ([], (), {}, nn.ReLU(), [{"params": []}]):
        with pytest.raises(ValueError, match="variables: expected"):
            Bloop(empty)
    with pytest.raises(ValueError, match="expected every parameter once"):
        Bloop([w, w])
    bloop = Bloop([w])
    with pytest.raises(ValueError, match="main: expected shape"):
        bloop.backward(w, w.sum())
    with pytest.raises(ValueError, match="aux: expected a loss that depends"):
        bloop.backward(w.sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="main: expected a tensor"):
        bloop.backward(1.0, w.sum())
    with pytest.raises(ValueError, match="aux: expected the structure"):
        bloop.direction([torch.ones(3)], torch.ones(3))
    with pytest.raises(ValueError, match="main: expected shape"):
        bloop.direction([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(ValueError, match="variables: expected parameters that require a gradient"):
        Bloop(torch.ones(3)).backward(w.sum(), w.sum())
    with pytest.raises(ValueError, match="state_dict: expected 1 averages, got 2"):
        bloop.load_state_dict(Bloop([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]).state_dict())
    bloop.backward(w.sum(), w.sum())
    with pytest.raises(ValueError, match="state_dict: expected shape"):
        Bloop([nn.Parameter(torch.ones(2))]).load_state_dict(bloop.state_dict())
