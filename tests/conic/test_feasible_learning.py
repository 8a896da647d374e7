"""Feasible learning: its steps by hand, its limit against a quadratic program, its state through checkpoints.

Oracles: the dual step written out in a Python loop; for linear losses the resilient problem is a quadratic program,
which cvxpy solves, with its multipliers.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from difflayers.conic import FeasibleLearning

F64 = torch.float64


def by_hand(multipliers: list[float], losses: dict[int, list[float]], tolerance, rate, resilience) -> list[float]:
    out = list(multipliers)
    for i, values in losses.items():
        slack = 0.0 if resilience is None else out[i] / resilience
        out[i] = max(0.0, out[i] + rate * (sum(values) / len(values) - tolerance - slack))
    return out


@pytest.mark.parametrize("resilience", [None, 0.7])
def test_dual_steps_come_first_and_duplicates_count_once(resilience):
    module = FeasibleLearning(6, tolerance=0.5, dual_lr=0.3, resilience=resilience).double()
    expected = [0.0] * 6
    batches = [([0, 2, 5], [1.0, 0.2, 2.0]), ([5, 2, 5, 5], [3.0, 0.9, 0.1, 0.2]), ([0, 1], [-4.0, 0.5])]
    for index, values in batches:
        losses = torch.tensor(values, dtype=F64, requires_grad=True)
        total = module(losses, torch.tensor(index))
        of_sample: dict[int, list[float]] = {}
        for i, value in zip(index, values, strict=True):
            of_sample.setdefault(i, []).append(value)
        expected = by_hand(expected, of_sample, 0.5, 0.3, resilience)
        np.testing.assert_allclose(module.multipliers.numpy(), expected, atol=1e-15)
        (slope,) = torch.autograd.grad(total, losses)
        np.testing.assert_allclose(slope.numpy(), [expected[i] for i in index])
        np.testing.assert_allclose(
            float(total.detach()), sum(expected[i] * v for i, v in zip(index, values, strict=True))
        )
    slack = np.zeros(6) if resilience is None else np.array(expected) / resilience
    np.testing.assert_allclose(module.slack.numpy(), slack)


def test_order_of_a_batch_does_not_matter():
    index, losses = torch.tensor([3, 1, 3, 0, 1, 3]), torch.randn(6, generator=torch.Generator().manual_seed(0))
    one, other = (FeasibleLearning(4, tolerance=0.0, dual_lr=0.5) for _ in range(2))
    turn = torch.tensor([5, 2, 0, 1, 4, 3])
    one(losses, index)
    other(losses[turn], index[turn])
    torch.testing.assert_close(one.multipliers, other.multipliers)


def test_descent_ascent_ends_at_the_quadratic_program():
    """Losses linear in theta, of which not all can be below the tolerance, and a strongly convex term."""
    import cvxpy as cp

    generator = torch.Generator().manual_seed(1)
    A, b = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((12, 3), (12,)))
    tolerance, price = 0.1, 2.0
    theta, slack = cp.Variable(3), cp.Variable(12, nonneg=True)
    rows = A.numpy() @ theta + b.numpy() <= tolerance + slack
    cp.Problem(cp.Minimize(cp.sum_squares(theta) / 2 + price / 2 * cp.sum_squares(slack)), [rows]).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    assert slack.value.max() > 0.1  # not feasible without slack
    module = FeasibleLearning(12, tolerance=tolerance, dual_lr=0.1, resilience=price).double()
    x, index = torch.zeros(3, dtype=F64, requires_grad=True), torch.arange(12)
    for _ in range(2000):
        total = module(A @ x + b, index) + x.square().sum() / 2
        (slope,) = torch.autograd.grad(total, x)
        x = (x - 0.1 * slope).detach().requires_grad_()
    np.testing.assert_allclose(x.detach().numpy(), theta.value, atol=1e-6)
    np.testing.assert_allclose(module.multipliers.numpy(), rows.dual_value, atol=1e-6)
    np.testing.assert_allclose(module.slack.numpy(), slack.value, atol=1e-6)


def test_without_resilience_multipliers_of_an_infeasible_sample_grow_and_with_it_they_do_not():
    plain, resilient = (FeasibleLearning(1, tolerance=0.5, dual_lr=0.1, resilience=a).double() for a in (None, 2.0))
    for _ in range(600):
        for module in (plain, resilient):
            module(torch.tensor([1.5], dtype=F64), torch.tensor([0]))
    torch.testing.assert_close(plain.multipliers, torch.tensor([60.0], dtype=F64))
    torch.testing.assert_close(resilient.multipliers, torch.tensor([2.0], dtype=F64))  # resilience * (loss - tolerance)


def test_evaluation_mode_leaves_the_multipliers():
    module = FeasibleLearning(3, tolerance=0.0, dual_lr=1.0, resilience=None)
    module(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]))
    before = module.multipliers.clone()
    module.eval()
    total = module(torch.tensor([5.0, 5.0]), torch.tensor([0, 2]))
    assert torch.equal(module.multipliers, before) and float(total) == 15.0


def test_reductions_and_shapes():
    losses, index = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [2, 0]])
    modules = {r: FeasibleLearning(3, tolerance=0.0, dual_lr=1.0, reduction=r) for r in ("sum", "mean", "none")}
    found = {r: module(losses, index) for r, module in modules.items()}
    assert found["none"].shape == (2, 2)
    torch.testing.assert_close(found["sum"], found["none"].sum())
    torch.testing.assert_close(found["mean"], found["none"].mean())
    assert float(modules["sum"](losses[:0], index[:0])) == 0.0


def test_a_loss_that_is_not_finite_does_not_move_its_multiplier():
    module = FeasibleLearning(4, tolerance=0.0, dual_lr=1.0)
    module(torch.ones(4), torch.arange(4))
    module(torch.tensor([torch.nan, torch.inf, 2.0, torch.nan]), torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(module.multipliers, torch.ones(4))
    module(torch.tensor([3.0]), torch.tensor([0]))
    torch.testing.assert_close(module.multipliers, torch.tensor([3.0, 1.0, 1.0, 1.0]))


def test_training_goes_on_from_a_checkpoint():
    """state_dict, deepcopy and pickle: the next step is the same."""
    module = FeasibleLearning(5, tolerance=0.2, dual_lr=0.3)
    losses, index = torch.tensor([1.0, 0.5]), torch.tensor([4, 1])
    module(losses, index)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh = FeasibleLearning(5, tolerance=0.2, dual_lr=0.3)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    copies = [fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    expected = module(losses, index)
    for one in copies:
        torch.testing.assert_close(one(losses, index), expected)
        torch.testing.assert_close(one.multipliers, module.multipliers)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FeasibleLearning(6, tolerance=0.2).load_state_dict(module.state_dict())


def test_half_precision_losses_keep_a_table_in_single():
    module = FeasibleLearning(2, tolerance=0.0, dual_lr=1e-4, resilience=None)
    for _ in range(100):
        total = module(torch.ones(2, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert total.dtype == torch.bfloat16 and module.multipliers.dtype == torch.float32
    torch.testing.assert_close(module.multipliers, torch.full((2,), 1e-2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_samples": 0}, "n_samples: expected an integer of at least 1, got 0"),
        ({"n_samples": 2.5}, "n_samples: expected an integer"),
        ({"tolerance": float("nan")}, "tolerance: expected a finite number"),
        ({"dual_lr": 0.0}, "dual_lr: expected a finite number, more than 0"),
        ({"resilience": 0.0}, "resilience: expected None or more than half of dual_lr"),
        ({"dual_lr": 3.0, "resilience": 1.0}, "resilience: expected None or more than half of dual_lr = 3.0"),
        ({"reduction": "max"}, "reduction: expected"),
    ],
)
def test_bad_options(options, match):
    arguments = {"n_samples": 3, "tolerance": 0.1} | options
    with pytest.raises(ValueError, match=match):
        FeasibleLearning(arguments.pop("n_samples"), **arguments)


@pytest.mark.parametrize(
    ("losses", "index", "match"),
    [
        (torch.ones(2), torch.tensor([0, 3]), "index: expected numbers from 0 to 2, got 0 to 3"),
        (torch.ones(2), torch.tensor([-1, 1]), "index: expected numbers from 0 to 2, got -1 to 1"),
        (torch.ones(2), torch.tensor([0.0, 1.0]), "index: expected a tensor of integers, got torch.float32"),
        (torch.ones(2), [0, 1], "index: expected a tensor of integers, got list"),
        (torch.ones(2), torch.tensor([0]), r"index: expected shape \(2,\) as of losses, got \(1,\)"),
        (torch.ones(2).long(), torch.tensor([0, 1]), "losses: expected a floating-point tensor"),
        (torch.ones(2, device="meta"), torch.tensor([0, 1]), "losses: expected device cpu as of the module, got meta"),
    ],
)
def test_bad_input(losses, index, match):
    with pytest.raises(ValueError, match=match):
        FeasibleLearning(3, tolerance=0.1)(losses, index)
