"""WarmStart: later solves start where earlier ones ended; failures are not kept; state survives."""

import copy

import pytest
import torch

from difflayers.implicit import Picard, WarmStart, fixed_point_ex, root_find_ex

F64 = torch.float64


def cubic(y, a):
    return y**3 + y - a


def test_second_solve_takes_one_step_and_has_the_same_gradient():
    warm, index = WarmStart(10), torch.tensor([4, 0, 9])
    a = torch.tensor([2.0, 10.0, -30.0], dtype=F64, requires_grad=True)
    steps, grads = [], []
    for _ in range(2):
        init = warm(index, torch.ones(3, dtype=F64))
        assert not init.requires_grad
        solution = root_find_ex(cubic, init, (a,), event_ndim=0)
        warm.store(index, solution)
        steps.append(solution.steps.max().item())
        grads.append(torch.autograd.grad(solution.value.sum(), a)[0])
    assert steps[0] > 3 and steps[1] == 1
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_trees_defaults_and_failed_samples():
    warm = WarmStart(3)
    default = {"x": torch.full((2, 2), 7.0), "y": torch.zeros(2)}
    warm.store(torch.tensor([0, 1]), {"x": torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), "y": torch.ones(2)})
    got = warm(torch.tensor([0, 2]), default)
    assert got["x"].tolist() == [[1.0, 2.0], [7.0, 7.0]] and got["y"].tolist() == [1.0, 0.0]
    assert warm(torch.tensor([1, 2]), default)["x"].tolist() == [[7.0, 7.0], [7.0, 7.0]]  # its solve had failed
    bad = fixed_point_ex(lambda z: 3 * z + 1, torch.ones(1, 2), solver=Picard())
    assert bad.failed.all()
    other = WarmStart(3)
    other.store(torch.tensor([0]), bad)
    assert other(torch.tensor([0]), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_state_survives():
    warm = WarmStart(4)
    warm.store(torch.tensor([2]), torch.tensor([[5.0, 6.0]]))
    fresh = WarmStart(4)
    fresh.load_state_dict(warm.state_dict())
    for w in (fresh, copy.deepcopy(warm)):
        assert w(torch.tensor([2]), torch.zeros(1, 2)).tolist() == [[5.0, 6.0]]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([4]), "index: expected numbers from 0 to 3, got"),
        (torch.tensor([0.0]), "index: expected a vector of integers, got"),
        (torch.tensor([0, 1]), "value: expected 2 rows, one per index, got"),
    ],
)
def test_bad_input_is_named(index, message):
    with pytest.raises(ValueError, match=message):
        WarmStart(4)(index, torch.zeros(1, 2))
