"""``Unrolled(max_steps, checkpoint=...)``.

Oracle: the same unrolled solve without checkpoints, whose operations are the same ones; memory is counted by hooks on
saved tensors, as bytes alive at once.
"""

from __future__ import annotations

import pytest
import torch

from difflayers.implicit import (
    LBFGS,
    AcceleratedProximalGradient,
    Anderson,
    LevenbergMarquardt,
    Projection,
    Unrolled,
    argmin,
    fixed_point,
    nonlinear_least_squares,
)

generator = torch.Generator().manual_seed(1)
A = torch.randn(12, 6, dtype=torch.float64, generator=generator)
B = torch.randn(3, 12, dtype=torch.float64, generator=generator)
W = torch.rand(6, dtype=torch.float64, generator=generator)
START = torch.zeros(3, 6, dtype=torch.float64)


def objective(z, b, w):
    return (z @ A.mT - b).square().sum(-1) / 2 + (w * torch.cosh(z)).sum(-1)


def by_lbfgs(b, w, adjoint):
    return argmin(objective, START, (b, w), solver=LBFGS(), adjoint=adjoint)


def by_projection(b, w, adjoint):
    box = Projection(lambda z, b, w: torch.minimum(z, w))
    return argmin(objective, START, (b, w), constraint=box, solver=AcceleratedProximalGradient(), adjoint=adjoint)


def by_anderson(b, w, adjoint):
    return fixed_point(
        lambda z, b, w: torch.tanh(w * z + b[..., :6]), START, (b, w), solver=Anderson(), adjoint=adjoint
    )


def by_levenberg(b, w, adjoint):
    residual = lambda z, b, w: torch.sinh(w * z) @ A.mT - b  # noqa: E731
    return nonlinear_least_squares(residual, START, (b, w), solver=LevenbergMarquardt(), adjoint=adjoint)


RUNS = [by_lbfgs, by_projection, by_anderson, by_levenberg]


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
@pytest.mark.parametrize("checkpoint", [True, 1, 5, 40])
@pytest.mark.parametrize("run", RUNS)
def test_the_gradient_is_that_of_all_steps(run, checkpoint):
    b, w = B.clone().requires_grad_(), W.clone().requires_grad_()
    found = []
    for adjoint in (Unrolled(20), Unrolled(20, checkpoint=checkpoint)):
        z = run(b, w, adjoint)
        first = torch.autograd.grad(z.square().sum(), (b, w), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (b, w))
        found.append((z, *first, *second))
    assert torch.equal(found[0][0], found[1][0])
    for all_steps, segments in list(zip(*found, strict=True))[1:3]:
        assert (all_steps - segments).abs().max() <= 4e-15 * all_steps.abs().max()
    for all_steps, segments in list(zip(*found, strict=True))[3:]:
        assert (all_steps - segments).abs().max() <= 1e-9 * all_steps.abs().max()


class _Counted:
    """A saved tensor whose bytes count as long as it lives."""

    alive = peak = 0

    def __init__(self, t: torch.Tensor) -> None:
        self.t, self.bytes = t, t.numel() * t.element_size()
        _Counted.alive += self.bytes
        _Counted.peak = max(_Counted.peak, _Counted.alive)

    def __del__(self) -> None:
        _Counted.alive -= self.bytes


def _peak(steps: int, checkpoint: bool | int) -> int:
    b, w = B.clone().requires_grad_(), W.clone().requires_grad_()
    _Counted.alive = _Counted.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(_Counted, lambda counted: counted.t):
        z = by_lbfgs(b, w, Unrolled(steps, checkpoint=checkpoint))
        torch.autograd.grad(z.sum(), (b, w))
    return _Counted.peak


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_memory_grows_with_the_square_root():
    few, many = _peak(9, True), _peak(81, True)
    assert many < 3.5 * few  # nine times the steps
    assert _peak(81, False) > 5 * many
    assert _peak(81, 81) > 5 * many


def test_a_checkpoint_must_be_a_number_of_steps():
    for wrong in (-1, 0, 2.5, "sqrt"):
        with pytest.raises(ValueError, match="checkpoint: expected"):
            Unrolled(3, checkpoint=wrong)
    assert Unrolled(100, checkpoint=True).segment == 10 and Unrolled(100).segment is None


@pytest.mark.filterwarnings("ignore::difflayers.SolveWarning")
def test_under_transforms():
    both = [
        torch.func.vmap(torch.func.grad(lambda b, a=a: by_lbfgs(b.expand(3, 12), W, a).sum()))(B)
        for a in (Unrolled(8), Unrolled(8, checkpoint=True))
    ]
    assert torch.equal(*both)
