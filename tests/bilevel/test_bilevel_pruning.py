"""BilevelPruning: the derivative in the mask, the updates, exact sparsity, resume, what is exported.

Oracles, written down before the code:

- the lower problem l(m * y) + gamma/2 |y|^2 has the condition m g(m y) + gamma y = 0, so with H the Hessian of l
  (M = diag m, Y = diag y, G = diag g):  (M H M + gamma I) dy/dm = -(G + M H Y), and
  dl/dm = y g + (dy/dm)' (m g): a dense solve in numpy. Without curvature (H = 0, l = c'z) the lower solution is
  y = -m c/gamma and dl/dm = -2 m c^2/gamma: the layer's formula is exact there. With curvature kappa it is wrong by
  O(kappa): half the curvature, half the error.
- two steps on a linear model with squared loss, in numpy: SGD under the mask, scores, argsort.
- that entries with m = 0 and y != 0 have dl/dm = y g shows in the steps by hand (the recalled form without m fails).
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from difflayers.bilevel import BilevelPruning, Power


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def data(seed=0, inputs=4, outputs=2, rows=16):
    r = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, n, generator=r, dtype=torch.float64) for n in (inputs, outputs))


def net(seed=0, *extra):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 2)).double()


# ---------------------------------------------------------------------------------------------------- the derivative


class Free(nn.Module):
    """A loss of its only parameter, z = m * y."""

    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(torch.as_tensor(y))

    def forward(self):
        return self.y


GAMMA = 0.7
LINEAR, SHIFT = (np.random.default_rng(k).normal(size=(2, 3)) for k in (1, 2))


def loss_of(kappa):
    c, s = torch.tensor(LINEAR), torch.tensor(SHIFT)
    return lambda model, batch: (c * model()).sum() + kappa * torch.log(torch.cosh(model() - s)).sum()


def slope_of(z, kappa):
    return LINEAR + kappa * np.tanh(z - SHIFT)


def lower_solution(m, kappa):
    y = np.zeros_like(m)
    for _ in range(200):
        y = y - 0.5 * (m * slope_of(m * y, kappa) + GAMMA * y)
    assert np.abs(m * slope_of(m * y, kappa) + GAMMA * y).max() < 1e-13
    return y


def dense_derivative(m, kappa):
    y = lower_solution(m, kappa)
    g, h = slope_of(m * y, kappa), kappa / np.cosh(m * y - SHIFT) ** 2  # the Hessian of this loss is diagonal
    dy = -(g + m * h * y) / (m * h * m + GAMMA)
    return y * g + dy * m * g


def layer_derivative(m, kappa):
    pruning = BilevelPruning(Free(lower_solution(m, kappa)), 0.5, gamma=GAMMA, step=1.0)
    pruning.kept.get_buffer("y").copy_(torch.tensor(m, dtype=torch.bool))
    before = pruning.scores.get_buffer("y").clone()
    value, length = pruning.update_mask(loss_of(kappa))
    gradient = (before - pruning.scores.get_buffer("y")).numpy()
    assert abs(length - np.linalg.norm(gradient)) < 1e-12
    assert value.requires_grad is False
    return gradient


MASK = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def test_derivative_is_that_of_the_lower_problem_without_curvature():
    np.testing.assert_allclose(layer_derivative(MASK, 0.0), -2 * MASK * LINEAR**2 / GAMMA, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dense_derivative(MASK, 0.0), -2 * MASK * LINEAR**2 / GAMMA, rtol=1e-12, atol=1e-13)


def test_dense_derivative_is_that_of_re_solved_problems():
    def value(m):
        z = m * lower_solution(m, 0.3)
        return (LINEAR * z).sum() + 0.3 * np.log(np.cosh(z - SHIFT)).sum()

    for i in np.ndindex(MASK.shape):
        e = np.zeros_like(MASK)
        e[i] = 1e-5
        assert abs((value(MASK + e) - value(MASK - e)) / 2e-5 - dense_derivative(MASK, 0.3)[i]) < 1e-8


def test_neglected_curvature_costs_an_error_in_proportion_to_it():
    errors = [np.abs(layer_derivative(MASK, k) - dense_derivative(MASK, k)).max() for k in (0.04, 0.02, 0.01)]
    assert errors[-1] > 1e-4
    assert all(1.9 < a / b < 2.1 for a, b in itertools.pairwise(errors))


# --------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("rows", [False, True])
def test_steps_are_those_written_by_hand(rows):
    (u, t), (u2, t2) = ((u, 4 * t) for u, t in (data(0, 4, 3), data(1, 4, 3)))
    torch.manual_seed(2)
    linear = nn.Linear(4, 3).double()
    W, b = linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()
    gamma, decay = 8.0, 0.05
    pruning = BilevelPruning(linear, 0.34, gamma=gamma, decay=decay, step=Power(9.0, -0.5), rows=rows)
    optimizer = torch.optim.SGD(pruning.parameters(), 0.1)

    def slopes(W, b, u, t):
        rest = 2 * (u @ W.T + b - t) / t.size
        return rest.T @ u, rest.sum(0)

    def mask(scores):
        keep = scores.size - round(0.34 * scores.size)
        out = np.zeros(scores.size)
        out[np.argsort(-scores.ravel())[:keep]] = 1
        return out.reshape(scores.shape)

    scores = np.sqrt((W**2).mean(1)) if rows else abs(W)
    scores = scores / scores.max()
    masks = []
    for k in range(3):
        m = mask(scores)
        masks.append(m)
        mW, mb = (m[:, None], m) if rows else (m, 1.0)
        gW, gb = slopes(mW * W, mb * b, u.numpy(), t.numpy())
        W = W - 0.1 * (mW * gW + decay * W)
        b = b - 0.1 * (mb * gb + (decay * b if rows else 0))
        gW, gb = slopes(mW * W, mb * b, u2.numpy(), t2.numpy())
        d = (W - mW * gW / gamma) * gW
        if rows:
            d = d.sum(1) + (b - mb * gb / gamma) * gb
        scores = scores - 9.0 * (k + 1) ** -0.5 * d
        stats = pruning.step(squared, optimizer, (u2, t2), (u, t))
        np.testing.assert_allclose(pruning.scores.get_buffer("weight"), scores, rtol=1e-12)
        np.testing.assert_allclose(linear.weight.detach(), W, rtol=1e-12)
        np.testing.assert_allclose(linear.bias.detach(), b, rtol=1e-12)
        np.testing.assert_allclose(stats.stationarity, np.linalg.norm(d), rtol=1e-12)
        assert (stats.step, stats.gradients) == (k + 1, 2 * (k + 1))
        m = mask(scores)
        np.testing.assert_array_equal(pruning.masks["weight"], np.broadcast_to(m[:, None] if rows else m, W.shape))
    assert any((m != masks[0]).any() for m in [*masks, mask(scores)])  # else the oracle would have seen one mask only


# -------------------------------------------------------------------------------------------------------- sparsity


def zeros(pruning, *names):
    return sum(int((pruning.export()[name] == 0).sum()) for name in names)


def test_sparsity_is_exact():
    both = ("0.weight", "2.weight")
    assert zeros(BilevelPruning(net(), 0.71), *both) == 26  # of 25.56
    layers = BilevelPruning(net(), 0.75, per_layer=True)
    assert (zeros(layers, both[0]), zeros(layers, both[1])) == (18, 9)
    named = BilevelPruning(net(), {"2.weight": 0.5})
    assert (zeros(named, both[0]), zeros(named, both[1])) == (0, 6)
    assert zeros(BilevelPruning(net(), 0.5, exclude=["2"]), *both) == 12
    assert zeros(BilevelPruning(net(), 0.0), *both) == 0
    same = net()
    with torch.no_grad():
        for p in same.parameters():
            p.fill_(0.5)
    tied = BilevelPruning(same, 0.75)
    assert zeros(tied, *both) == 27 and bool(tied.masks["0.weight"].flatten()[:9].all())
    with torch.no_grad():
        same[0].weight.zero_()
    assert int(sum(m.sum() for m in BilevelPruning(same, 0.5).masks.values())) == 18


def test_rows_go_with_their_bias_and_the_classes_stay():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    pruning = BilevelPruning(conv, 0.5, rows=True, exclude=["3.weight"])
    mask = pruning.masks["0.weight"]
    dropped = ~mask.flatten(1).any(1)
    assert int(dropped.sum()) == 2 and bool((mask.flatten(1).all(1) | dropped).all())
    plain = pruning.export()
    assert not plain["0.bias"][dropped].any() and plain["0.bias"][~dropped].all() and plain["3.weight"].all()
    up = nn.ConvTranspose1d(2, 2, 3)  # whose index 0 is that of the inputs
    assert BilevelPruning(up, 0.5, rows=True).export()["bias"].all()


def test_exported_module_is_the_pruned_one():
    pruning = BilevelPruning(net(), 0.6)
    u, _ = data()
    plain = net(1)
    plain.load_state_dict(pruning.export())
    assert torch.equal(plain(u), pruning(u))
    assert not torch.equal(plain(u), pruning.module(u))  # the module keeps what is masked
    pruning(u).sum().backward()
    assert not pruning.module[0].weight.grad[~pruning.masks["0.weight"]].any()
    with torch.no_grad():
        pruning.module[0].weight[~pruning.masks["0.weight"]] = torch.nan
    assert not pruning.export()["0.weight"].isnan().any()


def test_tied_weights_share_one_mask():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    pruning = BilevelPruning(model, 0.5)
    plain, u = pruning.export(), data(0, 3, 3)[0]
    assert list(pruning.masks) == ["0.weight"] and torch.equal(plain["0.weight"], plain["1.weight"])
    torch.testing.assert_close(pruning(u), u @ plain["0.weight"].mT @ plain["0.weight"].mT)


# -------------------------------------------------------------------------------------------------- state, failures


def test_resumed_anywhere_it_is_the_same_run_to_the_last_bit():
    def fresh(seed):
        pruning = BilevelPruning(net(seed, nn.BatchNorm1d(6)), 0.5, step=Power(1.0, -0.3))
        return pruning, torch.optim.Adam(pruning.parameters(), 0.02)

    batches = [(data(20 + k), data(30 + k)) for k in range(5)]
    whole, optimizer = fresh(0)
    wanted = [whole.step(squared, optimizer, *pair) for pair in batches]
    for stop in range(5):
        first, optimizer = fresh(0)
        for pair in batches[:stop]:
            first.step(squared, optimizer, *pair)
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        second, optimizer = fresh(5)
        for part, state in zip((second, optimizer), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert [second.step(squared, optimizer, *pair) for pair in batches[stop:]] == wanted[stop:]
        assert all(torch.equal(v, second.state_dict()[name]) for name, v in whole.state_dict().items())


def test_statistics_see_the_lower_batches_alone():
    pruning = BilevelPruning(net(0, nn.BatchNorm1d(6)), 0.5)
    before = copy.deepcopy(pruning.module[1].state_dict())
    pruning.update_mask(squared, data())
    assert all(torch.equal(v, before[name]) for name, v in pruning.module[1].state_dict().items())
    assert all(p.grad is None for p in pruning.parameters())


def test_it_is_a_module_like_any_other():
    pruning = BilevelPruning(net(), 0.5)
    u, _ = data()
    for twin in (copy.deepcopy(pruning), pickle.loads(pickle.dumps(pruning))):
        assert torch.equal(twin(u), pruning(u))
    assert "kept=18 of 36" in repr(pruning)
    assert pruning.to(torch.float32)(u.float()).dtype == torch.float32
    assert torch.func.vmap(pruning)(u.float()).shape == (16, 2)


def test_a_step_that_fails_leaves_scores_and_mask_alone():
    pruning = BilevelPruning(net(), 0.5)
    before = copy.deepcopy(pruning.state_dict())
    with pytest.raises(FloatingPointError, match="not finite"):
        pruning.update_mask(lambda model, batch: squared(model, batch) * torch.nan, data())
    with pytest.raises(RuntimeError, match="of the user"):
        pruning.update_mask(lambda model, batch: (_ for _ in ()).throw(RuntimeError("of the user")))
    assert all(torch.equal(v, before[name]) for name, v in pruning.state_dict().items())
    assert pruning(data()[0]).shape == (16, 2)


def test_nan_in_a_lower_batch_moves_nothing():
    pruning = BilevelPruning(net(), 0.5)
    optimizer = torch.optim.Adam(pruning.parameters())
    before = copy.deepcopy(pruning.state_dict())
    with pytest.raises(FloatingPointError, match="lower problem is not finite"):
        pruning.step(squared, optimizer, data(), (data()[0] * torch.nan, data()[1]))
    assert all(torch.equal(v, before[name]) for name, v in pruning.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a share of at least 0 and below 1, got 1\.0"),
        ({"sparsity": {"0.weight": 2}}, r"sparsity\['0.weight'\]: expected a share"),
        ({"sparsity": {"none": 0.5}}, r"sparsity: expected names from \['0.weight', '2.weight'\], got \['none'\]"),
        ({"gamma": 0.0}, "gamma: expected a number above 0"),
        ({"decay": -1.0}, "decay: expected a number of at least 0"),
        ({"step": "fast"}, "step: expected a number or a schedule"),
        ({"exclude": ["3"]}, "exclude: expected names of parameters or submodules, got '3'"),
        ({"exclude": "0"}, "exclude: expected a sequence of names"),
        ({"exclude": ["0", "2"]}, "module: expected parameters of two dimensions or more"),
    ],
)
def test_bad_input_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        BilevelPruning(net(), **{"sparsity": 0.5, **options})


def test_losses_must_be_one_number():
    pruning = BilevelPruning(net(), 0.5)
    with pytest.raises(ValueError, match="loss output: expected shape"):
        pruning.update_mask(lambda model, batch: model(batch[0]), data())
    with pytest.raises(ValueError, match="loss output: expected a tensor, got float"):
        pruning.update_mask(lambda model, batch: 1.0, data())
    with pytest.raises(ValueError, match=r"module: expected an nn\.Module"):
        BilevelPruning(lambda u: u, 0.5)
