"""Generalized sum pooling as a module, and the zero-shot loss.

Oracles, written down before the code: average pooling at a ratio of 1, bit by bit; the published fixed-point iteration
run to a standstill on distances from `torch.cdist`; a farthest-point search by brute force; the loss by explicit
inverses; differences.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from difflayers.transport import GeneralizedSumPool, gsp_coupling, zero_shot_loss

D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def in_ball(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1)


def pool_of(*settings: float, **options: bool) -> GeneralizedSumPool:
    torch.manual_seed(0)
    return GeneralizedSumPool(*settings, dtype=D, **options)


def published(prototypes: Tensor, tokens: Tensor, ratio: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Pooled features and attributes of tokens ``(n, C)``."""
    n = len(tokens)
    kernel = (-gamma * torch.cdist(in_ball(prototypes), in_ball(tokens))).exp()
    sums, t = kernel.sum(0), ratio
    for _ in range(3000):
        p = 1 / n / (1 + t * sums)
        t = ratio / (p * sums).sum()
    plan = t * kernel * p
    return (1 / n - p) @ tokens / ratio, plan.sum(1) / ratio


@pytest.mark.parametrize(("ratio", "gamma"), [(0.3, 0.1), (0.5, 5.0), (0.9, 20.0), (1e-3, 8.0)])
def test_the_pool_is_the_published_iteration_at_its_end(ratio, gamma):
    pool, maps = pool_of(6, 4, ratio, gamma), normal(3, 6, 2, 5)
    found = pool.detailed(maps)
    assert found.weights.shape == (3, 2, 5)
    assert (found.weights.sum((-2, -1)) - 1).abs().max() < 1e-12
    for i in range(3):
        tokens = maps[i].flatten(1).mT
        pooled, attributes = published(pool.prototypes.detach(), tokens, ratio, gamma)
        assert (found.pooled[i] - pooled).abs().max() < 1e-10
        assert (found.attributes[i] - attributes).abs().max() < 1e-10
        assert (found.weights[i].flatten() @ tokens - pooled).abs().max() < 1e-10
    assert torch.equal(pool(maps), found.pooled)
    assert (pool(maps.flatten(2).mT) - found.pooled).abs().max() < 1e-14
    assert (pool(maps[0].flatten(1).mT) - found.pooled[0]).abs().max() < 1e-14


def test_a_ratio_of_one_is_average_pooling_to_the_last_bit():
    maps = normal(5, 12, 7, 7)
    tokens = maps.flatten(2).mT.contiguous()
    pool = pool_of(12, 8, 1.0, 20.0, keepdim=True)
    assert torch.equal(pool(maps), nn.AdaptiveAvgPool2d(1)(maps))
    assert torch.equal(pool.detailed(maps).pooled, nn.AdaptiveAvgPool2d(1)(maps))
    assert torch.equal(pool(tokens), tokens.mean(1, keepdim=True))
    assert torch.equal(pool.detailed(maps).weights, torch.full((5, 7, 7), 1 / 49, dtype=D))
    whole = gsp_coupling(normal(8, 49).abs(), torch.ones((), dtype=D), 20.0)
    assert torch.equal(whole.residual, torch.zeros(49, dtype=D))
    maps.requires_grad_()
    slope = torch.autograd.grad(pool(maps).sum(), maps)[0]
    assert torch.equal(slope, torch.full_like(slope, 1 / 49))


def test_just_below_one_it_is_nearly_average_pooling():
    maps = normal(5, 12, 7, 7)
    assert (pool_of(12, 8, 1 - 1e-12, 20.0)(maps) - maps.mean((-2, -1))).abs().max() < 1e-10


@pytest.mark.parametrize("start", ["random", "features"])
def test_single_precision_is_finite_at_a_low_temperature(start):
    maps = normal(4, 16, 7, 7).float().requires_grad_()
    pool = GeneralizedSumPool(16, 8, 0.3, 1000.0)
    if start == "features":  # distances of zero
        pool.initialise_(maps)
    found = pool.detailed(maps)
    assert found.pooled.dtype == found.attributes.dtype == torch.float32
    assert (found.weights.sum((-2, -1)) - 1).abs().max() < 1e-5
    total = found.pooled.square().sum() + found.attributes.square().sum()
    slopes = torch.autograd.grad(total, (maps, pool.prototypes))
    assert all(torch.isfinite(t).all() for t in (total, *slopes))


def test_a_distance_of_zero_has_a_derivative_of_zero():
    tokens = torch.tensor([[0.3, 0.4], [0.6, -0.2], [-0.5, 0.1]], dtype=D, requires_grad=True)
    pool = pool_of(2, 1, 0.4, 3.0)
    with torch.no_grad():
        pool.prototypes.copy_(tokens[:1])
    weights = pool.detailed(tokens).weights
    slopes = torch.autograd.grad(weights[0], (tokens, pool.prototypes))
    assert torch.equal(slopes[0][0], torch.zeros(2, dtype=D))
    assert slopes[1].abs().min() > 1e-3  # by the other two

    def first(prototype: Tensor) -> Tensor:
        far = (prototype - tokens.detach()).norm(dim=-1)
        far[0] = 0
        return gsp_coupling(far.unsqueeze(0), 0.4, 3.0).plan[0, 0] / 0.4

    expected = torch.func.jacfwd(first)(pool.prototypes.detach()[0])
    assert (slopes[1][0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("learnable", [False, True])
def test_gradients_are_those_of_differences(learnable):
    pool, maps = pool_of(3, 4, 0.35, 5.0, learnable=learnable), normal(2, 3, 2, 3)
    weights = [normal(2, k, seed=k) for k in (3, 4)]

    def loss() -> Tensor:
        found = pool.detailed(maps)
        return sum((w * (x + x.square())).sum() for w, x in zip(weights, found[:2], strict=True))

    parameters = dict(pool.named_parameters())
    assert set(parameters) == {"prototypes", "logit_ratio", "log_gamma"} if learnable else {"prototypes"}
    slopes = torch.autograd.grad(loss(), list(parameters.values()))
    for parameter, slope in zip(parameters.values(), slopes, strict=True):
        move, total = normal(*parameter.shape, seed=9), 0.0
        with torch.no_grad():
            for k, w in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                parameter += k * 1e-3 * move
                total += w * float(loss())
                parameter -= k * 1e-3 * move
        assert abs(float((slope * move).sum()) - total / 12e-3) < 1e-8


def test_prototypes_start_far_apart_and_stay_the_same_parameter():
    pool, maps = pool_of(3, 5, 0.5, 10.0), 2 * normal(4, 3, 3, 3)
    before = pool.prototypes
    optimiser = torch.optim.SGD(pool.parameters(), lr=0.1)
    assert pool.initialise_(maps) is pool
    assert pool.prototypes is before
    points = in_ball(maps.movedim(1, -1).reshape(-1, 3))
    picked = [points[(points - points.mean(0)).norm(dim=-1).argmax()]]
    for _ in range(4):
        nearest = torch.stack([(points - p).norm(dim=-1) for p in picked]).amin(0)
        picked.append(points[nearest.argmax()])
    assert (pool.prototypes - torch.stack(picked)).abs().max() < 1e-15
    pool(maps).square().sum().backward()
    optimiser.step()
    assert (pool.prototypes - torch.stack(picked)).abs().max() > 1e-4


def test_the_start_is_refused_where_there_is_too_little_or_no_number():
    pool = pool_of(3, 5, 0.5, 10.0)
    with pytest.raises(ValueError, match="features: expected at least 5 positions in all, got 4"):
        pool.initialise_(normal(2, 2, 3))
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        pool.initialise_(torch.full((2, 4, 3), math.nan, dtype=D))


def test_memory_for_the_backward_pass_does_not_grow_with_all_three_sizes():
    pool, maps = pool_of(40, 30, 0.4, 10.0), normal(2, 40, 5, 5).requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pool(maps)
    assert max(saved.values()) <= 2 * 40 * 25
    assert sum(saved.values()) < 20 * 2 * 25 * 40  # the differences alone would be 30 such


def test_it_takes_the_place_of_average_pooling_in_a_network():
    torch.manual_seed(0)
    pool = GeneralizedSumPool(8, 4, 0.5, 10.0, keepdim=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(5, 3, 6, 6)
    assert net(x).shape == (5, 2)
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    assert repr(pool) == "GeneralizedSumPool(8, 4, ratio=0.5, gamma=10, keepdim=True)"
    assert "ratio=0.3, gamma=7, learnable=True" in repr(GeneralizedSumPool(8, 4, 0.3, 7.0, learnable=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "channels: expected an integer of at least 1, got 0"),
        ((8, 2.5), "n_prototypes: expected an integer of at least 1, got 2.5"),
        ((8, 4, 0.0), "ratio: expected more than 0"),
        ((8, 4, 1.1), "ratio: expected at most 1, got 1.1"),
        ((8, 4, 0.5, 0.0), "gamma: expected more than 0"),
        ((8, 4, torch.tensor(0.5)), "ratio: expected a number, which learnable=True makes a parameter, got a tensor"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedSumPool(*arguments)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="ratio: expected less than 1 where it is learnable"):
        GeneralizedSumPool(8, 4, 1.0, learnable=True)
    pool = GeneralizedSumPool(8, 4)
    for shape, message in (
        ((2, 9, 3, 3), r"features: expected C = 8 channels in \(B, C, H, W\), got shape \(2, 9, 3, 3\)"),
        ((2, 8, 3), r"features: expected C = 8 channels in \(B, n, C\) tokens, got shape \(2, 8, 3\)"),
        ((8,), "features: expected at least 2 dimensions"),
        ((2, 8, 1, 3, 3), r"features: expected \(B, C, H, W\) or \(B, n, C\)"),
        ((2, 8, 0, 3), "features: expected at least one position"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(torch.ones(shape))
    with pytest.raises(ValueError, match=r"features: expected dtype torch.float32 as of the prototypes"):
        pool(torch.ones(2, 8, 3, 3, dtype=D))


# ------------------------------------------------------------------------------------------------------ zero-shot loss


def explicit_loss(X: Tensor, labels: Tensor, E: Tensor) -> Tensor:
    """Both directions by an explicit inverse, one example at a time."""
    half, total = len(X) // 2, 0.0
    for one, other in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        A = X[one]
        W = A.T @ torch.linalg.inv(A @ A.T + 0.05 * torch.eye(len(A), dtype=D)) @ E[labels[one]]
        for x, label in zip(X[other], labels[other], strict=True):
            scores = 9.5 * E @ (x @ W)
            total = total - scores[label] + scores.exp().sum().log()
    return total / len(X)


@pytest.mark.parametrize(("count", "m"), [(8, 6), (9, 3), (2, 4)])
def test_the_loss_is_that_of_explicit_inverses(count, m):
    X, E = normal(count, m).softmax(-1).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    labels = torch.arange(count) % 5
    ours, expected = zero_shot_loss(X, labels, E), explicit_loss(X, labels, E)
    assert (ours - expected).abs() < 1e-12
    for got, wanted in zip(torch.autograd.grad(ours, (X, E)), torch.autograd.grad(expected, (X, E)), strict=True):
        assert (got - wanted).abs().max() < 1e-10
    together = zero_shot_loss(torch.stack([X, 2 * X]), labels, E)
    assert (together - torch.stack([ours, zero_shot_loss(2 * X, labels, E)])).abs().max() < 1e-12


def test_attributes_that_tell_classes_apart_lose_less():
    labels = torch.arange(12) % 3
    told = torch.eye(3, dtype=D)[labels]
    assert zero_shot_loss(told, labels, torch.eye(3, dtype=D)) < 0.01
    assert zero_shot_loss(told.roll(1, 0)[torch.arange(12) // 4 * 4], labels, torch.eye(3, dtype=D)) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 5, 0])}, "labels: expected 0 to 2, one row of class_embeddings each, got 0 to"),
        ({"labels": torch.tensor([0.0, 1.0, 0.0, 0.0])}, "labels: expected a tensor of integers, got torch.float32"),
        ({"labels": [0, 1, 0, 0]}, "labels: expected a tensor of integers, got list"),
        ({"labels": torch.tensor([0, 1])}, "labels: expected 4 in the last dimension"),
        ({"attributes": torch.ones(1, 2)}, "attributes: expected at least 2 rows and 1 column"),
        ({"class_embeddings": torch.ones(3, 2, dtype=D)}, "class_embeddings: expected dtype torch.float32"),
        ({"class_embeddings": torch.ones(0, 2)}, "class_embeddings: expected at least 1 row"),
        ({"ridge": 0.0}, "ridge: expected a finite number above 0, got 0"),
        ({"ridge": float("inf")}, "ridge: expected a finite number above 0, got inf"),
        ({"scale": "9.5"}, "scale: expected a finite number, got '9.5'"),
    ],
)
def test_wrong_input_of_the_loss_is_refused(change, message):
    arguments = {"attributes": torch.ones(4, 2), "labels": torch.zeros(4).long(), "class_embeddings": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=message):
        zero_shot_loss(**(arguments | change))


def test_a_bad_element_reaches_nothing_that_is_shared():
    """Where the loss leaves it out, prototypes, learned numbers, costs and embeddings get what they get without it."""
    pool = pool_of(3, 4, 0.4, 5.0, learnable=True)
    shared = tuple(pool.parameters())
    x = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    bad = x.clone()
    bad[1, 2, 0] = float("nan")

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        found = pool.detailed(x)
        total = sum(t[[0, 2]].square().sum() for t in found)
        return torch.autograd.grad(total, shared)

    assert bool(torch.isnan(pool(bad)[1]).all()) and torch.equal(pool(bad)[[0, 2]], pool(x)[[0, 2]])
    for got, expected in zip(gradients(bad), gradients(x), strict=True):
        assert torch.equal(got, expected)
    ratio, cost = torch.tensor(0.3, dtype=D, requires_grad=True), x.abs()
    slopes = [
        torch.autograd.grad(gsp_coupling(c, ratio, 5.0).plan[[0, 2]].square().sum(), ratio)[0]
        for c in (bad.abs(), cost)
    ]
    assert torch.equal(*slopes)
    classes, labels = torch.eye(3, dtype=D).requires_grad_(), torch.arange(6) % 3
    losses = [zero_shot_loss(t, labels, classes) for t in (bad, x)]
    assert bool(torch.isnan(losses[0][1]))
    slopes = [torch.autograd.grad(loss[[0, 2]].sum(), classes)[0] for loss in losses]
    assert torch.equal(*slopes)
