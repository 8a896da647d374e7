"""DatasetDistillation: the linearised network, its ridge regression, the gradient, the pool, resume.

Oracles, written down before the code:

- the linearised network is the first-order Taylor polynomial: central differences of the features in the weights;
- the lower objective is the minimum over heads W of an ordinary ridge regression, which numpy solves as least squares
  with rows for the penalty; the prediction uses that W;
- the lower problem is quadratic in the tangent weights v, so v*(x) is one dense solve with the Hessian and gradient at
  0 (autograd of the formula in numpy terms above). The gradient at v* is that of central differences of
  upper(x, v*(x)) with v* solved again, in every image and label; and the dense IFT away from v*;
- the steps of the network are those of torch.optim.Adam; those of the data AdaBelief in numpy.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from difflayers import SolveError
from difflayers.bilevel import DatasetDistillation
from difflayers.implicit import Implicit
from difflayers.linalg import CG

D = torch.float64
RIDGE, DECAY = 0.05, 0.02
DIRECT = Implicit(CG(rtol=1e-13, max_steps=500))


def features():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh())


def data(seed=0, rows=7):
    r = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, 3, generator=r, dtype=D)
    return u, torch.stack([u.prod(1), u[:, 0] - u[:, 1]], 1)


def distillation(**options):
    u, t = data(1, 3)
    return DatasetDistillation(
        features, u, t, **{"models": 2, "ridge": RIDGE, "decay": DECAY, "adjoint": DIRECT, **options}
    )


def network(d, k):
    """Weights (4, 3), bias and head of one of the pool, for formulas by hand."""
    base, head = d.pool.get_buffer("base")[k], d.pool.get_buffer("head")[k]
    return base[:12].reshape(4, 3), base[12:], head


def split(v):
    return v[:12].reshape(4, 3), v[12:]


def outputs(d, k, u, v):
    """Features and outputs by hand: tanh' = 1 - tanh^2."""
    W, b, head = network(d, k)
    dW, db = split(v)
    h = torch.tanh(u @ W.mT + b)
    return h, (h + (1 - h * h) * (u @ dW.mT + db)) @ head


def dual(h, r):
    return torch.linalg.inv(h @ h.mT / 4 + RIDGE * torch.eye(len(h), dtype=D)) @ r


def lower(d, k, u, t, v):
    h, out = outputs(d, k, u, v)
    return RIDGE / 2 * ((t - out) * dual(h, t - out)).sum() + DECAY / 2 * (v * v).sum()


def upper(d, k, u, t, v, real):
    h, out = outputs(d, k, u, v)
    h_real, out_real = outputs(d, k, real[0], v)
    return ((out_real + h_real @ h.mT @ dual(h, t - out) / 4 - real[1]) ** 2).sum(1).mean() / 2


def solved(d, k, u, t):
    zero = torch.zeros(16, dtype=D)
    f = lambda v: lower(d, k, u, t, v)  # noqa: E731
    return torch.linalg.solve(torch.func.hessian(f)(zero), -torch.func.grad(f)(zero))


def test_linearised_network_is_the_taylor_polynomial():
    d = distillation()
    u, _ = data()
    base, head = d.pool.get_buffer("base")[1], d.pool.get_buffer("head")[1]
    v = torch.randn(16, dtype=D, generator=torch.Generator().manual_seed(2))

    def h(weights):
        module = features().double()
        torch.nn.utils.vector_to_parameters(weights, module.parameters())
        return module(u).detach()

    slope = (h(base + 1e-5 * v) - h(base - 1e-5 * v)) / 2e-5
    found_h, found = d.linearised.outputs(u, base, head, v)
    torch.testing.assert_close(found_h, h(base))
    torch.testing.assert_close(found, (h(base) + slope) @ head, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, outputs(d, 1, u, v)[1])
    assert abs(head).min() > 0


def test_lower_objective_is_the_minimum_of_a_ridge_regression():
    d = distillation()
    (u, t), real = data(1, 3), data(5)
    v = torch.randn(16, dtype=D, generator=torch.Generator().manual_seed(2))
    h, out = outputs(d, 0, u, v)
    r = (t - out).numpy()
    rows = np.concatenate([h.numpy(), np.sqrt(4 * RIDGE) * np.eye(4)])
    W = np.linalg.lstsq(rows, np.concatenate([r, np.zeros((4, 2))]), rcond=None)[0]
    value = ((r - h.numpy() @ W) ** 2).sum() / 2 + 4 * RIDGE / 2 * (W**2).sum() + DECAY / 2 * float(v @ v)
    at = (d.pool.get_buffer("base")[0], d.pool.get_buffer("head")[0])
    x = {"images": u, "labels": t}
    np.testing.assert_allclose(d.linearised.lower(x, v, at), value, rtol=1e-12)
    h_real, out_real = outputs(d, 0, real[0], v)
    error = (out_real + h_real @ torch.tensor(W) - real[1]).square().sum() / 2 / 7
    np.testing.assert_allclose(d.linearised.upper(x, v, (*real, *at)), error, rtol=1e-12)


def test_gradient_is_that_of_problems_solved_again():
    d, real, k = distillation(), data(5), 1
    u, t = d.dataset()
    d.pool.get_buffer("tangent")[k] = solved(d, k, u, t)
    found = d.gradient(k, real)
    assert found.stationarity < 1e-12

    def value(u, t):
        return float(upper(d, k, u, t, solved(d, k, u, t), real))

    for name, place in (("images", 0), ("labels", 1)):
        for i in np.ndindex((u, t)[place].shape):
            e = torch.zeros_like((u, t)[place])
            e[i] = 1e-5
            up, down = (value(*(p + s * e if j == place else p for j, p in enumerate((u, t)))) for s in (1, -1))
            np.testing.assert_allclose(found.grad[name][i], (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
    assert abs(value(u, t) - float(found.value)) < 1e-12


def test_gradient_of_a_network_on_its_way_is_the_dense_one():
    d, real = distillation(), data(5)
    u, t = d.dataset()
    v = torch.randn(16, dtype=D, generator=torch.Generator().manual_seed(2))
    d.pool.get_buffer("tangent")[0] = v
    H = torch.func.hessian(lambda v: lower(d, 0, u, t, v))(v)
    q = torch.linalg.solve(H, torch.func.grad(lambda v: upper(d, 0, u, t, v, real))(v))
    slope = torch.func.grad(lambda u, v: lower(d, 0, u, t, v), argnums=1)
    direct = torch.func.grad(lambda u: upper(d, 0, u, t, v, real))(u)
    wanted = direct - torch.func.grad(lambda u: slope(u, v) @ q)(u)
    found = d.gradient(0, real)
    torch.testing.assert_close(found.grad["images"], wanted, rtol=1e-8, atol=1e-10)
    assert (found.grad["images"] - direct).abs().max() > 1e-3  # the implicit part is there to be missed


def test_a_step_is_adam_on_the_network_and_adabelief_on_the_data():
    d, real = distillation(models=1, lower_steps=3, lower_rate=0.05, rate=0.1, age=100), data(5)
    u, t = (p.numpy() for p in d.dataset())
    v = nn.Parameter(torch.zeros(16, dtype=D))
    adam = torch.optim.Adam([v], 0.05)
    m, s = {"images": 0.0, "labels": 0.0}, {"images": 0.0, "labels": 0.0}
    for k in range(1, 3):
        x = {"images": torch.tensor(u), "labels": torch.tensor(t)}
        for _ in range(3):
            adam.zero_grad()
            lower(d, 0, *x.values(), v).backward()
            adam.step()
        stats = d.step(real)
        torch.testing.assert_close(d.pool.get_buffer("tangent")[0], v.detach(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.lower, lower(d, 0, *x.values(), v.detach()), rtol=1e-9)
        np.testing.assert_allclose(stats.upper, upper(d, 0, *x.values(), v.detach(), real), rtol=1e-9)
        twin = copy.deepcopy(d)
        with torch.no_grad():
            for name, value in x.items():
                twin.get_parameter(name).copy_(value)
        slopes = {name: g.numpy() for name, g in twin.gradient(0, real).grad.items()}
        for name, g in slopes.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            s[name] = 0.999 * s[name] + 0.001 * (g - m[name]) ** 2
            move = 0.1 * m[name] / (1 - 0.9**k) / (np.sqrt(s[name] / (1 - 0.999**k)) + 1e-8)
            u, t = (u - move, t) if name == "images" else (u, t - move)
        np.testing.assert_allclose(d.images.detach(), u, rtol=1e-8)
        np.testing.assert_allclose(d.labels.detach(), t, rtol=1e-8)
        np.testing.assert_allclose(stats.stationarity, np.sqrt(sum((g**2).sum() for g in slopes.values())), rtol=1e-8)
        assert (stats.step, stats.gradients) == (k, 5 * k)
    assert stats.products > 4


def test_networks_are_renewed_at_their_age_and_all_of_them_drawn():
    d, real = distillation(models=3, lower_steps=2, age=4), data(5)
    first = d.pool.get_buffer("base").clone()
    assert len({tuple(row) for row in first.tolist()}) == 3
    drawn = []
    for _ in range(12):
        before = d.pool.get_buffer("ages").clone()
        d.step(real)
        drawn.append(int((d.pool.get_buffer("ages") != before).nonzero()))
        assert int(d.pool.get_buffer("ages").max()) < 4
    assert set(drawn) == {0, 1, 2} and drawn[:6] != drawn[6:]
    new = (d.pool.get_buffer("base") != first).any(1)
    assert int(d.made) == 3 + sum(drawn.count(k) // 2 for k in range(3)) and bool(new.any())


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    options = {"models": 2, "lower_steps": 2, "age": 4, "adjoint": None}
    batches = [data(20 + k) for k in range(5)]
    whole = distillation(**options)
    wanted = [whole.step(batch) for batch in batches]
    for stop in range(5):
        first = distillation(**options)
        for batch in batches[:stop]:
            first.step(batch)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        torch.manual_seed(stop)
        second = distillation(**options)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert [second.step(batch) for batch in batches[stop:]] == wanted[stop:]
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_it_is_a_module_like_any_other_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    d = distillation()
    d.step(data())
    assert torch.equal(state, torch.get_rng_state())
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert twin.step(data()).upper == copy.deepcopy(d).step(data()).upper
    assert "images=(3, 3), models=2" in repr(d)
    assert not torch.equal(d.pool.get_buffer("base"), distillation(seed=1).pool.get_buffer("base"))
    assert [name for name, _ in d.named_parameters()] == ["images", "labels"]
    images, labels = d.dataset()
    images += 1
    assert not torch.equal(images, d.images) and labels.requires_grad is False
    fixed = distillation(learn_labels=False)
    fixed.step(data())
    assert torch.equal(fixed.labels, data(1, 3)[1]) and not torch.equal(fixed.images, data(1, 3)[0])


def test_a_step_without_a_gradient_leaves_the_data_alone():
    d = distillation()
    before = d.dataset()
    u, t = data()
    with pytest.raises(SolveError, match="the adjoint solve ended as"):
        d.step((u, t * torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, d.dataset(), strict=True)) and int(d.steps) == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: DatasetDistillation(features, torch.ones(3, 3), torch.ones(2, 2)), r"labels: expected shape \(3, C\)"),
        (lambda: DatasetDistillation(features(), torch.ones(2, 3), torch.ones(2, 1)), "features: expected a function"),
        (lambda: DatasetDistillation(3, torch.ones(2, 3), torch.ones(2, 1)), "features: expected a function"),
        (lambda: distillation(ridge=0.0), "ridge: expected a number above 0"),
        (lambda: distillation(models=0), "models: expected an integer of at least 1"),
        (lambda: distillation().step(torch.ones(2, 3)), "real_batch: expected a pair"),
        (lambda: distillation().step(data()[::-1]), r"real_batch\[0\]: expected shape \(7, 3\)"),
        (lambda: distillation().step((data()[0].float(), data()[1])), r"real_batch\[0\]: expected dtype"),
        (lambda: DatasetDistillation(lambda: nn.Linear(3, 4), torch.ones(2, 5, 3), torch.ones(2, 1)),
         "features output: expected shape"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
