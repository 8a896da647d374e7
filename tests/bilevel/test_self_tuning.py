"""SelfTuning: the layers, the best response of ridge regression, gradients, alternation, resume.

Oracles, written down before the code. Ridge: f(w, x) = (w'Aw/2 - c'w + ...) + e^x |w|^2/2, w*(x) = (A + e^x)^{-1} c,
dw*/dx = -e^x (A + e^x)^{-1} w*. An affine response a + b e fitted under e ~ N(0, s^2) satisfies, with L = e^x,
m0 = exp(s^2/2), m1 = s^2 m0, m2 = (s^2 + s^4) m0 (moments of e^e):

    (A + L m0) a + L m1 b = c,      L m1 a + (s^2 A + L m2) b = 0,

a linear system that numpy solves: what training must reach (expectations by Gauss-Hermite quadrature, so exactly).
For s -> 0 it tends to (w*, dw*/dx) with error O(s^2): half of s, a quarter of the error; so does the upper gradient.
Layers: weights W0 + diag(Vx) W1 built for every sample, and torch's own layer called with them.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from difflayers.bilevel import Hyperparameter, SelfTuning

D = torch.float64
RIDGE = np.random.default_rng(0)
U, T = RIDGE.normal(size=(12, 3)), RIDGE.normal(size=12)
A, C = U.T @ U / 12, U.T @ T / 12
G = np.array([0.5, -1.0, 2.0])  # F = |w - G|^2 / 2
X0 = math.log(0.4)


def best_response(x):
    return np.linalg.solve(A + np.exp(x) * np.eye(3), C)


def affine_response(x, s):
    L, eye = np.exp(x), np.eye(3)
    m0 = np.exp(s * s / 2)
    m1, m2 = s * s * m0, (s * s + s**4) * m0
    M = np.block([[A + L * m0 * eye, L * m1 * eye], [L * m1 * eye, s * s * A + L * m2 * eye]])
    return np.split(np.linalg.solve(M, np.concatenate([C, np.zeros(3)])), 2)


def ridge(s, seed=0):
    torch.manual_seed(seed)
    return SelfTuning(nn.Linear(3, 1, bias=False).double(), {"decay": math.exp(X0)}, scale=s)


def nodes():
    e, weights = np.polynomial.hermite_e.hermegauss(12)
    u, t = torch.tensor(U), torch.tensor(T)
    share = torch.tensor(weights / weights.sum()).repeat_interleave(12) / 12
    return (u.repeat(12, 1), t.repeat(12), share), torch.tensor(e).repeat_interleave(12)[:, None]


def fit(tuned):
    batch, noise = nodes()
    tuned.module.scale.requires_grad_(False).fill_(1.0)  # of V W1 the product counts: now the loss is quadratic

    def lower(model, values, batch):
        u, t, share = batch
        losses = (model(u)[:, 0] - t).square() / 2 + values["decay"] * tuned.squared_norm() / 2
        return (share * losses).sum()

    options = {"max_iter": 300, "tolerance_grad": 1e-13, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(tuned.response_parameters(), 1.0, **options)

    def closure():
        optimizer.zero_grad()
        loss = tuned.lower_loss(lower, batch, noise=noise)
        loss.backward()
        return loss

    optimizer.step(closure)
    layer = tuned.module
    return layer.base.weight.detach()[0], (layer.scale * layer.response.weight).detach()[0]


def at_weights(model, batch):
    """F of the weights of a ridge model: its values at unit vectors."""
    return (model(batch)[:, 0] - torch.tensor(G)).square().sum() / 2


def test_trained_response_is_the_affine_one_and_its_slope_that_of_the_best_response():
    errors = []
    w = best_response(X0)
    slope = -np.exp(X0) * np.linalg.solve(A + np.exp(X0) * np.eye(3), w)
    for s in (0.2, 0.1, 0.05):
        tuned = ridge(s)
        a, b = fit(tuned)
        wanted = affine_response(X0, s)
        np.testing.assert_allclose(a, wanted[0], atol=1e-7)
        np.testing.assert_allclose(b, wanted[1], atol=1e-6)
        loss = tuned.upper_loss(at_weights, torch.eye(3, dtype=D), noise=torch.zeros(3, 1, dtype=D))
        (gradient,) = torch.autograd.grad(loss, tuned.x)
        errors.append([np.abs(b.numpy() - slope).max(), abs(float(gradient) - slope @ (w - G))])
    ratios = np.array(errors)[:-1] / np.array(errors)[1:]
    assert ((ratios > 3.4) & (ratios < 4.6)).all(), ratios
    assert np.max(errors[0]) < 0.1


def test_alternating_reaches_the_best_penalty():
    """min_x |w*(x) - G'|^2/2 with G' = w*(x0 + 1) has its minimum at x0 + 1."""
    target = torch.tensor(best_response(X0 + 1))
    tuned = ridge(0.1)
    tuned.log_scale.requires_grad_(False)
    batch, _ = nodes()
    rows = tuple(part[:12] for part in batch)

    def lower(model, values, batch):
        return ((model(batch[0])[:, 0] - batch[1]).square() + values["decay"] * tuned.squared_norm()).mean()

    def upper(model, batch):
        return (model(batch)[:, 0] - target).square().mean()

    lower_optimizer = torch.optim.Adam(tuned.response_parameters(), 0.03)
    upper_optimizer = torch.optim.Adam(tuned.hyper_parameters(), 0.03)
    for k in range(500):
        for optimizer in (lower_optimizer, upper_optimizer):
            optimizer.param_groups[0]["lr"] = 0.03 * 0.1 ** (k / 250)
        stats = tuned.step(lower, upper, lower_optimizer, upper_optimizer, [rows, rows], torch.eye(3, dtype=D))
    assert abs(float(tuned.x.detach()) - X0 - 1) < 0.1  # the bias is O(s^2), and x is random in the response
    assert abs(float(tuned.values()["decay"]) - 0.4 * math.e) < 0.11
    assert (stats.step, stats.gradients) == (500, 1500)


# ----------------------------------------------------------------------------------------------------------- layers


def moved(module, n=2, names=("a", "b"), **options):
    """A SelfTuning with V that is not zero and hyperparameters off their start."""
    torch.manual_seed(0)
    tuned = SelfTuning(module.double(), dict.fromkeys(names, Hyperparameter(0.3, high=1.0)), **options)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) / 3)
    return tuned


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )


def by_hand(tuned, u, x):
    """The network of :func:`network` on one picture with the weights at x, and their squared norm."""
    d, total = x - tuned.start, 0.0
    for layer in (tuned.module[0], tuned.module[3]):
        s = layer.scale @ d
        W = torch.einsum("i,i...->i...", s, layer.response.weight) + layer.base.weight
        b = s * layer.response.bias + layer.base.bias
        total = total + (W**2).sum()
        u = functional_call(layer.base, {"weight": W, "bias": b}, (u[None],))[0]
        if layer is tuned.module[0]:
            u = torch.tanh(u).flatten()
    return u, total


def test_every_sample_sees_its_own_weights():
    tuned = moved(network())
    u, x = torch.randn(5, 1, 4, 4, dtype=D), tuned.x.detach() + torch.randn(5, 2, dtype=D)
    each = [by_hand(tuned, *pair) for pair in zip(u, x, strict=True)]
    torch.testing.assert_close(tuned(u, x), torch.stack([out for out, _ in each]))
    torch.testing.assert_close(tuned(u), torch.stack([by_hand(tuned, e, tuned.x)[0] for e in u]))
    norms = []
    tuned.lower_loss(lambda model, values, batch: norms.append(tuned.squared_norm()) or model(batch).sum(), u,
                     noise=(x - tuned.x.detach()) / tuned.log_scale.detach().exp())  # fmt: skip
    torch.testing.assert_close(norms[0], torch.stack([total for _, total in each]))
    torch.testing.assert_close(tuned.squared_norm(), by_hand(tuned, u[0], tuned.x)[1])
    at_each = torch.func.vmap(lambda e, point: tuned(e[None], point)[0])(u, x)
    torch.testing.assert_close(at_each, tuned(u, x))
    vector = moved(nn.Linear(3, 2))
    rows = torch.randn(4, 5, 3, dtype=D)
    together = vector(rows, x[:4])
    torch.testing.assert_close(together, torch.stack([vector(r, p) for r, p in zip(rows, x, strict=False)]))


def test_exported_module_is_the_one_at_the_current_hyperparameters():
    tuned, plain = moved(network()), network().double()
    plain.load_state_dict(tuned.export())
    u = torch.randn(3, 1, 4, 4, dtype=D)
    torch.testing.assert_close(plain(u), tuned(u))
    fresh = SelfTuning(plain, {"a": 1.0})
    assert torch.equal(fresh(u), plain(u)) and torch.equal(fresh(u, torch.tensor([3.0], dtype=D)), plain(u))


def test_upper_gradient_is_that_of_differences_with_entropy_apart():
    tuned = moved(network(), entropy=0.07)
    u, noise = torch.randn(6, 1, 4, 4, dtype=D), torch.randn(6, 2, dtype=D)

    def loss(x, log_scale):
        with torch.no_grad():
            tuned.x.copy_(x), tuned.log_scale.copy_(log_scale)
        return tuned.upper_loss(lambda model, batch: model(batch).square().mean(), u, noise=noise)

    at = (tuned.x.detach().clone(), tuned.log_scale.detach().clone())
    found = torch.autograd.grad(loss(*at), tuned.hyper_parameters())
    value = lambda *where: float(loss(*where).detach())  # noqa: E731
    for k in (0, 1):
        for i in range(2):
            e = torch.zeros(2, dtype=D)
            e[i] = 1e-5
            up, down = (value(*(p + sign * e if j == k else p for j, p in enumerate(at))) for sign in (1, -1))
            assert abs((up - down) / 2e-5 - float(found[k][i])) < 1e-8
    flat = tuned.upper_loss(lambda model, batch: 0 * model(batch).sum(), u)
    entropy = float(torch.distributions.Normal(torch.zeros(2), tuned.log_scale.detach().exp()).entropy().sum())
    assert abs(float(flat.detach()) + 0.07 * entropy) < 1e-12


def test_the_lower_loss_trains_the_response_alone():
    tuned = moved(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
    tuned.lower_loss(lambda model, values, batch: model(batch).square().mean(), torch.randn(5, 3, dtype=D)).backward()
    assert tuned.x.grad is None and tuned.log_scale.grad is None
    assert all(p.grad is not None for p in tuned.response_parameters())
    assert len(tuned.response_parameters()) == 2 * 5 + 2


def test_dropout_has_the_rate_of_every_sample():
    torch.manual_seed(0)
    tuned = SelfTuning(
        nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).double(), {"0": Hyperparameter(0.3, high=0.8), "decay": 1.0}
    )
    assert abs(float(tuned.values()["0"]) - 0.3) < 1e-12
    seen = []
    tuned.module[0].register_forward_hook(lambda module, args, out: seen.append(out))
    u, noise = torch.ones(3, 20000, 2, dtype=D), torch.tensor([[0.0, 0.0], [2.0, 0.0], [-3.0, 5.0]], dtype=D)
    tuned.lower_loss(lambda model, values, batch: seen.append(values["0"]) or model(batch).sum(), u, noise=noise)
    rates, out = seen
    np.testing.assert_allclose(
        rates, 0.8 / (1 + np.exp(-(math.log(0.3 / 0.5) + 0.5 * noise[:, 0].numpy()))), rtol=1e-12
    )
    assert torch.allclose((out == 0).double().mean((1, 2)), rates, atol=0.01)
    torch.testing.assert_close(out.amax((1, 2)), 1 / (1 - rates))
    tuned.upper_loss(lambda model, batch: model(batch).sum(), u)
    assert torch.equal(seen[-1], u) and tuned.module.training


# --------------------------------------------------------------------------------------------------- state, failures


def square(model, *rest):
    return model(rest[-1]).square().mean()


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    def fresh(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1))
        tuned = SelfTuning(net, {"1": Hyperparameter(0.2, high=1.0)})
        return (
            tuned, torch.optim.Adam(tuned.response_parameters(), 0.1), torch.optim.Adam(tuned.hyper_parameters(), 0.1)
        )  # fmt: skip

    def steps(parts, ks):
        out = []
        for k in ks:
            torch.manual_seed(100 + k)
            u = torch.randn(3, 8, 3)
            out.append(parts[0].step(square, square, *parts[1:], [u[0], u[1]], u[2]))
        return out

    whole = fresh(0)
    wanted = steps(whole, range(4))
    for stop in range(4):
        first = fresh(0)
        steps(first, range(stop))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = fresh(7)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert steps(second, range(stop, 4)) == wanted[stop:]
        assert all(torch.equal(v, second[0].state_dict()[n]) for n, v in whole[0].state_dict().items())


def test_it_is_a_module_like_any_other():
    tuned = moved(network())
    u = torch.randn(2, 1, 4, 4, dtype=D)
    twins = (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)))
    for twin in twins:
        assert torch.equal(twin(u), tuned(u))
    with torch.no_grad():
        twins[0].x.add_(1)
    assert not torch.equal(twins[0](u), tuned(u))  # a copy has a point of its own
    assert repr(tuned).startswith("SelfTuning(\n  a=")
    jac = torch.func.jacrev(lambda x: tuned(u, x))(tuned.x.detach())
    torch.testing.assert_close(jac, torch.func.jacfwd(lambda x: tuned(u, x))(tuned.x.detach()))
    layer = nn.Linear(2, 2)
    twice = SelfTuning(nn.Sequential(layer, layer), {"a": 1.0})
    assert twice.module[0] is twice.module[1] and set(twice.export()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SelfTuning(nn.ReLU(), {"a": 1.0}), r"module: expected an nn\.Linear or a convolution"),
        (lambda: SelfTuning(torch.relu, {"a": 1.0}), r"module: expected an nn\.Module"),
        (lambda: SelfTuning(network(), {}), "hyperparameters: expected at least one"),
        (lambda: SelfTuning(network(), {"a": -1.0}), r"hyperparameters\['a'\]: expected low < value < high"),
        (lambda: SelfTuning(network(), {"1": 1.0}), r"hyperparameters: '1' is the name of a Tanh, expected"),
        (lambda: SelfTuning(network(), {"a": 1.0}, scale=0), "scale: expected a number above 0"),
        (lambda: moved(network())(torch.ones(2, 1, 4, 4, dtype=D), torch.ones(3, 2, dtype=D)), "x: expected a row for"),
        (
            lambda: moved(network())(torch.ones(2, 1, 4, 4, dtype=D), torch.ones(3, dtype=D)),
            r"x: expected shape \(2,\)",
        ),
        (lambda: moved(network()).lower_loss(lambda m, v, b: m(b), torch.ones(2, 1, 4, 4, dtype=D)), "lower output"),
        (lambda: moved(network()).upper_loss(lambda m, b: 1.0, torch.ones(2, 1)), "upper output: expected a tensor"),
        (lambda: moved(network()).lower_loss(square, None), "batch: expected a tensor or a pytree"),
        (lambda: moved(network()).step(square, square, None, None, [], None), "lower_batches: expected at least one"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_shared_weights_are_refused_and_a_failing_objective_leaves_no_trace():
    tied = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="those of '1' are shared"):
        SelfTuning(tied, {"a": 1.0})
    tuned = moved(network())
    with pytest.raises(ZeroDivisionError):
        tuned.upper_loss(lambda model, batch: 1 / 0, torch.ones(2, 1))
    assert tuned.training and tuned.module.training
    with pytest.raises(RuntimeError, match="called by SelfTuning"):
        tuned.module(torch.ones(2, 1, 4, 4, dtype=D))
