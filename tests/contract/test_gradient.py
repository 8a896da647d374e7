"""check_gradient: what it finds, what it reports, what it leaves alone."""

import pytest
import torch
from torch import Tensor, nn

from difflayers.testing import check_gradient


class Scaled(nn.Module):
    """A linear layer; the gradient of one of its parameters may be spoilt."""

    def __init__(self, spoil: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(2))
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias + self.spoil * (self.bias - self.bias.detach())
        return torch.tanh(x @ self.weight) + bias.square()


def test_a_right_gradient_passes(device):
    report = check_gradient(Scaled().to(device), torch.randn(4, 3, device=device))
    assert report.passed
    assert [row[0] for row in report.rows] == ["weight", "bias", "batch"]
    assert report.worst < 1e-6


def test_a_wrong_gradient_is_named():
    with pytest.raises(AssertionError, match=r"bias .* <- differs") as caught:
        check_gradient(Scaled(spoil=0.01), torch.randn(4, 3))
    message = str(caught.value)
    assert message.count("<- differs") == 1
    assert message.splitlines()[2].startswith("bias"), "the worst stands first"


def test_a_wrong_gradient_can_be_only_reported():
    report = check_gradient(Scaled(spoil=0.01), torch.randn(4, 3), check=False)
    assert not report.passed
    assert report.worst == pytest.approx(0.01, rel=0.1)


def test_a_lost_gradient_is_found():
    report = check_gradient(lambda x: x.sum() + x.detach().square().sum(), torch.ones(3), check=False)
    assert not report.passed


def test_a_nan_gradient_is_found():
    report = check_gradient(lambda x: x.square().sum().sqrt(), torch.zeros(3), check=False)
    assert not report.passed


def test_the_model_is_left_alone():
    model, batch = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(5, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = batch.clone()
    state = torch.get_rng_state()
    assert check_gradient(model, batch).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, x) and not batch.requires_grad
    assert all(p.grad is None for p in model.parameters())
    for name, after in model.state_dict().items():
        assert torch.equal(after, before[name]), name
        assert after.dtype == before[name].dtype


def test_batches_are_tuples_dictionaries_and_integers():
    embedding = nn.Embedding(5, 2)
    assert check_gradient(embedding, torch.tensor([0, 3])).passed
    assert check_gradient(lambda x, k: x[k], (torch.randn(4), 2)).passed
    report = check_gradient(lambda *, x, y: x * y, {"x": torch.randn(3), "y": torch.randn(3)})
    assert [row[0] for row in report.rows] == ["batch['x']", "batch['y']"]


def test_a_loss_of_ones_own():
    report = check_gradient(Scaled(), torch.randn(4, 3), loss=lambda out: out.square().mean())
    assert report.passed


def test_nothing_to_differentiate_is_refused():
    with pytest.raises(ValueError, match="batch: expected a module with parameters"):
        check_gradient(lambda x: x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="expected an output that depends"):
        check_gradient(lambda x: x.detach(), torch.ones(2))
    with pytest.raises(ValueError, match="loss: expected one finite number"):
        check_gradient(lambda x: x * float("nan"), torch.ones(2))
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        check_gradient(lambda x: x, torch.ones(2), directions=0)
