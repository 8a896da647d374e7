"""Label-robust losses against a conic program, torch's own losses, and a dense grid of temperatures.

Oracles: cvxpy with Clarabel for the maximum over label weights; ``cross_entropy``, ``multi_margin``-like maxima and
means for the limits; for the adaptive temperature the best of a dense grid, refined around its best point with golden
sections; derivatives from finite differences.
"""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from difflayers import SolveError
from difflayers.conic import LabelRobustLoss, label_robust_loss

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(seed: int, n: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def class_margins(logits: torch.Tensor, targets: torch.Tensor, margin: float = 0.0) -> np.ndarray:
    d = (logits - logits.gather(-1, targets.unsqueeze(-1)) + margin).numpy().copy()
    np.put_along_axis(d, targets.numpy()[..., None], 0.0, -1)
    return d


def value_at(d: np.ndarray, lam: np.ndarray, peak: float, a: float) -> np.ndarray:
    """What the adaptive loss maximises, for one sample and many temperatures, with scipy's logsumexp."""
    from scipy.special import logsumexp

    K = len(d)
    return lam * (logsumexp(d / lam[:, None], axis=-1) - np.log(K)) - a * np.log(K) / (2 * peak) * (lam - peak) ** 2


def adaptive_oracle(d: np.ndarray, peak: float, a: float) -> tuple[float, float]:
    """Best value and temperature over (0, 2 peak]: a dense grid, then golden sections around its best point."""
    from scipy.optimize import minimize_scalar

    if peak != 1:  # in units of the peak: the tolerance below is absolute
        value, temperature = adaptive_oracle(d / peak, 1.0, a)
        return peak * value, peak * temperature
    grid = np.geomspace(1e-4, 2, 4001) * peak
    values = value_at(d, grid, peak, a)
    k = int(values.argmax())
    low, high = grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)]
    found = minimize_scalar(
        lambda x: -value_at(d, np.array([x]), peak, a)[0],
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-13},
    )
    return -found.fun, found.x


# ---------------------------------------------------------------------------------------------------- fixed temperature


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 20.0])
def test_equals_a_conic_program(temperature, margin):
    import cvxpy as cp

    logits, targets = normal(0, 3, 5), labels(1, 3, 5)
    loss = label_robust_loss(logits, targets, temperature=temperature, margin=margin, reduction="none")
    leaf = logits.clone().requires_grad_()
    total = label_robust_loss(leaf, targets, temperature=temperature, margin=margin, reduction="sum")
    (slope,) = torch.autograd.grad(total, leaf)
    for i, d in enumerate(class_margins(logits, targets, margin)):
        p = cp.Variable(5, nonneg=True)
        objective = d @ p - temperature * (-cp.sum(cp.entr(p)) + np.log(5))
        problem = cp.Problem(cp.Maximize(objective), [cp.sum(p) == 1])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        np.testing.assert_allclose(float(loss[i]), problem.value, atol=1e-7)
        expected = p.value - np.eye(5)[targets[i]]
        np.testing.assert_allclose(slope[i].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_limits(dtype):
    logits, targets = (3 * normal(2, 6, 4)).to(dtype), labels(3, 6, 4)
    tol = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-6, "atol": 2e-6}
    loss = lambda **options: label_robust_loss(logits, targets, reduction="none", **options)  # noqa: E731
    entropy = F.cross_entropy(logits, targets, reduction="none") - math.log(4)
    torch.testing.assert_close(loss(temperature=1.0), entropy, **tol)
    d = torch.from_numpy(class_margins(logits, targets, 1.5)).to(dtype)
    hinge = d.amax(-1)
    for temperature in (0.0, 1e-9, 1e-30):
        torch.testing.assert_close(loss(temperature=temperature, margin=1.5), hinge, atol=1e-8, rtol=tol["rtol"])
    for temperature in (1e9, 1e15, 1e30):
        torch.testing.assert_close(loss(temperature=temperature, margin=1.5), d.mean(-1), atol=1e-8, rtol=tol["rtol"])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3, 1.0, 1e12])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e9, 1e30])
@pytest.mark.parametrize("adaptive", [None, 2.0])
def test_no_nan_at_any_scale(adaptive, scale, temperature):
    """Value and gradients in logits and temperature, also where exponentials overflow; ties share the gradient."""
    if adaptive is not None and temperature == 0:
        return
    for dtype in (F64, torch.float32):
        logits = (scale * torch.tensor([[1.0, 1.0, -1.0], [0.0, 2.0, 2.0]])).to(dtype).requires_grad_()
        lam = torch.tensor(temperature, dtype=dtype, requires_grad=True)
        options = {"temperature": lam, "adaptive": adaptive, "reduction": "sum"}
        loss = label_robust_loss(logits, torch.tensor([2, 0]), **options)
        in_logits, in_lam = torch.autograd.grad(loss, (logits, lam))
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(in_logits).all()) and bool(torch.isfinite(in_lam))
        torch.testing.assert_close(in_logits.sum(-1), torch.zeros(2, dtype=dtype), atol=1e-6, rtol=0)
        assert in_logits[0, 0] == in_logits[0, 1] and in_logits[1, 1] == in_logits[1, 2]
        if scale > temperature * 1e4:
            torch.testing.assert_close(in_logits[0], torch.tensor([0.5, 0.5, -1.0], dtype=dtype))


def test_thousands_of_classes_in_single_precision():
    """One class far ahead of 20,000 others, whose mean exponential is 1/K and not 1."""
    logits, targets = torch.zeros(1, 20_000), torch.tensor([1])
    logits[0, 0] = 30.0
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = (label_robust_loss(x, targets) for x in (leaf, exact))
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
    (slope,), (reference,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(slope, reference.float(), rtol=1e-5, atol=1e-12)


def test_classes_out_of_the_question_count_in_their_number():
    logits = torch.tensor([[0.3, -math.inf, 1.0]], dtype=F64, requires_grad=True)
    loss = label_robust_loss(logits, torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(math.log((1 + math.exp(0.7)) / 3), dtype=F64))
    (slope,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(slope).all()) and slope[0, 1] == 0


def test_derivatives_of_the_fixed_temperature():
    logits, targets = normal(4, 3, 4).requires_grad_(), labels(5, 3, 4)
    temperature = torch.tensor([0.5, 1.0, 30.0], dtype=F64, requires_grad=True)
    margin = normal(6, 4).requires_grad_()

    def loss(logits, temperature, margin):
        return label_robust_loss(logits, targets, temperature=temperature, margin=margin, reduction="none")

    assert gradcheck(loss, (logits, temperature, margin), check_forward_ad=True)
    assert gradgradcheck(loss, (logits, temperature, margin))


# ------------------------------------------------------------------------------------------------- adaptive temperature


@pytest.mark.parametrize("a", [1.001, 1.1, 2.0, 50.0])
@pytest.mark.parametrize("peak", [1e-9, 0.1, 1.0, 1e9])
def test_adaptive_equals_a_dense_search(peak, a):
    """Logits of many sizes relative to the temperature, a margin, and ten classes."""
    spread = torch.logspace(-1, 2, 12, dtype=F64).unsqueeze(-1)
    logits, targets = peak * spread * normal(7, 12, 10), labels(8, 12, 10)
    loss = label_robust_loss(logits, targets, temperature=peak, margin=peak, adaptive=a, reduction="none")
    for i, d in enumerate(class_margins(logits, targets, peak)):
        value, _ = adaptive_oracle(d, peak, a)
        np.testing.assert_allclose(float(loss[i]), value, atol=1e-11 * peak, rtol=1e-11)


def test_the_better_of_two_local_maxima_counts():
    """One class of a hundred stands out: over a range of its margin two temperatures are locally best."""
    K, a, count = 100, 1.2, 60
    logits, targets = torch.zeros(count, K, dtype=F64), torch.zeros(count, dtype=torch.int64)
    logits[:, 1] = torch.linspace(1.6, 3.4, count, dtype=F64)
    loss = label_robust_loss(logits, targets, adaptive=a, reduction="none")
    grid, several, best = np.linspace(1 - 1 / a, 1, 3000), 0, []
    for i, d in enumerate(class_margins(logits, targets)):
        slopes = np.diff(value_at(d, grid, 1.0, a))
        several += int(((slopes[:-1] > 0) & (slopes[1:] <= 0)).sum() > 1)
        value, temperature = adaptive_oracle(d, 1.0, a)
        best.append(temperature)
        np.testing.assert_allclose(float(loss[i]), value, rtol=1e-10, atol=1e-12)
    assert several > 15  # there is something to choose,
    assert np.diff(best).min() < -0.2  # and the best temperature jumps


def test_gradient_is_that_of_the_loss_at_the_best_temperature():
    logits, targets = (3 * normal(9, 4, 6)).requires_grad_(), labels(10, 4, 6)
    loss = label_robust_loss(logits, targets, temperature=0.8, adaptive=1.3, reduction="sum")
    (slope,) = torch.autograd.grad(loss, logits)
    for i, d in enumerate(class_margins(logits.detach(), targets)):
        _, best = adaptive_oracle(d, 0.8, 1.3)
        expected = np.exp(d / best) / np.exp(d / best).sum() - np.eye(6)[targets[i]]
        np.testing.assert_allclose(slope[i].numpy(), expected, atol=1e-6)


def test_derivatives_of_the_adaptive_loss():
    logits, targets = (2 * normal(11, 3, 4)).requires_grad_(), labels(12, 3, 4)
    peak = torch.tensor([0.5, 1.0, 3.0], dtype=F64, requires_grad=True)
    a = torch.tensor([1.3, 2.0, 4.0], dtype=F64, requires_grad=True)

    def loss(logits, peak, a):
        return label_robust_loss(logits, targets, temperature=peak, adaptive=a, margin=0.3, reduction="none")

    assert gradcheck(loss, (logits, peak, a), check_forward_ad=True)
    assert gradgradcheck(loss, (logits, peak, a))
    # third order: the second derivative's own differences
    second = torch.func.hessian(lambda x: loss(x, peak.detach(), a.detach()).sum())
    assert gradcheck(second, (logits,), atol=1e-4, fast_mode=True)


def test_the_second_derivative_sees_the_temperature_move():
    logits, targets = (2 * normal(13, 1, 4)).requires_grad_(), torch.tensor([1])
    hessian = torch.func.hessian(lambda x: label_robust_loss(x, targets, adaptive=1.3))(logits.detach())
    d = class_margins(logits.detach(), targets)[0]
    _, best = adaptive_oracle(d, 1.0, 1.3)
    p = np.exp(d / best) / np.exp(d / best).sum()
    mean, log_k = p @ d, 1.3 * np.log(4)
    fixed = (np.diag(p) - np.outer(p, p)) / best
    v = p * (d - mean) / best**2
    moving = np.outer(v, v) / (log_k - p @ (d - mean) ** 2 / best**3)
    np.testing.assert_allclose(hessian[0, :, 0].numpy(), fixed + moving, atol=1e-6)
    assert np.abs(moving).max() > 1e-3


def test_where_two_maxima_merge_the_second_derivative_is_refused_and_the_first_is_not():
    """There three derivatives over the temperature vanish, in the margin d of one class among 30, and in a."""
    import mpmath

    K = 30

    def value(lam, d, a):
        return lam * mpmath.log((mpmath.exp(d / lam) + K - 1) / K) - a * mpmath.log(K) / 2 * (lam - 1) ** 2

    def slopes(lam, d, a):
        return [mpmath.diff(lambda x: value(x, d, a), lam, k) for k in (1, 2, 3)]

    with mpmath.workdps(30):
        lam, d, a = (float(x) for x in mpmath.findroot(slopes, (0.6, 2.7, 1.55)))
    assert 1 - 1 / a < lam < 1
    logits, targets = torch.zeros(1, K, dtype=F64), torch.tensor([0])
    logits[0, 1] = d
    logits.requires_grad_()
    loss = label_robust_loss(logits, targets, adaptive=a)
    np.testing.assert_allclose(float(loss.detach()), float(value(lam, d, a)), atol=1e-12)
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    p = math.exp(d / lam) / (math.exp(d / lam) + K - 1)
    np.testing.assert_allclose(float(slope[0, 1].detach()), p, atol=1e-4)
    with pytest.raises(SolveError, match=r"label_robust_loss \(adjoint\).*SINGULAR"):
        torch.autograd.grad(slope[0, 1], logits)


# ------------------------------------------------------------------------------------------------------- the usual rest


def test_reductions_shapes_and_the_module():
    logits, targets = normal(14, 2, 3, 5), labels(15, 6, 5).reshape(2, 3)
    for options in ({}, {"adaptive": 1.5}):
        each = label_robust_loss(logits, targets, reduction="none", **options)
        assert each.shape == (2, 3)
        torch.testing.assert_close(label_robust_loss(logits, targets, **options), each.mean())
        torch.testing.assert_close(label_robust_loss(logits, targets, reduction="sum", **options), each.sum())
        module = LabelRobustLoss(**options)
        torch.testing.assert_close(module(logits, targets), each.mean())
        assert "temperature=1.0" in repr(module)
        shared = label_robust_loss(logits, torch.tensor(2), reduction="none", **options)
        every = label_robust_loss(logits, torch.full((2, 3), 2), reduction="none", **options)
        torch.testing.assert_close(shared, every)


def test_one_class():
    for adaptive in (None, 2.0):
        logits = torch.tensor([[3.0]], requires_grad=True)
        loss = label_robust_loss(logits, torch.tensor([0]), adaptive=adaptive)
        assert float(loss.detach()) == 0 and torch.autograd.grad(loss, logits)[0].item() == 0


def test_nan_stays_in_its_element():
    logits, targets = normal(16, 4, 3), labels(17, 4, 3)
    logits[1, 2] = torch.nan
    rest = torch.tensor([0, 2, 3])
    for adaptive in (None, 1.5):
        leaf = logits.clone().requires_grad_()
        loss = label_robust_loss(leaf, targets, adaptive=adaptive, reduction="none")
        alone = label_robust_loss(logits[rest], targets[rest], adaptive=adaptive, reduction="none")
        assert torch.isnan(loss).tolist() == [False, True, False, False] and torch.equal(loss[rest], alone)
        (slope,) = torch.autograd.grad(loss[rest].sum(), leaf)
        assert bool(torch.isfinite(slope[rest]).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1"),
        ({"temperature": math.inf}, "temperature: expected a finite number"),
        ({"temperature": 0.0, "adaptive": 2.0}, "temperature: expected more than 0, got 0"),
        ({"adaptive": 1.0}, "adaptive: expected more than 1, got 1"),
        ({"temperature": torch.ones(3)}, r"temperature: expected a shape that broadcasts to \(2,\)"),
        ({"temperature": torch.ones(2, dtype=F64)}, "temperature: expected dtype torch.float32"),
        ({"margin": torch.ones(2)}, r"margin: expected a shape that broadcasts to \(2, 3\)"),
        ({"margin": "1"}, "margin: expected a number or a tensor, got str"),
        ({"reduction": "max"}, "reduction: expected"),
        ({"targets": torch.tensor([0, 3])}, "targets: expected integers from 0 to 2"),
        ({"targets": torch.tensor([0, -100])}, "targets: expected integers from 0 to 2"),
        ({"targets": torch.tensor([0.0, 1.0])}, "targets: expected a tensor of integers, got torch.float32"),
        ({"targets": torch.tensor([0, 1, 1])}, r"targets: expected a shape that broadcasts to \(2,\)"),
        ({"logits": torch.zeros(2, 0)}, "logits: expected at least one class"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits: expected a floating-point tensor"),
    ],
)
def test_bad_input(options, match):
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1])} | options
    with pytest.raises(ValueError, match=match):
        label_robust_loss(arguments.pop("logits"), arguments.pop("targets"), **arguments)
